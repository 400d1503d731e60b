//! Work that would occupy a thread for long: opening, encoding and wiping all secrets of a tenant.
//! The threads that serve requests do it in short pieces, or leave it to other threads.

use std::{
    cell::Cell,
    fmt,
    ops::{Deref, DerefMut},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Arc, Mutex, OnceLock, PoisonError, mpsc},
    thread::{self, available_parallelism},
};

use bytes::Bytes;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, oneshot},
    task,
};

/// The number of bytes that a thread that serves requests processes before other tasks have their
/// turn: it opens, encodes or wipes them in less than half a millisecond.
pub const SHORT: usize = 64 << 10;

/// The cost of each item of a list, added to its bytes.
const EACH: usize = 512;

/// The amount of work that is done at once on a thread that serves no requests, before the next
/// caller in the queue has a turn.
const LONG: usize = 256 << 10;

/// The number of bytes that such a thread processes before it yields its processor to other
/// threads.
const BREATH: usize = 16 << 10;

/// The total cost of these items.
pub fn weight_of<'i, I: 'i>(things: impl Iterator<Item = &'i I>, bytes: impl Fn(&I) -> usize) -> usize {
    things.fold(0, |sum: usize, thing| sum.saturating_add(EACH).saturating_add(bytes(thing)))
}

/// Yields the thread now and then between the items that a task processes.
#[derive(Debug, Default)]
pub struct Pace {
    done: usize,
}

impl Pace {
    /// Counts one more processed item of so many bytes.
    pub async fn did(&mut self, bytes: usize) {
        self.done += EACH + bytes;
        if self.done >= SHORT {
            self.done = 0;
            task::yield_now().await;
        }
    }
}

thread_local! {
    /// Whether this is a thread for long work.
    static STEPS_BACK: Cell<bool> = const { Cell::new(false) };
}

/// Yields the processor to other threads after so many bytes, but only on a thread for long work.
///
/// Such a thread gets less processor time than one that serves requests. But once it runs, the
/// scheduler lets it run for some milliseconds, even when a thread that serves requests wakes up
/// meanwhile (Linux since 6.6). An answer takes a tenth of that.
pub fn breathe(bytes: usize) {
    if bytes >= BREATH && STEPS_BACK.get() {
        thread::yield_now();
    }
}

/// Counts bytes until it is time to [`breathe`].
#[derive(Debug, Default)]
struct Breath {
    done: usize,
}

impl Breath {
    fn did(&mut self, bytes: usize) {
        self.done += EACH + bytes;
        if self.done >= BREATH {
            breathe(std::mem::take(&mut self.done));
        }
    }
}

/// Does long work on threads of its own. They are so few that half of the machine is left for the
/// threads that serve requests, and they have a lower priority: where both want a processor, the
/// threads that serve requests have it first. Work is done in the order of arrival; only dropping
/// goes ahead.
#[derive(Clone)]
pub struct LongWork {
    turns: Arc<Semaphore>,
    most: usize,
    /// Started by the first work; `None` where none could be started. They end with the last
    /// holder.
    threads: Arc<OnceLock<Option<mpsc::Sender<Job>>>>,
}

type Job = Box<dyn FnOnce() + Send>;

impl Default for LongWork {
    fn default() -> Self {
        let processors = available_parallelism().map_or(1, std::num::NonZero::get);
        Self::at_once((processors / 2).max(1))
    }
}

impl LongWork {
    fn at_once(most: usize) -> Self {
        Self { turns: Arc::new(Semaphore::new(most)), most, threads: Arc::default() }
    }

