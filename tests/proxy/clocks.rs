//! Ages and expiries, whatever the clocks do: a machine that is suspended, one whose wall clock is
//! set, and several whose clocks differ.

use std::time::Duration;

use reqwest::Method;
use secretier::{
    access::{Action, NewToken},
    clock::{Clock, Timestamp},
    phase::Phase,
    tiers::upstream::standin::Route,
};

use crate::app::{Answer, Backend, FORGETFUL, Instance, Setup, TestApp, eventually, on_both, secret};

const HOUR: i64 = 60 * 60 * 1000;
const DAYS: i64 = 3 * 24 * HOUR;

/// What a wall clock is set by.
const STEPS: [i64; 6] = [1000, -1000, HOUR, -HOUR, DAYS, -DAYS];

fn millis(millis: i64) -> Duration {
    Duration::from_millis(millis.unsigned_abs())
}

/// An instance that holds `acme`'s secret `A` in each tier that its phase has.
async fn holding(backend: Backend, phase: Phase) -> TestApp {
    let app = Setup::new(backend, phase).start().await;
    app.holds("acme", &[("A", "1")]);
    assert_eq!(app.get("acme", "A").await.value(), "1");
    if phase == Phase::Hybrid {
        app.stored(1).await;
    }
    app
}

/// A token that lasts for so long by the clock of the instance.
async fn token_for(app: &TestApp, lifetime: Duration) -> String {
    let every = || vec!["*".to_owned()];
    let (actions, lifetime) = (vec![Action::Read], Some(lifetime));
    let new = NewToken { name: "short-lived".to_owned(), tenants: every(), keys: every(), actions, lifetime };
    let (token, row) = new.draw(app.instance().clock.now()).unwrap();
    let service = &app.instance().service;
    service.resolver.database().insert_token(&row).await.unwrap();
    service.access.reload().await.unwrap();
    token.expose().to_owned()
}

async fn get_with(app: &TestApp, token: &str) -> Answer {
    Answer::of(app.instance().request(Method::GET, &secret("acme", "A")).bearer_auth(token)).await
}

/// When a secret was written, as its list says.
async fn updated_at(app: &TestApp, key: &str) -> Timestamp {
    let list = app.ask_tenant("acme", "/secrets").await.json();
    let entry = list["keys"].as_array().unwrap().iter().find(|entry| entry["key"] == key).cloned().unwrap();
    Timestamp::from_rfc3339(entry["updated_at"].as_str().unwrap()).unwrap()
}

/// Whether a time is the wall clock's of a moment ago.
fn is_now(app: &TestApp, at: Timestamp) -> bool {
    app.instance().clock.now().as_millis().abs_diff(at.as_millis()) < 60_000
}

