//! Changing one secret at its owner.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use super::{
    CHOICES, ForwardReason, Fresh, Lane, ResolveError, Resolver, Tier, Want, behind::Unended, changes::Changing,
};
use crate::{
    answer::Answer,
    clock::Timestamp,
    phase::Phase,
    policy::Policies,
    references,
    secret::{SecretKey, SecretName, SecretValue, Version, Writer},
    tenant::Tenant,
    tiers::{
        database::{
            Held, Older, Precondition, StoreError, Told, UpstreamWrite, WriteError as StoreWriteError,
            Written as StoreWritten,
        },
        upstream::{Unstorable, Upstream, UpstreamError},
    },
};

/// The condition under which a write is done: `If-Match`, `If-None-Match: *`.
pub type Condition = Precondition;

/// How to treat a write to a tenant that neither upstream nor the database knows: the name
/// may be mistyped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewTenant {
    /// The write is refused.
    Refused,
    /// The write makes the tenant.
    Created,
}

/// A write that was done.
#[derive(Debug, Clone)]
pub struct Written {
    /// Whether there was no such secret before.
    pub created: bool,
    /// The new version, where the owner returned it.
    pub version: Option<Version>,
    /// The new validator, without quotes, where there is one.
    pub etag: Option<String>,
    /// When it was written.
    pub updated_at: Timestamp,
    /// The owner, which did it.
    pub tier: Tier,
}

/// Why a write was not done.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Neither upstream nor the database knows the tenant.
    #[error("neither the upstream nor the database knows the tenant")]
    UnknownTenant,
    /// The condition does not hold.
    #[error("the secret is not the version that the condition names")]
    Conflict,
    /// No value is kept of the version to roll back to.
    #[error("no value of that version is kept")]
    NoVersion,
    /// A rotation has revoked the version to roll back to.
    #[error("a rotation has revoked that version")]
    Revoked,
    /// Upstream keeps the versions of this secret.
    #[error("the upstream keeps this secret's versions")]
    KeptUpstream,
    /// The value refers to a secret that is outside the writer's scope.
    #[error("the value refers to a secret that the writer does not reach")]
    Reference,
    /// The owner cannot hold such a name or value.
    #[error(transparent)]
    Unstorable(#[from] Unstorable),
    /// The owner holds the change back until it is approved.
    #[error("the upstream holds this change back for approval")]
    AwaitsApproval,
    /// Upstream does not let our identity change what is in the tenant's folder.
    #[error("the upstream does not let our identity change this tenant's folder")]
    Denied,
    /// A tier that must take part failed.
    #[error(transparent)]
    Failed(#[from] ResolveError),
}

impl Resolver {
    /// Writes a secret to its owner. When this returns, no lookup here gives the old value.
    ///
    /// # Errors
    /// Nothing was written. But if the owner failed in the middle of the write, it may have been
    /// done, and doing it again is safe.
    pub async fn put(
        self: &Arc<Self>,
        tenant: &Tenant,
        key: &SecretKey,
        value: &SecretValue,
        condition: &Condition,
        writer: &Writer,
        new_tenant: NewTenant,
    ) -> Result<Written, WriteError> {
        self.may_write(tenant, key)?;
        let write = Write { new_tenant, ..self.write_of(tenant, key, condition, writer) };
        let value = value.clone();
        to_its_end(self.changing(), async move { write.put(&value).await }).await
    }

    /// Deletes a secret at its owner; returns that tier, or `None` where there was no such secret.
    ///
    /// # Errors
    /// Nothing was deleted; see [`Self::put`].
    pub async fn delete(
        self: &Arc<Self>,
        tenant: &Tenant,
        key: &SecretKey,
        condition: &Condition,
        writer: &Writer,
    ) -> Result<Option<Tier>, WriteError> {
        // One that the database owns may go: it was stored before the configuration named it.
        match self.policies().of(tenant, key, self.own_phase(tenant)).phase.owned_upstream() {
            true => self.may_write(tenant, key)?,
            false => self.not_alone()?,
        }
        let write = self.write_of(tenant, key, condition, writer);
        to_its_end(self.changing(), async move { write.delete().await }).await
    }

    /// Writes the value that a secret had at an older version to its owner: a new version.
    ///
    /// # Errors
    /// Nothing was written; see [`Self::put`].
    pub async fn rollback(
        self: &Arc<Self>,
        tenant: &Tenant,
        key: &SecretKey,
        older: Older,
        condition: &Condition,
        writer: &Writer,
    ) -> Result<Written, WriteError> {
        self.may_write(tenant, key)?;
        let write = self.write_of(tenant, key, condition, writer);
        to_its_end(self.changing(), async move { write.rollback(older).await }).await
    }

    fn may_write(&self, tenant: &Tenant, key: &SecretKey) -> Result<(), ResolveError> {
        self.may_serve(SecretName::of(tenant, key))?;
        self.not_alone()
    }

    fn write_of(self: &Arc<Self>, tenant: &Tenant, key: &SecretKey, condition: &Condition, writer: &Writer) -> Write {
        Write {
            resolver: Arc::clone(self),
            tenant: tenant.clone(),
            key: key.clone(),
            condition: condition.clone(),
            writer: writer.clone(),
            new_tenant: NewTenant::Created,
        }
    }
}

/// One write, with everything that it needs.
struct Write {
    resolver: Arc<Resolver>,
    tenant: Tenant,
    key: SecretKey,
    condition: Condition,
    writer: Writer,
    /// Whether the write may make the tenant: only a write of a new value can.
    new_tenant: NewTenant,
}

/// The owner of a secret.
struct Owner {
    phase: Phase,
    /// The tenant's own phase, by which the owner was decided.
    own: Option<Phase>,
    /// Whether the database knows the tenant.
    is_known: bool,
    /// The policies that decided the phase where the tenant has none of its own.
    policies: Arc<Policies>,
}

/// Held while upstream is written to: meanwhile no ownership transfer begins.
struct UpstreamWriteGuard<'u> {
    upstream: &'u dyn Upstream,
    registered: UpstreamWrite,
    /// Whether the database knows the tenant.
    is_known: bool,
    /// The longest that upstream may take.
    lasts: Duration,
}

