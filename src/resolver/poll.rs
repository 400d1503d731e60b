//! Asks upstream periodically which folders have changed, on behalf of all instances.
//!
//! A server that can tell which folders changed is asked for them. Any server is asked for all
//! tenants' folders in one read, which it does not send again while nothing has changed: that shows
//! deletions too. Where that answer would be too long, or folders import others, a few copies are
//! compared each time, the oldest first. The shared folders, which lie elsewhere, are always compared,
//! and last. The list of folders is asked for as well, because the read
//! does not tell an empty folder from a deleted one. These few calls, and the reads of what they
//! find, have a lane of their own: refreshes of what has not changed may use up all of theirs, for as
//! long as there are many tenants. A change that is found is only read sooner: one that is missed is
//! read when its copy is past `refresh_after`.

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use super::{ForwardReason, ResolveError, Resolver};
use crate::{
    clock::{Moment, Timestamp},
    log::process_name,
    tenant::Tenant,
    tiers::{
        database::Lease,
        upstream::{ChangedFolder, Fingerprint, Lane, Overview, Settings, Upstream, UpstreamError},
    },
};

/// The name of the lease that decides which instance asks.
const LEASE: &str = "change poll";

/// How much longer than two intervals the lease lasts.
const GRACE: Duration = Duration::from_secs(10);

/// How often the clock is checked for whether it is time; tests move that clock.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The shortest time between two polls, however many webhooks ask for one.
const PAUSE: Duration = Duration::from_secs(10);

/// How far back before the last poll changes are asked for again: upstream's clock may be
/// behind ours by that much, or its answer may have come before the change was visible.
const OVERLAP: Duration = Duration::from_secs(5 * 60);

/// The same at the first poll where all folders were read as well: whatever changes from then on shows
/// there, and only small differences of the clocks are left.
const SMALL_OVERLAP: Duration = Duration::from_secs(10);

/// The most copies that are compared in one poll.
const COMPARED: u32 = 100;

/// The most changed folders that are processed in one poll.
const TOLD: usize = 10_000;

/// A server that tells which folders have changed is asked for all of them beside that only while
/// they are no longer than this, and otherwise once in [`LONG_EVERY`].
const SHORT: usize = 4 << 20;
const LONG_EVERY: Duration = Duration::from_secs(60 * 60);

/// Changes that are announced to other instances in one transaction.
const ANNOUNCED: usize = 100;

/// Asks which folders have changed.
///
/// One instance asks for all, by a lease that it renews at each poll. Two may ask at once after
/// one was stopped for a while, or while the database does not answer: that costs requests of
/// each instance's own budget, and nothing else.
pub struct Poller {
    resolver: Arc<Resolver>,
    every: Duration,
    /// The number of copies that are compared in one poll.
    compared: usize,
    due: Duration,
    lease: Option<Lease>,
    /// When the last poll began that ran to its end, and when the last poll of any outcome began.
    asked_at: Option<Moment>,
    tried_at: Option<Duration>,
    is_wanted: bool,
    /// The last changes that were reported and acted upon: [`OVERLAP`] has them reported again.
    told: HashMap<Tenant, Timestamp>,
    seen: Seen,
    /// Tenants that are held and no longer have a folder, as the last poll found. There are at
    /// most as many as there are copies and folders.
    gone: HashSet<Tenant>,
}

/// The last read of all folders that was acted upon. It holds as many fingerprints as an answer of
/// `infisical.max_response` has folders.
#[derive(Default)]
struct Seen {
    validator: Option<String>,
    folders: Option<HashMap<Tenant, Fingerprint>>,
    has_imports: bool,
    /// Until when it is left out where the server tells what has changed, as it is long.
    long_until: Option<Duration>,
}

/// The changes that a read of all folders shows.
enum Covered {
    /// Every change.
    All,
    /// Every change but those in imported folders.
    NoImports,
    /// Nothing: there was none.
    Nothing,
}

impl Poller {
    /// Builds the poller of this resolver.
    #[must_use]
    pub fn new(resolver: Arc<Resolver>, settings: &dyn Settings) -> Self {
        let every = settings.poll_interval();
        // An eighth of the budget: half of the part that is for changes alone.
        let share = |calls: NonZeroU32| f64::from(calls.get()) * every.as_secs_f64() / 60.0 / 8.0;
        let share = settings.requests_per_minute().map_or(f64::from(COMPARED), share);
        let compared = (1..=COMPARED).rev().find(|number| f64::from(*number) <= share).unwrap_or(1);
        Self {
            due: resolver.clock.running() + every,
            compared: compared as usize,
            resolver,
            every,
            lease: None,
            asked_at: None,
            tried_at: None,
            is_wanted: false,
            told: HashMap::new(),
            seen: Seen::default(),
            gone: HashSet::new(),
        }
    }

