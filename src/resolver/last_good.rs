//! What of the resolver outlives it: given to the file of what was served last, and taken
//! back from there where the database does not answer at the start. Then the instance stands
//! alone: only what the file held is answered, for who owns a tenant is not known for sure,
//! until the database has told.

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
    last_good::{Contents, KeptSecret, LastGoodError, Record},
    phase::Phase,
    secret::{SecretName, SecretValue, Version},
    tenant::Tenant,
    tiers::{
        database::StoreError,
        memory::{Entry, Servable},
    },
};

/// How far a time may lie ahead that was saved by a clock that goes right.
pub const MAX_AHEAD: Duration = Duration::from_secs(60);

/// An entry that is taken back counts for so much older than it says: a copy in the database, from the same
/// reading of the folder, is then never taken for the older of the two.
const SLACK: Duration = Duration::from_secs(1);

/// What is known of the file, and whether anything else is answered from.
#[derive(Debug, Default)]
pub struct LastGood {
    is_alone: AtomicBool,
    /// When the last secret out of the file may not be served any more.
    until: Mutex<Option<Moment>>,
    /// Of the file that was read or written last; 0 where none was.
    written_at: AtomicI64,
    bytes: AtomicU64,
}

impl LastGood {
    /// Whether only what the file held is answered.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.is_alone.load(Ordering::Acquire)
    }

    /// Whether nothing that the file held may be served any more.
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
    /// What is to be kept, but for the tokens.
    ///
    /// The order makes it safe to take this back: what is known of shreddings and phases is
    /// looked at before the secrets, and not in the middle of a reading of them, which holds
    /// the same lock until what has changed is forgotten. So no secret is kept beside a
    /// shredding or a phase that should have made it go. One that is kept beside an older
    /// phase goes when the database tells the newer one.
    pub async fn contents(&self) -> Contents {
        // What changes from here on is asked for again.
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

    /// Answers only what is taken over from now on, until [`Self::rejoin`].
    pub fn stand_alone(&self) {
        self.last_good.is_alone.store(true, Ordering::Release);
    }

    /// Takes back one thing that was kept; tokens are not ours. Not for an async thread.
    /// Tells whether it is a secret that may be served.
    ///
    /// A secret is served no longer than the ages allow that are configured now, nor longer
    /// than was allowed when it was kept; and one whose time lies ahead is not served.
    ///
    /// # Errors
    /// What this program never wrote.
    pub fn take_over(&self, record: Record, value: &str) -> Result<bool, LastGoodError> {
        let damaged = |_| LastGoodError::Damaged;
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
                // By a clock that went wrong it might be worth asking again in a year.
                let longest = self.policies().default_ages().negative_ttl;
                let pause = Timestamp::from_millis(retry_at).since(self.clock.now()).min(longest);
                self.memory.deny(self.memory.fence(&tenant), &tenant, self.clock.running() + pause);
            }
            Record::Secret(secret) => return self.take_over_secret(&secret, value),
            Record::Token(_) => {}
        }
        Ok(false)
    }

    fn take_over_secret(&self, secret: &KeptSecret, value: &str) -> Result<bool, LastGoodError> {
        let (tenant, key) = secret.name()?;
        let version = Version::new(secret.version).ok_or(LastGoodError::Damaged)?;
        let policy = self.policies().of(&tenant, &key, self.own_phase(&tenant));
        let now = self.clock.moment();
        let [confirmed_at, servable_until] = [secret.confirmed_at, secret.servable_until].map(Timestamp::from_millis);
        if confirmed_at > now.wall().plus(MAX_AHEAD) {
            return Ok(false);
        }
        // The file is of another process: the wall clock is all that they have in common.
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
        self.last_good.note_servable(servable_until);
        Ok(true)
    }

    /// Answers from all tiers again, once the database has told what has changed: what the
    /// file held of secrets that were written or deleted since is forgotten, and of tenants
    /// that were shredded or changed hands; and who was denied meanwhile is denied here too.
    /// Everything else out of the file is stale, so that the database is asked before it is
    /// served.
    ///
    /// # Errors
    /// The database does not answer; this instance goes on alone.
    pub async fn rejoin(&self) -> Result<(), StoreError> {
        self.catch_up().await?;
        self.follow().await?;
        for tenant in self.database.denied().await? {
            self.memory.deny(self.memory.fence(&tenant), &tenant, self.clock.running());
        }
        // During an outage of which nobody knows what it has hidden.
        self.behind.note_doubt_of_all(self.clock.database_now());
        // Last: no answer from before is given after this.
        self.last_good.is_alone.store(false, Ordering::Release);
        Ok(())
    }

    /// Refuses what an instance that stands alone cannot answer.
    pub(super) fn not_alone(&self) -> Result<(), ResolveError> {
        if self.last_good.is_alone() { Err(ResolveError::Alone) } else { Ok(()) }
    }

    /// Answers from what the file held, and asks nobody.
    pub(super) fn resolve_alone(
        &self,
        name: SecretName<'_>,
        remembered: Option<Arc<Entry>>,
        why: ForwardReason,
    ) -> Result<Resolved, ResolveError> {
        if self.is_denied(name.tenant()) {
            return Err(ResolveError::Denied);
        }
        let entry = remembered.filter(|entry| entry.answer.is_some()).ok_or(ResolveError::Alone)?;
        self.metrics.count("secretier_stale_answers_total", &[("tier", "memory")]);
        Ok(Resolved { entry, cache_status: CacheStatus::stale_memory(why, &ResolveError::Alone) })
    }
}
