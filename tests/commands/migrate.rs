//! `secretier migrate`: tenants on their way to the database and back, while they are
//! served, and while it is killed.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use secretier::{
    app::Base,
    clock::Clock,
    config::Loaded,
    phase::Phase,
    tiers::{
        database::{Held, Step},
        upstream::standin::{Fault, Route, World},
    },
};
use serde_json::Value;

use crate::{
    postgres::Postgres,
    program::{Ended, HANGS, Infisical, Place, Running, keeping_client, look_up, master_key},
    quick::times,
    within::eventually,
};

const ENV: &str = "prod";

/// Every tenant's own phase and secrets: value and version.
type Tenants = BTreeMap<String, (Option<Phase>, BTreeMap<String, (String, i64)>)>;

/// A place whose tenants are Infisical's, with the stand-in that has them. Nothing asks it by
/// itself which folders have changed: its gates and counts are for the commands and lookups.
pub(crate) struct Site {
    pub(crate) place: Place,
    infisical: Infisical,
}

impl Site {
    pub(crate) async fn new(url: Option<&str>, phase: &str, more: &str) -> Self {
        let infisical = Infisical::start().await;
        let place = Place::new("");
        let folder = place.path().display().to_string();
        let url = url.map_or_else(|| format!("sqlite:{folder}/secretier.db"), str::to_owned);
        place.write("master.key", &format!("{}\n", master_key()));
        let secret = place.write("client.secret", &infisical.credentials.client_secret).display().to_string();
        let section = infisical.section().replace("env = \"INFISICAL_CLIENT_SECRET\"", &format!("file = \"{secret}\""));
        place.write(
            "secretier.toml",
            &format!(
                "environment = \"{ENV}\"\nphase = \"{phase}\"\n[server]\nlisten = \"127.0.0.1:0\"\n\
                 [database]\nurl = \"{url}\"\ntimeout = \"30s\"\n[keys]\nsources = [\"file:{folder}/master.key\"]\n\
                 {section}requests_per_minute = 1000000\nmigration_requests_per_minute = 1000000\n\
                 timeout = \"5s\"\npoll_interval = \"0s\"\n{more}"
            ),
        );
        Self { place, infisical }
    }

    /// On SQLite, in phase `infisical`.
    async fn plain() -> Self {
        Self::new(None, "infisical", "").await
    }

    pub(crate) fn holds(&self, tenant: &str, secrets: &[(&str, &str)]) {
        let path = if tenant.starts_with('/') { tenant.to_owned() } else { format!("/tenants/{tenant}") };
        self.infisical.world().folder(ENV, &path);
        for (name, value) in secrets {
            self.infisical.world().put(ENV, &path, name, value);
        }
    }

    /// So many tenants of five secrets each.
    fn fill(&self, tenants: usize) {
        for number in 0..tenants {
            let path = format!("/tenants/tenant-{number}");
            for key in 0..5 {
                self.infisical.world().put(ENV, &path, &format!("KEY_{key}"), &value(number, key));
            }
        }
    }

    pub(crate) fn migrate(&self, arguments: &[&str]) -> Ended {
        self.place.run(&[&["migrate"], arguments].concat())
    }

    pub(crate) fn infisical(&self) -> &World {
        self.infisical.world()
    }

    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        self.place.start(&[&["migrate"], arguments, &["--config", "secretier.toml"]].concat())
    }

    /// The outcome as JSON, whatever the exit code.
    pub(crate) fn json(&self, arguments: &[&str]) -> (i32, Value) {
        let ended = self.migrate(&[arguments, &["--json"]].concat());
        let value = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"));
        (ended.code, value)
    }

    pub(crate) fn token(&self) -> String {
        let create =
            ["token", "create", "--name", "api", "--tenants", "*", "--folders", "*", "--actions", "read,write"];
        self.place.run(&create).ok().trim().to_owned()
    }

    async fn base(&self) -> Base {
        let config = Loaded::read(Some(&self.place.path().join("secretier.toml"))).unwrap().config;
        Box::pin(Base::open(&config, &Clock::system())).await.unwrap()
    }

    /// Every tenant's own phase and secrets, as the database has them: value and version.
    pub(crate) async fn database(&self) -> Tenants {
        let base = self.base().await;
        let mut all = BTreeMap::new();
        for (company, _) in base.database.companies().await.unwrap() {
            let listing = base.database.find_all(&company.tenant).await.unwrap();
            let secrets = listing.secrets.into_iter().map(|(key, held)| {
                let Held::Present(stored) = held else { panic!("{}: {held:?}", company.tenant) };
                (key.as_str().to_owned(), (stored.value.expose().to_owned(), stored.version.number()))
            });
            all.insert(company.tenant.as_str().to_owned(), (company.phase, secrets.collect()));
        }
        all
    }
}

fn value(tenant: usize, key: usize) -> String {
    format!("value-{tenant}-{key}")
}

