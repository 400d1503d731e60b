//! Listeners, connections and their end. `handler` admits requests, and answers hits in memory
//! at once; `routes` gives requests their meaning, and `respond` gives outcomes their form.

mod accept;
mod api;
mod ask;
mod body;
mod budgets;
mod connection;
mod exposition;
mod guard;
mod handler;
mod infisical_api;
mod inherited;
mod listen;
mod listeners;
mod names;
mod openapi;
mod operation;
mod outgoing;
mod query;
mod respond;
mod routes;
mod streams;
mod tls;

use std::{path::PathBuf, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use futures_util::{FutureExt as _, future::Either};
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::{
        conn::auto,
        graceful::{GracefulShutdown, Watcher},
    },
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    task::JoinSet,
};

pub use api::process::{Readiness, TierReadiness};
pub use infisical_api::{Config as InfisicalApiConfig, Project};
pub use inherited::{InheritError, Inherited};
pub use listen::{InvalidListen, Listen};
pub use listeners::{BindError, InvalidMode, InvalidOwner, Listeners, SocketMode, SocketOwner};
pub use openapi::document as openapi;
pub use tls::{Config as TlsConfig, Tls, TlsError};

use self::{
    api::webhooks::{Hooks, Readers},
    budgets::{Bounds, Budgets, Thing},
    connection::{Connections, Place, Watched},
    guard::Guard,
    infisical_api::InfisicalApi,
    listen::Accepting,
    listeners::accept_unix,
    respond::Problem,
    streams::Streams,
};
use crate::{
    access::{
        self, Access, Peer, Refused,
        audit::{Audit, Misuse},
    },
    attachment::Attachment,
    budget::{Held, Holds, Most},
    metrics::Metrics,
    resolver::{Resolver, Webhook},
    rotation::Rotations,
    secret::LARGEST_VALUE,
    units,
};

/// `[server]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The addresses to listen on, one or a list; port 0 lets the system choose.
    pub listen: Listen,
    /// A Unix socket to listen on as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unix_socket: Option<PathBuf>,
    /// The permissions of its file.
    pub unix_mode: SocketMode,
    /// The owner of its file; if not set, the user who runs the proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unix_owner: Option<SocketOwner>,
    /// TLS on TCP; required where other machines can connect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
    /// Connections at once, over all listeners; for a further one an idle one is closed, or
    /// it waits.
    pub max_connections: usize,
    /// Streams of one HTTP/2 connection at once.
    pub max_streams: u32,
    /// Requests in progress at once that came with a valid token, over all connections. Each is in
    /// progress until its answer is taken.
    pub max_in_flight: u64,
    /// The same for one token.
    pub max_in_flight_per_token: u64,
    /// Requests in progress at once whose token is not known to be valid; never more than a quarter
    /// of the connections.
    pub max_strangers: u64,
    /// The same for one peer.
    pub max_strangers_per_peer: u64,
    /// Bytes of requests' bodies that are being read at once.
    #[serde(with = "units::size")]
    pub max_bodies: u64,
    /// The same for one token.
    #[serde(with = "units::size")]
    pub max_bodies_per_token: u64,
    /// Bytes of answers that are not taken yet, counting only answers longer than 16 KiB.
    #[serde(with = "units::size")]
    pub max_answers: u64,
    /// The same for one token.
    #[serde(with = "units::size")]
    pub max_answers_per_token: u64,
    /// Streams of events that are open at once.
    pub max_event_streams: u64,
    /// The same for one token.
    pub max_event_streams_per_token: u64,
    /// Lists of more than 64 KiB that are made at once, for all tokens; for one token it is one.
    pub max_long_answers: u32,
    /// The longest head of a request, in bytes.
    #[serde(with = "units::size")]
    pub max_header: u64,
    /// How long a client may take to send a request's headers.
    #[serde(with = "units::duration")]
    pub header_timeout: Duration,
    /// How long a client may take to send a request's body.
    #[serde(with = "units::duration")]
    pub body_timeout: Duration,
    /// How long a connection may be idle.
    #[serde(with = "units::duration")]
    pub idle_timeout: Duration,
    /// The largest value that can be written, in bytes.
    #[serde(with = "units::size")]
    pub max_value: u64,
    /// How long requests in progress may take to end after SIGTERM.
    #[serde(with = "units::duration")]
    pub shutdown_grace: Duration,
    /// How often the configuration file is checked for changes; if not set, only SIGHUP reloads it.
    #[serde(with = "units::optional_duration", skip_serializing_if = "Option::is_none")]
    pub watch_config: Option<Duration>,
    /// The face for Infisical's clients.
    pub infisical_api: InfisicalApiConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: Listen::default(),
            unix_socket: None,
            unix_mode: SocketMode::default(),
            unix_owner: None,
            tls: None,
            max_connections: 4096,
            max_streams: 32,
            max_in_flight: 1024,
            max_in_flight_per_token: 512,
            max_strangers: 256,
            max_strangers_per_peer: 64,
            max_bodies: 128 << 20,
            max_bodies_per_token: 32 << 20,
            max_answers: 256 << 20,
            max_answers_per_token: 48 << 20,
            max_event_streams: 2048,
            max_event_streams_per_token: 1024,
            max_long_answers: 4,
            max_header: 32 << 10,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            max_value: LARGEST_VALUE,
            shutdown_grace: Duration::from_secs(10),
            watch_config: None,
            infisical_api: InfisicalApiConfig::default(),
        }
    }
}

