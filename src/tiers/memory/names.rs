//! The names of each tenant's secrets: they prove which keys are absent.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{Entries, NameRef, lock};
use crate::{
    clock::{Confirmed, Moment},
    flaws::Flaws,
    secret::SecretKey,
    tenant::Tenant,
};

/// The names in a tenant's last snapshot: they prove that all other names are absent.
#[derive(Debug)]
pub struct Names {
    /// Every key of the folder whose value is known.
    pub keys: Keys,
    /// The faults of the folder: everything in it that is not among these keys.
    pub flaws: Arc<Flaws>,
    /// The snapshot's validator.
    pub etag: Option<String>,
    /// When the snapshot was taken.
    pub confirmed_at: Confirmed,
    /// When it was kept here.
    pub landed_at: Moment,
    /// Secrets that memory holds beside the snapshot, which came from the database one by one.
    pub(super) strays: Mutex<Strays>,
    /// Bytes that strays may take: an item's weight in the cache cannot grow in place.
    pub(super) room: usize,
    /// Whether it proves nothing: a change was recorded since, or there was no snapshot.
    pub(super) outdated: AtomicBool,
}

impl Names {
    /// The names of a snapshot.
    #[must_use]
    pub fn new(
        keys: Keys,
        flaws: Arc<Flaws>,
        etag: Option<String>,
        confirmed_at: Confirmed,
        landed_at: Moment,
    ) -> Self {
        let (strays, room, outdated) = (Mutex::default(), 0, AtomicBool::new(false));
        Self { keys, flaws, etag, confirmed_at, landed_at, strays, room, outdated }
    }

    /// Names without a snapshot, for a secret that is held alone.
    pub(super) fn of_a_stray(key: &SecretKey, now: Confirmed) -> Self {
        let names = Self::new(Keys::default(), Arc::default(), None, now, now.moment);
        Self { outdated: AtomicBool::new(true), ..names }.with_a_stray(key)
    }

    /// Notes a stray; `false` where there is no room for it.
    pub(super) fn note_stray(&self, key: &SecretKey) -> bool {
        let mut strays = lock(&self.strays);
        let fits = strays.keys.contains(key) || strays.bytes + weight_of(key) <= self.room;
        if fits {
            strays.insert(key);
        }
        fits
    }

    /// The same with one more stray, and room for as many again.
    pub(super) fn with_a_stray(&self, key: &SecretKey) -> Self {
        let mut strays = std::mem::take(&mut *lock(&self.strays));
        strays.insert(key);
        Self {
            keys: self.keys.clone(),
            flaws: Arc::clone(&self.flaws),
            etag: self.etag.clone(),
            confirmed_at: self.confirmed_at,
            landed_at: self.landed_at,
            room: 2 * strays.bytes,
            strays: Mutex::new(strays),
            outdated: AtomicBool::new(self.outdated.load(Ordering::Relaxed)),
        }
    }

    /// Every key that may have an entry.
    pub(super) fn all(&self) -> Vec<SecretKey> {
        self.keys.iter().chain(&lock(&self.strays).keys).cloned().collect()
    }

    pub(super) fn drop_entries(&self, tenant: &Tenant, entries: &Entries, gone: impl Fn(&SecretKey) -> bool) {
        for key in self.keys.iter().chain(&lock(&self.strays).keys).filter(|key| gone(key)) {
            entries.remove(&NameRef(tenant.as_str(), key.as_str()));
        }
    }
}

/// Names of secrets that came one by one, and their size.
#[derive(Debug, Default)]
pub(super) struct Strays {
    pub(super) keys: BTreeSet<SecretKey>,
    pub(super) bytes: usize,
}

impl Strays {
    fn insert(&mut self, key: &SecretKey) {
        if self.keys.insert(key.clone()) {
            self.bytes += weight_of(key);
        }
    }
}

/// A name's bytes, its slot, a pointer pair, and the rounding of its own allocation.
pub(super) fn weight_of(key: &SecretKey) -> usize {
    key.as_str().len() + 48
}

/// The keys of a folder, sorted, without spare capacity: most tenants have a few, for which a table
/// would take twice as much.
#[derive(Debug, Default, Clone)]
pub struct Keys(Box<[SecretKey]>);

impl Keys {
    /// Whether the folder has this key.
    #[must_use]
    pub fn contains(&self, key: &SecretKey) -> bool {
        self.0.binary_search(key).is_ok()
    }

    /// The number of keys.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Each key, in order.
    pub fn iter(&self) -> impl Iterator<Item = &SecretKey> {
        self.0.iter()
    }
}

impl FromIterator<SecretKey> for Keys {
    fn from_iter<I: IntoIterator<Item = SecretKey>>(keys: I) -> Self {
        let mut keys: Vec<SecretKey> = keys.into_iter().collect();
        keys.sort_unstable();
        keys.dedup();
        Self(keys.into_boxed_slice())
    }
}
