//! The records of migrations: the runs, the state of each tenant, and the right to run, which one
//! process has at a time.

use std::{collections::HashMap, time::Duration};

use diesel::{BoolExpressionMethods as _, ExpressionMethods as _, JoinOnDsl as _, QueryDsl as _, Queryable, dsl::max};
use serde::Serialize;

use super::{
    Database, JobLock,
    calls::Call,
    changes::Change,
    companies,
    error::StoreError,
    leases::Holder,
    new_id,
    ownership::{self, Expected, OwnershipTransfer, Refusal},
    rows::{BACKGROUND_TIMEOUTS, ROWS, StateRow},
    schema::{companies as company_table, leases, migration_runs, migration_tenants},
    secrets::{self, Held},
};
use crate::{clock::Timestamp, phase::Phase, secret::SecretKey, tenant::Tenant};

/// A run, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// A UUID.
    pub id: String,
    /// Whether it migrates from folders or from tables.
    pub kind: RunKind,
    /// The options that identify the command, as JSON: the same options mean the same command.
    pub options: String,
    /// Host and process that last worked on it.
    pub started_by: String,
    /// The number of tenants that it handles.
    pub total: i64,
    /// When it began.
    pub started_at: Timestamp,
    /// When it last made progress.
    pub seen_at: Timestamp,
    /// When it ended; `None` while it is running, or after it was killed.
    pub ended_at: Option<Timestamp>,
}

/// The kind of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RunKind {
    /// Migrates tenants from upstream's folders.
    Run,
    /// Migrates them from an application's tables.
    Import,
}

impl RunKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Import => "import",
        }
    }
}

/// How far the migration of a tenant has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Its secrets are in the database, but not compared yet.
    Stored,
    /// They were compared, and its phase was to stay.
    Verified,
    /// They were compared, and its phase was switched.
    Switched,
    /// It was not migrated.
    Failed,
    /// Its phase is upstream's again.
    RolledBack,
    /// Its folder was archived and removed.
    Archived,
}

impl Step {
    const ALL: [Self; 6] =
        [Self::Stored, Self::Verified, Self::Switched, Self::Failed, Self::RolledBack, Self::Archived];

    /// The word in the table and in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Verified => "verified",
            Self::Switched => "switched",
            Self::Failed => "failed",
            Self::RolledBack => "rolled_back",
            Self::Archived => "archived",
        }
    }
}

/// The state of a tenant in its migration. Holds names and digests, no values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantState {
    /// The tenant.
    pub tenant: Tenant,
    /// The run that handled it last.
    pub run: String,
    /// How far it has come in that run.
    pub step: Step,
    /// The number of secrets that were copied.
    pub secrets: i64,
    /// A keyed digest of their names and values.
    pub digest: Option<String>,
    /// Why it failed, as a word.
    pub reason: Option<String>,
    /// Why it failed, as a sentence.
    pub error: Option<String>,
    /// The phase of its own that it had before it was switched.
    pub phase_before: Option<Phase>,
    /// When its secrets were last found to be equal on both sides.
    pub verified_at: Option<Timestamp>,
    /// When its phase was switched.
    pub switched_at: Option<Timestamp>,
    /// When this was written.
    pub updated_at: Timestamp,
    /// Lookups that were compared with upstream since the switch.
    pub shadow_compared: i64,
    /// The lookups among them that differed.
    pub shadow_different: i64,
    /// When the last one differed.
    pub shadow_different_at: Option<Timestamp>,
}

impl TenantState {
    /// A tenant that a run has just begun with.
    #[must_use]
    pub fn new(tenant: Tenant, run: &str, step: Step, now: Timestamp) -> Self {
        Self {
            tenant,
            run: run.to_owned(),
            step,
            secrets: 0,
            digest: None,
            reason: None,
            error: None,
            phase_before: None,
            verified_at: None,
            switched_at: None,
            updated_at: now,
            shadow_compared: 0,
            shadow_different: 0,
            shadow_different_at: None,
        }
    }

    /// The new state of a tenant that was switched before and stays the database's: more was copied
    /// for it. How it came to the database must still be known later, in order to give it back, to
    /// compare it with its folder, or to remove the folder.
    fn after(&self, before: &Self) -> Self {
        Self {
            step: if self.step == Step::Verified { Step::Switched } else { self.step },
            phase_before: before.phase_before,
            switched_at: before.switched_at,
            shadow_compared: before.shadow_compared,
            shadow_different: before.shadow_different,
            shadow_different_at: before.shadow_different_at,
            ..self.clone()
        }
    }
}

