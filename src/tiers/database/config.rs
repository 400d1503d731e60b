//! `[database]`.

use std::{fmt, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize, Serializer};

use super::{error::StoreError, postgres::PostgresServer, tls::Tls};
use crate::{log, secret::SecretValue, setting::SecretSetting};

/// The database's settings.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `sqlite:PATH`, or `postgres://user:password@host/database`, to which
    /// `?sslmode=verify-full&sslrootcert=FILE` may be added; in place, in a file or in a variable.
    pub url: DatabaseUrl,
    /// The PostgreSQL schema that holds the tables; it is made where it is missing.
    pub schema: String,
    /// Connections kept at most.
    pub pool_size: usize,
    /// How often to ask for the changes of other instances, where PostgreSQL has not notified us.
    #[serde(with = "crate::units::duration")]
    pub poll_interval: Duration,
    /// How long a caller waits for one operation at most, a free connection included.
    #[serde(with = "crate::units::duration")]
    pub timeout: Duration,
    /// The age from which a copy of upstream is refreshed in the background.
    #[serde(with = "crate::units::duration")]
    pub refresh_after: Duration,
    /// The age past which a copy of upstream is never served.
    #[serde(with = "crate::units::duration")]
    pub max_stale: Duration,
    /// How long an instance that cannot reach the database answers from what it knew; by default
    /// the longer `max_stale` of memory and database.
    #[serde(with = "crate::units::optional_duration", skip_serializing_if = "Option::is_none")]
    pub max_detached: Option<Duration>,
    /// Versions of a secret that are kept, the newest included.
    pub versions_kept: u32,
    /// How long a version is kept once there is a newer one.
    #[serde(with = "crate::units::duration")]
    pub versions_kept_for: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: "sqlite:secretier.db".into(),
            schema: "secretier".to_owned(),
            pool_size: 10,
            poll_interval: Duration::from_millis(400),
            timeout: Duration::from_secs(1),
            refresh_after: Duration::from_secs(15 * 60),
            max_stale: Duration::from_secs(24 * 60 * 60),
            max_detached: None,
            versions_kept: 10,
            versions_kept_for: Duration::from_secs(90 * 24 * 60 * 60),
        }
    }
}

impl Config {
    /// Checks the settings without connecting.
    ///
    /// # Errors
    /// [`StoreError::InvalidUrl`], [`StoreError::InvalidConfig`], naming the setting.
    pub fn check(&self) -> Result<(), StoreError> {
        self.target().map(drop)
    }

    /// The smallest allowed `max_detached`: a poll for changes may be late, or be lost.
    pub(crate) fn least_detached(&self) -> Duration {
        (self.poll_interval * 4).max(Duration::from_secs(2))
    }

    /// The location of the configured database.
    ///
    /// # Errors
    /// [`StoreError::InvalidUrl`], [`StoreError::InvalidConfig`], naming the setting.
    pub(super) fn target(&self) -> Result<Target, StoreError> {
        let mut letters = self.schema.bytes();
        let starts_well = letters.next().is_some_and(|first| first.is_ascii_lowercase() || first == b'_');
        let goes_on = letters.all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == b'_');
        if !starts_well || !goes_on || self.schema.len() > 63 {
            return Err(StoreError::InvalidConfig(
                "schema: begin with a lower-case letter or '_', go on with those or digits, at most 63 in all",
            ));
        }
        if self.pool_size == 0 {
            return Err(StoreError::InvalidConfig("pool_size: at least 1 connection is needed"));
        }
        if self.timeout.is_zero() {
            return Err(StoreError::InvalidConfig("timeout: must be longer than nothing"));
        }
        if !(Duration::from_millis(10)..=Duration::from_secs(60)).contains(&self.poll_interval) {
            return Err(StoreError::InvalidConfig("poll_interval: from \"10ms\" to \"1m\" can be set"));
        }
        if self.max_detached.is_some_and(|bound| bound < self.least_detached()) {
            return Err(StoreError::InvalidConfig(
                "max_detached: at least \"2s\", and no shorter than four poll_interval: an instance that reaches the database \
                 is not to pass for one that has lost it",
            ));
        }
        if self.versions_kept == 0 {
            return Err(StoreError::InvalidConfig("versions_kept: the newest version counts, so at least 1"));
        }
        self.url.target()
    }
}

/// A database's URL, in place, in a file or in a variable. Its printed form leaves the password out.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct DatabaseUrl(SecretSetting);

/// The database that a URL names.
pub(super) enum Target {
    Sqlite(PathBuf),
    Postgres(Box<tokio_postgres::Config>, Tls),
}

impl DatabaseUrl {
    /// The database that the URL leads to.
    pub(super) fn target(&self) -> Result<Target, StoreError> {
        target_of(self.text()?.expose())
    }

