//! The log must not be filled by others: one client can have h2 warn of each frame that it sends,
//! and a caller can have us warn of each request. So the lines of one place in the code are
//! bounded, and those that are left out are counted.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use metrics::Counter;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{Context, Layer};

use crate::metrics::Metrics;

/// How long a place's lines are counted together.
pub(super) const WINDOW: Duration = Duration::from_secs(60);

/// How many of them a library writes meanwhile.
const LINES_OF_A_LIBRARY: u64 = 10;

/// The lines of each place lately. There are as many places as the code has.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    places: Mutex<HashMap<Place, Said>>,
    /// How many lines a place in this program writes in a window. 0 until requests are served, and
    /// where there is no bound: what a command or a start says is said in full.
    own_lines: AtomicU64,
    left_out: OnceLock<LeftOut>,
}

/// Counts lines that were left out.
#[derive(Debug)]
struct LeftOut {
    library: Counter,
    own: Counter,
}

/// Where in the code something is said.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Place {
    module: String,
    line: Option<u64>,
    /// One place tells of every signal, and none may hide another.
    signal: Option<String>,
    is_ours: bool,
}

#[derive(Debug)]
struct Said {
    since: Instant,
    lines: u64,
    /// Since it was last told how many were.
    left_out: u64,
}

impl Repeats {
    pub(super) fn layer(self: Arc<Self>) -> Bounded {
        Bounded(self)
    }

    /// Holds each place in this program to so many lines from now on, or to none of them where
    /// that is 0.
    pub(super) fn bound(&self, own_lines: u64) {
        self.own_lines.store(own_lines, Ordering::Relaxed);
    }

    /// Counts what is left out there, from now on.
    pub(super) fn count_in(&self, metrics: &Metrics) {
        let counter = |by| metrics.counter("secretier_log_lines_left_out_total", &[("by", by)]);
        let counters = LeftOut { library: counter("library"), own: counter("secretier") };
        // Shown from the start, so that an alert finds a series to watch.
        counters.library.increment(0);
        counters.own.increment(0);
        // One log counts for one instance: only tests have more.
        let _ = self.left_out.set(counters);
    }

    /// Whether one more line of a place is written.
    fn admits(&self, place: Place, now: Instant) -> bool {
        let limit = match place.is_ours {
            true => self.own_lines.load(Ordering::Relaxed),
            false => LINES_OF_A_LIBRARY,
        };
        if limit == 0 {
            return true;
        }
        let is_ours = place.is_ours;
        let is_written = {
            let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
            let said = places.entry(place).or_insert(Said { since: now, lines: 0, left_out: 0 });
            if now.saturating_duration_since(said.since) >= WINDOW {
                (said.since, said.lines) = (now, 0);
            }
            let is_written = said.lines < limit;
            match is_written {
                true => said.lines += 1,
                false => said.left_out += 1,
            }
            is_written
        };
        if let (false, Some(left_out)) = (is_written, self.left_out.get()) {
            (if is_ours { &left_out.own } else { &left_out.library }).increment(1);
        }
        is_written
    }

    /// Each place whose lines were left out since this was last asked, with how many, and whether
    /// it is one of ours.
    pub(super) fn left_out(&self) -> Vec<(String, bool, u64)> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let told = places.iter_mut().filter(|(_, said)| said.left_out > 0);
        told.map(|(place, said)| (place.to_string(), place.is_ours, std::mem::take(&mut said.left_out))).collect()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.module)?;
        self.line.map_or(Ok(()), |line| write!(f, ":{line}"))?;
        self.signal.as_ref().map_or(Ok(()), |signal| write!(f, " ({signal})"))
    }
}

/// Drops what one place says too often.
#[derive(Debug)]
pub(super) struct Bounded(Arc<Repeats>);

impl<S: Subscriber> Layer<S> for Bounded {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let Some(place) = Place::of(event) else { return true };
        self.0.admits(place, Instant::now())
    }
}

/// This program's own log, which says what was left out.
const LOG: &str = "secretier::log";

impl Place {
    /// Nothing where it is not bounded: what this program has done (`info`), which the log is kept
    /// for, and what an operator asks to see (`debug`).
    fn of(event: &Event<'_>) -> Option<Self> {
        let metadata = event.metadata();
        let is_ours = |module: &str| module == "secretier" || module.starts_with("secretier::");
        let is_bounded = |module: &str| *metadata.level() <= Level::WARN && module != LOG;
        let target = metadata.target();
        if is_ours(target) && !is_bounded(target) {
            return None;
        }
        let line = metadata.line().map(u64::from);
        let mut place = Self { module: target.to_owned(), line, signal: None, is_ours: false };
        if target == "log" {
            // It came by the crate `log`, and its fields tell who speaks.
            place.line = None;
        }
        event.record(&mut place);
        place.is_ours = is_ours(&place.module);
        (!place.is_ours || is_bounded(&place.module)).then_some(place)
    }
}

impl Visit for Place {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "log.target" => value.clone_into(&mut self.module),
            "signal" => self.signal = Some(value.to_owned()),
            _ => {}
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "log.line" {
            self.line = Some(value);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Written {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(event.metadata().target().to_owned());
        }
    }

