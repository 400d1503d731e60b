//! Counts accesses that are not recorded one by one: equal accesses are summed up over a
//! short time.

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
    budget::{Budget, Payer},
    record::{Actor, Detail, Kind, Outcome, Record},
};
use crate::{
    access::{Grant, Peer},
    clock::Timestamp,
};

/// One access, as it is counted: everything but the time decides its sum.
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
    /// `None` where more was summed up than can be kept apart; then neither tenant nor key
    /// is named.
    pub(super) origin: Option<Origin<'a>>,
}

impl<'a> Sight<'a> {
    /// Whether it is a refusal, or a failed request without a valid token. These are told apart by
    /// caller, peer and reason, not by their texts, which would make a sum of each.
    pub(super) fn is_refusal(&self) -> bool {
        match (self.kind, self.outcome) {
            // It was begun, and its names are on record.
            (Kind::Admin | Kind::Write, _) => false,
            (_, Outcome::Denied | Outcome::Limited | Outcome::Invalid) => true,
            (_, Outcome::Failed) => self.grant.is_none(),
            // Also without a token: a webhook is authenticated by its signature.
            (_, Outcome::Found | Outcome::Absent | Outcome::Begun | Outcome::Done | Outcome::Conflict) => false,
        }
    }

    /// The same without any text of the caller.
    pub(super) fn without_texts(self) -> Self {
        let peer = |peer: Peer| if self.grant.is_none() { peer.host() } else { peer };
        let origin = self.origin.map(|origin| Origin {
            peer: peer(origin.peer),
            agent: b"",
            fields: &NO_FIELDS,
            face: origin.face,
        });
        Self { tenant: "", key: "", origin, ..self }
    }

    /// A record that cannot be kept by itself, counted like an equal access.
    pub(super) fn of(record: &'a Record) -> Self {
        let Record { kind, grant, action, outcome, tier, detail, .. } = record;
        let [tenant, key, agent] =
            [&record.tenant, &record.key, &detail.agent].map(|text| text.as_deref().unwrap_or_default());
        let (fields, face) = (&detail.fields, detail.face);
        let origin = detail.peer.map(|peer| Origin { peer, agent: agent.as_bytes(), fields, face });
        // A record without an origin stands for too many to tell apart.
        let (tenant, key) = if origin.is_some() { (tenant, key) } else { ("", "") };
        let (kind, action, outcome, tier) = (*kind, *action, *outcome, *tier);
        Self { kind, grant: grant.as_ref(), action, tenant, key, outcome, tier, code: detail.code, origin }
    }
}

/// The origin of an access.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin<'a> {
    pub(super) peer: Peer,
    pub(super) agent: &'a [u8],
    pub(super) fields: &'a Fields,
    /// The API that was used, where it is another than our own.
    pub(super) face: Option<&'static str>,
}

/// A sum of equal accesses.
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
    origin: Option<Kept>,
    times: Times,
    /// Whether its record was paid for, where it must be.
    is_paid: bool,
}

/// The origin of the accesses of a sum.
#[derive(Debug)]
struct Kept {
    peer: Peer,
    agent: Box<[u8]>,
    fields: Fields,
    face: Option<&'static str>,
}

impl Kept {
    fn of(origin: Origin<'_>) -> Self {
        let Origin { peer, agent, fields, face } = origin;
        Self { peer, agent: agent.into(), fields: fields.clone(), face }
    }

    fn origin(&self) -> Origin<'_> {
        Origin { peer: self.peer, agent: &self.agent, fields: &self.fields, face: self.face }
    }

    fn is(&self, origin: &Origin<'_>) -> bool {
        (self.peer, self.face) == (origin.peer, origin.face)
            && *self.agent == *origin.agent
            && self.fields == *origin.fields
    }
}

/// The number of accesses, and the times of the first and the last.
#[derive(Debug, Clone, Copy)]
struct Times {
    count: u64,
    /// How many of them the detection of attacks has seen, before there is a record.
    seen: u64,
    first_at: Timestamp,
    last_at: Timestamp,
}

