//! Gets records of what happens written: counted, queued, or before the answer.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, Timeout},
};

use super::{
    budget::Budget,
    record::{Kind, Outcome, Record},
    signals::Signals,
    sinks::{After, Failed, Sink, SinkError},
    window::{Sight, Sum, Window},
};
use crate::{clock::Timestamp, log, metrics::Metrics};

/// The records that wait to be written, and the counts that are kept meanwhile.
///
/// There are three ways in, by when a record must be written. All are bounded, and none loses
/// count:
/// - [`Ledger::count`]: counted; written with the window.
/// - [`Ledger::note`]: written by itself, soon. Where the queue is full, counted.
/// - [`Ledger::queue`]: written as soon as possible, and confirmed when it is.
///
/// One half of the queue is for writes and administration alone: callers who are denied, or have
/// much to read, must not keep others from changing anything.
///
/// Refusals are counted apart from accesses, and their cost is limited in bytes a day: a sum of
/// them that cannot be paid for stays and adds up until it can be, or until the end.
///
/// One task ([`Writer`]) empties them, so that there is one order and one writer of each chain in a
/// process. Everything that waits together is written together.
pub(super) struct Ledger {
    window: Window,
    refusals: Window,
    /// The limit of the cost of refusals.
    pub(super) budget: Budget,
    queue: Mutex<VecDeque<Entry>>,
    capacity: usize,
    /// Notified when a caller waits for a record, and when there are enough for a batch.
    wake: Notify,
    /// Notified of a record that nobody waits for.
    gather: Notify,
    is_up: AtomicBool,
    /// How long a request waits for its record.
    patience: Duration,
    metrics: Arc<Metrics>,
}

struct Entry {
    record: Box<Record>,
    /// The caller who waits for it to be written.
    waiting: Option<oneshot::Sender<()>>,
}

/// The record is not written, or it is not known whether it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the audit cannot be written")]
pub struct Unrecorded;

/// A record that is queued: completes when it is written, or when the caller has waited for
/// long enough. If dropped before, it takes a record of [`Outcome::Begun`] out of the queue and
/// leaves any other there.
pub(super) struct Queued(Pin<Box<Timeout<oneshot::Receiver<()>>>>);

impl Future for Queued {
    type Output = Result<(), Unrecorded>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(context).map(|written| match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Unrecorded),
        })
    }
}

impl Ledger {
    /// Keeps at most `max_sums` separate sums, and `capacity` records waiting.
    pub(super) fn new(
        max_sums: usize,
        capacity: usize,
        patience: Duration,
        budget: Budget,
        metrics: Arc<Metrics>,
    ) -> Self {
        metrics.gauge(STRANGERS_WAITING, &[], 0.0);
        Self {
            window: Window::new(max_sums),
            refusals: Window::new(max_sums.min(MAX_REFUSALS)),
            budget,
            queue: Mutex::default(),
            capacity,
            wake: Notify::new(),
            gather: Notify::new(),
            is_up: AtomicBool::new(true),
            patience,
            metrics,
        }
    }

