//! One secret, as it is made, changed, renamed and deleted.
//!
//! A client repeats a request whose answer it has lost: a secret that is to be made and is there with the
//! same value is answered as if it had just been made.

use hyper::body::Incoming;

use super::{
    InfisicalApi,
    fields::Fields,
    read::key_of,
    shape::{Folder, Shown},
};
use crate::{
    access::Action,
    answer::Answer as Secret,
    clock::Timestamp,
    resolver::{Condition, NewTenant, ResolveError, Tier, Want, WriteError},
    secret::{SecretKey, SecretName, SecretValue, Version},
    server::{
        ask::Ask,
        operation::{Operation, Run},
        respond::{Answer, Problem},
    },
    tenant::Tenant,
};

pub(in crate::server) const CREATE: Operation =
    Operation { action: "put", parameters: &[], run: Run::Write(|ask, body| Box::pin(create(ask, body))) };
pub(in crate::server) const UPDATE: Operation =
    Operation { action: "put", parameters: &[], run: Run::Write(|ask, body| Box::pin(update(ask, body))) };
pub(in crate::server) const DELETE: Operation =
    Operation { action: "delete", parameters: &[], run: Run::Write(|ask, body| Box::pin(delete(ask, body))) };

async fn create(ask: &Ask<'_>, body: Incoming) -> Result<Answer, Problem> {
    let key = key_of(ask)?;
    let (writing, fields) = Writing::read(ask, body, 1).await?;
    let value = fields.secret_value.as_ref().ok_or_else(|| Problem::invalid_body("secretValue is required"))?;
    let done = writing.create(&key, value).await?;
    Ok(writing.shown(&key, &done).answer())
}

async fn update(ask: &Ask<'_>, body: Incoming) -> Result<Answer, Problem> {
    let key = key_of(ask)?;
    let (writing, fields) = Writing::read(ask, body, 1).await?;
    let new_name = new_name(fields.new_secret_name.as_deref(), &key)?;
    let done = writing.update(&key, new_name.as_ref(), fields.secret_value.as_ref()).await?;
    Ok(writing.shown(new_name.as_ref().unwrap_or(&key), &done).answer())
}

async fn delete(ask: &Ask<'_>, body: Incoming) -> Result<Answer, Problem> {
    let key = key_of(ask)?;
    let (writing, _) = Writing::read(ask, body, 1).await?;
    let done = writing.delete(&key).await?;
    Ok(writing.shown(&key, &done).answer())
}

/// The name that a secret is to have, where it is another one.
pub(super) fn new_name(name: Option<&str>, key: &SecretKey) -> Result<Option<SecretKey>, Problem> {
    let other = name.filter(|name| !name.is_empty() && *name != key.as_str());
    other.map(|name| name.parse().map_err(|_| Problem::invalid_key())).transpose()
}

/// A request that changes secrets of one tenant.
pub(super) struct Writing<'a> {
    ask: &'a Ask<'a>,
    folder: Folder,
}

/// A secret after its change, or before its deletion.
pub(super) struct Done {
    /// `None` where the token may not read it.
    value: Option<SecretValue>,
    version: Option<Version>,
    updated_at: Timestamp,
    tier: Tier,
}

impl<'a> Writing<'a> {
    /// Reads a request with up to so many values.
    pub(super) async fn read(ask: &'a Ask<'a>, body: Incoming, values: u64) -> Result<(Self, Fields), Problem> {
        let face = InfisicalApi::of(ask)?;
        // Before the body, which costs something.
        ask.grant.allow_action(Action::Write)?;
        // A byte may take six as an escape; the rest is for names and what is ignored.
        let limit = ask.service.limits().max_value.saturating_mul(6).saturating_add(values.saturating_mul(8 << 10));
        let fields = Fields::read(ask, body, limit).await?;
        fields.check(&face)?;
        let tenant = face.tenant(fields.path())?;
        let allowed = ask.grant.allow_tenant(Action::Write, tenant.as_str());
        allowed.map_err(|refused| Problem::from(refused).about(tenant.as_str(), ""))?;
        Ok((Self { ask, folder: face.folder(&tenant) }, fields))
    }

    fn tenant(&self) -> &Tenant {
        &self.folder.tenant
    }

