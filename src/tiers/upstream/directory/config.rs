//! The settings of `[directory]`.

use std::{num::NonZeroU16, path::PathBuf, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::Directory;
use crate::{
    clock::Clock,
    metrics::Metrics,
    tenant::Tenant,
    tiers::upstream::{BuildError, Settings, Upstream},
    withheld::Withheld,
};

/// The files that contain the secrets, and whether they are written.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The directory that holds a folder for each tenant.
    pub path: PathBuf,
    /// Whether secrets are written there too.
    #[serde(default)]
    pub writable: bool,
    /// The longest time that a read or a write takes.
    #[serde(default = "defaults::timeout", with = "crate::units::duration")]
    pub timeout: Duration,
    /// How often to check which folders have changed; zero means never.
    #[serde(default = "defaults::poll_interval", with = "crate::units::duration")]
    pub poll_interval: Duration,
}

impl Config {
    /// The number of folders that are read at once.
    pub(super) const AT_ONCE: NonZeroU16 = NonZeroU16::new(8).unwrap();
}

impl Settings for Config {
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if !self.path.is_absolute() {
            faults.push("directory.path must be an absolute path, as in /etc/secrets".to_owned());
        }
        if !(Duration::from_millis(10)..=Duration::from_secs(60)).contains(&self.timeout) {
            faults.push("directory.timeout must be from \"10ms\" to \"1m\"".to_owned());
        }
        let often = Duration::from_secs(1)..=Duration::from_secs(60 * 60);
        if !self.poll_interval.is_zero() && !often.contains(&self.poll_interval) {
            faults.push("directory.poll_interval must be from \"1s\" to \"1h\", or \"0s\" for never".to_owned());
        }
        faults
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn poll_interval(&self) -> Duration {
        self.poll_interval
    }

    fn max_connections(&self) -> NonZeroU16 {
        Self::AT_ONCE
    }

    fn folder(&self, tenant: &Tenant) -> String {
        // A shared folder has none here: its name would lead elsewhere.
        self.path.join(tenant.as_str().trim_start_matches('/')).display().to_string()
    }

    fn build(&self, _: &str, _: &Withheld, _: &Clock, _: &Arc<Metrics>) -> Result<Arc<dyn Upstream>, BuildError> {
        Ok(Arc::new(Directory::new(self)))
    }
}

mod defaults {
    use super::*;

    pub(super) fn timeout() -> Duration {
        Duration::from_secs(2)
    }

    pub(super) fn poll_interval() -> Duration {
        Duration::from_secs(5)
    }
}
