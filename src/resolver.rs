//! THE PATH of a lookup: memory, else the database, else upstream, with write-back.
//!
//! This file holds the lookup of one secret, from [`Resolver::resolve`] down. Beside it:
//! `snapshot` reads a tenant's folder and writes it back, `listing` answers for all
//! of a tenant's secrets (`long_answers` says whose turn it is), `history` for the versions of one, `write` changes one, `tenant_directory`
//! knows which tenants exist, `changes` forgets what others have changed, `behind` keeps copies
//! from being served that are older than what was answered, `refresh_queue` reads the
//! folders that are said to have changed, `poll` asks which have, `shared` lets one instance
//! read for all, `warm` fills memory ahead, `last_good` is for a start without the database,
//! `shadow` compares with upstream after a migration, `explain`
//! tells an operator why an answer is what it is.

mod behind;
mod cache_status;
mod changes;
mod explain;
mod history;
mod last_good;
mod listing;
mod load;
mod long_answers;
mod phases;
mod poll;
mod provisional;
mod references;
mod refresh_queue;
pub mod shadow;
mod shared;
mod snapshot;
mod tenant_directory;
mod warm;
mod write;

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use behind::{Behind, Standing};
use load::Load;
use long_answers::LongAnswers;
use phases::OwnPhases;
use provisional::Provisional;
use references::is_upstreams;
use shadow::Shadow;
use tenant_directory::TenantDirectory;

use crate::{
    answer::Answer,
    clock::{Clock, Moment, Timestamp},
    flaws::Unusable,
    flights::Flights,
    metrics::Metrics,
    phase::Phase,
    policy::Policies,
    secret::{SecretKey, SecretName},
    tenant::Tenant,
    tiers::{
        database::{Company, Database, StoreError},
        memory::{Entry, Fence, Memory, Recall},
        upstream::{Lane, Upstream, UpstreamError, UpstreamState},
    },
};
pub use cache_status::{CacheStatus, ForwardReason, Tier, TierResult};
pub use explain::Explanation;
pub use last_good::{LastGood, MAX_AHEAD};
pub use listing::{Listing, Refresh, TenantSummary};
pub use long_answers::LongAnswer;
pub use poll::Poller;
pub use refresh_queue::RefreshWorker;
pub use snapshot::Fresh;
pub use write::{Condition, NewTenant, WriteError, Written};

/// Finds secrets. A clone is another handle to the same one.
#[derive(Clone)]
pub struct Resolver(Arc<Parts>);

/// What a resolver is made of.
pub struct Parts {
    /// The nearest tier.
    pub memory: Memory,
    /// The middle tier.
    pub database: Arc<Database>,
    /// The farthest tier, where one is configured.
    pub upstream: Option<Arc<dyn Upstream>>,
    /// Time.
    pub clock: Clock,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What an instance knows that was started without the database.
    pub last_good: LastGood,
    /// Phases and ages; replaced whole, never changed in place.
    policies: ArcSwap<Policies>,
    /// How long a caller without a servable copy waits at most, in nanoseconds.
    deadline: AtomicU64,
    tenant_directory: TenantDirectory,
    shadow: Shadow,
    refresh_queue: refresh_queue::RefreshQueue,
    loads: Flights<(Tenant, SecretKey), Result<Resolved, ResolveError>>,
    snapshots: Flights<Tenant, Result<Arc<Fresh>, snapshot::Missed>>,
    long_answers: LongAnswers,
    writes: Box<[tokio::sync::Mutex<()>]>,
    own_phases: RwLock<OwnPhases>,
    /// Whether a change of them may have been missed.
    phases_doubted: AtomicBool,
    uses: warm::Uses,
    /// The number of the last change that is in force here.
    followed: AtomicI64,
    /// Counts changes that others have made.
    heard: AtomicU64,
    /// When the last read of upstream began.
    last_read: AtomicI64,
    under_way: changes::UnderWay,
    /// Which copies are older than what was answered here.
    behind: Behind,
    /// Validators that were given before the database had any.
    provisional: Provisional,
    /// What is known of tenants, held by who reads what has changed of them.
    following: tokio::sync::Mutex<Following>,
}

