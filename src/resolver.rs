//! The path of a lookup: memory, else the database, else upstream, with write-back.
//!
//! This file holds the lookup of one secret, from [`Resolver::resolve`] down. Beside it: `snapshot`
//! reads a tenant's folder and writes it back, `listing` answers for all of a tenant's secrets
//! (`long_answers` decides their order), `history` for the versions of one, `write` changes one,
//! `tenant_directory` knows which tenants exist, `changes` forgets what other instances have
//! changed, `behind` prevents answers from copies that are older than an earlier answer,
//! `refresh_queue` reads the folders that are reported as changed, `poll` asks which have changed,
//! `shared` lets one instance read for all, `warm` fills memory ahead, `offline` is for a start
//! without the database, `shadow` compares with upstream after a migration, `explain` tells an
//! operator why an answer is what it is, `rotation` for the values that are valid beside a secret's own.

mod behind;
mod cache_status;
mod changes;
mod content_tag;
mod events;
mod explain;
mod history;
mod listing;
mod load;
mod long_answers;
mod offline;
mod phases;
mod poll;
mod provisional;
mod references;
mod refresh_queue;
mod rotation;
pub mod shadow;
mod shared;
mod snapshot;
mod tenant_directory;
mod tenant_folders;
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
use behind::{Behind, Standing, Watermark};
use load::{Found, Load};
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
    sealing::keys_not_locked,
    secret::{SecretKey, SecretName},
    tenant::Tenant,
    tiers::{
        database::{Company, Database},
        memory::{Fence, Memory, Recall},
        upstream::{Lane, Upstream},
    },
    withheld::Withheld,
};
pub use cache_status::{CacheStatus, ForwardReason, Tier, TierResult};
pub use events::{Event, EventId, Following as EventFollower, Reaches, What};
pub use explain::Explanation;
pub use listing::{Listing, Refresh, TenantSummary};
pub use long_answers::LongAnswer;
pub use offline::{MAX_AHEAD, OfflineCopy};
pub use poll::Poller;
pub use refresh_queue::RefreshWorker;
pub use rotation::{Stage, Valid, ValidValue};
pub use snapshot::Fresh;
pub use tenant_folders::FolderError;
pub use write::{Condition, NewTenant, WriteError, Written};

/// Words of the tiers that are part of what this answers: callers need no tier to read them.
pub use crate::tiers::{
    database::{Older, StoreError, TakenWebhook},
    memory::Entry,
    upstream::{About, Cause, Unstorable, Unverified, UpstreamError, UpstreamState, Webhook},
};

/// Finds secrets.
pub struct Resolver {
    /// The nearest tier.
    memory: Memory,
    /// The middle tier.
    database: Arc<Database>,
    /// The farthest tier, where one is configured.
    upstream: Option<Arc<dyn Upstream>>,
    clock: Clock,
    metrics: Arc<Metrics>,
    /// The offline copy of an instance that was started without the database.
    offline: OfflineCopy,
    withheld: Withheld,
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
    /// Whether a change of the tenants' own phases may have been missed.
    phases_doubted: AtomicBool,
    uses: warm::Uses,
    bare: tenant_folders::Bare,
    /// The number of the last change that has been applied here.
    followed: AtomicI64,
    /// Counts changes that others have made.
    heard: AtomicU64,
    /// When the last read of upstream began.
    last_read: AtomicI64,
    under_way: changes::UnderWay,
    /// The events that followers are told.
    events: events::Events,
    /// The copies that are older than an answer that was given here.
    behind: Behind,
    /// Validators that were given before the database had any.
    provisional: Provisional,
    /// The position in the changes of tenants; held during each read of them.
    following: tokio::sync::Mutex<Following>,
}

/// How far the changes of tenants have been read.
#[derive(Default)]
struct Following {
    /// The last shredding.
    shredded: Option<Timestamp>,
    /// The last change of own phases; `None` before all phases were read.
    moved: Option<i64>,
}

/// The policies and the fence that one operation uses from beginning to end.
struct PolicySnapshot {
    /// Taken before the policies.
    fence: Fence,
    policies: Arc<Policies>,
}

/// How fresh a caller wants the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Any copy that the ages allow.
    Cached,
    /// Past memory, with the copy revalidated (`Cache-Control: no-cache`).
    Revalidated,
}

