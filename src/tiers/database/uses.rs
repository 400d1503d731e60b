//! The tenants that were asked for last: a starting instance loads these first.

use std::time::Duration;

use diesel::{ExpressionMethods as _, QueryDsl as _};

use super::{
    Database,
    error::StoreError,
    rows::{BACKGROUND_TIMEOUTS, ROWS, Use},
    schema::tenant_uses,
};
use crate::tenant::Tenant;

/// How long uses are kept.
const KEPT_FOR: Duration = Duration::from_secs(30 * 24 * 60 * 60);

impl Database {
    /// Notes that these tenants were asked for, each given once. They are written in the order
    /// given, which must be the order of their names: if two instances write the same rows, one
    /// waits for the other, and they never wait for each other.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn note_uses(&self, tenants: &[Tenant]) -> Result<(), StoreError> {
        if tenants.is_empty() {
            return Ok(());
        }
        let now = self.clock.database_now().as_millis();
        let mut call = self.calls.write_within("note_uses", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
        for tenants in tenants.chunks(ROWS) {
            let used = |tenant: &Tenant| Use { subdomain: tenant.as_str().to_owned(), used_at: now };
            call.keep_uses(tenants.iter().map(used).collect()).await?;
        }
        let kept_for = i64::try_from(KEPT_FOR.as_millis()).unwrap_or(i64::MAX);
        call.execute(diesel::delete(tenant_uses::table.filter(tenant_uses::used_at.lt(now - kept_for)))).await?;
        call.commit().await
    }

    /// The tenants that were asked for last, at most so many, the latest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn last_used(&self, most: usize) -> Result<Vec<Tenant>, StoreError> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let mut call = self.calls.read("last_used").await?;
        let last = tenant_uses::table.order((tenant_uses::used_at.desc(), tenant_uses::subdomain.asc())).limit(most);
        let rows: Vec<String> = call.load(last.select(tenant_uses::subdomain)).await?;
        call.done();
        let wrong = |_| StoreError::broken("the name of a tenant that was used cannot be read");
        rows.into_iter().map(|tenant| tenant.parse().map_err(wrong)).collect()
    }
}
