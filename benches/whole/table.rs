//! What was measured, as a table for people and as JSON for programs.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// One figure, measured in each round.
#[derive(Clone, Default)]
pub(crate) struct Samples(pub(crate) Vec<f64>);

impl Samples {
    pub(crate) fn one(value: f64) -> Self {
        Self(vec![value])
    }

    pub(crate) fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Round by round, so that what slowed down a round slowed down both.
    pub(crate) fn over(&self, other: &Self) -> Self {
        assert_eq!(self.0.len(), other.0.len(), "both were measured in each round");
        Self(self.0.iter().zip(&other.0).map(|(ours, other)| ours / other).collect())
    }

    /// Round by round.
    pub(crate) fn plus(&self, other: &Self) -> Self {
        assert_eq!(self.0.len(), other.0.len(), "both were measured in each round");
        Self(self.0.iter().zip(&other.0).map(|(ours, other)| ours + other).collect())
    }

    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => sorted[count / 2],
            count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
        }
    }

    fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn most(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    fn json(&self) -> Value {
        json!({ "median": self.median(), "min": self.least(), "max": self.most(), "rounds": self.0 })
    }
}

/// What is aimed at: of the ratio where there is a baseline, else of the figure itself.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    fn is_met(self, figure: f64) -> bool {
        match self {
            Self::AtMost(most) => figure <= most,
            Self::AtLeast(least) => figure >= least,
        }
    }
}

/// One line of the table.
pub(crate) struct Line {
    section: &'static str,
    what: String,
    unit: &'static str,
    ours: Samples,
    baseline: Option<(String, Samples)>,
    target: Option<Target>,
    /// Whether it comes out the same on every machine of a kind, busy or not.
    repeats: bool,
}

impl Line {
    pub(crate) fn new(section: &'static str, what: impl Into<String>, unit: &'static str, ours: Samples) -> Self {
        Self { section, what: what.into(), unit, ours, baseline: None, target: None, repeats: false }
    }

    pub(crate) fn against(mut self, baseline: impl Into<String>, samples: Samples) -> Self {
        self.baseline = Some((baseline.into(), samples));
        self
    }

    pub(crate) fn target(mut self, target: Target) -> Self {
        self.target = Some(target);
        self
    }

    pub(crate) fn repeats(mut self) -> Self {
        self.repeats = true;
        self
    }

    fn ratio(&self) -> Option<Samples> {
        self.baseline.as_ref().map(|(_, baseline)| self.ours.over(baseline))
    }

    /// Whether the target is met, where there is one.
    fn is_met(&self) -> Option<bool> {
        let figure = self.ratio().unwrap_or_else(|| self.ours.clone()).median();
        self.target.map(|target| target.is_met(figure))
    }

    fn name(&self) -> String {
        format!("{}: {}, {}", self.section, self.what, self.unit)
    }

    fn json(&self) -> Value {
        json!({
            "section": self.section,
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours.json(),
            "baseline": self.baseline.as_ref().map(|(name, samples)| json!({ "name": name, "figures": samples.json() })),
            "ratio": self.ratio().map(|ratio| ratio.json()),
            "target": self.target.map(|target| match target {
                Target::AtMost(most) => json!({ "at_most": most }),
                Target::AtLeast(least) => json!({ "at_least": least }),
            }),
            "met": self.is_met(),
        })
    }
}

/// Figures that repeat, as a run left them: ours, by name.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Kept(BTreeMap<String, f64>);

/// By how much, in percent, a figure that repeats may grow unnoticed.
const UNNOTICED: f64 = 5.0;

impl Kept {
    /// What the last kept run left; nothing where there is none.
    pub(crate) fn read(file: &Path) -> Self {
        let Ok(text) = std::fs::read_to_string(file) else { return Self::default() };
        serde_json::from_str(&text).unwrap()
    }

    /// Puts this run's figures in the places of those before; what was not measured stays.
    pub(crate) fn replace(mut self, table: &Table, file: &Path) {
        self.0.extend(table.repeating().map(|line| (line.name(), line.ours.median())));
        let text = serde_json::to_string_pretty(&self).unwrap();
        std::fs::write(file, text + "\n").unwrap();
    }
}

/// All that was measured.
#[derive(Default)]
pub(crate) struct Table {
    lines: Vec<Line>,
    printed: usize,
}

impl Table {
    pub(crate) fn add(&mut self, line: Line) {
        self.lines.push(line);
    }

    fn repeating(&self) -> impl Iterator<Item = &Line> {
        self.lines.iter().filter(|line| line.repeats)
    }

    /// Prints what has come since the last time.
    pub(crate) fn print(&mut self) {
        let new = &self.lines[self.printed..];
        self.printed = self.lines.len();
        let mut rows = vec![["what", "ours", "baseline", "ratio", "target"].map(str::to_owned)];
        for line in new {
            let baseline = line.baseline.as_ref().map(|(name, samples)| format!("{} {name}", spread(samples)));
            let target = line.target.map(|target| {
                let said = match target {
                    Target::AtMost(most) => format!("<= {}", number(most)),
                    Target::AtLeast(least) => format!(">= {}", number(least)),
                };
                said + if line.is_met() == Some(true) { "" } else { "  MISSED" }
            });
            rows.push([
                format!("{} [{}]", line.what, line.unit),
                spread(&line.ours),
                baseline.unwrap_or_default(),
                line.ratio().map(|ratio| spread(&ratio)).unwrap_or_default(),
                target.unwrap_or_default(),
            ]);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..5).map(width).collect();
        for row in &rows {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
            println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        }
    }

    /// Says how the figures that repeat stand beside those that were kept. Tells whether none
    /// has grown by more than may go unnoticed.
    pub(crate) fn compare(&self, kept: &Kept) -> bool {
        let mut is_good = true;
        for line in self.repeating() {
            let (name, now) = (line.name(), line.ours.median());
            let Some(&before) = kept.0.get(&name) else {
                println!("{name}: {}, nothing kept to compare with", number(now));
                continue;
            };
            // Half an allocation is none that a request makes: something goes on beside it.
            let percent = if (now - before).abs() < 0.5 { 0.0 } else { (now / before.max(1.0) - 1.0) * 100.0 };
            let said = match percent {
                more if more > UNNOTICED => {
                    is_good = false;
                    format!("{more:.1} % MORE than kept")
                }
                less if less < -UNNOTICED => format!("{:.1} % less than kept: keep it with --keep", -less),
                same => format!("{same:+.1} %"),
            };
            let (now, before) = (number(now), number(before));
            let ratio = line.ratio().map(|ratio| format!(", {:.2} times its baseline", ratio.median()));
            println!("{name}: {now} (kept {before}): {said}{}", ratio.unwrap_or_default());
        }
        is_good
    }

    /// What was aimed at and missed.
    pub(crate) fn missed(&self) -> Vec<String> {
        self.lines.iter().filter(|line| line.is_met() == Some(false)).map(Line::name).collect()
    }

    pub(crate) fn json(&self) -> Value {
        self.lines.iter().map(Line::json).collect()
    }
}

/// The median, and from where to where the rounds went.
fn spread(samples: &Samples) -> String {
    let median = number(samples.median());
    let (least, most) = (number(samples.least()), number(samples.most()));
    if least == most { median } else { format!("{median} ({least}..{most})") }
}

/// Three digits that say something, or all before the point.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || size == 0.0 => {
            let digits = format!("{:.0}", value.abs());
            let grouped = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group).into_owned());
            let sign = if value < 0.0 { "-" } else { "" };
            format!("{sign}{}", grouped.collect::<Vec<_>>().join(","))
        }
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
