//! Tenants' data keys: stored wrapped, kept unwrapped for a while.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use diesel::{
    ExpressionMethods as _, QueryDsl as _, Queryable,
    sql_types::{Integer, Nullable, Text},
};
use quick_cache::sync::Cache;

use super::{
    Database,
    calls::Call,
    companies::Company,
    error::StoreError,
    new_id,
    schema::{
        company_data_keys::{self, company_id, master_key_id, version, wrapped_key},
        company_secrets,
    },
};
use crate::{
    clock::Timestamp,
    sealing::{DataKey, MasterKeyId, OpenError, Owner, data_key_version},
    tenant::Tenant,
};

diesel::define_sql_function! {
    /// A part of a text, counted from 1.
    fn substr(text: Nullable<Text>, from: Integer, length: Integer) -> Nullable<Text>;
}

/// A data key seals fewer values than this: from there on, the chance that a random nonce
/// has come twice is no longer below the 2^-32 that NIST SP 800-38D (8.3) allows.
const MOST_SEALINGS: i64 = 1 << 32;

/// Unwrapped data keys kept at most; each takes about a kilobyte.
const KEPT: usize = 10_000;

/// Unwrapped data keys, wiped as they leave.
///
/// The subdomain is part of the name: a key was unwrapped for both, and a row whose
/// subdomain was changed since must go through the unwrapping again, which refuses it.
///
/// A tenant's keys are forgotten when it is shredded. A key whose row was read before that
/// is not kept after it: who keeps one carries the fence that was taken before the row was
/// read, forgetting raises the fence, and both compare and change under one lock.
pub(super) struct DataKeys {
    kept: Cache<Name, Kept>,
    fence: Mutex<u64>,
}

/// Company, subdomain and number.
type Name = (String, Tenant, i64);

/// A data key with the text that it was unwrapped from, to be known from another that
/// has its number.
#[derive(Clone)]
struct Kept {
    wrapped: Arc<str>,
    key: Arc<DataKey>,
}

impl DataKeys {
    pub(super) fn new() -> Self {
        Self { kept: Cache::new(KEPT), fence: Mutex::default() }
    }

    /// Drops all keys of these tenants. Looks at every key, which so rare a thing may cost.
    pub(super) fn forget(&self, tenants: &HashSet<Tenant>) {
        let mut fence = self.lock();
        *fence += 1;
        self.kept.retain(|(_, tenant, _), _| !tenants.contains(tenant));
    }

    fn fence(&self) -> u64 {
        *self.lock()
    }

    fn keep(&self, fence: u64, name: Name, kept: Kept) {
        let now = self.lock();
        if *now == fence {
            self.kept.insert(name, kept);
        }
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.fence.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Queryable)]
struct DataKeyRow {
    version: i64,
    wrapped_key: String,
}

/// A company's data keys by version, each open or not.
pub(super) type Chain = BTreeMap<i64, Result<Arc<DataKey>, OpenError>>;

impl Database {
    /// One data key, from memory where it is there.
    pub(super) async fn data_key(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        number: i64,
    ) -> Result<Result<Arc<DataKey>, OpenError>, StoreError> {
        if let Some(Kept { key, .. }) = self.kept(company, number) {
            return Ok(Ok(key));
        }
        let fence = self.data_keys.fence();
        let row = company_data_keys::table
            .filter(company_id.eq(&company.id))
            .filter(version.eq(number))
            .select((version, wrapped_key));
        let row: Option<DataKeyRow> = call.first(row).await?;
        Ok(row.map_or(Err(OpenError::UnknownDataKey(number)), |row| self.unwrap_kept(company, &row, fence)))
    }

    /// All data keys of a company.
    pub(super) async fn chain(&self, call: &mut Call<'_>, company: &Company) -> Result<Chain, StoreError> {
        let fence = self.data_keys.fence();
        let rows = company_data_keys::table.filter(company_id.eq(&company.id)).select((version, wrapped_key));
        let rows: Vec<DataKeyRow> = call.load(rows).await?;
        Ok(rows.iter().map(|row| (row.version, self.unwrap_kept(company, row, fence))).collect())
    }

    /// The same, to seal with. Where the newest key is wrapped by a master key that is
    /// not held, the sources are asked for it: a new key in its place would be one that
    /// nobody needed, and by another master key.
    pub(super) async fn chain_to_seal(&self, call: &mut Call<'_>, company: &Company) -> Result<Chain, StoreError> {
        let chain = self.chain(call, company).await?;
        match chain.last_key_value() {
            Some((_, Err(OpenError::UnknownMasterKey(missing)))) if self.look_within(call, *missing).await => {
                self.chain(call, company).await
            }
            _ => Ok(chain),
        }
    }

    /// Asks the sources for a master key, for half of the time that the operation has left:
    /// one that hangs must not make the write fail, and the database pass for down.
    pub(super) async fn look_within(&self, call: &Call<'_>, missing: MasterKeyId) -> bool {
        tokio::time::timeout(call.left() / 2, self.keys.look_for(missing)).await.unwrap_or(false)
    }

