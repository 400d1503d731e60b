//! Shredding destroys a tenant's data keys and secrets. Data that is left of them elsewhere then
//! opens only with a copy of the tenant's wrapped keys and their master key.

use std::collections::HashSet;

use diesel::{
    ExpressionMethods as _, QueryDsl as _,
    dsl::{count_star, max},
};

use super::{
    Database,
    changes::Change,
    companies::{self, Purpose},
    error::StoreError,
    new_id,
    pool::Remains,
    schema::{companies as company_table, company_data_keys, company_secrets},
    secret_rotations,
};
use crate::{clock::Timestamp, tenant::Tenant};

/// The result of a shredding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shredded {
    /// Data keys.
    pub data_keys: usize,
    /// Secrets that had a value.
    pub secrets: usize,
    /// Values of those secrets, older versions included.
    pub versions: usize,
    /// The number of the change that tells the instances: see [`Database::changes`].
    pub change: i64,
    /// The deleted data that the database's own files still hold.
    pub remains: Remains,
}

impl Database {
    /// Destroys a tenant's data keys and secrets, of every version. Where the tenant is not known
    /// here, nothing is done and nothing is returned.
    ///
    /// The tenant stays, with its own phase: a tenant that the database owns must not fall back to
    /// the folder that it once had upstream. But it begins anew, under another id:
    /// - Validators and sealed values name the id. None from before is taken for one from after,
    ///   though versions begin at 1 again, and old rows that are put back do not open.
    /// - The generation rises as with any write, so a snapshot that was being read is not stored,
    ///   and the earlier copy is not confirmed.
    /// - A write finds the id under the lock that this takes too: it is destroyed with the rest, or
    ///   it is the first under the new id.
    /// - A denial that was met before the shredding and is noted after it describes the folder
    ///   upstream, and that holds whatever is stored here.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn shred(&self, tenant: &Tenant) -> Result<Option<Shredded>, StoreError> {
        let Some(shredded) = self.calls.repeated(|| self.shred_once(tenant)).await? else {
            return Ok(None);
        };
        let remains = self.erase().await.unwrap_or_else(|error| {
            tracing::debug!(%error, "the write-ahead log was not emptied");
            Remains::InLog
        });
        Ok(Some(Shredded { remains, ..shredded }))
    }

    /// Deletes the rows, but does not clean the database's own files.
    async fn shred_once(&self, tenant: &Tenant) -> Result<Option<Shredded>, StoreError> {
        // This may delete as much as a snapshot stores.
        let mut call = self.calls.write_within("shred", self.calls.timeout * 10).await?;
        let now = self.clock.database_now();
        let (company, made) = companies::lock(&mut call, tenant, now, Purpose::Change).await?;
        if made {
            call.roll_back().await?;
            return Ok(None);
        }
        let id = company.id;
        let values = company_secrets::table
            .filter(company_secrets::company_id.eq(id.clone()))
            .filter(company_secrets::secret_value_encrypted.is_not_null());
        let newest = values.clone().filter(company_secrets::superseded_at.is_null()).select(count_star());
        let secrets: Option<i64> = call.first(newest).await?;
        let versions: Option<i64> = call.first(values.select(count_star())).await?;
        let [secrets, versions] = [secrets, versions].map(|count| usize::try_from(count.unwrap_or(0)).unwrap_or(0));
        let rows = company_secrets::table.filter(company_secrets::company_id.eq(id.clone()));
        call.execute(diesel::delete(rows)).await?;
        secret_rotations::remove_all(&mut call, &id).await?;
        let keys = company_data_keys::table.filter(company_data_keys::company_id.eq(id.clone()));
        let data_keys = call.execute(diesel::delete(keys)).await?;

        let mut ledger = self.lock_register(&mut call).await?;
        ledger.destroy(&id);
        ledger.keep(&mut call, now).await?;

        // From here on shreddings run one at a time, and each is given a later time than all
        // before, whatever the clocks say: an instance that knows one shredding has only to ask for
        // later ones.
        let change = self.raise(&mut call, Change::Tenants).await?;
        let last: Option<Option<i64>> =
            call.first(company_table::table.select(max(company_table::shredded_at))).await?;
        let at = last.flatten().map_or(now.as_millis(), |last| now.as_millis().max(last.saturating_add(1)));
        let anew = diesel::update(company_table::table.find(id)).set((
            company_table::id.eq(new_id()),
            company_table::snapshot_at.eq(None::<i64>),
            company_table::snapshot_etag.eq(None::<String>),
            company_table::snapshot_whole.eq(false),
            company_table::denied_at.eq(None::<i64>),
            company_table::head.eq(None::<String>),
            company_table::shredded_at.eq(at),
        ));
        call.execute(anew).await?;
        call.commit().await?;
        Ok(Some(Shredded { data_keys, secrets, versions, change, remains: Remains::InLog }))
    }

    /// The tenants that were shredded later than `after`, each with the time to ask after next.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn shredded(&self, after: Option<Timestamp>) -> Result<Vec<(Tenant, Timestamp)>, StoreError> {
        let mut call = self.calls.read("shredded").await?;
        let later = company_table::table
            .filter(company_table::shredded_at.gt(after.map_or(i64::MIN, Timestamp::as_millis)))
            .order(company_table::shredded_at.asc())
            .select((company_table::subdomain, company_table::shredded_at));
        let rows: Vec<(String, Option<i64>)> = call.load(later).await?;
        self.learn_seals(&mut call).await?;
        call.done();
        let read = |(subdomain, at): (String, Option<i64>)| {
            let tenant = subdomain.parse().map_err(|_| StoreError::broken("a company's subdomain cannot be read"))?;
            Ok((tenant, Timestamp::from_millis(at.unwrap_or(i64::MIN))))
        };
        rows.into_iter().map(read).collect()
    }

    /// The time of the last shredding, for [`Self::shredded`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn last_shredding(&self) -> Result<Option<Timestamp>, StoreError> {
        let mut call = self.calls.read("last_shredding").await?;
        let last: Option<Option<i64>> =
            call.first(company_table::table.select(max(company_table::shredded_at))).await?;
        call.done();
        Ok(last.flatten().map(Timestamp::from_millis))
    }

    /// Drops the unwrapped data keys of these tenants that this process holds. A key that is being
    /// read at the moment is not kept either.
    pub fn forget_data_keys(&self, tenants: &HashSet<Tenant>) {
        self.data_keys.forget(tenants);
    }

    /// Removes deleted data from the database's own files, as far as that can be done.
    async fn erase(&self) -> Result<Remains, StoreError> {
        let mut call = self.calls.read("erase").await?;
        let remains = call.erase().await?;
        call.done();
        Ok(remains)
    }
}