impl UpstreamWriteGuard<'_> {
    /// Waits for upstream, which ends within its own timeout, but no longer than the write is
    /// registered: that timeout may have become longer since.
    async fn wait<T>(&self, told: impl Future<Output = Result<T, UpstreamError>>) -> Result<T, UpstreamError> {
        tokio::time::timeout(self.lasts, told).await.unwrap_or(Err(UpstreamError::TimedOut))
    }
}

/// How much longer a write stays registered than upstream is waited for, as clocks may differ.
const REGISTERED_LONGER: Duration = Duration::from_secs(10);

impl Write {
    async fn put(&self, value: &SecretValue) -> Result<Written, WriteError> {
        at_the_owner(|| self.try_put(value)).await
    }

    async fn delete(&self) -> Result<Option<Tier>, WriteError> {
        at_the_owner(|| self.try_delete()).await
    }

    async fn rollback(&self, older: Older) -> Result<Written, WriteError> {
        at_the_owner(|| self.try_rollback(older)).await
    }

    async fn try_put(&self, value: &SecretValue) -> Result<Option<Written>, WriteError> {
        let Self { resolver, tenant, key, condition, writer, .. } = self;
        let turn = resolver.turn(tenant).await;
        let owner = resolver.owner(tenant, key).await?;
        match owner.phase {
            Phase::Database => {
                self.admit_tenant(&owner).await?;
                let written = resolver.database.put(tenant, key, value, condition, writer, owner.own).await;
                Ok(self.unless_moved(&owner, written)?.map(Written::from))
            }
            Phase::Hybrid | Phase::Infisical => self.put_upstream(&owner, value, turn).await,
        }
    }

    async fn try_rollback(&self, older: Older) -> Result<Option<Written>, WriteError> {
        let Self { resolver, tenant, key, condition, writer, .. } = self;
        let turn = resolver.turn(tenant).await;
        let owner = resolver.owner(tenant, key).await?;
        match owner.phase {
            Phase::Database => {
                let written = resolver.database.rollback(tenant, key, older, condition, writer, owner.own).await;
                Ok(self.unless_moved(&owner, written)?.map(Written::from))
            }
            Phase::Hybrid => {
                let Older { number, even_revoked } = older;
                let is_revoked = resolver.database.is_revoked(tenant, key, number).await.map_err(database_failed)?;
                if is_revoked && !even_revoked {
                    return Err(WriteError::Revoked);
                }
                let name = SecretName::of(tenant, key);
                let older = resolver.resolve_version(name, number, Want::Cached).await?;
                if !resolver.is_in_force(&owner.policies) {
                    // The version may be from another owner.
                    return Ok(None);
                }
                older.answer().ok_or(WriteError::NoVersion)?;
                // The text itself, with its references unresolved.
                let found = resolver.database.find_version(tenant, key, number).await.map_err(database_failed)?;
                let Held::Present(stored) = found.copy else { return Err(WriteError::NoVersion) };
                let text = stored.text.transpose().map_err(|_| ResolveError::Unreadable)?.unwrap_or(stored.value);
                self.put_upstream(&owner, &text, turn).await
            }
            Phase::Infisical => Err(WriteError::KeptUpstream),
        }
    }

