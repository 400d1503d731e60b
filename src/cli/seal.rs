//! `secretier keys seal`: seals every token and every tenant, and then notes that in the database.
//!
//! Each step is a transaction that leaves everything valid, and finds the work of
//! the earlier ones: if it is killed at any point, the same command goes on.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use serde_json::json;

use super::{AdminAction, ConfigFile, Failure, keys::open};
use crate::{
    clock::Clock,
    tenant::Tenant,
    tiers::database::{Database, Distrust, JobLock, SealedTokens, StoreError},
};

#[derive(Debug, Args)]
pub(super) struct Seal {
    #[command(flatten)]
    config: ConfigFile,
    /// Seal these tenants' secrets as they are, though they are not those that were left there
    #[arg(long, value_name = "TENANT,...", value_delimiter = ',')]
    accept: Vec<String>,
    /// Seal every token as it is, though some are not as they were left
    #[arg(long)]
    accept_tokens: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

/// What a lookup may take is short for a hundred tenants.
const DATABASE_TIMEOUT: Duration = Duration::from_secs(10);

/// What was sealed, and what stays as it is.
#[derive(Default)]
struct Outcome {
    tokens: SealedTokens,
    tenants: usize,
    set_back: Vec<Tenant>,
    unreadable: Vec<Tenant>,
}

impl Seal {
    pub(super) fn action(&self) -> AdminAction {
        let action = AdminAction::new(&self.config, "keys.seal").with("accept_tokens", self.accept_tokens);
        action.with("accept", self.accept.join(","))
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let accepted = self.accept.iter().map(|name| name.parse::<Tenant>());
        let accepted: Vec<Tenant> =
            accepted.collect::<Result<_, _>>().map_err(|error| Failure::usage(format!("--accept: {error}")))?;
        let mut config = self.config.read()?.config;
        config.database.timeout = config.database.timeout.max(DATABASE_TIMEOUT);
        let base = open(&config, &Clock::system()).await?;
        base.needs_key()?;
        let database = &base.database;
        // Unsealed rows must be accepted here: this command is for them.
        database.require_seals(false);
        let lock = database.rotation_lock(&crate::log::process_name()).await.map_err(failed)?.map_err(|holder| {
            Failure::told(format!("{} rotates or seals on this database just now; run this again then", holder.shown))
        })?;
        let sealed = database.renewing(&lock, self.seal(database, &lock, &accepted)).await;
        database.end_job_lock(lock).await;
        let outcome = sealed.map_err(failed)??;
        let is_whole = outcome.is_whole();
        self.report(&outcome, is_whole);
        Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn seal(
        &self,
        database: &Database,
        lock: &JobLock,
        accepted: &[Tenant],
    ) -> Result<Result<Outcome, Failure>, StoreError> {
        if database.rotation().await?.is_some() {
            let told = "a rotation has not ended; 'secretier keys rotate' goes on with it, then run this";
            return Ok(Err(Failure::told(told)));
        }
        if let Some(refusal) = refusal_beside(&database.older_instances().await?) {
            return Ok(Err(refusal));
        }
        let mut outcome =
            Outcome { tokens: database.seal_tokens(lock, self.accept_tokens).await?, ..Outcome::default() };
        // A second pass finds rows that were made during the first.
        loop {
            let (mut after, mut sealed) = (None, 0);
            (outcome.set_back, outcome.unreadable) = (Vec::new(), Vec::new());
            loop {
                let some = database.seal_tenants(lock, after.as_deref(), accepted).await?;
                sealed += some.sealed;
                outcome.set_back.extend(some.set_back);
                outcome.unreadable.extend(some.unreadable);
                after = some.after;
                if after.is_none() {
                    break;
                }
            }
            outcome.tenants += sealed;
            if sealed == 0 {
                break;
            }
            eprintln!("{} tenants sealed", outcome.tenants);
        }
        if outcome.is_whole()
            && let Some(refusal) = refusal_beside(&database.complete_seals(lock).await?)
        {
            return Ok(Err(refusal));
        }
        Ok(Ok(outcome))
    }

    fn report(&self, outcome: &Outcome, is_whole: bool) {
        let Outcome { tokens, tenants, set_back, unreadable } = outcome;
        let names = |tenants: &[Tenant]| tenants.iter().map(|tenant| tenant.as_str().to_owned()).collect::<Vec<_>>();
        if self.json {
            let reason = |(name, why): &(String, Distrust)| json!({ "token": name, "reason": why.to_string() });
            let refused: Vec<_> = tokens.refused.iter().map(reason).collect();
            println!(
                "{}",
                json!({
                    "all": is_whole, "tokens": tokens.sealed, "tenants": tenants, "refused": refused,
                    "set_back": names(set_back), "unreadable": names(unreadable),
                })
            );
        } else {
            println!("{} tokens and {tenants} tenants were sealed", tokens.sealed);
            if is_whole {
                println!("every row has a seal; from now on one without is refused");
            }
        }
        for (name, why) in &tokens.refused {
            eprintln!("the token {name} stays as it is: {why}; revoke it and make another, or use --accept-tokens");
        }
        for tenant in set_back {
            eprintln!(
                "{tenant} stays as it is: its secrets are not those that were left there; look at them, then use \
                 --accept {tenant}"
            );
        }
        for tenant in unreadable {
            eprintln!("{tenant} stays as it is: its data key does not open; see 'secretier keys status'");
        }
    }
}

impl Outcome {
    fn is_whole(&self) -> bool {
        self.tokens.refused.is_empty() && self.set_back.is_empty() && self.unreadable.is_empty()
    }
}

fn refusal_beside(older: &[String]) -> Option<Failure> {
    let told = || {
        Failure::told(format!(
            "not every row can be sealed, because instances of an older version, which makes rows without a seal, are \
             registered: {}; end them, and run this again (one that was killed is forgotten within an hour)",
            older.join(", ")
        ))
    };
    (!older.is_empty()).then(told)
}

fn failed(error: StoreError) -> Failure {
    Failure::failed("not every row was sealed; run this again to go on", error)
}
