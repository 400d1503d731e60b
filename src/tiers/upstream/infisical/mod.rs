//! Infisical's HTTP API, in a form that both its older and its newer servers understand.

mod auth;
mod budget;
mod call;
mod client;
mod config;
mod examine;
mod folders;
mod overview;
mod patience;
mod places;
mod retry_after;
mod shared;
mod state;
mod status;
mod storable;
mod webhook;
mod wire;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::{BoxFuture, FutureExt as _};
use http::Method;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::time::Instant;

use self::{
    call::Call,
    client::{Client, Meaning, Reply, Request, rejection},
    overview::LookingOver,
    places::{Beside, Places},
    shared::{Held, Missing, Read, SharedFolders, texts_of},
    wire::Project,
};
pub use self::{
    config::{Config, SharedFolder},
    webhook::Webhook,
};
use super::{
    Before, BuildError, Cause, ChangedFolder, Everything, Fetched, Folders, Health, Lane, Oddity, OddityKind, Overview,
    Reconfigured, Removal, Snapshot, ToldFlaws, Unstorable, Upstream, UpstreamError, settings,
};
use crate::{
    clock::{Clock, Timestamp},
    diagnosis::Area,
    flaws::Unusable,
    metrics::Metrics,
    references::{self, Rules, Texts},
    secret::{SecretKey, SecretValue},
    tenant::Tenant,
    withheld::Withheld,
};

/// Infisical as the upstream tier: one environment of one project.
pub struct Infisical {
    client: Client,
    project_id: String,
    environment: String,
    places: Places,
    beside: Beside,
    /// Whether the server was found to know only the newer of two routes.
    newer_folders: AtomicBool,
    newer_secrets: AtomicBool,
    /// Until when the server is taken to report changed folders, and until when it is taken not to.
    tells_until: AtomicU64,
    ignores_until: AtomicU64,
    rules: Rules,
    shared: SharedFolders,
    told: ToldFlaws,
    looking_over: LookingOver,
    webhook: Option<Arc<Webhook>>,
    clock: Clock,
    metrics: Arc<Metrics>,
}

/// How long a finding about a server is valid: it may be replaced by a newer one.
const FOUND_OUT_FOR: Duration = Duration::from_secs(60 * 60);

/// Ahead of any clock that is not altogether wrong: nothing was changed after that.
const WELL_AHEAD: Duration = Duration::from_secs(366 * 24 * 60 * 60);

impl Infisical {
    /// Sets up the client; calls nothing.
    ///
    /// # Errors
    /// [`BuildError`] where a setting is wrong, or TLS cannot be set up.
    pub fn build(
        config: Config,
        environment: String,
        withheld: &Withheld,
        client_secret: SecretValue,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BuildError> {
        config.check()?;
        Ok(Self {
            webhook: Webhook::build(&config, &environment)?.map(Arc::new),
            rules: Rules::new(&environment, config.references.iter().cloned()),
            shared: SharedFolders::new(config.references.iter().cloned(), clock.clone()),
            told: ToldFlaws::default(),
            looking_over: LookingOver::default(),
            metrics: Arc::clone(&metrics),
            project_id: config.project_id.clone(),
            places: Places::new(&config, withheld),
            beside: Beside::default(),
            environment,
            newer_folders: AtomicBool::new(false),
            newer_secrets: AtomicBool::new(false),
            tells_until: AtomicU64::new(0),
            ignores_until: AtomicU64::new(0),
            clock: clock.clone(),
            client: Client::build(config, client_secret, clock, metrics)?,
        })
    }
}

impl Upstream for Infisical {
    fn tenants(&self, lane: Lane) -> BoxFuture<'_, Result<Folders, UpstreamError>> {
        self.in_time(move |deadline| async move {
            let mut folders = self.list_tenants(lane, deadline).await?;
            folders.tenants.extend(self.list_shared(lane, deadline).await?);
            Ok(folders)
        })
    }

    fn serves(&self, tenant: &Tenant) -> bool {
        self.places.path(tenant).is_some()
    }

