//! The state of the tier after the last calls, with what is wrong, for `/readyz` and the log.

use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::super::{Cause, UpstreamError, UpstreamState};
use crate::{clock::Clock, log, metrics::Metrics};

/// How often a failure of one cause is logged.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// The state, the cause of the last failure, and the log's limits. Each field is by itself: between two of them another call may change
/// either, and an operator then sees the state of one moment with the cause of the next.
pub(super) struct TierState {
    clock: Clock,
    metrics: Arc<Metrics>,
    state: AtomicU8,
    reported: AtomicU8,
    /// Why the last call failed that did.
    cause: AtomicU8,
    /// Why nothing can be read although the server answers; 0 where something can be.
    misplaced: AtomicU8,
    /// When each cause may be logged again, in milliseconds by the running clock.
    silent_until: [AtomicU64; Cause::ALL.len()],
}

impl TierState {
    pub(super) fn new(clock: Clock, metrics: &Arc<Metrics>) -> Self {
        let unknown = || AtomicU8::new(code(UpstreamState::Unknown));
        Self {
            clock,
            metrics: Arc::clone(metrics),
            state: unknown(),
            reported: unknown(),
            cause: AtomicU8::default(),
            misplaced: AtomicU8::default(),
            silent_until: std::array::from_fn(|_| AtomicU64::default()),
        }
    }

    /// The state with its cause. `is_paused` says whether a rate limit still holds.
    pub(super) fn now(&self, is_paused: bool) -> (UpstreamState, Option<Cause>) {
        let state = match state(self.state.load(Ordering::Relaxed)) {
            UpstreamState::RateLimited if !is_paused => UpstreamState::Up,
            state => state,
        };
        let misplaced = Cause::from_number(self.misplaced.load(Ordering::Relaxed));
        match state {
            UpstreamState::Up | UpstreamState::Unknown if misplaced.is_some() => (UpstreamState::Rejected, misplaced),
            UpstreamState::Down | UpstreamState::LoginRefused => (state, self.cause()),
            _ => (state, None),
        }
    }

    /// Why the last call failed.
    pub(super) fn cause(&self) -> Option<Cause> {
        Cause::from_number(self.cause.load(Ordering::Relaxed))
    }

    /// Notes why a call failed.
    pub(super) fn failed(&self, cause: Cause) {
        self.cause.store(Cause::to_number(Some(cause)), Ordering::Relaxed);
        self.note(cause, |cause| {
            tracing::warn!(cause = cause.as_str(), "a call to the upstream failed: {}", cause.advice());
        });
    }

    /// The same, with the system's own words. They are the sources of the error: the error itself
    /// contains the address, with the tenant's folder.
    pub(super) fn failed_by(&self, cause: Cause, error: &dyn Error) {
        self.cause.store(Cause::to_number(Some(cause)), Ordering::Relaxed);
        self.note(cause, |cause| {
            let error = error.source().map(log::chain);
            tracing::warn!(cause = cause.as_str(), error, "a call to the upstream failed: {}", cause.advice());
        });
    }

    /// Counts a failure, and logs it where its cause was not logged lately.
    fn note(&self, cause: Cause, say: impl FnOnce(Cause)) {
        let number = Cause::to_number(Some(cause));
        self.metrics.count("secretier_upstream_failures_total", &[("cause", cause.as_str())]);
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (now, silent) = (millis(self.clock.running()), &self.silent_until[usize::from(number) - 1]);
        let until = silent.load(Ordering::Relaxed);
        // Of several that fail at once, one says it.
        if now >= until
            && silent.compare_exchange(until, now + millis(SAY_EVERY), Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            say(cause);
        }
    }

    /// Notes that upstream has nothing under a configured setting, if that is what the error says.
    pub(super) fn misplaced(&self, error: UpstreamError) -> UpstreamError {
        if let UpstreamError::Rejected { cause, .. } = &error
            && matches!(
                cause,
                Cause::Redirected | Cause::NoRoute | Cause::Project | Cause::Environment | Cause::TenantsPath
            )
        {
            self.has_nothing(*cause);
        }
        error
    }

    /// Notes that nothing can be read there, though the server answers.
    pub(super) fn has_nothing(&self, cause: Cause) {
        self.misplaced.store(Cause::to_number(Some(cause)), Ordering::Relaxed);
        self.note(cause, |cause| {
            tracing::warn!(
                cause = cause.as_str(),
                "the upstream answers, and no secret can be read there: {}",
                cause.advice()
            );
        });
    }

    /// Notes that the configured project, environment and path have something.
    pub(super) fn found_something(&self) {
        if self.misplaced.load(Ordering::Relaxed) != 0 && self.misplaced.swap(0, Ordering::Relaxed) != 0 {
            tracing::info!("secrets can be read at the upstream again");
        }
    }

    /// Stores the tier's latest state, with the reason of a failure where it is known, and logs the
    /// state if it has changed.
    pub(super) fn tell(&self, now: UpstreamState, cause: Option<Cause>, is_left_alone: bool) {
        if let Some(cause) = cause {
            self.failed(cause);
        }
        self.state.store(code(now), Ordering::Relaxed);
        // A single failure is logged by its cause; the tier's state is that of the breaker.
        if now == UpstreamState::Down && !is_left_alone {
            return;
        }
        let before = state(self.reported.swap(code(now), Ordering::Relaxed));
        if before == now {
            return;
        }
        match now {
            UpstreamState::Up if before == UpstreamState::Unknown => tracing::info!("the upstream answers"),
            UpstreamState::Up => tracing::info!("the upstream answers again"),
            UpstreamState::Unknown | UpstreamState::Rejected => {}
            UpstreamState::Down => {
                let cause = self.cause().map(Cause::as_str);
                tracing::warn!(cause, "the upstream fails repeatedly, and is left alone for a while");
            }
            UpstreamState::LoginRefused => {
                let advice = self.cause().unwrap_or(Cause::LoginRefused).advice();
                tracing::warn!("the upstream refuses our login: {advice}");
            }
            UpstreamState::RateLimited => {
                tracing::warn!("the upstream limits our rate; infisical.requests_per_minute may be too high for it");
            }
        }
    }
}

const STATES: [UpstreamState; 5] = [
    UpstreamState::Unknown,
    UpstreamState::Up,
    UpstreamState::Down,
    UpstreamState::LoginRefused,
    UpstreamState::RateLimited,
];

fn code(state: UpstreamState) -> u8 {
    match state {
        UpstreamState::Unknown => 0,
        UpstreamState::Up => 1,
        UpstreamState::Down => 2,
        UpstreamState::LoginRefused => 3,
        UpstreamState::RateLimited => 4,
        // Never stored: it is told beside the others.
        UpstreamState::Rejected => 1,
    }
}

fn state(code: u8) -> UpstreamState {
    STATES[usize::from(code)]
}
