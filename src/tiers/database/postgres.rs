//! Makes connections to a PostgreSQL server, ours or an application's, from its URL.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Client, NoTls, Socket, tls::TlsStream};
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
    /// Builds it from the parts of a URL. Each of its hosts may take `connect_timeout` to answer.
    pub(super) fn new(
        mut target: tokio_postgres::Config,
        tls: &Tls,
        connect_timeout: Duration,
    ) -> Result<Self, StoreError> {
        target.connect_timeout(connect_timeout);
        // So that a connection that only listens, too, notices a server that vanished.
        target.keepalives_idle(Duration::from_secs(30));
        Ok(Self { target, tls: tls.connector()? })
    }

    /// A new connection that receives this notification once it listens.
    pub(super) async fn hear(&self, what: &str) -> Result<Listening, tokio_postgres::Error> {
        let (told, hears) = mpsc::channel(1);
        let told = (what.to_owned(), told);
        let client = match &self.tls {
            None => hearing(Box::pin(self.target.connect(NoTls)).await?, told),
            Some(tls) => hearing(Box::pin(self.target.connect(tls.clone())).await?, told),
        };
        Ok(Listening { client, hears })
    }

    /// A new connection, which runs until either side ends it, and a flag that is set when it has
    /// ended.
    pub(crate) async fn connect(&self) -> Result<(Client, Arc<AtomicBool>), tokio_postgres::Error> {
        // Boxed: otherwise every operation would carry 16 KiB that only few of them need.
        match &self.tls {
            None => Box::pin(self.target.connect(NoTls)).await.map(drive),
            Some(tls) => Box::pin(self.target.connect(tls.clone())).await.map(drive),
        }
    }
}

/// A connection that receives notifications.
pub(super) struct Listening {
    /// The connection ends when this is dropped.
    pub(super) client: Client,
    hears: mpsc::Receiver<()>,
}

impl Listening {
    /// Waits until it is notified again; `false` where the connection has ended. Several
    /// notifications that come before anybody waits count as one.
    pub(super) async fn heard(&mut self) -> bool {
        self.hears.recv().await.is_some()
    }
}

/// Lets a connection run until either side ends it, and passes on its notifications.
fn hearing<S>(
    (client, mut connection): (Client, tokio_postgres::Connection<Socket, S>),
    (what, told): (String, mpsc::Sender<()>),
) -> Client
where
    S: TlsStream + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        // This loop ends with the connection; `told` is dropped with it.
        while let Some(message) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            match message {
                Ok(AsyncMessage::Notification(notification)) if notification.payload() == what => {
                    // If the channel is full, a notification is waiting already.
                    let _ = told.try_send(());
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(reason = %Cause::chain(&error), "the connection for notifications ended");
                    break;
                }
            }
        }
    });
    client
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
