//! A bar with rate and time left on a terminal; elsewhere, a line from time to time.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows how far something is, on standard error.
pub(super) struct Progress {
    what: &'static str,
    total: u64,
    done: u64,
    failed: u64,
    started: Instant,
    /// On a terminal.
    bar: Option<ProgressBar>,
    line_at: Instant,
}

impl Progress {
    pub(super) fn new(what: &'static str, total: usize) -> Self {
        let total = total as u64;
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:32} {pos}/{len} {prefix}, {per_sec}, {eta} left{msg}");
            let bar = ProgressBar::new(total).with_prefix(what);
            // The template is our own; if it fails, the default style will do.
            match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        let now = Instant::now();
        Self { what, total, done: 0, failed: 0, started: now, bar, line_at: now + LINE_EVERY }
    }

    /// One more is done, or has failed.
    pub(super) fn step(&mut self, is_done: bool) {
        self.done += 1;
        self.failed += u64::from(!is_done);
        match &self.bar {
            Some(bar) => {
                if self.failed > 0 {
                    bar.set_message(format!(", {} failed", self.failed));
                }
                bar.inc(1);
            }
            None if Instant::now() >= self.line_at => {
                self.line_at = Instant::now() + LINE_EVERY;
                let (done, total, what) = (self.done, self.total, self.what);
                eprintln!("{done}/{total} {what}, {:.1}/s, {} left, {} failed", self.rate(), self.left(), self.failed);
            }
            None => {}
        }
    }

    /// So many are done.
    pub(super) fn at(&mut self, done: usize) {
        while self.done < done as u64 {
            self.step(true);
        }
    }

    /// Says something without breaking the bar.
    pub(super) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    pub(super) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }

    fn rate(&self) -> f64 {
        self.done as f64 / self.started.elapsed().as_secs_f64().max(0.001)
    }

    fn left(&self) -> HumanDuration {
        let left = self.total.saturating_sub(self.done) as f64 / self.rate().max(0.001);
        HumanDuration(Duration::from_secs_f64(left.clamp(0.0, 1e9)))
    }
}
