//! Folders that are said to have changed, read sooner than they would be.
//!
//! Nothing depends on it: what is not read here is read when its copy is past `refresh_after`,
//! or is no longer in memory. So whatever is short, the budget first, is let go of.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::Notify;

use super::{ForwardReason, ResolveError, Resolver};
use crate::{phase::Phase, tenant::Tenant, tiers::upstream::Lane};

/// Tenants that wait at most. Others that are told of are left to `refresh_after`.
const WAITING: usize = 10_000;

/// Folders that are read at once.
const AT_ONCE: usize = 4;

/// How often a folder is tried that cannot be read, and how long after the first time.
const TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// How long a tenant waits at most, for the budget say: by then its copy is refreshed anyway.
const LONGEST_WAIT: Duration = Duration::from_secs(15 * 60);

/// The shortest and the longest that is waited for a tier that says when to come again.
const SHORTEST_BREAK: Duration = Duration::from_millis(100);
const LONGEST_BREAK: Duration = Duration::from_secs(60);

/// How often is looked whether somebody's time has come, while anybody waits.
const DUE_CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// Tenants whose folders are to be read, each once, at most [`WAITING`].
///
/// The interleavings that would lose a change, and what prevents them:
/// - It is told of while the folder is being read, which may see what was before: a tenant
///   is taken out before its read begins, so this puts it in again, for one more read; and
///   that joins no read that has begun ([`ForwardReason::Request`]).
/// - A read that failed puts its tenant back beside one who was told of meanwhile: it is the
///   same tenant, and is there once.
/// - Another instance hears of it when the first value is just on its way into its memory:
///   a read in the air counts as something held ([`Resolver::may_hold`]).
#[derive(Default)]
pub(super) struct RefreshQueue {
    queue: Mutex<Queue>,
    /// Somebody waits who did not.
    added: Notify,
    /// Which folders there are may have changed, or which of them.
    pub(super) look: Notify,
}

#[derive(Default)]
struct Queue {
    places: HashMap<Tenant, (Duration, u64)>,
    /// By the time of the running clock from when on each may be read, and in the order in which
    /// they came.
    order: BTreeMap<(Duration, u64), QueuedRefresh>,
    last: u64,
}

/// A folder to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct QueuedRefresh {
    tenant: Tenant,
    /// When it was told that it has changed.
    since: Duration,
    tries: u32,
}

impl RefreshQueue {
    /// Puts a tenant in, to be read from `due` on; `false` if there is no room. Who waits
    /// already keeps the place.
    fn add(&self, queued: QueuedRefresh, due: Duration) -> bool {
        let mut queue = self.lock();
        if queue.places.contains_key(&queued.tenant) {
            return true;
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

    /// Takes out who is to be read first, if the time has come.
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
    /// Has the tenant's folder read soon, by a read that begins after this, if anything is
    /// held of it by then; `false` where upstream has no part in the tenant, or too many wait.
    /// What is held stays until the folder was read.
    pub fn queue_refresh(&self, tenant: &Tenant) -> bool {
        if self.upstream.is_none() || !self.reads_upstream(tenant) {
            return false;
        }
        let now = self.clock.running();
        let has_room = self.refresh_queue.add(QueuedRefresh { tenant: tenant.clone(), since: now, tries: 0 }, now);
        if !has_room {
            self.count_refresh("full");
        }
        has_room
    }

    /// Has it looked soon which folders there are and which have changed.
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
    /// that they do not hear of a change by a snapshot that is stored.
    #[must_use]
    pub fn is_kept_apart(&self, tenant: &Tenant) -> bool {
        self.policies().has_any_in(Phase::Infisical, tenant, self.own_phase(tenant))
    }

    /// Whether anything of the tenant is in memory, or may be in a moment.
    pub(super) fn may_hold(&self, tenant: &Tenant) -> bool {
        self.memory.knows(tenant) || self.snapshots.is_in_the_air(tenant)
    }

    /// Reads a folder that is said to have changed; nothing where nobody would notice.
    async fn read_queued(&self, tenant: &Tenant) -> Option<Result<(), ResolveError>> {
        if !self.reads_upstream(tenant) {
            return None;
        }
        let may_be_copied = self.may_be_copied(tenant);
        let is_copied = async || {
            let company = self.database.company(tenant).await.ok().flatten();
            company.is_some_and(|company| company.snapshot_at.is_some())
        };
        let is_held = self.may_hold(tenant) || (may_be_copied && is_copied().await);
        if !is_held {
            return None;
        }
        Some(self.snapshot(tenant, Lane::Refresh, ForwardReason::Request).await.map(drop))
    }

    fn count_refresh(&self, outcome: &'static str) {
        self.metrics.count("secretier_refresh_queue_reads_total", &[("outcome", outcome)]);
    }
}

/// Reads the folders that wait for it, a few at a time.
pub struct RefreshWorker {
    resolver: Resolver,
    /// Nothing is read before: the budget is used up, or upstream cannot be reached.
    paused_until: Duration,
}

type Read = (QueuedRefresh, Option<Result<(), ResolveError>>);

impl RefreshWorker {
    /// For this resolver; runs for as long as it is wanted.
    #[must_use]
    pub fn new(resolver: Resolver) -> Self {
        Self { resolver, paused_until: Duration::ZERO }
    }

    /// Goes on until `stopped` completes.
    pub async fn until(mut self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut reads: FuturesUnordered<BoxFuture<'static, Read>> = FuturesUnordered::new();
        let resolver = self.resolver.clone();
        loop {
            while reads.len() < AT_ONCE
                && let Some(queued) = self.next()
            {
                reads.push(read(resolver.clone(), queued).boxed());
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

    /// Counts what came of a read, and puts those back that are worth another.
    fn settle(&mut self, queued: &QueuedRefresh, read: Option<Result<(), ResolveError>>) {
        let (resolver, now) = (&self.resolver, self.resolver.clock.running());
        let error = match read {
            None => return resolver.count_refresh("nothing_held"),
            Some(Ok(())) => return resolver.count_refresh("read"),
            Some(Err(error)) => error,
        };
        let again = match (&error, error.retry_after()) {
            // Answers, and not by waiting to be had otherwise.
            (ResolveError::Denied | ResolveError::NoUpstream, _) => None,
            // That holds for all who wait: the others would spend their tries on it.
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

async fn read(resolver: Resolver, queued: QueuedRefresh) -> Read {
    let read = resolver.read_queued(&queued.tenant).await;
    (queued, read)
}

fn waiting(resolver: &Resolver) -> f64 {
    u32::try_from(resolver.refresh_queue.len()).unwrap_or(u32::MAX).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queued(tenant: &str) -> QueuedRefresh {
        QueuedRefresh { tenant: tenant.parse().unwrap(), since: at(0), tries: 0 }
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
