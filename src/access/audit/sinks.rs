//! Where records go: the database's chains, or lines of JSON.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use super::{
    chain::{self, Signer},
    lines::{Lines, LinesError},
    record::{Kind, Record},
};
use crate::{
    sealing::MasterKeys,
    tiers::database::{AuditChain, Database, StoreError},
};

/// One of the places that records go to.
pub(super) enum Sink {
    /// The database.
    Database(DatabaseSink),
    /// A file, or standard output.
    Lines(Lines),
}

/// Why records were not written, and whether they may have been all the same.
#[derive(Debug, thiserror::Error)]
pub(super) enum SinkError {
    /// The database.
    #[error("the audit could not be written to the database")]
    Database(#[from] StoreError),
    /// The file.
    #[error("the audit could not be written")]
    Lines(#[from] LinesError),
}

/// What is known of records whose writing failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// None of them is there.
    Refused,
    /// Nothing was tried: what was in doubt before is so still, and the new ones are not there.
    Untouched,
    /// Nobody knows: they are in doubt, all of them together.
    InDoubt,
}

/// Records were not written, or nobody knows.
#[derive(Debug)]
pub(super) struct Failed {
    /// What is known of the new ones.
    pub(super) after: After,
    /// Whether those that were in doubt before turned out to be there.
    pub(super) landed: bool,
    /// Why.
    pub(super) error: SinkError,
}

impl Failed {
    fn new(after: After, error: impl Into<SinkError>) -> Self {
        Self { after, landed: false, error: error.into() }
    }
}

impl Sink {
    /// Appends `fresh`, behind `doubtful` where those are not there yet; all of them or none.
    pub(super) async fn append(&mut self, doubtful: &[Record], fresh: &[Record]) -> Result<(), Failed> {
        match self {
            Self::Database(sink) => sink.append(doubtful, fresh).await,
            Self::Lines(lines) => {
                let records = doubtful.iter().chain(fresh).cloned().collect();
                lines.append(records).await.map_err(|error| Failed::new(After::Refused, error))
            }
        }
    }

    /// Vouches for ends that nobody vouches for yet.
    pub(super) async fn sign(&mut self) -> Result<(), StoreError> {
        match self {
            Self::Database(sink) => sink.sign().await,
            Self::Lines(_) => Ok(()),
        }
    }

    pub(super) fn as_str(&self) -> &'static str {
        match self {
            Self::Database(_) => "database",
            Self::Lines(lines) => lines.as_str(),
        }
    }
}

/// The chains in the database.
pub(super) struct DatabaseSink {
    database: Arc<Database>,
    keys: Arc<MasterKeys>,
    recorded_by: String,
    /// The last record of those in doubt, which are there if it is.
    in_doubt: Option<(&'static str, i64, [u8; 32])>,
    /// The ends as they were last left here. A chain that they are no part of any more was
    /// tampered with.
    seen: HashMap<Kind, (i64, [u8; 32])>,
    /// Whether it was looked what is signed.
    is_known: bool,
    /// Whether nothing was signed at all when that was looked for.
    is_new: bool,
    /// Chains that were found tampered with. They go on, but nobody vouches for them here.
    broken: HashSet<Kind>,
}

impl DatabaseSink {
    pub(super) fn new(database: Arc<Database>, recorded_by: String) -> Self {
        let keys = Arc::clone(database.keys());
        Self {
            database,
            keys,
            recorded_by,
            in_doubt: None,
            seen: HashMap::new(),
            is_known: false,
            is_new: false,
            broken: HashSet::new(),
        }
    }

    async fn append(&mut self, doubtful: &[Record], fresh: &[Record]) -> Result<(), Failed> {
        if !self.is_known {
            self.sign().await.map_err(|error| Failed::new(After::Untouched, error))?;
            self.is_known = true;
        }
        let has = |kind: &Kind| doubtful.iter().chain(fresh).any(|record| record.kind == *kind);
        let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(has).collect();
        self.write(&kinds, doubtful, fresh).await
    }

    /// Signs ends that a command without a master key left, or that are signed with a key
    /// that wraps no more; and, the first time of all, every chain at once: from then on one
    /// without a signature was tampered with.
    async fn sign(&mut self) -> Result<(), StoreError> {
        let ring = self.keys.ring();
        let Some(first) = ring.first().map(|key| key.id().to_string()) else { return Ok(()) };
        if self.in_doubt.is_some() {
            return Ok(());
        }
        let chains = self.database.audit_chains().await?;
        // What was signed once is not new again, whatever was made of it.
        self.is_new = self.seen.is_empty() && chains.iter().all(|chain| chain.vouched.is_none());
        let is_signed = |chain: &AuditChain| {
            let mark = chain.vouched.as_ref().filter(|mark| mark.seq == chain.seq);
            mark.and_then(|mark| mark.signature.as_ref()).is_some_and(|signed| signed.key == first)
        };
        let unsigned = |kind: &Kind| {
            let chain = chains.iter().find(|chain| chain.chain == kind.as_str());
            chain.is_some_and(|chain| !is_signed(chain)) && !self.broken.contains(kind)
        };
        let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(unsigned).collect();
        if kinds.is_empty() {
            return Ok(());
        }
        let signed = self.write(&kinds, &[], &[]).await;
        // Nothing is in doubt: signing is done again where it was not.
        self.in_doubt = None;
        match signed {
            Err(Failed { error: SinkError::Database(error), .. }) => Err(error),
            Ok(()) | Err(_) => {
                self.is_new = false;
                Ok(())
            }
        }
    }

