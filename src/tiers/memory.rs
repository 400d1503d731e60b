//! The memory tier: secrets that a lookup finds without leaving the process.

mod names;
mod stages;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt,
    hash::{BuildHasher as _, Hash, RandomState},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use quick_cache::{DefaultHashBuilder, Equivalent, Lifecycle, Weighter, sync::Cache};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use self::{names::weight_of, stages::Stages};
pub use self::{
    names::{Keys, Names},
    stages::{Staged, StagedValues},
};
use crate::{
    answer::Answer,
    clock::{Clock, Confirmed, Moment},
    policy::Ages,
    secret::SecretKey,
    tenant::Tenant,
    units,
};

/// `[memory]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Bytes kept at most, names and bookkeeping included.
    #[serde(with = "units::size")]
    pub capacity: u64,
    /// How long a secret is answered without asking the tiers below.
    #[serde(with = "units::duration")]
    pub ttl: Duration,
    /// How long an absence is answered without asking the tiers below.
    #[serde(with = "units::duration")]
    pub negative_ttl: Duration,
    /// The age beyond which nothing is served, even if the tiers below fail.
    #[serde(with = "units::duration")]
    pub max_stale: Duration,
    /// The number of tenants, the most recently asked for, whose secrets are read from the database
    /// at the start; 0 for none.
    pub warm_tenants: usize,
    /// The file of the offline copy: memory's content, sealed, for a start without the database.
    /// Without this setting there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(alias = "snapshot_file")]
    pub offline_file: Option<PathBuf>,
    /// How often that file is written, if something has changed.
    #[serde(with = "units::duration")]
    #[serde(alias = "snapshot_every")]
    pub offline_every: Duration,
}

impl Config {
    /// The faults of these settings, each beginning with the setting below `memory`.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.capacity < 64 << 10 {
            faults.push("capacity: at least \"64KiB\" is needed".to_owned());
        }
        if self.max_stale.is_zero() {
            faults.push("max_stale: must be longer than nothing, as in \"10s\"".to_owned());
        }
        if self.offline_every < Duration::from_secs(1) {
            faults.push("offline_every: at least \"1s\" is needed".to_owned());
        }
        match &self.offline_file {
            Some(file) if file.file_name().is_none() => {
                faults.push("offline_file: must name a file, as in \"/var/lib/secretier/offline\"".to_owned());
            }
            _ => {}
        }
        faults
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            capacity: 256 << 20,
            ttl: Duration::from_secs(5 * 60),
            negative_ttl: Duration::from_secs(30),
            max_stale: Duration::from_secs(24 * 60 * 60),
            warm_tenants: 1000,
            offline_file: None,
            offline_every: Duration::from_secs(60),
        }
    }
}

/// Secrets, known absences and the names in each tenant's last snapshot, bounded by bytes.
///
/// Reads take no lock of ours; quick_cache's locks are held for a lookup only. The interleavings of
/// a fill and a change that could go wrong, and what prevents each:
///
/// - *Fill begins, change is recorded, fill ends.* A fill carries the [`Fence`] that was taken
///   before its read began; a change raises the fence; [`Self::fill`] compares the two and inserts
///   under the same lock that [`Self::change`] raises and removes under, so a late fill is dropped
///   and cannot slip in between.
/// - *A copy is read, a younger snapshot is stored, the copy is filled.* A snapshot raises no
///   fence, because it is no change by others. A fill that was confirmed earlier than the held
///   entry, or than the snapshot that lacks the secret, is dropped.
/// - *A denial and a success cross.* Both go through the fence as well.
/// - *Policies change while something is loaded under the previous ones.* See
///   [`Self::change_policies`].
///
/// Fences are striped: tenants that share one drop each other's fills now and then,
/// which costs a lookup and is never wrong.
pub struct Memory {
    entries: Arc<Entries>,
    snapshots: Cache<Tenant, Arc<Names>, ByBytes, DefaultHashBuilder, WithEntries>,
    stages: Stages,
    fences: Box<[Mutex<u64>]>,
    stripes: RandomState,
    denied: RwLock<HashMap<Tenant, Duration>>,
    any_denied: AtomicBool,
    /// Counts fills, removals and denials, each after it is done.
    changes: AtomicU64,
    /// Notified when something was removed that must not be kept anywhere.
    lost: Notify,
    clock: Clock,
}