/// How far is known what has changed of tenants.
#[derive(Default)]
struct Following {
    /// The last shredding.
    shredded: Option<Timestamp>,
    /// The last change of own phases; nothing before all were read.
    moved: Option<i64>,
}

/// What is taken once and gone by throughout.
struct PolicySnapshot {
    /// From before the policies were taken.
    fence: Fence,
    policies: Arc<Policies>,
}

/// How fresh a caller wants the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Whatever the ages allow.
    Cached,
    /// Past memory, with the copy revalidated (`Cache-Control: no-cache`).
    Revalidated,
}

/// The outcome of a lookup, proved: a secret, or its absence.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The secret or its absence, and how old that knowledge is.
    pub entry: Arc<Entry>,
    /// Which tiers were asked, and what they said.
    pub cache_status: CacheStatus,
}

impl Resolved {
    /// The secret, if it is not absent.
    #[must_use]
    pub fn answer(&self) -> Option<&Answer> {
        self.entry.answer.as_ref()
    }
}

/// Why a lookup has no answer. None of these proves an absence.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ResolveError {
    /// Upstream refuses the tenant's folder to us.
    #[error("the upstream denies this tenant's folder")]
    Denied,
    /// Upstream has the secret, and its value cannot be used.
    #[error("the upstream's value cannot be used: {}", .0.as_str())]
    Unusable(Unusable),
    /// The owner's row does not open: it was damaged, moved, or its key is missing.
    #[error("the stored secret does not open")]
    Unreadable,
    /// The database failed, and nothing else may answer.
    #[error("the database tier failed")]
    Database(#[from] Arc<StoreError>),
    /// Upstream failed, and nothing else may answer.
    #[error("the upstream tier failed")]
    Upstream(#[source] UpstreamError),
    /// The secret is in a phase that needs an upstream, and none is configured.
    #[error("no upstream is configured, and this tenant's phase needs one")]
    NoUpstream,
    /// The tenant changes hands again and again while one secret is written.
    #[error("the tenant is changing hands")]
    Moving,
    /// The database has not answered since the start, and what was served last does not hold this.
    #[error("the database has not answered since the start")]
    Alone,
    /// No tier answered within the deadline.
    #[error("no tier answered in time")]
    TimedOut,
    /// A fault in this program ended the lookup.
    #[error("the lookup ended unexpectedly")]
    Lost,
}

impl ResolveError {
    /// When it may be worth asking again, where that is known.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Upstream(error) => error.retry_after(),
            Self::Database(error) => error.retry_after(),
            Self::Unusable(_) => Some(UNUSABLE_FOR),
            Self::Denied
            | Self::Unreadable
            | Self::NoUpstream
            | Self::Moving
            | Self::Alone
            | Self::TimedOut
            | Self::Lost => None,
        }
    }

    /// Whether a copy in memory may stand in: the tiers failed, rather than spoke against it.
    fn is_failure(&self) -> bool {
        match self {
            Self::Database(_) | Self::Upstream(_) | Self::Moving | Self::Alone | Self::TimedOut | Self::Lost => true,
            Self::Denied | Self::Unusable(_) | Self::Unreadable | Self::NoUpstream => false,
        }
    }
}

/// How long a caller who has a servable copy waits for a tier that may be failing.
const WAIT_WITH_STALE_COPY: Duration = Duration::from_millis(50);

/// When it may be worth asking again for a secret that cannot be used: somebody has to mend it.
const UNUSABLE_FOR: Duration = Duration::from_secs(30);

/// How often the owner is chosen for one piece of work. A tenant changes hands once in a
/// while, and so do policies.
const CHOICES: usize = 5;

/// How long a copy that stood in for a failed or pending answer is believed, so that
/// the tiers below are tried again soon, but not by every caller.
const STAND_IN: Duration = Duration::from_secs(5);

