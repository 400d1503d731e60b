//! Time, as ages need it: one clock for the whole process, handed in from outside.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

/// A moment, in milliseconds since 1970 (UTC).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// A moment from milliseconds since 1970 (UTC).
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Milliseconds since 1970 (UTC).
    #[must_use]
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// How long ago `earlier` was; nothing if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// The moment `duration` later.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// The moment that an RFC 3339 text tells, in UTC.
    #[must_use]
    pub fn from_rfc3339(text: &str) -> Option<Self> {
        let since_epoch = humantime::parse_rfc3339(text).ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        i64::try_from(since_epoch.as_millis()).ok().map(Self)
    }

    /// RFC 3339 in UTC with milliseconds, as in `2026-11-21T22:00:59.022Z`.
    #[must_use]
    pub fn to_rfc3339(self) -> String {
        let since_epoch = Duration::from_millis(u64::try_from(self.0).unwrap_or(0));
        // humantime knows no year past 9999.
        let since_epoch = since_epoch.min(Duration::from_secs(253_402_300_799));
        humantime::format_rfc3339_millis(SystemTime::UNIX_EPOCH + since_epoch).to_string()
    }
}

/// Tells the time: the wall clock as it was at start, moved on by the monotonic
/// clock, so that a wall clock that is set while we run changes no age.
///
/// Whoever holds a clone can move it ahead, which is how ages are tried without waiting.
#[derive(Debug, Clone)]
pub struct Clock(Arc<Origin>);

#[derive(Debug)]
struct Origin {
    started: Instant,
    started_at: i64,
    ahead: AtomicI64,
}

impl Clock {
    /// A clock that agrees with the system's now.
    #[must_use]
    pub fn system() -> Self {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self(Arc::new(Origin {
            started: Instant::now(),
            started_at: i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX),
            ahead: AtomicI64::new(0),
        }))
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        let elapsed = i64::try_from(self.0.started.elapsed().as_millis()).unwrap_or(i64::MAX);
        Timestamp(self.0.started_at + elapsed + self.0.ahead.load(Ordering::Relaxed))
    }

    /// Moves this clock and all its clones ahead.
    pub fn advance(&self, by: Duration) {
        let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.0.ahead.fetch_add(by, Ordering::Relaxed);
    }
}