/// Memory's entry for one secret.
#[derive(Debug)]
pub struct Entry {
    /// The secret, or `None` where its absence was proved.
    pub answer: Option<Answer>,
    /// When its owner last confirmed it.
    pub confirmed_at: Confirmed,
    /// When it was loaded: its freshness is counted from this.
    pub loaded_at: Moment,
    /// Until when it is answered without asking further.
    pub fresh_until: Moment,
    /// Until when it may be served if nothing else answers.
    pub servable_until: Moment,
}

impl Entry {
    /// An entry confirmed at `confirmed_at` and loaded now.
    #[must_use]
    pub fn new(answer: Option<Answer>, confirmed_at: Confirmed, now: impl Into<Moment>, ages: Ages) -> Self {
        let now = now.into();
        let servable_until = confirmed_at.moment.plus(ages.memory_max_stale);
        let lifetime = if answer.is_some() { ages.ttl } else { ages.negative_ttl };
        let fresh_until = now.plus(lifetime).sooner(servable_until);
        Self { answer, confirmed_at, loaded_at: now, fresh_until, servable_until }
    }

    /// The same entry under other ages; `None` where they change nothing. It is never fresh for
    /// longer than before: it may be soft-invalidated, or be served in place of a failed answer.
    fn under(&self, ages: Ages) -> Option<Self> {
        let now = Self::new(self.answer.clone(), self.confirmed_at, self.loaded_at, ages);
        let now = Self { fresh_until: now.fresh_until.sooner(self.fresh_until), ..now };
        let is_other = now.fresh_until != self.fresh_until || now.servable_until != self.servable_until;
        is_other.then_some(now)
    }

    /// The same entry, fresh for `lifetime` at most.
    #[must_use]
    pub fn with_lifetime(mut self, lifetime: Duration, now: Moment) -> Self {
        self.fresh_until = self.fresh_until.sooner(now.plus(lifetime));
        self
    }
}

/// Memory's answer to a lookup.
#[derive(Debug)]
pub enum Recall {
    /// An answer that can be served without asking further.
    Fresh(Arc<Entry>),
    /// A secret that may be served if the tiers below fail.
    Stale(Arc<Entry>),
    /// Nothing that may be served: nothing is held, it is too old, or upstream denies the tenant.
    Nothing,
}

/// The secrets that memory may serve, and the tenants that it may not serve.
#[derive(Debug)]
pub struct Servable {
    /// Every secret that may still be served, except for secrets of denied tenants.
    pub secrets: Vec<(Tenant, Arc<Entry>)>,
    /// The denied tenants, and from when, by the running clock, each is worth asking for again.
    pub denied: Vec<(Tenant, Duration)>,
}

/// The state of a tenant's changes when a read began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    stripe: usize,
    generation: u64,
}

impl Memory {
    /// The bytes that an entry is charged beside its names and its finished bytes: for the entry,
    /// its place in the cache and the room that the cache grows by, reference counts, and the
    /// heap's rounding. `scripts/bench --only cached` measures it: the resident memory of 100,000
    /// secrets, 100 a tenant, divided by their number, less names and finished bytes.
    const OVERHEAD: u64 = 440;
    const STRIPES: usize = 1024;

    /// An empty memory.
    #[must_use]
    pub fn build(config: &Config, clock: Clock) -> Self {
        let cache_of = |bytes: u64| (usize::try_from(bytes / 1024).unwrap_or(usize::MAX).clamp(16, 1 << 20), bytes);
        let [bytes, names, stages] = shares(config.capacity);
        let ((items, bytes), (tenants, names), (staged, stages)) = (cache_of(bytes), cache_of(names), cache_of(stages));
        let entries = Arc::new(Entries::with_weighter(items, bytes, ByBytes));
        let with_entries = WithEntries(Arc::clone(&entries));
        Self {
            entries,
            snapshots: Cache::with(tenants, names, ByBytes, DefaultHashBuilder::default(), with_entries),
            stages: Stages::with_weighter(staged, stages, stages::ByBytes),
            fences: (0..Self::STRIPES).map(|_| Mutex::new(0)).collect(),
            stripes: RandomState::new(),
            denied: RwLock::default(),
            any_denied: AtomicBool::new(false),
            changes: AtomicU64::new(0),
            lost: Notify::new(),
            clock,
        }
    }

