//! The log: where its lines go, which are written, and the name of this process in them.

mod lines;
mod repeats;

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tracing::{Level, level_filters::LevelFilter};
use tracing_subscriber::{Registry, filter::Targets, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _};

use self::{lines::Fields, repeats::Repeats};
use crate::metrics::Metrics;

/// `[log]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The lowest level that is written.
    pub level: Severity,
    /// The format of a line.
    pub format: Format,
    /// The number of warnings and errors that one place in this program writes in a minute while it
    /// serves requests. More are counted, and one line says how many there were. 0 is no limit.
    pub lines_per_minute: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { level: Severity::default(), format: Format::default(), lines_per_minute: 60 }
    }
}

/// The level of an event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// A failure that somebody has to look at.
    Error,
    /// A failure that the program could handle.
    Warn,
    /// An event that is of interest to an operator.
    #[default]
    Info,
    /// Each step of a lookup below memory.
    Debug,
    /// Everything.
    Trace,
}

/// The format of a line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// Writes log lines to standard error from now on.
pub fn start(config: &Config) -> Log {
    let lines = tracing_subscriber::fmt::layer().with_writer(|| lines::Fit(std::io::stderr()));
    let (filter, level) = reload::Layer::new(filter(config.level));
    let repeats = Arc::new(Repeats::default());
    let registry = tracing_subscriber::registry().with(filter).with(Arc::clone(&repeats).layer());
    // A second start in one process changes nothing: only tests do that.
    let _ = match config.format {
        Format::Text => registry.with(lines.with_ansi(false).fmt_fields(Fields)).try_init(),
        Format::Json => registry.with(lines.json()).try_init(),
    };
    Log { level, repeats }
}

/// The started log.
#[derive(Debug, Clone)]
pub struct Log {
    level: reload::Handle<Targets, Registry>,
    repeats: Arc<Repeats>,
}

impl Log {
    /// Applies another level and another limit.
    pub fn change(&self, config: &Config) {
        // Refused only where the log no longer exists.
        let _ = self.level.reload(filter(config.level));
        self.repeats.bound(config.lines_per_minute);
    }

    /// From now on requests are served, and their senders must not be able to fill the log.
    pub fn serve(&self, config: &Config, metrics: &Metrics) {
        self.repeats.bound(config.lines_per_minute);
        self.repeats.count_in(metrics);
    }

    /// Logs once a minute how many lines were left out. Continues for as long as it is polled.
    pub async fn follow(self) {
        loop {
            tokio::time::sleep(repeats::WINDOW).await;
            self.tell_left_out();
        }
    }

    /// Logs how many lines were left out since it last did so.
    pub fn tell_left_out(&self) {
        for (place, is_ours, left_out) in self.repeats.left_out() {
            match is_ours {
                true => tracing::warn!(place, left_out, "lines that were said again and again were left out"),
                false => {
                    tracing::warn!(library = place, left_out, "lines of a library that repeats itself were left out");
                }
            }
        }
    }
}

/// The level applies to this program's own events. Libraries are limited to warnings at any level:
/// at their most verbose they write out requests with their headers, and so tokens.
fn filter(level: Severity) -> Targets {
    let level = match level {
        Severity::Error => Level::ERROR,
        Severity::Warn => Level::WARN,
        Severity::Info => Level::INFO,
        Severity::Debug => Level::DEBUG,
        Severity::Trace => Level::TRACE,
    };
    let libraries = LevelFilter::from_level(level.min(Level::WARN));
    Targets::new().with_default(libraries).with_target("secretier", level)
}

/// The name of this process for others: its host and process id.
#[must_use]
pub fn process_name() -> String {
    // An instance makes its name before it reads others' names.
    began();
    format!("{}/{}", gethostname::gethostname().to_string_lossy(), std::process::id())
}

/// When this process began, or first called this.
fn began() -> Instant {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    *BEGAN.get_or_init(Instant::now)
}

/// Whether a process of this name has certainly ended. It was on this host, and no process has its
/// id any more; or its id is ours, and it was last heard of before this process began.
#[must_use]
pub fn has_ended(name: &str, heard_ago: Duration) -> bool {
    let Some((host, number)) = name.rsplit_once('/') else { return false };
    if host != gethostname::gethostname().to_string_lossy() {
        return false;
    }
    match number.parse::<u32>() {
        Ok(number) if number == std::process::id() => heard_ago > began().elapsed(),
        Ok(number) => i32::try_from(number)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .is_some_and(|pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH)),
        Err(_) => false,
    }
}

/// Limits a message that would be logged as often as requests come: it may be logged once a second,
/// with the number of times that it was left out.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<(Option<Instant>, u64)>);

impl Seldom {
    const EVERY: Duration = Duration::from_secs(1);

    /// How often the message was left out since it was last logged; `None` where it must be left
    /// out now.
    pub fn may_say(&self) -> Option<u64> {
        let (said, held_back) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_some_and(|said| said.elapsed() < Self::EVERY) {
            *held_back += 1;
            return None;
        }
        *said = Some(Instant::now());
        Some(std::mem::take(held_back))
    }
}

/// An error with all its sources, in one line, without repetitions.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(error) = below {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        below = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_ended_where_there_is_none_of_its_number_or_it_had_ours_before() {
        let host = gethostname::gethostname().to_string_lossy().into_owned();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let number = child.id();
        assert!(!has_ended(&format!("{host}/{number}"), Duration::ZERO), "it was not waited for yet");
        child.wait().unwrap();
        assert!(has_ended(&format!("{host}/{number}"), Duration::ZERO));
        assert!(!has_ended(&process_name(), Duration::ZERO), "it is this one");
        assert!(has_ended(&process_name(), Duration::from_secs(24 * 60 * 60)));
        for other in [format!("another-{host}/{number}"), host, "nobody/x".to_owned()] {
            assert!(!has_ended(&other, Duration::from_secs(24 * 60 * 60)), "{other}");
        }
    }

    #[test]
    fn what_is_held_back_is_counted() {
        let seldom = Seldom::default();
        assert_eq!(seldom.may_say(), Some(0));
        assert_eq!([seldom.may_say(), seldom.may_say()], [None, None]);
        seldom.0.lock().unwrap().0 = Instant::now().checked_sub(Seldom::EVERY);
        assert_eq!(seldom.may_say(), Some(2));
    }
}
