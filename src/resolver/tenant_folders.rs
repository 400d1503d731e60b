//! Tenants' folders: which there are for certain, one made, one that is empty deleted.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::{Lane, ResolveError, Resolver, Want, WriteError};
use crate::{
    clock::Moment,
    phase::Phase,
    tenant::Tenant,
    tiers::{
        database::{StoreError, Told},
        upstream::{Removal, UpstreamError},
    },
};

/// Why a folder was not made or deleted.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// There is none.
    #[error("there is no such tenant")]
    Unknown,
    /// It has secrets.
    #[error("the tenant has secrets")]
    NotEmpty,
    /// The database keeps older versions of the secrets that it had.
    #[error("the database keeps the history of the tenant's secrets")]
    Kept,
    /// A tier that must take part failed.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl From<ResolveError> for FolderError {
    fn from(error: ResolveError) -> Self {
        Self::Write(error.into())
    }
}

impl From<StoreError> for FolderError {
    fn from(error: StoreError) -> Self {
        ResolveError::Database(Arc::new(error)).into()
    }
}

/// Which folders above the tenants' had no secrets of their own, and when that was read.
#[derive(Default)]
pub(super) struct Bare(tokio::sync::Mutex<HashMap<String, (Moment, bool)>>);

impl Bare {
    /// How long it is believed.
    const FOR: Duration = Duration::from_secs(60);
}

impl Resolver {
    /// Every tenant that `wanted` accepts, by name. Unlike [`Self::tenants`], it fails where one could be
    /// missing: a reader takes what is not in it for deleted.
    ///
    /// # Errors
    /// A tier that would know of more tenants cannot be asked, and has told no list for `database.max_stale`.
    pub async fn every_tenant(&self, wanted: impl Fn(&Tenant) -> bool) -> Result<Vec<Tenant>, ResolveError> {
        self.not_alone()?;
        let rows = self.database.companies().await.map_err(Arc::new)?;
        let mut tenants: Vec<Tenant> = rows.into_iter().map(|(company, _)| company.tenant).collect();
        if self.upstream().is_some() && self.policies().uses(Phase::owned_upstream) {
            let read = tokio::time::timeout(self.deadline(), self.tenant_directory.current(Lane::Interactive)).await;
            let list = match read.unwrap_or(Err(UpstreamError::TimedOut)) {
                Ok(list) => list,
                // As old as a copy of a folder may be.
                Err(error) => {
                    let (now, most) = (self.clock.moment(), self.policies().default_ages().database_max_stale);
                    let held = self.tenant_directory.held().filter(|list| now.since(list.read_at) < most);
                    held.ok_or(ResolveError::Upstream(error))?
                }
            };
            // A folder that is gone upstream may have left a row.
            tenants.retain(|tenant| !self.reads_upstream(tenant));
            tenants.extend(list.tenants.iter().filter(|tenant| self.reads_upstream(tenant)).cloned());
        }
        tenants.retain(wanted);
        tenants.sort_unstable_by(|one, other| one.as_str().cmp(other.as_str()));
        tenants.dedup();
        Ok(tenants)
    }

    /// Whether a folder above the tenants' folders is proved to have no secrets of its own. Upstream is asked
    /// once a minute, however often the answer is wanted.
    ///
    /// # Errors
    /// Upstream cannot be asked.
    pub async fn is_bare(&self, folder: &str) -> Result<bool, ResolveError> {
        self.not_alone()?;
        let Some(upstream) = self.upstream().filter(|_| self.policies().uses(Phase::owned_upstream)) else {
            return Ok(true);
        };
        let asking = async {
            let mut known = self.bare.0.lock().await;
            let now = self.clock.moment();
            if let Some((_, is_bare)) = known.get(folder).filter(|(at, _)| now.since(*at) < Bare::FOR) {
                return Ok(*is_bare);
            }
            let is_bare = match upstream.is_bare(folder).await {
                // What is there is not for us to know.
                Err(UpstreamError::Denied) => false,
                asked => asked.map_err(ResolveError::Upstream)?,
            };
            // There are as many folders as the path of the tenants' has names.
            known.insert(folder.to_owned(), (now, is_bare));
            Ok(is_bare)
        };
        tokio::time::timeout(self.deadline(), asking).await.unwrap_or(Err(ResolveError::TimedOut))
    }

