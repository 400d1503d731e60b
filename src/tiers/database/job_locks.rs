//! Job locks: work that one process does at a time, however long it takes: a migration, a rotation of
//! keys, the removal of folders.
//!
//! A job lock is a lease (`leases.rs`), and where it can be had an *advisory lock*: of a file beside
//! SQLite's, or of a session at PostgreSQL. Neither would do alone. The advisory lock tells at once
//! that its holder has died, and a holder that hangs would keep it for ever; it also goes with a
//! connection, of which the holder learns late. The lease ends by itself, which takes a while, and has
//! the fencing token, which every transaction under the job lock compares ([`Database::check`]):
//! whatever is said of locks and clocks below, of two who believe to have the job lock only the one who
//! took it last can write.
//!
//! The lease's row tells whether its holder had the advisory lock when it took or last renewed the
//! lease. So:
//!
//! - Who gets the advisory lock takes the lease over if it has ended, or if its holder had the advisory
//!   lock: it has it no more.
//! - Who does not get the advisory lock takes the lease over only if it has ended: its holder hangs.
//! - A holder without the advisory lock tries to get it whenever it renews.
//!
//! What may happen, and what comes of it:
//!
//! - *Two want a free job lock at once.* At most one gets the advisory lock, and the row's lock lets
//!   one after the other look at the lease. The second finds it held: by the one with the advisory
//!   lock, or by the one without it, who had come first. Then the one with the advisory lock is refused
//!   and lets go of it, and the other gets it when it renews.
//! - *A holder dies.* The next one gets the advisory lock, and with it the job, at once, whatever the
//!   lease says. If the holder was without the advisory lock (it had taken over from one that hangs),
//!   the next one waits for the end of the lease.
//! - *A holder is stopped, and goes on later.* Its advisory lock stays: SQLite's because the process
//!   has the file open, PostgreSQL's because the system keeps its connection alive. Another one takes
//!   over when the lease has ended, without the advisory lock. When the first goes on, its next
//!   transaction finds another token and is rolled back, its work ends, and with it its advisory lock,
//!   which the second gets at its next renewal. If it had been stopped between the check and the
//!   commit, the row is locked: on PostgreSQL until the server ends the session of a transaction that
//!   does nothing for a minute; on SQLite, where a transaction keeps every writer out, until the
//!   process goes on or is killed.
//! - *PostgreSQL is restarted, or ends the session, under a holder.* Until it renews, it believes to
//!   have an advisory lock that another can get: that one takes over, and the holder learns of it from
//!   its next transaction or renewal. If it renews first, it gets the advisory lock back, or, where the
//!   other has it already, notes in the row that it is without: then the other one is refused, and lets
//!   go.
//! - *Somebody only looks who has the job lock* ([`Database::job_lock_holder`]) and has the advisory
//!   lock for a moment: who wants the job lock looks again for a second, and who renews does in four.
//! - *The database's clock is set ahead*, or on SQLite the machine's. Who wants the job lock before it
//!   is renewed takes the lease for ended, and takes over from a holder that works. That one stops;
//!   nothing is written twice. *It is set back*: a holder that hangs is waited for by so much longer,
//!   unless it is killed, for then the advisory lock tells. On PostgreSQL no machine's clock counts but
//!   the database's.
//! - *The advisory lock's file is removed by hand*, or a pooler of PostgreSQL's connections, which was
//!   looked at when the process began (`sessions.rs`), gives the same session to two later: both get
//!   the advisory lock, the second takes over, the first stops.

use std::time::Duration;

use tokio::sync::Mutex;

use super::{
    Database,
    calls::{Call, SHORTEST_BREAK},
    error::{Cause, StoreError},
    leases::{Holder, Lease},
    pool::Exclusive,
};

/// How long a job lock lasts that nobody renews.
const LASTS: Duration = Duration::from_secs(15);

/// How often it is renewed; beside that, every transaction under it does.
const RENEWED_EVERY: Duration = Duration::from_secs(4);

/// How often one that another process has is looked for.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// The right to do something, until another process takes it over: to be renewed by
/// [`Database::renewing`], and ended by [`Database::end_job_lock`]. One that is dropped is free
/// for others at once where it had its lock, which it has but in rare cases.
#[must_use = "a job lock that is not ended may keep the others waiting until its time is over"]
pub struct JobLock {
    lease: Lease,
    // One renewal at a time: the work may renew beside what renews it all the while.
    lock: Mutex<Option<Exclusive>>,
}

impl Database {
    /// Does this work under a job lock, and renews it meanwhile. Where another process has
    /// taken it over, the work is ended where it stands: what it was writing is rolled back.
    ///
    /// # Errors
    /// Those of the work; that of [`StoreError::LeaseLost`].
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

    /// Makes sure that a job lock is ours still, and renews it: to be asked right before what no
    /// transaction can fence, a change in another system. Another process may take over while
    /// that is under way, if it takes longer than the job lock lasts.
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

    /// Ends a job lock: whoever waits for it need not wait longer.
    pub async fn end_job_lock(&self, job: JobLock) {
        // In this order: who gets the lock now takes over with it, and has both.
        if let Some(lock) = job.lock.into_inner() {
            let _ = tokio::time::timeout(self.calls.timeout, lock.release()).await;
        }
        if let Err(error) = self.end_lease(&job.lease).await {
            tracing::debug!(%error, "a job lock ends by itself");
        }
    }

    /// Such a right, if nobody else has it within so long; else tells who has. `by` is this
    /// process, for people.
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

    /// Who has such a right and is alive, as far as can be told.
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

    /// Makes sure that a job lock is ours still, and keeps it from changing hands until the
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
