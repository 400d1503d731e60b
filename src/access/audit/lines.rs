//! Records as lines of JSON: in a file, which is rotated, or on standard output.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    chain::{self, Fault, Signer, State, Walk, Walked},
    record::{Kind, Record},
};
use crate::{
    clock::Timestamp,
    keys::MasterKeys,
    legible,
    private_file::{self, FileError},
    sealing::KeyRing,
    tiers::database::{AuditChain, AuditMark, AuditRow, Signed},
};

/// Why lines could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LinesError {
    /// The file.
    #[error("the audit's file {path}", path = .path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The note beside it of where its chains end.
    #[error("the ends of the audit's chains could not be noted")]
    Ends(#[from] FileError),
    /// Standard output.
    #[error("standard output")]
    Stdout(#[source] io::Error),
    /// The task that writes was ended.
    #[error("the writing was ended")]
    Ended,
}

/// One record as a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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

/// The target of lines.
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

/// The ends of a file's chains, noted beside it: otherwise, lines that were cut off its end
/// would not be missed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Ends {
    /// The file's length. Bytes after it were never acknowledged.
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
            // An unreadable hash belongs to no record.
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

    /// Appends to the file. Other processes write to it too: each takes the lock, and the ends as
    /// they are then.
    fn append_to(&self, path: &Path, size: u64, kept: usize, records: &[Record]) -> Result<(), LinesError> {
        let failed = |source| LinesError::File { path: path.to_owned(), source };
        let noted = ends_of(path);
        let held = private_file::hold(&noted)?;
        let mut ends = ends_at(path, &noted, &held)?;
        if ends.length > 0 && ends.length >= size {
            if !is_rotated(path, kept, ends.length) {
                cut(path, ends.length).and_then(|()| rotate(path, kept)).map_err(failed)?;
            }
            ends.length = 0;
            held.replace(&noted, &serde_json::to_string(&ends).unwrap_or_default())?;
        }
        let mut options = OpenOptions::new();
        options.create(true).read(true).append(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length > ends.length {
            // A crash or a full disk left these bytes; they were never acknowledged.
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
        let noting = written.and_then(|()| {
            let text = serde_json::to_string(&new).unwrap_or_default();
            held.replace(&noted, &text).map_err(LinesError::from)
        });
        if noting.is_err() {
            // Half a line must not stay.
            let _ = file.set_len(start);
        }
        noting
    }

    /// The lines of these records after the ends, and the new ends.
    fn linked(&self, ends: &Ends, suffix: &str, records: &[Record]) -> (Vec<u8>, Ends) {
        let ring = self.keys.ring();
        let signer = Signer(&ring);
        let (mut text, mut new) = (Vec::new(), ends.clone());
        // The first signature is made for all chains at once: one without was changed.
        let is_new = ends.chains.values().all(|end| end.vouched.is_none());
        for kind in Kind::ALL {
            let of_kind: Vec<Record> = records.iter().filter(|record| record.kind == kind).cloned().collect();
            if of_kind.is_empty() && !is_new {
                continue;
            }
            let name = format!("{}{suffix}", kind.as_str());
            let beginning = End { seq: 0, hash: hex::encode([0; 32]), vouched: None };
            let mut chain = ends.chains.get(&name).unwrap_or(&beginning).chain(&name);
            let may_sign = !ring.is_empty() && chain::state(&chain, is_new, signer) == State::Sound;
            for row in chain::link(&mut chain, of_kind, &self.recorded_by, may_sign.then_some(signer)) {
                // A struct of texts and numbers always serialises.
                let line = serde_json::to_string(&Line::from(&row)).unwrap_or_default();
                text.extend_from_slice(legible::line(&line).as_bytes());
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

/// The noted ends. They exist before the file does: a file without them is never cut,
/// whoever removed them.
fn ends_at(path: &Path, noted: &Path, held: &private_file::Hold) -> Result<Ends, LinesError> {
    if noted.exists() {
        return read_ends(noted);
    }
    if fs::metadata(path).is_ok_and(|found| found.len() > 0) {
        let reason = format!("it is gone, and {} is not; move that away to begin anew", path.display());
        return Err(LinesError::Ends(FileError::Unreadable { path: noted.to_owned(), reason }));
    }
    let ends = Ends::default();
    held.replace(noted, &serde_json::to_string(&ends).unwrap_or_default())?;
    Ok(ends)
}

/// Cuts the file to this length: the bytes after it were never acknowledged.
fn cut(path: &Path, length: u64) -> io::Result<()> {
    let file = match OpenOptions::new().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    if file.metadata()?.len() > length { file.set_len(length) } else { Ok(()) }
}

/// Whether a file of this length was rotated away, and a crash kept that from being noted.
fn is_rotated(path: &Path, kept: usize, length: u64) -> bool {
    let has_length = |path: &Path| fs::metadata(path).is_ok_and(|found| found.len() >= length);
    !path.exists() && (kept == 0 || has_length(&numbered(path, 1)))
}

/// `audit.jsonl` becomes `audit.jsonl.1`, that `.2`, and so on; the oldest is removed. A gap
/// that a crash left is closed.
fn rotate(path: &Path, kept: usize) -> io::Result<()> {
    let last = (1..kept).find(|number| !numbered(path, *number).exists()).unwrap_or(kept);
    for number in (1..last).rev() {
        fs::rename(numbered(path, number), numbered(path, number + 1))?;
    }
    let rotated = if kept == 0 { fs::remove_file(path) } else { fs::rename(path, numbered(path, 1)) };
    match rotated {
        // Somebody removed it. A verification finds that; this process must go on.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        rotated => rotated,
    }
}

/// The numbers of the files that were rotated away, oldest first.
fn rotated_from(path: &Path) -> Result<Vec<usize>, LinesError> {
    let failed = |source| LinesError::File { path: path.to_owned(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let prefix = format!("{}.", path.file_name().unwrap_or_default().to_string_lossy());
    let mut numbers: Vec<usize> = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let number: Option<usize> = name.to_string_lossy().strip_prefix(&prefix).and_then(|number| number.parse().ok());
        numbers.extend(number.filter(|number| *number > 0));
    }
    numbers.sort_unstable_by(|one, other| other.cmp(one));
    Ok(numbers)
}

/// Verifies a file of lines with the files that were rotated away from it, oldest first, while
/// lines may be added to it.
///
/// # Errors
/// A file that cannot be read.
pub fn verify(path: &Path, keys: &KeyRing) -> Result<Vec<Walked>, LinesError> {
    let (files, ends) = opened(path)?;
    let mut walks: BTreeMap<String, Walk<'_>> = BTreeMap::new();
    for (file, length, lines) in files {
        for line in BufReader::new(lines.take(length)).split(b'\n') {
            let line = line.map_err(|source| LinesError::File { path: file.clone(), source })?;
            // A line that is no record leaves a gap, which is reported as such.
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

/// The files, oldest first, each with the length to read, and the ends that belong to
/// them: nobody writes while they are opened, and later lines are after that length.
#[expect(clippy::type_complexity, reason = "three things of each file")]
fn opened(path: &Path) -> Result<(Vec<(PathBuf, u64, File)>, BTreeMap<String, End>), LinesError> {
    let noted = ends_of(path);
    let _held = private_file::hold(&noted)?;
    let mut files = Vec::new();
    for number in rotated_from(path)? {
        files.push((numbered(path, number), u64::MAX));
    }
    // Lines that were captured from standard output have no ends.
    let has_ends = noted.exists();
    let ends = read_ends(&noted)?;
    // Removed by a rotation that a crash left unnoted, or by somebody: records are missing.
    if path.exists() || files.is_empty() && !has_ends {
        files.push((path.to_owned(), if has_ends { ends.length } else { u64::MAX }));
    }
    let open = |(path, length): (PathBuf, u64)| match File::open(&path) {
        Ok(file) => Ok((path, length, file)),
        Err(source) => Err(LinesError::File { path, source }),
    };
    Ok((files.into_iter().map(open).collect::<Result<_, _>>()?, ends.chains))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{access::audit::Outcome, sealing::MasterKey};

    fn record(key: &str) -> Record {
        Record::example(Kind::Write, key, Outcome::Done)
    }

    struct Log {
        _folder: tempfile::TempDir,
        path: PathBuf,
        keys: Arc<MasterKeys>,
        parts: Parts,
    }

    impl Log {
        fn new(size: u64) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("audit.jsonl");
            let keys = Arc::new(MasterKeys::fixed(KeyRing::new(vec![MasterKey::generate().unwrap()])));
            let target = Target::File { path: path.clone(), size, kept: 8 };
            let parts = Parts { target, keys: Arc::clone(&keys), recorded_by: "test".to_owned() };
            Self { _folder: folder, path, keys, parts }
        }

        fn append(&self, key: &str) -> Result<(), LinesError> {
            self.parts.append(&[record(key)])
        }

        fn faults(&self) -> Vec<Fault> {
            let walked = verify(&self.path, &self.keys.ring()).unwrap();
            walked.into_iter().flat_map(|chain| chain.findings).map(|finding| finding.fault).collect()
        }

        fn length(&self) -> u64 {
            fs::metadata(&self.path).unwrap().len()
        }
    }

    #[test]
    fn what_others_have_chosen_is_written_as_it_can_be_read_and_a_file_of_before_verifies_all_the_same() {
        const UNFIT: &str = "a\u{85}\u{202e}\u{200b}\u{2028}";
        let log = Log::new(1 << 20);
        let mut odd = record(UNFIT);
        odd.detail.agent = Some(UNFIT.to_owned());
        odd.detail.options.insert("name", UNFIT.to_owned());
        log.parts.append(&[odd]).unwrap();
        let text = fs::read_to_string(&log.path).unwrap();
        assert!(!text.contains(|c| c != '\n' && legible::is_unfit(c)), "{text}");
        let line: Value = serde_json::from_str(&text).unwrap();
        let shown = Value::from("a\\u0085\\u202e\\u200b\\u2028");
        assert_eq!(
            (&line["key"], &line["detail"]["agent"]),
            (&UNFIT.into(), &shown),
            "what is searched by stays exact"
        );
        assert_eq!(line["detail"]["options"]["name"], shown);
        assert_eq!(log.faults(), []);

        // As older versions wrote it: the hash is over the meaning, in either spelling.
        let row = serde_json::from_str::<Line>(&text).unwrap().into_row().unwrap();
        let before = serde_json::to_string(&Line::from(&row)).unwrap();
        assert!(before.contains('\u{202e}') && before.len() != text.trim_end().len());
        let again = serde_json::from_str::<Line>(&before).unwrap().into_row().unwrap();
        assert_eq!((again.hash, again.key, again.detail), (row.hash, row.key.clone(), row.detail.clone()));
        let old = AuditRow { detail: format!("{{\"agent\":\"{UNFIT}\"}}"), ..row };
        let line = legible::line(&serde_json::to_string(&Line::from(&old)).unwrap()).into_owned();
        assert_eq!(serde_json::from_str::<Line>(&line).unwrap().into_row().unwrap().detail, old.detail);
    }

    #[test]
    fn a_file_whose_noted_ends_are_gone_is_not_cut() {
        let log = Log::new(1 << 20);
        log.append("A").unwrap();
        let length = log.length();
        fs::remove_file(ends_of(&log.path)).unwrap();
        assert!(log.append("B").unwrap_err().to_string().contains("ends"));
        assert_eq!(log.length(), length);
    }

    #[test]
    fn a_crash_between_any_two_steps_of_a_rotation_leaves_a_sound_file() {
        for renamed in 0..3 {
            let log = Log::new(400);
            for key in ["A", "B", "C"] {
                log.append(key).unwrap();
            }
            assert!(numbered(&log.path, 2).is_file() && log.length() >= 400, "the next one rotates");
            // The state after a crash: an unnoted tail, then some renamings, and none of it noted.
            let mut tail = OpenOptions::new().append(true).open(&log.path).unwrap();
            tail.write_all(b"{\"half\":").unwrap();
            if renamed > 0 {
                fs::rename(numbered(&log.path, 2), numbered(&log.path, 3)).unwrap();
            }
            if renamed > 1 {
                fs::rename(numbered(&log.path, 1), numbered(&log.path, 2)).unwrap();
            }
            log.append("D").unwrap();
            log.append("E").unwrap();
            assert_eq!(log.faults(), [], "{renamed}");
            assert_eq!(
                verify(&log.path, &log.keys.ring()).unwrap().iter().map(|walked| walked.records).sum::<u64>(),
                5
            );
        }
        let log = Log::new(400);
        log.append("A").unwrap();
        fs::rename(&log.path, numbered(&log.path, 1)).unwrap();
        assert_eq!(log.faults(), []);
        log.append("B").unwrap();
        assert!(!numbered(&log.path, 2).exists());
        assert_eq!(log.faults(), []);
    }

    #[test]
    fn a_rotated_file_that_was_taken_away_is_missed_and_lines_not_yet_noted_are_not() {
        let log = Log::new(400);
        for key in ["A", "B", "C", "D"] {
            log.append(key).unwrap();
        }
        fs::OpenOptions::new().append(true).open(&log.path).unwrap().write_all(b"{}").unwrap();
        assert_eq!(log.faults(), []);
        fs::remove_file(numbered(&log.path, 2)).unwrap();
        assert_eq!(log.faults(), [Fault::Missing(2)]);
    }
}