    /// Returns the entry for one secret. The names must have been checked; they come as text so
    /// that a hit allocates nothing.
    #[must_use]
    pub fn recall(&self, tenant: &str, key: &str) -> Recall {
        self.recall_at(tenant, key, self.clock.moment())
    }

    /// The same for a caller that has just read the clock.
    #[must_use]
    pub fn recall_at(&self, tenant: &str, key: &str, now: Moment) -> Recall {
        if self.any_denied.load(Ordering::Acquire) && self.read_denied().contains_key(tenant) {
            return Recall::Nothing;
        }
        match self.entries.get(&NameRef(tenant, key)) {
            Some(entry) if now.is_before(entry.fresh_until) => Recall::Fresh(entry),
            Some(entry) if entry.answer.is_some() && now.is_before(entry.servable_until) => Recall::Stale(entry),
            _ => Recall::Nothing,
        }
    }

    /// Takes the fence that a fill must carry; to be called before the read begins.
    #[must_use]
    pub fn fence(&self, tenant: &Tenant) -> Fence {
        let stripe = self.stripe(tenant);
        Fence { stripe, generation: *lock(&self.fences[stripe]) }
    }

    /// Whether no change was recorded since the fence was taken.
    #[must_use]
    pub fn holds(&self, fence: Fence) -> bool {
        *lock(&self.fences[fence.stripe]) == fence.generation
    }

    /// Keeps upstream's answer for a secret, unless a change was recorded since the read began, or
    /// a younger snapshot is held.
    pub fn fill(&self, fence: Fence, tenant: &Tenant, key: &SecretKey, entry: Arc<Entry>) -> bool {
        let generation = lock(&self.fences[fence.stripe]);
        let is_late = self.knows_later(tenant, key, entry.confirmed_at);
        self.fill_if(*generation == fence.generation, is_late, tenant, key, entry)
    }

    /// Keeps a copy from the database that was read after `began`, unless a change was recorded
    /// since, or any snapshot was stored. The snapshot may be later than the copy even if the
    /// copy's time is later: another instance, whose clock is ahead, may have stored the copy.
    pub fn fill_copy(&self, fence: Fence, tenant: &Tenant, key: &SecretKey, entry: Arc<Entry>, began: Moment) -> bool {
        let generation = lock(&self.fences[fence.stripe]);
        let has_landed = self.names(tenant).is_some_and(|names| !began.is_after(names.landed_at));
        let is_late = has_landed || self.knows_later(tenant, key, entry.confirmed_at);
        self.fill_if(*generation == fence.generation, is_late, tenant, key, entry)
    }

    /// To be called under the tenant's fence. `holds` says whether the fence still holds, `is_late`
    /// whether something later is held.
    fn fill_if(&self, holds: bool, is_late: bool, tenant: &Tenant, key: &SecretKey, entry: Arc<Entry>) -> bool {
        if !holds {
            self.drop_other(tenant, key, &entry);
        } else if !is_late {
            let is_secret = entry.answer.is_some();
            self.entries.insert(Name(tenant.clone(), key.clone()), entry);
            // The next snapshot must know of it, in order to drop it if it was deleted.
            if is_secret && !self.note_stray(tenant, key) {
                self.entries.remove(&NameRef(tenant.as_str(), key.as_str()));
            }
            self.changed();
        }
        holds && !is_late
    }

    /// Drops the entry of a secret if it differs from an answer that could not be kept because a
    /// change was recorded: either may be the later one, and no later answer may be older. To be
    /// called under the tenant's fence.
    fn drop_other(&self, tenant: &Tenant, key: &SecretKey, answered: &Entry) {
        if self.holds_other(tenant, key, answered.answer.as_ref().map(Answer::bare_etag)) {
            self.entries.remove(&NameRef(tenant.as_str(), key.as_str()));
            self.changed();
        }
    }

    /// Whether an entry is held that has another validator than this; without one, an entry that is
    /// not an absence.
    fn holds_other(&self, tenant: &Tenant, key: &SecretKey, etag: Option<&str>) -> bool {
        let held = self.entries.peek(&NameRef(tenant.as_str(), key.as_str()));
        held.is_some_and(|held| held.answer.as_ref().map(Answer::bare_etag) != etag)
    }