/// The proved outcome of a lookup: a secret, or its absence.
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
    /// Upstream denies us the tenant's folder.
    #[error("the upstream denies this tenant's folder")]
    Denied {
        /// Time until upstream is asked for it again, where that is known.
        retry_after: Option<Duration>,
    },
    /// Upstream has the secret, but its value cannot be used.
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
    /// The secret is one of our own master keys.
    #[error("the secret is one of secretier's own master keys")]
    Withheld,
    /// The shared folder is Infisical's, and this instance is not configured to serve it.
    #[error("the shared folder is not configured here")]
    NotConfigured,
    /// The secret is in a phase that needs an upstream, and none is configured.
    #[error("no upstream is configured, and this tenant's phase needs one")]
    NoUpstream,
    /// The tenant changes its owner again and again while one secret is written.
    #[error("the tenant is changing hands")]
    Moving,
    /// The database has not answered since the start, and the offline copy does not contain this
    /// secret.
    #[error("the database has not answered since the start")]
    Offline,
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
            Self::Denied { retry_after } => *retry_after,
            Self::Unreadable
            | Self::Withheld
            | Self::NotConfigured
            | Self::NoUpstream
            | Self::Moving
            | Self::Offline
            | Self::TimedOut
            | Self::Lost => None,
        }
    }

    /// Whether a copy in memory may be served instead: the tiers failed, rather than gave a
    /// contrary answer.
    fn is_failure(&self) -> bool {
        match self {
            Self::Database(_) | Self::Upstream(_) | Self::Moving | Self::Offline | Self::TimedOut | Self::Lost => true,
            // A copy that another instance keeps current is as good as it is for that one.
            Self::NotConfigured => true,
            Self::Denied { .. } | Self::Unusable(_) | Self::Unreadable | Self::Withheld | Self::NoUpstream => false,
        }
    }
}

/// How long a caller with a servable copy waits for a tier that may be failing.
const WAIT_WITH_STALE_COPY: Duration = Duration::from_millis(50);

/// When it may be worth asking again for a secret that cannot be used: somebody has to repair it.
const UNUSABLE_FOR: Duration = Duration::from_secs(30);

/// How often the owner is determined for one piece of work. Tenants rarely change
/// their owner, and policies rarely change.
const CHOICES: usize = 5;

/// How long a stale copy that replaced a failed or pending answer is served again without asking,
/// so that the tiers below are tried again soon, but not by every caller.
const STALE_LIFETIME: Duration = Duration::from_secs(5);

impl Resolver {
    /// Answers from memory, else from the database, else from upstream.
    ///
    /// A caller with a servable copy in memory waits 50 ms for the tiers below, any other caller at
    /// most the deadline; the load continues in the background and fills memory. A caller that
    /// wants a revalidated answer gets the copy as it is where the tiers below do not answer.
    ///
    /// # Errors
    /// The reason why there is neither a secret nor proof of its absence.
    pub async fn resolve(self: &Arc<Self>, name: SecretName<'_>, want: Want) -> Result<Resolved, ResolveError> {
        self.may_serve(name)?;
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
        if self.offline.is_offline() {
            return self.resolve_alone(name, remembered, why);
        }
        let wait = match (&remembered, want) {
            (Some(_), Want::Cached) => WAIT_WITH_STALE_COPY,
            (None, Want::Cached) => self.deadline(),
            // The rest of the deadline is for the copy, if upstream does not answer.
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
            // A denial that arrived meanwhile forbids the copy as well.
            Some(_) if error.is_failure() && self.is_denied(name.tenant()) => Err(self.denial(name.tenant())),
            Some(entry) if error.is_failure() && entry.answer.is_some() => {
                let (tenant, key) = name.to_owned();
                self.memory.serve_stale(&tenant, &key, &entry, STALE_LIFETIME);
                self.metrics.count("secretier_stale_answers_total", &[("tier", "memory")]);
                Ok(Resolved { entry, cache_status: CacheStatus::stale_memory(why, &error) })
            }
            None if error.is_failure() && want == Want::Revalidated => self.fall_back(name).await.map_err(|_| error),
            _ => Err(error),
        }
    }

    /// Returns the secret if memory has it and may answer without asking further. It is the same
    /// answer that [`Self::resolve`] would give, without a wait.
    #[must_use]
    pub fn recall(&self, name: SecretName<'_>, now: Moment) -> Option<Resolved> {
        self.may_serve(name).ok()?;
        match self.memory.recall_at(name.tenant(), name.key(), now) {
            Recall::Fresh(entry) if entry.answer.is_some() => {
                self.shadow.offer(name, &entry);
                Some(Resolved::remembered(entry))
            }
            Recall::Fresh(_) | Recall::Stale(_) | Recall::Nothing => None,
        }
    }

