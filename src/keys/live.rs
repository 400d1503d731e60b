//! The master keys of a running process, which may change while they are in use.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

use super::sources::{Gathered, KeyError, KeySource, SourceOutcome, SourceReport, Sources};
use crate::{
    sealing::{KeyRing, MasterKey, MasterKeyId},
    tiers::upstream::Lane,
};

/// The current ring. It only ever grows while the process lives: a key that its source no longer
/// has may still wrap data keys, and perhaps no other process has it.
///
/// The ring is replaced as a whole: an unwrapping sees the keys from before a change or from after
/// it, and both open everything that the earlier keys opened. Reads of the sources run one at a
/// time, from the question to the replacement, so that a read from before a change cannot replace
/// one from after it.
pub struct MasterKeys {
    ring: ArcSwap<KeyRing>,
    sources: Option<Sources>,
    origins: Mutex<HashMap<MasterKeyId, KeySource>>,
    reading: tokio::sync::Mutex<Reading>,
}

/// The result of the first read.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The result of each source.
    pub reports: Vec<SourceReport>,
    /// The keys in the backup, or why it does not open; `None` where it was not needed, or does not
    /// exist.
    pub backup: Option<Result<Vec<MasterKeyId>, KeyError>>,
}

#[derive(Default)]
struct Reading {
    /// When keys were last looked for that no source has.
    in_vain: HashMap<MasterKeyId, Instant>,
    /// The keys whose disappearance was logged.
    vanished: HashSet<MasterKeyId>,
}

/// However many lookups miss a key, the sources are asked for it at most this often; and in that
/// time they are asked at most this many times for keys that none of them has.
const RELOAD_AT_MOST_EVERY: Duration = Duration::from_secs(10);
const LOOKS_IN_VAIN: usize = 16;

impl MasterKeys {
    /// A ring that never changes.
    #[must_use]
    pub fn fixed(ring: KeyRing) -> Self {
        Self::new(ring, None)
    }

    /// A ring that is filled from these sources by [`Self::load`]; empty until then.
    #[must_use]
    pub fn from_sources(sources: Sources) -> Self {
        Self::new(KeyRing::default(), Some(sources))
    }

    fn new(ring: KeyRing, sources: Option<Sources>) -> Self {
        Self {
            ring: ArcSwap::from_pointee(ring),
            sources,
            origins: Mutex::default(),
            reading: tokio::sync::Mutex::default(),
        }
    }

    /// The present keys.
    #[must_use]
    pub fn ring(&self) -> Arc<KeyRing> {
        self.ring.load_full()
    }

    /// Every held key that was seen in a source, with the source where it was last seen.
    #[must_use]
    pub fn origins(&self) -> Vec<(MasterKeyId, KeySource)> {
        let origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        let ring = self.ring();
        ring.ids().filter_map(|id| Some((id, origins.get(&id)?.clone()))).collect()
    }