    /// A secret as it is told after its change.
    pub(super) fn shown<'s>(&'s self, key: &'s SecretKey, done: &'s Done) -> Shown<'s> {
        Shown {
            folder: &self.folder,
            key,
            value: done.value.as_ref().map(SecretValue::expose),
            version: done.version,
            updated_at: done.updated_at,
        }
    }

    /// Makes a secret.
    pub(super) async fn create(&self, key: &SecretKey, value: &SecretValue) -> Result<Done, Problem> {
        self.allow(Action::Write, key)?;
        self.fits(value)?;
        let making = async {
            match self.put(key, value, Condition::IfNoneMatchAny).await {
                Err(WriteError::Conflict) => self.made_before(key, value).await,
                done => done.map_err(Problem::from),
            }
        };
        self.recorded("put", key, making).await
    }

    /// A secret that is there already. Only who may read it is told whether its value is the same.
    async fn made_before(&self, key: &SecretKey, value: &SecretValue) -> Result<Done, Problem> {
        self.allow(Action::Read, key).map_err(|_| Problem::already_exists())?;
        let found = self.find(key).await?.ok_or_else(Problem::already_exists)?;
        if found.value.as_ref().is_some_and(|found| found.same_as(value)) {
            return Ok(found);
        }
        Err(Problem::already_exists())
    }

    /// Changes a secret: its value, its name, or both. Where neither is asked for, nothing is.
    pub(super) async fn update(
        &self,
        key: &SecretKey,
        new_name: Option<&SecretKey>,
        value: Option<&SecretValue>,
    ) -> Result<Done, Problem> {
        self.allow(Action::Write, key)?;
        value.map_or(Ok(()), |value| self.fits(value))?;
        match (new_name, value) {
            (Some(new_name), _) => self.rename(key, new_name, value).await,
            (None, Some(value)) => {
                let changing = async {
                    match self.put(key, value, Condition::IfMatchAny).await {
                        Err(WriteError::Conflict) => Err(Problem::not_found()),
                        done => done.map_err(Problem::from),
                    }
                };
                self.recorded("put", key, changing).await
            }
            (None, None) => {
                let found = self.find(key).await.map_err(|problem| self.about(key, problem))?;
                let found = found.ok_or_else(|| self.about(key, Problem::not_found()))?;
                Ok(self.as_far_as_readable(key, found))
            }
        }
    }

    /// Makes the secret under its new name, and then deletes it under the old one, if it is still as it was
    /// read: it is never lost, and the same request goes on where it was interrupted.
    async fn rename(
        &self,
        key: &SecretKey,
        new_name: &SecretKey,
        value: Option<&SecretValue>,
    ) -> Result<Done, Problem> {
        self.allow(Action::Read, key)?;
        self.allow(Action::Write, new_name)?;
        let name = SecretName::of(self.tenant(), key);
        let resolved = self.ask.service.resolver.resolve(name, Want::Revalidated).await;
        let resolved = resolved.map_err(|error| self.about(key, error.into()))?;
        self.ask.saw(name, &resolved, self.ask.service.resolver.clock().moment());
        let found = resolved.answer().ok_or_else(|| self.about(key, Problem::not_found()))?;
        if found.refers() && value.is_none() {
            let why = "this secret's value has references, which would be lost; send secretValue with the new name";
            return Err(self.about(key, Problem::invalid_body(why)));
        }
        let value = value.cloned().unwrap_or_else(|| found.value());
        let done = self.create(new_name, &value).await?;
        // One that was written meanwhile stays, under the old name.
        let as_it_was = Condition::IfMatch(vec![found.bare_etag().to_owned()]);
        self.delete_where(key, &as_it_was, None).await?;
        Ok(done)
    }

    /// Deletes a secret, and tells it as it was.
    pub(super) async fn delete(&self, key: &SecretKey) -> Result<Done, Problem> {
        self.allow(Action::Write, key)?;
        let before = match self.allow(Action::Read, key) {
            // One that cannot be read can be deleted.
            Ok(()) => self.find(key).await.ok().flatten(),
            Err(_) => None,
        };
        self.delete_where(key, &Condition::None, before).await
    }

    async fn delete_where(
        &self,
        key: &SecretKey,
        condition: &Condition,
        before: Option<Done>,
    ) -> Result<Done, Problem> {
        let deleting = async {
            let ask = self.ask;
            let writer = ask.writer(self.tenant());
            let deleted = ask.service.resolver.delete(self.tenant(), key, condition, &writer).await?;
            let tier = deleted.ok_or_else(Problem::not_found)?;
            let updated_at = ask.service.resolver.clock().now();
            Ok(before.map_or(Done { value: None, version: None, updated_at, tier }, |before| Done { tier, ..before }))
        };
        self.recorded("delete", key, deleting).await
    }

    /// Whether there is such a secret, as far as may be told ahead: one that cannot be read may be there.
    pub(super) async fn is_there(&self, key: &SecretKey) -> Result<bool, Problem> {
        let name = SecretName::of(self.tenant(), key);
        match self.ask.service.resolver.resolve(name, Want::Cached).await {
            Ok(resolved) => Ok(resolved.answer().is_some()),
            Err(ResolveError::Unusable(_) | ResolveError::Unreadable) => Ok(true),
            Err(error) => Err(self.about(key, error.into())),
        }
    }

    /// Whether a path is that of the folder that is written to.
    pub(super) fn is_of(&self, path: &str) -> bool {
        self.folder.is_at(path)
    }

    /// A secret as it is now.
    async fn find(&self, key: &SecretKey) -> Result<Option<Done>, Problem> {
        let name = SecretName::of(self.tenant(), key);
        let resolved = self.ask.service.resolver.resolve(name, Want::Cached).await?;
        // The answer has its value.
        self.ask.saw(name, &resolved, self.ask.service.resolver.clock().moment());
        let tier = resolved.cache_status.answered_by;
        let found = |secret: &Secret| Done {
            value: Some(secret.value()),
            version: Some(secret.version),
            updated_at: secret.updated_at,
            tier,
        };
        Ok(resolved.answer().map(found))
    }

    async fn put(&self, key: &SecretKey, value: &SecretValue, condition: Condition) -> Result<Done, WriteError> {
        let (resolver, tenant) = (&self.ask.service.resolver, self.tenant());
        let writer = self.ask.writer(tenant);
        let written = resolver.put(tenant, key, value, &condition, &writer, NewTenant::Refused).await?;
        let value = Some(value.clone());
        Ok(Done { value, version: written.version, updated_at: written.updated_at, tier: written.tier })
    }

    async fn recorded(
        &self,
        action: &'static str,
        key: &SecretKey,
        change: impl Future<Output = Result<Done, Problem>>,
    ) -> Result<Done, Problem> {
        let done = self.ask.recorded(action, self.tenant(), key, change, |done| done.tier).await;
        let done = done.map_err(|problem| self.about(key, problem))?;
        let (token, tenant) = (&self.ask.grant.name, self.tenant());
        tracing::info!(%tenant, %key, token, peer = %self.ask.account.who.peer, action, "a secret was changed");
        Ok(done)
    }

    /// Checks what can be checked ahead of a change.
    pub(super) fn may_do(
        &self,
        key: &SecretKey,
        new_name: Option<&SecretKey>,
        value: Option<&SecretValue>,
    ) -> Result<(), Problem> {
        self.allow(Action::Write, key)?;
        if let Some(new_name) = new_name {
            self.allow(Action::Read, key)?;
            self.allow(Action::Write, new_name)?;
        }
        value.map_or(Ok(()), |value| self.fits(value))
    }

    fn allow(&self, action: Action, key: &SecretKey) -> Result<(), Problem> {
        let allowed = self.ask.grant.allow(action, self.tenant().as_str(), key.as_str());
        allowed.map_err(|refused| self.about(key, refused.into()))
    }

    fn as_far_as_readable(&self, key: &SecretKey, found: Done) -> Done {
        if self.allow(Action::Read, key).is_ok() { found } else { Done { value: None, ..found } }
    }

    fn fits(&self, value: &SecretValue) -> Result<(), Problem> {
        let fits = value.len() as u64 <= self.ask.service.limits().max_value;
        if fits { Ok(()) } else { Err(Problem::too_large()) }
    }

    pub(super) fn about(&self, key: &SecretKey, problem: Problem) -> Problem {
        problem.about(self.tenant().as_str(), key.as_str())
    }
}