impl Resolver {
    /// Answers from memory, else from the database, else from upstream.
    ///
    /// A caller with a servable copy in memory waits 50 ms for the tiers below, any
    /// other at most the deadline; the load goes on behind them and fills memory. One who
    /// wants it revalidated gets the copy as it is where the tiers below do not answer.
    ///
    /// # Errors
    /// Why there is neither a secret nor proof of its absence.
    pub async fn resolve(&self, name: SecretName<'_>, want: Want) -> Result<Resolved, ResolveError> {
        let (remembered, why) = match (self.memory.recall(name.tenant(), name.key()), want) {
            (Recall::Fresh(entry), Want::Cached) => {
                self.shadow.offer(name, &entry);
                return Ok(Resolved::remembered(entry));
            }
            (Recall::Fresh(entry) | Recall::Stale(entry), Want::Revalidated) => (Some(entry), ForwardReason::Request),
            (Recall::Stale(entry), Want::Cached) => (Some(entry), ForwardReason::Stale),
            (Recall::Nothing, Want::Cached) => (None, ForwardReason::Miss),
            (Recall::Nothing, Want::Revalidated) => (None, ForwardReason::Request),
        };
        if self.last_good.is_alone() {
            return self.resolve_alone(name, remembered, why);
        }
        let wait = match (&remembered, want) {
            (Some(_), Want::Cached) => WAIT_WITH_STALE_COPY,
            (None, Want::Cached) => self.deadline(),
            // The rest is for the copy, should upstream not answer.
            (_, Want::Revalidated) => self.deadline().mul_f64(0.75),
        };
        let loading = self.load_once(name, why);
        let error = match tokio::time::timeout(wait, loading).await {
            Ok(Ok(resolved)) => {
                if resolved.cache_status.answered_by != Tier::Upstream {
                    self.shadow.offer(name, &resolved.entry);
                }
                return Ok(resolved);
            }
            Ok(Err(error)) => error,
            Err(_) => ResolveError::TimedOut,
        };
        match remembered {
            // A denial that was learned meanwhile stops the copy as well.
            Some(_) if error.is_failure() && self.is_denied(name.tenant()) => Err(ResolveError::Denied),
            Some(entry) if error.is_failure() && entry.answer.is_some() => {
                let (tenant, key) = name.to_owned();
                self.memory.stand_in(&tenant, &key, &entry, STAND_IN);
                self.metrics.count("secretier_stale_answers_total", &[("tier", "memory")]);
                Ok(Resolved { entry, cache_status: CacheStatus::stale_memory(why, &error) })
            }
            None if error.is_failure() && want == Want::Revalidated => self.fall_back(name).await.map_err(|_| error),
            _ => Err(error),
        }
    }

    /// The secret, where memory has it and may answer without asking further: what
    /// [`Self::resolve`] gives then, without a wait.
    #[must_use]
    pub fn recall(&self, name: SecretName<'_>, now: Moment) -> Option<Resolved> {
        match self.memory.recall_at(name.tenant(), name.key(), now) {
            Recall::Fresh(entry) if entry.answer.is_some() => {
                self.shadow.offer(name, &entry);
                Some(Resolved::remembered(entry))
            }
            Recall::Fresh(_) | Recall::Stale(_) | Recall::Nothing => None,
        }
    }

    /// What a caller gets who does not insist on a revalidated answer. Joins no load: the
    /// one in the air may be what has just taken too long.
    async fn fall_back(&self, name: SecretName<'_>) -> Result<Resolved, ResolveError> {
        let (tenant, key) = name.to_owned();
        let loading = self.load(&tenant, &key, ForwardReason::Stale);
        tokio::time::timeout(self.deadline() / 4, loading).await.unwrap_or(Err(ResolveError::TimedOut))
    }

    /// Joins the load that is in the air for this secret, or starts one. A caller who
    /// wants it revalidated never joins one that began before.
    async fn load_once(&self, name: SecretName<'_>, why: ForwardReason) -> Result<Resolved, ResolveError> {
        let name = name.to_owned();
        let mut joined = true;
        let start = || {
            joined = false;
            let (resolver, (tenant, key)) = (self.clone(), name.clone());
            async move {
                let loaded = resolver.load(&tenant, &key, why).await;
                if loaded.as_ref().is_ok_and(|resolved| resolved.answer().is_some()) {
                    resolver.uses.note(&tenant);
                }
                loaded
            }
        };
        let flight = match why {
            ForwardReason::Request => self.loads.join_next(&name, start),
            ForwardReason::Miss | ForwardReason::Stale => self.loads.join(&name, start),
        };
        if joined {
            self.metrics.count("secretier_coalesced_waits_total", &[("for", "load")]);
        }
        flight.await
    }

