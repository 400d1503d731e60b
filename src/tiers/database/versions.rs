//! The versions of a secret: how a new one is added, which are kept, and how an older one is read
//! or restored.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use diesel::{
    BoolExpressionMethods as _, ExpressionMethods as _, JoinOnDsl as _, NullableExpressionMethods as _, QueryDsl as _,
    Queryable,
    sql_types::{Nullable, Text},
};

use super::{
    Database,
    calls::Call,
    companies::{self, Company},
    config::Config,
    data_keys::Chain,
    error::{StoreError, WriteError},
    heads::{self, NewHeads, Touched},
    prepared::Prepared,
    rows::{NewSecret, ROWS, SecretRow},
    schema::{
        companies as company_table,
        company_secrets::{
            self, company_id, created_at, id, secret_key, secret_value_encrypted, source, superseded_at, version,
            written_by,
        },
    },
    secret_rotations,
    secrets::{self, Held, Lookup, Precondition, ROW, Source, Written},
};
use crate::{
    clock::Timestamp,
    phase::Phase,
    sealing::DataKey,
    secret::{SecretKey, Version, Writer},
    tenant::Tenant,
};

diesel::alias!(company_secrets as past: Past, company_secrets as latest: Latest);

/// The largest number of bytes that one statement inserts, except for a single row. A transaction
/// removes hardly more: SQLite overwrites deleted data, and other writers wait for it.
pub(super) const BYTES: usize = 4 << 20;

diesel::define_sql_function! {
    /// The size of a text in bytes.
    fn octet_length(text: Nullable<Text>) -> Nullable<Integer>;
}

/// The first of these rows, given with the sizes of their values: as many as fit the budget.
pub(super) fn within(rows: Vec<(String, Option<i32>)>, budget: &mut usize) -> Vec<String> {
    let within = |(row, bytes): (String, Option<i32>)| {
        let is_left = *budget > 0;
        *budget = budget.saturating_sub(bytes.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0));
        is_left.then_some(row)
    };
    rows.into_iter().map_while(within).collect()
}

/// An older version to be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Older {
    /// Its number.
    pub number: Version,
    /// Whether it is restored where a rotation has revoked it, too.
    pub even_revoked: bool,
}

impl From<Version> for Older {
    fn from(number: Version) -> Self {
        Self { number, even_revoked: false }
    }
}

/// A version of a secret, without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// Its number.
    pub version: Version,
    /// When it was made here.
    pub created_at: Timestamp,
    /// The source of the value, or of the deletion.
    pub source: Source,
    /// The token that wrote it; `None` where it came from upstream's folder.
    pub written_by: Option<String>,
    /// Whether it is a deletion: it has no value.
    pub is_deletion: bool,
    /// Whether it is the newest.
    pub is_current: bool,
}

#[derive(Queryable)]
struct RevisionRow {
    version: i64,
    created_at: i64,
    source: String,
    written_by: Option<String>,
    has_value: bool,
    superseded_at: Option<i64>,
}

impl Database {
    /// Finds one version of a secret, the newest or an older one that is still kept;
    /// [`Held::Absent`] where it is not kept.
    ///
    /// # Errors
    /// [`StoreError`]. A row that does not open is no error here: see [`Held::Unreadable`].
    pub async fn find_version(&self, tenant: &Tenant, key: &SecretKey, number: Version) -> Result<Lookup, StoreError> {
        let mut found = self.find_version_once(tenant, key, number).await?;
        if self.may_open_now(&found.copy).await {
            found = self.find_version_once(tenant, key, number).await?;
        }
        self.tell_unreadable(&found.copy, tenant, key);
        Ok(found)
    }

    async fn find_version_once(&self, tenant: &Tenant, key: &SecretKey, number: Version) -> Result<Lookup, StoreError> {
        let mut call = self.calls.read("find_version").await?;
        let Some((company, row)) = secrets::find_newest(&mut call, tenant, key).await? else {
            call.done();
            return Ok(Lookup { company: None, copy: Held::Absent });
        };
        let copy = match self.kept_row(&mut call, &company, row.as_ref(), number).await? {
            None => Held::Absent,
            Some(row) => self.open_row(&mut call, &company, &row).await?,
        };
        call.done();
        Ok(Lookup { company: Some(company), copy })
    }