    /// Whether memory has something later for a secret than that time: from a snapshot, which was
    /// stored between the read of a copy and its fill and is no change that would raise the fence.
    fn knows_later(&self, tenant: &Tenant, key: &SecretKey, confirmed_at: Confirmed) -> bool {
        let held = self.entries.peek(&NameRef(tenant.as_str(), key.as_str()));
        held.is_some_and(|held| held.confirmed_at > confirmed_at)
            || self.names(tenant).is_some_and(|names| names.confirmed_at > confirmed_at)
    }

    /// The same for a secret that the database owns: snapshots do not concern it.
    pub fn fill_owned(&self, fence: Fence, tenant: &Tenant, key: &SecretKey, entry: Arc<Entry>) {
        let generation = lock(&self.fences[fence.stripe]);
        if *generation == fence.generation {
            self.entries.insert(Name(tenant.clone(), key.clone()), entry);
            self.changed();
        } else {
            self.drop_other(tenant, key, &entry);
        }
    }

    /// Keeps a whole snapshot, unless a change was recorded since its read began, and drops all
    /// entries of the tenant that are not in it.
    pub fn fill_snapshot(&self, fence: Fence, tenant: &Tenant, entries: &HashMap<SecretKey, Arc<Entry>>, names: Names) {
        let generation = lock(&self.fences[fence.stripe]);
        if *generation != fence.generation {
            return;
        }
        self.forget_all_but(&names.keys, tenant);
        // An absence that was proved before is dropped too.
        for key in names.flaws.unusable.keys() {
            self.entries.remove(&NameRef(tenant.as_str(), key.as_str()));
        }
        for (key, entry) in entries {
            self.entries.insert(Name(tenant.clone(), key.clone()), Arc::clone(entry));
        }
        // Last: if it is too large to be kept, its entries are evicted with it.
        self.snapshots.insert(tenant.clone(), Arc::new(names));
        self.set_denied(tenant, None);
        self.changed();
    }

