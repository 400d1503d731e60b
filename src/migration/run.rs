//! A run: takes tenants over a batch at a time, proves that nothing was lost, and only
//! then switches who owns them.
//!
//! For each tenant, in this order:
//!
//! 1. The origin is read, and what it has is sealed and stored in one transaction. Nobody
//!    is served from it by that: the phase still says who answers.
//! 2. The origin is read a second time, from the beginning. Of this reading only keyed
//!    digests are kept.
//! 3. The rows are read back from the database and opened, and every name and value is
//!    compared with the second reading, both ways.
//! 4. The phase is switched, in a transaction that is refused if anything was written to
//!    the tenant, or invalidated, since it was stored, or if another reading of the folder
//!    took the place of what was compared, or if upstream is being told of a write just
//!    then. See [`Database::switch`](crate::tiers::database::Database::switch).
//!
//! A tenant for which one of these does not hold is taken again from the beginning, a few
//! times, and is then left as it was. What was stored of it harms nobody: while upstream
//! owns the tenant, a copy is only ever served as one.
//!
//! A crash at any point leaves every tenant either switched, with its row saying so in the
//! same transaction, or owned as before. The same command skips the former and takes the
//! latter from the beginning, which stores no second version of a value that is there.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use futures_util::stream::{FuturesUnordered, StreamExt as _};

use super::{
    Differences, Digests, folders,
    origin::{Content, OriginError, ProblemKind},
    selection::Selection,
    transfer::{HAS_FOLDER, Rows, Takes, Transfer, patiently},
};
use crate::{
    clock::Timestamp,
    log,
    phase::Phase,
    secret::{SecretKey, Writer},
    tenant::Tenant,
    tiers::{
        database::{
            Began, Company, Expected, Holder, Import, ImportOutcome, Instance, JobLock, Refusal, Run, RunKind, Step,
            StoreError, StoreOutcome, Switch, Taken, TenantState,
        },
        upstream::{Lane, UpstreamError},
    },
};

/// How often a tenant is taken that changes under our hands.
const ATTEMPTS: usize = 12;

/// The pause before a tenant is taken again, at first and at most: in all as long as a
/// write takes whose instance was killed in the middle of it.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// How long running instances may take to leave a migration its share of the budget.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(10);

/// How often it is looked whether another process has written down its run, and the pause in
/// between.
const LOOKS: u32 = 10;
const RUN_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The most bytes of values that one transaction stores, or that are read back at once, but
/// for a single tenant.
const MOST_BYTES: usize = 4 << 20;

/// Rounds that are under way at once where the origin is quick: while one is stored, others are
/// read and compared. Their tenants have nothing in common, and each stores and switches in
/// transactions of its own.
const ROUNDS: usize = 3;

/// A round that takes longer makes those after it smaller, and one of them goes on at a time. So
/// no more than this, or than [`FIRST_ROUND`] takes, lies between what was compared and the
/// switch, however few calls the upstream budget allows.
const QUICK: Duration = Duration::from_secs(2);

/// Tenants of the first round, and of the smallest.
const FIRST_ROUND: usize = 25;

/// Tenants whose contents are read at once, of a round that may have many more: what was read
/// is stored as soon as it is [`MOST_BYTES`].
const READ_AT_ONCE: usize = 25;

/// Tenants whose rows are asked for at once where only little is kept of each.
const LOOKED_AT: usize = 1000;

/// What a run does with each tenant.
#[derive(Debug, Clone)]
pub struct Options {
    /// The phase to switch to; nothing where tenants stay with their owner.
    pub to: Option<Phase>,
    /// How much is compared.
    pub verify: Verify,
    /// Tenants that are taken on at once.
    pub batch: usize,
    /// Problems that do not keep a tenant from being taken over as it is served today.
    pub accept: BTreeSet<ProblemKind>,
    /// What tells this origin from another, where a command names it; no password, no key.
    pub origin: Option<String>,
}

/// How much is compared before a switch. Names and counts always are, all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Every value.
    Full,
    /// So many values of each tenant, drawn at random.
    Sample(usize),
}

/// What a run works with.
pub struct Runner {
    /// Where tenants come from and where they go.
    pub transfer: Transfer,
    /// What is done.
    pub options: Options,
    /// The process, for those who look.
    pub by: String,
}

