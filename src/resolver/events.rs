//! Tells followers which secrets have another value, once this instance serves it.
//!
//! Changes come from the feed that all instances follow, this instance's own included. In a phase
//! whose values are in no feed, because the database holds no copy, each read of upstream is
//! compared with the one before.
//!
//! A follower that hears of a change asks for the new value and keeps it until the next change. So
//! a change must not be told before the new value is served here, or the former one would be kept:
//! - A change of another instance is noted after memory has forgotten the secret (`apply`).
//! - A change of this instance may be read in the feed before it is in force here. It waits until
//!   [`Resolver::surely_followed`] is past it, which counts the changes under way.
//! - A read of upstream is told after memory holds it.
//!
//! - A reset waits until the changes that it stands for are in force.
//!
//! A follower begins at the place up to which changes were taken, under the lock under which they are
//! taken. All of them are in force, and what it asks for from then on is newer; it hears of every later
//! one. A follower who comes back is told those up to that place by the feed.
//!
//! Going on behind a place is believed only where nothing can have been told meanwhile that is in no
//! feed: by the same process, which counts those events in the index of a place, or by one that has
//! had none, where no phase makes any.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::{StreamExt as _, stream};
use tokio::sync::{Notify, watch};

use super::{Fresh, Resolver, Want};
use crate::{
    answer::Answer,
    phase::Phase,
    secret::{SecretKey, SecretName},
    tenant::Tenant,
    tiers::database::{Change, News, Numbered, Place},
};

/// The events that are kept for followers that are behind; who is further behind is told a reset.
const KEPT: usize = 4096;

/// The changes that wait until they are in force here; of more, a reset is told.
const WAITING: usize = 10_000;

/// The secrets that are compared from one read of upstream to the next.
const COMPARED: usize = 100_000;

/// Look-ups at once.
const AT_ONCE: usize = 16;

/// The changed secrets of one read that are told one by one; of more, a reset of the tenant is told.
const ONE_BY_ONE: usize = 256;

/// Something that followers are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Where a follower that has heard it goes on.
    pub id: EventId,
    /// The change.
    pub what: What,
}

/// A change of secrets, as followers are told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A secret has another value, or none.
    Changed {
        /// Its tenant.
        tenant: Tenant,
        /// Its key.
        key: SecretKey,
        /// Its version and validator; `None` where it is absent.
        found: Option<(i64, String)>,
    },
    /// It cannot be told which secrets have changed: of one tenant, or of all.
    Reset(Option<Tenant>),
}

/// A place among the events: `<epoch>.<number>.<index>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventId {
    /// The mark of the change, or this process's own number for events that are in no feed.
    epoch: i64,
    number: i64,
    /// The process, in the upper half, and how many events it had told by then that are in no feed.
    index: u64,
}

impl std::fmt::Display for EventId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // As an unsigned number: a sign would be one more character to expect.
        write!(f, "{}.{}.{}", self.epoch.cast_unsigned(), self.number, self.index)
    }
}

impl std::str::FromStr for EventId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('.');
        let mut part = || parts.next().ok_or(());
        let epoch = part()?.parse::<u64>().map_err(drop)?.cast_signed();
        let (number, index) = (part()?.parse().map_err(drop)?, part()?.parse().map_err(drop)?);
        if parts.next().is_some() || number < 0 { Err(()) } else { Ok(Self { epoch, number, index }) }
    }
}

impl EventId {
    fn place(self) -> Place {
        Place { number: self.number, mark: self.epoch }
    }
}

/// The events, and the changes that will be some.
pub(super) struct Events {
    state: Mutex<State>,
    /// Notified when a change may be told.
    pub(super) due: Notify,
    /// The sequence number of the next event.
    told: watch::Sender<u64>,
    numbers: AtomicU64,
    /// The epoch of events that are in no feed.
    own: i64,
    /// The process, as the index of a place has it.
    process: u32,
    /// The scope of each follower, by its number.
    scopes: Mutex<HashMap<u64, Reaches>>,
}

/// Whether a follower may be told of a tenant, or of a secret of it.
pub type Reaches = Arc<dyn Fn(&Tenant, Option<&SecretKey>) -> bool + Send + Sync>;

