//! Several instances on one database: what is changed through one is what the others serve.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use reqwest::Method;
use secretier::{
    access::Action,
    phase::Phase,
    resolver::Condition,
    secret::{SecretKey, SecretValue, Writer},
    tenant::Tenant,
    tiers::{
        database::{Change, Told},
        memory::Recall,
    },
};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{
    app::{Answer, Backend, ENV, Instance, Setup, TestApp, eventually, on_both, secret},
    postgres::Postgres,
    relay::Relay,
    within::HANGS,
};

const PHASES: [Phase; 3] = [Phase::Infisical, Phase::Hybrid, Phase::Database];

/// A lookup that goes on by itself.
fn reading(app: &TestApp, instance: &Instance, key: &str) -> JoinHandle<Answer> {
    tokio::spawn(Answer::of(instance.request(Method::GET, &secret("acme", key)).bearer_auth(&app.token)))
}

/// Something that takes a value away from those who ask, done through one instance.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Act {
    Write,
    Delete,
    Rollback,
    Shred,
    Switch,
}

impl Act {
    /// Does it where `acme` has had the values `older` and `old` for `K`, and nothing before
    /// in phase `database` but those two versions.
    async fn through(self, app: &TestApp) {
        let database = &app.instance().service.resolver.database();
        match self {
            Self::Write => assert_eq!(app.put("acme", "K", "new").await.status, 200),
            Self::Delete => assert_eq!(app.delete("acme", "K").await.status, 204),
            Self::Rollback => {
                let path = format!("{}/rollback", secret("acme", "K"));
                let answer = Answer::of(app.request(Method::POST, &path).json(&json!({ "version": 1 }))).await;
                assert_eq!(answer.status, 200, "{answer:?}");
            }
            Self::Shred => assert!(database.shred(&"acme".parse().unwrap()).await.unwrap().is_some()),
            // Upstream has another value for it.
            Self::Switch => {
                app.holds("acme", &[("K", "upstream")]);
                app.hand_over("acme", app.look("acme").await, Some(Phase::Infisical)).await.unwrap();
            }
        }
    }

