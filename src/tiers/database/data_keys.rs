//! Tenants' data keys: stored wrapped, cached unwrapped for a while.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use diesel::{
    ExpressionMethods as _, QueryDsl as _, Queryable,
    sql_types::{Integer, Nullable, Text},
};
use quick_cache::sync::Cache;
use sha2::{Digest as _, Sha256};

use super::{
    Database,
    calls::Call,
    companies::Company,
    error::StoreError,
    new_id,
    prepared::Prepared,
    rows::{NewDataKey, ROWS},
    schema::{
        company_data_keys::{self, company_id, version, wrapped_key},
        company_secrets,
    },
    secret_rotations,
};
use crate::{
    sealing::{DataKey, MasterKeyId, OpenError, Owner, data_key_version},
    tenant::Tenant,
};

diesel::define_sql_function! {
    /// A part of a text; positions count from 1.
    fn substr(text: Nullable<Text>, from: Integer, length: Integer) -> Nullable<Text>;
}

/// A data key seals fewer values than this: from there on, the chance that a random nonce has
/// repeated is no longer below the 2^-32 that NIST SP 800-38D (8.3) allows.
const MOST_SEALINGS: i64 = 1 << 32;

/// The number of unwrapped data keys that are cached at most; each takes about half a kilobyte.
const KEPT: usize = 10_000;

/// Unwrapped data keys, wiped when they are dropped.
///
/// The subdomain is part of the cache's key: a data key was unwrapped for company and subdomain,
/// and a row whose subdomain was changed since must be unwrapped again, which refuses it.
///
/// A tenant's keys are forgotten when it is shredded. A key whose row was read before that is not
/// cached after it: code that caches a key holds the fence that was taken before the row was read,
/// forgetting raises the fence, and both compare and change under one lock.
pub(super) struct DataKeys {
    kept: Cache<Name, Kept>,
    fence: Mutex<u64>,
}

/// Company, subdomain and number.
type Name = (String, Tenant, i64);

/// A data key with a digest of the text that it was unwrapped from, which tells it from another key
/// with the same number. Thousands are cached, and the text itself would take more than the rest.
#[derive(Clone)]
struct Kept {
    wrapped: [u8; 32],
    key: Arc<DataKey>,
}

impl Kept {
    fn of(row: &DataKeyRow, key: &Arc<DataKey>) -> Self {
        Self { wrapped: Sha256::digest(&row.wrapped_key).into(), key: Arc::clone(key) }
    }

    /// Whether it is the key of this row, and not another key with the same number.
    fn is_of(&self, row: &DataKeyRow) -> bool {
        self.wrapped == <[u8; 32]>::from(Sha256::digest(&row.wrapped_key))
    }
}

impl DataKeys {
    pub(super) fn new() -> Self {
        Self { kept: Cache::new(KEPT), fence: Mutex::default() }
    }

    /// Drops all keys of these tenants. Reads every key, which is acceptable because it is rare.
    pub(super) fn forget(&self, tenants: &HashSet<Tenant>) {
        let mut fence = self.lock();
        *fence += 1;
        self.kept.retain(|(_, tenant, _), _| !tenants.contains(tenant));
    }

    /// Drops all keys.
    fn forget_all(&self) {
        let mut fence = self.lock();
        *fence += 1;
        self.kept.clear();
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

/// Values of a company that are about to be sealed.
#[derive(Clone, Copy)]
pub(super) struct Sealing<'a> {
    pub(super) company: &'a Company,
    pub(super) chain: &'a Chain,
    pub(super) count: usize,
    /// Whether this transaction made the company's row: then it has never had a data key.
    pub(super) is_new: bool,
}

/// A company's data keys by version, each opened or with the reason why it does not open.
pub(super) type Chain = BTreeMap<i64, Result<Arc<DataKey>, OpenError>>;

impl Database {
    /// Returns one data key, from the cache where it is there.
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
            .filter(company_id.eq(company.id.clone()))
            .filter(version.eq(number))
            .select((version, wrapped_key));
        let row: Option<DataKeyRow> = call.first_at_once(row).await?;
        Ok(row.map_or(Err(OpenError::UnknownDataKey(number)), |row| self.unwrap_kept(company, &row, fence)))
    }

