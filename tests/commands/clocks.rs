//! `secretier serve` on a machine whose wall clock is set while it runs.

use std::time::SystemTime;

use secretier::clock::Timestamp;

use crate::{
    faketime::FakeClock,
    program::{Infisical, Place, client, look_up, master_key, secret_url},
    within::eventually,
};

/// A machine on which the program runs by a clock that can be set.
async fn machine(offset: &str) -> Option<(Place, FakeClock, Infisical)> {
    let infisical = Infisical::start().await;
    infisical.world().put("prod", "/tenants/acme", "A", "1");
    let mut place = Place::new(&format!(
        r#"
environment = "prod"
phase = "hybrid"
[server]
listen = "127.0.0.1:0"
[database]
url = "sqlite:secretier.db"
max_stale = "24h"
{}
[keys]
sources = ["file:master.key"]
"#,
        infisical.section(),
    ));
    place.write("master.key", &master_key());
    place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
    let clock = FakeClock::new(place.path().join("clock"), offset)?;
    for (name, value) in clock.variables() {
        place.set(name, value);
    }
    Some((place, clock, infisical))
}

fn token(place: &Place, name: &str, lifetime: &str) -> String {
    let create = ["token", "create", "--name", name, "--tenants", "*", "--actions", "read,write"];
    place.run(&[&create[..], &["--expires-in", lifetime]].concat()).ok().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wall_clock_that_is_set_ahead_while_the_program_runs_ends_what_it_ends_at_once() {
    let Some((place, clock, mut infisical)) = machine("+0").await else { return };
    let (mut serving, url) = place.serve();
    let (token, short) = (token(&place, "api", "90d"), token(&place, "short", "1d"));
    assert_eq!(look_up(&url, &token, "acme", "A").await.0, 200);
    assert_eq!(look_up(&url, &short, "acme", "A").await.0, 200);
    infisical.server.stop().await;

    clock.set("+3d");
    let (status, _, body) = look_up(&url, &token, "acme", "A").await;
    assert_eq!(status, 503, "nothing past max_stale: {body}");
    let (status, _, body) = look_up(&url, &short, "acme", "A").await;
    assert!(status == 401 && body.contains("token_expired"), "{body}");
    let line = serving.stderr_line("the wall clock was set ahead by 3days");
    assert!(line.contains("WARN"), "{line}");

    clock.set("+0");
    serving.stderr_line("the wall clock was set back by 3days");
    let (status, cache_status, body) = look_up(&url, &token, "acme", "A").await;
    assert_eq!(status, 200, "the secret is as old as it was: {body}");
    assert!(cache_status.contains("memory; hit"), "{cache_status}");
    assert_eq!(look_up(&url, &short, "acme", "A").await.0, 200);
    assert_eq!(serving.stderr().matches("the wall clock was set").count(), 2, "{}", serving.stderr());
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wall_clock_that_is_behind_at_the_start_and_set_right_is_right_at_once() {
    let Some((place, clock, _infisical)) = machine("-2h").await else { return };
    let (mut serving, url) = place.serve();
    // Made by a command on the same machine, it has ended already.
    let (token, ended) = (token(&place, "api", "90d"), token(&place, "short", "1h"));
    assert_eq!(look_up(&url, &ended, "acme", "A").await.0, 200);
    clock.set("+0");
    assert_eq!(look_up(&url, &ended, "acme", "A").await.0, 401);
    serving.stderr_line("the wall clock was set ahead by 2h");
    let put = client().put(secret_url(&url, "acme", "NEW")).bearer_auth(&token);
    let put = put.json(&serde_json::json!({ "value": "n" })).send().await.unwrap();
    assert_eq!(put.status(), 201);
    // Windows of the audit go on, and its records have the time that it is.
    eventually(async || {
        let found = place.run(&["audit", "search", "--key", "NEW", "--json"]).ok();
        let at = found.split("\"at\":\"").nth(1).and_then(|rest| rest.split('"').next()).map(str::to_owned);
        at.is_some_and(|at| {
            let at = Timestamp::from_rfc3339(&at).unwrap().as_millis();
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
            u128::try_from(at).unwrap().abs_diff(now) < 300_000
        })
    })
    .await;
    assert_eq!(serving.terminate(), 0);
}
