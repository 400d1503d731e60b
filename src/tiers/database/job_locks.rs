//! Job locks: for work that one process at a time may do, however long it takes: a migration, a
//! rotation of keys, the removal of folders.
//!
//! A job lock is a lease (`leases.rs`), and, where it is available, an *advisory lock*: of a file
//! beside SQLite's, or of a session at PostgreSQL. Neither would do alone. The advisory lock shows
//! at once that its holder has died, but a holder that hangs would keep it for ever; it also goes
//! with a connection, and the holder learns late that it has ended. The lease ends by itself, which
//! takes a while, and has the fencing token, which every transaction under the job lock compares
//! ([`Database::check`]): whatever happens to locks and clocks below, if two processes believe that
//! they have the job lock, only the one that took it last can write.
//!
//! The lease's row says whether its holder had the advisory lock when it took or last renewed the
//! lease. So:
//!
//! - A process that gets the advisory lock takes the lease over if it has ended, or if its holder
//!   had the advisory lock: the holder has it no more.
//! - A process that does not get the advisory lock takes the lease over only if it has ended: its
//!   holder hangs.
//! - A holder without the advisory lock tries to get it whenever it renews.
//!
//! The possible interleavings, and the outcome of each:
//! - *Two processes want a free job lock at once.* At most one gets the advisory lock, and the
//!   row's lock makes them look at the lease one after the other. The second finds it held: by the
//!   one with the advisory lock, or by the one without it, which came first. In the latter case the
//!   one with the advisory lock is refused and releases it, and the other gets it when it renews.
//! - *A holder dies.* The next process gets the advisory lock, and with it the job, at once,
//!   whatever the lease says. If the holder was without the advisory lock (it had taken over from
//!   one that hangs), the next one waits for the end of the lease.
//! - *A holder is stopped, and continues later.* Its advisory lock stays: SQLite's because the
//!   process has the file open, PostgreSQL's because the system keeps its connection alive. Another
//!   process takes over when the lease has ended, without the advisory lock. When the first
//!   continues, its next transaction finds another token and is rolled back, its work ends, and
//!   with it its advisory lock, which the second gets at its next renewal. If it was stopped
//!   between the check and the commit, the row is locked: on PostgreSQL until the server ends the
//!   session of a transaction that does nothing for a minute; on SQLite, where a transaction keeps
//!   every writer out, until the process continues or is killed.
//! - *PostgreSQL is restarted, or ends the session, under a holder.* Until it renews, it believes
//!   that it has an advisory lock that another process can get: that one takes over, and the holder
//!   learns of it from its next transaction or renewal. If it renews first, it gets the advisory
//!   lock back, or, where the other has it already, notes in the row that it is without: then the
//!   other one is refused, and releases it.
//! - *A process only looks up the holder of the job lock* ([`Database::job_lock_holder`]) and has
//!   the advisory lock for a moment. A process that wants the job lock tries again for a second,
//!   and one that renews tries again in four.
//! - *The database's clock is set ahead*, or on SQLite the machine's. A process that wants the job
//!   lock before it is renewed takes the lease for ended, and takes over from a working holder. The
//!   holder stops; nothing is written twice. *The clock is set back*: the wait for a holder that
//!   hangs is so much longer, unless it is killed, for then the advisory lock shows it. On
//!   PostgreSQL only the database's clock counts, no machine's.
//! - *The advisory lock's file is removed by hand*, or a pooler of PostgreSQL's connections, which
//!   was checked when the process began (`sessions.rs`), later gives the same session to two
//!   clients: both get the advisory lock, the second takes over, the first stops.

use std::time::Duration;

use tokio::sync::Mutex;

use super::{
    Database,
    calls::Call,
    error::{Cause, SHORTEST_BREAK, StoreError},
    leases::{Holder, Lease},
    pool::Exclusive,
};

/// How long a job lock lasts without renewal.
const LASTS: Duration = Duration::from_secs(15);

/// How often it is renewed; every transaction under it renews it as well.
const RENEWED_EVERY: Duration = Duration::from_secs(4);

/// How often a process tries to get a job lock that another process has.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// The right to do something, until another process takes it over: to be renewed by
/// [`Database::renewing`], and ended by [`Database::end_job_lock`]. If it is dropped, others can
/// take it at once where it had its advisory lock, which it has except in rare cases.
#[must_use = "a job lock that is not ended may keep the others waiting until its time is over"]
pub struct JobLock {
    lease: Lease,
    // One renewal at a time: the work may renew it while the periodic renewal does.
    lock: Mutex<Option<Exclusive>>,
}

