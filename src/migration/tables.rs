//! The tables of a PostgreSQL database in which an application keeps its tenants' secrets
//! today, each value sealed with a key of its own.
//!
//! They are queried through tokio-postgres. Our own tables are queried through diesel, which
//! checks each query against a schema that is known when this program is built; the names of
//! these tables are known only when it runs.
//!
//! The application goes on using its database meanwhile, so there is one connection to it,
//! and only transactions that cannot write.

pub mod legacy;
mod statements;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    pin::pin,
    str::FromStr,
    time::Duration,
};

use futures_util::{TryStreamExt as _, future::BoxFuture};
use tokio::{sync::Mutex, time::timeout};
use tokio_postgres::{
    Client, Row,
    types::{ToSql, Type},
};

use self::{
    legacy::{LegacyFormat, LegacyKey},
    statements::{BEGIN, COLUMNS, Column, Names, Statements},
};
use super::origin::{Content, Listed, Origin, OriginError, Problem, ProblemKind};
use crate::{
    clock::{Clock, Timestamp},
    log,
    secret::{LARGEST_VALUE, SecretKey, SecretValue, Version},
    tenant::Tenant,
    tiers::{
        database::{DatabaseUrl, PostgresServer, StoreError},
        upstream::{Snapshot, UpstreamSecret},
    },
};

/// The longest time to connect to a host.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest time to begin: all hosts, the session, and a look at the tables.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest time for a whole call: for beginning, a statement, and a little more. The
/// server ends a statement by itself, unless it has gone away silently.
const CALL_TIMEOUT: Duration = Duration::from_secs(45);

/// Where the tables are and how they are named. A name that is not given is the layout's.
#[derive(Debug, Clone)]
pub struct TablesConfig {
    /// The application's database, postgres://user:password@host/database, to which
    /// ?sslmode=verify-full&sslrootcert=FILE may be added; a role that may only read is enough,
    /// if no row is hidden from it.
    pub url: DatabaseUrl,
    /// The layout of the tables: `company_secrets` (`company_id`, `secret_key`,
    /// `secret_value_encrypted`, and `companies` with `id` and `subdomain`) or `tenant_secrets`
    /// (`tenant_id`, which is the subdomain, `key`, `value_encrypted`).
    pub layout: Layout,
    /// The schema of the tables; "public" if not given.
    pub schema: Option<String>,
    /// The table that holds the secrets, if not the layout's.
    pub table_name: Option<String>,
    /// Its column with the owner of a secret: a tenant's subdomain, or its id in the table of
    /// tenants, where there is one.
    pub tenant_column: Option<String>,
    /// Its column with the secrets' names.
    pub key_column: Option<String>,
    /// Its column with the sealed values.
    pub value_column: Option<String>,
    /// Its column with the time of a secret's last change; if not given, `updated_at`, where there
    /// is one that holds dates. Of several secrets of one name, the last changed one is taken.
    pub updated_column: Option<String>,
    /// The table with tenants' subdomains by their ids; `companies` in the layout
    /// `company_secrets`, none in `tenant_secrets`.
    pub tenants_table: Option<String>,
    /// Its column with the ids; `id` if not given.
    pub tenants_id_column: Option<String>,
    /// Its column with the subdomains; `subdomain` if not given.
    pub tenants_name_column: Option<String>,
    /// The largest accepted value, in bytes: the limit of `server.max_value` for writes.
    pub max_value: u64,
}

impl TablesConfig {
    /// Tables whose names are the layout's.
    #[must_use]
    pub fn new(url: DatabaseUrl, layout: Layout) -> Self {
        Self {
            url,
            layout,
            schema: None,
            table_name: None,
            tenant_column: None,
            key_column: None,
            value_column: None,
            updated_column: None,
            tenants_table: None,
            tenants_id_column: None,
            tenants_name_column: None,
            max_value: LARGEST_VALUE,
        }
    }
}

/// The layout of the tables, unless other names are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `company_secrets`, by the companies' ids, and `companies`.
    CompanySecrets,
    /// `tenant_secrets`, by the tenants' names.
    TenantSecrets,
}

impl Layout {
    const ALL: [Self; 2] = [Self::CompanySecrets, Self::TenantSecrets];
}

impl FromStr for Layout {
    type Err = UnknownLayout;

