//! The pool: the only file that knows SQLite from PostgreSQL.
//!
//! We manage the connections ourselves, since what diesel-async brings can neither
//! speak TLS to PostgreSQL nor tell a closed connection before it is used.

use std::{
    collections::HashSet,
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use deadpool::managed::{self, Manager, Metrics, Object, QueueMode, RecycleError, RecycleResult};
use diesel::{
    Connection as _, ExpressionMethods as _, QueryDsl as _, QueryResult, RunQueryDsl as SyncDsl, SqliteConnection,
    connection::{DefaultLoadingMode, SimpleConnection as _},
    pg::Pg,
    query_builder::{QueryFragment, QueryId},
    query_dsl::methods::LoadQuery as SyncLoad,
    result::Error,
    sql_types::{Array, BigInt, Bool, Nullable, Text},
    upsert::excluded,
};
use diesel_async::{
    AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _,
    methods::{ExecuteDsl, LoadQuery},
    sync_connection_wrapper::{SpawnBlocking, SyncConnectionWrapper},
};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness as _, embed_migrations};
use futures_util::{FutureExt as _, TryFutureExt as _, future::BoxFuture};
use tokio::{
    runtime::Handle,
    sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore},
};
use tokio_postgres::Client;

use super::{
    audit,
    changes::NewChange,
    companies::{CopyState, Mark, NewCompany},
    config::{Config, Target},
    data_keys::NewDataKey,
    error::{Cause, Judgement, StoreError},
    migrations::StateRow,
    postgres::PostgresServer,
    prepared::Prepared,
    schema::{audit_records, changes, companies, company_data_keys, company_secrets, migration_tenants, tenant_uses},
    secrets::NewSecret,
    sessions::{Session, SessionError, Sessions},
    tables::{APPLIED, READABLE_FROM, Said, Standing, Tables, There, known},
    uses::Use,
};
use crate::long_work::{BREATH, LongWork, breathe};

pub(super) type Sqlite = SyncConnectionWrapper<SqliteConnection, Work>;
pub(super) type Postgres = AsyncPgConnection;

/// A query that can be handed to the thread that runs it, for [`Connection::load_at_once`] and
/// [`Connection::load_long`].
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

// A write that was acknowledged is on the disk (FULL), and what it replaced is gone
// from the file (secure_delete).
const SQLITE_SETUP: &str = "PRAGMA foreign_keys = ON; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;";

/// How long the tables may take to be brought up to date, other instances included.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(60);

/// Connections to one of the two databases.
pub(super) enum Pool {
    Sqlite {
        connections: managed::Pool<SqliteManager>,
        // SQLite has one writer at a time and makes the others poll; here they queue.
        writer: Arc<Mutex<()>>,
        // Never used: the last connection that is closed takes the files of the write-ahead
        // log with it, and on a full disk the next one could not make them again to read.
        anchor: Box<std::sync::Mutex<Option<SqliteConnection>>>,
        // Whether the file could only be read. Who opened it so only reads for as long as any of
        // the process's connections is open, whatever becomes of the file.
        is_read_only: AtomicBool,
    },
    Postgres(managed::Pool<PostgresManager>),
}

/// A connection out of the pool.
pub(super) enum Connection {
    Sqlite { connection: Object<SqliteManager>, writing: Option<Arc<OwnedMutexGuard<()>>> },
    Postgres(Box<Object<PostgresManager>>),
}

