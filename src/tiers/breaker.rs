//! A circuit breaker, so that a tier that is down costs its callers nothing.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::clock::Clock;

/// Closed while calls succeed. After `threshold` consecutive failures it opens: calls are refused
/// for a period that doubles, with jitter, up to `longest`. Then one trial call is admitted; its
/// outcome closes or re-opens the breaker.
///
/// One short lock guards the state, so `admit` decides for one caller at a time: two callers that
/// arrive as the period ends cannot both make the trial call.
pub struct Breaker {
    clock: Clock,
    threshold: u32,
    shortest: Duration,
    longest: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    failures: u32,
    /// By the running clock: a step of the wall clock neither opens nor closes the breaker.
    open_until: Option<Duration>,
    trying_since: Option<Duration>,
}

/// Permission to make one call; its outcome must be reported. A permit that is dropped without a
/// report says nothing about the tier: the call was not made, or its caller went away, and callers
/// that come and go must not open the breaker for everybody. If it was for the trial call, another
/// caller may make that.
#[must_use]
#[derive(Debug)]
pub struct Permit<'a> {
    breaker: &'a Breaker,
    kind: Kind,
}

/// The purpose of a permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A call through a closed breaker.
    Usual,
    /// The one trial call through an open breaker, since then.
    Try(Duration),
    /// A call that needs no permission.
    Probe,
    /// The outcome has been reported already.
    Settled,
}

/// The breaker is open; calls may be tried again after the given time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// Time until a call is let through again.
    pub retry_after: Duration,
}

impl Breaker {
    /// Opens after `threshold` consecutive failures, for `shortest` and then ever longer, up to
    /// `longest`.
    #[must_use]
    pub fn new(clock: Clock, threshold: u32, shortest: Duration, longest: Duration) -> Self {
        Self { clock, threshold, shortest, longest, state: Mutex::default() }
    }

    /// Admits a call, or returns how long to stay away.
    ///
    /// # Errors
    /// [`Open`] while the tier is considered down.
    pub fn admit(&self) -> Result<Permit<'_>, Open> {
        let now = self.clock.running();
        let mut state = self.lock();
        self.refusal(&state, now)?;
        if state.open_until.is_none() {
            return Ok(Permit { breaker: self, kind: Kind::Usual });
        }
        state.trying_since = Some(now);
        Ok(Permit { breaker: self, kind: Kind::Try(now) })
    }

    /// The result that [`Self::admit`] would have now, without taking a permit.
    ///
    /// # Errors
    /// [`Open`] while the tier is considered down.
    pub fn check(&self) -> Result<(), Open> {
        self.refusal(&self.lock(), self.clock.running())
    }

    /// Lets the trial call be made now: the tier is said to answer again. Where that call fails
    /// after all, the period grows as if it had been made in its time.
    pub fn try_now(&self) {
        let mut state = self.lock();
        if state.open_until.is_some() {
            state.open_until = Some(self.clock.running());
        }
    }

    /// Admits a call in any state: for a poll with a schedule of its own, whose outcome closes or
    /// re-opens the breaker like any other's.
    pub fn probe(&self) -> Permit<'_> {
        Permit { breaker: self, kind: Kind::Probe }
    }

    /// Whether calls are refused, or were until the trial call that comes next.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.lock().open_until.is_some()
    }

    fn refusal(&self, state: &State, now: Duration) -> Result<(), Open> {
        let Some(until) = state.open_until else { return Ok(()) };
        if now < until {
            return Err(Open { retry_after: until.saturating_sub(now) });
        }
        // One caller makes the trial call; the others stay away until it has reported the outcome,
        // or until it has taken so long that it must have been lost.
        match state.trying_since {
            Some(since) if now.saturating_sub(since) < self.longest => Err(Open { retry_after: self.shortest }),
            _ => Ok(()),
        }
    }

    fn settle(&self, kind: Kind, failed: bool) {
        let mut state = self.lock();
        if !failed {
            *state = State::default();
            return;
        }
        // Calls that were in progress when the breaker opened fail one after the other. They bring
        // no news, and must not each double the period.
        if state.open_until.is_some() && kind == Kind::Usual {
            return;
        }
        state.failures = state.failures.saturating_add(1);
        state.trying_since = None;
        if state.failures >= self.threshold {
            let doublings = (state.failures - self.threshold).min(16);
            let wait = self.shortest.saturating_mul(1 << doublings).min(self.longest);
            // Up to a quarter more, so that many instances do not try at the same time.
            let wait = wait.mul_f64(1.0 + rand::random::<f64>() / 4.0);
            state.open_until = Some(self.clock.running() + wait);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Breaker").field("open", &self.is_open()).finish_non_exhaustive()
    }
}

