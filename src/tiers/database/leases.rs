//! Leases: the right of one process at a time to do something for all.
//!
//! A lease ends by itself if it is not renewed, so work continues when its process has died, or
//! hangs. A process that was only stopped for a while may go on working after another has taken
//! over. Its work must not count then: each lease has a *fencing token*, which is raised when the
//! lease changes its holder, and a transaction that writes under a lease compares it
//! ([`Lease::check`]), with the lease's row locked. So if two processes believe that they hold it,
//! the first has committed before the other takes over, or finds that the other has.
//!
//! The database's clock, as each process follows it, decides whether a lease has ended. A process
//! with a wrong clock takes over too early, or too late; the fencing token works whatever clocks
//! say.
//!
//! Work that lasts longer than one read of a folder takes a job lock (`job_locks.rs`), which is a
//! lease and more.

use std::time::Duration;

use diesel::{BoolExpressionMethods as _, ExpressionMethods as _, IntoSql as _, QueryDsl as _, Queryable};

use super::{
    Database, calls::Call, error::StoreError, new_id, rows::BACKGROUND_TIMEOUTS, schema::leases, time::DatabaseNow,
};
use crate::{clock::Timestamp, tenant::Tenant};

/// The right to something, until it ends or is taken over.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a lease that is not ended keeps the others waiting until its time is over"]
pub struct Lease {
    name: String,
    holder: String,
    token: i64,
    /// How long it lasts from its last renewal.
    lasts: Duration,
}

/// The holder of a lease that another process wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its host and process, for people.
    pub shown: String,
    /// When its lease ends, unless it is renewed.
    pub until: Timestamp,
}

#[derive(Queryable)]
pub(super) struct Row {
    name: String,
    holder: String,
    shown: String,
    token: i64,
    until: i64,
    pub(super) locked: bool,
}

impl Lease {
    /// The name of the lease to read a tenant's folder for all instances.
    #[must_use]
    pub fn of_snapshot(tenant: &Tenant) -> String {
        format!("snapshot {tenant}")
    }

    /// Ends, with the transaction, any process's lease to read a tenant's folder: the result of
    /// that read is out of date, so nobody should wait for it.
    pub(super) async fn end_snapshot(call: &mut Call<'_>, tenant: &Tenant) -> Result<(), StoreError> {
        let any = leases::table.find(Self::of_snapshot(tenant)).filter(leases::until.gt(0_i64));
        call.execute(diesel::update(any).set(leases::until.eq(0_i64))).await.map(drop)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Checks that the lease has not changed its holder, and prevents that until the transaction
    /// ends. A process that writes is alive, so this renews the lease too. The lease may have ended
    /// already, if nobody has wanted it meanwhile.
    ///
    /// To be called at the transaction's end, before [`Database::raise`]: a concurrent renewal
    /// waits from here to the commit, and all code that locks both locks them in this order.
    pub(super) async fn check(&self, call: &mut Call<'_>, now: Timestamp) -> Result<(), StoreError> {
        let ours = leases::table.find(self.name.clone()).filter(leases::token.eq(self.token));
        let until = now.plus(self.lasts).as_millis();
        let held = call.execute(diesel::update(ours).set(leases::until.eq(until))).await?;
        if held > 0 { Ok(()) } else { Err(StoreError::LeaseLost) }
    }

    /// Ends the lease with the transaction, if it has not changed its holder.
    pub(super) async fn end(&self, call: &mut Call<'_>) -> Result<(), StoreError> {
        let ours = leases::table.find(self.name.clone()).filter(leases::holder.eq(self.holder.clone()));
        call.execute(diesel::update(ours).set(leases::until.eq(0_i64))).await.map(drop)
    }
}

impl Database {
    /// Takes a lease for so long, if nobody else has it; otherwise returns its holder. `by`
    /// describes this process to people.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn lease(&self, name: &str, by: &str, lasts: Duration) -> Result<Result<Lease, Holder>, StoreError> {
        // Read first: a process that waits for a lease asks again and again, and must not write
        // each time.
        if let Some(holder) = self.lease_holder(name).await? {
            return Ok(Err(holder));
        }
        self.take(name, by, lasts, false).await
    }