    /// The source where a key was last seen.
    #[must_use]
    pub fn origin(&self, id: MasterKeyId) -> Option<KeySource> {
        self.origins.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// The sources, where there are any.
    #[must_use]
    pub fn sources(&self) -> Option<&Sources> {
        self.sources.as_ref()
    }

    /// Reads the keys for the first time: the first key of the first source that answers wraps. If
    /// a source does not answer, or none has a key, the keys of the backup are added after them.
    ///
    /// # Errors
    /// [`KeyError`] where a source has an invalid key; where the backup does not open, only if
    /// there is no key without it.
    pub async fn load(&self) -> Result<Loaded, KeyError> {
        let Some(sources) = &self.sources else { return Ok(Loaded::default()) };
        let _turn = self.reading.lock().await;
        let gathered = sources.gather(Lane::Interactive).await?;
        self.note_origins(&gathered);
        let Gathered { keys, reports } = gathered;
        let mut keys: Vec<MasterKey> = keys.into_iter().map(|(key, _)| key).collect();
        let silent = reports.iter().any(|report| matches!(report.outcome, SourceOutcome::Unreachable(_)));
        let mut backup = None;
        if silent || keys.is_empty() {
            match sources.open_backup().await {
                Ok(Some(held)) => {
                    backup = Some(Ok(held.ids().collect()));
                    keys.extend(held.keys().iter().cloned());
                }
                Ok(None) => {}
                Err(error) if keys.is_empty() => return Err(error),
                Err(error) => backup = Some(Err(error)),
            }
        }
        self.ring.store(Arc::new(KeyRing::new(keys)));
        Ok(Loaded { reports, backup })
    }

    /// Reads the keys again, and logs the changes.
    ///
    /// # Errors
    /// [`KeyError`] where a source has an invalid key; the ring stays as it is.
    pub async fn reload(&self) -> Result<(), KeyError> {
        let mut reading = self.reading.lock().await;
        self.read_again(&mut reading).await
    }

    /// Asks the sources for a missing key, unless that was done without success a moment ago;
    /// `true` if it is here now. Two rotations in a row bring a key each: that one was found says
    /// nothing about the next.
    pub async fn look_for(&self, id: MasterKeyId) -> bool {
        if self.sources.is_none() {
            return false;
        }
        let mut reading = self.reading.lock().await;
        let known = || self.ring.load().find(id).is_some();
        reading.in_vain.retain(|_, looked| looked.elapsed() < RELOAD_AT_MOST_EVERY);
        if known() || reading.in_vain.contains_key(&id) || reading.in_vain.len() >= LOOKS_IN_VAIN {
            return known();
        }
        if let Err(error) = self.read_again(&mut reading).await {
            tracing::error!(%error, "a master key is missing, and the sources cannot be read");
        }
        if !known() {
            reading.in_vain.insert(id, Instant::now());
        }
        known()
    }

    async fn read_again(&self, reading: &mut Reading) -> Result<(), KeyError> {
        let Some(sources) = &self.sources else { return Ok(()) };
        let gathered = sources.gather(Lane::Changes).await?;
        for SourceReport { source, outcome } in &gathered.reports {
            if let SourceOutcome::Unreachable(reason) = outcome {
                tracing::debug!(%source, reason, "a source of master keys does not answer");
            }
        }
        let held = self.ring.load_full();
        self.tell_vanished(reading, &held, &gathered);
        let next = next_ring(&held, &gathered, |id| self.origin(id));
        self.note_origins(&gathered);
        for id in next.ids().filter(|id| held.find(*id).is_none()) {
            tracing::info!(key = %id, source = self.origin(id).map(tracing::field::display), "a new master key was read");
        }
        if let (Some(first), Some(before)) = (next.first(), held.first())
            && first.id() != before.id()
        {
            tracing::info!(key = %first.id(), before = %before.id(), "another master key wraps from now on");
        }
        self.ring.store(Arc::new(next));
        Ok(())
    }

    /// Logs once for each key that it is gone from its source.
    fn tell_vanished(&self, reading: &mut Reading, held: &KeyRing, gathered: &Gathered) {
        let given: HashSet<MasterKeyId> = gathered.keys.iter().map(|(key, _)| key.id()).collect();
        reading.vanished.retain(|id| !given.contains(id));
        for id in held.ids().filter(|id| !given.contains(id)) {
            let Some(origin) = self.origin(id).filter(|origin| gathered.answered(origin)) else { continue };
            if reading.vanished.insert(id) {
                tracing::error!(
                    key = %id, source = %origin,
                    "a master key is gone from its source; this instance goes on with it, and one that starts now \
                     would lack it: put it back there, behind the new one, or rotate with 'secretier keys rotate'"
                );
            }
        }
    }

    fn note_origins(&self, gathered: &Gathered) {
        let mut origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        // In reverse order, so that of two sources with the same key the first is noted.
        origins.extend(gathered.keys.iter().rev().map(|(key, source)| (key.id(), source.clone())));
    }
}

impl fmt::Debug for MasterKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MasterKeys").field(&self.ring.load()).finish()
    }
}

