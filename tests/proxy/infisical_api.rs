//! The face for Infisical's own clients: what they are told, and what they are never told.

use std::time::{Duration, Instant};

use reqwest::{Method, RequestBuilder, header};
use secretier::{
    access::{Action, ClientCredentials, NewToken},
    key_rotation::Rotation,
    phase::Phase,
    tiers::upstream::standin::Fault,
};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use crate::app::{Answer as Described, Backend, ENV, Instance, Setup, TestApp, eventually, on_both};
use crate::within::within;

pub(crate) const ON: &str = "[server.infisical_api]\nenabled = true\n";

/// An answer of the face, which the API's own description says nothing of.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: header::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) async fn of(request: RequestBuilder) -> Self {
        let answer = request.send().await.unwrap();
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        Self { status, headers, text: answer.text().await.unwrap() }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    fn etag(&self) -> String {
        self.headers["etag"].to_str().unwrap().to_owned()
    }

    /// The values of a list, or of a batch, by path and key.
    pub(crate) fn values(&self) -> Vec<(String, String)> {
        assert_eq!(self.status, 200, "{self:?}");
        let secrets = self.json()["secrets"].as_array().unwrap().clone();
        let word = |secret: &Value, name: &str| secret[name].as_str().unwrap().to_owned();
        let named = |secret: &Value| format!("{} {}", word(secret, "secretPath"), word(secret, "secretKey"));
        secrets.iter().map(|secret| (named(secret), word(secret, "secretValue"))).collect()
    }

    pub(crate) fn value(&self) -> String {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()["secret"]["secretValue"].as_str().unwrap().to_owned()
    }

    /// The status and the kind of an error, which has the form of Infisical's.
    #[track_caller]
    pub(crate) fn error(&self) -> (u16, String) {
        let body = self.json();
        assert_eq!(body["statusCode"], self.status, "{self:?}");
        assert!(body["message"].is_string() && body["reqId"].is_string(), "{self:?}");
        (self.status, body["error"].as_str().unwrap().to_owned())
    }
}

/// A client that has logged in.
pub(crate) struct Client {
    pub(crate) token: String,
    pub(crate) project: String,
}

impl Client {
    /// Logs in with a token that reaches these tenants.
    pub(crate) async fn new(app: &TestApp, name: &str, tenants: &[&str], actions: &[Action]) -> Self {
        let token = app.new_token(name, tenants, actions).await;
        let answer = log_in(app.instance(), &token).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let token = answer.json()["accessToken"].as_str().unwrap().to_owned();
        Self { token, project: app.world().project_id() }
    }

    pub(crate) fn request(&self, instance: &Instance, method: Method, path: &str) -> RequestBuilder {
        instance.request(method, path).bearer_auth(&self.token)
    }

    pub(crate) async fn list(&self, instance: &Instance, path: &str, more: &str) -> Answer {
        Answer::of(self.request(instance, Method::GET, &self.listing(path, more))).await
    }

    fn listing(&self, path: &str, more: &str) -> String {
        let project = &self.project;
        format!("/api/v3/secrets/raw?workspaceId={project}&environment={ENV}&secretPath={path}{more}")
    }

    pub(crate) async fn get(&self, instance: &Instance, path: &str, name: &str) -> Answer {
        let path = format!("/api/v3/secrets/raw/{name}?environment={ENV}&secretPath={path}");
        Answer::of(self.request(instance, Method::GET, &path)).await
    }

    async fn write(&self, app: &TestApp, method: Method, name: &str, more: Value) -> Answer {
        self.write_to(app, method, &format!("raw/{name}"), "/tenants/acme", more).await
    }

    pub(crate) async fn write_to(&self, app: &TestApp, method: Method, route: &str, path: &str, more: Value) -> Answer {
        let mut body = json!({ "workspaceId": self.project, "environment": ENV, "secretPath": path });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let request = self.request(app.instance(), method, &format!("/api/v3/secrets/{route}"));
        Answer::of(request.json(&body)).await
    }
}

pub(crate) async fn log_in(instance: &Instance, token: &str) -> Answer {
    let ClientCredentials { client_id, client_secret } = ClientCredentials::of(token).unwrap();
    log_in_with(instance, &client_id, &client_secret).await
}

async fn log_in_with(instance: &Instance, id: &str, secret: &str) -> Answer {
    let request = instance.request(Method::POST, "/api/v1/auth/universal-auth/login");
    Answer::of(request.json(&json!({ "clientId": id, "clientSecret": secret }))).await
}

async fn serving(backend: Backend, phase: Phase) -> TestApp {
    let app = Setup::new(backend, phase).with(ON).start().await;
    if phase == Phase::Database {
        app.put("acme", "A", "value-of-a").await;
        app.put("globex", "B", "value-of-b").await;
    } else {
        app.holds("acme", &[("A", "value-of-a")]);
        app.holds("globex", &[("B", "value-of-b")]);
    }
    app
}

const READ: &[Action] = &[Action::Read];
const BOTH: &[Action] = &[Action::Read, Action::Write];

