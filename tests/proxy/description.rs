//! The server as it describes itself: requests are drawn from the description, good ones and flawed ones.

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proptest::{
    prelude::*,
    sample::{Index, select},
    strategy::ValueTree as _,
    string::string_regex,
};
use reqwest::{
    Method,
    header::{HeaderMap, HeaderValue},
};
use secretier::{access::Action, phase::Phase};
use serde_json::Value;

use crate::{
    app::{Answer, Backend, Setup, TestApp, drawn_anew},
    described::DESCRIPTION,
    quick::times,
    within::within_a_tests_time,
};

/// An operation of the description.
#[derive(Debug)]
struct Operation {
    method: Method,
    path: &'static str,
    /// Those of the path, the query and the headers.
    parameters: Vec<&'static Value>,
    listed: &'static Value,
}

impl Operation {
    fn all() -> Vec<Self> {
        let paths = DESCRIPTION.document["paths"].as_object().unwrap();
        let each = paths.iter().flat_map(|(path, item)| {
            let methods = item.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters");
            methods.map(move |(method, listed)| {
                let parameters = [&item["parameters"], &listed["parameters"]].map(|list| list.as_array());
                let parameters = parameters.into_iter().flatten().flatten();
                Self {
                    method: method.to_uppercase().parse().unwrap(),
                    path: path.as_str(),
                    parameters: parameters.map(|one| DESCRIPTION.resolved(one)).collect(),
                    listed,
                }
            })
        });
        each.collect()
    }

    fn is(&self, id: &str) -> bool {
        let name = self.listed["operationId"].as_str().unwrap_or_default();
        name.strip_suffix("_in_folder").unwrap_or(name) == id
    }

    fn within(&self, place: &str) -> impl Iterator<Item = &'static Value> {
        self.parameters.iter().copied().filter(move |parameter| parameter["in"] == place)
    }

    /// The schema of its JSON body.
    fn body(&self) -> Option<&'static Value> {
        let schema = &self.listed["requestBody"]["content"]["application/json"]["schema"];
        (!schema.is_null()).then(|| DESCRIPTION.resolved(schema))
    }

    fn wants_token(&self) -> bool {
        self.listed["security"].is_null()
    }

    fn has_name(&self, name: &str) -> bool {
        self.within("path").any(|parameter| parameter["name"] == name)
    }

    /// What may be wrong with a request for it.
    fn flaws(&self) -> Vec<Flaw> {
        let mut flaws =
            vec![Flaw::UnknownParameter, Flaw::WrongMethod, Flaw::WrongPath, Flaw::ForeignHost, Flaw::Forwarded];
        if self.wants_token() {
            flaws.extend([Flaw::NoToken, Flaw::BadToken, Flaw::NarrowToken, Flaw::BadAuditField]);
            flaws.extend((self.has_name("tenant") || self.has_name("folder")).then_some(Flaw::BadTenant));
            flaws.extend(self.has_name("key").then_some(Flaw::BadKey));
            if self.within("query").next().is_some() {
                flaws.extend([Flaw::BadParameter, Flaw::ParameterTwice]);
            }
            if self.body().is_some() {
                flaws.extend([Flaw::BadBody, Flaw::BrokenBody, Flaw::EncodedBody, Flaw::BodyOfAnotherType]);
                flaws.extend((!self.is("batch_get")).then_some(Flaw::LongBody));
            }
        }
        flaws
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    NoToken,
    BadToken,
    /// A token that reaches nothing that there is.
    NarrowToken,
    BadTenant,
    BadKey,
    UnknownParameter,
    BadParameter,
    ParameterTwice,
    BadBody,
    BrokenBody,
    LongBody,
    EncodedBody,
    BodyOfAnotherType,
    BadAuditField,
    WrongMethod,
    WrongPath,
    ForeignHost,
    Forwarded,
}

