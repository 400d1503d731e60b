//! `database.max_detached`: how long an instance answers after it has lost the database.

use std::time::Duration;

use reqwest::Method;
use secretier::{access::Action, phase::Phase, tiers::database::Instance as Registered};
use serde_json::json;

use crate::{
    app::{Answer, Backend, Instance, Setup, TestApp, eventually, on_both},
    postgres::Postgres,
    relay::Relay,
};

const BOUND: &str = "max_detached = \"10s\"\n";
const SECOND: Duration = Duration::from_secs(1);

/// An instance on PostgreSQL, and one beside it that can be cut off from there.
async fn two(bound: &str) -> (TestApp, Relay, Instance) {
    let mut setup = Setup::new(Backend::postgres().await, Phase::Database);
    setup.database = bound.to_owned();
    let app = setup.start().await;
    let relay = Relay::to(Postgres::shared().port()).await;
    let beside = app.another_through(&relay).await;
    (app, relay, beside)
}

async fn ready(instance: &Instance) -> Answer {
    Answer::of(instance.request(Method::GET, "/readyz")).await
}

async fn reads(app: &TestApp, instance: &Instance, value: &str) -> bool {
    let answer = app.get_from(instance, "acme", "K").await;
    answer.status == 200 && answer.value() == value
}

/// That this instance answers nothing, and says why.
async fn is_detached(app: &TestApp, instance: &Instance) {
    let answer = app.get_from(instance, "acme", "K").await;
    assert_eq!(answer.problem(), (503, "unavailable".to_owned()));
    assert!(!answer.header("retry-after").is_empty());
    assert!(answer.text.contains("database.max_detached"), "{}", answer.text);
    let ready = ready(instance).await;
    assert_eq!((ready.status, &ready.json()["status"]), (503, &json!("unavailable")));
    assert!(ready.json()["detached_since"].is_string(), "{}", ready.text);
    assert_eq!(metrics(app, instance).await.status, 503, "an alert must not wait for its metrics");
}

