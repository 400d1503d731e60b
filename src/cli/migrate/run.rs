//! `secretier migrate run`.

use std::{collections::BTreeSet, path::PathBuf, process::ExitCode, sync::Arc, time::Instant};

use clap::Args;
use serde_json::json;

use super::{
    super::following::{Wait, Waited},
    AdminAction, ConfigFile, Failure, Tenants, open, plan, progress,
};
use crate::{
    clock::Clock,
    config::Config,
    migration::{
        folders::Strategy,
        manifest::{self, Signed},
        origin::ProblemKind,
        run::{Options, Outcome, Progress, RunError, Runner, Summary, Verify},
        transfer::Transfer,
    },
    phase::Phase,
    tiers::database::{Change, Database, RunKind},
};

#[derive(Debug, Args)]
pub(super) struct Run {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    tenants: Tenants,
    #[command(flatten)]
    pub(super) how: How,
    /// How folders are read: one call a tenant, or one for all of them
    #[arg(long, value_enum, default_value_t = Strategy::Folder)]
    strategy: Strategy,
    /// Switch verified tenants to phase database: the database owns them from then on
    #[arg(long, conflicts_with = "to")]
    cutover: bool,
    /// Switch verified tenants to phase hybrid: upstream owns them, the database has a copy
    #[arg(long, value_name = "PHASE", value_parser = ["hybrid"])]
    to: Option<String>,
}

