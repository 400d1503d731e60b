//! The bodies of lists and batches, joined from ready-made answers while the caller takes them.

use bytes::Bytes;
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    answer::{Answer, json_length},
    long_work::Large,
};

#[derive(Serialize, ToSchema)]
pub(super) struct KeyList<'a> {
    keys: Vec<KeyEntry<'a>>,
    /// Secrets that the folder has and that cannot be used; left out where there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unavailable: Vec<UnavailableKey<'a>>,
}

/// A secret that the tenant's folder has, and whose value cannot be used.
#[derive(Serialize, ToSchema)]
pub(super) struct UnavailableKey<'a> {
    /// Its name, as it is written there.
    pub(super) key: &'a str,
    /// `hidden`, `duplicate`, `not_text`, `reference` or `invalid_name`.
    pub(super) reason: &'static str,
}

#[derive(Serialize, ToSchema)]
pub(super) struct KeyEntry<'a> {
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
fn entry(secret: &Answer) -> KeyEntry<'_> {
    KeyEntry {
        key: secret.key.as_str(),
        version: secret.version.number(),
        updated_at: secret.updated_at.to_rfc3339(),
        value: None,
    }
}

/// The body of a list of these secrets.
pub(super) struct ListBody {
    length: u64,
    with_values: bool,
    tail: Vec<u8>,
}

impl ListBody {
    const BEFORE: &[u8] = b"{\"keys\":[";

    pub(super) fn new(with_values: bool, unavailable: &[UnavailableKey<'_>]) -> Self {
        let unavailable = match unavailable {
            [] => String::new(),
            // A struct of texts always serialises.
            some => format!(",\"unavailable\":{}", serde_json::to_string(some).unwrap_or_default()),
        };
        let tail = format!("]{unavailable}}}").into_bytes();
        Self { length: (Self::BEFORE.len() + tail.len()) as u64, with_values, tail }
    }

    /// Counts the next secret of the list.
    pub(super) fn count(&mut self, is_first: bool, secret: &Answer) {
        let value = if self.with_values { BEFORE_VALUE.len() + secret.value_json().len() } else { 0 };
        self.length += (usize::from(!is_first) + json_length(&entry(secret)) + value) as u64;
    }

    /// The body's length, with the secrets that were counted.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// The parts of the body, one after the other. These are the secrets that were counted.
    pub(super) fn parts(self, secrets: Large<Vec<Answer>>) -> impl Iterator<Item = Bytes> + Send + 'static {
        let Self { with_values, tail, .. } = self;
        let entries = secrets.into_each().enumerate().flat_map(move |(place, secret)| {
            let mut head = if place == 0 { Vec::new() } else { vec![b','] };
            // Texts and numbers always serialise, and writing to memory never fails.
            let _ = serde_json::to_writer(&mut head, &entry(&secret));
            if !with_values {
                return [head.into(), Bytes::new(), Bytes::new()];
            }
            head.pop();
            head.extend_from_slice(BEFORE_VALUE.as_bytes());
            [head.into(), secret.value_json(), Bytes::from_static(b"}")]
        });
        std::iter::once(Bytes::from_static(Self::BEFORE)).chain(entries).chain(std::iter::once(tail.into()))
    }
}

/// The body of a batch: its length, and its parts.
pub(super) fn batch(
    found: Large<Vec<Bytes>>,
    missing: &[String],
) -> (u64, impl Iterator<Item = Bytes> + Send + 'static) {
    const BEFORE: &[u8] = b"{\"secrets\":[";
    let missing = serde_json::to_string(missing).unwrap_or_default();
    let tail = Bytes::from(format!("],\"missing\":{missing}}}"));
    let commas = found.len().saturating_sub(1);
    let length = BEFORE.len() + found.iter().map(Bytes::len).sum::<usize>() + commas + tail.len();
    let secrets = found.into_each().enumerate().flat_map(|(place, secret)| {
        let comma: &[u8] = if place == 0 { b"" } else { b"," };
        [Bytes::from_static(comma), secret]
    });
    let parts = std::iter::once(Bytes::from_static(BEFORE)).chain(secrets).chain(std::iter::once(tail));
    (length as u64, parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::Timestamp,
        pieces::Pieces,
        secret::{SecretValue, Version},
    };

    fn answer(key: &str, value: &str, version: i64) -> Answer {
        let (tenant, key) = ("acme".parse().unwrap(), key.parse().unwrap());
        let (value, version) = (SecretValue::new(value.to_owned()), Version::new(version).unwrap());
        Answer::new(&tenant, key, &value, version, Timestamp::from_millis(1_700_000_000_123), "abc")
    }

    fn answers() -> Vec<Answer> {
        let long = "long \"value\"\n".repeat(20_000);
        let values = ["", "plain", "\"\\\n\t\u{1}\u{1f511}", "\",\"version\":1}", long.as_str()];
        let keys = ["A", "b\"b", "c\\", "\u{e9}\u{2028}", "z"];
        keys.iter()
            .zip(values)
            .zip([1, 9, 10, 12_345, i64::MAX])
            .map(|((key, value), version)| answer(key, value, version))
            .collect()
    }

    fn joined(length: u64, parts: impl Iterator<Item = Bytes>) -> String {
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
                let mut body = ListBody::new(with_values, &unavailable);
                for (place, secret) in answers.iter().enumerate() {
                    body.count(place == 0, secret);
                }
                let (length, parts) = (body.length(), body.parts(Large::small(answers.to_vec())));
                let expected = KeyList { keys: keys.clone().collect(), unavailable };
                assert!(joined(length, parts) == serde_json::to_string(&expected).unwrap(), "{with_values} {count}");
            }
        }
    }

    #[test]
    fn a_batch_joins_ready_bodies() {
        let (one, two) = (Bytes::from_static(b"{1}"), Bytes::from_static(b"{2}"));
        let (length, parts) = batch(Large::small(vec![one, two]), &["A\"".to_owned()]);
        assert_eq!(joined(length, parts), r#"{"secrets":[{1},{2}],"missing":["A\""]}"#);
        let (length, parts) = batch(Large::small(Vec::new()), &[]);
        assert_eq!(joined(length, parts), r#"{"secrets":[],"missing":[]}"#);
    }
}
