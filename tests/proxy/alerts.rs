//! What is made of the metrics: alerts for Prometheus, and a dashboard for Grafana.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use secretier::metrics::TABLE;
use serde_json::{Value, json};

use crate::{
    metrics::described,
    promtool::{promtool, says},
};

const RULES: &str = "config/prometheus-rules.yaml";
const RULES_TESTS: &str = "tests/prometheus-rules.yaml";
const DASHBOARD: &str = "examples/grafana-dashboard.json";

fn at(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display().to_string()
}

fn read(path: &str) -> String {
    fs::read_to_string(at(path)).unwrap()
}

/// The names of metrics in a text.
fn metrics_in(text: &str) -> BTreeSet<&str> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    words.filter(|word| word.starts_with("secretier_") || word.starts_with("process_")).collect()
}

/// Those that the table lacks. A histogram may be named as a whole, in a text.
fn unknown(metrics: BTreeSet<&str>) -> Vec<String> {
    let is_known = |name: &str| described(name).is_some() || TABLE.iter().any(|metric| metric.name == name);
    metrics.into_iter().filter(|name| !is_known(name)).map(str::to_owned).collect()
}

#[test]
fn every_metric_that_alerts_and_dashboard_name_exists() {
    let rules = read(RULES);
    let named = metrics_in(&rules);
    assert!(named.len() > 30, "{named:?}");
    assert_eq!(unknown(named), [""; 0]);
    let dashboard = read(DASHBOARD);
    let named = metrics_in(&dashboard);
    assert!(named.len() > 30, "{named:?}");
    assert_eq!(unknown(named), [""; 0]);
}

fn alerts() -> Vec<String> {
    let rules = read(RULES);
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    names.map(str::to_owned).collect()
}

#[test]
fn every_alert_says_what_happened_and_where_to_read_on() {
    let rules = read(RULES);
    for alert in rules.split("- alert: ").skip(1) {
        let name = alert.lines().next().unwrap();
        for part in ["summary: \"", "description: >-\n", "severity: ", "{{ $labels.instance }}"] {
            assert!(alert.contains(part), "{name}: {part}");
        }
        let runbook = alert.lines().find_map(|line| line.trim().strip_prefix("runbook: ")).expect(name);
        let (file, anchor) = runbook.split_once('#').expect(name);
        let anchors: Vec<String> = read(file)
            .lines()
            .filter(|line| line.starts_with('#'))
            .map(|line| line.trim_start_matches('#').trim().to_lowercase())
            .map(|title| title.replace(' ', "-").replace([',', '.', '\''], ""))
            .collect();
        assert!(anchors.iter().any(|one| one == anchor), "{name}: {runbook} is none of {anchors:?}");
    }
}

#[test]
fn every_cause_of_an_outage_upstream_is_in_one_alert() {
    let rules = read(RULES);
    let patterns: Vec<_> = rules.split("secretier_upstream_cause{cause=~\"").skip(1).collect();
    let alerted: Vec<_> = patterns.iter().flat_map(|rest| rest.split('"').next().unwrap().split('|')).collect();
    let metric = TABLE.iter().find(|metric| metric.name == "secretier_upstream_cause").unwrap();
    let (unique, all): (BTreeSet<_>, BTreeSet<_>) =
        (alerted.iter().copied().collect(), metric.labels[0].values.iter().copied().collect());
    assert_eq!((alerted.len(), unique), (all.len(), all));
}

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    let tests = read(RULES_TESTS);
    for alert in alerts() {
        let asked = format!("count by (instance) (ALERTS{{alertname=\"{alert}\",alertstate=\"firing\"}})");
        let answers: Vec<_> =
            tests.split(asked.as_str()).skip(1).map(|rest| rest.split("exp_samples:").nth(1).unwrap()).collect();
        let of_one = |answer: &&&str| answer.trim_start().starts_with("[{ labels: '{instance=\"bad\"}', value: 1 }]");
        let silent = |answer: &&&str| answer.trim_start().starts_with("[]");
        assert_eq!(answers.iter().filter(of_one).count(), 1, "{alert} fires for one of several instances");
        assert!(answers.iter().any(|answer| silent(&answer)), "{alert} is silent before");
    }
    let Some(promtool) = promtool() else { return };
    let (is_content, said) = says(&promtool, &["check", "rules", &at(RULES)], "");
    assert!(is_content && said.contains(&format!("{} rules found", alerts().len())), "{said}");
    let (is_content, said) = says(&promtool, &["test", "rules", &at(RULES_TESTS)], "");
    assert!(is_content, "{said}");
}

fn panels(dashboard: &Value) -> &Vec<Value> {
    dashboard["panels"].as_array().unwrap()
}

#[test]
fn the_panels_of_the_dashboard_stand_beside_each_other_and_ask_the_chosen_source() {
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)).unwrap();
    let panels = panels(&dashboard);
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "ids are unique");
    let mut taken = BTreeMap::new();
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap());
        assert!(w > 0 && h > 0 && x + w <= 24, "{title}");
        for place in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert_eq!(taken.insert(place, title), None, "{title} covers {place:?}");
        }
        if panel["type"] == "row" {
            continue;
        }
        assert!(!panel["description"].as_str().unwrap().is_empty(), "{title}");
        let targets = panel["targets"].as_array().unwrap();
        let letters: BTreeSet<_> = targets.iter().map(|target| target["refId"].as_str().unwrap()).collect();
        assert!(!targets.is_empty() && letters.len() == targets.len(), "{title}");
        for asked in targets.iter().chain([panel]) {
            assert_eq!(asked["datasource"], json!({ "type": "prometheus", "uid": "${datasource}" }), "{title}");
        }
        for target in targets {
            assert!(target["expr"].as_str().unwrap().contains("instance=~\"$instance\""), "{title}");
        }
    }
    let variables: Vec<_> =
        dashboard["templating"]["list"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(variables, ["datasource", "job", "instance"]);
}

#[test]
fn the_expressions_of_the_dashboard_can_be_asked() {
    let Some(promtool) = promtool() else { return };
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)).unwrap();
    let targets = panels(&dashboard).iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let rules: Vec<_> = targets
        .enumerate()
        .map(|(number, target)| {
            let expr = target["expr"].as_str().unwrap().replace("$__rate_interval", "5m");
            assert!(!expr.replace("$job", "").replace("$instance", "").contains('$'), "{expr}");
            json!({ "record": format!("dashboard:{number}"), "expr": expr })
        })
        .collect();
    assert!(rules.len() > 30);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules.yaml");
    // What is JSON is YAML.
    fs::write(&file, json!({ "groups": [{ "name": "dashboard", "rules": rules }] }).to_string()).unwrap();
    let (is_content, said) = says(&promtool, &["check", "rules", file.to_str().unwrap()], "");
    assert!(is_content, "{said}");
}
