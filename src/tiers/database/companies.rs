//! The tenants that the database knows: the table `companies`.

use std::collections::HashMap;

use diesel::{
    BoolExpressionMethods as _, ExpressionMethods as _, IntoSql as _, QueryDsl as _, Queryable, QueryableByName,
    dsl::{count_star, max},
    sql_types::{Nullable, Text},
};

use super::{
    Database, JobLock,
    calls::Call,
    changes::Change,
    error::StoreError,
    new_id,
    prepared::Prepared,
    rows::{Mark, NewCompany, ROWS},
    schema::{companies, company_secrets},
};
use crate::{clock::Timestamp, phase::Phase, tenant::Tenant};

/// A tenant's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Company {
    /// A UUID, which outlives a change of the subdomain.
    pub id: String,
    /// Its subdomain.
    pub tenant: Tenant,
    /// Its own phase; without one, the configuration decides.
    pub phase: Option<Phase>,
    /// When the copy of its upstream folder was last known to be complete and true.
    pub snapshot_at: Option<Timestamp>,
    /// Upstream's validator of that copy, while the copy is whole and is as it was stored.
    pub snapshot_etag: Option<String>,
    /// Whether every key of the upstream folder was copied, rather than some left alone.
    pub snapshot_whole: bool,
    /// Since when upstream has refused us its folder.
    pub denied_at: Option<Timestamp>,
    /// Counts writes and invalidations: a fill that began before one must not be stored.
    pub generation: i64,
    /// When it was last shredded, in milliseconds since 1970.
    pub(super) shredded_at: Option<i64>,
    /// The tenant's head, sealed: it proves the newest versions.
    pub(super) head: Option<String>,
}

impl Company {
    /// When it was last shredded.
    #[must_use]
    pub fn shredded_at(&self) -> Option<Timestamp> {
        self.shredded_at.map(Timestamp::from_millis)
    }
}

#[derive(Queryable)]
pub(super) struct CompanyRow {
    id: String,
    subdomain: String,
    phase: Option<String>,
    snapshot_at: Option<i64>,
    snapshot_etag: Option<String>,
    snapshot_whole: bool,
    denied_at: Option<i64>,
    generation: i64,
    shredded_at: Option<i64>,
    head: Option<String>,
}

/// The names of many tenants in one text, and the last of them.
#[derive(QueryableByName)]
struct NamedRow {
    #[diesel(sql_type = Nullable<Text>)]
    named: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    last: Option<String>,
}

/// The columns that a [`CompanyRow`] is read from.
pub(super) type Columns = (
    companies::id,
    companies::subdomain,
    companies::phase,
    companies::snapshot_at,
    companies::snapshot_etag,
    companies::snapshot_whole,
    companies::denied_at,
    companies::generation,
    companies::shredded_at,
    companies::head,
);

pub(super) const COLUMNS: Columns = (
    companies::id,
    companies::subdomain,
    companies::phase,
    companies::snapshot_at,
    companies::snapshot_etag,
    companies::snapshot_whole,
    companies::denied_at,
    companies::generation,
    companies::shredded_at,
    companies::head,
);

impl TryFrom<CompanyRow> for Company {
    type Error = StoreError;

    fn try_from(row: CompanyRow) -> Result<Self, StoreError> {
        let wrong = |column| StoreError::broken(format!("company {}: the column {column} cannot be read", row.id));
        Ok(Self {
            tenant: row.subdomain.parse().map_err(|_| wrong("subdomain"))?,
            phase: row.phase.as_deref().map(str::parse).transpose().map_err(|_| wrong("phase"))?,
            snapshot_at: row.snapshot_at.map(Timestamp::from_millis),
            snapshot_etag: row.snapshot_etag,
            snapshot_whole: row.snapshot_whole,
            denied_at: row.denied_at.map(Timestamp::from_millis),
            generation: row.generation,
            shredded_at: row.shredded_at,
            head: row.head,
            id: row.id,
        })
    }
}

