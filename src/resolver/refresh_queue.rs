//! Folders that are reported to have changed, read sooner than they otherwise would be.
//!
//! Nothing depends on it: a folder that is not read here is read when its copy is past
//! `refresh_after`, or is no longer in memory. So when the budget, or anything else, is short,
//! the entry is dropped.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::Notify;

use super::{ForwardReason, ResolveError, Resolver};
use crate::{phase::Phase, tenant::Tenant, tiers::upstream::Lane};

/// The most tenants that wait. Further ones are left to `refresh_after`.
const WAITING: usize = 10_000;

/// The most folders that are read at once.
const AT_ONCE: usize = 4;

/// How often an unreadable folder is tried, and the pause after the first time.
const TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest that a tenant waits, for budget for example: by then its copy is refreshed anyway.
const LONGEST_WAIT: Duration = Duration::from_secs(15 * 60);

/// The shortest and the longest wait for a tier that says when to come again.
const SHORTEST_BREAK: Duration = Duration::from_millis(100);
const LONGEST_BREAK: Duration = Duration::from_secs(60);

/// How often the queue is checked for entries that are due, while it has any.
const DUE_CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// Tenants whose folders are to be read, each once, at most [`WAITING`].
///
/// The interleavings that would lose a change, and what prevents them:
/// - It is reported while the folder is being read, and that read may see the older state: a
///   tenant is taken out before its read begins, so the report puts it in again for one more
///   read, which joins no read that has begun ([`ForwardReason::Request`]).
/// - A read that failed puts its tenant back when a report has put it in meanwhile: it is the
///   same tenant, and is in the queue once.
/// - Another instance hears of it while the first value is on its way into that instance's
///   memory: a read in flight counts as something held ([`Resolver::may_hold`]).
#[derive(Default)]
pub(super) struct RefreshQueue {
    queue: Mutex<Queue>,
    /// Signals that an entry was added.
    added: Notify,
    /// Signals that the list of folders, or some of the folders, may have changed.
    pub(super) look: Notify,
}

#[derive(Default)]
struct Queue {
    places: HashMap<Tenant, (Duration, u64)>,
    /// By the time from when on each may be read, by the running clock, and then in order of
    /// arrival.
    order: BTreeMap<(Duration, u64), QueuedRefresh>,
    last: u64,
}

/// A folder to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct QueuedRefresh {
    tenant: Tenant,
    /// When the change was reported.
    since: Duration,
    tries: u32,
    lane: Lane,
}

impl RefreshQueue {
    /// Puts a tenant in, to be read from `due` on; `false` if there is no room. A tenant that
    /// waits already keeps its place, unless a change was found that it was only told of so far; either
    /// way it has the tries and the time of the younger report.
    fn add(&self, queued: QueuedRefresh, due: Duration) -> bool {
        let mut queue = self.lock();
        let (mut queued, mut due) = (queued, due);
        if let Some(place) = queue.places.remove(&queued.tenant)
            && let Some(waits) = queue.order.remove(&place)
        {
            let goes_ahead = queued.lane == Lane::Changes && waits.lane != Lane::Changes;
            queued.since = queued.since.max(waits.since);
            queued.tries = queued.tries.min(waits.tries);
            if !goes_ahead {
                queued.lane = waits.lane;
                queue.places.insert(queued.tenant.clone(), place);
                queue.order.insert(place, queued);
                return true;
            }
            due = due.min(place.0);
        }
        if queue.places.len() >= WAITING {
            return false;
        }
        queue.last += 1;
        let place = (due, queue.last);
        queue.places.insert(queued.tenant.clone(), place);
        queue.order.insert(place, queued);
        drop(queue);
        self.added.notify_one();
        true
    }

    /// Takes out the first entry, if it is due.
    fn take(&self, now: Duration) -> Option<QueuedRefresh> {
        let mut queue = self.lock();
        let first = queue.order.first_entry().filter(|first| first.key().0 <= now)?;
        let queued = first.remove();
        queue.places.remove(&queued.tenant);
        Some(queued)
    }

