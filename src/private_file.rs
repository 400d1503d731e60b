//! Files that contain keys or tokens: accessible to their owner alone, and replaced as a whole or
//! not at all.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    marker::PhantomData,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use zeroize::Zeroizing;

/// Longer than any file of keys.
const MAX_LEN: u64 = 1 << 20;

/// Why a file that contains keys or a token cannot be used. It never contains the content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// Others can read it.
    #[error("{path} can be read by others than its owner; run `chmod 600 {path}`", path = .0.display())]
    Exposed(PathBuf),
    /// It exists but cannot be read.
    #[error("the file {path} cannot be read: {reason}", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        reason: String,
    },
    /// It cannot be written.
    #[error("the file {path} cannot be written: {reason}", path = .path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        reason: String,
    },
}

/// The file's text; `None` if there is no such file.
///
/// # Errors
/// [`FileError`]: also where others than its owner can read it.
pub fn read(path: &Path) -> Result<Option<Zeroizing<String>>, FileError> {
    let unreadable = |reason: String| FileError::Unreadable { path: path.to_owned(), reason };
    let Some((file, length)) = open(path)? else { return Ok(None) };
    // Room for all of it at once: a growing buffer leaves copies behind.
    let size = usize::try_from(length.min(MAX_LEN)).unwrap_or(0).saturating_add(1);
    let mut text = Zeroizing::new(String::with_capacity(size));
    let length = file.take(MAX_LEN + 1).read_to_string(&mut text).map_err(|error| unreadable(error.to_string()))?;
    if length as u64 > MAX_LEN {
        return Err(unreadable("it is longer than 1 MiB, which no file of keys is".to_owned()));
    }
    Ok(Some(text))
}

/// The opened file, and its length according to the system; `None` if there is no such file.
///
/// # Errors
/// As [`read`].
pub fn open(path: &Path) -> Result<Option<(File, u64)>, FileError> {
    let unreadable = |error: io::Error| FileError::Unreadable { path: path.to_owned(), reason: error.to_string() };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    let metadata = file.metadata().map_err(unreadable)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        let me = rustix::process::geteuid().as_raw();
        if metadata.is_file() && is_exposed(metadata.mode(), metadata.uid(), me) {
            return Err(FileError::Exposed(path.to_owned()));
        }
    }
    Ok(Some((file, metadata.len())))
}

/// Whether others than the intended readers can read a file. A file of root's may be readable by
/// its group, as for PostgreSQL: systemd and Kubernetes pass secrets to a service that way.
#[cfg(unix)]
fn is_exposed(mode: u32, owner: u32, me: u32) -> bool {
    let forbidden = if owner == 0 && me != 0 { 0o037 } else { 0o077 };
    mode & forbidden != 0
}

/// The mode of a file that others than the intended readers can read; `None` for a file that they
/// cannot read, or that cannot be inspected. For files that are read all the same.
#[must_use]
pub fn exposed_mode(path: &Path) -> Option<u32> {
    use std::os::unix::fs::MetadataExt as _;
    // The user that is assumed: services mostly do not run as root, though the person who checks
    // may be root.
    const NOT_ROOT: u32 = 1;
    let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    is_exposed(metadata.mode(), metadata.uid(), NOT_ROOT).then_some(metadata.mode() & 0o7777)
}

/// Replaces a file's text, or makes the file, for its owner alone. A reader meanwhile, or after a
/// crash, finds the old text or the new one.
///
/// # Errors
/// [`FileError::Unwritable`]; the file is unchanged.
pub fn replace(path: &Path, text: &str) -> Result<(), FileError> {
    hold(path)?.replace(path, text)
}

