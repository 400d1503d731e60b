//! Gives a tenant back to upstream without losing the writes that the database took meanwhile.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::sync::OnceCell;

use super::{folders::patiently as call_patiently, push::Push};
use crate::{
    clock::{Clock, Timestamp},
    log::process_name,
    phase::Phase,
    policy::Policies,
    secret::SecretKey,
    tenant::Tenant,
    tiers::{
        database::{Company, Database, Expected, Holder, JobLock, Own, Refusal, Step, StoreError, Switch, TenantState},
        upstream::{Lane, Upstream, UpstreamError},
    },
};

/// How often a rollback of a tenant under constant writes is tried, and the pause in between.
const ATTEMPTS: usize = 10;
const PAUSE: Duration = Duration::from_millis(300);

/// How to treat the writes that the database took since the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// They prevent the rollback.
    Refuse,
    /// They are written to upstream first.
    Push,
    /// They stay behind as older versions in the database, and are not served any more.
    Discard,
}

/// Whether a tenant may go back to a folder with values that were destroyed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterShred {
    /// It stays.
    Refuse,
    /// It goes back, and what its folder has is served again.
    GoBack,
}

/// A tenant that upstream owns again.
#[derive(Debug)]
pub struct RolledBack {
    /// The phase that holds for it now.
    pub phase: Phase,
    /// The secrets that were written to upstream, or left behind.
    pub writes: Vec<SecretKey>,
    /// Whether it was given back before, and is unchanged since.
    pub already: bool,
}

/// Why a tenant stays with the database. None of its secrets there have changed.
#[derive(Debug, thiserror::Error)]
pub enum RollbackError {
    /// The database does not own it.
    #[error("it is in phase {0} already; nothing is to be rolled back")]
    NotOwned(Phase),
    /// The database took writes since the switch.
    #[error(
        "the database took writes since the switch, which upstream lacks: {}. Add --push to write them to upstream \
         first, or --discard to leave them behind", list(.0)
    )]
    Written(Vec<SecretKey>),
    /// Its folder was there before it was shredded.
    #[error(
        "it was shredded at {}, and its folder upstream is from before that: what it holds would be served again. \
         Delete it there, or add --after-shred to go back to it", .0.to_rfc3339()
    )]
    Shredded(Timestamp),
    /// Its folder is not there.
    #[error("its folder was archived and removed; put it back with 'secretier migrate restore' first")]
    Archived,
    /// It has no folder, and no reason for that is noted.
    #[error(
        "upstream has no folder of it, so it would be left without its secrets. If the folder was archived, put it \
         back with 'secretier migrate restore'; else --push writes all that the database has to a new one"
    )]
    Missing,
    /// Folders are being removed, or another tenant is being given back.
    #[error(
        "{} is removing folders, putting them back or giving a tenant back just now, and has until {} to say that it \
         goes on; try again", .0.shown, .0.until.to_rfc3339()
    )]
    Busy(Holder),
    /// Another process has taken over.
    #[error(
        "another process that removes folders, or gives a tenant back, has taken over, because this one was not heard of \
         for a while; run the same command again"
    )]
    TakenOver,
    /// It is not known whether the tenant has a folder.
    #[error("whether upstream has a folder of it cannot be told, so nothing was switched")]
    Upstream(#[source] UpstreamError),
    /// Upstream could not hold all of it, or would read it in another way.
    #[error(
        "upstream cannot hold what is to be written to it, so nothing was written: {}. Change or delete these first, or \
         add --discard to leave what the database took behind", .0.join("; ")
    )]
    Unpushable(Vec<String>),
    /// Upstream was changed since the switch, in other secrets than those that are pushed.
    #[error(
        "upstream has something else than what is served, so nothing was written: {}. Make it the same there first, or \
         add --discard to give the tenant back to what upstream has", list(.0)
    )]
    Ahead(Vec<SecretKey>),
    /// Upstream reads back other values than those that were pushed.
    #[error(
        "what was written to upstream does not read back as it is served, so nothing was switched; what was written is \
         there: {}", list(.0)
    )]
    ReadBack(Vec<SecretKey>),
    /// Upstream refuses one of the writes.
    #[error(
        "{what} could not be written to upstream, so nothing was switched; what was written before it is there too"
    )]
    Push {
        /// The quoted name of a key, or the folder.
        what: String,
        /// Why.
        #[source]
        source: UpstreamError,
    },
    /// A value that is to be pushed does not open.
    #[error(
        "{0:?} does not open here, so it cannot be written to upstream; nothing was written. Its master key may be missing \
         here, see 'secretier keys status'"
    )]
    Unreadable(String),
    /// It is written to without a pause.
    #[error("it was written to each time it was about to be switched; try again")]
    Changing,
    /// There is no upstream to give it back to.
    #[error("neither [infisical] nor [directory] is configured, so there is nobody to give it back to")]
    NoUpstream,
    /// The database failed.
    #[error("the database tier failed")]
    Store(#[source] StoreError),
}

