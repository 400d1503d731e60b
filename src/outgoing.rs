//! Calls to servers that are neither upstream nor the database, and that the configuration names: a
//! rotator, for one.
//!
//! A call goes to the origins that were allowed and nowhere else, over TLS or to this machine, through
//! the configured proxy, and follows no redirect. It ends in time, its answer has a bounded length, and
//! all calls together keep to a budget. A server that fails again and again is left alone for a while.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter, clock::Clock as _};
use http::{HeaderName, HeaderValue, StatusCode};
use reqwest::Url;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    clock::Clock,
    log,
    metrics::Metrics,
    setting::{SecretSetting, SettingError},
    tiers::breaker::Breaker,
    tls::{self, TlsError},
    units,
};

/// `[outgoing]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Calls that may be made in a minute, to all servers together.
    pub requests_per_minute: NonZeroU32,
    /// How long a call may take.
    #[serde(with = "units::duration")]
    pub timeout: Duration,
    /// The longest answer that is read, in bytes.
    #[serde(with = "units::size")]
    pub max_response: u64,
    /// An HTTP proxy through which connections to other machines are tunnelled (CONNECT), as in
    /// `http://user:password@proxy:3128`. The environment's proxies are not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<SecretSetting>,
    /// Authorities that are trusted beside the system's, as a PEM file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            requests_per_minute: const { NonZeroU32::new(120).unwrap() },
            timeout: Duration::from_secs(30),
            max_response: 2 << 20,
            proxy: None,
            ca_file: None,
        }
    }
}

impl Config {
    /// The faults of these settings, each beginning with the setting below `outgoing`.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.timeout.is_zero() || self.timeout > Duration::from_secs(5 * 60) {
            faults.push("timeout: longer than nothing, and at most \"5m\"".to_owned());
        }
        if !(1 << 10..=16 << 20).contains(&self.max_response) {
            faults.push("max_response: from \"1KiB\" to \"16MiB\"".to_owned());
        }
        faults.extend(self.client().err().map(|error| log::chain(&error)));
        faults
    }

    fn client(&self) -> Result<reqwest::Client, BuildError> {
        // Every destination is https or this machine; the roots are wanted in either case.
        let tls = tls::client_config("https:", self.ca_file.as_deref())?;
        let builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .user_agent(concat!("secretier/", env!("CARGO_PKG_VERSION")))
            .timeout(self.timeout);
        let builder = match &self.proxy {
            None => builder,
            Some(setting) => {
                let address = setting.resolve()?;
                // Without the library's error, which may repeat the password.
                builder.proxy(reqwest::Proxy::https(address.expose()).map_err(|_| BuildError::Proxy)?)
            }
        };
        builder.build().map_err(|_| BuildError::Client)
    }
}

/// Why no client for these calls can be set up.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// TLS cannot be set up.
    #[error("ca_file")]
    Tls(#[from] TlsError),
    /// The proxy's setting cannot be read.
    #[error("proxy")]
    Setting(#[from] SettingError),
    /// The proxy's address is none.
    #[error("proxy: must be the address of an HTTP proxy, as in http://proxy:3128")]
    Proxy,
    /// The library refuses its settings.
    #[error("the client cannot be set up")]
    Client,
}

/// A server's address that calls may go to: https, or this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination(Url);

/// An address that no call goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be an address without user and fragment that begins with https:, or that leads to this machine, as in https://rotator.internal/stripe"
)]
pub struct InvalidDestination;

impl std::str::FromStr for Destination {
    type Err = InvalidDestination;

    fn from_str(text: &str) -> Result<Self, InvalidDestination> {
        let url = Url::parse(text).map_err(|_| InvalidDestination)?;
        let is_plain = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
        let is_safe = url.scheme() == "https" || (url.scheme() == "http" && tls::is_loopback(&url));
        if is_plain && is_safe && url.has_host() { Ok(Self(url)) } else { Err(InvalidDestination) }
    }
}

impl Destination {
    /// Scheme, host and port.
    #[must_use]
    pub fn origin(&self) -> String {
        self.0.origin().ascii_serialization()
    }
}

/// A server's answer.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Zeroizing<Vec<u8>>,
}

/// Why there is no answer. It contains neither what was sent nor what came back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutgoingError {
    /// The configuration allows no calls to this server any more.
    #[error("the configuration names {0} no longer")]
    NotAllowed(String),
    /// The budget is spent.
    #[error("outgoing.requests_per_minute is spent")]
    OutOfBudget {
        /// When there is room again.
        retry_after: Duration,
    },
    /// The server has failed repeatedly.
    #[error("{origin} has failed repeatedly and is left alone for a while")]
    Down {
        /// The server.
        origin: String,
        /// Until when.
        retry_after: Duration,
    },
    /// It did not answer in time. Whether it has done what was asked is not known.
    #[error("{0} did not answer in time")]
    TimedOut(String),
    /// It could not be reached, or broke off.
    #[error("{origin} cannot be reached: {reason}")]
    Unreachable {
        /// The server.
        origin: String,
        /// Why, as the network tells it.
        reason: String,
    },
    /// Its answer is too long.
    #[error("{0} answered with more than outgoing.max_response")]
    TooLong(String),
}