    fn withholds(&self, tenant: &Tenant, key: &SecretKey) -> bool {
        self.places.path(tenant).is_some_and(|path| self.places.withholds(&path, key.as_str()))
    }

    fn snapshot<'a>(
        &'a self,
        tenant: &'a Tenant,
        known: Option<&'a str>,
        lane: Lane,
    ) -> BoxFuture<'a, Result<Fetched, UpstreamError>> {
        self.by(self.client.read_deadline(), async move |deadline| {
            let folder = self.folder(tenant)?;
            match self.list_secrets(Call::Snapshot, &folder, known, lane, deadline).await? {
                Fetched::Changed(snapshot) => {
                    Ok(Fetched::Changed(self.with_references(&folder, snapshot, lane, deadline).await))
                }
                Fetched::Unchanged => Ok(Fetched::Unchanged),
            }
        })
    }

    fn resolve<'a>(&self, tenant: &Tenant, mut texts: Texts<'a>) -> HashMap<&'a str, references::Resolved> {
        let folder = self.places.path(tenant).unwrap_or_default();
        // A copy may be from a time before the configuration named it.
        texts.retain(|name, _| !self.places.withholds(&folder, name));
        let mut held: BTreeMap<String, Option<Arc<Held>>> = BTreeMap::new();
        loop {
            let folders = folders_of(&folder, &texts, &held);
            let needed = references::folders_needed(&self.rules, &folders);
            if needed.is_empty() {
                let mut resolved = references::resolve(&self.rules, &folders);
                // The last one that was read, whatever the clocks did. Of its two readings, that of
                // the wall clock is not repeated by a process that starts anew.
                let last = held.values().flatten().map(|held| held.read_at()).max_by_key(|at| at.running());
                let others = last.map(|at| at.wall().as_millis().cast_unsigned());
                let of = |name: &&'a str| {
                    let resolved = resolved.remove(*name)?;
                    Some((*name, references::Resolved { others: others.unwrap_or(0), ..resolved }))
                };
                return texts.keys().filter_map(of).collect();
            }
            held.extend(needed.into_iter().map(|path| {
                let now = self.shared.now(&path);
                (path, now)
            }));
        }
    }

    fn everything(&self, lane: Lane) -> BoxFuture<'_, Result<Everything, UpstreamError>> {
        self.by(self.client.late_deadline(), move |deadline| self.list_everything(lane, deadline))
    }

    fn changed_since(
        &self,
        since: Timestamp,
        lane: Lane,
    ) -> BoxFuture<'_, Result<Option<Vec<ChangedFolder>>, UpstreamError>> {
        self.in_time(move |deadline| self.list_changed(since, lane, deadline))
    }

    fn overview<'a>(&'a self, known: Option<&'a str>, lane: Lane) -> BoxFuture<'a, Result<Overview, UpstreamError>> {
        self.by(self.client.late_deadline(), move |deadline| self.look_over(known, lane, deadline))
    }

    fn check(&self, key: &SecretKey, value: Option<&SecretValue>) -> Result<(), Unstorable> {
        // The result must not depend on the tenant: room is left for the longest name.
        self.check_in(&self.places.longest(), key, value)
    }

    fn put<'a>(
        &'a self,
        tenant: &'a Tenant,
        key: &'a SecretKey,
        value: &'a SecretValue,
    ) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        self.in_time(move |deadline| self.put_one(tenant, key, value, deadline))
    }

    fn delete<'a>(&'a self, tenant: &'a Tenant, key: &'a SecretKey) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        self.in_time(move |deadline| self.remove(tenant, key, deadline))
    }

    fn create_folder<'a>(&'a self, tenant: &'a Tenant) -> BoxFuture<'a, Result<(), UpstreamError>> {
        self.in_time(move |deadline| self.make_folder(tenant, deadline))
    }

    fn remove_folder<'a>(
        &'a self,
        tenant: &'a Tenant,
        removal: Removal,
        lane: Lane,
    ) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        self.in_time(move |deadline| self.delete_folder(tenant, removal, lane, deadline))
    }

    fn read<'a>(
        &'a self,
        folder: &'a str,
        names: &'a [&'a str],
        lane: Lane,
    ) -> BoxFuture<'a, Result<Vec<Option<SecretValue>>, UpstreamError>> {
        self.in_time(move |deadline| self.read_some(folder, names, lane, deadline))
    }

    fn is_bare<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        self.in_time(move |deadline| self.has_no_secrets(folder, deadline))
    }

    fn write<'a>(
        &'a self,
        folder: &'a str,
        name: &'a SecretKey,
        value: &'a SecretValue,
    ) -> BoxFuture<'a, Result<(), UpstreamError>> {
        self.in_time(move |deadline| async move {
            check_folder(folder)?;
            self.check_in(folder, name, Some(value))?;
            let (_, reply) = self.change_or_create(folder, name, value, deadline).await?;
            written(&reply)
        })
    }

    fn share_budget(&self, is_shared: bool) {
        self.client.share(is_shared);
    }

    fn resume_budget(&self, before: Before) {
        match before {
            Before::Told { whole_in, book } => self.client.budget().resume(whole_in, book),
            Before::Unknown => self.client.budget().resume_in_doubt(),
        }
    }

    fn reconfigure(&self, settings: settings::Config<'_>) -> Result<Reconfigured<'_>, BuildError> {
        // Another kind of upstream needs a restart.
        let settings::Config::Infisical(settings) = settings else { return Ok(Reconfigured::unchanged()) };
        settings.check()?;
        let secret = settings.client_secret.resolve().map_err(BuildError::secret("infisical.client_secret"))?;
        let prepared = self.client.prepare(settings, secret)?;
        let has_new_login = prepared.has_new_login();
        Ok(Reconfigured::new(has_new_login, move || self.client.apply(prepared)))
    }

    fn reads_references(&self) -> bool {
        true
    }

    fn webhook(&self) -> Option<Arc<dyn super::Webhook>> {
        self.webhook.clone().map(|webhook| webhook as Arc<dyn super::Webhook>)
    }

    fn health(&self) -> Health {
        self.client.health()
    }

    fn notice_recovery(&self) -> BoxFuture<'_, ()> {
        self.client.notice_recovery().boxed()
    }

    fn examine<'a>(&'a self, settings: settings::Config<'a>, area: &'a Area) -> BoxFuture<'a, ()> {
        async move {
            if let settings::Config::Infisical(settings) = settings {
                self.examine_all(settings, area).await;
            }
        }
        .boxed()
    }
}

