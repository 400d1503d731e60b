//! `secretier migrate status`: from the database alone; it needs no master key and no upstream.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use clap::Args;
use serde::Serialize;

use super::{ConfigFile, Failure};
use crate::{
    cli::{open_database, print_table},
    clock::Timestamp,
    tiers::database::{Database, Run, RunKind, Step, StoreError, TenantState},
};

#[derive(Debug, Args)]
pub(super) struct Status {
    #[command(flatten)]
    config: ConfigFile,
    /// Show it anew every second for as long as the run goes on
    #[arg(long, conflicts_with = "json")]
    watch: bool,
    /// Print the status as JSON
    #[arg(long)]
    json: bool,
}

/// How long back the rate is taken from.
const RATE_OVER: Duration = Duration::from_secs(60);

/// Tenants that are named.
const NAMED: usize = 20;

/// How far the last run is, and where every tenant is.
#[derive(Debug, Serialize)]
struct Report {
    run: Option<RunReport>,
    /// Tenants by how far they have come, in whatever run.
    tenants: BTreeMap<&'static str, usize>,
    failed: Vec<FailedTenant>,
    shadow: Shadow,
}

#[derive(Debug, Serialize)]
struct RunReport {
    id: String,
    kind: RunKind,
    state: State,
    by: String,
    started_at: String,
    seen_at: String,
    ended_at: Option<String>,
    total: i64,
    done: usize,
    failed: usize,
    left: i64,
    /// Tenants a second, of late.
    rate: f64,
    seconds_left: Option<u64>,
    failures: BTreeMap<String, usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// A process is at it.
    Running,
    /// It did not end, and nobody is at it.
    Interrupted,
    /// It came to its end.
    Ended,
}

#[derive(Debug, Serialize)]
struct FailedTenant {
    tenant: String,
    reason: Option<String>,
    error: Option<String>,
}

/// Lookups of switched tenants that were compared with upstream.
#[derive(Debug, Default, Serialize)]
struct Shadow {
    compared: i64,
    different: i64,
    /// Tenants with a difference.
    tenants: Vec<String>,
}

impl Status {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let config = self.config.read()?.config;
        let database = open_database(&config).await?;
        loop {
            let report = report(&database, database.now()).await;
            let report = report.map_err(|error| Failure::failed("the status could not be read", error))?;
            if self.json {
                let text = serde_json::to_string(&report);
                println!("{}", text.map_err(|error| Failure::failed("the status cannot be shown", error))?);
            } else {
                print(&report);
            }
            let is_running = report.run.is_some_and(|run| run.state == State::Running);
            if !(self.watch && is_running) {
                return Ok(ExitCode::SUCCESS);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            println!();
        }
    }
}

async fn report(database: &Database, now: Timestamp) -> Result<Report, StoreError> {
    // The lock is looked at before the run: a run that ends in between is then seen as ended,
    // and not as interrupted.
    let is_at_it = database.migration_holder().await?.is_some();
    let run = database.runs().await?.into_iter().next();
    let states = database.migration_states().await?;
    let mut tenants = BTreeMap::new();
    for state in &states {
        *tenants.entry(state.step.as_str()).or_default() += 1;
    }
    let failed = states.iter().filter(|state| state.step == Step::Failed).map(|state| FailedTenant {
        tenant: state.tenant.as_str().to_owned(),
        reason: state.reason.clone(),
        error: state.error.clone(),
    });
    let different = states.iter().filter(|state| state.shadow_different > 0);
    let shadow = Shadow {
        compared: states.iter().map(|state| state.shadow_compared).sum(),
        different: states.iter().map(|state| state.shadow_different).sum(),
        tenants: different.map(|state| state.tenant.as_str().to_owned()).collect(),
    };
    let failed = failed.collect();
    Ok(Report { run: run.map(|run| run_report(run, &states, is_at_it, now)), tenants, failed, shadow })
}

fn run_report(run: Run, states: &[TenantState], is_at_it: bool, now: Timestamp) -> RunReport {
    let ours: Vec<&TenantState> = states.iter().filter(|state| state.run == run.id).collect();
    let failures = ours.iter().filter(|state| state.step == Step::Failed);
    let mut by_reason = BTreeMap::new();
    for state in failures {
        *by_reason.entry(state.reason.clone().unwrap_or_default()).or_default() += 1;
    }
    let failed: usize = by_reason.values().sum();
    let done = ours.iter().filter(|state| !matches!(state.step, Step::Stored | Step::Failed)).count();
    let left = run.total - i64::try_from(done + failed).unwrap_or(i64::MAX);
    let state = match (run.ended_at, is_at_it) {
        (Some(_), _) => State::Ended,
        (None, true) => State::Running,
        (None, false) => State::Interrupted,
    };
    let until = run.ended_at.unwrap_or(now);
    let all = until.since(run.started_at).max(Duration::from_millis(1));
    let since = if run.ended_at.is_some() { all } else { all.min(RATE_OVER) };
    let lately =
        ours.iter().filter(|state| state.step != Step::Stored && until.since(state.updated_at) <= since).count();
    let rate = lately as f64 / since.as_secs_f64();
    let seconds_left = (state == State::Running && rate > 0.0).then(|| (left.max(0) as f64 / rate).ceil() as u64);
    RunReport {
        kind: run.kind,
        state,
        by: run.started_by,
        started_at: run.started_at.to_rfc3339(),
        seen_at: run.seen_at.to_rfc3339(),
        ended_at: run.ended_at.map(Timestamp::to_rfc3339),
        total: run.total,
        done,
        failed,
        left: left.max(0),
        rate: (rate * 10.0).round() / 10.0,
        seconds_left,
        failures: by_reason,
        id: run.id,
    }
}

fn print(report: &Report) {
    match &report.run {
        None => println!("no migration has been run"),
        Some(run) => {
            let state = match run.state {
                State::Running => format!("is running in {}", run.by),
                State::Interrupted => {
                    format!("was interrupted (last seen {}); the same command goes on with it", run.seen_at)
                }
                State::Ended => format!("ended at {}", run.ended_at.as_deref().unwrap_or("-")),
            };
            println!("migration {} {state}", run.id);
            let left = run.seconds_left.map_or_else(String::new, |seconds| {
                format!(", about {} left", humantime::format_duration(Duration::from_secs(seconds)))
            });
            println!(
                "{} of {} tenants done, {} failed, {} left, {} a second{left}",
                run.done, run.total, run.failed, run.left, run.rate
            );
            for (reason, count) in &run.failures {
                println!("  failed: {reason}: {count}");
            }
        }
    }
    if !report.tenants.is_empty() {
        println!();
        let rows: Vec<Vec<String>> =
            report.tenants.iter().map(|(step, count)| vec![(*step).to_owned(), count.to_string()]).collect();
        print_table(&["STEP", "TENANTS"], &rows);
    }
    if !report.failed.is_empty() {
        println!();
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let rows: Vec<Vec<String>> = report
            .failed
            .iter()
            .take(NAMED)
            .map(|failed| vec![failed.tenant.clone(), text(&failed.reason), text(&failed.error)])
            .collect();
        print_table(&["FAILED", "REASON", "WHY"], &rows);
        if report.failed.len() > NAMED {
            println!("and {} more; --json names all", report.failed.len() - NAMED);
        }
    }
    let Shadow { compared, different, tenants } = &report.shadow;
    if *compared > 0 {
        println!();
        println!("{compared} lookups were compared with upstream, and {different} differed");
        if !tenants.is_empty() {
            let named = tenants.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
            println!("differences in: {named}; 'secretier migrate verify' names the secrets");
        }
    }
}
