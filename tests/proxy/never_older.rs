//! An instance never answers older than what it has answered, whatever tier comes and goes.

use std::time::Duration;

use reqwest::{Method, header};
use secretier::{
    phase::Phase,
    tiers::upstream::standin::{Readable, Rights, Route},
};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{
    app::{Answer, Backend, ENV, Setup, TestApp, eventually, new_secret, on_both, secret},
    postgres::{self, Postgres},
    relay::Relay,
    within::within,
};

const MINUTE: Duration = Duration::from_secs(60);

/// In which way the database fails.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fails {
    /// It answers nothing.
    Whole,
    /// It can be read and not written: a full disk, a standby.
    ToWrite,
}

const BOTH: [Fails; 2] = [Fails::Whole, Fails::ToWrite];

impl Fails {
    pub(crate) async fn begins(self, backend: &Backend) {
        match (self, backend) {
            (Self::Whole, _) => backend.sql("ALTER TABLE companies RENAME TO away").await,
            (Self::ToWrite, Backend::Sqlite(_)) => {
                for deed in ["INSERT", "UPDATE"] {
                    let sql = format!(
                        "CREATE TRIGGER full_{deed} BEFORE {deed} ON companies \
                         BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
                    );
                    backend.sql(&sql).await;
                }
            }
            (Self::ToWrite, Backend::Postgres(_)) => {
                let sql = "CREATE FUNCTION is_full() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'the disk is full'; END \
                           $$ LANGUAGE plpgsql; \
                           CREATE TRIGGER is_full BEFORE INSERT OR UPDATE ON companies EXECUTE FUNCTION is_full()";
                backend.sql(sql).await;
            }
        }
    }

    pub(crate) async fn ends(self, backend: &Backend) {
        match (self, backend) {
            (Self::Whole, _) => backend.sql("ALTER TABLE away RENAME TO companies").await,
            (Self::ToWrite, Backend::Sqlite(_)) => {
                backend.sql("DROP TRIGGER full_INSERT; DROP TRIGGER full_UPDATE").await;
            }
            (Self::ToWrite, Backend::Postgres(_)) => {
                backend.sql("DROP TRIGGER is_full ON companies; DROP FUNCTION is_full").await;
            }
        }
    }
}

/// What an instance says of `acme`'s secrets `K` and `GONE` in each way in which it can be asked.
async fn asked(app: &TestApp) -> Vec<(Option<String>, Option<String>)> {
    let list = app.ask_tenant("acme", "/secrets?values=true").await;
    let batch = app.request(Method::POST, "/v1/tenants/acme/secrets/batch-get").json(&json!({"keys": ["K", "GONE"]}));
    let batch = Answer::of(batch).await;
    let mut answers = Vec::new();
    for (of_all, name) in [(list, "keys"), (batch, "secrets")] {
        assert_eq!(of_all.status, 200, "{of_all:?}");
        let of_all = of_all.json();
        let value_of = |key: &str| {
            let one = of_all[name].as_array().unwrap().iter().find(|one| one["key"] == key)?;
            Some(one["value"].as_str().unwrap().to_owned())
        };
        answers.push((value_of("K"), value_of("GONE")));
    }
    let one = async |key| {
        let answer = app.get("acme", key).await;
        match answer.status {
            404 => None,
            _ => Some(answer.value()),
        }
    };
    answers.push((one("K").await, one("GONE").await));
    answers
}

/// Waits until the breaker of a database that failed lets calls through again.
async fn database_is_used(app: &TestApp) {
    eventually(async || {
        app.advance(Duration::from_secs(1));
        app.instance().service.resolver.database().ping().await.is_ok()
    })
    .await;
}

