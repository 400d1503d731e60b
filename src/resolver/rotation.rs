//! The values that are valid beside a secret's own while it is rotated, and the changes of a rotation's
//! state.
//!
//! A rotation's row holds the old and the new value from its beginning to its end, and instances are
//! told of every change of it as of a change of the secret. So whatever a reader has of the secret and
//! of the row, one from before the new value took over and one from after it, together they have every
//! value that is valid:
//! - *The secret from before, the row from after:* the row has the new value, which is not the
//!   secret's yet as this reader sees it.
//! - *The secret from after, the row from before:* the row has the old value.
//! - *One from before the rotation began, the other from after it ended* would lack one. The fence is
//!   taken before the first is read and compared after the second; where something changed in between,
//!   both are read again. And a rotation does not end before every instance has followed.

use std::{sync::Arc, time::Duration};

use super::{ResolveError, Resolved, Resolver, Want};
use crate::{
    answer::Answer,
    clock::Timestamp,
    secret::{SecretKey, SecretName, SecretValue, Version},
    tenant::Tenant,
    tiers::{
        database::{KeptValues, Lease, NewRotation, Rotation, RotationError, RotationValues, StoreError},
        memory::{Staged, StagedValues},
    },
};

/// How a value stands among those that are valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The secret's value.
    Current,
    /// It was the secret's value, and is valid for a while.
    Previous,
    /// It is about to become the secret's value.
    Pending,
}

impl Stage {
    /// The word in answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Previous => "previous",
            Self::Pending => "pending",
        }
    }
}

/// A value that is valid.
#[derive(Debug, Clone)]
pub struct ValidValue {
    /// Its version; `None` where it has none yet.
    pub version: Option<Version>,
    /// The value.
    pub value: SecretValue,
    /// How it stands.
    pub stage: Stage,
    /// Until when it is valid, where that is known.
    pub valid_until: Option<Timestamp>,
}

/// Every value of a secret that is valid.
#[derive(Debug, Clone)]
pub struct Valid {
    /// The secret itself.
    pub current: Resolved,
    /// The values, the secret's own first; none where there is no such secret.
    pub values: Vec<ValidValue>,
}

/// How often both are read at most where the secret changes between the two.
const READS: usize = 3;

/// How long what is known of a rotation is used without asking again. Changes are told, so this only
/// limits what a lost notice could do.
const STAGED_FOR: Duration = Duration::from_secs(5 * 60);

impl Resolver {
    /// Every value of a secret that is valid: the secret's own, and those of a rotation that runs.
    ///
    /// # Errors
    /// Why they cannot all be had: never some of them alone.
    pub async fn valid(self: &Arc<Self>, name: SecretName<'_>, want: Want) -> Result<Valid, ResolveError> {
        self.not_alone()?;
        let (tenant, key) = name.to_owned();
        for read in 1.. {
            let fence = self.memory.fence(&tenant);
            let current = self.resolve(name, want).await?;
            let Some(answer) = current.answer() else {
                return Ok(Valid { current, values: Vec::new() });
            };
            let staged = self.staged(&tenant, &key).await?;
            if read == READS || self.memory.holds(fence) {
                let values = valid_beside(answer, staged.values.as_ref(), self.clock.database_now());
                return Ok(Valid { current, values });
            }
        }
        Err(ResolveError::Lost)
    }

    /// What is known of a secret's rotation: from memory, else from the database.
    async fn staged(&self, tenant: &Tenant, key: &SecretKey) -> Result<Arc<Staged>, ResolveError> {
        let held = self.memory.staged(tenant.as_str(), key.as_str());
        let now = self.clock.moment();
        if let Some(held) = held.as_ref().filter(|held| now.since(held.read_at) < STAGED_FOR) {
            return Ok(Arc::clone(held));
        }
        let fence = self.memory.fence(tenant);
        match self.database.running_rotation(tenant, key).await {
            Ok(found) => {
                let values = found.and_then(|(rotation, values)| of_row(&rotation, values));
                let staged = Arc::new(Staged { values, read_at: now });
                self.memory.fill_staged(fence, tenant, key, Arc::clone(&staged));
                Ok(staged)
            }
            Err(RotationError::Unreadable(_)) => Err(ResolveError::Unreadable),
            Err(RotationError::Moved) => Err(ResolveError::Lost),
            Err(RotationError::Store(error)) => {
                let ages = self.policies().of(tenant, key, self.own_phase(tenant)).ages;
                let usable = held.filter(|held| now.since(held.read_at) < ages.memory_max_stale);
                usable.ok_or_else(|| ResolveError::Database(Arc::new(error)))
            }
        }
    }

    /// Begins a rotation; `Err` within has the one that runs already. When this returns, every lookup
    /// here knows of it.
    ///
    /// # Errors
    /// [`StoreError`]; then none has begun.
    pub async fn begin_rotation(
        self: &Arc<Self>,
        tenant: &Tenant,
        key: &SecretKey,
        new: NewRotation,
    ) -> Result<Result<Rotation, Rotation>, StoreError> {
        let (resolver, tenant, key) = (Arc::clone(self), tenant.clone(), key.clone());
        let begun = tokio::spawn(async move {
            let changing = resolver.changing();
            let begun = resolver.database.begin_rotation(&tenant, &key, &new).await;
            resolver.changed(&tenant, &key);
            drop(changing);
            begun
        });
        begun.await.unwrap_or(Err(StoreError::LeaseLost))
    }

