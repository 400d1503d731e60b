//! Leases, and the job locks that are made of one and an advisory lock: who has it, who gets it next, and
//! that nobody else writes.
//!
//! A turn that is kept and not renewed is what a process leaves that hangs; one that is
//! dropped, what is left of one that was killed. The clocks are moved, not waited for.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use secretier::{
    clock::{Clock, Timestamp},
    sealing::MasterKey,
    tiers::database::{
        Began, Company, Database, Expected, Holder, Import, JobLock, Lease, Precondition, RotationState, RunKind, Step,
        StoreError, Switch, Taken, TenantState,
    },
};

use crate::{
    backend::{Backend, key, on_both, snapshot, tenant, value, writer},
    postgres::Postgres,
    within::{HANGS, eventually, within},
};

/// Longer than a turn lasts that nobody renews.
const LONG: Duration = Duration::from_secs(16);
/// Not as long as a turn lasts, and long for anything else.
const SHORT: Duration = Duration::from_secs(10);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// A process on the database, with a clock of its own.
struct Process {
    database: Database,
    clock: Clock,
    name: String,
}

impl Process {
    async fn start(backend: &mut Backend, name: &str) -> Self {
        backend.clock = Clock::system();
        Self { database: backend.open().await, clock: backend.clock.clone(), name: name.to_owned() }
    }

    async fn wants(&self) -> Result<JobLock, Holder> {
        self.database.migration_lock(&self.name).await.unwrap()
    }

    async fn gets(&self) -> JobLock {
        self.wants().await.unwrap_or_else(|holder| panic!("{holder:?} has it"))
    }

    /// Gets the turn of a process that was killed, before its lease could have ended: the lock
    /// is free when PostgreSQL has noticed that the session has ended.
    async fn gets_of_killed(&self) -> JobLock {
        let began = Instant::now();
        loop {
            match self.wants().await {
                Ok(lock) => return lock,
                Err(holder) => assert!(began.elapsed() < SHORT, "{holder:?} has it"),
            }
        }
    }

    async fn is_refused(&self) -> Holder {
        self.wants().await.err().expect("somebody has it")
    }

    async fn writes(&self, lock: &JobLock, secrets: i64) -> Result<(), StoreError> {
        self.database.keep_states(lock, &[TenantState { secrets, ..state() }]).await
    }

    /// What was written last.
    async fn finds(&self) -> Option<i64> {
        self.database.migration_state(&tenant("acme")).await.unwrap().map(|state| state.secrets)
    }
}

fn state() -> TenantState {
    TenantState::new(tenant("acme"), "a run", Step::Failed, Timestamp::from_millis(0))
}

/// Ends the sessions that have a lock, as a restart of the server does, and waits until they are gone.
async fn end_sessions(backend: &Backend) {
    let locks = "pg_locks WHERE locktype = 'advisory' \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    backend.sql(&format!("SELECT pg_terminate_backend(pid) FROM {locks}")).await;
    eventually(async || backend.number(&format!("SELECT count(*) FROM {locks}")).await == 0).await;
}

