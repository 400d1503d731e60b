//! Rotation over HTTP: a new value takes over, the old one stays valid for a while, and nobody is left
//! with neither.

use std::time::Duration;

use reqwest::Method;
use secretier::{access::Action, phase::Phase};
use serde_json::{Value, json};

use crate::{
    app::{Answer, Backend, FORGETFUL, Instance, Setup, TestApp, eventually, on_both, secret},
    relay::Relay,
};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// Rules as the tests use them.
const RULES: &str = "[[rotation]]\nkeys = \"JWT\"\ngrace = \"1h\"\n\
                     generate = { kind = \"random\", length = 40, alphabet = \"hex\" }\n";

impl TestApp {
    async fn rotate(&self, key: &str, body: Value) -> Answer {
        Answer::of(self.request(Method::POST, &format!("{}/rotate", secret("acme", key))).json(&body)).await
    }

    async fn rotation(&self, key: &str) -> Value {
        let answer = self.ask(Method::GET, &format!("{}/rotation", secret("acme", key))).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    }

    async fn decide(&self, key: &str, what: &str) -> Answer {
        self.ask(Method::POST, &format!("{}/rotation/{what}", secret("acme", key))).await
    }

    async fn valid(&self, key: &str) -> Vec<(String, String)> {
        self.valid_at(self.instance(), key).await
    }

    /// The valid values with their stages, as an instance answers them.
    async fn valid_at(&self, instance: &Instance, key: &str) -> Vec<(String, String)> {
        let request = instance.request(Method::GET, &format!("{}/valid", secret("acme", key)));
        let answer = Answer::of(request.bearer_auth(&self.token)).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let values = answer.json()["values"].as_array().unwrap().clone();
        values.iter().map(|value| (text(&value["value"]), text(&value["stage"]))).collect()
    }

    async fn reaches(&self, key: &str, state: &str, step: &str) {
        eventually(async || {
            let answer = self.ask(Method::GET, &format!("{}/rotation", secret("acme", key))).await;
            let rotation = answer.json();
            rotation["state"] == state && rotation["step"] == step
        })
        .await;
    }
}

fn own(value: &str) -> (String, String) {
    (value.to_owned(), "current".to_owned())
}

fn previous(value: &str) -> (String, String) {
    (value.to_owned(), "previous".to_owned())
}

fn pending(value: &str) -> (String, String) {
    (value.to_owned(), "pending".to_owned())
}

