//! Time: one clock for the whole process, passed in from outside, which knows both clocks of the
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

    /// The time since `earlier`; zero if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// The moment `duration` later.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// The moment that an RFC 3339 text in UTC names.
    #[must_use]
    pub fn from_rfc3339(text: &str) -> Option<Self> {
        let since_epoch = humantime::parse_rfc3339(text).ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        i64::try_from(since_epoch.as_millis()).ok().map(Self)
    }

    /// The moment that a date of HTTP names (RFC 9110, 5.6.7), to the second.
    #[must_use]
    pub fn from_http_date(text: &str) -> Option<Self> {
        let since_epoch = httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
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

/// A moment by both clocks of the machine. Everything that has an age in this process keeps one.
///
/// The wall clock can be set, so it may show less time than has passed, or more. The running clock
/// cannot be set, but it does not know the time before this process. The age is whichever of the
/// two is longer: no step of either clock makes anything younger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Milliseconds since 1970 by the wall clock.
    wall: i64,
    /// Milliseconds since the process began, including the time when the machine was suspended.
    running: i64,
}

impl Moment {
    /// The wall clock's reading.
    #[must_use]
    pub const fn wall(self) -> Timestamp {
        Timestamp(self.wall)
    }

    /// The running clock's reading.
    #[must_use]
    pub fn running(self) -> Duration {
        Duration::from_millis(u64::try_from(self.running).unwrap_or(0))
    }

    /// The time since `earlier`, by the clock that shows more; zero if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: impl Into<Self>) -> Duration {
        let earlier = earlier.into();
        let passed = self.running.saturating_sub(earlier.running).max(self.wall.saturating_sub(earlier.wall));
        Duration::from_millis(u64::try_from(passed).unwrap_or(0))
    }

    /// Milliseconds until `end`, by the clock that shows fewer; negative once it has come.
    #[must_use]
    pub fn millis_until(self, end: Self) -> i64 {
        end.running.saturating_sub(self.running).min(end.wall.saturating_sub(self.wall))
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

    /// The readings of both clocks, the running one and the wall clock, in milliseconds, for places
    /// that have room for two words only.
    #[must_use]
    pub(crate) const fn millis(self) -> [i64; 2] {
        [self.running, self.wall]
    }

    /// The moment whose [`Self::millis`] these are.
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

    /// Whether this came later than `other`: the order of events in this process, which no step of
    /// the wall clock changes.
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

/// When the owner of something confirmed it.
///
/// Two confirmations with the same time of the database are the same confirmation, whichever
/// instance received it. Among different ones, this process's running clock decides which came
/// later: the database's clock may be set back.
#[derive(Debug, Clone, Copy)]
pub struct Confirmed {
    /// By the database's clock, as it is stored with a copy.
    pub stamp: Timestamp,
    /// By the clocks of this process: its age is counted from this.
    pub moment: Moment,
}

impl PartialEq for Confirmed {
    fn eq(&self, other: &Self) -> bool {
        self.stamp == other.stamp
    }
}

impl PartialOrd for Confirmed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        match self == other {
            true => Some(std::cmp::Ordering::Equal),
            false => Some(self.moment.running.cmp(&other.moment.running)).filter(|order| order.is_ne()),
        }
    }
}

impl From<Confirmed> for Moment {
    fn from(confirmed: Confirmed) -> Self {
        confirmed.moment
    }
}

/// Returns the time. Each purpose has its own clock:
///
/// - [`Clock::now`] is the wall clock: for times that are recorded for people, and for expiries
///   that are a date.
/// - [`Clock::moment`] is both clocks: for ages of anything that this process holds.
/// - [`Clock::running`] is the running clock: for windows, pauses and deadlines of this process,
///   which no step of the wall clock may disturb.
/// - [`Clock::database_now`] is the database's clock: for times that instances compare with each
///   other's, as the age of a copy or the end of a lease.
///
/// Every clone moves with it, so that ages and steps are tested without waiting.
#[derive(Debug, Clone)]
pub struct Clock(Arc<Origin>);