/// Reads random secrets through a proxy until it is told to stop; gives the number of
/// reads and what went wrong.
fn read_on(
    url: &str,
    token: &str,
    tenants: usize,
    stop: &Arc<AtomicBool>,
) -> tokio::task::JoinHandle<(usize, Vec<String>)> {
    let (url, token, stop) = (url.to_owned(), token.to_owned(), Arc::clone(stop));
    tokio::spawn(async move {
        let client = keeping_client();
        let (mut reads, mut wrong) = (0, Vec::new());
        while !stop.load(Ordering::Relaxed) {
            let (number, key) = (rand::random_range(0..tenants), rand::random_range(0..5));
            let request = client.get(format!("{url}/v1/tenants/tenant-{number}/secrets/KEY_{key}"));
            let answer = request.bearer_auth(&token).send().await.unwrap();
            let (status, text) = (answer.status(), answer.text().await.unwrap());
            if status != 200 || !text.contains(&format!("\"{}\"", value(number, key))) {
                wrong.push(format!("{status} {text}"));
            }
            reads += 1;
            // Leaves the machine to what is tested.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        (reads, wrong)
    })
}

/// Migrates a thousand tenants while sixteen clients read; gives the lists of secrets that
/// the migration asked for when nobody else did.
async fn migrates_under_traffic(url: Option<&str>, phase: &str, strategy: &str) {
    const TENANTS: usize = 1000;
    // Nothing but lookups asks upstream.
    let site = Site::new(url, phase, "[migration]\nshadow_for = \"0s\"\n").await;
    site.fill(TENANTS);
    let token = site.token();
    let (_serving, address) = site.place.serve();
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..16).map(|_| read_on(&address, &token, TENANTS, &stop)).collect();
    let run = ["run", "--all", "--cutover", "--strategy", strategy];
    let (code, outcome) = site.json(&run);
    stop.store(true, Ordering::Relaxed);
    assert_eq!(code, 0, "{outcome}");
    for (reads, wrong) in join_all(readers).await.into_iter().map(Result::unwrap) {
        assert!(reads > 0 && wrong.is_empty(), "{reads} reads, {wrong:?}");
    }
    assert_eq!((outcome["migrated"].as_u64(), outcome["secrets"].as_u64()), (Some(1000), Some(5000)));
    let database = site.database().await;
    assert_eq!(database.len(), TENANTS);
    for (tenant, (phase, secrets)) in &database {
        let number: usize = tenant.trim_start_matches("tenant-").parse().unwrap();
        assert_eq!((*phase, secrets.len()), (Some(Phase::Database), 5), "{tenant}");
        for key in 0..5 {
            assert_eq!(secrets[&format!("KEY_{key}")], (value(number, key), 1), "{tenant}");
        }
    }
    // And from now on the proxy asks nobody else.
    site.infisical.world().mark();
    for number in [0, 1, TENANTS - 1] {
        let (status, tier, _) = look_up(&address, &token, &format!("tenant-{number}"), "KEY_1").await;
        assert!(status == 200 && !tier.starts_with("infisical"), "{status} {tier}");
    }
    assert_eq!(site.infisical.world().calls_since_mark().total(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_tenants_migrate_by_folder_while_sixteen_clients_read() {
    migrates_under_traffic(None, "infisical", "folder").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_tenants_migrate_in_one_read_while_sixteen_clients_read() {
    migrates_under_traffic(None, "hybrid", "recursive").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_tenants_migrate_on_postgresql_while_sixteen_clients_read() {
    let url = Postgres::shared().database().await;
    migrates_under_traffic(Some(&url), "hybrid", "folder").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_costs_two_calls_and_all_of_them_in_one_read_at_most_ten() {
    const TENANTS: u64 = 200;
    for strategy in ["folder", "recursive"] {
        let site = Site::plain().await;
        site.fill(TENANTS as usize);
        site.infisical.world().mark();
        site.migrate(&["run", "--all", "--cutover", "--strategy", strategy]).ok();
        let calls = site.infisical.world().calls_since_mark();
        match strategy {
            "folder" => assert_eq!((calls.list, calls.total()), (2 * TENANTS, 2 * TENANTS + 2), "{calls:?}"),
            _ => assert_eq!((calls.list, calls.total()), (2, 4), "{calls:?}"),
        }
    }
}

/// Kills a run at random moments, and lets the same command end it; then everything is as
/// after a run that nobody disturbed.
async fn survives_kills(url: Option<&str>, strategy: &str, tenants: usize, kills: usize) {
    let site = Site::new(url, "infisical", "").await;
    site.fill(tenants);
    let run = ["run", "--all", "--cutover", "--strategy", strategy, "--batch", "7"];
    let mut latest = 0;
    for kill in 0..kills {
        let running = site.start(&run);
        // From before it begins to well into it; each time from where the last one came to.
        if kill % 3 != 0 {
            running.until_said("tenants");
        }
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..120))).await;
        drop(running);
        let database = site.database().await;
        let switched = database.values().filter(|(phase, _)| phase.is_some()).count();
        assert!(switched >= latest, "{switched} of {latest}");
        latest = switched;
        // What is switched is whole, and says so; what is not is as it was.
        let states = site.base().await.database.migration_states().await.unwrap();
        let said = states.iter().filter(|state| state.step == Step::Switched).count();
        assert_eq!(said, switched);
        for (tenant, (phase, secrets)) in &database {
            assert!(phase.is_none() || secrets.len() == 5, "{tenant}: {secrets:?}");
        }
    }
    site.infisical.world().mark();
    let (code, outcome) = site.json(&run);
    assert_eq!(code, 0, "{outcome}");
    assert!(
        site.infisical.world().calls_since_mark().list <= 2 * (tenants - latest) as u64,
        "what is done is not read again"
    );
    let database = site.database().await;
    assert_eq!(database.len(), tenants);
    for (tenant, (phase, secrets)) in &database {
        let number: usize = tenant.trim_start_matches("tenant-").parse().unwrap();
        assert_eq!((*phase, secrets.len()), (Some(Phase::Database), 5), "{tenant}");
        for key in 0..5 {
            assert_eq!(
                secrets[&format!("KEY_{key}")],
                (value(number, key), 1),
                "{tenant}: nothing lost, nothing twice"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_killed_fifty_times_ends_as_if_nobody_had_disturbed_it() {
    survives_kills(None, "folder", 300, times(40, 4)).await;
    survives_kills(None, "recursive", 300, times(10, 2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_on_postgresql_that_is_killed_ends_as_if_nobody_had_disturbed_it() {
    survives_kills(Some(&Postgres::shared().database().await), "folder", 200, times(12, 3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_odd_does_what_the_plan_said() {
    let site = Site::plain().await;
    let large = "x".repeat(900 << 10);
    site.holds("fine", &[("NEWLINE", "value\n"), ("a/b c?%", "slash"), ("K\u{1f511}", "\u{1f600}"), ("EMPTY", "")]);
    site.holds("large", &[("LARGE", &large)]);
    site.holds("refers", &[("HOST", "db.internal"), ("URL", "pg://${HOST}/x")]);
    site.holds("dangles", &[("URL", "pg://${NOWHERE}/x"), ("FINE", "f")]);
    site.holds("twice", &[("FINE", "f")]);
    site.infisical.world().put(ENV, "/tenants/twice", "DUP", "one");
    site.infisical.world().duplicate(ENV, "/tenants/twice", "DUP", "two");
    site.holds("named", &[("FINE", "f"), (&"n".repeat(300), "v")]);
    site.holds("nothing", &[]);
    site.infisical.world().folder(ENV, "/tenants/Not.A.Tenant");

    let (code, plan) = site.json(&["plan"]);
    assert_eq!(code, 1);
    let planned = |tenant: &str| {
        let tenants = plan["tenants"].as_array().unwrap();
        tenants.iter().find(|one| one["tenant"] == tenant).unwrap()["action"].as_str().unwrap().to_owned()
    };
    for (tenant, action) in [
        ("fine", "migrate"),
        ("large", "migrate"),
        ("refers", "migrate"),
        ("dangles", "refuse"),
        ("twice", "refuse"),
        ("named", "refuse"),
        ("nothing", "migrate"),
    ] {
        assert_eq!(planned(tenant), action, "{tenant}");
    }
    assert_eq!(plan["unusable"], serde_json::json!(["Not.A.Tenant"]));
    let told = site.migrate(&["plan"]).stdout;
    assert!(told.contains("refers: taken over as the references in them give them now: \"URL\"; later"), "{told}");
    let told = site.migrate(&["plan", "--tenants", "fine"]).ok();
    assert!(told.contains("1 tenant would be migrated"), "{told}");
    assert!(site.database().await.is_empty(), "a plan writes nothing");

    for strategy in ["folder", "recursive"] {
        let (code, outcome) = site.json(&["run", "--all", "--cutover", "--strategy", strategy]);
        assert_eq!(code, 1, "{outcome}");
        let failed = outcome["failed"].as_array().unwrap();
        let mut names: Vec<_> = failed.iter().map(|one| one["tenant"].as_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, ["dangles", "named", "twice"], "{outcome}");
        assert!(failed.iter().all(|one| one["reason"] == "problem"), "{outcome}");
    }
    let database = site.database().await;
    let secret = |tenant: &str, key: &str| database[tenant].1[key].0.clone();
    assert_eq!(secret("fine", "NEWLINE"), "value\n");
    assert_eq!(secret("fine", "a/b c?%"), "slash");
    assert_eq!(secret("fine", "K\u{1f511}"), "\u{1f600}");
    assert_eq!(secret("fine", "EMPTY"), "");
    assert_eq!(secret("large", "LARGE"), large);
    assert_eq!(secret("refers", "URL"), "pg://db.internal/x");
    assert_eq!(database["nothing"], (Some(Phase::Database), BTreeMap::new()));
    for tenant in ["dangles", "twice", "named"] {
        assert!(database.get(tenant).is_none_or(|(phase, _)| phase.is_none()), "{tenant} stays with its owner");
    }

    // Told to, it takes them over as they are served today.
    let (code, outcome) = site.json(&["run", "--all", "--cutover", "--accept", "name,reference"]);
    assert_eq!((code, outcome["failed"][0]["tenant"].as_str()), (1, Some("twice")), "nobody knows which is meant");
    let database = site.database().await;
    assert_eq!(database["dangles"].1["URL"].0, "pg://${NOWHERE}/x");
    assert_eq!(database["named"].1.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_a_tenant_ends_migrated_or_named_with_its_reason() {
    const TENANTS: usize = 60;
    let site = Site::plain().await;
    let world = site.infisical.world();
    site.fill(TENANTS);
    site.holds("denied", &[("A", "a")]);
    site.holds("broken", &[("A", "a")]);
    world.fault_at("/tenants/denied", Fault::Denied);
    world.fault_at("/tenants/broken", Fault::Garbage);
    world.fault_next(2, Route::List, Fault::Status(500));
    world.fault_next(1, Route::List, Fault::RateLimited { retry_after: Duration::from_secs(1) });
    world.fault_next(1, Route::List, Fault::Hang);
    world.fault_next(1, Route::List, Fault::CutOff);
    world.fault_next(1, Route::List, Fault::TokenExpired);
    let mut running = site.start(&["run", "--all", "--cutover", "--batch", "10", "--json"]);
    // And in the middle of it every token ends.
    world.wait_for_calls_to(Route::List, 40).await;
    world.expire_tokens();
    let outcome: Value = serde_json::from_str(&running.stdout_line()).unwrap();
    assert_eq!(running.wait(), 1);
    let reasons: Vec<_> =
        outcome["failed"].as_array().unwrap().iter().map(|one| (&one["tenant"], &one["reason"])).collect();
    assert_eq!(
        reasons,
        [(&Value::from("broken"), &Value::from("origin")), (&Value::from("denied"), &Value::from("denied"))],
        "{}",
        running.stderr()
    );
    let database = site.database().await;
    assert_eq!(database.values().filter(|(phase, _)| *phase == Some(Phase::Database)).count(), TENANTS);
    assert!(["denied", "broken"].iter().all(|tenant| database.get(*tenant).is_none_or(|(phase, _)| phase.is_none())));
    let (_, status) = site.json(&["status"]);
    assert_eq!((&status["run"]["state"], &status["run"]["done"]), (&"ended".into(), &TENANTS.into()));
    assert_eq!(status["run"]["failures"], serde_json::json!({ "denied": 1, "origin": 1 }));

    // What ails them is mended; the same command takes them, and nobody else.
    world.clear_faults();
    let (code, outcome) = site.json(&["run", "--all", "--cutover", "--batch", "10"]);
    assert_eq!((code, &outcome["migrated"]), (0, &2.into()), "{outcome}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_changes_between_the_two_reads_is_taken_again_and_its_last_value_migrates() {
    let site = Site::plain().await;
    site.holds("acme", &[("A", "first"), ("GONE", "g")]);
    let world = site.infisical.world();
    world.mark();
    let gate = world.gate(Route::List);
    let running = site.start(&["run", "--all", "--cutover"]);
    gate.arrived(1).await;
    // The second read is held where the first has told what it saw.
    let second = world.gate_next_answers(1, Route::List);
    gate.open();
    second.arrived(1).await;
    let third = world.gate(Route::List);
    second.open();
    third.arrived(1).await;
    world.put(ENV, "/tenants/acme", "A", "last");
    world.put(ENV, "/tenants/acme", "NEW", "n");
    world.delete(ENV, "/tenants/acme", "GONE");
    third.open();
    let mut running = running;
    assert_eq!(running.wait(), 0, "{}", running.stderr());
    let database = site.database().await;
    let values: Vec<_> = database["acme"].1.iter().map(|(key, (value, _))| (key.as_str(), value.as_str())).collect();
    assert_eq!(values, [("A", "last"), ("NEW", "n")]);
    assert_eq!(world.calls_since_mark().list, 4, "it is read twice again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_becomes_unreadable_or_goes_between_the_two_reads_is_not_switched() {
    let site = Site::plain().await;
    for tenant in ["denied", "removed"] {
        site.holds(tenant, &[("A", "a")]);
    }
    let world = site.infisical.world();
    let second = {
        let first = world.gate_next_answers(2, Route::List);
        let running = site.start(&["run", "--all", "--cutover", "--json"]);
        first.arrived(2).await;
        let second = world.gate(Route::List);
        first.open();
        (running, second)
    };
    let (mut running, gate) = second;
    gate.arrived(2).await;
    world.fault_at("/tenants/denied", Fault::Denied);
    world.delete_folder(ENV, "/tenants/removed");
    gate.open();
    let outcome: Value = serde_json::from_str(&running.stdout_line()).unwrap();
    assert_eq!(running.wait(), 1);
    let reasons: Vec<_> =
        outcome["failed"].as_array().unwrap().iter().map(|one| one["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["denied", "missing"], "{outcome}");
    assert!(site.database().await.values().all(|(phase, _)| phase.is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_restarted_in_the_middle_delays_a_run_and_no_more() {
    let mut postgres = tokio::task::spawn_blocking(Postgres::start).await.unwrap();
    let url = postgres.database().await;
    let site = Site::new(Some(&url), "infisical", "").await;
    site.fill(150);
    let mut running = site.start(&["run", "--all", "--cutover", "--batch", "5"]);
    site.infisical.world().wait_for_calls_to(Route::List, 60).await;
    let postgres = tokio::task::spawn_blocking(move || {
        postgres.restart();
        postgres
    });
    let _postgres = postgres.await.unwrap();
    assert_eq!(running.wait(), 0, "{}", running.stderr());
    let database = site.database().await;
    assert!(
        database.len() == 150
            && database.values().all(|(phase, secrets)| {
                *phase == Some(Phase::Database)
                    && secrets.len() == 5
                    && secrets.values().all(|(_, version)| *version == 1)
            })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_is_refused_with_the_id_of_the_first() {
    let site = Site::plain().await;
    site.fill(3);
    let gate = site.infisical.world().gate(Route::List);
    let mut first = site.start(&["run", "--all"]);
    gate.arrived(1).await;
    let (_, status) = site.json(&["status"]);
    assert_eq!(status["run"]["state"], "running");
    let id = status["run"]["id"].as_str().unwrap();
    let refused = site.migrate(&["run", "--all"]).failed(1);
    assert!(refused.contains(id), "{refused}");
    gate.open();
    assert_eq!(first.wait(), 0);
    assert!(
        site.database().await.values().all(|(phase, secrets)| phase.is_none() && secrets.len() == 5),
        "only copied"
    );
}

/// Runs a command again and again until it is not refused any more, because the one that has
/// the turn, the process of this id, has lost it.
fn until_taken_over(site: &Site, run: &[&str], id: u32) {
    let began = Instant::now();
    loop {
        let ended = site.migrate(run);
        if ended.code == 0 {
            return;
        }
        assert!(began.elapsed() < HANGS, "it is never taken over");
        let told = ended.failed(1);
        assert!(told.contains(&format!("/{id}, which has until")), "{told}");
    }
}

/// Every tenant is the database's, and has its secrets once.
fn all_migrated(database: &Tenants, tenants: usize) {
    assert_eq!(database.len(), tenants);
    for (tenant, (phase, secrets)) in database {
        let number: usize = tenant.trim_start_matches("tenant-").parse().unwrap();
        let expected = (0..5).map(|key| (format!("KEY_{key}"), (value(number, key), 1))).collect();
        assert_eq!((phase, secrets), (&Some(Phase::Database), &expected), "{tenant}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_killed_is_gone_on_with_at_once_whatever_its_lease_says() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let site = Site::new(url.as_deref(), "infisical", "").await;
        site.fill(6);
        let run = ["run", "--all", "--cutover", "--batch", "2"];
        let gate = site.infisical.world().gate(Route::List);
        let first = site.start(&run);
        gate.arrived(1).await;
        drop(first);
        gate.open();
        let (_, status) = site.json(&["status"]);
        assert_eq!(status["run"]["state"], "interrupted");
        site.place.sql("UPDATE leases SET until = 4000000000000").await;
        let (code, outcome) = site.json(&run);
        assert_eq!((code, &outcome["run"]), (0, &status["run"]["id"]), "{outcome}");
        all_migrated(&site.database().await, 6);
    }
}

/// Stops a run until another process has taken over, and lets it go on.
async fn hangs_and_goes_on(url: Option<&str>) {
    let site = Site::new(url, "infisical", "").await;
    site.fill(6);
    let run = ["run", "--all", "--cutover", "--batch", "2"];
    let gate = site.infisical.world().gate(Route::List);
    let mut first = site.start(&run);
    gate.arrived(1).await;
    first.stop(&site.place);
    gate.open();
    until_taken_over(&site, &run, first.id());
    let base = site.base().await;
    let rows = async || {
        let database = &base.database;
        let (changes, runs) = (database.changes().await.unwrap(), database.runs().await.unwrap());
        (changes, runs, database.migration_states().await.unwrap(), site.database().await)
    };
    let before = rows().await;
    all_migrated(&before.3, 6);
    first.go_on();
    assert_eq!(first.wait(), 1, "{}", first.stderr());
    assert!(first.stderr().contains("another process has taken over this migration"), "{}", first.stderr());
    assert_eq!(rows().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_hangs_is_taken_over_and_when_it_goes_on_writes_nothing_and_says_so() {
    hangs_and_goes_on(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_on_postgresql_that_hangs_is_taken_over_and_when_it_goes_on_writes_nothing() {
    hangs_and_goes_on(Some(&Postgres::shared().database().await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_database_is_restarted_is_not_joined_by_a_second_one() {
    let mut postgres = tokio::task::spawn_blocking(Postgres::start).await.unwrap();
    let site = Site::new(Some(&postgres.database().await), "infisical", "").await;
    site.fill(150);
    let run = ["run", "--all", "--cutover", "--batch", "5"];
    let mut first = site.start(&run);
    site.infisical.world().wait_for_calls_to(Route::List, 60).await;
    let postgres = tokio::task::spawn_blocking(move || {
        postgres.restart();
        postgres
    });
    let _postgres = postgres.await.unwrap();
    // The second takes over, for the first has lost its lock; or the first has got it back,
    // and ends before the second begins.
    until_taken_over(&site, &run, first.id());
    let stopped = first.wait() == 1;
    let said = first.stderr().contains("another process has taken over this migration");
    assert_eq!(stopped, said, "{}", first.stderr());
    all_migrated(&site.database().await, 150);
    let runs = site.base().await.database.runs().await.unwrap();
    assert!(runs.iter().all(|run| run.ended_at.is_some()), "{runs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_says_what_to_do_and_does_nothing() {
    let site = Site::plain().await;
    site.fill(2);
    for (arguments, told) in [
        (&["run"][..], "--all"),
        (&["run", "--tenants", "tenant-0,nobody"], "nobody"),
        (&["run", "--all", "--verify", "some"], "sample=5"),
        (&["run", "--all", "--cutover", "--to", "hybrid"], "--to"),
        (&["run", "--all", "--tenants", "tenant-0"], "--all"),
        (&["run", "--tenants", "[", "--cutover"], "pattern"),
        (&["cleanup", "--older-than", "30d"], "--yes"),
        (&["cleanup", "--older-than", "soon"], "soon"),
        (&["rollback", "tenant-*"], "tenant-*"),
    ] {
        let told_them = site.migrate(arguments).failed(2);
        assert!(told_them.contains(told), "{arguments:?}: {told_them}");
    }
    assert!(site.database().await.is_empty());
    let without = site.place.write("without.toml", "environment = \"prod\"\n[database]\nurl = \"sqlite:x.db\"\n");
    let without = without.display().to_string();
    let told = site.place.run_with(&["migrate", "run", "--all", "--config", &without], "").failed(2);
    assert!(told.contains("[infisical]"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_is_rolled_back_with_the_next_lookup_and_no_write_is_lost() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let site = Site::new(url.as_deref(), "infisical", "").await;
        site.fill(30);
        let token = site.token();
        let (_serving, address) = site.place.serve();
        site.migrate(&["run", "--all", "--cutover"]).ok();
        let read = async |tenant: &str, key: &str| {
            let (status, tier, body) = look_up(&address, &token, tenant, key).await;
            (status, tier.split(';').next().unwrap_or_default().to_owned(), body)
        };
        let (_, tier, _) = read("tenant-7", "KEY_1").await;
        assert_eq!(tier, "database");
        let put = async |value: &str| {
            let request = keeping_client().put(format!("{address}/v1/tenants/tenant-7/secrets/KEY_1"));
            let sent = request.bearer_auth(&token).json(&serde_json::json!({ "value": value })).send().await.unwrap();
            assert!(sent.status().is_success());
        };
        put("written since").await;
        let refused = site.migrate(&["rollback", "tenant-7"]).failed(1);
        assert!(refused.contains("KEY_1") && refused.contains("--push"), "{refused}");
        let (_, tier, body) = read("tenant-7", "KEY_1").await;
        assert!(tier == "database" && body.contains("written since"), "nothing has changed: {tier} {body}");

        site.migrate(&["rollback", "tenant-7", "--push"]).ok();
        let (status, tier, body) = read("tenant-7", "KEY_1").await;
        assert!(status == 200 && tier == "infisical" && body.contains("written since"), "{status} {tier} {body}");
        assert_eq!(site.infisical.world().value(ENV, "/tenants/tenant-7", "KEY_1").unwrap(), "written since");
        assert_eq!(read("tenant-8", "KEY_1").await.1, "database", "the others stay");

        // And on again; what is in Infisical by now is what migrates.
        site.infisical.world().put(ENV, "/tenants/tenant-7", "KEY_2", "changed there");
        site.migrate(&["run", "--tenants", "tenant-7", "--cutover"]).ok();
        let (_, tier, body) = read("tenant-7", "KEY_2").await;
        assert!(tier == "database" && body.contains("changed there"), "{tier} {body}");
        put("left behind").await;
        site.migrate(&["rollback", "tenant-7", "--discard"]).ok();
        let (_, _, body) = read("tenant-7", "KEY_1").await;
        assert!(body.contains("written since"), "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn drift_since_the_switch_is_told_by_tenant_and_name_and_by_who_is_ahead() {
    let site = Site::new(None, "hybrid", "").await;
    site.fill(4);
    site.migrate(&["run", "--all", "--cutover"]).ok();
    site.migrate(&["verify"]).ok();
    let token = site.token();
    let (_serving, address) = site.place.serve();
    let world = site.infisical.world();
    world.put(ENV, "/tenants/tenant-1", "KEY_0", "changed there");
    world.put(ENV, "/tenants/tenant-1", "NEW", "made there");
    world.delete(ENV, "/tenants/tenant-1", "KEY_1");
    let secret = |key: &str| format!("{address}/v1/tenants/tenant-2/secrets/{key}");
    let client = keeping_client();
    let put = client.put(secret("KEY_0")).bearer_auth(&token).json(&serde_json::json!({ "value": "own" }));
    assert!(put.send().await.unwrap().status().is_success());
    assert!(client.delete(secret("KEY_1")).bearer_auth(&token).send().await.unwrap().status().is_success());
    for strategy in ["folder", "recursive"] {
        let (code, outcome) = site.json(&["verify", "--strategy", strategy]);
        assert_eq!((code, &outcome["equal"]), (1, &2.into()));
        let different: Vec<_> = outcome["different"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|one| one["drift"].as_array().unwrap())
            .map(|drift| (drift["key"].as_str().unwrap(), drift["what"].as_str().unwrap()))
            .collect();
        assert_eq!(
            different,
            [
                ("KEY_0", "changed_upstream"),
                ("KEY_1", "deleted_upstream"),
                ("NEW", "made_upstream"),
                ("KEY_0", "written_here"),
                ("KEY_1", "deleted_here"),
            ]
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_running_proxy_sees_differ_after_the_switch_stands_in_the_status() {
    let site = Site::new(None, "hybrid", "[migration]\nshadow_sample = 1\n").await;
    site.fill(2);
    let token = site.token();
    let (mut serving, address) = site.place.serve();
    site.migrate(&["run", "--all", "--cutover"]).ok();
    site.infisical.world().put(ENV, "/tenants/tenant-1", "KEY_0", "changed there");
    // The run has ended when the proxy has heard of the switch.
    for tenant in ["tenant-0", "tenant-1"] {
        let (status, _, body) = look_up(&address, &token, tenant, "KEY_0").await;
        assert_eq!(status, 200);
        assert!(!body.contains("changed there"), "{body}");
    }
    serving.stderr_line("answered otherwise");
    assert_eq!(serving.terminate(), 0);
    let (code, status) = site.json(&["status"]);
    assert_eq!(code, 0);
    assert_eq!(status["shadow"], serde_json::json!({ "compared": 2, "different": 1, "tenants": ["tenant-1"] }));
    let shown = site.migrate(&["status"]).ok();
    assert!(shown.contains("2 lookups were compared with upstream, and 1 differed"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_are_archived_and_removed_only_where_nothing_would_be_lost_and_come_back() {
    let site = Site::plain().await;
    site.fill(4);
    site.migrate(&["run", "--all", "--cutover"]).ok();
    let world = site.infisical.world();
    let young = site.migrate(&["cleanup", "--older-than", "30d", "--yes"]).ok();
    assert!(young.contains("0 folders"), "{young}");
    world.put(ENV, "/tenants/tenant-1", "KEY_0", "changed there");
    world.put(ENV, "/tenants/tenant-2/deeper", "HIDDEN", "h");
    let (code, outcome) = site.json(&["cleanup", "--older-than", "0s", "--yes", "--archive", "a.jsonl"]);
    assert_eq!(code, 1, "{outcome}");
    let removed: Vec<_> =
        outcome["tenants"].as_array().unwrap().iter().map(|one| one["removed"].as_bool().unwrap()).collect();
    assert_eq!(removed, [true, false, false, true], "{outcome}");
    assert!(world.secrets(ENV, "/tenants/tenant-0").is_empty());
    assert_eq!(world.value(ENV, "/tenants/tenant-2/deeper", "HIDDEN").as_deref(), Some("h"));
    let archive = std::fs::read_to_string(site.place.path().join("a.jsonl")).unwrap();
    // One more than was removed: it is on the disk before its folder is to go.
    assert!(archive.lines().count() == 3 && !archive.contains("value-"), "{archive}");

    let refused = site.migrate(&["rollback", "tenant-0"]).failed(1);
    assert!(refused.contains("restore"), "{refused}");
    site.migrate(&["restore", "a.jsonl", "--tenants", "tenant-0"]).ok();
    for key in 0..5 {
        assert_eq!(world.value(ENV, "/tenants/tenant-0", &format!("KEY_{key}")).unwrap(), value(0, key));
    }
    site.migrate(&["rollback", "tenant-0"]).ok();
    site.place.write("a.jsonl", &archive.replace("tenant-3", "tenant-1"));
    let told = site.migrate(&["restore", "a.jsonl"]);
    assert_eq!(told.code, 1, "{told:?}");
    assert!(told.stderr.contains("tenant-1") && told.stdout.contains("2 folders are back"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_folder_migrates_beside_the_tenants_comes_back_and_keeps_its_master_key() {
    for strategy in ["folder", "recursive"] {
        let folders = "folders = [\n  { name = \"hono-api\", path = \"/hono-api\" },\n  { name = \"keys\", path = \"/keys\" },\n]\n";
        let site = Site::new(None, "infisical", folders).await;
        let text = std::fs::read_to_string(site.place.path().join("secretier.toml")).unwrap();
        site.place
            .write("secretier.toml", &text.replace("master.key\"]", "master.key\", \"infisical:/keys/OUR_KEY\"]"));
        site.fill(3);
        site.holds("/hono-api", &[("SESSION", "s1"), ("DSN", "d1")]);
        site.holds("/keys", &[("OUR_KEY", &master_key()), ("BESIDE", "b1")]);
        let world = site.infisical.world();
        let ours = world.value(ENV, "/keys", "OUR_KEY").unwrap();

        let (code, plan) = site.json(&["plan"]);
        assert_eq!(code, 0, "{plan}");
        let planned: Vec<&str> =
            plan["tenants"].as_array().unwrap().iter().map(|one| one["tenant"].as_str().unwrap()).collect();
        assert_eq!(planned, ["/hono-api", "/keys", "tenant-0", "tenant-1", "tenant-2"]);
        // A pattern for tenants does not move a folder.
        site.migrate(&["run", "--tenants", "tenant-*", "--cutover", "--strategy", strategy]).ok();
        assert!(site.database().await.keys().all(|tenant| !tenant.starts_with('/')));
        let (code, outcome) = site.json(&["run", "--all", "--cutover", "--strategy", strategy]);
        assert_eq!(code, 0, "{outcome}");
        let database = site.database().await;
        assert_eq!(database["/hono-api"].0, Some(Phase::Database));
        assert_eq!(database["/hono-api"].1.len(), 2, "{database:?}");
        assert_eq!(database["/keys"].1.keys().collect::<Vec<_>>(), ["BESIDE"], "the master key stays where it is");
        let (code, verified) = site.json(&["verify"]);
        assert_eq!(code, 0, "{verified}");

        let token = site.token();
        let (_serving, address) = site.place.serve();
        let client = keeping_client();
        let get = async |folder: &str, key: &str| {
            let request = client.get(format!("{address}/v1/folders/{folder}/secrets/{key}")).bearer_auth(&token);
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        };
        world.fault(Fault::Down);
        assert!(get("hono-api", "SESSION").await.1.contains("\"s1\""));
        assert_eq!(get("keys", "OUR_KEY").await.0, 403);
        world.clear_faults();

        let (code, outcome) = site.json(&["cleanup", "--older-than", "0s", "--yes", "--archive", "a.jsonl"]);
        assert_eq!(code, 1, "{outcome}");
        assert!(world.secrets(ENV, "/hono-api").is_empty());
        assert_eq!(world.value(ENV, "/keys", "OUR_KEY").as_ref(), Some(&ours));
        site.migrate(&["restore", "a.jsonl", "--tenants", "/hono-api"]).ok();
        assert_eq!(world.value(ENV, "/hono-api", "DSN").as_deref(), Some("d1"));
        site.migrate(&["rollback", "/hono-api"]).ok();
        site.migrate(&["rollback", "/keys"]).ok();
        assert_eq!(world.value(ENV, "/keys", "OUR_KEY"), Some(ours));
        world.put(ENV, "/hono-api", "SESSION", "s2");
        eventually(async || get("hono-api", "SESSION").await.1.contains("\"s2\"")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_is_signed_and_holds_no_value() {
    let site = Site::plain().await;
    site.fill(3);
    site.migrate(&["run", "--all", "--cutover", "--report", "report.json"]).ok();
    let report = std::fs::read_to_string(site.place.path().join("report.json")).unwrap();
    assert!(report.contains("tenant-2") && !report.contains("value-"), "{report}");
    assert!(site.migrate(&["verify", "--report", "report.json"]).ok().contains("3 tenants"));
    let twice = report.replace("\"already\": [", "\"already\": [\"tenant-9\"],\n    \"already\": [");
    for changed in [report.replace("tenant-2", "tenant-9"), twice] {
        site.place.write("report.json", &changed);
        let told = site.migrate(&["verify", "--report", "report.json"]).failed(1);
        assert!(told.contains("changed"), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_that_cannot_be_written_is_found_out_before_the_run() {
    let site = Site::plain().await;
    site.fill(1);
    let told = site.migrate(&["run", "--all", "--cutover", "--report", "missing/report.json"]).failed(2);
    assert!(told.contains("missing/report.json"), "{told}");
    assert!(site.database().await.is_empty(), "nothing was done");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_costs_what_the_run_will_where_folders_cannot_be_read_at_once() {
    let site = Site::plain().await;
    site.fill(10);
    site.infisical.world().folder(ENV, "/shared");
    site.infisical.world().put(ENV, "/shared", "S", "s");
    let (_, plan) = site.json(&["plan"]);
    assert_eq!((&plan["cost"]["strategy"], &plan["cost"]["calls"]), (&"recursive".into(), &4.into()), "{plan}");
    site.infisical.world().import(ENV, "/tenants/tenant-1", ENV, "/shared");
    let (_, plan) = site.json(&["plan"]);
    assert_eq!((&plan["cost"]["strategy"], &plan["cost"]["calls"]), (&"folder".into(), &22.into()), "{plan}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_infisical_is_told_what_for() {
    let site = Site::plain().await;
    site.fill(1);
    site.infisical.world().fault_next(1, Route::Folders, Fault::RateLimited { retry_after: Duration::from_secs(2) });
    let ended = site.migrate(&["run", "--all"]);
    assert!(ended.stderr.contains("limits our rate; trying again in"), "{}", ended.stderr);
    ended.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_way_to_hybrid_the_copy_is_served_without_another_call() {
    let site = Site::new(None, "infisical", "").await;
    site.fill(3);
    let token = site.token();
    site.migrate(&["run", "--all", "--to", "hybrid"]).ok();
    let (_serving, address) = site.place.serve();
    site.infisical.world().mark();
    let (status, tier, _) = look_up(&address, &token, "tenant-1", "KEY_1").await;
    assert!(status == 200 && tier.starts_with("database; hit"), "{status} {tier}");
    assert_eq!(site.infisical.world().calls_since_mark().total(), 0);
    site.migrate(&["run", "--all", "--cutover"]).ok();
    assert!(site.database().await.values().all(|(phase, _)| *phase == Some(Phase::Database)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_rolled_back_while_a_run_was_interrupted_is_named_and_the_next_run_takes_it() {
    let site = Site::plain().await;
    site.fill(2);
    let run = ["run", "--all", "--cutover", "--batch", "1"];
    let world = site.infisical.world();
    world.fault_at("/tenants/tenant-1", Fault::Hang);
    let running = site.start(&run);
    let began = Instant::now();
    while site.database().await.get("tenant-0").is_none_or(|(phase, _)| phase.is_none()) {
        assert!(began.elapsed() < HANGS, "the one whose folder can be read is never switched");
    }
    drop(running);
    world.clear_faults();
    site.migrate(&["rollback", "tenant-0"]).ok();
    let (code, outcome) = site.json(&run);
    assert_eq!((code, &outcome["migrated"]), (1, &1.into()), "{outcome}");
    let failed = &outcome["failed"][0];
    assert_eq!((&failed["tenant"], &failed["reason"]), (&"tenant-0".into(), &"rolled_back".into()), "{outcome}");
    assert_eq!(site.database().await["tenant-0"].0, None, "what somebody has decided since is not undone");
    site.migrate(&run).ok();
    assert!(site.database().await.values().all(|(phase, _)| *phase == Some(Phase::Database)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_of_which_the_database_owns_a_part_does_not_go_to_hybrid_and_loses_nothing() {
    let rule = "[[rules]]\ntenants = \"acme\"\nkeys = \"OWN_*\"\nphase = \"database\"\n";
    let site = Site::new(None, "infisical", rule).await;
    site.holds("acme", &[("A", "a")]);
    let token = site.token();
    let (_serving, address) = site.place.serve();
    let put = keeping_client().put(format!("{address}/v1/tenants/acme/secrets/OWN_1")).bearer_auth(&token);
    assert!(put.json(&serde_json::json!({ "value": "own" })).send().await.unwrap().status().is_success());
    let to_hybrid = ["run", "--all", "--to", "hybrid"];
    let (code, plan) = site.json(&[&to_hybrid[..], &["--dry-run"]].concat());
    assert_eq!((code, &plan["tenants"][0]["action"]), (1, &"refuse".into()), "{plan}");
    let (code, outcome) = site.json(&to_hybrid);
    assert_eq!((code, &outcome["failed"][0]["reason"]), (1, &"owned".into()), "{outcome}");
    site.migrate(&["run", "--all", "--cutover"]).ok();
    for (key, value) in [("A", "a"), ("OWN_1", "own")] {
        let (status, tier, body) = look_up(&address, &token, "acme", key).await;
        assert!(status == 200 && tier.starts_with("database") && body.contains(value), "{status} {tier} {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_whose_folder_is_gone_is_not_given_back_to_nothing() {
    let site = Site::plain().await;
    site.fill(2);
    let token = site.token();
    let (_serving, address) = site.place.serve();
    site.migrate(&["run", "--all", "--cutover"]).ok();
    let world = site.infisical.world();
    world.delete_folder(ENV, "/tenants/tenant-0");
    for arguments in [&["rollback", "tenant-0"][..], &["rollback", "tenant-0", "--discard"]] {
        let refused = site.migrate(arguments).failed(1);
        assert!(refused.contains("no folder") && refused.contains("restore"), "{refused}");
        let (status, tier, _) = look_up(&address, &token, "tenant-0", "KEY_1").await;
        assert!(status == 200 && !tier.starts_with("infisical"), "{status} {tier}");
    }
    site.migrate(&["rollback", "tenant-0", "--push"]).ok();
    for key in 0..5 {
        let (status, tier, body) = look_up(&address, &token, "tenant-0", &format!("KEY_{key}")).await;
        assert!(status == 200 && !tier.starts_with("database") && body.contains(&value(0, key)), "{status} {tier}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_rule_gives_to_the_database_stays_there_when_its_tenant_is_given_back() {
    let rule = "[[rules]]\ntenants = \"acme\"\nkeys = \"OWN_*\"\nphase = \"database\"\n";
    let site = Site::new(None, "infisical", rule).await;
    site.holds("acme", &[("A", "a")]);
    let token = site.token();
    let (_serving, address) = site.place.serve();
    let put = keeping_client().put(format!("{address}/v1/tenants/acme/secrets/OWN_1")).bearer_auth(&token);
    assert!(put.json(&serde_json::json!({ "value": "own" })).send().await.unwrap().status().is_success());
    site.migrate(&["run", "--all", "--cutover"]).ok();
    site.migrate(&["rollback", "acme"]).ok();
    let (status, tier, body) = look_up(&address, &token, "acme", "OWN_1").await;
    assert!(status == 200 && tier.starts_with("database") && body.contains("own"), "{status} {tier} {body}");
    assert!(site.infisical.world().value(ENV, "/tenants/acme", "OWN_1").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_is_given_back_while_folders_are_removed_keeps_its_own() {
    let site = Site::plain().await;
    site.fill(2);
    site.migrate(&["run", "--all", "--cutover"]).ok();
    let world = site.infisical.world();
    let gate = world.gate_next_answers(1, Route::Folders);
    let mut rollback = site.start(&["rollback", "tenant-1"]);
    gate.arrived(1).await;
    let mut cleanup = site.start(&["cleanup", "--older-than", "0s", "--yes", "--archive", "a.jsonl", "--json"]);
    // Once it has an archive, it knows which tenants are due.
    eventually(async || site.place.path().join("a.jsonl").exists()).await;
    gate.open();
    assert_eq!(rollback.wait(), 0, "{}", rollback.stderr());
    let outcome: Value = serde_json::from_str(&cleanup.stdout_line()).unwrap();
    assert_eq!(cleanup.wait(), 1);
    let removed: Vec<_> =
        outcome["tenants"].as_array().unwrap().iter().map(|one| one["removed"].as_bool().unwrap()).collect();
    assert_eq!(removed, [true, false], "{outcome}");
    assert_eq!(world.secrets(ENV, "/tenants/tenant-1").len(), 5);
    assert_eq!(site.database().await["tenant-1"].0, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cleanup_that_hangs_while_its_tenant_is_given_back_removes_nothing_when_it_goes_on() {
    let site = Site::plain().await;
    site.fill(1);
    site.migrate(&["run", "--all", "--cutover"]).ok();
    let world = site.infisical.world();
    let gate = world.gate(Route::List);
    let mut cleanup = site.start(&["cleanup", "--older-than", "0s", "--yes", "--archive", "a.jsonl"]);
    gate.arrived(1).await;
    cleanup.stop(&site.place);
    gate.open();
    site.migrate(&["rollback", "tenant-0"]).ok();
    cleanup.go_on();
    assert_eq!(cleanup.wait(), 1, "{}", cleanup.stderr());
    assert!(cleanup.stderr().contains("has taken over"), "{}", cleanup.stderr());
    assert_eq!(world.secrets(ENV, "/tenants/tenant-0").len(), 5);
    assert_eq!(site.database().await["tenant-0"].0, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_gone_counts_as_archived_only_where_the_archive_has_it() {
    let site = Site::plain().await;
    site.fill(2);
    site.migrate(&["run", "--all", "--cutover"]).ok();
    let world = site.infisical.world();
    let cleanup = ["cleanup", "--older-than", "0s", "--yes", "--archive", "a.jsonl"];
    // The first is removed, and nobody hears of it; somebody else removes the second.
    let gate = world.gate_next_answers(1, Route::Write);
    let running = site.start(&cleanup);
    gate.arrived(1).await;
    drop(running);
    gate.open();
    world.delete_folder(ENV, "/tenants/tenant-1");
    let (code, outcome) = site.json(&cleanup);
    let tenants = outcome["tenants"].as_array().unwrap();
    assert_eq!((code, &tenants[0]["removed"], &tenants[0]["secrets"]), (1, &true.into(), &5.into()), "{outcome}");
    assert_eq!(tenants[1]["removed"], false, "{outcome}");
    assert!(tenants[1]["reason"].as_str().unwrap().contains("archive does not have it"), "{outcome}");
    let (_, status) = site.json(&["status"]);
    assert_eq!(status["tenants"], serde_json::json!({ "archived": 1, "switched": 1 }));
    site.migrate(&["restore", "a.jsonl"]).ok();
    assert_eq!(world.secrets(ENV, "/tenants/tenant-0").len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_removed_where_the_archive_could_not_be_read_back() {
    let site = Site::plain().await;
    site.fill(2);
    site.migrate(&["run", "--all", "--cutover"]).ok();
    let cleanup = |file: &'static str| ["cleanup", "--older-than", "0s", "--yes", "--archive", file];
    let configuration = std::fs::read_to_string(site.place.path().join("secretier.toml")).unwrap();
    site.migrate(&cleanup("secretier.toml")).failed(1);
    assert_eq!(std::fs::read_to_string(site.place.path().join("secretier.toml")).unwrap(), configuration);
    site.migrate(&cleanup("missing/a.jsonl")).failed(1);
    let line = r#"{"version":1,"environment":"dev","tenant":"a","archived_at":"2026-01-01T00:00:00.000Z","secrets":0,"master_key":"m","sealed":"s"}"#;
    site.place.write("dev.jsonl", &format!("{line}\n"));
    let told = site.migrate(&cleanup("dev.jsonl")).failed(1);
    assert!(told.contains("dev"), "{told}");
    for number in 0..2 {
        assert_eq!(site.infisical.world().secrets(ENV, &format!("/tenants/tenant-{number}")).len(), 5);
    }
    // Half a line is what a crash leaves, and keeps nobody from what comes after it.
    site.place.write("a.jsonl", &line[..60]);
    site.migrate(&cleanup("a.jsonl")).ok();
    site.migrate(&["restore", "a.jsonl"]).ok();
    assert_eq!(site.infisical.world().secrets(ENV, "/tenants/tenant-1").len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_folder_replaces_nothing_and_brings_nothing_back_that_was_deleted_since() {
    let site = Site::plain().await;
    site.fill(3);
    site.migrate(&["run", "--all", "--cutover"]).ok();
    let world = site.infisical.world();
    site.migrate(&["cleanup", "--older-than", "0s", "--yes", "--archive", "a.jsonl"]).ok();
    // One is back with Infisical and lives on there; another was made again by hand.
    site.migrate(&["restore", "a.jsonl", "--tenants", "tenant-0"]).ok();
    site.migrate(&["rollback", "tenant-0"]).ok();
    world.delete(ENV, "/tenants/tenant-0", "KEY_1");
    world.put(ENV, "/tenants/tenant-1", "KEY_2", "newer");
    let (code, outcome) = site.json(&["restore", "a.jsonl"]);
    let restored: Vec<_> =
        outcome["tenants"].as_array().unwrap().iter().map(|one| one["restored"].as_bool().unwrap()).collect();
    assert_eq!((code, &restored[..]), (1, &[false, false, true][..]), "{outcome}");
    assert!(outcome["tenants"][1]["reason"].as_str().unwrap().contains("KEY_2"), "{outcome}");
    assert!(world.value(ENV, "/tenants/tenant-0", "KEY_1").is_none());
    assert_eq!(world.secrets(ENV, "/tenants/tenant-1"), [("KEY_2".to_owned(), "newer".to_owned())]);
    assert_eq!(world.secrets(ENV, "/tenants/tenant-2").len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_takes_no_calls_for_an_hour_ends_a_run_that_can_be_gone_on_with() {
    let site = Site::plain().await;
    site.fill(60);
    let world = site.infisical.world();
    world.fault_on(Route::List, Fault::RateLimited { retry_after: Duration::from_secs(3600) });
    let told = site.migrate(&["run", "--all", "--cutover"]).failed(1);
    assert!(told.contains("does not answer any more"), "{told}");
    assert!(world.calls().list <= 8, "it is not asked for every tenant: {:?}", world.calls());
    let (_, status) = site.json(&["status"]);
    assert_eq!(status["run"]["state"], "interrupted");
    world.clear_faults();
    let (code, outcome) = site.json(&["run", "--all", "--cutover"]);
    assert_eq!((code, &outcome["migrated"]), (0, &60.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_folders_that_is_refused_denies_no_tenant() {
    let site = Site::plain().await;
    site.holds("empty", &[]);
    let world = site.infisical.world();
    let gate = world.gate_next_answers(1, Route::Folders);
    let mut running = site.start(&["run", "--all", "--cutover", "--json"]);
    gate.arrived(1).await;
    world.fault_on(Route::Folders, Fault::Denied);
    gate.open();
    let outcome: Value = serde_json::from_str(&running.stdout_line()).unwrap();
    assert_eq!((running.wait(), &outcome["failed"][0]["reason"]), (1, &"origin".into()), "{outcome}");
}
