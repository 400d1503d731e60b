//! Rotation with a rotator: a provider that counts the credentials which are valid there, and loses
//! answers, refuses and hangs on demand.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use reqwest::Method;
use secretier::phase::Phase;
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::{net::TcpListener, sync::Notify};

use crate::app::{Answer, Setup, TestApp, eventually, on_both, secret};

const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";

/// What the provider does to the next request of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// It does what was asked, and breaks the connection off.
    LosesTheAnswer,
    /// It answers this, and does nothing.
    Answers(u16),
    /// It does what was asked, and does not answer before it is told to.
    Hangs,
}

#[derive(Default)]
struct State {
    /// The credentials that are valid.
    live: BTreeSet<String>,
    /// What it has made, by the id of the request.
    made: BTreeMap<String, String>,
    asked: Vec<String>,
    faults: BTreeMap<&'static str, Vec<Fault>>,
}

struct Provider {
    state: Mutex<State>,
    /// Notified when a request hangs.
    hangs: Notify,
    port: u16,
}

impl Provider {
    /// Begins with one credential.
    async fn start(first: &str) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Mutex::new(State { live: BTreeSet::from([first.to_owned()]), ..State::default() });
        let provider = Arc::new(Self { state, hangs: Notify::new(), port });
        let serving = Arc::clone(&provider);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let provider = Arc::clone(&serving);
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let provider = Arc::clone(&provider);
                        async move { provider.answer(request).await }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        provider
    }

    fn rule(&self, more: &str) -> String {
        format!(
            "[[rotation]]\nkeys = \"API_KEY\"\ngrace = \"1h\"\n{more}\
             rotator = {{ kind = \"webhook\", url = \"http://127.0.0.1:{}/\", secret = \"whsec_{}\" }}\n",
            self.port,
            STANDARD.encode(SECRET)
        )
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn fails(&self, step: &'static str, faults: &[Fault]) {
        self.state().faults.insert(step, faults.to_vec());
    }

    fn live(&self) -> Vec<String> {
        self.state().live.iter().cloned().collect()
    }

    /// The steps that it was asked for, without repetitions in a row.
    fn steps(&self) -> Vec<String> {
        let mut steps = self.state().asked.clone();
        steps.dedup();
        steps
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, std::io::Error> {
        let header = |name: &str| request.headers().get(name).unwrap().to_str().unwrap().to_owned();
        let (id, time, signature) = (header("webhook-id"), header("webhook-timestamp"), header("webhook-signature"));
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let mut mac = Hmac::<Sha256>::new_from_slice(SECRET).unwrap();
        mac.update(format!("{id}.{time}.").as_bytes());
        mac.update(&body);
        assert_eq!(signature, format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())), "it is signed");
        let body: Value = serde_json::from_slice(&body).unwrap();
        let step = body["step"].as_str().unwrap().to_owned();
        assert!(id.starts_with(&format!("{}.{step}", body["rotation"].as_str().unwrap())), "{id}");
        assert_eq!((&body["tenant"], &body["key"]), (&json!("acme"), &json!("API_KEY")));
        let fault = {
            let mut state = self.state();
            state.asked.push(step.clone());
            state
                .faults
                .iter_mut()
                .find(|(of, _)| **of == step)
                .and_then(|(_, faults)| (!faults.is_empty()).then(|| faults.remove(0)))
        };
        if let Some(Fault::Answers(status)) = fault {
            return Ok(answered(status, &json!({})));
        }
        let done = self.done(&id, &step, &body);
        match fault {
            Some(Fault::LosesTheAnswer) => Err(std::io::ErrorKind::ConnectionReset.into()),
            Some(Fault::Hangs) => {
                self.hangs.notify_one();
                std::future::pending::<Infallible>().await;
                unreachable!()
            }
            Some(Fault::Answers(_)) | None => Ok(done),
        }
    }

    /// Does what was asked. Asked twice under one id, it is done once.
    fn done(&self, id: &str, step: &str, body: &Value) -> Response<Full<Bytes>> {
        let mut state = self.state();
        let is_live = |state: &State, value: &Value| state.live.contains(value.as_str().unwrap_or_default());
        match step {
            "create" => {
                assert!(is_live(&state, &body["current"]), "{body}");
                let number = state.made.len() + 2;
                let value = state.made.entry(id.to_owned()).or_insert_with(|| format!("credential {number}")).clone();
                answered(200, &json!({ "value": value }))
            }
            "set" => {
                let candidate = body["candidate"].as_str().unwrap().to_owned();
                state.live.insert(candidate);
                answered(200, &json!({}))
            }
            "test" => answered(if is_live(&state, &body["candidate"]) { 200 } else { 400 }, &json!({})),
            "revoke" => {
                assert!(is_live(&state, &body["current"]), "what is served stays valid: {body}");
                state.live.remove(body["previous"].as_str().unwrap());
                answered(200, &json!({}))
            }
            other => panic!("{other} is no step of a rotator"),
        }
    }
}

