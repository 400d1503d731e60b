//! The page of metrics.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::Method;
use secretier::{
    metrics::{Described, Kind, TABLE},
    phase::Phase,
};

use crate::{
    app::{Answer, Backend, Setup, TestApp, on_both},
    promtool::{promtool, says},
};

/// The row of a sample's name.
pub(crate) fn described(name: &str) -> Option<&'static Described> {
    let of_histogram = ["_bucket", "_sum", "_count"].into_iter().find_map(|ending| name.strip_suffix(ending));
    let by_name = |name: &str| TABLE.iter().find(|described| described.name == name);
    by_name(name)
        .filter(|described| !matches!(described.kind, Kind::Histogram(_)))
        .or_else(|| by_name(of_histogram?).filter(|described| matches!(described.kind, Kind::Histogram(_))))
}

/// The labels of a sample, as a page shows them.
fn labels(line: &str) -> BTreeMap<&str, &str> {
    let Some((_, rest)) = line.split_once('{') else { return BTreeMap::new() };
    let (inside, _) = rest.rsplit_once('}').unwrap();
    inside
        .split("\",")
        .map(|label| label.split_once("=\"").unwrap())
        .map(|(name, value)| (name, value.trim_end_matches('"')))
        .collect()
}

/// What a page in Prometheus' text format shows and the table of metrics does not have.
pub(crate) fn flaws(page: &str) -> Vec<String> {
    let mut flaws = Vec::new();
    let mut typed = BTreeSet::new();
    for line in page.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# ") {
            typed.insert(rest.split(' ').take(2).collect::<Vec<_>>().join(" "));
            continue;
        }
        let name = line.split(['{', ' ']).next().unwrap();
        let Some(metric) = described(name) else {
            flaws.push(format!("{name} is not in the table of src/metrics/table.rs"));
            continue;
        };
        let shown = labels(line);
        let listed: BTreeSet<_> = metric.labels.iter().map(|label| label.name).collect();
        let names: BTreeSet<_> = shown.keys().copied().filter(|name| *name != "le").collect();
        if names != listed {
            flaws.push(format!("{line}: the table has the labels {listed:?}"));
        }
        for label in metric.labels {
            let is_listed =
                label.values.is_empty() || label.values.iter().any(|value| Some(value) == shown.get(label.name));
            if !is_listed {
                flaws.push(format!("{line}: the table does not have this {}", label.name));
            }
        }
        for word in ["HELP", "TYPE"] {
            if !typed.contains(&format!("{word} {}", metric.name)) {
                flaws.push(format!("{line}: no {word} before it"));
            }
        }
    }
    flaws
}

/// An instance that has answered from each tier, refused, failed, and written.
async fn busy(backend: Backend) -> TestApp {
    let app = Setup::new(backend, Phase::Hybrid).start().await;
    app.holds("acme", &[("A", "1")]);
    for _ in 0..2 {
        assert_eq!(app.get("acme", "A").await.value(), "1");
    }
    assert_eq!(app.put("acme", "B", "2").await.status, 201);
    assert_eq!(app.get("acme", "NOWHERE").await.status, 404);
    assert_eq!(Answer::of(app.request(Method::GET, "/v1/tenants/acme/secrets")).await.status, 200);
    let stranger = app.instance().request(Method::GET, "/v1/tenants/acme/secrets/A").bearer_auth("st_none");
    assert_eq!(Answer::of(stranger).await.status, 401);
    app
}

async fn page_in(app: &TestApp, accept: &str) -> Answer {
    Answer::of(app.request(Method::GET, "/metrics").header("accept", accept)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn promtool_finds_nothing_wrong_with_the_page_of_a_busy_instance() {
    let Some(promtool) = promtool() else { return };
    on_both(async |backend| {
        let app = busy(backend).await;
        let page = app.metrics().await;
        for shown in [
            "# HELP secretier_lookups_total ",
            "# TYPE secretier_request_duration_seconds histogram\n",
            "secretier_build_info{version=\"",
            "secretier_lookups_total{tier=\"memory\",outcome=\"found\"} 1\n",
            "secretier_lookups_total{tier=\"infisical\",outcome=\"found\"} 1\n",
        ] {
            assert!(page.contains(shown), "{shown}\n{page}");
        }
        assert_eq!(says(&promtool, &["check", "metrics"], &page), (true, String::new()));
    })
    .await;
    let (is_content, said) = says(&promtool, &["check", "metrics"], "# TYPE a_count gauge\na_count 1\n");
    assert!(!is_content && said.contains("no help text"), "it is asked for real: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_in_the_format_that_is_asked_for() {
    const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
    let app = busy(Backend::sqlite()).await;
    for (accept, expected) in [
        ("*/*", TEXT),
        ("text/plain", TEXT),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.5", TEXT),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", OPENMETRICS),
    ] {
        let answer = page_in(&app, accept).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, expected), "{accept}");
        assert_eq!(answer.header("vary"), "Accept");
        assert_eq!(answer.text.ends_with("# EOF\n"), expected == OPENMETRICS);
    }

    // The same series, in another form.
    let series = |page: &str| -> BTreeSet<String> {
        let samples = page.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        samples.map(|line| line.rsplit_once(' ').unwrap().0.replace(".0\"", "\"")).collect()
    };
    let (text, open) = (app.metrics().await, page_in(&app, "application/openmetrics-text").await.text);
    assert_eq!(series(&text), series(&open));

    // Each family is declared once, before its samples, which stand together.
    let (mut seen, mut family) = (BTreeSet::new(), (String::new(), String::new()));
    for line in open.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(seen.insert(name.to_owned()), "{name} twice");
            family = (name.to_owned(), kind.to_owned());
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap();
            let endings: &[&str] = match family.1.as_str() {
                "counter" => &["_total"],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            assert!(endings.iter().any(|ending| name == format!("{}{ending}", family.0)), "{line} after {family:?}");
        }
    }
    assert!(seen.contains("secretier_lookups") && seen.contains("secretier_build"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_of_every_answer_that_memory_does_not_have_at_once_is_counted_by_its_status() {
    let mut app = busy(Backend::sqlite()).await;
    let count = async |app: &TestApp, status: &str| -> u64 {
        let series = format!("secretier_request_duration_seconds_count{{status=\"{status}\"}} ");
        let page = app.metrics().await;
        page.lines().find_map(|line| line.strip_prefix(&series)).unwrap().parse().unwrap()
    };
    let (ok, wrong) = (count(&app, "2xx").await, count(&app, "4xx").await);
    assert_eq!(app.get("acme", "A").await.status, 200);
    // The pages themselves are two answers.
    assert_eq!((count(&app, "2xx").await, wrong), (ok + 2, 1), "a hit of memory is not one of them");
    app.infisical.stop().await;
    assert_eq!(app.put("acme", "A", "2").await.status, 503);
    assert_eq!(count(&app, "5xx").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alert_can_see_how_old_the_news_from_the_database_is() {
    let mut setup = Setup::new(Backend::sqlite(), Phase::Database);
    setup.database = "max_detached = \"10s\"\n".to_owned();
    let app = setup.start().await;
    let value = async |series: &str| -> f64 {
        let page = app.metrics().await;
        page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')).unwrap().parse().unwrap()
    };
    assert_eq!(value("secretier_max_detached_seconds").await, 10.0);
    assert!(value("secretier_database_news_age_seconds").await < 10.0);
    assert_eq!(value("secretier_offline").await, 0.0);
}
