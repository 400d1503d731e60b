//! The targets of records: the database's chains, or lines of JSON.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{
    Config, SinkName,
    chain::{self, Signer, State},
    lines::{Lines, LinesError},
    record::{Kind, Record},
};
use crate::{
    keys::MasterKeys,
    log,
    tiers::database::{AuditChain, Database, StoreError},
};

/// A target of records.
pub(super) enum Sink {
    /// The database.
    Database(DatabaseSink),
    /// A file, or standard output.
    Lines(Lines),
}

/// Why records were not written; they may have been all the same.
#[derive(Debug, thiserror::Error)]
pub(super) enum SinkError {
    /// The database.
    #[error("the audit could not be written to the database")]
    Database(#[from] StoreError),
    /// The file.
    #[error("the audit could not be written")]
    Lines(#[from] LinesError),
}

/// The state of records whose write failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// None of them is there.
    Refused,
    /// Nothing was tried: earlier records stay in doubt, and the new ones are not there.
    Untouched,
    /// It is not known: they are in doubt, all of them together.
    InDoubt,
}

/// Records were not written, or it is not known whether they were.
#[derive(Debug)]
pub(super) struct Failed {
    /// The state of the new ones.
    pub(super) after: After,
    /// Whether those that were in doubt before turned out to be there.
    pub(super) landed: bool,
    /// The failure.
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

