//! Requests as Infisical's own clients sent them, recorded: each gets an answer with what the client needs.

use std::collections::BTreeMap;

use proptest::strategy::{Strategy as _, ValueTree as _};
use reqwest::Method;
use secretier::{access::Action, phase::Phase};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    app::{Backend, ENV, Setup, TestApp, drawn_anew},
    infisical_api::{Answer, Client, ON, log_in},
    quick::times,
};

/// One request a line, with what its client reads in the answer.
const RECORDED: &str = include_str!("../recordings/sdks.jsonl");

/// What stands in the recordings for what is different at each server.
const PROJECT: &str = "11111111-2222-4333-8444-555555555555";
const SECRET_ID: &str = "22222222-2222-4333-8444-555555555555";

#[derive(Deserialize)]
struct Recorded {
    client: String,
    call: String,
    method: String,
    path: String,
    query: String,
    headers: BTreeMap<String, String>,
    body: Value,
    needs: Vec<Need>,
    /// 200, where it is left out.
    status: Option<u16>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Need {
    Header { header: String },
    Field { field: String, is: String },
}

impl Need {
    /// Whether the answer has it. A field of a list is one of each of its elements.
    fn is_met(&self, answer: &Answer) -> bool {
        match self {
            Self::Header { header } => answer.headers.contains_key(header.as_str()),
            Self::Field { field, is } => has(&answer.json(), field, is),
        }
    }
}

fn has(value: &Value, field: &str, is: &str) -> bool {
    let (name, rest) = field.split_once('.').unwrap_or((field, ""));
    let found = |value: &Value| match (rest, is) {
        ("", "string") => value.is_string(),
        ("", "integer") => value.as_i64().is_some_and(|number| i32::try_from(number).is_ok()),
        ("", "array") => value.is_array(),
        ("", "object") => value.is_object(),
        ("", other) => panic!("{other} is no type"),
        (rest, is) => has(value, rest, is),
    };
    match name.strip_suffix("[]") {
        Some(name) => value[name].as_array().is_some_and(|values| values.iter().all(found)),
        None => found(&value[name]),
    }
}

/// Makes everything as the recorded call found it.
async fn prepare(app: &TestApp, recorded: &Recorded) {
    for name in ["DATABASE_URL", "JWT_SECRET", "a", "odd /name?&é", "NEW_KEY"] {
        // One client asks for the first version.
        if app.get("acme", name).await.status == 404 {
            app.put("acme", name, "made-up-value").await;
        }
    }
    for name in ["A", "NEWER"] {
        app.delete("acme", name).await;
    }
    if recorded.method == "POST" {
        app.delete("acme", "NEW_KEY").await;
    }
}

async fn replay(app: &TestApp, token: &str, recorded: &Recorded) -> Answer {
    let client = Client {
        token: log_in(app.instance(), token).await.json()["accessToken"].as_str().unwrap().to_owned(),
        project: app.world().project_id(),
    };
    let credentials = secretier::access::ClientCredentials::of(token).unwrap();
    let ours = |text: &str| {
        text.replace(PROJECT, &client.project)
            .replace(SECRET_ID, "acme.REFUQUJBU0VfVVJM")
            .replace("made-up-access-token", &client.token)
            .replace("made-up-static-token", &client.token)
            .replace("made-up-client-id", &credentials.client_id)
            .replace("made-up-client-secret", &credentials.client_secret)
    };
    let mut path = ours(&recorded.path);
    if !recorded.query.is_empty() {
        path = format!("{path}?{}", ours(&recorded.query));
    }
    let mut request = app.instance().request(recorded.method.parse::<Method>().unwrap(), &path);
    for (name, value) in &recorded.headers {
        request = request.header(name, ours(value));
    }
    if !recorded.body.is_null() {
        request = request.body(ours(&recorded.body.to_string()));
    }
    Answer::of(request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_recorded_request_of_a_client_gets_what_the_client_needs() {
    for phase in [Phase::Database, Phase::Hybrid, Phase::Infisical] {
        let app = Setup::new(Backend::sqlite(), phase).with(ON).start().await;
        let token = app.new_token("client", &["*"], &Action::ALL).await;
        let mut count = 0;
        for line in RECORDED.lines() {
            let recorded: Recorded = serde_json::from_str(line).unwrap();
            prepare(&app, &recorded).await;
            let answer = replay(&app, &token, &recorded).await;
            let what = format!("{phase}: {} of {}: {answer:?}", recorded.call, recorded.client);
            assert_eq!(answer.status, recorded.status.unwrap_or(200), "{what}");
            for need in &recorded.needs {
                let name = match need {
                    Need::Header { header } => header,
                    Need::Field { field, .. } => field,
                };
                assert!(need.is_met(&answer), "{name} is missing: {what}");
            }
            let is_list = recorded.query.contains("tenants%2Facme") && recorded.path.ends_with("/raw");
            if is_list && recorded.method == "GET" {
                assert!(!answer.json()["secrets"].as_array().unwrap().is_empty(), "{what}");
            }
            count += 1;
        }
        assert_eq!(count, 51);
    }
}

/// One random change: through the face, or upstream behind its back.
async fn change(app: &TestApp, client: &Client, phase: Phase, (what, name, value): (u8, u8, u8)) {
    let (name, value) = (format!("K{name}"), format!("v{value}"));
    let body = json!({ "environment": ENV, "secretPath": "/tenants/acme", "secretValue": value });
    let write = |method| client.request(app.instance(), method, &format!("/api/v3/secrets/raw/{name}")).json(&body);
    match what {
        0 => drop(Answer::of(write(Method::POST)).await),
        1 => drop(Answer::of(write(Method::DELETE)).await),
        2 if phase.owned_upstream() => {
            app.world().put(ENV, "/tenants/acme", &name, &value);
            assert_eq!(app.refresh("acme").await.status, 200);
        }
        _ => drop(Answer::of(write(Method::PATCH)).await),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_polls_by_the_etag_misses_no_change_and_fetches_none_twice() {
    for phase in [Phase::Database, Phase::Hybrid, Phase::Infisical] {
        let app = Setup::new(Backend::sqlite(), phase).with(ON).start().await;
        app.put("acme", "FIRST", "1").await;
        let client = Client::new(&app, "client", &["acme"], &Action::ALL).await;
        let list = async |etag: &str| {
            let path = format!("/api/v4/secrets?environment={ENV}&secretPath=/tenants/acme");
            Answer::of(client.request(app.instance(), Method::GET, &path).header("if-none-match", etag)).await
        };
        let mut runner = drawn_anew();
        let mut draw = || (0..4_u8, 0..4_u8, 0..3_u8).new_tree(&mut runner).unwrap().current();
        let mut held = list("").await;
        for number in 0..times(350, 60) {
            change(&app, &client, phase, draw()).await;
            let polled = list(held.headers["etag"].to_str().unwrap()).await;
            match polled.status {
                304 => assert_eq!(list("").await.text, held.text, "{phase}, {number}: a change was missed"),
                200 => {
                    assert_ne!(polled.text, held.text, "{phase}, {number}: nothing has changed");
                    held = polled;
                }
                _ => panic!("{polled:?}"),
            }
        }
    }
}