/// A request as it was drawn.
#[derive(Debug, Clone)]
struct Drawn {
    operation: usize,
    names: Vec<(&'static str, String)>,
    query: Vec<(&'static str, String)>,
    headers: Vec<(&'static str, String)>,
    body: Option<String>,
    flaw: Option<Flaw>,
    /// Chooses among the ways in which it is flawed.
    way: Index,
    /// Where a body is flawed, what is sent in its place.
    other_body: Value,
}

const TENANTS: [&str; 3] = ["acme", "globex", "upco"];
const KEYS: [&str; 4] = ["K", "with/slash", "sp ace", "\u{fc}\u{1f511}"];

fn draw(operations: &'static [Operation]) -> impl Strategy<Value = Drawn> {
    let operation = 0..operations.len();
    operation.prop_flat_map(move |number| {
        let operation = &operations[number];
        let names: Vec<_> = operation.within("path").map(|one| (Just(name_of(one)), path_name(one))).collect();
        let query: Vec<_> = operation.within("query").map(sometimes).collect();
        let headers: Vec<_> = operation.within("header").map(sometimes).collect();
        let body = match operation.body() {
            Some(schema) => of_schema(schema).prop_map(|body| Some(body.to_string())).boxed(),
            None => Just(None).boxed(),
        };
        let flaw = proptest::option::of(select(operation.flaws()));
        let accept = proptest::option::of(select(vec![
            "text/plain",
            "*/*",
            "application/json;q=0.1, text/*",
            "TEXT/PLAIN;Q=0",
            "image/png",
            "text/plain;q=x",
            ",",
        ]));
        (names, query, headers, body, flaw, accept, any::<Index>(), any_json()).prop_map(
            move |(names, query, headers, body, flaw, accept, way, other_body)| {
                let query = query.into_iter().flatten().collect();
                let mut headers: Vec<_> = headers.into_iter().flatten().collect();
                // One condition at a time.
                if headers.iter().any(|(name, _)| *name == "If-Match") {
                    headers.retain(|(name, _)| *name != "If-None-Match");
                }
                headers.extend(accept.map(|accept| ("Accept", accept.to_owned())));
                Drawn { operation: number, names, query, headers, body, flaw, way, other_body }
            },
        )
    })
}

fn name_of(parameter: &'static Value) -> &'static str {
    parameter["name"].as_str().unwrap()
}

/// A name in a path: one that is there, or any.
fn path_name(parameter: &'static Value) -> BoxedStrategy<String> {
    let known: &[&str] = if parameter["name"] != "key" { &TENANTS } else { &KEYS };
    let known = select(known.to_vec()).prop_map(str::to_owned);
    // A client resolves dots before it sends them.
    let any = text_of(&parameter["schema"]).prop_filter("dots", |name| name != "." && name != "..");
    prop_oneof![3 => known, 1 => any].boxed()
}

fn sometimes(parameter: &'static Value) -> BoxedStrategy<Option<(&'static str, String)>> {
    let name = name_of(parameter);
    let value = match name {
        "Cache-Control" => select(vec!["no-cache", "max-age=0", "No-Cache, x"]).prop_map(str::to_owned).boxed(),
        // The oldest versions are those that are there.
        "version" => prop_oneof![(1..4u8).prop_map(|number| number.to_string()), text_of(&parameter["schema"])].boxed(),
        _ if parameter["in"] == "header" && parameter["schema"]["pattern"].is_null() => {
            string_regex("[!-~]{1,40}").unwrap().boxed()
        }
        _ => text_of(&parameter["schema"]),
    };
    proptest::option::weighted(0.3, value.prop_map(move |value| (name, value))).boxed()
}

/// The one type of a schema other than null.
fn type_of(schema: &Value) -> &str {
    let types = schema["type"].as_array().map_or(std::slice::from_ref(&schema["type"]), Vec::as_slice);
    types.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or("")
}

/// A parameter's value.
fn text_of(schema: &'static Value) -> BoxedStrategy<String> {
    of_schema(schema).prop_map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned)).boxed()
}

/// A value of a schema, as the description has them.
fn of_schema(schema: &'static Value) -> BoxedStrategy<Value> {
    let schema = DESCRIPTION.resolved(schema);
    match type_of(schema) {
        "boolean" => any::<bool>().prop_map(Value::from).boxed(),
        "integer" => {
            let (least, most) = (schema["minimum"].as_i64(), schema["maximum"].as_i64());
            (least.unwrap_or(0)..=most.unwrap_or(i64::MAX)).prop_map(Value::from).boxed()
        }
        "string" if schema["format"] == "date-time" => {
            select(vec!["2026-01-31T12:00:00Z", "1970-01-01T00:00:00Z", "2262-01-01T00:00:00.5Z"])
                .prop_map(Value::from)
                .boxed()
        }
        "string" => match schema["pattern"].as_str() {
            Some(pattern) => {
                let pattern = pattern.trim_start_matches('^').trim_end_matches('$');
                string_regex(pattern).unwrap().prop_map(Value::from).boxed()
            }
            None => any::<String>().prop_map(Value::from).boxed(),
        },
        "array" => {
            let most = schema["maxItems"].as_u64().map_or(4, |most| most.min(4)) as usize;
            proptest::collection::vec(of_schema(&schema["items"]), 0..=most).prop_map(Value::from).boxed()
        }
        "object" => {
            let members = schema["properties"].as_object().unwrap().iter();
            let members: Vec<_> = members.map(|(name, schema)| (Just(name.clone()), of_schema(schema))).collect();
            members.prop_map(|members| Value::Object(members.into_iter().collect())).boxed()
        }
        "" => any_json().boxed(),
        other => panic!("no value is drawn of type {other:?}: {schema}"),
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let name = prop_oneof![Just("value".to_owned()), Just("keys".to_owned()), Just("version".to_owned()), ".{0,4}"];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((name, inner), 0..4).prop_map(|all| Value::Object(all.into_iter().collect())),
        ]
    })
}

