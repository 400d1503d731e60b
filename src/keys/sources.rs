//! The sources of master keys: read when an instance starts and while it runs, and given a new key
//! when the master key is rotated.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    clock::Timestamp,
    private_file::{self, FileError, Hold},
    sealing::{
        KeyRing, MasterKey, MasterKeyId, WeakKey,
        backup::{self, Backup, BackupError},
        passphrase::{Derivation, PassphraseError},
    },
    secret::{SecretKey, SecretValue},
    setting::{SecretSetting, SettingError},
    tiers::upstream::{Lane, Unstorable, Upstream, UpstreamError},
    units,
    withheld::Withheld,
};

/// `[keys]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The sources of the master keys, in order: the first key of the first source that answers
    /// wraps, all unwrap.
    pub sources: Vec<KeySource>,
    /// How often a running instance checks whether the keys in the sources have changed.
    #[serde(with = "units::duration")]
    pub reload_every: Duration,
    /// The passphrase that the key of the source `passphrase` is derived from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passphrase: Option<SecretSetting>,
    /// A sealed backup of the keys, opened where a source does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup_file: Option<PathBuf>,
    /// The passphrase that opens it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup_passphrase: Option<SecretSetting>,
    /// Whether rows without a seal are refused even where the database does not say that all have
    /// one (`keys seal`): an attacker with write access could remove that statement.
    pub require_seals: bool,
}

impl Default for Config {
    fn default() -> Self {
        let file = KeySource::File("master.key".into());
        let sources = vec![file, KeySource::Env("SECRETIER_MASTER_KEY".to_owned())];
        let reload_every = Duration::from_secs(60);
        Self {
            sources,
            reload_every,
            passphrase: None,
            backup_file: None,
            backup_passphrase: None,
            require_seals: false,
        }
    }
}

impl Config {
    /// Whether this folder of upstream is a source of master keys.
    #[must_use]
    pub fn is_kept_in(&self, folder: &str) -> bool {
        let trimmed = |folder: &str| folder.trim_matches('/').to_owned();
        self.sources.iter().any(|source| match source {
            KeySource::Infisical { folder: kept, .. } => trimmed(kept) == trimmed(folder),
            _ => false,
        })
    }

    /// The folders of upstream that hold master keys.
    pub fn folders(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().filter_map(|source| match source {
            KeySource::Infisical { folder, .. } => Some(folder.as_str()),
            KeySource::File(_) | KeySource::Env(_) | KeySource::Passphrase => None,
        })
    }

    /// The names of master keys, none of which is ever served as a secret.
    #[must_use]
    pub fn withheld(&self) -> Withheld {
        let mut withheld = Withheld::default();
        for source in &self.sources {
            match source {
                KeySource::Infisical { folder, name } => {
                    for name in [name.clone(), previous_name(name)] {
                        withheld.place(folder, &name);
                    }
                }
                // Variables are often made from a folder, under the same names.
                KeySource::Env(name) => withheld.name(name),
                KeySource::File(_) | KeySource::Passphrase => {}
            }
        }
        withheld
    }

    /// The files that hold keys or passphrases, with the setting that names each.
    #[must_use]
    pub fn files(&self) -> Vec<(&'static str, &Path)> {
        let sources = self.sources.iter().filter_map(|source| match source {
            KeySource::File(path) => Some(("keys.sources", path.as_path())),
            KeySource::Infisical { .. } | KeySource::Env(_) | KeySource::Passphrase => None,
        });
        let passphrases = [("keys.passphrase", &self.passphrase), ("keys.backup_passphrase", &self.backup_passphrase)];
        let passphrases = passphrases.into_iter().filter_map(|(key, setting)| match setting {
            Some(SecretSetting::File(path)) => Some((key, path.as_path())),
            Some(SecretSetting::Inline(_) | SecretSetting::Env(_)) | None => None,
        });
        let backup = self.backup_file.as_deref().map(|path| ("keys.backup_file", path));
        sources.chain(passphrases).chain(backup).collect()
    }

