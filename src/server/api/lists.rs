//! Several secrets at once: a tenant's list, and a batch. Bodies are joined from answers that are
//! finished, while they are taken.

use std::collections::HashSet;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderValue, StatusCode, header};
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use utoipa::{OpenApi, ToSchema, openapi::schema::Array};

use super::secrets::SecretBody;
use crate::{
    access::{Action, Refused},
    answer::{Answer as Secret, json_length},
    budget::Held,
    flaws::Flaws,
    long_work::{Large, LongWork, Pace, SHORT},
    pieces::Pieces,
    resolver::{Listing, LongAnswer, ResolveError, Resolved},
    secret::{SecretKey, SecretName},
    server::{
        ask::Ask,
        budgets::Thing,
        names,
        operation::{Operation, Run},
        outgoing::{Body, UNCOUNTED},
        respond::{Answer, CACHE_STATUS, JSON, Problem, ProblemBody, cache_status_header, respond, respond_with},
    },
    tenant::Tenant,
};

#[derive(OpenApi)]
#[openapi(paths(list, batch))]
pub(super) struct Document;

pub(in crate::server) const LIST: Operation =
    Operation { action: "list", parameters: &["values", "format"], run: Run::Read(|ask, _| Box::pin(list(ask))) };
pub(in crate::server) const BATCH: Operation =
    Operation { action: "batch", parameters: &[], run: Run::Read(|ask, body| Box::pin(batch(ask, body))) };

/// The most keys that one batch may ask for.
const MAX_BATCH: usize = 1000;

/// The most bytes that one batch may answer with.
const MAX_BATCH_BYTES: usize = 64 << 20;

