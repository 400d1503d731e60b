//! Tenants apart: who may ask for whom, and rows that were moved or damaged.

use reqwest::Method;
use secretier::{access::Action, phase::Phase};

use crate::app::{Answer, Backend, Setup, TestApp, on_both, secret};

#[tokio::test(flavor = "multi_thread")]
async fn a_token_reaches_its_tenants_and_actions_only_and_nothing_is_looked_up_for_others() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        for tenant in ["acme", "acme-eu", "globex"] {
            app.holds(tenant, &[("A", tenant)]);
        }
        let reader = app.new_token("reader", &["acme*"], &[Action::Read]).await;
        let writer = app.new_token("writer", &["acme"], &[Action::Write]).await;
        let ask = async |token: &str, method: Method, path: &str| {
            Answer::of(app.instance().request(method, path).bearer_auth(token).body("{\"value\":\"x\"}")).await
        };
        let refused = (403, "out_of_scope".to_owned());
        app.world().mark();
        for tenant in ["globex", "nobody"] {
            for below in ["/secrets/A", "/secrets/NONE", "/secrets", "/secrets/A/explain", ""] {
                let path = format!("/v1/tenants/{tenant}{below}");
                assert_eq!(ask(&reader, Method::GET, &path).await.problem(), refused, "{path}");
            }
            for below in ["/secrets/batch-get", "/refresh"] {
                let path = format!("/v1/tenants/{tenant}{below}");
                assert_eq!(ask(&reader, Method::POST, &path).await.problem(), refused, "{path}");
            }
            assert_eq!(ask(&writer, Method::PUT, &secret(tenant, "A")).await.problem(), refused);
        }
        assert_eq!(ask(&reader, Method::PUT, &secret("acme", "A")).await.problem(), refused);
        assert_eq!(ask(&reader, Method::DELETE, &secret("acme", "A")).await.problem(), refused);
        assert_eq!(ask(&writer, Method::GET, &secret("acme", "A")).await.problem(), refused);
        assert_eq!(ask(&writer, Method::GET, "/v1/tenants").await.problem(), refused);
        assert_eq!(app.world().calls_since_mark().total(), 0, "nothing was looked up");

        assert_eq!(ask(&reader, Method::GET, &secret("acme-eu", "A")).await.value(), "acme-eu");
        assert_eq!(ask(&writer, Method::PUT, &secret("acme", "A")).await.status, 200);
        let seen = ask(&reader, Method::GET, "/v1/tenants").await.json();
        let seen: Vec<_> = seen["tenants"].as_array().unwrap().iter().map(|tenant| &tenant["tenant"]).collect();
        assert_eq!(seen, ["acme", "acme-eu"]);
    })
    .await;
}

const TENANTS: [&str; 2] = ["acme", "globex"];

/// Two tenants with a secret of the same name, which stands in the database.
async fn neighbours(backend: Backend, phase: Phase) -> TestApp {
    let app = Setup::new(backend, phase).start().await;
    for tenant in TENANTS {
        assert_eq!(app.put(tenant, "A", &format!("of {tenant}")).await.status, 201);
        assert_eq!(app.get(tenant, "A").await.value(), format!("of {tenant}"));
    }
    app.stored(2).await;
    app
}

/// SQL for the sealed value of a tenant's secret.
fn sealed_of(tenant: &str) -> String {
    format!(
        "SELECT secret_value_encrypted FROM company_secrets WHERE secret_value_encrypted IS NOT NULL \
         AND company_id = (SELECT id FROM companies WHERE subdomain = '{tenant}')"
    )
}

fn moved() -> String {
    format!(
        "UPDATE company_secrets SET secret_value_encrypted = ({}) WHERE secret_value_encrypted IS NOT NULL \
         AND company_id = (SELECT id FROM companies WHERE subdomain = 'globex')",
        sealed_of("acme")
    )
}

fn flipped() -> String {
    // Inside the sealed bytes, past the head that names format and key.
    "UPDATE company_secrets SET secret_value_encrypted = \
     substr(secret_value_encrypted, 1, length(secret_value_encrypted) - 6) \
     || CASE substr(secret_value_encrypted, length(secret_value_encrypted) - 5, 1) WHEN 'A' THEN 'B' ELSE 'A' END \
     || substr(secret_value_encrypted, length(secret_value_encrypted) - 4) \
     WHERE secret_value_encrypted IS NOT NULL \
     AND company_id = (SELECT id FROM companies WHERE subdomain = 'globex')"
        .to_owned()
}

fn swapped() -> String {
    "UPDATE companies SET subdomain = 'between' WHERE subdomain = 'acme'; \
     UPDATE companies SET subdomain = 'acme' WHERE subdomain = 'globex'; \
     UPDATE companies SET subdomain = 'globex' WHERE subdomain = 'between'"
        .to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_moved_or_damaged_is_refused_where_the_database_owns_it() {
    for spoil in [moved, flipped, swapped] {
        on_both(async |backend| {
            let mut app = neighbours(backend, Phase::Database).await;
            app.setup.backend.sql(&spoil()).await;
            // No-cache reads it with the keys that are at hand; a restart without them.
            for _ in 0..2 {
                let answer = app.get_fresh("globex", "A").await;
                assert_eq!(answer.problem(), (503, "unavailable".to_owned()), "{}", spoil());
                assert_eq!(app.ask_tenant("globex", "/secrets?values=true").await.status, 503);
                assert_eq!(app.explain("globex", "A").await["database"]["state"], "unreadable");
                app.restart().await;
            }
            assert_eq!(app.get("globex", "A").await.status, 503);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_moved_or_damaged_is_read_again_from_infisical_and_healed() {
    for spoil in [moved, flipped, swapped] {
        on_both(async |backend| {
            let mut app = neighbours(backend, Phase::Hybrid).await;
            app.setup.backend.sql(&spoil()).await;
            app.restart().await;
            for tenant in TENANTS {
                assert_eq!(app.get(tenant, "A").await.value(), format!("of {tenant}"), "{}", spoil());
            }
            assert_eq!(app.get("globex", "A").await.tier(), "memory");
            // The write-back may end after the answer.
            crate::app::eventually(async || app.explain("globex", "A").await["database"]["state"] == "fresh").await;
            crate::app::eventually(async || app.explain("acme", "A").await["database"]["state"] == "fresh").await;
            app.infisical.stop().await;
            app.restart().await;
            for tenant in TENANTS {
                let healed = app.get(tenant, "A").await;
                assert_eq!((healed.value(), healed.tier()), (format!("of {tenant}"), "database"), "{}", spoil());
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_copy_is_not_served_when_infisical_is_down() {
    on_both(async |backend| {
        let mut app = neighbours(backend, Phase::Hybrid).await;
        app.setup.backend.sql(&moved()).await;
        app.infisical.stop().await;
        app.restart().await;
        assert_eq!(app.get("globex", "A").await.problem(), (503, "unavailable".to_owned()));
        assert_eq!(app.get("acme", "A").await.value(), "of acme");
    })
    .await;
}
