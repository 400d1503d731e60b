//! What is not there: 404 only where it is proved, and deletions that reach every copy.

use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use reqwest::Method;
use secretier::{
    phase::Phase,
    tiers::upstream::standin::{Fault, Route},
};

use crate::app::{Answer, ENV, FORGETFUL, Setup, TestApp, client_builder, eventually, on_both, secret};

const ACME: &str = "/tenants/acme";

/// A hybrid tenant whose two secrets are copied to the database.
async fn copied(backend: crate::app::Backend) -> TestApp {
    let app = Setup::new(backend, Phase::Hybrid).start().await;
    app.holds("acme", &[("A", "1"), ("B", "2")]);
    assert_eq!(app.get("acme", "A").await.value(), "1");
    app.stored(2).await;
    app
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_deleted_upstream_is_gone_from_every_tier_at_the_next_snapshot() {
    on_both(async |backend| {
        let app = copied(backend).await;
        app.world().delete(ENV, ACME, "A");
        assert_eq!(app.refresh("acme").await.json()["keys"], 1);
        assert_eq!(app.get("acme", "A").await.status, 404);
        assert_eq!(app.get("acme", "B").await.value(), "2");
        app.stored(1).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_upstream_also_reaches_what_memory_had_from_the_database() {
    on_both(async |backend| {
        let mut app = copied(backend).await;
        app.restart().await;
        assert_eq!(app.get("acme", "A").await.tier(), "database");
        app.world().delete(ENV, ACME, "A");
        assert_eq!(app.refresh("acme").await.status, 200);
        assert_eq!(app.get("acme", "A").await.status, 404);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_upstream_reaches_memory_also_when_another_secret_was_written_meanwhile() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "1"), ("B", "2")]);
            assert_eq!(app.get("acme", "A").await.value(), "1");
            app.world().delete(ENV, ACME, "A");
            assert_eq!(app.put("acme", "B", "3").await.status, 200);
            assert_eq!(app.refresh("acme").await.status, 200);
            assert_eq!(app.get("acme", "A").await.status, 404);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_folder_takes_its_copies_with_it() {
    on_both(async |backend| {
        let app = copied(backend).await;
        app.world().delete_folder(ENV, ACME);
        app.advance(Duration::from_secs(61));
        assert_eq!(app.refresh("acme").await.status, 404);
        app.stored(0).await;
        for key in ["A", "B"] {
            assert_eq!(app.get("acme", key).await.problem(), (404, "secret_not_found".to_owned()));
        }
        assert_eq!(app.ask_tenant("acme", "/secrets").await.status, 404);
        assert_eq!(app.ready().await.json()["status"], "ready");
        app.holds("acme", &[("A", "3")]);
        app.advance(Duration::from_secs(61));
        // Whoever asks first waits 50 ms for the look that finds it, which goes on behind the answer.
        eventually(async || app.get("acme", "A").await.status == 200).await;
        assert_eq!(app.get("acme", "A").await.value(), "3", "a folder that is made again is found again");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_fails_or_comes_back_in_part_deletes_nothing() {
    on_both(async |backend| {
        let mut app = copied(backend).await;
        app.world().delete(ENV, ACME, "A");
        let faults = [
            Fault::Down,
            Fault::Status(500),
            Fault::Status(404),
            Fault::Garbage,
            Fault::CutOff,
            Fault::DatabaseDown,
            Fault::RateLimited { retry_after: Duration::from_secs(1) },
        ];
        for fault in faults {
            // Past the pauses after the fault before.
            app.advance(Duration::from_secs(61));
            app.world().fault_on(Route::List, fault);
            assert_eq!(app.refresh("acme").await.problem(), (503, "unavailable".to_owned()), "{fault:?}");
            app.world().clear_faults();
            assert_eq!(app.rows().await, 2, "{fault:?}");
            assert_eq!(app.get("acme", "A").await.value(), "1", "{fault:?}");
        }
        app.infisical.stop().await;
        app.restart().await;
        assert_eq!(app.get("acme", "A").await.value(), "1");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_snapshot_proves_nothing_while_the_folder_list_fails() {
    on_both(async |backend| {
        let app = copied(backend).await;
        app.world().delete_folder(ENV, ACME);
        app.world().fault_on(Route::Folders, Fault::Status(500));
        app.advance(Duration::from_secs(61));
        assert_eq!(app.refresh("acme").await.problem(), (503, "unavailable".to_owned()));
        assert_eq!(app.rows().await, 2);
        assert_eq!(app.get_fresh("acme", "A").await.value(), "1");
        assert_eq!(app.get("other", "A").await.problem(), (503, "unavailable".to_owned()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_that_infisical_does_not_know_proves_no_absence() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup { environment: "qa", ..Setup::new(backend, phase) }.start().await;
            app.holds("acme", &[("A", "1")]);
            for key in ["A", "NONE"] {
                let answer = app.get("acme", key).await;
                assert_eq!(answer.problem(), (503, "unavailable".to_owned()));
                assert_ne!(answer.header("retry-after"), "");
            }
            assert_eq!(app.refresh("acme").await.status, 503);
            assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}companies").await, 0);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_proof_there_is_no_404() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "1")]);
            app.infisical.stop().await;
            for answer in [
                app.get("acme", "A").await,
                app.get("acme", "NONE").await,
                app.get("none", "NONE").await,
                app.ask_tenant("acme", "/secrets").await,
                app.refresh("acme").await,
            ] {
                assert_eq!(answer.problem(), (503, "unavailable".to_owned()));
                assert!(answer.header("retry-after").parse::<u64>().unwrap() >= 1);
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_tenant_and_an_unknown_key_look_the_same() {
    for phase in Phase::ALL {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.put("acme", "A", "1").await;
            let (key, tenant) = (app.get("acme", "NONE").await, app.get("nobody", "A").await);
            assert_eq!(key.problem(), (404, "secret_not_found".to_owned()));
            assert_eq!((key.status, &key.text), (tenant.status, &tenant.text));
            assert_eq!(app.delete("nobody", "A").await.problem(), (404, "secret_not_found".to_owned()));
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn made_up_tenants_cost_twelve_folder_lists_a_minute_no_row_and_no_more_memory_than_is_allowed() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).with("[memory]\ncapacity = \"256KiB\"\n").start().await;
        app.holds("acme", &[("A", "1")]);
        let started = Instant::now();
        let client = client_builder().build().unwrap();
        stream::iter(0..10_000)
            .for_each_concurrent(100, async |number| {
                let url = format!("{}{}", app.url(), secret(&format!("made-up-{number}"), "A"));
                assert_eq!(Answer::of(client.get(url).bearer_auth(&app.token)).await.status, 404);
            })
            .await;
        // A list tells an absence for five seconds.
        let lists = 1 + started.elapsed().as_secs() / 5;
        let calls = app.world().calls();
        assert!(calls.folders <= lists && calls.list == 0, "{calls:?}");
        assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}companies").await, 0);
        let memory = app.instance().service.resolver.memory();
        assert!(memory.weight() <= 256 << 10, "{memory:?}");
        eventually(async || app.instance().service.resolver.flights() == (0, 0)).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_whose_folder_is_made_later_is_found_within_five_seconds() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).with(FORGETFUL).start().await;
            assert_eq!(app.get("acme", "A").await.status, 404);
            app.holds("acme", &[("A", "1")]);
            app.advance(Duration::from_secs(5));
            assert_eq!(app.get("acme", "A").await.value(), "1");

            // While Infisical is down, what was listed a minute ago still counts.
            assert_eq!(app.get("globex", "A").await.status, 404);
            app.advance(Duration::from_secs(6));
            app.world().fault(Fault::Status(503));
            assert_eq!(app.get("globex", "A").await.status, 404);
            app.advance(Duration::from_secs(60));
            assert_eq!(app.get("globex", "A").await.status, 503);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_folder_is_an_empty_list_until_it_is_filled() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).with(FORGETFUL).start().await;
            app.holds("acme", &[]);
            let empty = app.ask_tenant("acme", "/secrets").await;
            assert_eq!((empty.status, empty.text.as_str()), (200, "{\"keys\":[]}"));
            assert_eq!(app.ask_tenant("none", "/secrets").await.problem(), (404, "secret_not_found".to_owned()));
            app.holds("acme", &[("A", "1")]);
            app.advance(Duration::from_mins(16));
            eventually(async || app.ask_tenant("acme", "/secrets").await.json()["keys"][0]["key"] == "A").await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_get_tells_the_found_from_the_missing() {
    on_both(async |backend| {
        let app = copied(backend).await;
        app.world().mark();
        let ask = |keys: &[&str]| {
            let body = serde_json::json!({ "keys": keys });
            Answer::of(app.request(Method::POST, "/v1/tenants/acme/secrets/batch-get").json(&body))
        };
        let both = ask(&["B", "NONE", "A"]).await.json();
        assert_eq!((&both["secrets"][0]["value"], &both["secrets"][1]["value"]), (&"2".into(), &"1".into()));
        assert_eq!(both["missing"], serde_json::json!(["NONE"]));
        assert_eq!(ask(&[]).await.text, "{\"secrets\":[],\"missing\":[]}");
        let often = ask(&vec!["A"; 1000]).await.json();
        assert_eq!(often["secrets"].as_array().unwrap().len(), 1, "a key that is named often is answered once");
        assert_eq!(ask(&vec!["A"; 1001]).await.problem(), (400, "invalid_body".to_owned()));
        assert_eq!(ask(&["A", "no\nline"]).await.problem(), (400, "invalid_key".to_owned()));
        assert_eq!(app.world().calls_since_mark().total(), 0);
    })
    .await;
}
