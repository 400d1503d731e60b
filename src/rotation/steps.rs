//! Works on rotations that run, one instance for all of them.
//!
//! Each step is written into the rotation's row before anything is done for it, and doing it twice is
//! the same as doing it once. So whoever finds the row, after whatever crash, does the step that the
//! row names. The interleavings that would do harm, and what prevents each:
//! - *The instance that works is stopped, another takes over, the first goes on.* Every change of a row
//!   carries the lease, whose fencing token the database compares, and the turn that was read. A write
//!   of the secret carries the validator of the value that the rotation began with: where the other has
//!   promoted already, it is refused.
//! - *The answer to the write of the secret is lost.* The step begins by looking at the secret: the new
//!   value there means that it is done.
//! - *Somebody writes the secret meanwhile.* It has neither the old nor the new value then, and the
//!   rotation stops without touching it.
//! - *An instance serves the old value for longer than the grace lasts.* The old value is not revoked
//!   before every instance in the register has followed the change that told of the new one, or can no
//!   longer answer.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;

use super::{
    Rotations, RotatorConfig,
    generate::Generate,
    schedule::Schedule,
    webhook::{Refused, Said},
};
use crate::{
    access::audit::{Act, Audit, Outcome},
    clock::Timestamp,
    log::{self, process_name},
    resolver::{Condition, NewTenant, ResolveError, Want, WriteError},
    secret::{SecretName, SecretValue, Writer},
    tiers::database::{
        Database, Following, Instance, Lease, Rotation, RotationError, RotationFault, RotationKind, RotationStep,
        RotationValues, SecretRotationState, StoreError,
    },
};

/// The lease to work on rotations for all instances.
const LEASE: &str = "secret rotations";
const LEASE_LASTS: Duration = Duration::from_secs(60);

/// How many rotations are worked on at once.
const AT_ONCE: usize = 8;

/// How long until a step is tried again that has failed, each time.
const PAUSES: [Duration; 4] = [
    Duration::from_secs(60),
    Duration::from_secs(5 * 60),
    Duration::from_secs(30 * 60),
    Duration::from_secs(2 * 60 * 60),
];

/// How often a value is made anew whose form the provider refuses.
const MADE_ANEW: u32 = 5;

/// How often is asked whether the instances have followed.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Works on the rotations that are due, while this instance holds the lease.
pub struct Worker {
    rotations: Arc<Rotations>,
    lease: Option<Lease>,
    schedule: Schedule,
}