/// A tenant that is to change its owner.
#[derive(Debug, Clone)]
pub struct Switch {
    /// The conditions for that.
    pub expected: Expected,
    /// The phase of its own that it gets; `None` takes it away.
    pub to: Option<Phase>,
    /// Its state in the migration after that.
    pub state: TenantState,
}

/// A secret that the database wrote as the owner.
#[derive(Debug, Clone)]
pub struct Own {
    /// Its name.
    pub key: SecretKey,
    /// The value, or that it was deleted.
    pub held: Held,
}

/// The numbers of a tenant's lookups that were compared with upstream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compared {
    /// All compared lookups.
    pub compared: i64,
    /// The lookups that differed.
    pub different: i64,
    /// When the last one differed.
    pub different_at: Option<Timestamp>,
}

#[derive(Queryable)]
struct RunRow {
    id: String,
    kind: String,
    options: String,
    started_by: String,
    total: i64,
    started_at: i64,
    seen_at: i64,
    ended_at: Option<i64>,
}

impl TryFrom<RunRow> for Run {
    type Error = StoreError;

    fn try_from(row: RunRow) -> Result<Self, StoreError> {
        let kind = [RunKind::Run, RunKind::Import].into_iter().find(|kind| kind.as_str() == row.kind);
        let kind =
            kind.ok_or_else(|| StoreError::broken(format!("migration {}: the column kind cannot be read", row.id)))?;
        Ok(Self {
            kind,
            options: row.options,
            started_by: row.started_by,
            total: row.total,
            started_at: Timestamp::from_millis(row.started_at),
            seen_at: Timestamp::from_millis(row.seen_at),
            ended_at: row.ended_at.map(Timestamp::from_millis),
            id: row.id,
        })
    }
}

impl From<&TenantState> for StateRow {
    fn from(state: &TenantState) -> Self {
        let millis = |at: Option<Timestamp>| at.map(Timestamp::as_millis);
        Self {
            subdomain: state.tenant.as_str().to_owned(),
            run_id: state.run.clone(),
            step: state.step.as_str(),
            secrets: state.secrets,
            digest: state.digest.clone(),
            reason: state.reason.clone(),
            error: state.error.clone(),
            phase_before: state.phase_before.map(Phase::as_str),
            verified_at: millis(state.verified_at),
            switched_at: millis(state.switched_at),
            updated_at: state.updated_at.as_millis(),
            shadow_compared: state.shadow_compared,
            shadow_different: state.shadow_different,
            shadow_different_at: millis(state.shadow_different_at),
        }
    }
}

#[derive(Queryable)]
struct TenantRow {
    subdomain: String,
    run_id: String,
    step: String,
    secrets: i64,
    digest: Option<String>,
    reason: Option<String>,
    error: Option<String>,
    phase_before: Option<String>,
    verified_at: Option<i64>,
    switched_at: Option<i64>,
    updated_at: i64,
    shadow_compared: i64,
    shadow_different: i64,
    shadow_different_at: Option<i64>,
}

impl TryFrom<TenantRow> for TenantState {
    type Error = StoreError;

    fn try_from(row: TenantRow) -> Result<Self, StoreError> {
        let wrong = |column| {
            StoreError::broken(format!("the migration of {}: the column {column} cannot be read", row.subdomain))
        };
        Ok(Self {
            tenant: row.subdomain.parse().map_err(|_| wrong("subdomain"))?,
            step: Step::ALL.into_iter().find(|step| step.as_str() == row.step).ok_or_else(|| wrong("step"))?,
            phase_before: row.phase_before.as_deref().map(str::parse).transpose().map_err(|_| wrong("phase_before"))?,
            run: row.run_id,
            secrets: row.secrets,
            digest: row.digest,
            reason: row.reason,
            error: row.error,
            verified_at: row.verified_at.map(Timestamp::from_millis),
            switched_at: row.switched_at.map(Timestamp::from_millis),
            updated_at: Timestamp::from_millis(row.updated_at),
            shadow_compared: row.shadow_compared,
            shadow_different: row.shadow_different,
            shadow_different_at: row.shadow_different_at.map(Timestamp::from_millis),
        })
    }
}

/// The names of the job locks.
const MIGRATION: &str = "migration";
const FOLDERS: &str = "migration-folders";

/// How long to wait for another process's job lock. A process that only checks whether anybody runs
/// has the lock for a moment, and the system may not have freed the lock of a process that was
/// killed a moment ago. A process that works on folders holds its lock for one tenant.
const RUNS_WITHIN: Duration = Duration::from_secs(1);
const FOLDERS_WITHIN: Duration = Duration::from_secs(30);