    fn len(&self) -> usize {
        self.lock().places.len()
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Resolver {
    /// Queues a read of the tenant's folder that begins after this call, if anything of the tenant
    /// is held by then; `false` where upstream has no part in the tenant, or the queue is full.
    /// Held entries stay until the folder was read.
    pub fn queue_refresh(&self, tenant: &Tenant) -> bool {
        self.queue_refresh_in(tenant, Lane::Refresh)
    }

    /// The same for a read in this lane. One of a change that was found goes ahead of those that were
    /// only told of.
    pub(super) fn queue_refresh_in(&self, tenant: &Tenant, lane: Lane) -> bool {
        if self.upstream.is_none() || !self.reads_upstream(tenant) {
            return false;
        }
        let now = self.clock.running();
        let due = if lane == Lane::Changes { Duration::ZERO } else { now };
        let has_room =
            self.refresh_queue.add(QueuedRefresh { tenant: tenant.clone(), since: now, tries: 0, lane }, due);
        if !has_room {
            self.count_refresh("full");
        }
        has_room
    }

    /// Requests an early poll of which folders exist and which have changed.
    pub fn look_soon(&self) {
        self.refresh_queue.look.notify_one();
    }

    /// Whether upstream owns any of the tenant's secrets.
    pub(super) fn reads_upstream(&self, tenant: &Tenant) -> bool {
        let own = self.own_phase(tenant);
        [Phase::Infisical, Phase::Hybrid].into_iter().any(|phase| self.policies().has_any_in(phase, tenant, own))
    }

    /// Whether the database may have a copy of any of the tenant's secrets.
    pub(super) fn may_be_copied(&self, tenant: &Tenant) -> bool {
        self.policies().has_any_in(Phase::Hybrid, tenant, self.own_phase(tenant))
    }

    /// Whether other instances may hold something of the tenant that the database has not, so
    /// that a stored snapshot does not tell them of a change.
    #[must_use]
    pub fn is_kept_apart(&self, tenant: &Tenant) -> bool {
        self.policies().has_any_in(Phase::Infisical, tenant, self.own_phase(tenant))
    }

    /// Whether anything of the tenant is in memory, or is being read.
    pub(super) fn may_hold(&self, tenant: &Tenant) -> bool {
        self.memory.knows(tenant) || self.snapshots.is_in_the_air(tenant)
    }

    /// Reads a folder that is reported to have changed; `None` where nothing of it is held.
    async fn read_queued(self: &Arc<Self>, tenant: &Tenant, lane: Lane) -> Option<Result<(), ResolveError>> {
        if !self.reads_upstream(tenant) {
            return None;
        }
        let may_be_copied = self.may_be_copied(tenant);
        // Where the database does not say, it may be: the read brings what is to be forgotten.
        let is_copied = async || match self.database.company(tenant).await {
            Ok(company) => company.is_some_and(|company| company.snapshot_at.is_some()),
            Err(_) => true,
        };
        let is_held = self.may_hold(tenant) || (may_be_copied && is_copied().await);
        if !is_held {
            return None;
        }
        Some(self.snapshot(tenant, lane, ForwardReason::Request).await.map(drop))
    }

    fn count_refresh(&self, outcome: &'static str) {
        self.metrics.count("secretier_refresh_queue_reads_total", &[("outcome", outcome)]);
    }
}

/// Reads the folders in the queue, a few at a time.
pub struct RefreshWorker {
    resolver: Arc<Resolver>,
    /// No read begins before this: the budget is used up, or upstream cannot be reached.
    paused_until: Duration,
}

type Read = (QueuedRefresh, Option<Result<(), ResolveError>>);

impl RefreshWorker {
    /// Builds the worker of this resolver.
    #[must_use]
    pub fn new(resolver: Arc<Resolver>) -> Self {
        Self { resolver, paused_until: Duration::ZERO }
    }

    /// Runs until `stopped` completes.
    pub async fn until(mut self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut reads: FuturesUnordered<BoxFuture<'static, Read>> = FuturesUnordered::new();
        let resolver = Arc::clone(&self.resolver);
        loop {
            while reads.len() < AT_ONCE
                && let Some(queued) = self.next()
            {
                reads.push(read(Arc::clone(&resolver), queued).boxed());
            }
            resolver.metrics.gauge("secretier_refresh_queue_waiting", &[], waiting(&resolver));
            let looks_again = async {
                match resolver.refresh_queue.len() {
                    0 => std::future::pending().await,
                    _ => tokio::time::sleep(DUE_CHECK_INTERVAL).await,
                }
            };
            tokio::select! {
                () = &mut stopped => break,
                Some((queued, read)) = reads.next() => self.settle(&queued, read),
                () = resolver.refresh_queue.added.notified(), if reads.len() < AT_ONCE => {}
                () = looks_again, if reads.len() < AT_ONCE => {}
            }
        }
    }

    fn next(&self) -> Option<QueuedRefresh> {
        let now = self.resolver.clock.running();
        (now >= self.paused_until).then(|| self.resolver.refresh_queue.take(now)).flatten()
    }

    /// Counts the outcome of a read, and puts back an entry that is worth another try.
    fn settle(&mut self, queued: &QueuedRefresh, read: Option<Result<(), ResolveError>>) {
        let (resolver, now) = (&self.resolver, self.resolver.clock.running());
        let error = match read {
            None => return resolver.count_refresh("nothing_held"),
            Some(Ok(())) => return resolver.count_refresh("read"),
            Some(Err(error)) => error,
        };
        let again = match (&error, error.retry_after()) {
            // These answers do not change by waiting.
            (ResolveError::Denied { .. } | ResolveError::NoUpstream, _) => None,
            // This holds for every entry: the others would spend their tries on it.
            (_, Some(pause)) => {
                let until = now + pause.clamp(SHORTEST_BREAK, LONGEST_BREAK);
                self.paused_until = self.paused_until.max(until);
                Some((queued.clone(), until))
            }
            (_, None) => {
                let pause = FIRST_PAUSE * 2_u32.saturating_pow(queued.tries.min(TRIES));
                let tries = queued.tries + 1;
                (tries < TRIES).then(|| (QueuedRefresh { tries, ..queued.clone() }, now + pause))
            }
        };
        let again = again.filter(|(queued, _)| now.saturating_sub(queued.since) < LONGEST_WAIT);
        match again {
            Some((queued, due)) => drop(resolver.refresh_queue.add(queued, due)),
            None => {
                tracing::debug!(tenant = %queued.tenant, %error, "a folder that is said to have changed is left to be read in its time");
                resolver.count_refresh("left");
            }
        }
    }
}

async fn read(resolver: Arc<Resolver>, queued: QueuedRefresh) -> Read {
    let read = resolver.read_queued(&queued.tenant, queued.lane).await;
    (queued, read)
}

fn waiting(resolver: &Resolver) -> f64 {
    u32::try_from(resolver.refresh_queue.len()).unwrap_or(u32::MAX).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queued(tenant: &str) -> QueuedRefresh {
        QueuedRefresh { tenant: tenant.parse().unwrap(), since: at(0), tries: 0, lane: Lane::Refresh }
    }

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_tenant_waits_once_and_in_the_order_of_time() {
        let queue = RefreshQueue::default();
        for (tenant, due) in [("late", 9), ("first", 1), ("second", 1), ("first", 0), ("late", 0)] {
            assert!(queue.add(queued(tenant), at(due)));
        }
        assert_eq!(queue.len(), 3);
        let taken: Vec<_> = std::iter::from_fn(|| queue.take(at(8))).map(|queued| queued.tenant.to_string()).collect();
        assert_eq!(taken, ["first", "second"]);
        assert_eq!((queue.take(at(9)), queue.len()), (Some(queued("late")), 0));
        assert!(queue.add(queued("late"), at(0)), "who was taken out may come again");
        assert_eq!(queue.len(), 1);
    }

    #[test]
    fn a_change_that_was_found_goes_ahead_even_if_its_tenant_waits_already() {
        let queue = RefreshQueue::default();
        for (tenant, due) in [("first", 1), ("second", 2)] {
            assert!(queue.add(queued(tenant), at(due)));
        }
        let ahead = QueuedRefresh { lane: Lane::Changes, ..queued("second") };
        assert!(queue.add(ahead.clone(), at(0)));
        // A read of it that has failed is put back, and a younger report of it comes.
        assert!(queue.add(QueuedRefresh { tries: 5, ..ahead.clone() }, at(9)));
        assert!(queue.add(QueuedRefresh { since: at(7), ..queued("second") }, at(7)));
        let merged = QueuedRefresh { since: at(7), ..ahead };
        assert_eq!((queue.len(), queue.take(at(0))), (2, Some(merged)));
        assert_eq!((queue.take(at(1)), queue.take(at(9))), (Some(queued("first")), None));
    }

    #[test]
    fn there_is_room_for_so_many_and_no_more() {
        let queue = RefreshQueue::default();
        for number in 0..WAITING {
            assert!(queue.add(queued(&format!("t{number}")), at(0)));
        }
        assert!(!queue.add(queued("one-more"), at(0)));
        assert!(queue.add(queued("t0"), at(0)), "who waits already takes no more room");
        assert_eq!(queue.len(), WAITING);
    }
}
