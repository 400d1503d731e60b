//! The settings of `[infisical]`.

use std::{
    num::{NonZeroU16, NonZeroU32},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{BuildError, Infisical, budget, is_folder, is_within};
use crate::{
    clock::Clock,
    log,
    metrics::Metrics,
    secret::SecretValue,
    setting::SecretSetting,
    tenant::Tenant,
    tiers::upstream::{Settings, Upstream},
    withheld::Withheld,
};

/// The address of Infisical, our identity there, and the limits of our use.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The site's address, for example `https://app.infisical.com`; a path before `/api` is kept.
    pub site_url: String,
    /// Whether it may be reached by plain HTTP over a network.
    #[serde(default)]
    pub allow_http: bool,
    /// Authorities that may sign its certificate beside those that the system trusts: certificates
    /// in PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// An HTTP proxy through which all connections to it are tunnelled (CONNECT), as in
    /// `http://user:password@proxy:3128`. The environment's proxies are not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<SecretSetting>,
    /// The project's id.
    pub project_id: String,
    /// The machine identity's client id (universal auth).
    pub client_id: String,
    /// Its client secret.
    pub client_secret: SecretSetting,
    /// The folder that contains a folder for each tenant.
    #[serde(default = "defaults::tenants_path")]
    pub tenants_path: String,
    /// Requests in any minute, of every kind.
    #[serde(default = "defaults::requests_per_minute")]
    pub requests_per_minute: NonZeroU32,
    /// The number of these that a migration may make; half of them where this is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration_requests_per_minute: Option<NonZeroU32>,
    /// The time after which an unanswered call ends, including login and repetition.
    #[serde(default = "defaults::timeout", with = "crate::units::duration")]
    pub timeout: Duration,
    /// The time after which an unanswered read of a folder ends; never before `timeout`. No caller
    /// waits for it longer than `timeout`, and its result is kept.
    #[serde(default = "defaults::read_timeout", with = "crate::units::duration")]
    pub read_timeout: Duration,
    /// Folders outside the tenants' folders that values may refer to, as in `${prod.shared.NAME}`.
    #[serde(default)]
    pub references: Vec<String>,
    /// Folders outside the tenants' folders that are served by themselves, to tokens of their own scope.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub folders: Vec<SharedFolder>,
    /// The number of concurrent requests.
    #[serde(default = "defaults::max_connections")]
    pub max_connections: NonZeroU16,
    /// How often to ask which folders have changed; zero asks only after a webhook.
    #[serde(default = "defaults::poll_interval", with = "crate::units::duration")]
    pub poll_interval: Duration,
    /// The secret that Infisical signs its webhooks with; without it no webhook is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub webhook_secret: Option<SecretSetting>,
    /// The longest answer that is read, in bytes.
    #[serde(default = "defaults::max_response", with = "crate::units::size")]
    pub max_response: u64,
}

/// One `[[infisical.folders]]` table: a folder of the application's own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SharedFolder {
    /// Its name in `/v1/folders/{name}` and `--folders`.
    pub name: String,
    /// Where it is, as in `/hono-api`.
    pub path: String,
}

impl SharedFolder {
    /// The folder in place of a tenant; `None` where it has no valid name.
    #[must_use]
    pub fn tenant(&self) -> Option<Tenant> {
        format!("/{}", self.name).parse().ok()
    }
}

/// The most shared folders: each is compared by a call of its own at every poll.
const MOST_FOLDERS: usize = 20;

impl Config {
    /// Checks rules that the types cannot express.
    ///
    /// # Errors
    /// [`BuildError::Setting`], with the key and the allowed values.
    pub fn check(&self) -> Result<(), BuildError> {
        let wrong = |key, allowed| Err(BuildError::Setting { key, allowed });
        let site = reqwest::Url::parse(&self.site_url).ok();
        if !site.as_ref().is_some_and(|site| {
            matches!(site.scheme(), "http" | "https")
                && site.has_host()
                && site.username().is_empty()
                && site.password().is_none()
                && site.query().is_none()
                && site.fragment().is_none()
        }) {
            return wrong(
                "infisical.site_url",
                "must be an http or https address without user, query or fragment, as in https://app.infisical.com",
            );
        }
        if !self.allow_http && site.is_some_and(|site| site.scheme() == "http" && !crate::tls::is_loopback(&site)) {
            return wrong(
                "infisical.site_url",
                "is plain http to another machine, so the client secret and every value could be read on the way: write https://, or set infisical.allow_http = true where that way is trusted",
            );
        }
        if self.proxy.is_some() && !self.site_url.starts_with("https:") {
            return wrong(
                "infisical.proxy",
                "is for an infisical.site_url that begins with https:, for a proxy would read plain http",
            );
        }
        if !is_folder(&self.tenants_path) {
            return wrong(
                "infisical.tenants_path",
                "must be a folder as in /tenants: it begins with '/', does not end with one, and its parts are letters, digits, '-' and '_'",
            );
        }
        if self.project_id.trim().is_empty() {
            return wrong("infisical.project_id", "must not be empty");
        }
        if self.client_id.trim().is_empty() {
            return wrong("infisical.client_id", "must not be empty");
        }
        if self.migration_requests_per_minute() > self.requests_per_minute {
            return wrong("infisical.migration_requests_per_minute", "must not be above infisical.requests_per_minute");
        }
        if !(Duration::from_millis(10)..=Duration::from_secs(60)).contains(&self.timeout) {
            return wrong("infisical.timeout", "must be from \"10ms\" to \"1m\"");
        }
        if self.read_timeout > Duration::from_secs(10 * 60) {
            return wrong("infisical.read_timeout", "must be at most \"10m\"");
        }
        if self.references.iter().any(|folder| !is_folder(folder)) {
            return wrong(
                "infisical.references",
                "must list folders as in [\"/shared\"], each with letters, digits, '-' and '_' between its slashes",
            );
        }
        if self.references.iter().any(|folder| is_within(folder, &self.tenants_path)) {
            return wrong(
                "infisical.references",
                "must not list infisical.tenants_path or a folder in it: a tenant's values must not come to another",
            );
        }
        self.check_folders()?;
        let often = Duration::from_secs(1)..=Duration::from_secs(60 * 60);
        if !self.poll_interval.is_zero() && !often.contains(&self.poll_interval) {
            return wrong("infisical.poll_interval", "must be from \"1s\" to \"1h\", or \"0s\" for never");
        }
        if self.max_response < 1 << 10 {
            return wrong("infisical.max_response", "must be at least \"1KiB\"");
        }
        Ok(())
    }