/// An instance whose database has missed that `K` was replaced and `GONE` was deleted, both of
/// which it has answered since.
async fn behind(backend: &Backend, fails: Fails) -> TestApp {
    let app = Setup::new(backend.clone(), Phase::Hybrid).start().await;
    app.holds("acme", &[("K", "v1"), ("GONE", "g1")]);
    assert_eq!(app.get("acme", "K").await.value(), "v1");
    app.stored(2).await;
    fails.begins(backend).await;
    app.world().put(ENV, "/tenants/acme", "K", "v2");
    app.world().delete(ENV, "/tenants/acme", "GONE");
    assert_eq!(app.get_fresh("acme", "K").await.value(), "v2", "{fails:?}");
    assert_eq!(app.get_fresh("acme", "GONE").await.status, 404, "{fails:?}");
    app
}

#[tokio::test(flavor = "multi_thread")]
async fn after_an_outage_of_the_database_nothing_that_was_replaced_or_deleted_comes_back() {
    for fails in BOTH {
        on_both(async |backend| {
            let app = behind(&backend, fails).await;
            fails.ends(&backend).await;
            database_is_used(&app).await;
            // Past what memory believes, and before the copy is to be refreshed.
            app.advance(6 * MINUTE);
            for (k, gone) in asked(&app).await {
                assert_eq!((k.as_deref(), gone), (Some("v2"), None), "{fails:?}");
            }
        })
        .await;
    }
}

/// Asks in a task of its own.
fn asking(app: &TestApp, method: Method, below: &str) -> JoinHandle<Answer> {
    tokio::spawn(Answer::of(app.request(method, &format!("/v1/tenants/acme{below}"))))
}