impl Database {
    /// A tenant's row.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn company(&self, tenant: &Tenant) -> Result<Option<Company>, StoreError> {
        let mut call = self.calls.read("company").await?;
        let company = find(&mut call, tenant).await?;
        call.done();
        Ok(company)
    }

    /// A tenant's row, with the number of its secrets.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn company_with_count(&self, tenant: &Tenant) -> Result<Option<(Company, i64)>, StoreError> {
        let mut call = self.calls.read("company_with_count").await?;
        let Some(company) = find(&mut call, tenant).await? else {
            call.done();
            return Ok(None);
        };
        let secrets = company_secrets::table
            .filter(company_secrets::company_id.eq(&company.id))
            .filter(company_secrets::superseded_at.is_null())
            .filter(company_secrets::secret_value_encrypted.is_not_null());
        let count: Option<i64> = call.first(secrets.select(count_star())).await?;
        call.done();
        Ok(Some((company, count.unwrap_or(0))))
    }

    /// The rows of these tenants; tenants without a row are left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn companies_of(&self, tenants: &[Tenant]) -> Result<HashMap<Tenant, Company>, StoreError> {
        let mut call = self.calls.read("companies_of").await?;
        let found = find_all(&mut call, tenants.iter()).await?;
        call.done();
        Ok(found)
    }

    /// Every tenant's row, with the number of its secrets, in the order of their names.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn companies(&self) -> Result<Vec<(Company, i64)>, StoreError> {
        let mut call = self.calls.read("companies").await?;
        let rows: Vec<CompanyRow> =
            call.load(companies::table.order(companies::subdomain.asc()).select(COLUMNS)).await?;
        let counts = company_secrets::table
            .filter(company_secrets::superseded_at.is_null())
            .filter(company_secrets::secret_value_encrypted.is_not_null())
            .group_by(company_secrets::company_id)
            .select((company_secrets::company_id, count_star()));
        let counts: Vec<(String, i64)> = call.load(counts).await?;
        call.done();
        let counts: HashMap<String, i64> = counts.into_iter().collect();
        rows.into_iter()
            .map(|row| {
                let count = counts.get(&row.id).copied().unwrap_or(0);
                Ok((row.try_into()?, count))
            })
            .collect()
    }

    /// The tenants that have a copy of their folder, with the time of the copy. Tenants that the
    /// database owns by a phase of their own are left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn copied(&self) -> Result<Vec<(Tenant, Timestamp)>, StoreError> {
        let mut call = self.calls.read("copied").await?;
        let rows = companies::table
            .filter(companies::snapshot_at.is_not_null())
            .filter(companies::phase.is_null().or(companies::phase.ne(Phase::Database.as_str())));
        let rows: Vec<CompanyRow> = call.load(rows.select(COLUMNS)).await?;
        call.done();
        let companies = rows.into_iter().map(Company::try_from).collect::<Result<Vec<_>, _>>()?;
        Ok(companies.into_iter().filter_map(|company| Some((company.tenant, company.snapshot_at?))).collect())
    }

    /// Calls `tell` for every tenant with a phase of its own, and returns the last change of phases
    /// that is surely included, for [`Self::moved_after`].
    ///
    /// All of them are read when an instance starts, and one row for each would take most of that
    /// time. So thousands of names come as one text, each after the first letter of its phase.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn own_phases(&self, tell: &mut (dyn FnMut(&str, Phase) + Send)) -> Result<i64, StoreError> {
        let mut call = self.calls.read("own_phases").await?;
        let last: Option<Option<i64>> = call.first(companies::table.select(max(companies::phase_change))).await?;
        let mut after = String::new();
        loop {
            let next = diesel::sql_query(
                "SELECT string_agg(substr(phase, 1, 1) || subdomain, ' ') AS named, max(subdomain) AS last FROM \
                 (SELECT phase, subdomain FROM companies WHERE phase IS NOT NULL AND subdomain > $1 \
                 ORDER BY subdomain LIMIT 10000) AS page",
            );
            let row: Option<NamedRow> = call.first(next.bind::<Text, _>(after.clone())).await?;
            let Some(NamedRow { named: Some(named), last: Some(last) }) = row else { break };
            for one in named.split(' ') {
                let phase = Phase::ALL.into_iter().find(|phase| phase.as_str()[..1] == one[..1]);
                let phase = phase.filter(|_| Tenant::is_valid(&one[1..]));
                let wrong = || StoreError::broken(format!("company {one}: the column phase cannot be read"));
                tell(&one[1..], phase.ok_or_else(wrong)?);
            }
            after = last;
        }
        call.done();
        Ok(last.flatten().unwrap_or(0))
    }

    /// The tenants whose own phases have changed since this change, with their phases now, and the
    /// number of the last change that is included. Numbers are in the order of the commits, so no
    /// change is missed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn moved_after(&self, change: i64) -> Result<(Vec<(Tenant, Option<Phase>)>, i64), StoreError> {
        let mut call = self.calls.read("moved_after").await?;
        let moved = companies::table
            .filter(companies::phase_change.gt(change))
            .order(companies::phase_change.asc())
            .select((companies::phase_change, COLUMNS));
        let rows: Vec<(Option<i64>, CompanyRow)> = call.load(moved).await?;
        call.done();
        let (mut moves, mut up_to) = (Vec::with_capacity(rows.len()), change);
        for (number, row) in rows {
            let company = Company::try_from(row)?;
            moves.push((company.tenant, company.phase));
            up_to = up_to.max(number.unwrap_or(change));
        }
        Ok((moves, up_to))
    }

    /// The tenants whose folder upstream has denied us, and that upstream still owns.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn denied(&self) -> Result<Vec<Tenant>, StoreError> {
        let mut call = self.calls.read("denied").await?;
        let upstream = companies::phase.is_null().or(companies::phase.ne(Phase::Database.as_str()));
        let rows = companies::table.filter(companies::denied_at.is_not_null()).filter(upstream);
        let names: Vec<String> = call.load(rows.select(companies::subdomain)).await?;
        call.done();
        let wrong = |_| StoreError::broken("a company's subdomain cannot be read");
        names.iter().map(|name| name.parse().map_err(wrong)).collect()
    }

    /// Notes that upstream denies us the tenant's folder, unless a snapshot has been stored since
    /// `at`. Deletes nothing.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn deny(&self, tenant: &Tenant, at: Timestamp) -> Result<(), StoreError> {
        self.note_denial(None, tenant, at).await
    }

    /// The same for work that holds a job lock.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn deny_under(&self, lock: &JobLock, tenant: &Tenant, at: Timestamp) -> Result<(), StoreError> {
        self.note_denial(Some(lock), tenant, at).await
    }

    async fn note_denial(&self, lock: Option<&JobLock>, tenant: &Tenant, at: Timestamp) -> Result<(), StoreError> {
        self.calls.repeated(|| self.note_denial_once(lock, tenant, at)).await
    }

    async fn note_denial_once(&self, lock: Option<&JobLock>, tenant: &Tenant, at: Timestamp) -> Result<(), StoreError> {
        let mut call = self.calls.write("deny").await?;
        let (at, now) = (at.as_millis(), self.clock.database_now().as_millis());
        let older = companies::snapshot_at.is_null().or(companies::snapshot_at.le(at));
        // A time in the future was written by a wrong clock: it is ignored.
        let denied = companies::table
            .filter(companies::subdomain.eq(tenant.as_str()))
            .filter(older.or(companies::snapshot_at.gt(now)));
        let is_new = call.execute(diesel::update(denied).set(companies::denied_at.eq(at))).await? > 0;
        if let Some(lock) = lock {
            self.check(&mut call, lock).await?;
        }
        if is_new {
            self.raise(&mut call, Change::Denial(tenant.clone())).await?;
        }
        call.commit().await
    }

    /// Notes that the stored copy equals upstream's state at `at`. Refused (`false`) where anything
    /// was written or invalidated since `copy` was read, where the copy was replaced by another,
    /// where the database owns the tenant, or where upstream has denied the folder since. A copy
    /// that was confirmed since keeps the later time.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn confirm_snapshot(&self, tenant: &Tenant, copy: &Company, at: Timestamp) -> Result<bool, StoreError> {
        self.calls.repeated(|| self.confirm_snapshot_once(tenant, copy, at)).await
    }

    async fn confirm_snapshot_once(&self, tenant: &Tenant, copy: &Company, at: Timestamp) -> Result<bool, StoreError> {
        let mut call = self.calls.write("confirm_snapshot").await?;
        let (at, now) = (at.as_millis(), self.clock.database_now().as_millis());
        let has_none = copy.snapshot_etag.is_none().into_sql::<diesel::sql_types::Bool>();
        let neither = companies::snapshot_etag.is_null().and(has_none);
        let confirmed = companies::table
            .filter(companies::subdomain.eq(tenant.as_str()))
            .filter(companies::generation.eq(copy.generation))
            .filter(companies::snapshot_etag.eq(copy.snapshot_etag.clone()).or(neither))
            .filter(companies::snapshot_at.is_not_null())
            .filter(companies::phase.is_null().or(companies::phase.ne(Phase::Database.as_str())))
            .filter(companies::denied_at.is_null().or(companies::denied_at.le(at)).or(companies::denied_at.gt(now)));
        let confirm = diesel::update(confirmed.clone()).set(companies::denied_at.eq(None::<i64>));
        let count = call.execute(confirm).await?;
        let older = companies::snapshot_at.lt(at).or(companies::snapshot_at.gt(now));
        call.execute(diesel::update(confirmed.filter(older)).set(companies::snapshot_at.eq(at))).await?;
        call.commit().await?;
        Ok(count > 0)
    }
}

