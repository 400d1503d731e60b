//! References in values: whose they are, where they lead, and that nobody reaches more by one.

use std::time::Duration;

use reqwest::Method;
use secretier::{
    access::{Action, NewToken},
    phase::Phase,
    tiers::upstream::standin::Fault,
};
use serde_json::{Value, json};

use crate::app::{Answer, Backend, ENV, Setup, TestApp, eventually, on_both, secret};

/// A token for some keys of acme.
async fn token_for(app: &TestApp, keys: &str) -> String {
    let new = NewToken {
        name: format!("of {keys}"),
        tenants: vec!["acme".to_owned()],
        keys: vec![keys.to_owned()],
        actions: Action::ALL.to_vec(),
        lifetime: None,
    };
    let (token, row) = new.draw(app.instance().clock.now()).unwrap();
    app.instance().service.resolver.database().insert_token(&row).await.unwrap();
    app.instance().service.access.reload().await.unwrap();
    token.expose().to_owned()
}

async fn put_by(app: &TestApp, token: &str, key: &str, value: &str) -> Answer {
    let request = app.instance().request(Method::PUT, &secret("acme", key)).bearer_auth(token);
    Answer::of(request.json(&json!({ "value": value }))).await
}

async fn get_by(app: &TestApp, token: &str, path: &str) -> Answer {
    Answer::of(app.instance().request(Method::GET, path).bearer_auth(token)).await
}

fn stocked(app: &TestApp) {
    app.holds("acme", &[("A_OWN", "a"), ("OTHER", "other-of-acme"), ("A_OF_OWNER", "<${OTHER}>")]);
    app.holds("globex", &[("STRIPE_SECRET_KEY", "value-of-globex")]);
    app.world().put(ENV, "/hono-api", "MASTER_ENCRYPTION_KEY", "the-master-key");
    app.world().put("dev", "/tenants/acme", "A_OWN", "value-of-dev");
}

const SECRETS: [&str; 4] = ["other-of-acme", "value-of-globex", "the-master-key", "value-of-dev"];

