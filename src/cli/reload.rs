//! Reloads the configuration at SIGHUP, and where its file has changed: `serve` reads it
//! again, and applies it to the instance.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use tokio::signal::unix::{Signal, SignalKind, signal};
use zeroize::Zeroizing;

use super::service_manager::ServiceManager;
use crate::{
    app::{App, Changes, Reload},
    config::{ConfigError, Loaded},
    log::{self, Log},
    server::Service,
};

/// SIGHUP, listened for from the first moment on, because it ends a process that does not.
pub(super) struct Hangups(Option<Signal>);

impl Hangups {
    pub(super) fn listen() -> Self {
        Self(signal(SignalKind::hangup()).ok())
    }

    /// Completes at the next one; at once, where one came meanwhile, and once for all that did.
    async fn next(&mut self) {
        let came = match &mut self.0 {
            Some(signal) => signal.recv().await,
            None => None,
        };
        if came.is_none() {
            std::future::pending().await
        }
    }
}

/// What a file held when it was looked at: told apart, and not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Look([u8; 32]);

impl Look {
    /// Looks at the file that [`Loaded::read`] would read. A link is followed: Kubernetes swaps
    /// one, with a file behind it that may be as old as the one before.
    pub(super) fn at(file: Option<&Path>) -> Self {
        let content = Loaded::file(file).map(|path| std::fs::read(path).map(Zeroizing::new));
        let mut digest = Sha256::new();
        match content {
            Some(Ok(content)) => {
                digest.update([0]);
                digest.update(&*content);
            }
            Some(Err(error)) => digest.update(error.kind().to_string()),
            None => {}
        }
        Self(digest.finalize().into())
    }
}

/// Reads the configuration again, from where it was read at the start.
pub(super) struct Reloading {
    file: Option<PathBuf>,
    /// What the file held before it was last read, good or wrong: it is tried once.
    tried: Look,
    every: Option<Duration>,
    log: Log,
    reload: Arc<Reload>,
    service: Arc<Service>,
    manager: ServiceManager,
}

/// How long a file that has changed must stay the same: it may be being written.
const SETTLED: Duration = Duration::from_millis(100);

impl Reloading {
    /// `tried` is what `file` held before it was read for the start.
    pub(super) fn new(
        file: Option<PathBuf>,
        tried: Look,
        every: Option<Duration>,
        log: Log,
        app: &App,
        manager: ServiceManager,
    ) -> Self {
        let (reload, service) = (Arc::clone(app.reload()), Arc::clone(app.service()));
        Self { file, tried, every, log, reload, service, manager }
    }

    /// Goes on for as long as it is polled.
    pub(super) async fn follow(mut self, mut hangups: Hangups) {
        loop {
            let every = self.every;
            let pause = async {
                match every {
                    Some(every) => tokio::time::sleep(every).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = hangups.next() => tracing::info!("SIGHUP: reading the configuration again"),
                () = pause => {
                    if !self.has_changed().await {
                        continue;
                    }
                    tracing::info!("the configuration's file has changed: reading it again");
                }
            }
            self.manager.reloading().await;
            self.reload().await;
            self.manager.serving().await;
        }
    }

    /// Whether the file holds what was not tried yet, and is not just being written.
    async fn has_changed(&self) -> bool {
        let found = self.look().await;
        if found == self.tried {
            return false;
        }
        tokio::time::sleep(SETTLED).await;
        self.look().await == found
    }

    async fn reload(&mut self) {
        // Before it is read: a later change of the file is found at the next look.
        self.tried = self.look().await;
        let file = self.file.clone();
        let reading = move || {
            let loaded = Loaded::read(file.as_deref())?;
            Ok::<_, ConfigError>((loaded.warnings(), loaded.config))
        };
        let outcome = match on_disk(reading).await {
            Ok((warnings, wanted)) => {
                warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
                // Boxed: a configuration and its consequences are large, and are needed once.
                let applied = Box::pin(self.reload.apply(&wanted)).await;
                match applied {
                    Ok(changes) => {
                        self.log.change(&wanted.log);
                        self.every = wanted.server.watch_config;
                        self.tell(&changes)
                    }
                    Err(error) => self.refused(&log::chain(&error)),
                }
            }
            Err(error) => refused(&error.faults().join("; ")),
        };
        self.service.metrics.count("secretier_config_reloads_total", &[("outcome", outcome)]);
    }

    fn tell(&self, Changes { applied, waiting }: &Changes) -> &'static str {
        let names = |names: &BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>().join(" ");
        let now = self.service.resolver.clock().now();
        self.service.metrics.gauge("secretier_config_reloaded_timestamp_seconds", &[], now.as_millis() as f64 / 1000.0);
        if !waiting.is_empty() {
            tracing::warn!(settings = names(waiting), "these settings have changed and wait for a restart");
        }
        if applied.is_empty() {
            tracing::info!("the configuration was read again: nothing has changed that can be without a restart");
            return "unchanged";
        }
        tracing::info!(settings = names(applied), "the configuration was read again and is in force");
        "applied"
    }

    /// Tells what is wrong with settings that are good by themselves.
    fn refused(&self, error: &str) -> &'static str {
        let file = Loaded::file(self.file.as_deref());
        let place = file.map_or("the environment".to_owned(), |path| path.display().to_string());
        refused(&format!("{place}: {error}"))
    }

    async fn look(&self) -> Look {
        let file = self.file.clone();
        on_disk(move || Look::at(file.as_deref())).await
    }
}

fn refused(error: &str) -> &'static str {
    tracing::error!(error, "the configuration is wrong, so nothing has changed");
    "refused"
}

/// Files may lie on a disk that hangs.
async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // The process is ending, and this with it.
        Err(_) => std::future::pending().await,
    }
}
