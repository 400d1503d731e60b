//! `secretier doctor` and `config check --connect`: what is wrong is named, nothing secret is shown, and both end.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::net::TcpListener;

use crate::{
    postgres::Postgres,
    program::{Infisical, Place, master_key},
};

/// How long it may take, whatever hangs.
const PROMISED: Duration = Duration::from_secs(20);

fn place_at(infisical: &str, secret: &str, database: Option<&str>) -> Place {
    let mut place = Place::new("");
    let file = format!("sqlite:{}", place.path().join("s.db").display());
    let url = database.unwrap_or(&file);
    place.write(
        "secretier.toml",
        &format!("environment = \"prod\"\n[database]\nurl = \"{url}\"\n{infisical}\n[keys]\nsources = [\"file:master.key\"]\n"),
    );
    place.write("master.key", &master_key());
    place.set("INFISICAL_CLIENT_SECRET", secret);
    place
}

/// The findings of one outcome, as "area, check: text; advice".
fn findings(place: &Place, command: &[&str], outcome: &str) -> (i32, Vec<String>) {
    let began = Instant::now();
    let ended = place.run(&[command, &["--json"]].concat());
    assert!(began.elapsed() < PROMISED, "{:?}", began.elapsed());
    let told: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"));
    assert_eq!(told["ok"], ended.code == 0, "{told}");
    let text = |finding: &Value, name: &str| finding[name].as_str().unwrap_or_default().to_owned();
    let line = |finding: &Value| {
        let [area, check, said, advice] = ["area", "check", "text", "advice"].map(|name| text(finding, name));
        format!("{area}, {check}: {said}; {advice}")
    };
    let all = told["findings"].as_array().unwrap().iter();
    (ended.code, all.filter(|finding| finding["outcome"] == outcome).map(line).collect())
}

