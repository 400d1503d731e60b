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
            Held, Precondition, StoreError, Told, UpstreamWrite, WriteError as StoreWriteError, Written as StoreWritten,
        },
        upstream::{Unstorable, Upstream, UpstreamError},
    },
};

/// What must hold for a write to be done: `If-Match`, `If-None-Match: *`.
pub type Condition = Precondition;

/// What becomes of a write to a tenant that neither upstream nor the database knows: its name
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
    /// The new version, where the owner could tell it.
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
    /// The version that is to come back has no value that is kept.
    #[error("no value of that version is kept")]
    NoVersion,
    /// The version that is to come back is upstream's to keep.
    #[error("the upstream keeps this secret's versions")]
    KeptUpstream,
    /// The value refers to a secret that the writer does not reach.
    #[error("the value refers to a secret that the writer does not reach")]
    Reference,
    /// The owner cannot hold such a name or value.
    #[error(transparent)]
    Unstorable(#[from] Unstorable),
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
        new_tenant: NewTenant,
    ) -> Result<Written, WriteError> {
        self.not_alone()?;
        let write = Write { new_tenant, ..self.write_of(tenant, key, condition, writer) };
        let value = value.clone();
        to_its_end(self.changing(), async move { write.put(&value).await }).await
    }

    /// Deletes a secret at its owner, which is given back; nothing where there was none.
    ///
    /// # Errors
    /// Why nothing was deleted; see [`Self::put`].
    pub async fn delete(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        condition: &Condition,
        writer: &Writer,
    ) -> Result<Option<Tier>, WriteError> {
        self.not_alone()?;
        let write = self.write_of(tenant, key, condition, writer);
        to_its_end(self.changing(), async move { write.delete().await }).await
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
        self.not_alone()?;
        let write = self.write_of(tenant, key, condition, writer);
        to_its_end(self.changing(), async move { write.rollback(number).await }).await
    }

    fn write_of(&self, tenant: &Tenant, key: &SecretKey, condition: &Condition, writer: &Writer) -> Write {
        Write {
            resolver: self.clone(),
            tenant: tenant.clone(),
            key: key.clone(),
            condition: condition.clone(),
            writer: writer.clone(),
            new_tenant: NewTenant::Created,
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
    /// Only a write of a new value can make a tenant.
    new_tenant: NewTenant,
}

/// Who owns a secret.
struct Owner {
    phase: Phase,
    /// The tenant's own phase, which was looked at to tell.
    own: Option<Phase>,
    /// Whether the database knows the tenant.
    is_known: bool,
    /// What told the phase where the tenant has none of its own.
    policies: Arc<Policies>,
}

/// Held while upstream is told of a write: meanwhile no ownership transfer begins.
struct UpstreamWriteGuard<'u> {
    upstream: &'u dyn Upstream,
    registered: UpstreamWrite,
    /// Whether the database knows the tenant.
    is_known: bool,
    /// How long upstream may take.
    lasts: Duration,
}

impl UpstreamWriteGuard<'_> {
    /// Waits for upstream, which ends within its own timeout, but in any case while the write
    /// is registered: that timeout may have become longer since.
    async fn wait<T>(&self, told: impl Future<Output = Result<T, UpstreamError>>) -> Result<T, UpstreamError> {
        tokio::time::timeout(self.lasts, told).await.unwrap_or(Err(UpstreamError::TimedOut))
    }
}

/// How much longer a write stays registered than upstream is waited for: what clocks may differ.
const REGISTERED_LONGER: Duration = Duration::from_secs(10);

impl Write {
    async fn put(&self, value: &SecretValue) -> Result<Written, WriteError> {
        at_the_owner(|| self.try_put(value)).await
    }

    async fn delete(&self) -> Result<Option<Tier>, WriteError> {
        at_the_owner(|| self.try_delete()).await
    }