    /// Does this work when it is its turn. Once begun it is completed, even if nobody waits for it
    /// any more.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        // The semaphore is never closed.
        let turn = Arc::clone(&self.turns).acquire_owned().await.ok();
        let work = move || {
            let done = work();
            drop(turn);
            done
        };
        let Some(threads) = self.threads.get_or_init(|| start_threads(self.most)) else {
            return Self::run_now(work).await;
        };
        let (tell, told) = oneshot::channel();
        let job = Box::new(move || {
            // The caller may have gone.
            let _ = tell.send(catch_unwind(AssertUnwindSafe(work)));
        });
        // The threads exist for as long as this does.
        let _ = threads.send(job);
        match told.await {
            Ok(Ok(done)) => done,
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => std::future::pending().await,
        }
    }

    /// Drops content on a thread for long work, ahead of the callers in the queue: until then it is
    /// memory that no bound counts any more.
    fn drop_next<T: Send + 'static>(&self, content: T) {
        let job: Job = Box::new(move || drop(catch_unwind(AssertUnwindSafe(move || drop(content)))));
        match (self.threads.get_or_init(|| start_threads(self.most)), Handle::try_current()) {
            // The threads exist for as long as this does, and do what is left for them even then.
            (Some(threads), _) => drop(threads.send(job)),
            (None, Ok(runtime)) => drop(runtime.spawn_blocking(job)),
            (None, Err(_)) => job(),
        }
    }

    /// The same without a queue, for a single item that others wait for, and of which there are
    /// never many at once.
    pub async fn run_now<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        match task::spawn_blocking(work).await.map_err(task::JoinError::try_into_panic) {
            Ok(done) => done,
            Err(Ok(panic)) => resume_unwind(panic),
            // The runtime ends, and this task with it.
            Err(Err(_)) => std::future::pending().await,
        }
    }

    /// Does this to each of these items, in their order. Few and small ones are done at once; more
    /// are done in parts, with a turn in the queue for each part.
    pub async fn each<I, O>(
        &self,
        things: Vec<I>,
        bytes: impl Fn(&I) -> usize,
        work: impl Fn(I) -> O + Send + Sync + 'static,
    ) -> Large<Vec<O>>
    where
        I: Send + 'static,
        O: Send + 'static,
    {
        let weight = weight_of(things.iter(), &bytes);
        if weight <= SHORT {
            return Large::small(things.into_iter().map(work).collect());
        }
        let work = Arc::new(work);
        let mut done = self.large(Vec::with_capacity(things.len()), weight);
        let mut things = self.large(things.into_iter(), weight);
        while things.len() > 0 {
            let (mut part, mut weight) = (Vec::new(), 0);
            while let Some(thing) = (weight < LONG).then(|| things.next()).flatten() {
                let length = bytes(&thing);
                weight += EACH + length;
                part.push((thing, length));
            }
            let work = Arc::clone(&work);
            let go_through = move || {
                let mut breath = Breath::default();
                let did = |(thing, length)| {
                    let done = work(thing);
                    breath.did(length);
                    done
                };
                part.into_iter().map(did).collect()
            };
            let mut part_done = self.run(go_through).await;
            done.append(&mut part_done);
        }
        things.take();
        done
    }

    /// The same bytes. If they are many, dropping the last of them does not delay requests.
    pub fn keep(&self, bytes: Bytes) -> Bytes {
        let length = bytes.len();
        if length > SHORT { Bytes::from_owner(self.large(bytes, length)) } else { bytes }
    }

    /// Holds content of that weight; dropping it does not delay requests.
    pub fn large<T: Send + 'static>(&self, content: T, weight: usize) -> Large<T> {
        Large { content: Some(content), work: (weight > SHORT).then(|| self.clone()) }
    }
}

/// Starts threads that do one job after the other, as many jobs at once as there are threads.
fn start_threads(number: usize) -> Option<mpsc::Sender<Job>> {
    let (jobs, queue) = mpsc::channel::<Job>();
    let queue = Arc::new(Mutex::new(queue));
    let started = (0..number).map(|_| {
        let queue = Arc::clone(&queue);
        let next = move || queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        thread::Builder::new().name("long-work".to_owned()).spawn(move || {
            step_back();
            STEPS_BACK.set(true);
            while let Ok(job) = next() {
                job();
            }
        })
    });
    started.filter_map(Result::ok).count().gt(&0).then_some(jobs)
}

/// Lowers this thread's priority, so that other threads go first where there is not a processor for
/// each. If that is not allowed, the thread runs like any other.
fn step_back() {
    // On Linux this applies to this thread alone.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::setpriority_process(None, 10);
}

impl fmt::Debug for LongWork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LongWork").field("turns", &self.turns.available_permits()).finish_non_exhaustive()
    }
}

/// Content that takes long to drop, because values are wiped then. Wherever it is dropped, threads
/// that serve no requests do that.
pub struct Large<T: Send + 'static> {
    content: Option<T>,
    /// `None` where it is not large.
    work: Option<LongWork>,
}

impl<T: Send + 'static> Large<T> {
    /// Content that is not large.
    pub fn small(content: T) -> Self {
        Self { content: Some(content), work: None }
    }

    /// Takes the content out. To be called once.
    pub fn take(&mut self) -> T {
        self.content.take().expect(TAKEN)
    }

    /// Turns the content into other content of the same size.
    pub fn map<U: Send + 'static>(mut self, map: impl FnOnce(T) -> U) -> Large<U> {
        Large { content: Some(map(self.take())), work: self.work.take() }
    }
}

impl<T: Send + 'static> Large<Vec<T>> {
    /// The items one after the other. Items that are not taken are dropped as the whole would have
    /// been.
    pub fn into_each(self) -> Each<T> {
        Each(self.map(Vec::into_iter))
    }

    /// The wanted items, and the others.
    pub fn parted(mut self, is_wanted: impl FnMut(&T) -> bool) -> (Self, Self) {
        let (wanted, others) = self.take().into_iter().partition(is_wanted);
        let part = |things| Self { content: Some(things), work: self.work.clone() };
        (part(wanted), part(others))
    }
}

/// Items that are taken one after the other.
#[derive(Debug)]
pub struct Each<T: Send + 'static>(Large<std::vec::IntoIter<T>>);

impl<T: Send + 'static> Iterator for Each<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        let next = self.0.next();
        if next.is_none() {
            // Nothing is left that would take long to drop.
            self.0.work = None;
        }
        next
    }
}

const TAKEN: &str = "what is given away is not used any more";

