//! The budget of requests a minute: checked before every request, including logins and retries.

use std::{
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use governor::{
    NotUntil, Quota, RateLimiter,
    clock::{Clock as LimiterClock, Reference as _},
    middleware::StateInformationMiddleware,
    nanos::Nanos,
    state::{InMemoryState, NotKeyed},
};
use tokio::time::Instant;

use super::super::{BudgetBook, Lane, UpstreamError};
use crate::clock::Clock;

const MINUTE: Duration = Duration::from_secs(60);

/// How often the book is written at most while a whole burst is used.
const WRITES_A_BURST: u32 = 5;

/// Enough to ask for the master keys, without which an instance does not start.
const LEFT_IN_DOUBT: u32 = 4;

/// How long a call waits for the book, and how long no call waits after it could not be written.
const SHARED_BUDGET_WAIT: Duration = Duration::from_millis(500);
const WRITE_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// The requests that may still be made, in four lanes.
///
/// A request counts when it arrives, which is up to `slack` (the timeout, which ends every call)
/// after it was admitted here. So the requests that arrive within one minute were admitted within
/// `minute + slack`, and that is the window of the limiter: a quarter of the allowance may be used
/// at once, and the rest comes back evenly over the window. That makes the allowance and no more in
/// any window, wherever it begins.
///
/// Refreshes pass a limiter of half the allowance first, a migration one of its own share, and
/// neither passes while an interactive call waits. The look for changes passes one of a quarter, or
/// that of the refreshes: with many tenants these use up theirs with copies that have not changed,
/// all the time. A migration also leaves the last part of the
/// burst alone, so that the next lookup or refresh finds some. Interactive calls wait in the order
/// of their arrival.
///
/// A migration usually runs in a process of its own, with a budget of its own, of which it uses its
/// share. While it does, this process leaves it that share, so that the two together use the
/// allowance.
///
/// The allowance may change while requests are made, and a change must not grant again what was
/// used already. So the rest is carried over, and no more: the requests that are admitted in a
/// window with any number of changes are at most the burst that was left when it began and what
/// came back since, which is the largest of the allowances. The window does not become shorter with
/// the timeout, because earlier calls may still arrive late.
///
/// A process that ends in any way leaves the process that replaces it the rest of its budget, and
/// no more. Before a call is made, a book outside the process records when all used requests will
/// have come back, including some calls to come, so that not each call needs a write. If a process
/// is killed, these count as used. Two calls do not write at once, and each continues only where
/// the book covers it; so however often processes are killed and started, their calls are those of
/// one process that used at least as much. If the book cannot be written, calls are made all the
/// same: an outage of the database must not become one of upstream.
pub(super) struct Budget<C: LimiterClock = ServiceClock> {
    clock: C,
    /// One caller at a time reads it and takes from it: two callers at once would both take what
    /// only one may, and the rest would not be known.
    allowances: Mutex<Allowances<C>>,
    is_shared: AtomicBool,
    waiting: AtomicU32,
    queue: tokio::sync::Mutex<()>,
    book: OnceLock<Book<C>>,
}

struct Book<C: LimiterClock> {
    book: Arc<dyn BudgetBook>,
    written: tokio::sync::Mutex<Written<C>>,
}

struct Written<C: LimiterClock> {
    /// When all used requests will have come back, according to the book.
    whole_at: C::Instant,
    /// When writing is tried again after a failure.
    again_at: Instant,
}

struct Allowances<C: LimiterClock> {
    whole: Allowance<C>,
    refreshes: Allowance<C>,
    changes: Allowance<C>,
    migration: Allowance<C>,
    /// The allowance beside a migration in another process; `None` where that may use all of it.
    beside: Option<Allowance<C>>,
    slack: Duration,
}

/// A number of requests in any window.
struct Allowance<C: LimiterClock> {
    limiter: RateLimiter<NotKeyed, InMemoryState, C, StateInformationMiddleware>,
    clock: C,
    burst: u32,
    period: Duration,
    /// The number that could be taken at once at the last taking, and its time.
    left: (u32, C::Instant),
}

impl<C: LimiterClock + Clone> Allowance<C> {
    fn new(requests: NonZeroU32, window: Duration, clock: &C) -> Self {
        let quota = quota(requests, window);
        let burst = quota.burst_size().get();
        Self {
            limiter: RateLimiter::direct_with_clock(quota, clock.clone()).with_middleware(),
            burst,
            period: quota.replenish_interval(),
            left: (burst, clock.now()),
            clock: clock.clone(),
        }
    }

    /// The same, with so many requests left.
    fn with_left(mut self, left: u32) -> Self {
        let left = left.min(self.burst);
        if let Some(used) = NonZeroU32::new(self.burst - left) {
            // A new limiter has its whole burst, so this is never refused.
            let _ = self.limiter.check_n(used);
        }
        self.left = (left, self.clock.now());
        self
    }

    /// Reduces the rest to so many requests at most.
    fn leave(&mut self, left: u32) {
        if let Some(used) = NonZeroU32::new(self.left().saturating_sub(left)) {
            // These are available, so this is never refused.
            let _ = self.limiter.check_n(used);
            self.left = (left, self.clock.now());
        }
    }

    /// The rest of the budget if all used requests come back in so much time.
    fn left_where_whole_in(&self, whole_in: Duration) -> u32 {
        let used = whole_in.as_nanos().div_ceil(self.period.as_nanos().max(1));
        self.burst - u32::try_from(used).unwrap_or(u32::MAX).min(self.burst)
    }

    fn take(&mut self) -> Result<(), NotUntil<C::Instant>> {
        let outcome = self.limiter.check();
        let left = outcome.as_ref().map_or(0, |state| state.remaining_burst_capacity());
        self.left = (left, self.clock.now());
        outcome.map(|_| ())
    }

    /// The requests that were used and have not come back, the burst, and the time in which one
    /// comes back.
    fn used(&self) -> (u32, u32, Duration) {
        (self.burst - self.left(), self.burst, self.period)
    }

    /// The number of requests that could be taken at once now; never more than that.
    fn left(&self) -> u32 {
        let (left, at) = self.left;
        let since: Duration = self.clock.now().duration_since(at).into();
        let refilled = since.as_nanos() / self.period.as_nanos().max(1);
        left.saturating_add(u32::try_from(refilled).unwrap_or(u32::MAX)).min(self.burst)
    }
}

impl<C: LimiterClock + Clone> Allowances<C> {
    fn new(per_minute: NonZeroU32, migration: NonZeroU32, slack: Duration, clock: &C) -> Self {
        let allowance = |requests| Allowance::new(requests, MINUTE + slack, clock);
        let beside = NonZeroU32::new(per_minute.get() - migration.get().min(per_minute.get()));
        Self {
            whole: allowance(per_minute),
            refreshes: allowance(half(per_minute)),
            changes: allowance(half(half(per_minute))),
            migration: allowance(migration),
            beside: beside.map(allowance),
            slack,
        }
    }

    /// New allowances with the same rest.
    fn changed(&self, per_minute: NonZeroU32, migration: NonZeroU32, slack: Duration) -> Self {
        let new = Self::new(per_minute, migration, slack.max(self.slack), &self.whole.clock);
        let beside = self.beside.as_ref().unwrap_or(&self.whole).left();
        Self {
            whole: new.whole.with_left(self.whole.left()),
            refreshes: new.refreshes.with_left(self.refreshes.left()),
            changes: new.changes.with_left(self.changes.left()),
            migration: new.migration.with_left(self.migration.left()),
            beside: new.beside.map(|allowance| allowance.with_left(beside)),
            slack: new.slack,
        }
    }

    fn take(&mut self, is_shared: bool) -> Result<(), NotUntil<C::Instant>> {
        if is_shared && let Some(beside) = &mut self.beside {
            beside.take()?;
        }
        self.whole.take()
    }

    /// The number of requests that a migration leaves to others: a quarter of the burst, and at
    /// least one. If that would be all of it, none: otherwise the migration could never proceed.
    fn left_to_others(&self) -> u32 {
        let burst = self.whole.burst;
        (burst / 4).max(1).min(burst - 1)
    }
}

impl<C: LimiterClock + Clone> Budget<C> {
    pub(super) fn new(per_minute: NonZeroU32, migration: NonZeroU32, slack: Duration, clock: C) -> Self {
        Self {
            allowances: Mutex::new(Allowances::new(per_minute, migration, slack, &clock)),
            is_shared: AtomicBool::new(false),
            waiting: AtomicU32::new(0),
            queue: tokio::sync::Mutex::new(()),
            book: OnceLock::new(),
            clock,
        }
    }

    /// Allows another number of requests from now on.
    pub(super) fn change(&self, per_minute: NonZeroU32, migration: NonZeroU32, slack: Duration) {
        let mut allowances = self.allowances();
        *allowances = allowances.changed(per_minute, migration, slack);
    }

    /// Continues with the rest of another process, where all that it used comes back in so much
    /// time. From now on the book records the use.
    pub(super) fn resume(&self, whole_in: Duration, book: Arc<dyn BudgetBook>) {
        let left = self.allowances().whole.left_where_whole_in(whole_in);
        self.leave(left);
        let written = Written { whole_at: self.clock.now(), again_at: Instant::now() };
        self.book.get_or_init(|| Book { book, written: tokio::sync::Mutex::new(written) });
    }

    /// Begins slowly, because the rest of another process is not known.
    pub(super) fn resume_in_doubt(&self) {
        self.leave(LEFT_IN_DOUBT);
    }

    fn leave(&self, left: u32) {
        let mut allowances = self.allowances();
        allowances.whole.leave(left);
        if let Some(beside) = &mut allowances.beside {
            beside.leave(left);
        }
    }

    /// Takes one request from the budget. An interactive call waits for it where the
    /// wait ends before `deadline`; the others never wait.
    pub(super) async fn take(&self, lane: Lane, deadline: Instant) -> Result<(), UpstreamError> {
        match lane {
            Lane::Interactive => self.take_in_turn(deadline).await?,
            Lane::Changes => self.take_for_changes()?,
            Lane::Refresh => self.take_if_spare()?,
            Lane::Migration => self.take_if_plenty()?,
        }
        self.write_down(deadline).await;
        Ok(())
    }

    /// Makes the book record the used requests, unless it does already.
    async fn write_down(&self, deadline: Instant) {
        let Some(Book { book, written }) = self.book.get() else { return };
        let mut written = written.lock().await;
        let (now, (used, burst, period)) = (self.clock.now(), self.allowances().whole.used());
        let whole_in = |used: u32| period.saturating_mul(used);
        if now + whole_in(used).into() <= written.whole_at || Instant::now() < written.again_at {
            return;
        }
        let ahead = whole_in(used + (burst / WRITES_A_BURST).max(1));
        let patience = SHARED_BUDGET_WAIT.min(deadline.saturating_duration_since(Instant::now()) / 4);
        match tokio::time::timeout(patience, book.note(ahead)).await {
            Ok(true) => written.whole_at = now + ahead.into(),
            Ok(false) | Err(_) => written.again_at = Instant::now() + WRITE_AGAIN_AFTER,
        }
    }

    /// Leaves a migration in another process its share from now on, or takes it back.
    pub(super) fn share(&self, is_shared: bool) {
        self.is_shared.store(is_shared, Ordering::Relaxed);
    }

    /// The number of requests that could be made at once now.
    pub(super) fn left(&self) -> u32 {
        self.allowances().whole.left()
    }

    fn take_for_changes(&self) -> Result<(), UpstreamError> {
        let mut allowances = self.without_waiting()?;
        if allowances.changes.take().is_err() {
            allowances.refreshes.take().map_err(|until| self.out(&until))?;
        }
        allowances.take(self.is_shared()).map_err(|until| self.out(&until))
    }

    fn take_if_spare(&self) -> Result<(), UpstreamError> {
        let mut allowances = self.without_waiting()?;
        allowances.refreshes.take().map_err(|until| self.out(&until))?;
        // If this refuses, a refresh has been taken from the half but not made: the budget is
        // short, and refreshes should feel it first.
        allowances.take(self.is_shared()).map_err(|until| self.out(&until))
    }

    fn take_if_plenty(&self) -> Result<(), UpstreamError> {
        let mut allowances = self.without_waiting()?;
        let period = allowances.whole.period;
        let missing = (allowances.left_to_others() + 1).saturating_sub(allowances.whole.left());
        if missing > 0 {
            return Err(UpstreamError::OutOfBudget { retry_after: period.saturating_mul(missing) });
        }
        allowances.migration.take().map_err(|until| self.out(&until))?;
        allowances.take(self.is_shared()).map_err(|until| self.out(&until))
    }

    /// The allowances, unless an interactive call waits for one.
    fn without_waiting(&self) -> Result<MutexGuard<'_, Allowances<C>>, UpstreamError> {
        let allowances = self.allowances();
        if self.waiting.load(Ordering::Acquire) > 0 {
            return Err(UpstreamError::OutOfBudget { retry_after: allowances.whole.period });
        }
        Ok(allowances)
    }

    async fn take_in_turn(&self, deadline: Instant) -> Result<(), UpstreamError> {
        if self.waiting.load(Ordering::Acquire) == 0 && self.take_now().is_ok() {
            return Ok(());
        }
        let ahead = self.waiting.fetch_add(1, Ordering::AcqRel);
        let _waiting = Waiting(&self.waiting);
        // Each caller ahead needs a request that has yet to come back.
        let period = self.allowances().whole.period;
        let at_least = period.saturating_mul(ahead);
        if Instant::now() + at_least > deadline {
            return Err(UpstreamError::OutOfBudget { retry_after: at_least + period });
        }
        // The queue is fair. A caller that gives up while waiting just leaves it.
        let _turn = self.queue.lock().await;
        loop {
            let Err(until) = self.take_now() else { return Ok(()) };
            let wait = until.wait_time_from(self.clock.now());
            if Instant::now() + wait > deadline {
                return Err(self.out(&until));
            }
            tokio::time::sleep(wait.max(Duration::from_millis(1))).await;
        }
    }

    fn take_now(&self) -> Result<(), NotUntil<C::Instant>> {
        self.allowances().take(self.is_shared())
    }

    fn is_shared(&self) -> bool {
        self.is_shared.load(Ordering::Relaxed)
    }

    fn allowances(&self) -> MutexGuard<'_, Allowances<C>> {
        self.allowances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn out(&self, until: &NotUntil<C::Instant>) -> UpstreamError {
        UpstreamError::OutOfBudget { retry_after: until.wait_time_from(self.clock.now()) }
    }
}

