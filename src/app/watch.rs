//! The background work of a running instance, apart from requests.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use futures_util::FutureExt as _;
use tokio::{
    sync::{Notify, watch},
    time::{Interval, MissedTickBehavior},
};

use crate::{
    access::audit,
    attachment::Attachment,
    clock::{Clock, Moment},
    config::Config,
    log,
    sealing::MasterKeyId,
    server::Service,
    tiers::database::{Change, Database, News},
};

/// The time between two looks at the changes, however often the database announces some:
/// changes in this time are read together.
const BREATH: Duration = Duration::from_millis(10);

/// How often an instance checks whether it has something to announce.
const ANNOUNCE_LOOK: Duration = Duration::from_millis(400);

/// How long to wait before listening again after the connection ended: the first, the longest.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How often an instance checks a tier that may be down, and the periodic work that is due.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// How often the last uses of tokens are written to the database.
const TELL_USES_EVERY: Duration = Duration::from_secs(60);

/// How often an instance renews its registration, where nothing is new.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(5);

/// How often an instance removes versions and records that have expired, and how many
/// batches in one turn of the maintenance, which has more to do.
const SWEEP_EVERY: Duration = Duration::from_secs(60 * 60);
const SWEEPS_A_TURN: usize = 20;

/// How often an instance looks for writes whose end the database was not told.
const FIND_UNENDED_EVERY: Duration = Duration::from_secs(5);

/// How often the master keys are read while a rotation waits for one of them.
const KEYS_AWAITED_EVERY: Duration = Duration::from_secs(2);

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
pub(super) struct Watch {
    follower: Follower,
    heartbeat: Heartbeat,
    maintenance: Maintenance,
    health_probe: HealthProbe,
}

/// Follows the counter of changes.
struct Follower {
    common: Arc<Common>,
    /// How often the database is asked, where it announces nothing, and failed reads are repeated.
    every: Duration,
    /// Notified whenever the database announces a change.
    heard: Arc<Notify>,
    due: Due,
    /// The counter of changes up to which all are in force.
    followed: watch::Sender<i64>,
}

/// Everything that must be read again, because it has changed.
#[derive(Default)]
struct Due {
    news: Mutex<Unread>,
    added: Notify,
}

#[derive(Clone, Copy, Default)]
struct Unread {
    tokens: bool,
    migration: bool,
    tenants: bool,
    master_keys: bool,
    /// The change that all of it leads to; `None` where nothing was looked at since.
    up_to: Option<i64>,
    /// When the last look began that found all changes that there were.
    as_of: Option<Moment>,
}

/// Announces how far the follower has come.
struct Heartbeat {
    followed: watch::Receiver<i64>,
    registration: Registration,
}

/// Does the periodic work.
struct Maintenance {
    common: Arc<Common>,
    keeping: Arc<ArcSwap<Keeping>>,
    /// By the running clock, like the following ones.
    keys_read: Duration,
    sweep_at: Duration,
    tell_uses_at: Duration,
    find_unended_at: Duration,
}

/// The settings of the maintenance that may change while the instance runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keeping {
    /// How often the master keys are read again without a special reason.
    reload_every: Duration,
    /// How long the audit is kept.
    retention: audit::Retention,
}

impl Keeping {
    pub(super) fn of(config: &Config) -> Self {
        Self { reload_every: config.keys.reload_every, retention: config.audit.retention }
    }
}

/// Checks whether an upstream that failed answers again, in its own task, as it may take long.
struct HealthProbe {
    common: Arc<Common>,
}

struct Common {
    service: Arc<Service>,
    database: Arc<Database>,
    clock: Clock,
    /// The master key that a rotation waits for this instance to wrap with.
    awaited: Mutex<Option<MasterKeyId>>,
    /// Whether a migration was going on at the last look.
    is_migrating: AtomicBool,
}

impl Watch {
    pub(super) fn new(
        service: Arc<Service>,
        database: Arc<Database>,
        followed: i64,
        registration: Registration,
        keeping: Arc<ArcSwap<Keeping>>,
        config: &Config,
    ) -> Self {
        let (awaited, is_migrating) = (Mutex::default(), AtomicBool::new(false));
        let clock = service.resolver.clock().clone();
        let keys_read = clock.running();
        let common = Arc::new(Common { service, database, clock, awaited, is_migrating });
        let maintenance = Maintenance {
            common: Arc::clone(&common),
            keeping,
            keys_read,
            sweep_at: Duration::ZERO,
            tell_uses_at: Duration::ZERO,
            find_unended_at: Duration::ZERO,
        };
        let (sender, followed) = watch::channel(followed);
        let health_probe = HealthProbe { common: Arc::clone(&common) };
        let (every, heard) = (config.database.poll_interval, Arc::default());
        let follower = Follower { common, every, heard, due: Due::default(), followed: sender };
        Self { follower, heartbeat: Heartbeat { followed, registration }, maintenance, health_probe }
    }

    pub(super) async fn begin(mut self) -> Self {
        self.follower.common.make_room().await;
        self.heartbeat.announce().await;
        self
    }

