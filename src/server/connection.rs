//! A connection that closes when it lies idle, or when a request's headers do not come.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

/// Reads fail with a timeout
///
/// - when nothing was read or written for `idle` and no request is in progress;
/// - when a request's headers have not come `header` after their first byte;
/// - when not a byte has come `header` after the connection was accepted.
///
/// hyper has a timeout for headers too, but it runs while a connection lies idle as well,
/// which would then be closed at the shorter of the two.
///
/// The timer is set once per wait, not once per read: reading notes the time, and a timer
/// that fires early sets itself again.
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
}

/// The requests of one connection: what its timeouts go by.
#[derive(Debug, Default)]
pub(super) struct Requests {
    begun: AtomicU64,
    in_progress: AtomicUsize,
    /// Frames come at any time, so bytes without a request are not headers that are slow.
    multiplexed: AtomicBool,
}

/// A request in progress.
pub(super) struct InProgress(Arc<Requests>);

impl Requests {
    /// A request's headers are there.
    pub(super) fn begin(self: &Arc<Self>, version: http::Version) -> InProgress {
        if version == http::Version::HTTP_2 {
            self.multiplexed.store(true, Ordering::Relaxed);
        }
        self.in_progress.fetch_add(1, Ordering::Relaxed);
        self.begun.fetch_add(1, Ordering::Relaxed);
        InProgress(Arc::clone(self))
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.in_progress.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, header: Duration, idle: Duration, requests: Arc<Requests>) -> Self {
        let active_at = Instant::now();
        let patience = header.min(idle);
        let timer = Box::pin(tokio::time::sleep_until(active_at + patience));
        Self { stream, header, idle, patience, active_at, heading: None, requests, timer }
    }

    fn active(&mut self) {
        self.active_at = Instant::now();
        self.patience = self.idle;
    }

    /// Bytes came: the beginning of a request's headers, unless a request is in progress.
    fn arrived(&mut self) {
        self.active();
        let Requests { begun, in_progress, multiplexed } = &*self.requests;
        if multiplexed.load(Ordering::Relaxed) || in_progress.load(Ordering::Relaxed) > 0 {
            self.heading = None;
            return;
        }
        let begun = begun.load(Ordering::Relaxed);
        if self.heading.is_none_or(|(_, before)| before != begun) {
            self.heading = Some((self.active_at, begun));
        }
    }

    /// When to give up, as things stand.
    fn end(&self) -> Instant {
        if self.requests.in_progress.load(Ordering::Relaxed) > 0 {
            return Instant::now() + self.idle;
        }
        match self.heading {
            Some((since, begun)) if begun == self.requests.begun.load(Ordering::Relaxed) => since + self.header,
            _ => self.active_at + self.patience,
        }
    }

    fn poll_idle(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.heading.is_some() {
            let end = self.end();
            if end < self.timer.deadline() {
                self.timer.as_mut().reset(end);
            }
        }
        loop {
            std::task::ready!(self.timer.as_mut().poll(context));
            let end = self.end();
            if Instant::now() >= end {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(end);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(context, buffer) {
            this.arrived();
            return Poll::Ready(read);
        }
        this.poll_idle(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(context, bytes);
        if written.is_ready() {
            this.active();
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
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
        let written = Pin::new(&mut this.stream).poll_write_vectored(context, buffers);
        if written.is_ready() {
            this.active();
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