    async fn try_delete(&self) -> Result<Option<Option<Tier>>, WriteError> {
        let Self { resolver, tenant, key, condition, writer, .. } = self;
        let _turn = resolver.turn(tenant).await;
        let owner = resolver.owner(tenant, key).await?;
        if owner.phase == Phase::Database {
            let deleted = resolver.database.delete(tenant, key, condition, writer, owner.own).await;
            return Ok(self.unless_moved(&owner, deleted)?.map(|deleted| deleted.then_some(Tier::Database)));
        }
        let Some(guard) = self.guard(&owner, None).await? else { return Ok(None) };
        let deleted = guard.wait(guard.upstream.delete(tenant, key)).await;
        let deleted = resolver.settle(owner.phase, tenant, key, deleted);
        let UpstreamWriteGuard { registered, is_known, .. } = guard;
        // A tenant that does not exist leaves no row.
        let deleted = self.end(&owner, registered, deleted, |deleted| *deleted || is_known).await?;
        // The copies go with the next snapshot, and so do changes that others made upstream
        // under this key, so the next snapshot should come soon.
        if deleted && owner.phase == Phase::Hybrid {
            resolver.refresh_behind(tenant);
        }
        Ok(Some(deleted.then_some(Tier::Upstream)))
    }

    /// Whether a value may refer to this key of the tenant: a reader would read that one too.
    fn may_refer_to(&self, name: &str) -> bool {
        let is_withheld = self.resolver.withheld.has(self.tenant.as_str(), name);
        self.writer.reaches(name) && !is_withheld
    }

    async fn put_upstream(
        &self,
        owner: &Owner,
        value: &SecretValue,
        turn: tokio::sync::MutexGuard<'_, ()>,
    ) -> Result<Option<Written>, WriteError> {
        let Self { resolver, tenant, key, .. } = self;
        let is_text = resolver.upstream.as_ref().is_some_and(|upstream| !upstream.reads_references());
        if !is_text && !references::stay_within(value.expose(), |name| self.may_refer_to(name)) {
            return Err(WriteError::Reference);
        }
        let Some(guard) = self.guard(owner, Some(value)).await? else { return Ok(None) };
        let created = guard.wait(guard.upstream.put(tenant, key, value)).await;
        let created = resolver.settle(owner.phase, tenant, key, created);
        if created.is_ok() {
            resolver.tenant_directory.add(tenant);
        }
        let created = self.end(owner, guard.registered, created, |_| true).await?;
        drop(turn);
        Ok(Some(resolver.written(tenant, key, value, created).await))
    }

    /// The outcome of a write to the database itself; `None` where the tenant has moved.
    fn unless_moved<T>(&self, owner: &Owner, outcome: Result<T, StoreWriteError>) -> Result<Option<T>, WriteError> {
        match outcome {
            Err(StoreWriteError::Moved) => Ok(None),
            outcome => {
                let done = self.resolver.settle(Phase::Database, &self.tenant, &self.key, outcome)?;
                self.is_still_owned(owner)?;
                Ok(Some(done))
            }
        }
    }

    /// Refuses to acknowledge a write that was done by earlier policies if those in force name
    /// another owner: a reader would not find it.
    fn is_still_owned(&self, owner: &Owner) -> Result<(), WriteError> {
        let now = self.resolver.policies().of(&self.tenant, &self.key, owner.own).phase;
        if now.owned_upstream() == owner.phase.owned_upstream() { Ok(()) } else { Err(ResolveError::Moving.into()) }
    }

