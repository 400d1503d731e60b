//! Tenants' data keys: stored wrapped, kept unwrapped for a while.

use std::{collections::BTreeMap, sync::Arc};

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

/// Unwrapped data keys kept at most; each takes about a kilobyte.
const KEPT: usize = 10_000;

/// Unwrapped data keys, wiped as they leave.
///
/// The subdomain is part of the name: a key was unwrapped for both, and a row whose
/// subdomain was changed since must go through the unwrapping again, which refuses it.
pub(super) struct DataKeys(Cache<(String, Tenant, i64), Kept>);

/// A data key with the text that it was unwrapped from, to be known from another that
/// has its number.
#[derive(Clone)]
struct Kept {
    wrapped: Arc<str>,
    key: Arc<DataKey>,
}

impl DataKeys {
    pub(super) fn new() -> Self {
        Self(Cache::new(KEPT))
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
    /// The master keys that wrap tenants' data keys and are not in the ring, with the
    /// number of tenants whose secrets do not open for want of each.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unknown_master_keys(&self) -> Result<Vec<(MasterKeyId, usize)>, StoreError> {
        let mut call = self.calls.read("unknown_master_keys").await?;
        let known: Vec<String> = self.ring.ids().map(|id| id.to_string()).collect();
        let locked =
            company_data_keys::table.filter(master_key_id.ne_all(known)).select((master_key_id, company_id)).distinct();
        let locked: Vec<(String, String)> = call.load(locked).await?;
        call.done();
        let mut tenants = BTreeMap::new();
        for (id, _) in locked {
            let id =
                id.parse().map_err(|_| StoreError::broken("a master key id in company_data_keys cannot be read"))?;
            *tenants.entry(id).or_insert(0) += 1;
        }
        Ok(tenants.into_iter().collect())
    }

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
        let row = company_data_keys::table
            .filter(company_id.eq(&company.id))
            .filter(version.eq(number))
            .select((version, wrapped_key));
        let row: Option<DataKeyRow> = call.first(row).await?;
        Ok(row.map_or(Err(OpenError::UnknownDataKey(number)), |row| self.unwrap_kept(company, &row)))
    }

    /// All data keys of a company.
    pub(super) async fn chain(&self, call: &mut Call<'_>, company: &Company) -> Result<Chain, StoreError> {
        let rows = company_data_keys::table.filter(company_id.eq(&company.id)).select((version, wrapped_key));
        let rows: Vec<DataKeyRow> = call.load(rows).await?;
        Ok(rows.iter().map(|row| (row.version, self.unwrap_kept(company, row))).collect())
    }

    /// The key that new values are sealed with: the newest, or a new one where that
    /// does not open or there is none. What was sealed with a key that does not open
    /// stays as it is until it is written again.
    pub(super) async fn sealing_key(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        chain: &mut Chain,
        now: Timestamp,
    ) -> Result<Arc<DataKey>, StoreError> {
        let newest = chain.last_key_value();
        if let Some((_, Ok(key))) = newest {
            return Ok(Arc::clone(key));
        }
        if let Some((number, Err(reason))) = newest {
            tracing::error!(tenant = %company.tenant, data_key = number, %reason, "a data key does not open; a new one is made");
        }
        let number = next_number(call, company, chain).await?;
        let key = Arc::new(DataKey::generate(number)?);
        let (wrapped, master) = self.ring.wrap(&key, owner(company))?;
        let insert = diesel::insert_into(company_data_keys::table).values((
            company_data_keys::id.eq(new_id()),
            company_id.eq(company.id.clone()),
            version.eq(number),
            wrapped_key.eq(wrapped),
            master_key_id.eq(master.to_string()),
            company_data_keys::created_at.eq(now.as_millis()),
        ));
        call.execute(insert).await?;
        chain.insert(number, Ok(Arc::clone(&key)));
        Ok(key)
    }

    /// Takes a data key out of memory; `false` if it is not there.
    pub(super) fn forget_data_key(&self, company: &Company, number: i64) -> bool {
        self.data_keys.0.remove(&name(company, number)).is_some()
    }

    fn kept(&self, company: &Company, number: i64) -> Option<Kept> {
        self.data_keys.0.get(&name(company, number))
    }

    fn unwrap_kept(&self, company: &Company, row: &DataKeyRow) -> Result<Arc<DataKey>, OpenError> {
        if let Some(Kept { wrapped, key }) = self.kept(company, row.version)
            && *wrapped == *row.wrapped_key
        {
            return Ok(key);
        }
        let key = Arc::new(self.ring.unwrap(&row.wrapped_key, row.version, owner(company))?);
        let kept = Kept { wrapped: row.wrapped_key.as_str().into(), key: Arc::clone(&key) };
        self.data_keys.0.insert(name(company, row.version), kept);
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

fn name(company: &Company, number: i64) -> (String, Tenant, i64) {
    (company.id.clone(), company.tenant.clone(), number)
}

fn owner(company: &Company) -> Owner<'_> {
    Owner { company_id: &company.id, tenant: &company.tenant }
}