/// What is told while a run goes on.
#[derive(Debug)]
pub enum Progress<'a> {
    /// It begins, or goes on.
    Begun {
        /// Its id.
        run: &'a str,
        /// Tenants that it takes on, those included that are done.
        total: usize,
        /// Tenants that are done from before.
        done: usize,
        /// Tenants that are there already.
        already: usize,
    },
    /// Something that people want to know.
    Note(String),
    /// A tenant came to its end.
    Ended(&'a Outcome),
}

/// What became of a tenant. Kept of every tenant until the run ends, so it is small.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Whose it is.
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
    /// Somebody else owns it.
    Owned,
    /// Upstream refuses its folder.
    Denied,
    /// Its folder is gone.
    Missing,
    /// It has something that cannot be taken over.
    Problem,
    /// The origin gave no answer.
    Origin,
    /// The database gave no answer, or refused it.
    Database,
    /// What is stored does not open.
    Unreadable,
    /// It kept changing.
    Changing,
    /// What is stored is not what the origin has.
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

/// What a run came to.
#[derive(Debug)]
pub struct Summary {
    /// The run.
    pub run: Run,
    /// Every tenant that it took on, by name, those from before a crash included.
    pub outcomes: Vec<Outcome>,
    /// Tenants that were there already, and were left alone.
    pub already: Vec<Tenant>,
    /// Names at the origin that cannot be a tenant's.
    pub unusable: Vec<String>,
}

/// Why a run did not come to its end. The same command goes on with it.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Another process is at it.
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
    /// The tenants that are there cannot be told.
    #[error("the tenants to migrate cannot be listed")]
    List(#[source] OriginError),
    /// Tenants were named that are not there.
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

/// A run under way, and the turn that it has.
struct UnderWay<'t> {
    run: Run,
    lock: &'t JobLock,
    came: Mutex<Came<'t>>,
}