/// The consequence of a step.
enum Next {
    /// The next step begins.
    Step(RotationStep),
    /// It goes on at this time; until then it waits for this.
    At(Timestamp, String),
    /// It waits for a person to do this.
    Person(&'static str),
    /// It has ended so.
    Ends(SecretRotationState),
}

/// Why a step was not done.
enum Stuck {
    /// It may pass by itself.
    Passing(&'static str, String),
    /// It will not pass by itself.
    Lasting(&'static str, String),
    /// Nothing is known of it: the database failed, or somebody else goes on.
    Unknown,
}

impl From<StoreError> for Stuck {
    fn from(error: StoreError) -> Self {
        tracing::debug!(%error, "a step of a rotation could not be done for the database's sake; it is tried again");
        Self::Unknown
    }
}

impl From<RotationError> for Stuck {
    fn from(error: RotationError) -> Self {
        match error {
            RotationError::Moved => Self::Unknown,
            RotationError::Unreadable(reason) => {
                Self::Passing("unreadable", format!("a value does not open: {reason}"))
            }
            RotationError::Store(error) => error.into(),
        }
    }
}

impl Worker {
    /// A worker that holds no lease yet.
    #[must_use]
    pub fn new(rotations: Arc<Rotations>) -> Self {
        Self { rotations, lease: None, schedule: Schedule::default() }
    }

    /// Waits until a rotation of this instance is to be worked on at once.
    pub fn due(&self) -> impl Future<Output = ()> + use<> {
        let rotations = Arc::clone(&self.rotations);
        async move { rotations.due().await }
    }

    /// Works on the rotations that are due, if no other instance does. `false` where there was nothing
    /// to do here.
    pub async fn turn(&mut self, audit: &Audit) -> bool {
        let rotations = Arc::clone(&self.rotations);
        let database = rotations.resolver.database();
        let due = match database.rotations_to_do(AT_ONCE).await {
            Ok(due) => due,
            Err(error) => {
                tracing::debug!(%error, "it is not known which rotations are due");
                return false;
            }
        };
        let has_schedule = match rotations.has_schedule(&self.schedule).await {
            Ok(has_schedule) => has_schedule,
            Err(error) => {
                tracing::debug!(%error, "it is not known which secrets are to be rotated");
                false
            }
        };
        if due.is_empty() && !has_schedule {
            return false;
        }
        let Some(lease) = self.lease(database).await else { return false };
        let mut has_worked = !due.is_empty();
        if has_schedule {
            match Box::pin(rotations.keep_schedule(&mut self.schedule, &lease)).await {
                Ok(has_begun) => has_worked |= has_begun,
                Err(StoreError::LeaseLost) => self.lease = None,
                Err(error) => tracing::debug!(%error, "rotations that are due could not begin; tried again"),
            }
        }
        let work = join_all(due.into_iter().map(|rotation| rotations.work(rotation, &lease, audit)));
        let mut work = std::pin::pin!(work);
        let mut renewals = tokio::time::interval(LEASE_LASTS / 4);
        renewals.reset();
        loop {
            tokio::select! {
                _ = &mut work => return has_worked,
                _ = renewals.tick() => match database.keep_lease(&lease).await {
                    Ok(true) => {}
                    Ok(false) => {
                        tracing::warn!("another instance has taken over the rotations");
                        self.lease = None;
                        return false;
                    }
                    Err(error) => tracing::debug!(%error, "the lease of the rotations could not be renewed"),
                },
            }
        }
    }

    /// The lease, where this instance holds it or gets it.
    async fn lease(&mut self, database: &Database) -> Option<Lease> {
        if let Some(lease) = &self.lease {
            match database.keep_lease(lease).await {
                Ok(true) => return Some(lease.clone()),
                Ok(false) => self.lease = None,
                Err(_) => return None,
            }
        }
        match database.lease(LEASE, &process_name(), LEASE_LASTS).await {
            Ok(Ok(lease)) => {
                self.lease = Some(lease.clone());
                Some(lease)
            }
            Ok(Err(_)) => None,
            Err(error) => {
                tracing::debug!(%error, "the lease of the rotations could not be asked for");
                None
            }
        }
    }

    /// Lets another instance take over at once.
    pub async fn end(self) {
        let Some(lease) = self.lease else { return };
        if let Err(error) = self.rotations.resolver.database().end_lease(&lease).await {
            tracing::debug!(%error, "the lease of the rotations ends by itself");
        }
    }
}

impl Rotations {
    /// Does a rotation's steps until it has to wait.
    async fn work(&self, mut rotation: Rotation, lease: &Lease, audit: &Audit) {
        loop {
            let before = rotation.step;
            let done = Box::pin(self.step(&mut rotation, lease, audit)).await;
            // The row says so already where the step itself has written it.
            if matches!(&done, Ok(Next::Step(step)) if *step == rotation.step && *step != before) {
                continue;
            }
            let next = match done {
                Ok(Next::Step(step)) => {
                    rotation.step = step;
                    rotation.detail.tries = 0;
                    (rotation.detail.fault, rotation.detail.waits_for) = (None, None);
                    None
                }
                Ok(Next::At(at, waits_for)) => {
                    rotation.next_try_at = Some(at);
                    rotation.detail.waits_for = Some(waits_for);
                    Some(())
                }
                Ok(Next::Person(does)) => {
                    rotation.next_try_at = None;
                    rotation.detail.waits_for = Some(does.to_owned());
                    Some(())
                }
                Ok(Next::Ends(state)) => {
                    let mut ended = rotation.clone();
                    ended.detail.fault = None;
                    if let Err(error) = self.end_under(ended, state, lease).await {
                        tracing::debug!(%error, "the end of a rotation could not be written; it is tried again");
                    }
                    return;
                }
                Err(Stuck::Unknown) => return,
                Err(Stuck::Passing(code, text)) => {
                    self.note_fault(&mut rotation, code, text, false);
                    Some(())
                }
                Err(Stuck::Lasting(code, text)) => {
                    self.note_fault(&mut rotation, code, text, true);
                    Some(())
                }
            };
            if rotation.state == SecretRotationState::Failed {
                self.leave_alone(&rotation.tenant, &rotation.key).await;
            }
            match self.resolver.change_rotation(&rotation, None, Some(lease), false).await {
                Ok(changed) if next.is_none() => rotation = changed,
                Ok(_) => return,
                Err(error) => {
                    tracing::debug!(%error, "a rotation's state could not be written; its step is tried again");
                    return;
                }
            }
        }
    }

    fn note_fault(&self, rotation: &mut Rotation, code: &'static str, text: String, lasts: bool) {
        let tried = usize::try_from(rotation.detail.tries).unwrap_or(usize::MAX);
        rotation.detail.tries = rotation.detail.tries.saturating_add(1);
        let Rotation { tenant, key, id, step, .. } = &*rotation;
        let pause = PAUSES.get(tried).filter(|_| !lasts);
        match pause {
            Some(_) => {
                tracing::warn!(%tenant, %key, rotation = id, step = step.as_str(), code, text, "a step of a rotation failed; it is tried again")
            }
            None => {
                tracing::error!(%tenant, %key, rotation = id, step = step.as_str(), code, text, "a rotation has failed; 'secretier rotations show' tells more")
            }
        }
        rotation.next_try_at = pause.map(|pause| self.resolver.database().now().plus(*pause));
        rotation.detail.waits_for = None;
        rotation.detail.fault = Some(RotationFault { code: code.to_owned(), text });
        if pause.is_none() {
            rotation.state = SecretRotationState::Failed;
            // Something may be valid at the provider that is not served, or should not be valid any more.
            rotation.detail.orphaned = rotation.may_leave_an_orphan();
            self.tell("failed", rotation);
        }
    }

    async fn end_under(
        &self,
        mut rotation: Rotation,
        state: SecretRotationState,
        lease: &Lease,
    ) -> Result<(), RotationError> {
        rotation.state = state;
        rotation.ended_at = Some(self.resolver.database().now());
        rotation.next_try_at = None;
        rotation.detail.waits_for = None;
        let ended = self.resolver.change_rotation(&rotation, None, Some(lease), true).await?;
        self.tell(state.as_str(), &ended);
        Ok(())
    }

    async fn step(&self, rotation: &mut Rotation, lease: &Lease, audit: &Audit) -> Result<Next, Stuck> {
        match rotation.step {
            RotationStep::Create => self.create(rotation, lease).await,
            RotationStep::Set => self.set(rotation, lease).await,
            RotationStep::Test => self.test(rotation).await,
            RotationStep::Promote => self.promote_now(rotation, lease, audit).await,
            RotationStep::Wait => self.wait(rotation).await,
            RotationStep::Revoke => self.revoke(rotation).await,
        }
    }

    /// Makes the new value, where it did not come with the rotation, and tells the instances of it.
    async fn create(&self, rotation: &mut Rotation, lease: &Lease) -> Result<Next, Stuck> {
        let mut values = self.values(rotation).await?;
        if values.new.is_none() && rotation.kind == RotationKind::Webhook {
            match self.ask(rotation, "create", &values).await? {
                Said::Done(made) => values.new = made,
                Said::Later(pause) => return Ok(self.later(pause)),
                Said::OtherForm => {
                    let text = "the rotator refuses the form of a value that there is not yet".to_owned();
                    return Err(Stuck::Lasting("rotator_answer", text));
                }
            }
            if values.are_same() {
                let text = "the rotator gave the value that the secret has".to_owned();
                return Err(Stuck::Lasting("same_value", text));
            }
        }
        if values.new.is_none() && rotation.kind == RotationKind::Assisted {
            return Ok(Next::Person(
                "a person, who brings the new value: 'secretier rotate TENANT KEY --value-file -', POST .../rotate",
            ));
        }
        if values.new.is_none() {
            let generate = self.rules.load().of(&rotation.tenant, &rotation.key).and_then(|rule| rule.generate.clone());
            let Some(generate) = generate else {
                return Err(Stuck::Lasting("no_rule", "no rule says any more how to make a new value".to_owned()));
            };
            values.new = Some(made(&generate)?);
        }
        // With the values, so that none is made twice and told in between.
        rotation.step = if rotation.kind == RotationKind::Webhook { RotationStep::Set } else { RotationStep::Test };
        (rotation.detail.tries, rotation.detail.fault, rotation.detail.waits_for) = (0, None, None);
        *rotation = self.resolver.change_rotation(rotation, Some(values), Some(lease), true).await?;
        Ok(Next::Step(rotation.step))
    }

    /// Has the rotator make the new value valid. One whose form the provider refuses is made anew.
    async fn set(&self, rotation: &mut Rotation, lease: &Lease) -> Result<Next, Stuck> {
        let values = self.values(rotation).await?;
        match self.ask(rotation, "set", &values).await? {
            Said::Done(_) => Ok(Next::Step(RotationStep::Test)),
            Said::Later(pause) => Ok(self.later(pause)),
            Said::OtherForm if rotation.detail.made_anew >= MADE_ANEW => {
                let text = "the provider refuses the form of every value that was made".to_owned();
                Err(Stuck::Lasting("form_refused", text))
            }
            Said::OtherForm => {
                rotation.detail.made_anew += 1;
                rotation.step = RotationStep::Create;
                let without = RotationValues { old: values.old, new: None };
                *rotation = self.resolver.change_rotation(rotation, Some(without), Some(lease), true).await?;
                Ok(Next::Step(RotationStep::Create))
            }
        }
    }

    /// Has the rotator make the old value invalid.
    async fn revoke(&self, rotation: &Rotation) -> Result<Next, Stuck> {
        match rotation.kind {
            RotationKind::Value => return Ok(Next::Ends(SecretRotationState::Completed)),
            RotationKind::Assisted => {
                return Ok(Next::Person(
                    "a person, who revokes the old value at its provider and says so: 'secretier rotations retire TENANT KEY'",
                ));
            }
            RotationKind::Webhook => {}
        }
        let values = self.values(rotation).await?;
        match self.ask(rotation, "revoke", &values).await? {
            Said::Done(_) => Ok(Next::Ends(SecretRotationState::Completed)),
            Said::Later(pause) => Ok(self.later(pause)),
            Said::OtherForm => {
                let text = "the rotator refuses to revoke the old value".to_owned();
                Err(Stuck::Lasting("rotator_refused", text))
            }
        }
    }

    /// Asks the rotator for a step. No connection to the database is held meanwhile.
    async fn ask(&self, rotation: &Rotation, step: &'static str, values: &RotationValues) -> Result<Said, Stuck> {
        let rules = self.rules.load_full();
        let rule = rules.of(&rotation.tenant, &rotation.key);
        let Some(RotatorConfig::Webhook(webhook)) = rule.and_then(|rule| rule.rotator.as_ref()) else {
            let text = "no rule names a rotator for this secret any more".to_owned();
            return Err(Stuck::Lasting("no_rule", text));
        };
        let now = self.resolver.clock().now();
        let asked = webhook.ask(&self.outgoing, rotation, step, values, now).await;
        asked.map_err(|Refused { passes, code, text }| match passes {
            true => Stuck::Passing(code, text),
            false => Stuck::Lasting(code, text),
        })
    }

    fn later(&self, pause: Duration) -> Next {
        Next::At(self.resolver.database().now().plus(pause), "the rotator, which is at it".to_owned())
    }

    /// Waits until every instance that is heard of knows the new value: who is shown it first must find
    /// it valid everywhere. A rotation without a grace is in a hurry, and does not wait.
    async fn test(&self, rotation: &Rotation) -> Result<Next, Stuck> {
        let following = self.following(rotation.told_by).await?;
        if !(following.behind.is_empty() || rotation.detail.forced || rotation.detail.grace == 0) {
            return Ok(self.awaits(&following));
        }
        if rotation.kind != RotationKind::Webhook {
            return Ok(Next::Step(RotationStep::Promote));
        }
        let values = self.values(rotation).await?;
        match self.ask(rotation, "test", &values).await? {
            Said::Done(_) => Ok(Next::Step(RotationStep::Promote)),
            Said::Later(pause) => Ok(self.later(pause)),
            Said::OtherForm => {
                let text = "the provider does not take the new value".to_owned();
                Err(Stuck::Lasting("rotator_refused", text))
            }
        }
    }

    /// Makes the new value the secret's, at its owner.
    async fn promote_now(&self, rotation: &mut Rotation, lease: &Lease, audit: &Audit) -> Result<Next, Stuck> {
        let values = self.values(rotation).await?;
        let (Some(old), Some(new)) = (&values.old, &values.new) else {
            return Err(Stuck::Lasting("no_value", "the rotation has lost its values".to_owned()));
        };
        let name = SecretName::of(&rotation.tenant, &rotation.key);
        let current = self.resolver.resolve(name, Want::Revalidated).await.map_err(|error| unread(&error))?;
        let Some(answer) = current.answer() else {
            return Err(Stuck::Lasting("secret_gone", "somebody has deleted the secret meanwhile".to_owned()));
        };
        let version = if answer.value_is(new) {
            Some(answer.version)
        } else if answer.value_is(old) {
            let condition = Condition::IfMatch(vec![answer.bare_etag().to_owned()]);
            let act = |outcome, tier, code| Act {
                action: "promote",
                tenant: rotation.tenant.as_str(),
                key: rotation.key.as_str(),
                outcome,
                tier,
                code,
            };
            let by = &rotation.detail.by;
            if audit.write_of_rotation(by, act(Outcome::Begun, None, None)).await.is_err() {
                return Err(Stuck::Passing("audit_unavailable", "the audit takes no records".to_owned()));
            }
            // A value of a rotation may refer to nothing: the steps know no more what its sender may read.
            let writer = Writer::reaching(by, Arc::new(|_| false));
            let putting =
                self.resolver.put(&rotation.tenant, &rotation.key, new, &condition, &writer, NewTenant::Refused);
            let written = putting.await;
            let outcome = match &written {
                Ok(written) => act(Outcome::Done, Some(written.tier.as_str()), None),
                Err(WriteError::Conflict) => act(Outcome::Conflict, None, Some("version_conflict")),
                Err(_) => act(Outcome::Failed, None, None),
            };
            // That it was begun is on record; the ledger goes on trying to write the rest.
            let _ = audit.write_of_rotation(by, outcome).await;
            match written {
                // It was written, or read anew, since it was looked at: that is looked at now.
                Err(WriteError::Conflict) if rotation.detail.tries == 0 => {
                    rotation.detail.tries = 1;
                    let at = self.resolver.database().now().plus(ASK_AGAIN);
                    return Ok(Next::At(at, "the secret, which was changed at the same moment".to_owned()));
                }
                written => written.map_err(|error| unwritten(&error))?.version,
            }
        } else {
            return Err(Stuck::Lasting("overtaken", "somebody has written another value meanwhile".to_owned()));
        };
        rotation.step = RotationStep::Wait;
        (rotation.detail.tries, rotation.detail.fault, rotation.detail.waits_for) = (0, None, None);
        rotation.valid_until = Some(self.resolver.database().now().plus(rotation.grace()));
        rotation.detail.new_version = version.map(|version| version.number());
        *rotation = self.resolver.change_rotation(rotation, Some(values), Some(lease), true).await?;
        self.tell("promoted", rotation);
        self.note_rotated(&rotation.tenant, &rotation.key).await;
        Ok(Next::Step(RotationStep::Wait))
    }

    /// Waits until the old value's time is over, and every instance serves the new one.
    async fn wait(&self, rotation: &Rotation) -> Result<Next, Stuck> {
        let now = self.resolver.database().now();
        let until = rotation.valid_until.unwrap_or(now);
        if now < until {
            return Ok(Next::At(until, "the end of the old value's time".to_owned()));
        }
        let following = self.following(rotation.told_by).await?;
        if !following.is_complete() {
            return Ok(self.awaits(&following));
        }
        let values = self.values(rotation).await?;
        let name = SecretName::of(&rotation.tenant, &rotation.key);
        let current = self.resolver.resolve(name, Want::Revalidated).await.map_err(|error| unread(&error))?;
        // Somebody has brought the old value back by hand: it must not be revoked.
        let is_back = current.answer().zip(values.old).is_some_and(|(answer, old)| answer.value_is(&old));
        if is_back { Ok(Next::Ends(SecretRotationState::RolledBack)) } else { Ok(Next::Step(RotationStep::Revoke)) }
    }

    /// The values of a rotation, as they are now.
    async fn values(&self, rotation: &Rotation) -> Result<RotationValues, Stuck> {
        match self.resolver.database().running_rotation(&rotation.tenant, &rotation.key).await? {
            Some((now, values)) if now.id == rotation.id => Ok(values),
            Some(_) | None => Err(Stuck::Unknown),
        }
    }

    /// Which instances have followed a change.
    async fn following(&self, change: i64) -> Result<Following, StoreError> {
        let has_followed = |instance: &Instance| instance.changes >= change;
        self.resolver.database().await_all_instances(Duration::ZERO, has_followed, |_| {}).await
    }

    fn awaits(&self, following: &Following) -> Next {
        let live = following.behind.iter().map(|instance| instance.name.clone());
        let silent = following.silent.iter().map(|instance| {
            let until = instance.may_answer_until().map(Timestamp::to_rfc3339);
            let until = until.map_or_else(String::new, |until| format!(" or until {until}"));
            format!("{} (not heard of since {}{until})", instance.name, instance.seen_at.to_rfc3339())
        });
        let names: Vec<String> = live.chain(silent).collect();
        let at = self.resolver.database().now().plus(ASK_AGAIN);
        Next::At(at, format!("instances that have not followed: {}", names.join(", ")))
    }
}

fn made(generate: &Generate) -> Result<SecretValue, Stuck> {
    generate.value().map_err(|error| Stuck::Passing("no_randomness", error.to_string()))
}

/// Why the secret could not be read.
fn unread(error: &ResolveError) -> Stuck {
    Stuck::Passing("secret_unavailable", log::chain(error))
}

/// Why the secret could not be written.
fn unwritten(error: &WriteError) -> Stuck {
    let text = log::chain(error);
    match error {
        WriteError::Unstorable(_) => Stuck::Lasting("unstorable", text),
        WriteError::Reference => Stuck::Lasting("reference_not_allowed", text),
        WriteError::UnknownTenant => Stuck::Lasting("tenant_unknown", text),
        WriteError::NoVersion | WriteError::Revoked | WriteError::KeptUpstream => {
            Stuck::Lasting("secret_unavailable", text)
        }
        WriteError::AwaitsApproval => Stuck::Passing("approval_required", text),
        WriteError::Conflict => Stuck::Passing("version_conflict", text),
        WriteError::Denied => Stuck::Passing("upstream_denied", text),
        WriteError::Failed(_) => Stuck::Passing("secret_unavailable", text),
    }
}
