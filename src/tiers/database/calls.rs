//! The one way for every operation to reach the database: breaker, deadline, metrics, and the reuse
//! or closing of the connection.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use diesel::QueryResult;
use diesel_async::methods::{ExecuteDsl, LoadQuery};
use futures_util::future::BoxFuture;
use tokio::time::{error::Elapsed, timeout_at};

use super::{
    error::{Cause, Judgement, SHORTEST_BREAK, StoreError, WriteError},
    new_id,
    pool::{Connection, OwnedQuery, Pool, Postgres, Remains, Sqlite},
    rows::{AuditRecordRow, CopyState, Mark, NewChange, NewCompany, NewDataKey, NewSecret, StateRow, Use},
};
use crate::{
    log::Seldom,
    metrics::Metrics,
    tiers::breaker::{Breaker, Permit},
};

/// How often an operation is tried at most if the database undoes it each time.
const TRIES: u32 = 6;

/// The longest pause before the first repetition; it doubles each time.
const PAUSE: Duration = Duration::from_millis(5);

/// The parts that every operation uses.
pub(super) struct Calls {
    pub(super) pool: Pool,
    /// Whether the tables are up to date and belong to our environment. Until then nothing is asked
    /// of them: they may be another environment's.
    pub(super) is_open: AtomicBool,
    /// Whether the last write was accepted, rather than refused because nothing can be written.
    pub(super) is_writable: AtomicBool,
    pub(super) breaker: Breaker,
    /// SQLite's writes have a breaker of their own: a full disk, or another process that writes for
    /// long, stops them but no read. PostgreSQL's server is available for both or for neither.
    pub(super) writing: Option<Breaker>,
    pub(super) maker: Maker,
    pub(super) metrics: Arc<Metrics>,
    pub(super) timeout: Duration,
    pub(super) said: Said,
}

/// When the log last reported operations that the database did not do.
#[derive(Default)]
pub(super) struct Said {
    undone: Seldom,
    refused: Seldom,
}

/// An error that may be an error of the database tier.
pub(super) trait OfStore: From<StoreError> {
    fn of_store(&self) -> Option<&StoreError>;
}

impl OfStore for StoreError {
    fn of_store(&self) -> Option<&StoreError> {
        Some(self)
    }
}

impl OfStore for WriteError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            _ => None,
        }
    }
}

/// The name by which this process recognises its own changes: it need not follow those.
///
/// If a commit was not answered, nobody knows whether the transaction is done, or will be done in a
/// moment, after this process has read the state from before it. From then on the process has
/// another name, and follows its changes under the old name like anybody else's.
pub(super) struct Maker(RwLock<String>);

impl Default for Maker {
    fn default() -> Self {
        Self(RwLock::new(new_id()))
    }
}

impl Maker {
    pub(super) fn name(&self) -> String {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn renew(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = new_id();
    }
}

/// One operation in progress. If it is dropped before its end, it tells the breaker nothing about a
/// database that has not answered yet, and its connection is closed if anything was in progress.
pub(super) struct Call<'d> {
    calls: &'d Calls,
    name: &'static str,
    started: Instant,
    deadline: tokio::time::Instant,
    permit: Option<Permit<'d>>,
    connection: Option<Connection>,
    in_transaction: bool,
    under_way: bool,
    /// Whether the transaction is being committed.
    commits: bool,
    /// Whether a statement has changed anything.
    changes: bool,
    answered: bool,
    outcome: &'static str,
}

