//! Phases, and the number that tells of their changes.

use std::time::Duration;

use secretier::{
    phase::Phase,
    tiers::database::{Began, Expected, Precondition, StoreError, Told},
};

use crate::{
    backend::{hand_over, on_both, own_phases, tenant, writer},
    tokens::token,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_own_phase_is_kept_and_can_be_taken_away() {
    on_both(async |backend| {
        let (database, other) = (backend.open().await, backend.open().await);
        let before = other.changes().await.unwrap();
        for phase in Phase::ALL {
            hand_over(&database, "acme", Some(phase)).await;
            assert_eq!(own_phases(&other).await, [(tenant("acme"), phase)]);
        }
        hand_over(&database, "acme", None).await;
        assert_eq!(own_phases(&other).await, []);
        assert_eq!(other.changes().await.unwrap(), before + 4);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_is_refused_is_no_outage() {
    on_both(async |backend| {
        let database = backend.open().await;
        database.insert_token(&token("ci", 1)).await.unwrap();
        backend.sql("ALTER TABLE access_tokens RENAME TO elsewhere").await;
        for _ in 0..3 {
            assert!(matches!(database.tokens().await, Err(StoreError::Broken(_))));
        }
        assert!(database.is_up());
        backend.sql("ALTER TABLE elsewhere RENAME TO access_tokens").await;
        assert_eq!(database.tokens().await.unwrap().len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_can_run_in_a_task_of_its_own() {
    fn spawnable<T>(_: impl Future<Output = T> + Send) {}
    let backend = crate::backend::Backend::sqlite();
    let (database, acme, key) = (backend.open().await, tenant("acme"), crate::backend::key("K"));
    let (snapshot, began) = (crate::backend::snapshot(&[]), Began { generation: None });
    spawnable(backend.try_open("test"));
    spawnable(database.find(&acme, &key));
    spawnable(database.find_all(&acme));
    spawnable(database.store_snapshot(&acme, &snapshot, began, backend.clock.now(), &|_| true));
    spawnable(database.delete(&acme, &key, &Precondition::None, &writer(), None));
    let (_, write) = database.begin_upstream_write(&acme, Duration::ZERO).await.unwrap();
    spawnable(database.begin_upstream_write(&acme, Duration::ZERO));
    spawnable(database.end_upstream_write(&write, Told::Copied(&key, &writer())));
    spawnable(database.hand_over(&acme, Expected::of(None), None));
    spawnable(database.tokens());
    spawnable(database.ping());
}