struct State {
    events: VecDeque<Event>,
    /// The sequence number of the next event; that of the oldest one kept is lower by their count.
    next: u64,
    /// Changes that are not in force here yet, or not told, in the order of the feed.
    waiting: VecDeque<Numbered>,
    /// The place of the last change that was noted.
    noted: Place,
    /// Set where changes are not known: a reset is due, once those up to this number are in force.
    missed: Option<i64>,
    /// The place up to which every change was taken, to be told at once.
    place: Place,
    /// The validators of what reads of upstream have brought that no feed tells of.
    compared: HashMap<Tenant, HashMap<SecretKey, String>>,
    /// How many events there were that are in no feed.
    own_events: u32,
}

/// The changes that are told next.
struct Batch {
    changes: Vec<Numbered>,
    missed: bool,
    up_to: Place,
}

impl Events {
    pub(super) fn new() -> Self {
        let state = State {
            events: VecDeque::new(),
            next: 0,
            waiting: VecDeque::new(),
            noted: Place::default(),
            missed: None,
            place: Place::default(),
            compared: HashMap::new(),
            own_events: 0,
        };
        Self {
            state: Mutex::new(state),
            due: Notify::new(),
            told: watch::Sender::new(0),
            numbers: AtomicU64::new(0),
            own: rand::random(),
            process: rand::random(),
            scopes: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn scopes(&self) -> MutexGuard<'_, HashMap<u64, Reaches>> {
        self.scopes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_followers(&self) -> bool {
        !self.scopes().is_empty()
    }

    /// Whether a follower is told of this change.
    fn is_followed(&self, change: &Change) -> bool {
        let scopes = self.scopes();
        scopes.values().any(|reaches| is_told_of(reaches, change))
    }

    /// The id of a place of the feed, at which so many events were told that are in no feed.
    fn id(&self, place: Place, own_events: u32) -> EventId {
        let index = u64::from(self.process) << 32 | u64::from(own_events);
        EventId { epoch: place.mark, number: place.number, index }
    }

    /// Notes changes of the feed, which others than this instance have in force here by now.
    pub(super) fn note(&self, news: &News) {
        let mut state = self.lock();
        let before = state.noted.number;
        state.noted = news.last.unwrap_or(Place { number: news.up_to, mark: 0 });
        // The feed may be read twice, by the follower and by a caller who cannot wait for it.
        state.waiting.extend(news.of_secrets.iter().filter(|one| one.place.number > before).cloned());
        if !news.is_whole || news.is_set_back || state.waiting.len() > WAITING {
            state.missed = Some(state.noted.number);
            state.waiting.clear();
        }
        drop(state);
        self.due.notify_one();
    }

    /// Takes the changes that are in force here, of each secret the last. Without followers they
    /// count as told.
    fn take(&self, followed: i64) -> Option<Batch> {
        let mut state = self.lock();
        if state.missed.is_some_and(|up_to| up_to > followed) {
            return None;
        }
        let missed = state.missed.take().is_some();
        let count = state.waiting.partition_point(|one| one.place.number <= followed);
        let changes: Vec<Numbered> = state.waiting.drain(..count).collect();
        let up_to = if state.waiting.is_empty() && state.noted.number <= followed {
            state.noted
        } else {
            changes.last().map_or(state.place, |last| last.place)
        };
        if missed {
            // Counted also where nobody follows just now: who comes back was away then.
            state.own_events = state.own_events.saturating_add(1);
        }
        // From here on, and not when the batch is told: a follower who begins in between with a scope
        // that the batch was not looked up for is told of it by the feed, or asks for values after it.
        state.place = up_to;
        if !self.has_followers() || (changes.is_empty() && !missed) {
            return None;
        }
        drop(state);
        Some(Batch { changes: last_of_each(changes), missed, up_to })
    }

    fn push(&self, told: Vec<(Place, What)>) {
        let mut state = self.lock();
        let own_events = state.own_events;
        let events = told.into_iter().map(|(place, what)| Event { id: self.id(place, own_events), what });
        state.keep(events);
        self.told.send_replace(state.next);
    }
}

impl State {
    /// Keeps the validators of a read, and returns those of the one before, if they are known.
    fn compare(&mut self, tenant: &Tenant, now: HashMap<SecretKey, String>) -> Option<HashMap<SecretKey, String>> {
        let before = self.compared.insert(tenant.clone(), now);
        // A tenant that is not known any more is a reset when it is read again.
        let mut count: usize = self.compared.values().map(HashMap::len).sum();
        while count > COMPARED
            && let Some(other) = self.compared.keys().find(|other| *other != tenant).cloned()
        {
            count -= self.compared.remove(&other).map_or(0, |keys| keys.len());
        }
        before
    }

    fn keep(&mut self, events: impl Iterator<Item = Event>) {
        for event in events {
            if self.events.len() == KEPT {
                self.events.pop_front();
            }
            self.events.push_back(event);
            self.next += 1;
        }
    }
}

/// Of each secret the last change, in the order of the feed.
fn last_of_each(changes: Vec<Numbered>) -> Vec<Numbered> {
    let mut seen = HashSet::new();
    let mut last: Vec<Numbered> = changes.into_iter().rev().filter(|one| seen.insert(one.change.clone())).collect();
    last.reverse();
    last
}

fn is_told_of(reaches: &Reaches, change: &Change) -> bool {
    match change {
        Change::Secret(tenant, key) => reaches(tenant, Some(key)),
        Change::Folder(tenant) => reaches(tenant, None),
        _ => true,
    }
}

/// A follower's place among the events.
pub struct Following {
    resolver: Arc<Resolver>,
    number: u64,
    reaches: Reaches,
    /// The sequence number of the next event.
    next: u64,
    told: watch::Receiver<u64>,
}

impl Drop for Following {
    fn drop(&mut self) {
        let mut scopes = self.resolver.events.scopes();
        scopes.remove(&self.number);
        if scopes.is_empty() {
            // The next follower's reads are not compared with any of these.
            drop(scopes);
            self.resolver.events.lock().compared.clear();
        }
    }
}

impl Following {
    fn is_told(&self, event: &Event) -> bool {
        match &event.what {
            What::Changed { tenant, key, .. } => (self.reaches)(tenant, Some(key)),
            What::Reset(Some(tenant)) => (self.reaches)(tenant, None),
            What::Reset(None) => true,
        }
    }

    /// Completes when there may be events that were not taken.
    pub async fn wait(&mut self) {
        // The sender is the resolver's, which this holds.
        let next = self.next;
        let _ = self.told.wait_for(|told| *told > next).await;
    }

    /// The events since the last call, oldest first; `None` where some of them are not kept any more.
    pub fn take(&mut self) -> Option<Vec<Event>> {
        let state = self.resolver.events.lock();
        let behind = usize::try_from(state.next - self.next).ok()?;
        let skipped = state.events.len().checked_sub(behind)?;
        self.next = state.next;
        Some(state.events.iter().skip(skipped).filter(|event| self.is_told(event)).cloned().collect())
    }
}

impl Resolver {
    /// Begins to follow the events that `reaches` lets through, from now on or from behind one that
    /// was told before. Returns what is to be told first, and the place from which a follower goes on
    /// that hears nothing else.
    pub async fn follow_events(
        self: &Arc<Self>,
        behind: Option<&str>,
        reaches: Reaches,
    ) -> (Following, Vec<Event>, EventId) {
        let number = self.events.numbers.fetch_add(1, Ordering::Relaxed);
        self.events.scopes().insert(number, Arc::clone(&reaches));
        let (next, place, own_events) = {
            let state = self.events.lock();
            (state.next, state.place, state.own_events)
        };
        let (resolver, told) = (Arc::clone(self), self.events.told.subscribe());
        let following = Following { resolver, number, reaches, next, told };
        let here = self.events.id(place, own_events);
        let Some(behind) = behind else { return (following, Vec::new(), here) };
        let missed = self.missed_events(behind, here, &following.reaches);
        // A caller who waits longer than for a secret is better off with a reset.
        let missed = tokio::time::timeout(self.deadline(), missed).await.ok().flatten();
        let first = missed.unwrap_or_else(|| vec![(place, What::Reset(None))]);
        let events = first.into_iter().map(|(place, what)| Event { id: self.events.id(place, own_events), what });
        (following, events.collect(), here)
    }

    /// The events behind a place, up to here; `None` where that is not known.
    async fn missed_events(
        self: &Arc<Self>,
        behind: &str,
        here: EventId,
        reaches: &Reaches,
    ) -> Option<Vec<(Place, What)>> {
        let behind: EventId = behind.parse().ok()?;
        let is_same_process = behind.index >> 32 == here.index >> 32;
        let had_none = here.index as u32 == 0 && !self.policies().uses(|phase| phase == Phase::Infisical);
        let is_believed = if is_same_process { behind.index == here.index } else { had_none };
        if !is_believed || behind.number > here.number {
            return None;
        }
        let changes = self.database.changes_between(behind.place(), here.number).await.ok()??;
        let told = changes.into_iter().filter(|one| is_told_of(reaches, &one.change)).collect();
        Some(self.events_of(last_of_each(told)).await)
    }

    /// Completes when there may be changes to tell.
    pub async fn events_due(&self) {
        self.events.due.notified().await;
    }

    /// Tells followers the changes that are in force here.
    pub async fn tell_events(self: &Arc<Self>) {
        while let Some(Batch { changes, missed, up_to }) = self.events.take(self.surely_followed()) {
            let followed = changes.into_iter().filter(|one| self.events.is_followed(&one.change)).collect();
            let told = match missed {
                true => vec![(up_to, What::Reset(None))],
                false => self.events_of(followed).await,
            };
            self.events.push(told);
        }
    }

    /// Notes where this instance begins to follow the feed.
    pub fn begin_events(&self, news: &News) {
        let mut state = self.events.lock();
        let Some(place) = news.first.filter(|_| state.noted == Place::default()) else { return };
        (state.noted, state.place) = (place, place);
        if self.events.has_followers() {
            // They began while this instance had no database.
            state.missed = Some(state.noted.number);
            drop(state);
            self.events.due.notify_one();
        }
    }

    /// Has followers told to forget everything: what was served before is in no feed, because the
    /// database was away, or other phases are in force.
    pub fn note_missed_events(&self) {
        let mut state = self.events.lock();
        state.missed = Some(state.noted.number);
        drop(state);
        self.events.due.notify_one();
    }

    async fn events_of(self: &Arc<Self>, changes: Vec<Numbered>) -> Vec<(Place, What)> {
        stream::iter(changes)
            .map(|Numbered { place, change }| async move {
                let what = match change {
                    Change::Secret(tenant, key) => self.event_of(tenant, key).await,
                    Change::Folder(tenant) => What::Reset(Some(tenant)),
                    // The feed does not say which tenant has another owner, or was shredded.
                    _ => What::Reset(None),
                };
                (place, what)
            })
            .buffered(AT_ONCE)
            .collect()
            .await
    }

    /// The event of a changed secret, with its version as it is served now; a reset of the tenant where
    /// that is not known soon: other tenants' events wait for it.
    async fn event_of(self: &Arc<Self>, tenant: Tenant, key: SecretKey) -> What {
        let Ok(name) = SecretName::parse(tenant.as_str(), key.as_str()) else { return What::Reset(Some(tenant)) };
        match tokio::time::timeout(self.deadline() / 4, self.resolve(name, Want::Cached)).await {
            Ok(Ok(resolved)) => {
                let found = resolved.answer();
                let found = found.map(|answer| (answer.version.number(), answer.bare_etag().to_owned()));
                What::Changed { tenant, key, found }
            }
            Ok(Err(_)) | Err(_) => What::Reset(Some(tenant)),
        }
    }

    /// Tells what a read of upstream that no feed tells of has changed since the one before; where
    /// that is not known, a reset of the tenant.
    pub(super) fn tell_read(&self, tenant: &Tenant, fresh: &Fresh) {
        if !self.events.has_followers() {
            return;
        }
        let answers = fresh.entries.iter().filter_map(|(key, entry)| Some((key, entry.answer.as_ref()?)));
        // The same value of a secret has the same validator, and another value another.
        let now: HashMap<SecretKey, String> =
            answers.map(|(key, answer)| (key.clone(), answer.bare_etag().to_owned())).collect();
        let mut state = self.events.lock();
        let told = match state.compare(tenant, now) {
            Some(before) => differences(tenant, &before, fresh),
            None => vec![What::Reset(Some(tenant.clone()))],
        };
        if told.is_empty() {
            return;
        }
        state.own_events = state.own_events.saturating_add(1);
        let id = EventId { epoch: self.events.own, number: i64::from(state.own_events), index: 0 };
        state.keep(told.into_iter().map(|what| Event { id, what }));
        self.events.told.send_replace(state.next);
    }
}

/// The differences between a read and the one before, by their validators.
fn differences(tenant: &Tenant, before: &HashMap<SecretKey, String>, fresh: &Fresh) -> Vec<What> {
    let changed = |key: &SecretKey, found| What::Changed { tenant: tenant.clone(), key: key.clone(), found };
    let answers = fresh.entries.iter().filter_map(|(key, entry)| Some((key, entry.answer.as_ref()?)));
    let differs =
        |(key, answer): &(&SecretKey, &Answer)| before.get(*key).is_none_or(|former| former != answer.bare_etag());
    let newer = answers
        .filter(differs)
        .map(|(key, answer)| changed(key, Some((answer.version.number(), answer.bare_etag().to_owned()))));
    let gone = before.keys().filter(|key| fresh.entries.get(*key).is_none_or(|entry| entry.answer.is_none()));
    let gone: Vec<&SecretKey> = gone.collect();
    // A secret that cannot be used is not absent.
    let is_unusable = gone.iter().any(|key| fresh.flaws.unusable.contains_key(*key));
    let told: Vec<What> = newer.chain(gone.into_iter().map(|key| changed(key, None))).collect();
    if is_unusable || told.len() > ONE_BY_ONE { vec![What::Reset(Some(tenant.clone()))] } else { told }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(number: i64) -> Place {
        Place { number, mark: 7 }
    }

    fn change(number: i64, key: &str) -> Numbered {
        let change = Change::Secret("acme".parse().unwrap(), key.parse().unwrap());
        Numbered { place: place(number), change }
    }

    fn news(of_secrets: Vec<Numbered>, up_to: i64) -> News {
        News {
            changes: Vec::new(),
            of_secrets,
            first: None,
            last: Some(place(up_to)),
            up_to,
            is_whole: true,
            is_to_the_end: true,
            is_set_back: false,
        }
    }

    fn numbers(batch: Option<Batch>) -> Vec<i64> {
        batch.into_iter().flat_map(|batch| batch.changes).map(|one| one.place.number).collect()
    }

    fn followed() -> Events {
        let events = Events::new();
        events.scopes().insert(0, Arc::new(|_, _| true));
        events
    }

    #[test]
    fn a_change_is_not_told_before_it_is_in_force_here() {
        let events = followed();
        events.note(&news(vec![change(3, "A"), change(4, "B"), change(5, "A")], 6));
        assert_eq!(numbers(events.take(2)), [0; 0]);
        assert_eq!(events.lock().place, Place::default(), "nobody who begins now misses them");
        assert_eq!(numbers(events.take(4)), [3, 4]);
        assert_eq!(numbers(events.take(6)), [5]);
        assert_eq!(numbers(events.take(6)), [0; 0]);
    }

    #[test]
    fn of_each_secret_the_last_change_is_told_and_a_change_that_is_read_twice_once() {
        let events = followed();
        events.note(&news(vec![change(1, "A"), change(2, "B"), change(3, "A")], 3));
        events.note(&news(vec![change(2, "B"), change(3, "A")], 3));
        assert_eq!(numbers(events.take(3)), [2, 3]);
    }

    #[test]
    fn without_followers_changes_count_as_told() {
        let events = Events::new();
        events.note(&news(vec![change(1, "A")], 2));
        assert!(events.take(2).is_none());
        assert_eq!(events.lock().place, place(2));
    }

    #[test]
    fn news_that_are_not_whole_and_more_changes_than_can_wait_are_a_reset() {
        let events = followed();
        events.note(&News { is_whole: false, ..news(vec![change(1, "A")], 1) });
        assert!(events.take(0).is_none(), "what it stands for is not in force yet");
        let batch = events.take(1).unwrap();
        assert!(batch.missed && batch.changes.is_empty() && batch.up_to == place(1));
        let many = (2..2 + WAITING as i64 + 1).map(|number| change(number, "A")).collect();
        events.note(&news(many, 2 + WAITING as i64));
        assert!(events.take(1).is_none());
        assert!(events.take(2 + WAITING as i64).unwrap().missed);
        assert!(events.lock().waiting.is_empty());
    }

    #[test]
    fn events_are_kept_up_to_a_number() {
        let events = followed();
        let told = |count: usize| vec![(place(1), What::Reset(None)); count];
        events.push(told(KEPT + 5));
        let state = events.lock();
        assert_eq!((state.events.len(), state.next), (KEPT, KEPT as u64 + 5));
    }

    #[test]
    fn a_place_is_read_as_it_was_written_and_nothing_else_is_one() {
        for id in [EventId { epoch: -5, number: 12, index: 3 }, Events::new().id(Place::default(), 7)] {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        for text in ["", ".", "1.2", "1.2.3.4", "-1.2.3", "1.-2.3", "1.2.x", "99999999999999999999.1.1"] {
            assert_eq!(text.parse::<EventId>(), Err(()), "{text}");
        }
    }
}
