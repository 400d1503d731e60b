//! A connection that closes when it is idle, when a request's headers do not arrive in time, or
//! when another connection needs its place.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use metrics::Counter;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep},
};

use crate::{
    access::{Access, Caller, Peer},
    metrics::Metrics,
};

/// Reads fail with a timeout, and so do writes of bytes that the client does not take:
///
/// - when nothing was read or written for `idle` and no request is in progress, or an answer
///   is not taken;
/// - when a request's headers are not complete `header` after their first byte;
/// - when no byte has arrived `header` after the connection was accepted;
/// - when the connection is to be closed for another: it is idle then, and hyper reads, or
///   an answer is not taken.
///
/// hyper has a timeout for headers too, but it also runs while a connection is idle, and
/// would close it at the shorter of the two.
///
/// The timer is set once per wait, not once per read: reading notes the time, and a timer
/// that fires early sets itself again. The clock is read once per read, and per write
/// only where the write had to wait.
pub(super) struct Watched<S> {
    stream: S,
    header: Duration,
    idle: Duration,
    /// `header` until the first byte, then `idle`.
    patience: Duration,
    active_at: Instant,
    /// When headers began to arrive, and how many requests had begun by then.
    heading: Option<(Instant, u64)>,
    requests: Arc<Requests>,
    timer: Pin<Box<Sleep>>,
    /// The task that the timer, and a close, were last registered to wake.
    waker: Option<Waker>,
    /// Whether an answer was not taken at once.
    has_stalled: bool,
}

/// The requests of one connection, and its caller. Its timeouts depend on them, and they
/// decide whether it can be closed for another.
#[derive(Debug)]
pub(super) struct Requests {
    caller: Caller,
    state: AtomicU64,
    /// Whether it is HTTP/2: frames come at any time, so other bytes are not slow headers.
    multiplexed: AtomicBool,
    /// Whether one of the requests was admitted.
    was_let_in: AtomicBool,
    /// Whether a request line with a `#` in its target was read.
    had_fragment: AtomicBool,
    /// Whether it ended because an answer was not taken.
    was_unread: AtomicBool,
    /// When bytes last arrived. This and the next are in nanoseconds since `accepted_at`, so that
    /// the longest idle can be found among connections that came at the same time, too.
    arrived_at: AtomicU64,
    /// When a request last ended, or a part of its answer was written.
    answered_at: AtomicU64,
    accepted_at: Instant,
    /// Woken when the connection is to be closed for another.
    closer: AtomicWaker,
}

/// [`Requests::state`] in one word, so that it is compared and changed as one: how many are
/// in progress (far below 65,536 at once), how many have begun, and whether it is closing.
#[derive(Debug, Clone, Copy)]
struct State(u64);

impl State {
    const ONE: u64 = 1;
    const BEGUN: u64 = 1 << 16;
    const CLOSING: u64 = 1 << 63;

    fn in_progress(self) -> bool {
        !self.0.is_multiple_of(Self::BEGUN)
    }

    fn begun(self) -> u64 {
        (self.0 & !Self::CLOSING) / Self::BEGUN
    }

    fn is_closing(self) -> bool {
        self.0 & Self::CLOSING != 0
    }
}

/// A request in progress.
pub(super) struct InProgress {
    requests: Arc<Requests>,
    ends_at_once: bool,
}

impl InProgress {
    /// The connection that the request came by.
    pub(super) fn connection(&self) -> &Requests {
        &self.requests
    }

    /// Ends it at the time at which it arrived, which is known.
    pub(super) fn end_at_once(mut self) {
        self.ends_at_once = true;
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        // In this order: a reader that finds no request in progress finds this time too.
        match self.ends_at_once {
            true => self.requests.answered(self.requests.arrived_at.load(Ordering::Relaxed)),
            false => self.requests.answered(self.requests.age(Instant::now())),
        }
        self.requests.state.fetch_sub(State::ONE, Ordering::Release);
    }
}

impl Requests {
    fn new(caller: Caller) -> Self {
        Self {
            caller,
            state: AtomicU64::default(),
            multiplexed: AtomicBool::default(),
            was_let_in: AtomicBool::default(),
            had_fragment: AtomicBool::default(),
            was_unread: AtomicBool::default(),
            arrived_at: AtomicU64::default(),
            answered_at: AtomicU64::default(),
            accepted_at: Instant::now(),
            closer: AtomicWaker::new(),
        }
    }

    /// The client at the other end.
    pub(super) fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Calls `then` with the state that is kept of a request's caller: its connection's peer, or the
    /// address that a trusted proxy names, whose connection carries the requests of many.
    pub(super) fn with_caller<T>(&self, access: &Access, peer: Peer, then: impl FnOnce(&Caller) -> T) -> T {
        if peer == self.caller.peer { then(&self.caller) } else { then(&access.caller(peer)) }
    }

