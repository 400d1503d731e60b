//! The work that is looked at every second, and done where it is due. It runs beside the follower of
//! changes, because it may take longer than a revoked token may last.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{Common, Periodic, master_keys::MasterKeysReader, sweep::Sweep, turns, uses::Uses};

/// How often an instance checks the database, and the work that is due.
const TURN_EVERY: Duration = Duration::from_secs(1);

/// How often an instance looks for writes whose end the database was not told.
const FIND_UNENDED_EVERY: Duration = Duration::from_secs(5);

/// Does the work of one turn after the other.
pub(super) struct Upkeep {
    common: Arc<Common>,
    find_unended: Periodic,
    sweep: Sweep,
    uses: Uses,
    master_keys: MasterKeysReader,
}

impl Upkeep {
    pub(super) fn new(common: &Arc<Common>) -> Self {
        Self {
            common: Arc::clone(common),
            find_unended: Periodic::DUE,
            sweep: Sweep::new(common),
            uses: Uses::new(common),
            master_keys: MasterKeysReader::new(common),
        }
    }

    pub(super) async fn until(&mut self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = turns(TURN_EVERY);
        let (mut was_up, mut was_attached) = (true, true);
        loop {
            tokio::select! {
                _ = turns.tick() => {}
                () = &mut stopped => break,
            }
            let Common { service, database, .. } = &*self.common;
            // Histograms gather until they are read; nobody may be reading them.
            service.metrics.upkeep();
            let is_up = database.ping().await.is_ok();
            match (was_up, is_up) {
                (true, false) => tracing::error!("the database does not answer; lookups go on without it"),
                (false, true) => tracing::info!("the database answers again"),
                _ => {}
            }
            was_up = is_up;
            let is_attached = service.attachment.holds_now();
            if was_attached && !is_attached {
                let since = service.attachment.since().to_rfc3339();
                tracing::error!(since, "the database was not heard of for database.max_detached: nothing is answered");
            }
            was_attached = is_attached;
            if is_up {
                self.make_up().await;
                self.sweep.in_time().await;
                self.uses.tell_in_time().await;
            }
            if self.common.is_migrating.load(Ordering::Relaxed) {
                // A migration that was killed does not announce its end.
                self.common.make_room().await;
            }
            self.master_keys.in_time().await;
        }
    }

    /// Tells the database what it missed while it was out, and finds writes whose end it missed.
    async fn make_up(&mut self) {
        let resolver = &self.common.service.resolver;
        let now = resolver.clock().running();
        if self.find_unended.is_due(now) {
            match resolver.find_unended_writes().await {
                Ok(()) => self.find_unended.done(now, FIND_UNENDED_EVERY),
                Err(error) => tracing::debug!(%error, "writes without an end could not be looked for"),
            }
        }
        if let Err(error) = resolver.make_up().await {
            tracing::debug!(%error, "the database could not be told what it missed; trying again");
        }
    }

    /// Tells the last uses, at the end of the instance.
    pub(super) async fn end(&self) {
        self.uses.tell().await;
    }
}
