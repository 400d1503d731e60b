//! The register of running instances.

use std::time::Duration;

use secretier::tiers::database::{Change, Database};

use crate::backend::{Backend, on_both};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

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
        database.announce("1", "host/1", 7, DAY).await.unwrap();
        backend.ring = std::sync::Arc::default();
        let keyless = backend.open().await;
        keyless.announce("2", "host/2", 8, DAY).await.unwrap();
        let instances = keyless.live_instances().await.unwrap();
        assert_eq!(instances.len(), 2);
        assert_eq!((instances[0].id.as_str(), instances[0].name.as_str(), instances[0].changes), ("1", "host/1", 7));
        assert_eq!(instances[0].master_keys, database.keys().ring().ids().collect::<Vec<_>>());
        assert_eq!((instances[0].master_keys.len(), instances[1].master_keys.len()), (1, 0));
        assert!(backend.clock.now().since(instances[0].seen_at) < Duration::from_secs(15));
        assert_eq!(instances[0].max_detached, Some(DAY));

        database.announce("1", "host/1", 9, DAY).await.unwrap();
        assert_eq!(live(&database).await, [("host/1".to_owned(), 9), ("host/2".to_owned(), 8)]);
        database.withdraw("1").await.unwrap();
        database.withdraw("unheard of").await.unwrap();
        assert_eq!(live(&database).await, [("host/2".to_owned(), 8)]);
    })
    .await;
}

