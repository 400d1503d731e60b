//! What only befalls a process of its own: a disk that takes nothing more.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

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
    assert!(!page.contains("secretier_audit_failures_total{sink=\"database\"} 0\n"), "{page}");

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

/// A file system of its own, in memory, so that a test can fill it or forbid writes.
struct Mounted<'p>(&'p Path);

impl<'p> Mounted<'p> {
    /// Nothing where the system does not let us mount any: said loudly, for then nothing is tested.
    #[expect(clippy::print_stderr, reason = "who runs the tests must see that one of them tests nothing")]
    fn on(path: &'p Path) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let mounted = output(Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(path));
        if mounted.status.success() {
            return Some(Self(path));
        }
        eprintln!("NOT TESTED: no file system can be mounted here: {}", String::from_utf8_lossy(&mounted.stderr));
        None
    }

    fn remount(&self, option: &str) {
        let remounted = output(Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(self.0));
        assert!(remounted.status.success(), "{remounted:?}");
    }

    /// Takes all the room that is left.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = std::fs::File::create(&path).unwrap();
        for size in [64 << 10, 4096, 1] {
            while std::io::Write::write_all(&mut file, &vec![1; size]).is_ok() {}
        }
        path
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        output(Command::new("umount").arg("--lazy").arg(self.0));
    }
}

/// What reads and writes come to where the database can only be read.
async fn reads_only(url: &str, token: &str, serving: &Running) {
    let (status, tier, body) = look_up(url, token, "owned", "K").await;
    assert!(status == 200 && tier.starts_with("database; hit"), "{status} {tier} {body}");
    assert_eq!(look_up(url, token, "owned", "MADE_UP").await.0, 404);
    assert_eq!(put(url, token, "owned/secrets/NEW").await.0, 503);
    serving.until_said_times("the database takes no writes", 1);
    let (status, told) = ready(url).await;
    assert_eq!((status, &told["status"]), (200, &"degraded".into()), "{told}");
    let database = &told["tiers"]["database"];
    assert_eq!((&database["state"], &database["writes"]), (&"up".into(), &"refused".into()), "{told}");
}

async fn heals(url: &str, token: &str) {
    let healed = async {
        while put(url, token, "owned/secrets/NEW").await.0 != 201 || ready(url).await.1["status"] != "ready" {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    within("it heals without a restart", healed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_started_where_nothing_can_be_written_serves_what_it_can_read_until_it_can() {
    let place = Place::new("");
    let folder = place.path().join("disk");
    let Some(disk) = Mounted::on(&folder) else { return };
    place.write("master.key", &master_key());
    place.write(
        "secretier.toml",
        &format!(
            "environment = \"prod\"\nphase = \"database\"\n[server]\nlisten = \"127.0.0.1:0\"\n\
             [database]\nurl = \"sqlite:{}/secretier.db\"\n[keys]\nsources = [\"file:master.key\"]\n",
            folder.display()
        ),
    );
    let (serving, url) = place.serve();
    let create = ["token", "create", "--name", "api", "--tenants", "*", "--actions", "read,write,admin"];
    let token = place.run(&create).ok().trim().to_owned();
    assert_eq!(put(&url, &token, "owned/secrets/K").await.0, 201);
    // Killed: what SQLite has beside its file stays there.
    drop(serving);

    let filler = disk.fill();
    let (serving, url) = place.serve();
    reads_only(&url, &token, &serving).await;
    std::fs::remove_file(filler).unwrap();
    heals(&url, &token).await;
    drop(serving);

    disk.remount("ro");
    let (serving, url) = place.serve();
    reads_only(&url, &token, &serving).await;
    disk.remount("rw");
    let remove = client().delete(format!("{url}/v1/tenants/owned/secrets/NEW")).bearer_auth(&token);
    let removed = async {
        while remove.try_clone().unwrap().send().await.unwrap().status() != 204 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    within("a write is taken", removed).await;
    heals(&url, &token).await;
}
