//! Every wait of a test ends: with what it waits for, or with a failure that says what that was.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::{
    panic::{Location, resume_unwind},
    process::{Command, Output, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// Far above what anything in these tests takes on a slow machine: what runs into it hangs.
pub(crate) const HANGS: Duration = Duration::from_secs(120);

/// The same for a whole test: the last net, for a wait that has no bound of its own.
const TEST_HANGS: Duration = Duration::from_secs(30 * 60);

/// Waits for what the future gives, or fails after [`HANGS`].
#[track_caller]
pub(crate) fn within<T>(what: &str, wait: impl Future<Output = T>) -> impl Future<Output = T> {
    bounded(HANGS, what, wait)
}

/// Waits for a whole test, or a long part of one, or fails after longer than any takes.
#[track_caller]
pub(crate) fn within_a_tests_time<T>(what: &str, test: impl Future<Output = T>) -> impl Future<Output = T> {
    bounded(TEST_HANGS, what, test)
}

#[track_caller]
fn bounded<T>(bound: Duration, what: &str, wait: impl Future<Output = T>) -> impl Future<Output = T> {
    let at = Location::caller();
    let wait = Box::pin(wait);
    async move {
        let waited = tokio::time::timeout(bound, wait).await;
        waited.unwrap_or_else(|_| panic!("{at}: waited {bound:?} for this: {what}"))
    }
}

/// Waits for what comes about by itself, soon, or fails after [`HANGS`] with the line that waits.
#[track_caller]
pub(crate) fn eventually(holds: impl AsyncFn() -> bool) -> impl Future<Output = ()> {
    let polls = async move {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within("what this line asks for comes about", polls)
}

/// The same for what blocks, such as a look at files.
#[track_caller]
pub(crate) fn until(holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < HANGS, "waited {HANGS:?}, and what this line asks for did not come about");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Does what blocks without a bound of its own, on a thread beside the test's, or fails after [`HANGS`].
#[track_caller]
pub(crate) fn within_blocking<T: Send + 'static>(what: &str, wait: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = channel();
    let waiting = thread::spawn(move || drop(tell.send(wait())));
    match told.recv_timeout(HANGS) {
        Ok(value) => value,
        Err(RecvTimeoutError::Timeout) => panic!("waited {HANGS:?} for this: {what}"),
        Err(RecvTimeoutError::Disconnected) => match waiting.join() {
            Err(panicked) => resume_unwind(panicked),
            Ok(()) => unreachable!("it tells before it ends"),
        },
    }
}

/// Runs a command to its end, or fails after [`HANGS`].
#[track_caller]
pub(crate) fn output(command: &mut Command) -> Output {
    let what = format!("{command:?} ends");
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    within_blocking(&what, move || child.wait_with_output()).unwrap_or_else(|error| panic!("{what}: {error}"))
}
