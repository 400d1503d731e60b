//! The versions that a secret has had.

use std::time::Duration;

use secretier::{
    phase::Phase,
    sealing::OpenError,
    secret::{Version, Writer},
    tiers::database::{Began, Database, Held, Precondition, Revision, Source, StoreOutcome, Told, WriteError, Written},
};

use crate::backend::{Backend, hand_over, held, key, on_both, phase, snapshot, stored, tell, tenant, value, writer};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn number(number: i64) -> Version {
    Version::new(number).unwrap()
}

async fn put(database: &Database, text: &str) {
    put_to(database, "acme", "K", text).await;
}

async fn put_to(database: &Database, of: &str, name: &str, text: &str) {
    let own = phase(database, of).await;
    database.put(&tenant(of), &key(name), &value(text), &Precondition::None, &writer(), own).await.unwrap();
}

async fn roll_back(database: &Database, to: i64) -> Result<Written, WriteError> {
    database.rollback(&tenant("acme"), &key("K"), number(to), &Precondition::None, &writer(), None).await
}

async fn store(backend: &Backend, database: &Database, secrets: &[(&str, &str)]) {
    let company = database.company(&tenant("acme")).await.unwrap();
    let began = Began { generation: company.map(|company| company.generation) };
    let (acme, snapshot) = (tenant("acme"), snapshot(secrets));
    let outcome = database.store_snapshot(&acme, &snapshot, began, backend.clock.now(), &|_| true).await.unwrap();
    assert!(matches!(outcome, StoreOutcome::Stored { .. }));
}

async fn versions(database: &Database) -> Vec<Revision> {
    database.versions(&tenant("acme"), &key("K")).await.unwrap().1
}

/// The numbers of the versions that are kept, newest first.
async fn numbers(database: &Database) -> Vec<i64> {
    versions(database).await.iter().map(|revision| revision.version.number()).collect()
}

async fn version(database: &Database, of: i64) -> Held {
    database.find_version(&tenant("acme"), &key("K"), number(of)).await.unwrap().copy
}

async fn text(database: &Database, of: i64) -> String {
    match version(database, of).await {
        Held::Present(stored) => stored.value.expose().to_owned(),
        other => panic!("version {of}: {other:?}"),
    }
}

async fn rows(backend: &Backend) -> i64 {
    backend.number("SELECT count(*) FROM {}company_secrets").await
}

/// Rows whose link does not lead to the version before, though that is kept.
const BROKEN_LINKS: &str = "SELECT count(*) FROM {}company_secrets new JOIN {}company_secrets old \
    ON old.company_id = new.company_id AND old.secret_key = new.secret_key AND old.version = new.version - 1 \
    WHERE new.previous_version_id IS NULL OR new.previous_version_id <> old.id";

