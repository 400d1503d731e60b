//! The files that an audit's file was rotated into: by this program, or by another one, as
//! logrotate is. They are found by their names, ordered by what they contain, and may be
//! compressed.

use std::{
    cmp::Ordering,
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use serde::Deserialize;

/// No record is longer: names, agents and fields have bounds of a few KiB.
const LONGEST_LINE: u64 = 1 << 20;

/// How many times its length a compressed file may unpack to. Records hold hashes and signatures, which do
/// not shrink: one of ours is five times its compressed length.
const MOST_UNPACKED: u64 = 100;

/// How much of a file is read to find its place among the others.
const HEAD: u64 = 1 << 20;

const COMPRESSED: &str = ".gz";

/// The place of a record.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Place {
    pub(super) chain: String,
    pub(super) seq: i64,
    pub(super) hash: String,
    at: String,
}

/// The path of the file that was rotated away so many times.
pub(super) fn numbered(path: &Path, number: usize) -> PathBuf {
    with_ending(path, &format!(".{number}"))
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// The same files as they are, and compressed.
fn variants(path: &Path) -> [PathBuf; 2] {
    [path.to_owned(), with_ending(path, COMPRESSED)]
}

/// `audit.jsonl` becomes `audit.jsonl.1`, that `.2`, and so on, compressed ones too; the oldest is
/// removed. A gap that a crash left is closed.
pub(super) fn rotate(path: &Path, kept: usize) -> io::Result<()> {
    let of = |number| variants(&numbered(path, number));
    let is_free = |number: &usize| !of(*number).iter().any(|path| path.exists());
    let last = (1..kept).find(is_free).unwrap_or(kept);
    if last == kept && kept > 0 {
        for oldest in of(last) {
            gone(fs::remove_file(oldest))?;
        }
    }
    for number in (1..last).rev() {
        for (from, to) in of(number).into_iter().zip(of(number + 1)) {
            gone(fs::rename(from, to))?;
        }
    }
    // Somebody may have removed it. A verification finds that; this process must go on.
    gone(if kept == 0 { fs::remove_file(path) } else { fs::rename(path, numbered(path, 1)) })
}

/// A file that is not there needs nothing.
fn gone(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Cuts the file to this length: the bytes after it were never acknowledged.
pub(super) fn cut(path: &Path, length: u64) -> io::Result<()> {
    let file = match OpenOptions::new().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    if file.metadata()?.len() > length { file.set_len(length) } else { Ok(()) }
}

/// The same for a file that was rotated away. What is compressed is no longer than it was acknowledged.
pub(super) fn cut_rotated(path: &Path, length: u64) -> io::Result<()> {
    if is_compressed(path) { Ok(()) } else { cut(path, length) }
}

/// The file that holds the first `length` bytes of what was in `path`, where somebody has rotated it:
/// its last record there is one that `is_end` knows. A compressed file is known by its length.
pub(super) fn taken_from(path: &Path, length: u64, is_end: impl Fn(&Place) -> bool) -> io::Result<Option<PathBuf>> {
    for rotated in rotated_from(path)? {
        let is_it = match is_compressed(&rotated) {
            true => unpacked_length(&rotated)? == Some(length as u32),
            false => last_place(&rotated, length)?.is_some_and(|place| is_end(&place)),
        };
        if is_it {
            return Ok(Some(rotated));
        }
    }
    Ok(None)
}

fn is_compressed(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(COMPRESSED.as_bytes())
}

/// The length of what a gzip file of one part unpacks to, modulo 2³², as it says itself (RFC 1952).
fn unpacked_length(path: &Path) -> io::Result<Option<u32>> {
    let Some(mut file) = opened_if_there(path)? else { return Ok(None) };
    let mut length = [0; 4];
    if file.metadata()?.len() < 18 {
        return Ok(None);
    }
    file.seek(SeekFrom::End(-4))?;
    file.read_exact(&mut length)?;
    Ok(Some(u32::from_le_bytes(length)))
}

/// The place of the record that ends exactly at this length.
fn last_place(path: &Path, length: u64) -> io::Result<Option<Place>> {
    let Some(mut file) = opened_if_there(path)? else { return Ok(None) };
    if length == 0 || file.metadata()?.len() < length {
        return Ok(None);
    }
    let start = length.saturating_sub(LONGEST_LINE);
    file.seek(SeekFrom::Start(start))?;
    let mut text = Vec::new();
    file.take(length - start).read_to_end(&mut text)?;
    let Some(lines) = text.strip_suffix(b"\n") else { return Ok(None) };
    let last = lines.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok(serde_json::from_slice(last).ok())
}

/// Another program may take a file away between the look at the folder and this.
fn opened_if_there(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        file => file.map(Some),
    }
}

/// The files that were rotated away from this one, in the order of their names: dated ones from the
/// first day on, then numbered ones from the highest number down.
pub(super) fn rotated_from(path: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if let Some(order) = entry.file_name().to_str().and_then(|other| order_of(other.strip_prefix(&name)?)) {
            found.push((order, path.with_file_name(entry.file_name())));
        }
    }
    found.sort_unstable();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Where the file with this ending stands among the others; `None` for an ending that no rotation
/// makes. `.3`, and `-20261130` or any other date of digits, `T`, `-` and `_`, which logrotate's
/// `dateformat` can make; each may be followed by `.gz`, and a date by a number.
fn order_of(ending: &str) -> Option<(bool, String, std::cmp::Reverse<usize>)> {
    let ending = ending.strip_suffix(COMPRESSED).unwrap_or(ending);
    let number = |text: &str| text.parse::<usize>().ok().filter(|number| *number > 0 && !text.starts_with('+'));
    if let Some(text) = ending.strip_prefix('.') {
        return Some((true, String::new(), std::cmp::Reverse(number(text)?)));
    }
    let date = ending.strip_prefix('-')?;
    let (date, again) = match date.split_once('.') {
        Some((date, again)) => (date, number(again)?),
        None => (date, 0),
    };
    let is_date = date.len() >= 6
        && date.starts_with(|first: char| first.is_ascii_digit())
        && date.chars().all(|letter| letter.is_ascii_digit() || matches!(letter, 'T' | '-' | '_'));
    is_date.then(|| (false, date.to_owned(), std::cmp::Reverse(again)))
}

/// A file that is being verified.
pub(super) struct Part {
    pub(super) path: PathBuf,
    file: File,
    /// How much of it is read.
    length: u64,
    /// The first record of each chain near its beginning, and the first of all.
    first: BTreeMap<String, i64>,
    begins: Option<Place>,
}

impl Part {
    /// Opens a file, of which so many bytes are to be read.
    pub(super) fn open(path: PathBuf, length: u64) -> io::Result<Self> {
        let file = File::open(&path)?;
        Ok(Self { path, file, length, first: BTreeMap::new(), begins: None })
    }

    /// Finds out where it belongs. A file that cannot be unpacked has no place: where it is needed,
    /// reading it tells why.
    fn look(&mut self) -> io::Result<()> {
        let mut lines = self.lines(HEAD.min(self.length))?;
        loop {
            let line = match lines.next_line() {
                Ok(Some(line)) => line,
                Ok(None) => return Ok(()),
                Err(_) if is_compressed(&self.path) => return Ok(()),
                Err(error) => return Err(error),
            };
            if let Ok(place) = serde_json::from_slice::<Place>(line) {
                self.first.entry(place.chain.clone()).or_insert(place.seq);
                self.begins.get_or_insert(place);
            }
        }
    }

    /// Its lines, from the first on.
    pub(super) fn read(&self) -> io::Result<LinesOf> {
        self.lines(self.length)
    }

    fn lines(&self, length: u64) -> io::Result<LinesOf> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(0))?;
        let packed = file.metadata()?.len();
        let source: Box<dyn Read + Send> = match is_compressed(&self.path) {
            true => {
                let most = packed.saturating_mul(MOST_UNPACKED).saturating_add(1 << 20);
                Box::new(Bounded { source: MultiGzDecoder::new(BufReader::new(file)), left: most }.take(length))
            }
            false => Box::new(file.take(length)),
        };
        Ok(LinesOf { source: BufReader::with_capacity(64 << 10, source), line: Vec::new() })
    }

    /// Whether this one is the older of two: by a chain that both have, else by the time of the first
    /// record. `None` where nothing tells.
    fn order(&self, other: &Self) -> Option<Ordering> {
        let both = self.first.iter().find_map(|(chain, seq)| Some(seq.cmp(other.first.get(chain)?)));
        both.or_else(|| Some(self.begins.as_ref()?.at.cmp(&other.begins.as_ref()?.at)))
    }

    /// Whether this is the compressed copy of the other: logrotate has both for a moment.
    fn is_copy_of(&self, other: &Self) -> bool {
        self.path == with_ending(&other.path, COMPRESSED) && (self.begins.is_none() || self.begins == other.begins)
    }
}

