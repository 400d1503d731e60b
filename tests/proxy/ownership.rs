//! A secret changes hands, or two instances, two rules or an outage meet: what one left
//! behind must not make another forget it, or bring back what is gone.

use std::time::{Duration, Instant};

use reqwest::header;
use secretier::{
    phase::Phase,
    secret::{SecretValue, Writer},
    tiers::{
        database::Precondition,
        upstream::standin::{Calls, Fault, Rights, Route},
    },
};
use serde_json::json;

use crate::{
    app::{Answer, ENV, FORGETFUL, Setup, TestApp, eventually, on_both, secret},
    within::HANGS,
};

const ACME: &str = "/tenants/acme";

/// Past the ttl of memory, and before anything else grows too old.
const PAST_TTL: Duration = Duration::from_secs(301);
/// Past every pause after a failure.
const PAST_PAUSES: Duration = Duration::from_secs(61);

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_a_rule_kept_out_of_the_database_is_found_once_the_rule_is_gone() {
    let rule = "[[rules]]\nkeys = \"WEBHOOK_*\"\nphase = \"infisical\"\n";
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).with(rule).start().await;
        app.holds("acme", &[("WEBHOOK_A", "w"), ("B", "b")]);
        assert_eq!(app.get("acme", "WEBHOOK_A").await.value(), "w");
        app.stored(1).await;

        app.setup.more.clear();
        let beside = app.another().await;
        assert_eq!(app.get_from(&beside, "acme", "WEBHOOK_A").await.value(), "w");
        app.restart().await;
        assert_eq!(app.get("acme", "WEBHOOK_A").await.value(), "w");
        assert_eq!(app.get_fresh("acme", "WEBHOOK_A").await.value(), "w");
        app.stored(2).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_given_back_to_infisical_has_infisicals_values_whatever_the_database_made_of_them() {
    for restarting in [false, true] {
        on_both(async |backend| {
            let mut app = Setup::new(backend, Phase::Hybrid).start().await;
            app.holds("acme", &[("K", "upstream k"), ("D", "upstream d")]);
            assert_eq!(app.get("acme", "K").await.value(), "upstream k");
            app.stored(2).await;
            app.set_phase("acme", Some(Phase::Database)).await;
            assert_eq!(app.put("acme", "K", "own k").await.status, 200);
            assert_eq!(app.delete("acme", "D").await.status, 204);
            assert_eq!(app.get("acme", "K").await.value(), "own k");

            app.set_phase("acme", Some(Phase::Hybrid)).await;
            if restarting {
                app.restart().await;
            } else {
                // What memory has from before may be served for its ttl.
                assert_eq!(app.get_fresh("acme", "K").await.value(), "upstream k");
            }
            for (key, value) in [("K", "upstream k"), ("D", "upstream d")] {
                assert_eq!(app.get("acme", key).await.value(), value);
                assert_eq!(app.get_fresh("acme", key).await.value(), value);
            }
            app.restart().await;
            assert_eq!(app.get("acme", "K").await.value(), "upstream k");
            assert_eq!(app.get("acme", "D").await.value(), "upstream d");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_rule_without_a_phase_before_a_rule_for_the_tenant_loses_no_key() {
    let rules = "[[rules]]\nkeys = \"WEBHOOK_*\"\nttl = \"10s\"\n\
                 [[rules]]\ntenants = \"acme\"\nphase = \"hybrid\"\n";
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Infisical).with(rules).start().await;
        app.holds("acme", &[("WEBHOOK_A", "w"), ("B", "b")]);
        assert_eq!(app.get("acme", "WEBHOOK_A").await.value(), "w");
        for seconds in [11, 29, 40] {
            app.advance(Duration::from_secs(seconds));
            assert_eq!(app.get("acme", "WEBHOOK_A").await.value(), "w");
            assert_eq!(app.get("acme", "B").await.value(), "b");
        }
        app.stored(1).await;
        app.restart().await;
        assert_eq!(app.get("acme", "B").await.tier(), "database");
        assert_eq!(app.get("acme", "WEBHOOK_A").await.value(), "w");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_list_from_before_takes_no_copy_of_another_instance_away() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).start().await;
        assert_eq!(app.get("made-up", "A").await.status, 404);
        app.holds("acme", &[("A", "1")]);
        let beside = app.another().await;
        assert_eq!(app.get_from(&beside, "acme", "A").await.value(), "1");
        app.stored(1).await;

        assert_eq!(app.refresh("acme").await.status, 200);
        assert_eq!(app.get_fresh("acme", "A").await.value(), "1");
        assert_eq!(app.rows().await, 1);
        app.infisical.stop().await;
        app.restart().await;
        let copy = app.get("acme", "A").await;
        assert_eq!((copy.value().as_str(), copy.tier()), ("1", "database"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_the_database_has_just_been_given_is_never_absent() {
    let rule = "[[rules]]\ntenants = \"globex\"\nphase = \"hybrid\"\n";
    for upstream in [false, true] {
        on_both(async |backend| {
            let app = Setup::new(backend, Phase::Infisical).with(rule).start().await;
            if upstream {
                app.holds("acme", &[("OTHER", "o")]);
            }
            let database = &app.instance().service.resolver.database();
            let (tenant, key, value) =
                ("acme".parse().unwrap(), "K".parse().unwrap(), SecretValue::new("own".to_owned()));
            app.hand_over("acme", app.look("acme").await, Some(Phase::Database)).await.unwrap();
            database
                .put(&tenant, &key, &value, &Precondition::None, &Writer::new("test"), Some(Phase::Database))
                .await
                .unwrap();
            assert_eq!(app.get("acme", "K").await.value(), "own");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absence_that_infisical_proved_is_forgotten_when_the_database_becomes_the_owner() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            // Without the change of hands, it would be believed for an hour.
            let rule = "[[rules]]\nnegative_ttl = \"1h\"\n";
            let app = Setup::new(backend, phase).with(rule).start().await;
            app.holds("acme", &[("OTHER", "o")]);
            assert_eq!(app.get("acme", "OTHER").await.value(), "o");
            assert_eq!(app.get("acme", "K").await.status, 404);
            app.set_phase("acme", Some(Phase::Database)).await;
            let database = &app.instance().service.resolver.database();
            let (tenant, key, value) =
                ("acme".parse().unwrap(), "K".parse().unwrap(), SecretValue::new("own".to_owned()));
            database
                .put(&tenant, &key, &value, &Precondition::None, &Writer::new("test"), Some(Phase::Database))
                .await
                .unwrap();
            assert_eq!(app.get("acme", "K").await.value(), "own");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_answer_was_lost_is_seen_long_before_the_ttl() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "old")]);
            assert_eq!(app.get("acme", "A").await.value(), "old");
            app.world().fault_on(Route::Write, Fault::CutOff);
            assert_eq!(app.put("acme", "A", "new").await.problem(), (503, "unavailable".to_owned()));
            assert_eq!(app.world().value(ENV, ACME, "A").as_deref(), Some("new"), "it was done");
            app.world().clear_faults();
            becomes(&app, "A", "new").await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_another_instance_outran_is_a_conflict_and_the_others_value_is_seen() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let first = app.put("acme", "A", "v1").await;
        assert_eq!(app.get("acme", "A").await.value(), "v1");
        let etag = app.get("acme", "A").await.etag().to_owned();
        assert_eq!(first.status, 201);
        let beside = app.another().await;
        let path = secret("acme", "A");
        let put = |request: reqwest::RequestBuilder, value: &str| {
            request.bearer_auth(&app.token).json(&json!({ "value": value }))
        };
        let written = Answer::of(put(beside.request(reqwest::Method::PUT, &path), "v2")).await;
        assert_eq!(written.status, 200);

        let late = put(app.instance().request(reqwest::Method::PUT, &path), "v3").header(header::IF_MATCH, &etag);
        assert_eq!(Answer::of(late).await.status, 409);
        assert_eq!(app.get("acme", "A").await.value(), "v2");
        eventually(async || app.instance().service.resolver.flights() == (0, 0)).await;
        assert_eq!(app.world().calls(), Calls::default(), "Infisical has no part in this");
        assert_eq!(app.get("acme", "A").await.value(), "v2");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_from_the_far_future_is_not_believed() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "old")]);
        assert_eq!(app.get("acme", "A").await.value(), "old");
        app.stored(1).await;
        app.setup.backend.sql("UPDATE companies SET snapshot_at = snapshot_at + 2592000000").await;
        app.world().put(ENV, ACME, "A", "new");
        app.restart().await;
        let answer = app.get("acme", "A").await;
        assert_eq!((answer.value().as_str(), answer.tier()), ("new", "infisical"));
        app.restart().await;
        let copy = app.get("acme", "A").await;
        assert_eq!((copy.value().as_str(), copy.tier()), ("new", "database"), "and it does not stay");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_of_a_key_that_the_database_owns_neither_lifts_a_denial_nor_asks_again() {
    let rule = "[[rules]]\nkeys = \"LOCAL_*\"\nphase = \"database\"\n";
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).with(rule).start().await;
        app.holds("acme", &[("K", "k")]);
        assert_eq!(app.get("acme", "K").await.value(), "k");
        app.stored(1).await;
        app.world().set_rights(&app.identity, Rights::NoAccess);
        let denied = (503, "upstream_denied".to_owned());
        assert_eq!(app.get_fresh("acme", "K").await.problem(), denied);
        app.world().mark();
        for _ in 0..3 {
            assert_eq!(app.get("acme", "LOCAL_X").await.problem(), (404, "secret_not_found".to_owned()));
            assert_eq!(app.get("acme", "K").await.problem(), denied);
        }
        assert_eq!(app.world().calls_since_mark().list, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_that_one_instance_met_holds_at_another_whose_memory_is_old() {
    on_both(async |backend| {
        let app = Setup { upstream_timeout: "2s", ..Setup::new(backend, Phase::Hybrid) }.start().await;
        app.holds("acme", &[("A", "1")]);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.stored(1).await;
        let beside = app.another().await;
        assert_eq!(app.get_from(&beside, "acme", "A").await.value(), "1");
        app.world().set_rights(&app.identity, Rights::NoAccess);
        let denied = (503, "upstream_denied".to_owned());
        assert_eq!(app.get_fresh("acme", "A").await.problem(), denied);

        app.world().fault(Fault::Hang);
        app.advance(PAST_TTL);
        // Who has a copy in memory does not wait long for the database that knows better.
        eventually(async || app.get_from(&beside, "acme", "A").await.status == 503).await;
        for _ in 0..3 {
            assert_eq!(app.get_from(&beside, "acme", "A").await.problem(), denied);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_key_outlives_an_outage_in_memory_and_is_refreshed_after_it() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Infisical).start().await;
        app.holds("acme", &[("A", "old")]);
        assert_eq!(app.get("acme", "A").await.value(), "old");
        app.infisical.stop().await;
        app.advance(PAST_TTL);
        app.world().mark();
        for _ in 0..50 {
            assert_eq!(app.get("acme", "A").await.value(), "old");
        }
        assert_eq!(app.world().calls_since_mark().total(), 0);

        app.world().put(ENV, ACME, "A", "new");
        app.infisical.restart().await.unwrap();
        app.advance(PAST_PAUSES);
        becomes(&app, "A", "new").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_met_an_outage_leaves_the_copies_for_after_a_restart() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "1"), ("B", "2")]);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.stored(2).await;
        app.infisical.stop().await;
        assert_eq!(app.put("acme", "A", "new").await.problem(), (503, "unavailable".to_owned()));
        app.restart().await;
        for (key, value) in [("A", "1"), ("B", "2")] {
            let copy = app.get("acme", key).await;
            assert_eq!((copy.value().as_str(), copy.tier()), (value, "database"));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_folder_of_all_tenants_none_is_absent_and_no_copy_goes() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).with(FORGETFUL).start().await;
        app.holds("acme", &[("A", "1")]);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.stored(1).await;
        app.world().delete_folder(ENV, "/tenants");
        app.advance(PAST_PAUSES);
        for _ in 0..2 {
            assert_eq!(app.get("nobody", "A").await.problem(), (503, "unavailable".to_owned()));
            assert_eq!(app.refresh("acme").await.problem(), (503, "unavailable".to_owned()));
            assert_eq!(app.get_fresh("acme", "A").await.value(), "1");
            assert_eq!(app.rows().await, 1);
            app.restart().await;
        }
        assert_eq!(app.get("acme", "A").await.tier(), "database");
    })
    .await;
}

/// Waits until a secret of `acme` has this value; it must be servable all the while.
async fn becomes(app: &TestApp, key: &str, value: &str) {
    let deadline = Instant::now() + HANGS;
    loop {
        let answer = app.get("acme", key).await;
        if answer.value() == value {
            return;
        }
        // The tiers tell why, if anything does.
        let status = answer.header("cache-status").to_owned();
        assert!(Instant::now() < deadline, "{status} {}", app.explain("acme", key).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