/// The tenant's row.
pub(super) async fn find(call: &mut Call<'_>, tenant: &Tenant) -> Result<Option<Company>, StoreError> {
    let row = companies::table.filter(companies::subdomain.eq(tenant.as_str())).select(COLUMNS);
    call.first::<_, CompanyRow>(row).await?.map(Company::try_from).transpose()
}

/// The rows of these tenants; tenants without a row are left out.
pub(super) async fn find_all<'t>(
    call: &mut Call<'_>,
    tenants: impl Iterator<Item = &'t Tenant>,
) -> Result<HashMap<Tenant, Company>, StoreError> {
    let names: Vec<&str> = tenants.map(Tenant::as_str).collect();
    let mut found = HashMap::with_capacity(names.len());
    for names in names.chunks(ROWS) {
        let rows = companies::table.filter(companies::subdomain.eq_any(names)).select(COLUMNS);
        for row in call.load::<_, CompanyRow>(rows).await? {
            let company = Company::try_from(row)?;
            found.insert(company.tenant.clone(), company);
        }
    }
    Ok(found)
}

/// The purpose that a tenant's row is locked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To read it, and to keep it as it is meanwhile.
    Look,
    /// To store a copy of upstream's state, unless something has superseded it.
    Fill,
    /// To refuse the fills that are in progress.
    Invalidate,
    /// To refuse them, and to make a change that no earlier validator may confirm.
    Change,
}

