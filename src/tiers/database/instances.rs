//! The register of running instances: which there are, which master keys each holds, how far each
//! has followed the feed, and how long each may answer without following it.
//!
//! The interleavings that would make a command conclude too much, and what prevents each:
//! - *An instance has looked for changes after its last announcement, and answers for longer than
//!   the register tells.* It counts its time without the database from the beginning of the last
//!   announcement that was acknowledged, or of the last look, whichever is earlier
//!   (`attachment.rs`). The database notes the time while that announcement is in progress, so the
//!   time that a command computes from the register is never earlier.
//! - *Clocks differ.* Every time in the register is the database's own, and is compared with no
//!   other: on PostgreSQL the server's clock, on SQLite the machine's. Durations are measured by
//!   each machine's clock; [`Instance::may_answer_until`] adds the possible difference.
//! - *A row is deleted while its instance may still answer.* Rows stay at least until then.

use std::time::Duration;

use diesel::{
    ExpressionMethods as _, QueryDsl as _, Queryable,
    dsl::sql,
    sql_types::{BigInt, Bool},
};

use super::{Database, calls::Call, error::StoreError, schema::instances};
use crate::{clock::Timestamp, log, sealing::MasterKeyId};

/// A running instance, as it last announced itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Drawn at random when it started.
    pub id: String,
    /// Its host and process, for people.
    pub name: String,
    /// The master keys it holds; the first wraps.
    pub master_keys: Vec<MasterKeyId>,
    /// The last change that it has applied: see [`Database::changes`].
    pub changes: i64,
    /// When it announced itself, by the database's clock; by its own clock where it has no
    /// [`Self::max_detached`].
    pub seen_at: Timestamp,
    /// The program's version; `None` for a version that seals no rows.
    pub version: Option<String>,
    /// How long it answers after it has lost the database; `None` for a version that does not say.
    pub max_detached: Option<Duration>,
}

impl Instance {
    /// An instance announces itself several times in this period: one that has not is gone, or cut
    /// off from the database.
    pub const LIVES_FOR: Duration = Duration::from_secs(15);

    /// How far the clock may differ of an instance that notes the time by its own clock.
    const CLOCK_DIFFERENCE: Duration = Duration::from_secs(5 * 60);

    /// Whether it has announced itself lately; `now` is the database's clock. A time far in the
    /// future was written by a wrong clock and says nothing.
    #[must_use]
    pub fn is_live(&self, now: Timestamp) -> bool {
        let lives_for = if self.max_detached.is_some() { Self::LIVES_FOR } else { Self::CLOCK_DIFFERENCE };
        now.since(self.seen_at) <= lives_for && self.seen_at <= now.plus(Self::CLOCK_DIFFERENCE)
    }

    /// Until when it may answer without having followed a change, if it is not heard of again, by
    /// the database's clock. `None` where that is not known.
    ///
    /// Two seconds are added for an answer in progress, and a thousandth of the time for clocks
    /// that run at different speeds: quartz stays within a tenth of that.
    #[must_use]
    pub fn may_answer_until(&self) -> Option<Timestamp> {
        let detached = self.max_detached?;
        Some(self.seen_at.plus(detached).plus(detached / 1000).plus(Self::UNDER_WAY))
    }

    const UNDER_WAY: Duration = Duration::from_secs(2);
}

/// Which running instances have done something that each has to do.
#[derive(Debug, Clone, Default)]
pub struct Following {
    /// Live instances that have done it.
    pub done: Vec<Instance>,
    /// Live instances that have not done it.
    pub behind: Vec<Instance>,
    /// Instances that have neither done it nor withdrawn, and are not heard of any more: they were
    /// killed, are stopped, or run without the database, and may still answer. Instances that may
    /// no longer answer are left out.
    pub silent: Vec<Instance>,
}

impl Following {
    /// Whether no instance may still answer as if it had not been done.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.behind.is_empty() && self.silent.is_empty()
    }

    /// The instances that have not done it.
    #[must_use]
    pub fn unfollowed(self) -> Vec<Unfollowed> {
        let live = self.behind.into_iter().map(|instance| Unfollowed { instance, is_live: true });
        live.chain(self.silent.into_iter().map(|instance| Unfollowed { instance, is_live: false })).collect()
    }
}

/// A registered instance that has not done what a command waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfollowed {
    /// The instance, as it last announced itself.
    pub instance: Instance,
    /// Whether it has announced itself lately.
    pub is_live: bool,
}

