//! Time: one clock for the whole process, handed in from outside, which knows both clocks of the
//! machine and the database's.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
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

/// A moment as both clocks of the machine tell it. What has an age in this process keeps one.
///
/// The wall clock can be set, so it may say that less time has passed than did, or more. The
/// running clock cannot, but it knows nothing of the time before this process. An age is what the
/// clock says that says more: no step of either makes anything younger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Milliseconds since 1970 by the wall clock.
    wall: i64,
    /// Milliseconds since the process began, those included in which the machine was suspended.
    running: i64,
}

impl Moment {
    /// What the wall clock said.
    #[must_use]
    pub const fn wall(self) -> Timestamp {
        Timestamp(self.wall)
    }

    /// The time that has passed since `earlier`, by the clock that says more; nothing if it lies
    /// ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        let passed = self.running.saturating_sub(earlier.running).max(self.wall.saturating_sub(earlier.wall));
        Duration::from_millis(u64::try_from(passed).unwrap_or(0))
    }

    /// The moment `duration` later.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        self.moved(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
    }

    /// The moment `duration` earlier.
    #[must_use]
    pub fn minus(self, duration: Duration) -> Self {
        self.moved(i64::try_from(duration.as_millis()).map_or(i64::MIN, |millis| -millis))
    }

    /// What both clocks said: the running one and the wall clock, in milliseconds, to be kept
    /// where two words are all the room there is.
    #[must_use]
    pub(crate) const fn millis(self) -> [i64; 2] {
        [self.running, self.wall]
    }

    /// The moment of which [`Self::millis`] gave this.
    #[must_use]
    pub(crate) const fn from_millis([running, wall]: [i64; 2]) -> Self {
        Self { wall, running }
    }

    const fn moved(self, by: i64) -> Self {
        Self { wall: self.wall.saturating_add(by), running: self.running.saturating_add(by) }
    }

    /// Whether this is before `end` by both clocks.
    #[must_use]
    pub const fn is_before(self, end: Self) -> bool {
        self.running < end.running && self.wall < end.wall
    }

    /// Whether this came later than `other`: the order in which things happened in this process,
    /// which no step of the wall clock changes.
    #[must_use]
    pub const fn is_after(self, other: Self) -> bool {
        self.running > other.running
    }

    /// An end that has come when either of the two has.
    #[must_use]
    pub fn sooner(self, other: Self) -> Self {
        Self { wall: self.wall.min(other.wall), running: self.running.min(other.running) }
    }
}

/// Tells the time. Each question has its own clock:
///
/// - [`Clock::now`] is the wall clock: what is recorded for people, and when something expires
///   that was promised until a date.
/// - [`Clock::moment`] is both clocks: ages of what this process holds.
/// - [`Clock::running`] is the running clock: windows, pauses and deadlines of this process,
///   which no step of the wall clock may disturb.
/// - [`Clock::database_now`] is the database's clock: times that instances compare with each
///   other's, as the age of a copy or the end of a lease.
///
/// Whoever holds a clone can move it, which is how ages and steps are tried without waiting.
#[derive(Debug, Clone)]
pub struct Clock(Arc<Origin>);

#[derive(Debug)]
struct Origin {
    /// The running clock's reading at the start.
    started: i64,
    /// How far tests have moved the running clock, and the wall clock beyond that.
    ahead: AtomicI64,
    stepped: AtomicI64,
    /// How far the wall clock was ahead of the running one when steps were looked for last.
    lead: AtomicI64,
    /// How far the database's clock is ahead of the running one.
    database_lead: AtomicI64,
    /// Whether the database has a clock of its own, which has told so.
    follows_database: AtomicBool,
}

impl Clock {
    /// Steps below this are slewing, which clocks do all the time.
    const LEAST_STEP: i64 = 500;

    /// The clocks of this machine.
    #[must_use]
    pub fn system() -> Self {
        let started = boot_millis();
        let lead = wall_millis();
        Self(Arc::new(Origin {
            started,
            ahead: AtomicI64::new(0),
            stepped: AtomicI64::new(0),
            lead: AtomicI64::new(lead),
            database_lead: AtomicI64::new(i64::MIN),
            follows_database: AtomicBool::new(false),
        }))
    }