    /// Begins a request whose headers are there; `None` where the connection is being closed: then
    /// nothing must be done for it.
    pub(super) fn begin(self: &Arc<Self>, version: http::Version) -> Option<InProgress> {
        if version == http::Version::HTTP_2 {
            self.multiplexed.store(true, Ordering::Relaxed);
        }
        let before = State(self.state.fetch_add(State::BEGUN + State::ONE, Ordering::Relaxed));
        (!before.is_closing()).then(|| InProgress { requests: Arc::clone(self), ends_at_once: false })
    }

    /// Notes that a request came with a valid token, or from a process that needs none.
    pub(super) fn let_in(&self) {
        // A read does not take the cache line away from the other cores.
        if !self.was_let_in.load(Ordering::Relaxed) {
            self.was_let_in.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a request line with a `#` in its target has come, by HTTP/1.
    pub(super) fn had_fragment(&self) -> bool {
        self.had_fragment.load(Ordering::Relaxed)
    }

    /// Whether the connection ended because an answer was not taken.
    pub(super) fn was_unread(&self) -> bool {
        self.was_unread.load(Ordering::Relaxed)
    }

    /// Completes when the connection is to be closed for another. For one task, that of the
    /// connection.
    pub(super) async fn closing(&self) {
        std::future::poll_fn(|context| self.poll_closing(context)).await;
    }

    /// Registers first, then checks the state: a close in between is seen, and a later close
    /// wakes the task.
    fn poll_closing(&self, context: &Context<'_>) -> Poll<()> {
        self.closer.register(context.waker());
        if self.state().is_closing() { Poll::Ready(()) } else { Poll::Pending }
    }

    fn state(&self) -> State {
        State(self.state.load(Ordering::Acquire))
    }

    /// Notes that bytes were sent. For a caller that was not admitted this is no activity: its
    /// answer is short and is sent at once, and the rest are answers to HTTP/2 pings, as many as it
    /// likes.
    fn wrote(&self, at: u64) {
        if self.was_let_in.load(Ordering::Relaxed) {
            self.answered(at);
        }
    }

    fn arrived(&self, now: Instant) {
        self.arrived_at.store(self.age(now), Ordering::Relaxed);
    }

    /// Of two requests that end at once, the later may be noted first.
    fn answered(&self, at: u64) {
        self.answered_at.fetch_max(at, Ordering::Relaxed);
    }

    /// When a request last ended, or a part of its answer was written.
    fn answered_at(&self) -> Instant {
        self.accepted_at + Duration::from_nanos(self.answered_at.load(Ordering::Relaxed))
    }

    fn age(&self, now: Instant) -> u64 {
        let age = now.saturating_duration_since(self.accepted_at).as_nanos();
        u64::try_from(age).unwrap_or(u64::MAX)
    }

    /// The order in which connections are closed: those without a valid token first, then the
    /// longest idle. Received bytes do not count, or a client that sends a byte a second would
    /// never be idle.
    fn expendable(&self, now: Instant) -> Option<((bool, Instant), State)> {
        let state = self.state();
        let was_let_in = self.was_let_in.load(Ordering::Relaxed);
        let since = self.answered_at();
        let spared = if was_let_in { Connections::SPARED } else { Connections::SPARED_AT_FIRST };
        let is_idle = !state.in_progress() && now.saturating_duration_since(since) >= spared;
        (is_idle && !state.is_closing()).then_some(((was_let_in, since), state))
    }

    /// Closes the connection for another, unless a request has begun since `seen`.
    fn close(&self, seen: State) -> bool {
        let closing = seen.0 | State::CLOSING;
        let closed = self.state.compare_exchange(seen.0, closing, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if closed {
            self.closer.wake();
        }
        closed
    }
}

/// The open connections, up to a maximum.
///
/// When it is reached, the connection that is idle longest is closed: first among those that never
/// brought a valid token, so that a client that opens connections and leaves them does not keep
/// out callers with a token. No request is lost by it:
/// - Whether a connection is closed is decided by one exchange of the state in which it was
///   found idle. A request that has begun since, whether or not it has ended, makes it fail.
/// - A request that begins after the exchange learns so before anything is done for it, and
///   is never answered: to its client the connection ended before it arrived, and it can be
///   repeated.
/// - A request that has ended is being written, or about to be. Its end was noted before it
///   ceased to be in progress, so the connection is not idle; each write to a caller with a valid
///   token renews that. Only a client that reads nothing of its answer for as long as the idle
///   limit loses it.
/// - The place of a closed connection is free when its task has ended. A new connection waits for
///   a place, whichever connection leaves it, and looks again if none comes.
#[derive(Debug)]
pub(super) struct Connections {
    open: Mutex<HashMap<u64, Arc<Requests>>>,
    numbers: AtomicU64,
    room: Arc<Semaphore>,
    most: usize,
    closed: Counter,
}

/// An open connection's place among the others.
pub(super) struct Place {
    pub(super) requests: Arc<Requests>,
    number: u64,
    connections: Arc<Connections>,
    _room: OwnedSemaphorePermit,
}

impl Connections {
    /// How long an idle connection that brought a valid token is spared.
    const SPARED: Duration = Duration::from_secs(1);
    /// How long a new connection is spared until its first request arrives.
    const SPARED_AT_FIRST: Duration = Duration::from_millis(100);
    /// How long to wait for a place before one more connection is closed.
    pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(25);

    pub(super) fn new(most: usize, metrics: &Metrics) -> Arc<Self> {
        Arc::new(Self {
            open: Mutex::default(),
            numbers: AtomicU64::default(),
            room: Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))),
            most,
            closed: metrics.counter("secretier_connections_closed_for_others_total", &[]),
        })
    }