/// Lets time pass since an instance was last heard of: the database's clock cannot be moved.
async fn unheard_of_for(backend: &Backend, id: &str, time: Duration) {
    backend.sql(&format!("UPDATE instances SET seen_at = seen_at - {} WHERE id = '{id}'", time.as_millis())).await;
}

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_live_for_fifteen_seconds_after_it_was_heard_of() {
    on_both(async |backend| {
        let database = backend.open().await;
        database.announce("1", "host/1", 0, DAY).await.unwrap();
        unheard_of_for(&backend, "1", SECOND * 10).await;
        assert_eq!(live(&database).await.len(), 1);
        unheard_of_for(&backend, "1", SECOND * 6).await;
        assert_eq!(live(&database).await, []);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_row_of_a_silent_instance_stays_as_long_as_it_may_answer_and_an_hour_at_least() {
    on_both(async |backend| {
        let database = backend.open().await;
        let rows = async || {
            database.announce("other", "host/9", 0, DAY).await.unwrap();
            backend.number("SELECT count(*) - 1 FROM {}instances").await
        };
        for (max_detached, kept_for) in [(SECOND * 10, HOUR), (DAY, DAY + DAY / 1000 + SECOND * 2)] {
            database.announce("1", "host/1", 0, max_detached).await.unwrap();
            unheard_of_for(&backend, "1", kept_for - SECOND * 20).await;
            assert_eq!(rows().await, 1, "{max_detached:?}");
            unheard_of_for(&backend, "1", SECOND * 21).await;
            assert_eq!(rows().await, 0, "{max_detached:?}");
        }
        // A version that does not tell may have any bound.
        database.announce("1", "host/1", 0, DAY).await.unwrap();
        backend.sql("UPDATE instances SET max_detached = NULL WHERE id = '1'").await;
        unheard_of_for(&backend, "1", DAY * 6).await;
        assert_eq!(rows().await, 1);
        unheard_of_for(&backend, "1", DAY * 2).await;
        assert_eq!(rows().await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_whose_clock_is_wrong_is_live_and_waited_for_like_any_other() {
    let mut backend = Backend::postgres(crate::postgres::Postgres::shared()).await;
    let looking = backend.open().await;
    for wrong in [-90_000, 90_000, -20_000] {
        backend.clock = secretier::clock::Clock::system();
        backend.clock.step(wrong);
        backend.open().await.announce("1", "host/1", 0, DAY).await.unwrap();
        assert_eq!(live(&looking).await.len(), 1, "{wrong}");
        let following = looking.await_instances(Duration::ZERO, |_| false).await.unwrap();
        assert_eq!(names(&following.behind), ["host/1"], "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_neighbour_notes_its_own_time_and_is_live_for_as_long_as_clocks_may_differ() {
    on_both(async |backend| {
        let database = backend.open().await;
        database.announce("1", "host/1", 0, DAY).await.unwrap();
        backend.sql("UPDATE instances SET max_detached = NULL").await;
        let now = database.instances().await.unwrap().0.as_millis();
        for (seconds, is_live) in [(-20, true), (-90, true), (90, true), (-700, false)] {
            backend.sql(&format!("UPDATE instances SET seen_at = {}", now + seconds * 1000)).await;
            assert_eq!(live(&database).await.len(), usize::from(is_live), "{seconds}");
        }
        let following = database.await_all_instances(Duration::ZERO, |_| false, |_| {}).await.unwrap();
        let [unfollowed] = &following.unfollowed()[..] else { panic!("one instance is registered") };
        assert_eq!((unfollowed.is_live, unfollowed.instance.may_answer_until()), (false, None), "nobody can tell");
        // A time as far ahead would otherwise stay until it has come.
        backend.sql("UPDATE instances SET seen_at = seen_at + 7200000").await;
        database.announce("2", "host/2", 0, DAY).await.unwrap();
        assert_eq!(backend.number("SELECT count(*) FROM {}instances").await, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_instance_is_waited_for_until_it_cannot_answer_any_more() {
    on_both(async |backend| {
        let database = backend.open().await;
        database.announce("1", "host/1", 0, SECOND * 30).await.unwrap();
        unheard_of_for(&backend, "1", SECOND * 20).await;
        let mut told = Vec::new();
        let waiting = async |within| database.await_all_instances(within, |_| false, |_| {}).await.unwrap();
        let following = waiting(Duration::from_millis(150)).await;
        assert_eq!((names(&following.behind), names(&following.silent)), (vec![], vec!["host/1"]));
        let until = following.silent[0].may_answer_until().unwrap();
        assert_eq!(until.since(following.silent[0].seen_at), SECOND * 32 + Duration::from_millis(30));

        let telling = database.await_all_instances(SECOND * 60, |_| false, |names| told.push(names));
        let (following, ()) = tokio::join!(telling, async {
            tokio::time::sleep(Duration::from_millis(1200)).await;
            unheard_of_for(&backend, "1", SECOND * 13).await;
        });
        assert!(following.unwrap().is_complete());
        assert_eq!(told, [["host/1"]], "whoever waits sees for whom");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_an_instance_that_is_not_heard_of_can_be_forgotten() {
    on_both(async |backend| {
        let database = backend.open().await;
        database.announce("1", "host/1", 0, DAY).await.unwrap();
        assert_eq!(database.forget_instance("host/1").await.unwrap(), 0);
        unheard_of_for(&backend, "1", SECOND * 16).await;
        assert_eq!(database.forget_instance("host/2").await.unwrap(), 0);
        assert_eq!(database.forget_instance("host/1").await.unwrap(), 1);
        assert_eq!(database.instances().await.unwrap().1, []);
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

        database.announce("1", "host/1", 5, DAY).await.unwrap();
        database.announce("2", "host/2", 4, DAY).await.unwrap();
        let following = waiting(Duration::from_millis(150)).await;
        assert_eq!((names(&following.done), names(&following.behind)), (vec!["host/1"], vec!["host/2"]));

        // It ends as soon as the last has followed, and long before the time is up.
        let (following, ()) = tokio::join!(waiting(Duration::from_secs(60)), async {
            database.announce("2", "host/2", 6, DAY).await.unwrap();
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
        database.announce("1", "host/1", 0, DAY).await.unwrap();
        let (following, ()) = tokio::join!(waiting(), async { database.withdraw("1").await.unwrap() });
        assert!(following.behind.is_empty() && following.silent.is_empty());

        database.announce("2", "host/2", 0, DAY).await.unwrap();
        let (following, ()) = tokio::join!(waiting(), unheard_of_for(&backend, "2", SECOND * 16));
        assert_eq!((names(&following.behind), names(&following.silent)), (vec![], vec!["host/2"]));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_database_it_is_not_known_who_has_followed() {
    let mut server = crate::postgres::Postgres::start();
    let backend = Backend::postgres(&server).await;
    let database = backend.open().await;
    database.announce("1", "host/1", 0, DAY).await.unwrap();
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
async fn the_last_change_of_a_kind_is_known_and_one_that_is_not_kept_lies_before_all_that_are() {
    on_both(async |backend| {
        let database = backend.open().await;
        let raise = async |number: i64, what: &str| {
            let insert = format!("INSERT INTO changes (number, what, made_by) VALUES ({number}, '{what}', '')");
            backend.sql(&format!("UPDATE counters SET value = {number} WHERE name = 'changes'; {insert}")).await;
        };
        backend.sql("DELETE FROM changes").await;
        assert_eq!(database.last_change(&Change::Tokens).await.unwrap(), 0);
        raise(101, "tenants").await;
        raise(102, "tokens").await;
        raise(103, "tenants").await;
        assert_eq!(database.last_change(&Change::Tokens).await.unwrap(), 102);
        assert_eq!(database.last_change(&Change::Tenants).await.unwrap(), 103);
        assert_eq!(database.last_change(&Change::MasterKeys).await.unwrap(), 101);
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
        database.announce("1", "host/1", 0, DAY).await.unwrap();
        beside.announce("2", "off/2", 0, DAY).await.unwrap();
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
