//! The command line: one file a command. Results go to standard output, everything else
//! to standard error; exit 0 done, 1 failed, 2 wrong usage or configuration.

#![expect(clippy::print_stderr, reason = "commands print")]

/// In place of the standard library's, for all commands: names and reasons that others have
/// chosen are printed as they can be read, JSON that holds them among it.
macro_rules! println {
    () => { std::println!() };
    ($($text:tt)*) => { std::println!("{}", crate::legible::lines(&format!($($text)*))) };
}

/// The same for standard error.
macro_rules! eprintln {
    ($($text:tt)*) => { std::eprintln!("{}", crate::legible::lines(&format!($($text)*))) };
}

mod admin_action;
mod audit;
mod completions;
mod config;
mod dev;
mod doctor;
mod following;
mod health;
mod instances;
mod keys;
mod migrate;
mod reload;
mod rotations;
mod seal;
mod secrets;
mod serve;
mod service_manager;
mod tenant;
mod token;

use std::{error::Error, fmt, path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Args, Parser, Subcommand};

use self::admin_action::{AdminAction, audited};
use crate::{
    clock::Clock,
    config::{Config, ConfigError, Loaded},
    keys::MasterKeys,
    legible, log,
    metrics::Metrics,
    sealing::KeyRing,
    tiers::database::Database,
};

/// Serves a backend its tenants' secrets from memory, an encrypted database and Infisical.
#[derive(Debug, Parser)]
#[command(name = "secretier", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the proxy
    Serve(serve::Serve),
    /// Try it: the proxy with a stand-in for Infisical, sample tenants and a token
    Dev(dev::Dev),
    /// Ask the running instance whether it answers: exit 0 if it does, else 1
    Health(health::Health),
    /// Print a secret's value
    Get(secrets::Get),
    /// Write a secret's value, read from standard input or a file
    Set(secrets::Set),
    /// Delete a secret
    Delete(secrets::Delete),
    /// List a tenant's secrets, or all tenants
    List(secrets::List),
    /// List the versions of a secret that are kept
    Versions(secrets::Versions),
    /// Bring an older version of a secret back, as a new one
    Rollback(secrets::Rollback),
    /// Give a secret a new value, while the old one stays valid for a while
    Rotate(rotations::Rotate),
    /// List the rotations of secrets, and decide how one goes on
    Rotations(rotations::Rotations),
    /// Tell what each tier has for a secret, and why the answer is what it is
    Explain(secrets::Explain),
    /// Destroy what is stored of a tenant (in the configured database)
    Tenant(tenant::TenantCommand),
    /// Move tenants from Infisical to the database while they are served, and back
    Migrate(migrate::Migrate),
    /// Show, rotate, back up and restore the master keys
    Keys(keys::Keys),
    /// Show which instances run, wait until they have followed, and forget those that are gone
    Instances(instances::Instances),
    /// Make, list, rotate and revoke access tokens (in the configured database)
    Token(token::Token),
    /// Find out who asked for what, and whether the records of it are whole
    Audit(audit::Audit),
    /// Examine everything that an instance needs: settings, database, master keys, upstream, machine
    Doctor(doctor::Doctor),
    /// Check or show the configuration
    Config(config::ConfigCommand),
    /// Print a completion script for a shell
    Completions(completions::Completions),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// What to tell the user; see [`Failure::code`].
    pub async fn run(self) -> Result<ExitCode, Failure> {
        match self.command {
            Command::Serve(command) => Box::pin(command.run()).await,
            Command::Dev(command) => Box::pin(command.run()).await,
            Command::Health(command) => command.run().await,
            Command::Get(command) => command.run().await,
            Command::Set(command) => command.run().await,
            Command::Delete(command) => command.run().await,
            Command::List(command) => command.run().await,
            Command::Versions(command) => command.run().await,
            Command::Rollback(command) => command.run().await,
            Command::Rotate(command) => command.run().await,
            Command::Rotations(command) => command.run().await,
            Command::Explain(command) => command.run().await,
            Command::Tenant(command) => audited(command.action(), Box::pin(command.run())).await,
            Command::Migrate(command) => audited(command.action(), Box::pin(command.run())).await,
            Command::Keys(command) => audited(command.action(), Box::pin(command.run())).await,
            Command::Instances(command) => audited(command.action(), Box::pin(command.run())).await,
            Command::Token(command) => audited(command.action(), Box::pin(command.run())).await,
            Command::Audit(command) => audited(command.action(), Box::pin(command.run())).await,
            Command::Doctor(command) => Box::pin(command.run()).await,
            Command::Config(command) => Box::pin(command.run()).await,
            Command::Completions(command) => command.run(),
        }
    }
}

