//! Changing one secret at its owner.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use super::{Lane, ResolveError, Resolver, Want, Why};
use crate::{
    clock::Timestamp,
    phase::Phase,
    secret::{SecretKey, SecretName, SecretValue, Version, Writer},
    tenant::Tenant,
    tiers::{
        database::{Precondition, WriteError as StoreWriteError, Written as StoreWritten},
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
    /// The version that is to come back has no value that is kept.
    #[error("no value of that version is kept")]
    NoVersion,
    /// The version that is to come back is upstream's to keep.
    #[error("the upstream keeps this secret's versions")]
    KeptUpstream,
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
        writer: &Writer,
    ) -> Result<Written, WriteError> {
        let write = self.write_of(tenant, key, condition, writer);
        let value = value.clone();
        to_its_end(async move { write.put(&value).await }).await
    }

    /// Deletes a secret at its owner; `false` where there was none.
    ///
    /// # Errors
    /// Why nothing was deleted; see [`Self::put`].
    pub async fn delete(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        condition: &Condition,
        writer: &Writer,
    ) -> Result<bool, WriteError> {
        let write = self.write_of(tenant, key, condition, writer);
        to_its_end(async move { write.delete().await }).await
    }

    /// Writes the value that a secret had at an older version to its owner: a new version.
    ///
    /// # Errors
    /// Why nothing was written; see [`Self::put`].
    pub async fn rollback(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        number: Version,
        condition: &Condition,
        writer: &Writer,
    ) -> Result<Written, WriteError> {
        let write = self.write_of(tenant, key, condition, writer);
        to_its_end(async move { write.rollback(number).await }).await
    }

    fn write_of(&self, tenant: &Tenant, key: &SecretKey, condition: &Condition, writer: &Writer) -> Write {
        Write {
            resolver: self.clone(),
            tenant: tenant.clone(),
            key: key.clone(),
            condition: condition.clone(),
            writer: writer.clone(),
        }
    }
}

/// One write, with all that is to be known of it.
struct Write {
    resolver: Resolver,
    tenant: Tenant,
    key: SecretKey,
    condition: Condition,
    writer: Writer,
}

impl Write {
    async fn put(&self, value: &SecretValue) -> Result<Written, WriteError> {
        let Self { resolver, tenant, key, condition, writer } = self;
        let turn = resolver.turn(tenant).await;
        let (owner, is_known) = resolver.owner(tenant, key).await?;
        match owner {
            Phase::Database => {
                let outcome = resolver.database.put(tenant, key, value, condition, writer).await;
                Ok(resolver.settle(owner, tenant, key, outcome)?.into())
            }
            phase @ (Phase::Hybrid | Phase::Infisical) => self.put_upstream(phase, is_known, value, turn).await,
        }
    }

    async fn rollback(&self, number: Version) -> Result<Written, WriteError> {
        let Self { resolver, tenant, key, condition, writer } = self;
        let turn = resolver.turn(tenant).await;
        let (owner, is_known) = resolver.owner(tenant, key).await?;
        match owner {
            Phase::Database => {
                let outcome = resolver.database.rollback(tenant, key, number, condition, writer).await;
                Ok(resolver.settle(owner, tenant, key, outcome)?.into())
            }
            Phase::Hybrid => {
                let name = SecretName::of(tenant, key);
                let older = resolver.resolve_version(name, number, Want::Cached).await?;
                let value = &older.answer().ok_or(WriteError::NoVersion)?.value;
                self.put_upstream(owner, is_known, value, turn).await
            }
            Phase::Infisical => Err(WriteError::KeptUpstream),
        }
    }

    async fn put_upstream(
        &self,
        phase: Phase,
        is_known: bool,
        value: &SecretValue,
        turn: tokio::sync::MutexGuard<'_, ()>,
    ) -> Result<Written, WriteError> {
        let Self { resolver, tenant, key, condition, writer } = self;
        let upstream = resolver.upstream_for_write(tenant, key, condition).await?;
        if is_known {
            resolver.refuse_fills(phase, tenant).await?;
        }
        let created = resolver.settle(phase, tenant, key, upstream.put(tenant, key, value).await)?;
        resolver.roster.add(tenant);
        resolver.forget(phase, tenant, key, writer).await?;
        drop(turn);
        Ok(resolver.written(tenant, key, value, created).await)
    }

    async fn delete(&self) -> Result<bool, WriteError> {
        let Self { resolver, tenant, key, condition, writer } = self;
        let _turn = resolver.turn(tenant).await;
        let (owner, is_known) = resolver.owner(tenant, key).await?;
        match owner {
            Phase::Database => {
                let outcome = resolver.database.delete(tenant, key, condition, writer).await;
                resolver.settle(owner, tenant, key, outcome)
            }
            phase @ (Phase::Hybrid | Phase::Infisical) => {
                let upstream = resolver.upstream_for_write(tenant, key, condition).await?;
                if is_known {
                    resolver.refuse_fills(phase, tenant).await?;
                }
                let deleted = resolver.settle(phase, tenant, key, upstream.delete(tenant, key).await)?;
                // A made-up tenant leaves no row.
                if deleted || is_known {
                    resolver.forget(phase, tenant, key, writer).await?;
                }
                // The copies go with the next snapshot, and so does what others do upstream
                // under this key: it should not be long in coming.
                if deleted && phase == Phase::Hybrid {
                    resolver.refresh_behind(tenant);
                }
                Ok(deleted)
            }
        }
    }
}

impl Resolver {
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

    /// After the write: takes the copy out of the database's service, and once more out of
    /// memory, where a reader may have brought it back from the database meanwhile.
    async fn forget(&self, phase: Phase, tenant: &Tenant, key: &SecretKey, writer: &Writer) -> Result<(), WriteError> {
        if phase == Phase::Hybrid {
            let forgotten = self.database.invalidate(tenant, Some((key, writer))).await;
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

    /// Reads back what upstream made of a write: its version, and the copies for those who
    /// ask next. Where somebody has written after us, that is not ours to give: whoever
    /// named its validator in a condition would write over a value never seen.
    async fn written(&self, tenant: &Tenant, key: &SecretKey, value: &SecretValue, created: bool) -> Written {
        let fresh = self.snapshot(tenant, Lane::Interactive, Why::Miss).await;
        let answer = fresh.ok().and_then(|fresh| fresh.entries.get(key)?.answer.clone());
        let answer = answer.filter(|answer| answer.value.same_as(value));
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
            Self::Unstorable(_) | Self::AwaitsApproval | Self::NoVersion | Self::KeptUpstream => true,
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
            Self::Failed(error) => {
                matches!(error, ResolveError::Denied | ResolveError::NoUpstream | ResolveError::Unreadable)
            }
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

impl From<StoreWritten> for Written {
    fn from(written: StoreWritten) -> Self {
        let StoreWritten { created, version, etag, updated_at } = written;
        Self { created, version: Some(version), etag: Some(etag), updated_at }
    }
}

impl From<StoreWriteError> for WriteError {
    fn from(error: StoreWriteError) -> Self {
        match error {
            StoreWriteError::Conflict => Self::Conflict,
            StoreWriteError::NoVersion => Self::NoVersion,
            StoreWriteError::Unreadable(_) => Self::Failed(ResolveError::Unreadable),
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
