//! The callers: reads, writes, deletions, and changes in Infisical behind the instances.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    model::{By, HYBRID, KEYS, Model, OWNED, QUIET, owner},
    report::Report,
    stage::{ENV, INSTANCES, Scene},
};

/// Gives every secret its first value.
pub(crate) async fn prepare(scene: &Scene, model: &Model) {
    for (tenant, key) in HYBRID.iter().flat_map(|tenant| KEYS.map(|key| (*tenant, key))) {
        change_in_infisical(scene, model, tenant, key, model.next_value(tenant, key).into());
    }
    for (tenant, key) in OWNED.iter().flat_map(|tenant| KEYS.map(|key| (*tenant, key))) {
        let value = model.next_value(tenant, key);
        model.begin(tenant, key, Some(value.clone()), By::Instance(0));
        let path = format!("{}?create_tenant=true", secret(tenant, key));
        let put = scene.request(0, Method::PUT, &path).json(&json!({ "value": value }));
        assert!(put.send().await.unwrap().status().is_success());
        model.acknowledge(tenant, key);
    }
}

/// Asks until `stopped`.
pub(crate) async fn caller(
    seed: u64,
    scene: Arc<Scene>,
    model: Arc<Model>,
    report: Arc<Report>,
    stopped: watch::Receiver<bool>,
) {
    let mut random = StdRng::seed_from_u64(seed);
    while !*stopped.borrow() {
        let instance = random.random_range(0..INSTANCES);
        let number = random.random_range(0..HYBRID.len());
        let tenant = if random.random_bool(0.5) { HYBRID[number] } else { OWNED[number] };
        let key = KEYS[random.random_range(0..KEYS.len())];
        let ask = Ask { scene: &scene, model: &model, report: &report, instance, tenant, key };
        match random.random_range(0..100) {
            0..68 => ask.get().await,
            68..78 => ask.batch().await,
            78..86 => ask.list().await,
            _ if number < QUIET => ask.get().await,
            86..94 => ask.put().await,
            94..96 => ask.delete().await,
            // Nobody but the database changes what it owns.
            _ if owner(tenant) == "database" => ask.put().await,
            _ => ask.change_in_infisical(random.random_bool(0.8)).await,
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(1..20))).await;
    }
}

/// One request.
struct Ask<'a> {
    scene: &'a Scene,
    model: &'a Model,
    report: &'a Report,
    instance: usize,
    tenant: &'a str,
    key: &'a str,
}

/// An answer, read whole.
struct Answer {
    status: u16,
    tier: Option<&'static str>,
    age: Duration,
    body: Value,
}