    /// The guard to write to upstream, if upstream can keep the value and the condition holds
    /// there; `None` where the tenant has moved. From here on the tenant stays with its owner until
    /// the write is ended, and snapshots that are being read will not be stored. Without the
    /// database the write is not begun: its copy would stay. The copy itself stays until the write
    /// is done, because a write that upstream refuses, or that meets an outage, must not remove
    /// what the outage needs.
    async fn guard(
        &self,
        owner: &Owner,
        value: Option<&SecretValue>,
    ) -> Result<Option<UpstreamWriteGuard<'_>>, WriteError> {
        let Self { resolver, tenant, key, .. } = self;
        let upstream = match self.upstream(owner, value).await {
            // If upstream is no longer the owner, its answer decides nothing.
            Err(_) if resolver.owner(tenant, key).await.is_ok_and(|now| now.own != owner.own) => return Ok(None),
            // The condition may have been compared with another owner's value.
            _ if !resolver.is_in_force(&owner.policies) => return Ok(None),
            upstream => upstream?,
        };
        let lasts = resolver.deadline();
        let begun = resolver.database.begin_upstream_write(tenant, lasts + REGISTERED_LONGER).await;
        let (company, registered) = begun.map_err(database_failed)?;
        if company.as_ref().and_then(|company| company.phase) != owner.own {
            resolver.database.end_upstream_write(&registered, Told::Nothing).await.map_err(database_failed)?;
            return Ok(None);
        }
        // Longer than upstream's own timeout, shorter than the registration.
        let lasts = lasts + REGISTERED_LONGER / 2;
        Ok(Some(UpstreamWriteGuard { upstream, registered, is_known: company.is_some(), lasts }))
    }

    /// Upstream, if it can keep the value, the tenant may be written to and the condition holds
    /// there. They are checked in this order: under a name that upstream would alter there is
    /// another secret, and nothing is asked about that one.
    async fn upstream(&self, owner: &Owner, value: Option<&SecretValue>) -> Result<&dyn Upstream, WriteError> {
        let Self { resolver, tenant, key, condition, .. } = self;
        let upstream = resolver.upstream.as_deref().ok_or(ResolveError::NoUpstream)?;
        upstream.check(key, value)?;
        self.admit_tenant(owner).await?;
        if !matches!(condition, Condition::None) {
            let fresh = resolver.read_now(tenant, ForwardReason::Request).await?;
            // An unusable secret exists all the same, and nobody knows what would be lost.
            if fresh.flaws.unusable.contains_key(key) {
                return Err(WriteError::Conflict);
            }
            let answer = fresh.entries.get(key).and_then(|entry| entry.answer.as_ref());
            if !condition.holds(answer.map(Answer::bare_etag)) && !self.was_given(condition, answer) {
                return Err(WriteError::Conflict);
            }
        }
        Ok(upstream)
    }

    /// Whether the condition names a validator that was given out for upstream's current value
    /// before the database had one for it.
    fn was_given(&self, condition: &Condition, answer: Option<&Answer>) -> bool {
        let Self { resolver, tenant, key, .. } = self;
        let (Condition::IfMatch(etags), Some(answer)) = (condition, answer) else { return false };
        etags.iter().any(|etag| resolver.provisional.is_of(tenant, key, etag, answer.expose()))
    }

    /// Admits a write to a tenant that exists, or one that may make it.
    async fn admit_tenant(&self, owner: &Owner) -> Result<(), WriteError> {
        let Self { resolver, tenant, .. } = self;
        // A shared folder that is not configured cannot be made.
        let is_served = resolver.upstream.as_ref().is_none_or(|upstream| upstream.serves(tenant));
        if owner.phase.owned_upstream() && !is_served {
            return Err(WriteError::UnknownTenant);
        }
        let is_admitted =
            self.new_tenant == NewTenant::Created || owner.is_known || resolver.has_folder(tenant, owner.phase).await?;
        if is_admitted { Ok(()) } else { Err(WriteError::UnknownTenant) }
    }

    /// After the write: takes the copy in the database out of service, and removes the one in
    /// memory again, which a reader may have brought back from the database meanwhile. Where
    /// upstream has done the write, `changed` says whether there was anything to do.
    async fn end<T>(
        &self,
        owner: &Owner,
        registered: UpstreamWrite,
        outcome: Result<T, WriteError>,
        changed: impl Fn(&T) -> bool,
    ) -> Result<T, WriteError> {
        let Self { resolver, tenant, key, writer, .. } = self;
        let told = match &outcome {
            Ok(done) if !changed(done) => Told::Nothing,
            Ok(_) if owner.phase == Phase::Hybrid => Told::Copied(key, writer),
            Ok(_) => Told::Uncopied(key),
            Err(error) if error.is_definite() => Told::Nothing,
            // It may still be done, so it stays registered until the outcome is certain.
            Err(_) => return outcome,
        };
        let done_at = resolver.clock.database_now();
        let ended = resolver.database.end_upstream_write(&registered, told).await;
        if ended.is_err() && !matches!(told, Told::Nothing) {
            // The copy in the database is from before, and the database does not know that.
            if resolver.may_be_copied(tenant) {
                resolver.behind.note_doubt(tenant, done_at);
            }
            let writer = matches!(told, Told::Copied(..)).then(|| writer.clone());
            let unended = Unended { write: registered, key: key.clone(), at: done_at, writer };
            resolver.behind.note_unended(unended);
        }
        if outcome.is_ok() && owner.phase == Phase::Hybrid {
            resolver.changed(tenant, key);
        }
        match ended {
            Ok(true) => {
                let done = outcome?;
                self.is_still_owned(owner)?;
                Ok(done)
            }
            Ok(false) => {
                // The value that upstream has now must not be taken for this write's.
                resolver.owner(tenant, key).await?;
                outcome.and(Err(ResolveError::Moving.into()))
            }
            Err(error) => outcome.and(Err(database_failed(error))),
        }
    }
}