impl From<StoreError> for RollbackError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::LeaseLost => Self::TakenOver,
            error => Self::Store(error),
        }
    }
}

/// Everything that a rollback needs.
pub struct Rollback {
    /// The tenant's owner until the rollback.
    pub database: Arc<Database>,
    /// The tenant's owner after it.
    pub upstream: Option<Arc<dyn Upstream>>,
    /// The policies that decide owners.
    pub policies: Arc<Policies>,
    /// The clock.
    pub clock: Clock,
    folders: OnceCell<HashSet<Tenant>>,
}

impl Rollback {
    /// Rolls tenants of this database back to this upstream.
    #[must_use]
    pub fn new(
        database: Arc<Database>,
        upstream: Option<Arc<dyn Upstream>>,
        policies: Arc<Policies>,
        clock: Clock,
    ) -> Self {
        Self { database, upstream, policies, clock, folders: OnceCell::new() }
    }

    /// Gives a tenant back; one that was given back already stays as it is. Running instances
    /// follow, and the caller waits for them.
    ///
    /// # Errors
    /// [`RollbackError`].
    pub async fn roll_back(
        &self,
        tenant: &Tenant,
        writes: Writes,
        after: AfterShred,
    ) -> Result<RolledBack, RollbackError> {
        let upstream = self.upstream.as_ref().ok_or(RollbackError::NoUpstream)?;
        // Its folder must not be removed meanwhile.
        let lock = self.database.folders_lock(&process_name()).await?.map_err(RollbackError::Busy)?;
        let outcome =
            self.database.renewing(&lock, self.roll_back_under(&lock, &**upstream, tenant, writes, after)).await;
        self.database.end_job_lock(lock).await;
        outcome
    }