/// What a database's own files still hold of deleted rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remains {
    /// Nothing: they were overwritten, and SQLite's write-ahead log was emptied.
    Nothing,
    /// Old pages in SQLite's write-ahead log, which others were using all the while.
    InLog,
    /// What PostgreSQL keeps: the deleted rows until a vacuum reuses their space, and its
    /// write-ahead log until that is recycled.
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
                let server = PostgresServer::new(*target, &tls, config.timeout)?;
                let sessions = Sessions::new(server, config.schema.clone(), config.timeout);
                let connections = pool_of(PostgresManager { sessions }, config.pool_size)?;
                Ok(Self::Postgres(connections))
            }
        }
    }

    /// Whether instances on many machines may share it.
    pub(super) fn is_for_many(&self) -> bool {
        match self {
            Self::Sqlite { .. } => false,
            Self::Postgres(_) => true,
        }
    }

    /// Whether reads may go on where nothing can be written.
    pub(super) fn reads_without_writing(&self) -> bool {
        match self {
            Self::Sqlite { .. } => true,
            Self::Postgres(_) => false,
        }
    }

    /// Brings the tables up to date, where they are not; tells how they stood.
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

    /// Notes why a write was refused.
    pub(super) fn tell_unwritable(&self, reason: &Cause) {
        if let Self::Sqlite { is_read_only, .. } = self
            && reason.0.contains(READ_ONLY)
        {
            is_read_only.store(true, Ordering::Release);
        }
    }

    /// Has SQLite's file opened anew that could only be read: by now it may be written to. Where
    /// a read is under way, that is left to the next time.
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

    /// A connection to write with, as soon as it is this caller's turn.
    pub(super) async fn writing_connection(&self) -> Result<Connection, Cause> {
        // The turn is waited for without a connection in hand, so readers keep theirs.
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

/// A pool that hands out the connection that came back last: its page cache, or its server
/// process, is warm, while those that only many at once need are left alone.
fn pool_of<M: Manager>(manager: M, size: usize) -> Result<managed::Pool<M>, StoreError> {
    let pool = managed::Pool::builder(manager).max_size(size).queue_mode(QueueMode::Lifo);
    pool.build().map_err(|error| StoreError::broken(error.to_string()))
}

/// Where PostgreSQL tells of changes.
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

/// A lock that one process has at a time, for as long as this is held. The system, or the
/// server, takes it back from a process that ends in whatever way, and the server also from
/// one whose connection ends.
pub(super) enum Exclusive {
    Sqlite { _lock: std::fs::File },
    Postgres { session: Box<PostgresConnection> },
}

impl Exclusive {
    /// Whether it is held still: a server that was started anew knows nothing of it.
    pub(super) async fn is_held(&mut self) -> bool {
        match self {
            Self::Sqlite { .. } => true,
            Self::Postgres { session } => session.diesel.batch_execute("SELECT 1").await.is_ok(),
        }
    }

    /// Lets it go at once: a server notices only after a while that a connection was closed.
    pub(super) async fn release(self) {
        if let Self::Postgres { mut session } = self
            && let Err(error) = session.diesel.batch_execute("SELECT pg_advisory_unlock_all()").await
        {
            tracing::debug!(reason = %Cause::chain(&error), "a lock is let go with its connection");
        }
    }
}

impl Pool {
    /// Takes such a lock; nothing if another process has it.
    pub(super) async fn try_exclusive(&self, name: &str) -> Result<Option<Exclusive>, Cause> {
        match self {
            Self::Sqlite { connections, .. } => {
                // Not the database's own file: closing it would undo SQLite's locks.
                // By the path that no link is in, which is the same for all who use the file.
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
                // The schema's name was checked to be a plain one. The lock is the session's.
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
    /// once, see [`Work`].
    pub(super) fn load_at_once<'c, Q, Row>(&'c mut self, query: Q) -> BoxFuture<'c, QueryResult<Vec<Row>>>
    where
        Q: OwnedQuery<Row>,
        Row: Send + 'static,
    {
        match self {
            Self::Sqlite { connection, .. } => {
                connection.in_way(Way::AtOnce, move |connection| SyncDsl::load(query, connection))
            }
            Self::Postgres(connection) => RunQueryDsl::load(query, &mut *connection.diesel).boxed(),
        }
    }

    /// Runs a query whose rows take long to read: on SQLite where long work is done.
    pub(super) fn load_long<'c, Q, Row>(&'c mut self, query: Q, work: &LongWork) -> BoxFuture<'c, QueryResult<Vec<Row>>>
    where
        Q: OwnedQuery<Row>,
        Row: Send + 'static,
    {
        match self {
            Self::Sqlite { connection, .. } => {
                connection.in_way(Way::Long(work.clone()), move |connection| {
                    let rows = SyncDsl::load_iter::<Row, DefaultLoadingMode>(query, connection)?;
                    // A row may be long.
                    rows.inspect(|_| breathe(BREATH)).collect()
                })
            }
            Self::Postgres(connection) => RunQueryDsl::load(query, &mut *connection.diesel).boxed(),
        }
    }

    /// Runs a statement that both databases can run; gives the number of rows it met.
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
    pub(super) fn insert_audit(&mut self, rows: Vec<audit::Row>) -> BoxFuture<'_, QueryResult<()>> {
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

    /// Makes these tenants' rows or marks those that are there, which are locked by that until
    /// the transaction ends, in the order given: that of their names.
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
            // Nobody else writes meanwhile. diesel prepares an update anew each time, and an
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

    /// Notes of tenants, which are locked, that these are the copies of their folders.
    pub(super) fn keep_copies(&mut self, copies: Vec<CopyState>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            Self::Sqlite { connection, .. } => {
                // An array of arrays, for SQLite has no lists: one statement for all of them, as below.
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

    /// Writes the heads of tenants, which are locked.
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

    /// Notes how far tenants have come in a migration, each given once, with every column.
    pub(super) fn keep_states(&mut self, states: Vec<StateRow>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            // Nothing refers to these rows, so that to replace one is to change all of it; and
            // unlike an insertion that may become an update, diesel prepares it once.
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

    /// Notes when tenants were asked for, each given once, in the order given.
    pub(super) fn keep_uses(&mut self, uses: Vec<Use>) -> BoxFuture<'_, QueryResult<()>> {
        match self {
            // As of states: one statement, prepared once.
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

    /// Tells those who listen, when the transaction is committed, that something has
    /// changed. SQLite has nobody to tell.
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

    /// Locks the counter of rotations against change until the transaction ends. On
    /// SQLite nobody else writes meanwhile anyway.
    pub(super) fn share_rotations(&mut self) -> BoxFuture<'_, QueryResult<()>> {
        const LOCK: &str = "SELECT value FROM counters WHERE name = 'rotations' FOR SHARE";
        match self {
            Self::Sqlite { .. } => std::future::ready(Ok(())).boxed(),
            Self::Postgres(connection) => connection.diesel.batch_execute(LOCK).boxed(),
        }
    }

    /// Locks these tenants' rows against change until the transaction ends, in the order of
    /// their names, as everyone does who locks several. On SQLite nobody else writes
    /// meanwhile anyway.
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

    /// Begins a transaction. On SQLite it is the writer from its first statement on; the
    /// writers of other processes are waited for as long as `left`, and from then on
    /// nothing longer than `usual`.
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

    /// Takes a transaction back.
    pub(super) fn rollback(&mut self) -> BoxFuture<'_, QueryResult<()>> {
        self.batch("ROLLBACK")
    }

    /// Takes deleted rows out of the database's own files, where it can be told to; waits
    /// as long as `wait` for others who use them, and from then on as long as `usual`.
    pub(super) fn erase(&mut self, wait: Duration, usual: Duration) -> BoxFuture<'_, QueryResult<Remains>> {
        #[derive(diesel::QueryableByName)]
        struct Checkpoint {
            #[diesel(sql_type = diesel::sql_types::Integer)]
            busy: i32,
        }
        match self {
            Self::Sqlite { connection, .. } => async move {
                connection.diesel.batch_execute(&busy_timeout(wait)).await?;
                // What was deleted is zero in the newest pages (secure_delete): they go to
                // the file, over the old ones, and the log with older ones is cut to nothing.
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

    /// What an error says of the operation that met it.
    pub(super) fn judge(&self, error: &Error) -> Judgement {
        match Judgement::of(error) {
            // A server that goes away may say why in words that are not known.
            Judgement::Refused(code) if self.is_closed() => Judgement::Outage(code),
            judgement => judgement,
        }
    }

    /// Whether an error says that the connection is no more, so that another may serve.
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

    /// Closes the connection instead of giving it back: nobody knows what state a
    /// statement that was cut off has left it in.
    pub(super) fn discard(self) {
        match self {
            Self::Sqlite { connection, .. } => drop(Object::take(connection)),
            Self::Postgres(connection) => drop(Object::take(*connection)),
        }
    }
}

/// Inserts rows. Of a single one the text is always the same, so that it is prepared once.
fn insert<'c, Q>(connection: &'c mut PostgresConnection, rows: Q, is_one: bool) -> BoxFuture<'c, QueryResult<()>>
where
    Q: QueryFragment<Pg> + QueryId + Send + 'c,
{
    match is_one {
        true => RunQueryDsl::execute(Prepared(rows), &mut *connection.diesel).map_ok(drop).boxed(),
        false => RunQueryDsl::execute(rows, &mut *connection.diesel).map_ok(drop).boxed(),
    }
}

/// Runs a statement for each of these, one after the other, in one visit to SQLite's thread:
/// to go there and back takes longer than a statement.
fn each<R: Send + 'static>(
    connection: &mut Object<SqliteManager>,
    rows: Vec<R>,
    run: impl Fn(R, &mut SqliteConnection) -> QueryResult<usize> + Send + 'static,
) -> BoxFuture<'_, QueryResult<()>> {
    let all =
        move |connection: &mut SqliteConnection| rows.into_iter().try_for_each(|row| run(row, connection).map(drop));
    connection.diesel.spawn_blocking(all)
}

pub(super) struct SqliteManager {
    path: PathBuf,
    timeout: Duration,
    /// As many as the pool has: for connections, and for those that were given up while they
    /// were at work, until that has ended. A disk that hangs holds no more threads than this.
    places: Arc<Semaphore>,
    /// For work that is done at once: see [`Work`].
    room: Arc<Semaphore>,
}

/// A connection to SQLite.
pub(super) struct SqliteSession {
    diesel: Sqlite,
    holdings: Arc<Holdings>,
}

/// What a connection to SQLite holds, and keeps holding while it is at work, whether anybody
/// still waits for that or not: nothing ends such work from outside.
struct Holdings {
    /// How the work that comes next is to be done. Whoever has the connection sets it and begins
    /// the work in one call, so that no other work takes it.
    next: std::sync::Mutex<Way>,
    /// The turn to write, which [`Connection`] has.
    turn: std::sync::Mutex<Weak<OwnedMutexGuard<()>>>,
    room: Arc<Semaphore>,
    _place: Option<OwnedSemaphorePermit>,
}

/// Where a piece of work is done.
#[derive(Default)]
enum Way {
    /// On a thread for what blocks.
    #[default]
    Blocking,
    /// On the thread that asks, where there is room for that.
    AtOnce,
    /// On the threads for long work, which let those that serve requests go first.
    Long(LongWork),
}

/// Where a connection to SQLite does its work: on a thread for what blocks, or at once, on
/// the thread that asks.
///
/// A row that is found by its key is found in less time than it takes to wake another thread
/// and be woken by it, several times over. Yet a disk may hang, and a worker with it. What
/// keeps that from holding up anybody else:
/// - It is a task of its own that blocks. Who asked still notices when its time is up, and
///   what else waits for the worker is taken over by others.
/// - One of the workers must look after sockets and timers, and it could be the one that
///   blocks, while all others sleep. So another is woken first, by a task that does nothing.
/// - As long as there is room, one worker at least is not blocked. Where there is none, work
///   goes to a thread for what blocks; so it does where a runtime has one worker alone.
/// - A task that has used up its turn (tokio's cooperative budget) waits where nobody takes it
///   over, and would not have set its timer. It does nothing at once. One that did so on the
///   same thread just before waits until the disk answers; nothing here can help that one.
#[derive(Clone)]
pub(super) struct Work(Arc<Holdings>);

impl Holdings {
    fn new(room: Arc<Semaphore>, place: Option<OwnedSemaphorePermit>) -> Arc<Self> {
        Arc::new(Self { next: std::sync::Mutex::default(), turn: std::sync::Mutex::default(), room, _place: place })
    }
}

impl Work {
    /// For all connections of a pool: all workers but one.
    fn room() -> Arc<Semaphore> {
        let workers = Handle::try_current().map_or(1, |runtime| runtime.metrics().num_workers());
        Arc::new(Semaphore::new(workers - 1))
    }
}

impl SpawnBlocking for Work {
    fn spawn_blocking<'a, R>(
        &mut self,
        task: impl FnOnce() -> R + Send + 'static,
    ) -> BoxFuture<'a, Result<R, Box<dyn std::error::Error + Send + Sync>>>
    where
        R: Send + 'static,
    {
        let holdings = Arc::clone(&self.0);
        let turn = holdings.turn.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        let way = std::mem::take(&mut *holdings.next.lock().unwrap_or_else(PoisonError::into_inner));
        let at_once = matches!(way, Way::AtOnce) && tokio::task::coop::has_budget_remaining();
        let room = at_once.then(|| Arc::clone(&holdings.room).try_acquire_owned().ok()).flatten();
        let is_at_once = room.is_some();
        let task = move || {
            let done = task();
            drop((holdings, turn, room));
            done
        };
        let work = match way {
            Way::Long(work) => return async move { Ok(work.run(task).await) }.boxed(),
            Way::AtOnce if is_at_once => {
                drop(tokio::spawn(async {}));
                tokio::spawn(async { task() })
            }
            Way::AtOnce | Way::Blocking => tokio::task::spawn_blocking(task),
        };
        work.map_err(Box::from).boxed()
    }

    fn get_runtime() -> Self {
        Self(Holdings::new(Self::room(), None))
    }
}

impl SqliteSession {
    fn new(connection: SqliteConnection, holdings: Arc<Holdings>) -> Self {
        Self { diesel: Sqlite::with_runtime(connection, Work(Arc::clone(&holdings))), holdings }
    }

    /// Does work in that way.
    fn in_way<R: Send + 'static>(
        &mut self,
        way: Way,
        work: impl FnOnce(&mut SqliteConnection) -> QueryResult<R> + Send + 'static,
    ) -> BoxFuture<'static, QueryResult<R>> {
        *self.holdings.next.lock().unwrap_or_else(PoisonError::into_inner) = way;
        self.diesel.spawn_blocking(work)
    }

    /// Holds the turn to write for as long as its owner does, and is at work by it.
    fn hold(&self, turn: &Arc<OwnedMutexGuard<()>>) {
        *self.holdings.turn.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(turn);
    }
}