    /// Finds faults that the type of a value cannot show.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.sources.is_empty() {
            faults.push("keys.sources: name at least one source, as in [\"file:master.key\"]".to_owned());
        }
        if self.reload_every.is_zero() {
            faults.push("keys.reload_every: must be longer than nothing, as in \"5m\"".to_owned());
        }
        match (self.sources.contains(&KeySource::Passphrase), &self.passphrase) {
            (true, None) => faults.push(
                "keys.passphrase: the source \"passphrase\" needs it, as in { file = \"/run/secrets/passphrase\" }"
                    .to_owned(),
            ),
            (false, Some(_)) => {
                faults.push(
                    "keys.passphrase: it is used by the source \"passphrase\", which keys.sources does not name"
                        .to_owned(),
                );
            }
            _ => {}
        }
        match (&self.backup_file, &self.backup_passphrase) {
            (Some(_), None) => faults.push(
                "keys.backup_passphrase: keys.backup_file cannot be opened without it; write { file = \"PATH\" }"
                    .to_owned(),
            ),
            (None, Some(_)) => {
                faults.push("keys.backup_file: keys.backup_passphrase opens no file without it".to_owned())
            }
            _ => {}
        }
        for (key, setting) in [("passphrase", &self.passphrase), ("backup_passphrase", &self.backup_passphrase)] {
            let fault = setting.as_ref().and_then(|setting| setting.resolve().err());
            faults.extend(fault.map(|fault| format!("keys.{key}: {fault}")));
        }
        faults
    }
}

/// A place that may have master keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum KeySource {
    /// A secret in Infisical, outside the tenants' folders. Beside it, `NAME_PREVIOUS` may have the
    /// earlier keys, one a line.
    Infisical {
        /// Its folder, `/` for the root.
        folder: String,
        /// Its name.
        name: String,
    },
    /// A file with one key a line, readable by its owner alone.
    File(PathBuf),
    /// An environment variable.
    Env(String),
    /// The key that belongs to `keys.passphrase`.
    Passphrase,
}

impl FromStr for KeySource {
    type Err = UnknownSource;

    fn from_str(text: &str) -> Result<Self, UnknownSource> {
        if text == "passphrase" {
            return Ok(Self::Passphrase);
        }
        let unknown = || UnknownSource(text.split_once(':').map_or("", |(kind, _)| kind).to_owned());
        let (kind, rest) = text.split_once(':').ok_or_else(unknown)?;
        match (kind, rest) {
            (_, "") => Err(unknown()),
            ("file", path) => Ok(Self::File(path.into())),
            ("env", name) if !name.contains(['=', '\0']) => Ok(Self::Env(name.to_owned())),
            ("infisical", path) => {
                let (folder, name) = path.rsplit_once('/').ok_or_else(unknown)?;
                if name.is_empty() || !path.starts_with('/') {
                    return Err(unknown());
                }
                let folder = if folder.is_empty() { "/" } else { folder };
                Ok(Self::Infisical { folder: folder.to_owned(), name: name.to_owned() })
            }
            _ => Err(unknown()),
        }
    }
}

impl TryFrom<String> for KeySource {
    type Error = UnknownSource;

    fn try_from(text: String) -> Result<Self, UnknownSource> {
        text.parse()
    }
}

impl From<KeySource> for String {
    fn from(source: KeySource) -> Self {
        source.to_string()
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Infisical { folder, name } => write!(f, "infisical:{}/{name}", folder.trim_end_matches('/')),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Env(name) => write!(f, "env:{name}"),
            Self::Passphrase => f.write_str("passphrase"),
        }
    }
}

/// A text that names no source. Only its kind is kept: somebody may have put a key there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} with what follows it names no source of master keys: write \"infisical:/FOLDER/NAME\", \"file:PATH\", \
     \"env:NAME\" or \"passphrase\""
)]
pub struct UnknownSource(String);

/// The result of one source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceReport {
    /// The source.
    pub source: KeySource,
    /// Its keys, or why it gave none.
    pub outcome: SourceOutcome,
}

/// Whether a source answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceOutcome {
    /// It has these keys.
    Gave(Vec<MasterKeyId>),
    /// It has no keys, for this reason.
    Empty(String),
    /// It did not answer, for this reason.
    Unreachable(String),
}

