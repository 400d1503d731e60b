//! What every upstream promises, whichever it is: each test runs over Infisical and over a
//! directory, on both databases.

use std::{fs, path::PathBuf, time::Duration};

use reqwest::Method;
use secretier::phase::Phase;
use serde_json::json;
use tempfile::TempDir;

use crate::app::{Answer, Backend, ENV, Setup, TestApp, eventually, on_both};

/// Who owns the secrets.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Infisical,
    Directory,
}

/// An instance with the upstream that owns its secrets.
struct There {
    app: TestApp,
    kind: Kind,
    /// Holds `secrets`, which the directory is.
    files: TempDir,
}

impl There {
    async fn start(kind: Kind, backend: Backend, phase: Phase) -> Self {
        let files = TempDir::new().unwrap();
        fs::create_dir(files.path().join("secrets")).unwrap();
        let mut setup = Setup::new(backend, phase);
        setup.poll_interval = "30s";
        setup.directory = (kind == Kind::Directory).then(|| {
            let path = files.path().join("secrets");
            let path = path.display();
            format!("[directory]\npath = \"{path}\"\nwritable = true\ntimeout = \"30s\"\npoll_interval = \"30s\"")
        });
        Self { app: setup.start().await, kind, files }
    }

    fn folder(&self, tenant: &str) -> PathBuf {
        self.files.path().join("secrets").join(tenant)
    }

    fn make_folder(&self, tenant: &str) {
        match self.kind {
            Kind::Infisical => drop(self.app.world().folder(ENV, &format!("/tenants/{tenant}"))),
            Kind::Directory => fs::create_dir_all(self.folder(tenant)).unwrap(),
        }
    }

    /// Sets a secret at its owner.
    fn set(&self, tenant: &str, key: &str, value: &str) {
        self.make_folder(tenant);
        match self.kind {
            Kind::Infisical => self.app.world().put(ENV, &format!("/tenants/{tenant}"), key, value),
            Kind::Directory => fs::write(self.folder(tenant).join(key), value).unwrap(),
        }
    }

    /// Deletes one there.
    fn unset(&self, tenant: &str, key: &str) {
        match self.kind {
            Kind::Infisical => assert!(self.app.world().delete(ENV, &format!("/tenants/{tenant}"), key)),
            Kind::Directory => fs::remove_file(self.folder(tenant).join(key)).unwrap(),
        }
    }

    /// What its owner has.
    fn owned(&self, tenant: &str, key: &str) -> Option<String> {
        match self.kind {
            Kind::Infisical => self.app.world().value(ENV, &format!("/tenants/{tenant}"), key),
            Kind::Directory => fs::read_to_string(self.folder(tenant).join(key)).ok(),
        }
    }

    fn remove_folder(&self, tenant: &str) {
        match self.kind {
            Kind::Infisical => assert!(self.app.world().delete_folder(ENV, &format!("/tenants/{tenant}"))),
            Kind::Directory => fs::remove_dir_all(self.folder(tenant)).unwrap(),
        }
    }

    async fn fails(&mut self) {
        match self.kind {
            Kind::Infisical => self.app.infisical.stop().await,
            Kind::Directory => fs::rename(self.folder(""), self.files.path().join("away")).unwrap(),
        }
    }

    async fn recovers(&mut self) {
        match self.kind {
            Kind::Infisical => self.app.infisical.restart().await.unwrap(),
            Kind::Directory => fs::rename(self.files.path().join("away"), self.folder("")).unwrap(),
        }
    }
}

