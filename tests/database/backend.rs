//! The two databases behind one face, and what the tests need to fill them.

use std::{sync::Arc, time::Duration};

use diesel::{Connection as _, RunQueryDsl as _, SqliteConnection, connection::SimpleConnection as _};
use secretier::{
    clock::Clock,
    keys::MasterKeys,
    metrics::Metrics,
    phase::Phase,
    sealing::{KeyRing, MasterKey},
    secret::{SecretKey, SecretValue, Version, Writer},
    tenant::Tenant,
    tiers::{
        database::{Config, Database, Expected, Held, Refusal, StoreError, Stored, Told},
        upstream::{Snapshot, UpstreamSecret},
    },
};
use tempfile::TempDir;

use crate::{
    postgres::{self, Postgres},
    within::within_a_tests_time,
};

/// A new, empty database.
pub(crate) struct Backend {
    pub(crate) config: Config,
    pub(crate) clock: Clock,
    pub(crate) ring: Arc<KeyRing>,
    pub(crate) metrics: Arc<Metrics>,
    place: Place,
}

enum Place {
    Sqlite(TempDir),
    Postgres(String),
}

/// Runs a test on each database.
#[track_caller]
pub(crate) fn on_both(test: impl AsyncFn(Backend)) -> impl Future<Output = ()> {
    let both = async move {
        test(Backend::sqlite()).await;
        test(Backend::postgres(Postgres::shared()).await).await;
    };
    within_a_tests_time("the test ends on both databases", both)
}

impl Backend {
    pub(crate) fn sqlite() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let url = format!("sqlite:{}", folder.path().join("test.db").display());
        Self::new(&url, Place::Sqlite(folder))
    }

    pub(crate) async fn postgres(server: &Postgres) -> Self {
        let url = server.database().await;
        Self::new(&url, Place::Postgres(url.clone()))
    }

    fn new(url: &str, place: Place) -> Self {
        // Nothing here is about speed: a slow machine must not make a test fail.
        let config = Config { url: url.into(), timeout: Duration::from_secs(30), ..Config::default() };
        Self { config, clock: Clock::system(), ring: new_ring(), metrics: Metrics::new(), place }
    }

    pub(crate) async fn open(&self) -> Database {
        self.try_open("test").await.expect("the database opens")
    }

    pub(crate) async fn try_open(&self, environment: &str) -> Result<Database, StoreError> {
        let (clock, metrics) = (self.clock.clone(), Arc::clone(&self.metrics));
        let keys = Arc::new(MasterKeys::fixed((*self.ring).clone()));
        Database::open(&self.config, environment, keys, clock, metrics).await
    }

    /// Runs SQL behind the program's back.
    pub(crate) async fn sql(&self, sql: &str) {
        match &self.place {
            Place::Sqlite(_) => self.sqlite_connection().batch_execute(sql).expect(sql),
            Place::Postgres(url) => {
                postgres::execute(url, &format!("SET search_path TO {}; {sql}", self.config.schema)).await;
            }
        }
    }

    /// Gives a PostgreSQL database defaults, for sessions that begin from now on.
    pub(crate) async fn set_defaults(&self, defaults: &[(&str, &str)]) {
        let (_, database) = self.url().rsplit_once('/').expect("a database's URL");
        let database = database.split('?').next().unwrap_or_default();
        let set = |(name, setting): &(&str, &str)| format!("ALTER DATABASE {database} SET {name} TO '{setting}'; ");
        postgres::execute(self.url(), &defaults.iter().map(set).collect::<String>()).await;
    }

    /// A number, behind the program's back. Tables are written `{}companies`.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        match &self.place {
            Place::Sqlite(_) => {
                let sql = format!("SELECT ({}) AS number", sql.replace("{}", ""));
                diesel::sql_query(&sql).get_result::<Number>(&mut self.sqlite_connection()).expect(&sql).number
            }
            Place::Postgres(url) => {
                let sql = sql.replace("{}", &format!("{}.", self.config.schema));
                postgres::number(url, &sql).await
            }
        }
    }

    /// The URL of a PostgreSQL database.
    pub(crate) fn url(&self) -> &str {
        match &self.place {
            Place::Postgres(url) => url,
            Place::Sqlite(_) => panic!("a file has no URL"),
        }
    }

    pub(crate) fn file(&self) -> Option<std::path::PathBuf> {
        match &self.place {
            Place::Sqlite(folder) => Some(folder.path().join("test.db")),
            Place::Postgres(_) => None,
        }
    }

    pub(crate) fn sqlite_connection(&self) -> SqliteConnection {
        let path = self.file().expect("SQLite");
        let mut connection = SqliteConnection::establish(path.to_str().expect("UTF-8")).expect("a connection");
        connection.batch_execute("PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = ON").expect("settings");
        connection
    }
}

