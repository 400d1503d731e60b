//! The file: one line in the clear, then sealed chunks.
//!
//! The line is JSON and has the file's environment and the way to its key. A chunk is its length
//! (four bytes, big-endian), then nonce, ciphertext and tag of AES-256-GCM, under a key that only
//! this file uses: derived from the master key and a random salt in the line. It is bound to
//! the line, to its place, and to whether it is the last one. So none can be changed, left out,
//! moved, added, or taken from another file, and no byte of the line can be changed either.
//!
//! A chunk holds whole records, about a megabyte of them: while a file is written or read, no
//! more than one chunk is in the clear. A record is two texts, each after its length: JSON,
//! and beside it a secret's value, which thus passes through no parser.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    path::Path,
};

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use super::{Contents, KeptSecret, OfflineError, Record};
use crate::{
    clock::Timestamp,
    private_file::{self, FileError},
    sealing::{DerivedKey, KeyPurpose, KeyRing, MasterKey, MasterKeyId, passphrase::Derivation},
};

const FORMAT: &str = "secretier last good";
const VERSION: u32 = 1;
/// Longer than any line that is written.
const MAX_LINE: u64 = 4096;
/// A chunk is sealed before it grows longer than this; a single record may be longer. Tests
/// need many chunks in a short time.
const CHUNK: usize = if cfg!(test) { 4 << 10 } else { 1 << 20 };

/// The line in the clear. None of it is a secret.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    format: String,
    version: u32,
    environment: String,
    /// The id of the master key.
    master_key: String,
    /// The derivation from a passphrase, where the database has told it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    derivation: Option<String>,
    /// In milliseconds since 1970.
    written_at: i64,
    salt: String,
}

impl Header {
    /// The line of a file that is written now.
    #[must_use]
    pub fn new(environment: &str, key: MasterKeyId, derivation: Option<&Derivation>, now: Timestamp) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            environment: environment.to_owned(),
            master_key: key.to_string(),
            derivation: derivation.map(ToString::to_string),
            written_at: now.as_millis(),
            salt: hex::encode(rand::random::<[u8; 32]>()),
        }
    }

    /// The master key's derivation from a passphrase, where the file has it.
    ///
    /// # Errors
    /// [`OfflineError::Damaged`].
    pub fn derivation(&self) -> Result<Option<Derivation>, OfflineError> {
        self.derivation.as_deref().map(str::parse).transpose().map_err(|_| OfflineError::Damaged)
    }

    /// When the file was written, or where the database could not be reached then, when it was
    /// last heard of. Can be trusted only once the file was read to its end.
    #[must_use]
    pub fn written_at(&self) -> Timestamp {
        Timestamp::from_millis(self.written_at)
    }

    fn key(&self, master: &MasterKey) -> DerivedKey {
        master.derive(KeyPurpose::OfflineCopy).narrowed(&[self.salt.as_bytes()])
    }
}

/// Replaces the file with this content, whole or not at all; returns its
/// length. Keeps a core busy.
///
/// # Errors
/// [`FileError::Unwritable`], also where it would be longer than `limit`.
pub fn write(
    path: &Path,
    header: &Header,
    master: &MasterKey,
    contents: Contents,
    limit: u64,
) -> Result<u64, FileError> {
    let mut length = 0;
    let held = private_file::hold(path)?;
    let written = held.prepare_with(path, |file| {
        // Texts and numbers always serialise.
        let mut line = serde_json::to_vec(header).unwrap_or_default();
        line.push(b'\n');
        file.write_all(&line)?;
        let key = header.key(master);
        let plain = Zeroizing::new(Vec::with_capacity(CHUNK));
        let mut sealer = Sealer { file, key, written: line.len() as u64, line, place: 0, plain, limit };
        sealer.put_all(contents)?;
        sealer.seal(true)?;
        length = sealer.written;
        Ok(())
    })?;
    written.replace()?;
    Ok(length)
}

struct Sealer<'f> {
    file: &'f mut File,
    key: DerivedKey,
    line: Vec<u8>,
    place: u64,
    /// The content of the next chunk.
    plain: Zeroizing<Vec<u8>>,
    written: u64,
    limit: u64,
}

