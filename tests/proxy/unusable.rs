//! One bad secret takes down no other: what cannot be used is left out by key, with its reason.

use std::time::Duration;

use reqwest::Method;
use secretier::{
    phase::Phase,
    tiers::upstream::standin::{Readable, Rights, Route, Unreadable},
};
use serde_json::json;

use crate::app::{Answer, ENV, FORGETFUL, Setup, TestApp, eventually, on_both};

fn with_duplicates(app: &TestApp) {
    app.holds("acme", &[("A", "a"), ("DUP", "one"), ("SAME", "same"), ("REFERS", "${DUP}")]);
    app.world().duplicate(ENV, "/tenants/acme", "DUP", "two");
    app.world().duplicate(ENV, "/tenants/acme", "SAME", "same");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_used_is_unavailable_by_key_and_everything_beside_it_is_served() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            with_duplicates(&app);
            for _ in 0..2 {
                for key in ["DUP", "REFERS"] {
                    let refused = app.get("acme", key).await;
                    assert_eq!(refused.problem(), (503, "secret_unavailable".to_owned()), "{key}");
                    assert_eq!(refused.header("retry-after"), "30");
                }
                assert_eq!(app.get("acme", "A").await.value(), "a");
                assert_eq!(app.get("acme", "SAME").await.value(), "same", "which of them is meant makes no difference");
                assert_eq!(app.get("acme", "NONE").await.status, 404);
                let list = app.ask_tenant("acme", "/secrets").await.json();
                let keys: Vec<_> = list["keys"].as_array().unwrap().iter().map(|key| key["key"].clone()).collect();
                assert_eq!(keys, ["A", "SAME"]);
                let unavailable =
                    json!([{"key": "DUP", "reason": "duplicate"}, {"key": "REFERS", "reason": "reference"}]);
                assert_eq!(list["unavailable"], unavailable);
                let values = app.ask_tenant("acme", "/secrets?values=true").await;
                assert_eq!(values.problem(), (503, "secret_unavailable".to_owned()));
                let batch = |keys: &[&str]| {
                    let batch = app.request(Method::POST, "/v1/tenants/acme/secrets/batch-get");
                    Answer::of(batch.json(&json!({ "keys": keys })))
                };
                assert_eq!(batch(&["A", "DUP"]).await.problem(), (503, "secret_unavailable".to_owned()));
                assert_eq!(batch(&["A", "SAME", "NONE"]).await.json()["missing"], json!(["NONE"]));
                assert_eq!(app.explain("acme", "DUP").await["unusable"], "duplicate");
                // Out of the copy, where there is one.
                app.restart().await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_is_hidden_or_no_text_takes_down_no_other() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "a"), ("HIDDEN", "h")]);
            assert!(app.world().hide(ENV, "/tenants/acme", "HIDDEN"));
            app.world().put_half_a_pair(ENV, "/tenants/acme", "HALF", "a", "b");
            for _ in 0..2 {
                assert_eq!(app.get("acme", "A").await.value(), "a");
                for key in ["HIDDEN", "HALF"] {
                    assert_eq!(app.get("acme", key).await.problem(), (503, "secret_unavailable".to_owned()), "{key}");
                }
                let list = app.ask_tenant("acme", "/secrets").await.json();
                let unavailable = json!([{"key": "HALF", "reason": "not_text"}, {"key": "HIDDEN", "reason": "hidden"}]);
                assert_eq!(list["unavailable"], unavailable);
                let exists = Answer::of(
                    app.request(Method::PUT, &crate::app::secret("acme", "HIDDEN"))
                        .header("if-none-match", "*")
                        .json(&json!({"value": "over it"})),
                );
                assert_eq!(exists.await.problem(), (409, "version_conflict".to_owned()), "it is there all the same");
                app.restart().await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_that_the_identity_may_not_follow_denies_nobody() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "a"), ("B", "${prod.hidden.KEY}")]);
            app.world().put(ENV, "/hidden", "KEY", "k");
            let readable = ["/tenants", "/tenants/acme"].map(|path| Readable::new(ENV, path));
            app.world().set_rights(&app.identity, Rights::Read(readable.to_vec()));
            app.world().unreadable(Unreadable::Refused);
            assert_eq!(app.get("acme", "A").await.value(), "a");
            assert_eq!(app.get("acme", "B").await.value(), "${prod.hidden.KEY}");
            let list = app.ask_tenant("acme", "/secrets?values=true").await;
            assert_eq!(list.status, 200, "{list:?}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_was_mended_is_served_with_its_next_read() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            with_duplicates(&app);
            assert_eq!(app.get("acme", "DUP").await.status, 503);
            app.world().delete(ENV, "/tenants/acme", "DUP");
            app.advance(Duration::from_secs(31));
            let mended = app.get("acme", "DUP").await.value();
            assert!(matches!(mended.as_str(), "one" | "two"));
            assert_eq!(app.get("acme", "REFERS").await.value(), mended);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_was_served_is_not_served_on_once_it_cannot_be_used() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "a"), ("DUP", "one")]);
            assert_eq!(app.get("acme", "DUP").await.value(), "one");
            app.world().duplicate(ENV, "/tenants/acme", "DUP", "two");
            assert_eq!(app.refresh("acme").await.status, 200);
            eventually(async || app.get("acme", "DUP").await.status == 503).await;
            app.restart().await;
            assert_eq!(app.get("acme", "DUP").await.problem(), (503, "secret_unavailable".to_owned()));
            assert_eq!(app.get("acme", "A").await.value(), "a");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_no_key_is_told_in_the_list_and_harms_nobody() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "a"), ("new\nline", "x")]);
            for _ in 0..2 {
                assert_eq!(app.get("acme", "A").await.value(), "a");
                assert_eq!(app.get("acme", "NONE").await.status, 404);
                let list = app.ask_tenant("acme", "/secrets").await.json();
                assert_eq!(list["unavailable"], json!([{"key": "new\nline", "reason": "invalid_name"}]));
                app.restart().await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_text_that_servers_hide_values_behind_is_a_value_like_any_other() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "a")]);
        assert_eq!(app.put("acme", "B", "<hidden-by-infisical>").await.status, 201);
        assert_eq!(app.get("acme", "B").await.value(), "<hidden-by-infisical>");
        assert_eq!(app.get("acme", "A").await.value(), "a");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_takes_long_is_unavailable_for_a_while_and_then_served() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut setup = Setup::new(backend, phase).with(FORGETFUL);
            setup.upstream_timeout = "300ms";
            setup.infisical = "read_timeout = \"10m\"".to_owned();
            let app = setup.start().await;
            app.holds("acme", &[("A", "a")]);
            app.holds("globex", &[("A", "of-globex")]);
            assert_eq!(app.get("globex", "A").await.value(), "of-globex");
            app.world().mark();
            let gate = app.world().gate_next_answers(1, Route::List);
            assert_eq!(app.get("acme", "A").await.problem(), (503, "unavailable".to_owned()));
            assert_eq!(app.get("acme", "A").await.status, 503);
            assert_eq!(app.get("globex", "A").await.value(), "of-globex", "nobody else is held up");
            gate.open();
            eventually(async || app.get("acme", "A").await.status == 200).await;
            assert_eq!(app.world().calls_since_mark().to(Route::List), 1, "one read, which went on behind the 503");
        })
        .await;
    }
}
