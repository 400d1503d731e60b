//! Changes a tenant's owner without losing an acknowledged write.
//!
//! A write chooses its owner by the tenant's own phase, and is done there. If the phase is switched
//! in between, the write lands at an owner that nobody asks any more.
//!
//! - The database is the owner: the write names the phase that it was chosen by, and is refused
//!   ([`WriteError::Moved`](super::WriteError::Moved)) where the row, locked for the write, has
//!   another.
//! - Upstream is the owner, and cannot be locked: the write is registered here before upstream is
//!   told ([`Database::begin_upstream_write`]), and while a registration lasts the tenant does not
//!   change its owner ([`Database::hand_over`]).
//!
//! The interleavings that would lose a write, and what prevents each:
//! - The switch finds no registration, and the write no switch, because neither sees what the other
//!   has not committed. Both lock the tenant's row first, so one has committed before the other
//!   reads.
//! - There is no row to lock. Both insert it, and the unique index makes the second wait for the
//!   first, as the row's lock would. A write that made the row deletes it again in the same
//!   transaction, so a made-up tenant leaves none.
//! - The write is done after the folder was read for the switch and before the switch. The write's
//!   registration raises the generation as it begins and as it ends, and the switch names the
//!   generation from before the folder was read. A write that changed something leaves a row also
//!   where there was none, so there is always a generation that shows it.
//! - A folder that was read earlier, and slowly, is stored as the tenant's copy after the copy was
//!   compared. The switch names the copy that was compared as well.
//! - The write never ends: its instance has died, or upstream did not say whether it was done.
//!   Nobody was told that it was done, and the registration ends by itself.
//! - The write takes longer than its registration lasts, because its instance was stopped in the
//!   middle. [`Database::end_upstream_write`] reports that, and the write is not acknowledged.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use diesel::{
    BoolExpressionMethods as _, ExpressionMethods as _, JoinOnDsl as _, NullableExpressionMethods as _, QueryDsl as _,
    dsl::max,
};

use super::{
    Database,
    calls::Call,
    changes::Change,
    companies::{self, Company, Purpose},
    error::StoreError,
    leases::Lease,
    new_id,
    rows::ROWS,
    schema::{companies as company_table, company_secrets, upstream_writes},
    secrets::{PLACEHOLDER, Source},
};
use crate::{
    clock::{Clock, Timestamp},
    phase::Phase,
    secret::{SecretKey, Writer},
    tenant::Tenant,
};

/// How long a registration that was never ended is kept after its time: by then no copy from before
/// it is served any more.
const KEPT: i64 = 7 * 24 * 60 * 60 * 1000;

/// A write that upstream is told of. Dropped without
/// [`end_upstream_write`](Database::end_upstream_write), its registration ends by itself.
#[derive(Debug)]
#[must_use = "a write that is not ended keeps the tenant from changing hands until its time is over"]
pub struct UpstreamWrite {
    id: String,
    tenant: Tenant,
    /// The tenant's own phase when the write began.
    phase: Option<Phase>,
    /// When its registration ends, by the running clock: a step of the wall clock cannot end it
    /// sooner.
    ends: Duration,
}

/// The outcome of a write upstream.
#[derive(Debug, Clone, Copy)]
pub enum Told<'a> {
    /// No change: it is certain that the write was not done.
    Nothing,
    /// The writer did it to a secret that the database has a copy of, or may get a copy of. The
    /// value that upstream has now is not known here: the secret is
    /// [`Held::Unknown`](super::Held::Unknown), even where there was no copy, until the next
    /// snapshot brings the version that the writer made.
    Copied(&'a SecretKey, &'a Writer),
    /// It was done to a secret that the database keeps no copies of.
    Uncopied(&'a SecretKey),
}

/// The conditions for a tenant to change its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Its own phase.
    pub phase: Option<Phase>,
    /// The generation from before the new owner was given what the old one has.
    pub generation: i64,
    /// When upstream was asked for the copy that the new owner was found to have, where the copy
    /// must still be the same: a fill does not raise the generation.
    pub copied_at: Option<Timestamp>,
}

