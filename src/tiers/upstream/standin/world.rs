//! The state of the stand-in: a project with its environments, folders and secrets, the identities
//! that may read them, and the faults to come. A clone is the same world.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use uuid::Uuid;

use super::{
    faults::{Calls, Fault, Gate, Hold, Route, Trouble, reached},
    limits::{Limiter, Limits},
    surrogates,
    tokens::{Credentials, Identity, Rights, Tokens},
};
use crate::clock::{Clock, Timestamp};

/// Everything that a [`super::StandIn`] serves, and how it behaves. Cheap to clone; it
/// outlives the server, so that a server can be stopped and started over the same world.
#[derive(Clone)]
pub struct World(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    calls: watch::Sender<Calls>,
    mark: Mutex<Calls>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("project", &self.lock().project.slug).finish_non_exhaustive()
    }
}

/// The kinds of servers in use, as far as their answers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// As recorded in August 2024.
    #[default]
    August2024,
    /// A server of October 2024: the same routes, other statuses, and references are followed with
    /// the reader's rights.
    October2024,
    /// Newer ones: `/api/v4/secrets` and `/api/v2/folders` instead of v3 and v1, and newer errors.
    Newer,
}

/// The treatment of a reference into a folder that the reader of a list may not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    /// It is replaced all the same: no rights are checked.
    Followed,
    /// It stays as it is written.
    Left,
    /// The whole list is refused, as from version 0.139.2 on.
    Refused,
}

/// The names of a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Project {
    /// Its id, a UUID.
    pub id: String,
    /// Its slug.
    pub slug: String,
    /// Its name.
    pub name: String,
}

impl World {
    /// A project with the environments `dev`, `staging` and `prod`, and nothing in them.
    /// Its callers have no limits, and it answers as the recorded server does.
    #[must_use]
    pub fn new(project: Project) -> Self {
        let world = Self(Arc::new(Inner {
            state: Mutex::new(State::new(project)),
            calls: watch::Sender::new(Calls::default()),
            mark: Mutex::new(Calls::default()),
        }));
        world.environment("dev", "Development");
        world.environment("staging", "Staging");
        world.environment("prod", "Production");
        world
    }

    /// A project with a random id, as [`Self::new`] makes it.
    #[must_use]
    pub fn empty() -> Self {
        let id = Uuid::new_v4().to_string();
        Self::new(Project { id, slug: "sample".to_owned(), name: "Sample".to_owned() })
    }

    /// A project for experiments: the tenants `acme`, `globex` and `initech` in every environment,
    /// each with five secrets of random value, and an identity that may do everything.
    #[must_use]
    pub fn sample() -> (Self, Credentials) {
        let world = Self::empty();
        for environment in ["dev", "staging", "prod"] {
            for tenant in ["acme", "globex", "initech"] {
                let path = format!("/tenants/{tenant}");
                let password = random_hex(12);
                let database = format!("postgres://{tenant}:{password}@db.{environment}.example:5432/{tenant}");
                world.put(environment, &path, "STRIPE_SECRET_KEY", &format!("sk_test_{}", random_hex(16)));
                world.put(environment, &path, "DATABASE_URL", &database);
                world.put(environment, &path, "WEBHOOK_SECRET", &format!("whsec_{}", random_hex(16)));
                world.put(environment, &path, "SMTP_PASSWORD", &random_hex(12));
                world.put(environment, &path, "JWT_SECRET", &random_hex(32));
            }
            world.put(environment, "/hono-api", "SESSION_SECRET", &random_hex(32));
            world.put(environment, "/hono-api", "SENTRY_DSN", &format!("https://{}@sentry.example/1", random_hex(16)));
        }
        let credentials = world.identity(Identity::new(Rights::Full));
        (world, credentials)
    }

    /// The project's id.
    #[must_use]
    pub fn project_id(&self) -> String {
        self.lock().project.id.clone()
    }

    /// Gives the project another id.
    pub fn set_project_id(&self, id: &str) {
        id.clone_into(&mut self.lock().project.id);
    }

