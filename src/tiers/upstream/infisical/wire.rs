//! The wire format, and how a listed folder becomes secrets. Fields that we do not use are ignored,
//! and fields that some server omits have defaults.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
};

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{error::Category, value::RawValue};
use zeroize::Zeroizing;

use super::super::{Cause, Everything, Fingerprint, Oddity, OddityKind, Snapshot, UpstreamError, UpstreamSecret};
use super::places::Places;
use crate::{
    clock::Timestamp,
    flaws::Unusable,
    secret::{SecretKey, SecretValue, Version},
    tenant::Tenant,
};

/// The answer to a login.
pub(super) type Granted = crate::infisical::Granted<Value>;

/// The answer to a list of folders.
#[derive(Deserialize)]
pub(super) struct FolderList {
    pub(super) folders: Vec<Folder>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Folder {
    pub(super) name: String,
    /// Set where folders further down are listed too.
    pub(super) relative_path: Option<String>,
    pub(super) last_secret_modified: Option<String>,
}

/// The answer to a write.
#[derive(Deserialize)]
pub(super) struct Written {
    /// Present where a policy holds the change back.
    pub(super) approval: Option<de::IgnoredAny>,
}

/// The answer to a list of secrets: of one folder, or also of all folders below it.
#[derive(Deserialize)]
pub(super) struct SecretList<'a> {
    #[serde(borrow)]
    secrets: Vec<Secret<'a>>,
    #[serde(borrow)]
    imports: Option<Vec<Import<'a>>>,
}

#[derive(Deserialize)]
struct Import<'a> {
    #[serde(borrow)]
    secrets: Vec<Secret<'a>>,
}

/// One secret. Its name and value are parsed separately: one that is not text must not make the
/// whole list unreadable.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Secret<'a> {
    #[serde(default)]
    id: Option<String>,
    #[serde(borrow)]
    secret_key: &'a RawValue,
    #[serde(borrow)]
    secret_value: Option<&'a RawValue>,
    secret_value_hidden: Option<bool>,
    secret_path: Option<String>,
    r#type: Option<String>,
    version: Option<i64>,
    created_at: Option<String>,
    updated_at: Option<String>,
}

impl SecretList<'_> {
    /// The secrets of `folder`, each key once, as they are written, without those that are withheld. A
    /// folder's own secret takes precedence over an imported one, and among imports the last does, as in
    /// Infisical's own command line.
    ///
    /// # Errors
    /// [`UpstreamError::Malformed`] if a secret has another shape than Infisical's.
    pub(super) fn resolve(mut self, folder: &str, places: &Places) -> Result<Snapshot, UpstreamError> {
        self.secrets.retain(|secret| secret.is_of(folder));
        if places.withholds_any(folder) {
            self.secrets.retain(|secret| !secret.has_name(|name| places.withholds(folder, name)));
        }
        let mut imports = self.imports.unwrap_or_default();
        // The server lists the imports of an imported folder as if they were its own secrets.
        for import in imports.iter_mut().filter(|_| places.withholds_names()) {
            import.secrets.retain(|secret| !secret.has_name(|name| places.withholds_name(name)));
        }
        let imports = imports.into_iter().rev().map(|import| import.secrets);
        resolve(std::iter::once(self.secrets).chain(imports))
    }

    /// Whether the folder has a secret of its own.
    pub(super) fn has_own(&self, folder: &str) -> bool {
        self.secrets.iter().any(|secret| secret.is_of(folder))
    }

    /// Whether the folder has a secret of its own that is withheld.
    pub(super) fn has_withheld(&self, folder: &str, places: &Places) -> bool {
        let mut own = self.secrets.iter().filter(|secret| secret.is_of(folder));
        own.any(|secret| secret.has_name(|name| places.withholds(folder, name)))
    }

    /// The secrets of each folder right below `above` whose name is valid for a tenant. Secrets of
    /// `above` itself and of folders further down belong to no tenant.
    ///
    /// # Errors
    /// [`UpstreamError::Malformed`] if a secret has another shape than Infisical's, or does not say
    /// which folder it is in: no partial result is returned.
    pub(super) fn by_tenant(self, above: &str) -> Result<Everything, UpstreamError> {
        let mut by_tenant: HashMap<Tenant, Vec<Secret<'_>>> = HashMap::new();
        for secret in self.secrets {
            let Some(path) = secret.secret_path.as_deref() else {
                return Err(UpstreamError::Malformed("it does not say which folder a secret is in"));
            };
            let Some(name) = below(path, above).filter(|name| Tenant::is_subdomain(name)) else { continue };
            match by_tenant.get_mut(name) {
                Some(secrets) => secrets.push(secret),
                None => drop(by_tenant.insert(Tenant::checked(name), vec![secret])),
            }
        }
        let tenants = by_tenant.into_iter().map(|(tenant, secrets)| {
            let snapshot = resolve(std::iter::once(secrets))?;
            Ok((tenant, snapshot))
        });
        let has_imports = self.imports.is_some_and(|imports| !imports.is_empty());
        Ok(Everything { tenants: tenants.collect::<Result<_, UpstreamError>>()?, has_imports })
    }
}

