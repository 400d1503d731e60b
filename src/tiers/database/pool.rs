//! The pool: the only file that distinguishes SQLite and PostgreSQL.
//!
//! We manage the connections ourselves, since diesel-async's own managers can neither speak TLS to
//! PostgreSQL nor detect a closed connection before it is used.

mod examine;
mod postgresql;
mod sqlite;

use std::{
    collections::HashSet,
    convert::Infallible,
    pin::pin,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use deadpool::managed::{self, Manager, Object, QueueMode};
use diesel::{
    ExpressionMethods as _, QueryDsl as _, QueryResult, RunQueryDsl as SyncDsl, SqliteConnection,
    pg::Pg,
    query_builder::{QueryFragment, QueryId},
    query_dsl::methods::LoadQuery as SyncLoad,
    result::Error,
    sql_types::{Array, BigInt, Bool, Nullable, Text},
    upsert::excluded,
};
use diesel_async::{
    AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _,
    methods::{ExecuteDsl, LoadQuery},
    sync_connection_wrapper::SyncConnectionWrapper,
};
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use futures_util::{FutureExt as _, TryFutureExt as _, TryStreamExt as _, future::BoxFuture};
use tokio::sync::{Mutex, OwnedMutexGuard, Semaphore};

pub use self::examine::{Readiness, examine};
use self::{
    postgresql::{PostgresConnection, PostgresManager, prepare_postgres},
    sqlite::{READ_ONLY, SqliteManager, Work, busy_timeout, connect_sqlite, prepare_sqlite, unavailable},
};
use super::{
    config::{Config, Target},
    error::{Cause, Judgement, StoreError},
    prepared::Prepared,
    rows::{AuditRecordRow, CopyState, Mark, NewChange, NewCompany, NewDataKey, NewSecret, StateRow, Use},
    schema::{audit_records, changes, companies, company_data_keys, company_secrets, migration_tenants, tenant_uses},
    sessions::Sessions,
    tables::Standing,
};
use crate::long_work::Pace;

pub(super) type Sqlite = SyncConnectionWrapper<SqliteConnection, Work>;
pub(super) type Postgres = AsyncPgConnection;

/// A query that can be given to another thread.
pub(super) trait OwnedQuery<Row>:
    SyncLoad<'static, SqliteConnection, Row> + LoadQuery<'static, Postgres, Row> + Clone + Send + 'static
{
}

impl<Q, Row> OwnedQuery<Row> for Q where
    Q: SyncLoad<'static, SqliteConnection, Row> + LoadQuery<'static, Postgres, Row> + Clone + Send + 'static
{
}

const SQLITE_MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations/sqlite");
const POSTGRES_MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations/postgres");

// An acknowledged write is on the disk (FULL), and the data that it replaced is gone from the file
// (secure_delete).
const SQLITE_SETUP: &str = "PRAGMA foreign_keys = ON; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;";

/// The time limit for bringing the tables up to date, including the wait for other instances.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(60);

/// Connections to one of the two databases.
pub(super) enum Pool {
    Sqlite {
        connections: managed::Pool<SqliteManager>,
        // SQLite has one writer at a time and makes the others poll; here they queue.
        writer: Arc<Mutex<()>>,
        // Never used: closing the last connection deletes the files of the write-ahead log, and on
        // a full disk the next connection could not make them again in order to read.
        anchor: Box<std::sync::Mutex<Option<SqliteConnection>>>,
        // Whether the file could only be read. SQLite then opens it read-only for as long as any of
        // the process's connections is open, even if the file becomes writable.
        is_read_only: AtomicBool,
    },
    Postgres(managed::Pool<PostgresManager>),
}

/// A connection out of the pool.
pub(super) enum Connection {
    Sqlite { connection: Object<SqliteManager>, writing: Option<Arc<OwnedMutexGuard<()>>> },
    Postgres(Box<Object<PostgresManager>>),
}

/// How much of the deleted rows the database's own files still hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remains {
    /// Nothing: they were overwritten, and SQLite's write-ahead log was emptied.
    Nothing,
    /// Old pages in SQLite's write-ahead log, which other processes were using all the time.
    InLog,
    /// PostgreSQL keeps the deleted rows until a vacuum reuses their space, and its write-ahead log
    /// until that is recycled.
    InFiles,
}

