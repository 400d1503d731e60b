//! Answers for all of a tenant's secrets, and for all tenants.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde::Serialize;
use utoipa::ToSchema;

use super::{
    CacheStatus, ForwardReason, Fresh, Lane, LongAnswer, PolicySnapshot, ResolveError, Resolver, Standing,
    WAIT_WITH_STALE_COPY, Want, references::is_upstreams,
};
use crate::{
    answer::Answer,
    clock::Confirmed,
    flaws::{Flaws, Unusable},
    long_work::{Large, LongWork, Pace, SHORT, weight_of},
    phase::Phase,
    policy::{Ages, Policies},
    secret::{SecretKey, SecretName},
    tenant::Tenant,
    tiers::{
        database::{Company, Held},
        memory::Recall,
        upstream::UpstreamError,
    },
};

/// All of a tenant's secrets, by key.
#[derive(Debug)]
pub struct Listing {
    /// The secrets.
    pub secrets: Large<BTreeMap<SecretKey, Answer>>,
    /// Keys that cannot be used, names that cannot be keys, and references that stay unresolved.
    pub flaws: Arc<Flaws>,
    /// The age of this knowledge.
    pub age: Duration,
    /// The tiers that were asked, and what they said.
    pub cache_status: CacheStatus,
}

/// The outcome of reading a folder at a caller's request.
#[derive(Debug)]
pub enum Refresh {
    /// It was read.
    Read(Arc<Fresh>),
    /// There is none.
    NoFolder,
    /// The database owns the tenant's secrets, so upstream's folder does not count.
    NotOwnedUpstream,
}

/// A tenant, as an overview shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct TenantSummary {
    /// Its name.
    pub tenant: String,
    /// Who owns its secrets.
    #[schema(value_type = String, example = "hybrid")]
    pub phase: Phase,
    /// How many secrets it has, where that is known without reading them, and the token
    /// reaches every key.
    pub keys: Option<u64>,
    /// Seconds since its folder was last read, where it was.
    pub snapshot_age: Option<u64>,
}

impl Resolver {
    /// All secrets of a tenant; `None` where the tenant is proved not to exist. A long answer takes
    /// the caller's turn for long answers, which `answer` holds until it is dropped.
    ///
    /// # Errors
    /// Neither a list nor proof that there is no such tenant can be had.
    pub async fn resolve_all(
        self: &Arc<Self>,
        tenant: &Tenant,
        want: Want,
        answer: &LongAnswer<'_>,
    ) -> Result<Option<Listing>, ResolveError> {
        self.not_alone()?;
        let list_within = async |wait, want| {
            tokio::time::timeout(wait, self.list(tenant, want, answer)).await.unwrap_or(Err(ResolveError::TimedOut))
        };
        let listed = match want {
            Want::Cached => list_within(self.deadline(), Want::Cached).await,
            // The rest of the time is for the copy, if upstream does not answer.
            Want::Revalidated => match list_within(self.deadline().mul_f64(0.75), want).await {
                Err(error) if error.is_failure() => {
                    list_within(self.deadline() / 4, Want::Cached).await.map_err(|_| error)
                }
                listed => listed,
            },
        };
        Ok(listed?.map(|listing| self.without_withheld(tenant, listing)))
    }

    /// A list without our own master keys, whichever tier had them.
    fn without_withheld(&self, tenant: &Tenant, listing: Listing) -> Listing {
        if tenant.shared_folder().is_none() {
            return listing;
        }
        let serves = |key: &SecretKey| self.may_serve(SecretName::of(tenant, key)).is_ok();
        let secrets = listing.secrets.map(|mut secrets| {
            secrets.retain(|key, _| serves(key));
            secrets
        });
        let flaws = match listing.flaws.unusable.keys().all(serves) {
            true => listing.flaws,
            false => {
                let mut flaws = Flaws::clone(&listing.flaws);
                flaws.unusable.retain(|key, _| serves(key));
                Arc::new(flaws)
            }
        };
        Listing { secrets, flaws, ..listing }
    }

    /// Sets how many long lists may be made at once for all tokens, from the next list on.
    pub fn set_long_answers(&self, most: u32) {
        self.long_answers.set_at_once(most);
    }

    /// The turn for a long answer to a request with the token of this id.
    #[must_use]
    pub fn long_answer<'a>(&'a self, token: &'a str) -> LongAnswer<'a> {
        self.long_answers.of(token)
    }

