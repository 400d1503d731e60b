//! When secrets are to be rotated next: a row for each that a rule names.
//!
//! The rows are made from when each secret was last written, and say when a rotation of it begins. No
//! timer in a process decides that: whichever instance holds the lease begins what is due. A row that is
//! not right any more, because somebody has written the secret meanwhile, is found wrong before the
//! rotation begins, and made right.

use diesel::{
    BoolExpressionMethods as _, ExpressionMethods as _, JoinOnDsl as _, NullableExpressionMethods as _, QueryDsl as _,
};

use super::{
    Database, Lease, companies,
    error::StoreError,
    schema::{companies as company_table, company_secrets, rotation_due},
};
use crate::{clock::Timestamp, secret::SecretKey, tenant::Tenant};

/// A secret with when it was last written, and when it is to be rotated as far as that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotatable {
    /// The tenant.
    pub tenant: Tenant,
    /// The secret.
    pub key: SecretKey,
    /// When its value was written, or copied here.
    pub written_at: Timestamp,
    /// The row.
    pub due_at: Option<Timestamp>,
}

/// A secret that is to be rotated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    /// The tenant.
    pub tenant: Tenant,
    /// The secret.
    pub key: SecretKey,
    /// When.
    pub due_at: Timestamp,
}

/// The place of a page of secrets: the company and the key that the page before ended with.
pub type PageEnd = (String, String);

/// The secrets of one page.
const PAGE: i64 = 500;