/// Puts files into the order in which they were written, and leaves out compressed copies of
/// others. Where their records do not tell, they stay as they are.
///
/// # Errors
/// A file that cannot be read, with its path.
pub(super) fn in_order(parts: Vec<Part>) -> Result<Vec<Part>, (PathBuf, io::Error)> {
    let mut ordered: Vec<Part> = Vec::new();
    for mut part in parts {
        if let Err(error) = part.look() {
            return Err((part.path, error));
        }
        if ordered.iter().any(|other| part.is_copy_of(other)) {
            continue;
        }
        ordered.retain(|other| !other.is_copy_of(&part));
        // By hand: an order that somebody has tampered with is none, at which std's sort may panic.
        let is_newer = |other: &Part| part.order(other) == Some(Ordering::Less);
        let at = ordered.iter().position(is_newer).unwrap_or(ordered.len());
        ordered.insert(at, part);
    }
    Ok(ordered)
}

/// Lines of a file, one at a time.
pub(super) struct LinesOf {
    source: BufReader<Box<dyn Read + Send>>,
    line: Vec<u8>,
}

impl LinesOf {
    /// The next line without its end; empty where it is longer than any record.
    pub(super) fn next_line(&mut self) -> io::Result<Option<&[u8]>> {
        self.line.clear();
        let mut is_long = false;
        loop {
            let read = (&mut self.source).take(LONGEST_LINE).read_until(b'\n', &mut self.line)?;
            if self.line.last() == Some(&b'\n') {
                self.line.pop();
                break;
            }
            if read == 0 {
                if self.line.is_empty() && !is_long {
                    return Ok(None);
                }
                break;
            }
            if read as u64 == LONGEST_LINE {
                is_long = true;
                self.line.clear();
            }
        }
        if is_long {
            self.line.clear();
        }
        Ok(Some(&self.line))
    }
}