/// A source with an invalid content, which must not pass for a source without a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Its content is not a key.
    #[error("the master key in {origin} is refused: {reason}")]
    Weak {
        /// The place of the key.
        origin: KeySource,
        /// The fault.
        reason: WeakKey,
    },
    /// Its file cannot be used.
    #[error("a file of keys is refused")]
    File(#[from] FileError),
    /// A passphrase cannot be read from its place.
    #[error("keys.{setting} cannot be read")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Why.
        source: SettingError,
    },
    /// A passphrase is refused.
    #[error("keys.passphrase is refused")]
    Passphrase(#[from] PassphraseError),
    /// It gives another key than the one that is in use.
    #[error(
        "keys.passphrase is not the one that this database is sealed under: {tenants} tenants need the key {key}; \
         correct it, or put the passphrase of before back"
    )]
    OtherPassphrase {
        /// The key that the earlier passphrase gave.
        key: MasterKeyId,
        /// The number of tenants whose data keys it wraps.
        tenants: i64,
    },
    /// The backup does not open.
    #[error("the backup of the master keys {path} does not open", path = .path.display())]
    Backup {
        /// The file.
        path: PathBuf,
        /// Why.
        source: BackupError,
    },
    /// The backup belongs to another environment.
    #[error("the backup {path} holds the keys of environment {environment:?}; name the one of this environment", path = .path.display())]
    OtherBackup {
        /// The file.
        path: PathBuf,
        /// The environment that it belongs to.
        environment: String,
    },
}

/// Why a source did not get another key.
#[derive(Debug, thiserror::Error)]
pub enum IntroduceError {
    /// This program cannot write there.
    #[error(
        "{0} cannot be written by this program: put the new key in front of the old one yourself (keep the old one in \
         a source after it), start the instances anew, and run this again to re-wrap"
    )]
    ReadOnly(KeySource),
    /// Its present content is invalid.
    #[error("what the source holds now is refused")]
    Key(#[from] KeyError),
    /// Infisical does not accept it.
    #[error("the new key could not be written to {source_name}")]
    Upstream {
        /// The source.
        source_name: KeySource,
        /// Why.
        source: UpstreamError,
    },
    /// It accepted the key, but returns another.
    #[error("{0} took the new key and does not give it back; see what it holds, and run this again")]
    NotKept(KeySource),
}

/// The content of all sources.
#[derive(Debug)]
pub struct Gathered {
    /// Every key with its source, in the order of the sources.
    pub keys: Vec<(MasterKey, KeySource)>,
    /// The result of each source.
    pub reports: Vec<SourceReport>,
}

impl Gathered {
    /// Whether this source answered.
    pub(super) fn answered(&self, source: &KeySource) -> bool {
        self.reports.iter().any(|report| {
            let answered = !matches!(report.outcome, SourceOutcome::Unreachable(_));
            answered && (report.source == *source || report.source.previous().as_ref() == Some(source))
        })
    }
}

/// The configured sources, and the access to them.
pub struct Sources {
    config: Config,
    environment: String,
    upstream: Option<Arc<dyn Upstream>>,
    derivation: OnceLock<Derivation>,
    // A derivation keeps a core busy for a while, so it is not repeated for the same passphrase.
    derived: Mutex<Option<(SecretValue, MasterKey)>>,
}

impl Sources {
    /// The sources of a configuration.
    #[must_use]
    pub fn build(config: Config, environment: &str, upstream: Option<Arc<dyn Upstream>>) -> Self {
        let environment = environment.to_owned();
        Self { config, environment, upstream, derivation: OnceLock::new(), derived: Mutex::default() }
    }

    /// Whether a key is derived from a passphrase, so that [`Self::derive_by`] must be called.
    #[must_use]
    pub fn needs_derivation(&self) -> bool {
        self.config.sources.contains(&KeySource::Passphrase)
    }

    /// Sets the parameters of the derivation, once.
    pub fn derive_by(&self, derivation: Derivation) {
        let _ = self.derivation.set(derivation);
    }

    /// The parameters of the derivation, where they were set.
    #[must_use]
    pub fn derivation(&self) -> Option<&Derivation> {
        self.derivation.get()
    }

    /// The path of the backup, if one is configured.
    #[must_use]
    pub fn backup_file(&self) -> Option<&Path> {
        self.config.backup_file.as_deref()
    }

    /// The ids of the keys in the backup, which need no passphrase; `None` where there is no
    /// backup.
    ///
    /// # Errors
    /// [`KeyError`] where the file exists but is no backup of this environment.
    pub fn backed_up(&self) -> Result<Option<Vec<MasterKeyId>>, KeyError> {
        Ok(self.read_backup()?.map(|(_, backup)| backup.key_ids().to_vec()))
    }

