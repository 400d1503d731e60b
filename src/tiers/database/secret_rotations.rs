//! Rotations of secrets: their state, and the two values that each holds while it runs.
//!
//! The secret's value itself is with its owner, and changes there as by any other write. This table has
//! what the owner does not keep: the value that comes, before it is served, and the value that goes,
//! for as long as it is valid. Both are sealed with the tenant's data key, bound to company, key,
//! rotation, and which of the two it is; the value that goes also to its end, so that nobody without
//! the data key prolongs it.
//!
//! The interleavings that would do harm, and what prevents each:
//! - *Two processes work on one rotation, or a person acts while one does.* Each change of a row names
//!   the turn that it has read, and raises it: one of the two changes the row, and the other does
//!   nothing more.
//! - *A process that was stopped goes on after another has taken over.* What it writes carries its
//!   lease, whose fencing token is compared in the same transaction.
//! - *Two rotations of one secret begin at once.* The tenant's row is locked, and an index allows one.
//! - *A secret is shredded meanwhile.* The rows go in the shredding's transaction; under the tenant's
//!   new id there is no row to change.

use std::time::Duration;

use diesel::{
    BoolExpressionMethods as _, ExpressionMethods as _, IntoSql as _, JoinOnDsl as _, NullableExpressionMethods as _,
    QueryDsl as _, Queryable, sql_types::Bool,
};
use serde::{Deserialize, Serialize};

use super::{
    Database, Lease,
    calls::{Call, OfStore},
    changes::Change,
    companies::{self, Company, Purpose},
    data_keys::Chain,
    error::StoreError,
    new_id,
    rows::ROWS,
    schema::{companies as company_table, rotation_due, secret_rotations},
};
use crate::{
    clock::Timestamp,
    sealing::{DataKey, OpenError, SealError, StagedPlace, staged_key_version},
    secret::{SecretKey, SecretValue, Version},
    tenant::Tenant,
};

/// Who makes the new value valid, and the old one invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotationKind {
    /// Nobody beside us: whoever checks the value asks us which are valid.
    Value,
    /// A rotator that is reached over HTTP.
    Webhook,
    /// A person.
    Assisted,
}

/// How a rotation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotationState {
    /// It goes on.
    Running,
    /// The new value has taken over, and the old one is not valid any more.
    Completed,
    /// It has stopped, and a person decides.
    Failed,
    /// A person has stopped it before the new value was served.
    Aborted,
    /// A person has brought the old value back.
    RolledBack,
}

/// The steps of a rotation, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RotationStep {
    /// The new value is made.
    Create,
    /// The new value becomes valid at its provider.
    Set,
    /// It is tried, and every instance hears of it.
    Test,
    /// The new value becomes the secret's.
    Promote,
    /// The old value is still valid, and instances follow.
    Wait,
    /// The old value ends.
    Revoke,
}

/// The words of an enumeration in the table.
macro_rules! words {
    ($type:ty { $($variant:ident = $word:literal),+ $(,)? }) => {
        impl $type {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word in the table and in answers.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// The one of that word.
            #[must_use]
            pub fn of(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| known.as_str() == word)
            }
        }
    };
}

words!(RotationKind { Value = "value", Webhook = "webhook", Assisted = "assisted" });
words!(RotationState {
    Running = "running",
    Completed = "completed",
    Failed = "failed",
    Aborted = "aborted",
    RolledBack = "rolled_back",
});
words!(RotationStep { Create = "create", Set = "set", Test = "test", Promote = "promote", Wait = "wait", Revoke = "revoke" });

