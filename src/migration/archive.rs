//! Keeps folders that were removed from Infisical, sealed in a file, one line a tenant: each
//! is on the disk before its folder is removed, and a crash loses no earlier one.
//!
//! A line is JSON. It seals the folder as JSON, under a key derived from the master
//! key that it names, bound to environment, tenant and time.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    clock::Timestamp,
    sealing::{KeyPurpose, KeyRing, MasterKeyId, OpenError, SealError},
    secret::{self, SecretKey, SecretValue},
    tenant::Tenant,
    tiers::upstream::Snapshot,
};

const VERSION: u64 = 1;

/// An archive that folders are added to.
pub struct Archive {
    file: File,
    path: PathBuf,
    environment: String,
    held: HashMap<String, Held>,
}

/// The archive's latest entry of a tenant.
#[derive(Debug, Clone)]
pub struct Held {
    /// When it was archived last.
    pub archived_at: Timestamp,
    /// Secrets that its folder had then.
    pub secrets: usize,
}

/// One folder, sealed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    version: u64,
    environment: String,
    tenant: String,
    archived_at: String,
    secrets: usize,
    master_key: String,
    sealed: String,
}

/// A secret of a folder: name and value.
#[derive(Deserialize)]
struct Sealed(String, #[serde(deserialize_with = "secret::deserialize_value")] SecretValue);

/// A folder out of an archive.
pub struct Archived {
    /// The tenant that it belonged to.
    pub tenant: Tenant,
    /// When it was archived.
    pub archived_at: Timestamp,
    /// Its secrets.
    pub secrets: Vec<(SecretKey, SecretValue)>,
}

/// Why an archive cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file.
    #[error("{path}", path = .path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process is writing to it.
    #[error("{} is being written by another process", .0.display())]
    Busy(PathBuf),
    /// A line is not one of an archive.
    #[error("{path}, line {number}: {reason}", path = .path.display())]
    Malformed {
        /// The file's path.
        path: PathBuf,
        /// The line, from 1.
        number: usize,
        /// The fault in the line.
        reason: &'static str,
    },
    /// A line is of another environment.
    #[error("{path}, line {number}: it is of environment {found:?}", path = .path.display())]
    Environment {
        /// The file's path.
        path: PathBuf,
        /// The line, from 1.
        number: usize,
        /// Its environment.
        found: String,
    },
    /// The master key is in no source.
    #[error("the master key {0} that it is sealed under is in no source; put it back into one of keys.sources")]
    NoKey(String),
    /// It does not open.
    #[error("the folder of {tenant} does not open: it was changed")]
    Refused {
        /// The tenant that it belongs to.
        tenant: Tenant,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// It cannot be sealed.
    #[error("the folder cannot be sealed")]
    Seal(#[from] SealError),
}

impl Archive {
    /// Opens a file to add folders to, made where it is missing, readable by its owner only.
    ///
    /// # Errors
    /// [`ArchiveError`]; also where the file is not an archive, or is one of another environment,
    /// or where anything that is added could not be read back.
    pub fn append_to(path: &Path, environment: &str) -> Result<Self, ArchiveError> {
        let failed = |source| ArchiveError::File { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(ArchiveError::Busy(path.to_owned())),
            Err(std::fs::TryLockError::Error(error)) => return Err(failed(error)),
        }
        let mut held = HashMap::new();
        for (index, line) in BufReader::new(&file).lines().enumerate() {
            let Some(line) = Line::read(&line.map_err(failed)?, path, index + 1, environment)? else { continue };
            let archived_at = line.archived_at(path, index + 1)?;
            held.insert(line.tenant, Held { archived_at, secrets: line.secrets });
        }
        // A crash may have left half a line; the next entry begins on a line of its own.
        if !ends_a_line(&mut file).map_err(failed)? {
            file.write_all(b"\n").map_err(failed)?;
        }
        // After a loss of power, the file's name must be there as well as its content.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
        Ok(Self { file, path: path.to_owned(), environment: environment.to_owned(), held })
    }

    /// The archive's latest entry of a tenant.
    #[must_use]
    pub fn find(&self, tenant: &Tenant) -> Option<&Held> {
        self.held.get(tenant.as_str())
    }

    /// Adds a folder; it is on the disk when this returns.
    ///
    /// # Errors
    /// [`ArchiveError`].
    pub fn add(
        &mut self,
        ring: &KeyRing,
        tenant: &Tenant,
        snapshot: &Snapshot,
        at: Timestamp,
    ) -> Result<(), ArchiveError> {
        let key = ring.first().ok_or(SealError::NoMasterKey)?.derive(KeyPurpose::Archive);
        let secrets: Vec<(&str, &str)> =
            snapshot.secrets.iter().map(|secret| (secret.key.as_str(), secret.written().expose())).collect();
        // Room for JSON's escapes, so that the buffer does not grow and leave a copy behind.
        let room = secrets.iter().map(|(key, value)| key.len() + 2 * value.len() + 16).sum();
        let mut text = Zeroizing::new(Vec::with_capacity(room));
        serde_json::to_writer(&mut *text, &secrets).map_err(|error| self.failed(error.into()))?;
        let text = std::str::from_utf8(&text).map_err(|error| self.failed(io::Error::other(error)))?;
        let archived_at = at.to_rfc3339();
        let line = Line {
            version: VERSION,
            environment: self.environment.clone(),
            tenant: tenant.as_str().to_owned(),
            secrets: secrets.len(),
            master_key: key.master_key().to_string(),
            sealed: key.seal(text, &bound_to(&self.environment, tenant.as_str(), &archived_at))?,
            archived_at,
        };
        let mut line = serde_json::to_vec(&line).map_err(|error| self.failed(error.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.sync_all()).map_err(|error| self.failed(error))
    }

    fn failed(&self, source: io::Error) -> ArchiveError {
        ArchiveError::File { path: self.path.clone(), source }
    }
}

/// Reads an archive; for a tenant that was archived more than once the last line counts. A line
/// that cannot be read does not prevent the others from being read.
///
/// # Errors
/// [`ArchiveError`], where the file cannot be read.
pub fn read(
    path: &Path,
    environment: &str,
    ring: &KeyRing,
    is_wanted: impl Fn(&Tenant) -> bool,
) -> Result<Vec<Result<Archived, ArchiveError>>, ArchiveError> {
    let failed = |source| ArchiveError::File { path: path.to_owned(), source };
    let mut found: Vec<Result<Archived, ArchiveError>> = Vec::new();
    let lines = BufReader::new(File::open(path).map_err(failed)?).lines();
    for (index, line) in lines.enumerate() {
        match read_line(&line.map_err(failed)?, path, index + 1, environment, ring, &is_wanted) {
            Ok(None) => {}
            Ok(Some(archived)) => {
                found.retain(|other| other.as_ref().map_or(true, |other| other.tenant != archived.tenant));
                found.push(Ok(archived));
            }
            Err(error) => found.push(Err(error)),
        }
    }
    Ok(found)
}

/// Reads one line of a file; `None` where it is not wanted, is empty, or was cut off.
fn read_line(
    line: &str,
    path: &Path,
    number: usize,
    environment: &str,
    ring: &KeyRing,
    is_wanted: &impl Fn(&Tenant) -> bool,
) -> Result<Option<Archived>, ArchiveError> {
    let malformed = |number, reason| ArchiveError::Malformed { path: path.to_owned(), number, reason };
    let Some(line) = Line::read(line, path, number, environment)? else { return Ok(None) };
    let tenant: Tenant = line.tenant.parse().map_err(|_| malformed(number, "its tenant is none"))?;
    if !is_wanted(&tenant) {
        return Ok(None);
    }
    let archived_at = line.archived_at(path, number)?;
    let id = line.master_key.parse::<MasterKeyId>().ok();
    let key = id.and_then(|id| ring.find(id)).ok_or_else(|| ArchiveError::NoKey(line.master_key.clone()))?;
    let bound_to = bound_to(&line.environment, &line.tenant, &line.archived_at);
    let opened = key.derive(KeyPurpose::Archive).open(&line.sealed, &bound_to);
    let opened = opened.map_err(|source| ArchiveError::Refused { tenant: tenant.clone(), source })?;
    let secrets: Vec<Sealed> =
        serde_json::from_str(&opened).map_err(|_| malformed(number, "what it seals is no folder"))?;
    let secrets = secrets.into_iter().map(|Sealed(key, value)| {
        let key = key.parse().map_err(|_| malformed(number, "a secret's name is none"))?;
        Ok((key, value))
    });
    let secrets = secrets.collect::<Result<_, ArchiveError>>()?;
    Ok(Some(Archived { tenant, archived_at, secrets }))
}

impl Line {
    /// Reads one line of a file; `None` where it is empty, or was cut off.
    fn read(text: &str, path: &Path, number: usize, environment: &str) -> Result<Option<Self>, ArchiveError> {
        let malformed = |reason| ArchiveError::Malformed { path: path.to_owned(), number, reason };
        let line: Self = match serde_json::from_str(text) {
            Ok(line) => line,
            // A line that a crash cut off was never acted on: its folder is still there.
            Err(error) if error.is_eof() => return Ok(None),
            Err(_) => return Err(malformed("it is no line of an archive")),
        };
        if line.version != VERSION {
            return Err(malformed("it was written by a later version of secretier"));
        }
        if line.environment != environment {
            return Err(ArchiveError::Environment { path: path.to_owned(), number, found: line.environment });
        }
        Ok(Some(line))
    }

    fn archived_at(&self, path: &Path, number: usize) -> Result<Timestamp, ArchiveError> {
        let malformed = || ArchiveError::Malformed { path: path.to_owned(), number, reason: "its time is none" };
        Timestamp::from_rfc3339(&self.archived_at).ok_or_else(malformed)
    }
}

fn bound_to<'a>(environment: &'a str, tenant: &'a str, archived_at: &'a str) -> [&'a [u8]; 3] {
    [environment.as_bytes(), tenant.as_bytes(), archived_at.as_bytes()]
}

fn ends_a_line(file: &mut File) -> io::Result<bool> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    if file.metadata()?.len() == 0 {
        return Ok(true);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}