    /// Opens the backup; `None` where there is none.
    ///
    /// # Errors
    /// [`KeyError`], also for a wrong passphrase.
    pub async fn open_backup(&self) -> Result<Option<KeyRing>, KeyError> {
        match self.read_backup()? {
            Some((path, backup)) => self.open_read(path, backup).await.map(Some),
            None => Ok(None),
        }
    }

    async fn open_read(&self, path: PathBuf, backup: Backup) -> Result<KeyRing, KeyError> {
        let passphrase = resolve("backup_passphrase", self.config.backup_passphrase.as_ref())?;
        let opened = blocking(move || backup.open(&passphrase)).await;
        opened.map_err(|source| KeyError::Backup { path, source })
    }

    /// Writes the backup anew where it lacks one of these keys; the keys that it has stay in it.
    /// `true` if it was written.
    ///
    /// # Errors
    /// [`KeyError`]; the file is unchanged.
    pub async fn complete_backup(&self, ring: &KeyRing, now: Timestamp) -> Result<bool, KeyError> {
        let Some(path) = self.config.backup_file.clone() else { return Ok(false) };
        let held = match self.read_backup()? {
            Some((_, backup)) if ring.ids().all(|id| backup.key_ids().contains(&id)) => return Ok(false),
            Some((path, backup)) => self.open_read(path, backup).await?,
            None => KeyRing::default(),
        };
        let ring = KeyRing::new(ring.keys().iter().chain(held.keys()).cloned().collect());
        let passphrase = resolve("backup_passphrase", self.config.backup_passphrase.as_ref())?;
        let environment = self.environment.clone();
        let sealed = blocking(move || backup::seal(&ring, &passphrase, &environment, now)).await;
        let sealed = sealed.map_err(|source| KeyError::Backup { path: path.clone(), source })?;
        private_file::replace(&path, &sealed)?;
        Ok(true)
    }

    fn read_backup(&self) -> Result<Option<(PathBuf, Backup)>, KeyError> {
        let Some(path) = self.config.backup_file.clone() else { return Ok(None) };
        let Some(text) = private_file::read(&path)? else { return Ok(None) };
        match Backup::parse(&text) {
            Ok(backup) if backup.environment() == self.environment => Ok(Some((path, backup))),
            Ok(backup) => Err(KeyError::OtherBackup { path, environment: backup.environment().to_owned() }),
            Err(source) => Err(KeyError::Backup { path, source }),
        }
    }

    /// Whether this program can write to this source.
    #[must_use]
    pub fn is_writable(&self, source: &KeySource) -> bool {
        match source {
            KeySource::File(_) => true,
            KeySource::Infisical { .. } => self.upstream.is_some(),
            KeySource::Env(_) | KeySource::Passphrase => false,
        }
    }

    /// Asks every source, in order. A source that does not answer is left out and reported.
    ///
    /// # Errors
    /// [`KeyError`] where a source has an invalid key; it names the source but never the key.
    pub async fn gather(&self, lane: Lane) -> Result<Gathered, KeyError> {
        let mut gathered = Gathered { keys: Vec::new(), reports: Vec::new() };
        for source in &self.config.sources {
            let outcome = match self.ask(source, lane).await? {
                Answer::Keys(keys) => {
                    let ids = keys.iter().map(|(key, _)| key.id()).collect();
                    gathered.keys.extend(keys);
                    SourceOutcome::Gave(ids)
                }
                Answer::Empty(reason) => SourceOutcome::Empty(reason.to_owned()),
                Answer::Unreachable(reason) => SourceOutcome::Unreachable(reason),
            };
            gathered.reports.push(SourceReport { source: source.clone(), outcome });
        }
        Ok(gathered)
    }

    /// Puts a new key in front of the keys of a source, which stay after it, and checks that it is
    /// kept.
    ///
    /// # Errors
    /// [`IntroduceError`]; if Infisical fails in the middle, the new key may be there.
    pub async fn introduce(&self, source: &KeySource, key: &MasterKey) -> Result<(), IntroduceError> {
        let turn = turn(source)?;
        let held = self.ring_of(source).await?;
        let keys = std::iter::once(key.clone()).chain(held.keys().iter().cloned());
        self.store(source, &KeyRing::new(keys.collect()), turn.as_ref()).await?;
        match self.ring_of(source).await?.first() {
            Some(first) if first.id() == key.id() => Ok(()),
            _ => Err(IntroduceError::NotKept(source.clone())),
        }
    }

