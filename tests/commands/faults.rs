//! What only befalls a process of its own: a disk that takes nothing more.

use std::process::Command;

use serde_json::Value;

use crate::{
    program::{Infisical, Place, Running, client, look_up, master_key},
    within::{output, within},
};

/// A file that may not grow is SQLite's to report; by itself it would end the process.
const SURVIVES: [&str; 3] = ["sh", "-c", "trap '' XFSZ; exec \"$@\""];

/// How many bytes the files may have that the process writes to from now on.
fn limit_files(serving: &Running, bytes: &str) {
    let limit = ["--pid", &serving.id().to_string(), &format!("--fsize={bytes}:")].map(str::to_owned);
    assert!(output(Command::new("prlimit").args(limit)).status.success());
}

async fn put(url: &str, token: &str, name: &str) -> (u16, Value) {
    let request = client().put(format!("{url}/v1/tenants/{name}?create_tenant=true")).bearer_auth(token);
    let answer = request.json(&serde_json::json!({ "value": name })).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

async fn ready(url: &str) -> (u16, Value) {
    let answer = client().get(format!("{url}/readyz")).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_takes_nothing_more_under_sqlite_stops_writes_and_no_read() {
    let infisical = Infisical::start().await;
    for tenant in ["acme", "globex"] {
        infisical.world().put("prod", &format!("/tenants/{tenant}"), "K", tenant);
    }
    let mut place = Place::new(&format!(
        "environment = \"prod\"\nphase = \"hybrid\"\n[server]\nlisten = \"127.0.0.1:0\"\n\
         {infisical}[keys]\nsources = [\"file:master.key\"]\n\
         [[rules]]\ntenants = \"owned\"\nphase = \"database\"\n",
        infisical = infisical.section(),
    ));
    place.set("INFISICAL_CLIENT_SECRET", &infisical.credentials.client_secret);
    place.write("master.key", &master_key());
    let (mut serving, url) = place.serve_under(&SURVIVES);
    let create = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read,write,admin"];
    let token = place.run(&create).ok().trim().to_owned();
    let cold: Vec<String> = (0..24).map(|number| format!("COLD_{number}")).collect();
    for key in cold.iter().map(String::as_str).chain(["WARM"]) {
        assert_eq!(put(&url, &token, &format!("owned/secrets/{key}")).await.0, 201);
    }
    for (tenant, key) in [("owned", "WARM"), ("acme", "K")] {
        assert_eq!(look_up(&url, &token, tenant, key).await.0, 200);
    }

    limit_files(&serving, "1");
    for (round, key) in cold.iter().enumerate() {
        let refused = put(&url, &token, "owned/secrets/NEW").await;
        assert_eq!((refused.0, refused.1["code"].as_str()), (503, Some("audit_unavailable")), "{refused:?}");
        let (status, tier, body) = look_up(&url, &token, "owned", key).await;
        assert!(status == 200 && tier.starts_with("database; hit"), "round {round}: {status} {tier} {body}");
        for (tenant, key) in [("owned", "WARM"), ("acme", "K")] {
            let (status, tier, body) = look_up(&url, &token, tenant, key).await;
            // From memory, unless its change is heard of again: whose commit was not answered
            // takes what it did lately for done by another.
            let is_held = tier.contains("memory; hit") || tier.starts_with("database; hit");
            assert!(status == 200 && is_held, "round {round}: {status} {tier} {body}");
        }
        assert_eq!(look_up(&url, &token, "owned", "MADE_UP").await.0, 404, "an absence is read as well");
        let (status, told) = ready(&url).await;
        assert_eq!((status, &told["status"]), (200, &"degraded".into()), "round {round}: {told}");
        assert_eq!((&told["tiers"]["database"]["state"], &told["audit"]["state"]), (&"up".into(), &"down".into()));
    }
    assert_eq!(look_up(&url, &token, "globex", "K").await.0, 200, "from Infisical, and not written back");
    assert_eq!(put(&url, &token, "acme/secrets/K").await.0, 503);
    assert_eq!(infisical.world().value("prod", "/tenants/acme", "K").as_deref(), Some("acme"));
    serving.stderr_line("the audit cannot be written");
    let page = client().get(format!("{url}/metrics")).bearer_auth(&token).send().await.unwrap().text().await.unwrap();
    assert!(page.contains("secretier_audit_up 0\n") && page.contains("secretier_database_up 1\n"), "{page}");
    assert!(page.contains("secretier_audit_failures_total{sink=\"database\"}"), "{page}");

    limit_files(&serving, "unlimited");
    let healed = async {
        while put(&url, &token, "owned/secrets/NEW").await.0 != 201 || ready(&url).await.1["status"] != "ready" {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    within("it heals", healed).await;
    assert_eq!(put(&url, &token, "acme/secrets/K").await.0, 200);
    assert_eq!(serving.terminate(), 0);
}
