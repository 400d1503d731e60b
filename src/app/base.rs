//! The base of an instance, and of the commands that need no instance: upstream, master
//! keys and database.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;

use super::StartError;
use crate::{
    clock::Clock,
    config::Config,
    keys::{KeyError, KeySource, Loaded, MasterKeys, SourceOutcome, SourceReport, Sources},
    log,
    metrics::Metrics,
    sealing::MasterKeyId,
    tiers::{
        database::{BudgetPage, Database, MissingKey},
        upstream::{self, Before, BudgetBook, Upstream},
    },
};

/// The row in the database, as the book that upstream writes its use in.
struct Book(BudgetPage);

impl BudgetBook for Book {
    fn note(&self, whole_in: Duration) -> BoxFuture<'_, bool> {
        Box::pin(async move {
            let written = self.0.note(whole_in).await;
            if let Err(error) = &written {
                tracing::debug!(%error, "what is used of the upstream budget could not be written down");
            }
            written.is_ok()
        })
    }
}

/// Everything that needs no calls: upstream and database, not connected yet.
#[derive(Clone)]
pub(super) struct Ground {
    pub(super) database: Arc<Database>,
    pub(super) upstream: Option<Arc<dyn Upstream>>,
    pub(super) metrics: Arc<Metrics>,
    /// The name by which an instance finds the budget of its predecessor; `None` for a command.
    pub(super) place: Option<String>,
}

/// Upstream, master keys and database, opened.
pub struct Base {
    /// The database tier, with the master keys that were found.
    pub database: Arc<Database>,
    /// The upstream tier, where one is configured.
    pub upstream: Option<Arc<dyn Upstream>>,
    /// The result of reading the master keys.
    pub loaded: Loaded,
    missing: Vec<MissingKey>,
    /// The counter of changes, read before anything that changes was read.
    pub(super) followed: i64,
}

impl Ground {
    /// Sets up upstream and database.
    ///
    /// # Errors
    /// The configuration cannot be used.
    pub(super) fn build(config: &Config, clock: &Clock) -> Result<Self, StartError> {
        let metrics = Metrics::new();
        let environment = config.environment.as_str();
        let withheld = config.keys.withheld();
        let upstream = upstream::build(config.upstream(), environment, &withheld, clock, &metrics)?;
        let sources = Sources::build(config.keys.clone(), environment, upstream.clone());
        let keys = Arc::new(MasterKeys::from_sources(sources));
        let database = Database::build(&config.database, keys, clock.clone(), Arc::clone(&metrics))?;
        database.require_seals(config.keys.require_seals);
        Ok(Self { database: Arc::new(database), upstream, metrics, place: None })
    }

    /// The same for an instance, which goes on with the rest of its predecessor's budget upstream.
    /// The predecessor was started on the same machine, to listen at the same address: it was
    /// killed and is started again.
    ///
    /// # Errors
    /// The configuration cannot be used.
    pub(super) fn of_instance(config: &Config, clock: &Clock) -> Result<Self, StartError> {
        let place = format!("{} {}", gethostname::gethostname().to_string_lossy(), config.server.listen.first());
        Ok(Self { place: Some(place), ..Self::build(config, clock)? })
    }

    /// Opens the database and reads the master keys. May be tried again where it fails; keys
    /// that were read before stay.
    ///
    /// # Errors
    /// The part that is missing, and why. It is no error here if no source has a master key.
    pub(super) async fn open(&self, environment: &str) -> Result<Base, StartError> {
        let Self { database, upstream, place, .. } = self;
        let keys = database.keys();
        Box::pin(database.prepare(environment)).await?;
        let followed = database.changes().await?;
        // Before upstream is asked anything.
        if let (Some(upstream), Some(place)) = (upstream, place) {
            let (whole_in, page) = BudgetPage::find(database, place).await?;
            upstream.resume_budget(Before::Told { whole_in, book: Arc::new(Book(page)) });
        }
        if let Some(sources) = keys.sources().filter(|sources| sources.needs_derivation()) {
            let derivation = database.derivation().await?;
            // The file that this instance was started from may say otherwise.
            if sources.derivation().is_some_and(|told| *told != derivation) {
                return Err(StartError::OtherDerivation);
            }
            sources.derive_by(derivation);
        }
        let loaded = match keys.ring().is_empty() {
            true => keys.load().await?,
            false => keys.reload().await.map(|()| Loaded::default())?,
        };
        let missing = database.missing_master_keys().await?;
        if keys.sources().is_some_and(Sources::needs_derivation) {
            refuse_other_passphrase(&missing)?;
        }
        // For people only, and again at the next start: serving needs no writable database.
        if let Err(error) = database.note_master_keys(&keys.origins()).await {
            tracing::warn!(error = log::chain(&error), "where the master keys were seen could not be noted");
        }
        database.read_seals().await?;
        Ok(Base { database: Arc::clone(database), upstream: upstream.clone(), loaded, missing, followed })
    }
}

