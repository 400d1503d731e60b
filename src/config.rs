//! The whole configuration: built-in defaults, then the TOML file, then `SECRETIER_` variables.
//! Each component owns its part; this file gathers them and reports the faults.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use figment::{
    Figment,
    error::Kind,
    providers::{Env, Format as _, Toml},
    value::Value,
};
use serde::{Deserialize, Serialize};

use crate::{
    access::{self, audit},
    keys, log, outgoing,
    phase::Phase,
    policy::{Ages, Policies, RuleConfig},
    private_file,
    resolver::shadow,
    rotation,
    server::{self, Project},
    setting::SecretSetting,
    tenant::Tenant,
    tiers::{
        database, memory,
        upstream::{self, Settings, directory, infisical},
    },
};

/// All settings.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The one environment that this instance serves: `prod`, `staging`, `dev`, ...
    pub environment: Environment,
    /// The phase of tenants that have none of their own and match no rule. Where it is
    /// left out: `hybrid` with `[infisical]`, `database` without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// The listeners and their limits.
    #[serde(default)]
    pub server: server::Config,
    /// Access: tokens, limits and peers.
    #[serde(default)]
    pub access: access::Config,
    /// The memory tier, which is asked first.
    #[serde(default)]
    pub memory: memory::Config,
    /// The database tier.
    #[serde(default)]
    pub database: database::Config,
    /// Infisical as the upstream tier; off where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub infisical: Option<infisical::Config>,
    /// `[directory]`: secrets in files, for an upstream that is not Infisical.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<directory::Config>,
    /// The sources of the master keys.
    #[serde(default)]
    pub keys: keys::Config,
    /// The audit: its records, and how long they are kept.
    #[serde(default)]
    pub audit: audit::Config,
    /// The comparison of lookups with upstream after a migration.
    #[serde(default)]
    pub migration: shadow::Config,
    /// The log.
    #[serde(default)]
    pub log: log::Config,
    /// Calls to servers beside upstream and the database.
    #[serde(default)]
    pub outgoing: outgoing::Config,
    /// Which secrets are rotated, and how; the first rule that matches counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rotation: Vec<rotation::RuleConfig>,
    /// Exceptions for some tenants and keys; the first rule that matches counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<RuleConfig>,
}

/// How many bytes an instance with these settings can come to, by the formula in docs/SECURITY.md.
#[must_use]
pub fn most_memory(server: &server::Config, memory: &memory::Config, audit: &audit::Config) -> u64 {
    const LARGEST_LIST: u64 = 16 << 20;
    [
        40_000_000,
        memory.capacity.saturating_mul(12) / 10,
        server.max_answers,
        u64::from(server.max_long_answers).saturating_mul(LARGEST_LIST).saturating_mul(14) / 10,
        server.max_bodies.saturating_mul(2),
        (server.max_connections as u64).saturating_mul(40_000),
        server.max_in_flight.saturating_add(server.max_strangers).saturating_mul(16_000),
        server.max_event_streams.saturating_mul(8_000),
        (audit.queue as u64).saturating_mul(4000),
        (audit.max_sums as u64).saturating_mul(500),
    ]
    .into_iter()
    .fold(0, u64::saturating_add)
}

/// An environment's slug, as in Infisical; the database is marked with it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String")]
pub struct Environment(String);

impl Environment {
    /// The slug as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Environment {
    type Error = &'static str;

    fn try_from(slug: String) -> Result<Self, Self::Error> {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
        if (1..=64).contains(&slug.len()) && slug.bytes().all(fits) {
            Ok(Self(slug))
        } else {
            Err("an environment is named by its slug: 1 to 64 lower-case letters, digits, '-' or '_', as in \"prod\"")
        }
    }
}

/// A configuration with the sources of its values.
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// The file that was read, if there was one.
    pub file: Option<PathBuf>,
    figment: Figment,
}

/// Leaves out the raw values, which may be secrets.
impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded").field("config", &self.config).field("file", &self.file).finish_non_exhaustive()
    }
}

/// Where an instance is asked: its listeners, and the names that it answers to.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Reach {
    /// The listeners.
    pub server: server::Endpoints,
    /// The names.
    pub access: access::Names,
}

