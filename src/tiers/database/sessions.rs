//! Sessions at PostgreSQL, with the settings that this program relies on.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tokio::time::timeout;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::postgres::{Listening, PostgresServer};

/// Sessions at a server, as all of them are opened.
pub(super) struct Sessions {
    server: PostgresServer,
    /// The schema that holds the tables; it was checked to be a plain name.
    pub(super) schema: String,
    /// How long one statement, or one connection, may usually take.
    pub(super) timeout: Duration,
}

/// A session that may be used.
pub(super) struct Session {
    pub(super) client: Client,
    /// Told when the connection has ended.
    pub(super) closed: Arc<AtomicBool>,
    /// The defaults of the database, or of the role, that do not hold in it.
    pub(super) set_aside: Vec<String>,
}

/// Why there is no such session.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("no connection")]
    Connect(#[source] tokio_postgres::Error),
    #[error("the session cannot be set up")]
    SetUp(#[source] tokio_postgres::Error),
    #[error("no connection in time")]
    TimedOut,
}

/// Settings that a database or a role may have other defaults for, with the values that this
/// program relies on.
///
/// Others do not matter here: names and values travel as parameters, times as numbers, and
/// what makes the server faster or slower is its administrator's to say.
const RELIED_ON: [(&str, &str); 6] = [
    // Writers wait for a row and then go on from what it holds by then. Under a stricter level
    // they are refused instead, and so are reads.
    ("default_transaction_isolation", "'read committed'"),
    ("default_transaction_read_only", "'off'"),
    // Everybody who changes something waits for one row, for as long as `statement_timeout`.
    ("lock_timeout", "'0'"),
    // PostgreSQL 17: what is stored in the background takes longer than a caller would wait.
    ("transaction_timeout", "'0'"),
    // PostgreSQL 14: connections are kept, and one that listens or has a lock does nothing else.
    ("idle_session_timeout", "'0'"),
    // A write that is acknowledged is on the disk. How far it is on other servers' too is theirs
    // to say who set them up.
    ("synchronous_commit", "pg_catalog.replace(pg_catalog.current_setting('synchronous_commit'), 'off', 'on')"),
];

impl Sessions {
    pub(super) fn new(server: PostgresServer, schema: String, timeout: Duration) -> Self {
        Self { server, schema, timeout }
    }

    /// A new session, set up, in which a statement may take as long as `statement_timeout`.
    pub(super) async fn open(&self, statement_timeout: Duration) -> Result<Session, SessionError> {
        let (client, closed) = self.server.connect().await.map_err(SessionError::Connect)?;
        let set_aside = self.set_up(&client, statement_timeout).await?;
        Ok(Session { client, closed, set_aside })
    }

    /// A session that hears whenever the schema's name is told on a channel.
    pub(super) async fn listen(&self, channel: &str) -> Result<Listening, SessionError> {
        let listen = async {
            let listening = self.server.hear(&self.schema).await.map_err(SessionError::Connect)?;
            self.set_up(&listening.client, self.timeout).await?;
            listening.client.batch_execute(&format!("LISTEN {channel}")).await.map_err(SessionError::SetUp)?;
            Ok(listening)
        };
        timeout(self.timeout, listen).await.map_err(|_| SessionError::TimedOut)?
    }

    /// Gives a session the settings that are relied on; tells which others it had.
    async fn set_up(&self, client: &Client, statement_timeout: Duration) -> Result<Vec<String>, SessionError> {
        // A transaction that this process forgot, stopped by a debugger say, must not hold its
        // rows for ever. A setting that the server is too old for is left out.
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
