//! Tells the database which tokens and tenants are used.

use std::{sync::Arc, time::Duration};

use super::{Common, Periodic};

/// How often they are told.
const TELL_USES_EVERY: Duration = Duration::from_secs(60);

pub(super) struct Uses {
    common: Arc<Common>,
    due: Periodic,
}

impl Uses {
    pub(super) fn new(common: &Arc<Common>) -> Self {
        Self { common: Arc::clone(common), due: Periodic::DUE }
    }

    /// Writes the last uses to the database, where that is due.
    pub(super) async fn tell_in_time(&mut self) {
        let now = self.common.clock.running();
        if self.due.is_due(now) {
            self.due.done(now, TELL_USES_EVERY);
            self.tell().await;
        }
    }

    pub(super) async fn tell(&self) {
        if let Err(error) = self.common.service.resolver.tell_uses().await {
            tracing::debug!(%error, "which tenants were asked for could not be noted");
        }
        if let Err(error) = self.common.service.access.tell_uses().await {
            tracing::debug!(%error, "the last use of tokens could not be noted; trying again");
        }
    }
}
