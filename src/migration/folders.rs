//! Upstream's folders as an origin of a migration: one call a tenant, or one for all of them.

use std::{
    collections::HashMap,
    num::NonZeroU16,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream};
use tokio::sync::Semaphore;

use super::{
    origin::{Content, Listed, Origin, OriginError, Problem, ProblemKind},
    transfer,
};
use crate::{
    clock::Clock,
    flaws::Unusable,
    tenant::Tenant,
    tiers::{
        database::{Database, JobLock, StoreError},
        upstream::{Everything, Fetched, Lane, Oddity, OddityKind, Snapshot, Upstream, UpstreamError},
    },
};

/// The most reads of one round that are prepared at once; the connections limit how many run.
const AT_ONCE: usize = 32;

/// The most tries of a call whose failure may be temporary.
const TRIES: u32 = 6;

/// The first pause between two tries; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// The longest wait for one call in all, while upstream says to come back later. Waiting for our
/// own budget is not counted: it always comes back.
const UPSTREAM_WAIT: Duration = Duration::from_secs(5 * 60);

/// How upstream is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// One call a tenant: works everywhere, and holds few values in memory.
    Folder,
    /// One call for all tenants, where the server and the identity allow it.
    Recursive,
}

impl Strategy {
    /// The word used on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Folder => "folder",
            Self::Recursive => "recursive",
        }
    }
}

/// Upstream's folders.
pub struct Folders {
    upstream: Arc<dyn Upstream>,
    clock: Clock,
    recursive: AtomicBool,
    /// Limits the folders that all rounds read at once to as many calls as upstream's client lets a
    /// migration make at once. A call that waited in the client would use up its own timeout.
    reads: Semaphore,
    told: Mutex<Vec<String>>,
    waiting: Waiting,
}

/// Called with a failure that is waited for, and the length of the wait.
pub type Waiting = Box<dyn Fn(&UpstreamError, Duration) + Send + Sync>;

impl Folders {
    /// Reads them in this way, over half of the connections: the others are for waiting callers.
    #[must_use]
    pub fn new(
        upstream: Arc<dyn Upstream>,
        clock: Clock,
        strategy: Strategy,
        connections: NonZeroU16,
        waiting: Waiting,
    ) -> Self {
        let recursive = AtomicBool::new(strategy == Strategy::Recursive);
        let reads = Semaphore::new(usize::from(connections.get()).div_ceil(2));
        Self { upstream, clock, recursive, reads, told: Mutex::default(), waiting }
    }

    async fn read_each(&self, tenants: &[Tenant]) -> Vec<Result<Content, OriginError>> {
        // Each call has its own patience. Once one has lost it, the other tenants are not tried.
        let lost = OnceLock::new();
        let reads: Vec<_> = tenants.iter().map(|tenant| self.read_unless(&lost, tenant)).collect();
        let mut contents: Vec<_> = stream::iter(reads).buffered(AT_ONCE).collect().await;
        self.doubt_empty(tenants, &mut contents).await;
        contents
    }

    async fn read_unless(&self, lost: &OnceLock<OriginError>, tenant: &Tenant) -> Result<Content, OriginError> {
        // Never closed, so never refused.
        let _read = self.reads.acquire().await.ok();
        if let Some(error) = lost.get() {
            return Err(error.clone());
        }
        let content = self.read_one(tenant).await;
        if let Err(error) = &content
            && error.is_of_all()
        {
            let _ = lost.set(error.clone());
        }
        content
    }

    async fn read_one(&self, tenant: &Tenant) -> Result<Content, OriginError> {
        let began = self.clock.database_now();
        match self.patiently(|| self.upstream.snapshot(tenant, None, Lane::Migration)).await? {
            Fetched::Changed(snapshot) => Ok(content(snapshot, began)),
            Fetched::Unchanged => Err(UpstreamError::Malformed("it says unchanged, and nothing was known").into()),
        }
    }