impl Manager for SqliteManager {
    type Type = SqliteSession;
    type Error = io::Error;

    async fn create(&self) -> Result<SqliteSession, io::Error> {
        let place = Arc::clone(&self.places).acquire_owned().await.map_err(io::Error::other)?;
        let holdings = Holdings::new(Arc::clone(&self.room), Some(place));
        let (path, timeout) = (self.path.clone(), self.timeout);
        let open = move || {
            // SQLite would make an empty database in place of one that was removed.
            if !path.try_exists()? {
                let reason = format!("the file {} is gone", path.display());
                return Err(io::Error::new(io::ErrorKind::NotFound, reason));
            }
            Ok(SqliteSession::new(connect_sqlite(&path, timeout)?, holdings))
        };
        tokio::task::spawn_blocking(open).await?
    }

    async fn recycle(&self, _: &mut SqliteSession, _: &Metrics) -> RecycleResult<io::Error> {
        Ok(())
    }
}

fn connect_sqlite(path: &Path, timeout: Duration) -> io::Result<SqliteConnection> {
    let name = path.to_str().ok_or_else(|| io::Error::other("the path of the file is not UTF-8"))?;
    let mut connection = SqliteConnection::establish(name).map_err(io::Error::other)?;
    connection.batch_execute(&format!("{} {SQLITE_SETUP}", busy_timeout(timeout))).map_err(io::Error::other)?;
    Ok(connection)
}

