//! The settings of the configured upstream, for any kind of upstream.

use std::{
    error::Error,
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
    time::Duration,
};

use super::{Upstream, directory, infisical};
use crate::{clock::Clock, metrics::Metrics, setting::SettingError, tenant::Tenant, tls::TlsError, withheld::Withheld};

/// The section of the configured upstream.
#[derive(Debug, Clone, Copy)]
pub enum Config<'a> {
    /// `[infisical]`
    Infisical(&'a infisical::Config),
    /// `[directory]`
    Directory(&'a directory::Config),
}

impl<'a> Config<'a> {
    /// The settings, as any upstream has them.
    #[must_use]
    pub fn settings(self) -> &'a dyn Settings {
        match self {
            Self::Infisical(settings) => settings,
            Self::Directory(settings) => settings,
        }
    }
}

/// The settings that any upstream has.
pub trait Settings: Send + Sync {
    /// The faults of these settings, each with its key.
    fn faults(&self) -> Vec<String>;

    /// The longest time that a call takes: a caller without a copy waits as long.
    fn timeout(&self) -> Duration;

    /// How often to ask which folders have changed; zero means never.
    fn poll_interval(&self) -> Duration;

    /// The number of calls that may be made in any minute; `None` where calls are not counted.
    fn requests_per_minute(&self) -> Option<NonZeroU32> {
        None
    }

    /// The number of these calls that a migration may make.
    fn migration_requests_per_minute(&self) -> Option<NonZeroU32> {
        None
    }

    /// The number of folders that are read at once.
    fn max_connections(&self) -> NonZeroU16;

    /// The place where a person finds a tenant's folder.
    fn folder(&self, tenant: &Tenant) -> String;

    /// Builds the upstream, which serves nothing of what is withheld; calls nothing.
    ///
    /// # Errors
    /// The setting that is wrong.
    fn build(
        &self,
        environment: &str,
        withheld: &Withheld,
        clock: &Clock,
        metrics: &Arc<Metrics>,
    ) -> Result<Arc<dyn Upstream>, BuildError>;
}

/// Why the upstream tier cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A setting is wrong.
    #[error("{key} {allowed}")]
    Setting {
        /// The setting's key.
        key: &'static str,
        /// The allowed values.
        allowed: &'static str,
    },
    /// A secret cannot be read from its configured place.
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
    /// The client for it cannot be set up.
    #[error("what the upstream is reached with cannot be set up")]
    Client(#[source] Box<dyn Error + Send + Sync>),
}

impl BuildError {
    /// Makes the error for a secret of this key that cannot be read.
    pub(super) fn secret(key: &'static str) -> impl FnOnce(SettingError) -> Self {
        move |source| Self::Secret { key, source }
    }
}