    /// Drops a tenant's entries that may be older than a read of its folder, which began at
    /// `confirmed_at` and had `ended` by then: entries of the keys that it brought, and of the keys
    /// that memory knows. The read is answered, whether it could be kept or a change has overtaken
    /// it, and no later answer may be older.
    ///
    /// Where it was kept, an older fill meets it and is dropped. Where it was not, such a fill
    /// would meet nothing, and would be taken for news: `raises` raises the fence against it, for
    /// the case that a tier below has something older. Returns whether the read was kept.
    pub fn forget_before<'k>(
        &self,
        tenant: &Tenant,
        brought: impl Iterator<Item = &'k SecretKey>,
        confirmed_at: Confirmed,
        ended: Moment,
        raises: bool,
    ) -> bool {
        let mut generation = lock(&self.fences[self.stripe(tenant)]);
        let is_kept = self.names(tenant).is_some_and(|names| names.confirmed_at == confirmed_at);
        if raises && !is_kept {
            *generation += 1;
        }
        let is_before = |key: &SecretKey| {
            let held = self.entries.peek(&NameRef(tenant.as_str(), key.as_str()));
            // If an entry's read began before this one had ended, it is not known which has seen
            // the later state.
            held.is_some_and(|held| {
                let is_ours = is_kept && held.confirmed_at == confirmed_at;
                !is_ours && !held.confirmed_at.moment.is_after(ended)
            })
        };
        for key in brought.filter(|key| is_before(key)) {
            self.entries.remove(&NameRef(tenant.as_str(), key.as_str()));
        }
        if let Some(names) = self.snapshots.get(tenant).filter(|_| !is_kept) {
            names.outdated.store(true, Ordering::Relaxed);
            names.drop_entries(tenant, &self.entries, is_before);
        }
        self.changed();
        is_kept
    }

    /// Drops the entries that differ from a list which was just read in the database and is about
    /// to be answered: a later lookup must not give an older value. Each key comes with its
    /// validator in the list, or with `None` where the secret is deleted there.
    ///
    /// The entry may be the later of the two; then it is read again, which costs a lookup and is
    /// never wrong. The fence rises, so that no fill in progress brings it back.
    pub fn forget_others<'k>(
        &self,
        tenant: &Tenant,
        read: impl Iterator<Item = (&'k SecretKey, Option<&'k str>)>,
    ) -> bool {
        let mut has_others = false;
        for (key, _) in read.filter(|(key, etag)| self.holds_other(tenant, key, *etag)) {
            has_others = true;
            self.change(tenant, key);
        }
        has_others
    }

    /// Drops everything held of a tenant that turned out not to exist, unless a change was recorded
    /// since that was read.
    pub fn forget_tenant(&self, fence: Fence, tenant: &Tenant) {
        let generation = lock(&self.fences[fence.stripe]);
        if *generation == fence.generation {
            self.forget_all_but(&Keys::default(), tenant);
            self.set_denied(tenant, None);
            self.changed();
        }
    }

    /// Forgets tenants whose secrets have changed their owner: answers of the previous owner,
    /// absences included, are not the new owner's. Looks at every entry, which is acceptable
    /// because it is rare.
    pub fn forget_tenants(&self, tenants: &HashSet<Tenant>) {
        // Held to the end, so that nobody puts back an entry that was found just before it was
        // removed; taken in one order, so that two calls do not wait for each other.
        let stripes: BTreeSet<usize> = tenants.iter().map(|tenant| self.stripe(tenant)).collect();
        let mut fences: Vec<_> = stripes.into_iter().map(|stripe| lock(&self.fences[stripe])).collect();
        for generation in &mut fences {
            **generation += 1;
        }
        for tenant in tenants {
            self.snapshots.remove(tenant);
        }
        self.entries.retain(|name, _| !tenants.contains(&name.0));
        self.stages.retain(|name, _| !tenants.contains(&name.0));
        self.changed();
        self.lost.notify_one();
    }

    /// Forgets everything except for denials: everything held may have changed.
    pub fn forget_all(&self) {
        let mut fences: Vec<_> = self.fences.iter().map(lock).collect();
        for generation in &mut fences {
            **generation += 1;
        }
        self.snapshots.clear();
        self.entries.clear();
        self.stages.clear();
        self.changed();
        self.lost.notify_one();
    }

    /// Applies other policies: drops everything held of tenants whose phases have changed, and lets
    /// nothing be stored that was loaded under the previous policies. They come into force in
    /// `then`, which runs in between and must not call memory.
    ///
    /// All fences are held from the first to the last step, so that a caller that takes a fence
    /// first and then the policies finds either
    /// - the previous ones, with a fence that is raised here: its load is not stored; or
    /// - the new ones, and nothing in memory from a previous owner: that was dropped first, and
    ///   loads under the previous policies can no longer be stored.
    ///
    /// Looks at every entry, which is acceptable because it is rare: hits continue, and loads wait
    /// for it, some ten milliseconds where hundreds of thousands of entries are held.
    pub fn change_policies(&self, has_moved: Option<&dyn Fn(&Tenant) -> bool>, then: impl FnOnce()) {
        // In the order in which all code takes several fences.
        let mut fences: Vec<_> = self.fences.iter().map(lock).collect();
        for generation in &mut fences {
            **generation += 1;
        }
        if let Some(has_moved) = has_moved {
            let mut known: HashMap<Tenant, bool> = HashMap::new();
            let mut stays = |tenant: &Tenant| match known.get(tenant) {
                Some(moved) => !moved,
                None => !*known.entry(tenant.clone()).or_insert_with(|| has_moved(tenant)),
            };
            let tenants = self.snapshots.iter().map(|(tenant, _)| tenant).filter(|tenant| !stays(tenant));
            for tenant in tenants.collect::<Vec<_>>() {
                self.snapshots.remove(&tenant);
            }
            let stays = std::cell::RefCell::new(stays);
            self.entries.retain(|name, _| stays.borrow_mut()(&name.0));
        }
        then();
    }

    /// Applies other ages to the held entries; entries that are loaded from now on have them
    /// already. A shorter time counts at once, and so does a longer `max_stale`, which may be
    /// needed in an outage. A longer `ttl` counts for entries that are loaded from now on.
    ///
    /// Processes one entry after the other, each as it is held under its fence, so that a change
    /// meanwhile stays. An entry is replaced in its place, so none is missed.
    pub fn age(&self, ages_of: impl Fn(&Tenant, &SecretKey) -> Ages) {
        for (Name(tenant, key), seen) in self.entries.iter() {
            let ages = ages_of(&tenant, &key);
            if seen.under(ages).is_none() {
                continue;
            }
            let _fence = lock(&self.fences[self.stripe(&tenant)]);
            let held = self.entries.peek(&NameRef(tenant.as_str(), key.as_str()));
            if let Some(aged) = held.and_then(|held| held.under(ages)) {
                // If it has been evicted just now, there is nothing to replace.
                let _ = self.entries.replace(Name(tenant, key), Arc::new(aged), true);
            }
        }
    }

    /// Limits the held bytes from now on.
    pub fn set_capacity(&self, capacity: u64) {
        let [bytes, names, stages] = shares(capacity);
        shrink_or_grow(stages, self.stages.capacity(), |bytes| self.stages.set_capacity(bytes));
        shrink_or_grow(bytes, self.entries.capacity(), |bytes| self.entries.set_capacity(bytes));
        shrink_or_grow(names, self.snapshots.capacity(), |bytes| self.snapshots.set_capacity(bytes));
    }

    /// Records that one secret has changed: forgets it, and raises the fence, so that reads that
    /// began before cannot be stored.
    pub fn change(&self, tenant: &Tenant, key: &SecretKey) {
        let mut generation = lock(&self.fences[self.stripe(tenant)]);
        *generation += 1;
        self.entries.remove(&NameRef(tenant.as_str(), key.as_str()));
        self.stages.remove(&NameRef(tenant.as_str(), key.as_str()));
        self.changed();
        if let Some(names) = self.snapshots.get(tenant) {
            names.outdated.store(true, Ordering::Relaxed);
            // Their values may contain its value.
            names.drop_entries(tenant, &self.entries, |key| self.refers(tenant, key));
        }
    }

    /// Whether a held value depends on other secrets.
    fn refers(&self, tenant: &Tenant, key: &SecretKey) -> bool {
        let held = self.entries.peek(&NameRef(tenant.as_str(), key.as_str()));
        held.is_some_and(|held| held.answer.as_ref().is_some_and(Answer::refers))
    }

    /// Records that one secret may have changed (soft invalidation): its entry can still be served,
    /// but the tiers below are asked first; the fence rises as for a change.
    pub fn soft_invalidate(&self, tenant: &Tenant, key: &SecretKey) {
        let mut generation = lock(&self.fences[self.stripe(tenant)]);
        *generation += 1;
        let name = NameRef(tenant.as_str(), key.as_str());
        if let Some(entry) = self.entries.get(&name) {
            match entry.answer {
                Some(_) => self.believe_until(tenant, key, &entry, self.clock.moment()),
                None => drop(self.entries.remove(&name)),
            }
        }
        if let Some(names) = self.snapshots.get(tenant) {
            names.outdated.store(true, Ordering::Relaxed);
            let now = self.clock.moment();
            for key in names.all().into_iter().filter(|key| self.refers(tenant, key)) {
                if let Some(entry) = self.entries.get(&NameRef(tenant.as_str(), key.as_str())) {
                    self.believe_until(tenant, &key, &entry, now);
                }
            }
        }
    }

    /// Serves the held entry for `lifetime` without asking, because the tiers below failed or are
    /// slow, so that not every caller asks them; unless another entry is held by now.
    pub fn serve_stale(&self, tenant: &Tenant, key: &SecretKey, entry: &Arc<Entry>, lifetime: Duration) {
        let _fence = lock(&self.fences[self.stripe(tenant)]);
        let held = self.entries.get(&NameRef(tenant.as_str(), key.as_str()));
        if held.is_some_and(|held| Arc::ptr_eq(&held, entry)) {
            self.believe_until(tenant, key, entry, self.clock.moment().plus(lifetime));
        }
    }

    /// To be called under the tenant's fence.
    fn believe_until(&self, tenant: &Tenant, key: &SecretKey, entry: &Entry, until: Moment) {
        let fresh_until = until.sooner(entry.servable_until);
        let entry = Entry { answer: entry.answer.clone(), fresh_until, ..*entry };
        self.entries.insert(Name(tenant.clone(), key.clone()), Arc::new(entry));
    }

    /// Stops serving a tenant until `retry_at` at least, by the running clock, if nothing changed
    /// since the fence was taken; `false` where something has.
    pub fn deny(&self, fence: Fence, tenant: &Tenant, retry_at: Duration) -> bool {
        let generation = lock(&self.fences[fence.stripe]);
        let holds = *generation == fence.generation;
        if holds {
            self.deny_until(tenant, retry_at);
        }
        holds
    }

    /// The same for a denial that another instance has met and reported. The fence rises: no read
    /// that began before brings the tenant back.
    pub fn denied_elsewhere(&self, tenant: &Tenant, retry_at: Duration) {
        let mut generation = lock(&self.fences[self.stripe(tenant)]);
        *generation += 1;
        self.deny_until(tenant, retry_at);
    }

    /// To be called under the tenant's fence.
    fn deny_until(&self, tenant: &Tenant, retry_at: Duration) {
        // A longer pause from before stays: it keeps callers from asking again.
        let until = self.denied_until(tenant.as_str()).map_or(retry_at, |until| until.max(retry_at));
        let is_new = self.denied_until(tenant.as_str()).is_none();
        self.set_denied(tenant, Some(until));
        if is_new {
            self.changed();
            self.lost.notify_one();
        }
    }

    /// Serves a denied tenant again, if nothing changed since the fence was taken.
    pub fn allow(&self, fence: Fence, tenant: &Tenant) {
        let generation = lock(&self.fences[fence.stripe]);
        if *generation == fence.generation {
            self.set_denied(tenant, None);
        }
    }

    /// For a tenant whose folder upstream denied at the last call: when it is worth asking again,
    /// by the running clock.
    #[must_use]
    pub fn denied_until(&self, tenant: &str) -> Option<Duration> {
        self.any_denied.load(Ordering::Acquire).then(|| self.read_denied().get(tenant).copied()).flatten()
    }

    /// The names in a tenant's last snapshot, unless something has changed since.
    #[must_use]
    pub fn names(&self, tenant: &Tenant) -> Option<Arc<Names>> {
        self.snapshots.get(tenant).filter(|names| !names.outdated.load(Ordering::Relaxed))
    }

    /// Whether anything of upstream's is held for a tenant, or a denial of it.
    #[must_use]
    pub fn knows(&self, tenant: &Tenant) -> bool {
        self.snapshots.contains_key(tenant) || self.denied_until(tenant.as_str()).is_some()
    }

    /// The tenants with a held snapshot, and its time. Looks at all of them.
    #[must_use]
    pub fn snapshots(&self) -> Vec<(Tenant, Confirmed)> {
        self.snapshots.iter().map(|(tenant, names)| (tenant, names.confirmed_at)).collect()
    }

    /// The last snapshot as a whole, where every entry of it is still held.
    #[must_use]
    pub fn snapshot(&self, tenant: &Tenant) -> Option<(Arc<Names>, Vec<Arc<Entry>>)> {
        let names = self.names(tenant)?;
        let held = |key: &SecretKey| {
            let entry = self.entries.get(&NameRef(tenant.as_str(), key.as_str()))?;
            // An entry from another read than the snapshot's is not part of it.
            (entry.answer.is_some() && entry.confirmed_at == names.confirmed_at).then_some(entry)
        };
        let entries = names.keys.iter().map(held).collect::<Option<Vec<_>>>()?;
        Some((names, entries))
    }

    /// The largest number of bytes that may be held.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.entries.capacity() + self.snapshots.capacity() + self.stages.capacity()
    }

    /// The secrets that may still be served. Takes each lock only to look at one entry.
    #[must_use]
    pub fn servable(&self) -> Servable {
        let now = self.clock.moment();
        let is_servable = |entry: &Entry| entry.answer.is_some() && now.is_before(entry.servable_until);
        let entries = self.entries.iter().filter(|(_, entry)| is_servable(entry));
        let mut entries: Vec<_> = entries.map(|(name, entry)| (name.0, entry)).collect();
        // Read last: a denial meanwhile counts.
        let denied = self.read_denied().clone();
        entries.retain(|(tenant, _)| !denied.contains_key(tenant));
        Servable { secrets: entries, denied: denied.into_iter().collect() }
    }

    /// A number that differs after every change of [`Self::servable`]'s result, except for
    /// evictions and expiries.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Waits until something was removed that must not be kept anywhere, since the last wait:
    /// tenants were forgotten or denied. Only one caller may wait.
    pub async fn lost(&self) {
        self.lost.notified().await;
    }

    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Bytes held, by the same measure as the capacity.
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.entries.weight() + self.snapshots.weight() + self.stages.weight()
    }

    /// Secrets and known absences held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Drops the tenant's secrets that are not among these: they were deleted. To be called under
    /// the tenant's fence.
    fn forget_all_but(&self, keys: &Keys, tenant: &Tenant) {
        if let Some((_, before)) = self.snapshots.remove(tenant) {
            before.drop_entries(tenant, &self.entries, |key| !keys.contains(key));
        }
    }

    /// Notes a secret that came without a snapshot; `false` where that could not be kept. To be
    /// called under the tenant's fence.
    fn note_stray(&self, tenant: &Tenant, key: &SecretKey) -> bool {
        let is_noted = |names: Arc<Names>| names.keys.contains(key) || names.note_stray(key);
        if !self.snapshots.get(tenant).is_some_and(is_noted) {
            // Removed first: names that are replaced in place would evict their entries.
            let names = match self.snapshots.remove(tenant) {
                Some((_, names)) => names.with_a_stray(key),
                None => Names::of_a_stray(key, self.clock.confirmed_now()),
            };
            self.snapshots.insert(tenant.clone(), Arc::new(names));
        }
        // If it was evicted just now, it did not evict an entry that it did not name yet.
        self.snapshots.contains_key(tenant)
    }

    fn stripe(&self, tenant: &Tenant) -> usize {
        // The remainder is below STRIPES, so it always fits.
        usize::try_from(self.stripes.hash_one(tenant) % Self::STRIPES as u64).unwrap_or(0)
    }

    fn read_denied(&self) -> std::sync::RwLockReadGuard<'_, HashMap<Tenant, Duration>> {
        self.denied.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Only tenants with a folder can be denied, which bounds this map.
    fn set_denied(&self, tenant: &Tenant, retry_at: Option<Duration>) {
        if retry_at.is_none() && !self.any_denied.load(Ordering::Acquire) {
            return;
        }
        let mut denied = self.denied.write().unwrap_or_else(PoisonError::into_inner);
        match retry_at {
            Some(retry_at) => drop(denied.insert(tenant.clone(), retry_at)),
            None => drop(denied.remove(tenant)),
        }
        self.any_denied.store(!denied.is_empty(), Ordering::Release);
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("len", &self.len()).field("weight", &self.weight()).finish_non_exhaustive()
    }
}