impl SecretList<'_> {
    /// The fingerprint of each folder right below `above` whose name is valid for a tenant; and
    /// whether a folder imports another. The order of the list does not matter: servers change it.
    ///
    /// # Errors
    /// [`UpstreamError::Malformed`] if a secret does not say which folder it is in.
    pub(super) fn fingerprints(
        self,
        above: &str,
        hash: impl Fn(&[&str]) -> u128,
    ) -> Result<(HashMap<Tenant, Fingerprint>, bool), UpstreamError> {
        let mut by_tenant: HashMap<Tenant, Fingerprint> = HashMap::new();
        for secret in &self.secrets {
            let Some(path) = secret.secret_path.as_deref() else {
                return Err(UpstreamError::Malformed("it does not say which folder a secret is in"));
            };
            let Some(name) = below(path, above).filter(|name| Tenant::is_subdomain(name)) else { continue };
            if secret.r#type.as_deref().is_some_and(|kind| kind != "shared") {
                continue;
            }
            let value = secret.secret_value.filter(|_| secret.secret_value_hidden != Some(true));
            let hash = hash(&[
                secret.secret_key.get(),
                value.map_or("", RawValue::get),
                secret.id.as_deref().unwrap_or_default(),
                secret.updated_at.as_deref().unwrap_or_default(),
                &secret.version.map(|version| version.to_string()).unwrap_or_default(),
            ]);
            let newest = secret.updated_at.as_deref().and_then(Timestamp::from_rfc3339);
            match by_tenant.get_mut(name) {
                Some(known) => {
                    known.hash = known.hash.wrapping_add(hash);
                    known.newest = known.newest.max(newest);
                }
                None => drop(by_tenant.insert(Tenant::checked(name), Fingerprint { hash, newest })),
            }
        }
        Ok((by_tenant, self.imports.is_some_and(|imports| !imports.is_empty())))
    }
}

/// One folder's secrets; of several sources, the first that has a key decides.
fn resolve<'a>(sources: impl Iterator<Item = Vec<Secret<'a>>>) -> Result<Snapshot, UpstreamError> {
    let mut named: BTreeMap<SecretKey, Named> = BTreeMap::new();
    let mut oddities = BTreeSet::new();
    for source in sources {
        // If another source decides, faults in this one do not matter.
        for (key, one) in by_key(source, &mut oddities)? {
            named.entry(key).or_insert(one);
        }
    }
    let mut secrets = Vec::with_capacity(named.len());
    for (key, Named { value, age, .. }) in named {
        match value {
            Ok(value) => {
                let version = age.version.and_then(Version::new).unwrap_or(Version::FIRST);
                let updated_at = age.updated_at.as_deref().and_then(Timestamp::from_rfc3339);
                secrets.push(UpstreamSecret { key, value, text: None, version, updated_at });
            }
            Err(reason) => {
                oddities.insert(Oddity { name: key.to_string(), kind: OddityKind::Unusable(reason) });
            }
        }
    }
    Ok(Snapshot { secrets, etag: None, oddities: oddities.into_iter().collect(), fell_short: false })
}

/// The secret of a name that counts in a folder, or why none does.
struct Named {
    value: Result<SecretValue, Unusable>,
    age: Age,
}

/// Orders secrets of one name and one value so that the one that counts is last, whatever the order
/// in which they were listed. Times are RFC 3339 in UTC, which sort as text.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Age {
    updated_at: Option<String>,
    created_at: Option<String>,
    id: Option<String>,
    version: Option<i64>,
}

