//! What goes over the wire, and how a listed folder becomes secrets. Fields that we do
//! not use are ignored, and those that some server leaves out have defaults.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::error::Category;
use zeroize::Zeroizing;

use super::super::{UpstreamError, UpstreamSecret};
use crate::{
    clock::Timestamp,
    secret::{SecretKey, SecretValue, Version},
};

/// Newer servers write this where the identity may see names and not values.
const HIDDEN: &str = "<hidden-by-infisical>";

/// The answer to a login.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Granted {
    pub(super) access_token: Value,
    /// Seconds; 0 where the token does not end.
    #[serde(default)]
    pub(super) expires_in: u64,
}

/// The answer to a list of folders.
#[derive(Deserialize)]
pub(super) struct FolderList {
    pub(super) folders: Vec<Folder>,
}

#[derive(Deserialize)]
pub(super) struct Folder {
    pub(super) name: String,
}

/// The answer to a write.
#[derive(Deserialize)]
pub(super) struct Written {
    /// Present where a policy holds the change back.
    pub(super) approval: Option<de::IgnoredAny>,
}

/// The answer to a list of one folder's secrets.
#[derive(Deserialize)]
pub(super) struct SecretList {
    secrets: Vec<Secret>,
    imports: Option<Vec<Import>>,
}

#[derive(Deserialize)]
struct Import {
    secrets: Vec<Secret>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Secret {
    #[serde(default)]
    id: Option<String>,
    secret_key: String,
    secret_value: Option<Value>,
    secret_value_hidden: Option<bool>,
    secret_path: Option<String>,
    r#type: Option<String>,
    version: Option<i64>,
    created_at: Option<String>,
    updated_at: Option<String>,
}

impl SecretList {
    /// The secrets of `folder`, each key once. A folder's own secret wins over an
    /// imported one, and of imports the last, as in Infisical's own command line.
    ///
    /// # Errors
    /// [`UpstreamError::Malformed`] if any value is missing: nothing partial is given.
    pub(super) fn resolve(mut self, folder: &str) -> Result<Vec<UpstreamSecret>, UpstreamError> {
        self.secrets.retain(|secret| secret.secret_path.as_deref().is_none_or(|path| same_folder(path, folder)));
        let imports = self.imports.unwrap_or_default().into_iter().rev().map(|import| import.secrets);

        let mut secrets = BTreeMap::new();
        for source in std::iter::once(self.secrets).chain(imports) {
            for (key, secret) in by_key(source, folder) {
                secrets.entry(key).or_insert(secret);
            }
        }
        secrets.into_iter().map(|(key, secret)| secret.checked(key)).collect()
    }
}

/// One folder's shared secrets by key.
fn by_key(secrets: Vec<Secret>, folder: &str) -> BTreeMap<SecretKey, Secret> {
    let mut by_key: BTreeMap<SecretKey, Secret> = BTreeMap::new();
    for secret in secrets {
        // A personal override is one person's own, and stands beside the shared secret.
        if secret.r#type.as_deref().is_some_and(|kind| kind != "shared") {
            continue;
        }
        let Ok(key) = secret.secret_key.parse::<SecretKey>() else {
            tracing::warn!(folder, name = ?secret.secret_key, "a secret was skipped: its name cannot be used as a key");
            continue;
        };
        match by_key.get_mut(&key) {
            None => {
                by_key.insert(key, secret);
            }
            Some(known) => {
                tracing::warn!(folder, key = ?key.as_str(), "two secrets have the same name; the one changed last counts");
                if secret.age() > known.age() {
                    *known = secret;
                }
            }
        }
    }
    by_key
}

impl Secret {
    /// Orders secrets of one name, the one that counts last: the same whatever order
    /// they were listed in. Times are RFC 3339 in UTC, which sort as text.
    fn age(&self) -> impl Ord {
        let value = self.secret_value.as_ref().map(|value| value.0.expose());
        (&self.updated_at, &self.created_at, &self.id, self.version, value)
    }

    fn checked(self, key: SecretKey) -> Result<UpstreamSecret, UpstreamError> {
        let value = match self.secret_value {
            Some(value) if self.secret_value_hidden != Some(true) && value.0.expose() != HIDDEN => value.0,
            _ => {
                return Err(UpstreamError::Malformed(
                    "values are hidden: let the identity read values, not only names",
                ));
            }
        };
        let version = self.version.and_then(Version::new).unwrap_or(Version::FIRST);
        let updated_at = self.updated_at.as_deref().and_then(Timestamp::from_rfc3339);
        Ok(UpstreamSecret { key, value, version, updated_at })
    }
}

fn same_folder(a: &str, b: &str) -> bool {
    a.trim_matches('/') == b.trim_matches('/')
}

