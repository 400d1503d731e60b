//! A directory as the upstream tier: a folder for each tenant, a file for each secret. It is
//! mounted by Kubernetes, or is on the disk of a laptop or a CI job.
//!
//! The name of a file is the name of the secret, and its content is the value, byte for byte. Files
//! and folders whose names begin with `.` are ignored, and so are folders in a tenant's folder. A
//! value with `${...}` in it is that text: there are no references here.

mod config;
mod folders;
#[cfg(test)]
mod tests;
mod writing;

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures_util::future::{BoxFuture, FutureExt as _};
use tokio::sync::{Mutex, Semaphore};

pub use self::config::Config;
use self::folders::Root;
use super::{
    Before, BuildError, Cause, ChangedFolder, Everything, Fetched, Folders, Health, Lane, Overview, Reconfigured,
    Removal, ToldFlaws, Unstorable, Upstream, UpstreamError, UpstreamState, Webhook, settings,
};
use crate::{
    clock::Timestamp,
    diagnosis::Area,
    log,
    references::{self, Texts},
    secret::{SecretKey, SecretValue},
    tenant::Tenant,
};

/// The directory, or something in it, that cannot be read.
fn unreachable(reason: String) -> UpstreamError {
    UpstreamError::Unreachable { cause: Cause::Directory, reason }
}

/// The largest total size of all folders that are read in one call, in bytes.
const LARGEST: usize = 64 << 20;

/// Secrets in files.
///
/// Blocking work is done on threads of its own, and goes on to its end when its caller has waited
/// long enough. The interleavings that would break it, and what prevents them:
/// - *A write that hung is done after a later one*: what concerns one tenant has its turn one after
///   the other, and a thread keeps the turn until it ends. A write that comes to its effect only
///   after its caller was told of the timeout has none.
/// - *A file system that hangs takes ever more threads*: one for each turn, `Config::AT_ONCE` in
///   all, and one each for the list of tenants and for the look at what has changed.
pub struct Directory {
    root: Arc<Root>,
    /// In milliseconds.
    timeout: AtomicU64,
    /// Threads that are at work for a tenant.
    places: Arc<Semaphore>,
    /// Whose turn it is, of each tenant that somebody is at work for.
    turns: std::sync::Mutex<HashMap<Tenant, Arc<Mutex<()>>>>,
    listing: Arc<Mutex<()>>,
    looking: Arc<Mutex<()>>,
    state: std::sync::Mutex<UpstreamState>,
    told: ToldFlaws,
}

impl Directory {
    /// Builds it from these settings; reads nothing.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            root: Arc::new(Root { path: config.path.clone(), writable: config.writable }),
            timeout: AtomicU64::new(millis(config.timeout)),
            places: Arc::new(Semaphore::new(Config::AT_ONCE.get().into())),
            turns: std::sync::Mutex::default(),
            listing: Arc::default(),
            looking: Arc::default(),
            state: std::sync::Mutex::new(UpstreamState::Unknown),
            told: ToldFlaws::default(),
        }
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout.load(Ordering::Relaxed))
    }

    /// For what nobody waits for so long, and what is kept of it is of use.
    fn long_timeout(&self) -> Duration {
        self.timeout() * 10
    }

    /// The turns of a tenant. Those that nobody holds are dropped.
    fn turns_of(&self, tenant: &Tenant) -> Arc<Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(tenant.clone()).or_default())
    }

    /// Does work for a tenant, in its turn. The work is told when its time ends.
    fn for_tenant<'a, T: Send + 'static>(
        &'a self,
        tenant: &Tenant,
        time: Duration,
        work: impl FnOnce(&Root, Instant) -> Result<T, UpstreamError> + Send + 'static,
    ) -> BoxFuture<'a, Result<T, UpstreamError>> {
        let (end, turns, places) = (Instant::now() + time, self.turns_of(tenant), Arc::clone(&self.places));
        let held = async move {
            let turn = turns.lock_owned().await;
            // It is never closed.
            places.acquire_owned().await.ok().map(|place| (turn, place))
        };
        self.within(time, held, move |root| work(root, end))
    }

    /// Does work that blocks, within this time, once `held` is had; its thread holds that until
    /// it has ended.
    fn within<'a, T: Send + 'static, H: Send + 'static>(
        &'a self,
        time: Duration,
        held: impl Future<Output = H> + Send + 'a,
        work: impl FnOnce(&Root) -> Result<T, UpstreamError> + Send + 'static,
    ) -> BoxFuture<'a, Result<T, UpstreamError>> {
        let root = Arc::clone(&self.root);
        let done = async move {
            let lost = |_| unreachable("a thread was lost".to_owned());
            let held = held.await;
            let work = move || {
                let done = work(&root);
                // A fault of one tenant's folder is no fault of the tier.
                let is_up = match &done {
                    Err(UpstreamError::Unreachable { .. }) => root.can_be_read(),
                    Err(UpstreamError::Rejected { status: 404, .. }) => false,
                    Ok(_) | Err(_) => true,
                };
                drop(held);
                (done, is_up)
            };
            tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| (Err(lost(error)), false))
        };
        async move {
            let done = tokio::time::timeout(time, done).await;
            let (done, is_up) = done.unwrap_or((Err(UpstreamError::TimedOut), false));
            let state = if is_up { UpstreamState::Up } else { UpstreamState::Down };
            *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
            done
        }
        .boxed()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The answer to attempts to keep anything but tenants' secrets in files.