/// What is told of a rotation, and nothing is looked for by.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RotationDetail {
    /// How often the step has failed.
    pub tries: u32,
    /// How long the old value stays valid, in milliseconds.
    pub grace: u64,
    /// Who began it: a token's name, or `schedule`.
    pub by: String,
    /// Why, in the words of whoever began it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why the step failed last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<RotationFault>,
    /// What it waits for, in a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<String>,
    /// Whether the new value takes over before every instance has heard of it.
    pub forced: bool,
    /// How often a value was made anew, because the provider wants another form.
    #[serde(skip_serializing_if = "is_zero")]
    pub made_anew: u32,
    /// Whether a value may be valid at its provider that nobody serves, or that nobody has revoked.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub orphaned: bool,
    /// The version that the new value got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_version: Option<i64>,
    /// When the row was last changed, in milliseconds since 1970.
    pub changed_at: i64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Why a step failed: a word for programs and a sentence for people. It contains no value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationFault {
    /// The word.
    pub code: String,
    /// The sentence.
    pub text: String,
}

/// A rotation, without its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    /// Its id.
    pub id: String,
    /// The tenant.
    pub tenant: Tenant,
    /// The secret.
    pub key: SecretKey,
    /// Who makes values valid and invalid.
    pub kind: RotationKind,
    /// How it stands.
    pub state: RotationState,
    /// The step that has begun.
    pub step: RotationStep,
    /// Counts the changes of the row.
    turn: i64,
    /// When it is to be worked on; `None` where a person must act first, or where it has ended.
    pub next_try_at: Option<Timestamp>,
    /// The version of the value that is replaced.
    pub old_version: Option<Version>,
    /// Until when the old value is valid, once the new one is served.
    pub valid_until: Option<Timestamp>,
    /// The last change that told of it.
    pub told_by: i64,
    /// When it began.
    pub created_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// The rest.
    pub detail: RotationDetail,
}

impl Rotation {
    /// Whether a value may be left at its provider that nobody serves, if it ends where it is.
    #[must_use]
    pub fn may_leave_an_orphan(&self) -> bool {
        match self.kind {
            RotationKind::Value => false,
            RotationKind::Webhook => true,
            RotationKind::Assisted => self.step > RotationStep::Create,
        }
    }

    /// How long the old value stays valid.
    #[must_use]
    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.detail.grace)
    }
}

/// The values of a rotation that runs.
#[derive(Debug, Clone, Default)]
pub struct RotationValues {
    /// The value that goes.
    pub old: Option<SecretValue>,
    /// The value that comes, once it is made.
    pub new: Option<SecretValue>,
}

impl RotationValues {
    /// Whether both are there and the same.
    #[must_use]
    pub fn are_same(&self) -> bool {
        self.old.as_ref().zip(self.new.as_ref()).is_some_and(|(old, new)| old.same_as(new))
    }
}

/// A rotation to begin.
#[derive(Debug, Clone)]
pub struct NewRotation {
    /// Who makes values valid and invalid.
    pub kind: RotationKind,
    /// The secret's value now, and the value to come, where it is known.
    pub values: RotationValues,
    /// The version of the value now.
    pub old_version: Version,
    /// How long the old value stays valid.
    pub grace: Duration,
    /// Who begins it.
    pub by: String,
    /// Why.
    pub reason: Option<String>,
}

/// What becomes of a rotation's values when its row is changed.
#[derive(Debug, Clone, Copy)]
pub enum KeptValues<'v> {
    /// They stay as they are. The end of the old value must not change then: it is sealed with it.
    AsTheyAre,
    /// These take their place.
    Replaced(&'v RotationValues),
    /// They are removed.
    Removed,
}