impl Expected {
    /// Expects that nothing has changed since this was read.
    #[must_use]
    pub fn of(company: Option<&Company>) -> Self {
        // A row that was made since then, and to which nothing has happened, is at generation 0.
        let generation = company.map_or(0, |company| company.generation);
        Self { phase: company.and_then(|company| company.phase), generation, copied_at: None }
    }

    /// Expects that the copy is the same too.
    #[must_use]
    pub fn of_copy(company: &Company) -> Self {
        Self { copied_at: company.snapshot_at, ..Self::of(Some(company)) }
    }

    fn holds(self, company: &Company) -> bool {
        let is_same_copy = self.copied_at.is_none_or(|at| company.snapshot_at == Some(at));
        is_same_copy && Self { copied_at: None, ..self } == Self::of(Some(company))
    }
}

/// Why a tenant does not change its owner now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It has another phase, or something was written or invalidated since the generation was read.
    Changed,
    /// A write upstream is in progress.
    WriteUnderWay {
        /// When the last such write has ended at the latest.
        until: Timestamp,
    },
    /// Upstream was told to change these secrets, and their values have not been read back since.
    Unverified(Vec<SecretKey>),
}

impl UpstreamWrite {
    /// The tenant whose secret is written.
    #[must_use]
    pub fn tenant(&self) -> &Tenant {
        &self.tenant
    }
}

