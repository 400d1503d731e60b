//! A secret made ready to be sent: what a hit hands out as it is.

use std::{fmt, io};

use bytes::Bytes;
use http::HeaderValue;
use serde::Serialize;
use zeroize::Zeroizing;

use crate::{
    clock::Timestamp,
    secret::{SecretKey, SecretValue, Version},
    tenant::Tenant,
};

/// One version of one secret, with the finished bytes of its answer. They depend on
/// nothing but the secret and its version, and are wiped with the last holder.
#[derive(Clone)]
pub struct Answer {
    /// The secret's name.
    pub key: SecretKey,
    /// Its value.
    pub value: SecretValue,
    /// Which of the values the secret has had this is.
    pub version: Version,
    /// When this version was written, as the owner tells it.
    pub updated_at: Timestamp,
    /// An opaque validator (RFC 9110 section 8.8.3), with its quotes; not made from the value.
    pub etag: HeaderValue,
    /// `{"tenant","key","value","version"}`.
    pub json: Bytes,
}

impl Answer {
    /// Makes the answer. `etag` is the bare validator: hex digits, no quotes.
    #[must_use]
    pub fn new(
        tenant: &Tenant,
        key: SecretKey,
        value: SecretValue,
        version: Version,
        updated_at: Timestamp,
        etag: &str,
    ) -> Self {
        #[derive(Serialize)]
        struct Body<'a> {
            tenant: &'a str,
            key: &'a str,
            value: &'a str,
            version: i64,
        }
        let body =
            Body { tenant: tenant.as_str(), key: key.as_str(), value: value.expose(), version: version.number() };
        let json = wiped_json(&body);
        let etag = HeaderValue::try_from(format!("\"{etag}\"")).unwrap_or(HeaderValue::from_static("\"\""));
        Self { key, value, version, updated_at, etag, json }
    }

    /// The bare value's bytes, shared with this answer.
    #[must_use]
    pub fn text(&self) -> Bytes {
        Bytes::from_owner(self.value.clone())
    }

    /// Whether `text`, with or without quotes, is this answer's validator.
    #[must_use]
    pub fn etag_is(&self, text: &str) -> bool {
        let text = text.trim();
        let text = text.strip_prefix("W/").unwrap_or(text);
        self.etag.as_bytes() == text.as_bytes()
    }

    /// Bytes held: name, value and body.
    #[must_use]
    pub fn weight(&self) -> u64 {
        (self.key.as_str().len() + self.value.len() + self.json.len()) as u64
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
    // Texts and numbers always serialise; writing to memory never fails.
    let mut length = Length(0);
    let _ = serde_json::to_writer(&mut length, body);
    let mut buffer = Zeroizing::new(Vec::with_capacity(length.0));
    let _ = serde_json::to_writer(&mut *buffer, body);
    Bytes::from_owner(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_the_documented_json_and_its_bare_value() {
        let answer = Answer::new(
            &"acme".parse().unwrap(),
            "A\"B".parse().unwrap(),
            SecretValue::new("line\n\u{1f511}\0".to_owned()),
            Version::FIRST,
            Timestamp::from_millis(0),
            "abc",
        );
        assert_eq!(answer.json, r#"{"tenant":"acme","key":"A\"B","value":"line\n🔑\u0000","version":1}"#.as_bytes());
        assert_eq!(answer.text(), "line\n🔑\0".as_bytes());
        assert!(answer.etag_is("\"abc\"") && answer.etag_is("W/\"abc\"") && !answer.etag_is("abc"));
        assert!(!format!("{answer:?}").contains("line"));
    }
}