/// How many ended runs are kept; the state of each tenant stays.
const RUNS_KEPT: i64 = 100;

impl Database {
    /// Takes the right to migrate, or returns its holder. `by` describes this process to people.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn migration_lock(&self, by: &str) -> Result<Result<JobLock, Holder>, StoreError> {
        self.job_lock(MIGRATION, by, RUNS_WITHIN).await
    }

    /// The process that migrates at the moment.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn migration_holder(&self) -> Result<Option<Holder>, StoreError> {
        self.job_lock_holder(MIGRATION).await
    }

    /// Takes the right to remove tenants' folders, put them back, or give a tenant back to its
    /// folder: one process at a time. Waits for it, but not for ever; returns the holder if there
    /// still is one then.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn folders_lock(&self, by: &str) -> Result<Result<JobLock, Holder>, StoreError> {
        self.job_lock(FOLDERS, by, FOLDERS_WITHIN).await
    }

    /// The last runs, the newest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn runs(&self) -> Result<Vec<Run>, StoreError> {
        let mut call = self.calls.read("migration_runs").await?;
        let newest = migration_runs::table.order((migration_runs::started_at.desc(), migration_runs::id.desc()));
        let rows: Vec<RunRow> = call.load(newest.limit(RUNS_KEPT)).await?;
        call.done();
        rows.into_iter().map(Run::try_from).collect()
    }

    /// Whether a run is in progress, in any process: cheap enough to ask every second. A killed run
    /// counts as in progress until its job lock has ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn is_migrating(&self) -> Result<bool, StoreError> {
        let now = self.clock.database_now().as_millis();
        let mut call = self.calls.read("is_migrating").await?;
        let going_on = migration_runs::table.filter(migration_runs::ended_at.is_null()).select(migration_runs::id);
        let held = leases::table.find(MIGRATION).filter(leases::until.gt(now)).select(leases::name);
        let is_migrating = call.first::<_, String>(going_on.limit(1)).await?.is_some()
            && call.first::<_, String>(held).await?.is_some();
        call.done();
        Ok(is_migrating)
    }

    /// Begins a run. Earlier runs that did not end count as over. Running instances learn of it,
    /// and leave it its share of the upstream budget.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin_run(
        &self,
        lock: &JobLock,
        kind: RunKind,
        options: &str,
        by: &str,
        total: i64,
    ) -> Result<Run, StoreError> {
        let write = || async {
            let (id, now) = (new_id(), self.clock.database_now());
            let mut call = self.calls.write("begin_migration").await?;
            let unfinished = migration_runs::table.filter(migration_runs::ended_at.is_null());
            call.execute(diesel::update(unfinished).set(migration_runs::ended_at.eq(now.as_millis()))).await?;
            let worn = migration_runs::table.order((migration_runs::started_at.desc(), migration_runs::id.desc()));
            let worn: Vec<String> =
                call.load(worn.select(migration_runs::id).offset(RUNS_KEPT - 1).limit(RUNS_KEPT)).await?;
            call.execute(diesel::delete(migration_runs::table.filter(migration_runs::id.eq_any(worn)))).await?;
            let run = diesel::insert_into(migration_runs::table).values((
                migration_runs::id.eq(&id),
                migration_runs::kind.eq(kind.as_str()),
                migration_runs::options.eq(options),
                migration_runs::started_by.eq(by),
                migration_runs::total.eq(total),
                migration_runs::started_at.eq(now.as_millis()),
                migration_runs::seen_at.eq(now.as_millis()),
            ));
            call.execute(run).await?;
            self.check(&mut call, lock).await?;
            self.raise(&mut call, Change::Migration).await?;
            call.commit().await?;
            let (options, started_by) = (options.to_owned(), by.to_owned());
            Ok(Run { id, kind, options, started_by, total, started_at: now, seen_at: now, ended_at: None })
        };
        self.calls.repeated(write).await
    }

    /// Continues a run that did not end.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn resume_run(&self, lock: &JobLock, run: &Run, by: &str, total: i64) -> Result<(), StoreError> {
        let write = || async {
            let mut call = self.calls.write("resume_migration").await?;
            let resumed = (
                migration_runs::started_by.eq(by),
                migration_runs::total.eq(total),
                migration_runs::seen_at.eq(self.clock.database_now().as_millis()),
            );
            call.execute(diesel::update(migration_runs::table.find(&run.id)).set(resumed)).await?;
            self.check(&mut call, lock).await?;
            self.raise(&mut call, Change::Migration).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// Notes that a run has ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn end_run(&self, lock: &JobLock, run: &Run) -> Result<(), StoreError> {
        let write = || async {
            let now = self.clock.database_now().as_millis();
            let mut call = self.calls.write("end_migration").await?;
            let ended = (migration_runs::seen_at.eq(now), migration_runs::ended_at.eq(now));
            call.execute(diesel::update(migration_runs::table.find(&run.id)).set(ended)).await?;
            self.check(&mut call, lock).await?;
            self.raise(&mut call, Change::Migration).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// The state of every tenant that any run has handled, by name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn migration_states(&self) -> Result<Vec<TenantState>, StoreError> {
        let mut call = self.calls.read("migration_states").await?;
        let rows: Vec<TenantRow> =
            call.load(migration_tenants::table.order(migration_tenants::subdomain.asc())).await?;
        call.done();
        rows.into_iter().map(TenantState::try_from).collect()
    }

    /// The state of one tenant.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn migration_state(&self, tenant: &Tenant) -> Result<Option<TenantState>, StoreError> {
        let mut call = self.calls.read("migration_state").await?;
        let row: Option<TenantRow> = call.first(migration_tenants::table.find(tenant.as_str())).await?;
        call.done();
        row.map(TenantState::try_from).transpose()
    }

    /// When a run last made progress: none has switched a tenant since.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn last_run_seen(&self) -> Result<Option<Timestamp>, StoreError> {
        let mut call = self.calls.read("last_run_seen").await?;
        let last: Option<Option<i64>> = call.first(migration_runs::table.select(max(migration_runs::seen_at))).await?;
        call.done();
        Ok(last.flatten().map(Timestamp::from_millis))
    }

    /// When a tenant was switched, where the database owns it by that switch and that was at
    /// `since` or later. `None` for a tenant that was shredded after it: upstream is not expected
    /// to have the same secrets.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn switched_since(&self, tenant: &Tenant, since: Timestamp) -> Result<Option<Timestamp>, StoreError> {
        let mut call = self.calls.read("switched_since").await?;
        let shredded_before = company_table::shredded_at.lt(migration_tenants::switched_at);
        let switched = migration_tenants::table
            .inner_join(company_table::table.on(company_table::subdomain.eq(migration_tenants::subdomain)))
            .filter(migration_tenants::subdomain.eq(tenant.as_str()))
            .filter(migration_tenants::step.eq(Step::Switched.as_str()))
            .filter(migration_tenants::switched_at.ge(since.as_millis()))
            .filter(company_table::phase.eq(Phase::Database.as_str()))
            .filter(company_table::shredded_at.is_null().or(shredded_before))
            .select(migration_tenants::switched_at);
        let at: Option<Option<i64>> = call.first(switched).await?;
        call.done();
        Ok(at.flatten().map(Timestamp::from_millis))
    }

    /// Adds to the numbers of a tenant's compared lookups since it was switched. Does nothing where
    /// another step came after that switch.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn add_compared(
        &self,
        tenant: &Tenant,
        switched_at: Timestamp,
        more: Compared,
    ) -> Result<(), StoreError> {
        // No caller waits for it, and a migration may hold the row for a while.
        let mut call = self.calls.write_within("add_compared", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
        let switched = migration_tenants::table
            .find(tenant.as_str())
            .filter(migration_tenants::step.eq(Step::Switched.as_str()))
            .filter(migration_tenants::switched_at.eq(switched_at.as_millis()));
        let added = diesel::update(switched).set((
            migration_tenants::shadow_compared.eq(migration_tenants::shadow_compared + more.compared),
            migration_tenants::shadow_different.eq(migration_tenants::shadow_different + more.different),
            more.different_at.map(|at| migration_tenants::shadow_different_at.eq(at.as_millis())),
        ));
        call.execute(added).await?;
        call.commit().await
    }

    /// Stores the state of these tenants, all at once, and notes progress of their run.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn keep_states(&self, lock: &JobLock, states: &[TenantState]) -> Result<(), StoreError> {
        let write = || async {
            let mut call =
                self.calls.write_within("keep_migration_states", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
            self.keep_states_in(&mut call, states).await?;
            self.check(&mut call, lock).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// Switches the phases of these tenants in one transaction, each unless it is refused, and
    /// stores their states; outcomes are in the order in which the tenants are given.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn switch(&self, lock: &JobLock, switches: &[Switch]) -> Result<Vec<Result<(), Refusal>>, StoreError> {
        self.calls.repeated(|| self.switch_once(lock, switches)).await
    }

    async fn switch_once(&self, lock: &JobLock, switches: &[Switch]) -> Result<Vec<Result<(), Refusal>>, StoreError> {
        let mut call = self.calls.write_within("switch_phases", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
        let (places, ordered): (Vec<usize>, Vec<&Switch>) =
            companies::in_order(switches, |switch| &switch.state.tenant).into_iter().unzip();
        let handovers = ordered.iter().map(|Switch { expected, to, state }| OwnershipTransfer {
            tenant: &state.tenant,
            expected: *expected,
            to: *to,
        });
        let handovers: Vec<OwnershipTransfer<'_>> = handovers.collect();
        let outcomes = ownership::hand_over(&mut call, &handovers, &self.clock).await?;
        let done = ordered.iter().zip(&outcomes).filter(|(_, outcome)| outcome.is_ok());
        let done: Vec<TenantState> = done.map(|(switch, _)| switch.state.clone()).collect();
        self.keep_states_in(&mut call, &done).await?;
        self.check(&mut call, lock).await?;
        if !done.is_empty() {
            let change = self.raise(&mut call, Change::Tenants).await?;
            let moved: Vec<&Tenant> = done.iter().map(|state| &state.tenant).collect();
            ownership::note_change(&mut call, &moved, change).await?;
        }
        call.commit().await?;
        Ok(companies::as_given(places.into_iter().zip(outcomes).collect()))
    }

    /// The secrets that the database wrote as the owner and upstream lacks: the newest versions
    /// that were written or deleted here, opened.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn own_writes(&self, tenant: &Tenant) -> Result<Vec<Own>, StoreError> {
        let own = self.own_writes_once(tenant).await?;
        for Own { held, .. } in &own {
            if self.may_open_now(held).await {
                return self.own_writes_once(tenant).await;
            }
        }
        Ok(own)
    }

    async fn own_writes_once(&self, tenant: &Tenant) -> Result<Vec<Own>, StoreError> {
        let mut call = self.calls.read("own_writes").await?;
        let Some(company) = companies::find(&mut call, tenant).await? else {
            call.done();
            return Ok(Vec::new());
        };
        let rows = secrets::all(&mut call, &company.id).await?;
        let chain = self.chain(&mut call, &company).await?;
        call.done();
        let own = rows.iter().filter(|row| row.is_own());
        own.map(|row| Ok(Own { key: row.key()?, held: row.held(&company, &chain)? })).collect()
    }

    pub(super) async fn keep_states_in(&self, call: &mut Call<'_>, states: &[TenantState]) -> Result<(), StoreError> {
        let switched = switched_before(call, states).await?;
        let row = |(_, state): (usize, &TenantState)| match switched.get(&state.tenant) {
            Some(before) => StateRow::from(&state.after(before)),
            None => StateRow::from(state),
        };
        let rows: Vec<StateRow> = companies::in_order(states, |state| &state.tenant).into_iter().map(row).collect();
        let mut rows = rows.into_iter().peekable();
        while rows.peek().is_some() {
            call.keep_states(rows.by_ref().take(ROWS).collect()).await?;
        }
        if let Some(state) = states.last() {
            let seen = diesel::update(migration_runs::table.find(&state.run))
                .set(migration_runs::seen_at.eq(state.updated_at.as_millis()));
            call.execute(seen).await?;
        }
        Ok(())
    }
}

/// The stored states of those tenants that were switched and are still the database's, where the
/// new state has no switch.
async fn switched_before(
    call: &mut Call<'_>,
    states: &[TenantState],
) -> Result<HashMap<Tenant, TenantState>, StoreError> {
    let silent = states.iter().filter(|state| state.switched_at.is_none() && state.step != Step::RolledBack);
    let names: Vec<&str> = silent.map(|state| state.tenant.as_str()).collect();
    let mut found = HashMap::new();
    for names in names.chunks(ROWS) {
        let of_database = company_table::table
            .filter(company_table::phase.eq(Phase::Database.as_str()))
            .filter(company_table::subdomain.eq_any(names))
            .select(company_table::subdomain);
        let owned: Vec<String> = call.load(of_database).await?;
        let switched = migration_tenants::table
            .filter(migration_tenants::switched_at.is_not_null())
            .filter(migration_tenants::subdomain.eq_any(owned));
        let rows: Vec<TenantRow> = call.load(switched).await?;
        for row in rows {
            let state = TenantState::try_from(row)?;
            found.insert(state.tenant.clone(), state);
        }
    }
    Ok(found)
}