/// An instance in the register that has followed nothing: heard of a moment ago, or for long not.
async fn registered_behind(app: &TestApp, heard_ago: i64) {
    // By the clock that the register is judged by, which tests move.
    let now = app.instance().service.resolver.database().now().as_millis();
    let sql = format!(
        "INSERT INTO instances (id, name, master_keys, changes, seen_at, version, max_detached) \
         VALUES ('behind', 'elsewhere/1', '', 0, {}, '0.1.0', 86400000)",
        now - heard_ago
    );
    app.setup.backend.sql(&sql).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_value_takes_over_and_the_old_one_is_valid_until_its_end_wherever_the_secret_lives() {
    for phase in Phase::ALL {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            let beside = app.another().await;
            assert_eq!(app.put("acme", "K", "one").await.status, 201);
            assert_eq!(app.valid("K").await, [own("one")]);
            let begun = app.rotate("K", json!({"value": "two", "grace": "1h", "reason": "a test"})).await;
            assert_eq!(begun.status, 202, "{begun:?}");
            let body = begun.json();
            assert_eq!(
                (&body["state"], &body["started_by"], &body["reason"]),
                (&json!("running"), &json!("test"), &json!("a test"))
            );
            app.reaches("K", "running", "wait").await;
            app.followed().await;
            for instance in [app.instance(), &beside] {
                assert_eq!(app.get_from(instance, "acme", "K").await.value(), "two", "{phase}");
                assert_eq!(app.valid_at(instance, "K").await, [own("two"), previous("one")], "{phase}");
                // From memory now, and the same.
                assert_eq!(app.valid_at(instance, "K").await, [own("two"), previous("one")], "{phase}");
            }
            let rotation = app.rotation("K").await;
            assert!(rotation["valid_until"].as_str().is_some_and(|until| until.ends_with('Z')), "{rotation}");
            assert!(!rotation.to_string().contains("one") && !rotation.to_string().contains("two"), "{rotation}");

            // Its end needs no event.
            app.advance(HOUR);
            for instance in [app.instance(), &beside] {
                assert_eq!(app.valid_at(instance, "K").await, [own("two")], "{phase}");
            }
            app.reaches("K", "completed", "revoke").await;
            let values = "SELECT count(*) FROM {}secret_rotations WHERE old_value IS NOT NULL OR new_value IS NOT NULL";
            assert_eq!(app.setup.backend.number(values).await, 0, "no value is kept for longer than it is valid");
            assert_eq!(app.get("acme", "K").await.value(), "two");
            let history = app.ask(Method::GET, "/v1/rotations?state=completed").await.json();
            assert_eq!(history["rotations"].as_array().unwrap().len(), 1);
            assert_eq!(app.ask(Method::GET, "/v1/rotations?state=failed").await.json()["rotations"], json!([]));
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_is_made_as_the_rule_says_and_without_a_rule_one_must_come() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).with(RULES).start().await;
        for key in ["JWT", "OTHER"] {
            assert_eq!(app.put("acme", key, "one").await.status, 201);
        }
        assert_eq!(app.rotate("JWT", json!({})).await.status, 202);
        app.reaches("JWT", "running", "wait").await;
        let made = app.get("acme", "JWT").await.value();
        assert!(made.len() == 40 && made.bytes().all(|byte| byte.is_ascii_hexdigit()), "{made}");
        assert_eq!(app.valid("JWT").await, [own(&made), previous("one")]);
        let problem = async |key: &str, body| app.rotate(key, body).await.problem();
        assert_eq!(problem("OTHER", json!({})).await, (409, "rotation_rule_missing".to_owned()));
        assert_eq!(problem("OTHER", json!({"value": "one"})).await, (409, "same_value".to_owned()));
        assert_eq!(problem("NONE", json!({"value": "x"})).await, (404, "secret_not_found".to_owned()));
        assert_eq!(problem("OTHER", json!({"value": "x", "grace": "400d"})).await, (400, "invalid_body".to_owned()));
        assert_eq!(problem("OTHER", json!({"value": "x", "reason": "a\nb"})).await, (400, "invalid_body".to_owned()));
        // Another rule counts from the next rotation on.
        let rule = "[[rotation]]\nkeys = \"OTHER\"\ngrace = \"0s\"\ngenerate = { kind = \"uuid\" }\n";
        app.reload(|setup| setup.more = rule.to_owned()).await.unwrap();
        assert_eq!(app.rotate("OTHER", json!({})).await.status, 202);
        app.reaches("OTHER", "completed", "revoke").await;
        assert_eq!(app.get("acme", "OTHER").await.value().len(), 36);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_only_write_rotates_nothing_and_who_rotates_needs_no_other_right() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        app.put("acme", "K", "one").await;
        let writer = app.new_token("writer", &["*"], &[Action::Read, Action::Write, Action::Admin]).await;
        let rotator = app.new_token("rotator", &["*"], &[Action::Rotate]).await;
        let rotate = async |token: &str| {
            let request = app.instance().request(Method::POST, &format!("{}/rotate", secret("acme", "K")));
            Answer::of(request.bearer_auth(token).json(&json!({"value": "two", "grace": "1h"}))).await
        };
        assert_eq!(rotate(&writer).await.problem(), (403, "out_of_scope".to_owned()));
        for what in ["promote", "retry", "abort", "retire", "rollback"] {
            let request = app.instance().request(Method::POST, &format!("{}/rotation/{what}", secret("acme", "K")));
            let refused = Answer::of(request.bearer_auth(&writer)).await;
            assert_eq!(refused.problem(), (403, "out_of_scope".to_owned()), "{what}");
        }
        assert_eq!(rotate(&rotator).await.status, 202);
        let reading = app.instance().request(Method::GET, &format!("{}/valid", secret("acme", "K")));
        assert_eq!(Answer::of(reading.bearer_auth(&rotator)).await.problem(), (403, "out_of_scope".to_owned()));
        app.reaches("K", "running", "wait").await;
        let versions = app.ask(Method::GET, &format!("{}/versions", secret("acme", "K"))).await.json();
        assert_eq!(versions["versions"][0]["by"], "rotator");
        let found = app.ask(Method::GET, "/v1/audit?tenant=acme").await.json();
        let records: Vec<Value> = found["records"].as_array().unwrap().clone();
        let records: Vec<Value> =
            records.into_iter().filter(|record| record["action"] == "promote" && record["chain"] == "write").collect();
        assert!(!records.is_empty(), "the write of the secret is on record");
        assert!(
            records.iter().all(|record| record["actor_id"] == "rotation" && record["actor_name"] == "rotator"),
            "{records:?}"
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_rotation_of_a_secret_runs_at_a_time_and_a_new_one_begins_once_the_old_value_is_retired() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        app.put("acme", "K", "one").await;
        assert_eq!(app.decide("K", "retire").await.problem(), (409, "rotation_not_running".to_owned()));
        assert_eq!(app.rotate("K", json!({"value": "two", "grace": "1h"})).await.status, 202);
        app.reaches("K", "running", "wait").await;
        let again = app.rotate("K", json!({"value": "three"})).await;
        assert_eq!(again.problem(), (409, "rotation_in_progress".to_owned()));
        assert!(again.json()["detail"].as_str().unwrap().contains("retire"), "{again:?}");
        for what in ["promote", "abort", "retry"] {
            assert_eq!(app.decide("K", what).await.problem(), (409, "rotation_not_now".to_owned()), "{what}");
        }
        assert_eq!(app.decide("K", "retire").await.status, 202);
        assert_eq!(app.valid("K").await, [own("two")], "its time is over at once");
        app.reaches("K", "completed", "revoke").await;
        // Compromised: at once, and without a grace.
        assert_eq!(app.rotate("K", json!({"value": "three", "grace": "0s"})).await.status, 202);
        app.reaches("K", "completed", "revoke").await;
        assert_eq!(app.valid("K").await, [own("three")]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_value_takes_over_once_every_instance_that_is_heard_of_knows_it() {
    on_both(async |backend| {
        let app = Setup::new(backend.clone(), Phase::Database).start().await;
        app.put("acme", "K", "one").await;
        registered_behind(&app, 0).await;
        app.rotate("K", json!({"value": "two", "grace": "1h"})).await;
        app.reaches("K", "running", "test").await;
        eventually(async || app.rotation("K").await["waits_for"].to_string().contains("elsewhere/1")).await;
        assert_eq!(app.get("acme", "K").await.value(), "one");
        assert_eq!(app.valid("K").await, [own("one"), pending("two")], "whoever is shown it first finds it valid");
        assert_eq!(app.decide("K", "retire").await.problem(), (409, "rotation_not_now".to_owned()));
        assert_eq!(app.decide("K", "rollback").await.problem(), (409, "rotation_not_now".to_owned()));
        assert_eq!(app.decide("K", "abort").await.status, 202);
        assert_eq!(
            (app.rotation("K").await["state"].clone(), app.valid("K").await),
            (json!("aborted"), vec![own("one")])
        );

        app.rotate("K", json!({"value": "three", "grace": "1h"})).await;
        app.reaches("K", "running", "test").await;
        assert_eq!(app.decide("K", "promote").await.status, 202);
        app.reaches("K", "running", "wait").await;
        assert_eq!(app.valid("K").await, [own("three"), previous("one")], "a person is not made to wait");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_revoked_before_every_instance_has_followed_or_can_no_longer_answer() {
    on_both(async |backend| {
        let app = Setup::new(backend.clone(), Phase::Database).start().await;
        app.put("acme", "K", "one").await;
        // It was killed, or is stopped, and may answer for a day.
        registered_behind(&app, 60_000).await;
        app.rotate("K", json!({"value": "two", "grace": "10m"})).await;
        app.reaches("K", "running", "wait").await;
        app.advance(Duration::from_secs(11 * 60));
        eventually(async || app.rotation("K").await["waits_for"].to_string().contains("elsewhere/1")).await;
        let rotation = app.rotation("K").await;
        assert!(rotation["waits_for"].as_str().unwrap().contains("or until"), "{rotation}");
        assert_eq!((&rotation["state"], &rotation["step"]), (&json!("running"), &json!("wait")));
        assert_eq!(app.valid("K").await, [own("two")], "who asks here is told that its time is over");
        backend.sql("DELETE FROM instances WHERE id = 'behind'").await;
        app.reaches("K", "completed", "revoke").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_value_comes_back_while_it_is_valid_and_one_that_was_revoked_does_not_unless_forced() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.put("acme", "K", "one").await;
            // The copy has its version from now on.
            assert_eq!(app.get("acme", "K").await.version(), 1);
            app.stored(1).await;
            app.rotate("K", json!({"value": "two", "grace": "1h"})).await;
            app.reaches("K", "running", "wait").await;
            assert_eq!(app.decide("K", "rollback").await.status, 202);
            assert_eq!(
                (app.rotation("K").await["state"].clone(), app.valid("K").await),
                (json!("rolled_back"), vec![own("one")])
            );

            let number = app.get("acme", "K").await.version();
            app.stored(1).await;
            app.rotate("K", json!({"value": "three", "grace": "1h"})).await;
            app.reaches("K", "running", "wait").await;
            assert_eq!(app.decide("K", "retire").await.status, 202);
            app.reaches("K", "completed", "revoke").await;
            assert_eq!(app.decide("K", "rollback").await.problem(), (409, "rotation_not_running".to_owned()));
            assert_eq!(app.get("acme", "K").await.value(), "three");
            let roll_back = async |body: Value| {
                let path = format!("{}/rollback", secret("acme", "K"));
                Answer::of(app.request(Method::POST, &path).json(&body)).await
            };
            let revoked = roll_back(json!({"version": number})).await;
            assert_eq!(revoked.problem(), (409, "version_revoked".to_owned()), "{phase}");
            assert_eq!(roll_back(json!({"version": number, "force": true})).await.status, 200, "{phase}");
            assert_eq!(app.get("acme", "K").await.value(), "one");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_somebody_writes_meanwhile_is_not_overwritten_and_one_brought_back_not_revoked() {
    on_both(async |backend| {
        let app = Setup::new(backend.clone(), Phase::Database).start().await;
        app.put("acme", "K", "one").await;
        registered_behind(&app, 0).await;
        app.rotate("K", json!({"value": "two", "grace": "1h"})).await;
        app.reaches("K", "running", "test").await;
        assert_eq!(app.put("acme", "K", "by hand").await.status, 200);
        app.decide("K", "promote").await;
        eventually(async || app.rotation("K").await["state"] == "failed").await;
        assert_eq!(app.rotation("K").await["error"]["code"], "overtaken");
        assert_eq!(
            (app.get("acme", "K").await.value(), app.valid("K").await),
            ("by hand".to_owned(), vec![own("by hand")])
        );
        backend.sql("DELETE FROM instances WHERE id = 'behind'").await;

        // A rotation that has failed before it changed anything is in nobody's way.
        app.rotate("K", json!({"value": "three", "grace": "1h"})).await;
        app.reaches("K", "running", "wait").await;
        assert_eq!(app.put("acme", "K", "by hand").await.status, 200);
        app.advance(HOUR);
        eventually(async || app.rotation("K").await["state"] == "rolled_back").await;
        assert_eq!(app.valid("K").await, [own("by hand")]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_goes_on_where_another_instance_was_killed() {
    on_both(async |backend| {
        let mut app = Setup::new(backend.clone(), Phase::Database).start().await;
        app.put("acme", "K", "one").await;
        registered_behind(&app, 0).await;
        app.rotate("K", json!({"value": "two", "grace": "1h"})).await;
        app.reaches("K", "running", "test").await;
        app = app.kill_and_start_again().await;
        backend.sql("DELETE FROM instances WHERE id = 'behind'").await;
        // The lease of the one that was killed ends by itself.
        app.advance(Duration::from_secs(90));
        app.reaches("K", "running", "wait").await;
        assert_eq!(app.valid("K").await, [own("two"), previous("one")]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_database_memory_answers_every_valid_value_or_none() {
    let backend = Backend::postgres().await;
    let mut app = Setup::new(backend, Phase::Hybrid).with(FORGETFUL).start().await;
    let relay = Relay::to(crate::postgres::Postgres::shared().port()).await;
    for key in ["K", "L"] {
        app.put("acme", key, "one").await;
        app.rotate(key, json!({"value": "two", "grace": "1h"})).await;
        app.reaches(key, "running", "wait").await;
    }
    app.go_through(&relay).await;
    assert_eq!(app.valid("K").await, [own("two"), previous("one")]);
    assert_eq!(app.get("acme", "L").await.value(), "two");
    relay.cut().await;
    assert_eq!(app.get("acme", "L").await.value(), "two", "memory has the current value");
    assert_eq!(app.valid("K").await, [own("two"), previous("one")], "memory has them all");
    let some = app.ask(Method::GET, &format!("{}/valid", secret("acme", "L"))).await;
    assert_eq!(some.problem(), (503, "unavailable".to_owned()), "never the current value alone");
    assert!(!some.text.contains("two"), "{some:?}");
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

const EVERY_TEN_DAYS: &str =
    "[[rotation]]\nkeys = \"JWT*\"\nevery = \"10d\"\ngrace = \"1h\"\ngenerate = { kind = \"uuid\" }\n";

impl TestApp {
    /// The secrets that are to be rotated within the next twenty days, and when, in days from now.
    async fn due(&self) -> Vec<(String, f64)> {
        let now = self.instance().clock.now();
        let before = now.plus(20 * DAY).to_rfc3339();
        let body = self.ask(Method::GET, &format!("/v1/rotations?state=failed&due_before={before}")).await.json();
        let due = body["due"].as_array().unwrap().iter().map(|due| {
            let at = secretier::clock::Timestamp::from_rfc3339(due["due_at"].as_str().unwrap()).unwrap();
            (due["key"].as_str().unwrap().to_owned(), at.since(now).as_secs_f64() / DAY.as_secs_f64())
        });
        due.collect()
    }

    async fn rotations_begun(&self) -> i64 {
        self.setup.backend.number("SELECT count(*) FROM {}secret_rotations").await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_rotated_when_its_interval_is_over_counted_from_when_it_was_written_last() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).with(EVERY_TEN_DAYS).start().await;
            for key in ["JWT", "OTHER"] {
                assert_eq!(app.put("acme", key, "one").await.status, 201);
                app.get("acme", key).await;
            }
            app.stored(2).await;
            app.advance(Duration::from_secs(6 * 60));
            eventually(async || app.due().await.len() == 1).await;
            let (key, days) = app.due().await.remove(0);
            assert!(key == "JWT" && (8.9..=10.0).contains(&days), "within the last tenth: {key} {days}");

            // Written by hand in between: its time begins anew.
            app.advance(8 * DAY);
            assert_eq!(app.put("acme", "JWT", "two").await.status, 200);
            app.get("acme", "JWT").await;
            app.advance(3 * DAY);
            eventually(async || app.due().await.iter().all(|(_, days)| *days > 5.0)).await;
            assert_eq!((app.rotations_begun().await, app.get("acme", "JWT").await.value()), (0, "two".to_owned()));

            app.advance(8 * DAY);
            app.reaches("JWT", "running", "wait").await;
            assert_eq!(app.rotation("JWT").await["started_by"], "schedule");
            let made = app.get("acme", "JWT").await.value();
            assert_eq!(app.valid("JWT").await, [own(&made), previous("two")], "{phase}");
            eventually(async || app.due().await.iter().all(|(_, days)| *days > 8.9)).await;
            assert_eq!(app.get("acme", "OTHER").await.value(), "one");

            // Without the rule there is nothing to come.
            app.reload(|setup| setup.more = String::new()).await.unwrap();
            eventually(async || app.due().await.is_empty()).await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_are_due_at_once_sixty_begin_in_a_minute_and_what_a_person_stops_is_left_alone_for_a_day() {
    on_both(async |backend| {
        let app = Setup::new(backend.clone(), Phase::Database).with(EVERY_TEN_DAYS).start().await;
        for number in 0..70 {
            app.put("acme", &format!("JWT{number}"), "one").await;
        }
        app.advance(11 * DAY);
        eventually(async || app.rotations_begun().await == 60).await;
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(app.rotations_begun().await, 60, "no more in this minute");
        app.advance(Duration::from_secs(61));
        eventually(async || app.rotations_begun().await == 70).await;

        // Of another that begins, and is stopped by a person before it has changed anything.
        app.put("acme", "JWT", "one").await;
        app.advance(Duration::from_secs(6 * 60));
        eventually(async || app.due().await.iter().any(|(key, _)| key == "JWT")).await;
        let begun = app.rotate("JWT", json!({"value": "two", "grace": "1h"}));
        registered_behind(&app, 0).await;
        assert_eq!(begun.await.status, 202);
        app.reaches("JWT", "running", "test").await;
        assert_eq!(app.decide("JWT", "abort").await.status, 202);
        let until = app.rotation("JWT").await["due_at"].clone();
        let until = secretier::clock::Timestamp::from_rfc3339(until.as_str().unwrap()).unwrap();
        let now = app.instance().clock.now();
        assert!((DAY / 2..2 * DAY).contains(&until.since(now)), "it begins neither at once nor never");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_brings_the_value_and_is_waited_for_until_the_old_one_is_revoked() {
    on_both(async |backend| {
        let rule = "[[rotation]]\nkeys = \"STRIPE\"\nevery = \"10d\"\ngrace = \"1h\"\nassisted = true\n";
        let app = Setup::new(backend, Phase::Database).with(rule).start().await;
        app.put("acme", "STRIPE", "one").await;
        app.advance(11 * DAY);
        app.reaches("STRIPE", "running", "create").await;
        let waits_for = async |what: &str| {
            eventually(async || app.rotation("STRIPE").await["waits_for"].to_string().contains(what)).await;
        };
        waits_for("--value-file").await;
        let rotation = app.rotation("STRIPE").await;
        assert_eq!((&rotation["kind"], &rotation["next_try_at"]), (&json!("assisted"), &Value::Null));
        assert_eq!(
            (app.get("acme", "STRIPE").await.value(), app.valid("STRIPE").await),
            ("one".to_owned(), vec![own("one")])
        );

        assert_eq!(app.rotate("STRIPE", json!({})).await.problem(), (409, "rotation_in_progress".to_owned()));
        assert_eq!(app.rotate("STRIPE", json!({"value": "one"})).await.problem(), (409, "same_value".to_owned()));
        let given = app.rotate("STRIPE", json!({"value": "two"})).await;
        assert_eq!((given.status, &given.json()["id"]), (202, &rotation["id"]), "to the rotation that waits for it");
        app.reaches("STRIPE", "running", "wait").await;
        assert_eq!(app.valid("STRIPE").await, [own("two"), previous("one")]);
        app.advance(HOUR);
        app.reaches("STRIPE", "running", "revoke").await;
        waits_for("retire").await;
        assert_eq!(app.decide("STRIPE", "retire").await.status, 202);
        let ended = app.rotation("STRIPE").await;
        assert_eq!((&ended["state"], &ended["orphaned"]), (&json!("completed"), &json!(false)));
        assert_eq!(app.valid("STRIPE").await, [own("two")]);

        // What is stopped before a value came leaves nothing behind.
        app.rotate("STRIPE", json!({})).await;
        waits_for("--value-file").await;
        assert_eq!(app.decide("STRIPE", "abort").await.json()["orphaned"], false);
    })
    .await;
}
