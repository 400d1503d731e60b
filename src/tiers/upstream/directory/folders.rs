//! Reads the folders. Everything here blocks.
//!
//! A read returns the content of a folder at one moment. Files are not read all at once, so before
//! and after the read it is checked whether they are the same, by what the file system reports of
//! each: its inode, size, and the times of its content and its entry. If they differ, the folder is
//! read again.
//! - *A file is written in place, and read while it is half written*: a folder that was changed
//!   within [`QUIET`] is not read before that time has passed. A program that writes a file for
//!   longer than that must write another file and rename it, as the documentation says.
//! - *A file changes twice within one tick of the file system's clock*: the two states cannot be
//!   told apart. So a folder that has changed within [`SETTLED`] gets no validator, and the next
//!   read reads all of it.
//! - *Kubernetes puts another version in place*: the files of one version are in one folder, which
//!   the link `..data` leads to. The link is followed once for a read.

use std::{
    ffi::OsString,
    fs::{self, File, Metadata},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::{
    clock::Timestamp,
    flaws::Unusable,
    secret::{LARGEST_VALUE, SecretKey, SecretValue, Version},
    tenant::Tenant,
    tiers::upstream::{Cause, Fetched, Folders, Oddity, OddityKind, Snapshot, UpstreamError, UpstreamSecret},
};

/// How long a folder must be unchanged before it is read.
const QUIET: Duration = Duration::from_millis(20);

/// How long a folder must be unchanged before it gets a validator.
const SETTLED: Duration = Duration::from_secs(2);

/// How often a folder is read that changes all the time.
const TRIES: usize = 10;

/// The limits of a folder, in bytes and in files.
const LARGEST_FOLDER: u64 = 64 << 20;
const MOST_FILES: usize = 100_000;

/// The directory that holds the tenants' folders.
pub(super) struct Root {
    pub(super) path: PathBuf,
    pub(super) writable: bool,
}

/// A tenant's folder.
pub(super) struct Place {
    /// The folder itself.
    pub(super) folder: PathBuf,
    /// The folder of its files: itself, or the target of its link `..data`.
    pub(super) files: PathBuf,
}

impl Root {
    /// The directory, with its own links resolved.
    pub(super) fn real(&self) -> Result<PathBuf, UpstreamError> {
        // If this is refused, that says nothing about a single tenant.
        fs::canonicalize(&self.path).map_err(|error| super::unreachable(format!("directory.path: {error}")))
    }

    /// Whether the directory itself can be read.
    pub(super) fn can_be_read(&self) -> bool {
        self.real().is_ok_and(|root| fs::read_dir(root).is_ok())
    }

    pub(super) fn tenants(&self) -> Result<Folders, UpstreamError> {
        let root = self.real()?;
        let entries = fs::read_dir(&root)
            .and_then(Iterator::collect::<io::Result<Vec<_>>>)
            .map_err(|error| super::unreachable(format!("directory.path: {error}")))?;
        let mut listed = Folders::default();
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || !may_be_folder(&entry) {
                continue;
            }
            match name.parse() {
                Ok(tenant) => listed.tenants.push(tenant),
                Err(_) => listed.unusable.push(name),
            }
        }
        if listed.tenants.is_empty() && !self.writable {
            // The directory's content may not be mounted: that must not prove every tenant absent.
            let hint = "directory.path holds no folder of a tenant; see whether what it should hold is mounted";
            return Err(UpstreamError::Rejected { status: 404, cause: Cause::Directory, hint });
        }
        listed.tenants.sort_unstable();
        listed.unusable.sort_unstable();
        Ok(listed)
    }

    /// The place of a tenant's files; `None` where it has no folder.
    pub(super) fn place(&self, tenant: &Tenant) -> Result<Option<Place>, UpstreamError> {
        let root = self.real()?;
        // A name with a slash before it would lead away from the root.
        if tenant.shared_folder().is_some() {
            return Ok(None);
        }
        let within = |path: PathBuf, above: &Path| {
            let hint = "a link in the tenant's folder, or to it, leads outside: it may lead within directory.path only";
            let is_within = path.starts_with(above) && path != above;
            if is_within {
                Ok(path)
            } else {
                Err(UpstreamError::Rejected { status: 403, cause: Cause::Directory, hint })
            }
        };
        let folder = match fs::canonicalize(root.join(tenant.as_str())) {
            Ok(folder) => within(folder, &root)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(&error)),
        };
        if !fs::metadata(&folder).map_err(|error| failed(&error))?.is_dir() {
            return Ok(None);
        }
        let files = match fs::canonicalize(folder.join("..data")) {
            Ok(files) => within(files, &folder)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => folder.clone(),
            Err(error) => return Err(failed(&error)),
        };
        Ok(Some(Place { folder, files }))
    }

    pub(super) fn read(&self, tenant: &Tenant, known: Option<&str>) -> Result<Fetched, UpstreamError> {
        for _ in 0..TRIES {
            let Some(place) = self.place(tenant)? else { return Ok(Fetched::Changed(Snapshot::default())) };
            match read_once(&place, known) {
                // A version that is being removed by now may have been read in part.
                Ok(Some(fetched)) if self.place(tenant)?.is_some_and(|now| now.files == place.files) => {
                    return Ok(fetched);
                }
                // Another version was put in its place.
                Ok(_) | Err(Failure::Io(io::ErrorKind::NotFound, _)) => thread::sleep(QUIET),
                Err(Failure::Io(_, error)) => return Err(error),
                Err(Failure::TooLarge) => {
                    return Err(UpstreamError::Malformed("a folder holds more than 64 MiB, or than 100,000 files"));
                }
            }
        }
        Err(UpstreamError::Malformed("the tenant's folder changes all the while it is read"))
    }

    /// When something in a tenant's folder was last changed.
    pub(super) fn changed_at(&self, tenant: &Tenant) -> Option<Timestamp> {
        let place = self.place(tenant).ok()??;
        let mut changed = State::of(&place).ok()?.changed_at;
        // A link that leads elsewhere now has changed too, however old its target is.
        for link in [self.path.join(tenant.as_str()), place.folder.join("..data")] {
            changed = changed.max(fs::symlink_metadata(link).map_or(UNIX_EPOCH, |found| changed_at(&found)));
        }
        let since = changed.duration_since(UNIX_EPOCH).ok()?;
        Some(Timestamp::from_millis(i64::try_from(since.as_millis()).ok()?))
    }
}