    /// Reads all tenants in one call; `None` where the answer cannot be trusted or had.
    async fn read_all(&self, tenants: &[Tenant]) -> Option<Vec<Result<Content, OriginError>>> {
        let began = self.clock.database_now();
        let everything = match self.patiently(|| self.upstream.everything(Lane::Migration)).await {
            Ok(everything) => everything,
            Err(error) => {
                self.fall_back(format!("the folders cannot be read in one call ({error}); they are read one by one"));
                return None;
            }
        };
        let Everything { tenants: mut found, has_imports } = everything;
        if has_imports {
            let reason =
                "some folder imports another, and a read of all folders does not tell which; they are read one by one";
            self.fall_back(reason.to_owned());
            return None;
        }
        // A tenant that is not in the answer is empty, or is silently left out because we may not
        // read it: its own folder tells which.
        let (listed, missing): (Vec<_>, Vec<_>) =
            tenants.iter().cloned().partition(|tenant| found.contains_key(tenant));
        let mut contents: HashMap<Tenant, Result<Content, OriginError>> = HashMap::new();
        for tenant in listed {
            if let Some(snapshot) = found.remove(&tenant) {
                contents.insert(tenant, Ok(content(snapshot, began)));
            }
        }
        drop(found);
        if !missing.is_empty() {
            self.tell(match missing.len() {
                1 => "1 folder is not in the answer for all of them; it is read by itself".to_owned(),
                count => format!("{count} folders are not in the answer for all of them; they are read one by one"),
            });
            contents.extend(missing.iter().cloned().zip(self.read_each(&missing).await));
        }
        let lost = || Err(UpstreamError::Malformed("a folder was lost").into());
        Some(tenants.iter().map(|tenant| contents.remove(tenant).unwrap_or_else(lost)).collect())
    }

    /// Doubts empty folders: a missing folder reads as an empty one, so it proves nothing unless a
    /// list that is read now has the folder.
    async fn doubt_empty(&self, tenants: &[Tenant], contents: &mut [Result<Content, OriginError>]) {
        let is_empty = |content: &Result<Content, OriginError>| matches!(content, Ok(content) if content.snapshot.secrets.is_empty() && content.problems.is_empty());
        if !contents.iter().any(is_empty) {
            return;
        }
        let listed = self.patiently(|| self.upstream.tenants(Lane::Migration)).await;
        for (tenant, content) in tenants.iter().zip(contents).filter(|(_, content)| is_empty(content)) {
            match &listed {
                Ok(folders) if folders.tenants.contains(tenant) => {}
                Ok(_) => *content = Err(OriginError::Missing),
                // This is no denial of the tenant's own folder.
                Err(UpstreamError::Denied) => *content = Err(OriginError::Unlisted),
                Err(error) => *content = Err(error.clone().into()),
            }
        }
    }

    async fn patiently<'a, T>(
        &'a self,
        call: impl Fn() -> BoxFuture<'a, Result<T, UpstreamError>>,
    ) -> Result<T, UpstreamError> {
        telling(call, &*self.waiting).await
    }

    fn fall_back(&self, reason: String) {
        self.recursive.store(false, Ordering::Relaxed);
        self.tell(reason);
    }

    fn tell(&self, reason: String) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).push(reason);
    }
}

impl Origin for Folders {
    fn tenants(&self) -> BoxFuture<'_, Result<Listed, OriginError>> {
        Box::pin(async {
            let folders = self.patiently(|| self.upstream.tenants(Lane::Migration)).await?;
            Ok(Listed { tenants: folders.tenants, unusable: folders.unusable })
        })
    }

    fn read<'a>(&'a self, tenants: &'a [Tenant]) -> BoxFuture<'a, Vec<Result<Content, OriginError>>> {
        Box::pin(async {
            // For one tenant, its own folder is the smaller answer.
            if self.reads_all_at_once() && tenants.len() > 1 {
                let contents = self.read_all(tenants).await;
                return contents.unwrap_or_else(|| tenants.iter().map(|_| Err(OriginError::TooMany)).collect());
            }
            self.read_each(tenants).await
        })
    }

    fn reads_all_at_once(&self) -> bool {
        self.recursive.load(Ordering::Relaxed)
    }

    fn told(&self) -> Vec<String> {
        std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Makes a call, and repeats it where its failure may be temporary, or where upstream or our own
/// budget says when to come back.
///
/// # Errors
/// The last failure.
pub(super) async fn patiently<'a, T>(
    call: impl Fn() -> BoxFuture<'a, Result<T, UpstreamError>>,
) -> Result<T, UpstreamError> {
    telling(call, &|_, _| {}).await
}