/// The faults of a configuration, each with its place.
#[derive(Debug)]
pub struct ConfigError(Vec<String>);

impl ConfigError {
    fn one(fault: impl fmt::Display) -> Self {
        Self(vec![fault.to_string()])
    }

    /// The faults, one line of text each.
    #[must_use]
    pub fn faults(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

/// The file that is read where no other is named.
const DEFAULT_FILE: &str = "config/secretier.toml";

impl Loaded {
    /// Reads the configuration from the named file, else from the default file where it exists, and
    /// from variables.
    ///
    /// # Errors
    /// Every fault that was found, with file and key.
    pub fn read(file: Option<&Path>) -> Result<Self, ConfigError> {
        let file = Self::file(file);
        if let Some(path) = file.as_ref().filter(|path| !path.is_file()) {
            return Err(ConfigError::one(format_args!("{}: there is no such file", path.display())));
        }
        let figment = Self::sources(file.as_deref());
        let config: Config = figment.extract().map_err(|errors| explain(errors, file.as_deref()))?;
        let loaded = Self { config, file, figment };
        loaded.config.check().map_err(|faults| {
            let place = loaded.file.as_ref().map_or("the environment".to_owned(), |path| path.display().to_string());
            ConfigError(faults.into_iter().map(|fault| format!("{place}: {fault}")).collect())
        })?;
        Ok(loaded)
    }

    /// Reads where the instance is asked that runs with this configuration, and nothing else: the
    /// rest of the file may have become wrong, and the instance goes on as it was configured.
    ///
    /// # Errors
    /// There is no such file, or one of these settings cannot be read.
    pub fn reach(file: Option<&Path>) -> Result<Reach, ConfigError> {
        let file = Self::file(file);
        if let Some(path) = file.as_ref().filter(|path| !path.is_file()) {
            return Err(ConfigError::one(format_args!("{}: there is no such file", path.display())));
        }
        Self::sources(file.as_deref()).extract().map_err(|errors| explain(errors, file.as_deref()))
    }

    fn sources(file: Option<&Path>) -> Figment {
        let figment = match file {
            Some(path) => Figment::new().merge(Toml::file_exact(path)),
            None => Figment::new(),
        };
        figment.merge(variables())
    }

    /// The file that [`Self::read`] reads: the named file, else the default file where it exists.
    #[must_use]
    pub fn file(named: Option<&Path>) -> Option<PathBuf> {
        let default = || Some(PathBuf::from(DEFAULT_FILE)).filter(|path| path.is_file());
        named.map(Path::to_owned).or_else(default)
    }

    /// Takes a configuration that this program made, rather than one that somebody wrote.
    ///
    /// # Errors
    /// Every fault that was found.
    pub fn from_table(table: toml::Table) -> Result<Self, ConfigError> {
        let figment = Figment::from(figment::providers::Serialized::defaults(table));
        let config: Config = figment.extract().map_err(|errors| explain(errors, None))?;
        config.check().map_err(ConfigError)?;
        Ok(Self { config, file: None, figment })
    }

    /// The effective values as TOML keys, each with its source. Secrets are not shown.
    #[must_use]
    pub fn show(&self) -> BTreeMap<String, (String, String)> {
        let mut shown = BTreeMap::new();
        // Our own settings always serialise.
        if let Ok(value) = Value::serialize(&self.config) {
            leaves(String::new(), &value, &mut |path, value| {
                shown.insert(path.clone(), (in_toml(value), self.origin(&path)));
            });
        }
        if self.config.phase.is_none() {
            let phase = format!("\"{}\"", self.config.phase());
            shown.insert("phase".to_owned(), (phase, "default".to_owned()));
        }
        shown
    }

    /// Settings that are valid, but should be changed.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut holds: BTreeMap<PathBuf, Vec<&str>> = BTreeMap::new();
        let mut stands_in = |path: Option<PathBuf>, name| {
            path.into_iter().for_each(|path| holds.entry(path).or_default().push(name));
        };
        for (name, secret) in self.config.secrets() {
            match secret {
                Some(SecretSetting::File(path)) => stands_in(Some(path.clone()), name),
                Some(SecretSetting::Inline(_)) => stands_in(self.file_of(name), name),
                Some(SecretSetting::Env(_)) | None => {}
            }
        }
        let exposed = holds.into_iter().filter_map(|(path, names)| {
            let mode = private_file::exposed_mode(&path)?;
            let (path, names) = (path.display(), names.join(" and "));
            Some(format!(
                "{path} can be read by others than its owner (mode {mode:04o}), and holds {names}: run `chmod 600 {path}`; \
                 one that is mounted gets its mode there, as in Kubernetes by defaultMode: 0400"
            ))
        });
        exposed.collect()
    }

    /// The file that contains a setting.
    fn file_of(&self, setting: &str) -> Option<PathBuf> {
        self.figment.find_metadata(setting)?.source.as_ref()?.file_path().map(Path::to_owned)
    }

    /// The source of a value.
    fn origin(&self, path: &str) -> String {
        match self.figment.find_metadata(path) {
            Some(metadata) if metadata.name.contains("environment") => {
                format!("SECRETIER_{}", path.replace('.', "__").to_uppercase())
            }
            Some(metadata) => {
                self.file_of(path).map_or_else(|| metadata.name.to_string(), |file| file.display().to_string())
            }
            None => "default".to_owned(),
        }
    }
}

impl Config {
    /// The default phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase.unwrap_or(if self.upstream().is_some() { Phase::Hybrid } else { Phase::Database })
    }