/// One folder's shared secrets by key.
fn by_key(
    secrets: Vec<Secret<'_>>,
    oddities: &mut BTreeSet<Oddity>,
) -> Result<BTreeMap<SecretKey, Named>, UpstreamError> {
    let mut by_key: BTreeMap<SecretKey, Named> = BTreeMap::new();
    for secret in secrets {
        // A personal override belongs to one person, and exists beside the shared secret.
        if secret.r#type.as_deref().is_some_and(|kind| kind != "shared") {
            continue;
        }
        let key = match secret.name()? {
            Ok(key) => key,
            Err(name) => {
                oddities.insert(Oddity { name, kind: OddityKind::InvalidName });
                continue;
            }
        };
        let value = secret.value()?;
        let Secret { updated_at, created_at, id, version, .. } = secret;
        let one = Named { value, age: Age { updated_at, created_at, id, version } };
        match by_key.get_mut(&key) {
            None => {
                by_key.insert(key, one);
            }
            Some(known) => known.beside(one),
        }
    }
    Ok(by_key)
}

impl Named {
    /// Among several secrets with the same value, it does not matter which one counts. If values
    /// differ, none counts: nobody knows which is meant.
    fn beside(&mut self, other: Self) {
        match (&self.value, &other.value) {
            (Ok(value), Ok(another)) if value.same_as(another) => {
                if other.age > self.age {
                    self.age = other.age;
                }
            }
            (Ok(_), Ok(_)) | (Err(_), _) | (_, Err(_)) => self.value = Err(Unusable::Duplicate),
        }
    }
}

impl Secret<'_> {
    /// Whether it is one of this folder itself.
    fn is_of(&self, folder: &str) -> bool {
        self.secret_path.as_deref().is_none_or(|path| same_folder(path, folder))
    }

    /// Whether it has a name that is so.
    fn has_name(&self, is_so: impl Fn(&str) -> bool) -> bool {
        matches!(self.name(), Ok(Ok(name)) if is_so(name.as_str()))
    }

    /// The key; or, where the name cannot be a key, the name to report.
    fn name(&self) -> Result<Result<SecretKey, String>, UpstreamError> {
        let written = self.secret_key.get();
        match serde_json::from_str::<String>(written) {
            Ok(name) => Ok(name.parse().map_err(|_| name)),
            // As it is escaped, because it is not text.
            Err(_) if written.starts_with('"') => Ok(Err(written.trim_matches('"').to_owned())),
            Err(_) => Err(shape()),
        }
    }

    fn value(&self) -> Result<Result<SecretValue, Unusable>, UpstreamError> {
        let Some(written) = self.secret_value.filter(|_| self.secret_value_hidden != Some(true)) else {
            return Ok(Err(Unusable::Hidden));
        };
        match serde_json::from_str::<Value>(written.get()) {
            Ok(value) => Ok(Ok(value.0)),
            Err(_) if written.get().starts_with('"') => Ok(Err(Unusable::NotText)),
            Err(_) => Err(shape()),
        }
    }
}

pub(super) fn same_folder(a: &str, b: &str) -> bool {
    a.trim_matches('/') == b.trim_matches('/')
}

/// The rest of `path` below `above`; `None` where it is not below it.
fn below<'a>(path: &'a str, above: &str) -> Option<&'a str> {
    let (path, above) = (path.trim_matches('/'), above.trim_matches('/'));
    if above.is_empty() { Some(path) } else { path.strip_prefix(above)?.strip_prefix('/') }
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

/// The content of an error answer. It is compared with known texts but never shown: it may repeat
/// the request.
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
    /// Validation failures are lists.
    Other(de::IgnoredAny),
}

impl Problem {
    /// Parses the body of an error answer, if Infisical could have sent it.
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

    /// Whether a message with status 500 is about the token: the server's token library throws, and
    /// nothing above it catches.
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

    /// Whether this is the recorded server's failure at deleting a missing secret: it trips over
    /// its own result.
    pub(super) fn is_stumble_over_nothing(&self) -> bool {
        self.message().starts_with("Cannot read properties of undefined")
    }

    /// Whether the body of the request is longer than the server takes. Newer servers answer this with
    /// status 500, in their library's words.
    pub(super) fn says_too_large(&self) -> bool {
        self.message().to_ascii_lowercase().contains("too large")
    }

    pub(super) fn is_folder_not_found(&self) -> bool {
        self.message().starts_with("Folder ") && self.message().contains("not found")
    }

