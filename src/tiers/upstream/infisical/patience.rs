//! The time limits of calls, with the HTTP client that is built for them and for the way there.

use std::time::Duration;

use super::{BuildError, Config};
use crate::secret::SecretValue;

/// The time limits of calls, and the HTTP client that keeps to them.
pub(super) struct Patience {
    pub(super) timeout: Duration,
    pub(super) read: Duration,
    pub(super) longest: Duration,
    pub(super) http: reqwest::Client,
    proxy: Option<SecretValue>,
}

impl Patience {
    pub(super) fn build(site_url: &str, connections: usize, config: &Config) -> Result<Self, BuildError> {
        let timeout = config.timeout;
        let proxy = config.proxy()?;
        let http = reqwest::Client::builder()
            // A redirect would send our token elsewhere.
            .redirect(reqwest::redirect::Policy::none())
            // Only the configuration decides the way there: a variable that was set for other
            // programs does not.
            .no_proxy()
            .referer(false)
            // Retries are ours, because each one costs budget.
            .retry(reqwest::retry::never())
            .tls_backend_preconfigured(crate::tls::client_config(site_url, config.ca_file.as_deref())?)
            .tcp_nodelay(true)
            .connect_timeout(timeout.mul_f64(0.75))
            .pool_max_idle_per_host(connections)
            // Below the 72 s after which Infisical's own server (Fastify) closes them.
            .pool_idle_timeout(Duration::from_secs(60));
        let http = match &proxy {
            Some(address) => http.proxy(reqwest::Proxy::https(address.expose()).map_err(unusable)?),
            None => http,
        };
        let http = http.build().map_err(unusable)?;
        // Over a single connection every other call would wait for it.
        let longest = if connections > 1 { timeout.saturating_mul(10) } else { timeout };
        let read = config.read_timeout.max(timeout);
        Ok(Self { timeout, read, longest: longest.max(read), http, proxy })
    }

    /// Whether it was built for these settings, so far as they can change while calls are made.
    pub(super) fn is_of(&self, config: &Config) -> Result<bool, BuildError> {
        let is_same_way = match (&self.proxy, &config.proxy()?) {
            (Some(ours), Some(other)) => ours.same_as(other),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        let times = (config.timeout, config.read_timeout.max(config.timeout));
        Ok(is_same_way && (self.timeout, self.read) == times)
    }

    /// Whether connections are made through a proxy.
    pub(super) fn has_proxy(&self) -> bool {
        self.proxy.is_some()
    }
}

/// An address that was parsed before, and settings of ours: the error names no secret.
fn unusable(error: reqwest::Error) -> BuildError {
    BuildError::Client(error.without_url().into())
}
