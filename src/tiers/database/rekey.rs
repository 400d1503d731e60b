//! The database's part in a rotation of keys: the job lock, the rotation's state, and the
//! re-wrapping and re-sealing in small transactions, each of which leaves everything readable.

use std::time::Duration;

use diesel::{
    BoolExpressionMethods as _, ExpressionMethods as _, JoinOnDsl as _, QueryDsl as _, TextExpressionMethods as _,
};
use serde::{Deserialize, Serialize};

use super::{
    Database, JobLock,
    calls::Call,
    changes::Change,
    companies::{self, COLUMNS, Company, CompanyRow, Purpose},
    data_keys::owner,
    error::StoreError,
    leases::Holder,
    rows::{BACKGROUND_TIMEOUTS, SecretRow},
    schema::{companies as company_table, company_data_keys, company_secrets, counters, settings},
    secret_rotations,
    secrets::{ROW, Sealed},
    versions::{BYTES, octet_length, within},
};
use crate::{
    clock::Timestamp,
    sealing::{MasterKey, OpenError, Place, SealError},
    tenant::Tenant,
};

/// The number of data keys, or values, in one transaction.
const BATCH: i64 = 100;

/// How long to wait for another process's job lock: the system may not yet have freed the lock of a
/// process that was killed a moment ago.
const WITHIN: Duration = Duration::from_secs(1);

/// A rotation that has begun and not ended, with the state that is needed to continue it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationState {
    /// The key that is being replaced; `None` where the rotation takes a key into use that was
    /// already the first of the sources.
    pub replaces: Option<String>,
    /// The key that is to wrap all data keys, once it is introduced.
    pub key: Option<String>,
    /// Whether tenants get new data keys as well.
    pub data_keys: bool,
    /// When it began, in milliseconds since 1970.
    pub started_at: i64,
    /// Whether every running instance holds the key. Until then, new data keys are wrapped with the
    /// one that is being replaced: an instance that has the new key already must not make data keys
    /// that others cannot open.
    pub spread: bool,
    /// Data keys that are older than this are renewed. Those that were made during the wait for
    /// instances are among them, because they had the old master key.
    pub renews_before: Option<i64>,
    /// The process that began it.
    pub by: String,
}

/// The result of a batch.
#[derive(Debug, Default)]
pub struct Rewrapped {
    /// Data keys that the new master key wraps now.
    pub done: usize,
    /// Data keys that did not open, with their tenants.
    pub failed: Vec<(Tenant, OpenError)>,
    /// Where the next batch begins; `None` if this was the last.
    pub after: Option<String>,
}

/// The result of renewing one tenant's data key.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Resealed {
    /// The number of values, of every version, that the new data key seals now.
    pub values: usize,
    /// The number of values that did not open. They stay as they were, with their data keys.
    pub failed: usize,
}