fn answered(status: u16, body: &Value) -> Response<Full<Bytes>> {
    Response::builder().status(status).body(Full::new(body.to_string().into())).unwrap()
}

impl TestApp {
    async fn rotate_api_key(&self) -> Answer {
        Answer::of(self.request(Method::POST, &format!("{}/rotate", secret("acme", "API_KEY"))).json(&json!({}))).await
    }

    async fn api_key_rotation(&self) -> Value {
        self.ask(Method::GET, &format!("{}/rotation", secret("acme", "API_KEY"))).await.json()
    }

    /// Lets pauses pass until the rotation is in this state.
    async fn until(&self, state: &str, step: &str) {
        eventually(async || {
            let rotation = self.api_key_rotation().await;
            if rotation["tries"].as_u64().is_some_and(|tries| tries > 0) && rotation["state"] == "running" {
                self.advance(Duration::from_secs(2 * 60 * 60));
            }
            rotation["state"] == state && rotation["step"] == step
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotator_makes_a_credential_that_takes_over_and_the_old_one_is_revoked_after_its_time() {
    for phase in [Phase::Database, Phase::Infisical] {
        on_both(async |backend| {
            let provider = Provider::start("credential 1").await;
            let app = Setup::new(backend, phase).with(&provider.rule("")).start().await;
            app.put("acme", "API_KEY", "credential 1").await;
            assert_eq!(app.rotate_api_key().await.json()["kind"], "webhook");
            app.until("running", "wait").await;
            assert_eq!(app.get("acme", "API_KEY").await.value(), "credential 2", "{phase}");
            assert_eq!(provider.live(), ["credential 1", "credential 2"], "both are valid for the grace");
            app.advance(Duration::from_secs(60 * 60));
            app.until("completed", "revoke").await;
            assert_eq!(provider.live(), ["credential 2"]);
            assert_eq!(provider.steps(), ["create", "set", "test", "revoke"]);
            assert_eq!(app.api_key_rotation().await["orphaned"], false);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_and_a_server_that_fails_are_asked_again_and_nothing_is_made_twice() {
    on_both(async |backend| {
        let provider = Provider::start("credential 1").await;
        let app = Setup::new(backend, Phase::Database).with(&provider.rule("")).start().await;
        app.put("acme", "API_KEY", "credential 1").await;
        for step in ["create", "set", "test", "revoke"] {
            provider.fails(step, &[Fault::LosesTheAnswer, Fault::Answers(503)]);
        }
        app.rotate_api_key().await;
        app.until("running", "wait").await;
        app.advance(Duration::from_secs(60 * 60));
        app.until("completed", "revoke").await;
        assert_eq!((provider.live(), provider.state().made.len()), (vec!["credential 2".to_owned()], 1));
        assert_eq!(app.get("acme", "API_KEY").await.value(), "credential 2");
        assert!(provider.state().asked.len() >= 12, "each step three times");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_will_not_pass_stops_the_rotation_with_the_current_value_untouched_and_is_reported() {
    on_both(async |backend| {
        let provider = Provider::start("credential 1").await;
        let app = Setup::new(backend, Phase::Database).with(&provider.rule("")).start().await;
        app.put("acme", "API_KEY", "credential 1").await;
        provider.fails("test", &[Fault::Answers(403)]);
        app.rotate_api_key().await;
        app.until("failed", "test").await;
        let rotation = app.api_key_rotation().await;
        assert_eq!((&rotation["error"]["code"], &rotation["orphaned"]), (&json!("rotator_refused"), &json!(true)));
        assert_eq!(app.get("acme", "API_KEY").await.value(), "credential 1");
        assert!(app.metrics().await.contains("secretier_secret_rotations_total{state=\"orphaned\"} 1"));
        // Somebody has put it right.
        let retried = app.ask(Method::POST, &format!("{}/rotation/retry", secret("acme", "API_KEY"))).await;
        assert_eq!(retried.status, 202);
        app.until("running", "wait").await;
        assert_eq!(app.get("acme", "API_KEY").await.value(), "credential 2");

        // What goes on failing is given up after the fifth time.
        provider.fails("revoke", &[Fault::Answers(500); 5]);
        app.advance(Duration::from_secs(60 * 60));
        app.until("failed", "revoke").await;
        let rotation = app.api_key_rotation().await;
        assert_eq!((&rotation["tries"], &rotation["orphaned"]), (&json!(5), &json!(true)), "the old one may be valid");
        assert_eq!(provider.live(), ["credential 1", "credential 2"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_killed_in_the_middle_of_any_step_leaves_one_credential_in_the_end() {
    on_both(async |backend| {
        let provider = Provider::start("credential 1").await;
        let rule = provider.rule("").replace("1h", "0s");
        let mut app = Setup::new(backend.clone(), Phase::Database).with(&rule).start().await;
        app.put("acme", "API_KEY", "credential 1").await;
        let steps = ["create", "set", "test", "revoke"];
        for step in steps {
            provider.fails(step, &[Fault::Hangs]);
        }
        app.rotate_api_key().await;
        for step in steps {
            crate::within::within("the provider is asked", provider.hangs.notified()).await;
            assert_eq!(provider.steps().last().unwrap(), step);
            let served = app.get("acme", "API_KEY").await.value();
            assert!(provider.live().contains(&served), "what is served is valid: {step}: {served}");
            app.kill().await;
            // Its lease has ended, and somebody has said that it runs no more.
            backend.sql("UPDATE leases SET until = 0; DELETE FROM instances").await;
            app = app.start_again().await;
        }
        app.until("completed", "revoke").await;
        let served = app.get("acme", "API_KEY").await.value();
        assert_eq!((provider.live(), served.as_str()), (vec![served.clone()], "credential 2"));
        assert_eq!(app.api_key_rotation().await["orphaned"], false);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_whose_form_is_refused_is_made_anew() {
    on_both(async |backend| {
        let provider = Provider::start("credential 1").await;
        let app = Setup::new(backend, Phase::Database).with(&provider.rule("")).start().await;
        app.put("acme", "API_KEY", "credential 1").await;
        provider.fails("set", &[Fault::Answers(422), Fault::Answers(422)]);
        app.rotate_api_key().await;
        app.until("running", "wait").await;
        assert_eq!(provider.steps(), ["create", "set", "create", "set", "create", "set", "test"]);
        // It goes to the configured server, and to no other once that is configured.
        let other = Provider::start("credential 1").await;
        let served = app.get("acme", "API_KEY").await.value();
        other.state().live.insert(served);
        app.reload(|setup| setup.more = other.rule("")).await.unwrap();
        app.advance(Duration::from_secs(60 * 60));
        eventually(async || other.state().asked.contains(&"revoke".to_owned())).await;
        assert!(!provider.state().asked.contains(&"revoke".to_owned()));
    })
    .await;
}