    /// Runs until `stopped` completes; then announces the rest, and withdraws the registration.
    pub(super) async fn until(self, stopped: impl Future<Output = ()>) {
        let stopped = stopped.shared();
        let Self { follower, mut heartbeat, mut maintenance, health_probe } = self;
        let (database, heard) = (Arc::clone(&follower.common.database), Arc::clone(&follower.heard));
        tokio::join!(
            listen(&database, &heard, stopped.clone()),
            follower.until(stopped.clone()),
            heartbeat.until(stopped.clone()),
            maintenance.until(stopped.clone()),
            health_probe.until(stopped),
        );
        maintenance.tell_uses().await;
        heartbeat.registration.withdraw().await;
    }
}

/// Ticks at once, and then each time `every` has passed.
fn turns(every: Duration) -> Interval {
    let mut turns = tokio::time::interval(every);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    turns
}

impl Follower {
    async fn until(&self, stopped: impl Future<Output = ()> + Clone) {
        tokio::join!(self.hear_until(stopped.clone()), self.read_until(stopped));
    }

    /// Asks for the changes, and forgets the secrets that have changed.
    async fn hear_until(&self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = turns(self.every);
        let mut last = *self.followed.borrow();
        loop {
            let Common { service, database, clock, .. } = &*self.common;
            tokio::select! {
                _ = turns.tick() => {}
                () = self.heard.notified() => {}
                () = service.attachment.look_wanted() => {}
                () = &mut stopped => break,
            }
            let began = clock.moment();
            let Ok(news) = database.changes_after(last).await else {
                service.attachment.note_failure();
                continue;
            };
            if news.up_to != last || !news.is_whole {
                service.resolver.apply(&news);
                last = news.up_to;
                // There may be more.
                self.heard.notify_one();
            }
            self.due.add(&news, began);
            tokio::time::sleep(BREATH).await;
        }
    }

    /// Puts the other changes into force, and notes how far everything is.
    async fn read_until(&self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = turns(self.every);
        loop {
            tokio::select! {
                _ = turns.tick() => {}
                () = self.due.added.notified() => {}
                () = &mut stopped => break,
            }
            self.read().await;
        }
    }

    async fn read(&self) {
        let Common { service, .. } = &*self.common;
        let mut unread = self.due.take();
        let Some(up_to) = unread.up_to else { return };
        // Nobody waits until a secret's change is in force everywhere: there may be many, and
        // they are announced with the next turn.
        let is_awaited = unread.tokens || unread.migration || unread.tenants || unread.master_keys;
        // Tokens first, because they have the least time.
        if unread.tokens {
            match service.access.reload().await {
                Ok(()) => unread.tokens = false,
                Err(error) => tracing::warn!(%error, "tokens have changed and could not be read; trying again"),
            }
        }
        if std::mem::take(&mut unread.migration) {
            self.common.make_room().await;
        }
        if unread.tenants {
            match service.resolver.follow().await {
                Ok(()) => unread.tenants = false,
                Err(error) => tracing::warn!(%error, "tenants have changed and could not be read; trying again"),
            }
        }
        if std::mem::take(&mut unread.master_keys) {
            self.common.look_for_rotation().await;
        }
        if unread.tokens || unread.tenants {
            service.attachment.note_failure();
            self.due.put_back(unread);
            return;
        }
        if let Some(began) = unread.as_of {
            service.attachment.note_look(began);
        }
        service.resolver.note_followed(up_to);
        self.followed.send_if_modified(|followed| {
            *followed = up_to;
            is_awaited
        });
    }
}

impl Due {
    /// Adds the findings of a look that began at this moment.
    fn add(&self, news: &News, began: Moment) {
        let anything = |of: Change| !news.is_whole || news.changes.contains(&of);
        let mut unread = self.lock();
        unread.tokens |= anything(Change::Tokens);
        unread.migration |= anything(Change::Migration);
        unread.tenants |= anything(Change::Tenants);
        unread.master_keys |= anything(Change::MasterKeys);
        unread.up_to = Some(news.up_to);
        if news.is_to_the_end {
            unread.as_of = Some(began);
        }
        drop(unread);
        self.added.notify_one();
    }

    fn take(&self) -> Unread {
        std::mem::take(&mut *self.lock())
    }

    /// Puts unfinished work back, beside the work that has become due since.
    fn put_back(&self, left: Unread) {
        let mut unread = self.lock();
        unread.tokens |= left.tokens;
        unread.migration |= left.migration;
        unread.tenants |= left.tenants;
        unread.master_keys |= left.master_keys;
        unread.up_to = unread.up_to.or(left.up_to);
    }