/// Tries a write at the current owner, and again where the tenant moved to another owner in
/// between: then the try returns `None` and has done nothing.
async fn at_the_owner<T, F>(attempt: impl Fn() -> F) -> Result<T, WriteError>
where
    F: Future<Output = Result<Option<T>, WriteError>>,
{
    for _ in 0..CHOICES {
        if let Some(done) = attempt().await? {
            return Ok(done);
        }
    }
    Err(ResolveError::Moving.into())
}

impl Resolver {
    /// Writes to one tenant are done one by one here, so that a condition that is checked against
    /// upstream, which supports none itself, still holds when the write is sent.
    pub(super) async fn turn(&self, tenant: &Tenant) -> tokio::sync::MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        tenant.hash(&mut hasher);
        let stripe = usize::try_from(hasher.finish() % self.writes.len() as u64).unwrap_or(0);
        self.writes[stripe].lock().await
    }

    /// The owner of the secret. The tenant's own phase decides, so it must come from the database:
    /// a write to the wrong owner would be lost. The phase is in force here when this returns: a
    /// reader after the write must not ask the former owner.
    async fn owner(&self, tenant: &Tenant, key: &SecretKey) -> Result<Owner, WriteError> {
        let company = self.database.company(tenant).await.map_err(database_failed)?;
        let own = company.as_ref().and_then(|company| company.phase);
        self.keep_up(tenant, own).await.map_err(database_failed)?;
        let policies = self.policies();
        Ok(Owner { phase: policies.of(tenant, key, own).phase, own, is_known: company.is_some(), policies })
    }

    /// Whether upstream has a folder for a tenant that may have been made a moment ago.
    async fn has_folder(self: &Arc<Self>, tenant: &Tenant, phase: Phase) -> Result<bool, WriteError> {
        if self.upstream.is_none() {
            return Ok(false);
        }
        match self.tenant_directory.find_newly_made(tenant).await {
            // Where upstream refuses the list itself, the folder's own content must be the proof.
            Err(UpstreamError::Denied | UpstreamError::Rejected { .. }) if phase.owned_upstream() => {
                Ok(self.snapshot(tenant, Lane::Interactive, ForwardReason::Miss).await?.exists)
            }
            found => Ok(found?),
        }
    }

    /// Brings memory in line with the outcome of a write. One that was surely not done changes
    /// nothing. One that may have been leaves held entries servable, but to be confirmed first.
    fn settle<T, E: Into<WriteError>>(
        self: &Arc<Self>,
        phase: Phase,
        tenant: &Tenant,
        key: &SecretKey,
        outcome: Result<T, E>,
    ) -> Result<T, WriteError> {
        let outcome = outcome.map_err(Into::into);
        match &outcome {
            Ok(_) => {
                self.provisional.forget(tenant, key);
                self.changed(tenant, key);
            }
            Err(error) if error.is_definite() => {}
            Err(_) => {
                self.memory.soft_invalidate(tenant, key);
                self.snapshots.forget(tenant);
                self.loads.forget_where(|(other, _)| other == tenant);
                if phase.owned_upstream() {
                    // The database's copy is not believed either, until it has been read again.
                    if self.may_be_copied(tenant) {
                        self.behind.note_doubt(tenant, self.clock.database_now());
                    }
                    self.refresh_behind(tenant);
                }
            }
        }
        outcome
    }

    /// Makes memory and flights forget the secret, before the write is acknowledged.
    pub(super) fn changed(&self, tenant: &Tenant, key: &SecretKey) {
        self.memory.change(tenant, key);
        self.snapshots.forget(tenant);
        // Other secrets of the tenant may include its value by a reference.
        self.loads.forget_where(|(other, _)| other == tenant);
    }

    /// The folder, read for a caller who waits no longer than any other.
    async fn read_now(self: &Arc<Self>, tenant: &Tenant, why: ForwardReason) -> Result<Arc<Fresh>, ResolveError> {
        let reading = self.snapshot(tenant, Lane::Interactive, why);
        tokio::time::timeout(self.deadline(), reading).await.unwrap_or(Err(ResolveError::TimedOut))
    }

    /// Reads the result of a write back from upstream: its version, and the copies for the next
    /// callers. Where somebody has written after us, that version is not ours to return: a caller
    /// that named its validator in a condition would overwrite a value that it never saw.
    async fn written(
        self: &Arc<Self>,
        tenant: &Tenant,
        key: &SecretKey,
        value: &SecretValue,
        created: bool,
    ) -> Written {
        let fresh = self.read_now(tenant, ForwardReason::Miss).await;
        let answer = fresh.ok().and_then(|fresh| fresh.entries.get(key)?.answer.clone());
        // The value that a text with references resolves to differs from the text.
        let refers = references::refers(value.expose());
        let answer = answer.filter(|answer| (refers && answer.refers()) || answer.value_is(value));
        Written {
            created,
            version: answer.as_ref().map(|answer| answer.version),
            updated_at: answer.as_ref().map_or_else(|| self.clock.now(), |answer| answer.updated_at),
            etag: answer.map(|answer| answer.bare_etag().to_owned()),
            tier: Tier::Upstream,
        }
    }
}