/// How long SQLite waits for others. Nothing ends such a wait from outside, so that it
/// must not be longer than what waits for it.
fn busy_timeout(timeout: Duration) -> String {
    format!("PRAGMA busy_timeout = {};", timeout.as_millis().clamp(1, i32::MAX as u128))
}

/// SQLite's message where its file can only be read.
const READ_ONLY: &str = "readonly database";

/// What SQLite says where its file cannot be read or written, or is in use for too long.
const UNREADABLE: [&str; 3] = ["unable to open database file", "disk I/O error", "database is locked"];

fn unavailable(source: Cause) -> StoreError {
    StoreError::Unavailable { retry_after: Duration::from_secs(1), source }
}

/// Makes the file and its tables; gives the connection that did. Another process may be
/// doing the same just now.
async fn prepare_sqlite(path: PathBuf) -> Result<(SqliteConnection, Standing), StoreError> {
    let migration = |reason: String| StoreError::Migration(Cause(reason));
    // What the system, or SQLite in its name, says of the file is no fault of the tables.
    let failed = move |reason: String| match UNREADABLE.iter().any(|said| reason.contains(said)) {
        true => unavailable(Cause(reason)),
        false => migration(reason),
    };
    let prepare =
        move || {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !folder.is_dir() {
                let text = format!("the folder {} does not exist; make it first", folder.display());
                return Err(StoreError::InvalidUrl(text));
            }
            create_private(&path).map_err(|error| unavailable(Cause(format!("{}: {error}", path.display()))))?;
            let mut connection = connect_sqlite(&path, MIGRATION_TIMEOUT)
                .map_err(|error| unavailable(Cause(format!("{}: {error}", path.display()))))?;
            // Asked first: where nothing is to be done, nothing has to be written.
            let standing = look_sqlite(&mut connection)
                .map_err(|error| failed(error.to_string()))?
                .standing(&known::<diesel::sqlite::Sqlite>(&SQLITE_MIGRATIONS))?;
            match enter_wal(&mut connection) {
                Err(error) if standing == Standing::Behind || !is_unwritable(&error) => {
                    return Err(failed(error.to_string()));
                }
                _ => {}
            }
            if standing != Standing::Behind {
                return Ok((connection, standing));
            }
            // The second one waits for the first here, and then finds nothing to do.
            connection
                .immediate_transaction(|connection| {
                    connection.run_pending_migrations(SQLITE_MIGRATIONS).map(|_| ()).map_err(MigrationError::Migration)
                })
                .map_err(|error| failed(error.to_string()))?;
            Ok((connection, standing))
        };
    tokio::task::spawn_blocking(prepare).await.map_err(|error| migration(error.to_string()))?
}