/// The tokens that requests are sent with.
struct Tokens {
    narrow: String,
}

impl Drawn {
    /// Sends it, flawed as it was drawn. The answer is held to the description on the way.
    async fn answer(&self, app: &TestApp, tokens: &Tokens, operation: &Operation) -> Answer {
        let is = |flaw| self.flaw == Some(flaw);
        let method = match self.flaw {
            Some(Flaw::WrongMethod) => self.way.get(&["OPTIONS", "PATCH", "TRACE", "PURGE"]).parse().unwrap(),
            _ => operation.method.clone(),
        };
        let url = format!("{}?{}", self.path(operation), self.query(operation));
        let mut request = app.instance().request(method, url.trim_end_matches('?'));
        match self.flaw {
            Some(Flaw::NoToken) => {}
            Some(Flaw::BadToken) => {
                let other = format!("st_{:016x}_{}", 1, "A".repeat(43));
                let way = [format!("Bearer {other}"), "Bearer".to_owned(), "Basic YTpi".to_owned(), "\t?".to_owned()];
                request = request.header("Authorization", self.way.get(&way));
            }
            Some(Flaw::NarrowToken) => request = request.bearer_auth(&tokens.narrow),
            _ => request = request.bearer_auth(&app.token),
        }
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        if is(Flaw::BadAuditField) {
            request = request.header("X-Audit-User", "a").header("X-Audit-User", "b");
        }
        if is(Flaw::ForeignHost) {
            request = request.header("Host", "evil.example");
        }
        if is(Flaw::Forwarded) {
            request = request.header(*self.way.get(&["Forwarded", "X-Forwarded-For", "Via"]), "1.1 somebody");
        }
        if let Some(body) = self.sent_body(operation) {
            request = request.body(body);
            request = match self.flaw {
                Some(Flaw::EncodedBody) => request.header("Content-Encoding", *self.way.get(&["gzip", "BR, identity"])),
                Some(Flaw::BodyOfAnotherType) => {
                    request.header("Content-Type", *self.way.get(&["text/plain", "application/x-www-form-urlencoded"]))
                }
                _ => request.header("Content-Type", "application/json; charset=utf-8"),
            };
        }
        Answer::of(request).await
    }

    fn path(&self, operation: &Operation) -> String {
        let (long_tenant, long_key) = ("t".repeat(64), "k".repeat(256));
        let mut path = operation.path.to_owned();
        for (name, value) in &self.names {
            let sent = match (self.flaw, *name) {
                (Some(Flaw::BadTenant), "tenant" | "folder") => {
                    let way = ["A", "-a", "a.b", "%ff", "%00", "a%2Fb", "\u{e9}", long_tenant.as_str()];
                    (*self.way.get(&way)).to_owned()
                }
                (Some(Flaw::BadKey), "key") => {
                    let way = ["%00", "%ff", "%C2%85", "a%0Ab", long_key.as_str()];
                    (*self.way.get(&way)).to_owned()
                }
                _ => utf8_percent_encode(value, NON_ALPHANUMERIC).to_string(),
            };
            path = path.replace(&format!("{{{name}}}"), &sent);
        }
        if self.flaw == Some(Flaw::WrongPath) {
            path.push_str("/x/y/z");
        }
        path
    }