    /// Waits for a place, and closes an idle connection to make one.
    pub(super) async fn place(self: &Arc<Self>, caller: Caller) -> Place {
        let room = loop {
            if let Ok(room) = Arc::clone(&self.room).try_acquire_owned() {
                break room;
            }
            self.make_room();
            let room = tokio::time::timeout(Self::LOOK_AGAIN, Arc::clone(&self.room).acquire_owned());
            if let Ok(Ok(room)) = room.await {
                break room;
            }
        };
        let requests = Arc::new(Requests::new(caller));
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        self.open().insert(number, Arc::clone(&requests));
        Place { requests, number, connections: Arc::clone(self), _room: room }
    }

    /// The number that may be open at once.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// The number of open connections.
    pub(super) fn len(&self) -> usize {
        self.open().len()
    }

    /// Closes the connection that is idle longest; `false` where none is.
    pub(super) fn make_room(&self) -> bool {
        let (open, now) = (self.open(), Instant::now());
        loop {
            let idle = open.values().filter_map(|requests| Some((requests.expendable(now)?, requests)));
            let Some(((_, seen), requests)) = idle.min_by_key(|((order, _), _)| *order) else { return false };
            // Otherwise a request has begun: it is no longer idle, and the next best is tried.
            if requests.close(seen) {
                self.closed.increment(1);
                return true;
            }
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<Requests>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.open().remove(&self.number);
    }
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, header: Duration, idle: Duration, requests: Arc<Requests>) -> Self {
        let active_at = Instant::now();
        let patience = header.min(idle);
        let timer = Box::pin(tokio::time::sleep_until(active_at + patience));
        let (heading, waker, has_stalled) = (None, None, false);
        Self { stream, header, idle, patience, active_at, heading, requests, timer, waker, has_stalled }
    }

    fn active(&mut self, now: Instant) {
        self.active_at = now;
        self.patience = self.idle;
    }

    /// Notes a write. One without a wait happens when its request ends, which is noted, or when
    /// bytes arrive.
    fn wrote(&mut self) {
        self.patience = self.idle;
        match std::mem::take(&mut self.has_stalled) {
            true => {
                self.active(Instant::now());
                self.requests.wrote(self.requests.age(self.active_at));
            }
            false => self.requests.wrote(self.requests.arrived_at.load(Ordering::Relaxed)),
        }
    }

    /// Notes received bytes: the start of a request's headers, unless a request is in progress.
    fn arrived(&mut self) {
        self.active(Instant::now());
        self.requests.arrived(self.active_at);
        let state = self.requests.state();
        if self.requests.multiplexed.load(Ordering::Relaxed) || state.in_progress() {
            self.heading = None;
            return;
        }
        let begun = state.begun();
        if self.heading.is_none_or(|(_, before)| before != begun) {
            self.heading = Some((self.active_at, begun));
        }
    }

    /// When the connection times out as things are; `None` while a request is in progress.
    fn end(&self) -> Option<Instant> {
        let state = self.requests.state();
        (!state.in_progress()).then(|| match self.heading {
            Some((since, begun)) if begun == state.begun() => since + self.header,
            _ => self.active_at.max(self.requests.answered_at()) + self.patience,
        })
    }