fn look_sqlite(connection: &mut SqliteConnection) -> QueryResult<Tables> {
    let there = "SELECT count(*) > 0 AS there FROM sqlite_master WHERE name = '__diesel_schema_migrations'";
    if !SyncDsl::get_result::<There>(diesel::sql_query(there), connection)?.there {
        return Ok(Tables::default());
    }
    let applied: Vec<Said> = SyncDsl::load(diesel::sql_query(APPLIED), connection)?;
    let applied: Vec<String> = applied.into_iter().map(|one| one.said).collect();
    let readable_from = match applied.is_empty() {
        true => Vec::new(),
        false => SyncDsl::load::<Said>(diesel::sql_query(READABLE_FROM), connection)?,
    };
    Ok(Tables { applied, readable_from: readable_from.into_iter().next().map(|one| one.said) })
}

/// Whether nothing can be written, rather than this.
fn is_unwritable(error: &Error) -> bool {
    matches!(Judgement::of(error), Judgement::Unwritable(_))
}

/// Makes the file where it is missing, for its owner alone; SQLite gives `-wal` and
/// `-shm` the same mode.
fn create_private(path: &Path) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    match options.open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Turns the write-ahead log on, which stays with the file. SQLite does not wait for
/// others here, whatever `busy_timeout` says.
fn enter_wal(connection: &mut SqliteConnection) -> QueryResult<()> {
    let mut tries = 0;
    loop {
        match connection.batch_execute("PRAGMA journal_mode = WAL") {
            Err(Error::DatabaseError(_, details)) if details.message().contains("locked") && tries < 100 => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(50));
            }
            outcome => return outcome,
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum MigrationError {
    #[error("{0}")]
    Migration(Box<dyn std::error::Error + Send + Sync>),
    #[error("{0}")]
    Transaction(#[from] Error),
}

pub(super) struct PostgresManager {
    sessions: Sessions,
}

pub(super) struct PostgresConnection {
    diesel: Box<AsyncPgConnection>,
    closed: Arc<AtomicBool>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("no session")]
    Diesel(#[from] diesel::ConnectionError),
}

impl From<ConnectError> for StoreError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Session(SessionError::Shared) => Self::SharedSessions,
            error => unavailable(Cause::chain(&error)),
        }
    }
}