impl Sealer<'_> {
    fn put_all(&mut self, contents: Contents) -> io::Result<()> {
        let Contents { gathered_at, followed, shredded, phases, denied, tokens, secrets } = contents;
        self.put(&Record::Followed { number: followed }, "")?;
        if let Some(at) = shredded {
            self.put(&Record::Shredded { at: at.as_millis() }, "")?;
        }
        for (tenant, phase) in phases {
            self.put(&Record::Phase { tenant: tenant.as_str().to_owned(), phase }, "")?;
        }
        for (tenant, retry_at) in denied {
            let (tenant, retry_at) = (tenant.as_str().to_owned(), retry_at.as_millis());
            self.put(&Record::Denied { tenant, retry_at }, "")?;
        }
        for token in tokens {
            self.put(&Record::Token(token), "")?;
        }
        // Dropped one by one: entries that memory drops meanwhile are held no longer than needed.
        for (tenant, entry) in secrets {
            if let Some((secret, value)) = KeptSecret::of(&tenant, &entry, gathered_at) {
                self.put(&Record::Secret(secret), value)?;
            }
        }
        Ok(())
    }

    fn put(&mut self, record: &Record, value: &str) -> io::Result<()> {
        let record = serde_json::to_vec(record).map_err(io::Error::other)?;
        let length = 8 + record.len() + value.len();
        if !self.plain.is_empty() && self.plain.len() + length > CHUNK {
            self.seal(false)?;
        }
        if length > self.plain.capacity() {
            // Empty by now: a buffer that grows would leave a copy behind.
            self.plain = Zeroizing::new(Vec::with_capacity(length));
        }
        for text in [record.as_slice(), value.as_bytes()] {
            self.plain.extend_from_slice(&length_of(text)?);
            self.plain.extend_from_slice(text);
        }
        Ok(())
    }

    fn seal(&mut self, is_last: bool) -> io::Result<()> {
        let sealed = self.key.seal_bytes(&self.plain, &bound_to(&self.line, &self.place.to_be_bytes(), is_last));
        let sealed = sealed.map_err(io::Error::other)?;
        self.plain.zeroize();
        self.place += 1;
        self.written += 4 + sealed.len() as u64;
        if self.written > self.limit {
            return Err(io::Error::other(format!("it would be longer than {} bytes", self.limit)));
        }
        self.file.write_all(&length_of(&sealed)?)?;
        self.file.write_all(&sealed)
    }
}

fn length_of(text: &[u8]) -> io::Result<[u8; 4]> {
    u32::try_from(text.len()).map(u32::to_be_bytes).map_err(io::Error::other)
}

fn bound_to<'a>(line: &'a [u8], place: &'a [u8], is_last: bool) -> [&'a [u8]; 3] {
    [line, place, if is_last { b"last" } else { b"more" }]
}

/// A file that was found; only its line in the clear was read.
#[derive(Debug)]
pub struct OfflineFile {
    file: BufReader<File>,
    /// Bytes after the line.
    left: u64,
    line: Vec<u8>,
    header: Header,
}

impl OfflineFile {
    /// Opens the file, if it is of this environment and not longer than `limit`.
    ///
    /// # Errors
    /// [`OfflineError`].
    pub fn open(path: &Path, environment: &str, limit: u64) -> Result<Self, OfflineError> {
        #[derive(Deserialize)]
        struct Kind {
            format: String,
            version: u32,
        }
        let (file, length) = private_file::open(path)?.ok_or(OfflineError::Missing)?;
        if length > limit {
            return Err(OfflineError::TooLong(length));
        }
        let mut file = BufReader::new(file);
        let mut line = Vec::new();
        (&mut file).take(MAX_LINE).read_until(b'\n', &mut line).map_err(|error| unreadable(path, &error))?;
        let kind: Kind = serde_json::from_slice(&line).map_err(|_| OfflineError::Unknown)?;
        if kind.format != FORMAT || kind.version != VERSION || line.last() != Some(&b'\n') {
            return Err(OfflineError::Unknown);
        }
        let header: Header = serde_json::from_slice(&line).map_err(|_| OfflineError::Damaged)?;
        if header.environment != environment {
            return Err(OfflineError::Environment(header.environment));
        }
        let left = length.checked_sub(line.len() as u64).ok_or(OfflineError::Damaged)?;
        Ok(Self { file, left, line, header })
    }

