//! Which tenants exist upstream: the folder list, read at most once a minute, so that
//! made-up tenants cost no call.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use crate::{
    clock::{Clock, Timestamp},
    tenant::Tenant,
    tiers::upstream::{Lane, Upstream, UpstreamError},
};

/// A listed tenant is believed to exist whatever the list's age: reading its folder
/// tells soon enough if it is gone. An unlisted one is believed absent for
/// [`Roster::LIST_EVERY`]; then the list is read again.
///
/// One asynchronous lock is held across the read, so that all who find the list too old
/// wait for one read of it and then look again; those whom the list satisfies take no
/// part in that.
pub(super) struct Roster {
    upstream: Option<Arc<dyn Upstream>>,
    clock: Clock,
    list: RwLock<Option<Arc<List>>>,
    /// Tenants whose folders were made here, and when: a list that was read before does
    /// not have them. Changed under `list`'s lock; emptied by the next list read after.
    made: Mutex<HashMap<Tenant, Timestamp>>,
    reading: tokio::sync::Mutex<Option<Failure>>,
}

pub(super) struct List {
    pub(super) tenants: HashSet<Tenant>,
    pub(super) read_at: Timestamp,
}

/// What the list says of a tenant.
pub(super) enum Found {
    /// It has a folder, or had one when the list was read.
    Listed,
    /// It had none at this time.
    Unlisted(Timestamp),
}

struct Failure {
    error: UpstreamError,
    at: Timestamp,
}

impl Roster {
    /// A list younger than this is not read again.
    const LIST_EVERY: Duration = Duration::from_secs(60);
    /// A read that failed is not repeated within this time: its error is given again.
    const RETRY_AFTER: Duration = Duration::from_secs(1);

    pub(super) fn new(upstream: Option<Arc<dyn Upstream>>, clock: Clock) -> Self {
        Self {
            upstream,
            clock,
            list: RwLock::default(),
            made: Mutex::default(),
            reading: tokio::sync::Mutex::default(),
        }
    }

    /// Whether upstream has a folder for the tenant.
    pub(super) async fn find(&self, tenant: &Tenant, lane: Lane) -> Result<Found, UpstreamError> {
        if self.held().is_some_and(|list| list.tenants.contains(tenant)) {
            return Ok(Found::Listed);
        }
        let list = self.current(lane).await?;
        Ok(if list.tenants.contains(tenant) { Found::Listed } else { Found::Unlisted(list.read_at) })
    }

    /// The list, not older than a minute.
    pub(super) async fn current(&self, lane: Lane) -> Result<Arc<List>, UpstreamError> {
        self.good(lane, |list| self.clock.now().since(list.read_at) < Self::LIST_EVERY).await
    }

    /// The list as it is now.
    pub(super) async fn anew(&self, lane: Lane) -> Result<Arc<List>, UpstreamError> {
        let now = self.clock.now();
        self.good(lane, |list| list.read_at > now).await
    }

    /// The list that is held if it is good, else one that is read for it.
    async fn good(&self, lane: Lane, is_good: impl Fn(&List) -> bool) -> Result<Arc<List>, UpstreamError> {
        let held = || self.held().filter(|list| is_good(list));
        if let Some(list) = held() {
            return Ok(list);
        }
        let Some(upstream) = &self.upstream else {
            return Ok(Arc::new(List { tenants: HashSet::new(), read_at: self.clock.now() }));
        };
        let mut failure = self.reading.lock().await;
        // Someone may have read it while we waited.
        if let Some(list) = held() {
            return Ok(list);
        }
        if let Some(last) = failure.as_ref()
            && self.clock.now().since(last.at) < Self::RETRY_AFTER
        {
            return Err(last.error.clone());
        }
        let read_at = self.clock.now();
        match upstream.tenants(lane).await {
            Ok(folders) => {
                *failure = None;
                let mut held = self.list.write().unwrap_or_else(PoisonError::into_inner);
                let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
                made.retain(|_, at| *at >= read_at);
                let tenants = folders.tenants.into_iter().chain(made.keys().cloned()).collect();
                let list = Arc::new(List { tenants, read_at });
                *held = Some(Arc::clone(&list));
                Ok(list)
            }
            Err(error) => {
                // A refresh that found no budget says nothing to those who may use more.
                if lane == Lane::Interactive {
                    *failure = Some(Failure { error: error.clone(), at: self.clock.now() });
                }
                Err(error)
            }
        }
    }

    /// The list, whatever its age.
    pub(super) fn held(&self) -> Option<Arc<List>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes a tenant whose folder is there, because we have just written to it.
    pub(super) fn add(&self, tenant: &Tenant) {
        if self.held().is_some_and(|list| list.tenants.contains(tenant)) {
            return;
        }
        let mut held = self.list.write().unwrap_or_else(PoisonError::into_inner);
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(tenant.clone(), self.clock.now());
        if let Some(list) = held.as_ref().filter(|list| !list.tenants.contains(tenant)) {
            let mut tenants = list.tenants.clone();
            tenants.insert(tenant.clone());
            *held = Some(Arc::new(List { tenants, read_at: list.read_at }));
        }
    }
}