/// The right to change the files of keys in one folder, which one process has at a time. To add a
/// key to a file, a process reads the file and writes its content with the key; if two processes
/// did that at once, the later would undo the earlier.
pub struct Hold(#[expect(dead_code, reason = "held, not looked at")] Option<File>);

/// How long to wait for other processes that change a file, which takes them milliseconds.
const HELD_FOR: Duration = Duration::from_secs(5);

/// Takes that right for the folder of a file, and waits for a process that has it.
///
/// # Errors
/// [`FileError::Unwritable`] where another process keeps it for long.
pub fn hold(path: &Path) -> Result<Hold, FileError> {
    let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    // The folder itself is locked, so that no lock file is left beside the file.
    let Ok(folder) = File::open(folder_of(&real)) else { return Ok(Hold(None)) };
    let began = Instant::now();
    loop {
        match folder.try_lock() {
            Ok(()) => return Ok(Hold(Some(folder))),
            Err(TryLockError::WouldBlock) if began.elapsed() < HELD_FOR => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(TryLockError::WouldBlock) => {
                let reason = "another process holds its folder; see which, and try again".to_owned();
                return Err(FileError::Unwritable { path: path.to_owned(), reason });
            }
            // Not every file system has locks.
            Err(TryLockError::Error(_)) => return Ok(Hold(None)),
        }
    }
}

impl Hold {
    /// The same as [`replace`], for a caller that has the right already.
    ///
    /// # Errors
    /// As [`replace`].
    pub fn replace(&self, path: &Path, text: &str) -> Result<(), FileError> {
        self.prepare(path, text)?.replace()
    }

    /// Writes a text beside the file, so that errors appear before an action that the text belongs
    /// to. If it is dropped, it is removed again.
    ///
    /// # Errors
    /// [`FileError::Unwritable`]; the file is unchanged.
    pub fn prepare<'h>(&'h self, path: &Path, text: &str) -> Result<Prepared<'h>, FileError> {
        self.prepare_with(path, |file| file.write_all(text.as_bytes()))
    }

    /// The same for a content that is too long to be held in memory: `write` writes it.
    ///
    /// # Errors
    /// [`FileError::Unwritable`]; the file is unchanged.
    pub fn prepare_with<'h>(
        &'h self,
        path: &Path,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<Prepared<'h>, FileError> {
        let (real, beside) = written_beside(path, write).map_err(|error| unwritable(path, &error))?;
        Ok(Prepared { path: path.to_owned(), real, beside, held: PhantomData })
    }
}

/// A text that is written, but not in its file yet.
pub struct Prepared<'h> {
    /// The path of the file, as it was given.
    path: PathBuf,
    /// The same with every link resolved.
    real: PathBuf,
    beside: PathBuf,
    held: PhantomData<&'h Hold>,
}

impl Prepared<'_> {
    /// Replaces the file's text with it, or makes the file.
    ///
    /// # Errors
    /// [`FileError::Unwritable`]; the file is unchanged.
    pub fn replace(self) -> Result<(), FileError> {
        let put = fs::rename(&self.beside, &self.real).and_then(|()| self.outlast());
        put.map_err(|error| unwritable(&self.path, &error))
    }

    /// Makes a new file of it; the file must not exist.
    ///
    /// # Errors
    /// [`FileError::Unwritable`], where the file exists or cannot be made.
    pub fn create(self) -> Result<(), FileError> {
        // Unlike a rename, a hard link never replaces a file.
        let put = fs::hard_link(&self.beside, &self.real).and_then(|()| self.outlast());
        put.map_err(|error| unwritable(&self.path, &error))
    }

    /// The new name itself must survive a loss of power.
    fn outlast(&self) -> io::Result<()> {
        File::open(folder_of(&self.real))?.sync_all()
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        // After a rename it no longer exists.
        let _ = fs::remove_file(&self.beside);
    }
}

