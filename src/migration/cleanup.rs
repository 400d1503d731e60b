//! Removes the folders of tenants that the database has owned for long enough, and
//! restores them.

use std::{path::Path, sync::Arc, time::Duration};

use super::{
    archive::{Archive, ArchiveError, Archived},
    folders::{ChangeError, change, patiently as call_patiently},
    origin::{OriginError, ProblemKind},
    run::names,
    transfer::{Transfer, patiently},
    verify::{Compared, Kind, switched},
};
use crate::{
    clock::Timestamp,
    log,
    phase::Phase,
    secret::{SecretKey, SecretValue},
    tenant::Tenant,
    tiers::{
        database::{Company, Holder, JobLock, Step, StoreError, TenantState},
        upstream::{Fetched, Lane, Removal, Snapshot, Upstream, UpstreamError, UpstreamSecret},
    },
};

/// The pause between two folders.
const BETWEEN: Duration = Duration::from_millis(200);

/// Everything that a clean-up needs.
pub struct Cleanup {
    /// The source and the target of the migration.
    pub transfer: Transfer,
    /// The upstream that the folders are removed from.
    pub upstream: Arc<dyn Upstream>,
    /// The environment.
    pub environment: String,
    /// The name of this process, shown to operators who wait for it.
    pub by: String,
}

/// The outcome for a tenant's folder.
#[derive(Debug)]
pub struct Cleaned {
    /// The tenant.
    pub tenant: Tenant,
    /// Secrets that were in it, or why it stays.
    pub outcome: Result<usize, String>,
}

/// Why a clean-up did not come to its end. The same command goes on with it.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// The archive cannot be written, and without it nothing is removed.
    #[error("the archive cannot be written, and nothing is removed without it")]
    Archive(#[from] ArchiveError),
    /// Upstream does not answer any more.
    #[error("upstream does not answer any more; run the same command again to go on")]
    Upstream(#[from] UpstreamError),
    /// The database failed.
    #[error("the database tier failed")]
    Store(#[source] StoreError),
    /// Another process has taken over.
    #[error(
        "another process that removes folders, or gives a tenant back, has taken over, because this one was not heard of \
         for a while; the same command goes on once the other has ended"
    )]
    TakenOver,
    /// Another process has the right to do so.
    #[error(
        "{} is removing folders, putting them back or giving a tenant back just now, and has until {} to say that it \
         goes on; run this again", .0.shown, .0.until.to_rfc3339()
    )]
    Busy(Holder),
}

impl CleanupError {
    /// Whether the same would happen for every other tenant.
    #[must_use]
    pub fn is_of_all(&self) -> bool {
        match self {
            Self::Upstream(error) => OriginError::from(error.clone()).is_of_all(),
            Self::Archive(_) | Self::Store(_) | Self::TakenOver | Self::Busy(_) => true,
        }
    }
}

impl From<StoreError> for CleanupError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::LeaseLost => Self::TakenOver,
            error => Self::Store(error),
        }
    }
}

impl From<ChangeError> for CleanupError {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::Upstream(error) => error.into(),
            ChangeError::Store(error) => error.into(),
        }
    }
}