    /// Whether the folder to be deleted does not exist. Servers of different versions report that
    /// differently.
    pub(super) fn is_no_such_folder(&self) -> bool {
        let message = self.message();
        message.contains("not found")
            && ["Folder ", "Target folder ", "Failed to delete folder "].iter().any(|begin| message.starts_with(begin))
    }

    pub(super) fn is_secret_not_found(&self) -> bool {
        (self.message().starts_with("Secret ") && self.message().contains("not found"))
            || (self.batch_lacks().is_some() && !self.has_several())
    }

    /// Whether a batch finds more than one secret of the given name: it counts the secrets that it
    /// finds, and lists them where their number differs from that of the names.
    pub(super) fn has_several(&self) -> bool {
        self.batch_lacks().is_some_and(|found| !found.is_empty())
    }

    /// The list in the error of a batch that does not find each of its names once. A change on a
    /// newer server lists the missing names instead, and so finds no name twice.
    fn batch_lacks(&self) -> Option<&str> {
        let found = ["Secret not exist:", "One or more secrets does not exist:"];
        let lists = |begin: &&str| self.message().strip_prefix(*begin).map(str::trim);
        let missing = self.message().starts_with("Secret does not exist:").then_some("");
        found.iter().find_map(lists).or(missing)
    }

    pub(super) fn is_already_there(&self) -> bool {
        self.message().contains("already exist")
    }

    /// Why a login was refused, as far as the server says.
    pub(super) fn why_no_login(&self) -> Cause {
        let message = self.message().to_ascii_lowercase();
        if message.contains("ip address") || message.contains("ip is not") {
            Cause::AddressNotAllowed
        } else if message.contains("locked") {
            Cause::IdentityLocked
        } else {
            Cause::LoginRefused
        }
    }

    /// Whether it refuses the identity as one that the project does not have.
    pub(super) fn says_not_in_project(&self) -> bool {
        matches!(&self.error, Some(Text::Plain(error)) if error == "Identity not in project")
    }

    /// The possible fault, in one word.
    pub(super) fn cause(&self) -> Cause {
        let message = self.message().to_ascii_lowercase();
        if self.is_route_not_found() {
            Cause::NoRoute
        } else if self.has_several() || message.contains("change policy") {
            Cause::Rejected
        } else if self.is_folder_not_found() {
            Cause::TenantsPath
        } else if message.contains("environment with") || message.starts_with("environment") {
            Cause::Environment
        } else if message.contains("project") || message.contains("workspace") {
            Cause::Project
        } else {
            Cause::Rejected
        }
    }

    /// The possible fault, in our words.
    pub(super) fn hint(&self) -> &'static str {
        let message = self.message().to_ascii_lowercase();
        if self.is_route_not_found() {
            "it knows no such route; check infisical.site_url"
        } else if self.has_several() {
            "there are several secrets of this name in the folder; delete all but one there"
        } else if message.contains("change policy") {
            "a change policy there protects what is in the folder; change it there"
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

/// The server's own state, of which the clock is of use here.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct ServerStatus {
    pub(super) date: Option<String>,
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
    #[serde(flatten)]
    pub(super) change: Change<'a>,
}

/// The change: the new value, or `None` where the secret is deleted.
#[derive(Serialize)]
#[serde(untagged, rename_all_fields = "camelCase")]
pub(super) enum Change<'a> {
    /// For a secret that the path names.
    Named {
        #[serde(skip_serializing_if = "Option::is_none")]
        secret_value: Option<&'a str>,
        r#type: &'static str,
    },
    /// For a secret that no path can name.
    Batch { secrets: [BatchItem<'a>; 1] },
}

/// One secret in a batch.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BatchItem<'a> {
    pub(super) secret_key: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) secret_value: Option<&'a str>,
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

/// The body that deletes a folder.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct FolderRemoval<'a> {
    #[serde(flatten)]
    pub(super) project: Project<'a>,
    pub(super) environment: &'a str,
    pub(super) path: &'a str,
    /// Newer servers delete a folder with content only if this is set, under either route; older
    /// ones ignore it.
    pub(super) force_delete: bool,
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
    // A character takes at most six bytes as JSON. With that much room the buffer never moves, so
    // no copy of the secret stays behind.
    let mut body = Zeroizing::new(Vec::with_capacity(secret.saturating_mul(6).saturating_add(4096)));
    serde_json::to_writer(&mut *body, content)
        .map_err(|_| UpstreamError::unreachable("the request cannot be written".to_owned()))?;
    Ok(Bytes::from_owner(body))
}

