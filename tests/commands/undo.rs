//! An undo undoes: what `migrate rollback --push`, `cleanup` and `restore` leave in Infisical is
//! what was served, or they say before they begin what they cannot do.

use std::{collections::BTreeMap, time::Duration};

use secretier::phase::Phase;
use serde_json::json;

use crate::{
    migrate::Site,
    postgres::Postgres,
    program::{keeping_client, secret_url},
    quick::times,
};

const ENV: &str = "prod";

/// A site with one running instance, and a token that may write.
struct Served {
    site: Site,
    token: String,
    address: String,
    _serving: crate::program::Running,
}

impl Served {
    async fn new(url: Option<&str>) -> Self {
        let mut site = Site::new(url, "hybrid", "").await;
        site.place.set("SECRETIER_SERVER__MAX_VALUE", "2MiB");
        let token = site.token();
        let (serving, address) = site.place.serve();
        Self { site, token, address, _serving: serving }
    }

    async fn put(&self, tenant: &str, key: &str, value: &str) {
        let request = keeping_client().put(secret_url(&self.address, tenant, key)).bearer_auth(&self.token);
        let sent = request.json(&json!({ "value": value })).send().await.unwrap();
        assert!(sent.status().is_success(), "{key:?}: {}", sent.status());
    }

    async fn delete(&self, tenant: &str, key: &str) {
        let request = keeping_client().delete(secret_url(&self.address, tenant, key)).bearer_auth(&self.token);
        assert_eq!(request.send().await.unwrap().status(), 204);
    }

    /// Every value that is served of a tenant.
    async fn values(&self, tenant: &str) -> BTreeMap<String, String> {
        let list = format!("{}/v1/tenants/{tenant}/secrets?values=true", self.address);
        let list = keeping_client().get(list).bearer_auth(&self.token).send().await.unwrap();
        assert_eq!(list.status(), 200, "{}", list.text().await.unwrap());
        let list: serde_json::Value = list.json().await.unwrap();
        let text = |key: &serde_json::Value, field: &str| key[field].as_str().unwrap().to_owned();
        list["keys"].as_array().unwrap().iter().map(|key| (text(key, "key"), text(key, "value"))).collect()
    }

