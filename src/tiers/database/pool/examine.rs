//! Examines the database for `secretier doctor`. It changes nothing: tables that are to be brought
//! up to date stay as they are.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use diesel::pg::Pg;
use tokio_postgres::{Client, SimpleQueryMessage, error::SqlState};

use super::{
    super::{
        config::Config,
        error::{Cause, StoreError},
        sessions::{Session, SessionError},
        tables::{Standing, known},
    },
    POSTGRES_MIGRATIONS, Pool, SQLITE_MIGRATIONS,
    postgresql::{PostgresConnection, PostgresManager, look_postgres},
    sqlite::{connect_sqlite, look_sqlite, quick_check, shared_file_system},
};
use crate::{
    clock::{Clock, Timestamp},
    diagnosis::Area,
};

/// How far PostgreSQL's clock may be from this machine's.
const CLOCKS_APART: Duration = Duration::from_secs(5);

/// How long a connection may take, with the check for a pooler.
const CONNECTED: Duration = Duration::from_secs(6);

/// The room on a disk that is warned of.
const LITTLE_ROOM: u64 = 1 << 30;

/// The largest file that is checked page by page: that takes a second or so.
const CHECKED: u64 = 256 << 20;

/// The oldest PostgreSQL that its makers still look after.
const OLDEST_POSTGRES: u32 = 14;

/// The state of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// They can be used as they are.
    Ready,
    /// They are missing or of an older version: the next start makes them.
    ToBeMade,
    /// The database cannot be used.
    Unusable,
}

/// Examines the configured database.
pub async fn examine(config: &Config, clock: &Clock, area: &Area) -> Readiness {
    area.begins("settings");
    let pool = match Pool::build(config) {
        Ok(pool) => pool,
        Err(error) => {
            area.failure("settings", crate::log::chain(&error), "correct [database] in the configuration");
            return Readiness::Unusable;
        }
    };
    match &pool {
        Pool::Sqlite { connections, .. } => examine_sqlite(connections.manager().path.clone(), config, area).await,
        Pool::Postgres(connections) => examine_postgres(connections.manager(), config, clock, area).await,
    }
}

/// Says what state the tables are in.
fn stand(standing: Result<Standing, StoreError>, area: &Area) -> Readiness {
    match standing {
        Ok(Standing::Current) => {
            area.ok("tables", "the tables are those of this version");
            Readiness::Ready
        }
        Ok(Standing::Ahead) => {
            area.warning(
                "tables",
                "the tables are those of a newer version, which says that this one can use them",
                "install the newer version here too, when all instances have it",
            );
            Readiness::Ready
        }
        Ok(Standing::Behind) => {
            area.ok("tables", "the tables are missing, or of an older version: the next start of secretier makes them");
            Readiness::ToBeMade
        }
        Err(error) => {
            area.failure("tables", crate::log::chain(&error), "install that version of secretier here");
            Readiness::Unusable
        }
    }
}

async fn examine_sqlite(path: PathBuf, config: &Config, area: &Area) -> Readiness {
    area.begins("file");
    let shown = path.display().to_string();
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
    let timeout = config.timeout;
    let looked = tokio::task::spawn_blocking(move || Looked::at(&path, &folder, timeout)).await;
    let Ok(looked) = looked else { return Readiness::Unusable };
    let length = match looked.length {
        Ok(Some(length)) => length,
        Ok(None) => {
            area.ok("file", format!("{shown} is not there yet: the next start of secretier makes it"));
            looked.room(0, area);
            return Readiness::ToBeMade;
        }
        Err(error) => {
            area.failure(
                "file",
                format!("{shown} cannot be used: {error}"),
                "check [database] url, that the folder exists, and that the user that secretier runs as may write there",
            );
            return Readiness::Unusable;
        }
    };
    area.ok("file", format!("{shown}, {}", bytesize::ByteSize(length)));
    if looked.is_exposed {
        area.warning(
            "mode",
            format!("{shown} can be read by others than its owner"),
            format!("run `chmod 600 {shown}`"),
        );
    }
    looked.room(length, area);
    area.begins("tables");
    match looked.opened {
        Some(Ok(Opened { standing, intact })) => {
            match intact {
                Some(Err(said)) => area.failure(
                    "pages",
                    format!("SQLite finds the file damaged: {said}"),
                    "stop secretier, keep the file, and restore a backup of it; Infisical's secrets come back by themselves",
                ),
                Some(Ok(())) => area.ok("pages", format!("SQLite {} finds the file whole", looked.version)),
                None => area.ok("pages", "the file is too large to be checked here; 'PRAGMA quick_check' does it"),
            }
            stand(standing, area)
        }
        Some(Err(error)) => {
            area.failure(
                "tables",
                format!("{shown} cannot be read: {error}"),
                "check who may read the file, and its disk",
            );
            Readiness::Unusable
        }
        None => Readiness::Unusable,
    }
}

