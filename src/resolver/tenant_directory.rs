//! Knows which tenants exist upstream, by the folder list. However many tenants are asked for that do
//! not exist, it is read at most once in five seconds while that succeeds.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use crate::{
    clock::{Clock, Confirmed, Timestamp},
    tenant::Tenant,
    tiers::upstream::{Lane, Upstream, UpstreamError},
};

/// A listed tenant is believed to exist whatever the list's age: reading its folder
/// tells soon enough if it is gone. An unlisted one is believed absent for
/// [`TenantDirectory::ABSENT_FOR`]; then the list is read again, for who waits for an answer. Where
/// that fails, and for what nobody waits for, a list is good for [`TenantDirectory::LIST_EVERY`].
///
/// One asynchronous lock is held across the read, so that all callers who find the list too old
/// wait for one read of it and then look again. Callers that the list satisfies do not take
/// the lock.
///
/// A tenant that another instance has made is in no list that was read before. So a tenant
/// for which a change was reported is unlisted only by a list whose read began after the report:
/// reads of the list are numbered as they begin, and no clock can put these out of order.
pub(super) struct TenantDirectory {
    upstream: Option<Arc<dyn Upstream>>,
    clock: Clock,
    list: RwLock<Option<Arc<List>>>,
    /// Tenants whose folders were made here, and when by the running clock: a list from an earlier
    /// read lacks them. Changed under `list`'s lock; emptied by the next list read after.
    made: Mutex<HashMap<Tenant, Duration>>,
    told: Mutex<Told>,
    reading: tokio::sync::Mutex<Option<Failure>>,
}

pub(super) struct List {
    pub(super) tenants: HashSet<Tenant>,
    pub(super) read_at: Confirmed,
    /// Counts the reads of the list, in the order in which they began.
    number: u64,
}

/// Changes by others, each with the number of the last list whose read had begun by then.
#[derive(Default)]
struct Told {
    /// For known tenants; emptied by every list that is read after.
    tenants: HashMap<Tenant, u64>,
    /// For changes whose tenants are not known.
    anything: Option<u64>,
    /// The number of reads of the list that have begun.
    reads: u64,
}

/// The list's statement about a tenant.
pub(super) enum Found {
    /// It has a folder, or had one when the list was read.
    Listed,
    /// It had none at this time.
    Unlisted(Confirmed),
}

struct Failure {
    error: UpstreamError,
    at: Duration,
}

impl TenantDirectory {
    /// A list younger than this is not read again.
    const LIST_EVERY: Duration = Duration::from_secs(60);
    /// A tenant that a list lacks may have been made since it was read: an older list than this does
    /// not say that it is absent.
    pub(super) const ABSENT_FOR: Duration = Duration::from_secs(5);
    /// A failed read is not repeated within this time: its error is returned again.
    const RETRY_AFTER: Duration = Duration::from_secs(1);

    pub(super) fn new(upstream: Option<Arc<dyn Upstream>>, clock: Clock) -> Self {
        Self {
            upstream,
            clock,
            list: RwLock::default(),
            made: Mutex::default(),
            told: Mutex::default(),
            reading: tokio::sync::Mutex::default(),
        }
    }

    /// Whether upstream has a folder for the tenant.
    pub(super) async fn find(&self, tenant: &Tenant, lane: Lane) -> Result<Found, UpstreamError> {
        if self.held().is_some_and(|list| list.tenants.contains(tenant)) {
            return Ok(Found::Listed);
        }
        let told = self.told_of(tenant);
        let is_told_of = |list: &List| told.is_none_or(|before| list.number > before);
        let held = || self.held().filter(|list| self.is_young(list) && is_told_of(list));
        let list = match (lane, held().filter(|_| self.failed_lately())) {
            (Lane::Interactive, Some(list)) => list,
            (Lane::Interactive, None) => match self.good(lane, |list| self.is_new(list) && is_told_of(list)).await {
                Ok(list) => list,
                Err(error) => held().ok_or(error)?,
            },
            (Lane::Changes | Lane::Refresh | Lane::Migration, _) => {
                self.good(lane, |list| self.is_young(list) && is_told_of(list)).await?
            }
        };
        Ok(if list.tenants.contains(tenant) { Found::Listed } else { Found::Unlisted(list.read_at) })
    }

    /// Whether upstream has a folder for the tenant by a list that is not older than a minute.
    pub(super) async fn has(&self, tenant: &Tenant, lane: Lane) -> Result<bool, UpstreamError> {
        let told = self.told_of(tenant);
        let is_told_of = |list: &List| list.tenants.contains(tenant) || told.is_none_or(|before| list.number > before);
        let list = self.good(lane, |list| self.is_young(list) && is_told_of(list)).await?;
        Ok(list.tenants.contains(tenant))
    }

    /// Whether upstream has a folder for a tenant that may have been made a moment ago. The list is
    /// read at most once in [`Self::ABSENT_FOR`] for this, however many absent ones are asked for.
    pub(super) async fn find_newly_made(&self, tenant: &Tenant) -> Result<bool, UpstreamError> {
        let told = self.told_of(tenant);
        let is_good = |list: &List| {
            list.tenants.contains(tenant) || (self.is_new(list) && told.is_none_or(|before| list.number > before))
        };
        Ok(self.good(Lane::Interactive, is_good).await?.tenants.contains(tenant))
    }

