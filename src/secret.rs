//! A secret's name, value and version.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize as _, Deserializer};

use crate::{
    tenant::{InvalidTenant, Tenant},
    wiped::Wiped,
};

/// The largest accepted value, in bytes, where `server.max_value` does not change it.
pub const LARGEST_VALUE: u64 = 1 << 20;

/// The name of a secret: 1 to 255 bytes without control characters, cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SecretKey(Arc<str>);

impl SecretKey {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 255;

    /// Whether `name` may name a secret; `parse` without the allocation.
    #[must_use]
    pub fn is_valid(name: &str) -> bool {
        (1..=Self::MAX_LEN).contains(&name.len()) && !name.chars().any(char::is_control)
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SecretKey {
    type Err = InvalidKey;

    fn from_str(name: &str) -> Result<Self, InvalidKey> {
        if Self::is_valid(name) { Ok(Self(name.into())) } else { Err(InvalidKey) }
    }
}

impl fmt::Display for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({:?})", self.0)
    }
}

/// A name that no secret can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a secret is named by 1 to 255 bytes of UTF-8 without control characters")]
pub struct InvalidKey;

/// The name of one tenant's secret as a request brings it: checked, not yet copied,
/// so that a hit in memory allocates nothing for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SecretName<'a> {
    tenant: &'a str,
    key: &'a str,
}

impl<'a> SecretName<'a> {
    /// Checks both parts.
    ///
    /// # Errors
    /// The part that is invalid, the tenant first.
    pub fn parse(tenant: &'a str, key: &'a str) -> Result<Self, InvalidName> {
        if !Tenant::is_valid(tenant) {
            return Err(InvalidName::Tenant(InvalidTenant));
        }
        if !SecretKey::is_valid(key) {
            return Err(InvalidName::Key(InvalidKey));
        }
        Ok(Self { tenant, key })
    }

    /// The name from parts that were parsed before.
    #[must_use]
    pub fn of(tenant: &'a Tenant, key: &'a SecretKey) -> Self {
        Self { tenant: tenant.as_str(), key: key.as_str() }
    }

    /// The tenant's name.
    #[must_use]
    pub fn tenant(&self) -> &'a str {
        self.tenant
    }

    /// The secret's name.
    #[must_use]
    pub fn key(&self) -> &'a str {
        self.key
    }

    /// An owned copy of both parts.
    #[must_use]
    pub fn to_owned(&self) -> (Tenant, SecretKey) {
        (Tenant::checked(self.tenant), SecretKey(self.key.into()))
    }
}

/// The part of a name that is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// The tenant.
    #[error(transparent)]
    Tenant(#[from] InvalidTenant),
    /// The secret's key.
    #[error(transparent)]
    Key(#[from] InvalidKey),
}

/// A decrypted value: wiped when its last holder is dropped, absent from logs.
#[derive(Clone)]
pub struct SecretValue(Arc<Wiped<String>>);

impl SecretValue {
    /// Takes ownership of the text; the caller's buffer is not copied.
    #[must_use]
    pub fn new(value: String) -> Self {
        Self(Arc::new(Wiped::new(value)))
    }

    /// The value itself. Reviewers look at every use of it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The value's length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the value is the empty text, which is a value like any other.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether two values are the same. The time of the comparison depends on their lengths only.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        self.is_text(other.expose())
    }

    /// Whether the value is this text. The time of the comparison depends on their lengths only.
    #[must_use]
    pub fn is_text(&self, text: &str) -> bool {
        use subtle::ConstantTimeEq as _;
        self.0.as_bytes().ct_eq(text.as_bytes()).into()
    }
}

impl AsRef<[u8]> for SecretValue {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// Reads a value from a text, for fields that name this function: values are not read by accident.
///
/// # Errors
/// Any other type than a text.
pub(crate) fn deserialize_value<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SecretValue, D::Error> {
    String::deserialize(deserializer).map(SecretValue::new)
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(redacted)")
    }
}

/// Says whether somebody has access to a key.
pub type Reaches = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// The writer of a secret, cheap to clone: the name of a token, and the keys that it has access to.
#[derive(Clone)]
pub struct Writer {
    name: Arc<str>,
    reaches: Option<Reaches>,
}

impl Writer {
    /// A writer of that name with access to every key of the tenants that it writes to.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), reaches: None }
    }

    /// A writer of that name with access to these keys.
    #[must_use]
    pub fn reaching(name: &str, reaches: Reaches) -> Self {
        Self { name: name.into(), reaches: Some(reaches) }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.name
    }

    /// Whether the writer has access to a key of that name.
    #[must_use]
    pub fn reaches(&self, name: &str) -> bool {
        self.reaches.as_ref().is_none_or(|reaches| reaches(name))
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Writer({})", self.name)
    }
}

/// Counts the values that a secret has had; the first is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version(i64);

impl Version {
    /// The version of a secret's first value.
    pub const FIRST: Self = Self(1);

    /// A version from a number at or above 1.
    #[must_use]
    pub fn new(number: i64) -> Option<Self> {
        (number >= 1).then_some(Self(number))
    }

    /// The version after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The version as a number.
    #[must_use]
    pub fn number(self) -> i64 {
        self.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_any_short_text_without_control_characters() {
        for name in ["A", "a/b", "..", "K🔑", "100%", "with space", &"x".repeat(255)] {
            assert!(SecretKey::from_str(name).is_ok(), "{name}");
        }
        for name in ["", "a\nb", "a\0", "\u{7f}", "\u{85}", &"x".repeat(256), &"🔑".repeat(64)] {
            assert_eq!(SecretKey::from_str(name), Err(InvalidKey), "{name:?}");
        }
    }

    #[test]
    fn a_value_is_absent_from_debug() {
        let value = SecretValue::new("hunter2".to_owned());
        assert!(!format!("{value:?} {:?}", Some(&value)).contains("hunter2"));
    }

    #[test]
    fn versions_count_from_one() {
        assert_eq!(Version::new(0), None);
        assert_eq!(Version::new(1), Some(Version::FIRST));
        assert_eq!(Version::FIRST.next().number(), 2);
    }
}
