//! A run: takes tenants over a batch at a time, proves that nothing was lost, and only
//! then switches their owner.
//!
//! For each tenant, in this order:
//!
//! 1. The origin is read, and its content is sealed and stored in one transaction. This
//!    serves nobody yet: the phase still decides who answers.
//! 2. The origin is read a second time, from the beginning. Of this read only keyed
//!    digests are kept.
//! 3. The rows are read back from the database and opened, and every name and value is
//!    compared with the second read, both ways.
//! 4. The phase is switched, in a transaction that is refused if anything was written to
//!    the tenant, or invalidated, since it was stored, or if another read of the folder
//!    replaced the compared rows, or if a write to upstream is under way just
//!    then. See [`Database::switch`](crate::tiers::database::Database::switch).
//!
//! A tenant for which one of these steps fails is taken again from the beginning, a few
//! times, and is then left as it was. Its stored rows do no harm: while upstream
//! owns the tenant, a copy is only ever served as a copy.
//!
//! A crash at any point leaves every tenant either switched, with its row saying so in the
//! same transaction, or owned as before. The same command skips the former and takes the
//! latter from the beginning, which stores no second version of a value that is there.

mod store;
mod switch;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use futures_util::stream::{FuturesUnordered, StreamExt as _};

use super::{
    origin::{Content, OriginError, ProblemKind},
    selection::Selection,
    transfer::{Rows, Takes, Transfer, patiently},
};
use crate::{
    clock::Timestamp,
    phase::Phase,
    sealing::{Differences, Digests},
    secret::SecretKey,
    tenant::Tenant,
    tiers::database::{Company, Expected, Holder, Instance, JobLock, Run, RunKind, Step, StoreError, TenantState},
};

/// How often a tenant that changes meanwhile is taken again.
const ATTEMPTS: usize = 12;

/// The pause before a tenant is taken again: the first, the longest. In all they last as long
/// as a write whose instance was killed in the middle of it stays registered.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// How long running instances may take to leave a migration its share of the budget.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(10);

/// How often to look whether another process has recorded its run, and the pause in
/// between.
const LOOKS: u32 = 10;
const RUN_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The most bytes of values that one transaction stores, or that are read back at once; a single
/// tenant may have more.
const MOST_BYTES: usize = 4 << 20;

/// Rounds that are under way at once where the origin is quick: while one is stored, others are
/// read and compared. They share no tenants, and each stores and switches in transactions of
/// its own.
const ROUNDS: usize = 3;

/// A round that takes longer makes later rounds smaller, and only one of them runs at a time. So
/// no more than this, or than [`FIRST_ROUND`] takes, lies between the comparison and the
/// switch, however few calls the upstream budget allows.
const QUICK: Duration = Duration::from_secs(2);

/// Tenants of the first round, and of the smallest.
const FIRST_ROUND: usize = 25;

/// Tenants whose contents are read at once, of a round that may have many more: the contents
/// are stored as soon as they have [`MOST_BYTES`].
const READ_AT_ONCE: usize = 25;

/// Tenants whose rows are read at once where little is kept of each.
const LOOKED_AT: usize = 1000;

/// The options of a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The phase to switch to; `None` where tenants stay with their owner.
    pub to: Option<Phase>,
    /// How much is compared.
    pub verify: Verify,
    /// Tenants that are processed at once.
    pub batch: usize,
    /// Problems that do not prevent a tenant from being taken over as it is served today.
    pub accept: BTreeSet<ProblemKind>,
    /// Identifies the origin, where a command names one; no password, no key.
    pub origin: Option<String>,
}

/// How much is compared before a switch. Names and counts always are, all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Every value.
    Full,
    /// This number of values of each tenant, drawn at random.
    Sample(usize),
}

/// Everything that a run needs.
pub struct Runner {
    /// The source and the target of the migration.
    pub transfer: Transfer,
    /// The options of this run.
    pub options: Options,
    /// The name of this process, shown to operators.
    pub by: String,
}