    /// The wall clock now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        Timestamp(self.wall())
    }

    /// Both clocks now.
    #[must_use]
    pub fn moment(&self) -> Moment {
        Moment { wall: self.wall(), running: self.millis() }
    }

    /// How long the process has run, suspensions included. It never goes back.
    #[must_use]
    pub fn running(&self) -> Duration {
        Duration::from_millis(u64::try_from(self.millis()).unwrap_or(0))
    }

    /// The database's clock now. Where the database has none of its own, as SQLite, it is the
    /// wall clock, but never goes back.
    #[must_use]
    pub fn database_now(&self) -> Timestamp {
        let running = self.millis();
        let lead = match self.0.follows_database.load(Ordering::Acquire) {
            true => self.0.database_lead.load(Ordering::Relaxed),
            false => {
                let lead = self.wall() - running;
                self.0.database_lead.fetch_max(lead, Ordering::Relaxed).max(lead)
            }
        };
        Timestamp(running.saturating_add(lead))
    }

    /// Takes over what the database's own clock says now.
    pub fn follow_database(&self, now: Timestamp) {
        self.0.database_lead.store(now.0.saturating_sub(self.millis()), Ordering::Relaxed);
        self.0.follows_database.store(true, Ordering::Release);
    }

    /// How far the wall clock is ahead of the database's, in milliseconds; negative if it is behind.
    #[must_use]
    pub fn ahead_of_database(&self) -> i64 {
        self.wall().saturating_sub(self.database_now().0)
    }

    /// How far the wall clock was set since this was last asked, in milliseconds, where it was set.
    #[must_use]
    pub fn take_step(&self) -> Option<i64> {
        let lead = self.wall() - self.millis();
        let step = lead - self.0.lead.swap(lead, Ordering::Relaxed);
        (step.abs() >= Self::LEAST_STEP).then_some(step)
    }

    /// Lets time pass for this clock and all its clones: for both clocks, as it does when the
    /// machine is suspended.
    pub fn advance(&self, by: Duration) {
        let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.0.ahead.fetch_add(by, Ordering::Relaxed);
    }

    /// Sets the wall clock of this clock and all its clones by so many milliseconds.
    pub fn step(&self, by: i64) {
        self.0.stepped.fetch_add(by, Ordering::Relaxed);
    }

    fn wall(&self) -> i64 {
        wall_millis() + self.0.ahead.load(Ordering::Relaxed) + self.0.stepped.load(Ordering::Relaxed)
    }

    fn millis(&self) -> i64 {
        boot_millis() - self.0.started + self.0.ahead.load(Ordering::Relaxed)
    }
}

fn wall_millis() -> i64 {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

/// Linux's clock that goes on while the machine is suspended, which std's does not.
#[cfg(target_os = "linux")]
fn boot_millis() -> i64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    time.tv_sec.saturating_mul(1000).saturating_add(time.tv_nsec / 1_000_000)
}

/// Elsewhere std's clock: a suspension is told by the wall clock.
#[cfg(not(target_os = "linux"))]
fn boot_millis() -> i64 {
    static STARTED: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    let elapsed = STARTED.get_or_init(std::time::Instant::now).elapsed();
    i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAYS: Duration = Duration::from_secs(3 * 24 * 60 * 60);
    const DAYS_MILLIS: i64 = 3 * 24 * 60 * 60 * 1000;

    #[test]
    fn an_age_is_what_the_clock_says_that_says_more() {
        let clock = Clock::system();
        let began = clock.moment();
        clock.step(-DAYS_MILLIS);
        clock.advance(Duration::from_secs(60));
        assert!(clock.moment().since(began) >= Duration::from_secs(60), "a step back makes nothing younger");
        clock.step(2 * DAYS_MILLIS);
        assert!(clock.moment().since(began) >= DAYS, "nor is a step ahead passed over");
        clock.step(-DAYS_MILLIS);
        assert!(clock.moment().since(began) < Duration::from_secs(120), "what was set right counts no more");
    }

    #[test]
    fn an_end_has_come_when_either_clock_has_passed_it() {
        let clock = Clock::system();
        let end = clock.moment().plus(Duration::from_secs(60));
        assert!(clock.moment().is_before(end));
        clock.step(61_000);
        assert!(!clock.moment().is_before(end), "the wall clock has passed it");
        clock.step(-DAYS_MILLIS);
        assert!(clock.moment().is_before(end));
        clock.advance(Duration::from_secs(61));
        assert!(!clock.moment().is_before(end), "the running clock has passed it");
    }

    #[test]
    fn a_step_is_told_once_with_its_size_and_a_suspension_is_none() {
        let clock = Clock::system();
        assert_eq!(clock.take_step(), None);
        clock.step(-3_600_000);
        let step = clock.take_step().unwrap();
        assert!((step + 3_600_000).abs() < 100, "{step}");
        assert_eq!(clock.take_step(), None);
        clock.advance(DAYS);
        assert_eq!(clock.take_step(), None);
    }

    #[test]
    fn the_databases_clock_is_followed_whatever_the_wall_clock_does() {
        let clock = Clock::system();
        let at = Timestamp(clock.now().0 - 90_000);
        clock.follow_database(at);
        clock.step(DAYS_MILLIS);
        clock.advance(Duration::from_secs(1));
        let passed = clock.database_now().since(at);
        assert!(passed >= Duration::from_secs(1) && passed < Duration::from_secs(60), "{passed:?}");
        assert!(clock.ahead_of_database() > DAYS_MILLIS);
    }

    #[test]
    fn a_database_without_a_clock_has_the_wall_clock_and_never_goes_back() {
        let clock = Clock::system();
        let before = clock.database_now();
        clock.step(-DAYS_MILLIS);
        assert!(clock.database_now() >= before);
        clock.step(2 * DAYS_MILLIS);
        assert!(clock.database_now().since(before) >= DAYS);
    }
}
