//! What the program logs while a test runs.

use std::{
    io,
    sync::{Arc, Mutex},
};

use tracing::{Dispatch, Level, dispatcher};
use tracing_subscriber::{filter::Targets, fmt::MakeWriter, layer::SubscriberExt as _};

/// What is logged.
#[derive(Clone, Default)]
pub(crate) struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    /// What was logged so far.
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Runs a test whose log lines are kept, and none of the tests beside it.
pub(crate) fn logging(lines: &Lines, test: impl Future<Output = ()>) {
    let layer = tracing_subscriber::fmt::layer().with_writer(lines.clone()).with_ansi(false);
    let own = Targets::new().with_target("secretier", Level::TRACE);
    let dispatch = Dispatch::new(tracing_subscriber::registry().with(layer).with(own));
    // Where there is one dispatcher, tracing asks nobody but the thread that comes to a line first
    // whether it is logged, and never again: that may be a thread of another test.
    let _second = Dispatch::new(tracing_subscriber::registry());
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let (own, its) = (dispatch.clone(), dispatch);
    // Kept for as long as the thread lives.
    runtime.enable_all().on_thread_start(move || std::mem::forget(dispatcher::set_default(&its)));
    let _guard = dispatcher::set_default(&own);
    runtime.build().unwrap().block_on(test);
}