    /// Asks the tiers below memory, in the order that the secret's phase says.
    async fn load(&self, tenant: &Tenant, key: &SecretKey, why: ForwardReason) -> Result<Resolved, ResolveError> {
        self.with_stable_policy(tenant, |policy_snapshot| self.load_by(policy_snapshot, tenant, key, why)).await
    }

    async fn load_by(
        &self,
        policy_snapshot: PolicySnapshot,
        tenant: &Tenant,
        key: &SecretKey,
        why: ForwardReason,
    ) -> Result<Resolved, ResolveError> {
        let PolicySnapshot { fence, policies } = policy_snapshot;
        let (now, watermark) = (self.clock.confirmed_now(), self.watermark(tenant));
        let load = Load { resolver: self, tenant, key, why, fence, policies: &policies, now, watermark };
        let expected = policies.of(tenant, key, self.own_phase(tenant));
        if expected.phase == Phase::Infisical {
            return load.ask_upstream(expected, CacheStatus::forwarded(why)).await;
        }
        let found = self.database.find(tenant, key).await.map_err(Arc::new);
        let policy = match &found {
            Ok(found) => policies.of(tenant, key, self.note(tenant, fence, found.company.as_ref()).await),
            Err(_) => expected,
        };
        match policy.phase {
            Phase::Database => load.ask_owner(policy, found),
            Phase::Hybrid => {
                let found = match found {
                    Ok(found) => {
                        let own = found.company.as_ref().and_then(|company| company.phase);
                        let is_upstreams = is_upstreams(&policies, tenant, own);
                        Box::pin(self.resolve_copy(tenant, key, found, is_upstreams)).await.map_err(Arc::new)
                    }
                    failed => failed,
                };
                load.ask_copy(policy, found).await
            }
            Phase::Infisical => load.ask_upstream(policy, CacheStatus::forwarded(why)).await,
        }
    }
}

impl Resolved {
    fn remembered(entry: Arc<Entry>) -> Self {
        Self { entry, cache_status: CacheStatus::memory() }
    }
}

impl Resolver {
    /// Puts the parts together.
    #[must_use]
    #[expect(clippy::too_many_arguments, reason = "each is a part, and they are put together in one place")]
    pub fn build(
        memory: Memory,
        database: Arc<Database>,
        upstream: Option<Arc<dyn Upstream>>,
        policies: Policies,
        deadline: Duration,
        clock: Clock,
        metrics: Arc<Metrics>,
        shadow: Shadow,
    ) -> Self {
        const WRITE_STRIPES: usize = 256;
        Self(Arc::new(Parts {
            tenant_directory: TenantDirectory::new(upstream.clone(), clock.clone()),
            loads: Flights::new(|| Err(ResolveError::Lost)),
            snapshots: Flights::new(|| Err(snapshot::Missed::lost())),
            long_answers: LongAnswers::new(Arc::clone(&metrics)),
            writes: (0..WRITE_STRIPES).map(|_| tokio::sync::Mutex::default()).collect(),
            own_phases: RwLock::default(),
            phases_doubted: AtomicBool::new(false),
            uses: warm::Uses::default(),
            followed: AtomicI64::new(0),
            heard: AtomicU64::new(0),
            last_read: AtomicI64::new(0),
            under_way: changes::UnderWay::default(),
            behind: Behind::default(),
            provisional: Provisional::new(),
            refresh_queue: refresh_queue::RefreshQueue::default(),
            following: tokio::sync::Mutex::default(),
            last_good: LastGood::default(),
            shadow,
            memory,
            database,
            upstream,
            policies: ArcSwap::from_pointee(policies),
            deadline: AtomicU64::new(nanos(deadline)),
            clock,
            metrics,
        }))
    }

    /// Phases and ages, as they are in force now. Whoever does more than one thing by them
    /// takes them once.
    #[must_use]
    pub fn policies(&self) -> Arc<Policies> {
        self.policies.load_full()
    }

