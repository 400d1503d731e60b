//! Brings an instance that was started without the database back to all of its tiers.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio::sync::oneshot;

use super::{StartError, base::Ground};
use crate::{
    config::Config,
    jobs::{self, Jobs, Registration},
    keys::KeyError,
    log,
    server::Service,
    tiers::database::StoreError,
};

/// How long to wait before the database is tried again: the first wait, the longest.
const SHORTEST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(10);

/// Tries the database until it answers, then does the steps of a start, in its order: tables,
/// environment, master keys, tokens, changes of tenants. Only then does the instance answer
/// from more than the file, and only after that does it announce itself: so an instance that
/// is found in the register has forgotten everything that it should.
pub(super) struct Recovery {
    pub(super) ground: Ground,
    pub(super) service: Arc<Service>,
    pub(super) registration: Registration,
    pub(super) job_settings: Arc<ArcSwap<jobs::Settings>>,
    pub(super) config: Config,
    /// Notified when the instance must end: the database is not the one it was started for.
    pub(super) refused: oneshot::Sender<StartError>,
}

impl Recovery {
    /// Runs until `stopped` completes: until the database answers, and then like any instance.
    pub(super) async fn until(self, stopped: impl Future<Output = ()> + Clone) {
        let mut wait = SHORTEST;
        let followed = loop {
            let attempt = async {
                tokio::time::sleep(wait).await;
                self.attempt().await
            };
            let attempt = tokio::select! {
                attempt = attempt => attempt,
                () = stopped.clone() => return,
            };
            match attempt {
                Ok(followed) => break followed,
                Err(error) if is_another(&error) => {
                    let _ = self.refused.send(error);
                    return;
                }
                Err(StartError::Database(error)) if error.is_outage() => {
                    tracing::debug!(error = log::chain(&error), "the database does not answer yet");
                }
                Err(error) => {
                    tracing::error!(
                        error = log::chain(&error),
                        "the database answers and cannot be used; trying again"
                    );
                }
            }
            // Histograms gather until they are read.
            self.service.metrics.upkeep();
            wait = (wait * 2).min(LONGEST);
        };
        tracing::info!("the database answers; this instance goes on with all of its tiers");
        let Self { ground, service, registration, job_settings, config, .. } = self;
        let jobs = Jobs::new(service, ground.database, followed, registration, job_settings, &config);
        Box::pin(jobs.begin()).await.until(stopped).await;
    }

    /// Does everything that a start does; returns the counter of changes from before that.
    async fn attempt(&self) -> Result<i64, StartError> {
        let began = self.service.resolver.clock().moment();
        let base = Box::pin(self.ground.open(self.config.environment.as_str())).await?;
        base.tell_keys();
        Box::pin(self.service.access.reload()).await?;
        self.service.resolver.rejoin().await?;
        self.service.attachment.note_look(began);
        Ok(base.followed)
    }
}

/// Whether the database is another one than this instance was started for.
fn is_another(error: &StartError) -> bool {
    matches!(
        error,
        StartError::Database(StoreError::Environment { .. })
            | StartError::Keys(KeyError::OtherPassphrase { .. })
            | StartError::OtherDerivation
    )
}
