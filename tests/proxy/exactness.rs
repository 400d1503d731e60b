//! A write changes the secret that it names, and no other: by names that Infisical would take
//! for another's, and by chance.

use std::collections::BTreeMap;

use proptest::{prelude::*, strategy::ValueTree as _};
use reqwest::{Method, header};
use secretier::{
    access::{Action, NewToken},
    phase::Phase,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::app::{Answer, Backend, ENV, Setup, TestApp, drawn_anew, on_both, on_both_and_before_october, secret};

/// White space as JavaScript trims it, as far as a key may hold it.
const BLANKS: [char; 7] = [' ', '\u{a0}', '\u{feff}', '\u{1680}', '\u{2003}', '\u{2028}', '\u{3000}'];

const FOLDER: &str = "/tenants/acme";

fn trimmed(name: &str) -> &str {
    name.trim_matches(BLANKS)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_padded_name_reaches_no_other_secret_where_infisical_would_trim_it() {
    for phase in [Phase::Infisical, Phase::Hybrid] {
        on_both_and_before_october(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            app.holds("acme", &[("PLAIN", "1"), ("STRIPE_SECRET_KEY", "s")]);
            assert_eq!(app.get("acme", "PLAIN").await.value(), "1");
            let before = app.world().secrets(ENV, FOLDER);
            app.world().mark();
            let refused = (400, "invalid_key".to_owned());
            for blank in BLANKS {
                for name in [format!("PLAIN{blank}"), format!("{blank}PLAIN"), format!("{blank}NEW"), blank.to_string()]
                {
                    assert_eq!(app.put("acme", &name, "2").await.problem(), refused, "{name:?}");
                    assert_eq!(app.delete("acme", &name).await.problem(), refused, "{name:?}");
                    for (condition, value) in [(header::IF_NONE_MATCH, "*"), (header::IF_MATCH, "*")] {
                        let put = app.request(Method::PUT, &secret("acme", &name)).header(condition, value);
                        assert_eq!(Answer::of(put.json(&json!({"value": "2"}))).await.problem(), refused, "{name:?}");
                    }
                }
            }
            assert_eq!(app.world().calls_since_mark().total(), 0, "nothing was asked, and nothing was sent");
            assert_eq!(app.world().secrets(ENV, FOLDER), before);
            assert_eq!(app.get("acme", "PLAIN").await.value(), "1");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_some_keys_reaches_no_other_by_a_blank() {
    let app = Setup::new(Backend::sqlite(), Phase::Hybrid).start().await;
    app.holds("acme", &[("STRIPE_SECRET_KEY", "s")]);
    let new = NewToken {
        name: "not-s".to_owned(),
        tenants: vec!["*".to_owned()],
        keys: vec!["[!S]*".to_owned()],
        actions: Action::ALL.to_vec(),
        lifetime: None,
    };
    let (token, row) = new.draw(app.instance().clock.now()).unwrap();
    app.instance().service.resolver.database().insert_token(&row).await.unwrap();
    app.instance().service.access.reload().await.unwrap();
    let path = secret("acme", " STRIPE_SECRET_KEY");
    for (method, body) in [(Method::PUT, json!({"value": "x"})), (Method::DELETE, json!(null))] {
        let request = app.instance().request(method.clone(), &path).bearer_auth(token.expose()).json(&body);
        assert_eq!(Answer::of(request).await.problem(), (400, "invalid_key".to_owned()), "{method}");
    }
    assert_eq!(app.world().value(ENV, FOLDER, "STRIPE_SECRET_KEY").as_deref(), Some("s"));
    let audit = app.ask(Method::GET, "/v1/audit?tenant=acme&limit=1000").await.json();
    let records = audit["records"].as_array().unwrap();
    let keys: Vec<_> = records.iter().map(|record| (&record["key"], &record["outcome"])).collect();
    assert!(keys.contains(&(&json!(" STRIPE_SECRET_KEY"), &json!("invalid"))), "{keys:?}");
    assert!(!keys.iter().any(|(key, outcome)| **key == "STRIPE_SECRET_KEY" || **outcome == "done"), "{keys:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_holds_padded_names_apart() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        for (name, value) in [("PLAIN", "1"), ("PLAIN ", "2"), ("\u{a0}PLAIN", "3")] {
            assert_eq!(app.put("acme", name, value).await.status, 201, "{name:?}");
        }
        assert_eq!(app.delete("acme", "PLAIN ").await.status, 204);
        assert_eq!(app.get("acme", "PLAIN").await.value(), "1");
        assert_eq!(app.get("acme", "\u{a0}PLAIN").await.value(), "3");
        assert_eq!(app.get("acme", "PLAIN ").await.status, 404);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_infisical_would_not_take_for_its_length_is_refused_before_it_is_sent() {
    let app = Setup::new(Backend::sqlite(), Phase::Hybrid).start().await;
    app.holds("acme", &[("A", "1")]);
    assert_eq!(app.get("acme", "A").await.value(), "1");
    app.world().mark();
    for value in ["x".repeat(1 << 20), "\"".repeat(1 << 19)] {
        let refused = app.put("acme", "A", &value).await;
        assert_eq!(refused.problem(), (413, "value_too_large".to_owned()));
        assert!(refused.text.contains("upstream"), "{refused:?}");
    }
    assert_eq!(app.world().calls_since_mark().total(), 0);
    assert_eq!(app.get("acme", "A").await.value(), "1");
}

#[derive(Debug, Clone)]
enum Step {
    Put { name: String, value: String, condition: Option<&'static str> },
    Delete { name: String },
    RollBack { name: String, version: i64 },
}

/// Names near each other: what one layer takes for the same, another must not.
fn names() -> impl Strategy<Value = String> {
    let base = prop_oneof![
        6 => prop::sample::select(vec!["PLAIN", "plain", "Plain", "A B", "STRIPE_SECRET_KEY", "PLAIN%20", "%41", "a/b"]),
        2 => prop::sample::select(vec!["\u{e9}", "e\u{301}", "\u{ff21}", "\u{130}", "i\u{307}", "\u{1f511}", "\u{200b}PLAIN"]),
        2 => prop::sample::select(vec![".", "..", "...", "__proto__", "constructor", "batch-get", "toString", "$&"]),
    ];
    let long = (90..=255_usize).prop_map(|length| "n".repeat(length));
    let blank = || prop::option::weighted(0.2, prop::sample::select(BLANKS.to_vec()));
    let padded = (blank(), prop_oneof![9 => base.prop_map(str::to_owned), 1 => long], blank(), blank());
    padded.prop_map(|(before, name, inside, after)| {
        let mut padded: String = before.into_iter().chain(name.chars()).chain(after).collect();
        if let (Some(inside), Some((at, _))) = (inside, name.char_indices().nth(1)) {
            padded.insert(before.map_or(0, char::len_utf8) + at, inside);
        }
        // No key is longer.
        while padded.len() > 255 {
            padded.pop();
        }
        padded
    })
}

fn values() -> impl Strategy<Value = String> {
    prop_oneof![
        5 => "[a-z]{0,8}",
        1 => prop::sample::select(vec![" a", "a ", "a\n", "a\n\n", "\n", "\u{a0}a", "a\u{feff}", "\u{85}a", "a\0b", "\u{1f511}"])
            .prop_map(str::to_owned),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let condition = prop::option::weighted(0.4, prop::sample::select(vec!["If-Match", "If-None-Match"]));
    prop_oneof![
        5 => (names(), values(), condition).prop_map(|(name, value, condition)| Step::Put { name, value, condition }),
        3 => names().prop_map(|name| Step::Delete { name }),
        2 => (names(), 1..4_i64).prop_map(|(name, version)| Step::RollBack { name, version }),
    ]
}

/// What a folder holds, by name.
type Held = BTreeMap<String, String>;

/// What stands at the owner, what the proxy serves, and what was ever written.
struct Run {
    app: TestApp,
    phase: Phase,
    held: Held,
    /// Values by name and version, as the proxy told the version.
    versions: BTreeMap<(String, i64), String>,
}

impl Run {
    async fn start(backend: Backend, phase: Phase) -> Self {
        let app = Setup::new(backend, phase).start().await;
        let mut run = Self { app, phase, held: Held::new(), versions: BTreeMap::new() };
        for name in ["PLAIN", "A B", "STRIPE_SECRET_KEY", "e\u{301}"] {
            run.step(&Step::Put { name: name.to_owned(), value: "first".to_owned(), condition: None }).await;
        }
        run
    }

    /// Whether the owner holds such a name, and such a value, as they are.
    fn is_storable(&self, name: &str, value: &str) -> bool {
        let kept = value.strip_suffix('\n').unwrap_or(value);
        let trims = |text: &str| text.trim_matches(|c| BLANKS.contains(&c) || "\n\r\t".contains(c)) != text;
        let inherited = ["__proto__", "constructor", "toString"].contains(&name);
        self.phase == Phase::Database || !(trimmed(name) != name || inherited || trims(kept))
    }

    /// Takes a step, and holds all that can be seen to it.
    async fn step(&mut self, step: &Step) {
        let (name, answer) = match step {
            Step::Put { name, value, condition } => {
                let condition = condition.map(|condition| (condition, "*"));
                (name, self.send("PUT", name, "?create_tenant=true", condition, Some(json!({"value": value}))).await)
            }
            Step::Delete { name } => (name, self.send("DELETE", name, "", None, None).await),
            Step::RollBack { name, version } => {
                (name, self.send("POST", name, "/rollback", None, Some(json!({"version": version}))).await)
            }
        };
        let (status, body) = answer;
        let is_there = self.held.contains_key(name);
        match step {
            Step::Put { value, condition, .. } => {
                let holds = match condition {
                    Some("If-Match") => is_there,
                    Some(_) => !is_there,
                    None => true,
                };
                let expected = match (self.is_storable(name, value), holds, is_there) {
                    (false, ..) => 400,
                    (true, false, _) => 409,
                    (true, true, true) => 200,
                    (true, true, false) => 201,
                };
                assert_eq!(status, expected, "{step:?} {body}");
                if let 200 | 201 = status {
                    self.held.insert(name.clone(), value.clone());
                    if let Some(version) = body["version"].as_i64() {
                        self.versions.insert((name.clone(), version), value.clone());
                    }
                }
            }
            Step::Delete { .. } => {
                let expected = match (self.is_storable(name, ""), is_there) {
                    (false, _) => 400,
                    (true, true) => 204,
                    (true, false) => 404,
                };
                assert_eq!(status, expected, "{step:?} {body}");
                self.held.remove(name);
            }
            Step::RollBack { version, .. } => {
                assert!(matches!(status, 200 | 400 | 404), "{step:?} {status} {body}");
                if status == 200 {
                    let value = self.versions[&(name.clone(), *version)].clone();
                    self.held.insert(name.clone(), value.clone());
                    if let Some(version) = body["version"].as_i64() {
                        self.versions.insert((name.clone(), version), value);
                    }
                }
            }
        }
        self.compare(step, name).await;
    }

    /// Whether everything is as it should be, and nothing more.
    async fn compare(&self, step: &Step, name: &str) {
        if self.phase != Phase::Database {
            let owned = self.app.world().secrets(ENV, FOLDER);
            assert_eq!(owned.len(), self.held.len(), "no name twice after {step:?}: {owned:?}");
            assert_eq!(owned.into_iter().collect::<Held>(), self.held, "at the owner after {step:?}");
        }
        for of in self.held.keys().map(String::as_str).chain([name, trimmed(name)]).filter(|name| !name.is_empty()) {
            let (status, body) = self.send("GET", of, "", None, None).await;
            let served = (status == 200).then(|| body["value"].as_str().unwrap());
            assert_eq!(served, self.held.get(of).map(String::as_str), "{of:?} after {step:?}");
        }
        let listed = self.app.ask_tenant("acme", "/secrets?values=true").await;
        let served: Held = match listed.status {
            404 => Held::new(),
            _ => {
                let text = |value: &Value| value.as_str().unwrap().to_owned();
                let keys = listed.json()["keys"].as_array().unwrap().clone();
                keys.iter().map(|key| (text(&key["key"]), text(&key["value"]))).collect()
            }
        };
        assert_eq!(served, self.held, "listed after {step:?}");
    }

    /// A request whose path no client has touched: most take `.` and `..` for steps in it.
    async fn send(
        &self,
        method: &str,
        name: &str,
        below: &str,
        condition: Option<(&str, &str)>,
        body: Option<Value>,
    ) -> (u16, Value) {
        let path = format!("{}{below}", secret("acme", name));
        let condition = condition.map_or(String::new(), |(name, value)| format!("{name}: {value}\r\n"));
        let body = body.map_or(String::new(), |body| body.to_string());
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nConnection: close\r\n\
             {condition}Content-Length: {}\r\n\r\n{body}",
            self.app.token,
            body.len(),
        );
        let mut connection = TcpStream::connect(self.app.url().trim_start_matches("http://")).await.unwrap();
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), serde_json::from_str(body).unwrap_or(Value::Null))
    }
}

const STEPS: usize = 60;

#[tokio::test(flavor = "multi_thread")]
async fn after_any_write_exactly_the_named_secret_has_changed() {
    let mut runner = drawn_anew();
    let mut draw = || steps().new_tree(&mut runner).unwrap().current();
    for phase in Phase::ALL {
        let drawn: Vec<Step> = (0..STEPS).map(|_| draw()).collect();
        on_both_and_before_october(async |backend| {
            let mut run = Run::start(backend, phase).await;
            for step in &drawn {
                run.step(step).await;
            }
        })
        .await;
    }
}
