//! The metrics, and the page that shows them: in Prometheus' text format, or in OpenMetrics.
//!
//! Labels are words from this program, never names from a caller, so the number of time series is
//! fixed. Each metric is described in [`TABLE`].

mod openmetrics;
mod process;
mod table;

use std::{
    env, fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use metrics::{Key, Level, Metadata, Recorder as _};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

pub use table::{Described, Kind, Label, TABLE, Unit};

static METADATA: Metadata<'static> = Metadata::new("secretier", Level::INFO, None);

/// The counters of one instance.
pub struct Metrics {
    recorder: PrometheusRecorder,
    page: PrometheusHandle,
}

impl Metrics {
    /// Creates the metrics, described, with all counters at zero.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let builder = TABLE.iter().fold(PrometheusBuilder::new(), |builder, described| match described.kind {
            Kind::Histogram(bounds) => {
                let name = Matcher::Full(described.name.to_owned());
                // The only error is an empty list of bounds; quantiles would be shown in their place.
                builder.set_buckets_for_metric(name, bounds).unwrap_or_else(|_| PrometheusBuilder::new())
            }
            Kind::Counter | Kind::Gauge | Kind::Info => builder,
        });
        let recorder = builder.build_recorder();
        let page = recorder.handle();
        let metrics = Self { recorder, page };
        TABLE.iter().for_each(|described| metrics.describe(described));
        let build = [("version", env!("CARGO_PKG_VERSION")), ("os", env::consts::OS), ("arch", env::consts::ARCH)];
        metrics.gauge("secretier_build_info", &build, 1.0);
        let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        metrics.gauge("process_start_time_seconds", &[], started.as_secs_f64());
        Arc::new(metrics)
    }

    /// Describes a metric, and has a counter begin at zero where its labels are known: an increase
    /// from nothing to 1 is none to Prometheus.
    fn describe(&self, described: &Described) {
        let Described { name, kind, labels, help, .. } = *described;
        match kind {
            Kind::Counter => self.recorder.describe_counter(name.into(), None, help.into()),
            Kind::Gauge | Kind::Info => self.recorder.describe_gauge(name.into(), None, help.into()),
            Kind::Histogram(_) => self.recorder.describe_histogram(name.into(), None, help.into()),
        }
        match (kind, labels) {
            (Kind::Counter, []) => self.counter(name, &[]).increment(0),
            (Kind::Counter, [label]) => {
                label.values.iter().for_each(|value| self.counter(name, &[(label.name, value)]).increment(0));
            }
            _ => {}
        }
    }

    /// Adds one to a counter. Not for the hot path, which keeps [`Self::counter`]'s handle.
    pub fn count(&self, name: &'static str, labels: &[(&'static str, &'static str)]) {
        self.counter(name, labels).increment(1);
    }

    /// Returns a handle to a counter, to be kept.
    pub fn counter(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> metrics::Counter {
        self.recorder.register_counter(&key(name, labels), &METADATA)
    }

    /// Sets a gauge.
    pub fn gauge(&self, name: &'static str, labels: &[(&'static str, &'static str)], value: f64) {
        self.recorder.register_gauge(&key(name, labels), &METADATA).set(value);
    }

    /// Returns a handle to a histogram, to be kept.
    pub fn histogram(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> metrics::Histogram {
        self.recorder.register_histogram(&key(name, labels), &METADATA)
    }

    /// Adds a duration to a histogram, in seconds.
    pub fn observe(&self, name: &'static str, labels: &[(&'static str, &'static str)], took: Duration) {
        self.histogram(name, labels).record(took.as_secs_f64());
    }

    /// Aggregates the samples of histograms; to be called now and then.
    pub fn upkeep(&self) {
        self.page.run_upkeep();
    }

    /// The page, in Prometheus' text format 0.0.4, with the families in the order of their names.
    #[must_use]
    pub fn render(&self) -> String {
        self.upkeep();
        process::show(self);
        let page = self.page.render();
        let mut families: Vec<&str> = page.split_inclusive("\n\n").collect();
        families.sort_unstable();
        families.concat()
    }

    /// The same in OpenMetrics 1.0.
    #[must_use]
    pub fn render_openmetrics(&self) -> String {
        openmetrics::page(&self.render(), TABLE)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

fn key(name: &'static str, labels: &[(&'static str, &'static str)]) -> Key {
    let labels: Vec<metrics::Label> = labels.iter().map(|&(name, value)| metrics::Label::new(name, value)).collect();
    Key::from_parts(name, labels)
}