/// The sums since they were last taken.
///
/// An access is added under its shard's lock, and sums are taken under the same lock: it is
/// among the taken ones or among the rest, never in both or neither. Shards are taken one
/// after the other, so the sums of one taking may end at different moments; the next ones begin
/// where they end.
///
/// Bounded: beyond `capacity` sums, an access is added to a sum without tenant,
/// key and origin. There are at most as many of those as combinations of token, action, outcome.
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

    /// The number of sums that are kept.
    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Counts one access.
    pub(super) fn add(&self, sight: Sight<'_>, at: Timestamp) {
        self.put(sight, Times { count: 1, seen: 0, first_at: at, last_at: at }, false);
    }

    /// Counts a record that cannot be kept by itself.
    pub(super) fn fold(&self, record: &Record) {
        let sight = Sight::of(record);
        let sight = if sight.is_refusal() { sight.without_texts() } else { sight };
        let Record { count, seen, first_at, at, .. } = *record;
        self.put(sight, Times { count, seen, first_at, last_at: at }, false);
    }

    /// Takes the sums.
    pub(super) fn take(&self) -> Vec<Sum> {
        let mut taken = Vec::with_capacity(self.len());
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            self.len.fetch_sub(shard.len(), Ordering::Relaxed);
            taken.extend(shard.drain());
        }
        taken
    }

    /// Puts sums back that were taken and could not be written.
    pub(super) fn give_back(&self, sums: impl IntoIterator<Item = Sum>) {
        sums.into_iter().for_each(|sum| self.put(sum.sight(), sum.times, sum.is_paid));
    }

    fn put(&self, sight: Sight<'_>, times: Times, is_paid: bool) {
        let is_named = sight.origin.is_some();
        if self.put_into(sight, times, is_paid, !is_named || self.len() < self.capacity) {
            return;
        }
        self.put_into(Sight { tenant: "", key: "", origin: None, ..sight }, times, is_paid, true);
    }

    /// Adds to the sum, which is made where that is allowed; returns whether it was added.
    fn put_into(&self, sight: Sight<'_>, times: Times, is_paid: bool, may_grow: bool) -> bool {
        let hash = self.hash(&sight);
        // The table itself uses the low bits and the highest seven.
        let shard = usize::try_from((hash >> 40) % SHARDS as u64).unwrap_or(0);
        let mut shard = self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sum) = shard.find_mut(hash, |sum| sum.is_of(&sight)) {
            sum.times = sum.times.and(times);
            // However many accesses it counts, it is one record.
            sum.is_paid |= is_paid;
            return true;
        }
        if may_grow {
            shard.insert_unique(hash, Sum::new(&sight, times, is_paid), |sum| self.hash(&sum.sight()));
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
        if let Some(Origin { peer, agent, fields, .. }) = &sight.origin {
            // Texts that callers choose must tell sums apart here, or one bucket holds them all.
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
            seen: self.seen + more.seen,
            first_at: self.first_at.min(more.first_at),
            last_at: self.last_at.max(more.last_at),
        }
    }
}

impl Sum {
    fn new(sight: &Sight<'_>, times: Times, is_paid: bool) -> Self {
        Self {
            kind: sight.kind,
            grant: sight.grant.cloned(),
            action: sight.action,
            tenant: sight.tenant.into(),
            key: sight.key.into(),
            outcome: sight.outcome,
            tier: sight.tier,
            code: sight.code,
            origin: sight.origin.map(Kept::of),
            times,
            is_paid,
        }
    }

    /// Whether it counts refusals.
    pub(super) fn is_refusal(&self) -> bool {
        self.sight().is_refusal()
    }

    /// When the first access that it counts happened.
    pub(super) fn first_at(&self) -> Timestamp {
        self.times.first_at
    }

    /// A record of the accesses that the detection of attacks has not seen yet, if any. Marks them
    /// as seen.
    pub(super) fn unseen(&mut self) -> Option<Record> {
        let is_new = self.times.seen < self.times.count;
        let record = is_new.then(|| self.record());
        self.times.seen = self.times.count;
        record
    }

