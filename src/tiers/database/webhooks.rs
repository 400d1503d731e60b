//! Upstream's accepted webhooks, kept so that no instance accepts one of them again.

use std::time::Duration;

use diesel::{ExpressionMethods as _, QueryDsl as _, dsl::count_star};

use super::{Database, changes::Change, error::StoreError, schema::notices};
use crate::tenant::Tenant;

/// How long a webhook is remembered: longer than any instance accepts one, since their clocks may
/// differ by some minutes.
const REMEMBERED_FOR: Duration = Duration::from_secs(15 * 60);

/// The number of webhooks that are remembered at most. Above it, a new one is not accepted until
/// older ones are forgotten.
const REMEMBERED: i64 = 20_000;

/// The result of taking a webhook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It is new.
    New,
    /// It was accepted before.
    Replayed,
    /// More were accepted than can be remembered.
    TooMany,
}

impl Database {
    /// Accepts a webhook, and tells other instances in the same transaction that the folders of
    /// `tenants` have changed upstream.
    ///
    /// If two instances take the same webhook at once, the second waits for the first at the
    /// primary key, and finds its row.
    ///
    /// # Errors
    /// [`StoreError`]; then it was not accepted.
    pub async fn take_notice(&self, digest: [u8; 32], tenants: &[Tenant]) -> Result<Taken, StoreError> {
        self.calls.repeated(|| self.take_notice_once(digest, tenants)).await
    }

    async fn take_notice_once(&self, digest: [u8; 32], tenants: &[Tenant]) -> Result<Taken, StoreError> {
        let mut call = self.calls.write("take_notice").await?;
        let now = self.clock.database_now().as_millis();
        let lasts = i64::try_from(REMEMBERED_FOR.as_millis()).unwrap_or(i64::MAX);
        let outdated = notices::table.filter(notices::received_at.lt(now.saturating_sub(lasts)));
        call.execute(diesel::delete(outdated)).await?;
        let row = diesel::insert_into(notices::table)
            .values((notices::digest.eq(digest.to_vec()), notices::received_at.eq(now)))
            .on_conflict(notices::digest)
            .do_nothing();
        if call.execute(row).await? == 0 {
            call.roll_back().await?;
            return Ok(Taken::Replayed);
        }
        let remembered: Option<i64> = call.first(notices::table.select(count_star())).await?;
        if remembered.unwrap_or(0) > REMEMBERED {
            call.roll_back().await?;
            return Ok(Taken::TooMany);
        }
        let told: Vec<Change> = tenants.iter().cloned().map(Change::Webhook).collect();
        self.raise_all(&mut call, &told).await?;
        call.commit().await?;
        Ok(Taken::New)
    }
}
