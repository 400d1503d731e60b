//! Reading a tenant's folder whole, and writing it back to database and memory.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    CacheStatus, ForwardReason, Lane, PolicySnapshot, ResolveError, Resolver, Standing,
    behind::{Read, Watermark},
    shared::{Reader, Turn},
    tenant_directory::Found,
};
use crate::{
    answer::Answer,
    clock::{Confirmed, Moment, Timestamp},
    flaws::{Flaws, Unusable},
    log,
    long_work::{Pace, SHORT, weight_of},
    phase::Phase,
    policy::{Ages, Policies},
    secret::SecretKey,
    tenant::Tenant,
    tiers::{
        database::{Began, Company, Current, Held, Listing, Source, StoreError, StoreOutcome},
        memory::{Entry, Fence, Names, Recall},
        upstream::{Fetched, Snapshot, Upstream, UpstreamError, UpstreamSecret},
    },
};

/// A tenant's secrets as one read of upstream returned them.
#[derive(Debug)]
pub struct Fresh {
    /// Each secret of the folder. A key that is not here is absent.
    pub entries: HashMap<SecretKey, Arc<Entry>>,
    /// The folder's unusable secrets, and references that stay unresolved.
    pub flaws: Arc<Flaws>,
    /// When the read began.
    pub confirmed_at: Confirmed,
    /// Whether the tenant has a folder at all.
    pub exists: bool,
    /// The tenant's own phase when it was read: secrets that the database owns are not here.
    pub own: Option<Phase>,
    /// Upstream's status: 200, or 304 where nothing had changed.
    pub status: u16,
    /// Whether nothing changed at the owner while this was read, as far as we know.
    pub current: bool,
    /// Whether another instance has read it, for all instances.
    pub elsewhere: bool,
    /// Taken before the read began, which may be before the callers who joined it asked: only a
    /// caller that holds the same fence keeps what the read proves.
    pub(super) fence: Fence,
}

impl Fresh {
    /// This read's part of the cache status of each caller who waited for it.
    pub(super) fn cache_status(&self, cache_status: CacheStatus, now: Moment, ages: Ages) -> CacheStatus {
        match self.elsewhere {
            true => cache_status.answered_by_copy(ages.refresh_after, now.since(self.confirmed_at)),
            false => cache_status.answered_by_upstream(self.status),
        }
    }
}

/// When a lookup started, and the copy of the folder that it found in the database.
#[derive(Debug, Clone, Copy)]
pub(super) struct Since {
    pub(super) began: Moment,
    /// When the copy was read from upstream, if there was one; `None` where the database was not
    /// asked. A copy that another instance has stored since is another one, even if it is there
    /// before this instance's read begins.
    pub(super) copy: Option<Option<Timestamp>>,
}

impl Since {
    /// A lookup that has not asked the database.
    fn at(began: Moment) -> Self {
        Self { began, copy: None }
    }
}

/// A read that failed, with the lane it had.
#[derive(Debug, Clone)]
pub(super) struct Missed {
    error: ResolveError,
    lane: Lane,
}

impl Missed {
    pub(super) fn lost() -> Self {
        Self { error: ResolveError::Lost, lane: Lane::Interactive }
    }
}

impl Resolver {
    /// The tenant's folder, read now: one read at a time for each tenant, shared by all callers.
    pub(super) async fn snapshot(
        self: &Arc<Self>,
        tenant: &Tenant,
        lane: Lane,
        why: ForwardReason,
    ) -> Result<Arc<Fresh>, ResolveError> {
        self.snapshot_since(tenant, lane, why, Since::at(self.clock.moment())).await
    }

