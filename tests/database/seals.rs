//! Rows that somebody changed who can write to the database and has no master key: found, or
//! refused. And what an older version of the program does beside them: no harm.

use std::{sync::Arc, time::Duration};

use secretier::{
    clock::Timestamp,
    sealing::{KeyRing, MasterKey, OpenError},
    tiers::database::{
        Began, Database, Distrust, Held, Precondition, Sealed, SealedTenants, StoreError, StoreOutcome, TokenRow, Told,
        Verdict, WriteError,
    },
};

use crate::{
    backend::{Backend, hand_over, held, key, on_both, snapshot, stored, tell, tenant, value, writer},
    tokens::token,
};

const ENDS: Timestamp = Timestamp::from_millis(4_000_000_000_000);

/// Does what `keys seal` does, where nothing speaks against it.
async fn seal(database: &Database) -> usize {
    let lock = database.rotation_lock("test").await.unwrap().unwrap();
    let tokens = database.seal_tokens(&lock, false).await.unwrap();
    assert!(tokens.refused.is_empty(), "{:?}", tokens.refused);
    let SealedTenants { sealed, set_back, unreadable, after } = database.seal_tenants(&lock, None, &[]).await.unwrap();
    assert_eq!((set_back, unreadable, after), (vec![], vec![], None));
    assert!(database.complete_seals(&lock).await.unwrap().is_empty());
    database.end_job_lock(lock).await;
    tokens.sealed + sealed
}

async fn refused(database: &Database) -> Vec<(String, Distrust)> {
    let known = database.known_tokens().await.unwrap();
    known.refused.into_iter().map(|(token, why)| (token.name, why)).collect()
}

async fn valid(database: &Database) -> Vec<String> {
    let tokens = database.tokens().await.unwrap().into_iter();
    tokens.filter(|token| token.revoked_at.is_none()).map(|token| token.name).collect()
}

async fn verdict(database: &Database, of: &str) -> Verdict {
    let (verified, _) = database.verify_tenants(None).await.unwrap();
    verified.into_iter().find(|verified| verified.tenant.as_str() == of).unwrap().verdict
}

async fn put(database: &Database, of: &str, name: &str, text: &str) {
    let (of, name, text) = (tenant(of), key(name), value(text));
    database.put(&of, &name, &text, &Precondition::None, &writer(), None).await.unwrap();
}

async fn store(backend: &Backend, database: &Database, secrets: &[(&str, &str)]) {
    let acme = tenant("acme");
    let company = database.company(&acme).await.unwrap();
    let began = Began { generation: company.map(|company| company.generation) };
    let (snapshot, at) = (snapshot(secrets), backend.clock.now());
    let outcome = database.store_snapshot(&acme, &snapshot, began, at, &|_| true).await.unwrap();
    assert!(matches!(outcome, StoreOutcome::Stored { .. }));
}

async fn delete(database: &Database, of: &str, name: &str) {
    assert!(database.delete(&tenant(of), &key(name), &Precondition::None, &writer(), None).await.unwrap());
}

/// What is told of a tenant whose rows are refused as a whole.
async fn is_refused(database: &Database, of: &str) -> bool {
    match database.find_all(&tenant(of)).await {
        Err(StoreError::Seals(told)) => {
            assert!(told.contains(of) && told.contains("audit verify"), "{told}");
            true
        }
        Err(error) => panic!("{error:?}"),
        Ok(_) => false,
    }
}