impl Database {
    /// Does this work under a job lock, and renews it meanwhile. If another process takes it over,
    /// the work is stopped at once: its transaction is rolled back.
    ///
    /// # Errors
    /// The errors of the work; [`StoreError::LeaseLost`].
    pub async fn renewing<T, E: From<StoreError>>(
        &self,
        job: &JobLock,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        tokio::select! {
            done = work => done,
            lost = self.renew_until_lost(job) => Err(lost.into()),
        }
    }

    /// Checks that a job lock is still ours, and renews it: to be called right before a change in
    /// another system, which no transaction can fence. Another process may take over during that
    /// change if it takes longer than the job lock lasts.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`] where another process has taken it over.
    pub async fn renew_job_lock(&self, job: &JobLock) -> Result<(), StoreError> {
        let mut lock = job.lock.lock().await;
        if !self.is_held(&mut lock).await {
            *lock = None;
            *lock = self.try_lock(job.lease.name()).await.unwrap_or_default();
        }
        self.renew_lease(&job.lease, lock.is_some()).await
    }

    /// Ends a job lock, so that processes that wait for it get it at once.
    pub async fn end_job_lock(&self, job: JobLock) {
        // In this order: a process that gets the advisory lock now takes over with it, and has
        // both.
        if let Some(lock) = job.lock.into_inner() {
            let _ = tokio::time::timeout(self.calls.timeout, lock.release()).await;
        }
        if let Err(error) = self.end_lease(&job.lease).await {
            tracing::debug!(%error, "a job lock ends by itself");
        }
    }

    /// Takes a job lock, if nobody else has it within so long; otherwise returns its holder. `by`
    /// describes this process to people.
    pub(super) async fn job_lock(
        &self,
        name: &str,
        by: &str,
        within: Duration,
    ) -> Result<Result<JobLock, Holder>, StoreError> {
        let deadline = tokio::time::Instant::now() + within;
        loop {
            match self.try_job_lock(name, by).await? {
                Err(_) if tokio::time::Instant::now() < deadline => tokio::time::sleep(RETRY_INTERVAL).await,
                outcome => return Ok(outcome),
            }
        }
    }

    /// The holder of a job lock that is alive, as far as can be known.
    pub(super) async fn job_lock_holder(&self, name: &str) -> Result<Option<Holder>, StoreError> {
        let Some(row) = self.held_lease(name).await? else { return Ok(None) };
        if row.locked
            && let Some(lock) = self.try_lock(name).await?
        {
            lock.release().await;
            return Ok(None);
        }
        Ok(Some(row.into()))
    }

    /// Checks that a job lock is still ours, and keeps it from changing its holder until the
    /// transaction ends: see [`Lease::check`].
    pub(super) async fn check(&self, call: &mut Call<'_>, job: &JobLock) -> Result<(), StoreError> {
        job.lease.check(call, self.clock.database_now()).await
    }

    async fn try_job_lock(&self, name: &str, by: &str) -> Result<Result<JobLock, Holder>, StoreError> {
        let lock = self.try_lock(name).await?;
        let taken = match &lock {
            Some(_) => self.take(name, by, LASTS, true).await?,
            None => self.lease(name, by, LASTS).await?,
        };
        match (taken, lock) {
            (Ok(lease), lock) => Ok(Ok(JobLock { lease, lock: Mutex::new(lock) })),
            (Err(holder), Some(lock)) => {
                lock.release().await;
                Ok(Err(holder))
            }
            (Err(holder), None) => Ok(Err(holder)),
        }
    }

    async fn renew_until_lost(&self, job: &JobLock) -> StoreError {
        loop {
            tokio::time::sleep(RENEWED_EVERY).await;
            match self.renew_job_lock(job).await {
                Ok(()) => {}
                Err(StoreError::LeaseLost) => return StoreError::LeaseLost,
                Err(error) => tracing::debug!(%error, "a job lock could not be renewed"),
            }
        }
    }

    async fn try_lock(&self, name: &str) -> Result<Option<Exclusive>, StoreError> {
        let lock = tokio::time::timeout(self.calls.timeout, self.calls.pool.try_exclusive(name)).await;
        lock.unwrap_or_else(|_| Err(Cause("no answer in time".to_owned())))
            .map_err(|source| StoreError::Unavailable { retry_after: SHORTEST_BREAK, source })
    }

    async fn is_held(&self, lock: &mut Option<Exclusive>) -> bool {
        let Some(lock) = lock else { return false };
        tokio::time::timeout(self.calls.timeout, lock.is_held()).await.unwrap_or(false)
    }
}