impl Ask<'_> {
    async fn get(&self) {
        let asked = Instant::now();
        let Some(answer) = self.send("get", Method::GET, &secret(self.tenant, self.key), None).await else { return };
        match answer.status {
            200 => {
                self.check(self.key, asked, answer.body["value"].as_str());
                if answer.tier == Some("memory") {
                    self.model.has_copy(self.instance, (self.tenant, self.key), asked, answer.age);
                }
            }
            404 => self.check(self.key, asked, None),
            _ => self.failed(&answer, &[self.key]),
        }
    }

    async fn batch(&self) {
        let asked = Instant::now();
        let path = format!("/v1/tenants/{}/secrets/batch-get", self.tenant);
        let Some(answer) = self.send("batch", Method::POST, &path, Some(json!({ "keys": KEYS }))).await else { return };
        match answer.status {
            200 => self.check_all(asked, &answer.body["secrets"]),
            _ => self.failed(&answer, &KEYS),
        }
    }

    async fn list(&self) {
        let asked = Instant::now();
        let path = format!("/v1/tenants/{}/secrets?values=true", self.tenant);
        let Some(answer) = self.send("list", Method::GET, &path, None).await else { return };
        match answer.status {
            200 => self.check_all(asked, &answer.body["keys"]),
            404 => self.check_all(asked, &json!([])),
            // That memory has each of the keys does not make a list.
            _ => self.failed(&answer, &[]),
        }
    }

    async fn put(&self) {
        let Self { model, tenant, key, .. } = *self;
        let _turn = model.turn(tenant, key).await;
        let value = model.next_value(tenant, key);
        model.begin(tenant, key, Some(value.clone()), By::Instance(self.instance));
        let answer = self.send("put", Method::PUT, &secret(tenant, key), Some(json!({ "value": value }))).await;
        self.settle(answer.as_ref());
    }

    async fn delete(&self) {
        let Self { model, tenant, key, .. } = *self;
        let _turn = model.turn(tenant, key).await;
        let asked = Instant::now();
        model.begin(tenant, key, None, By::Instance(self.instance));
        let answer = self.send("delete", Method::DELETE, &secret(tenant, key), None).await;
        match answer {
            Some(Answer { status: 404, .. }) => {
                model.refuse(tenant, key);
                // It says that there was none.
                self.check(key, asked, None);
            }
            answer => self.settle(answer.as_ref()),
        }
    }

    /// Notes how a change ended: done, not begun, or nobody knows.
    fn settle(&self, answer: Option<&Answer>) {
        match answer {
            Some(answer) if answer.status < 300 => self.model.acknowledge(self.tenant, self.key),
            Some(answer) if answer.body["code"] == "audit_unavailable" => self.model.refuse(self.tenant, self.key),
            Some(answer) => self.failed(answer, &[]),
            None => {}
        }
    }

    async fn change_in_infisical(&self, puts: bool) {
        let Self { scene, model, tenant, key, .. } = *self;
        let _turn = model.turn(tenant, key).await;
        self.report.request("change in Infisical");
        change_in_infisical(scene, model, tenant, key, puts.then(|| model.next_value(tenant, key)));
    }

    async fn send(&self, what: &'static str, method: Method, path: &str, body: Option<Value>) -> Option<Answer> {
        self.report.request(what);
        let mut request = self.scene.request(self.instance, method, path);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = async {
            let answer = request.send().await?;
            let header =
                |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
            let (tier, age) = (tier(header("cache-status")), header("age").parse().unwrap_or(0));
            let (status, age) = (answer.status().as_u16(), Duration::from_secs(age));
            let text = answer.bytes().await?;
            Ok::<_, reqwest::Error>(Answer {
                status,
                tier,
                age,
                body: serde_json::from_slice(&text).unwrap_or_default(),
            })
        };
        match answer.await {
            Ok(answer) => {
                self.report.answer(what, answer.tier, answer.status, answer.body["code"].as_str());
                Some(answer)
            }
            Err(error) if error.is_timeout() => {
                self.report.wrong(&format!("instance {} did not answer to {what} {path}", self.instance));
                None
            }
            // It was killed, or is not up again yet.
            Err(_) => {
                self.report.unanswered();
                None
            }
        }
    }

    fn check(&self, key: &str, asked: Instant, value: Option<&str>) {
        if let Some(wrong) = self.model.check(self.instance, (self.tenant, key), asked, value) {
            self.report.wrong(&wrong);
        }
    }

    fn check_all(&self, asked: Instant, secrets: &Value) {
        for key in KEYS {
            let found = secrets.as_array().into_iter().flatten().find(|secret| secret["key"] == key);
            self.check(key, asked, found.and_then(|secret| secret["value"].as_str()));
        }
    }

    /// An answer that gives nothing, though it might have, where all of these had copies.
    fn failed(&self, answer: &Answer, keys: &[&str]) {
        let had_copy = |key: &&str| self.model.had_copy(self.instance, (self.tenant, key), Instant::now());
        let code = answer.body["code"].as_str().unwrap_or_default();
        if answer.status != 503 {
            self.report
                .wrong(&format!("instance {} answered {} {code} for {}", self.instance, answer.status, self.tenant));
        } else if !keys.is_empty() && keys.iter().all(had_copy) {
            self.report.wrong(&format!(
                "instance {} had copies of {} {keys:?} and answered {code}",
                self.instance, self.tenant
            ));
        }
    }
}

impl Scene {
    fn request(&self, instance: usize, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.urls[instance])).bearer_auth(&self.token)
    }
}

fn change_in_infisical(scene: &Scene, model: &Model, tenant: &str, key: &str, value: Option<String>) {
    let path = format!("/tenants/{tenant}");
    model.begin(tenant, key, value.clone(), By::Infisical);
    match value {
        Some(value) => {
            scene.world.folder(ENV, &path);
            scene.world.put(ENV, &path, key, &value);
        }
        None => {
            scene.world.delete(ENV, &path, key);
        }
    }
    model.acknowledge(tenant, key);
}

fn secret(tenant: &str, key: &str) -> String {
    format!("/v1/tenants/{tenant}/secrets/{key}")
}

/// The tier that answered, by `Cache-Status`.
fn tier(status: &str) -> Option<&'static str> {
    let hit = |name: &str| status.split(", ").any(|member| member.starts_with(&format!("{name}; hit")));
    match () {
        () if hit("memory") => Some("memory"),
        () if hit("database") => Some("database"),
        () if status.contains("infisical; fwd") && status.contains("fwd-status") => Some("infisical"),
        () => None,
    }
}