/// Makes the tenant's row where it is missing, marks it for the purpose, and locks it until the
/// transaction ends. Returns the row, and whether it was made.
pub(super) async fn lock(
    call: &mut Call<'_>,
    tenant: &Tenant,
    now: Timestamp,
    purpose: Purpose,
) -> Result<(Company, bool), StoreError> {
    let id = new_id();
    let Mark { generations, touched_at, is_unconfirmed } = purpose.mark(now);
    let touched = touched_at.map(|at| companies::updated_at.eq(at));
    let unconfirmed = is_unconfirmed.then_some(companies::snapshot_etag.eq(None::<String>));
    let upsert = diesel::insert_into(companies::table)
        .values((
            companies::id.eq(&id),
            companies::subdomain.eq(tenant.as_str()),
            companies::generation.eq(generations),
            companies::created_at.eq(now.as_millis()),
            companies::updated_at.eq(now.as_millis()),
        ))
        .on_conflict(companies::subdomain)
        .do_update()
        .set((companies::generation.eq(companies::generation + generations), unconfirmed, touched))
        .returning(COLUMNS);
    let company: Option<CompanyRow> = call.first(Prepared(upsert)).await?;
    let company = Company::try_from(company.ok_or_else(|| StoreError::broken("a company that was stored is gone"))?)?;
    let made = company.id == id;
    Ok((company, made))
}

