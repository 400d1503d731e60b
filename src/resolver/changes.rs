//! Applies changes that other instances have made.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use super::Resolver;
use crate::{
    phase::Phase,
    tenant::Tenant,
    tiers::database::{Change, News, StoreError},
};

/// The changes that this instance is about to make. Each is kept under the number of the last
/// change that was in force here when it began. An instance does not read its own changes in the
/// feed: between a commit and its coming into force here, the followed number may be past it.
#[derive(Default)]
pub(super) struct UnderWay(Mutex<BTreeMap<i64, usize>>);

/// A change under way. When it is dropped, the change is in force here or was not made.
pub(super) struct Changing {
    resolver: Arc<Resolver>,
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
        drop(under_way);
        // It may be told now.
        self.resolver.events.due.notify_one();
    }
}

impl Resolver {
    /// Notes that this instance is about to change something.
    pub(super) fn changing(self: &Arc<Self>) -> Changing {
        let mut under_way = self.under_way.lock();
        let since = self.followed();
        *under_way.entry(since).or_default() += 1;
        Changing { resolver: Arc::clone(self), since }
    }

    /// The number up to which every change is surely in force here, this instance's own ones
    /// included.
    pub(super) fn surely_followed(&self) -> i64 {
        // Read first: a change that begins after this has a higher number.
        let followed = self.followed();
        self.under_way.lock().keys().next().map_or(followed, |since| followed.min(*since))
    }

    /// Forgets everything that was changed elsewhere. When this returns, no lookup that begins here
    /// returns the state from before those changes:
    /// - Memory has dropped its entries for it, and a fill that began before carries a fence from
    ///   before the one that is raised here.
    /// - A caller who asks from now on joins no flight from before. A load that begins now reads
    ///   the database after the changes, because they were read there; and it reads upstream after
    ///   a write that went through another instance, which announces it when upstream has done it.
    /// - A list of folders from before does not prove that a tenant is absent: the change may have
    ///   made its folder.
    /// - A snapshot that was being read meanwhile is not stored: the database refuses it by the
    ///   tenant's generation, which the write itself has raised.
    ///
    /// A lookup that had begun before may still return the old state, to callers who asked before.
    ///
    /// Where the news does not hold every change, everything is forgotten. Where the database was
    /// set back, the data keys are forgotten too, because their numbers may be given to others; and
    /// its copies are older than what was answered, so upstream is asked before they are served.
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
            self.events.note(news);
            return;
        }
        let mut folders: HashSet<Tenant> = HashSet::new();
        for change in &news.changes {
            if let Change::Secret(tenant, _) | Change::Folder(tenant) = change
                && self.reads_upstream(tenant)
            {
                self.tenant_directory.soft_invalidate(tenant);
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
        // Owners are read after this: a change of owners counts once it is in force.
        let is_of_secrets = |change: &Change| {
            matches!(change, Change::Secret(..) | Change::Folder(_) | Change::Denial(_) | Change::Webhook(_))
        };
        if news.changes.iter().any(is_of_secrets) {
            self.note_heard();
        }
        self.events.note(news);
    }

    /// A number that differs after every change of secrets, or of their owners, that other
    /// instances have made and that is in force here.
    #[must_use]
    pub fn heard(&self) -> u64 {
        self.heard.load(Ordering::Acquire)
    }

    /// Notes that a change of another instance is in force here.
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

    /// Notes that this change, and every earlier one, is in force here.
    pub fn note_followed(&self, number: i64) {
        self.followed.store(number, Ordering::Release);
        self.events.due.notify_one();
        #[expect(clippy::cast_precision_loss, reason = "a metric is a float")]
        self.metrics.gauge("secretier_change_followed", &[], number as f64);
    }

    /// Applies the changes of secrets that came after the last one that is in force here.
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

    /// Stops serving what is held of a tenant. A read from before does not undo that, and nobody
    /// joins such a read.
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