/// Why the row of a rotation was not changed.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// Somebody else has changed it since it was read, or it is gone.
    #[error("somebody else has gone on with this rotation")]
    Moved,
    /// One of its values does not open.
    #[error("a value of the rotation does not open")]
    Unreadable(#[source] OpenError),
    /// The database failed, or the lease is lost.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Which rotations are asked for.
#[derive(Debug, Clone, Default)]
pub struct RotationFilter {
    /// Those in this state.
    pub state: Option<RotationState>,
    /// Those behind this id, which is the last of the page before.
    pub after: Option<String>,
}

#[derive(Queryable)]
struct Row {
    id: String,
    #[expect(dead_code, reason = "a row is read with all its columns")]
    company: String,
    key: String,
    kind: String,
    state: String,
    step: String,
    turn: i64,
    next_try_at: Option<i64>,
    old_version: Option<i64>,
    old: Option<String>,
    new: Option<String>,
    valid_until: Option<i64>,
    told_by: Option<i64>,
    created_at: i64,
    ended_at: Option<i64>,
    detail: String,
}

impl Row {
    fn rotation(&self, tenant: Tenant) -> Result<Rotation, StoreError> {
        let wrong = |column| StoreError::broken(format!("rotation {}: the column {column} cannot be read", self.id));
        Ok(Rotation {
            id: self.id.clone(),
            tenant,
            key: self.key.parse().map_err(|_| wrong("secret_key"))?,
            kind: RotationKind::of(&self.kind).ok_or_else(|| wrong("kind"))?,
            state: RotationState::of(&self.state).ok_or_else(|| wrong("state"))?,
            step: RotationStep::of(&self.step).ok_or_else(|| wrong("step"))?,
            turn: self.turn,
            next_try_at: self.next_try_at.map(Timestamp::from_millis),
            old_version: self.old_version.and_then(Version::new),
            valid_until: self.valid_until.map(Timestamp::from_millis),
            told_by: self.told_by.unwrap_or(0),
            created_at: Timestamp::from_millis(self.created_at),
            ended_at: self.ended_at.map(Timestamp::from_millis),
            detail: serde_json::from_str(&self.detail).map_err(|_| wrong("detail"))?,
        })
    }

    fn place<'p>(&'p self, company: &'p Company, key: &'p SecretKey, is_new: bool) -> StagedPlace<'p> {
        let valid_until = if is_new { 0 } else { self.valid_until.unwrap_or(0) };
        StagedPlace { company_id: &company.id, key, rotation: &self.id, is_new, valid_until }
    }

    fn values(&self, company: &Company, chain: &Chain) -> Result<RotationValues, OpenError> {
        let key: SecretKey = self.key.parse().map_err(|_| OpenError::Malformed)?;
        let open = |sealed: &Option<String>, is_new| {
            let Some(sealed) = sealed else { return Ok(None) };
            let number = staged_key_version(sealed)?;
            let data_key =
                chain.get(&number).ok_or(OpenError::UnknownDataKey(number))?.as_ref().map_err(|error| *error)?;
            data_key.open_staged(sealed, self.place(company, &key, is_new)).map(Some)
        };
        Ok(RotationValues { old: open(&self.old, false)?, new: open(&self.new, true)? })
    }
}

/// Both values, sealed for their places.
struct SealedValues {
    old: Option<String>,
    new: Option<String>,
}

impl SealedValues {
    fn of(
        values: &RotationValues,
        data_key: &DataKey,
        company: &Company,
        key: &SecretKey,
        rotation: &str,
        valid_until: i64,
    ) -> Result<Self, SealError> {
        let seal = |value: &Option<SecretValue>, is_new| {
            let valid_until = if is_new { 0 } else { valid_until };
            let place = StagedPlace { company_id: &company.id, key, rotation, is_new, valid_until };
            value.as_ref().map(|value| data_key.seal_staged(value, place)).transpose()
        };
        Ok(Self { old: seal(&values.old, false)?, new: seal(&values.new, true)? })
    }
}

/// The most rotations of one page.
const PAGE: i64 = 500;

impl Database {
    /// Begins a rotation, and tells the instances of it; `Err` has the one that runs already.
    ///
    /// # Errors
    /// [`StoreError`]; then none has begun.
    pub async fn begin_rotation(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        new: &NewRotation,
    ) -> Result<Result<Rotation, Rotation>, StoreError> {
        self.calls.repeated(|| self.begin_rotation_once(tenant, key, new)).await
    }

