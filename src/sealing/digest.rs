//! Compares two sides without keeping a value of either: by a keyed digest of each.

use std::collections::BTreeMap;

use super::{DerivedKey, KeyPurpose, KeyRing, Tag};
use crate::{
    secret::{SecretKey, SecretValue},
    tenant::Tenant,
};

/// Makes digests that reveal nothing about a value without the master key.
#[derive(Debug)]
pub struct Digester(DerivedKey);

/// One tenant's values, as digests.
pub type Digests = BTreeMap<SecretKey, Tag>;

impl Digester {
    /// Uses the master key that wraps; `None` on an empty ring.
    #[must_use]
    pub fn new(ring: &KeyRing) -> Option<Self> {
        ring.first().map(|key| Self(key.derive(KeyPurpose::MigrationDigest)))
    }

    /// The digest of one value at its place.
    #[must_use]
    pub fn of(&self, tenant: &Tenant, key: &SecretKey, value: &SecretValue) -> Tag {
        self.0.tag(&[tenant.as_str().as_bytes(), key.as_str().as_bytes(), value.expose().as_bytes()])
    }

    /// The digest of the texts that identify a source, which may contain a password.
    #[must_use]
    pub fn of_origin(&self, told: &[&str]) -> Tag {
        let told: Vec<&[u8]> = told.iter().map(|part| part.as_bytes()).collect();
        self.0.tag(&told)
    }

    /// The digest of all of a tenant's values.
    #[must_use]
    pub fn of_all(&self, tenant: &Tenant, digests: &Digests) -> Tag {
        let mut parts: Vec<&[u8]> = vec![tenant.as_str().as_bytes()];
        parts.extend(digests.iter().flat_map(|(key, tag)| [key.as_str().as_bytes(), tag.as_bytes()]));
        self.0.tag(&parts)
    }
}

/// The differences between two sides, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences {
    /// Only the origin has them.
    pub only_origin: Vec<SecretKey>,
    /// Only the database has them.
    pub only_database: Vec<SecretKey>,
    /// Both have them, with other values.
    pub different: Vec<SecretKey>,
}

impl Differences {
    /// Compares both ways.
    #[must_use]
    pub fn between(origin: &Digests, database: &Digests) -> Self {
        let lacking =
            |these: &Digests, those: &Digests| these.keys().filter(|key| !those.contains_key(*key)).cloned().collect();
        let differs = |(key, tag): &(&SecretKey, &Tag)| database.get(*key).is_some_and(|other| other != *tag);
        Self {
            only_origin: lacking(origin, database),
            only_database: lacking(database, origin),
            different: origin.iter().filter(differs).map(|(key, _)| key.clone()).collect(),
        }
    }

    /// Whether both sides are equal.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.only_origin.is_empty() && self.only_database.is_empty() && self.different.is_empty()
    }

    /// The number of names that differ.
    #[must_use]
    pub fn len(&self) -> usize {
        self.only_origin.len() + self.only_database.len() + self.different.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sealing::MasterKey;

    fn digests(digester: &Digester, secrets: &[(&str, &str)]) -> Digests {
        let tenant = "acme".parse().unwrap();
        let of = |(key, value): &(&str, &str)| {
            let key: SecretKey = key.parse().unwrap();
            let tag = digester.of(&tenant, &key, &SecretValue::new((*value).to_owned()));
            (key, tag)
        };
        secrets.iter().map(of).collect()
    }

    #[test]
    fn a_trailing_newline_a_missing_and_an_extra_name_are_told_apart() {
        let digester = Digester::new(&KeyRing::new(vec![MasterKey::generate().unwrap()])).unwrap();
        let origin = digests(&digester, &[("A", "a\n"), ("B", ""), ("C", "c")]);
        let database = digests(&digester, &[("A", "a"), ("C", "c"), ("D", "d")]);
        let differences = Differences::between(&origin, &database);
        let names = |keys: &[SecretKey]| keys.iter().map(|key| key.as_str().to_owned()).collect::<Vec<_>>();
        assert_eq!(names(&differences.different), ["A"]);
        assert_eq!(names(&differences.only_origin), ["B"]);
        assert_eq!(names(&differences.only_database), ["D"]);
        assert!(Differences::between(&origin, &origin).is_empty());
    }
}