/// The settings of [`Config`] that say where the instance is asked; the others may be wrong.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub struct Endpoints {
    /// As in [`Config::listen`].
    pub listen: Listen,
    /// As in [`Config::unix_socket`].
    pub unix_socket: Option<PathBuf>,
    /// As in [`Config::tls`].
    pub tls: Option<TlsConfig>,
}

impl Default for Endpoints {
    fn default() -> Self {
        let Config { listen, unix_socket, tls, .. } = Config::default();
        Self { listen, unix_socket, tls }
    }
}

impl Config {
    /// The bounds beside so many connections.
    fn bounds(&self, connections: usize) -> Bounds {
        let most = |in_all, by_one| Most { in_all, by_one };
        // A waiting request keeps its connection open: most of these are for callers with a token.
        let strangers = self.max_strangers.min((connections as u64 / 4).max(1));
        Bounds {
            places: most(self.max_in_flight, self.max_in_flight_per_token),
            strangers: most(strangers, self.max_strangers_per_peer),
            bodies: most(self.max_bodies, self.max_bodies_per_token),
            answers: most(self.max_answers, self.max_answers_per_token),
            streams: most(self.max_event_streams, self.max_event_streams_per_token),
        }
    }

    /// The faults of these settings, each beginning with the setting below `server`.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let reached = self.listen.addresses().find(|address| !address.ip().to_canonical().is_loopback());
        if let Some(address) = reached.filter(|_| self.tls.is_none()) {
            faults.push(format!(
                "listen: {address} is reached from other machines, and without TLS tokens and secrets would cross the \
                 network in the clear; listen on 127.0.0.1, use server.unix_socket, or set [server.tls]"
            ));
        }
        if let Some(address) = self.listen.repeated() {
            faults.push(format!("listen: {address} stands there twice (localhost is 127.0.0.1 and [::1])"));
        }
        for (name, number) in [
            ("max_connections", self.max_connections as u64),
            ("max_streams", u64::from(self.max_streams)),
            ("max_in_flight", self.max_in_flight),
            ("max_in_flight_per_token", self.max_in_flight_per_token),
            ("max_strangers", self.max_strangers),
            ("max_strangers_per_peer", self.max_strangers_per_peer),
            ("max_event_streams", self.max_event_streams),
            ("max_event_streams_per_token", self.max_event_streams_per_token),
            ("max_long_answers", u64::from(self.max_long_answers)),
        ] {
            if number == 0 {
                faults.push(format!("{name}: at least 1 is needed"));
            }
        }
        // A byte of a value may take six bytes as an escape.
        let largest = self.max_value.saturating_mul(6).saturating_add(1024);
        for (name, bytes) in [("max_bodies", self.max_bodies), ("max_answers", self.max_answers)] {
            if bytes < largest {
                faults.push(format!(
                    "{name}: at least {largest} bytes are needed: six times server.max_value, as JSON may write it, and 1 KiB"
                ));
            }
        }
        if self.watch_config.is_some_and(|every| every < Duration::from_millis(100)) {
            faults.push("watch_config: at least \"100ms\"; leave it out to have SIGHUP alone count".to_owned());
        }
        faults.extend(self.infisical_api.faults().map(|fault| format!("infisical_api.{fault}")));
        if !(8 << 10..=1 << 20).contains(&self.max_header) {
            faults.push("max_header: from \"8KiB\" to \"1MiB\" can be set".to_owned());
        }
        faults
    }
}

