//! Reads and writes that cross: the stand-in's gates force the order.

use std::sync::Arc;

use reqwest::Method;
use secretier::{
    phase::Phase,
    secret::SecretKey,
    tenant::Tenant,
    tiers::{
        memory::Recall,
        upstream::standin::{Rights, Route},
    },
};
use tokio::task::JoinHandle;

use crate::{
    app::{Answer, ENV, Setup, TestApp, eventually, on_both, secret},
    within::within,
};

const ACME: &str = "/tenants/acme";

async fn started(backend: crate::app::Backend, phase: Phase) -> Arc<TestApp> {
    let app = Setup::new(backend, phase).start().await;
    app.holds("acme", &[("A", "old"), ("B", "b")]);
    Arc::new(app)
}

/// A read that goes on by itself.
fn reading(app: &Arc<TestApp>, key: &'static str, fresh: bool) -> JoinHandle<Answer> {
    let app = Arc::clone(app);
    tokio::spawn(async move { if fresh { app.get_fresh("acme", key).await } else { app.get("acme", key).await } })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_that_began_before_a_write_never_lands_after_it() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        for deleting in [false, true] {
            on_both(async |backend| {
                let app = started(backend, phase).await;
                let gate = app.world().gate_next_answers(1, Route::List);
                let early = reading(&app, "A", false);
                gate.arrived(1).await;

                let written = if deleting { app.delete("acme", "A").await } else { app.put("acme", "A", "new").await };
                assert_eq!(written.status, if deleting { 204 } else { 200 });
                let is_new = async || {
                    let answer = app.get("acme", "A").await;
                    if deleting { assert_eq!(answer.status, 404) } else { assert_eq!(answer.value(), "new") }
                };
                // The old read is still held, and nobody joins it.
                is_new().await;
                assert!(!early.is_finished());
                gate.open();
                let early = early.await.unwrap();
                match (phase, deleting) {
                    // Superseded, it is answered from the copy that has been stored since.
                    (Phase::Hybrid, true) => assert_eq!(early.status, 404),
                    (Phase::Hybrid, false) => assert_eq!(early.value(), "new"),
                    _ => {
                        assert_eq!(early.value(), "old", "who asked before the write may be told of what was before it")
                    }
                }
                is_new().await;
                // What it wrote back, if anything, is not the old value either.
                let mut app = Arc::into_inner(app).unwrap();
                app.restart().await;
                let answer = app.get("acme", "A").await;
                if deleting { assert_eq!(answer.status, 404) } else { assert_eq!(answer.value(), "new") }
            })
            .await;
        }
    }
}

/// A reader comes in the middle of a change: after the fence was raised, and before the
/// flights from before it were forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn an_absence_that_a_read_from_before_a_change_proves_is_not_kept_after_it() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = started(backend, phase).await;
            let gate = app.world().gate_next_answers(1, Route::List);
            let early = reading(&app, "A", false);
            gate.arrived(1).await;
            let (acme, key): (Tenant, SecretKey) = ("acme".parse().unwrap(), "NEW".parse().unwrap());
            let memory = app.instance().service.resolver.memory();
            memory.change(&acme, &key);
            let late = reading(&app, "NEW", false);
            waiting(&app, 1).await;
            gate.open();
            assert_eq!(early.await.unwrap().value(), "old");
            assert_eq!(late.await.unwrap().status, 404);
            assert!(matches!(memory.recall("acme", "NEW"), Recall::Nothing), "it proves nothing any more");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_that_crosses_a_change_stops_what_is_in_memory_all_the_same() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = started(backend, phase).await;
            assert_eq!(app.get("acme", "A").await.value(), "old");
            app.world().set_rights(&app.identity, Rights::NoAccess);
            let gate = app.world().gate_next_answers(1, Route::List);
            let fresh = reading(&app, "A", true);
            gate.arrived(1).await;
            // Fences are striped: it need not even be this tenant's.
            app.instance().service.resolver.memory().change(&"acme".parse().unwrap(), &"OTHER".parse().unwrap());
            gate.open();
            let denied = (503, "upstream_denied".to_owned());
            assert_eq!(fresh.await.unwrap().problem(), denied);
            eventually(async || app.get("acme", "A").await.status == 503).await;
            assert_eq!(app.get("acme", "A").await.problem(), denied);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_list_that_was_read_before_a_tenant_was_made_does_not_take_it_away() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = started(backend, phase).await;
            let gate = app.world().gate_next_answers(1, Route::Folders);
            let early = reading(&app, "A", false);
            gate.arrived(1).await;
            let writing = {
                let app = Arc::clone(&app);
                tokio::spawn(async move { app.put("fresh", "NEW", "n").await })
            };
            eventually(async || app.world().value(ENV, "/tenants/fresh", "NEW").is_some()).await;
            gate.open();
            assert_eq!(writing.await.unwrap().status, 201);
            assert_eq!(app.get("fresh", "NEW").await.value(), "n");
            assert_eq!(app.get_fresh("fresh", "NEW").await.value(), "n");
            assert_eq!(early.await.unwrap().value(), "old");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_who_wait_for_one_folder_share_one_read() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = started(backend, phase).await;
            let gate = app.world().gate_answers(Route::List);
            let first = reading(&app, "A", false);
            gate.arrived(1).await;
            let second = reading(&app, "B", false);
            waiting(&app, 1).await;
            gate.open();
            assert_eq!((first.await.unwrap().value(), second.await.unwrap().value()), ("old".into(), "b".into()));
            assert_eq!(app.world().calls().list, 1);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_who_ask_for_fresh_during_a_read_share_one_more() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = started(backend, phase).await;
            let gate = app.world().gate_answers(Route::List);
            let first = reading(&app, "OTHER", false);
            gate.arrived(1).await;
            app.world().put(ENV, ACME, "A", "new");
            let keys = ["A", "B", "C", "D", "E", "F"];
            let fresh = keys.map(|key| reading(&app, key, true));
            // One of them has launched the second read, the others have joined it.
            waiting(&app, keys.len() - 1).await;
            gate.open();
            assert_eq!(first.await.unwrap().status, 404);
            for (key, answer) in keys.into_iter().zip(fresh) {
                let answer = answer.await.unwrap();
                match key {
                    "A" => assert_eq!(answer.value(), "new", "a read that begins after the request"),
                    "B" => assert_eq!(answer.value(), "b"),
                    _ => assert_eq!(answer.status, 404),
                }
            }
            assert_eq!(app.world().calls().list, 2);
        })
        .await;
    }
}

