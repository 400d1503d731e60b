//! Connections to SQLite, and the threads that they work on.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use deadpool::managed::{Manager, Metrics, RecycleResult};
use diesel::{
    Connection as _, QueryResult, RunQueryDsl as SyncDsl, SqliteConnection, connection::SimpleConnection as _,
    result::Error,
};
use diesel_async::sync_connection_wrapper::SpawnBlocking;
use diesel_migrations::MigrationHarness as _;
use futures_util::{FutureExt as _, TryFutureExt as _, future::BoxFuture};
use tokio::{
    runtime::Handle,
    sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore},
};

use super::{
    super::{
        error::{Cause, Judgement, StoreError},
        tables::{APPLIED, READABLE_FROM, Said, Standing, Tables, There, known},
    },
    MIGRATION_TIMEOUT, MigrationError, SQLITE_MIGRATIONS, SQLITE_SETUP, Sqlite,
};

pub(in crate::tiers::database) struct SqliteManager {
    pub(super) path: PathBuf,
    pub(super) timeout: Duration,
    /// As many as the pool has connections: for connections, and for abandoned ones until their
    /// work has ended. So a disk that hangs blocks no more threads than this.
    pub(super) places: Arc<Semaphore>,
    /// For work that is done at once, on the calling thread: see [`Work`].
    pub(super) room: Arc<Semaphore>,
}

/// A connection to SQLite.
pub(in crate::tiers::database) struct SqliteSession {
    pub(super) diesel: Sqlite,
    pub(super) holdings: Arc<Holdings>,
}

/// The resources of a connection to SQLite. It keeps them while it is working, even if nobody waits
/// for the result any more: nothing ends such work from outside.
pub(super) struct Holdings {
    /// Whether the next work is to be done at once.
    at_once: AtomicBool,
    /// The writer's lock, which [`Connection`] owns.
    turn: std::sync::Mutex<Weak<OwnedMutexGuard<()>>>,
    pub(super) room: Arc<Semaphore>,
    _place: Option<OwnedSemaphorePermit>,
}

/// Where a connection to SQLite does its work: on a thread for blocking work, or at once, on the
/// calling thread.
///
/// Finding a row by its key takes several times less than waking another thread and being woken by
/// it. But a disk may hang, and a worker with it. These rules keep that from delaying anybody else:
/// - A separate task blocks. The caller still notices when its time is up, and other workers take
///   over the other tasks of this worker.
/// - One of the workers must look after sockets and timers, and it could be the one that blocks,
///   while all others sleep. So another worker is woken first, by a task that does nothing.
/// - As long as there is room, at least one worker is not blocked. Where there is none, the work
///   goes to a thread for blocking work, as it does where a runtime has only one worker.
/// - A task that has used up its turn (tokio's cooperative budget) waits where nobody takes it
///   over, and would not have set its timer. It does nothing at once. A task that did so on the
///   same thread just before waits until the disk answers; nothing here can help that one.
#[derive(Clone)]
pub(in crate::tiers::database) struct Work(Arc<Holdings>);

impl Holdings {
    fn new(room: Arc<Semaphore>, place: Option<OwnedSemaphorePermit>) -> Arc<Self> {
        Arc::new(Self { at_once: AtomicBool::new(false), turn: std::sync::Mutex::default(), room, _place: place })
    }
}

impl Work {
    /// The room of all connections of a pool: all workers but one.
    pub(super) fn room() -> Arc<Semaphore> {
        let workers = Handle::try_current().map_or(1, |runtime| runtime.metrics().num_workers());
        Arc::new(Semaphore::new(workers - 1))
    }
}

impl SpawnBlocking for Work {
    fn spawn_blocking<'a, R>(
        &mut self,
        task: impl FnOnce() -> R + Send + 'static,
    ) -> BoxFuture<'a, Result<R, Box<dyn std::error::Error + Send + Sync>>>
    where
        R: Send + 'static,
    {
        let holdings = Arc::clone(&self.0);
        let turn = holdings.turn.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        let at_once =
            AtomicBool::load(&holdings.at_once, Ordering::Relaxed) && tokio::task::coop::has_budget_remaining();
        let room = at_once.then(|| Arc::clone(&holdings.room).try_acquire_owned().ok()).flatten();
        let is_at_once = room.is_some();
        let task = move || {
            let done = task();
            drop((holdings, turn, room));
            done
        };
        let work = match is_at_once {
            true => {
                drop(tokio::spawn(async {}));
                tokio::spawn(async { task() })
            }
            false => tokio::task::spawn_blocking(task),
        };
        work.map_err(Box::from).boxed()
    }

    fn get_runtime() -> Self {
        Self(Holdings::new(Self::room(), None))
    }
}

impl SqliteSession {
    fn new(connection: SqliteConnection, holdings: Arc<Holdings>) -> Self {
        Self { diesel: Sqlite::with_runtime(connection, Work(Arc::clone(&holdings))), holdings }
    }