    /// How long a caller without a servable copy waits at most.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        Duration::from_nanos(self.deadline.load(Ordering::Relaxed))
    }

    /// Sets how long a caller without a servable copy waits at most, from the next lookup on.
    pub fn set_deadline(&self, deadline: Duration) {
        self.deadline.store(nanos(deadline), Ordering::Relaxed);
    }

    /// Brings other policies into force. When this returns, no lookup is answered by those of
    /// before, unless it had begun by then. It looks at every entry in memory, so it is not
    /// for a thread that others wait for.
    ///
    /// A phase is the owner, and an answer that mixes two owners would be wrong: an absence
    /// that one proves for a secret of the other, say. What keeps them apart:
    /// - A load, a read of a folder, a list, a write take the policies once (`PolicySnapshot`) and
    ///   go by these to the end.
    /// - What they meet on the way may be of others: a read of a folder that they join, a
    ///   version, names that memory has. So who answers looks once more at the end, and
    ///   begins anew where the policies are not the same any more
    ///   (`Resolver::with_stable_policy`): where they are, they were all the while.
    /// - What was loaded by policies of before is gone, or cannot land, before the new ones
    ///   are in force: [`Memory::change_policies`]. Flights are forgotten in between, while
    ///   all fences are held. One that was launched before is joined by nobody who goes by
    ///   the new policies; one that is launched after takes a fence first, and so waits
    ///   until the new policies are there to be taken.
    pub fn set_policies(&self, policies: Policies) {
        let (before, now) = (self.policies(), Arc::new(policies));
        if now.is_same_as(&before) {
            return;
        }
        let has_moved = |tenant: &Tenant| !now.has_phases_of_for(&before, tenant);
        let moving = (!now.has_phases_of(&before)).then_some(&has_moved as &dyn Fn(&Tenant) -> bool);
        self.memory.change_policies(moving, || {
            self.snapshots.forget_where(|_| true);
            self.loads.forget_where(|_| true);
            self.policies.store(Arc::clone(&now));
        });
        // Ages do not depend on a tenant's own phase.
        self.memory.age(|tenant, key| now.of(tenant, key, None).ages);
    }

    /// What a load, a read or a list of a tenant stands on from its beginning to its end.
    fn policy_snapshot(&self, tenant: &Tenant) -> PolicySnapshot {
        // In this order: see `Memory::change_policies`.
        let fence = self.memory.fence(tenant);
        PolicySnapshot { fence, policies: self.policies() }
    }

    /// Whether these policies are in force, and so were since they were taken: one that was
    /// replaced does not come back.
    fn is_in_force(&self, policies: &Arc<Policies>) -> bool {
        Arc::ptr_eq(&self.policies.load(), policies)
    }

    /// Does work that is by one policy from its beginning to its end, and anew where others
    /// have come into force meanwhile.
    async fn with_stable_policy<T, F>(
        &self,
        tenant: &Tenant,
        work: impl Fn(PolicySnapshot) -> F,
    ) -> Result<T, ResolveError>
    where
        F: Future<Output = Result<T, ResolveError>>,
    {
        for _ in 0..CHOICES {
            let policy_snapshot = self.policy_snapshot(tenant);
            let policies = Arc::clone(&policy_snapshot.policies);
            let done = work(policy_snapshot).await;
            if self.is_in_force(&policies) {
                return done;
            }
        }
        Err(ResolveError::Moving)
    }

    /// Reads what has changed of tenants: the phases that they have of their own, to know
    /// them while the database is down, which were switched by a migration, and which were
    /// shredded. What is held of those that have changed is gone when this returns.
    ///
    /// # Errors
    /// The database does not answer; what was known before stays.
    pub async fn follow(&self) -> Result<(), StoreError> {
        // One read at a time, to the end: else one from before a change could replace one from after.
        let mut last = self.following.lock().await;
        let is_doubted = self.phases_doubted.swap(false, Ordering::AcqRel);
        let from = last.moved.filter(|_| !is_doubted);
        let followed = self.follow_from(&mut last, from).await;
        if followed.is_err() && is_doubted {
            self.phases_doubted.store(true, Ordering::Release);
        }
        followed
    }

    /// Reads the same before anybody has asked anything, when nothing is held of any tenant.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn begin(&self) -> Result<(), StoreError> {
        let mut last = self.following.lock().await;
        let (phases, moved) = self.read_phases().await?;
        *self.own_phases.write().unwrap_or_else(PoisonError::into_inner) = phases;
        last.moved = Some(moved);
        last.shredded = self.database.last_shredding().await?;
        // Where the register cannot be read, nobody knows.
        if self.database.has_unclean_ends().await.unwrap_or(true) {
            // An instance that was killed, or still is without the database, may have met a
            // denial or a change that nobody has told the database of.
            tracing::info!(
                "an instance has ended without a word; copies are confirmed by upstream before they are served"
            );
            self.behind.note_doubt_of_all(self.clock.database_now());
        }
        self.watch_switched().await
    }

    async fn follow_from(&self, last: &mut Following, from: Option<i64>) -> Result<(), StoreError> {
        let (moved, up_to): (HashSet<Tenant>, _) = match from {
            Some(change) => {
                let (moves, up_to) = self.database.moved_after(change).await?;
                let mut known = self.own_phases.write().unwrap_or_else(PoisonError::into_inner);
                let mut is_news =
                    |(tenant, phase): &(Tenant, Option<Phase>)| known.set(tenant.as_str(), *phase) != *phase;
                let moved = moves.into_iter().filter_map(|one| is_news(&one).then_some(one.0)).collect();
                (moved, up_to)
            }
            None => {
                let (phases, up_to) = self.read_phases().await?;
                let mut known = self.own_phases.write().unwrap_or_else(PoisonError::into_inner);
                let moved = phases.differing(&known);
                *known = phases;
                (moved, up_to)
            }
        };
        // Before anything is waited for: who finds the new phase finds nothing of the old one.
        if !moved.is_empty() {
            self.forget_tenants(&moved);
        }
        // What is known of phases is forgotten by no failure from here on.
        last.moved = Some(up_to);
        let shredded = self.database.shredded(last.shredded).await?;
        if let Some((_, at)) = shredded.last() {
            last.shredded = Some(*at);
            self.forget_tenants(&shredded.into_iter().map(|(tenant, _)| tenant).collect());
        }
        // After that: what memory gives of them from now on is the database's.
        self.watch_switched().await
    }

    /// The phases of all tenants that have one of their own, and the last change that they are
    /// from, or from before.
    async fn read_phases(&self) -> Result<(OwnPhases, i64), StoreError> {
        let mut phases = OwnPhases::default();
        let mut keep = |tenant: &str, phase| {
            phases.set(tenant, Some(phase));
        };
        let up_to = self.database.own_phases(&mut keep).await?;
        Ok((phases, up_to))
    }

    /// Compares lookups for as long as tenants were switched lately.
    async fn watch_switched(&self) -> Result<(), StoreError> {
        if self.upstream.is_some() && self.shadow.since().is_some() {
            self.shadow.watch(self.database.last_run_seen().await?);
        }
        Ok(())
    }

    /// Forgets all that is held of tenants that have changed hands or were shredded.
    ///
    /// What was read of one before its shredding does not come back after this:
    /// - A fill of memory that began before carries a fence from before the one raised here.
    /// - A snapshot that was being read is refused by the database, where the generation
    ///   has risen with the shredding itself, long before anyone hears of it.
    /// - Who asks from now on joins no flight from before. What begins now reads the
    ///   database after the shredding, for we have read of it there.
    /// - An unwrapped data key is dropped, and one that is being unwrapped is not kept.
    fn forget_tenants(&self, tenants: &HashSet<Tenant>) {
        self.memory.forget_tenants(tenants);
        self.note_heard();
        self.behind.forget(tenants);
        self.snapshots.forget_where(|tenant| tenants.contains(tenant));
        self.loads.forget_where(|(tenant, _)| tenants.contains(tenant));
        self.database.forget_data_keys(tenants);
    }

    /// How upstream answered last, where one is configured.
    #[must_use]
    pub fn upstream_state(&self) -> Option<UpstreamState> {
        self.upstream.as_ref().map(|upstream| upstream.health().state)
    }

    /// Calls upstream where it failed when it was last called: who has copies may not call it
    /// for long, and nobody would hear that it answers again. Costs a list of folders, at most
    /// one a minute of those that succeed, and none while upstream is left alone.
    pub async fn try_upstream(&self) {
        let failed = matches!(self.upstream_state(), Some(UpstreamState::Down | UpstreamState::LoginRefused));
        if failed && self.policies().uses(Phase::owned_upstream) {
            // What came of it is told by the tier's state.
            drop(self.tenant_directory.current(Lane::Refresh).await);
        }
    }

    /// Loads and snapshots in the air.
    #[must_use]
    pub fn flights(&self) -> (usize, usize) {
        (self.loads.in_the_air(), self.snapshots.in_the_air())
    }

    fn own_phase(&self, tenant: &Tenant) -> Option<Phase> {
        self.own_phases.read().unwrap_or_else(PoisonError::into_inner).get(tenant.as_str())
    }

    /// Brings into force here what the database has just told of a tenant: its own phase,
    /// which is given back, and a denial that another instance may have met.
    async fn note(&self, tenant: &Tenant, fence: Fence, company: Option<&Company>) -> Option<Phase> {
        let own = company.and_then(|company| company.phase);
        if let Err(error) = self.keep_up(tenant, own).await {
            tracing::debug!(%tenant, %error, "a phase has changed and could not be read");
        }
        if own != Some(Phase::Database) && company.is_some_and(|company| company.denied_at.is_some()) {
            self.memory.deny(fence, tenant, self.clock.running());
        }
        own
    }

    /// Brings the tenant's own phase into force here, where it is another than we know.
    async fn keep_up(&self, tenant: &Tenant, own: Option<Phase>) -> Result<(), StoreError> {
        if self.own_phase(tenant) == own {
            return Ok(());
        }
        // The row may be from before what we know, or from after: read what is true now.
        // One read at a time here too. Of the others we hear.
        let _last = self.following.lock().await;
        if self.own_phase(tenant) != own {
            let now = Box::pin(self.database.company(tenant)).await?.and_then(|company| company.phase);
            let mut known = self.own_phases.write().unwrap_or_else(PoisonError::into_inner);
            let before = known.set(tenant.as_str(), now);
            drop(known);
            if before != now {
                self.forget_tenants(&HashSet::from([tenant.clone()]));
            }
        }
        Ok(())
    }

    /// How old the database's copy of a tenant is, by the database's clock, where it may be served
    /// at all. A time that lies ahead was written by a clock that goes wrong, as one of the version
    /// before may that tells its machine's, or the database's was set back: it tells no age.
    fn copy_age(&self, company: &Company) -> Option<Duration> {
        const MAX_AHEAD: Duration = Duration::from_secs(60);
        let trusted = company.snapshot_at.filter(|at| *at <= self.clock.database_now().plus(MAX_AHEAD))?;
        let denied = company.denied_at.is_some() || self.is_denied(company.tenant.as_str());
        (!denied).then(|| self.clock.age(trusted))
    }

    /// How long a caller with a servable copy waits for upstream to confirm it: not for one that
    /// is known to fail.
    fn patience_to_confirm(&self) -> Duration {
        match self.upstream_state() {
            // The rest is for the copy, should upstream not answer.
            Some(UpstreamState::Up | UpstreamState::Unknown) => self.deadline().mul_f64(0.75),
            Some(UpstreamState::Down | UpstreamState::LoginRefused | UpstreamState::RateLimited) | None => {
                WAIT_WITH_STALE_COPY
            }
        }
    }

    /// Whether upstream may own the secrets of any tenant.
    fn owes_upstream(&self) -> bool {
        let known = self.own_phases.read().unwrap_or_else(PoisonError::into_inner);
        self.policies().uses(Phase::owned_upstream) || known.owe_upstream()
    }

    fn is_denied(&self, tenant: &str) -> bool {
        self.memory.denied_until(tenant).is_some()
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl std::ops::Deref for Resolver {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}
