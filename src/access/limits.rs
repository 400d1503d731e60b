//! Rate limits for each token and each peer, and growing delays for peers that send
//! invalid tokens.

use std::{
    convert::Infallible,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use governor::{
    Quota, RateLimiter,
    middleware::NoOpMiddleware,
    nanos::Nanos,
    state::{InMemoryState, NotKeyed},
};
use quick_cache::sync::Cache;

use super::{Peer, peer::PeerId};
use crate::{budget::Holds, clock::Clock};

/// The limit that holds a request back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Requests a second with one token.
    Token,
    /// Requests a second from one peer.
    Peer,
    /// Invalid tokens from one peer.
    Failures,
}

impl Limit {
    /// The word in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Peer => "peer",
            Self::Failures => "failures",
        }
    }
}

/// The time by the running clock, as the requests tell it: each has read the clock once, and once
/// is enough. No step of the wall clock lets a burst through, or holds anybody back.
///
/// Of two at the same moment, one may be measured by the other's time. Neither is ahead of the
/// clock, so no rate is exceeded by it.
#[derive(Debug, Clone)]
struct Told(Arc<AtomicU64>);

impl governor::clock::Clock for Told {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Nanos::new(self.0.load(Ordering::Relaxed))
    }
}

/// A rate limiter.
#[derive(Debug)]
pub(super) struct Rate {
    limiter: RateLimiter<NotKeyed, InMemoryState, Told, NoOpMiddleware<Nanos>>,
    told: Told,
}

impl Rate {
    pub(super) fn new(quota: Quota, now: Duration) -> Self {
        let told = Told(Arc::new(AtomicU64::new(nanos(now))));
        Self { limiter: RateLimiter::direct_with_clock(quota, told.clone()), told }
    }

    /// Admits one more, or returns how long to wait.
    pub(super) fn check(&self, now: Duration) -> Result<(), Duration> {
        self.told.0.store(nanos(now), Ordering::Relaxed);
        self.limiter.check().map_err(|not_until| not_until.wait_time_from(governor::clock::Clock::now(&self.told)))
    }
}

fn nanos(now: Duration) -> u64 {
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// A peer with its account: looked up once a connection, and held by it.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The address or process that it comes from.
    pub peer: Peer,
    pub(super) account: Arc<Account>,
}

impl Caller {
    /// The amounts that the peer's requests without a valid token hold at once.
    #[must_use]
    pub fn holds(&self) -> &Holds {
        &self.account.holds
    }
}

/// The state that is kept of a peer.
#[derive(Debug)]
pub(super) struct Account {
    rate: ArcSwap<Counted>,
    failures: Mutex<Failures>,
    holds: Holds,
}

/// A peer's rate, by the quota with this number.
#[derive(Debug)]
struct Counted {
    number: u64,
    rate: Option<Rate>,
}

impl Account {
    /// Admits one more request, or returns how long to wait. A connection keeps its peer's
    /// account, so a changed quota is noticed here.
    fn request(&self, peers: &Peers, now: Duration) -> Result<(), Duration> {
        let counted = self.rate.load();
        if counted.number == peers.number.load(Ordering::Acquire) {
            return counted.check(now);
        }
        // Of two requests at once, one may begin a rate that the other replaces: that admits
        // one request more, once.
        let anew = Arc::new(peers.counted());
        self.rate.store(Arc::clone(&anew));
        anew.check(now)
    }

    /// Admits an attempt with a token that is not known to be valid, or returns how long to wait.
    pub(super) fn attempt(&self, now: Duration) -> Result<(), Duration> {
        self.failures().attempt(now)
    }

    /// Notes that a token was invalid.
    pub(super) fn failed(&self, now: Duration) {
        self.failures().failed(now);
    }

    fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counted {
    fn check(&self, now: Duration) -> Result<(), Duration> {
        self.rate.as_ref().map_or(Ok(()), |rate| rate.check(now))
    }
}

/// A peer's attempts with invalid tokens.
#[derive(Debug, Default)]
struct Failures {
    count: u32,
    /// When the last of them, or of the attempts that were held back, came.
    last_at: Option<Duration>,
    /// No attempt is admitted before.
    held_until: Option<Duration>,
    /// The delay after the next attempt that fails.
    delay: Duration,
}

impl Failures {
    /// Failures without a delay: a client with yesterday's token, a mistyped one.
    const FREE: u32 = 10;
    const FIRST_DELAY: Duration = Duration::from_secs(1);
    const LONGEST_DELAY: Duration = Duration::from_secs(60);
    /// After this long without a failure, all are forgotten.
    const FORGOTTEN_AFTER: Duration = Duration::from_secs(2 * 60);

