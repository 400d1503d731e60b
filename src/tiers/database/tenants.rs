//! Tenants without secrets: made, and removed.

use diesel::{ExpressionMethods as _, QueryDsl as _};

use super::{
    Database,
    changes::Change,
    companies::{self, Purpose},
    error::StoreError,
    schema::{company_data_keys, company_secrets},
};
use crate::tenant::Tenant;

impl Database {
    /// Makes a tenant without secrets; one that is there stays as it is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn create_tenant(&self, tenant: &Tenant) -> Result<(), StoreError> {
        let create = || async {
            let mut call = self.calls.write("create_tenant").await?;
            let (_, made) = companies::lock(&mut call, tenant, self.clock.now(), Purpose::Look).await?;
            if !made {
                return call.roll_back().await;
            }
            self.raise(&mut call, Change::Folder(tenant.clone())).await?;
            call.commit().await
        };
        self.calls.repeated(create).await
    }

    /// Removes a tenant that has never had a secret here, and no phase of its own; `false` where that is not
    /// so, or there is no such tenant. Nothing has changed then.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn remove_empty_tenant(&self, tenant: &Tenant) -> Result<bool, StoreError> {
        let remove = || async {
            let mut call = self.calls.write("remove_empty_tenant").await?;
            let (company, made) = companies::lock(&mut call, tenant, self.clock.now(), Purpose::Change).await?;
            let any = company_secrets::table.filter(company_secrets::company_id.eq(company.id.clone()));
            let any: Option<String> = call.first(any.limit(1).select(company_secrets::id)).await?;
            if made || company.phase.is_some() || any.is_some() {
                call.roll_back().await?;
                return Ok(false);
            }
            let keys = company_data_keys::table.filter(company_data_keys::company_id.eq(company.id.clone()));
            call.execute(diesel::delete(keys)).await?;
            companies::remove(&mut call, &company).await?;
            self.raise(&mut call, Change::Folder(tenant.clone())).await?;
            call.commit().await?;
            Ok(true)
        };
        self.calls.repeated(remove).await
    }
}