    /// What is to be answered from then on.
    fn check(self, answer: &Answer) {
        match self {
            Self::Write => assert_eq!(answer.value(), "new"),
            Self::Rollback => assert_eq!(answer.value(), "older"),
            Self::Switch => assert_eq!(answer.value(), "upstream"),
            Self::Delete | Self::Shred => assert_eq!(answer.problem(), (404, "secret_not_found".to_owned())),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_through_one_instance_is_what_the_others_serve_once_they_have_followed() {
    for phase in PHASES {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            let beside = [app.another().await, app.another().await];
            assert_eq!(app.put("acme", "K", "v1").await.status, 201);
            assert_eq!(app.put("acme", "OTHER", "o").await.status, 201);
            app.followed().await;
            for instance in &beside {
                assert_eq!(app.get_from(instance, "acme", "K").await.value(), "v1");
                assert_eq!(app.get_from(instance, "acme", "OTHER").await.value(), "o");
                assert_eq!(app.get_from(instance, "acme", "K").await.tier(), "memory");
            }
            for value in ["v2", "v3"] {
                assert_eq!(app.put("acme", "K", value).await.status, 200);
                app.followed().await;
                for instance in &beside {
                    assert_eq!(app.get_from(instance, "acme", "K").await.value(), value);
                    let other = app.get_from(instance, "acme", "OTHER").await;
                    assert_eq!((other.value().as_str(), other.tier()), ("o", "memory"), "that has not changed");
                }
            }
            assert_eq!(app.delete("acme", "K").await.status, 204);
            app.followed().await;
            for instance in &beside {
                assert_eq!(app.get_from(instance, "acme", "K").await.status, 404);
            }
            // An absence is no better than a value.
            assert_eq!(app.put("acme", "K", "again").await.status, 201);
            app.followed().await;
            for instance in &beside {
                assert_eq!(app.get_from(instance, "acme", "K").await.value(), "again");
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_is_made_through_one_instance_exists_for_the_others_once_they_have_followed() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            let beside = app.another().await;
            app.holds("globex", &[("K", "v")]);
            // By then it knows which folders there are.
            assert_eq!(app.get_from(&beside, "acme", "K").await.status, 404);
            assert_eq!(app.get_from(&beside, "globex", "K").await.value(), "v");
            assert_eq!(app.put("acme", "K", "v").await.status, 201);
            app.followed().await;
            assert_eq!(app.get_from(&beside, "acme", "K").await.value(), "v");
            app.world().mark();
            assert_eq!(app.get_from(&beside, "made-up", "K").await.status, 404);
            assert_eq!(app.world().calls_since_mark().folders, 0, "of that one nothing was told");
        })
        .await;
    }
}

/// The instance that made it has not read it back, and the other has not followed yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_nobody_has_read_yet_is_not_stored_as_absent_by_an_older_list() {
    let backend = Backend::sqlite();
    let app = Setup::new(backend.clone(), Phase::Hybrid).start().await;
    let mut setup = Setup::new(backend, Phase::Hybrid);
    setup.database = "poll_interval = \"1m\"".to_owned();
    let beside = app.another_as(&setup).await;
    assert_eq!(app.get_from(&beside, "acme", "K").await.status, 404);
    let (acme, key): (Tenant, SecretKey) = ("acme".parse().unwrap(), "K".parse().unwrap());
    let database = &app.instance().service.resolver.database();
    let (_, write) = database.begin_upstream_write(&acme, Duration::from_secs(60)).await.unwrap();
    app.holds("acme", &[("K", "v")]);
    assert!(database.end_upstream_write(&write, Told::Copied(&key, &Writer::new("w"))).await.unwrap());
    assert_eq!(app.get_from(&beside, "acme", "OTHER").await.status, 404);
    assert_eq!(app.get("acme", "K").await.value(), "v");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_instance_has_read_upstream_replaces_what_the_others_hold() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        let beside = app.another().await;
        app.holds("acme", &[("CHANGED", "old"), ("DELETED", "d"), ("SAME", "s")]);
        for key in ["CHANGED", "DELETED", "SAME"] {
            assert_eq!(app.get("acme", key).await.status, 200);
            app.stored(3).await;
            assert_eq!(app.get_from(&beside, "acme", key).await.status, 200);
        }
        app.world().put(ENV, "/tenants/acme", "CHANGED", "new");
        app.world().delete(ENV, "/tenants/acme", "DELETED");
        assert_eq!(app.refresh("acme").await.status, 200);
        app.followed().await;
        assert_eq!(app.get_from(&beside, "acme", "CHANGED").await.value(), "new");
        assert_eq!(app.get_from(&beside, "acme", "DELETED").await.status, 404);
        assert_eq!(app.get_from(&beside, "acme", "SAME").await.tier(), "memory");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_that_one_instance_has_met_stops_the_copies_of_the_others() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        let beside = app.another().await;
        app.holds("acme", &[("K", "v")]);
        assert_eq!(app.get("acme", "K").await.value(), "v");
        app.stored(1).await;
        assert_eq!(app.get_from(&beside, "acme", "K").await.value(), "v");
        app.world().set_rights(&app.identity, secretier::tiers::upstream::standin::Rights::NoAccess);
        assert_eq!(app.get_fresh("acme", "K").await.problem(), (503, "upstream_denied".to_owned()));
        app.followed().await;
        let answer = app.get_from(&beside, "acme", "K").await;
        assert_eq!(answer.problem(), (503, "upstream_denied".to_owned()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_elsewhere_that_began_before_a_write_never_lands_after_it() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        for act in [Act::Write, Act::Delete] {
            on_both(async |backend| {
                let app = Setup::new(backend, phase).start().await;
                let beside = app.another().await;
                app.holds("acme", &[("K", "old"), ("B", "b")]);
                let gate = app.world().gate_next_answers(1, secretier::tiers::upstream::standin::Route::List);
                let early = reading(&app, &beside, "K");
                gate.arrived(1).await;

                act.through(&app).await;
                app.followed().await;
                // The old read is still held, and nobody joins it.
                act.check(&app.get_from(&beside, "acme", "K").await);
                assert!(!early.is_finished());
                gate.open();
                let early = early.await.unwrap();
                match phase {
                    // Superseded, it is answered from the copy that has been stored since.
                    Phase::Hybrid => act.check(&early),
                    _ => assert_eq!(early.value(), "old", "it was asked for before the write"),
                }
                act.check(&app.get_from(&beside, "acme", "K").await);
                act.check(&app.get("acme", "K").await);
                // Nor is it what was written back.
                beside.stop().await;
                act.check(&app.get_from(&app.another().await, "acme", "K").await);
            })
            .await;
        }
    }
}

/// The old row has been read by another instance, and is on its way, while the row changes
/// and the other hears of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_read_elsewhere_before_a_change_is_not_served_after_it() {
    for act in [Act::Write, Act::Delete, Act::Rollback, Act::Shred, Act::Switch] {
        let app = Setup::new(Backend::Postgres(Postgres::shared().database().await), Phase::Database).start().await;
        let relay = Relay::to(Postgres::shared().port()).await;
        let beside = app.another_through(&relay).await;
        assert_eq!(app.put("acme", "K", "older").await.status, 201);
        assert_eq!(app.put("acme", "K", "old").await.status, 200);
        app.followed().await;

        let company = app.instance().service.resolver.database().company(&"acme".parse().unwrap()).await.unwrap();
        let held = relay.hold(&company.unwrap().id);
        let early = reading(&app, &beside, "K");
        held.arrived().await;
        act.through(&app).await;
        app.followed().await;
        act.check(&app.get_from(&beside, "acme", "K").await);
        assert!(!early.is_finished());
        held.release();
        let early = early.await.unwrap();
        match act {
            // The row had been read, and its data key was gone.
            Act::Shred => act.check(&early),
            _ => assert_eq!(early.value(), "old", "it was asked for before"),
        }
        act.check(&app.get_from(&beside, "acme", "K").await);
    }
}

/// The same on one instance, where the change itself raises the fence.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_read_before_a_change_is_not_served_after_it() {
    for act in [Act::Write, Act::Delete, Act::Rollback] {
        let server = Postgres::shared();
        let relay = Relay::to(server.port()).await;
        let mut app = Setup::new(Backend::Postgres(server.database().await), Phase::Database).start().await;
        assert_eq!(app.put("acme", "K", "older").await.status, 201);
        assert_eq!(app.put("acme", "K", "old").await.status, 200);
        app.go_through(&relay).await;

        let company = app.instance().service.resolver.database().company(&"acme".parse().unwrap()).await.unwrap();
        let held = relay.hold(&company.unwrap().id);
        let early = reading(&app, app.instance(), "K");
        held.arrived().await;
        act.through(&app).await;
        act.check(&app.get("acme", "K").await);
        assert!(!early.is_finished());
        held.release();
        assert_eq!(early.await.unwrap().value(), "old", "it was asked for before");
        act.check(&app.get("acme", "K").await);
    }
}