/// Whether an entry of the directory may be a tenant's folder. One that cannot be looked at may: a
/// mount that fails proves nothing absent, and the read of the folder tells what is wrong.
fn may_be_folder(entry: &fs::DirEntry) -> bool {
    match entry.file_type() {
        // A link that leads nowhere is no folder.
        Ok(found) if found.is_symlink() => match fs::metadata(entry.path()) {
            Ok(found) => found.is_dir(),
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        },
        Ok(found) => found.is_dir(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

impl Place {
    /// Whether so many bytes more, in one more file, may be put here.
    pub(super) fn has_room_for(&self, bytes: u64) -> bool {
        let has_room = |state: State| state.bytes() + bytes <= LARGEST_FOLDER && state.files.len() < MOST_FILES;
        State::of(self).is_ok_and(has_room)
    }
}

/// The upstream error for an error of the file system.
pub(super) fn failed(error: &io::Error) -> UpstreamError {
    match error.kind() {
        io::ErrorKind::PermissionDenied => UpstreamError::Denied,
        _ => super::unreachable(error.to_string()),
    }
}

enum Failure {
    Io(io::ErrorKind, UpstreamError),
    TooLarge,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error.kind(), failed(&error))
    }
}

/// The files of a folder, as the file system lists them.
#[derive(PartialEq, Eq)]
struct State {
    files: Vec<Listed>,
    etag: String,
    changed_at: SystemTime,
}

#[derive(PartialEq, Eq)]
struct Listed {
    name: OsString,
    /// Whether it is a file whose content belongs to the tenant.
    is_within: bool,
    size: u64,
}

impl State {
    fn of(place: &Place) -> Result<Self, Failure> {
        let mut changed_at = changed_at(&fs::metadata(&place.files)?);
        let mut files = Vec::new();
        let mut stamps = Vec::new();
        for entry in fs::read_dir(&place.files)? {
            let entry = entry?;
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let (path, is_link) = (entry.path(), entry.file_type()?.is_symlink());
            let found = match fs::metadata(&path) {
                Ok(found) if found.is_dir() => continue,
                Ok(found) => found,
                // A link that leads nowhere, or to a place that we may not read.
                Err(_) if is_link => fs::symlink_metadata(&path)?,
                Err(error) => return Err(error.into()),
            };
            let is_within = found.is_file()
                && (!is_link || fs::canonicalize(&path).is_ok_and(|real| real.starts_with(&place.folder)));
            changed_at = changed_at.max(self::changed_at(&found));
            stamps.push((name.clone(), stamp(&found, is_within)));
            files.push(Listed { name, is_within, size: found.size() });
            if files.len() > MOST_FILES {
                return Err(Failure::TooLarge);
            }
        }
        files.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        stamps.sort_unstable();
        let mut digest = Sha256::new();
        digest.update(place.files.as_os_str().as_encoded_bytes());
        for (name, stamp) in stamps {
            digest.update(name.as_encoded_bytes());
            digest.update([0]);
            digest.update(stamp);
        }
        Ok(Self { files, etag: hex::encode(digest.finalize()), changed_at })
    }

    /// The bytes of its values.
    fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size.min(LARGEST_VALUE)).sum()
    }

    /// Whether nothing has changed for so long. `None` for a change in the future: its time is
    /// wrong.
    fn rests_for(&self, time: Duration) -> Option<bool> {
        SystemTime::now().duration_since(self.changed_at).ok().map(|age| age >= time)
    }
}

