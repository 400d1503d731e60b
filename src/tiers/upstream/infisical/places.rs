//! Where folders lie: the tenants' in one folder, each shared folder where the configuration says.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::Instant;

use super::{
    Call, Config, Infisical, Lane, Meaning, UpstreamError,
    client::rejection,
    config::SharedFolder,
    wire::{self, same_folder},
};
use crate::{
    clock::Moment,
    secret::SecretKey,
    tenant::Tenant,
    tiers::upstream::{Cause, Removal, Unstorable},
    withheld::Withheld,
};

/// The answer for a shared folder that is in no `[[infisical.folders]]`.
const NOT_CONFIGURED: UpstreamError = UpstreamError::Rejected {
    status: 404,
    cause: Cause::Rejected,
    hint: "no shared folder of that name is configured; add it as [[infisical.folders]]",
};

/// How long the list of a folder above shared ones is believed.
const BELIEVED_FOR: Duration = Duration::from_secs(60);

/// The names of the folders in a folder; `None` where we may not list it.
type Names = Option<HashSet<String>>;

/// The folders above shared ones, as they were last listed; at most as many as there are shared folders.
pub(super) type Beside = Mutex<HashMap<String, (Moment, Names)>>;

/// The paths of the folders that are served, and what in them is not.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    /// The folder that contains a folder for each tenant.
    pub(super) tenants: String,
    shared: Vec<SharedFolder>,
    /// Folders that values may refer to.
    references: Vec<String>,
    withheld: Withheld,
}

impl Places {
    pub(super) fn new(config: &Config, withheld: &Withheld) -> Self {
        let (tenants, shared) = (config.tenants_path.clone(), config.folders.clone());
        Self { tenants, shared, references: config.references.clone(), withheld: withheld.clone() }
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

    /// Whether this folder is for others than one tenant: what lies in it is told to many.
    fn is_common(&self, path: &str) -> bool {
        self.shared_at(path).is_some() || self.is_referred_to(path)
    }

    /// Whether values of all tenants may refer to this folder.
    fn is_referred_to(&self, path: &str) -> bool {
        self.references.iter().any(|place| same_folder(place, path))
    }

    /// Whether a secret of this name in this folder is a master key of ours.
    pub(super) fn withholds(&self, path: &str, name: &str) -> bool {
        self.withheld.has_at(path, self.is_common(path), name)
    }

    /// Whether any secret in this folder may be one.
    pub(super) fn withholds_any(&self, path: &str) -> bool {
        self.withheld.is_in(path) || (self.withholds_names() && self.is_common(path))
    }

    /// Whether an imported secret of this name is one, wherever it was imported from.
    pub(super) fn withholds_name(&self, name: &str) -> bool {
        self.withheld.has_name(name)
    }

    /// Whether there is such a name.
    pub(super) fn withholds_names(&self) -> bool {
        !self.withheld.is_empty()
    }
}

impl Infisical {
    /// The path of a tenant's folder.
    pub(super) fn folder(&self, tenant: &Tenant) -> Result<String, UpstreamError> {
        self.places.path(tenant).ok_or(NOT_CONFIGURED)
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
        self.places.split(tenant).ok_or(NOT_CONFIGURED)
    }

    /// The configured shared folders that are there. The list of a missing folder is empty, so the list of
    /// the one above tells; where we may not list that one, its folders are believed to be there. A list is
    /// believed for a minute, and longer where it cannot be read again: it must not fail the tenants' list.
    pub(super) async fn list_shared(&self, lane: Lane, deadline: Instant) -> Result<Vec<Tenant>, UpstreamError> {
        let places: Vec<(Tenant, &str, (&str, &str))> =
            self.places.shared().filter_map(|(folder, path)| Some((folder, path, split(path)?))).collect();
        let mut above: Vec<&str> = places.iter().map(|(_, _, (above, _))| *above).collect();
        above.sort_unstable();
        above.dedup();
        let lists = above.iter().map(|above| self.names_in(above, lane, deadline));
        let mut listed = BTreeMap::new();
        for (above, names) in above.iter().zip(join_all(lists).await) {
            listed.insert(*above, names?);
        }
        let mut found = Vec::new();
        for (folder, path, (above, name)) in places {
            match listed[above].as_ref().is_none_or(|names| names.contains(name)) {
                true => found.push(folder),
                false => {
                    tracing::warn!(folder = path, "a folder of [[infisical.folders]] is not there; check its path")
                }
            }
        }
        Ok(found)
    }

    /// The names of the folders in a folder; `None` where we may not list it.
    async fn names_in(&self, above: &str, lane: Lane, deadline: Instant) -> Result<Names, UpstreamError> {
        let now = self.clock.moment();
        let held = self.beside.lock().unwrap_or_else(PoisonError::into_inner).get(above).cloned();
        if let Some((read_at, names)) = &held
            && now.since(*read_at) < BELIEVED_FOR
        {
            return Ok(names.clone());
        }
        let names: Names = match self.list_folders(above, None, lane, deadline).await {
            Ok(folders) => Some(folders.into_iter().map(|folder| folder.name).collect()),
            Err(UpstreamError::Denied) => None,
            // Newer servers say so of a folder that is not there.
            Err(UpstreamError::Rejected { status: 404, .. }) => Some(HashSet::new()),
            Err(error) => return held.map(|(_, names)| names).ok_or(error),
        };
        self.beside.lock().unwrap_or_else(PoisonError::into_inner).insert(above.to_owned(), (now, names.clone()));
        Ok(names)
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
        let refused = |hint| Err(UpstreamError::Rejected { status: 409, cause: Cause::Rejected, hint });
        if what == Removal::Whole && self.places.is_referred_to(folder) {
            return refused("values of tenants refer to this folder (infisical.references), so it stays");
        }
        if what == Removal::Whole && !self.places.withholds_any(folder) {
            return Ok(());
        }
        let reply = self.list(Call::Read, folder, None, lane, deadline).await?;
        if reply.meaning != Meaning::Done {
            return if reply.problem.is_folder_not_found() { Ok(()) } else { Err(rejection(&reply)) };
        }
        let list = wire::read::<wire::SecretList<'_>>(&reply.body)?;
        if list.has_withheld(folder, &self.places) {
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