    async fn begin_rotation_once(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        new: &NewRotation,
    ) -> Result<Result<Rotation, Rotation>, StoreError> {
        let now = self.clock.database_now();
        let mut call = self.calls.write("begin_rotation").await?;
        let (company, _) = companies::lock(&mut call, tenant, now, Purpose::Look).await?;
        if let Some(running) = running(&mut call, &company.id, key).await? {
            call.roll_back().await?;
            return running.rotation(tenant.clone()).map(Err);
        }
        let chain = self.chain(&mut call, &company).await?;
        let data_key = self.sealing_key(&mut call, &company, &chain, 2).await?;
        let id = new_id();
        let sealed = SealedValues::of(&new.values, &data_key, &company, key, &id, 0)?;
        let detail = RotationDetail {
            grace: u64::try_from(new.grace.as_millis()).unwrap_or(u64::MAX),
            by: new.by.clone(),
            reason: new.reason.clone(),
            changed_at: now.as_millis(),
            ..RotationDetail::default()
        };
        let insert = diesel::insert_into(secret_rotations::table).values((
            secret_rotations::id.eq(&id),
            secret_rotations::company_id.eq(&company.id),
            secret_rotations::secret_key.eq(key.as_str()),
            secret_rotations::kind.eq(new.kind.as_str()),
            secret_rotations::state.eq(RotationState::Running.as_str()),
            secret_rotations::step.eq(RotationStep::Create.as_str()),
            secret_rotations::turn.eq(0_i64),
            secret_rotations::next_try_at.eq(now.as_millis()),
            secret_rotations::old_version.eq(new.old_version.number()),
            secret_rotations::old_value.eq(sealed.old),
            secret_rotations::new_value.eq(sealed.new),
            secret_rotations::created_at.eq(now.as_millis()),
            secret_rotations::detail.eq(written(&detail)?),
        ));
        call.execute(insert).await?;
        let told_by = self.raise(&mut call, Change::Secret(tenant.clone(), key.clone())).await?;
        note_told(&mut call, &id, told_by).await?;
        let row: Option<Row> = call.first(secret_rotations::table.find(id)).await?;
        call.commit().await?;
        row.ok_or_else(|| StoreError::broken("a rotation that was begun is gone"))?.rotation(tenant.clone()).map(Ok)
    }