    /// Returns all data keys of these companies, by company. Keys that are not cached are unwrapped
    /// and not cached either: a caller that reads so many reads each once.
    pub(super) async fn chains(
        &self,
        call: &mut Call<'_>,
        companies: &[&Company],
    ) -> Result<HashMap<String, Chain>, StoreError> {
        let mut chains = HashMap::with_capacity(companies.len());
        for companies in companies.chunks(ROWS) {
            let rows = company_data_keys::table
                .filter(company_id.eq_any(companies.iter().map(|company| company.id.as_str())))
                .select((company_id, (version, wrapped_key)));
            let rows: Vec<(String, DataKeyRow)> = call.load(rows).await?;
            let mut wrapped: HashMap<String, Vec<DataKeyRow>> = HashMap::with_capacity(companies.len());
            for (company, row) in rows {
                wrapped.entry(company).or_default().push(row);
            }
            for company in companies {
                let rows = wrapped.remove(&company.id).unwrap_or_default();
                let unwrap = || rows.iter().map(|row| (row.version, self.unwrap_once(company, row))).collect();
                chains.insert(company.id.clone(), self.with_missing_keys(call, unwrap).await);
            }
        }
        Ok(chains)
    }

    /// Unwraps a chain, and once more where one of its keys is wrapped by a master key that is not
    /// held and that the sources have now: a rotation has put it there. This is the only place
    /// where a chain meets a key that is new to this process.
    async fn with_missing_keys(&self, call: &Call<'_>, unwrap: impl Fn() -> Chain) -> Chain {
        let chain = unwrap();
        let missing = chain.values().find_map(|key| match key {
            Err(OpenError::UnknownMasterKey(missing)) => Some(*missing),
            _ => None,
        });
        match missing {
            Some(missing) if self.look_within(call, missing).await => unwrap(),
            _ => chain,
        }
    }

    /// Returns all data keys of a company. Where one is wrapped by a master key that is not held,
    /// the sources are asked for it: otherwise values that are sealed with it would not open, and
    /// the newest data key would be replaced without need, under another master key.
    pub(super) async fn chain(&self, call: &mut Call<'_>, company: &Company) -> Result<Chain, StoreError> {
        let fence = self.data_keys.fence();
        let rows = company_data_keys::table.filter(company_id.eq(&company.id)).select((version, wrapped_key));
        let rows: Vec<DataKeyRow> = call.load(rows).await?;
        let unwrap = || rows.iter().map(|row| (row.version, self.unwrap_kept(company, row, fence))).collect();
        Ok(self.with_missing_keys(call, unwrap).await)
    }

    /// Asks the sources for a master key, for half of the time that the operation has left: a
    /// source that hangs must not make the write fail and the database count as down.
    pub(super) async fn look_within(&self, call: &Call<'_>, missing: MasterKeyId) -> bool {
        tokio::time::timeout(call.left() / 2, self.keys.look_for(missing)).await.unwrap_or(false)
    }

    /// Returns the data key to seal so many new values with: the newest, or a new one where the
    /// newest has sealed enough or does not open, or where there is none. Values that were sealed
    /// with a key that does not open stay as they are until they are written again.
    pub(super) async fn sealing_key(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        chain: &Chain,
        count: usize,
    ) -> Result<Arc<DataKey>, StoreError> {
        let mut keys = self.sealing_keys(call, &[Sealing { company, chain, count, is_new: false }]).await?;
        keys.pop().ok_or_else(|| StoreError::broken("no data key was made"))
    }