    /// Signs ends that are not signed yet.
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
    /// The last record of those in doubt: they are all there if it is.
    in_doubt: Option<(&'static str, i64, [u8; 32])>,
    /// The ends as they were last left here. A chain that no longer contains its end was
    /// tampered with.
    seen: HashMap<Kind, (i64, [u8; 32])>,
    /// Whether it was checked which chains are signed.
    is_known: bool,
    /// Whether no chain was signed at all at that check.
    is_new: bool,
    /// Chains that were found tampered with. They go on, but are not signed here.
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
    /// that no longer wraps; and, the first time of all, every chain at once: from then on a chain
    /// without a signature was tampered with.
    async fn sign(&mut self) -> Result<(), StoreError> {
        let ring = self.keys.ring();
        let Some(first) = ring.first().map(|key| key.id().to_string()) else { return Ok(()) };
        if self.in_doubt.is_some() {
            return Ok(());
        }
        let chains = self.database.audit_chains().await?;
        // A chain that was signed once is not new again, whatever was done to it.
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
        // A failed signature leaves nothing in doubt: it is simply made again.
        self.in_doubt = None;
        match signed {
            Err(Failed { error: SinkError::Database(error), .. }) => Err(error),
            Ok(()) | Err(_) => {
                self.is_new = false;
                Ok(())
            }
        }
    }

    /// Reads the master keys again where a chain is signed with one that is not at hand.
    ///
    /// A command holds the keys from before it began. A rotation since then, possibly its own,
    /// brings a new key into use, and a running instance signs the chains with that at once: a
    /// record that follows would stay unsigned until the next time, and for good where that
    /// instance ends.
    pub(super) async fn read_keys_of_a_rotation(&self) {
        let ring = self.keys.ring();
        let is_at_hand = |key: &str| key.parse().is_ok_and(|id| ring.find(id).is_some());
        // Where the database does not answer, the record that follows fails, which is reported.
        let Ok(chains) = self.database.audit_chains().await else { return };
        let mut signed = chains.iter().filter_map(|chain| chain.vouched.as_ref()?.signature.as_ref());
        if signed.all(|signed| is_at_hand(&signed.key)) {
            return;
        }
        if let Err(error) = self.keys.reload().await {
            tracing::warn!(error = log::chain(&error), "the master keys could not be read again");
        }
    }

    /// Signs chains as they are, whatever was done to them.
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
            ends.clear();
            let (mut rows, mut moved) = (Vec::new(), Vec::new());
            for (kind, mut chain) in kinds.iter().zip(chains) {
                let signer = Signer(&ring);
                let went_back = gone.contains(&kind.as_str());
                let state = chain::state(&chain, is_new, signer);
                let has_key = !ring.is_empty();
                if has_key && (went_back || state == State::Broken) {
                    broken.insert(*kind);
                }
                let may_sign = has_key && state == State::Sound && !broken.contains(kind);
                let signer = may_sign.then_some(signer);
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

    /// Logs once for each chain that it was tampered with.
    fn tell(&mut self, broken: HashSet<Kind>) {
        for kind in broken.difference(&self.broken) {
            tracing::error!(
                chain = kind.as_str(),
                "this chain of the audit does not end as it was left; it goes on and is not signed any more; \
                 'secretier audit verify' names the place"
            );
        }
        self.broken = broken;
    }
}

/// The targets, with the deciding one first.
pub(super) fn build(config: &Config, database: &Arc<Database>, recorded_by: &str) -> Vec<Sink> {
    let keys = database.keys();
    let sink = |sink: &SinkName| match sink {
        SinkName::Database => Some(Sink::Database(DatabaseSink::new(Arc::clone(database), recorded_by.to_owned()))),
        // A missing file was reported when the configuration was checked.
        SinkName::File => config.file.clone().map(|file| {
            Sink::Lines(Lines::file(file, config.file_size, config.files_kept, Arc::clone(keys), recorded_by))
        }),
        SinkName::Stdout => Some(Sink::Lines(Lines::stdout(Arc::clone(keys), recorded_by))),
    };
    config.sink.iter().filter_map(sink).collect()
}

#[cfg(test)]
mod tests {
    use diesel::{Connection as _, SqliteConnection, connection::SimpleConnection as _};

    use super::*;
    use crate::{
        access::audit::{Fault, Outcome},
        clock::{Clock, Timestamp},
        metrics::Metrics,
        sealing::{KeyRing, MasterKey},
    };

    fn record(key: &str) -> Record {
        Record { actor: None, action: "read", ..Record::example(Kind::Lookup, key, Outcome::Found) }
    }

    struct Place {
        folder: tempfile::TempDir,
        database: Arc<Database>,
    }

    impl Place {
        async fn new() -> Self {
            Self::with_keys(vec![MasterKey::generate().unwrap()]).await
        }

        async fn with_keys(keys: Vec<MasterKey>) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let database = Self::open(&folder, keys).await;
            Self { folder, database }
        }

        async fn open(folder: &tempfile::TempDir, keys: Vec<MasterKey>) -> Arc<Database> {
            let url = format!("url = \"sqlite:{}\"", folder.path().join("test.db").display());
            let keys = Arc::new(MasterKeys::fixed(KeyRing::new(keys)));
            let config = toml::from_str(&url).unwrap();
            Arc::new(Database::open(&config, "prod", keys, Clock::system(), Metrics::new()).await.unwrap())
        }

        fn sink(&self) -> DatabaseSink {
            DatabaseSink::new(Arc::clone(&self.database), "test".to_owned())
        }

        /// Another instance, which holds these keys.
        async fn sink_with(&self, keys: Vec<MasterKey>) -> DatabaseSink {
            DatabaseSink::new(Self::open(&self.folder, keys).await, "other".to_owned())
        }

        fn sql(&self, sql: &str) {
            let path = self.folder.path().join("test.db");
            SqliteConnection::establish(path.to_str().unwrap()).unwrap().batch_execute(sql).unwrap();
        }

        async fn records(&self) -> Vec<String> {
            let rows = self.database.audit_records("lookup", 0, 100).await.unwrap();
            rows.into_iter().filter_map(|row| row.key).collect()
        }

        /// The faults in the chain of lookups.
        async fn faults(&self) -> Vec<Fault> {
            let walked = super::super::verify(&self.database, &self.database.keys().ring(), &[]).await.unwrap();
            let findings = walked.into_iter().flat_map(|chain| chain.findings);
            findings.filter(|finding| finding.chain == "lookup").map(|finding| finding.fault).collect()
        }

        async fn is_sound(&self) -> bool {
            let walked = super::super::verify(&self.database, &self.database.keys().ring(), &[]).await.unwrap();
            walked.iter().all(|chain| chain.findings.is_empty())
        }
    }

    const REFUSE: &str = "CREATE TRIGGER full BEFORE INSERT ON audit_records BEGIN SELECT RAISE(ABORT, 'full'); END";

    #[tokio::test]
    async fn what_was_in_doubt_and_is_found_is_told_even_where_what_follows_fails() {
        let place = Place::new().await;
        let mut sink = place.sink();
        sink.append(&[], &[record("A")]).await.unwrap();
        let (seq, hash) = sink.seen[&Kind::Lookup];
        // As if the answer to the last write had been lost.
        sink.in_doubt = Some(("lookup", seq, hash));
        place.sql(REFUSE);
        let failed = sink.append(&[record("A")], &[record("B")]).await.unwrap_err();
        assert_eq!((failed.after, failed.landed), (After::Refused, true));
        place.sql("DROP TRIGGER full");
        sink.append(&[], &[record("B")]).await.unwrap();
        assert_eq!(place.records().await, ["A", "B"]);
        assert!(place.is_sound().await);
    }

    #[tokio::test]
    async fn who_reads_a_new_master_key_later_takes_nothing_for_tampered_with() {
        let (old, new) = (MasterKey::generate().unwrap(), MasterKey::generate().unwrap());
        let place = Place::with_keys(vec![new.clone(), old.clone()]).await;
        let mut later = place.sink_with(vec![old.clone()]).await;
        later.append(&[], &[record("A")]).await.unwrap();
        let mut first = place.sink();
        first.append(&[], &[record("B")]).await.unwrap();
        later.append(&[], &[record("C")]).await.unwrap();
        assert!(later.broken.is_empty(), "the end is signed with a key that is not known yet");
        assert_eq!(place.faults().await, [Fault::Unsigned], "and it signs nothing meanwhile");
        first.append(&[], &[record("D")]).await.unwrap();
        assert!(first.broken.is_empty() && place.is_sound().await);
        assert_eq!(place.records().await, ["A", "B", "C", "D"]);
    }

    #[tokio::test]
    async fn what_was_in_doubt_and_is_not_found_is_written() {
        let place = Place::new().await;
        let mut sink = place.sink();
        sink.append(&[], &[record("A")]).await.unwrap();
        sink.in_doubt = Some(("lookup", 2, [7; 32]));
        sink.append(&[record("B")], &[record("C")]).await.unwrap();
        assert_eq!(place.records().await, ["A", "B", "C"]);
    }

    /// Makes the chain of lookups look as if only commands without a key had ever written, with
    /// another record in the place of the last.
    async fn forge(place: &Place) {
        let mut chain = place.database.audit_chains().await.unwrap().remove(2);
        let before = place.database.audit_records("lookup", 0, 1).await.unwrap().remove(0);
        (chain.seq, chain.hash, chain.vouched) = (1, before.hash, None);
        let row = chain::link(&mut chain, [record("FORGED"), record("MORE")], "test", None);
        for row in row {
            place.sql(&format!(
                "DELETE FROM audit_records WHERE chain = 'lookup' AND seq = {seq}; \
                 INSERT INTO audit_records (chain, seq, first_at, at, count, action, tenant, secret_key, outcome, detail, hash) \
                 VALUES ('lookup', {seq}, {at}, {at}, 1, 'read', 'acme', '{key}', 'found', '{detail}', x'{hash}'); \
                 UPDATE audit_chains SET seq = {seq}, hash = x'{hash}' WHERE chain = 'lookup'",
                seq = row.seq, at = row.at, key = row.key.unwrap(), detail = row.detail, hash = hex::encode(row.hash),
            ));
        }
        place.sql(
            "UPDATE audit_chains SET vouched_seq = NULL, vouched_hash = NULL, signed_with = NULL, signature = NULL",
        );
    }

    #[tokio::test]
    async fn an_instance_takes_no_chain_for_new_whose_signatures_were_all_removed() {
        let place = Place::new().await;
        let mut sink = place.sink();
        sink.append(&[], &[record("A"), record("B")]).await.unwrap();
        forge(&place).await;
        sink.sign().await.unwrap();
        sink.append(&[], &[record("C")]).await.unwrap();
        sink.sign().await.unwrap();
        // Nothing else reveals it.
        assert_eq!(place.faults().await, [Fault::Unsigned]);
    }

    #[tokio::test]
    async fn nor_does_it_vouch_for_one_that_lacks_the_record_it_wrote_last() {
        let place = Place::new().await;
        let mut sink = place.sink();
        sink.append(&[], &[record("A")]).await.unwrap();
        let early = place.database.audit_chains().await.unwrap().remove(2).vouched.unwrap();
        sink.append(&[], &[record("B")]).await.unwrap();
        forge(&place).await;
        // With the signature that an earlier copy of the database has.
        let signed = early.signature.unwrap();
        place.sql(&format!(
            "UPDATE audit_chains SET vouched_seq = 1, vouched_hash = x'{}', signed_with = '{}', signature = x'{}' \
             WHERE chain = 'lookup'",
            hex::encode(early.hash),
            signed.key,
            hex::encode(&signed.bytes),
        ));
        sink.sign().await.unwrap();
        sink.append(&[], &[record("C")]).await.unwrap();
        assert_eq!(place.faults().await, [Fault::Unsigned]);
    }

    #[tokio::test]
    async fn what_was_dated_back_is_not_removed_for_its_age() {
        let place = Place::new().await;
        let mut sink = place.sink();
        for key in ["A", "B", "C"] {
            sink.append(&[], &[record(key)]).await.unwrap();
        }
        let retention = super::super::Retention::default();
        let trim = async |days: i64| {
            let now = Timestamp::from_millis(1_700_000_000_000 + days * 24 * 60 * 60 * 1000);
            super::super::trim(&place.database, retention, now).await.unwrap();
            place.records().await
        };
        place.sql("UPDATE audit_records SET at = 0, first_at = 0 WHERE chain = 'lookup' AND seq = 2");
        assert_eq!(trim(1).await, ["A", "B", "C"]);
        assert_eq!(trim(100).await, ["B", "C"], "up to what fits");
        assert!(!place.is_sound().await, "it is found all the same");
        // A beginning with a key that nobody has is not believed.
        place.sql(
            "UPDATE audit_records SET at = 1700000000000, first_at = 1700000000000 WHERE chain = 'lookup' AND seq = 2",
        );
        assert!(place.is_sound().await);
        place.sql("UPDATE audit_chains SET start_signed_with = '0123456789abcdef' WHERE chain = 'lookup'");
        assert!(!place.is_sound().await);
        assert_eq!(trim(200).await, ["B", "C"]);
    }
}
