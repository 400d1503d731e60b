//! How connections to a PostgreSQL server are made, ours or an application's, as its URL tells it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio_postgres::{Client, NoTls, Socket, tls::TlsStream};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{
    error::{Cause, StoreError},
    tls::Tls,
};

/// A server and a database on it.
pub(crate) struct PostgresServer {
    target: tokio_postgres::Config,
    tls: Option<MakeRustlsConnect>,
}

impl PostgresServer {
    /// From the parts of a URL. Each of its hosts may take `connect_timeout` to answer.
    pub(super) fn new(
        mut target: tokio_postgres::Config,
        tls: &Tls,
        connect_timeout: Duration,
    ) -> Result<Self, StoreError> {
        target.connect_timeout(connect_timeout);
        Ok(Self { target, tls: tls.connector()? })
    }

    /// A new connection, which runs until either side ends it, and what tells that it has ended.
    pub(crate) async fn connect(&self) -> Result<(Client, Arc<AtomicBool>), tokio_postgres::Error> {
        // Boxed: 16 KiB that every operation would carry along, for what few of them do.
        match &self.tls {
            None => Box::pin(self.target.connect(NoTls)).await.map(drive),
            Some(tls) => Box::pin(self.target.connect(tls.clone())).await.map(drive),
        }
    }
}

/// Lets a connection run until either side ends it.
fn drive<S>((client, connection): (Client, tokio_postgres::Connection<Socket, S>)) -> (Client, Arc<AtomicBool>)
where
    S: TlsStream + Unpin + Send + 'static,
{
    let closed = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&closed);
    tokio::spawn(async move {
        let outcome = connection.await;
        ended.store(true, Ordering::Release);
        if let Err(error) = outcome {
            tracing::warn!(reason = %Cause::chain(&error), "a database connection ended");
        }
    });
    (client, closed)
}
