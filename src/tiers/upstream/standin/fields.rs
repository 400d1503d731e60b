//! Reads the fields of a query or a body, and collects their faults in the form of the recorded
//! server's validator (zod).

use serde_json::{Map, Value, json};

use super::exchange::Reply;

pub(super) struct Fields<'a> {
    fields: &'a Map<String, Value>,
    path: Vec<Value>,
    issues: Vec<Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn of(fields: &'a Map<String, Value>) -> Self {
        Self { fields, path: Vec::new(), issues: Vec::new() }
    }

    pub(super) fn of_body(body: &'a Value) -> Result<Self, Reply> {
        match body {
            Value::Object(fields) => Ok(Self::of(fields)),
            other => Err(failure(&[wrong_type("object", Some(other), &[])])),
        }
    }

    pub(super) fn required(&mut self, name: &str) -> String {
        match self.fields.get(name) {
            Some(Value::String(text)) => text.clone(),
            other => {
                self.wrong("string", other, name);
                String::new()
            }
        }
    }

    pub(super) fn optional(&mut self, name: &str) -> Option<String> {
        self.fields.contains_key(name).then(|| self.required(name))
    }

    /// `secretPath`, or `path`: the root if it is not given, and without a trailing slash.
    pub(super) fn path(&mut self, name: &str) -> String {
        let path = self.optional(name).unwrap_or_else(|| "/".to_owned());
        match path.strip_suffix('/') {
            Some(rest) if !rest.is_empty() => rest.to_owned(),
            _ => path,
        }
    }

    /// One of the words `true` and `false`.
    pub(super) fn flag(&mut self, name: &str, default: bool) -> bool {
        let default = if default { "true" } else { "false" };
        self.choice(name, &["true", "false"], default) == "true"
    }

    pub(super) fn choice(&mut self, name: &str, options: &[&'static str], default: &'static str) -> &'static str {
        let Some(given) = self.optional(name) else { return default };
        if let Some(option) = options.iter().copied().find(|option| *option == given) {
            return option;
        }
        if !self.fields.get(name).is_some_and(Value::is_string) {
            return default;
        }
        let listed = options.iter().map(|option| format!("'{option}'")).collect::<Vec<_>>().join(" | ");
        let path = self.path_to(name);
        self.issues.push(json!({
            "received": given,
            "code": "invalid_enum_value",
            "options": options,
            "path": path,
            "message": format!("Invalid enum value. Expected {listed}, received '{given}'"),
        }));
        default
    }

    pub(super) fn strings(&mut self, name: &str) -> Vec<String> {
        match self.fields.get(name) {
            Some(Value::Array(values)) => values.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            _ => Vec::new(),
        }
    }

    /// A nested object, read by `read`.
    pub(super) fn object<T>(&mut self, name: &str, read: impl FnOnce(&mut Fields<'a>) -> T) -> Option<T> {
        match self.fields.get(name) {
            Some(Value::Object(fields)) => Some(self.nested(fields, vec![json!(name)], read)),
            other => {
                self.wrong("object", other, name);
                None
            }
        }
    }

    /// An array of at least one object, each read by `read`.
    pub(super) fn objects<T>(&mut self, name: &str, mut read: impl FnMut(&mut Fields<'a>) -> T) -> Vec<T> {
        let items = match self.fields.get(name) {
            Some(Value::Array(items)) => items,
            other => {
                self.wrong("array", other, name);
                return Vec::new();
            }
        };
        if items.is_empty() {
            let path = self.path_to(name);
            self.issues.push(json!({
                "code": "too_small", "minimum": 1, "type": "array", "inclusive": true, "exact": false,
                "message": "Array must contain at least 1 element(s)", "path": path,
            }));
        }
        let mut values = Vec::new();
        for (index, item) in items.iter().enumerate() {
            match item {
                Value::Object(fields) => {
                    values.push(self.nested(fields, vec![json!(name), json!(index)], &mut read));
                }
                other => {
                    let mut path = self.path_to(name);
                    path.push(json!(index));
                    self.issues.push(wrong_type("object", Some(other), &path));
                }
            }
        }
        values
    }

    pub(super) fn check(self) -> Result<(), Reply> {
        if self.issues.is_empty() { Ok(()) } else { Err(failure(&self.issues)) }
    }

    fn nested<T>(
        &mut self,
        fields: &'a Map<String, Value>,
        below: Vec<Value>,
        read: impl FnOnce(&mut Fields<'a>) -> T,
    ) -> T {
        let path = self.path.iter().cloned().chain(below).collect();
        let mut nested = Fields { fields, path, issues: Vec::new() };
        let value = read(&mut nested);
        self.issues.append(&mut nested.issues);
        value
    }

    fn wrong(&mut self, expected: &str, received: Option<&Value>, name: &str) {
        let path = self.path_to(name);
        self.issues.push(wrong_type(expected, received, &path));
    }

    fn path_to(&self, name: &str) -> Vec<Value> {
        self.path.iter().cloned().chain([json!(name)]).collect()
    }
}

fn failure(issues: &[Value]) -> Reply {
    Reply::new(403, json!({"statusCode": 403, "error": "ValidationFailure", "message": issues}))
}

/// The answer for fields that are all missing.
pub(super) fn missing(names: &[&str]) -> Reply {
    let issues: Vec<Value> = names.iter().map(|name| wrong_type("string", None, &[json!(name)])).collect();
    failure(&issues)
}

fn wrong_type(expected: &str, received: Option<&Value>, path: &[Value]) -> Value {
    let kind = match received {
        None => "undefined",
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "boolean",
        Some(Value::Number(_)) => "number",
        Some(Value::String(_)) => "string",
        Some(Value::Array(_)) => "array",
        Some(Value::Object(_)) => "object",
    };
    let message =
        if received.is_none() { "Required".to_owned() } else { format!("Expected {expected}, received {kind}") };
    json!({"code": "invalid_type", "expected": expected, "received": kind, "path": path, "message": message})
}
