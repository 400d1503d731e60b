//! Records as lines of JSON: in a file, which is rotated, or on standard output.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    chain::{self, Fault, Signer, Walk, Walked},
    record::{Kind, Record},
};
use crate::{
    clock::Timestamp,
    sealing::{
        KeyRing, MasterKeys,
        private_file::{self, FileError},
    },
    tiers::database::{AuditChain, AuditMark, AuditRow, Signed},
};

/// Why lines could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LinesError {
    /// The file.
    #[error("the audit's file {path}", path = .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Where its chains end is noted beside it.
    #[error("the ends of the audit's chains could not be noted")]
    Ends(#[from] FileError),
    /// Standard output.
    #[error("standard output")]
    Stdout(#[source] io::Error),
    /// The writing itself was ended.
    #[error("the writing was ended")]
    Ended,
}

/// One record as a line.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    chain: String,
    seq: i64,
    first_at: String,
    at: String,
    count: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    actor_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    actor_name: Option<String>,
    action: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    outcome: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tier: Option<String>,
    detail: Value,
    hash: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signed_with: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signature: Option<String>,
}

/// A record as people and programs read it.
#[must_use]
pub fn to_json(row: &AuditRow) -> Value {
    // A struct of texts and numbers always serialises.
    serde_json::to_value(Line::from(row)).unwrap_or_default()
}

impl From<&AuditRow> for Line {
    fn from(row: &AuditRow) -> Self {
        let row = row.clone();
        let time = |millis| Timestamp::from_millis(millis).to_rfc3339();
        let (signed_with, signature) = row.signature.map(|signed| (signed.key, hex::encode(signed.bytes))).unzip();
        Self {
            chain: row.chain,
            seq: row.seq,
            first_at: time(row.first_at),
            at: time(row.at),
            count: row.count,
            actor_id: row.actor_id,
            actor_name: row.actor_name,
            action: row.action,
            tenant: row.tenant,
            key: row.key,
            outcome: row.outcome,
            tier: row.tier,
            // It was made from a value, with its members in order, so it is the same text again.
            detail: serde_json::from_str(&row.detail).unwrap_or(Value::String(row.detail)),
            hash: hex::encode(row.hash),
            signed_with,
            signature,
        }
    }
}

impl Line {
    fn into_row(self) -> Option<AuditRow> {
        let time = |text: &str| Timestamp::from_rfc3339(text).map(Timestamp::as_millis);
        let mut hash = [0; 32];
        hex::decode_to_slice(&self.hash, &mut hash).ok()?;
        let signature = match (self.signed_with, self.signature) {
            (Some(key), Some(signature)) => Some(Signed { key, bytes: hex::decode(signature).ok()? }),
            _ => None,
        };
        Some(AuditRow {
            first_at: time(&self.first_at)?,
            at: time(&self.at)?,
            chain: self.chain,
            seq: self.seq,
            count: self.count,
            actor_id: self.actor_id,
            actor_name: self.actor_name,
            action: self.action,
            tenant: self.tenant,
            key: self.key,
            outcome: self.outcome,
            tier: self.tier,
            detail: self.detail.to_string(),
            hash,
            signature,
        })
    }
}

/// Where lines go. A clone is another handle to the same place.
#[derive(Clone)]
pub(super) struct Lines(Arc<Parts>);

struct Parts {
    target: Target,
    keys: Arc<MasterKeys>,
    recorded_by: String,
}

enum Target {
    File {
        path: PathBuf,
        size: u64,
        kept: usize,
    },
    /// Its chains begin with the process, whose id is part of their names.
    Stdout {
        run: String,
        ends: Mutex<Ends>,
    },
}