#[tokio::test(flavor = "multi_thread")]
async fn after_three_days_of_suspend_nothing_is_served_that_is_older_than_max_stale() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let mut app = holding(backend, phase).await;
            let token = token_for(&app, Duration::from_hours(24)).await;
            assert_eq!(get_with(&app, &token).await.value(), "1");
            app.infisical.stop().await;
            app.advance(millis(DAYS));
            assert_eq!(app.get("acme", "A").await.problem(), (503, "unavailable".to_owned()));
            assert_eq!(app.ask_tenant("acme", "/secrets?values=true").await.status, 503);
            assert_eq!(get_with(&app, &token).await.problem(), (401, "token_expired".to_owned()));

            app.infisical.restart().await.unwrap();
            app.advance(Duration::from_mins(1));
            let fresh = app.get("acme", "A").await;
            assert!(fresh.value() == "1" && fresh.age() < 60, "{fresh:?}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_was_paused_from_outside_serves_nothing_past_max_stale_either() {
    // PostgreSQL's clock has not gone on, and it would say that its copy is young.
    let postgres = (Phase::Infisical, Backend::postgres().await);
    for (phase, backend) in [(Phase::Infisical, Backend::sqlite()), (Phase::Hybrid, Backend::sqlite()), postgres] {
        let mut app = holding(backend, phase).await;
        let token = token_for(&app, Duration::from_hours(24)).await;
        app.infisical.stop().await;
        // Only the wall clock has gone on.
        app.step(DAYS);
        assert_eq!(app.get("acme", "A").await.problem(), (503, "unavailable".to_owned()));
        assert_eq!(app.ask_tenant("acme", "/secrets?values=true").await.status, 503);
        assert_eq!(get_with(&app, &token).await.problem(), (401, "token_expired".to_owned()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_back_makes_nothing_younger() {
    for step in [-1000, -HOUR, -DAYS] {
        for phase in [Phase::Infisical, Phase::Hybrid] {
            on_both(async |backend| {
                let mut app = holding(backend, phase).await;
                app.infisical.stop().await;
                app.advance(Duration::from_mins(12 * 60));
                app.step(step);
                app.advance(Duration::from_mins(11 * 60 + 50));
                let old = app.get("acme", "A").await;
                assert!(old.value() == "1" && old.age() > 23 * 3600, "{old:?}");
                app.advance(Duration::from_mins(11));
                assert_eq!(app.get("acme", "A").await.problem(), (503, "unavailable".to_owned()));
                assert_eq!(app.ask_tenant("acme", "/secrets?values=true").await.status, 503);
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_memory_holds_is_a_hit_still_after_a_step_that_is_no_age() {
    on_both(async |backend| {
        let app = holding(backend, Phase::Hybrid).await;
        app.world().mark();
        for step in [1000, -1000, -HOUR, -DAYS] {
            app.step(step);
            let held = app.get("acme", "A").await;
            assert!(held.value() == "1" && held.tier() == "memory" && held.age() < 60, "{step}: {held:?}");
            app.step(-step);
        }
        assert_eq!(app.world().calls_since_mark().total(), 0);
        // One that says too much is taken at its word, until it is set right.
        app.step(DAYS);
        assert_ne!(app.get("acme", "A").await.tier(), "memory");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_end_and_notices_are_believed_by_the_wall_clock_as_it_is_now() {
    on_both(async |backend| {
        let app = holding(backend, Phase::Hybrid).await;
        let token = token_for(&app, Duration::from_mins(30)).await;
        assert_eq!(get_with(&app, &token).await.status, 200);
        app.step(HOUR);
        assert_eq!(get_with(&app, &token).await.problem(), (401, "token_expired".to_owned()));
        app.step(-HOUR);
        assert_eq!(get_with(&app, &token).await.status, 200, "the clock was wrong, and the token has not ended");
        app.advance(Duration::from_mins(31));
        assert_eq!(get_with(&app, &token).await.problem(), (401, "token_expired".to_owned()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_recorded_has_the_time_that_the_wall_clock_said() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).with("[audit]\nwindow = \"1s\"\n").start().await;
            app.holds("acme", &[("A", "1")]);
            for (number, step) in STEPS.into_iter().enumerate() {
                app.step(step);
                let key = format!("KEY_{number}");
                assert_eq!(app.put("acme", &key, "v").await.status, 201);
                if phase == Phase::Database {
                    let at = updated_at(&app, &key).await;
                    assert!(is_now(&app, at), "{step}: {}", at.to_rfc3339());
                }
                let sql = format!("SELECT max(at) FROM {{}}audit_records WHERE secret_key = '{key}'");
                let at = Timestamp::from_millis(app.setup.backend.number(&sql).await);
                assert!(is_now(&app, at), "{step}: {}", at.to_rfc3339());
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_access_is_lost_from_the_sums_of_the_audit_by_a_step() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).with("[audit]\nwindow = \"1s\"\n").start().await;
        app.holds("acme", &[("A", "1")]);
        for step in STEPS {
            assert_eq!(app.get("acme", "A").await.value(), "1");
            app.step(step);
            assert_eq!(app.get("acme", "A").await.value(), "1");
            app.step(-step);
        }
        let sum = "SELECT CAST(coalesce(sum(count), 0) AS BIGINT) FROM {}audit_records \
                   WHERE action = 'read' AND secret_key = 'A'";
        eventually(async || app.setup.backend.number(sum).await == 2 * STEPS.len() as i64).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_write_that_is_under_way_is_lost_by_a_step() {
    on_both(async |backend| {
        let app = holding(backend, Phase::Hybrid).await;
        for (number, step) in STEPS.into_iter().enumerate() {
            let value = format!("value-{number}");
            let gate = app.world().gate(Route::Write);
            let (answer, ()) = tokio::join!(app.put_known("acme", "A", &value), async {
                gate.arrived(1).await;
                app.step(step);
                gate.open();
            });
            assert_eq!(answer.status, 200, "{step}: {answer:?}");
            assert_eq!(app.get("acme", "A").await.value(), value, "{step}");
            app.step(-step);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_read_that_is_under_way_is_lost_by_a_step() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            for (number, step) in STEPS.into_iter().enumerate() {
                let tenant = format!("tenant-{number}");
                app.holds(&tenant, &[("A", "1")]);
                // The list of folders knows no tenant that was made after it.
                app.advance(Duration::from_mins(2));
                let gate = app.world().gate(Route::List);
                let get = || app.get(&tenant, "A");
                let (one, other, ()) = tokio::join!(get(), get(), async {
                    gate.arrived(1).await;
                    app.step(step);
                    gate.open();
                });
                assert_eq!((one.value(), other.value()), ("1".to_owned(), "1".to_owned()), "{step}");
                // A step ahead is an age, until it is set right.
                app.step(-step.max(0));
                app.world().mark();
                assert_eq!(app.get(&tenant, "A").await.tier(), "memory", "{step}");
                assert_eq!(app.world().calls_since_mark().total(), 0, "{step}");
                app.step(-step.min(0));
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_behind_at_the_start_and_set_right_later_is_right_at_once() {
    on_both(async |backend| {
        let clock = Clock::system();
        clock.step(-2 * HOUR);
        let app = Setup::new(backend, Phase::Database).start_at(clock).await;
        assert_eq!(app.put("acme", "BEFORE", "v").await.status, 201);
        let token = token_for(&app, Duration::from_hours(1)).await;
        assert_eq!(get_with(&app, &token).await.status, 404);
        app.step(2 * HOUR);
        assert_eq!(get_with(&app, &token).await.problem(), (401, "token_expired".to_owned()));
        assert_eq!(app.put("acme", "AFTER", "v").await.status, 201);
        let at = updated_at(&app, "AFTER").await;
        assert!(Clock::system().now().as_millis().abs_diff(at.as_millis()) < 60_000, "{}", at.to_rfc3339());
        let read = app.get("acme", "AFTER").await;
        assert!(read.value() == "v" && read.age() < 60, "{read:?}");
    })
    .await;
}

/// The ages of a secret as these instances tell them.
async fn ages(app: &TestApp, instances: [&Instance; 2]) -> [u64; 2] {
    let mut ages = [0; 2];
    for (age, instance) in ages.iter_mut().zip(instances) {
        let answer = app.get_from(instance, "acme", "A").await;
        assert_eq!((answer.value().as_str(), answer.tier()), ("1", "database"), "{answer:?}");
        *age = answer.age();
    }
    ages
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_whose_clock_is_off_agrees_with_the_others_about_ages_on_postgres() {
    for off in [90_000, -90_000, 2 * HOUR, -DAYS] {
        let mut app = Setup::new(Backend::postgres().await, Phase::Hybrid).with(FORGETFUL).start().await;
        app.holds("acme", &[("A", "1")]);
        let clock = Clock::system();
        clock.step(off);
        let beside = app.another_at(clock).await;
        // Read by the one whose clock is off, and stored for both.
        assert_eq!(app.get_from(&beside, "acme", "A").await.value(), "1");
        app.stored(1).await;
        for instance in [app.instance(), &beside] {
            instance.clock.advance(Duration::from_mins(10));
        }
        app.world().mark();
        let [ours, theirs] = ages(&app, [app.instance(), &beside]).await;
        assert!(ours.abs_diff(theirs) <= 60 && (600..700).contains(&ours), "{off}: {ours} and {theirs}");
        assert_eq!(app.world().calls_since_mark().total(), 0, "{off}");

        for instance in [app.instance(), &beside] {
            let database = &instance.service.resolver.database();
            // Each announces itself anew, after so much time.
            eventually(async || database.live_instances().await.unwrap().len() == 2).await;
        }
        eventually(async || {
            let page = Answer::of(beside.request(Method::GET, "/metrics").bearer_auth(&app.token)).await.text;
            let told = page.lines().find_map(|line| line.strip_prefix("secretier_clock_ahead_of_database_seconds "));
            told.is_some_and(|told| (told.parse::<f64>().unwrap() - off as f64 / 1000.0).abs() < 30.0)
        })
        .await;

        app.infisical.stop().await;
        for instance in [app.instance(), &beside] {
            instance.clock.advance(Duration::from_hours(24));
        }
        for instance in [app.instance(), &beside] {
            let too_old = app.get_from(instance, "acme", "A").await;
            assert_eq!(too_old.problem(), (503, "unavailable".to_owned()), "{off}");
        }
        beside.stop().await;
    }
}