impl Manager for PostgresManager {
    type Type = PostgresConnection;
    type Error = ConnectError;

    async fn create(&self) -> Result<PostgresConnection, ConnectError> {
        let Session { client, closed, .. } = self.sessions.open(self.sessions.timeout).await?;
        PostgresConnection::over(client, closed).await
    }

    async fn recycle(&self, connection: &mut PostgresConnection, _: &Metrics) -> RecycleResult<ConnectError> {
        // No ping: it would double the round trips. A server that went away has closed
        // its connections, and their tasks have seen it.
        if AtomicBool::load(&connection.closed, Ordering::Acquire) {
            return Err(RecycleError::message("closed"));
        }
        Ok(())
    }
}

impl PostgresManager {
    /// The connection that the tables are brought up to date over. Tells which defaults hold in
    /// no session of ours.
    async fn connect_first(&self) -> Result<PostgresConnection, ConnectError> {
        let Session { client, closed, set_aside } = self.sessions.open(MIGRATION_TIMEOUT).await?;
        if !set_aside.is_empty() {
            tracing::info!(
                defaults = set_aside.join(", "),
                "sessions at the database are set up otherwise than by its defaults"
            );
        }
        PostgresConnection::over(client, closed).await
    }
}

impl PostgresConnection {
    async fn over(client: Client, closed: Arc<AtomicBool>) -> Result<Self, ConnectError> {
        Ok(Self { diesel: Box::new(AsyncPgConnection::try_from(client).await?), closed })
    }
}

