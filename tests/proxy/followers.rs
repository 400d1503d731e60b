//! Followers of the stream of changes who keep what they have read, under random writes at three instances:
//! what they still keep in the end is what is there.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
};

use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};
use reqwest::Method;
use secretier::{access::Action, phase::Phase};
use serde_json::json;

use crate::{
    app::{Answer, Backend, Instance, Setup, TestApp, drawn_anew, on_both, secret},
    events::{Stream, Told},
    quick::times,
    shared_folders::SHARED,
};

const TENANTS: [&str; 4] = ["acme", "globex", "initech", "/hono-api"];

/// How many secrets each tenant may have: so many that a round leaves some as they are.
const KEYS: usize = 60;

/// A secret's name; every sixth is one that a rule may single out.
fn name(key: usize) -> String {
    if key.is_multiple_of(6) { format!("W{key}") } else { format!("K{key}") }
}

/// Writes of each instance in a round.
const WRITES: usize = 40;

/// The secrets that a follower may see, by its token and its query.
struct Scope {
    token: String,
    query: &'static str,
    tenants: &'static [&'static str],
}

/// Keeps what it reads until it is told of a change, as a cache in a caller's process does.
struct Follower<'a> {
    instances: &'a [&'a Instance; 3],
    at: usize,
    scope: &'a Scope,
    stream: Stream,
    last: Option<String>,
    kept: BTreeMap<(String, String), Option<String>>,
    heard: usize,
    resets: usize,
}

impl<'a> Follower<'a> {
    async fn start(instances: &'a [&'a Instance; 3], at: usize, scope: &'a Scope) -> Self {
        let stream = Stream::open_at(instances[at], &scope.token, scope.query, None).await;
        let mut follower =
            Self { instances, at, scope, stream, last: None, kept: BTreeMap::new(), heard: 0, resets: 0 };
        follower.listen().await;
        follower
    }

    /// Takes in what is told up to the next comment: then all that it reads is newer.
    async fn listen(&mut self) {
        loop {
            match self.stream.next_or_end().await {
                Some(Told::Comment) => return,
                Some(Told::Place { id }) => self.last = Some(id),
                Some(Told::Reset { id }) => {
                    self.kept.clear();
                    self.resets += 1;
                    self.last = Some(id);
                }
                Some(Told::Changed { id, data }) => {
                    let (tenant, key) = (data["tenant"].as_str().unwrap(), data["key"].as_str().unwrap());
                    assert!(self.scope.tenants.contains(&tenant), "{tenant} is not in the scope");
                    assert!(!data.to_string().contains("value-"), "{data}");
                    self.kept.remove(&(tenant.to_owned(), key.to_owned()));
                    self.heard += 1;
                    self.last = Some(id);
                }
                // It was cut off.
                None => self.come_back().await,
            }
        }
    }

    /// Takes in what has come by now.
    async fn take(&mut self) {
        let soon = std::time::Duration::from_millis(30);
        let _ = tokio::time::timeout(soon, self.listen()).await;
    }

    /// Opens the stream again, at any instance, behind what was heard last.
    async fn come_back(&mut self) {
        let last = self.last.as_deref();
        self.stream = Stream::open_at(self.instances[self.at], &self.scope.token, self.scope.query, last).await;
    }

    async fn read(&mut self, tenant: &str, key: usize) {
        let request = self.instances[self.at].request(Method::GET, &secret(tenant, &name(key)));
        let answer = Answer::of(request.bearer_auth(&self.scope.token)).await;
        assert!(matches!(answer.status, 200 | 404), "{answer:?}");
        self.kept.insert((tenant.to_owned(), name(key)), (answer.status == 200).then(|| answer.value()));
    }

    async fn follow(&mut self, mut chance: StdRng, is_over: &AtomicBool) {
        while !is_over.load(Ordering::Acquire) {
            match chance.random_range(0..10) {
                0 => {
                    self.at = chance.random_range(0..3);
                    self.come_back().await;
                    self.listen().await;
                }
                // Nobody takes what is told meanwhile.
                1 => tokio::time::sleep(std::time::Duration::from_millis(chance.random_range(0..100))).await,
                2..=4 => self.take().await,
                _ => {
                    let tenants = self.scope.tenants;
                    let tenant = tenants[chance.random_range(0..tenants.len())];
                    self.read(tenant, chance.random_range(0..KEYS)).await;
                }
            }
        }
    }

    /// What it keeps is what is there, once it has heard of everything; gives how much that is.
    async fn check(&mut self, truth: &BTreeMap<(String, String), Option<String>>) -> usize {
        // Whatever was under way is told within two comments.
        for _ in 0..3 {
            self.listen().await;
        }
        for (name, kept) in &self.kept {
            assert_eq!(kept, &truth[name], "{name:?} after {} changes and {} resets", self.heard, self.resets);
        }
        self.kept.len()
    }
}