    /// Tells how many lines of a target were written, and the repeats that were noted.
    fn said(own_lines: u64, say: impl FnOnce()) -> (impl Fn(&str) -> usize, Arc<Repeats>) {
        let (repeats, written) = (Arc::new(Repeats::default()), Written::default());
        repeats.bound(own_lines);
        let registry = tracing_subscriber::registry().with(Arc::clone(&repeats).layer()).with(written.clone());
        tracing::subscriber::with_default(registry, say);
        (move |by: &str| written.0.lock().unwrap().iter().filter(|target| *target == by).count(), repeats)
    }

    #[test]
    fn what_a_library_says_again_and_again_is_bounded_whatever_ours_is() {
        for own_lines in [0, 60] {
            let (written, repeats) = said(own_lines, || {
                for number in 0..1000 {
                    tracing::warn!(target: "h2::proto", number, "a frame that is odd");
                }
                tracing::warn!(target: "h2::proto", "another place in it");
            });
            assert_eq!(written("h2::proto"), 11);
            let told = repeats.left_out();
            assert!(matches!(&told[..], [(place, false, 990)] if place.starts_with("h2::proto:")), "{told:?}");
            assert!(repeats.left_out().is_empty(), "once told");
        }
    }

    #[test]
    fn what_goes_wrong_again_and_again_is_bounded_while_requests_are_served() {
        let say = || {
            for number in 0..1000 {
                tracing::error!(target: "secretier::server", number, "wrong");
                tracing::info!(target: "secretier::routes", number, "a secret was written");
                tracing::debug!(target: "secretier::tiers", number, "a step");
                tracing::warn!(target: "secretier::log", number, "left out");
            }
        };
        let (written, repeats) = said(60, say);
        assert_eq!(written("secretier::server"), 60);
        for unbounded in ["secretier::routes", "secretier::tiers", "secretier::log"] {
            assert_eq!(written(unbounded), 1000, "{unbounded}");
        }
        let told = repeats.left_out();
        assert!(matches!(&told[..], [(place, true, 940)] if place.starts_with("secretier::server:")), "{told:?}");
        let (written, repeats) = said(0, say);
        assert_eq!((written("secretier::server"), repeats.left_out()), (1000, Vec::new()), "a command, or a start");
    }

    #[test]
    fn what_is_left_out_is_counted_by_who_said_it() {
        let (repeats, metrics) = (Repeats::default(), Metrics::new());
        repeats.bound(60);
        repeats.count_in(&metrics);
        let place = |is_ours| Place { module: "m".to_owned(), line: None, signal: None, is_ours };
        for _ in 0..100 {
            repeats.admits(place(true), Instant::now());
            repeats.admits(place(false), Instant::now());
        }
        let page = metrics.render();
        for (by, left_out) in [("secretier", 40), ("library", 90)] {
            assert!(page.contains(&format!("secretier_log_lines_left_out_total{{by=\"{by}\"}} {left_out}")), "{page}");
        }
    }

    #[test]
    fn no_signal_hides_another() {
        let (written, repeats) = said(60, || {
            for signal in ["denied_burst", "enumeration"] {
                let times = if signal == "denied_burst" { 1000 } else { 1 };
                (0..times).for_each(|_| tracing::warn!(target: "secretier::signals", signal, "odd"));
            }
        });
        assert_eq!(written("secretier::signals"), 61);
        let told = repeats.left_out();
        assert!(matches!(&told[..], [(place, true, 940)] if place.ends_with("(denied_burst)")), "{told:?}");
    }

    #[test]
    fn who_speaks_by_the_crate_log_is_told_by_its_fields() {
        let (written, repeats) = said(15, || {
            for (library, line) in [("rustls::check", 61_u64), ("rustls::check", 44), ("secretier::tls", 1)] {
                for _ in 0..20 {
                    tracing::warn!(target: "log", { log.target = library, log.line = line }, "odd");
                }
            }
        });
        assert_eq!(written("log") as u64, 2 * LINES_OF_A_LIBRARY + 15);
        let mut told = repeats.left_out();
        told.sort();
        let expected =
            [("rustls::check:44", false, 10), ("rustls::check:61", false, 10), ("secretier::tls:1", true, 5)];
        assert_eq!(told, expected.map(|(place, is_ours, left_out)| (place.to_owned(), is_ours, left_out)));
    }

    #[test]
    fn after_a_minute_it_may_speak_again() {
        let repeats = Repeats::default();
        let place = || Place { module: "rustls".to_owned(), line: None, signal: None, is_ours: false };
        let now = Instant::now();
        let written = |now| (0..100).filter(|_| repeats.admits(place(), now)).count() as u64;
        assert_eq!((written(now), written(now + WINDOW - Duration::from_millis(1))), (LINES_OF_A_LIBRARY, 0));
        assert_eq!(written(now + WINDOW), LINES_OF_A_LIBRARY);
        assert_eq!(repeats.left_out(), [("rustls".to_owned(), false, 300 - 2 * LINES_OF_A_LIBRARY)]);
    }
}