/// The result of a look at an SQLite file.
struct Looked {
    length: std::io::Result<Option<u64>>,
    is_exposed: bool,
    /// The bytes that are free on its disk.
    free: Option<u64>,
    /// The file system, if other machines share it.
    shared: Option<&'static str>,
    version: String,
    opened: Option<Result<Opened, String>>,
}

struct Opened {
    standing: Result<Standing, StoreError>,
    /// Whether SQLite finds the file whole; `None` if it is too large to be checked.
    intact: Option<Result<(), String>>,
}

impl Looked {
    fn at(path: &Path, folder: &Path, timeout: Duration) -> Self {
        let length = match std::fs::metadata(path) {
            Ok(found) => Ok(Some(found.len())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => folder.metadata().map(|_| None),
            Err(error) => Err(error),
        };
        let opened = matches!(length, Ok(Some(_))).then(|| {
            let small = length.as_ref().is_ok_and(|length| length.unwrap_or(0) <= CHECKED);
            Opened::of(path, timeout, small)
        });
        Self {
            is_exposed: crate::private_file::exposed_mode(path).is_some(),
            free: rustix::fs::statvfs(folder).ok().map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize)),
            shared: shared_file_system(folder),
            version: version(),
            length,
            opened,
        }
    }

    fn room(&self, length: u64, area: &Area) {
        if let Some(free) = self.free {
            let text = format!("{} are free on its disk", bytesize::ByteSize(free));
            match free < LITTLE_ROOM.max(length / 2) {
                true => {
                    area.warning("disk", text, "make room: without it secretier goes on reading, and refuses writes")
                }
                false => area.ok("disk", text),
            }
        }
        if let Some(name) = self.shared {
            area.warning(
                "disk",
                format!("the file lies on {name}, which other machines share"),
                "SQLite needs a local disk: put the file there, or use PostgreSQL",
            );
        }
    }
}

impl Opened {
    fn of(path: &Path, timeout: Duration, is_small: bool) -> Result<Self, String> {
        let mut connection = connect_sqlite(path, timeout).map_err(|error| error.to_string())?;
        let tables = look_sqlite(&mut connection).map_err(|error| error.to_string())?;
        let intact = is_small.then(|| quick_check(&mut connection));
        let standing = tables.standing(&known::<diesel::sqlite::Sqlite>(&SQLITE_MIGRATIONS));
        Ok(Self { standing, intact })
    }
}

fn version() -> String {
    use diesel::Connection as _;
    let said = diesel::SqliteConnection::establish(":memory:").ok().and_then(|mut connection| {
        let version = diesel::sql_query("SELECT sqlite_version() AS said");
        diesel::RunQueryDsl::get_result::<super::super::tables::Said>(version, &mut connection).ok()
    });
    said.map(|said| said.said).unwrap_or_default()
}

