//! Asks the tiers below memory for one secret, in the order that its phase requires.

use std::{sync::Arc, time::Duration};

use super::{
    ResolveError, Resolved, Resolver, STALE_LIFETIME, WAIT_WITH_STALE_COPY,
    behind::{Standing, Watermark},
    cache_status::{CacheStatus, ForwardReason},
    snapshot::{Fresh, Since},
    tenant_directory::TenantDirectory,
};
use crate::{
    clock::{Confirmed, Timestamp},
    flaws::Unusable,
    phase::Phase,
    policy::{Policies, Policy},
    secret::SecretKey,
    tenant::Tenant,
    tiers::{
        database::{Held, Lookup, Source, StoreError},
        memory::{Entry, Fence},
        upstream::Lane,
    },
};

/// One load of one secret.
pub(super) struct Load<'a> {
    pub(super) resolver: &'a Arc<Resolver>,
    pub(super) tenant: &'a Tenant,
    pub(super) key: &'a SecretKey,
    pub(super) why: ForwardReason,
    pub(super) fence: Fence,
    pub(super) policies: &'a Policies,
    pub(super) now: Confirmed,
    /// Taken before the database is asked.
    pub(super) watermark: Watermark,
}

pub(super) type Found = Result<Lookup, Arc<StoreError>>;