    /// Makes a tenant's folder at its owner; one that is there stays as it is.
    ///
    /// # Errors
    /// [`FolderError`].
    pub async fn create_folder(self: &Arc<Self>, tenant: &Tenant) -> Result<(), FolderError> {
        self.not_alone()?;
        let (resolver, tenant) = (Arc::clone(self), tenant.clone());
        // To its end, whether or not the caller waits for it.
        let creating = async move {
            let _turn = resolver.turn(&tenant).await;
            if resolver.phase_now(&tenant).await?.owned_upstream() {
                let upstream = resolver.upstream.as_deref().ok_or(ResolveError::NoUpstream)?;
                upstream.create_folder(&tenant).await.map_err(WriteError::from)?;
                resolver.tenant_directory.add(&tenant);
            } else {
                resolver.database.create_tenant(&tenant).await?;
            }
            Ok(())
        };
        tokio::spawn(creating).await.unwrap_or(Err(ResolveError::Lost.into()))
    }

    /// Deletes a tenant's folder at its owner, if nothing is in it.
    ///
    /// # Errors
    /// [`FolderError`]; nothing has changed.
    pub async fn delete_empty_folder(self: &Arc<Self>, tenant: &Tenant) -> Result<(), FolderError> {
        self.not_alone()?;
        let (resolver, tenant) = (Arc::clone(self), tenant.clone());
        let deleting = async move {
            let turn = resolver.turn(&tenant).await;
            let phase = resolver.phase_now(&tenant).await?;
            let long = resolver.long_answer("");
            // As it is now: a secret that was made a moment ago must not go with the folder.
            let listing = resolver.resolve_all(&tenant, Want::Revalidated, &long).await?;
            let listing = listing.ok_or(FolderError::Unknown)?;
            let is_fresh = !phase.owned_upstream() || listing.age < resolver.deadline();
            if !listing.secrets.is_empty() || !listing.flaws.unusable.is_empty() || !listing.flaws.names.is_empty() {
                return Err(FolderError::NotEmpty);
            }
            if !is_fresh {
                return Err(ResolveError::TimedOut.into());
            }
            if !phase.owned_upstream() {
                return match resolver.database.remove_empty_tenant(&tenant).await? {
                    true => Ok(()),
                    false => Err(FolderError::Kept),
                };
            }
            let upstream = resolver.upstream.as_deref().ok_or(ResolveError::NoUpstream)?;
            let begun = resolver.database.begin_upstream_write(&tenant, resolver.deadline() * 2).await?;
            let removed = upstream.remove_folder(&tenant, Removal::Empty, Lane::Interactive).await;
            resolver.database.end_upstream_write(&begun.1, Told::Nothing).await?;
            if removed.is_ok() {
                resolver.tenant_directory.remove(&tenant);
            }
            resolver.snapshots.forget(&tenant);
            drop(turn);
            match removed {
                // Somebody has put something in it, or it holds what nobody is told of.
                Err(UpstreamError::Rejected { status: 409, .. }) => Err(FolderError::NotEmpty),
                removed => {
                    if removed.map_err(WriteError::from)? {
                        Ok(())
                    } else {
                        Err(FolderError::Unknown)
                    }
                }
            }
        };
        tokio::spawn(deleting).await.unwrap_or(Err(ResolveError::Lost.into()))
    }

    /// The phase of a tenant as the database tells it.
    async fn phase_now(&self, tenant: &Tenant) -> Result<Phase, FolderError> {
        let company = self.database.company(tenant).await?;
        let own = company.as_ref().and_then(|company| company.phase);
        self.keep_up(tenant, own).await?;
        Ok(self.policies().phase_of(tenant, own))
    }
}