async fn examine_postgres(manager: &PostgresManager, config: &Config, clock: &Clock, area: &Area) -> Readiness {
    area.begins("connection");
    let Session { client, closed, set_aside } =
        match tokio::time::timeout(CONNECTED, manager.sessions.open(manager.sessions.timeout)).await {
            Ok(Ok(session)) => session,
            Err(_) => {
                no_session(&SessionError::TimedOut, area);
                return Readiness::Unusable;
            }
            Ok(Err(error)) => {
                no_session(&error, area);
                return Readiness::Unusable;
            }
        };
    area.ok("connection", format!("{} lets the role in", config.url));
    area.ok("pooler", "each connection has a session of its own");
    if !set_aside.is_empty() {
        area.ok("defaults", format!("these defaults are set otherwise for our sessions: {}", set_aside.join(", ")));
    }
    let refused = |check, error: tokio_postgres::Error| {
        let text = format!("it refuses a query: {}", Cause::chain(&error).0);
        area.failure(check, text, "see PostgreSQL's own log");
        Readiness::Unusable
    };
    area.begins("server");
    match said(&client, SERVER).await {
        Ok(row) => server(&row, config, clock.now(), area),
        Err(error) => return refused("server", error),
    }
    area.begins("schema");
    match said(&client, &rights(&config.schema)).await {
        Ok(row) => schema(&row, config, area),
        Err(error) => return refused("schema", error),
    }
    area.begins("tables");
    let standing = match PostgresConnection::over(client, closed).await {
        Ok(mut connection) => {
            look_postgres(&mut connection.diesel, &config.schema).await.map_err(|error| Cause::chain(&error))
        }
        Err(error) => Err(Cause::chain(&error)),
    };
    match standing {
        Ok(tables) => stand(tables.standing(&known::<Pg>(&POSTGRES_MIGRATIONS)), area),
        Err(error) => {
            area.failure(
                "tables",
                format!("they cannot be read: {}", error.0),
                "give the role its rights to the schema",
            );
            Readiness::Unusable
        }
    }
}

/// Says why there is no session, and what to do.
fn no_session(error: &SessionError, area: &Area) {
    let text = Cause::chain(error).0;
    let (check, advice) = match error {
        SessionError::Shared => {
            return area.failure(
                "pooler",
                StoreError::SharedSessions.to_string(),
                "set pool_mode = session for this database at the pooler",
            );
        }
        SessionError::NoSecond => ("pooler", "give the pooler's pool more room"),
        SessionError::TimedOut => ("connection", "check the address in [database] url, and the firewalls between"),
        SessionError::Connect(error) | SessionError::SetUp(error) => match error.code() {
            Some(code)
                if [SqlState::INVALID_PASSWORD, SqlState::INVALID_AUTHORIZATION_SPECIFICATION].contains(code) =>
            {
                ("connection", "check user and password in [database] url, and PostgreSQL's pg_hba.conf")
            }
            Some(code) if *code == SqlState::INVALID_CATALOG_NAME => {
                ("connection", "make the database, or correct its name in [database] url")
            }
            Some(code) if *code == SqlState::TOO_MANY_CONNECTIONS => {
                ("connection", "raise PostgreSQL's max_connections, or lower database.pool_size of all instances")
            }
            Some(_) => ("connection", "see PostgreSQL's own log"),
            None => (
                "connection",
                "check the address in [database] url, that PostgreSQL listens there, and sslmode and sslrootcert if the text speaks of TLS",
            ),
        },
    };
    area.failure(check, text, advice);
}

/// One row of texts.
async fn said(client: &Client, query: &str) -> Result<Vec<String>, tokio_postgres::Error> {
    let told = client.simple_query(query).await?;
    Ok(told
        .iter()
        .find_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|column| row.get(column).unwrap_or_default().to_owned()).collect())
            }
            _ => None,
        })
        .unwrap_or_default())
}

const SERVER: &str = "SELECT current_setting('server_version_num'), current_setting('server_version'), current_user, \
     (SELECT rolsuper FROM pg_roles WHERE rolname = current_user), \
     coalesce((SELECT CASE WHEN ssl THEN version END FROM pg_stat_ssl WHERE pid = pg_backend_pid()), ''), \
     pg_is_in_recovery(), \
     current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint, \
     (SELECT sum(numbackends) FROM pg_stat_database), \
     pg_size_pretty(pg_database_size(current_database())), \
     floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint";