fn unwritable(path: &Path, error: &io::Error) -> FileError {
    FileError::Unwritable { path: path.to_owned(), reason: error.to_string() }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes into a new file beside the target; returns the paths of both.
fn written_beside(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<(PathBuf, PathBuf)> {
    // A link stays a link: its target is replaced.
    let (path, before) = match fs::canonicalize(path) {
        Ok(path) => (path.clone(), Some(fs::metadata(path)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (path.to_owned(), None),
        Err(error) => return Err(error),
    };
    let folder = folder_of(&path);
    let name = path.file_name().ok_or_else(|| io::Error::other("it has no name"))?;
    // Always the same name: the next attempt removes what a crash leaves behind.
    let beside = folder.join(format!(".{}.new", name.to_string_lossy()));
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&beside)?;
    let written = write(&mut file).and_then(|()| {
        #[cfg(unix)]
        keep_owner(&file, before.as_ref())?;
        file.sync_all()
    });
    match written {
        Ok(()) => Ok((path, beside)),
        Err(error) => {
            let _ = fs::remove_file(&beside);
            Err(error)
        }
    }
}

/// If root changes the file, the service that reads it must stay its owner.
#[cfg(unix)]
fn keep_owner(file: &File, before: Option<&fs::Metadata>) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt as _, fchown};
    let (Some(before), now) = (before, file.metadata()?) else { return Ok(()) };
    if (before.uid(), before.gid()) == (now.uid(), now.gid()) {
        return Ok(());
    }
    fchown(file, Some(before.uid()), Some(before.gid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_replaced_file_is_for_its_owner_alone_and_a_link_stays_one() {
        use std::os::unix::fs::{PermissionsExt as _, symlink};
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("keys"), folder.path().join("link"));
        replace(&path, "one").unwrap();
        symlink(&path, &link).unwrap();
        fs::write(folder.path().join(".keys.new"), "left by a crash").unwrap();
        replace(&link, "two").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(read(&path).unwrap().unwrap().as_str(), "two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left beside it");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_of_roots_may_be_readable_to_the_group_of_the_service() {
        let (root, me) = (0, 1000);
        for (mode, owner, exposed) in [
            (0o600, me, false),
            (0o640, me, true),
            (0o604, me, true),
            (0o440, root, false),
            (0o444, root, true),
            (0o460, root, true),
        ] {
            assert_eq!(is_exposed(mode, owner, me), exposed, "{mode:o} {owner}");
        }
        assert!(is_exposed(0o640, root, root), "root's own");
    }

    #[test]
    fn who_adds_to_a_file_waits_for_who_is_at_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        replace(&path, "").unwrap();
        std::thread::scope(|threads| {
            for number in 0..8 {
                let path = &path;
                threads.spawn(move || {
                    let held = hold(path).unwrap();
                    let before = read(path).unwrap().unwrap();
                    held.replace(path, &format!("{}{number}\n", before.as_str())).unwrap();
                });
            }
        });
        assert_eq!(read(&path).unwrap().unwrap().lines().count(), 8);
    }

    #[test]
    fn what_was_prepared_is_in_the_file_only_once_it_is_put_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let files = || fs::read_dir(folder.path()).unwrap().count();
        let held = hold(&path).unwrap();
        drop(held.prepare(&path, "one").unwrap());
        assert_eq!(files(), 0, "nothing is left of what was given up");
        held.prepare(&path, "two").unwrap().create().unwrap();
        assert!(held.prepare(&path, "three").unwrap().create().is_err());
        assert_eq!(read(&path).unwrap().unwrap().as_str(), "two");
        let prepared = held.prepare(&path, "four").unwrap();
        assert_eq!(read(&path).unwrap().unwrap().as_str(), "two");
        prepared.replace().unwrap();
        assert_eq!((read(&path).unwrap().unwrap().as_str(), files()), ("four", 1));
    }

    #[test]
    fn a_file_that_cannot_be_written_says_which_and_stays() {
        let error = replace(Path::new("/nowhere/at/all/keys"), "text").unwrap_err().to_string();
        assert!(error.contains("/nowhere/at/all/keys"), "{error}");
        assert_eq!(read(Path::new("/nowhere/at/all/keys")), Ok(None));
    }

    #[test]
    fn a_file_that_is_far_too_long_is_not_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, vec![b'a'; (2 << 20) as usize]).unwrap();
        assert!(matches!(read(file.path()), Err(FileError::Unreadable { .. })));
    }
}