    /// Puts the keys that a source lacks after those that it has; returns the keys that it lacked.
    ///
    /// # Errors
    /// As [`Self::introduce`].
    pub async fn add(&self, source: &KeySource, ring: &KeyRing) -> Result<Vec<MasterKeyId>, IntroduceError> {
        let turn = turn(source)?;
        let held = self.ring_of(source).await?;
        let lacking: Vec<MasterKeyId> = ring.ids().filter(|id| held.find(*id).is_none()).collect();
        if lacking.is_empty() {
            return Ok(lacking);
        }
        let all = KeyRing::new(held.keys().iter().chain(ring.keys()).cloned().collect());
        self.store(source, &all, turn.as_ref()).await?;
        let kept = self.ring_of(source).await?;
        if lacking.iter().all(|id| kept.find(*id).is_some()) {
            Ok(lacking)
        } else {
            Err(IntroduceError::NotKept(source.clone()))
        }
    }

    async fn ring_of(&self, source: &KeySource) -> Result<KeyRing, IntroduceError> {
        match self.ask(source, Lane::Interactive).await? {
            Answer::Keys(keys) => Ok(KeyRing::new(keys.into_iter().map(|(key, _)| key).collect())),
            Answer::Empty(_) => Ok(KeyRing::default()),
            Answer::Unreachable(reason) => Err(IntroduceError::Upstream {
                source_name: source.clone(),
                source: UpstreamError::unreachable(reason),
            }),
        }
    }

    async fn store(&self, source: &KeySource, ring: &KeyRing, turn: Option<&Hold>) -> Result<(), IntroduceError> {
        match source {
            KeySource::File(path) => {
                let Some(turn) = turn else { return Err(IntroduceError::ReadOnly(source.clone())) };
                let before = private_file::read(path).map_err(KeyError::File)?;
                let comments = before.as_ref().map_or("", |text| text.as_str()).lines();
                let comments = comments.filter(|line| line.trim_start().starts_with('#'));
                let mut text =
                    Zeroizing::new(String::with_capacity(comments.clone().count() * 256 + ring.keys().len() * 65));
                for line in comments {
                    text.push_str(line);
                    text.push('\n');
                }
                text.push_str(&lines(ring.keys()));
                Ok(turn.replace(path, &text).map_err(KeyError::File)?)
            }
            KeySource::Infisical { folder, name } => {
                let refused =
                    |source: UpstreamError| IntroduceError::Upstream { source_name: self_named(folder, name), source };
                let upstream = self.upstream.as_deref().ok_or_else(|| refused(no_upstream()))?;
                let Some((first, rest)) = ring.keys().split_first() else { return Ok(()) };
                // The earlier keys first: at no moment is one of them missing everywhere.
                let before = (!rest.is_empty())
                    .then(|| (previous_name(name), SecretValue::new(lines(rest).trim_end().to_owned())));
                let wanted = before.into_iter().chain([(name.clone(), first.to_hex())]).map(|(name, value)| {
                    let key = name.parse::<SecretKey>();
                    let key = key.map_err(|_| Unstorable::Name("no secret can have this name"))?;
                    upstream.check(&key, Some(&value)).map(|()| (key, value))
                });
                // All are checked before any is written: a half-done write would leave keys in the
                // wrong place.
                let wanted: Result<Vec<_>, Unstorable> = wanted.collect();
                for (key, value) in wanted.map_err(|error| refused(error.into()))? {
                    upstream.write(folder, &key, &value).await.map_err(refused)?;
                }
                Ok(())
            }
            KeySource::Env(_) | KeySource::Passphrase => Err(IntroduceError::ReadOnly(source.clone())),
        }
    }

