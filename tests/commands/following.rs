//! Commands that switch, shred, rotate or revoke, beside instances that have not followed.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::SystemTime,
};

use secretier::clock::Timestamp;
use serde_json::{Value, json};

use crate::{
    faketime::FakeClock,
    migrate::Site,
    postgres::{self, Postgres},
    program::{Ended, Place, Running, client, look_up},
    relay::Relay,
    within::eventually,
};

const COMMANDS: [&[&str]; 6] = [
    &["token", "revoke", "spare"],
    &["token", "rotate", "other", "--grace", "0s"],
    &["migrate", "run", "--tenants", "acme", "--cutover"],
    &["migrate", "rollback", "acme"],
    &["tenant", "shred", "globex", "--yes"],
    &["keys", "rotate"],
];

/// A place with two tenants in phase `hybrid`, and three tokens.
async fn prepared(url: Option<&str>, bound: &str) -> (Site, [String; 3]) {
    let site = Site::new(url, "hybrid", "").await;
    let config = std::fs::read_to_string(site.place.path().join("secretier.toml")).unwrap();
    site.place.write("secretier.toml", &config.replace("[keys]", &format!("{bound}[keys]")));
    site.holds("acme", &[("K", "of infisical")]);
    site.holds("globex", &[("K", "to be shredded")]);
    let tokens = ["api", "spare", "other"].map(|name| token(&site.place, name));
    (site, tokens)
}

/// The same with an instance that holds all of it in memory.
async fn site(url: Option<&str>, bound: &str) -> (Site, Running, String, [String; 3]) {
    let (site, tokens) = prepared(url, bound).await;
    let (serving, address) = site.place.serve();
    is_warm(&address, &tokens).await;
    (site, serving, address, tokens)
}

async fn is_warm(address: &str, tokens: &[String]) {
    for (tenant, token) in ["acme", "globex"].iter().flat_map(|tenant| tokens.iter().map(move |token| (tenant, token)))
    {
        // Where its clock was just set, it may have to ask the database first.
        eventually(async || look_up(address, token, tenant, "K").await.0 == 200).await;
    }
}

/// How an instance comes to hear nothing of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    CutOff,
    Stopped,
}

/// Seconds by which the wall clock is off, and those for which an instance was not heard of.
const CLOCKS: [i64; 3] = [0, 90, -90];
const NOT_HEARD_OF: [i64; 3] = [5, 15, 60];

/// A site with an instance that can be lost, and its wall clock set.
struct Beside {
    site: Site,
    serving: Running,
    address: String,
    tokens: [String; 3],
    relay: Option<Relay>,
    url: Option<String>,
    off: i64,
    launched: Timestamp,
}

impl Beside {
    /// One whose wall clock is so many seconds off. On PostgreSQL that is the instance's alone; on
    /// SQLite it is the machine's, which all processes share, and is set while the instance runs.
    /// Nothing where no clock can be set.
    async fn new(url: Option<String>, off: i64, bound: &str) -> Option<Self> {
        let (mut site, tokens) = prepared(url.as_deref(), bound).await;
        let launched = Timestamp::from_millis(wall_millis());
        let clock = match off {
            0 => None,
            _ => Some(FakeClock::new(site.place.path().join("clock"), "+0")?),
        };
        let mut own = Vec::new();
        let variables = clock.iter().flat_map(FakeClock::variables).map(|(name, value)| (name, value.to_owned()));
        let mut relay = None;
        match &url {
            Some(url) => {
                own.extend(variables);
                let port = Postgres::shared().port();
                let through = Relay::to(port).await;
                let through_url = url.replace(&format!(":{port}/"), &format!(":{}/", through.port()));
                own.push(("SECRETIER_DATABASE__URL", through_url));
                relay = Some(through);
            }
            None => variables.for_each(|(name, value)| site.place.set(name, &value)),
        }
        let exports: String = own.iter().map(|(name, value)| format!("export {name}='{value}'; ")).collect();
        let (serving, address) = site.place.serve_under(&["sh", "-c", &format!("{exports}exec \"$@\"")]);
        if let Some(clock) = clock {
            clock.set(&format!("{off:+}"));
        }
        is_warm(&address, &tokens).await;
        Some(Self { site, serving, address, tokens, relay, url, off, launched })
    }

    async fn lose(&self, loss: Loss) {
        if loss == Loss::Stopped {
            self.serving.stop(&self.site.place);
            return;
        }
        self.relay.as_ref().unwrap().cut().await;
        // What it has sent may be at work there still.
        let others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                      AND pid <> pg_backend_pid() AND backend_type = 'client backend'";
        let url = self.url.as_deref().unwrap();
        eventually(async || postgres::number(url, others).await == 0).await;
    }

