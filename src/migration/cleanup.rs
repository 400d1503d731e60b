//! Removing the folders of tenants that have lived in the database long enough, and
//! putting them back.

use std::{path::Path, sync::Arc, time::Duration};

use super::{
    archive::{Archive, ArchiveError, Archived},
    folders::patiently as call_patiently,
    origin::{OriginError, ProblemKind},
    sides::{Sides, patiently},
    verify::{Compared, Kind, switched},
};
use crate::{
    clock::Timestamp,
    log,
    tenant::Tenant,
    tiers::{
        database::{Step, StoreError, TenantState},
        upstream::{Lane, Upstream, UpstreamError},
    },
};

/// What a clean-up works with.
pub struct Cleanup {
    /// Where tenants were and where they are.
    pub sides: Sides,
    /// Where the folders go from.
    pub upstream: Arc<dyn Upstream>,
    /// The environment.
    pub environment: String,
}

/// What became of a tenant's folder.
#[derive(Debug)]
pub struct Cleaned {
    /// Whose it was.
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
    #[error("Infisical does not answer any more; run the same command again to go on")]
    Upstream(#[from] UpstreamError),
    /// The database failed.
    #[error("the database tier failed")]
    Store(#[from] StoreError),
}

impl Cleanup {
    /// The tenants that were switched at least so long ago, and still are the database's.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn due(
        &self,
        older_than: Duration,
        is_meant: impl Fn(&Tenant) -> bool,
    ) -> Result<Vec<TenantState>, StoreError> {
        let database = &self.sides.database;
        let states = database.migration_states().await?;
        let tenants: Vec<Tenant> = states.iter().map(|state| state.tenant.clone()).collect();
        let companies = database.companies_of(&tenants).await?;
        let now = self.sides.clock.now();
        let is_due = |state: &TenantState| {
            state.step == Step::Switched
                && state.switched_at.is_some_and(|at| at <= now && now.since(at) >= older_than)
                && is_meant(&state.tenant)
        };
        Ok(switched(states, &companies).into_iter().filter(is_due).collect())
    }

    /// Archives and removes the folders of these tenants, one by one: each is compared
    /// again first, and stays where that finds that Infisical is ahead.
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
            let tenant = state.tenant.clone();
            let outcome = self.remove(&mut archive, &tenant).await?;
            if outcome.is_ok() {
                let now = self.sides.clock.now();
                let state = TenantState { step: Step::Archived, updated_at: now, ..state };
                patiently(|| self.sides.database.keep_states(std::slice::from_ref(&state))).await?;
            }
            let one = Cleaned { tenant, outcome };
            told(&one);
            cleaned.push(one);
        }
        Ok(cleaned)
    }

    async fn remove(&self, archive: &mut Archive, tenant: &Tenant) -> Result<Result<usize, String>, CleanupError> {
        let content = match self.sides.origin.read(std::slice::from_ref(tenant)).await.pop() {
            Some(Ok(content)) => content,
            // It went, and a crash kept us from noting it; or somebody else has removed it.
            Some(Err(OriginError::Missing)) | None => return Ok(Ok(0)),
            Some(Err(OriginError::Upstream(UpstreamError::Denied))) => {
                return Ok(Err("Infisical refuses its folder to us".to_owned()));
            }
            Some(Err(OriginError::Upstream(error))) => return Err(error.into()),
            Some(Err(error)) => return Ok(Err(log::chain(&error))),
        };
        // The archive has what the folder gives: of what is left out, nothing would be left.
        let lost = content.problems.iter().find(|problem| problem.kind != ProblemKind::Reference);
        if let Some(problem) = lost {
            return Ok(Err(format!("the archive would not have it: {problem}")));
        }
        let Compared { drift, error, .. } = self.sides.compare_content(tenant, &content).await?;
        if let Some(error) = error {
            return Ok(Err(error));
        }
        let ahead = drift.iter().find(|drift| !matches!(drift.what, Kind::WrittenHere | Kind::DeletedHere));
        if let Some(drift) = ahead {
            return Ok(Err(format!("{:?} was {}", drift.key, drift.what.as_str())));
        }
        let now: Timestamp = self.sides.clock.now();
        archive.add(&self.sides.database.keys().ring(), tenant, &content.snapshot, now)?;
        match call_patiently(|| self.upstream.remove_folder(tenant, Lane::Migration)).await {
            Ok(_) => Ok(Ok(content.snapshot.secrets.len())),
            Err(error @ (UpstreamError::Denied | UpstreamError::Rejected { .. } | UpstreamError::AwaitsApproval)) => {
                Ok(Err(format!("Infisical did not remove it: {}", log::chain(&error))))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes an archived folder back. What the folder has of another name stays.
    ///
    /// # Errors
    /// [`CleanupError`]; the same command may be run again.
    pub async fn restore(&self, archived: &Archived) -> Result<(), CleanupError> {
        for (key, value) in &archived.secrets {
            call_patiently(|| self.upstream.put(&archived.tenant, key, value)).await?;
        }
        let database = &self.sides.database;
        let state = database.migration_state(&archived.tenant).await?;
        if let Some(state) = state.filter(|state| state.step == Step::Archived) {
            let state = TenantState { step: Step::Switched, updated_at: self.sides.clock.now(), ..state };
            database.keep_states(&[state]).await?;
        }
        Ok(())
    }
}