    /// Pays for its record, once; returns whether it is paid.
    pub(super) fn is_paid_from(&mut self, budget: &Budget) -> bool {
        if !self.is_paid {
            let payer = self.origin.as_ref().map(|kept| Payer::of(kept.peer, self.grant.as_ref()));
            self.is_paid = budget.pay(payer.as_ref(), self.record().cost());
        }
        self.is_paid
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
            origin: self.origin.as_ref().map(Kept::origin),
        }
    }

    fn is_of(&self, sight: &Sight<'_>) -> bool {
        let same_grant = match (&self.grant, sight.grant) {
            // Usually it is the same one; after the tokens were read again, it has the same id.
            (Some(one), Some(other)) => Arc::ptr_eq(one, other) || one.id == other.id,
            (one, other) => one.is_none() && other.is_none(),
        };
        let same_origin = match (&self.origin, &sight.origin) {
            (None, None) => true,
            (Some(kept), Some(origin)) => kept.is(origin),
            _ => false,
        };
        same_origin
            && *self.key == *sight.key
            && *self.tenant == *sight.tenant
            && same_grant
            && (self.kind, self.action, self.outcome) == (sight.kind, sight.action, sight.outcome)
            && (self.tier, self.code) == (sight.tier, sight.code)
    }

    /// The record of the sum.
    pub(super) fn record(&self) -> Record {
        let named = |name: &str| (!name.is_empty()).then(|| name.to_owned());
        let mut detail = Detail { code: self.code, summed: self.origin.is_none(), ..Detail::default() };
        if let Some(Kept { peer, agent, fields, face }) = &self.origin {
            detail.peer = Some(*peer);
            detail.face = *face;
            detail.agent = super::agent_text(agent);
            detail.fields = fields.clone();
        }
        Record {
            kind: self.kind,
            first_at: self.times.first_at,
            at: self.times.last_at,
            count: self.times.count,
            seen: self.times.seen,
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
    use crate::{
        access::{Action, NewToken},
        clock::Clock,
        metrics::Metrics,
    };

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
            origin: Some(Origin { peer: Peer::Ip([127, 0, 0, 1].into()), agent: b"test", fields, face: None }),
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
                    // Unwritten sums come back, beside those that were added meanwhile.
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
        for (kind, outcome) in [(Kind::Lookup, Outcome::Found), (Kind::Denial, Outcome::Denied)] {
            for number in 0..3 {
                let mut record = Record::example(kind, "KEY", outcome);
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
    fn whoever_is_refused_is_counted_by_host_and_reason_whatever_was_sent() {
        let (window, fields) = (Window::new(1000), Fields([("user".to_owned(), "eve".to_owned())].into()));
        let grant = grant("api");
        for outcome in [Outcome::Denied, Outcome::Limited, Outcome::Invalid, Outcome::Failed] {
            for number in 0..50_u16 {
                let (key, agent) = (format!("KEY_{number}"), format!("agent/{number}"));
                let peer = Peer::Ip([0x2001, 0xdb8, 0, 1, 0, 0, 0, number].into());
                let origin = Some(Origin { peer, agent: agent.as_bytes(), fields: &fields, face: None });
                let sight = Sight { grant: None, outcome, origin, ..hit(&grant, &key, &fields) };
                assert!(sight.is_refusal());
                window.add(sight.without_texts(), Timestamp::from_millis(0));
            }
        }
        let records: Vec<Record> = window.take().iter().map(Sum::record).collect();
        assert_eq!(records.len(), 4, "one a reason");
        for record in records {
            let Detail { peer, agent, fields, .. } = record.detail;
            assert_eq!((record.count, peer.unwrap().to_string().as_str()), (50, "2001:db8:0:1::"));
            assert_eq!((record.tenant, record.key, agent, fields), (None, None, None, Fields::default()));
        }
    }

    #[test]
    fn a_sum_is_paid_for_once_also_where_it_could_not_be_written() {
        let (clock, metrics) = (Clock::system(), Metrics::new());
        let (window, budget) = (Window::new(10), Budget::new(1 << 20, clock, &metrics));
        let (grant, fields) = (grant("api"), Fields::default());
        let denied = || Sight { outcome: Outcome::Denied, ..hit(&grant, "KEY", &fields) }.without_texts();
        let paid = || {
            let page = metrics.render();
            let line = page.lines().find_map(|line| line.strip_prefix("secretier_audit_strangers_bytes_total "));
            line.unwrap().parse::<u64>().unwrap()
        };
        window.add(denied(), Timestamp::from_millis(1));
        for _ in 0..3 {
            let mut sums = window.take();
            assert!(sums.iter_mut().all(|sum| sum.is_paid_from(&budget)));
            // More of the same comes meanwhile, and the record that was paid for counts it too.
            window.add(denied(), Timestamp::from_millis(2));
            window.give_back(sums);
        }
        let [sum] = &window.take()[..] else { panic!("one sum") };
        assert_eq!((sum.times.count, paid()), (4, sum.record().cost()));
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