async fn on_each(phase: Phase, test: impl AsyncFn(There)) {
    for kind in [Kind::Infisical, Kind::Directory] {
        on_both(async |backend| test(There::start(kind, backend, phase).await).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_comes_as_its_owner_has_it_and_from_the_nearest_tier() {
    on_each(Phase::Hybrid, async |mut there| {
        let values = [("A", "a"), ("B-b.c d", "two\nlines\n"), ("C", "\u{e9}\"\\\u{1f600}")];
        for (key, value) in values {
            there.set("acme", key, value);
        }
        for (key, value) in values {
            assert_eq!(there.app.get("acme", key).await.value(), value, "{:?}", there.kind);
        }
        assert_eq!(there.app.get("acme", "A").await.header("cache-status").split(';').next(), Some("memory"));
        there.app.stored(3).await;
        there.fails().await;
        there.app.restart().await;
        for (key, value) in values {
            assert_eq!(there.app.get("acme", key).await.value(), value, "{:?}: from the database", there.kind);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_phase_that_keeps_no_copies_values_and_versions_come_all_the_same() {
    on_each(Phase::Infisical, async |there| {
        there.set("acme", "K", "v1");
        let before = there.app.get("acme", "K").await;
        assert_eq!(before.value(), "v1");
        there.set("acme", "K", "v2");
        let after = there.app.get_fresh("acme", "K").await;
        assert_eq!(after.value(), "v2");
        assert!(after.version() >= before.version());
        assert_ne!(before.etag(), after.etag());
        assert_eq!(there.app.rows().await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_its_owner_lacks_is_absent_and_what_it_is_given_is_there() {
    on_each(Phase::Hybrid, async |there| {
        there.set("acme", "K", "v");
        there.make_folder("empty");
        assert_eq!(there.app.get("acme", "OTHER").await.status, 404);
        assert_eq!(there.app.get("nobody", "K").await.status, 404);
        let listed = there.app.ask_tenant("empty", "/secrets").await;
        assert_eq!((listed.status, listed.json()["keys"].as_array().map(Vec::len)), (200, Some(0)), "{listed:?}");
        assert_eq!(there.app.ask_tenant("nobody", "/secrets").await.status, 404);
        there.set("acme", "OTHER", "o");
        assert_eq!(there.app.get_fresh("acme", "OTHER").await.value(), "o");
        there.remove_folder("acme");
        assert_eq!(there.app.get_fresh("acme", "K").await.status, 404);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_and_batches_have_all_of_a_folder_and_nothing_of_another() {
    on_each(Phase::Hybrid, async |there| {
        for (tenant, key) in [("acme", "A"), ("acme", "B"), ("globex", "C")] {
            there.set(tenant, key, &format!("{tenant} {key}"));
        }
        let listed = there.app.ask_tenant("acme", "/secrets?values=true").await.json();
        let keys = listed["keys"].as_array().unwrap().iter();
        let keys: Vec<_> = keys.map(|one| (one["key"].as_str().unwrap(), one["value"].as_str().unwrap())).collect();
        assert_eq!(keys, [("A", "acme A"), ("B", "acme B")]);
        let batch = there.app.request(Method::POST, "/v1/tenants/acme/secrets/batch-get");
        let batch = Answer::of(batch.json(&json!({"keys": ["B", "C"]}))).await.json();
        assert_eq!(batch["secrets"].as_array().unwrap().len(), 1, "{batch}");
        let tenants = there.app.ask(Method::GET, "/v1/tenants").await.json();
        let names: Vec<_> = tenants["tenants"].as_array().unwrap().iter().map(|one| one["tenant"].clone()).collect();
        assert_eq!(names, ["acme", "globex"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_seen_by_the_poll_without_anybody_asking_for_it() {
    on_each(Phase::Hybrid, async |there| {
        there.set("acme", "K", "v1");
        there.set("acme", "GONE", "g");
        assert_eq!(there.app.get("acme", "K").await.value(), "v1");
        there.app.stored(2).await;
        there.set("acme", "K", "v2");
        there.unset("acme", "GONE");
        eventually(async || {
            there.app.advance(Duration::from_secs(31));
            there.app.get("acme", "K").await.value() == "v2" && there.app.get("acme", "GONE").await.status == 404
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_at_its_owner_before_it_is_answered() {
    for phase in [Phase::Hybrid, Phase::Infisical] {
        on_each(phase, async |there| {
            assert_eq!(there.app.put("acme", "K", "v1").await.status, 201);
            assert_eq!(there.owned("acme", "K").as_deref(), Some("v1"));
            let changed = there.app.put("acme", "K", "v2").await;
            assert_eq!(changed.status, 200);
            assert_eq!(there.owned("acme", "K").as_deref(), Some("v2"));
            let read = there.app.get("acme", "K").await;
            assert_eq!((read.value().as_str(), read.etag()), ("v2", changed.etag()), "{:?}", there.kind);
            assert_eq!(there.app.delete("acme", "K").await.status, 204);
            assert_eq!(there.owned("acme", "K"), None);
            assert_eq!(there.app.get("acme", "K").await.status, 404);
            assert_eq!(there.app.put_known("nobody", "K", "v").await.problem().1, "tenant_unknown");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_its_owner_is_out_copies_are_served_and_nobody_is_said_to_be_absent() {
    on_each(Phase::Hybrid, async |mut there| {
        there.set("acme", "K", "v");
        there.set("globex", "K", "cold");
        assert_eq!(there.app.get("acme", "K").await.value(), "v");
        there.app.stored(1).await;
        there.fails().await;
        there.app.advance(Duration::from_secs(60 * 60));
        assert_eq!(there.app.get("acme", "K").await.value(), "v", "{:?}", there.kind);
        assert_eq!(there.app.get("globex", "K").await.problem(), (503, "unavailable".to_owned()));
        assert_eq!(there.app.get("nobody", "K").await.problem().0, 503);
        let ready = there.app.ask(Method::GET, "/readyz").await.json();
        assert_eq!(ready["tiers"]["infisical"]["state"], "down", "{ready}");
        there.recovers().await;
        eventually(async || {
            there.app.advance(Duration::from_secs(10));
            let answer = there.app.get("globex", "K").await;
            answer.status == 200 && answer.value() == "cold"
        })
        .await;
    })
    .await;
}

/// A directory has no references: a value is the text that it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_looks_like_a_reference_is_text_where_nothing_refers() {
    on_both(async |backend| {
        let there = There::start(Kind::Directory, backend, Phase::Hybrid).await;
        there.set("acme", "K", "${OTHER}");
        there.set("acme", "OTHER", "o");
        assert_eq!(there.app.get("acme", "K").await.value(), "${OTHER}");
        assert_eq!(there.app.put("acme", "L", "${prod.globex.X}").await.status, 201);
        assert_eq!(there.owned("acme", "L").as_deref(), Some("${prod.globex.X}"));
        assert_eq!(there.app.get("acme", "L").await.value(), "${prod.globex.X}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_not_written_says_so_and_stays_as_it_is() {
    on_both(async |backend| {
        let files = TempDir::new().unwrap();
        fs::create_dir(files.path().join("acme")).unwrap();
        fs::write(files.path().join("acme/K"), "v").unwrap();
        let mut setup = Setup::new(backend, Phase::Hybrid);
        setup.directory = Some(format!("[directory]\npath = \"{}\"", files.path().display()));
        let app = setup.start().await;
        for refused in [app.put("acme", "K", "w").await, app.put("new", "K", "w").await, app.delete("acme", "K").await]
        {
            assert_eq!(refused.problem(), (409, "upstream_read_only".to_owned()), "{refused:?}");
        }
        assert_eq!(app.get("acme", "K").await.value(), "v");
        assert_eq!(fs::read_to_string(files.path().join("acme/K")).unwrap(), "v");
    })
    .await;
}
