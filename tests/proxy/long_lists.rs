//! Lists and batches of many bytes: made in parts, joined while they are taken, one at a time for
//! each token. Nobody else pays for them.

use std::{
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures_util::future::join_all;
use reqwest::Method;
use secretier::{access::Action, phase::Phase, resolver::Want};
use serde_json::json;
use tokio::io::AsyncReadExt as _;

use crate::{
    app::{Answer, Backend, Setup, TestApp, eventually, on_both},
    connections::Wire,
    postgres,
    scopes::token_for,
    within::within,
};

const LIST: &str = "/v1/tenants/acme/secrets?values=true";

/// Values with and without what JSON escapes, shorter and longer than a piece of an answer.
fn values() -> Vec<(String, String)> {
    let long = |text: &str, bytes: usize| text.repeat(bytes / text.len());
    let mut values: Vec<(String, String)> =
        (0..150).map(|number| (format!("S{number:03}"), number.to_string())).collect();
    for (number, bytes) in [1 << 10, 60 << 10, 70 << 10, 200 << 10].into_iter().enumerate() {
        values.push((format!("L{number}"), long("plain", bytes)));
        values.push((format!("E{number}"), long("\"\\\n\u{1}\u{1f511}", bytes / 3)));
    }
    values.push(("q\"\\".to_owned(), String::new()));
    values.sort();
    values
}

async fn filled(backend: Backend, phase: Phase) -> TestApp {
    let app = Setup::new(backend, phase).patient().start().await;
    let values = values();
    match phase {
        Phase::Database => {
            for (key, value) in &values {
                assert_eq!(app.put("acme", key, value).await.status, 201);
            }
        }
        Phase::Hybrid | Phase::Infisical => {
            let values: Vec<(&str, &str)> = values.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            app.holds("acme", &values);
        }
    }
    app
}

/// What is told of a series in the metrics.
async fn metric(app: &TestApp, series: &str) -> f64 {
    let page = app.metrics().await;
    page.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok()).unwrap_or(0.0)
}

/// How many statements wait for a table that is held.
async fn waiting(backend: &Backend) -> i64 {
    let Backend::Postgres(url) = backend else { panic!("SQLite has no locks of tables") };
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";
    postgres::number(url, waits).await
}

