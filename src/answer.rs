//! A secret prepared for sending: a hit sends it unchanged.

use std::{fmt, io, ops::Range};

use bytes::Bytes;
use http::HeaderValue;
use serde::Serialize;

use crate::{
    clock::Timestamp,
    long_work::breathe,
    secret::{SecretKey, SecretValue, Version},
    tenant::Tenant,
    wiped::Wiped,
};

/// One version of one secret, with the finished bytes of its answer. They depend only on the secret
/// and its version, and are wiped with the last holder.
///
/// All of them are in one buffer, because memory holds many answers: the JSON, the validator in its
/// quotes, and the bare value where its form in the JSON differs because it is escaped. A holder of
/// a part holds the whole.
#[derive(Clone)]
pub struct Answer {
    /// The secret's name.
    pub key: SecretKey,
    /// The version of the secret.
    pub version: Version,
    /// When this version was written, according to the owner.
    pub updated_at: Timestamp,
    bytes: Bytes,
    /// Where the value begins in the JSON, with its quotes.
    value_json_at: usize,
    /// Where the JSON ends and the validator begins.
    json_end: usize,
    etag_end: usize,
    /// The length of the bare value.
    value_length: usize,
    refers: bool,
}

impl Answer {
    /// Makes the answer. `etag` is the bare validator: hex digits, no quotes.
    #[must_use]
    pub fn new(
        tenant: &Tenant,
        key: SecretKey,
        value: &SecretValue,
        version: Version,
        updated_at: Timestamp,
        etag: &str,
    ) -> Self {
        let (value, number) = (value.expose(), version.number());
        let (tenant, name) = (tenant.as_str(), key.as_str());
        let value_json_at = r#"{"tenant":,"key":,"value":"#.len() + text_json_length(tenant) + text_json_length(name);
        let value_json_length = text_json_length(value);
        let json_end = value_json_at + value_json_length + r#","version":}"#.len() + json_length(&number);
        let etag_end = json_end + etag.len() + r#""""#.len();
        // Escaped characters get longer; all others stay as they are.
        let is_escaped = value_json_length > value.len() + r#""""#.len();
        let length = if is_escaped { etag_end + value.len() } else { etag_end };
        breathe(length);
        let mut buffer = Wiped::new(Vec::with_capacity(length));
        let pieces = [(r#"{"tenant":"#, tenant), (r#","key":"#, name), (r#","value":"#, value)];
        for (before, text) in pieces {
            buffer.extend_from_slice(before.as_bytes());
            write_text_json(&mut buffer, text);
        }
        buffer.extend_from_slice(br#","version":"#);
        write_json(&mut buffer, &number);
        for part in ["}\"", etag, "\"", if is_escaped { value } else { "" }] {
            buffer.extend_from_slice(part.as_bytes());
        }
        breathe(length);
        let (bytes, value_length) = (Bytes::from_owner(buffer), value.len());
        Self { key, version, updated_at, bytes, value_json_at, json_end, etag_end, value_length, refers: false }
    }

    /// Sets whether the value was made from references to other secrets.
    #[must_use]
    pub fn referring(self, refers: bool) -> Self {
        Self { refers, ..self }
    }

    /// Whether the value depends on other secrets: then it is unknown again when one of these
    /// changes.
    #[must_use]
    pub fn refers(&self) -> bool {
        self.refers
    }

    /// `{"tenant","key","value","version"}`.
    #[must_use]
    pub fn json(&self) -> Bytes {
        self.bytes.slice(..self.json_end)
    }

    /// The value in its form in the JSON, with its quotes.
    #[must_use]
    pub fn value_json(&self) -> Bytes {
        let after = r#","version":}"#.len() + json_length(&self.version.number());
        self.bytes.slice(self.value_json_at..self.json_end - after)
    }

    /// The bare value's bytes.
    #[must_use]
    pub fn text(&self) -> Bytes {
        self.bytes.slice(self.value_place())
    }

    /// The value itself. Reviewers look at every use of it.
    #[must_use]
    pub fn expose(&self) -> &str {
        // It was valid UTF-8 when it was written there.
        str::from_utf8(&self.bytes[self.value_place()]).unwrap_or_default()
    }

    fn value_place(&self) -> Range<usize> {
        let is_escaped = self.bytes.len() > self.etag_end;
        let at = if is_escaped { self.etag_end } else { self.value_json_at + 1 };
        at..at + self.value_length
    }

    /// The value, copied out of the answer.
    #[must_use]
    pub fn value(&self) -> SecretValue {
        SecretValue::new(self.expose().to_owned())
    }

    /// Whether this is the value. The time of the comparison depends on the lengths only.
    #[must_use]
    pub fn value_is(&self, value: &SecretValue) -> bool {
        value.is_text(self.expose())
    }

    /// An opaque validator (RFC 9110 section 8.8.3), with its quotes; not made from the value.
    #[must_use]
    pub fn etag(&self) -> HeaderValue {
        let etag = self.bytes.slice(self.json_end..self.etag_end);
        HeaderValue::from_maybe_shared(etag).unwrap_or(HeaderValue::from_static(r#""""#))
    }

    /// The validator without its quotes.
    #[must_use]
    pub fn bare_etag(&self) -> &str {
        str::from_utf8(&self.bytes[self.json_end + 1..self.etag_end - 1]).unwrap_or_default()
    }

    /// Whether `text`, with its quotes, is this answer's validator; a weak one matches too.
    #[must_use]
    pub fn etag_is(&self, text: &str) -> bool {
        let text = text.trim();
        let text = text.strip_prefix("W/").unwrap_or(text);
        self.bytes[self.json_end..self.etag_end] == *text.as_bytes()
    }

    /// The bytes held: the name, and the finished bytes.
    #[must_use]
    pub fn weight(&self) -> u64 {
        (self.key.as_str().len() + self.bytes.len()) as u64
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("key", &self.key).field("version", &self.version).finish_non_exhaustive()
    }
}

/// JSON in a buffer that is wiped when dropped and that never moved while it was
/// written: a growing buffer would leave pieces of the value behind.
pub fn wiped_json(body: &impl Serialize) -> Bytes {
    let mut buffer = Wiped::new(Vec::with_capacity(json_length(body)));
    write_json(&mut buffer, body);
    Bytes::from_owner(buffer)
}

/// Texts and numbers always serialise, and writing to memory never fails.
fn write_json(buffer: &mut Vec<u8>, body: &impl Serialize) {
    let _ = serde_json::to_writer(buffer, body);
}

/// The same for a text. Most texts need no escapes, and are copied.
fn write_text_json(buffer: &mut Vec<u8>, text: &str) {
    match is_plain(text) {
        true => ["\"", text, "\""].iter().for_each(|part| buffer.extend_from_slice(part.as_bytes())),
        false => write_json(buffer, &text),
    }
}

fn text_json_length(text: &str) -> usize {
    if is_plain(text) { text.len() + r#""""#.len() } else { json_length(&text) }
}

/// Whether JSON needs no escapes for a text. Reads every byte, which is faster than to stop at one.
fn is_plain(text: &str) -> bool {
    text.bytes().filter(|byte| matches!(byte, ..b' ' | b'"' | b'\\')).count() == 0
}

/// The length of a value as JSON.
pub fn json_length(body: &impl Serialize) -> usize {
    struct Length(usize);
    impl io::Write for Length {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut length = Length(0);
    let _ = serde_json::to_writer(&mut length, body);
    length.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(key: &str, value: &str) -> Answer {
        let value = SecretValue::new(value.to_owned());
        let (tenant, key) = ("acme".parse().unwrap(), key.parse().unwrap());
        Answer::new(&tenant, key, &value, Version::FIRST, Timestamp::from_millis(0), "abc")
    }

    #[test]
    fn an_answer_is_the_documented_json_and_its_bare_value() {
        let answer = answer("A\"B", "line\n\u{1f511}\0");
        assert_eq!(answer.json(), r#"{"tenant":"acme","key":"A\"B","value":"line\n🔑\u0000","version":1}"#.as_bytes());
        assert_eq!(answer.text(), "line\n🔑\0".as_bytes());
        assert!(answer.etag_is("\"abc\"") && answer.etag_is("W/\"abc\"") && !answer.etag_is("abc"));
        assert_eq!((answer.etag(), answer.bare_etag()), (HeaderValue::from_static("\"abc\""), "abc"));
        assert!(!format!("{answer:?}").contains("line"));
    }

    #[test]
    fn the_bare_value_is_what_was_given_however_the_json_writes_it() {
        for value in ["", "plain", "\\\\", "\"", "\"\"\",\"version\":1}", "🔑é", "a\u{7f}\u{2028}b", "\r\n\t\u{1}"] {
            let answer = answer("K", value);
            assert_eq!((answer.text(), answer.expose()), (value.into(), value));
            assert!(answer.value_is(&SecretValue::new(value.to_owned())));
            assert_eq!(answer.value_json(), serde_json::to_string(value).unwrap());
            let json: serde_json::Value = serde_json::from_slice(&answer.json()).unwrap();
            assert_eq!(json, serde_json::json!({"tenant": "acme", "key": "K", "value": value, "version": 1}));
        }
    }

    #[test]
    fn a_value_is_held_once_where_nothing_in_it_is_escaped() {
        let bare = answer("K", &"x".repeat(1000));
        assert_eq!(bare.weight(), ("K".len() + bare.json().len() + r#""abc""#.len()) as u64);
    }
}
