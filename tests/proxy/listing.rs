//! Lists, overviews, explanations, and the API's own description.

use std::time::Duration;

use reqwest::Method;
use secretier::{
    phase::Phase,
    tiers::upstream::standin::{Fault, Route},
};
use serde_json::{Value, json};

use crate::{
    app::{Answer, Backend, ENV, Setup, TestApp, on_both},
    shared_folders::SHARED,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_map_is_every_value_by_its_key_and_its_etag_changes_exactly_when_it_does() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Database).start().await;
        let odd = "line\none, \"quoted\" \u{1F511}";
        let long = "x".repeat(200_000);
        for (key, value) in [("b", "1"), ("C \"c\"", odd), ("long", &long)] {
            app.put("acme", key, value).await;
        }
        let map = async |app: &TestApp| app.ask_tenant("acme", "/secrets?format=map").await;
        let first = map(&app).await;
        assert_eq!(first.json(), json!({ "C \"c\"": odd, "b": "1", "long": long }));
        // The same value once more is another version, and the same map.
        assert_eq!(app.put("acme", "b", "1").await.status, 200);
        assert_eq!(map(&app).await.etag(), first.etag());
        assert_eq!(map(&app).await.etag(), first.etag());
        let known = async |app: &TestApp, etag: &str| {
            let request = app.request(Method::GET, "/v1/tenants/acme/secrets?format=map").header("If-None-Match", etag);
            Answer::of(request).await
        };
        let same = known(&app, first.etag()).await;
        assert_eq!((same.status, same.text.as_str(), same.etag()), (304, "", first.etag()));
        app.put("globex", "b", "2").await;
        app.restart().await;
        assert_eq!(known(&app, first.etag()).await.status, 304, "it is the same after a restart");

        app.put("acme", "b", "2").await;
        let second = known(&app, first.etag()).await;
        assert_eq!((second.status, &second.json()["b"]), (200, &json!("2")));
        app.delete("acme", "b").await;
        let third = known(&app, second.etag()).await;
        assert_eq!((third.status, third.json().get("b")), (200, None));

        for wrong in ["format=list", "format=map&values=maybe", "format="] {
            let answer = app.ask_tenant("acme", &format!("/secrets?{wrong}")).await;
            assert_eq!(answer.problem(), (400, "invalid_query".to_owned()), "{wrong}");
        }
        assert_eq!(app.ask_tenant("none", "/secrets?format=map").await.status, 404);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_has_every_key_in_order_and_values_only_where_asked() {
    for phase in Phase::ALL {
        on_both(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            for key in ["b", "C", "a"] {
                app.put("acme", key, &format!("value of {key}")).await;
            }
            for _ in 0..2 {
                let keys = app.ask_tenant("acme", "/secrets").await;
                assert!(!keys.text.contains("value"), "{keys:?}");
                let list = app.ask_tenant("acme", "/secrets?values=true").await.json();
                let list = list["keys"].as_array().unwrap().clone();
                let names: Vec<_> = list.iter().map(|key| key["key"].as_str().unwrap()).collect();
                assert_eq!(names, ["C", "a", "b"]);
                for key in &list {
                    assert_eq!(key["value"], format!("value of {}", key["key"].as_str().unwrap()));
                    assert!(key["version"].as_i64().unwrap() >= 1);
                    humantime::parse_rfc3339(key["updated_at"].as_str().unwrap()).unwrap();
                }
                assert_eq!(app.ask_tenant("none", "/secrets").await.problem(), (404, "secret_not_found".to_owned()));
                app.restart().await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistyped_query_parameter_is_refused() {
    let app = Setup::new(Backend::sqlite(), Phase::Database).start().await;
    app.put("acme", "A", "1").await;
    for wrong in [
        "/secrets?value=true",
        "/secrets?values=yes",
        "/secrets?values",
        "/secrets?values=true&version=1",
        "/secrets/A?verison=1",
        "/secrets/A?version=0",
        "/secrets/A?version=one",
    ] {
        assert_eq!(app.ask_tenant("acme", wrong).await.problem(), (400, "invalid_query".to_owned()), "{wrong}");
    }
    assert_eq!(app.ask_tenant("acme", "/secrets/A?version=1").await.value(), "1");
    assert_eq!(app.ask_tenant("acme", "/secrets/A?version=2").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_of_what_the_database_owns_is_told_that_there_is_nothing_to_refresh() {
    on_both(async |backend| {
        let rule = "[[rules]]\ntenants = \"owned\"\nphase = \"database\"\n";
        let app = Setup::new(backend, Phase::Hybrid).with(rule).start().await;
        app.holds("owned", &[("A", "1")]);
        for tenant in ["owned", "owned"] {
            let answer = app.refresh(tenant).await;
            assert_eq!(answer.problem(), (409, "not_owned_upstream".to_owned()));
            assert_eq!(answer.header("retry-after"), "", "it is no better later");
            assert_eq!(app.put(tenant, "A", "2").await.status / 100, 2);
        }
        assert_eq!(app.refresh("nobody").await.status, 404);
    })
    .await;
    let app = Setup::new(Backend::sqlite(), Phase::Database).start().await;
    assert_eq!(app.refresh("nobody").await.status, 409, "whether or not there is such a tenant");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_that_a_switch_overtakes_is_told_that_the_database_owns_the_tenant() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "1")]);
        app.holds("globex", &[("A", "1")]);
        for tenant in ["acme", "globex"] {
            assert_eq!(app.get(tenant, "A").await.value(), "1");
        }
        app.stored(2).await;
        // Upstream answers one of the two reads, and fails the other.
        for (tenant, fails) in [("acme", false), ("globex", true)] {
            let gate = app.world().gate(Route::List);
            let switched = async {
                gate.arrived(1).await;
                app.set_phase(tenant, Some(Phase::Database)).await;
                app.followed().await;
                if fails {
                    app.world().fault(Fault::Status(500));
                }
                gate.open();
            };
            let (answer, ()) = tokio::join!(app.refresh(tenant), switched);
            assert_eq!(answer.problem(), (409, "not_owned_upstream".to_owned()), "{tenant}");
            app.world().clear_faults();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_of_what_was_given_back_reads_the_folder_whether_or_not_this_instance_has_followed() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "1")]);
        app.set_phase("acme", Some(Phase::Database)).await;
        assert_eq!(app.refresh("acme").await.problem(), (409, "not_owned_upstream".to_owned()));
        app.hand_over("acme", app.look("acme").await, None).await.unwrap();
        assert_eq!(app.refresh("acme").await.status, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_tenant_is_answered_for_without_a_read_of_any_other() {
    on_both(async |backend| {
        let rule = "[[rules]]\ntenants = \"i*\"\nphase = \"hybrid\"\n";
        let app = Setup::new(backend, Phase::Database).with(rule).start().await;
        app.holds("initech", &[("A", "1")]);
        for (tenant, key) in [("acme", "A"), ("acme", "B"), ("acme", "C"), ("globex", "A")] {
            assert_eq!(app.put(tenant, key, "1").await.status, 201);
        }
        assert_eq!(app.delete("acme", "C").await.status, 204);
        let read_all = async || {
            let metrics = app.metrics().await;
            metrics.lines().filter(|line| line.contains("call=\"companies\"")).map(str::to_owned).collect::<Vec<_>>()
        };
        let (before, lists) = (read_all().await, app.world().calls().to(Route::Folders));
        let one = app.ask_tenant("acme", "").await.json();
        assert_eq!((&one["keys"], &one["phase"]), (&json!(2), &json!("database")));
        let one = app.ask_tenant("initech", "").await.json();
        assert_eq!((&one["keys"], &one["phase"]), (&Value::Null, &json!("hybrid")));
        for nobody in ["nobody", "ingen"] {
            assert_eq!(app.ask_tenant(nobody, "").await.problem(), (404, "secret_not_found".to_owned()));
        }
        assert_eq!(read_all().await, before, "all rows were read for one tenant");
        assert_eq!(app.world().calls().to(Route::Folders) - lists, 1, "one list of folders serves all");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_picks_up_a_change() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "1")]);
            assert_eq!(app.get("acme", "A").await.value(), "1");
            app.holds("acme", &[("A", "2"), ("B", "b")]);
            assert_eq!(app.get("acme", "A").await.value(), "1");
            let refreshed = app.refresh("acme").await;
            assert_eq!(refreshed.json(), json!({"tenant": "acme", "keys": 2, "changed": true}));
            app.world().mark();
            assert_eq!(app.get("acme", "A").await.value(), "2");
            assert_eq!(app.get("acme", "B").await.value(), "b");
            assert_eq!(app.world().calls_since_mark().total(), 0);
            assert_eq!(app.refresh("none").await.problem(), (404, "secret_not_found".to_owned()));
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_overview_shows_each_tenant_with_phase_keys_and_age() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "1"), ("B", "2")]);
        app.holds("unread", &[("A", "1")]);
        app.set_phase("globex", Some(Phase::Database)).await;
        app.put("globex", "A", "1").await;
        app.get("acme", "A").await;
        app.stored(3).await;
        app.advance(Duration::from_secs(100));
        let all = app.ask(Method::GET, "/v1/tenants").await.json();
        let all = all["tenants"].as_array().unwrap();
        let shown: Vec<_> = all.iter().map(|tenant| (&tenant["tenant"], &tenant["phase"], &tenant["keys"])).collect();
        let (hybrid, database) = (json!("hybrid"), json!("database"));
        let expected = [
            (&json!("acme"), &hybrid, &json!(2)),
            (&json!("globex"), &database, &json!(1)),
            (&json!("unread"), &hybrid, &Value::Null),
        ];
        assert_eq!(shown, expected);
        assert!((100..200).contains(&all[0]["snapshot_age"].as_u64().unwrap()), "{all:?}");
        assert_eq!(app.ask_tenant("acme", "").await.json()["keys"], 2);
        assert_eq!(app.ask_tenant("none", "").await.problem(), (404, "secret_not_found".to_owned()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_infisical_has_all_secrets_the_tenants_row_does_not_count_them() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Infisical).start().await;
        assert_eq!(app.put("acme", "A", "1").await.status, 201);
        assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}companies").await, 1);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        assert_eq!(app.ask_tenant("acme", "").await.json()["keys"], 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_tells_what_each_tier_has_and_never_the_value() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "hush-hush")]);
        let states = async |app: &crate::app::TestApp, key: &str| {
            let told = app.explain("acme", key).await;
            assert!(!told.to_string().contains("hush"), "{told}");
            let state = |tier: &str| told[tier]["state"].as_str().unwrap().to_owned();
            (state("memory"), state("database"), told["answer"].as_str().unwrap().to_owned())
        };
        let (memory, database, answer) = states(&app, "A").await;
        assert_eq!((memory.as_str(), database.as_str()), ("nothing", "nothing"));
        assert!(answer.starts_with("upstream answers"), "{answer}");

        app.get("acme", "A").await;
        app.get("acme", "NONE").await;
        app.stored(1).await;
        let (memory, database, answer) = states(&app, "A").await;
        assert_eq!((memory.as_str(), database.as_str()), ("fresh", "fresh"));
        assert!(answer.starts_with("memory answers"), "{answer}");
        assert_eq!(states(&app, "NONE").await.0, "absent");

        app.advance(Duration::from_mins(16));
        let (memory, database, answer) = states(&app, "A").await;
        assert_eq!((memory.as_str(), database.as_str()), ("stale", "stale"));
        assert!(answer.contains("refreshed behind"), "{answer}");
        app.restart().await;
        assert_eq!(states(&app, "A").await.0, "nothing");
        app.advance(Duration::from_hours(24));
        assert_eq!(states(&app, "A").await.1, "expired");
        assert_eq!(app.world().value(ENV, "/tenants/acme", "A").as_deref(), Some("hush-hush"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_description_lists_every_route_and_each_is_answered() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Hybrid);
    setup.infisical = format!("webhook_secret = \"hush\"\n{SHARED}");
    let app = setup.start().await;
    app.holds("acme", &[("A", "1")]);
    app.holds("/hono-api", &[("A", "1")]);
    let described = app.ask(Method::GET, "/openapi.json").await.json();
    let mut routes = Vec::new();
    for (path, methods) in described["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys().filter(|word| *word != "parameters") {
            routes.push(format!("{} {path}", method.to_uppercase()));
            let path = path.replace("{tenant}", "acme").replace("{folder}", "hono-api").replace("{key}", "A");
            let method = method.to_uppercase().parse().unwrap();
            let answer = Answer::of(app.request(method, &path).body("{\"value\":\"1\"}")).await;
            assert!(!matches!(answer.status, 404 | 405 | 500..) || path.contains("/A"), "{path}: {answer:?}");
        }
    }
    routes.sort_unstable();
    let all = [
        "DELETE /v1/folders/{folder}/secrets/{key}",
        "DELETE /v1/tenants/{tenant}/secrets/{key}",
        "GET /healthz",
        "GET /metrics",
        "GET /openapi.json",
        "GET /readyz",
        "GET /v1/audit",
        "GET /v1/events",
        "GET /v1/folders",
        "GET /v1/folders/{folder}",
        "GET /v1/folders/{folder}/secrets",
        "GET /v1/folders/{folder}/secrets/{key}",
        "GET /v1/folders/{folder}/secrets/{key}/explain",
        "GET /v1/folders/{folder}/secrets/{key}/rotation",
        "GET /v1/folders/{folder}/secrets/{key}/valid",
        "GET /v1/folders/{folder}/secrets/{key}/versions",
        "GET /v1/rotations",
        "GET /v1/tenants",
        "GET /v1/tenants/{tenant}",
        "GET /v1/tenants/{tenant}/secrets",
        "GET /v1/tenants/{tenant}/secrets/{key}",
        "GET /v1/tenants/{tenant}/secrets/{key}/explain",
        "GET /v1/tenants/{tenant}/secrets/{key}/rotation",
        "GET /v1/tenants/{tenant}/secrets/{key}/valid",
        "GET /v1/tenants/{tenant}/secrets/{key}/versions",
        "GET /v1/whoami",
        "HEAD /healthz",
        "HEAD /metrics",
        "HEAD /openapi.json",
        "HEAD /readyz",
        "HEAD /v1/audit",
        "HEAD /v1/events",
        "HEAD /v1/folders",
        "HEAD /v1/folders/{folder}",
        "HEAD /v1/folders/{folder}/secrets",
        "HEAD /v1/folders/{folder}/secrets/{key}",
        "HEAD /v1/folders/{folder}/secrets/{key}/explain",
        "HEAD /v1/folders/{folder}/secrets/{key}/rotation",
        "HEAD /v1/folders/{folder}/secrets/{key}/valid",
        "HEAD /v1/folders/{folder}/secrets/{key}/versions",
        "HEAD /v1/rotations",
        "HEAD /v1/tenants",
        "HEAD /v1/tenants/{tenant}",
        "HEAD /v1/tenants/{tenant}/secrets",
        "HEAD /v1/tenants/{tenant}/secrets/{key}",
        "HEAD /v1/tenants/{tenant}/secrets/{key}/explain",
        "HEAD /v1/tenants/{tenant}/secrets/{key}/rotation",
        "HEAD /v1/tenants/{tenant}/secrets/{key}/valid",
        "HEAD /v1/tenants/{tenant}/secrets/{key}/versions",
        "HEAD /v1/whoami",
        "POST /v1/folders/{folder}/refresh",
        "POST /v1/folders/{folder}/secrets/batch-get",
        "POST /v1/folders/{folder}/secrets/{key}/rollback",
        "POST /v1/folders/{folder}/secrets/{key}/rotate",
        "POST /v1/folders/{folder}/secrets/{key}/rotation/abort",
        "POST /v1/folders/{folder}/secrets/{key}/rotation/promote",
        "POST /v1/folders/{folder}/secrets/{key}/rotation/retire",
        "POST /v1/folders/{folder}/secrets/{key}/rotation/retry",
        "POST /v1/folders/{folder}/secrets/{key}/rotation/rollback",
        "POST /v1/hooks/infisical",
        "POST /v1/tenants/{tenant}/refresh",
        "POST /v1/tenants/{tenant}/secrets/batch-get",
        "POST /v1/tenants/{tenant}/secrets/{key}/rollback",
        "POST /v1/tenants/{tenant}/secrets/{key}/rotate",
        "POST /v1/tenants/{tenant}/secrets/{key}/rotation/abort",
        "POST /v1/tenants/{tenant}/secrets/{key}/rotation/promote",
        "POST /v1/tenants/{tenant}/secrets/{key}/rotation/retire",
        "POST /v1/tenants/{tenant}/secrets/{key}/rotation/retry",
        "POST /v1/tenants/{tenant}/secrets/{key}/rotation/rollback",
        "PUT /v1/folders/{folder}/secrets/{key}",
        "PUT /v1/tenants/{tenant}/secrets/{key}",
    ];
    assert_eq!(routes, all);
}