    /// The PostgreSQL server that the URL leads to; `None` if it leads to a file. Each of its hosts
    /// may take `connect_timeout` to answer.
    pub(crate) fn server(&self, connect_timeout: Duration) -> Result<Option<PostgresServer>, StoreError> {
        match self.target()? {
            Target::Sqlite(_) => Ok(None),
            Target::Postgres(target, tls) => self.server_at(*target, &tls, connect_timeout).map(Some),
        }
    }

    /// The server of [`Self::target`]. If the URL stands in a file, a refused login has user and
    /// password read again from there.
    pub(super) fn server_at(
        &self,
        target: tokio_postgres::Config,
        tls: &Tls,
        connect_timeout: Duration,
    ) -> Result<PostgresServer, StoreError> {
        let server = PostgresServer::new(target, tls, connect_timeout)?;
        let SecretSetting::File(_) = &self.0 else { return Ok(server) };
        let again = self.clone();
        Ok(server.with_login_from(move || match again.target()? {
            Target::Postgres(target, _) => Ok(*target),
            Target::Sqlite(_) => Err(StoreError::InvalidUrl("it leads to a file now".to_owned())),
        }))
    }

    /// Whether it leads to this machine without a network, pooler or not.
    pub(super) fn is_on_this_machine(&self) -> bool {
        use tokio_postgres::config::Host;
        match self.target() {
            Ok(Target::Sqlite(_)) => true,
            Ok(Target::Postgres(target, _)) => target.get_hosts().iter().all(|host| match host {
                Host::Tcp(name) => crate::tls::is_this_machine(name),
                #[cfg(unix)]
                Host::Unix(_) => true,
            }),
            Err(_) => false,
        }
    }

    /// The place of the URL, if it stands in a file or contains a password.
    pub(crate) fn as_secret(&self) -> Option<&SecretSetting> {
        match &self.0 {
            SecretSetting::Inline(text) => has_password(text.expose()).then_some(&self.0),
            SecretSetting::File(_) | SecretSetting::Env(_) => Some(&self.0),
        }
    }

    fn text(&self) -> Result<SecretValue, StoreError> {
        self.0.resolve().map_err(|error| StoreError::InvalidUrl(log::chain(&error)))
    }
}

fn target_of(url: &str) -> Result<Target, StoreError> {
    let invalid = |reason: &str| StoreError::InvalidUrl(reason.to_owned());
    if url.contains(['\n', '\r']) {
        return Err(invalid("it is one line, and there is a line break in it"));
    }
    if let Some(path) = url.strip_prefix("sqlite:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        return match path {
            "" => Err(invalid("write the path of the file, as in \"sqlite:secretier.db\"")),
            ":memory:" => Err(invalid(
                "a database in memory is gone with each connection, and with it the copies that an outage needs; \
                 write the path of a file",
            )),
            path if path.starts_with("file:") || path.contains('?') => {
                Err(invalid("SQLite's own URIs and options are not taken; write the path of a file"))
            }
            path => Ok(Target::Sqlite(path.into())),
        };
    }
    if is_postgres(url) {
        let (config, tls) = parse_postgres(url)?;
        return Ok(Target::Postgres(Box::new(config), tls));
    }
    Err(invalid("write \"sqlite:PATH\" or \"postgres://user:password@host/database\""))
}

fn has_password(url: &str) -> bool {
    // A URL that cannot be parsed may contain one.
    is_postgres(url) && parse_postgres(url).map_or(true, |(config, _)| config.get_password().is_some())
}

fn is_postgres(url: &str) -> bool {
    url.starts_with("postgres://") || url.starts_with("postgresql://")
}

impl PartialEq for DatabaseUrl {
    fn eq(&self, other: &Self) -> bool {
        self.0.is_same_as(&other.0)
    }
}

impl Eq for DatabaseUrl {}

impl From<&str> for DatabaseUrl {
    fn from(url: &str) -> Self {
        Self(SecretSetting::Inline(SecretValue::new(url.to_owned())))
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SecretSetting::Inline(url) = &self.0 else { return self.0.fmt(f) };
        let url = url.expose();
        if url.starts_with("sqlite:") {
            return f.write_str(url);
        }
        // Only parsed parts are shown, after the last `@`: in a URL that could not be parsed, and
        // before the last `@`, anything may be a piece of the password.
        let has_at = url.split_once('?').is_some_and(|(_, options)| options.contains('@'));
        match parse_postgres(url) {
            Ok(_) if has_at => f.write_str("postgres://(not shown)"),
            Ok((config, _)) if is_postgres(url) => {
                f.write_str("postgres://")?;
                for (index, host) in config.get_hosts().iter().enumerate() {
                    let comma = if index > 0 { "," } else { "" };
                    match host {
                        tokio_postgres::config::Host::Tcp(name) => write!(f, "{comma}{name}")?,
                        #[cfg(unix)]
                        tokio_postgres::config::Host::Unix(path) => write!(f, "{comma}{}", path.display())?,
                    }
                }
                write!(f, "/{}", config.get_dbname().unwrap_or_default())
            }
            _ => f.write_str("(not a database url)"),
        }
    }
}