#[derive(Debug)]
struct Origin {
    /// The running clock's reading at the start.
    started: i64,
    /// How far tests have moved the running clock, and the wall clock beyond that.
    ahead: AtomicI64,
    stepped: AtomicI64,
    /// How far the wall clock was ahead of the running one at the last check for steps.
    lead: AtomicI64,
    /// How far the database's clock is ahead of the running one.
    database_lead: AtomicI64,
    /// How far it was ahead of the wall clock when it was last read.
    database_lead_of_wall: AtomicI64,
    /// Whether the database has a clock of its own and has told its time.
    follows_database: AtomicBool,
}

impl Clock {
    /// Smaller steps count as slewing, which clocks do all the time.
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
            database_lead_of_wall: AtomicI64::new(0),
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

    /// The database's clock now. Where the database has none of its own, as SQLite, it is the wall
    /// clock, but it never goes back.
    #[must_use]
    pub fn database_now(&self) -> Timestamp {
        self.database_at(self.moment())
    }

    /// Takes over a time that the database's own clock told: it was told after `asked_at` by the
    /// running clock, and before now.
    ///
    /// An answer that took long says little, so the known offset stays wherever it fits the answer.
    /// If two answers are taken over in another order than they were given, that alone changes
    /// nothing, unless the database's clock was set in between; then the next answer corrects it.
    pub fn follow_database(&self, told: Timestamp, asked_at: Duration) {
        let now = self.moment();
        // Time that tests let pass here has passed there as well.
        let told = Timestamp(told.0.saturating_add(self.0.ahead.load(Ordering::Relaxed)));
        let asked_at = i64::try_from(asked_at.as_millis()).unwrap_or(i64::MAX).min(now.running);
        // The time was told somewhere between the two.
        let (least, most) = (told.0.saturating_sub(now.running), told.0.saturating_sub(asked_at));
        let lead = match self.0.follows_database.load(Ordering::Acquire) {
            true => self.0.database_lead.load(Ordering::Relaxed).clamp(least, most),
            false => least.midpoint(most),
        };
        self.0.database_lead.store(lead, Ordering::Relaxed);
        let lead_of_wall = now.running.saturating_add(lead).saturating_sub(now.wall);
        self.0.database_lead_of_wall.store(lead_of_wall, Ordering::Relaxed);
        self.0.follows_database.store(true, Ordering::Release);
    }

    /// How far the wall clock is ahead of the database's, in milliseconds; negative if it is
    /// behind, and `None` where the database has no clock of its own, or has not told its time yet.
    #[must_use]
    pub fn ahead_of_database(&self) -> Option<i64> {
        let now = self.moment();
        let follows = self.0.follows_database.load(Ordering::Acquire);
        follows.then(|| now.wall.saturating_sub(self.database_at(now).0))
    }

    /// A confirmation at the present time.
    #[must_use]
    pub fn confirmed_now(&self) -> Confirmed {
        let moment = self.moment();
        Confirmed { stamp: self.database_at(moment), moment }
    }

    /// A confirmation at this time of the database.
    #[must_use]
    pub fn confirmed_at(&self, stamp: Timestamp) -> Confirmed {
        let now = self.moment();
        Confirmed { stamp, moment: now.minus(self.age_at(stamp, now)) }
    }

    /// The age of an event at this time of the database; zero if that lies ahead.
    ///
    /// The wall clock counts too: if a machine was paused from outside, only the wall clock shows
    /// it, until the database has told the time again.
    #[must_use]
    pub fn age(&self, stamp: Timestamp) -> Duration {
        self.age_at(stamp, self.moment())
    }

