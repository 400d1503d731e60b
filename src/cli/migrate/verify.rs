//! `secretier migrate verify`.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use serde_json::json;

use super::{ConfigFile, Failure, Tenants, open, open_base, progress::Progress};
use crate::{
    cli::print_table,
    clock::Clock,
    config::Config,
    migration::{
        folders::Strategy,
        manifest::Signed,
        verify::{Compared, switched},
    },
    tenant::Tenant,
};

#[derive(Debug, Args)]
pub(super) struct Verify {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    tenants: Tenants,
    /// How folders are read: one call a tenant, or one for all of them
    #[arg(long, value_enum, default_value_t = Strategy::Recursive)]
    strategy: Strategy,
    /// Check the signature of a run's report instead
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

impl Verify {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let selection = self.tenants.selection_or_all()?;
        let config = self.config.read()?.config;
        let clock = Clock::system();
        if let Some(file) = &self.report {
            return check(&config, &clock, file).await;
        }
        let (transfer, _) = open(&config, &clock, self.strategy).await?;
        let failed = |error| Failure::failed("the tenants could not be compared", error);
        let states = transfer.database.migration_states().await.map_err(failed)?;
        let known: Vec<Tenant> = states.iter().map(|state| state.tenant.clone()).collect();
        let companies = transfer.database.companies_of(&known).await.map_err(failed)?;
        let tenants: Vec<Tenant> = switched(states, &companies)
            .into_iter()
            .filter(|state| state.step != crate::tiers::database::Step::Archived)
            .map(|state| state.tenant)
            .collect();
        let chosen = selection.choose(&tenants).map_err(|unknown| {
            Failure::usage(format!("no tenant that was switched to the database matches {}", unknown.join(", ")))
        })?;
        let mut shown = Progress::new("tenants", chosen.len());
        let compared = transfer.compare(&chosen, 25, &mut |one| shown.step(one.is_equal())).await;
        shown.finish();
        let compared = compared.map_err(failed)?;
        let different: Vec<&Compared> = compared.iter().filter(|one| !one.is_equal()).collect();
        if self.json {
            let value =
                json!({ "tenants": compared.len(), "equal": compared.len() - different.len(), "different": different });
            println!("{value}");
        } else {
            print(&different);
            let differ = if different.len() == 1 { "differs" } else { "differ" };
            println!("{} compared, {} {differ}", super::super::count(compared.len(), "tenant"), different.len());
        }
        Ok(if different.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn print(different: &[&Compared]) {
    let mut rows = Vec::new();
    for one in different {
        if let Some(error) = &one.error {
            rows.push(vec![one.tenant.as_str().to_owned(), "-".to_owned(), error.clone()]);
        }
        for drift in &one.drift {
            let (tenant, key) = (one.tenant.as_str().to_owned(), format!("{:?}", drift.key));
            rows.push(vec![tenant, key, drift.what.as_str().to_owned()]);
        }
    }
    if !rows.is_empty() {
        print_table(&["TENANT", "SECRET", "WHAT"], &rows);
        println!();
    }
}

/// Checks a report's signature.
async fn check(config: &Config, clock: &Clock, file: &PathBuf) -> Result<ExitCode, Failure> {
    let text = std::fs::read_to_string(file).map_err(|error| Failure::usage(format!("{}: {error}", file.display())))?;
    let base = open_base(config, clock).await?;
    let signed = Signed::read(&text, &base.database.keys().ring())
        .map_err(|error| Failure::told(format!("{}: {error}", file.display())))?;
    let run = signed.manifest["run"].as_str().unwrap_or("-");
    let tenants = signed.manifest["tenants"].as_array().map_or(0, Vec::len);
    println!("the signature is good: migration {run}, {tenants} tenants, signed under {}", signed.master_key);
    Ok(ExitCode::SUCCESS)
}