/// A secret text: copied once from the answer, wiped when dropped.
pub(super) struct Value(pub(super) SecretValue);

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl de::Visitor<'_> for Text {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E>(self, text: &str) -> Result<Value, E> {
                Ok(Value(SecretValue::new(text.to_owned())))
            }

            fn visit_string<E>(self, text: String) -> Result<Value, E> {
                Ok(Value(SecretValue::new(text)))
            }
        }
        deserializer.deserialize_string(Text)
    }
}

/// What an error answer says. Compared with, never shown: it may repeat what was sent.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Problem {
    error: Option<Text>,
    message: Option<Text>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Text {
    Plain(String),
    /// Validation failures come as a list.
    Other(de::IgnoredAny),
}

impl Problem {
    /// The body of an error answer, if it is one that Infisical would send.
    pub(super) fn read(body: &[u8]) -> Option<Self> {
        serde_json::from_slice(body).ok()
    }

    pub(super) fn is_permission_denied(&self) -> bool {
        matches!(&self.error, Some(Text::Plain(error)) if error == "PermissionDenied")
    }

    pub(super) fn is_validation_failure(&self) -> bool {
        matches!(&self.error, Some(Text::Plain(error)) if error == "ValidationFailure")
            || matches!(self.message, Some(Text::Other(_)))
    }

    /// Whether a message with status 500 is about the token: the server's token library
    /// throws, and nothing above it catches.
    pub(super) fn speaks_of_token(&self) -> bool {
        let message = self.message().to_ascii_lowercase();
        ["jwt", "token", "invalid signature", "invalid algorithm"].iter().any(|word| message.contains(word))
    }

    /// Whether a message with status 400 says that the token has been used up.
    pub(super) fn speaks_of_access_token(&self) -> bool {
        self.message().to_ascii_lowercase().contains("access token")
    }

    pub(super) fn is_route_not_found(&self) -> bool {
        self.message().starts_with("Route ") && self.message().ends_with(" not found")
    }

    /// Deleting what is not there makes the recorded server stumble over its own result.
    pub(super) fn is_stumble_over_nothing(&self) -> bool {
        self.message().starts_with("Cannot read properties of undefined")
    }

    pub(super) fn is_folder_not_found(&self) -> bool {
        self.message().starts_with("Folder ") && self.message().contains("not found")
    }

    pub(super) fn is_secret_not_found(&self) -> bool {
        self.message().starts_with("Secret ") && self.message().contains("not found")
    }

    pub(super) fn is_already_there(&self) -> bool {
        self.message().contains("already exist")
    }

    /// What may be wrong, in our words.
    pub(super) fn hint(&self) -> &'static str {
        let message = self.message().to_ascii_lowercase();
        if self.is_route_not_found() {
            "it knows no such route; check infisical.site_url"
        } else if message.contains("environment with") || message.starts_with("environment") {
            "check environment"
        } else if message.contains("project") || message.contains("workspace") {
            "check infisical.project_id"
        } else if self.is_folder_not_found() {
            "check environment and infisical.tenants_path"
        } else {
            "check infisical.project_id, environment and infisical.tenants_path"
        }
    }

    fn message(&self) -> &str {
        match &self.message {
            Some(Text::Plain(message)) => message,
            Some(Text::Other(_)) | None => "",
        }
    }
}

/// A login.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Credentials<'a> {
    pub(super) client_id: &'a str,
    pub(super) client_secret: &'a str,
}

/// The body of a write.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Write<'a> {
    #[serde(flatten)]
    pub(super) project: Project<'a>,
    pub(super) environment: &'a str,
    pub(super) secret_path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) secret_value: Option<&'a str>,
    pub(super) r#type: &'static str,
}

/// The body that creates a folder.
#[derive(Serialize)]
pub(super) struct NewFolder<'a> {
    #[serde(flatten)]
    pub(super) project: Project<'a>,
    pub(super) environment: &'a str,
    pub(super) name: &'a str,
    pub(super) path: &'a str,
}

