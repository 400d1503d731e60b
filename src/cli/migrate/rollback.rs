//! `secretier migrate rollback`.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{
    super::{
        count,
        following::{Wait, Waited},
    },
    AdminAction, ConfigFile, Failure, open_base,
};
use crate::{
    clock::Clock,
    migration::{
        rollback::{AfterShred, Rollback as Backwards, RollbackError, RolledBack, Writes},
        selection::Selection,
        verify::switched,
    },
    tenant::Tenant,
    tiers::database::{Change, Step, TenantState},
};

#[derive(Debug, Args)]
pub(super) struct Rollback {
    #[command(flatten)]
    config: ConfigFile,
    /// The tenants, by name or pattern; a shared folder as in /hono-api
    #[arg(required = true, value_name = "TENANT")]
    tenants: Vec<String>,
    /// Write what the database took since the switch to upstream first
    #[arg(long, conflicts_with = "discard")]
    push: bool,
    /// Leave behind what the database took since the switch
    #[arg(long)]
    discard: bool,
    /// Go back to folders that hold what was destroyed by 'tenant shred' since
    #[arg(long)]
    after_shred: bool,
    #[command(flatten)]
    wait: Wait,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

impl Rollback {
    pub(super) fn action(&self) -> AdminAction {
        let action = AdminAction::new(&self.config, "migrate.rollback").with("tenants", self.tenants.join(","));
        action.with("push", self.push).with("discard", self.discard).with("after_shred", self.after_shred)
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let config = self.config.read()?.config;
        let selection = Selection::of(self.tenants.clone()).map_err(|error| Failure::usage(error.to_string()))?;
        let clock = Clock::system();
        let base = open_base(&config, &clock).await?;
        let policies = config.policies().map_err(|error| Failure::usage(error.to_string()))?;
        let rollback = Backwards::new(base.database.clone(), base.upstream.clone(), policies.into(), clock);
        let tenants = chosen(&rollback, &selection, &self.tenants).await?;
        let writes = match (self.push, self.discard) {
            (true, _) => Writes::Push,
            (false, true) => Writes::Discard,
            (false, false) => Writes::Refuse,
        };
        let after = if self.after_shred { AfterShred::GoBack } else { AfterShred::Refuse };
        tell_shredded(&rollback, &tenants, after).await?;
        let mut outcomes = Vec::new();
        for tenant in tenants {
            let outcome = rollback.roll_back(&tenant, writes, after).await;
            if !self.json {
                tell(&tenant, writes, &outcome);
            }
            outcomes.push((tenant, outcome));
        }
        let waited = match outcomes.iter().any(|(_, outcome)| outcome.is_ok()) {
            true => self.wait.for_last(&rollback.database, &Change::Tenants).await?,
            false => Waited::default(),
        };
        if self.json {
            let told: Vec<_> = outcomes.iter().map(|(tenant, outcome)| as_json(tenant, outcome, &waited)).collect();
            println!("{}", json!({ "tenants": told, "unfollowed": waited.to_json() }));
        }
        waited.verdict("tenants were given back", "the same command, run again, goes on waiting")?;
        let all = outcomes.iter().all(|(_, outcome)| outcome.is_ok());
        Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Says, before anything is changed, which tenants were shredded and would get back what was
/// destroyed.
async fn tell_shredded(rollback: &Backwards, tenants: &[Tenant], after: AfterShred) -> Result<(), Failure> {
    let shredded = rollback.shredded(tenants).await;
    let shredded = shredded.map_err(|error| Failure::failed("whether any of them was shredded is not known", error))?;
    if shredded.is_empty() {
        return Ok(());
    }
    let names = shredded.iter().map(Tenant::as_str).collect::<Vec<_>>().join(", ");
    match after {
        AfterShred::GoBack => {
            eprintln!("warning: {names}: what was destroyed by 'tenant shred' is served again from upstream");
            Ok(())
        }
        AfterShred::Refuse => Err(Failure::told(format!(
            "nothing was rolled back: these were shredded, and their folders upstream still hold what was destroyed, \
             which would be served again: {names}. Delete these folders there, leave the tenants out, or add \
             --after-shred to go back to them as they are"
        ))),
    }
}

/// The tenants that are meant: a name is taken as it is, a pattern is looked for among
/// those that a migration has switched.
async fn chosen(rollback: &Backwards, selection: &Selection, patterns: &[String]) -> Result<Vec<Tenant>, Failure> {
    let failed = |error| Failure::failed("the tenants could not be looked up", error);
    let states = rollback.database.migration_states().await.map_err(failed)?;
    let mut known: Vec<Tenant> = states.iter().map(|state| state.tenant.clone()).collect();
    // A tenant that was given back may still have to be waited for.
    let given_back: Vec<Tenant> = states.iter().filter(|state| state.step == Step::RolledBack).map(tenant_of).collect();
    let companies = rollback.database.companies_of(&known).await.map_err(failed)?;
    known = switched(states, &companies).into_iter().map(|state| state.tenant).collect();
    known.extend(given_back);
    known.extend(patterns.iter().filter_map(|pattern| pattern.parse().ok()));
    known.sort();
    known.dedup();
    selection.choose(&known).map_err(|unknown| {
        Failure::usage(format!("no tenant that was switched to the database matches {}", unknown.join(", ")))
    })
}

fn tenant_of(state: &TenantState) -> Tenant {
    state.tenant.clone()
}

fn tell(tenant: &Tenant, writes: Writes, outcome: &Result<RolledBack, RollbackError>) {
    match outcome {
        Ok(done) => {
            let keys = done.writes.len();
            let what = match writes {
                Writes::Push if keys > 0 => format!("; written to upstream: {}", count(keys, "secret")),
                Writes::Discard if keys > 0 => format!("; left behind in the database: {}", count(keys, "secret")),
                Writes::Push | Writes::Discard | Writes::Refuse => String::new(),
            };
            match done.already {
                true => println!("{tenant} was given back before, and is in phase {}", done.phase),
                false => println!("{tenant} is in phase {} again{what}", done.phase),
            }
        }
        Err(error) => eprintln!("{tenant} was not rolled back: {}", crate::log::chain(error)),
    }
}

fn as_json(tenant: &Tenant, outcome: &Result<RolledBack, RollbackError>, waited: &Waited) -> serde_json::Value {
    match outcome {
        Ok(done) => {
            let keys: Vec<_> = done.writes.iter().map(|key| key.as_str()).collect();
            let behind: Vec<_> = waited.unfollowed.iter().map(|unfollowed| &unfollowed.instance.name).collect();
            json!({ "tenant": tenant.as_str(), "phase": done.phase, "writes": keys, "behind": behind })
        }
        Err(error) => {
            let writes: Vec<_> = match error {
                RollbackError::Written(keys) => keys.iter().map(|key| key.as_str()).collect(),
                _ => Vec::new(),
            };
            json!({ "tenant": tenant.as_str(), "error": crate::log::chain(error), "writes": writes })
        }
    }
}