/// What runs and imports have in common.
#[derive(Debug, Args)]
pub(super) struct How {
    /// Tenants that are taken on at once, at most; fewer while each takes long
    #[arg(long, value_name = "TENANTS", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    batch: u32,
    /// What is compared before a switch: every value (full), or so many of each tenant (sample=N). Names
    /// and counts always are
    #[arg(long, value_name = "full|sample=N", default_value = "full", value_parser = verify)]
    verify: Verify,
    /// Take over as they are served today: secrets with references that stay as they are written
    /// (reference), and all but those whose name cannot be used (name)
    #[arg(long, value_name = "PROBLEM", value_delimiter = ',', value_parser = problem)]
    accept: Vec<ProblemKind>,
    /// Show what would be done, and do nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    #[command(flatten)]
    wait: Wait,
    /// Print the outcome as JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Write a signed report: tenants, counts, digests and times, no values
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

impl How {
    pub(super) fn options(&self, to: Option<Phase>) -> Options {
        let accept: BTreeSet<ProblemKind> = self.accept.iter().copied().collect();
        Options { to, verify: self.verify, batch: self.batch as usize, accept, origin: None }
    }
}

fn verify(text: &str) -> Result<Verify, String> {
    if text == "full" {
        return Ok(Verify::Full);
    }
    let count = text.strip_prefix("sample=").and_then(|count| count.parse().ok()).filter(|count| *count > 0);
    count.map(Verify::Sample).ok_or_else(|| "write full, or sample=5 for five values of each tenant".to_owned())
}

pub(super) fn problem(text: &str) -> Result<ProblemKind, String> {
    let kinds = [ProblemKind::Reference, ProblemKind::Name];
    let kind = kinds.into_iter().find(|kind| kind.as_str() == text);
    kind.ok_or_else(|| "write reference, name or both, separated by a comma".to_owned())
}

impl Run {
    pub(super) fn action(&self) -> Option<AdminAction> {
        let to = if self.cutover { "database" } else { self.to.as_deref().unwrap_or("-") };
        (!self.how.dry_run).then(|| self.tenants.on(AdminAction::new(&self.config, "migrate.run")).with("to", to))
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let selection = self
            .tenants
            .selection()?
            .ok_or_else(|| Failure::usage("say which tenants: --tenants acme,beta-*, --tenants-file FILE, or --all"))?;
        let config = self.config.read()?.config;
        let clock = Clock::system();
        let to = match (&self.to, self.cutover) {
            (_, true) => Some(Phase::Database),
            (Some(_), false) => Some(Phase::Hybrid),
            (None, false) => None,
        };
        let options = self.how.options(to);
        let (transfer, _) = open(&config, &clock, self.strategy).await?;
        if self.how.dry_run {
            let cost = plan::cost(&config);
            return plan::show(&transfer, &selection, &options, &cost, self.how.json).await;
        }
        run(&config, transfer, RunKind::Run, &selection, options, &self.how).await
    }
}

/// Runs, shows how far it is, and reports.
pub(super) async fn run(
    config: &Config,
    transfer: Transfer,
    kind: RunKind,
    selection: &crate::migration::selection::Selection,
    options: Options,
    how: &How,
) -> Result<ExitCode, Failure> {
    // Checked first: a run that has ended cannot be reported a second time.
    if let Some(file) = &how.report {
        let opened = std::fs::OpenOptions::new().append(true).create(true).open(file);
        opened
            .map_err(|error| Failure::usage(format!("the report cannot be written to {}: {error}", file.display())))?;
    }
    let (database, clock) = (Arc::clone(&transfer.database), transfer.clock.clone());
    let to = options.to;
    let runner = Runner { transfer, options, by: crate::log::process_name() };
    let started = Instant::now();
    let mut shown: Option<progress::Progress> = None;
    let summary = runner.run(kind, selection, &mut |event| tell(&mut shown, &event)).await;
    if let Some(shown) = shown {
        shown.finish();
    }
    let summary = summary?;
    let report = || how.report.as_ref().map_or(Ok(()), |file| report(config, &database, &summary, &clock, file));
    // Includes tenants that an earlier run has switched and not waited for.
    let waits = to.is_some() && (migrated(&summary) > 0 || !summary.already.is_empty());
    let reported = report();
    let waited = match waits {
        true => how.wait.for_last(&database, &Change::Tenants).await?,
        false => Waited::default(),
    };
    if how.json {
        println!("{}", as_json(&summary, &waited, started));
    } else {
        print(&summary, to, started);
    }
    reported?;
    // A folder of no tenant may be something else; a row of no tenant is a secret left behind.
    let left_out = kind == RunKind::Import && !summary.unusable.is_empty();
    waited.verdict("tenants were switched", "the same command, run again, goes on waiting")?;
    let failed = left_out || summary.outcomes.iter().any(|outcome| outcome.failure.is_some());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn tell(shown: &mut Option<progress::Progress>, event: &Progress<'_>) {
    match event {
        Progress::Begun { run, total, done, already } => {
            let mut progress = progress::Progress::new("tenants", *total);
            if *done > 0 {
                progress.say(&format!("going on with the migration {run}: {done} of {total} tenants are done"));
            } else {
                progress.say(&format!("migration {run}: {total} tenants, and {already} that are there already"));
            }
            progress.at(*done);
            *shown = Some(progress);
        }
        Progress::Note(note) => match shown {
            Some(shown) => shown.say(note),
            None => eprintln!("{note}"),
        },
        Progress::Ended(outcome) => {
            if let Some(shown) = shown {
                if let Some(failure) = &outcome.failure {
                    shown.say(&format!("{} was not migrated: {}", outcome.tenant, failure.error));
                }
                shown.step(outcome.failure.is_none());
            }
        }
    }
}

fn report(
    config: &Config,
    database: &Database,
    summary: &Summary,
    clock: &Clock,
    file: &PathBuf,
) -> Result<(), Failure> {
    let signed = Signed::of(summary, config.environment.as_str(), &database.keys().ring(), clock.now());
    let signed = signed.ok_or_else(|| Failure::told("no source gives a master key to sign the report with"))?;
    let text = serde_json::to_string_pretty(&signed)
        .map_err(|error| Failure::failed("the report could not be written", error))?;
    std::fs::write(file, text + "\n").map_err(|error| {
        Failure::told(format!(
            "the run came to its end, but its report could not be written to {}: {error}",
            file.display()
        ))
    })?;
    eprintln!("reported to {}; 'secretier migrate verify --report' checks its signature", file.display());
    Ok(())
}

fn as_json(summary: &Summary, waited: &Waited, started: Instant) -> serde_json::Value {
    let failed: Vec<_> = summary
        .outcomes
        .iter()
        .filter_map(|outcome| {
            let failure = outcome.failure.as_ref()?;
            Some(json!({ "tenant": outcome.tenant.as_str(), "reason": failure.reason, "error": failure.error }))
        })
        .collect();
    let tenants: Vec<_> = summary.outcomes.iter().map(manifest::line).collect();
    let already: Vec<_> = summary.already.iter().map(|tenant| tenant.as_str()).collect();
    json!({
        "run": summary.run.id,
        "migrated": migrated(summary),
        "secrets": secrets(summary),
        "failed": failed,
        "already": already,
        "unusable": summary.unusable,
        "behind": waited.unfollowed.iter().map(|unfollowed| &unfollowed.instance.name).collect::<Vec<_>>(),
        "unfollowed": waited.to_json(),
        "took_ms": u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "tenants": tenants,
    })
}

fn migrated(summary: &Summary) -> usize {
    summary.outcomes.iter().filter(|outcome| outcome.failure.is_none()).count()
}

fn secrets(summary: &Summary) -> i64 {
    summary.outcomes.iter().filter(|outcome| outcome.failure.is_none()).map(|outcome| outcome.secrets).sum()
}

fn print(summary: &Summary, to: Option<Phase>, started: Instant) {
    let failed: Vec<&Outcome> = summary.outcomes.iter().filter(|outcome| outcome.failure.is_some()).collect();
    let what = match to {
        Some(phase) => format!("in phase {phase}"),
        None => "copied and verified, with the owner they had".to_owned(),
    };
    let rows = [
        ("tenants", migrated(summary).to_string(), what),
        ("secrets", secrets(summary).to_string(), "stored, read back, and equal to a second read".to_owned()),
        ("already there", summary.already.len().to_string(), "left as they were".to_owned()),
        ("failed", failed.len().to_string(), "left with the owner they had".to_owned()),
    ];
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|(name, count, what)| vec![name.to_owned(), count, what]).collect();
    super::super::print_table(&["MIGRATION", "COUNT", ""], &rows);
    if !failed.is_empty() {
        println!();
        let rows: Vec<Vec<String>> = failed
            .iter()
            .filter_map(|outcome| {
                let failure = outcome.failure.as_ref()?;
                Some(vec![
                    outcome.tenant.as_str().to_owned(),
                    failure.reason.as_str().to_owned(),
                    failure.error.clone(),
                ])
            })
            .collect();
        super::super::print_table(&["TENANT", "REASON", "WHY"], &rows);
    }
    for name in &summary.unusable {
        eprintln!("warning: {name:?} cannot be a tenant's name, and was left out");
    }
    eprintln!("took {}", indicatif::HumanDuration(started.elapsed()));
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Unknown(_) => Self::usage(error.to_string()),
            RunError::Busy { .. } | RunError::TakenOver => Self::told(error.to_string()),
            RunError::List(_) | RunError::Origin(_) | RunError::Store(_) => Self::failed("not all was migrated", error),
        }
    }
}
