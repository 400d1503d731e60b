//! `secretier keys seal`, and what `audit verify` says of rows that were put back.

use diesel::{Connection as _, SqliteConnection, connection::SimpleConnection as _};
use serde_json::Value;

use crate::program::{Place, client, look_up, master_key};

const CONFIG: &str =
    "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"sqlite:secretier.db\"\n";

fn place() -> Place {
    let place = Place::new(CONFIG);
    place.write("master.key", &master_key());
    place
}

fn token(place: &Place, name: &str) -> String {
    let create = ["token", "create", "--name", name, "--tenants", "*", "--actions", "read,write"];
    place.run(&create).ok().trim().to_owned()
}

/// Runs SQL behind the program's back.
fn sql(place: &Place, sql: &str) {
    let path = place.path().join("secretier.db");
    let mut connection = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
    connection.batch_execute(&format!("PRAGMA busy_timeout = 30000; {sql}")).unwrap();
}

async fn put(url: &str, token: &str, tenant: &str, value: &str) {
    let put = client().put(format!("{url}/v1/tenants/{tenant}/secrets/A?create_tenant=true")).bearer_auth(token);
    let answer = put.body(format!("{{\"value\":{value:?}}}")).send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.status());
}

async fn list(url: &str, token: &str, tenant: &str) -> u16 {
    let list = client().get(format!("{url}/v1/tenants/{tenant}/secrets")).bearer_auth(token);
    list.send().await.unwrap().status().as_u16()
}