    fn query(&self, operation: &Operation) -> String {
        let mut sent: Vec<String> = Vec::new();
        for (name, value) in &self.query {
            sent.push(format!("{name}={}", utf8_percent_encode(value, NON_ALPHANUMERIC)));
        }
        let parameters: Vec<_> = operation.within("query").collect();
        let one = || name_of(parameters[self.way.index(parameters.len())]);
        match self.flaw {
            Some(Flaw::UnknownParameter) => sent.push("nobody=1".to_owned()),
            Some(Flaw::BadParameter) => {
                // No type takes a control character.
                sent.retain(|pair| !pair.starts_with(&format!("{}=", one())));
                sent.push(format!("{}=%01", one()));
            }
            Some(Flaw::ParameterTwice) => sent.extend([format!("{}=1", one()), format!("{}=1", one())]),
            _ => {}
        }
        sent.join("&")
    }

    fn sent_body(&self, operation: &Operation) -> Option<String> {
        let body = self.body.as_ref()?;
        Some(match self.flaw {
            Some(Flaw::BadBody) => match DESCRIPTION.is_of(operation.body()?, &self.other_body) {
                // It happens to be a good one.
                true => "[]".to_owned(),
                false => self.other_body.to_string(),
            },
            Some(Flaw::BrokenBody) => format!("{}\"", &body[..1]),
            Some(Flaw::LongBody) => format!("{body}{}", " ".repeat(8 << 10)),
            _ => body.clone(),
        })
    }

