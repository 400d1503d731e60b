//! What is counted rather than recorded one by one: accesses that are alike, summed up
//! over a short time.

use std::{
    hash::{BuildHasher as _, Hash as _, Hasher as _},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use hashbrown::{DefaultHashBuilder, HashTable};

use super::{
    Fields, NO_FIELDS,
    record::{Actor, Detail, Kind, Outcome, Record},
};
use crate::{
    access::{Grant, Peer},
    clock::Timestamp,
};

/// One access, as it is counted: everything but the time tells which sum it belongs to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight<'a> {
    pub(super) kind: Kind,
    pub(super) grant: Option<&'a Arc<Grant>>,
    pub(super) action: &'static str,
    /// Empty where none was named.
    pub(super) tenant: &'a str,
    /// Empty where none was named.
    pub(super) key: &'a str,
    pub(super) outcome: Outcome,
    pub(super) tier: Option<&'static str>,
    pub(super) code: Option<&'static str>,
    /// Nothing where more was summed up than can be kept apart; then neither tenant nor key
    /// is named.
    pub(super) origin: Option<Origin<'a>>,
}

/// Where an access came from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin<'a> {
    pub(super) peer: Peer,
    pub(super) agent: &'a [u8],
    pub(super) fields: &'a Fields,
}

/// A sum of accesses that are alike.
#[derive(Debug)]
pub(super) struct Sum {
    kind: Kind,
    grant: Option<Arc<Grant>>,
    action: &'static str,
    tenant: Box<str>,
    key: Box<str>,
    outcome: Outcome,
    tier: Option<&'static str>,
    code: Option<&'static str>,
    origin: Option<(Peer, Box<[u8]>, Fields)>,
    times: Times,
}

/// How often, and from when to when.
#[derive(Debug, Clone, Copy)]
struct Times {
    count: u64,
    first_at: Timestamp,
    last_at: Timestamp,
}

/// The sums since they were last taken.
///
/// An access is added under its shard's lock, and sums are taken under the same lock: it is
/// in what was taken or in what is left, never in both or neither. Shards are taken one
/// after the other, so sums of one taking may end at different moments; the next ones begin
/// where they end.
///
/// Bounded: beyond `capacity` sums, an access is added to one that tells neither tenant,
/// key nor origin. Of those there are at most as many as tokens, actions and outcomes give.
pub(super) struct Window {
    shards: Box<[Mutex<HashTable<Sum>>]>,
    hasher: DefaultHashBuilder,
    len: AtomicUsize,
    capacity: usize,
}

const SHARDS: usize = 16;

impl Window {
    pub(super) fn new(capacity: usize) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, hasher: DefaultHashBuilder::default(), len: AtomicUsize::new(0), capacity }
    }

    /// Sums that are kept.
    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Counts one access.
    pub(super) fn add(&self, sight: Sight<'_>, at: Timestamp) {
        self.put(sight, Times { count: 1, first_at: at, last_at: at });
    }

    /// Counts a record that cannot be kept by itself, as an access that is like it would be.
    pub(super) fn fold(&self, record: &Record) {
        let Record { kind, grant, action, outcome, tier, detail, .. } = record;
        let (tenant, key, agent, fields) = match (kind, detail.peer) {
            // Of what who is denied sent, nothing that would make one sum of each.
            (Kind::Denial, _) | (_, None) => ("", "", "", &NO_FIELDS),
            _ => {
                let [tenant, key, agent] =
                    [&record.tenant, &record.key, &detail.agent].map(|text| text.as_deref().unwrap_or_default());
                (tenant, key, agent, &detail.fields)
            }
        };
        let origin = detail.peer.map(|peer| Origin { peer, agent: agent.as_bytes(), fields });
        let (grant, code) = (grant.as_ref(), detail.code);
        let (kind, outcome, tier) = (*kind, *outcome, *tier);
        let times = Times { count: record.count, first_at: record.first_at, last_at: record.at };
        self.put(Sight { kind, grant, action, tenant, key, outcome, tier, code, origin }, times);
    }

    /// Takes what was counted.
    pub(super) fn take(&self) -> Vec<Sum> {
        let mut taken = Vec::with_capacity(self.len());
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            self.len.fetch_sub(shard.len(), Ordering::Relaxed);
            taken.extend(shard.drain());
        }
        taken
    }

    /// Puts back what was taken and could not be written.
    pub(super) fn give_back(&self, sums: impl IntoIterator<Item = Sum>) {
        sums.into_iter().for_each(|sum| self.put(sum.sight(), sum.times));
    }

    fn put(&self, sight: Sight<'_>, times: Times) {
        let is_named = sight.origin.is_some();
        if self.put_into(sight, times, !is_named || self.len() < self.capacity) {
            return;
        }
        self.put_into(Sight { tenant: "", key: "", origin: None, ..sight }, times, true);
    }

    /// Adds to the sum, which is made where it may be; tells whether it was added.
    fn put_into(&self, sight: Sight<'_>, times: Times, may_grow: bool) -> bool {
        let hash = self.hash(&sight);
        // The table itself goes by the low bits and the highest seven.
        let shard = usize::try_from((hash >> 40) % SHARDS as u64).unwrap_or(0);
        let mut shard = self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sum) = shard.find_mut(hash, |sum| sum.is_of(&sight)) {
            sum.times = sum.times.and(times);
            return true;
        }
        if may_grow {
            shard.insert_unique(hash, Sum::new(&sight, times), |sum| self.hash(&sum.sight()));
            self.len.fetch_add(1, Ordering::Relaxed);
        }
        may_grow
    }

    fn hash(&self, sight: &Sight<'_>) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(sight.key.as_bytes());
        hasher.write(sight.tenant.as_bytes());
        hasher.write(sight.grant.map_or(&[], |grant| grant.id.as_bytes()));
        hasher.write(sight.action.as_bytes());
        hasher.write_u8(sight.outcome as u8);
        if let Some(Origin { peer, agent, fields }) = &sight.origin {
            // Whatever callers choose must tell sums apart here, or one bucket holds them all.
            peer.hash(&mut hasher);
            hasher.write(agent);
            for (name, value) in fields.iter() {
                hasher.write(name.as_bytes());
                hasher.write(value.as_bytes());
            }
        }
        hasher.finish()
    }
}

