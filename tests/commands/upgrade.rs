//! An upgrade: what the version before has left is there, and both run beside each other while
//! instances are replaced one by one.
//!
//! `scripts/upgrade` builds the program from before the last change of tables, names it in
//! `SECRETIER_TEST_PREVIOUS`, and runs what is ignored here.

use reqwest::{Method, StatusCode};
use secretier::phase::Phase;
use serde_json::json;

use crate::{
    postgres::Postgres,
    program::{Infisical, Place, client, look_up, master_key, secret_url},
    within::eventually,
};

/// One database, and the two programs on it.
struct Site {
    infisical: Infisical,
    before: Place,
    now: Place,
}

impl Site {
    async fn new(url: Option<String>) -> Self {
        let previous = std::env::var("SECRETIER_TEST_PREVIOUS")
            .expect("SECRETIER_TEST_PREVIOUS names the program of the version before: run scripts/upgrade");
        let infisical = Infisical::start().await;
        let (mut before, mut now) = (Place::new(""), Place::new(""));
        before.run_by(&previous);
        let folder = before.path().display().to_string();
        let url = url.unwrap_or_else(|| format!("sqlite:{folder}/secretier.db"));
        before.write("master.key", &format!("{}\n", master_key()));
        let config = format!(
            "environment = \"prod\"\nphase = \"database\"\n[server]\nlisten = \"127.0.0.1:0\"\n\
             [database]\nurl = \"{url}\"\ntimeout = \"30s\"\n[keys]\nsources = [\"file:{folder}/master.key\"]\n\
             {}timeout = \"30s\"\npoll_interval = \"0s\"\n[[rules]]\ntenants = \"hybrid\"\nphase = \"{}\"\n",
            infisical.section(),
            Phase::Hybrid
        );
        for place in [&mut before, &mut now] {
            place.write("secretier.toml", &config);
            place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
        }
        infisical.world().put("prod", "/tenants/hybrid", "K", "h1");
        Self { infisical, before, now }
    }
}

fn token(place: &Place, name: &str) -> String {
    let create = ["token", "create", "--name", name, "--tenants", "*", "--actions", "read,write"];
    place.run(&create).ok().trim().to_owned()
}

/// What a lookup answers: the value, or its status.
async fn value(url: &str, token: &str, tenant: &str, key: &str) -> Result<String, u16> {
    let (status, _, text) = look_up(url, token, tenant, key).await;
    let value = || serde_json::from_str::<serde_json::Value>(&text).unwrap()["value"].as_str().unwrap().to_owned();
    if status == 200 { Ok(value()) } else { Err(status) }
}

async fn put(url: &str, token: &str, key: &str, value: &str) {
    let path = format!("{}?create_tenant=true", secret_url(url, "acme", key));
    let sent = client().put(path).bearer_auth(token).json(&json!({ "value": value })).send().await.unwrap();
    assert!(sent.status().is_success(), "{key}: {}", sent.status());
}

async fn until(url: &str, token: &str, tenant: &str, key: &str, wanted: Result<&str, u16>) {
    eventually(async || value(url, token, tenant, key).await.as_deref().map_err(|status| *status) == wanted).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "wants the program of the version before, which scripts/upgrade builds"]
async fn instances_of_this_version_and_the_one_before_run_beside_each_other() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let site = Site::new(url).await;
        let read_write = token(&site.before, "before");
        let (mut old, old_at) = site.before.serve();
        put(&old_at, &read_write, "K", "1").await;
        put(&old_at, &read_write, "K", "2").await;
        put(&old_at, &read_write, "GONE", "g").await;
        assert_eq!(value(&old_at, &read_write, "hybrid", "K").await.as_deref(), Ok("h1"));

        // The tables are brought up to date while the old one serves.
        let (mut new, new_at) = site.now.serve();
        for at in [&old_at, &new_at] {
            assert_eq!(value(at, &read_write, "acme", "K").await.as_deref(), Ok("2"));
            assert_eq!(value(at, &read_write, "acme", "GONE").await.as_deref(), Ok("g"));
            assert_eq!(value(at, &read_write, "hybrid", "K").await.as_deref(), Ok("h1"));
        }
        let older = format!("{}?version=1", secret_url(&new_at, "acme", "K"));
        let older = client().get(older).bearer_auth(&read_write).send().await.unwrap();
        assert!(older.text().await.unwrap().contains("\"value\":\"1\""));

        // What is changed through one is what the other serves.
        put(&new_at, &read_write, "K", "3").await;
        until(&old_at, &read_write, "acme", "K", Ok("3")).await;
        put(&old_at, &read_write, "K", "4").await;
        until(&new_at, &read_write, "acme", "K", Ok("4")).await;
        let deleted = client().request(Method::DELETE, secret_url(&new_at, "acme", "GONE")).bearer_auth(&read_write);
        assert_eq!(deleted.send().await.unwrap().status(), StatusCode::NO_CONTENT);
        until(&old_at, &read_write, "acme", "GONE", Err(404)).await;
        site.infisical.world().put("prod", "/tenants/hybrid", "K", "h2");
        let refresh = client().post(format!("{new_at}/v1/tenants/hybrid/refresh")).bearer_auth(&read_write);
        assert!(refresh.send().await.unwrap().status().is_success());
        until(&old_at, &read_write, "hybrid", "K", Ok("h2")).await;

        // Tokens too, made by either.
        let made_now = token(&site.now, "now");
        until(&old_at, &made_now, "acme", "K", Ok("4")).await;
        site.now.run(&["token", "revoke", "now"]).ok();
        for at in [&old_at, &new_at] {
            until(at, &made_now, "acme", "K", Err(401)).await;
        }

        // The old one ends, and starts on the new tables: a roll-back of the program.
        assert_eq!(old.terminate(), 0);
        let (mut old, old_at) = site.before.serve();
        assert_eq!(value(&old_at, &read_write, "acme", "K").await.as_deref(), Ok("4"));
        put(&old_at, &read_write, "K", "5").await;
        until(&new_at, &read_write, "acme", "K", Ok("5")).await;
        assert_eq!(old.terminate(), 0);
        assert_eq!(value(&new_at, &read_write, "acme", "K").await.as_deref(), Ok("5"));
        assert_eq!(new.terminate(), 0);
        let verified = site.now.run(&["audit", "verify"]);
        assert_eq!(verified.code, 0, "{}{}", verified.stdout, verified.stderr);
    }
}