impl Permit<'_> {
    /// Whether the permit is still valid, for a call that had to wait after it was given.
    ///
    /// # Errors
    /// [`Open`] where the breaker has opened since.
    pub fn check(&self) -> Result<(), Open> {
        match self.kind {
            Kind::Usual => self.breaker.check(),
            Kind::Try(_) | Kind::Probe | Kind::Settled => Ok(()),
        }
    }

    /// The tier answered, even if the answer was a refusal.
    pub fn succeeded(mut self) {
        self.settle(false);
    }

    /// The tier did not answer, or answered that it is broken.
    pub fn failed(mut self) {
        self.settle(true);
    }

    fn settle(&mut self, failed: bool) {
        let kind = std::mem::replace(&mut self.kind, Kind::Settled);
        self.breaker.settle(kind, failed);
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let Kind::Try(since) = self.kind else { return };
        let mut state = self.breaker.lock();
        // A trial call that took too long counted as lost, and another may be in progress by now.
        if state.trying_since == Some(since) {
            state.trying_since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker(clock: &Clock) -> Breaker {
        Breaker::new(clock.clone(), 2, Duration::from_secs(1), Duration::from_secs(60))
    }

    #[test]
    fn a_tier_that_is_said_to_answer_again_is_tried_by_one_call_at_once() {
        let clock = Clock::system();
        let breaker = breaker(&clock);
        breaker.try_now();
        assert!(!breaker.is_open(), "a closed one stays closed");
        for _ in 0..8 {
            breaker.probe().failed();
        }
        let Open { retry_after } = breaker.admit().expect_err("open");
        assert!(retry_after >= Duration::from_secs(30), "{retry_after:?}");
        breaker.try_now();
        let trial = breaker.admit().expect("the trial call");
        breaker.admit().expect_err("one call alone");
        trial.failed();
        assert!(breaker.admit().expect_err("open").retry_after > Duration::from_secs(30), "no shorter than before");
    }

    fn fail(breaker: &Breaker) {
        breaker.admit().expect("a closed breaker admits").failed();
    }

    #[test]
    fn an_open_breaker_refuses_then_lets_exactly_one_call_try() {
        let clock = Clock::system();
        let breaker = breaker(&clock);
        fail(&breaker);
        assert!(!breaker.is_open());
        fail(&breaker);
        assert!(breaker.admit().is_err());

        clock.advance(Duration::from_secs(2));
        let trying = breaker.admit().expect("the wait is over");
        assert!(breaker.admit().is_err(), "a second caller must not try as well");
        trying.succeeded();
        assert!(breaker.admit().is_ok());
    }

    #[test]
    fn a_probe_closes_an_open_breaker_before_its_wait_is_over() {
        let clock = Clock::system();
        let breaker = breaker(&clock);
        fail(&breaker);
        fail(&breaker);
        breaker.probe().failed();
        assert!(breaker.admit().is_err());
        breaker.probe().succeeded();
        assert!(breaker.admit().is_ok());
    }

    #[test]
    fn a_failed_try_waits_longer_and_a_lost_one_is_not_waited_for_for_ever() {
        let clock = Clock::system();
        let breaker = breaker(&clock);
        fail(&breaker);
        fail(&breaker);
        clock.advance(Duration::from_secs(2));
        fail(&breaker);
        let open = breaker.admit().expect_err("it opened again");
        assert!(open.retry_after >= Duration::from_millis(1900), "{open:?}");

        clock.advance(Duration::from_secs(3));
        std::mem::forget(breaker.admit().expect("the wait is over"));
        assert!(breaker.admit().is_err());
        clock.advance(Duration::from_secs(60));
        assert!(breaker.admit().is_ok());
    }

    #[test]
    fn callers_who_go_away_open_nothing() {
        let clock = Clock::system();
        let breaker = breaker(&clock);
        fail(&breaker);
        (0..100).for_each(|_| drop(breaker.admit()));
        (0..100).for_each(|_| drop(breaker.probe()));
        assert!(!breaker.is_open());
        fail(&breaker);
        assert!(breaker.is_open(), "and they are no success either");
    }

    #[test]
    fn where_the_one_that_tries_goes_away_another_may_try_at_once() {
        let clock = Clock::system();
        let breaker = breaker(&clock);
        fail(&breaker);
        fail(&breaker);
        clock.advance(Duration::from_secs(2));
        let trying = breaker.admit().expect("the wait is over");
        drop(breaker.probe());
        assert!(breaker.admit().is_err(), "a probe that goes away takes no other's turn");
        drop(trying);
        let trying = breaker.admit().expect("another may try");
        assert!(breaker.is_open() && breaker.admit().is_err());
        trying.failed();
        let open = breaker.check().expect_err("it opened again");
        assert!(open.retry_after >= Duration::from_millis(1900), "{open:?}");
    }

    #[test]
    fn leave_that_was_given_before_it_opened_can_be_seen_to_hold_no_more() {
        let clock = Clock::system();
        let breaker = breaker(&clock);
        let waiting = breaker.admit().expect("closed");
        assert!(waiting.check().is_ok());
        fail(&breaker);
        fail(&breaker);
        assert!(waiting.check().is_err());
        clock.advance(Duration::from_secs(2));
        let trying = breaker.admit().expect("the wait is over");
        assert!(trying.check().is_ok());
    }

    #[test]
    fn no_step_of_the_wall_clock_closes_it_or_keeps_it_open() {
        const DAYS: i64 = 3 * 24 * 60 * 60 * 1000;
        for step in [1000, -1000, 3_600_000, -3_600_000, DAYS, -DAYS] {
            let clock = Clock::system();
            let breaker = breaker(&clock);
            breaker.probe().failed();
            breaker.probe().failed();
            clock.step(step);
            assert!(breaker.admit().is_err(), "{step}");
            clock.advance(Duration::from_secs(2));
            breaker.admit().unwrap().succeeded();
        }
    }

    #[test]
    fn calls_that_were_under_way_when_it_opened_do_not_lengthen_the_wait() {
        let clock = Clock::system();
        let breaker = breaker(&clock);
        let under_way: Vec<_> = (0..16).map(|_| breaker.admit().expect("closed")).collect();
        under_way.into_iter().for_each(Permit::failed);
        let open = breaker.check().expect_err("it opened");
        assert!(open.retry_after <= Duration::from_millis(1250), "{open:?}");
    }
}