#[derive(Queryable)]
struct Row {
    id: String,
    name: String,
    master_keys: String,
    changes: i64,
    seen_at: i64,
    version: Option<String>,
    max_detached: Option<i64>,
}

impl TryFrom<Row> for Instance {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let ids = row.master_keys.split_whitespace().map(str::parse).collect::<Result<_, _>>();
        let master_keys =
            ids.map_err(|_| StoreError::broken(format!("instance {}: the column master_keys cannot be read", row.id)))?;
        let seen_at = Timestamp::from_millis(row.seen_at);
        let max_detached = row.max_detached.map(|millis| Duration::from_millis(u64::try_from(millis).unwrap_or(0)));
        let Row { id, name, changes, version, .. } = row;
        Ok(Self { id, name, master_keys, changes, seen_at, version, max_detached })
    }
}

/// Rows of instances that were not heard of for this long are deleted, unless the instance may
/// still answer. Until then they show instances that ended unseen.
const KEPT_FOR: Duration = Duration::from_secs(60 * 60);

/// The same for instances that do not say how long they may answer. Earlier versions go by
/// `max_stale`, which is a day unless it was set.
const KEPT_UNTOLD_FOR: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The instances that are waited for are named after this time, and then again in this interval.
const TELL_AFTER: Duration = Duration::from_secs(1);
const TELL_EVERY: Duration = Duration::from_secs(10);

/// How often a command that waits for the instances reads the register.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

impl Database {
    /// Registers that an instance runs, holds the master keys that are held here, has applied these
    /// changes, and answers for at most so long after it has lost the database.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn announce(&self, id: &str, name: &str, changes: i64, max_detached: Duration) -> Result<(), StoreError> {
        let ids: Vec<String> = self.keys.ring().ids().map(|id| id.to_string()).collect();
        let (ids, now) = (ids.join(" "), self.time_in_sql());
        let mut call = self.calls.write("announce").await?;
        let announced = (
            instances::name.eq(name),
            instances::master_keys.eq(&ids),
            instances::changes.eq(changes),
            instances::seen_at.eq(sql::<BigInt>(&now)),
            instances::version.eq(env!("CARGO_PKG_VERSION")),
            instances::max_detached.eq(millis(max_detached)),
        );
        let upsert = diesel::insert_into(instances::table)
            .values((instances::id.eq(id), announced.clone()))
            .on_conflict(instances::id)
            .do_update()
            .set(announced);
        call.execute(upsert).await?;
        call.execute(diesel::delete(instances::table.filter(sql::<Bool>(&unheard_of(&now))))).await?;
        call.commit().await
    }

    /// Removes the registration of an instance that stops.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn withdraw(&self, id: &str) -> Result<(), StoreError> {
        let mut call = self.calls.write("withdraw").await?;
        call.execute(diesel::delete(instances::table.find(id))).await?;
        call.commit().await
    }

    /// The instances that run and reach the database, by name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn live_instances(&self) -> Result<Vec<Instance>, StoreError> {
        let (now, instances) = self.instances().await?;
        Ok(instances.into_iter().filter(|instance| instance.is_live(now)).collect())
    }

    /// Every instance in the register, by name, including those that have fallen silent, and the
    /// database's time.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn instances(&self) -> Result<(Timestamp, Vec<Instance>), StoreError> {
        let mut call = self.calls.read("instances").await?;
        // The time is read first: an announcement in between must not look older than it is.
        let now = call.first::<_, i64>(diesel::select(sql::<BigInt>(&self.time_in_sql()))).await?;
        let now = now.map(Timestamp::from_millis).ok_or_else(|| StoreError::broken("the database tells no time"))?;
        let instances = registered(&mut call).await?;
        call.done();
        Ok((now, instances))
    }

    /// Waits, at most this long, until each live instance has done what `has_done` looks for in its
    /// announcement, and returns the state then. An instance that withdraws or is no longer live is
    /// not waited for any longer. An instance that starts meanwhile is waited for too.
    ///
    /// # Errors
    /// The database did not answer when the time was up: the state is unknown.
    pub async fn await_instances(
        &self,
        within: Duration,
        has_done: impl Fn(&Instance) -> bool + Send + Sync,
    ) -> Result<Following, StoreError> {
        self.await_where(within, has_done, |following| following.behind.is_empty()).await
    }

    /// Waits, at most this long, until no registered instance may still answer as if this had not
    /// been done: each has done it, has withdrawn, or has been without the database for longer than
    /// it answers then. If that takes long, `told` is called now and then with the names of the
    /// instances that are waited for.
    ///
    /// # Errors
    /// The database did not answer when the time was up: the state is unknown.
    pub async fn await_all_instances(
        &self,
        within: Duration,
        has_done: impl Fn(&Instance) -> bool + Send + Sync,
        mut told: impl FnMut(Vec<String>) + Send,
    ) -> Result<Following, StoreError> {
        let mut tell_at = tokio::time::Instant::now() + TELL_AFTER;
        let is_over = |following: &Following| {
            let now = tokio::time::Instant::now();
            if now >= tell_at && !following.is_complete() {
                tell_at = now + TELL_EVERY;
                let names = following.behind.iter().chain(&following.silent).map(|instance| instance.name.clone());
                told(names.collect());
            }
            following.is_complete()
        };
        self.await_where(within, has_done, is_over).await
    }

    async fn await_where(
        &self,
        within: Duration,
        has_done: impl Fn(&Instance) -> bool + Send + Sync,
        mut is_over: impl FnMut(&Following) -> bool + Send,
    ) -> Result<Following, StoreError> {
        let deadline = tokio::time::Instant::now() + within;
        loop {
            let following = self.instances().await.map(|(now, instances)| stand(instances, now, &has_done));
            match following {
                Ok(following) if is_over(&following) => return Ok(following),
                following if tokio::time::Instant::now() >= deadline => return following,
                _ => tokio::time::sleep(POLL_INTERVAL).await,
            }
        }
    }

    /// Whether an instance has ended without withdrawing from the register, or is cut off from the
    /// database: it may know of changes and denials that the database was not told of.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn has_unclean_ends(&self) -> Result<bool, StoreError> {
        let (now, instances) = self.instances().await?;
        let is_lost =
            |instance: &Instance| !instance.is_live(now) || log::has_ended(&instance.name, now.since(instance.seen_at));
        Ok(instances.iter().any(is_lost))
    }

    /// Removes an instance that certainly no longer runs from the register, by its name. Returns
    /// the number of instances of that name; live ones are left.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget_instance(&self, name: &str) -> Result<usize, StoreError> {
        let mut call = self.calls.write("forget_instance").await?;
        let lately = format!("seen_at < {} - {}", self.time_in_sql(), millis(Instance::LIVES_FOR));
        let silent = instances::table.filter(instances::name.eq(name)).filter(sql::<Bool>(&lately));
        let forgotten = call.execute(diesel::delete(silent)).await?;
        call.commit().await?;
        Ok(forgotten)
    }

    /// The database's clock, in milliseconds since 1970, as an SQL expression. SQLite uses the
    /// machine's clock.
    fn time_in_sql(&self) -> String {
        match self.calls.pool.is_for_many() {
            true => "(extract(epoch FROM clock_timestamp()) * 1000)::bigint".to_owned(),
            false => self.clock.database_now().as_millis().to_string(),
        }
    }
}