impl Database {
    /// Takes the right to rotate, or returns its holder. `by` describes this process to people.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rotation_lock(&self, by: &str) -> Result<Result<JobLock, Holder>, StoreError> {
        self.job_lock("rotation", by, WITHIN).await
    }

    /// The rotation that has begun and not ended, if there is one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rotation(&self) -> Result<Option<RotationState>, StoreError> {
        let mut call = self.calls.read("rotation").await?;
        let state: Option<String> = call.first(settings::table.find(STATE).select(settings::value)).await?;
        call.done();
        let read = |text: String| {
            serde_json::from_str(&text).map_err(|_| StoreError::broken("the state of a rotation cannot be read"))
        };
        state.map(read).transpose()
    }

    /// Stores the state of a rotation, until [`Self::end_rotation`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn keep_rotation(&self, lock: &JobLock, state: &RotationState) -> Result<(), StoreError> {
        let write = || async {
            let mut call = self.calls.write("keep_rotation").await?;
            keep(&mut call, STATE, serde_json::json!(state).to_string()).await?;
            self.check(&mut call, lock).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// Forgets a rotation that has ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn end_rotation(&self, lock: &JobLock) -> Result<(), StoreError> {
        let write = || async {
            let mut call = self.calls.write("end_rotation").await?;
            call.execute(diesel::delete(settings::table.find(STATE))).await?;
            self.check(&mut call, lock).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// Makes running instances read their master keys again; returns the change that each will have
    /// followed when it has.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn announce_master_key(&self, lock: &JobLock) -> Result<i64, StoreError> {
        let write = || async {
            let mut call = self.calls.write("announce_master_key").await?;
            self.check(&mut call, lock).await?;
            let change = self.raise(&mut call, Change::MasterKeys).await?;
            call.commit().await?;
            Ok(change)
        };
        self.calls.repeated(write).await
    }

    /// Has new data keys wrapped with the rotation's key from now on, and waits for the
    /// transactions that may be making a data key with the earlier master key: then
    /// [`Self::rewrap`] finds what they made.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn spread_rotation(&self, lock: &JobLock, state: &RotationState) -> Result<(), StoreError> {
        let write = || async {
            let mut call = self.calls.write_within("spread_rotation", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
            let raise = diesel::update(counters::table.find("rotations")).set(counters::value.eq(counters::value + 1));
            call.execute(raise).await?;
            keep(&mut call, STATE, serde_json::json!(state).to_string()).await?;
            if let Some(key) = &state.key {
                keep(&mut call, TARGET, key.clone()).await?;
            }
            self.check(&mut call, lock).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// The master key that the last rotation wrapped all data keys with, or is about to.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rotated_to(&self) -> Result<Option<String>, StoreError> {
        let mut call = self.calls.read("rotated_to").await?;
        let key = call.first(settings::table.find(TARGET).select(settings::value)).await?;
        call.done();
        Ok(key)
    }

    /// The master key to wrap a new data key with. It is the first of the ring, with two
    /// exceptions: while a rotation waits for instances, it is the key that is being replaced; and
    /// after a rotation that this process does not know of, it is the rotation's new key. To be
    /// called under the lock of [`Call::share_rotations`], after which neither changes.
    pub(super) async fn wrapping_key(&self, call: &mut Call<'_>) -> Result<MasterKey, StoreError> {
        let rows = settings::table.filter(settings::name.eq_any([STATE, TARGET]));
        let rows: Vec<(String, String)> = call.load(rows.select((settings::name, settings::value))).await?;
        let row = |wanted| rows.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
        let waits_for = row(STATE)
            .and_then(|state| serde_json::from_str::<RotationState>(state).ok())
            .filter(|state| !state.spread)
            .and_then(|state| state.replaces?.parse().ok())
            .and_then(|replaced| self.keys.ring().find(replaced).cloned());
        if let Some(key) = waits_for {
            return Ok(key);
        }
        // A source is asked while the tenant is locked. This happens once, after a rotation that
        // this process was not there for, which has no other way to hear of it in time.
        if let Some(target) = row(TARGET).and_then(|target| target.parse().ok())
            && self.keys.ring().find(target).is_none()
            && !self.look_within(call, target).await
        {
            tracing::warn!(key = %target, "the master key of the last rotation is not held; another one wraps what is new");
        }
        Ok(self.keys.ring().first().cloned().ok_or(SealError::NoMasterKey)?)
    }

    /// Wraps with this master key the next data keys that another one wraps, in one transaction. It
    /// does not block reads, and reads do not block it: a data key stays the same, and a process
    /// that holds both master keys opens it before and after. Writes to these tenants wait for it,
    /// because they count what their data keys seal: without the tenants' locks, a transaction that
    /// stores several tenants would lock these rows in another order.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing of the batch has changed.
    pub async fn rewrap(
        &self,
        lock: &JobLock,
        target: &MasterKey,
        after: Option<&str>,
    ) -> Result<Rewrapped, StoreError> {
        self.calls.repeated(|| self.rewrap_once(lock, target, after)).await
    }

    async fn rewrap_once(
        &self,
        lock: &JobLock,
        target: &MasterKey,
        after: Option<&str>,
    ) -> Result<Rewrapped, StoreError> {
        type Row = (String, i64, String, CompanyRow);
        let ring = self.keys.ring();
        let mut call = self.calls.write("rewrap").await?;
        let on = company_data_keys::company_id.eq(company_table::id);
        let rows = company_data_keys::table
            .inner_join(company_table::table.on(on))
            .filter(company_data_keys::master_key_id.ne(target.id().to_string()))
            .filter(company_data_keys::id.gt(after.unwrap_or_default()))
            .order(company_data_keys::id.asc())
            .limit(BATCH)
            .select((company_data_keys::id, company_data_keys::version, company_data_keys::wrapped_key, COLUMNS));
        let rows: Vec<Row> = call.load(rows).await?;
        let mut outcome = Rewrapped {
            after: rows.last().filter(|_| rows.len() as i64 == BATCH).map(|(id, ..)| id.clone()),
            ..Rewrapped::default()
        };
        let rows = rows.into_iter().map(|(id, number, wrapped, company)| {
            let company = Company::try_from(company)?;
            Ok((id, number, wrapped, company))
        });
        let rows: Vec<(String, i64, String, Company)> = rows.collect::<Result<_, StoreError>>()?;
        call.lock_companies(rows.iter().map(|(.., company)| company.id.clone()).collect()).await?;
        for (id, number, wrapped, company) in rows {
            let key = match ring.unwrap(&wrapped, number, owner(&company)) {
                Ok(key) => key,
                Err(reason) => {
                    outcome.failed.push((company.tenant, reason));
                    continue;
                }
            };
            // Unless it was destroyed meanwhile, or another process has wrapped it.
            let same = company_data_keys::table.find(id).filter(company_data_keys::wrapped_key.eq(wrapped));
            let rewrap = diesel::update(same).set((
                company_data_keys::wrapped_key.eq(target.wrap(&key, owner(&company))?),
                company_data_keys::master_key_id.eq(target.id().to_string()),
            ));
            outcome.done += call.execute(rewrap).await?;
        }
        self.check(&mut call, lock).await?;
        call.commit().await?;
        Ok(outcome)
    }

    /// The next tenants that have a data key from before `since`, in the order of their ids.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn tenants_with_old_data_keys(
        &self,
        since: Timestamp,
        after: Option<&str>,
    ) -> Result<Vec<Company>, StoreError> {
        let mut call = self.calls.read("tenants_with_old_data_keys").await?;
        let on = company_data_keys::company_id.eq(company_table::id);
        let rows = company_table::table
            .inner_join(company_data_keys::table.on(on))
            .filter(company_data_keys::created_at.lt(since.as_millis()))
            .filter(company_table::id.gt(after.unwrap_or_default()))
            .distinct()
            .order(company_table::id.asc())
            .limit(BATCH)
            .select(COLUMNS);
        let rows: Vec<CompanyRow> = call.load(rows).await?;
        call.done();
        rows.into_iter().map(Company::try_from).collect()
    }

    /// Gives a tenant a new data key, unless it has one from `since` or later, seals its values
    /// with it, those of older versions included, and destroys the data keys that no longer seal
    /// anything.
    ///
    /// It takes three steps, and a crash may come after each: the new key, under the tenant's lock,
    /// so that every later write uses it; the values, a few at a time, each only if it is unchanged
    /// since it was read; the old keys, under the lock again. A reader that read a value before
    /// this and its key after this reads again.
    ///
    /// # Errors
    /// [`StoreError`]; the work done before stays done.
    pub async fn renew_data_key(
        &self,
        lock: &JobLock,
        tenant: &Tenant,
        since: Timestamp,
    ) -> Result<Resealed, StoreError> {
        self.ensure_data_key(lock, tenant, since).await?;
        let mut outcome = Resealed::default();
        let mut after = String::new();
        loop {
            let (more, last) = self.calls.repeated(|| self.reseal(lock, tenant, &after)).await?;
            outcome.values += more.values;
            outcome.failed += more.failed;
            let Some(last) = last else { break };
            after = last;
        }
        self.drop_unused_data_keys(lock, tenant).await?;
        Ok(outcome)
    }

    async fn ensure_data_key(&self, lock: &JobLock, tenant: &Tenant, since: Timestamp) -> Result<(), StoreError> {
        self.calls.repeated(|| self.ensure_data_key_once(lock, tenant, since)).await
    }

    async fn ensure_data_key_once(&self, lock: &JobLock, tenant: &Tenant, since: Timestamp) -> Result<(), StoreError> {
        let now = self.clock.now();
        let mut call = self.calls.write("ensure_data_key").await?;
        let Some(company) = lock_known(&mut call, tenant, now).await? else { return call.roll_back().await };
        let newest = company_data_keys::table
            .filter(company_data_keys::company_id.eq(&company.id))
            .order(company_data_keys::version.desc())
            .limit(1)
            .select(company_data_keys::created_at);
        let newest: Option<i64> = call.first(newest).await?;
        if newest.is_none_or(|at| at >= since.as_millis()) {
            return call.roll_back().await;
        }
        let chain = self.chain(&mut call, &company).await?;
        self.new_data_key(&mut call, &company, &chain).await?;
        self.check(&mut call, lock).await?;
        call.commit().await
    }

    /// Seals the next values anew; returns where the next batch begins.
    async fn reseal(
        &self,
        lock: &JobLock,
        tenant: &Tenant,
        after: &str,
    ) -> Result<(Resealed, Option<String>), StoreError> {
        let mut outcome = Resealed::default();
        let mut call = self.calls.write("reseal").await?;
        // Locked, as for every change of its rows: otherwise PostgreSQL would lock the rows in
        // different orders here and there, and undo a deletion, for example, to resolve the
        // deadlock.
        let Some(company) = lock_known(&mut call, tenant, self.clock.now()).await? else {
            call.roll_back().await?;
            return Ok((outcome, None));
        };
        let chain = self.chain(&mut call, &company).await?;
        let Some((number, Ok(key))) = chain.last_key_value() else {
            call.roll_back().await?;
            return Ok((outcome, None));
        };
        // One a secret at most, and short: with the first values.
        if after.is_empty() {
            (outcome.values, outcome.failed) = self.reseal_rotations(&mut call, &company, &chain, key).await?;
        }
        let rows = company_secrets::table
            .filter(company_secrets::company_id.eq(&company.id))
            .filter(company_secrets::secret_value_encrypted.is_not_null())
            .filter(
                company_secrets::secret_value_encrypted
                    .not_like(format!("s1.{number}.%"))
                    .or(company_secrets::secret_text_encrypted.not_like(format!("t1.{number}.%"))),
            )
            .filter(company_secrets::id.gt(after))
            .order(company_secrets::id.asc())
            .limit(BATCH)
            .select((company_secrets::id, octet_length(company_secrets::secret_value_encrypted)));
        let found: Vec<(String, Option<i32>)> = call.load(rows).await?;
        let count = found.len();
        // A batch has fewer large values, because it must end within an operation's time.
        let ids = within(found, &mut { BYTES });
        let last = ids.last().filter(|_| ids.len() < count || count as i64 == BATCH).cloned();
        let rows = company_secrets::table.filter(company_secrets::id.eq_any(ids)).select(ROW);
        let rows = call.load_large(rows, SecretRow::bytes).await?;
        // Each row has a value, and some have a text as well.
        if !self.count_sealings(&mut call, &company, *number, 2 * i64::try_from(rows.len()).unwrap_or(BATCH)).await? {
            call.roll_back().await?;
            return Err(StoreError::broken("a new data key has sealed enough already"));
        }
        for row in rows {
            let text = match row.open_text(&company, &chain) {
                // A rotation by the previous version, which knows no text, destroyed the text's
                // key: the text is lost, but the value is not.
                Err(OpenError::UnknownDataKey(_)) => Ok(None),
                text => text,
            };
            let (Ok(Some(value)), Ok(text)) = (row.open(&company, &chain), text) else {
                outcome.failed += 1;
                continue;
            };
            let (name, version) = (row.key()?, row.version()?);
            let place = Place { company_id: &company.id, key: &name, version };
            let Sealed { value, text } = Sealed::of(key, &value, text.as_ref(), place)?;
            let same =
                company_secrets::table.find(&row.id).filter(company_secrets::secret_value_encrypted.eq(&row.sealed));
            let sealed =
                (company_secrets::secret_value_encrypted.eq(value), company_secrets::secret_text_encrypted.eq(text));
            outcome.values += call.execute(diesel::update(same).set(sealed)).await?;
        }
        self.check(&mut call, lock).await?;
        call.commit().await?;
        Ok((outcome, last))
    }

    async fn drop_unused_data_keys(&self, lock: &JobLock, tenant: &Tenant) -> Result<(), StoreError> {
        self.calls.repeated(|| self.drop_unused_data_keys_once(lock, tenant)).await
    }

    async fn drop_unused_data_keys_once(&self, lock: &JobLock, tenant: &Tenant) -> Result<(), StoreError> {
        let mut call = self.calls.write("drop_unused_data_keys").await?;
        let Some(company) = lock_known(&mut call, tenant, self.clock.now()).await? else {
            return call.roll_back().await;
        };
        let numbers = company_data_keys::table
            .filter(company_data_keys::company_id.eq(&company.id))
            .order(company_data_keys::version.desc())
            .select(company_data_keys::version);
        let numbers: Vec<i64> = call.load(numbers).await?;
        let chain = self.chain(&mut call, &company).await?;
        self.reseal_head(&mut call, &company, &chain).await?;
        let staged = secret_rotations::key_numbers(&mut call, &company.id).await?;
        for number in numbers.into_iter().skip(1) {
            let sealed_with = company_secrets::table
                .filter(company_secrets::company_id.eq(&company.id))
                .filter(
                    company_secrets::secret_value_encrypted
                        .like(format!("s1.{number}.%"))
                        .or(company_secrets::secret_text_encrypted.like(format!("t1.{number}.%"))),
                )
                .limit(1)
                .select(company_secrets::id);
            if call.first::<_, String>(sealed_with).await?.is_none() && !staged.contains(&number) {
                let unused = company_data_keys::table
                    .filter(company_data_keys::company_id.eq(&company.id))
                    .filter(company_data_keys::version.eq(number));
                call.execute(diesel::delete(unused)).await?;
                self.forget_data_key(&company, number);
            }
        }
        self.check(&mut call, lock).await?;
        call.commit().await
    }
}

const STATE: &str = "rotation";
const TARGET: &str = "rotated_to";

/// Sets a setting, replacing its present value.
async fn keep(call: &mut Call<'_>, name: &'static str, value: String) -> Result<(), StoreError> {
    let keep = diesel::insert_into(settings::table)
        .values((settings::name.eq(name), settings::value.eq(value.clone())))
        .on_conflict(settings::name)
        .do_update()
        .set(settings::value.eq(value));
    call.execute(keep).await.map(|_| ())
}

/// Locks the tenant's row and returns it, where there is one.
async fn lock_known(call: &mut Call<'_>, tenant: &Tenant, now: Timestamp) -> Result<Option<Company>, StoreError> {
    if companies::find(call, tenant).await?.is_none() {
        return Ok(None);
    }
    companies::lock(call, tenant, now, Purpose::Fill).await.map(|(company, _)| Some(company))
}