    async fn ask(&self, source: &KeySource, lane: Lane) -> Result<Answer, KeyError> {
        let weak = |origin: &KeySource| {
            let origin = origin.clone();
            move |reason| KeyError::Weak { origin, reason }
        };
        let here = |keys: Vec<MasterKey>| keys.into_iter().map(|key| (key, source.clone())).collect();
        match source {
            KeySource::File(path) => match private_file::read(path)? {
                Some(text) => keys_by_line(&text).map(here).map(Answer::Keys).map_err(weak(source)),
                None => Ok(Answer::Empty("there is no such file")),
            },
            KeySource::Env(name) => match std::env::var(name).map(Zeroizing::new) {
                Ok(text) => MasterKey::parse(&text).map(|key| Answer::Keys(here(vec![key]))).map_err(weak(source)),
                Err(std::env::VarError::NotPresent) => Ok(Answer::Empty("the variable is not set")),
                Err(std::env::VarError::NotUnicode(_)) => Err(weak(source)(WeakKey::Malformed)),
            },
            KeySource::Passphrase => match self.derivation.get() {
                Some(derivation) => self.derived_key(derivation).await.map(|key| Answer::Keys(here(vec![key]))),
                None => Ok(Answer::Unreachable("the database has not told how the key is derived".to_owned())),
            },
            KeySource::Infisical { folder, name } => {
                let Some(upstream) = &self.upstream else {
                    return Ok(Answer::Empty("[infisical] is not configured"));
                };
                let previous = previous_name(name);
                let read = match upstream.read(folder, &[name, &previous], lane).await {
                    Ok(read) => read,
                    Err(error) => return Ok(Answer::Unreachable(error.to_string())),
                };
                let mut keys = Vec::new();
                if let Some(Some(value)) = read.first() {
                    keys.push((MasterKey::parse(value.expose()).map_err(weak(source))?, source.clone()));
                }
                if let (Some(Some(value)), Some(before)) = (read.get(1), source.previous()) {
                    let found = keys_by_line(value.expose()).map_err(weak(&before))?;
                    keys.extend(found.into_iter().map(|key| (key, before.clone())));
                }
                Ok(if keys.is_empty() { Answer::Empty("there is no such secret") } else { Answer::Keys(keys) })
            }
        }
    }
}

impl Sources {
    async fn derived_key(&self, derivation: &Derivation) -> Result<MasterKey, KeyError> {
        let passphrase = resolve("passphrase", self.config.passphrase.as_ref())?;
        let derived = self.derived.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, key)) = derived.filter(|(of, _)| of.same_as(&passphrase)) {
            return Ok(key);
        }
        let (of, derivation) = (passphrase.clone(), derivation.clone());
        let key = MasterKey::from_derived(blocking(move || derivation.derive(&passphrase)).await?);
        *self.derived.lock().unwrap_or_else(PoisonError::into_inner) = Some((of, key.clone()));
        Ok(key)
    }
}

/// Runs work that keeps a core busy for longer than others can wait.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn resolve(setting: &'static str, from: Option<&SecretSetting>) -> Result<SecretValue, KeyError> {
    let missing = || SettingError::Empty(format!("keys.{setting}"));
    let resolved = from.ok_or_else(missing).and_then(SecretSetting::resolve);
    resolved.map_err(|source| KeyError::Setting { setting, source })
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").field("config", &self.config).finish_non_exhaustive()
    }
}

impl KeySource {
    /// The place of the keys that this source had before.
    fn previous(&self) -> Option<Self> {
        match self {
            Self::Infisical { folder, name } => Some(self_named(folder, &previous_name(name))),
            Self::File(_) | Self::Env(_) | Self::Passphrase => None,
        }
    }
}

enum Answer {
    Keys(Vec<(MasterKey, KeySource)>),
    Empty(&'static str),
    Unreachable(String),
}

/// The right to change a file of keys, for as long as adding one takes.
fn turn(source: &KeySource) -> Result<Option<Hold>, IntroduceError> {
    match source {
        KeySource::File(path) => Ok(Some(private_file::hold(path).map_err(KeyError::File)?)),
        KeySource::Infisical { .. } | KeySource::Env(_) | KeySource::Passphrase => Ok(None),
    }
}

fn self_named(folder: &str, name: &str) -> KeySource {
    KeySource::Infisical { folder: folder.to_owned(), name: name.to_owned() }
}

fn previous_name(name: &str) -> String {
    format!("{name}_PREVIOUS")
}

fn no_upstream() -> UpstreamError {
    UpstreamError::unreachable("[infisical] is not configured".to_owned())
}

/// Parses one key a line; ignores blank lines and comments.
fn keys_by_line(text: &str) -> Result<Vec<MasterKey>, WeakKey> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys = lines.map(MasterKey::parse).collect::<Result<Vec<_>, _>>()?;
    if keys.is_empty() { Err(WeakKey::Empty) } else { Ok(keys) }
}

fn lines(keys: &[MasterKey]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(keys.len() * 65));
    for key in keys {
        text.push_str(key.to_hex().expose());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests;
