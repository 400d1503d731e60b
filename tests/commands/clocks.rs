//! `secretier serve` on a machine whose wall clock is set while it runs.

use std::time::{Instant, SystemTime};

use futures_util::future::join_all;
use secretier::clock::Timestamp;
use serde_json::{Value, json};

use crate::{
    faketime::FakeClock,
    program::{Infisical, Place, client, look_up, master_key, secret_url},
    within::eventually,
};

/// A machine on which the program runs by a clock that can be set.
async fn machine(offset: &str, more: &str) -> Option<(Place, FakeClock, Infisical)> {
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
{}{more}
[keys]
sources = ["file:master.key"]
[[rules]]
tenants = "own"
phase = "database"
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
    let Some((place, clock, mut infisical)) = machine("+0", "").await else { return };
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
async fn no_step_of_the_wall_clock_loses_a_write_or_gives_budget_back_and_all_times_are_right() {
    const DAYS: i64 = 3 * 24 * 60 * 60;
    let Some((place, clock, infisical)) = machine("+0", "requests_per_minute = 12\n").await else { return };
    let (mut serving, url) = place.serve();
    let (api, short) = (token(&place, "api", "90d"), token(&place, "short", "30m"));
    assert_eq!(look_up(&url, &api, "acme", "A").await.0, 200);
    // A call each.
    let tenants: Vec<String> = (0..15).map(|number| format!("tenant-{number}")).collect();
    tenants.iter().for_each(|tenant| infisical.world().put("prod", &format!("/tenants/{tenant}"), "A", "1"));
    infisical.world().mark();
    let began = Instant::now();
    for (number, off) in [1, 0, -1, 0, 3600, 0, -3600, 0, DAYS, 0, -DAYS, 0].into_iter().enumerate() {
        let value = format!("value-{number}");
        let put = client().put(format!("{}?create_tenant=true", secret_url(&url, "own", "K")));
        let put = put.bearer_auth(&api).json(&json!({ "value": value })).send();
        // While it is under way.
        let (put, ()) = tokio::join!(put, async { clock.set(&format!("{off:+}")) });
        assert!(put.unwrap().status().is_success(), "{off}");
        let (status, _, body) = look_up(&url, &api, "own", "K").await;
        assert!(status == 200 && body.contains(&format!("\"{value}\"")), "{off}: {body}");
        let expected = if off >= 1800 { 401 } else { 200 };
        assert_eq!(look_up(&url, &short, "own", "K").await.0, expected, "{off}");

        let put = client().put(secret_url(&url, "own", "TIMED")).bearer_auth(&api);
        assert!(put.json(&json!({ "value": value })).send().await.unwrap().status().is_success());
        let listed = client().get(format!("{url}/v1/tenants/own/secrets")).bearer_auth(&api).send().await.unwrap();
        let listed: Value = listed.json().await.unwrap();
        let timed = listed["keys"].as_array().unwrap().iter().find(|secret| secret["key"] == "TIMED").unwrap();
        let at = Timestamp::from_rfc3339(timed["updated_at"].as_str().unwrap()).unwrap().as_millis();
        assert!((at - off * 1000 - wall_millis()).abs() < 300_000, "{off}: {timed}");

        // As much of the budget as there is.
        let fresh =
            || client().get(secret_url(&url, "acme", "A")).bearer_auth(&api).header("cache-control", "no-cache");
        for answer in join_all((0..15).map(|_| fresh().send())).await {
            let status = answer.unwrap().status().as_u16();
            assert!([200, 503].contains(&status), "{off}: {status}");
        }
    }
    let (calls, most) = (infisical.world().calls_since_mark().total(), 12 + began.elapsed().as_secs() / 5 + 1);
    assert!(calls > 0 && calls <= most, "{calls} calls, and {most} at most");
    assert_eq!(serving.terminate(), 0);
}

fn wall_millis() -> i64 {
    i64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wall_clock_that_is_behind_at_the_start_and_set_right_is_right_at_once() {
    let Some((place, clock, _infisical)) = machine("-2h", "").await else { return };
    let (mut serving, url) = place.serve();
    // Made by a command on the same machine, it has ended already.
    let (token, ended) = (token(&place, "api", "90d"), token(&place, "short", "1h"));
    assert_eq!(look_up(&url, &ended, "acme", "A").await.0, 200);
    clock.set("+0");
    assert_eq!(look_up(&url, &ended, "acme", "A").await.0, 401);
    serving.stderr_line("the wall clock was set ahead by 2h");
    let put = client().put(secret_url(&url, "acme", "NEW")).bearer_auth(&token);
    let put = put.json(&json!({ "value": "n" })).send().await.unwrap();
    assert_eq!(put.status(), 201);
    // Windows of the audit go on, and its records have the time that it is.
    eventually(async || {
        let found = place.run(&["audit", "search", "--key", "NEW", "--json"]).ok();
        let at = found.split("\"at\":\"").nth(1).and_then(|rest| rest.split('"').next()).map(str::to_owned);
        at.is_some_and(|at| {
            let at = Timestamp::from_rfc3339(&at).unwrap().as_millis();
            at.abs_diff(wall_millis()) < 300_000
        })
    })
    .await;
    assert_eq!(serving.terminate(), 0);
}
