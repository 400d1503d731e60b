//! Loads the tenants that were asked for last into memory when an instance starts, before
//! the first request.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{PolicySnapshot, Resolver, STALE_LIFETIME, Standing};
use crate::{
    long_work::Pace,
    phase::Phase,
    secret::SecretKey,
    tenant::Tenant,
    tiers::{
        database::{Held, Source, StoreError},
        memory::{Entry, Recall},
    },
};

/// Tenants that were asked for since the database was last told of them.
#[derive(Debug, Default)]
pub(super) struct Uses(Mutex<BTreeSet<Tenant>>);

impl Uses {
    /// The most tenants that are noted: the record need not be exact.
    const MOST: usize = 1000;

    /// Notes a tenant that exists: one that does not is not worth a row.
    pub(super) fn note(&self, tenant: &Tenant) {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if used.len() < Self::MOST && !used.contains(tenant) {
            used.insert(tenant.clone());
        }
    }

    fn take(&self) -> Vec<Tenant> {
        let used = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        used.into_iter().collect()
    }
}

/// The longest random wait before the warm start, so that instances that start together do not
/// read the same at the same moment.
const JITTER: Duration = Duration::from_secs(2);

impl Resolver {
    /// Tells the database which tenants were asked for. After an error they are not told again.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn tell_uses(&self) -> Result<(), StoreError> {
        self.database.note_uses(&self.uses.take()).await
    }

    /// Reads the secrets of the `tenants` tenants that were asked for last from the database into
    /// memory, one tenant after the other, until memory is three quarters full. Upstream is
    /// not asked. Lookups go on meanwhile, and their entries stay.
    pub async fn warm_up(&self, tenants: usize) {
        if tenants == 0 {
            return;
        }
        tokio::time::sleep(JITTER.mul_f64(rand::random())).await;
        let warmed = async {
            let mut warmed = 0;
            for tenant in self.database.last_used(tenants).await? {
                if self.memory.weight() > self.memory.capacity() / 4 * 3 {
                    break;
                }
                warmed += self.warm(&tenant).await?;
            }
            Ok::<_, StoreError>(warmed)
        };
        match warmed.await {
            Ok(0) => {}
            Ok(secrets) => tracing::info!(secrets, "memory knows the secrets that were asked for last"),
            Err(error) => tracing::info!(%error, "memory could not be filled ahead; lookups fill it"),
        }
    }

    /// Loads a tenant's servable secrets from the database into memory, under the fence from
    /// before they were read; returns the number of secrets.
    async fn warm(&self, tenant: &Tenant) -> Result<usize, StoreError> {
        let PolicySnapshot { fence, policies } = self.policy_snapshot(tenant);
        if !policies.uses(Phase::reads_database) && self.own_phase(tenant).is_none() {
            return Ok(0);
        }
        let (began, watermark) = (self.clock.moment(), self.watermark(tenant));
        let listing = self.database.find_all(tenant).await?;
        let Some(company) = &listing.company else { return Ok(0) };
        let own = self.note(tenant, fence, Some(company)).await;
        if watermark.standing(company) != Standing::Current {
            return Ok(0);
        }
        let (now, age) = (self.clock.confirmed_now(), self.copy_age(company));
        let mut warmed = 0;
        let is_copy = {
            let (policies, tenant) = (Arc::clone(&policies), tenant.clone());
            Arc::new(move |key: &SecretKey| policies.of(&tenant, key, own).phase == Phase::Hybrid)
        };
        let is_asked = Arc::clone(&is_copy);
        let is_asked = move |key: &SecretKey| is_asked(key);
        let rows = self.resolve_rows(tenant, listing.secrets, listing.is_snapshot, is_asked, is_copy).await;
        let mut pace = Pace::default();
        for (key, held) in rows {
            let Held::Present(stored) = held else { continue };
            if !matches!(self.memory.recall(tenant.as_str(), key.as_str()), Recall::Nothing) {
                continue;
            }
            pace.did(stored.weight()).await;
            let policy = policies.of(tenant, &key, own);
            let source = stored.source;
            let answer = stored.into_answer(tenant, &key);
            match (policy.phase, company.snapshot_at.zip(age)) {
                (Phase::Database, _) => {
                    let entry = Entry::new(Some(answer), now, now, policy.ages);
                    self.memory.fill_owned(fence, tenant, &key, Arc::new(entry));
                }
                // A value that the database wrote as owner is not a copy of upstream's.
                (Phase::Hybrid, _) if source == Source::Database => continue,
                (Phase::Hybrid, Some((snapshot_at, age))) if age < policy.ages.database_max_stale => {
                    let mut entry = Entry::new(Some(answer), self.clock.confirmed_at(snapshot_at), now, policy.ages);
                    if age >= policy.ages.refresh_after {
                        entry = entry.with_lifetime(STALE_LIFETIME, now.moment);
                    }
                    self.memory.fill_copy(fence, tenant, &key, Arc::new(entry), began);
                }
                (Phase::Hybrid | Phase::Infisical, _) => continue,
            }
            warmed += 1;
        }
        Ok(warmed)
    }
}