    fn folder(&self, tenant: &str) -> BTreeMap<String, String> {
        self.site.infisical().secrets(ENV, &format!("/tenants/{tenant}")).into_iter().collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_infisical_cannot_hold_is_named_before_anything_is_written_and_the_tenant_stays() {
    let large = "x".repeat(1 << 20);
    let odd: [(&str, &str); 9] = [
        ("PLAIN ", "overwrites its neighbour"),
        ("\u{a0}PLAIN", "the same with another blank"),
        ("PLAIN\u{feff}", "and another"),
        ("PADDED_VALUE", " value "),
        ("LINES", "value\n\n"),
        ("REFERENCE", "pa${SMTP_PASSWORD}ss"),
        ("ELSEWHERE", "${prod.tenants.globex.KEY}"),
        ("__proto__", "inherited"),
        ("LARGE", &large),
    ];
    let served = Served::new(None).await;
    for (number, (key, value)) in odd.iter().enumerate() {
        let tenant = format!("tenant-{number}");
        served.site.holds(&tenant, &[("PLAIN", "plain"), ("SMTP_PASSWORD", "hush")]);
        served.site.migrate(&["run", "--tenants", &tenant, "--cutover"]).ok();
        served.put(&tenant, key, value).await;
        served.put(&tenant, "SMTP_PASSWORD", "another").await;
        let (before, values) = (served.folder(&tenant), served.values(&tenant).await);
        let refused = served.site.migrate(&["rollback", &tenant, "--push"]).failed(1);
        assert!(refused.contains(&format!("{key:?}")) && refused.contains("nothing was written"), "{refused}");
        assert_eq!(served.folder(&tenant), before, "{key:?}");
        assert_eq!(served.values(&tenant).await, values, "{key:?}");
        // Once it is out of the way, the rest goes.
        served.delete(&tenant, key).await;
        served.site.migrate(&["rollback", &tenant, "--push"]).ok();
        assert_eq!(served.folder(&tenant)["SMTP_PASSWORD"], "another");
        assert_eq!(served.values(&tenant).await["PLAIN"], "plain");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_leaves_what_was_served_references_included() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let served = Served::new(url.as_deref()).await;
        let texts = [
            ("HOST", "db"),
            ("PORT", "5432"),
            ("URL", "pg://${HOST}:${PORT}"),
            ("OUTER", "[${URL}]"),
            ("PORTS", "${PORT},${PORT}"),
            ("GONE", "g"),
        ];
        served.site.holds("acme", &texts);
        served.site.migrate(&["run", "--all", "--cutover"]).ok();
        served.put("acme", "HOST", "elsewhere").await;
        served.put("acme", "NEW", "n").await;
        served.delete("acme", "GONE").await;
        let values = served.values("acme").await;
        assert_eq!(values["URL"], "pg://db:5432", "it does not follow what changes since");
        served.site.migrate(&["rollback", "acme", "--push"]).ok();
        assert_eq!(served.values("acme").await, values);
        let folder = served.folder("acme");
        assert_eq!(folder["URL"], "pg://db:5432", "its reference would be another value by now");
        assert_eq!((folder["OUTER"].as_str(), folder["PORTS"].as_str()), ("[${URL}]", "${PORT},${PORT}"));
        assert_eq!((folder["HOST"].as_str(), folder["NEW"].as_str()), ("elsewhere", "n"));
        assert!(!folder.contains_key("GONE"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_writes_over_nothing_that_was_changed_in_infisical_since() {
    let served = Served::new(None).await;
    served.site.holds("acme", &[("A", "a"), ("B", "b")]);
    served.site.migrate(&["run", "--all", "--cutover"]).ok();
    served.put("acme", "A", "written").await;
    served.site.infisical().put(ENV, "/tenants/acme", "B", "changed there");
    served.site.infisical().put(ENV, "/tenants/acme", "C", "new there");
    let before = served.folder("acme");
    let refused = served.site.migrate(&["rollback", "acme", "--push"]).failed(1);
    assert!(
        refused.contains("\"B\"") && refused.contains("\"C\"") && refused.contains("nothing was written"),
        "{refused}"
    );
    assert_eq!(served.folder("acme"), before);
    served.site.infisical().put(ENV, "/tenants/acme", "B", "b");
    served.site.infisical().delete(ENV, "/tenants/acme", "C");
    served.site.migrate(&["rollback", "acme", "--push"]).ok();
    assert_eq!(served.folder("acme")["A"], "written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_was_killed_after_it_replaced_a_reference_goes_on() {
    let served = Served::new(None).await;
    served.site.holds("acme", &[("HOST", "db"), ("URL", "pg://${HOST}")]);
    served.site.migrate(&["run", "--all", "--cutover"]).ok();
    served.put("acme", "HOST", "elsewhere").await;
    let values = served.values("acme").await;
    // Another text than the one the push writes is somebody's change.
    served.site.infisical().put(ENV, "/tenants/acme", "URL", "pg://changed there");
    let refused = served.site.migrate(&["rollback", "acme", "--push"]).failed(1);
    assert!(refused.contains("\"URL\"") && refused.contains("nothing was written"), "{refused}");
    // This is what a push leaves that is killed when it has written URL.
    served.site.infisical().put(ENV, "/tenants/acme", "URL", "pg://db");
    served.site.migrate(&["rollback", "acme", "--push"]).ok();
    assert_eq!(served.values("acme").await, values);
    assert_eq!(served.folder("acme"), values);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archived_tenant_is_pushed_to_a_new_folder_and_one_without_secrets_gets_one_too() {
    let served = Served::new(None).await;
    served.site.holds("acme", &[("HOST", "db"), ("URL", "pg://${HOST}"), ("B", "b")]);
    served.site.holds("empty", &[]);
    served.site.migrate(&["run", "--all", "--cutover"]).ok();
    let values = served.values("acme").await;
    served.site.migrate(&["cleanup", "--older-than", "0s", "--yes", "--archive", "a.jsonl"]).ok();
    assert!(served.folder("acme").is_empty());
    served.site.migrate(&["rollback", "acme", "--push"]).ok();
    assert_eq!(served.values("acme").await, values);
    assert_eq!(served.folder("acme")["URL"], "pg://${HOST}");
    served.site.migrate(&["rollback", "empty", "--push"]).ok();
    assert!(served.site.infisical().delete_folder(ENV, "/tenants/empty"), "it was made");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cleanup_keeps_what_a_restore_could_not_write_back_and_a_restore_goes_on() {
    let served = Served::new(None).await;
    let world = served.site.infisical();
    let references = [("HOST", "db"), ("URL", "pg://${HOST}"), ("NL", "line\n"), ("a/b c?%", "slash")];
    served.site.holds("fine", &references);
    served.site.holds("empty", &[]);
    served.site.holds("padded", &[("A", "a")]);
    world.put(ENV, "/tenants/padded", "PADDED", " value ");
    served.site.holds("proto", &[("A", "a")]);
    world.put(ENV, "/tenants/proto", "__proto__", "p");
    served.site.holds("other", &[("A", "a")]);
    world.put(ENV, "/shared", "IMPORTED", "i");
    served.site.holds("imports", &[("A", "${IMPORTED}")]);
    world.import(ENV, "/tenants/imports", ENV, "/shared");
    served.site.migrate(&["run", "--all", "--cutover"]).ok();
    let tenants = ["fine", "empty", "padded", "proto", "other", "imports"];
    let mut values = BTreeMap::new();
    for tenant in tenants {
        values.insert(tenant, served.values(tenant).await);
    }
    let (code, outcome) = served.site.json(&["cleanup", "--older-than", "0s", "--yes", "--archive", "a.jsonl"]);
    assert_eq!(code, 1, "{outcome}");
    for one in outcome["tenants"].as_array().unwrap() {
        let stays = matches!(one["tenant"].as_str().unwrap(), "padded" | "proto");
        assert_eq!(one["removed"], !stays, "{outcome}");
    }
    // Somebody has made one of them anew, with another value: it is left alone, and the rest goes on.
    served.site.holds("other", &[("A", "newer")]);
    let told = served.site.migrate(&["restore", "a.jsonl"]);
    assert!(told.code == 1 && told.stderr.contains("other"), "{told:?}");
    assert!(told.stdout.contains("3 folders are back as archived, 1 is not"), "{told:?}");
    assert_eq!(served.folder("other")["A"], "newer");
    assert_eq!(served.folder("fine"), references.map(|(key, text)| (key.to_owned(), text.to_owned())).into());
    served.site.infisical().put(ENV, "/tenants/other", "A", "a");
    for tenant in tenants {
        let back = served.site.migrate(&["rollback", tenant]);
        // It was not put back, as far as anybody knows here: somebody says so by writing to it.
        let pushed = if back.code == 0 { back } else { served.site.migrate(&["rollback", tenant, "--push"]) };
        assert_eq!(pushed.code, 0, "{tenant}: {pushed:?}");
        // An instance hears of a folder that was made again within a minute.
        if tenant != "empty" {
            assert_eq!(served.values(tenant).await, values[tenant], "{tenant}");
        }
    }
}

/// Kills a command again and again, and lets it come to its end.
async fn killed(served: &Served, command: &[&str], kills: usize) {
    for kill in 0..kills {
        let running = served.site.start(command);
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..(20 + 20 * kill as u64)))).await;
        drop(running);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_and_a_restore_that_are_killed_at_any_moment_lose_nothing() {
    let kills = times(15, 2);
    for url in [None, Some(Postgres::shared().database().await)] {
        let served = Served::new(url.as_deref()).await;
        let texts: Vec<(String, String)> = (0..40).map(|number| (format!("K{number}"), format!("v{number}"))).collect();
        let texts: Vec<(&str, &str)> = texts.iter().map(|(key, text)| (key.as_str(), text.as_str())).collect();
        served.site.holds("acme", &texts);
        served.site.holds("globex", &texts);
        served.site.migrate(&["run", "--all", "--cutover"]).ok();
        for number in 0..40 {
            served.put("acme", &format!("K{number}"), &format!("written {number}")).await;
        }
        let values = served.values("acme").await;
        killed(&served, &["rollback", "acme", "--push"], kills).await;
        assert_eq!(served.values("acme").await, values, "whoever owns it by now");
        let ended = served.site.migrate(&["rollback", "acme", "--push"]);
        assert!(ended.code == 0 || ended.stderr.contains("already"), "{ended:?}");
        assert_eq!(served.values("acme").await, values);
        assert_eq!(served.folder("acme"), values);
        assert_ne!(served.site.database().await["acme"].0, Some(Phase::Database));

        let before = served.folder("globex");
        served.site.migrate(&["cleanup", "--older-than", "0s", "--yes", "--archive", "a.jsonl"]).ok();
        assert!(served.folder("globex").is_empty());
        killed(&served, &["restore", "a.jsonl"], kills).await;
        served.site.migrate(&["restore", "a.jsonl"]).ok();
        assert_eq!(served.folder("globex"), before);
        served.site.migrate(&["rollback", "globex"]).ok();
        assert_eq!(served.values("globex").await, before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_says_before_it_changes_anything_that_it_would_bring_back_what_was_shredded() {
    for url in [None, Some(Postgres::shared().database().await)] {
        let served = Served::new(url.as_deref()).await;
        for tenant in ["acme", "globex", "initech"] {
            served.site.holds(tenant, &[("KEY", "destroyed")]);
        }
        served.site.migrate(&["run", "--all", "--cutover"]).ok();
        for tenant in ["acme", "initech"] {
            served.site.place.run(&["tenant", "shred", tenant, "--yes"]).ok();
        }
        let refused = served.site.migrate(&["rollback", "*"]).failed(1);
        assert!(refused.contains("acme, initech") && refused.contains("--after-shred"), "{refused}");
        assert!(!refused.contains("globex"), "{refused}");
        let database = served.site.database().await;
        assert!(
            database.values().all(|(phase, _)| *phase == Some(Phase::Database)),
            "nothing was changed: {database:?}"
        );

        // Whose folder is gone has nothing to bring back.
        assert!(served.site.infisical().delete_folder(ENV, "/tenants/initech"));
        served.site.migrate(&["rollback", "globex", "initech", "--push"]).ok();
        assert_eq!(served.values("globex").await["KEY"], "destroyed", "it was not shredded");

        let told = served.site.migrate(&["rollback", "acme", "--after-shred"]);
        assert!(told.stderr.contains("acme") && told.stderr.contains("served again"), "{told:?}");
        told.ok();
        assert_eq!(served.values("acme").await["KEY"], "destroyed", "as was asked for");
        // Taken over again, the folder is what is served: there is nothing to say any more.
        served.site.migrate(&["run", "--tenants", "acme", "--cutover"]).ok();
        served.site.migrate(&["rollback", "acme"]).ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_says_before_it_begins_that_the_archive_holds_what_was_shredded_since() {
    let served = Served::new(None).await;
    for tenant in ["acme", "globex"] {
        served.site.holds(tenant, &[("KEY", "destroyed")]);
    }
    served.site.migrate(&["run", "--all", "--cutover"]).ok();
    served.site.migrate(&["cleanup", "--all", "--older-than", "0s", "--yes", "--archive", "archive.jsonl"]).ok();
    served.site.place.run(&["tenant", "shred", "acme", "--yes"]).ok();
    let refused = served.site.migrate(&["restore", "--all", "archive.jsonl"]).failed(1);
    assert!(refused.contains("acme") && !refused.contains("globex") && refused.contains("--after-shred"), "{refused}");
    for tenant in ["acme", "globex"] {
        assert_eq!(served.folder(tenant).len(), 0, "nothing was put back");
    }
    served.site.migrate(&["restore", "--tenants", "globex", "archive.jsonl"]).ok();
    assert_eq!(served.folder("globex")["KEY"], "destroyed");
    served.site.migrate(&["restore", "--all", "--after-shred", "archive.jsonl"]).ok();
    assert_eq!(served.folder("acme")["KEY"], "destroyed");
}
