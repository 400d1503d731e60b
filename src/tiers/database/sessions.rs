//! Checks and prepares PostgreSQL sessions before they are used: a session must be ours alone, and
//! must have the settings that this program relies on.
//!
//! There may be a connection pooler in between. In its *session* mode a client has a session for as
//! long as it is connected, as without a pooler. In the modes *transaction* and *statement* clients
//! share the sessions by turns. A setting or a lock of ours would then stay in a session that
//! another client gets a moment later, and would be missing from the session that we get. So
//! [`Sessions`] checks this before it sets or locks anything ([`Sessions::open`]).

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tokio::{sync::OnceCell, time::timeout};
use tokio_postgres::{Client, SimpleQueryMessage};

use super::postgres::{Listening, PostgresServer};

/// Sessions at one server, which are all opened in the same way.
pub(super) struct Sessions {
    server: PostgresServer,
    /// The schema that holds the tables; it was checked to be a plain name.
    pub(super) schema: String,
    /// How long one statement, or one connection, may usually take.
    pub(super) timeout: Duration,
    are_ours: OnceCell<()>,
}

/// A session that may be used.
pub(super) struct Session {
    pub(super) client: Client,
    /// Set when the connection has ended.
    pub(super) closed: Arc<AtomicBool>,
    /// The defaults of the database, or of the role, that are overridden in this session.
    pub(super) set_aside: Vec<String>,
}

/// Why a session could not be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("no connection")]
    Connect(#[source] tokio_postgres::Error),
    #[error("the session cannot be set up")]
    SetUp(#[source] tokio_postgres::Error),
    #[error("no session of our own")]
    Shared,
    #[error(
        "a second connection was given no session in time; where a connection pooler stands between, its pool needs \
         room for database.pool_size and three more of each instance"
    )]
    NoSecond,
    #[error("no connection in time")]
    TimedOut,
}

/// Settings that a database or a role may set other defaults for, with the values that this program
/// relies on.
///
/// Other settings do not matter here: names and values are sent as parameters, times as numbers,
/// and settings that affect the server's speed are up to its administrator.
const RELIED_ON: [(&str, &str); 6] = [
    // A writer waits for a row and then continues from the row's state at that time. Under a
    // stricter level it is refused instead, and so are reads.
    ("default_transaction_isolation", "'read committed'"),
    ("default_transaction_read_only", "'off'"),
    // Every transaction that makes a change waits for one row, for as long as `statement_timeout`.
    ("lock_timeout", "'0'"),
    // PostgreSQL 17: background writes take longer than a caller would wait.
    ("transaction_timeout", "'0'"),
    // PostgreSQL 14: connections are kept, and one that listens or holds a lock does nothing else.
    ("idle_session_timeout", "'0'"),
    // An acknowledged write is on the disk. Whether it must also be on other servers is up to their
    // administrator.
    ("synchronous_commit", "pg_catalog.replace(pg_catalog.current_setting('synchronous_commit'), 'off', 'on')"),
];

/// The order in which the two connections ask in each round of [`is_alone`].
const ROUNDS: [[usize; 2]; 4] = [[1, 0], [0, 1], [1, 0], [0, 1]];

/// Identifies a session among those of all servers: each server gives out process ids of its own.
const WHICH: &str = "SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_postmaster_start_time()";

impl Sessions {
    pub(super) fn new(server: PostgresServer, schema: String, timeout: Duration) -> Self {
        Self { server, schema, timeout, are_ours: OnceCell::new() }
    }

    /// A new session, set up, in which a statement may take as long as `statement_timeout`. Before
    /// the first one is opened, it is checked that sessions are ours alone.
    pub(super) async fn open(&self, statement_timeout: Duration) -> Result<Session, SessionError> {
        self.look().await?;
        let (client, closed) = self.server.connect().await.map_err(SessionError::Connect)?;
        let set_aside = self.set_up(&client, statement_timeout).await?;
        Ok(Session { client, closed, set_aside })
    }

    /// A session that is notified whenever the schema's name is sent on a channel.
    pub(super) async fn listen(&self, channel: &str) -> Result<Listening, SessionError> {
        let listen = async {
            self.look().await?;
            let listening = self.server.hear(&self.schema).await.map_err(SessionError::Connect)?;
            self.set_up(&listening.client, self.timeout).await?;
            listening.client.batch_execute(&format!("LISTEN {channel}")).await.map_err(SessionError::SetUp)?;
            Ok(listening)
        };
        timeout(self.timeout, listen).await.map_err(|_| SessionError::TimedOut)?
    }