#[track_caller]
fn is_lost<T>(outcome: Result<T, StoreError>) {
    let error = outcome.err().expect("nothing is written");
    assert!(matches!(error, StoreError::LeaseLost), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_held_by_one_and_ends_by_itself() {
    on_both(async |backend| {
        let database = backend.open().await;
        let name = Lease::of_snapshot(&tenant("acme"));
        let first = database.lease(&name, "first/1", HOUR).await.unwrap().unwrap();
        let holder = database.lease(&name, "second/2", HOUR).await.unwrap().unwrap_err();
        assert_eq!(holder.shown, "first/1");
        assert!(holder.until > backend.clock.now());
        backend.clock.advance(HOUR + LONG);
        assert_eq!(database.lease_holder(&name).await.unwrap(), None);
        let second = database.lease(&name, "second/2", HOUR).await.unwrap().unwrap();
        database.end_lease(&first).await.unwrap();
        assert_eq!(
            database.lease_holder(&name).await.unwrap().unwrap().shown,
            "second/2",
            "it was not the first's to end"
        );
        database.end_lease(&second).await.unwrap();
        assert_eq!(database.lease_holder(&name).await.unwrap(), None);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_want_a_turn_at_once_one_gets_it() {
    on_both(async |mut backend| {
        let mut all = Vec::new();
        for number in 0..5 {
            all.push(Process::start(&mut backend, &format!("host/{number}")).await);
        }
        let contest = async || {
            // A busy system may take a while to notice that the one before was killed.
            let began = std::time::Instant::now();
            let (won, lost) = loop {
                let (won, lost): (Vec<_>, Vec<_>) =
                    join_all(all.iter().map(Process::wants)).await.into_iter().partition(Result::is_ok);
                if !won.is_empty() {
                    break (won, lost);
                }
                assert!(began.elapsed() < HANGS, "nobody gets it");
            };
            assert_eq!((won.len(), lost.len()), (1, all.len() - 1));
            let winner = all[0].database.migration_holder().await.unwrap().unwrap();
            for holder in lost.into_iter().filter_map(Result::err) {
                assert_eq!(holder.shown, winner.shown);
            }
            won.into_iter().find_map(Result::ok).unwrap()
        };
        // Nobody had it before.
        let killed = contest().await;
        drop(killed);
        // One was killed that had it.
        let hanging = contest().await;
        for process in &all {
            process.clock.advance(LONG);
        }
        // One hangs that has it.
        let ended = contest().await;
        all[0].database.end_job_lock(ended).await;
        drop(contest().await);
        drop(hanging);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_turn_of_a_process_that_was_killed_is_free_at_once_whatever_its_lease_says() {
    on_both(async |mut backend| {
        let first = Process::start(&mut backend, "first/1").await;
        let second = Process::start(&mut backend, "second/2").await;
        // Its lease lasts for another hour, by the clock of the other.
        first.clock.advance(HOUR);
        let lock = first.gets().await;
        assert_eq!(second.is_refused().await.shown, "first/1");
        drop(lock);
        let lock = second.gets_of_killed().await;
        second.writes(&lock, 1).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_hangs_is_taken_over_when_its_lease_has_ended_and_not_before() {
    on_both(async |mut backend| {
        let first = Process::start(&mut backend, "first/1").await;
        let second = Process::start(&mut backend, "second/2").await;
        let third = Process::start(&mut backend, "third/3").await;
        let hanging = first.gets().await;
        let holder = second.is_refused().await;
        assert_eq!(holder.shown, "first/1");
        let left = holder.until.since(second.clock.now());
        assert!(left <= LONG, "{left:?}");

        second.clock.advance(LONG);
        let lock = second.gets().await;
        second.writes(&lock, 2).await.unwrap();
        is_lost(first.writes(&hanging, 1).await);
        is_lost(first.database.renew_job_lock(&hanging).await);
        is_lost(first.database.renewing(&hanging, std::future::pending::<Result<(), StoreError>>()).await);
        assert_eq!(second.finds().await, Some(2));

        // The lock is the first one's still. Killed now, the second one has left nothing but a
        // lease, which is to end by itself.
        third.clock.advance(LONG);
        assert_eq!(third.is_refused().await.shown, "second/2");
        second.database.renew_job_lock(&lock).await.unwrap();
        drop(lock);
        assert_eq!(third.is_refused().await.shown, "second/2");
        third.clock.advance(LONG);
        let lock = third.gets().await;

        // When the first one has ended, the next renewal brings the lock.
        drop(hanging);
        eventually(async || {
            third.database.renew_job_lock(&lock).await.unwrap();
            backend.number("SELECT count(*) FROM {}leases WHERE name = 'migration' AND locked").await > 0
        })
        .await;
        drop(lock);
        drop(second.gets_of_killed().await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_is_renewed_lasts_and_so_does_one_under_which_is_written() {
    on_both(async |mut backend| {
        let first = Process::start(&mut backend, "first/1").await;
        let second = Process::start(&mut backend, "second/2").await;
        let lock = first.gets().await;
        for round in 0..6 {
            for process in [&first, &second] {
                process.clock.advance(LONG / 2);
            }
            match round % 2 {
                0 => first.database.renew_job_lock(&lock).await.unwrap(),
                _ => first.writes(&lock, round).await.unwrap(),
            }
            assert_eq!(second.is_refused().await.shown, "first/1");
        }
        first.database.end_job_lock(lock).await;
        assert_eq!(first.database.migration_holder().await.unwrap(), None);
        drop(second.gets().await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_clocks_say_only_the_last_one_to_take_a_turn_writes() {
    on_both(async |mut backend| {
        // One that is an hour ahead takes over from one that works.
        let first = Process::start(&mut backend, "first/1").await;
        let ahead = Process::start(&mut backend, "ahead/2").await;
        ahead.clock.advance(HOUR);
        let lock = first.gets().await;
        first.writes(&lock, 1).await.unwrap();
        let taken = ahead.gets().await;
        is_lost(first.writes(&lock, 3).await);
        ahead.writes(&taken, 2).await.unwrap();
        assert_eq!(first.finds().await, Some(2));
        drop(lock);
        // One that is an hour behind waits for it an hour, where it hangs.
        assert_eq!(first.is_refused().await.shown, "ahead/2");
        first.clock.advance(HOUR + LONG);
        let lock = first.gets().await;
        is_lost(ahead.writes(&taken, 3).await);
        first.writes(&lock, 4).await.unwrap();
        assert_eq!(ahead.finds().await, Some(4));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_loses_its_session_stops_at_its_next_write_once_another_has_taken_over() {
    let mut backend = Backend::postgres(Postgres::shared()).await;
    let first = Process::start(&mut backend, "first/1").await;
    let second = Process::start(&mut backend, "second/2").await;
    let lock = first.gets().await;
    first.writes(&lock, 1).await.unwrap();
    end_sessions(&backend).await;
    let taken = second.gets().await;
    is_lost(first.writes(&lock, 3).await);
    is_lost(first.database.renew_job_lock(&lock).await);
    second.writes(&taken, 2).await.unwrap();
    assert_eq!(first.finds().await, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_loses_its_session_and_renews_first_keeps_the_turn_and_has_the_lock_again() {
    let mut backend = Backend::postgres(Postgres::shared()).await;
    let first = Process::start(&mut backend, "first/1").await;
    let second = Process::start(&mut backend, "second/2").await;
    let lock = first.gets().await;
    end_sessions(&backend).await;
    first.database.renew_job_lock(&lock).await.unwrap();
    assert_eq!(second.is_refused().await.shown, "first/1");
    first.writes(&lock, 1).await.unwrap();
    drop(lock);
    drop(second.gets_of_killed().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_while_another_takes_over_is_there_whole_and_nothing_comes_after() {
    on_both(async |mut backend| {
        let first = Process::start(&mut backend, "first/1").await;
        let second = Process::start(&mut backend, "second/2").await;
        second.clock.advance(HOUR);
        let lock = first.gets().await;
        let begun = AtomicBool::new(false);
        let writing = async {
            let mut written = 0;
            loop {
                match first.writes(&lock, written + 1).await {
                    Ok(()) => written += 1,
                    Err(StoreError::LeaseLost) => return written,
                    Err(error) => panic!("{error:?}"),
                }
                begun.store(written >= 3, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        };
        let taking = async {
            let beginning = async {
                while !begun.load(Ordering::Relaxed) {
                    tokio::task::yield_now().await;
                }
            };
            within("the first has written a few times", beginning).await;
            let taken = second.gets().await;
            (second.finds().await, taken)
        };
        let (written, (found, taken)) = tokio::join!(writing, taking);
        assert_eq!(found, Some(written));
        assert_eq!(first.finds().await, Some(written));
        second.database.end_job_lock(taken).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_migration_writes_counts_when_its_turn_was_taken_over() {
    on_both(async |mut backend| {
        let first = Process::start(&mut backend, "first/1").await;
        let second = Process::start(&mut backend, "second/2").await;
        let database = &first.database;
        let lock = first.gets().await;
        let run = database.begin_run(&lock, RunKind::Run, "{}", "first/1", 1).await.unwrap();
        second.clock.advance(LONG);
        let taken = second.gets().await;
        let before = (database.changes().await.unwrap(), database.runs().await.unwrap());

        let (acme, content) = (tenant("acme"), snapshot(&[("KEY", "value")]));
        let stored = |_: usize, company: &Company| {
            TenantState::new(company.tenant.clone(), "a run", Step::Stored, before.1[0].started_at)
        };
        let speaks_for = |_: &_| true;
        let one = Taken {
            tenant: &acme,
            snapshot: &content,
            began: Began { generation: None },
            at: first.clock.now(),
            speaks_for: &speaks_for,
        };
        let import = Import { tenant: &acme, secrets: &content.secrets, owned_in: None, overwrite: false };
        let switch = Switch { expected: Expected::of(None), to: None, state: state() };
        is_lost(database.begin_run(&lock, RunKind::Run, "{}", "first/1", 1).await);
        is_lost(database.resume_run(&lock, &run, "first/1", 2).await);
        is_lost(database.store_snapshots(&lock, &[one], &stored).await);
        is_lost(database.import(&lock, &[import], &writer(), &stored).await);
        is_lost(database.switch(&lock, &[switch]).await);
        is_lost(database.keep_states(&lock, &[state()]).await);
        is_lost(database.deny_under(&lock, &acme, first.clock.now()).await);
        is_lost(database.end_run(&lock, &run).await);

        assert_eq!((database.changes().await.unwrap(), database.runs().await.unwrap()), before);
        assert_eq!(database.companies().await.unwrap(), []);
        assert_eq!(database.migration_states().await.unwrap(), []);
        // The same by whoever has it now.
        second.database.store_snapshots(&taken, &[one], &stored).await.unwrap();
        second.database.end_run(&taken, &run).await.unwrap();
        assert_eq!(database.companies().await.unwrap().len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_rotation_writes_counts_when_its_turn_was_taken_over() {
    on_both(async |mut backend| {
        let first = Process::start(&mut backend, "first/1").await;
        let second = Process::start(&mut backend, "second/2").await;
        let database = &first.database;
        database
            .put(&tenant("acme"), &key("KEY"), &value("value"), &Precondition::None, &writer(), None)
            .await
            .unwrap();
        let lock = database.rotation_lock("first/1").await.unwrap().unwrap();
        let state = RotationState {
            replaces: None,
            key: None,
            data_keys: true,
            started_at: 0,
            spread: false,
            renews_before: None,
            by: "first/1".to_owned(),
        };
        database.keep_rotation(&lock, &state).await.unwrap();
        second.clock.advance(LONG);
        let taken = second.database.rotation_lock("second/2").await.unwrap().unwrap();
        let rows = async || {
            let sealed = "SELECT count(*) FROM {}company_data_keys WHERE version = 1";
            (
                database.changes().await.unwrap(),
                database.wrapped_by().await.unwrap().into_iter().map(|by| (by.id, by.data_keys)).collect::<Vec<_>>(),
                backend.number(sealed).await,
                backend.number("SELECT value FROM {}counters WHERE name = 'rotations'").await,
                database.rotation().await.unwrap(),
            )
        };
        let before = rows().await;
        let master = MasterKey::generate().unwrap();
        let (acme, later) = (tenant("acme"), first.clock.now().plus(HOUR));
        is_lost(database.keep_rotation(&lock, &RotationState { spread: true, ..state.clone() }).await);
        is_lost(database.spread_rotation(&lock, &RotationState { spread: true, ..state.clone() }).await);
        is_lost(database.announce_master_key(&lock).await);
        is_lost(database.rewrap(&lock, &master, None).await);
        is_lost(database.renew_data_key(&lock, &acme, later).await);
        is_lost(database.end_rotation(&lock).await);
        assert_eq!(rows().await, before);

        second.database.renew_data_key(&taken, &acme, later).await.unwrap();
        second.database.end_rotation(&taken).await.unwrap();
        assert_ne!(rows().await, before);
    })
    .await;
}

const DAYS: i64 = 3 * 24 * 60 * 60 * 1000;

#[tokio::test(flavor = "multi_thread")]
async fn no_wall_clock_ends_or_draws_out_a_turn_on_postgres() {
    for step in [1000, -1000, 3_600_000, -3_600_000, DAYS, -DAYS] {
        let mut backend = Backend::postgres(Postgres::shared()).await;
        let first = Process::start(&mut backend, "first/1").await;
        let second = Process::start(&mut backend, "second/2").await;
        // On a machine whose clock was wrong before it asked the database for the first time.
        backend.clock = Clock::system();
        backend.clock.step(step);
        let (database, clock) = (backend.open().await, backend.clock.clone());
        let off = Process { database, clock, name: "off/3".to_owned() };
        let lock = first.gets().await;
        assert_eq!(off.is_refused().await.shown, "first/1", "{step}");
        second.clock.step(step);
        assert_eq!(second.is_refused().await.shown, "first/1", "{step}");
        first.clock.step(step);
        first.database.renew_job_lock(&lock).await.unwrap();
        first.writes(&lock, 1).await.unwrap();
        let left = second.is_refused().await.until.since(second.database.now());
        assert!(left <= LONG, "{step}: {left:?}");

        // It hangs: who wants it waits no longer than without the step.
        off.clock.advance(LONG);
        drop(off.gets().await);
        drop(lock);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_back_keeps_a_lease_for_as_long_as_it_lasts_and_no_longer() {
    on_both(async |backend| {
        let database = backend.open().await;
        for step in [-1000, -3_600_000, -DAYS] {
            let lease = database.lease("work", "first/1", HOUR).await.unwrap().unwrap();
            backend.clock.step(step);
            backend.clock.advance(HOUR - LONG);
            assert!(database.lease_holder("work").await.unwrap().is_some(), "{step}");
            assert!(database.keep_lease(&lease).await.unwrap(), "{step}");
            backend.clock.advance(HOUR + LONG);
            assert_eq!(database.lease_holder("work").await.unwrap(), None, "{step}");
        }
    })
    .await;
}
