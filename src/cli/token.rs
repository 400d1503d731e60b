//! `secretier token create|list|rotate|revoke`: in the configured database, whether or not the
//! proxy runs; it notices within a second.
//!
//! A token that goes into a file is written beside it first, then stored in the database, then
//! renamed into place: the usual failures come before there is a token. If the last step
//! fails all the same, the token is taken back. A crash between the last two steps leaves a
//! valid token whose text is in a file that only its owner can read, beside the intended one; in a
//! rotation, `rotate` makes another one, and the old one is valid for its grace time.

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{AdminAction, ConfigFile, Failure, following::Wait, print_table};
use crate::{
    access::{self, Action, ClientCredentials, InvalidToken, NewToken},
    clock::{Clock, Timestamp},
    private_file::{self, FileError},
    tenant::shared_folder,
    tiers::database::{Change, Database, Distrust, Sealed, StoreError, TokenRow},
};

#[derive(Debug, Args)]
pub(super) struct Token {
    #[command(subcommand)]
    action: TokenAction,
}

#[derive(Debug, Subcommand)]
enum TokenAction {
    /// Make a token and print it, this once, or write it into a file
    Create(Create),
    /// List the tokens
    List(List),
    /// Make a token that takes over from another one, which stays valid for a while
    ///
    /// Exit 1 where a running instance has not followed: it is named, with the time until which it may go on
    /// letting in the old one.
    Rotate(Rotate),
    /// Revoke a token, by name or id
    ///
    /// Exit 1 where a running instance may still let it in; it is named, with the time until which it may.
    /// Run again, it goes on waiting.
    Revoke(Revoke),
}

#[derive(Debug, Args)]
struct Create {
    #[command(flatten)]
    config: ConfigFile,
    /// What to call it
    #[arg(long)]
    name: String,
    /// The tenants it reaches, as globs; acme* takes in acme-evil and acmeville too: for acme and
    /// what belongs to it, write acme,acme-* and give nobody else a name that begins with acme-
    #[arg(long, required_unless_present = "folders", value_delimiter = ',', value_name = "GLOB,...")]
    tenants: Vec<String>,
    /// The shared folders it reaches, as globs; no glob of --tenants reaches one
    #[arg(long, value_delimiter = ',', value_name = "GLOB,...")]
    folders: Vec<String>,
    /// The keys it reaches there, as globs
    #[arg(long, default_value = "*", value_delimiter = ',', value_name = "GLOB,...")]
    keys: Vec<String>,
    /// What it may do: read, write, rotate, admin
    #[arg(long, required = true, value_delimiter = ',', value_name = "ACTION,...")]
    actions: Vec<String>,
    /// How long it is valid, as in 90d; without, until it is revoked
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    expires_in: Option<Duration>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct Rotate {
    #[command(flatten)]
    config: ConfigFile,
    /// The token's name or id
    token: String,
    /// How long the old one stays valid, if it does not end before
    #[arg(long, default_value = "24h", value_name = "DURATION", value_parser = humantime::parse_duration)]
    grace: Duration,
    /// How long the new one is valid, as in 90d; without, as long as the old one was to be
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    expires_in: Option<Duration>,
    #[command(flatten)]
    wait: Wait,
    #[command(flatten)]
    output: Output,
}

/// Where a new token goes.
#[derive(Debug, Args)]
struct Output {
    /// Write it into this file, for its owner alone, instead of printing it
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    /// Print JSON: its name and id, and the token if it goes into no file
    #[arg(long)]
    json: bool,
    /// Give it as a client id and a client secret, with which Infisical's clients log in (universal auth)
    ///
    /// A file gets them as the variables that Infisical's command line reads.
    #[arg(long)]
    universal_auth: bool,
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
    /// The token's name, which revokes every token of that name, or the id of one of them
    token: String,
    #[command(flatten)]
    wait: Wait,
}

impl Token {
    pub(super) fn action(&self) -> Option<AdminAction> {
        match &self.action {
            TokenAction::Create(create) => {
                let action = AdminAction::new(&create.config, "token.create").with("name", &create.name);
                let action = action.with("tenants", create.scope().join(",")).with("keys", create.keys.join(","));
                Some(action.with("actions", create.actions.join(",")))
            }
            TokenAction::List(_) => None,
            TokenAction::Rotate(rotate) => {
                let action = AdminAction::new(&rotate.config, "token.rotate").with("token", public(&rotate.token));
                Some(action.with("grace", humantime::format_duration(rotate.grace)))
            }
            TokenAction::Revoke(revoke) => {
                Some(AdminAction::new(&revoke.config, "token.revoke").with("token", public(&revoke.token)))
            }
        }
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self.action {
            TokenAction::Create(create) => create.run().await,
            TokenAction::List(list) => list.run().await,
            TokenAction::Rotate(rotate) => rotate.run().await,
            TokenAction::Revoke(revoke) => revoke.run().await,
        }
    }
}

impl Create {
    /// Its scope: a shared folder is written with a slash before its name.
    fn scope(&self) -> Vec<String> {
        let slashed = |folder: &String| format!("/{}", folder.trim_start_matches('/'));
        self.tenants.iter().cloned().chain(self.folders.iter().map(slashed)).collect()
    }