    async fn look(&self) -> Result<(), SessionError> {
        self.are_ours.get_or_try_init(|| is_alone(&self.server, self.timeout)).await?;
        Ok(())
    }

    /// Gives a session the settings that are relied on. Returns the names of those that had other
    /// values.
    async fn set_up(&self, client: &Client, statement_timeout: Duration) -> Result<Vec<String>, SessionError> {
        // A transaction that this process has abandoned, for example because a debugger stopped it,
        // must not hold its rows for ever. A setting that the server is too old for is left out.
        let relied_on: Vec<String> =
            RELIED_ON.iter().map(|(name, value)| format!("('{name}'::text, ({value})::text)")).collect();
        let set_up = format!(
            "SET search_path TO \"{}\"; SET statement_timeout TO {}; SET idle_in_transaction_session_timeout TO 60000; \
             SELECT name, pg_catalog.current_setting(name), pg_catalog.set_config(name, value, false) \
             FROM (VALUES {}) AS ours (name, value) WHERE pg_catalog.current_setting(name, true) IS NOT NULL",
            self.schema,
            statement_timeout.as_millis().clamp(1, i32::MAX as u128),
            relied_on.join(", "),
        );
        let told = client.simple_query(&set_up).await.map_err(SessionError::SetUp)?;
        let set_aside = told.iter().filter_map(|message| {
            let SimpleQueryMessage::Row(row) = message else { return None };
            let [name, before, now] = [0, 1, 2].map(|column| row.get(column).unwrap_or_default());
            (before != now).then(|| format!("{name} = {before}"))
        });
        Ok(set_aside.collect())
    }
}

/// Checks that a connection has a session for as long as it lasts, and that no other connection has
/// it meanwhile. The check leaves nothing in another client's session: it uses transactions that
/// write nothing, begun and ended by the simple protocol, because a pooler may lose prepared
/// statements.
///
/// Two connections are given sessions by turns. A pooler that shares sessions would hand out first
/// the one that came back first, or last, or any. So in some rounds a connection asks first after
/// the other has given its session back last, in others after the other has given it back first.
/// Before all rounds one connection asks outside a transaction: a pool may have a single session,
/// which it then gives to the other.
async fn is_alone(server: &PostgresServer, patience: Duration) -> Result<(), SessionError> {
    let (one, other) = tokio::try_join!(Asking::connect(server), Asking::connect(server))?;
    let mut pair = [one, other];
    let mut is_shared = pair[0].asks(WHICH).await?;
    for round in ROUNDS {
        for one in round {
            is_shared |= timeout(patience, pair[one].begins()).await.map_err(|_| SessionError::NoSecond)??;
            is_shared |= pair[0].session == pair[1].session;
            // The pooler may have no session left for the other connection.
            if is_shared {
                break;
            }
        }
        for one in &mut pair {
            one.ends().await?;
        }
        if is_shared {
            return Err(SessionError::Shared);
        }
    }
    Ok(())
}

/// A connection that asks which session it has been given.
struct Asking {
    client: Client,
    session: Option<String>,
    in_transaction: bool,
}

impl Asking {
    async fn connect(server: &PostgresServer) -> Result<Self, SessionError> {
        let (client, _) = server.connect().await.map_err(SessionError::Connect)?;
        Ok(Self { client, session: None, in_transaction: false })
    }

    /// Asks, and returns whether it is given another session than before.
    async fn asks(&mut self, which: &str) -> Result<bool, SessionError> {
        let told = self.client.simple_query(which).await.map_err(|error| match is_without_transactions(&error) {
            true => SessionError::Shared,
            false => SessionError::Connect(error),
        })?;
        let told = told.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(format!("{} {}", row.get(0)?, row.get(1)?)),
            _ => None,
        });
        let before = std::mem::replace(&mut self.session, told);
        Ok(before.is_some() && before != self.session)
    }

    /// The same, but keeps the session until [`Self::ends`].
    async fn begins(&mut self) -> Result<bool, SessionError> {
        self.in_transaction = true;
        self.asks(&format!("BEGIN READ ONLY; {WHICH}")).await
    }

    async fn ends(&mut self) -> Result<(), SessionError> {
        if std::mem::take(&mut self.in_transaction) {
            self.client.batch_execute("COMMIT").await.map_err(SessionError::Connect)?;
        }
        Ok(())
    }
}

/// Whether PgBouncer says that it gives a session for one statement only.
fn is_without_transactions(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|told| told.message().contains("statement pooling"))
}