    /// Refuses our own master keys, whichever tier has them.
    ///
    /// # Errors
    /// [`ResolveError::Withheld`].
    pub fn may_serve(&self, name: SecretName<'_>) -> Result<(), ResolveError> {
        if self.withheld.has(name.tenant(), name.key()) { Err(ResolveError::Withheld) } else { Ok(()) }
    }

    /// The answer without revalidation. Joins no load: the one in progress may be the one that has
    /// just taken too long.
    async fn fall_back(self: &Arc<Self>, name: SecretName<'_>) -> Result<Resolved, ResolveError> {
        let (tenant, key) = name.to_owned();
        let loading = self.load(&tenant, &key, ForwardReason::Stale);
        tokio::time::timeout(self.deadline() / 4, loading).await.unwrap_or(Err(ResolveError::TimedOut))
    }

    /// Joins the load in progress for this secret, or starts one. A caller that wants a revalidated
    /// answer never joins a load that began before.
    async fn load_once(self: &Arc<Self>, name: SecretName<'_>, why: ForwardReason) -> Result<Resolved, ResolveError> {
        let name = name.to_owned();
        let mut joined = true;
        let start = || {
            joined = false;
            let (resolver, (tenant, key)) = (Arc::clone(self), name.clone());
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

    /// Asks the tiers below memory, in the order of the secret's phase.
    async fn load(
        self: &Arc<Self>,
        tenant: &Tenant,
        key: &SecretKey,
        why: ForwardReason,
    ) -> Result<Resolved, ResolveError> {
        self.with_stable_policy(tenant, |policy_snapshot| self.load_by(policy_snapshot, tenant, key, why)).await
    }

    async fn load_by(
        self: &Arc<Self>,
        policy_snapshot: PolicySnapshot,
        tenant: &Tenant,
        key: &SecretKey,
        why: ForwardReason,
    ) -> Result<Resolved, ResolveError> {
        let PolicySnapshot { fence, policies } = policy_snapshot;
        let (now, watermark) = (self.clock.confirmed_now(), self.watermark(tenant));
        let mut load = Load { resolver: self, tenant, key, why, fence, policies: &policies, now, watermark };
        let expected = policies.of(tenant, key, self.own_phase(tenant));
        if expected.phase == Phase::Infisical {
            return load.ask_upstream(expected, CacheStatus::forwarded(why)).await;
        }
        let mut found = self.database.find(tenant, key).await.map_err(Arc::new);
        let is_behind = |watermark: &Watermark, found: &Found| {
            let company = found.as_ref().ok().and_then(|found| found.company.as_ref());
            company.is_some_and(|company| watermark.standing(company) == Standing::Behind)
        };
        if is_behind(&load.watermark, &found) {
            let watermark = self.watermark(tenant);
            if !is_behind(&watermark, &found) {
                // The write-back has landed in between: the copy that it made is there now.
                load.watermark = watermark;
                found = Box::pin(self.database.find(tenant, key)).await.map_err(Arc::new);
            }
        }
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
    /// Builds a resolver from its parts.
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
        Self {
            tenant_directory: TenantDirectory::new(upstream.clone(), clock.clone()),
            loads: Flights::new(|| Err(ResolveError::Lost)),
            snapshots: Flights::new(|| Err(snapshot::Missed::lost())),
            long_answers: LongAnswers::new(Arc::clone(&metrics)),
            writes: (0..WRITE_STRIPES).map(|_| tokio::sync::Mutex::default()).collect(),
            own_phases: RwLock::default(),
            phases_doubted: AtomicBool::new(false),
            uses: warm::Uses::default(),
            bare: tenant_folders::Bare::default(),
            followed: AtomicI64::new(0),
            heard: AtomicU64::new(0),
            last_read: AtomicI64::new(0),
            under_way: changes::UnderWay::default(),
            behind: Behind::default(),
            provisional: Provisional::new(),
            events: events::Events::new(),
            refresh_queue: refresh_queue::RefreshQueue::default(),
            following: tokio::sync::Mutex::default(),
            offline: OfflineCopy::default(),
            withheld: Withheld::default(),
            shadow,
            memory,
            database,
            upstream,
            policies: ArcSwap::from_pointee(policies),
            deadline: AtomicU64::new(nanos(deadline)),
            clock,
            metrics,
        }
    }

    /// The same, which serves nothing of what is withheld.
    #[must_use]
    pub fn withholding(self, withheld: Withheld) -> Self {
        Self { withheld, ..self }
    }

    /// The nearest tier.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The middle tier.
    #[must_use]
    pub fn database(&self) -> &Arc<Database> {
        &self.database
    }

    /// The farthest tier, where one is configured.
    #[must_use]
    pub fn upstream(&self) -> Option<&Arc<dyn Upstream>> {
        self.upstream.as_ref()
    }

    /// The clock that everything here goes by.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The offline copy of an instance that was started without the database.
    #[must_use]
    pub fn offline(&self) -> &OfflineCopy {
        &self.offline
    }

    /// The policies (phases and ages) in force. Code that uses them more than once takes them once.
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

    /// Applies other policies. When this returns, no lookup uses the previous policies, unless it
    /// had begun before. It looks at every entry in memory, so it must not run on a thread that
    /// others wait for.
    ///
    /// A phase names the owner, and an answer that mixes two owners would be wrong: for example, an
    /// absence that one owner proves for a secret of the other. This keeps the owners apart:
    /// - A load, a read of a folder, a list and a write take the policies once (`PolicySnapshot`)
    ///   and use them to the end.
    /// - They may combine them with results of other policies: a read of a folder that they join, a
    ///   version, names that memory has. So the operation compares the policies once more at the
    ///   end, and begins anew if they are no longer the same (`Resolver::with_stable_policy`). If
    ///   they are the same, they were the same all the time.
    /// - Results that were loaded under the previous policies are gone, or cannot be stored, before
    ///   the new ones are in force: [`Memory::change_policies`]. Flights are forgotten in between,
    ///   while all fences are held. A flight that was started before is joined by no operation that
    ///   uses the new policies; a flight that is started after takes a fence first, and so waits
    ///   until the new policies can be taken.
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
        if moving.is_some() {
            self.note_missed_events();
        }
    }

    /// The policies and the fence for a load, a read or a list of a tenant, from beginning to end.
    fn policy_snapshot(&self, tenant: &Tenant) -> PolicySnapshot {
        // In this order: see `Memory::change_policies`.
        let fence = self.memory.fence(tenant);
        PolicySnapshot { fence, policies: self.policies() }
    }

    /// Whether these policies are in force, and so have been since they were taken: replaced
    /// policies do not come back.
    fn is_in_force(&self, policies: &Arc<Policies>) -> bool {
        Arc::ptr_eq(&self.policies.load(), policies)
    }

    /// Does work under one policy from beginning to end, and does it again if other policies have
    /// come into force meanwhile.
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

    /// Reads the changes of tenants: which phases they have of their own, so that these are known
    /// while the database is down; which tenants a migration switched; and which were shredded.
    /// When this returns, everything held of the changed tenants is gone.
    ///
    /// # Errors
    /// The database does not answer; the earlier knowledge stays.
    pub async fn follow(&self) -> Result<(), StoreError> {
        // One read at a time, to the end: otherwise a read from before a change could replace one
        // from after it.
        let mut last = self.following.lock().await;
        let is_doubted = self.phases_doubted.swap(false, Ordering::AcqRel);
        let from = last.moved.filter(|_| !is_doubted);
        let followed = self.follow_from(&mut last, from).await;
        if followed.is_err() && is_doubted {
            self.phases_doubted.store(true, Ordering::Release);
        }
        followed
    }

    /// Reads the same before the first request, when nothing is held of any tenant.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn begin(&self) -> Result<(), StoreError> {
        let mut last = self.following.lock().await;
        let (phases, moved) = self.read_phases().await?;
        *self.own_phases.write().unwrap_or_else(PoisonError::into_inner) = phases;
        last.moved = Some(moved);
        last.shredded = self.database.last_shredding().await?;
        // Where the register cannot be read, this is not known.
        if self.database.has_unclean_ends().await.unwrap_or(true) {
            // An instance that was killed, or still runs without the database, may have met a
            // denial or a change that the database was not told of.
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
        // Before the next wait: a caller that finds the new phase must find nothing from the old
        // one.
        if !moved.is_empty() {
            self.forget_tenants(&moved);
        }
        // From here on, no failure loses the known phases.
        last.moved = Some(up_to);
        let shredded = self.database.shredded(last.shredded).await?;
        if let Some((_, at)) = shredded.last() {
            last.shredded = Some(*at);
            self.forget_tenants(&shredded.into_iter().map(|(tenant, _)| tenant).collect());
        }
        // After that: from now on memory's answers for these tenants come from the database.
        self.watch_switched().await
    }

    /// Reads the phases of all tenants that have one of their own, and the last change that is
    /// included, or an earlier one.
    async fn read_phases(&self) -> Result<(OwnPhases, i64), StoreError> {
        let mut phases = OwnPhases::default();
        let mut keep = |tenant: &str, phase| {
            phases.set(tenant, Some(phase));
        };
        let up_to = self.database.own_phases(&mut keep).await?;
        Ok((phases, up_to))
    }

    /// Compares lookups with upstream for as long as tenants were switched lately.
    async fn watch_switched(&self) -> Result<(), StoreError> {
        if self.upstream.is_some() && self.shadow.since().is_some() {
            self.shadow.watch(self.database.last_run_seen().await?);
        }
        Ok(())
    }

    /// Forgets everything held of tenants that have changed their owner or were shredded.
    ///
    /// Data that was read before a shredding does not come back after this:
    /// - A fill of memory that began before carries a fence from before the one raised here.
    /// - A snapshot that was being read is refused by the database, where the generation has risen
    ///   with the shredding itself, long before anyone hears of it.
    /// - A later caller joins no flight from before. A flight that begins now reads the database
    ///   after the shredding, because we have read of the shredding there.
    /// - An unwrapped data key is dropped, and one that is being unwrapped is not kept.
    fn forget_tenants(&self, tenants: &HashSet<Tenant>) {
        self.memory.forget_tenants(tenants);
        self.note_heard();
        self.behind.forget(tenants);
        self.snapshots.forget_where(|tenant| tenants.contains(tenant));
        self.loads.forget_where(|(tenant, _)| tenants.contains(tenant));
        self.database.forget_data_keys(tenants);
    }

    /// Upstream's state at its last answer, where one is configured.
    #[must_use]
    pub fn upstream_state(&self) -> Option<UpstreamState> {
        self.upstream.as_ref().map(|upstream| upstream.health().state)
    }

    /// Calls upstream if its last call failed: callers with copies may not call it for long, and
    /// nobody would learn that it answers again. Costs a list of folders, at most one a minute of
    /// those that succeed, and none while upstream is left alone. One that answers without having
    /// anything is called where `rejected` says so.
    pub async fn try_upstream(&self, rejected: bool) {
        let failed = match self.upstream_state() {
            Some(UpstreamState::Down | UpstreamState::LoginRefused) => true,
            Some(UpstreamState::Rejected) => rejected,
            _ => false,
        };
        if failed && self.policies().uses(Phase::owned_upstream) {
            if let Some(upstream) = &self.upstream {
                upstream.notice_recovery().await;
            }
            // The outcome is visible in the tier's state.
            drop(self.tenant_directory.current(Lane::Changes).await);
        }
    }

    /// Loads and snapshots in progress.
    #[must_use]
    pub fn flights(&self) -> (usize, usize) {
        (self.loads.in_the_air(), self.snapshots.in_the_air())
    }

    /// Keys that the system did not let the process lock in memory.
    #[must_use]
    pub fn keys_not_locked(&self) -> u64 {
        keys_not_locked()
    }

    fn own_phase(&self, tenant: &Tenant) -> Option<Phase> {
        self.own_phases.read().unwrap_or_else(PoisonError::into_inner).get(tenant.as_str())
    }

    /// Applies here what the database has just returned for a tenant: its own phase, which this
    /// returns, and a denial that another instance may have met.
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

    /// Applies the tenant's own phase here, where it differs from the known one.
    async fn keep_up(&self, tenant: &Tenant, own: Option<Phase>) -> Result<(), StoreError> {
        if self.own_phase(tenant) == own {
            return Ok(());
        }
        // The row may be older or newer than our knowledge, so the present state is read. One read
        // at a time here too. Other changes reach us through the feed.
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

    /// The age of the database's copy of a tenant, by the database's clock, where it may be served
    /// at all. A time in the future has no meaning: it was written by a wrong clock (the previous
    /// version may use its machine's clock), or the database's clock was set back.
    fn copy_age(&self, company: &Company) -> Option<Duration> {
        const MAX_AHEAD: Duration = Duration::from_secs(60);
        let trusted = company.snapshot_at.filter(|at| *at <= self.clock.database_now().plus(MAX_AHEAD))?;
        let denied = company.denied_at.is_some() || self.is_denied(company.tenant.as_str());
        (!denied).then(|| self.clock.age(trusted))
    }

    /// How long a caller with a servable copy waits for upstream to confirm it: only briefly for an
    /// upstream that is known to fail.
    fn patience_to_confirm(&self) -> Duration {
        match self.upstream_state() {
            // The rest of the deadline is for the copy, if upstream does not answer.
            Some(UpstreamState::Up | UpstreamState::Unknown | UpstreamState::Rejected) => self.deadline().mul_f64(0.75),
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

    /// The error for a tenant whose folder upstream denies.
    fn denial(&self, tenant: &str) -> ResolveError {
        let until = self.memory.denied_until(tenant);
        ResolveError::Denied { retry_after: until.map(|until| until.saturating_sub(self.clock.running())) }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}
