//! Applies a changed configuration to a running instance: all of it that can be changed then, or
//! nothing.

use std::{collections::BTreeSet, fmt, sync::Arc};

use arc_swap::ArcSwap;
use tokio::sync::Mutex;

use crate::{
    config::Config, jobs, phase::Phase, policy::InvalidGlob, rotation::Rules, server::Service, tiers::upstream,
};

/// Applies changed settings to a running instance.
///
/// One at a time. Steps that can fail are done first and change nothing; the later ones cannot
/// fail. Requests go on meanwhile: each meets every part as it was before or as it is after, and
/// settings that must not be mixed are in one part. One part is phases and ages, with the entries
/// in memory that they govern ([`Resolver::set_policies`]); another is a request's hosts, proxies
/// and limits.
///
/// [`Resolver::set_policies`]: crate::resolver::Resolver::set_policies
pub struct Reload {
    service: Arc<Service>,
    job_settings: Arc<ArcSwap<jobs::Settings>>,
    /// The configuration in force: that of the start, with the changes since.
    running: Mutex<Config>,
}

/// The result of applying a configuration. Settings are told by name, never by value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Settings that are in force now and were not before.
    pub applied: BTreeSet<String>,
    /// Settings that differ from those in force and wait for a restart.
    pub waiting: BTreeSet<String>,
}

/// Why nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The changeable settings contradict those that wait for a restart.
    #[error("beside what waits for a restart: {}", .0.join("; "))]
    Faults(Vec<String>),
    /// A rule cannot be read.
    #[error("the rules cannot be read")]
    Rules(#[from] InvalidGlob),
    /// The upstream cannot be set up in this way.
    #[error("the upstream tier cannot be set up")]
    Upstream(#[from] upstream::BuildError),
    /// Without a master key, nothing can be sealed.
    #[error("phase: none of keys.sources has given a master key, which the database needs; \"infisical\" needs none")]
    NoKey,
}

impl Reload {
    pub(super) fn new(service: Arc<Service>, job_settings: Arc<ArcSwap<jobs::Settings>>, running: Config) -> Self {
        Self { service, job_settings, running: Mutex::new(running) }
    }

    /// Applies the changeable settings of `wanted`, which was checked as at a start. To
    /// be awaited to the end: if the future is dropped half way, the change stays half done.
    ///
    /// # Errors
    /// Nothing has changed.
    pub async fn apply(&self, wanted: &Config) -> Result<Changes, ReloadError> {
        let Service { resolver, access, audit, .. } = &*self.service;
        let mut running = self.running.lock().await;
        let config = running.with_live_settings(wanted);
        config.check().map_err(ReloadError::Faults)?;
        let policies = config.policies()?;
        let rotation_rules = Rules::build(&config.rotation)?;
        if policies.uses(Phase::reads_database) && resolver.database().keys().ring().is_empty() {
            return Err(ReloadError::NoKey);
        }
        let upstream = resolver.upstream().zip(config.upstream());
        let reconfigured = upstream.map(|(upstream, settings)| upstream.reconfigure(settings)).transpose()?;
        let mut changes = Changes { applied: running.differences(&config), waiting: config.differences(wanted) };

        // From here on nothing fails.
        if let Some(reconfigured) = reconfigured {
            if reconfigured.has_new_login() && !changes.applied.contains("infisical.client_id") {
                // The secret's place may be the same, with another content.
                changes.applied.insert("infisical.client_secret".to_owned());
            }
            reconfigured.apply();
        }
        if let Some(upstream) = config.upstream() {
            resolver.set_deadline(upstream.settings().timeout());
        }
        access.change(&config.access).await;
        self.service.change(&config.server, &config.access);
        audit.change(&config.audit);
        self.service.rotations.set_rules(rotation_rules);
        self.job_settings.store(Arc::new(jobs::Settings::of(&config)));
        let (service, capacity) = (Arc::clone(&self.service), config.memory.capacity);
        let in_memory = tokio::task::spawn_blocking(move || {
            service.resolver.memory().set_capacity(capacity);
            service.resolver.set_policies(policies);
        });
        // It fails only where the process ends.
        let _ = in_memory.await;
        *running = config;
        Ok(changes)
    }
}

impl fmt::Debug for Reload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reload")
    }
}
