//! `secretier keys`: rotated while the proxy serves and while it is killed, backed up,
//! restored, and started from without anything else.

use std::{
    fmt::Write as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
    time::Instant,
};

use futures_util::{StreamExt as _, stream};
use secretier::{
    access::audit,
    app::Base,
    clock::Clock,
    config::Loaded,
    secret::{SecretValue, Writer},
    tiers::database::{Held, Precondition},
};
use serde_json::Value;

use crate::{
    postgres::Postgres,
    program::{HANGS, Infisical, Place, Running, client, keeping_client, look_up, master_key},
    quick::times,
    within::eventually,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A place whose proxy owns its secrets in a database, with a file of master keys.
fn place(url: Option<&str>, more: &str) -> Place {
    let place = Place::new("");
    let folder = place.path().display().to_string();
    let url = url.map_or_else(|| format!("sqlite:{folder}/secretier.db"), str::to_owned);
    place.write("master.key", &format!("{}\n", master_key()));
    let keys =
        if more.contains("sources") { String::new() } else { format!("sources = [\"file:{folder}/master.key\"]\n") };
    place.write(
        "secretier.toml",
        &format!(
            "environment = \"prod\"\nphase = \"database\"\n[server]\nlisten = \"127.0.0.1:0\"\n\
             [memory]\nttl = \"1ms\"\n[database]\nurl = \"{url}\"\ntimeout = \"30s\"\n[keys]\n{keys}{more}"
        ),
    );
    place
}

fn token(place: &Place) -> String {
    let create = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read,write"];
    place.run(&create).ok().trim().to_owned()
}

/// Writes one secret for each of so many tenants.
async fn fill(url: &str, token: &str, tenants: usize) {
    let client = keeping_client();
    let put = |number: usize| {
        let request =
            client.put(format!("{url}/v1/tenants/tenant-{number}/secrets/KEY?create_tenant=true")).bearer_auth(token);
        async move {
            let sent = request.json(&serde_json::json!({ "value": format!("value-{number}") })).send().await.unwrap();
            assert_eq!(sent.status(), 201);
        }
    };
    stream::iter(0..tenants).map(put).buffer_unordered(8).for_each(|()| async {}).await;
}

/// The database and the keys, as a process that starts now finds them.
async fn base(place: &Place) -> Base {
    let config = Loaded::read(Some(&place.path().join("secretier.toml"))).unwrap().config;
    Box::pin(Base::open(&config, &Clock::system())).await.unwrap()
}

/// Whether each tenant's secret opens with the keys that are in their source now.
async fn all_open(place: &Place, tenants: usize) {
    some_open(place, 0..tenants).await;
}

async fn some_open(place: &Place, tenants: impl Iterator<Item = usize>) {
    let base = base(place).await;
    assert_eq!(base.database.missing_master_keys().await.unwrap(), []);
    for number in tenants {
        let tenant = format!("tenant-{number}").parse().unwrap();
        let found = base.database.find(&tenant, &"KEY".parse().unwrap()).await.unwrap();
        let Held::Present(stored) = found.copy else { panic!("{tenant}: {:?}", found.copy) };
        assert_eq!(stored.value.expose(), format!("value-{number}"));
    }
}

/// What each master key wraps, by its id: those that wrap nothing are left out.
async fn wrapped(place: &Place) -> Vec<(String, i64)> {
    let by = base(place).await.database.wrapped_by().await.unwrap();
    by.into_iter().map(|by| (by.id.to_string(), by.data_keys)).collect()
}

fn status(place: &Place) -> Value {
    let ended = place.run(&["keys", "status", "--json"]);
    serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"))
}

fn first_key(place: &Place) -> String {
    status(place)["keys"][0]["key"].as_str().unwrap().to_owned()
}

/// Reads every tenant's secret through a proxy again and again; gives what went wrong.
fn read_on(
    url: String,
    token: String,
    tenants: usize,
    stop: Arc<AtomicBool>,
) -> tokio::task::JoinHandle<(usize, Vec<String>)> {
    tokio::spawn(async move {
        let client = keeping_client();
        let (mut reads, mut wrong) = (0, Vec::new());
        while !stop.load(Ordering::Relaxed) {
            let number = rand::random_range(0..tenants);
            let request = client.get(format!("{url}/v1/tenants/tenant-{number}/secrets/KEY")).bearer_auth(&token);
            let answer = request.send().await.unwrap();
            let (status, text) = (answer.status(), answer.text().await.unwrap());
            if status != 200 || !text.contains(&format!("\"value-{number}\"")) {
                wrong.push(format!("{status} {text}"));
            }
            reads += 1;
            // Leaves the machine to what is tested.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        (reads, wrong)
    })
}

async fn survives_kills(url: Option<&str>, tenants: usize, kills: usize, arguments: &[&str]) {
    let place = place(url, "");
    let (_serving, url) = place.serve();
    let token = token(&place);
    fill(&url, &token, tenants).await;
    let original = first_key(&place);
    let stop = Arc::new(AtomicBool::new(false));
    let reader = read_on(url, token, tenants, Arc::clone(&stop));

    let rotate = [&["keys", "rotate", "--config", "secretier.toml"], arguments].concat();
    for kill in 0..kills {
        let rotating = place.start(&rotate);
        // Anywhere, from before it begins to after it has ended; or soon after it has done
        // something, which is when it says so.
        let said = ["", "waiting", "data keys re-wrapped", "have new data keys"][kill % 4];
        let wait = if said.is_empty() { 1_500_000 } else { 20_000 };
        if !said.is_empty() {
            rotating.until_said(said);
        }
        tokio::time::sleep(Duration::from_micros(rand::random_range(0..wait))).await;
        drop(rotating);
        // Those before and behind the place where it was killed, wherever that was.
        some_open(&place, (kill % 10..tenants).step_by(10)).await;
    }
    place.run(&[&["keys", "rotate"], arguments].concat()).ok();
    stop.store(true, Ordering::Relaxed);
    let (reads, wrong) = reader.await.unwrap();
    assert!(reads > 0 && wrong.is_empty(), "{} of {reads} reads failed: {wrong:?}", wrong.len());
    all_open(&place, tenants).await;
    assert_eq!(wrapped(&place).await, [(first_key(&place), i64::try_from(tenants).unwrap())]);
    assert_ne!(first_key(&place), original);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_that_is_killed_anywhere_goes_on_and_loses_nothing_on_sqlite() {
    survives_kills(None, 1000, times(30, 4), &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_that_is_killed_anywhere_goes_on_and_loses_nothing_on_postgresql() {
    survives_kills(Some(&Postgres::shared().database().await), 1000, times(12, 4), &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_of_data_keys_that_is_killed_anywhere_goes_on_and_loses_nothing() {
    for url in [None, Some(Postgres::shared().database().await)] {
        survives_kills(url.as_deref(), 200, times(8, 2), &["--data-keys"]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_rotations_at_once_one_does_the_work_and_the_other_says_so() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let place = place(url.as_deref(), "");
        let base = base(&place).await;
        // An instance that has not read the new key: the first rotation waits for it.
        base.database.announce("a-test", "host/7", 0, DAY).await.unwrap();
        let mut first = place.start(&["keys", "rotate", "--config", "secretier.toml"]);
        first.stderr_line("waiting");
        let told = place.run(&["keys", "rotate"]).failed(1);
        assert!(told.contains("another process is rotating keys"), "{told}");
        base.database.withdraw("a-test").await.unwrap();
        assert_eq!(first.wait(), 0);
        assert_eq!(status(&place)["keys"].as_array().unwrap().len(), 2, "one key was introduced, not two");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_by_another_name_of_the_database_is_the_second_one() {
    let place = place(None, "");
    base(&place).await.database.announce("a-test", "host/7", 0, DAY).await.unwrap();
    std::os::unix::fs::symlink(place.path().join("secretier.db"), place.path().join("link.db")).unwrap();
    let config = std::fs::read_to_string(place.path().join("secretier.toml")).unwrap();
    place.write("link.toml", &config.replace("secretier.db", "link.db"));
    let mut first = place.start(&["keys", "rotate", "--config", "secretier.toml"]);
    first.stderr_line("waiting");
    let told = place.run_with(&["keys", "rotate", "--config", "link.toml"], "").failed(1);
    assert!(told.contains("another process is rotating keys"), "{told}");
}

/// A rotation that waits for an instance which has not read the new key, and will not.
async fn rotating(place: &Place, base: &Base) -> Running {
    base.database.announce("a-test", "host/7", 0, DAY).await.unwrap();
    let mut rotating = place.start(&["keys", "rotate", "--patience", "1h", "--config", "secretier.toml"]);
    rotating.stderr_line("waiting");
    rotating
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_that_was_killed_is_gone_on_with_at_once_whatever_its_lease_says() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let place = place(url.as_deref(), "");
        let base = base(&place).await;
        drop(rotating(&place, &base).await);
        base.database.withdraw("a-test").await.unwrap();
        place.sql("UPDATE leases SET until = 4000000000000").await;
        let ended = place.run(&["keys", "rotate"]);
        assert!(ended.stderr.contains("going on with the rotation"), "{}", ended.stderr);
        ended.ok();
        assert_eq!(status(&place)["keys"].as_array().unwrap().len(), 2, "one key was introduced, not two");
    }
}

/// Stops a rotation until another process has taken over, and lets it go on.
async fn hangs_and_goes_on(url: Option<&str>) {
    let place = place(url, "");
    let base = base(&place).await;
    let mut first = rotating(&place, &base).await;
    first.stop(&place);
    base.database.withdraw("a-test").await.unwrap();
    let began = Instant::now();
    loop {
        let ended = place.run(&["keys", "rotate"]);
        if ended.code == 0 {
            break;
        }
        assert!(began.elapsed() < HANGS, "it is never taken over");
        let told = ended.failed(1);
        assert!(told.contains(&format!("/{}, which has until", first.id())), "{told}");
    }
    let rows = async || {
        let keys = std::fs::read_to_string(place.path().join("master.key")).unwrap();
        let changes = base.database.changes().await.unwrap();
        (keys, changes, wrapped(&place).await, base.database.rotation().await.unwrap())
    };
    let before = rows().await;
    assert_eq!(before.0.lines().count(), 2, "one key was introduced, not two");
    first.go_on();
    assert_eq!(first.wait(), 1, "{}", first.stderr());
    assert!(first.stderr().contains("another process has taken over this rotation"), "{}", first.stderr());
    assert_eq!(rows().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_that_hangs_is_taken_over_and_when_it_goes_on_writes_nothing_and_says_so() {
    hangs_and_goes_on(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_on_postgresql_that_hangs_is_taken_over_and_when_it_goes_on_writes_nothing() {
    hangs_and_goes_on(Some(&Postgres::shared().database().await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_rewrapped_while_an_instance_lacks_the_new_key() {
    let place = place(None, "");
    let (_serving, url) = place.serve();
    fill(&url, &token(&place), 3).await;
    let before = wrapped(&place).await;
    // As one on another machine, with a file of its own.
    base(&place).await.database.announce("elsewhere", "other-host/7", i64::MAX, DAY).await.unwrap();
    let told = place.run(&["keys", "rotate", "--patience", "2s"]).failed(1);
    assert!(told.contains("other-host/7") && told.contains("run this again"), "{told}");
    assert_eq!(wrapped(&place).await, before);
    assert!(place.run(&["keys", "status"]).stderr.contains("has not ended"));

    base(&place).await.database.withdraw("elsewhere").await.unwrap();
    let ended = place.run(&["keys", "rotate"]);
    assert!(ended.stderr.contains("going on with the rotation"), "{}", ended.stderr);
    ended.ok();
    assert_eq!(wrapped(&place).await, [(first_key(&place), 3)]);
    all_open(&place, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_instance_wraps_with_the_new_key_without_a_restart() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let place = place(url.as_deref(), "");
        let (_serving, url) = place.serve();
        let token = token(&place);
        fill(&url, &token, 2).await;
        place.run(&["keys", "rotate"]).ok();
        fill_one(&url, &token, "newcomer").await;
        assert_eq!(wrapped(&place).await, [(first_key(&place), 3)]);
    }
}

async fn fill_one(url: &str, token: &str, tenant: &str) {
    let put = client().put(format!("{url}/v1/tenants/{tenant}/secrets/KEY?create_tenant=true")).bearer_auth(token);
    assert_eq!(put.json(&serde_json::json!({ "value": "v" })).send().await.unwrap().status(), 201);
}

/// A rotation that gives up waiting for an instance which has not read the new key.
async fn rotation_that_waits(place: &Place) {
    base(place).await.database.announce("elsewhere", "other-host/7", i64::MAX, DAY).await.unwrap();
    place.run(&["keys", "rotate", "--patience", "2s"]).failed(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_new_opens_for_an_instance_that_lacks_the_new_key() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let place = place(url.as_deref(), "");
        let (_serving, url) = place.serve();
        let token = token(&place);
        fill(&url, &token, 2).await;
        let before = first_key(&place);
        rotation_that_waits(&place).await;
        assert_ne!(first_key(&place), before, "it stands in front already");
        fill_one(&url, &token, "newcomer").await;
        assert_eq!(wrapped(&place).await, [(before, 3)]);
        base(&place).await.database.withdraw("elsewhere").await.unwrap();
        place.run(&["keys", "rotate"]).ok();
        fill_one(&url, &token, "latecomer").await;
        assert_eq!(wrapped(&place).await, [(first_key(&place), 4)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_was_away_during_a_rotation_makes_nothing_with_the_old_key() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let place = place(url.as_deref(), "");
        let (mut serving, url) = place.serve();
        fill(&url, &token(&place), 2).await;
        assert_eq!(serving.terminate(), 0);
        let away = base(&place).await;
        place.run(&["keys", "rotate"]).ok();
        for tenant in ["tenant-0", "newcomer"] {
            let (tenant, key) = (tenant.parse().unwrap(), "KEY".parse().unwrap());
            let (value, writer) = (SecretValue::new("v".to_owned()), Writer::new("test"));
            away.database.put(&tenant, &key, &value, &Precondition::None, &writer, None).await.unwrap();
        }
        assert_eq!(wrapped(&place).await, [(first_key(&place), 3)], "one data key a tenant, and none on the old key");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_is_gone_on_with_where_its_key_is() {
    let place = place(None, "");
    let (_serving, url) = place.serve();
    fill(&url, &token(&place), 2).await;
    // As another machine has it, with a file of its own.
    place.write("other.key", &lines(&place)[0]);
    let config = std::fs::read_to_string(place.path().join("secretier.toml")).unwrap();
    place.write("other.toml", &config.replace("master.key", "other.key"));
    rotation_that_waits(&place).await;
    let (base, key) = (base(&place).await, first_key(&place).parse().unwrap());
    let began = Instant::now();
    while !base.database.live_instances().await.unwrap().iter().any(|instance| instance.master_keys.contains(&key)) {
        assert!(began.elapsed() < HANGS, "the running instance reads the key by itself");
    }
    let told = place.run_with(&["keys", "rotate", "--patience", "2s", "--config", "other.toml"], "").failed(1);
    assert!(told.contains(&first_key(&place)) && told.contains("run this again"), "{told}");
    assert_eq!(std::fs::read_to_string(place.path().join("other.key")).unwrap().lines().count(), 1, "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_key_that_never_opens_keeps_no_new_master_key_away() {
    let place = place(None, "");
    let (mut serving, url) = place.serve();
    fill(&url, &token(&place), 2).await;
    assert_eq!(serving.terminate(), 0);
    let old = first_key(&place);
    place.run(&["keys", "rotate"]).ok();
    let garble = format!(
        "UPDATE company_data_keys SET master_key_id = '{old}', wrapped_key = 'w1.{old}.AAAA' \
         WHERE id = (SELECT min(id) FROM company_data_keys)"
    );
    place.sql(&garble).await;
    let second = first_key(&place);
    let ended = place.run(&["keys", "rotate"]);
    assert!(ended.code == 1 && ended.stderr.contains("stays as it was"), "{ended:?}");
    assert_ne!(first_key(&place), second, "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn data_keys_that_were_made_while_a_rotation_waited_are_renewed_too() {
    let place = place(None, "");
    let (_serving, url) = place.serve();
    let token = token(&place);
    fill(&url, &token, 2).await;
    rotation_that_waits(&place).await;
    fill_one(&url, &token, "newcomer").await;
    base(&place).await.database.withdraw("elsewhere").await.unwrap();
    let told = place.run(&["keys", "rotate", "--data-keys"]).ok();
    assert!(told.contains("3 tenants have new data keys"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn data_keys_are_renewed_and_those_of_before_are_destroyed() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let place = place(url.as_deref(), "");
        let (_serving, url) = place.serve();
        let token = token(&place);
        fill(&url, &token, 5).await;
        let ended = place.run(&["keys", "rotate", "--data-keys"]);
        let told = ended.ok();
        assert!(told.contains("5 tenants have new data keys; 5 values"), "{told}");
        assert_eq!(wrapped(&place).await, [(first_key(&place), 5)], "one data key a tenant");
        all_open(&place, 5).await;
        assert_eq!(look_up(&url, &token, "tenant-3", "KEY").await.0, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_ids_ages_and_what_each_key_wraps_and_never_a_key() {
    let place = place(None, "");
    let (mut serving, url) = place.serve();
    fill(&url, &token(&place), 2).await;
    assert_eq!(serving.terminate(), 0);
    let key = first_key(&place);
    let ended = place.run(&["keys", "status"]);
    assert_eq!(ended.stderr, "");
    let told = ended.ok();
    assert!(told.contains(&key) && told.contains("wraps") && told.contains("master.key"), "{told}");
    let [secret]: [String; 1] = lines(&place).try_into().unwrap_or_else(|lines| panic!("{lines:?}"));
    assert!(!told.contains(&secret[..8]));

    age(&place, 91).await;
    let ended = place.run(&["keys", "status"]);
    assert!(ended.stderr.contains("older than 90 days"), "{}", ended.stderr);
    assert_eq!(status(&place)["keys"][0]["age_days"], 91);
    assert_eq!(ended.code, 0);

    // Someone has written another key over it.
    let fresh = master_key();
    place.write("master.key", &fresh);
    let ended = place.run(&["keys", "status"]);
    assert_eq!(ended.code, 1);
    for part in [&key, "2 tenants", "last seen in file:"] {
        assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
    }
    // Put back behind it, it is found, and a rotation introduces nothing more.
    place.write("master.key", &format!("{fresh}\n{secret}\n"));
    let ended = place.run(&["keys", "rotate"]);
    assert!(ended.stderr.contains("no other is introduced"), "{}", ended.stderr);
    ended.ok();
    assert_eq!(wrapped(&place).await, [(first_key(&place), 2)]);
    all_open(&place, 2).await;
}

fn lines(place: &Place) -> Vec<String> {
    let text = std::fs::read_to_string(place.path().join("master.key")).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// Lets the keys be so many days old.
async fn age(place: &Place, days: i64) {
    let ago = days * 24 * 60 * 60 * 1000;
    place.sql(&format!("UPDATE master_keys SET first_seen_at = first_seen_at - {ago}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_was_changed_in_infisical_costs_nothing_while_someone_has_the_old_one() {
    let infisical = Infisical::start().await;
    let old = master_key();
    infisical.world().put("prod", "/hono-api", "KEY", &old);
    let mut place = place(
        None,
        &format!("sources = [\"infisical:/hono-api/KEY\"]\nreload_every = \"200ms\"\n{}", infisical.section()),
    );
    place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
    let (mut serving, url) = place.serve();
    let token = token(&place);
    fill(&url, &token, 3).await;
    let id = first_key(&place);

    let new = master_key();
    infisical.world().put("prod", "/hono-api", "KEY", &new);
    let told = serving.stderr_line("a master key is gone from its source");
    assert!(told.contains(&id), "{told}");
    // It goes on: reads, and new tenants, with the key it holds.
    assert_eq!(look_up(&url, &token, "tenant-1", "KEY").await.0, 200);
    fill_one(&url, &token, "newcomer").await;

    let (mut starting, second) = place.serve();
    let told = starting.stderr_line("a master key is missing");
    for part in [&*id, "tenants=4", "infisical:/hono-api/KEY"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert_eq!(look_up(&second, &token, "tenant-1", "KEY").await.0, 503);
    assert_eq!(look_up(&url, &token, "tenant-1", "KEY").await.0, 200);

    // Put back where the keys of before belong, it is found by whoever misses it.
    infisical.world().put("prod", "/hono-api", "KEY_PREVIOUS", &old);
    eventually(async || look_up(&second, &token, "tenant-1", "KEY").await.0 == 200).await;
    let ended = place.run(&["keys", "rotate"]);
    assert!(ended.stderr.contains("no other is introduced"), "{}", ended.stderr);
    ended.ok();
    for serving in [&serving, &starting] {
        let told = serving.stderr();
        assert!(!told.contains(&old[..16]) && !told.contains(&new[..16]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_infisical_is_rotated_there_and_the_one_of_before_is_kept() {
    let infisical = Infisical::start().await;
    let old = master_key();
    infisical.world().put("prod", "/hono-api", "KEY", &old);
    let mut place = place(None, &format!("sources = [\"infisical:/hono-api/KEY\"]\n{}", infisical.section()));
    place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
    let (_serving, url) = place.serve();
    let token = token(&place);
    fill(&url, &token, 3).await;
    let value = |name: &str| infisical.world().value("prod", "/hono-api", name).unwrap_or_default();
    place.run(&["keys", "rotate"]).ok();
    let second = value("KEY");
    assert!(second != old && value("KEY_PREVIOUS") == old);
    place.run(&["keys", "rotate"]).ok();
    assert_eq!(value("KEY_PREVIOUS"), format!("{second}\n{old}"));
    assert_eq!(wrapped_in(&place), [(first_key(&place), 3)]);
    assert_eq!(look_up(&url, &token, "tenant-2", "KEY").await.0, 200);
}

fn wrapped_in(place: &Place) -> Vec<(String, i64)> {
    let keys = status(place)["keys"].as_array().unwrap().clone();
    let wraps = keys.iter().map(|key| (key["key"].as_str().unwrap().to_owned(), key["data_keys"].as_i64().unwrap()));
    wraps.filter(|(_, wraps)| *wraps > 0).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_cannot_be_written_is_rotated_by_hand() {
    let mut place = place(None, "sources = [\"env:NEW_KEY\", \"env:OLD_KEY\"]\n");
    place.set("OLD_KEY", &master_key());
    let (mut serving, url) = place.serve();
    let token = token(&place);
    fill(&url, &token, 2).await;
    let told = place.run(&["keys", "rotate"]).failed(2);
    assert!(told.contains("env:OLD_KEY cannot be written") && told.contains("run this again"), "{told}");
    assert_eq!(serving.terminate(), 0);
    place.set("NEW_KEY", &master_key());
    let (_serving, url) = place.serve();
    place.run(&["keys", "rotate"]).ok();
    assert_eq!(wrapped_in(&place), [(first_key(&place), 2)]);
    assert_eq!(look_up(&url, &token, "tenant-0", "KEY").await.0, 200);
}

/// A place whose only key is in Infisical, with a backup beside it.
async fn with_backup(infisical: &Infisical) -> (Place, String) {
    infisical.world().put("prod", "/hono-api", "KEY", &master_key());
    let more = format!(
        "sources = [\"infisical:/hono-api/KEY\"]\nbackup_file = \"keys.backup\"\n\
         backup_passphrase = {{ file = \"passphrase\" }}\n{}timeout = \"1s\"\n",
        infisical.section()
    );
    let mut place = place(None, &more);
    place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
    place.write("passphrase", "correct horse battery staple\n");
    let (mut serving, url) = place.serve();
    let token = token(&place);
    fill(&url, &token, 3).await;
    assert_eq!(serving.terminate(), 0);
    (place, token)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_starts_from_the_backup_alone_while_infisical_is_down() {
    let infisical = Infisical::start().await;
    let (place, token) = with_backup(&infisical).await;
    assert!(place.run(&["keys", "status"]).stderr.contains("'secretier keys backup' makes it"));
    place.run(&["keys", "backup"]).ok();
    let ended = place.run(&["keys", "status"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    // A rotated key is in the backup before anything is wrapped with it.
    place.run(&["keys", "rotate"]).ok();
    let wraps = first_key(&place);
    drop(infisical);

    let (mut serving, url) = place.serve();
    let (status, _, body) = look_up(&url, &token, "tenant-1", "KEY").await;
    assert_eq!(status, 200, "{body}");
    fill_one(&url, &token, "newcomer").await;
    let told = serving.stderr();
    assert!(told.contains("master keys read from the backup") && told.contains(&wraps), "{told}");
    assert_eq!(serving.terminate(), 0);

    place.write("passphrase", "incorrect horse battery staple\n");
    let told = place.run(&["serve"]).failed(2);
    assert!(told.contains("keys.backup") && told.contains("the passphrase is wrong"), "{told}");
    assert!(!told.contains("horse"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_gives_the_keys_back_to_a_source_that_lost_them() {
    let place = place(None, "");
    place.write("passphrase", "correct horse battery staple");
    let (mut serving, url) = place.serve();
    fill(&url, &token(&place), 2).await;
    place.run(&["keys", "rotate"]).ok();
    assert_eq!(serving.terminate(), 0);
    let held = lines(&place);
    let backup = ["keys", "backup", "--output", "keys.backup", "--passphrase-file", "passphrase"];
    assert_eq!(place.run(&backup).ok().lines().count(), 2);
    let text = std::fs::read_to_string(place.path().join("keys.backup")).unwrap();
    assert!(held.iter().all(|key| !text.contains(&key[..8])), "{text}");

    let piped = |passphrase: &str| {
        let backup = ["keys", "backup", "--output", "piped.backup", "--config", "secretier.toml"];
        place.run_with(&backup, passphrase)
    };
    assert!(piped("").failed(2).contains("no passphrase"));
    assert!(piped("short\n").failed(2).contains("fewer than 12"));
    piped("correct horse battery staple\n").ok();

    std::fs::remove_file(place.path().join("master.key")).unwrap();
    place.write("wrong", "another passphrase altogether");
    let restore = |passphrase: &str| place.run(&["keys", "restore", "keys.backup", "--passphrase-file", passphrase]);
    assert!(restore("wrong").failed(2).contains("the passphrase is wrong"));
    assert!(!place.path().join("master.key").exists());
    restore("passphrase").ok();
    assert_eq!(lines(&place), held);
    let again = place.run(&["keys", "restore", "piped.backup", "--passphrase-file", "passphrase"]);
    assert!(again.stderr.contains("0 keys were added"), "{}", again.stderr);
    all_open(&place, 2).await;
    let ended = restore("passphrase");
    assert!(ended.stderr.contains("0 keys were added"), "{}", ended.stderr);

    // A backup that holds what nobody else has is not written over.
    place.write("master.key", &master_key());
    let told = place.run(&backup).failed(2);
    assert!(told.contains("which no source gives"), "{told}");
    // Nor is the backup of one environment given to another.
    let config = std::fs::read_to_string(place.path().join("secretier.toml")).unwrap();
    place.write("secretier.toml", &config.replace("\"prod\"", "\"dev\""));
    assert!(restore("passphrase").failed(2).contains("\"prod\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_passphrase_opens_the_same_database_again() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let more = "sources = [\"passphrase\"]\npassphrase = { file = \"passphrase\" }\n";
        let place = place(url.as_deref(), more);
        place.write("passphrase", "correct horse battery staple\n");
        let (serving, url) = place.serve();
        let token = token(&place);
        fill(&url, &token, 2).await;
        drop(serving);
        let (serving, url) = place.serve();
        assert_eq!(look_up(&url, &token, "tenant-1", "KEY").await.0, 200);
        drop(serving);
        place.write("passphrase", "another passphrase altogether");
        let told = place.run(&["serve"]).failed(2);
        assert!(told.contains("2 tenants") && told.contains("not the one") && !told.contains("altogether"), "{told}");
        place.write("passphrase", "short");
        assert!(place.run(&["serve"]).failed(2).contains("fewer than 12 characters"));
    }
}

#[test]
fn settings_that_belong_together_are_asked_for_together() {
    let mut wrong = String::new();
    for more in [
        "sources = [\"passphrase\"]\n",
        "passphrase = \"correct horse battery\"\n",
        "backup_file = \"keys.backup\"\n",
        "backup_passphrase = \"correct horse battery\"\n",
    ] {
        let told = place(None, more).run(&["config", "check"]).failed(2);
        assert!(told.contains("keys.") && !told.contains("horse"), "{told}");
        writeln!(wrong, "{told}").unwrap();
    }
    assert!(wrong.contains("keys.passphrase") && wrong.contains("keys.backup_passphrase"), "{wrong}");
}

/// Nothing is left of the files that were written on the way.
fn is_offline(folder: &Path) -> bool {
    std::fs::read_dir(folder).unwrap().all(|entry| !entry.unwrap().file_name().to_string_lossy().ends_with(".new"))
}

#[test]
fn a_rotation_leaves_no_other_file_with_a_key() {
    let place = place(None, "");
    place.run(&["keys", "rotate"]).ok();
    assert_eq!(lines(&place).len(), 2);
    assert!(is_offline(place.path()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_that_began_before_a_rotation_raises_no_alarm_for_what_that_did() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let place = place(url.as_deref(), "");
        let (mut serving, url) = place.serve();
        fill(&url, &token(&place), 3).await;
        place.run(&["keys", "seal"]).ok();
        // Has read the master keys, and nothing else yet.
        let base = base(&place).await;
        let held: Vec<_> = base.database.keys().ring().ids().collect();
        place.run(&["keys", "rotate"]).ok();
        assert_eq!(serving.terminate(), 0);
        let first: secretier::sealing::MasterKeyId = first_key(&place).parse().unwrap();
        assert!(!held.contains(&first), "everything is sealed by a key that was not read");
        let (walked, rows) = audit::verify_everything(&base.database, &[]).await.unwrap();
        let findings: Vec<_> = walked.iter().flat_map(|chain| &chain.findings).collect();
        assert!(findings.is_empty() && rows.findings.is_empty(), "{findings:?} {rows:?}");
        assert_eq!(rows.tenants, 3);
    }
}

/// The master key that the audit's chain of commands is signed with.
async fn signs_commands(base: &Base) -> String {
    let chains = base.database.audit_chains().await.unwrap();
    let admin = chains.into_iter().find(|chain| chain.chain == "admin").unwrap();
    admin.vouched.and_then(|mark| mark.signature).unwrap().key
}

#[tokio::test(flavor = "multi_thread")]
async fn how_a_command_ended_is_signed_though_an_instance_signs_with_a_key_that_came_while_it_ran() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let place = place(url.as_deref(), "");
        let (mut serving, url) = place.serve();
        fill(&url, &token(&place), 1).await;
        place.run(&["keys", "seal"]).ok();
        // Holds the keys of now, as any command does from when it began.
        let base = base(&place).await;
        let config = audit::Config::default();
        let command = audit::Administration::begin(&config, &base.database, "migrate.run", None, Default::default());
        let command = command.await.unwrap();
        place.run(&["keys", "rotate"]).ok();
        let first = first_key(&place);
        eventually(async || signs_commands(&base).await == first).await;
        assert_eq!(serving.terminate(), 0);
        command.end(true).await.unwrap();
        let (walked, rows) = audit::verify_everything(&base.database, &[]).await.unwrap();
        let findings: Vec<_> = walked.iter().flat_map(|chain| &chain.findings).collect();
        assert!(findings.is_empty() && rows.findings.is_empty(), "{findings:?} {rows:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sealed_with_a_key_that_no_source_has_is_still_found() {
    let place = place(None, "");
    let (mut serving, url) = place.serve();
    fill(&url, &token(&place), 1).await;
    assert_eq!(serving.terminate(), 0);
    place.write("master.key", &format!("{}\n", master_key()));
    let base = base(&place).await;
    let (walked, rows) = audit::verify_everything(&base.database, &[]).await.unwrap();
    assert!(walked.iter().any(|chain| !chain.findings.is_empty()), "{walked:?}");
    assert!(!rows.findings.is_empty(), "{rows:?}");
}