    /// Runs until `stopped` completes; then lets another instance take over.
    pub async fn until(mut self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = tokio::time::interval(CLOCK_CHECK_INTERVAL);
        turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let resolver = Arc::clone(&self.resolver);
        loop {
            tokio::select! {
                () = &mut stopped => break,
                _ = turns.tick() => {}
                () = resolver.refresh_queue.look.notified() => self.is_wanted = true,
            }
            tokio::select! {
                () = &mut stopped => break,
                () = Box::pin(self.turn()) => {}
            }
        }
        if let Some(lease) = self.lease
            && let Err(error) = resolver.database.end_lease(&lease).await
        {
            tracing::debug!(%error, "the lease of the change poll ends by itself");
        }
    }

    /// Polls if it is due and this instance holds the lease, or if a webhook came to this instance.
    async fn turn(&mut self) {
        let moment = self.resolver.clock.moment();
        let now = moment.running();
        let is_wanted = self.is_wanted && self.tried_at.is_none_or(|at| now.saturating_sub(at) >= PAUSE);
        let is_due = !self.every.is_zero() && now >= self.due;
        if is_due {
            self.due = now + self.every;
        }
        if !(is_wanted || (is_due && self.is_ours().await)) {
            return;
        }
        (self.is_wanted, self.tried_at) = (false, Some(now));
        let Some(upstream) = self.resolver.upstream.clone().filter(|_| self.resolver.owes_upstream()) else { return };
        let outcome = match self.ask(&*upstream, moment).await {
            Ok(outcome) => {
                self.asked_at = Some(moment);
                outcome
            }
            Err(UpstreamError::OutOfBudget { .. }) => "no_budget",
            Err(error) => {
                tracing::debug!(%error, "it could not be asked which folders have changed");
                "failed"
            }
        };
        self.resolver.metrics.count("secretier_change_polls_total", &[("outcome", outcome)]);
    }

    /// Whether this instance is the one that polls.
    async fn is_ours(&mut self) -> bool {
        let database = &self.resolver.database;
        let lasts = self.every * 2 + GRACE;
        if let Some(lease) = &self.lease {
            match database.keep_lease(lease).await {
                Ok(true) => return true,
                Ok(false) => self.lease = None,
                // Nobody can tell which instance polls, so each does it for itself.
                Err(_) => return true,
            }
        }
        match database.lease(LEASE, &process_name(), lasts).await {
            Ok(Ok(lease)) => {
                self.lease = Some(lease);
                true
            }
            Ok(Err(_)) => false,
            Err(_) => true,
        }
    }