    async fn list(
        self: &Arc<Self>,
        tenant: &Tenant,
        want: Want,
        answer: &LongAnswer<'_>,
    ) -> Result<Option<Listing>, ResolveError> {
        let list = async |policy_snapshot: PolicySnapshot| {
            let policies = &*policy_snapshot.policies;
            match policies.phase_of(tenant, self.own_phase(tenant)) {
                // The database takes no part, unless a rule gives it some of the keys.
                Phase::Infisical if policies.is_uniform(tenant, self.own_phase(tenant)) => {
                    self.list_upstream(&policy_snapshot, tenant, want, answer).await
                }
                _ => self.list_database(&policy_snapshot, tenant, want, answer).await,
            }
        };
        self.with_stable_policy(tenant, list).await
    }

    async fn list_database(
        self: &Arc<Self>,
        policy_snapshot: &PolicySnapshot,
        tenant: &Tenant,
        want: Want,
        answer: &LongAnswer<'_>,
    ) -> Result<Option<Listing>, ResolveError> {
        let PolicySnapshot { fence, policies } = policy_snapshot;
        let place = answer.take_for(tenant).await;
        let watermark = self.watermark(tenant);
        let found = self.database.find_all(tenant).await.map_err(Arc::new);
        let deleted;
        let (company, rows, whole) = match found {
            Ok(listing) => {
                deleted = listing.deleted;
                (listing.company, listing.secrets, listing.is_snapshot)
            }
            Err(error) => {
                // A list without the database's own keys would say that they do not exist.
                return match policies.has_any_in(Phase::Database, tenant, self.own_phase(tenant)) {
                    true => Err(error.into()),
                    false => {
                        drop(place);
                        answer.give_back();
                        self.list_upstream(policy_snapshot, tenant, want, answer).await
                    }
                };
            }
        };
        let weight = weight_of(rows.iter(), |(_, held)| held.weight());
        self.long_answers.note(tenant, weight);
        if weight <= SHORT {
            answer.give_back();
        }
        let own = self.note(tenant, *fence, company.as_ref()).await;
        let Told { mut owned, copies, flaws, ages, is_unreadable, is_whole } =
            self.told(policy_snapshot, tenant, own, rows, whole).await;
        drop(place);
        if is_unreadable {
            return Err(ResolveError::Unreadable);
        }
        let phase_of = |key: &SecretKey| policies.of(tenant, key, own).phase;
        let (mut gone, mut pace) = (Vec::new(), Pace::default());
        for key in deleted {
            match phase_of(&key) {
                Phase::Infisical => {}
                Phase::Hybrid | Phase::Database => gone.push(key),
            }
            pace.did(0).await;
        }
        let uniform = policies.is_uniform(tenant, own);
        if uniform && policies.phase_of(tenant, own) == Phase::Database {
            self.forget_others(tenant, &owned, &gone).await;
            let ttl = policies.default_ages().ttl;
            let cache_status = CacheStatus::database(ForwardReason::Miss, ttl);
            let listing = Listing { secrets: owned, flaws: Arc::default(), age: Duration::ZERO, cache_status };
            return Ok(company.map(|_| listing));
        }
        let standing = company.as_ref().map_or(Standing::Current, |company| watermark.standing(company));
        let is_servable = is_whole && uniform && standing != Standing::Behind;
        let age = company.as_ref().and_then(|company| self.copy_age(company)).filter(|_| is_servable);
        // Somebody may have corrected an unusable secret, so it is looked at again soon.
        let is_worn = |age| !flaws.unusable.is_empty() && age >= ages.negative_ttl;
        let is_asked = want == Want::Revalidated || standing == Standing::Unconfirmed;
        if let Some(age) = age.filter(|age| *age < ages.database_max_stale && !is_asked && !is_worn(*age)) {
            // The tenant may have a folder without secrets, or no folder any more.
            if copies.is_empty()
                && flaws.unusable.is_empty()
                && let Ok(Ok(list)) =
                    tokio::time::timeout(WAIT_WITH_STALE_COPY, self.tenant_directory.current(Lane::Interactive)).await
                && !list.tenants.contains(tenant)
            {
                return Ok(None);
            }
            if age >= ages.refresh_after {
                self.refresh_behind(tenant);
            }
            self.forget_others(tenant, &copies, &gone).await;
            return Ok(Some(copied(policies, copies, flaws, age)));
        }
        // Upstream says nothing about keys that the database owns.
        let gone_here: Vec<SecretKey> = gone.iter().filter(|key| phase_of(key) == Phase::Database).cloned().collect();
        let listing = self.list_upstream(policy_snapshot, tenant, want, answer);
        let listed = match (standing, want) {
            // The rest of the time is for the copy, if upstream does not answer.
            (Standing::Unconfirmed, Want::Cached) => {
                tokio::time::timeout(self.patience_to_confirm(), listing).await.unwrap_or(Err(ResolveError::TimedOut))
            }
            _ => listing.await,
        };
        match (listed, age) {
            (Ok(Some(mut listing)), _) => {
                self.forget_others(tenant, &owned, &gone_here).await;
                let mut others = listing.secrets.take();
                owned.append(&mut others);
                listing.secrets = owned;
                Ok(Some(listing))
            }
            (Ok(None), _) if owned.is_empty() => Ok(None),
            (Ok(None), _) => {
                self.forget_others(tenant, &owned, &gone_here).await;
                Ok(Some(copied(policies, owned, Arc::default(), Duration::ZERO)))
            }
            (Err(error), Some(age)) if error.is_failure() && age < ages.database_max_stale => {
                tracing::debug!(%tenant, %error, "listed from the copy");
                self.forget_others(tenant, &copies, &gone).await;
                Ok(Some(copied(policies, copies, flaws, age)))
            }
            (Err(error), _) => Err(error),
        }
    }

