//! `secretier migrate`: moves tenants from Infisical, or from an application's
//! tables, to the database, and back.

mod cleanup;
mod import;
mod plan;
mod progress;
mod rollback;
mod run;
mod status;
mod verify;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};

use super::{AdminAction, ConfigFile, Failure};
use crate::{
    app::Base,
    clock::Clock,
    config::Config,
    migration::{
        folders::{Folders, Strategy, Waiting},
        origin::Origin,
        selection::Selection,
        transfer::{Takes, Transfer},
    },
    sealing::Digester,
    tiers::upstream::Upstream,
};

#[derive(Debug, Args)]
pub(super) struct Migrate {
    #[command(subcommand)]
    action: MigrateAction,
}

#[derive(Debug, Subcommand)]
enum MigrateAction {
    /// Show what a run would do, what it would leave out and why, and what it would cost
    ///
    /// Reads every folder once and writes nothing. Exit 1 if a tenant would not be migrated.
    Plan(plan::Plan),
    /// Take tenants over from upstream, verify them, and switch their phase
    ///
    /// The proxy goes on serving all the while. A run that was interrupted is gone on with
    /// by the same command. Exit 0 if all were migrated and verified, 1 if some were not.
    Run(run::Run),
    /// Take over the secrets that an application keeps in PostgreSQL tables of its own
    ///
    /// They are only read there. What the database has already stays, and a value that differs
    /// is in the way. Planned (--dry-run), verified and gone on with as a run is.
    Import(Box<import::Import>),
    /// Show how far the last run is, what is left, and what failed
    Status(status::Status),
    /// Compare the database with what upstream still has, by tenant and name
    ///
    /// Exit 1 if something differs.
    Verify(verify::Verify),
    /// Give tenants back to upstream
    Rollback(rollback::Rollback),
    /// Archive and remove the folders of tenants that were switched long ago
    Cleanup(cleanup::Cleanup),
    /// Write archived folders back into Infisical
    Restore(cleanup::Restore),
}

impl Migrate {
    pub(super) fn action(&self) -> Option<AdminAction> {
        match &self.action {
            MigrateAction::Plan(_) | MigrateAction::Status(_) | MigrateAction::Verify(_) => None,
            MigrateAction::Run(run) => run.action(),
            MigrateAction::Import(import) => import.action(),
            MigrateAction::Rollback(rollback) => Some(rollback.action()),
            MigrateAction::Cleanup(cleanup) => Some(cleanup.action()),
            MigrateAction::Restore(restore) => Some(restore.action()),
        }
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self.action {
            MigrateAction::Plan(plan) => Box::pin(plan.run()).await,
            MigrateAction::Run(run) => Box::pin(run.run()).await,
            MigrateAction::Import(import) => Box::pin(import.run()).await,
            MigrateAction::Status(status) => Box::pin(status.run()).await,
            MigrateAction::Verify(verify) => Box::pin(verify.run()).await,
            MigrateAction::Rollback(rollback) => Box::pin(rollback.run()).await,
            MigrateAction::Cleanup(cleanup) => Box::pin(cleanup.run()).await,
            MigrateAction::Restore(restore) => Box::pin(restore.run()).await,
        }
    }
}

/// Which tenants.
#[derive(Debug, Args)]
#[group(multiple = false)]
struct Tenants {
    /// Tenants by name or pattern, as in acme,beta-*; a shared folder as in /hono-api
    #[arg(long, value_name = "GLOB", value_delimiter = ',')]
    tenants: Vec<String>,
    /// A file with a tenant or pattern on each line; what follows a # is left out
    #[arg(long, value_name = "FILE")]
    tenants_file: Option<PathBuf>,
    /// All tenants and shared folders
    #[arg(long)]
    all: bool,
}

impl Tenants {
    /// The same on record.
    fn on(&self, action: AdminAction) -> AdminAction {
        match &self.tenants_file {
            Some(file) => action.with("tenants_file", file.display()),
            None if self.tenants.is_empty() => action.with("tenants", "*,/*"),
            None => action.with("tenants", self.tenants.join(",")),
        }
    }

    /// Those that are named; nothing where none of the options is given.
    fn selection(&self) -> Result<Option<Selection>, Failure> {
        let patterns = match &self.tenants_file {
            Some(file) => {
                let text = std::fs::read_to_string(file)
                    .map_err(|error| Failure::usage(format!("{}: {error}", file.display())))?;
                let lines = text.lines().map(|line| line.split('#').next().unwrap_or("").trim());
                let patterns: Vec<String> = lines.filter(|line| !line.is_empty()).map(str::to_owned).collect();
                if patterns.is_empty() {
                    return Err(Failure::usage(format!("{}: it names no tenant", file.display())));
                }
                patterns
            }
            None if self.all => return self.selection_of_all().map(Some),
            None => self.tenants.clone(),
        };
        if patterns.is_empty() {
            return Ok(None);
        }
        Selection::of(patterns).map(Some).map_err(|error| Failure::usage(error.to_string()))
    }

    /// Those that are named, or all.
    fn selection_or_all(&self) -> Result<Selection, Failure> {
        match self.selection()? {
            Some(selection) => Ok(selection),
            None => self.selection_of_all(),
        }
    }

    fn selection_of_all(&self) -> Result<Selection, Failure> {
        Selection::all().map_err(|error| Failure::usage(error.to_string()))
    }
}

/// A wait is told from this long on, and not more often than this.
const WORTH_TELLING: Duration = Duration::from_secs(1);
const WAITING_EVERY: Duration = Duration::from_secs(10);

/// Opens both sides, upstream's folders being one of them.
async fn open(config: &Config, clock: &Clock, strategy: Strategy) -> Result<(Transfer, Arc<dyn Upstream>), Failure> {
    let no_upstream = || {
        Failure::usage(
            "this reads tenants' folders upstream, and the configuration has no section for one: [infisical] or [directory]",
        )
    };
    let connections = config.upstream().ok_or_else(no_upstream)?.settings().max_connections();
    let base = open_base(config, clock).await?;
    let upstream = base.upstream.clone().ok_or_else(no_upstream)?;
    let folders = Folders::new(Arc::clone(&upstream), clock.clone(), strategy, connections, waiting());
    Ok((transfer(config, clock, &base, Arc::new(folders), Takes::Folders)?, upstream))
}

/// Says now and then that upstream is waited for, and why.
fn waiting() -> Waiting {
    let last = Mutex::new(None::<Instant>);
    Box::new(move |error, wait| {
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|last| last.elapsed() >= WAITING_EVERY);
        if wait >= WORTH_TELLING && is_due {
            *last = Some(Instant::now());
            eprintln!("{error}; trying again in {}", humantime::format_duration(Duration::from_secs(wait.as_secs())));
        }
    })
}

async fn open_base(config: &Config, clock: &Clock) -> Result<Base, Failure> {
    let base = Box::pin(Base::open(config, clock)).await?;
    base.needs_key()?;
    Ok(base)
}

fn transfer(
    config: &Config,
    clock: &Clock,
    base: &Base,
    origin: Arc<dyn Origin>,
    takes: Takes,
) -> Result<Transfer, Failure> {
    let policies = config.policies().map_err(|error| Failure::usage(error.to_string()))?;
    let digester = Digester::new(&base.database.keys().ring());
    let digester = digester.ok_or_else(|| Failure::told("no source gives a master key"))?;
    Ok(Transfer {
        database: Arc::clone(&base.database),
        origin,
        policies: Arc::new(policies),
        digester,
        clock: clock.clone(),
        takes,
        withheld: config.keys.withheld(),
    })
}