/// Everything that requests are answered from.
#[derive(Debug)]
pub struct Service {
    /// Finds and changes secrets.
    pub resolver: Arc<Resolver>,
    /// Rotates secrets.
    pub rotations: Arc<Rotations>,
    /// Authorises callers.
    pub access: Arc<Access>,
    /// Records who asked for what.
    pub audit: Audit,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// Whether the database was heard of recently enough to answer by its state.
    pub attachment: Arc<Attachment>,
    /// The rules for every request; replaced whole.
    terms: ArcSwap<Terms>,
    listen: Listen,
    connections: Arc<Connections>,
    budgets: Budgets,
    counters: ask::Counters,
    durations: ask::Durations,
    /// Set when the instance stops: what goes on by itself ends then.
    stopping: watch::Sender<bool>,
    /// Takes webhooks of upstream, where they are configured.
    hooks: Option<Hooks>,
    /// The bodies of logins that are being read.
    logins: Readers,
    /// What Infisical's clients name in their requests.
    project: Project,
}

/// The settings that may change while requests are answered.
#[derive(Debug)]
struct Terms {
    guard: Guard,
    limits: Limits,
    /// The face for Infisical's clients, where it is on.
    infisical_api: Option<Arc<InfisicalApi>>,
}

/// Limits of size and time.
#[derive(Debug, Clone, Copy)]
struct Limits {
    max_value: u64,
    bounds: Bounds,
    body_timeout: Duration,
    shutdown_grace: Duration,
}

impl Terms {
    fn build(config: &Config, access: &access::Config, listen: &Listen, connections: usize, project: &Project) -> Self {
        let Config { max_value, body_timeout, shutdown_grace, .. } = *config;
        let bounds = config.bounds(connections);
        Self {
            guard: Guard::build(access, listen),
            limits: Limits { max_value, bounds, body_timeout, shutdown_grace },
            infisical_api: InfisicalApi::build(&config.infisical_api, project).map(Arc::new),
        }
    }
}

impl Service {
    /// Builds the service from its parts.
    #[must_use]
    pub fn build(
        config: &Config,
        access_config: &access::Config,
        rotations: Arc<Rotations>,
        access: Access,
        audit: Audit,
        metrics: Arc<Metrics>,
        attachment: Arc<Attachment>,
    ) -> Self {
        let resolver = Arc::clone(rotations.resolver());
        resolver.set_long_answers(config.max_long_answers);
        let project = Project::default();
        let terms = Terms::build(config, access_config, &config.listen, config.max_connections, &project);
        Self {
            attachment,
            terms: ArcSwap::from_pointee(terms),
            logins: Readers::default(),
            project,
            listen: config.listen.clone(),
            connections: Connections::new(config.max_connections, &metrics),
            budgets: Budgets::default(),
            counters: ask::Counters::new(&metrics),
            durations: ask::Durations::new(&metrics),
            stopping: watch::Sender::new(false),
            hooks: None,
            rotations,
            resolver,
            access: Arc::new(access),
            audit,
            metrics,
        }
    }

    /// The same, with the webhooks that `webhook` authenticates.
    #[must_use]
    pub fn with_webhook(self, webhook: Option<Arc<dyn Webhook>>) -> Self {
        Self { hooks: webhook.map(Hooks::new), ..self }
    }

    /// The same for this project, as Infisical's clients name it. To be called before
    /// [`Self::with_connections`].
    #[must_use]
    pub fn with_project(self, project: Project) -> Self {
        Self { project, ..self }
    }

    /// The same, with at most this many connections open at once.
    #[must_use]
    pub fn with_connections(self, config: &Config, access: &access::Config, most: usize) -> Self {
        let terms = ArcSwap::from_pointee(Terms::build(config, access, &self.listen, most, &self.project));
        Self { terms, connections: Connections::new(most, &self.metrics), ..self }
    }

    /// Counts a request that a limit holds back.
    fn count_limited(&self, refused: &Refused) {
        if let Refused::Limited { limit, .. } = refused {
            self.metrics.count("secretier_limited_total", &[("limit", limit.as_str())]);
        }
    }

    /// Applies changed hosts, proxies and limits, from the next request on. The other settings
    /// stay as they were built.
    pub fn change(&self, config: &Config, access: &access::Config) {
        let terms = Terms::build(config, access, &self.listen, self.connections.most(), &self.project);
        self.terms.store(Arc::new(terms));
        self.resolver.set_long_answers(config.max_long_answers);
    }

    fn limits(&self) -> Limits {
        self.terms.load().limits
    }

    /// Takes this amount of a budget, for the caller whose holdings are `by`; else a problem.
    fn hold(&self, thing: Thing, by: &Holds, amount: u64) -> Result<Held, Problem> {
        let taken = self.budgets.take(thing, by, amount, &self.limits().bounds);
        taken.map_err(|spent| budgets::refused(thing, spent, &self.metrics))
    }

