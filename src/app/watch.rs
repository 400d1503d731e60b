//! What a running instance looks after between requests.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    clock::{Clock, Timestamp},
    log,
    sealing::MasterKeyId,
    server::Service,
    tiers::database::Database,
};

/// How often an instance looks whether tokens or tenants have changed, and whether the
/// database answers.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// How often an instance says that it runs, where it has nothing new to say.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(5);

/// How often an instance removes versions of secrets whose time is over, and how many
/// batches in one turn of the watch, which has more to do.
const SWEEP_EVERY: Duration = Duration::from_secs(60 * 60);
const SWEEPS_A_TURN: usize = 20;

/// How often the master keys are read while a rotation waits for one of them.
const KEYS_AWAITED_EVERY: Duration = Duration::from_secs(2);

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
pub(super) struct Watch {
    service: Arc<Service>,
    database: Arc<Database>,
    /// The counter of changes as of what is in force.
    followed: i64,
    presence: Presence,
    /// How often the master keys are read again without a reason.
    reload_every: Duration,
    keys_read: Instant,
    sweep_at: Timestamp,
    /// The master key that a rotation waits for us to wrap with.
    awaited: Option<MasterKeyId>,
    /// Whether a migration was going on at the last look.
    is_migrating: bool,
}

impl Watch {
    pub(super) fn new(
        service: Arc<Service>,
        database: Arc<Database>,
        followed: i64,
        presence: Presence,
        reload_every: Duration,
    ) -> Self {
        Self {
            service,
            database,
            followed,
            presence,
            reload_every,
            keys_read: Instant::now(),
            sweep_at: Timestamp::from_millis(0),
            awaited: None,
            is_migrating: false,
        }
    }

    pub(super) async fn begin(mut self) -> Self {
        self.make_room().await;
        self.presence.announce(self.followed).await;
        self
    }

    /// Goes on until `stopped` completes; then withdraws.
    pub(super) async fn until(mut self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = tokio::time::interval(WATCH_EVERY);
        turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut was_up = true;
        loop {
            tokio::select! {
                _ = turns.tick() => {}
                () = &mut stopped => break,
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
            if is_up {
                self.sweep().await;
            }
            if self.is_migrating {
                // One that was killed says nothing of its end.
                self.make_room().await;
            }
            self.follow().await;
            self.follow_keys().await;
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
        self.make_room().await;
        match (self.service.access.reload().await, self.service.resolver.follow().await) {
            (Ok(()), Ok(())) => {
                self.followed = now;
                self.awaited = self.awaited().await.or(self.awaited);
            }
            (tokens, tenants) => {
                let error = tokens.err().or(tenants.err()).map(|error| error.to_string());
                tracing::warn!(error, "tokens or tenants have changed and could not be read; trying again");
            }
        }
    }

    /// Leaves a migration that goes on its share of the upstream budget, and takes it back
    /// when it is over.
    async fn make_room(&mut self) {
        let Some(upstream) = &self.service.resolver.upstream else { return };
        if let Ok(is_migrating) = self.database.is_migrating().await {
            self.is_migrating = is_migrating;
            upstream.share_budget(is_migrating);
        }
    }

    /// Removes versions of secrets whose time is over, where that is due.
    async fn sweep(&mut self) {
        let now = self.service.resolver.clock.now();
        if now < self.sweep_at {
            return;
        }
        for _ in 0..SWEEPS_A_TURN {
            match self.database.sweep_versions().await {
                // There may be more; the next turn goes on.
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "versions whose time is over could not be removed; they are not served");
                }
            }
            self.sweep_at = now.plus(SWEEP_EVERY);
            return;
        }
    }

    /// Reads the master keys again: now and then, and while a rotation waits for this
    /// instance, as often as it takes. Whoever rotates looks at the keys in the
    /// announcement itself, so a source that does not answer just now delays, and no more.
    async fn follow_keys(&mut self) {
        let keys = self.database.keys();
        if self.awaited.is_some() && keys.ring().first().map(|key| key.id()) == self.awaited {
            self.awaited = None;
        }
        let wait = if self.awaited.is_some() { KEYS_AWAITED_EVERY } else { self.reload_every };
        if self.keys_read.elapsed() < wait {
            return;
        }
        self.keys_read = Instant::now();
        match keys.reload().await {
            Ok(()) => {
                if let Err(error) = self.database.note_master_keys(&keys.origins()).await {
                    tracing::debug!(%error, "where the master keys are could not be noted");
                }
            }
            Err(error) => tracing::error!(
                error = log::chain(&error),
                "the master keys cannot be read again; this instance goes on with those it holds"
            ),
        }
        if self.awaited.is_some() {
            self.awaited = self.awaited().await;
        }
    }

    /// The key that a rotation waits for, where one is under way and this instance lacks it.
    async fn awaited(&self) -> Option<MasterKeyId> {
        let rotation = self.database.rotation().await.ok().flatten()?;
        let key = rotation.key.and_then(|key| key.parse().ok())?;
        (self.database.keys().ring().first().map(|key| key.id()) != Some(key)).then_some(key)
    }
}

/// An instance's place in the register of running ones. That it cannot be written is no
/// fault of the instance: the database may be down.
pub(super) struct Presence {
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
    pub(super) fn new(database: Arc<Database>, clock: Clock) -> Self {
        let (id, name) = (uuid::Uuid::new_v4().to_string(), super::process_name());
        Self { database, clock, id, name, last: None }
    }

    /// Says what is in force here, if that is news or was not said for a while.
    async fn announce(&mut self, changes: i64) {
        let (master_keys, at) = (self.database.keys().ring().ids().collect(), self.clock.now());
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
