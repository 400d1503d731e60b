//! Reads the master keys again: periodically, and as often as needed while a rotation waits for this
//! instance. A rotation looks at the keys in the announcement itself, so a source that does not
//! answer just now causes only a delay.

use std::{sync::Arc, time::Duration};

use super::Common;
use crate::{log, sealing::MasterKeyId};

/// How often the master keys are read while a rotation waits for one of them.
const KEYS_AWAITED_EVERY: Duration = Duration::from_secs(2);

pub(super) struct MasterKeysReader {
    common: Arc<Common>,
    /// When they were last read, by the running clock.
    read_at: Duration,
}

impl MasterKeysReader {
    pub(super) fn new(common: &Arc<Common>) -> Self {
        Self { common: Arc::clone(common), read_at: common.clock.running() }
    }

    /// Reads them, where that is due.
    pub(super) async fn in_time(&mut self) {
        let Common { database, clock, settings, .. } = &*self.common;
        let keys = database.keys();
        let now = clock.running();
        let awaited = *self.common.awaited();
        let is_awaited = awaited.is_some_and(|key| !self.common.wraps_with(key));
        let wait = if is_awaited { KEYS_AWAITED_EVERY } else { settings.load().reload_every };
        if now.saturating_sub(self.read_at) < wait {
            return;
        }
        self.read_at = now;
        match keys.reload().await {
            Ok(()) => {
                if let Err(error) = database.note_master_keys(&keys.origins()).await {
                    tracing::debug!(%error, "where the master keys are could not be noted");
                }
            }
            Err(error) => tracing::error!(
                error = log::chain(&error),
                "the master keys cannot be read again; this instance goes on with those it holds"
            ),
        }
        if is_awaited {
            let still = self.common.wanted_key().await;
            let mut known = self.common.awaited();
            // The follower may have heard of another rotation meanwhile.
            if *known == awaited {
                *known = still;
            }
        }
    }
}

impl Common {
    /// Looks for a rotation that waits for a key that this instance lacks.
    pub(super) async fn look_for_rotation(&self) {
        let Some(key) = self.wanted_key().await else { return };
        *self.awaited() = Some(key);
    }

    /// The key that a rotation waits for, where one is under way and this instance lacks the key.
    async fn wanted_key(&self) -> Option<MasterKeyId> {
        let rotation = self.database.rotation().await.ok().flatten()?;
        let key = rotation.key.and_then(|key| key.parse().ok())?;
        (!self.wraps_with(key)).then_some(key)
    }

    fn wraps_with(&self, key: MasterKeyId) -> bool {
        self.database.keys().ring().first().map(|first| first.id()) == Some(key)
    }
}