/// The unpacked content of a file, up to a bound.
struct Bounded<R> {
    source: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(into)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it unpacks to more than {MOST_UNPACKED} times its length"),
            )
        })?;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn names_that_rotations_make_are_found_in_their_order_and_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let expected = [
            "-2026-12-01T10",
            "-20261128.gz",
            "-20261129.2",
            "-20261129.1.gz",
            "-20261129",
            "-20261130-1764500000",
            ".10.gz",
            ".2",
            ".1",
        ];
        for ending in expected {
            fs::write(with_ending(&path, ending), "").unwrap();
        }
        for other in
            ["", ".ends", ".0", ".+1", ".1.gz.tmp", ".1.xz", "-old", "-123", "x.1", "-20261130.ends", ".gz", ".1.1"]
        {
            fs::write(with_ending(&path, other), "").unwrap();
        }
        let found = rotated_from(&path).unwrap();
        assert_eq!(found, expected.map(|ending| with_ending(&path, ending)));
    }

    #[test]
    fn a_file_that_unpacks_to_far_more_than_its_length_is_not_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl.1.gz");
        let bomb = gzip(&vec![b'\n'; 64 << 20]);
        assert!(bomb.len() < 128 << 10);
        fs::write(&path, bomb).unwrap();
        let mut lines = Part::open(path, u64::MAX).unwrap().read().unwrap();
        let mut read = 0_u64;
        let error = loop {
            match lines.next_line() {
                Ok(line) => assert!(line.is_some(), "it ended"),
                Err(error) => break error,
            }
            read += 1;
        };
        assert!(error.to_string().contains("100 times"), "{error}");
        assert!(read < 16 << 20, "{read}");
    }

    #[test]
    fn a_line_that_is_longer_than_any_record_takes_no_more_memory_than_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let long = "x".repeat(3 << 20);
        for text in [format!("a\n{long}\nb\n"), format!("a\n{}\nb", &long[..LONGEST_LINE as usize])] {
            fs::write(&path, text).unwrap();
            let mut lines = Part::open(path.clone(), u64::MAX).unwrap().read().unwrap();
            let mut next = || lines.next_line().unwrap().map(|line| String::from_utf8_lossy(line).into_owned());
            assert_eq!(
                (next(), next(), next(), next()),
                (Some("a".into()), Some(String::new()), Some("b".into()), None)
            );
            assert!(lines.line.capacity() <= 4 << 20);
        }
    }
}
