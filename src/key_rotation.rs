//! Rotates keys while the proxy serves: a new master key for every tenant's data key, and on
//! request new data keys for every tenant's values.
//!
//! This order keeps every value readable at every moment, for every instance:
//!
//! 1. The new key is put in front of the old one in the source of the master keys, and read back.
//!    Nothing is wrapped with it yet, so nothing depends on it.
//! 2. Every running instance reads its keys again and confirms that in the database. Data keys are
//!    wrapped with the new key only when all instances hold it: until then, an instance that has it
//!    already wraps with the old one.
//! 3. The rotation waits for data keys that are being made with the old key; from then on none is.
//!    An instance that was away meanwhile looks for the new key before it makes a data key. An
//!    instance that is not heard of is waited for too, but not for ever: it is named, and the
//!    rotation stays open until it has followed, or can no longer answer.
//! 4. Data keys are re-wrapped in small transactions. A reader of one finds the old wrapping or the
//!    new one, and holds the keys of both.
//!
//! The state of the rotation is a row in the database, written before each step that another
//! process must not repeat; a crash at any point leaves a state from which the same command
//! continues. The old key stays where it was: backups of the database need it.

use std::time::Duration;

use crate::{
    clock::{Clock, Timestamp},
    keys::{Gathered, IntroduceError, KeyError, KeySource, SourceOutcome, Sources},
    sealing::{MasterKey, MasterKeyId, OpenError, SealError},
    tenant::Tenant,
    tiers::{
        database::{Database, Holder, Instance, JobLock, Rewrapped, RotationState, StoreError, Unfollowed},
        upstream::Lane,
    },
};

/// A rotation to be done, and the process that does it.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// Whether tenants get new data keys as well.
    pub data_keys: bool,
    /// The process, described to people.
    pub by: String,
    /// How long running instances may take to read the new key.
    pub patience: Duration,
}

/// The present step, for people to follow.
#[derive(Debug)]
pub enum Progress {
    /// A rotation that did not end is continued.
    Resumed(RotationState),
    /// No key is introduced: some data keys are still wrapped with keys other than the first.
    AlreadyIntroduced(MasterKeyId),
    /// A new key was put in front of the old one.
    Introduced(MasterKeyId, KeySource),
    /// The new key is in the backup as well.
    BackedUp,
    /// The rotation waits for running instances.
    Waiting,
    /// The rotation waits for these instances, and it takes long.
    WaitingFor(Vec<String>),
    /// The number of data keys that were re-wrapped so far.
    Rewrapped(usize),
    /// The number of tenants that have new data keys so far.
    Renewed(usize),
}

/// A rotation that has ended.
#[derive(Debug)]
pub struct Rotated {
    /// The master key that wraps now.
    pub key: MasterKeyId,
    /// Data keys that were re-wrapped.
    pub rewrapped: usize,
    /// Data keys that did not open and stay as they were.
    pub failed: Vec<(Tenant, OpenError)>,
    /// Tenants whose values have new data keys.
    pub renewed: usize,
    /// Their values, of every version.
    pub resealed: usize,
    /// Values that did not open and stay as they were.
    pub unreadable: usize,
    /// Tokens that were sealed anew.
    pub tokens: usize,
    /// Instances that may still use the previous key: they ended without withdrawing, are stopped,
    /// or have lost the database. An instance that comes back looks for the new key then. Until
    /// none is left, the rotation has not ended, and the same command continues it.
    pub unfollowed: Vec<Unfollowed>,
}

