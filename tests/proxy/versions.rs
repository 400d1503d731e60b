//! The versions of a secret over HTTP: listed, read, brought back, and stopped where the
//! newest is.

use std::time::Duration;

use diesel::{Connection as _, SqliteConnection, connection::SimpleConnection as _};
use futures_util::future::join_all;
use reqwest::{
    Method,
    header::{self, HeaderName},
};
use secretier::{
    access::Action,
    phase::Phase,
    tiers::upstream::standin::{Readable, Rights},
};
use serde_json::{Value, json};

use crate::app::{Answer, Backend, ENV, FORGETFUL, Instance, Setup, TestApp, eventually, new_secret, on_both, secret};

const ACME: &str = "/tenants/acme";

/// Upstream denies the tenant's folder.
const DENIED: (u16, &str) = (503, "upstream_denied");

/// Every version in these tests is kept.
const KEPT: &str = "versions_kept = 1000\n";

impl TestApp {
    async fn version(&self, key: &str, number: i64) -> Answer {
        self.ask(Method::GET, &format!("{}?version={number}", secret("acme", key))).await
    }

    async fn versions(&self, key: &str) -> Answer {
        self.ask(Method::GET, &format!("{}/versions", secret("acme", key))).await
    }

    async fn roll_back(&self, key: &str, number: i64) -> Answer {
        Answer::of(self.rolling_back(key, number)).await
    }

    fn rolling_back(&self, key: &str, number: i64) -> reqwest::RequestBuilder {
        let path = format!("{}/rollback", secret("acme", key));
        self.request(Method::POST, &path).json(&json!({ "version": number }))
    }

    async fn put_if(&self, key: &str, value: &str, condition: (HeaderName, &str)) -> Answer {
        let request = self.request(Method::PUT, &new_secret("acme", key)).header(condition.0, condition.1);
        Answer::of(request.json(&json!({ "value": value }))).await
    }
}

/// Number, source, writer, whether it is a deletion, whether it is the newest.
type Told = (i64, String, String, bool, bool);

fn told(answer: &Answer) -> Vec<Told> {
    assert_eq!(answer.status, 200, "{answer:?}");
    let body = answer.json();
    assert_eq!(body["tenant"], "acme");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let versions = body["versions"].as_array().unwrap().iter().map(|version| {
        assert!(text(&version["created_at"]).ends_with('Z'), "{version}");
        assert_eq!(version.as_object().unwrap().len(), 6, "never a value: {version}");
        let is = |name: &str| version[name].as_bool().unwrap();
        (
            version["version"].as_i64().unwrap(),
            text(&version["source"]),
            text(&version["by"]),
            is("deleted"),
            is("current"),
        )
    });
    versions.collect()
}

fn version(number: i64, source: &str, by: &str, deleted: bool, current: bool) -> Told {
    (number, source.to_owned(), by.to_owned(), deleted, current)
}

fn not_found() -> (u16, String) {
    (404, "secret_not_found".to_owned())
}

fn conflict() -> (u16, String) {
    (409, "version_conflict".to_owned())
}