impl Base {
    /// Sets up the upstream, opens the database, and reads the master keys.
    ///
    /// # Errors
    /// The part that is missing, and why. It is no error here if no source has a master key.
    pub async fn open(config: &Config, clock: &Clock) -> Result<Self, StartError> {
        Ground::build(config, clock)?.open(config.environment.as_str()).await
    }

    /// The same to look at: nothing is made, written or brought up to date. The tables must be of this
    /// version.
    ///
    /// # Errors
    /// The part that is missing, and why.
    pub async fn examine(config: &Config, clock: &Clock) -> Result<Self, StartError> {
        let Ground { database, upstream, .. } = Ground::build(config, clock)?;
        database.look(config.environment.as_str()).await?;
        let keys = database.keys();
        if let Some(sources) = keys.sources().filter(|sources| sources.needs_derivation())
            && let Some(derivation) = database.stored_derivation().await?
        {
            sources.derive_by(derivation);
        }
        let loaded = keys.load().await?;
        let missing = database.missing_master_keys().await?;
        Ok(Self { database, upstream, loaded, missing, followed: 0 })
    }

    /// The reasons why the configured backup would fail when it is needed.
    #[must_use]
    pub fn backup_faults(&self) -> Vec<String> {
        let keys = self.database.keys();
        let Some((sources, file)) = keys.sources().and_then(|sources| Some((sources, sources.backup_file()?))) else {
            return Vec::new();
        };
        let file = file.display();
        match sources.backed_up() {
            Ok(None) => {
                vec![format!("there is no backup of the master keys in {file}; 'secretier keys backup' makes it")]
            }
            Ok(Some(held)) => {
                let lacking = keys.ring();
                let lacking = lacking.ids().filter(|id| !held.contains(id));
                lacking
                    .map(|id| {
                        format!("the backup {file} lacks the master key {id}; 'secretier keys backup' makes it anew")
                    })
                    .collect()
            }
            Err(error) => vec![log::chain(&error)],
        }
    }

    /// The master keys that wrap stored data keys and that no source has.
    #[must_use]
    pub fn missing(&self) -> &[MissingKey] {
        &self.missing
    }

    /// Refuses to go on without a master key, and says why there is none.
    ///
    /// # Errors
    /// [`StartError::NoKey`].
    pub fn needs_key(&self) -> Result<(), StartError> {
        if !self.database.keys().ring().is_empty() {
            return Ok(());
        }
        let reasons = self.loaded.reports.iter().map(|SourceReport { source, outcome }| match outcome {
            SourceOutcome::Empty(reason) | SourceOutcome::Unreachable(reason) => format!("{source}: {reason}"),
            SourceOutcome::Gave(_) => source.to_string(),
        });
        Err(StartError::NoKey(reasons.collect::<Vec<_>>().join("; ")))
    }

    /// Logs which master keys were found and which are missing. Data keys that a missing
    /// one wraps do not open until it is back; everything else is served.
    pub(super) fn tell_keys(&self) {
        tell_sources(&self.loaded);
        for fault in self.backup_faults() {
            tracing::warn!("{fault}");
        }
        for MissingKey { wraps, known } in &self.missing {
            let (source, at) = match known {
                Some(known) => (known.source.as_str(), known.last_seen_at.to_rfc3339()),
                None => ("never seen by this database", "-".to_owned()),
            };
            tracing::error!(
                key = %wraps.id, tenants = wraps.tenants, last_seen = source, last_seen_at = at,
                "a master key is missing, and what it wraps does not open; put it back into one of keys.sources, behind \
                 the key that wraps"
            );
        }
    }
}

/// Logs the result of reading the master keys.
pub(super) fn tell_sources(loaded: &Loaded) {
    let list = |ids: &[MasterKeyId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    for SourceReport { source, outcome } in &loaded.reports {
        match outcome {
            SourceOutcome::Gave(ids) => tracing::info!(%source, keys = list(ids), "master keys read"),
            SourceOutcome::Empty(reason) => tracing::info!(%source, reason, "no master key from this source"),
            SourceOutcome::Unreachable(reason) => {
                tracing::warn!(%source, reason, "this source of master keys does not answer");
            }
        }
    }
    match &loaded.backup {
        Some(Ok(ids)) => tracing::warn!(keys = list(ids), "master keys read from the backup"),
        Some(Err(error)) => tracing::error!(error = log::chain(error), "the backup of the master keys is of no use"),
        None => {}
    }
}

/// Refuses a mistyped passphrase: it gives a key like any other, and values that were sealed under
/// it would not open at the next start. The database knows which key wraps the existing data keys.
fn refuse_other_passphrase(missing: &[MissingKey]) -> Result<(), KeyError> {
    let of_before = |missing: &&MissingKey| {
        missing.known.as_ref().is_some_and(|known| known.source == KeySource::Passphrase.to_string())
    };
    match missing.iter().find(of_before) {
        None => Ok(()),
        Some(MissingKey { wraps, .. }) => Err(KeyError::OtherPassphrase { key: wraps.id, tenants: wraps.tenants }),
    }
}
