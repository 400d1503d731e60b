//! Checks the clocks: whether the wall clock was set, and how far it is from the database's.
//!
//! Nothing depends on it. Code that needs an age or an expiry reads the clocks itself; this is for
//! operators, who should know of a clock that goes wrong.

use std::{sync::Arc, time::Duration};

use super::turns;
use crate::{clock::Clock, metrics::Metrics};

/// How often the clocks are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The difference from the database's clock, and the change of it, that are not logged, in
/// milliseconds.
const TOLERATED: i64 = 5000;

/// How often a difference is logged again, if nothing else is new.
const SAY_EVERY: Duration = Duration::from_secs(60 * 60);

/// Watches the clocks.
pub struct Clocks {
    clock: Clock,
    metrics: Arc<Metrics>,
    /// The difference when it was last logged, and when that was by the running clock.
    said: Option<(i64, Duration)>,
}

impl Clocks {
    /// Watches this clock.
    #[must_use]
    pub fn new(clock: Clock, metrics: Arc<Metrics>) -> Self {
        Self { clock, metrics, said: None }
    }

    /// Runs until `stopped` completes.
    pub async fn until(mut self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = turns(CHECK_INTERVAL);
        loop {
            tokio::select! {
                _ = turns.tick() => self.look(),
                () = &mut stopped => break,
            }
        }
    }

    fn look(&mut self) {
        if let Some(step) = self.clock.take_step() {
            self.metrics.count("secretier_wall_clock_steps_total", &[]);
            tracing::warn!(step_ms = step, "the wall clock was set {} by {}", direction(step), shown(step));
        }
        if let Some(ahead) = self.clock.ahead_of_database() {
            #[expect(clippy::cast_precision_loss, reason = "a metric is a float")]
            self.metrics.gauge("secretier_clock_ahead_of_database_seconds", &[], ahead as f64 / 1000.0);
            self.compare(ahead);
        }
    }

    /// Logs how far the wall clock is from the database's, where that is far and news.
    fn compare(&mut self, ahead: i64) {
        let now = self.clock.running();
        let is_known = |(said, at): (i64, Duration)| {
            ahead.abs_diff(said) <= TOLERATED.unsigned_abs() && now.saturating_sub(at) < SAY_EVERY
        };
        match (ahead.abs() > TOLERATED, self.said) {
            (true, said) if !said.is_some_and(is_known) => {
                self.said = Some((ahead, now));
                tracing::warn!(
                    ahead_ms = ahead,
                    "this machine's clock is {} the database's by {}: one of the two is wrong. Ages of copies go by \
                     the database's; expiries of tokens, and the times in the audit and in the log, by this machine's",
                    if ahead > 0 { "ahead of" } else { "behind" },
                    shown(ahead)
                );
            }
            (false, Some(_)) => {
                self.said = None;
                tracing::info!("this machine's clock agrees with the database's again");
            }
            _ => {}
        }
    }
}

fn direction(step: i64) -> &'static str {
    if step > 0 { "ahead" } else { "back" }
}

/// A duration for people, to the second where it is longer than that.
fn shown(millis: i64) -> String {
    let exact = Duration::from_millis(millis.unsigned_abs());
    let whole = Duration::from_secs((millis.unsigned_abs() + 500) / 1000);
    humantime::format_duration(if whole < Duration::from_secs(2) { exact } else { whole }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clocks() -> Clocks {
        Clocks::new(Clock::system(), Metrics::new())
    }

    fn said(clocks: &mut Clocks) -> Option<i64> {
        let before = clocks.said;
        clocks.look();
        (clocks.said != before).then(|| clocks.said.map_or(0, |(ahead, _)| (ahead as f64 / 1000.0).round() as i64))
    }

    #[test]
    fn a_clock_that_is_wrong_is_told_of_once_an_hour_and_when_it_changes() {
        let mut clocks = clocks();
        assert_eq!(said(&mut clocks), None, "there is nothing to compare it with");
        clocks.clock.follow_database(clocks.clock.now(), clocks.clock.running());
        assert_eq!(said(&mut clocks), None);
        clocks.clock.step(90_000);
        assert_eq!(said(&mut clocks), Some(90));
        clocks.clock.advance(SAY_EVERY - Duration::from_secs(60));
        assert_eq!(said(&mut clocks), None);
        clocks.clock.step(10_000);
        assert_eq!(said(&mut clocks), Some(100));
        clocks.clock.advance(SAY_EVERY);
        assert_eq!(said(&mut clocks), Some(100));
        clocks.clock.step(-100_000);
        assert_eq!(said(&mut clocks), Some(0), "it is told that it is right again");
        assert!(clocks.metrics.render().contains("secretier_clock_ahead_of_database_seconds"));
    }

    #[test]
    fn a_step_is_counted_once() {
        let mut clocks = clocks();
        clocks.look();
        clocks.clock.step(-3_600_000);
        clocks.look();
        clocks.look();
        clocks.clock.advance(Duration::from_secs(3 * 24 * 60 * 60));
        clocks.look();
        assert!(clocks.metrics.render().contains("secretier_wall_clock_steps_total 1\n"));
    }

    #[test]
    fn a_step_is_told_as_people_write_it() {
        assert_eq!(shown(3 * 24 * 3_600_000 + 12), "3days");
        assert_eq!(shown(-3_600_400), "1h");
        assert_eq!(shown(1002), "1s 2ms");
        assert_eq!((direction(-1), direction(1)), ("back", "ahead"));
    }
}