    fn check_folders(&self) -> Result<(), BuildError> {
        let wrong = |key, allowed| Err(BuildError::Setting { key, allowed });
        if self.folders.len() > MOST_FOLDERS {
            return wrong("infisical.folders", "must be at most 20 folders");
        }
        for (at, folder) in self.folders.iter().enumerate() {
            if folder.tenant().is_none() {
                return wrong(
                    "infisical.folders.name",
                    "must be 1 to 63 lower-case letters, digits, '-' or '_', beginning with a letter or digit, as in \"hono-api\"",
                );
            }
            if folder.path == "/" || !is_folder(&folder.path) {
                return wrong(
                    "infisical.folders.path",
                    "must be a folder as in \"/hono-api\": it begins with '/', does not end with one, and its parts are letters, digits, '-' and '_'",
                );
            }
            if is_within(&folder.path, &self.tenants_path) || is_within(&self.tenants_path, &folder.path) {
                return wrong(
                    "infisical.folders.path",
                    "must not be infisical.tenants_path, nor a folder in it or above it",
                );
            }
            let before = &self.folders[..at];
            if before.iter().any(|other| other.name == folder.name || other.path == folder.path) {
                return wrong("infisical.folders", "must have each name and each path once");
            }
        }
        Ok(())
    }

    /// The proxy's address, with user and password.
    pub(super) fn proxy(&self) -> Result<Option<SecretValue>, BuildError> {
        const WRONG: BuildError = BuildError::Setting {
            key: "infisical.proxy",
            allowed: "must be the address of an HTTP proxy, as in http://proxy:3128 or http://user:password@proxy:3128 with special characters of user and password percent-encoded",
        };
        let Some(setting) = &self.proxy else { return Ok(None) };
        let address = setting.resolve().map_err(BuildError::secret("infisical.proxy"))?;
        let url = reqwest::Url::parse(address.expose()).map_err(|_| WRONG)?;
        let is_bare = matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none();
        if url.scheme() == "http" && url.has_host() && is_bare { Ok(Some(address)) } else { Err(WRONG) }
    }

    /// The requests that a migration may make in any minute.
    #[must_use]
    pub fn migration_requests_per_minute(&self) -> NonZeroU32 {
        self.migration_requests_per_minute.unwrap_or(budget::half(self.requests_per_minute))
    }
}

impl Settings for Config {
    fn faults(&self) -> Vec<String> {
        let mut faults: Vec<String> = self.check().err().map(|error| error.to_string()).into_iter().collect();
        let secrets = [
            ("infisical.client_secret", Some(&self.client_secret)),
            ("infisical.webhook_secret", self.webhook_secret.as_ref()),
        ];
        for (key, secret) in secrets {
            let fault = secret.and_then(|secret| secret.resolve().err());
            faults.extend(fault.map(|error| format!("{key}: {error}")));
        }
        faults.extend(self.proxy().err().map(|error| log::chain(&error)));
        faults
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn poll_interval(&self) -> Duration {
        self.poll_interval
    }

    fn requests_per_minute(&self) -> Option<NonZeroU32> {
        Some(self.requests_per_minute)
    }

    fn migration_requests_per_minute(&self) -> Option<NonZeroU32> {
        Some(self.migration_requests_per_minute())
    }

    fn max_connections(&self) -> NonZeroU16 {
        self.max_connections
    }

    fn folder(&self, tenant: &Tenant) -> String {
        let of_tenant = || format!("{}/{tenant}", self.tenants_path.trim_end_matches('/'));
        let shared = self.folders.iter().find(|folder| Some(folder.name.as_str()) == tenant.shared_folder());
        format!("{} in Infisical", shared.map_or_else(of_tenant, |folder| folder.path.clone()))
    }

    fn build(
        &self,
        environment: &str,
        withheld: &Withheld,
        clock: &Clock,
        metrics: &Arc<Metrics>,
    ) -> Result<Arc<dyn Upstream>, BuildError> {
        let secret = self.client_secret.resolve().map_err(BuildError::secret("infisical.client_secret"))?;
        let (environment, clock) = (environment.to_owned(), clock.clone());
        Ok(Arc::new(Infisical::build(self.clone(), environment, withheld, secret, clock, Arc::clone(metrics))?))
    }
}

mod defaults {
    use super::*;

    pub(super) fn tenants_path() -> String {
        "/tenants".to_owned()
    }

    pub(super) fn requests_per_minute() -> NonZeroU32 {
        const { NonZeroU32::new(100).unwrap() }
    }

    pub(super) fn timeout() -> Duration {
        Duration::from_secs(2)
    }

    pub(super) fn read_timeout() -> Duration {
        Duration::from_secs(15)
    }

    pub(super) fn poll_interval() -> Duration {
        Duration::from_secs(60)
    }

    pub(super) fn max_connections() -> NonZeroU16 {
        const { NonZeroU16::new(16).unwrap() }
    }

    pub(super) fn max_response() -> u64 {
        64 << 20
    }
}