fn is_denied(answer: &Answer) {
    let (status, code) = answer.problem();
    assert_eq!((status, code.as_str()), DENIED);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_as_owner_keeps_every_value_and_deletion_and_tells_by_whom() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Database).start().await;
        assert_eq!(app.versions("K").await.problem(), not_found());
        assert_eq!(app.put("acme", "K", "one").await.status, 201);
        let first = app.get("acme", "K").await;
        let other = app.new_token("other", &["acme"], &[Action::Write]).await;
        let by_other = app.instance().request(Method::PUT, &secret("acme", "K")).bearer_auth(&other);
        assert_eq!(Answer::of(by_other.json(&json!({ "value": "two" }))).await.status, 200);
        assert_eq!(app.delete("acme", "K").await.status, 204);

        let all = [
            version(3, "database", "test", true, true),
            version(2, "database", "other", false, false),
            version(1, "database", "test", false, false),
        ];
        let beside = app.another().await;
        for restarted in [false, true] {
            assert_eq!(told(&app.versions("K").await), all);
            assert_eq!(app.get("acme", "K").await.status, 404);
            let older = app.version("K", 1).await;
            assert_eq!((older.value().as_str(), older.version()), ("one", 1));
            assert_eq!((&older.text, older.etag()), (&first.text, first.etag()), "the same answer as when it was new");
            assert!(older.header("cache-status").starts_with("database; hit; ttl="), "{older:?}");
            assert_eq!((older.tier(), older.header("cache-control")), ("database", "no-store"));
            assert!(older.age() < 300);
            assert_eq!(app.version("K", 2).await.value(), "two");
            for gone in [3, 4] {
                let gone = app.version("K", gone).await;
                assert_eq!(gone.problem(), not_found());
                assert!(gone.json()["detail"].as_str().unwrap().contains("/versions"), "{gone:?}");
            }
            let request = beside.request(Method::GET, &format!("{}/versions", secret("acme", "K")));
            assert_eq!(told(&Answer::of(request.bearer_auth(&app.token)).await), all, "another instance sees the same");
            if !restarted {
                app.restart().await;
            }
        }
        let text = app.request(Method::GET, &format!("{}?version=2", secret("acme", "K")));
        assert_eq!(Answer::of(text.header(header::ACCEPT, "text/plain")).await.text, "two");
        let known = app.request(Method::GET, &format!("{}?version=1", secret("acme", "K")));
        assert_eq!(Answer::of(known.header(header::IF_NONE_MATCH, first.etag())).await.status, 304);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_is_written_to_the_owner_as_a_new_version() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let mut app = Setup::new(backend, phase).start().await;
            for value in ["one", "two"] {
                app.put("acme", "K", value).await;
            }
            let etag = app.get("acme", "K").await.etag().to_owned();
            let back = app.roll_back("K", 1).await;
            assert_eq!((back.status, back.version()), (200, 3));
            assert_ne!(back.etag(), etag);
            let now = app.get("acme", "K").await;
            assert_eq!((now.value().as_str(), now.version(), now.etag()), ("one", 3, back.etag()));
            if phase == Phase::Hybrid {
                assert_eq!(app.world().value(ENV, ACME, "K").as_deref(), Some("one"));
            }

            let stale = app.rolling_back("K", 2).header(header::IF_MATCH, etag.as_str());
            assert_eq!(Answer::of(stale).await.problem(), conflict());
            let not_there = app.rolling_back("K", 2).header(header::IF_NONE_MATCH, "*");
            assert_eq!(Answer::of(not_there).await.problem(), conflict());
            for missing in [4, 99] {
                assert_eq!(app.roll_back("K", missing).await.problem(), not_found());
            }
            assert_eq!(app.roll_back("NONE", 1).await.problem(), not_found());
            assert_eq!(app.get("acme", "K").await.version(), 3, "nothing was written");
            let fresh = app.rolling_back("K", 2).header(header::IF_MATCH, back.etag());
            assert_eq!(Answer::of(fresh).await.version(), 4);
            app.restart().await;
            assert_eq!(app.get("acme", "K").await.value(), "two");
            let numbers: Vec<i64> = told(&app.versions("K").await).iter().map(|told| told.0).collect();
            assert_eq!(numbers, [4, 3, 2, 1]);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_deleted_comes_back_by_a_rollback_and_by_a_put() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        app.put("acme", "K", "one").await;
        app.delete("acme", "K").await;
        let back = Answer::of(app.rolling_back("K", 1).header(header::IF_NONE_MATCH, "*")).await;
        assert_eq!((back.status, back.version()), (200, 3));
        assert_eq!(app.get("acme", "K").await.value(), "one");
        app.delete("acme", "K").await;
        let put = app.put_if("K", "five", (header::IF_NONE_MATCH, "*")).await;
        assert_eq!((put.status, put.version()), (201, 5));
        let deletions: Vec<bool> = told(&app.versions("K").await).iter().map(|told| told.3).collect();
        assert_eq!(deletions, [false, true, false, true, false]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_hybrid_a_changed_value_makes_a_version_and_a_write_through_the_proxy_exactly_one() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("K", "one"), ("L", "l")]);
        assert_eq!(app.get("acme", "K").await.value(), "one");
        for _ in 0..2 {
            assert_eq!(app.refresh("acme").await.status, 200);
        }
        assert_eq!(told(&app.versions("K").await), [version(1, "infisical", "infisical", false, true)]);
        app.world().put(ENV, ACME, "K", "two");
        app.refresh("acme").await;
        for value in ["three", "four", "four"] {
            assert_eq!(app.put("acme", "K", value).await.status, 200);
            assert_eq!(app.get("acme", "K").await.value(), value);
            app.refresh("acme").await;
        }
        assert_eq!(
            told(&app.versions("K").await),
            [
                version(5, "infisical", "test", false, true),
                version(4, "infisical", "test", false, false),
                version(3, "infisical", "test", false, false),
                version(2, "infisical", "infisical", false, false),
                version(1, "infisical", "infisical", false, false),
            ]
        );
        for (number, value) in [(1, "one"), (2, "two"), (3, "three"), (5, "four")] {
            let answer = app.version("K", number).await;
            assert_eq!((answer.value().as_str(), answer.version(), answer.tier()), (value, number, "database"));
        }
        assert_eq!(app.version("K", 6).await.problem(), not_found());
        assert_eq!(told(&app.versions("L").await), [version(1, "infisical", "infisical", false, true)]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_infisical_deleted_takes_every_copy_along() {
    for through_the_proxy in [false, true] {
        on_both(async |backend| {
            let app = Setup::new(backend, Phase::Hybrid).start().await;
            app.holds("acme", &[("K", "one"), ("L", "l")]);
            app.get("acme", "K").await;
            app.put("acme", "K", "two").await;
            assert_eq!(app.version("K", 1).await.value(), "one");
            match through_the_proxy {
                true => assert_eq!(app.delete("acme", "K").await.status, 204),
                false => {
                    app.world().delete(ENV, ACME, "K");
                    app.refresh("acme").await;
                }
            }
            for number in [1, 2, 3] {
                assert_eq!(app.version("K", number).await.problem(), not_found());
                assert_eq!(app.roll_back("K", number).await.problem(), not_found());
            }
            let by = if through_the_proxy { "test" } else { "infisical" };
            assert_eq!(told(&app.versions("K").await), [version(3, "infisical", by, true, true)]);
            assert_eq!(app.world().value(ENV, ACME, "K"), None);
            let values = "SELECT count(*) FROM {}company_secrets \
                          WHERE secret_key = 'K' AND secret_value_encrypted IS NOT NULL";
            assert_eq!(app.setup.backend.number(values).await, 0);
            assert_eq!(app.put("acme", "K", "new").await.version(), 4, "its numbers are not used again");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_infisical_deleted_is_not_told_of_while_its_copies_are_still_there() {
    let app = Setup::new(Backend::sqlite(), Phase::Hybrid).start().await;
    app.holds("acme", &[("K", "one"), ("L", "l")]);
    app.get("acme", "K").await;
    app.world().put(ENV, ACME, "K", "two");
    app.refresh("acme").await;
    assert_eq!(app.version("K", 1).await.value(), "one");

    // Nothing is written back for as long as another writes to the file.
    let mut other = SqliteConnection::establish(app.setup.backend.url().trim_start_matches("sqlite:")).unwrap();
    other.batch_execute("PRAGMA busy_timeout = 5000; BEGIN IMMEDIATE").unwrap();
    app.world().delete(ENV, ACME, "K");
    assert_eq!(app.refresh("acme").await.status, 200);
    assert_eq!(app.get("acme", "K").await.problem(), not_found());
    for number in [1, 2] {
        assert_eq!(app.version("K", number).await.problem(), not_found());
    }
    assert_eq!(app.versions("K").await.problem(), not_found());
    other.batch_execute("ROLLBACK").unwrap();
    for number in [1, 2] {
        assert_eq!(app.roll_back("K", number).await.problem(), not_found());
    }
    app.stored(1).await;
    assert_eq!(told(&app.versions("K").await), [version(3, "infisical", "infisical", true, true)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_stops_history_too_and_so_does_an_outage_beyond_max_stale() {
    on_both(async |backend| {
        let mut app = Setup::new(backend, Phase::Hybrid).with(FORGETFUL).start().await;
        app.holds("acme", &[("K", "one")]);
        app.holds("globex", &[("K", "other")]);
        app.get("acme", "K").await;
        app.world().put(ENV, ACME, "K", "two");
        app.refresh("acme").await;
        assert_eq!(app.version("K", 1).await.value(), "one");
        let beside = app.another().await;
        assert_eq!(app.get_from(&beside, "acme", "K").await.value(), "two");

        app.world().set_rights(&app.identity, Rights::Read(vec![Readable::new(ENV, "/tenants/globex")]));
        is_denied(&app.refresh("acme").await);
        let from = async |instance: &Instance, below: &str| {
            let request = instance.request(Method::GET, &format!("{}{below}", secret("acme", "K")));
            Answer::of(request.bearer_auth(&app.token)).await
        };
        for instance in [app.instance(), &beside] {
            // The other one still has the newest in memory, and the denial in the database.
            is_denied(&from(instance, "?version=1").await);
            is_denied(&from(instance, "?version=2").await);
            is_denied(&from(instance, "/versions").await);
        }
        is_denied(&app.roll_back("K", 1).await);
        assert_eq!(app.world().value(ENV, ACME, "K").as_deref(), Some("two"));

        app.world().set_rights(&app.identity, Rights::Full);
        app.advance(Duration::from_secs(61));
        assert_eq!(app.version("K", 1).await.value(), "one", "nothing was deleted");

        app.infisical.stop().await;
        app.advance(Duration::from_hours(23));
        assert_eq!(app.version("K", 1).await.value(), "one");
        app.advance(Duration::from_hours(2));
        app.restart().await;
        for answer in [app.version("K", 1).await, app.version("K", 2).await, app.versions("K").await] {
            assert_eq!(answer.problem(), (503, "unavailable".to_owned()));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_phase_infisical_only_the_current_version_is_known() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Infisical).start().await;
        app.holds("acme", &[("K", "one")]);
        app.put("acme", "K", "two").await;
        let now = app.get("acme", "K").await;
        let number = now.version();
        assert_eq!(told(&app.versions("K").await), [version(number, "infisical", "infisical", false, true)]);
        assert_eq!(app.version("K", number).await.value(), "two");
        assert_eq!(app.version("K", number + 1).await.problem(), not_found());
        assert_eq!(app.versions("NONE").await.problem(), not_found());
        let refused = app.roll_back("K", number).await;
        assert_eq!(refused.problem(), not_found());
        assert!(refused.json()["detail"].as_str().unwrap().contains("its owner keeps"), "{refused:?}");
        assert_eq!(app.setup.backend.number("SELECT count(*) FROM {}company_secrets").await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn history_goes_on_as_a_secret_changes_hands() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Hybrid).start().await;
        app.holds("acme", &[("K", "theirs")]);
        assert_eq!(app.get("acme", "K").await.value(), "theirs");
        app.stored(1).await;
        app.set_phase("acme", Some(Phase::Database)).await;
        assert_eq!(app.put("acme", "K", "ours").await.version(), 2);
        assert_eq!(app.version("K", 1).await.value(), "theirs");
        assert_eq!(app.roll_back("K", 1).await.version(), 3);
        app.set_phase("acme", Some(Phase::Hybrid)).await;
        assert_eq!(app.get("acme", "K").await.value(), "theirs");
        assert_eq!(
            told(&app.versions("K").await),
            [
                version(4, "infisical", "infisical", false, true),
                version(3, "database", "test", false, false),
                version(2, "database", "test", false, false),
                version(1, "infisical", "infisical", false, false),
            ]
        );
        assert_eq!(app.roll_back("K", 2).await.version(), 5);
        assert_eq!(app.world().value(ENV, ACME, "K").as_deref(), Some("ours"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_fifty_writers_one_wins_each_version_and_history_is_unbroken() {
    const ROUNDS: i64 = 5;
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let setup = Setup::new(backend, phase);
            let app = Setup { database: KEPT.to_owned(), ..setup }.start().await;
            assert_eq!(app.put("acme", "K", "first").await.status, 201);
            let mut values = vec!["first".to_owned()];
            for round in 1..=ROUNDS {
                let etag = app.get("acme", "K").await.etag().to_owned();
                let tries: Vec<String> = (0..50).map(|writer| format!("round {round} writer {writer}")).collect();
                let writes = tries.iter().map(|value| app.put_if("K", value, (header::IF_MATCH, &etag)));
                let answers = join_all(writes).await;
                let won: Vec<usize> = (0..50).filter(|&writer| answers[writer].status == 200).collect();
                assert_eq!(won.len(), 1, "{answers:?}");
                assert_eq!(answers.iter().filter(|answer| answer.status == 409).count(), 49, "{answers:?}");
                assert_eq!(answers[won[0]].version(), round + 1);
                values.push(tries[won[0]].clone());
            }
            let numbers: Vec<i64> = told(&app.versions("K").await).iter().map(|told| told.0).collect();
            assert_eq!(numbers, (1..=ROUNDS + 1).rev().collect::<Vec<_>>());
            for (number, value) in (1..).zip(&values) {
                assert_eq!(&app.version("K", number).await.value(), value);
            }
            assert_eq!(app.setup.backend.number(LINKED).await, ROUNDS, "each leads to the one before");
        })
        .await;
    }
}

/// Rows that are linked to the version before them.
const LINKED: &str = "SELECT count(*) FROM {}company_secrets new JOIN {}company_secrets old \
    ON old.id = new.previous_version_id AND old.version = new.version - 1 \
    AND old.company_id = new.company_id AND old.secret_key = new.secret_key AND old.superseded_at IS NOT NULL";

#[tokio::test(flavor = "multi_thread")]
async fn of_a_rollback_and_a_put_that_name_the_same_etag_one_wins() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.put("acme", "K", "one").await;
            for round in 2..8 {
                let etag = app.get("acme", "K").await.etag().to_owned();
                let (back, put) = tokio::join!(
                    Answer::of(app.rolling_back("K", 1).header(header::IF_MATCH, etag.as_str())),
                    app.put_if("K", "new", (header::IF_MATCH, &etag)),
                );
                let mut statuses = [back.status, put.status];
                statuses.sort_unstable();
                assert_eq!(statuses, [200, 409], "{back:?} {put:?}");
                let value = if back.status == 200 { "one" } else { "new" };
                let now = app.get("acme", "K").await;
                assert_eq!((now.value().as_str(), now.version()), (value, round));
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_whose_time_is_over_is_not_served_and_is_swept() {
    on_both(async |backend| {
        let setup = Setup::new(backend, Phase::Database);
        let kept = "versions_kept = 3\nversions_kept_for = \"2h\"\n";
        let app = Setup { database: kept.to_owned(), ..setup }.start().await;
        for value in ["1", "2", "3", "4"] {
            app.put("acme", "K", value).await;
        }
        assert_eq!(app.version("K", 1).await.problem(), not_found(), "it was one too many");
        assert_eq!(app.version("K", 2).await.value(), "2");
        app.advance(Duration::from_mins(121));
        for gone in [2, 3] {
            assert_eq!(app.version("K", gone).await.problem(), not_found());
            assert_eq!(app.roll_back("K", gone).await.problem(), not_found());
        }
        assert_eq!(told(&app.versions("K").await), [version(4, "database", "test", false, true)]);
        let rows = "SELECT count(*) FROM {}company_secrets";
        eventually(async || app.setup.backend.number(rows).await == 1).await;
        assert_eq!(app.get("acme", "K").await.value(), "4");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_does_not_open_is_unavailable_and_never_absent() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            for value in ["one", "two", "three"] {
                app.put("acme", "K", value).await;
            }
            let swap = "UPDATE company_secrets SET written_by = secret_value_encrypted; \
                        UPDATE company_secrets SET secret_value_encrypted = (SELECT other.written_by \
                        FROM company_secrets other WHERE other.version = 3 - company_secrets.version) \
                        WHERE version < 3; UPDATE company_secrets SET written_by = NULL";
            app.setup.backend.sql(swap).await;
            for number in [1, 2] {
                assert_eq!(app.version("K", number).await.problem(), (503, "unavailable".to_owned()));
                assert_eq!(app.roll_back("K", number).await.problem(), (503, "unavailable".to_owned()));
            }
            assert_eq!(app.get("acme", "K").await.value(), "three");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_database_there_is_no_history() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            for value in ["one", "two"] {
                app.put("acme", "K", value).await;
            }
            assert_eq!(app.get("acme", "K").await.value(), "two");
            app.setup.backend.sql("ALTER TABLE company_secrets RENAME TO elsewhere").await;
            for answer in [app.version("K", 1).await, app.versions("K").await, app.roll_back("K", 1).await] {
                assert_eq!(answer.problem(), (503, "unavailable".to_owned()));
            }
            assert_eq!(app.get("acme", "K").await.value(), "two");
            app.setup.backend.sql("ALTER TABLE elsewhere RENAME TO company_secrets").await;
            assert_eq!(app.version("K", 1).await.value(), "one");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_may_be_named_like_what_is_below_a_secret() {
    let app = Setup::new(Backend::sqlite(), Phase::Database).start().await;
    for name in ["versions", "rollback", "batch-get", "explain"] {
        for value in ["one", "two"] {
            assert!(matches!(app.put("acme", name, value).await.status, 200 | 201));
        }
        assert_eq!(app.version(name, 1).await.value(), "one");
        assert_eq!(told(&app.versions(name).await).len(), 2);
        assert_eq!(app.roll_back(name, 1).await.version(), 3);
        assert_eq!(app.get("acme", name).await.value(), "one");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_read_or_write_a_secret_may_not_its_history() {
    let app = Setup::new(Backend::sqlite(), Phase::Database).start().await;
    app.put("acme", "K", "one").await;
    let reader = app.new_token("reader", &["acme"], &[Action::Read]).await;
    let writer = app.new_token("writer", &["acme"], &[Action::Write]).await;
    let elsewhere = app.new_token("elsewhere", &["globex"], &Action::ALL).await;
    for (token, reads, writes) in [(reader, 200, 403), (writer, 403, 200), (elsewhere, 403, 403)] {
        let path = secret("acme", "K");
        for below in ["?version=1", "/versions"] {
            let request = app.instance().request(Method::GET, &format!("{path}{below}"));
            assert_eq!(Answer::of(request.bearer_auth(&token)).await.status, reads, "{below}");
        }
        let request = app.instance().request(Method::POST, &format!("{path}/rollback")).bearer_auth(&token);
        assert_eq!(Answer::of(request.json(&json!({ "version": 1 }))).await.status, writes);
    }
    for body in ["", "{}", "{\"version\":0}", "{\"version\":\"1\"}", "{\"version\":1,\"value\":\"x\"}"] {
        let request = app.request(Method::POST, &format!("{}/rollback", secret("acme", "K"))).body(body);
        assert_eq!(Answer::of(request).await.problem(), (400, "invalid_body".to_owned()), "{body}");
    }
    assert_eq!(app.ask(Method::PUT, &format!("{}/versions", secret("acme", "K"))).await.status, 405);
    let wrong = app.ask(Method::GET, &format!("{}/rollback", secret("acme", "K"))).await;
    assert_eq!((wrong.status, wrong.header("allow")), (405, "POST"));
}