    fn from_str(word: &str) -> Result<Self, UnknownLayout> {
        Self::ALL.into_iter().find(|layout| layout.to_string() == word).ok_or(UnknownLayout)
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CompanySecrets => "company_secrets",
            Self::TenantSecrets => "tenant_secrets",
        })
    }
}

/// A word that names no layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a layout is one of company_secrets, tenant_secrets")]
pub struct UnknownLayout;

/// Why tables cannot be read as they are configured. Never holds the URL.
#[derive(Debug, thiserror::Error)]
pub enum TablesError {
    /// The URL is refused.
    #[error("the source's url: {0}")]
    Url(String),
    /// A name that is not possible in PostgreSQL.
    #[error("{0}: a name is not empty and has no NUL")]
    Name(&'static str),
    /// A column of a table that is not named.
    #[error("{0} is about a table of tenants; name that with --tenants-table")]
    NoTenantsTable(&'static str),
}

/// The tables. Each tenant's secrets are read in one statement, from one state of the
/// database.
pub struct Tables {
    server: PostgresServer,
    names: Names,
    key: LegacyKey,
    format: LegacyFormat,
    max_value: u64,
    clock: Clock,
    session: Mutex<Option<Session>>,
}

impl Tables {
    /// Does not connect: the first call does, and reports what is missing.
    ///
    /// # Errors
    /// [`TablesError`]: the URL or a name is invalid.
    pub fn new(config: &TablesConfig, key: LegacyKey, format: LegacyFormat, clock: Clock) -> Result<Self, TablesError> {
        let server = config.url.server(CONNECT_TIMEOUT).map_err(|error| match error {
            StoreError::InvalidUrl(reason) => TablesError::Url(reason),
            other => TablesError::Url(log::chain(&other)),
        })?;
        let no_server = || TablesError::Url("write \"postgres://user:password@host/database\"".to_owned());
        Ok(Self {
            server: server.ok_or_else(no_server)?,
            names: Names::of(config)?,
            key,
            format,
            max_value: config.max_value,
            clock,
            session: Mutex::default(),
        })
    }
}

impl Origin for Tables {
    fn tenants(&self) -> BoxFuture<'_, Result<Listed, OriginError>> {
        Box::pin(async move {
            let mut kept = self.session.lock().await;
            timeout(CALL_TIMEOUT, self.list(&mut kept)).await.unwrap_or_else(|_| Err(too_late()))
        })
    }

    /// Sends one statement, however many tenants. Rows are opened as they arrive, so that a sealed
    /// text is in memory no longer than it takes to open it.
    fn read<'a>(&'a self, tenants: &'a [Tenant]) -> BoxFuture<'a, Vec<Result<Content, OriginError>>> {
        Box::pin(async move {
            if tenants.is_empty() {
                return Vec::new();
            }
            let mut kept = self.session.lock().await;
            let gathered = timeout(CALL_TIMEOUT, self.gather(&mut kept, tenants)).await;
            gathered.unwrap_or_else(|_| Err(too_late())).unwrap_or_else(|error| {
                // A part must not be taken for the whole.
                tenants.iter().map(|_| Err(error.clone())).collect()
            })
        })
    }
}

impl fmt::Debug for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").field("names", &self.names).field("format", &self.format).finish_non_exhaustive()
    }
}

/// A connection to tables that were found to be as expected.
struct Session {
    client: Client,
    statements: Statements,
}

impl Tables {
    async fn list(&self, kept: &mut Option<Session>) -> Result<Listed, OriginError> {
        let session = self.begin(kept).await?;
        let mut owners: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut unusable = BTreeSet::new();
        let rows = session.client.query_typed_raw(&session.statements.tenants, NOTHING).await.map_err(refused)?;
        let mut rows = pin!(rows);
        while let Some(row) = rows.try_next().await.map_err(refused)? {
            let [id, name]: [Option<&str>; 2] = [row.try_get(0).map_err(refused)?, row.try_get(1).map_err(refused)?];
            match (id, name) {
                (Some(id), Some(name)) if Tenant::is_subdomain(name) => {
                    owners.entry(name.to_owned()).or_default().insert(id.to_owned());
                }
                (id, name) => {
                    let nobody = || format!("(no {})", self.names.tenant_column);
                    unusable.insert(name.or(id).map_or_else(nobody, str::to_owned));
                }
            }
        }
        session.end(kept).await;
        let mut listed = Listed::default();
        for (name, ids) in owners {
            if ids.len() == 1 {
                listed.tenants.push(Tenant::checked(&name));
            } else {
                // Nobody can tell here which of the ids is the tenant.
                unusable.insert(format!("{name} (the name of {} ids)", ids.len()));
            }
        }
        listed.unusable.extend(unusable);
        Ok(listed)
    }