    /// The kept versions of a secret, newest first, with the tenant's row.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn versions(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
    ) -> Result<(Option<Company>, Vec<Revision>), StoreError> {
        let mut call = self.calls.read("versions").await?;
        let Some(company) = companies::find(&mut call, tenant).await? else {
            call.done();
            return Ok((None, Vec::new()));
        };
        let rows = company_secrets::table
            .filter(company_id.eq(&company.id))
            .filter(secret_key.eq(key.as_str()))
            .order(version.desc())
            .select((version, created_at, source, written_by, secret_value_encrypted.is_not_null(), superseded_at));
        let rows: Vec<RevisionRow> = call.load(rows).await?;
        call.done();
        let now = self.clock.now();
        let newest = rows.first().map_or(0, |row| row.version);
        let kept = rows.iter().filter(|row| {
            self.retention.keeps(row.version, newest, row.superseded_at.map(Timestamp::from_millis), now)
        });
        // A version that nobody here has seen has no source: upstream has not been read since.
        let seen = kept.filter_map(|row| Some((row, Source::of(&row.source)?)));
        let revisions = seen.map(|(row, from)| {
            let number = Version::new(row.version)
                .ok_or_else(|| StoreError::broken(format!("secret {key}: a version cannot be read")))?;
            Ok(Revision {
                version: number,
                created_at: Timestamp::from_millis(row.created_at),
                source: from,
                written_by: row.written_by.clone(),
                is_deletion: !row.has_value,
                is_current: row.superseded_at.is_none(),
            })
        });
        let revisions = revisions.collect::<Result<_, StoreError>>()?;
        Ok((Some(company), revisions))
    }

    /// Makes an older value of a secret that the database owns its newest version, in one
    /// transaction. `owned_in` is as in [`Self::put`].
    ///
    /// # Errors
    /// [`WriteError`]; then nothing has changed.
    pub async fn rollback(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        older: impl Into<Older>,
        precondition: &Precondition,
        writer: &Writer,
        owned_in: Option<Phase>,
    ) -> Result<Written, WriteError> {
        let older = older.into();
        self.calls.repeated(|| self.rollback_once(tenant, key, older, precondition, writer, owned_in)).await
    }

    async fn rollback_once(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        Older { number, even_revoked }: Older,
        precondition: &Precondition,
        writer: &Writer,
        owned_in: Option<Phase>,
    ) -> Result<Written, WriteError> {
        let mut change = self.change("rollback", tenant, key, precondition, owned_in).await?;
        // The tenant is locked, as it is while a rotation begins to revoke a version.
        if !even_revoked && secret_rotations::is_revoked(&mut change.call, &change.company.id, key, number).await? {
            change.call.roll_back().await?;
            return Err(WriteError::Revoked);
        }
        let row = self.kept_row(&mut change.call, &change.company, change.row.as_ref(), number).await?;
        let chain = self.chain(&mut change.call, &change.company).await?;
        let held = match &row {
            None => Held::Absent,
            Some(row) => row.held(&change.company, &chain)?,
        };
        self.tell_unreadable(&held, tenant, key);
        let refusal = match held {
            Held::Present(stored) => return self.write(change, chain, key, &stored.value, writer).await,
            Held::Absent | Held::Unknown | Held::Unusable(_) => WriteError::NoVersion,
            Held::Unreadable(reason) => WriteError::Unreadable(reason),
        };
        change.call.roll_back().await?;
        Err(refusal)
    }

    /// Removes expired versions of secrets that are no longer written: some of one tenant's.
    /// `false` where there is nothing left to remove.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn sweep_versions(&self) -> Result<bool, StoreError> {
        let cutoff = self.retention.cutoff(self.clock.now()).as_millis();
        let mut call = self.calls.read("find_worn_version").await?;
        let oldest = company_secrets::table.filter(superseded_at.le(cutoff)).order(superseded_at.asc()).limit(1);
        let found: Option<String> = call.first(oldest.select(company_id)).await?;
        call.done();
        let Some(company) = found else { return Ok(false) };

        let mut call = self.calls.write("sweep_versions").await?;
        // The tenant is locked as for a change of its secrets, which removes versions too: so rows
        // are locked in one order.
        let locked = company_table::table.find(&company);
        call.execute(diesel::update(locked).set(company_table::updated_at.eq(company_table::updated_at))).await?;
        let worn = past
            .filter(past.field(company_id).eq(&company))
            .filter(past.field(superseded_at).le(cutoff))
            .limit(ROWS as i64)
            .select((past.field(id), octet_length(past.field(secret_value_encrypted))));
        let worn = call.load(worn).await?;
        remove(&mut call, worn, &mut { BYTES }).await?;
        call.commit().await?;
        Ok(true)
    }

    /// The row of a version, where it is still kept.
    async fn kept_row(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        row: Option<&SecretRow>,
        number: Version,
    ) -> Result<Option<SecretRow>, StoreError> {
        let Some(row) = row else { return Ok(None) };
        let current = row.version()?;
        if current == number {
            return Ok(Some(row.clone()));
        }
        let older = company_secrets::table
            .filter(company_id.eq(&company.id))
            .filter(secret_key.eq(&row.key))
            .filter(version.eq(number.number()))
            .select(ROW);
        let older: Option<SecretRow> = call.first(older).await?;
        let now = self.clock.now();
        Ok(older.filter(|older| self.retention.keeps(number.number(), current.number(), older.superseded_at(), now)))
    }

    /// Marks that the version that `writer` has just made upstream is not known here.
    pub(super) async fn forget(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        key: &SecretKey,
        writer: &Writer,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let row = secrets::newest(call, &company.id, key).await?;
        // It was told twice before it was read: the next read will see the later writer's version.
        if let Some(row) = row.as_ref().filter(|row| row.is_forgotten()) {
            let forgotten = company_secrets::table.find(&row.id);
            return call.execute(diesel::update(forgotten).set(written_by.eq(writer.as_str()))).await.map(|_| ());
        }
        let next = Next::after(row.as_ref())?;
        let mut batch = Batch::default();
        batch.add(company, next, NewSecret::forgotten(company, key, next, writer, now));
        batch.write(self, call, now).await.map(drop)
    }
}

