//! `secretier rotate` and `secretier rotations list|due|show|promote|retry|abort|retire|rollback`: ask a
//! running proxy over HTTP.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use reqwest::{Method, header};
use serde::Serialize;
use serde_json::Value;

use super::{
    Failure,
    secrets::{Proxy, encoded, parse, print_rows, read_value, secret_path},
};
use crate::{answer::wiped_json, clock::Clock};

#[derive(Debug, Args)]
pub(super) struct Rotate {
    #[command(flatten)]
    proxy: Proxy,
    tenant: String,
    key: String,
    /// Read the new value from this file, or from standard input (-); without this it is made as the
    /// rule of [[rotation]] says
    #[arg(long, value_name = "FILE")]
    value_file: Option<PathBuf>,
    /// Keep a line break at the value's end, which is otherwise left out
    #[arg(long, requires = "value_file")]
    exact: bool,
    /// How long the old value stays valid; without this as the rule says, or a day
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    grace: Option<Duration>,
    /// Why, for the record
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Rotations {
    #[command(subcommand)]
    action: RotationsAction,
}

#[derive(Debug, Subcommand)]
enum RotationsAction {
    /// List the rotations that the token reaches
    List(List),
    /// List the secrets that are to be rotated by themselves soon
    Due(Due),
    /// Tell how the rotation of a secret goes on, or how the last one ended
    Show(OfSecret),
    /// Have the new value take over now, without waiting for instances that have not heard of it
    Promote(OfSecret),
    /// Try the step again that has failed
    Retry(OfSecret),
    /// Stop a rotation whose new value has not taken over
    Abort(OfSecret),
    /// End the time of the old value now
    Retire(OfSecret),
    /// Make the old value the secret's again, while it is valid
    Rollback(OfSecret),
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    proxy: Proxy,
    /// Those in this state: running, completed, failed, aborted or rolled_back
    #[arg(long, value_name = "STATE")]
    state: Option<String>,
    /// Print the list as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Due {
    #[command(flatten)]
    proxy: Proxy,
    /// Those within this time
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "7d")]
    within: Duration,
    /// Print the list as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct OfSecret {
    #[command(flatten)]
    proxy: Proxy,
    tenant: String,
    key: String,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

/// The body of the request. The value is not copied into one that is not wiped.
#[derive(Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

impl Rotate {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let path = format!("{}/rotate", secret_path(&self.tenant, &self.key)?);
        let request = self.proxy.request(Method::POST, &path)?;
        let value = match &self.value_file {
            Some(path) if path.as_os_str() == "-" => Some(read_value(None, self.exact)?),
            Some(path) => Some(read_value(Some(path), self.exact)?),
            None => None,
        };
        let body = wiped_json(&Body {
            value: value.as_ref().map(|value| value.expose()),
            grace: self.grace.map(|grace| humantime::format_duration(grace).to_string()),
            reason: self.reason.as_deref(),
        });
        let request = request.header(header::CONTENT_TYPE, "application/json").body(body);
        let begun: Value = parse(self.proxy.send(request).await?).await?;
        if self.json {
            println!("{begun}");
        } else {
            let (tenant, key) = (&self.tenant, &self.key);
            eprintln!(
                "a rotation of {tenant}/{key} has begun; 'secretier rotations show {tenant} {key}' tells how it goes on"
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Rotations {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self.action {
            RotationsAction::List(list) => list.run().await,
            RotationsAction::Due(due) => due.run().await,
            RotationsAction::Show(of) => of.ask(Method::GET, "").await,
            RotationsAction::Promote(of) => of.ask(Method::POST, "/promote").await,
            RotationsAction::Retry(of) => of.ask(Method::POST, "/retry").await,
            RotationsAction::Abort(of) => of.ask(Method::POST, "/abort").await,
            RotationsAction::Retire(of) => of.ask(Method::POST, "/retire").await,
            RotationsAction::Rollback(of) => of.ask(Method::POST, "/rollback").await,
        }
    }
}

impl List {
    async fn run(self) -> Result<ExitCode, Failure> {
        let (mut rotations, mut after) = (Vec::new(), None::<String>);
        loop {
            let mut parameters = Vec::new();
            parameters.extend(self.state.as_ref().map(|state| format!("state={}", encoded(state))));
            parameters.extend(after.as_ref().map(|after| format!("after={}", encoded(after))));
            let path = match parameters.is_empty() {
                true => "/v1/rotations".to_owned(),
                false => format!("/v1/rotations?{}", parameters.join("&")),
            };
            let page: Value = parse(self.proxy.send(self.proxy.request(Method::GET, &path)?).await?).await?;
            rotations.extend(page["rotations"].as_array().into_iter().flatten().cloned());
            after = page["next"].as_str().map(str::to_owned);
            if after.is_none() {
                break;
            }
        }
        let rotations = Value::Array(rotations);
        if self.json {
            println!("{rotations}");
        } else {
            print_rows(
                &rotations,
                &["tenant", "key", "state", "step", "started_at", "started_by", "valid_until", "next_try_at"],
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Due {
    async fn run(self) -> Result<ExitCode, Failure> {
        let before = Clock::system().now().plus(self.within).to_rfc3339();
        // Only what is due matters here: of the rotations, those that have failed.
        let path = format!("/v1/rotations?state=failed&due_before={}", encoded(&before));
        let body: Value = parse(self.proxy.send(self.proxy.request(Method::GET, &path)?).await?).await?;
        if self.json {
            println!("{}", body["due"]);
        } else {
            print_rows(&body["due"], &["tenant", "key", "due_at"]);
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl OfSecret {
    async fn ask(self, method: Method, below: &str) -> Result<ExitCode, Failure> {
        let path = format!("{}/rotation{below}", secret_path(&self.tenant, &self.key)?);
        let rotation: Value = parse(self.proxy.send(self.proxy.request(method, &path)?).await?).await?;
        if self.json {
            println!("{rotation}");
            return Ok(ExitCode::SUCCESS);
        }
        let told = |name: &str| match &rotation[name] {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        };
        for name in [
            "state",
            "step",
            "started_at",
            "started_by",
            "reason",
            "old_version",
            "new_version",
            "valid_until",
            "tries",
            "next_try_at",
            "waits_for",
            "ended_at",
            "due_at",
        ] {
            if let Some(told) = told(name) {
                println!("{name:<12} {told}");
            }
        }
        if let (Some(code), Some(detail)) = (rotation["error"]["code"].as_str(), rotation["error"]["detail"].as_str()) {
            println!("{:<12} {code}: {detail}", "error");
        }
        Ok(ExitCode::SUCCESS)
    }
}