#[track_caller]
fn has(findings: &[String], parts: &[&str]) {
    let found = findings.iter().any(|finding| parts.iter().all(|part| finding.contains(part)));
    assert!(found, "{parts:?} in {findings:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_all_is_well_it_says_so_and_shows_no_secret() {
    let infisical = Infisical::start().await;
    infisical.world().put("prod", "/tenants/acme", "STRIPE_KEY", "sk_doctor_must_not_show_this");
    let place = place_at(&infisical.section(), &infisical.credentials.client_secret, None);

    let (code, ok) = findings(&place, &["doctor"], "ok");
    assert_eq!(code, 0, "{ok:#?}");
    has(&ok, &["database, file", "is not there yet"]);
    assert!(!place.path().join("s.db").exists(), "it changes nothing");
    place.run(&["token", "list"]).ok();
    let content = async |name: &str| {
        let copy = place.path().join(name);
        place.sql(&format!("VACUUM INTO '{}'", copy.display())).await;
        std::fs::read(copy).unwrap()
    };
    let before = content("before.db").await;

    let (code, ok) = findings(&place, &["doctor"], "ok");
    assert_eq!(code, 0, "{ok:#?}");
    for parts in [
        &["configuration, settings"][..],
        &["machine, open files"],
        &["database, tables", "those of this version"],
        &["database, pages", "whole"],
        &["master keys, sources", "gives 1 keys"],
        &["upstream, login"],
        &["upstream, tenants", "/tenants in environment prod", "1 tenants"],
        &["upstream, read", "/tenants/acme"],
        &["upstream, clock", "agrees"],
    ] {
        has(&ok, parts);
    }
    assert!(content("after.db").await == before, "it changes nothing");
    let said = place.run(&["doctor"]);
    let text = format!("{}{}", said.stdout, said.stderr);
    let master_key = std::fs::read_to_string(place.path().join("master.key")).unwrap();
    for secret in ["sk_doctor_must_not_show_this", &infisical.credentials.client_secret, master_key.trim()] {
        assert!(!text.contains(secret), "{text}");
    }
    assert!(text.lines().all(|line| line.len() < 400), "a line each: {text}");
    let (code, failures) = findings(&place, &["config", "check", "--connect"], "failure");
    assert_eq!((code, failures), (0, vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_named_with_what_to_do() {
    let infisical = Infisical::start().await;
    infisical.world().put("prod", "/tenants/acme", "K", "value");
    let section = infisical.section();
    let secret = &infisical.credentials.client_secret;

    let wrong_secret = place_at(&section, "wrong", None);
    for command in [&["doctor"][..], &["config", "check", "--connect"]] {
        let (code, failures) = findings(&wrong_secret, command, "failure");
        assert_eq!((code, failures.len()), (1, 1), "{failures:#?}");
        has(&failures, &["upstream, login", "client_secret"]);
    }
    let nowhere = place_at(&format!("{section}tenants_path = \"/nowhere\"\n"), secret, None);
    has(&findings(&nowhere, &["doctor"], "failure").1, &["upstream, tenants", "infisical.tenants_path"]);

    let no_folder = place_at(&section, secret, Some("sqlite:/nowhere/at/all/s.db"));
    let (_, failures) = findings(&no_folder, &["doctor"], "failure");
    has(&failures, &["database, file", "the folder exists"]);

    let good = place_at(&section, secret, None);
    good.run(&["token", "list"]).ok();
    std::fs::remove_file(good.path().join("master.key")).unwrap();
    has(&findings(&good, &["doctor"], "failure").1, &["master keys, keys", "openssl rand -hex 32"]);

    let other = place_at(&section, secret, None);
    other.run(&["token", "list"]).ok();
    let text = std::fs::read_to_string(other.path().join("secretier.toml")).unwrap();
    other.write("secretier.toml", &text.replace("environment = \"prod\"", "environment = \"staging\""));
    has(&findings(&other, &["doctor"], "failure").1, &["master keys", "environment \"prod\"", "\"staging\""]);

    let unknown = place_at(&format!("{section}unheard_of = 1\n"), secret, None);
    let (code, failures) = findings(&unknown, &["doctor"], "failure");
    assert_eq!(code, 1);
    has(&failures, &["configuration, settings", "unheard_of"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_is_examined_from_the_login_to_the_rights() {
    let url = Postgres::shared().database().await;
    let place = place_at("", "", Some(&url));
    let (code, ok) = findings(&place, &["doctor"], "ok");
    assert_eq!(code, 0, "{ok:#?}");
    has(&ok, &["database, server", "PostgreSQL"]);
    has(&ok, &["database, pooler", "a session of its own"]);
    has(&ok, &["database, schema", "there is no schema secretier yet"]);
    has(&ok, &["upstream, settings", "there is none"]);

    place.run(&["token", "list"]).ok();
    let (code, ok) = findings(&place, &["doctor"], "ok");
    assert_eq!(code, 0, "{ok:#?}");
    for parts in [
        &["database, tables", "those of this version"][..],
        &["database, schema", "has its rights"],
        &["database, connections", "are in use"],
        &["database, tls", "does not leave this machine"],
        &["database, clock", "agrees"],
        &["master keys, keys", "are there"],
    ] {
        has(&ok, parts);
    }
    has(&findings(&place, &["doctor"], "warning").1, &["database, role", "is a superuser"]);

    place.sql("DELETE FROM settings WHERE name = 'environment'").await;
    findings(&place, &["doctor"], "ok");
    let claimed = crate::postgres::number(&url, "SELECT count(*) FROM secretier.settings WHERE name = 'environment'");
    assert_eq!(claimed.await, 0, "it claims nothing");

    let (base, _) = url.rsplit_once('/').unwrap();
    let missing = place_at("", "", Some(&format!("{base}/no_such_database")));
    let (code, failures) = findings(&missing, &["doctor"], "failure");
    assert_eq!(code, 1);
    has(&failures, &["database, connection", "make the database"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_whatever_hangs() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let section = format!(
        "[infisical]\nsite_url = \"https://localhost:{port}\"\nproject_id = \"p\"\nclient_id = \"c\"\nclient_secret = \"s\"\n"
    );
    let place = place_at(&section, "", Some(&format!("postgres://app:hunter2@127.0.0.1:{port}/app")));
    let (code, failures) = findings(&place, &["doctor"], "failure");
    assert_eq!(code, 1);
    has(&failures, &["database, connection"]);
    has(&failures, &["upstream, tls", "in time"]);
    assert!(!failures.concat().contains("hunter2"), "{failures:?}");
}