/// What `audit verify` finds of the rows.
fn findings(place: &Place) -> Vec<String> {
    let ended = place.run(&["audit", "verify", "--json"]);
    let told: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(ended.code, i32::from(!told["sound"].as_bool().unwrap()), "{told}");
    let text = |finding: &Value| finding.as_str().unwrap().to_owned();
    let findings: Vec<String> = told["rows"]["findings"].as_array().unwrap().iter().map(text).collect();
    assert_eq!(told["sound"].as_bool().unwrap(), findings.is_empty(), "{told}");
    findings
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_older_version_left_is_sealed_on_record_and_only_once() {
    let place = place();
    let api = token(&place, "api");
    let (mut serving, url) = place.serve();
    put(&url, &api, "acme", "one").await;
    sql(&place, "UPDATE access_tokens SET seal = NULL; DELETE FROM settings WHERE name = 'token_register'");
    sql(&place, "UPDATE companies SET head = NULL; UPDATE company_secrets SET counted = NULL");
    let status = place.run(&["keys", "status"]);
    assert!(status.stdout.contains("rows without a seal are let in (1 tokens)"), "{}", status.stdout);
    let verified = place.run(&["audit", "verify"]);
    assert!(verified.stderr.contains("keys seal"), "{}", verified.stderr);

    // Killed at whatever point, the same command goes on.
    for _ in 0..3 {
        let killed = place.start(&["keys", "seal"]);
        killed.signal("KILL");
        drop(killed);
    }
    let told = place.run(&["keys", "seal"]).ok();
    assert!(told.contains("from now on one without is refused"), "{told}");
    let again: Value = serde_json::from_str(&place.run(&["keys", "seal", "--json"]).ok()).unwrap();
    assert_eq!((&again["all"], &again["tokens"], &again["tenants"]), (&true.into(), &0.into(), &0.into()));
    let status: Value = serde_json::from_str(&place.run(&["keys", "status", "--json"]).ok()).unwrap();
    assert_eq!(status["seals"]["state"], "all", "{status}");
    let found = place.run(&["audit", "search", "--outcome", "done", "--json"]).ok();
    assert!(found.contains("keys.seal"), "{found}");
    assert_eq!(look_up(&url, &api, "acme", "A").await.0, 200);
    put(&url, &api, "acme", "two").await;
    assert_eq!(serving.terminate(), 0);
    assert_eq!(findings(&place), [""; 0]);

    place.run(&["keys", "rotate"]).ok();
    assert_eq!(findings(&place), [""; 0]);
    assert!(place.run(&["token", "list"]).ok().contains("valid"));

    sql(&place, "UPDATE access_tokens SET tenants = '[\"acme\",\"*\"]'");
    let listed = place.run(&["token", "list"]);
    assert!(listed.stdout.contains("REFUSED") && listed.stderr.contains("without a master key"), "{}", listed.stderr);
    let told = place.run(&["keys", "seal"]);
    assert!(told.code == 1 && told.stderr.contains("api stays as it is"), "{told:?}");
    place.run(&["token", "revoke", "api"]).ok();
    place.run(&["keys", "seal"]).ok();

    sql(&place, "DELETE FROM settings WHERE name = 'token_register'");
    assert!(findings(&place).iter().any(|finding| finding.starts_with("seals: ")));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_put_back_with_all_that_proves_them_are_found_by_what_is_on_record() {
    const TABLES: [&str; 3] = ["companies", "company_data_keys", "company_secrets"];
    let place = place();
    let api = token(&place, "api");
    let ci = token(&place, "ci");
    place.run(&["keys", "seal"]).ok();
    let (mut serving, url) = place.serve();
    for tenant in ["acme", "globex", "umbrella"] {
        put(&url, &api, tenant, "one").await;
    }
    let keep = |table: &&str| format!("CREATE TABLE kept_{table} AS SELECT * FROM {table};");
    sql(&place, &TABLES.iter().chain(&["settings", "access_tokens"]).map(keep).collect::<String>());
    put(&url, &api, "acme", "two").await;
    assert_eq!(serving.terminate(), 0);
    place.run(&["tenant", "shred", "globex", "--yes"]).ok();
    place.run(&["token", "revoke", "ci"]).ok();
    assert_eq!(findings(&place), [""; 0]);

    let anew = |table: &&str| format!("DELETE FROM {table}; INSERT INTO {table} SELECT * FROM kept_{table};");
    let all: String = TABLES.iter().rev().map(|table| format!("DELETE FROM {table};")).collect();
    sql(&place, &format!("PRAGMA foreign_keys = OFF; {all}"));
    sql(&place, &TABLES.iter().chain(&["settings", "access_tokens"]).map(anew).collect::<String>());
    sql(
        &place,
        "DELETE FROM company_secrets WHERE company_id = (SELECT id FROM companies WHERE subdomain = 'umbrella')",
    );
    sql(
        &place,
        "DELETE FROM company_data_keys WHERE company_id = (SELECT id FROM companies WHERE subdomain = 'umbrella')",
    );
    sql(&place, "UPDATE companies SET head = NULL WHERE subdomain = 'umbrella'");
    let found = findings(&place).join("\n");
    assert!(found.contains("token ci: it is valid, though it is on record as revoked"), "{found}");
    assert!(found.contains("tenant acme: its secrets are those of an earlier time"), "{found}");
    assert!(found.contains("tenant globex: its secrets are from before it was shredded"), "{found}");

    // One that starts now knows no better, as SECURITY.md says.
    let (mut serving, url) = place.serve();
    assert_eq!(look_up(&url, &ci, "acme", "A").await.0, 200);
    // What fits no proof is refused by whoever reads it.
    put(&url, &api, "acme", "three").await;
    sql(&place, "DELETE FROM company_secrets WHERE version = 2; UPDATE company_secrets SET superseded_at = NULL");
    sql(&place, "UPDATE access_tokens SET actions = '[\"read\",\"admin\"]' WHERE name = 'ci'");
    assert_eq!(serving.terminate(), 0);
    let (mut serving, url) = place.serve();
    assert_eq!(look_up(&url, &ci, "acme", "A").await.0, 401);
    assert_eq!(list(&url, &api, "acme").await, 503);
    assert_eq!(list(&url, &api, "globex").await, 200);
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_data_keys_and_no_signed_audit_is_not_sound() {
    let place = place();
    assert_eq!(findings(&place), [""; 0], "nothing was done yet");
    let api = token(&place, "api");
    let (mut serving, url) = place.serve();
    put(&url, &api, "acme", "one").await;
    assert_eq!(serving.terminate(), 0);
    assert_eq!(findings(&place), [""; 0]);
    sql(
        &place,
        "DELETE FROM audit_records; UPDATE audit_chains SET start_seq = 0, start_hash = zeroblob(32), \
             start_signed_with = NULL, start_signature = NULL, seq = 0, hash = zeroblob(32), vouched_seq = NULL, \
             vouched_hash = NULL, signed_with = NULL, signature = NULL",
    );
    assert!(findings(&place)[0].starts_with("audit: there are data keys"));
    let told = place.run(&["audit", "verify"]);
    assert!(told.code == 1 && told.stdout.contains("nothing in the audit is signed"), "{}", told.stdout);
}