/// Bytes that change whenever the file does.
fn stamp(found: &Metadata, is_within: bool) -> [u8; 57] {
    let numbers = [
        found.dev(),
        found.ino(),
        found.size(),
        found.mtime().cast_unsigned(),
        found.mtime_nsec().cast_unsigned(),
        found.ctime().cast_unsigned(),
        found.ctime_nsec().cast_unsigned(),
    ];
    let mut stamp = [u8::from(is_within); 57];
    for (place, number) in stamp[1..].chunks_exact_mut(8).zip(numbers) {
        place.copy_from_slice(&number.to_be_bytes());
    }
    stamp
}

/// When a file was changed, or put where it is: by the time that nobody can set.
fn changed_at(found: &Metadata) -> SystemTime {
    let seconds = Duration::from_secs(u64::try_from(found.ctime()).unwrap_or(0));
    UNIX_EPOCH + seconds + Duration::from_nanos(u64::try_from(found.ctime_nsec()).unwrap_or(0))
}

/// The folder's content; `None` where it has changed meanwhile.
fn read_once(place: &Place, known: Option<&str>) -> Result<Option<Fetched>, Failure> {
    let before = State::of(place)?;
    match before.rests_for(QUIET) {
        Some(true) => {}
        Some(false) => return Ok(None),
        // Its time lies ahead, so only waiting tells.
        None => {
            thread::sleep(QUIET);
            if State::of(place)? != before {
                return Ok(None);
            }
        }
    }
    if known == Some(&before.etag) {
        return Ok(Some(Fetched::Unchanged));
    }
    if before.bytes() > LARGEST_FOLDER {
        return Err(Failure::TooLarge);
    }
    let mut snapshot = Snapshot::default();
    for file in &before.files {
        let shown = file.name.to_string_lossy();
        let mut leave_out = |kind| snapshot.oddities.push(Oddity { name: shown.clone().into_owned(), kind });
        let Some(key) = file.name.to_str().and_then(|name| name.parse::<SecretKey>().ok()) else {
            leave_out(OddityKind::InvalidName);
            continue;
        };
        match value_of(&place.files.join(&file.name), file)? {
            Ok((value, found)) => {
                let changed = Duration::from_secs(u64::try_from(found.mtime()).unwrap_or(0));
                let millis = i64::try_from(changed.as_millis()).unwrap_or(0) + found.mtime_nsec() / 1_000_000;
                snapshot.secrets.push(UpstreamSecret {
                    key,
                    value,
                    text: None,
                    // The versions of a file are not counted; this number grows with them.
                    version: Version::new(millis).unwrap_or(Version::FIRST),
                    updated_at: Some(Timestamp::from_millis(millis)),
                });
            }
            Err(reason) => leave_out(OddityKind::Unusable(reason)),
        }
    }
    let after = State::of(place)?;
    if before != after {
        return Ok(None);
    }
    snapshot.etag = (before.rests_for(SETTLED) == Some(true)).then_some(before.etag);
    Ok(Some(Fetched::Changed(snapshot)))
}

/// A file's value, or why it cannot be used.
fn value_of(path: &Path, listed: &Listed) -> Result<Result<(SecretValue, Metadata), Unusable>, Failure> {
    if !listed.is_within {
        return Ok(Err(Unusable::Hidden));
    }
    // If the file has become a pipe meanwhile, this does not wait for a writer.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let mut file = match File::options().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(Err(Unusable::Hidden)),
        Err(error) => return Err(error.into()),
    };
    let found = file.metadata()?;
    if !found.is_file() || found.size() > LARGEST_VALUE {
        return Ok(Err(Unusable::NotText));
    }
    // Of the right size from the start: a growing buffer leaves copies of its content behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(found.size()).unwrap_or(0) + 1));
    (&mut file).take(LARGEST_VALUE + 1).read_to_end(&mut bytes)?;
    let text = String::from_utf8(std::mem::take(&mut *bytes));
    Ok(match text {
        Ok(text) if text.len() as u64 <= LARGEST_VALUE => Ok((SecretValue::new(text), found)),
        Ok(text) => {
            drop(Zeroizing::new(text));
            Err(Unusable::NotText)
        }
        Err(error) => {
            drop(Zeroizing::new(error.into_bytes()));
            Err(Unusable::NotText)
        }
    })
}