    async fn rollback(&self, number: Version) -> Result<Written, WriteError> {
        at_the_owner(|| self.try_rollback(number)).await
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

    async fn try_rollback(&self, number: Version) -> Result<Option<Written>, WriteError> {
        let Self { resolver, tenant, key, condition, writer, .. } = self;
        let turn = resolver.turn(tenant).await;
        let owner = resolver.owner(tenant, key).await?;
        match owner.phase {
            Phase::Database => {
                let written = resolver.database.rollback(tenant, key, number, condition, writer, owner.own).await;
                Ok(self.unless_moved(&owner, written)?.map(Written::from))
            }
            Phase::Hybrid => {
                let name = SecretName::of(tenant, key);
                let older = resolver.resolve_version(name, number, Want::Cached).await?;
                if !resolver.is_in_force(&owner.policies) {
                    // The version may be another owner's.
                    return Ok(None);
                }
                older.answer().ok_or(WriteError::NoVersion)?;
                // Its text, and not what that stands for.
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
        // A made-up tenant leaves no row.
        let deleted = self.end(&owner, registered, deleted, |deleted| *deleted || is_known).await?;
        // The copies go with the next snapshot, and so does what others do upstream
        // under this key: it should not be long in coming.
        if deleted && owner.phase == Phase::Hybrid {
            resolver.refresh_behind(tenant);
        }
        Ok(Some(deleted.then_some(Tier::Upstream)))
    }

    async fn put_upstream(
        &self,
        owner: &Owner,
        value: &SecretValue,
        turn: tokio::sync::MutexGuard<'_, ()>,
    ) -> Result<Option<Written>, WriteError> {
        let Self { resolver, tenant, key, .. } = self;
        let is_text = resolver.upstream.as_ref().is_some_and(|upstream| !upstream.reads_references());
        if !is_text && !references::stay_within(value.expose(), |name| self.writer.reaches(name)) {
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

    /// What a write to the database itself came to; nothing where the tenant has moved.
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

    /// A write that was done where policies of before had it done is not acknowledged where
    /// those in force have another owner: who reads would not find it.
    fn is_still_owned(&self, owner: &Owner) -> Result<(), WriteError> {
        let now = self.resolver.policies().of(&self.tenant, &self.key, owner.own).phase;
        if now.owned_upstream() == owner.phase.owned_upstream() { Ok(()) } else { Err(ResolveError::Moving.into()) }
    }

    /// The guard to tell upstream, if it would keep what is written and the condition holds there;
    /// nothing where the tenant has moved. From here on it stays where it is until the write is ended, and snapshots that
    /// are being read will not be stored. Without the database the write is not begun: its
    /// copy would stay. The copy itself stays until the write is done, because one that
    /// upstream refuses, or that meets an outage, must not take away what the outage needs.
    async fn guard(
        &self,
        owner: &Owner,
        value: Option<&SecretValue>,
    ) -> Result<Option<UpstreamWriteGuard<'_>>, WriteError> {
        let Self { resolver, tenant, key, .. } = self;
        let upstream = match self.upstream(owner, value).await {
            // What upstream says decides nothing where it is not the owner any more.
            Err(_) if resolver.owner(tenant, key).await.is_ok_and(|now| now.own != owner.own) => return Ok(None),
            // The condition may have been held to what another owner has.
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
        // Above what upstream takes by itself, below what is registered.
        let lasts = lasts + REGISTERED_LONGER / 2;
        Ok(Some(UpstreamWriteGuard { upstream, registered, is_known: company.is_some(), lasts }))
    }

    /// Upstream, if it would keep what is written, the tenant may be written to and the
    /// condition holds there. In this order: what is under a name that upstream would alter is
    /// another secret's, and nothing is asked about it.
    async fn upstream(&self, owner: &Owner, value: Option<&SecretValue>) -> Result<&dyn Upstream, WriteError> {
        let Self { resolver, tenant, key, condition, .. } = self;
        let upstream = resolver.upstream.as_deref().ok_or(ResolveError::NoUpstream)?;
        upstream.check(key, value)?;
        self.admit_tenant(owner).await?;
        if !matches!(condition, Condition::None) {
            let fresh = resolver.read_now(tenant, ForwardReason::Request).await?;
            // One that cannot be used is there all the same, and nobody knows what would be lost.
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

    /// Whether the condition names a validator that was given for the value that upstream has,
    /// before the database had one for it.
    fn was_given(&self, condition: &Condition, answer: Option<&Answer>) -> bool {
        let Self { resolver, tenant, key, .. } = self;
        let (Condition::IfMatch(etags), Some(answer)) = (condition, answer) else { return false };
        etags.iter().any(|etag| resolver.provisional.is_of(tenant, key, etag, answer.expose()))
    }

    /// Lets a write pass that makes no tenant, or is to make it.
    async fn admit_tenant(&self, owner: &Owner) -> Result<(), WriteError> {
        let Self { resolver, tenant, .. } = self;
        let is_admitted =
            self.new_tenant == NewTenant::Created || owner.is_known || resolver.has_folder(tenant, owner.phase).await?;
        if is_admitted { Ok(()) } else { Err(WriteError::UnknownTenant) }
    }

    /// After the write: takes the copy out of the database's service, and once more out of
    /// memory, where a reader may have brought it back from the database meanwhile. Where
    /// upstream has done it, `changed` says whether there was anything to do.
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
            // It may be done yet, so it stays registered until it surely is or is not.
            Err(_) => return outcome,
        };
        let done_at = resolver.clock.database_now();
        let ended = resolver.database.end_upstream_write(&registered, told).await;
        if ended.is_err() && !matches!(told, Told::Nothing) {
            // The copy in the database is from before, and nobody there knows.
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
                // What upstream has now is not to be read as what the write has made.
                resolver.owner(tenant, key).await?;
                outcome.and(Err(ResolveError::Moving.into()))
            }
            Err(error) => outcome.and(Err(database_failed(error))),
        }
    }
}

/// Tries a write at the owner of the moment, and again where the tenant changed hands in
/// between: then the try gives nothing, and has done nothing.
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
    /// Writes to one tenant go one by one here, so that a condition that is checked
    /// against upstream, which knows none itself, still holds when the write is sent.
    async fn turn(&self, tenant: &Tenant) -> tokio::sync::MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        tenant.hash(&mut hasher);
        let stripe = usize::try_from(hasher.finish() % self.writes.len() as u64).unwrap_or(0);
        self.writes[stripe].lock().await
    }

    /// Who owns the secret. The tenant's own phase decides, so the database must tell it:
    /// a write to the wrong owner would be lost. It is in force here when this returns: who
    /// reads after the write must not ask the owner from before.
    async fn owner(&self, tenant: &Tenant, key: &SecretKey) -> Result<Owner, WriteError> {
        let company = self.database.company(tenant).await.map_err(database_failed)?;
        let own = company.as_ref().and_then(|company| company.phase);
        self.keep_up(tenant, own).await.map_err(database_failed)?;
        let policies = self.policies();
        Ok(Owner { phase: policies.of(tenant, key, own).phase, own, is_known: company.is_some(), policies })
    }

    /// Whether upstream has a folder for a tenant, which may have been made a moment ago.
    async fn has_folder(&self, tenant: &Tenant, phase: Phase) -> Result<bool, WriteError> {
        if self.upstream.is_none() {
            return Ok(false);
        }
        match self.tenant_directory.find_newly_made(tenant).await {
            // Where the list itself is refused to us, the folder's own content must be proof.
            Err(UpstreamError::Denied | UpstreamError::Rejected { .. }) if phase.owned_upstream() => {
                Ok(self.snapshot(tenant, Lane::Interactive, ForwardReason::Miss).await?.exists)
            }
            found => Ok(found?),
        }
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
            Ok(_) => {
                self.provisional.forget(tenant, key);
                self.changed(tenant, key);
            }
            Err(error) if error.is_definite() => {}
            Err(_) => {
                self.memory.doubt(tenant, key);
                self.snapshots.forget(tenant);
                self.loads.forget_where(|(other, _)| other == tenant);
                if phase.owned_upstream() {
                    // Nor is the copy in the database believed until it has been read again.
                    if self.may_be_copied(tenant) {
                        self.behind.note_doubt(tenant, self.clock.database_now());
                    }
                    self.refresh_behind(tenant);
                }
            }
        }
        outcome
    }

    /// Makes memory and flights forget what they knew, before the write is acknowledged.
    pub(super) fn changed(&self, tenant: &Tenant, key: &SecretKey) {
        self.memory.change(tenant, key);
        self.snapshots.forget(tenant);
        // Others of the tenant may have its value in theirs, by a reference.
        self.loads.forget_where(|(other, _)| other == tenant);
    }

    /// The folder, read for somebody who waits no longer than any other caller.
    async fn read_now(&self, tenant: &Tenant, why: ForwardReason) -> Result<Arc<Fresh>, ResolveError> {
        let reading = self.snapshot(tenant, Lane::Interactive, why);
        tokio::time::timeout(self.deadline(), reading).await.unwrap_or(Err(ResolveError::TimedOut))
    }

    /// Reads back what upstream made of a write: its version, and the copies for those who
    /// ask next. Where somebody has written after us, that is not ours to give: whoever
    /// named its validator in a condition would write over a value never seen.
    async fn written(&self, tenant: &Tenant, key: &SecretKey, value: &SecretValue, created: bool) -> Written {
        let fresh = self.read_now(tenant, ForwardReason::Miss).await;
        let answer = fresh.ok().and_then(|fresh| fresh.entries.get(key)?.answer.clone());
        // What a text with references stands for is another value.
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
            | Self::NoVersion
            | Self::KeptUpstream => true,
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
                | UpstreamError::Malformed(_)
                | UpstreamError::Incomplete => false,
            },
            Self::Failed(error) => {
                matches!(
                    error,
                    ResolveError::Denied | ResolveError::NoUpstream | ResolveError::Unreadable | ResolveError::Moving
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
            UpstreamError::Denied => Self::Failed(ResolveError::Denied),
            error => Self::Failed(ResolveError::Upstream(error)),
        }
    }
}