impl Pool {
    /// A pool that has no connection yet.
    pub(super) fn build(config: &Config) -> Result<Self, StoreError> {
        match config.target()? {
            Target::Sqlite(path) => {
                let places = Arc::new(Semaphore::new(config.pool_size));
                let manager = SqliteManager { path, timeout: config.timeout, places, room: Work::room() };
                let connections = pool_of(manager, config.pool_size)?;
                let is_read_only = AtomicBool::new(false);
                Ok(Self::Sqlite { connections, writer: Arc::default(), anchor: Box::default(), is_read_only })
            }
            Target::Postgres(target, tls) => {
                let server = config.url.server_at(*target, &tls, config.timeout)?;
                let sessions = Sessions::new(server, config.schema.clone(), config.timeout);
                let connections = pool_of(PostgresManager { sessions }, config.pool_size)?;
                Ok(Self::Postgres(connections))
            }
        }
    }

    /// Whether instances on several machines may share it.
    pub(super) fn is_for_many(&self) -> bool {
        match self {
            Self::Sqlite { .. } => false,
            Self::Postgres(_) => true,
        }
    }

    /// Whether reads can go on while nothing can be written.
    pub(super) fn reads_without_writing(&self) -> bool {
        match self {
            Self::Sqlite { .. } => true,
            Self::Postgres(_) => false,
        }
    }

    /// Brings the tables up to date where they are not; returns their state from before.
    pub(super) async fn prepare(&self) -> Result<Standing, StoreError> {
        match self {
            Self::Sqlite { connections, anchor, .. } => {
                let (prepared, standing) = prepare_sqlite(connections.manager().path.clone()).await?;
                *anchor.lock().unwrap_or_else(PoisonError::into_inner) = Some(prepared);
                Ok(standing)
            }
            Self::Postgres(connections) => {
                tokio::time::timeout(MIGRATION_TIMEOUT, prepare_postgres(connections.manager())).await.map_err(
                    |_| unavailable(Cause("to bring its tables up to date took more than a minute".to_owned())),
                )?
            }
        }
    }

    /// Notes the reason for which a write was refused.
    pub(super) fn tell_unwritable(&self, reason: &Cause) {
        if let Self::Sqlite { is_read_only, .. } = self
            && reason.0.contains(READ_ONLY)
        {
            is_read_only.store(true, Ordering::Release);
        }
    }

    /// Reopens an SQLite file that could only be read: it may be writable by now. While a read is
    /// in progress, this is left to the next time.
    pub(super) async fn open_anew(&self) {
        let Self::Sqlite { connections, anchor, is_read_only, .. } = self else { return };
        if !is_read_only.swap(false, Ordering::AcqRel) {
            return;
        }
        drop(anchor.lock().unwrap_or_else(PoisonError::into_inner).take());
        connections.retain(|_, _| false);
        let (path, timeout) = (connections.manager().path.clone(), connections.manager().timeout);
        if let Ok(Ok(opened)) = tokio::task::spawn_blocking(move || connect_sqlite(&path, timeout)).await {
            *anchor.lock().unwrap_or_else(PoisonError::into_inner) = Some(opened);
        }
    }

    /// A connection, as soon as one is free.
    pub(super) async fn connection(&self) -> Result<Connection, Cause> {
        fn cause<E: std::error::Error + 'static>(error: managed::PoolError<E>) -> Cause {
            match error {
                managed::PoolError::Backend(error) => Cause::chain(&error),
                other => Cause(other.to_string()),
            }
        }
        match self {
            Self::Sqlite { connections, .. } => {
                let connection = connections.get().await.map_err(cause)?;
                Ok(Connection::Sqlite { connection, writing: None })
            }
            Self::Postgres(connections) => {
                connections.get().await.map(|connection| Connection::Postgres(Box::new(connection))).map_err(cause)
            }
        }
    }

    /// A connection for writing, as soon as the writer's lock is free.
    pub(super) async fn writing_connection(&self) -> Result<Connection, Cause> {
        // The lock is waited for without holding a connection, so readers keep theirs.
        let turn = match self {
            Self::Sqlite { writer, .. } => Some(Arc::clone(writer).lock_owned().await),
            Self::Postgres(_) => None,
        };
        let mut connection = self.connection().await?;
        if let (Connection::Sqlite { connection, writing }, Some(turn)) = (&mut connection, turn) {
            connection.hold(writing.insert(Arc::new(turn)));
        }
        Ok(connection)
    }
}

