//! Rotation of secrets: a new value takes over, and the old one stays valid for a while.
//!
//! `rules` says which secrets are rotated and how, `generate` makes new values, `schedule` begins what
//! is due, `steps` works on rotations that run. This file has what callers ask for. The state of a rotation is a row in the
//! database (`tiers/database/secret_rotations.rs`); nothing here outlives the process.

mod generate;
mod rules;
mod schedule;
mod steps;
mod webhook;

use std::{fmt, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio::sync::Notify;

pub use self::{
    generate::{Alphabet, Generate, NoRandomness},
    rules::{LONGEST_GRACE, RotatorConfig, RuleConfig, Rules, faults},
    steps::Worker,
    webhook::{Secrets, WebhookConfig},
};
use crate::{
    clock::Timestamp,
    metrics::Metrics,
    outgoing::Outgoing,
    resolver::{Condition, NewTenant, ResolveError, Resolver, Tier, Want, WriteError},
    secret::{SecretKey, SecretName, SecretValue, Writer},
    tenant::Tenant,
    tiers::database::{NewRotation, RotationError, RotationKind, RotationStep, RotationValues, StoreError},
};

/// Words of the database tier that are part of what this answers: callers need no tier to read them.
pub use crate::tiers::database::{Due, Rotation, RotationFilter, SecretRotationState};

/// The rotations of one instance's secrets.
pub struct Rotations {
    resolver: Arc<Resolver>,
    outgoing: Arc<Outgoing>,
    rules: ArcSwap<Rules>,
    metrics: Arc<Metrics>,
    /// Notified when there is something to do at once.
    due: Notify,
}

/// A rotation that a caller wants.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// The new value; without one it is made as the rule says.
    pub value: Option<SecretValue>,
    /// How long the old value stays valid; without it, as the rule says, or a day.
    pub grace: Option<Duration>,
    /// Why.
    pub reason: Option<String>,
}