    /// As [`Self::snapshot`], for a caller whose lookup started before: a read that has ended since,
    /// here or at another instance, is as good as one that it would have joined then.
    pub(super) async fn snapshot_since(
        self: &Arc<Self>,
        tenant: &Tenant,
        lane: Lane,
        why: ForwardReason,
        since: Since,
    ) -> Result<Arc<Fresh>, ResolveError> {
        let since = (why != ForwardReason::Request).then_some(since);
        if self.memory.denied_until(tenant.as_str()).is_some_and(|until| self.clock.running() < until) {
            return Err(self.denial(tenant.as_str()));
        }
        let (flight, joined) = self.launch(tenant, lane, since);
        if joined {
            self.metrics.count("secretier_coalesced_waits_total", &[("for", "snapshot")]);
        }
        match flight.await {
            // The joined read found no budget in its lane; this caller's lane may use more.
            Err(Missed { error: ResolveError::Upstream(UpstreamError::OutOfBudget { .. }), lane: its })
                if lane < its =>
            {
                self.launch(tenant, lane, None).0.await.map_err(|missed| missed.error)
            }
            result => result.map_err(|missed| missed.error),
        }
    }

    /// Reads the folder behind an answer; no caller waits for it.
    pub(super) fn refresh_behind(self: &Arc<Self>, tenant: &Tenant) {
        drop(self.launch(tenant, Lane::Refresh, Some(Since::at(self.clock.moment()))));
    }

    /// Joins a read that is in flight, or starts one; without `since`, always one that
    /// has not begun yet.
    fn launch(
        self: &Arc<Self>,
        tenant: &Tenant,
        lane: Lane,
        since: Option<Since>,
    ) -> (crate::flights::Flight<Result<Arc<Fresh>, Missed>>, bool) {
        let mut joined = true;
        let start = || {
            joined = false;
            let (resolver, tenant) = (Arc::clone(self), tenant.clone());
            async move {
                // Taken as the read begins, and before anything else is looked at.
                let policy_snapshot = resolver.policy_snapshot(&tenant);
                // Checked only now, when no other read is in flight: one that is not in
                // memory yet would have been joined.
                if let Some(landed) = since.and_then(|since| resolver.landed_since(&tenant, since.began)) {
                    return Ok(Arc::new(landed));
                }
                let fresh = resolver.fetch(&tenant, lane, since, policy_snapshot).await;
                fresh.map(Arc::new).map_err(|error| {
                    tracing::debug!(%tenant, %error, "no snapshot");
                    Missed { error, lane }
                })
            }
        };
        let flight = match since {
            Some(_) => self.snapshots.join(tenant, start),
            None => self.snapshots.join_next(tenant, start),
        };
        (flight, joined)
    }

    /// The last snapshot, where it landed in memory at `began` or later and is whole.
    fn landed_since(&self, tenant: &Tenant, began: Moment) -> Option<Fresh> {
        let fence = self.memory.fence(tenant);
        let (names, entries) = self.memory.snapshot(tenant)?;
        if began.is_after(names.landed_at) || self.memory.denied_until(tenant.as_str()).is_some() {
            return None;
        }
        let entry = |entry: Arc<Entry>| Some((entry.answer.as_ref()?.key.clone(), entry));
        let entries = entries.into_iter().filter_map(entry).collect();
        let (own, confirmed_at, flaws) = (self.own_phase(tenant), names.confirmed_at, Arc::clone(&names.flaws));
        Some(Fresh {
            entries,
            flaws,
            confirmed_at,
            exists: true,
            own,
            status: 200,
            current: true,
            elsewhere: false,
            fence,
        })
    }

    /// One read of one folder, from the check that it exists to the write-back.
    async fn fetch(
        self: &Arc<Self>,
        tenant: &Tenant,
        lane: Lane,
        since: Option<Since>,
        policy_snapshot: PolicySnapshot,
    ) -> Result<Fresh, ResolveError> {
        // An offline instance reads nothing ahead either, before the database has told the owners.
        self.not_alone()?;
        let upstream = self.upstream.as_deref().ok_or(ResolveError::NoUpstream)?;
        // The fence and the company's generation are taken before the read begins: a
        // change that lands meanwhile raises them, and then nothing of this is kept.
        let PolicySnapshot { fence, policies } = policy_snapshot;
        let own = self.own_phase(tenant);
        let copied = own == Some(Phase::Hybrid) || (own.is_none() && policies.uses(|phase| phase == Phase::Hybrid));
        let company = match copied {
            // A database that hangs is left out: the answer must not be late because of it.
            true => tokio::time::timeout(self.database_wait(), self.database.company(tenant))
                .await
                .ok()
                .and_then(Result::ok),
            false => None,
        };
        if let Some(company) = &company {
            self.note(tenant, fence, company.as_ref()).await;
        }
        let began = self.read_begins();
        let mut reading = Reading {
            resolver: self,
            upstream,
            tenant,
            lane,
            since,
            fence,
            policies,
            company,
            began,
            ended: None,
            reader: None,
        };
        let fresh = reading.read().await;
        if let Err(ResolveError::Denied { .. }) = &fresh {
            let _changing = self.changing();
            reading.denied().await;
            return Err(self.denial(tenant.as_str()));
        }
        fresh
    }
}

