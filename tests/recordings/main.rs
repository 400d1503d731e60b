//! The stand-in for Infisical, held to 324 exchanges with a real server (a build of August
//! 2024), none left out, and the ways in which it can be broken on purpose.
//!
//! `exchanges.jsonl` has one exchange a line, in the order in which they are replayed; ids,
//! times and tokens are left out of the answers, and `answer_of` names an earlier exchange
//! that was answered with the same body. `world.jsonl` has the secrets that were there from
//! the start: environment, path, name, value, id.

#[path = "../support/within.rs"]
mod within;

mod dialects;
mod faults;
mod wire;

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use secretier::tiers::upstream::standin::{
    Credentials, Fault, Identity, Limits, Project, Readable, Rights, StandIn, World,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::wire::{Answer, send};

#[tokio::test(flavor = "multi_thread")]
async fn the_stand_in_answers_every_recorded_request_as_the_real_server_did() {
    let exchanges: Vec<Exchange> =
        EXCHANGES.lines().map(|line| serde_json::from_str(line).expect("a recorded exchange")).collect();
    assert_eq!(exchanges.len(), 324);
    let mut replay = Replay::start().await;
    let mut complaints = Vec::new();
    for exchange in &exchanges {
        replay.arrange(&exchange.name).await;
        let answer = replay.send(exchange).await;
        let differences = replay.compare(exchange, &exchanges, &answer);
        replay.learn(exchange, &answer);
        if !differences.is_empty() {
            complaints.push(format!("{}\n    {}", exchange.name, differences.join("\n    ")));
        }
    }
    let failed = complaints.len();
    assert!(complaints.is_empty(), "{failed} exchanges are answered differently:\n\n{}", complaints.join("\n\n"));
}

const EXCHANGES: &str = include_str!("exchanges.jsonl");
const WORLD: &str = include_str!("world.jsonl");

const PROJECT: &str = "3766c3a9-2029-4f00-b192-08ac9a2bd1af";
const FOREIGN_PROJECT: &str = "237989ef-b519-4195-a522-a8c8558d76d1";
const CLIENT_ID: &str = "5e61d5bc-10f5-4a09-a079-fd8da40c5031";
const CLIENT_SECRET: &str = "value-780a0345d6b8cbc5dfc3cce7";
/// Ids that the real server gave, which later requests name.
const RECORDED_FOLDER: &str = "0b4091fb-8888-4cd1-b2ad-79fe855c59c3";
const RECORDED_TAG: &str = "3fdceb1d-5cc9-4434-8f07-c22f8012c7d2";

#[derive(Deserialize)]
struct Exchange {
    name: String,
    method: String,
    target: String,
    #[serde(default)]
    headers: HashMap<String, String>,
    body: Option<Value>,
    status: u16,
    answer_headers: HashMap<String, String>,
    answer: Option<Value>,
    answer_of: Option<String>,
}

struct Replay {
    server: StandIn,
    world: World,
    identities: HashMap<&'static str, Credentials>,
    tokens: HashMap<String, String>,
    /// What the real server called something, and what it is called here.
    translations: HashMap<String, String>,
}

impl Replay {
    async fn start() -> Self {
        let world = World::new(Project {
            id: PROJECT.to_owned(),
            slug: "hono-api-dev".to_owned(),
            name: "hono api".to_owned(),
        });
        world.foreign_project(FOREIGN_PROJECT);
        for line in WORLD.lines() {
            let [environment, path, name, value, id]: [String; 5] = serde_json::from_str(line).expect("a secret");
            world.put_with_id(&environment, &path, &name, &value, id.parse().expect("its id"));
        }
        world.folder("dev", "/odd");
        world.folder("dev", "/vals");

        let seconds = Duration::from_secs;
        let full = || Identity::new(Rights::Full);
        let scoped = Rights::Read(vec![Readable::new("prod", "/tenants/acmecorp")]);
        let identities = [
            ("full", full().with_credentials(CLIENT_ID, CLIENT_SECRET)),
            ("reader", Identity::new(Rights::ReadAll)),
            ("scoped", Identity::new(scoped)),
            ("no-access", Identity::new(Rights::NoAccess)),
            ("not-member", Identity::new(Rights::NotMember)),
            ("use-limited", full().with_token_uses(3)),
            ("renewable", full().with_token_ttl(seconds(6), seconds(10))),
            ("short-lived", full().with_token_ttl(seconds(6), seconds(10))),
            ("past-its-ttl", full().with_token_ttl(seconds(6), seconds(10))),
            ("past-its-end", full().with_token_ttl(seconds(5), seconds(5))),
            ("default-ttl", full()),
            ("revoked", full()),
        ];
        let identities = identities.map(|(name, identity)| (name, world.identity(identity))).into();
        let server = StandIn::on_loopback(world.clone()).await.expect("a free port");
        Self { server, world, identities, tokens: HashMap::new(), translations: HashMap::new() }
    }

    /// Makes the world what it was when this exchange was recorded.
    async fn arrange(&mut self, exchange: &str) {
        let seconds = Duration::from_secs;
        self.world.clear_faults();
        if !exchange.starts_with("ratelimit-") || exchange == "ratelimit-list-1" {
            self.world.limits(Some(Limits::recorded()));
        }
        if exchange.starts_with("pgdown-") && exchange != "pgdown-recovered" {
            self.world.fault(Fault::DatabaseDown);
        }
        if exchange.starts_with("redisdown-") && exchange != "redisdown-recovered" {
            self.world.fault(Fault::CacheDown);
        }
        match exchange {
            "list-expired-token-ttl-before-max-ttl" => self.age_token("past-its-ttl", seconds(7)),
            "token-renew-would-pass-max-ttl" => self.age_token("short-lived", seconds(5)),
            "token-renew-expired-jwt" => self.age_token("past-its-end", seconds(7)),
            "token-renew-ok" => self.age_token("renewable", seconds(2)),
            "folder-get-by-id" => {
                let folder = self.world.folder("dev", "/scratch/todelete");
                self.translations.insert(RECORDED_FOLDER.to_owned(), folder.to_string());
            }
            "etag-scratch-after-write" => self.world.put("dev", "/scratch", "META", "m9"),
            "scoped-list-expand-reference-to-forbidden-path" => {
                self.world.put("prod", "/tenants/acmecorp", "PEEK", "${prod.tenants.codewiser.JWT_SECRET}");
            }
            "folder-delete-nonempty-dev" => {
                for environment in ["dev", "prod"] {
                    self.world.put(environment, "/tenants/demo-tenant", "DATABASE_URL", "postgres://demo");
                }
            }
            // The one exchange that was recorded as the second in its window.
            "get-missing-secret" => {
                let target = format!("/api/v3/secrets/raw/NOPE?workspaceId={PROJECT}&environment=prod");
                self.repeat(1, &target).await;
            }
            "ratelimit-list-40" => self.list(38).await,
            "ratelimit-list-45" => self.list(3).await,
            "ratelimit-login-hit" => {
                for _ in 0..200 {
                    send(self.server.addr(), "POST", "/api/v1/auth/universal-auth/login", JSON, Some("{}")).await;
                }
            }
            "ratelimit-list-after-window" => self.world.clock().advance(seconds(61)),
            "ratelimit-list-429-20s-into-window" => {
                self.list(39).await;
                self.world.clock().advance(seconds(20));
            }
            _ => {}
        }
    }

    /// Logs in as this identity, and lets its token grow old.
    fn age_token(&mut self, identity: &str, age: Duration) {
        let token = self.world.token(&self.identities[identity]).expect("a known identity");
        self.tokens.insert(identity.to_owned(), token);
        self.world.clock().advance(age);
    }

    async fn list(&mut self, times: usize) {
        self.repeat(times, &format!("/api/v3/secrets/raw?workspaceId={PROJECT}&environment=prod")).await;
    }

    async fn repeat(&mut self, times: usize, target: &str) {
        let authorization = self.translate("Bearer <full>");
        for _ in 0..times {
            send(self.server.addr(), "GET", target, &[("authorization", &authorization)], None).await;
        }
    }

    async fn send(&mut self, exchange: &Exchange) -> Answer {
        let target = self.translate(&exchange.target);
        let headers: Vec<(&str, String)> =
            exchange.headers.iter().map(|(name, value)| (name.as_str(), self.translate(value))).collect();
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let body = exchange.body.as_ref().map(|body| match body {
            Value::String(text) => text.clone(),
            object => object.to_string(),
        });
        let body = body.map(|body| self.translate(&body));
        let address: SocketAddr = self.server.addr();
        let answer = send(address, &exchange.method, &target, &headers, body.as_deref()).await;
        answer.unwrap_or_else(|| panic!("{}: no answer", exchange.name))
    }

    /// Puts this world's tokens, ids and entity tags in the place of the recorded ones.
    fn translate(&mut self, text: &str) -> String {
        let mut text = text.to_owned();
        for (recorded, here) in &self.translations {
            text = text.replace(recorded, here);
        }
        if text.contains("<badly-signed>") {
            let mut token = self.token("full");
            token.replace_range(token.len() - 9.., "notSigned");
            return text.replace("<badly-signed>", &token);
        }
        let labels: Vec<&'static str> = self.identities.keys().copied().collect();
        for label in labels {
            if text.contains(&format!("<{label}>")) {
                text = text.replace(&format!("<{label}>"), &self.token(label));
            }
        }
        text
    }

    fn token(&mut self, identity: &str) -> String {
        let known = self.tokens.get(identity).cloned();
        known.unwrap_or_else(|| {
            self.age_token(identity, Duration::ZERO);
            self.tokens[identity].clone()
        })
    }

    /// Remembers what this world calls the things that later requests name.
    fn learn(&mut self, exchange: &Exchange, answer: &Answer) {
        if exchange.name == "tag-create"
            && let Some(tag) = answer.json()["workspaceTag"]["id"].as_str()
        {
            self.translations.insert(RECORDED_TAG.to_owned(), tag.to_owned());
        }
        if let (Some(recorded), Some(here)) = (exchange.answer_headers.get("etag"), answer.header("etag")) {
            self.translations.insert(recorded.clone(), here.to_owned());
        }
    }

    fn compare(&self, exchange: &Exchange, exchanges: &[Exchange], answer: &Answer) -> Vec<String> {
        let mut differences = Vec::new();
        if answer.status != exchange.status {
            differences.push(format!("status: recorded {}, here {}", exchange.status, answer.status));
        }
        compare_headers(&exchange.answer_headers, answer, &mut differences);
        // The same body has the same tag, and no other body has it.
        if let (Some(recorded), Some(here)) = (exchange.answer_headers.get("etag"), answer.header("etag")) {
            for (known, translated) in self.translations.iter().filter(|(known, _)| known.starts_with('"')) {
                if (known == recorded) != (translated == here) {
                    differences.push(format!("etag: recorded {recorded}, here {here}, but {known} was {translated}"));
                }
            }
        }
        let recorded = match &exchange.answer_of {
            Some(name) => exchanges.iter().find(|other| other.name == *name).and_then(|other| other.answer.as_ref()),
            None => exchange.answer.as_ref(),
        };
        match recorded {
            Some(recorded) => compare_bodies("", &sorted(recorded), &sorted(&answer.json()), &mut differences),
            None if !answer.body.is_empty() => differences.push("body: recorded none".to_owned()),
            None => {}
        }
        differences
    }
}

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

fn compare_headers(recorded: &HashMap<String, String>, answer: &Answer, differences: &mut Vec<String>) {
    for name in ["content-type", "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "retry-after"] {
        let (recorded, here) = (recorded.get(name).map(String::as_str), answer.header(name));
        if recorded != here && !(is_about(recorded, here) && matches!(name, "x-ratelimit-reset" | "retry-after")) {
            differences.push(format!("{name}: recorded {recorded:?}, here {here:?}"));
        }
    }
    let is_strong = |tag: &str| tag.len() == 30 && tag.starts_with('"') && tag.ends_with("=\"");
    let here = answer.header("etag");
    if recorded.contains_key("etag") != here.is_some() || !here.is_none_or(is_strong) {
        differences.push(format!("etag: recorded {:?}, here {here:?}", recorded.get("etag")));
    }
}

/// Seconds of a window, on a machine that may have been busy for some of them.
fn is_about(recorded: Option<&str>, here: Option<&str>) -> bool {
    let seconds = |text: Option<&str>| text.and_then(|text| text.parse::<u64>().ok());
    matches!((seconds(recorded), seconds(here)), (Some(recorded), Some(here)) if recorded.saturating_sub(here) <= 10 && here <= recorded)
}

fn compare_bodies(path: &str, recorded: &Value, here: &Value, differences: &mut Vec<String>) {
    match (recorded, here) {
        (Value::Object(recorded), Value::Object(here)) => compare_objects(path, recorded, here, differences),
        (Value::Array(recorded), Value::Array(here)) => {
            if recorded.len() != here.len() {
                differences.push(format!("{path}: recorded {} elements, here {}", recorded.len(), here.len()));
            }
            for (index, (recorded, here)) in recorded.iter().zip(here).enumerate() {
                compare_bodies(&format!("{path}[{index}]"), recorded, here, differences);
            }
        }
        (Value::String(recorded), Value::String(here)) if fits(recorded, here) => {}
        _ if recorded == here => {}
        _ => differences.push(format!("{path}: recorded {recorded}, here {here}")),
    }
}

fn compare_objects(
    path: &str,
    recorded: &Map<String, Value>,
    here: &Map<String, Value>,
    differences: &mut Vec<String>,
) {
    for (name, value) in recorded {
        match here.get(name) {
            Some(other) => compare_bodies(&format!("{path}.{name}"), value, other, differences),
            None => differences.push(format!("{path}.{name}: is missing")),
        }
    }
    for name in here.keys().filter(|name| !recorded.contains_key(*name)) {
        differences.push(format!("{path}.{name}: was not recorded"));
    }
    if here.contains_key("_id") && here.get("_id") != here.get("id") {
        differences.push(format!("{path}._id: is not the id"));
    }
}

/// Whether a string is what the recording has, or of the kind that it leaves out.
fn fits(recorded: &str, here: &str) -> bool {
    match recorded {
        "<id>" => here.len() == 36 && here.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()),
        "<time>" => here.len() == 24 && here.ends_with('Z') && here.as_bytes()[10] == b'T',
        "<token>" => here.split('.').count() == 3,
        _ => recorded == here,
    }
}

/// Lists of secrets and of folders come in no order that means anything.
fn sorted(value: &Value) -> Value {
    let key = |item: &Value| {
        ["secretPath", "secretKey", "secretValue", "name"].map(|name| item[name].as_str().unwrap_or("").to_owned())
    };
    match value {
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), sorted(value))).collect(),
        Value::Array(items) => {
            let mut items: Vec<Value> = items.iter().map(sorted).collect();
            items.sort_by_key(key);
            Value::Array(items)
        }
        other => other.clone(),
    }
}
