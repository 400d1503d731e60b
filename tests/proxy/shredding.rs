//! A tenant is shredded while instances serve it: within the second none has anything of it,
//! and nothing that was under way brings it back.

use std::time::Duration;

use reqwest::Method;
use secretier::{
    phase::Phase,
    tiers::{
        database::Shredded,
        upstream::standin::{Calls, Fault, Route},
    },
};
use tokio::task::JoinHandle;

use crate::app::{Answer, ENV, Instance, Setup, TestApp, eventually, on_both, secret};

const ACME: &str = "/tenants/acme";

/// Shreds `acme`, and waits until every instance has told that it has forgotten it.
async fn shred(app: &TestApp) -> Shredded {
    let database = &app.instance().service.resolver.database();
    let shredded = database.shred(&"acme".parse().unwrap()).await.unwrap().unwrap();
    let following = database.await_instances(Duration::from_secs(60), |one| one.changes >= shredded.change).await;
    assert!(following.unwrap().behind.is_empty());
    shredded
}

fn not_found() -> (u16, String) {
    (404, "secret_not_found".to_owned())
}

/// A lookup past memory that goes on by itself.
fn reading(app: &TestApp, instance: &Instance) -> JoinHandle<Answer> {
    let request = instance.request(Method::GET, &secret("acme", "A")).bearer_auth(&app.token);
    tokio::spawn(Answer::of(request.header("cache-control", "no-cache")))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_instance_stops_serving_a_shredded_tenant_and_goes_on_with_the_others() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let beside = app.another().await;
        for tenant in ["acme", "globex"] {
            assert_eq!(app.put(tenant, "K", tenant).await.status, 201);
            assert_eq!(app.put(tenant, "K", tenant).await.version(), 2);
        }
        app.followed().await;
        for instance in [app.instance(), &beside] {
            assert_eq!(app.get_from(instance, "acme", "K").await.value(), "acme");
            assert_eq!(app.get_from(instance, "acme", "K").await.tier(), "memory");
            assert_eq!(app.get_from(instance, "globex", "K").await.value(), "globex");
        }
        let held = beside.service.resolver.memory().len();
        shred(&app).await;
        assert_eq!(beside.service.resolver.memory().len(), held - 1);
        for instance in [app.instance(), &beside] {
            assert_eq!(app.get_from(instance, "acme", "K").await.problem(), not_found());
            let other = app.get_from(instance, "globex", "K").await;
            assert_eq!((other.value().as_str(), other.tier()), ("globex", "memory"));
        }
        // A write starts it anew, and both know.
        assert_eq!(app.put("acme", "K", "new").await.version(), 1);
        assert_eq!(app.get("acme", "K").await.value(), "new");
        app.advance(Duration::from_secs(31));
        assert_eq!(app.get_from(&beside, "acme", "K").await.value(), "new");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_the_database_owns_does_not_fall_back_to_the_folder_it_once_had() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "upstream")]);
        assert_eq!(app.get("acme", "A").await.value(), "upstream");
        app.stored(1).await;
        app.set_phase("acme", Some(Phase::Database)).await;
        assert_eq!(app.put("acme", "A", "own").await.status, 200);
        assert_eq!(app.get("acme", "A").await.value(), "own");
        app.world().mark();
        shred(&app).await;
        for _ in 0..2 {
            assert_eq!(app.get("acme", "A").await.problem(), not_found());
            assert_eq!(app.get_fresh("acme", "A").await.problem(), not_found());
            app.restart().await;
        }
        assert_eq!(app.world().calls_since_mark(), Calls::default());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hybrid_tenant_comes_back_from_infisical_for_as_long_as_its_folder_is_there() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "upstream")]);
        assert_eq!(app.get("acme", "A").await.value(), "upstream");
        app.stored(1).await;
        shred(&app).await;
        assert_eq!(app.rows().await, 0);
        let again = app.get("acme", "A").await;
        assert_eq!((again.value().as_str(), again.tier(), again.version()), ("upstream", "infisical", 1));
        app.stored(1).await;

        app.world().delete_folder(ENV, ACME);
        shred(&app).await;
        assert_eq!(app.get("acme", "A").await.problem(), not_found());
        assert_eq!(app.rows().await, 0);
    })
    .await;
}

