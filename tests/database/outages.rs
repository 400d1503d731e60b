//! A database that goes away and comes back.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use diesel::connection::SimpleConnection as _;
use futures_util::FutureExt as _;
use secretier::tiers::database::{Began, Database, Precondition, StoreError, StoreOutcome};

use crate::{
    backend::{Backend, key, snapshot, stored, tenant, value, writer},
    postgres::Postgres,
    within::{HANGS, within},
};

fn is_unavailable<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError::Unavailable { .. }))
}

/// Fills the pool, so that every connection in it has been used.
async fn use_every_connection(database: &Database) {
    futures_util::future::join_all((0..10).map(|_| stored(database, "acme", "K"))).await;
}

async fn until_up(database: &Database) {
    within("it comes back", async { while database.ping().await.is_err() {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_the_next_calls_succeed() {
    let mut server = Postgres::start();
    let backend = Backend::postgres(&server).await;
    let database = backend.open().await;
    database.put(&tenant("acme"), &key("K"), &value("v"), &Precondition::None, &writer(), None).await.unwrap();
    use_every_connection(&database).await;
    server.restart();
    use_every_connection(&database).await;
    server.kill();
    server.start_again();
    database.put(&tenant("acme"), &key("K"), &value("w"), &Precondition::None, &writer(), None).await.unwrap();
    assert_eq!(stored(&database, "acme", "K").await.value.expose(), "w");
    assert!(database.is_up());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_down_costs_nothing_and_is_found_again() {
    let mut server = Postgres::start();
    let backend = Backend::postgres(&server).await;
    let database = backend.open().await;
    database.put(&tenant("acme"), &key("K"), &value("v"), &Precondition::None, &writer(), None).await.unwrap();
    server.stop();
    for _ in 0..3 {
        assert!(is_unavailable(&database.find(&tenant("acme"), &key("K")).await));
    }
    assert!(!database.is_up());
    assert!(backend.metrics.render().contains("outcome=\"refused\""));
    server.start_again();
    until_up(&database).await;
    assert!(database.is_up());
    assert_eq!(stored(&database, "acme", "K").await.value.expose(), "v");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_hangs_is_left_alone_after_two_timeouts() {
    let server = Postgres::start();
    let mut backend = Backend::postgres(&server).await;
    backend
        .open()
        .await
        .put(&tenant("acme"), &key("K"), &value("v"), &Precondition::None, &writer(), None)
        .await
        .unwrap();
    backend.config.timeout = Duration::from_millis(300);
    let database = Arc::new(backend.open().await);
    until_up(&database).await;
    server.freeze();
    let hang = async {
        for _ in 0..2 {
            assert!(is_unavailable(&database.find(&tenant("acme"), &key("K")).await));
        }
        assert!(!database.is_up());
        let put = database.put(&tenant("acme"), &key("K"), &value("w"), &Precondition::None, &writer(), None).await;
        assert!(put.is_err());
        assert!(database.ping().await.is_err());
    };
    within("no call hangs", hang).await;
    assert!(backend.metrics.render().contains("outcome=\"refused\""));
    assert!(is_unavailable(&backend.try_open("test").await), "nor does an instance that starts");
    server.thaw();
    until_up(&database).await;
    backend.config.timeout = HANGS;
    assert_eq!(stored(&backend.open().await, "acme", "K").await.value.expose(), "v");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_leaves_no_transaction_behind() {
    for backend in [Backend::sqlite(), Backend::postgres(Postgres::shared()).await] {
        let database = backend.open().await;
        database.put(&tenant("acme"), &key("K"), &value("v"), &Precondition::None, &writer(), None).await.unwrap();
        // Dropped at every point where a write can wait, each time a little later.
        for polls in 0..40 {
            let (acme, name, new, by) = (tenant("acme"), key("K"), value("w"), writer());
            let mut put = Box::pin(database.put(&acme, &name, &new, &Precondition::None, &by, None));
            for _ in 0..polls {
                if put.as_mut().now_or_never().is_some() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        until_up(&database).await;
        for _ in 0..20 {
            database.put(&tenant("acme"), &key("K"), &value("x"), &Precondition::None, &writer(), None).await.unwrap();
        }
        assert_eq!(stored(&database, "acme", "K").await.value.expose(), "x");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_to_a_file_that_another_process_holds_ends_in_time_and_a_snapshot_waits() {
    let mut backend = Backend::sqlite();
    backend.config.timeout = Duration::from_millis(500);
    let database = backend.open().await;
    let mut other = backend.sqlite_connection();
    other.batch_execute("BEGIN IMMEDIATE").unwrap();
    let began = Instant::now();
    assert!(database.put(&tenant("acme"), &key("K"), &value("v"), &Precondition::None, &writer(), None).await.is_err());
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());

    let held = tokio::task::spawn_blocking(move || {
        std::thread::sleep(Duration::from_millis(1200));
        other.batch_execute("COMMIT").unwrap();
    });
    let (acme, folder, began) = (tenant("acme"), snapshot(&[("K", "v")]), Began { generation: None });
    let stored = database.store_snapshot(&acme, &folder, began, backend.clock.now(), &|_| true).await;
    assert!(matches!(stored.unwrap(), StoreOutcome::Stored { .. }), "nobody waits for it, so it has longer");
    held.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_who_go_away_leave_the_database_to_the_others() {
    for backend in [Backend::sqlite(), Backend::postgres(Postgres::shared()).await] {
        let database = backend.open().await;
        for _ in 0..8 {
            drop(database.find_all(&tenant("acme")).now_or_never());
        }
        assert!(database.is_up());
        database.find(&tenant("acme"), &key("K")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_file_that_is_gone_is_not_replaced_by_an_empty_one() {
    let backend = Backend::sqlite();
    let database = backend.open().await;
    let file = backend.file().unwrap();
    std::fs::remove_file(&file).unwrap();
    let waiting = (0..10).map(|_| async { database.companies().await });
    futures_util::future::join_all(waiting).await;
    assert!(!file.exists());
}