/// Whether a row belongs to an instance that was not heard of for long, and can no longer answer.
fn unheard_of(now: &str) -> String {
    // As in `Instance::may_answer_until`. An instance that does not say how long it answers has
    // noted the time by its own clock: a time that is as far ahead would keep the row until it has
    // come.
    format!(
        "(max_detached IS NOT NULL AND seen_at < {now} - {kept} \
          AND seen_at + max_detached + max_detached / 1000 + {under_way} < {now}) \
         OR (max_detached IS NULL AND (seen_at < {now} - {untold} OR seen_at > {now} + {kept}))",
        kept = millis(KEPT_FOR),
        under_way = millis(Instance::UNDER_WAY),
        untold = millis(KEPT_UNTOLD_FOR),
    )
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Every instance in the register, by name, including those that have fallen silent.
pub(super) async fn registered(call: &mut Call<'_>) -> Result<Vec<Instance>, StoreError> {
    let rows: Vec<Row> = call.load(instances::table.order((instances::name.asc(), instances::id.asc()))).await?;
    rows.into_iter().map(Instance::try_from).collect()
}

fn stand(instances: Vec<Instance>, now: Timestamp, has_done: impl Fn(&Instance) -> bool) -> Following {
    let mut following = Following::default();
    for instance in instances {
        let is_over = instance.may_answer_until().is_some_and(|until| until < now);
        let place = match (has_done(&instance), instance.is_live(now)) {
            (true, true) => &mut following.done,
            // It did it before it fell silent, or no longer answers: nothing is left to do there.
            (true, false) => continue,
            (false, _) if is_over => continue,
            (false, true) => &mut following.behind,
            (false, false) => &mut following.silent,
        };
        place.push(instance);
    }
    following
}