/// The project, under its older or its newer name.
#[derive(Serialize, Clone, Copy)]
pub(super) enum Project<'a> {
    #[serde(rename = "workspaceId")]
    Workspace(&'a str),
    #[serde(rename = "projectId")]
    Project(&'a str),
}

/// A JSON body that is wiped when the last handle to it is dropped.
pub(super) fn body(content: &impl Serialize, secret: usize) -> Result<Bytes, UpstreamError> {
    // A character takes at most six as JSON. With that much room the buffer never moves,
    // so no copy of the secret stays behind.
    let mut body = Zeroizing::new(Vec::with_capacity(secret.saturating_mul(6).saturating_add(4096)));
    serde_json::to_writer(&mut *body, content)
        .map_err(|_| UpstreamError::Unstorable("the request cannot be written"))?;
    Ok(Bytes::from_owner(body))
}

/// Reads a body that is known to be JSON.
pub(super) fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, UpstreamError> {
    serde_json::from_slice(body).map_err(|error| {
        UpstreamError::Malformed(match error.classify() {
            Category::Syntax => "a text in it is not Unicode (half of a surrogate pair, say); write that secret again",
            Category::Data => "it has another shape than Infisical's answers",
            Category::Io | Category::Eof => "it was cut off",
        })
    })
}

/// Whether this is JSON at all, whatever it says.
pub(super) fn is_json(body: &[u8]) -> bool {
    serde_json::from_slice::<de::IgnoredAny>(body).is_ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resolve(list: &serde_json::Value) -> Result<Vec<(String, String)>, UpstreamError> {
        let text = list.to_string();
        let secrets = read::<SecretList>(text.as_bytes())?.resolve("/tenants/acme")?;
        Ok(secrets.into_iter().map(|secret| (secret.key.to_string(), secret.value.expose().to_owned())).collect())
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn own_secrets_win_over_imported_ones_and_later_imports_over_earlier() {
        let list = json!({
            "secrets": [{"secretKey": "A", "secretValue": "own"}],
            "imports": [
                {"secretPath": "/x", "secrets": [{"secretKey": "A", "secretValue": "1"}, {"secretKey": "B", "secretValue": "1"}]},
                {"secretPath": "/y", "secrets": [{"secretKey": "A", "secretValue": "2"}, {"secretKey": "B", "secretValue": "2"}]},
            ],
        });
        assert_eq!(resolve(&list).unwrap(), pairs(&[("A", "own"), ("B", "2")]));
    }

    #[test]
    fn of_two_secrets_with_one_name_the_last_changed_counts_in_whatever_order() {
        let secret = |value: &str, updated: &str, created: &str, id: &str| json!({"secretKey": "A", "secretValue": value, "updatedAt": updated, "createdAt": created, "id": id});
        let listed = [secret("1", "2026-01-02", "2026-01-01", "z"), secret("2", "2026-01-03", "2026-01-01", "a")];
        let created = [secret("1", "2026-01-02", "2026-01-01", "z"), secret("2", "2026-01-02", "2026-01-02", "a")];
        let id = [secret("1", "2026-01-02", "2026-01-01", "a"), secret("2", "2026-01-02", "2026-01-01", "b")];
        for [first, second] in [listed, created, id] {
            for secrets in [[&first, &second], [&second, &first]] {
                assert_eq!(resolve(&json!({"secrets": secrets})).unwrap(), pairs(&[("A", "2")]));
            }
        }
    }

    #[test]
    fn personal_secrets_and_those_of_other_folders_and_odd_names_are_left_out() {
        let list = json!({"secrets": [
            {"secretKey": "A", "secretValue": "shared", "type": "shared", "secretPath": "/tenants/acme"},
            {"secretKey": "A", "secretValue": "mine", "type": "personal", "updatedAt": "9"},
            {"secretKey": "B", "secretValue": "deeper", "secretPath": "/tenants/acme/deeper"},
            {"secretKey": "", "secretValue": "x"},
            {"secretKey": "N\nL", "secretValue": "x"},
            {"secretKey": "x".repeat(256), "secretValue": "x"},
        ], "imports": null, "unknown": {"field": 1}});
        assert_eq!(resolve(&list).unwrap(), pairs(&[("A", "shared")]));
    }

    #[test]
    fn a_hidden_or_missing_value_gives_nothing_rather_than_a_part() {
        for secret in [
            json!({"secretKey": "B"}),
            json!({"secretKey": "B", "secretValue": null}),
            json!({"secretKey": "B", "secretValue": "", "secretValueHidden": true}),
            json!({"secretKey": "B", "secretValue": HIDDEN}),
        ] {
            let list = json!({"secrets": [{"secretKey": "A", "secretValue": "a"}, secret]});
            assert!(matches!(resolve(&list), Err(UpstreamError::Malformed(reason)) if reason.contains("hidden")));
        }
    }

    #[test]
    fn half_a_surrogate_pair_is_refused_by_name() {
        let body = br#"{"secrets":[{"secretKey":"A","secretValue":"a\ud800b"}]}"#;
        assert!(is_json(body));
        let Err(error) = read::<SecretList>(body) else { panic!("it cannot be a value") };
        assert!(error.to_string().contains("surrogate"), "{error}");
    }

    #[test]
    fn another_shape_is_not_an_empty_folder() {
        for body in ["{}", "[]", "{\"secrets\":null}", "{\"secrets\":{}}", "\"\"", "{\"secrets\":[{}]}"] {
            assert!(read::<SecretList>(body.as_bytes()).is_err(), "{body}");
        }
    }
}
