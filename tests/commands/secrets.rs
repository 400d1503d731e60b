//! `secretier get|set|delete|list|explain`, against a running proxy.

use serde_json::Value;

use crate::program::{Place, Running, master_key};

fn running() -> (Place, Running) {
    let mut place = Place::new("environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n");
    place.write("master.key", &master_key());
    let (serving, url) = place.serve();
    let create = ["token", "create", "--name", "cli", "--tenants", "acme*", "--actions", "read,write"];
    let token = place.run(&create).ok();
    place.set("SECRETIER_URL", &url);
    place.set("SECRETIER_TOKEN", token.trim());
    (place, serving)
}

#[test]
fn a_secret_is_written_read_listed_explained_and_deleted() {
    let (place, _serving) = running();
    let set = place.run_with(&["set", "acme", "DB/URL"], "pg://s3cr3t\n");
    assert!(set.stderr.contains("created acme/DB/URL, version 1"), "{}", set.stderr);
    assert_eq!(set.ok(), "");
    assert_eq!(place.run_with(&["get", "acme", "DB/URL"], "").ok(), "pg://s3cr3t", "a last line break does not count");
    place.write("value", "line\nbreaks\n");
    let changed = place.run_with(&["set", "acme", "DB/URL", "--file", "value", "--exact"], "ignored");
    assert!(changed.stderr.contains("changed acme/DB/URL, version 2"), "{}", changed.stderr);
    assert_eq!(place.run_with(&["get", "acme", "DB/URL", "--fresh"], "").ok(), "line\nbreaks\n");
    let json: Value = serde_json::from_str(&place.run_with(&["get", "acme", "DB/URL", "--json"], "").ok()).unwrap();
    assert_eq!((&json["value"], &json["version"]), (&Value::from("line\nbreaks\n"), &Value::from(2)));

    let listed = place.run_with(&["list", "acme"], "").ok();
    assert!(listed.contains("DB/URL") && !listed.contains("breaks"), "{listed}");
    assert!(place.run_with(&["list"], "").ok().contains("acme"));
    let explained = place.run_with(&["explain", "acme", "DB/URL"], "").ok();
    for part in ["phase      database (by default)", "memory     fresh", "database   fresh, version 2"] {
        assert!(explained.contains(part), "{explained}");
    }
    assert!(!explained.contains("breaks"), "{explained}");

    assert!(place.run_with(&["delete", "acme", "DB/URL"], "").stderr.contains("deleted acme/DB/URL"));
    let told = place.run_with(&["get", "acme", "DB/URL"], "").failed(1);
    assert!(told.contains("secret_not_found"), "{told}");
    assert!(place.run_with(&["delete", "acme", "DB/URL"], "").failed(1).contains("secret_not_found"));
}

#[test]
fn a_condition_that_does_not_hold_writes_nothing() {
    let (place, _serving) = running();
    place.run_with(&["set", "acme", "K", "--if-absent"], "one").ok();
    let told = place.run_with(&["set", "acme", "K", "--if-absent"], "two").failed(1);
    assert!(told.contains("version_conflict"), "{told}");
    let told = place.run_with(&["set", "acme", "K", "--if-match", "made-up"], "two").failed(1);
    assert!(told.contains("version_conflict"), "{told}");
    assert_eq!(place.run_with(&["get", "acme", "K"], "").ok(), "one");
    place.run_with(&["set", "acme", "K", "--if-match", "x", "--if-absent"], "two").failed(2);
}

#[test]
fn who_may_not_or_cannot_ask_is_told_so() {
    let (mut place, mut serving) = running();
    assert!(place.run_with(&["get", "globex", "K"], "").failed(1).contains("out_of_scope"));
    assert!(place.run_with(&["get", "No Tenant", "K"], "").failed(2).contains("lower-case"));
    assert!(place.run_with(&["set", "acme", "K", "--file", "no-such-file"], "").failed(2).contains("cannot be read"));
    let told = place.run_with(&["get", "acme", "K", "--token", "st_made_up"], "").failed(1);
    assert!(told.contains("token_invalid") && !told.contains("made_up"), "{told}");
    serving.terminate();
    let told = place.run_with(&["get", "acme", "K"], "").failed(1);
    assert!(told.contains("secretier serve"), "{told}");
    place.set("SECRETIER_TOKEN", "");
    let told = place.run_with(&["get", "acme", "K"], "");
    assert_ne!(told.code, 0);
}

#[test]
fn a_token_is_read_from_a_file_and_its_absence_is_wrong_usage() {
    let (place, _serving) = running();
    let without = Place::new("");
    let told = without.run_with(&["get", "acme", "K"], "").failed(2);
    assert!(told.contains("SECRETIER_TOKEN") && told.contains("--token-file"), "{told}");
    drop(place);
}