    /// The same, where the caller has the advisory lock of that name (`true`) or not: with it, a
    /// lease whose holder had it is taken over before it ends.
    pub(super) async fn take(
        &self,
        name: &str,
        by: &str,
        lasts: Duration,
        locked: bool,
    ) -> Result<Result<Lease, Holder>, StoreError> {
        self.calls.repeated(|| self.take_once(name, by, lasts, locked)).await
    }

    async fn take_once(
        &self,
        name: &str,
        by: &str,
        lasts: Duration,
        locked: bool,
    ) -> Result<Result<Lease, Holder>, StoreError> {
        let mut call = self.calls.write("lease").await?;
        let now = self.clock.database_now();
        let (holder, until) = (new_id(), now.plus(lasts).as_millis());
        let first = diesel::insert_into(leases::table)
            .values((
                leases::name.eq(name),
                leases::holder.eq(&holder),
                leases::shown.eq(by),
                leases::token.eq(1_i64),
                leases::until.eq(until),
                leases::locked.eq(locked),
            ))
            .on_conflict(leases::name)
            .do_nothing();
        if call.execute(first).await? == 0 {
            let deserted = leases::locked.and(locked.into_sql::<diesel::sql_types::Bool>());
            let free = leases::table.find(name).filter(leases::until.le(now.as_millis()).or(deserted));
            let take = diesel::update(free).set((
                leases::holder.eq(&holder),
                leases::shown.eq(by),
                leases::token.eq(leases::token + 1_i64),
                leases::until.eq(until),
                leases::locked.eq(locked),
            ));
            call.execute(take).await?;
        }
        let row: Option<Row> = call.first(leases::table.find(name)).await?;
        call.commit().await?;
        let row = row.ok_or_else(|| StoreError::broken("a lease that was taken is gone"))?;
        let is_ours = row.holder == holder;
        Ok(if is_ours { Ok(Lease { name: row.name, holder, token: row.token, lasts }) } else { Err(row.into()) })
    }

    /// The holder of a lease that has not ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn lease_holder(&self, name: &str) -> Result<Option<Holder>, StoreError> {
        Ok(self.held_lease(name).await?.map(Holder::from))
    }

    /// The row of a lease that has not ended.
    pub(super) async fn held_lease(&self, name: &str) -> Result<Option<Row>, StoreError> {
        let mut call = self.calls.read("lease_holder").await?;
        let asked_at = self.clock.running();
        let row = leases::table.find(name).select((leases::all_columns, DatabaseNow));
        let Some((row, now)) = call.first::<_, (Row, Option<i64>)>(row).await? else {
            call.done();
            return Ok(None);
        };
        call.done();
        self.note_time(now, asked_at);
        let now = self.clock.database_now().as_millis();
        Ok(Some(row).filter(|row| row.until > now))
    }

    /// Renews a lease from now on; `false` where it has changed its holder.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn keep_lease(&self, lease: &Lease) -> Result<bool, StoreError> {
        match self.renew_lease(lease, false).await {
            Ok(()) => Ok(true),
            Err(StoreError::LeaseLost) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Renews a lease from now on, and notes whether its holder has the advisory lock too.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`] where it has changed its holder.
    pub(super) async fn renew_lease(&self, lease: &Lease, locked: bool) -> Result<(), StoreError> {
        let write = || async {
            // No caller waits for it, and on SQLite a transaction of this process may take long.
            let mut call = self.calls.write_within("renew_lease", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
            lease.check(&mut call, self.clock.database_now()).await?;
            call.execute(diesel::update(leases::table.find(&lease.name)).set(leases::locked.eq(locked))).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// Ends a lease, if it has not changed its holder, so that processes that wait for it get it at
    /// once.
    ///
    /// # Errors
    /// [`StoreError`]; then it ends by itself.
    pub async fn end_lease(&self, lease: &Lease) -> Result<(), StoreError> {
        let write = || async {
            let mut call = self.calls.write("end_lease").await?;
            lease.end(&mut call).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }
}

impl From<Row> for Holder {
    fn from(row: Row) -> Self {
        Self { shown: row.shown, until: Timestamp::from_millis(row.until) }
    }
}
