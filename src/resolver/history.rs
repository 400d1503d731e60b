//! The versions that a secret has had, where the database keeps them.

use std::sync::Arc;

use super::{
    CacheStatus, ForwardReason, PolicySnapshot, ResolveError, Resolved, Resolver, Want, references::is_upstreams,
};
use crate::{
    phase::Phase,
    policy::{Policies, Policy},
    secret::{SecretName, Version},
    tiers::{
        database::{Company, Held, Revision, Source},
        memory::Entry,
    },
};

impl Resolver {
    /// One version of a secret, from the database: never kept in memory. It is as old as the
    /// knowledge of the newest version, and is refused wherever the newest is: after a denial, in
    /// an outage beyond `max_stale`, for a row that does not open.
    ///
    /// # Errors
    /// Neither that version nor proof that it is not kept can be had.
    pub async fn resolve_version(
        self: &Arc<Self>,
        name: SecretName<'_>,
        number: Version,
        want: Want,
    ) -> Result<Resolved, ResolveError> {
        self.not_alone()?;
        let tenant = name.to_owned().0;
        self.with_stable_policy(&tenant, |policy_snapshot| self.resolve_version_by(policy_snapshot, name, number, want))
            .await
    }

    async fn resolve_version_by(
        self: &Arc<Self>,
        PolicySnapshot { policies, .. }: PolicySnapshot,
        name: SecretName<'_>,
        number: Version,
        want: Want,
    ) -> Result<Resolved, ResolveError> {
        let newest = self.resolve(name, want).await?;
        let (tenant, key) = name.to_owned();
        let expected = policies.of(&tenant, &key, self.own_phase(&tenant));
        let is_newest = newest.answer().is_some_and(|answer| answer.version == number);
        match expected.phase {
            Phase::Infisical if is_newest => return Ok(newest),
            Phase::Infisical => return Ok(self.no_version(expected, &newest, newest.cache_status)),
            Phase::Database if is_newest => return Ok(newest),
            // Where the database does not answer, a copy bears upstream's number instead of ours.
            Phase::Database | Phase::Hybrid => {}
        }
        let found = self.database.find_version(&tenant, &key, number).await.map_err(Arc::new)?;
        let policy = speaks_of(&policies, name, found.company.as_ref())?;
        let cache_status = CacheStatus::database(ForwardReason::Miss, policy.ages.ttl);
        match found.copy {
            Held::Present(stored) if is_orphan(policy, &newest, stored.source) => {
                Ok(self.no_version(policy, &newest, cache_status))
            }
            Held::Present(stored) if policy.phase.reads_database() => {
                // A value that the database owns is plain text: it refers to nothing.
                let stored = match policy.phase.owned_upstream() {
                    true => {
                        let own = found.company.as_ref().and_then(|company| company.phase);
                        let is_upstreams = is_upstreams(&policies, &tenant, own);
                        self.resolve_older(&tenant, &key, stored, is_upstreams).await?
                    }
                    false => stored,
                };
                let answer = stored.into_answer(&tenant, &key);
                let entry = Entry::new(Some(answer), newest.entry.confirmed_at, self.clock.moment(), policy.ages);
                Ok(Resolved { entry: Arc::new(entry), cache_status })
            }
            Held::Unreadable(_) if policy.phase.reads_database() => Err(ResolveError::Unreadable),
            Held::Present(_) | Held::Unreadable(_) | Held::Absent | Held::Unknown | Held::Unusable(_) => {
                Ok(self.no_version(policy, &newest, cache_status))
            }
        }
    }

    /// The kept versions of a secret, newest first; empty where it is proved that there is no
    /// such secret. Refused wherever the newest version is.
    ///
    /// # Errors
    /// Neither a list nor that proof can be had.
    pub async fn versions(self: &Arc<Self>, name: SecretName<'_>) -> Result<Vec<Revision>, ResolveError> {
        self.not_alone()?;
        let tenant = name.to_owned().0;
        self.with_stable_policy(&tenant, |policy_snapshot| self.versions_by(policy_snapshot, name)).await
    }

    async fn versions_by(
        self: &Arc<Self>,
        PolicySnapshot { policies, .. }: PolicySnapshot,
        name: SecretName<'_>,
    ) -> Result<Vec<Revision>, ResolveError> {
        let newest = self.resolve(name, Want::Cached).await?;
        let (tenant, key) = name.to_owned();
        let only = || {
            let answer = newest.answer()?;
            Some(Revision {
                version: answer.version,
                created_at: answer.updated_at,
                source: Source::Infisical,
                written_by: None,
                is_deletion: false,
                is_current: true,
            })
        };
        if policies.of(&tenant, &key, self.own_phase(&tenant)).phase == Phase::Infisical {
            return Ok(only().into_iter().collect());
        }
        let (company, mut revisions) = self.database.versions(&tenant, &key).await.map_err(Arc::new)?;
        let policy = speaks_of(&policies, name, company.as_ref())?;
        revisions.retain(|revision| revision.is_deletion || !is_orphan(policy, &newest, revision.source));
        match policy.phase {
            Phase::Database => Ok(revisions),
            Phase::Hybrid if !revisions.is_empty() => Ok(revisions),
            // A copy that is being written back behind the answer is not there yet.
            Phase::Hybrid | Phase::Infisical => Ok(only().into_iter().collect()),
        }
    }

    fn no_version(&self, policy: Policy, newest: &Resolved, cache_status: CacheStatus) -> Resolved {
        let entry = Entry::new(None, newest.entry.confirmed_at, self.clock.moment(), policy.ages);
        Resolved { entry: Arc::new(entry), cache_status }
    }
}

/// The secret's policy by its tenant's row; an error where the row says that another instance
/// was denied.
fn speaks_of(policies: &Policies, name: SecretName<'_>, company: Option<&Company>) -> Result<Policy, ResolveError> {
    let (tenant, key) = name.to_owned();
    let policy = policies.of(&tenant, &key, company.and_then(|company| company.phase));
    let is_denied = company.is_some_and(|company| company.denied_at.is_some());
    if policy.phase.owned_upstream() && is_denied {
        Err(ResolveError::Denied { retry_after: None })
    } else {
        Ok(policy)
    }
}

/// Whether a value from this source is a copy of a secret that upstream has deleted: it is still
/// in the database only because the snapshot that proved it is not written back yet.
fn is_orphan(policy: Policy, newest: &Resolved, source: Source) -> bool {
    policy.phase == Phase::Hybrid && newest.answer().is_none() && source == Source::Infisical
}
