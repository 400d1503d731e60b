//! Announces the instance in the register of running ones, and how far it has followed.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::turns;
use crate::{
    attachment::Attachment,
    clock::{Clock, Moment},
    log,
    sealing::MasterKeyId,
    tiers::database::Database,
};

/// How often an instance checks whether it has something to announce.
const ANNOUNCE_LOOK: Duration = Duration::from_millis(400);

/// How often an instance renews its registration, where nothing is new.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(5);

/// Announces how far the follower has come.
pub(super) struct Heartbeat {
    followed: watch::Receiver<i64>,
    registration: Registration,
}

impl Heartbeat {
    pub(super) fn new(followed: watch::Receiver<i64>, registration: Registration) -> Self {
        Self { followed, registration }
    }

    pub(super) async fn until(&mut self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        // The master keys are announced as well, and they change at other times.
        let mut turns = turns(ANNOUNCE_LOOK);
        loop {
            tokio::select! {
                _ = turns.tick() => {}
                _ = self.followed.changed() => {}
                () = self.registration.attachment.announcement_wanted() => {}
                () = &mut stopped => break,
            }
            self.announce().await;
        }
    }

    pub(super) async fn announce(&mut self) {
        let followed = *self.followed.borrow_and_update();
        self.registration.announce(followed).await;
    }

    /// Takes the instance out of the register, at its end.
    pub(super) async fn withdraw(&self) {
        self.registration.withdraw().await;
    }
}

/// An instance's place in the register of running ones. A failure to write it is no
/// fault of the instance: the database may be down.
pub struct Registration {
    database: Arc<Database>,
    clock: Clock,
    attachment: Arc<Attachment>,
    id: String,
    name: String,
    last: Option<Announced>,
}

/// The last announcement, and its time.
struct Announced {
    changes: i64,
    master_keys: Vec<MasterKeyId>,
    /// When the announcement began.
    at: Moment,
}

impl Registration {
    /// A new instance, not announced yet.
    #[must_use]
    pub fn new(database: Arc<Database>, clock: Clock, attachment: Arc<Attachment>) -> Self {
        let (id, name) = (uuid::Uuid::new_v4().to_string(), log::process_name());
        Self { database, clock, attachment, id, name, last: None }
    }

    /// Announces the changes in force here, if that is news or was not announced for a while.
    async fn announce(&mut self, changes: i64) {
        let (master_keys, at) = (self.database.keys().ring().ids().collect(), self.clock.moment());
        let max_detached = self.attachment.max_detached();
        // Several times within the time that is counted from the last one.
        let every = ANNOUNCE_EVERY.min(max_detached / 4);
        let is_known =
            |last: &Announced| last.changes == changes && last.master_keys == master_keys && at.since(last.at) < every;
        if self.last.as_ref().is_some_and(is_known) {
            return;
        }
        match self.database.announce(&self.id, &self.name, changes, max_detached).await {
            Ok(()) => {
                self.attachment.note_announcement(at);
                self.last = Some(Announced { changes, master_keys, at });
            }
            Err(error) => {
                self.attachment.note_failure();
                tracing::debug!(%error, "this instance could not be announced; trying again");
            }
        }
    }

    async fn withdraw(&self) {
        if let Err(error) = self.database.withdraw(&self.id).await {
            tracing::debug!(%error, "this instance could not withdraw from the register");
        }
    }
}
