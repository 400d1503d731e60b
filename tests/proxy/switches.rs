//! A tenant changes hands while it is written: whatever was acknowledged is at its owner.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use reqwest::{Method, header};
use secretier::{
    phase::Phase,
    secret::{SecretValue, Version},
    tenant::Tenant,
    tiers::{
        database::{Began, Expected, Held, Refusal, StoreOutcome},
        upstream::{
            Snapshot, UpstreamSecret,
            standin::{Fault, Route},
        },
    },
};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{
    app::{Answer, Backend, ENV, Instance, Setup, TestApp, eventually, on_both, secret},
    postgres::Postgres,
    within::within,
};

const ACME: &str = "/tenants/acme";
const UPSTREAM: [Phase; 2] = [Phase::Infisical, Phase::Hybrid];

fn acme() -> Tenant {
    "acme".parse().unwrap()
}

/// Copies what the owner has to the one that is to follow, and hands the tenant over, as a
/// migration does; or tells why that has to be done again.
async fn try_to_move(app: &TestApp, to: Phase) -> Result<(), Refusal> {
    let database = &app.instance().service.resolver.database();
    let company = database.company(&acme()).await.unwrap();
    let expected = Expected::of(company.as_ref());
    if to == Phase::Database {
        let secret = |(name, value): (String, String)| UpstreamSecret {
            key: name.parse().unwrap(),
            value: SecretValue::new(value),
            text: None,
            version: Version::FIRST,
            updated_at: None,
        };
        let at = app.instance().clock.now();
        let secrets = app.world().secrets(ENV, ACME).into_iter().map(secret).collect();
        let (snapshot, began) = (
            Snapshot { secrets, ..Snapshot::default() },
            Began { generation: company.map(|company| company.generation) },
        );
        match database.store_snapshot(&acme(), &snapshot, began, at, &|_| true).await.unwrap() {
            StoreOutcome::Stored { .. } => {}
            StoreOutcome::Superseded => return Err(Refusal::Changed),
        }
    } else {
        for (key, held) in database.find_all(&acme()).await.unwrap().secrets {
            let Held::Present(stored) = held else { panic!("{key}: {held:?}") };
            app.world().put(ENV, ACME, key.as_str(), stored.value.expose());
        }
    }
    app.hand_over("acme", expected, Some(to)).await.map(|_| ())
}

async fn put_through(app: &TestApp, instance: &Instance, key: &str, value: &str) -> Answer {
    let request = instance.request(Method::PUT, &secret("acme", key)).bearer_auth(&app.token);
    Answer::of(request.json(&json!({ "value": value }))).await
}

/// A write that goes on by itself.
fn writing(app: &Arc<TestApp>, deleting: bool) -> JoinHandle<Answer> {
    let app = Arc::clone(app);
    tokio::spawn(
        async move { if deleting { app.delete("acme", "A").await } else { app.put("acme", "A", "new").await } },
    )
}