    /// The key to seal so many new values with: the newest, or a new one where that has
    /// sealed enough, does not open, or there is none. What was sealed with a key that
    /// does not open stays as it is until it is written again.
    pub(super) async fn sealing_key(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        chain: &mut Chain,
        count: usize,
        now: Timestamp,
    ) -> Result<Arc<DataKey>, StoreError> {
        let count = i64::try_from(count).unwrap_or(MOST_SEALINGS);
        match chain.last_key_value() {
            Some((number, Ok(key))) => {
                if self.count_sealings(call, company, *number, count).await? {
                    return Ok(Arc::clone(key));
                }
                tracing::info!(tenant = %company.tenant, data_key = number, "a data key has sealed enough; a new one is made");
            }
            Some((number, Err(reason))) => {
                tracing::error!(tenant = %company.tenant, data_key = number, %reason, "a data key does not open; a new one is made");
            }
            None => {}
        }
        let key = self.new_data_key(call, company, chain, now).await?;
        self.count_sealings(call, company, key.version(), count).await?;
        Ok(key)
    }

    /// Makes the data key that values are sealed with from now on.
    pub(super) async fn new_data_key(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        chain: &mut Chain,
        now: Timestamp,
    ) -> Result<Arc<DataKey>, StoreError> {
        let number = next_number(call, company, chain).await?;
        let key = Arc::new(DataKey::generate(number)?);
        // Before the ring is looked at: whoever rotates the master key waits for this
        // transaction if it began with the old one, and then finds what it made.
        call.share_rotations().await?;
        let master = self.wrapping_key(call).await?;
        let wrapped = master.wrap(&key, owner(company))?;
        let insert = diesel::insert_into(company_data_keys::table).values((
            company_data_keys::id.eq(new_id()),
            company_id.eq(company.id.clone()),
            version.eq(number),
            wrapped_key.eq(wrapped),
            master_key_id.eq(master.id().to_string()),
            company_data_keys::created_at.eq(now.as_millis()),
        ));
        call.execute(insert).await?;
        chain.insert(number, Ok(Arc::clone(&key)));
        Ok(key)
    }

    /// Counts what a data key is about to seal; `false`, and nothing counted, where that
    /// would be more than one key may.
    pub(super) async fn count_sealings(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        number: i64,
        count: i64,
    ) -> Result<bool, StoreError> {
        let key = company_data_keys::table
            .filter(company_id.eq(&company.id))
            .filter(version.eq(number))
            .filter(company_data_keys::sealings.lt(MOST_SEALINGS - count));
        let counted = diesel::update(key).set(company_data_keys::sealings.eq(company_data_keys::sealings + count));
        Ok(call.execute(counted).await? > 0)
    }

    /// Takes a data key out of memory; `false` if it is not there.
    pub(super) fn forget_data_key(&self, company: &Company, number: i64) -> bool {
        self.data_keys.kept.remove(&name(company, number)).is_some()
    }

    fn kept(&self, company: &Company, number: i64) -> Option<Kept> {
        self.data_keys.kept.get(&name(company, number))
    }

    fn unwrap_kept(&self, company: &Company, row: &DataKeyRow, fence: u64) -> Result<Arc<DataKey>, OpenError> {
        if let Some(Kept { wrapped, key }) = self.kept(company, row.version)
            && *wrapped == *row.wrapped_key
        {
            return Ok(key);
        }
        let key = Arc::new(self.keys.ring().unwrap(&row.wrapped_key, row.version, owner(company))?);
        let kept = Kept { wrapped: row.wrapped_key.as_str().into(), key: Arc::clone(&key) };
        self.data_keys.keep(fence, name(company, row.version), kept);
        Ok(key)
    }
}

/// A number that no data key has, nor had as far as any secret tells: a value whose key
/// is gone must not be taken for one that was forged.
async fn next_number(call: &mut Call<'_>, company: &Company, chain: &Chain) -> Result<i64, StoreError> {
    // Enough for the format's name and the longest number.
    let head = substr(company_secrets::secret_value_encrypted, 1, 32);
    let named = company_secrets::table
        .filter(company_secrets::company_id.eq(&company.id))
        .filter(company_secrets::secret_value_encrypted.is_not_null())
        .select(head);
    let named: Vec<Option<String>> = call.load(named).await?;
    let named = named.iter().flatten().filter_map(|sealed| data_key_version(sealed).ok());
    let newest = named.chain(chain.keys().copied()).max().unwrap_or(0);
    newest.checked_add(1).ok_or_else(|| StoreError::broken("no number is left for a new data key"))
}

fn name(company: &Company, number: i64) -> Name {
    (company.id.clone(), company.tenant.clone(), number)
}

pub(super) fn owner(company: &Company) -> Owner<'_> {
    Owner { company_id: &company.id, tenant: &company.tenant }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_whose_row_was_read_before_its_tenant_was_shredded_is_not_kept_after() {
        let keys = DataKeys::new();
        let [acme, globex]: [Tenant; 2] = ["acme", "globex"].map(|name| name.parse().unwrap());
        let name = |tenant: &Tenant, number| ("id".to_owned(), tenant.clone(), number);
        let key = || Kept { wrapped: "w1".into(), key: Arc::new(DataKey::generate(1).unwrap()) };
        let early = keys.fence();
        keys.keep(early, name(&acme, 1), key());
        keys.keep(early, name(&globex, 1), key());
        keys.forget(&HashSet::from([acme.clone()]));
        keys.keep(early, name(&acme, 2), key());
        assert!([1, 2].iter().all(|number| keys.kept.get(&name(&acme, *number)).is_none()));
        assert!(keys.kept.get(&name(&globex, 1)).is_some(), "the other tenant's is as good as it was");
        keys.keep(keys.fence(), name(&acme, 3), key());
        assert!(keys.kept.get(&name(&acme, 3)).is_some());
    }
}