#[derive(diesel::QueryableByName)]
struct Number {
    #[diesel(sql_type = diesel::sql_types::BigInt)]
    number: i64,
}

pub(crate) fn new_ring() -> Arc<KeyRing> {
    Arc::new(KeyRing::new(vec![MasterKey::generate().expect("randomness")]))
}

pub(crate) fn tenant(name: &str) -> Tenant {
    name.parse().expect("a tenant")
}

pub(crate) fn key(name: &str) -> SecretKey {
    name.parse().expect("a key")
}

pub(crate) fn value(text: &str) -> SecretValue {
    SecretValue::new(text.to_owned())
}

pub(crate) fn writer() -> Writer {
    Writer::new("test")
}

pub(crate) fn snapshot(secrets: &[(&str, &str)]) -> Snapshot {
    let secret = |&(name, text): &(&str, &str)| UpstreamSecret {
        key: key(name),
        value: value(text),
        text: None,
        version: Version::FIRST,
        updated_at: None,
    };
    let secrets = secrets.iter().map(secret).collect();
    Snapshot { secrets, etag: Some("W/\"1\"".to_owned()), ..Snapshot::default() }
}

/// What a database has for a key, which must be a value.
pub(crate) async fn stored(database: &Database, of: &str, name: &str) -> Stored {
    match held(database, of, name).await {
        Held::Present(stored) => stored,
        other => panic!("{of}/{name}: {other:?}"),
    }
}

pub(crate) async fn held(database: &Database, of: &str, name: &str) -> Held {
    database.find(&tenant(of), &key(name)).await.expect("an answer").copy
}

/// A tenant's own phase.
pub(crate) async fn phase(database: &Database, of: &str) -> Option<Phase> {
    database.company(&tenant(of)).await.expect("an answer").and_then(|company| company.phase)
}

/// Every tenant's own phase, by name.
pub(crate) async fn own_phases(database: &Database) -> Vec<(Tenant, Phase)> {
    let mut phases = Vec::new();
    database.own_phases(&mut |name, phase| phases.push((tenant(name), phase))).await.expect("an answer");
    phases
}

/// What must hold for a tenant to change hands as it is now.
pub(crate) async fn look(database: &Database, of: &str) -> Expected {
    Expected::of(database.company(&tenant(of)).await.expect("an answer").as_ref())
}

/// Hands a tenant over as it is now, or tells why not.
pub(crate) async fn try_hand_over(database: &Database, of: &str, to: Option<Phase>) -> Result<i64, Refusal> {
    let expected = look(database, of).await;
    database.hand_over(&tenant(of), expected, to).await.expect("an answer")
}

pub(crate) async fn hand_over(database: &Database, of: &str, to: Option<Phase>) {
    try_hand_over(database, of, to).await.expect("nothing speaks against it");
}

/// Has a write upstream begin and end.
pub(crate) async fn tell(database: &Database, of: &str, told: Told<'_>) {
    let (_, write) = database.begin_upstream_write(&tenant(of), Duration::from_secs(2)).await.expect("an answer");
    assert!(database.end_upstream_write(&write, told).await.expect("an answer"), "it was in time");
}
