//! The body of an answer on its way to the caller, and the resources that it holds until it is
//! taken.
//!
//! hyper asks for the next piece once the one before has left, or at least has a place in the send
//! window, and drops the body when the last is on its way or the stream has ended. So everything
//! that is kept in the body is kept until the answer is taken; and a piece's share of the budget is
//! given back when its last byte has left, whoever holds the piece until then.

use std::{
    cell::Cell,
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::sync::mpsc;

use super::connection::InProgress;
use crate::budget::Held;
/// The most bytes in one piece. A caller who takes one byte of a piece has the rest held for it.
pub(super) use crate::pieces::PIECE;

/// A shorter body is not counted: it is a part of what memory holds anyway, or of what
/// a stream costs.
pub(super) const UNCOUNTED: usize = 16 << 10;

/// An answer's body.
pub(super) struct Body {
    content: Content,
    /// The bytes that are left of it.
    length: u64,
    /// The bytes that are not sent yet, where they are counted.
    held: Option<Held>,
    /// Whether it yields the thread before the next piece: a client that takes an answer as fast as
    /// it is made would keep the thread.
    pauses: bool,
    /// The request that it answers, which is in progress until the answer is taken.
    _request: Option<Box<(InProgress, Option<Held>)>>,
}

enum Content {
    /// A body that is there as a whole.
    Whole(Bytes),
    /// Pieces that are made while the body is taken, none of them empty.
    Pieces(Box<dyn Iterator<Item = Bytes> + Send>),
    /// Pieces that come whenever there is something to tell, until the sender ends it.
    Live(mpsc::Receiver<Bytes>),
}

/// A piece on its way.
struct Counted {
    bytes: Bytes,
    _held: Held,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Body {
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self::held(bytes, None)
    }

    /// The same, with its bytes counted already, or not to be counted.
    pub(super) fn held(bytes: Bytes, held: Option<Held>) -> Self {
        Self { length: bytes.len() as u64, content: Content::Whole(bytes), held, pauses: false, _request: None }
    }

    /// A body of this length, each of whose pieces is made when the one before is on its way.
    /// Making one must not take long: its thread serves others. `held` must equal the
    /// length.
    pub(super) fn pieces(length: u64, held: Held, pieces: impl Iterator<Item = Bytes> + Send + 'static) -> Self {
        Self { content: Content::Pieces(Box::new(pieces)), length, held: Some(held), pauses: false, _request: None }
    }

    /// A body whose pieces are sent as long as the sender likes.
    pub(super) fn live(pieces: mpsc::Receiver<Bytes>) -> Self {
        Self { content: Content::Live(pieces), length: 0, held: None, pauses: false, _request: None }
    }

    fn is_live(&self) -> bool {
        matches!(self.content, Content::Live(_))
    }

    /// The number of bytes that are still to be counted.
    pub(super) fn uncounted(&self) -> Option<u64> {
        (self.held.is_none() && self.length > UNCOUNTED as u64).then_some(self.length)
    }

    /// Marks the body as counted.
    pub(super) fn counted(&mut self, held: Held) {
        self.held = Some(held);
    }

    /// Keeps a request in progress until the answer is taken.
    pub(super) fn keep(&mut self, request: InProgress, place: Option<Held>) {
        // A live body has a bound of its own, and is no request that waits for something.
        let place = place.filter(|_| !self.is_live());
        self._request = Some(Box::new((request, place)));
    }

    fn next(&mut self) -> Option<Bytes> {
        let bytes = match &mut self.content {
            Content::Whole(bytes) if bytes.is_empty() => return None,
            Content::Whole(bytes) if self.held.is_none() => std::mem::take(bytes),
            Content::Whole(bytes) => bytes.split_to(bytes.len().min(PIECE)),
            Content::Pieces(pieces) => pieces.next()?,
            Content::Live(_) => return None,
        };
        let length = bytes.len() as u64;
        self.length = self.length.saturating_sub(length);
        Some(match &mut self.held {
            Some(held) => Bytes::from_owner(Counted { bytes, _held: held.split(length) }),
            None => bytes,
        })
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        WENT_ON.set(true);
        let body = self.get_mut();
        if let Content::Live(pieces) = &mut body.content {
            return pieces.poll_recv(context).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))));
        }
        if std::mem::take(&mut body.pauses) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let piece = body.next();
        body.pauses = body.length > 0;
        Poll::Ready(piece.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.length == 0 && !self.is_live()
    }

    fn size_hint(&self) -> SizeHint {
        if self.is_live() { SizeHint::default() } else { SizeHint::with_exact(self.length) }
    }
}

thread_local! {
    /// Whether a piece of an answer was asked for, which first happens as soon as the answer is
    /// there. hyper polls one stream at a time, and its caller checks this before and after.
    static WENT_ON: Cell<bool> = const { Cell::new(false) };
}

/// Polls, and tells whether an answer went on in it.
pub(super) fn watching<T>(poll: impl FnOnce() -> T) -> (T, bool) {
    WENT_ON.set(false);
    let polled = poll();
    (polled, WENT_ON.get())
}