    async fn gather(
        &self,
        kept: &mut Option<Session>,
        tenants: &[Tenant],
    ) -> Result<Vec<Result<Content, OriginError>>, OriginError> {
        let began = self.clock.database_now();
        let session = self.begin(kept).await?;
        let names: Vec<&str> = tenants.iter().map(Tenant::as_str).collect();
        let mut gathered: HashMap<&str, Gathered> = names.iter().map(|name| (*name, Gathered::default())).collect();
        let parameters: [(&(dyn ToSql + Sync), Type); 1] = [(&names, Type::TEXT_ARRAY)];
        let rows = session.client.query_typed_raw(&session.statements.secrets, parameters).await.map_err(refused)?;
        let mut rows = pin!(rows);
        while let Some(row) = rows.try_next().await.map_err(refused)? {
            let [name, id]: [&str; 2] = [row.try_get(0).map_err(refused)?, row.try_get(1).map_err(refused)?];
            if let Some(gathered) = gathered.get_mut(name) {
                gathered.add(id, self.found(&row), text(&row, 2).unwrap_or_default());
            }
        }
        session.end(kept).await;
        Ok(names.iter().map(|name| gathered[name].content(name, began, &self.names)).collect())
    }

    /// Opens the value of a row.
    fn found(&self, row: &Row) -> Found {
        let opened = match text(row, 3) {
            None => Err("has no value, or one that is no text, in its column".into()),
            Some(sealed) => legacy::open(sealed.trim(), &self.key, self.format)
                .map_err(|error| format!("does not open: {error}").into()),
        };
        let value = opened.and_then(|value| match value.len() as u64 <= self.max_value {
            true => Ok(value),
            false => Err("has a value that is longer than server.max_value".into()),
        });
        Found { value, updated: row.try_get(4).ok().flatten().filter(|seconds: &f64| seconds.is_finite()) }
    }

    /// A session with a transaction begun: the one that was kept, or a new one where that has died
    /// or there is none. It is not kept until its transaction has ended well.
    async fn begin(&self, kept: &mut Option<Session>) -> Result<Session, OriginError> {
        if let Some(session) = kept.take()
            && let Ok(Ok(())) = timeout(BEGIN_TIMEOUT, session.client.batch_execute(BEGIN)).await
        {
            return Ok(session);
        }
        timeout(BEGIN_TIMEOUT, self.open()).await.unwrap_or_else(|_| Err(too_late()))
    }

    async fn open(&self) -> Result<Session, OriginError> {
        let (client, _) = self.server.connect().await.map_err(refused)?;
        client.batch_execute(BEGIN).await.map_err(refused)?;
        let Names { schema, table, tenants, .. } = &self.names;
        let tables: Vec<&str> = std::iter::once(table.as_str()).chain(tenants.as_ref().map(|of| &*of.table)).collect();
        let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(schema, Type::TEXT), (&tables, Type::TEXT_ARRAY)];
        let columns = client.query_typed(COLUMNS, &parameters).await.map_err(refused)?;
        let column =
            |row: &Row| Ok(Column { table: row.try_get(0)?, name: row.try_get(1)?, holds_dates: row.try_get(2)? });
        let columns: Vec<Column> = columns.iter().map(column).collect::<Result<_, _>>().map_err(refused)?;
        let statements = self.names.statements(&columns).map_err(OriginError::Table)?;
        Ok(Session { client, statements })
    }
}

impl Session {
    /// Ends the transaction; the session is kept if that went well.
    async fn end(self, kept: &mut Option<Self>) {
        if self.client.batch_execute("COMMIT").await.is_ok() {
            *kept = Some(self);
        }
    }
}

/// The content of the rows read so far for one tenant.
#[derive(Default)]
struct Gathered {
    owners: BTreeSet<String>,
    secrets: BTreeMap<SecretKey, Vec<Found>>,
    misnamed: BTreeSet<String>,
}

/// The content of one row.
struct Found {
    /// Its value, or why there is none, to be written after the name.
    value: Result<SecretValue, Cow<'static, str>>,
    /// When it was last changed, in seconds since 1970.
    updated: Option<f64>,
}

