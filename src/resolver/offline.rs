//! The resolver's part of the offline copy: what is written to it, and what is taken back from it
//! where the database does not answer at the start. Then the instance is offline: it answers only
//! from the file, because the owner of a tenant is not known for sure until the database answers.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{CacheStatus, ForwardReason, ResolveError, Resolved, Resolver};
use crate::{
    answer::Answer,
    clock::{Confirmed, Moment, Timestamp},
    offline::{Contents, KeptSecret, OfflineError, Record},
    phase::Phase,
    secret::{SecretName, SecretValue, Version},
    tenant::Tenant,
    tiers::{
        database::StoreError,
        memory::{Entry, Servable},
    },
};

/// The furthest that a saved time may lie ahead if the clock that saved it was right.
pub const MAX_AHEAD: Duration = Duration::from_secs(60);

/// An entry that is taken back counts as older by this than it says, so that a copy in the
/// database from the same read of the folder is never taken for the older of the two.
const SLACK: Duration = Duration::from_secs(1);

/// The state of the file, and whether only the file is answered from.
#[derive(Debug, Default)]
pub struct OfflineCopy {
    is_offline: AtomicBool,
    /// When the last secret from the file may no longer be served.
    until: Mutex<Option<Moment>>,
    /// When the file that was read or written last was written; 0 where there was none.
    written_at: AtomicI64,
    bytes: AtomicU64,
}

impl OfflineCopy {
    /// Whether only secrets from the file are answered.
    #[must_use]
    pub fn is_offline(&self) -> bool {
        self.is_offline.load(Ordering::Acquire)
    }

    /// Whether no secret from the file may be served any more.
    #[must_use]
    pub fn is_over(&self, now: Moment) -> bool {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_none_or(|until| !now.is_before(until))
    }