/// Decreases the number of waiting callers when it is dropped, however the wait ended.
struct Waiting<'a>(&'a AtomicU32);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Half of an allowance, and at least one.
pub(super) fn half(allowance: NonZeroU32) -> NonZeroU32 {
    NonZeroU32::new(allowance.get() / 2).unwrap_or(NonZeroU32::MIN)
}

/// At most `allowance` in any window: `burst` at once, then one a `period`, where
/// `burst + window / period` is the allowance.
fn quota(allowance: NonZeroU32, window: Duration) -> Quota {
    let burst = NonZeroU32::new(allowance.get() / 4).unwrap_or(NonZeroU32::MIN);
    let refills = u128::from(allowance.get() - burst.get());
    let window = window.as_nanos();
    // Rounded up, so that one too many never fits into the window. An allowance of one comes back
    // when the window is over.
    let period = if refills == 0 { window + 1 } else { window.div_ceil(refills) };
    let period = Duration::from_nanos(u64::try_from(period).unwrap_or(u64::MAX));
    Quota::with_period(period).unwrap_or(Quota::per_minute(NonZeroU32::MIN)).allow_burst(burst)
}

/// The process's clock, in the form that the limiter needs.
#[derive(Debug, Clone)]
pub(super) struct ServiceClock(pub(super) Clock);