impl Resolver {
    /// How long a read of upstream waits for the database, before it begins and for the write-back,
    /// which gives the answer its version in the database: a slow database must not slow the answer
    /// down. It is a part of the time that a caller waits at most.
    fn database_wait(&self) -> Duration {
        (self.deadline() / 4).min(LONGEST_DATABASE_WAIT)
    }

    /// The time at which a read of upstream begins. It is later than every other of this instance,
    /// so that two reads have an order even if both begin within a millisecond.
    fn read_begins(&self) -> Confirmed {
        let now = self.clock.confirmed_now();
        let millis = now.stamp.as_millis();
        // Where the database's clock was set back, the last time no longer counts.
        let later = |last: i64| if last > millis + 1_000 { millis } else { millis.max(last + 1) };
        let last = self.last_read.fetch_update(Ordering::AcqRel, Ordering::Acquire, |last| Some(later(last)));
        let stamp = Timestamp::from_millis(later(last.unwrap_or_else(|last| last)));
        Confirmed { stamp, moment: now.moment.plus(stamp.since(now.stamp)) }
    }
}

/// The longest time that a read of upstream waits for the database.
const LONGEST_DATABASE_WAIT: Duration = Duration::from_secs(2);

struct Reading<'a> {
    resolver: &'a Arc<Resolver>,
    upstream: &'a dyn Upstream,
    tenant: &'a Tenant,
    lane: Lane,
    /// When the lookup started that this is for; `None` where its caller wants the current state,
    /// whatever is held.
    since: Option<Since>,
    fence: Fence,
    policies: Arc<Policies>,
    /// The company's row as it was before the read began: `None` where the database
    /// takes no part or failed, else the row, if there is one.
    company: Option<Option<Company>>,
    began: Confirmed,
    /// When upstream had answered.
    ended: Option<Confirmed>,
    /// Makes the other instances wait for this read's outcome.
    reader: Option<Arc<Reader>>,
}

