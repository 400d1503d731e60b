//! What others have changed, brought into force here.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use super::Resolver;
use crate::{
    phase::Phase,
    tenant::Tenant,
    tiers::database::{Change, News, StoreError},
};

/// What this instance is about to change, by the number of the last change that was in force
/// here when it began. Its own changes it does not read of: between the commit and the moment
/// in which it has brought one into force, that number may be behind it already.
#[derive(Default)]
pub(super) struct UnderWay(Mutex<BTreeMap<i64, usize>>);

/// A change under way. Dropped, it is in force here, or was not made.
pub(super) struct Changing {
    resolver: Resolver,
    since: i64,
}

impl UnderWay {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<i64, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        let mut under_way = self.resolver.under_way.lock();
        if let Some(count) = under_way.get_mut(&self.since) {
            *count -= 1;
            if *count == 0 {
                under_way.remove(&self.since);
            }
        }
    }
}

impl Resolver {
    /// Notes that this instance is about to change something.
    pub(super) fn changing(&self) -> Changing {
        let mut under_way = self.under_way.lock();
        let since = self.followed();
        *under_way.entry(since).or_default() += 1;
        Changing { resolver: self.clone(), since }
    }

    /// The number of a change up to which all are in force here, those included that this
    /// instance makes itself.
    pub(super) fn surely_followed(&self) -> i64 {
        // Looked at first: what begins after that is numbered behind it.
        let followed = self.followed();
        self.under_way.lock().keys().next().map_or(followed, |since| followed.min(*since))
    }

    /// Forgets what was changed elsewhere. When this returns, no lookup that begins here
    /// gives what was before those changes:
    /// - What memory holds of it is gone, and a fill that began before carries a fence from
    ///   before the one that is raised here.
    /// - Who asks from now on joins no flight from before. What begins now reads the
    ///   database after the changes, for they were read of there; and upstream after a write
    ///   that went through another instance, which tells of it when upstream has done it.
    /// - Nor does a list of folders from before say that a tenant is absent: the change may
    ///   have made its folder.
    /// - A snapshot that was being read meanwhile is not stored: the database refuses it by
    ///   the tenant's generation, which the write itself has raised.
    ///
    /// What a lookup that had begun before gives, it gives to those who asked before.
    ///
    /// Where these are not all that was changed, everything is forgotten. Where the database was
    /// set back, so are its data keys, for numbers may be given to others; and its copies are
    /// older than what was answered, so that upstream is asked before they are.
    pub fn apply(&self, news: &News) {
        if news.is_set_back {
            tracing::warn!(
                "the database was set back to an older state; everything is read anew, and copies are confirmed"
            );
            self.behind.note_doubt_of_all(self.clock.database_now());
            self.database.forget_all_data_keys();
        }
        if !news.is_whole {
            tracing::info!("what other instances have changed is not known any more; everything is read anew");
            self.phases_doubted.store(true, Ordering::Release);
            self.forget_all();
            self.note_heard();
            return;
        }
        let mut folders: HashSet<Tenant> = HashSet::new();
        for change in &news.changes {
            if let Change::Secret(tenant, _) | Change::Folder(tenant) = change
                && self.reads_upstream(tenant)
            {
                self.tenant_directory.doubt(tenant);
            }
            match change {
                Change::Secret(tenant, key) => self.changed(tenant, key),
                Change::Folder(tenant) => drop(folders.insert(tenant.clone())),
                Change::Denial(tenant) if self.own_phase(tenant) != Some(Phase::Database) => self.denied(tenant),
                Change::Webhook(tenant) if self.may_hold(tenant) => drop(self.queue_refresh(tenant)),
                Change::Denial(_) | Change::Webhook(_) => {}
                Change::Tokens | Change::Tenants | Change::Migration | Change::MasterKeys => {}
            }
        }
        if !folders.is_empty() {
            self.forget_tenants(&folders);
        }
        // Owners are read after this, and count when they are in force.
        let is_of_secrets = |change: &Change| {
            matches!(change, Change::Secret(..) | Change::Folder(_) | Change::Denial(_) | Change::Webhook(_))
        };
        if news.changes.iter().any(is_of_secrets) {
            self.note_heard();
        }
    }

    /// A number that is another one after every change of secrets, or of their owners, that others
    /// have made and that is in force here.
    #[must_use]
    pub fn heard(&self) -> u64 {
        self.heard.load(Ordering::Acquire)
    }

    /// Notes that something that others have changed is in force here.
    pub(super) fn note_heard(&self) {
        self.heard.fetch_add(1, Ordering::AcqRel);
    }

    /// The number of the last change that is in force here: see [`Database::changes`].
    ///
    /// [`Database::changes`]: crate::tiers::database::Database::changes
    #[must_use]
    pub fn followed(&self) -> i64 {
        self.followed.load(Ordering::Acquire)
    }

    /// Notes that a change, and all before it, is in force here.
    pub fn note_followed(&self, number: i64) {
        self.followed.store(number, Ordering::Release);
        #[expect(clippy::cast_precision_loss, reason = "a metric is a float")]
        self.metrics.gauge("secretier_change_followed", &[], number as f64);
    }

    /// Brings into force what has changed of secrets since what is in force here.
    pub(super) async fn catch_up(&self) -> Result<(), StoreError> {
        loop {
            let last = self.followed();
            let news = self.database.changes_after(last).await?;
            if news.up_to == last && news.is_whole {
                return Ok(());
            }
            self.apply(&news);
            self.note_followed(news.up_to);
        }
    }

    /// Stops serving what is held of a tenant. What was read before does not undo that, and
    /// nobody joins such a read.
    fn denied(&self, tenant: &Tenant) {
        self.memory.denied_elsewhere(tenant, self.clock.running());
        self.snapshots.forget(tenant);
        self.loads.forget_where(|(of, _)| of == tenant);
    }

    fn forget_all(&self) {
        self.tenant_directory.doubt_all();
        self.memory.forget_all();
        self.snapshots.forget_where(|_| true);
        self.loads.forget_where(|_| true);
    }
}