    /// Whether the last attempt to write records succeeded.
    pub(super) fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Relaxed)
    }

    /// The number of records that wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().len()
    }

    /// The number of sums that are kept.
    pub(super) fn sums(&self) -> usize {
        self.window.len() + self.refusals.len()
    }

    /// Counts an access, or a refusal.
    pub(super) fn count(&self, sight: Sight<'_>, at: Timestamp) {
        match sight.is_refusal() {
            true => self.refusals.add(sight.without_texts(), at),
            false => self.window.add(sight, at),
        }
    }

    /// Counts a record that cannot be kept by itself.
    fn fold(&self, record: &Record) {
        let window = if Sight::of(record).is_refusal() { &self.refusals } else { &self.window };
        window.fold(record);
    }

    /// Puts back sums that could not be written.
    fn give_back_sums(&self, sums: impl IntoIterator<Item = Sum>) {
        let (refusals, accesses): (Vec<Sum>, Vec<Sum>) = sums.into_iter().partition(Sum::is_refusal);
        self.refusals.give_back(refusals);
        self.window.give_back(accesses);
    }

    /// Queues a record to be written soon; where too many wait, it is counted with others.
    pub(super) fn note(&self, record: Record) {
        if let Err(record) = self.push(Box::new(record), None) {
            self.metrics.count("secretier_audit_summed_total", &[]);
            self.fold(&record);
        }
    }

    /// Queues a record to be written as soon as possible, and returns a future of that.
    ///
    /// # Errors
    /// [`Unrecorded`], at once or later. A record of [`Outcome::Begun`] is then not written at
    /// all: the caller is told that nothing was begun. Any other is written, or counted where
    /// the queue is full.
    pub(super) fn queue(&self, record: Record) -> Result<Queued, Unrecorded> {
        let (written, waits) = oneshot::channel();
        if let Err(record) = self.push(Box::new(record), Some(written)) {
            self.metrics.count("secretier_audit_summed_total", &[]);
            if record.outcome != Outcome::Begun {
                self.fold(&record);
            }
            return Err(Unrecorded);
        }
        Ok(Queued(Box::pin(tokio::time::timeout(self.patience, waits))))
    }

    /// The same, and waits until the record is written.
    pub(super) async fn write(&self, record: Record) -> Result<(), Unrecorded> {
        self.queue(record)?.await
    }

    fn push(&self, record: Box<Record>, waiting: Option<oneshot::Sender<()>>) -> Result<(), Box<Record>> {
        let is_waited_for = waiting.is_some();
        let capacity = match record.kind {
            Kind::Admin | Kind::Write => self.capacity,
            Kind::Denial | Kind::Lookup => self.capacity.div_ceil(2),
        };
        let makes_a_batch = {
            let mut queue = self.lock();
            if queue.len() >= capacity {
                return Err(record);
            }
            queue.push_back(Entry { record, waiting });
            queue.len() >= BATCH.min(capacity)
        };
        match is_waited_for || makes_a_batch {
            true => self.wake.notify_one(),
            false => self.gather.notify_one(),
        }
        Ok(())
    }

    fn take(&self, limit: usize) -> Vec<Entry> {
        let mut queue = self.lock();
        let limit = limit.min(queue.len());
        queue.drain(..limit).collect()
    }

    /// Puts records back in front, as far as there is room; the others are counted.
    fn give_back(&self, records: Vec<Record>) {
        for record in records.into_iter().rev() {
            let mut queue = self.lock();
            if queue.len() < self.capacity {
                queue.push_front(Entry { record: Box::new(record), waiting: None });
            } else {
                drop(queue);
                self.metrics.count("secretier_audit_summed_total", &[]);
                self.fold(&record);
            }
        }
    }

    /// Tells waiting callers that nothing can be written now, as those of a failed batch are told.
    fn refuse_waiting(&self) {
        self.lock().retain_mut(|entry| {
            let is_refused = entry.waiting.take().is_some();
            !(is_refused && entry.record.outcome == Outcome::Begun)
        });
    }

    fn has_urgent(&self) -> bool {
        self.lock().iter().any(|entry| entry.waiting.is_some())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Entry>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes the records that the ledger gathers.
pub struct Writer {
    ledger: Arc<Ledger>,
    /// The first decides whether a record is written; the others get the records that it got.
    sinks: Vec<Sink>,
    signals: Signals,
    window: Duration,
    /// Records that may or may not be written, as they were handed over.
    doubtful: Vec<Record>,
    next_window: Instant,
    /// When records that nobody waits for have been gathered for long enough.
    gathered_at: Option<Instant>,
    retry_at: Option<Instant>,
    backoff: Duration,
}

/// The most records that are written together.
const BATCH: usize = 500;

/// The part of a batch for sums, where there are as many: they are written despite other records.
const SUMS_OF_A_BATCH: usize = BATCH / 5;

/// The most separate sums of refusals: strangers can make one for each address.
const MAX_REFUSALS: usize = 4096;

const STRANGERS_WAITING: &str = "secretier_audit_strangers_waiting";

/// How long records that nobody waits for are gathered, unless a window is shorter: a
/// transaction for each would cost more than the records are worth.
const GATHER: Duration = Duration::from_millis(100);

const SHORTEST_BACKOFF: Duration = Duration::from_millis(250);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// How often to look for chains whose end is not signed.
const SIGN_EVERY: Duration = Duration::from_secs(2);

impl Writer {
    pub(super) fn new(ledger: Arc<Ledger>, sinks: Vec<Sink>, signals: Signals, window: Duration) -> Self {
        Self {
            ledger,
            sinks,
            signals,
            window,
            doubtful: Vec::new(),
            next_window: Instant::now() + window,
            gathered_at: None,
            retry_at: None,
            backoff: SHORTEST_BACKOFF,
        }
    }

    /// Runs until `stopped` completes; then until the rest is written, for as long as
    /// it is polled.
    pub async fn until(mut self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let ledger = Arc::clone(&self.ledger);
        let mut sign = tokio::time::interval(SIGN_EVERY);
        sign.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let due_at = self.retry_at.unwrap_or(self.next_window);
            let due_at = self.gathered_at.map_or(due_at, |gathered_at| gathered_at.min(due_at));
            tokio::select! {
                () = ledger.wake.notified() => {}
                () = ledger.gather.notified(), if self.gathered_at.is_none() => {
                    self.gathered_at = Some(Instant::now() + GATHER.min(self.window));
                    continue;
                }
                () = tokio::time::sleep_until(due_at) => {}
                _ = sign.tick() => self.sign().await,
                () = &mut stopped => break,
            }
            self.gathered_at = None;
            self.write_all(false).await;
        }
        self.write_all(true).await;
        while let Some(at) = self.retry_at {
            tokio::time::sleep_until(at).await;
            self.write_all(true).await;
        }
    }

    /// Writes everything that waits, and the window's sums if it is over or this is the end.
    async fn write_all(&mut self, is_end: bool) {
        let now = Instant::now();
        let may_try = is_end || self.retry_at.is_none_or(|at| now >= at) || self.ledger.has_urgent();
        if !may_try {
            return;
        }
        if !self.settle().await {
            self.ledger.refuse_waiting();
            return;
        }
        // Where nothing else waits that would show whether records can be written
        // again, the sums are tried early.
        let is_probe = !self.ledger.is_up() && self.ledger.waiting() == 0;
        let mut sums = Vec::new();
        if is_end || is_probe || now >= self.next_window {
            self.next_window = now + self.window;
            sums = self.ledger.window.take();
            sums.extend(self.refusals(is_end));
        }
        if self.retry_at.is_some_and(|at| now >= at) {
            // There may be nothing to write. A failure sets it again, and a success ends it.
            self.retry_at = (!is_end).then(|| now + self.backoff);
        }
        let mut sums = sums.into_iter();
        // Later records are gathered anew, or have notified us. While sums are left, these records
        // are written before them, so that no caller waits for more than one batch of sums.
        let mut left = if is_end { usize::MAX } else { self.ledger.waiting() };
        loop {
            let kept_free = sums.len().min(SUMS_OF_A_BATCH);
            let most = if kept_free > 0 { BATCH - kept_free } else { BATCH.min(left) };
            let mut entries = self.ledger.take(most);
            left = left.saturating_sub(entries.len());
            let some: Vec<Sum> = sums.by_ref().take(BATCH - entries.len()).collect();
            if entries.is_empty() && some.is_empty() {
                break;
            }
            // The caller has gone, or was told that nothing was begun.
            let is_given_up = |entry: &Entry| entry.waiting.as_ref().is_some_and(oneshot::Sender::is_closed);
            entries.retain(|entry| entry.record.outcome != Outcome::Begun || !is_given_up(entry));
            if entries.is_empty() && some.is_empty() {
                continue;
            }
            if let Err(back) = self.write(entries, some).await {
                self.ledger.give_back_sums(back.into_iter().chain(sums));
                break;
            }
        }
    }

    /// The sums of refusals that are to be written now: those that are paid for, the oldest first,
    /// and at the end all of them. The others stay and add up. Attacks are looked for in both: none
    /// can hide behind its own number.
    fn refusals(&mut self, is_end: bool) -> Vec<Sum> {
        let mut sums = self.ledger.refusals.take();
        let unseen: Vec<Record> = sums.iter_mut().filter_map(Sum::unseen).collect();
        self.signals.observe(&unseen);
        sums.sort_by_key(Sum::first_at);
        let budget = &self.ledger.budget;
        let (mut paid, mut unpaid) = (Vec::new(), Vec::new());
        for mut sum in sums {
            let is_written = is_end || sum.is_paid_from(budget);
            if is_written { paid.push(sum) } else { unpaid.push(sum) }
        }
        self.ledger.metrics.gauge(STRANGERS_WAITING, &[], unpaid.len() as f64);
        self.ledger.refusals.give_back(unpaid);
        paid
    }

    /// Writes the records in doubt by themselves: there must not be more of them, and once they are
    /// known to be there they are not written again. Returns whether none is in doubt any more.
    async fn settle(&mut self) -> bool {
        if self.doubtful.is_empty() {
            return true;
        }
        let Some(first) = self.sinks.first_mut() else { return true };
        let (landed, failed) = match first.append(&self.doubtful, &[]).await {
            Ok(()) => (true, None),
            Err(Failed { after, landed, error }) => (landed, Some((first.as_str(), after, error))),
        };
        let doubtful = std::mem::take(&mut self.doubtful);
        match &failed {
            _ if landed => self.wrote(&doubtful).await,
            Some((_, After::Refused, _)) => self.ledger.give_back(doubtful),
            Some((_, After::Untouched | After::InDoubt, _)) | None => self.doubtful = doubtful,
        }
        if let Some((sink, _, error)) = &failed {
            self.failed(sink, error);
        }
        failed.is_none()
    }

    /// Writes one batch. Returns the sums that are not written and not in doubt.
    async fn write(&mut self, entries: Vec<Entry>, sums: Vec<Sum>) -> Result<(), Vec<Sum>> {
        let (mut fresh, mut waiting) = (Vec::with_capacity(entries.len() + sums.len()), Vec::new());
        for entry in entries {
            fresh.push(*entry.record);
            waiting.extend(entry.waiting);
        }
        let queued = fresh.len();
        fresh.extend(sums.iter().map(Sum::record));
        let Some(first) = self.sinks.first_mut() else { return Ok(()) };
        match first.append(&[], &fresh).await {
            Ok(()) => {
                for waiting in waiting {
                    // A caller who no longer waits needs no answer.
                    let _ = waiting.send(());
                }
                self.wrote(&fresh).await;
                Ok(())
            }
            Err(Failed { after, error, .. }) => {
                let sink = first.as_str();
                self.failed(sink, &error);
                // An action that has not begun never will: its caller is told so.
                fresh.truncate(queued);
                let kept = |record: &Record| record.outcome != Outcome::Begun;
                match after {
                    After::InDoubt => {
                        self.doubtful.extend(fresh.into_iter().filter(kept));
                        self.doubtful.extend(sums.iter().map(Sum::record));
                        Err(Vec::new())
                    }
                    After::Untouched | After::Refused => {
                        self.ledger.give_back(fresh.into_iter().filter(kept).collect());
                        Err(sums)
                    }
                }
            }
        }
    }

    /// Passes records that the first sink has on to the others.
    async fn wrote(&mut self, records: &[Record]) {
        for sink in self.sinks.iter_mut().skip(1) {
            if let Err(Failed { error, .. }) = sink.append(&[], records).await {
                self.ledger.metrics.count("secretier_audit_failures_total", &[("sink", sink.as_str())]);
                tracing::error!(sink = sink.as_str(), error = log::chain(&error), "records are missing there");
            }
        }
        for kind in Kind::ALL {
            let count = records.iter().filter(|record| record.kind == kind).count();
            if count > 0 {
                let counter = self.ledger.metrics.counter("secretier_audit_records_total", &[("kind", kind.as_str())]);
                counter.increment(count as u64);
            }
        }
        self.signals.observe(records);
        (self.retry_at, self.backoff) = (None, SHORTEST_BACKOFF);
        if !self.ledger.is_up.swap(true, Ordering::Relaxed) {
            tracing::info!("the audit is written again");
        }
    }

    fn failed(&mut self, sink: &'static str, error: &SinkError) {
        self.ledger.metrics.count("secretier_audit_failures_total", &[("sink", sink)]);
        self.retry_at = Some(Instant::now() + self.backoff);
        self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
        if self.ledger.is_up.swap(false, Ordering::Relaxed) {
            tracing::error!(
                sink,
                error = log::chain(error),
                "the audit cannot be written; accesses are counted meanwhile"
            );
        }
    }

    async fn sign(&mut self) {
        for sink in &mut self.sinks {
            if let Err(error) = sink.sign().await {
                tracing::debug!(%error, "the audit's ends could not be signed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use crate::{
        access::{Peer, audit::lines::Lines},
        clock::Clock,
        keys::MasterKeys,
        sealing::KeyRing,
    };

    fn record(kind: Kind, outcome: Outcome) -> Record {
        Record::example(kind, "A", outcome)
    }

    fn ledger(capacity: usize) -> Arc<Ledger> {
        let (clock, metrics) = (Clock::system(), Metrics::new());
        let budget = Budget::new(1 << 28, clock, &metrics);
        Arc::new(Ledger::new(10_000, capacity, Duration::from_secs(5), budget, metrics))
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_written_soon_also_what_comes_while_that_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("audit.jsonl");
        let keys = Arc::new(MasterKeys::fixed(KeyRing::default()));
        let ledger = ledger(2 * BATCH);
        let signals = Signals::new(super::super::signals::Config::default(), Clock::system(), Metrics::new());
        let sinks = vec![Sink::Lines(Lines::file(file.clone(), 64 << 20, 8, keys, "test"))];
        let writer = Writer::new(Arc::clone(&ledger), sinks, signals, Duration::from_secs(3600));
        let (stop, stopped) = oneshot::channel::<()>();
        let writing = tokio::spawn(writer.until(async move { drop(stopped.await) }));
        let written = async || {
            while ledger.waiting() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        for _ in 0..3 {
            // Fewer than a batch, so that only their time gets them written.
            (0..=BATCH / 2).for_each(|_| ledger.note(record(Kind::Lookup, Outcome::Found)));
            tokio::time::timeout(Duration::from_secs(60), written()).await.unwrap();
            ledger.note(record(Kind::Lookup, Outcome::Found));
        }
        tokio::time::timeout(Duration::from_secs(60), written()).await.unwrap();
        drop(stop);
        writing.await.unwrap();
        let lines = std::fs::read_to_string(file).unwrap().lines().count();
        assert!(lines >= 3 * (BATCH / 2 + 2), "{lines}");
    }

    #[tokio::test]
    async fn while_nothing_can_be_written_the_writer_sleeps_and_then_finds_that_something_can_be() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("below");
        let keys = Arc::new(MasterKeys::fixed(KeyRing::default()));
        let ledger = ledger(10);
        let signals = Signals::new(super::super::signals::Config::default(), Clock::system(), Metrics::new());
        let sinks = vec![Sink::Lines(Lines::file(below.join("audit.jsonl"), 1 << 20, 8, keys, "test"))];
        let mut writer = Writer::new(Arc::clone(&ledger), sinks, signals, Duration::from_secs(3600));
        let begun = ledger.write(record(Kind::Write, Outcome::Begun));
        let (begun, ()) = tokio::join!(begun, writer.write_all(false));
        assert_eq!((begun, ledger.is_up()), (Err(Unrecorded), false));
        for _ in 0..2 {
            tokio::time::sleep_until(writer.retry_at.unwrap()).await;
            writer.write_all(false).await;
            assert!(
                writer.retry_at.is_some_and(|at| at > Instant::now()),
                "it would be woken at once, again and again"
            );
        }
        std::fs::create_dir(&below).unwrap();
        ledger.fold(&record(Kind::Lookup, Outcome::Failed));
        tokio::time::sleep_until(writer.retry_at.unwrap()).await;
        writer.write_all(false).await;
        assert!(ledger.is_up(), "long before the window is over");
        let lines = std::fs::read_to_string(below.join("audit.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), 1, "what was refused never began: {lines}");
    }

    #[tokio::test]
    async fn who_waits_behind_a_batch_in_doubt_is_told_at_once_that_nothing_can_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("below").join("audit.jsonl");
        let keys = Arc::new(MasterKeys::fixed(KeyRing::default()));
        let ledger = ledger(10);
        let signals = Signals::new(super::super::signals::Config::default(), Clock::system(), Metrics::new());
        let sinks = vec![Sink::Lines(Lines::file(path, 1 << 20, 8, keys, "test"))];
        let mut writer = Writer::new(Arc::clone(&ledger), sinks, signals, Duration::from_secs(3600));
        writer.doubtful.push(record(Kind::Write, Outcome::Done));
        let mut begun = std::pin::pin!(ledger.write(record(Kind::Write, Outcome::Begun)));
        let mut denied = std::pin::pin!(ledger.write(record(Kind::Denial, Outcome::Denied)));
        assert!(begun.as_mut().now_or_never().is_none() && denied.as_mut().now_or_never().is_none());
        writer.write_all(false).await;
        assert_eq!(begun.now_or_never(), Some(Err(Unrecorded)));
        assert_eq!(denied.now_or_never(), Some(Err(Unrecorded)));
        let left: Vec<Outcome> = ledger.take(10).into_iter().map(|entry| entry.record.outcome).collect();
        assert_eq!(left.last(), Some(&Outcome::Denied), "it is written as soon as that is possible");
        assert!(!left.contains(&Outcome::Begun), "it never will be");
    }

    #[tokio::test]
    async fn a_write_that_was_given_up_before_it_was_on_record_is_not_recorded_as_begun() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let keys = Arc::new(MasterKeys::fixed(KeyRing::default()));
        let ledger = ledger(10);
        let signals = Signals::new(super::super::signals::Config::default(), Clock::system(), Metrics::new());
        let sinks = vec![Sink::Lines(Lines::file(path.clone(), 1 << 20, 8, keys, "test"))];
        let mut writer = Writer::new(Arc::clone(&ledger), sinks, signals, Duration::from_secs(3600));
        {
            let mut begun = std::pin::pin!(ledger.write(record(Kind::Write, Outcome::Begun)));
            assert!(begun.as_mut().now_or_never().is_none());
            let mut denied = std::pin::pin!(ledger.write(record(Kind::Denial, Outcome::Denied)));
            assert!(denied.as_mut().now_or_never().is_none());
        }
        writer.write_all(true).await;
        let lines = std::fs::read_to_string(path).unwrap();
        assert!(lines.lines().count() == 1 && lines.contains("denied"), "{lines}");
    }

    #[tokio::test]
    async fn whoever_waits_for_a_record_waits_for_one_batch_of_sums_at_most_and_no_sum_is_lost() {
        const BATCHES: usize = 8;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let keys = Arc::new(MasterKeys::fixed(KeyRing::default()));
        let ledger = ledger(10 * BATCH);
        let signals = Signals::new(super::super::signals::Config::default(), Clock::system(), Metrics::new());
        let sinks = vec![Sink::Lines(Lines::file(path.clone(), 64 << 20, 8, keys, "test"))];
        let mut writer = Writer::new(Arc::clone(&ledger), sinks, signals, Duration::ZERO);
        let found = |number: usize| {
            let mut record = Record::example(Kind::Lookup, &format!("KEY_{number}"), Outcome::Found);
            record.detail.peer = Some(Peer::Ip([192, 0, 2, 1].into()));
            record
        };
        (0..BATCHES * BATCH).for_each(|number| ledger.fold(&found(number)));
        let lines = || std::fs::read_to_string(&path).unwrap();
        // These come while the first batch is being written: a write, and more of the rest than a
        // batch has room for.
        let come = async {
            let begun = ledger.queue(record(Kind::Write, Outcome::Begun)).unwrap();
            (0..BATCH).for_each(|_| ledger.note(record(Kind::Denial, Outcome::Denied)));
            begun.await.unwrap();
        };
        tokio::join!(writer.write_all(false), come);
        let begun_at = lines().lines().position(|line| line.contains("begun")).unwrap();
        assert!((BATCH..2 * BATCH).contains(&begun_at), "behind {begun_at} others");
        writer.write_all(false).await;
        let text = lines();
        assert_eq!(text.matches("KEY_").count(), BATCHES * BATCH, "every sum");
        assert_eq!(text.matches("\"denied\"").count(), BATCH, "and every denial");
    }

    #[tokio::test]
    async fn refusals_that_cannot_be_paid_for_add_up_and_are_looked_at_and_are_written_later() {
        const A_DAY: Duration = Duration::from_secs(24 * 60 * 60);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let keys = Arc::new(MasterKeys::fixed(KeyRing::default()));
        let (clock, metrics) = (Clock::system(), Metrics::new());
        let budget = Budget::new(1 << 20, clock.clone(), &metrics);
        while budget.pay(None, 100) {}
        let ledger = Arc::new(Ledger::new(100, 100, Duration::from_secs(5), budget, Arc::clone(&metrics)));
        let config = super::super::signals::Config { malformed: 3, ..super::super::signals::Config::default() };
        let signals = Signals::new(config, clock.clone(), Arc::clone(&metrics));
        let sinks = vec![Sink::Lines(Lines::file(path.clone(), 64 << 20, 8, keys, "test"))];
        let mut writer = Writer::new(Arc::clone(&ledger), sinks, signals, Duration::ZERO);
        let refuse = |times| {
            let mut malformed = Record { grant: None, ..record(Kind::Lookup, Outcome::Invalid) };
            (malformed.detail.peer, malformed.count) = (Some(Peer::Ip([192, 0, 2, 1].into())), times);
            ledger.fold(&malformed);
        };
        let shows = |line: &str| metrics.render().lines().any(|found| found == line);
        let written = || std::fs::read_to_string(&path).unwrap_or_default();
        for times in [1, 2, 4] {
            refuse(times);
            writer.write_all(false).await;
            assert_eq!(written(), "");
            assert!(shows("secretier_audit_strangers_waiting 1"));
        }
        assert!(shows("secretier_signals_total{signal=\"malformed_flood\"} 1"), "none hides behind its number");
        clock.advance(A_DAY);
        writer.write_all(false).await;
        assert!(written().lines().count() == 1 && written().contains("\"count\":7"), "{}", written());
        assert!(shows("secretier_audit_strangers_waiting 0"));
        assert!(shows("secretier_signals_total{signal=\"malformed_flood\"} 1"), "once");
        while ledger.budget.pay(None, 100) {}
        refuse(1);
        writer.write_all(false).await;
        assert_eq!(written().lines().count(), 1);
        writer.write_all(true).await;
        assert_eq!(written().lines().count(), 2, "at the end, all of it");
    }

    #[tokio::test]
    async fn denials_and_lookups_leave_writes_room_in_the_queue() {
        let ledger = ledger(4);
        for _ in 0..10 {
            ledger.note(record(Kind::Lookup, Outcome::Found));
        }
        assert_eq!((ledger.waiting(), ledger.window.len()), (2, 1));
        let mut begun = std::pin::pin!(ledger.write(record(Kind::Write, Outcome::Begun)));
        assert!(begun.as_mut().now_or_never().is_none(), "it waits for its turn");
    }
}