/// A pool that hands out the connection that came back last: its page cache, or its server process,
/// is warm, while connections that are needed only under high load are left alone.
fn pool_of<M: Manager>(manager: M, size: usize) -> Result<managed::Pool<M>, StoreError> {
    let pool = managed::Pool::builder(manager).max_size(size).queue_mode(QueueMode::Lifo);
    pool.build().map_err(|error| StoreError::broken(error.to_string()))
}

/// The channel on which PostgreSQL notifies of changes.
const CHANNEL: &str = "secretier";

impl Pool {
    /// See [`Database::listen`](super::Database::listen).
    pub(super) async fn listen(&self, heard: impl Fn() + Send) -> Result<Infallible, Cause> {
        match self {
            Self::Sqlite { .. } => std::future::pending().await,
            Self::Postgres(connections) => {
                let listening = connections.manager().sessions.listen(CHANNEL).await;
                let mut listening = listening.map_err(|error| Cause::chain(&error))?;
                heard();
                while listening.heard().await {
                    heard();
                }
                Err(Cause("the connection ended".to_owned()))
            }
        }
    }
}

/// A lock that one process has at a time, for as long as this is held. The system, or the server,
/// frees it when the process ends for any reason, and the server also when the connection ends.
pub(super) enum Exclusive {
    Sqlite { _lock: std::fs::File },
    Postgres { session: Box<PostgresConnection> },
}

impl Exclusive {
    /// Whether the lock is still held: a restarted server does not know it.
    pub(super) async fn is_held(&mut self) -> bool {
        match self {
            Self::Sqlite { .. } => true,
            Self::Postgres { session } => session.diesel.batch_execute("SELECT 1").await.is_ok(),
        }
    }

    /// Frees the lock at once: a server notices a closed connection only after a while.
    pub(super) async fn release(self) {
        if let Self::Postgres { mut session } = self
            && let Err(error) = session.diesel.batch_execute("SELECT pg_advisory_unlock_all()").await
        {
            tracing::debug!(reason = %Cause::chain(&error), "a lock is let go with its connection");
        }
    }
}

impl Pool {
    /// Takes such a lock; returns `None` if another process has it.
    pub(super) async fn try_exclusive(&self, name: &str) -> Result<Option<Exclusive>, Cause> {
        match self {
            Self::Sqlite { connections, .. } => {
                // Not the database's own file: closing it would undo SQLite's locks. The path has
                // its links resolved, so it is the same for all processes that use the file.
                let (path, suffix) = (connections.manager().path.clone(), format!("-{name}"));
                let locked = move || {
                    let mut path = std::fs::canonicalize(path)?.into_os_string();
                    path.push(suffix);
                    let mut options = std::fs::OpenOptions::new();
                    options.write(true).create(true).truncate(false);
                    #[cfg(unix)]
                    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
                    let lock = options.open(path)?;
                    match lock.try_lock() {
                        Ok(()) => Ok(Some(Exclusive::Sqlite { _lock: lock })),
                        Err(std::fs::TryLockError::WouldBlock) => Ok(None),
                        Err(std::fs::TryLockError::Error(error)) => Err(error),
                    }
                };
                let locked = tokio::task::spawn_blocking(locked).await.map_err(|error| Cause(error.to_string()))?;
                locked.map_err(|error| Cause(error.to_string()))
            }
            Self::Postgres(connections) => {
                #[derive(diesel::QueryableByName)]
                struct Locked {
                    #[diesel(sql_type = diesel::sql_types::Bool)]
                    locked: bool,
                }
                let manager = connections.manager();
                let mut session = manager.create().await.map_err(|error| Cause::chain(&error))?;
                // The schema's name was checked to be a plain one. The lock belongs to the session.
                let schema = &manager.sessions.schema;
                let lock = format!("SELECT pg_try_advisory_lock(hashtext('secretier {name} {schema}')) AS locked");
                let locked = RunQueryDsl::get_result::<Locked>(diesel::sql_query(lock), &mut *session.diesel).await;
                let locked = locked.map_err(|error| Cause::chain(&error))?.locked;
                Ok(locked.then(|| Exclusive::Postgres { session: Box::new(session) }))
            }
        }
    }
}