    /// Vouches for chains as they are, whatever was done to them.
    pub(super) async fn accept(&self, kinds: &[Kind]) -> Result<(), StoreError> {
        let names: Vec<&'static str> = kinds.iter().map(|kind| kind.as_str()).collect();
        let ring = self.keys.ring();
        let link = |mut chains: Vec<AuditChain>, _: Vec<&'static str>, _| {
            for chain in &mut chains {
                chain::link(chain, [], &self.recorded_by, Some(Signer(&ring)));
            }
            (Vec::new(), chains)
        };
        self.database.append_audit(&names, &[], None, link).await
    }

    async fn write(&mut self, kinds: &[Kind], doubtful: &[Record], fresh: &[Record]) -> Result<(), Failed> {
        let names: Vec<&'static str> = kinds.iter().map(|kind| kind.as_str()).collect();
        let ring = self.keys.ring();
        let seen: Vec<_> = self.seen.iter().map(|(kind, (seq, hash))| (kind.as_str(), *seq, *hash)).collect();
        let is_new = self.is_new;
        let mut linked = None;
        let mut ends = Vec::new();
        let mut broken = self.broken.clone();
        let link = |chains: Vec<AuditChain>, gone: Vec<&'static str>, landed: bool| {
            let doubtful = if landed { &[] } else { doubtful };
            let (mut rows, mut moved) = (Vec::new(), Vec::new());
            for (kind, mut chain) in kinds.iter().zip(chains) {
                let signer = Signer(&ring);
                let went_back = gone.contains(&kind.as_str());
                let may_sign = !ring.is_empty();
                if may_sign && (went_back || !chain::is_sound(&chain, is_new, signer)) {
                    broken.insert(*kind);
                }
                let signer = (may_sign && !broken.contains(kind)).then_some(signer);
                let records = doubtful.iter().chain(fresh).filter(|record| record.kind == *kind).cloned();
                rows.extend(chain::link(&mut chain, records, &self.recorded_by, signer));
                ends.push((*kind, (chain.seq, chain.hash)));
                moved.push(chain);
            }
            let last = rows.last().and_then(|row| {
                let kind = kinds.iter().find(|kind| kind.as_str() == row.chain)?;
                Some((kind.as_str(), row.seq, row.hash))
            });
            linked = Some((last, landed));
            (rows, moved)
        };
        let written = self.database.append_audit(&names, &seen, self.in_doubt, link).await;
        self.tell(broken);
        match (written, linked) {
            (Ok(()), _) => {
                self.in_doubt = None;
                self.seen.extend(ends);
                Ok(())
            }
            (Err(error @ StoreError::Unavailable { .. }), Some((last, landed))) => {
                self.in_doubt = last;
                Err(Failed { landed, ..Failed::new(After::InDoubt, error) })
            }
            (Err(error), Some((_, landed))) => {
                self.in_doubt = None;
                Err(Failed { landed, ..Failed::new(After::Refused, error) })
            }
            (Err(error), None) => Err(Failed::new(After::Untouched, error)),
        }
    }

    /// Says once of each chain that it was tampered with.
    fn tell(&mut self, broken: HashSet<Kind>) {
        for kind in broken.difference(&self.broken) {
            tracing::error!(
                chain = kind.as_str(),
                "this chain of the audit does not end as it was left, or is signed with a master key that is not at \
                 hand; it goes on and is not signed any more; 'secretier audit verify' names the place"
            );
        }
        self.broken = broken;
    }
}

/// The places to write to, the one that decides first.
pub(super) fn build(config: &super::Config, database: &Arc<Database>, recorded_by: &str) -> Vec<Sink> {
    let keys = database.keys();
    let sink = |sink: &super::SinkName| match sink {
        super::SinkName::Database => Sink::Database(DatabaseSink::new(Arc::clone(database), recorded_by.to_owned())),
        super::SinkName::File => {
            let file = config.file.clone().unwrap_or_else(|| PathBuf::from("audit.jsonl"));
            Sink::Lines(Lines::file(file, config.file_size, config.files_kept, Arc::clone(keys), recorded_by))
        }
        super::SinkName::Stdout => Sink::Lines(Lines::stdout(Arc::clone(keys), recorded_by)),
    };
    config.sink.iter().map(sink).collect()
}