#[tokio::test(flavor = "multi_thread")]
async fn no_text_that_a_token_writes_gives_it_what_it_does_not_reach() {
    let texts = [
        "${prod.tenants.globex.STRIPE_SECRET_KEY}",
        "${prod.hono-api.MASTER_ENCRYPTION_KEY}",
        "${dev.tenants.acme.A_OWN}",
        "${prod.tenants.acme.OTHER}",
        "${OTHER}",
        "${ OTHER }",
        "x${A_OWN}${OTHER}",
        "${A_OWN${OTHER}}",
        "${${OTHER}}",
        "$${OTHER}",
        "${prod.tenants.acme.A_OWN}",
    ];
    for phase in Phase::ALL {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            stocked(&app);
            if phase == Phase::Database {
                for (key, value) in app.world().secrets(ENV, "/tenants/acme") {
                    app.put("acme", &key, &value).await;
                }
            }
            let token = token_for(&app, "A*").await;
            let before = app.world().secrets(ENV, "/tenants/acme");
            for text in texts {
                let written = put_by(&app, &token, "A_NEW", text).await;
                if phase.owned_upstream() {
                    assert_eq!(written.problem(), (400, "reference_not_allowed".to_owned()), "{phase} {text}");
                    assert_eq!(app.world().secrets(ENV, "/tenants/acme"), before, "{phase} {text}");
                } else {
                    assert!(matches!(written.status, 200 | 201), "{written:?}");
                    let read = get_by(&app, &token, &secret("acme", "A_NEW")).await;
                    assert_eq!(read.value(), text, "what the database owns is text");
                }
                for path in [secret("acme", "A_NEW"), "/v1/tenants/acme/secrets?values=true".to_owned()] {
                    let read = get_by(&app, &token, &path).await;
                    let mut reached = SECRETS.to_vec();
                    // The owner of the folder lets A_OF_OWNER tell it.
                    if phase.owned_upstream() {
                        reached.remove(0);
                    }
                    assert!(!reached.iter().any(|value| read.text.contains(value)), "{phase} {text}: {read:?}");
                }
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_refers_to_what_it_reaches() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            stocked(&app);
            let token = token_for(&app, "A*").await;
            assert_eq!(put_by(&app, &token, "A_NEW", "[${A_OWN}]").await.status, 201);
            assert_eq!(get_by(&app, &token, &secret("acme", "A_NEW")).await.value(), "[a]");
            assert_eq!(app.world().value(ENV, "/tenants/acme", "A_NEW").unwrap(), "[${A_OWN}]", "as it was written");
            for text in ["price: $5", "${", "${}", "{A}", "$&", "a${ }b"] {
                let written = put_by(&app, &token, "A_NEW", text).await;
                assert_eq!(written.status, 200, "{text}: {written:?}");
                assert_eq!(get_by(&app, &token, &secret("acme", "A_NEW")).await.value(), text);
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_folders_owner_refers_to_comes_by_every_route() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            stocked(&app);
            let token = token_for(&app, "A_OF*").await;
            for _ in 0..2 {
                assert_eq!(get_by(&app, &token, &secret("acme", "A_OF_OWNER")).await.value(), "<other-of-acme>");
                let list = get_by(&app, &token, "/v1/tenants/acme/secrets?values=true").await.json();
                assert_eq!(list["keys"][0]["value"], "<other-of-acme>");
                let batch = app.instance().request(Method::POST, "/v1/tenants/acme/secrets/batch-get");
                let batch = Answer::of(batch.bearer_auth(&token).json(&json!({"keys": ["A_OF_OWNER"]}))).await.json();
                assert_eq!(batch["secrets"][0]["value"], "<other-of-acme>");
                app.restart().await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_seen_at_once_in_what_refers_to_it() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("HOST", "one"), ("URL", "pg://${HOST}/x"), ("OUTER", "[${URL}]")]);
            let first = app.get("acme", "OUTER").await;
            assert_eq!(first.value(), "[pg://one/x]");
            for host in ["two", "three"] {
                assert_eq!(app.put("acme", "HOST", host).await.status, 200);
                let outer = app.get("acme", "OUTER").await;
                assert_eq!(outer.value(), format!("[pg://{host}/x]"));
                assert_ne!(outer.etag(), first.etag(), "another value has another validator");
                let list = app.ask_tenant("acme", "/secrets?values=true").await.json();
                let url = list["keys"].as_array().unwrap().iter().find(|key| key["key"] == "URL").unwrap();
                assert_eq!(url["value"], format!("pg://{host}/x"));
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_with_references_are_served_while_infisical_is_down() {
    on_both(async |backend| {
        let mut setup = Setup::new(backend, Phase::Hybrid);
        setup.infisical = "references = [\"/shared\"]".to_owned();
        let mut app = setup.start().await;
        app.world().put(ENV, "/shared", "REGION", "eu");
        app.holds("acme", &[("HOST", "db"), ("URL", "pg://${HOST}/${prod.shared.REGION}")]);
        assert_eq!(app.get("acme", "URL").await.value(), "pg://db/eu");
        app.stored(2).await;
        app.infisical.stop().await;
        app.restart().await;
        let copied = app.get("acme", "URL").await;
        assert_eq!((copied.value().as_str(), copied.tier()), ("pg://db/eu", "database"));
        let list = app.ask_tenant("acme", "/secrets?values=true").await.json();
        assert_eq!(list["keys"][1]["value"], "pg://db/eu");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_folder_is_reached_only_where_the_configuration_lists_it() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut setup = Setup::new(backend, phase);
            setup.infisical = "references = [\"/shared\"]".to_owned();
            let app = setup.start().await;
            stocked(&app);
            app.world().put(ENV, "/shared", "DSN", "https://${HOST}/1");
            app.world().put(ENV, "/shared", "HOST", "sentry");
            app.world().put("dev", "/shared", "HOST", "of-dev");
            let texts = [
                ("LISTED", "<${prod.shared.DSN}>", "<https://sentry/1>"),
                ("TENANT", "${prod.tenants.globex.STRIPE_SECRET_KEY}", "${prod.tenants.globex.STRIPE_SECRET_KEY}"),
                ("MASTER", "${prod.hono-api.MASTER_ENCRYPTION_KEY}", "${prod.hono-api.MASTER_ENCRYPTION_KEY}"),
                ("ENVIRONMENT", "${dev.shared.HOST}", "${dev.shared.HOST}"),
                ("NOWHERE", "${prod.shared.NONE}", "${prod.shared.NONE}"),
            ];
            for (key, text, _) in texts {
                app.world().put(ENV, "/tenants/acme", key, text);
            }
            for (key, _, value) in texts {
                assert_eq!(app.get("acme", key).await.value(), value, "{key}");
            }
            assert_eq!(app.get("acme", "OTHER").await.value(), "other-of-acme", "nobody is harmed");
            for (key, reason) in [("TENANT", "not_allowed"), ("ENVIRONMENT", "not_allowed"), ("NOWHERE", "not_there")] {
                let explained = app.explain("acme", key).await;
                assert_eq!(explained["unresolved"], reason, "{explained}");
            }
            assert_eq!(app.explain("acme", "LISTED").await["unresolved"], Value::Null);
            let metrics = app.metrics().await;
            assert!(metrics.contains("secretier_references_unresolved_total{reason=\"not_allowed\"}"), "{metrics}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_in_a_folder_that_values_refer_to_comes_in_with_the_next_read() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut setup = Setup::new(backend, phase);
            setup.infisical = "references = [\"/shared\"]".to_owned();
            let app = setup.start().await;
            app.world().put(ENV, "/shared", "REGION", "eu");
            app.holds("acme", &[("URL", "x-${prod.shared.REGION}")]);
            assert_eq!(app.get("acme", "URL").await.value(), "x-eu");
            app.world().put(ENV, "/shared", "REGION", "us");
            app.advance(Duration::from_secs(61));
            assert_eq!(app.refresh("acme").await.status, 200);
            assert_eq!(app.get("acme", "URL").await.value(), "x-us");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_version_comes_back_as_its_text_and_by_whom_a_write_of_it_may_be() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "[${OTHER}]"), ("OTHER", "one")]);
        assert_eq!(app.get("acme", "A").await.value(), "[one]");
        app.stored(2).await;
        app.world().put(ENV, "/tenants/acme", "A", "plain");
        app.world().put(ENV, "/tenants/acme", "OTHER", "two");
        assert_eq!(app.refresh("acme").await.status, 200);
        eventually(async || app.get("acme", "A").await.version() == 2).await;
        let older = app.ask(Method::GET, &format!("{}?version=1", secret("acme", "A"))).await;
        assert_eq!(older.value(), "[two]", "a version is its text, and stands for what that refers to by now");

        let token = token_for(&app, "A*").await;
        let path = format!("{}/rollback", secret("acme", "A"));
        let by =
            |token: &str| app.instance().request(Method::POST, &path).bearer_auth(token).json(&json!({"version": 1}));
        assert_eq!(Answer::of(by(&token)).await.problem(), (400, "reference_not_allowed".to_owned()));
        assert_eq!(app.world().value(ENV, "/tenants/acme", "A").unwrap(), "plain");
        assert_eq!(Answer::of(by(&app.token)).await.status, 200);
        assert_eq!(app.world().value(ENV, "/tenants/acme", "A").unwrap(), "[${OTHER}]");
        assert_eq!(app.get("acme", "A").await.value(), "[two]");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_the_database_took_refers_to_nothing_after_the_tenant_has_changed_hands() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A_OWN", "a"), ("OTHER", "other-of-acme")]);
        app.get("acme", "A_OWN").await;
        app.stored(2).await;
        app.set_phase("acme", Some(Phase::Database)).await;
        let token = token_for(&app, "A*").await;
        assert_eq!(put_by(&app, &token, "A_OWN", "${OTHER}").await.status, 200);
        assert_eq!(get_by(&app, &token, &secret("acme", "A_OWN")).await.value(), "${OTHER}");
        app.set_phase("acme", Some(Phase::Hybrid)).await;
        for below in ["", "?version=1", "?version=2", "?version=3", "/versions", "/explain"] {
            let read = get_by(&app, &token, &format!("{}{below}", secret("acme", "A_OWN"))).await;
            assert!(!read.text.contains("other-of-acme"), "{below}: {read:?}");
        }
        let path = format!("{}/rollback", secret("acme", "A_OWN"));
        let back = app.instance().request(Method::POST, &path).bearer_auth(&token).json(&json!({"version": 2}));
        let back = Answer::of(back).await;
        assert_eq!(back.problem(), (400, "reference_not_allowed".to_owned()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_the_database_owns_is_served_what_its_references_stood_for() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("HOST", "db"), ("URL", "pg://${HOST}"), ("DANGLES", "${NONE}")]);
        app.get("acme", "URL").await;
        app.stored(3).await;
        app.set_phase("acme", Some(Phase::Database)).await;
        assert_eq!(app.put("acme", "HOST", "elsewhere").await.status, 200);
        assert_eq!(app.get("acme", "URL").await.value(), "pg://db", "what changes in the other does not follow");
        assert_eq!(app.get("acme", "DANGLES").await.value(), "${NONE}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_outlives_a_folder_it_refers_to_that_fails_and_no_longer_than_any_copy() {
    on_both(async |backend| {
        let mut app = with_a_reference_to_shared(backend).await;
        app.world().fault_at("/shared", Fault::Status(500));
        app.restart().await;
        // Each look reads the tenant's own folder, and none makes the copy younger.
        for _ in 0..7 {
            app.advance(Duration::from_hours(3));
            assert_eq!(app.get("acme", "URL").await.value(), "x-eu");
            assert_eq!(app.get("acme", "OTHER").await.value(), "other-of-acme");
            app.refresh("acme").await;
        }
        app.advance(Duration::from_hours(4));
        assert_eq!(app.get("acme", "URL").await.problem(), (503, "secret_unavailable".to_owned()));
        assert_eq!(app.get("acme", "OTHER").await.value(), "other-of-acme", "it costs only those that refer to it");
        app.world().clear_faults();
        app.advance(Duration::from_secs(61));
        eventually(async || app.get("acme", "URL").await.status == 200).await;
        assert_eq!(app.get("acme", "URL").await.value(), "x-eu");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_refers_to_a_folder_that_is_refused_is_served_no_more() {
    on_both(async |backend| {
        let app = with_a_reference_to_shared(backend).await;
        app.world().fault_at("/shared", Fault::Denied);
        app.advance(Duration::from_secs(61));
        app.refresh("acme").await;
        assert_eq!(app.get("acme", "URL").await.problem(), (503, "secret_unavailable".to_owned()));
        assert_eq!(app.get("acme", "OTHER").await.value(), "other-of-acme");
        // An outage does not bring it back.
        app.world().clear_faults();
        app.world().fault(Fault::Down);
        app.advance(Duration::from_secs(61));
        assert_eq!(app.get("acme", "URL").await.status, 503);
        assert_eq!(app.get("acme", "OTHER").await.value(), "other-of-acme");
    })
    .await;
}

/// Acme, in memory and as a copy, with a value that refers to a listed folder.
async fn with_a_reference_to_shared(backend: Backend) -> TestApp {
    let mut setup = Setup::new(backend, Phase::Hybrid);
    setup.infisical = "references = [\"/shared\"]".to_owned();
    let app = setup.start().await;
    app.world().put(ENV, "/shared", "REGION", "eu");
    app.holds("acme", &[("URL", "x-${prod.shared.REGION}"), ("OTHER", "other-of-acme")]);
    assert_eq!(app.get("acme", "URL").await.value(), "x-eu");
    app.stored(2).await;
    app
}
