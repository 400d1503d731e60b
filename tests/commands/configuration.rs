//! `secretier config check|show`, and the configuration that people write first.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use serde_json::Value;

use crate::program::Place;

const GOOD: &str = "environment = \"prod\"\n";
const INFISICAL: &str =
    "[infisical]\nsite_url = \"https://infisical.example\"\nproject_id = \"p\"\nclient_id = \"c\"\n";

#[test]
fn a_good_configuration_is_good() {
    let place = Place::new(&format!("{GOOD}phase = \"hybrid\"\n{INFISICAL}client_secret = \"s3cr3t\"\n"));
    assert!(place.run(&["config", "check"]).ok().contains("secretier.toml is good"));
    let told: Value = serde_json::from_str(&place.run(&["config", "check", "--json"]).ok()).unwrap();
    assert_eq!((&told["ok"], &told["faults"]), (&Value::Bool(true), &serde_json::json!([])));
}

#[test]
fn a_file_with_a_secret_that_others_can_read_is_warned_of() {
    let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let place = Place::new(&format!(
        "{GOOD}phase = \"database\"\n[server]\nlisten = \"127.0.0.1:0\"\n{INFISICAL}client_secret = {{ file = \"secret\" }}\n\
         webhook_secret = \"hunter2\"\n[keys]\nsources = [\"passphrase\"]\npassphrase = {{ file = \"phrase\" }}\n"
    ));
    let (secret, config) = (place.write("secret", "s3cr3t"), place.path().join("secretier.toml"));
    let phrase = place.write("phrase", "correct horse battery staple");
    let warnings = || {
        let told = place.run(&["config", "check"]);
        assert!(told.stdout.contains("is good"), "{}", told.stderr);
        let listed: Value = serde_json::from_str(&place.run(&["config", "check", "--json"]).ok()).unwrap();
        let lines: Vec<String> = told.stderr.lines().map(str::to_owned).collect();
        let listed: Vec<_> = listed["warnings"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
        assert_eq!(lines, listed.iter().map(|text| format!("warning: {text}")).collect::<Vec<_>>());
        lines
    };
    assert_eq!(warnings(), [""; 0]);
    for (path, mode, name) in [
        (&secret, 0o666, "infisical.client_secret"),
        (&secret, 0o604, "infisical.client_secret"),
        (&phrase, 0o644, "keys.passphrase"),
        (&config, 0o644, "infisical.webhook_secret"),
    ] {
        chmod(path, mode);
        let told = warnings();
        let file = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(told.len(), 1, "{told:?}");
        for part in [file, &format!("mode {mode:04o}"), name, "chmod 600"] {
            assert!(told[0].contains(part), "{part:?} is missing in {told:?}");
        }
        assert!(!told[0].contains("hunter2") && !told[0].contains("s3cr3t"));
        chmod(path, 0o600);
    }
    chmod(&secret, 0o644);
    let (mut serving, _) = place.serve();
    let warned = serving.stderr();
    assert!(warned.lines().any(|line| line.contains("WARN") && line.contains("mode 0644")), "{warned}");
    assert_eq!(serving.terminate(), 0, "it serves all the same");
}

#[test]
fn infisical_over_plain_http_is_this_machine_or_meant() {
    let config = |url: &str, more: &str| {
        let section = INFISICAL.replace("https://infisical.example", url);
        Place::new(&format!("{GOOD}{section}client_secret = \"s3cr3t\"\n{more}"))
    };
    for other in ["http://infisical:8080", "http://10.0.0.7", "http://localhost.example"] {
        let place = config(other, "");
        let fault = place.run(&["config", "check"]).failed(2);
        assert!(fault.contains("infisical.site_url") && fault.contains("infisical.allow_http = true"), "{fault}");
        assert_eq!(place.run(&["serve"]).failed(2), fault);
        config(other, "allow_http = true\n").run(&["config", "check"]).ok();
    }
    for ours in ["http://127.0.0.1:8080", "http://127.9.9.9", "http://[::1]:8080", "http://localhost:8080"] {
        config(ours, "").run(&["config", "check"]).ok();
    }
}

#[test]
fn of_a_url_that_lacks_an_escape_no_piece_of_the_password_is_shown() {
    let place = Place::new(&format!("{GOOD}[database]\nurl = \"postgres://u:hun@ter2@db.example/d\"\n"));
    for arguments in [&["config", "show"][..], &["config", "check"], &["serve"]] {
        let told = place.run(arguments).failed(2);
        assert!(told.contains("%40") && !told.contains("ter2"), "{told}");
    }
    let options = "postgres://db.example/d?user=u@corp&password=hunter2";
    let shown = Place::new(&format!("{GOOD}[database]\nurl = \"{options}\"\n")).run(&["config", "show"]).ok();
    assert!(!shown.contains("hunter2") && !shown.contains("corp"), "{shown}");
}

#[test]
fn each_kind_of_fault_names_file_key_and_what_is_allowed() {
    let upstream = |secret: &str| format!("{GOOD}{INFISICAL}client_secret = {secret}\n");
    for (config, told) in [
        (format!("{GOOD}[memory]\ntll = \"5m\"\n"), &["memory", "tll", "`ttl`"][..]),
        (format!("{GOOD}[memroy]\nttl = \"5m\"\n"), &["memroy", "`memory`"]),
        (format!("{GOOD}[vault]\naddress = \"x\"\n"), &["vault", "`infisical`"]),
        (format!("{GOOD}[memory]\nttl = 5\n"), &["memory.ttl", "\"15m\""]),
        (format!("{GOOD}[memory]\nttl = \"5 parsecs\"\n"), &["memory.ttl", "\"15m\""]),
        (format!("{GOOD}[memory]\ncapacity = \"lots\"\n"), &["memory.capacity", "\"64MiB\""]),
        (format!("{GOOD}[server]\nlisten = true\n"), &["server.listen"]),
        (format!("{GOOD}[database]\npool_size = \"ten\"\n"), &["database.pool_size"]),
        ("phase = \"database\"\n".to_owned(), &["`environment` is missing", "environment = \"prod\""]),
        ("environment = \"Prod!\"\n".to_owned(), &["environment", "slug"]),
        (format!("{GOOD}phase = \"both\"\n"), &["phase", "`infisical`", "`hybrid`", "`database`"]),
        (format!("{GOOD}phase = \"hybrid\"\n"), &["phase", "[infisical]"]),
        (format!("{GOOD}[[rules]]\ntenants = \"a[\"\nttl = \"1s\"\n"), &["rules[0].tenants", "acme*"]),
        (format!("{GOOD}[[rules]]\ntenant = \"a\"\n"), &["rules", "tenant", "`tenants`"]),
        (upstream("{ env = \"NOT_SET\" }"), &["infisical.client_secret", "NOT_SET", "not set"]),
        (upstream("{ file = \"no-such-file\" }"), &["infisical.client_secret", "no-such-file"]),
        (upstream("47114711"), &["infisical.client_secret", "{ env = \"...\" }"]),
        (format!("{GOOD}[infisical]\nproject_id = \"p\"\n"), &["infisical", "`site_url` is missing"]),
        (format!("{GOOD}[database]\nurl = \"mysql://u:hunter2@h/d\"\n"), &["url", "postgres://"]),
        (format!("{GOOD}[keys]\nsources = []\n"), &["keys.sources", "file:master.key"]),
        (format!("{GOOD}[keys]\nsources = [\"vault:x\"]\n"), &["keys.sources", "file:PATH"]),
        (format!("{GOOD}\n[server\n"), &["line 3"]),
    ] {
        let place = Place::new(&config);
        let fault = place.run(&["config", "check"]).failed(2);
        for part in told.iter().chain(&["secretier.toml"]) {
            assert!(fault.contains(part), "{part:?} is missing for\n{config}\nin\n{fault}");
        }
        assert!(!fault.contains("hunter2") && !fault.contains("47114711"), "{fault}");
        // Nothing starts with it either, and it is told as a list too.
        assert_eq!(place.run(&["serve"]).failed(2), fault);
        let listed = place.run(&["config", "check", "--json"]);
        let told: Value = serde_json::from_str(&listed.stdout).unwrap();
        assert_eq!((listed.code, &told["ok"]), (2, &Value::Bool(false)));
        assert!(!told["faults"].as_array().unwrap().is_empty());
    }
}

#[test]
fn every_fault_is_told_at_once() {
    let place = Place::new(&format!("{GOOD}phase = \"hybrid\"\n[memory]\nmax_stale = \"0s\"\n[keys]\nsources = []\n"));
    let fault = place.run(&["config", "check"]).failed(2);
    for key in ["phase", "memory.max_stale", "keys.sources"] {
        assert!(fault.contains(key), "{fault}");
    }
}

#[test]
fn broken_toml_is_told_with_its_line_and_never_quoted() {
    for line in ["client_secret = \"hunter2", "client_secret = hunter2", "client_secret = \"hunter2\" \"", "hunter2"] {
        let place = Place::new(&format!("{GOOD}{INFISICAL}{line}\n"));
        let fault = place.run(&["config", "check"]).failed(2);
        assert!(fault.contains("secretier.toml") && fault.contains("line 6"), "{fault}");
        assert!(!fault.contains("hunter2"), "{fault}");
    }
}

#[test]
fn a_file_that_does_not_exist_is_told() {
    let place = Place::new("");
    let told = place.run_with(&["config", "check", "--config", "no/such.toml"], "").failed(2);
    assert!(told.contains("no/such.toml"), "{told}");
}

#[test]
fn defaults_give_way_to_the_file_and_the_file_to_variables() {
    let mut place = Place::new(&format!("{GOOD}[memory]\nttl = \"1m\"\nnegative_ttl = \"7s\"\n"));
    place.set("SECRETIER_MEMORY__TTL", "2m");
    place.set("SECRETIER_SERVER__LISTEN", "127.0.0.1:4242");
    place.set("SECRETIER_TOKEN", "not a setting");
    let shown = place.run(&["config", "show"]).ok();
    let line = |key: &str| shown.lines().find(|line| line.starts_with(&format!("{key} "))).unwrap_or_default();
    for (key, value, origin) in [
        ("memory.ttl", "\"2m\"", "SECRETIER_MEMORY__TTL"),
        ("memory.negative_ttl", "\"7s\"", "secretier.toml"),
        ("memory.max_stale", "\"1day\"", "default"),
        ("server.listen", "\"127.0.0.1:4242\"", "SECRETIER_SERVER__LISTEN"),
        ("environment", "\"prod\"", "secretier.toml"),
        ("phase", "\"database\"", "default"),
    ] {
        assert!(line(key).contains(value) && line(key).ends_with(origin), "{key}: {shown}");
    }
    let json: Value = serde_json::from_str(&place.run(&["config", "show", "--json"]).ok()).unwrap();
    assert_eq!(json["memory.ttl"]["source"], "SECRETIER_MEMORY__TTL");

    place.set("SECRETIER_MEMORY__TTL", "soon");
    let told = place.run(&["config", "check"]).failed(2);
    assert!(told.contains("memory.ttl") && told.contains("\"15m\""), "{told}");
    place.set("SECRETIER_MEMORY__TTL", "2m");
    place.set("SECRETIER_MEMORY__TLL", "2m");
    let told = place.run(&["config", "check"]).failed(2);
    assert!(told.contains("`ttl`"), "{told}");
}

#[test]
fn what_is_shown_holds_no_secret() {
    let mut place = Place::new(&format!(
        "{GOOD}{INFISICAL}client_secret = \"hunter2\"\n[database]\nurl = \"postgres://u:hunter2@db.example/d\"\n"
    ));
    for arguments in [&["config", "show"][..], &["config", "show", "--json"]] {
        let shown = place.run(arguments).ok();
        assert!(!shown.contains("hunter2") && shown.contains("infisical.client_secret"), "{shown}");
        assert!(shown.contains("db.example"), "{shown}");
    }
    place.set("SECRETIER_INFISICAL__CLIENT_SECRET", "hunter2");
    place.set("SECRETIER_DATABASE__URL", "postgres://u:hunter2@db.example/d");
    let shown = place.run(&["config", "show"]).ok();
    assert!(!shown.contains("hunter2"), "{shown}");
}