/// The copy from before has been read in the database, and is on its way, while the tenant's
/// folder is written back: there is nothing any more that the copy would be behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_found_before_the_write_back_landed_is_not_served_after_it() {
    let server = Postgres::shared();
    for way in ["/secrets/K", "/secrets?values=true"] {
        let relay = Relay::to(server.port()).await;
        let backend = Backend::Postgres(server.database().await).through(&relay);
        let app = behind(&backend, Fails::ToWrite).await;
        // Nothing else reads the folder, and writes it back, before the copy has been found.
        let gate = app.world().gate_next_answers(1, Route::List);
        let refreshing = asking(&app, Method::POST, "/refresh");
        gate.arrived(1).await;
        Fails::ToWrite.ends(&backend).await;
        app.instance().service.resolver.memory().forget_all();
        let session = postgres::session(&backend.url(), "SET search_path TO secretier").await;
        let row = session.query_one("SELECT id FROM company_secrets WHERE secret_key = 'K'", &[]).await.unwrap();
        let held = relay.hold(row.get("id"));
        let early = asking(&app, Method::GET, way);
        held.arrived().await;
        gate.open();
        assert_eq!(refreshing.await.unwrap().status, 200);
        eventually(async || app.explain("acme", "K").await["database"]["version"] == 2).await;
        assert!(!early.is_finished());
        held.release();
        let early = early.await.unwrap();
        assert!(early.text.contains("v2") && !early.text.contains("v1"), "{way}: {early:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_disk_is_full_answers_do_not_alternate() {
    on_both(async |backend| {
        let app = behind(&backend, Fails::ToWrite).await;
        for _ in 0..4 {
            app.advance(6 * MINUTE);
            for (k, gone) in asked(&app).await {
                assert_eq!((k.as_deref(), gone), (Some("v2"), None));
            }
        }
        let explained = app.explain("acme", "K").await;
        assert_eq!(explained["database"]["state"], "behind", "{explained}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_behind_is_not_served_even_if_nothing_else_answers() {
    for fails in BOTH {
        on_both(async |backend| {
            let mut app = behind(&backend, fails).await;
            fails.ends(&backend).await;
            app.infisical.stop().await;
            database_is_used(&app).await;
            app.advance(6 * MINUTE);
            assert_eq!(app.get("acme", "K").await.value(), "v2", "{fails:?}: memory has it");
            app.instance().service.resolver.memory().forget_all();
            for answer in [app.get("acme", "K").await, app.ask_tenant("acme", "/secrets?values=true").await] {
                assert_eq!(answer.problem(), (503, "unavailable".to_owned()), "{fails:?}");
            }
            assert_eq!(app.get("acme", "GONE").await.status, 503, "{fails:?}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_could_not_be_written_back_is_when_the_database_is_back_without_anybody_asking() {
    for fails in BOTH {
        on_both(async |backend| {
            let mut app = behind(&backend, fails).await;
            fails.ends(&backend).await;
            database_is_used(&app).await;
            eventually(async || {
                app.advance(Duration::from_secs(10));
                app.rows().await == 1
            })
            .await;
            app.restart().await;
            app.infisical.stop().await;
            assert_eq!(app.get("acme", "K").await.value(), "v2", "{fails:?}");
            assert_eq!(app.get("acme", "GONE").await.status, 404, "{fails:?}");
        })
        .await;
    }
}

/// A change is made while the folder is read: what was read is answered, and not kept.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_and_not_kept_takes_along_what_memory_has_from_before() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("K", "v1"), ("OTHER", "o1")]);
        assert_eq!(app.get("acme", "K").await.value(), "v1");
        app.stored(2).await;
        app.world().put(ENV, "/tenants/acme", "K", "v2");
        let gate = app.world().gate_next_answers(1, Route::List);
        let reading = app.get_fresh("acme", "K");
        let changing = async {
            gate.arrived(1).await;
            let changed = ("acme".parse().unwrap(), "OTHER".parse().unwrap());
            app.instance().service.resolver.memory().change(&changed.0, &changed.1);
            gate.open();
        };
        let (read, ()) = tokio::join!(reading, changing);
        assert_eq!(read.value(), "v2");
        assert_eq!(app.get("acme", "K").await.value(), "v2");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_list_has_told_is_not_taken_back_by_memory() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let mut setup = Setup::new(backend, phase);
            // On SQLite, where nobody tells of changes, it hears of none in time.
            setup.database = "poll_interval = \"1m\"".to_owned();
            let app = setup.start().await;
            for (key, value) in [("K", "v1"), ("GONE", "g1")] {
                app.world().folder(ENV, "/tenants/acme");
                assert_eq!(app.put("acme", key, value).await.status, 201);
                assert_eq!(app.get("acme", key).await.value(), value);
            }
            let beside = app.another().await;
            let written = beside.request(Method::PUT, &secret("acme", "K")).bearer_auth(&app.token);
            assert_eq!(Answer::of(written.json(&json!({"value": "v2"}))).await.status, 200);
            let deleted = beside.request(Method::DELETE, &secret("acme", "GONE")).bearer_auth(&app.token);
            assert_eq!(Answer::of(deleted).await.status, 204);
            app.get_from(&beside, "acme", "K").await;
            let list = app.ask_tenant("acme", "/secrets?values=true").await.json();
            for one in list["keys"].as_array().unwrap().iter().filter(|one| one["value"] == "v2") {
                assert_eq!(one["key"], "K");
                assert_eq!(app.get("acme", "K").await.value(), "v2", "{phase}");
            }
            if list["keys"].as_array().unwrap().iter().all(|one| one["key"] != "GONE") {
                assert_eq!(app.get("acme", "GONE").await.status, 404, "{phase}");
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_infisical_did_and_the_database_missed_is_asked_for_at_once() {
    for fails in BOTH {
        on_both(async |backend| {
            let app = Setup::new(backend.clone(), Phase::Hybrid).start().await;
            app.holds("acme", &[("K", "v1"), ("OTHER", "o1")]);
            assert_eq!(app.get("acme", "K").await.value(), "v1");
            app.stored(2).await;
            let gate = app.world().gate_next_answers(1, Route::Write);
            let writing = app.put("acme", "K", "v2");
            let failing = async {
                gate.arrived(1).await;
                fails.begins(&backend).await;
                gate.open();
            };
            let (written, ()) = tokio::join!(writing, failing);
            assert_eq!(written.status, 503, "{fails:?}: {written:?}");
            fails.ends(&backend).await;
            database_is_used(&app).await;
            assert_eq!(app.get("acme", "K").await.value(), "v2", "{fails:?}");
            // Nor do others believe the copy once the database knows.
            let beside = app.another().await;
            eventually(async || {
                app.advance(Duration::from_secs(1));
                app.get_from(&beside, "acme", "K").await.value() == "v2"
            })
            .await;
        })
        .await;
    }
}

/// The instance that wrote was killed before it could tell the database.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_end_nobody_told_is_asked_for_when_its_time_is_over() {
    on_both(async |backend| {
        let app = Setup::new(backend.clone(), Phase::Hybrid).start().await;
        app.holds("acme", &[("K", "v1")]);
        assert_eq!(app.get("acme", "K").await.value(), "v1");
        app.stored(1).await;
        let database = &app.instance().service.resolver.database();
        let begun = database.begin_upstream_write(&"acme".parse().unwrap(), Duration::from_secs(10)).await.unwrap();
        app.world().put(ENV, "/tenants/acme", "K", "v2");
        drop(begun);
        app.advance(MINUTE);
        app.instance().service.resolver.memory().forget_all();
        eventually(async || {
            app.instance().service.resolver.memory().forget_all();
            app.get("acme", "K").await.value() == "v2"
        })
        .await;
    })
    .await;
}

/// An instance that has met a denial of `acme`'s folder while its database was out.
async fn denied_in_an_outage(backend: &Backend) -> TestApp {
    let app = Setup::new(backend.clone(), Phase::Hybrid).start().await;
    for tenant in ["acme", "globex"] {
        app.holds(tenant, &[("K", tenant)]);
    }
    for tenant in ["acme", "globex"] {
        assert_eq!(app.get(tenant, "K").await.value(), tenant);
    }
    app.stored(2).await;
    Fails::Whole.begins(backend).await;
    app.world().set_rights(&app.identity, Rights::Read(vec![Readable::new(ENV, "/tenants/globex")]));
    assert_eq!(app.get_fresh("acme", "K").await.problem(), (503, "upstream_denied".to_owned()));
    app
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_that_the_database_missed_is_recorded_when_it_is_back() {
    on_both(async |backend| {
        let mut app = denied_in_an_outage(&backend).await;
        Fails::Whole.ends(&backend).await;
        eventually(async || {
            app.advance(Duration::from_secs(1));
            backend.number("SELECT count(*) FROM {}companies WHERE denied_at IS NOT NULL").await == 1
        })
        .await;
        app.infisical.stop().await;
        app.restart().await;
        assert_eq!(app.get("acme", "K").await.problem(), (503, "upstream_denied".to_owned()));
        assert_eq!(app.get("globex", "K").await.value(), "globex");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_after_an_unclean_end_asks_infisical_before_it_serves_a_copy() {
    on_both(async |backend| {
        let mut app = denied_in_an_outage(&backend).await;
        app.kill().await;
        Fails::Whole.ends(&backend).await;
        // As that of a process which has ended: the test's own goes on.
        backend.sql("UPDATE instances SET seen_at = 1").await;
        let mut app = app.start_again().await;
        assert_eq!(app.get("acme", "K").await.problem(), (503, "upstream_denied".to_owned()));
        assert_eq!(app.ask_tenant("acme", "/secrets?values=true").await.status, 503);
        assert_eq!(app.get("globex", "K").await.value(), "globex");
        // Where Infisical does not answer, copies are served as ever.
        app.kill().await;
        backend.sql("UPDATE instances SET seen_at = 1").await;
        app.infisical.stop().await;
        let app = app.start_again().await;
        assert_eq!(app.get("globex", "K").await.value(), "globex");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_after_a_clean_end_asks_nobody_for_what_it_has() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("K", "v")]);
        assert_eq!(app.get("acme", "K").await.value(), "v");
        app.stored(1).await;
        app.restart().await;
        app.world().mark();
        let answer = app.get("acme", "K").await;
        assert_eq!((answer.value().as_str(), answer.tier()), ("v", "database"));
        assert_eq!(app.world().calls_since_mark().total(), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_set_back_is_noticed_and_nothing_held_from_before_is_served() {
    on_both(async |backend| {
        let app = Setup::new(backend.clone(), Phase::Database).start().await;
        assert_eq!(app.put("acme", "K", "v1").await.status, 201);
        app.followed().await;
        let instance = app.instance();
        let number = instance.service.resolver.followed();
        assert_eq!(app.get("acme", "K").await.tier(), "database");
        assert_eq!(app.get("acme", "K").await.tier(), "memory");
        // The same numbers were given to other changes: a restored database has gone on.
        backend.sql(&format!("UPDATE changes SET mark = mark / 2 + 1 WHERE number >= {number}")).await;
        assert_eq!(app.put("globex", "K", "v").await.status, 201);
        eventually(async || app.get("acme", "K").await.tier() == "database").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_that_has_fallen_back_is_another_history() {
    on_both(async |backend| {
        let app = Setup::new(backend.clone(), Phase::Database).start().await;
        assert_eq!(app.put("acme", "K", "v1").await.status, 201);
        app.followed().await;
        assert_eq!(app.get("acme", "K").await.tier(), "database");
        assert_eq!(app.get("acme", "K").await.tier(), "memory");
        backend.sql("DELETE FROM changes; UPDATE counters SET value = 0 WHERE name = 'changes'").await;
        eventually(async || app.get("acme", "K").await.tier() == "database").await;
    })
    .await;
}

/// Makes PostgreSQL take long to store what Infisical has.
const SLOW: &str = "CREATE FUNCTION takes_long() RETURNS trigger AS $$ BEGIN PERFORM pg_sleep(1); RETURN NEW; END $$ \
                    LANGUAGE plpgsql; \
                    CREATE TRIGGER takes_long BEFORE INSERT ON company_secrets FOR EACH ROW \
                    WHEN (NEW.source = 'infisical') EXECUTE FUNCTION takes_long()";

#[tokio::test(flavor = "multi_thread")]
async fn an_etag_that_a_write_was_answered_with_holds_though_its_write_back_takes_long() {
    let backend = Backend::postgres().await;
    let app = Setup::new(backend.clone(), Phase::Hybrid).start().await;
    app.holds("acme", &[]);
    backend.sql(SLOW).await;
    let put = async |value: &str, etag: Option<&str>| {
        let mut request = app.request(Method::PUT, &new_secret("acme", "K")).json(&json!({ "value": value }));
        if let Some(etag) = etag {
            request = request.header(header::IF_MATCH, etag);
        }
        Answer::of(request).await
    };
    let mut last = put("v0", None).await;
    assert_eq!(last.status, 201);
    for number in 1..6 {
        let given = last.etag().to_owned();
        if number % 2 == 0 {
            // Also once the database has given it one of its own.
            within("the write-back ends", app.stored(1)).await;
        }
        last = put(&format!("v{number}"), Some(&given)).await;
        assert_eq!(last.status, 200, "{number}: {last:?}");
        let replaced = put("other", Some(&given)).await;
        assert_eq!(replaced.problem(), (409, "version_conflict".to_owned()), "{number}: it is not current any more");
    }
    app.world().put(ENV, "/tenants/acme", "K", "by hand");
    let overtaken = put("late", Some(last.etag())).await;
    assert_eq!(overtaken.problem(), (409, "version_conflict".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etag_that_was_given_while_the_database_was_out_holds_when_it_is_back() {
    on_both(async |backend| {
        let app = behind(&backend, Fails::Whole).await;
        let given = app.get("acme", "K").await.etag().to_owned();
        Fails::Whole.ends(&backend).await;
        database_is_used(&app).await;
        app.instance().service.resolver.memory().forget_all();
        eventually(async || {
            app.advance(Duration::from_secs(10));
            app.rows().await == 1
        })
        .await;
        let request = app.request(Method::PUT, &secret("acme", "K")).header(header::IF_MATCH, &given);
        let written = Answer::of(request.json(&json!({"value": "v3"}))).await;
        assert_eq!(written.status, 200, "{written:?}");
    })
    .await;
}