    /// The rotation of a secret that runs, else the last one; `None` where there was none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn last_rotation(&self, tenant: &Tenant, key: &SecretKey) -> Result<Option<Rotation>, StoreError> {
        let mut call = self.calls.read("last_rotation").await?;
        let row = secret_rotations::table
            .inner_join(company_table::table.on(company_table::id.eq(secret_rotations::company_id)))
            .filter(company_table::subdomain.eq(tenant.as_str().to_owned()))
            .filter(secret_rotations::secret_key.eq(key.as_str().to_owned()))
            .order((secret_rotations::created_at.desc(), secret_rotations::id.desc()))
            .limit(1)
            .select(secret_rotations::all_columns);
        let row: Option<Row> = call.first(row).await?;
        call.done();
        row.map(|row| row.rotation(tenant.clone())).transpose()
    }

    /// The rotation of a secret that runs, with its values.
    ///
    /// # Errors
    /// [`RotationError`].
    pub async fn running_rotation(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
    ) -> Result<Option<(Rotation, RotationValues)>, RotationError> {
        match self.running_rotation_once(tenant, key).await {
            // The values were sealed anew between the read of the row and that of its data key.
            Err(RotationError::Unreadable(OpenError::UnknownDataKey(_))) => {
                self.running_rotation_once(tenant, key).await
            }
            found => found,
        }
    }

    async fn running_rotation_once(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
    ) -> Result<Option<(Rotation, RotationValues)>, RotationError> {
        let mut call = self.calls.read("running_rotation").await?;
        let on = secret_rotations::company_id
            .eq(company_table::id)
            .and(secret_rotations::secret_key.eq(key.as_str().to_owned()))
            .and(secret_rotations::ended_at.is_null());
        let found = company_table::table
            .left_join(secret_rotations::table.on(on))
            .filter(company_table::subdomain.eq(tenant.as_str().to_owned()))
            .select((companies::COLUMNS, secret_rotations::all_columns.nullable()));
        let found: Option<(companies::CompanyRow, Option<Row>)> = call.first_at_once(found).await?;
        let Some((company, Some(row))) = found else {
            call.done();
            return Ok(None);
        };
        let company = Company::try_from(company)?;
        let chain = self.chain(&mut call, &company).await?;
        call.done();
        let values = row.values(&company, &chain).map_err(RotationError::Unreadable)?;
        Ok(Some((row.rotation(tenant.clone())?, values)))
    }

    /// Changes the row of a rotation that was read before, and returns it as it is then. `lease` is
    /// that of the process which works on it; `tells` whether instances must hear of the change.
    ///
    /// # Errors
    /// [`RotationError`]; then nothing has changed.
    pub async fn change_rotation(
        &self,
        rotation: &Rotation,
        values: KeptValues<'_>,
        lease: Option<&Lease>,
        tells: bool,
    ) -> Result<Rotation, RotationError> {
        self.calls.repeated(|| self.change_rotation_once(rotation, values, lease, tells)).await
    }

    async fn change_rotation_once(
        &self,
        rotation: &Rotation,
        values: KeptValues<'_>,
        lease: Option<&Lease>,
        tells: bool,
    ) -> Result<Rotation, RotationError> {
        let now = self.clock.database_now();
        let mut call = self.calls.write("change_rotation").await?;
        // Locked, as for every change of what is stored of the tenant: rows are locked in one order.
        let (company, made) = companies::lock(&mut call, &rotation.tenant, now, Purpose::Look).await?;
        let same = secret_rotations::table
            .find(rotation.id.clone())
            .filter(secret_rotations::company_id.eq(company.id.clone()))
            .filter(secret_rotations::turn.eq(rotation.turn));
        let detail = RotationDetail { changed_at: now.as_millis(), ..rotation.detail.clone() };
        let change = diesel::update(same).set((
            secret_rotations::state.eq(rotation.state.as_str()),
            secret_rotations::step.eq(rotation.step.as_str()),
            secret_rotations::turn.eq(rotation.turn + 1),
            secret_rotations::next_try_at.eq(rotation.next_try_at.map(Timestamp::as_millis)),
            secret_rotations::valid_until.eq(rotation.valid_until.map(Timestamp::as_millis)),
            secret_rotations::detail.eq(written(&detail)?),
        ));
        if made || call.execute(change).await? == 0 {
            call.roll_back().await?;
            return Err(RotationError::Moved);
        }
        let sealed = match values {
            KeptValues::AsTheyAre => None,
            KeptValues::Removed => Some(SealedValues { old: None, new: None }),
            KeptValues::Replaced(values) => {
                let chain = self.chain(&mut call, &company).await?;
                let data_key = self.sealing_key(&mut call, &company, &chain, 2).await?;
                let valid_until = rotation.valid_until.map_or(0, Timestamp::as_millis);
                let sealed = SealedValues::of(values, &data_key, &company, &rotation.key, &rotation.id, valid_until);
                Some(sealed.map_err(StoreError::from)?)
            }
        };
        let row = secret_rotations::table.find(rotation.id.clone());
        if let Some(sealed) = sealed {
            let kept = (
                secret_rotations::old_value.eq(sealed.old),
                secret_rotations::new_value.eq(sealed.new),
                secret_rotations::ended_at.eq(rotation.ended_at.map(Timestamp::as_millis)),
            );
            call.execute(diesel::update(row.clone()).set(kept)).await?;
        }
        if let Some(lease) = lease {
            lease.check(&mut call, now).await?;
        }
        if tells {
            let told_by = self.raise(&mut call, Change::Secret(rotation.tenant.clone(), rotation.key.clone())).await?;
            note_told(&mut call, &rotation.id, told_by).await?;
        }
        let row: Option<Row> = call.first(row).await?;
        call.commit().await?;
        let row = row.ok_or_else(|| StoreError::broken("a rotation that was changed is gone"))?;
        Ok(row.rotation(rotation.tenant.clone())?)
    }

    /// The rotations that are to be worked on, those that have waited longest first. Rotations of a
    /// kind, or in a step, that a later version of this program has made are left to that.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rotations_to_do(&self, most: usize) -> Result<Vec<Rotation>, StoreError> {
        let now = self.clock.database_now();
        let mut call = self.calls.read("rotations_to_do").await?;
        let due = secret_rotations::table
            .inner_join(company_table::table.on(company_table::id.eq(secret_rotations::company_id)))
            .filter(secret_rotations::next_try_at.le(now.as_millis()))
            .filter(secret_rotations::state.eq(RotationState::Running.as_str()))
            .order((secret_rotations::next_try_at.asc(), secret_rotations::id.asc()))
            .limit(i64::try_from(most).unwrap_or(i64::MAX))
            .select((company_table::subdomain, secret_rotations::all_columns));
        let rows: Vec<(String, Row)> = call.load(due).await?;
        call.done();
        Ok(rows.into_iter().filter_map(|(tenant, row)| row.rotation(tenant.parse().ok()?).ok()).collect())
    }

    /// Whether a rotation has revoked a version of a secret, or is about to.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn is_revoked(&self, tenant: &Tenant, key: &SecretKey, number: Version) -> Result<bool, StoreError> {
        let mut call = self.calls.read("is_revoked").await?;
        let revoked = match companies::find(&mut call, tenant).await? {
            Some(company) => is_revoked(&mut call, &company.id, key, number).await?,
            None => false,
        };
        call.done();
        Ok(revoked)
    }

    /// A page of rotations in the order of their ids, which is that of their beginnings, and the id
    /// behind which the next page begins.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rotations(&self, filter: &RotationFilter) -> Result<(Vec<Rotation>, Option<String>), StoreError> {
        let mut call = self.calls.read("rotations").await?;
        let of_any_state = filter.state.is_none().into_sql::<Bool>();
        let state = filter.state.map_or("", RotationState::as_str);
        let page = secret_rotations::table
            .inner_join(company_table::table.on(company_table::id.eq(secret_rotations::company_id)))
            .filter(secret_rotations::id.gt(filter.after.clone().unwrap_or_default()))
            .filter(secret_rotations::state.eq(state).or(of_any_state))
            .order(secret_rotations::id.asc())
            .limit(PAGE)
            .select((company_table::subdomain, secret_rotations::all_columns));
        let rows: Vec<(String, Row)> = call.load(page).await?;
        call.done();
        let is_last = rows.len() < usize::try_from(PAGE).unwrap_or(usize::MAX);
        let next = rows.last().filter(|_| !is_last).map(|(_, row)| row.id.clone());
        let rotations = rows.into_iter().map(|(tenant, row)| {
            let wrong = |_| StoreError::broken("a company's subdomain cannot be read");
            row.rotation(tenant.parse().map_err(wrong)?)
        });
        Ok((rotations.collect::<Result<_, _>>()?, next))
    }

    /// Seals the values of a tenant's rotations with this data key; returns how many it seals now, and
    /// how many did not open. The tenant is locked.
    pub(super) async fn reseal_rotations(
        &self,
        call: &mut Call<'_>,
        company: &Company,
        chain: &Chain,
        data_key: &DataKey,
    ) -> Result<(usize, usize), StoreError> {
        let (mut done, mut failed) = (0, 0);
        let rows = secret_rotations::table
            .filter(secret_rotations::company_id.eq(company.id.clone()))
            .filter(secret_rotations::ended_at.is_null());
        let rows: Vec<Row> = call.load(rows).await?;
        for row in rows {
            let numbers = [&row.old, &row.new].into_iter().flatten().map(|sealed| staged_key_version(sealed));
            if numbers.into_iter().all(|number| number == Ok(data_key.version())) {
                continue;
            }
            let Ok(values) = row.values(company, chain) else {
                failed += 1;
                continue;
            };
            if !self.count_sealings(call, company, data_key.version(), 2).await? {
                return Err(StoreError::broken("a new data key has sealed enough already"));
            }
            let key: SecretKey = row.key.parse().map_err(|_| StoreError::broken("a rotation's key cannot be read"))?;
            let sealed = SealedValues::of(&values, data_key, company, &key, &row.id, row.valid_until.unwrap_or(0))?;
            done += [&sealed.old, &sealed.new].into_iter().flatten().count();
            let kept = (secret_rotations::old_value.eq(sealed.old), secret_rotations::new_value.eq(sealed.new));
            call.execute(diesel::update(secret_rotations::table.find(row.id)).set(kept)).await?;
        }
        Ok((done, failed))
    }

    /// Removes rotations that have ended longer ago than older versions of secrets are kept; `false`
    /// where there is none left.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn sweep_rotations(&self) -> Result<bool, StoreError> {
        let cutoff = self.retention.cutoff(self.clock.now()).as_millis();
        let mut call = self.calls.read("find_worn_rotations").await?;
        let worn = secret_rotations::table.filter(secret_rotations::ended_at.le(cutoff)).limit(ROWS as i64);
        let worn: Vec<String> = call.load(worn.select(secret_rotations::id)).await?;
        call.done();
        if worn.is_empty() {
            return Ok(false);
        }
        let mut call = self.calls.write("sweep_rotations").await?;
        call.execute(diesel::delete(secret_rotations::table.filter(secret_rotations::id.eq_any(worn)))).await?;
        call.commit().await?;
        Ok(true)
    }
}