impl Times {
    fn and(self, more: Self) -> Self {
        Self {
            count: self.count + more.count,
            first_at: self.first_at.min(more.first_at),
            last_at: self.last_at.max(more.last_at),
        }
    }
}

impl Sum {
    fn new(sight: &Sight<'_>, times: Times) -> Self {
        Self {
            kind: sight.kind,
            grant: sight.grant.cloned(),
            action: sight.action,
            tenant: sight.tenant.into(),
            key: sight.key.into(),
            outcome: sight.outcome,
            tier: sight.tier,
            code: sight.code,
            origin: sight.origin.map(|origin| (origin.peer, origin.agent.into(), origin.fields.clone())),
            times,
        }
    }

    fn sight(&self) -> Sight<'_> {
        Sight {
            kind: self.kind,
            grant: self.grant.as_ref(),
            action: self.action,
            tenant: &self.tenant,
            key: &self.key,
            outcome: self.outcome,
            tier: self.tier,
            code: self.code,
            origin: self.origin.as_ref().map(|(peer, agent, fields)| Origin { peer: *peer, agent, fields }),
        }
    }

    fn is_of(&self, sight: &Sight<'_>) -> bool {
        let same_grant = match (&self.grant, sight.grant) {
            // Mostly it is the same one; read again meanwhile, it has the same id.
            (Some(one), Some(other)) => Arc::ptr_eq(one, other) || one.id == other.id,
            (one, other) => one.is_none() && other.is_none(),
        };
        let same_origin = match (&self.origin, &sight.origin) {
            (None, None) => true,
            (Some((peer, agent, fields)), Some(origin)) => {
                *peer == origin.peer && **agent == *origin.agent && fields == origin.fields
            }
            _ => false,
        };
        same_origin
            && *self.key == *sight.key
            && *self.tenant == *sight.tenant
            && same_grant
            && (self.kind, self.action, self.outcome) == (sight.kind, sight.action, sight.outcome)
            && (self.tier, self.code) == (sight.tier, sight.code)
    }

    /// The record of it.
    pub(super) fn record(&self) -> Record {
        let named = |name: &str| (!name.is_empty()).then(|| name.to_owned());
        let mut detail = Detail { code: self.code, summed: self.origin.is_none(), ..Detail::default() };
        if let Some((peer, agent, fields)) = &self.origin {
            detail.peer = Some(*peer);
            detail.agent = super::agent_text(agent);
            detail.fields = fields.clone();
        }
        Record {
            kind: self.kind,
            first_at: self.times.first_at,
            at: self.times.last_at,
            count: self.times.count,
            actor: self.grant.as_deref().map(Actor::from),
            grant: self.grant.clone(),
            action: self.action,
            tenant: named(&self.tenant),
            key: named(&self.key),
            outcome: self.outcome,
            tier: self.tier,
            detail,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{Action, NewToken};

    fn grant(name: &str) -> Arc<Grant> {
        let every = || vec!["*".to_owned()];
        let actions = vec![Action::Read];
        let new = NewToken { name: name.to_owned(), tenants: every(), keys: every(), actions, lifetime: None };
        let (_, row) = new.draw(Timestamp::from_millis(0)).unwrap();
        Arc::new(Grant::from_row(row, Arc::default()).unwrap())
    }

    fn hit<'a>(grant: &'a Arc<Grant>, key: &'a str, fields: &'a Fields) -> Sight<'a> {
        Sight {
            kind: Kind::Lookup,
            grant: Some(grant),
            action: "read",
            tenant: "acme",
            key,
            outcome: Outcome::Found,
            tier: Some("memory"),
            code: None,
            origin: Some(Origin { peer: Peer::Ip([127, 0, 0, 1].into()), agent: b"test", fields }),
        }
    }

    #[test]
    fn a_million_hits_by_twenty_over_fifty_keys_add_up_while_windows_end() {
        const EACH: usize = 1_000_000 / 20 / 50;
        let window = Window::new(50_000);
        let (grants, fields) =
            ((0..20).map(|number| grant(&number.to_string())).collect::<Vec<_>>(), Fields::default());
        let keys: Vec<String> = (0..50).map(|number| format!("KEY_{number}")).collect();
        let done = std::sync::atomic::AtomicBool::new(false);
        let mut taken = Vec::new();
        std::thread::scope(|threads| {
            let (done, window, keys, fields) = (&done, &window, &keys, &fields);
            let adding = grants.iter().map(|grant| {
                threads.spawn(move || {
                    for at in 0..EACH {
                        let at = Timestamp::from_millis(at as i64);
                        keys.iter().for_each(|key| window.add(hit(grant, key, fields), at));
                    }
                })
            });
            let adding: Vec<_> = adding.collect();
            let taking = threads.spawn(move || {
                let mut windows = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let mut sums = window.take();
                    // One that could not be written comes back, beside what was added meanwhile.
                    if windows.len() % 3 == 0 {
                        window.give_back(std::mem::take(&mut sums));
                    }
                    windows.push(sums);
                }
                windows
            });
            adding.into_iter().for_each(|adding| adding.join().unwrap());
            done.store(true, Ordering::Relaxed);
            taken = taking.join().unwrap();
        });
        taken.push(window.take());
        assert!(taken.iter().all(|sums| sums.len() <= 20 * 50), "one a token, key and window at most");
        assert_eq!(taken.iter().flatten().map(|sum| sum.times.count).sum::<u64>(), 1_000_000);
        for grant in &grants {
            let of_this =
                taken.iter().flatten().filter(|sum| sum.grant.as_ref().is_some_and(|found| found.id == grant.id));
            assert_eq!(of_this.map(|sum| sum.times.count).sum::<u64>(), 50_000);
        }
        assert_eq!(window.len(), 0);
    }

    #[test]
    fn sums_that_callers_can_tell_apart_lie_in_different_buckets() {
        let (window, grant) = (Window::new(10), grant("api"));
        let users = (0..100).map(|user| Fields([("user".to_owned(), user.to_string())].into()));
        let users: Vec<Fields> = users.collect();
        let hashes: std::collections::HashSet<u64> =
            users.iter().map(|fields| window.hash(&hit(&grant, "KEY", fields))).collect();
        assert_eq!(hashes.len(), 100);
    }

    #[test]
    fn a_record_is_counted_by_who_and_where_from_and_by_its_names_unless_it_is_a_denial() {
        let window = Window::new(10);
        let grant = grant("api");
        let peer = Peer::Ip([127, 0, 0, 1].into());
        for kind in [Kind::Lookup, Kind::Denial] {
            for number in 0..3 {
                let mut record = Record::example(kind, "KEY", Outcome::Found);
                record.grant = Some(Arc::clone(&grant));
                record.detail.peer = Some(peer);
                record.detail.agent = Some(if kind == Kind::Denial { format!("{number}") } else { "test".to_owned() });
                window.fold(&record);
            }
        }
        let mut records: Vec<Record> = window.take().iter().map(Sum::record).collect();
        records.sort_by_key(|record| record.kind);
        let [denial, lookup] = &records[..] else { panic!("{records:?}") };
        for record in &records {
            assert_eq!((record.count, record.detail.peer, record.detail.summed), (3, Some(peer), false));
            assert_eq!(record.actor.as_ref().unwrap().name.as_deref(), Some("api"));
        }
        assert_eq!((lookup.tenant.as_deref(), lookup.key.as_deref()), (Some("acme"), Some("KEY")));
        assert_eq!((&denial.tenant, &denial.key, &denial.detail.agent), (&None, &None, &None));
    }

    #[test]
    fn a_full_window_goes_on_counting_and_does_not_grow() {
        let (window, grant, fields) = (Window::new(10), grant("api"), Fields::default());
        for number in 0..1000 {
            window.add(hit(&grant, &format!("KEY_{number}"), &fields), Timestamp::from_millis(number));
        }
        assert_eq!(window.len(), 11);
        let records: Vec<Record> = window.take().iter().map(Sum::record).collect();
        assert_eq!(records.iter().map(|record| record.count).sum::<u64>(), 1000);
        let rest = records.iter().find(|record| record.detail.summed).unwrap();
        assert_eq!((rest.count, &rest.key, &rest.tenant), (990, &None, &None));
        assert_eq!(rest.actor.as_ref().unwrap().name.as_deref(), Some("api"));
    }
}