/// Makes the schema and its tables, under a lock that other instances wait for.
async fn look_postgres(connection: &mut AsyncPgConnection, schema: &str) -> QueryResult<Tables> {
    // The schema's name was checked to be a plain one.
    let there = format!("SELECT to_regclass('\"{schema}\".__diesel_schema_migrations') IS NOT NULL AS there");
    if !RunQueryDsl::get_result::<There>(diesel::sql_query(there), connection).await?.there {
        return Ok(Tables::default());
    }
    let applied: Vec<Said> = RunQueryDsl::load(diesel::sql_query(APPLIED), connection).await?;
    let applied: Vec<String> = applied.into_iter().map(|one| one.said).collect();
    let readable_from: Vec<Said> = match applied.is_empty() {
        true => Vec::new(),
        false => RunQueryDsl::load(diesel::sql_query(READABLE_FROM), connection).await?,
    };
    Ok(Tables { applied, readable_from: readable_from.into_iter().next().map(|one| one.said) })
}

async fn prepare_postgres(manager: &PostgresManager) -> Result<Standing, StoreError> {
    // Nobody waits for a secret yet, so the first connection may take longer than others.
    let mut connection = tokio::time::timeout(manager.sessions.timeout * 10, manager.connect_first())
        .await
        .map_err(|_| unavailable(Cause("no connection in time".to_owned())))??;
    // A server that goes away meanwhile has not refused anything.
    let closed = Arc::clone(&connection.closed);
    let refused = |source: Cause| match AtomicBool::load(&closed, Ordering::Acquire) {
        true => unavailable(source),
        false => StoreError::Migration(source),
    };
    let schema = &manager.sessions.schema;
    // The lock is the session's, so it is let go whatever happens.
    let lock = format!("SELECT pg_advisory_lock(hashtext('secretier migrations {schema}'))");
    connection.diesel.batch_execute(&lock).await.map_err(|error| refused(Cause::chain(&error)))?;
    // Asked first: where nothing is to be done, nothing has to be written.
    let tables = look_postgres(&mut connection.diesel, schema).await.map_err(|error| refused(Cause::chain(&error)))?;
    let standing = tables.standing(&known::<Pg>(&POSTGRES_MIGRATIONS))?;
    if standing != Standing::Behind {
        return Ok(standing);
    }
    // To create needs a right to the whole database, even if there is nothing to do.
    let create = format!(
        "DO $$ BEGIN IF to_regnamespace('{schema}') IS NULL THEN CREATE SCHEMA IF NOT EXISTS \"{schema}\"; END IF; END $$"
    );
    connection.diesel.batch_execute(&create).await.map_err(|error| refused(Cause::chain(&error)))?;
    let mut harness = AsyncMigrationHarness::new(*connection.diesel);
    let migrated = harness.run_pending_migrations(POSTGRES_MIGRATIONS).map(|_| standing);
    migrated.map_err(|error| refused(Cause(error.to_string())))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn pool(folder: &tempfile::TempDir, size: usize) -> Pool {
        let (path, places) = (folder.path().join("test.db"), Arc::new(Semaphore::new(size)));
        std::fs::write(&path, "").unwrap();
        let manager = SqliteManager { path, timeout: Duration::from_secs(60), places, room: Work::room() };
        let connections = pool_of(manager, size).unwrap();
        let is_read_only = AtomicBool::new(false);
        Pool::Sqlite { connections, writer: Arc::default(), anchor: Box::default(), is_read_only }
    }

    fn manager(pool: &Pool) -> &SqliteManager {
        match pool {
            Pool::Sqlite { connections, .. } => connections.manager(),
            Pool::Postgres(_) => unreachable!(),
        }
    }

    /// Work that hangs until something is sent.
    fn hang(connection: &mut Connection) -> (mpsc::Sender<()>, BoxFuture<'static, QueryResult<()>>) {
        let (end, ended) = mpsc::channel();
        let Connection::Sqlite { connection, .. } = connection else { unreachable!() };
        (end, connection.in_way(Way::AtOnce, move |_| ended.recv().map_err(|_| Error::NotFound)))
    }

    #[tokio::test]
    async fn the_connection_that_came_back_last_is_used_first() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(&folder, 2);
        let holdings = |connection: &Connection| match connection {
            Connection::Sqlite { connection, .. } => Arc::as_ptr(&connection.holdings),
            Connection::Postgres(_) => unreachable!(),
        };
        let (one, other) = (pool.connection().await.unwrap(), pool.connection().await.unwrap());
        let last = holdings(&other);
        drop(one);
        drop(other);
        for _ in 0..3 {
            assert_eq!(holdings(&pool.connection().await.unwrap()), last);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn work_at_once_that_hangs_holds_up_neither_who_asked_nor_others() {
        let folder = tempfile::tempdir().unwrap();
        let pool = Arc::new(pool(&folder, 5));
        for _ in 0..20 {
            let mut hanging = Vec::new();
            for _ in 0..4 {
                let mut connection = pool.connection().await.unwrap();
                let asks = tokio::spawn(async move {
                    let (end, work) = hang(&mut connection);
                    let outcome = tokio::time::timeout(Duration::from_millis(1), work).await;
                    connection.discard();
                    (end, outcome)
                });
                let (end, outcome) = asks.await.expect("timers and tasks go on");
                assert!(outcome.is_err());
                hanging.push(end);
            }
            assert_eq!(manager(&pool).room.available_permits(), 0, "a worker hangs");
            let others = Arc::clone(&pool);
            let asks = tokio::spawn(async move {
                let (end, work) = hang(&mut others.connection().await.unwrap());
                end.send(()).unwrap();
                work.await
            });
            asks.await.unwrap().expect("nor is the work of others held up");
            for end in hanging {
                end.send(()).unwrap();
            }
            let _free = manager(&pool).room.acquire().await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_connection_that_is_given_up_at_work_keeps_its_place_and_its_turn_until_that_ends() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(&folder, 1);
        let mut connection = pool.writing_connection().await.unwrap();
        let (end, work) = hang(&mut connection);
        drop(work);
        connection.discard();
        assert_eq!(manager(&pool).places.available_permits(), 0);
        let Pool::Sqlite { writer, .. } = &pool else { unreachable!() };
        assert!(writer.try_lock().is_err(), "somebody writes still");
        assert!(tokio::time::timeout(Duration::from_millis(1), pool.connection()).await.is_err());
        end.send(()).unwrap();
        drop(pool.writing_connection().await.unwrap());
        drop(pool.connection().await.unwrap());
    }
}