/// Where the configuration is.
#[derive(Debug, Clone, Args)]
struct ConfigFile {
    /// The configuration file; config/secretier.toml where it exists, if none is named
    #[arg(long, env = "SECRETIER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigFile {
    fn read(&self) -> Result<Loaded, Failure> {
        Ok(Loaded::read(self.config.as_deref())?)
    }
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub struct Failure {
    text: String,
    code: u8,
}

impl Failure {
    /// Something failed: exit code 1. Tells the error with everything below it.
    pub fn failed(doing: &str, error: impl Error) -> Self {
        Self { text: chain(doing, &error), code: 1 }
    }

    /// Something failed that is told in full by `text`: exit code 1.
    fn told(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: 1 }
    }

    /// Wrong usage or configuration: exit code 2.
    fn usage(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: 2 }
    }

    /// The process's exit code.
    #[must_use]
    pub fn code(&self) -> u8 {
        self.code
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&legible::lines(&self.text))
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(format!("the configuration is wrong\n{error}"))
    }
}

fn chain(doing: &str, error: &dyn Error) -> String {
    format!("{doing}: {}", log::chain(error))
}

/// The database, for a command that opens nothing that is sealed: it needs no master key.
async fn open_database(config: &Config) -> Result<Database, Failure> {
    let keys = Arc::new(MasterKeys::fixed(KeyRing::default()));
    let opened =
        Box::pin(Database::open(&config.database, config.environment.as_str(), keys, Clock::system(), Metrics::new()));
    opened.await.map_err(|error| Failure::failed("the database cannot be used", error))
}

/// Completes on SIGTERM or SIGINT. They are listened for from this call on, so that who
/// was told that we are ready can stop us at once, and in good order.
fn stopped() -> impl Future<Output = ()> + Send {
    use tokio::signal::unix::{SignalKind, signal};
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    async move {
        let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
            // Without handlers the system ends the process at once, which is safe.
            return std::future::pending().await;
        };
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        }
    }
}

/// A number of things, in words: "1 folder", "2 folders".
fn count(number: usize, of: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {of}{plural}")
}

/// Rows as a table whose columns line up, each a line. A cell that would look like several is
/// quoted.
fn print_table(header: &[&str], rows: &[Vec<String>]) {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| shown(cell)).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        println!("{}", padded.collect::<Vec<_>>().join("  ").trim_end());
    };
    line(header.to_vec());
    for row in &rows {
        line(row.iter().map(String::as_str).collect());
    }
}

/// A cell of a table. Columns are two blanks apart.
fn shown(cell: &str) -> String {
    let is_one = !cell.contains("  ") && cell.trim() == cell;
    if is_one { legible::line(cell).into_owned() } else { legible::quoted(cell) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_cannot_be_taken_for_several_or_for_a_line_of_its_own() {
        for (cell, seen) in [
            ("A", "A"),
            ("replaced, valid until 12:00", "replaced, valid until 12:00"),
            ("A  9  2026-01-01", "\"A  9  2026-01-01\""),
            (" A", "\" A\""),
            ("\"A\"", "\"A\""),
            ("A\nB\u{202e}", "A\\u000aB\\u202e"),
        ] {
            assert_eq!(shown(cell), seen);
        }
    }
}