    /// Reserves the length of an answer, reusing what was held for it ahead.
    fn hold_answer(&self, ahead: Option<Held>, by: &Holds, length: u64) -> Result<Held, Problem> {
        let Some(ahead) = ahead else { return self.hold(Thing::Answer, by, length) };
        let resized = ahead.resized(length, self.limits().bounds.answers);
        resized.map_err(|spent| budgets::refused(Thing::Answer, spent, &self.metrics))
    }
}

/// Serves until `shutdown` completes, then lets requests in progress end within the grace time.
pub async fn serve(
    config: &Config,
    listeners: Listeners,
    service: Arc<Service>,
    shutdown: impl Future<Output = ()> + Send,
) {
    let Listeners { tcp, tls, unix } = listeners;
    let (unix, socket_file) = unix.map_or((None, None), |(listener, file)| (Some(listener), file));
    let graceful = GracefulShutdown::new();
    let (stopping, stopped) = watch::channel(());
    let accepting = Accepting::new(&tcp);
    let acceptor = Acceptor { config, service: &service, graceful: &graceful, stopped };
    // They end with this function.
    let mut tasks = JoinSet::new();
    if let Some(tls) = &tls {
        tasks.spawn(Arc::clone(tls).follow());
    }
    tokio::pin!(shutdown);
    loop {
        // One connection waits here for a place, the others in the system's backlog, which is
        // bounded too.
        let accept = async {
            tokio::select! {
                accepted = accepting.accept() => match accepted {
                    Ok((stream, address)) => {
                        // Answers are one small write; waiting for more to send only delays them.
                        let _ = stream.set_nodelay(true);
                        let place = acceptor.place(Peer::Ip(address.ip())).await;
                        match &tls {
                            Some(tls) => acceptor.take_encrypted(stream, tls, place),
                            None => acceptor.take(stream, place),
                        }
                    }
                    Err(error) => acceptor.failed(&error).await,
                },
                accepted = accept_unix(unix.as_ref()) => match accepted {
                    Ok((stream, peer)) => {
                        let place = acceptor.place(peer).await;
                        acceptor.take(stream, place);
                    }
                    Err(error) => acceptor.failed(&error).await,
                },
            }
        };
        tokio::select! {
            () = accept => {}
            () = &mut shutdown => break,
        }
    }
    // Removed while it still listens, so that the file is not another process's yet.
    if let Some(path) = socket_file {
        let _ = std::fs::remove_file(path);
    }
    drop((tcp, unix, stopping));
    service.stopping.send_replace(true);
    let open = graceful.count();
    tracing::info!(open, "draining connections");
    if tokio::time::timeout(service.limits().shutdown_grace, graceful.shutdown()).await.is_err() {
        tracing::warn!("the grace time is over; closing the connections that are left");
    }
}

/// Whether no file can be opened any more, in this process or on this machine.
fn is_out_of_files(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// The pause after a failed accept.
const RETRY_ACCEPT: Duration = Duration::from_millis(100);

struct Acceptor<'a> {
    config: &'a Config,
    service: &'a Arc<Service>,
    graceful: &'a GracefulShutdown,
    stopped: watch::Receiver<()>,
}