async fn write(app: &TestApp, instance: &Instance, mut chance: StdRng, writer: usize, count: usize) {
    for number in 0..count {
        let (tenant, key) = (chance.random_range(0..TENANTS.len()), chance.random_range(0..KEYS));
        let path = secret(TENANTS[tenant], &name(key));
        let request = match chance.random_range(0..8) {
            0 => instance.request(Method::DELETE, &path),
            _ => {
                let body = json!({ "value": format!("value-{writer}-{number}-{:x}", chance.random::<u32>()) });
                instance.request(Method::PUT, &format!("{path}?create_tenant=true")).json(&body)
            }
        };
        let answer = Answer::of(request.bearer_auth(&app.token)).await;
        assert!(matches!(answer.status, 200 | 201 | 204 | 404), "{answer:?}");
    }
}

async fn truth(app: &TestApp) -> BTreeMap<(String, String), Option<String>> {
    let mut truth = BTreeMap::new();
    for tenant in TENANTS {
        for key in (0..KEYS).map(name) {
            let answer = app.get_fresh(tenant, &key).await;
            truth.insert((tenant.to_owned(), key), (answer.status == 200).then(|| answer.value()));
        }
    }
    truth
}

async fn what_is_kept_is_true(app: TestApp, rounds: usize) {
    let (second, third) = (app.another().await, app.another().await);
    let instances = [app.instance(), &second, &third];
    let narrow = app.new_token("narrow", &["acme", "/*"], &[Action::Read]).await;
    for tenant in TENANTS {
        app.put(tenant, "FIRST", "value-first").await;
    }
    app.followed().await;
    for instance in &instances {
        instance.service.access.reload().await.unwrap();
    }
    let scopes = [
        Scope { token: app.token.clone(), query: "", tenants: &TENANTS },
        Scope { token: app.token.clone(), query: "?tenants=globex,%2Fhono-api", tenants: &["globex", "/hono-api"] },
        Scope { token: narrow, query: "", tenants: &["acme", "/hono-api"] },
    ];
    let mut chance = StdRng::seed_from_u64(drawn_anew().rng().next_u64());
    let mut followers = Vec::new();
    for number in 0..9 {
        followers.push(Follower::start(&instances, number % 3, &scopes[number / 3]).await);
    }
    let mut compared = 0;
    for _ in 0..rounds {
        let is_over = AtomicBool::new(false);
        let following = followers.iter_mut().map(|one| one.follow(StdRng::seed_from_u64(chance.random()), &is_over));
        let following = futures_util::future::join_all(following.collect::<Vec<_>>());
        let writing = instances
            .iter()
            .enumerate()
            .map(|(writer, instance)| write(&app, instance, StdRng::seed_from_u64(chance.random()), writer, WRITES));
        let writing = writing.collect::<Vec<_>>();
        let writing = async {
            futures_util::future::join_all(writing).await;
            is_over.store(true, Ordering::Release);
        };
        tokio::join!(following, writing);
        app.followed().await;
        let truth = truth(&app).await;
        for follower in &mut followers {
            compared += follower.check(&truth).await;
        }
    }
    let heard: usize = followers.iter().map(|follower| follower.heard).sum();
    assert!(heard > rounds * WRITES && compared > rounds * 9, "{heard} heard, {compared} compared");
    second.stop().await;
    third.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_who_comes_goes_and_stalls_misses_no_change_without_a_reset() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        what_is_kept_is_true(app, times(3, 1)).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nor_does_one_of_tenants_that_infisical_owns_in_part() {
    // Some of the secrets are in no feed, for the database has no copy of them.
    let rule = "[[rules]]\nkeys = \"W*\"\nphase = \"infisical\"\n\
                [[rules]]\ntenants = \"globex\"\nphase = \"database\"\n";
    let mut setup = Setup::new(Backend::postgres().await, Phase::Hybrid).with(rule);
    setup.infisical = SHARED.to_owned();
    let app = setup.start().await;
    what_is_kept_is_true(app, times(3, 1)).await;
}