    fn mend(&self, loss: Loss) {
        match loss {
            Loss::CutOff => self.relay.as_ref().unwrap().mend(),
            Loss::Stopped => self.serving.go_on(),
        }
    }

    /// Lets so many seconds pass in which it is not heard of.
    async fn not_heard_of(&self, seconds: i64) {
        self.site.place.sql(&format!("UPDATE instances SET seen_at = seen_at - {}", seconds * 1000)).await;
    }

    /// Its row in the register, and the counter of changes.
    fn registered(&self) -> (Value, Value) {
        let listed: Value = serde_json::from_str(&self.site.place.run(&["instances", "list", "--json"]).ok()).unwrap();
        let name = format!("/{}", self.serving.id());
        let mut rows = listed["instances"].as_array().unwrap().iter();
        let row = rows.find(|row| row["instance"].as_str().unwrap().ends_with(&name)).unwrap();
        (row.clone(), listed["changes"].clone())
    }

    /// That the register tells until when it may answer, whatever its own clock says.
    fn tells_the_end(&self, not_heard_of: i64) -> String {
        const DAY: i64 = 24 * 60 * 60 * 1000;
        let (row, _) = self.registered();
        let [seen, until] = ["last_seen_at", "may_answer_until"]
            .map(|name| Timestamp::from_rfc3339(row[name].as_str().unwrap()).unwrap().as_millis());
        assert_eq!(until, seen + DAY + DAY / 1000 + 2000, "{row}");
        let announced = seen + not_heard_of * 1000;
        // SQLite has the machine's clock.
        let off = if self.url.is_some() { 0 } else { self.off.abs() * 1000 };
        assert!((self.launched.as_millis() - off..=wall_millis() + off).contains(&announced), "{row}");
        row["may_answer_until"].as_str().unwrap().to_owned()
    }

    /// That a command names it with the time until which it may answer, and ends well once it has followed.
    async fn is_named_by(&self, command: &[&str], loss: Loss, not_heard_of: i64) {
        let case = format!("{command:?}, {loss:?} for {not_heard_of} s, {} s off", self.off);
        self.lose(loss).await;
        self.not_heard_of(not_heard_of).await;
        let ended = run(&self.site.place, command, "0s");
        let until = self.tells_the_end(not_heard_of);
        self.mend(loss);
        assert_eq!(ended.code, 1, "{case}: {ended:?}");
        assert!(ended.stderr.contains(&format!("/{}", self.serving.id())), "{case}: {ended:?}");
        // While it passes for running, keys are not rotated at all.
        let passes_for_running = not_heard_of < 15 || self.url.is_none() && self.off < 0;
        let is_refused = ended.stderr.contains("nothing was re-wrapped");
        assert!(!is_refused || command.contains(&"keys") && passes_for_running, "{case}: {ended:?}");
        let told = format!("may go on answering as before until {until}");
        assert!(is_refused || ended.stderr.contains(&told), "{case}: {ended:?}");
        let again = if command.contains(&"other") { &["instances", "wait"][..] } else { command };
        run(&self.site.place, again, "60s").ok();
    }
}

