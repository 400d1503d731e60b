//! An instance: every part built from its configuration, in the order they need each other.

use std::{sync::Arc, time::Duration};

use tokio::task::JoinHandle;

use crate::{
    access::Access,
    clock::Clock,
    config::Config,
    metrics::Metrics,
    phase::Phase,
    policy::InvalidGlob,
    resolver::Resolver,
    sealing::{KeyError, MasterKeys, SourceOutcome, SourceReport, Sources},
    server::{self, Listeners, Service},
    tiers::{
        database::{Database, MissingKey, StoreError},
        memory::Memory,
        upstream,
    },
};

/// A running instance, but for its listeners.
#[derive(Debug)]
pub struct App {
    service: Arc<Service>,
    config: server::Config,
    watch: JoinHandle<()>,
}

/// Why an instance cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The upstream cannot be set up.
    #[error("the upstream tier cannot be set up")]
    Upstream(#[from] upstream::BuildError),
    /// A rule cannot be read.
    #[error("the rules cannot be read")]
    Rules(#[from] InvalidGlob),
    /// A source of master keys holds something wrong.
    #[error("the master keys cannot be read")]
    Keys(#[from] KeyError),
    /// No source of master keys answered, and without one nothing can be sealed.
    #[error("none of keys.sources gave a master key: {0}")]
    NoKey(String),
    /// The database cannot be used.
    #[error("the database cannot be used")]
    Database(#[from] StoreError),
}

/// How often an instance looks whether tokens or phases have changed, and whether the
/// database answers.
const WATCH_EVERY: Duration = Duration::from_secs(1);

impl App {
    /// Builds an instance: upstream, master keys, database, memory, and who may ask.
    ///
    /// # Errors
    /// What cannot be built, and why.
    pub async fn start(config: &Config, clock: Clock) -> Result<Self, StartError> {
        let metrics = Metrics::new();
        let environment = config.environment.as_str();
        let upstream = upstream::build(config.infisical.as_ref(), environment, &clock, &metrics)?;
        let policies = config.policies()?;
        let sources = Sources::build(config.keys.clone(), upstream.clone());
        let keys = Arc::new(MasterKeys::from_sources(sources));
        load_keys(&keys, policies.uses(Phase::reads_database)).await?;
        let database = Box::pin(Database::open(
            &config.database,
            environment,
            Arc::clone(&keys),
            clock.clone(),
            Arc::clone(&metrics),
        ));
        let database = Arc::new(database.await?);
        database.note_master_keys(&keys.origins()).await?;
        tell_missing(&database.missing_master_keys().await?);
        let memory = Memory::build(&config.memory, clock.clone());
        let deadline = config.infisical.as_ref().map_or(config.database.timeout * 2, |infisical| infisical.timeout);
        let changes = database.changes().await?;
        let access = Access::build(Arc::clone(&database), clock.clone()).await?;
        let resolver =
            Resolver::build(memory, Arc::clone(&database), upstream, policies, deadline, clock, Arc::clone(&metrics));
        resolver.reload_phases().await?;
        let service = Arc::new(Service::build(&config.server, resolver, access, metrics));
        let watch = tokio::spawn(watch(Arc::clone(&service), database, changes));
        Ok(Self { service, config: config.server.clone(), watch })
    }

    /// What the requests are answered from.
    #[must_use]
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Serves until `shutdown` completes and what was in progress has ended.
    pub async fn serve(self, listeners: Listeners, shutdown: impl Future<Output = ()> + Send) {
        server::serve(&self.config, listeners, Arc::clone(&self.service), shutdown).await;
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

async fn load_keys(keys: &MasterKeys, needed: bool) -> Result<(), StartError> {
    let reports = keys.load().await?;
    for SourceReport { source, outcome } in &reports {
        match outcome {
            SourceOutcome::Gave(ids) => {
                let ids = ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
                tracing::info!(%source, keys = ids, "master keys read");
            }
            SourceOutcome::Empty(reason) => tracing::info!(%source, reason, "no master key from this source"),
            SourceOutcome::Unreachable(reason) => {
                tracing::warn!(%source, reason, "this source of master keys does not answer");
            }
        }
    }
    if keys.ring().is_empty() && needed {
        let reasons = reports.iter().map(|SourceReport { source, outcome }| match outcome {
            SourceOutcome::Empty(reason) | SourceOutcome::Unreachable(reason) => format!("{source}: {reason}"),
            SourceOutcome::Gave(_) => source.to_string(),
        });
        return Err(StartError::NoKey(reasons.collect::<Vec<_>>().join("; ")));
    }
    Ok(())
}

/// Says which master keys are needed and not held. What they wrap does not open until they
/// are back; everything else is served.
fn tell_missing(missing: &[MissingKey]) {
    for MissingKey { wraps, known } in missing {
        let (source, at) = match known {
            Some(known) => (known.source.as_str(), known.last_seen_at.to_rfc3339()),
            None => ("never seen by this database", "-".to_owned()),
        };
        tracing::error!(
            key = %wraps.id, tenants = wraps.tenants, last_seen = source, last_seen_at = at,
            "a master key is missing, and what it wraps does not open; put it back into one of keys.sources, behind \
             the key that wraps"
        );
    }
}

/// Looks after what changes outside requests, for as long as the instance lives.
async fn watch(service: Arc<Service>, database: Arc<Database>, mut seen: i64) {
    let mut turns = tokio::time::interval(WATCH_EVERY);
    turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut was_up = true;
    loop {
        turns.tick().await;
        // Histograms gather until they are read; nobody may be reading them.
        service.metrics.upkeep();
        let is_up = database.ping().await.is_ok();
        match (was_up, is_up) {
            (true, false) => tracing::error!("the database does not answer; lookups go on without it"),
            (false, true) => tracing::info!("the database answers again"),
            _ => {}
        }
        was_up = is_up;
        let Ok(now) = database.changes().await else { continue };
        if now == seen {
            continue;
        }
        match (service.access.reload().await, service.resolver.reload_phases().await) {
            (Ok(()), Ok(())) => seen = now,
            (tokens, phases) => {
                let error = tokens.err().or(phases.err()).map(|error| error.to_string());
                tracing::warn!(error, "tokens or phases have changed and could not be read; trying again");
            }
        }
    }
}