    async fn run(self) -> Result<ExitCode, Failure> {
        if let Some(folder) = self.tenants.iter().find_map(|glob| shared_folder(glob)) {
            return Err(Failure::usage(format!("--tenants: write --folders {folder:?} for a shared folder")));
        }
        let new = NewToken {
            tenants: self.scope(),
            name: self.name,
            keys: self.keys,
            actions: parsed(&self.actions)?,
            lifetime: self.expires_in,
        };
        let (token, row) = new.draw(Clock::system().now()).map_err(|error| invalid(&error))?;
        row.tenants.iter().filter_map(|glob| wider_than_it_looks(glob)).for_each(|note| eprintln!("{note}"));
        // Checked before anything is done; the creation of the file checks it again.
        if let Some(path) = self.output.file.as_deref().filter(|path| path.symlink_metadata().is_ok()) {
            let told = format!("{} exists already; 'secretier token rotate' replaces the token in it", path.display());
            return Err(Failure::usage(told));
        }
        let database = open(&self.config).await?;
        let store = async || match database.insert_token(&row).await {
            Ok(()) => Ok(()),
            Err(error @ StoreError::NameTaken(_)) => Err(invalid(&error)),
            Err(StoreError::Seals(why)) => Err(Failure::told(why)),
            Err(error) => Err(Failure::failed("the token could not be stored", error)),
        };
        self.output.put(&database, &token, &row, None, store).await?;
        self.output.tell(&token, &row, json!({}));
        Ok(ExitCode::SUCCESS)
    }
}

impl Rotate {
    async fn run(self) -> Result<ExitCode, Failure> {
        let database = open(&self.config).await?;
        let now = Clock::system().now();
        let old = self.find(&database).await?;
        let new = NewToken {
            name: old.name.clone(),
            tenants: old.tenants.clone(),
            keys: old.keys.clone(),
            actions: parsed(&old.actions)?,
            lifetime: self.expires_in.or_else(|| old.expires_at.map(|end| end.since(old.created_at))),
        };
        let (token, row) = new.draw(now).map_err(|error| invalid(&error))?;
        // Without grace the old token ends at once, not by a clock: an instance's may be behind.
        let grace_ends = (!self.grace.is_zero()).then(|| now.plus(self.grace));
        let store = async || {
            let rotated = match database.rotate_token(&old.id, grace_ends, &row).await {
                Err(StoreError::Seals(why)) => return Err(Failure::told(why)),
                rotated => rotated,
            };
            match rotated.map_err(|error| Failure::failed("the token could not be rotated", error))? {
                true => Ok(()),
                false => Err(Failure::told(format!(
                    "the token {:?} was rotated or revoked by another command just now; 'secretier token list' tells",
                    old.name
                ))),
            }
        };
        self.output.put(&database, &token, &row, Some(&old), store).await?;
        let old_ends = [old.expires_at, grace_ends.or(Some(now))].into_iter().flatten().min().unwrap_or(now);
        let until = old_ends.to_rfc3339();
        let replaced = json!({ "replaced": { "id": old.id, "expires_at": until } });
        self.output.tell(&token, &row, replaced);
        if !self.output.json {
            match old_ends > now {
                true => eprintln!("the one before, {}, stays valid until {until}", old.id),
                false => eprintln!("the one before, {}, is not valid any more", old.id),
            }
        }
        let waited = self.wait.for_last(&database, &Change::Tokens).await?;
        let done = format!("the token was rotated, and the one before, {}, ends {until}", old.id);
        waited.verdict(&done, "'secretier instances wait' goes on waiting")?;
        Ok(ExitCode::SUCCESS)
    }