    /// The clock by which tokens expire and limits reset: advance it instead of waiting.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.lock().clock.clone()
    }

    /// Uses this clock from now on.
    pub fn set_clock(&self, clock: Clock) {
        self.lock().clock = clock;
    }

    /// Adds an environment, or renames it.
    pub fn environment(&self, slug: &str, name: &str) {
        let mut state = self.lock();
        let at = state.environment_or_new(slug);
        state.environments[at].name = name.to_owned();
    }

    /// Adds another project, of which no identity is a member.
    pub fn foreign_project(&self, id: &str) {
        self.lock().foreign_projects.insert(id.to_owned());
    }

    /// Adds an identity, and returns its credentials.
    pub fn identity(&self, identity: Identity) -> Credentials {
        let credentials =
            Credentials { client_id: identity.client_id.clone(), client_secret: identity.client_secret.clone() };
        self.lock().identities.push(identity);
        credentials
    }

    /// Changes the rights of an identity. Its tokens stay valid.
    pub fn set_rights(&self, credentials: &Credentials, rights: Rights) {
        let identities = &mut self.lock().identities;
        if let Some(identity) = identities.iter_mut().find(|known| known.client_id == credentials.client_id) {
            identity.rights = rights;
        }
    }

    /// Gives an identity another client secret. Its tokens stay valid.
    pub fn set_client_secret(&self, client_id: &str, client_secret: &str) {
        let identities = &mut self.lock().identities;
        if let Some(identity) = identities.iter_mut().find(|known| known.client_id == client_id) {
            client_secret.clone_into(&mut identity.client_secret);
        }
    }

    /// A token as from a login, without a login; `None` for unknown credentials.
    #[must_use]
    pub fn token(&self, credentials: &Credentials) -> Option<String> {
        let mut state = self.lock();
        let State { tokens, identities, clock, .. } = &mut *state;
        let identity = identities.iter().find(|identity| identity.client_id == credentials.client_id)?;
        Some(tokens.issue(identity, clock.now()))
    }

    /// Deletes all tokens, as if each had been revoked.
    pub fn revoke_tokens(&self) {
        self.lock().tokens.revoke_all();
    }

    /// Makes all tokens exceed their TTL: each is refused once for that, then deleted.
    pub fn expire_tokens(&self) {
        self.lock().tokens.expire_all();
    }

    /// Adds a folder and the folders above it; returns its id.
    pub fn folder(&self, environment: &str, path: &str) -> Uuid {
        let mut state = self.lock();
        let environment = state.environment_or_new(environment);
        state.folder_or_new(environment, path)
    }

    /// Deletes a folder with everything below it; `false` if there is none.
    pub fn delete_folder(&self, environment: &str, path: &str) -> bool {
        let mut state = self.lock();
        state.find_folder(environment, path).is_some_and(|folder| state.remove_folder(folder))
    }

    /// Creates or changes a secret, and creates its folder where it is missing. The value is stored
    /// unchanged: only values written over HTTP are trimmed.
    pub fn put(&self, environment: &str, path: &str, name: &str, value: &str) {
        self.put_with_id(environment, path, name, value, Uuid::new_v4());
    }

    /// As [`Self::put`]; if the secret is created, it gets this id. Lists are ordered by id.
    pub fn put_with_id(&self, environment: &str, path: &str, name: &str, value: &str, id: Uuid) {
        let mut state = self.lock();
        let now = state.clock.now();
        let environment = state.environment_or_new(environment);
        let folder = state.folder_or_new(environment, path);
        match state.find_secret(folder, name) {
            Some(known) => {
                state.change_secret(folder, known, |secret| {
                    value.clone_into(&mut secret.value);
                    secret.version += 1;
                    secret.updated = now;
                });
            }
            None => state.add_secret(folder, Secret::new(id, name, value, now)),
        }
    }

    /// Adds a secret beside those of its name in the folder, as over HTTP one batch does that names
    /// it twice. It is listed after them, and as the last one changed.
    pub fn duplicate(&self, environment: &str, path: &str, name: &str, value: &str) {
        let mut state = self.lock();
        let now = state.clock.now();
        let environment = state.environment_or_new(environment);
        let folder = state.folder_or_new(environment, path);
        let named = state.folders[&folder].secrets.values().filter(|secret| secret.name == name);
        let last = named.map(|secret| secret.id).max();
        let id = last.map_or_else(Uuid::new_v4, |last| Uuid::from_u128(last.as_u128().saturating_add(1)));
        state.add_secret(folder, Secret::new(id, name, value, now));
    }

    /// Deletes a secret; `false` if there is none.
    pub fn delete(&self, environment: &str, path: &str, name: &str) -> bool {
        let mut state = self.lock();
        let Some(folder) = state.find_folder(environment, path) else { return false };
        let Some(id) = state.find_secret(folder, name) else { return false };
        state.remove_secret(folder, id).is_some()
    }

    /// The names and values in a folder, by name; empty if there is no such folder.
    #[must_use]
    pub fn secrets(&self, environment: &str, path: &str) -> Vec<(String, String)> {
        let state = self.lock();
        let Some(folder) = state.find_folder(environment, path) else { return Vec::new() };
        let secrets = state.folders[&folder].secrets.values();
        let mut secrets: Vec<_> = secrets.map(|secret| (secret.name.clone(), secret.value.clone())).collect();
        secrets.sort();
        secrets
    }

    /// One value.
    #[must_use]
    pub fn value(&self, environment: &str, path: &str, name: &str) -> Option<String> {
        let state = self.lock();
        let folder = state.find_folder(environment, path)?;
        let secret = state.find_secret(folder, name)?;
        Some(state.folders[&folder].secrets[&secret].value.clone())
    }

    /// Makes a folder import another one.
    pub fn import(&self, environment: &str, path: &str, from_environment: &str, from_path: &str) {
        let mut state = self.lock();
        let now = state.clock.now();
        let environment = state.environment_or_new(environment);
        let from = state.environment_or_new(from_environment);
        let folder = state.folder_or_new(environment, path);
        state.add_import(folder, from, from_path, now);
    }

    /// Limits its callers; `None` removes the limits. All windows start anew.
    pub fn limits(&self, limits: Option<Limits>) {
        let mut state = self.lock();
        state.limits = limits;
        state.limiter = Limiter::default();
    }

    /// Answers like a newer server, or like the recorded one.
    pub fn v4_only(&self, v4_only: bool) {
        self.speak(if v4_only { Dialect::Newer } else { Dialect::August2024 });
    }

    /// Answers like a server of this kind, including its treatment of references.
    pub fn speak(&self, dialect: Dialect) {
        let mut state = self.lock();
        state.dialect = dialect;
        state.unreadable = match dialect {
            Dialect::October2024 => Unreadable::Left,
            Dialect::August2024 | Dialect::Newer => Unreadable::Followed,
        };
    }

    /// Sets the treatment of references into folders that their reader may not read, independent of
    /// the kind of server.
    pub fn unreadable(&self, unreadable: Unreadable) {
        self.lock().unreadable = unreadable;
    }

    /// Hides a secret's value from all readers, as newer servers do for readers that may only know
    /// that it exists; `false` if there is no such secret.
    pub fn hide(&self, environment: &str, path: &str, name: &str) -> bool {
        let mut state = self.lock();
        let Some(folder) = state.find_folder(environment, path) else { return false };
        let Some(id) = state.find_secret(folder, name) else { return false };
        state.change_secret(folder, id, |secret| secret.is_hidden = true);
        true
    }

    /// As [`Self::put`], with half of a surrogate pair between the two parts of the value, which
    /// JavaScript allows but Unicode does not.
    pub fn put_half_a_pair(&self, environment: &str, path: &str, name: &str, before: &str, after: &str) {
        self.put(environment, path, name, &format!("{before}{}{after}", surrogates::HALF));
    }

    /// Reports the changed folders if it is asked for them, as some newer servers do. Otherwise it
    /// answers with all folders, as the recorded server does.
    pub fn tells_changes(&self, tells_changes: bool) {
        self.lock().tells_changes = tells_changes;
    }

    /// Makes every request fail like this until [`Self::clear_faults`].
    pub fn fault(&self, fault: Fault) {
        self.lock().trouble.set(None, fault, None);
    }

    /// Makes requests of this kind fail like this until [`Self::clear_faults`].
    pub fn fault_on(&self, route: Route, fault: Fault) {
        self.lock().trouble.set(Some(route), fault, None);
    }

    /// Makes the next requests, of this kind or of any, fail like this.
    pub fn fault_next(&self, requests: usize, route: impl Into<Option<Route>>, fault: Fault) {
        self.lock().trouble.set(route.into(), fault, Some(requests));
    }

    /// Makes lists of exactly this folder's secrets, in any environment, fail like this until
    /// [`Self::clear_faults`]; lists of a folder above it with everything below do not fail.
    pub fn fault_at(&self, path: &str, fault: Fault) {
        self.lock().trouble.set_at(path, fault);
    }

    /// Holds the answers to lists of exactly this folder's secrets, in any environment, after they
    /// are made.
    #[must_use = "a dropped gate is open"]
    pub fn gate_at(&self, path: &str) -> Gate {
        self.lock().trouble.gate_at(path, Hold::Answer)
    }

    /// Removes all faults. Requests that hang keep hanging.
    pub fn clear_faults(&self) {
        self.lock().trouble.clear();
    }

    /// Holds requests, of this kind or of any, on arrival: they will see the world as it is when
    /// the gate opens.
    #[must_use = "a dropped gate is open"]
    pub fn gate(&self, route: impl Into<Option<Route>>) -> Gate {
        self.lock().trouble.gate(route.into(), Hold::Arrival, None)
    }

    /// Holds answers after they are made: they contain the world as it was when the requests
    /// arrived.
    #[must_use = "a dropped gate is open"]
    pub fn gate_answers(&self, route: impl Into<Option<Route>>) -> Gate {
        self.lock().trouble.gate(route.into(), Hold::Answer, None)
    }

    /// As [`Self::gate_answers`], but only for the next of these requests: later ones overtake
    /// them.
    #[must_use = "a dropped gate is open"]
    pub fn gate_next_answers(&self, requests: usize, route: impl Into<Option<Route>>) -> Gate {
        self.lock().trouble.gate(route.into(), Hold::Answer, Some(requests))
    }

    /// Requests since the beginning, counted as they arrive, including those that fail.
    #[must_use]
    pub fn calls(&self) -> Calls {
        *self.0.calls.borrow()
    }

    /// Starts the count of [`Self::calls_since_mark`] anew.
    pub fn mark(&self) {
        *self.0.mark.lock().unwrap_or_else(PoisonError::into_inner) = self.calls();
    }

    /// Requests since the last [`Self::mark`].
    #[must_use]
    pub fn calls_since_mark(&self) -> Calls {
        let mark = *self.0.mark.lock().unwrap_or_else(PoisonError::into_inner);
        self.calls().since(&mark)
    }

    /// Waits until this many requests have arrived since the last [`Self::mark`].
    ///
    /// # Panics
    /// If they do not arrive within two minutes.
    #[track_caller]
    pub fn wait_for_calls(&self, requests: u64) -> impl Future<Output = ()> {
        self.wait_until(format!("{requests} requests"), move |calls| calls.total() >= requests)
    }

    /// As [`Self::wait_for_calls`], for one kind.
    ///
    /// # Panics
    /// If they do not arrive within two minutes.
    #[track_caller]
    pub fn wait_for_calls_to(&self, route: Route, requests: u64) -> impl Future<Output = ()> {
        self.wait_until(format!("{requests} requests of kind {route:?}"), move |calls| calls.to(route) >= requests)
    }

    #[track_caller]
    fn wait_until(&self, wanted: String, enough: impl Fn(Calls) -> bool) -> impl Future<Output = ()> {
        let mark = *self.0.mark.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = wanted + &format!(" since {mark:?}");
        reached(self.0.calls.subscribe(), wanted, move |calls| enough(calls.since(&mark)))
    }

    pub(super) fn count(&self, route: Route) {
        self.0.calls.send_modify(|calls| calls.count(route));
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn random_hex(bytes: usize) -> String {
    let random: [u8; 32] = rand::random();
    hex::encode(&random[..bytes.min(random.len())])
}

pub(super) struct State {
    pub(super) clock: Clock,
    pub(super) dialect: Dialect,
    pub(super) unreadable: Unreadable,
    pub(super) tells_changes: bool,
    pub(super) project: Project,
    pub(super) foreign_projects: HashSet<String>,
    pub(super) environments: Vec<Environment>,
    pub(super) folders: HashMap<Uuid, Folder>,
    pub(super) identities: Vec<Identity>,
    pub(super) tokens: Tokens,
    pub(super) tags: Vec<Tag>,
    pub(super) limits: Option<Limits>,
    pub(super) limiter: Limiter,
    pub(super) trouble: Trouble,
    stored: usize,
    secret_count: usize,
}

pub(super) struct Environment {
    pub(super) id: Uuid,
    pub(super) slug: String,
    pub(super) name: String,
    pub(super) root: Uuid,
}

pub(super) struct Folder {
    pub(super) id: Uuid,
    pub(super) name: String,
    pub(super) version: u64,
    pub(super) created: Timestamp,
    pub(super) updated: Timestamp,
    pub(super) environment: usize,
    pub(super) parent: Option<Uuid>,
    pub(super) children: Vec<Uuid>,
    /// The same by name. A renamed folder may have the name of another.
    children_by_name: HashMap<String, Vec<Uuid>>,
    /// By id: ids are random, so lists seem to be in random order, but it is the same order each
    /// time.
    pub(super) secrets: BTreeMap<Uuid, Secret>,
    pub(super) imports: Vec<Import>,
    /// When a secret was last added or changed. Deletions are not recorded.
    pub(super) secrets_changed: Option<Timestamp>,
}

impl Folder {
    fn add_child(&mut self, id: Uuid, name: &str) {
        self.children.push(id);
        self.children_by_name.entry(name.to_owned()).or_default().push(id);
    }

    fn forget_name(&mut self, child: Uuid, name: &str) {
        let Some(named) = self.children_by_name.get_mut(name) else { return };
        named.retain(|known| *known != child);
        if named.is_empty() {
            self.children_by_name.remove(name);
        }
    }
}

pub(super) struct Secret {
    pub(super) id: Uuid,
    pub(super) name: String,
    pub(super) value: String,
    pub(super) comment: String,
    pub(super) tags: Vec<Uuid>,
    pub(super) is_hidden: bool,
    pub(super) version: u64,
    pub(super) created: Timestamp,
    pub(super) updated: Timestamp,
}

impl Secret {
    pub(super) fn new(id: Uuid, name: &str, value: &str, now: Timestamp) -> Self {
        Self {
            id,
            name: name.to_owned(),
            value: value.to_owned(),
            comment: String::new(),
            tags: Vec::new(),
            is_hidden: false,
            version: 1,
            created: now,
            updated: now,
        }
    }

    fn size(&self) -> usize {
        self.name.len() + self.value.len() + self.comment.len()
    }
}

pub(super) struct Import {
    pub(super) id: Uuid,
    pub(super) environment: usize,
    pub(super) path: String,
    pub(super) created: Timestamp,
}

pub(super) struct Tag {
    pub(super) id: Uuid,
    pub(super) slug: String,
    pub(super) name: String,
    pub(super) color: String,
}

impl State {
    fn new(project: Project) -> Self {
        Self {
            clock: Clock::system(),
            dialect: Dialect::August2024,
            unreadable: Unreadable::Followed,
            tells_changes: false,
            project,
            foreign_projects: HashSet::new(),
            environments: Vec::new(),
            folders: HashMap::new(),
            identities: Vec::new(),
            tokens: Tokens::new(),
            tags: Vec::new(),
            limits: None,
            limiter: Limiter::default(),
            trouble: Trouble::default(),
            stored: 0,
            secret_count: 0,
        }
    }

    pub(super) fn is_newer(&self) -> bool {
        self.dialect == Dialect::Newer
    }

    pub(super) fn find_environment(&self, slug: &str) -> Option<usize> {
        self.environments.iter().position(|environment| environment.slug == slug)
    }

    fn environment_or_new(&mut self, slug: &str) -> usize {
        if let Some(at) = self.find_environment(slug) {
            return at;
        }
        let at = self.environments.len();
        let root = self.new_folder("root", at, None);
        self.environments.push(Environment { id: Uuid::new_v4(), slug: slug.to_owned(), name: slug.to_owned(), root });
        at
    }

    pub(super) fn find_folder(&self, environment: &str, path: &str) -> Option<Uuid> {
        let environment = self.find_environment(environment)?;
        let mut folder = self.environments[environment].root;
        if path == "/" {
            return Some(folder);
        }
        for name in path.strip_prefix('/')?.split('/') {
            folder = self.child(folder, name)?;
        }
        Some(folder)
    }

    pub(super) fn child(&self, folder: Uuid, name: &str) -> Option<Uuid> {
        self.folders.get(&folder)?.children_by_name.get(name)?.first().copied()
    }

    pub(super) fn folder_or_new(&mut self, environment: usize, path: &str) -> Uuid {
        let mut folder = self.environments[environment].root;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            folder = match self.child(folder, name) {
                Some(known) => known,
                None => self.new_folder(name, environment, Some(folder)),
            };
        }
        folder
    }

    pub(super) fn new_folder(&mut self, name: &str, environment: usize, parent: Option<Uuid>) -> Uuid {
        let (id, now) = (Uuid::new_v4(), self.clock.now());
        if let Some(parent) = parent.and_then(|parent| self.folders.get_mut(&parent)) {
            parent.add_child(id, name);
        }
        let folder = Folder {
            id,
            name: name.to_owned(),
            version: 1,
            created: now,
            updated: now,
            environment,
            parent,
            children: Vec::new(),
            children_by_name: HashMap::new(),
            secrets: BTreeMap::new(),
            imports: Vec::new(),
            secrets_changed: None,
        };
        self.folders.insert(id, folder);
        id
    }

    /// Removes a folder with everything below it, but not an environment's root.
    pub(super) fn remove_folder(&mut self, folder: Uuid) -> bool {
        let Some(Folder { name, parent: Some(parent), .. }) = self.folders.get(&folder) else { return false };
        let (name, parent) = (name.clone(), *parent);
        if let Some(parent) = self.folders.get_mut(&parent) {
            parent.children.retain(|child| *child != folder);
            parent.forget_name(folder, &name);
        }
        for (id, _) in self.below(folder, "") {
            if let Some(gone) = self.folders.remove(&id) {
                self.secret_count -= gone.secrets.len();
                self.stored -= gone.secrets.values().map(Secret::size).sum::<usize>();
            }
        }
        true
    }

    pub(super) fn rename_folder(&mut self, id: Uuid, name: String) {
        let now = self.clock.now();
        let Some(folder) = self.folders.get_mut(&id) else { return };
        let before = std::mem::replace(&mut folder.name, name.clone());
        folder.version += 1;
        folder.updated = now;
        if let Some(parent) = folder.parent.and_then(|parent| self.folders.get_mut(&parent)) {
            parent.forget_name(id, &before);
            parent.children_by_name.entry(name).or_default().push(id);
        }
    }

    /// A folder and all folders below it, each with its path.
    pub(super) fn below(&self, folder: Uuid, path: &str) -> Vec<(Uuid, String)> {
        let mut found = vec![(folder, path.to_owned())];
        let mut next = 0;
        while next < found.len() {
            let (folder, path) = found[next].clone();
            let above = if path == "/" { "" } else { path.as_str() };
            for child in &self.folders[&folder].children {
                found.push((*child, format!("{above}/{}", self.folders[child].name)));
            }
            next += 1;
        }
        found
    }

    pub(super) fn find_secret(&self, folder: Uuid, name: &str) -> Option<Uuid> {
        self.folders.get(&folder)?.secrets.values().find(|secret| secret.name == name).map(|secret| secret.id)
    }

    pub(super) fn add_secret(&mut self, folder: Uuid, secret: Secret) {
        let now = self.clock.now();
        if let Some(folder) = self.folders.get_mut(&folder) {
            folder.secrets_changed = Some(now);
            self.secret_count += 1;
            self.stored += secret.size();
            if let Some(replaced) = folder.secrets.insert(secret.id, secret) {
                self.secret_count -= 1;
                self.stored -= replaced.size();
            }
        }
    }

    pub(super) fn change_secret(&mut self, folder: Uuid, id: Uuid, change: impl FnOnce(&mut Secret)) {
        let now = self.clock.now();
        let Some(folder) = self.folders.get_mut(&folder) else { return };
        if let Some(secret) = folder.secrets.get_mut(&id) {
            self.stored -= secret.size();
            change(secret);
            self.stored += secret.size();
            folder.secrets_changed = Some(now);
        }
    }

    pub(super) fn remove_secret(&mut self, folder: Uuid, id: Uuid) -> Option<Secret> {
        let secret = self.folders.get_mut(&folder)?.secrets.remove(&id)?;
        self.secret_count -= 1;
        self.stored -= secret.size();
        Some(secret)
    }

    pub(super) fn add_import(&mut self, folder: Uuid, environment: usize, path: &str, now: Timestamp) {
        if let Some(folder) = self.folders.get_mut(&folder) {
            let import = Import { id: Uuid::new_v4(), environment, path: path.to_owned(), created: now };
            folder.imports.push(import);
        }
    }

    /// Whether callers may add anything: their data must not fill this process's memory.
    pub(super) fn has_room(&self) -> bool {
        self.stored < MOST_STORED && self.secret_count < MOST_SECRETS && self.folders.len() < MOST_FOLDERS
    }
}

const MOST_STORED: usize = 512 * 1024 * 1024;
const MOST_SECRETS: usize = 200_000;
const MOST_FOLDERS: usize = 50_000;
