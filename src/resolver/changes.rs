//! What others have changed, brought into force here.

use std::collections::HashSet;

use super::Resolver;
use crate::{phase::Phase, tenant::Tenant, tiers::database::Change};

impl Resolver {
    /// Forgets what was changed elsewhere. When this returns, no lookup that begins here
    /// gives what was before those changes:
    /// - What memory holds of it is gone, and a fill that began before carries a fence from
    ///   before the one that is raised here.
    /// - Who asks from now on joins no flight from before. What begins now reads the
    ///   database after the changes, for they were read of there; and upstream after a write
    ///   that went through another instance, which tells of it when upstream has done it.
    /// - A snapshot that was being read meanwhile is not stored: the database refuses it by
    ///   the tenant's generation, which the write itself has raised.
    ///
    /// What a lookup that had begun before gives, it gives to those who asked before.
    pub fn apply(&self, changes: &[Change]) {
        let mut folders: HashSet<Tenant> = HashSet::new();
        for change in changes {
            match change {
                Change::Secret(tenant, key) => self.changed(tenant, key),
                Change::Folder(tenant) => drop(folders.insert(tenant.clone())),
                Change::Denial(tenant) if self.own_phase(tenant) != Some(Phase::Database) => {
                    self.memory.deny(self.memory.fence(tenant), tenant, self.clock.now());
                }
                Change::Denial(_) | Change::Notice(_) => {}
                Change::Tokens | Change::Tenants | Change::Migration | Change::MasterKeys => {}
            }
        }
        if !folders.is_empty() {
            self.forget_tenants(&folders);
        }
    }

    /// Forgets everything: what has changed is not known.
    pub fn forget_all(&self) {
        self.memory.forget_all();
        self.snapshots.forget_where(|_| true);
        self.loads.forget_where(|_| true);
    }
}
