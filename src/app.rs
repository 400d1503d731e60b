//! An instance: every part built from its configuration, in the order they need each other.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    access::Access,
    clock::{Clock, Timestamp},
    config::Config,
    metrics::Metrics,
    phase::Phase,
    policy::InvalidGlob,
    resolver::Resolver,
    sealing::{KeyError, MasterKeyId, MasterKeys, SourceOutcome, SourceReport, Sources},
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
    stop: Option<oneshot::Sender<()>>,
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

/// How often an instance looks whether tokens or tenants have changed, and whether the
/// database answers.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// How often an instance says that it runs, where it has nothing new to say.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(5);

/// How long an instance that ends tries to say so.
const FAREWELL: Duration = Duration::from_secs(2);

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
        // Asked for before anything is read that changes: see `watch`.
        let changes = database.changes().await?;
        let access = Access::build(Arc::clone(&database), clock.clone()).await?;
        let presence = Presence::new(Arc::clone(&database), clock.clone());
        let resolver =
            Resolver::build(memory, Arc::clone(&database), upstream, policies, deadline, clock, Arc::clone(&metrics));
        resolver.follow().await?;
        let service = Arc::new(Service::build(&config.server, resolver, access, metrics));
        let (stop, stopped) = oneshot::channel();
        let watch = Watch { service: Arc::clone(&service), database, followed: changes, presence };
        let watch = tokio::spawn(Box::pin(watch.begin()).await.until(stopped));
        Ok(Self { service, config: config.server.clone(), watch, stop: Some(stop) })
    }

    /// What the requests are answered from.
    #[must_use]
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Serves until `shutdown` completes and what was in progress has ended.
    pub async fn serve(mut self, listeners: Listeners, shutdown: impl Future<Output = ()> + Send) {
        server::serve(&self.config, listeners, Arc::clone(&self.service), shutdown).await;
        drop(self.stop.take());
        if tokio::time::timeout(FAREWELL, &mut self.watch).await.is_err() {
            tracing::debug!("there was no time to withdraw from the register of instances");
        }
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
///
/// Who waits until an instance has brought a change into force reads it from its
/// announcement, which is honest because of an order:
/// - The counter of changes is asked for *before* tokens and tenants are read: what is read
///   then is from that change or later. One that lands in between is not claimed, and is
///   found at the next turn.
/// - It is announced *after* all of it was read and is in force; if one part fails, the
///   counter of before stays, and the next turn tries again.
/// - The first announcement comes before the first request is answered: whoever has made a
///   change finds the instance in the register, or it has read nothing from before.
struct Watch {
    service: Arc<Service>,
    database: Arc<Database>,
    /// The counter of changes as of what is in force.
    followed: i64,
    presence: Presence,
}

impl Watch {
    async fn begin(mut self) -> Self {
        self.presence.announce(self.followed).await;
        self
    }

    /// Goes on until the other side of `stopped` is gone; then withdraws.
    async fn until(mut self, mut stopped: oneshot::Receiver<()>) {
        let mut turns = tokio::time::interval(WATCH_EVERY);
        turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut was_up = true;
        loop {
            tokio::select! {
                _ = turns.tick() => {}
                _ = &mut stopped => break,
            }
            // Histograms gather until they are read; nobody may be reading them.
            self.service.metrics.upkeep();
            let is_up = self.database.ping().await.is_ok();
            match (was_up, is_up) {
                (true, false) => tracing::error!("the database does not answer; lookups go on without it"),
                (false, true) => tracing::info!("the database answers again"),
                _ => {}
            }
            was_up = is_up;
            self.follow().await;
            self.presence.announce(self.followed).await;
        }
        self.presence.withdraw().await;
    }

    /// Brings into force what has changed since the last look.
    async fn follow(&mut self) {
        let Ok(now) = self.database.changes().await else { return };
        if now == self.followed {
            return;
        }
        match (self.service.access.reload().await, self.service.resolver.follow().await) {
            (Ok(()), Ok(())) => self.followed = now,
            (tokens, tenants) => {
                let error = tokens.err().or(tenants.err()).map(|error| error.to_string());
                tracing::warn!(error, "tokens or tenants have changed and could not be read; trying again");
            }
        }
    }
}

/// An instance's place in the register of running ones. That it cannot be written is no
/// fault of the instance: the database may be down.
struct Presence {
    database: Arc<Database>,
    clock: Clock,
    id: String,
    name: String,
    last: Option<Announced>,
}

/// What was last announced, and when.
struct Announced {
    changes: i64,
    master_keys: Vec<MasterKeyId>,
    at: Timestamp,
}

impl Presence {
    fn new(database: Arc<Database>, clock: Clock) -> Self {
        let host = gethostname::gethostname();
        let name = format!("{}/{}", host.to_string_lossy(), std::process::id());
        Self { database, clock, id: uuid::Uuid::new_v4().to_string(), name, last: None }
    }

    /// Says what is in force here, if that is news or was not said for a while.
    async fn announce(&mut self, changes: i64) {
        let (master_keys, at) = (self.database.master_keys(), self.clock.now());
        let is_known = |last: &Announced| {
            last.changes == changes && last.master_keys == master_keys && at.since(last.at) < ANNOUNCE_EVERY
        };
        if self.last.as_ref().is_some_and(is_known) {
            return;
        }
        match self.database.announce(&self.id, &self.name, changes).await {
            Ok(()) => self.last = Some(Announced { changes, master_keys, at }),
            Err(error) => tracing::debug!(%error, "this instance could not be announced; trying again"),
        }
    }

    async fn withdraw(&self) {
        if let Err(error) = self.database.withdraw(&self.id).await {
            tracing::debug!(%error, "this instance could not withdraw from the register");
        }
    }
}
