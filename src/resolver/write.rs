//! Changing one secret at its owner.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use super::{Lane, ResolveError, Resolver, Why};
use crate::{
    clock::Timestamp,
    phase::Phase,
    secret::{SecretKey, SecretValue, Version},
    tenant::Tenant,
    tiers::{
        database::{Precondition, WriteError as StoreWriteError},
        upstream::{Upstream, UpstreamError},
    },
};

/// What must hold for a write to be done: `If-Match`, `If-None-Match: *`.
pub type Condition = Precondition;

/// A write that was done.
#[derive(Debug, Clone)]
pub struct Written {
    /// Whether there was no such secret before.
    pub created: bool,
    /// The new version, where the owner could tell it.
    pub version: Option<Version>,
    /// The new validator, without quotes, where there is one.
    pub etag: Option<String>,
    /// When it was written.
    pub updated_at: Timestamp,
}

/// Why a write was not done.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The condition does not hold.
    #[error("the secret is not the version that the condition names")]
    Conflict,
    /// The owner cannot hold such a name or value.
    #[error("{0}")]
    Unstorable(&'static str),
    /// The owner holds it back for someone to approve.
    #[error("the upstream holds this change back for approval")]
    AwaitsApproval,
    /// A tier that must take part failed.
    #[error(transparent)]
    Failed(#[from] ResolveError),
}

impl Resolver {
    /// Writes a secret to its owner. When this returns, no lookup here gives the old value.
    ///
    /// # Errors
    /// Why nothing was written; after an outage of the owner in the middle of the write
    /// it may have been, and doing it again is safe.
    pub async fn put(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        value: &SecretValue,
        condition: &Condition,
    ) -> Result<Written, WriteError> {
        let (resolver, tenant, key) = (self.clone(), tenant.clone(), key.clone());
        let (value, condition) = (value.clone(), condition.clone());
        to_its_end(async move { resolver.put_now(&tenant, &key, &value, &condition).await }).await
    }

    /// Deletes a secret at its owner; `false` where there was none.
    ///
    /// # Errors
    /// Why nothing was deleted; see [`Self::put`].
    pub async fn delete(&self, tenant: &Tenant, key: &SecretKey, condition: &Condition) -> Result<bool, WriteError> {
        let (resolver, tenant, key, condition) = (self.clone(), tenant.clone(), key.clone(), condition.clone());
        to_its_end(async move { resolver.delete_now(&tenant, &key, &condition).await }).await
    }

    async fn put_now(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        value: &SecretValue,
        condition: &Condition,
    ) -> Result<Written, WriteError> {
        let turn = self.turn(tenant).await;
        let (owner, is_known) = self.owner(tenant, key).await?;
        match owner {
            Phase::Database => {
                let written =
                    self.settle(owner, tenant, key, self.database.put(tenant, key, value, condition).await)?;
                Ok(Written {
                    created: written.created,
                    version: Some(written.version),
                    etag: Some(written.etag),
                    updated_at: written.updated_at,
                })
            }
            phase @ (Phase::Hybrid | Phase::Infisical) => {
                let upstream = self.upstream_for_write(tenant, key, condition).await?;
                if is_known {
                    self.refuse_fills(phase, tenant).await?;
                }
                let created = self.settle(phase, tenant, key, upstream.put(tenant, key, value).await)?;
                self.roster.add(tenant);
                self.forget(phase, tenant, key).await?;
                drop(turn);
                Ok(self.written(tenant, key, created).await)
            }
        }
    }

    async fn delete_now(&self, tenant: &Tenant, key: &SecretKey, condition: &Condition) -> Result<bool, WriteError> {
        let _turn = self.turn(tenant).await;
        let (owner, is_known) = self.owner(tenant, key).await?;
        match owner {
            Phase::Database => self.settle(owner, tenant, key, self.database.delete(tenant, key, condition).await),
            phase @ (Phase::Hybrid | Phase::Infisical) => {
                let upstream = self.upstream_for_write(tenant, key, condition).await?;
                if is_known {
                    self.refuse_fills(phase, tenant).await?;
                }
                let deleted = self.settle(phase, tenant, key, upstream.delete(tenant, key).await)?;
                // A made-up tenant leaves no row.
                if deleted || is_known {
                    self.forget(phase, tenant, key).await?;
                }
                Ok(deleted)
            }
        }
    }

    /// Writes to one tenant go one by one here, so that a condition that is checked
    /// against upstream, which knows none itself, still holds when the write is sent.
    async fn turn(&self, tenant: &Tenant) -> tokio::sync::MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        tenant.hash(&mut hasher);
        let stripe = usize::try_from(hasher.finish() % self.writes.len() as u64).unwrap_or(0);
        self.writes[stripe].lock().await
    }

    /// Who owns the secret. The tenant's own phase decides, so the database must tell it:
    /// a write to the wrong owner would be lost. And whether the database knows the tenant.
    async fn owner(&self, tenant: &Tenant, key: &SecretKey) -> Result<(Phase, bool), WriteError> {
        let company = self.database.company(tenant).await.map_err(|error| ResolveError::Database(Arc::new(error)))?;
        let own = company.as_ref().and_then(|company| company.phase);
        Ok((self.policies.of(tenant, key, own).phase, company.is_some()))
    }

    /// Upstream, if the condition holds there.
    async fn upstream_for_write(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        condition: &Condition,
    ) -> Result<&dyn Upstream, WriteError> {
        if !matches!(condition, Condition::None) {
            let fresh = self.snapshot(tenant, Lane::Interactive, Why::Request).await?;
            let answer = fresh.entries.get(key).and_then(|entry| entry.answer.as_ref());
            if !condition.holds(answer.map(|answer| answer.etag.to_str().unwrap_or("").trim_matches('"'))) {
                return Err(WriteError::Conflict);
            }
        }
        self.upstream.as_deref().ok_or(WriteError::Failed(ResolveError::NoUpstream))
    }

    /// Before the write: snapshots that are being read will not be stored. Without the
    /// database the write is not begun: its copy would stay. The copy itself stays until
    /// the write is done, because one that upstream refuses, or that meets an outage, must
    /// not take away what the outage needs.
    async fn refuse_fills(&self, phase: Phase, tenant: &Tenant) -> Result<(), WriteError> {
        if phase == Phase::Hybrid {
            let refused = self.database.invalidate(tenant, None).await;
            refused.map_err(|error| ResolveError::Database(Arc::new(error)))?;
        }
        Ok(())
    }

    /// After the write: takes the copy out of the database, and once more out of memory,
    /// where a reader may have brought it back from the database meanwhile.
    async fn forget(&self, phase: Phase, tenant: &Tenant, key: &SecretKey) -> Result<(), WriteError> {
        if phase == Phase::Hybrid {
            let forgotten = self.database.invalidate(tenant, Some(key)).await;
            self.changed(tenant, key);
            forgotten.map_err(|error| ResolveError::Database(Arc::new(error)))?;
        }
        Ok(())
    }

    /// Brings memory in line with how a write ended. One that was surely not done changes
    /// nothing. One that may have been leaves what is held servable, but to be asked for anew.
    fn settle<T, E: Into<WriteError>>(
        &self,
        phase: Phase,
        tenant: &Tenant,
        key: &SecretKey,
        outcome: Result<T, E>,
    ) -> Result<T, WriteError> {
        let outcome = outcome.map_err(Into::into);
        match &outcome {
            Ok(_) => self.changed(tenant, key),
            Err(error) if error.is_definite() => {}
            Err(_) => {
                self.memory.doubt(tenant, key);
                self.snapshots.forget(tenant);
                self.loads.forget(&(tenant.clone(), key.clone()));
                if phase.owned_upstream() {
                    self.refresh_behind(tenant);
                }
            }
        }
        outcome
    }

    /// Makes memory and flights forget what they knew, before the write is acknowledged.
    fn changed(&self, tenant: &Tenant, key: &SecretKey) {
        self.memory.change(tenant, key);
        self.snapshots.forget(tenant);
        self.loads.forget(&(tenant.clone(), key.clone()));
    }

    /// Reads back what upstream made of a write: its version, and the copies for those who ask next.
    async fn written(&self, tenant: &Tenant, key: &SecretKey, created: bool) -> Written {
        let fresh = self.snapshot(tenant, Lane::Interactive, Why::Miss).await;
        let answer = fresh.ok().and_then(|fresh| fresh.entries.get(key)?.answer.clone());
        Written {
            created,
            version: answer.as_ref().map(|answer| answer.version),
            updated_at: answer.as_ref().map_or_else(|| self.clock.now(), |answer| answer.updated_at),
            etag: answer.and_then(|answer| Some(answer.etag.to_str().ok()?.trim_matches('"').to_owned())),
        }
    }
}

