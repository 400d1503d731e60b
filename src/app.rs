//! An instance: every part built from its configuration, in the order they need each other.

mod base;
mod watch;

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::{sync::oneshot, task::JoinSet};

pub use self::base::Base;
use self::watch::{Presence, Watch};
use crate::{
    access::{Access, audit::Audit},
    clock::Clock,
    config::Config,
    phase::Phase,
    policy::InvalidGlob,
    resolver::{
        Resolver,
        shadow::{Comparer, Shadow},
    },
    sealing::KeyError,
    server::{self, Listeners, Service},
    tiers::{database::StoreError, memory::Memory, upstream},
};

/// A running instance, but for its listeners.
#[derive(Debug)]
pub struct App {
    service: Arc<Service>,
    config: server::Config,
    /// What goes on outside requests; ended with this.
    tasks: JoinSet<()>,
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

/// How long an instance that ends tries to say so, and to write what the audit has counted.
const FAREWELL: Duration = Duration::from_secs(5);

impl App {
    /// Builds an instance: upstream, master keys, database, memory, and who may ask.
    ///
    /// # Errors
    /// What cannot be built, and why.
    pub async fn start(config: &Config, clock: Clock) -> Result<Self, StartError> {
        let policies = config.policies()?;
        let base = Base::open(config, &clock).await?;
        base.tell_keys();
        if policies.uses(Phase::reads_database) {
            base.needs_key()?;
        }
        let Base { database, upstream, metrics, followed, .. } = base;
        let memory = Memory::build(&config.memory, clock.clone());
        let deadline = config.infisical.as_ref().map_or(config.database.timeout * 2, |infisical| infisical.timeout);
        let access = Access::build(&config.access, Arc::clone(&database), clock.clone()).await?;
        let presence = Presence::new(Arc::clone(&database), clock.clone());
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
        resolver.follow().await?;
        let comparer = Comparer::new(resolver.clone(), queue);
        let (audit, writer) = Audit::build(&config.audit, &database, clock.clone(), &metrics);
        let service = Arc::new(Service::build(&config.server, &config.access, resolver, access, audit, metrics));
        let (stop, stopped) = oneshot::channel();
        let watch = Watch::new(Arc::clone(&service), database, followed, presence, config);
        let watch = Box::pin(watch.begin()).await;
        let stopped = stopped.map(drop).shared();
        let mut tasks = JoinSet::new();
        tasks.spawn(watch.until(stopped.clone()));
        tasks.spawn(comparer.until(stopped.clone()));
        let (resolver, tenants, warmed) = (service.resolver.clone(), config.memory.warm_tenants, stopped.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = warmed => {}
                () = resolver.warm_up(tenants) => {}
            }
        });
        tasks.spawn(writer.until(stopped));
        Ok(Self { service, config: config.server.clone(), tasks, stop: Some(stop) })
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
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(FAREWELL, ended).await.is_err() {
            tracing::debug!("there was no time to tell the database of the end");
        }
    }
}