    /// How long an instance answers after it has lost the database.
    #[must_use]
    pub fn max_detached(&self) -> Duration {
        let ages = [self.memory.max_stale, self.database.max_stale];
        let rules = self.rules.iter().filter_map(|rule| rule.max_stale);
        let longest = ages.into_iter().chain(rules).max().unwrap_or_default();
        self.database.max_detached.unwrap_or(longest).max(self.database.least_detached())
    }

    /// The policies: phases and ages, from the parts of the configuration that set them.
    ///
    /// # Errors
    /// A rule's pattern is not a valid glob.
    pub fn policies(&self) -> Result<Policies, crate::policy::InvalidGlob> {
        let ages = Ages {
            ttl: self.memory.ttl,
            negative_ttl: self.memory.negative_ttl,
            refresh_after: self.database.refresh_after,
            memory_max_stale: self.memory.max_stale,
            database_max_stale: self.database.max_stale,
        };
        Policies::build(self.phase(), ages, self.rules.clone())
    }

    /// These settings with those of `wanted` that can be changed while an instance runs.
    /// `docs/CONFIGURATION.md` lists them.
    #[must_use]
    pub fn with_live_settings(&self, wanted: &Self) -> Self {
        let mut config = self.clone();
        config.phase = wanted.phase;
        config.rules.clone_from(&wanted.rules);
        config.rotation.clone_from(&wanted.rotation);
        config.access = wanted.access.clone();
        config.memory.capacity = wanted.memory.capacity;
        config.memory.ttl = wanted.memory.ttl;
        config.memory.negative_ttl = wanted.memory.negative_ttl;
        config.memory.max_stale = wanted.memory.max_stale;
        config.server.max_value = wanted.server.max_value;
        config.server.max_in_flight = wanted.server.max_in_flight;
        config.server.max_in_flight_per_token = wanted.server.max_in_flight_per_token;
        config.server.max_strangers = wanted.server.max_strangers;
        config.server.max_strangers_per_peer = wanted.server.max_strangers_per_peer;
        config.server.max_bodies = wanted.server.max_bodies;
        config.server.max_bodies_per_token = wanted.server.max_bodies_per_token;
        config.server.max_answers = wanted.server.max_answers;
        config.server.max_answers_per_token = wanted.server.max_answers_per_token;
        config.server.max_event_streams = wanted.server.max_event_streams;
        config.server.max_event_streams_per_token = wanted.server.max_event_streams_per_token;
        config.server.max_long_answers = wanted.server.max_long_answers;
        config.server.body_timeout = wanted.server.body_timeout;
        config.server.shutdown_grace = wanted.server.shutdown_grace;
        config.server.watch_config = wanted.server.watch_config;
        config.server.infisical_api = wanted.server.infisical_api.clone();
        config.database.refresh_after = wanted.database.refresh_after;
        config.database.max_stale = wanted.database.max_stale;
        config.keys.reload_every = wanted.keys.reload_every;
        config.audit.retention = wanted.audit.retention;
        config.audit.denials_per_second = wanted.audit.denials_per_second;
        config.audit.strangers_per_day = wanted.audit.strangers_per_day;
        config.audit.if_unavailable = wanted.audit.if_unavailable;
        config.log.level = wanted.log.level;
        config.log.lines_per_minute = wanted.log.lines_per_minute;
        if let (Some(infisical), Some(wanted)) = (&mut config.infisical, &wanted.infisical) {
            infisical.client_id.clone_from(&wanted.client_id);
            infisical.client_secret = wanted.client_secret.clone();
            infisical.proxy.clone_from(&wanted.proxy);
            infisical.requests_per_minute = wanted.requests_per_minute;
            infisical.migration_requests_per_minute = wanted.migration_requests_per_minute;
            infisical.timeout = wanted.timeout;
            infisical.read_timeout = wanted.read_timeout;
        }
        if let (Some(directory), Some(wanted)) = (&mut config.directory, &wanted.directory) {
            directory.timeout = wanted.timeout;
        }
        config
    }

