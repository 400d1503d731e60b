//! A start without the database, from what was served last.

use std::{
    collections::BTreeSet,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use reqwest::Method;
use secretier::{
    access::{Action, NewToken},
    app::StartError,
    clock::Clock,
    log,
    offline::{OfflineFile, Record},
    phase::Phase,
    tiers::{
        database::StoreError,
        upstream::standin::{Readable, Rights, Route},
    },
};

use crate::{
    app::{Answer, Backend, ENV, Setup, TestApp, eventually, secret},
    postgres::Postgres,
};

const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A database that can be taken away.
enum Site {
    Sqlite(Backend),
    Postgres(Box<Postgres>, Backend),
}

impl Site {
    async fn postgres() -> Self {
        let server = tokio::task::spawn_blocking(Postgres::start).await.unwrap();
        let url = server.database().await;
        Self::Postgres(Box::new(server), Backend::Postgres(url))
    }

    fn backend(&self) -> Backend {
        match self {
            Self::Sqlite(backend) | Self::Postgres(_, backend) => backend.clone(),
        }
    }

    /// The server is stopped; of SQLite, the disk with its file is gone.
    fn goes(&mut self) {
        match self {
            Self::Sqlite(Backend::Sqlite(folder)) => {
                std::fs::rename(folder.path(), folder.path().with_extension("away")).unwrap();
                std::fs::create_dir_all(folder.path().join("test.db")).unwrap();
            }
            Self::Sqlite(Backend::Postgres(_)) => unreachable!("it is SQLite"),
            Self::Postgres(server, _) => server.stop(),
        }
    }

    fn comes_back(&mut self) {
        match self {
            Self::Sqlite(Backend::Sqlite(folder)) => {
                std::fs::remove_dir_all(folder.path()).unwrap();
                std::fs::rename(folder.path().with_extension("away"), folder.path()).unwrap();
            }
            Self::Sqlite(Backend::Postgres(_)) => unreachable!("it is SQLite"),
            Self::Postgres(server, _) => server.start_again(),
        }
    }
}

/// Runs a test on each database.
async fn on_both(test: impl AsyncFn(Site)) {
    test(Site::Sqlite(Backend::sqlite())).await;
    test(Site::postgres().await).await;
}

/// An instance that keeps what it serves, and where.
struct Kept {
    app: TestApp,
    site: Site,
    file: PathBuf,
    _folder: tempfile::TempDir,
}

impl Kept {
    async fn start(site: Site, phase: Phase) -> Self {
        Self::with(site, phase, "offline_every = \"1s\"").await
    }

    async fn with(site: Site, phase: Phase, memory: &str) -> Self {
        let folder = tempfile::TempDir::new().unwrap();
        let file = folder.path().join("offline");
        let memory = format!("[memory]\noffline_file = \"{}\"\n{memory}\n", file.display());
        let app = Setup::new(site.backend(), phase).with(&memory).start().await;
        Self { app, site, file, _folder: folder }
    }

    /// A secret where its owner keeps it.
    async fn has(&self, tenant: &str, key: &str, value: &str) {
        match self.app.setup.phase {
            Phase::Database => assert_eq!(self.app.put(tenant, key, value).await.status, 201),
            Phase::Infisical | Phase::Hybrid => self.app.holds(tenant, &[(key, value)]),
        }
        // A list of folders from before does not have it.
        assert_eq!(self.app.get_fresh(tenant, key).await.value(), value);
    }

    fn clock(&self) -> Clock {
        self.app.instance().clock.clone()
    }

    /// Waits until a file was written that holds these and nothing else.
    async fn holds(&self, names: &[&str]) {
        let names: BTreeSet<String> = names.iter().map(|&name| name.to_owned()).collect();
        eventually(async || self.held().is_some_and(|held| held == names)).await;
    }

    /// What the file holds: `tenant/KEY`, and the names of tokens.
    fn held(&self) -> Option<BTreeSet<String>> {
        let found = OfflineFile::open(&self.file, self.app.setup.environment, u64::MAX).ok()?;
        let key = found.key(&self.app.instance().service.resolver.database().keys().ring()).unwrap();
        let mut held = BTreeSet::new();
        let mut take = |record| match record {
            Record::Secret(secret) => drop(held.insert(format!("{}/{}", secret.tenant, secret.key))),
            Record::Denied { tenant, .. } => drop(held.insert(format!("denied {tenant}"))),
            Record::Token(token) => {
                let token = serde_json::to_value(&token).unwrap();
                held.insert(format!("token {}", token["name"].as_str().unwrap()));
            }
            Record::Phase { .. } | Record::Shredded { .. } | Record::Followed { .. } => {}
        };
        let read = found.read(&key, |record, _| {
            take(record);
            Ok(())
        });
        // One that a test has damaged is there until it is written anew.
        read.ok()?;
        Some(held)
    }

    /// Ends the instance, takes database and Infisical away, and starts it again.
    async fn start_alone(&mut self) {
        let clock = self.clock();
        self.stop_all().await;
        self.app.try_start(clock).await.unwrap();
    }

    /// Ends the instance when it has kept what it holds; takes database and Infisical away.
    async fn stop_all(&mut self) {
        eventually(async || self.file.exists()).await;
        self.app.stop().await;
        self.take_away().await;
    }

    async fn take_away(&mut self) {
        self.app.infisical.stop().await;
        tokio::task::block_in_place(|| self.site.goes());
    }

    async fn give_back(&mut self) {
        self.app.infisical.restart().await.unwrap();
        tokio::task::block_in_place(|| self.site.comes_back());
    }

    /// Waits until everything is as after a usual start.
    async fn is_whole(&self) {
        eventually(async || {
            let ready = self.app.ready().await;
            ready.status == 200 && ready.json()["started_from"].is_null()
        })
        .await;
    }

    /// Why an instance does not start.
    async fn refusal(&mut self, clock: Clock) -> String {
        let error = self.app.try_start(clock).await.unwrap_err();
        assert!(matches!(error, StartError::OfflineCopy { .. }), "{error:?}");
        let told = log::chain(&error);
        assert!(told.contains("memory.offline_file") && told.contains("the database"), "{told}");
        told
    }
}

fn assert_unavailable(answer: &Answer) {
    assert_eq!(answer.problem(), (503, "unavailable".to_owned()), "{answer:?}");
    assert!(answer.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds >= 1), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_database_and_infisical_a_restart_answers_what_was_served_last_within_max_stale_and_then_nobody() {
    for phase in Phase::ALL {
        on_both(async |site| {
            let mut kept = Kept::start(site, phase).await;
            kept.has("acme", "K", "line\n\u{1f511}").await;
            kept.has("globex", "K", "g").await;
            // As it is answered once the tiers below have taken part.
            let before = kept.app.get("acme", "K").await;
            kept.start_alone().await;
            let app = &kept.app;

            let answer = app.get("acme", "K").await;
            assert_eq!((answer.text.as_str(), answer.etag()), (before.text.as_str(), before.etag()));
            let status = answer.header("cache-status");
            assert!(status.starts_with("database; fwd=stale; detail=unavailable, memory; hit; ttl="), "{status}");
            assert_eq!(app.get_fresh("acme", "K").await.value(), "line\n\u{1f511}");
            assert_eq!(app.get("globex", "K").await.value(), "g");
            let ready = app.ready().await;
            assert_eq!((ready.status, ready.json()["status"].as_str()), (200, Some("degraded")));
            assert_eq!(ready.json()["tiers"]["database"]["state"], "down");
            assert_eq!(ready.json()["started_from"], "offline_file");
            assert!(app.metrics().await.contains("\nsecretier_offline 1\n"));

            // Nothing is proved but what the file holds.
            for path in ["/secrets/OTHER", "/secrets", "/secrets/K/versions", "/secrets/K?version=1", ""] {
                assert_unavailable(&app.ask_tenant("acme", path).await);
            }
            assert_unavailable(&app.get("nobody", "K").await);
            assert_unavailable(&app.refresh("acme").await);
            assert_unavailable(&app.ask(Method::GET, "/v1/tenants").await);
            assert_eq!(app.explain("acme", "K").await["memory"]["state"], "stale");
            assert_eq!(app.put("acme", "K", "w").await.status, 503);
            assert_eq!(app.delete("acme", "K").await.status, 503);

            app.advance(DAY - HOUR);
            assert_eq!(app.get("acme", "K").await.value(), "line\n\u{1f511}");
            app.advance(HOUR);
            assert_unavailable(&app.get("acme", "K").await);
            assert_unavailable(&app.get("globex", "K").await);
            let ready = app.ready().await;
            assert_eq!((ready.status, ready.json()["status"].as_str()), (503, Some("unavailable")));
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn infisical_is_not_asked_while_the_database_has_not_answered_since_the_start() {
    let mut kept = Kept::start(Site::Sqlite(Backend::sqlite()), Phase::Infisical).await;
    kept.has("acme", "K", "v").await;
    kept.start_alone().await;
    kept.app.infisical.restart().await.unwrap();
    kept.app.world().put(ENV, "/tenants/acme", "K", "changed");
    let before = kept.app.world().calls();
    for _ in 0..3 {
        assert_eq!(kept.app.get_fresh("acme", "K").await.value(), "v");
        assert_unavailable(&kept.app.get("acme", "OTHER").await);
        assert_unavailable(&kept.app.refresh("acme").await);
    }
    assert_eq!(kept.app.world().calls(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_made_up_token_an_ended_one_and_one_that_was_revoked_before_stay_out() {
    let mut kept = Kept::with(Site::postgres().await, Phase::Database, "offline_every = \"1h\"").await;
    kept.has("acme", "K", "v").await;
    let revoked = kept.app.new_token("revoked", &["*"], &[Action::Read]).await;
    let narrow = kept.app.new_token("narrow", &["globex"], &[Action::Read]).await;
    let all = || vec!["*".to_owned()];
    let lifetime = Some(HOUR);
    let ending =
        NewToken { name: "ending".to_owned(), tenants: all(), keys: all(), actions: vec![Action::Read], lifetime };
    let (ending, row) = ending.draw(kept.clock().now()).unwrap();
    let database = &kept.app.instance().service.resolver.database();
    database.insert_token(&row).await.unwrap();
    assert_eq!(database.revoke_token("revoked").await.unwrap(), 1);
    // Long before an hour is over: it is followed, and the file written anew.
    kept.holds(&["acme/K", "token test", "token narrow", "token ending"]).await;
    let clock = kept.clock();
    kept.app.kill().await;
    kept.take_away().await;
    kept.app.try_start(clock).await.unwrap();

    let app = &kept.app;
    let ask = async |token: &str| {
        let request = app.instance().request(Method::GET, &secret("acme", "K")).bearer_auth(token);
        Answer::of(request).await.status
    };
    assert_eq!(ask(&app.token).await, 200);
    assert_eq!(ask(&narrow).await, 403);
    assert_eq!(ask(ending.expose()).await, 200);
    assert_eq!(ask(&revoked).await, 401);
    let mut made_up = app.token.clone();
    let last = if made_up.ends_with('A') { 'E' } else { 'A' };
    made_up.replace_range(made_up.len() - 1.., &last.to_string());
    assert_eq!(ask(&made_up).await, 401);
    app.advance(HOUR);
    assert_eq!(ask(ending.expose()).await, 401);
    assert_eq!(ask(&app.token).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_tenant_stays_denied_and_nothing_of_it_is_in_the_file() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        let mut kept = Kept::with(Site::postgres().await, phase, "offline_every = \"1h\"").await;
        kept.has("acme", "K", "v").await;
        kept.has("globex", "K", "g").await;
        kept.app.world().set_rights(&kept.app.identity, Rights::Read(vec![Readable::new(ENV, "/tenants/globex")]));
        let denied = || (503, "upstream_denied".to_owned());
        assert_eq!(kept.app.get_fresh("acme", "K").await.problem(), denied());
        kept.holds(&["globex/K", "denied acme", "token test"]).await;
        let clock = kept.clock();
        kept.app.kill().await;
        kept.take_away().await;
        kept.app.try_start(clock).await.unwrap();
        assert_eq!(kept.app.get("acme", "K").await.problem(), denied());
        kept.app.advance(HOUR);
        assert_eq!(kept.app.get_fresh("acme", "K").await.problem(), denied());
        assert_eq!(kept.app.get("globex", "K").await.value(), "g");

        // Back again, it is Infisical that says so still, and then lets us.
        kept.give_back().await;
        kept.is_whole().await;
        assert_eq!(kept.app.get_fresh("acme", "K").await.problem(), denied());
        kept.app.world().set_rights(&kept.app.identity, Rights::Full);
        kept.app.advance(HOUR);
        assert_eq!(kept.app.get_fresh("acme", "K").await.value(), "v");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_as_it_was_written_is_refused_and_a_start_with_the_database_does_without_it() {
    let mut kept = Kept::start(Site::postgres().await, Phase::Database).await;
    kept.has("acme", "K", "v").await;
    kept.stop_all().await;
    let whole = std::fs::read(&kept.file).unwrap();
    let clock = Clock::system;
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [flipped.as_slice(), &whole[..whole.len() - 1], &[whole.as_slice(), b"x"].concat()] {
        std::fs::write(&kept.file, damaged).unwrap();
        assert!(kept.refusal(clock()).await.contains("changed or cut"));
    }
    std::fs::write(&kept.file, b"").unwrap();
    assert!(kept.refusal(clock()).await.contains("not a file of this kind"));
    std::fs::write(&kept.file, &whole).unwrap();

    kept.app.setup.environment = "staging";
    assert!(kept.refusal(clock()).await.contains("\"prod\""));
    kept.app.setup.environment = ENV;

    let key = std::fs::read(&kept.app.key_file).unwrap();
    std::fs::write(&kept.app.key_file, hex::encode(rand::random::<[u8; 32]>())).unwrap();
    assert!(kept.refusal(clock()).await.contains("master key"));
    std::fs::write(&kept.app.key_file, key).unwrap();

    std::fs::set_permissions(&kept.file, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert!(kept.refusal(clock()).await.contains("chmod 600"));
    std::fs::set_permissions(&kept.file, std::fs::Permissions::from_mode(0o600)).unwrap();

    std::fs::rename(&kept.file, kept.file.with_extension("away")).unwrap();
    assert!(kept.refusal(clock()).await.contains("no such file"));

    // With the database there, none of this matters, and the file is written anew.
    std::fs::write(&kept.file, &flipped).unwrap();
    std::fs::set_permissions(&kept.file, std::fs::Permissions::from_mode(0o600)).unwrap();
    kept.give_back().await;
    kept.app.try_start(clock()).await.unwrap();
    assert_eq!(kept.app.get("acme", "K").await.value(), "v");
    kept.holds(&["acme/K", "token test"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_without_database_and_without_a_file_names_the_setting() {
    let mut site = Site::postgres().await;
    let mut app = Setup::new(site.backend(), Phase::Database).start().await;
    app.stop().await;
    tokio::task::block_in_place(|| site.goes());
    let error = app.try_start(Clock::system()).await.unwrap_err();
    assert!(matches!(error, StartError::DatabaseDown(_)), "{error:?}");
    assert!(error.to_string().contains("memory.offline_file"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_holds_nothing_in_the_clear_and_is_its_owners_alone() {
    let kept = Kept::start(Site::Sqlite(Backend::sqlite()), Phase::Hybrid).await;
    kept.has("acme", "STRIPE_KEY", "sk_live_hush").await;
    kept.holds(&["acme/STRIPE_KEY", "token test"]).await;
    let bytes = std::fs::read(&kept.file).unwrap();
    let (id, secret) = kept.app.token.trim_start_matches("st_").split_once('_').unwrap();
    for hidden in ["sk_live_hush", "STRIPE_KEY", "acme", "token", id, secret] {
        assert!(!bytes.windows(hidden.len()).any(|window| window == hidden.as_bytes()), "{hidden}");
    }
    assert_eq!(std::fs::metadata(&kept.file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(files(&kept.file), 1, "nothing is left beside it");
    // Counted behind the file that is there.
    eventually(async || {
        let metrics = kept.app.metrics().await;
        !metrics.contains("secretier_offline_file_writes_total{outcome=\"ok\"} 0\n")
            && metrics.contains("secretier_offline_file_bytes")
            && metrics.contains("secretier_offline_file_age_seconds")
    })
    .await;
}

fn files(beside: &Path) -> usize {
    std::fs::read_dir(beside.parent().unwrap()).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_written_is_counted_and_nothing_else_suffers() {
    let kept = Kept::start(Site::Sqlite(Backend::sqlite()), Phase::Database).await;
    std::fs::create_dir(&kept.file).unwrap();
    kept.has("acme", "K", "v").await;
    let unfailed = "secretier_offline_file_writes_total{outcome=\"failed\"} 0\n";
    let failed = async || !kept.app.metrics().await.contains(unfailed);
    eventually(failed).await;
    assert_eq!(kept.app.get("acme", "K").await.value(), "v");
    assert_eq!(kept.app.ready().await.json()["status"], "ready");
    std::fs::remove_dir(&kept.file).unwrap();
    kept.holds(&["acme/K", "token test"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_was_shredded_or_changed_hands_is_gone_from_the_file_soon_after_it_is_followed() {
    let site = Site::postgres().await;
    // Nothing is written by the clock: it is the news that brings it about.
    let kept = Kept::with(site, Phase::Database, "offline_every = \"1h\"").await;
    for tenant in ["acme", "globex", "initech"] {
        kept.has(tenant, "K", tenant).await;
    }
    let other = kept.app.new_token("other", &["*"], &[Action::Read]).await;
    drop(other);
    let database = &kept.app.instance().service.resolver.database();
    database.revoke_token("other").await.unwrap();
    kept.holds(&["acme/K", "globex/K", "initech/K", "token test"]).await;
    database.shred(&"acme".parse().unwrap()).await.unwrap().unwrap();
    kept.holds(&["globex/K", "initech/K", "token test"]).await;
    kept.app.set_phase("initech", Some(Phase::Hybrid)).await;
    kept.holds(&["globex/K", "token test"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_database_is_back_all_is_as_after_a_usual_start_and_what_changed_meanwhile_is_served() {
    on_both(async |site| {
        let mut kept = Kept::start(site, Phase::Database).await;
        for tenant in ["acme", "globex", "initech", "hooli"] {
            kept.has(tenant, "K", "before").await;
        }
        let revoked = kept.app.new_token("revoked", &["*"], &[Action::Read]).await;
        kept.holds(&["acme/K", "globex/K", "initech/K", "hooli/K", "token test", "token revoked"]).await;
        let clock = kept.clock();
        kept.app.stop().await;
        let file = std::fs::read(&kept.file).unwrap();

        // Another instance goes on, which keeps nothing.
        let with_file = std::mem::take(&mut kept.app.setup.more);
        kept.app.try_start(clock.clone()).await.unwrap();
        assert_eq!(kept.app.put("acme", "K", "after").await.status, 200);
        kept.app.holds("initech", &[("K", "upstream")]);
        kept.app.set_phase("initech", Some(Phase::Infisical)).await;
        let database = &kept.app.instance().service.resolver.database();
        database.shred(&"globex".parse().unwrap()).await.unwrap().unwrap();
        database.revoke_token("revoked").await.unwrap();
        kept.app.stop().await;
        kept.app.setup.more = with_file;
        kept.take_away().await;

        kept.app.try_start(clock).await.unwrap();
        for tenant in ["acme", "globex", "initech", "hooli"] {
            assert_eq!(kept.app.get(tenant, "K").await.value(), "before");
        }
        assert_eq!(kept.app.put("acme", "K", "lost").await.status, 503);
        assert_eq!(std::fs::read(&kept.file).unwrap(), file, "an instance that stands alone writes nothing");

        kept.give_back().await;
        kept.is_whole().await;
        assert_eq!(kept.app.get_fresh("acme", "K").await.value(), "after");
        assert_eq!(kept.app.get("globex", "K").await.problem().0, 404);
        assert_eq!(kept.app.get("initech", "K").await.value(), "upstream");
        assert_eq!(kept.app.get_fresh("hooli", "K").await.value(), "before");
        let request = kept.app.instance().request(Method::GET, &secret("acme", "K")).bearer_auth(&revoked);
        assert_eq!(Answer::of(request).await.status, 401);
        assert_eq!(kept.app.put("acme", "K", "again").await.status, 200);
        assert_eq!(kept.app.get("acme", "K").await.value(), "again");
        assert_eq!(kept.app.ask_tenant("acme", "/secrets").await.status, 200);
        assert_eq!(kept.app.ready().await.json()["status"], "ready");
        kept.holds(&["acme/K", "initech/K", "hooli/K", "token test"]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_instance_is_changing_itself_is_never_kept_as_followed_already() {
    let app = Setup::new(Backend::sqlite(), Phase::Hybrid).start().await;
    app.holds("acme", &[("K", "v")]);
    assert_eq!(app.get("acme", "K").await.value(), "v");
    app.stored(1).await;
    app.followed().await;
    let resolver = app.instance().service.resolver.clone();
    let kept = async || (resolver.contents().await.followed, resolver.followed());
    let gate = app.world().gate(Route::Write);
    let put = app.request(Method::PUT, &secret("acme", "K")).json(&serde_json::json!({ "value": "w" }));
    let writing = tokio::spawn(Answer::of(put));
    gate.arrived(1).await;
    // Others go on meanwhile, and their changes are followed.
    app.new_token("made", &["*"], &[Action::Read]).await;
    app.followed().await;
    let (number, followed) = kept().await;
    assert!(number < followed, "what the write will change may be numbered between: {number} {followed}");
    gate.open();
    assert_eq!(writing.await.unwrap().status, 200);
    app.followed().await;
    eventually(async || {
        let (number, followed) = kept().await;
        number == followed
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_was_denied_meanwhile_is_denied_once_the_database_is_back() {
    let mut kept = Kept::start(Site::postgres().await, Phase::Hybrid).await;
    kept.has("acme", "K", "v").await;
    kept.app.stored(1).await;
    kept.holds(&["acme/K", "token test"]).await;
    kept.app.kill().await;
    let now = Clock::system().now().as_millis();
    kept.site.backend().sql(&format!("UPDATE companies SET denied_at = {now} WHERE subdomain = 'acme'")).await;
    kept.take_away().await;
    kept.app.try_start(Clock::system()).await.unwrap();
    assert_eq!(kept.app.get("acme", "K").await.value(), "v");
    // Without Infisical nobody says otherwise.
    tokio::task::block_in_place(|| kept.site.comes_back());
    kept.is_whole().await;
    assert_eq!(kept.app.get("acme", "K").await.problem(), (503, "upstream_denied".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_another_environment_ends_the_instance_with_that_error() {
    on_both(async |site| {
        let mut kept = Kept::start(site, Phase::Database).await;
        kept.has("acme", "K", "v").await;
        eventually(async || kept.file.exists()).await;
        kept.app.stop().await;
        kept.site.backend().sql("UPDATE settings SET value = 'dev' WHERE name = 'environment'").await;
        kept.take_away().await;
        kept.app.try_start(Clock::system()).await.unwrap();
        assert_eq!(kept.app.get("acme", "K").await.value(), "v");
        kept.give_back().await;
        let ended = kept.app.ended().await;
        assert!(
            matches!(&ended, Err(StartError::Database(StoreError::Environment { stored, .. })) if stored == "dev"),
            "{ended:?}"
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_back_lets_nothing_live_longer_and_one_set_forward_lets_it_end() {
    let mut kept = Kept::start(Site::postgres().await, Phase::Database).await;
    kept.app.advance(DAY);
    kept.has("acme", "K", "v").await;
    kept.holds(&["acme/K", "token test"]).await;
    kept.stop_all().await;
    // A day before it was written.
    assert!(kept.refusal(Clock::system()).await.contains("correct the clock"));
    // As it was written, and an hour before the end.
    for (ahead, served) in [(DAY, true), (2 * DAY - HOUR, true), (2 * DAY + HOUR, false), (400 * DAY, false)] {
        let clock = Clock::system();
        clock.advance(ahead);
        kept.app.try_start(clock).await.unwrap();
        let answer = kept.app.get("acme", "K").await;
        assert_eq!(answer.status, if served { 200 } else { 503 }, "{ahead:?}: {answer:?}");
        kept.app.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ages_that_are_configured_now_may_shorten_a_life_and_never_lengthen_it() {
    let mut kept =
        Kept::with(Site::postgres().await, Phase::Database, "offline_every = \"1s\"\nmax_stale = \"10h\"").await;
    kept.has("acme", "K", "v").await;
    kept.holds(&["acme/K", "token test"]).await;
    kept.stop_all().await;
    let written = kept.app.setup.more.clone();
    for (max_stale, age, served) in [("2h", 1, true), ("2h", 3, false), ("99h", 9, true), ("99h", 11, false)] {
        kept.app.setup.more = written.replace("10h", max_stale);
        let clock = Clock::system();
        clock.advance(age * HOUR);
        kept.app.try_start(clock).await.unwrap();
        let answer = kept.app.get("acme", "K").await;
        assert_eq!(answer.status, if served { 200 } else { 503 }, "{max_stale} {age}h: {answer:?}");
        kept.app.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_holds_no_more_than_a_full_memory_does() {
    let mut kept =
        Kept::with(Site::postgres().await, Phase::Hybrid, "offline_every = \"1s\"\ncapacity = \"64KiB\"").await;
    let value = "v".repeat(1000);
    let names: Vec<String> = (0..200).map(|number| format!("KEY_{number}")).collect();
    for tenant in ["acme", "globex", "initech"] {
        kept.app.holds(tenant, &names.iter().map(|name| (name.as_str(), value.as_str())).collect::<Vec<_>>());
    }
    for tenant in ["acme", "globex", "initech"] {
        for name in names.iter().step_by(50) {
            assert_eq!(kept.app.get(tenant, name).await.status, 200);
        }
    }
    kept.stop_all().await;
    let length = std::fs::metadata(&kept.file).unwrap().len();
    assert!(length > 1000 && length <= 64 << 10, "{length}");
    kept.app.try_start(Clock::system()).await.unwrap();
    assert!(kept.app.instance().service.resolver.memory().weight() <= 64 << 10);
}