#[tokio::test(flavor = "multi_thread")]
async fn a_client_reads_within_its_scope_and_meets_the_statuses_it_knows() {
    for phase in [Phase::Database, Phase::Hybrid, Phase::Infisical] {
        on_both(async |backend| {
            let app = serving(backend, phase).await;
            let client = Client::new(&app, &format!("acme-{phase}"), &["acme"], READ).await;
            let instance = app.instance();
            let list = client.list(instance, "/tenants/acme", "&include_imports=true").await;
            assert_eq!(list.values(), [("/tenants/acme A".to_owned(), "value-of-a".to_owned())]);
            assert_eq!(list.json()["imports"], json!([]));
            assert_eq!(client.list(instance, "%2Ftenants%2Facme%2F", "&recursive=False").await.text, list.text);
            let one = client.get(instance, "/tenants/acme", "A").await;
            assert_eq!(one.json()["secret"], list.json()["secrets"][0], "the same form singly and in a list");
            let id = one.json()["secret"]["id"].as_str().unwrap().to_owned();
            let by_id = format!("/api/v3/secrets/raw/id/{id}");
            assert_eq!(Answer::of(client.request(instance, Method::GET, &by_id)).await.text, one.text);
            let v4 = format!("/api/v4/secrets?projectId={}&secretPath=/tenants/acme", client.project);
            assert_eq!(Answer::of(client.request(instance, Method::GET, &v4)).await.text, list.text);

            let denied = (403, "PermissionDenied".to_owned());
            assert_eq!(client.list(instance, "/tenants/globex", "").await.error(), denied);
            assert_eq!(client.get(instance, "/tenants/globex", "B").await.error(), denied);
            assert_eq!(client.get(instance, "/tenants/nobody", "B").await.error(), denied, "as one that exists");
            assert_eq!(client.list(instance, "/other", "").await.error(), denied);
            assert_eq!(
                client.list(instance, "/tenants/acme", "&environment=dev").await.status,
                200,
                "the first counts"
            );
            let other = format!("/api/v3/secrets/raw?workspaceId={}&environment=dev", client.project);
            assert_eq!(Answer::of(client.request(instance, Method::GET, &other)).await.error(), denied);
            let other = "/api/v3/secrets/raw?workspaceId=22222222-2222-4333-8444-555555555555&secretPath=/tenants/acme";
            assert_eq!(Answer::of(client.request(instance, Method::GET, other)).await.error(), denied);
            let absent = (404, "NotFound".to_owned());
            assert_eq!(client.get(instance, "/tenants/acme", "NONE").await.error(), absent);
            let all = Client::new(&app, &format!("all-{phase}"), &["*"], READ).await;
            assert_eq!(all.list(instance, "/tenants/nobody", "").await.error(), absent);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_tenants_of_the_scope_are_one_list() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let app = serving(backend, phase).await;
            let client = Client::new(&app, &format!("some-{phase}"), &["acme", "glob*"], READ).await;
            let list = client.list(app.instance(), "/tenants", "&recursive=true").await;
            let expected = [("/tenants/acme A", "value-of-a"), ("/tenants/globex B", "value-of-b")];
            assert_eq!(list.values(), expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
            let one = Client::new(&app, &format!("one-{phase}"), &["globex"], READ).await;
            let list = one.list(app.instance(), "/", "&recursive=true").await;
            assert_eq!(list.values(), [("/tenants/globex B".to_owned(), "value-of-b".to_owned())]);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_all_tenants_is_whole_or_none() {
    let mut app = serving(Backend::sqlite(), Phase::Hybrid).await;
    let client = Client::new(&app, "all", &["*"], READ).await;
    assert_eq!(client.list(app.instance(), "/tenants/acme", "").await.status, 200);
    app.infisical.stop().await;
    let app = app.kill_and_start_again().await;
    let list = client.list(app.instance(), "/tenants", "&recursive=true").await;
    assert_eq!(list.error(), (503, "ServiceUnavailable".to_owned()), "which tenants there are is not known");
    assert_eq!(client.list(app.instance(), "/tenants/acme", "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_above_the_tenants_is_empty_only_where_that_is_proved() {
    let mut app = serving(Backend::sqlite(), Phase::Hybrid).await;
    let client = Client::new(&app, "all", &["*"], READ).await;
    let statuses = async |app: &TestApp| {
        let root = client.list(app.instance(), "/", "").await;
        (root.status, client.list(app.instance(), "/tenants", "").await.status)
    };
    assert_eq!(client.list(app.instance(), "/", "").await.text, r#"{"secrets":[],"imports":[]}"#);
    assert_eq!(statuses(&app).await, (200, 200));
    app.world().put(ENV, "/", "OF_THE_ROOT", "1");
    app.advance(Duration::from_secs(61));
    assert_eq!(statuses(&app).await, (403, 200));
    app.infisical.stop().await;
    app.advance(Duration::from_secs(61));
    assert_eq!(statuses(&app).await, (503, 503));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_access_token_outlives_a_kill_and_is_good_at_every_instance_and_on_both_faces() {
    on_both(async |backend| {
        let app = serving(backend, Phase::Database).await;
        let client = Client::new(&app, "acme", &["acme"], READ).await;
        assert!(!client.token.starts_with("st.") && client.token.split('.').count() == 3);
        let other = app.another().await;
        assert_eq!(client.get(&other, "/tenants/acme", "A").await.value(), "value-of-a");
        other.stop().await;
        let app = app.kill_and_start_again().await;
        assert_eq!(client.get(app.instance(), "/tenants/acme", "A").await.value(), "value-of-a");
        let request = client.request(app.instance(), Method::GET, "/v1/tenants/acme/secrets/A");
        assert_eq!(Described::of(request).await.value(), "value-of-a");
        let request = client.request(app.instance(), Method::GET, "/v1/tenants/globex/secrets/B");
        assert_eq!(Described::of(request).await.problem(), (403, "out_of_scope".to_owned()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_ends_its_access_tokens_within_a_second_at_every_instance() {
    on_both(async |backend| {
        let app = serving(backend, Phase::Database).await;
        let client = Client::new(&app, "acme", &["acme"], READ).await;
        let other = app.another().await;
        let instances = [app.instance(), &other];
        for instance in instances {
            assert_eq!(client.get(instance, "/tenants/acme", "A").await.status, 200);
        }
        app.instance().service.resolver.database().revoke_token("acme").await.unwrap();
        let began = Instant::now();
        for instance in instances {
            eventually(async || client.get(instance, "/tenants/acme", "A").await.status == 401).await;
        }
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        let answer = client.get(app.instance(), "/tenants/acme", "A").await;
        assert_eq!(answer.error(), (401, "Unauthorized".to_owned()));
        other.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_was_ended_is_over_with_what_it_was_renewed_by_and_the_others_of_its_token_are_not() {
    on_both(async |backend| {
        let app = serving(backend, Phase::Database).await;
        let token = app.new_token("acme", &["acme"], READ).await;
        let client_of = |answer: Answer| {
            let token = answer.json()["accessToken"].as_str().unwrap().to_owned();
            Client { token, project: app.world().project_id() }
        };
        let (client, other) =
            (client_of(log_in(app.instance(), &token).await), client_of(log_in(app.instance(), &token).await));
        let renew = app.instance().request(Method::POST, "/api/v1/auth/token/renew");
        let renewed = Answer::of(renew.bearer_auth("ended").json(&json!({ "accessToken": client.token }))).await;
        assert!(renewed.json()["expiresIn"].as_u64().unwrap() <= 30 * 24 * 3600, "it lasts no longer for it");
        let renewed = client_of(renewed);
        let request = renewed.request(app.instance(), Method::GET, "/v1/events");
        let mut stream = request.send().await.unwrap();
        assert_eq!(stream.status(), 200);
        let end = app.instance().request(Method::POST, "/api/v1/auth/token/revoke");
        let ended = Answer::of(end.json(&json!({ "accessToken": client.token }))).await;
        assert_eq!(ended.status, 200, "{ended:?}");
        let statuses = async |app: &TestApp| {
            let get = async |client: &Client| client.get(app.instance(), "/tenants/acme", "A").await.status;
            (get(&client).await, get(&renewed).await, get(&other).await)
        };
        assert_eq!(statuses(&app).await, (401, 401, 200));
        within("a stream that ends with its login", async { while let Ok(Some(_)) = stream.chunk().await {} }).await;
        let app = app.kill_and_start_again().await;
        assert_eq!(statuses(&app).await, (401, 401, 200));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_of_keys_ends_no_login() {
    on_both(async |backend| {
        let app = serving(backend, Phase::Database).await;
        let client = Client::new(&app, "acme", &["acme"], READ).await;
        for data_keys in [false, true] {
            let rotation = Rotation { data_keys, by: "test".to_owned(), patience: Duration::from_secs(30) };
            let (database, clock) = (app.instance().service.resolver.database(), app.instance().clock.clone());
            let signing =
                async || database.known_logins().await.unwrap().keys.iter().map(|key| key.id.clone()).collect();
            let before: Vec<String> = signing().await;
            rotation.run(database, &clock, &mut |_| {}).await.unwrap();
            let after: Vec<String> = signing().await;
            assert!(after.ends_with(&before) && after.len() == before.len() + usize::from(data_keys), "{after:?}");
            assert_eq!(client.get(app.instance(), "/tenants/acme", "A").await.status, 200);
        }
        let app = app.kill_and_start_again().await;
        assert_eq!(client.get(app.instance(), "/tenants/acme", "A").await.status, 200);
        let sealed = "SELECT count(*) FROM {}settings WHERE name = 'login_keys' AND value LIKE '%replaced_at%'";
        assert_eq!(app.setup.backend.number(sealed).await, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_are_refused_and_soon_held_back_and_right_ones_never_are() {
    let app = serving(Backend::sqlite(), Phase::Database).await;
    let token = app.new_token("acme", &["acme"], READ).await;
    let ClientCredentials { client_id, client_secret } = ClientCredentials::of(&token).unwrap();
    let other = ClientCredentials::of(&app.new_token("other", &["*"], READ).await).unwrap();
    let wrong = [
        (client_id.as_str(), other.client_secret.as_str()),
        ("22222222-2222-4333-8444-555555555555", client_secret.as_str()),
        (client_id.as_str(), "short"),
        ("", ""),
    ];
    for (id, secret) in wrong {
        let answer = log_in_with(app.instance(), id, secret).await;
        assert_eq!(answer.error(), (401, "Unauthorized".to_owned()), "{id}");
    }
    let mut last = None;
    for _ in 0..20 {
        last = Some(log_in_with(app.instance(), &client_id, &other.client_secret).await);
    }
    let held_back = last.unwrap();
    assert_eq!(held_back.error(), (429, "RateLimitExceeded".to_owned()));
    let seconds: u64 = held_back.headers["retry-after"].to_str().unwrap().parse().unwrap();
    let message = format!("Rate limit exceeded. Please try again in {seconds} seconds");
    assert_eq!(held_back.json()["message"], message);
    assert_eq!(log_in_with(app.instance(), &client_id, &client_secret).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_asks_too_often_is_told_when_to_come_again() {
    let more = format!("{ON}[access]\nrequests_per_second_per_token = 1\nburst_per_token = 5\n");
    let app = Setup::new(Backend::sqlite(), Phase::Database).with(&more).start().await;
    let client = Client::new(&app, "acme", &["acme"], READ).await;
    let mut limited = None;
    for _ in 0..10 {
        let answer = client.list(app.instance(), "/tenants/acme", "").await;
        limited = limited.or(Some(answer).filter(|answer| answer.status == 429));
    }
    let limited = limited.unwrap();
    assert_eq!(limited.error(), (429, "RateLimitExceeded".to_owned()));
    assert_eq!(limited.headers["retry-after"], "1");
    assert_eq!(limited.json()["message"], "Rate limit exceeded. Please try again in 1 seconds");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_infisical_is_down_a_copy_is_served_and_what_is_unknown_is_no_404() {
    for hangs in [false, true] {
        on_both(async |backend| {
            let mut setup = Setup::new(backend, Phase::Hybrid).with(ON);
            setup.upstream_timeout = "1s";
            let mut app = setup.start().await;
            let (copied, unread) = (format!("copied-{hangs}"), format!("unread-{hangs}"));
            app.holds(&copied, &[("A", "value-of-a")]);
            app.holds(&unread, &[("B", "value-of-b")]);
            let client = Client::new(&app, &format!("all-{hangs}"), &["*"], READ).await;
            let path = |tenant: &str| format!("/tenants/{tenant}");
            assert_eq!(client.get(app.instance(), &path(&copied), "A").await.status, 200);
            app.stored(1).await;
            match hangs {
                true => app.world().fault(Fault::Hang),
                false => app.infisical.stop().await,
            }
            app.restart().await;
            let began = Instant::now();
            assert_eq!(client.get(app.instance(), &path(&copied), "A").await.value(), "value-of-a");
            assert_eq!(client.list(app.instance(), &path(&copied), "").await.values().len(), 1);
            let unavailable = (503, "ServiceUnavailable".to_owned());
            for name in [&unread, "never-heard-of"] {
                let began = Instant::now();
                assert_eq!(client.get(app.instance(), &path(name), "B").await.error(), unavailable, "{name}");
                assert_eq!(client.list(app.instance(), &path(name), "").await.error(), unavailable, "{name}");
                assert!(began.elapsed() < Duration::from_secs(16), "{:?}", began.elapsed());
            }
            assert!(began.elapsed() < Duration::from_secs(32), "{:?}", began.elapsed());
            let token = app.new_token(&format!("new-{hangs}"), &["*"], READ).await;
            assert_eq!(log_in(app.instance(), &token).await.status, 200, "a login needs no Infisical");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_takes_longer_than_a_client_waits() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Infisical).with(ON);
    setup.upstream_timeout = "30s";
    let app = setup.start().await;
    app.holds("acme", &[("A", "1")]);
    let client = Client::new(&app, "acme", &["acme"], BOTH).await;
    app.world().fault(Fault::Hang);
    let began = Instant::now();
    let answer = client.get(app.instance(), "/tenants/acme", "A").await;
    assert_eq!(answer.error(), (503, "ServiceUnavailable".to_owned()));
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    assert!(answer.headers.contains_key("retry-after"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etag_changes_exactly_when_the_content_does() {
    for phase in [Phase::Database, Phase::Hybrid, Phase::Infisical] {
        on_both(async |backend| {
            let app = serving(backend, phase).await;
            let client = Client::new(&app, &format!("acme-{phase}"), &["acme", "glob*"], BOTH).await;
            let known = async |path: &str, more: &str, etag: &str| {
                let request = client.request(app.instance(), Method::GET, &client.listing(path, more));
                Answer::of(request.header(header::IF_NONE_MATCH, etag)).await.status
            };
            let places = [("/tenants/acme", ""), ("/tenants", "&recursive=true")];
            let etags = async || {
                let mut etags = Vec::new();
                for (path, more) in places {
                    etags.push(client.list(app.instance(), path, more).await.etag());
                }
                etags.push(client.get(app.instance(), "/tenants/acme", "A").await.etag());
                etags
            };
            let first = etags().await;
            assert!(first.iter().all(|etag| etag.starts_with('"') && etag.ends_with('"') && etag.len() > 20));
            assert_eq!(etags().await, first);
            for ((path, more), etag) in places.into_iter().zip(&first) {
                assert_eq!(known(path, more, etag).await, 304);
                assert_eq!(known(path, more, &format!("\"x\", W/{etag}")).await, 304);
                assert_eq!(known(path, more, "\"x\"").await, 200);
            }
            client.write(&app, Method::PATCH, "A", json!({ "secretValue": "another" })).await;
            let second = etags().await;
            assert!(first.iter().zip(&second).all(|(one, other)| one != other), "{phase}");
            client.write(&app, Method::POST, "NEW", json!({ "secretValue": "1" })).await;
            let third = etags().await;
            assert!(third[0] != second[0] && third[1] != second[1] && third[2] == second[2], "{phase}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etag_outlives_a_restart_in_every_phase() {
    for phase in [Phase::Database, Phase::Hybrid, Phase::Infisical] {
        let app = serving(Backend::sqlite(), phase).await;
        let client = Client::new(&app, "acme", &["acme"], READ).await;
        let before = client.list(app.instance(), "/tenants/acme", "").await;
        let app = app.kill_and_start_again().await;
        let after = client.list(app.instance(), "/tenants/acme", "").await;
        assert_eq!((after.etag(), after.text), (before.etag(), before.text), "{phase}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_answer_200_and_the_whole_secret() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let app = serving(backend, phase).await;
            let client = Client::new(&app, &format!("acme-{phase}"), &["acme"], BOTH).await;
            let made = client
                .write(&app, Method::POST, "K", json!({ "secretValue": "1", "type": "shared", "tagIds": null }))
                .await;
            assert_eq!(made.value(), "1");
            let read = client.get(app.instance(), "/tenants/acme", "K").await;
            assert_eq!(read.text, made.text, "{phase}");
            let again = client.write(&app, Method::POST, "K", json!({ "secretValue": "1" })).await;
            assert_eq!((again.value(), again.status), ("1".to_owned(), 200), "its answer was lost");
            let other = client.write(&app, Method::POST, "K", json!({ "secretValue": "2" })).await;
            assert_eq!(other.error(), (400, "BadRequest".to_owned()));
            assert_eq!(client.get(app.instance(), "/tenants/acme", "K").await.value(), "1");
            let changed =
                client.write(&app, Method::PATCH, "K", json!({ "secretValue": "2", "secretComment": null })).await;
            assert_eq!(changed.value(), "2");
            let id = |answer: &Answer| answer.json()["secret"]["id"].clone();
            assert_eq!(id(&changed), id(&made));
            let untouched = client.write(&app, Method::PATCH, "K", json!({ "secretComment": "c" })).await;
            assert_eq!(untouched.value(), "2");
            let renamed = client.write(&app, Method::PATCH, "K", json!({ "newSecretName": "L" })).await;
            assert_eq!((renamed.value(), renamed.json()["secret"]["secretKey"].clone()), ("2".to_owned(), json!("L")));
            assert_eq!(client.get(app.instance(), "/tenants/acme", "K").await.status, 404);
            let missing = client.write(&app, Method::PATCH, "K", json!({ "secretValue": "2" })).await;
            assert_eq!(missing.error(), (404, "NotFound".to_owned()));
            let gone = client.write(&app, Method::DELETE, "L", json!({ "type": "personal" })).await;
            assert_eq!(gone.value(), "2");
            assert_eq!(client.write(&app, Method::DELETE, "L", json!({})).await.error().0, 404);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_needs_the_right_to_it_and_a_tenant_that_exists() {
    let app = serving(Backend::sqlite(), Phase::Hybrid).await;
    let reader = Client::new(&app, "reader", &["*"], READ).await;
    let writer = Client::new(&app, "writer", &["*"], &[Action::Write]).await;
    let value = json!({ "secretValue": "1" });
    for method in [Method::POST, Method::PATCH, Method::DELETE] {
        assert_eq!(reader.write(&app, method.clone(), "A", value.clone()).await.error().0, 403);
        let batch = json!({ "secrets": [{ "secretKey": "A", "secretValue": "1" }] });
        assert_eq!(reader.write_to(&app, method, "batch/raw", "/tenants/acme", batch).await.error().0, 403);
    }
    let nobody = writer.write_to(&app, Method::POST, "raw/A", "/tenants/nobody", value.clone()).await;
    assert_eq!(nobody.error(), (404, "NotFound".to_owned()));
    // A guess at a value is not answered by whether the same is there.
    let guess = writer.write(&app, Method::POST, "A", json!({ "secretValue": "value-of-a" })).await;
    assert_eq!(guess.error().0, 400);
    let gone = writer.write(&app, Method::DELETE, "A", json!({})).await;
    assert_eq!((gone.value(), gone.json()["secret"]["secretValueHidden"].clone()), (String::new(), json!(true)));
    let large = json!({ "secretValue": "x".repeat((1 << 20) + 1) });
    assert_eq!(writer.write(&app, Method::POST, "BIG", large).await.error().0, 413);
    assert_eq!(writer.write(&app, Method::POST, "NONE", json!({ "secretValue": null })).await.error().0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_checked_as_a_whole_and_can_be_repeated() {
    on_both(async |backend| {
        let app = serving(backend, Phase::Hybrid).await;
        let client = Client::new(&app, "acme", &["acme"], BOTH).await;
        let batch = async |method: Method, secrets: Value| {
            client.write_to(&app, method, "batch/raw", "/tenants/acme", json!({ "secrets": secrets })).await
        };
        let two = json!([{ "secretKey": "X", "secretValue": "1" }, { "secretKey": "Y z", "secretValue": "2" }]);
        let made = batch(Method::POST, two.clone()).await;
        assert_eq!(made.values().len(), 2);
        assert_eq!(batch(Method::POST, two).await.values(), made.values());
        let wrong = json!([{ "secretKey": "W", "secretValue": "1" }, { "secretKey": "bad\u{7}", "secretValue": "2" }]);
        assert_eq!(batch(Method::POST, wrong).await.error().0, 400);
        assert_eq!(client.get(app.instance(), "/tenants/acme", "W").await.status, 404);
        let changed = batch(Method::PATCH, json!([{ "secretKey": "X", "secretValue": "3" }])).await;
        assert_eq!(changed.values()[0].1, "3");
        // Nothing is changed where a part of it is not there, and a deletion goes on where it was interrupted.
        let half = json!([{ "secretKey": "X", "secretValue": "4" }, { "secretKey": "NONE", "secretValue": "4" }]);
        assert_eq!(batch(Method::PATCH, half).await.error().0, 404);
        assert_eq!(client.get(app.instance(), "/tenants/acme", "X").await.value(), "3");
        let elsewhere = json!([{ "secretKey": "E", "secretValue": "1", "secretPath": "/tenants/globex" }]);
        assert_eq!(batch(Method::POST, elsewhere).await.error().0, 400);
        let both = json!([{ "secretKey": "X" }, { "secretKey": "GONE" }, { "secretKey": "Y z" }]);
        assert_eq!(batch(Method::DELETE, both.clone()).await.status, 200);
        assert_eq!(batch(Method::DELETE, both).await.error().0, 404);
        assert_eq!(client.list(app.instance(), "/tenants/acme", "").await.values().len(), 1);
        assert_eq!(batch(Method::POST, json!([])).await.error().0, 400);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_are_the_tenants_of_the_scope_and_only_an_empty_one_is_deleted() {
    for phase in [Phase::Database, Phase::Hybrid] {
        on_both(async |backend| {
            let app = serving(backend, phase).await;
            let all = Client::new(&app, &format!("all-{phase}"), &["acme", "new*"], &Action::ALL).await;
            let writer = Client::new(&app, &format!("writer-{phase}"), &["new*"], BOTH).await;
            let folders = async |client: &Client, path: &str| {
                let path = format!("/api/v1/folders?environment={ENV}&directory={path}");
                let answer = Answer::of(client.request(app.instance(), Method::GET, &path)).await;
                let names = answer.json()["folders"].as_array().unwrap().clone();
                names.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
            };
            assert_eq!(folders(&all, "/tenants").await, ["acme"]);
            assert_eq!(folders(&writer, "/").await, ["tenants"]);
            let create = async |client: &Client, name: &str| {
                let body = json!({ "projectId": client.project, "environment": ENV, "path": "/tenants", "name": name });
                Answer::of(client.request(app.instance(), Method::POST, "/api/v2/folders").json(&body)).await
            };
            assert_eq!(create(&writer, "acme").await.error().0, 403);
            for _ in 0..2 {
                let made = create(&writer, "newco").await;
                assert_eq!((made.status, made.json()["folder"]["name"].clone()), (200, json!("newco")));
            }
            assert_eq!(folders(&all, "/tenants").await, ["acme", "newco"]);
            assert_eq!(writer.list(app.instance(), "/tenants/newco", "").await.values(), []);
            let delete = async |client: &Client, name: &str| {
                let body = json!({ "workspaceId": client.project, "environment": ENV, "directory": "/tenants" });
                let path = format!("/api/v1/folders/{name}");
                Answer::of(client.request(app.instance(), Method::DELETE, &path).json(&body)).await
            };
            assert_eq!(delete(&writer, "newco").await.error().0, 403);
            assert_eq!(delete(&all, "acme").await.error(), (400, "BadRequest".to_owned()));
            assert_eq!(all.get(app.instance(), "/tenants/acme", "A").await.value(), "value-of-a");
            assert_eq!(delete(&all, "folder.newco").await.status, 200);
            assert_eq!(folders(&all, "/tenants").await, ["acme"]);
            assert_eq!(delete(&all, "newco").await.error().0, 404);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_whose_key_waits_for_its_master_key_is_not_taken_for_ended() {
    let mut app = Setup::new(Backend::sqlite(), Phase::Hybrid).with(ON).start().await;
    app.holds("acme", &[("A", "1")]);
    let client = Client::new(&app, "acme", &["acme"], BOTH).await;
    assert_eq!(client.get(app.instance(), "/tenants/acme", "A").await.value(), "1");
    // Another master key in its place: what the one before sealed does not open.
    let key = std::fs::read(&app.key_file).unwrap();
    std::fs::write(&app.key_file, hex::encode(rand::random::<[u8; 32]>())).unwrap();
    app.restart().await;
    assert_eq!(client.get(app.instance(), "/tenants/acme", "A").await.error().0, 503);
    std::fs::write(&app.key_file, key).unwrap();
    app.restart().await;
    assert_eq!(client.get(app.instance(), "/tenants/acme", "A").await.value(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_project_is_served_and_no_other() {
    let app =
        Setup::new(Backend::sqlite(), Phase::Database).with(&format!("{ON}project_slug = \"ours\"\n")).start().await;
    let client = Client::new(&app, "acme", &["acme"], READ).await;
    let ask = async |path: &str| Answer::of(client.request(app.instance(), Method::GET, path)).await;
    let id = &client.project;
    for path in ["v1/projects/slug/ours", "v2/workspace/ours", "v1/workspace/slug/ours", &format!("v1/workspace/{id}")]
    {
        let project = ask(&format!("/api/{path}")).await;
        for told in [&project.json(), &project.json()["workspace"], &project.json()["project"]] {
            assert_eq!((&told["id"], &told["slug"]), (&json!(id), &json!("ours")), "{path}");
        }
    }
    for path in ["v1/projects/slug/other", "v2/workspace/other", "v1/workspace/22222222-2222-4333-8444-555555555555"] {
        assert_eq!(ask(&format!("/api/{path}")).await.error().0, 403, "{path}");
    }
    assert_eq!(ask("/api/v3/secrets/raw?workspaceSlug=other&secretPath=/tenants/acme").await.error().0, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_that_is_unknown_is_told_as_infisical_tells_it_and_off_is_off() {
    let app = Setup::new(Backend::sqlite(), Phase::Database).with(ON).start().await;
    let ask = async |method: Method, path: &str| Answer::of(app.instance().request(method, path)).await;
    let unknown = ask(Method::GET, "/api/x").await;
    let body = r#"{"statusCode":404,"message":"Route GET:/api/x not found","error":"Not Found"}"#;
    assert_eq!((unknown.status, unknown.json()), (404, serde_json::from_str::<Value>(body).unwrap()));
    for (method, path) in [
        (Method::PUT, "/api/v3/secrets/raw/A"),
        (Method::GET, "/api/v3/secrets/raw/a/b"),
        (Method::GET, "/api/v3/secrets/"),
    ] {
        let answer = ask(method.clone(), path).await;
        assert_eq!(answer.json()["message"], format!("Route {method}:{path} not found"));
    }
    for path in ["/api/status", "/api/status/", "//api/status", "/api/api/status"] {
        let status = Answer::of(app.instance().request(Method::GET, path).bearer_auth("ended")).await;
        assert_eq!((status.status, status.json()["message"].clone()), (200, json!("Ok")), "{path}");
    }
    app.reload(|setup| setup.more = setup.more.replace("enabled = true", "enabled = false")).await.unwrap();
    let off = app.ask(Method::GET, "/api/status").await;
    assert_eq!(off.problem(), (404, "route_not_found".to_owned()));
    app.reload(|_| {}).await.unwrap();
    assert_eq!(ask(Method::GET, "/api/status").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_what_they_are_however_odd() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).with(ON).start().await;
        let client = Client::new(&app, "acme", &["acme"], BOTH).await;
        app.put("acme", "FIRST", "1").await;
        for name in ["odd /name?&é", "%41", "a.b", "-", "id", "batch", "🔑", "a+b", "{x}"] {
            let encoded = percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC).to_string();
            assert_eq!(client.write(&app, Method::POST, &encoded, json!({ "secretValue": name })).await.value(), name);
            let read = client.get(app.instance(), "/tenants/acme", &encoded).await;
            assert_eq!((read.value(), read.json()["secret"]["secretKey"].clone()), (name.to_owned(), json!(name)));
            let id = read.json()["secret"]["id"].as_str().unwrap().to_owned();
            let by_id = client.request(app.instance(), Method::GET, &format!("/api/v3/secrets/raw/id/{id}"));
            assert_eq!(Answer::of(by_id).await.text, read.text);
        }
        assert_eq!(client.list(app.instance(), "/tenants/acme", "").await.values().len(), 10);
        // One that Infisical gave is not proved absent.
        for (id, status) in [("22222222-2222-4333-8444-555555555555", 400), ("nothing", 404)] {
            let by_id = client.request(app.instance(), Method::GET, &format!("/api/v3/secrets/raw/id/{id}"));
            assert_eq!(Answer::of(by_id).await.error().0, status);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_nothing_that_answers_a_value_is_a_read_on_record() {
    on_both(async |backend| {
        let mut app = serving(backend, Phase::Database).await;
        let client = Client::new(&app, "acme", &["acme"], BOTH).await;
        assert_eq!(client.write(&app, Method::PATCH, "A", json!({})).await.value(), "value-of-a");
        app.stop().await;
        let reads =
            "SELECT count(*) FROM {}audit_records WHERE action = 'read' AND tenant = 'acme' AND outcome = 'found'";
        assert!(app.setup.backend.number(reads).await > 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_names_the_face_and_the_tenant_and_nothing_holds_a_value() {
    on_both(async |backend| {
        let app = serving(backend, Phase::Database).await;
        let client = Client::new(&app, "acme", &["acme"], BOTH).await;
        client.list(app.instance(), "/tenants/acme", "").await;
        client.get(app.instance(), "/tenants/globex", "B").await;
        client.write(&app, Method::PATCH, "A", json!({ "secretValue": "value-of-a" })).await;
        let asked = app.get("acme", "A").await;
        assert_eq!(asked.value(), "value-of-a");
        let mut app = app;
        app.stop().await;
        let number = async |matching: &str| {
            let sql = format!("SELECT count(*) FROM {{}}audit_records WHERE {matching}");
            app.setup.backend.number(&sql).await
        };
        let face = "detail LIKE '%\"face\":\"infisical\"%'";
        for (action, tenant, outcome) in [
            ("login", "IS NULL", "done"),
            ("list", "= 'acme'", "found"),
            ("read", "= 'acme'", "found"),
            ("read", "= 'globex'", "denied"),
            ("put", "= 'acme'", "done"),
        ] {
            let of = format!("action = '{action}' AND tenant {tenant} AND outcome = '{outcome}' AND {face}");
            assert!(number(&of).await > 0, "{of}");
        }
        assert!(number(&format!("action = 'read' AND NOT ({face})")).await > 0, "our own API has no such mark");
        let secret_part = client.token.rsplit_once('.').unwrap().1;
        assert_eq!(number(&format!("detail LIKE '%value-of%' OR detail LIKE '%{secret_part}%'")).await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_ends_soon_gives_an_access_token_that_ends_with_it() {
    let app = Setup::new(Backend::sqlite(), Phase::Database).with(ON).start().await;
    app.put("acme", "A", "1").await;
    let new = NewToken {
        name: "short".to_owned(),
        tenants: vec!["acme".to_owned()],
        keys: vec!["*".to_owned()],
        actions: vec![Action::Read],
        lifetime: Some(Duration::from_secs(3600)),
    };
    let (token, row) = new.draw(app.instance().clock.now()).unwrap();
    app.instance().service.resolver.database().insert_token(&row).await.unwrap();
    // It is known to the database alone.
    let login = log_in(app.instance(), token.expose()).await.json();
    let seconds = login["expiresIn"].as_u64().unwrap();
    assert!((3500..=3600).contains(&seconds) && login["tokenType"] == "Bearer", "{login}");
    let client = Client { token: login["accessToken"].as_str().unwrap().to_owned(), project: String::new() };
    assert_eq!(client.get(app.instance(), "/tenants/acme", "A").await.value(), "1");
    app.advance(Duration::from_secs(3601));
    assert_eq!(client.get(app.instance(), "/tenants/acme", "A").await.error().0, 401);
    let long = log_in(app.instance(), &app.token).await.json();
    assert_eq!(long["expiresIn"], 30 * 24 * 60 * 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_is_too_long_is_refused_before_it_is_made() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Database).with(ON);
    setup.server = "max_answers_per_token = \"96KiB\"\n".to_owned();
    let app = setup.start().await;
    let long = "x".repeat(30 << 10);
    for tenant in ["one", "two", "three", "four"] {
        app.put(tenant, "A", &long).await;
    }
    let few = Client::new(&app, "few", &["one", "two"], READ).await;
    let all = Client::new(&app, "all", &["*"], READ).await;
    let list = async |client: &Client| client.list(app.instance(), "/tenants", "&recursive=true").await;
    assert_eq!(list(&all).await.error(), (413, "PayloadTooLarge".to_owned()));
    assert_eq!(all.list(app.instance(), "/tenants/one", "").await.status, 200);
    assert_eq!(list(&few).await.values().len(), 2);
    app.reload(|setup| setup.server.clear()).await.unwrap();
    assert_eq!(list(&all).await.values().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_that_are_sent_slowly_keep_nobody_out() {
    let app = Setup::new(Backend::sqlite(), Phase::Database).with(ON).start().await;
    let address = app.url().trim_start_matches("http://").to_owned();
    let head = "POST /api/v1/auth/universal-auth/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{";
    let mut slow = Vec::new();
    for _ in 0..100 {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    let began = Instant::now();
    assert_eq!(log_in(app.instance(), &app.token).await.status, 200);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let page = app.metrics().await;
    assert!(page.contains("secretier_limited_total{limit=\"logins\"}"), "a slow one made room for the next");
}
