//! Waits for the running instances to follow a command's changes, and names those
//! that have not. One rule for all commands: they wait a stated time, and exit with 1 where an
//! instance may still answer as before; run again, they go on waiting for the same change.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::Failure;
use crate::tiers::database::{Change, Database, Instance, StoreError, Unfollowed};

/// How long running instances are waited for.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Wait {
    /// How long running instances may take to follow; exit 1 where one may go on answering as before
    #[arg(long, value_name = "DURATION", default_value = "15s", value_parser = humantime::parse_duration)]
    pub(super) wait: Duration,
}

impl Wait {
    /// Waits until each registered instance has followed this change, or cannot answer any more.
    /// Progress goes to standard error.
    pub(super) async fn for_change(self, database: &Database, change: i64) -> Result<Waited, Failure> {
        let tell = |names: Vec<String>| eprintln!("waiting for instances to follow: {}", names.join(", "));
        let has_followed = |instance: &Instance| instance.changes >= change;
        let following = database.await_all_instances(self.wait, has_followed, tell).await.map_err(unknown)?;
        let followed = following.done.iter().map(|instance| instance.name.clone()).collect();
        Ok(Waited { followed, unfollowed: following.unfollowed() })
    }

    /// The same for the last change of a kind, and with it for all before it.
    pub(super) async fn for_last(self, database: &Database, kind: &Change) -> Result<Waited, Failure> {
        let change = database.last_change(kind).await.map_err(unknown)?;
        self.for_change(database, change).await
    }
}

fn unknown(error: StoreError) -> Failure {
    let text = "it is done, but which running instances have followed is not known; the same command, run again, tells";
    Failure::failed(text, error)
}

/// How the instances stood when the waiting was over.
#[derive(Debug, Default)]
pub(super) struct Waited {
    /// The names of those that have followed, and are heard of.
    pub(super) followed: Vec<String>,
    /// Those that may go on answering as before.
    pub(super) unfollowed: Vec<Unfollowed>,
}

impl Waited {
    /// Nothing where all have followed; else what to say, which begins with what was done.
    pub(super) fn verdict(&self, done: &str, goes_on: &str) -> Result<(), Failure> {
        if self.unfollowed.is_empty() {
            return Ok(());
        }
        let each: Vec<String> = self.unfollowed.iter().map(Unfollowed::tell).collect();
        Err(Failure::told(format!(
            "{done}, but not every running instance has followed; {goes_on}, and 'secretier instances forget' takes out \
             one that certainly runs no more\n{}",
            each.join("\n")
        )))
    }

    /// For machines.
    pub(super) fn to_json(&self) -> Value {
        self.unfollowed.iter().map(Unfollowed::to_json).collect()
    }
}

impl Unfollowed {
    /// A line about it.
    pub(super) fn tell(&self) -> String {
        let Self { instance, is_live } = self;
        let seen = instance.seen_at.to_rfc3339();
        let state = match is_live {
            true => format!("runs and has not followed yet (last heard of at {seen})"),
            false => format!("was last heard of at {seen}, and has not withdrawn"),
        };
        let until = match instance.may_answer_until() {
            Some(until) => format!("may go on answering as before until {}", until.to_rfc3339()),
            None => "is of a version that does not tell for how long it may go on answering as before".to_owned(),
        };
        let unless = if *is_live { ", or longer as long as it reaches the database" } else { "" };
        format!("- {} {state}: it {until}{unless}", instance.name)
    }

    fn to_json(&self) -> Value {
        let Self { instance, is_live } = self;
        json!({
            "instance": instance.name,
            "live": is_live,
            "last_seen_at": instance.seen_at.to_rfc3339(),
            "may_answer_until": instance.may_answer_until().map(|until| until.to_rfc3339()),
        })
    }
}
