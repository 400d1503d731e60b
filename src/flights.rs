//! Single flight: one piece of work at a time for each key, shared by all callers that ask for it.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    hash::Hash,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared, select},
};
use tokio::sync::oneshot;

/// The result of a flight, for all that wait; the flight continues when they leave.
pub type Flight<T> = Shared<BoxFuture<'static, T>>;

/// The flights in progress.
///
/// The interleavings that would break it, and what prevents each:
/// - Two callers both find no flight and start two: the map's lock covers the look-up and the
///   start.
/// - A caller that needs a read that *begins* after its own request joins one that began before:
///   [`Self::join_next`] queues one more flight behind the running one, and all such callers share
///   that.
/// - A reader that comes after an acknowledged write joins a flight that read before it: the writer
///   calls [`Self::forget`] before it acknowledges, so later readers start a new flight.
/// - Two flights that both count as current read at once, and the one that saw the earlier state
///   lands last: only a flight that has begun is forgotten. One that is queued behind it takes its
///   place and begins at once, and later readers join it rather than start another beside it. So at
///   most one flight a key began after the last [`Self::forget`]; whoever calls that first raises
///   the fence, which keeps the results of the earlier ones out of memory.
/// - A flight that ends removes a newer one from the map, or a queued flight takes a place that
///   another one waits for: each flight has a number, and moves only the entry with that number.
/// - A flight that panics would leave its key blocked: its panic is caught, and it ends like any
///   other.
///
/// There are at most two flights a key that can be joined, and each key is in the map only while one
/// is in progress.
pub struct Flights<K, T> {
    slots: Arc<Mutex<HashMap<K, Slot<T>>>>,
    lost: fn() -> T,
}

struct Slot<T> {
    number: u64,
    running: Flight<T>,
    /// Whether it may have read something already.
    begun: bool,
    queued: Option<Queued<T>>,
}

struct Queued<T> {
    number: u64,
    flight: Flight<T>,
    /// Dropped when it need not wait any more.
    _waits: oneshot::Sender<()>,
}

impl<T> Slot<T> {
    /// Leaves a flight that reads from now on to be joined: one that has not begun, or else the one
    /// that is queued, which then waits for nothing. `false` where there is neither.
    fn forget_begun(&mut self) -> bool {
        if !self.begun {
            return true;
        }
        let Some(Queued { number, flight, .. }) = self.queued.take() else { return false };
        (self.number, self.running, self.begun) = (number, flight, false);
        true
    }
}

impl<K, T> Flights<K, T>
where
    K: Clone + Eq + Hash + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// Makes an empty map of flights. `lost` returns the result of a flight that panicked.
    pub fn new(lost: fn() -> T) -> Self {
        Self { slots: Arc::default(), lost }
    }

    /// Joins the flight in progress for `key`, or starts one.
    pub fn join<F>(&self, key: &K, start: impl FnOnce() -> F) -> Flight<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut slots = lock(&self.slots);
        match slots.get(key) {
            Some(slot) => slot.running.clone(),
            None => self.launch(&mut slots, key, start()),
        }
    }

    /// Joins a flight that has not begun yet: one queued behind the one in progress, or a new one.
    /// `start`'s future must do all its reading when it is polled, not before.
    pub fn join_next<F>(&self, key: &K, start: impl FnOnce() -> F) -> Flight<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut slots = lock(&self.slots);
        let Some(slot) = slots.get_mut(key) else {
            return self.launch(&mut slots, key, start());
        };
        let (running, queued) = (&slot.running, &mut slot.queued);
        let queued = queued.get_or_insert_with(|| {
            let (number, (waits, forgotten)) = (rand::random(), oneshot::channel());
            let flight = self.fly(key, number, Some((running.clone(), forgotten)), start());
            Queued { number, flight, _waits: waits }
        });
        queued.flight.clone()
    }

    /// Lets no later caller join the flight of `key` that has begun: its result is out of date. A
    /// flight that is queued behind it begins now.
    pub fn forget(&self, key: &K) {
        if let Entry::Occupied(mut slot) = lock(&self.slots).entry(key.clone())
            && !slot.get_mut().forget_begun()
        {
            slot.remove();
        }
    }

    /// The same for every key that is out of date. Looks at all keys with a flight in progress.
    pub fn forget_where(&self, is_outdated: impl Fn(&K) -> bool) {
        lock(&self.slots).retain(|key, slot| !is_outdated(key) || slot.forget_begun());
    }

    /// Whether there is a flight in progress for `key`.
    pub fn is_in_the_air(&self, key: &K) -> bool {
        lock(&self.slots).contains_key(key)
    }

    /// The number of keys with a flight in progress.
    pub fn in_the_air(&self) -> usize {
        lock(&self.slots).len()
    }

    fn launch<F>(&self, slots: &mut HashMap<K, Slot<T>>, key: &K, work: F) -> Flight<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let number = rand::random();
        let running = self.fly(key, number, None, work);
        slots.insert(key.clone(), Slot { number, running: running.clone(), begun: false, queued: None });
        running
    }

    fn fly<F>(&self, key: &K, number: u64, behind: Option<(Flight<T>, oneshot::Receiver<()>)>, work: F) -> Flight<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let (slots, key, lost) = (Arc::clone(&self.slots), key.clone(), self.lost);
        let task = tokio::spawn(async move {
            if let Some((before, forgotten)) = behind {
                select(before, forgotten).await;
            }
            begin(&slots, &key, number);
            let result = AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| lost());
            land(&slots, &key, number);
            result
        });
        async move { task.await.unwrap_or_else(|_| lost()) }.boxed().shared()
    }
}