    /// What Infisical's clients name in their requests to this instance.
    pub(crate) fn project(&self) -> Project {
        let infisical = self.infisical.as_ref();
        Project {
            id: infisical.map(|infisical| infisical.project_id.clone()),
            environment: self.environment.as_str().to_owned(),
            tenants_path: infisical.map_or_else(|| "/tenants".to_owned(), |infisical| infisical.tenants_path.clone()),
            folders: infisical.map(|infisical| {
                let placed = infisical.folders.iter().map(|folder| Some((folder.tenant()?, folder.path.clone())));
                placed.flatten().collect()
            }),
        }
    }

    /// A master key that lies in a tenant's folder, where the tenant's readers would be given it.
    fn keys_among_tenants(&self) -> Option<String> {
        let tenants_path = self.infisical.as_ref()?.tenants_path.trim_end_matches('/');
        let is_tenants = |folder: &&str| {
            let below = folder.trim_end_matches('/').strip_prefix(tenants_path).and_then(|rest| rest.strip_prefix('/'));
            below.is_some_and(Tenant::is_subdomain)
        };
        let folder = self.keys.folders().find(is_tenants)?;
        Some(format!(
            "keys.sources: {folder:?} is a tenant's folder, whose secrets are served; keep the master key elsewhere"
        ))
    }

    /// Files of this program's own secrets that lie where tenants' secrets are read.
    fn below_directory(&self) -> Vec<String> {
        let Some(directory) = &self.directory else { return Vec::new() };
        let private_key = self.server.tls.as_ref().map(|tls| ("server.tls.private_key", tls.private_key.as_path()));
        let offline = self.memory.offline_file.as_deref().map(|path| ("memory.offline_file", path));
        let url = self.database.url.as_secret().and_then(|url| match url {
            SecretSetting::File(path) => Some(("database.url", path.as_path())),
            SecretSetting::Inline(_) | SecretSetting::Env(_) => None,
        });
        let files = self.keys.files().into_iter().chain(private_key).chain(offline).chain(url);
        let is_below = |path: &Path| std::path::absolute(path).is_ok_and(|path| path.starts_with(&directory.path));
        let below = files.filter(|(_, path)| is_below(path));
        below
            .map(|(key, _)| format!("directory.path: {key} lies in it, where a token could read it as a secret"))
            .collect()
    }