impl Calls {
    /// Begins an operation that only reads.
    pub(super) async fn read(&self, name: &'static str) -> Result<Call<'_>, StoreError> {
        self.check_open()?;
        self.read_first(name).await
    }

    /// The same for reads before the database is open.
    pub(super) async fn read_first(&self, name: &'static str) -> Result<Call<'_>, StoreError> {
        let mut call = self.admit(name, self.timeout, &self.breaker)?;
        call.connect(Box::pin(self.pool.connection())).await?;
        Ok(call)
    }

    /// Notes whether writes are accepted, and logs a change of that.
    fn note_writable(&self, is_writable: bool, reason: Option<&Cause>) {
        match (self.is_writable.swap(is_writable, Ordering::AcqRel), reason) {
            (true, Some(reason)) => {
                tracing::warn!(%reason, "the database takes no writes; what it holds is read all the same");
            }
            (false, None) => tracing::info!("the database takes writes again"),
            (true, None) | (false, Some(_)) => {}
        }
    }

    /// Begins an operation that writes, in a transaction.
    pub(super) async fn write(&self, name: &'static str) -> Result<Call<'_>, StoreError> {
        self.write_within(name, self.timeout).await
    }

    /// The same with a longer deadline, for work that no caller waits for.
    pub(super) async fn write_within(&self, name: &'static str, timeout: Duration) -> Result<Call<'_>, StoreError> {
        self.check_open()?;
        self.write_first(name, timeout).await
    }

    /// The same for writes before the database is open.
    pub(super) async fn write_first(&self, name: &'static str, timeout: Duration) -> Result<Call<'_>, StoreError> {
        let mut call = self.admit(name, timeout, self.writing.as_ref().unwrap_or(&self.breaker))?;
        if !self.is_writable.load(Ordering::Acquire) {
            self.pool.open_anew().await;
        }
        call.connect(Box::pin(self.pool.writing_connection())).await?;
        call.begin().await?;
        Ok(call)
    }

    /// Does a whole operation that writes, and repeats it while the database undoes it for the sake
    /// of others: a deadlock, or a transaction that cannot be serialised with theirs. An undone
    /// operation has done nothing, and a repetition a moment later succeeds. All of it takes no
    /// longer than the operation might have taken once.
    pub(super) async fn repeated<T, E: OfStore, F>(&self, operation: impl Fn() -> F) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        let mut outcome = operation().await;
        let mut until = None;
        for tried in 1..TRIES {
            let Err(Some(StoreError::Undone { left, .. })) = outcome.as_ref().map_err(E::of_store) else { break };
            let until = *until.get_or_insert_with(|| tokio::time::Instant::now() + *left);
            let pause = PAUSE.mul_f64(rand::random::<f64>()) * (1 << tried);
            let again = async {
                tokio::time::sleep(pause).await;
                operation().await
            };
            outcome = Box::pin(timeout_at(until, again)).await.unwrap_or_else(|_| {
                let source = Cause("no answer in time".to_owned());
                Err(StoreError::Unavailable { retry_after: SHORTEST_BREAK, source }.into())
            });
        }
        outcome
    }

    /// Begins an operation that reads, even while the breaker is open.
    pub(super) async fn probe(&self, name: &'static str) -> Result<Call<'_>, StoreError> {
        self.check_open()?;
        let mut call = self.call(name, self.timeout, self.breaker.probe());
        call.connect(Box::pin(self.pool.connection())).await?;
        Ok(call)
    }

    /// Refuses operations before the database is open.
    pub(super) fn check_open(&self) -> Result<(), StoreError> {
        if self.is_open.load(Ordering::Acquire) {
            return Ok(());
        }
        let reason = "it has not answered since the start";
        Err(StoreError::Unavailable { retry_after: SHORTEST_BREAK, source: Cause(reason.to_owned()) })
    }

    fn admit<'d>(
        &'d self,
        name: &'static str,
        timeout: Duration,
        breaker: &'d Breaker,
    ) -> Result<Call<'d>, StoreError> {
        match breaker.admit() {
            Ok(permit) => Ok(self.call(name, timeout, permit)),
            Err(open) => {
                self.metrics.count("secretier_database_calls_total", &[("call", name), ("outcome", "refused")]);
                let reason = "it has failed repeatedly and is left alone for a while";
                Err(StoreError::Unavailable { retry_after: open.retry_after, source: Cause(reason.to_owned()) })
            }
        }
    }

    fn call<'d>(&'d self, name: &'static str, timeout: Duration, permit: Permit<'d>) -> Call<'d> {
        Call {
            calls: self,
            name,
            started: Instant::now(),
            deadline: tokio::time::Instant::now() + timeout,
            permit: Some(permit),
            connection: None,
            in_transaction: false,
            under_way: false,
            commits: false,
            changes: false,
            answered: false,
            outcome: "cancelled",
        }
    }
}

impl Call<'_> {
    /// Returns the rows of a query. The first statement of an operation is tried again where it met
    /// a connection that had died in the pool.
    pub(super) fn load<'c, 'q: 'c, Q, Row>(&'c mut self, query: Q) -> BoxFuture<'c, Result<Vec<Row>, StoreError>>
    where
        Q: LoadQuery<'q, Sqlite, Row> + LoadQuery<'q, Postgres, Row> + Clone + Send + 'q,
        Row: Send + 'c,
    {
        Box::pin(async move {
            let again = (!self.answered).then(|| query.clone());
            let deadline = self.deadline;
            let mut result = timeout_at(deadline, self.start().load(query)).await;
            if let Some(query) = again
                && self.was_cut_off(&result)
            {
                self.reconnect().await?;
                result = timeout_at(deadline, self.start().load(query)).await;
            }
            self.settle(result)
        })
    }

    /// Returns the first row of a query, if there is one.
    pub(super) async fn first<'q, Q, Row>(&mut self, query: Q) -> Result<Option<Row>, StoreError>
    where
        Q: LoadQuery<'q, Sqlite, Row> + LoadQuery<'q, Postgres, Row> + Clone + Send + 'q,
        Row: Send,
    {
        Ok(self.load(query).await?.into_iter().next())
    }

    /// Returns the first row of a query that finds it by a key, if there is one.
    pub(super) async fn first_at_once<Q, Row>(&mut self, query: Q) -> Result<Option<Row>, StoreError>
    where
        Q: OwnedQuery<Row>,
        Row: Send + 'static,
    {
        let result = self.attempt_twice(|connection| connection.load_at_once(query.clone())).await?;
        Ok(self.settle(result)?.into_iter().next())
    }

    /// Returns the rows of a query, each of which may be of so many bytes that copying all of them
    /// takes long.
    pub(super) async fn load_large<Q, Row>(
        &mut self,
        query: Q,
        bytes: fn(&Row) -> usize,
    ) -> Result<Vec<Row>, StoreError>
    where
        Q: OwnedQuery<Row>,
        Row: Send + 'static,
    {
        let result = self.attempt_twice(|connection| connection.load_large(query.clone(), bytes)).await?;
        self.settle(result)
    }

    /// Runs a statement; returns the number of affected rows.
    pub(super) fn execute<'c, 'q: 'c, Q>(&'c mut self, query: Q) -> BoxFuture<'c, Result<usize, StoreError>>
    where
        Q: ExecuteDsl<Sqlite> + ExecuteDsl<Postgres> + Send + 'q,
    {
        Box::pin(async move {
            let result = timeout_at(self.deadline, self.start().execute(query)).await;
            let count = self.settle(result)?;
            self.changes |= count > 0;
            Ok(count)
        })
    }

    /// Inserts secrets.
    pub(super) async fn insert_secrets(&mut self, rows: Vec<NewSecret>) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().insert_secrets(rows)).await;
        self.settle(result)
    }

    /// Inserts data keys.
    pub(super) async fn insert_data_keys(&mut self, rows: Vec<NewDataKey>) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().insert_data_keys(rows)).await;
        self.settle(result)
    }

    /// Inserts changes.
    pub(super) async fn insert_changes(&mut self, rows: Vec<NewChange>) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().insert_changes(rows)).await;
        self.settle(result)
    }

    /// Inserts or marks tenants' rows, which locks them until the transaction ends.
    pub(super) async fn lock_companies_by_name(&mut self, rows: Vec<NewCompany>, mark: Mark) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().lock_companies_by_name(rows, mark)).await;
        self.settle(result)
    }

    /// Stores the state of tenants' copies.
    pub(super) async fn keep_copies(&mut self, copies: Vec<CopyState>) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().keep_copies(copies)).await;
        self.settle(result)
    }

    /// Writes tenants' heads.
    pub(super) async fn keep_heads(&mut self, heads: Vec<(String, Option<String>)>) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().keep_heads(heads)).await;
        self.settle(result)
    }

    /// Stores the state of tenants in a migration.
    pub(super) async fn keep_states(&mut self, states: Vec<StateRow>) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().keep_states(states)).await;
        self.settle(result)
    }

    /// Stores when tenants were last asked for.
    pub(super) async fn keep_uses(&mut self, uses: Vec<Use>) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().keep_uses(uses)).await;
        self.settle(result)
    }

    /// Inserts records of the audit.
    pub(super) async fn insert_audit(&mut self, rows: Vec<AuditRecordRow>) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().insert_audit(rows)).await;
        self.settle(result)
    }

    /// Notifies the listeners, when this is committed, that something has changed.
    pub(super) async fn notify(&mut self) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().notify()).await;
        self.settle(result)
    }

    /// Keeps the master key from being rotated until the transaction ends.
    pub(super) async fn share_rotations(&mut self) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().share_rotations()).await;
        self.settle(result)
    }

    /// Locks tenants until the transaction ends.
    pub(super) async fn lock_companies(&mut self, ids: Vec<String>) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().lock_companies(ids)).await;
        self.settle(result)
    }

    /// Removes deleted rows from the database's own files, as far as that can be done.
    pub(super) async fn erase(&mut self) -> Result<Remains, StoreError> {
        // Waits for other users of the files, but not so long that it would look like an outage.
        let (wait, usual) = (self.left() / 2, self.calls.timeout);
        let result = timeout_at(self.deadline, self.start().erase(wait, usual)).await;
        self.settle(result)
    }

    /// Ends an operation that read.
    pub(super) fn done(mut self) {
        self.finish("ok");
    }

    /// Commits the operation's writes.
    pub(super) async fn commit(mut self) -> Result<(), StoreError> {
        self.commits = true;
        let result = timeout_at(self.deadline, self.start().commit()).await;
        self.settle(result)?;
        (self.in_transaction, self.commits) = (false, false);
        if self.changes {
            self.calls.note_writable(true, None);
        }
        self.finish("ok");
        Ok(())
    }

    /// Undoes the operation's writes: a refusal, not a failure.
    pub(super) async fn roll_back(mut self) -> Result<(), StoreError> {
        let result = timeout_at(self.deadline, self.start().rollback()).await;
        self.settle(result)?;
        self.in_transaction = false;
        self.finish("refused");
        Ok(())
    }

    async fn begin(&mut self) -> Result<(), StoreError> {
        let (left, usual) = (self.left(), self.calls.timeout);
        let result = self.attempt_twice(|connection| connection.begin(left, usual)).await?;
        // Set also where the statement failed: the state is not known then.
        self.in_transaction = true;
        self.settle(result)
    }

    /// Runs a statement, and once more where the operation's first statement met a connection that
    /// had died in the pool.
    async fn attempt_twice<T>(
        &mut self,
        run: impl Fn(&mut Connection) -> BoxFuture<'_, QueryResult<T>>,
    ) -> Result<Result<QueryResult<T>, Elapsed>, StoreError> {
        let deadline = self.deadline;
        let result = timeout_at(deadline, run(self.start())).await;
        if self.answered || !self.was_cut_off(&result) {
            return Ok(result);
        }
        self.reconnect().await?;
        Ok(timeout_at(deadline, run(self.start())).await)
    }

    async fn connect(&mut self, connection: impl Future<Output = Result<Connection, Cause>>) -> Result<(), StoreError> {
        match timeout_at(self.deadline, connection).await {
            Ok(Ok(connection)) => {
                self.connection = Some(connection);
                Ok(())
            }
            Ok(Err(cause)) => Err(self.outage(cause)),
            Err(_) => Err(self.outage(Cause("no connection in time".to_owned()))),
        }
    }

    async fn reconnect(&mut self) -> Result<(), StoreError> {
        if let Some(dead) = self.connection.take() {
            dead.discard();
        }
        self.under_way = false;
        let pool = &self.calls.pool;
        self.connect(Box::pin(pool.connection())).await
    }

    /// How long the operation may still take.
    pub(super) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(tokio::time::Instant::now())
    }

    /// Returns the connection, for one statement.
    fn start(&mut self) -> &mut Connection {
        self.under_way = true;
        self.connection.as_mut().expect("a call begins with a connection and keeps it until it ends")
    }

    fn was_cut_off<T>(&self, result: &Result<QueryResult<T>, Elapsed>) -> bool {
        match (result, &self.connection) {
            (Ok(Err(error)), Some(connection)) => connection.is_dead(error),
            _ => false,
        }
    }

    fn settle<T>(&mut self, result: Result<QueryResult<T>, Elapsed>) -> Result<T, StoreError> {
        let error = match result {
            Ok(Ok(value)) => {
                self.under_way = false;
                self.answered = true;
                return Ok(value);
            }
            Ok(Err(error)) => error,
            Err(_) => return Err(self.outage(Cause("no answer in time".to_owned()))),
        };
        let judgement = self.connection.as_ref().map_or(Judgement::Outage(None), |it| it.judge(&error));
        let source = Cause::chain(&error);
        self.tell(judgement, &source);
        if let Judgement::Outage(_) = judgement {
            return Err(self.outage(source));
        }
        self.under_way = false;
        Err(match judgement {
            Judgement::Undone(_) => {
                // It is certain that nothing was committed.
                self.commits = false;
                self.finish("undone");
                StoreError::Undone { left: self.left(), source }
            }
            Judgement::Unwritable(_) => {
                self.finish("unwritable");
                self.calls.pool.tell_unwritable(&source);
                self.calls.note_writable(false, Some(&source));
                StoreError::Unwritable(source)
            }
            Judgement::Outage(_) | Judgement::Refused(_) => {
                self.finish("broken");
                StoreError::Broken(source)
            }
        })
    }

    /// Logs which operation the server does not do although it answers. The server's message has no
    /// values in it: those are in the details, which are left out.
    fn tell(&self, judgement: Judgement, reason: &Cause) {
        let Said { undone, refused } = &self.calls.said;
        match judgement {
            // The server said nothing: if that lasts, it is logged as an outage.
            Judgement::Outage(None) => {}
            Judgement::Undone(sqlstate) => {
                if let Some(others) = undone.may_say() {
                    tracing::warn!(
                        call = self.name, sqlstate, %reason, others,
                        "the database undid an operation for the sake of another; it is tried again where time is left"
                    );
                }
            }
            Judgement::Outage(sqlstate) | Judgement::Refused(sqlstate) | Judgement::Unwritable(sqlstate) => {
                if let Some(others) = refused.may_say() {
                    tracing::warn!(call = self.name, sqlstate, %reason, others, "the database did not do an operation");
                }
            }
        }
    }

    fn outage(&mut self, source: Cause) -> StoreError {
        self.outcome = "unavailable";
        if let Some(permit) = self.permit.take() {
            permit.failed();
        }
        tracing::debug!(call = self.name, reason = %source, "the database did not answer");
        StoreError::Unavailable { retry_after: SHORTEST_BREAK, source }
    }

    fn finish(&mut self, outcome: &'static str) {
        self.outcome = outcome;
        if let Some(permit) = self.permit.take() {
            permit.succeeded();
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if self.commits {
            self.calls.maker.renew();
        }
        // The caller stopped waiting. If the database had answered before, that counts as an
        // answer; if not, its state is not known.
        if self.answered
            && let Some(permit) = self.permit.take()
        {
            permit.succeeded();
        }
        if let Some(connection) = self.connection.take()
            && (self.under_way || self.in_transaction)
        {
            connection.discard();
        }
        let metrics = &self.calls.metrics;
        metrics.count("secretier_database_calls_total", &[("call", self.name), ("outcome", self.outcome)]);
        metrics.observe("secretier_database_call_seconds", &[("call", self.name)], self.started.elapsed());
    }
}
