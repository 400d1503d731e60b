//! Tells the service manager how `serve` goes, as sd_notify(3) describes it: systemd, or another
//! that sets `NOTIFY_SOCKET`. Without that variable, nothing is told.

use std::{io, sync::Arc, time::Duration};

use sd_notify::NotifyState;

/// The service manager, and the line that it shows while this serves.
#[derive(Debug, Clone)]
pub(super) struct ServiceManager {
    serving: Arc<str>,
}

/// How long a message may take. The service manager reads them as they come, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(1);

impl ServiceManager {
    pub(super) fn new(serving: impl Into<Arc<str>>) -> Self {
        Self { serving: serving.into() }
    }

    /// It serves: for the first time, or again after [`Self::reloading`].
    pub(super) async fn serving(&self) {
        let serving = Arc::clone(&self.serving);
        tell(move || sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&serving)])).await;
    }

    /// It reads its configuration again, and serves meanwhile. The time tells the service manager
    /// that this answers its request, and not an earlier one (`Type=notify-reload`).
    pub(super) async fn reloading(&self) {
        let status = NotifyState::Status("reading the configuration again");
        tell(move || sd_notify::notify(&[NotifyState::Reloading, NotifyState::monotonic_usec_now()?, status])).await;
    }

    /// It takes no connections any more, and lets requests in progress end.
    pub(super) async fn stopping(&self) {
        let status = NotifyState::Status("letting requests in progress end");
        tell(move || sd_notify::notify(&[NotifyState::Stopping, status])).await;
    }

    /// Tells that this lives, twice in each time that the unit's `WatchdogSec=` allows, for as long as it is
    /// polled: by the threads that answer requests, so that it ends where all of them hang.
    pub(super) async fn keep_watchdog() {
        let Some(allowed) = sd_notify::watchdog_enabled().filter(|allowed| !allowed.is_zero()) else { return };
        loop {
            tell(|| sd_notify::notify(&[NotifyState::Watchdog])).await;
            tokio::time::sleep(allowed / 2).await;
        }
    }
}

/// Sends a message on a thread of its own: the socket's queue may be full.
async fn tell(send: impl FnOnce() -> io::Result<()> + Send + 'static) {
    match tokio::time::timeout(PATIENCE, tokio::task::spawn_blocking(send)).await {
        Ok(Ok(Err(error))) => tracing::warn!(%error, "the service manager (NOTIFY_SOCKET) cannot be told"),
        Err(_) => tracing::warn!("the service manager (NOTIFY_SOCKET) takes no messages"),
        // The second is the end of the process.
        Ok(Ok(Ok(())) | Err(_)) => {}
    }
}