    fn note_servable(&self, until: Moment) {
        let mut last = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| until.is_after(last)) {
            *last = Some(until);
        }
    }

    /// Notes that a file was read or written.
    pub fn note_file(&self, written_at: Timestamp, bytes: u64) {
        self.written_at.store(written_at.as_millis(), Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    /// The age and the length of the file that was read or written last.
    #[must_use]
    pub fn file(&self, now: Timestamp) -> Option<(Duration, u64)> {
        let written_at = self.written_at.load(Ordering::Relaxed);
        let age = now.since(Timestamp::from_millis(written_at));
        (written_at != 0).then(|| (age, self.bytes.load(Ordering::Relaxed)))
    }
}

impl Resolver {
    /// The content of the offline copy, except the tokens.
    ///
    /// The order makes it safe to take this back: the shreddings and phases are read before the
    /// secrets, and never in the middle of a read of them, which holds the same lock until the
    /// changed entries are forgotten. So no secret is kept beside a shredding or a phase that
    /// should have removed it. A secret that is kept beside an older phase is removed when the
    /// database tells the newer one.
    pub async fn contents(&self) -> Contents {
        // Changes from here on are read from the feed again.
        let followed = self.surely_followed();
        let following = self.following.lock().await;
        let phases = {
            let known = self.own_phases.read().unwrap_or_else(PoisonError::into_inner);
            known.iter().map(|(tenant, phase)| (Tenant::checked(tenant), phase)).collect()
        };
        let shredded = following.shredded;
        drop(following);
        let Servable { secrets, denied } = self.memory.servable();
        let now = self.clock.moment();
        let retried_at = |at: Duration| now.wall().plus(at.saturating_sub(now.running()));
        let denied = denied.into_iter().map(|(tenant, at)| (tenant, retried_at(at))).collect();
        Contents { gathered_at: now, followed, shredded, phases, denied, tokens: Vec::new(), secrets }
    }

    /// Answers only from what is taken over from now on, until [`Self::rejoin`].
    pub fn stand_alone(&self) {
        self.offline.is_offline.store(true, Ordering::Release);
    }

    /// Takes back one record of the file; tokens are not the resolver's. Blocks, so not for an
    /// async thread. Returns whether it is a secret that may be served.
    ///
    /// A secret is served no longer than the ages allow that are configured now, nor longer
    /// than was allowed when it was kept. A secret whose time lies ahead is not served.
    ///
    /// # Errors
    /// The record is nothing that this program writes.
    pub fn take_over(&self, record: Record, value: &str) -> Result<bool, OfflineError> {
        let damaged = |_| OfflineError::Damaged;
        match record {
            Record::Followed { number } => self.note_followed(number),
            Record::Shredded { at } => self.following.blocking_lock().shredded = Some(Timestamp::from_millis(at)),
            Record::Phase { tenant, phase } => {
                let mut phases = self.own_phases.write().unwrap_or_else(PoisonError::into_inner);
                let tenant: Tenant = tenant.parse().map_err(damaged)?;
                phases.set(tenant.as_str(), Some(phase));
            }
            Record::Denied { tenant, retry_at } => {
                let tenant = tenant.parse().map_err(damaged)?;
                // A clock that was wrong may have saved a time a year ahead.
                let longest = self.policies().default_ages().negative_ttl;
                let pause = Timestamp::from_millis(retry_at).since(self.clock.now()).min(longest);
                self.memory.deny(self.memory.fence(&tenant), &tenant, self.clock.running() + pause);
            }
            Record::Secret(secret) => return self.take_over_secret(&secret, value),
            Record::Token(_) => {}
        }
        Ok(false)
    }

    fn take_over_secret(&self, secret: &KeptSecret, value: &str) -> Result<bool, OfflineError> {
        let (tenant, key) = secret.name()?;
        let version = Version::new(secret.version).ok_or(OfflineError::Damaged)?;
        let policy = self.policies().of(&tenant, &key, self.own_phase(&tenant));
        let now = self.clock.moment();
        let [confirmed_at, servable_until] = [secret.confirmed_at, secret.servable_until].map(Timestamp::from_millis);
        if confirmed_at > now.wall().plus(MAX_AHEAD) {
            return Ok(false);
        }
        // The file is from another process, which shares only the wall clock with this one.
        let age = now.wall().since(confirmed_at) + SLACK;
        let confirmed_at = Confirmed { moment: now.minus(age), ..self.clock.confirmed_now() };
        let allowed = confirmed_at.moment.plus(policy.ages.memory_max_stale);
        let servable_until = allowed.sooner(now.plus(servable_until.since(now.wall())));
        if !now.is_before(servable_until) {
            return Ok(false);
        }
        let updated_at = Timestamp::from_millis(secret.updated_at);
        let value = SecretValue::new(value.to_owned());
        let answer = Answer::new(&tenant, key.clone(), &value, version, updated_at, &secret.etag);
        // Never fresh: once there are other tiers, they are asked before it is served again.
        let entry =
            Arc::new(Entry { answer: Some(answer), confirmed_at, loaded_at: now, fresh_until: now, servable_until });
        let fence = self.memory.fence(&tenant);
        if policy.phase == Phase::Database {
            self.memory.fill_owned(fence, &tenant, &key, entry);
        } else {
            self.memory.fill(fence, &tenant, &key, entry);
        }
        self.offline.note_servable(servable_until);
        Ok(true)
    }

    /// Answers from all tiers again, once the database has told what has changed. Entries from the
    /// file are forgotten if their secrets were written or deleted since, or if their tenants were
    /// shredded or moved to another owner. A tenant that was denied meanwhile is denied here too.
    /// Everything else from the file is stale, so that the database is asked before it is served.
    ///
    /// # Errors
    /// The database does not answer; this instance stays offline.
    pub async fn rejoin(&self) -> Result<(), StoreError> {
        self.catch_up().await?;
        self.follow().await?;
        for tenant in self.database.denied().await? {
            self.memory.deny(self.memory.fence(&tenant), &tenant, self.clock.running());
        }
        // Nobody knows what happened unseen during the outage.
        self.behind.note_doubt_of_all(self.clock.database_now());
        // Last: no answer from the offline state is given after this.
        self.offline.is_offline.store(false, Ordering::Release);
        Ok(())
    }

    /// Refuses a request that an offline instance cannot answer.
    pub(super) fn not_alone(&self) -> Result<(), ResolveError> {
        if self.offline.is_offline() { Err(ResolveError::Offline) } else { Ok(()) }
    }

    /// Answers from the entries of the file, and asks no tier.
    pub(super) fn resolve_alone(
        &self,
        name: SecretName<'_>,
        remembered: Option<Arc<Entry>>,
        why: ForwardReason,
    ) -> Result<Resolved, ResolveError> {
        if self.is_denied(name.tenant()) {
            return Err(self.denial(name.tenant()));
        }
        let entry = remembered.filter(|entry| entry.answer.is_some()).ok_or(ResolveError::Offline)?;
        self.metrics.count("secretier_stale_answers_total", &[("tier", "memory")]);
        Ok(Resolved { entry, cache_status: CacheStatus::stale_memory(why, &ResolveError::Offline) })
    }
}