    /// What the description promises of its answer.
    fn check(&self, operation: &Operation, answer: &Answer) {
        let code = answer.text.split("\"code\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or("");
        let is_head = operation.method == Method::HEAD;
        let expected: &[u16] = match self.flaw {
            // Failures are counted, and are refused for a while.
            Some(Flaw::NoToken) => &[401, 429],
            Some(Flaw::BadToken) => &[401, 429],
            Some(Flaw::NarrowToken) => &[200, 403],
            Some(Flaw::BadTenant | Flaw::BadKey | Flaw::BadParameter | Flaw::ParameterTwice) => &[400],
            Some(Flaw::UnknownParameter | Flaw::BadBody | Flaw::BrokenBody | Flaw::BadAuditField) => &[400],
            Some(Flaw::LongBody) => &[413],
            Some(Flaw::EncodedBody | Flaw::BodyOfAnotherType) => &[415],
            Some(Flaw::WrongMethod) => &[405],
            Some(Flaw::WrongPath) => &[404],
            Some(Flaw::ForeignHost | Flaw::Forwarded) => &[403],
            // Upstream does not take every name and every value.
            None if operation.method == Method::PUT && self.names[0].1 == "upco" => &[200, 201, 400, 404, 409, 503],
            None if operation.method == Method::DELETE && self.names[0].1 == "upco" => &[204, 400, 404, 409],
            None if operation.is("roll_back_secret") && self.names[0].1 == "upco" => &[200, 400, 404, 409],
            None if operation.is("take_webhook") => &[401, 429],
            // It may refuse a name, or deny the folder.
            None if operation.path.contains("/rotat") && self.names.iter().any(|(_, name)| name == "upco") => {
                &[200, 202, 400, 404, 409, 503]
            }
            None => &[200, 201, 202, 204, 304, 404, 409],
        };
        let is_promised = expected.contains(&answer.status)
            && (is_head || self.flaw != Some(Flaw::WrongPath) || code == "route_not_found")
            && (self.flaw != Some(Flaw::WrongMethod) || self.allows(operation, answer));
        assert!(is_promised, "{expected:?} of {} {} by {self:#?}: {answer:?}", operation.method, operation.path);
    }

    /// Whether `Allow` lists the methods of the path, among them those of this operation.
    fn allows(&self, operation: &Operation, answer: &Answer) -> bool {
        let listed = DESCRIPTION.document["paths"][operation.path].as_object().unwrap();
        let methods = listed.keys().filter(|name| *name != "parameters").map(|method| method.to_uppercase());
        let allowed: Vec<&str> = answer.header("allow").split(", ").collect();
        methods.into_iter().all(|method| allowed.contains(&method.as_str()))
    }
}

#[test]
fn an_answer_that_is_not_as_described_is_noticed() {
    let is_described = |path: &str, status: u16, more: &[(&'static str, &'static str)], body: &str| {
        let mut headers = HeaderMap::new();
        for (name, value) in [("cache-control", "no-store"), ("content-type", "application/json")].iter().chain(more) {
            headers.insert(*name, HeaderValue::from_static(value));
        }
        let check = || DESCRIPTION.check(&Method::GET, path, status, &headers, body);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_ok()
    };
    let (path, body) = ("/v1/tenants/a", r#"{"tenant":"a","phase":"hybrid","keys":null,"snapshot_age":1}"#);
    let problem = r#"{"title":"T","status":404,"code":"c","detail":"d"}"#;
    let of_problem = ("content-type", "application/problem+json");
    assert!(is_described(path, 200, &[("date", "any")], body));
    assert!(is_described("/nothing", 404, &[of_problem], problem));
    for (path, status, more, body) in [
        (path, 201, &[][..], body),
        (path, 500, &[of_problem], problem),
        (path, 200, &[("x-other", "1")], body),
        (path, 200, &[("cache-control", "private")], body),
        (path, 200, &[("content-type", "text/html")], body),
        (path, 200, &[], "{}"),
        (path, 200, &[], "no JSON"),
        (path, 200, &[], r#"{"tenant":1,"phase":"hybrid"}"#),
        (path, 200, &[], r#"{"tenant":"a","phase":"hybrid","other":1}"#),
        (path, 404, &[], problem),
        (path, 503, &[of_problem, ("retry-after", "soon")], problem),
        ("/nothing", 200, &[], body),
        ("/nothing", 409, &[of_problem], problem),
    ] {
        assert!(!is_described(path, status, more, body), "{status} {path} {more:?} {body}");
    }
}

#[test]
fn the_description_is_valid_by_the_schema_that_openapi_publishes() {
    let schema = serde_json::from_str(include_str!("../support/openapi-3.1.json")).unwrap();
    let errors: Vec<String> = jsonschema::draft202012::new(&schema)
        .unwrap()
        .iter_errors(&DESCRIPTION.document)
        .map(|error| format!("{}: {}", error.instance_path(), error.to_string().chars().take(300).collect::<String>()))
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_drawn_from_the_description_are_answered_as_it_says() {
    within_a_tests_time("what is drawn is answered", async {
        let rule = "[[rules]]\ntenants = \"up*\"\nphase = \"hybrid\"\n";
        let mut setup = Setup::new(Backend::sqlite(), Phase::Database).with(rule);
        // A body of 8 KiB is too long for any route but a batch.
        setup.server = "max_value = \"1KiB\"\n".to_owned();
        setup.infisical = "webhook_secret = \"hush\"".to_owned();
        let app = setup.start().await;
        for tenant in &TENANTS[..2] {
            for key in KEYS {
                assert_eq!(app.put(tenant, key, "v").await.status, 201);
            }
        }
        app.holds("upco", &[("K", "v"), ("with/slash", "w")]);
        let tokens = Tokens { narrow: app.new_token("narrow", &["nobody"], &[Action::Read]).await };
        let operations: &'static [Operation] = Box::leak(Operation::all().into_boxed_slice());
        let (mut runner, all) = (drawn_anew(), times(1500, 300));
        let (mut good, mut answered) = (0, 0);
        for _ in 0..all {
            let drawn = draw(operations).new_tree(&mut runner).unwrap().current();
            let operation = &operations[drawn.operation];
            let answer = drawn.answer(&app, &tokens, operation).await;
            drawn.check(operation, &answer);
            if drawn.flaw.is_none() {
                good += 1;
                answered += usize::from(matches!(answer.status, 200..=299 | 304));
            }
        }
        assert!(good > all / 5 && answered > good / 4, "{answered} of {good} were answered with what was asked for");
    })
    .await;
}