    fn lock(&self) -> MutexGuard<'_, Unread> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listens for changes until `stopped` completes, on one connection after the other.
async fn listen(database: &Database, heard: &Notify, stopped: impl Future<Output = ()>) {
    let listening = async {
        let mut pause = SHORTEST_PAUSE;
        loop {
            let began = Instant::now();
            let Err(error) = database.listen(|| heard.notify_one()).await;
            // A connection that lasted a while is no sign of trouble.
            pause = if began.elapsed() > LONGEST_PAUSE { SHORTEST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            tracing::debug!(%error, "nobody tells of changes just now; they are asked for");
            tokio::time::sleep(pause).await;
        }
    };
    tokio::select! {
        () = stopped => {}
        () = listening => {}
    }
}

impl HealthProbe {
    async fn until(&self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = turns(WATCH_EVERY);
        loop {
            let probing = async {
                turns.tick().await;
                self.common.service.resolver.try_upstream().await;
            };
            tokio::select! {
                () = probing => {}
                () = &mut stopped => break,
            }
        }
    }
}

impl Heartbeat {
    async fn until(&mut self, stopped: impl Future<Output = ()>) {
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

    async fn announce(&mut self) {
        let followed = *self.followed.borrow_and_update();
        self.registration.announce(followed).await;
    }
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

    /// Looks for a rotation that waits for a key that this instance lacks.
    async fn look_for_rotation(&self) {
        let Some(key) = self.wanted_key().await else { return };
        *self.awaited() = Some(key);
    }

    /// The key that a rotation waits for, where one is under way and this instance lacks the key.
    async fn wanted_key(&self) -> Option<MasterKeyId> {
        let rotation = self.database.rotation().await.ok().flatten()?;
        let key = rotation.key.and_then(|key| key.parse().ok())?;
        (!self.wraps_with(key)).then_some(key)
    }

    fn wraps_with(&self, key: MasterKeyId) -> bool {
        self.database.keys().ring().first().map(|first| first.id()) == Some(key)
    }
}

impl Maintenance {
    async fn until(&mut self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = turns(WATCH_EVERY);
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
                self.sweep().await;
                self.tell_uses_in_time().await;
            }
            if self.common.is_migrating.load(Ordering::Relaxed) {
                // A migration that was killed does not announce its end.
                self.common.make_room().await;
            }
            self.follow_keys().await;
        }
    }

    /// Tells the database what it missed while it was out, and finds writes whose end it missed.
    async fn make_up(&mut self) {
        let resolver = &self.common.service.resolver;
        let now = resolver.clock().running();
        if now >= self.find_unended_at {
            match resolver.find_unended_writes().await {
                Ok(()) => self.find_unended_at = now + FIND_UNENDED_EVERY,
                Err(error) => tracing::debug!(%error, "writes without an end could not be looked for"),
            }
        }
        if let Err(error) = resolver.make_up().await {
            tracing::debug!(%error, "the database could not be told what it missed; trying again");
        }
    }

    /// Writes the last uses of tokens to the database, where that is due.
    async fn tell_uses_in_time(&mut self) {
        let now = self.common.service.resolver.clock().running();
        if now >= self.tell_uses_at {
            self.tell_uses_at = now + TELL_USES_EVERY;
            self.tell_uses().await;
        }
    }

    async fn tell_uses(&self) {
        if let Err(error) = self.common.service.resolver.tell_uses().await {
            tracing::debug!(%error, "which tenants were asked for could not be noted");
        }
        if let Err(error) = self.common.service.access.tell_uses().await {
            tracing::debug!(%error, "the last use of tokens could not be noted; trying again");
        }
    }

    /// Removes expired versions of secrets and records of the audit, where that is due.
    async fn sweep(&mut self) {
        let Common { service, database, .. } = &*self.common;
        let now = service.resolver.clock().moment();
        if now.running() < self.sweep_at {
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
            match audit::trim(database, self.keeping.load().retention, now.wall()).await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "records whose time is over could not be removed from the audit"),
            }
            self.sweep_at = now.running() + SWEEP_EVERY;
            return;
        }
    }

    /// Reads the master keys again: periodically, and as often as needed while a rotation waits for
    /// this instance. A rotation looks at the keys in the announcement itself, so a source that
    /// does not answer just now causes only a delay.
    async fn follow_keys(&mut self) {
        let Common { service, database, .. } = &*self.common;
        let keys = database.keys();
        let now = service.resolver.clock().running();
        let awaited = *self.common.awaited();
        let is_awaited = awaited.is_some_and(|key| !self.common.wraps_with(key));
        let wait = if is_awaited { KEYS_AWAITED_EVERY } else { self.keeping.load().reload_every };
        if now.saturating_sub(self.keys_read) < wait {
            return;
        }
        self.keys_read = now;
        match keys.reload().await {
            Ok(()) => {
                if let Err(error) = database.note_master_keys(&keys.origins()).await {
                    tracing::debug!(%error, "where the master keys are could not be noted");
                }
            }
            Err(error) => tracing::error!(
                error = log::chain(&error),
                "the master keys cannot be read again; this instance goes on with those it holds"
            ),
        }
        if is_awaited {
            let still = self.common.wanted_key().await;
            let mut known = self.common.awaited();
            // The follower may have heard of another rotation meanwhile.
            if *known == awaited {
                *known = still;
            }
        }
    }
}

/// An instance's place in the register of running ones. A failure to write it is no
/// fault of the instance: the database may be down.
pub(super) struct Registration {
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
    pub(super) fn new(database: Arc<Database>, clock: Clock, attachment: Arc<Attachment>) -> Self {
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