/// Changes upstream under a job lock, and retries for a while where a failure may be temporary.
/// Right before each try it makes sure that the lock is still ours, because upstream compares no
/// fencing tokens.
///
/// A gap remains: a process that is stopped between that check and the request, or while the
/// request is under way, for longer than the lock lasts, changes upstream when it goes on, whatever
/// the new holder has done meanwhile. It then ends at its next check of the lock.
pub(super) async fn change<'a, T>(
    database: &Database,
    lock: &JobLock,
    call: impl Fn() -> BoxFuture<'a, Result<T, UpstreamError>>,
) -> Result<T, ChangeError> {
    let mut patience = Patience::default();
    loop {
        transfer::patiently(|| database.renew_job_lock(lock)).await?;
        match call().await {
            Ok(answer) => return Ok(answer),
            Err(error) => patience.wait(error, &|_, _| {}).await?,
        }
    }
}

/// Why nothing was changed upstream.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChangeError {
    /// Upstream refuses it, or does not answer.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// The lock is no longer ours, or that cannot be told.
    #[error(transparent)]
    Store(#[from] StoreError),
}

async fn telling<'a, T>(
    call: impl Fn() -> BoxFuture<'a, Result<T, UpstreamError>>,
    waiting: &(dyn Fn(&UpstreamError, Duration) + Send + Sync),
) -> Result<T, UpstreamError> {
    let mut patience = Patience::default();
    loop {
        match call().await {
            Ok(answer) => return Ok(answer),
            Err(error) => patience.wait(error, waiting).await?,
        }
    }
}

/// The tries and the time that are left for a call.
struct Patience {
    failures: u32,
    waited: Duration,
    pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { failures: 0, waited: Duration::ZERO, pause: FIRST_PAUSE }
    }
}

impl Patience {
    /// Waits until it is worth asking again; or returns the error.
    async fn wait(
        &mut self,
        error: UpstreamError,
        waiting: &(dyn Fn(&UpstreamError, Duration) + Send + Sync),
    ) -> Result<(), UpstreamError> {
        let wait = match &error {
            UpstreamError::OutOfBudget { retry_after } => {
                tokio::time::sleep(*retry_after).await;
                return Ok(());
            }
            UpstreamError::RateLimited { retry_after } | UpstreamError::Down { retry_after, .. } => *retry_after,
            UpstreamError::LoginRefused { retry_after, .. } => {
                self.failures += 2;
                *retry_after
            }
            UpstreamError::TimedOut
            | UpstreamError::Unreachable { .. }
            | UpstreamError::Failed(_)
            | UpstreamError::Incomplete => {
                self.failures += 1;
                self.pause *= 2;
                self.pause / 2
            }
            // A cut off or garbled answer may come whole next time; a hidden value stays hidden.
            UpstreamError::Malformed(_) | UpstreamError::Foreign { .. } => {
                self.failures += 2;
                self.pause
            }
            UpstreamError::Denied
            | UpstreamError::Rejected { .. }
            | UpstreamError::Unstorable(_)
            | UpstreamError::AwaitsApproval => return Err(error),
        };
        self.waited += wait;
        if self.failures >= TRIES || self.waited > UPSTREAM_WAIT {
            return Err(error);
        }
        waiting(&error, wait);
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

fn content(snapshot: Snapshot, began: crate::clock::Timestamp) -> Content {
    let problem = |oddity: &Oddity| {
        let (kind, detail) = match oddity.kind {
            OddityKind::InvalidName => (ProblemKind::Name, None),
            OddityKind::Unusable(Unusable::Duplicate) => (ProblemKind::Duplicate, None),
            OddityKind::Unusable(Unusable::Hidden) => {
                (ProblemKind::Value, Some("has a value that upstream hides from us"))
            }
            OddityKind::Unusable(Unusable::NotText) => {
                (ProblemKind::Value, Some("has a value that is not Unicode text"))
            }
            OddityKind::Unusable(Unusable::Reference) => {
                (ProblemKind::Value, Some("refers to a secret that cannot be read just now"))
            }
            OddityKind::Reference(reason) => (ProblemKind::Reference, Some(reason.explain())),
        };
        Problem { name: oddity.name.clone(), kind, detail: detail.map(Into::into) }
    };
    let problems = snapshot.oddities.iter().map(problem).collect();
    Content { snapshot, problems, began }
}