impl LimiterClock for ServiceClock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        // A step of the wall clock neither gives back used requests nor delays those that are due.
        Nanos::from(self.0.running())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use futures_util::FutureExt as _;
    use governor::clock::FakeRelativeClock;

    use super::*;

    const STEP: Duration = Duration::from_millis(50);

    fn budget(per_minute: u32, clock: &FakeRelativeClock) -> Budget<FakeRelativeClock> {
        let per_minute = NonZeroU32::new(per_minute).unwrap();
        Budget::new(per_minute, half(per_minute), Duration::from_secs(2), clock.clone())
    }

    fn budget_with_share(per_minute: u32, share: u32, clock: &FakeRelativeClock) -> Budget<FakeRelativeClock> {
        let [per_minute, share] = [per_minute, share].map(|number| NonZeroU32::new(number).unwrap());
        Budget::new(per_minute, share, Duration::from_secs(2), clock.clone())
    }

    /// Asks for far more than the budget for ten minutes; returns the most that passed within any
    /// closed minute, and the number that passed in total.
    fn most_in_a_minute(clock: &FakeRelativeClock, mut passes: impl FnMut() -> bool) -> (usize, usize) {
        let (mut most, mut total, mut window) = (0, 0, VecDeque::new());
        for step in 0_u32..10 * 60 * 20 {
            let now = STEP * step;
            while passes() {
                window.push_back(now);
                total += 1;
            }
            while window.front().is_some_and(|first| now - *first > MINUTE) {
                window.pop_front();
            }
            most = most.max(window.len());
            clock.advance(STEP);
        }
        (most, total)
    }

    #[test]
    fn no_minute_sees_more_than_the_configured_requests() {
        for per_minute in [1, 2, 3, 40, 100] {
            let clock = FakeRelativeClock::default();
            let budget = budget(per_minute, &clock);
            let (most, total) = most_in_a_minute(&clock, || budget.take_now().is_ok());
            let per_minute = per_minute as usize;
            assert!(most <= per_minute, "{most} of {per_minute}");
            let refills = per_minute - (per_minute / 4).max(1);
            assert!(total >= refills * 9, "{total} in ten minutes of {per_minute}");
        }
    }

    #[test]
    fn however_often_the_allowance_changes_no_minute_sees_more_than_the_largest() {
        let number = |number| NonZeroU32::new(number).unwrap();
        for (one, other) in [(1, 2), (4, 100), (100, 40), (100, 100), (40, 1)] {
            for every in [1, 7, 40, 1100] {
                let clock = FakeRelativeClock::default();
                let budget = budget(one, &clock);
                let (mut turn, slacks) = (0_usize, [2, 10, 1]);
                let (most, total) = most_in_a_minute(&clock, || {
                    let passes = budget.take_now().is_ok();
                    if !passes {
                        turn += 1;
                        if turn % every == 0 {
                            let now = number(if turn / every % 2 == 0 { one } else { other });
                            let slack = Duration::from_secs(slacks[turn / every % 3]);
                            budget.change(now, half(now), slack);
                        }
                    }
                    passes
                });
                let largest = one.max(other) as usize;
                assert!(most <= largest, "{most} of {one} and {other}, changed every {every}");
                assert!(every < 1100 || total > 0, "{total} in all");
            }
        }
    }

    #[test]
    fn a_change_gives_back_nothing_that_was_used_and_takes_away_nothing_that_was_left() {
        let clock = FakeRelativeClock::default();
        let budget = budget(100, &clock);
        while budget.take_now().is_ok() {}
        for per_minute in [100, 400, 4000, 100] {
            let per_minute = NonZeroU32::new(per_minute).unwrap();
            budget.change(per_minute, half(per_minute), Duration::from_secs(2));
            assert_eq!(budget.left(), 0);
            assert!(budget.take_now().is_err() && budget.take_if_spare().is_err() && budget.take_if_plenty().is_err());
        }
        clock.advance(MINUTE);
        assert_eq!(budget.left(), 25);
        let per_minute = NonZeroU32::new(200).unwrap();
        budget.change(per_minute, half(per_minute), Duration::from_secs(2));
        let passed = std::iter::from_fn(|| budget.take_now().ok()).count();
        assert_eq!(passed, 25);
    }

    #[test]
    fn a_migration_in_another_process_and_everyone_here_make_the_allowance_together() {
        for (per_minute, share) in [(4, 2), (40, 10), (100, 50)] {
            let clock = FakeRelativeClock::default();
            let [here, there] = [0, 0].map(|_| budget_with_share(per_minute, share, &clock));
            here.share(true);
            let (most, total) = most_in_a_minute(&clock, || here.take_now().is_ok() || there.take_if_plenty().is_ok());
            assert!(most <= per_minute as usize && total > 0, "{most} of {per_minute}");
            here.share(false);
            let (most, _) = most_in_a_minute(&clock, || here.take_now().is_ok());
            assert!(most > (per_minute - share) as usize, "{most} of {per_minute} when it is over");
        }
    }

    #[test]
    fn refreshes_use_at_most_half_and_leave_the_rest_to_interactive_calls() {
        for per_minute in [2, 3, 40, 100] {
            let clock = FakeRelativeClock::default();
            let budget = budget(per_minute, &clock);
            let (most, total) = most_in_a_minute(&clock, || budget.take_if_spare().is_ok());
            assert!(most <= per_minute as usize / 2 && total > 0, "{most} of {per_minute}");
        }
        let clock = FakeRelativeClock::default();
        let budget = budget(100, &clock);
        let (_, interactive) = most_in_a_minute(&clock, || {
            while budget.take_if_spare().is_ok() {}
            budget.take_now().is_ok()
        });
        assert!(interactive >= 350, "{interactive} interactive calls in ten minutes");
    }

    #[test]
    fn changes_are_looked_for_however_much_is_refreshed_and_leave_a_quarter_to_interactive_calls() {
        for per_minute in [1, 2, 3, 8, 40, 100] {
            let clock = FakeRelativeClock::default();
            let budget = budget(per_minute, &clock);
            let (most, looked) = most_in_a_minute(&clock, || {
                while budget.take_if_spare().is_ok() {}
                budget.take_for_changes().is_ok()
            });
            let share = (per_minute as usize / 4).max(1);
            assert!(most <= share, "{most} of {per_minute}");
            // A quarter of the share may be used at once; the rest comes back in each of nine windows.
            let comes_back = share - (share / 4).max(1);
            assert!(looked >= 9 * comes_back, "{looked} in ten minutes of {per_minute}");
        }
        let clock = FakeRelativeClock::default();
        let budget = budget(100, &clock);
        let (_, interactive) = most_in_a_minute(&clock, || {
            while budget.take_if_spare().is_ok() {}
            while budget.take_for_changes().is_ok() {}
            budget.take_now().is_ok()
        });
        assert!(interactive >= 170, "{interactive} interactive calls in ten minutes");
    }

    #[test]
    fn a_migration_uses_at_most_its_share_and_always_gets_on() {
        for (per_minute, share) in [(1, 1), (2, 1), (3, 3), (8, 1), (40, 10), (100, 50), (100, 100)] {
            let clock = FakeRelativeClock::default();
            let budget = budget_with_share(per_minute, share, &clock);
            let (most, total) = most_in_a_minute(&clock, || budget.take_if_plenty().is_ok());
            assert!(most <= share as usize && total >= 9, "{most} and {total} of {share} of {per_minute}");
        }
    }

    #[test]
    fn while_a_migration_takes_what_it_can_get_a_refresh_and_a_lookup_find_some_at_once() {
        for per_minute in [4, 8, 40, 100] {
            let clock = FakeRelativeClock::default();
            let budget = budget_with_share(per_minute, per_minute, &clock);
            let migrate = || while budget.take_if_plenty().is_ok() {};
            // A minute and more, in which the burst is long used up.
            for _ in 0..100 {
                migrate();
                clock.advance(Duration::from_secs(1));
            }
            migrate();
            let burst = budget.allowances().whole.burst;
            let period = budget.allowances().whole.period;
            if burst > 1 {
                assert!(budget.left() > 0, "{per_minute}");
                budget.take_if_spare().unwrap();
                clock.advance(period);
                migrate();
                budget.take_now().unwrap();
            }
        }
    }

    #[test]
    fn a_migration_takes_nothing_from_who_uses_the_whole_budget() {
        let clock = FakeRelativeClock::default();
        let budget = budget_with_share(100, 100, &clock);
        let mut migrated = 0;
        let (_, interactive) = most_in_a_minute(&clock, || {
            let passes = budget.take_now().is_ok();
            migrated += usize::from(budget.take_if_plenty().is_ok());
            passes
        });
        // At the very start there is more than the reserve; after that, never.
        assert!(migrated <= 25 && interactive >= 700, "{migrated} and {interactive}");
    }

    #[test]
    fn a_migration_is_told_when_to_come_back() {
        for (per_minute, share) in [(1, 1), (8, 2), (100, 50), (100, 100)] {
            let clock = FakeRelativeClock::default();
            let budget = budget_with_share(per_minute, share, &clock);
            for _ in 0..200 {
                // At first the whole budget may be short, and then its own share.
                let passes = (0..3).any(|_| match budget.take_if_plenty() {
                    Ok(()) => true,
                    Err(error) => {
                        clock.advance(error.retry_after().unwrap());
                        false
                    }
                });
                assert!(passes, "{share} of {per_minute}");
            }
        }
    }

    #[tokio::test]
    async fn an_interactive_call_waits_only_if_the_wait_ends_in_time() {
        let clock = FakeRelativeClock::default();
        let budget = budget(6000, &clock);
        while budget.take_now().is_ok() {}
        assert_eq!(budget.left(), 0);
        let error = budget.take(Lane::Interactive, Instant::now()).await.expect_err("it takes longer than that");
        assert!(error.retry_after().unwrap() > Duration::from_millis(10), "{error:?}");

        let later = Instant::now() + Duration::from_secs(600);
        let (taken, ()) = tokio::join!(budget.take(Lane::Interactive, later), async {
            for lane in [Lane::Changes, Lane::Refresh, Lane::Migration] {
                assert!(budget.take(lane, later).await.is_err(), "{lane:?} must not overtake");
            }
            clock.advance(Duration::from_secs(1));
            for lane in [Lane::Changes, Lane::Refresh, Lane::Migration] {
                assert!(budget.take(lane, later).await.is_err(), "{lane:?}: not even when there is some again");
            }
        });
        taken.unwrap();
        budget.take(Lane::Refresh, later).await.unwrap();
    }

    #[tokio::test]
    async fn a_long_queue_is_refused_at_once_and_those_who_leave_it_do_not_count() {
        let clock = FakeRelativeClock::default();
        let budget = budget(40, &clock);
        let deadline = Instant::now() + Duration::from_secs(5);
        while budget.take_now().is_ok() {}
        let mut waiters: Vec<_> = (0..200).map(|_| Box::pin(budget.take(Lane::Interactive, deadline))).collect();
        let refused = waiters.iter_mut().filter_map(|waiter| waiter.as_mut().now_or_never()).count();
        assert!((197..=199).contains(&refused), "{refused}");
        drop(waiters);
        assert_eq!(budget.waiting.load(Ordering::Acquire), 0);
    }

    #[test]
    fn no_step_of_the_wall_clock_gives_anything_back_or_keeps_it_back() {
        const DAYS: i64 = 3 * 24 * 60 * 60 * 1000;
        for step in [1000, -1000, 3_600_000, -3_600_000, DAYS, -DAYS] {
            let clock = Clock::system();
            let per_minute = NonZeroU32::new(100).unwrap();
            let budget = Budget::new(per_minute, half(per_minute), Duration::from_secs(2), ServiceClock(clock.clone()));
            while budget.take_now().is_ok() {}
            clock.step(step);
            let burst = budget.allowances().whole.burst;
            assert!(budget.left() < burst / 2 && budget.take(Lane::Migration, Instant::now()).now_or_never().is_some());
            while budget.take_now().is_ok() {}
            clock.advance(Duration::from_secs(70));
            assert_eq!(budget.left(), burst, "{step}");
            let again = std::iter::from_fn(|| budget.take_now().ok()).count();
            assert!((25..30).contains(&again), "{step}: {again}");
        }
    }

    #[test]
    fn what_is_left_grows_back() {
        let clock = FakeRelativeClock::default();
        let budget = budget(100, &clock);
        assert_eq!(budget.left(), 25);
        while budget.take_now().is_ok() {}
        assert_eq!(budget.left(), 0);
        clock.advance(Duration::from_secs(10));
        assert_eq!(budget.left(), 12);
        clock.advance(Duration::from_secs(600));
        assert_eq!(budget.left(), 25);
    }
}
