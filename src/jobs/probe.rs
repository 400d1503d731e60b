//! Tries an upstream that failed.

use std::{sync::Arc, time::Duration};

use super::{Common, turns};

/// How often it is tried.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// In every how many of these turns an upstream is tried that answers without having anything: its
/// breaker does not spare the budget.
const REJECTED_EVERY: u32 = 10;

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
        let (mut turns, mut turn) = (turns(PROBE_EVERY), 0_u32);
        loop {
            turn = turn.wrapping_add(1);
            let probing = async {
                turns.tick().await;
                self.common.service.resolver.try_upstream(turn.is_multiple_of(REJECTED_EVERY)).await;
            };
            tokio::select! {
                () = probing => {}
                () = &mut stopped => break,
            }
        }
    }
}
