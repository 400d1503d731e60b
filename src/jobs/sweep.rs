//! Removes versions of secrets, rotations and records of the audit whose time is over.

use std::{sync::Arc, time::Duration};

use super::{Common, Periodic};
use crate::access::audit;

/// How often an instance looks for them, and how many batches it removes in one turn of the upkeep,
/// which has more to do.
const SWEEP_EVERY: Duration = Duration::from_secs(60 * 60);
const SWEEPS_A_TURN: usize = 20;

pub(super) struct Sweep {
    common: Arc<Common>,
    due: Periodic,
}

impl Sweep {
    pub(super) fn new(common: &Arc<Common>) -> Self {
        Self { common: Arc::clone(common), due: Periodic::DUE }
    }

    /// Removes some of them, where that is due.
    pub(super) async fn in_time(&mut self) {
        let Common { database, clock, settings, .. } = &*self.common;
        let now = clock.moment();
        if !self.due.is_due(now.running()) {
            return;
        }
        for _ in 0..SWEEPS_A_TURN {
            match database.sweep_versions().await {
                // There may be more; the next pass continues.
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "versions whose time is over could not be removed; they are not served");
                }
            }
            match database.sweep_rotations().await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "rotations that have ended long ago could not be removed"),
            }
            match audit::trim(database, settings.load().retention, now.wall()).await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "records whose time is over could not be removed from the audit"),
            }
            self.due.done(now.running(), SWEEP_EVERY);
            return;
        }
    }
}
