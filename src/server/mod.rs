//! The proxy's face: listeners, connections and their end. What a request means is in
//! `routes`, what an outcome looks like in `respond`.

mod body;
mod connection;
mod health;
mod openapi;
mod respond;
mod routes;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

pub use health::{Readiness, TierReadiness};
pub use openapi::document as openapi;

use self::connection::{Requests, Watched};
use crate::{
    access::{Access, Peer},
    metrics::Metrics,
    resolver::Resolver,
    units,
};

/// `[server]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The address to listen on; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// A Unix socket to listen on as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unix_socket: Option<PathBuf>,
    /// Connections at once, over all listeners; further ones wait to be accepted.
    pub max_connections: usize,
    /// How long a client may take to send a request's headers.
    #[serde(with = "units::duration")]
    pub header_timeout: Duration,
    /// How long a client may take to send a request's body.
    #[serde(with = "units::duration")]
    pub body_timeout: Duration,
    /// How long a connection may lie idle.
    #[serde(with = "units::duration")]
    pub idle_timeout: Duration,
    /// The largest value that can be written, in bytes.
    #[serde(with = "units::size")]
    pub max_value: u64,
    /// How long requests in progress may take to end after SIGTERM.
    #[serde(with = "units::duration")]
    pub shutdown_grace: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7227)),
            unix_socket: None,
            max_connections: 4096,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            max_value: 1 << 20,
            shutdown_grace: Duration::from_secs(10),
        }
    }
}

/// What the requests are answered from.
#[derive(Debug)]
pub struct Service {
    /// Finds and changes secrets.
    pub resolver: Resolver,
    /// Knows who may ask.
    pub access: Access,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    counters: routes::Counters,
    limits: routes::Limits,
}

impl Service {
    /// Puts the parts together.
    #[must_use]
    pub fn build(config: &Config, resolver: Resolver, access: Access, metrics: Arc<Metrics>) -> Self {
        let limits = routes::Limits { max_value: config.max_value, body_timeout: config.body_timeout };
        Self { counters: routes::Counters::new(&metrics), limits, resolver, access, metrics }
    }
}

/// The sockets to serve on.
#[derive(Debug)]
pub struct Listeners {
    /// TCP.
    pub tcp: TcpListener,
    /// A Unix socket, if configured; its file is removed at the end.
    pub unix: Option<(UnixListener, PathBuf)>,
}

impl Listeners {
    /// Opens the configured sockets.
    ///
    /// # Errors
    /// The address or path, and why it cannot be listened on.
    pub async fn bind(config: &Config) -> Result<Self, BindError> {
        let tcp = TcpListener::bind(config.listen).await;
        let tcp = tcp.map_err(|error| BindError { place: config.listen.to_string(), error })?;
        let unix = match &config.unix_socket {
            Some(path) => Some((bind_unix(path).await?, path.clone())),
            None => None,
        };
        Ok(Self { tcp, unix })
    }
}

/// A socket that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {place}: {error}")]
pub struct BindError {
    place: String,
    error: std::io::Error,
}

/// Opens a Unix socket that only its owner may connect to. A socket file that nobody
/// listens on any more is replaced; one that is in use is not.
async fn bind_unix(path: &std::path::Path) -> Result<UnixListener, BindError> {
    use std::os::unix::fs::PermissionsExt as _;
    let failed = |error| BindError { place: path.display().to_string(), error };
    if let Ok(found) = std::fs::symlink_metadata(path) {
        use std::os::unix::fs::FileTypeExt as _;
        if !found.file_type().is_socket() {
            return Err(failed(std::io::Error::other(
                "there is a file that is no socket; remove it or choose another path",
            )));
        }
        if tokio::net::UnixStream::connect(path).await.is_ok() {
            return Err(failed(std::io::ErrorKind::AddrInUse.into()));
        }
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Serves until `shutdown` completes, then lets what is in progress end within the grace time.
pub async fn serve(
    config: &Config,
    listeners: Listeners,
    service: Arc<Service>,
    shutdown: impl Future<Output = ()> + Send,
) {
    let Listeners { tcp, unix } = listeners;
    let (unix, socket_file) = unix.map_or((None, None), |(listener, path)| (Some(listener), Some(path)));
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(config.max_connections));
    let acceptor = Acceptor { config, service: &service, graceful: &graceful };
    tokio::pin!(shutdown);
    loop {
        // A connection is accepted only where there is room for it: the rest waits in
        // the system's backlog, which is bounded too.
        let permit = tokio::select! {
            permit = Arc::clone(&room).acquire_owned() => permit,
            () = &mut shutdown => break,
        };
        let Ok(permit) = permit else { break };
        tokio::select! {
            accepted = tcp.accept() => match accepted {
                Ok((stream, address)) => {
                    // Answers are one small write; waiting for more to send only delays them.
                    let _ = stream.set_nodelay(true);
                    acceptor.take(stream, Peer::Ip(address.ip()), permit);
                }
                Err(error) => not_accepted(&error).await,
            },
            accepted = accept_unix(unix.as_ref()) => match accepted {
                Ok((stream, peer)) => acceptor.take(stream, peer, permit),
                Err(error) => not_accepted(&error).await,
            },
            () = &mut shutdown => break,
        }
    }
    drop((tcp, unix));
    if let Some(path) = socket_file {
        let _ = std::fs::remove_file(path);
    }
    let open = graceful.count();
    tracing::info!(open, "draining connections");
    if tokio::time::timeout(config.shutdown_grace, graceful.shutdown()).await.is_err() {
        tracing::warn!("the grace time is over; closing the connections that are left");
    }
}

async fn accept_unix(listener: Option<&UnixListener>) -> std::io::Result<(tokio::net::UnixStream, Peer)> {
    match listener {
        Some(listener) => {
            let (stream, _) = listener.accept().await?;
            let process = stream.peer_cred()?;
            Ok((stream, Peer::Process { uid: process.uid(), gid: process.gid() }))
        }
        None => std::future::pending().await,
    }
}

/// Out of file descriptors, most likely: to try again at once would only burn time.
async fn not_accepted(error: &std::io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

struct Acceptor<'a> {
    config: &'a Config,
    service: &'a Arc<Service>,
    graceful: &'a GracefulShutdown,
}

impl Acceptor<'_> {
    fn take<S>(&self, stream: S, peer: Peer, permit: tokio::sync::OwnedSemaphorePermit)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            // Ours, which does not run while a connection lies idle, is in `Watched`.
            .header_read_timeout(None)
            .max_buf_size(64 * 1024);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_header_list_size(32 * 1024)
            .max_concurrent_streams(256)
            .keep_alive_interval(self.config.idle_timeout)
            .keep_alive_timeout(self.config.header_timeout);
        let service = Arc::clone(self.service);
        let requests = Arc::new(Requests::default());
        let watched = Watched::new(stream, self.config.header_timeout, self.config.idle_timeout, Arc::clone(&requests));
        let answer = service_fn(move |request: http::Request<_>| {
            let (service, in_progress) = (Arc::clone(&service), requests.begin(request.version()));
            async move {
                let answer = routes::answer(&service, peer, request).await;
                drop(in_progress);
                Ok::<_, std::convert::Infallible>(answer)
            }
        });
        let io = TokioIo::new(watched);
        let connection = self.graceful.watch(builder.serve_connection(io, answer).into_owned());
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = &*error, "a connection ended early");
            }
            drop(permit);
        });
    }
}
