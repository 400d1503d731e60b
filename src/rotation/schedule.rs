//! Begins rotations when they are due.
//!
//! When a secret is due is a row in the database: its last write and the rule's `every`, less a part of
//! it that the secret's name decides, so that secrets which were written together do not all rotate
//! together. The rows are made anew every few minutes, and after the rules have changed. A row is only
//! a reason to look: before a rotation begins, the time of the last write is read once more.

use std::{sync::Arc, time::Duration};

use sha2::{Digest as _, Sha256};

use super::{RotateError, Rotations, Wanted, rules::Rules};
use crate::{
    clock::Timestamp,
    log,
    secret::SecretKey,
    tenant::Tenant,
    tiers::database::{Due, Lease, PageEnd, StoreError},
};

/// How often the rows are compared with the secrets.
const COMPARE_EVERY: Duration = Duration::from_secs(5 * 60);

/// How many rotations begin in a minute at most: where thousands are due at once, lookups and the
/// budget of upstream are not for them alone.
const STARTS_PER_MINUTE: u32 = 60;

/// When a rotation that could not begin is tried again.
const AGAIN_AFTER: Duration = Duration::from_secs(10 * 60);

/// For how long a secret is left alone whose rotation has failed, or was stopped by a person.
const LEFT_ALONE_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// The name that a rotation by schedule is begun under.
pub(super) const BY: &str = "schedule";

/// How far this process has come. It decides nothing that another process must know.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// The rules that the rows were last made by.
    made_by: Option<Arc<Rules>>,
    /// When they were, by the running clock.
    made_at: Duration,
    /// Where the next page of the comparison begins, while one goes on.
    page: Option<Option<PageEnd>>,
    /// When the present minute began, by the running clock, and how many rotations have begun in it.
    minute: Duration,
    begun: u32,
}

/// When a secret is due that was written then: earlier than `every` later by up to a tenth.
pub(super) fn due_at(written_at: Timestamp, every: Duration, tenant: &Tenant, key: &SecretKey) -> Timestamp {
    let mut digest = Sha256::new();
    digest.update(tenant.as_str().as_bytes());
    digest.update([0]);
    digest.update(key.as_str().as_bytes());
    let mut first = [0; 4];
    first.copy_from_slice(&digest.finalize()[..4]);
    let share = f64::from(u32::from_be_bytes(first)) / f64::from(u32::MAX);
    written_at.plus(every.saturating_sub(every.mul_f64(share / 10.0)))
}

impl Rotations {
    /// Makes rows, and begins what is due. Returns whether there was anything to do.
    pub(super) async fn keep_schedule(&self, schedule: &mut Schedule, lease: &Lease) -> Result<bool, StoreError> {
        let compared = self.compare(schedule, lease).await?;
        let begun = self.begin_due(schedule, lease).await?;
        Ok(compared || begun)
    }

    /// Whether a comparison or a rotation is due here: asked before the lease is taken.
    pub(super) async fn has_schedule(&self, schedule: &Schedule) -> Result<bool, StoreError> {
        let (has_intervals, database) = (self.rules.load().have_intervals(), self.resolver.database());
        let before = match (has_intervals, schedule.page.is_some() || self.is_to_compare(schedule)) {
            (true, true) => return Ok(true),
            (true, false) => database.now(),
            // Rows that rules of before have left are found once, whenever they would be due.
            (false, true) => Timestamp::from_millis(i64::MAX),
            (false, false) => return Ok(false),
        };
        Ok(!database.due_before(before, 1).await?.is_empty())
    }

    fn is_to_compare(&self, schedule: &Schedule) -> bool {
        let is_new = schedule.made_by.as_ref().is_none_or(|made_by| !Arc::ptr_eq(made_by, &self.rules.load()));
        let is_over = || self.resolver.clock().running().saturating_sub(schedule.made_at) >= COMPARE_EVERY;
        is_new || is_over()
    }

    /// Brings the rows of one page of secrets in line with the rules.
    async fn compare(&self, schedule: &mut Schedule, lease: &Lease) -> Result<bool, StoreError> {
        let rules = self.rules.load_full();
        if schedule.page.is_none() {
            if !self.is_to_compare(schedule) {
                return Ok(false);
            }
            (schedule.made_by, schedule.made_at) = (Some(Arc::clone(&rules)), self.resolver.clock().running());
            if !rules.have_intervals() {
                self.resolver.database().clear_due(lease).await?;
                return Ok(false);
            }
            schedule.page = Some(None);
        }
        let database = self.resolver.database();
        let after = schedule.page.clone().flatten();
        let (page, next) = database.rotatable(after.as_ref()).await?;
        let now = database.now();
        let mut changed = Vec::new();
        for secret in page {
            let every = rules.of(&secret.tenant, &secret.key).and_then(|rule| rule.every);
            let due = every.map(|every| due_at(secret.written_at, every, &secret.tenant, &secret.key));
            let is_postponed = match (due, secret.due_at) {
                (Some(due), Some(row)) => due <= now && now < row && row <= now.plus(LEFT_ALONE_FOR),
                _ => false,
            };
            if due != secret.due_at && !is_postponed {
                changed.push((secret.tenant, secret.key, due));
            }
        }
        database.set_due(&changed, Some(lease)).await?;
        schedule.page = next.map(Some);
        Ok(true)
    }

