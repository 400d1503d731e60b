//! No answer crosses a token's scope: by attacks, and by chance against a model.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::{prelude::*, strategy::ValueTree as _};
use reqwest::Method;
use secretier::{
    access::{Action, NewToken},
    phase::Phase,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    app::{Answer, Backend, Setup, TestApp, drawn_anew, on_both, resource, secret},
    within::within,
};

fn owned(patterns: &[&str]) -> Vec<String> {
    patterns.iter().map(|&pattern| pattern.to_owned()).collect()
}

/// A token that reaches some of the keys.
pub(crate) async fn token_for(
    app: &TestApp,
    name: &str,
    tenants: &[&str],
    keys: &[&str],
    actions: &[Action],
) -> String {
    let (tenants, keys, actions) = (owned(tenants), owned(keys), actions.to_vec());
    let new = NewToken { name: name.to_owned(), tenants, keys, actions, lifetime: None };
    let (token, row) = new.draw(app.instance().clock.now()).unwrap();
    app.instance().service.resolver.database().insert_token(&row).await.unwrap();
    app.instance().service.access.reload().await.unwrap();
    token.expose().to_owned()
}

async fn ask(app: &TestApp, token: &str, method: Method, path: &str, body: Value) -> Answer {
    Answer::of(app.instance().request(method, path).bearer_auth(token).json(&body)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_some_keys_reaches_them_on_every_route_and_learns_of_no_others() {
    for phase in Phase::ALL {
        on_both(async |backend| {
            let app = Setup::new(backend, phase).start().await;
            for key in ["STRIPE_A", "STRIPE_B", "SMTP"] {
                assert_eq!(app.put("acme", key, &format!("value of {key}")).await.status, 201);
            }
            let token = token_for(&app, "stripe", &["*"], &["STRIPE_*"], &Action::ALL).await;
            let ask = async |method, path: &str, body| ask(&app, &token, method, path, body).await;
            let refused = (403, "out_of_scope".to_owned());
            let of = |key: &str, below: &str| format!("{}{below}", secret("acme", key));
            app.world().mark();
            for key in ["SMTP", "NONE", "stripe_A"] {
                for (method, below, body) in [
                    (Method::GET, "", json!(null)),
                    (Method::GET, "?version=1", json!(null)),
                    (Method::GET, "/explain", json!(null)),
                    (Method::GET, "/versions", json!(null)),
                    (Method::GET, "/valid", json!(null)),
                    (Method::GET, "/rotation", json!(null)),
                    (Method::POST, "/rotate", json!({"value": "x"})),
                    (Method::POST, "/rotation/promote", json!(null)),
                    (Method::POST, "/rotation/retry", json!(null)),
                    (Method::POST, "/rotation/abort", json!(null)),
                    (Method::POST, "/rotation/retire", json!(null)),
                    (Method::POST, "/rotation/rollback", json!(null)),
                    (Method::PUT, "", json!({"value": "x"})),
                    (Method::DELETE, "", json!(null)),
                    (Method::POST, "/rollback", json!({"version": 1})),
                ] {
                    let answer = ask(method.clone(), &of(key, below), body).await;
                    assert_eq!(answer.problem(), refused, "{method} {key}{below}");
                }
            }
            let batch = "/v1/tenants/acme/secrets/batch-get";
            assert_eq!(ask(Method::POST, batch, json!({"keys": ["STRIPE_A", "SMTP"]})).await.problem(), refused);
            assert_eq!(app.world().calls_since_mark().total(), 0, "nothing was looked up");

            let found = ask(Method::POST, batch, json!({"keys": ["STRIPE_A", "STRIPE_B"]})).await;
            assert_eq!(found.json()["secrets"].as_array().unwrap().len(), 2);
            let listed = ask(Method::GET, "/v1/tenants/acme/secrets?values=true", json!(null)).await;
            let names: Vec<_> =
                listed.json()["keys"].as_array().unwrap().iter().map(|key| key["key"].clone()).collect();
            assert_eq!((names, listed.text.contains("SMTP")), (vec![json!("STRIPE_A"), json!("STRIPE_B")], false));
            assert_eq!(ask(Method::GET, &of("STRIPE_A", ""), json!(null)).await.value(), "value of STRIPE_A");
            assert_eq!(ask(Method::PUT, &of("STRIPE_A", ""), json!({"value": "x"})).await.status, 200);

            // How many keys there are is told only to who may know of all of them.
            let every = token_for(&app, "every", &["acme"], &["SMTP", "*"], &[Action::Read]).await;
            for (token, keys) in [(&token, json!(null)), (&every, json!(3))] {
                let ask = async |method, path| self::ask(&app, token, method, path, json!(null)).await.json();
                assert_eq!(ask(Method::GET, "/v1/tenants").await["tenants"][0]["keys"], keys, "{phase}");
                assert_eq!(ask(Method::GET, "/v1/tenants/acme").await["keys"], keys, "{phase}");
                if phase != Phase::Database {
                    assert_eq!(ask(Method::POST, "/v1/tenants/acme/refresh").await["keys"], keys, "{phase}");
                }
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_told_what_it_reaches_and_until_when() {
    on_both(async |backend| {
        let app = Setup::new(backend, Phase::Database).start().await;
        let new = NewToken {
            name: "billing".to_owned(),
            tenants: owned(&["acme*", "globex"]),
            keys: owned(&["STRIPE_*"]),
            actions: vec![Action::Read, Action::Write],
            lifetime: Some(Duration::from_hours(1)),
        };
        let now = app.instance().clock.now();
        let (token, row) = new.draw(now).unwrap();
        app.instance().service.resolver.database().insert_token(&row).await.unwrap();
        let told = ask(&app, token.expose(), Method::GET, "/v1/whoami", json!(null)).await;
        let mut body = told.json();
        let left = body["expires_in_seconds"].take().as_u64().unwrap();
        assert!((3500..=3600).contains(&left), "{left}");
        let expected = json!({
            "name": "billing", "id": row.id, "tenants": ["acme*", "globex"], "folders": [], "keys": ["STRIPE_*"],
            "actions": ["read", "write"], "expires_at": now.plus(Duration::from_hours(1)).to_rfc3339(),
            "expires_in_seconds": null,
        });
        assert_eq!(body, expected);
        assert!(!told.text.contains(token.expose().splitn(3, '_').nth(2).unwrap()));

        let mine = app.ask(Method::GET, "/v1/whoami").await.json();
        assert_eq!((&mine["name"], &mine["expires_at"]), (&json!("test"), &json!(null)));
        let head = app.ask(Method::HEAD, "/v1/whoami").await;
        assert_eq!((head.status, head.text.as_str()), (200, ""));
        assert_eq!(app.ask(Method::POST, "/v1/whoami").await.problem(), (405, "method_not_allowed".to_owned()));
        let nobody = Answer::of(app.instance().request(Method::GET, "/v1/whoami")).await;
        assert_eq!(nobody.problem(), (401, "token_missing".to_owned()));
    })
    .await;
}

/// The status and the body of a request whose path no client has touched.
async fn raw(app: &TestApp, token: &str, request: &str, body: &str) -> (u16, String) {
    let mut connection = TcpStream::connect(app.url().trim_start_matches("http://")).await.unwrap();
    let length = body.len();
    let head = format!(
        "{request} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within("an answer comes", connection.read_to_string(&mut answer)).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

/// Two tenants, and tokens for one of them.
struct Attacked {
    app: TestApp,
    reader: String,
}

impl Attacked {
    async fn start(backend: Backend, phase: Phase) -> Self {
        let app = Setup::new(backend, phase).start().await;
        app.put("acme", "A", "of acme").await;
        app.put("globex", "A", "of globex").await;
        let reader = token_for(&app, "reader", &["acme"], &["*"], &[Action::Read]).await;
        Self { app, reader }
    }

    /// A request is answered so, tells nothing of the other tenant, and keeps nobody from
    /// being served.
    async fn answers(&self, request: &str, status: u16, part: &str) {
        let (found, body) = raw(&self.app, &self.reader, request, "{\"value\":\"theirs\"}").await;
        assert!(found == status && body.contains(part), "{request}: {found} {body}");
        assert!(!body.contains("of globex"), "{request}: {body}");
        assert_eq!(raw(&self.app, &self.reader, "GET /v1/tenants/acme/secrets/A", "").await.0, 200, "after {request}");
    }

    /// What stood there before the attacks stands there still.
    async fn is_unharmed(&self) {
        assert_eq!(self.app.get("acme", "A").await.value(), "of acme");
        assert_eq!(self.app.get("globex", "A").await.value(), "of globex");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_one_tenant_gets_nothing_of_another_and_one_that_reads_writes_nothing() {
    on_both(async |backend| {
        let attacked = Attacked::start(backend, Phase::Hybrid).await;
        for below in
            ["", "/secrets", "/secrets?values=true", "/secrets/A", "/secrets/A?version=1", "/secrets/A/versions"]
        {
            attacked.answers(&format!("GET /v1/tenants/globex{below}"), 403, "out_of_scope").await;
        }
        for request in [
            "PUT /v1/tenants/acme/secrets/A",
            "DELETE /v1/tenants/acme/secrets/A",
            "POST /v1/tenants/acme/secrets/A/rollback",
            "POST /v1/tenants/acme/secrets/A/rotate",
            "POST /v1/tenants/acme/secrets/A/rotation/retire",
            "PUT /v1/tenants/acme/secrets/batch-get",
            "PUT /v1/tenants/globex/secrets/A",
        ] {
            attacked.answers(request, 403, "out_of_scope").await;
        }
        attacked.is_unharmed().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_along_a_path_lead_to_no_other_tenant() {
    on_both(async |backend| {
        let attacked = Attacked::start(backend, Phase::Hybrid).await;
        for (path, status, code) in [
            // A path is taken as it stands.
            ("acme/../globex/secrets/A", 404, "route_not_found"),
            ("acme/secrets/../../globex/secrets/A", 404, "route_not_found"),
            ("acme//secrets/A", 404, "route_not_found"),
            ("./acme/secrets/A", 404, "route_not_found"),
            ("../tenants/globex/secrets/A", 404, "route_not_found"),
            ("%2e%2e/secrets/A", 400, "invalid_tenant"),
            ("acme%2f..%2fglobex/secrets/A", 400, "invalid_tenant"),
            ("acme%2Fsecrets%2FA", 400, "invalid_tenant"),
            ("acme%5c..%5cglobex/secrets/A", 400, "invalid_tenant"),
            // It is decoded once: what is left is part of the name.
            ("%252e%252e/secrets/A", 400, "invalid_tenant"),
            ("%2567lobex/secrets/A", 400, "invalid_tenant"),
            // These are odd names of secrets, of the tenant that the path names, and nobody's.
            ("acme/secrets/..%2f..%2fglobex%2fsecrets%2fA", 404, "secret_not_found"),
            ("acme/secrets/%2e%2e", 404, "secret_not_found"),
            ("acme/secrets/..", 404, "secret_not_found"),
            ("acme/secrets/%252e%252e%252fglobex", 404, "secret_not_found"),
            ("globex%20/secrets/A", 400, "invalid_tenant"),
            ("%67lobex/secrets/A", 403, "out_of_scope"),
        ] {
            attacked.answers(&format!("GET /v1/tenants/{path}"), status, code).await;
        }
        attacked.is_unharmed().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_no_names_are_refused_before_the_scope_is_asked() {
    on_both(async |backend| {
        let attacked = Attacked::start(backend, Phase::Hybrid).await;
        let (long_tenant, longer) = ("a".repeat(64), "a".repeat(20_000));
        let tenants =
            ["%00", "acme%00", "%ff", "%c0%ae", "ACME", "Globex", "%41cme", "acme%0a", &long_tenant, &longer, ""];
        for tenant in tenants {
            for request in ["GET", "PUT"] {
                let request = format!("{request} /v1/tenants/{tenant}/secrets/A");
                attacked.answers(&request, 400, "invalid_tenant").await;
            }
            attacked.answers(&format!("POST /v1/tenants/{tenant}/secrets/batch-get"), 400, "invalid_tenant").await;
        }
        let (long_key, longer) = ("k".repeat(256), "k".repeat(20_000));
        for key in ["%00", "A%00", "%ff", "%c3%28", "A%0d%0a", "%7f", &long_key, &longer, ""] {
            for below in ["", "/versions", "/explain"] {
                attacked.answers(&format!("GET /v1/tenants/acme/secrets/{key}{below}"), 400, "invalid_key").await;
            }
            // Of another tenant no more is told.
            let elsewhere = format!("GET /v1/tenants/globex/secrets/{key}");
            attacked.answers(&elsewhere, 400, "invalid_key").await;
        }
        let longest = "k".repeat(255);
        attacked.answers(&format!("GET /v1/tenants/acme/secrets/{longest}"), 404, "secret_not_found").await;
        attacked.answers(&format!("GET /v1/tenants/globex/secrets/{longest}"), 403, "out_of_scope").await;
        for path in ["acme/", "acme/secrets/A/", "acme/refresh/", "acme/secrets/A/versions/"] {
            attacked.answers(&format!("GET /v1/tenants/{path}"), 404, "route_not_found").await;
        }
        attacked.answers("GET /v1/tenants/", 400, "invalid_tenant").await;
        attacked.answers("GET /v1/whoami/", 404, "route_not_found").await;
        attacked.is_unharmed().await;
    })
    .await;
}

/// A piece of a pattern, as the model knows it.
#[derive(Debug, Clone)]
enum Piece {
    Text(&'static str),
    /// `*`
    Any,
    /// `?`
    One,
    /// `[ab]`
    Of(&'static str),
    /// `[!ab]`
    NotOf(&'static str),
    /// `{a,b}`
    Either(&'static str, &'static str),
}

#[derive(Debug, Clone)]
struct Pattern(Vec<Piece>);

impl Pattern {
    fn text(&self) -> String {
        let text = |piece: &Piece| match piece {
            Piece::Text(text) => (*text).to_owned(),
            Piece::Any => "*".to_owned(),
            Piece::One => "?".to_owned(),
            Piece::Of(chars) => format!("[{chars}]"),
            Piece::NotOf(chars) => format!("[!{chars}]"),
            Piece::Either(one, other) => format!("{{{one},{other}}}"),
        };
        self.0.iter().map(text).collect()
    }

    fn matches(&self, name: &str) -> bool {
        matches(&self.0, name)
    }
}

fn matches(pieces: &[Piece], name: &str) -> bool {
    let Some((first, rest)) = pieces.split_first() else { return name.is_empty() };
    let after = |text: &str| name.strip_prefix(text).is_some_and(|name| matches(rest, name));
    let one = |is: &dyn Fn(char) -> bool| {
        name.chars().next().is_some_and(|first| is(first) && matches(rest, &name[first.len_utf8()..]))
    };
    match first {
        Piece::Text(text) => after(text),
        Piece::Any => (0..=name.len()).any(|from| matches(rest, &name[from..])),
        Piece::One => one(&|_| true),
        Piece::Of(chars) => one(&|first| chars.contains(first)),
        Piece::NotOf(chars) => one(&|first| !chars.contains(first)),
        Piece::Either(first, second) => after(first) || after(second),
    }
}

/// Of the model. The last two are upstream's; one of each kind nobody has ever written to.
const TENANTS: [&str; 7] = ["acme", "acme-eu", "globex", "nobody", "up", "up-eu", "/team"];

/// None is part of another, nor of any word in an answer.
const KEYS: [&str; 8] = ["STRIPE_A", "STRIPE_B", "DB/URL", "DB/PASS", "SMTP", "smtp", "QX", "batch-get"];

fn pattern(texts: &'static [&'static str]) -> impl Strategy<Value = Pattern> {
    let piece = prop_oneof![
        4 => prop::sample::select(texts).prop_map(Piece::Text),
        4 => Just(Piece::Any),
        1 => Just(Piece::One),
        1 => Just(Piece::Of("agSDu")),
        1 => Just(Piece::NotOf("aS")),
        1 => Just(Piece::Either("acme", "up")),
        1 => Just(Piece::Either("STRIPE", "DB")),
    ];
    let of_pieces = prop::collection::vec(piece, 1..4).prop_map(|mut pieces| {
        // Two stars in a row mean something else beside a slash.
        pieces.dedup_by(|one, other| matches!((one, other), (Piece::Any, Piece::Any)));
        Pattern(pieces)
    });
    let beginning = prop::sample::select(texts).prop_map(|text| Pattern(vec![Piece::Text(text), Piece::Any]));
    prop_oneof![2 => Just(Pattern(vec![Piece::Any])), 2 => beginning, 3 => of_pieces]
}

/// A token as it is made, and what becomes of it.
#[derive(Debug, Clone)]
struct Made {
    tenants: Vec<Pattern>,
    keys: Vec<Pattern>,
    actions: Vec<Action>,
    fate: Fate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Valid,
    Expired,
    Revoked,
}

impl Made {
    fn reaches(&self, tenant: &str) -> bool {
        let is_folder = tenant.starts_with('/');
        self.tenants.iter().any(|pattern| pattern.text().starts_with('/') == is_folder && pattern.matches(tenant))
    }

    fn reaches_key(&self, key: &str) -> bool {
        self.keys.iter().any(|pattern| pattern.matches(key))
    }

    fn reaches_every_key(&self) -> bool {
        self.keys.iter().any(|pattern| pattern.text() == "*")
    }
}

fn made() -> impl Strategy<Value = Made> {
    let tenants = prop::collection::vec(pattern(&["acme", "acme-eu", "glob", "ex", "up", "-eu", "/te", "am"]), 1..3);
    let keys = prop::collection::vec(pattern(&["STRIPE_", "DB/", "URL", "SMTP", "A", "QX", "batch-get"]), 1..3);
    let actions = prop::sample::subsequence(Action::ALL.to_vec(), 1..=4);
    let fate = prop_oneof![10 => Just(Fate::Valid), 1 => Just(Fate::Expired), 1 => Just(Fate::Revoked)];
    (tenants, keys, actions, fate).prop_map(|(tenants, keys, actions, fate)| Made { tenants, keys, actions, fate })
}

#[derive(Debug, Clone)]
enum Asked {
    Get(usize, usize),
    GetVersion(usize, usize, u8),
    Explain(usize, usize),
    Versions(usize, usize),
    Valid(usize, usize),
    Rotation(usize, usize),
    Promote(usize, usize),
    Put(usize, usize),
    Delete(usize, usize),
    Rollback(usize, usize, u8),
    Batch(usize, Vec<usize>),
    List(usize, bool),
    Tenant(usize),
    Refresh(usize),
    Tenants,
    Folders,
    WhoAmI,
}

fn asked() -> impl Strategy<Value = Asked> {
    let (tenant, key, version) = (0..TENANTS.len(), 0..KEYS.len(), 1..5_u8);
    let both = (tenant.clone(), key.clone());
    let versioned = (tenant.clone(), key.clone(), version);
    prop_oneof![
        4 => both.clone().prop_map(|(tenant, key)| Asked::Get(tenant, key)),
        1 => versioned.clone().prop_map(|(tenant, key, version)| Asked::GetVersion(tenant, key, version)),
        1 => both.clone().prop_map(|(tenant, key)| Asked::Explain(tenant, key)),
        1 => both.clone().prop_map(|(tenant, key)| Asked::Versions(tenant, key)),
        2 => both.clone().prop_map(|(tenant, key)| Asked::Valid(tenant, key)),
        1 => both.clone().prop_map(|(tenant, key)| Asked::Rotation(tenant, key)),
        1 => both.clone().prop_map(|(tenant, key)| Asked::Promote(tenant, key)),
        3 => both.clone().prop_map(|(tenant, key)| Asked::Put(tenant, key)),
        1 => both.prop_map(|(tenant, key)| Asked::Delete(tenant, key)),
        1 => versioned.prop_map(|(tenant, key, version)| Asked::Rollback(tenant, key, version)),
        3 => (tenant.clone(), prop::collection::vec(key, 0..4)).prop_map(|(tenant, keys)| Asked::Batch(tenant, keys)),
        3 => (tenant.clone(), any::<bool>()).prop_map(|(tenant, values)| Asked::List(tenant, values)),
        1 => tenant.clone().prop_map(Asked::Tenant),
        1 => tenant.prop_map(Asked::Refresh),
        1 => Just(Asked::Tenants),
        1 => Just(Asked::Folders),
        1 => Just(Asked::WhoAmI),
    ]
}

impl Asked {
    fn tenant(&self) -> Option<&'static str> {
        match *self {
            Self::Get(tenant, _)
            | Self::GetVersion(tenant, ..)
            | Self::Explain(tenant, _)
            | Self::Versions(tenant, _)
            | Self::Valid(tenant, _)
            | Self::Rotation(tenant, _)
            | Self::Promote(tenant, _)
            | Self::Put(tenant, _)
            | Self::Delete(tenant, _)
            | Self::Rollback(tenant, ..)
            | Self::Batch(tenant, _)
            | Self::List(tenant, _)
            | Self::Tenant(tenant)
            | Self::Refresh(tenant) => Some(TENANTS[tenant]),
            Self::Tenants | Self::Folders | Self::WhoAmI => None,
        }
    }

    fn keys(&self) -> Vec<&'static str> {
        match self {
            Self::Get(_, key)
            | Self::GetVersion(_, key, _)
            | Self::Explain(_, key)
            | Self::Versions(_, key)
            | Self::Valid(_, key)
            | Self::Rotation(_, key)
            | Self::Promote(_, key)
            | Self::Put(_, key)
            | Self::Delete(_, key)
            | Self::Rollback(_, key, _) => vec![KEYS[*key]],
            Self::Batch(_, keys) => keys.iter().map(|key| KEYS[*key]).collect(),
            Self::List(..) | Self::Tenant(_) | Self::Refresh(_) | Self::Tenants | Self::Folders | Self::WhoAmI => {
                Vec::new()
            }
        }
    }

    fn action(&self) -> Option<Action> {
        match self {
            Self::Put(..) | Self::Delete(..) | Self::Rollback(..) => Some(Action::Write),
            Self::Promote(..) => Some(Action::Rotate),
            Self::WhoAmI => None,
            _ => Some(Action::Read),
        }
    }

    /// What is sent, given the value that a write would write.
    fn request(&self, value: &str) -> (Method, String, Value) {
        let below = |below: &str| {
            let key = self.keys().first().map_or(String::new(), |key| secret(self.tenant().unwrap_or(""), key));
            format!("{key}{below}")
        };
        let tenant = |below: &str| format!("{}{below}", resource(self.tenant().unwrap_or("")));
        let get = |path| (Method::GET, path, json!(null));
        match self {
            Self::Get(..) => get(below("")),
            Self::GetVersion(_, _, version) => get(below(&format!("?version={version}"))),
            Self::Explain(..) => get(below("/explain")),
            Self::Versions(..) => get(below("/versions")),
            Self::Valid(..) => get(below("/valid")),
            Self::Rotation(..) => get(below("/rotation")),
            Self::Promote(..) => (Method::POST, below("/rotation/promote"), json!(null)),
            Self::Put(..) => (Method::PUT, below("?create_tenant=true"), json!({ "value": value })),
            Self::Delete(..) => (Method::DELETE, below(""), json!(null)),
            Self::Rollback(_, _, version) => (Method::POST, below("/rollback"), json!({ "version": version })),
            Self::Batch(..) => (Method::POST, tenant("/secrets/batch-get"), json!({ "keys": self.keys() })),
            Self::List(_, values) => get(tenant(&format!("/secrets?values={values}"))),
            Self::Tenant(_) => get(tenant("")),
            Self::Refresh(_) => (Method::POST, tenant("/refresh"), json!(null)),
            Self::Tenants => get("/v1/tenants".to_owned()),
            Self::Folders => get("/v1/folders".to_owned()),
            Self::WhoAmI => get("/v1/whoami".to_owned()),
        }
    }
}

/// What is where, as far as the model knows.
#[derive(Default)]
struct Model {
    /// The newest values.
    values: BTreeMap<(&'static str, &'static str), String>,
    /// Whose each value is that was ever written.
    owners: BTreeMap<String, (&'static str, &'static str)>,
}

impl Model {
    fn next_value(&mut self, asked: &Asked) -> String {
        let value = format!("val-{:06}-", self.owners.len());
        if let (Asked::Put(..), Some(tenant), [key]) = (asked, asked.tenant(), &asked.keys()[..]) {
            self.owners.insert(value.clone(), (tenant, key));
        }
        value
    }

    /// The status where the token's scope alone decides.
    fn refusal(token: &Made, asked: &Asked) -> Option<u16> {
        if token.fate != Fate::Valid {
            return Some(401);
        }
        let may = asked.action().is_none_or(|action| token.actions.contains(&action))
            && asked.tenant().is_none_or(|tenant| token.reaches(tenant))
            && asked.keys().iter().all(|key| token.reaches_key(key));
        (!may).then_some(403)
    }

    /// The statuses that a request within the scope may have, of what is there.
    fn statuses(&self, asked: &Asked) -> &'static [u16] {
        let tenant = asked.tenant().unwrap_or("");
        let there = asked.keys().first().is_some_and(|key| self.values.contains_key(&(tenant, *key)));
        match asked {
            Asked::Get(..) | Asked::Valid(..) | Asked::Delete(..) if !there => &[404],
            Asked::Get(..) | Asked::Valid(..) => &[200],
            // Nothing is rotated here.
            Asked::Rotation(..) => &[404],
            Asked::Promote(..) => &[409],
            Asked::Delete(..) => &[204],
            Asked::Put(..) if there => &[200],
            Asked::Put(..) => &[201],
            Asked::Explain(..) | Asked::Batch(..) | Asked::Tenants | Asked::Folders | Asked::WhoAmI => &[200],
            // A secret that was deleted has versions; a tenant without secrets may be there.
            Asked::GetVersion(..) | Asked::Versions(..) | Asked::Rollback(..) => &[200, 404],
            Asked::List(..) | Asked::Tenant(_) => &[200, 404],
            Asked::Refresh(_) if tenant.starts_with("up") => &[200, 404],
            Asked::Refresh(_) => &[409],
        }
    }

    /// No body may hold what is outside the token's scope, nor what is another's than it says.
    fn check_body(&self, token: &Made, asked: &Asked, answer: &Answer) {
        let refused = answer.status == 401 || answer.status == 403;
        let told = |text: &str| panic!("{text} is told to {token:?} by {asked:?}: {answer:?}");
        for key in KEYS.iter().filter(|key| answer.text.contains(**key)) {
            // Where the token stands itself, its own patterns may look like keys.
            if refused || (!token.reaches_key(key) && !matches!(asked, Asked::WhoAmI)) {
                told(key);
            }
        }
        for (index, _) in answer.text.match_indices("val-") {
            let value = &answer.text[index..index + "val-000000-".len()];
            let (tenant, key) = self.owners[value];
            let named = asked.keys().contains(&key) || matches!(asked, Asked::List(_, true));
            if refused || !token.reaches(tenant) || !token.reaches_key(key) || asked.tenant() != Some(tenant) || !named
            {
                told(value);
            }
        }
    }

    /// What a good answer says is what is there.
    fn check_answer(&self, token: &Made, asked: &Asked, answer: &Answer) {
        let tenant = asked.tenant().unwrap_or("");
        let of = |key: &str| self.values.iter().find(|((of, name), _)| *of == tenant && *name == key);
        match asked {
            Asked::Get(_, key) if answer.status == 200 => {
                assert_eq!(Some(&answer.value()), of(KEYS[*key]).map(|at| at.1))
            }
            Asked::Valid(_, key) if answer.status == 200 => {
                let values = answer.json()["values"].as_array().unwrap().clone();
                assert_eq!(values.len(), 1);
                assert_eq!(values[0]["value"].as_str(), of(KEYS[*key]).map(|at| at.1.as_str()));
            }
            Asked::Batch(..) => {
                for found in answer.json()["secrets"].as_array().unwrap() {
                    let key = found["key"].as_str().unwrap();
                    assert_eq!(found["value"].as_str(), of(key).map(|at| at.1.as_str()), "{asked:?}");
                }
                for missing in answer.json()["missing"].as_array().unwrap() {
                    assert_eq!(of(missing.as_str().unwrap()), None, "{asked:?}");
                }
            }
            Asked::List(_, values) if answer.status == 200 => {
                let reached = self.values.iter().filter(|((of, key), _)| *of == tenant && token.reaches_key(key));
                let expected: BTreeMap<&str, Value> =
                    reached.map(|((_, key), value)| (*key, if *values { json!(value) } else { json!(null) })).collect();
                let body = answer.json();
                let listed = body["keys"].as_array().unwrap().iter();
                let listed = listed.map(|key| (key["key"].as_str().unwrap(), key["value"].clone())).collect();
                assert_eq!(expected, listed, "{asked:?} by {token:?}");
            }
            Asked::Tenant(_) | Asked::Refresh(_) if answer.status == 200 => {
                let body = answer.json();
                assert_eq!(body["tenant"], tenant);
                assert!(body["keys"].is_null() || token.reaches_every_key(), "{body} to {token:?}");
            }
            Asked::Tenants | Asked::Folders => {
                let (body, is_folders) = (answer.json(), matches!(asked, Asked::Folders));
                let listed = body[if is_folders { "folders" } else { "tenants" }].as_array().unwrap();
                assert!(listed.iter().all(|one| one["keys"].is_null()) || token.reaches_every_key(), "{body}");
                let listed: BTreeSet<&str> = listed.iter().map(|one| one["tenant"].as_str().unwrap()).collect();
                let with_secrets: BTreeSet<&str> = self.values.keys().map(|(tenant, _)| *tenant).collect();
                assert!(listed.iter().all(|tenant| tenant.starts_with('/') == is_folders), "{listed:?}");
                assert!(listed.iter().all(|tenant| token.reaches(tenant)), "{listed:?} to {token:?}");
                for tenant in with_secrets.into_iter().filter(|tenant| tenant.starts_with('/') == is_folders) {
                    assert_eq!(listed.contains(tenant), token.reaches(tenant), "{tenant} to {token:?}");
                }
            }
            Asked::WhoAmI => {
                let patterns = |patterns: &[Pattern]| json!(patterns.iter().map(Pattern::text).collect::<Vec<_>>());
                let (folders, tenants): (Vec<Pattern>, Vec<Pattern>) =
                    token.tenants.iter().cloned().partition(|pattern| pattern.text().starts_with('/'));
                assert_eq!(answer.json()["tenants"], patterns(&tenants));
                let folders: Vec<String> = folders.iter().map(|one| one.text()[1..].to_owned()).collect();
                assert_eq!(answer.json()["folders"], json!(folders));
                assert_eq!(answer.json()["keys"], patterns(&token.keys));
            }
            _ => {}
        }
    }
}

/// One of many tokens asks one of many questions.
async fn step(app: &TestApp, model: &mut Model, tokens: &[(Made, String)], number: usize, asked: &Asked) -> u16 {
    let (token, text) = &tokens[number];
    let value = model.next_value(asked);
    let (method, path, body) = asked.request(&value);
    let answer = ask(app, text, method, &path, body).await;
    model.check_body(token, asked, &answer);
    match Model::refusal(token, asked) {
        // Of many that were revoked not each is tried.
        Some(401) if answer.status == 429 => assert!(matches!(token.fate, Fate::Revoked), "{asked:?} by {token:?}"),
        Some(status) => assert_eq!(answer.status, status, "{asked:?} by {token:?}: {answer:?}"),
        None => {
            let expected = model.statuses(asked);
            assert!(expected.contains(&answer.status), "{expected:?} {asked:?} by {token:?}: {answer:?}");
            model.check_answer(token, asked, &answer);
        }
    }
    let (Some(tenant), [key]) = (asked.tenant(), &asked.keys()[..]) else { return answer.status };
    match (asked, answer.status) {
        (Asked::Put(..), 200 | 201) => drop(model.values.insert((tenant, key), value)),
        (Asked::Delete(..), 204) => drop(model.values.remove(&(tenant, *key))),
        (Asked::Rollback(..), 200) => {
            // An older value of the same secret, whichever it was.
            let now = app.get(tenant, key).await.value();
            assert_eq!(model.owners[&now], (tenant, *key));
            model.values.insert((tenant, key), now);
        }
        _ => {}
    }
    answer.status
}

const TOKENS: usize = 60;
const REQUESTS: usize = 3000;

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_asked_by_whatever_token_no_answer_crosses_its_scope() {
    let mut runner = drawn_anew();
    let rule = "[[rules]]\ntenants = \"up*\"\nphase = \"hybrid\"\n";
    let app = Setup::new(Backend::sqlite(), Phase::Database).with(rule).start().await;
    let mut tokens = Vec::new();
    for number in 0..TOKENS {
        let mut made = made().new_tree(&mut runner).unwrap().current();
        if number == 0 {
            // One that may do everything, so that there is something to be told.
            let every = vec![Pattern(vec![Piece::Any])];
            let tenants = vec![Pattern(vec![Piece::Any]), Pattern(vec![Piece::Text("/"), Piece::Any])];
            made = Made { tenants, keys: every, actions: Action::ALL.to_vec(), fate: Fate::Valid };
        }
        let now = app.instance().clock.now();
        let texts = |patterns: &[Pattern]| patterns.iter().map(Pattern::text).collect();
        let new = NewToken {
            name: format!("token-{number}"),
            tenants: texts(&made.tenants),
            keys: texts(&made.keys),
            actions: made.actions.clone(),
            lifetime: (made.fate == Fate::Expired).then_some(Duration::ZERO),
        };
        let (token, row) = new.draw(now).unwrap();
        let database = &app.instance().service.resolver.database();
        database.insert_token(&row).await.unwrap();
        if made.fate == Fate::Revoked {
            assert_eq!(database.revoke_token(&row.name).await.unwrap(), 1);
        }
        tokens.push((made, token.expose().to_owned()));
    }
    app.instance().service.access.reload().await.unwrap();

    let mut model = Model::default();
    let mut seen: BTreeMap<u16, usize> = BTreeMap::new();
    let steps = (prop_oneof![1 => Just(0), 9 => 1..TOKENS], asked());
    for _ in 0..REQUESTS {
        let (number, asked) = steps.new_tree(&mut runner).unwrap().current();
        *seen.entry(step(&app, &mut model, &tokens, number, &asked).await).or_default() += 1;
    }
    // It was no empty house, and not all were let in, nor all kept out.
    for status in [200, 201, 204, 401, 403, 404] {
        assert!(seen.contains_key(&status), "{status}: {seen:?}");
    }
}
