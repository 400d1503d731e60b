//! The work of a running instance that no request waits for: a file for each job. What happens at a
//! fixed time after the last is a `Periodic`.

mod clocks;
mod events;
mod follow;
mod master_keys;
mod probe;
mod register;
mod rotate;
mod sweep;
mod upkeep;
mod uses;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use futures_util::FutureExt as _;
use tokio::{
    sync::watch,
    time::{Interval, MissedTickBehavior},
};

pub use self::{clocks::Clocks, register::Registration};
use self::{
    follow::{Follower, listen},
    probe::HealthProbe,
    register::Heartbeat,
    upkeep::Upkeep,
};
use crate::{
    access::audit, clock::Clock, config::Config, sealing::MasterKeyId, server::Service, tiers::database::Database,
};

/// Follows the changes that happen outside requests, for as long as the instance lives.
///
/// A caller that waits until an instance has put a change into force reads that from its
/// announcement, which is true because of an order:
/// - The changes are asked for *before* tokens and tenants are read: their state is then
///   from those changes or later. A change in between is not claimed, and is found at
///   the next turn.
/// - It is announced *after* all of it was read and is in force; if one part fails, the
///   former counter stays, and that part is tried again. It is announced beside the next
///   looks: changes meanwhile do not wait until that is written.
/// - Secrets are forgotten as soon as their change is heard of, beside everything that must be read
///   again: none waits for tokens that cannot be read, or not soon.
/// - The first announcement comes before the first request is answered: whenever a change is
///   made, the instance is in the register already, or it has read nothing from before.
///
/// Other periodic work runs beside it, because it may take longer than a revoked token may last.
pub struct Jobs {
    follower: Follower,
    heartbeat: Heartbeat,
    upkeep: Upkeep,
    health_probe: HealthProbe,
}

/// The settings of the jobs that may change while the instance runs.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How often the master keys are read again without a special reason.
    reload_every: Duration,
    /// How long the audit is kept.
    retention: audit::Retention,
}

impl Settings {
    /// The settings in this configuration.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self { reload_every: config.keys.reload_every, retention: config.audit.retention }
    }
}

/// The parts that several jobs use.
struct Common {
    service: Arc<Service>,
    database: Arc<Database>,
    clock: Clock,
    settings: Arc<ArcSwap<Settings>>,
    /// The master key that a rotation waits for this instance to wrap with.
    awaited: Mutex<Option<MasterKeyId>>,
    /// Whether a migration was going on at the last look.
    is_migrating: AtomicBool,
}

impl Jobs {
    /// The jobs of an instance that has followed all changes up to `followed`.
    #[must_use]
    pub fn new(
        service: Arc<Service>,
        database: Arc<Database>,
        followed: i64,
        registration: Registration,
        settings: Arc<ArcSwap<Settings>>,
        config: &Config,
    ) -> Self {
        let (awaited, is_migrating) = (Mutex::default(), AtomicBool::new(false));
        let clock = service.resolver.clock().clone();
        let common = Arc::new(Common { service, database, clock, settings, awaited, is_migrating });
        let (upkeep, health_probe) = (Upkeep::new(&common), HealthProbe::new(&common));
        let (sender, followed) = watch::channel(followed);
        let follower = Follower::new(common, config.database.poll_interval, sender);
        Self { follower, heartbeat: Heartbeat::new(followed, registration), upkeep, health_probe }
    }

    /// Makes the first announcement.
    pub async fn begin(mut self) -> Self {
        self.follower.begin().await;
        self.follower.common.make_room().await;
        self.heartbeat.announce().await;
        self
    }

    /// Runs until `stopped` completes; then announces the rest, and withdraws the registration.
    pub async fn until(self, stopped: impl Future<Output = ()>) {
        let stopped = stopped.shared();
        let Self { follower, mut heartbeat, mut upkeep, health_probe } = self;
        let (database, heard) = (Arc::clone(&follower.common.database), Arc::clone(&follower.heard));
        let (common, rotating) = (Arc::clone(&follower.common), Arc::clone(&follower.common));
        tokio::join!(
            listen(&database, &heard, stopped.clone()),
            events::tell(common, stopped.clone()),
            follower.until(stopped.clone()),
            heartbeat.until(stopped.clone()),
            upkeep.until(stopped.clone()),
            rotate::until(&rotating, stopped.clone()),
            health_probe.until(stopped),
        );
        upkeep.end().await;
        heartbeat.withdraw().await;
    }
}

/// When work is due that is done again each time a while has passed, by the running clock.
struct Periodic {
    due_at: Duration,
}

impl Periodic {
    /// Work that is due at once.
    const DUE: Self = Self { due_at: Duration::ZERO };

    fn is_due(&self, now: Duration) -> bool {
        now >= self.due_at
    }

    /// The work was done, and is due again when so much time has passed.
    fn done(&mut self, now: Duration, every: Duration) {
        self.due_at = now + every;
    }
}

/// Ticks at once, and then each time `every` has passed.
fn turns(every: Duration) -> Interval {
    let mut turns = tokio::time::interval(every);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    turns
}

impl Common {
    /// Leaves a running migration its share of the upstream budget, and takes it back
    /// when the migration is over.
    async fn make_room(&self) {
        let Some(upstream) = self.service.resolver.upstream() else { return };
        if let Ok(is_migrating) = self.database.is_migrating().await {
            self.is_migrating.store(is_migrating, Ordering::Relaxed);
            upstream.share_budget(is_migrating);
        }
    }

    fn awaited(&self) -> MutexGuard<'_, Option<MasterKeyId>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
