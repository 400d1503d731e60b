//! `secretier audit search|verify`, and what commands leave in the audit.

use std::{fs, time::Instant};

use diesel::{Connection as _, SqliteConnection, connection::SimpleConnection as _};
use serde_json::Value;

use crate::program::{HANGS, Place, client, look_up, master_key};

const CONFIG: &str =
    "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"sqlite:secretier.db\"\n";

fn place(more: &str) -> Place {
    let place = Place::new(&format!("{CONFIG}{more}"));
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

fn searched(place: &Place, filter: &[&str]) -> Vec<Value> {
    let found = place.run(&[&["audit", "search", "--json"], filter].concat()).ok();
    serde_json::from_str(&found).unwrap()
}

async fn put(url: &str, token: &str, key: &str) -> u16 {
    let path = format!("{url}/v1/tenants/acme/secrets/{key}?create_tenant=true");
    client().put(path).bearer_auth(token).body(r#"{"value":"value-of-it"}"#).send().await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_and_requests_are_found_by_who_what_and_when() {
    let place = place("");
    let api = token(&place, "api");
    let (mut serving, url) = place.serve();
    assert_eq!(put(&url, &api, "A").await, 201);
    assert_eq!(look_up(&url, &api, "acme", "A").await.0, 200);
    assert_eq!(look_up(&url, "st_none", "acme", "A").await.0, 401);
    assert_eq!(serving.terminate(), 0);
    place.run(&["token", "revoke", "api"]).ok();

    let actions = |found: Vec<Value>| -> Vec<String> {
        let word =
            |record: &Value| format!("{} {}", record["action"].as_str().unwrap(), record["outcome"].as_str().unwrap());
        found.iter().map(word).collect()
    };
    assert_eq!(actions(searched(&place, &["--actor", "api", "--key", "A"])), ["read found", "put done", "put begun"]);
    assert_eq!(actions(searched(&place, &["--outcome", "denied"])), ["read denied"]);
    assert_eq!(actions(searched(&place, &["--tenant", "globex"])), [""; 0]);
    assert_eq!(actions(searched(&place, &["--until", "2020-01-01T00:00:00Z"])), [""; 0]);
    let administration = searched(&place, &["--since", "1h", "--outcome", "done"]);
    let own: Vec<_> = administration.iter().filter(|record| record["chain"] == "admin").collect();
    assert_eq!(own.len(), 2, "{own:?}");
    assert_eq!((&own[0]["action"], &own[0]["detail"]["options"]["token"]), (&"token.revoke".into(), &"api".into()));
    assert!(own[0]["actor_id"].as_str().unwrap().starts_with("uid:"));

    let table = place.run(&["audit", "search", "--limit", "3"]).ok();
    assert_eq!(table.lines().count(), 4, "{table}");
    assert!(place.run(&["audit", "search", "--since", "soon"]).failed(2).contains("2026-01-31T12:00:00Z"));
    let all = Value::from(searched(&place, &[])).to_string();
    assert!(!all.contains(&api) && !all.contains("value-of-it"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_pasted_in_place_of_its_name_is_recorded_by_its_public_part() {
    let place = place("");
    let api = token(&place, "api");
    place.run(&["token", "revoke", &api]).failed(1);
    let all = Value::from(searched(&place, &[])).to_string();
    assert!(all.contains("token.revoke") && !all.contains(&api[20..]), "{all}");
}

#[test]
fn a_command_that_cannot_be_recorded_is_not_run() {
    let place = place("");
    token(&place, "api");
    sql(&place, "CREATE TRIGGER full BEFORE INSERT ON audit_records BEGIN SELECT RAISE(ABORT, 'disk is full'); END");
    let told = place.run(&["token", "revoke", "api"]).failed(1);
    assert!(told.contains("audit") && told.contains("not done"), "{told}");
    assert!(place.run(&["token", "list"]).ok().contains("valid"), "it still is");
    sql(&place, "DROP TRIGGER full");
    place.run(&["token", "revoke", "api"]).ok();
}

#[test]
fn verification_says_what_is_sound_what_is_not_and_where() {
    let place = place("");
    assert!(place.run(&["audit", "verify"]).ok().contains("sound"), "before anything happened");
    token(&place, "one");
    let before: Value = serde_json::from_str(&place.run(&["audit", "verify", "--json"]).ok()).unwrap();
    let chain = before["chains"].as_array().unwrap().iter().find(|chain| chain["chain"] == "admin").unwrap();
    let end = chain["end"].as_str().unwrap().to_owned();
    fs::copy(place.path().join("secretier.db"), place.path().join("before.db")).unwrap();
    token(&place, "two");
    place.run(&["audit", "verify", "--end", &end]).ok();
    let now: Value = serde_json::from_str(&place.run(&["audit", "verify", "--json"]).ok()).unwrap();
    let chain = now["chains"].as_array().unwrap().iter().find(|chain| chain["chain"] == "admin").unwrap();
    let later = chain["end"].as_str().unwrap().to_owned();

    sql(&place, "UPDATE audit_records SET action = 'token.list' WHERE chain = 'admin' AND seq = 2");
    let found = place.run(&["audit", "verify"]);
    assert_eq!(found.code, 1);
    assert!(found.stdout.contains("admin 2: this record was changed"), "{}", found.stdout);

    sql(
        &place,
        "DELETE FROM audit_records WHERE chain = 'admin' AND seq > 3; UPDATE audit_chains SET seq = 3, \
                 hash = (SELECT hash FROM audit_records WHERE chain = 'admin' AND seq = 3) WHERE chain = 'admin'",
    );
    let found = place.run(&["audit", "verify"]);
    assert!(found.stdout.contains("admin 3: the noted end of the chain was changed"), "{}", found.stdout);
    place.run(&["audit", "accept", "admin"]).ok();
    let found = place.run(&["audit", "verify"]).stdout;
    assert!(!found.contains("end of the chain") && found.contains("admin 2: this record was changed"), "{found}");

    // Set back as a whole, it is what it once was; only who kept the end knows better.
    for beside in ["secretier.db-wal", "secretier.db-shm"] {
        let _ = fs::remove_file(place.path().join(beside));
    }
    fs::copy(place.path().join("before.db"), place.path().join("secretier.db")).unwrap();
    place.run(&["audit", "verify", "--end", &end]).ok();
    let found = place.run(&["audit", "verify", "--end", &later]);
    assert_eq!(found.code, 1);
    assert!(found.stdout.contains("is not in the chain"), "{}", found.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_killed_loses_at_most_a_window_of_counts() {
    let place = place("[audit]\nwindow = \"50ms\"\n");
    let api = token(&place, "api");
    let (serving, url) = place.serve();
    assert_eq!(put(&url, &api, "A").await, 201);
    for _ in 0..100 {
        assert_eq!(look_up(&url, &api, "acme", "A").await.0, 200);
    }
    let count = || -> i64 {
        let reads = searched(&place, &["--key", "A", "--outcome", "found", "--limit", "1000"]);
        reads.iter().map(|record| record["count"].as_i64().unwrap()).sum()
    };
    let began = Instant::now();
    while count() < 100 {
        assert!(began.elapsed() < HANGS, "{}", count());
    }
    for number in 0..20 {
        assert_eq!(
            look_up(&url, "st_none", "acme", &format!("D{number}")).await.0,
            if number < 10 { 401 } else { 429 }
        );
    }
    drop(serving);
    assert_eq!(count(), 100);
    let denied = searched(&place, &["--outcome", "denied"]);
    assert_eq!(denied.len(), 10, "what was answered is on record");
    place.run(&["audit", "verify"]).ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_lines_is_rotated_verified_and_tells_what_was_tampered_with() {
    let place = place(
        "[audit]\nsink = [\"file\"]\nfile = \"audit.jsonl\"\nfile_size = \"4KiB\"\nfiles_kept = 100\nwindow = \"20ms\"\n",
    );
    let api = token(&place, "api");
    for _ in 0..2 {
        let (mut serving, url) = place.serve();
        for number in 0..8 {
            assert!(put(&url, &api, &format!("K{number}")).await < 300);
        }
        assert_eq!(serving.terminate(), 0);
    }
    assert!(place.path().join("audit.jsonl.2").is_file());
    let verify = ["audit", "verify", "--file", "audit.jsonl"];
    let sound = place.run(&verify).ok();
    assert!(sound.contains("write") && !sound.contains("NOT"), "{sound}");
    assert!(place.run(&["audit", "verify"]).failed(2).contains("--file"));
    assert!(place.run(&["audit", "search"]).failed(2).contains("jq"));
    let rotated = place.path().join("audit.jsonl.2");
    let whole = fs::read_to_string(&rotated).unwrap();
    assert!(!whole.contains(&api) && !whole.contains("value-of-it"));

    let tampered = |text: String, expected: &str| {
        fs::write(&rotated, text).unwrap();
        let found = place.run(&verify);
        assert_eq!(found.code, 1, "{expected}");
        assert!(found.stdout.contains(expected), "{expected}: {}", found.stdout);
        fs::write(&rotated, &whole).unwrap();
    };
    tampered(whole.replacen("\"acme\"", "\"acmf\"", 1), "this record was changed");
    let shorter: String = whole.split_inclusive('\n').skip(1).collect();
    tampered(shorter, "removed");
    let mut lines: Vec<&str> = whole.lines().collect();
    lines.swap(0, 2);
    tampered(lines.join("\n") + "\n", "");

    let last = place.path().join("audit.jsonl");
    if let Ok(text) = fs::read_to_string(&last)
        .and_then(|text| if text.is_empty() { Err(std::io::ErrorKind::NotFound.into()) } else { Ok(text) })
    {
        let cut: String = text.split_inclusive('\n').take(text.lines().count() - 1).collect();
        fs::write(&last, cut).unwrap();
        let found = place.run(&verify);
        assert!(found.code == 1 && found.stdout.contains("removed"), "{}", found.stdout);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_on_standard_output_are_records_and_verify_where_they_were_captured() {
    let place = place("[audit]\nsink = [\"stdout\"]\nwindow = \"20ms\"\n");
    let api = token(&place, "api");
    let (mut serving, url) = place.serve();
    assert_eq!(put(&url, &api, "A").await, 201);
    assert_eq!(look_up(&url, &api, "acme", "A").await.0, 200);
    assert_eq!(serving.terminate(), 0);
    let captured = serving.stdout();
    for line in captured.lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        assert!(record["action"].is_string() && record["hash"].is_string());
    }
    assert!(captured.contains("\"put\"") && captured.contains("\"read\""), "{captured}");
    place.write("captured.jsonl", &captured);
    place.run(&["audit", "verify", "--file", "captured.jsonl"]).ok();
    place.write("captured.jsonl", &captured.replacen("\"acme\"", "\"acmf\"", 1));
    assert_eq!(place.run(&["audit", "verify", "--file", "captured.jsonl"]).code, 1);
}