impl Database {
    /// A page of the secrets that have a value here, and where the next page begins.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rotatable(&self, after: Option<&PageEnd>) -> Result<(Vec<Rotatable>, Option<PageEnd>), StoreError> {
        type Row = (String, String, String, i64, Option<i64>);
        let (company, key) = after.cloned().unwrap_or_default();
        let mut call = self.calls.read("rotatable").await?;
        let is_behind = company_secrets::company_id
            .gt(company.clone())
            .or(company_secrets::company_id.eq(company).and(company_secrets::secret_key.gt(key)));
        let due = rotation_due::company_id
            .eq(company_secrets::company_id)
            .and(rotation_due::secret_key.eq(company_secrets::secret_key));
        let page = company_secrets::table
            .inner_join(company_table::table.on(company_table::id.eq(company_secrets::company_id)))
            .left_join(rotation_due::table.on(due))
            .filter(company_secrets::superseded_at.is_null())
            .filter(company_secrets::secret_value_encrypted.is_not_null())
            .filter(is_behind)
            .order((company_secrets::company_id.asc(), company_secrets::secret_key.asc()))
            .limit(PAGE)
            .select((
                company_secrets::company_id,
                company_table::subdomain,
                company_secrets::secret_key,
                company_secrets::updated_at,
                rotation_due::due_at.nullable(),
            ));
        let rows: Vec<Row> = call.load(page).await?;
        call.done();
        let is_last = rows.len() < usize::try_from(PAGE).unwrap_or(usize::MAX);
        let end = rows.last().filter(|_| !is_last).map(|(company, _, key, ..)| (company.clone(), key.clone()));
        let rows = rows.into_iter().filter_map(|(_, tenant, key, written_at, due_at)| {
            Some(Rotatable {
                tenant: tenant.parse().ok()?,
                key: key.parse().ok()?,
                written_at: Timestamp::from_millis(written_at),
                due_at: due_at.map(Timestamp::from_millis),
            })
        });
        Ok((rows.collect(), end))
    }

    /// When a secret's value was written, or copied here; `None` where it has none here.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn written_at(&self, tenant: &Tenant, key: &SecretKey) -> Result<Option<Timestamp>, StoreError> {
        let mut call = self.calls.read("written_at").await?;
        let written = company_secrets::table
            .inner_join(company_table::table.on(company_table::id.eq(company_secrets::company_id)))
            .filter(company_table::subdomain.eq(tenant.as_str().to_owned()))
            .filter(company_secrets::secret_key.eq(key.as_str().to_owned()))
            .filter(company_secrets::superseded_at.is_null())
            .filter(company_secrets::secret_value_encrypted.is_not_null())
            .select(company_secrets::updated_at);
        let written: Option<i64> = call.first(written).await?;
        call.done();
        Ok(written.map(Timestamp::from_millis))
    }

    /// Sets when secrets are to be rotated, or that they are not (`None`), in one transaction.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn set_due(
        &self,
        due: &[(Tenant, SecretKey, Option<Timestamp>)],
        lease: Option<&Lease>,
    ) -> Result<(), StoreError> {
        if due.is_empty() {
            return Ok(());
        }
        let write = || async {
            let now = self.clock.database_now();
            let mut call = self.calls.write("set_due").await?;
            let companies = companies::find_all(&mut call, due.iter().map(|(tenant, ..)| tenant)).await?;
            for (tenant, key, at) in due {
                // One that is unknown here has nothing to be rotated.
                let Some(company) = companies.get(tenant) else { continue };
                match at {
                    Some(at) => {
                        let row = (
                            rotation_due::company_id.eq(company.id.clone()),
                            rotation_due::secret_key.eq(key.as_str().to_owned()),
                            rotation_due::due_at.eq(at.as_millis()),
                        );
                        let upsert = diesel::insert_into(rotation_due::table)
                            .values(row)
                            .on_conflict((rotation_due::company_id, rotation_due::secret_key))
                            .do_update()
                            .set(rotation_due::due_at.eq(at.as_millis()));
                        call.execute(upsert).await?;
                    }
                    None => {
                        let row = rotation_due::table.find((company.id.clone(), key.as_str().to_owned()));
                        call.execute(diesel::delete(row)).await?;
                    }
                }
            }
            if let Some(lease) = lease {
                lease.check(&mut call, now).await?;
            }
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// Removes all rows: nothing is rotated by itself any more.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn clear_due(&self, lease: &Lease) -> Result<(), StoreError> {
        let mut call = self.calls.write("clear_due").await?;
        call.execute(diesel::delete(rotation_due::table)).await?;
        lease.check(&mut call, self.clock.database_now()).await?;
        call.commit().await
    }

    /// The secrets that are to be rotated before this time, the earliest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn due_before(&self, before: Timestamp, most: usize) -> Result<Vec<Due>, StoreError> {
        let mut call = self.calls.read("due_before").await?;
        let due = rotation_due::table
            .inner_join(company_table::table.on(company_table::id.eq(rotation_due::company_id)))
            .filter(rotation_due::due_at.le(before.as_millis()))
            .order((rotation_due::due_at.asc(), rotation_due::company_id.asc(), rotation_due::secret_key.asc()))
            .limit(i64::try_from(most).unwrap_or(i64::MAX))
            .select((company_table::subdomain, rotation_due::secret_key, rotation_due::due_at));
        let rows: Vec<(String, String, i64)> = call.load(due).await?;
        call.done();
        let read = |(tenant, key, due_at): (String, String, i64)| {
            let due_at = Timestamp::from_millis(due_at);
            Some(Due { tenant: tenant.parse().ok()?, key: key.parse().ok()?, due_at })
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    /// When a secret is to be rotated, where a row says so.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn due_at(&self, tenant: &Tenant, key: &SecretKey) -> Result<Option<Timestamp>, StoreError> {
        let mut call = self.calls.read("due_at").await?;
        let due = rotation_due::table
            .inner_join(company_table::table.on(company_table::id.eq(rotation_due::company_id)))
            .filter(company_table::subdomain.eq(tenant.as_str().to_owned()))
            .filter(rotation_due::secret_key.eq(key.as_str().to_owned()))
            .select(rotation_due::due_at);
        let due: Option<i64> = call.first(due).await?;
        call.done();
        Ok(due.map(Timestamp::from_millis))
    }
}