/// Keeps a copy of tables, as somebody does who has seen the database before.
async fn keep(backend: &Backend, tables: &[&str]) {
    for table in tables {
        backend.sql(&format!("CREATE TABLE kept_{table} AS SELECT * FROM {table}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_made_valid_is_refused() {
    on_both(async |backend| {
        let database = backend.open().await;
        for (name, hash) in [("ci", 1), ("api", 2)] {
            database.insert_token(&token(name, hash)).await.unwrap();
        }
        keep(&backend, &["access_tokens"]).await;
        assert_eq!(database.revoke_token("ci").await.unwrap(), 1);
        assert_eq!((valid(&database).await, refused(&database).await), (vec!["api".to_owned()], vec![]));

        let undone = "UPDATE access_tokens SET revoked_at = NULL";
        for (sql, why) in [
            (format!("{undone} WHERE name = 'ci'"), Distrust::Widened),
            (
                format!("{undone}, seal = (SELECT seal FROM kept_access_tokens WHERE name = 'ci') WHERE name = 'ci'"),
                Distrust::Outdated,
            ),
            (format!("{undone}, seal = NULL WHERE name = 'ci'"), Distrust::Stripped),
            (format!("{undone}, seal = 'a1.x' WHERE name = 'ci'"), Distrust::Malformed),
        ] {
            backend.sql(&sql).await;
            for database in [&database, &backend.open().await] {
                assert_eq!(refused(database).await, [("ci".to_owned(), why)], "{sql}");
                assert_eq!(valid(database).await, ["api"], "the others are as good as they were");
            }
        }
        assert!(backend.metrics.render().contains("secretier_tokens_refused 1"), "{}", backend.metrics.render());
        // It can be revoked again, whatever its row says.
        assert_eq!(database.revoke_token("ci").await.unwrap(), 1);
        assert_eq!(refused(&database).await, []);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_widened_is_refused() {
    on_both(async |backend| {
        let database = backend.open().await;
        let ci = TokenRow { expires_at: Some(ENDS), ..token("ci", 1) };
        database.insert_token(&ci).await.unwrap();
        database.insert_token(&token("api", 2)).await.unwrap();
        keep(&backend, &["access_tokens"]).await;
        let undo = "DELETE FROM access_tokens; INSERT INTO access_tokens SELECT * FROM kept_access_tokens";
        for (set, why) in [
            ("tenants = '[\"*\"]'", Distrust::Changed),
            ("keys = '[\"*\"]'", Distrust::Changed),
            ("actions = '[\"read\",\"write\",\"admin\"]'", Distrust::Changed),
            ("name = 'ic'", Distrust::Changed),
            ("created_at = 5", Distrust::Changed),
            ("expires_at = expires_at + 1", Distrust::Widened),
            ("expires_at = NULL", Distrust::Widened),
            ("seal = (SELECT seal FROM kept_access_tokens WHERE name = 'api')", Distrust::Changed),
        ] {
            backend.sql(&format!("UPDATE access_tokens SET {set} WHERE id = 'id-ci'")).await;
            let found: Vec<Distrust> = refused(&database).await.into_iter().map(|(_, why)| why).collect();
            assert_eq!(found, [why], "{set}");
            // A rotation would vouch for what somebody else wrote.
            let next = TokenRow { id: "id-next".to_owned(), ..token("ci", 9) };
            let rotated = database.rotate_token("id-ci", Some(ENDS), &next).await;
            assert!(matches!(rotated, Err(StoreError::Seals(_))) || set.starts_with("name"), "{set}: {rotated:?}");
            backend.sql(undo).await;
            assert_eq!(refused(&database).await, []);
        }
        // One whose row is taken away and put back is known by that.
        database.revoke_token("api").await.unwrap();
        backend.sql("DELETE FROM access_tokens WHERE name = 'api'").await;
        backend.sql("INSERT INTO access_tokens SELECT * FROM kept_access_tokens WHERE name = 'api'").await;
        assert_eq!(refused(&database).await, [("api".to_owned(), Distrust::Outdated)]);
    })
    .await;
}

/// A token as an older version stores it: by the columns that it knows.
async fn store_as_before(backend: &Backend, name: &str, hash: u8) {
    let bytes = hex::encode([hash; 32]);
    let hash = if backend.file().is_some() { format!("X'{bytes}'") } else { format!("'\\x{bytes}'") };
    backend
        .sql(&format!(
            "INSERT INTO access_tokens (id, name, hash, tenants, keys, actions, expires_at, created_at, revoked_at) \
             VALUES ('id-{name}', '{name}', {hash}, '[\"*\"]', '[\"*\"]', '[\"read\"]', NULL, 1, NULL)"
        ))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_without_a_seal_is_let_in_until_every_row_is_sealed() {
    on_both(async |backend| {
        let database = backend.open().await;
        store_as_before(&backend, "old", 1).await;
        database.insert_token(&token("new", 2)).await.unwrap();
        let known = database.known_tokens().await.unwrap();
        assert_eq!((known.tokens.len(), known.unsealed, known.sealed), (2, 1, Sealed::Partly));
        assert!(backend.metrics.render().contains("secretier_tokens_unsealed 1"));

        assert_eq!(seal(&database).await, 1);
        assert_eq!(seal(&database).await, 0, "nothing is left to do");
        store_as_before(&backend, "later", 3).await;
        for database in [&database, &backend.open().await] {
            assert_eq!(valid(database).await, ["old", "new"]);
            assert_eq!(refused(database).await, [("later".to_owned(), Distrust::Unsealed)]);
            assert!(matches!(database.known_tokens().await.unwrap().sealed, Sealed::Since(_)));
        }

        // Whoever takes the register away makes nobody valid by it.
        backend.sql("DELETE FROM settings WHERE name = 'token_register'").await;
        assert_eq!(valid(&database).await, [""; 0], "this process knows that every row was sealed");
        let (other, required) = (backend.open().await, backend.open().await);
        required.require_seals(true);
        assert_eq!(valid(&required).await, [""; 0]);
        assert_eq!(valid(&other).await, ["later", "old", "new"], "of which one that has just started knows nothing");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_older_version_takes_from_a_token_holds_and_stays_taken() {
    on_both(async |backend| {
        let database = backend.open().await;
        for (name, hash) in [("ci", 1), ("api", 2), ("web", 3)] {
            database.insert_token(&token(name, hash)).await.unwrap();
        }
        // Revoked, and rotated, by the columns that it knows.
        backend.sql("UPDATE access_tokens SET revoked_at = 7 WHERE name = 'ci'").await;
        let soon = ENDS.as_millis() - 5;
        let rotated =
            format!("UPDATE access_tokens SET replaced_by = 'id-next', expires_at = {soon} WHERE name = 'api'");
        backend.sql(&rotated).await;
        store_as_before(&backend, "next", 4).await;
        assert_eq!(refused(&database).await, []);
        let known = database.tokens().await.unwrap();
        let known = |name: &str| known.iter().find(|token| token.name == name).unwrap().clone();
        assert!(known("ci").revoked_at.is_some());
        let ends = (known("api").expires_at, known("api").replaced_by);
        assert_eq!(ends, (Some(Timestamp::from_millis(soon)), Some("id-next".to_owned())));
        assert_eq!(known("next").revoked_at, None);

        assert_eq!(seal(&database).await, 3);
        backend.sql("UPDATE access_tokens SET revoked_at = NULL WHERE name = 'ci'").await;
        backend.sql("UPDATE access_tokens SET expires_at = NULL, replaced_by = NULL WHERE name = 'api'").await;
        let mut found = refused(&database).await;
        found.sort_by(|one, other| one.0.cmp(&other.0));
        assert_eq!(found, [("api".to_owned(), Distrust::Widened), ("ci".to_owned(), Distrust::Widened)]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_are_put_back_with_their_register_are_noticed_by_whoever_runs() {
    on_both(async |backend| {
        let database = backend.open().await;
        database.insert_token(&token("ci", 1)).await.unwrap();
        keep(&backend, &["access_tokens", "settings"]).await;
        database.revoke_token("ci").await.unwrap();
        assert!(!database.known_tokens().await.unwrap().is_set_back);
        backend.sql("DELETE FROM access_tokens; INSERT INTO access_tokens SELECT * FROM kept_access_tokens").await;
        backend.sql("DELETE FROM settings; INSERT INTO settings SELECT * FROM kept_settings").await;
        assert!(database.known_tokens().await.unwrap().is_set_back);
        assert!(!backend.open().await.known_tokens().await.unwrap().is_set_back, "see SECURITY.md");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn seals_go_over_to_a_new_master_key_and_both_are_good_meanwhile() {
    on_both(async |mut backend| {
        let old = backend.ring.first().unwrap().clone();
        let database = backend.open().await;
        database.insert_token(&token("ci", 1)).await.unwrap();
        database.insert_token(&token("bad", 2)).await.unwrap();
        seal(&database).await;
        backend.sql("UPDATE access_tokens SET actions = '[\"admin\"]' WHERE name = 'bad'").await;

        let new = MasterKey::generate().unwrap();
        backend.ring = Arc::new(KeyRing::new(vec![new.clone(), old.clone()]));
        let rotating = backend.open().await;
        rotating.insert_token(&token("api", 3)).await.unwrap();
        let lock = rotating.rotation_lock("test").await.unwrap().unwrap();
        assert_eq!(valid(&rotating).await, ["ci", "api"]);
        assert_eq!(rotating.reseal_tokens(&lock, &new).await.unwrap(), 1);
        assert_eq!(rotating.reseal_tokens(&lock, &new).await.unwrap(), 0, "nothing is left to do");
        rotating.end_job_lock(lock).await;
        backend.ring = Arc::new(KeyRing::new(vec![new]));
        let database = backend.open().await;
        assert_eq!(valid(&database).await, ["ci", "api"]);
        assert!(matches!(refused(&database).await[..], [(_, Distrust::UnknownKey(id))] if id == old.id()));
        backend.ring = Arc::new(KeyRing::new(vec![old]));
        assert_eq!(valid(&backend.open().await).await, [""; 0], "the register is sealed with a key that is not held");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_master_key_locks_nobody_out_before_every_row_is_sealed() {
    on_both(async |mut backend| {
        let database = backend.open().await;
        database.insert_token(&token("ci", 1)).await.unwrap();
        backend.ring = crate::backend::new_ring();
        let other = backend.open().await;
        other.insert_token(&token("api", 2)).await.unwrap();
        for database in [&database, &other] {
            assert_eq!((valid(database).await.len(), refused(database).await), (2, vec![]));
        }
        assert_eq!(
            (database.known_tokens().await.unwrap().unsealed, other.known_tokens().await.unwrap().unsealed),
            (1, 2)
        );
        let lock = other.rotation_lock("test").await.unwrap().unwrap();
        let told = other.seal_tokens(&lock, false).await.err().unwrap().to_string();
        assert!(told.contains("keys status"), "{told}");
        other.end_job_lock(lock).await;

        seal(&database).await;
        assert_eq!((valid(&database).await.len(), valid(&other).await.len()), (2, 0));
        assert!(matches!(other.insert_token(&token("web", 3)).await, Err(StoreError::Seals(_))));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_master_key_nothing_is_sealed_or_checked_and_a_revocation_holds() {
    on_both(async |mut backend| {
        let ring = std::mem::take(&mut backend.ring);
        let keyless = backend.open().await;
        keyless.insert_token(&token("ci", 1)).await.unwrap();
        assert_eq!(keyless.known_tokens().await.unwrap().sealed, Sealed::Unchecked);
        backend.ring = ring;
        let database = backend.open().await;
        assert_eq!(database.known_tokens().await.unwrap().unsealed, 1);
        seal(&database).await;

        let refusal = keyless.insert_token(&token("api", 2)).await;
        assert!(matches!(refusal, Err(StoreError::Seals(told)) if told.contains("master key")));
        assert_eq!(keyless.revoke_token("ci").await.unwrap(), 1);
        assert_eq!((valid(&database).await, refused(&database).await), (vec![], vec![]));
        keyless.require_seals(true);
        assert_eq!(valid(&keyless).await, [""; 0]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_set_back_to_an_older_version_is_found() {
    on_both(async |backend| {
        let database = backend.open().await;
        for text in ["one", "two", "three"] {
            put(&database, "acme", "A", text).await;
        }
        put(&database, "globex", "A", "other").await;
        assert_eq!((verdict(&database, "acme").await, is_refused(&database, "acme").await), (Verdict::Sound, false));
        backend.sql("DELETE FROM company_secrets WHERE version = 3").await;
        backend.sql("UPDATE company_secrets SET superseded_at = NULL WHERE version = 2").await;
        for database in [&database, &backend.open().await] {
            assert_eq!(verdict(database, "acme").await, Verdict::SetBack);
            assert!(is_refused(database, "acme").await);
            assert_eq!(verdict(database, "globex").await, Verdict::Sound);
        }
        assert_eq!(stored(&database, "acme", "A").await.value.expose(), "two", "one read cannot tell: see SECURITY.md");
        // A write vouches for nothing that was done before it.
        put(&database, "acme", "B", "new").await;
        put(&database, "acme", "A", "new").await;
        assert_eq!(verdict(&database, "acme").await, Verdict::SetBack);
        assert!(!backend.metrics.render().contains("secretier_tenants_read_total{seal=\"set_back\"} 0\n"));

        // Somebody who has looked at it says that it may be.
        let lock = database.rotation_lock("test").await.unwrap().unwrap();
        let sealed = database.seal_tenants(&lock, None, &[]).await.unwrap();
        assert_eq!((sealed.sealed, sealed.set_back), (0, vec![tenant("acme")]));
        assert_eq!(database.seal_tenants(&lock, None, &[tenant("acme")]).await.unwrap().sealed, 1);
        database.end_job_lock(lock).await;
        assert_eq!((verdict(&database, "acme").await, is_refused(&database, "acme").await), (Verdict::Sound, false));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_secret_brought_back_is_found() {
    on_both(async |backend| {
        let database = backend.open().await;
        put(&database, "acme", "A", "one").await;
        put(&database, "acme", "B", "two").await;
        delete(&database, "acme", "A").await;
        assert_eq!(verdict(&database, "acme").await, Verdict::Sound);
        keep(&backend, &["company_secrets"]).await;
        for sql in [
            // The mark of the deletion is taken away, with or without what was before it in its place.
            "DELETE FROM company_secrets WHERE secret_key = 'A' AND superseded_at IS NULL",
            "UPDATE company_secrets SET superseded_at = NULL WHERE secret_key = 'A'",
            // A snapshot would have proved more than the owner's deletion does.
            "UPDATE company_secrets SET source = 'infisical' WHERE secret_key = 'A' AND secret_value_encrypted IS NULL",
            "DELETE FROM company_secrets",
        ] {
            backend.sql(sql).await;
            assert_eq!(verdict(&database, "acme").await, Verdict::SetBack, "{sql}");
            assert!(is_refused(&database, "acme").await);
            if !sql.starts_with("DELETE FROM company_secrets WHERE") {
                backend.sql("DELETE FROM company_secrets").await;
                backend.sql("INSERT INTO company_secrets SELECT * FROM kept_company_secrets").await;
                assert_eq!(verdict(&database, "acme").await, Verdict::Sound);
            }
        }
        backend.sql("DELETE FROM company_secrets").await;
        backend.sql("UPDATE companies SET head = NULL").await;
        assert_eq!(verdict(&database, "acme").await, Verdict::Sound, "that, the audit tells");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shredding_undone_with_the_old_id_opens_nothing() {
    on_both(async |backend| {
        let database = backend.open().await;
        put(&database, "acme", "A", "one").await;
        let tables = ["companies", "company_data_keys", "company_secrets"];
        keep(&backend, &tables).await;
        database.shred(&tenant("acme")).await.unwrap().unwrap();
        assert!(matches!(held(&database, "acme", "A").await, Held::Absent));
        for table in tables.iter().rev() {
            backend.sql(&format!("DELETE FROM {table}")).await;
        }
        for table in tables {
            backend.sql(&format!("INSERT INTO {table} SELECT * FROM kept_{table}")).await;
        }
        let fresh = backend.open().await;
        fresh.tokens().await.unwrap();
        database.shredded(None).await.unwrap();
        for database in [&database, &fresh] {
            assert!(matches!(held(database, "acme", "A").await, Held::Unreadable(OpenError::Destroyed)));
            let listing = database.find_all(&tenant("acme")).await;
            assert!(matches!(
                listing.as_ref().map(|listing| &listing.secrets[0].1),
                Ok(Held::Unreadable(OpenError::Destroyed))
            ));
        }
        // Shredded again, the tenant begins anew.
        database.shred(&tenant("acme")).await.unwrap().unwrap();
        put(&database, "acme", "A", "new").await;
        assert_eq!(stored(&database, "acme", "A").await.value.expose(), "new");
        assert_eq!(verdict(&database, "acme").await, Verdict::Sound);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_done_to_a_tenant_here_its_head_fits() {
    on_both(async |backend| {
        let database = backend.open().await;
        let (acme, b) = (tenant("acme"), key("B"));
        let sound = async |what: &str| {
            assert_eq!(verdict(&database, "acme").await, Verdict::Sound, "{what}");
            assert!(!is_refused(&database, "acme").await, "{what}");
            assert_eq!(backend.number("SELECT count(*) FROM {}companies WHERE head IS NULL").await, 0, "{what}");
        };
        store(&backend, &database, &[("A", "1"), ("B", "2"), ("C", "3")]).await;
        sound("a first copy").await;
        store(&backend, &database, &[("A", "1"), ("B", "two"), ("D", "4")]).await;
        sound("another copy").await;
        tell(&database, "acme", Told::Copied(&b, &writer())).await;
        tell(&database, "acme", Told::Copied(&key("NEW"), &writer())).await;
        sound("writes upstream").await;
        store(&backend, &database, &[("A", "1"), ("B", "2+")]).await;
        sound("a copy that knows of them, and lacks one").await;
        hand_over(&database, "acme", Some(secretier::phase::Phase::Database)).await;
        sound("another owner").await;
        let own = Some(secretier::phase::Phase::Database);
        for text in ["x", "y"] {
            database.put(&acme, &b, &value(text), &Precondition::None, &writer(), own).await.unwrap();
        }
        sound("writes").await;
        let refused = database.put(&acme, &b, &value("z"), &Precondition::IfNoneMatchAny, &writer(), own).await;
        assert!(matches!(refused, Err(WriteError::Conflict)));
        assert!(database.delete(&acme, &b, &Precondition::None, &writer(), own).await.unwrap());
        sound("a deletion").await;
        let version = stored(&database, "acme", "A").await.version;
        database.rollback(&acme, &key("A"), version, &Precondition::None, &writer(), own).await.unwrap();
        sound("a version that comes back").await;
        while database.sweep_versions().await.unwrap() {}
        let lock = database.rotation_lock("test").await.unwrap().unwrap();
        let since = Timestamp::from_millis(backend.clock.now().as_millis() + 1000);
        database.renew_data_key(&lock, &acme, since).await.unwrap();
        database.end_job_lock(lock).await;
        assert_eq!(backend.number("SELECT count(*) FROM {}company_data_keys").await, 1);
        sound("a new data key").await;
        assert_eq!(seal(&database).await, 0, "every row is sealed");
        database.put(&acme, &b, &value("after"), &Precondition::None, &writer(), own).await.unwrap();
        sound("a write after the seal").await;
    })
    .await;
}

/// Writes a new version of a secret as an older version does: by the columns that it knows.
async fn write_as_before(backend: &Backend, of: &str, name: &str) {
    let newest = format!(
        "company_id = (SELECT id FROM companies WHERE subdomain = '{of}') AND secret_key = '{name}' AND superseded_at IS NULL"
    );
    backend.sql(&format!("CREATE TABLE newest AS SELECT * FROM company_secrets WHERE {newest}")).await;
    backend.sql(&format!("UPDATE company_secrets SET superseded_at = 1 WHERE {newest}")).await;
    backend
        .sql(
            "INSERT INTO company_secrets (id, company_id, secret_key, secret_value_encrypted, version, \
             previous_version_id, source, written_by, created_at, updated_at) SELECT 'x' || id, company_id, secret_key, \
             NULL, version + 1, id, 'database', 'old', 1, 1 FROM newest",
        )
        .await;
    backend.sql("DROP TABLE newest").await;
    backend.sql(&format!("UPDATE companies SET generation = generation + 1 WHERE subdomain = '{of}'")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_version_that_writes_beside_makes_heads_stale_and_nothing_refused() {
    on_both(async |backend| {
        let database = backend.open().await;
        for of in ["acme", "globex"] {
            put(&database, of, "A", "one").await;
            put(&database, of, "B", "one").await;
            write_as_before(&backend, of, "A").await;
            assert_eq!((verdict(&database, of).await, is_refused(&database, of).await), (Verdict::Stale, false));
            assert!(matches!(held(&database, of, "A").await, Held::Unknown));
        }
        // What is written here meanwhile makes no claim that it could not keep.
        put(&database, "acme", "B", "two").await;
        assert_eq!(verdict(&database, "acme").await, Verdict::Stale);
        put(&database, "acme", "A", "two").await;
        assert_eq!((verdict(&database, "acme").await, is_refused(&database, "acme").await), (Verdict::Unsealed, false));
        // Shredded by it, a tenant begins anew under another id, and keeps the head of before.
        backend.sql("DELETE FROM company_secrets WHERE company_id IN (SELECT id FROM companies WHERE subdomain = 'globex')").await;
        backend.sql("DELETE FROM company_data_keys WHERE company_id IN (SELECT id FROM companies WHERE subdomain = 'globex')").await;
        backend.sql("UPDATE companies SET id = 'another' WHERE subdomain = 'globex'").await;
        assert!(!is_refused(&database, "globex").await);
        put(&database, "globex", "A", "new").await;
        assert_eq!(verdict(&database, "globex").await, Verdict::Sound);

        assert_eq!(seal(&database).await, 1);
        assert_eq!(verdict(&database, "acme").await, Verdict::Sound);
        // From now on there is no excuse.
        write_as_before(&backend, "acme", "B").await;
        assert_eq!((verdict(&database, "acme").await, is_refused(&database, "acme").await), (Verdict::SetBack, true));
        backend.sql("UPDATE companies SET head = NULL").await;
        assert!(is_refused(&database, "acme").await && is_refused(&database, "globex").await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn not_every_row_is_sealed_while_an_instance_of_an_older_version_is_registered() {
    on_both(async |backend| {
        let database = backend.open().await;
        database.announce("new", "host/1", 0, Duration::from_secs(60)).await.unwrap();
        let now = backend.clock.now().as_millis();
        backend
            .sql(&format!(
                "INSERT INTO instances (id, name, master_keys, changes, seen_at) VALUES ('old', 'host/2', '', 0, {now})"
            ))
            .await;
        assert_eq!(database.older_instances().await.unwrap(), ["host/2"]);
        let lock = database.rotation_lock("test").await.unwrap().unwrap();
        assert_eq!(database.complete_seals(&lock).await.unwrap(), ["host/2"]);
        assert_eq!(database.known_tokens().await.unwrap().sealed, Sealed::Partly);
        database.withdraw("old").await.unwrap();
        assert_eq!(database.complete_seals(&lock).await.unwrap(), [""; 0]);
        database.end_job_lock(lock).await;
        assert!(matches!(database.known_tokens().await.unwrap().sealed, Sealed::Since(_)));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_before_is_brought_up_to_date_and_sealed() {
    on_both(async |backend| {
        {
            let database = backend.open().await;
            for of in ["acme", "globex"] {
                put(&database, of, "A", "one").await;
                put(&database, of, "A", "two").await;
            }
            database.insert_token(&token("ci", 1)).await.unwrap();
        }
        // Back to the tables of migration 1, with what is in them.
        let undo = match backend.file() {
            Some(_) => [
                include_str!("../../migrations/sqlite/00000000000008_secret_rotations/down.sql"),
                include_str!("../../migrations/sqlite/00000000000007_shared_folders/down.sql"),
                include_str!("../../migrations/sqlite/00000000000006_ended_logins/down.sql"),
                include_str!("../../migrations/sqlite/00000000000005_detached/down.sql"),
                include_str!("../../migrations/sqlite/00000000000004_marks/down.sql"),
                include_str!("../../migrations/sqlite/00000000000003_seals/down.sql"),
                include_str!("../../migrations/sqlite/00000000000002_references/down.sql"),
            ],
            None => [
                include_str!("../../migrations/postgres/00000000000008_secret_rotations/down.sql"),
                include_str!("../../migrations/postgres/00000000000007_shared_folders/down.sql"),
                include_str!("../../migrations/postgres/00000000000006_ended_logins/down.sql"),
                include_str!("../../migrations/postgres/00000000000005_detached/down.sql"),
                include_str!("../../migrations/postgres/00000000000004_marks/down.sql"),
                include_str!("../../migrations/postgres/00000000000003_seals/down.sql"),
                include_str!("../../migrations/postgres/00000000000002_references/down.sql"),
            ],
        };
        for undo in undo {
            backend.sql(undo).await;
        }
        backend.sql("DELETE FROM settings WHERE name = 'token_register'").await;
        backend.sql("DELETE FROM __diesel_schema_migrations WHERE version > '00000000000001'").await;

        let database = backend.open().await;
        assert_eq!(valid(&database).await, ["ci"]);
        assert_eq!(stored(&database, "acme", "A").await.value.expose(), "two");
        assert_eq!((verdict(&database, "acme").await, is_refused(&database, "acme").await), (Verdict::Unsealed, false));
        put(&database, "acme", "A", "three").await;
        assert_eq!(verdict(&database, "acme").await, Verdict::Unsealed);
        assert_eq!(seal(&database).await, 3, "a token and two tenants");
        for of in ["acme", "globex"] {
            put(&database, of, "A", "four").await;
            assert_eq!(verdict(&database, of).await, Verdict::Sound);
        }
        backend.sql("UPDATE company_secrets SET superseded_at = 1 WHERE superseded_at IS NULL").await;
        assert_eq!(verdict(&database, "acme").await, Verdict::SetBack);
    })
    .await;
}
