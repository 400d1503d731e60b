//! Tries an upstream that failed.

use std::{sync::Arc, time::Duration};

use super::{Common, turns};

/// How often it is tried.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// Checks whether an upstream that failed answers again, in its own task, as it may take long.
pub(super) struct HealthProbe {
    common: Arc<Common>,
}

impl HealthProbe {
    pub(super) fn new(common: &Arc<Common>) -> Self {
        Self { common: Arc::clone(common) }
    }

    pub(super) async fn until(&self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let mut turns = turns(PROBE_EVERY);
        loop {
            let probing = async {
                turns.tick().await;
                self.common.service.resolver.try_upstream().await;
            };
            tokio::select! {
                () = probing => {}
                () = &mut stopped => break,
            }
        }
    }
}