async fn metrics(app: &TestApp, instance: &Instance) -> Answer {
    Answer::of(instance.request(Method::GET, "/metrics").bearer_auth(&app.token)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_cut_off_answers_within_its_bound_and_nothing_past_it() {
    let (app, relay, beside) = two(BOUND).await;
    for lost in [5, 15, 60] {
        let old = format!("before {lost}");
        assert!(app.put("acme", "K", &old).await.status < 300);
        // Once it has followed the change, memory loses by it no more what it reads.
        app.followed().await;
        eventually(async || reads(&app, &beside, &old).await).await;
        relay.cut().await;
        assert!(app.put("acme", "K", "new").await.status < 300);
        beside.clock.advance(SECOND * lost);
        match lost {
            5 => {
                assert_eq!(app.get_from(&beside, "acme", "K").await.value(), old, "available within the bound");
                assert_eq!(ready(&beside).await.json()["detached_since"], json!(null));
                let page = metrics(&app, &beside).await.text;
                let age = page.lines().find_map(|line| line.strip_prefix("secretier_database_news_age_seconds "));
                let age: f64 = age.unwrap().parse().unwrap();
                assert!(age >= 5.0, "an alert sees it coming: {age}");
            }
            _ => is_detached(&app, &beside).await,
        }
        relay.mend();
        eventually(async || reads(&app, &beside, "new").await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_bound_an_instance_that_is_cut_off_answers_as_long_as_the_ages_allow() {
    let (app, relay, beside) = two("").await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    app.followed().await;
    assert_eq!(app.get_from(&beside, "acme", "K").await.value(), "v");
    relay.cut().await;
    beside.clock.advance(SECOND * 60 * 60 * 23);
    assert_eq!(app.get_from(&beside, "acme", "K").await.value(), "v");
    beside.clock.advance(SECOND * 60 * 60);
    is_detached(&app, &beside).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_revoked_meanwhile_is_let_in_nowhere_past_the_bound() {
    let (app, relay, beside) = two(BOUND).await;
    let token = app.new_token("short-lived", &["*"], &[Action::Read]).await;
    let ask = async || Answer::of(beside.request(Method::GET, "/v1/tenants/acme").bearer_auth(&token)).await.status;
    eventually(async || ask().await == 404).await;
    relay.cut().await;
    app.instance().service.resolver.database().revoke_token("short-lived").await.unwrap();
    beside.clock.step(11_000);
    assert_eq!(ask().await, 503, "by the wall clock it is over");
    relay.mend();
    let mut first = 503;
    while first == 503 {
        first = ask().await;
    }
    assert_eq!(first, 401, "it is let in no more");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_wakes_asks_the_database_before_it_answers() {
    on_both(async |backend| {
        let mut setup = Setup::new(backend, Phase::Database);
        setup.database = BOUND.to_owned();
        let app = setup.start().await;
        assert_eq!(app.put("acme", "K", "old").await.status, 201);
        assert_eq!(app.get("acme", "K").await.value(), "old");
        for slept in [15, 60] {
            app.advance(SECOND * slept);
            let answer = app.get("acme", "K").await;
            assert_eq!(answer.status, 200, "it reaches the database: {}", answer.text);
            assert!(app.instance().service.attachment.holds_now());
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_beside_which_much_changes_does_not_pass_for_detached() {
    let mut setup = Setup::new(Backend::postgres().await, Phase::Database);
    setup.database = BOUND.to_owned();
    let app = setup.start().await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    let database = std::sync::Arc::clone(app.instance().service.resolver.database());
    let changing = tokio::spawn(async move {
        // As many as the database takes: no look meets an end.
        loop {
            database.announce_webhooks(&["globex".parse().unwrap()]).await.unwrap();
        }
    });
    for _ in 0..5 {
        app.advance(SECOND * 11);
        assert_eq!(app.get("acme", "K").await.status, 200);
    }
    changing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_answered_past_the_bound_where_the_register_cannot_be_written() {
    let mut setup = Setup::new(Backend::postgres().await, Phase::Database);
    setup.database = BOUND.to_owned();
    let app = setup.start().await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    app.setup.backend.sql("ALTER TABLE instances RENAME TO hidden").await;
    app.advance(SECOND * 11);
    assert_eq!(app.get("acme", "K").await.status, 503, "commands could not tell until when it answers");
    app.setup.backend.sql("ALTER TABLE hidden RENAME TO instances").await;
    eventually(async || app.get("acme", "K").await.status == 200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_an_instance_that_is_cut_off_waits_until_it_answers_nothing() {
    let (app, relay, beside) = two("max_detached = \"3s\"\n").await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    eventually(async || reads(&app, &beside, "v").await).await;
    relay.cut().await;
    let database = &app.instance().service.resolver.database();
    database.shred(&"acme".parse().unwrap()).await.unwrap().unwrap();
    let change = database.changes().await.unwrap();
    let has_followed = |instance: &Registered| instance.changes >= change;
    let following = database.await_all_instances(SECOND * 60, has_followed, |_| {}).await.unwrap();
    assert!(following.is_complete(), "{following:?}");
    is_detached(&app, &beside).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_without_the_database_counts_from_when_it_was_last_heard_of() {
    let mut server = Postgres::start();
    let mut setup = Setup::new(Backend::Postgres(server.database().await), Phase::Database);
    setup.database = "max_detached = \"1m\"\n".to_owned();
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("offline");
    let setup = setup.with(&format!("[memory]\noffline_file = \"{}\"\noffline_every = \"1s\"\n", file.display()));
    let mut app = setup.start().await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    assert_eq!(app.get("acme", "K").await.value(), "v");
    eventually(async || file.exists()).await;
    server.stop();
    app.restart().await;
    assert_eq!(app.get("acme", "K").await.value(), "v");
    app.advance(SECOND * 61);
    assert_eq!(app.get("acme", "K").await.status, 503);
    app.restart().await;
    assert_eq!(app.get("acme", "K").await.status, 503, "another start makes it no younger");
}