    /// Does work on the calling thread, where there is room for that.
    pub(super) fn at_once<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut SqliteConnection) -> QueryResult<R> + Send + 'static,
    ) -> BoxFuture<'static, QueryResult<R>> {
        // Nobody else has the connection, so no other work sees this flag.
        self.holdings.at_once.store(true, Ordering::Relaxed);
        let done = self.diesel.spawn_blocking(work);
        self.holdings.at_once.store(false, Ordering::Relaxed);
        done
    }

    /// Keeps the writer's lock for as long as its owner has it, and while work is in progress under
    /// it.
    pub(super) fn hold(&self, turn: &Arc<OwnedMutexGuard<()>>) {
        *self.holdings.turn.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(turn);
    }
}

impl Manager for SqliteManager {
    type Type = SqliteSession;
    type Error = io::Error;

    async fn create(&self) -> Result<SqliteSession, io::Error> {
        let place = Arc::clone(&self.places).acquire_owned().await.map_err(io::Error::other)?;
        let holdings = Holdings::new(Arc::clone(&self.room), Some(place));
        let (path, timeout) = (self.path.clone(), self.timeout);
        let open = move || {
            // SQLite would make an empty database in place of a removed one.
            if !path.try_exists()? {
                let reason = format!("the file {} is gone", path.display());
                return Err(io::Error::new(io::ErrorKind::NotFound, reason));
            }
            Ok(SqliteSession::new(connect_sqlite(&path, timeout)?, holdings))
        };
        tokio::task::spawn_blocking(open).await?
    }

    async fn recycle(&self, _: &mut SqliteSession, _: &Metrics) -> RecycleResult<io::Error> {
        Ok(())
    }
}

pub(super) fn connect_sqlite(path: &Path, timeout: Duration) -> io::Result<SqliteConnection> {
    let name = path.to_str().ok_or_else(|| io::Error::other("the path of the file is not UTF-8"))?;
    let mut connection = SqliteConnection::establish(name).map_err(io::Error::other)?;
    connection.batch_execute(&format!("{} {SQLITE_SETUP}", busy_timeout(timeout))).map_err(io::Error::other)?;
    Ok(connection)
}

/// How long SQLite waits for others. Nothing ends such a wait from outside, so it must not be
/// longer than the operation that waits for it.
pub(super) fn busy_timeout(timeout: Duration) -> String {
    format!("PRAGMA busy_timeout = {};", timeout.as_millis().clamp(1, i32::MAX as u128))
}

/// SQLite's message where its file can only be read.
pub(super) const READ_ONLY: &str = "readonly database";

/// SQLite's messages where its file cannot be read or written, or is in use for too long.
pub(super) const UNREADABLE: [&str; 4] =
    ["unable to open database file", "disk I/O error", "database is locked", "locking protocol"];

pub(super) fn unavailable(source: Cause) -> StoreError {
    StoreError::Unavailable { retry_after: Duration::from_secs(1), source }
}

/// Makes the file and its tables; returns the connection that did. Another process may be doing the
/// same at the moment.
pub(super) async fn prepare_sqlite(path: PathBuf) -> Result<(SqliteConnection, Standing), StoreError> {
    let migration = |reason: String| StoreError::Migration(Cause(reason));
    // If the system, or SQLite on its behalf, reports a problem of the file, the tables are not at
    // fault.
    let place = path.clone();
    let failed = move |reason: String| match UNREADABLE.iter().any(|said| reason.contains(said)) {
        true => unavailable(Cause(advised(reason, shared_file_system(&place)))),
        false => migration(reason),
    };
    let prepare =
        move || {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !folder.is_dir() {
                let text = format!("the folder {} does not exist; make it first", folder.display());
                return Err(StoreError::InvalidUrl(text));
            }
            create_private(&path).map_err(|error| unavailable(Cause(format!("{}: {error}", path.display()))))?;
            let mut connection = connect_sqlite(&path, MIGRATION_TIMEOUT).map_err(|error| {
                unavailable(Cause(advised(format!("{}: {error}", path.display()), shared_file_system(&path))))
            })?;
            // Checked first: if nothing is to be done, nothing has to be written.
            let standing = look_sqlite(&mut connection)
                .map_err(|error| failed(error.to_string()))?
                .standing(&known::<diesel::sqlite::Sqlite>(&SQLITE_MIGRATIONS))?;
            match enter_wal(&mut connection) {
                Err(error) if standing == Standing::Behind || !is_unwritable(&error) => {
                    return Err(failed(error.to_string()));
                }
                _ => {}
            }
            if standing != Standing::Behind {
                return Ok((connection, standing));
            }
            // A second process waits for the first here, and then finds nothing to do.
            connection
                .immediate_transaction(|connection| {
                    connection.run_pending_migrations(SQLITE_MIGRATIONS).map(|_| ()).map_err(MigrationError::Migration)
                })
                .map_err(|error| failed(error.to_string()))?;
            Ok((connection, standing))
        };
    tokio::task::spawn_blocking(prepare).await.map_err(|error| migration(error.to_string()))?
}