    /// The list, not older than a minute.
    pub(super) async fn current(&self, lane: Lane) -> Result<Arc<List>, UpstreamError> {
        self.good(lane, |list| self.is_young(list)).await
    }

    fn is_young(&self, list: &List) -> bool {
        self.clock.moment().since(list.read_at) < Self::LIST_EVERY
    }

    /// Whether the last read of the list failed, a short while ago.
    fn failed_lately(&self) -> bool {
        let last = self.reading.try_lock().ok();
        last.is_some_and(|last| {
            last.as_ref().is_some_and(|last| self.clock.running().saturating_sub(last.at) < Self::ABSENT_FOR)
        })
    }

    fn is_new(&self, list: &List) -> bool {
        self.clock.moment().since(list.read_at) < Self::ABSENT_FOR
    }

    /// The list as it is now.
    pub(super) async fn anew(&self, lane: Lane) -> Result<Arc<List>, UpstreamError> {
        let now = self.clock.moment();
        self.good(lane, |list| list.read_at.moment.is_after(now)).await
    }

    /// The held list if `is_good` accepts it, else a newly read one.
    async fn good(&self, lane: Lane, is_good: impl Fn(&List) -> bool) -> Result<Arc<List>, UpstreamError> {
        let held = || self.held().filter(|list| is_good(list));
        if let Some(list) = held() {
            return Ok(list);
        }
        let Some(upstream) = &self.upstream else {
            return Ok(Arc::new(List { tenants: HashSet::new(), read_at: self.clock.confirmed_now(), number: 0 }));
        };
        let mut failure = self.reading.lock().await;
        // Another caller may have read it during the wait.
        if let Some(list) = held() {
            return Ok(list);
        }
        if let Some(last) = failure.as_ref()
            && self.clock.running() - last.at < Self::RETRY_AFTER
        {
            return Err(last.error.clone());
        }
        let read_at = self.clock.confirmed_now();
        let number = {
            let mut told = self.told();
            told.reads += 1;
            told.reads
        };
        match upstream.tenants(lane).await {
            Ok(folders) => {
                *failure = None;
                let mut held = self.list.write().unwrap_or_else(PoisonError::into_inner);
                let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
                made.retain(|_, at| *at >= read_at.moment.running());
                let tenants = folders.tenants.into_iter().chain(made.keys().cloned()).collect();
                self.told().tenants.retain(|_, before| *before >= number);
                let list = Arc::new(List { tenants, read_at, number });
                *held = Some(Arc::clone(&list));
                Ok(list)
            }
            Err(error) => {
                // A refresh that found no budget does not stop callers who may use more.
                if lane == Lane::Interactive {
                    *failure = Some(Failure { error: error.clone(), at: self.clock.running() });
                }
                Err(error)
            }
        }
    }

    /// The list, whatever its age.
    pub(super) fn held(&self) -> Option<Arc<List>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// When the last list was read, where it lacks the tenant.
    pub(super) fn lacked_at(&self, tenant: &Tenant) -> Option<Timestamp> {
        let list = self.held().filter(|list| !list.tenants.contains(tenant))?;
        // The reports of others are checked last: the list has most tenants that are asked for.
        self.told_of(tenant).is_none_or(|before| list.number > before).then_some(list.read_at.stamp)
    }

    /// Notes that another instance has changed something of a tenant, and may have made the tenant.
    pub(super) fn soft_invalidate(&self, tenant: &Tenant) {
        let mut told = self.told();
        let before = told.reads;
        told.tenants.insert(tenant.clone(), before);
    }

    /// Notes the same for every tenant.
    pub(super) fn doubt_all(&self) {
        let mut told = self.told();
        told.anything = Some(told.reads);
    }

    /// The number of the last list read that may lack a tenant whose folder others have made.
    fn told_of(&self, tenant: &Tenant) -> Option<u64> {
        let told = self.told();
        told.tenants.get(tenant).copied().max(told.anything)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a tenant whose folder this instance has just deleted.
    pub(super) fn remove(&self, tenant: &Tenant) {
        let mut held = self.list.write().unwrap_or_else(PoisonError::into_inner);
        self.made.lock().unwrap_or_else(PoisonError::into_inner).remove(tenant);
        if let Some(list) = held.as_ref().filter(|list| list.tenants.contains(tenant)) {
            let mut tenants = list.tenants.clone();
            tenants.remove(tenant);
            *held = Some(Arc::new(List { tenants, read_at: list.read_at, number: list.number }));
        }
    }

    /// Notes a tenant whose folder exists, because this instance has just written to it.
    pub(super) fn add(&self, tenant: &Tenant) {
        if self.held().is_some_and(|list| list.tenants.contains(tenant)) {
            return;
        }
        let mut held = self.list.write().unwrap_or_else(PoisonError::into_inner);
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(tenant.clone(), self.clock.running());
        if let Some(list) = held.as_ref().filter(|list| !list.tenants.contains(tenant)) {
            let mut tenants = list.tenants.clone();
            tenants.insert(tenant.clone());
            *held = Some(Arc::new(List { tenants, read_at: list.read_at, number: list.number }));
        }
    }
}
