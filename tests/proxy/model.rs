//! Random interleavings at three instances on one database, held to a small model that
//! knows which values each read may return.
//!
//! `SECRETIER_MODEL_STEPS` and `SECRETIER_MODEL_SEED` make a run longer, or draw the same
//! steps again; in what order the machine lets them cross is not drawn.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use secretier::{
    phase::Phase,
    resolver::{Condition, NewTenant, Resolver, Want},
    secret::{SecretKey, SecretName, SecretValue, Writer},
    tenant::Tenant,
    tiers::upstream::standin::{Fault, Route},
};
use tokio::task::JoinSet;

use crate::{
    app::{Backend, ENV, Instance, Setup, TestApp},
    never_older::Fails,
    postgres::Postgres,
    quick::times,
    within::{HANGS, within, within_a_tests_time},
};

const INSTANCES: usize = 3;
const WORKERS: u64 = 6;
/// Steps between two moments in which everything stands still and is compared.
const ROUND: u64 = 2_500;

/// A moment: moments are counted, not measured.
type Moment = u64;

/// A value that a key was given, or its deletion.
#[derive(Debug)]
struct Change {
    value: Option<String>,
    began: Moment,
    /// When it was acknowledged; nothing while it may yet come to be.
    ended: Option<Moment>,
    /// From when on each incarnation of an instance must know of it.
    known: HashMap<u64, Moment>,
}

/// What is known of each key.
#[derive(Debug, Default)]
struct Model {
    keys: HashMap<(String, String), Vec<Change>>,
    /// When Infisical failed: moments from and to.
    outages: Vec<(Moment, Option<Moment>)>,
    /// Since when the database has failed, or has had a reason to be left alone.
    database_failed: Option<Moment>,
    /// The latest that each incarnation has answered of a key: when the change began.
    answered: HashMap<(u64, String, String), Moment>,
    /// The last answers, for people.
    last: VecDeque<String>,
    reads: u64,
    values: u64,
}

impl Model {
    /// Whether an incarnation may answer so to a read that lasted from `began` to `ended`.
    fn allows(
        &self,
        of: &(String, String),
        value: Option<&str>,
        incarnation: u64,
        began: Moment,
        ended: Moment,
    ) -> bool {
        let changes = &self.keys[of];
        // One that began after another had ended, and that the instance knew of.
        let superseded = |change: &Change| {
            changes.iter().any(|later| {
                let follows = change.ended.is_some_and(|ended| ended < later.began);
                follows && later.known.get(&incarnation).is_some_and(|known| *known < began)
            })
        };
        let mut given = changes.iter().filter(|change| change.value.as_deref() == value && change.began < ended);
        given.any(|change| !superseded(change))
    }

    /// When the change began that an incarnation has answered last of all, by now.
    fn answered(&self, incarnation: u64, of: &(String, String)) -> Moment {
        self.answered.get(&(incarnation, of.0.clone(), of.1.clone())).copied().unwrap_or(0)
    }

    /// Whether a value is none that was surely replaced by one that was answered before: a change
    /// that ended before that other one began.
    fn is_no_older(&self, of: &(String, String), value: Option<&str>, answered: Moment) -> bool {
        let mut given = self.keys[of].iter().filter(|change| change.value.as_deref() == value);
        given.any(|change| change.ended.is_none_or(|ended| ended >= answered))
    }

    /// The last answers about one secret.
    fn answers_of(&self, tenant: &str, key: &str) -> Vec<&String> {
        let of = format!("{tenant}/{key} at ");
        let mut last: Vec<&String> = self.last.iter().rev().filter(|answer| answer.starts_with(&of)).take(60).collect();
        last.reverse();
        last
    }

    /// Notes an answer: of the changes that it may be, the earliest.
    fn note(&mut self, incarnation: u64, of: &(String, String), value: Option<&str>) {
        let given = self.keys[of].iter().filter(|change| change.value.as_deref() == value);
        if let Some(began) = given.map(|change| change.began).min() {
            let answered = self.answered.entry((incarnation, of.0.clone(), of.1.clone())).or_default();
            *answered = began.max(*answered);
        }
    }

    fn failed_between(&self, began: Moment, ended: Moment) -> bool {
        self.outages.iter().any(|(from, to)| *from < ended && to.is_none_or(|to| began < to))
    }
}