impl Gathered {
    fn add(&mut self, owner: &str, found: Found, name: &str) {
        if !self.owners.contains(owner) {
            self.owners.insert(owner.to_owned());
        }
        match name.parse() {
            Ok(key) => self.secrets.entry(key).or_default().push(found),
            Err(_) => _ = self.misnamed.insert(name.to_owned()),
        }
    }

    fn content(&self, tenant: &str, began: Timestamp, names: &Names) -> Result<Content, OriginError> {
        if self.owners.len() > 1 {
            let table = names.tenants.as_ref().map_or(&names.table, |of| &of.table);
            return Err(OriginError::Table(format!(
                "{} gives the name {tenant:?} to several ids: {:?}",
                names.qualified(table),
                self.owners
            )));
        }
        let problem = |name: &str, kind| Problem { name: name.to_owned(), kind, detail: None };
        let mut problems: Vec<Problem> = self.misnamed.iter().map(|name| problem(name, ProblemKind::Name)).collect();
        let mut secrets = Vec::with_capacity(self.secrets.len());
        for (key, found) in &self.secrets {
            if found.len() > 1 {
                problems.push(problem(key.as_str(), ProblemKind::Duplicate));
            }
            let Some(newest) = newest(found) else { continue };
            let value = match newest.value.clone() {
                Ok(value) => value,
                Err(reason) => {
                    problems.push(Problem { detail: Some(reason), ..problem(key.as_str(), ProblemKind::Value) });
                    continue;
                }
            };
            let updated_at = newest.updated.map(timestamp);
            secrets.push(UpstreamSecret { key: key.clone(), value, text: None, version: Version::FIRST, updated_at });
        }
        Ok(Content { snapshot: Snapshot { secrets, ..Snapshot::default() }, problems, began })
    }
}

/// The one that was changed last, if that can be told.
fn newest(found: &[Found]) -> Option<&Found> {
    if let [only] = found {
        return Some(only);
    }
    let times: Vec<f64> = found.iter().map(|found| found.updated).collect::<Option<_>>()?;
    let latest = times.into_iter().reduce(f64::max)?;
    let mut latest = found.iter().filter(|found| found.updated == Some(latest));
    latest.next().filter(|_| latest.next().is_none())
}

/// A moment out of range becomes the nearest that fits.
fn timestamp(seconds: f64) -> Timestamp {
    Timestamp::from_millis((seconds * 1000.0).round() as i64)
}

/// A text of a row; `None` where it is not UTF-8, which a database can be made to hold.
fn text(row: &Row, column: usize) -> Option<&str> {
    row.try_get(column).ok().flatten()
}

const NOTHING: [(&(dyn ToSql + Sync), Type); 0] = [];

/// The server's message, without its details: these may quote rows.
#[expect(clippy::needless_pass_by_value, reason = "it is what map_err hands over")]
fn refused(error: tokio_postgres::Error) -> OriginError {
    OriginError::Table(match error.as_db_error() {
        Some(told) => told.message().to_owned(),
        None => log::chain(&error),
    })
}

fn too_late() -> OriginError {
    OriginError::Table("no answer in time".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_is_written_as_it_is_read() {
        for layout in Layout::ALL {
            assert_eq!(layout.to_string().parse(), Ok(layout));
        }
        assert_eq!("secrets".parse::<Layout>(), Err(UnknownLayout));
    }

    #[test]
    fn what_is_shown_has_neither_password_nor_key() {
        let config = TablesConfig::new("postgres://app:hunter2@db/app".into(), Layout::CompanySecrets);
        let key = "0123456789abcdef".repeat(4);
        let parsed = LegacyKey::parse(&key).unwrap();
        let tables = Tables::new(&config, parsed, LegacyFormat::Auto, Clock::system()).unwrap();
        let shown = format!("{config:?} {tables:?}");
        assert!(shown.contains("company_secrets") && !shown.contains("hunter2") && !shown.contains(&key), "{shown}");
    }

    #[test]
    fn a_moment_that_does_not_fit_is_the_last_that_does() {
        assert_eq!(timestamp(1.5), Timestamp::from_millis(1500));
        assert_eq!(timestamp(-0.25), Timestamp::from_millis(-250));
        assert_eq!(timestamp(1e300), Timestamp::from_millis(i64::MAX));
    }
}