/// Makes the calls.
pub struct Outgoing {
    client: reqwest::Client,
    max_response: u64,
    budget: DefaultDirectRateLimiter,
    allowed: ArcSwap<BTreeSet<String>>,
    /// By origin. There are as many as were ever allowed.
    breakers: Mutex<BTreeMap<String, Arc<Breaker>>>,
    clock: Clock,
    metrics: Arc<Metrics>,
}

const BREAKER_THRESHOLD: u32 = 5;
const SHORTEST_BREAK: Duration = Duration::from_secs(5);
const LONGEST_BREAK: Duration = Duration::from_secs(5 * 60);

impl Outgoing {
    /// A client that may call nobody yet.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn build(config: &Config, clock: Clock, metrics: Arc<Metrics>) -> Result<Self, BuildError> {
        Ok(Self {
            client: config.client()?,
            max_response: config.max_response,
            budget: RateLimiter::direct(Quota::per_minute(config.requests_per_minute)),
            allowed: ArcSwap::default(),
            breakers: Mutex::default(),
            clock,
            metrics,
        })
    }

    /// Allows calls to these servers, and to no others.
    pub fn allow(&self, destinations: impl Iterator<Item = Destination>) {
        self.allowed.store(Arc::new(destinations.map(|destination| destination.origin()).collect()));
    }

    /// Sends a body of JSON, and reads the answer, whatever its status.
    ///
    /// # Errors
    /// [`OutgoingError`].
    pub async fn post(
        &self,
        to: &Destination,
        headers: Vec<(HeaderName, HeaderValue)>,
        body: Bytes,
    ) -> Result<Reply, OutgoingError> {
        let origin = to.origin();
        let outcome = self.try_post(to, &origin, headers, body).await;
        let word = match &outcome {
            Ok(_) => "answered",
            Err(OutgoingError::NotAllowed(_)) => "not_allowed",
            Err(OutgoingError::OutOfBudget { .. }) => "no_budget",
            Err(OutgoingError::Down { .. }) => "left_alone",
            Err(OutgoingError::TimedOut(_)) => "timed_out",
            Err(OutgoingError::Unreachable { .. } | OutgoingError::TooLong(_)) => "failed",
        };
        self.metrics.count("secretier_outgoing_calls_total", &[("outcome", word)]);
        outcome
    }

    async fn try_post(
        &self,
        to: &Destination,
        origin: &str,
        headers: Vec<(HeaderName, HeaderValue)>,
        body: Bytes,
    ) -> Result<Reply, OutgoingError> {
        if !self.allowed.load().contains(origin) {
            return Err(OutgoingError::NotAllowed(origin.to_owned()));
        }
        let breaker = self.breaker(origin);
        let permit = breaker
            .admit()
            .map_err(|open| OutgoingError::Down { origin: origin.to_owned(), retry_after: open.retry_after })?;
        self.budget.check().map_err(|spent| OutgoingError::OutOfBudget {
            retry_after: spent.wait_time_from(governor::clock::DefaultClock::default().now()),
        })?;
        let request = headers
            .into_iter()
            .fold(self.client.post(to.0.clone()), |request, (name, value)| request.header(name, value));
        let request = request.header(http::header::CONTENT_TYPE, "application/json").body(body);
        let reply = match request.send().await {
            Ok(answer) => self.read(origin, answer).await,
            Err(error) => Err(failed(origin, error)),
        };
        match &reply {
            Ok(reply) if reply.status.is_server_error() => permit.failed(),
            Ok(_) => permit.succeeded(),
            Err(_) => permit.failed(),
        }
        reply
    }

    async fn read(&self, origin: &str, mut answer: reqwest::Response) -> Result<Reply, OutgoingError> {
        let status = answer.status();
        let mut body = Zeroizing::new(Vec::new());
        while let Some(chunk) = answer.chunk().await.map_err(|error| failed(origin, error))? {
            if (body.len() + chunk.len()) as u64 > self.max_response {
                return Err(OutgoingError::TooLong(origin.to_owned()));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Reply { status, body })
    }

    fn breaker(&self, origin: &str) -> Arc<Breaker> {
        let mut breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Breaker::new(self.clock.clone(), BREAKER_THRESHOLD, SHORTEST_BREAK, LONGEST_BREAK));
        Arc::clone(breakers.entry(origin.to_owned()).or_insert_with(new))
    }
}

fn failed(origin: &str, error: reqwest::Error) -> OutgoingError {
    let origin = origin.to_owned();
    if error.is_timeout() {
        return OutgoingError::TimedOut(origin);
    }
    OutgoingError::Unreachable { origin, reason: log::chain(&error.without_url()) }
}

impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outgoing").field("allowed", &self.allowed.load()).finish_non_exhaustive()
    }
}
