//! `secretier migrate import`: an application's own tables, read back through the proxy.

use secretier::tiers::upstream::standin::Route;
use serde_json::{Value, json};

use crate::{
    migrate::Site,
    postgres::{Postgres, execute, number},
    program::{keeping_client, look_up},
};

const VECTORS: &str = include_str!("../vectors/legacy.json");

fn vectors() -> Value {
    serde_json::from_str(VECTORS).unwrap()
}

/// The application's two tables, filled from the vectors: each a tenant of its own, with a
/// secret for each.
async fn application() -> String {
    let url = Postgres::shared().database().await;
    let mut sql = "CREATE TABLE companies (id uuid PRIMARY KEY, subdomain text NOT NULL);
        CREATE TABLE company_secrets (company_id uuid NOT NULL, secret_key text NOT NULL, secret_value_encrypted text NOT NULL);
        CREATE TABLE tenant_secrets (tenant_id text NOT NULL, key text NOT NULL, value_encrypted text NOT NULL);
        INSERT INTO companies VALUES ('00000000-0000-4000-8000-000000000001', 'acme'),
                                     ('00000000-0000-4000-8000-000000000002', 'globex');"
        .to_owned();
    for (number, vector) in vectors()["opens"].as_array().unwrap().iter().enumerate() {
        let (sealed, company) = (vector["sealed"].as_str().unwrap(), number % 2 + 1);
        sql.push_str(&format!(
            "INSERT INTO company_secrets VALUES ('00000000-0000-4000-8000-00000000000{company}', 'V{number}', '{sealed}');
             INSERT INTO tenant_secrets VALUES ('initech', 'V{number}', '{sealed}');"
        ));
    }
    execute(&url, &sql).await;
    url
}

/// A site that knows the application's key.
async fn site(phase: &str) -> Site {
    let mut site = Site::new(None, phase, "").await;
    site.place.set("APP_KEY", vectors()["key"].as_str().unwrap());
    site.place.set("WRONG_KEY", vectors()["wrong_key"].as_str().unwrap());
    site
}