impl Infisical {
    async fn list_tenants(&self, lane: Lane, deadline: Instant) -> Result<Folders, UpstreamError> {
        let misplaced = |error| self.client.state.misplaced(error);
        let folders = self.list_folders(&self.places.tenants, None, lane, deadline).await.map_err(misplaced)?;
        // A missing folder lists like an empty one. A mistyped path must not prove every tenant
        // absent.
        if folders.is_empty()
            && let Some((parent, name)) = self.places.tenants.rsplit_once('/').filter(|(_, name)| !name.is_empty())
        {
            let parent = if parent.is_empty() { "/" } else { parent };
            let beside = self.list_folders(parent, None, lane, deadline).await.map_err(misplaced)?;
            if !beside.iter().any(|folder| folder.name == name) {
                let hint = "infisical.tenants_path does not exist there; check it";
                let cause = Cause::TenantsPath;
                return Err(misplaced(UpstreamError::Rejected { status: 404, cause, hint }));
            }
        }
        let mut listed = Folders::default();
        for folder in folders {
            match Tenant::company(&folder.name) {
                Ok(tenant) => listed.tenants.push(tenant),
                Err(_) => listed.unusable.push(folder.name),
            }
        }
        if !listed.tenants.is_empty() {
            self.client.state.found_something();
        }
        listed.tenants.sort_unstable();
        listed.unusable.sort_unstable();
        if !listed.unusable.is_empty() {
            tracing::debug!(skipped = listed.unusable.len(), "folders were skipped whose names cannot name a tenant");
        }
        Ok(listed)
    }

