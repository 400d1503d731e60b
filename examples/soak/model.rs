//! What may be answered.
//!
//! Every value is written once. One writer at a time changes a secret, so its changes have
//! an order; a change that was not acknowledged may take effect until [`UNKNOWN`] later. A
//! value may be answered unless a change after it must be known where it was asked for; and
//! unless the same instance has answered a later one before it was asked.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

/// Nothing older than this is served: `max_stale` of both tiers in the configuration.
pub(crate) const MAX_STALE: Duration = Duration::from_secs(30);
/// How long a change may take effect that nobody acknowledged: a statement that was frozen
/// with the database, and the instance's own patience.
const UNKNOWN: Duration = Duration::from_secs(45);
/// How long after a fault of the database is over an instance may still be without it.
const RECOVERY: Duration = Duration::from_secs(8);
/// What answers and their `Age` are rounded by, and the way to us.
const MARGIN: Duration = Duration::from_secs(2);

/// Tenants that Infisical owns, and those that the database does.
pub(crate) const HYBRID: [&str; 6] = ["h0", "h1", "h2", "h3", "h4", "h5"];
pub(crate) const OWNED: [&str; 6] = ["d0", "d1", "d2", "d3", "d4", "d5"];
/// Of each six, the first are only read: their copies may never be missed.
pub(crate) const QUIET: usize = 2;
pub(crate) const KEYS: [&str; 4] = ["A", "B", "C", "D"];

/// Who changed a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// An instance, on request.
    Instance(usize),
    /// Somebody in Infisical itself.
    Infisical,
}

#[derive(Debug, Clone)]
struct Change {
    /// Nothing where it is a deletion.
    value: Option<String>,
    by: By,
    began: Instant,
    /// When it was acknowledged; nothing where nobody knows.
    acknowledged: Option<Instant>,
}

#[derive(Default)]
struct Secret {
    changes: Vec<Change>,
    /// Values that were drawn.
    drawn: usize,
    /// By instance: since when a copy is in its memory, by what the last answer told.
    confirmed: HashMap<usize, Instant>,
    /// By instance: when which change was answered, as they grow later.
    answered: HashMap<usize, Vec<(Instant, usize)>>,
}

/// Answers of one instance that are remembered of a secret.
const ANSWERS: usize = 64;

impl Secret {
    /// The latest change that an instance had answered by then.
    fn answered_before(&self, instance: usize, asked: Instant) -> Option<usize> {
        let answered = self.answered.get(&instance)?;
        answered.iter().filter(|(at, _)| *at < asked).map(|(_, change)| *change).max()
    }

    fn note_answer(&mut self, instance: usize, change: usize) {
        let answered = self.answered.entry(instance).or_default();
        if answered.last().is_none_or(|(_, last)| *last < change) {
            answered.push((Instant::now(), change));
            if answered.len() > ANSWERS {
                answered.remove(0);
            }
        }
    }
}

/// How long after it was superseded the oldest value was served.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Oldest {
    pub(crate) by_same_instance: Duration,
    pub(crate) by_others: Duration,
    pub(crate) after_infisical: Duration,
}

pub(crate) struct Model {
    secrets: HashMap<(String, String), Mutex<Secret>>,
    turns: HashMap<(String, String), tokio::sync::Mutex<()>>,
    others_within: Duration,
    /// When the database was in trouble; the last may go on.
    trouble: Mutex<Vec<(Instant, Option<Instant>)>>,
    /// When each instance was last started.
    started: Mutex<HashMap<usize, Instant>>,
    /// When the wall clock of each was last set ahead; nothing while it is.
    set_ahead: Mutex<HashMap<usize, Option<Instant>>>,
    oldest: Mutex<HashMap<&'static str, Oldest>>,
}

impl Model {
    pub(crate) fn new(others_within: Duration) -> Self {
        let names = || {
            let tenants = HYBRID.into_iter().chain(OWNED);
            tenants.flat_map(|tenant| KEYS.map(|key| (tenant.to_owned(), key.to_owned())))
        };
        Self {
            secrets: names().map(|name| (name, Mutex::default())).collect(),
            turns: names().map(|name| (name, tokio::sync::Mutex::default())).collect(),
            others_within,
            trouble: Mutex::default(),
            started: Mutex::default(),
            set_ahead: Mutex::default(),
            oldest: Mutex::default(),
        }
    }