fn no_others<T: Send + 'static>() -> BoxFuture<'static, Result<T, UpstreamError>> {
    let hint = "master keys are not read from [directory]; name them in keys.sources as file:<path>";
    std::future::ready(Err(UpstreamError::Rejected { status: 404, cause: Cause::Directory, hint })).boxed()
}

impl Upstream for Directory {
    fn tenants(&self, _: Lane) -> BoxFuture<'_, Result<Folders, UpstreamError>> {
        self.within(self.timeout(), Arc::clone(&self.listing).lock_owned(), Root::tenants)
    }

    fn snapshot<'a>(
        &'a self,
        tenant: &'a Tenant,
        known: Option<&'a str>,
        _: Lane,
    ) -> BoxFuture<'a, Result<Fetched, UpstreamError>> {
        let (of, known) = (tenant.clone(), known.map(str::to_owned));
        let reading = self.for_tenant(tenant, self.long_timeout(), move |root, _| root.read(&of, known.as_deref()));
        async move {
            let fetched = reading.await?;
            if let Fetched::Changed(snapshot) = &fetched {
                self.told.tell(tenant.as_str(), &snapshot.oddities);
            }
            Ok(fetched)
        }
        .boxed()
    }

    fn resolve<'a>(&self, _: &Tenant, _: Texts<'a>) -> HashMap<&'a str, references::Resolved> {
        HashMap::new()
    }

    fn everything(&self, _: Lane) -> BoxFuture<'_, Result<Everything, UpstreamError>> {
        self.within(self.long_timeout(), Arc::clone(&self.looking).lock_owned(), |root| {
            let (mut everything, mut size) = (Everything::default(), 0_usize);
            for tenant in root.tenants()?.tenants {
                let snapshot = match root.read(&tenant, None) {
                    Ok(Fetched::Changed(snapshot)) => snapshot,
                    // The read of that folder alone reports it.
                    Ok(Fetched::Unchanged) | Err(UpstreamError::Denied | UpstreamError::Rejected { .. }) => continue,
                    Err(error) => return Err(error),
                };
                size += snapshot.secrets.iter().map(|secret| secret.value.len()).sum::<usize>();
                if size > LARGEST {
                    return Err(UpstreamError::Malformed("all folders hold more than 64 MiB"));
                }
                if !snapshot.secrets.is_empty() || !snapshot.oddities.is_empty() {
                    everything.tenants.insert(tenant, snapshot);
                }
            }
            Ok(everything)
        })
    }

    fn changed_since(
        &self,
        since: Timestamp,
        _: Lane,
    ) -> BoxFuture<'_, Result<Option<Vec<ChangedFolder>>, UpstreamError>> {
        self.within(self.long_timeout(), Arc::clone(&self.looking).lock_owned(), move |root| {
            let changed = |tenant: Tenant| {
                let at = root.changed_at(&tenant).filter(|at| *at >= since)?;
                // A time that lies ahead tells no change from the next.
                let at = Some(at).filter(|at| SystemTime::now() >= UNIX_EPOCH + at.since(Timestamp::from_millis(0)));
                Some(ChangedFolder { tenant, at })
            };
            Ok(Some(root.tenants()?.tenants.into_iter().filter_map(changed).collect()))
        })
    }

    /// The times of files tell of every change, deletions among them.
    fn overview<'a>(&'a self, _: Option<&'a str>, _: Lane) -> BoxFuture<'a, Result<Overview, UpstreamError>> {
        std::future::ready(Ok(Overview::Untold)).boxed()
    }

    fn check(&self, key: &SecretKey, value: Option<&SecretValue>) -> Result<(), Unstorable> {
        self.root.check(key, value)
    }

    fn put<'a>(
        &'a self,
        tenant: &'a Tenant,
        key: &'a SecretKey,
        value: &'a SecretValue,
    ) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        let (of, key, value) = (tenant.clone(), key.clone(), value.clone());
        self.for_tenant(tenant, self.timeout(), move |root, end| root.put(&of, &key, &value, end))
    }

    fn delete<'a>(&'a self, tenant: &'a Tenant, key: &'a SecretKey) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        let (of, key) = (tenant.clone(), key.clone());
        self.for_tenant(tenant, self.timeout(), move |root, end| root.delete(&of, &key, end))
    }

    fn create_folder<'a>(&'a self, tenant: &'a Tenant) -> BoxFuture<'a, Result<(), UpstreamError>> {
        let of = tenant.clone();
        self.for_tenant(tenant, self.timeout(), move |root, _| root.create(&of))
    }

    fn remove_folder<'a>(
        &'a self,
        tenant: &'a Tenant,
        removal: Removal,
        _: Lane,
    ) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        let of = tenant.clone();
        self.for_tenant(tenant, self.timeout(), move |root, end| root.remove(&of, removal, end))
    }

    fn read<'a>(
        &'a self,
        _: &'a str,
        _: &'a [&'a str],
        _: Lane,
    ) -> BoxFuture<'a, Result<Vec<Option<SecretValue>>, UpstreamError>> {
        no_others()
    }

    fn write<'a>(
        &'a self,
        _: &'a str,
        _: &'a SecretKey,
        _: &'a SecretValue,
    ) -> BoxFuture<'a, Result<(), UpstreamError>> {
        no_others()
    }

    fn share_budget(&self, _: bool) {}

    fn resume_budget(&self, _: Before) {}

    fn reconfigure(&self, settings: settings::Config<'_>) -> Result<Reconfigured<'_>, BuildError> {
        // Another kind of upstream needs a restart.
        let settings::Config::Directory(settings) = settings else { return Ok(Reconfigured::unchanged()) };
        let timeout = millis(settings.timeout);
        Ok(Reconfigured::new(false, move || self.timeout.store(timeout, Ordering::Relaxed)))
    }

    fn reads_references(&self) -> bool {
        false
    }

    fn webhook(&self) -> Option<Arc<dyn Webhook>> {
        None
    }

    fn health(&self) -> Health {
        let state = *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Health { state, cause: (state == UpstreamState::Down).then_some(Cause::Directory), budget_left: None }
    }

    fn examine<'a>(&'a self, _: settings::Config<'a>, area: &'a Area) -> BoxFuture<'a, ()> {
        async move {
            area.begins("directory");
            let place = self.root.path.display();
            let tenant = match self.tenants(Lane::Interactive).await {
                Ok(folders) if folders.tenants.is_empty() => {
                    return area.warning(
                        "directory",
                        format!("{place} holds no tenant's folder"),
                        "make a folder for each tenant there, or check directory.path",
                    );
                }
                Ok(mut folders) => {
                    area.ok("directory", format!("{place} holds {} tenants", folders.tenants.len()));
                    folders.tenants.swap_remove(0)
                }
                Err(error) => {
                    return area.failure(
                        "directory",
                        format!("{place} cannot be listed: {}", log::chain(&error)),
                        Cause::Directory.advice(),
                    );
                }
            };
            area.begins("read");
            match self.snapshot(&tenant, None, Lane::Interactive).await {
                Ok(_) => area.ok("read", format!("{place}/{tenant} can be read")),
                Err(error) => area.failure(
                    "read",
                    format!("{place}/{tenant} cannot be read: {}", log::chain(&error)),
                    "let the user that secretier runs as read the folder and the files in it",
                ),
            }
        }
        .boxed()
    }
}