/// Both count as current after the write: beside each other, the one that saw less could land last.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_waits_for_one_from_before_a_write_begins_with_the_write_and_is_the_only_one() {
    on_both(async |backend| {
        // In phase `hybrid` the change comes by the feed as well, and outdates the queued read too.
        let app = started(backend, Phase::Infisical).await;
        let gate = app.world().gate_next_answers(1, Route::List);
        let early = reading(&app, "B", false);
        gate.arrived(1).await;
        let fresh = ["A", "OTHER"].map(|key| reading(&app, key, true));
        // One of them has queued a read, and the other has joined it.
        waiting(&app, 1).await;
        let queued = app.world().gate_next_answers(1, Route::List);
        assert_eq!(app.delete("acme", "A").await.status, 204);
        within("the queued read begins, though the one from before the write hangs", queued.arrived(1)).await;
        let late = reading(&app, "LATE", false);
        waiting(&app, 2).await;
        queued.open();
        for after in fresh.into_iter().chain([late]) {
            assert_eq!(after.await.unwrap().status, 404);
        }
        assert!(!early.is_finished());
        gate.open();
        assert_eq!(early.await.unwrap().value(), "b");
        assert_eq!(app.get("acme", "A").await.status, 404);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_leaves_does_not_end_the_read_that_others_wait_for() {
    on_both(async |backend| {
        let app = started(backend, Phase::Hybrid).await;
        let gate = app.world().gate_answers(Route::List);
        let first = reading(&app, "A", false);
        gate.arrived(1).await;
        let second = reading(&app, "B", false);
        waiting(&app, 1).await;
        first.abort();
        gate.open();
        assert_eq!(second.await.unwrap().value(), "b");
        assert_eq!(app.world().calls().list, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_among_writers_see_values_in_the_order_of_their_versions() {
    for phase in Phase::ALL {
        on_both(async |backend| {
            let app = started(backend, phase).await;
            app.put("acme", "N", "0").await;
            let readers: Vec<_> = (0..4)
                .map(|_| {
                    let app = Arc::clone(&app);
                    tokio::spawn(async move {
                        let mut last = 0;
                        while last < 20 {
                            let read: u32 = app.get("acme", "N").await.value().parse().unwrap();
                            assert!(read >= last, "{read} after {last}");
                            last = read;
                        }
                    })
                })
                .collect();
            for number in 1..=20 {
                let path = secret("acme", "N");
                let body = serde_json::json!({ "value": number.to_string() });
                assert_eq!(Answer::of(app.request(Method::PUT, &path).json(&body)).await.status, 200);
                assert_eq!(app.get("acme", "N").await.value(), number.to_string());
            }
            for reader in readers {
                within("a reader sees the last value", reader).await.unwrap();
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_writes_is_not_given_the_validator_of_what_another_wrote_right_after() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = started(backend, phase).await;
            let gate = app.world().gate(Route::List);
            let writing = {
                let app = Arc::clone(&app);
                tokio::spawn(async move { app.put("acme", "A", "mine").await })
            };
            gate.arrived(1).await;
            app.world().put(ENV, ACME, "A", "theirs");
            gate.open();
            let written = writing.await.unwrap();
            assert_eq!((written.status, written.header("etag")), (200, ""));
            assert!(written.json()["version"].is_null(), "{written:?}");
            let now = app.get("acme", "A").await;
            assert_eq!((now.value().as_str(), now.etag().is_empty()), ("theirs", false));
        })
        .await;
    }
}

/// Waits until so many have joined a read that was in the air.
async fn waiting(app: &TestApp, callers: usize) {
    eventually(async || {
        let page = app.metrics().await;
        let counts = page.lines().filter(|line| line.starts_with("secretier_coalesced_waits_total{"));
        let joined: usize = counts.filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok()).sum();
        joined == callers
    })
    .await;
}