    /// A server that does not know the parameter answers with all folders, as if it had not been
    /// given. So a server that names some folders is asked once for the changes of a time a year
    /// from now; if it names some again, its answer is not used.
    async fn list_changed(
        &self,
        since: Timestamp,
        lane: Lane,
        deadline: Instant,
    ) -> Result<Option<Vec<ChangedFolder>>, UpstreamError> {
        let now = self.clock.running().as_secs();
        if now < self.ignores_until.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let found_out = |until: &AtomicU64| until.store(now + FOUND_OUT_FOR.as_secs(), Ordering::Relaxed);
        let folders = match self.list_folders(&self.places.tenants, Some(since), lane, deadline).await {
            Ok(folders) => folders,
            Err(UpstreamError::Rejected { .. }) => {
                found_out(&self.ignores_until);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        // Either kind of server names no folder where nothing was changed, or nothing exists.
        if !folders.is_empty() && now >= self.tells_until.load(Ordering::Relaxed) {
            let ahead = self.clock.now().plus(WELL_AHEAD);
            let control = self.list_folders(&self.places.tenants, Some(ahead), lane, deadline).await?;
            if !control.is_empty() {
                tracing::info!("the upstream does not tell which folders have changed; copies are compared instead");
                found_out(&self.ignores_until);
                return Ok(None);
            }
            found_out(&self.tells_until);
        }
        let mut changed: HashMap<Tenant, Option<Timestamp>> = HashMap::new();
        for folder in &folders {
            let at = folder.last_secret_modified.as_deref().and_then(Timestamp::from_rfc3339);
            for tenant in self.tenants_of(folder) {
                let last = changed.entry(tenant).or_default();
                *last = at.max(*last);
            }
        }
        Ok(Some(changed.into_iter().map(|(tenant, at)| ChangedFolder { tenant, at }).collect()))
    }

    /// The tenants that this folder may belong to, itself or as a folder above it. Servers differ
    /// in where its path begins, so both are returned: the tenant seen from the tenants' folder,
    /// and the one seen from the root.
    fn tenants_of(&self, folder: &wire::Folder) -> impl Iterator<Item = Tenant> {
        let path = folder.relative_path.as_deref().unwrap_or(&folder.name);
        let whole = path.strip_prefix(self.places.tenants.trim_end_matches('/')).filter(|rest| rest.starts_with('/'));
        let first = |path: &str| path.trim_start_matches('/').split('/').next()?.parse().ok();
        [Some(path), whole].into_iter().flatten().filter_map(first)
    }

    async fn list_folders(
        &self,
        path: &str,
        changed_since: Option<Timestamp>,
        lane: Lane,
        deadline: Instant,
    ) -> Result<Vec<wire::Folder>, UpstreamError> {
        let route = |newer| {
            let mut query = vec![
                (project_parameter(newer), self.project_id.clone()),
                ("environment", self.environment.clone()),
                ("path", path.to_owned()),
            ];
            if let Some(since) = changed_since {
                query.push(("recursive", "true".to_owned()));
                query.push(("lastSecretModified", since.to_rfc3339()));
            }
            Ok(Request {
                call: Call::Folders,
                method: Method::GET,
                path: folders_path(newer).to_owned(),
                query,
                body: None,
                known: None,
            })
        };
        let reply = self.call(&self.newer_folders, route, lane, deadline).await?;
        if reply.meaning != Meaning::Done {
            return Err(rejection(&reply));
        }
        Ok(wire::read::<wire::FolderList>(&reply.body)?.folders)
    }

    /// Replaces the references in a folder's texts. Other folders that they refer to are read, each
    /// once for all of them; a folder that cannot be read affects only the texts that refer to it.
    async fn with_references(&self, folder: &str, mut snapshot: Snapshot, lane: Lane, deadline: Instant) -> Snapshot {
        if snapshot.secrets.iter().any(|secret| references::refers(secret.value.expose())) {
            let mut held: BTreeMap<String, Option<Arc<Held>>> = BTreeMap::new();
            loop {
                let needed = {
                    let texts = texts_of(&snapshot);
                    references::folders_needed(&self.rules, &folders_of(folder, &texts, &held))
                };
                if needed.is_empty() {
                    break;
                }
                for path in needed {
                    let read = self.shared_folder(&path, lane, deadline).await;
                    snapshot.fell_short |= matches!(read, Err(Missing::Failed));
                    held.insert(path, read.ok());
                }
            }
            self.resolve_in(folder, &mut snapshot, &held);
        }
        self.told.tell(folder, &snapshot.oddities);
        snapshot
    }

    fn resolve_in(&self, folder: &str, snapshot: &mut Snapshot, held: &BTreeMap<String, Option<Arc<Held>>>) {
        let mut resolved: HashMap<String, references::Resolved> = {
            let texts = texts_of(snapshot);
            let resolved = references::resolve(&self.rules, &folders_of(folder, &texts, held));
            resolved.into_iter().map(|(name, resolved)| (name.to_owned(), resolved)).collect()
        };
        let mut odd = Vec::new();
        snapshot.secrets.retain_mut(|secret| {
            let Some(resolved) = resolved.remove(secret.key.as_str()) else { return true };
            let oddity = |kind| Oddity { name: secret.key.as_str().to_owned(), kind };
            odd.extend(resolved.unresolved.map(|reason| oddity(OddityKind::Reference(reason))));
            let Some(value) = resolved.value else {
                odd.push(oddity(OddityKind::Unusable(Unusable::Reference)));
                return false;
            };
            secret.text = Some(std::mem::replace(&mut secret.value, value));
            true
        });
        for Oddity { kind, .. } in &odd {
            if let OddityKind::Reference(reason) = kind {
                self.metrics.count("secretier_references_unresolved_total", &[("reason", reason.as_str())]);
            }
        }
        snapshot.oddities.append(&mut odd);
        snapshot.oddities.sort();
        if !held.is_empty() {
            // An unchanged folder would prove nothing about the others.
            snapshot.etag = None;
        }
    }

    async fn shared_folder(&self, path: &str, lane: Lane, deadline: Instant) -> Result<Arc<Held>, Missing> {
        // The rest of the time is for folders that refer to nothing there.
        let left = deadline.saturating_duration_since(Instant::now());
        let deadline = Instant::now() + left / 2;
        let read = async |before: Option<Arc<Held>>| {
            let known = before.as_ref().and_then(|before| before.etag());
            match self.list_secrets(Call::Read, path, known, lane, deadline).await {
                Ok(Fetched::Changed(snapshot)) => Read::Changed(snapshot),
                Ok(Fetched::Unchanged) => Read::Unchanged,
                Err(error) => {
                    tracing::warn!(folder = path, %error, "a folder that values refer to cannot be read");
                    match error {
                        UpstreamError::Denied | UpstreamError::Rejected { .. } => Read::Refused,
                        _ => Read::Failed,
                    }
                }
            }
        };
        let reading = tokio::time::timeout_at(deadline, self.shared.get(path, read)).await;
        // A caller that waits for another's read gets the held folder before its own time is over.
        reading.unwrap_or_else(|_| self.shared.now(path).ok_or(Missing::Failed))
    }

    /// Lists one folder without what is withheld in it.
    async fn list_secrets(
        &self,
        call: Call,
        folder: &str,
        known: Option<&str>,
        lane: Lane,
        deadline: Instant,
    ) -> Result<Fetched, UpstreamError> {
        self.list_all(call, folder, known, lane, deadline, &self.places).await
    }

    /// Lists one folder without what these places withhold: single secrets are never read singly, because
    /// the server then gives imported secrets no value. Texts come as they are written: the server would
    /// replace references with our rights, which reach every tenant.
    async fn list_all(
        &self,
        call: Call,
        folder: &str,
        known: Option<&str>,
        lane: Lane,
        deadline: Instant,
        places: &Places,
    ) -> Result<Fetched, UpstreamError> {
        let reply = self.list(call, folder, known, lane, deadline).await?;
        match reply.meaning {
            Meaning::Done => {
                let snapshot = wire::read::<wire::SecretList<'_>>(&reply.body)?.resolve(folder, places)?;
                if !snapshot.secrets.is_empty() {
                    self.client.state.found_something();
                }
                Ok(Fetched::Changed(Snapshot { etag: reply.etag, ..snapshot }))
            }
            Meaning::NotModified => {
                self.client.state.found_something();
                Ok(Fetched::Unchanged)
            }
            // Newer servers say so; the recorded one lists nothing.
            _ if reply.problem.is_folder_not_found() => Ok(Fetched::Changed(Snapshot::default())),
            _ => Err(self.client.state.misplaced(rejection(&reply))),
        }
    }

    async fn list_everything(&self, lane: Lane, deadline: Instant) -> Result<Everything, UpstreamError> {
        let reply = self.list(Call::Everything, &self.places.tenants, None, lane, deadline).await?;
        match reply.meaning {
            Meaning::Done => {
                let above = self.places.tenants.clone();
                // It may be long, and a lookup must not wait for its thread because of it.
                let read = tokio::task::spawn_blocking(move || {
                    wire::read::<wire::SecretList<'_>>(&reply.body)?.by_tenant(&above)
                });
                let read = read.await.unwrap_or(Err(UpstreamError::Malformed("it could not be read to its end")));
                let Everything { tenants: listed, has_imports } = read?;
                if !listed.is_empty() {
                    self.client.state.found_something();
                }
                let mut tenants = HashMap::with_capacity(listed.len());
                for (tenant, snapshot) in listed {
                    let folder = self.folder(&tenant)?;
                    let snapshot = self.with_references(&folder, snapshot, lane, deadline).await;
                    tenants.insert(tenant, snapshot);
                }
                Ok(Everything { tenants, has_imports })
            }
            _ if reply.problem.is_folder_not_found() => Ok(Everything::default()),
            _ => Err(rejection(&reply)),
        }
    }

    async fn list(
        &self,
        call: Call,
        folder: &str,
        known: Option<&str>,
        lane: Lane,
        deadline: Instant,
    ) -> Result<Reply, UpstreamError> {
        let recursive = call == Call::Everything;
        let route = |newer| {
            Ok(Request {
                call,
                method: Method::GET,
                path: secrets_path(newer).to_owned(),
                query: vec![
                    (project_parameter(newer), self.project_id.clone()),
                    ("environment", self.environment.clone()),
                    ("secretPath", folder.to_owned()),
                    (if newer { "includeImports" } else { "include_imports" }, "true".to_owned()),
                    ("expandSecretReferences", "false".to_owned()),
                    ("recursive", recursive.to_string()),
                ],
                body: None,
                known: known.map(str::to_owned),
            })
        };
        self.call(&self.newer_secrets, route, lane, deadline).await
    }

    async fn read_some(
        &self,
        folder: &str,
        names: &[&str],
        lane: Lane,
        deadline: Instant,
    ) -> Result<Vec<Option<SecretValue>>, UpstreamError> {
        check_folder(folder)?;
        match self.list_all(Call::Read, folder, None, lane, deadline, &Places::default()).await? {
            Fetched::Changed(snapshot) => {
                let named = |name: &&str| snapshot.secrets.iter().find(|secret| secret.key.as_str() == *name);
                Ok(names.iter().map(|name| named(name).map(|secret| secret.value.clone())).collect())
            }
            Fetched::Unchanged => Err(UpstreamError::Malformed("it says unchanged, and nothing was known")),
        }
    }

    async fn put_one(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        value: &SecretValue,
        deadline: Instant,
    ) -> Result<bool, UpstreamError> {
        self.check(key, Some(value))?;
        let folder = self.folder_of(tenant, key)?;
        let (mut created, mut reply) = self.change_or_create(&folder, key, value, deadline).await?;
        if reply.problem.is_folder_not_found() {
            self.make_folder(tenant, deadline).await?;
            tracing::info!(folder, "created a folder upstream");
            (created, reply) = self.create(&folder, key, value, deadline).await?;
        }
        written(&reply).map(|()| created)
    }

    /// Changes the secret, or creates it where it is missing; `true` for the latter. It tries the
    /// change first because most writes are changes, and because a change never makes a second
    /// secret of one name, whoever else writes. An imported secret counts as missing: the folder
    /// gets one of its own.
    async fn change_or_create(
        &self,
        folder: &str,
        key: &SecretKey,
        value: &SecretValue,
        deadline: Instant,
    ) -> Result<(bool, Reply), UpstreamError> {
        let reply = self.write_one(Method::PATCH, folder, key, Some(value), deadline).await?;
        // If the folder is missing, an older server says that the secret is.
        if reply.problem.is_secret_not_found() {
            return self.create(folder, key, value, deadline).await;
        }
        Ok((false, reply))
    }

    /// Creates the secret, or changes it if somebody else has created it in between.
    async fn create(
        &self,
        folder: &str,
        key: &SecretKey,
        value: &SecretValue,
        deadline: Instant,
    ) -> Result<(bool, Reply), UpstreamError> {
        let reply = self.write_one(Method::POST, folder, key, Some(value), deadline).await?;
        if reply.problem.is_already_there() {
            return Ok((false, self.write_one(Method::PATCH, folder, key, Some(value), deadline).await?));
        }
        Ok((true, reply))
    }

    async fn remove(&self, tenant: &Tenant, key: &SecretKey, deadline: Instant) -> Result<bool, UpstreamError> {
        self.check(key, None)?;
        let reply = self.write_one(Method::DELETE, &self.folder_of(tenant, key)?, key, None, deadline).await?;
        let nothing_there = reply.meaning == Meaning::NothingThere
            || reply.problem.is_secret_not_found()
            || reply.problem.is_folder_not_found();
        if nothing_there { Ok(false) } else { written(&reply).map(|()| true) }
    }

    /// Whether Infisical would keep this as it is, in this folder.
    fn check_in(&self, folder: &str, key: &SecretKey, value: Option<&SecretValue>) -> Result<(), Unstorable> {
        storable::check_name(key.as_str())?;
        let Some(value) = value else { return Ok(()) };
        storable::check_value(value)?;
        storable::check_size(&self.written_to(folder, key, Some(value), false))
    }

    fn written_to<'a>(
        &'a self,
        folder: &'a str,
        key: &'a SecretKey,
        value: Option<&'a SecretValue>,
        newer: bool,
    ) -> wire::Write<'a> {
        let (secret_key, secret_value) = (key.as_str(), value.map(SecretValue::expose));
        wire::Write {
            project: self.project(newer),
            environment: &self.environment,
            secret_path: folder,
            change: match storable::has_route(secret_key) {
                true => wire::Change::Named { secret_value, r#type: "shared" },
                false => wire::Change::Batch { secrets: [wire::BatchItem { secret_key, secret_value }] },
            },
        }
    }

    async fn write_one(
        &self,
        method: Method,
        folder: &str,
        key: &SecretKey,
        value: Option<&SecretValue>,
        deadline: Instant,
    ) -> Result<Reply, UpstreamError> {
        let route = |newer| {
            let write = self.written_to(folder, key, value, newer);
            Ok(Request {
                call: if method == Method::DELETE { Call::Delete } else { Call::Write },
                method: method.clone(),
                path: match storable::has_route(key.as_str()) {
                    true => {
                        format!("{}/{}", secrets_path(newer), utf8_percent_encode(key.as_str(), NON_ALPHANUMERIC))
                    }
                    false => batch_path(newer).to_owned(),
                },
                query: Vec::new(),
                body: Some(wire::body(&write, value.map_or(0, SecretValue::len))?),
                known: None,
            })
        };
        self.call(&self.newer_secrets, route, Lane::Interactive, deadline).await
    }

    /// Calls the route that the server is known to have. If it does not have it, the other one is
    /// tried, and remembered if it exists.
    async fn call(
        &self,
        newer: &AtomicBool,
        route: impl Fn(bool) -> Result<Request, UpstreamError>,
        lane: Lane,
        deadline: Instant,
    ) -> Result<Reply, UpstreamError> {
        let known = newer.load(Ordering::Relaxed);
        let reply = self.client.call(&route(known)?, lane, deadline).await?;
        if !is_route_not_found(&reply) {
            return Ok(reply);
        }
        let reply = self.client.call(&route(!known)?, lane, deadline).await?;
        if !is_route_not_found(&reply) && newer.swap(!known, Ordering::Relaxed) == known {
            tracing::info!(newer = !known, "the upstream has only one of two routes, which is used from now on");
        }
        Ok(reply)
    }

    /// Ends `work` within the timeout, whatever it waits for.
    fn in_time<'a, T, F>(&self, work: impl FnOnce(Instant) -> F) -> BoxFuture<'a, Result<T, UpstreamError>>
    where
        F: Future<Output = Result<T, UpstreamError>> + Send + 'a,
        T: 'a,
    {
        self.by(self.client.deadline(), work)
    }

    /// Ends `work` at the deadline.
    fn by<'a, T, F>(
        &self,
        deadline: Instant,
        work: impl FnOnce(Instant) -> F,
    ) -> BoxFuture<'a, Result<T, UpstreamError>>
    where
        F: Future<Output = Result<T, UpstreamError>> + Send + 'a,
        T: 'a,
    {
        let work = tokio::time::timeout_at(deadline, work(deadline));
        work.map(|ended| ended.unwrap_or(Err(UpstreamError::TimedOut))).boxed()
    }