impl Reading<'_> {
    async fn read(&mut self) -> Result<Fresh, ResolveError> {
        // Other instances may serve it: then nothing is proved here, and their copies stay.
        if !self.upstream.serves(self.tenant) && self.company.as_ref().is_some_and(Option::is_some) {
            return Err(ResolveError::NotConfigured);
        }
        // Where upstream refuses the list itself, the folder's own content must be the proof.
        match self.resolver.tenant_directory.find(self.tenant, self.lane).await {
            Ok(Found::Unlisted(read_at)) if !self.doubts_list(read_at) => {
                return Ok(self.store(Snapshot::default(), false, read_at).await);
            }
            Ok(_) | Err(UpstreamError::Denied | UpstreamError::Rejected { .. }) => {}
            Err(error) => return Err(ResolveError::Upstream(error)),
        }
        if let Some(copied) = self.take_turn().await {
            return Ok(copied);
        }
        let snapshot = match self.ask(self.validator()).await? {
            Fetched::Changed(snapshot) => snapshot,
            Fetched::Unchanged => match self.unchanged().await {
                Some(fresh) => return Ok(fresh),
                // The copy that we hold turned out not to be whole: ask for everything.
                None => match self.ask(None).await? {
                    Fetched::Changed(snapshot) => snapshot,
                    Fetched::Unchanged => {
                        return Err(ResolveError::Upstream(UpstreamError::Malformed("304 without a validator")));
                    }
                },
            },
        };
        if snapshot.fell_short && self.copy_stands_in(&snapshot).await {
            // As in an outage: the copy stays whole, and grows old. Answering a part of this read
            // would be answering something that the copy does not have.
            return Err(ResolveError::Upstream(UpstreamError::Incomplete));
        }
        // An empty answer may also mean a folder, or an environment, that does not exist:
        // it proves nothing until a young list has said that there is such a folder.
        let exists = match snapshot.secrets.is_empty() && snapshot.oddities.is_empty() {
            false => true,
            true => match self.resolver.tenant_directory.current(self.lane).await {
                Ok(list) => list.tenants.contains(self.tenant),
                Err(error) => return Err(ResolveError::Upstream(error)),
            },
        };
        if exists {
            self.resolver.tenant_directory.add(self.tenant);
        }
        Ok(self.store(snapshot, exists, self.began).await)
    }

    /// Waits for the turn to read, among all instances that write the folder back; returns the
    /// snapshot that another has read and stored meanwhile. A caller that wants the current state
    /// takes no turn: another's read may have begun a moment before it asked.
    async fn take_turn(&mut self) -> Option<Fresh> {
        let since = self.since.filter(|_| self.kept_in_database() == Some(true))?;
        let company = self.company.as_ref()?.as_ref();
        let before = since.copy.unwrap_or_else(|| company.and_then(|company| company.snapshot_at));
        let watermark = self.resolver.watermark(self.tenant);
        match self.resolver.turn_to_read(self.tenant, before).await {
            Turn::Unknown => None,
            Turn::Ours(reader) => {
                self.reader = Some(reader);
                None
            }
            Turn::Copied(listing) => self.copied(*listing, watermark).await,
        }
    }

    /// The copy that another instance has just stored; `None` if it is not whole, or older than
    /// the watermark from before it was read.
    async fn copied(&self, listing: Listing, watermark: Watermark) -> Option<Fresh> {
        let company = listing.company.as_ref().filter(|company| company.phase == self.own())?;
        let confirmed_at = self.resolver.clock.confirmed_at(company.snapshot_at?);
        let etag = company.snapshot_etag.clone();
        if watermark.standing(company) != Standing::Current {
            return None;
        }
        let (answers, flaws) = self.answers(listing).await?;
        let told = Told { answers, flaws, etag, status: 200, exists: true, current: true, confirmed_at };
        Some(Fresh { elsewhere: true, ..self.remember(told).await })
    }

    /// Whether the database may have a copy that is older than this read. A tenant that does not
    /// exist has none. Where the database does not answer, memory may know that a tenant existed.
    fn may_have_copy(&self, exists: bool) -> bool {
        self.resolver.may_be_copied(self.tenant)
            && match &self.company {
                Some(company) => exists || company.is_some(),
                None => exists || self.resolver.memory.knows(self.tenant),
            }
    }

    /// The copy that another instance has stored meanwhile, from a read that began later than
    /// this one: then nothing of this one is answered.
    async fn later_copy(&self, read: Read) -> Option<Fresh> {
        // If nothing of this read is answered, a copy need not be later than its end.
        self.resolver.behind.withdraw(self.tenant, read);
        let copied = self.copy_since(read.began).await;
        if copied.is_none() {
            self.resolver.behind.note_read(self.tenant, read);
        }
        copied
    }

    /// The copy from a read that began after this time.
    async fn copy_since(&self, began: Timestamp) -> Option<Fresh> {
        let watermark = self.resolver.watermark(self.tenant);
        let found =
            tokio::time::timeout(self.resolver.database_wait(), self.resolver.database.find_all(self.tenant)).await;
        let listing = found.ok()?.ok()?;
        let company = listing.company.as_ref()?;
        self.resolver.copy_age(company).filter(|_| company.snapshot_at > Some(began))?;
        self.copied(listing, watermark).await
    }

    /// When upstream had answered; the current time where that is not known.
    fn ended(&self) -> Confirmed {
        self.ended.unwrap_or_else(|| self.resolver.clock.confirmed_now())
    }

    /// Whether a tenant may exist that the list lacks: the caller wants better knowledge than an
    /// earlier list, or the tenant's folder was read after the list was, or it was written to and
    /// nobody has read its folder yet.
    fn doubts_list(&self, read_at: Confirmed) -> bool {
        let company = self.company.as_ref().and_then(Option::as_ref);
        self.since.is_none() || company.is_some_and(|company| company.snapshot_at.is_none_or(|at| at > read_at.stamp))
    }

    async fn ask(&mut self, known: Option<String>) -> Result<Fetched, ResolveError> {
        let fetched = self.upstream.snapshot(self.tenant, known.as_deref(), self.lane).await;
        self.ended = Some(self.resolver.clock.confirmed_now());
        match fetched {
            Ok(fetched) => Ok(fetched),
            Err(UpstreamError::Denied) => Err(ResolveError::Denied { retry_after: None }),
            Err(error) => Err(ResolveError::Upstream(error)),
        }
    }

    fn own(&self) -> Option<Phase> {
        match &self.company {
            Some(company) => company.as_ref().and_then(|company| company.phase),
            None => self.resolver.own_phase(self.tenant),
        }
    }

    fn phase(&self, key: &SecretKey) -> Phase {
        self.policies.of(self.tenant, key, self.own()).phase
    }

    /// Whether the database holds all of this tenant's secrets or none; `None` if only some.
    fn kept_in_database(&self) -> Option<bool> {
        let uniform = self.policies.is_uniform(self.tenant, self.own());
        uniform.then(|| self.policies.phase_of(self.tenant, self.own()) == Phase::Hybrid)
    }

    /// The validator of a snapshot that is held whole.
    fn validator(&self) -> Option<String> {
        match (self.kept_in_database()?, &self.company) {
            (true, Some(Some(company))) => company.snapshot_etag.clone(),
            (true, _) => None,
            (false, _) => self.resolver.memory.snapshot(self.tenant).and_then(|(names, _)| names.etag.clone()),
        }
    }

    /// Confirms the copy that is held; `None` if it is not whole.
    async fn unchanged(&self) -> Option<Fresh> {
        let database = &self.resolver.database;
        match (self.kept_in_database()?, &self.company) {
            (true, Some(Some(company))) => {
                let listing = database.find_all(self.tenant).await.ok()?;
                // By now it may be another copy than the one that upstream was asked about.
                let is_same = |now: &Company| now.snapshot_etag == company.snapshot_etag;
                let listing = Some(listing).filter(|listing| listing.company.as_ref().is_some_and(is_same))?;
                let (answers, flaws) = self.answers(listing).await?;
                let confirmed = database.confirm_snapshot(self.tenant, company, self.began.stamp).await;
                // Superseded meanwhile: this copy is no longer the one that upstream confirmed.
                let current = confirmed.ok()?.then_some(true)?;
                self.resolver.behind.settle(self.tenant, Read { began: self.began.stamp, ended: self.ended().stamp });
                let etag = company.snapshot_etag.clone();
                let confirmed_at = self.began;
                let told = Told { answers, flaws, etag, status: 304, exists: true, current, confirmed_at };
                Some(self.remember(told).await)
            }
            (true, _) => None,
            (false, _) => {
                let (names, entries) = self.resolver.memory.snapshot(self.tenant)?;
                let answer =
                    |entry: &Arc<Entry>| entry.answer.as_ref().map(|answer| (answer.key.clone(), answer.clone()));
                let answers = entries.iter().map(answer).collect::<Option<Vec<_>>>()?;
                let (etag, flaws) = (names.etag.clone(), Arc::clone(&names.flaws));
                let confirmed_at = self.began;
                let told = Told { answers, flaws, etag, status: 304, exists: true, current: true, confirmed_at };
                Some(self.remember(told).await)
            }
        }
    }

    /// Writes a snapshot back, to the database first, so that memory holds its versions.
    async fn store(&self, snapshot: Snapshot, exists: bool, at: Confirmed) -> Fresh {
        let _changing = self.resolver.changing();
        let snapshot = Arc::new(snapshot);
        self.resolver.provisional.compare(self.tenant, |key| {
            let secret = snapshot.secrets.iter().find(|secret| secret.key == *key)?;
            Some(secret.value.expose())
        });
        let mut stored: HashMap<SecretKey, Current> = HashMap::new();
        let mut current = true;
        // A tenant that does not exist leaves no row.
        let worth_storing = |company: &Option<Company>| exists || company.is_some();
        let read = Read { began: at.stamp, ended: self.ended().stamp };
        // Before the write-back, and before anything of the read is answered.
        let has_room = !self.may_have_copy(exists) || self.resolver.behind.note_read(self.tenant, read);
        let mut is_stored = false;
        if self.kept_in_database() != Some(false)
            && let Some(company) = self.company.as_ref().filter(|company| worth_storing(company))
        {
            let wait = self.resolver.database_wait();
            match tokio::time::timeout(wait, self.write_back(company.as_ref(), &snapshot, read)).await {
                Ok(Ok(Ok(StoreOutcome::Stored { secrets, .. }))) => {
                    is_stored = true;
                    // Rows of keys that are not copies do not belong to this snapshot.
                    let copies = secrets.into_iter().filter(|secret| self.phase(&secret.key) == Phase::Hybrid);
                    stored = copies.map(|secret| (secret.key.clone(), secret)).collect();
                }
                Ok(Ok(Ok(StoreOutcome::Superseded))) => {
                    // A read that began later may have seen something later, and been answered.
                    if let Some(later) = self.later_copy(read).await {
                        return later;
                    }
                    current = false;
                }
                Ok(Ok(Err(error))) => tracing::warn!(tenant = %self.tenant, %error, "a snapshot was not written back"),
                Ok(Err(_)) => tracing::error!(tenant = %self.tenant, "the write-back of a snapshot was lost"),
                Err(_) => tracing::debug!(tenant = %self.tenant, "a snapshot is written back behind the answer"),
            }
        }
        if !has_room && !is_stored {
            self.resolver.behind.note_read_for_all(read);
        }
        let (mut answers, mut pace) = (Vec::with_capacity(snapshot.secrets.len()), Pace::default());
        for secret in &snapshot.secrets {
            let answer = self.answer(secret, stored.get(&secret.key));
            // The answer's own text of the name, so that memory holds it only once.
            answers.push((answer.key.clone(), answer));
            pace.did(secret.value.len()).await;
        }
        let (etag, confirmed_at) = (snapshot.etag.clone(), self.began);
        let flaws = Arc::new(snapshot.flaws());
        let fresh = self.remember(Told { answers, flaws, etag, status: 200, exists, current, confirmed_at }).await;
        // A copy's changes are told by the feed, where all of the folder is one.
        if fresh.current && !(is_stored && self.kept_in_database() == Some(true)) {
            self.resolver.tell_read(self.tenant, &fresh);
        }
        fresh
    }

    /// Whether the database has a servable copy of a secret that could not be read, because a
    /// reference in it failed. Storing it as unusable would remove the copy; storing the rest
    /// would make the copy younger than it is.
    async fn copy_stands_in(&self, snapshot: &Snapshot) -> bool {
        if !matches!(self.company, Some(Some(_))) {
            return false;
        }
        let watermark = self.resolver.watermark(self.tenant);
        let found =
            tokio::time::timeout(self.resolver.database_wait(), self.resolver.database.find_all(self.tenant)).await;
        let Ok(Ok(Listing { company: Some(company), secrets, .. })) = found else { return false };
        let Some(age) = self.resolver.copy_age(&company) else { return false };
        if watermark.standing(&company) == Standing::Behind {
            return false;
        }
        let unusable = snapshot.flaws().unusable;
        secrets.iter().any(|(key, held)| {
            let policy = self.policies.of(self.tenant, key, self.own());
            unusable.get(key) == Some(&Unusable::Reference)
                && matches!(held, Held::Present(stored) if stored.source == Source::Infisical)
                && policy.phase == Phase::Hybrid
                && age < policy.ages.database_max_stale
        })
    }

    /// Stores a snapshot in a task of its own, so that the store completes even if nobody waits.
    fn write_back(
        &self,
        company: Option<&Company>,
        snapshot: &Arc<Snapshot>,
        read: Read,
    ) -> tokio::task::JoinHandle<Result<StoreOutcome, StoreError>> {
        let (resolver, tenant, snapshot) = (Arc::clone(self.resolver), self.tenant.clone(), Arc::clone(snapshot));
        let (own, policies, reader) = (self.own(), Arc::clone(&self.policies), self.reader.clone());
        let began = Began { generation: company.map(|company| company.generation) };
        tokio::spawn(async move {
            let copied = |key: &SecretKey| policies.of(&tenant, key, own).phase == Phase::Hybrid;
            let stored = resolver.database.store_snapshot(&tenant, &snapshot, began, read.began, &copied).await;
            if matches!(stored, Ok(StoreOutcome::Stored { .. })) {
                resolver.behind.settle(&tenant, read);
            }
            // The other instances wait until the copy is there to take.
            drop(reader);
            stored
        })
    }

    /// Gives a secret the version and validator that the database gave it; without the
    /// database, those that memory knows for the same value, or else upstream's version
    /// and a validator drawn at random: upstream's versions begin again when a secret is
    /// re-created, so they cannot tell two values apart.
    fn answer(&self, secret: &UpstreamSecret, stored: Option<&Current>) -> Answer {
        let (key, value) = (secret.key.clone(), &secret.value);
        let refers = secret.text.is_some();
        if let Some(stored) = stored {
            let answer = Answer::new(self.tenant, key, value, stored.version, stored.updated_at, &stored.etag);
            return answer.referring(refers);
        }
        if let Recall::Fresh(entry) | Recall::Stale(entry) =
            self.resolver.memory.recall(self.tenant.as_str(), secret.key.as_str())
            && let Some(answer) = &entry.answer
            && answer.value_is(value)
        {
            return answer.clone();
        }
        let etag = self.resolver.provisional.give(self.tenant, &key, value.expose());
        let updated_at = secret.updated_at.unwrap_or(self.began.moment.wall());
        Answer::new(self.tenant, key, value, secret.version, updated_at, &etag).referring(refers)
    }

    /// Keeps a read's content in memory, unless it is out of date. A large one is kept on a thread
    /// that serves no requests, because the entries that it replaces are wiped.
    async fn remember(&self, told: Told) -> Fresh {
        let weight = |(_, answer): &(SecretKey, Answer)| usize::try_from(answer.weight()).unwrap_or(usize::MAX);
        let is_long = weight_of(told.answers.iter(), weight) > SHORT;
        let keeping = Keeping {
            resolver: Arc::clone(self.resolver),
            tenant: self.tenant.clone(),
            fence: self.fence,
            policies: Arc::clone(&self.policies),
            own: self.own(),
            ended: self.ended(),
            raises: told.exists || self.may_have_copy(told.exists),
        };
        let work = self.resolver.database.work();
        if is_long { work.run(move || keeping.keep(told)).await } else { keeping.keep(told) }
    }

    /// All secrets of a copy, ready to be sent, and its flaws; `None` if it is not everything
    /// that upstream had, or does not open.
    async fn answers(&self, listing: Listing) -> Option<(Answers, Arc<Flaws>)> {
        if !listing.is_snapshot {
            return None;
        }
        let (resolver, tenant) = (self.resolver, self.tenant.clone());
        let mut rows = resolver.resolve_rows(self.tenant, listing.secrets, true, |_| true, Arc::new(|_| true)).await;
        let mut flaws = Flaws::default();
        for (key, held) in rows.iter() {
            match held {
                Held::Present(_) => {}
                Held::Unusable(reason) => drop(flaws.unusable.insert(key.clone(), *reason)),
                Held::Absent | Held::Unknown | Held::Unreadable(_) => return None,
            }
        }
        let answer = move |(key, held): (SecretKey, Held)| match held {
            Held::Present(stored) => Some((key.clone(), stored.into_answer(&tenant, &key))),
            Held::Unusable(_) | Held::Absent | Held::Unknown | Held::Unreadable(_) => None,
        };
        let answers = resolver.database.work().each(rows.take(), |(_, held)| held.weight(), answer).await;
        Some((answers.into_iter().flatten().collect(), Arc::new(flaws)))
    }

    /// Stops serving the tenant's copies. Nothing is deleted.
    async fn denied(&self) {
        let Self { resolver, tenant, policies, .. } = self;
        let retry_at = resolver.clock.running() + policies.default_ages().negative_ttl;
        tracing::warn!(%tenant, "the upstream denies this tenant's folder; its copies are no longer served");
        if !resolver.memory.deny(self.fence, tenant, retry_at) {
            // Something has changed since, perhaps of another tenant: a new read decides.
            resolver.queue_refresh(tenant);
        }
        let recorded = match self.company {
            Some(Some(_)) => resolver.database.deny(tenant, self.began.stamp).await.map_err(|error| log::chain(&error)),
            // There is no copy.
            Some(None) => Ok(()),
            None if self.kept_in_database() == Some(false) => Ok(()),
            None => Err("the database does not answer".to_owned()),
        };
        if let Err(error) = recorded {
            match resolver.behind.note_denial(tenant, self.began.stamp) {
                true => {
                    tracing::error!(%tenant, error, "a denial is not recorded yet; it will be when the database answers")
                }
                false => tracing::error!(
                    %tenant, error, "a denial is not recorded: too many wait for the database; this instance goes by it"
                ),
            }
        }
    }
}