/// The rotation of a secret that runs.
async fn running(call: &mut Call<'_>, company: &str, key: &SecretKey) -> Result<Option<Row>, StoreError> {
    let running = secret_rotations::table
        .filter(secret_rotations::company_id.eq(company))
        .filter(secret_rotations::secret_key.eq(key.as_str()))
        .filter(secret_rotations::ended_at.is_null());
    call.first(running).await
}

/// Whether a rotation has revoked a version of a secret, or is about to.
pub(super) async fn is_revoked(
    call: &mut Call<'_>,
    company: &str,
    key: &SecretKey,
    number: Version,
) -> Result<bool, StoreError> {
    let revoking = secret_rotations::table
        .filter(secret_rotations::company_id.eq(company.to_owned()))
        .filter(secret_rotations::secret_key.eq(key.as_str().to_owned()))
        .filter(secret_rotations::old_version.eq(number.number()))
        .filter(secret_rotations::step.eq(RotationStep::Revoke.as_str()))
        .limit(1)
        .select(secret_rotations::id);
    Ok(call.first::<_, String>(revoking).await?.is_some())
}

/// Removes every rotation of a company.
pub(super) async fn remove_all(call: &mut Call<'_>, company: &str) -> Result<(), StoreError> {
    let rows = secret_rotations::table.filter(secret_rotations::company_id.eq(company.to_owned()));
    call.execute(diesel::delete(rows)).await?;
    let due = rotation_due::table.filter(rotation_due::company_id.eq(company.to_owned()));
    call.execute(diesel::delete(due)).await.map(drop)
}

