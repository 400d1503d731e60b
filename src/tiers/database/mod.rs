//! The database tier: an encrypted copy of the secrets that upstream owns, and the home of those
//! that the database owns. Queries are grouped by noun in the files below; this one opens the tier.

mod audit;
mod budgets;
mod calls;
mod changes;
mod companies;
mod config;
mod data_keys;
mod error;
mod heads;
mod imports;
mod instances;
mod job_locks;
mod leases;
mod logins;
mod master_keys;
mod migrations;
mod ownership;
mod pool;
mod postgres;
mod prepared;
mod rekey;
mod rotation_due;
mod rows;
mod schema;
mod seals;
mod secret_rotations;
mod secrets;
mod sessions;
mod shredding;
mod snapshots;
mod tables;
mod tenants;
mod time;
mod tls;
mod tokens;
mod uses;
mod versions;
mod webhooks;

use std::{
    collections::HashSet,
    sync::{
        Arc, OnceLock, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use diesel::{ExpressionMethods as _, QueryDsl as _};

pub(crate) use self::postgres::PostgresServer;
pub use self::{
    audit::{AuditChain, AuditFilter, AuditMark, AuditPlace, AuditRow, Signed},
    budgets::BudgetPage,
    changes::{Change, News, Numbered, Place},
    companies::Company,
    config::{Config, DatabaseUrl},
    error::{Cause, StoreError, WriteError},
    heads::{HeadTimes, SealedTenants, Verdict, VerifiedTenant},
    imports::{Import, ImportOutcome},
    instances::{Following, Instance, Unfollowed},
    job_locks::JobLock,
    leases::{Holder, Lease},
    logins::{KnownLogins, LONGEST_LOGIN, LoginKey},
    master_keys::{KnownKey, MissingKey, WrappedBy},
    migrations::{Compared, Own, Run, RunKind, Step, Switch, TenantState},
    ownership::{Expected, Refusal, Told, UpstreamWrite},
    pool::{Readiness, Remains, examine},
    rekey::{Rewrapped, RotationState},
    rotation_due::{Due, PageEnd, Rotatable},
    seals::{Distrust, KnownTokens, Sealed, SealedTokens},
    secret_rotations::{
        KeptValues, NewRotation, Rotation, RotationDetail, RotationError, RotationFault, RotationFilter, RotationKind,
        RotationState as SecretRotationState, RotationStep, RotationValues,
    },
    secrets::{Current, Held, Listing, Lookup, Precondition, Source, Stored, Written},
    shredding::Shredded,
    snapshots::{Began, StoreOutcome, Taken},
    tokens::TokenRow,
    versions::{Older, Revision},
    webhooks::Taken as TakenWebhook,
};
use self::{
    calls::{Calls, Maker, Said},
    data_keys::DataKeys,
    error::SHORTEST_BREAK,
    pool::Pool,
    schema::settings,
    tables::Standing,
    time::DatabaseNow,
    versions::Retention,
};
use crate::{
    clock::Clock, keys::MasterKeys, log::Seldom, long_work::LongWork, metrics::Metrics, tiers::breaker::Breaker,
};

/// The number of consecutive failures after which the database is left alone for a while.
const BREAKER_THRESHOLD: u32 = 2;
const LONGEST_BREAK: Duration = Duration::from_secs(5);

/// The database tier. Callers pass and get plain values; the stored values are sealed.
///
/// Every operation ends within the configured timeout, and fails at once while the
/// database is known to be down.
pub struct Database {
    calls: Calls,
    keys: Arc<MasterKeys>,
    data_keys: DataKeys,
    retention: Retention,
    /// Limits the log of rows that do not open, which every lookup of them would repeat.
    unreadable: Seldom,
    /// The environment that the rows belong to, once it is known.
    environment: OnceLock<String>,
    seals: SealsKnown,
    /// The marks of the changes up to which this process has followed the feed.
    seen: changes::Seen,
    /// Does the long work: opens, seals and verifies all rows of a tenant.
    work: LongWork,
    clock: Clock,
}

/// This process's knowledge of the seals.
#[derive(Default)]
struct SealsKnown {
    /// Whether the database says, or has ever said, that every row has a seal.
    complete: AtomicBool,
    /// Whether a row without a seal is refused whatever the database says.
    required: AtomicBool,
    /// The number of the last change of tokens that was read.
    number: AtomicU64,
    /// The ids that shredded tenants had.
    destroyed: RwLock<HashSet<String>>,
    told_unchecked: AtomicBool,
    refused: Seldom,
    set_back: Seldom,
    tampered: Seldom,
}

impl Database {
    /// Connects, brings the tables up to date, and checks that the rows belong to this environment;
    /// an empty database is made this environment's.
    ///
    /// # Errors
    /// [`StoreError`], which says what to correct.
    pub async fn open(
        config: &Config,
        environment: &str,
        keys: Arc<MasterKeys>,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StoreError> {
        let database = Self::build(config, keys, clock, metrics)?;
        database.prepare(environment).await?;
        Ok(database)
    }

    /// A database that is not opened yet: every operation fails as unavailable until
    /// [`Self::prepare`] has succeeded. This does not connect.
    ///
    /// # Errors
    /// [`StoreError`], where the configuration is invalid.
    pub fn build(
        config: &Config,
        keys: Arc<MasterKeys>,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StoreError> {
        let pool = Pool::build(config)?;
        let breaker = || Breaker::new(clock.clone(), BREAKER_THRESHOLD, SHORTEST_BREAK, LONGEST_BREAK);
        let (writing, is_open) = (pool.reads_without_writing().then(breaker), AtomicBool::new(false));
        let is_writable = AtomicBool::new(true);
        let maker = Maker::default();
        let (said, timeout) = (Said::default(), config.timeout);
        let calls = Calls { pool, is_open, is_writable, breaker: breaker(), writing, maker, metrics, timeout, said };
        Ok(Self {
            calls,
            keys,
            data_keys: DataKeys::new(),
            retention: Retention::of(config),
            unreadable: Seldom::default(),
            environment: OnceLock::new(),
            seals: SealsKnown::default(),
            seen: changes::Seen::default(),
            work: LongWork::default(),
            clock,
        })
    }

    /// Connects, brings the tables up to date, and checks that the rows belong to this environment,
    /// as [`Self::open`] does. Can be repeated where it fails.
    ///
    /// # Errors
    /// [`StoreError`], which says what to correct.
    pub async fn prepare(&self, environment: &str) -> Result<(), StoreError> {
        if self.calls.pool.prepare().await? == Standing::Ahead {
            tracing::warn!(
                "the database's tables are those of a newer version of secretier, which says that this one can use them"
            );
        }
        self.claim(environment).await?;
        self.calls.is_open.store(true, Ordering::Release);
        Ok(())
    }

    /// Opens it to be read as it is: its tables must be of this version, and nothing is written. It may
    /// be no environment's yet.
    ///
    /// # Errors
    /// [`StoreError::Environment`] where the rows belong to another one.
    pub async fn look(&self, environment: &str) -> Result<(), StoreError> {
        self.calls.is_open.store(true, Ordering::Release);
        let mut call = self.calls.read("claimed").await?;
        let found: Option<String> = call.first(settings::table.find("environment").select(settings::value)).await?;
        call.done();
        match found {
            Some(stored) if stored != environment => {
                Err(StoreError::Environment { stored, configured: environment.to_owned() })
            }
            _ => Ok(()),
        }
    }

    /// The master keys that this tier uses.
    #[must_use]
    pub fn keys(&self) -> &Arc<MasterKeys> {
        &self.keys
    }

    /// The long work of the whole process, not of this tier alone.
    #[must_use]
    pub fn work(&self) -> &LongWork {
        &self.work
    }

    /// How long an operation may take.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.calls.timeout
    }

    /// Whether instances on several machines may share it.
    #[must_use]
    pub fn is_for_many(&self) -> bool {
        self.calls.pool.is_for_many()
    }

    /// Whether the database accepted the last write. Sends no query.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        let is_left_alone = self.calls.writing.as_ref().is_some_and(Breaker::is_open);
        self.calls.is_writable.load(Ordering::Acquire) && !is_left_alone
    }

    /// Whether the database answered the last read. Sends no query.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.calls.check_open().is_ok() && !self.calls.breaker.is_open()
    }

    /// Probes the database, even while the breaker is open: the result decides whether other
    /// operations ask again.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn ping(&self) -> Result<(), StoreError> {
        let mut call = self.calls.probe("ping").await?;
        call.first::<_, String>(settings::table.find("environment").select(settings::value)).await?;
        call.done();
        Ok(())
    }

    async fn claim(&self, environment: &str) -> Result<(), StoreError> {
        self.calls.repeated(|| self.claim_once(environment)).await
    }

    async fn claim_once(&self, environment: &str) -> Result<(), StoreError> {
        let claimed = settings::table.find("environment").select((settings::value, DatabaseNow));
        // Read first: a database that accepts no writes can be read.
        let mut call = self.calls.read_first("claimed").await?;
        let asked_at = self.clock.running();
        let found: Option<(String, Option<i64>)> = call.first(claimed).await?;
        call.done();
        self.note_time(found.as_ref().and_then(|(_, now)| *now), asked_at);
        if let Some((stored, _)) = found.filter(|(stored, _)| stored == environment) {
            self.environment.get_or_init(|| stored);
            return Ok(());
        }
        let mut call = self.calls.write_first("claim", self.calls.timeout).await?;
        let claim = diesel::insert_into(settings::table)
            .values((settings::name.eq("environment"), settings::value.eq(environment)))
            .on_conflict(settings::name)
            .do_nothing();
        call.execute(claim).await?;
        let asked_at = self.clock.running();
        let (stored, now): (String, Option<i64>) = call.first(claimed).await?.unwrap_or_default();
        self.note_time(now, asked_at);
        if stored != environment {
            call.roll_back().await?;
            return Err(StoreError::Environment { stored, configured: environment.to_owned() });
        }
        self.environment.get_or_init(|| stored);
        call.commit().await
    }

    fn environment(&self) -> &str {
        self.environment.get().map_or("", String::as_str)
    }
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").field("breaker", &self.calls.breaker).finish_non_exhaustive()
    }
}

/// A UUID that begins with the time (version 7, RFC 9562, 5.7): rows that are made together lie
/// together in every index, where random ones would touch a page each. Nothing depends on the time
/// being right.
fn new_id() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let millis = u64::try_from(since.as_millis()).unwrap_or_default();
    uuid::Builder::from_unix_timestamp_millis(millis, &rand::random()).into_uuid().to_string()
}