/// What the read that is in the air meets upstream when it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The folder as it was, changed since it was copied.
    Changed,
    /// Word that the folder was as it had been copied.
    Unchanged,
    /// A failure: all it has is the copy that it read from the database before.
    Failure,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_in_the_air_does_not_bring_a_shredded_tenant_back_on_this_instance_or_another() {
    for then in [Then::Changed, Then::Unchanged, Then::Failure] {
        for elsewhere in [false, true] {
            on_both(async |backend| {
                let mut app = Setup::new(backend, Phase::Hybrid).start().await;
                let beside = app.another().await;
                app.holds("acme", &[("A", "old"), ("B", "b")]);
                assert_eq!(app.get("acme", "A").await.value(), "old");
                app.stored(2).await;
                if then == Then::Changed {
                    app.world().put(ENV, ACME, "A", "changed");
                }
                let gate = match then {
                    Then::Changed | Then::Unchanged => app.world().gate_next_answers(1, Route::List),
                    Then::Failure => app.world().gate(Route::List),
                };
                // It has read the copy and the tenant's generation, and waits for upstream.
                let early = reading(&app, if elsewhere { &beside } else { app.instance() });
                gate.arrived(1).await;
                shred(&app).await;
                app.world().delete_folder(ENV, ACME);
                if then == Then::Failure {
                    app.world().fault(Fault::Status(500));
                }
                gate.open();
                // Who asked before may be told of what was before.
                let early = early.await.unwrap();
                match then {
                    Then::Changed => assert_eq!(early.value(), "changed"),
                    Then::Unchanged => assert_eq!(early.status, 404, "the copy was gone, and the folder too"),
                    Then::Failure => assert_eq!(early.value(), "old"),
                }
                app.world().clear_faults();
                app.advance(Duration::from_secs(61));
                for instance in [app.instance(), &beside] {
                    eventually(async || instance.service.resolver.flights() == (0, 0)).await;
                    assert!(instance.service.resolver.memory().is_empty(), "{then:?}, {elsewhere}");
                    assert_eq!(app.get_from(instance, "acme", "A").await.problem(), not_found());
                }
                assert_eq!(app.rows().await, 0, "{then:?}, {elsewhere}");
                app.restart().await;
                assert_eq!(app.get("acme", "A").await.problem(), not_found());
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_after_a_shredding_does_not_join_a_lookup_from_before() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("A", "old")]);
        assert_eq!(app.get("acme", "A").await.value(), "old");
        app.stored(1).await;
        app.world().put(ENV, ACME, "A", "changed");
        let gate = app.world().gate_next_answers(1, Route::List);
        let early = reading(&app, app.instance());
        gate.arrived(1).await;
        shred(&app).await;
        app.world().delete_folder(ENV, ACME);
        assert_eq!(app.get("acme", "A").await.problem(), not_found());
        assert!(!early.is_finished());
        gate.open();
        // Superseded, it is answered from the copy that has been stored since.
        assert_eq!(early.await.unwrap().problem(), not_found());
        assert_eq!(app.get("acme", "A").await.problem(), not_found());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_instance_opens_nothing_of_before_with_a_key_that_it_still_held() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let beside = app.another().await;
        assert_eq!(app.put("acme", "K", "v").await.status, 201);
        for instance in [app.instance(), &beside] {
            assert_eq!(app.get_from(instance, "acme", "K").await.value(), "v");
        }
        app.setup
            .backend
            .sql(
                "CREATE TABLE kept_secrets AS SELECT * FROM company_secrets; \
                 CREATE TABLE kept_companies AS SELECT * FROM companies",
            )
            .await;
        shred(&app).await;
        // All but the data key is put back.
        app.setup
            .backend
            .sql(
                "UPDATE companies SET id = (SELECT id FROM kept_companies); \
                 INSERT INTO company_secrets SELECT * FROM kept_secrets",
            )
            .await;
        for instance in [app.instance(), &beside] {
            assert_eq!(app.get_from(instance, "acme", "K").await.status, 503);
        }
    })
    .await;
}
