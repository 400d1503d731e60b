//! What someone who can write to the tables cannot do.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use secretier::{
    clock::Timestamp,
    diagnosis::Area,
    keys::{Config as KeysConfig, MasterKeys, Sources},
    sealing::{KeyRing, MasterKey, OpenError},
    secret::{SecretKey, SecretValue},
    tenant::Tenant,
    tiers::{
        database::{Began, Database, Held, Precondition, StoreError, StoreOutcome, WrappedBy, WriteError},
        upstream::{
            Before, BuildError, ChangedFolder, Config, Everything, Fetched, Folders, Health, Lane, Overview,
            Reconfigured, Removal, Unstorable, Upstream, UpstreamError, Webhook,
        },
    },
};

use crate::backend::{Backend, held, key, new_ring, on_both, snapshot, stored, tenant, value, writer};

async fn filled(backend: &Backend) -> Database {
    let database = backend.open().await;
    for (of, text) in [("acme", "acme's"), ("umbrella", "umbrella's")] {
        for name in ["K", "L"] {
            database.put(&tenant(of), &key(name), &value(text), &Precondition::None, &writer(), None).await.unwrap();
        }
    }
    database
}

async fn is_forged(database: &Database, of: &str, name: &str) -> bool {
    matches!(held(database, of, name).await, Held::Unreadable(OpenError::Forged))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_copied_to_another_tenant_key_or_version_does_not_open() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        let copy = |to: &str, from: &str| {
            let row = |of: &str, name: &str| {
                format!("company_id = (SELECT id FROM companies WHERE subdomain = '{of}') AND secret_key = '{name}'")
            };
            let (to, from) = (to.split_once('/').unwrap(), from.split_once('/').unwrap());
            format!(
                "UPDATE company_secrets SET secret_value_encrypted = \
                 (SELECT secret_value_encrypted FROM company_secrets WHERE {}) WHERE {}",
                row(from.0, from.1),
                row(to.0, to.1)
            )
        };
        backend.sql(&copy("umbrella/K", "acme/K")).await;
        assert!(is_forged(&database, "umbrella", "K").await);
        backend.sql(&copy("acme/L", "acme/K")).await;
        assert!(is_forged(&database, "acme", "L").await);
        backend.sql("UPDATE company_secrets SET version = version + 1").await;
        assert!(is_forged(&database, "acme", "K").await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_byte_does_not_open_and_is_not_taken_for_an_absence() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        let flip = "UPDATE company_secrets SET secret_value_encrypted = substr(secret_value_encrypted, 1, 10) || \
                    CASE substr(secret_value_encrypted, 11, 1) WHEN 'A' THEN 'B' ELSE 'A' END || \
                    substr(secret_value_encrypted, 12)";
        backend.sql(flip).await;
        assert!(is_forged(&database, "acme", "K").await);
        let listing = database.find_all(&tenant("acme")).await.unwrap();
        assert!(listing.secrets.iter().all(|(_, held)| matches!(held, Held::Unreadable(OpenError::Forged))));
        assert_eq!(listing.secrets.len(), 2);
        backend.sql("UPDATE company_secrets SET secret_value_encrypted = 'sk_live_plain'").await;
        assert!(matches!(held(&database, "acme", "K").await, Held::Unreadable(OpenError::Malformed)));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn companies_whose_subdomains_were_swapped_do_not_answer_for_each_other() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "acme's");
        backend
            .sql(
                "UPDATE companies SET subdomain = 'swap' WHERE subdomain = 'acme'; \
                 UPDATE companies SET subdomain = 'acme' WHERE subdomain = 'umbrella'; \
                 UPDATE companies SET subdomain = 'umbrella' WHERE subdomain = 'swap'",
            )
            .await;
        // Also on an instance that has both data keys in memory.
        for database in [database, backend.open().await] {
            for of in ["acme", "umbrella"] {
                assert!(is_forged(&database, of, "K").await);
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_without_its_data_keys_is_unreadable() {
    on_both(async |backend| {
        filled(&backend).await;
        backend.sql("DELETE FROM company_data_keys").await;
        let database = backend.open().await;
        assert!(matches!(held(&database, "acme", "K").await, Held::Unreadable(OpenError::UnknownDataKey(1))));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_data_key_takes_no_number_that_a_value_names() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        backend.sql("DELETE FROM company_data_keys").await;
        database.put(&tenant("acme"), &key("L"), &value("new"), &Precondition::None, &writer(), None).await.unwrap();
        assert_eq!(backend.number("SELECT min(version) FROM {}company_data_keys").await, 2);
        for database in [database, backend.open().await] {
            assert_eq!(stored(&database, "acme", "L").await.value.expose(), "new");
        }
        let lost = held(&backend.open().await, "acme", "K").await;
        assert!(matches!(lost, Held::Unreadable(OpenError::UnknownDataKey(1))), "lost, and not forged: {lost:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_key_whose_number_was_given_again_is_not_taken_for_the_old_one() {
    on_both(async |backend| {
        let (database, other) = (filled(&backend).await, backend.open().await);
        for database in [&database, &other] {
            assert_eq!(stored(database, "acme", "K").await.value.expose(), "acme's");
        }
        backend.sql("DELETE FROM company_secrets; DELETE FROM company_data_keys").await;
        database.put(&tenant("acme"), &key("K"), &value("new"), &Precondition::None, &writer(), None).await.unwrap();
        assert_eq!(backend.number("SELECT max(version) FROM {}company_data_keys").await, 1);
        for database in [&database, &other] {
            assert_eq!(stored(database, "acme", "K").await.value.expose(), "new");
        }
        backend.sql("DELETE FROM company_secrets; DELETE FROM company_data_keys").await;
        other.put(&tenant("acme"), &key("K"), &value("newer"), &Precondition::None, &writer(), None).await.unwrap();
        let listing = database.find_all(&tenant("acme")).await.unwrap();
        assert!(matches!(&listing.secrets[..], [(_, Held::Present(stored))] if stored.value.expose() == "newer"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_master_key_is_told_with_the_tenants_it_locks_out_and_where_it_was() {
    on_both(async |mut backend| {
        let database = filled(&backend).await;
        let lost = backend.ring.ids().next().unwrap();
        let (before, source) = ("env:BEFORE".parse().unwrap(), "file:/etc/secretier/master.key".parse().unwrap());
        database.note_master_keys(&[(lost, before)]).await.unwrap();
        database.note_master_keys(&[(lost, source)]).await.unwrap();
        assert_eq!(database.missing_master_keys().await.unwrap(), []);
        backend.ring = new_ring();
        let database = backend.open().await;
        let missing = database.missing_master_keys().await.unwrap();
        assert_eq!(missing.len(), 1);
        assert_eq!(missing[0].wraps, WrappedBy { id: lost, data_keys: 2, tenants: 2 });
        assert_eq!(missing[0].known.as_ref().unwrap().source, "file:/etc/secretier/master.key");
        let copy = held(&database, "acme", "K").await;
        assert!(matches!(copy, Held::Unreadable(OpenError::UnknownMasterKey(id)) if id == lost), "{copy:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_seals_again_what_does_not_open_any_more() {
    on_both(async |mut backend| {
        filled(&backend).await;
        backend.ring = new_ring();
        let database = backend.open().await;
        let acme = tenant("acme");
        let began = Began { generation: database.company(&acme).await.unwrap().map(|company| company.generation) };
        let again = snapshot(&[("K", "v"), ("L", "w")]);
        let outcome = database.store_snapshot(&acme, &again, began, backend.clock.now(), &|_| true);
        assert!(matches!(outcome.await.unwrap(), StoreOutcome::Stored { .. }));
        let found = stored(&database, "acme", "K").await;
        assert_eq!((found.value.expose(), found.version.number()), ("v", 2));
        assert_eq!(backend.number("SELECT count(*) FROM {}company_data_keys").await, 3);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_master_key_nothing_is_written() {
    on_both(async |mut backend| {
        backend.ring = Arc::new(KeyRing::default());
        let database = backend.open().await;
        let refused = database.put(&tenant("acme"), &key("K"), &value("v"), &Precondition::None, &writer(), None).await;
        assert!(matches!(refused, Err(WriteError::Store(StoreError::Sealing(_)))));
        assert!(database.company(&tenant("acme")).await.unwrap().is_none());
        assert!(database.is_up());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_value_stands_in_the_tables() {
    on_both(async |backend| {
        filled(&backend).await;
        let plain = "SELECT count(*) FROM {}company_secrets WHERE secret_value_encrypted NOT LIKE 's1.1.%'";
        assert_eq!(backend.number(plain).await, 0);
        let plain =
            "SELECT count(*) FROM {}company_data_keys WHERE wrapped_key NOT LIKE 'w1.' || master_key_id || '.%'";
        assert_eq!(backend.number(plain).await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_key_is_retired_before_it_has_sealed_2_to_the_32_values() {
    on_both(async |backend| {
        let database = backend.open().await;
        let put = async |text: &str| {
            database.put(&tenant("acme"), &key("K"), &value(text), &Precondition::None, &writer(), None).await.unwrap();
        };
        let count = async || backend.number("SELECT CAST(sum(sealings) AS BIGINT) FROM {}company_data_keys").await;
        put("one").await;
        put("two").await;
        assert_eq!(count().await, 2);
        let three = snapshot(&[("A", "a"), ("B", "b"), ("C", "c")]);
        for (expected, generation) in [(5, None), (5, Some(0))] {
            let (globex, at) = (tenant("globex"), backend.clock.now());
            database.store_snapshot(&globex, &three, Began { generation }, at, &|_| true).await.unwrap();
            assert_eq!(count().await, expected, "what is as it was is not sealed again");
        }
        let keys = "SELECT count(*) FROM {}company_data_keys k JOIN {}companies c ON c.id = k.company_id \
                    WHERE c.subdomain = 'acme'";
        backend.sql("UPDATE company_data_keys SET sealings = 4294967294").await;
        put("the last of this key").await;
        assert_eq!(backend.number(keys).await, 1);
        put("the first of the next").await;
        assert_eq!(backend.number(keys).await, 2);
        let sealed = "SELECT max(sealings) FROM {}company_data_keys";
        assert_eq!(backend.number(sealed).await, 4_294_967_295);
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "the first of the next");
    })
    .await;
}

/// Gives one master key, and from a moment on no answer any more.
struct Hanging {
    key: String,
    hangs: AtomicBool,
}

impl Upstream for Hanging {
    fn tenants(&self, _: Lane) -> BoxFuture<'_, Result<Folders, UpstreamError>> {
        unreachable!("not asked")
    }
    fn snapshot<'a>(
        &'a self,
        _: &'a Tenant,
        _: Option<&'a str>,
        _: Lane,
    ) -> BoxFuture<'a, Result<Fetched, UpstreamError>> {
        unreachable!("not asked")
    }
    fn everything(&self, _: Lane) -> BoxFuture<'_, Result<Everything, UpstreamError>> {
        unreachable!("not asked")
    }
    fn changed_since(&self, _: Timestamp, _: Lane) -> BoxFuture<'_, Result<Option<Vec<ChangedFolder>>, UpstreamError>> {
        unreachable!("not asked")
    }
    fn resolve<'a>(
        &self,
        _: &Tenant,
        _: secretier::references::Texts<'a>,
    ) -> std::collections::HashMap<&'a str, secretier::references::Resolved> {
        unreachable!("not asked")
    }
    fn overview<'a>(&'a self, _: Option<&'a str>, _: Lane) -> BoxFuture<'a, Result<Overview, UpstreamError>> {
        unreachable!("not asked")
    }

    fn check(&self, _: &SecretKey, _: Option<&SecretValue>) -> Result<(), Unstorable> {
        unreachable!("not asked")
    }
    fn put<'a>(
        &'a self,
        _: &'a Tenant,
        _: &'a SecretKey,
        _: &'a SecretValue,
    ) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        unreachable!("not asked")
    }
    fn delete<'a>(&'a self, _: &'a Tenant, _: &'a SecretKey) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        unreachable!("not asked")
    }
    fn create_folder<'a>(&'a self, _: &'a Tenant) -> BoxFuture<'a, Result<(), UpstreamError>> {
        unreachable!("not asked")
    }
    fn remove_folder<'a>(&'a self, _: &'a Tenant, _: Removal, _: Lane) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        unreachable!("not asked")
    }
    fn read<'a>(
        &'a self,
        _: &'a str,
        names: &'a [&'a str],
        _: Lane,
    ) -> BoxFuture<'a, Result<Vec<Option<SecretValue>>, UpstreamError>> {
        if self.hangs.load(Ordering::Relaxed) {
            return Box::pin(std::future::pending());
        }
        let first = std::iter::once(Some(SecretValue::new(self.key.clone())));
        Box::pin(std::future::ready(Ok(first.chain(names.iter().skip(1).map(|_| None)).collect())))
    }
    fn write<'a>(
        &'a self,
        _: &'a str,
        _: &'a SecretKey,
        _: &'a SecretValue,
    ) -> BoxFuture<'a, Result<(), UpstreamError>> {
        unreachable!("not asked")
    }
    fn share_budget(&self, _: bool) {}
    fn resume_budget(&self, _: Before) {}
    fn reconfigure(&self, _: Config<'_>) -> Result<Reconfigured<'_>, BuildError> {
        unreachable!("not asked")
    }
    fn reads_references(&self) -> bool {
        unreachable!("not asked")
    }
    fn webhook(&self) -> Option<Arc<dyn Webhook>> {
        None
    }

    fn examine<'a>(&'a self, _: Config<'a>, _: &'a Area) -> BoxFuture<'a, ()> {
        unreachable!("not asked")
    }

    fn health(&self) -> Health {
        unreachable!("not asked")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_does_not_fail_for_a_source_of_master_keys_that_hangs() {
    on_both(async |mut backend| {
        filled(&backend).await;
        let key_text = MasterKey::generate().unwrap().to_hex().expose().to_owned();
        let hanging = Arc::new(Hanging { key: key_text, hangs: AtomicBool::new(false) });
        let sources = vec!["infisical:/keys/KEY".parse().unwrap()];
        let config = KeysConfig { sources, ..KeysConfig::default() };
        let upstream = Arc::clone(&hanging) as Arc<dyn Upstream>;
        let keys = Arc::new(MasterKeys::from_sources(Sources::build(config, "test", Some(upstream))));
        keys.load().await.unwrap();
        hanging.hangs.store(true, Ordering::Relaxed);
        backend.config.timeout = Duration::from_secs(4);
        let (clock, metrics) = (backend.clock.clone(), Arc::clone(&backend.metrics));
        let database = Box::pin(Database::open(&backend.config, "test", keys, clock, metrics)).await.unwrap();
        // Its newest data key is wrapped by a master key that nobody gives.
        database.put(&tenant("acme"), &key("L"), &value("new"), &Precondition::None, &writer(), None).await.unwrap();
        assert!(database.is_up());
        assert_eq!(stored(&database, "acme", "L").await.value.expose(), "new");
    })
    .await;
}
