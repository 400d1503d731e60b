//! The offline copy: found at a start without the database, and written while
//! the instance serves.

use std::{path::PathBuf, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::{Instant, sleep_until};

use super::{
    StartError,
    base::{Ground, tell_sources},
};
use crate::{
    clock::{Clock, Timestamp},
    config::Config,
    log,
    offline::{self, Header, OfflineError, OfflineFile, Record, Unusable},
    resolver::MAX_AHEAD,
    sealing::{MasterKey, MasterKeyId},
    server::Service,
    tiers::{database::StoreError, memory},
};

/// How soon the file is written when something was forgotten that must not stay in it. Changes
/// together, such as many tenants that are switched at once, cost one write.
const SOON: Duration = Duration::from_secs(1);

/// How soon a failed write is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// The longest file: memory's capacity, and room for tokens, phases and denials. Of a file
/// that was written under a larger capacity, memory keeps as much as it has room for.
fn longest(config: &memory::Config) -> u64 {
    const ROOM: u64 = 64 << 20;
    config.capacity.max(1 << 30).saturating_add(ROOM)
}

/// A file to start from, and the key that opens it.
pub(super) struct Found {
    file: OfflineFile,
    path: PathBuf,
    key: MasterKey,
    clock: Clock,
}

impl Found {
    /// Finds the configured file, and its key in the sources that answer without the database.
    pub(super) async fn find(
        config: &Config,
        ground: &Ground,
        clock: &Clock,
        database: StoreError,
    ) -> Result<Self, StartError> {
        let Some(path) = config.memory.offline_file.clone() else { return Err(StartError::DatabaseDown(database)) };
        tracing::error!(
            error = log::chain(&database),
            "the database cannot be used; starting from memory.offline_file"
        );
        let unusable = |source| StartError::OfflineCopy {
            database: log::chain(&database),
            source: Unusable { path: path.clone(), source },
        };
        let file = OfflineFile::open(&path, config.environment.as_str(), longest(&config.memory)).map_err(unusable)?;
        let (now, written_at) = (clock.now(), file.header().written_at());
        if written_at > now.plus(MAX_AHEAD) {
            let (written_at, now) = (written_at.to_rfc3339(), now.to_rfc3339());
            return Err(unusable(OfflineError::Ahead { written_at, now }));
        }
        let keys = ground.database.keys();
        if let Some(sources) = keys.sources().filter(|sources| sources.needs_derivation())
            && let Some(derivation) = file.header().derivation().map_err(unusable)?
        {
            sources.derive_by(derivation);
        }
        if keys.ring().is_empty() {
            tell_sources(&keys.load().await?);
        }
        let key = file.key(&keys.ring()).map_err(unusable)?;
        Ok(Self { file, path, key, clock: clock.clone() })
    }

    /// Fills resolver and access from the file, and allows no other answers.
    pub(super) async fn take_over(self, service: &Arc<Service>) -> Result<(), StartError> {
        let (service, path) = (Arc::clone(service), self.path.clone());
        service.resolver.stand_alone();
        let taken = tokio::task::spawn_blocking(move || self.read(&service)).await;
        let taken = taken.unwrap_or_else(|lost| std::panic::resume_unwind(lost.into_panic()));
        taken.map_err(|source| StartError::OfflineCopy {
            database: "it does not answer".to_owned(),
            source: Unusable { path, source },
        })
    }

    fn read(self, service: &Service) -> Result<(), OfflineError> {
        let Self { file, key, path, clock } = self;
        let (mut tokens, mut secrets, mut servable) = (Vec::new(), 0, 0);
        let length = file.length();
        let header = file.read(&key, |record, value| {
            match record {
                Record::Token(token) => tokens.push(token),
                record => {
                    secrets += usize::from(matches!(record, Record::Secret(_)));
                    servable += usize::from(service.resolver.take_over(record, value)?);
                }
            }
            Ok(())
        })?;
        let (tokens, written_at) = (service.access.take_over(tokens), header.written_at());
        service.resolver.offline().note_file(written_at, length);
        service.attachment.take_over(written_at);
        tracing::warn!(
            path = %path.display(), written_at = written_at.to_rfc3339(), age = clock.now().since(written_at).as_secs(),
            secrets, servable, tokens,
            "started from memory.offline_file: nothing else is answered until the database answers"
        );
        Ok(())
    }
}

/// Writes the file while the instance serves, and once more at its end.
///
/// The interleavings that would break it, and what prevents them:
/// - *Something changes while it is being written.* The counters of changes are read before
///   anything is gathered, so such a change is written the next time.
/// - *A tenant is forgotten, or a token revoked, between the gathering and the renaming.* The
///   file holds it once more; the code that forgot it has notified us, and the file is written
///   again soon.
/// - *The process dies.* The file is put in place by a rename, once it is whole on the disk.
/// - *The instance has read nothing of the database yet.* Then nothing is written: the file
///   would only lose content.
pub(super) struct Writer {
    service: Arc<Service>,
    clock: Clock,
    environment: String,
    path: PathBuf,
    every: Duration,
    longest: u64,
    /// The state that was written last.
    last: Option<Mark>,
}

/// Tells one state of the file's content from another.
#[derive(Debug, PartialEq, Eq)]
struct Mark {
    memory: u64,
    tokens: u64,
    key: Option<MasterKeyId>,
}

impl Writer {
    /// The writer of the configured file, if one is configured.
    pub(super) fn new(service: &Arc<Service>, config: &Config, clock: &Clock) -> Option<Self> {
        // Changes that the start itself has read are no news: they would cost the existing file.
        while lost(service).now_or_never().is_some() {}
        Some(Self {
            path: config.memory.offline_file.clone()?,
            service: Arc::clone(service),
            clock: clock.clone(),
            environment: config.environment.as_str().to_owned(),
            every: config.memory.offline_every,
            longest: longest(&config.memory),
            last: None,
        })
    }

    /// Runs until `stopped` completes, and then writes what has changed since.
    pub(super) async fn until(mut self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        // An instance that has just started has little to keep yet: the existing file stays
        // until there was time to gather, unless something was forgotten that must not be in it.
        let mut next = Instant::now() + self.every;
        let mut is_urgent = false;
        loop {
            tokio::select! {
                () = sleep_until(next) => {}
                () = lost(&self.service), if !is_urgent => {
                    is_urgent = true;
                    next = next.min(Instant::now() + SOON);
                    continue;
                }
                () = &mut stopped => break,
            }
            // Anything forgotten from now on is forgotten after the gathering, or notified again.
            let is_kept = self.keep().await;
            is_urgent = is_urgent && !is_kept;
            next = Instant::now() + if is_urgent { self.every.min(TRY_AGAIN) } else { self.every };
        }
        if is_urgent || self.last.is_some() {
            self.keep().await;
        }
    }

    /// Writes the file, where something has changed; `false` where that failed, or came too early.
    async fn keep(&mut self) -> bool {
        let Service { resolver, access, metrics, .. } = &*self.service;
        if resolver.offline().is_offline() {
            return false;
        }
        let keys = resolver.database().keys();
        let ring = keys.ring();
        let key = ring.first().map(MasterKey::id);
        let mark = Mark { memory: resolver.memory().changes(), tokens: access.changes(), key };
        if self.last.as_ref() == Some(&mark) {
            return true;
        }
        match self.write(ring.first()).await {
            Ok((written_at, bytes)) => {
                metrics.count("secretier_offline_file_writes_total", &[("outcome", "ok")]);
                resolver.offline().note_file(written_at, bytes);
                self.last = Some(mark);
                true
            }
            Err(reason) => {
                metrics.count("secretier_offline_file_writes_total", &[("outcome", "failed")]);
                tracing::warn!(reason, "memory.offline_file could not be written; trying again");
                false
            }
        }
    }

    /// Gathers and writes; returns when it was gathered, and the file's length.
    async fn write(&self, key: Option<&MasterKey>) -> Result<(Timestamp, u64), String> {
        let key = key.cloned().ok_or("there is no master key to seal it under")?;
        let resolver = &self.service.resolver;
        let sources = resolver.database().keys().sources();
        let derivation = sources.filter(|sources| sources.needs_derivation()).and_then(|sources| sources.derivation());
        let now = self.clock.now();
        // The time when the database was last known to have told everything, taken before anything
        // is gathered: an instance that starts from the file goes on counting from there.
        let known_at = self.service.attachment.since().min(now);
        let header = Header::new(&self.environment, key.id(), derivation, known_at);
        // The tokens first: a token that is revoked later is notified.
        let tokens = self.service.access.kept();
        let contents = offline::Contents { tokens, ..resolver.contents().await };
        let (path, longest) = (self.path.clone(), self.longest);
        let writing = move || offline::write(&path, &header, &key, contents, longest);
        match tokio::task::spawn_blocking(writing).await {
            Ok(Ok(bytes)) => Ok((now, bytes)),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the writing was lost".to_owned()),
        }
    }
}

/// Waits until something was forgotten that must not stay in the file.
async fn lost(service: &Service) {
    tokio::select! {
        () = service.resolver.memory().lost() => {}
        () = service.access.lost() => {}
    }
}
