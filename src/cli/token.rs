//! `secretier token create|list|revoke`: in the configured database, whether or not the
//! proxy runs; it notices within a second.

use std::{process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{ConfigFile, Failure, print_table};
use crate::{
    access::{Action, NewToken},
    clock::{Clock, Timestamp},
    tiers::database::{StoreError, TokenRow},
};

#[derive(Debug, Args)]
pub(super) struct Token {
    #[command(subcommand)]
    action: TokenAction,
}

#[derive(Debug, Subcommand)]
enum TokenAction {
    /// Make a token and print it, this once
    Create(Create),
    /// List the tokens
    List(List),
    /// Revoke a token, by name or id
    Revoke(Revoke),
}

#[derive(Debug, Args)]
struct Create {
    #[command(flatten)]
    config: ConfigFile,
    /// What to call it
    #[arg(long)]
    name: String,
    /// The tenants it reaches, as globs
    #[arg(long, required = true, value_delimiter = ',', value_name = "GLOB,...")]
    tenants: Vec<String>,
    /// What it may do: read, write, admin
    #[arg(long, required = true, value_delimiter = ',', value_name = "ACTION,...")]
    actions: Vec<String>,
    /// How long it is valid, as in 90d; without, until it is revoked
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    expires_in: Option<Duration>,
    /// Print it as JSON, with its name and id
    #[arg(long)]
    json: bool,
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
struct Revoke {
    #[command(flatten)]
    config: ConfigFile,
    /// The token's name or id
    token: String,
}

impl Token {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self.action {
            TokenAction::Create(create) => create.run().await,
            TokenAction::List(list) => list.run().await,
            TokenAction::Revoke(revoke) => revoke.run().await,
        }
    }
}

impl Create {
    async fn run(self) -> Result<ExitCode, Failure> {
        let invalid = |error: &dyn std::error::Error| Failure::usage(super::chain("the token", error));
        let actions: Vec<Action> =
            self.actions.iter().map(|word| word.parse()).collect::<Result<_, _>>().map_err(|error| invalid(&error))?;
        let new = NewToken {
            name: self.name,
            tenants: self.tenants,
            keys: vec!["*".to_owned()],
            actions,
            lifetime: self.expires_in,
        };
        let (token, row) = new.draw(Clock::system().now()).map_err(|error| invalid(&error))?;
        let database = super::open_database(&self.config.read()?.config).await?;
        match database.insert_token(&row).await {
            Ok(()) => {}
            Err(error @ StoreError::NameTaken(_)) => return Err(invalid(&error)),
            Err(error) => return Err(Failure::failed("the token could not be stored", error)),
        }
        if self.json {
            println!("{}", json!({ "token": token.expose(), "name": row.name, "id": row.id }));
        } else {
            eprintln!("This is shown once; keep it where the API finds it:");
            println!("{}", token.expose());
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl List {
    async fn run(self) -> Result<ExitCode, Failure> {
        let database = super::open_database(&self.config.read()?.config).await?;
        let tokens = database.tokens().await.map_err(|error| Failure::failed("the tokens could not be read", error))?;
        let now = Clock::system().now();
        if self.json {
            let tokens: Vec<_> = tokens
                .iter()
                .map(|token| {
                    json!({
                        "name": token.name, "id": token.id, "tenants": token.tenants, "actions": token.actions,
                        "state": state(token, now), "created_at": token.created_at.to_rfc3339(),
                        "expires_at": token.expires_at.map(Timestamp::to_rfc3339),
                        "revoked_at": token.revoked_at.map(Timestamp::to_rfc3339),
                    })
                })
                .collect();
            println!("{}", json!(tokens));
        } else {
            let day = |time: Timestamp| time.to_rfc3339().chars().take(10).collect::<String>();
            let rows = tokens.iter().map(|token| {
                vec![
                    token.name.clone(),
                    token.id.clone(),
                    token.tenants.join(","),
                    token.actions.join(","),
                    state(token, now).to_owned(),
                    day(token.created_at),
                    token.expires_at.map_or("never".to_owned(), day),
                ]
            });
            print_table(
                &["NAME", "ID", "TENANTS", "ACTIONS", "STATE", "CREATED", "EXPIRES"],
                &rows.collect::<Vec<_>>(),
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Revoke {
    async fn run(self) -> Result<ExitCode, Failure> {
        let database = super::open_database(&self.config.read()?.config).await?;
        let revoked = database.revoke_token(&self.token).await;
        if revoked.map_err(|error| Failure::failed("the token could not be revoked", error))? == 0 {
            return Err(Failure::told(format!(
                "there is no valid token named {:?}; 'secretier token list' lists them",
                self.token
            )));
        }
        eprintln!("revoked; running instances refuse it within a second");
        Ok(ExitCode::SUCCESS)
    }
}

fn state(token: &TokenRow, now: Timestamp) -> &'static str {
    match (token.revoked_at, token.expires_at) {
        (Some(_), _) => "revoked",
        (None, Some(end)) if now >= end => "expired",
        (None, _) => "valid",
    }
}
