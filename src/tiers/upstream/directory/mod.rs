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
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::{BoxFuture, FutureExt as _};
use tokio::sync::Semaphore;

pub use self::config::Config;
use self::folders::Root;
use super::{
    Before, BuildError, ChangedFolder, Everything, Fetched, Folders, Health, Lane, Reconfigured, ToldFlaws, Unstorable,
    Upstream, UpstreamError, UpstreamState, Webhook, settings,
};
use crate::{
    clock::Timestamp,
    references::{self, Texts},
    secret::{SecretKey, SecretValue},
    tenant::Tenant,
};

/// The largest total size of all folders that are read in one call, in bytes.
const LARGEST: usize = 64 << 20;

/// Secrets in files.
pub struct Directory {
    root: Arc<Root>,
    /// In milliseconds.
    timeout: AtomicU64,
    /// Held by each thread that reads or writes, until it has ended: a file system that hangs
    /// blocks no more threads than that.
    places: Arc<Semaphore>,
    state: Mutex<UpstreamState>,
    told: ToldFlaws,
}

impl Directory {
    /// Creates it from these settings; reads nothing.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            root: Arc::new(Root { path: config.path.clone(), writable: config.writable }),
            timeout: AtomicU64::new(millis(config.timeout)),
            places: Arc::new(Semaphore::new(Config::AT_ONCE.get().into())),
            state: Mutex::new(UpstreamState::Unknown),
            told: ToldFlaws::default(),
        }
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout.load(Ordering::Relaxed))
    }

    /// Runs blocking work on a thread of its own, and waits for it for this time. Work that takes
    /// longer continues to its end, and keeps its place until then.
    fn within<'a, T: Send + 'static>(
        &'a self,
        time: Duration,
        work: impl FnOnce(&Root) -> Result<T, UpstreamError> + Send + 'static,
    ) -> BoxFuture<'a, Result<T, UpstreamError>> {
        let (root, places) = (Arc::clone(&self.root), Arc::clone(&self.places));
        let done = async move {
            let lost = |_| UpstreamError::Unreachable("a thread was lost".to_owned());
            let place = places.acquire_owned().await.map_err(|_| UpstreamError::TimedOut)?;
            let work = move || {
                let done = work(&root);
                drop(place);
                done
            };
            tokio::task::spawn_blocking(work).await.map_err(lost)?
        };
        async move {
            let done = tokio::time::timeout(time, done).await.unwrap_or(Err(UpstreamError::TimedOut));
            self.note(done.as_ref().err());
            done
        }
        .boxed()
    }

    fn in_time<'a, T: Send + 'static>(
        &'a self,
        work: impl FnOnce(&Root) -> Result<T, UpstreamError> + Send + 'static,
    ) -> BoxFuture<'a, Result<T, UpstreamError>> {
        self.within(self.timeout(), work)
    }

    /// Stores the outcome of the last call.
    fn note(&self, error: Option<&UpstreamError>) {
        let state = match error {
            None | Some(UpstreamError::Denied | UpstreamError::Unstorable(_)) => UpstreamState::Up,
            Some(_) => UpstreamState::Down,
        };
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The answer to attempts to keep anything but tenants' secrets in files.
fn no_others<T: Send + 'static>() -> BoxFuture<'static, Result<T, UpstreamError>> {
    let hint = "master keys are not read from [directory]; name them in keys.sources as file:<path>";
    std::future::ready(Err(UpstreamError::Rejected { status: 404, hint })).boxed()
}

impl Upstream for Directory {
    fn tenants(&self, _: Lane) -> BoxFuture<'_, Result<Folders, UpstreamError>> {
        self.in_time(Root::tenants)
    }

    fn snapshot<'a>(
        &'a self,
        tenant: &'a Tenant,
        known: Option<&'a str>,
        _: Lane,
    ) -> BoxFuture<'a, Result<Fetched, UpstreamError>> {
        let (of, known) = (tenant.clone(), known.map(str::to_owned));
        let reading = self.in_time(move |root| root.read(&of, known.as_deref()));
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
        self.within(self.timeout() * 10, |root| {
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
        self.in_time(move |root| {
            let changed = |tenant: Tenant| {
                let at = root.changed_at(&tenant).filter(|at| *at >= since)?;
                Some(ChangedFolder { tenant, at: Some(at) })
            };
            Ok(Some(root.tenants()?.tenants.into_iter().filter_map(changed).collect()))
        })
    }

    fn check(&self, key: &SecretKey, _: Option<&SecretValue>) -> Result<(), Unstorable> {
        self.root.check(key)
    }

    fn put<'a>(
        &'a self,
        tenant: &'a Tenant,
        key: &'a SecretKey,
        value: &'a SecretValue,
    ) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        let (tenant, key, value) = (tenant.clone(), key.clone(), value.clone());
        self.in_time(move |root| root.put(&tenant, &key, &value))
    }

    fn delete<'a>(&'a self, tenant: &'a Tenant, key: &'a SecretKey) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        let (tenant, key) = (tenant.clone(), key.clone());
        self.in_time(move |root| root.delete(&tenant, &key))
    }

    fn create_folder<'a>(&'a self, tenant: &'a Tenant) -> BoxFuture<'a, Result<(), UpstreamError>> {
        let tenant = tenant.clone();
        self.in_time(move |root| root.create(&tenant))
    }

    fn remove_folder<'a>(&'a self, tenant: &'a Tenant, _: Lane) -> BoxFuture<'a, Result<bool, UpstreamError>> {
        let tenant = tenant.clone();
        self.in_time(move |root| root.remove(&tenant))
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
        Health { state, budget_left: None }
    }
}
