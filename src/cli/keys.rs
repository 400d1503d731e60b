//! `secretier keys status|rotate|seal|backup|restore`: the master keys, in their sources and the configured
//! database, whether or not the proxy runs.

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Read as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Subcommand};
use serde::Serialize;
use zeroize::Zeroizing;

use super::{AdminAction, ConfigFile, Failure, following::Waited, print_table, seal::Seal};
use crate::{
    app::{Base, StartError},
    clock::{Clock, Timestamp},
    config::Config,
    key_rotation::{Progress, RotateError, Rotated, Rotation},
    keys::{IntroduceError, KeySource, SourceOutcome, SourceReport, Sources},
    metrics::Metrics,
    private_file,
    sealing::{
        KeyRing, MasterKeyId,
        backup::{self, Backup as SealedBackup},
    },
    secret::SecretValue,
    setting::SecretSetting,
    tiers::{
        database::{KnownKey, KnownTokens, Sealed, StoreError, WrappedBy},
        upstream,
    },
};

#[derive(Debug, Args)]
pub(super) struct Keys {
    #[command(subcommand)]
    action: KeysAction,
}

#[derive(Debug, Subcommand)]
enum KeysAction {
    /// Show each master key: where it is, how old, and what it still wraps
    Status(Status),
    /// Introduce a new master key and re-wrap every tenant's data key with it
    ///
    /// Exit 1 where a running instance may go on with the key of before; it is named, with the time until
    /// which it may. Run again, the same rotation goes on.
    Rotate(Rotate),
    /// Seal every token and every tenant's secrets against change, and refuse what has no seal from then on
    ///
    /// Refused while an instance of a version that makes no seals is registered. Killed at any point, the
    /// same command goes on. Exit 1 where something was changed by somebody without a master key: it stays
    /// as it is.
    Seal(Seal),
    /// Write the master keys into one file, sealed under a passphrase
    Backup(Backup),
    /// Put the master keys of a backup back into a source
    Restore(Restore),
}

#[derive(Debug, Args)]
struct Status {
    #[command(flatten)]
    config: ConfigFile,
    /// Print the status as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Rotate {
    #[command(flatten)]
    config: ConfigFile,
    /// Give every tenant a new data key too, and seal its values with it
    #[arg(long)]
    data_keys: bool,
    /// How long running instances may take to read the new key
    #[arg(
        long, visible_alias = "wait", value_name = "DURATION", default_value = "30s",
        value_parser = humantime::parse_duration
    )]
    patience: Duration,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Backup {
    #[command(flatten)]
    config: ConfigFile,
    /// The file to write; without, keys.backup_file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    passphrase: Passphrase,
}

#[derive(Debug, Args)]
struct Restore {
    #[command(flatten)]
    config: ConfigFile,
    /// The backup
    file: PathBuf,
    /// The source to put the keys into, as keys.sources names it; without, the first file there
    #[arg(long, value_name = "SOURCE")]
    to: Option<String>,
    #[command(flatten)]
    passphrase: Passphrase,
}

/// Where the passphrase of a backup comes from.
#[derive(Debug, Args)]
struct Passphrase {
    /// A file that holds the passphrase; without, keys.backup_passphrase, else it is asked for, or read
    /// from standard input where that is no terminal
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

impl Keys {
    pub(super) fn action(&self) -> Option<AdminAction> {
        match &self.action {
            KeysAction::Status(_) => None,
            KeysAction::Rotate(rotate) => {
                Some(AdminAction::new(&rotate.config, "keys.rotate").with("data_keys", rotate.data_keys))
            }
            KeysAction::Seal(seal) => Some(seal.action()),
            KeysAction::Backup(backup) => Some(AdminAction::new(&backup.config, "keys.backup")),
            KeysAction::Restore(restore) => {
                Some(AdminAction::new(&restore.config, "keys.restore").with("file", restore.file.display()))
            }
        }
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        match self.action {
            KeysAction::Status(status) => status.run().await,
            KeysAction::Rotate(rotate) => Box::pin(rotate.run()).await,
            KeysAction::Seal(seal) => Box::pin(seal.run()).await,
            KeysAction::Backup(backup) => Box::pin(backup.run()).await,
            KeysAction::Restore(restore) => Box::pin(restore.run()).await,
        }
    }
}

/// A master key, as `keys status` shows it.
#[derive(Debug, Serialize)]
struct KeyStatus {
    key: String,
    state: State,
    /// Where it is, or was last seen.
    source: Option<String>,
    /// RFC 3339; nothing for one that this database has never seen.
    first_seen_at: Option<String>,
    last_seen_at: Option<String>,
    age_days: Option<u64>,
    data_keys: i64,
    tenants: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// Wraps what is new.
    Wraps,
    /// Unwraps what it wrapped.
    Unwraps,
    /// Is not in any source.
    Missing,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            Self::Wraps => "wraps",
            Self::Unwraps => "unwraps",
            Self::Missing => "missing",
        }
    }
}