    /// The file's length.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.left + self.line.len() as u64
    }

    /// The line in the clear.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The key that it is sealed under.
    ///
    /// # Errors
    /// [`OfflineError::KeyMissing`].
    pub fn key(&self, ring: &KeyRing) -> Result<MasterKey, OfflineError> {
        let id = self.header.master_key.parse().map_err(|_| OfflineError::Damaged)?;
        ring.find(id).cloned().ok_or(OfflineError::KeyMissing(id))
    }

    /// Reads it to its end, record by record with the values of secrets. The records
    /// count only if this succeeds. Keeps a core busy.
    ///
    /// # Errors
    /// [`OfflineError::Damaged`], and the errors of `take`.
    pub fn read(
        mut self,
        master: &MasterKey,
        mut take: impl FnMut(Record, &str) -> Result<(), OfflineError>,
    ) -> Result<Header, OfflineError> {
        let key = self.header.key(master);
        for place in 0u64.. {
            let sealed = self.chunk()?;
            let is_last = self.left == 0;
            let bound_to = bound_to(&self.line, &place.to_be_bytes(), is_last).map(<[u8]>::to_vec);
            let bound_to: Vec<&[u8]> = bound_to.iter().map(Vec::as_slice).collect();
            let plain = key.open_bytes(sealed, &bound_to).map_err(|_| OfflineError::Damaged)?;
            let mut rest = plain.as_slice();
            while !rest.is_empty() {
                let record = text(&mut rest)?;
                let value = text(&mut rest)?;
                take(serde_json::from_str(record).map_err(|_| OfflineError::Damaged)?, value)?;
            }
            if is_last {
                break;
            }
        }
        Ok(self.header)
    }

    /// The next chunk as it is stored. Never allocates more than the file has.
    fn chunk(&mut self) -> Result<Vec<u8>, OfflineError> {
        let mut length = [0; 4];
        self.left = self.left.checked_sub(4).ok_or(OfflineError::Damaged)?;
        self.file.read_exact(&mut length).map_err(|_| OfflineError::Damaged)?;
        let length = u32::from_be_bytes(length);
        self.left = self.left.checked_sub(u64::from(length)).ok_or(OfflineError::Damaged)?;
        let mut sealed = vec![0; usize::try_from(length).map_err(|_| OfflineError::Damaged)?];
        self.file.read_exact(&mut sealed).map_err(|_| OfflineError::Damaged)?;
        Ok(sealed)
    }
}

/// Splits one text off the beginning.
fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, OfflineError> {
    let (length, behind) = rest.split_first_chunk().ok_or(OfflineError::Damaged)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| OfflineError::Damaged)?;
    let (text, behind) = behind.split_at_checked(length).ok_or(OfflineError::Damaged)?;
    *rest = behind;
    std::str::from_utf8(text).map_err(|_| OfflineError::Damaged)
}