/// An instance, and which of those that have stood in its place.
struct Place {
    instance: Instance,
    incarnation: u64,
}

struct Run {
    app: TestApp,
    places: [RwLock<Option<Arc<Place>>>; INSTANCES],
    model: Mutex<Model>,
    /// Held by who needs the database, and alone by who takes it away.
    database: tokio::sync::RwLock<()>,
    clock: AtomicU64,
    names: AtomicU64,
}

const TENANTS: [(&str, Phase); 3] =
    [("owned", Phase::Database), ("copied", Phase::Hybrid), ("upstream", Phase::Infisical)];
const KEYS: [&str; 3] = ["A", "B", "C"];

impl Run {
    async fn start(backend: Backend) -> Self {
        let rules = TENANTS.map(|(tenant, phase)| format!("[[rules]]\ntenants = \"{tenant}\"\nphase = \"{phase}\"\n"));
        // Short ages, so that every kind of entry is met.
        let ages = "[memory]\nttl = \"5s\"\nnegative_ttl = \"2s\"\n";
        let mut setup = Setup::new(backend, Phase::Hybrid).with(ages).with(&rules.concat());
        setup.database = "refresh_after = \"20s\"".to_owned();
        setup.requests_per_minute = 10_000_000;
        let app = setup.start().await;
        let mut model = Model::default();
        for (tenant, _) in TENANTS {
            app.world().folder(ENV, &format!("/tenants/{tenant}"));
            for key in KEYS {
                let absent = Change { value: None, began: 0, ended: Some(0), known: HashMap::new() };
                model.keys.insert((tenant.to_owned(), key.to_owned()), vec![absent]);
            }
        }
        let run = Self {
            app,
            places: Default::default(),
            model: Mutex::new(model),
            database: tokio::sync::RwLock::default(),
            clock: AtomicU64::new(1),
            names: AtomicU64::new(1),
        };
        for place in 0..INSTANCES {
            run.replace(place).await;
        }
        run
    }

