//! `secretier instances list|wait|forget`: the register of running instances, in the configured
//! database.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{AdminAction, ConfigFile, Failure, following::Wait, print_table};
use crate::{
    clock::Timestamp,
    tiers::database::{Instance, StoreError},
};

#[derive(Debug, Args)]
pub(super) struct Instances {
    #[command(subcommand)]
    action: InstancesAction,
}

#[derive(Debug, Subcommand)]
enum InstancesAction {
    /// List the instances in the register, with until when each may answer if it is not heard of again
    List(List),
    /// Wait until every instance has followed all changes so far
    ///
    /// Exit 1 where one has not: it is named, with the time until which it may go on answering as before.
    Wait(Await),
    /// Take an instance out of the register that certainly runs no more, such as one that was killed
    ///
    /// Commands then neither wait for it nor name it. One that runs all the same, without the database, goes
    /// on answering, and nobody is told.
    Forget(Forget),
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    config: ConfigFile,
    /// Print the list as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Await {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Debug, Args)]
struct Forget {
    #[command(flatten)]
    config: ConfigFile,
    /// Its name, as the list has it: host/process
    instance: String,
}

impl Instances {
    pub(super) fn action(&self) -> Option<AdminAction> {
        match &self.action {
            InstancesAction::List(_) | InstancesAction::Wait(_) => None,
            InstancesAction::Forget(forget) => {
                Some(AdminAction::new(&forget.config, "instances.forget").with("instance", &forget.instance))
            }
        }
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self.action {
            InstancesAction::List(list) => list.run().await,
            InstancesAction::Wait(wait) => wait.run().await,
            InstancesAction::Forget(forget) => forget.run().await,
        }
    }
}

fn unread(error: StoreError) -> Failure {
    Failure::failed("the register of instances could not be read", error)
}

impl List {
    async fn run(self) -> Result<ExitCode, Failure> {
        let database = super::open_database(&self.config.read()?.config).await?;
        let (now, instances) = database.instances().await.map_err(unread)?;
        let changes = database.changes().await.map_err(unread)?;
        if self.json {
            let instances: Vec<Value> = instances.iter().map(|instance| as_json(instance, now)).collect();
            println!("{}", json!({ "changes": changes, "instances": instances }));
            return Ok(ExitCode::SUCCESS);
        }
        let rows = instances.iter().map(|instance| {
            let followed = match changes - instance.changes {
                0 => "all".to_owned(),
                missing => format!("all but {missing}"),
            };
            let until = instance.may_answer_until().map_or("not told".to_owned(), Timestamp::to_rfc3339);
            let version = instance.version.clone().unwrap_or_else(|| "-".to_owned());
            let state = state(instance, now).to_owned();
            vec![instance.name.clone(), state, version, followed, instance.seen_at.to_rfc3339(), until]
        });
        let header = ["INSTANCE", "STATE", "VERSION", "FOLLOWED", "LAST HEARD OF", "MAY ANSWER UNTIL"];
        print_table(&header, &rows.collect::<Vec<_>>());
        Ok(ExitCode::SUCCESS)
    }
}

/// A word for how it stands.
fn state(instance: &Instance, now: Timestamp) -> &'static str {
    match instance.may_answer_until() {
        _ if instance.is_live(now) => "runs",
        Some(until) if until < now => "over",
        _ => "silent",
    }
}

fn as_json(instance: &Instance, now: Timestamp) -> Value {
    json!({
        "instance": instance.name,
        "state": state(instance, now),
        "version": instance.version,
        "followed": instance.changes,
        "last_seen_at": instance.seen_at.to_rfc3339(),
        "may_answer_until": instance.may_answer_until().map(Timestamp::to_rfc3339),
    })
}

impl Await {
    async fn run(self) -> Result<ExitCode, Failure> {
        let database = super::open_database(&self.config.read()?.config).await?;
        let change = database.changes().await.map_err(unread)?;
        let waited = self.wait.for_change(&database, change).await?;
        waited.verdict("changes were made", "the same command, run again, goes on waiting")?;
        eprintln!("all {} running instances have followed", waited.followed.len());
        Ok(ExitCode::SUCCESS)
    }
}

impl Forget {
    async fn run(self) -> Result<ExitCode, Failure> {
        let database = super::open_database(&self.config.read()?.config).await?;
        let forgotten = database.forget_instance(&self.instance).await;
        match forgotten.map_err(|error| Failure::failed("it could not be forgotten", error))? {
            0 => Err(Failure::told(format!(
                "no instance {:?} is registered that has not been heard of for 15 s; 'secretier instances list' lists them",
                self.instance
            ))),
            _ => {
                eprintln!("forgotten");
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}