    /// The right to change a secret.
    pub(crate) async fn turn(&self, tenant: &str, key: &str) -> tokio::sync::MutexGuard<'_, ()> {
        self.turns[&(tenant.to_owned(), key.to_owned())].lock().await
    }

    /// A value that was never written before.
    pub(crate) fn next_value(&self, tenant: &str, key: &str) -> String {
        let mut secret = self.secret(tenant, key);
        secret.drawn += 1;
        format!("{tenant}/{key}/{}", secret.drawn)
    }

    /// Notes a change before it is begun.
    pub(crate) fn begin(&self, tenant: &str, key: &str, value: Option<String>, by: By) {
        let change = Change { value, by, began: Instant::now(), acknowledged: None };
        self.secret(tenant, key).changes.push(change);
    }

    /// Notes that the last change was done.
    pub(crate) fn acknowledge(&self, tenant: &str, key: &str) {
        self.secret(tenant, key).changes.last_mut().unwrap().acknowledged = Some(Instant::now());
    }

    /// Notes that the last change was not begun.
    pub(crate) fn refuse(&self, tenant: &str, key: &str) {
        self.secret(tenant, key).changes.pop();
    }

    pub(crate) fn database_fails(&self) {
        lock(&self.trouble).push((Instant::now(), None));
    }

    pub(crate) fn database_is_back(&self) {
        if let Some((_, end)) = lock(&self.trouble).last_mut() {
            *end = Some(Instant::now());
        }
    }

    pub(crate) fn started(&self, instance: usize) {
        lock(&self.started).insert(instance, Instant::now());
        for secret in self.secrets.values() {
            let mut secret = lock(secret);
            secret.confirmed.remove(&instance);
            secret.answered.remove(&instance);
        }
    }

    /// Notes that the wall clock of an instance is about to be set ahead: all that it has is
    /// older by that, and may be too old.
    pub(crate) fn clock_goes_ahead(&self, instance: usize) {
        lock(&self.set_ahead).insert(instance, None);
        for secret in self.secrets.values() {
            lock(secret).confirmed.remove(&instance);
        }
    }

    /// Notes that it was: what is confirmed from now on has an age by the clock as it is.
    pub(crate) fn clock_went_ahead(&self, instance: usize) {
        lock(&self.set_ahead).insert(instance, Some(Instant::now()));
    }

    pub(crate) fn is_calm_since(&self, moment: Instant) -> bool {
        let over = |end: &Option<Instant>| end.is_some_and(|end| end + RECOVERY < moment);
        lock(&self.trouble).iter().all(|(_, end)| over(end))
    }

    /// What is wrong with an answer to who asked at `asked`, where anything is.
    pub(crate) fn check(
        &self,
        instance: usize,
        name: (&str, &str),
        asked: Instant,
        value: Option<&str>,
    ) -> Option<String> {
        let (tenant, key) = name;
        let mut secret = self.secret(tenant, key);
        // Deletions look alike: it may be the last.
        let found = secret.changes.iter().rposition(|change| change.value.as_deref() == value);
        let Some(at) = found else {
            return Some(format!("{tenant}/{key}: instance {instance} answered {value:?}, which it never was"));
        };
        let change = &secret.changes[at];
        let latest = change.acknowledged.unwrap_or(change.began + UNKNOWN);
        for later in &secret.changes[at + 1..] {
            let Some(done) = later.acknowledged.filter(|_| later.began >= latest) else { continue };
            if done < asked {
                self.note(tenant, instance, later.by, asked - done);
            }
            let known = match later.by {
                By::Instance(by) if by == instance => done,
                By::Instance(_) => self.known_to_others(done),
                By::Infisical => done + MAX_STALE + MARGIN,
            };
            if asked > known {
                let after = asked - done;
                return Some(format!(
                    "{tenant}/{key}: instance {instance} answered {value:?} {after:?} after {:?} by {:?} was acknowledged",
                    later.value, later.by
                ));
            }
        }
        if let Some(before) = secret.answered_before(instance, asked).filter(|before| *before > at) {
            let before = &secret.changes[before];
            if before.began >= latest {
                return Some(format!(
                    "{tenant}/{key}: instance {instance} answered {value:?}, after it had answered {:?} by {:?}",
                    before.value, before.by
                ));
            }
        }
        // Of deletions that look alike, it may be the first.
        let first = secret.changes.iter().position(|change| change.value.as_deref() == value);
        secret.note_answer(instance, first.unwrap_or(at));
        None
    }

    /// When all instances must know of what was done then.
    fn known_to_others(&self, done: Instant) -> Instant {
        let mut known = done + self.others_within;
        for (begin, end) in lock(&self.trouble).iter() {
            let end = end.map_or(known + MAX_STALE, |end| end + RECOVERY);
            if *begin < known && end > done {
                known = known.max(end + self.others_within);
            }
        }
        known.min(done + MAX_STALE + MARGIN)
    }

    fn note(&self, tenant: &str, instance: usize, by: By, after: Duration) {
        let owner = owner(tenant);
        let mut all = lock(&self.oldest);
        let oldest = all.entry(owner).or_default();
        let longest = match by {
            By::Instance(by) if by == instance => &mut oldest.by_same_instance,
            By::Instance(_) => &mut oldest.by_others,
            By::Infisical => &mut oldest.after_infisical,
        };
        *longest = after.max(*longest);
    }

    pub(crate) fn oldest(&self, owner: &str) -> Oldest {
        lock(&self.oldest).get(owner).copied().unwrap_or_default()
    }

    /// Notes that an instance answered from memory, with a copy of this age.
    pub(crate) fn has_copy(&self, instance: usize, name: (&str, &str), asked: Instant, age: Duration) {
        let Some(confirmed) = asked.checked_sub(age + Duration::from_secs(1)) else { return };
        let mut secret = self.secret(name.0, name.1);
        // Its age was told before the clock was set.
        let is_older = |set: &Option<Instant>| set.is_none_or(|set| asked <= set);
        if !lock(&self.set_ahead).get(&instance).is_some_and(is_older) {
            secret.confirmed.insert(instance, confirmed);
        }
    }

    /// Whether an instance that answered nothing had a copy in memory that it might have
    /// served: it had one, it is not too old, and nobody has changed the tenant since.
    pub(crate) fn had_copy(&self, instance: usize, name: (&str, &str), answered: Instant) -> bool {
        let Some(confirmed) = self.secret(name.0, name.1).confirmed.get(&instance).copied() else { return false };
        let changed = |key: &&str| {
            let secret = self.secret(name.0, key);
            secret.changes.iter().any(|change| change.acknowledged.is_none_or(|done| done + UNKNOWN > confirmed))
        };
        confirmed + MAX_STALE > answered + MARGIN && !KEYS.iter().any(changed)
    }

    fn secret(&self, tenant: &str, key: &str) -> MutexGuard<'_, Secret> {
        lock(&self.secrets[&(tenant.to_owned(), key.to_owned())])
    }
}

pub(crate) fn owner(tenant: &str) -> &'static str {
    if tenant.starts_with('h') { "infisical" } else { "database" }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}