/// Reports while a run goes on.
#[derive(Debug)]
pub enum Progress<'a> {
    /// It begins, or is resumed.
    Begun {
        /// Its id.
        run: &'a str,
        /// Tenants that it processes, including those that are done.
        total: usize,
        /// Tenants that are done from before.
        done: usize,
        /// Tenants that are there already.
        already: usize,
    },
    /// A note for the operator.
    Note(String),
    /// A tenant is done, or has failed.
    Ended(&'a Outcome),
}

/// The outcome for a tenant. Kept for every tenant until the run ends, so it is small.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The tenant.
    pub tenant: Tenant,
    /// How far it came; [`Step::Failed`] and [`Step::RolledBack`] have a failure.
    pub step: Step,
    /// Secrets that were taken over.
    pub secrets: i64,
    /// A keyed digest of their names and values.
    pub digest: Option<Box<str>>,
    /// When its secrets were last found to be equal on both sides.
    pub verified_at: Option<Timestamp>,
    /// When its phase was switched.
    pub switched_at: Option<Timestamp>,
    /// Why it was not migrated.
    pub failure: Option<Box<Failure>>,
}

/// Why a tenant was not migrated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// A word, for machines.
    pub reason: Reason,
    /// A sentence, for people. Names secrets, never a value.
    pub error: String,
}

/// Why a tenant was not migrated, as a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Another tier owns it.
    Owned,
    /// Upstream refuses its folder.
    Denied,
    /// Its folder is gone.
    Missing,
    /// It has an entry that cannot be taken over.
    Problem,
    /// The origin gave no answer.
    Origin,
    /// The database gave no answer, or refused it.
    Database,
    /// A stored value does not open.
    Unreadable,
    /// It kept changing.
    Changing,
    /// The stored values differ from the origin's.
    Different,
    /// It was switched, and then given back while the run was interrupted.
    RolledBack,
}

impl Reason {
    /// The word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Owned => "owned",
            Self::Denied => "denied",
            Self::Missing => "missing",
            Self::Problem => "problem",
            Self::Origin => "origin",
            Self::Database => "database",
            Self::Unreadable => "unreadable",
            Self::Changing => "changing",
            Self::Different => "different",
            Self::RolledBack => "rolled_back",
        }
    }
}

/// The result of a run.
#[derive(Debug)]
pub struct Summary {
    /// The run.
    pub run: Run,
    /// Every tenant that it processed, by name, including those from before a crash.
    pub outcomes: Vec<Outcome>,
    /// Tenants that were there already, and were not touched.
    pub already: Vec<Tenant>,
    /// Names at the origin that cannot be a tenant's.
    pub unusable: Vec<String>,
}

/// Why a run did not come to its end. The same command goes on with it.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Another process is doing it.
    #[error(
        "{what} is under way in {}, which has until {} to say that it goes on; 'secretier migrate status' shows how far \
         it is. Only one goes on at a time",
        .holder.shown, .holder.until.to_rfc3339()
    )]
    Busy {
        /// The migration by its id, where that is known.
        what: String,
        /// Its process.
        holder: Holder,
    },
    /// Another process has taken over.
    #[error(
        "another process has taken over this migration, because this one was not heard of for a while; what this one had \
         not finished is undone. 'secretier migrate status' shows how far it is, and the same command goes on once the \
         other has ended"
    )]
    TakenOver,
    /// The existing tenants cannot be listed.
    #[error("the tenants to migrate cannot be listed")]
    List(#[source] OriginError),
    /// Tenants were named that do not exist.
    #[error("there are no such tenants: {}", .0.join(", "))]
    Unknown(Vec<String>),
    /// The origin does not answer any more.
    #[error("the origin does not answer any more; run the same command again to go on")]
    Origin(#[source] OriginError),
    /// The database does not answer any more.
    #[error("the database tier failed; run the same command again to go on")]
    Store(#[source] StoreError),
}

impl From<StoreError> for RunError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::LeaseLost => Self::TakenOver,
            error => Self::Store(error),
        }
    }
}

