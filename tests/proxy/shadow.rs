//! After a migration, a sample of lookups is compared with what Infisical still has: it tells
//! what differs, and costs lookups nothing.

use std::time::{Duration, Instant};

use secretier::{
    clock::Timestamp,
    phase::Phase,
    tiers::{
        database::{RunKind, Step, TenantState},
        upstream::standin::{Fault, Route},
    },
};

use crate::{
    app::{Backend, ENV, Instance, Setup, TestApp, eventually, on_both},
    lines::{Lines, logging},
};

const ACME: &str = "/tenants/acme";
const ALL: &str = "[migration]\nshadow_sample = 1\n";
/// Longer than what was read of a folder serves.
const PAST_FOLDER: Duration = Duration::from_secs(11);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// An instance that compares every lookup, with a tenant that was copied and then switched.
async fn switched(backend: Backend, secrets: &[(&str, &str)]) -> TestApp {
    let app = Setup { upstream_timeout: "2s", ..Setup::new(backend, Phase::Hybrid) }.with(ALL).start().await;
    take_over(&app, "acme", secrets).await;
    app.world().mark();
    app
}

/// Copies a tenant, and makes the database its owner as a migration does.
async fn take_over(app: &TestApp, tenant: &str, secrets: &[(&str, &str)]) {
    let stored = app.rows().await;
    app.holds(tenant, secrets);
    assert_eq!(app.refresh(tenant).await.status, 200);
    app.stored(stored + i64::try_from(secrets.len()).unwrap()).await;
    step(app, tenant, Step::Switched).await;
    app.set_phase(tenant, Some(Phase::Database)).await;
}

async fn step(app: &TestApp, tenant: &str, step: Step) -> Timestamp {
    let now = app.instance().clock.now();
    let database = &app.instance().service.resolver.database();
    let lock = database.migration_lock("a test").await.unwrap().unwrap();
    let run = database.begin_run(&lock, RunKind::Run, "{}", "a test", 1).await.unwrap();
    let state = TenantState::new(tenant.parse().unwrap(), &run.id, step, now);
    let state = TenantState { switched_at: Some(now), ..state };
    database.keep_states(&lock, &[state]).await.unwrap();
    database.end_job_lock(lock).await;
    now
}

/// How many lookups were compared with this outcome.
fn outcomes_at(instance: &Instance, outcome: &str) -> u64 {
    let page = instance.service.metrics.render();
    let series = format!("secretier_shadow_reads_total{{outcome=\"{outcome}\"}} ");
    let number =
        page.lines().find_map(|line| line.strip_prefix(&series)).unwrap_or_else(|| panic!("{outcome}:\n{page}"));
    number.parse().unwrap()
}

fn outcomes(app: &TestApp, outcome: &str) -> u64 {
    outcomes_at(app.instance(), outcome)
}

async fn comes_to(app: &TestApp, outcome: &str, times: u64) {
    eventually(async || outcomes(app, outcome) >= times).await;
    assert_eq!(outcomes(app, outcome), times, "{outcome}");
}