impl<T: Send + 'static> IntoIterator for Large<Vec<T>> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(mut self) -> std::vec::IntoIter<T> {
        self.take().into_iter()
    }
}

impl<T: Send + 'static> Deref for Large<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.content.as_ref().expect(TAKEN)
    }
}

impl<T: Send + 'static> DerefMut for Large<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.content.as_mut().expect(TAKEN)
    }
}

impl AsRef<[u8]> for Large<Bytes> {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl<T: Send + 'static> Drop for Large<T> {
    fn drop(&mut self) {
        if let (Some(content), Some(work)) = (self.content.take(), self.work.take()) {
            work.drop_next(content);
        }
    }
}

impl<T: Send + fmt::Debug + 'static> fmt::Debug for Large<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.content.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Mutex, PoisonError,
            atomic::{AtomicUsize, Ordering},
            mpsc,
        },
        thread::{self, ThreadId},
        time::Duration,
    };

    use super::*;

    /// Reports the thread on which it is dropped.
    struct Mark(mpsc::Sender<ThreadId>);

    impl Drop for Mark {
        fn drop(&mut self) {
            let _ = self.0.send(thread::current().id());
        }
    }

    #[tokio::test]
    async fn things_that_are_gone_through_leave_the_thread_to_others_in_between() {
        let turns = Arc::new(AtomicUsize::new(0));
        let other = task::spawn({
            let turns = Arc::clone(&turns);
            async move {
                loop {
                    turns.fetch_add(1, Ordering::Relaxed);
                    task::yield_now().await;
                }
            }
        });
        let mut pace = Pace::default();
        for _ in 0..16 * SHORT / EACH {
            pace.did(0).await;
        }
        assert!(turns.load(Ordering::Relaxed) >= 16);
        other.abort();
    }

    #[tokio::test]
    async fn long_work_is_done_elsewhere_and_a_part_at_a_time() {
        let here = thread::current().id();
        let work = LongWork::at_once(1);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let note = |seen: &Arc<Mutex<Vec<ThreadId>>>| {
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(thread::current().id());
        };
        let (noted, things): (_, Vec<usize>) = (Arc::clone(&seen), (0..8).collect());
        let all = work.each(
            things.clone(),
            |_| LONG,
            move |thing| {
                note(&noted);
                thing
            },
        );
        // A later caller waits for no more than a part.
        let order = Arc::clone(&seen);
        let other = async {
            task::yield_now().await;
            work.run(move || order.lock().unwrap_or_else(PoisonError::into_inner).len()).await
        };
        let (all, before) = tokio::join!(all, other);
        assert_eq!(*all, things);
        assert!(before < 8, "{before} parts went first");
        assert!(seen.lock().unwrap().iter().all(|thread| *thread != here));
        let few = work.each(vec![1, 2], |_| 1, move |thing| (thing, thread::current().id())).await;
        assert_eq!(*few, [(1, here), (2, here)], "what is short does not change threads");
    }

    #[tokio::test]
    async fn what_is_large_comes_to_its_end_elsewhere() {
        let (here, work) = (thread::current().id(), LongWork::default());
        let (told, ends) = mpsc::channel();
        drop(work.large(Mark(told.clone()), SHORT + 1));
        let waiting = move || (ends.recv_timeout(Duration::from_secs(30)), ends);
        let (ended, ends) = task::spawn_blocking(waiting).await.unwrap();
        assert_ne!(ended.unwrap(), here);
        drop(work.large(Mark(told.clone()), SHORT));
        assert_eq!(ends.try_recv().unwrap(), here);
        let mut large = work.large(Mark(told), SHORT + 1);
        let taken = large.take();
        drop(large);
        assert!(ends.try_recv().is_err(), "what is given away is with who has it");
        drop(taken);
        assert_eq!(ends.try_recv().unwrap(), here);
    }

    #[tokio::test]
    async fn bytes_of_a_long_answer_come_to_their_end_elsewhere() {
        struct Marked(Vec<u8>, #[expect(dead_code, reason = "reports where it is dropped")] Mark);
        impl AsRef<[u8]> for Marked {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        let (here, work) = (thread::current().id(), LongWork::default());
        let (told, ends) = mpsc::channel();
        let mut kept = work.keep(Bytes::from_owner(Marked(vec![7; 2 * SHORT], Mark(told.clone()))));
        let piece = kept.split_to(SHORT);
        drop(kept);
        assert_eq!(piece, vec![7; SHORT]);
        drop(piece);
        let waiting = move || (ends.recv_timeout(Duration::from_secs(30)), ends);
        let (ended, ends) = task::spawn_blocking(waiting).await.unwrap();
        assert_ne!(ended.unwrap(), here);
        drop(work.keep(Bytes::from_owner(Marked(vec![7; SHORT], Mark(told)))));
        assert_eq!(ends.try_recv().unwrap(), here);
    }

    #[tokio::test]
    #[should_panic(expected = "on purpose")]
    async fn a_panic_of_long_work_is_that_of_who_waits_for_it() {
        LongWork::default().run(|| panic!("on purpose")).await;
    }
}
