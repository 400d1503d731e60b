//! `secretier doctor`: examines everything that an instance with this configuration needs.

mod keys;
mod machine;

use std::{process::ExitCode, time::Duration};

use clap::Args;
use serde_json::json;

use super::{ConfigFile, Failure};
use crate::{
    clock::Clock,
    config::{Config, Loaded},
    diagnosis::{Area, Finding, Outcome},
    metrics::Metrics,
    tiers::{
        database::{self, Readiness},
        upstream,
    },
};

/// When an examination ends that has not ended by itself. The database and then the master keys have
/// half of it each.
const PATIENCE: Duration = Duration::from_secs(18);

#[derive(Debug, Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    config: ConfigFile,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let area = Area::new("configuration");
        let findings = match Loaded::read(self.config.config.as_deref()) {
            Err(error) => {
                for fault in error.faults() {
                    area.failure("settings", fault, "correct it; docs/CONFIGURATION.md has every setting");
                }
                area.into_findings()
            }
            Ok(loaded) => {
                let file = loaded.file.as_ref().map(|file| file.display().to_string());
                area.ok(
                    "settings",
                    format!("{} is good", file.as_deref().unwrap_or("the environment's configuration")),
                );
                for warning in loaded.warnings() {
                    area.warning("file modes", warning, "a file with a secret in it is its owner's alone");
                }
                let mut findings = area.into_findings();
                findings.extend(examine(&loaded.config, Scope::All).await);
                findings
            }
        };
        Ok(report(&findings, self.json))
    }
}

/// How much is examined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Everything that the configuration leads to: database, master keys and upstream.
    Connections,
    /// This machine too.
    All,
}

/// Examines what this configuration leads to; ends in time whatever hangs.
pub(super) async fn examine(config: &Config, scope: Scope) -> Vec<Finding> {
    let areas = ["machine", "database", "master keys", "upstream"].map(Area::new);
    let [machine, database, keys, upstream] = &areas;
    let clock = Clock::system();
    let stored = async {
        let examined = within(PATIENCE / 2, database, database::examine(&config.database, &clock, database)).await;
        let readiness = examined.unwrap_or(Readiness::Unusable);
        within(PATIENCE / 2, keys, keys::examine(config, &clock, readiness, keys)).await;
    };
    let this_machine = async {
        if scope == Scope::All {
            within(PATIENCE, machine, machine::examine(config, machine)).await;
        }
    };
    let far = within(PATIENCE, upstream, examine_upstream(config, &clock, upstream));
    tokio::join!(this_machine, Box::pin(stored), Box::pin(far));
    areas.into_iter().flat_map(Area::into_findings).collect()
}

/// Examines one area, for so long.
async fn within<T>(patience: Duration, area: &Area, examination: impl Future<Output = T>) -> Option<T> {
    let examined = tokio::time::timeout(patience, examination).await.ok();
    if examined.is_none() {
        area.ran_out_of_time();
    }
    examined
}

async fn examine_upstream(config: &Config, clock: &Clock, area: &Area) {
    area.begins("settings");
    let Some(settings) = config.upstream() else {
        return area.ok("settings", "there is none: the database owns all secrets");
    };
    match upstream::build(Some(settings), config.environment.as_str(), &config.keys.withheld(), clock, &Metrics::new())
    {
        Ok(Some(upstream)) => upstream.examine(settings, area).await,
        Ok(None) => {}
        Err(error) => {
            area.failure("settings", crate::log::chain(&error), "correct the section in the configuration");
        }
    }
}

/// Prints the findings; fails if one of them is a failure.
pub(super) fn report(findings: &[Finding], as_json: bool) -> ExitCode {
    let count = |outcome| findings.iter().filter(|finding| finding.outcome == outcome).count();
    let (failures, warnings) = (count(Outcome::Failure), count(Outcome::Warning));
    if as_json {
        println!(
            "{}",
            json!({ "ok": failures == 0, "failures": failures, "warnings": warnings, "findings": findings })
        );
    } else {
        for Finding { area, check, outcome, text, advice } in findings {
            // A line each, whatever others have written.
            let text = crate::legible::line(text);
            println!("{:<7}  {area}, {check}: {text}", outcome.as_str());
            if let Some(advice) = advice {
                println!("         {}", crate::legible::line(advice));
            }
        }
        match (failures, warnings) {
            (0, 0) => println!("all is well"),
            (0, _) => println!("it works; warnings: {warnings}"),
            _ => println!("failures: {failures}, warnings: {warnings}"),
        }
    }
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