impl Connection {
    /// Runs a query that both databases can run.
    pub(super) fn load<'c, 'q: 'c, Q, Row>(&'c mut self, query: Q) -> BoxFuture<'c, QueryResult<Vec<Row>>>
    where
        Q: LoadQuery<'q, Sqlite, Row> + LoadQuery<'q, Postgres, Row> + Send + 'q,
        Row: Send + 'c,
    {
        match self {
            Self::Sqlite { connection, .. } => RunQueryDsl::load(query, &mut connection.diesel).boxed(),
            Self::Postgres(connection) => RunQueryDsl::load(query, &mut *connection.diesel).boxed(),
        }
    }

    /// Runs a query that both databases can run and that finds its rows by a key: on SQLite at
    /// once, on the calling thread, see [`Work`].
    pub(super) fn load_at_once<'c, Q, Row>(&'c mut self, query: Q) -> BoxFuture<'c, QueryResult<Vec<Row>>>
    where
        Q: OwnedQuery<Row>,
        Row: Send + 'static,
    {
        match self {
            Self::Sqlite { connection, .. } => connection.at_once(move |connection| SyncDsl::load(query, connection)),
            Self::Postgres(connection) => RunQueryDsl::load(query, &mut *connection.diesel).boxed(),
        }
    }

    /// Runs a query that both databases can run and whose rows may be large. Copying them out of the
    /// database's memory holds no thread that serves requests for long: on SQLite the thread that
    /// reads them does it, on PostgreSQL it pauses.
    pub(super) fn load_large<'c, Q, Row>(
        &'c mut self,
        query: Q,
        bytes: fn(&Row) -> usize,
    ) -> BoxFuture<'c, QueryResult<Vec<Row>>>
    where
        Q: OwnedQuery<Row>,
        Row: Send + 'static,
    {
        match self {
            Self::Sqlite { connection, .. } => {
                connection.diesel.spawn_blocking(move |connection| SyncDsl::load(query, connection))
            }
            Self::Postgres(connection) => Box::pin(async move {
                let mut stream = pin!(RunQueryDsl::load_stream::<Row>(query, &mut *connection.diesel).await?);
                let (mut rows, mut pace) = (Vec::new(), Pace::default());
                while let Some(row) = stream.try_next().await? {
                    pace.did(bytes(&row)).await;
                    rows.push(row);
                }
                Ok(rows)
            }),
        }
    }

    /// Runs a statement that both databases can run; returns the number of affected rows.
    pub(super) fn execute<'c, 'q: 'c, Q>(&'c mut self, query: Q) -> BoxFuture<'c, QueryResult<usize>>
    where
        Q: ExecuteDsl<Sqlite> + ExecuteDsl<Postgres> + Send + 'q,
    {
        match self {
            Self::Sqlite { connection, .. } => RunQueryDsl::execute(query, &mut connection.diesel).boxed(),
            Self::Postgres(connection) => RunQueryDsl::execute(query, &mut *connection.diesel).boxed(),
        }
    }

    /// Inserts a batch of secrets: one statement, or on SQLite, where a statement costs
    /// no round trip and diesel has no shared form for a batch, one each.
    pub(super) fn insert_secrets(&mut self, rows: Vec<NewSecret>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            Self::Sqlite { connection, .. } => each(connection, rows, |row, connection| {
                SyncDsl::execute(diesel::insert_into(company_secrets::table).values(row), connection)
            }),
            Self::Postgres(connection) => {
                let is_one = rows.len() == 1;
                insert(connection, diesel::insert_into(company_secrets::table).values(rows), is_one)
            }
        }
    }

    /// Inserts data keys, as [`Self::insert_secrets`] does.
    pub(super) fn insert_data_keys(&mut self, rows: Vec<NewDataKey>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            Self::Sqlite { connection, .. } => each(connection, rows, |row, connection| {
                SyncDsl::execute(diesel::insert_into(company_data_keys::table).values(row), connection)
            }),
            Self::Postgres(connection) => {
                let insert = diesel::insert_into(company_data_keys::table).values(rows);
                RunQueryDsl::execute(insert, &mut *connection.diesel).map_ok(drop).boxed()
            }
        }
    }

    /// Inserts changes, as [`Self::insert_secrets`] does.
    pub(super) fn insert_changes(&mut self, rows: Vec<NewChange>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            Self::Sqlite { connection, .. } => each(connection, rows, |row, connection| {
                SyncDsl::execute(diesel::insert_into(changes::table).values(row), connection)
            }),
            Self::Postgres(connection) => {
                let is_one = rows.len() == 1;
                insert(connection, diesel::insert_into(changes::table).values(rows), is_one)
            }
        }
    }

    /// Inserts records of the audit, as [`Self::insert_secrets`] does.
    pub(super) fn insert_audit(&mut self, rows: Vec<AuditRecordRow>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            Self::Sqlite { connection, .. } => each(connection, rows, |row, connection| {
                SyncDsl::execute(diesel::insert_into(audit_records::table).values(row), connection)
            }),
            Self::Postgres(connection) => {
                let is_one = rows.len() == 1;
                insert(connection, diesel::insert_into(audit_records::table).values(rows), is_one)
            }
        }
    }

    /// Inserts these tenants' rows or marks the existing ones, which locks them until the
    /// transaction ends, in the order given: the order of their names.
    pub(super) fn lock_companies_by_name(
        &mut self,
        rows: Vec<NewCompany>,
        mark: Mark,
    ) -> BoxFuture<'_, QueryResult<()>> {
        let Mark { generations, touched_at, is_unconfirmed } = mark;
        let marked = move || {
            let touched = touched_at.map(|at| companies::updated_at.eq(at));
            let unconfirmed = is_unconfirmed.then_some(companies::snapshot_etag.eq(None::<String>));
            (companies::generation.eq(companies::generation + generations), unconfirmed, touched)
        };
        match self {
            // Nobody else writes meanwhile. diesel prepares an update anew each time, and so an
            // insertion that may become one, so there is one update for all.
            Self::Sqlite { connection, .. } => {
                let locked = connection.diesel.spawn_blocking(move |connection| {
                    let named = || companies::subdomain.eq_any(rows.iter().map(NewCompany::subdomain));
                    let there = companies::table.filter(named()).select(companies::subdomain);
                    let there: HashSet<String> = SyncDsl::load(there, connection)?.into_iter().collect();
                    if !there.is_empty() && !mark.is_none() {
                        let mark = diesel::update(companies::table.filter(named())).set(marked());
                        SyncDsl::execute(mark, connection)?;
                    }
                    for row in rows.into_iter().filter(|row| !there.contains(row.subdomain())) {
                        SyncDsl::execute(diesel::insert_into(companies::table).values(row), connection)?;
                    }
                    Ok(())
                });
                locked.boxed()
            }
            Self::Postgres(connection) => {
                let insert = diesel::insert_into(companies::table).values(rows).on_conflict(companies::subdomain);
                let upsert = insert.do_update().set(marked());
                RunQueryDsl::execute(upsert, &mut *connection.diesel).map_ok(drop).boxed()
            }
        }
    }

    /// Stores the state of the copies of these tenants' folders. The tenants are locked.
    pub(super) fn keep_copies(&mut self, copies: Vec<CopyState>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            Self::Sqlite { connection, .. } => {
                // An array of arrays, because SQLite has no lists: one statement for all of them,
                // as below.
                let copies: Vec<_> = copies.iter().map(|copy| (&copy.id, copy.at, &copy.etag, copy.whole)).collect();
                let copies = serde_json::json!(copies).to_string();
                let kept = connection.diesel.spawn_blocking(move |connection| {
                    let update = diesel::sql_query(
                        "UPDATE companies SET snapshot_at = value ->> 1, snapshot_etag = value ->> 2, \
                         snapshot_whole = value ->> 3, denied_at = NULL \
                         FROM json_each($1) WHERE companies.id = value ->> 0",
                    );
                    SyncDsl::execute(update.bind::<Text, _>(copies), connection).map(drop)
                });
                kept.boxed()
            }
            Self::Postgres(connection) => {
                let (mut ids, mut times, mut etags, mut wholes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
                for CopyState { id, at, etag, whole } in copies {
                    ids.push(id);
                    times.push(at);
                    etags.push(etag);
                    wholes.push(whole);
                }
                let update = diesel::sql_query(
                    "UPDATE companies SET snapshot_at = copy.at, snapshot_etag = copy.etag, \
                     snapshot_whole = copy.whole, denied_at = NULL \
                     FROM unnest($1, $2, $3, $4) AS copy (id, at, etag, whole) WHERE companies.id = copy.id",
                )
                .bind::<Array<Text>, _>(ids)
                .bind::<Array<BigInt>, _>(times)
                .bind::<Array<Nullable<Text>>, _>(etags)
                .bind::<Array<Bool>, _>(wholes);
                RunQueryDsl::execute(update, &mut *connection.diesel).map_ok(drop).boxed()
            }
        }
    }

    /// Writes the heads of tenants. The tenants are locked.
    pub(super) fn keep_heads(&mut self, heads: Vec<(String, Option<String>)>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            // One statement for all of them, as of copies.
            Self::Sqlite { connection, .. } => {
                let heads = serde_json::json!(heads).to_string();
                let kept = connection.diesel.spawn_blocking(move |connection| {
                    let update = diesel::sql_query(
                        "UPDATE companies SET head = value ->> 1 FROM json_each($1) WHERE companies.id = value ->> 0",
                    );
                    SyncDsl::execute(update.bind::<Text, _>(heads), connection).map(drop)
                });
                kept.boxed()
            }
            Self::Postgres(connection) => {
                let (ids, heads): (Vec<String>, Vec<Option<String>>) = heads.into_iter().unzip();
                let update = diesel::sql_query(
                    "UPDATE companies SET head = sealed.head FROM unnest($1, $2) AS sealed (id, head) \
                     WHERE companies.id = sealed.id",
                )
                .bind::<Array<Text>, _>(ids)
                .bind::<Array<Nullable<Text>>, _>(heads);
                RunQueryDsl::execute(update, &mut *connection.diesel).map_ok(drop).boxed()
            }
        }
    }

    /// Stores the state of tenants in a migration, each given once, with every column.
    pub(super) fn keep_states(&mut self, states: Vec<StateRow>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            // Nothing refers to these rows, so replacing one changes all of it; and diesel prepares
            // it once, unlike an insertion that may become an update.
            Self::Sqlite { connection, .. } => each(connection, states, |state, connection| {
                SyncDsl::execute(diesel::replace_into(migration_tenants::table).values(state), connection)
            }),
            Self::Postgres(connection) => {
                let insert = diesel::insert_into(migration_tenants::table).values(states);
                let upsert = insert.on_conflict(migration_tenants::subdomain).do_update().set((
                    migration_tenants::run_id.eq(excluded(migration_tenants::run_id)),
                    migration_tenants::step.eq(excluded(migration_tenants::step)),
                    migration_tenants::secrets.eq(excluded(migration_tenants::secrets)),
                    migration_tenants::digest.eq(excluded(migration_tenants::digest)),
                    migration_tenants::reason.eq(excluded(migration_tenants::reason)),
                    migration_tenants::error.eq(excluded(migration_tenants::error)),
                    migration_tenants::phase_before.eq(excluded(migration_tenants::phase_before)),
                    migration_tenants::verified_at.eq(excluded(migration_tenants::verified_at)),
                    migration_tenants::switched_at.eq(excluded(migration_tenants::switched_at)),
                    migration_tenants::updated_at.eq(excluded(migration_tenants::updated_at)),
                    migration_tenants::shadow_compared.eq(excluded(migration_tenants::shadow_compared)),
                    migration_tenants::shadow_different.eq(excluded(migration_tenants::shadow_different)),
                    migration_tenants::shadow_different_at.eq(excluded(migration_tenants::shadow_different_at)),
                ));
                RunQueryDsl::execute(upsert, &mut *connection.diesel).map_ok(drop).boxed()
            }
        }
    }

    /// Stores when tenants were last asked for, each given once, in the order given.
    pub(super) fn keep_uses(&mut self, uses: Vec<Use>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            // As for states: one statement, prepared once.
            Self::Sqlite { connection, .. } => each(connection, uses, |used, connection| {
                SyncDsl::execute(diesel::replace_into(tenant_uses::table).values(used), connection)
            }),
            Self::Postgres(connection) => {
                let insert = diesel::insert_into(tenant_uses::table).values(uses);
                let upsert = insert.on_conflict(tenant_uses::subdomain).do_update();
                let upsert = upsert.set(tenant_uses::used_at.eq(excluded(tenant_uses::used_at)));
                RunQueryDsl::execute(upsert, &mut *connection.diesel).map_ok(drop).boxed()
            }
        }
    }

    /// Notifies listeners, when the transaction is committed, that something has changed. SQLite
    /// has no listeners.
    pub(super) fn notify(&mut self) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            Self::Sqlite { .. } => std::future::ready(Ok(())).boxed(),
            Self::Postgres(connection) => {
                // The schema as the payload: a database may hold several instances' tables.
                let notify = format!("SELECT pg_notify('{CHANNEL}', current_schema())");
                async move { connection.diesel.batch_execute(&notify).await }.boxed()
            }
        }
    }

    /// Locks the counter of rotations against change until the transaction ends. On SQLite nobody
    /// else can write meanwhile anyway.
    pub(super) fn share_rotations(&mut self) -> BoxFuture<'_, QueryResult<()>> {
        const LOCK: &str = "SELECT value FROM counters WHERE name = 'rotations' FOR SHARE";
        match self {
            Self::Sqlite { .. } => std::future::ready(Ok(())).boxed(),
            Self::Postgres(connection) => connection.diesel.batch_execute(LOCK).boxed(),
        }
    }

    /// Locks these tenants' rows against change until the transaction ends, in the order of their
    /// names, as all code does that locks several. On SQLite nobody else can write meanwhile
    /// anyway.
    pub(super) fn lock_companies(&mut self, ids: Vec<String>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            Self::Sqlite { .. } => std::future::ready(Ok(())).boxed(),
            Self::Postgres(connection) => {
                let rows = companies::table.filter(companies::id.eq_any(ids)).order(companies::subdomain.asc());
                let lock = rows.select(companies::id).for_no_key_update();
                let locked = RunQueryDsl::load::<String>(lock, &mut *connection.diesel);
                locked.map(|locked| locked.map(drop)).boxed()
            }
        }
    }

    /// Begins a transaction. On SQLite it is the writer from its first statement on. It waits up to
    /// `left` for the writers of other processes; later waits are limited to `usual`.
    pub(super) fn begin(&mut self, left: Duration, usual: Duration) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            Self::Sqlite { connection, .. } => {
                let sql = format!("{} BEGIN IMMEDIATE; {}", busy_timeout(left), busy_timeout(usual));
                async move { connection.diesel.batch_execute(&sql).await }.boxed()
            }
            Self::Postgres(connection) => connection.diesel.batch_execute("BEGIN").boxed(),
        }
    }

    /// Ends a transaction.
    pub(super) fn commit(&mut self) -> BoxFuture<'_, QueryResult<()>> {
        self.batch("COMMIT")
    }

    /// Rolls a transaction back.
    pub(super) fn rollback(&mut self) -> BoxFuture<'_, QueryResult<()>> {
        self.batch("ROLLBACK")
    }

    /// Removes deleted rows from the database's own files, where that is possible. Waits up to
    /// `wait` for others who use the files; later waits are limited to `usual`.
    pub(super) fn erase(&mut self, wait: Duration, usual: Duration) -> BoxFuture<'_, QueryResult<Remains>> {
        #[derive(diesel::QueryableByName)]
        struct Checkpoint {
            #[diesel(sql_type = diesel::sql_types::Integer)]
            busy: i32,
        }
        match self {
            Self::Sqlite { connection, .. } => async move {
                connection.diesel.batch_execute(&busy_timeout(wait)).await?;
                // Deleted data is zero in the newest pages (secure_delete): they are written to the
                // file, over the old pages, and the log with older pages is cut to nothing.
                let checkpoint = diesel::sql_query("PRAGMA wal_checkpoint(TRUNCATE)");
                let told: Vec<Checkpoint> = RunQueryDsl::load(checkpoint, &mut connection.diesel).await?;
                connection.diesel.batch_execute(&busy_timeout(usual)).await?;
                let is_empty = told.iter().all(|checkpoint| checkpoint.busy == 0);
                Ok(if is_empty { Remains::Nothing } else { Remains::InLog })
            }
            .boxed(),
            Self::Postgres(_) => std::future::ready(Ok(Remains::InFiles)).boxed(),
        }
    }

    fn batch(&mut self, sql: &'static str) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            Self::Sqlite { connection, .. } => connection.diesel.batch_execute(sql).boxed(),
            Self::Postgres(connection) => connection.diesel.batch_execute(sql).boxed(),
        }
    }

    /// Judges what an error means for the operation that met it.
    pub(super) fn judge(&self, error: &Error) -> Judgement {
        match Judgement::of(error) {
            // A server that shuts down may give its reason in unknown words.
            Judgement::Refused(code) if self.is_closed() => Judgement::Outage(code),
            judgement => judgement,
        }
    }

    /// Whether an error says that the connection has ended, so that another one may work.
    pub(super) fn is_dead(&self, error: &Error) -> bool {
        match self {
            Self::Sqlite { .. } => false,
            Self::Postgres(_) => self.judge(error).is_of_the_connection(),
        }
    }

    fn is_closed(&self) -> bool {
        match self {
            Self::Sqlite { .. } => false,
            Self::Postgres(connection) => AtomicBool::load(&connection.closed, Ordering::Acquire),
        }
    }

    /// Closes the connection instead of returning it to the pool: the state in which an interrupted
    /// statement has left it is unknown.
    pub(super) fn discard(self) {
        match self {
            Self::Sqlite { connection, .. } => drop(Object::take(connection)),
            Self::Postgres(connection) => drop(Object::take(*connection)),
        }
    }
}

