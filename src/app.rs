//! An instance: builds every part from its configuration, in the order of their dependencies.

mod base;
mod files;
mod offline;
mod recovery;
mod reload;

use std::{pin::pin, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use futures_util::FutureExt as _;
use tokio::{sync::oneshot, task::JoinSet};

pub use self::base::Base;
pub use self::files::{needed as needed_open_files, raise_limit as raise_limit_of_open_files};
pub use self::reload::{Changes, Reload, ReloadError};
use self::{
    base::Ground,
    offline::{Found, Writer},
    recovery::Recovery,
};
use crate::{
    access::{Access, audit::Audit},
    attachment::Attachment,
    clock::Clock,
    config::Config,
    jobs::{self, Clocks, Jobs, Registration},
    keys::KeyError,
    log,
    metrics::Metrics,
    offline::Unusable,
    outgoing::{self, Outgoing},
    phase::Phase,
    policy::InvalidGlob,
    resolver::{
        Poller, RefreshWorker, Resolver,
        shadow::{Comparer, Shadow},
    },
    rotation::{Rotations, Rules},
    server::{self, Listeners, Service},
    tiers::{
        database::StoreError,
        memory::Memory,
        upstream::{self, Before, Settings},
    },
};

/// A running instance, except for its listeners.
#[derive(Debug)]
pub struct App {
    service: Arc<Service>,
    config: server::Config,
    reload: Arc<Reload>,
    /// The background tasks; they end when this is dropped.
    tasks: JoinSet<()>,
    stop: Option<oneshot::Sender<()>>,
    /// The task that writes the audit, which ends after everything else.
    audit: JoinSet<()>,
    stop_audit: Option<oneshot::Sender<()>>,
    /// Receives the reason if it turns out that the instance must not continue.
    refused: oneshot::Receiver<StartError>,
}

/// Why an instance cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The upstream cannot be set up.
    #[error("the upstream tier cannot be set up")]
    Upstream(#[from] upstream::BuildError),
    /// Calls to other servers cannot be set up.
    #[error("outgoing calls cannot be set up")]
    Outgoing(#[from] outgoing::BuildError),
    /// A rule cannot be read.
    #[error("the rules cannot be read")]
    Rules(#[from] InvalidGlob),
    /// A source of master keys has an invalid content.
    #[error("the master keys cannot be read")]
    Keys(#[from] KeyError),
    /// No source of master keys answered, and without one nothing can be sealed.
    #[error("none of keys.sources gave a master key: {0}")]
    NoKey(String),
    /// The database cannot be used.
    #[error("the database cannot be used")]
    Database(#[from] StoreError),
    /// The database does not answer, and there is nothing else to start from.
    #[error("the database cannot be used, and memory.offline_file, from which a start needs none, is not set")]
    DatabaseDown(#[source] StoreError),
    /// The database does not answer, and the file cannot be used for the start either.
    #[error("the database cannot be used ({database})")]
    OfflineCopy {
        /// Why the database cannot.
        database: String,
        /// Why the file cannot.
        source: Unusable,
    },
    /// The file was written beside another database.
    #[error(
        "the database derives the key of keys.passphrase in another way than memory.offline_file tells, from which this \
         instance was started: it is another database; start anew"
    )]
    OtherDerivation,
}

/// How long an instance that stops tries to say so, and then to write what the audit has counted.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

impl App {
    /// Builds an instance: upstream, master keys, database, memory, and access. Where the database
    /// does not answer, the instance uses `memory.offline_file` until it does.
    ///
    /// # Errors
    /// The part that cannot be built, and why.
    pub async fn start(config: &Config, clock: Clock) -> Result<Self, StartError> {
        let policies = config.policies()?;
        // Made before anything is read: see `Attachment::note_look`.
        let attachment = Arc::new(Attachment::new(clock.clone(), config.max_detached()));
        let ground = Ground::of_instance(config, &clock)?;
        let beginning = match Box::pin(ground.open(config.environment.as_str())).await {
            Ok(base) => Beginning::Opened(base),
            Err(StartError::Database(error)) if error.is_outage() => {
                // Earlier use of the budget is not known, and the master keys may have to be asked
                // for.
                if let Some(upstream) = &ground.upstream {
                    upstream.resume_budget(Before::Unknown);
                }
                Beginning::Offline(Box::pin(Found::find(config, &ground, &clock, error)).await?)
            }
            Err(error) => return Err(error),
        };
        if let Beginning::Opened(base) = &beginning {
            base.tell_keys();
            if policies.uses(Phase::reads_database) {
                base.needs_key()?;
            }
        }
        let Ground { database, upstream, metrics, .. } = ground.clone();
        let memory = Memory::build(&config.memory, clock.clone());
        let settings = config.upstream().map(upstream::Config::settings);
        let deadline = settings.map_or(config.database.timeout * 2, Settings::timeout);
        let webhook = upstream.as_ref().and_then(|upstream| upstream.webhook());
        let access = Access::build(&config.access, Arc::clone(&database), clock.clone());
        let registration = Registration::new(Arc::clone(&database), clock.clone(), Arc::clone(&attachment));
        let (shadow, queue) = Shadow::build(&config.migration, clock.clone(), &metrics);
        let resolver = Resolver::build(
            memory,
            Arc::clone(&database),
            upstream,
            policies,
            deadline,
            clock.clone(),
            Arc::clone(&metrics),
            shadow,
        );
        let resolver = Arc::new(resolver.withholding(config.keys.withheld()));
        let rotations = rotations_of(config, &resolver, &clock, &metrics)?;
        let comparer = Comparer::new(Arc::clone(&resolver), queue);
        let (audit, recorder) = Audit::build(&config.audit, &database, clock.clone(), &metrics);
        let refresher = RefreshWorker::new(Arc::clone(&resolver));
        let poller = settings.map(|settings| Poller::new(Arc::clone(&resolver), settings));
        let service = Service::build(&config.server, &config.access, rotations, access, audit, metrics, attachment);
        let service = Arc::new(service.with_webhook(webhook).with_project(config.project()).with_connections(
            &config.server,
            &config.access,
            files::connections(config),
        ));
        let (stop, stopped) = oneshot::channel();
        let (refuse, refused) = oneshot::channel();
        let job_settings = Arc::new(ArcSwap::from_pointee(jobs::Settings::of(config)));
        let reload = Arc::new(Reload::new(Arc::clone(&service), Arc::clone(&job_settings), config.clone()));
        let stopped = stopped.map(drop).shared();
        let mut tasks = JoinSet::new();
        match beginning {
            Beginning::Opened(base) => {
                Box::pin(service.access.reload()).await?;
                if config.server.infisical_api.enabled {
                    Box::pin(prepare_logins(&service)).await;
                }
                service.resolver.begin().await?;
                service.resolver.note_followed(base.followed);
                let jobs = Jobs::new(Arc::clone(&service), database, base.followed, registration, job_settings, config);
                tasks.spawn(Box::pin(jobs.begin()).await.until(stopped.clone()));
                let (resolver, tenants) = (Arc::clone(&service.resolver), config.memory.warm_tenants);
                let stopped = stopped.clone();
                tasks.spawn(async move {
                    tokio::select! {
                        () = stopped => {}
                        () = resolver.warm_up(tenants) => {}
                    }
                });
            }
            Beginning::Offline(found) => {
                found.take_over(&service).await?;
                let (service, config) = (Arc::clone(&service), config.clone());
                let recovery = Recovery { ground, service, registration, job_settings, config, refused: refuse };
                tasks.spawn(Box::pin(recovery.until(stopped.clone())));
            }
        }
        if let Some(writer) = Writer::new(&service, config, &clock) {
            tasks.spawn(writer.until(stopped.clone()));
        }
        tasks.spawn(Clocks::new(clock, Arc::clone(&service.metrics)).until(stopped.clone()));
        tasks.spawn(comparer.until(stopped.clone()));
        tasks.spawn(refresher.until(stopped.clone()));
        if let Some(poller) = poller {
            tasks.spawn(poller.until(stopped.clone()));
        }
        let (stop_audit, audit_stopped) = oneshot::channel::<()>();
        let mut audit = JoinSet::new();
        audit.spawn(recorder.until(audit_stopped.map(drop)));
        let (stop, stop_audit) = (Some(stop), Some(stop_audit));
        Ok(Self { service, config: config.server.clone(), reload, tasks, stop, audit, stop_audit, refused })
    }

    /// The service that answers requests.
    #[must_use]
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Applies another configuration while this runs.
    #[must_use]
    pub fn reload(&self) -> &Arc<Reload> {
        &self.reload
    }

    /// Serves until `shutdown` completes and the requests in progress have ended.
    ///
    /// # Errors
    /// An instance that was started without the database has met a database that is not its own.
    pub async fn serve(
        mut self,
        listeners: Listeners,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), StartError> {
        let mut refused = None;
        let shutdown = async {
            let mut shutdown = pin!(shutdown);
            tokio::select! {
                () = &mut shutdown => {}
                Ok(error) = &mut self.refused => refused = Some(error),
            }
        };
        server::serve(&self.config, listeners, Arc::clone(&self.service), shutdown).await;
        drop(self.stop.take());
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, ended).await.is_err() {
            tracing::debug!("there was no time to tell the database of the end");
        }
        // Last: requests that outlive their grace time are answered as long as the process lives,
        // and recorded.
        drop(self.stop_audit.take());
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.audit.join_next()).await.is_err() {
            tracing::warn!("there was no time to write all of the audit");
        }
        refused.map_or(Ok(()), Err)
    }
}

/// The rotations of this configuration's rules.
fn rotations_of(
    config: &Config,
    resolver: &Arc<Resolver>,
    clock: &Clock,
    metrics: &Arc<Metrics>,
) -> Result<Arc<Rotations>, StartError> {
    let outgoing = Outgoing::build(&config.outgoing, clock.clone(), Arc::clone(metrics))?;
    let rotations = Rotations::new(Arc::clone(resolver), Arc::new(outgoing), Arc::clone(metrics));
    rotations.set_rules(Rules::build(&config.rotation)?);
    Ok(Arc::new(rotations))
}

/// Makes sure that a login needs no database later on. Where that fails now, the first login tries again.
async fn prepare_logins(service: &Service) {
    if let Err(error) = service.access.ensure_login_key().await {
        let error = log::chain(&error);
        tracing::warn!(
            error,
            "Infisical's clients cannot log in yet: there is no key to sign their access tokens with"
        );
    }
}

/// The sources that an instance starts from.
enum Beginning {
    /// The parts that it needs, with the opened database.
    Opened(Base),
    /// The offline copy alone.
    Offline(Found),
}
