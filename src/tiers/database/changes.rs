//! One number that tells other instances that phases or tokens have changed, or that a
//! tenant was shredded.

use diesel::{ExpressionMethods as _, QueryDsl as _};

use super::{Database, calls::Call, error::StoreError, schema::counters};

const CHANGES: &str = "changes";

impl Database {
    /// Counts the changes of tokens, of tenants' own phases and of master keys, and the
    /// shreddings, by any instance: cheap enough to ask for every second.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn changes(&self) -> Result<i64, StoreError> {
        let mut call = self.calls.read("changes").await?;
        let changes = call.first(counters::table.find(CHANGES).select(counters::value)).await?;
        call.done();
        Ok(changes.unwrap_or(0))
    }
}

/// Counts one more change; gives its number.
pub(super) async fn raise(call: &mut Call<'_>) -> Result<i64, StoreError> {
    let raise = diesel::update(counters::table.find(CHANGES)).set(counters::value.eq(counters::value + 1));
    call.execute(raise).await?;
    let raised = call.first(counters::table.find(CHANGES).select(counters::value)).await?;
    raised.ok_or_else(|| StoreError::broken("the counter of changes is gone"))
}