    /// Begins rotations that are due, as many as may begin in this minute.
    async fn begin_due(&self, schedule: &mut Schedule, lease: &Lease) -> Result<bool, StoreError> {
        const AT_ONCE: u32 = 8;
        let now = self.resolver.clock().running();
        if now.saturating_sub(schedule.minute) >= Duration::from_secs(60) {
            (schedule.minute, schedule.begun) = (now, 0);
        }
        let most = STARTS_PER_MINUTE.saturating_sub(schedule.begun).min(AT_ONCE);
        if most == 0 {
            return Ok(false);
        }
        let database = self.resolver.database();
        let due = database.due_before(database.now(), usize::try_from(most).unwrap_or(usize::MAX)).await?;
        let has_begun = !due.is_empty();
        for due in due {
            schedule.begun += 1;
            let at = self.begin_one(&due).await?;
            database.set_due(&[(due.tenant, due.key, at)], Some(lease)).await?;
        }
        Ok(has_begun)
    }

    /// Begins one, and returns when the secret is due next.
    async fn begin_one(&self, due: &Due) -> Result<Option<Timestamp>, StoreError> {
        let (tenant, key) = (&due.tenant, &due.key);
        let database = self.resolver.database();
        let now = database.now();
        let Some(every) = self.rules.load().of(tenant, key).and_then(|rule| rule.every) else { return Ok(None) };
        if let Some(written_at) = database.written_at(tenant, key).await? {
            let is_due_at = due_at(written_at, every, tenant, key);
            if now < is_due_at {
                return Ok(Some(is_due_at));
            }
        }
        let last = database.last_rotation(tenant, key).await?;
        if last.is_some_and(|last| last.ended_at.is_none()) {
            // It goes on, or a person is to decide.
            return Ok(Some(now.plus(AGAIN_AFTER)));
        }
        Ok(match self.rotate(tenant, key, Wanted::default(), BY).await {
            Ok(_) => Some(due_at(now, every, tenant, key).max(now.plus(AGAIN_AFTER.min(every)))),
            Err(RotateError::NoSecret) => None,
            Err(RotateError::Store(error)) => return Err(error),
            Err(error) => {
                let error = log::chain(&error);
                tracing::warn!(%tenant, %key, error, "a rotation that is due could not begin; it is tried again");
                Some(now.plus(AGAIN_AFTER))
            }
        })
    }

    /// Notes when a secret is due next that has just got a new value. For one that the database has, the
    /// comparison would find the same; of others this is all that is known.
    pub(super) async fn note_rotated(&self, tenant: &Tenant, key: &SecretKey) {
        let Some(every) = self.rules.load().of(tenant, key).and_then(|rule| rule.every) else { return };
        let database = self.resolver.database();
        let due = due_at(database.now(), every, tenant, key);
        if let Err(error) = database.set_due(&[(tenant.clone(), key.clone(), Some(due))], None).await {
            tracing::debug!(%error, "when a secret is to be rotated next could not be noted");
        }
    }

    /// Leaves a secret alone for a while, whose rotation has failed or was stopped.
    pub(super) async fn leave_alone(&self, tenant: &Tenant, key: &SecretKey) {
        let database = self.resolver.database();
        let postpone = async {
            if database.due_at(tenant, key).await?.is_some() {
                let until = database.now().plus(LEFT_ALONE_FOR);
                database.set_due(&[(tenant.clone(), key.clone(), Some(until))], None).await?;
            }
            Ok::<(), StoreError>(())
        };
        if let Err(error) = postpone.await {
            tracing::debug!(%error, "a secret whose rotation has stopped could not be left alone for a day");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_that_were_written_together_are_due_over_the_last_tenth_of_the_interval() {
        let every = Duration::from_secs(100_000);
        let written_at = Timestamp::from_millis(1_000);
        let due = |number: usize| {
            let tenant: Tenant = format!("t{number}").parse().unwrap();
            let at = due_at(written_at, every, &tenant, &"K".parse().unwrap());
            assert_eq!(at, due_at(written_at, every, &tenant, &"K".parse().unwrap()), "always the same");
            at.since(written_at).as_secs()
        };
        let mut in_parts = [0; 10];
        for number in 0..1_000 {
            let due = due(number);
            assert!((90_000..=100_000).contains(&due), "{due}");
            in_parts[usize::try_from((due - 90_000) / 1_000).unwrap().min(9)] += 1;
        }
        assert!(in_parts.iter().all(|count| (50..200).contains(count)), "{in_parts:?}");
    }
}