/// Why a rotation did not end. The same command continues it.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// Another process is rotating keys.
    #[error(
        "another process is rotating keys on this database just now: {}, which has until {} to say that it goes on; \
         'secretier keys status' shows how far it is", .0.shown, .0.until.to_rfc3339()
    )]
    Busy(Holder),
    /// Another process has taken over.
    #[error(
        "another process has taken over this rotation, because this one was not heard of for a while; what this one had \
         not finished is undone. 'secretier keys status' shows how far it is, and the same command goes on once the \
         other has ended"
    )]
    TakenOver,
    /// Without a key, no rotation is possible.
    #[error("no source gives a master key, so there is nothing to rotate; see [keys] in the configuration")]
    NoKey,
    /// If a new key were put behind an unknown one, it would not be the first key for every
    /// instance.
    #[error("{source_name} comes first in keys.sources and does not answer ({reason}); rotate when it does")]
    Unreachable {
        /// The source.
        source_name: KeySource,
        /// Why.
        reason: String,
    },
    /// The source refused the new key.
    #[error("the new master key could not be introduced")]
    Introduce(#[from] IntroduceError),
    /// A source, or the backup, holds an invalid key.
    #[error("the master keys cannot be read, or not be backed up")]
    Keys(#[from] KeyError),
    /// Some running instances could not open data keys that are wrapped with the new key.
    #[error(
        "nothing was re-wrapped, because these running instances do not have the master key {key}: {names}. Give them \
         the key (a file of keys is each machine's own) and run this again; one that has ended is forgotten after 15 s",
        names = .instances.join(", ")
    )]
    Lagging {
        /// The new key.
        key: MasterKeyId,
        /// Their names.
        instances: Vec<String>,
    },
    /// The rotation has a key already, which only other instances have.
    #[error(
        "the rotation under way has the master key {key}, which no source here gives and these running instances hold: \
         {names}. Copy it from there (a file of keys is each machine's own) and run this again",
        names = .instances.join(", ")
    )]
    Elsewhere {
        /// The key.
        key: MasterKeyId,
        /// Their names.
        instances: Vec<String>,
    },
    /// No new key could be made.
    #[error("no new key could be made")]
    Seal(#[from] SealError),
    /// The database failed.
    #[error("the database tier failed")]
    Store(#[source] StoreError),
}

impl From<StoreError> for RotateError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::LeaseLost => Self::TakenOver,
            error => Self::Store(error),
        }
    }
}

