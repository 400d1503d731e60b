//! Tells the followers of events what has changed.

use std::{sync::Arc, time::Duration};

use super::Common;

/// The time between two batches of events: of the changes of one batch, a follower is told at once.
const BETWEEN: Duration = Duration::from_millis(100);

/// Tells changes as soon as they are in force here, until `stopped` completes.
pub(super) async fn tell(common: Arc<Common>, stopped: impl Future<Output = ()>) {
    let resolver = &common.service.resolver;
    let telling = async {
        loop {
            resolver.events_due().await;
            resolver.tell_events().await;
            tokio::time::sleep(BETWEEN).await;
        }
    };
    tokio::select! {
        () = stopped => {}
        () = telling => {}
    }
}
