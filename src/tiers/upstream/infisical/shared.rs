//! The folders beside the tenants' folders that texts may refer to, cached for a while, because
//! many tenants refer to the same few.
//!
//! One caller at a time reads a folder, and the others wait for that read. The held content is
//! replaced as a whole; a caller that does not wait gets the last read.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwapOption;

use crate::{
    clock::{Clock, Moment},
    references::Texts,
    tiers::upstream::{OddityKind, Snapshot, UpstreamSecret},
};

/// The age up to which held content counts as current.
const FRESH: Duration = Duration::from_secs(60);

/// The age up to which it is used where the folder cannot be read again.
const STALE: Duration = Duration::from_secs(15 * 60);

/// The held content of each folder that may be referred to.
pub(super) struct SharedFolders {
    folders: BTreeMap<String, Shared>,
    clock: Clock,
}

/// One of them.
#[derive(Default)]
struct Shared {
    held: ArcSwapOption<Held>,
    reading: tokio::sync::Mutex<()>,
}

/// The texts of a folder, as they were at some time.
pub(super) struct Held {
    snapshot: Snapshot,
    read_at: Moment,
}

impl Held {
    pub(super) fn texts(&self) -> Texts<'_> {
        texts_of(&self.snapshot)
    }

    /// When it was read.
    pub(super) fn read_at(&self) -> Moment {
        self.read_at
    }

    /// The validator for asking whether it has changed.
    pub(super) fn etag(&self) -> Option<&str> {
        self.snapshot.etag.as_deref()
    }
}

/// The result of reading a folder.
pub(super) enum Read {
    Changed(Snapshot),
    Unchanged,
    /// The folder is denied to us, which is an answer.
    Refused,
    /// There is no answer.
    Failed,
}

/// Why there is no content of a folder.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// As [`Read::Refused`]: the held content is no longer served.
    Refused,
    /// As [`Read::Failed`], and the held content is too old.
    Failed,
}

impl SharedFolders {
    pub(super) fn new(folders: impl IntoIterator<Item = String>, clock: Clock) -> Self {
        Self { folders: folders.into_iter().map(|path| (path, Shared::default())).collect(), clock }
    }

    /// Returns a folder; `read` reads it where the held content is not fresh.
    pub(super) async fn get<F>(
        &self,
        path: &str,
        read: impl FnOnce(Option<Arc<Held>>) -> F,
    ) -> Result<Arc<Held>, Missing>
    where
        F: Future<Output = Read>,
    {
        let shared = self.folders.get(path).ok_or(Missing::Refused)?;
        if let Some(held) = self.held(shared, FRESH) {
            return Ok(held);
        }
        let _reading = shared.reading.lock().await;
        // Another caller may have read it meanwhile.
        if let Some(held) = self.held(shared, FRESH) {
            return Ok(held);
        }
        let read_at = self.clock.moment();
        let before = shared.held.load_full();
        let snapshot = match (read(before.clone()).await, before) {
            (Read::Changed(snapshot), _) => snapshot,
            (Read::Unchanged, Some(before)) => before.snapshot.clone(),
            (Read::Refused, _) => {
                shared.held.store(None);
                return Err(Missing::Refused);
            }
            (Read::Unchanged, None) | (Read::Failed, _) => return self.held(shared, STALE).ok_or(Missing::Failed),
        };
        let held = Arc::new(Held { snapshot, read_at });
        shared.held.store(Some(Arc::clone(&held)));
        Ok(held)
    }

    /// The held content of a folder now, without a read.
    pub(super) fn now(&self, path: &str) -> Option<Arc<Held>> {
        self.held(self.folders.get(path)?, STALE)
    }

    fn held(&self, shared: &Shared, within: Duration) -> Option<Arc<Held>> {
        let held = shared.held.load_full()?;
        let age = self.clock.moment().since(held.read_at);
        (age < within).then_some(held)
    }
}

/// A folder's texts by name, as they are written.
pub(super) fn texts_of(snapshot: &Snapshot) -> Texts<'_> {
    let text = |secret| -> (&str, Option<&str>) {
        let UpstreamSecret { key, value, .. }: &UpstreamSecret = secret;
        (key.as_str(), Some(value.expose()))
    };
    let unusable = snapshot.oddities.iter().filter(|oddity| matches!(oddity.kind, OddityKind::Unusable(_)));
    let texts: HashMap<&str, Option<&str>> =
        snapshot.secrets.iter().map(text).chain(unusable.map(|oddity| (oddity.name.as_str(), None))).collect();
    texts
}