    fn age_at(&self, stamp: Timestamp, now: Moment) -> Duration {
        let database = self.database_at(now);
        let by_wall = match self.0.follows_database.load(Ordering::Acquire) {
            true => Timestamp(now.wall.saturating_add(self.0.database_lead_of_wall.load(Ordering::Relaxed))),
            false => database,
        };
        database.max(by_wall).since(stamp)
    }

    fn database_at(&self, now: Moment) -> Timestamp {
        let lead = match self.0.follows_database.load(Ordering::Acquire) {
            true => self.0.database_lead.load(Ordering::Relaxed),
            false => {
                let lead = now.wall.saturating_sub(now.running);
                self.0.database_lead.fetch_max(lead, Ordering::Relaxed).max(lead)
            }
        };
        Timestamp(now.running.saturating_add(lead))
    }

    /// How far the wall clock was set since the last call, in milliseconds, if it was set.
    #[must_use]
    pub fn take_step(&self) -> Option<i64> {
        let before = self.millis();
        let lead = self.wall() - before;
        if self.millis() - before > Self::LEAST_STEP / 2 {
            // This process was held up between the two reads: the next check decides.
            return None;
        }
        let step = lead - self.0.lead.swap(lead, Ordering::Relaxed);
        (step.abs() >= Self::LEAST_STEP).then_some(step)
    }

    /// Lets time pass for this clock and all its clones: for both clocks and the database's, as
    /// when the machine is suspended.
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

/// Linux's clock that continues while the machine is suspended, which std's does not.
#[cfg(target_os = "linux")]
fn boot_millis() -> i64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    time.tv_sec.saturating_mul(1000).saturating_add(time.tv_nsec / 1_000_000)
}

/// std's clock on other systems: only the wall clock shows a suspension there.
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
        clock.follow_database(at, clock.running());
        clock.step(DAYS_MILLIS);
        clock.advance(Duration::from_secs(1));
        let passed = clock.database_now().since(at);
        assert!(passed >= Duration::from_secs(1) && passed < Duration::from_secs(60), "{passed:?}");
        assert!(clock.ahead_of_database().unwrap() > DAYS_MILLIS);
    }

    #[test]
    fn an_answer_of_the_database_that_took_long_moves_nothing_that_fits_it() {
        let clock = Clock::system();
        let ahead = || clock.ahead_of_database().unwrap();
        clock.follow_database(clock.now(), clock.running());
        // Asked ten seconds ago, and told four seconds ago.
        let told = Timestamp(clock.now().0 - 4000);
        clock.advance(Duration::from_secs(10));
        clock.follow_database(told, clock.running() - Duration::from_secs(10));
        assert!(ahead().abs() < 1000, "{}", ahead());
        clock.follow_database(Timestamp(told.0 + 4000 - 60_000), clock.running());
        assert!((ahead() - 60_000).abs() < 1000, "what contradicts it is believed: {}", ahead());
    }

    #[test]
    fn a_pause_that_the_wall_clock_alone_knows_of_makes_a_copy_older_at_once() {
        let clock = Clock::system();
        clock.follow_database(Timestamp(clock.now().0 - 90_000), clock.running());
        let copied = clock.confirmed_now();
        clock.step(DAYS_MILLIS);
        assert!(clock.age(copied.stamp) >= DAYS && clock.moment().since(copied) >= DAYS);
        assert!(clock.database_now().since(copied.stamp) < DAYS, "but no lease ends by it");
        clock.follow_database(clock.database_now(), clock.running());
        assert!(clock.age(copied.stamp) < Duration::from_secs(60), "the database has told that no time has passed");
    }

    #[test]
    fn what_was_confirmed_at_one_time_of_the_database_is_the_same_whenever_it_is_read() {
        let clock = Clock::system();
        let first = clock.confirmed_now();
        clock.step(-3_600_000);
        clock.advance(Duration::from_secs(1));
        let again = clock.confirmed_at(first.stamp);
        assert!(first == again && first <= again && again <= first);
        assert!(clock.confirmed_now() > first && first < clock.confirmed_now());
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