    /// The upstream that is configured.
    #[must_use]
    pub fn upstream(&self) -> Option<upstream::Config<'_>> {
        let infisical = self.infisical.as_ref().map(upstream::Config::Infisical);
        infisical.or(self.directory.as_ref().map(upstream::Config::Directory))
    }

    /// The names of the settings that differ.
    #[must_use]
    pub fn differences(&self, other: &Self) -> BTreeSet<String> {
        let settings = |config: &Self| {
            let mut settings = BTreeMap::new();
            // Our own settings always serialise.
            if let Ok(value) = Value::serialize(config) {
                leaves(String::new(), &value, &mut |path, value| drop(settings.insert(path, in_toml(value))));
            }
            settings
        };
        let (ours, others) = (settings(self), settings(other));
        let either = ours.keys().chain(others.keys());
        let mut names: BTreeSet<String> = either.filter(|name| ours.get(*name) != others.get(*name)).cloned().collect();
        // Secrets are not written out, so they are compared separately.
        for ((name, ours), (_, others)) in self.secrets().into_iter().zip(other.secrets()) {
            if ours.zip(others).is_some_and(|(ours, others)| !ours.is_same_as(others)) {
                names.insert(name.to_owned());
            }
        }
        if self.database.url != other.database.url {
            names.insert("database.url".to_owned());
        }
        names
    }

    /// The settings that are secrets, by name.
    fn secrets(&self) -> [(&'static str, Option<&SecretSetting>); 7] {
        let infisical = self.infisical.as_ref();
        [
            ("database.url", self.database.url.as_secret()),
            ("infisical.proxy", infisical.and_then(|infisical| infisical.proxy.as_ref())),
            ("infisical.client_secret", infisical.map(|infisical| &infisical.client_secret)),
            ("infisical.webhook_secret", infisical.and_then(|infisical| infisical.webhook_secret.as_ref())),
            ("outgoing.proxy", self.outgoing.proxy.as_ref()),
            ("keys.passphrase", self.keys.passphrase.as_ref()),
            ("keys.backup_passphrase", self.keys.backup_passphrase.as_ref()),
        ]
    }

    /// Finds faults that the type of a value cannot show.
    ///
    /// # Errors
    /// Each fault, with its key and the allowed values.
    pub(crate) fn check(&self) -> Result<(), Vec<String>> {
        let mut faults = Vec::new();
        let needs_upstream = |phase: Option<Phase>| phase.is_some_and(Phase::owned_upstream);
        if self.infisical.is_some() && self.directory.is_some() {
            faults.push("directory: there is an [infisical] section too; leave one of the two out".to_owned());
        }
        let upstream = self.upstream().map(upstream::Config::settings);
        if upstream.is_none() {
            if needs_upstream(self.phase) {
                faults.push(format!(
                    "phase: {} needs an [infisical] or a [directory] section; without one, phase is \"database\"",
                    self.phase()
                ));
            }
            if self.rules.iter().any(|rule| needs_upstream(rule.phase)) {
                faults.push("rules: a rule's phase needs an [infisical] or a [directory] section".to_owned());
            }
        }
        if let Some(infisical) = &self.infisical {
            // Otherwise every tenant's readers could get the key by a reference.
            let holds_keys = |folder: &&String| self.keys.is_kept_in(folder);
            faults.extend(infisical.references.iter().find(holds_keys).map(|folder| {
                format!(
                    "infisical.references: {folder:?} is where keys.sources has a master key; no value may refer to it"
                )
            }));
        }
        faults.extend(self.keys_among_tenants());
        faults.extend(self.below_directory());
        faults.extend(upstream.into_iter().flat_map(Settings::faults));
        faults.extend(self.policies().err().map(|error| error.to_string()));
        faults.extend(rotation::Rules::build(&self.rotation).err().map(|error| error.to_string()));
        faults.extend(rotation::faults(&self.rotation));
        faults.extend(self.outgoing.faults().into_iter().map(|fault| format!("outgoing.{fault}")));
        faults.extend(self.database.check().err().map(|error| error.to_string()));
        faults.extend(self.keys.faults());
        faults.extend(self.audit.faults().into_iter().map(|fault| format!("audit.{fault}")));
        faults.extend(self.migration.fault().map(|fault| format!("migration.{fault}")));
        let positive: [(&str, Duration); 4] = [
            ("server.header_timeout", self.server.header_timeout),
            ("server.body_timeout", self.server.body_timeout),
            ("server.idle_timeout", self.server.idle_timeout),
            ("database.max_stale", self.database.max_stale),
        ];
        for (key, duration) in positive {
            if duration.is_zero() {
                faults.push(format!("{key}: must be longer than nothing, as in \"10s\""));
            }
        }
        faults.extend(self.server.faults().into_iter().map(|fault| format!("server.{fault}")));
        faults.extend(self.access.faults().into_iter().map(|fault| format!("access.{fault}")));
        faults.extend(self.memory.faults().into_iter().map(|fault| format!("memory.{fault}")));
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }
}