/// Marks a flight as begun: from now on it may be forgotten. One that was queued takes the place of the
/// flight it waited for, unless it has the place already, because that was forgotten; a caller that
/// needs a later read must queue behind it.
fn begin<K: Eq + Hash, T>(slots: &Mutex<HashMap<K, Slot<T>>>, key: &K, number: u64) {
    if let Some(slot) = lock(slots).get_mut(key) {
        if slot.queued.as_ref().is_some_and(|queued| queued.number == number) {
            slot.begun = true;
            slot.forget_begun();
        }
        if slot.number == number {
            slot.begun = true;
        }
    }
}

/// Removes a flight that has ended, unless another has its place or is queued behind it: the queued
/// flight puts itself in its place.
fn land<K: Eq + Hash, T>(slots: &Mutex<HashMap<K, Slot<T>>>, key: &K, number: u64) {
    let mut slots = lock(slots);
    if slots.get(key).is_some_and(|slot| slot.number == number && slot.queued.is_none()) {
        slots.remove(key);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K, T> fmt::Debug for Flights<K, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Flights")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::sync::oneshot;

    use super::*;

    fn flights() -> Flights<&'static str, u32> {
        Flights::new(|| 0)
    }

    /// Waits until the flight of this key has begun.
    async fn begun(flights: &Flights<&'static str, u32>, key: &'static str) {
        while !lock(&flights.slots)[key].begun {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_flight_that_has_not_begun_is_not_out_of_date() {
        let flights = flights();
        // On one thread nothing runs before this waits.
        let first = flights.join(&"a", || async { 1 });
        flights.forget(&"a");
        flights.forget_where(|_| true);
        let second = flights.join(&"a", || async { 2 });
        assert_eq!((first.await, second.await, flights.in_the_air()), (1, 1, 0));
    }

    #[tokio::test]
    async fn callers_share_the_flight_in_the_air() {
        let (flights, started) = (flights(), AtomicU32::new(0));
        let (open, gate) = oneshot::channel::<()>();
        let mut gate = Some(gate);
        let joined: Vec<_> = (0..100)
            .map(|_| {
                flights.join(&"a", || {
                    started.fetch_add(1, Ordering::SeqCst);
                    let gate = gate.take().unwrap();
                    async move {
                        gate.await.unwrap();
                        7
                    }
                })
            })
            .collect();
        open.send(()).unwrap();
        for flight in joined {
            assert_eq!(flight.await, 7);
        }
        assert_eq!((started.load(Ordering::SeqCst), flights.in_the_air()), (1, 0));
    }

    #[tokio::test]
    async fn whoever_needs_a_later_read_shares_one_queued_flight() {
        let flights = flights();
        let (open, gate) = oneshot::channel::<()>();
        let first = flights.join(&"a", || async move {
            gate.await.unwrap();
            1
        });
        let second = flights.join_next(&"a", || async { 2 });
        let third = flights.join_next(&"a", || async { 3 });
        let joined = flights.join(&"a", || async { 4 });
        open.send(()).unwrap();
        assert_eq!((first.await, second.await, third.await, joined.await), (1, 2, 2, 1));
        assert_eq!(flights.join_next(&"a", || async { 5 }).await, 5);
        assert_eq!(flights.in_the_air(), 0);
    }

    #[tokio::test]
    async fn a_forgotten_flight_is_not_joined_and_does_not_clear_the_next() {
        let flights = flights();
        let (open_old, old_gate) = oneshot::channel::<()>();
        let (open_new, new_gate) = oneshot::channel::<()>();
        let gated = |gate: oneshot::Receiver<()>, result| async move {
            gate.await.unwrap();
            result
        };
        let old = flights.join(&"a", || gated(old_gate, 1));
        begun(&flights, "a").await;
        flights.forget(&"a");
        let new = flights.join(&"a", || gated(new_gate, 2));
        open_old.send(()).unwrap();
        assert_eq!(old.await, 1);
        assert_eq!(flights.in_the_air(), 1, "the old flight must not clear the new one's place");
        open_new.send(()).unwrap();
        assert_eq!((new.await, flights.in_the_air()), (2, 0));
    }

    #[tokio::test]
    async fn flights_can_be_forgotten_by_what_their_keys_are() {
        let flights = flights();
        let (open, gate) = oneshot::channel::<()>();
        let gate = gate.shared();
        let early = ["a", "ab", "b"].map(|key| {
            let gate = gate.clone();
            flights.join(&key, || async move {
                gate.await.unwrap();
                1
            })
        });
        for key in ["a", "ab", "b"] {
            begun(&flights, key).await;
        }
        flights.forget_where(|key| key.starts_with('a'));
        let late = ["a", "ab", "b"].map(|key| flights.join(&key, || async { 2 }));
        open.send(()).unwrap();
        assert_eq!(futures_util::future::join_all(early).await, [1, 1, 1]);
        assert_eq!(futures_util::future::join_all(late).await, [2, 2, 1]);
    }

    #[tokio::test]
    async fn what_is_queued_behind_a_forgotten_flight_begins_at_once_and_is_the_one_to_join() {
        let flights = flights();
        for forget in
            [|flights: &Flights<_, _>| flights.forget(&"a"), |flights: &Flights<_, _>| flights.forget_where(|_| true)]
        {
            let (open_old, old_gate) = oneshot::channel::<()>();
            let (open_new, new_gate) = oneshot::channel::<()>();
            let (began, begins) = oneshot::channel::<()>();
            let old = flights.join(&"a", || async move {
                old_gate.await.unwrap();
                1
            });
            let queued = flights.join_next(&"a", || async move {
                began.send(()).unwrap();
                new_gate.await.unwrap();
                2
            });
            begun(&flights, "a").await;
            forget(&flights);
            begins.await.unwrap();
            // Not a second one beside it: both would count as current.
            let joined = flights.join(&"a", || async { 3 });
            let next = flights.join_next(&"a", || async { 4 });
            open_old.send(()).unwrap();
            assert_eq!(old.await, 1);
            assert_eq!(flights.in_the_air(), 1, "the old flight must not clear the new one's place");
            open_new.send(()).unwrap();
            assert_eq!((queued.await, joined.await, next.await, flights.in_the_air()), (2, 2, 4, 0));
        }
    }

    #[tokio::test]
    async fn a_flight_that_panics_ends_as_lost_and_blocks_nobody() {
        let flights = flights();
        let lost = flights.join(&"a", || async { panic!("on purpose") });
        assert_eq!(lost.await, 0);
        assert_eq!(flights.join(&"a", || async { 1 }).await, 1);
    }
}
