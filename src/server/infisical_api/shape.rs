//! A secret as Infisical writes it: the same full form in lists, singly and after a write.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::{InfisicalApi, place::plain};
use crate::{
    answer::{Answer as Secret, json_length, wiped_json},
    clock::Timestamp,
    long_work::Large,
    secret::{SecretKey, Version},
    server::{
        ask::Ask,
        respond::{Answer, JSON, respond},
    },
    tenant::Tenant,
};

/// The place of a secret, as it is written with it.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    pub(super) tenant: Tenant,
    path: String,
    workspace: String,
    environment: String,
}

impl Folder {
    /// Whether this is its path, however many slashes it has.
    pub(super) fn is_at(&self, path: &str) -> bool {
        plain(Some(path)) == plain(Some(&self.path))
    }
}

impl InfisicalApi {
    pub(super) fn folder(&self, tenant: &Tenant) -> Folder {
        Folder {
            tenant: tenant.clone(),
            path: self.path_of(tenant),
            workspace: self.project_id().to_owned(),
            environment: self.project.environment.clone(),
        }
    }
}

/// The id of a secret: its tenant and its name, so that it is the same for ever and leads back to them.
/// No tenant's name has a dot. A shared folder's slash would end the name in a path.
pub(super) fn id_of(tenant: &Tenant, key: &SecretKey) -> String {
    format!("{}.{}", tenant.as_str().replace('/', "~"), URL_SAFE_NO_PAD.encode(key.as_str()))
}

/// The secret with this id.
pub(super) fn named_by(id: &str) -> Option<(Tenant, SecretKey)> {
    let (tenant, key) = id.split_once('.')?;
    let key = String::from_utf8(URL_SAFE_NO_PAD.decode(key).ok()?).ok()?;
    Some((tenant.replace('~', "/").parse().ok()?, key.parse().ok()?))
}

/// A secret. Its value is last, so that a list can be joined from parts.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shape<'a> {
    id: &'a str,
    #[serde(rename = "_id")]
    same_id: &'a str,
    workspace: &'a str,
    environment: &'a str,
    version: i32,
    r#type: &'static str,
    secret_key: &'a str,
    secret_comment: &'static str,
    created_at: &'a str,
    updated_at: &'a str,
    secret_path: &'a str,
    secret_value_hidden: bool,
    skip_multiline_encoding: bool,
    secret_reminder_note: Option<()>,
    secret_reminder_repeat_days: Option<()>,
    secret_metadata: [(); 0],
    tags: [(); 0],
    is_rotated_secret: bool,
    rotation_id: Option<()>,
    actor: Option<()>,
    metadata: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret_value: Option<&'a str>,
}

/// A secret that is told.
pub(super) struct Shown<'a> {
    pub(super) folder: &'a Folder,
    pub(super) key: &'a SecretKey,
    /// `None` where the token may not read it.
    pub(super) value: Option<&'a str>,
    pub(super) version: Option<Version>,
    pub(super) updated_at: Timestamp,
}

impl<'a> Shown<'a> {
    pub(super) fn of(folder: &'a Folder, secret: &'a Secret) -> Self {
        Self {
            folder,
            key: &secret.key,
            value: Some(secret.expose()),
            version: Some(secret.version),
            updated_at: secret.updated_at,
        }
    }

    /// Writes it, with its value or without.
    fn with<T>(&self, with_value: bool, write: impl FnOnce(&Shape<'_>) -> T) -> T {
        let (folder, updated_at) = (self.folder, self.updated_at.to_rfc3339());
        let id = id_of(&folder.tenant, self.key);
        let version = self.version.unwrap_or(Version::FIRST).number();
        write(&Shape {
            id: &id,
            same_id: &id,
            workspace: &folder.workspace,
            environment: &folder.environment,
            version: i32::try_from(version).unwrap_or(i32::MAX),
            r#type: "shared",
            secret_key: self.key.as_str(),
            secret_comment: "",
            // When its first version was written is not kept.
            created_at: &updated_at,
            updated_at: &updated_at,
            secret_path: &folder.path,
            secret_value_hidden: self.value.is_none(),
            skip_multiline_encoding: false,
            secret_reminder_note: None,
            secret_reminder_repeat_days: None,
            secret_metadata: [],
            tags: [],
            is_rotated_secret: false,
            rotation_id: None,
            actor: None,
            metadata: None,
            secret_value: with_value.then(|| self.value.unwrap_or_default()),
        })
    }

    /// The answer about this secret alone.
    pub(super) fn answer(&self) -> Answer {
        #[derive(Serialize)]
        struct One<'a> {
            secret: &'a Shape<'a>,
        }
        let body = self.with(true, |shape| wiped_json(&One { secret: shape }));
        respond(StatusCode::OK, JSON, body)
    }
}

