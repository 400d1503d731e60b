//! What others have chosen, names and what they say of themselves, as it is shown to people and
//! programs: it is read, and neither obeyed nor taken for anything else.

use std::fs;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use secretier::legible::is_unfit;
use serde_json::{Value, json};

use crate::program::{Place, client, master_key};

/// A key that looks like more fields of a log line.
const FORGED: &str = "K\" peer=10.0.0.1 token=\"root";

/// A key that looks like more columns of a table.
const COLUMNS: &str = "K  9  2026-01-01T00:00:00Z";

/// A key that is shown in another order than it has, and in part not at all.
const UNFIT: &str = "K\u{202e}\u{2066}\u{200b}\u{2028}\u{feff}";

/// What a key cannot have, and a header can.
const CONTROLS: &str = "a\u{85}\u{9b}2J\u{202e}";

fn place(format: &str) -> Place {
    let place = Place::new(&format!(
        "environment = \"prod\"\n[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"sqlite:secretier.db\"\n\
         [log]\nformat = \"{format}\"\n[audit]\nsink = [\"database\", \"file\", \"stdout\"]\nfile = \"audit.jsonl\"\n"
    ));
    place.write("master.key", &master_key());
    place
}

#[track_caller]
fn is_legible(page: &str) {
    let unfit = page.lines().find(|line| line.contains(is_unfit));
    assert!(unfit.is_none(), "{unfit:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_name_forges_a_field_a_line_or_a_column_and_none_is_obeyed() {
    for format in ["text", "json"] {
        let mut place = place(format);
        // The line that tells of the address looks otherwise in JSON.
        let mut serving = place.start(&["serve", "--config", "secretier.toml"]);
        let line = serving.stderr_line("serving");
        let port: String = line.split("127.0.0.1:").nth(1).unwrap().chars().take_while(char::is_ascii_digit).collect();
        let url = format!("http://127.0.0.1:{port}");
        let create = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read,write"];
        let token = place.run(&create).ok().trim().to_owned();
        for key in [FORGED, COLUMNS, UNFIT] {
            let path = format!("{url}/v1/tenants/acme/secrets/{}", utf8_percent_encode(key, NON_ALPHANUMERIC));
            let put = client().put(format!("{path}?create_tenant=true"));
            let put = put.bearer_auth(&token).json(&json!({ "value": "v" }));
            let put = put.header("user-agent", CONTROLS.as_bytes()).header("x-audit-user", CONTROLS.as_bytes());
            assert_eq!(put.send().await.unwrap().status(), 201);
            let denied = client().get(path.replace("acme", "%C2%9B")).bearer_auth(&token).send().await.unwrap();
            assert_eq!(denied.status(), 400);
            is_legible(&denied.text().await.unwrap());
        }
        place.set("SECRETIER_URL", &url);
        place.set("SECRETIER_TOKEN", &token);
        let listed = place.run_with(&["list", "acme"], "").ok();
        is_legible(&listed);
        assert_eq!(listed.lines().count(), 4, "{listed}");
        assert!(listed.contains("\"K  9  2026-01-01T00:00:00Z\" "), "{listed}");
        let versions = place.run_with(&["versions", "acme", UNFIT, "--json"], "").ok();
        is_legible(&versions);
        assert_eq!(serde_json::from_str::<Value>(&versions).unwrap()["key"], UNFIT, "in JSON it is the same name");
        is_legible(&place.run_with(&["get", "acme", &format!("{UNFIT}2")], "").failed(1));
        assert_eq!(serving.terminate(), 0);

        let log = serving.stderr();
        is_legible(&log);
        let written: Vec<&str> = log.lines().filter(|line| line.contains("a secret was written")).collect();
        assert_eq!(written.len(), 3, "{log}");
        if format == "text" {
            let fields =
                "tenant=acme key=\"K\\\" peer=10.0.0.1 token=\\\"root\" token=\"api\" peer=127.0.0.1 created=true";
            assert!(written[0].ends_with(fields), "{}", written[0]);
        } else {
            let keys = written.iter().map(|line| serde_json::from_str::<Value>(line).unwrap()["fields"]["key"].clone());
            assert_eq!(keys.collect::<Vec<_>>(), [FORGED, COLUMNS, UNFIT]);
        }

        let (file, stdout) = (fs::read_to_string(place.path().join("audit.jsonl")).unwrap(), serving.stdout());
        for page in [&file, &stdout] {
            is_legible(page);
            let records: Vec<Value> = page.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let of = records.iter().find(|record| record["key"] == UNFIT && record["action"] == "put").unwrap();
            assert_eq!(of["detail"]["agent"], r"a\u0085\u009b2J\u202e");
            assert_eq!(of["detail"]["fields"]["user"], of["detail"]["agent"]);
        }
        let table = place.run(&["audit", "search", "--key", UNFIT]).ok();
        is_legible(&table);
        assert!(table.lines().count() > 2, "it is found by the name that it has");
        is_legible(&place.run(&["audit", "search"]).ok());
        is_legible(&place.run(&["audit", "search", "--json"]).ok());
        place.run(&["audit", "verify"]).ok();
        place.run(&["audit", "verify", "--file", "audit.jsonl"]).ok();
    }
}

#[test]
fn a_token_has_a_name_that_can_be_seen() {
    let place = place("text");
    for name in ["a\u{202e}b", "a\u{200b}", "a\nb", "\u{9b}"] {
        let told = place.run(&["token", "create", "--name", name, "--tenants", "*", "--actions", "read"]).failed(2);
        assert!(told.contains("can be seen"), "{told}");
        is_legible(&told);
    }
}
