//! The settings of the upstream that is configured, whichever it is.

use std::{
    error::Error,
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
    time::Duration,
};

use super::{Upstream, directory, infisical};
use crate::{clock::Clock, metrics::Metrics, setting::SettingError, tenant::Tenant, tls::TlsError};

/// The section of the upstream that is configured.
#[derive(Debug, Clone, Copy)]
pub enum Config<'a> {
    /// `[infisical]`
    Infisical(&'a infisical::Config),
    /// `[directory]`
    Directory(&'a directory::Config),
}

impl<'a> Config<'a> {
    /// What is asked of the settings of any upstream.
    #[must_use]
    pub fn settings(self) -> &'a dyn Settings {
        match self {
            Self::Infisical(settings) => settings,
            Self::Directory(settings) => settings,
        }
    }
}

/// What is asked of the settings of any upstream.
pub trait Settings: Send + Sync {
    /// What is wrong with them, each fault with its key.
    fn faults(&self) -> Vec<String>;

    /// How long a call takes at most: a caller without a copy waits as long.
    fn timeout(&self) -> Duration;

    /// How often is asked which folders have changed; zero asks never.
    fn poll_interval(&self) -> Duration;

    /// Calls that may be made in any minute; none where nobody counts them.
    fn requests_per_minute(&self) -> Option<NonZeroU32> {
        None
    }

    /// How many of them a migration may make.
    fn migration_requests_per_minute(&self) -> Option<NonZeroU32> {
        None
    }

    /// Folders that are read at once.
    fn max_connections(&self) -> NonZeroU16;

    /// Where a person finds a tenant's folder.
    fn folder(&self, tenant: &Tenant) -> String;

    /// The upstream; calls nothing.
    ///
    /// # Errors
    /// The setting that is wrong.
    fn build(&self, environment: &str, clock: &Clock, metrics: &Arc<Metrics>) -> Result<Arc<dyn Upstream>, BuildError>;
}

/// Why the upstream tier cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A setting is wrong.
    #[error("{key} {allowed}")]
    Setting {
        /// The setting's key.
        key: &'static str,
        /// What it may be.
        allowed: &'static str,
    },
    /// A secret cannot be read from where it is said to stand.
    #[error("{key} cannot be read")]
    Secret {
        /// The setting's key.
        key: &'static str,
        /// Why.
        source: SettingError,
    },
    /// TLS cannot be set up.
    #[error("the upstream is reached by https, and TLS cannot be set up")]
    Tls(#[from] TlsError),
    /// What it is reached with cannot be set up.
    #[error("what the upstream is reached with cannot be set up")]
    Client(#[source] Box<dyn Error + Send + Sync>),
}

impl BuildError {
    /// For a secret of this key that cannot be read.
    pub(super) fn secret(key: &'static str) -> impl FnOnce(SettingError) -> Self {
        move |source| Self::Secret { key, source }
    }
}