    fn attempt(&mut self, now: Duration) -> Result<(), Duration> {
        self.forget(now);
        let Some(until) = self.held_until else { return Ok(()) };
        self.last_at = Some(now);
        if now < until {
            return Err(until - now);
        }
        // One is admitted; others beside it wait out the next delay.
        self.hold(now);
        Ok(())
    }

    fn failed(&mut self, now: Duration) {
        self.forget(now);
        self.last_at = Some(now);
        self.count = self.count.saturating_add(1);
        if self.count >= Self::FREE && self.held_until.is_none() {
            self.hold(now);
        }
    }

    fn hold(&mut self, now: Duration) {
        self.delay = (self.delay * 2).clamp(Self::FIRST_DELAY, Self::LONGEST_DELAY);
        self.held_until = Some(now + self.delay);
    }

    fn forget(&mut self, now: Duration) {
        if self.last_at.is_some_and(|last| now.saturating_sub(last) >= Self::FORGOTTEN_AFTER) {
            *self = Self::default();
        }
    }
}

/// The most recent peers; the one that was away longest makes room for a new one.
pub(super) struct Peers {
    accounts: ArcSwap<Cache<PeerId, Arc<Account>>>,
    /// The most peers that are remembered.
    capacity: AtomicUsize,
    /// The quota of each, and how often it was changed.
    quota: ArcSwap<(u64, Option<Quota>)>,
    /// The same number again: a request reads only this.
    number: AtomicU64,
    clock: Clock,
}

impl Peers {
    pub(super) fn new(capacity: usize, quota: Option<Quota>, clock: Clock) -> Self {
        let quota = ArcSwap::from_pointee((0, quota));
        let accounts = ArcSwap::from_pointee(Cache::new(capacity));
        Self { accounts, capacity: AtomicUsize::new(capacity), quota, number: AtomicU64::new(0), clock }
    }

    /// Sets how many peers are remembered, and the quota of each. A changed quota counts from the
    /// next request on, starting full. Only one caller may do this at a time.
    pub(super) fn change(&self, capacity: usize, quota: Option<Quota>) {
        if self.capacity.swap(capacity, Ordering::Relaxed) != capacity {
            // A table that shrinks keeps the peers that it knows best and no new ones, so it is
            // made anew. A peer that comes for the first time just now may be forgotten once.
            let accounts = Cache::new(capacity);
            self.accounts.load().iter().for_each(|(id, account)| accounts.insert(id, account));
            self.accounts.store(Arc::new(accounts));
        }
        let (number, before) = **self.quota.load();
        if before != quota {
            self.quota.store(Arc::new((number + 1, quota)));
            // After the quota: a reader that sees the number finds the quota.
            self.number.store(number + 1, Ordering::Release);
        }
    }

    /// Admits one more request of this caller, or returns how long to wait.
    pub(super) fn request(&self, caller: &Caller, now: Duration) -> Result<(), Duration> {
        caller.account.request(self, now)
    }

    fn counted(&self) -> Counted {
        let (number, quota) = **self.quota.load();
        Counted { number, rate: quota.map(|quota| Rate::new(quota, self.clock.running())) }
    }

    pub(super) fn caller(&self, peer: Peer) -> Caller {
        let new = || {
            let rate = ArcSwap::from_pointee(self.counted());
            Ok::<_, Infallible>(Arc::new(Account { rate, failures: Mutex::default(), holds: Holds::default() }))
        };
        let account = match self.accounts.load().get_or_insert_with(&PeerId::from(peer), new) {
            Ok(account) => account,
            Err(never) => match never {},
        };
        Caller { peer, account }
    }

    pub(super) fn len(&self) -> usize {
        self.accounts.load().len()
    }
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peers").field("known", &self.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, num::NonZeroU32};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MINUTE: Duration = Duration::from_secs(60);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(1000 + seconds)
    }

