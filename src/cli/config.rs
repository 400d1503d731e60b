//! `secretier config check|show`

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;

use super::{ConfigFile, Failure, doctor, print_table};

#[derive(Debug, Args)]
pub(super) struct ConfigCommand {
    #[command(subcommand)]
    action: ConfigAction,
}

#[derive(Debug, Subcommand)]
enum ConfigAction {
    /// Say what is wrong and where, and exit 2 if anything is; warn of what is better changed
    Check(Check),
    /// Show the effective values and where each came from; secrets are not shown
    Show(Show),
}

#[derive(Debug, Args)]
struct Check {
    #[command(flatten)]
    config: ConfigFile,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
    /// Try the database, the master keys and the upstream too, and exit 1 if one cannot be used
    #[arg(long)]
    connect: bool,
}

#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    config: ConfigFile,
    /// Print the values as JSON
    #[arg(long)]
    json: bool,
}

impl ConfigCommand {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self.action {
            ConfigAction::Check(check) => check.run().await,
            ConfigAction::Show(show) => show.run(),
        }
    }
}

impl Check {
    async fn run(self) -> Result<ExitCode, Failure> {
        match crate::config::Loaded::read(self.config.config.as_deref()) {
            Ok(loaded) => {
                let file = loaded.file.as_ref().map(|file| file.display().to_string());
                let warnings = loaded.warnings();
                if self.connect {
                    warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
                    let findings = Box::pin(doctor::examine(&loaded.config, doctor::Scope::Connections)).await;
                    return Ok(doctor::report(&findings, self.json));
                }
                if self.json {
                    println!("{}", json!({ "ok": true, "file": file, "faults": [], "warnings": warnings }));
                } else {
                    warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
                    println!("{} is good", file.as_deref().unwrap_or("the configuration from the environment"));
                }
                Ok(ExitCode::SUCCESS)
            }
            Err(error) if self.json => {
                println!("{}", json!({ "ok": false, "faults": error.faults() }));
                Ok(ExitCode::from(2))
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Show {
    fn run(self) -> Result<ExitCode, Failure> {
        let shown = self.config.read()?.show();
        if self.json {
            let values =
                shown.iter().map(|(key, (value, source))| (key.clone(), json!({ "value": value, "source": source })));
            println!("{}", serde_json::Value::Object(values.collect()));
        } else {
            let rows = shown.into_iter().map(|(key, (value, source))| vec![key, value, source]);
            print_table(&["KEY", "VALUE", "FROM"], &rows.collect::<Vec<_>>());
        }
        Ok(ExitCode::SUCCESS)
    }
}
