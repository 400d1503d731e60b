//! The use of upstream budgets by instances, kept for the instances that replace them.

use std::{sync::Arc, time::Duration};

use super::{Database, error::StoreError, schema::counters};
use crate::clock::Timestamp;
use diesel::{ExpressionMethods as _, QueryDsl as _, upsert::excluded};

/// The row where the instances of one place write down what they have used: the time when all of it
/// will have come back. A killed instance writes nothing at its end, so the next one reads what was
/// written before the calls. Two instances that run in one place at the same time overwrite each
/// other: the second begins with what the first had left.
pub struct BudgetPage {
    database: Arc<Database>,
    name: String,
}

impl BudgetPage {
    /// The page of a place, with the time until all that was used there will have come back.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn find(database: &Arc<Database>, place: &str) -> Result<(Duration, Self), StoreError> {
        let page = Self { database: Arc::clone(database), name: format!("upstream_budget {place}") };
        let mut call = database.calls.read("find_budget").await?;
        let whole_at = call.first(counters::table.find(page.name.clone()).select(counters::value)).await?;
        call.done();
        let whole_at = Timestamp::from_millis(whole_at.unwrap_or(0));
        Ok((whole_at.since(database.clock.database_now()), page))
    }

    /// Records the time until all of the budget will have come back.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn note(&self, whole_in: Duration) -> Result<(), StoreError> {
        let whole_at = self.database.clock.database_now().plus(whole_in).as_millis();
        let mut call = self.database.calls.write("note_budget").await?;
        let row = diesel::insert_into(counters::table)
            .values((counters::name.eq(self.name.clone()), counters::value.eq(whole_at)))
            .on_conflict(counters::name)
            .do_update()
            .set(counters::value.eq(excluded(counters::value)));
        call.execute(row).await?;
        call.commit().await
    }
}