    #[test]
    fn failures_are_free_at_first_and_then_cost_more_and_more_time() {
        let mut failures = Failures::default();
        for _ in 0..Failures::FREE {
            assert_eq!(failures.attempt(at(0)), Ok(()));
            failures.failed(at(0));
        }
        let mut now = 0;
        for delay in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(failures.attempt(at(now)), Err(SECOND * delay), "after {now} seconds");
            now += u64::from(delay);
            assert_eq!(failures.attempt(at(now)), Ok(()), "one is let through");
            failures.failed(at(now));
            assert!(failures.attempt(at(now)).is_err(), "and no other");
        }
    }

    #[test]
    fn no_step_of_the_wall_clock_lets_more_pass_or_holds_anybody_back() {
        for step in [1000, -1000, 3_600_000, -3_600_000] {
            let clock = Clock::system();
            let rate = Rate::new(Quota::per_minute(NonZeroU32::new(2).unwrap()), clock.running());
            let check = || rate.check(clock.running());
            let passes = || std::iter::from_fn(|| check().ok()).count();
            assert_eq!(passes(), 2);
            clock.step(step);
            assert_eq!(passes(), 0, "{step}");
            clock.advance(2 * MINUTE);
            assert_eq!(passes(), 2, "{step}");
        }
    }

    #[test]
    fn only_quiet_time_heals() {
        let mut failures = Failures::default();
        for _ in 0..Failures::FREE {
            failures.failed(at(0));
        }
        assert!(failures.attempt(at(0)).is_err());
        let quiet = Failures::FORGOTTEN_AFTER.as_secs();
        assert_eq!(failures.attempt(at(quiet)), Ok(()));
        failures.failed(at(quiet));
        assert_eq!(failures.attempt(at(quiet)), Ok(()), "all is forgotten");
    }

    #[test]
    fn a_rate_lets_its_burst_through_and_tells_how_long_to_wait() {
        let clock = Clock::system();
        let rate = Rate::new(Quota::per_second(NonZeroU32::new(2).unwrap()), clock.running());
        let check = || rate.check(clock.running());
        assert_eq!((check(), check()), (Ok(()), Ok(())));
        let wait = check().unwrap_err();
        assert!(wait > Duration::ZERO && wait <= SECOND / 2, "{wait:?}");
        clock.advance(wait);
        assert_eq!(check(), Ok(()));
    }

    #[test]
    fn another_quota_counts_for_callers_that_are_here_already_and_the_same_one_gives_nothing_back() {
        let per_second = |number| Some(Quota::per_second(NonZeroU32::new(number).unwrap()));
        let peers = Peers::new(100, per_second(2), Clock::system());
        let caller = peers.caller(Peer::Ip(IpAddr::from([192, 0, 2, 1])));
        let passes = || (0..10).filter(|_| peers.request(&caller, peers.clock.running()).is_ok()).count();
        assert_eq!(passes(), 2);
        peers.change(100, per_second(2));
        assert_eq!(passes(), 0, "nothing has changed");
        peers.change(100, per_second(3));
        assert_eq!(passes(), 3);
        peers.change(100, None);
        assert_eq!(passes(), 10);
        peers.change(100, per_second(1));
        assert_eq!(passes(), 1);
    }

    #[test]
    fn the_table_of_peers_is_bounded_and_a_peer_is_whoever_can_have_the_address() {
        let peers = Peers::new(100, None, Clock::system());
        for number in 0..10_000_u32 {
            peers.caller(Peer::Ip(IpAddr::from(number.to_be_bytes())));
        }
        assert!(peers.len() <= 100, "{}", peers.len());
        let known = peers.caller(Peer::Ip(IpAddr::from([192, 0, 2, 1])));
        peers.change(200, None);
        let again = peers.caller(known.peer);
        assert!(Arc::ptr_eq(&known.account, &again.account), "whom it knows, it goes on knowing");
        peers.change(50, None);
        assert!(peers.len() <= 50, "{}", peers.len());
        let same = |one: &str, other: &str| {
            let account = |address: &str| peers.caller(Peer::Ip(address.parse().unwrap())).account;
            Arc::ptr_eq(&account(one), &account(other))
        };
        assert!(same("2001:db8::1", "2001:db8::ffff:1") && !same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(same("192.0.2.1", "::ffff:192.0.2.1") && !same("192.0.2.1", "192.0.2.2"));
        for ours in ["127.0.0.2", "127.255.255.254", "::1", "::ffff:127.9.9.9"] {
            assert!(same("127.0.0.1", ours) && !same("192.0.2.1", ours), "{ours}");
        }
    }
}
