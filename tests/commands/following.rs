//! Commands that switch, shred, rotate or revoke, beside instances that have not followed.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::{
    migrate::Site,
    postgres::Postgres,
    program::{Ended, Place, Running, client, look_up},
};

const COMMANDS: [&[&str]; 6] = [
    &["token", "revoke", "spare"],
    &["token", "rotate", "other", "--grace", "0s"],
    &["migrate", "run", "--tenants", "acme", "--cutover"],
    &["migrate", "rollback", "acme"],
    &["tenant", "shred", "globex", "--yes"],
    &["keys", "rotate"],
];

/// A place with two tenants in phase `hybrid`, three tokens, and an instance that holds all of it
/// in memory.
async fn site(url: Option<&str>, bound: &str) -> (Site, Running, String, [String; 3]) {
    let site = Site::new(url, "hybrid", "").await;
    let config = std::fs::read_to_string(site.place.path().join("secretier.toml")).unwrap();
    site.place.write("secretier.toml", &config.replace("[keys]", &format!("{bound}[keys]")));
    site.holds("acme", &[("K", "of infisical")]);
    site.holds("globex", &[("K", "to be shredded")]);
    let tokens = ["api", "spare", "other"].map(|name| token(&site.place, name));
    let (serving, address) = site.place.serve();
    for tenant in ["acme", "globex"] {
        for token in &tokens {
            assert_eq!(look_up(&address, token, tenant, "K").await.0, 200);
        }
    }
    (site, serving, address, tokens)
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

#[tokio::test(flavor = "multi_thread")]
async fn past_max_detached_a_stopped_instance_answers_nothing_and_every_command_that_waits_exits_0() {
    for url in both(Postgres::shared().database().await) {
        let (site, serving, address, [api, spare, _]) = site(url.as_deref(), "max_detached = \"3s\"\n").await;
        serving.stop(&site.place);
        for command in COMMANDS {
            run(&site.place, command, "60s").ok();
        }
        serving.go_on();
        // The first answers after it woke.
        let (shredded, revoked) =
            tokio::join!(look_up(&address, &api, "globex", "K"), look_up(&address, &spare, "acme", "K"));
        assert!([401, 503].contains(&revoked.0), "{revoked:?}");
        // Its folder in Infisical is still there: what it has now is read anew, and not held.
        assert!(shredded.0 == 503 || !shredded.1.starts_with("memory"), "{shredded:?}");
    }
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
