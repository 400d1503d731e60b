//! Reading and writing one secret.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use secretier::tiers::database::{Held, Precondition, Source, WriteError};

use crate::backend::{held, key, on_both, stored, tenant, value, writer};

#[tokio::test(flavor = "multi_thread")]
async fn what_was_put_is_found_again_and_by_another_instance() {
    on_both(async |backend| {
        let database = backend.open().await;
        let (acme, name) = (tenant("acme"), key("STRIPE/KEY 🔑"));
        let large = "x".repeat(1 << 20);
        for (number, text) in [(1, "sk_live_1"), (2, ""), (3, large.as_str()), (4, "ümläut\n")] {
            let written = database.put(&acme, &name, &value(text), &Precondition::None, &writer(), None).await.unwrap();
            assert_eq!((written.version.number(), written.created), (number, number == 1));
            let found = stored(&database, "acme", name.as_str()).await;
            assert_eq!(found.value.expose(), text);
            assert_eq!((found.version, found.etag), (written.version, written.etag));
            assert_eq!((found.updated_at, found.source), (written.updated_at, Source::Database));
        }
        let other = backend.open().await;
        assert_eq!(stored(&other, "acme", name.as_str()).await.value.expose(), "ümläut\n");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_put_is_absent() {
    on_both(async |backend| {
        let database = backend.open().await;
        assert!(database.find(&tenant("acme"), &key("K")).await.unwrap().company.is_none());
        database.put(&tenant("acme"), &key("K"), &value("v"), &Precondition::None, &writer(), None).await.unwrap();
        assert!(matches!(held(&database, "acme", "k").await, Held::Absent));
        assert!(matches!(held(&database, "umbrella", "K").await, Held::Absent));
        assert!(database.find_all(&tenant("umbrella")).await.unwrap().company.is_none());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_secret_is_absent_and_its_versions_are_not_used_again() {
    on_both(async |backend| {
        let database = backend.open().await;
        let (acme, name) = (tenant("acme"), key("K"));
        assert!(!database.delete(&acme, &name, &Precondition::None, &writer(), None).await.unwrap());
        database.put(&acme, &name, &value("v"), &Precondition::None, &writer(), None).await.unwrap();
        assert!(database.delete(&acme, &name, &Precondition::None, &writer(), None).await.unwrap());
        assert!(!database.delete(&acme, &name, &Precondition::None, &writer(), None).await.unwrap());
        assert!(matches!(held(&database, "acme", "K").await, Held::Unknown), "absent to its owner, and to no other");
        let listing = database.find_all(&acme).await.unwrap();
        assert!(listing.secrets.is_empty());
        assert!(!listing.is_snapshot);

        let written =
            database.put(&acme, &name, &value("v"), &Precondition::IfNoneMatchAny, &writer(), None).await.unwrap();
        assert_eq!((written.version.number(), written.created), (3, true));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_precondition_fails_changes_nothing() {
    on_both(async |backend| {
        let database = backend.open().await;
        let (acme, name) = (tenant("acme"), key("K"));
        let conflict = |outcome: Result<_, WriteError>| matches!(outcome, Err(WriteError::Conflict));
        let stale = Precondition::IfMatch(vec!["0".repeat(32)]);
        for precondition in [&stale, &Precondition::IfMatchAny] {
            assert!(conflict(database.put(&acme, &name, &value("v"), precondition, &writer(), None).await.map(|_| ())));
            assert!(conflict(database.delete(&acme, &name, precondition, &writer(), None).await.map(|_| ())));
        }
        assert!(database.company(&acme).await.unwrap().is_none(), "not even the tenant's row");

        let written =
            database.put(&acme, &name, &value("v"), &Precondition::IfNoneMatchAny, &writer(), None).await.unwrap();
        let before = database.company(&acme).await.unwrap();
        for precondition in [&stale, &Precondition::IfNoneMatchAny] {
            assert!(conflict(database.put(&acme, &name, &value("w"), precondition, &writer(), None).await.map(|_| ())));
            assert!(conflict(database.delete(&acme, &name, precondition, &writer(), None).await.map(|_| ())));
        }
        assert_eq!(database.company(&acme).await.unwrap(), before);
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "v");

        let matching = Precondition::IfMatch(vec!["0".repeat(32), written.etag]);
        assert!(database.put(&acme, &name, &value("w"), &matching, &writer(), None).await.is_ok());
        assert!(database.delete(&acme, &name, &Precondition::IfMatchAny, &writer(), None).await.unwrap());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_fifty_writers_that_name_the_same_etag_one_wins() {
    on_both(async |backend| {
        let database = Arc::new(backend.open().await);
        let first =
            database.put(&tenant("acme"), &key("K"), &value("v"), &Precondition::None, &writer(), None).await.unwrap();
        let mut writers = tokio::task::JoinSet::new();
        let conflicts = Arc::new(AtomicUsize::new(0));
        for number in 0..50 {
            let (database, conflicts, etag) = (Arc::clone(&database), Arc::clone(&conflicts), first.etag.clone());
            writers.spawn(async move {
                let precondition = Precondition::IfMatch(vec![etag]);
                let new = value(&number.to_string());
                match database.put(&tenant("acme"), &key("K"), &new, &precondition, &writer(), None).await {
                    Ok(written) => Some((number, written)),
                    Err(WriteError::Conflict) => {
                        conflicts.fetch_add(1, Ordering::Relaxed);
                        None
                    }
                    Err(other) => panic!("{other:?}"),
                }
            });
        }
        let winners: Vec<_> = writers.join_all().await.into_iter().flatten().collect();
        assert_eq!((winners.len(), conflicts.load(Ordering::Relaxed)), (1, 49));
        let (number, written) = &winners[0];
        let found = stored(&database, "acme", "K").await;
        assert_eq!((found.value.expose(), found.version.number()), (number.to_string().as_str(), 2));
        assert_eq!(found.etag, written.etag);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_without_a_precondition_each_get_a_version_of_their_own() {
    on_both(async |backend| {
        let database = Arc::new(backend.open().await);
        let mut writers = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let database = Arc::clone(&database);
            writers.spawn(async move {
                let written =
                    database.put(&tenant("new"), &key("K"), &value("same"), &Precondition::None, &writer(), None).await;
                written.unwrap().version.number()
            });
        }
        let versions: HashSet<i64> = writers.join_all().await.into_iter().collect();
        assert_eq!(versions, (1..=20).collect());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_a_tenants_secrets_are_listed_by_name() {
    on_both(async |backend| {
        let database = backend.open().await;
        for name in ["b", "A", "a", "_"] {
            database
                .put(&tenant("acme"), &key(name), &value(name), &Precondition::None, &writer(), None)
                .await
                .unwrap();
        }
        let listing = database.find_all(&tenant("acme")).await.unwrap();
        assert_eq!(listing.secrets.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["A", "_", "a", "b"]);
        for (name, held) in listing.secrets.iter() {
            let Held::Present(listed) = held else { panic!("{held:?}") };
            let found = stored(&database, "acme", name.as_str()).await;
            assert_eq!((listed.value.expose(), found.value.expose()), (name.as_str(), name.as_str()));
            assert_eq!((listed.version, &listed.etag), (found.version, &found.etag));
        }
        let companies = database.companies().await.unwrap();
        assert_eq!((companies.len(), companies[0].1), (1, 4));
    })
    .await;
}
