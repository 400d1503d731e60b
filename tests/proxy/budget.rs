//! The budget of calls upstream, over the ends and beginnings of instances.

use std::time::{Duration, Instant};

use secretier::{clock::Clock, phase::Phase, tiers::upstream::standin::Route};

use crate::app::{Setup, TestApp, on_both};

/// With the timeout, the window in which so many calls arrive at most.
const WINDOW: Duration = Duration::from_secs(61);
const PER_MINUTE: u32 = 40;

async fn limited(backend: crate::app::Backend) -> TestApp {
    let setup =
        Setup { requests_per_minute: PER_MINUTE, upstream_timeout: "1s", ..Setup::new(backend, Phase::Infisical) };
    let app = setup.start().await;
    for tenant in 0..50 {
        app.holds(&format!("t{tenant}"), &[("A", "1")]);
    }
    app
}

/// Asks for tenants, each of which takes a call, until there is none left.
async fn spend(app: &TestApp) -> usize {
    for tenant in 0..50 {
        if app.get(&format!("t{tenant}"), "A").await.status != 200 {
            return tenant;
        }
    }
    50
}

#[tokio::test(flavor = "multi_thread")]
async fn however_often_an_instance_is_killed_and_started_the_calls_are_those_of_one() {
    on_both(async |backend| {
        let mut app = limited(backend).await;
        let began = Instant::now();
        for _ in 0..6 {
            spend(&app).await;
            app = app.kill_and_start_again().await;
        }
        spend(&app).await;
        // A quarter at once, and the rest evenly over the window, whatever time this has taken.
        let come_back = began.elapsed().as_secs_f64() * f64::from(PER_MINUTE - PER_MINUTE / 4) / WINDOW.as_secs_f64();
        let most = u64::from(PER_MINUTE / 4) + come_back.ceil() as u64;
        let calls = app.world().calls().total();
        assert!(calls <= most, "{calls} calls by seven instances in {:?}, and one may make {most}", began.elapsed());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_started_in_anothers_place_uses_what_that_has_left() {
    on_both(async |backend| {
        let mut app = limited(backend).await;
        // Login, list of folders, folder.
        assert_eq!(app.get("t0", "A").await.status, 200);
        app.restart().await;
        let spent = app.world().calls().total();
        assert!(spend(&app).await > 0, "not all of the budget is gone for three calls");
        assert!(app.world().calls().total() > spent);
        spend(&app).await;
        // All has come back by then.
        app.advance(WINDOW);
        app.restart().await;
        let reads = app.world().calls().to(Route::List);
        spend(&app).await;
        let reads = app.world().calls().to(Route::List) - reads;
        assert!(reads >= 8, "{reads} folders, of ten calls");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_takes_no_writes_keeps_nobody_from_a_call_upstream() {
    on_both(async |backend| {
        let app = limited(backend).await;
        app.setup.backend.sql("DROP TABLE counters").await;
        assert!(spend(&app).await >= 7, "of ten calls, and a login and a list");
        let left = app.ready().await.json();
        assert!(left.to_string().contains("infisical"), "{left}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_was_set_back_between_two_instances_leaves_no_more_than_there_was() {
    on_both(async |backend| {
        let mut app = limited(backend).await;
        spend(&app).await;
        app.kill().await;
        // What was written down seems to be a matter of tomorrow.
        app.setup.backend.sql("UPDATE counters SET value = value + 86400000 WHERE name LIKE 'upstream_budget%'").await;
        app.try_start(Clock::system()).await.unwrap();
        assert_eq!(spend(&app).await, 0);
        app.advance(WINDOW);
        assert!(spend(&app).await >= 7, "it is one minute's budget all the same");
    })
    .await;
}