impl Serialize for DatabaseUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            SecretSetting::Inline(_) => serializer.collect_str(self),
            place @ (SecretSetting::File(_) | SecretSetting::Env(_)) => place.serialize(serializer),
        }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_string(), f)
    }
}

fn parse_postgres(url: &str) -> Result<(tokio_postgres::Config, Tls), StoreError> {
    let (place, query) = url.split_once('?').unwrap_or((url, ""));
    // The parser takes the first `@` for the end of the password, and the rest for the host.
    if place.matches('@').count() > 1 {
        return Err(StoreError::InvalidUrl(
            "it has more than one '@': write those of the user, the password or the database as %40".to_owned(),
        ));
    }
    let (mut mode, mut root) = (None, None);
    let mut kept = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=').unwrap_or((pair, "")) {
            ("sslmode", value) => mode = Some(value),
            ("sslrootcert", value) => root = Some(value),
            ("sslcert" | "sslkey", _) => {
                return Err(StoreError::InvalidUrl("client certificates are not taken; use a password".to_owned()));
            }
            _ => kept.push(pair),
        }
    }
    let root = root.map(|root| percent_encoding::percent_decode_str(root).decode_utf8_lossy().into_owned());
    let tls = Tls::new(mode, root)?;
    refuse_unknown(query, &kept)?;
    // The parser knows three of libpq's six modes; its error message may quote the URL.
    let mut config: tokio_postgres::Config = format!("{place}?{}", kept.join("&")).parse().map_err(|_| {
        StoreError::InvalidUrl(
            "it is not of the form \"postgres://user:password@host:port/database?option=value\", \
             with special characters percent-encoded"
                .to_owned(),
        )
    })?;
    if config.get_hosts().is_empty() {
        return Err(StoreError::InvalidUrl("it names no host".to_owned()));
    }
    config.ssl_mode(tls.wire_mode());
    if config.get_application_name().is_none() {
        config.application_name("secretier");
    }
    Ok((config, tls))
}

/// The options that are taken besides those of TLS, as tokio-postgres has them.
const OPTIONS: [&str; 18] = [
    "user",
    "password",
    "dbname",
    "options",
    "application_name",
    "sslnegotiation",
    "host",
    "hostaddr",
    "port",
    "connect_timeout",
    "tcp_user_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "target_session_attrs",
    "channel_binding",
    "load_balance_hosts",
];

