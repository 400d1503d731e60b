//! What is left of a tenant that was shredded: nothing that opens.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use secretier::{
    phase::Phase,
    sealing::OpenError,
    tiers::database::{Began, Database, Held, Precondition, Refusal, Remains, StoreOutcome, WriteError},
};

use crate::{
    backend::{Backend, hand_over, held, key, on_both, snapshot, stored, tenant, try_hand_over, value, writer},
    postgres::Postgres,
};

async fn put(database: &Database, of: &str, name: &str, text: &str) {
    database.put(&tenant(of), &key(name), &value(text), &Precondition::None, &writer(), None).await.unwrap();
}

async fn filled(backend: &Backend) -> Database {
    let database = backend.open().await;
    for of in ["acme", "umbrella"] {
        for name in ["K", "L"] {
            put(&database, of, name, of).await;
        }
    }
    database
}

/// Copies what is stored, as a backup would.
async fn back_up(backend: &Backend) {
    backend
        .sql(
            "CREATE TABLE kept_secrets AS SELECT * FROM company_secrets; \
             CREATE TABLE kept_companies AS SELECT * FROM companies",
        )
        .await;
}

/// Puts `acme`'s secrets of the backup in the place of what it has.
async fn put_back(backend: &Backend) {
    backend
        .sql(
            "DELETE FROM company_secrets WHERE company_id = (SELECT id FROM companies WHERE subdomain = 'acme'); \
             INSERT INTO company_secrets SELECT * FROM kept_secrets \
             WHERE company_id = (SELECT id FROM kept_companies WHERE subdomain = 'acme')",
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shredded_tenant_has_nothing_and_the_others_have_what_they_had() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        let (acme, before) = (tenant("acme"), database.changes().await.unwrap());
        let old = database.company(&acme).await.unwrap().unwrap();
        let shredded = database.shred(&acme).await.unwrap().unwrap();
        assert_eq!((shredded.data_keys, shredded.secrets, shredded.versions), (1, 2, 2));
        assert_eq!(shredded.change, before + 1);
        assert_eq!(database.changes().await.unwrap(), shredded.change);
        for database in [&database, &backend.open().await] {
            assert!(matches!(held(database, "acme", "K").await, Held::Absent));
            assert!(database.find_all(&acme).await.unwrap().secrets.is_empty());
            for name in ["K", "L"] {
                assert_eq!(stored(database, "umbrella", name).await.value.expose(), "umbrella");
            }
        }
        let of_acme = "(SELECT id FROM {}companies WHERE subdomain = 'acme')";
        for table in ["company_secrets", "company_data_keys"] {
            assert_eq!(
                backend.number(&format!("SELECT count(*) FROM {{}}{table}")).await,
                if table == "company_secrets" { 2 } else { 1 }
            );
            let left = format!("SELECT count(*) FROM {{}}{table} WHERE company_id = {of_acme}");
            assert_eq!(backend.number(&left).await, 0);
        }
        let company = database.company(&acme).await.unwrap().unwrap();
        assert!(company.id != old.id && company.generation > old.generation);

        let again = database.shred(&acme).await.unwrap().unwrap();
        assert_eq!((again.data_keys, again.secrets, again.versions), (0, 0, 0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_is_not_known_is_not_made_by_shredding_it() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        let before = database.changes().await.unwrap();
        assert_eq!(database.shred(&tenant("nobody")).await.unwrap(), None);
        assert_eq!(database.company(&tenant("nobody")).await.unwrap(), None);
        assert_eq!(database.changes().await.unwrap(), before);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_put_back_open_under_neither_id_even_with_the_master_key() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "acme");
        back_up(&backend).await;
        database.shred(&tenant("acme")).await.unwrap().unwrap();
        database.forget_data_keys(&HashSet::from([tenant("acme")]));

        // Under the new id.
        backend
            .sql(
                "UPDATE kept_secrets SET company_id = (SELECT id FROM companies WHERE subdomain = 'acme') \
                 WHERE company_id = (SELECT id FROM kept_companies WHERE subdomain = 'acme'); \
                 INSERT INTO company_secrets SELECT * FROM kept_secrets \
                 WHERE company_id = (SELECT id FROM companies WHERE subdomain = 'acme')",
            )
            .await;
        let lost = async |database: &Database, name| {
            let held = held(database, "acme", name).await;
            matches!(held, Held::Unreadable(OpenError::UnknownDataKey(1)))
        };
        for database in [&database, &backend.open().await] {
            assert!(lost(database, "K").await && lost(database, "L").await);
        }

        // Under the old one, which is put back as well.
        backend
            .sql(
                "DELETE FROM company_secrets WHERE company_id = (SELECT id FROM companies WHERE subdomain = 'acme'); \
                 UPDATE kept_secrets SET company_id = (SELECT id FROM kept_companies WHERE subdomain = 'acme') \
                 WHERE company_id = (SELECT id FROM companies WHERE subdomain = 'acme'); \
                 UPDATE companies SET id = (SELECT id FROM kept_companies WHERE subdomain = 'acme') \
                 WHERE subdomain = 'acme'",
            )
            .await;
        put_back(&backend).await;
        for database in [&database, &backend.open().await] {
            assert!(lost(database, "K").await && lost(database, "L").await);
        }
        assert_eq!(stored(&database, "umbrella", "K").await.value.expose(), "umbrella");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_put_back_into_the_tenants_next_life_does_not_open_with_its_new_key() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        back_up(&backend).await;
        database.shred(&tenant("acme")).await.unwrap().unwrap();
        put(&database, "acme", "L", "of the next life").await;
        backend
            .sql(
                "UPDATE kept_secrets SET company_id = (SELECT id FROM companies WHERE subdomain = 'acme') \
                 WHERE company_id = (SELECT id FROM kept_companies WHERE subdomain = 'acme'); \
                 INSERT INTO company_secrets SELECT * FROM kept_secrets WHERE secret_key = 'K' \
                 AND company_id = (SELECT id FROM companies WHERE subdomain = 'acme')",
            )
            .await;
        for database in [&database, &backend.open().await] {
            assert!(matches!(held(database, "acme", "K").await, Held::Unreadable(OpenError::Forged)));
            assert_eq!(stored(database, "acme", "L").await.value.expose(), "of the next life");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_after_a_shredding_starts_the_tenant_anew() {
    on_both(async |backend| {
        let (database, other) = (filled(&backend).await, backend.open().await);
        put(&database, "acme", "K", "second").await;
        let before = stored(&other, "acme", "K").await;
        assert_eq!(before.version.number(), 2);
        database.shred(&tenant("acme")).await.unwrap().unwrap();

        let old = Precondition::IfMatch(vec![before.etag.clone()]);
        let refused = other.put(&tenant("acme"), &key("K"), &value("x"), &old, &writer(), None).await;
        assert!(matches!(refused, Err(WriteError::Conflict)), "{refused:?}");
        let written = other
            .put(&tenant("acme"), &key("K"), &value("new"), &Precondition::IfNoneMatchAny, &writer(), None)
            .await
            .unwrap();
        assert!(written.created && written.version.number() == 1);
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "new");

        let first = stored(&database, "acme", "K").await.etag;
        database.shred(&tenant("acme")).await.unwrap().unwrap();
        put(&database, "acme", "K", "newer").await;
        let second = stored(&database, "acme", "K").await;
        assert!(second.version.number() == 1 && second.etag != first, "the same version, and not the same");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_upstream_before_a_shredding_is_neither_stored_nor_confirmed_after_it() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        let (acme, copy) = (tenant("acme"), snapshot(&[("K", "v")]));
        let store = async |began| match database
            .store_snapshot(&acme, &copy, began, backend.clock.now(), &|_| true)
            .await
            .unwrap()
        {
            StoreOutcome::Stored { company, .. } => Some(company),
            StoreOutcome::Superseded => None,
        };
        let none = Began { generation: None };
        let before = store(none).await.unwrap();
        database.deny(&acme, backend.clock.now().plus(Duration::from_secs(1))).await.unwrap();
        other.shred(&acme).await.unwrap().unwrap();
        let company = database.company(&acme).await.unwrap().unwrap();
        let proof = (company.snapshot_at, &company.snapshot_etag, company.snapshot_whole, company.denied_at);
        assert_eq!(proof, (None, &None, false, None));

        assert!(store(Began { generation: Some(before.generation) }).await.is_none());
        assert!(store(none).await.is_none(), "also where there was no tenant when the read began");
        assert!(!database.confirm_snapshot(&acme, &before, backend.clock.now()).await.unwrap());
        assert!(!database.confirm_snapshot(&acme, &company, backend.clock.now()).await.unwrap());
        assert!(matches!(held(&database, "acme", "K").await, Held::Absent));
        assert!(store(Began { generation: Some(company.generation) }).await.is_some(), "what is read after it is");
        assert_eq!(stored(&database, "acme", "K").await.version.number(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shredded_tenant_keeps_its_phase() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        hand_over(&database, "acme", Some(Phase::Database)).await;
        database.shred(&tenant("acme")).await.unwrap().unwrap();
        assert_eq!(database.company(&tenant("acme")).await.unwrap().unwrap().phase, Some(Phase::Database));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shreddings_are_told_in_their_order_whatever_the_clocks_say() {
    on_both(async |mut backend| {
        let database = filled(&backend).await;
        let behind = {
            backend.clock = secretier::clock::Clock::system();
            backend.open().await
        };
        let ahead = {
            backend.clock = secretier::clock::Clock::system();
            backend.clock.advance(Duration::from_secs(365 * 24 * 60 * 60));
            backend.open().await
        };
        let told = async |after| {
            let told = database.shredded(after).await.unwrap();
            (told.iter().map(|(tenant, _)| tenant.to_string()).collect::<Vec<_>>(), told.last().map(|(_, at)| *at))
        };
        assert_eq!(told(None).await, (vec![], None));
        ahead.shred(&tenant("acme")).await.unwrap().unwrap();
        let (names, first) = told(None).await;
        assert_eq!(names, ["acme"]);
        assert_eq!(told(first).await.0, [""; 0]);
        behind.shred(&tenant("umbrella")).await.unwrap().unwrap();
        assert_eq!(told(first).await.0, ["umbrella"], "by a clock that is a year behind");
        behind.shred(&tenant("acme")).await.unwrap().unwrap();
        assert_eq!(told(first).await.0, ["umbrella", "acme"]);
        assert_eq!(told(None).await.0, ["umbrella", "acme"], "each once");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shreddings_and_writes_that_cross_end_with_a_tenant_that_opens() {
    on_both(async |backend| {
        let (database, other) = (filled(&backend).await, backend.open().await);
        let writing = async {
            for number in 0..20 {
                put(&database, "acme", &format!("K{}", number % 3), "v").await;
                let handed = try_hand_over(&database, "umbrella", Some(Phase::Database)).await;
                assert!(matches!(handed, Ok(_) | Err(Refusal::Changed)), "{handed:?}");
            }
        };
        let shredding = async {
            for of in ["acme", "umbrella"].repeat(5) {
                other.shred(&tenant(of)).await.unwrap().unwrap();
            }
        };
        tokio::join!(writing, shredding);
        for database in [&database, &backend.open().await] {
            let listing = database.find_all(&tenant("acme")).await.unwrap();
            assert!(listing.secrets.iter().all(|(_, held)| matches!(held, Held::Present(_))), "{listing:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_is_shredded_while_its_data_key_is_renewed_is_no_failure() {
    // On SQLite the two cannot cross.
    let backend = Backend::postgres(Postgres::shared()).await;
    let database = filled(&backend).await;
    let (acme, began) = (tenant("acme"), backend.clock.now());
    let lock = database.rotation_lock("a test").await.unwrap().unwrap();
    database.renew_data_key(&lock, &acme, began).await.unwrap();
    // What a shredding does, slowly.
    let shredding = backend.sql(
        "BEGIN; \
         SELECT id FROM companies WHERE subdomain = 'acme' FOR UPDATE; \
         DELETE FROM company_secrets USING companies c WHERE c.id = company_id AND c.subdomain = 'acme'; \
         DELETE FROM company_data_keys USING companies c WHERE c.id = company_id AND c.subdomain = 'acme'; \
         SELECT pg_sleep(2); \
         UPDATE companies SET id = 'another' WHERE subdomain = 'acme'; \
         COMMIT",
    );
    let renewing = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        database.renew_data_key(&lock, &acme, began).await
    };
    let (_, renewed) = tokio::join!(shredding, renewing);
    assert_eq!(renewed.unwrap().failed, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_with_a_long_history_is_shredded_in_one_go() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        // Each row names the one before it, so that deleting them all has to look at each.
        backend
            .sql(
                "WITH RECURSIVE numbers (n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM numbers WHERE n < 20000) \
                 INSERT INTO company_secrets (id, company_id, secret_key, secret_value_encrypted, version, \
                 previous_version_id, source, created_at, updated_at, superseded_at) \
                 SELECT 'row ' || n, company_id, secret_key, secret_value_encrypted, n, \
                 CASE WHEN n > 2 THEN 'row ' || (n - 1) END, source, created_at, updated_at, n \
                 FROM company_secrets, numbers WHERE secret_key = 'K' \
                 AND company_id = (SELECT id FROM companies WHERE subdomain = 'acme')",
            )
            .await;
        let shredded = database.shred(&tenant("acme")).await.unwrap().unwrap();
        assert_eq!((shredded.secrets, shredded.versions), (2, 20_001));
        assert_eq!(backend.number("SELECT count(*) FROM {}company_secrets").await, 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shredding_of_which_a_part_fails_has_destroyed_nothing() {
    on_both(async |backend| {
        let database = filled(&backend).await;
        let before = database.company(&tenant("acme")).await.unwrap();
        let keys = "SELECT count(*) FROM {}company_data_keys";
        backend.sql("ALTER TABLE counters RENAME TO hidden").await;
        assert!(database.shred(&tenant("acme")).await.is_err());
        backend.sql("ALTER TABLE hidden RENAME TO counters").await;
        assert_eq!((database.company(&tenant("acme")).await.unwrap(), backend.number(keys).await), (before, 2));
        assert_eq!(stored(&backend.open().await, "acme", "K").await.value.expose(), "acme");
    })
    .await;
}

/// All that stands in SQLite's files.
fn bytes(backend: &Backend) -> Vec<u8> {
    let file = backend.file().unwrap();
    ["", "-wal"].iter().flat_map(|suffix| std::fs::read(format!("{}{suffix}", file.display())).unwrap()).collect()
}

/// Which of these texts any part can be found of.
fn found<'t>(bytes: &[u8], texts: &'t [String]) -> HashSet<&'t str> {
    // The head tells formats and ids, which are the same in many: what follows is random.
    let parts = texts.iter().flat_map(|text| text.as_bytes()[24..].chunks_exact(16).map(move |part| (part, text)));
    let parts: HashMap<&[u8], &String> = parts.collect();
    bytes.windows(16).filter_map(|window| parts.get(window).map(|text| text.as_str())).collect()
}

/// The sealed texts and wrapped keys of a tenant, behind the program's back.
fn sealed(backend: &Backend, of: &str) -> Vec<String> {
    #[derive(diesel::QueryableByName)]
    struct Text {
        #[diesel(sql_type = diesel::sql_types::Text)]
        text: String,
    }
    let of = format!("company_id = (SELECT id FROM companies WHERE subdomain = '{of}')");
    let sql = format!(
        "SELECT secret_value_encrypted AS text FROM company_secrets WHERE {of} \
         AND secret_value_encrypted IS NOT NULL UNION ALL SELECT wrapped_key AS text FROM company_data_keys WHERE {of}"
    );
    let texts: Vec<Text> = diesel::RunQueryDsl::load(diesel::sql_query(sql), &mut backend.sqlite_connection()).unwrap();
    texts.into_iter().map(|text| text.text).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_sqlites_file_nor_its_log_holds_a_shredded_tenants_keys_or_sealed_values() {
    let backend = Backend::sqlite();
    // Two instances have the file open, so that it is not closed and cleared by itself.
    let (database, other) = (backend.open().await, backend.open().await);
    let mut texts = Vec::new();
    // Short and long values of two tenants side by side, written over and deleted, so that
    // pages are split, merged, chained and used again.
    for round in 0..3 {
        for number in 0..24 {
            for of in ["acme", "umbrella"] {
                let length = [10, 400, 3_000, 9_000][(number + round) % 4];
                put(&database, of, &format!("K{number}"), &"v".repeat(length)).await;
            }
        }
        for number in (round..24).step_by(7) {
            database
                .delete(&tenant("acme"), &key(&format!("K{number}")), &Precondition::None, &writer(), None)
                .await
                .unwrap();
        }
        texts.extend(sealed(&backend, "acme"));
        stored(&other, "umbrella", "K0").await;
    }
    let current = sealed(&backend, "acme");
    assert!(current.len() > 15 && current.last().unwrap().starts_with("w1."));
    assert_eq!(found(&bytes(&backend), &current).len(), current.len(), "they can be found");

    let shredded = database.shred(&tenant("acme")).await.unwrap().unwrap();
    assert_eq!(shredded.remains, Remains::Nothing);
    let after = bytes(&backend);
    assert_eq!(found(&after, &texts).len(), 0, "of {}, older versions too", texts.len());
    let others = sealed(&backend, "umbrella");
    assert_eq!(found(&after, &others).len(), others.len(), "the other tenant's are there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_someone_reads_from_is_told_to_hold_old_pages() {
    let mut backend = Backend::sqlite();
    backend.config.timeout = Duration::from_secs(1);
    let database = filled(&backend).await;
    let mut reader = backend.sqlite_connection();
    let begin = "BEGIN; SELECT count(*) FROM company_secrets";
    diesel::connection::SimpleConnection::batch_execute(&mut reader, begin).unwrap();
    let shredded = database.shred(&tenant("acme")).await.unwrap().unwrap();
    assert_eq!(shredded.remains, Remains::InLog);
    assert!(database.is_up(), "someone else's reading is no outage");
    drop(reader);
    let again = database.shred(&tenant("acme")).await.unwrap().unwrap();
    assert_eq!(again.remains, Remains::Nothing);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_is_told_to_keep_deleted_rows_for_a_while() {
    let backend = Backend::postgres(crate::postgres::Postgres::shared()).await;
    let database = filled(&backend).await;
    let shredded = database.shred(&tenant("acme")).await.unwrap().unwrap();
    assert_eq!(shredded.remains, Remains::InFiles);
}
