//! Connections to PostgreSQL.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use deadpool::managed::{Manager, Metrics, RecycleError, RecycleResult};
use diesel::{QueryResult, pg::Pg};
use diesel_async::{AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _};
use diesel_migrations::MigrationHarness as _;
use tokio_postgres::Client;

use super::{
    super::{
        error::{Cause, StoreError},
        sessions::{Session, SessionError, Sessions},
        tables::{APPLIED, READABLE_FROM, Said, Standing, Tables, There, known},
    },
    MIGRATION_TIMEOUT, POSTGRES_MIGRATIONS, unavailable,
};

pub(in crate::tiers::database) struct PostgresManager {
    pub(super) sessions: Sessions,
}

pub(in crate::tiers::database) struct PostgresConnection {
    pub(super) diesel: Box<AsyncPgConnection>,
    pub(super) closed: Arc<AtomicBool>,
}

#[derive(Debug, thiserror::Error)]
pub(in crate::tiers::database) enum ConnectError {
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
        // No ping: it would double the round trips. A server that shut down has closed its
        // connections, and their tasks have noticed that.
        if AtomicBool::load(&connection.closed, Ordering::Acquire) {
            return Err(RecycleError::message("closed"));
        }
        Ok(())
    }
}

impl PostgresManager {
    /// The connection over which the tables are brought up to date. Logs the defaults that our
    /// sessions override.
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
    pub(super) async fn over(client: Client, closed: Arc<AtomicBool>) -> Result<Self, ConnectError> {
        Ok(Self { diesel: Box::new(AsyncPgConnection::try_from(client).await?), closed })
    }
}

/// Makes the schema and its tables, under a lock that other instances wait for.
pub(super) async fn look_postgres(connection: &mut AsyncPgConnection, schema: &str) -> QueryResult<Tables> {
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

pub(super) async fn prepare_postgres(manager: &PostgresManager) -> Result<Standing, StoreError> {
    // Nobody waits for a secret yet, so the first connection may take longer than others.
    let mut connection = tokio::time::timeout(manager.sessions.timeout * 10, manager.connect_first())
        .await
        .map_err(|_| unavailable(Cause("no connection in time".to_owned())))??;
    // If the server shuts down meanwhile, it has not refused anything.
    let closed = Arc::clone(&connection.closed);
    let refused = |source: Cause| match AtomicBool::load(&closed, Ordering::Acquire) {
        true => unavailable(source),
        false => StoreError::Migration(source),
    };
    let schema = &manager.sessions.schema;
    // The lock belongs to the session, so it is released in any case.
    let lock = format!("SELECT pg_advisory_lock(hashtext('secretier migrations {schema}'))");
    connection.diesel.batch_execute(&lock).await.map_err(|error| refused(Cause::chain(&error)))?;
    // Checked first: if nothing is to be done, nothing has to be written.
    let tables = look_postgres(&mut connection.diesel, schema).await.map_err(|error| refused(Cause::chain(&error)))?;
    let standing = tables.standing(&known::<Pg>(&POSTGRES_MIGRATIONS))?;
    if standing != Standing::Behind {
        return Ok(standing);
    }
    // `CREATE` needs a right to the whole database, even if there is nothing to do.
    let create = format!(
        "DO $$ BEGIN IF to_regnamespace('{schema}') IS NULL THEN CREATE SCHEMA IF NOT EXISTS \"{schema}\"; END IF; END $$"
    );
    connection.diesel.batch_execute(&create).await.map_err(|error| refused(Cause::chain(&error)))?;
    let mut harness = AsyncMigrationHarness::new(*connection.diesel);
    let migrated = harness.run_pending_migrations(POSTGRES_MIGRATIONS).map(|_| standing);
    migrated.map_err(|error| refused(Cause(error.to_string())))
}