    /// The token that is meant, which may be rotated.
    async fn find(&self, database: &Database) -> Result<TokenRow, Failure> {
        let tokens = database.tokens().await.map_err(|error| Failure::failed("the tokens could not be read", error))?;
        let named = |token: &&TokenRow| token.name == self.token && token.replaced_by.is_none();
        let found = tokens.iter().find(named).or_else(|| tokens.iter().find(|token| token.id == self.token));
        let token = found.ok_or_else(|| {
            Failure::told(format!("there is no token {:?}; 'secretier token list' lists them", self.token))
        })?;
        if token.revoked_at.is_some() {
            return Err(Failure::told(format!(
                "the token {:?} was revoked; 'secretier token create' makes another one, under another name",
                self.token
            )));
        }
        if let Some(by) = &token.replaced_by {
            return Err(Failure::told(format!(
                "the token {:?} was rotated before: {by} has taken over from it, and can be rotated",
                self.token
            )));
        }
        Ok(token.clone())
    }
}

impl Output {
    /// Stores a token, and puts it into the file if there is one: a new file, or in the place
    /// of the token that it replaces.
    async fn put(
        &self,
        database: &Database,
        token: &access::Token,
        row: &TokenRow,
        replaced: Option<&TokenRow>,
        store: impl AsyncFnOnce() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let Some(path) = &self.file else { return store().await };
        let held = private_file::hold(path).map_err(unwritten)?;
        let prepared = held.prepare(path, &self.line(token)).map_err(unwritten)?;
        store().await?;
        let written = if replaced.is_some() { prepared.replace() } else { prepared.create() };
        match written {
            Ok(()) => Ok(()),
            Err(error) => Err(taken_back(database, row, replaced, error).await),
        }
    }

    /// The content of the file.
    fn line(&self, token: &access::Token) -> Zeroizing<String> {
        match self.credentials(token) {
            None => token.line(),
            Some(ClientCredentials { client_id, client_secret }) => Zeroizing::new(format!(
                "INFISICAL_UNIVERSAL_AUTH_CLIENT_ID={client_id}\nINFISICAL_UNIVERSAL_AUTH_CLIENT_SECRET={}\n",
                client_secret.as_str()
            )),
        }
    }

    fn credentials(&self, token: &access::Token) -> Option<ClientCredentials> {
        ClientCredentials::of(token.expose()).filter(|_| self.universal_auth)
    }