#[tokio::test(flavor = "multi_thread")]
async fn an_applications_tables_are_imported_and_read_back_through_the_proxy() {
    for phase in ["infisical", "database"] {
        let url = application().await;
        let mut site = site(phase).await;
        site.place.set("APP_URL", &url);
        let import = |table: &'static str| {
            ["import", "--from-env", "APP_URL", "--table", table, "--key-env", "APP_KEY", "--all", "--cutover"]
        };
        let (code, plan) = site.json(&[&import("company_secrets")[..], &["--dry-run"]].concat());
        assert_eq!((code, plan["tenants"].as_array().unwrap().len()), (0, 2), "{plan}");
        assert!(site.database().await.is_empty(), "a plan writes nothing");
        for table in ["company_secrets", "tenant_secrets"] {
            site.migrate(&import(table)).ok();
        }
        let token = site.token();
        let (_serving, address) = site.place.serve();
        let count = vectors()["opens"].as_array().unwrap().len();
        for (number, vector) in vectors()["opens"].as_array().unwrap().iter().enumerate() {
            for tenant in [["acme", "globex"][number % 2], "initech"] {
                let (status, tier, body) = look_up(&address, &token, tenant, &format!("V{number}")).await;
                let body: Value = serde_json::from_str(&body).unwrap();
                assert_eq!((status, &body["value"]), (200, &vector["value"]), "{tier}");
            }
        }
        // Once more: nothing is doubled, and the source is as it was.
        site.migrate(&import("tenant_secrets")).ok();
        assert!(site.database().await["initech"].1.values().all(|(_, version)| *version == 1));
        let rows = self::number(&url, "SELECT count(*) FROM tenant_secrets").await;
        assert_eq!(rows, i64::try_from(count).unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_is_there_and_differs_is_in_the_way_unless_it_may_be_replaced() {
    let url = application().await;
    let mut site = site("database").await;
    site.place.set("APP_URL", &url);
    let token = site.token();
    let (mut serving, address) = site.place.serve();
    let put =
        keeping_client().put(format!("{address}/v1/tenants/initech/secrets/V0?create_tenant=true")).bearer_auth(&token);
    assert!(put.json(&json!({ "value": "newer" })).send().await.unwrap().status().is_success());
    assert_eq!(serving.terminate(), 0);
    let import = ["import", "--from-env", "APP_URL", "--table", "tenant_secrets", "--key-env", "APP_KEY", "--all"];
    let (code, plan) = site.json(&[&import[..], &["--dry-run"]].concat());
    assert_eq!((code, &plan["tenants"][0]["action"]), (1, &"refuse".into()), "{plan}");
    let (code, outcome) = site.json(&import);
    assert_eq!((code, &outcome["failed"][0]["reason"]), (1, &"different".into()), "{outcome}");
    assert_eq!(site.database().await["initech"].1.len(), 1, "nothing was stored of it");
    site.migrate(&[&import[..], &["--overwrite"]].concat()).ok();
    let database = site.database().await;
    assert_eq!(database["initech"].1["V0"].0, vectors()["opens"][0]["value"].as_str().unwrap());
    assert_eq!(database["initech"].1["V0"].1, 2, "the other is an older version");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_open_or_belongs_to_infisical_is_named_and_nothing_of_it_is_stored() {
    let url = application().await;
    let mut site = site("infisical").await;
    site.place.set("APP_URL", &url);
    site.holds("acme", &[("A", "a")]);
    let import = |key: &'static str, more: &[&'static str]| {
        let import = ["import", "--from-env", "APP_URL", "--table", "company_secrets", "--key-env", key, "--all"];
        [&import[..], more].concat()
    };
    let (code, outcome) = site.json(&import("APP_KEY", &[]));
    let failed: Vec<_> =
        outcome["failed"].as_array().unwrap().iter().map(|one| one["reason"].as_str().unwrap()).collect();
    assert_eq!((code, &failed[..]), (1, &["owned", "owned"][..]), "{outcome}");
    let (code, outcome) = site.json(&import("APP_KEY", &["--cutover"]));
    assert_eq!((code, &outcome["failed"][0]["tenant"]), (1, &"acme".into()), "it has a folder: {outcome}");
    assert_eq!(outcome["migrated"], 1);
    let (code, outcome) = site.json(&import("WRONG_KEY", &["--cutover", "--format", "gcm-tag-first"]));
    assert_eq!(code, 1);
    assert!(outcome["failed"].as_array().unwrap().iter().any(|one| one["reason"] == "problem"), "{outcome}");
    let told = site.migrate(&import("NO_SUCH_VARIABLE", &[])).failed(2);
    assert!(told.contains("NO_SUCH_VARIABLE"), "{told}");
    site.place.set("APP_URL", "postgres://nobody:hunter2@127.0.0.1:1/none");
    let told = site.migrate(&import("APP_KEY", &[])).failed(1);
    assert!(!told.contains("hunter2"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_from_elsewhere_does_not_go_on_with_one_that_was_cut_off() {
    let url = application().await;
    let sealed = vectors()["opens"][0]["sealed"].as_str().unwrap().to_owned();
    // The second tenant of the one cannot be read.
    let sql = format!(
        "CREATE VIEW old_secrets AS SELECT tenant_id, key,
            CASE WHEN tenant_id = 'b' THEN (1 / (length(key) - 1))::text ELSE value_encrypted END AS value_encrypted
            FROM (VALUES ('a', 'OLD', '{sealed}'), ('b', 'B', '{sealed}')) AS rows (tenant_id, key, value_encrypted);
         CREATE TABLE new_secrets (tenant_id text NOT NULL, key text NOT NULL, value_encrypted text NOT NULL);
         INSERT INTO new_secrets VALUES ('a', 'NEW', '{sealed}'), ('b', 'NEW', '{sealed}');"
    );
    execute(&url, &sql).await;
    let mut site = site("database").await;
    site.place.set("APP_URL", &url);
    let import = |table: &'static str| {
        let import = ["import", "--from-env", "APP_URL", "--table", "tenant_secrets", "--key-env", "APP_KEY", "--all"];
        [&import[..], &["--table-name", table, "--batch", "1"]].concat()
    };
    site.migrate(&import("old_secrets")).failed(1);
    let (_, status) = site.json(&["status"]);
    assert_eq!((&status["run"]["state"], &status["run"]["done"]), (&"interrupted".into(), &1.into()), "{status}");
    let (code, outcome) = site.json(&import("new_secrets"));
    assert_eq!((code, &outcome["migrated"]), (0, &2.into()), "{outcome}");
    assert_eq!(site.database().await["a"].1.keys().collect::<Vec<_>>(), ["NEW", "OLD"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_appears_during_an_import_keeps_its_tenant_with_infisical() {
    let url = application().await;
    let mut site = site("infisical").await;
    site.place.set("APP_URL", &url);
    let token = site.token();
    let (_serving, address) = site.place.serve();
    // What it says of the folders stands, and is held back until there is one more.
    let gate = site.infisical().gate_next_answers(1, Route::Folders);
    let import = ["import", "--from-env", "APP_URL", "--table", "tenant_secrets", "--key-env", "APP_KEY", "--all"];
    let mut importing = site.start(&[&import[..], &["--cutover", "--json"]].concat());
    gate.arrived(1).await;
    site.infisical().put("prod", "/tenants/initech", "WRITTEN", "w");
    gate.open();
    let outcome: Value = serde_json::from_str(&importing.stdout_line()).unwrap();
    assert_eq!((importing.wait(), &outcome["failed"][0]["reason"]), (1, &"owned".into()), "{outcome}");
    let (status, tier, body) = look_up(&address, &token, "initech", "WRITTEN").await;
    assert!(status == 200 && tier.starts_with("infisical"), "{status} {tier} {body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_here_does_not_come_back_by_an_import_unless_it_is_told_to() {
    let url = application().await;
    let mut site = site("database").await;
    site.place.set("APP_URL", &url);
    let import = ["import", "--from-env", "APP_URL", "--table", "tenant_secrets", "--key-env", "APP_KEY", "--all"];
    site.migrate(&import).ok();
    let token = site.token();
    let (mut serving, address) = site.place.serve();
    let delete = keeping_client().delete(format!("{address}/v1/tenants/initech/secrets/V0")).bearer_auth(&token);
    assert_eq!(delete.send().await.unwrap().status(), 204);
    assert_eq!(serving.terminate(), 0);
    let (code, plan) = site.json(&[&import[..], &["--dry-run"]].concat());
    assert_eq!((code, &plan["tenants"][0]["action"]), (1, &"refuse".into()), "{plan}");
    let (code, outcome) = site.json(&import);
    assert_eq!((code, &outcome["failed"][0]["reason"]), (1, &"different".into()), "{outcome}");
    assert!(!site.database().await["initech"].1.contains_key("V0"));
    site.migrate(&[&import[..], &["--overwrite"]].concat()).ok();
    assert_eq!(site.database().await["initech"].1["V0"].1, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_into_a_tenant_that_was_switched_leaves_it_one_that_was() {
    let url = application().await;
    let mut site = site("infisical").await;
    site.place.set("APP_URL", &url);
    site.holds("initech", &[("A", "a")]);
    site.migrate(&["run", "--all", "--cutover"]).ok();
    let import = ["import", "--from-env", "APP_URL", "--table", "tenant_secrets", "--key-env", "APP_KEY", "--all"];
    site.migrate(&import).ok();
    // Its folder is still compared, and it goes back to the phase that it came from.
    let (code, compared) = site.json(&["verify"]);
    assert_eq!((code, &compared["tenants"]), (1, &1.into()), "{compared}");
    assert!(compared["different"][0]["drift"].as_array().unwrap().iter().all(|drift| drift["what"] == "written_here"));
    site.migrate(&["rollback", "init*", "--discard"]).ok();
    assert_eq!(site.database().await["initech"].0, None, "as before it was switched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_was_imported_has_no_folder_to_be_missed() {
    let url = application().await;
    let mut site = site("infisical").await;
    site.place.set("APP_URL", &url);
    site.holds("umbrella", &[("A", "a")]);
    let import = ["import", "--from-env", "APP_URL", "--table", "tenant_secrets", "--key-env", "APP_KEY", "--all"];
    site.migrate(&[&import[..], &["--cutover"]].concat()).ok();
    site.migrate(&["run", "--all", "--cutover"]).ok();
    let (code, compared) = site.json(&["verify"]);
    assert_eq!((code, &compared["tenants"]), (0, &1.into()), "{compared}");
    let (code, cleaned) = site.json(&["cleanup", "--older-than", "0s", "--yes"]);
    let cleaned = cleaned["tenants"].as_array().unwrap();
    assert_eq!((code, cleaned.len(), &cleaned[0]["tenant"]), (0, 1, &"umbrella".into()), "{cleaned:?}");
    let refused = site.migrate(&["rollback", "initech"]).failed(1);
    assert!(refused.contains("--push"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_does_not_open_is_told_with_its_reason() {
    let url = application().await;
    let vectors = vectors();
    let mut sealed = vectors["opens"].as_array().unwrap().iter().map(|vector| vector["sealed"].as_str().unwrap());
    let sealed = sealed.find(|sealed| sealed.matches(':').count() == 2).unwrap();
    let (begin, last) = sealed.split_at(sealed.len() - 1);
    let forged = format!("{begin}{}", if last == "0" { "1" } else { "0" });
    let sql = format!(
        "INSERT INTO tenant_secrets VALUES ('zeta', 'FORGED', '{forged}'), ('zeta', 'HEX', 'zz:00:00'), ('zeta', 'PLAIN', 'text')"
    );
    execute(&url, &sql).await;
    let mut site = site("database").await;
    site.place.set("APP_URL", &url);
    let plan = ["import", "--from-env", "APP_URL", "--table", "tenant_secrets", "--key-env", "APP_KEY"];
    let told = site.migrate(&[&plan[..], &["--tenants", "zeta", "--dry-run"]].concat());
    assert_eq!(told.code, 1, "{told:?}");
    for reason in [
        "\"FORGED\" does not open: authentication failed",
        "\"HEX\" does not open: the iv holds something else than hex digits",
        "\"PLAIN\" does not open: the text has 1 part(s)",
    ] {
        assert!(told.stdout.contains(reason), "{reason} is missing in {told:?}");
    }
}