/// The answer about these, as a batch has it.
pub(super) fn batch(shown: &[Shown<'_>]) -> Answer {
    struct Each<'a, 'b>(&'b Shown<'a>);
    impl Serialize for Each<'_, '_> {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            self.0.with(true, |shape| shape.serialize(serializer))
        }
    }
    #[derive(Serialize)]
    struct Batch<'a, 'b> {
        secrets: Vec<Each<'a, 'b>>,
    }
    respond(StatusCode::OK, JSON, wiped_json(&Batch { secrets: shown.iter().map(Each).collect() }))
}

/// A list, whose body is joined while it is taken.
pub(super) struct ListBody {
    length: u64,
    count: usize,
    tag: Sha256,
}

const BEFORE: &[u8] = b"{\"secrets\":[";
const BEFORE_VALUE: &[u8] = b",\"secretValue\":";
const AFTER: &[u8] = b"],\"imports\":[]}";

impl ListBody {
    pub(super) fn new() -> Self {
        let length = (BEFORE.len() + AFTER.len()) as u64;
        Self { length, count: 0, tag: Sha256::new_with_prefix(b"secretier list v1") }
    }

    /// Counts the next secret.
    pub(super) fn count(&mut self, ask: &Ask<'_>, folder: &Folder, secret: &Secret) {
        let head = Shown::of(folder, secret).with(false, |shape| json_length(shape));
        let comma = usize::from(self.count > 0);
        self.length += (comma + head + BEFORE_VALUE.len() + secret.value_json().len()) as u64;
        self.count += 1;
        for part in [folder.path.as_bytes(), secret.key.as_str().as_bytes(), tag_of(ask, folder, secret).as_bytes()] {
            self.tag.update((part.len() as u64).to_be_bytes());
            self.tag.update(part);
        }
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// The validator of the list: it follows from those of its secrets.
    pub(super) fn tag(&self) -> String {
        hex::encode(&self.tag.clone().finalize()[..16])
    }

    /// The parts of the body. These are the secrets that were counted, each with the number of its folder.
    pub(super) fn parts(
        folders: Arc<[Folder]>,
        secrets: Large<Vec<(usize, Secret)>>,
    ) -> impl Iterator<Item = Bytes> + Send + 'static {
        let secrets = secrets.into_each().enumerate().flat_map(move |(place, (folder, secret))| {
            let mut head = if place == 0 { Vec::new() } else { vec![b','] };
            if let Some(folder) = folders.get(folder) {
                // Texts and numbers always serialise, and writing to memory never fails.
                let _ = Shown::of(folder, &secret).with(false, |shape| serde_json::to_writer(&mut head, shape));
            }
            head.pop();
            head.extend_from_slice(BEFORE_VALUE);
            [head.into(), secret.value_json(), Bytes::from_static(b"}")]
        });
        std::iter::once(Bytes::from_static(BEFORE)).chain(secrets).chain(std::iter::once(Bytes::from_static(AFTER)))
    }
}

/// The validator of a secret: it changes exactly when the secret's answer does.
pub(super) fn tag_of(ask: &Ask<'_>, folder: &Folder, secret: &Secret) -> String {
    let resolver = &ask.service.resolver;
    match resolver.has_own_versions(&folder.tenant, &secret.key) {
        true => secret.bare_etag().to_owned(),
        false => resolver.content_tag(&folder.tenant, secret),
    }
}

/// Gives an answer its validator, or tells the caller that it has the answer already.
pub(super) fn tagged(headers: &HeaderMap, tag: &str, answer: impl FnOnce() -> Answer) -> Answer {
    let tag = format!("\"{tag}\"");
    let mut answer = match is_known(headers, &tag) {
        true => {
            let mut answer = respond(StatusCode::NOT_MODIFIED, JSON, Bytes::new());
            answer.headers_mut().remove(header::CONTENT_TYPE);
            answer
        }
        false => answer(),
    };
    if let Ok(tag) = HeaderValue::try_from(tag) {
        answer.headers_mut().insert(header::ETAG, tag);
    }
    answer
}

/// Whether the caller holds the answer with this validator, which is in its quotes.
pub(super) fn is_known(headers: &HeaderMap, tag: &str) -> bool {
    let is_tag = |text: &str| {
        let text = text.trim();
        text == "*" || text.strip_prefix("W/").unwrap_or(text) == tag
    };
    let lines = headers.get_all(header::IF_NONE_MATCH).iter();
    lines.filter_map(|line| line.to_str().ok()).any(|line| line.split(',').any(is_tag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_leads_back_to_its_secret_whatever_its_name() {
        let tenant: Tenant = "acme".parse().unwrap();
        for name in ["A", "odd /name?&é", ".", "a.b", "%41", "🔑"] {
            let key: SecretKey = name.parse().unwrap();
            let id = id_of(&tenant, &key);
            assert!(id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)), "{id}");
            assert_eq!(named_by(&id), Some((tenant.clone(), key)));
        }
        for other in ["", "acme", "acme.", "acme.!", ".QQ", "22222222-2222-4333-8444-555555555555"] {
            assert_eq!(named_by(other), None, "{other}");
        }
    }
}