impl Purpose {
    fn mark(self, now: Timestamp) -> Mark {
        Mark {
            generations: match self {
                Self::Look | Self::Fill => 0,
                Self::Invalidate | Self::Change => 1,
            },
            touched_at: (self != Self::Look).then_some(now.as_millis()),
            is_unconfirmed: self == Self::Change,
        }
    }
}

/// The same as [`lock`] for several tenants, each given once, in the order of their names. It takes
/// few statements, however many tenants there are. Returns the rows in that order.
pub(super) async fn lock_all(
    call: &mut Call<'_>,
    tenants: &[&Tenant],
    now: Timestamp,
    purpose: Purpose,
) -> Result<Vec<(Company, bool)>, StoreError> {
    debug_assert!(tenants.is_sorted_by(|one, next| one < next));
    if let [tenant] = tenants {
        return Ok(vec![lock(call, tenant, now, purpose).await?]);
    }
    let mark = purpose.mark(now);
    let mut locked = Vec::with_capacity(tenants.len());
    for tenants in tenants.chunks(ROWS) {
        let new = |tenant: &&Tenant| NewCompany {
            id: new_id(),
            subdomain: tenant.as_str().to_owned(),
            generation: mark.generations,
            created_at: now.as_millis(),
            updated_at: now.as_millis(),
        };
        let rows: Vec<NewCompany> = tenants.iter().map(new).collect();
        let ids: Vec<String> = rows.iter().map(|row| row.id.clone()).collect();
        call.lock_companies_by_name(rows, mark).await?;
        let mut found = find_all(call, tenants.iter().copied()).await?;
        for (tenant, id) in tenants.iter().zip(ids) {
            let company =
                found.remove(*tenant).ok_or_else(|| StoreError::broken("a company that was stored is gone"))?;
            let made = company.id == id;
            locked.push((company, made));
        }
    }
    Ok(locked)
}

/// The work for several tenants in one transaction, in the order of their names, each with its
/// place in the order given. All code that locks several tenants locks them in this order:
/// otherwise two transactions could wait for each other.
pub(super) fn in_order<'t, T>(given: &'t [T], tenant: impl Fn(&'t T) -> &'t Tenant) -> Vec<(usize, &'t T)> {
    let mut ordered: Vec<(usize, &T)> = given.iter().enumerate().collect();
    ordered.sort_by_key(|(_, one)| tenant(one));
    ordered
}

/// The outcomes of that work, in the order given.
pub(super) fn as_given<T>(mut outcomes: Vec<(usize, T)>) -> Vec<T> {
    outcomes.sort_by_key(|(place, _)| *place);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Deletes rows that the same transaction has made and that nobody else has seen.
pub(super) async fn remove_all(call: &mut Call<'_>, ids: Vec<String>) -> Result<(), StoreError> {
    for ids in ids.chunks(ROWS) {
        call.execute(diesel::delete(companies::table.filter(companies::id.eq_any(ids)))).await?;
    }
    Ok(())
}

/// Deletes a row that the same transaction has made and that nobody else has seen.
pub(super) async fn remove(call: &mut Call<'_>, company: &Company) -> Result<(), StoreError> {
    call.execute(diesel::delete(companies::table.find(&company.id))).await.map(|_| ())
}