    /// The content of a tenant's rows, ready to be sent.
    async fn told(
        &self,
        policy_snapshot: &PolicySnapshot,
        tenant: &Tenant,
        own: Option<Phase>,
        rows: Large<Vec<(SecretKey, Held)>>,
        is_snapshot: bool,
    ) -> Told {
        let (policies, of) = (Arc::clone(&policy_snapshot.policies), tenant.clone());
        let is_copy = {
            let (policies, of) = (Arc::clone(&policies), of.clone());
            move |key: &SecretKey| policies.of(&of, key, own).phase == Phase::Hybrid
        };
        let of_upstream = is_upstreams(&policies, tenant, own);
        let mut rows = self.resolve_rows(tenant, rows, is_snapshot, is_copy, of_upstream).await;
        let ages = policies.default_ages();
        let tell = move |(key, held): (SecretKey, Held)| {
            let policy = policies.of(&of, &key, own);
            match (held, policy.phase) {
                (Held::Present(stored), Phase::Database) => Row::Owned(stored.into_answer(&of, &key)),
                (Held::Present(stored), Phase::Hybrid) => Row::Copy(stored.into_answer(&of, &key), policy.ages),
                (Held::Unreadable(_), Phase::Database) => Row::Unreadable,
                (Held::Unusable(reason), Phase::Hybrid) => Row::Unusable(key, reason),
                // Includes a copy that refers to something that is not known here.
                (Held::Unreadable(_), _) | (Held::Unknown, Phase::Hybrid) => Row::Unknown,
                (Held::Present(_) | Held::Absent | Held::Unknown | Held::Unusable(_), _) => Row::Nothing,
            }
        };
        let work = self.database.work();
        let told = work.each(rows.take(), |(_, held)| held.weight(), tell).await;
        match weight_of(told.iter(), |_| 0) > SHORT {
            true => {
                let here = work.clone();
                work.run(move || Told::of(&here, told, ages, is_snapshot)).await
            }
            false => Told::of(work, told, ages, is_snapshot),
        }
    }

    /// Forgets entries in memory that differ from a list from the database, before the list is
    /// answered: it may include a change that this instance has not followed yet.
    async fn forget_others(&self, tenant: &Tenant, listed: &BTreeMap<SecretKey, Answer>, gone: &[SecretKey]) {
        let listed = listed.iter().map(|(key, answer)| (key, Some(answer.bare_etag())));
        let mut pace = Pace::default();
        for read in listed.chain(gone.iter().map(|key| (key, None))) {
            if self.memory.forget_others(tenant, std::iter::once(read)) {
                self.loads.forget_where(|(other, _)| other == tenant);
            }
            pace.did(0).await;
        }
    }

