//! The audit's file, and logrotate.

use std::{fs, path::Path, process::Command};

use crate::program::{Place, client, master_key};

const PROGRAM: &str = "/usr/sbin/logrotate";

const CONFIG: &str = r#"
environment = "prod"
[server]
listen = "127.0.0.1:0"
[database]
url = "sqlite:secretier.db"
[audit]
sink = ["file"]
file = "audit.jsonl"
window = "1h"
"#;

/// What docs/AUDIT.md shows.
fn documented() -> String {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/AUDIT.md")).unwrap();
    let start = page.find("/var/log/secretier/audit.jsonl {\n").unwrap();
    page[start..start + page[start..].find("```").unwrap()].to_owned()
}

/// Rotates the file now, as these lines say.
fn rotate(place: &Place, lines: &str) {
    let folder = fs::canonicalize(place.path()).unwrap();
    let lines = lines.replace("/var/log/secretier", &folder.display().to_string());
    let (config, state) = (place.write("logrotate.conf", &lines), folder.join("logrotate.state"));
    let rotated = Command::new(PROGRAM).arg("--force").arg("--state").args([&state, &config]).output().unwrap();
    assert!(rotated.status.success(), "{}", String::from_utf8_lossy(&rotated.stderr));
}

async fn put(url: &str, token: &str, key: &str) -> u16 {
    let path = format!("{url}/v1/tenants/acme/secrets/{key}?create_tenant=true");
    client().put(path).bearer_auth(token).body(r#"{"value":"v"}"#).send().await.unwrap().status().as_u16()
}

/// The files of the audit, but the note of its ends.
fn files(place: &Place) -> Vec<String> {
    let names = fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("audit.jsonl") && !name.ends_with(".ends")).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn logrotate_rotates_dates_and_compresses_the_audit_while_it_is_written() {
    if !Path::new(PROGRAM).exists() {
        #[expect(clippy::print_stderr, reason = "what is left out is said")]
        {
            eprintln!("SKIPPED: logrotate is not there, and rotates nothing; install Debian's 'logrotate'");
        }
        return;
    }
    let place = Place::new(CONFIG);
    place.write("master.key", &master_key());
    let create = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read,write"];
    let token = place.run(&create).ok().trim().to_owned();
    let (mut serving, url) = place.serve();

    let numbered = "/var/log/secretier/audit.jsonl {\n rotate 9\n nodateext\n nocreate\n";
    let ways = [
        documented(),
        format!("{numbered} compress\n}}\n"),
        format!("{numbered} compress\n delaycompress\n}}\n"),
        format!("{numbered} create 0600\n}}\n").replace(" nocreate\n", ""),
        format!("{numbered} copytruncate\n}}\n").replace(" nocreate\n", ""),
    ];
    let mut written = 0;
    for (number, lines) in ways.iter().enumerate() {
        for key in ["A", "B"] {
            assert!(put(&url, &token, key).await < 300);
            written += 2;
        }
        rotate(&place, lines);
        place.run(&["audit", "verify", "--file", "audit.jsonl"]).ok();
        assert!(put(&url, &token, "C").await < 300, "it goes on at once");
        written += 2;
        serving.until_said_times("the audit's file was rotated", number + 1);
    }
    let names = files(&place);
    let dated = names.iter().filter(|name| name.starts_with("audit.jsonl-20")).count();
    assert_eq!(dated, 1, "{names:?}");
    assert!(
        names.iter().any(|name| name.ends_with(".gz")) && names.iter().any(|name| name.ends_with(".1")),
        "{names:?}"
    );
    assert_eq!(names.len(), ways.len() + 1, "{names:?}");
    assert_eq!(serving.terminate(), 0);
    assert!(!serving.stderr().contains("ERROR"), "{}", serving.stderr());

    let verify = ["audit", "verify", "--file", "audit.jsonl", "--json"];
    let found: serde_json::Value = serde_json::from_str(&place.run(&verify).ok()).unwrap();
    let write = found["chains"].as_array().unwrap().iter().find(|chain| chain["chain"] == "write").unwrap();
    assert_eq!((&found["sound"], &write["records"]), (&true.into(), &written.into()), "{found}");

    // A file that is gone, and stands nowhere beside, is another matter.
    let (mut serving, url) = place.serve();
    assert!(put(&url, &token, "A").await < 300);
    fs::remove_file(place.path().join("audit.jsonl")).unwrap();
    assert!(put(&url, &token, "B").await < 300);
    serving.stderr_line("the audit's file is shorter than it was left");
    assert_eq!(serving.terminate(), 0);
    assert_eq!(place.run(&verify).code, 1);
}
