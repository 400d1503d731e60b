//! Records as lines of JSON: in a file, which is rotated, or on standard output.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    chain::{self, Fault, Signer, State, Walk, Walked},
    record::{Kind, Record},
    rotation::{self, Part, Place},
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

/// One record as a line, and in the answer to a search.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[schema(as = AuditRecord)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// The chain that it is in.
    chain: String,
    /// Its place there.
    seq: i64,
    /// When the first of the requests came that it counts; RFC 3339, UTC.
    first_at: String,
    /// When the last one came.
    at: String,
    /// How many requests it counts.
    count: i64,
    /// The public part of the token, or `uid:N`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    actor_id: Option<String>,
    /// The name of the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    actor_name: Option<String>,
    /// The request, or the command.
    action: String,
    /// As a known token asked for it, even if it is no name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
    /// The same of the secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    /// `found`, `absent`, `begun`, `done`, `conflict`, `denied`, `limited`, `invalid` or `failed`.
    outcome: String,
    /// `memory`, `database` or `infisical`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tier: Option<String>,
    /// The error's code, the peer and what else is known of the request.
    detail: Value,
    /// SHA-256 of the record and of the hash before.
    hash: String,
    /// The master key that it is signed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signed_with: Option<String>,
    /// HMAC-SHA256, in hex.
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

impl Ends {
    /// Begins a new file where the one that they belong to was rotated; says whether it was. By another
    /// program, as logrotate; or by this one, before a crash kept that from being noted.
    fn begin_anew(&mut self, path: &Path) -> io::Result<bool> {
        let Some(rotated) = self.taken_from(path)? else { return Ok(false) };
        tracing::info!(file = %path.display(), to = %rotated.display(), "the audit's file was rotated; a new one begins");
        rotation::cut_rotated(&rotated, self.length)?;
        self.length = 0;
        Ok(true)
    }

