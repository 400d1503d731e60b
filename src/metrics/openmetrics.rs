//! The page in OpenMetrics 1.0 (<https://prometheus.io/docs/specs/om/open_metrics_spec/>), made of
//! the one in Prometheus' text format.
//!
//! The differences: a counter's family is named without `_total`, and an info's without `_info`; units
//! are told; bounds of histograms have a fraction; no line is empty, and the last one is `# EOF`.

use super::table::{Described, Kind};

/// The same page, with the families of `table`.
pub(super) fn page(text: &str, table: &[Described]) -> String {
    let mut page = String::with_capacity(text.len() + text.len() / 8);
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let name = rest.split(' ').next().unwrap_or_default();
            if let Some(described) = table.iter().find(|described| described.name == name) {
                describe(&mut page, described);
            }
        } else if !line.is_empty() && !line.starts_with('#') {
            sample(&mut page, line);
            page.push('\n');
        }
    }
    page.push_str("# EOF\n");
    page
}

fn describe(page: &mut String, described: &Described) {
    let Described { name, kind, unit, help, .. } = described;
    let (family, kind) = match kind {
        Kind::Counter => (name.trim_end_matches("_total"), "counter"),
        Kind::Gauge => (*name, "gauge"),
        Kind::Histogram(_) => (*name, "histogram"),
        Kind::Info => (name.trim_end_matches("_info"), "info"),
    };
    for (word, text) in [("TYPE", Some(kind)), ("UNIT", unit.as_str()), ("HELP", Some(*help))] {
        if let Some(text) = text {
            page.extend(["# ", word, " ", family, " ", text, "\n"]);
        }
    }
}

/// A bound is written as a number with a fraction; everything else stays.
fn sample(page: &mut String, line: &str) {
    const BOUND: &str = "le=\"";
    let is_label = |at: usize| line[..at].ends_with(['{', ',']);
    let bound = line.find(BOUND).filter(|at| is_label(*at)).map(|at| at + BOUND.len());
    let end = bound.and_then(|start| Some(start + line[start..].find('"')?));
    match (bound, end) {
        (Some(start), Some(end)) if line[start..end].bytes().all(|byte| byte.is_ascii_digit()) => {
            page.extend([&line[..end], ".0", &line[end..]]);
        }
        _ => page.push_str(line),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Metrics, *};

    #[test]
    fn families_are_named_typed_and_ended_as_the_format_demands() {
        let metrics = Metrics::new();
        metrics.gauge("secretier_memory_bytes", &[], 5.0);
        metrics.count("secretier_errors_total", &[("code", "unavailable")]);
        metrics.observe("secretier_long_answer_wait_seconds", &[], std::time::Duration::from_millis(30));
        let page = metrics.render_openmetrics();
        for expected in [
            "# TYPE secretier_errors counter\n# HELP secretier_errors Answers",
            "\nsecretier_errors_total{code=\"unavailable\"} 1\n",
            "# TYPE secretier_memory_bytes gauge\n# UNIT secretier_memory_bytes bytes\n# HELP secretier_memory_bytes ",
            "\nsecretier_memory_bytes 5\n",
            "# TYPE secretier_build info\n# HELP secretier_build ",
            "# TYPE secretier_audit_strangers_bytes counter\n# UNIT secretier_audit_strangers_bytes bytes\n",
            "\nsecretier_long_answer_wait_seconds_bucket{le=\"0.05\"} 1\n",
            "\nsecretier_long_answer_wait_seconds_bucket{le=\"1.0\"} 1\n",
            "\nsecretier_long_answer_wait_seconds_bucket{le=\"+Inf\"} 1\n",
            "\nsecretier_long_answer_wait_seconds_count 1\n",
        ] {
            assert!(page.contains(expected), "{expected}\n{page}");
        }
        assert!(page.ends_with("\n# EOF\n") && page.matches("# EOF").count() == 1);
        assert!(!page.contains("\n\n") && !page.contains("# TYPE secretier_errors_total"));
    }

    #[test]
    fn what_looks_like_a_bound_in_another_label_stays() {
        let shown = |line: &str| {
            let mut page = String::new();
            sample(&mut page, line);
            page
        };
        assert_eq!(shown("a{le=\"5\"} 1"), "a{le=\"5.0\"} 1");
        assert_eq!(shown("a{b=\"c\",le=\"0.5\"} 1"), "a{b=\"c\",le=\"0.5\"} 1");
        assert_eq!(shown("a{role=\"5\"} 1"), "a{role=\"5\"} 1");
    }
}
