//! Leases: the right to do something that one process does at a time, for all.
//!
//! A lease ends by itself where it is not renewed, so that work goes on when its process has
//! died, or hangs. One that was only stopped for a while may go on working when another has
//! taken over. What it does then must not count: each lease has a *fencing token*, which is
//! raised when the lease changes hands, and what is written under a lease compares it in the
//! transaction that writes ([`Lease::check`]), with the lease's row locked. So of two who
//! believe to hold it, one is through before the other takes over, or finds that it has.
//!
//! Whether a lease has ended is told by the database's clock, as each process follows it. One
//! that goes wrong takes over too early, or too late; the fencing token holds whatever clocks say.
//!
//! Work that lasts longer than one read of a folder takes a job lock (`job_locks.rs`), which is a lease and
//! more.

use std::time::Duration;

use diesel::{BoolExpressionMethods as _, ExpressionMethods as _, IntoSql as _, QueryDsl as _, Queryable};

use super::{
    Database, calls::Call, error::StoreError, new_id, schema::leases, snapshots::BACKGROUND_TIMEOUTS, time::DatabaseNow,
};
use crate::{clock::Timestamp, tenant::Tenant};

/// The right to something, until it ends or is taken over.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a lease that is not ended keeps the others waiting until its time is over"]
pub struct Lease {
    name: String,
    holder: String,
    token: i64,
    /// How long it lasts from when it was last renewed.
    lasts: Duration,
}

/// Who holds a lease that is wanted.
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
    /// What the lease to read a tenant's folder for all instances is called.
    #[must_use]
    pub fn of_snapshot(tenant: &Tenant) -> String {
        format!("snapshot {tenant}")
    }

    /// Ends whoever's lease to read a tenant's folder, with the transaction: what is being
    /// read is out of date, and nobody is to wait for it.
    pub(super) async fn end_snapshot(call: &mut Call<'_>, tenant: &Tenant) -> Result<(), StoreError> {
        let any = leases::table.find(Self::of_snapshot(tenant)).filter(leases::until.gt(0_i64));
        call.execute(diesel::update(any).set(leases::until.eq(0_i64))).await.map(drop)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Makes sure that the lease has not changed hands, and keeps it from doing so until the
    /// transaction ends; whoever writes is alive, so this renews it too. It need not have
    /// lasted till now: nobody has wanted it meanwhile.
    ///
    /// To be called at the transaction's end, before [`Database::raise`]: what renews the lease
    /// beside it waits from here to the commit, and all who lock both lock them in this order.
    pub(super) async fn check(&self, call: &mut Call<'_>, now: Timestamp) -> Result<(), StoreError> {
        let ours = leases::table.find(self.name.clone()).filter(leases::token.eq(self.token));
        let until = now.plus(self.lasts).as_millis();
        let held = call.execute(diesel::update(ours).set(leases::until.eq(until))).await?;
        if held > 0 { Ok(()) } else { Err(StoreError::LeaseLost) }
    }

    /// Ends the lease with the transaction, if it has not changed hands.
    pub(super) async fn end(&self, call: &mut Call<'_>) -> Result<(), StoreError> {
        let ours = leases::table.find(self.name.clone()).filter(leases::holder.eq(self.holder.clone()));
        call.execute(diesel::update(ours).set(leases::until.eq(0_i64))).await.map(drop)
    }
}

impl Database {
    /// Takes a lease for so long, if nobody else has it; else tells who has. `by` is this
    /// process, for people.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn lease(&self, name: &str, by: &str, lasts: Duration) -> Result<Result<Lease, Holder>, StoreError> {
        // Asked first: who waits for a lease asks again and again, and writes nothing by it.
        if let Some(holder) = self.lease_holder(name).await? {
            return Ok(Err(holder));
        }
        self.take(name, by, lasts, false).await
    }

    /// The same for whoever has the lock of that name as well, or has not: with it, a lease
    /// whose holder had it is taken over before it ends.
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

    /// Who has a lease that has not ended.
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

    /// Makes a lease last anew from now on; `false` where it has changed hands.
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

    /// Makes a lease last anew from now on, and notes whether its holder has the lock too.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`] where it has changed hands.
    pub(super) async fn renew_lease(&self, lease: &Lease, locked: bool) -> Result<(), StoreError> {
        let write = || async {
            // Nobody waits for it, and on SQLite a transaction of this process may be long.
            let mut call = self.calls.write_within("renew_lease", self.calls.timeout * BACKGROUND_TIMEOUTS).await?;
            lease.check(&mut call, self.clock.database_now()).await?;
            call.execute(diesel::update(leases::table.find(&lease.name)).set(leases::locked.eq(locked))).await?;
            call.commit().await
        };
        self.calls.repeated(write).await
    }

    /// Ends a lease, if it has not changed hands: whoever waits for it need not wait longer.
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