    /// The same for several companies, in their order.
    pub(super) async fn sealing_keys(
        &self,
        call: &mut Call<'_>,
        sealings: &[Sealing<'_>],
    ) -> Result<Vec<Arc<DataKey>>, StoreError> {
        let (mut keys, mut lacking) = (Vec::with_capacity(sealings.len()), Vec::new());
        for sealing in sealings {
            let Sealing { company, chain, count, .. } = *sealing;
            let key = match chain.last_key_value() {
                Some((number, Ok(key))) => {
                    let count = i64::try_from(count).unwrap_or(MOST_SEALINGS);
                    let counted = self.count_sealings(call, company, *number, count).await?;
                    if !counted {
                        tracing::info!(tenant = %company.tenant, data_key = number, "a data key has sealed enough; a new one is made");
                    }
                    counted.then(|| Arc::clone(key))
                }
                Some((number, Err(reason))) => {
                    tracing::error!(tenant = %company.tenant, data_key = number, %reason, "a data key does not open; a new one is made");
                    None
                }
                None => None,
            };
            if key.is_none() {
                lacking.push(sealing);
            }
            keys.push(key);
        }
        let mut made = self.new_data_keys(call, &lacking).await?.into_iter();
        let keys = keys.into_iter().map(|key| key.or_else(|| made.next()));
        keys.map(|key| key.ok_or_else(|| StoreError::broken("no data key was made"))).collect()
    }

    /// Makes the data key that seals values from now on.
    pub(super) async fn new_data_key(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        chain: &Chain,
    ) -> Result<(), StoreError> {
        self.new_data_keys(call, &[&Sealing { company, chain, count: 0, is_new: false }]).await.map(drop)
    }

    async fn new_data_keys(
        &self,
        call: &mut Call<'_>,
        sealings: &[&Sealing<'_>],
    ) -> Result<Vec<Arc<DataKey>>, StoreError> {
        if sealings.is_empty() {
            return Ok(Vec::new());
        }
        // A rotation asks which keys are from before its beginning, from whichever instance.
        let created_at = self.clock.database_now().as_millis();
        let mut numbers = Vec::with_capacity(sealings.len());
        for Sealing { company, chain, is_new, .. } in sealings {
            numbers.push(if *is_new { 1 } else { next_number(call, company, chain).await? });
        }
        // Before the ring is read: a rotation of the master key waits for this transaction if it
        // began with the old key, and then finds the data keys that it made.
        call.share_rotations().await?;
        let master = self.wrapping_key(call).await?;
        let (mut keys, mut rows) = (Vec::with_capacity(sealings.len()), Vec::with_capacity(sealings.len()));
        for (Sealing { company, count, .. }, number) in sealings.iter().zip(numbers) {
            let key = Arc::new(DataKey::generate(number)?);
            rows.push(NewDataKey {
                id: new_id(),
                company_id: company.id.clone(),
                version: number,
                wrapped_key: master.wrap(&key, owner(company))?,
                master_key_id: master.id().to_string(),
                sealings: i64::try_from(*count).unwrap_or(MOST_SEALINGS),
                created_at,
            });
            keys.push(key);
        }
        let mut rows = rows.into_iter().peekable();
        while rows.peek().is_some() {
            call.insert_data_keys(rows.by_ref().take(ROWS).collect()).await?;
        }
        Ok(keys)
    }

    /// Counts the values that a data key is about to seal. Returns `false`, and counts nothing,
    /// where that would be more than one key may seal.
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
        Ok(call.execute(Prepared(counted)).await? > 0)
    }

    /// Drops every unwrapped data key that is cached: their numbers may be given to others.
    pub fn forget_all_data_keys(&self) {
        self.data_keys.forget_all();
    }

    /// Removes a data key from the cache; `false` if it is not there.
    pub(super) fn forget_data_key(&self, company: &Company, number: i64) -> bool {
        self.data_keys.kept.remove(&name(company, number)).is_some()
    }

    fn kept(&self, company: &Company, number: i64) -> Option<Kept> {
        self.data_keys.kept.get(&name(company, number))
    }

    /// Unwraps a data key from its row without caching it, or takes it from the cache if it is
    /// there.
    fn unwrap_once(&self, company: &Company, row: &DataKeyRow) -> Result<Arc<DataKey>, OpenError> {
        match self.kept(company, row.version) {
            Some(kept) if kept.is_of(row) => Ok(kept.key),
            _ if self.is_destroyed(&company.id) => Err(OpenError::Destroyed),
            _ => self.keys.ring().unwrap(&row.wrapped_key, row.version, owner(company)).map(Arc::new),
        }
    }

    fn unwrap_kept(&self, company: &Company, row: &DataKeyRow, fence: u64) -> Result<Arc<DataKey>, OpenError> {
        if let Some(kept) = self.kept(company, row.version).filter(|kept| kept.is_of(row)) {
            return Ok(kept.key);
        }
        if self.is_destroyed(&company.id) {
            return Err(OpenError::Destroyed);
        }
        let key = Arc::new(self.keys.ring().unwrap(&row.wrapped_key, row.version, owner(company))?);
        self.data_keys.keep(fence, name(company, row.version), Kept::of(row, &key));
        Ok(key)
    }
}

/// Returns a number that no data key has, and that none ever had as far as the secrets show: a
/// value whose key is gone must not be taken for a forged one.
async fn next_number(call: &mut Call<'_>, company: &Company, chain: &Chain) -> Result<i64, StoreError> {
    // Enough for the format's name and the longest number.
    let head = substr(company_secrets::secret_value_encrypted, 1, 32);
    let named = company_secrets::table
        .filter(company_secrets::company_id.eq(&company.id))
        .filter(company_secrets::secret_value_encrypted.is_not_null())
        .select(head);
    let named: Vec<Option<String>> = call.load(named).await?;
    let named = named.iter().flatten().filter_map(|sealed| data_key_version(sealed).ok());
    let staged = secret_rotations::key_numbers(call, &company.id).await?;
    let newest = named.chain(staged).chain(chain.keys().copied()).max().unwrap_or(0);
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
        let row = DataKeyRow { version: 1, wrapped_key: "w1".to_owned() };
        let key = || Kept::of(&row, &Arc::new(DataKey::generate(1).unwrap()));
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

    #[test]
    fn a_kept_key_is_not_taken_for_another_that_has_its_number() {
        let row = |wrapped: &str| DataKeyRow { version: 1, wrapped_key: wrapped.to_owned() };
        let kept = Kept::of(&row("w1.one"), &Arc::new(DataKey::generate(1).unwrap()));
        assert!(kept.is_of(&row("w1.one")));
        assert!(!kept.is_of(&row("w1.another")));
    }
}