/// The numbers of the data keys that seal values of a company's rotations.
pub(super) async fn key_numbers(call: &mut Call<'_>, company: &str) -> Result<Vec<i64>, StoreError> {
    let rows = secret_rotations::table
        .filter(secret_rotations::company_id.eq(company.to_owned()))
        .filter(secret_rotations::ended_at.is_null())
        .select((secret_rotations::old_value, secret_rotations::new_value));
    let rows: Vec<(Option<String>, Option<String>)> = call.load(rows).await?;
    let sealed = rows.iter().flat_map(|(old, new)| [old, new]).flatten();
    Ok(sealed.filter_map(|sealed| staged_key_version(sealed).ok()).collect())
}

/// Notes which change has told of a rotation.
async fn note_told(call: &mut Call<'_>, id: &str, number: i64) -> Result<(), StoreError> {
    let row = secret_rotations::table.find(id.to_owned());
    call.execute(diesel::update(row).set(secret_rotations::told_by.eq(number))).await.map(drop)
}

fn written(detail: &RotationDetail) -> Result<String, StoreError> {
    serde_json::to_string(detail).map_err(|_| StoreError::broken("the state of a rotation cannot be written"))
}

impl OfStore for RotationError {
    fn of_store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error) => Some(error),
            Self::Moved | Self::Unreadable(_) => None,
        }
    }
}