pub(super) fn look_sqlite(connection: &mut SqliteConnection) -> QueryResult<Tables> {
    let there = "SELECT count(*) > 0 AS there FROM sqlite_master WHERE name = '__diesel_schema_migrations'";
    if !SyncDsl::get_result::<There>(diesel::sql_query(there), connection)?.there {
        return Ok(Tables::default());
    }
    let applied: Vec<Said> = SyncDsl::load(diesel::sql_query(APPLIED), connection)?;
    let applied: Vec<String> = applied.into_iter().map(|one| one.said).collect();
    let readable_from = match applied.is_empty() {
        true => Vec::new(),
        false => SyncDsl::load::<Said>(diesel::sql_query(READABLE_FROM), connection)?,
    };
    Ok(Tables { applied, readable_from: readable_from.into_iter().next().map(|one| one.said) })
}

/// Whether SQLite finds the file whole, page by page.
///
/// # Errors
/// The first fault.
pub(super) fn quick_check(connection: &mut SqliteConnection) -> Result<(), String> {
    #[derive(diesel::QueryableByName)]
    struct Checked {
        #[diesel(sql_type = diesel::sql_types::Text)]
        quick_check: String,
    }
    let checked = diesel::sql_query("PRAGMA quick_check(1)");
    match SyncDsl::get_result::<Checked>(checked, connection) {
        Ok(Checked { quick_check }) if quick_check == "ok" => Ok(()),
        Ok(Checked { quick_check }) => Err(quick_check),
        Err(error) => Err(error.to_string()),
    }
}

/// SQLite's message, with what to do where the file system may be the reason.
fn advised(reason: String, file_system: Option<&str>) -> String {
    const NEEDS: &str = "SQLite's write-ahead log needs memory and locks that processes share through the file system (its files \
                         -shm and -wal)";
    const REMEDY: &str = "put the file on a local disk of this machine, in a container on a volume, or use PostgreSQL";
    match file_system {
        _ if !["disk I/O error", "locking protocol"].iter().any(|said| reason.contains(said)) => reason,
        Some(name) => format!("{reason}: {NEEDS}, and it lies on {name}, which may not have them; {REMEDY}"),
        None => format!(
            "{reason}: the disk failed (the system's log says), or the file lies on a file system that is shared with another \
             machine. {NEEDS}; {REMEDY}"
        ),
    }
}

/// The file system that a file lies on, if it is one that is shared with the host or other machines.
#[cfg(target_os = "linux")]
pub(super) fn shared_file_system(path: &Path) -> Option<&'static str> {
    // Numbers from the kernel's include/uapi/linux/magic.h; virtiofs has that of FUSE.
    match u32::try_from(rustix::fs::statfs(path).ok()?.f_type).ok()? {
        0x0102_1997 => Some("9p"),
        0x6573_5546 => Some("FUSE or virtiofs"),
        0x6969 => Some("NFS"),
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => Some("SMB"),
        0x00c3_6400 => Some("CephFS"),
        _ => None,
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn shared_file_system(_: &Path) -> Option<&'static str> {
    None
}

/// Whether the error means that nothing at all can be written, rather than just this.
pub(super) fn is_unwritable(error: &Error) -> bool {
    matches!(Judgement::of(error), Judgement::Unwritable(_))
}

/// Makes the file where it is missing, accessible to its owner alone; SQLite gives `-wal` and
/// `-shm` the same mode.
pub(super) fn create_private(path: &Path) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    match options.open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Turns on the write-ahead log, which is a lasting property of the file. SQLite does not wait for
/// others here, whatever `busy_timeout` says.
pub(super) fn enter_wal(connection: &mut SqliteConnection) -> QueryResult<()> {
    let mut tries = 0;
    loop {
        match connection.batch_execute("PRAGMA journal_mode = WAL") {
            Err(Error::DatabaseError(_, details)) if details.message().contains("locked") && tries < 100 => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(50));
            }
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_without_shared_memory_is_told_with_what_to_do() {
        let told = advised("disk I/O error".to_owned(), Some("9p"));
        assert!(
            told.starts_with("disk I/O error: ") && told.contains("on 9p") && told.contains("local disk"),
            "{told}"
        );
        let told = advised("locking protocol".to_owned(), Some("NFS"));
        assert!(told.contains("on NFS") && told.contains("PostgreSQL"), "{told}");
        let told = advised("disk I/O error".to_owned(), None);
        assert!(told.contains("the disk failed") && told.contains("local disk"), "{told}");
        assert_eq!(advised("database is locked".to_owned(), Some("9p")), "database is locked");
    }
}