/// Why a rotation was not begun, or not changed.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    /// There is no such secret.
    #[error("there is no such secret")]
    NoSecret,
    /// A rotation of this secret runs already.
    #[error("a rotation of this secret runs already")]
    InProgress(Box<Rotation>),
    /// No value came, and no rule says how to make one.
    #[error("no rule says how to make a new value")]
    NoRule,
    /// The new value is the one that the secret has.
    #[error("the new value is the one that the secret has")]
    SameValue,
    /// No rotation of this secret runs.
    #[error("no rotation of this secret runs")]
    NotRunning,
    /// The rotation is not where this can be done.
    #[error("{0}")]
    NotNow(&'static str),
    /// Somebody else has gone on with the rotation, again and again.
    #[error("somebody else goes on with this rotation at the same time")]
    Moved,
    /// No new value could be made.
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
    /// A value of the rotation does not open.
    #[error("a value of the rotation does not open")]
    Unreadable,
    /// The secret could not be read.
    #[error(transparent)]
    Read(#[from] ResolveError),
    /// The secret could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<RotationError> for RotateError {
    fn from(error: RotationError) -> Self {
        match error {
            RotationError::Moved => Self::Moved,
            RotationError::Unreadable(_) => Self::Unreadable,
            RotationError::Store(error) => Self::Store(error),
        }
    }
}

impl Rotations {
    /// The rotations of the secrets that `resolver` finds, under no rules yet.
    #[must_use]
    pub fn new(resolver: Arc<Resolver>, outgoing: Arc<Outgoing>, metrics: Arc<Metrics>) -> Self {
        Self { resolver, outgoing, rules: ArcSwap::default(), metrics, due: Notify::new() }
    }

    /// Finds the secrets.
    #[must_use]
    pub fn resolver(&self) -> &Arc<Resolver> {
        &self.resolver
    }

    /// Applies other rules, from the next step of each rotation on.
    pub fn set_rules(&self, rules: Rules) {
        self.outgoing.allow(rules.destinations());
        self.rules.store(Arc::new(rules));
    }

    /// Waits until there is something to do at once.
    pub async fn due(&self) {
        self.due.notified().await;
    }

    /// Begins a rotation for `by`. It goes on without the caller.
    ///
    /// # Errors
    /// [`RotateError`]; then none has begun.
    pub async fn rotate(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        wanted: Wanted,
        by: &str,
    ) -> Result<Rotation, RotateError> {
        repeated(|| self.rotate_once(tenant, key, wanted.clone(), by)).await
    }

    async fn rotate_once(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        wanted: Wanted,
        by: &str,
    ) -> Result<Rotation, RotateError> {
        let (makes_values, kind, grace) = {
            let rules = self.rules.load();
            let rule = rules.of(tenant, key);
            let kind = match rule.and_then(|rule| rule.rotator.as_ref()) {
                None if rule.is_some_and(|rule| rule.assisted) => RotationKind::Assisted,
                None => RotationKind::Value,
                Some(RotatorConfig::Webhook(_)) => RotationKind::Webhook,
            };
            (rule.is_some(), kind, rule.map_or_else(rules::a_day, |rule| rule.grace))
        };
        if wanted.value.is_none() && !makes_values {
            return Err(RotateError::NoRule);
        }
        let current = self.resolver.resolve(SecretName::of(tenant, key), Want::Revalidated).await?;
        let answer = current.answer().ok_or(RotateError::NoSecret)?;
        if wanted.value.as_ref().is_some_and(|value| answer.value_is(value)) {
            return Err(RotateError::SameValue);
        }
        if let Some(value) = &wanted.value
            && let Some(given) = self.give(tenant, key, value).await?
        {
            return Ok(given);
        }
        let new = NewRotation {
            kind,
            values: RotationValues { old: Some(answer.value()), new: wanted.value },
            old_version: answer.version,
            grace: wanted.grace.unwrap_or(grace),
            by: by.to_owned(),
            reason: wanted.reason,
        };
        if let Some(failed) = self.resolver.database().last_rotation(tenant, key).await?
            && failed.state == SecretRotationState::Failed
            && failed.ended_at.is_none()
            && failed.valid_until.is_none()
        {
            // It has stopped before it changed anything: the new one takes its place.
            self.end(&failed, SecretRotationState::Aborted).await?;
        }
        let begun = self.resolver.begin_rotation(tenant, key, new).await?;
        let begun = begun.map_err(|running| RotateError::InProgress(Box::new(running)))?;
        self.tell("started", &begun);
        self.due.notify_one();
        Ok(begun)
    }

    /// Gives a value to a rotation that waits for a person to bring one; `None` where none does.
    async fn give(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        value: &SecretValue,
    ) -> Result<Option<Rotation>, RotateError> {
        let running = self.resolver.database().running_rotation(tenant, key).await?;
        let waits = |(rotation, values): &(Rotation, RotationValues)| {
            rotation.kind == RotationKind::Assisted && rotation.step == RotationStep::Create && values.new.is_none()
        };
        let Some((mut rotation, values)) = running.filter(waits) else { return Ok(None) };
        rotation.next_try_at = Some(self.resolver.database().now());
        let values = RotationValues { new: Some(value.clone()), ..values };
        let rotation = self.resolver.change_rotation(&rotation, Some(values), None, true).await?;
        self.due.notify_one();
        Ok(Some(rotation))
    }

    /// The rotation of a secret that runs, else the last one.
    ///
    /// # Errors
    /// [`RotateError::Store`].
    pub async fn last(&self, tenant: &Tenant, key: &SecretKey) -> Result<Option<Rotation>, RotateError> {
        Ok(self.resolver.database().last_rotation(tenant, key).await?)
    }

    /// When a secret is to be rotated by itself, where that is known.
    ///
    /// # Errors
    /// [`RotateError::Store`].
    pub async fn due_at(&self, tenant: &Tenant, key: &SecretKey) -> Result<Option<Timestamp>, RotateError> {
        Ok(self.resolver.database().due_at(tenant, key).await?)
    }

    /// The secrets that are to be rotated by themselves before this time, at most so many.
    ///
    /// # Errors
    /// [`RotateError::Store`].
    pub async fn due_before(&self, before: Timestamp, most: usize) -> Result<Vec<Due>, RotateError> {
        Ok(self.resolver.database().due_before(before, most).await?)
    }

    /// A page of rotations, and the id behind which the next begins.
    ///
    /// # Errors
    /// [`RotateError::Store`].
    pub async fn page(&self, filter: &RotationFilter) -> Result<(Vec<Rotation>, Option<String>), RotateError> {
        Ok(self.resolver.database().rotations(filter).await?)
    }

    /// Has the new value take over now, without waiting for instances that have not heard of it.
    ///
    /// # Errors
    /// [`RotateError`]; then nothing has changed.
    pub async fn promote(&self, tenant: &Tenant, key: &SecretKey) -> Result<Rotation, RotateError> {
        repeated(|| self.promote_once(tenant, key)).await
    }

    async fn promote_once(&self, tenant: &Tenant, key: &SecretKey) -> Result<Rotation, RotateError> {
        let mut rotation = self.running(tenant, key).await?;
        if rotation.valid_until.is_some() {
            return Err(RotateError::NotNow("the new value has taken over already"));
        }
        rotation.detail.forced = true;
        self.go_on(rotation).await
    }

    /// Tries the step again that has failed, at once.
    ///
    /// # Errors
    /// [`RotateError`]; then nothing has changed.
    pub async fn retry(&self, tenant: &Tenant, key: &SecretKey) -> Result<Rotation, RotateError> {
        repeated(|| self.retry_once(tenant, key)).await
    }

    async fn retry_once(&self, tenant: &Tenant, key: &SecretKey) -> Result<Rotation, RotateError> {
        let rotation = self.running(tenant, key).await?;
        if rotation.state != SecretRotationState::Failed && rotation.detail.fault.is_none() {
            return Err(RotateError::NotNow("no step of this rotation has failed"));
        }
        self.go_on(rotation).await
    }

    /// Stops a rotation whose new value has not taken over.
    ///
    /// # Errors
    /// [`RotateError`]; then nothing has changed.
    pub async fn abort(&self, tenant: &Tenant, key: &SecretKey) -> Result<Rotation, RotateError> {
        repeated(|| self.abort_once(tenant, key)).await
    }

    async fn abort_once(&self, tenant: &Tenant, key: &SecretKey) -> Result<Rotation, RotateError> {
        let rotation = self.running(tenant, key).await?;
        if rotation.valid_until.is_some() {
            return Err(RotateError::NotNow(
                "the new value has taken over already; a rollback brings the old one back",
            ));
        }
        // From this step on the new value may be on its way to the owner.
        if rotation.step >= RotationStep::Promote && rotation.state == SecretRotationState::Running {
            return Err(RotateError::NotNow(
                "the new value is taking over; a rollback brings the old one back after that",
            ));
        }
        let ended = self.end(&rotation, SecretRotationState::Aborted).await?;
        // A person has decided: the schedule does not begin it again at once.
        self.leave_alone(tenant, key).await;
        Ok(ended)
    }

    /// Ends the time of the old value now. It is revoked once every instance has followed.
    ///
    /// # Errors
    /// [`RotateError`]; then nothing has changed.
    pub async fn retire(&self, tenant: &Tenant, key: &SecretKey) -> Result<Rotation, RotateError> {
        repeated(|| self.retire_once(tenant, key)).await
    }

    async fn retire_once(&self, tenant: &Tenant, key: &SecretKey) -> Result<Rotation, RotateError> {
        let (mut rotation, values) = self.running_with_values(tenant, key).await?;
        if rotation.valid_until.is_none() {
            return Err(RotateError::NotNow("the new value has not taken over yet, so the old one is the secret's"));
        }
        if rotation.kind == RotationKind::Assisted && rotation.step == RotationStep::Revoke {
            // A person says that the old value is revoked.
            return Ok(self.end(&rotation, SecretRotationState::Completed).await?);
        }
        let now = self.resolver.database().now();
        rotation.valid_until = rotation.valid_until.map(|until| until.min(now));
        rotation.next_try_at = Some(now);
        rotation.state = SecretRotationState::Running;
        let rotation = self.resolver.change_rotation(&rotation, Some(values), None, true).await?;
        self.due.notify_one();
        Ok(rotation)
    }

    /// Makes the old value the secret's again, while it is valid, and ends the rotation.
    ///
    /// # Errors
    /// [`RotateError`]; where the secret could not be written, this can be repeated.
    pub async fn roll_back(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        writer: &Writer,
    ) -> Result<(Rotation, Tier), RotateError> {
        repeated(|| self.roll_back_once(tenant, key, writer)).await
    }

    async fn roll_back_once(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        writer: &Writer,
    ) -> Result<(Rotation, Tier), RotateError> {
        const REVOKED: &str = "the old value is revoked, or is about to be; it does not come back";
        let (mut rotation, values) = self.running_with_values(tenant, key).await?;
        let (Some(_), Some(old), Some(new)) = (rotation.valid_until, values.old, values.new) else {
            return Err(RotateError::NotNow("the new value has not taken over yet; stop the rotation instead"));
        };
        if rotation.step != RotationStep::Wait {
            return Err(RotateError::NotNow(REVOKED));
        }
        // First of all, so that nobody revokes the old value meanwhile.
        rotation.next_try_at = None;
        rotation.detail.waits_for =
            Some("the old value to come back; roll back again if that was interrupted".to_owned());
        let rotation = self.resolver.change_rotation(&rotation, None, None, false).await?;
        let name = SecretName::of(tenant, key);
        let current = self.resolver.resolve(name, Want::Revalidated).await?;
        let answer = current.answer().ok_or(RotateError::NoSecret)?;
        let mut tier = current.cache_status.answered_by;
        if !answer.value_is(&old) {
            if !answer.value_is(&new) {
                return Err(RotateError::NotNow("somebody has written another value meanwhile"));
            }
            let condition = Condition::IfMatch(vec![answer.bare_etag().to_owned()]);
            let putting = self.resolver.put(tenant, key, &old, &condition, writer, NewTenant::Refused);
            tier = putting.await?.tier;
        }
        Ok((self.end(&rotation, SecretRotationState::RolledBack).await?, tier))
    }

    async fn running(&self, tenant: &Tenant, key: &SecretKey) -> Result<Rotation, RotateError> {
        let last = self.resolver.database().last_rotation(tenant, key).await?;
        last.filter(|rotation| rotation.ended_at.is_none()).ok_or(RotateError::NotRunning)
    }

    async fn running_with_values(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
    ) -> Result<(Rotation, RotationValues), RotateError> {
        self.resolver.database().running_rotation(tenant, key).await?.ok_or(RotateError::NotRunning)
    }

    /// Has a rotation worked on at once, as if its step had not been tried yet.
    async fn go_on(&self, mut rotation: Rotation) -> Result<Rotation, RotateError> {
        rotation.state = SecretRotationState::Running;
        rotation.next_try_at = Some(self.resolver.database().now());
        rotation.detail.tries = 0;
        let rotation = self.resolver.change_rotation(&rotation, None, None, false).await?;
        self.due.notify_one();
        Ok(rotation)
    }

    async fn end(&self, rotation: &Rotation, state: SecretRotationState) -> Result<Rotation, RotationError> {
        let mut ended = rotation.clone();
        ended.state = state;
        ended.ended_at = Some(self.resolver.database().now());
        ended.next_try_at = None;
        ended.detail.waits_for = None;
        // At the provider the new value may be valid, which nobody serves from now on.
        ended.detail.orphaned = ended.may_leave_an_orphan() && state != SecretRotationState::Completed;
        let ended = self.resolver.change_rotation(&ended, None, None, true).await?;
        self.tell(state.as_str(), &ended);
        Ok(ended)
    }

    /// Logs and counts what became of a rotation.
    fn tell(&self, what: &'static str, rotation: &Rotation) {
        let Rotation { tenant, key, id, .. } = rotation;
        tracing::info!(%tenant, %key, rotation = id, state = what, "a rotation has changed its state");
        self.metrics.count("secretier_secret_rotations_total", &[("state", what)]);
        if rotation.detail.orphaned {
            tracing::error!(
                %tenant, %key, rotation = id,
                "a value may be valid at its provider that nobody serves, or that should be revoked; look there"
            );
            self.metrics.count("secretier_secret_rotations_total", &[("state", "orphaned")]);
        }
    }
}

/// Does something to a rotation again where somebody else has gone on with it since it was read: the
/// instance that works on it, as a rule, which is done in a moment.
async fn repeated<T, F>(work: impl Fn() -> F) -> Result<T, RotateError>
where
    F: Future<Output = Result<T, RotateError>>,
{
    const TRIES: u32 = 10;
    for tried in 0..TRIES {
        match work().await {
            Err(RotateError::Moved) => tokio::time::sleep(Duration::from_millis(5) * tried).await,
            done => return done,
        }
    }
    Err(RotateError::Moved)
}

impl fmt::Debug for Rotations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rotations")
    }
}