    fn now(&self) -> Moment {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn name(&self) -> u64 {
        self.names.fetch_add(1, Ordering::Relaxed)
    }

    async fn place(&self, place: usize) -> Arc<Place> {
        let began = Instant::now();
        loop {
            if let Some(place) = &*self.places[place].read().unwrap() {
                return Arc::clone(place);
            }
            assert!(began.elapsed() < HANGS, "no instance is started in the place of the one that was killed");
            // The thread is needed by whoever fills it.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Kills an instance, and starts another in its place, which knows of all that was
    /// acknowledged before.
    async fn replace(&self, place: usize) {
        let _database = self.database.read().await;
        let before = self.places[place].write().unwrap().take();
        // What is under way there goes on, and is answered to nobody who asks later.
        if let Some(before) = before {
            before.instance.abort();
        }
        let began = self.now();
        let incarnation = self.name();
        let instance = self.app.another().await;
        {
            let mut model = self.model.lock().unwrap();
            for change in model.keys.values_mut().flatten() {
                if change.ended.is_some_and(|ended| ended < began) && change.known.contains_key(&0) {
                    change.known.insert(incarnation, began);
                }
            }
        }
        *self.places[place].write().unwrap() = Some(Arc::new(Place { instance, incarnation }));
    }

    async fn read(&self, rng: &mut StdRng, tenant: &str, key: &str) {
        let place = self.place(rng.random_range(0..INSTANCES)).await;
        let want = if rng.random_ratio(1, 200) { Want::Revalidated } else { Want::Cached };
        self.read_at(&place, want, tenant, key).await;
    }

    async fn read_at(&self, place: &Place, want: Want, tenant: &str, key: &str) {
        let (parsed, name): (Tenant, SecretKey) = (tenant.parse().unwrap(), key.parse().unwrap());
        let of = (tenant.to_owned(), key.to_owned());
        // In this order: only what was answered before this begins counts.
        let answered = self.model.lock().unwrap().answered(place.incarnation, &of);
        let began = self.now();
        let resolved = place.resolver().resolve(SecretName::of(&parsed, &name), want).await;
        let ended = self.now();
        let mut model = self.model.lock().unwrap();
        model.reads += 1;
        model.last.push_back(format!(
            "{tenant}/{key} at {} from {began} to {ended}, {want:?}: {:?}",
            place.incarnation,
            resolved
                .as_ref()
                .map(|resolved| (resolved.answer().map(|answer| answer.expose().to_owned()), resolved.cache_status))
        ));
        if model.last.len() > 2_000 {
            model.last.pop_front();
        }
        match resolved {
            Ok(resolved) => {
                let value = resolved.answer().map(|answer| answer.expose().to_owned());
                model.values += u64::from(value.is_some());
                assert!(
                    model.allows(&of, value.as_deref(), place.incarnation, began, ended),
                    "{tenant}/{key} at incarnation {} from {began} to {ended} is {value:?} ({:?}): {:#?}",
                    place.incarnation,
                    resolved.cache_status,
                    model.keys[&of],
                );
                assert!(
                    model.is_no_older(&of, value.as_deref(), answered),
                    "{tenant}/{key} at incarnation {} from {began} to {ended} is {value:?} ({:?}), older than what began at \
                     {answered} and was answered: {:#?}; answered last: {:#?}",
                    place.incarnation,
                    resolved.cache_status,
                    model.keys[&of],
                    model.answers_of(tenant, key),
                );
                model.note(place.incarnation, &of, value.as_deref());
            }
            Err(error) => {
                let may_fail = model.database_failed.is_some_and(|from| from < ended)
                    || (tenant != "owned" && model.failed_between(began, ended));
                assert!(may_fail, "{tenant}/{key} from {began} to {ended}: {error:?}");
            }
        }
    }

    /// Writes a value, or deletes it, through an instance.
    async fn write(&self, place: &Place, tenant: &str, key: &str, deletes: bool) {
        let (parsed, name): (Tenant, SecretKey) = (tenant.parse().unwrap(), key.parse().unwrap());
        let value = (!deletes).then(|| format!("v{}", self.name()));
        let of = (tenant.to_owned(), key.to_owned());
        let index = {
            let mut model = self.model.lock().unwrap();
            let began = self.now();
            let changes = model.keys.get_mut(&of).unwrap();
            changes.push(Change { value: value.clone(), began, ended: None, known: HashMap::new() });
            changes.len() - 1
        };
        let writer = Writer::new("model");
        let done = match &value {
            Some(value) => {
                let value = SecretValue::new(value.clone());
                let put =
                    place.resolver().put(&parsed, &name, &value, &Condition::None, &writer, NewTenant::Created).await;
                put.map(|_| true)
            }
            None => {
                let deleted = place.resolver().delete(&parsed, &name, &Condition::None, &writer).await;
                deleted.map(|owner| owner.is_some())
            }
        };
        let ended = self.now();
        let mut model = self.model.lock().unwrap();
        let change = &mut model.keys.get_mut(&of).unwrap()[index];
        // A deletion that met nothing, and a write that failed, may have done nothing.
        if matches!(done, Ok(true)) {
            change.ended = Some(ended);
            // Known to its own instance, and to those that start from here on.
            change.known.insert(place.incarnation, ended);
            change.known.insert(0, ended);
        }
        if let Err(error) = done {
            assert!(tenant != "owned" || model.database_failed.is_some(), "{error:?}");
        }
    }

    /// Holds back Infisical's answer to a read while the secret is written, and asks again:
    /// whoever joins the held read, or keeps what it brings, has the value of before.
    async fn overtake(&self, rng: &mut StdRng, tenant: &str, key: &str) {
        const LONGEST: Duration = Duration::from_secs(1);
        let place = self.place(rng.random_range(0..INSTANCES)).await;
        let gate = self.app.world().gate_next_answers(1, Route::List);
        let overtaking = async {
            let _ = tokio::time::timeout(LONGEST, gate.arrived(1)).await;
            let mut written = std::pin::pin!(async {
                self.write(&place, tenant, key, false).await;
                self.read_at(&place, Want::Cached, tenant, key).await;
            });
            let is_done = tokio::time::timeout(LONGEST, &mut written).await.is_ok();
            gate.open();
            if !is_done {
                written.await;
            }
        };
        tokio::join!(self.read_at(&place, Want::Revalidated, tenant, key), overtaking);
        self.read_at(&place, Want::Cached, tenant, key).await;
    }

    /// Somebody changes a secret in Infisical itself.
    fn edit(&self, rng: &mut StdRng, tenant: &str, key: &str) {
        let value = (!rng.random_ratio(1, 4)).then(|| format!("u{}", self.name()));
        let path = format!("/tenants/{tenant}");
        let mut model = self.model.lock().unwrap();
        let moment = self.now();
        match &value {
            Some(value) => self.app.world().put(ENV, &path, key, value),
            None => drop(self.app.world().delete(ENV, &path, key)),
        }
        let ended = self.now();
        // When each instance knows of it is for the moments in which all stands still.
        let changes = model.keys.get_mut(&(tenant.to_owned(), key.to_owned())).unwrap();
        changes.push(Change { value, began: moment, ended: Some(ended), known: HashMap::new() });
    }

    /// Waits until an instance has followed all that was acknowledged before.
    async fn follow(&self, place: usize) {
        let _database = self.database.read().await;
        let place = self.place(place).await;
        let began = self.now();
        let last = self.app.instance().service.resolver.database().changes().await.unwrap();
        let waiting = Instant::now();
        while place.resolver().followed() < last {
            assert!(waiting.elapsed() < HANGS, "an instance does not follow the changes up to {last}");
            tokio::time::sleep(Duration::from_millis(10)).await;
            if place.instance.is_over() {
                return;
            }
        }
        let known = self.now();
        let mut model = self.model.lock().unwrap();
        for change in model.keys.values_mut().flatten() {
            if change.ended.is_some_and(|ended| ended < began) && change.known.contains_key(&0) {
                change.known.entry(place.incarnation).or_insert(known);
            }
        }
    }

    async fn step(&self, rng: &mut StdRng) {
        let (tenant, phase) = TENANTS[rng.random_range(0..TENANTS.len())];
        let key = KEYS[rng.random_range(0..KEYS.len())];
        match rng.random_range(0..1000) {
            write @ 0..16 => {
                let place = self.place(rng.random_range(0..INSTANCES)).await;
                self.write(&place, tenant, key, write >= 12).await;
            }
            16..22 if phase != Phase::Database => self.edit(rng, tenant, key),
            22..26 if phase != Phase::Database => {
                let parsed: Tenant = tenant.parse().unwrap();
                let place = self.place(rng.random_range(0..INSTANCES)).await;
                let _ = place.resolver().refresh(&parsed).await;
            }
            26..32 => self.follow(rng.random_range(0..INSTANCES)).await,
            32..36 => self.app.advance(Duration::from_millis(rng.random_range(100..4000))),
            36 if rng.random_ratio(1, 3) => self.outage(rng).await,
            41 if rng.random_ratio(1, 3) => self.database_outage(rng).await,
            38..41 if phase != Phase::Database => self.overtake(rng, tenant, key).await,
            37 if rng.random_ratio(1, 2) => self.replace(rng.random_range(0..INSTANCES)).await,
            _ => self.read(rng, tenant, key).await,
        }
    }

    async fn outage(&self, rng: &mut StdRng) {
        let began = self.now();
        self.model.lock().unwrap().outages.push((began, None));
        let faults = [Fault::Down, Fault::Status(500), Fault::Garbage, Fault::CutOff];
        self.app.world().fault(faults[rng.random_range(0..faults.len())]);
        for _ in 0..rng.random_range(1..40) {
            tokio::task::yield_now().await;
        }
        self.app.world().clear_faults();
        // The breaker lets nobody through until its pause is over.
        self.app.advance(Duration::from_secs(31));
    }

    /// Takes the database away for a while, whole or for writing alone; secrets are changed in
    /// Infisical meanwhile, and read by every instance.
    async fn database_outage(&self, rng: &mut StdRng) {
        let Ok(_alone) = self.database.try_write() else { return };
        let began = self.now();
        self.model.lock().unwrap().database_failed.get_or_insert(began);
        let fails = if rng.random_ratio(1, 2) { Fails::Whole } else { Fails::ToWrite };
        fails.begins(&self.app.setup.backend).await;
        for _ in 0..rng.random_range(1..4) {
            let key = KEYS[rng.random_range(0..KEYS.len())];
            self.edit(rng, "copied", key);
            for place in 0..INSTANCES {
                let place = self.place(place).await;
                self.read_at(&place, Want::Revalidated, "copied", key).await;
                self.read_at(&place, Want::Cached, "copied", key).await;
            }
        }
        fails.ends(&self.app.setup.backend).await;
        // Breakers let nobody through until their pause is over.
        self.app.advance(Duration::from_secs(31));
        for place in 0..INSTANCES {
            let place = self.place(place).await;
            let asking = async {
                while !place.instance.is_over() && place.resolver().database().ping().await.is_err() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            within("the database is used again", asking).await;
        }
    }

    /// Lets everything come to rest, and compares every instance with the owners.
    async fn compare(&self) {
        self.app.world().clear_faults();
        self.app.advance(Duration::from_secs(61));
        for place in 0..INSTANCES {
            for (tenant, phase) in TENANTS {
                if phase != Phase::Database {
                    let tenant: Tenant = tenant.parse().unwrap();
                    let refreshing = async {
                        while self.place(place).await.resolver().refresh(&tenant).await.is_err() {
                            self.app.advance(Duration::from_secs(1));
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                    };
                    within("the folder can be read once nothing fails any more", refreshing).await;
                }
            }
        }
        for place in 0..INSTANCES {
            self.follow(place).await;
        }
        for (tenant, phase) in TENANTS {
            for key in KEYS {
                let of = (tenant.to_owned(), key.to_owned());
                let (parsed, name): (Tenant, SecretKey) = (tenant.parse().unwrap(), key.parse().unwrap());
                let truth = match phase {
                    Phase::Database => {
                        let found = self.app.instance().service.resolver.database().find(&parsed, &name).await.unwrap();
                        match found.copy {
                            secretier::tiers::database::Held::Present(stored) => Some(stored.value.expose().to_owned()),
                            _ => None,
                        }
                    }
                    Phase::Hybrid | Phase::Infisical => self.app.world().value(ENV, &format!("/tenants/{tenant}"), key),
                };
                let moment = self.now();
                for place in 0..INSTANCES {
                    let place = self.place(place).await;
                    let resolved =
                        place.resolver().resolve(SecretName::of(&parsed, &name), Want::Cached).await.unwrap();
                    let value = resolved.answer().map(|answer| answer.expose().to_owned());
                    assert_eq!(value, truth, "{tenant}/{key} at rest, at incarnation {}", place.incarnation);
                    let allowed =
                        self.model.lock().unwrap().allows(&of, value.as_deref(), place.incarnation, moment, self.now());
                    assert!(allowed, "{tenant}/{key} at rest is {value:?}");
                }
                let mut known = HashMap::from([(0, moment)]);
                for place in 0..INSTANCES {
                    known.insert(self.place(place).await.incarnation, moment);
                }
                let settled = Change { value: truth, began: moment, ended: Some(moment), known };
                self.model.lock().unwrap().keys.insert(of, vec![settled]);
            }
        }
        let mut model = self.model.lock().unwrap();
        model.outages.clear();
        model.database_failed = None;
    }
}

impl Place {
    fn resolver(&self) -> &Arc<Resolver> {
        &self.instance.service.resolver
    }
}

#[expect(clippy::print_stdout, reason = "the seed, shown with a failure")]
async fn run(backend: Backend, steps: u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seed: u64 = number("SECRETIER_MODEL_SEED").unwrap_or_else(rand::random);
    let steps: u64 = number("SECRETIER_MODEL_STEPS").unwrap_or(steps);
    println!("SECRETIER_MODEL_SEED={seed} SECRETIER_MODEL_STEPS={steps}");
    let run = Arc::new(Run::start(backend).await);
    for round in 0..steps.div_ceil(ROUND) {
        // The first that fails ends the others, who may wait for it.
        let mut workers = JoinSet::new();
        for worker in 0..WORKERS {
            let run = Arc::clone(&run);
            let mut rng = StdRng::seed_from_u64(seed ^ (round << 8) ^ worker);
            workers.spawn(async move {
                for _ in 0..ROUND.div_ceil(WORKERS) {
                    run.step(&mut rng).await;
                }
            });
        }
        while let Some(worker) = within_a_tests_time("a round ends", workers.join_next()).await {
            worker.unwrap_or_else(|error| panic!("round {round} of SECRETIER_MODEL_SEED={seed}: {error}"));
        }
        run.compare().await;
    }
    let model = run.model.lock().unwrap();
    println!("{} reads, {} of them values", model.reads, model.values);
    assert!(model.values > steps / 4, "most reads return a value");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_interleaving_on_postgresql_returns_what_it_may_not() {
    run(Backend::Postgres(Postgres::shared().database().await), times(80_000, 5_000)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_interleaving_on_sqlite_returns_what_it_may_not() {
    run(Backend::sqlite(), times(20_000, 5_000)).await;
}