impl Load<'_> {
    /// Phase `database`: the row decides, and so does its absence.
    pub(super) fn ask_owner(&self, policy: Policy, found: Found) -> Result<Resolved, ResolveError> {
        let found = found?;
        let answer = match found.copy {
            Held::Present(stored) => Some(stored.into_answer(self.tenant, self.key)),
            Held::Absent | Held::Unknown | Held::Unusable(_) => None,
            Held::Unreadable(_) => return Err(ResolveError::Unreadable),
        };
        let entry = Arc::new(Entry::new(answer, self.now, self.now, policy.ages));
        let own = found.company.as_ref().and_then(|company| company.phase);
        if self.policies.is_uniform(self.tenant, own) {
            // An earlier denial does not bind a tenant whose secrets are all the database's.
            self.resolver.memory.allow(self.fence, self.tenant);
        }
        self.resolver.memory.fill_owned(self.fence, self.tenant, self.key, Arc::clone(&entry));
        Ok(Resolved { entry, cache_status: CacheStatus::database(self.why, policy.ages.ttl) })
    }

    /// Phase `hybrid`: a fresh copy, or a servable one at once, else upstream.
    pub(super) async fn ask_copy(&self, policy: Policy, found: Found) -> Result<Resolved, ResolveError> {
        let (found, failed) = match found {
            Ok(found) => (Some(found), false),
            Err(_) => (None, true),
        };
        let unusable = found.as_ref().and_then(|found| self.unusable(policy, found));
        if let Some(reason) = unusable.filter(|_| self.why != ForwardReason::Request) {
            return Err(ResolveError::Unusable(reason));
        }
        let snapshot_at = |found: &Lookup| found.company.as_ref().and_then(|company| company.snapshot_at);
        let seen = found.as_ref().map(snapshot_at);
        let copy = found.and_then(|found| self.copy(policy, found));
        let cache_status = CacheStatus::past_database(self.why, copy.is_some(), failed);

        if let (Some(copy), false) = (&copy, self.why == ForwardReason::Request) {
            match copy.state {
                CopyState::Fresh => return Ok(self.answer_copy(copy, cache_status, None)),
                CopyState::Stale => {
                    self.resolver.refresh_behind(self.tenant);
                    return Ok(self.answer_copy(copy, cache_status, Some(STALE_LIFETIME)));
                }
                CopyState::StaleNegative | CopyState::Unconfirmed => {
                    let (lane, patience) = match copy.state {
                        CopyState::Unconfirmed => (Lane::Interactive, self.resolver.patience_to_confirm()),
                        _ => (Lane::Refresh, WAIT_WITH_STALE_COPY),
                    };
                    return match tokio::time::timeout(patience, self.snapshot(lane, seen)).await {
                        Ok(Ok(fresh)) => self.answer_fresh(policy, &fresh, cache_status).await,
                        Ok(Err(denied @ ResolveError::Denied { .. })) => Err(denied),
                        Ok(Err(_)) | Err(_) => Ok(self.answer_copy(copy, cache_status, Some(STALE_LIFETIME))),
                    };
                }
            }
        }
        // Where the copy is not believed, a young snapshot in memory can prove an absence.
        if copy.is_none()
            && let Some(known) = self.known_absent(policy)
        {
            return known;
        }
        let denied = self.resolver.is_denied(self.tenant.as_str());
        match self.snapshot(Lane::Interactive, seen).await {
            Ok(fresh) => self.answer_fresh(policy, &fresh, cache_status).await,
            Err(error @ ResolveError::Denied { .. }) => Err(error),
            // An outage does not bring back a copy that a denial took out of service.
            Err(_) if denied => Err(self.resolver.denial(self.tenant.as_str())),
            Err(error) => match &copy {
                Some(copy) => Ok(self.answer_copy(copy, cache_status.but_failed(&error), Some(STALE_LIFETIME))),
                None => Err(error),
            },
        }
    }

    /// Phase `infisical`: upstream, or an absence that is known already.
    pub(super) async fn ask_upstream(
        &self,
        policy: Policy,
        cache_status: CacheStatus,
    ) -> Result<Resolved, ResolveError> {
        if let Some(known) = self.known_absent(policy) {
            return known;
        }
        let fresh = self.snapshot(Lane::Interactive, None).await?;
        self.answer_fresh(policy, &fresh, cache_status).await
    }

    /// The absence of a key, proved by a young snapshot in memory that lacks it.
    fn known_absent(&self, policy: Policy) -> Option<Result<Resolved, ResolveError>> {
        if self.why != ForwardReason::Request
            && !self.resolver.is_denied(self.tenant.as_str())
            && let Some(names) = self.resolver.memory.names(self.tenant)
            && !names.keys.contains(self.key)
            && self.now.moment.since(names.confirmed_at) < policy.ages.negative_ttl
        {
            if let Some(reason) = names.flaws.unusable.get(self.key) {
                return Some(Err(ResolveError::Unusable(*reason)));
            }
            let entry = Arc::new(Entry::new(None, names.confirmed_at, names.confirmed_at, policy.ages));
            self.keep(&entry);
            return Some(Ok(Resolved::remembered(entry)));
        }
        None
    }

    /// Why the secret cannot be used, where a recent snapshot said so.
    fn unusable(&self, policy: Policy, found: &Lookup) -> Option<Unusable> {
        let Held::Unusable(reason) = found.copy else { return None };
        let company = found.company.as_ref()?;
        let age = self.resolver.copy_age(company)?;
        let is_current = self.watermark.standing(company) == Standing::Current;
        (is_current && age < policy.ages.negative_ttl).then_some(reason)
    }

    /// The database's copy, if it may be served.
    fn copy(&self, policy: Policy, found: Lookup) -> Option<Copy> {
        let company = found.company?;
        let age = self.resolver.copy_age(&company)?;
        let snapshot_at = self.resolver.clock.confirmed_at(company.snapshot_at?);
        let standing = self.watermark.standing(&company);
        if age >= policy.ages.database_max_stale || standing == Standing::Behind {
            // Checked even where the copy is not due for a refresh yet.
            return None;
        }
        let (answer, mut state) = match found.copy {
            // A value that the database wrote as owner is not a copy of upstream's.
            Held::Present(stored) if stored.source == Source::Database => return None,
            // A later read of the folder lacked it, and has not been written back yet.
            Held::Present(_) if self.is_gone_since(snapshot_at) => return None,
            Held::Present(stored) if age < policy.ages.refresh_after => {
                (Some(stored.into_answer(self.tenant, self.key)), CopyState::Fresh)
            }
            Held::Present(stored) => (Some(stored.into_answer(self.tenant, self.key)), CopyState::Stale),
            // Keys that were left out of the snapshot are not known to be absent.
            Held::Absent if !company.snapshot_whole => return None,
            Held::Absent if age < policy.ages.negative_ttl => (None, CopyState::Fresh),
            Held::Absent if age < policy.ages.refresh_after => (None, CopyState::StaleNegative),
            Held::Absent | Held::Unknown | Held::Unreadable(_) | Held::Unusable(_) => return None,
        };
        if standing == Standing::Unconfirmed {
            state = CopyState::Unconfirmed;
        }
        let left = policy.ages.refresh_after.as_secs().cast_signed() - age.as_secs().cast_signed();
        Some(Copy { entry: Entry::new(answer, snapshot_at, self.now, policy.ages), state, ttl: left })
    }

    /// Whether memory has a later snapshot that lacks the secret.
    fn is_gone_since(&self, snapshot_at: Confirmed) -> bool {
        let names = self.resolver.memory.names(self.tenant);
        names.is_some_and(|names| names.confirmed_at > snapshot_at && !names.keys.contains(self.key))
    }

    fn answer_copy(&self, copy: &Copy, cache_status: CacheStatus, serve_stale: Option<Duration>) -> Resolved {
        let mut entry = Entry { answer: copy.entry.answer.clone(), ..copy.entry };
        if let Some(lifetime) = serve_stale {
            entry = entry.with_lifetime(lifetime, self.now.moment);
            if copy.state == CopyState::Stale {
                self.resolver.metrics.count("secretier_stale_answers_total", &[("tier", "database")]);
            }
        }
        let entry = Arc::new(entry);
        let began = self.now.moment;
        self.resolver.memory.fill_copy(self.fence, self.tenant, self.key, Arc::clone(&entry), began);
        Resolved { entry, cache_status: cache_status.answered_by_database(copy.ttl) }
    }

    async fn answer_fresh(
        &self,
        policy: Policy,
        fresh: &Fresh,
        cache_status: CacheStatus,
    ) -> Result<Resolved, ResolveError> {
        let current = self.policies.of(self.tenant, self.key, fresh.own);
        if current.phase == Phase::Database {
            // It moved to another owner while upstream was read: the read proves nothing.
            let found = Box::pin(self.resolver.database.find(self.tenant, self.key)).await;
            return self.ask_owner(current, found.map_err(Arc::new));
        }
        let entry = match (fresh.entries.get(self.key), fresh.flaws.unusable.get(self.key)) {
            (Some(entry), _) => Arc::clone(entry),
            (None, Some(reason)) => return Err(ResolveError::Unusable(*reason)),
            (None, None) => {
                let mut absent = Entry::new(None, fresh.confirmed_at, self.now, policy.ages);
                if !fresh.exists {
                    // The tenant may be made at any time, and is then not absent for as long as a key is.
                    absent = absent.with_lifetime(TenantDirectory::ABSENT_FOR, self.now.moment);
                }
                let absent = Arc::new(absent);
                // It must hold since the read began, and since this load did: the read went by its
                // own policies, and may have left out keys that this load's policies give to
                // upstream, or the reverse.
                if fresh.current && fresh.fence == self.fence {
                    self.keep(&absent);
                }
                absent
            }
        };
        Ok(Resolved { entry, cache_status: fresh.cache_status(cache_status, self.now.moment, policy.ages) })
    }

    /// Reads the folder, or takes what was read since this load found the copy from `copy`.
    async fn snapshot(&self, lane: Lane, copy: Option<Option<Timestamp>>) -> Result<Arc<Fresh>, ResolveError> {
        let since = Since { began: self.now.moment, copy };
        // On the heap, so that the future of a load that the database answers is small.
        Box::pin(self.resolver.snapshot_since(self.tenant, lane, self.why, since)).await
    }

    fn keep(&self, entry: &Arc<Entry>) {
        self.resolver.memory.fill(self.fence, self.tenant, self.key, Arc::clone(entry));
    }
}

/// A copy in the database that may be served.
pub(super) struct Copy {
    entry: Entry,
    state: CopyState,
    /// Seconds until its refresh is due; negative when it is overdue.
    ttl: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CopyState {
    /// Young enough to be served as it is.
    Fresh,
    /// Served at once, refreshed behind the answer.
    Stale,
    /// An absence in a snapshot that is still fresh, but older than `negative_ttl`: upstream is
    /// asked again if that costs little.
    StaleNegative,
    /// Something may have happened since: upstream is asked before it is served.
    Unconfirmed,
}