/// Refuses an option that is not known, by its name. The name is left out where it may be a piece of
/// a password that has a `?` or a `&` in it.
fn refuse_unknown(query: &str, pairs: &[&str]) -> Result<(), StoreError> {
    let names = pairs.iter().map(|pair| pair.split_once('=').map_or((*pair, false), |(name, _)| (name, true)));
    let Some((name, has_value)) = names.into_iter().find(|(name, _)| !OPTIONS.contains(name)) else { return Ok(()) };
    let is_word = (1..=32).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let may_be_password = query.contains('@') || pairs.iter().any(|pair| pair.starts_with("password="));
    let named = if is_word && has_value && !may_be_password { format!(" {name:?}") } else { String::new() };
    let nearest = OPTIONS.iter().map(|known| (strsim::damerau_levenshtein(name, known), known)).min();
    let meant = match nearest.filter(|(distance, _)| !named.is_empty() && *distance <= 3) {
        Some((_, known)) => format!("; did you mean {known:?}?"),
        None => ",".to_owned(),
    };
    Err(StoreError::InvalidUrl(format!(
        "it has an unknown option{named}{meant} the options are sslmode, sslrootcert, {}",
        OPTIONS.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(url: &str) -> String {
        match DatabaseUrl::from(url).target() {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{url} was taken"),
        }
    }

    #[test]
    fn a_url_never_shows_its_password() {
        for url in [
            "postgres://app:hunter2@db.example:5433/app?sslmode=verify-full",
            "postgresql://app@db/app?password=hunter2",
            "postgres://app:hun?ter2@db/app",
            "postgres://app:hunter2@db/app?unheard=of",
            "postgres://db/app?user=app&password=swordfish&hunter=2&ter=2",
            "postgres://app:swordfish?hunter=2&ter=2@db/app",
            "postgres://app:swordfish@db/app?hunter",
            "mysql://app:hunter2@db/app",
            "hunter2",
        ] {
            let config = Config { url: url.into(), ..Config::default() };
            let shown = format!("{config:?} {}", config.url);
            let said = config.target().err().map(|error| format!("{error} {error:?}")).unwrap_or_default();
            for piece in ["hunter", "ter2", "swordfish"] {
                assert!(!shown.contains(piece) && !said.contains(piece), "{shown} {said}");
            }
        }
        let url = DatabaseUrl::from("postgres://app:hunter2@db.example:5433/app");
        assert_eq!(url.to_string(), "postgres://db.example/app");
        assert!(refusal("postgres://app:hun@ter2@db.example/app").contains("%40"));
    }

    proptest::proptest! {
        /// A password may have any special character that nobody encoded.
        #[test]
        fn no_piece_of_a_password_is_ever_shown(
            marks in "[@:/?#%&=, \\[\\]]{0,4}",
            more in "[@:/?#%&=,;.+~ ]{0,3}(sslmode=|user=|password=|host=|5432)?",
            place in proptest::sample::select(vec!["db.example/app", "db.example:5433/app?sslmode=require", "[::1]/app", "a,b/app"]),
        ) {
            for password in [format!("hunter2{marks}swordfish{more}"), format!("{marks}hunter2{more}swordfish")] {
                let url = DatabaseUrl::from(format!("postgres://app:{password}@{place}").as_str());
                let said = url.target().err().map(|error| format!("{error} {error:?}")).unwrap_or_default();
                let shown = format!("{url} {url:?} {} {said}", serde_json::to_string(&url).unwrap());
                proptest::prop_assert!(!shown.contains("hunter2") && !shown.contains("swordfish"), "{}: {}", password, shown);
            }
        }
    }

    #[test]
    fn a_url_that_is_not_taken_says_what_to_write() {
        assert!(refusal("sqlite::memory:").contains("path of a file"));
        assert!(refusal("sqlite:").contains("sqlite:secretier.db"));
        assert!(refusal("mysql://x").contains("postgres://"));
        assert!(refusal("postgres://db/app?sslmode=maybe").contains("verify-full"));
        let unknown = refusal("postgres://db/app?sslmode=require&conect_timeout=3");
        assert!(unknown.contains("\"conect_timeout\"; did you mean \"connect_timeout\"?"), "{unknown}");
        let unknown = refusal("postgres://db/app?schema=other");
        assert!(unknown.contains("unknown option \"schema\", the options are sslmode, sslrootcert, user"), "{unknown}");
        assert!(
            matches!(DatabaseUrl::from("sqlite:///a/b.db").target(), Ok(Target::Sqlite(path)) if path.is_absolute())
        );
    }

    #[test]
    fn a_url_in_a_file_is_shown_as_its_place_and_read_from_there() {
        use std::io::Write as _;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "postgres://app:hunter2@db/app").unwrap();
        let config: Config = toml::from_str(&format!("url = {{ file = {:?} }}", file.path())).unwrap();
        let Ok(Target::Postgres(target, _)) = config.target() else { panic!("a PostgreSQL") };
        assert_eq!(target.get_password(), Some(&b"hunter2"[..]));
        let shown = format!("{config:?} {} {}", config.url, serde_json::to_string(&config).unwrap());
        assert!(!shown.contains("hunter2") && shown.contains(file.path().to_str().unwrap()), "{shown}");

        let missing: Config = toml::from_str("url = { file = \"/nowhere/at/all\" }").unwrap();
        let told = missing.check().unwrap_err().to_string();
        assert!(told.contains("url: the file /nowhere/at/all cannot be read: No such file"), "{told}");
        writeln!(file, "hunter2").unwrap();
        let told = config.check().unwrap_err().to_string();
        assert!(told.contains("it is one line") && !told.contains("hunter2"), "{told}");
        let unset: Config = toml::from_str("url = { env = \"SECRETIER_NOT_SET\" }").unwrap();
        assert!(unset.check().unwrap_err().to_string().contains("SECRETIER_NOT_SET is not set"));
    }

    #[test]
    fn the_newest_version_is_always_kept() {
        let kept = |versions_kept| Config { versions_kept, ..Config::default() };
        assert!(matches!(kept(0).check(), Err(StoreError::InvalidConfig(told)) if told.contains("versions_kept")));
        assert!(kept(1).check().is_ok());
    }

    #[test]
    fn a_schema_is_a_plain_name() {
        for schema in ["", "Secretier", "a-b", "a\"; DROP", "1a", &"a".repeat(64)] {
            let config = Config { schema: schema.to_owned(), ..Config::default() };
            assert!(matches!(config.target(), Err(StoreError::InvalidConfig(_))), "{schema}");
        }
        assert!(Config::default().target().is_ok());
    }
}