/// Where the chains of a file end, noted beside it: lines that were cut off its end would
/// not be missed otherwise.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Ends {
    /// The file's length. What is behind it was never acknowledged.
    length: u64,
    chains: BTreeMap<String, End>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct End {
    seq: i64,
    hash: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vouched: Option<Vouched>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Vouched {
    seq: i64,
    hash: String,
    signed_with: String,
    signature: String,
}

impl End {
    fn chain(&self, name: &str) -> AuditChain {
        let hash = |text: &str| {
            let mut hash = [0xff; 32];
            // One that cannot be read is no record's.
            let _ = hex::decode_to_slice(text, &mut hash);
            hash
        };
        let vouched = self.vouched.as_ref().map(|mark| AuditMark {
            seq: mark.seq,
            hash: hash(&mark.hash),
            signature: Some(Signed {
                key: mark.signed_with.clone(),
                bytes: hex::decode(&mark.signature).unwrap_or_default(),
            }),
        });
        AuditChain { chain: name.to_owned(), start: BEGINNING, seq: self.seq, hash: hash(&self.hash), vouched }
    }
}

impl From<AuditChain> for End {
    fn from(chain: AuditChain) -> Self {
        let vouched = chain.vouched.and_then(|mark| {
            let Signed { key, bytes } = mark.signature?;
            let (hash, signature) = (hex::encode(mark.hash), hex::encode(bytes));
            Some(Vouched { seq: mark.seq, hash, signed_with: key, signature })
        });
        Self { seq: chain.seq, hash: hex::encode(chain.hash), vouched }
    }
}

const BEGINNING: AuditMark = AuditMark { seq: 0, hash: [0; 32], signature: None };

impl Lines {
    pub(super) fn file(path: PathBuf, size: u64, kept: usize, keys: Arc<MasterKeys>, recorded_by: &str) -> Self {
        let target = Target::File { path, size, kept };
        Self(Arc::new(Parts { target, keys, recorded_by: recorded_by.to_owned() }))
    }

    pub(super) fn stdout(keys: Arc<MasterKeys>, recorded_by: &str) -> Self {
        let target = Target::Stdout { run: uuid::Uuid::new_v4().to_string(), ends: Mutex::default() };
        Self(Arc::new(Parts { target, keys, recorded_by: recorded_by.to_owned() }))
    }

    pub(super) fn as_str(&self) -> &'static str {
        match self.0.target {
            Target::File { .. } => "file",
            Target::Stdout { .. } => "stdout",
        }
    }

    /// Appends these records, all or none. Returns when they are on the disk.
    pub(super) async fn append(&self, records: Vec<Record>) -> Result<(), LinesError> {
        let parts = Arc::clone(&self.0);
        // Files and pipes block.
        let appending = tokio::task::spawn_blocking(move || parts.append(&records));
        appending.await.unwrap_or(Err(LinesError::Ended))
    }
}

impl Parts {
    fn append(&self, records: &[Record]) -> Result<(), LinesError> {
        match &self.target {
            Target::File { path, size, kept } => self.append_to(path, *size, *kept, records),
            Target::Stdout { run, ends } => {
                let mut ends = ends.lock().unwrap_or_else(PoisonError::into_inner);
                let (text, new) = self.linked(&ends, &format!("/{run}"), records);
                let mut out = io::stdout().lock();
                out.write_all(&text).and_then(|()| out.flush()).map_err(LinesError::Stdout)?;
                *ends = new;
                Ok(())
            }
        }
    }