/// Inserts rows. The statement for a single row always has the same text, so it is prepared once.
fn insert<'c, Q>(connection: &'c mut PostgresConnection, rows: Q, is_one: bool) -> BoxFuture<'c, QueryResult<()>>
where
    Q: QueryFragment<Pg> + QueryId + Send + 'c,
{
    match is_one {
        true => RunQueryDsl::execute(Prepared(rows), &mut *connection.diesel).map_ok(drop).boxed(),
        false => RunQueryDsl::execute(rows, &mut *connection.diesel).map_ok(drop).boxed(),
    }
}

/// Runs a statement for each of these, one after the other, in one visit to SQLite's thread: the
/// way there and back takes longer than a statement.
fn each<R: Send + 'static>(
    connection: &mut Object<SqliteManager>,
    rows: Vec<R>,
    run: impl Fn(R, &mut SqliteConnection) -> QueryResult<usize> + Send + 'static,
) -> BoxFuture<'_, QueryResult<()>> {
    let all =
        move |connection: &mut SqliteConnection| rows.into_iter().try_for_each(|row| run(row, connection).map(drop));
    connection.diesel.spawn_blocking(all)
}

#[derive(Debug, thiserror::Error)]
enum MigrationError {
    #[error("{0}")]
    Migration(Box<dyn std::error::Error + Send + Sync>),
    #[error("{0}")]
    Transaction(#[from] Error),
}

#[cfg(test)]
mod tests;