    async fn roll_back_under(
        &self,
        lock: &JobLock,
        upstream: &dyn Upstream,
        tenant: &Tenant,
        writes: Writes,
        after: AfterShred,
    ) -> Result<RolledBack, RollbackError> {
        for _ in 0..ATTEMPTS {
            let company = self.database.companies_of(std::slice::from_ref(tenant)).await?.remove(tenant);
            let own = company.as_ref().and_then(|company| company.phase);
            let phase = self.policies.phase_of(tenant, own);
            let before = self.database.migration_state(tenant).await?;
            if phase != Phase::Database {
                return match before.is_some_and(|state| state.step == Step::RolledBack) {
                    true => Ok(RolledBack { phase, writes: Vec::new(), already: true }),
                    false => Err(RollbackError::NotOwned(phase)),
                };
            }
            if writes != Writes::Push && before.as_ref().is_some_and(|state| state.step == Step::Archived) {
                return Err(RollbackError::Archived);
            }
            let to = self.phase_to_return_to(tenant, before.as_ref());
            let has_folder = self.has_folder(upstream, tenant).await?;
            if let Some(at) = shredded_since(company.as_ref(), before.as_ref())
                && has_folder
                && after == AfterShred::Refuse
            {
                return Err(RollbackError::Shredded(at));
            }
            let mut written =
                if has_folder { self.database.own_writes(tenant).await? } else { self.everything(tenant).await? };
            // Keys that a rule gives to the database stay there.
            let goes_back = |key: &SecretKey| self.policies.of(tenant, key, to).phase.owned_upstream();
            written.retain(|own| goes_back(&own.key));
            let keys: Vec<SecretKey> = written.iter().map(|own| own.key.clone()).collect();
            match writes {
                Writes::Push => {
                    let push = Push { database: &self.database, upstream, lock, tenant, goes_back: &goes_back };
                    push.push(&keys, has_folder).await?;
                }
                Writes::Refuse | Writes::Discard if !has_folder && !keys.is_empty() => {
                    return Err(RollbackError::Missing);
                }
                Writes::Refuse if !keys.is_empty() => return Err(RollbackError::Written(keys)),
                Writes::Refuse | Writes::Discard => {}
            }
            let now = self.clock.database_now();
            let state = before.unwrap_or_else(|| TenantState::new(tenant.clone(), "", Step::RolledBack, now));
            let state = TenantState {
                step: Step::RolledBack,
                switched_at: None,
                updated_at: now,
                reason: None,
                error: None,
                ..state
            };
            // A write since then raises the generation, so the switch fails and it is looked at
            // too.
            let switch = Switch { expected: Expected::of(company.as_ref()), to, state };
            match self.database.switch(lock, &[switch]).await?.remove(0) {
                Ok(()) => {}
                Err(Refusal::Changed | Refusal::WriteUnderWay { .. } | Refusal::Unverified(_)) => {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            }
            return Ok(RolledBack { phase: self.policies.phase_of(tenant, to), writes: keys, already: false });
        }
        Err(RollbackError::Changing)
    }

    /// The tenants among these whose folders hold values that were destroyed here since.
    ///
    /// # Errors
    /// [`RollbackError`].
    pub async fn shredded(&self, tenants: &[Tenant]) -> Result<Vec<Tenant>, RollbackError> {
        let upstream = self.upstream.as_ref().ok_or(RollbackError::NoUpstream)?;
        let companies = self.database.companies_of(tenants).await?;
        let mut shredded = Vec::new();
        for tenant in tenants {
            let Some(company) = companies.get(tenant).filter(|company| company.shredded_at().is_some()) else {
                continue;
            };
            let is_owned = self.policies.phase_of(tenant, company.phase) == Phase::Database;
            let state = self.database.migration_state(tenant).await?;
            if is_owned
                && shredded_since(Some(company), state.as_ref()).is_some()
                && self.has_folder(&**upstream, tenant).await?
            {
                shredded.push(tenant.clone());
            }
        }
        Ok(shredded)
    }

    /// Whether a tenant has a folder. Folders are listed once, however many tenants go back: one
    /// that a clean-up removes meanwhile is noted as archived.
    async fn has_folder(&self, upstream: &dyn Upstream, tenant: &Tenant) -> Result<bool, RollbackError> {
        let list = async || {
            let listed = call_patiently(|| upstream.tenants(Lane::Interactive)).await;
            let folders = listed.map_err(RollbackError::Upstream)?;
            Ok::<_, RollbackError>(folders.tenants.into_iter().collect::<HashSet<_>>())
        };
        Ok(self.folders.get_or_try_init(list).await?.contains(tenant))
    }

    /// Every value that the database has: all of them are to be pushed where there is no
    /// folder to go back to.
    async fn everything(&self, tenant: &Tenant) -> Result<Vec<Own>, StoreError> {
        let secrets = self.database.find_all(tenant).await?.secrets;
        Ok(secrets.into_iter().map(|(key, held)| Own { key, held }).collect())
    }

    /// The tenant's own phase from before the switch, where upstream owned it in that phase.
    fn phase_to_return_to(&self, tenant: &Tenant, state: Option<&TenantState>) -> Option<Phase> {
        let before = state.and_then(|state| state.phase_before);
        let gives_back = self.policies.phase_of(tenant, before).owned_upstream();
        if state.is_some() && gives_back { before } else { Some(Phase::Infisical) }
    }
}

/// When a tenant was shredded, unless its folder was taken over since: then the folder holds
/// nothing from before the shredding that was not served after it.
fn shredded_since(company: Option<&Company>, state: Option<&TenantState>) -> Option<Timestamp> {
    let at = company?.shredded_at()?;
    let switched_at = state.and_then(|state| state.switched_at);
    switched_at.is_none_or(|switched_at| switched_at <= at).then_some(at)
}

pub(super) fn list(keys: &[SecretKey]) -> String {
    keys.iter().map(|key| format!("{:?}", key.as_str())).collect::<Vec<_>>().join(", ")
}