/// `SECRETIER_DATABASE__URL` sets `database.url`. Variables without `__` that name no setting have
/// other uses: `SECRETIER_CONFIG`, `SECRETIER_TOKEN`, a master key.
fn variables() -> Env {
    Env::prefixed("SECRETIER_")
        .filter(|name| {
            let name = name.as_str().to_ascii_lowercase();
            name.contains("__") || matches!(name.as_str(), "environment" | "phase")
        })
        .split("__")
}

/// Describes each fault with its file and key; never shows a value that may be a secret.
fn explain(errors: figment::Error, file: Option<&Path>) -> ConfigError {
    let faults = errors.into_iter().map(|error| {
        let path = error.path.join(".");
        let place = match error.metadata.as_ref().and_then(|metadata| metadata.source.as_ref()?.file_path()) {
            Some(file) => file.display().to_string(),
            None => match &error.metadata {
                Some(_) => "the environment".to_owned(),
                None => file.map_or("the configuration".to_owned(), |file| file.display().to_string()),
            },
        };
        let path = if path.is_empty() { String::new() } else { format!("{path}: ") };
        // A value in the wrong place may be a secret that belongs elsewhere.
        let secret = ["infisical", "keys", "url", "rotation", "outgoing"].iter().any(|word| path.contains(word));
        let fault = match error.kind {
            Kind::UnknownField(found, known) => unknown_key(&found, known),
            Kind::MissingField(field) => format!("`{field}` is missing{}", hint(&field)),
            Kind::UnknownVariant(_, known) if secret => format!("write one of {}", list(known)),
            Kind::UnknownVariant(found, known) => {
                format!("`{found}` is none of the values allowed: {}", list(known))
            }
            Kind::InvalidType(_, expected) | Kind::InvalidValue(_, expected) if secret => {
                format!("not a value that is allowed here; write {expected}")
            }
            Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected) => {
                format!("{found} is not allowed here; write {expected}")
            }
            Kind::ISizeOutOfRange(_) | Kind::USizeOutOfRange(_) => "this number is too large or too small".to_owned(),
            kind => without_quotation(&kind.to_string()),
        };
        format!("{place}: {path}{fault}")
    });
    ConfigError(faults.collect())
}

/// A TOML parser's message on one line, without the line of the file that it quotes: that line may
/// contain a secret.
fn without_quotation(text: &str) -> String {
    let is_quotation = |line: &&str| line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ').starts_with('|');
    text.trim().lines().filter(|line| !is_quotation(line)).collect::<Vec<_>>().join(": ")
}

fn unknown_key(found: &str, known: &[&str]) -> String {
    let nearest = known.iter().map(|name| (strsim::damerau_levenshtein(found, name), name)).min();
    match nearest {
        Some((distance, name)) if distance <= 3.max(found.len() / 3) => {
            format!("unknown key `{found}`; did you mean `{name}`? The keys here are {}", list(known))
        }
        _ => format!("unknown key `{found}`; the keys here are {}", list(known)),
    }
}

fn hint(field: &str) -> &'static str {
    match field {
        "environment" => "; say which one this instance serves, as in environment = \"prod\"",
        _ => "",
    }
}