/// A run under way, and the job lock that it holds.
struct UnderWay<'t> {
    run: Run,
    lock: &'t JobLock,
    came: Mutex<Came<'t>>,
}

/// The outcomes so far, and the callback for progress.
struct Came<'t> {
    outcomes: Vec<Outcome>,
    told: &'t mut (dyn FnMut(Progress<'_>) + Send),
}

impl UnderWay<'_> {
    fn came(&self, notes: Vec<String>, ended: Vec<Outcome>) {
        let mut came = self.came.lock().unwrap_or_else(PoisonError::into_inner);
        for note in notes {
            (came.told)(Progress::Note(note));
        }
        for outcome in ended {
            (came.told)(Progress::Ended(&outcome));
            came.outcomes.push(outcome);
        }
    }
}

impl Runner {
    /// Takes tenants over, or resumes an unfinished run with the same options.
    ///
    /// # Errors
    /// [`RunError`]; every tenant has one owner, and its secrets are there.
    pub async fn run(
        &self,
        kind: RunKind,
        selection: &Selection,
        told: &mut (dyn FnMut(Progress<'_>) + Send),
    ) -> Result<Summary, RunError> {
        let database = &self.transfer.database;
        let lock = match database.migration_lock(&self.by).await? {
            Ok(lock) => lock,
            Err(holder) => return Err(self.busy(holder).await),
        };
        let outcome = database.renewing(&lock, self.run_under(&lock, kind, selection, told)).await;
        database.end_job_lock(lock).await;
        outcome
    }

    async fn run_under(
        &self,
        lock: &JobLock,
        kind: RunKind,
        selection: &Selection,
        told: &mut (dyn FnMut(Progress<'_>) + Send),
    ) -> Result<Summary, RunError> {
        let listed = self.transfer.origin.tenants().await.map_err(RunError::List)?;
        let mut chosen = selection.choose(&listed.tenants).map_err(RunError::Unknown)?;
        // Each once: work on several tenants in one transaction is keyed by their names.
        chosen.sort_unstable();
        chosen.dedup();
        let unusable = if selection.has_every_tenant() { listed.unusable } else { Vec::new() };
        let (run, done, todo, already) = self.begin(lock, kind, selection, chosen).await?;
        told(Progress::Begun {
            run: &run.id,
            total: done.len() + todo.len(),
            done: done.len(),
            already: already.len(),
        });
        let outcomes: Vec<Outcome> = done.into_iter().map(|state| self.done_before(state)).collect();
        if !todo.is_empty() {
            // They leave us our share of the upstream budget; one that is cut off just now
            // uses more than its new share, but no more than before.
            self.await_instances().await?;
        }
        let under_way = UnderWay { run, lock, came: Mutex::new(Came { outcomes, told }) };
        self.take_all(&under_way, todo).await?;
        let UnderWay { run, came, .. } = under_way;
        let Came { mut outcomes, .. } = came.into_inner().unwrap_or_else(PoisonError::into_inner);
        outcomes.sort_by(|a, b| a.tenant.cmp(&b.tenant));
        patiently(|| self.transfer.database.end_run(lock, &run)).await?;
        Ok(Summary { run, outcomes, already, unusable })
    }

    async fn take_all(&self, run: &UnderWay<'_>, todo: Vec<Tenant>) -> Result<(), RunError> {
        let most = self.options.batch.max(1);
        let (mut size, mut is_quick) = (FIRST_ROUND.min(most), false);
        let mut todo = VecDeque::from(todo);
        let mut rounds = FuturesUnordered::new();
        let mut failed = None;
        loop {
            let at_once = if is_quick { ROUNDS } else { 1 };
            while rounds.len() < at_once && !todo.is_empty() && failed.is_none() {
                // Asked anew each time: an origin may find that it cannot read all at once.
                let size = if self.transfer.origin.reads_all_at_once() { todo.len() } else { size };
                let round = todo.drain(..size.min(todo.len())).collect();
                rounds.push(async move {
                    let began = std::time::Instant::now();
                    self.round(run, round).await.map(|postponed| (postponed, began.elapsed()))
                });
            }
            match rounds.next().await {
                Some(Ok((postponed, took))) => {
                    todo.extend(postponed);
                    is_quick = took <= QUICK;
                    size = if is_quick { (size * 2).min(most) } else { (size / 2).max(FIRST_ROUND.min(most)) };
                }
                // Rounds beside it may run to their end, and no other is begun.
                Some(Err(error)) => failed = failed.or(Some(error)),
                None => return failed.map_or(Ok(()), Err),
            }
        }
    }

    /// The run that holds the lock. A run is recorded only once it has listed its tenants.
    async fn busy(&self, holder: Holder) -> RunError {
        for _ in 0..LOOKS {
            let runs = self.transfer.database.runs().await.unwrap_or_default();
            let run = runs.into_iter().find(|run| run.ended_at.is_none() && run.started_by == holder.shown);
            if let Some(run) = run {
                return RunError::Busy { what: format!("the migration {}", run.id), holder };
            }
            tokio::time::sleep(RUN_CHECK_INTERVAL).await;
        }
        RunError::Busy { what: "a migration that is just beginning".to_owned(), holder }
    }

    /// Finds out which tenants are done from before, which are left, and which were there
    /// already.
    async fn begin(
        &self,
        lock: &JobLock,
        kind: RunKind,
        selection: &Selection,
        chosen: Vec<Tenant>,
    ) -> Result<(Run, Vec<TenantState>, Vec<Tenant>, Vec<Tenant>), RunError> {
        let options = self.identity(selection);
        let unfinished = self.transfer.database.runs().await?.into_iter().find(|run| run.ended_at.is_none());
        let resumed = unfinished.filter(|run| run.kind == kind && run.options == options);
        let mut done = HashMap::new();
        if let Some(run) = &resumed {
            let states = self.transfer.database.migration_states().await?.into_iter();
            done = states
                .filter(|state| state.run == run.id && self.is_final(state.step))
                .map(|state| (state.tenant.clone(), state))
                .collect();
        }
        let (mut todo, mut already, mut before) = (Vec::new(), Vec::new(), Vec::new());
        for chosen in chosen.chunks(LOOKED_AT) {
            let companies = self.transfer.database.companies_of(chosen).await?;
            for tenant in chosen {
                match done.remove(tenant) {
                    Some(state) => before.push(state),
                    None if self.transfer.is_there(tenant, companies.get(tenant), self.options.to) => {
                        already.push(tenant.clone());
                    }
                    None => todo.push(tenant.clone()),
                }
            }
        }
        let total = i64::try_from(before.len() + todo.len()).unwrap_or(i64::MAX);
        let run = match resumed {
            Some(run) => {
                self.transfer.database.resume_run(lock, &run, &self.by, total).await?;
                run
            }
            None => self.transfer.database.begin_run(lock, kind, &options, &self.by, total).await?,
        };
        Ok((run, before, todo, already))
    }

    /// The outcome of a tenant that is done from before.
    fn done_before(&self, state: TenantState) -> Outcome {
        let failure = (state.step == Step::RolledBack).then(|| Failure {
            reason: Reason::RolledBack,
            error: "it was given back to upstream since this run switched it; another run takes it again".to_owned(),
        });
        Outcome { failure: failure.map(Box::new), ..Outcome::of(state) }
    }

    /// Identifies the command: by everything but its speed. A tenant that another command has done
    /// is not done for this one: the other took from elsewhere, or compared less.
    fn identity(&self, selection: &Selection) -> String {
        let Options { to, accept, verify, origin, batch: _ } = &self.options;
        let accept: Vec<_> = accept.iter().map(|kind| kind.as_str()).collect();
        let to = to.map(Phase::as_str);
        let sample = match verify {
            Verify::Full => None,
            Verify::Sample(count) => Some(count),
        };
        let overwrite = matches!(self.transfer.takes, Takes::Rows { overwrite: true, .. });
        serde_json::json!({
            "tenants": selection, "to": to, "accept": accept, "sample": sample, "origin": origin, "overwrite": overwrite
        })
        .to_string()
    }

    fn is_final(&self, step: Step) -> bool {
        match step {
            Step::Switched => true,
            Step::Verified => self.options.to.is_none() || matches!(self.transfer.takes, Takes::Rows { .. }),
            // Since then an operator has decided otherwise, and that is not undone here.
            Step::RolledBack | Step::Archived => true,
            // A failed tenant is tried again.
            Step::Stored | Step::Failed => false,
        }
    }

    /// Processes a round of tenants, and again those that changed meanwhile. Returns those that are
    /// to be read in smaller rounds.
    async fn round(&self, run: &UnderWay<'_>, tenants: Vec<Tenant>) -> Result<Vec<Tenant>, RunError> {
        let mut left = tenants;
        let mut postponed = Vec::new();
        let mut pause = FIRST_PAUSE;
        for attempt in 1..=ATTEMPTS {
            let mut ended = Vec::new();
            let again = self.attempt(run, left, &mut ended, &mut postponed).await?;
            let is_last = attempt == ATTEMPTS;
            let mut wait = pause;
            left = Vec::with_capacity(again.len());
            for Again { tenant, failure, not_before } in again {
                if is_last {
                    ended.push(Outcome::failed(tenant, failure));
                    continue;
                }
                wait = wait.max(not_before);
                left.push(tenant);
            }
            let failed: Vec<TenantState> = ended.iter().filter_map(|ended| self.failed_state(run, ended)).collect();
            if !failed.is_empty() {
                patiently(|| self.transfer.database.keep_states(run.lock, &failed)).await?;
            }
            run.came(self.transfer.origin.told(), ended);
            if left.is_empty() {
                break;
            }
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(postponed)
    }

    /// Processes these tenants once. Returns those that are to be taken again.
    async fn attempt(
        &self,
        run: &UnderWay<'_>,
        tenants: Vec<Tenant>,
        ended: &mut Vec<Outcome>,
        postponed: &mut Vec<Tenant>,
    ) -> Result<Vec<Again>, RunError> {
        let mut again = Vec::new();
        let stored = self.store(run, tenants, ended, &mut again, postponed).await?;
        let verified = self.verify(run, stored, ended, &mut again, postponed).await?;
        self.switch(run, verified, ended, &mut again).await?;
        Ok(again)
    }

    /// The outcome for a tenant that the database owns by now: this run switched it, but a crash or
    /// an outage kept the answer from us, or somebody else did.
    async fn owned(&self, run: &UnderWay<'_>, tenant: Tenant) -> Result<Outcome, RunError> {
        let state = patiently(|| self.transfer.database.migration_state(&tenant)).await?;
        Ok(match state.filter(|state| state.run == run.run.id && state.step == Step::Switched) {
            Some(state) => Outcome::of(state),
            None => {
                let error = "somebody else has given it to the database meanwhile".to_owned();
                Outcome::failed(tenant, Failure { reason: Reason::Changing, error })
            }
        })
    }

    /// The recorded state of a tenant that was not migrated.
    fn failed_state(&self, run: &UnderWay<'_>, ended: &Outcome) -> Option<TenantState> {
        let failure = ended.failure.as_ref()?;
        Some(TenantState {
            reason: Some(failure.reason.as_str().to_owned()),
            error: Some(failure.error.clone()),
            ..TenantState::new(ended.tenant.clone(), &run.run.id, Step::Failed, self.transfer.clock.database_now())
        })
    }

    /// Waits for a while until the running instances know that a migration goes on.
    async fn await_instances(&self) -> Result<(), RunError> {
        let changes = patiently(|| self.transfer.database.changes()).await?;
        let has_followed = |instance: &Instance| instance.changes >= changes;
        self.transfer.database.await_instances(FOLLOWED_WITHIN, has_followed).await?;
        Ok(())
    }
}

/// A tenant whose content is stored in the database, as the switch expects to find it.
struct Stored {
    tenant: Tenant,
    expected: Expected,
    phase_before: Option<Phase>,
}

impl Stored {
    fn of(company: &Company) -> Self {
        let (tenant, expected) = (company.tenant.clone(), Expected::of_copy(company));
        Self { tenant, expected, phase_before: company.phase }
    }
}

/// A tenant whose rows are equal to the origin's content.
struct Verified {
    stored: Stored,
    secrets: usize,
    digest: String,
}

/// A tenant that is to be taken again, with the failure to report if it is not.
struct Again {
    tenant: Tenant,
    failure: Failure,
    not_before: Duration,
}

impl Again {
    fn changing(tenant: Tenant) -> Self {
        let error = "it was written to each time it was about to be switched".to_owned();
        Self { tenant, failure: Failure { reason: Reason::Changing, error }, not_before: Duration::ZERO }
    }

    fn different(tenant: Tenant, differences: &Differences) -> Self {
        let failure = Failure { reason: Reason::Different, error: describe(differences) };
        Self { tenant, failure, not_before: Duration::ZERO }
    }
}

impl Outcome {
    fn of(state: TenantState) -> Self {
        let TenantState { tenant, step, secrets, digest, verified_at, switched_at, .. } = state;
        Self { tenant, step, secrets, digest: digest.map(String::into), verified_at, switched_at, failure: None }
    }

    fn failed(tenant: Tenant, failure: Failure) -> Self {
        let failure = Some(Box::new(failure));
        Self { tenant, step: Step::Failed, secrets: 0, digest: None, verified_at: None, switched_at: None, failure }
    }
}

/// Why values that are in the database are not replaced.
pub(super) fn in_the_way(keys: &[SecretKey]) -> String {
    format!(
        "the database has another value of {}, or has deleted it; --overwrite replaces what is there, as a new version",
        names(keys)
    )
}

/// The differences between two sides, as a sentence that names secrets and no values.
#[must_use]
pub fn describe(differences: &Differences) -> String {
    let Differences { only_origin, only_database, different } = differences;
    let parts =
        [("not in the database", only_origin), ("only in the database", only_database), ("another value", different)];
    let parts = parts.iter().filter(|(_, keys)| !keys.is_empty());
    parts.map(|(what, keys)| format!("{what}: {}", names(keys))).collect::<Vec<_>>().join("; ")
}

pub(super) fn names(keys: &[SecretKey]) -> String {
    const TOLD: usize = 10;
    let mut told: Vec<String> = keys.iter().take(TOLD).map(|key| format!("{:?}", key.as_str())).collect();
    if keys.len() > TOLD {
        told.push(format!("{} more", keys.len() - TOLD));
    }
    told.join(", ")
}

/// The digests of the rows, if all of them opened.
fn opened(rows: Rows) -> Result<Digests, Failure> {
    match rows.unreadable {
        None => Ok(rows.digests),
        Some((key, error)) => {
            let error = format!("what was stored of {:?} does not open: {error}", key.as_str());
            Err(Failure { reason: Reason::Unreadable, error })
        }
    }
}

/// Chunks with at most these numbers of tenants and bytes; a single tenant may have more bytes.
fn by_size<T>(tenants: Vec<T>, most: usize, size: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let mut chunks: Vec<Vec<T>> = Vec::new();
    let mut bytes = 0;
    for tenant in tenants {
        let size = size(&tenant);
        match chunks.last_mut() {
            Some(chunk) if chunk.len() < most && bytes + size <= MOST_BYTES => {
                bytes += size;
                chunk.push(tenant);
            }
            _ => {
                bytes = size;
                chunks.push(vec![tenant]);
            }
        }
    }
    chunks
}

fn bytes_of(content: &Content) -> usize {
    content.snapshot.secrets.iter().map(|secret| secret.value.len()).sum()
}