impl WriteError {
    /// Whether the owner has surely not done the write, and memory may be right.
    fn is_definite(&self) -> bool {
        match self {
            Self::Reference
            | Self::UnknownTenant
            | Self::Unstorable(_)
            | Self::AwaitsApproval
            | Self::Denied
            | Self::NoVersion
            | Self::Revoked
            | Self::KeptUpstream => true,
            // Another writer has changed it: memory is out of date.
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
                | UpstreamError::Unreachable { .. }
                | UpstreamError::Foreign { .. }
                | UpstreamError::Failed(_)
                | UpstreamError::Malformed(_)
                | UpstreamError::Incomplete => false,
            },
            Self::Failed(error) => {
                matches!(
                    error,
                    ResolveError::Denied { .. }
                        | ResolveError::NoUpstream
                        | ResolveError::Unreadable
                        | ResolveError::Moving
                )
            }
        }
    }
}

fn database_failed(error: StoreError) -> WriteError {
    WriteError::Failed(ResolveError::Database(Arc::new(error)))
}

/// Does the work in a task of its own: a caller who leaves in the middle of a write must
/// not leave the old value behind in the tiers.
async fn to_its_end<T: Send + 'static>(
    changing: Changing,
    work: impl Future<Output = Result<T, WriteError>> + Send + 'static,
) -> Result<T, WriteError> {
    let work = async move {
        let done = work.await;
        drop(changing);
        done
    };
    tokio::spawn(work).await.unwrap_or(Err(WriteError::Failed(ResolveError::Lost)))
}

impl From<StoreWritten> for Written {
    fn from(written: StoreWritten) -> Self {
        let StoreWritten { created, version, etag, updated_at } = written;
        Self { created, version: Some(version), etag: Some(etag), updated_at, tier: Tier::Database }
    }
}

impl From<StoreWriteError> for WriteError {
    fn from(error: StoreWriteError) -> Self {
        match error {
            StoreWriteError::Conflict => Self::Conflict,
            StoreWriteError::Moved => Self::Failed(ResolveError::Moving),
            StoreWriteError::NoVersion => Self::NoVersion,
            StoreWriteError::Revoked => Self::Revoked,
            StoreWriteError::Unreadable(_) => Self::Failed(ResolveError::Unreadable),
            StoreWriteError::Store(error) => database_failed(error),
        }
    }
}

impl From<UpstreamError> for WriteError {
    fn from(error: UpstreamError) -> Self {
        match error {
            UpstreamError::Unstorable(reason) => Self::Unstorable(reason),
            UpstreamError::AwaitsApproval => Self::AwaitsApproval,
            UpstreamError::Denied => Self::Denied,
            error => Self::Failed(ResolveError::Upstream(error)),
        }
    }
}
