//! Writes: to the owner, seen at once, durable, and refused where they must be.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use reqwest::{
    Method,
    header::{self, HeaderName},
};
use secretier::{
    phase::Phase,
    tiers::upstream::standin::{Fault, Route},
};
use serde_json::json;

use crate::app::{Answer, Backend, ENV, Setup, TestApp, eventually, new_secret, on_both_and_before_october, secret};

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_seen_at_once_and_after_a_restart() {
    for phase in Phase::ALL {
        on_both_and_before_october(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            app.put("acme", "OTHER", "o").await;
            assert_eq!(app.get("acme", "A").await.status, 404);
            for (value, status) in [("1", 201), ("2", 200), ("2", 200), ("", 200)] {
                let written = app.put("acme", "A", value).await;
                assert_eq!((written.status, written.json()["key"].as_str()), (status, Some("A")), "{phase} {value}");
                assert_eq!(app.get("acme", "A").await.value(), value);
                app.restart().await;
                assert_eq!(app.get("acme", "A").await.value(), value);
            }
            assert_eq!(app.delete("acme", "A").await.status, 204);
            assert_eq!(app.get("acme", "A").await.status, 404);
            assert_eq!(app.delete("acme", "A").await.problem(), (404, "secret_not_found".to_owned()));
            app.restart().await;
            assert_eq!(app.get("acme", "A").await.status, 404);
            assert_eq!(app.get("acme", "OTHER").await.value(), "o");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writing_to_a_new_tenant_makes_its_folder() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both_and_before_october(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            assert_eq!(app.get("acme", "A").await.status, 404, "known not to exist");
            assert_eq!(app.put("acme", "A", "1").await.status, 201);
            assert_eq!(app.get("acme", "A").await.value(), "1");
            assert_eq!(app.world().secrets(ENV, "/tenants/acme"), [("A".to_owned(), "1".to_owned())]);
            assert_eq!(app.ask_tenant("acme", "").await.json()["tenant"], "acme");
        })
        .await;
    }
}