    /// Tells of a token that was stored, and put into the file if there is one.
    fn tell(&self, token: &access::Token, row: &TokenRow, more: Value) {
        if self.json {
            let mut told = json!({
                "name": row.name, "id": row.id, "expires_at": row.expires_at.map(Timestamp::to_rfc3339),
            });
            let credentials = self.credentials(token);
            if let Some(credentials) = &credentials {
                told["client_id"] = json!(credentials.client_id);
            }
            match (&self.file, &credentials) {
                (Some(path), _) => told["file"] = json!(path),
                (None, Some(credentials)) => told["client_secret"] = json!(credentials.client_secret.as_str()),
                (None, None) => told["token"] = json!(token.expose()),
            }
            if let (Some(told), Value::Object(more)) = (told.as_object_mut(), more) {
                told.extend(more);
            }
            println!("{told}");
            return;
        }
        match (&self.file, self.credentials(token)) {
            (Some(path), None) => eprintln!("the token {} ({}) is in {}", row.name, row.id, path.display()),
            (Some(path), Some(credentials)) => eprintln!(
                "the credentials of the token {} ({}), with the client id {}, are in {}",
                row.name,
                row.id,
                credentials.client_id,
                path.display()
            ),
            (None, None) => {
                eprintln!("This is shown once; keep it where the API finds it:");
                println!("{}", token.expose());
            }
            (None, Some(credentials)) => {
                eprintln!("The secret is shown once; give both to the client as those of a universal auth:");
                println!("client id      {}", credentials.client_id);
                println!("client secret  {}", credentials.client_secret.as_str());
            }
        }
    }
}

/// What is to be known of a glob that ends within a name.
fn wider_than_it_looks(glob: &str) -> Option<String> {
    let name = glob.strip_suffix('*').filter(|name| name.ends_with(|c: char| c.is_ascii_alphanumeric()))?;
    Some(format!(
        "note: {glob} takes in every tenant whose name begins so, {name}-evil and {name}ville too; for {name} and what \
         belongs to it, write {name},{name}-*"
    ))
}

async fn open(config: &ConfigFile) -> Result<Arc<Database>, Failure> {
    Box::pin(super::admin_action::open_to_sign(&config.read()?.config)).await
}

fn parsed(actions: &[String]) -> Result<Vec<Action>, Failure> {
    actions.iter().map(|word| word.parse()).collect::<Result<_, InvalidToken>>().map_err(|error| invalid(&error))
}

fn invalid(error: &dyn std::error::Error) -> Failure {
    Failure::usage(super::chain("the token", error))
}

fn unwritten(error: FileError) -> Failure {
    Failure::failed("no token was made", error)
}

/// Takes back a token that could not be put into its file, and tells so.
async fn taken_back(database: &Database, made: &TokenRow, replaced: Option<&TokenRow>, error: FileError) -> Failure {
    match database.take_back_token(&made.id, replaced).await {
        Ok(true) => unwritten(error),
        Ok(false) | Err(_) => Failure::told(format!(
            "{error}; the token that was made for it is still valid, though nobody has it: \
             run 'secretier token revoke {}'",
            made.id
        )),
    }
}

impl List {
    async fn run(self) -> Result<ExitCode, Failure> {
        let database = open(&self.config).await?;
        let known = database.known_tokens().await;
        let known = known.map_err(|error| Failure::failed("the tokens could not be read", error))?;
        let believed = known.tokens.iter().map(|token| (token, None));
        let refused = known.refused.iter().map(|(token, why)| (token, Some(*why)));
        let mut tokens: Vec<(&TokenRow, Option<Distrust>)> = believed.chain(refused).collect();
        tokens.sort_by(|(one, _), (other, _)| (one.created_at, &one.name).cmp(&(other.created_at, &other.name)));
        let now = Clock::system().now();
        if self.json {
            let tokens: Vec<_> = tokens
                .iter()
                .map(|(token, why)| {
                    let state = if why.is_some() { "refused" } else { State::of(token, now).as_str() };
                    json!({
                        "name": token.name, "id": token.id, "client_id": access::client_id(&token.id),
                        "tenants": token.tenants, "keys": token.keys, "actions": token.actions, "state": state,
                        "created_at": token.created_at.to_rfc3339(),
                        "expires_at": token.expires_at.map(Timestamp::to_rfc3339),
                        "last_used_at": token.last_used_at.map(Timestamp::to_rfc3339),
                        "revoked_at": token.revoked_at.map(Timestamp::to_rfc3339),
                        "replaced_by": token.replaced_by, "refused": why.map(|why| why.to_string()),
                    })
                })
                .collect();
            println!("{}", json!(tokens));
        } else {
            let short = |time: Timestamp, length| time.to_rfc3339().chars().take(length).collect::<String>();
            let day = |time| short(time, "2026-11-21".len());
            let minute = |time| short(time, "2026-11-21T22:00".len()).replace('T', " ");
            let rows = tokens.iter().map(|(token, why)| {
                let state = match (State::of(token, now), token.expires_at) {
                    _ if why.is_some() => "REFUSED".to_owned(),
                    (State::Replaced, Some(end)) => format!("replaced, valid until {}", minute(end)),
                    (state, _) => state.as_str().to_owned(),
                };
                vec![
                    token.name.clone(),
                    token.id.clone(),
                    token.tenants.join(","),
                    token.keys.join(","),
                    token.actions.join(","),
                    state,
                    day(token.created_at),
                    token.last_used_at.map_or("never".to_owned(), minute),
                    token.expires_at.map_or("never".to_owned(), day),
                ]
            });
            print_table(
                &["NAME", "ID", "TENANTS", "KEYS", "ACTIONS", "STATE", "CREATED", "LAST USED", "EXPIRES"],
                &rows.collect::<Vec<_>>(),
            );
        }
        for (token, why) in &known.refused {
            eprintln!("warning: {} ({}) lets nobody in: {why}", token.name, token.id);
        }
        if known.unsealed > 0 && known.sealed != Sealed::Unchecked {
            eprintln!("{} tokens have no seal; 'secretier keys seal' seals them", known.unsealed);
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Revoke {
    async fn run(self) -> Result<ExitCode, Failure> {
        let database = open(&self.config).await?;
        let revoked = database.revoke_token(&self.token).await;
        let revoked = revoked.map_err(|error| Failure::failed("the token could not be revoked", error))?;
        let named = |token: &&TokenRow| token.name == self.token || token.id == self.token;
        if revoked == 0 && !self.tokens(&database).await?.iter().any(|token| named(&token)) {
            return Err(Failure::told(format!(
                "there is no token {:?}; 'secretier token list' lists them",
                self.token
            )));
        }
        match revoked {
            0 => eprintln!("it was revoked before"),
            1 => eprintln!("revoked"),
            _ => eprintln!("revoked {revoked} tokens"),
        }
        let waited = self.wait.for_last(&database, &Change::Tokens).await?;
        waited.verdict("the token is revoked", "the same command, run again, goes on waiting")?;
        eprintln!("every running instance refuses it");
        Ok(ExitCode::SUCCESS)
    }

    async fn tokens(&self, database: &Database) -> Result<Vec<TokenRow>, Failure> {
        database.tokens().await.map_err(|error| Failure::failed("the tokens could not be read", error))
    }
}

/// What a token is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Valid,
    /// Another one has taken over from it, and it is valid for a while yet.
    Replaced,
    Expired,
    Revoked,
}

impl State {
    fn of(token: &TokenRow, now: Timestamp) -> Self {
        if token.revoked_at.is_some() {
            return Self::Revoked;
        }
        match (token.expires_at, &token.replaced_by) {
            (Some(end), _) if now >= end => Self::Expired,
            (_, Some(_)) => Self::Replaced,
            (_, None) => Self::Valid,
        }
    }

    /// The word used in JSON.
    fn as_str(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::Replaced => "replaced",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

/// What names a token. Should somebody paste the token itself, its secret part goes nowhere.
fn public(name_or_id: &str) -> &str {
    match name_or_id.strip_prefix("st_").and_then(|rest| rest.split_once('_')) {
        Some((id, _)) => id,
        None => name_or_id,
    }
}
