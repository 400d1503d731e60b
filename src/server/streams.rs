//! The streams of an HTTP/2 connection. Each is a task, and is reset if its answer is not taken for
//! as long as a connection may be idle. A connection as a whole does not show this: its other
//! streams may go on, and pings keep it from being idle.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper::rt::Executor;
use tokio::time::{Instant, Sleep};

use super::{Service, connection::Requests, outgoing};
use crate::access::audit::Misuse;

/// Runs the streams of one connection.
#[derive(Clone)]
pub(super) struct Streams {
    pub(super) service: Arc<Service>,
    pub(super) requests: Arc<Requests>,
    pub(super) patience: Duration,
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let (streams, mut taking) = (self.clone(), Taking::new(self.patience));
        tokio::spawn(async move {
            let mut stream = pin!(stream);
            let is_taken = std::future::poll_fn(|context| taking.poll(stream.as_mut(), context)).await;
            // Otherwise the stream is dropped with this task, and so reset.
            if !is_taken {
                streams.service.audit.misused(streams.requests.caller().peer, None, Misuse::UnreadAnswer);
            }
        });
    }
}

/// The state of a stream. Before there is an answer, the code that makes it has its own deadlines.
struct Taking {
    patience: Duration,
    is_answered: bool,
    /// Set when the client is first waited for: most answers need none.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Taking {
    fn new(patience: Duration) -> Self {
        Self { patience, is_answered: false, timer: None }
    }

    /// Ready with `true` when the stream has ended, `false` when it was given up.
    fn poll(&mut self, stream: Pin<&mut impl Future<Output = ()>>, context: &mut Context<'_>) -> Poll<bool> {
        let (polled, went_on) = outgoing::watching(|| stream.poll(context));
        self.is_answered |= went_on;
        if polled.is_ready() {
            return Poll::Ready(true);
        }
        if !self.is_answered {
            return Poll::Pending;
        }
        let end = Instant::now() + self.patience;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(end)));
        if went_on {
            timer.as_mut().reset(end);
        }
        timer.as_mut().poll(context).map(|()| false)
    }
}