/// How things stand with a tenant whose name was mistyped: nobody has it.
async fn nothing_is_made(app: &TestApp, tenant: &str) {
    assert_eq!(app.ask(Method::GET, "/v1/tenants").await.text, "{\"tenants\":[]}");
    let rows = format!("SELECT count(*) FROM {{}}companies WHERE subdomain = '{tenant}'");
    assert_eq!(app.setup.backend.number(&rows).await, 0);
    assert!(!app.world().delete_folder(ENV, &format!("/tenants/{tenant}")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_to_a_tenant_that_nobody_knows_makes_none_unless_it_says_so() {
    for phase in Phase::ALL {
        on_both_and_before_october(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            let unknown = (404, "tenant_unknown".to_owned());
            for _ in 0..2 {
                let refused = app.put_known("acmee", "A", "1").await;
                assert_eq!(refused.problem(), unknown, "{phase}");
                assert!(refused.text.contains("create_tenant=true"), "{refused:?}");
            }
            let conditional = app.request(Method::PUT, &secret("acmee", "A")).header(header::IF_NONE_MATCH, "*");
            assert_eq!(Answer::of(conditional.json(&json!({"value": "1"}))).await.problem(), unknown);
            let said_no = format!("{}?create_tenant=false", secret("acmee", "A"));
            let said_no = app.request(Method::PUT, &said_no).json(&json!({"value": "1"}));
            assert_eq!(Answer::of(said_no).await.problem(), unknown);
            assert_eq!(app.ask(Method::DELETE, &secret("acmee", "A")).await.status, 404);
            let rollback = app.request(Method::POST, &format!("{}/rollback", secret("acmee", "A")));
            assert_eq!(Answer::of(rollback.json(&json!({"version": 1}))).await.status, 404);
            nothing_is_made(&app, "acmee").await;

            assert_eq!(app.put("acmee", "A", "1").await.status, 201);
            assert_eq!(app.put_known("acmee", "A", "2").await.status, 200);
            assert_eq!(app.put_known("acmee", "B", "1").await.status, 201);
            for wrong in ["create_tenant=yes", "create_tenants=true", "create_tenant"] {
                let path = format!("{}?{wrong}", secret("acmee", "A"));
                let answer = Answer::of(app.request(Method::PUT, &path).json(&json!({"value": "3"}))).await;
                assert_eq!(answer.problem(), (400, "invalid_query".to_owned()), "{wrong}");
            }
            assert_eq!(app.get("acmee", "A").await.value(), "2");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_upstream_or_the_database_knows_is_written_to() {
    for phase in Phase::ALL {
        on_both_and_before_october(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            // Read before there is such a folder, so that the list that is held lacks it.
            assert_eq!(app.put_known("acme", "A", "1").await.problem(), (404, "tenant_unknown".to_owned()));
            app.holds("acme", &[]);
            app.advance(Duration::from_secs(5));
            assert_eq!(app.put_known("acme", "A", "1").await.status, 201, "{phase}");
            // What the database knows needs no look upstream.
            app.put("globex", "A", "1").await;
            app.world().delete_folder(ENV, "/tenants/globex");
            app.world().mark();
            assert!(matches!(app.put_known("globex", "A", "2").await.status, 200 | 201), "{phase}");
            assert_eq!(app.world().calls_since_mark().to(Route::Folders), 0, "{phase}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_made_up_tenants_cost_few_lists_of_folders() {
    let app = Setup::new(Backend::sqlite(), Phase::Database).start().await;
    app.world().mark();
    for chunk in 0..20 {
        let puts: Vec<_> = (0..50).map(|number| format!("made-up-{chunk}-{number}")).collect();
        for answer in join_all(puts.iter().map(|tenant| app.put_known(tenant, "A", "1"))).await {
            assert_eq!(answer.problem(), (404, "tenant_unknown".to_owned()));
        }
    }
    // One in five seconds, however long the test takes.
    assert!(app.world().calls_since_mark().to(Route::Folders) < 100);
    assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}companies").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_upstream_cannot_tell_of_a_tenant_none_is_made() {
    for phase in Phase::ALL {
        on_both_and_before_october(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            assert_eq!(app.put("acme", "A", "1").await.status, 201);
            for fault in [Fault::Denied, Fault::Status(500)] {
                app.world().fault_on(Route::Folders, fault);
                app.advance(Duration::from_secs(60));
                let refused = app.put_known("acmee", "A", "1").await;
                assert_eq!(refused.status, 503, "{phase} {fault:?}: {refused:?}");
            }
            app.world().clear_faults();
            app.infisical.stop().await;
            app.advance(Duration::from_secs(60));
            assert_eq!(app.put_known("acmee", "A", "1").await.problem(), (503, "unavailable".to_owned()), "{phase}");
            let expected = if phase == Phase::Database { 200 } else { 503 };
            assert_eq!(app.put_known("acme", "A", "2").await.status, expected, "the database knows it");
            assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}companies WHERE subdomain = 'acmee'").await, 0);
            assert!(!app.world().delete_folder(ENV, "/tenants/acmee"));
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_proof_enough_where_the_list_of_folders_is_refused() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        let app = Setup::new(Backend::sqlite(), phase).start().await;
        app.holds("acme", &[("A", "1")]);
        app.world().fault_on(Route::Folders, Fault::Denied);
        assert_eq!(app.put_known("acme", "A", "2").await.status, 200);
        assert_eq!(app.put_known("acmee", "A", "2").await.status, 503);
    }
}

async fn put_if(app: &TestApp, key: &str, value: &str, condition: (HeaderName, &str)) -> Answer {
    let request = app.request(Method::PUT, &new_secret("acme", key)).header(condition.0, condition.1);
    Answer::of(request.json(&json!({ "value": value }))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_under_a_condition_that_does_not_hold_changes_nothing() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both_and_before_october(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            let conflict = (409, "version_conflict".to_owned());
            assert_eq!(put_if(&app, "A", "0", (header::IF_MATCH, "*")).await.problem(), conflict);
            assert_eq!(put_if(&app, "A", "0", (header::IF_MATCH, "\"x\"")).await.problem(), conflict);
            assert_eq!(app.get("acme", "A").await.status, 404);
            assert_eq!(put_if(&app, "A", "1", (header::IF_NONE_MATCH, "*")).await.status, 201);
            assert_eq!(put_if(&app, "A", "2", (header::IF_NONE_MATCH, "*")).await.problem(), conflict);
            if phase == Phase::Hybrid {
                app.stored(1).await;
            }
            let first = app.get_fresh("acme", "A").await;
            assert_eq!(first.value(), "1");
            assert_eq!(put_if(&app, "A", "2", (header::IF_MATCH, first.etag())).await.status, 200);
            assert_eq!(put_if(&app, "A", "3", (header::IF_MATCH, first.etag())).await.problem(), conflict);
            assert_eq!(put_if(&app, "A", "4", (header::IF_NONE_MATCH, first.etag())).await.status, 400);
            let second = app.get("acme", "A").await;
            assert_eq!(second.value(), "2");
            let delete = async |etag: &str| {
                Answer::of(app.request(Method::DELETE, &secret("acme", "A")).header(header::IF_MATCH, etag)).await
            };
            assert_eq!(delete(first.etag()).await.problem(), conflict);
            let listed = format!("{}, {}", first.etag(), app.get_fresh("acme", "A").await.etag());
            assert_eq!(delete(&listed).await.status, 204);
            assert_eq!(app.get("acme", "A").await.status, 404);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_fifty_writers_who_name_the_same_etag_exactly_one_wins() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both_and_before_october(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.put("acme", "A", "first").await;
            app.stored(1).await;
            let etag = app.get_fresh("acme", "A").await.etag().to_owned();
            let values: Vec<String> = (0..50).map(|writer| format!("writer {writer}")).collect();
            let writes = values.iter().map(|value| put_if(&app, "A", value, (header::IF_MATCH, &etag)));
            let statuses: Vec<u16> = join_all(writes).await.iter().map(|answer| answer.status).collect();
            let won: Vec<usize> = (0..50).filter(|&writer| statuses[writer] == 200).collect();
            assert_eq!(won.len(), 1, "{statuses:?}");
            assert_eq!(statuses.iter().filter(|&&status| status == 409).count(), 49, "{statuses:?}");
            assert_eq!(app.get_fresh("acme", "A").await.value(), values[won[0]]);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_another_form_is_refused() {
    on_both_and_before_october(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let bodies: [&[u8]; 15] = [
            b"",
            b"{",
            b"value",
            b"[]",
            b"[\"x\"]",
            b" \n[\"x\"]",
            b"null",
            b"{}",
            b"{\"value\":null}",
            b"{\"value\":1}",
            b"{\"valeu\":\"x\"}",
            b"{\"value\":\"x\",\"more\":\"y\"}",
            b"{\"value\":\"x\",\"value\":\"y\"}",
            b"{\"value\":\"\xff\"}",
            b"{\"value\":\"a\\ud800b\"}",
        ];
        for body in bodies {
            let answer = Answer::of(app.request(Method::PUT, &new_secret("acme", "A")).body(body.to_vec())).await;
            assert_eq!(answer.problem(), (400, "invalid_body".to_owned()), "{:?}", String::from_utf8_lossy(body));
        }
        assert_eq!(app.get("acme", "A").await.status, 404);
        for (below, list) in [("batch-get", "[[\"A\"]]"), ("A/rollback", "[1]")] {
            let path = format!("/v1/tenants/acme/secrets/{below}");
            let answer = Answer::of(app.request(Method::POST, &path).body(list)).await;
            assert_eq!(answer.problem(), (400, "invalid_body".to_owned()), "{below}");
        }
        let nul =
            Answer::of(app.request(Method::PUT, &new_secret("acme", "A")).body("{\"value\":\"a\\u0000b\"}")).await;
        assert_eq!(nul.status, 201);
        assert_eq!(app.get("acme", "A").await.value(), "a\0b");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_larger_than_allowed_is_refused_and_the_largest_is_not() {
    on_both_and_before_october(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let largest = "x".repeat(1 << 20);
        assert_eq!(app.put("acme", "A", &format!("{largest}x")).await.problem(), (413, "value_too_large".to_owned()));
        let larger = app.put("acme", "A", &"x".repeat(5 << 20)).await;
        assert_eq!(larger.problem(), (413, "value_too_large".to_owned()));
        assert_eq!(app.get("acme", "A").await.status, 404);
        assert_eq!(app.put("acme", "A", &largest).await.status, 201);
        assert_eq!(app.get("acme", "A").await.value(), largest);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_of_900_kilobytes_comes_back_as_it_was() {
    let value: String = (0..900_000_u32).map(|at| char::from(b'!' + (at * 7 % 90) as u8)).collect();
    for phase in Phase::ALL {
        on_both_and_before_october(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            assert_eq!(app.put("acme", "LARGE", &value).await.status, 201);
            assert!(app.get("acme", "LARGE").await.value() == value);
            app.restart().await;
            assert!(app.get("acme", "LARGE").await.value() == value);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_infisical_would_alter_is_refused_by_name_and_stored_exactly_by_the_database() {
    let values = [" leading", "trailing ", "two lines\n\n", "\ttab", "dos\r\n", " "];
    on_both_and_before_october(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        for value in values {
            assert!(matches!(app.put("acme", "A", value).await.status, 200 | 201));
            assert_eq!(app.get("acme", "A").await.value(), value);
        }
    })
    .await;
    on_both_and_before_october(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        assert_eq!(app.put("acme", "A", "one line\n").await.status, 201);
        for value in values {
            let refused = app.put("acme", "A", value).await;
            assert_eq!(refused.problem(), (400, "invalid_body".to_owned()), "{value:?}");
            assert!(refused.json()["detail"].as_str().unwrap().contains("Infisical"), "{refused:?}");
            assert_eq!(app.get("acme", "A").await.value(), "one line\n");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_failed_takes_no_copy_away() {
    on_both_and_before_october(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "1"), ("B", "2")]);
        app.get("acme", "A").await;
        app.stored(2).await;
        assert_eq!(app.put("acme", "A", " blank").await.status, 400);
        app.infisical.stop().await;
        assert_eq!(app.put("acme", "A", "new").await.problem(), (503, "unavailable".to_owned()));
        assert_eq!(app.delete("acme", "A").await.problem(), (503, "unavailable".to_owned()));
        app.restart().await;
        for (key, value) in [("A", "1"), ("B", "2")] {
            let answer = app.get("acme", key).await;
            assert_eq!((answer.value().as_str(), answer.tier()), (value, "database"));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_changes_nothing_makes_no_tenant() {
    for phase in Phase::ALL {
        on_both_and_before_october(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            assert_eq!(app.delete("nobody", "A").await.status, 404);
            assert_eq!(put_if(&app, "A", "1", (header::IF_MATCH, "*")).await.status, 409);
            if phase != Phase::Database {
                assert_eq!(app.put("nobody", "A", " blank").await.status, 400);
            }
            assert_eq!(app.ask(Method::GET, "/v1/tenants").await.text, "{\"tenants\":[]}");
            assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}companies").await, 0);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_what_was_already_deleted_upstream_makes_it_gone_here_too() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both_and_before_october(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "1"), ("B", "2")]);
            assert_eq!(app.get("acme", "A").await.value(), "1");
            app.world().delete(ENV, "/tenants/acme", "A");
            assert_eq!(app.delete("acme", "A").await.status, 404);
            assert_eq!(app.get("acme", "A").await.status, 404);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_during_a_write_leaves_no_old_value_behind() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both_and_before_october(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "1")]);
            assert_eq!(app.get("acme", "A").await.value(), "1");
            let app = Arc::new(app);
            let gate = app.world().gate_answers(Route::Write);
            let writing = {
                let app = Arc::clone(&app);
                tokio::spawn(async move { app.put("acme", "A", "2").await })
            };
            gate.arrived(1).await;
            writing.abort();
            gate.open();
            // Nobody was told that it was written, but it was.
            eventually(async || app.get("acme", "A").await.value() == "2").await;
        })
        .await;
    }
}
