//! The register of running instances: which there are, which master keys each holds, and
//! how far each has followed the changes.

use std::time::Duration;

use diesel::{BoolExpressionMethods as _, ExpressionMethods as _, QueryDsl as _, Queryable};

use super::{Database, calls::Call, error::StoreError, schema::instances};
use crate::{clock::Timestamp, sealing::MasterKeyId};

/// A running instance, as it last announced itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Drawn at random when it started.
    pub id: String,
    /// Its host and process, for people.
    pub name: String,
    /// The master keys it holds; the first wraps.
    pub master_keys: Vec<MasterKeyId>,
    /// The changes that it has brought into force: see [`Database::changes`].
    pub changes: i64,
    /// When it announced itself, by the database's clock.
    pub seen_at: Timestamp,
    /// The program's version; nothing of one that seals no rows.
    pub version: Option<String>,
}

impl Instance {
    /// An instance announces itself several times in this long: one that has not is gone,
    /// or cut off from the database.
    pub const LIVES_FOR: Duration = Duration::from_secs(15);

    /// Whether it has announced itself lately. A time that lies far ahead was written by
    /// a clock that goes wrong and tells nothing.
    #[must_use]
    pub fn is_live(&self, now: Timestamp) -> bool {
        const SKEW: Duration = Duration::from_secs(60);
        now.since(self.seen_at) <= Self::LIVES_FOR && self.seen_at <= now.plus(SKEW)
    }
}

/// How the running instances stand to something that each has to do.
#[derive(Debug, Clone, Default)]
pub struct Following {
    /// Are live and have done it.
    pub done: Vec<Instance>,
    /// Are live and have not done it.
    pub behind: Vec<Instance>,
    /// Have neither done it nor withdrawn, and are not heard of any more: they were
    /// killed, or still run without the database.
    pub silent: Vec<Instance>,
}

#[derive(Queryable)]
struct Row {
    id: String,
    name: String,
    master_keys: String,
    changes: i64,
    seen_at: i64,
    version: Option<String>,
}

impl TryFrom<Row> for Instance {
    type Error = StoreError;

    fn try_from(row: Row) -> Result<Self, StoreError> {
        let ids = row.master_keys.split_whitespace().map(str::parse).collect::<Result<_, _>>();
        let master_keys =
            ids.map_err(|_| StoreError::broken(format!("instance {}: the column master_keys cannot be read", row.id)))?;
        let seen_at = Timestamp::from_millis(row.seen_at);
        Ok(Self { id: row.id, name: row.name, master_keys, changes: row.changes, seen_at, version: row.version })
    }
}

/// Rows of instances that were not heard of for this long go. Until then they tell whose
/// end nobody has seen.
const KEPT_FOR: Duration = Duration::from_secs(60 * 60);

/// How often the register is looked at by who waits for the instances.
const LOOK_EVERY: Duration = Duration::from_millis(100);

impl Database {
    /// Says that an instance runs, holds the master keys that are held here, and has
    /// brought these changes into force.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn announce(&self, id: &str, name: &str, changes: i64) -> Result<(), StoreError> {
        let ids: Vec<String> = self.keys.ring().ids().map(|id| id.to_string()).collect();
        let (ids, now) = (ids.join(" "), self.clock.database_now());
        let mut call = self.calls.write("announce").await?;
        let announced = (
            instances::name.eq(name),
            instances::master_keys.eq(&ids),
            instances::changes.eq(changes),
            instances::seen_at.eq(now.as_millis()),
            instances::version.eq(env!("CARGO_PKG_VERSION")),
        );
        let upsert = diesel::insert_into(instances::table)
            .values((instances::id.eq(id), announced))
            .on_conflict(instances::id)
            .do_update()
            .set(announced);
        call.execute(upsert).await?;
        // A time as far ahead would otherwise stay until it has come.
        let long = i64::try_from(KEPT_FOR.as_millis()).unwrap_or(i64::MAX);
        let unseen = instances::seen_at.lt(now.as_millis() - long).or(instances::seen_at.gt(now.as_millis() + long));
        call.execute(diesel::delete(instances::table.filter(unseen))).await?;
        call.commit().await
    }

    /// Says that an instance runs no more.
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
        let now = self.clock.database_now();
        Ok(self.instances().await?.into_iter().filter(|instance| instance.is_live(now)).collect())
    }

    /// Waits, at most this long, until each live instance has done what `has_done` looks
    /// for in its announcement, and tells how they stand then. Whoever withdraws or is not
    /// live any more is waited for no longer. An instance that starts meanwhile is waited
    /// for too.
    ///
    /// # Errors
    /// The database did not answer when the time was up: nothing is known.
    pub async fn await_instances(
        &self,
        within: Duration,
        has_done: impl Fn(&Instance) -> bool + Send + Sync,
    ) -> Result<Following, StoreError> {
        let deadline = tokio::time::Instant::now() + within;
        loop {
            let following =
                self.instances().await.map(|instances| stand(instances, self.clock.database_now(), &has_done));
            match following {
                Ok(following) if following.behind.is_empty() => return Ok(following),
                following if tokio::time::Instant::now() >= deadline => return following,
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    async fn instances(&self) -> Result<Vec<Instance>, StoreError> {
        let mut call = self.calls.read("instances").await?;
        let instances = registered(&mut call).await?;
        call.done();
        Ok(instances)
    }
}

/// Every instance in the register, by name: those too that have fallen silent.
pub(super) async fn registered(call: &mut Call<'_>) -> Result<Vec<Instance>, StoreError> {
    let rows: Vec<Row> = call.load(instances::table.order((instances::name.asc(), instances::id.asc()))).await?;
    rows.into_iter().map(Instance::try_from).collect()
}

fn stand(instances: Vec<Instance>, now: Timestamp, has_done: impl Fn(&Instance) -> bool) -> Following {
    let mut following = Following::default();
    for instance in instances {
        let place = match (instance.is_live(now), has_done(&instance)) {
            (true, true) => &mut following.done,
            (true, false) => &mut following.behind,
            (false, false) => &mut following.silent,
            // It did it before it fell silent: nothing is left to do there.
            (false, true) => continue,
        };
        place.push(instance);
    }
    following
}