fn unreadable(path: &Path, error: &io::Error) -> OfflineError {
    OfflineError::File(FileError::Unreadable { path: path.to_owned(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::{
        answer::Answer,
        clock::Clock,
        policy::Ages,
        secret::{SecretValue, Version},
        tiers::memory::Entry,
    };

    const LIMIT: u64 = 64 << 20;
    const NOW: Timestamp = Timestamp::from_millis(1_000_000);

    struct Fixture {
        folder: TempDir,
        ring: KeyRing,
    }

    impl Fixture {
        fn new() -> Self {
            Self { folder: TempDir::new().unwrap(), ring: KeyRing::new(vec![MasterKey::generate().unwrap()]) }
        }

        fn path(&self) -> PathBuf {
            self.folder.path().join("offline")
        }

        fn write(&self, values: &[(&str, &str)]) -> u64 {
            let master = self.ring.first().unwrap();
            let header = Header::new("prod", master.id(), None, NOW);
            write(&self.path(), &header, master, contents(values), LIMIT).unwrap()
        }

        fn read(&self) -> Result<BTreeMap<String, String>, OfflineError> {
            self.read_by(&self.ring, "prod")
        }

        fn read_by(&self, ring: &KeyRing, environment: &str) -> Result<BTreeMap<String, String>, OfflineError> {
            let file = OfflineFile::open(&self.path(), environment, LIMIT)?;
            let key = file.key(ring)?;
            let mut held = BTreeMap::new();
            file.read(&key, |record, value| {
                if let Record::Secret(secret) = record {
                    held.insert(format!("{}/{}", secret.tenant, secret.key), value.to_owned());
                }
                Ok(())
            })?;
            Ok(held)
        }

        fn bytes(&self) -> Vec<u8> {
            std::fs::read(self.path()).unwrap()
        }

        fn put(&self, bytes: &[u8]) {
            std::fs::write(self.path(), bytes).unwrap();
        }
    }

    fn contents(values: &[(&str, &str)]) -> Contents {
        let ages = Ages {
            ttl: Duration::from_secs(1),
            negative_ttl: Duration::from_secs(1),
            refresh_after: Duration::from_secs(1),
            memory_max_stale: Duration::from_secs(60),
            database_max_stale: Duration::from_secs(60),
        };
        let tenant: crate::tenant::Tenant = "acme".parse().unwrap();
        let now = Clock::system().confirmed_now();
        let entry = |(key, value): &(&str, &str)| {
            let value = SecretValue::new((*value).to_owned());
            let answer = Answer::new(&tenant, key.parse().unwrap(), &value, Version::FIRST, NOW, "abc");
            (tenant.clone(), Arc::new(Entry::new(Some(answer), now, now, ages)))
        };
        let secrets = values.iter().map(entry).collect();
        Contents {
            gathered_at: now.moment,
            followed: 0,
            shredded: None,
            phases: Vec::new(),
            denied: vec![("globex".parse().unwrap(), NOW)],
            tokens: Vec::new(),
            secrets,
        }
    }

    /// The start of each chunk, at its length, and the end of the file.
    fn chunks(bytes: &[u8]) -> Vec<usize> {
        let mut at = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        let mut places = vec![at];
        while at < bytes.len() {
            at += 4 + u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
            places.push(at);
        }
        places
    }

    #[test]
    fn what_is_written_is_read_again_however_large_a_value_is() {
        let f = Fixture::new();
        let large = "x".repeat(3 * CHUNK);
        let many: Vec<String> = (0..50).map(|number| format!("KEY_{number}")).collect();
        let filling = "y".repeat(CHUNK / 10);
        let mut values = vec![("LARGE", large.as_str()), ("EMPTY", ""), ("TEXT", "line\n\u{1f511}\0")];
        values.extend(many.iter().map(|key| (key.as_str(), filling.as_str())));
        let length = f.write(&values);
        assert_eq!(length, f.bytes().len() as u64);
        assert!(chunks(&f.bytes()).len() > 6);
        let held = f.read().unwrap();
        assert_eq!(held.len(), values.len());
        assert!(values.iter().all(|(key, value)| held[&format!("acme/{key}")] == *value));
    }

    #[test]
    fn no_byte_of_the_file_can_be_changed() {
        let f = Fixture::new();
        f.write(&[("K", "hush")]);
        let whole = f.bytes();
        for place in 0..whole.len() {
            let mut changed = whole.clone();
            changed[place] ^= 1;
            f.put(&changed);
            assert!(f.read().is_err(), "byte {place}");
        }
        f.put(&whole);
        assert!(f.read().is_ok());
    }

    #[test]
    fn a_file_that_was_cut_or_grew_is_refused_wherever_that_was() {
        let f = Fixture::new();
        let filling = "y".repeat(CHUNK);
        f.write(&[("A", &filling), ("B", &filling), ("C", "c")]);
        let whole = f.bytes();
        let mut lengths = chunks(&whole);
        lengths.pop();
        lengths.extend([0, 1, 17, whole.len() - 1]);
        for length in lengths {
            f.put(&whole[..length]);
            assert!(f.read().is_err(), "cut at {length} of {}", whole.len());
        }
        f.put(&[whole.as_slice(), b"\0\0\0\0"].concat());
        assert!(matches!(f.read(), Err(OfflineError::Damaged)));
    }

    #[test]
    fn no_chunk_can_be_left_out_moved_doubled_or_taken_from_another_file() {
        let f = Fixture::new();
        let filling = "y".repeat(CHUNK);
        let values = [("A", filling.as_str()), ("B", filling.as_str()), ("C", filling.as_str())];
        f.write(&values);
        let other = f.bytes();
        f.write(&values);
        let whole = f.bytes();
        let places = chunks(&whole);
        assert_eq!(chunks(&other), places, "of two files that are alike");
        let line = &whole[..places[0]];
        let chunk = |number: usize| &whole[places[number]..places[number + 1]];
        let foreign = |number: usize| &other[places[number]..places[number + 1]];
        let last = places.len() - 2;
        assert!(last >= 2);
        let put_together = |chunks: &[&[u8]]| {
            f.put(&[&[line], chunks].concat().concat());
            f.read()
        };
        let all: Vec<&[u8]> = (0..=last).map(chunk).collect();
        assert!(put_together(&all).is_ok());
        for number in 0..=last {
            let mut without = all.clone();
            without.remove(number);
            let mut doubled = all.clone();
            doubled.insert(number, chunk(number));
            let mut swapped = all.clone();
            swapped.swap(number, (number + 1) % all.len());
            let mut mixed = all.clone();
            mixed[number] = foreign(number);
            for chunks in [without, doubled, swapped, mixed] {
                assert!(matches!(put_together(&chunks), Err(OfflineError::Damaged)), "{number}");
            }
        }
        // Nor the line of one file before the chunks of the other.
        f.put(&[&other[..places[0]], &whole[places[0]..]].concat());
        assert!(matches!(f.read(), Err(OfflineError::Damaged)));
    }

    #[test]
    fn a_file_of_another_environment_or_under_another_key_says_so() {
        let f = Fixture::new();
        assert!(matches!(f.read(), Err(OfflineError::Missing)));
        f.write(&[("K", "hush")]);
        assert!(matches!(f.read_by(&f.ring, "dev"), Err(OfflineError::Environment(of)) if of == "prod"));
        let other = Fixture::new().ring;
        assert!(
            matches!(f.read_by(&other, "prod"), Err(OfflineError::KeyMissing(id)) if id == f.ring.first().unwrap().id())
        );
        let text = String::from_utf8_lossy(&f.bytes()).replace("\"prod\"", "\"dev\"");
        assert!(text.starts_with("{\"format\":\"secretier last good\""));
        // The environment cannot be written over.
        let line = f.bytes().iter().position(|byte| *byte == b'\n').unwrap();
        let renamed = String::from_utf8(f.bytes()[..line].to_vec()).unwrap().replace("prod", "test");
        f.put(&[renamed.as_bytes(), &f.bytes()[line..]].concat());
        assert!(matches!(f.read_by(&f.ring, "test"), Err(OfflineError::Damaged)));
        f.put(b"{\"format\":\"secretier last good\",\"version\":2}\n");
        assert!(matches!(f.read(), Err(OfflineError::Unknown)));
    }

    #[test]
    fn what_is_too_long_is_neither_written_nor_read() {
        let f = Fixture::new();
        f.write(&[("K", "hush")]);
        let before = f.bytes();
        let master = f.ring.first().unwrap();
        let header = Header::new("prod", master.id(), None, NOW);
        let refused = write(&f.path(), &header, master, contents(&[("K", &"y".repeat(2 * CHUNK))]), CHUNK as u64);
        assert!(matches!(refused, Err(FileError::Unwritable { .. })));
        assert_eq!(f.bytes(), before, "the file of before stays");
        assert_eq!(std::fs::read_dir(f.folder.path()).unwrap().count(), 1, "nothing is left beside it");
        let found = OfflineFile::open(&f.path(), "prod", 100);
        assert!(matches!(found, Err(OfflineError::TooLong(length)) if length == before.len() as u64));
    }

    proptest! {
        #[test]
        fn whatever_stands_in_a_file_it_is_refused_and_nothing_else_happens(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let f = Fixture::new();
            f.write(&[]);
            let line = f.bytes().iter().position(|byte| *byte == b'\n').unwrap() + 1;
            let behind_the_line = [&f.bytes()[..line], bytes.as_slice()].concat();
            for bytes in [bytes.as_slice(), &behind_the_line] {
                f.put(bytes);
                prop_assert!(f.read().is_err());
            }
        }
    }
}