    /// Changes a rotation's row: see `Database::change_rotation`. When this returns, every lookup here
    /// knows of it.
    ///
    /// # Errors
    /// [`RotationError`].
    pub async fn change_rotation(
        self: &Arc<Self>,
        rotation: &Rotation,
        values: Option<RotationValues>,
        lease: Option<&Lease>,
        tells: bool,
    ) -> Result<Rotation, RotationError> {
        let (resolver, rotation, lease) = (Arc::clone(self), rotation.clone(), lease.cloned());
        // In a task of its own: one that is dropped in the middle must not leave lookups behind that
        // do not know of the change.
        let changed = tokio::spawn(async move {
            let changing = resolver.changing();
            let kept = match &values {
                _ if rotation.ended_at.is_some() => KeptValues::Removed,
                Some(values) => KeptValues::Replaced(values),
                None => KeptValues::AsTheyAre,
            };
            let changed = resolver.database.change_rotation(&rotation, kept, lease.as_ref(), tells).await;
            resolver.changed(&rotation.tenant, &rotation.key);
            drop(changing);
            changed
        });
        changed.await.unwrap_or(Err(RotationError::Moved))
    }
}

fn of_row(rotation: &Rotation, values: RotationValues) -> Option<StagedValues> {
    Some(StagedValues {
        old: values.old?,
        old_version: rotation.old_version,
        valid_until: rotation.valid_until,
        new: values.new,
        new_version: rotation.detail.new_version.and_then(Version::new),
    })
}

/// The secret's value and what is valid beside it at that time, by the database's clock.
fn valid_beside(current: &Answer, staged: Option<&StagedValues>, now: Timestamp) -> Vec<ValidValue> {
    let own =
        ValidValue { version: Some(current.version), value: current.value(), stage: Stage::Current, valid_until: None };
    let mut values = vec![own];
    let Some(staged) = staged else { return values };
    let is_new = staged.new.as_ref().is_some_and(|new| current.value_is(new));
    let is_old = current.value_is(&staged.old);
    let old_is_valid = match staged.valid_until {
        Some(until) => now < until,
        // The new value has taken over, and the row does not say it yet.
        None => is_new,
    };
    if !is_old && old_is_valid {
        let (version, valid_until) = (staged.old_version, staged.valid_until);
        values.push(ValidValue { version, value: staged.old.clone(), stage: Stage::Previous, valid_until });
    }
    if let Some(new) = staged.new.as_ref().filter(|_| !is_new) {
        let comes = match (staged.valid_until, staged.new_version) {
            // Somebody has written another value meanwhile: the new one does not take over.
            (None, _) => is_old,
            // This reader is behind the new value, rather than past it.
            (Some(_), Some(version)) => current.version < version,
            (Some(_), None) => is_old,
        };
        if comes {
            let value = new.clone();
            values.push(ValidValue { version: staged.new_version, value, stage: Stage::Pending, valid_until: None });
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn current(value: &str, version: i64) -> Answer {
        let value = SecretValue::new(value.to_owned());
        let (tenant, key) = ("acme".parse().unwrap(), "K".parse().unwrap());
        Answer::new(&tenant, key, &value, Version::new(version).unwrap(), Timestamp::from_millis(0), "e")
    }

    fn staged(valid_until: Option<i64>, new: Option<&str>) -> StagedValues {
        StagedValues {
            old: SecretValue::new("old".to_owned()),
            old_version: Version::new(1),
            valid_until: valid_until.map(Timestamp::from_millis),
            new: new.map(|new| SecretValue::new(new.to_owned())),
            new_version: valid_until.and(Version::new(2)),
        }
    }

    fn told(current: &Answer, staged: &StagedValues, now: i64) -> Vec<(String, &'static str)> {
        let values = valid_beside(current, Some(staged), Timestamp::from_millis(now));
        values.iter().map(|value| (value.value.expose().to_owned(), value.stage.as_str())).collect()
    }

    #[test]
    fn every_reader_of_a_rotation_has_both_values_whatever_it_has_read_first() {
        let own = |value: &str| (value.to_owned(), "current");
        let (pending, previous) = (("new".to_owned(), "pending"), ("old".to_owned(), "previous"));
        let (before, after) = (staged(None, Some("new")), staged(Some(100), Some("new")));
        assert_eq!(told(&current("old", 1), &staged(None, None), 0), [own("old")]);
        for row in [&before, &after] {
            assert_eq!(told(&current("old", 1), row, 0), [own("old"), pending.clone()]);
            assert_eq!(told(&current("new", 2), row, 0), [own("new"), previous.clone()]);
        }
        assert_eq!(told(&current("new", 2), &after, 99), [own("new"), previous.clone()]);
        assert_eq!(told(&current("new", 2), &after, 100), [own("new")], "its time is over");
    }

    #[test]
    fn a_value_that_somebody_has_written_over_is_not_valid() {
        let own = || ("third".to_owned(), "current");
        assert_eq!(told(&current("third", 2), &staged(None, Some("new")), 0), [own()]);
        let after = told(&current("third", 3), &staged(Some(100), Some("new")), 0);
        assert_eq!(after, [own(), ("old".to_owned(), "previous")], "the old one was promised until its end");
    }
}
