//! Libraries write what others make them write: one client can have h2 warn of each frame that
//! it sends. So what one place in a library says is bounded, and what was left out is counted.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{Context, Layer};

/// How long a place's lines are counted together.
pub(super) const WINDOW: Duration = Duration::from_secs(60);

/// How many of them are written meanwhile.
pub(super) const LINES: u64 = 10;

/// What the libraries have said lately. There are as many places as their code has.
#[derive(Debug, Default)]
pub(super) struct Libraries(Mutex<HashMap<Place, Said>>);

/// Where in a library's code something is said.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Place {
    module: String,
    line: Option<u64>,
}

#[derive(Debug)]
struct Said {
    since: Instant,
    lines: u64,
    /// Since it was last told how many were.
    left_out: u64,
}

impl Libraries {
    pub(super) fn layer(self: Arc<Self>) -> Bounded {
        Bounded(self)
    }

    /// Whether one more line of a place is written.
    fn admits(&self, place: Place, now: Instant) -> bool {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let said = places.entry(place).or_insert(Said { since: now, lines: 0, left_out: 0 });
        if now.saturating_duration_since(said.since) >= WINDOW {
            (said.since, said.lines) = (now, 0);
        }
        let is_written = said.lines < LINES;
        match is_written {
            true => said.lines += 1,
            false => said.left_out += 1,
        }
        is_written
    }

    /// Each place whose lines were left out since this was last asked, with how many.
    pub(super) fn left_out(&self) -> Vec<(String, u64)> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let told = places.iter_mut().filter(|(_, said)| said.left_out > 0);
        told.map(|(place, said)| (place.to_string(), std::mem::take(&mut said.left_out))).collect()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.module)?;
        self.line.map_or(Ok(()), |line| write!(f, ":{line}"))
    }
}

/// Drops what a library says too often.
#[derive(Debug)]
pub(super) struct Bounded(Arc<Libraries>);

impl<S: Subscriber> Layer<S> for Bounded {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let Some(place) = Place::of(event) else { return true };
        self.0.admits(place, Instant::now())
    }
}

impl Place {
    /// Nothing where it is this program that speaks.
    fn of(event: &Event<'_>) -> Option<Self> {
        let metadata = event.metadata();
        let is_ours = |module: &str| module == "secretier" || module.starts_with("secretier::");
        if is_ours(metadata.target()) {
            return None;
        }
        let mut place = Self { module: metadata.target().to_owned(), line: metadata.line().map(u64::from) };
        if metadata.target() == "log" {
            // It came by the crate `log`, and its fields tell who speaks.
            place.line = None;
            event.record(&mut place);
        }
        (!is_ours(&place.module)).then_some(place)
    }
}

impl Visit for Place {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "log.target" {
            value.clone_into(&mut self.module);
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

    #[test]
    fn what_a_library_says_again_and_again_is_bounded_and_what_we_say_is_not() {
        let (libraries, written) = (Arc::new(Libraries::default()), Written::default());
        let registry = tracing_subscriber::registry().with(Arc::clone(&libraries).layer()).with(written.clone());
        tracing::subscriber::with_default(registry, || {
            for number in 0..1000 {
                tracing::warn!(target: "h2::proto", number, "a frame that is odd");
                tracing::warn!(target: "secretier::server", "ours");
            }
            tracing::warn!(target: "h2::proto", "another place in it");
        });
        let said = |by: &str| written.0.lock().unwrap().iter().filter(|target| *target == by).count();
        assert_eq!((said("h2::proto"), said("secretier::server")), (11, 1000));
        let told = libraries.left_out();
        assert!(matches!(&told[..], [(place, 990)] if place.starts_with("h2::proto:")), "{told:?}");
        assert!(libraries.left_out().is_empty(), "once told");
    }

    #[test]
    fn who_speaks_by_the_crate_log_is_told_by_its_fields() {
        let (libraries, written) = (Arc::new(Libraries::default()), Written::default());
        let registry = tracing_subscriber::registry().with(Arc::clone(&libraries).layer()).with(written.clone());
        tracing::subscriber::with_default(registry, || {
            for (library, line) in [("rustls::check", 61_u64), ("rustls::check", 44), ("secretier::tls", 1)] {
                for _ in 0..20 {
                    tracing::warn!(target: "log", { log.target = library, log.line = line }, "odd");
                }
            }
        });
        assert_eq!(written.0.lock().unwrap().len() as u64, 2 * LINES + 20);
        let mut told = libraries.left_out();
        told.sort();
        assert_eq!(told, [("rustls::check:44".to_owned(), 10), ("rustls::check:61".to_owned(), 10)]);
    }

    #[test]
    fn after_a_minute_it_may_speak_again() {
        let libraries = Libraries::default();
        let place = || Place { module: "rustls".to_owned(), line: None };
        let now = Instant::now();
        let written = |now| (0..100).filter(|_| libraries.admits(place(), now)).count() as u64;
        assert_eq!((written(now), written(now + WINDOW - Duration::from_millis(1))), (LINES, 0));
        assert_eq!(written(now + WINDOW), LINES);
        assert_eq!(libraries.left_out(), [("rustls".to_owned(), 300 - 2 * LINES)]);
    }
}
