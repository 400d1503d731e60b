//! Validators that were given out before the database had one for the secret.
//!
//! A secret's validator comes from its row. Where an answer cannot wait for the row, because the
//! database is out or slow, it carries a random one, and the row's comes after it. A caller that
//! later names the first in a condition means the value that it came with. So it is kept, beside a
//! keyed digest of that value, and honoured for as long as upstream still has it.
//!
//! Interleavings: a validator is kept before it is given out. It is dropped by the first read that
//! brings another value or none, and by the first write through this instance. A value that
//! somebody replaces in Infisical and restores between two reads is the value that it was given
//! for.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use siphasher::sip128::{Hasher128 as _, SipHasher24};

use crate::{secret::SecretKey, tenant::Tenant};

/// The most validators that are kept; the oldest are dropped.
const KEPT: usize = 10_000;

pub(super) struct Provisional {
    digester: SipHasher24,
    given: Mutex<Given>,
}

#[derive(Default)]
struct Given {
    by_tenant: HashMap<Tenant, HashMap<SecretKey, Validator>>,
    /// In the order in which they were given out, each with its number.
    order: VecDeque<(Tenant, SecretKey, u64)>,
    last: u64,
}

struct Validator {
    etag: String,
    of_value: u128,
    number: u64,
}

impl Provisional {
    pub(super) fn new() -> Self {
        Self { digester: SipHasher24::new_with_key(&rand::random()), given: Mutex::default() }
    }

    /// The validator for a value that has none in the database yet: the one that was given out for
    /// it before, or a new one.
    pub(super) fn give(&self, tenant: &Tenant, key: &SecretKey, value: &str) -> String {
        let of_value = self.digest(value);
        let mut given = self.lock();
        let before = given.by_tenant.get(tenant).and_then(|keys| keys.get(key));
        if let Some(before) = before.filter(|before| before.of_value == of_value) {
            return before.etag.clone();
        }
        let etag = hex::encode(rand::random::<[u8; 16]>());
        given.last += 1;
        let number = given.last;
        let validator = Validator { etag: etag.clone(), of_value, number };
        given.by_tenant.entry(tenant.clone()).or_default().insert(key.clone(), validator);
        given.order.push_back((tenant.clone(), key.clone(), number));
        while given.order.len() > KEPT {
            given.drop_oldest();
        }
        etag
    }

    /// Whether this validator was given for that value of the secret.
    pub(super) fn is_of(&self, tenant: &Tenant, key: &SecretKey, etag: &str, value: &str) -> bool {
        let given = self.lock();
        let validator = given.by_tenant.get(tenant).and_then(|keys| keys.get(key));
        validator.is_some_and(|validator| validator.etag == etag && validator.of_value == self.digest(value))
    }

    /// Forgets those of a tenant's validators whose values differ from the folder's values now.
    pub(super) fn compare<'v>(&self, tenant: &Tenant, value_of: impl Fn(&SecretKey) -> Option<&'v str>) {
        let mut given = self.lock();
        let Some(keys) = given.by_tenant.get_mut(tenant) else { return };
        keys.retain(|key, validator| value_of(key).is_some_and(|value| self.digest(value) == validator.of_value));
        if keys.is_empty() {
            given.by_tenant.remove(tenant);
        }
    }

    /// Forgets the validator of a secret that is written through this instance.
    pub(super) fn forget(&self, tenant: &Tenant, key: &SecretKey) {
        let mut given = self.lock();
        if let Some(keys) = given.by_tenant.get_mut(tenant) {
            keys.remove(key);
        }
    }

    fn digest(&self, value: &str) -> u128 {
        let mut digester = self.digester;
        std::hash::Hasher::write(&mut digester, value.as_bytes());
        digester.finish128().as_u128()
    }

    fn lock(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Given {
    fn drop_oldest(&mut self) {
        let Some((tenant, key, number)) = self.order.pop_front() else { return };
        let Some(keys) = self.by_tenant.get_mut(&tenant) else { return };
        // Another may have been given since.
        if keys.get(&key).is_some_and(|validator| validator.number == number) {
            keys.remove(&key);
        }
        if keys.is_empty() {
            self.by_tenant.remove(&tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> (Provisional, Tenant, SecretKey) {
        (Provisional::new(), "acme".parse().unwrap(), "KEY".parse().unwrap())
    }

    #[test]
    fn a_validator_stands_for_the_value_it_was_given_for_and_is_given_again_for_it() {
        let (provisional, tenant, key) = names();
        let first = provisional.give(&tenant, &key, "one");
        assert_eq!(provisional.give(&tenant, &key, "one"), first);
        assert!(provisional.is_of(&tenant, &key, &first, "one"));
        assert!(!provisional.is_of(&tenant, &key, &first, "two"));
        let second = provisional.give(&tenant, &key, "two");
        assert_ne!(second, first);
        assert!(!provisional.is_of(&tenant, &key, &first, "one"));
        provisional.forget(&tenant, &key);
        assert!(!provisional.is_of(&tenant, &key, &second, "two"));
    }

    #[test]
    fn a_read_that_brings_another_value_or_none_takes_the_validator_away() {
        let (provisional, tenant, key) = names();
        let etag = provisional.give(&tenant, &key, "one");
        provisional.compare(&tenant, |_| Some("one"));
        assert!(provisional.is_of(&tenant, &key, &etag, "one"));
        provisional.compare(&tenant, |_| Some("two"));
        assert!(!provisional.is_of(&tenant, &key, &etag, "one"), "it was replaced meanwhile");
        let etag = provisional.give(&tenant, &key, "one");
        provisional.compare(&tenant, |_| None);
        assert!(!provisional.is_of(&tenant, &key, &etag, "one"));
    }

    #[test]
    fn so_many_are_kept_and_the_oldest_go() {
        let (provisional, tenant, _) = names();
        let key = |number: usize| format!("K{number}").parse::<SecretKey>().unwrap();
        let first = provisional.give(&tenant, &key(0), "v");
        let last: Vec<String> = (1..=KEPT).map(|number| provisional.give(&tenant, &key(number), "v")).collect();
        assert!(!provisional.is_of(&tenant, &key(0), &first, "v"));
        assert!(provisional.is_of(&tenant, &key(KEPT), &last[KEPT - 1], "v"));
        assert_eq!(provisional.lock().by_tenant[&tenant].len(), KEPT);
    }
}