#[tokio::test(flavor = "multi_thread")]
async fn every_write_makes_a_version_and_the_older_ones_stay() {
    on_both(async |backend| {
        let database = backend.open().await;
        for text in ["one", "two", "two"] {
            put(&database, text).await;
        }
        let (acme, name) = (tenant("acme"), key("K"));
        let other = Writer::new("other");
        assert!(database.delete(&acme, &name, &Precondition::None, &other, None).await.unwrap());
        assert!(!database.delete(&acme, &name, &Precondition::None, &other, None).await.unwrap());
        let back =
            database.put(&acme, &name, &value("five"), &Precondition::IfNoneMatchAny, &other, None).await.unwrap();
        assert_eq!((back.version, back.created), (number(5), true));

        // Another instance sees the same, and so does one that starts anew.
        for database in [database, backend.open().await] {
            let all = versions(&database).await;
            let told =
                all.iter().map(|of| (of.version.number(), of.written_by.as_deref(), of.is_deletion, of.is_current));
            let told: Vec<_> = told.collect();
            assert_eq!(
                told,
                [
                    (5, Some("other"), false, true),
                    (4, Some("other"), true, false),
                    (3, Some("test"), false, false),
                    (2, Some("test"), false, false),
                    (1, Some("test"), false, false),
                ]
            );
            assert!(all.iter().all(|revision| revision.source == Source::Database));
            for (of, was) in [(1, "one"), (2, "two"), (3, "two"), (5, "five")] {
                assert_eq!(text(&database, of).await, was);
            }
            assert!(matches!(version(&database, 4).await, Held::Unknown), "a deletion has no value");
            assert!(matches!(version(&database, 6).await, Held::Absent));
            assert_eq!(stored(&database, "acme", "K").await.version, number(5));
            assert_eq!(database.find_all(&acme).await.unwrap().secrets.len(), 1);
            assert_eq!(database.companies().await.unwrap()[0].1, 1, "a secret counts once");
        }
        assert_eq!(backend.number(BROKEN_LINKS).await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_has_an_etag_of_its_own_for_ever() {
    on_both(async |backend| {
        let database = backend.open().await;
        put(&database, "one").await;
        let one = stored(&database, "acme", "K").await.etag;
        put(&database, "two").await;
        let Held::Present(older) = version(&database, 1).await else { panic!("it is kept") };
        assert_eq!(older.etag, one);
        assert_ne!(stored(&database, "acme", "K").await.etag, one);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_is_a_new_version_with_the_old_value() {
    on_both(async |backend| {
        let database = backend.open().await;
        let (acme, name, by) = (tenant("acme"), key("K"), Writer::new("operator"));
        let to = async |of: i64, precondition: &Precondition| {
            database.rollback(&acme, &name, number(of), precondition, &by, None).await
        };
        assert!(matches!(to(1, &Precondition::None).await, Err(WriteError::NoVersion)));
        assert!(database.company(&acme).await.unwrap().is_none(), "not even the tenant's row");

        put(&database, "one").await;
        put(&database, "two").await;
        assert!(database.delete(&acme, &name, &Precondition::None, &writer(), None).await.unwrap());
        let before = database.company(&acme).await.unwrap();
        for missing in [3, 4, 99] {
            assert!(matches!(to(missing, &Precondition::None).await, Err(WriteError::NoVersion)), "{missing}");
        }
        assert!(matches!(to(1, &Precondition::IfMatchAny).await, Err(WriteError::Conflict)));
        assert_eq!(database.company(&acme).await.unwrap(), before, "nothing was written");
        assert!(matches!(held(&database, "acme", "K").await, Held::Unknown));

        let back = to(1, &Precondition::IfNoneMatchAny).await.unwrap();
        assert_eq!((back.version, back.created), (number(4), true), "a deletion is undone");
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "one");
        let again = to(2, &Precondition::IfMatch(vec![back.etag])).await.unwrap();
        assert_eq!((again.version, again.created), (number(5), false));
        assert_eq!(stored(&database, "acme", "K").await.etag, again.etag);
        let all = versions(&database).await;
        assert_eq!(all[0].written_by.as_deref(), Some("operator"));
        assert_eq!(numbers(&database).await, [5, 4, 3, 2, 1]);
        assert_eq!(text(&database, 5).await, "two");
        assert_eq!(backend.number(BROKEN_LINKS).await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_rollback_and_a_put_that_name_the_same_etag_one_wins() {
    on_both(async |backend| {
        let database = backend.open().await;
        put(&database, "one").await;
        for round in 0..10 {
            let etag = stored(&database, "acme", "K").await.etag;
            let (acme, name, new, by) = (tenant("acme"), key("K"), value("new"), writer());
            let precondition = Precondition::IfMatch(vec![etag]);
            let (rollback, put) = tokio::join!(
                database.rollback(&acme, &name, number(round + 1), &precondition, &by, None),
                database.put(&acme, &name, &new, &precondition, &by, None),
            );
            assert_ne!(rollback.is_ok(), put.is_ok(), "{rollback:?} {put:?}");
            assert!([rollback, put].iter().any(|outcome| matches!(outcome, Err(WriteError::Conflict))));
            assert_eq!(stored(&database, "acme", "K").await.version, number(round + 2));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_versions_are_kept_than_configured() {
    on_both(async |mut backend| {
        backend.config.versions_kept = 3;
        let database = backend.open().await;
        for text in ["1", "2", "3", "4", "5"] {
            put(&database, text).await;
        }
        assert_eq!(numbers(&database).await, [5, 4, 3]);
        assert_eq!(rows(&backend).await, 3);
        assert!(matches!(version(&database, 2).await, Held::Absent));
        assert_eq!(text(&database, 3).await, "3");
        assert!(matches!(roll_back(&database, 2).await, Err(WriteError::NoVersion)));

        // What was kept under another configuration is not served, and goes with the next write.
        backend.config.versions_kept = 1;
        let database = backend.open().await;
        assert_eq!(numbers(&database).await, [5]);
        assert!(matches!(version(&database, 4).await, Held::Absent));
        put(&database, "6").await;
        assert_eq!(rows(&backend).await, 1);
        assert_eq!(stored(&database, "acme", "K").await.version, number(6));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_is_gone_once_its_time_is_over() {
    on_both(async |mut backend| {
        backend.config.versions_kept_for = DAY;
        let database = backend.open().await;
        put(&database, "one").await;
        backend.clock.advance(30 * DAY);
        put(&database, "two").await;
        assert_eq!(text(&database, 1).await, "one", "the time begins when there is a newer one");
        backend.clock.advance(DAY / 2);
        put(&database, "three").await;
        assert_eq!(numbers(&database).await, [3, 2, 1]);
        backend.clock.advance(DAY / 2);
        // Still in the table, and not told or served any more.
        assert_eq!((rows(&backend).await, numbers(&database).await), (3, vec![3, 2]));
        assert!(matches!(version(&database, 1).await, Held::Absent));
        assert!(matches!(roll_back(&database, 1).await, Err(WriteError::NoVersion)));

        backend.clock.advance(DAY / 2);
        put(&database, "four").await;
        assert_eq!((rows(&backend).await, numbers(&database).await), (2, vec![4, 3]), "a write removes them");
        backend.clock.advance(30 * DAY);
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "four", "the newest has no end");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_of_secrets_that_nobody_writes_are_swept() {
    on_both(async |backend| {
        let database = backend.open().await;
        for of in ["acme", "globex"] {
            for name in ["K", "L"] {
                for text in ["one", "two"] {
                    put_to(&database, of, name, text).await;
                }
            }
        }
        assert!(!database.sweep_versions().await.unwrap(), "nothing is old enough");
        backend.clock.advance(60 * DAY);
        put(&database, "three").await;
        backend.clock.advance(31 * DAY);
        assert_eq!(rows(&backend).await, 9);
        let mut batches = 0;
        while database.sweep_versions().await.unwrap() {
            batches += 1;
        }
        assert_eq!((batches, rows(&backend).await), (2, 5), "one a tenant");
        assert_eq!(numbers(&database).await, [3, 2]);
        let dangling = "SELECT count(*) FROM {}company_secrets WHERE previous_version_id IS NOT NULL";
        assert_eq!(backend.number(dangling).await, 1);
        for of in ["acme", "globex"] {
            assert_eq!(stored(&database, of, "L").await.value.expose(), "two");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_copy_makes_a_version_and_an_unchanged_one_does_not() {
    on_both(async |backend| {
        let database = backend.open().await;
        for text in ["one", "one", "two", "two"] {
            store(&backend, &database, &[("K", text), ("L", "l")]).await;
        }
        let all = versions(&database).await;
        assert!(all.iter().all(|of| of.source == Source::Infisical && of.written_by.is_none()));
        assert_eq!(numbers(&database).await, [2, 1]);
        assert_eq!(text(&database, 1).await, "one");
        assert_eq!(rows(&backend).await, 3);
        assert_eq!(backend.number(BROKEN_LINKS).await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_upstream_was_told_to_change_is_one_version_by_whoever_told_it_last() {
    on_both(async |backend| {
        let database = backend.open().await;
        let acme = tenant("acme");
        store(&backend, &database, &[("K", "one")]).await;
        let one = stored(&database, "acme", "K").await.etag;
        for by in ["first", "second"] {
            tell(&database, "acme", Told::Copied(&key("K"), &Writer::new(by))).await;
            assert!(matches!(held(&database, "acme", "K").await, Held::Unknown));
            let all = versions(&database).await;
            assert_eq!(all.len(), 1, "what nobody has seen is not told");
            assert!(!all[0].is_current);
            assert!(matches!(version(&database, 2).await, Held::Unknown));
            assert_eq!(text(&database, 1).await, "one", "what was before stays");
        }
        store(&backend, &database, &[("K", "two")]).await;
        let all = versions(&database).await;
        assert_eq!(
            (all[0].version, all[0].written_by.as_deref(), all[0].is_current),
            (number(2), Some("second"), true)
        );
        assert_eq!((all[0].source, numbers(&database).await), (Source::Infisical, vec![2, 1]));
        assert_ne!(stored(&database, "acme", "K").await.etag, one);
        assert_eq!((backend.number(BROKEN_LINKS).await, rows(&backend).await), (0, 2));

        // The owner that follows takes the place as well.
        tell(&database, "acme", Told::Copied(&key("K"), &writer())).await;
        assert!(!database.delete(&acme, &key("K"), &Precondition::None, &writer(), None).await.unwrap());
        put(&database, "three").await;
        assert_eq!(numbers(&database).await, [3, 2, 1]);
        assert_eq!((backend.number(BROKEN_LINKS).await, rows(&backend).await), (0, 3));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_upstream_deleted_leaves_no_copy_behind() {
    on_both(async |backend| {
        let database = backend.open().await;
        let acme = tenant("acme");
        hand_over(&database, "acme", Some(Phase::Database)).await;
        put(&database, "own").await;
        hand_over(&database, "acme", None).await;
        for text in ["copy", "copy 2"] {
            store(&backend, &database, &[("K", text), ("L", text)]).await;
        }
        assert_eq!(numbers(&database).await, [3, 2, 1]);
        store(&backend, &database, &[("L", "copy 2")]).await;
        let all = versions(&database).await;
        let told: Vec<_> = all.iter().map(|of| (of.version.number(), of.source, of.is_deletion)).collect();
        assert_eq!(told, [(4, Source::Infisical, true), (1, Source::Database, false)]);
        assert_eq!(text(&database, 1).await, "own", "what the database was the owner of is no copy");
        let copies = "SELECT count(*) FROM {}company_secrets WHERE secret_key = 'K' AND source = 'infisical' \
                      AND secret_value_encrypted IS NOT NULL";
        assert_eq!(backend.number(copies).await, 0);
        let others = "SELECT count(*) FROM {}company_secrets WHERE secret_key = 'L'";
        assert_eq!(backend.number(others).await, 2, "the other secrets keep theirs");

        // Deleted through the proxy: it tells by whom.
        tell(&database, "acme", Told::Copied(&key("L"), &Writer::new("operator"))).await;
        store(&backend, &database, &[]).await;
        assert_eq!(backend.number(others).await, 1);
        let (_, all) = database.versions(&acme, &key("L")).await.unwrap();
        assert_eq!((all[0].version, all[0].is_deletion), (number(3), true));
        assert_eq!(all[0].written_by.as_deref(), Some("operator"));
        store(&backend, &database, &[("L", "again")]).await;
        assert_eq!(stored(&database, "acme", "L").await.version, number(4), "no number is used again");

        // Of what never was there is nothing to tell.
        tell(&database, "acme", Told::Copied(&key("NEVER"), &writer())).await;
        store(&backend, &database, &[("L", "again")]).await;
        assert!(matches!(held(&database, "acme", "NEVER").await, Held::Absent));
        assert_eq!(database.versions(&acme, &key("NEVER")).await.unwrap().1, []);
        assert!(database.find_all(&acme).await.unwrap().is_snapshot);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_that_were_swapped_do_not_open() {
    for what in ["secret_value_encrypted", "version"] {
        on_both(async |backend| {
            let database = backend.open().await;
            for text in ["one", "two", "three"] {
                put(&database, text).await;
            }
            assert_eq!(text(&database, 1).await, "one");
            let sql = match what {
                "version" => {
                    "UPDATE company_secrets SET version = 99 WHERE version = 1; \
                     UPDATE company_secrets SET version = 1 WHERE version = 2; \
                     UPDATE company_secrets SET version = 2 WHERE version = 99"
                }
                _ => {
                    "UPDATE company_secrets SET written_by = secret_value_encrypted; \
                     UPDATE company_secrets SET secret_value_encrypted = (SELECT other.written_by \
                     FROM company_secrets other WHERE other.version = 3 - company_secrets.version) WHERE version < 3"
                }
            };
            backend.sql(sql).await;
            for of in [1, 2] {
                assert!(matches!(version(&database, of).await, Held::Unreadable(OpenError::Forged)), "{of}");
                assert!(matches!(roll_back(&database, of).await, Err(WriteError::Unreadable(OpenError::Forged))));
            }
            assert_eq!(text(&database, 3).await, "three");
            assert_eq!(numbers(&database).await, [3, 2, 1], "nothing was written");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_many_secrets_is_superseded_and_pruned_whole() {
    on_both(async |mut backend| {
        backend.config.versions_kept = 2;
        let database = backend.open().await;
        let names: Vec<String> = (0..1_200).map(|number| format!("KEY_{number}")).collect();
        for text in ["one", "two", "three"] {
            let secrets: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), text)).collect();
            store(&backend, &database, &secrets).await;
        }
        assert_eq!(rows(&backend).await, 2 * 1_200);
        assert_eq!(database.companies().await.unwrap()[0].1, 1_200);
        assert_eq!(backend.number(BROKEN_LINKS).await, 0);
        let oldest = "SELECT min(version) FROM {}company_secrets";
        assert_eq!(backend.number(oldest).await, 2);
        store(&backend, &database, &[]).await;
        assert_eq!(rows(&backend).await, 1_200, "only the marks are left");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_are_removed_a_few_at_a_time() {
    on_both(async |mut backend| {
        backend.config.versions_kept = 100;
        let database = backend.open().await;
        let large = "x".repeat(1 << 20);
        for _ in 0..20 {
            put(&database, &large).await;
        }
        backend.config.versions_kept = 1;
        let database = backend.open().await;
        let mut left = 20;
        put(&database, "small").await;
        while rows(&backend).await > 1 {
            let now = rows(&backend).await;
            assert!((left - 4..=left).contains(&now), "{left} became {now}");
            assert_eq!(numbers(&database).await.len(), 1, "the others are not served meanwhile");
            left = now;
            put(&database, "small").await;
        }
        assert!(left < 20);

        backend.config.versions_kept = 100;
        let database = backend.open().await;
        for _ in 0..10 {
            put(&database, &large).await;
        }
        backend.clock.advance(91 * DAY);
        let mut batches = 0;
        while database.sweep_versions().await.unwrap() {
            batches += 1;
        }
        assert!(batches >= 3, "{batches}");
        assert_eq!(rows(&backend).await, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_are_sealed_anew_a_few_at_a_time() {
    on_both(async |backend| {
        let database = backend.open().await;
        let large = "x".repeat(1 << 20);
        for _ in 0..10 {
            put(&database, &large).await;
        }
        let lock = database.rotation_lock("a test").await.unwrap().unwrap();
        let resealed = database.renew_data_key(&lock, &tenant("acme"), backend.clock.now().plus(DAY)).await.unwrap();
        assert_eq!((resealed.values, resealed.failed), (10, 0));
        assert_eq!(backend.number("SELECT count(*) FROM {}company_data_keys").await, 1);
        assert_eq!(text(&database, 1).await, large);
        let batches = backend.metrics.render();
        let told = "secretier_database_calls_total{call=\"reseal\",outcome=\"ok\"} ";
        let count =
            batches.lines().find_map(|line| line.strip_prefix(told)).and_then(|count| count.parse::<u32>().ok());
        assert!(count.is_some_and(|count| count >= 3), "{count:?}");
    })
    .await;
}