/// How long older versions are kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Retention {
    versions: i64,
    age: Duration,
}

impl Retention {
    pub(super) fn of(config: &Config) -> Self {
        Self { versions: i64::from(config.versions_kept), age: config.versions_kept_for }
    }

    /// The time: a version that was superseded by then has expired.
    pub(super) fn cutoff(self, now: Timestamp) -> Timestamp {
        let age = i64::try_from(self.age.as_millis()).unwrap_or(i64::MAX);
        Timestamp::from_millis(now.as_millis().saturating_sub(age))
    }

    /// Whether a version is kept beside the newest one. A version that is not may still have its
    /// row.
    fn keeps(self, number: i64, newest_number: i64, since: Option<Timestamp>, now: Timestamp) -> bool {
        since.is_none_or(|since| since > self.cutoff(now) && number > newest_number - self.versions)
    }
}

/// The place of a new version, after a key's newest row.
#[derive(Clone, Copy)]
pub(super) struct Next<'r> {
    /// Its number.
    pub(super) number: Version,
    row: Option<&'r SecretRow>,
}

impl<'r> Next<'r> {
    /// The number after the newest, or the newest's own where that stands for a version that nobody
    /// has seen: no seen number is used again, and none is left out.
    pub(super) fn after(row: Option<&'r SecretRow>) -> Result<Self, StoreError> {
        let number = match row {
            None => Version::FIRST,
            Some(row) if row.is_forgotten() => row.version()?,
            Some(row) => row.version()?.next(),
        };
        Ok(Self { number, row })
    }

    /// The row that it replaces.
    pub(super) fn unseen(&self) -> Option<&'r SecretRow> {
        self.row.filter(|row| row.is_forgotten())
    }

    /// The row before it.
    pub(super) fn previous(&self) -> Option<&'r str> {
        match self.row {
            Some(row) if row.is_forgotten() => row.previous.as_deref(),
            row => row.map(|row| row.id.as_str()),
        }
    }
}

/// New versions of secrets, collected so that few statements write them. Their tenants are locked.
#[derive(Default)]
pub(super) struct Batch {
    superseded: Vec<String>,
    displaced: Vec<String>,
    rows: Vec<NewSecret>,
    /// Keys by company.
    without_copies: BTreeMap<String, Vec<String>>,
    /// Keys by company whose older copies are all removed.
    again: BTreeMap<String, Vec<String>>,
    /// The changes to the newest versions, by company.
    touched: BTreeMap<String, Touched>,
}

impl Batch {
    pub(super) fn add(&mut self, company: &Company, next: Next<'_>, new: NewSecret) {
        let touched = self.touched(company);
        next.row.into_iter().for_each(|row| touched.goes(row));
        touched.comes(&new);
        match next.row {
            Some(row) if row.is_forgotten() => self.displaced.push(row.id.clone()),
            Some(row) => self.superseded.push(row.id.clone()),
            None => {}
        }
        if next.row.is_some() {
            self.again.entry(new.company_id.clone()).or_default().push(new.secret_key.clone());
        }
        self.rows.push(new);
    }

    /// Passes the data keys that a company had before, and the one that seals its new versions.
    pub(super) fn keys(&mut self, company: &Company, chain: Chain, sealing: Option<Arc<DataKey>>) {
        self.touched(company).with_keys(chain, sealing);
    }

    fn touched(&mut self, company: &Company) -> &mut Touched {
        self.touched.entry(company.id.clone()).or_insert_with(|| Touched::new(company))
    }

