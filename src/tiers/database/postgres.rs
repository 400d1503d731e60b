//! Makes connections to a PostgreSQL server, ours or an application's, from its URL.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    sync::{Mutex, mpsc},
    time::Instant,
};
use tokio_postgres::{AsyncMessage, Client, NoTls, Socket, error::SqlState, tls::TlsStream};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{
    error::{Cause, StoreError},
    tls::Tls,
};
use crate::log;

/// A server and a database on it.
pub(crate) struct PostgresServer {
    target: ArcSwap<tokio_postgres::Config>,
    tls: Option<MakeRustlsConnect>,
    login: Option<Login>,
}

/// Where user and password are read again after a refused login.
struct Login {
    read: Arc<dyn Fn() -> Result<tokio_postgres::Config, StoreError> + Send + Sync>,
    /// When they were last read again.
    read_at: Mutex<Option<Instant>>,
}

/// The shortest time between two such reads: the file may lie on a network file system, and a login
/// that stays refused is tried often.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(1);

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
        Ok(Self { target: ArcSwap::from_pointee(target), tls: tls.connector()?, login: None })
    }

    /// The same, with user and password read again by `read` after a refused login. Everything else
    /// stays as it is: it may be another database.
    pub(super) fn with_login_from(
        self,
        read: impl Fn() -> Result<tokio_postgres::Config, StoreError> + Send + Sync + 'static,
    ) -> Self {
        Self { login: Some(Login { read: Arc::new(read), read_at: Mutex::default() }), ..self }
    }

    /// A new connection that receives this notification once it listens.
    pub(super) async fn hear(&self, what: &str) -> Result<Listening, tokio_postgres::Error> {
        let mut target = self.target.load_full();
        loop {
            let (told, hears) = mpsc::channel(1);
            let told = (what.to_owned(), told);
            let connected = match &self.tls {
                None => Box::pin(target.connect(NoTls)).await.map(|connected| hearing(connected, told)),
                Some(tls) => Box::pin(target.connect(tls.clone())).await.map(|connected| hearing(connected, told)),
            };
            match connected {
                Ok(client) => return Ok(Listening { client, hears }),
                Err(error) => target = self.with_newer_login(&target, error).await?,
            }
        }
    }

    /// A new connection, which runs until either side ends it, and a flag that is set when it has
    /// ended.
    pub(crate) async fn connect(&self) -> Result<(Client, Arc<AtomicBool>), tokio_postgres::Error> {
        let mut target = self.target.load_full();
        loop {
            // Boxed: otherwise every operation would carry 16 KiB that only few of them need.
            let connected = match &self.tls {
                None => Box::pin(target.connect(NoTls)).await.map(drive),
                Some(tls) => Box::pin(target.connect(tls.clone())).await.map(drive),
            };
            match connected {
                Ok(connected) => return Ok(connected),
                Err(error) => target = self.with_newer_login(&target, error).await?,
            }
        }
    }

    /// The server with another login than `refused`, if its login was refused and there is another
    /// one by now; else the error. One caller at a time reads it, at most once a second, so a file
    /// that changes all the time does not keep a caller here.
    async fn with_newer_login(
        &self,
        refused: &Arc<tokio_postgres::Config>,
        error: tokio_postgres::Error,
    ) -> Result<Arc<tokio_postgres::Config>, tokio_postgres::Error> {
        let Some(login) = self.login.as_ref().filter(|_| is_refused_login(&error)) else { return Err(error) };
        let mut read_at = login.read_at.lock().await;
        let target = self.target.load_full();
        // Another caller has read it meanwhile.
        if !Arc::ptr_eq(&target, refused) {
            return Ok(target);
        }
        if read_at.is_some_and(|at| at.elapsed() < READ_AGAIN_AFTER) {
            return Err(error);
        }
        *read_at = Some(Instant::now());
        let read = Arc::clone(&login.read);
        let now = match tokio::task::spawn_blocking(move || read()).await {
            Ok(Ok(now)) => now,
            Ok(Err(reason)) => {
                let reason = log::chain(&reason);
                tracing::warn!(reason, "PostgreSQL refuses the login, and database.url cannot be read again");
                return Err(error);
            }
            Err(_) => return Err(error),
        };
        if (now.get_user(), now.get_password()) == (target.get_user(), target.get_password()) {
            return Err(error);
        }
        let mut newer = (*target).clone();
        now.get_user().map(|user| newer.user(user));
        now.get_password().map(|password| newer.password(password));
        let newer = Arc::new(newer);
        self.target.store(Arc::clone(&newer));
        tracing::info!("PostgreSQL refused the login; another one was read from the file of database.url");
        Ok(newer)
    }
}

/// Whether the server, or a pooler in front of it, does not accept user and password.
fn is_refused_login(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|told| match told.code() {
        &SqlState::INVALID_PASSWORD | &SqlState::INVALID_AUTHORIZATION_SPECIFICATION => true,
        // PgBouncer has one code for everything.
        &SqlState::PROTOCOL_VIOLATION => told.message().contains("auth"),
        _ => false,
    })
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