impl WriteError {
    /// Whether the owner has surely not done the write, and memory may be right.
    fn is_definite(&self) -> bool {
        match self {
            Self::Unstorable(_) | Self::AwaitsApproval => true,
            // Somebody else has changed it: memory is behind.
            Self::Conflict => false,
            Self::Failed(ResolveError::Upstream(error)) => match error {
                UpstreamError::Denied
                | UpstreamError::LoginRefused { .. }
                | UpstreamError::OutOfBudget { .. }
                | UpstreamError::RateLimited { .. }
                | UpstreamError::Down { .. }
                | UpstreamError::Rejected { .. }
                | UpstreamError::Unstorable(_)
                | UpstreamError::AwaitsApproval => true,
                UpstreamError::TimedOut
                | UpstreamError::Unreachable(_)
                | UpstreamError::Failed(_)
                | UpstreamError::Malformed(_) => false,
            },
            Self::Failed(error) => matches!(error, ResolveError::Denied | ResolveError::NoUpstream),
        }
    }
}

/// Does the work in a task of its own: a caller who leaves in the middle of a write must
/// not leave the old value behind in the tiers.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, WriteError>> + Send + 'static,
) -> Result<T, WriteError> {
    tokio::spawn(work).await.unwrap_or(Err(WriteError::Failed(ResolveError::Lost)))
}

impl From<StoreWriteError> for WriteError {
    fn from(error: StoreWriteError) -> Self {
        match error {
            StoreWriteError::Conflict => Self::Conflict,
            StoreWriteError::Store(error) => Self::Failed(ResolveError::Database(Arc::new(error))),
        }
    }
}

impl From<UpstreamError> for WriteError {
    fn from(error: UpstreamError) -> Self {
        match error {
            UpstreamError::Unstorable(reason) => Self::Unstorable(reason),
            UpstreamError::AwaitsApproval => Self::AwaitsApproval,
            UpstreamError::Denied => Self::Failed(ResolveError::Denied),
            error => Self::Failed(ResolveError::Upstream(error)),
        }
    }
}