impl Database {
    /// The tenants with writes that upstream was told of and that were not ended in their time,
    /// with the end of that time: no copy from before it shows what upstream has now. Tenants whose
    /// copy is later are left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unended_writes(&self) -> Result<Vec<(Tenant, Timestamp)>, StoreError> {
        let mut call = self.calls.read("unended_writes").await?;
        let now = self.clock.database_now().as_millis();
        let over = upstream_writes::table
            .inner_join(company_table::table.on(company_table::subdomain.eq(upstream_writes::subdomain)))
            .filter(upstream_writes::until.lt(now))
            .filter(
                company_table::snapshot_at
                    .is_null()
                    .or(company_table::snapshot_at.le(upstream_writes::until.nullable())),
            )
            .group_by(upstream_writes::subdomain)
            .select((upstream_writes::subdomain, max(upstream_writes::until)));
        let rows: Vec<(String, Option<i64>)> = call.load(over).await?;
        call.done();
        let wrong = |_| StoreError::broken("a registered write's subdomain cannot be read");
        let parsed = rows
            .into_iter()
            .map(|(name, until)| Ok((name.parse().map_err(wrong)?, Timestamp::from_millis(until.unwrap_or(now)))));
        parsed.collect()
    }

    /// Registers a write before upstream is told of it: the tenant does not change its owner until
    /// the write ends, or `lasts` has passed since this returned. Fills in progress are refused.
    /// Returns the tenant's row as of the registration, which says whether upstream may be told at
    /// all; a tenant without a row is left without one.
    ///
    /// # Errors
    /// [`StoreError`]; then upstream must not be told.
    pub async fn begin_upstream_write(
        &self,
        tenant: &Tenant,
        lasts: Duration,
    ) -> Result<(Option<Company>, UpstreamWrite), StoreError> {
        self.calls.repeated(|| self.begin_upstream_write_once(tenant, lasts)).await
    }

    async fn begin_upstream_write_once(
        &self,
        tenant: &Tenant,
        lasts: Duration,
    ) -> Result<(Option<Company>, UpstreamWrite), StoreError> {
        let mut call = self.calls.write("begin_upstream_write").await?;
        let (now, at_database) = (self.clock.now(), self.clock.database_now());
        let (company, made) = companies::lock(&mut call, tenant, now, Purpose::Invalidate).await?;
        if made {
            companies::remove(&mut call, &company).await?;
        }
        let company = (!made).then_some(company);
        // The rest of this operation may take as long as any operation.
        let lasts = lasts + self.calls.timeout;
        let write = UpstreamWrite {
            id: new_id(),
            tenant: tenant.clone(),
            phase: company.as_ref().and_then(|company| company.phase),
            ends: self.clock.running() + lasts,
        };
        let register = diesel::insert_into(upstream_writes::table).values((
            upstream_writes::id.eq(write.id.clone()),
            upstream_writes::subdomain.eq(tenant.as_str()),
            upstream_writes::until.eq(at_database.plus(lasts).as_millis()),
        ));
        call.execute(register).await?;
        let over = upstream_writes::table.filter(upstream_writes::until.lt(at_database.as_millis() - KEPT));
        call.execute(diesel::delete(over)).await?;
        call.commit().await?;
        Ok((company, write))
    }

    /// Ends a write whose outcome upstream has told. Fills that began before are refused, and so is
    /// a change of owner that was prepared before. The tenant's other copies are served as before,
    /// but a validator no longer confirms them.
    ///
    /// Returns `false` where the tenant may have changed its owner meanwhile because the write
    /// outlasted its registration: then the write must not be acknowledged.
    ///
    /// # Errors
    /// [`StoreError`]; then the write must not be acknowledged either.
    pub async fn end_upstream_write(&self, write: &UpstreamWrite, told: Told<'_>) -> Result<bool, StoreError> {
        self.calls.repeated(|| self.end_upstream_write_once(write, told)).await
    }

    async fn end_upstream_write_once(&self, write: &UpstreamWrite, told: Told<'_>) -> Result<bool, StoreError> {
        let mut call = self.calls.write("end_upstream_write").await?;
        let purpose = match told {
            Told::Nothing => Purpose::Invalidate,
            Told::Copied(..) | Told::Uncopied(_) => Purpose::Change,
        };
        let (company, made) = companies::lock(&mut call, &write.tenant, self.clock.now(), purpose).await?;
        let now = self.clock.now();
        match told {
            Told::Nothing if made => companies::remove(&mut call, &company).await?,
            Told::Nothing => {}
            // A secret that the database owns is not forgotten.
            Told::Copied(key, writer) if company.phase != Some(Phase::Database) => {
                self.forget(&mut call, &company, key, writer, now).await?;
            }
            Told::Copied(..) => {}
            // If the tenant's copies are served one day, this secret is missing from them.
            Told::Uncopied(_) => {
                let partly = diesel::update(company_table::table.find(&company.id));
                call.execute(partly.set(company_table::snapshot_whole.eq(false))).await?;
            }
        }
        call.execute(diesel::delete(upstream_writes::table.find(&write.id))).await?;
        if let Told::Copied(key, _) | Told::Uncopied(key) = told {
            Lease::end_snapshot(&mut call, &write.tenant).await?;
            self.raise(&mut call, Change::Secret(write.tenant.clone(), key.clone())).await?;
        }
        call.commit().await?;
        Ok(self.clock.running() < write.ends && company.phase == write.phase)
    }

    /// Gives a tenant a phase of its own, or takes it away, if nothing has changed since the new
    /// owner was given what the old one has. Returns the number of the change, see
    /// [`Database::changes`]. Fills in progress are refused.
    ///
    /// The stored snapshot no longer proves anything: under the new phase, others of the tenant's
    /// keys may be copies. It stays valid only in phase `hybrid`, where it is whole and the
    /// database has written nothing of its own.
    ///
    /// # Errors
    /// [`StoreError`]. A refusal is no error; then nothing has changed.
    pub async fn hand_over(
        &self,
        tenant: &Tenant,
        expected: Expected,
        to: Option<Phase>,
    ) -> Result<Result<i64, Refusal>, StoreError> {
        self.calls.repeated(|| self.hand_over_once(tenant, expected, to)).await
    }

    async fn hand_over_once(
        &self,
        tenant: &Tenant,
        expected: Expected,
        to: Option<Phase>,
    ) -> Result<Result<i64, Refusal>, StoreError> {
        let mut call = self.calls.write("hand_over").await?;
        let handover = OwnershipTransfer { tenant, expected, to };
        if let Some(Err(refusal)) = hand_over(&mut call, &[handover], &self.clock).await?.pop() {
            call.roll_back().await?;
            return Ok(Err(refusal));
        }
        let change = self.raise(&mut call, Change::Tenants).await?;
        note_change(&mut call, &[tenant], change).await?;
        call.commit().await?;
        Ok(Ok(change))
    }
}