fn list(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Calls `each` for every setting below `path`, by name.
fn leaves(path: String, value: &Value, each: &mut impl FnMut(String, &Value)) {
    if let Value::Dict(_, dict) = value {
        // `{ env = "..." }` is one value.
        let is_leaf = dict.len() == 1 && ["env", "file"].iter().any(|key| dict.contains_key(*key));
        if !is_leaf {
            for (key, value) in dict {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                leaves(path, value, each);
            }
            return;
        }
    }
    each(path, value);
}

fn in_toml(value: &Value) -> String {
    let text = toml::Value::try_from(value).map(|value| value.to_string());
    text.unwrap_or_else(|_| "?".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../config/secretier.toml");

    fn read(toml: &str) -> Result<Config, String> {
        let table = toml::from_str(toml).map_err(|error: toml::de::Error| error.to_string())?;
        Loaded::from_table(table).map(|loaded| loaded.config).map_err(|error| error.to_string())
    }

    /// The shipped file, with a secret that needs no variable.
    fn shipped() -> String {
        SHIPPED.replace("{ env = \"INFISICAL_CLIENT_SECRET\" }", "\"hush\"")
    }

    #[test]
    fn the_shipped_file_shows_every_setting_with_its_default() {
        let shipped = Loaded::from_table(toml::from_str(&shipped()).unwrap()).unwrap();
        let minimal = r#"
            environment = "prod"
            [infisical]
            site_url = "https://app.infisical.com"
            project_id = "00000000-0000-0000-0000-000000000000"
            client_id = "00000000-0000-0000-0000-000000000000"
            client_secret = "hush"
        "#;
        let defaults = Loaded::from_table(toml::from_str(minimal).unwrap()).unwrap();
        let values = |loaded: &Loaded| -> Vec<(String, String)> {
            loaded.show().into_iter().map(|(key, (value, _))| (key, value)).collect()
        };
        assert_eq!(values(&shipped), values(&defaults));
        for setting in [
            "unix_socket",
            "unix_owner",
            "certificate",
            "private_key",
            "client_ca",
            "burst_per_token",
            "burst_per_peer",
            "name",
            "uid",
            "gid",
            "actions",
            "migration_requests_per_minute",
            "offline_file",
            "ca_file",
            "proxy",
            "webhook_secret",
            "watch_config",
        ] {
            assert!(
                SHIPPED.contains(&format!("# {setting} =")),
                "{setting}: what has no default is shown as a comment"
            );
        }
        for setting in ["tenants", "keys", "phase", "ttl", "negative_ttl", "refresh_after", "max_stale"] {
            let rules = &SHIPPED[SHIPPED.find("# Exceptions").unwrap()..];
            assert!(rules.contains(setting), "{setting} of [[rules]]");
        }
    }

    #[test]
    fn a_fault_names_its_key_and_what_is_allowed() {
        let infisical = "[infisical]\nsite_url = \"http://127.0.0.1\"\nproject_id = \"p\"\nclient_id = \"c\"\n";
        for (toml, told) in [
            ("phase = \"hybrid\"".to_owned(), ["environment", "is missing"]),
            ("environment = \"Prod\"".to_owned(), ["environment", "lower-case"]),
            ("environment = \"prod\"\n[servr]".to_owned(), ["servr", "did you mean `server`"]),
            ("environment = \"prod\"\n[memory]\nttll = \"1s\"".to_owned(), ["ttll", "did you mean `ttl`"]),
            ("environment = \"prod\"\n[memory]\nttl = \"soon\"".to_owned(), ["memory.ttl", "\"15m\""]),
            ("environment = \"prod\"\n[memory]\ncapacity = \"1KiB\"".to_owned(), ["memory.capacity", "64KiB"]),
            ("environment = \"prod\"\n[memory]\noffline_every = \"1ms\"".to_owned(), ["memory.offline_every", "1s"]),
            ("environment = \"prod\"\n[memory]\noffline_file = \"/\"".to_owned(), ["memory.offline_file", "file"]),
            (
                "environment = \"prod\"\n[server]\nlisten = \"0.0.0.0:7227\"".to_owned(),
                ["server.listen", "[server.tls]"],
            ),
            ("environment = \"prod\"\n[server]\nmax_header = \"1KiB\"".to_owned(), ["server.max_header", "8KiB"]),
            ("environment = \"prod\"\n[server]\nunix_mode = \"rw\"".to_owned(), ["server.unix_mode", "\"0660\""]),
            ("environment = \"prod\"\n[access]\nhosts = [\"a:1\"]".to_owned(), ["access.hosts", "without port"]),
            ("environment = \"prod\"\nphase = \"both\"".to_owned(), ["phase", "`hybrid`"]),
            ("environment = \"prod\"\nphase = \"hybrid\"".to_owned(), ["phase", "[infisical]"]),
            ("environment = \"prod\"\n[keys]\nsources = [\"vault:x\"]".to_owned(), ["keys.sources", "file:PATH"]),
            ("environment = \"prod\"\n[[rules]]\ntenants = \"[\"".to_owned(), ["rules[0].tenants", "pattern"]),
            ("environment = \"prod\"\n[database]\nurl = \"mysql://x\"".to_owned(), ["url", "postgres://"]),
            (
                "environment = \"prod\"\n[migration]\nshadow_sample = 1.5".to_owned(),
                ["migration.shadow_sample", "from 0 to 1"],
            ),
            (format!("environment = \"prod\"\n{infisical}"), ["client_secret", "is missing"]),
            (
                format!(
                    "environment = \"prod\"\n{infisical}client_secret = \"s\"\nmigration_requests_per_minute = 101"
                ),
                ["infisical.migration_requests_per_minute", "must not be above"],
            ),
            (
                format!("environment = \"prod\"\n{infisical}client_secret = {{ env = \"NO_SUCH_VARIABLE\" }}"),
                ["infisical.client_secret", "NO_SUCH_VARIABLE"],
            ),
        ] {
            let message = read(&toml).expect_err(&toml);
            assert!(told.iter().all(|word| message.contains(word)), "{toml}\ngave {message}");
        }
    }

    #[test]
    fn without_tls_only_this_machine_can_connect_however_the_address_is_written() {
        let listening = |address: &str| read(&format!("environment = \"prod\"\n[server]\nlisten = \"{address}\""));
        for others in
            ["0.0.0.0:1", "192.0.2.1:1", "[::]:1", "[fe80::1]:1", "[::ffff:0.0.0.0]:1", "[::ffff:192.0.2.1]:1"]
        {
            let message = listening(others).expect_err(others);
            assert!(message.contains("server.listen"), "{others}: {message}");
        }
        for ours in ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            listening(ours).unwrap();
        }
    }

    #[test]
    fn no_fault_and_no_overview_shows_a_secret() {
        let secret = "s3cr3t-1234567890";
        let loaded = Loaded::from_table(toml::from_str(&shipped().replace("hush", secret)).unwrap()).unwrap();
        assert!(!format!("{:?}{loaded:?}", loaded.show()).contains(secret));
        let url = format!("environment = \"prod\"\n[database]\nurl = \"postgres://u:{secret}@h/db?sslmode=x\"");
        let number = "environment = \"prod\"\n[infisical]\nclient_secret = 1234567890";
        let key = "environment = \"prod\"\n[keys]\nsources = \"abcdef1234567890\"";
        for wrong in [url.as_str(), number, key] {
            let message = read(wrong).expect_err(wrong);
            assert!(!message.contains("1234567890"), "{message}");
        }
        let shown = format!("environment = \"prod\"\n[database]\nurl = \"postgres://u:{secret}@h/db\"");
        let shown = Loaded::from_table(toml::from_str(&shown).unwrap()).unwrap();
        assert!(!format!("{:?}{shown:?}", shown.show()).contains(secret));
    }

    #[test]
    fn what_differs_is_named_secrets_among_it_and_never_shown() {
        let with = |more: &str| {
            let minimal = "environment = \"prod\"\n[infisical]\nsite_url = \"http://127.0.0.1\"\nproject_id = \"p\"\n";
            read(&format!("{minimal}client_id = \"c\"\n{more}")).unwrap()
        };
        let before = with("client_secret = \"one\"\n[database]\nurl = \"postgres://u:one@h/db\"");
        assert!(before.differences(&before).is_empty());
        let after = with(
            "client_secret = \"two\"\n[database]\nurl = \"postgres://u:two@h/db\"\npool_size = 3\n\
             [memory]\nttl = \"1s\"\n[server]\nmax_value = \"2MiB\"\nidle_timeout = \"1m\"\n[[rules]]\nttl = \"1s\"",
        );
        let names = |names: BTreeSet<String>| names.into_iter().collect::<Vec<_>>().join(" ");
        let live = before.with_live_settings(&after);
        assert_eq!(
            names(before.differences(&live)),
            "infisical.client_secret memory.ttl rules server.max_value",
            "what can be changed"
        );
        assert_eq!(
            names(live.differences(&after)),
            "database.pool_size database.url server.idle_timeout",
            "what waits for a restart"
        );
    }

    #[test]
    fn without_infisical_the_database_owns_everything() {
        assert_eq!(read("environment = \"dev\"").unwrap().phase(), Phase::Database);
        assert_eq!(read(&shipped()).unwrap().phase(), Phase::Hybrid);
    }
}
