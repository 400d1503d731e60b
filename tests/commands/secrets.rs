//! `secretier get|set|delete|list|versions|rollback|explain|rotate|rotations`, against a running proxy.

use std::{fs, os::unix::fs::PermissionsExt as _};

use serde_json::Value;

use crate::program::{Place, Running, master_key};

fn running() -> (Place, Running) {
    let mut place = Place::new("environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n");
    place.write("master.key", &master_key());
    let (serving, url) = place.serve();
    let create = ["token", "create", "--name", "cli", "--tenants", "acme*", "--actions", "read,write,rotate"];
    let token = place.run(&create).ok();
    place.set("SECRETIER_URL", &url);
    place.set("SECRETIER_TOKEN", token.trim());
    (place, serving)
}

#[test]
fn a_secret_is_written_read_listed_explained_and_deleted() {
    let (place, _serving) = running();
    let set = place.run_with(&["set", "acme", "DB/URL", "--create-tenant"], "pg://s3cr3t\n");
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
fn a_tenant_whose_name_is_mistyped_is_not_made_and_the_way_to_make_it_is_told() {
    let (place, _serving) = running();
    let told = place.run_with(&["set", "acme", "K"], "one").failed(1);
    assert!(told.contains("tenant_unknown") && told.contains("--create-tenant"), "{told}");
    assert!(!place.run_with(&["list"], "").ok().contains("acme"));
    place.run_with(&["set", "acme", "K", "--create-tenant"], "one").ok();
    place.run_with(&["set", "acme", "K"], "two").ok();
    assert_eq!(place.run_with(&["get", "acme", "K"], "").ok(), "two");
}

#[test]
fn a_name_with_a_number_sign_is_a_name_of_its_own() {
    let (place, _serving) = running();
    place.run_with(&["set", "acme", "A", "--create-tenant"], "a").ok();
    place.run_with(&["set", "acme", "A#old"], "b").ok();
    place.run_with(&["delete", "acme", "A#older"], "").failed(1);
    assert_eq!(place.run_with(&["get", "acme", "A#old"], "").ok(), "b");
    place.run_with(&["delete", "acme", "A#old"], "").ok();
    assert_eq!(place.run_with(&["get", "acme", "A"], "").ok(), "a");
}

#[test]
fn an_address_holds_no_password_and_a_token_goes_into_no_open_file_or_network_in_silence() {
    let place = Place::new("");
    let list = |url: &str| place.run_with(&["list", "--url", url, "--token-file", "token"], "");
    let token = place.write("token", "st_none\n");
    for url in ["http://me:hunter2@127.0.0.1:1", "http://127.0.0.1:1/#x", "http://127.0.0.1:1/?a=b", "127.0.0.1:1"] {
        let told = list(url).failed(2);
        assert!(told.contains("http://127.0.0.1:7227") && !told.contains("hunter2"), "{told}");
    }
    // Nobody listens there.
    assert!(!list("http://127.0.0.1:1").failed(1).contains("warning"));
    let told = list("http://0.0.0.0:1").failed(1);
    assert!(told.contains("warning") && told.contains("https"), "{told}");
    fs::set_permissions(token, fs::Permissions::from_mode(0o644)).unwrap();
    let told = list("http://127.0.0.1:1").failed(1);
    assert!(told.contains("chmod 600 token") && told.contains("0644"), "{told}");
}

#[test]
fn a_condition_that_does_not_hold_writes_nothing() {
    let (place, _serving) = running();
    place.run_with(&["set", "acme", "K", "--if-absent", "--create-tenant"], "one").ok();
    let told = place.run_with(&["set", "acme", "K", "--if-absent"], "two").failed(1);
    assert!(told.contains("version_conflict"), "{told}");
    let told = place.run_with(&["set", "acme", "K", "--if-match", "made-up"], "two").failed(1);
    assert!(told.contains("version_conflict"), "{told}");
    assert_eq!(place.run_with(&["get", "acme", "K"], "").ok(), "one");
    place.run_with(&["set", "acme", "K", "--if-match", "x", "--if-absent"], "two").failed(2);
}

#[test]
fn an_older_version_is_listed_read_and_brought_back() {
    let (place, _serving) = running();
    for value in ["one", "two", "three"] {
        place.run_with(&["set", "acme", "K", "--create-tenant"], value).ok();
    }
    place.run_with(&["delete", "acme", "K"], "").ok();
    let listed = place.run_with(&["versions", "acme", "K"], "").ok();
    let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["VERSION", "CREATED_AT", "SOURCE", "BY", "DELETED", "CURRENT"], "{listed}");
    let told: Vec<(&str, &[&str])> = lines[1..].iter().map(|line| (line[0], &line[2..])).collect();
    assert_eq!(
        told,
        [
            ("4", &["database", "cli", "true", "true"][..]),
            ("3", &["database", "cli", "false", "false"][..]),
            ("2", &["database", "cli", "false", "false"][..]),
            ("1", &["database", "cli", "false", "false"][..]),
        ]
    );
    assert_eq!(place.run_with(&["get", "acme", "K", "--version", "2"], "").ok(), "two");
    assert!(place.run_with(&["get", "acme", "K", "--version", "4"], "").failed(1).contains("versions"));

    let told = place.run_with(&["rollback", "acme", "K", "2", "--if-match", "made-up"], "").failed(1);
    assert!(told.contains("version_conflict"), "{told}");
    let back = place.run_with(&["rollback", "acme", "K", "2"], "");
    assert!(back.stderr.contains("acme/K has the value of version 2 again, as version 5"), "{}", back.stderr);
    assert_eq!(back.ok(), "");
    assert_eq!(place.run_with(&["get", "acme", "K"], "").ok(), "two");
    let json: Value =
        serde_json::from_str(&place.run_with(&["rollback", "acme", "K", "1", "--json"], "").ok()).unwrap();
    assert_eq!(json["version"], 6);
    let json: Value = serde_json::from_str(&place.run_with(&["versions", "acme", "K", "--json"], "").ok()).unwrap();
    assert_eq!((&json["versions"][0]["version"], &json["versions"][0]["current"]), (&6.into(), &true.into()));
    assert!(place.run_with(&["rollback", "acme", "K", "99"], "").failed(1).contains("secret_not_found"));
    assert!(place.run_with(&["versions", "acme", "NONE"], "").failed(1).contains("secret_not_found"));
    for wrong in
        [&["rollback", "acme", "K", "0"][..], &["rollback", "acme", "K"], &["get", "acme", "K", "--version", "x"]]
    {
        place.run_with(wrong, "").failed(2);
    }
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

#[test]
fn a_value_that_an_application_sealed_is_opened_and_written() {
    let vectors: Value = serde_json::from_str(include_str!("../vectors/legacy.json")).unwrap();
    let (mut place, _serving) = running();
    let key = vectors["key"].as_str().unwrap();
    place.write("old.key", &format!("{key}\n"));
    place.set("OLD_KEY", key);
    let samples = vectors["opens"].as_array().unwrap();
    for format in ["gcm-tag-first", "gcm-tag-last", "cbc"] {
        let sample = samples.iter().find(|case| case["format"] == format && case["name"] == "multiline").unwrap();
        let (sealed, value) = (sample["sealed"].as_str().unwrap(), sample["value"].as_str().unwrap());
        let set = ["set", "acme", format, "--legacy-key", "env:OLD_KEY", "--create-tenant"];
        place.run_with(&set, &format!("{sealed}\n")).ok();
        assert_eq!(place.run_with(&["get", "acme", format], "").ok(), value, "{format}");
        place.write("sealed", sealed);
        let set = ["set", "acme", "K", "--legacy-key", "file:old.key", "--legacy-format", format, "--file", "sealed"];
        place.run_with(&set, "").ok();
        assert_eq!(place.run_with(&["get", "acme", "K"], "").ok(), value, "{format}");
    }
}

#[test]
fn what_does_not_open_is_not_written_and_the_reason_is_told() {
    let vectors: Value = serde_json::from_str(include_str!("../vectors/legacy.json")).unwrap();
    let (mut place, _serving) = running();
    let key = vectors["key"].as_str().unwrap();
    place.set("OLD_KEY", key);
    place.set("WRONG_KEY", vectors["wrong_key"].as_str().unwrap());
    place.set("NO_KEY", "hunter2!");
    let sealed = vectors["opens"][0]["sealed"].as_str().unwrap();
    let open = place.write("open.key", key);
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    for (code, source, format, input, expected) in [
        (1, "env:WRONG_KEY", "auto", sealed, "authentication failed"),
        (1, "env:OLD_KEY", "cbc", sealed, "3 part(s) between colons where 2 are expected"),
        (1, "env:OLD_KEY", "auto", &sealed[1..], "the iv has an odd number of hex digits"),
        (2, "env:NO_KEY", "auto", sealed, "env:NO_KEY is refused"),
        (2, "env:UNSET", "auto", sealed, "there is no env:UNSET"),
        (2, "file:no-such-file", "auto", sealed, "there is no file:no-such-file"),
        (2, "file:open.key", "auto", sealed, "chmod 600 open.key"),
        (2, "infisical:/KEY", "auto", sealed, "not from infisical:/KEY"),
        (2, "env:OLD_KEY", "rot13", sealed, "auto, gcm-tag-first, gcm-tag-last, cbc"),
    ] {
        let set = ["set", "acme", "K", "--legacy-key", source, "--legacy-format", format];
        let told = place.run_with(&set, input).failed(code);
        assert!(told.contains(expected), "{told}");
        assert!(!told.contains(&sealed[1..20]) && !told.contains(key) && !told.contains("hunter2"), "{told}");
    }
    let told = place.run_with(&["set", "acme", "K", "--legacy-key", key], sealed).failed(2);
    assert!(told.contains("env:NAME or file:PATH") && !told.contains(key), "{told}");
    assert!(place.run_with(&["get", "acme", "K"], "").failed(1).contains("secret_not_found"), "nothing was written");
    let told = place.run_with(&["set", "acme", "K", "--legacy-format", "cbc"], sealed).failed(2);
    assert!(told.contains("--legacy-key"), "{told}");
}

#[test]
fn a_secret_is_rotated_and_told_of_and_a_rotation_stopped_or_turned_back() {
    let (place, _serving) = running();
    place.run_with(&["set", "acme", "K", "--create-tenant"], "one").ok();
    let show = || place.run_with(&["rotations", "show", "acme", "K", "--json"], "").ok();
    let told: Value = serde_json::from_str(
        &place.run_with(&["rotate", "acme", "K", "--value-file", "-", "--grace", "1h", "--json"], "two\n").ok(),
    )
    .unwrap();
    assert_eq!((&told["state"], &told["started_by"]), (&Value::from("running"), &Value::from("cli")));
    let is_at = |step: &str| serde_json::from_str::<Value>(&show()).unwrap()["step"] == step;
    assert!((0..600).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        is_at("wait")
    }));
    assert_eq!(place.run_with(&["get", "acme", "K"], "").ok(), "two");
    let listed = place.run_with(&["rotations", "list"], "").ok();
    assert!(listed.contains("acme") && listed.contains("wait") && !listed.contains("two"), "{listed}");
    assert!(!place.run_with(&["rotations", "list", "--state", "failed"], "").ok().contains("acme"));
    assert!(!place.run_with(&["rotations", "due", "--within", "30d"], "").ok().contains("acme"), "there is no rule");
    assert_eq!(place.run_with(&["rotations", "due", "--json"], "").ok().trim(), "[]");
    assert!(place.run_with(&["rotations", "abort", "acme", "K"], "").failed(1).contains("rotation_not_now"));
    place.write("value", "three\n");
    let again = place.run_with(&["rotate", "acme", "K", "--value-file", "value"], "").failed(1);
    assert!(again.contains("rotation_in_progress"), "{again}");
    assert!(place.run_with(&["rotations", "rollback", "acme", "K"], "").ok().contains("rolled_back"));
    assert_eq!(place.run_with(&["get", "acme", "K"], "").ok(), "one");
    assert!(place.run_with(&["rotate", "acme", "K"], "").failed(1).contains("rotation_rule_missing"));
    place.run_with(&["rotate", "acme", "K", "--grace", "soon"], "").failed(2);
}