/// Parses a body that is known to be JSON.
pub(super) fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, UpstreamError> {
    serde_json::from_slice(body).map_err(|error| {
        UpstreamError::Malformed(match error.classify() {
            Category::Syntax => "a text in it is not Unicode (half of a surrogate pair, say); write that secret again",
            Category::Data => SHAPE,
            Category::Io | Category::Eof => "it was cut off",
        })
    })
}

const SHAPE: &str = "it has another shape than Infisical's answers";

fn shape() -> UpstreamError {
    UpstreamError::Malformed(SHAPE)
}

/// Whether this is JSON at all, with any content.
pub(super) fn is_json(body: &[u8]) -> bool {
    serde_json::from_slice::<de::IgnoredAny>(body).is_ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resolve(list: &serde_json::Value) -> Result<Vec<(String, String)>, UpstreamError> {
        let text = list.to_string();
        let snapshot = read::<SecretList<'_>>(text.as_bytes())?.resolve("/tenants/acme", &Places::default())?;
        Ok(snapshot
            .secrets
            .into_iter()
            .map(|secret| (secret.key.to_string(), secret.value.expose().to_owned()))
            .collect())
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
    fn of_two_secrets_with_one_name_and_value_the_last_changed_counts_in_whatever_order() {
        let secret = |value: &str, updated: &str, created: &str, id: &str| json!({"secretKey": "A", "secretValue": value, "updatedAt": updated, "createdAt": created, "id": id});
        let listed = [secret("1", "2026-01-02T00:00:00Z", "", "z"), secret("1", "2026-01-03T00:00:00Z", "", "a")];
        for secrets in [[&listed[0], &listed[1]], [&listed[1], &listed[0]]] {
            let text = json!({"secrets": secrets}).to_string();
            let snapshot =
                read::<SecretList<'_>>(text.as_bytes()).unwrap().resolve("/tenants/acme", &Places::default()).unwrap();
            assert_eq!(snapshot.secrets[0].updated_at, Timestamp::from_rfc3339("2026-01-03T00:00:00Z"));
        }
        let other = [secret("1", "2026-01-02T00:00:00Z", "", "z"), secret("2", "2026-01-03T00:00:00Z", "", "a")];
        assert!(resolve(&json!({"secrets": other})).unwrap().is_empty(), "nobody knows which of two values is meant");
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

    fn oddities(list: &serde_json::Value) -> Vec<(String, OddityKind)> {
        let snapshot = read::<SecretList<'_>>(list.to_string().as_bytes())
            .unwrap()
            .resolve("/tenants/acme", &Places::default())
            .unwrap();
        snapshot.oddities.into_iter().map(|oddity| (oddity.name, oddity.kind)).collect()
    }

    #[test]
    fn what_is_left_out_or_decided_is_told_once_by_name() {
        let secret = |name: &str, value: &str| json!({"secretKey": name, "secretValue": value});
        let list = json!({"secrets": [
            secret("TWICE", "1"), secret("N\nL", "x"), secret("TWICE", "1"), secret("TWICE", "2"), secret("", "x"),
            {"secretKey": "MINE", "secretValue": "shared"},
            {"secretKey": "MINE", "secretValue": "mine", "type": "personal"},
            {"secretKey": "MINE", "secretValue": "deeper", "secretPath": "/tenants/acme/deeper"},
        ]});
        let invalid = |name: &str| (name.to_owned(), OddityKind::InvalidName);
        let twice = |name: &str| (name.to_owned(), OddityKind::Unusable(Unusable::Duplicate));
        assert_eq!(oddities(&list), [invalid(""), invalid("N\nL"), twice("TWICE")]);

        let list = json!({
            "secrets": [secret("A", "own"), secret("OWN", "own")],
            "imports": [
                {"secrets": [secret("B", "1"), secret("A", "1"), secret("LATER", "1"), secret("LATER", "2")]},
                {"secrets": [secret("B", "2"), secret("OWN", "1"), secret("OWN", "2"), secret("LATER", "3")]},
                {"secrets": [secret("TWICE", "1"), secret("TWICE", "2"), secret("N\nL", "x")]},
            ],
        });
        assert_eq!(oddities(&list), [invalid("N\nL"), twice("TWICE")], "only where a folder leaves a choice");
    }

    #[test]
    fn a_list_of_all_folders_is_told_apart_by_tenant() {
        let secret = |path: &str, name: &str| json!({"secretPath": path, "secretKey": name, "secretValue": path});
        let of = |above: &str, list: &serde_json::Value| {
            let everything = read::<SecretList<'_>>(list.to_string().as_bytes())?.by_tenant(above)?;
            let secrets = |(tenant, snapshot): (&Tenant, &Snapshot)| {
                assert!(snapshot.etag.is_none());
                (tenant.to_string(), snapshot.secrets.iter().map(|secret| secret.key.to_string()).collect())
            };
            let tenants: BTreeMap<String, Vec<String>> = everything.tenants.iter().map(secrets).collect();
            Ok::<_, UpstreamError>((format!("{tenants:?}"), everything.has_imports))
        };
        let list = json!({"secrets": [
            secret("/tenants/acme", "B"), secret("/tenants/globex/", "A"), secret("/tenants/acme", "A"),
            secret("/tenants", "X"), secret("/", "X"), secret("/tenants/acme/deeper", "X"),
            secret("/tenants/Not-One", "X"), secret("/tenants-old/acme", "X"), secret("/other/acme", "X"),
        ], "imports": []});
        let found = r#"{"acme": ["A", "B"], "globex": ["A"]}"#.to_owned();
        assert_eq!(of("/tenants", &list).unwrap(), (found, false));
        let list = json!({"secrets": [secret("/acme", "A"), secret("/", "X"), secret("/acme/deeper", "X")], "imports": [{"secrets": []}]});
        assert_eq!(of("/", &list).unwrap(), (r#"{"acme": ["A"]}"#.to_owned(), true));
        let list = json!({"secrets": [secret("/tenants/acme", "A"), {"secretKey": "B", "secretValue": "b"}]});
        assert!(matches!(of("/tenants", &list), Err(UpstreamError::Malformed(_))), "whose would it be?");
        let hidden = json!({"secretPath": "/tenants/globex", "secretKey": "B", "secretValueHidden": true});
        let list = json!({"secrets": [secret("/tenants/acme", "A"), hidden]});
        assert_eq!(of("/tenants", &list).unwrap().0, r#"{"acme": ["A"], "globex": []}"#, "it harms nobody beside it");
    }

    #[test]
    fn a_hidden_or_missing_value_is_left_out_by_its_name() {
        for secret in [
            json!({"secretKey": "B"}),
            json!({"secretKey": "B", "secretValue": null}),
            json!({"secretKey": "B", "secretValue": "x", "secretValueHidden": true}),
        ] {
            let list = json!({"secrets": [{"secretKey": "A", "secretValue": "a"}, secret]});
            assert_eq!(resolve(&list).unwrap(), pairs(&[("A", "a")]));
            assert_eq!(oddities(&list), [("B".to_owned(), OddityKind::Unusable(Unusable::Hidden))]);
        }
        let text = "<hidden-by-infisical>";
        let list = json!({"secrets": [{"secretKey": "B", "secretValue": text, "secretValueHidden": false}]});
        assert_eq!(resolve(&list).unwrap(), pairs(&[("B", text)]), "the text alone proves nothing");
    }

    #[test]
    fn half_a_surrogate_pair_is_left_out_by_its_name() {
        let body = br#"{"secrets":[{"secretKey":"A","secretValue":"a\ud800b"},{"secretKey":"B","secretValue":"b"},
            {"secretKey":"C\ud800","secretValue":"c"}]}"#;
        assert!(is_json(body));
        let snapshot = read::<SecretList<'_>>(body).unwrap().resolve("/tenants/acme", &Places::default()).unwrap();
        let keys: Vec<&str> = snapshot.secrets.iter().map(|secret| secret.key.as_str()).collect();
        assert_eq!(keys, ["B"]);
        let flaws = snapshot.flaws();
        assert_eq!(flaws.unusable.into_values().collect::<Vec<_>>(), [Unusable::NotText]);
        assert_eq!(flaws.names.into_iter().collect::<Vec<_>>(), ["C\\ud800"]);
    }

    #[test]
    fn another_shape_is_not_an_empty_folder() {
        for body in ["{}", "[]", "{\"secrets\":null}", "{\"secrets\":{}}", "\"\"", "{\"secrets\":[{}]}"] {
            assert!(read::<SecretList<'_>>(body.as_bytes()).is_err(), "{body}");
        }
    }
}