impl Acceptor<'_> {
    /// Waits after a failed accept: an immediate retry would only use processor time. Where no file
    /// can be opened any more, an idle connection is closed, and its own is free a moment later.
    async fn failed(&self, error: &std::io::Error) {
        let pause = match is_out_of_files(error) {
            true => {
                tracing::warn!(
                    %error,
                    "no file is left for another connection (ulimit -n); idle connections are closed for it"
                );
                if self.service.connections.make_room() { Connections::LOOK_AGAIN } else { RETRY_ACCEPT }
            }
            false => {
                tracing::warn!(%error, "a connection could not be accepted");
                RETRY_ACCEPT
            }
        };
        tokio::time::sleep(pause).await;
    }

    async fn place(&self, peer: Peer) -> Place {
        self.service.connections.place(self.service.access.caller(peer)).await
    }

    fn take<S>(&self, stream: S, place: Place)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let connection = self.connection(&place);
        tokio::spawn(async move {
            connection.serve(stream).await;
            drop(place);
        });
    }

    /// As [`Self::take`]; the handshake runs in the connection's own task, and has the time limit
    /// of headers.
    fn take_encrypted<S>(&self, stream: S, tls: &Tls, place: Place)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let connection = self.connection(&place);
        let (handshake, mut stopped) = (tls.acceptor().accept(stream), self.stopped.clone());
        let handshake = tokio::time::timeout(self.config.header_timeout, handshake);
        tokio::spawn(async move {
            let shaken = tokio::select! {
                shaken = handshake => shaken,
                _ = stopped.changed() => return,
                () = place.requests.closing() => return,
            };
            match shaken {
                Ok(Ok(stream)) => connection.serve(stream).await,
                Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                Err(_) => tracing::debug!("a TLS handshake did not come to its end in time"),
            }
            drop(place);
        });
    }

    fn connection(&self, place: &Place) -> Connection {
        let (service, requests) = (Arc::clone(self.service), Arc::clone(&place.requests));
        let streams = Streams { service, requests, patience: self.config.idle_timeout };
        let mut builder = auto::Builder::new(streams);
        let max_header = u32::try_from(self.config.max_header).unwrap_or(u32::MAX);
        builder
            .http1()
            .timer(TokioTimer::new())
            // Our own timeout, which does not run while a connection is idle, is in `Watched`.
            .header_read_timeout(None)
            .max_buf_size(max_header as usize);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_header_list_size(max_header)
            .max_concurrent_streams(self.config.max_streams)
            // Limits the bytes that a client may send unread: for one request, and for all.
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(4 * WINDOW)
            .max_send_buf_size(outgoing::PIECE)
            .keep_alive_interval(self.config.idle_timeout)
            .keep_alive_timeout(self.config.header_timeout);
        Connection {
            builder,
            service: Arc::clone(self.service),
            requests: Arc::clone(&place.requests),
            header_timeout: self.config.header_timeout,
            idle_timeout: self.config.idle_timeout,
            watcher: self.graceful.watcher(),
        }
    }
}

/// Bytes of a body that a client may send ahead by HTTP/2.
const WINDOW: u32 = 64 << 10;

/// A connection that is about to be served.
struct Connection {
    builder: auto::Builder<Streams>,
    service: Arc<Service>,
    requests: Arc<connection::Requests>,
    header_timeout: Duration,
    idle_timeout: Duration,
    watcher: Watcher,
}

impl Connection {
    async fn serve<S>(self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Self { builder, service, requests, header_timeout, idle_timeout, watcher } = self;
        let watched = Watched::new(stream, header_timeout, idle_timeout, Arc::clone(&requests));
        let (asked, begun) = (Arc::clone(&service), Arc::clone(&requests));
        let answer = service_fn(move |request: http::Request<_>| match begun.begin(request.version()) {
            Some(in_progress) => handler::answer(&asked, in_progress, request),
            // The connection ends at any moment, and this future with it.
            None => Either::Right(std::future::pending().boxed()),
        });
        let connection = watcher.watch(builder.serve_connection(TokioIo::new(watched), answer).into_owned());
        if let Err(error) = connection.await {
            tracing::debug!(error = &*error, "a connection ended early");
            if let Some(what) = misuse(&requests, &*error) {
                service.audit.misused(requests.caller().peer, None, what);
            }
        }
    }
}

/// The client's misuse of a connection that ended because of it; `None` where there was none.
fn misuse(requests: &connection::Requests, error: &(dyn std::error::Error + 'static)) -> Option<Misuse> {
    if requests.was_unread() {
        return Some(Misuse::UnreadAnswer);
    }
    let causes = std::iter::successors(Some(error), |error| error.source());
    let reasons = causes.filter_map(|error| error.downcast_ref::<h2::Error>()?.reason());
    // h2's reason for a client that resets, or makes us reset, too many streams.
    reasons.into_iter().any(|reason| reason == h2::Reason::ENHANCE_YOUR_CALM).then_some(Misuse::RapidResets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_that_nothing_fits_in_is_refused_by_its_name() {
        for (toml, told) in [
            ("max_streams = 0", "max_streams: at least 1"),
            ("max_in_flight_per_token = 0", "max_in_flight_per_token: at least 1"),
            ("max_strangers = 0", "max_strangers: at least 1"),
            ("max_strangers_per_peer = 0", "max_strangers_per_peer: at least 1"),
            ("max_bodies = \"6MiB\"", "max_bodies: at least 6292480 bytes"),
            ("max_value = \"64MiB\"", "max_answers: at least"),
        ] {
            let faults = toml::from_str::<Config>(toml).unwrap().faults();
            assert!(faults.iter().any(|fault| fault.starts_with(told)), "{toml} gave {faults:?}");
        }
        assert!(Config::default().faults().is_empty());
    }

    #[test]
    fn strangers_have_a_quarter_of_the_connections_at_most() {
        let config: Config = toml::from_str("max_connections = 8").unwrap();
        assert_eq!(config.bounds(config.max_connections).strangers.in_all, 2);
        assert_eq!(Config::default().bounds(4096).strangers.in_all, 256);
    }
}