    /// Removes a row that stands for a version that nobody has seen.
    pub(super) fn remove(&mut self, row: &SecretRow) {
        self.displaced.push(row.id.clone());
    }

    /// Removes every copy of upstream's values for this key, except for its newest row.
    pub(super) fn drop_copies(&mut self, company: &Company, key: &SecretKey) {
        self.without_copies.entry(company.id.clone()).or_default().push(key.as_str().to_owned());
    }

    /// Writes the versions and the heads that go with them, returns the heads, and removes versions
    /// that are no longer kept.
    pub(super) async fn write(
        mut self,
        database: &Database,
        call: &mut Call<'_>,
        now: Timestamp,
    ) -> Result<NewHeads, StoreError> {
        let retention = database.retention;
        let heads = database.heads_of(call, std::mem::take(&mut self.touched), &mut self.rows, now).await?;
        heads::keep(call, &heads).await?;
        // Only one row of each key may be the newest, so the earlier one is marked superseded
        // first.
        for chunk in self.displaced.chunks(ROWS) {
            call.execute(diesel::delete(company_secrets::table.filter(id.eq_any(chunk)))).await?;
        }
        let at = superseded_at.eq(now.as_millis());
        if let [row] = &*self.superseded {
            call.execute(Prepared(diesel::update(company_secrets::table.find(row)).set(at))).await?;
        } else {
            for chunk in self.superseded.chunks(ROWS) {
                call.execute(diesel::update(company_secrets::table.filter(id.eq_any(chunk))).set(at)).await?;
            }
        }
        // More than is written, so that a surplus shrinks with every write.
        let mut budget = BYTES + 2 * self.rows.iter().map(NewSecret::weight).sum::<usize>();
        insert(call, self.rows).await?;
        for (company, keys) in &self.without_copies {
            for chunk in keys.chunks(ROWS) {
                let copies = company_secrets::table
                    .filter(company_id.eq(company))
                    .filter(secret_key.eq_any(chunk))
                    .filter(source.eq(Source::Infisical.as_str()))
                    .filter(superseded_at.is_not_null());
                call.execute(diesel::delete(copies)).await?;
            }
        }
        for (company, keys) in &self.again {
            for chunk in keys.chunks(ROWS) {
                prune(call, company, chunk, &mut budget, retention, now).await?;
            }
        }
        Ok(heads)
    }
}

async fn insert(call: &mut Call<'_>, rows: Vec<NewSecret>) -> Result<(), StoreError> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for row in rows {
        bytes += row.weight();
        batch.push(row);
        if batch.len() == ROWS || bytes >= BYTES {
            call.insert_secrets(std::mem::take(&mut batch)).await?;
            bytes = 0;
        }
    }
    if batch.is_empty() { Ok(()) } else { call.insert_secrets(batch).await }
}

/// Removes these keys' versions that have expired or are too many, as far as the budget of bytes
/// goes. More may be left where the setting was lowered: they are removed by later writes or by the
/// sweep, and are not served meanwhile.
async fn prune(
    call: &mut Call<'_>,
    company: &str,
    keys: &[String],
    budget: &mut usize,
    retention: Retention,
    now: Timestamp,
) -> Result<(), StoreError> {
    let of_the_key = latest.field(secret_key).eq(past.field(secret_key)).and(latest.field(superseded_at).is_null());
    let is_worn = past.field(superseded_at).le(retention.cutoff(now).as_millis());
    let is_one_too_many = past.field(version).le(latest.field(version) - retention.versions);
    let gone = past
        .inner_join(latest.on(of_the_key))
        .filter(past.field(company_id).eq(company))
        .filter(past.field(secret_key).eq_any(keys))
        // Both sides are filtered, so that neither is read for all of the tenant's secrets.
        .filter(latest.field(company_id).eq(company))
        .filter(latest.field(secret_key).eq_any(keys))
        .filter(is_worn.or(is_one_too_many.nullable()))
        // Each key has one version more than before.
        .limit(2 * ROWS as i64)
        .select((past.field(id), octet_length(past.field(secret_value_encrypted))));
    let gone = call.load(gone).await?;
    remove(call, gone, budget).await
}

/// Removes rows, given with the sizes of their values, as far as the budget goes.
async fn remove(call: &mut Call<'_>, rows: Vec<(String, Option<i32>)>, budget: &mut usize) -> Result<(), StoreError> {
    let rows = within(rows, budget);
    for chunk in rows.chunks(ROWS) {
        call.execute(diesel::delete(company_secrets::table.filter(id.eq_any(chunk)))).await?;
    }
    Ok(())
}