impl Cleanup {
    /// The tenants that were switched at least `older_than` ago, and that the database still owns.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn due(
        &self,
        older_than: Duration,
        is_meant: impl Fn(&Tenant) -> bool,
    ) -> Result<Vec<TenantState>, StoreError> {
        let database = &self.transfer.database;
        let states = database.migration_states().await?;
        let tenants: Vec<Tenant> = states.iter().map(|state| state.tenant.clone()).collect();
        let companies = database.companies_of(&tenants).await?;
        let now = self.transfer.clock.database_now();
        let is_due = |state: &TenantState| {
            state.step == Step::Switched
                && state.switched_at.is_some_and(|at| at <= now && now.since(at) >= older_than)
                && is_meant(&state.tenant)
        };
        Ok(switched(states, &companies).into_iter().filter(is_due).collect())
    }

    /// Archives and removes the folders of these tenants, one by one. Each is compared again
    /// first, and is kept if the comparison finds that Infisical is ahead.
    ///
    /// # Errors
    /// [`CleanupError`]; a folder that is gone is in the archive.
    pub async fn clean_up(
        &self,
        due: Vec<TenantState>,
        file: &Path,
        told: &mut (dyn FnMut(&Cleaned) + Send),
    ) -> Result<Vec<Cleaned>, CleanupError> {
        let mut archive = Archive::append_to(file, &self.environment)?;
        let mut cleaned = Vec::with_capacity(due.len());
        for state in due {
            let tenant = state.tenant;
            if let Some(outcome) = self.remove_under_lock(&mut archive, &tenant).await? {
                let one = Cleaned { tenant, outcome };
                told(&one);
                cleaned.push(one);
            }
            // A rollback that waits for the lock gets it in this pause.
            tokio::time::sleep(BETWEEN).await;
        }
        Ok(cleaned)
    }

    /// Removes one folder, and notes that, while no tenant is given back: it would go back to
    /// a folder that is about to be removed. `None` where there is no folder to remove.
    async fn remove_under_lock(
        &self,
        archive: &mut Archive,
        tenant: &Tenant,
    ) -> Result<Option<Result<usize, String>>, CleanupError> {
        let database = &self.transfer.database;
        let lock = match patiently(|| database.folders_lock(&self.by)).await? {
            Ok(lock) => lock,
            Err(holder) => return Ok(Some(Err(CleanupError::Busy(holder).to_string()))),
        };
        let outcome = database.renewing(&lock, self.remove_under(&lock, archive, tenant)).await;
        database.end_job_lock(lock).await;
        outcome
    }

    async fn remove_under(
        &self,
        lock: &JobLock,
        archive: &mut Archive,
        tenant: &Tenant,
    ) -> Result<Option<Result<usize, String>>, CleanupError> {
        let database = &self.transfer.database;
        // The tenants may have been looked up long ago.
        let company = patiently(|| database.company(tenant)).await?;
        let state = patiently(|| database.migration_state(tenant)).await?;
        let is_switched = |state: &TenantState| state.step == Step::Switched && state.switched_at.is_some();
        let Some(state) = state.filter(is_switched).filter(|_| owns(company.as_ref())) else {
            return Ok(Some(Err("it is not the database's any more".to_owned())));
        };
        let outcome = match self.remove(lock, archive, &state).await? {
            Some(outcome) => outcome,
            None => return Ok(None),
        };
        if outcome.is_ok() {
            let now = self.transfer.clock.database_now();
            let state = TenantState { step: Step::Archived, updated_at: now, ..state };
            patiently(|| database.keep_states(lock, std::slice::from_ref(&state))).await?;
        }
        Ok(Some(outcome))
    }

    async fn remove(
        &self,
        lock: &JobLock,
        archive: &mut Archive,
        state: &TenantState,
    ) -> Result<Option<Result<usize, String>>, CleanupError> {
        let tenant = &state.tenant;
        let stays = |reason: String| Ok(Some(Err(reason)));
        let content = match self.transfer.origin.read(std::slice::from_ref(tenant)).await.pop() {
            Some(Ok(content)) => content,
            Some(Err(OriginError::Missing)) | None => {
                // It was removed, and a crash kept us from noting it.
                if let Some(held) = archive.find(tenant).filter(|held| Some(held.archived_at) >= state.switched_at) {
                    return Ok(Some(Ok(held.secrets)));
                }
                if self.transfer.is_of_database_alone(tenant).await? {
                    return Ok(None);
                }
                return stays("upstream has no such folder, and the archive does not have it either".to_owned());
            }
            Some(Err(OriginError::Upstream(UpstreamError::Denied))) => {
                return stays("upstream refuses its folder to us".to_owned());
            }
            Some(Err(OriginError::Upstream(error))) if OriginError::from(error.clone()).is_of_all() => {
                return Err(error.into());
            }
            Some(Err(error)) => return stays(log::chain(&error)),
        };
        // The archive holds only what the folder returned: anything else in it would be lost.
        let lost = content.problems.iter().find(|problem| problem.kind != ProblemKind::Reference);
        if let Some(problem) = lost {
            return stays(format!("the archive would not have it: {problem}"));
        }
        // A folder that could not be written back must not be removed either.
        let written = content.snapshot.secrets.iter().map(|secret| (&secret.key, secret.written()));
        let unwritable = self.unwritable(written);
        if !unwritable.is_empty() {
            return stays(format!("a restore could not write it back: {}", unwritable.join("; ")));
        }
        let Compared { drift, error, .. } = self.transfer.compare_content(tenant, &content).await?;
        if let Some(error) = error {
            return stays(error);
        }
        let ahead = drift.iter().find(|drift| !matches!(drift.what, Kind::WrittenHere | Kind::DeletedHere));
        if let Some(drift) = ahead {
            return stays(format!("{:?} was {}", drift.key, drift.what.as_str()));
        }
        let now: Timestamp = self.transfer.clock.now();
        archive.add(&self.transfer.database.keys().ring(), tenant, &content.snapshot, now)?;
        let database = &self.transfer.database;
        match change(database, lock, || self.upstream.remove_folder(tenant, Removal::Whole, Lane::Migration)).await {
            Ok(_) => Ok(Some(Ok(content.snapshot.secrets.len()))),
            Err(ChangeError::Upstream(
                error @ (UpstreamError::Denied | UpstreamError::Rejected { .. } | UpstreamError::AwaitsApproval),
            )) => stays(format!("upstream did not remove it: {}", log::chain(&error))),
            Err(error) => Err(error.into()),
        }
    }

    /// The secrets that upstream would not accept as they are, with the reason.
    fn unwritable<'s>(&self, secrets: impl Iterator<Item = (&'s SecretKey, &'s SecretValue)>) -> Vec<String> {
        let refused = |(key, value): (&SecretKey, &SecretValue)| {
            let refused = self.upstream.check(key, Some(value)).err()?;
            Some(format!("{:?}: {refused}", key.as_str()))
        };
        secrets.filter_map(refused).collect()
    }

    /// Writes an archived folder back, and reads it back; or returns why it was left alone, or
    /// which secrets could not be written. Secrets of other names in the folder stay.
    ///
    /// # Errors
    /// [`CleanupError`]; the same command may be run again.
    pub async fn restore(&self, archived: &Archived) -> Result<Result<(), String>, CleanupError> {
        let database = &self.transfer.database;
        // While it is half restored, it must not be removed, nor its tenant given back to it.
        let lock = database.folders_lock(&self.by).await?.map_err(CleanupError::Busy)?;
        let outcome = database.renewing(&lock, self.restore_under(&lock, archived)).await;
        database.end_job_lock(lock).await;
        outcome
    }

    async fn restore_under(&self, lock: &JobLock, archived: &Archived) -> Result<Result<(), String>, CleanupError> {
        let (database, tenant) = (&self.transfer.database, &archived.tenant);
        let folder = self.read_folder(tenant).await?;
        let flaws = folder.flaws();
        let hidden: Vec<SecretKey> = archived
            .secrets
            .iter()
            .map(|(key, _)| key)
            .filter(|key| flaws.unusable.contains_key(*key))
            .cloned()
            .collect();
        if !hidden.is_empty() {
            let names = names(&hidden);
            return Ok(Err(format!("its folder has {names}, whose values cannot be read, and may be newer")));
        }
        let is_empty = folder.secrets.is_empty() && folder.oddities.is_empty();
        let there = folder.secrets;
        let of = |key: &SecretKey| there.iter().find(|secret| secret.key == *key).map(UpstreamSecret::written);
        let (missing, present): (Vec<_>, Vec<_>) = archived.secrets.iter().partition(|(key, _)| of(key).is_none());
        let differs = |(key, value): &&(SecretKey, SecretValue)| of(key).is_some_and(|there| !there.same_as(value));
        let other: Vec<SecretKey> = present.into_iter().filter(differs).map(|(key, _)| key.clone()).collect();
        if !other.is_empty() {
            let names = names(&other);
            return Ok(Err(format!(
                "its folder has other values of {names}, which are newer; delete them there first"
            )));
        }
        let company = database.company(tenant).await?;
        let own = company.as_ref().and_then(|company| company.phase);
        // Secrets that were deleted there since do not come back by themselves.
        if !missing.is_empty() && !is_empty && !self.transfer.is_databases(tenant, own) {
            let phase = self.transfer.policies.phase_of(tenant, own);
            return Ok(Err(format!(
                "it is in phase {phase}, and served from its folder, which is not as it was archived"
            )));
        }
        // Creates the folder too: a tenant without secrets has one.
        change(database, lock, || self.upstream.create_folder(tenant)).await?;
        let mut left = Vec::new();
        for (key, value) in missing {
            match change(database, lock, || self.upstream.put(tenant, key, value)).await {
                Ok(_) => {}
                Err(ChangeError::Upstream(
                    error @ (UpstreamError::Unstorable(_)
                    | UpstreamError::Rejected { .. }
                    | UpstreamError::Denied
                    | UpstreamError::AwaitsApproval),
                )) => left.push(format!("{:?}: {error}", key.as_str())),
                Err(error) => return Err(error.into()),
            }
        }
        if !left.is_empty() {
            return Ok(Err(format!("the rest of it is there; these could not be written: {}", left.join("; "))));
        }
        let there = self.read_folder(tenant).await?.secrets;
        let of = |key: &SecretKey| there.iter().find(|secret| secret.key == *key).map(UpstreamSecret::written);
        let differs = |(key, value): &&(SecretKey, SecretValue)| of(key).is_none_or(|there| !there.same_as(value));
        let other: Vec<SecretKey> = archived.secrets.iter().filter(differs).map(|(key, _)| key.clone()).collect();
        if !other.is_empty() {
            return Ok(Err(format!("what was written does not read back as it was archived: {}", names(&other))));
        }
        let state = database.migration_state(tenant).await?;
        if let Some(state) = state.filter(|state| state.step == Step::Archived) {
            let state = TenantState { step: Step::Switched, updated_at: self.transfer.clock.database_now(), ..state };
            database.keep_states(lock, &[state]).await?;
        }
        Ok(Ok(()))
    }
}

impl Cleanup {
    /// The content of a tenant's folder, read now.
    async fn read_folder(&self, tenant: &Tenant) -> Result<Snapshot, CleanupError> {
        match call_patiently(|| self.upstream.snapshot(tenant, None, Lane::Migration)).await? {
            Fetched::Changed(snapshot) => Ok(snapshot),
            Fetched::Unchanged => Err(UpstreamError::Malformed("it says unchanged").into()),
        }
    }
}

/// Whether the database owns the tenant, by its own phase.
fn owns(company: Option<&Company>) -> bool {
    company.is_some_and(|company| company.phase == Some(Phase::Database))
}