/// An older key is worth replacing (NIST SP 800-57 part 1 leaves the period to the owner).
const OLD: Duration = Duration::from_secs(90 * 24 * 60 * 60);

impl Status {
    async fn run(self) -> Result<ExitCode, Failure> {
        let config = self.config.read()?.config;
        let clock = Clock::system();
        let base = open(&config, &clock).await?;
        let failed = |error: StoreError| Failure::failed("the keys' status could not be read", error);
        let database = &base.database;
        let wrapped = database.wrapped_by().await.map_err(failed)?;
        let known = database.known_master_keys().await.map_err(failed)?;
        let rotation = database.rotation().await.map_err(failed)?;
        let seals = database.known_tokens().await.map_err(failed)?;
        let keys = statuses(&base, &wrapped, &known, clock.now());
        let mut warnings = warnings(&base, &keys);
        warnings.extend(seals.refused.iter().map(|(token, why)| format!("the token {} is refused: {why}", token.name)));
        if self.json {
            let seals = seals_as_json(&seals);
            println!(
                "{}",
                serde_json::json!({ "keys": keys, "rotation": rotation, "seals": seals, "warnings": warnings })
            );
        } else {
            let dash = || "-".to_owned();
            let rows = keys.iter().map(|key| {
                let age = key.age_days.map_or_else(dash, |days| format!("{days} d"));
                let source = key.source.clone().unwrap_or_else(dash);
                let state = key.state.as_str().to_owned();
                vec![key.key.clone(), state, age, key.tenants.to_string(), key.data_keys.to_string(), source]
            });
            print_table(&["KEY", "STATE", "AGE", "TENANTS", "DATA KEYS", "SOURCE"], &rows.collect::<Vec<_>>());
            println!("{}", seals_as_text(&seals));
            if let Some(rotation) = rotation {
                let began = Timestamp::from_millis(rotation.started_at).to_rfc3339();
                eprintln!(
                    "a rotation that {} began at {began} has not ended; 'secretier keys rotate' goes on with it",
                    rotation.by
                );
            }
            for warning in &warnings {
                eprintln!("warning: {warning}");
            }
        }
        let missing = keys.iter().any(|key| key.state == State::Missing);
        Ok(if missing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

fn seals_as_text(seals: &KnownTokens) -> String {
    match seals.sealed {
        Sealed::Unchecked => "nothing is sealed against change: there is no master key".to_owned(),
        Sealed::Partly => {
            format!("rows without a seal are let in ({} tokens); 'secretier keys seal' seals every row", seals.unsealed)
        }
        Sealed::Since(at) => format!("every row has had a seal since {}; one without is refused", at.to_rfc3339()),
    }
}

fn seals_as_json(seals: &KnownTokens) -> serde_json::Value {
    let (state, since) = match seals.sealed {
        Sealed::Unchecked => ("none", None),
        Sealed::Partly => ("partly", None),
        Sealed::Since(at) => ("all", Some(at.to_rfc3339())),
    };
    serde_json::json!({
        "state": state, "since": since, "tokens_not_sealed": seals.unsealed, "tokens_refused": seals.refused.len(),
    })
}

/// Every key that is held, and every other that still wraps something.
fn statuses(base: &Base, wrapped: &[WrappedBy], known: &[KnownKey], now: Timestamp) -> Vec<KeyStatus> {
    let keys = base.database.keys();
    let ring = keys.ring();
    let wraps: BTreeMap<MasterKeyId, &WrappedBy> = wrapped.iter().map(|by| (by.id, by)).collect();
    let missing = wrapped.iter().map(|by| by.id).filter(|id| ring.find(*id).is_none());
    let status = |id: MasterKeyId| {
        let known = known.iter().find(|known| known.id == id);
        let source = keys.origin(id).map(|source| source.to_string());
        let state = match ring.first().map(|first| first.id()) {
            Some(first) if first == id => State::Wraps,
            _ if ring.find(id).is_some() => State::Unwraps,
            _ => State::Missing,
        };
        KeyStatus {
            key: id.to_string(),
            state,
            source: source.or_else(|| known.map(|known| known.source.clone())),
            first_seen_at: known.map(|known| known.first_seen_at.to_rfc3339()),
            last_seen_at: known.map(|known| known.last_seen_at.to_rfc3339()),
            age_days: known.map(|known| now.since(known.first_seen_at).as_secs() / (24 * 60 * 60)),
            data_keys: wraps.get(&id).map_or(0, |by| by.data_keys),
            tenants: wraps.get(&id).map_or(0, |by| by.tenants),
        }
    };
    ring.ids().chain(missing).map(status).collect()
}

fn warnings(base: &Base, keys: &[KeyStatus]) -> Vec<String> {
    let mut warnings = Vec::new();
    for SourceReport { source, outcome } in &base.loaded.reports {
        if let SourceOutcome::Unreachable(reason) = outcome {
            warnings.push(format!("{source} does not answer: {reason}"));
        }
    }
    warnings.extend(base.backup_faults());
    for key in keys {
        let old = key.age_days.is_some_and(|days| days > OLD.as_secs() / (24 * 60 * 60));
        match key.state {
            State::Missing => warnings.push(format!(
                "{} is in no source, and {} tenants' secrets do not open without it; it was last seen in {}",
                key.key,
                key.tenants,
                key.source.as_deref().unwrap_or("no source that this database has seen"),
            )),
            State::Wraps if old => {
                warnings.push(format!("{} is older than 90 days; 'secretier keys rotate' replaces it", key.key));
            }
            State::Unwraps if key.data_keys > 0 => warnings.push(format!(
                "{} still wraps {} data keys, though another key is first; 'secretier keys rotate' re-wraps them",
                key.key, key.data_keys
            )),
            State::Wraps | State::Unwraps => {}
        }
    }
    warnings
}

impl Rotate {
    async fn run(self) -> Result<ExitCode, Failure> {
        let config = self.config.read()?.config;
        let clock = Clock::system();
        let base = open(&config, &clock).await?;
        base.needs_key()?;
        let rotation = Rotation { data_keys: self.data_keys, by: crate::log::process_name(), patience: self.patience };
        let rotated = rotation.run(&base.database, &clock, &mut |progress| tell(&progress)).await?;
        self.report(&rotated)
    }

    fn report(&self, rotated: &Rotated) -> Result<ExitCode, Failure> {
        let Rotated { key, rewrapped, failed, renewed, resealed, unreadable, tokens, unfollowed } = rotated;
        let waited = Waited { followed: Vec::new(), unfollowed: unfollowed.clone() };
        if self.json {
            let failed: Vec<_> = failed
                .iter()
                .map(|(tenant, reason)| serde_json::json!({ "tenant": tenant.as_str(), "reason": reason.to_string() }))
                .collect();
            println!(
                "{}",
                serde_json::json!({
                    "key": key.to_string(), "rewrapped": rewrapped, "failed": failed,
                    "renewed": renewed, "resealed": resealed, "unreadable": unreadable, "tokens": tokens,
                    "unfollowed": waited.to_json(),
                })
            );
        } else {
            println!("{key} wraps now; {rewrapped} data keys were re-wrapped");
            if self.data_keys {
                println!("{renewed} tenants have new data keys; {resealed} values were sealed anew");
            }
            eprintln!("The keys of before stay where they were: backups of the database made until now need them.");
        }
        for (tenant, reason) in failed {
            eprintln!("a data key of {tenant} stays as it was: {reason}");
        }
        if *unreadable > 0 {
            eprintln!("{unreadable} values do not open and stay as they were, with their data keys");
        }
        waited.verdict(&format!("{key} wraps now"), "the same command, run again, goes on waiting")?;
        Ok(if failed.is_empty() && *unreadable == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn tell(progress: &Progress) {
    match progress {
        Progress::Resumed(state) => {
            let began = Timestamp::from_millis(state.started_at).to_rfc3339();
            eprintln!("going on with the rotation that {} began at {began}", state.by);
        }
        Progress::AlreadyIntroduced(key) => eprintln!("{key} is first in the sources already; no other is introduced"),
        Progress::Introduced(key, place) => eprintln!("the new master key {key} stands in {place}"),
        Progress::BackedUp => eprintln!("the backup was written anew, with it"),
        Progress::Waiting => eprintln!("waiting until the running instances have read it"),
        Progress::WaitingFor(names) => eprintln!("waiting for instances to read it: {}", names.join(", ")),
        Progress::Rewrapped(count) => eprintln!("{count} data keys re-wrapped"),
        Progress::Renewed(count) => eprintln!("{count} tenants have new data keys"),
    }
}

impl Backup {
    async fn run(self) -> Result<ExitCode, Failure> {
        let config = self.config.read()?.config;
        let clock = Clock::system();
        let output = self.output.or_else(|| config.keys.backup_file.clone());
        let output = output.ok_or_else(|| Failure::usage("name the file with --output, or set keys.backup_file"))?;
        let base = open(&config, &clock).await?;
        base.needs_key()?;
        let ring = base.database.keys().ring();
        refuse_to_lose(&output, &ring)?;
        let passphrase = self.passphrase.read(&config, true)?;
        let sealed = backup::seal(&ring, &passphrase, config.environment.as_str(), clock.now());
        let sealed = sealed.map_err(|error| Failure::usage(super::chain("the keys were not backed up", &error)))?;
        private_file::replace(&output, &sealed)
            .map_err(|error| Failure::failed("the keys were not backed up", error))?;
        for id in ring.ids() {
            println!("{id}");
        }
        eprintln!("backed up into {}; keep it offline, and the passphrase elsewhere", output.display());
        Ok(ExitCode::SUCCESS)
    }
}

/// A backup that holds keys which are not at hand may be the last place that has them.
fn refuse_to_lose(output: &Path, ring: &KeyRing) -> Result<(), Failure> {
    let refused = |error: &dyn std::error::Error| Failure::usage(super::chain("the keys were not backed up", error));
    let Some(text) = private_file::read(output).map_err(|error| refused(&error))? else { return Ok(()) };
    let Ok(before) = SealedBackup::parse(&text) else {
        return Err(Failure::usage(format!("{} is there and no backup of keys; name another file", output.display())));
    };
    match before.key_ids().iter().find(|id| ring.find(**id).is_none()) {
        None => Ok(()),
        Some(id) => Err(Failure::usage(format!(
            "{} holds the master key {id}, which no source gives; name another file, or restore it first",
            output.display()
        ))),
    }
}

impl Restore {
    async fn run(self) -> Result<ExitCode, Failure> {
        let config = self.config.read()?.config;
        let to = match &self.to {
            Some(source) => source.parse::<KeySource>().map_err(|error| Failure::usage(error.to_string()))?,
            None => {
                let first = config.keys.sources.iter().find(|source| matches!(source, KeySource::File(_)));
                first.cloned().ok_or_else(|| Failure::usage("keys.sources names no file; name a source with --to"))?
            }
        };
        let unread = |error: &dyn std::error::Error| Failure::usage(super::chain("the backup cannot be read", error));
        let text = private_file::read(&self.file).map_err(|error| unread(&error))?;
        let text = text.ok_or_else(|| Failure::usage(format!("{}: there is no such file", self.file.display())))?;
        let backup = SealedBackup::parse(&text).map_err(|error| unread(&error))?;
        if backup.environment() != config.environment.as_str() {
            return Err(Failure::usage(format!(
                "the backup holds the keys of environment {:?}, and this configuration serves {:?}",
                backup.environment(),
                config.environment.as_str()
            )));
        }
        let ring = backup.open(&self.passphrase.read(&config, false)?).map_err(|error| unread(&error))?;
        let metrics = Metrics::new();
        let upstream = upstream::build(
            config.upstream(),
            config.environment.as_str(),
            &config.keys.withheld(),
            &Clock::system(),
            &metrics,
        );
        let upstream = upstream.map_err(StartError::Upstream)?;
        let sources = Sources::build(config.keys.clone(), config.environment.as_str(), upstream);
        let added =
            sources.add(&to, &ring).await.map_err(|error| Failure::failed("the keys were not restored", error))?;
        for id in &added {
            println!("{id}");
        }
        eprintln!("{} keys were added to {to}, which held the other {}", added.len(), ring.keys().len() - added.len());
        Ok(ExitCode::SUCCESS)
    }
}

impl Passphrase {
    /// Asks twice where it is a new one.
    fn read(&self, config: &Config, new: bool) -> Result<SecretValue, Failure> {
        let setting = match &self.passphrase_file {
            Some(path) => Some(SecretSetting::File(path.clone())),
            None => config.keys.backup_passphrase.clone(),
        };
        if let Some(setting) = setting {
            return setting.resolve().map_err(|error| Failure::usage(super::chain("the passphrase", &error)));
        }
        if !std::io::stdin().is_terminal() {
            return piped();
        }
        let ask = |prompt: &str| {
            let typed = rpassword::prompt_password(prompt).map(SecretValue::new);
            typed.map_err(|error| Failure::failed("the passphrase was not read", error))
        };
        let passphrase = ask("Passphrase: ")?;
        if new && !ask("Again: ")?.same_as(&passphrase) {
            return Err(Failure::usage("the two passphrases differ"));
        }
        Ok(passphrase)
    }
}

/// A passphrase on standard input; a line break at its end is not part of it.
fn piped() -> Result<SecretValue, Failure> {
    let mut text = Zeroizing::new(String::new());
    let read = std::io::stdin().lock().take(MAX_PASSPHRASE).read_to_string(&mut text);
    read.map_err(|error| Failure::failed("the passphrase was not read", error))?;
    let line = text.strip_suffix('\n').map_or(&**text, |line| line.strip_suffix('\r').unwrap_or(line));
    if line.is_empty() {
        return Err(Failure::usage("no passphrase: name a file with --passphrase-file, or give it on standard input"));
    }
    Ok(SecretValue::new(line.to_owned()))
}

/// The most bytes that are read of a passphrase.
const MAX_PASSPHRASE: u64 = 64 << 10;

pub(super) async fn open(config: &Config, clock: &Clock) -> Result<Base, Failure> {
    Ok(Box::pin(Base::open(config, clock)).await?)
}

impl From<RotateError> for Failure {
    fn from(error: RotateError) -> Self {
        let failure = Self::failed("the keys were not rotated to the end", &error);
        match error {
            RotateError::NoKey
            | RotateError::Keys(_)
            | RotateError::Introduce(IntroduceError::ReadOnly(_) | IntroduceError::Key(_)) => {
                Self { code: 2, ..failure }
            }
            RotateError::Busy(_)
            | RotateError::TakenOver
            | RotateError::Unreachable { .. }
            | RotateError::Introduce(IntroduceError::Upstream { .. } | IntroduceError::NotKept(_))
            | RotateError::Lagging { .. }
            | RotateError::Elsewhere { .. }
            | RotateError::Seal(_)
            | RotateError::Store(_) => failure,
        }
    }
}