/// Whether it was done, or will be in a moment, is not known by who did it: it may have read
/// meanwhile what was before.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_whose_commit_was_not_answered_is_followed_by_who_made_it_too() {
    let server = Postgres::shared();
    let app = Setup::new(Backend::Postgres(server.database().await), Phase::Database).start().await;
    let relay = Relay::to(server.port()).await;
    let beside = app.another_through(&relay).await;
    let database = &beside.service.resolver.database();
    let (acme, key): (Tenant, SecretKey) = ("acme".parse().unwrap(), "K".parse().unwrap());
    let made = Change::Secret(acme.clone(), key.clone());
    let began = Instant::now();
    loop {
        assert!(began.elapsed() < HANGS, "its write is never the one that is cut off");
        let before = database.changes().await.unwrap();
        let held = relay.hold("COMMIT");
        let writing = {
            let (database, acme, key) = (Arc::clone(database), acme.clone(), key.clone());
            tokio::spawn(async move {
                let value = SecretValue::new("v".to_owned());
                database.put(&acme, &key, &value, &Condition::None, &Writer::new("w"), None).await.map(drop)
            })
        };
        held.arrived().await;
        writing.abort();
        let was_cut_off = writing.await.is_err();
        held.release();
        // What was held may have been what the instance does beside it.
        let is_done = app.instance().service.resolver.database().changes().await.unwrap() > before;
        if was_cut_off && is_done {
            assert!(database.changes_after(before).await.unwrap().changes.contains(&made));
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_is_forgotten_while_tokens_are_being_read() {
    let server = Postgres::shared();
    let mut setup = Setup::new(Backend::Postgres(server.database().await), Phase::Database);
    // An answer that does not come is waited for longer than this test lasts.
    setup.database_timeout = "10m";
    let app = setup.start().await;
    let relay = Relay::to(server.port()).await;
    let beside = app.another_through(&relay).await;
    assert_eq!(app.put("acme", "K", "old").await.status, 201);
    app.followed().await;
    assert_eq!(app.get_from(&beside, "acme", "K").await.value(), "old");
    let held = relay.hold("read-slowly");
    app.new_token("read-slowly", &["*"], &[Action::Read]).await;
    held.arrived().await;
    assert_eq!(app.put("acme", "K", "new").await.status, 200);
    eventually(async || app.get_from(&beside, "acme", "K").await.value() == "new").await;
    held.release();
    app.followed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_tells_of_changes_also_after_its_connections_were_killed() {
    let backend = Backend::Postgres(Postgres::shared().database().await);
    let mut setup = Setup::new(backend.clone(), Phase::Database);
    // Nobody would hear of anything by asking.
    setup.database = "poll_interval = \"1m\"".to_owned();
    let app = setup.start().await;
    let beside = app.another().await;
    assert_eq!(app.put("acme", "K", "0").await.status, 201);
    for round in 1..=5 {
        let value = round.to_string();
        assert_eq!(app.put("acme", "K", &value).await.status, 200);
        eventually(async || app.get_from(&beside, "acme", "K").await.value() == value).await;
        backend
            .sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                  WHERE query = 'LISTEN secretier' AND datname = current_database()",
            )
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_away_for_longer_than_changes_are_kept_takes_everything_for_changed() {
    on_both(async |backend| {
        let app = Setup::new(backend.clone(), Phase::Database).start().await;
        let mut setup = Setup::new(backend, Phase::Database);
        setup.database = "poll_interval = \"2s\"".to_owned();
        let beside = app.another_as(&setup).await;
        assert_eq!(app.put("acme", "K", "old").await.status, 201);
        app.followed().await;
        assert_eq!(app.get_from(&beside, "acme", "K").await.value(), "old");
        // The change and what tells of it are one transaction, so it is all done behind the
        // back of those who listen.
        let database = &app.instance().service.resolver.database();
        let number = database.changes().await.unwrap();
        let forgotten = number + 20_000;
        app.setup
            .backend
            .sql(&format!(
                "UPDATE companies SET phase = 'infisical', generation = generation + 1 WHERE subdomain = 'acme';
                 UPDATE counters SET value = {forgotten} WHERE name = 'changes';
                 DELETE FROM changes;
                 INSERT INTO changes (number, what, made_by) VALUES ({forgotten}, 'migration', '')"
            ))
            .await;
        app.holds("acme", &[("K", "upstream")]);
        app.followed().await;
        assert_eq!(app.get_from(&beside, "acme", "K").await.value(), "upstream");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_that_are_asked_for_the_same_at_once_read_each_folder_once() {
    let backend = Backend::Postgres(Postgres::shared().database().await);
    let mut setup = Setup::new(backend, Phase::Hybrid);
    // An instance asks for the lease for a tenth of this, and then reads by itself.
    setup.upstream_timeout = "60s";
    let app = setup.start().await;
    let fleet = [app.another().await, app.another().await, app.another().await];
    let tenants: Vec<String> = (0..4).map(|number| format!("t{number}")).collect();
    for tenant in &tenants {
        app.holds(tenant, &[("A", "a"), ("B", "b")]);
    }
    app.world().mark();
    let asked = fleet.iter().flat_map(|instance| {
        let asks = tenants.iter().flat_map(move |tenant| ["A", "B", "A"].map(|key| (instance, tenant, key)));
        asks.map(|(instance, tenant, key)| {
            let request = instance.request(Method::GET, &secret(tenant, key)).bearer_auth(&app.token);
            async move { (Answer::of(request).await.value(), key.to_lowercase()) }
        })
    });
    for (value, expected) in futures_util::future::join_all(asked).await {
        assert_eq!(value, expected);
    }
    assert_eq!(app.world().calls_since_mark().list, tenants.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_dies_while_it_reads_a_folder_keeps_the_others_waiting_only_for_a_while() {
    let backend = Backend::Postgres(Postgres::shared().database().await);
    let mut setup = Setup::new(backend, Phase::Hybrid);
    setup.upstream_timeout = "4s";
    let app = setup.start().await;
    let beside = app.another().await;
    app.holds("acme", &[("K", "v")]);
    let gate = app.world().gate_next_answers(1, secretier::tiers::upstream::standin::Route::List);
    let lost = reading(&app, &beside, "K");
    gate.arrived(1).await;
    beside.kill().await;
    assert_eq!(app.get("acme", "K").await.value(), "v");
    lost.abort();
    gate.open();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_starts_knows_the_secrets_that_were_asked_for_last() {
    for phase in [Phase::Hybrid, Phase::Database] {
        on_both(async |backend| {
            let app = Setup::new(backend.clone(), phase).start().await;
            let tenants = ["acme", "globex", "unused"];
            let _ = tenants.map(|tenant| app.holds(tenant, &[("A", "a"), ("B", "b")]));
            for tenant in tenants {
                if phase == Phase::Database {
                    assert_eq!(app.put(tenant, "A", "a").await.status, 201);
                    assert_eq!(app.put(tenant, "B", "b").await.status, 201);
                }
                if tenant != "unused" {
                    assert_eq!(app.get(tenant, "A").await.value(), "a");
                }
            }
            app.stored(if phase == Phase::Database { 6 } else { 4 }).await;
            // It is told every minute, and at the end.
            let resolver = &app.instance().service.resolver;
            eventually(async || {
                resolver.tell_uses().await.unwrap();
                resolver.database().last_used(10).await.unwrap().len() == 2
            })
            .await;
            app.world().mark();
            let warm = Setup::new(backend, phase).with("[memory]\nwarm_tenants = 2\n");
            let beside = app.another_as(&warm).await;
            eventually(async || beside.service.resolver.memory().len() == 4).await;
            let mut tiers = HashSet::new();
            for (tenant, key) in [("acme", "A"), ("acme", "B"), ("globex", "A"), ("globex", "B")] {
                let answer = app.get_from(&beside, tenant, key).await;
                assert_eq!(answer.value(), key.to_lowercase());
                tiers.insert(answer.tier().to_owned());
            }
            assert_eq!(tiers, HashSet::from(["memory".to_owned()]));
            assert_eq!(app.world().calls_since_mark().list, 0);
        })
        .await;
    }
}

/// A rule gave the key to the database, and is gone.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_starts_takes_nothing_for_a_copy_that_the_database_has_owned() {
    on_both(async |backend| {
        let rule = "[[rules]]\ntenants = \"acme\"\nkeys = \"A_*\"\nphase = \"database\"\n";
        let app = Setup::new(backend.clone(), Phase::Hybrid).with(rule).start().await;
        app.holds("acme", &[("A_KEY", "upstream"), ("B_KEY", "b")]);
        assert_eq!(app.put("acme", "A_KEY", "owned").await.status, 201);
        assert_eq!(app.get("acme", "B_KEY").await.value(), "b");
        app.stored(2).await;
        let resolver = &app.instance().service.resolver;
        eventually(async || {
            resolver.tell_uses().await.unwrap();
            resolver.database().last_used(10).await.unwrap().len() == 1
        })
        .await;
        let warm = Setup::new(backend, Phase::Hybrid).with("[memory]\nwarm_tenants = 1\n");
        let beside = app.another_as(&warm).await;
        eventually(async || !matches!(beside.service.resolver.memory().recall("acme", "B_KEY"), Recall::Nothing)).await;
        assert_eq!(app.get_from(&beside, "acme", "A_KEY").await.value(), "upstream");
    })
    .await;
}
