//! `secretier migrate cleanup` and `restore`.

use std::{
    io::{BufRead as _, IsTerminal as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use serde_json::json;

use super::{super::count, AdminAction, ConfigFile, Failure, Tenants, open, progress::Progress};
use crate::{
    clock::Clock,
    log::{self, process_name},
    migration::{
        archive::{self, ArchiveError, Archived},
        cleanup::{Cleaned, Cleanup as Cleaner},
        folders::Strategy,
    },
    tenant::Tenant,
    tiers::database::Database,
};

#[derive(Debug, Args)]
pub(super) struct Cleanup {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    tenants: Tenants,
    /// Only tenants that were switched at least so long ago, as in 30d
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    older_than: Duration,
    /// The file that folders are archived in, sealed under the master key; added to where it is there
    #[arg(long, value_name = "FILE", default_value = "secretier-archive.jsonl")]
    archive: PathBuf,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Restore {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    tenants: Tenants,
    /// The archive
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Put back folders too that hold what was destroyed by 'tenant shred' since
    #[arg(long)]
    after_shred: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

impl Cleanup {
    pub(super) fn action(&self) -> AdminAction {
        self.tenants.on(AdminAction::new(&self.config, "migrate.cleanup")).with("archive", self.archive.display())
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let selection = self.tenants.selection_or_all()?;
        let config = self.config.read()?.config;
        if !self.yes && !std::io::stdin().is_terminal() {
            return Err(Failure::usage(
                "this asks before it removes anything from upstream, and there is no terminal to ask at; --yes does \
                 it unasked",
            ));
        }
        let clock = Clock::system();
        let (transfer, upstream) = open(&config, &clock, Strategy::Folder).await?;
        let environment = config.environment.as_str().to_owned();
        let cleaner = Cleaner { transfer, upstream, environment, by: process_name() };
        let due = cleaner.due(self.older_than, |tenant| selection.has(tenant)).await;
        let due = due.map_err(|error| Failure::failed("the tenants could not be looked up", error))?;
        if due.is_empty() {
            eprintln!("no tenant was switched so long ago and is still the database's; nothing is to be done");
        } else if !self.yes {
            let (count, since) = (due.len(), humantime::format_duration(self.older_than));
            for state in &due {
                eprintln!("{}", state.tenant);
            }
            eprint!(
                "This removes the folders of these {count} tenants from upstream, which were switched at least {since} ago, \
                 after each is compared again and archived in {}. Type {count} to go on: ",
                self.archive.display()
            );
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line).map_err(|error| Failure::failed("nothing was done", error))?;
            if line.trim() != count.to_string() {
                return Err(Failure::told("nothing was done"));
            }
        }
        let mut shown = Progress::new("folders", due.len());
        let mut tell = |one: &Cleaned| {
            if let Err(reason) = &one.outcome {
                shown.say(&format!("the folder of {} stays: {reason}", one.tenant));
            }
            shown.step(one.outcome.is_ok());
        };
        let cleaned = cleaner.clean_up(due, &self.archive, &mut tell).await;
        shown.finish();
        let cleaned = cleaned.map_err(|error| Failure::failed("not all was cleaned up", error))?;
        let stay = cleaned.iter().filter(|one| one.outcome.is_err()).count();
        if self.json {
            println!("{}", as_json(&cleaned));
        } else {
            let (removed, stays) = (cleaned.len() - stay, if stay == 1 { "stays" } else { "stay" });
            let were = if removed == 1 { "was" } else { "were" };
            println!("{} {were} archived and removed, {stay} {stays}", count(removed, "folder"));
        }
        Ok(if stay == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn as_json(cleaned: &[Cleaned]) -> serde_json::Value {
    let told: Vec<_> = cleaned
        .iter()
        .map(|one| match &one.outcome {
            Ok(secrets) => json!({ "tenant": one.tenant.as_str(), "removed": true, "secrets": secrets }),
            Err(reason) => json!({ "tenant": one.tenant.as_str(), "removed": false, "reason": reason }),
        })
        .collect();
    json!({ "tenants": told })
}

impl Restore {
    pub(super) fn action(&self) -> AdminAction {
        self.tenants
            .on(AdminAction::new(&self.config, "migrate.restore"))
            .with("file", self.file.display())
            .with("after_shred", self.after_shred)
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let selection = self.tenants.selection_or_all()?;
        let config = self.config.read()?.config;
        let clock = Clock::system();
        let (transfer, upstream) = open(&config, &clock, Strategy::Folder).await?;
        let environment = config.environment.as_str().to_owned();
        let ring = transfer.database.keys().ring();
        let archived = archive::read(&self.file, &environment, &ring, |tenant| selection.has(tenant))
            .map_err(|error| Failure::failed("the archive cannot be read", error))?;
        if archived.is_empty() {
            return Err(Failure::told("the archive has none of these tenants"));
        }
        let shredded = shredded_since(&transfer.database, &archived).await?;
        if !shredded.is_empty() && !self.after_shred {
            return Err(Failure::told(format!(
                "nothing was put back: these were shredded since they were archived, and the archive holds what was \
                 destroyed: {}. Leave them out with --tenants, or add --after-shred to put them back as they were",
                shredded.join(", ")
            )));
        }
        let cleaner = Cleaner { transfer, upstream, environment, by: process_name() };
        let mut told = Vec::with_capacity(archived.len());
        let mut is_whole = true;
        let (mut restored, mut left) = (0_usize, 0_usize);
        for one in archived {
            let one = match one {
                Ok(one) => one,
                Err(error) => {
                    (is_whole, left) = (false, left + 1);
                    eprintln!("{}", log::chain(&error));
                    continue;
                }
            };
            let (tenant, secrets) = (one.tenant.as_str(), one.secrets.len());
            let outcome = match cleaner.restore(&one).await {
                Ok(outcome) => outcome,
                Err(error) if error.is_of_all() => {
                    return Err(Failure::failed(
                        &format!(
                            "{} {} back; that of {tenant} was not written back whole",
                            count(restored, "folder"),
                            are(restored)
                        ),
                        error,
                    ));
                }
                Err(error) => Err(log::chain(&error)),
            };
            is_whole &= outcome.is_ok();
            match &outcome {
                Ok(()) => restored += 1,
                Err(_) => left += 1,
            }
            match outcome {
                Ok(()) if self.json => told.push(json!({ "tenant": tenant, "restored": true, "secrets": secrets })),
                Ok(()) => {
                    println!("{tenant}: {}, archived at {}", count(secrets, "secret"), one.archived_at.to_rfc3339());
                }
                Err(reason) if self.json => {
                    told.push(json!({ "tenant": tenant, "restored": false, "reason": reason }));
                }
                Err(reason) => eprintln!("the folder of {tenant} is not back as it was: {reason}"),
            }
        }
        if left > 0 && !self.json {
            println!("{} {} back as archived, {left} {} not", count(restored, "folder"), are(restored), are(left));
        }
        if self.json {
            println!("{}", json!({ "tenants": told }));
        }
        Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// The tenants whose secrets were destroyed since they were archived.
async fn shredded_since(
    database: &Database,
    archived: &[Result<Archived, ArchiveError>],
) -> Result<Vec<String>, Failure> {
    let archived: Vec<&Archived> = archived.iter().flatten().collect();
    let tenants: Vec<Tenant> = archived.iter().map(|one| one.tenant.clone()).collect();
    let companies = database.companies_of(&tenants).await;
    let companies = companies.map_err(|error| Failure::failed("whether any was shredded is not known", error))?;
    let is_shredded = |one: &&&Archived| {
        let at = companies.get(&one.tenant).and_then(|company| company.shredded_at());
        at.is_some_and(|at| at >= one.archived_at)
    };
    Ok(archived.iter().filter(is_shredded).map(|one| one.tenant.to_string()).collect())
}

fn are(number: usize) -> &'static str {
    if number == 1 { "is" } else { "are" }
}
