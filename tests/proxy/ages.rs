//! How old an answer may be, and what it says about its age.

use std::time::Duration;

use reqwest::{Method, header};
use secretier::{clock::Clock, phase::Phase, tiers::upstream::standin::Route};

use crate::app::{Answer, ENV, FORGETFUL, Setup, eventually, on_both, secret};

const ACME: &str = "/tenants/acme";

#[tokio::test(flavor = "multi_thread")]
async fn past_its_ttl_memory_leaves_the_answer_to_the_database() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).with(FORGETFUL).start().await;
        app.holds("acme", &[("A", "1")]);
        assert_eq!(app.get("acme", "A").await.tier(), "infisical");
        app.stored(1).await;
        app.advance(Duration::from_secs(299));
        let remembered = app.get("acme", "A").await;
        assert!(remembered.header("cache-status").starts_with("memory; hit; ttl="), "{remembered:?}");
        assert!((299..310).contains(&remembered.age()), "{remembered:?}");

        app.advance(Duration::from_secs(2));
        app.world().mark();
        let copied = app.get("acme", "A").await;
        assert_eq!((copied.value().as_str(), copied.tier()), ("1", "database"));
        assert!((301..400).contains(&copied.age()), "{copied:?}");
        let status = copied.header("cache-status");
        assert!(status.starts_with("database; hit; ttl=5") && status.ends_with(", memory; fwd=miss"), "{status}");
        assert_eq!(app.world().calls_since_mark().total(), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn past_its_ttl_memory_leaves_the_answer_to_infisical_in_phase_infisical() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Infisical).with(FORGETFUL).start().await;
        app.holds("acme", &[("A", "1")]);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.world().put(ENV, ACME, "A", "2");
        app.advance(Duration::from_secs(299));
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.advance(Duration::from_secs(2));
        assert_eq!(app.get("acme", "A").await.value(), "2");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_copy_is_answered_at_once_and_refreshed_behind_the_answer() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).with(FORGETFUL).start().await;
        app.holds("acme", &[("A", "1")]);
        let first = app.get("acme", "A").await;
        assert_eq!(first.value(), "1");
        app.stored(1).await;
        app.world().put(ENV, ACME, "A", "2");
        app.advance(Duration::from_mins(14));
        app.world().mark();
        assert_eq!(app.get("acme", "A").await.value(), "1");
        assert_eq!(app.world().calls_since_mark().total(), 0, "not stale yet");

        app.advance(Duration::from_mins(2));
        let gate = app.world().gate(Route::List);
        let stale = app.get("acme", "A").await;
        assert_eq!((stale.value().as_str(), stale.tier()), ("1", "database"));
        assert!(stale.age() >= 960 && stale.header("cache-status").starts_with("database; hit; ttl=-"), "{stale:?}");
        gate.arrived(1).await;
        gate.open();
        eventually(async || app.get("acme", "A").await.value() == "2").await;
        assert_ne!(app.get("acme", "A").await.etag(), first.etag());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_older_than_max_stale_is_served_when_upstream_is_down() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "1")]);
            assert_eq!(app.get("acme", "A").await.value(), "1");
            if phase == Phase::Hybrid {
                app.stored(1).await;
            }
            app.infisical.stop().await;
            app.advance(Duration::from_mins(23 * 60 + 50));
            let old = app.get("acme", "A").await;
            assert_eq!(old.value(), "1");
            assert!(old.age() > 23 * 3600);

            app.advance(Duration::from_mins(11));
            let too_old = app.get("acme", "A").await;
            assert_eq!(too_old.problem(), (503, "unavailable".to_owned()));
            assert!(too_old.header("retry-after").parse::<u64>().unwrap() >= 1);
            assert_eq!(app.ask_tenant("acme", "/secrets?values=true").await.status, 503);
            app.restart().await;
            assert_eq!(app.get("acme", "A").await.problem(), (503, "unavailable".to_owned()));

            app.infisical.restart().await.unwrap();
            app.advance(Duration::from_mins(1));
            assert_eq!(app.get("acme", "A").await.value(), "1");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_secret_is_found_once_negative_ttl_has_passed() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).with(FORGETFUL).start().await;
            app.holds("acme", &[("A", "1")]);
            assert_eq!(app.get("acme", "NEW").await.status, 404);
            app.world().put(ENV, ACME, "NEW", "n");
            app.world().mark();
            assert_eq!(app.get("acme", "NEW").await.status, 404, "known to be absent for a while");
            assert_eq!(app.world().calls_since_mark().total(), 0);
            app.advance(Duration::from_secs(31));
            // The first who asks may be told of the absence once more, if upstream is slow.
            eventually(async || app.get("acme", "NEW").await.status == 200).await;
            assert_eq!(app.world().calls_since_mark().list, 1);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_cache_revalidates_and_sees_a_change_at_once() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "1")]);
            let first = app.get("acme", "A").await;
            assert!(first.header("cache-status").starts_with("infisical; fwd=miss; fwd-status=200"), "{first:?}");
            if phase == Phase::Hybrid {
                app.stored(1).await;
            }
            app.advance(Duration::from_secs(60));
            let same = app.get_fresh("acme", "A").await;
            assert_eq!(same.value(), "1");
            assert!(same.header("cache-status").starts_with("infisical; fwd=request; fwd-status=304"), "{same:?}");
            assert!(same.age() < 60, "confirmed anew");

            app.world().put(ENV, ACME, "A", "2");
            let changed = app.get_fresh("acme", "A").await;
            assert_eq!(changed.value(), "2");
            assert!(changed.header("cache-status").contains("fwd=request; fwd-status=200"), "{changed:?}");
            assert_eq!(app.get("acme", "A").await.value(), "2");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_cache_in_phase_database_reads_the_database() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        app.put("acme", "A", "1").await;
        assert_eq!(app.get("acme", "A").await.value(), "1");
        let fresh = app.get_fresh("acme", "A").await;
        assert_eq!((fresh.value().as_str(), fresh.tier(), fresh.age()), ("1", "database", 0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_forbids_storing_it() {
    let app = Setup::new(crate::app::Backend::sqlite(), Phase::Hybrid).start().await;
    app.holds("acme", &[("A", "1")]);
    let known = app.get("acme", "A").await;
    let no_token = |path: &str| app.instance().request(Method::GET, path);
    let answers = [
        (200, app.request(Method::GET, &secret("acme", "A"))),
        (200, app.request(Method::GET, &secret("acme", "A")).header(header::ACCEPT, "text/plain")),
        (304, app.request(Method::GET, &secret("acme", "A")).header(header::IF_NONE_MATCH, known.etag())),
        (404, app.request(Method::GET, &secret("acme", "NONE"))),
        (400, app.request(Method::GET, &secret("Acme", "A"))),
        (401, no_token(&secret("acme", "A"))),
        (405, app.request(Method::PATCH, &secret("acme", "A"))),
        (404, app.request(Method::GET, "/nothing")),
        (200, app.request(Method::GET, "/v1/tenants/acme/secrets?values=true")),
        (200, app.request(Method::POST, "/v1/tenants/acme/secrets/batch-get").body("{\"keys\":[\"A\"]}")),
        (200, app.request(Method::PUT, &secret("acme", "A")).body("{\"value\":\"2\"}")),
        (204, app.request(Method::DELETE, &secret("acme", "A"))),
        (200, app.request(Method::GET, &format!("{}/explain", secret("acme", "A")))),
        (200, app.request(Method::GET, "/v1/tenants")),
        (200, app.request(Method::GET, "/openapi.json")),
        (200, app.request(Method::GET, "/metrics")),
        (200, no_token("/healthz")),
        (200, no_token("/readyz")),
    ];
    for (status, request) in answers {
        let answer = Answer::of(request).await;
        assert_eq!((answer.status, answer.header("cache-control")), (status, "no-store"), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_holds_the_etag_is_told_that_nothing_changed() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "1")]);
        let etag = app.get("acme", "A").await.etag().to_owned();
        let ask = async |held: &str| {
            Answer::of(app.request(Method::GET, &secret("acme", "A")).header(header::IF_NONE_MATCH, held)).await
        };
        for held in [etag.clone(), format!("\"other\", {etag}"), format!("W/{etag}"), "*".to_owned()] {
            let answer = ask(&held).await;
            assert_eq!((answer.status, answer.text.as_str(), answer.etag()), (304, "", etag.as_str()), "{held}");
        }
        assert_eq!(ask("\"other\"").await.value(), "1");
        app.put("acme", "A", "2").await;
        assert_eq!(ask(&etag).await.value(), "2");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_deleted_and_created_again_has_another_etag_though_upstream_counts_anew() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "1"), ("B", "b")]);
            let mut etags = vec![app.get("acme", "A").await.etag().to_owned()];
            for value in ["2", "3", "1"] {
                app.world().delete(ENV, ACME, "A");
                app.world().put(ENV, ACME, "A", value);
                let answer = app.get_fresh("acme", "A").await;
                assert_eq!(answer.value(), value);
                assert!(!etags.contains(&answer.etag().to_owned()), "{phase} {value}");
                etags.push(answer.etag().to_owned());
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_deleted_and_written_again_has_another_etag_in_the_database() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let mut etags = Vec::new();
        for value in ["1", "2", "1"] {
            let written = app.put("acme", "A", value).await;
            assert_eq!(written.status, 201);
            let read = app.get("acme", "A").await;
            assert_eq!((read.etag(), read.version()), (written.etag(), written.version()));
            assert!(!etags.contains(&read.etag().to_owned()), "{value}");
            etags.push(read.etag().to_owned());
            assert_eq!(app.delete("acme", "A").await.status, 204);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_value_keeps_version_and_etag_across_refreshes_and_restarts() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "1"), ("B", "b")]);
        app.get("acme", "A").await;
        app.stored(2).await;
        app.restart().await;
        let first = app.get("acme", "A").await;
        for round in 0..3 {
            // Another secret changes, so that the folder is sent whole.
            app.world().put(ENV, ACME, "B", &round.to_string());
            assert_eq!(app.refresh("acme").await.json()["changed"], true);
            let again = app.get_fresh("acme", "A").await;
            assert_eq!((again.version(), again.etag()), (first.version(), first.etag()));
            app.restart().await;
            let again = app.get("acme", "A").await;
            assert_eq!((again.version(), again.etag()), (first.version(), first.etag()));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_upstream_keeps_nobody_waiting_who_has_a_copy() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "1")]);
        app.get("acme", "A").await;
        app.stored(1).await;
        let gate = app.world().gate(Route::List);
        app.advance(Duration::from_mins(20));
        // A call that hung would be given up after the timeout of 30 s; this answers before.
        assert_eq!(app.get("acme", "A").await.value(), "1");
        gate.arrived(1).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_infisical_takes_for_the_time_changes_no_age() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            let clock = Clock::system();
            clock.advance(Duration::from_secs(60 * 60));
            app.world().set_clock(clock);
            app.holds("acme", &[("A", "1")]);
            for app_is_ahead in [false, true] {
                if app_is_ahead {
                    app.advance(Duration::from_secs(2 * 60 * 60));
                }
                for answer in [app.get_fresh("acme", "A").await, app.get("acme", "A").await] {
                    assert_eq!((answer.value().as_str(), answer.age() < 60), ("1", true), "{answer:?}");
                }
                assert_eq!(app.put("acme", "A", "1").await.status, 200);
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_clock_that_was_an_hour_ahead_are_no_copies_until_the_folder_is_read_again() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "1")]);
        app.advance(Duration::from_secs(60 * 60));
        assert_eq!(app.get("acme", "A").await.value(), "1");
        app.stored(1).await;
        // By the system's own clock again: the copy is from an hour ahead.
        let mut app = app.kill_and_start_again().await;
        app.infisical.stop().await;
        let answer = app.get("acme", "A").await;
        assert_eq!(answer.problem(), (503, "unavailable".to_owned()), "its age cannot be told");
        app.infisical.restart().await.unwrap();
        // Past the breaker's longest wait.
        app.advance(Duration::from_secs(60));
        assert_eq!(app.get("acme", "A").await.tier(), "infisical");
        app.infisical.stop().await;
        app.restart().await;
        assert_eq!(app.get("acme", "A").await.tier(), "database", "by a time that can be believed");
    })
    .await;
}