impl Rotation {
    /// Rotates keys, or continues a rotation that did not end.
    ///
    /// # Errors
    /// [`RotateError`]; every value opens as before.
    pub async fn run(
        &self,
        database: &Database,
        clock: &Clock,
        told: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Rotated, RotateError> {
        let lock = database.rotation_lock(&self.by).await?.map_err(RotateError::Busy)?;
        let outcome = database.renewing(&lock, self.run_under(database, &lock, clock, told)).await;
        database.end_job_lock(lock).await;
        outcome
    }

    async fn run_under(
        &self,
        database: &Database,
        lock: &JobLock,
        clock: &Clock,
        told: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Rotated, RotateError> {
        let mut state = self.begin(database, lock, clock, told).await?;
        let key = introduced(database, lock, &mut state, told).await?;
        state.key = Some(key.id().to_string());
        database.keep_rotation(lock, &state).await?;
        back_up(database, lock, clock.now(), told).await?;
        let change = self.await_instances(database, lock, &key, told).await?;
        state.spread = true;
        database.spread_rotation(lock, &state).await?;
        let since = state.renews_before.map_or_else(|| clock.database_now(), Timestamp::from_millis);
        if state.data_keys && state.renews_before.is_none() {
            state.renews_before = Some(since.as_millis());
            database.keep_rotation(lock, &state).await?;
        }
        let mut rotated = Rotated {
            key: key.id(),
            rewrapped: 0,
            failed: Vec::new(),
            renewed: 0,
            resealed: 0,
            unreadable: 0,
            tokens: 0,
            unfollowed: Vec::new(),
        };
        rewrap(database, lock, &key, &mut rotated, told).await?;
        // Seals beside the data keys are made with the new key: no process wraps with another key
        // any more.
        rotated.tokens = database.reseal_tokens(lock, &key).await?;
        database.reseal_login_keys(lock, &key, state.data_keys.then_some(since)).await?;
        if state.data_keys {
            renew(database, lock, since, &mut rotated, told).await?;
        }
        let following = database.await_all_instances(Duration::ZERO, ready(&key, change), |_| {}).await?;
        rotated.unfollowed = following.unfollowed();
        if rotated.unfollowed.is_empty() {
            database.end_rotation(lock).await?;
        }
        Ok(rotated)
    }

    /// Determines the rotation to do, and stores it before anything else is done.
    async fn begin(
        &self,
        database: &Database,
        lock: &JobLock,
        clock: &Clock,
        told: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<RotationState, RotateError> {
        let ring = database.keys().ring();
        let first = ring.first().ok_or(RotateError::NoKey)?.id();
        let state = match database.rotation().await? {
            Some(mut state) => {
                state.data_keys |= self.data_keys;
                told(Progress::Resumed(state.clone()));
                state
            }
            None => {
                // Data keys wrapped with a lost master key can wait for ever; so can data keys that
                // a rotation to the first key left behind because they do not open.
                let wrapped = database.wrapped_by().await?;
                let waiting = wrapped.iter().any(|by| by.id != first && ring.find(by.id).is_some());
                let waiting = waiting && database.rotated_to().await? != Some(first.to_string());
                RotationState {
                    replaces: (!waiting).then(|| first.to_string()),
                    key: None,
                    data_keys: self.data_keys,
                    started_at: clock.now().as_millis(),
                    spread: false,
                    renews_before: None,
                    by: self.by.clone(),
                }
            }
        };
        database.keep_rotation(lock, &state).await?;
        Ok(state)
    }

    /// Has every running instance read its keys again, and waits until each holds this one and
    /// wraps with it.
    async fn await_instances(
        &self,
        database: &Database,
        lock: &JobLock,
        key: &MasterKey,
        told: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<i64, RotateError> {
        let change = database.announce_master_key(lock).await?;
        told(Progress::Waiting);
        let tell = |names| told(Progress::WaitingFor(names));
        let following = database.await_all_instances(self.patience, ready(key, change), tell).await?;
        if !following.behind.is_empty() {
            return Err(RotateError::Lagging { key: key.id(), instances: names(following.behind) });
        }
        Ok(change)
    }
}

/// Whether an instance has read its keys since this change, and wraps with this one.
fn ready(key: &MasterKey, change: i64) -> impl Fn(&Instance) -> bool + Send + Sync {
    let key = key.id();
    move |instance| {
        let has_read = instance.changes >= change && instance.master_keys.first() == Some(&key);
        // An instance without any key opens nothing and wraps nothing.
        instance.master_keys.is_empty() || has_read
    }
}

fn names(instances: Vec<Instance>) -> Vec<String> {
    instances.into_iter().map(|instance| instance.name).collect()
}

/// Returns the key to wrap with: the first one, after introducing it where that is still to be
/// done.
async fn introduced(
    database: &Database,
    lock: &JobLock,
    state: &mut RotationState,
    told: &mut (dyn FnMut(Progress) + Send),
) -> Result<MasterKey, RotateError> {
    let keys = database.keys();
    let sources = keys.sources().ok_or(RotateError::NoKey)?;
    let first = keys.ring().first().cloned().ok_or(RotateError::NoKey)?;
    if state.replaces.as_deref() != Some(&*first.id().to_string()) {
        told(Progress::AlreadyIntroduced(first.id()));
        return Ok(first);
    }
    if let Some(key) = state.key.as_deref().and_then(|key| key.parse().ok()) {
        // It was introduced, but is not in the sources that are read here.
        let instances = database.live_instances().await?.into_iter();
        let holders: Vec<_> = instances.filter(|instance| instance.master_keys.contains(&key)).collect();
        if !holders.is_empty() {
            return Err(RotateError::Elsewhere { key, instances: names(holders) });
        }
    }
    let place = match place_for_new(sources, &sources.gather(Lane::Interactive).await?) {
        Ok(place) => place,
        Err(error) => {
            if state.key.is_none() {
                // Nothing has begun.
                database.end_rotation(lock).await?;
            }
            return Err(error);
        }
    };
    if state.spread {
        // Another key had been spread; no instance has this one yet.
        state.spread = false;
        database.keep_rotation(lock, state).await?;
    }
    let key = MasterKey::generate()?;
    // No source compares fencing tokens. A process that is stopped right here for longer than the
    // job lock lasts puts one more key in front of the key of the process that has taken over, as
    // an operator may do. Data keys that are made then open wherever that source is read, which for
    // a file is one machine.
    database.renew_job_lock(lock).await?;
    sources.introduce(&place, &key).await?;
    keys.reload().await?;
    if keys.ring().first().map(MasterKey::id) != Some(key.id()) {
        // A source did not answer just now; the next steps rely on the ring.
        return Err(IntroduceError::NotKept(place).into());
    }
    database.note_master_keys(&keys.origins()).await?;
    told(Progress::Introduced(key.id(), place));
    Ok(key)
}

/// The source where a new key becomes the first one: the source of the first key, or, where that
/// cannot be written, an empty one before it.
fn place_for_new(sources: &Sources, gathered: &Gathered) -> Result<KeySource, RotateError> {
    let mut place = None;
    for report in &gathered.reports {
        let writable = sources.is_writable(&report.source);
        match &report.outcome {
            SourceOutcome::Unreachable(reason) => {
                let (source_name, reason) = (report.source.clone(), reason.clone());
                return Err(RotateError::Unreachable { source_name, reason });
            }
            SourceOutcome::Empty(_) if writable => place = Some(report.source.clone()),
            SourceOutcome::Empty(_) => {}
            SourceOutcome::Gave(_) if writable => return Ok(report.source.clone()),
            SourceOutcome::Gave(_) => {
                let read_only = || IntroduceError::ReadOnly(report.source.clone()).into();
                return place.ok_or_else(read_only);
            }
        }
    }
    Err(RotateError::NoKey)
}

/// Puts the new key into the backup before anything is wrapped with it: an outage just after a
/// rotation must not find an older backup.
async fn back_up(
    database: &Database,
    lock: &JobLock,
    now: Timestamp,
    told: &mut (dyn FnMut(Progress) + Send),
) -> Result<(), RotateError> {
    let keys = database.keys();
    database.renew_job_lock(lock).await?;
    if let Some(sources) = keys.sources()
        && sources.complete_backup(&keys.ring(), now).await?
    {
        told(Progress::BackedUp);
    }
    Ok(())
}

async fn rewrap(
    database: &Database,
    lock: &JobLock,
    key: &MasterKey,
    rotated: &mut Rotated,
    told: &mut (dyn FnMut(Progress) + Send),
) -> Result<(), RotateError> {
    // A second pass finds data keys that were made during the first.
    loop {
        let (mut after, mut done) = (None, 0);
        rotated.failed.clear();
        loop {
            let batch: Rewrapped = database.rewrap(lock, key, after.as_deref()).await?;
            done += batch.done;
            rotated.failed.extend(batch.failed);
            if batch.done > 0 {
                told(Progress::Rewrapped(rotated.rewrapped + done));
            }
            after = batch.after;
            if after.is_none() {
                break;
            }
        }
        rotated.rewrapped += done;
        if done == 0 {
            return Ok(());
        }
    }
}

async fn renew(
    database: &Database,
    lock: &JobLock,
    started_at: Timestamp,
    rotated: &mut Rotated,
    told: &mut (dyn FnMut(Progress) + Send),
) -> Result<(), RotateError> {
    let mut after = None;
    loop {
        let tenants = database.tenants_with_old_data_keys(started_at, after.as_deref()).await?;
        let Some(last) = tenants.last() else { return Ok(()) };
        after = Some(last.id.clone());
        for company in &tenants {
            let resealed = database.renew_data_key(lock, &company.tenant, started_at).await?;
            rotated.renewed += 1;
            rotated.resealed += resealed.values;
            rotated.unreadable += resealed.failed;
        }
        told(Progress::Renewed(rotated.renewed));
    }
}