    /// Other processes write to the file too: each takes the right to, and the ends as they
    /// are then.
    fn append_to(&self, path: &Path, size: u64, kept: usize, records: &[Record]) -> Result<(), LinesError> {
        let failed = |source| LinesError::File { path: path.to_owned(), source };
        let noted = ends_of(path);
        let held = private_file::hold(&noted)?;
        let ends = read_ends(&noted)?;
        let mut options = OpenOptions::new();
        options.create(true).read(true).append(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length > ends.length {
            // A crash, or a full disk, left it; nobody was told that it is there.
            file.set_len(ends.length).map_err(failed)?;
        } else if length < ends.length {
            tracing::error!(
                file = %path.display(), length, noted = ends.length,
                "the audit's file is shorter than it was left; 'secretier audit verify --file' tells what is missing"
            );
        }
        let start = length.min(ends.length);
        let (text, mut new) = self.linked(&ends, "", records);
        let written = file.write_all(&text).and_then(|()| file.sync_data()).map_err(failed);
        new.length = start + text.len() as u64;
        let rotated = if new.length >= size { rotate(path, kept).is_ok() } else { false };
        if rotated {
            new.length = 0;
        }
        let noting = written.and_then(|()| {
            let text = serde_json::to_string(&new).unwrap_or_default();
            held.replace(&noted, &text).map_err(LinesError::from)
        });
        if noting.is_err() && !rotated {
            // Half a line is as good as none.
            let _ = file.set_len(start);
        }
        noting
    }

    /// The lines of these records behind the ends, and the new ends.
    fn linked(&self, ends: &Ends, suffix: &str, records: &[Record]) -> (Vec<u8>, Ends) {
        let ring = self.keys.ring();
        let signer = Signer(&ring);
        let (mut text, mut new) = (Vec::new(), ends.clone());
        // The first signature is given to all chains at once: one that lacks it later was taken away.
        let is_new = ends.chains.values().all(|end| end.vouched.is_none());
        for kind in Kind::ALL {
            let of_kind: Vec<Record> = records.iter().filter(|record| record.kind == kind).cloned().collect();
            if of_kind.is_empty() && !is_new {
                continue;
            }
            let name = format!("{}{suffix}", kind.as_str());
            let beginning = End { seq: 0, hash: hex::encode([0; 32]), vouched: None };
            let mut chain = ends.chains.get(&name).unwrap_or(&beginning).chain(&name);
            let may_sign = !ring.is_empty() && chain::is_sound(&chain, is_new, signer);
            for row in chain::link(&mut chain, of_kind, &self.recorded_by, may_sign.then_some(signer)) {
                // Writing to memory never fails.
                let _ = serde_json::to_writer(&mut text, &Line::from(&row));
                text.push(b'\n');
            }
            new.chains.insert(name, chain.into());
        }
        (text, new)
    }
}

fn ends_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".ends");
    name.into()
}

fn numbered(path: &Path, number: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

fn read_ends(noted: &Path) -> Result<Ends, LinesError> {
    let Some(text) = private_file::read(noted)? else { return Ok(Ends::default()) };
    serde_json::from_str(&text).map_err(|error| {
        let reason = format!("it is not what was written there ({error}); move it and the log away to begin anew");
        LinesError::Ends(FileError::Unreadable { path: noted.to_owned(), reason })
    })
}

/// `audit.jsonl` becomes `audit.jsonl.1`, that `.2`, and so on; the oldest is removed.
fn rotate(path: &Path, kept: usize) -> io::Result<()> {
    for number in (1..kept).rev() {
        match fs::rename(numbered(path, number), numbered(path, number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    if kept == 0 { fs::remove_file(path) } else { fs::rename(path, numbered(path, 1)) }
}

/// Verifies a file of lines with those that were rotated away from it, oldest first.
///
/// # Errors
/// A file that cannot be read.
pub fn verify(path: &Path, keys: &KeyRing) -> Result<Vec<Walked>, LinesError> {
    let mut numbers: Vec<usize> = (1..).take_while(|number| numbered(path, *number).is_file()).collect();
    numbers.reverse();
    let files = numbers.into_iter().map(|number| numbered(path, number)).chain([path.to_owned()]);
    // What was captured from standard output has none.
    let ends = read_ends(&ends_of(path))?.chains;
    let mut walks: BTreeMap<String, Walk<'_>> = BTreeMap::new();
    for file in files {
        let failed = |source| LinesError::File { path: file.clone(), source };
        for line in BufReader::new(File::open(&file).map_err(failed)?).split(b'\n') {
            let line = line.map_err(failed)?;
            // What is no record at all leaves a gap, which is told as one.
            let Some(row) = serde_json::from_slice::<Line>(&line).ok().and_then(Line::into_row) else { continue };
            let walk = walks.entry(row.chain.clone()).or_insert_with(|| {
                let mut walk = match row.seq {
                    1 => Walk::new(keys, &BEGINNING, &row.chain),
                    seq => Walk::from_the_middle(keys, seq, &row.chain),
                };
                if let Some(mark) = ends.get(&row.chain).and_then(|end| end.chain(&row.chain).vouched) {
                    walk.expect(mark.seq, mark.hash, Fault::End);
                }
                walk
            });
            walk.step(&row);
        }
    }
    for chain in ends.keys() {
        walks.entry(chain.clone()).or_insert_with(|| Walk::new(keys, &BEGINNING, chain));
    }
    let ended = |(name, walk): (String, Walk<'_>)| match ends.get(&name) {
        Some(end) => walk.end(&end.chain(&name), false),
        None => walk.finish(),
    };
    Ok(walks.into_iter().map(ended).collect())
}