    /// The file that these ends belong to, where somebody has rotated it.
    fn taken_from(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        if fs::metadata(path).map_or(0, |found| found.len()) >= self.length {
            return Ok(None);
        }
        let is_end = |place: &Place| {
            self.chains.get(&place.chain).is_some_and(|end| (end.seq, &end.hash) == (place.seq, &place.hash))
        };
        rotation::taken_from(path, self.length, is_end)
    }
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
        let note = |ends: &Ends| held.replace(&noted, &serde_json::to_string(ends).unwrap_or_default());
        if ends.begin_anew(path).map_err(failed)? {
            note(&ends)?;
        }
        if ends.length > 0 && ends.length >= size {
            rotation::cut(path, ends.length).and_then(|()| rotation::rotate(path, kept)).map_err(failed)?;
            ends.length = 0;
            note(&ends)?;
        }
        let mut options = OpenOptions::new();
        options.create(true).read(true).append(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        // It may have been renamed since, just before it was opened.
        if length < ends.length && ends.begin_anew(path).map_err(failed)? {
            note(&ends)?;
        }
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

/// Verifies a file of lines with the files that were rotated away from it, oldest first, while
/// lines may be added to it.
///
/// # Errors
/// A file that cannot be read.
pub fn verify(path: &Path, keys: &KeyRing) -> Result<Vec<Walked>, LinesError> {
    let (parts, ends) = opened(path)?;
    let failed = |(path, source)| LinesError::File { path, source };
    let mut walks: BTreeMap<String, Walk<'_>> = BTreeMap::new();
    for part in rotation::in_order(parts).map_err(failed)? {
        let wrong = |source| failed((part.path.clone(), source));
        let mut lines = part.read().map_err(wrong)?;
        while let Some(line) = lines.next_line().map_err(wrong)? {
            // A line that is no record leaves a gap, which is reported as such.
            let Some(row) = serde_json::from_slice::<Line>(line).ok().and_then(Line::into_row) else { continue };
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

/// The files, each with the length to read, and the ends that belong to them: none of our
/// processes writes while they are opened, and later lines are after that length.
fn opened(path: &Path) -> Result<(Vec<Part>, BTreeMap<String, End>), LinesError> {
    let failed = |source| LinesError::File { path: path.to_owned(), source };
    let noted = ends_of(path);
    let _held = private_file::hold(&noted)?;
    // Lines that were captured from standard output have no ends.
    let has_ends = noted.exists();
    let ends = read_ends(&noted)?;
    // Another program may rename a file between the look at the folder and its opening.
    for _ in 0..LOOKS {
        let rotated = rotation::rotated_from(path).map_err(failed)?;
        let taken = if has_ends { ends.taken_from(path).map_err(failed)? } else { None };
        let mut files: Vec<_> = rotated
            .into_iter()
            .map(|file| {
                let length = if taken.as_ref() == Some(&file) { ends.length } else { u64::MAX };
                (file, length)
            })
            .collect();
        // Removed by a rotation that a crash left unnoted, or by somebody: records are missing.
        if path.exists() || files.is_empty() && !has_ends {
            files.push((path.to_owned(), if has_ends { ends.length } else { u64::MAX }));
        }
        match open_all(files) {
            Err(LinesError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound && has_ends => {}
            opened => return Ok((opened?, ends.chains)),
        }
    }
    Err(failed(io::Error::other("files are renamed all the time; try again")))
}

fn open_all(files: Vec<(PathBuf, u64)>) -> Result<Vec<Part>, LinesError> {
    let open = |(path, length): (PathBuf, u64)| {
        Part::open(path.clone(), length).map_err(|source| LinesError::File { path, source })
    };
    files.into_iter().map(open).collect()
}

/// How often a folder is looked at whose files are renamed meanwhile.
const LOOKS: usize = 10;

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::{rotation::numbered, *};
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

    /// A log of three records that another program has rotated, and what it calls the file.
    fn rotated_by(other: impl Fn(&Path) -> PathBuf) -> (Log, PathBuf) {
        let log = Log::new(1 << 20);
        for key in ["A", "B", "C"] {
            log.append(key).unwrap();
        }
        let rotated = other(&log.path);
        (log, rotated)
    }

    fn renamed(path: &Path, ending: &str) -> PathBuf {
        let mut to = path.as_os_str().to_owned();
        to.push(ending);
        fs::rename(path, &to).unwrap();
        to.into()
    }

    fn compressed(path: &Path) -> PathBuf {
        assert!(Command::new("gzip").arg(path).status().unwrap().success());
        path.with_file_name(format!("{}.gz", path.file_name().unwrap().to_string_lossy()))
    }

    fn records(log: &Log) -> u64 {
        verify(&log.path, &log.keys.ring()).unwrap().iter().map(|walked| walked.records).sum()
    }

    #[test]
    fn a_file_that_another_program_has_rotated_is_followed_by_a_new_one() {
        type Rotation = fn(&Path) -> PathBuf;
        let rotations: [(&str, Rotation); 6] = [
            ("numbered", |path| renamed(path, ".1")),
            ("dated", |path| renamed(path, "-20261130")),
            ("compressed", |path| compressed(&renamed(path, ".1"))),
            ("dated and compressed", |path| compressed(&renamed(path, "-20261130"))),
            ("created", |path| {
                let rotated = renamed(path, ".1");
                fs::write(path, "").unwrap();
                rotated
            }),
            ("copied and truncated", |path| {
                let rotated = numbered(path, 1);
                fs::copy(path, &rotated).unwrap();
                fs::write(path, "").unwrap();
                rotated
            }),
        ];
        for (name, rotate) in rotations {
            let (log, rotated) = rotated_by(rotate);
            assert_eq!((log.faults(), records(&log)), (vec![], 3), "{name}, before anything follows");
            let ends = read_ends(&ends_of(&log.path)).unwrap();
            assert_eq!(ends.taken_from(&log.path).unwrap(), Some(rotated.clone()), "{name}");
            log.append("D").unwrap();
            log.append("E").unwrap();
            assert_eq!((log.faults(), records(&log)), (vec![], 5), "{name}");
            assert_eq!(fs::read_to_string(&log.path).unwrap().lines().count(), 2, "{name}");
            fs::remove_file(rotated).unwrap();
            assert_eq!(records(&log), 2, "{name}");
        }
    }

    #[test]
    fn a_file_that_was_removed_is_no_rotation() {
        let (log, rotated) = rotated_by(|path| renamed(path, ".1"));
        log.append("D").unwrap();
        let ends = read_ends(&ends_of(&log.path)).unwrap();
        fs::remove_file(&log.path).unwrap();
        assert!(rotated.is_file() && ends.taken_from(&log.path).unwrap().is_none());
        log.append("E").unwrap();
        assert_eq!(log.faults(), [Fault::Missing(4)]);
    }

    #[test]
    fn a_record_that_a_crash_left_unacknowledged_is_cut_off_the_rotated_file_too() {
        let (log, rotated) = rotated_by(|path| {
            let whole = fs::read_to_string(path).unwrap();
            let again = whole.lines().last().unwrap().to_owned() + "\n";
            OpenOptions::new().append(true).open(path).unwrap().write_all(again.as_bytes()).unwrap();
            renamed(path, ".1")
        });
        assert_eq!((log.faults(), records(&log)), (vec![], 3), "what was never acknowledged is not read");
        log.append("D").unwrap();
        assert_eq!((log.faults(), records(&log)), (vec![], 4));
        assert_eq!(fs::read_to_string(rotated).unwrap().lines().count(), 3);
    }

    #[test]
    fn rotations_of_two_programs_verify_whatever_the_files_are_called() {
        let log = Log::new(400);
        for key in ["A", "B", "C"] {
            log.append(key).unwrap();
        }
        // Ours: .2 and .1. Then another program's, by day; then ours again.
        renamed(&log.path, "-20261130");
        for key in ["D", "E"] {
            log.append(key).unwrap();
        }
        compressed(&numbered(&log.path, 2));
        for key in ["F", "G"] {
            log.append(key).unwrap();
        }
        assert_eq!((log.faults(), records(&log)), (vec![], 7));
        assert!(log.path.with_file_name("audit.jsonl.4.gz").is_file(), "compressed ones move on as well");
    }

    #[test]
    fn a_compressed_copy_beside_its_original_is_not_read_twice() {
        let (log, rotated) = rotated_by(|path| renamed(path, ".1"));
        assert!(Command::new("gzip").arg("--keep").arg(&rotated).status().unwrap().success());
        log.append("D").unwrap();
        assert_eq!((log.faults(), records(&log)), (vec![], 4));
        // It is being made.
        let copy = rotated.with_file_name("audit.jsonl.1.gz");
        let whole = fs::read(&copy).unwrap();
        for length in [0, whole.len() / 2] {
            fs::write(&copy, &whole[..length]).unwrap();
            assert_eq!((log.faults(), records(&log)), (vec![], 4), "{length}");
        }
        fs::remove_file(rotated).unwrap();
        let error = verify(&log.path, &log.keys.ring()).unwrap_err();
        assert!(error.to_string().contains("audit.jsonl.1.gz"), "{error}");
    }

    #[test]
    fn what_was_changed_in_a_compressed_file_is_found() {
        let (log, rotated) = rotated_by(|path| {
            let whole = fs::read_to_string(path).unwrap();
            fs::write(path, whole.replacen("\"B\"", "\"X\"", 1)).unwrap();
            compressed(&renamed(path, ".1"))
        });
        assert!(rotated.is_file());
        assert_eq!(log.faults(), [Fault::Changed]);
    }
}
