//! A circuit breaker, so that a tier that is down costs its callers nothing.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::clock::{Clock, Timestamp};

/// Closed while calls succeed. After `threshold` failures in a row it opens: calls
/// are refused for a while that doubles, with jitter, up to `longest`. Then one call
/// is let through to try; its outcome closes or re-opens the breaker.
///
/// One short lock guards the state, so `admit` decides for one caller at a time: two
/// callers that arrive as the wait ends cannot both be the one that tries.
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
    open_until: Option<Timestamp>,
    trying_since: Option<Timestamp>,
}

/// Leave to make one call. Say how it went; to drop it unsaid counts as a failure,
/// since a call that was cancelled told us nothing good.
#[must_use]
#[derive(Debug)]
pub struct Permit<'a> {
    breaker: &'a Breaker,
    /// Whether this is the one call that tries an open breaker.
    trying: bool,
    settled: bool,
}

/// The breaker is open; calls may be tried again after the given time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// Time until a call is let through again.
    pub retry_after: Duration,
}

impl Breaker {
    /// Opens after `threshold` failures in a row, for `shortest` and then ever longer, up to `longest`.
    #[must_use]
    pub fn new(clock: Clock, threshold: u32, shortest: Duration, longest: Duration) -> Self {
        Self { clock, threshold, shortest, longest, state: Mutex::default() }
    }

    /// Lets a call through, or says how long to stay away.
    ///
    /// # Errors
    /// [`Open`] while the tier is considered down.
    pub fn admit(&self) -> Result<Permit<'_>, Open> {
        let now = self.clock.now();
        let mut state = self.lock();
        self.refusal(&state, now)?;
        let trying = state.open_until.is_some();
        if trying {
            state.trying_since = Some(now);
        }
        Ok(Permit { breaker: self, trying, settled: false })
    }

    /// What [`Self::admit`] would say now, without asking for leave to make a call.
    ///
    /// # Errors
    /// [`Open`] while the tier is considered down.
    pub fn check(&self) -> Result<(), Open> {
        self.refusal(&self.lock(), self.clock.now())
    }

    /// Lets a call through whatever the state: for a poll that asks on a schedule of its
    /// own, whose outcome closes or re-opens the breaker like any other's.
    pub fn probe(&self) -> Permit<'_> {
        Permit { breaker: self, trying: true, settled: false }
    }

    /// Whether calls are being refused, or were until the next one is tried.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.lock().open_until.is_some()
    }

    fn refusal(&self, state: &State, now: Timestamp) -> Result<(), Open> {
        let Some(until) = state.open_until else { return Ok(()) };
        if now < until {
            return Err(Open { retry_after: until.since(now) });
        }
        // One caller tries; the others stay away until it has said how it went,
        // or until it has taken so long that it must have been lost.
        match state.trying_since {
            Some(since) if now.since(since) < self.longest => Err(Open { retry_after: self.shortest }),
            _ => Ok(()),
        }
    }

    fn settle(&self, trying: bool, failed: bool) {
        let mut state = self.lock();
        if !failed {
            *state = State::default();
            return;
        }
        // Calls that were under way when the breaker opened fail one after the other.
        // They tell nothing new, and must not each double the wait.
        if state.open_until.is_some() && !trying {
            return;
        }
        state.failures = state.failures.saturating_add(1);
        state.trying_since = None;
        if state.failures >= self.threshold {
            let doublings = (state.failures - self.threshold).min(16);
            let wait = self.shortest.saturating_mul(1 << doublings).min(self.longest);
            // Up to a quarter more, so that many instances do not try in step.
            let wait = wait.mul_f64(1.0 + rand::random::<f64>() / 4.0);
            state.open_until = Some(self.clock.now().plus(wait));
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
    /// The tier answered, even if the answer was a refusal.
    pub fn succeeded(mut self) {
        self.settled = true;
        self.breaker.settle(self.trying, false);
    }

    /// The tier did not answer, or answered that it is broken.
    pub fn failed(mut self) {
        self.settled = true;
        self.breaker.settle(self.trying, true);
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if !self.settled {
            self.breaker.settle(self.trying, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker(clock: &Clock) -> Breaker {
        Breaker::new(clock.clone(), 2, Duration::from_secs(1), Duration::from_secs(60))
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
    fn calls_that_were_under_way_when_it_opened_do_not_lengthen_the_wait() {
        let clock = Clock::system();
        let breaker = breaker(&clock);
        let under_way: Vec<_> = (0..16).map(|_| breaker.admit().expect("closed")).collect();
        under_way.into_iter().for_each(Permit::failed);
        let open = breaker.check().expect_err("it opened");
        assert!(open.retry_after <= Duration::from_millis(1250), "{open:?}");
    }
}
