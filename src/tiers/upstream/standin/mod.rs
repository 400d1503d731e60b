//! A stand-in for Infisical: an HTTP server over a [`World`] in memory. The `dev` command uses it,
//! and the tests break it on purpose. Its answers are checked against exchanges recorded from a
//! real server; see `tests/recordings/`.

mod auth;
mod exchange;
mod expand;
mod faults;
mod fields;
mod folders;
mod limits;
mod routes;
mod secrets;
mod surrogates;
mod tokens;
mod world;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, oneshot},
    task::{JoinHandle, JoinSet},
};

pub use self::{
    faults::{Calls, Fault, Gate, Route},
    limits::Limits,
    tokens::{Credentials, Identity, Readable, Rights},
    world::{Dialect, Project, Unreadable, World},
};

/// A running server. Dropping it ends it, without waiting for its port to be free.
#[derive(Debug)]
pub struct StandIn {
    address: SocketAddr,
    world: World,
    serving: Option<Serving>,
}

#[derive(Debug)]
struct Serving {
    task: JoinHandle<()>,
    /// If it is dropped or sent, the task ends.
    stop: oneshot::Sender<()>,
}

impl Serving {
    fn start(listener: TcpListener, world: World) -> Self {
        let (stop, stopped) = oneshot::channel();
        Self { task: tokio::spawn(accept(listener, world, stopped)), stop }
    }
}

impl StandIn {
    /// Serves this world to every client that connects to the listener.
    ///
    /// # Errors
    ///
    /// The listener's own address cannot be determined.
    pub fn start(listener: TcpListener, world: World) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let serving = Some(Serving::start(listener, world.clone()));
        Ok(Self { address, world, serving })
    }

    /// Serves this world on a free port of the loopback address.
    ///
    /// # Errors
    ///
    /// No port is available.
    pub async fn on_loopback(world: World) -> io::Result<Self> {
        Self::start(TcpListener::bind(("127.0.0.1", 0)).await?, world)
    }

    /// The address on which it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// The URL to configure as `site_url`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The world that it serves.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Closes the port and all connections: from then on it refuses connections.
    pub async fn stop(&mut self) {
        if let Some(Serving { task, stop }) = self.serving.take() {
            drop(stop);
            // It fails only if the task panicked, which has closed the port as well.
            let _ = task.await;
        }
    }

    /// Serves the same world on the same port again; stops first where it still runs.
    ///
    /// # Errors
    ///
    /// Another process has taken the port.
    pub async fn restart(&mut self) -> io::Result<()> {
        self.stop().await;
        let listener = bind_again(self.address).await?;
        self.serving = Some(Serving::start(listener, self.world.clone()));
        Ok(())
    }
}

/// The system may need a moment to free a port.
async fn bind_again(address: SocketAddr) -> io::Result<TcpListener> {
    let started = Instant::now();
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && started.elapsed() < LONGEST_REBIND => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            result => return result,
        }
    }
}

async fn accept(listener: TcpListener, world: World, mut stopped: oneshot::Receiver<()>) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await.map_err(io::Error::other)?;
            listener.accept().await.map(|(connection, peer)| (connection, peer, place))
        };
        let accepted = tokio::select! {
            _ = &mut stopped => break,
            accepted = next => accepted,
        };
        match accepted {
            Ok((connection, peer, place)) => {
                let world = world.clone();
                connections.spawn(async move {
                    serve(connection, peer, world).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "the stand-in cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    connections.shutdown().await;
}

async fn serve(connection: TcpStream, peer: SocketAddr, world: World) {
    // Small answers in many packets would wait for each other's acknowledgement.
    let _ = connection.set_nodelay(true);
    let answer = service_fn(|request| routes::answer(&world, request, peer.ip()));
    let served =
        http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(connection), answer).await;
    if let Err(error) = served {
        tracing::trace!(%error, "a connection to the stand-in ended early");
    }
}

const MOST_CONNECTIONS: usize = 1024;
const LONGEST_REBIND: Duration = Duration::from_secs(5);