/// Says what the server is, from the row of [`SERVER`].
fn server(row: &[String], config: &Config, now: Timestamp, area: &Area) {
    let [number, version, role, is_super, tls, is_standby, most, there, size, millis] = row else { return };
    let major = number.parse::<u32>().unwrap_or_default() / 10_000;
    match major < OLDEST_POSTGRES {
        true => area.warning(
            "server",
            format!("PostgreSQL {version}"),
            "its makers no longer look after it: use a newer one",
        ),
        false => area.ok("server", format!("PostgreSQL {version}; the database has {size}")),
    }
    match is_super.as_str() {
        "t" => area.warning(
            "role",
            format!("the role {role} is a superuser"),
            "use a role of its own, which owns the schema and nothing else",
        ),
        _ => area.ok("role", format!("the role {role} is no superuser")),
    }
    match tls.as_str() {
        "" if config.url.is_on_this_machine() => area.ok("tls", "the connection does not leave this machine"),
        "" => area.warning(
            "tls",
            "the connection is not encrypted, as PostgreSQL sees it",
            "add sslmode=verify-full and sslrootcert to [database] url, unless the network is trusted",
        ),
        version => area.ok("tls", format!("the connection is encrypted, as PostgreSQL sees it ({version})")),
    }
    if is_standby == "t" {
        area.failure("writes", "the server is a standby, which takes no writes", "name the primary in [database] url");
    }
    let (most, there) = (most.parse::<usize>().unwrap_or_default(), there.parse::<usize>().unwrap_or_default());
    let text =
        format!("{there} of {most} connections are in use; one more instance takes up to {}", config.pool_size + 3);
    match there + config.pool_size + 3 > most {
        true => area.warning("connections", text, "raise PostgreSQL's max_connections, or lower database.pool_size"),
        false => area.ok("connections", text),
    }
    if let Ok(millis) = millis.parse() {
        let theirs = Timestamp::from_millis(millis);
        let apart = now.since(theirs).max(theirs.since(now));
        match apart > CLOCKS_APART {
            true => area.warning(
                "clock",
                format!("this machine's clock is {} s from PostgreSQL's", apart.as_secs()),
                "set up time synchronisation on both machines",
            ),
            false => area.ok("clock", "this machine's clock agrees with PostgreSQL's"),
        }
    }
}

/// The rights to the schema and what is in it. Its name was checked to be a plain one.
fn rights(schema: &str) -> String {
    format!(
        "SELECT to_regnamespace('{schema}') IS NOT NULL, has_database_privilege(current_database(), 'CREATE'), \
         coalesce(has_schema_privilege(to_regnamespace('{schema}')::oid, 'USAGE'), false), \
         coalesce(has_schema_privilege(to_regnamespace('{schema}')::oid, 'CREATE'), false), \
         coalesce((SELECT string_agg(relname, ', ') FROM pg_class WHERE relnamespace = to_regnamespace('{schema}')::oid \
           AND relkind = 'r' AND NOT (has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT') \
           AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE'))), ''), \
         current_setting('search_path')"
    )
}

/// Says what the role may do there, from the row of [`rights`].
fn schema(row: &[String], config: &Config, area: &Area) {
    let [there, may_make, may_use, may_create, lacking, search_path] = row else { return };
    let schema = &config.schema;
    match (there.as_str(), may_make.as_str(), may_use.as_str(), may_create.as_str()) {
        ("f", "f", ..) => area.failure(
            "schema",
            format!("there is no schema {schema}, and the role may not make one"),
            format!("run as the database's owner: CREATE SCHEMA {schema} AUTHORIZATION <role>"),
        ),
        ("f", ..) => {
            area.ok("schema", format!("there is no schema {schema} yet: the next start of secretier makes it"))
        }
        (_, _, "f", _) => area.failure(
            "schema",
            format!("the role may not use the schema {schema}"),
            format!("run as its owner: GRANT USAGE, CREATE ON SCHEMA {schema} TO <role>"),
        ),
        (_, _, _, "f") => area.warning(
            "schema",
            format!("the role may make no tables in the schema {schema}"),
            format!("a new version needs it: GRANT CREATE ON SCHEMA {schema} TO <role>"),
        ),
        _ if !lacking.is_empty() => area.failure(
            "schema",
            format!("the role may not read and write all tables in {schema}: {lacking}"),
            format!("run as their owner: GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO <role>"),
        ),
        _ => area.ok("schema", format!("the role has its rights to the schema {schema}; search_path is {search_path}")),
    }
}