/// What the database was told of `acme`: compared and different.
async fn noted(app: &TestApp) -> (i64, i64) {
    let database = &app.instance().service.resolver.database();
    let state = database.migration_state(&"acme".parse().unwrap()).await.unwrap().unwrap();
    assert_eq!(state.shadow_different > 0, state.shadow_different_at.is_some());
    (state.shadow_compared, state.shadow_different)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_both_have_or_lack_is_equal_and_a_folder_is_read_once_for_many_lookups() {
    on_both(async |backend| {
        let mut app = switched(backend, &[("A", "1"), ("B", "2")]).await;
        for tier in ["database", "memory"] {
            let answer = app.get("acme", "A").await;
            assert_eq!((answer.value().as_str(), answer.tier()), ("1", tier));
        }
        assert_eq!(app.get("acme", "B").await.value(), "2");
        assert_eq!(app.get("acme", "NONE").await.status, 404);
        comes_to(&app, "equal", 4).await;
        assert_eq!(app.world().calls_since_mark().total(), 1);
        app.advance(PAST_FOLDER);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        comes_to(&app, "equal", 5).await;
        assert_eq!(app.world().calls_since_mark().total(), 2);

        app.restart().await;
        assert_eq!(noted(&app).await, (5, 0), "what was counted is told at the end");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_added_or_deleted_in_infisical_since_the_switch_differs_and_is_not_served() {
    on_both(async |backend| {
        let mut app = switched(backend, &[("A", "1"), ("B", "2"), ("C", "3")]).await;
        app.world().put(ENV, ACME, "A", "changed");
        app.world().delete(ENV, ACME, "B");
        app.world().put(ENV, ACME, "NEW", "new");
        for _ in 0..2 {
            for (key, value) in [("A", "1"), ("B", "2"), ("C", "3")] {
                assert_eq!(app.get("acme", key).await.value(), value);
            }
            assert_eq!(app.get("acme", "NEW").await.status, 404);
        }
        comes_to(&app, "different", 6).await;
        comes_to(&app, "equal", 2).await;
        eventually(async || noted(&app).await == (8, 6)).await;

        app.world().put(ENV, ACME, "A", "1");
        app.advance(PAST_FOLDER);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        comes_to(&app, "equal", 3).await;
        app.restart().await;
        assert_eq!(noted(&app).await, (9, 6), "added to what was there");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_or_deleted_through_the_proxy_is_ahead_and_no_difference() {
    on_both(async |backend| {
        let mut app = switched(backend, &[("A", "1"), ("B", "2")]).await;
        assert_eq!(app.put("acme", "A", "own").await.status, 200);
        assert_eq!(app.put("acme", "NEW", "own").await.status, 201);
        assert_eq!(app.delete("acme", "B").await.status, 204);
        assert_eq!(app.get("acme", "A").await.value(), "own");
        assert_eq!(app.get("acme", "NEW").await.value(), "own");
        assert_eq!(app.get("acme", "B").await.status, 404);
        comes_to(&app, "ahead", 3).await;
        assert_eq!(outcomes(&app, "different"), 0);
        app.restart().await;
        assert_eq!(noted(&app).await, (3, 0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_overtaken_while_infisical_was_asked_proves_nothing() {
    on_both(async |backend| {
        let app = switched(backend, &[("A", "1"), ("B", "2")]).await;
        app.world().put(ENV, ACME, "A", "changed");
        app.world().put(ENV, ACME, "B", "changed");
        let gate = app.world().gate(Route::List);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        gate.arrived(1).await;
        assert_eq!(app.put("acme", "A", "own").await.status, 200);
        gate.open();
        comes_to(&app, "superseded", 1).await;

        app.advance(PAST_FOLDER);
        let gate = app.world().gate(Route::List);
        assert_eq!(app.get("acme", "B").await.value(), "2");
        gate.arrived(1).await;
        app.set_phase("acme", Some(Phase::Hybrid)).await;
        gate.open();
        comes_to(&app, "superseded", 2).await;
        assert_eq!(outcomes(&app, "different"), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lookups_do_not_wait_for_an_infisical_that_hangs_and_it_is_counted_as_failed() {
    on_both(async |backend| {
        let mut app = switched(backend, &[("A", "1")]).await;
        let gate = app.world().gate(Route::List);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        gate.arrived(1).await;
        for _ in 0..20 {
            assert_eq!(app.get("acme", "A").await.value(), "1");
        }
        assert_eq!(outcomes(&app, "failed"), 0, "all of them were answered while it hung");
        comes_to(&app, "failed", 21).await;
        assert_eq!(app.world().calls_since_mark().list, gate.arrivals() as u64);
        gate.open();

        app.advance(Duration::from_secs(60));
        assert_eq!(app.get("acme", "A").await.value(), "1");
        comes_to(&app, "equal", 1).await;
        app.restart().await;
        assert_eq!(noted(&app).await, (1, 0), "what failed was not compared");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_denied_gone_or_emptied_is_told_as_that_and_served_from_the_database() {
    on_both(async |backend| {
        let app = switched(backend, &[("A", "1")]).await;
        app.world().fault_at(ACME, Fault::Denied);
        for _ in 0..3 {
            assert_eq!(app.get("acme", "A").await.value(), "1");
        }
        comes_to(&app, "denied", 3).await;
        assert_eq!(app.world().calls_since_mark().list, 1, "a denial serves the next ones too");
        app.world().clear_faults();

        app.world().delete(ENV, ACME, "A");
        app.advance(PAST_FOLDER);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        comes_to(&app, "different", 1).await;

        app.world().delete_folder(ENV, ACME);
        app.advance(PAST_FOLDER);
        assert_eq!(app.get("acme", "A").await.value(), "1");
        comes_to(&app, "missing", 1).await;
        assert_eq!((outcomes(&app, "different"), outcomes(&app, "denied")), (1, 3));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_tenants_that_were_switched_lately_cost_calls() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).with(ALL).start().await;
        for tenant in ["worn", "back", "shredded", "own"] {
            take_over(&app, tenant, &[("A", "1")]).await;
            app.advance(if tenant == "worn" { HOUR * 23 } else { HOUR });
        }
        step(&app, "back", Step::RolledBack).await;
        app.set_phase("back", Some(Phase::Hybrid)).await;
        let database = &app.instance().service.resolver.database();
        database.shred(&"shredded".parse().unwrap()).await.unwrap().unwrap();
        // The database owns it, and no migration made it so.
        app.setup.backend.sql("DELETE FROM migration_tenants WHERE subdomain = 'own'").await;
        take_over(&app, "acme", &[("A", "1")]).await;
        assert_eq!(app.refresh("back").await.status, 200);

        app.world().mark();
        for tenant in ["worn", "back", "own"] {
            assert_eq!(app.get(tenant, "A").await.value(), "1");
        }
        assert_eq!(app.get("shredded", "A").await.status, 404);
        // They are compared in the order in which they were given.
        assert_eq!(app.get("acme", "A").await.value(), "1");
        comes_to(&app, "equal", 1).await;
        assert_eq!(app.world().calls_since_mark().total(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_instance_compares_its_own_lookups_and_they_are_summed() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).with(ALL).start().await;
        let beside = app.another().await;
        take_over(&app, "acme", &[("A", "1")]).await;
        assert_eq!(app.get("acme", "A").await.value(), "1");
        comes_to(&app, "equal", 1).await;
        let compared_beside = async || {
            assert_eq!(app.get_from(&beside, "acme", "A").await.value(), "1");
            outcomes_at(&beside, "equal") > 0
        };
        eventually(compared_beside).await;
        eventually(async || noted(&app).await.0 >= 2).await;
        beside.stop().await;
        assert_eq!(noted(&app).await.1, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_the_migrations_share_of_the_budget_comparisons_are_dropped_and_lookups_get_through() {
    const TENANTS: usize = 30;
    on_both(async |backend| {
        let rule = "[[rules]]\ntenants = \"hybrid\"\nphase = \"hybrid\"\n";
        let setup = Setup { requests_per_minute: 40, ..Setup::new(backend, Phase::Database) };
        let app = setup.with(ALL).with(rule).start().await;
        for number in 0..TENANTS {
            let tenant = format!("t{number}");
            app.holds(&tenant, &[("A", "1")]);
            assert_eq!(app.put(&tenant, "A", "1").await.status, 201);
            step(&app, &tenant, Step::Switched).await;
            app.set_phase(&tenant, Some(Phase::Database)).await;
        }
        let began = Instant::now();
        for number in 0..TENANTS {
            assert_eq!(app.get(&format!("t{number}"), "A").await.value(), "1");
        }
        let all = TENANTS as u64;
        eventually(async || outcomes(&app, "equal") + outcomes(&app, "dropped") == all).await;
        assert!(outcomes(&app, "equal") > 0 && outcomes(&app, "dropped") > 0);
        let minutes = began.elapsed().as_secs() / 60 + 1;
        assert!(app.world().calls().total() <= 20 * minutes, "{:?} in {minutes} minutes", app.world().calls());
        app.holds("hybrid", &[("A", "h")]);
        let answer = app.get("hybrid", "A").await;
        assert_eq!((answer.value().as_str(), answer.tier()), ("h", "infisical"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_does_not_take_is_told_to_it_later() {
    on_both(async |backend| {
        let mut app = switched(backend, &[("A", "1")]).await;
        app.setup.backend.sql("ALTER TABLE migration_tenants RENAME COLUMN shadow_compared TO elsewhere").await;
        assert_eq!(app.get("acme", "A").await.value(), "1");
        comes_to(&app, "equal", 1).await;
        let refused = "secretier_database_calls_total{call=\"add_compared\",outcome=\"broken\"}";
        eventually(async || app.metrics().await.contains(refused)).await;
        app.setup.backend.sql("ALTER TABLE migration_tenants RENAME COLUMN elsewhere TO shadow_compared").await;
        app.restart().await;
        assert_eq!(noted(&app).await, (1, 0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_counted_since_one_switch_is_not_added_to_a_later_one() {
    on_both(async |backend| {
        let mut app = switched(backend, &[("A", "1")]).await;
        app.world().put(ENV, ACME, "A", "changed");
        assert_eq!(app.get("acme", "A").await.value(), "1");
        comes_to(&app, "different", 1).await;
        app.advance(HOUR);
        step(&app, "acme", Step::Switched).await;
        app.restart().await;
        assert_eq!(noted(&app).await, (0, 0));
    })
    .await;
}

#[test]
fn a_difference_is_told_in_the_log_by_its_name_and_nowhere_by_a_value() {
    let lines = Lines::default();
    logging(
        &lines,
        on_both(async |backend| {
            let values = ["given-f00d", "changed-f00d"];
            let app = switched(backend, &[("DB_URL", values[0])]).await;
            app.world().put(ENV, ACME, "DB_URL", values[1]);
            for _ in 0..3 {
                assert_eq!(app.get("acme", "DB_URL").await.value(), values[0]);
            }
            comes_to(&app, "different", 3).await;
            eventually(async || noted(&app).await == (3, 3)).await;

            let page = app.metrics().await;
            assert!(!page.contains("f00d") && !page.contains("acme"), "{page}");
            let text =
                "SELECT count(*) FROM {}migration_tenants WHERE concat(run_id, digest, reason, error) LIKE '%f00d%'";
            assert_eq!(app.setup.backend.number(text).await, 0);
        }),
    );
    let lines = lines.text();
    let told: Vec<&str> = lines.lines().filter(|line| line.contains("answered otherwise")).collect();
    assert!(told.len() >= 2 && told[0].contains("WARN"), "on each database: {lines}");
    assert!(told.iter().all(|line| line.contains("tenant=acme") && line.contains("key=DB_URL")), "{told:?}");
    assert!(!lines.contains("f00d"), "{lines}");
}
