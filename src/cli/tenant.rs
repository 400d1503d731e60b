//! `secretier tenant shred`: in the configured database, whether or not the proxy runs; it
//! needs no master key.

use std::{
    io::{BufRead, IsTerminal as _},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{
    AdminAction, ConfigFile, Failure, count,
    following::{Wait, Waited},
};
use crate::{
    clock::Clock,
    config::Config,
    metrics::Metrics,
    phase::Phase,
    tenant::Tenant,
    tiers::{
        database::{Remains, Shredded},
        upstream::{self, Lane},
    },
};

#[derive(Debug, Args)]
pub(super) struct TenantCommand {
    #[command(subcommand)]
    action: TenantAction,
}

#[derive(Debug, Subcommand)]
enum TenantAction {
    /// Destroy a tenant's data keys and secrets, and clear it from every instance's memory
    ///
    /// It cannot be undone. What it cannot reach is told at the end: backups, and the
    /// tenant's folder upstream. Exit 1 if an instance may still hold something of the
    /// tenant; it is named, with the time until which it may answer. Run again, it waits again.
    Shred(Shred),
}

#[derive(Debug, Args)]
struct Shred {
    #[command(flatten)]
    config: ConfigFile,
    /// The tenant
    tenant: String,
    /// Do not ask for the tenant's name once more
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    wait: Wait,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

/// How long one operation of the database may take.
const DATABASE_TIMEOUT: Duration = Duration::from_secs(30);

impl TenantCommand {
    pub(super) fn action(&self) -> Option<AdminAction> {
        let TenantAction::Shred(shred) = &self.action;
        Some(AdminAction { tenant: Some(shred.tenant.clone()), ..AdminAction::new(&shred.config, "tenant.shred") })
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self.action {
            TenantAction::Shred(shred) => shred.run().await,
        }
    }
}

impl Shred {
    async fn run(self) -> Result<ExitCode, Failure> {
        let tenant: Tenant = self.tenant.parse().map_err(|error| Failure::usage(format!("{error}")))?;
        if !self.yes && !std::io::stdin().is_terminal() {
            return Err(Failure::usage(
                "this asks for the tenant's name before it destroys anything, and there is no terminal to ask at; \
                 --yes does it unasked",
            ));
        }
        let mut config = self.config.read()?.config;
        // The timeout of a lookup is too short for a tenant with a long history.
        config.database.timeout = config.database.timeout.max(DATABASE_TIMEOUT);
        // With the master keys, where there are any: the register of destroyed ids is sealed.
        let database = Box::pin(super::admin_action::open_to_sign(&config)).await?;
        let known = database.company(&tenant).await;
        let company = known
            .map_err(|error| Failure::failed("the tenant could not be looked up", error))?
            .ok_or_else(|| unknown(&tenant))?;
        if !self.yes {
            eprint!("This destroys all that is stored of {tenant}, for good. Its name, to go on: ");
            confirm(&tenant, std::io::stdin().lock())?;
        }
        let shredded = database.shred(&tenant).await.map_err(|error| {
            Failure::failed("it is not known whether the tenant was shredded; run this again, it does no harm", error)
        })?;
        let shredded = shredded.ok_or_else(|| unknown(&tenant))?;
        eprintln!("destroyed; waiting for the running instances to forget it");
        let waited = self.wait.for_change(&database, shredded.change).await?;
        let outcome = Outcome { folder: Folder::find(&config, &tenant, company.phase).await, tenant, shredded, waited };
        if self.json {
            println!("{}", outcome.to_json());
        } else {
            outcome.print();
        }
        outcome.verdict()
    }
}

fn unknown(tenant: &Tenant) -> Failure {
    Failure::told(format!("the database knows no tenant {tenant}; nothing was done"))
}

fn confirm(tenant: &Tenant, mut input: impl BufRead) -> Result<(), Failure> {
    let mut line = String::new();
    input.read_line(&mut line).map_err(|error| Failure::failed("the name could not be read", error))?;
    if line.trim() == tenant.as_str() {
        Ok(())
    } else {
        Err(Failure::told("that is not the tenant's name; nothing was done"))
    }
}

/// All that is known at the end.
struct Outcome {
    tenant: Tenant,
    shredded: Shredded,
    waited: Waited,
    folder: Folder,
}

/// The tenant's folder upstream.
struct Folder {
    path: String,
    state: FolderState,
}

enum FolderState {
    /// No upstream is configured.
    NotConfigured,
    Absent,
    Present {
        /// Whether lookups go there.
        is_read: bool,
    },
    Unknown(String),
}

impl Folder {
    async fn find(config: &Config, tenant: &Tenant, own: Option<Phase>) -> Self {
        let path = config.upstream().map_or_else(String::new, |upstream| upstream.settings().folder(tenant));
        let state = match Self::listed(config, tenant).await {
            Ok(None) => FolderState::NotConfigured,
            Ok(Some(false)) => FolderState::Absent,
            Ok(Some(true)) => FolderState::Present {
                // Where this cannot be told, the worse case is assumed.
                is_read: !config.policies().is_ok_and(|policies| {
                    policies.is_uniform(tenant, own) && policies.phase_of(tenant, own) == Phase::Database
                }),
            },
            Err(reason) => FolderState::Unknown(reason),
        };
        Self { path, state }
    }

    async fn listed(config: &Config, tenant: &Tenant) -> Result<Option<bool>, String> {
        let (clock, metrics) = (Clock::system(), Metrics::new());
        let upstream =
            upstream::build(config.upstream(), config.environment.as_str(), &config.keys.withheld(), &clock, &metrics);
        let Some(upstream) = upstream.map_err(|error| super::chain("the upstream", &error))? else { return Ok(None) };
        let folders = upstream.tenants(Lane::Interactive).await.map_err(|error| error.to_string())?;
        Ok(Some(folders.tenants.contains(tenant)))
    }

    fn tell(&self) -> Option<String> {
        let path = &self.path;
        match &self.state {
            FolderState::NotConfigured | FolderState::Absent => None,
            FolderState::Present { is_read: true } => {
                Some(format!("its folder {path} is still there; delete it, or lookups bring the secrets back"))
            }
            FolderState::Present { is_read: false } => Some(format!(
                "its folder {path} is still there; lookups do not go to it, but what it holds it still holds"
            )),
            FolderState::Unknown(reason) => Some(format!(
                "its folder {path}, which could not be looked up ({reason}); if it is still there, delete it"
            )),
        }
    }
}

impl Outcome {
    fn print(&self) {
        let Shredded { data_keys, secrets, versions, remains, .. } = self.shredded;
        println!(
            "{}: destroyed {}, {} ({})",
            self.tenant,
            count(data_keys, "data key"),
            count(secrets, "secret"),
            count(versions, "version")
        );
        println!("cleared from the memory of {}", count(self.waited.followed.len(), "running instance"));
        println!("not reached, and to be seen to where its secrets must be gone for good:");
        println!(
            "- backups, snapshots and replicas of the database: they hold wrapped keys and sealed secrets; destroy \
             them, or rotate the master key and destroy the old one"
        );
        println!(
            "- memory.offline_file of instances: one that runs writes its own anew within seconds; delete that of one \
             that does not run"
        );
        let files = match remains {
            Remains::Nothing => None,
            Remains::InLog => Some(
                "the write-ahead log beside the database's file, which was in use all the while: run this again to \
                 empty it",
            ),
            Remains::InFiles => Some(
                "PostgreSQL's own files, until it uses their space again (VACUUM FULL writes the tables anew), and \
                 its write-ahead log",
            ),
        };
        for rest in files.map(str::to_owned).into_iter().chain(self.folder.tell()) {
            println!("- {rest}");
        }
    }

    fn to_json(&self) -> serde_json::Value {
        let Shredded { data_keys, secrets, versions, change, remains } = self.shredded;
        let folder = match &self.folder.state {
            FolderState::NotConfigured => "not_configured",
            FolderState::Absent => "absent",
            FolderState::Present { .. } => "present",
            FolderState::Unknown(_) => "unknown",
        };
        let files = match remains {
            Remains::Nothing => "clear",
            Remains::InLog => "write_ahead_log",
            Remains::InFiles => "until_vacuum",
        };
        let names = |live: bool| {
            let unfollowed = self.waited.unfollowed.iter().filter(|unfollowed| unfollowed.is_live == live);
            unfollowed.map(|unfollowed| unfollowed.instance.name.as_str()).collect::<Vec<_>>()
        };
        json!({
            "tenant": self.tenant.as_str(),
            "destroyed": { "data_keys": data_keys, "secrets": secrets, "versions": versions },
            "change": change,
            "instances": {
                "cleared": self.waited.followed,
                "unconfirmed": names(true),
                "lost": names(false),
            },
            "unfollowed": self.waited.to_json(),
            "database_files": files,
            "infisical_folder": folder,
        })
    }

    fn verdict(&self) -> Result<ExitCode, Failure> {
        self.waited
            .verdict("the tenant's keys and secrets are destroyed", "run this again to wait on: it does no harm")?;
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_tenants_own_name_confirms() {
        let tenant: Tenant = "acme".parse().unwrap();
        assert!(confirm(&tenant, &b"acme\n"[..]).is_ok());
        for typed in [&b"y\n"[..], b"acme2\n", b"\n", b"", b"ACME\n"] {
            assert_eq!(confirm(&tenant, typed).unwrap_err().code(), 1);
        }
    }
}