async fn registered(app: &TestApp) -> i64 {
    app.setup.backend.number("SELECT count(*) FROM {}upstream_writes").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_stays_where_it_is_while_infisical_is_told_of_a_write() {
    for (phase, deleting) in [(UPSTREAM[0], false), (UPSTREAM[1], false), (UPSTREAM[0], true), (UPSTREAM[1], true)] {
        on_both(async |backend| {
            let app = Arc::new(Setup::new(backend, phase).start().await);
            app.holds("acme", &[("A", "old"), ("B", "b")]);
            let early = app.look("acme").await;
            let gate = app.world().gate(Route::Write);
            let write = writing(&app, deleting);
            gate.arrived(1).await;
            let during = app.look("acme").await;
            let refused = try_to_move(&app, Phase::Database).await;
            assert!(matches!(refused, Err(Refusal::WriteUnderWay { .. })), "{refused:?}");
            gate.open();
            assert_eq!(write.await.unwrap().status, if deleting { 204 } else { 200 });
            // What was read of the folder before may be from before the write.
            for expected in [early, during] {
                let refused = app.hand_over("acme", expected, Some(Phase::Database)).await;
                assert_eq!(refused, Err(Refusal::Changed));
            }
            assert_eq!(registered(&app).await, 0);
            try_to_move(&app, Phase::Database).await.unwrap();
            let is_new = async |app: &TestApp| {
                let now = app.get("acme", "A").await;
                if deleting { assert_eq!(now.status, 404) } else { assert_eq!(now.value(), "new") }
            };
            is_new(&app).await;
            let mut app = Arc::into_inner(app).unwrap();
            app.restart().await;
            is_new(&app).await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_the_switch_overtakes_is_done_at_the_new_owner_under_its_condition() {
    for making in [false, true] {
        on_both(async |backend| {
            let mut app = Setup::new(backend, Phase::Hybrid).start().await;
            app.holds("acme", &[("A", "old")]);
            let old = app.get("acme", "A").await.etag().to_owned();
            app.stored(1).await;
            // Nothing in memory tells the validator, and the owner that follows knows it.
            app.restart().await;
            let gate = app.world().gate(Route::List);
            let (key, condition, status) =
                if making { ("B", (header::IF_NONE_MATCH, "*"), 201) } else { ("A", (header::IF_MATCH, &*old), 200) };
            let put = app.request(Method::PUT, &secret("acme", key)).header(condition.0, condition.1);
            let put = tokio::spawn(Answer::of(put.json(&json!({ "value": "new" }))));
            gate.arrived(1).await;
            try_to_move(&app, Phase::Database).await.unwrap();
            gate.open();
            assert_eq!(put.await.unwrap().status, status);
            assert_eq!(app.world().secrets(ENV, ACME), [("A".to_owned(), "old".to_owned())]);
            for _ in 0..2 {
                assert_eq!(app.get("acme", key).await.value(), "new");
                app.restart().await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_waits_for_the_switch_in_the_database_is_done_at_infisical() {
    // On SQLite nobody else can be made to wait from outside.
    let backend = Backend::Postgres(Postgres::shared().database().await);
    let app = Setup::new(backend, Phase::Database).start().await;
    app.holds("acme", &[("A", "old")]);
    try_to_move(&app, Phase::Database).await.unwrap();
    let refused_there = app.request(Method::PUT, &secret("acme", "A")).header(header::IF_NONE_MATCH, "*");
    assert_eq!(Answer::of(refused_there.json(&json!({ "value": "x" }))).await.status, 409);
    // What a change of hands does, slowly.
    let switching = app.setup.backend.sql(
        "BEGIN; \
         UPDATE companies SET phase = 'hybrid', snapshot_at = NULL, generation = generation + 1; \
         SELECT pg_sleep(1); \
         COMMIT",
    );
    let writing = async {
        let sleeping =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
        eventually(async || app.setup.backend.number(sleeping).await == 1).await;
        app.put("acme", "A", "new").await
    };
    let ((), written) = tokio::join!(switching, writing);
    assert_eq!(written.status, 200);
    assert_eq!(app.world().value(ENV, ACME, "A").as_deref(), Some("new"));
    assert_eq!(app.get("acme", "A").await.value(), "new");
    let own = "SELECT count(*) FROM {}company_secrets WHERE source = 'database'";
    assert_eq!(app.setup.backend.number(own).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_writes_reads_it_next_though_the_instance_has_not_heard_of_the_switch() {
    for phase in UPSTREAM {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "old")]);
            for round in 0..3 {
                for (to, value) in [(Phase::Database, format!("own {round}")), (phase, format!("theirs {round}"))] {
                    assert_eq!(app.get("acme", "A").await.status, 200, "memory has something");
                    try_to_move(&app, to).await.unwrap();
                    assert_eq!(app.put("acme", "A", &value).await.status, 200);
                    assert_eq!(app.get("acme", "A").await.value(), value);
                    assert_eq!(app.get_fresh("acme", "A").await.value(), value);
                    let upstream = app.world().value(ENV, ACME, "A").unwrap();
                    assert_eq!(upstream == value, to != Phase::Database, "{upstream}");
                }
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_answer_was_lost_keeps_the_tenant_until_it_surely_has_ended() {
    for phase in UPSTREAM {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "old")]);
            app.world().fault_on(Route::Write, Fault::CutOff);
            assert_eq!(app.put("acme", "A", "new").await.problem(), (503, "unavailable".to_owned()));
            app.world().clear_faults();
            // The folder is read again behind the answer.
            eventually(async || app.instance().service.resolver.flights() == (0, 0)).await;
            let Err(Refusal::WriteUnderWay { until }) = try_to_move(&app, Phase::Database).await else {
                panic!("nobody knows that it has ended");
            };
            let now = app.instance().clock.now();
            // As long as Infisical and the database may take, and what clocks may differ.
            assert!(until > now && until <= now.plus(Duration::from_secs(30 + 30 + 10)));
            app.advance(until.since(now));
            try_to_move(&app, Phase::Database).await.unwrap();
            assert_eq!(app.get("acme", "A").await.value(), "new");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_outlasted_its_time_is_not_acknowledged() {
    for phase in UPSTREAM {
        on_both(async |backend| {
            let app = Arc::new(Setup::new(backend, phase).start().await);
            app.holds("acme", &[("A", "old")]);
            let gate = app.world().gate(Route::Write);
            let write = writing(&app, false);
            gate.arrived(1).await;
            // As if the instance had been stopped for that long.
            app.advance(Duration::from_secs(30 + 30 + 10));
            try_to_move(&app, Phase::Database).await.unwrap();
            gate.open();
            assert_eq!(write.await.unwrap().problem(), (503, "unavailable".to_owned()));
            assert_eq!(app.get("acme", "A").await.value(), "old");
            assert_eq!(app.put("acme", "A", "new").await.status, 200);
            assert_eq!(app.get("acme", "A").await.value(), "new");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_was_refused_or_found_nothing_keeps_the_tenant_no_longer() {
    for phase in UPSTREAM {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("A", "old")]);
            assert_eq!(app.put("acme", "A", " blank").await.status, 400);
            assert_eq!(app.delete("acme", "B").await.status, 404);
            assert_eq!(app.delete("nobody", "A").await.status, 404);
            assert_eq!(registered(&app).await, 0);
            assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}companies").await, 0);
            try_to_move(&app, Phase::Database).await.unwrap();
            assert_eq!(app.get("acme", "A").await.value(), "old");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_cannot_be_registered_or_ended_is_not_acknowledged() {
    for phase in UPSTREAM {
        on_both(async |backend| {
            let app = Arc::new(Setup::new(backend, phase).start().await);
            app.holds("acme", &[("A", "old")]);
            let unavailable = (503, "unavailable".to_owned());
            let rename = async |from: &str, to: &str| {
                app.setup.backend.sql(&format!("ALTER TABLE {from} RENAME TO {to}")).await;
            };
            rename("upstream_writes", "hidden").await;
            for deleting in [false, true] {
                assert_eq!(writing(&app, deleting).await.unwrap().problem(), unavailable);
            }
            assert_eq!(app.world().value(ENV, ACME, "A").as_deref(), Some("old"), "Infisical was not told");
            rename("hidden", "upstream_writes").await;

            let early = app.look("acme").await;
            let gate = app.world().gate(Route::Write);
            let write = writing(&app, false);
            gate.arrived(1).await;
            rename("upstream_writes", "hidden").await;
            gate.open();
            assert_eq!(write.await.unwrap().problem(), unavailable);
            rename("hidden", "upstream_writes").await;
            let refused = app.hand_over("acme", early, Some(Phase::Database)).await;
            assert!(matches!(refused, Err(Refusal::WriteUnderWay { .. })), "{refused:?}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_is_shredded_while_infisical_is_told_of_a_write_has_what_was_written() {
    on_both(async |backend| {
        let app = Arc::new(Setup::new(backend, Phase::Hybrid).start().await);
        app.holds("acme", &[("A", "old")]);
        assert_eq!(app.get("acme", "A").await.value(), "old");
        app.stored(1).await;
        let gate = app.world().gate(Route::Write);
        let write = writing(&app, false);
        gate.arrived(1).await;
        app.instance().service.resolver.database().shred(&acme()).await.unwrap().unwrap();
        gate.open();
        assert_eq!(write.await.unwrap().status, 200);
        assert_eq!(app.get("acme", "A").await.value(), "new");
        assert_eq!(registered(&app).await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_eight_who_write_while_a_tenant_goes_back_and_forth_none_loses_what_was_acknowledged() {
    const WRITERS: usize = 8;
    // An even number of them, so that Infisical is the owner in the end.
    const MOVES: usize = 50;
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[]);
        let beside = app.another().await;
        let (app, beside) = (&app, &beside);
        let mut acknowledged = [0; WRITERS];
        let mut refusals = 0;
        for number in 1..=MOVES {
            let to = [Phase::Infisical, Phase::Database, Phase::Hybrid, Phase::Database][(number + 2) % 4];
            let moving = async {
                while try_to_move(app, to).await.is_err() {
                    refusals += 1;
                    tokio::task::yield_now().await;
                }
            };
            let moving = within("the tenant changes hands", moving);
            let writes = (0..WRITERS).map(|writer| async move {
                let instance = if (writer + number) % 2 == 0 { app.instance() } else { beside };
                let (key, value) = (format!("K{writer}"), number.to_string());
                let answer = put_through(app, instance, &key, &value).await;
                if matches!(answer.status, 200 | 201) {
                    assert_eq!(app.get_from(instance, "acme", &key).await.value(), value);
                    return Some(number);
                }
                assert_eq!(answer.problem(), (503, "unavailable".to_owned()));
                None
            });
            let ((), written) = tokio::join!(moving, join_all(writes));
            for (last, written) in acknowledged.iter_mut().zip(written) {
                *last = written.unwrap_or(*last);
            }
        }
        assert!(refusals > 0, "writes and moves did not meet");
        assert!(acknowledged.iter().all(|last| *last > 0), "{acknowledged:?}");
        assert_eq!(app.look("acme").await.phase.map(Phase::owned_upstream), Some(true));
        for (writer, last) in acknowledged.into_iter().enumerate() {
            let key = format!("K{writer}");
            let held: usize = app.world().value(ENV, ACME, &key).unwrap().parse().unwrap();
            assert!((last..=MOVES).contains(&held), "{key} is {held}, and {last} was acknowledged");
            assert_eq!(app.get_fresh("acme", &key).await.value(), held.to_string());
        }
    })
    .await;
}