/// Divides the capacity into a part for entries, a part for snapshots, which hold names only, an
/// eighth, and a part for the other values of rotations that run, of which there are few.
fn shares(capacity: u64) -> [u64; 3] {
    [capacity - capacity / 8 - capacity / 32, capacity / 8, capacity / 32]
}

/// The entries that are left after shrinking are the most used, and all count as such: new entries
/// would be the first to be evicted. So a little more is evicted, to make room for them.
fn shrink_or_grow(capacity: u64, before: u64, set: impl Fn(u64)) {
    if capacity < before {
        set(capacity - capacity / 8);
    }
    set(capacity);
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Entries = Cache<Name, Arc<Entry>, ByBytes>;

/// Evicts a tenant's entries with its names: without the names, a snapshot would not know which
/// entries it lacks. Runs under a lock of the names' cache and takes one of the entries' cache; no
/// code takes the two in the other order.
#[derive(Clone)]
struct WithEntries(Arc<Entries>);

impl Lifecycle<Tenant, Arc<Names>> for WithEntries {
    type RequestState = ();

    fn on_evict(&self, _: &mut (), tenant: Tenant, names: Arc<Names>) {
        names.drop_entries(&tenant, &self.0, |_| true);
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Name(Tenant, SecretKey);

/// A name by reference; it hashes as [`Name`] does.
#[derive(Hash)]
struct NameRef<'a>(&'a str, &'a str);

impl Equivalent<Name> for NameRef<'_> {
    fn equivalent(&self, name: &Name) -> bool {
        self.0 == name.0.as_str() && self.1 == name.1.as_str()
    }
}

#[derive(Clone, Copy)]
struct ByBytes;

impl Weighter<Name, Arc<Entry>> for ByBytes {
    fn weight(&self, name: &Name, entry: &Arc<Entry>) -> u64 {
        let held = entry.answer.as_ref().map_or(0, Answer::weight);
        Memory::OVERHEAD + (name.0.as_str().len() + name.1.as_str().len()) as u64 + held
    }
}

impl Weighter<Tenant, Arc<Names>> for ByBytes {
    fn weight(&self, tenant: &Tenant, names: &Arc<Names>) -> u64 {
        let keys: usize = names.keys.iter().map(weight_of).sum();
        Memory::OVERHEAD + (tenant.as_str().len() + keys + names.flaws.weight() + names.room) as u64
    }
}

#[cfg(test)]
mod tests;