    async fn ask(&mut self, upstream: &dyn Upstream, now: Moment) -> Result<&'static str, UpstreamError> {
        let resolver = Arc::clone(&self.resolver);
        // Every copy from before an earlier change is due for a refresh anyway.
        let unknown = resolver.policies().default_ages().refresh_after.max(self.every * 2 + GRACE);
        let passed = self.asked_at.map_or(unknown, |at| now.since(at));
        // By the earlier of the two clocks: asking twice for a change costs nothing, and this
        // machine's clock may be ahead of upstream's, or have been set.
        let earlier = now.wall().min(resolver.clock.database_now());
        let changed = upstream.changed_since(before(earlier, passed + OVERLAP), Lane::Changes).await?;
        // Without the database, only the snapshots in memory.
        let in_memory = resolver.memory.snapshots().into_iter();
        let mut held: HashMap<Tenant, Timestamp> = in_memory.map(|(tenant, at)| (tenant, at.stamp)).collect();
        for (tenant, at) in resolver.database.copied().await.unwrap_or_default() {
            let last = held.entry(tenant).or_insert(at);
            *last = at.max(*last);
        }
        // Those that are not configured here are other instances'.
        held.retain(|tenant, _| upstream.serves(tenant));
        self.look_for_gone(&held, upstream).await?;
        let shared;
        (shared, held) = held.into_iter().partition(|(tenant, _)| tenant.shared_folder().is_some());
        let is_told = changed.is_some();
        // Read before anything is queued: the reads of what has changed use the same budget. Where it
        // fails, what was told of is told again, for this poll does not count.
        let overview = self.look_over(upstream, is_told).await?;
        let has_baseline = self.seen.folders.is_some();
        let covered = self.queue_differing(overview, &held).await;
        if let Some(changed) = changed {
            let is_read = |folder: &ChangedFolder| {
                folder.at.zip(held.get(&folder.tenant)).is_some_and(|(at, copied)| at < before(*copied, SMALL_OVERLAP))
            };
            // The read of all was made later: what has changed since the one before it differs there.
            // The first time, everything of the last minutes is told of.
            self.queue_refresh(changed, |folder| match covered {
                Covered::Nothing => false,
                Covered::All | Covered::NoImports => has_baseline || is_read(folder),
            })
            .await;
        }
        let outcome = match covered {
            Covered::All if is_told => "told",
            Covered::All => "read",
            Covered::Nothing if is_told => "told",
            Covered::Nothing | Covered::NoImports => {
                self.compare(held).await?;
                "compared"
            }
        };
        // No call for the tenants' folders tells of the shared ones, of which there are few. They come last:
        // what they take of the budget, or fail with, keeps no tenant's change from being found.
        if let Err(error) = self.compare(shared).await {
            tracing::debug!(%error, "shared folders could not be compared");
        }
        Ok(outcome)
    }

    /// Reads all folders in one call.
    async fn look_over(&self, upstream: &dyn Upstream, is_told: bool) -> Result<Overview, UpstreamError> {
        let now = self.resolver.clock.running();
        if is_told && self.seen.long_until.is_some_and(|until| now < until) {
            return Ok(Overview::Untold);
        }
        let known = self.seen.validator.as_deref().filter(|_| self.seen.folders.is_some());
        upstream.overview(known, Lane::Changes).await
    }

    /// Queues reads of the folders that differ from the last read of all. The first time, there is
    /// nothing to differ from: then of those with a secret that is newer than the copy.
    async fn queue_differing(&mut self, overview: Overview, held: &HashMap<Tenant, Timestamp>) -> Covered {
        let (validator, tenants, has_imports, length) = match overview {
            Overview::Unchanged if self.seen.has_imports => return Covered::NoImports,
            Overview::Unchanged => return Covered::All,
            Overview::Untold => return Covered::Nothing,
            Overview::Folders { validator, tenants, has_imports, length } => (validator, tenants, has_imports, length),
        };
        let changed: Vec<Tenant> = match &self.seen.folders {
            Some(before) => {
                let gone = before.keys().filter(|tenant| !tenants.contains_key(*tenant));
                let differs = |(tenant, now): &(&Tenant, &Fingerprint)| before.get(*tenant) != Some(*now);
                tenants.iter().filter(differs).map(|(tenant, _)| tenant).chain(gone).cloned().collect()
            }
            None => {
                let is_newer = |(tenant, now): &(&Tenant, &Fingerprint)| {
                    held.get(*tenant).is_some_and(|copied| now.newest > Some(before(*copied, SMALL_OVERLAP)))
                };
                tenants.iter().filter(is_newer).map(|(tenant, _)| tenant.clone()).collect()
            }
        };
        let left = self.found(&changed).await;
        let mut folders = tenants;
        // One that found no room is found to differ again: it counts as it was.
        for tenant in &left {
            match self.seen.folders.as_ref().and_then(|before| before.get(tenant)) {
                Some(before) => drop(folders.insert(tenant.clone(), *before)),
                None => drop(folders.remove(tenant)),
            }
        }
        // Those left out must be sent again, though nothing changes.
        let validator = validator.filter(|_| left.is_empty());
        let long_until = (length > SHORT).then(|| self.resolver.clock.running() + LONG_EVERY);
        self.seen = Seen { validator, folders: Some(folders), has_imports, long_until };
        if has_imports { Covered::NoImports } else { Covered::All }
    }

    /// Queues reads of the folders of tenants that are held and no longer have a folder.
    async fn look_for_gone(
        &mut self,
        held: &HashMap<Tenant, Timestamp>,
        upstream: &dyn Upstream,
    ) -> Result<(), UpstreamError> {
        let before = self.resolver.tenant_directory.held();
        let listed = self.resolver.tenant_directory.anew(Lane::Changes).await?;
        let known = before.iter().flat_map(|list| &list.tenants).chain(held.keys());
        let is_gone = |tenant: &&Tenant| !listed.tenants.contains(*tenant) && upstream.serves(tenant);
        let gone: HashSet<Tenant> = known.filter(is_gone).cloned().collect();
        let new: Vec<Tenant> = gone.difference(&self.gone).cloned().collect();
        self.gone = gone;
        let left = self.found(&new).await;
        self.gone.retain(|tenant| !left.contains(tenant));
        Ok(())
    }

    /// Queues reads of the folders that have changed since they were last reported, but for those that
    /// are known otherwise.
    async fn queue_refresh(&mut self, mut changed: Vec<ChangedFolder>, is_known: impl Fn(&ChangedFolder) -> bool) {
        changed.truncate(TOLD);
        let is_new = |folder: &&ChangedFolder| {
            (folder.at.is_none() || self.told.get(&folder.tenant) != folder.at.as_ref()) && !is_known(folder)
        };
        let new: Vec<Tenant> = changed.iter().filter(is_new).map(|folder| folder.tenant.clone()).collect();
        let left = self.found(&new).await;
        // A tenant that found no room is reported again.
        let taken = changed.into_iter().filter(|folder| !left.contains(&folder.tenant));
        self.told = taken.filter_map(|folder| Some((folder.tenant, folder.at?))).collect();
    }

    /// Reads the folders whose copies are the oldest; upstream does not send an unchanged one again.
    /// Where the budget is used up it waits for more, for half of an interval in all.
    async fn compare(&mut self, held: HashMap<Tenant, Timestamp>) -> Result<(), UpstreamError> {
        let resolver = Arc::clone(&self.resolver);
        let now = resolver.clock.database_now();
        let mut held: Vec<(Timestamp, Tenant)> = held.into_iter().map(|(tenant, at)| (at, tenant)).collect();
        held.retain(|(at, tenant)| *at < now && resolver.reads_upstream(tenant));
        held.sort_unstable();
        let (mut changed, mut compared, mut patience) = (Vec::new(), Ok(()), self.every / 2);
        let mut oldest = held.into_iter().take(self.compared).map(|(_, tenant)| tenant);
        let mut next = oldest.next();
        while let Some(tenant) = next {
            match resolver.snapshot(&tenant, Lane::Changes, ForwardReason::Stale).await {
                Ok(fresh) if fresh.status == 200 && !fresh.elsewhere => changed.push(tenant),
                Ok(_) => {}
                Err(ResolveError::Upstream(UpstreamError::OutOfBudget { retry_after })) if retry_after <= patience => {
                    patience -= retry_after;
                    tokio::time::sleep(retry_after).await;
                    next = Some(tenant);
                    continue;
                }
                Err(ResolveError::Upstream(error)) if error.retry_after().is_some() => {
                    compared = Err(error);
                    break;
                }
                Err(error) => tracing::debug!(%tenant, %error, "a copy could not be compared"),
            }
            next = oldest.next();
        }
        self.count_found(changed.len());
        self.announce(&changed).await;
        compared
    }

    /// Acts upon changes that were found; returns the tenants for which there was no room.
    async fn found(&self, tenants: &[Tenant]) -> HashSet<Tenant> {
        self.count_found(tenants.len());
        let resolver = &self.resolver;
        let wanted = |tenant: &&Tenant| resolver.reads_upstream(tenant);
        let has_no_room = |tenant: &&Tenant| !resolver.queue_refresh_in(tenant, Lane::Changes);
        let left = tenants.iter().filter(wanted).filter(has_no_room).cloned().collect();
        self.announce(tenants).await;
        left
    }

    /// Tells other instances of tenants whose changes no stored copy announces.
    async fn announce(&self, tenants: &[Tenant]) {
        let apart: Vec<Tenant> = tenants.iter().filter(|tenant| self.resolver.is_kept_apart(tenant)).cloned().collect();
        for some in apart.chunks(ANNOUNCED) {
            if let Err(error) = self.resolver.database.announce_webhooks(some).await {
                tracing::debug!(%error, "other instances could not be told which folders have changed");
                return;
            }
        }
    }

    fn count_found(&self, tenants: usize) {
        let found = self.resolver.metrics.counter("secretier_changes_found_total", &[]);
        found.increment(tenants as u64);
    }
}

fn before(at: Timestamp, by: Duration) -> Timestamp {
    let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
    Timestamp::from_millis(at.as_millis().saturating_sub(by))
}