/// Everything that is needed to keep a read's content in memory.
struct Keeping {
    resolver: Arc<Resolver>,
    tenant: Tenant,
    fence: Fence,
    policies: Arc<Policies>,
    own: Option<Phase>,
    /// When upstream had answered.
    ended: Confirmed,
    /// Whether the fence is raised if it cannot be kept: a tier below may have an older state.
    raises: bool,
}

impl Keeping {
    /// Does not pause between the fill and the end: others find all of it or nothing.
    fn keep(self, told: Told) -> Fresh {
        let Self { resolver, tenant, fence, policies, own, ended, raises } = self;
        let Told { answers, flaws, etag, status, exists, current, confirmed_at } = told;
        let now = resolver.clock.moment();
        let mut entries = HashMap::with_capacity(answers.len());
        for (key, answer) in answers {
            let policy = policies.of(&tenant, &key, own);
            // Upstream does not decide about a key that the database owns.
            if policy.phase.owned_upstream() {
                entries.insert(key, Arc::new(Entry::new(Some(answer), confirmed_at, now, policy.ages)));
            }
        }
        if current && exists {
            let keys = entries.keys().cloned().collect();
            let names = Names::new(keys, Arc::clone(&flaws), etag, confirmed_at, now);
            resolver.memory.fill_snapshot(fence, &tenant, &entries, names);
        } else if current {
            resolver.memory.forget_tenant(fence, &tenant);
        }
        // This answer is later than every entry from before, whether or not it could be kept; and
        // a caller who asks after it joins no load that began before.
        let is_kept = resolver.memory.forget_before(&tenant, entries.keys(), confirmed_at, ended.moment, raises);
        if raises && !is_kept {
            resolver.snapshots.forget(&tenant);
        }
        resolver.loads.forget_where(|(other, _)| *other == tenant);
        Fresh { entries, flaws, confirmed_at, exists, own, status, current, elsewhere: false, fence }
    }
}

/// A folder's secrets, ready to be sent.
type Answers = Vec<(SecretKey, Answer)>;

/// A folder's content from upstream, with the versions that the database gave it.
struct Told {
    answers: Answers,
    flaws: Arc<Flaws>,
    etag: Option<String>,
    status: u16,
    exists: bool,
    current: bool,
    /// When the read began.
    confirmed_at: Confirmed,
}
