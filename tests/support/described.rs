//! Holds answers to the API's own description: what is answered stands there.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, PoisonError},
};

use jsonschema::Validator;
use reqwest::{
    Method,
    header::{self, HeaderMap, HeaderName},
};
use serde_json::{Value, json};

/// Headers that HTTP itself has, which no description lists.
const OF_HTTP: [HeaderName; 5] =
    [header::CONNECTION, header::CONTENT_LENGTH, header::CONTENT_TYPE, header::DATE, header::TRANSFER_ENCODING];

/// The answers to a path or a method that is not listed, among the components of the description.
const OF_NO_ROUTE: [(u16, &str); 9] = [
    (400, "BadRequest"),
    (401, "Unauthorized"),
    (403, "Forbidden"),
    (404, "NotFound"),
    (405, "MethodNotAllowed"),
    (414, "UriTooLong"),
    (429, "TooManyRequests"),
    (431, "HeadTooLong"),
    (503, "Unavailable"),
];

/// The description of every instance of this program.
pub(crate) static DESCRIPTION: LazyLock<Description> = LazyLock::new(Description::of_the_program);

pub(crate) struct Description {
    pub(crate) document: Value,
    /// The same with schemas that allow no member that they do not list.
    strict: Value,
    /// By the schema's text.
    validators: Mutex<HashMap<String, &'static Validator>>,
}

impl Description {
    fn of_the_program() -> Self {
        let document: Value = serde_json::from_str(secretier::server::openapi()).unwrap();
        let mut strict = document.clone();
        for schema in strict["components"]["schemas"].as_object_mut().unwrap().values_mut() {
            close(schema);
        }
        Self { document, strict, validators: Mutex::default() }
    }

    /// Holds an answer to the description.
    ///
    /// # Panics
    /// It says something else, or nothing, of this answer.
    pub(crate) fn check(&self, method: &Method, path: &str, status: u16, headers: &HeaderMap, body: &str) {
        let asked = format!("{method} {path}: {status}");
        let response = self.response(method, path, status).unwrap_or_else(|| {
            panic!("{asked}: the description has no such answer: {headers:?} {body}");
        });
        for (name, value) in headers.iter().filter(|(name, _)| !OF_HTTP.contains(name)) {
            let described = response["headers"].as_object().and_then(|described| {
                described.iter().find(|(described, _)| described.eq_ignore_ascii_case(name.as_str()))
            });
            let (_, described) = described.unwrap_or_else(|| panic!("{asked}: the header {name} is not described"));
            let schema = &self.resolved(described)["schema"];
            let text = value.to_str().unwrap();
            let value = match schema["type"].as_str() {
                Some("integer") => text.parse::<u64>().map_or(json!(text), |number| json!(number)),
                _ => json!(text),
            };
            self.validate(&format!("{asked}: {name}"), schema, &value);
        }
        self.check_content(&asked, method, response, headers, body);
    }

    fn check_content(&self, asked: &str, method: &Method, response: &Value, headers: &HeaderMap, body: &str) {
        let sent = headers.get(header::CONTENT_TYPE).map(|sent| sent.to_str().unwrap());
        let Some(sent) = sent.map(|sent| sent.split(';').next().unwrap().trim()) else {
            assert!(body.is_empty(), "{asked}: a body without a type: {body}");
            // A bare refusal is HTTP's own.
            let may_be_bare = response["content"].is_null() || asked.ends_with(": 400");
            assert!(may_be_bare, "{asked}: nothing, where {} is described", response["content"]);
            return;
        };
        let content = &response["content"][sent];
        assert!(content.is_object(), "{asked}: {sent} is not described");
        if *method == Method::HEAD {
            assert_eq!(body, "", "{asked}");
        } else if sent.ends_with("json") {
            let body = serde_json::from_str(body).unwrap_or_else(|error| panic!("{asked}: no JSON: {error}"));
            self.validate(asked, &content["schema"], &body);
        }
    }

    /// What is described for a request, without references.
    fn response(&self, method: &Method, path: &str, status: u16) -> Option<&Value> {
        let listed = match self.operation(method, path) {
            Some(operation) => &operation["responses"][status.to_string()],
            None => {
                let (_, name) = OF_NO_ROUTE.iter().find(|(of, _)| *of == status)?;
                &self.strict["components"]["responses"][name]
            }
        };
        (!listed.is_null()).then(|| self.resolved(listed))
    }

    /// The operation of a path as it was sent. A pattern without a name there goes before one with it.
    fn operation(&self, method: &Method, path: &str) -> Option<&Value> {
        let method = method.as_str().to_ascii_lowercase();
        let fitting = self.strict["paths"].as_object().unwrap().iter().filter(|(pattern, _)| fits(pattern, path));
        let operations = fitting.filter_map(|(pattern, item)| Some((pattern.matches('{').count(), item.get(&method)?)));
        operations.min_by_key(|(names, _)| *names).map(|(_, operation)| operation)
    }

    /// What a reference leads to; anything else itself.
    pub(crate) fn resolved<'v>(&'v self, value: &'v Value) -> &'v Value {
        match value["$ref"].as_str() {
            Some(target) => self.strict.pointer(target.trim_start_matches('#')).expect(target),
            None => value,
        }
    }

    /// Whether the value is of this schema.
    pub(crate) fn is_of(&self, schema: &Value, value: &Value) -> bool {
        self.validator(schema).is_valid(value)
    }

    /// # Panics
    /// The value is not of this schema.
    fn validate(&self, what: &str, schema: &Value, value: &Value) {
        let errors: Vec<String> = self.validator(schema).iter_errors(value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{what}: {errors:?}");
    }

    /// Each schema is compiled once, and kept for as long as the tests run.
    fn validator(&self, schema: &Value) -> &'static Validator {
        let mut validators = self.validators.lock().unwrap_or_else(PoisonError::into_inner);
        let text = schema.to_string();
        let refers = text.contains("$ref");
        validators.entry(text).or_insert_with(|| {
            let mut whole = schema.clone();
            if refers {
                // References are looked up from the root.
                whole["components"] = json!({ "schemas": self.strict["components"]["schemas"] });
            }
            Box::leak(Box::new(jsonschema::draft202012::new(&whole).unwrap()))
        })
    }
}

/// Whether a path fits a pattern. What stands for a name has no slash in it.
fn fits(pattern: &str, path: &str) -> bool {
    let (pattern, path): (Vec<_>, Vec<_>) = (pattern.split('/').collect(), path.split('/').collect());
    pattern.len() == path.len() && pattern.iter().zip(&path).all(|(part, name)| part.starts_with('{') || part == name)
}

/// Has an object allow no member that is not listed, and whatever stands within it.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            if members.contains_key("properties") {
                members.entry("additionalProperties").or_insert(json!(false));
            }
            members.values_mut().for_each(close);
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}
