//! The metrics, and the page that shows them (Prometheus text format).
//!
//! Labels are words from this program, never names from a caller, so the number of time series is
//! fixed.

use std::{fmt, sync::Arc, time::Duration};

use metrics::{Key, Label, Level, Metadata, Recorder as _};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

static METADATA: Metadata<'static> = Metadata::new("secretier", Level::INFO, None);

/// The counters of one instance.
pub struct Metrics {
    recorder: PrometheusRecorder,
    page: PrometheusHandle,
}

impl Metrics {
    /// Creates the metrics, with all counters at zero.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let recorder = PrometheusBuilder::new().build_recorder();
        let page = recorder.handle();
        Arc::new(Self { recorder, page })
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

    /// The page, in Prometheus text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.upkeep();
        self.page.render()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

fn key(name: &'static str, labels: &[(&'static str, &'static str)]) -> Key {
    let labels: Vec<Label> = labels.iter().map(|&(name, value)| Label::new(name, value)).collect();
    Key::from_parts(name, labels)
}
