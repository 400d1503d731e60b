//! The register of running instances.

use std::time::Duration;

use secretier::tiers::database::Database;

use crate::backend::{Backend, on_both};

/// The names of the live instances, each with its changes.
async fn live(database: &Database) -> Vec<(String, i64)> {
    let instances = database.live_instances().await.unwrap();
    instances.into_iter().map(|instance| (instance.name, instance.changes)).collect()
}

fn names(instances: &[secretier::tiers::database::Instance]) -> Vec<&str> {
    instances.iter().map(|instance| instance.name.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_tells_its_keys_and_how_far_it_is_until_it_withdraws() {
    on_both(async |mut backend| {
        let database = backend.open().await;
        database.announce("1", "host/1", 7).await.unwrap();
        backend.ring = std::sync::Arc::default();
        let keyless = backend.open().await;
        keyless.announce("2", "host/2", 8).await.unwrap();
        let instances = keyless.live_instances().await.unwrap();
        assert_eq!(instances.len(), 2);
        assert_eq!((instances[0].id.as_str(), instances[0].name.as_str(), instances[0].changes), ("1", "host/1", 7));
        assert_eq!(instances[0].master_keys, database.keys().ring().ids().collect::<Vec<_>>());
        assert_eq!((instances[0].master_keys.len(), instances[1].master_keys.len()), (1, 0));
        assert!(backend.clock.now().since(instances[0].seen_at) < Duration::from_secs(15));

        database.announce("1", "host/1", 9).await.unwrap();
        assert_eq!(live(&database).await, [("host/1".to_owned(), 9), ("host/2".to_owned(), 8)]);
        database.withdraw("1").await.unwrap();
        database.withdraw("unheard of").await.unwrap();
        assert_eq!(live(&database).await, [("host/2".to_owned(), 8)]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_lives_for_fifteen_seconds_after_it_was_heard_of_and_its_row_for_an_hour() {
    on_both(async |backend| {
        let database = backend.open().await;
        let rows = async || backend.number("SELECT count(*) FROM {}instances").await;
        database.announce("1", "host/1", 0).await.unwrap();
        backend.clock.advance(Duration::from_secs(14));
        assert_eq!(live(&database).await.len(), 1);
        backend.clock.advance(Duration::from_secs(2));
        assert_eq!(live(&database).await, []);
        backend.clock.advance(Duration::from_secs(59 * 60));
        database.announce("2", "host/2", 0).await.unwrap();
        assert_eq!(rows().await, 2, "it is still known that nobody saw the end of it");
        backend.clock.advance(Duration::from_secs(60));
        database.announce("2", "host/2", 0).await.unwrap();
        assert_eq!(rows().await, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_whose_clock_goes_wrong_is_not_taken_for_a_live_one() {
    on_both(async |backend| {
        let database = backend.open().await;
        database.announce("1", "host/1", 0).await.unwrap();
        backend.sql("UPDATE instances SET seen_at = seen_at + 30000").await;
        assert_eq!(live(&database).await.len(), 1, "clocks differ a little");
        backend.sql("UPDATE instances SET seen_at = seen_at + 60000").await;
        assert_eq!(live(&database).await, []);
        let following = database.await_instances(Duration::ZERO, |_| false).await.unwrap();
        assert_eq!(names(&following.silent), ["host/1"], "it may well run");
        backend.sql("UPDATE instances SET seen_at = seen_at + 7200000").await;
        database.announce("2", "host/2", 0).await.unwrap();
        assert_eq!(backend.number("SELECT count(*) FROM {}instances").await, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_the_instances_is_told_who_has_followed_and_who_has_not() {
    on_both(async |backend| {
        let database = backend.open().await;
        let waiting = async |within| database.await_instances(within, |instance| instance.changes >= 5).await.unwrap();
        let nobody = waiting(Duration::from_secs(60)).await;
        assert!(nobody.done.is_empty() && nobody.behind.is_empty() && nobody.silent.is_empty());

        database.announce("1", "host/1", 5).await.unwrap();
        database.announce("2", "host/2", 4).await.unwrap();
        let following = waiting(Duration::from_millis(150)).await;
        assert_eq!((names(&following.done), names(&following.behind)), (vec!["host/1"], vec!["host/2"]));

        // It ends as soon as the last has followed, and long before the time is up.
        let (following, ()) = tokio::join!(waiting(Duration::from_secs(60)), async {
            database.announce("2", "host/2", 6).await.unwrap();
        });
        assert_eq!(names(&following.done), ["host/1", "host/2"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_withdraws_or_falls_silent_is_waited_for_no_longer() {
    on_both(async |backend| {
        let database = backend.open().await;
        let waiting = async || database.await_instances(Duration::from_secs(60), |_| false).await.unwrap();
        database.announce("1", "host/1", 0).await.unwrap();
        let (following, ()) = tokio::join!(waiting(), async { database.withdraw("1").await.unwrap() });
        assert!(following.behind.is_empty() && following.silent.is_empty());

        database.announce("2", "host/2", 0).await.unwrap();
        let (following, ()) = tokio::join!(waiting(), async { backend.clock.advance(Duration::from_secs(16)) });
        assert_eq!((names(&following.behind), names(&following.silent)), (vec![], vec!["host/2"]));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_database_it_is_not_known_who_has_followed() {
    let mut server = crate::postgres::Postgres::start();
    let backend = Backend::postgres(&server).await;
    let database = backend.open().await;
    database.announce("1", "host/1", 0).await.unwrap();
    server.stop();
    assert!(database.await_instances(Duration::from_millis(150), |_| true).await.is_err());
    server.start_again();
    let following = database.await_instances(Duration::from_secs(60), |_| true).await.unwrap();
    assert_eq!(names(&following.done), ["host/1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_whose_row_is_gone_makes_everything_changed_once_and_not_for_ever() {
    on_both(async |backend| {
        let database = backend.open().await;
        let before = database.changes().await.unwrap();
        backend.sql(&format!("UPDATE counters SET value = {} WHERE name = 'changes'", before + 5)).await;
        backend.sql("DELETE FROM changes").await;
        let news = database.changes_after(before).await.unwrap();
        assert_eq!((news.up_to, news.is_whole), (before + 5, false));
        let news = database.changes_after(news.up_to).await.unwrap();
        assert_eq!((news.up_to, news.is_whole, news.changes.len()), (before + 5, true, 0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_lives_whatever_its_machines_clock_says_on_postgres() {
    for off in [90_000, -90_000, 7_200_000, -259_200_000] {
        let mut backend = Backend::postgres(crate::postgres::Postgres::shared()).await;
        let database = backend.open().await;
        backend.clock = secretier::clock::Clock::system();
        backend.clock.step(off);
        let beside = backend.open().await;
        database.announce("1", "host/1", 0).await.unwrap();
        beside.announce("2", "off/2", 0).await.unwrap();
        for looks in [&database, &beside] {
            let live: Vec<String> = live(looks).await.into_iter().map(|(name, _)| name).collect();
            assert_eq!(live, ["host/1", "off/2"], "{off}");
        }
        let ahead = backend.clock.ahead_of_database().unwrap();
        assert!((ahead - off).abs() < 30_000, "{off}: {ahead}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_databases_clock_is_read_with_the_changes_and_sqlite_has_none() {
    on_both(async |backend| {
        let database = backend.open().await;
        let is_postgres = database.is_for_many();
        assert_eq!(backend.clock.ahead_of_database().is_some(), is_postgres);
        // As if it had told another time an hour ago.
        if is_postgres {
            let wrong = backend.clock.now().plus(Duration::from_secs(3600));
            backend.clock.follow_database(wrong, backend.clock.running());
            assert!(backend.clock.ahead_of_database().unwrap() < -3_000_000);
        }
        let last = database.changes().await.unwrap();
        database.changes_after(last).await.unwrap();
        let ahead = backend.clock.ahead_of_database();
        assert_eq!(ahead.is_some_and(|ahead| ahead.abs() < 60_000), is_postgres, "{ahead:?}");
    })
    .await;
}