/// The ring after another read of the sources. Every held key stays.
///
/// The order of the sources is adopted only where they still have the key that wraps: then another
/// key in front of it was put there by somebody who knows how. If that key is gone, somebody may
/// have overwritten it with another, which wraps nothing yet and may disappear again; and if its
/// source did not answer, a key of another source does not take its place.
fn next_ring(held: &KeyRing, gathered: &Gathered, origin: impl Fn(MasterKeyId) -> Option<KeySource>) -> KeyRing {
    let given = gathered.keys.iter().map(|(key, _)| key.clone());
    let is_given = |id| gathered.keys.iter().any(|(key, _)| key.id() == id);
    let in_order = match held.first().map(|key| key.id()) {
        None => true,
        Some(id) => is_given(id) && origin(id).is_none_or(|origin| gathered.answered(&origin)),
    };
    let held = held.keys().iter().cloned();
    KeyRing::new(if in_order { given.chain(held).collect() } else { held.chain(given).collect() })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::keys::Config;
    use crate::private_file;

    fn keys(path: &Path) -> MasterKeys {
        let config = Config { sources: vec![KeySource::File(path.into())], ..Config::default() };
        MasterKeys::from_sources(Sources::build(config, "prod", None))
    }

    fn write(path: &Path, keys: &[&MasterKey]) {
        let text: String = keys.iter().map(|key| format!("{}\n", key.to_hex().expose())).collect();
        private_file::replace(path, &text).unwrap();
    }

    fn ids(keys: &MasterKeys) -> Vec<MasterKeyId> {
        keys.ring().ids().collect()
    }

    fn three() -> [MasterKey; 3] {
        std::array::from_fn(|_| MasterKey::generate().unwrap())
    }

    #[tokio::test]
    async fn a_key_that_was_put_in_front_wraps_from_the_next_look_on() {
        let (folder, [one, two, _]) = (tempfile::tempdir().unwrap(), three());
        let path = folder.path().join("keys");
        write(&path, &[&one]);
        let keys = keys(&path);
        keys.load().await.unwrap();
        keys.reload().await.unwrap();
        assert_eq!(ids(&keys), [one.id()], "nothing has changed");
        write(&path, &[&two, &one]);
        keys.reload().await.unwrap();
        assert_eq!(ids(&keys), [two.id(), one.id()]);
        assert_eq!(keys.origin(two.id()), Some(KeySource::File(path)));
    }

    #[tokio::test]
    async fn a_key_that_was_written_over_is_held_and_wraps_until_the_end() {
        let (folder, [one, two, three]) = (tempfile::tempdir().unwrap(), three());
        let path = folder.path().join("keys");
        write(&path, &[&one]);
        let keys = keys(&path);
        keys.load().await.unwrap();
        for (held, expected) in [(&two, vec![one.id(), two.id()]), (&three, vec![one.id(), two.id(), three.id()])] {
            write(&path, &[held]);
            keys.reload().await.unwrap();
            assert_eq!(ids(&keys), expected);
        }
        std::fs::remove_file(&path).unwrap();
        keys.reload().await.unwrap();
        assert_eq!(ids(&keys).len(), 3, "a source that is gone takes no key along");
        private_file::replace(&path, "what is this").unwrap();
        assert!(keys.reload().await.is_err());
        assert_eq!(ids(&keys).len(), 3);
    }

    #[tokio::test]
    async fn that_one_key_was_found_keeps_the_next_from_being_looked_for_no_longer() {
        let (folder, [one, two, three]) = (tempfile::tempdir().unwrap(), three());
        let path = folder.path().join("keys");
        write(&path, &[&one]);
        let keys = keys(&path);
        keys.load().await.unwrap();
        for held in [&[&two, &one][..], &[&three, &two, &one]] {
            write(&path, held);
            assert!(keys.look_for(held[0].id()).await);
        }
    }

    #[tokio::test]
    async fn a_missing_key_is_looked_for_and_not_by_everyone() {
        let (folder, [one, two, three]) = (tempfile::tempdir().unwrap(), three());
        let path = folder.path().join("keys");
        write(&path, &[&one]);
        let keys = keys(&path);
        keys.load().await.unwrap();
        write(&path, &[&two, &one]);
        assert!(keys.look_for(two.id()).await);
        assert!(!keys.look_for(three.id()).await);
        write(&path, &[&three, &two, &one]);
        assert!(!keys.look_for(three.id()).await, "the sources were asked for it a moment ago");
        assert!(keys.look_for(two.id()).await);
        assert!(!MasterKeys::fixed(KeyRing::default()).look_for(one.id()).await);
    }
}