fn wall_millis() -> i64 {
    i64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

fn token(place: &Place, name: &str) -> String {
    let create = ["token", "create", "--name", name, "--tenants", "*", "--actions", "read,write"];
    place.run(&create).ok().trim().to_owned()
}

fn run(place: &Place, command: &[&str], wait: &str) -> Ended {
    place.run(&[command, &["--wait", wait]].concat())
}

fn both(postgres: String) -> [Option<String>; 2] {
    [None, Some(postgres)]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_names_an_instance_that_is_stopped_and_run_again_it_ends_well() {
    for url in both(Postgres::shared().database().await) {
        let (site, serving, ..) = site(url.as_deref(), "").await;
        for command in COMMANDS {
            serving.stop(&site.place);
            let ended = run(&site.place, command, "1s");
            serving.go_on();
            assert_eq!(ended.code, 1, "{command:?}: {ended:?}");
            assert!(ended.stderr.contains(&format!("/{}", serving.id())), "{command:?}: {ended:?}");
            // While it passes for running, keys are not rotated at all.
            if !command.contains(&"keys") {
                let told = ["may go on answering as before until 2", "waiting for instances to follow: "];
                assert!(told.iter().all(|part| ended.stderr.contains(part)), "{command:?}: {ended:?}");
            }
            let again = if command.contains(&"other") { &["instances", "wait"][..] } else { command };
            run(&site.place, again, "60s").ok();
        }
    }
}

/// Every way to lose an instance beside every clock and every command.
async fn names_whom_it_lost(on_postgres: bool) {
    let losses: &[Loss] = if on_postgres { &[Loss::CutOff, Loss::Stopped] } else { &[Loss::Stopped] };
    for (row, (loss, off)) in crossed(losses, &CLOCKS).enumerate() {
        let Some(beside) = Beside::new(database(on_postgres).await, off, "").await else { continue };
        for (column, command) in COMMANDS.iter().enumerate() {
            beside.is_named_by(command, loss, NOT_HEARD_OF[(row + column) % NOT_HEARD_OF.len()]).await;
        }
    }
}

fn crossed(losses: &[Loss], clocks: &[i64]) -> impl Iterator<Item = (Loss, i64)> {
    losses.iter().flat_map(move |loss| clocks.iter().map(move |off| (*loss, *off)))
}

async fn database(on_postgres: bool) -> Option<String> {
    if on_postgres { Some(Postgres::shared().database().await) } else { None }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_names_an_instance_that_is_stopped_whatever_the_machines_clock_says() {
    names_whom_it_lost(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_names_an_instance_that_is_cut_off_or_stopped_whatever_its_clock_says() {
    names_whom_it_lost(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_whose_clock_is_off_and_that_follows_is_named_by_no_command() {
    for (on_postgres, off) in [false, true].into_iter().flat_map(|is| CLOCKS[1..].iter().map(move |off| (is, *off))) {
        let Some(beside) = Beside::new(database(on_postgres).await, off, "").await else { continue };
        for command in COMMANDS {
            let ended = run(&beside.site.place, command, "60s");
            assert_eq!(ended.code, 0, "{command:?}, {off} s off: {ended:?}");
            // Followed is what the command waits for. A change that the instance itself made since, such as a read
            // of the tenant's folder, is announced with its next sign of life.
            eventually(async || {
                let (row, changes) = beside.registered();
                assert_eq!(row["state"], "runs", "{command:?}, {off} s off");
                row["followed"] == changes
            })
            .await;
        }
        let [api, spare, other] = &beside.tokens;
        assert_eq!(look_up(&beside.address, api, "acme", "K").await.0, 200);
        for ended in [spare, other] {
            assert_eq!(look_up(&beside.address, ended, "acme", "K").await.0, 401);
        }
    }
}

/// Past `max_detached`, beside every way to lose an instance and every clock.
async fn waits_out_whom_it_lost(on_postgres: bool) {
    let losses: &[Loss] = if on_postgres { &[Loss::CutOff, Loss::Stopped] } else { &[Loss::Stopped] };
    // On SQLite, where the clock of all is set back, commands wait for as much longer.
    let clocks = if on_postgres { &CLOCKS[..] } else { &CLOCKS[..2] };
    for (loss, off) in crossed(losses, clocks) {
        let bound = "max_detached = \"3s\"\n";
        let Some(beside) = Beside::new(database(on_postgres).await, off, bound).await else { continue };
        let ([api, spare, _], address) = (&beside.tokens, &beside.address);
        beside.lose(loss).await;
        for command in COMMANDS {
            let ended = run(&beside.site.place, command, "60s");
            assert_eq!(ended.code, 0, "{command:?}, {loss:?}, {off} s off: {ended:?}");
        }
        if loss == Loss::CutOff {
            for (tenant, token) in [("acme", api), ("acme", spare), ("globex", api)] {
                let (status, _, body) = look_up(address, token, tenant, "K").await;
                assert!(status == 503 && body.contains("database.max_detached"), "{off} s off: {status} {body}");
            }
        }
        beside.mend(loss);
        // The first answers after it woke.
        let (shredded, revoked) =
            tokio::join!(look_up(address, api, "globex", "K"), look_up(address, spare, "acme", "K"));
        assert!([401, 503].contains(&revoked.0), "{revoked:?}");
        // Its folder in Infisical is still there: what it has now is read anew, and not held.
        assert!(shredded.0 == 503 || !shredded.1.starts_with("memory"), "{shredded:?}");
        eventually(async || look_up(address, api, "acme", "K").await.0 == 200).await;
        assert_eq!(look_up(address, spare, "acme", "K").await.0, 401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn past_max_detached_a_stopped_instance_answers_nothing_and_every_command_that_waits_exits_0() {
    waits_out_whom_it_lost(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn past_max_detached_one_that_is_cut_off_or_stopped_answers_nothing_and_every_command_that_waits_exits_0() {
    waits_out_whom_it_lost(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_was_killed_is_named_until_it_is_forgotten_by_hand() {
    let (site, serving, ..) = site(None, "").await;
    // Dropped, it is killed.
    drop(serving);
    site.place.sql("UPDATE instances SET seen_at = seen_at - 16000").await;
    let revoke = ["token", "revoke", "spare", "--wait", "0s"];
    let told = site.place.run(&revoke).failed(1);
    assert!(told.contains("has not withdrawn: it may go on answering as before until 2"), "{told}");
    let listed = site.place.run(&["instances", "list"]).ok();
    assert!(listed.contains("silent"), "{listed}");
    let listed: Value = serde_json::from_str(&site.place.run(&["instances", "list", "--json"]).ok()).unwrap();
    let name = listed["instances"][0]["instance"].as_str().unwrap();
    assert!(told.contains(name));
    site.place.run(&["instances", "forget", name]).ok();
    site.place.run(&revoke).ok();
    let told = site.place.run(&["instances", "forget", name]).failed(1);
    assert!(told.contains("instances list"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_goes_on_without_an_instance_that_is_silent_and_ends_when_it_has_followed() {
    let (site, mut serving, ..) = site(None, "").await;
    serving.stop(&site.place);
    site.place.sql("UPDATE instances SET seen_at = seen_at - 16000").await;
    let ended = run(&site.place, &["keys", "rotate", "--json"], "1s");
    assert_eq!(ended.code, 1, "{ended:?}");
    let rotated: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert!(ended.stderr.contains("may go on answering as before until 2"), "{}", ended.stderr);
    assert_eq!((&rotated["rewrapped"], &rotated["unfollowed"][0]["live"]), (&json!(2), &json!(false)));
    assert!(site.place.run(&["keys", "status"]).stderr.contains("has not ended"));
    serving.go_on();
    let again = run(&site.place, &["keys", "rotate"], "60s");
    assert!(again.stderr.contains("going on with the rotation"), "{}", again.stderr);
    again.ok();
    let status: Value = serde_json::from_str(&site.place.run(&["keys", "status", "--json"]).ok()).unwrap();
    assert_eq!((status["keys"].as_array().unwrap().len(), &status["rotation"]), (2, &Value::Null), "one rotation");
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_max_detached_that_is_too_short_is_refused() {
    let (site, ..) = site(None, "").await;
    let config = std::fs::read_to_string(site.place.path().join("secretier.toml")).unwrap();
    for (bound, poll) in [("1s", "400ms"), ("3s", "1s")] {
        let lines = format!("max_detached = \"{bound}\"\npoll_interval = \"{poll}\"\n[keys]");
        site.place.write("secretier.toml", &config.replace("[keys]", &lines));
        let told = site.place.run(&["config", "check"]).failed(2);
        assert!(told.contains("max_detached"), "{told}");
    }
}

/// Rotates keys again and again beside a command, until that has ended; tells how often.
fn beside_rotations(site: &Site, more: &[&str], command: impl FnOnce() -> Ended + Send) -> (usize, Ended) {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let rotating = scope.spawn(|| {
            let mut rotations = 0;
            while !is_over.load(Ordering::Relaxed) {
                site.place.run(&[&["keys", "rotate"], more].concat()).ok();
                rotations += 1;
            }
            rotations
        });
        let ended = command();
        is_over.store(true, Ordering::Relaxed);
        (rotating.join().unwrap(), ended)
    })
}

async fn fails_no_tenant(url: Option<&str>) {
    const TENANTS: usize = 60;
    let site = Site::new(url, "hybrid", "").await;
    let name = |number: usize| format!("tenant-{number}");
    for number in 0..TENANTS {
        site.holds(&name(number), &[("A", "one"), ("B", "${A} and more")]);
    }
    for more in [&[][..], &["--data-keys"]] {
        let (rotations, ended) =
            beside_rotations(&site, more, || site.migrate(&["run", "--all", "--cutover", "--batch", "5", "--json"]));
        let outcome: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"));
        assert_eq!((ended.code, &outcome["failed"]), (0, &json!([])), "{rotations} rotations: {outcome}");

        let (mut serving, address) = site.place.serve();
        let token = token(&site.place, &format!("writer-{}", more.len()));
        for number in 0..TENANTS {
            let put = client().put(format!("{address}/v1/tenants/{}/secrets/A", name(number)));
            let put = put.bearer_auth(&token).json(&json!({ "value": format!("own {number}") }));
            assert!(put.send().await.unwrap().status().is_success());
        }
        assert_eq!(serving.terminate(), 0);
        let names: Vec<String> = (0..TENANTS).map(name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (rotations, ended) =
            beside_rotations(&site, more, || site.migrate(&[&["rollback"], names.as_slice(), &["--push"]].concat()));
        assert_eq!(ended.code, 0, "{rotations} rotations: {ended:?}");
        assert!(!ended.stderr.contains("--discard"), "{ended:?}");
        for number in 0..TENANTS {
            let value = site.infisical().value("prod", &format!("/tenants/{}", name(number)), "A");
            assert_eq!(value.unwrap(), format!("own {number}"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_tenant_fails_beside_rotations_to_migrate_or_to_be_given_back() {
    fails_no_tenant(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_tenant_fails_on_postgresql_beside_rotations_to_migrate_or_to_be_given_back() {
    fails_no_tenant(Some(&Postgres::shared().database().await)).await;
}
