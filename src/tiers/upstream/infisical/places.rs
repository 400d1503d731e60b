//! Where folders lie: the tenants' in one folder, each shared folder where the configuration says.

use tokio::time::Instant;

use super::{
    Call, Config, Infisical, Lane, Meaning, UpstreamError,
    client::rejection,
    config::SharedFolder,
    wire::{self, same_folder},
};
use crate::{
    secret::SecretKey,
    tenant::Tenant,
    tiers::upstream::{Cause, Removal, Unstorable},
    withheld::Withheld,
};

/// The paths of the folders that are served, and what in them is not.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    /// The folder that contains a folder for each tenant.
    pub(super) tenants: String,
    shared: Vec<SharedFolder>,
    withheld: Withheld,
}

impl Places {
    pub(super) fn new(config: &Config, withheld: &Withheld) -> Self {
        let (tenants, shared) = (config.tenants_path.clone(), config.folders.clone());
        Self { tenants, shared, withheld: withheld.clone() }
    }

    /// The path of a tenant's folder; `None` for a shared folder that is not configured.
    pub(super) fn path(&self, tenant: &Tenant) -> Option<String> {
        match tenant.shared_folder() {
            None => Some(format!("{}/{tenant}", self.tenants.trim_end_matches('/'))),
            Some(name) => self.shared.iter().find(|shared| shared.name == name).map(|shared| shared.path.clone()),
        }
    }

    /// The folder above a tenant's, and its name there.
    fn split(&self, tenant: &Tenant) -> Option<(String, String)> {
        match tenant.shared_folder() {
            None => Some((self.tenants.clone(), tenant.as_str().to_owned())),
            Some(_) => split(&self.path(tenant)?).map(|(above, name)| (above.to_owned(), name.to_owned())),
        }
    }

    /// The configured shared folders.
    pub(super) fn shared(&self) -> impl Iterator<Item = (Tenant, &str)> {
        self.shared.iter().filter_map(|shared| Some((shared.tenant()?, shared.path.as_str())))
    }

    /// The shared folder at this path.
    pub(super) fn shared_at(&self, path: &str) -> Option<Tenant> {
        self.shared().find(|(_, place)| same_folder(place, path)).map(|(folder, _)| folder)
    }

    /// The longest path that a folder can have.
    pub(super) fn longest(&self) -> String {
        let of_tenant = format!("{}/{}", self.tenants.trim_end_matches('/'), "x".repeat(Tenant::MAX_LEN));
        let all = self.shared.iter().map(|shared| shared.path.clone()).chain([of_tenant]);
        all.max_by_key(String::len).unwrap_or_default()
    }

    /// Whether a secret of this name in this folder is a master key of ours.
    pub(super) fn withholds(&self, path: &str, name: &str) -> bool {
        self.withheld.has_at(path, self.shared_at(path).is_some(), name)
    }

    /// Whether any secret in this folder may be one.
    pub(super) fn withholds_any(&self, path: &str) -> bool {
        self.shared_at(path).is_some() || self.withheld.is_in(path)
    }
}

impl Infisical {
    /// The path of a tenant's folder.
    pub(super) fn folder(&self, tenant: &Tenant) -> Result<String, UpstreamError> {
        let hint = "no shared folder of that name is configured; add it as [[infisical.folders]]";
        let unknown = UpstreamError::Rejected { status: 404, cause: Cause::Rejected, hint };
        self.places.path(tenant).ok_or(unknown)
    }

    /// The path of a tenant's folder, where this secret in it may be written.
    pub(super) fn folder_of(&self, tenant: &Tenant, key: &SecretKey) -> Result<String, UpstreamError> {
        let folder = self.folder(tenant)?;
        match self.places.withholds(&folder, key.as_str()) {
            true => Err(Unstorable::Name("it is one of secretier's own master keys, by keys.sources").into()),
            false => Ok(folder),
        }
    }

    /// The folder above a tenant's, and its name there.
    pub(super) fn above(&self, tenant: &Tenant) -> Result<(String, String), UpstreamError> {
        let hint = "no shared folder of that name is configured; add it as [[infisical.folders]]";
        let unknown = UpstreamError::Rejected { status: 404, cause: Cause::Rejected, hint };
        self.places.split(tenant).ok_or(unknown)
    }

    /// The configured shared folders that are there. The list of a missing folder is empty, so the list of
    /// the one above tells; where we may not list that one, its folder is believed to be there.
    pub(super) async fn list_shared(&self, lane: Lane, deadline: Instant) -> Result<Vec<Tenant>, UpstreamError> {
        let (mut found, mut listed) = (Vec::new(), Vec::<(&str, Option<Vec<wire::Folder>>)>::new());
        for (folder, path) in self.places.shared() {
            let Some((above, name)) = split(path) else { continue };
            if !listed.iter().any(|(path, _)| *path == above) {
                let beside = match self.list_folders(above, None, lane, deadline).await {
                    Ok(beside) => Some(beside),
                    Err(UpstreamError::Denied) => None,
                    // Newer servers say so of a folder that is not there.
                    Err(UpstreamError::Rejected { status: 404, .. }) => Some(Vec::new()),
                    Err(error) => return Err(error),
                };
                listed.push((above, beside));
            }
            let beside = listed.iter().find(|(path, _)| *path == above).and_then(|(_, beside)| beside.as_ref());
            match beside.is_none_or(|beside| beside.iter().any(|folder| folder.name == name)) {
                true => found.push(folder),
                false => {
                    tracing::warn!(folder = path, "a folder of [[infisical.folders]] is not there; check its path")
                }
            }
        }
        Ok(found)
    }

    /// Refuses the removal of a folder that holds one of our master keys or, where only an empty one may go,
    /// any secret: an older server does not look.
    pub(super) async fn may_go(
        &self,
        folder: &str,
        what: Removal,
        lane: Lane,
        deadline: Instant,
    ) -> Result<(), UpstreamError> {
        if what == Removal::Whole && !self.places.withholds_any(folder) {
            return Ok(());
        }
        let refused = |hint| Err(UpstreamError::Rejected { status: 409, cause: Cause::Rejected, hint });
        let reply = self.list(Call::Read, folder, None, lane, deadline).await?;
        if reply.meaning != Meaning::Done {
            return if reply.problem.is_folder_not_found() { Ok(()) } else { Err(rejection(&reply)) };
        }
        let list = wire::read::<wire::SecretList<'_>>(&reply.body)?;
        if list.has_withheld(folder, &self.places)? {
            return refused("keys.sources names a secret in this folder; move it elsewhere first");
        }
        match what == Removal::Empty && list.has_own(folder) {
            true => refused("there are secrets in the folder; delete these first"),
            false => Ok(()),
        }
    }
}

/// The folder above a folder, and its name there.
fn split(path: &str) -> Option<(&str, &str)> {
    let (above, name) = path.rsplit_once('/')?;
    Some((if above.is_empty() { "/" } else { above }, name))
}