async fn bytes_held(app: &TestApp) -> f64 {
    metric(app, "secretier_held_bytes{budget=\"answers\"}").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_list_and_a_long_batch_are_to_the_byte_what_their_secrets_are() {
    for phase in Phase::ALL {
        on_both(async |backend| {
            let mut app = filled(backend, phase).await;
            for _ in 0..2 {
                let mut keys = Vec::new();
                let mut secrets = Vec::new();
                let list = app.ask(Method::GET, LIST).await;
                let told = list.json();
                for ((key, value), told) in values().iter().zip(told["keys"].as_array().unwrap()) {
                    let (version, updated_at) = (&told["version"], told["updated_at"].as_str().unwrap());
                    let (name, value) = (json!(key), json!(value));
                    keys.push(format!(
                        r#"{{"key":{name},"version":{version},"updated_at":"{updated_at}","value":{value}}}"#
                    ));
                    secrets.push(format!(r#"{{"tenant":"acme","key":{name},"value":{value},"version":{version}}}"#));
                }
                let expected = format!(r#"{{"keys":[{}]}}"#, keys.join(","));
                assert_eq!(list.header("content-length"), expected.len().to_string());
                assert!(list.text == expected, "another list");
                let wanted: Vec<String> = values().into_iter().map(|(key, _)| key).chain(["NONE".to_owned()]).collect();
                let batch = app.request(Method::POST, "/v1/tenants/acme/secrets/batch-get");
                let batch = Answer::of(batch.json(&json!({ "keys": wanted }))).await;
                let expected = format!(r#"{{"secrets":[{}],"missing":["NONE"]}}"#, secrets.join(","));
                assert_eq!(batch.header("content-length"), expected.len().to_string());
                assert!(batch.text == expected, "another batch");
                app.restart().await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_list_has_the_keys_that_a_token_reaches_and_no_others() {
    let app = filled(Backend::sqlite(), Phase::Database).await;
    let token = token_for(&app, "some", &["acme"], &["S*"], &[Action::Read]).await;
    let list = Answer::of(app.instance().request(Method::GET, LIST).bearer_auth(token)).await.json();
    let keys = list["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 150);
    assert!(keys.iter().all(|key| key["key"].as_str().unwrap().starts_with('S')));
}

/// A thread that polls it is free between any two polls.
#[tokio::test]
async fn a_long_list_is_made_in_parts_and_the_thread_is_free_between_them() {
    const COUNT: usize = 16;
    let app = Setup::new(Backend::sqlite(), Phase::Database).patient().start().await;
    for number in 0..COUNT {
        assert_eq!(app.put("acme", &format!("K{number}"), &"v".repeat(256 << 10)).await.status, 201);
    }
    let (resolver, tenant) = (&app.instance().service.resolver, "acme".parse().unwrap());
    let answer = resolver.long_answer("token");
    let polls = AtomicUsize::new(0);
    let mut listing = pin!(resolver.resolve_all(&tenant, Want::Cached, &answer));
    let listing = std::future::poll_fn(|context| {
        polls.fetch_add(1, Ordering::Relaxed);
        listing.as_mut().poll(context)
    });
    let listing = within("a list is made", listing).await.unwrap().unwrap();
    assert_eq!(listing.secrets.len(), COUNT);
    // Each secret is opened by itself, and encoded by itself.
    let polls = polls.load(Ordering::Relaxed);
    assert!(polls > 2 * COUNT, "{polls} parts");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tokens_second_list_waits_for_its_first_and_both_are_answered() {
    let backend = Backend::postgres().await;
    let app = filled(backend.clone(), Phase::Database).await;
    let other = app.new_token("other", &["acme"], &[Action::Read]).await;
    let waited = async || metric(&app, "secretier_long_answer_wait_seconds_count").await;
    let table = backend.hold("company_secrets").await;
    let list = |token: &str| {
        let request = app.instance().request(Method::GET, LIST).bearer_auth(token);
        tokio::spawn(Answer::of(request))
    };
    let firsts = [list(&app.token), list(&app.token), list(&app.token)];
    eventually(async || waiting(&backend).await == 1).await;
    let seconds = [list(&other), list(&other)];
    eventually(async || waiting(&backend).await == 2).await;
    assert_eq!(waited().await, 2.0, "one of each token has its turn");
    drop(table);
    for answer in join_all(firsts.into_iter().chain(seconds)).await {
        let answer = answer.unwrap();
        assert_eq!((answer.status, answer.json()["keys"].as_array().unwrap().len()), (200, values().len()));
    }
    assert_eq!(waited().await, 5.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_that_are_known_to_be_short_wait_for_nobody() {
    let backend = Backend::postgres().await;
    let app = Setup::new(backend.clone(), Phase::Database).patient().start().await;
    assert_eq!(app.put("acme", "K", "v").await.status, 201);
    assert_eq!(app.ask(Method::GET, LIST).await.status, 200);
    let table = backend.hold("company_secrets").await;
    let lists = [(), (), ()].map(|()| tokio::spawn(Answer::of(app.request(Method::GET, LIST))));
    eventually(async || waiting(&backend).await == 3).await;
    drop(table);
    for list in join_all(lists).await {
        assert_eq!(list.unwrap().status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_given_back_when_the_caller_leaves_in_the_middle_of_a_list() {
    on_both(async |backend| {
        let app = filled(backend, Phase::Database).await;
        for _ in 0..3 {
            let mut wire = Wire::open(&app).await;
            wire.ask("GET", LIST).await;
            let mut some = vec![0; 100 << 10];
            within("it begins", wire.stream.read_exact(&mut some)).await.unwrap();
            assert!(some.starts_with(b"HTTP/1.1 200"));
            drop(wire);
            eventually(async || bytes_held(&app).await == 0.0).await;
        }
        assert_eq!(app.ask(Method::GET, LIST).await.status, 200, "the token has its turn again");
        assert_eq!(app.get("acme", "S000").await.status, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_leaves_while_waiting_for_a_turn_leaves_it_to_the_next() {
    let backend = Backend::postgres().await;
    let app = filled(backend.clone(), Phase::Database).await;
    let table = backend.hold("company_secrets").await;
    let list = || tokio::spawn(Answer::of(app.request(Method::GET, LIST)));
    let (first, second, third) = (list(), list(), list());
    eventually(async || waiting(&backend).await == 1).await;
    // Whichever of them has the turn, or waits for it.
    first.abort();
    second.abort();
    drop(table);
    assert_eq!(third.await.unwrap().status, 200);
    assert_eq!(app.get("acme", "S000").await.status, 200);
}