/// A tenant that is to change its owner.
#[derive(Clone, Copy)]
pub(super) struct OwnershipTransfer<'a> {
    pub(super) tenant: &'a Tenant,
    pub(super) expected: Expected,
    /// The phase of its own that it gets; `None` takes it away.
    pub(super) to: Option<Phase>,
}

/// Changes the owner of tenants, given in the order of their names, each unless it is refused;
/// outcomes are in that order. On a refusal the tenant's row is as it was. The caller raises the
/// counter of changes once, after all of them: the counter is one row, which every other
/// transaction waits for from then on. After that the caller calls [`note_change`].
pub(super) async fn hand_over(
    call: &mut Call<'_>,
    handovers: &[OwnershipTransfer<'_>],
    clock: &Clock,
) -> Result<Vec<Result<(), Refusal>>, StoreError> {
    let now = clock.now();
    let tenants: Vec<&Tenant> = handovers.iter().map(|handover| handover.tenant).collect();
    let locked = companies::lock_all(call, &tenants, now, Purpose::Look).await?;
    let refusals = refusals(call, handovers, &locked, clock.database_now()).await?;
    let without_trace = locked.iter().zip(&refusals).filter(|((_, made), refusal)| *made && refusal.is_some());
    companies::remove_all(call, without_trace.map(|((company, _), _)| company.id.clone()).collect()).await?;

    let free: Vec<(&OwnershipTransfer<'_>, &Company)> = handovers
        .iter()
        .zip(&locked)
        .zip(&refusals)
        .filter(|(_, refusal)| refusal.is_none())
        .map(|((handover, (company, _)), _)| (handover, company))
        .collect();
    let copied = |(handover, company): &&(&OwnershipTransfer<'_>, &Company)| {
        handover.to == Some(Phase::Hybrid) && company.snapshot_whole
    };
    let own = wrote_themselves(call, free.iter().filter(copied).map(|(_, company)| company.id.as_str())).await?;
    let mut moves: BTreeMap<Move, Vec<&str>> = BTreeMap::new();
    for one @ (handover, company) in &free {
        let goes_on = copied(&one) && !own.contains(&company.id);
        let to = Move {
            to: handover.to.map(Phase::as_str),
            keeps_copy: goes_on,
            // Nobody has asked upstream for this copy since the database became the owner.
            keeps_validator: goes_on && company.phase != Some(Phase::Database),
        };
        moves.entry(to).or_default().push(&company.id);
    }
    for (Move { to, keeps_copy, keeps_validator }, ids) in moves {
        for ids in ids.chunks(ROWS) {
            let moved = diesel::update(company_table::table.filter(company_table::id.eq_any(ids))).set((
                company_table::phase.eq(to),
                (!keeps_copy).then_some(company_table::snapshot_at.eq(None::<i64>)),
                (!keeps_validator).then_some(company_table::snapshot_etag.eq(None::<String>)),
                company_table::snapshot_whole.eq(keeps_copy),
                company_table::generation.eq(company_table::generation + 1),
                company_table::updated_at.eq(now.as_millis()),
            ));
            call.execute(moved).await?;
        }
    }
    Ok(refusals.into_iter().map(|refusal| refusal.map_or(Ok(()), Err)).collect())
}

/// Notes, for the instances that follow the feed, by which change these tenants changed their
/// owner.
pub(super) async fn note_change(call: &mut Call<'_>, tenants: &[&Tenant], change: i64) -> Result<(), StoreError> {
    for tenants in tenants.chunks(ROWS) {
        let names: Vec<&str> = tenants.iter().map(|tenant| tenant.as_str()).collect();
        let moved = company_table::table.filter(company_table::subdomain.eq_any(names));
        call.execute(diesel::update(moved).set(company_table::phase_change.eq(change))).await?;
    }
    Ok(())
}

/// The new state of a tenant's row.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Move {
    to: Option<&'static str>,
    keeps_copy: bool,
    keeps_validator: bool,
}

/// The reason against each change of owner, if there is one. The tenants are locked.
async fn refusals(
    call: &mut Call<'_>,
    handovers: &[OwnershipTransfer<'_>],
    locked: &[(Company, bool)],
    now: Timestamp,
) -> Result<Vec<Option<Refusal>>, StoreError> {
    let mut under_way: HashMap<String, i64> = HashMap::new();
    for handovers in handovers.chunks(ROWS) {
        let last = upstream_writes::table
            .filter(upstream_writes::subdomain.eq_any(handovers.iter().map(|handover| handover.tenant.as_str())))
            .filter(upstream_writes::until.gt(now.as_millis()))
            .select((upstream_writes::subdomain, upstream_writes::until));
        for (tenant, until) in call.load::<_, (String, i64)>(last).await? {
            let last = under_way.entry(tenant).or_insert(until);
            *last = until.max(*last);
        }
    }
    let to_database = handovers.iter().zip(locked).filter(|(handover, _)| handover.to == Some(Phase::Database));
    let ids: Vec<&str> = to_database.map(|(_, (company, _))| company.id.as_str()).collect();
    let mut forgotten: HashMap<String, Vec<SecretKey>> = HashMap::new();
    for ids in ids.chunks(ROWS) {
        let rows = newest_by(ids, PLACEHOLDER)
            .order((company_secrets::company_id.asc(), company_secrets::secret_key.asc()))
            .select((company_secrets::company_id, company_secrets::secret_key));
        for (company, key) in call.load::<_, (String, String)>(rows).await? {
            let key = key.parse().map_err(|_| StoreError::broken("a forgotten secret's key cannot be read"))?;
            forgotten.entry(company).or_default().push(key);
        }
    }
    let refusal = |(handover, (company, _)): (&OwnershipTransfer<'_>, &(Company, bool))| {
        if !handover.expected.holds(company) {
            return Some(Refusal::Changed);
        }
        if let Some(until) = under_way.get(company.tenant.as_str()) {
            return Some(Refusal::WriteUnderWay { until: Timestamp::from_millis(*until) });
        }
        forgotten.remove(&company.id).map(Refusal::Unverified)
    };
    Ok(handovers.iter().zip(locked).map(refusal).collect())
}

/// The companies among these that have secrets which the database has written or deleted as their
/// owner.
async fn wrote_themselves(
    call: &mut Call<'_>,
    companies: impl Iterator<Item = &str>,
) -> Result<HashSet<String>, StoreError> {
    let companies: Vec<&str> = companies.collect();
    let mut found = HashSet::new();
    for companies in companies.chunks(ROWS) {
        let own = newest_by(companies, Source::Database.as_str()).select(company_secrets::company_id).distinct();
        found.extend(call.load::<_, String>(own).await?);
    }
    Ok(found)
}

/// The newest rows of these companies that come from this source.
#[diesel::dsl::auto_type]
fn newest_by<'c>(companies: &'c [&'c str], source: &'static str) -> _ {
    let of: Vec<&'c str> = companies.to_vec();
    company_secrets::table
        .filter(company_secrets::company_id.eq_any(of))
        .filter(company_secrets::superseded_at.is_null())
        .filter(company_secrets::source.eq(source))
}