/// What a run has come to so far, and who is told.
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
    /// Takes tenants over, or goes on with a run of the same options that did not end.
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
        // Each once: what is done for several in one transaction is done by their names.
        chosen.sort_unstable();
        chosen.dedup();
        let unusable = if selection.is_all() { listed.unusable } else { Vec::new() };
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
            // uses more than it should, and no more than it did before.
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
                // Those beside it may come to their end, and no other is begun.
                Some(Err(error)) => failed = failed.or(Some(error)),
                None => return failed.map_or(Ok(()), Err),
            }
        }
    }

    /// Who runs. One that has just begun is not written down until it has listed its tenants.
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

    /// Finds out what is to be done: what is done from before, what is left, and what was
    /// there already.
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

    /// What became of a tenant that is done from before.
    fn done_before(&self, state: TenantState) -> Outcome {
        let failure = (state.step == Step::RolledBack).then(|| Failure {
            reason: Reason::RolledBack,
            error: "it was given back to Infisical since this run switched it; another run takes it again".to_owned(),
        });
        Outcome { failure: failure.map(Box::new), ..Outcome::of(state) }
    }

    /// What makes a command the same one: not how fast it goes. What was done by another is
    /// not what this one is to do: it took from elsewhere, or compared less.
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
            // Since then somebody has decided otherwise, and that is not undone here.
            Step::RolledBack | Step::Archived => true,
            // What failed is tried again.
            Step::Stored | Step::Failed => false,
        }
    }

    /// Takes a round of tenants, those again that changed meanwhile. Gives those that are
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

    /// Takes these tenants once. Gives those that are to be taken again.
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

    /// Reads the origin, and stores what it has.
    async fn store(
        &self,
        run: &UnderWay<'_>,
        tenants: Vec<Tenant>,
        ended: &mut Vec<Outcome>,
        again: &mut Vec<Again>,
        postponed: &mut Vec<Tenant>,
    ) -> Result<Vec<Stored>, RunError> {
        // Before the origin is read: what is written to a tenant from here on raises its
        // generation, and then neither the store nor the switch is done.
        let mut companies = HashMap::with_capacity(tenants.len());
        for some in tenants.chunks(LOOKED_AT) {
            companies.extend(patiently(|| self.transfer.database.companies_of(some)).await?);
        }
        let mut open = Vec::new();
        for tenant in tenants {
            let own = companies.get(&tenant).and_then(|company| company.phase);
            let refusal = self.transfer.refusal(&tenant, own, self.options.to);
            if let Some(error) = refusal {
                ended.push(Outcome::failed(tenant, Failure { reason: Reason::Owned, error }));
            } else if matches!(self.transfer.takes, Takes::Folders) && own == Some(Phase::Database) {
                ended.push(self.owned(run, tenant).await?);
            } else {
                open.push(tenant);
            }
        }
        let (mut stored, mut superseded) = (Vec::with_capacity(open.len()), Vec::new());
        let mut parts = self.parts(open).into_iter().peekable();
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(part) = parts.next() {
            let contents = self.transfer.origin.read(&part).await;
            for (tenant, content) in part.into_iter().zip(contents) {
                if matches!(content, Err(OriginError::TooMany)) {
                    postponed.push(tenant);
                    continue;
                }
                match self.usable(run, &tenant, content).await? {
                    Ok(content) => {
                        bytes += bytes_of(&content);
                        taken.push((tenant, content));
                    }
                    Err(failure) => ended.push(Outcome::failed(tenant, failure)),
                }
            }
            if bytes < MOST_BYTES && parts.peek().is_some() {
                continue;
            }
            bytes = 0;
            for chunk in by_size(std::mem::take(&mut taken), self.options.batch, |(_, content)| bytes_of(content)) {
                let outcomes = self.store_chunk(run, &chunk, &companies).await?;
                for ((tenant, _), outcome) in chunk.into_iter().zip(outcomes) {
                    match outcome {
                        Ok(StoreOutcome::Stored { company, .. }) => stored.push(Stored::of(&company)),
                        Ok(StoreOutcome::Superseded) => superseded.push(tenant),
                        Err(failure) => ended.push(Outcome::failed(tenant, failure)),
                    }
                }
            }
        }
        // Where the proxy has stored a later reading than ours, that is as good: whoever
        // stored it, it is compared.
        let now = patiently(|| self.transfer.database.companies_of(&superseded)).await?;
        for tenant in superseded {
            match now.get(&tenant).filter(|company| company.phase != Some(Phase::Database)) {
                Some(company) => stored.push(Stored::of(company)),
                None => again.push(Again::changing(tenant)),
            }
        }
        Ok(stored)
    }

    /// Those that are read by one call of the origin: few, where it holds what it has read of
    /// all of them, and else all.
    fn parts<T>(&self, tenants: Vec<T>) -> Vec<Vec<T>> {
        let most = if self.transfer.origin.reads_all_at_once() { usize::MAX } else { READ_AT_ONCE };
        let mut tenants = tenants.into_iter().peekable();
        let mut parts = Vec::new();
        while tenants.peek().is_some() {
            parts.push(tenants.by_ref().take(most).collect());
        }
        parts
    }

    async fn store_chunk(
        &self,
        run: &UnderWay<'_>,
        chunk: &[(Tenant, Content)],
        companies: &HashMap<Tenant, Company>,
    ) -> Result<Vec<Result<StoreOutcome, Failure>>, RunError> {
        let now = self.transfer.clock.database_now();
        let state_of = |place: usize, company: &Company| {
            let secrets = chunk[place].1.snapshot.secrets.len();
            let mut state = TenantState::new(company.tenant.clone(), &run.run.id, Step::Stored, now);
            state.secrets = i64::try_from(secrets).unwrap_or(i64::MAX);
            state
        };
        let stored = match &self.transfer.takes {
            Takes::Folders => self.store_copies(run.lock, chunk, companies, &state_of).await,
            Takes::Rows { overwrite, .. } => self.store_rows(run.lock, chunk, companies, *overwrite, &state_of).await,
        };
        match stored {
            Ok(outcomes) => Ok(outcomes),
            Err(error @ (StoreError::Unavailable { .. } | StoreError::LeaseLost)) => Err(error.into()),
            // One of them is refused: each by itself tells which.
            Err(error) if chunk.len() == 1 => {
                Ok(vec![Err(Failure { reason: Reason::Database, error: log::chain(&error) })])
            }
            Err(_) => {
                let mut outcomes = Vec::with_capacity(chunk.len());
                for one in chunk.chunks(1) {
                    outcomes.extend(Box::pin(self.store_chunk(run, one, companies)).await?);
                }
                Ok(outcomes)
            }
        }
    }

    async fn store_copies(
        &self,
        lock: &JobLock,
        chunk: &[(Tenant, Content)],
        companies: &HashMap<Tenant, Company>,
        state_of: &(dyn Fn(usize, &Company) -> TenantState + Sync),
    ) -> Result<Vec<Result<StoreOutcome, Failure>>, StoreError> {
        let speaks_for = |tenant: &Tenant, company: Option<&Company>| {
            let (tenant, own) = (tenant.clone(), company.and_then(|company| company.phase));
            move |key: &SecretKey| self.transfer.policies.of(&tenant, key, own).phase.owned_upstream()
        };
        let speaks: Vec<_> = chunk.iter().map(|(tenant, _)| speaks_for(tenant, companies.get(tenant))).collect();
        let taken: Vec<Taken<'_>> = chunk
            .iter()
            .zip(&speaks)
            .map(|((tenant, content), speaks_for)| Taken {
                tenant,
                snapshot: &content.snapshot,
                began: Began { generation: companies.get(tenant).map(|company| company.generation) },
                at: content.began,
                speaks_for,
            })
            .collect();
        let outcomes = patiently(|| self.transfer.database.store_snapshots(lock, &taken, state_of)).await?;
        Ok(outcomes.into_iter().map(Ok).collect())
    }

    async fn store_rows(
        &self,
        lock: &JobLock,
        chunk: &[(Tenant, Content)],
        companies: &HashMap<Tenant, Company>,
        overwrite: bool,
        state_of: &(dyn Fn(usize, &Company) -> TenantState + Sync),
    ) -> Result<Vec<Result<StoreOutcome, Failure>>, StoreError> {
        let imports: Vec<Import<'_>> = chunk
            .iter()
            .map(|(tenant, content)| Import {
                tenant,
                secrets: &content.snapshot.secrets,
                owned_in: companies.get(tenant).and_then(|company| company.phase),
                overwrite,
            })
            .collect();
        let writer = Writer::new("migrate import");
        let outcomes = patiently(|| self.transfer.database.import(lock, &imports, &writer, state_of)).await?;
        let outcome = |outcome| match outcome {
            ImportOutcome::Stored(company) => Ok(StoreOutcome::Stored { company, secrets: Vec::new() }),
            ImportOutcome::Moved => Ok(StoreOutcome::Superseded),
            ImportOutcome::Conflict(keys) => Err(Failure { reason: Reason::Different, error: in_the_way(&keys) }),
        };
        Ok(outcomes.into_iter().map(outcome).collect())
    }

    /// Reads the origin again and the rows back, and compares them.
    async fn verify(
        &self,
        run: &UnderWay<'_>,
        stored: Vec<Stored>,
        ended: &mut Vec<Outcome>,
        again: &mut Vec<Again>,
        postponed: &mut Vec<Tenant>,
    ) -> Result<Vec<Verified>, RunError> {
        let mut second = Vec::with_capacity(stored.len());
        for part in self.parts(stored) {
            let tenants: Vec<Tenant> = part.iter().map(|stored| stored.tenant.clone()).collect();
            let contents = self.transfer.origin.read(&tenants).await;
            // From here on the second reading is digests.
            for (stored, content) in part.into_iter().zip(contents) {
                if matches!(content, Err(OriginError::TooMany)) {
                    postponed.push(stored.tenant);
                    continue;
                }
                match self.usable(run, &stored.tenant, content).await? {
                    Ok(content) => {
                        let digests = self.transfer.digests_of(&stored.tenant, stored.phase_before, &content.snapshot);
                        second.push((stored, digests, bytes_of(&content)));
                    }
                    Err(failure) => ended.push(Outcome::failed(stored.tenant, failure)),
                }
            }
        }
        let mut verified = Vec::with_capacity(second.len());
        // Of an import's tenants the database may have far more than the origin has.
        let most = match self.transfer.takes {
            Takes::Folders => self.options.batch,
            Takes::Rows { .. } => self.options.batch.min(READ_AT_ONCE),
        };
        for chunk in by_size(second, most, |(_, _, bytes)| *bytes) {
            let asked: Vec<(Tenant, Option<Phase>)> =
                chunk.iter().map(|(stored, ..)| (stored.tenant.clone(), stored.phase_before)).collect();
            let rows = self.transfer.rows_of_all(&asked).await?;
            for ((stored, origin, _), rows) in chunk.into_iter().zip(rows) {
                let database = match opened(rows) {
                    Ok(digests) => digests,
                    Err(failure) => {
                        ended.push(Outcome::failed(stored.tenant, failure));
                        continue;
                    }
                };
                let differences = self.transfer.differences(&origin, &self.sampled(&origin, database));
                if differences.is_empty() {
                    let digest = self.transfer.digester.of_all(&stored.tenant, &origin);
                    verified.push(Verified { secrets: origin.len(), digest: digest.to_string(), stored });
                } else {
                    again.push(Again::different(stored.tenant, &differences));
                }
            }
        }
        Ok(verified)
    }

    /// Switches the phases of tenants that were found to be equal on both sides.
    async fn switch(
        &self,
        run: &UnderWay<'_>,
        verified: Vec<Verified>,
        ended: &mut Vec<Outcome>,
        again: &mut Vec<Again>,
    ) -> Result<(), RunError> {
        // What the database owns already is only noted.
        let is_databases =
            |verified: &Verified| self.transfer.is_databases(&verified.stored.tenant, verified.stored.phase_before);
        let (there, verified): (Vec<_>, Vec<_>) = verified.into_iter().partition(is_databases);
        let verified = self.without_folders(verified, ended).await?;
        for (chunk, to) in there
            .chunks(self.options.batch.max(1))
            .map(|chunk| (chunk, None))
            .chain(verified.chunks(self.options.batch.max(1)).map(|chunk| (chunk, self.options.to)))
        {
            let now = self.transfer.clock.database_now();
            let states: Vec<TenantState> = chunk
                .iter()
                .map(|verified| TenantState {
                    secrets: i64::try_from(verified.secrets).unwrap_or(i64::MAX),
                    digest: Some(verified.digest.clone()),
                    phase_before: verified.stored.phase_before,
                    verified_at: Some(now),
                    switched_at: to.map(|_| now),
                    ..TenantState::new(
                        verified.stored.tenant.clone(),
                        &run.run.id,
                        if to.is_some() { Step::Switched } else { Step::Verified },
                        now,
                    )
                })
                .collect();
            let Some(to) = to else {
                patiently(|| self.transfer.database.keep_states(run.lock, &states)).await?;
                ended.extend(states.into_iter().map(Outcome::of));
                continue;
            };
            let switches: Vec<Switch> = chunk
                .iter()
                .zip(&states)
                .map(|(verified, state)| Switch {
                    expected: verified.stored.expected,
                    to: Some(to),
                    state: state.clone(),
                })
                .collect();
            let refusals = patiently(|| self.transfer.database.switch(run.lock, &switches)).await?;
            for (state, refusal) in states.into_iter().zip(refusals) {
                match refusal {
                    Ok(()) => ended.push(Outcome::of(state)),
                    Err(refusal) => again.push(self.refused(state.tenant, refusal)),
                }
            }
        }
        Ok(())
    }

    /// Those that upstream still has no folder for, where what is taken over is not from
    /// there: one may have been made since, with secrets that nobody would read any more. It
    /// is asked after the tenants' rows were read: a write through the proxy that comes later
    /// raises the generation.
    async fn without_folders(
        &self,
        verified: Vec<Verified>,
        ended: &mut Vec<Outcome>,
    ) -> Result<Vec<Verified>, RunError> {
        let Takes::Rows { upstream: Some(upstream), .. } = &self.transfer.takes else { return Ok(verified) };
        if verified.is_empty() || self.options.to.is_none() {
            return Ok(verified);
        }
        let listed = folders::patiently(|| upstream.tenants(Lane::Migration)).await;
        let folders = listed.map_err(|error| RunError::Origin(error.into()))?.tenants;
        let (owned, free): (Vec<_>, Vec<_>) =
            verified.into_iter().partition(|verified| folders.contains(&verified.stored.tenant));
        let owned = owned.into_iter().map(|verified| {
            let failure = Failure { reason: Reason::Owned, error: HAS_FOLDER.to_owned() };
            Outcome::failed(verified.stored.tenant, failure)
        });
        ended.extend(owned);
        Ok(free)
    }

    /// What an origin gave, if it can be taken over.
    async fn usable(
        &self,
        run: &UnderWay<'_>,
        tenant: &Tenant,
        content: Result<Content, OriginError>,
    ) -> Result<Result<Content, Failure>, RunError> {
        let content = match content {
            Ok(content) => content,
            Err(error) => return self.no_content(run, tenant, error).await,
        };
        let problems: Vec<_> =
            content.problems.iter().filter(|problem| !self.options.accept.contains(&problem.kind)).collect();
        if problems.is_empty() {
            return Ok(Ok(content));
        }
        const TOLD: usize = 10;
        let mut told: Vec<String> = problems.iter().take(TOLD).map(ToString::to_string).collect();
        if problems.len() > TOLD {
            told.push(format!("and {} more", problems.len() - TOLD));
        }
        Ok(Err(Failure { reason: Reason::Problem, error: told.join("; ") }))
    }

    async fn no_content(
        &self,
        run: &UnderWay<'_>,
        tenant: &Tenant,
        error: OriginError,
    ) -> Result<Result<Content, Failure>, RunError> {
        let reason = match &error {
            OriginError::Upstream(UpstreamError::Denied) => {
                // Its copies are not to be served any more, wherever that was found out.
                let now = self.transfer.clock.database_now();
                patiently(|| self.transfer.database.deny_under(run.lock, tenant, now)).await?;
                Reason::Denied
            }
            OriginError::Missing => Reason::Missing,
            error if error.is_of_all() => return Err(RunError::Origin(error.clone())),
            OriginError::Upstream(_) | OriginError::Table(_) | OriginError::Unlisted | OriginError::TooMany => {
                Reason::Origin
            }
        };
        Ok(Err(Failure { reason, error: log::chain(&error) }))
    }

    /// A tenant that the database owns by now: switched by us, where a crash or an outage
    /// kept the answer from us, or by somebody else.
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

    /// The database's side, as far as its values are to be compared.
    fn sampled(&self, origin: &Digests, mut database: Digests) -> Digests {
        let Verify::Sample(count) = self.options.verify else { return database };
        let drawn: HashSet<&SecretKey> =
            rand::seq::IteratorRandom::sample(origin.keys(), &mut rand::rng(), count).into_iter().collect();
        for (key, tag) in &mut database {
            if let Some(other) = origin.get(key).filter(|_| !drawn.contains(key)) {
                *tag = *other;
            }
        }
        database
    }

    fn refused(&self, tenant: Tenant, refusal: Refusal) -> Again {
        let (error, not_before) = match refusal {
            Refusal::Changed => return Again::changing(tenant),
            Refusal::WriteUnderWay { until } => {
                ("upstream is being told of a write to it".to_owned(), until.since(self.transfer.clock.database_now()))
            }
            Refusal::Unproved(keys) => {
                (format!("what upstream has of {} after a write was not read back yet", names(&keys)), Duration::ZERO)
            }
        };
        // It may end long before.
        let not_before = not_before.min(LONGEST_PAUSE);
        Again { tenant, failure: Failure { reason: Reason::Changing, error }, not_before }
    }

    /// What is noted of a tenant that was not migrated.
    fn failed_state(&self, run: &UnderWay<'_>, ended: &Outcome) -> Option<TenantState> {
        let failure = ended.failure.as_ref()?;
        Some(TenantState {
            reason: Some(failure.reason.as_str().to_owned()),
            error: Some(failure.error.clone()),
            ..TenantState::new(ended.tenant.clone(), &run.run.id, Step::Failed, self.transfer.clock.database_now())
        })
    }

    /// Waits a while until the running instances know that a migration goes on.
    async fn await_instances(&self) -> Result<(), RunError> {
        let changes = patiently(|| self.transfer.database.changes()).await?;
        let has_followed = |instance: &Instance| instance.changes >= changes;
        self.transfer.database.await_instances(FOLLOWED_WITHIN, has_followed).await?;
        Ok(())
    }
}

/// A tenant that is in the database, as the switch expects to find it.
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

/// One whose rows are equal to what the origin has.
struct Verified {
    stored: Stored,
    secrets: usize,
    digest: String,
}

/// One that is to be taken again, and why it was not migrated if it is not.
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

/// Why values that are there are not replaced.
pub(super) fn in_the_way(keys: &[SecretKey]) -> String {
    format!(
        "the database has another value of {}, or has deleted it; --overwrite replaces what is there, as a new version",
        names(keys)
    )
}

/// Where two sides differ, as a sentence that names secrets and no values.
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

/// The rows as the database gave them, if all of them opened.
fn opened(rows: Rows) -> Result<Digests, Failure> {
    match rows.unreadable {
        None => Ok(rows.digests),
        Some((key, error)) => {
            let error = format!("what was stored of {:?} does not open: {error}", key.as_str());
            Err(Failure { reason: Reason::Unreadable, error })
        }
    }
}

/// Chunks of so many tenants, and of so many bytes unless one tenant has more.
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
