//! Puts administrative commands on record: before they begin, and how they end.

use std::{collections::BTreeMap, process::ExitCode, sync::Arc};

use super::{ConfigFile, Failure, open_database};
use crate::{
    access::audit::Administration,
    app::{Base, StartError},
    clock::Clock,
    config::Config,
    tiers::database::Database,
};

/// What a command is recorded as.
pub(super) struct AdminAction {
    pub(super) config: ConfigFile,
    pub(super) action: &'static str,
    /// The one tenant that it is about, if it is about one.
    pub(super) tenant: Option<String>,
    /// What it was told, as far as that is no secret.
    pub(super) options: BTreeMap<&'static str, String>,
}

impl AdminAction {
    pub(super) fn new(config: &ConfigFile, action: &'static str) -> Self {
        Self { config: config.clone(), action, tenant: None, options: BTreeMap::new() }
    }

    pub(super) fn with(mut self, option: &'static str, value: impl std::fmt::Display) -> Self {
        self.options.insert(option, value.to_string());
        self
    }
}

/// Runs a command on record. One that cannot be recorded is not run, but for where there is
/// no database to record it in: then it does without one, or fails by itself.
pub(super) async fn audited(
    action: Option<AdminAction>,
    command: impl Future<Output = Result<ExitCode, Failure>>,
) -> Result<ExitCode, Failure> {
    let Some(action) = action else { return command.await };
    // A fault in the configuration is reported better by the command itself.
    let Ok(config) = action.config.read().map(|loaded| loaded.config) else { return command.await };
    let database = match Box::pin(open_to_sign(&config)).await {
        Ok(database) => database,
        Err(failure) => {
            let outcome = command.await;
            if outcome.is_ok() {
                eprintln!("this is not on record in the audit: {failure}");
            }
            return outcome;
        }
    };
    let begun =
        Administration::begin(&config.audit, &database, action.action, action.tenant.as_deref(), action.options);
    let begun = Box::pin(begun).await.map_err(|error| Failure::failed("this command", error))?;
    let outcome = command.await;
    let is_done = outcome.as_ref().is_ok_and(|code| *code == ExitCode::SUCCESS);
    if let Err(error) = Box::pin(begun.end(is_done)).await {
        eprintln!("that this command began is on record, how it ended is not: {error}");
    }
    outcome
}

/// The database with the master keys, which sign the record, and seal a token. Where they cannot
/// be read, it is left to a running instance to sign it, and to `keys seal` to seal it.
pub(super) async fn open_to_sign(config: &Config) -> Result<Arc<Database>, Failure> {
    match Box::pin(Base::open(config, &Clock::system())).await {
        Ok(base) => Ok(base.database),
        Err(StartError::Database(error)) => Err(Failure::failed("the database cannot be used", error)),
        Err(_) => open_database(config).await.map(Arc::new),
    }
}