    fn project(&self, newer: bool) -> Project<'_> {
        if newer { Project::Project(&self.project_id) } else { Project::Workspace(&self.project_id) }
    }
}

impl fmt::Debug for Infisical {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Infisical");
        shown.field("client", &self.client).field("project_id", &self.project_id);
        shown.field("environment", &self.environment).field("places", &self.places);
        shown.finish_non_exhaustive()
    }
}

/// The folders that texts refer to, as far as they are held.
fn folders_of<'a>(
    home: &'a str,
    texts: &Texts<'a>,
    held: &'a BTreeMap<String, Option<Arc<Held>>>,
) -> references::Folders<'a> {
    let others = held.iter().map(|(path, held)| (path.as_str(), held.as_ref().map(|held| held.texts())));
    references::Folders { home, texts: texts.clone(), others: others.collect() }
}

/// Whether a folder is `above`, or is inside it.
pub(crate) fn is_within(folder: &str, above: &str) -> bool {
    let rest = folder.strip_prefix(above.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn secrets_path(newer: bool) -> &'static str {
    if newer { "/api/v4/secrets" } else { "/api/v3/secrets/raw" }
}

fn batch_path(newer: bool) -> &'static str {
    if newer { "/api/v4/secrets/batch" } else { "/api/v3/secrets/batch/raw" }
}

fn folders_path(newer: bool) -> &'static str {
    if newer { "/api/v2/folders" } else { "/api/v1/folders" }
}

fn project_parameter(newer: bool) -> &'static str {
    if newer { "projectId" } else { "workspaceId" }
}

fn is_route_not_found(reply: &Reply) -> bool {
    reply.status == 404 && reply.problem.is_route_not_found()
}

fn written(reply: &Reply) -> Result<(), UpstreamError> {
    match reply.meaning {
        Meaning::Done if wire::read::<wire::Written>(&reply.body)?.approval.is_some() => {
            Err(UpstreamError::AwaitsApproval)
        }
        Meaning::Done => Ok(()),
        _ => Err(rejection(reply)),
    }
}

fn check_folder(folder: &str) -> Result<(), UpstreamError> {
    let hint = "a folder is written as in /hono-api, with letters, digits, '-' and '_'";
    if is_folder(folder) { Ok(()) } else { Err(UpstreamError::Rejected { status: 400, cause: Cause::Rejected, hint }) }
}

/// Infisical answers 500 for a folder that is written in any other way.
fn is_folder(path: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    path == "/" || path.strip_prefix('/').is_some_and(|path| path.split('/').all(part))
}

#[cfg(test)]
mod tests;
