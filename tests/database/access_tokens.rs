//! What signs access tokens, and which logins were ended.

use std::sync::Arc;

use secretier::{
    clock::Timestamp,
    sealing::{KeyRing, MasterKey},
    tiers::database::{Database, StoreError},
};

use crate::backend::{new_ring, on_both};

/// The keys that open here: their ids, and themselves.
async fn keys(database: &Database) -> Vec<(String, [u8; 32])> {
    let known = database.known_logins().await.unwrap();
    known.keys.iter().map(|key| (key.id.clone(), *key.bytes)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_signing_key_is_one_for_all_and_lies_sealed() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        assert!(keys(&database).await.is_empty());
        let (one, two) = tokio::join!(database.ensure_login_key(), other.ensure_login_key());
        one.unwrap();
        two.unwrap();
        let known = keys(&database).await;
        assert_eq!((known.len(), keys(&other).await), (1, known.clone()));
        database.ensure_login_key().await.unwrap();
        assert_eq!(keys(&database).await, known);
        let in_clear = format!("SELECT count(*) FROM {{}}settings WHERE value LIKE '%{}%'", hex::encode(known[0].1));
        assert_eq!(backend.number(&in_clear).await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_seals_the_keys_anew_and_draws_another_only_where_it_is_asked_to() {
    on_both(async |mut backend| {
        let old = backend.ring.first().unwrap().clone();
        backend.open().await.ensure_login_key().await.unwrap();
        let new = MasterKey::generate().unwrap();
        backend.ring = Arc::new(KeyRing::new(vec![new.clone(), old.clone()]));
        let rotating = backend.open().await;
        let before = keys(&rotating).await;
        let lock = rotating.rotation_lock("test").await.unwrap().unwrap();
        assert_eq!(rotating.reseal_login_keys(&lock, &new, None).await.unwrap(), 1);
        assert_eq!(rotating.reseal_login_keys(&lock, &new, None).await.unwrap(), 0, "nothing is left to do");
        backend.ring = Arc::new(KeyRing::new(vec![new.clone()]));
        assert_eq!(keys(&backend.open().await).await, before);
        backend.ring = Arc::new(KeyRing::new(vec![old]));
        assert!(keys(&backend.open().await).await.is_empty(), "it is sealed with a key that is not held");

        let since = backend.clock.database_now();
        for _ in 0..2 {
            // The same rotation is continued.
            rotating.reseal_login_keys(&lock, &new, Some(since)).await.unwrap();
        }
        let after = keys(&rotating).await;
        assert_eq!((after.len(), &after[1..]), (2, &before[..]), "the new one signs, the one before is known");
        backend.clock.advance(secretier::tiers::database::LONGEST_LOGIN);
        rotating.reseal_login_keys(&lock, &new, None).await.unwrap();
        assert_eq!(keys(&rotating).await, after[..1], "what it has signed has ended");
        rotating.end_job_lock(lock).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_was_moved_or_changed_does_not_open_and_without_a_master_key_none_is_made() {
    on_both(async |mut backend| {
        let database = backend.open().await;
        database.ensure_login_key().await.unwrap();
        let id = keys(&database).await[0].0.clone();
        let rename = format!("UPDATE settings SET value = replace(value, '{id}', '0000000000000000')");
        backend.sql(&format!("{rename} WHERE name = 'login_keys'")).await;
        assert!(keys(&database).await.is_empty());
        backend.sql("DELETE FROM settings WHERE name = 'login_keys'").await;
        backend.ring = Arc::new(KeyRing::new(Vec::new()));
        let keyless = backend.open().await;
        let refused = keyless.ensure_login_key().await;
        assert!(matches!(&refused, Err(error @ StoreError::Sealing(_)) if error.needs_master_key()), "{refused:?}");
        backend.ring = new_ring();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ended_login_is_kept_until_it_would_have_ended_by_itself() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        let hour = std::time::Duration::from_secs(3600);
        let soon = backend.clock.now().plus(hour);
        let before = database.changes().await.unwrap();
        assert!(database.end_login("one", "token", soon).await.unwrap());
        assert!(database.end_login("one", "token", soon).await.unwrap(), "once more does no harm");
        assert!(database.end_login("two", "token", soon.plus(hour)).await.unwrap());
        assert!(database.changes().await.unwrap() > before, "the others hear of it");
        let ended = async || {
            let mut ended = other.known_logins().await.unwrap().ended;
            ended.sort();
            ended
        };
        assert_eq!(ended().await, ["one", "two"]);
        backend.clock.advance(hour);
        assert_eq!(ended().await, ["two"]);
        database.end_login("three", "token", Timestamp::from_millis(i64::MAX)).await.unwrap();
        assert_eq!(backend.number("SELECT count(*) FROM {}ended_logins").await, 2);
    })
    .await;
}