    fn poll_idle(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.heading.is_some()
            && let Some(end) = self.end()
            && end < self.timer.deadline()
        {
            self.timer.as_mut().reset(end);
            self.waker = None;
        }
        // A timer that has not fired and already wakes this task need not be told again; nor need a
        // close be.
        let is_waited_for = self.waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker()));
        if is_waited_for && !self.timer.is_elapsed() && !self.requests.state().is_closing() {
            return Poll::Pending;
        }
        if self.requests.poll_closing(context).is_ready() {
            tracing::debug!("an idle connection made room for another");
            return Poll::Ready(());
        }
        while self.timer.as_mut().poll(context).is_ready() {
            let now = Instant::now();
            let end = self.end().unwrap_or(now + self.idle);
            if now >= end {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(end);
        }
        // Without coop budget left, the timer has no waker: the task is told to run again.
        self.waker = tokio::task::coop::has_budget_remaining().then(|| context.waker().clone());
        Poll::Pending
    }
}

impl<S> Watched<S> {
    /// As [`Self::poll_idle`], while an answer is not taken: hyper need not be reading then.
    fn poll_stalled(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.waker = None;
        // The wait begins now, however long the answer took to make.
        if !std::mem::replace(&mut self.has_stalled, true) {
            self.active(Instant::now());
        }
        // A client that takes no answer counts as idle after a while; hyper may not be reading.
        if self.requests.poll_closing(context).is_ready() {
            return Poll::Ready(());
        }
        let end = self.active_at + self.idle;
        if end < self.timer.deadline() {
            self.timer.as_mut().reset(end);
        }
        while self.timer.as_mut().poll(context).is_ready() {
            if Instant::now() >= end {
                self.requests.was_unread.store(true, Ordering::Relaxed);
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(end);
        }
        Poll::Pending
    }
}

/// Whether these bytes hold a request line whose target has a `#`. The URI that hyper returns
/// ends before it, so that `.../A#old` would be taken for `.../A`. No client sends it (RFC 9110,
/// section 7.1) except one that forgot to encode a name. A line that comes in pieces is not
/// seen here. JSON has no such line: within its texts, line breaks are escaped.
fn has_fragment(bytes: &[u8]) -> bool {
    // Scans to the end even after a match, which is vectorised: half the instructions of
    // `contains`, and every request pays for it.
    let has_one = bytes.iter().fold(false, |found, byte| found | (*byte == b'#'));
    has_one && bytes.split(|&byte| byte == b'\n').any(is_request_with_fragment)
}

fn is_request_with_fragment(line: &[u8]) -> bool {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut words = line.split(|&byte| byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return false;
    };
    // A colon would end the name of a header.
    let is_method = !method.is_empty() && method.iter().all(|byte| byte.is_ascii_graphic() && *byte != b':');
    is_method && target.contains(&b'#') && version.starts_with(b"HTTP/1.")
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(context, buffer) {
            if buffer.filled().get(before..).is_some_and(has_fragment) {
                this.requests.had_fragment.store(true, Ordering::Relaxed);
            }
            this.arrived();
            return Poll::Ready(read);
        }
        this.poll_idle(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Poll::Ready(written) = Pin::new(&mut this.stream).poll_write(context, bytes) {
            this.wrote();
            return Poll::Ready(written);
        }
        this.poll_stalled(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Poll::Ready(flushed) = Pin::new(&mut this.stream).poll_flush(context) {
            return Poll::Ready(flushed);
        }
        this.poll_stalled(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Poll::Ready(written) = Pin::new(&mut this.stream).poll_write_vectored(context, buffers) {
            this.wrote();
            return Poll::Ready(written);
        }
        this.poll_stalled(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_sign_counts_in_a_request_line_and_nowhere_else() {
        for seen in [
            "GET /a#b HTTP/1.1\r\n",
            "DELETE /v1/tenants/acme/secrets/A#old HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "GET /?a=b#c HTTP/1.0\n\n",
            "M-SEARCH http://localhost/#a HTTP/1.1\r\n",
            "GET / HTTP/1.1\r\n\r\nGET /# HTTP/1.1\r\n\r\n",
        ] {
            assert!(has_fragment(seen.as_bytes()), "{seen:?}");
        }
        for unseen in [
            "",
            "GET /a HTTP/1.1\r\nX: #\r\nReferer: http://a/#b HTTP/1.1\r\n\r\n",
            "GET /a%23b HTTP/1.1\r\nUser-Agent: a#b\r\n\r\n",
            r##"{"value":"GET /a#b HTTP/1.1\r\n"}"##,
            "{\"value\":\n\"# x HTTP/1.1\"}",
        ] {
            assert!(!has_fragment(unseen.as_bytes()), "{unseen:?}");
        }
    }
}