    async fn list_upstream(
        self: &Arc<Self>,
        policy_snapshot: &PolicySnapshot,
        tenant: &Tenant,
        want: Want,
        answer: &LongAnswer<'_>,
    ) -> Result<Option<Listing>, ResolveError> {
        let policies = &*policy_snapshot.policies;
        let remembered = if want == Want::Cached { self.remembered(policies, tenant).await } else { None };
        if let Some((listing, true)) = remembered {
            return Ok(Some(listing));
        }
        let why = match (&remembered, want) {
            (_, Want::Revalidated) => ForwardReason::Request,
            (Some(_), Want::Cached) => ForwardReason::Stale,
            (None, Want::Cached) => ForwardReason::Miss,
        };
        let reading = self.snapshot(tenant, Lane::Interactive, why);
        let fresh = match remembered {
            None => reading.await?,
            // As with one secret: a caller with servable copies does not wait for a failing tier.
            Some((listing, _)) => {
                match tokio::time::timeout(WAIT_WITH_STALE_COPY, reading).await.unwrap_or(Err(ResolveError::TimedOut)) {
                    Ok(fresh) => fresh,
                    Err(error) if error.is_failure() && self.is_denied(tenant.as_str()) => {
                        return Err(self.denial(tenant.as_str()));
                    }
                    Err(error) if error.is_failure() => {
                        self.metrics.count("secretier_stale_answers_total", &[("tier", "memory")]);
                        return Ok(Some(Listing { cache_status: CacheStatus::stale_memory(why, &error), ..listing }));
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        if policies.phase_of(tenant, fresh.own) == Phase::Database {
            // The tenant moved to another owner while upstream was read.
            return Box::pin(self.list_database(policy_snapshot, tenant, want, answer)).await;
        }
        Ok(if fresh.exists { Some(self.listing(policies, &fresh, why).await) } else { None })
    }

    fn still_empty(&self, policies: &Policies, tenant: &Tenant, confirmed_at: Confirmed) -> bool {
        self.memory.denied_until(tenant.as_str()).is_none()
            && self.clock.moment().since(confirmed_at) < policies.default_ages().negative_ttl
    }

    /// The list as memory has it, where all of it may be served, and whether all is fresh.
    async fn remembered(&self, policies: &Policies, tenant: &Tenant) -> Option<(Listing, bool)> {
        let names = self.memory.names(tenant)?;
        // Without secrets, there is no entry whose age or denial could be checked.
        if names.keys.count() == 0 && !self.still_empty(policies, tenant, names.confirmed_at) {
            return None;
        }
        let mut secrets = BTreeMap::new();
        let (mut is_fresh, mut pace) = (true, Pace::default());
        for key in names.keys.iter() {
            let entry = match self.memory.recall(tenant.as_str(), key.as_str()) {
                Recall::Fresh(entry) => entry,
                Recall::Stale(entry) => {
                    is_fresh = false;
                    entry
                }
                Recall::Nothing => return None,
            };
            // An entry from a read other than the snapshot's is not part of the snapshot.
            let answer = entry.answer.as_ref().filter(|_| entry.confirmed_at == names.confirmed_at)?;
            secrets.insert(answer.key.clone(), answer.clone());
            pace.did(0).await;
        }
        let secrets = large(self.database.work(), secrets);
        let age = self.clock.moment().since(names.confirmed_at);
        let flaws = Arc::clone(&names.flaws);
        // An unusable secret is looked at again as soon as an absence would be.
        let is_worn = !flaws.unusable.is_empty() && age >= policies.default_ages().negative_ttl;
        Some((Listing { secrets, flaws, age, cache_status: CacheStatus::memory() }, is_fresh && !is_worn))
    }

    async fn listing(&self, policies: &Policies, fresh: &Fresh, why: ForwardReason) -> Listing {
        let (mut secrets, mut pace) = (BTreeMap::new(), Pace::default());
        for (key, entry) in &fresh.entries {
            if let Some(answer) = &entry.answer {
                secrets.insert(key.clone(), answer.clone());
            }
            pace.did(0).await;
        }
        Listing {
            secrets: large(self.database.work(), secrets),
            flaws: Arc::clone(&fresh.flaws),
            age: self.clock.moment().since(fresh.confirmed_at),
            cache_status: fresh.cache_status(CacheStatus::forwarded(why), self.clock.moment(), policies.default_ages()),
        }
    }

    /// Reads the folder now, for `POST .../refresh`.
    ///
    /// # Errors
    /// The folder could not be read.
    pub async fn refresh(self: &Arc<Self>, tenant: &Tenant) -> Result<Refresh, ResolveError> {
        self.not_alone()?;
        let read = async |policy_snapshot: PolicySnapshot| {
            let is_owned_here = |own| policy_snapshot.policies.phase_of(tenant, own) == Phase::Database;
            let own = match self.database.company(tenant).await {
                Ok(company) => self.note(tenant, policy_snapshot.fence, company.as_ref()).await,
                Err(_) => self.own_phase(tenant),
            };
            if is_owned_here(own) {
                return Ok(Refresh::NotOwnedUpstream);
            }
            let read = self.snapshot(tenant, Lane::Interactive, ForwardReason::Request).await;
            // It may have moved to another owner while upstream was read, or failed to answer.
            if is_owned_here(self.own_phase(tenant)) || read.as_ref().is_ok_and(|fresh| is_owned_here(fresh.own)) {
                return Ok(Refresh::NotOwnedUpstream);
            }
            let fresh = read?;
            Ok(if fresh.exists { Refresh::Read(fresh) } else { Refresh::NoFolder })
        };
        let reading = self.with_stable_policy(tenant, read);
        tokio::time::timeout(self.deadline(), reading).await.map_err(|_| ResolveError::TimedOut)?
    }

    /// Every tenant that upstream or the database knows and that `wanted` accepts, by name.
    ///
    /// # Errors
    /// Neither of the two can be asked.
    pub async fn tenants(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<TenantSummary>, ResolveError> {
        self.not_alone()?;
        let policies = self.policies();
        let rows = self.database.companies().await;
        let listed = match policies.uses(Phase::owned_upstream) {
            true => tokio::time::timeout(self.deadline(), self.tenant_directory.current(Lane::Interactive)).await,
            false => Ok(Err(UpstreamError::Denied)),
        };
        // Where the list cannot be read, the last one serves.
        let listed = listed.ok().and_then(Result::ok).or_else(|| self.tenant_directory.held());
        let rows = match (rows, &listed) {
            (Ok(rows), _) => rows,
            (Err(_), Some(_)) => Vec::new(),
            (Err(error), None) => return Err(Arc::new(error).into()),
        };
        let mut tenants = BTreeMap::new();
        for tenant in listed.iter().flat_map(|list| &list.tenants).filter(|tenant| wanted(tenant.as_str())) {
            tenants.insert(tenant.as_str().to_owned(), self.summary(&policies, tenant, None));
        }
        for (company, keys) in rows.iter().filter(|(company, _)| wanted(company.tenant.as_str())) {
            let summary = self.summary(&policies, &company.tenant, Some((company, *keys)));
            tenants.insert(company.tenant.as_str().to_owned(), summary);
        }
        Ok(tenants.into_values().collect())
    }

    /// One tenant; `None` where it is proved not to exist. Reads its row, and the list of
    /// folders only where it has none: the cost does not grow with the other tenants.
    ///
    /// # Errors
    /// A tier that would know of it cannot be asked.
    pub async fn tenant(&self, tenant: &Tenant) -> Result<Option<TenantSummary>, ResolveError> {
        self.not_alone()?;
        let policies = self.policies();
        let row = self.database.company_with_count(tenant).await;
        if let Ok(Some((company, keys))) = &row {
            return Ok(Some(self.summary(&policies, tenant, Some((company, *keys)))));
        }
        let is_owned_here = policies.has_any_in(Phase::Database, tenant, self.own_phase(tenant));
        match (self.is_listed(&policies, tenant).await, row) {
            (Ok(true), _) => Ok(Some(self.summary(&policies, tenant, None))),
            (_, Err(error)) if is_owned_here => Err(Arc::new(error).into()),
            (Err(error), _) if self.reads_upstream(tenant) => Err(ResolveError::Upstream(error)),
            (Ok(false) | Err(_), _) => Ok(None),
        }
    }

    /// Whether upstream lists a folder for the tenant, or listed one when it last answered.
    async fn is_listed(&self, policies: &Policies, tenant: &Tenant) -> Result<bool, UpstreamError> {
        if !policies.uses(Phase::owned_upstream) && !self.reads_upstream(tenant) {
            return Ok(self.tenant_directory.held().is_some_and(|list| list.tenants.contains(tenant)));
        }
        let listed = tokio::time::timeout(self.deadline(), self.tenant_directory.has(tenant, Lane::Interactive)).await;
        match listed.unwrap_or(Err(UpstreamError::TimedOut)) {
            Err(_) if self.tenant_directory.held().is_some_and(|list| list.tenants.contains(tenant)) => Ok(true),
            listed => listed,
        }
    }

    fn summary(&self, policies: &Policies, tenant: &Tenant, row: Option<(&Company, i64)>) -> TenantSummary {
        let own = match row {
            Some((company, _)) => company.phase,
            None => self.own_phase(tenant),
        };
        let phase = policies.phase_of(tenant, own);
        // Where upstream owns all of the secrets, the database has no rows of them to count.
        let counted = row.filter(|_| phase.reads_database() || !policies.is_uniform(tenant, own));
        let names = self.memory.names(tenant);
        let ages = [
            names.as_ref().map(|names| self.clock.moment().since(names.confirmed_at)),
            row.and_then(|(company, _)| company.snapshot_at).map(|at| self.clock.age(at)),
        ];
        TenantSummary {
            tenant: tenant.as_str().to_owned(),
            phase,
            keys: counted.map(|(_, keys)| keys.unsigned_abs()).or_else(|| names.map(|names| names.keys.count() as u64)),
            snapshot_age: ages.into_iter().flatten().min().map(|age| age.as_secs()),
        }
    }
}

/// The content of one row.
enum Row {
    /// The database owns it.
    Owned(Answer),
    /// A copy of upstream's secret, and the ages that it may have.
    Copy(Answer, Ages),
    /// The database owns it, and it does not open.
    Unreadable,
    /// Upstream has it, and it cannot be used.
    Unusable(SecretKey, Unusable),
    /// The database cannot tell whether upstream has it.
    Unknown,
    Nothing,
}

/// The content of all of a tenant's rows.
struct Told {
    owned: Large<BTreeMap<SecretKey, Answer>>,
    copies: Large<BTreeMap<SecretKey, Answer>>,
    flaws: Arc<Flaws>,
    /// The ages that the copies may have: none older than its own rule allows.
    ages: Ages,
    /// Whether a secret that the database owns does not open.
    is_unreadable: bool,
    /// Whether the copies are everything that upstream had.
    is_whole: bool,
}

impl Told {
    fn of(work: &LongWork, rows: Large<Vec<Row>>, mut ages: Ages, mut is_whole: bool) -> Self {
        let (mut flaws, mut is_unreadable) = (Flaws::default(), false);
        let (mut owned, mut copies) = (BTreeMap::new(), BTreeMap::new());
        for row in rows {
            match row {
                Row::Owned(answer) => drop(owned.insert(answer.key.clone(), answer)),
                Row::Copy(answer, of) => {
                    ages.refresh_after = ages.refresh_after.min(of.refresh_after);
                    ages.database_max_stale = ages.database_max_stale.min(of.database_max_stale);
                    copies.insert(answer.key.clone(), answer);
                }
                Row::Unreadable => is_unreadable = true,
                Row::Unusable(key, reason) => drop(flaws.unusable.insert(key, reason)),
                Row::Unknown => is_whole = false,
                Row::Nothing => {}
            }
        }
        let (owned, copies) = (large(work, owned), large(work, copies));
        Self { owned, copies, flaws: Arc::new(flaws), ages, is_unreadable, is_whole }
    }
}

fn large(work: &LongWork, secrets: BTreeMap<SecretKey, Answer>) -> Large<BTreeMap<SecretKey, Answer>> {
    let weight = weight_of(secrets.values(), |answer| usize::try_from(answer.weight()).unwrap_or(usize::MAX));
    work.large(secrets, weight)
}

fn copied(
    policies: &Policies,
    secrets: Large<BTreeMap<SecretKey, Answer>>,
    flaws: Arc<Flaws>,
    age: Duration,
) -> Listing {
    let refresh_after = policies.default_ages().refresh_after;
    Listing {
        secrets,
        flaws,
        age,
        cache_status: CacheStatus::forwarded(ForwardReason::Miss).answered_by_copy(refresh_after, age),
    }
}