#[utoipa::path(
    get, path = "/v1/tenants/{tenant}/secrets", operation_id = "list_secrets",
    description = "Those of a tenant's keys that the token reaches, by name; `values=true` adds their values. \
        `format=map` is `{\"KEY\":\"value\"}` alone, with an ETag of the whole.",
    params(
        ("values" = Option<bool>, Query, description = "Whether to add the values"),
        ("format" = Option<String>, Query, description = "`map`: the values by their keys, and nothing else", pattern = "^map$"),
        ("If-None-Match" = Option<String>, Header, description = "With `format=map`: 304 where nothing has changed")
    ),
    responses(
        (
            status = 200, body = KeysOrMap, description = "The keys, or the map",
            headers(("Age" = u64), ("Cache-Status" = String), ("ETag" = String, description = "With `format=map`"))
        ),
        (status = 304, description = "The map is the one that the caller has", headers(("ETag" = String), ("Age" = u64), ("Cache-Status" = String))),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_query`"),
        (status = 404, body = ProblemBody, description = "`secret_not_found`: there is no such tenant"),
        (
            status = 503, body = ProblemBody,
            description = "`upstream_denied`; `secret_unavailable`, where a value that was asked for cannot be used"
        )
    )
)]
async fn list(ask: &Ask<'_>) -> Result<Answer, Problem> {
    let tenant = ask.tenant_for(Action::Read)?;
    let form = Form::of(ask)?;
    let with_values = form != Form::Keys;
    let turn = ask.service.resolver.long_answer(&ask.grant.id);
    let room = if with_values { room_ahead(ask, &tenant, &turn).await? } else { None };
    let listing = ask.service.resolver.resolve_all(&tenant, ask.want(), &turn).await?;
    let Listing { secrets, flaws, age, cache_status } = listing.ok_or_else(Problem::not_found)?;
    let tier = Some(cache_status.answered_by.as_str());
    ask.count("list", tenant.as_str(), "", tier);
    let unavailable = unavailable_of(ask, &flaws);
    // A list that lacked a value would say that there is none.
    if let (true, Some(first)) = (with_values, unavailable.first()) {
        return Err(Problem::some_unavailable(first.key, first.reason));
    }
    let secrets = secrets.map(|secrets| secrets.into_values().collect::<Vec<_>>());
    let (secrets, _) = secrets.parted(|secret| ask.grant.reaches_key(secret.key.as_str()));
    let (mut body, mut pace) = (ListBody::new(form, &unavailable), Pace::default());
    let (mut whole, value_tag) = (Sha256::new(), ask.service.resolver.value_tags(&tenant));
    for (place, secret) in secrets.iter().enumerate() {
        if with_values {
            ask.count("read", tenant.as_str(), secret.key.as_str(), tier);
        }
        body.count(place == 0, secret);
        if form == Form::Map {
            // A write of the same value is another version, and the same map.
            whole.update(value_tag(secret));
            pace.did(usize::try_from(secret.weight()).unwrap_or(usize::MAX)).await;
        }
        pace.did(0).await;
    }
    let etag = format!("\"{}\"", hex::encode(&whole.finalize()[..16]));
    let is_known = form == Form::Map && ask.knows(&etag);
    let mut answer = if is_known {
        respond(StatusCode::NOT_MODIFIED, JSON, Bytes::new())
    } else {
        joined(ask, body.length(), body.parts(secrets, ask.service.resolver.database().work()), room)?
    };
    let headers = answer.headers_mut();
    headers.insert(header::AGE, HeaderValue::from(age.as_secs()));
    headers.insert(CACHE_STATUS, cache_status_header(&cache_status, 0));
    if form == Form::Map
        && let Ok(etag) = HeaderValue::try_from(etag)
    {
        headers.insert(header::ETAG, etag);
    }
    if is_known {
        headers.remove(header::CONTENT_TYPE);
    }
    Ok(answer)
}

/// The form of each secret in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Its key and version.
    Keys,
    /// Its value as well.
    Values,
    /// Its key and value alone, as a member of an object.
    Map,
}

impl Form {
    fn of(ask: &Ask<'_>) -> Result<Self, Problem> {
        let with_values = ask.flag("values")?;
        match ask.query.get("format") {
            None if with_values => Ok(Self::Values),
            None => Ok(Self::Keys),
            Some("map") => Ok(Self::Map),
            Some(_) => Err(Problem::invalid_query("format takes map, as in ?format=map")),
        }
    }
}

#[utoipa::path(
    post, path = "/v1/tenants/{tenant}/secrets/batch-get", operation_id = "batch_get",
    description = "Several secrets of one tenant at once.",
    request_body(content = BatchGet, description = "At most 1.5 MiB"),
    responses(
        (status = 200, body = BatchBody, description = "Those that there are, in the order in which they were asked for"),
        (status = 400, body = ProblemBody, description = "`invalid_tenant`, `invalid_key`, `invalid_body`"),
        (status = 403, body = ProblemBody, description = "`out_of_scope`, if the token does not reach one of the keys"),
        (status = 413, body = ProblemBody, description = "The body is too large, or the secrets are more than 64 MiB"),
        (status = 503, body = ProblemBody, description = "`upstream_denied`, `secret_unavailable`")
    )
)]
async fn batch(ask: &Ask<'_>, body: Incoming) -> Result<Answer, Problem> {
    let tenant = ask.tenant_for(Action::Read)?;
    let limit = (MAX_BATCH * (SecretKey::MAX_LEN * 6 + 3)) as u64;
    let wanted: BatchGet = ask.read(body, limit).await?;
    if wanted.keys.len() > MAX_BATCH {
        return Err(Problem::invalid_body(format!("a batch asks for at most {MAX_BATCH} keys")));
    }
    if wanted.keys.iter().any(|key| !SecretKey::is_valid(key)) {
        return Err(Problem::invalid_key());
    }
    // All or nothing, as with a key that is missing: who asked must not take less for all.
    if !wanted.keys.iter().all(|key| ask.grant.reaches_key(key)) {
        return Err(Refused::OutOfScope.into());
    }
    // A key that is named often is answered once.
    let mut named = HashSet::new();
    let keys: Vec<String> = wanted.keys.into_iter().filter(|key| named.insert(key.clone())).collect();
    // Keys of one tenant share its snapshot, so a few at a time are enough.
    let look_up = |key| look_up(ask, &tenant, key);
    let mut looked_up = stream::iter(keys).map(look_up).buffered(16);
    let (turn, mut pace) = (ask.service.resolver.long_answer(&ask.grant.id), Pace::default());
    let (mut missing, mut length) = (Vec::new(), 0);
    let mut found = ask.service.resolver.database().work().large(Vec::new(), MAX_BATCH_BYTES);
    while let Some(result) = looked_up.next().await {
        let (key, resolved) = result?;
        match resolved.answer() {
            Some(answer) => {
                let json = answer.json();
                length += json.len();
                if length > MAX_BATCH_BYTES {
                    return Err(Problem::batch_too_large());
                }
                found.push(json);
            }
            None => missing.push(key),
        }
        if length > SHORT {
            let its_turn = tokio::time::timeout(ask.service.resolver.deadline(), turn.take()).await;
            its_turn.map_err(|_| ResolveError::TimedOut)?;
        }
        pace.did(0).await;
    }
    if named.is_empty() {
        ask.count("batch", tenant.as_str(), "", None);
    }
    let (length, parts) = join_batch(found, &missing, ask.service.resolver.database().work());
    joined(ask, length, parts, None)
}

async fn look_up(ask: &Ask<'_>, tenant: &Tenant, key: String) -> Result<(String, Resolved), Problem> {
    let name = SecretName::parse(tenant.as_str(), &key)?;
    let resolved = ask.service.resolver.resolve(name, ask.want()).await?;
    ask.saw(name, &resolved, ask.service.resolver.clock().moment());
    Ok((key, resolved))
}

/// An answer of so many bytes, joined from these parts while it is taken.
pub(in crate::server) fn joined(
    ask: &Ask<'_>,
    length: u64,
    parts: impl Iterator<Item = Bytes> + Send + 'static,
    room: Option<Held>,
) -> Result<Answer, Problem> {
    let mut pieces = Pieces::new(length, parts);
    Ok(match length <= UNCOUNTED as u64 {
        true => respond(StatusCode::OK, JSON, pieces.next().unwrap_or_default()),
        false => {
            let held = ask.service.hold_answer(room, ask.grant.holds(), length)?;
            respond_with(StatusCode::OK, JSON, Body::pieces(length, held, pieces))
        }
    })
}

/// Makes room for a list that was long when it was last read, before it is read again: what
/// would be refused when it is made is not made. It waits for the token's turn, for as long as
/// the list may take.
pub(in crate::server) async fn room_ahead(
    ask: &Ask<'_>,
    tenant: &Tenant,
    turn: &LongAnswer<'_>,
) -> Result<Option<Held>, Problem> {
    let waited = tokio::time::timeout(ask.service.resolver.deadline(), turn.take_if_long(tenant)).await;
    let weight = waited.map_err(|_| ResolveError::TimedOut)?;
    weight.map(|weight| ask.service.hold(Thing::Answer, ask.grant.holds(), weight as u64)).transpose()
}

/// The keys that the token reaches and that cannot be used, by name.
pub(in crate::server) fn unavailable_of<'f>(ask: &Ask<'_>, flaws: &'f Flaws) -> Vec<UnavailableKey<'f>> {
    let unusable = flaws.unusable.iter().map(|(key, reason)| (key.as_str(), reason.as_str()));
    let all = unusable.chain(flaws.names.iter().map(|name| (name.as_str(), "invalid_name")));
    let reached = all.filter(|(key, _)| ask.grant.reaches_key(key));
    reached.map(|(key, reason)| UnavailableKey { key, reason }).collect()
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct BatchGet {
    /// The keys: 1 to 255 bytes of UTF-8 each. One that is named twice is answered once.
    #[schema(schema_with = keys_of_a_batch)]
    keys: Vec<String>,
}

fn keys_of_a_batch() -> Array {
    names::keys(MAX_BATCH, "The keys: 1 to 255 bytes of UTF-8 each. One that is named twice is answered once.")
}

#[derive(Serialize, ToSchema)]
struct BatchBody {
    /// Those that there are.
    secrets: Vec<SecretBody>,
    /// The keys that there is no secret of.
    missing: Vec<String>,
}

/// The body of a list, for the API's description.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "it describes what is joined from finished parts")]
enum KeysOrMap<'a> {
    Keys(KeyList<'a>),
    Map(std::collections::BTreeMap<String, String>),
}

#[derive(Serialize, ToSchema)]
struct KeyList<'a> {
    keys: Vec<KeyEntry<'a>>,
    /// Secrets that the folder has and that cannot be used; left out where there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unavailable: Vec<UnavailableKey<'a>>,
}

/// A secret that the tenant's folder has, and whose value cannot be used.
#[derive(Serialize, ToSchema)]
pub(in crate::server) struct UnavailableKey<'a> {
    /// Its name, as it is written there.
    pub(in crate::server) key: &'a str,
    /// `hidden`, `duplicate`, `not_text`, `reference` or `invalid_name`.
    pub(in crate::server) reason: &'static str,
}

#[derive(Serialize, ToSchema)]
struct KeyEntry<'a> {
    key: &'a str,
    version: i64,
    /// RFC 3339, UTC.
    updated_at: String,
    /// With `values=true` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
}

/// The text before a secret's value in a list; the value is last.
const BEFORE_VALUE: &str = ",\"value\":";

/// The entry without its value; its last byte is the closing brace.
fn entry(secret: &Secret) -> KeyEntry<'_> {
    KeyEntry {
        key: secret.key.as_str(),
        version: secret.version.number(),
        updated_at: secret.updated_at.to_rfc3339(),
        value: None,
    }
}

/// The body of a list of these secrets.
struct ListBody {
    length: u64,
    form: Form,
    tail: Vec<u8>,
}

impl ListBody {
    fn new(form: Form, unavailable: &[UnavailableKey<'_>]) -> Self {
        let unavailable = match unavailable {
            [] => String::new(),
            // A struct of texts always serialises.
            some => format!(",\"unavailable\":{}", serde_json::to_string(some).unwrap_or_default()),
        };
        let tail = match form {
            Form::Keys | Form::Values => format!("]{unavailable}}}").into_bytes(),
            Form::Map => b"}".to_vec(),
        };
        Self { length: (Self::before(form).len() + tail.len()) as u64, form, tail }
    }

    fn before(form: Form) -> &'static [u8] {
        match form {
            Form::Keys | Form::Values => b"{\"keys\":[",
            Form::Map => b"{",
        }
    }

    /// Counts the next secret of the list.
    fn count(&mut self, is_first: bool, secret: &Secret) {
        let own = match self.form {
            Form::Keys => json_length(&entry(secret)),
            Form::Values => json_length(&entry(secret)) + BEFORE_VALUE.len() + secret.value_json().len(),
            Form::Map => json_length(&secret.key.as_str()) + ":".len() + secret.value_json().len(),
        };
        self.length += (usize::from(!is_first) + own) as u64;
    }

    /// The body's length, with the secrets that were counted.
    fn length(&self) -> u64 {
        self.length
    }

    /// The parts of the body, one after the other. These are the secrets that were counted.
    fn parts(self, secrets: Large<Vec<Secret>>, work: &LongWork) -> impl Iterator<Item = Bytes> + Send + 'static {
        let (Self { form, tail, .. }, work) = (self, work.clone());
        let entries = secrets.into_each().enumerate().flat_map(move |(place, secret)| {
            let mut head = if place == 0 { Vec::new() } else { vec![b','] };
            // Texts and numbers always serialise, and writing to memory never fails.
            let _ = match form {
                Form::Keys | Form::Values => serde_json::to_writer(&mut head, &entry(&secret)),
                Form::Map => serde_json::to_writer(&mut head, secret.key.as_str()),
            };
            let after: &[u8] = match form {
                Form::Keys => return [head.into(), Bytes::new(), Bytes::new()],
                Form::Values => {
                    head.pop();
                    head.extend_from_slice(BEFORE_VALUE.as_bytes());
                    b"}"
                }
                Form::Map => {
                    head.push(b':');
                    b""
                }
            };
            [head.into(), work.keep(secret.value_json()), Bytes::from_static(after)]
        });
        std::iter::once(Bytes::from_static(Self::before(form))).chain(entries).chain(std::iter::once(tail.into()))
    }
}

/// The body of a batch: its length, and its parts.
fn join_batch(
    found: Large<Vec<Bytes>>,
    missing: &[String],
    work: &LongWork,
) -> (u64, impl Iterator<Item = Bytes> + Send + 'static) {
    const BEFORE: &[u8] = b"{\"secrets\":[";
    let missing = serde_json::to_string(missing).unwrap_or_default();
    let tail = Bytes::from(format!("],\"missing\":{missing}}}"));
    let commas = found.len().saturating_sub(1);
    let length = BEFORE.len() + found.iter().map(Bytes::len).sum::<usize>() + commas + tail.len();
    let work = work.clone();
    let secrets = found.into_each().enumerate().flat_map(move |(place, secret)| {
        let comma: &[u8] = if place == 0 { b"" } else { b"," };
        [Bytes::from_static(comma), work.keep(secret)]
    });
    let parts = std::iter::once(Bytes::from_static(BEFORE)).chain(secrets).chain(std::iter::once(tail));
    (length as u64, parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::Timestamp,
        secret::{SecretValue, Version},
    };

    fn answer(key: &str, value: &str, version: i64) -> Secret {
        let (tenant, key) = ("acme".parse().unwrap(), key.parse().unwrap());
        let (value, version) = (SecretValue::new(value.to_owned()), Version::new(version).unwrap());
        Secret::new(&tenant, key, &value, version, Timestamp::from_millis(1_700_000_000_123), "abc")
    }

    fn answers() -> Vec<Secret> {
        let long = "long \"value\"\n".repeat(20_000);
        let values = ["", "plain", "\"\\\n\t\u{1}\u{1f511}", "\",\"version\":1}", long.as_str()];
        let keys = ["A", "b\"b", "c\\", "\u{e9}\u{2028}", "z"];
        keys.iter()
            .zip(values)
            .zip([1, 9, 10, 12_345, i64::MAX])
            .map(|((key, value), version)| answer(key, value, version))
            .collect()
    }

    fn text(length: u64, parts: impl Iterator<Item = Bytes>) -> String {
        let body: Vec<u8> = Pieces::new(length, parts).flatten().collect();
        assert_eq!(body.len() as u64, length);
        String::from_utf8(body).unwrap()
    }

    #[test]
    fn a_list_is_to_the_byte_what_its_documented_form_serialises_to() {
        for (with_values, count) in [(false, 5), (true, 5), (true, 1), (true, 0), (false, 0)] {
            let answers = &answers()[..count];
            let keys =
                answers.iter().map(|secret| KeyEntry { value: with_values.then(|| secret.expose()), ..entry(secret) });
            let unavailable = || {
                vec![UnavailableKey { key: "h\"h", reason: "hidden" }, UnavailableKey { key: "i", reason: "reference" }]
            };
            for unavailable in [Vec::new(), unavailable()] {
                let mut body = ListBody::new(if with_values { Form::Values } else { Form::Keys }, &unavailable);
                for (place, secret) in answers.iter().enumerate() {
                    body.count(place == 0, secret);
                }
                let (length, parts) = (body.length(), body.parts(Large::small(answers.to_vec()), &LongWork::default()));
                let expected = KeyList { keys: keys.clone().collect(), unavailable };
                assert!(text(length, parts) == serde_json::to_string(&expected).unwrap(), "{with_values} {count}");
            }
        }
    }

    #[test]
    fn a_batch_joins_ready_bodies() {
        let (one, two) = (Bytes::from_static(b"{1}"), Bytes::from_static(b"{2}"));
        let (length, parts) = join_batch(Large::small(vec![one, two]), &["A\"".to_owned()], &LongWork::default());
        assert_eq!(text(length, parts), r#"{"secrets":[{1},{2}],"missing":["A\""]}"#);
        let (length, parts) = join_batch(Large::small(Vec::new()), &[], &LongWork::default());
        assert_eq!(text(length, parts), r#"{"secrets":[],"missing":[]}"#);
    }
}
