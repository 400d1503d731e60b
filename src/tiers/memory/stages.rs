//! The values that are valid beside a secret's own while a rotation runs, as memory holds them.

use std::sync::Arc;

use quick_cache::{Weighter, sync::Cache};

use super::{Fence, Memory, Name, NameRef, lock};
use crate::{
    clock::{Moment, Timestamp},
    secret::{SecretKey, SecretValue, Version},
    tenant::Tenant,
};

/// Whether a rotation of a secret runs, and with which values.
#[derive(Debug)]
pub struct Staged {
    /// The rotation's values, where one runs.
    pub values: Option<StagedValues>,
    /// When it was read.
    pub read_at: Moment,
}

/// The values of a rotation that runs. Both are held from its beginning to its end, so that a reader
/// which has the secret itself from before the new value took over, or from after it, finds the other.
#[derive(Debug)]
pub struct StagedValues {
    /// The value that goes.
    pub old: SecretValue,
    /// Its version.
    pub old_version: Option<Version>,
    /// Until when it is valid, by the database's clock; `None` before the new one has taken over.
    pub valid_until: Option<Timestamp>,
    /// The value that comes, once it is made.
    pub new: Option<SecretValue>,
    /// Its version, where the owner has told it.
    pub new_version: Option<Version>,
}

/// The values of rotations that memory holds, by secret.
pub(super) type Stages = Cache<Name, Arc<Staged>, ByBytes>;

#[derive(Clone, Copy)]
pub(super) struct ByBytes;

impl Weighter<Name, Arc<Staged>> for ByBytes {
    fn weight(&self, name: &Name, staged: &Arc<Staged>) -> u64 {
        let held =
            staged.values.iter().map(|values| values.old.len() + values.new.as_ref().map_or(0, SecretValue::len));
        Memory::OVERHEAD + (name.0.as_str().len() + name.1.as_str().len() + held.sum::<usize>()) as u64
    }
}

impl Memory {
    /// The held values of a secret's rotation. They are dropped with every change of the secret.
    #[must_use]
    pub fn staged(&self, tenant: &str, key: &str) -> Option<Arc<Staged>> {
        self.stages.get(&NameRef(tenant, key))
    }

    /// Keeps what was read of a secret's rotation, unless a change was recorded since the fence was
    /// taken: under the same lock that a change raises the fence and removes under.
    pub fn fill_staged(&self, fence: Fence, tenant: &Tenant, key: &SecretKey, staged: Arc<Staged>) {
        let generation = lock(&self.fences[fence.stripe]);
        if *generation == fence.generation {
            self.stages.insert(Name(tenant.clone(), key.clone()), staged);
        }
    }
}
