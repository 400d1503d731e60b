//! Writes the folders. Everything here blocks.
//!
//! A file is written beside the one that it replaces, and renamed: a concurrent reader gets the old
//! value or the new one. It is on the disk before the write is answered. A file that a killed
//! process has left behind begins with [`UNFINISHED`], is never read, and is removed by the next
//! write that finds it an hour old.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
    time::{Duration, Instant},
};

use super::folders::{Place, Root, failed};
use crate::{
    secret::{LARGEST_VALUE, SecretKey, SecretValue},
    tenant::Tenant,
    tiers::upstream::{Removal, Unstorable, UpstreamError},
};

/// The prefix of a file that is being written, or removed.
const UNFINISHED: &str = ".secretier-";

/// The age of a file that no process is working on any more.
const LEFT: Duration = Duration::from_secs(60 * 60);

/// The answer where nothing may be written at all.
const NOT_WRITABLE: Unstorable = Unstorable::ReadOnly(
    "the secrets are files that secretier does not write: change the file, or set directory.writable = true",
);

/// The answer for a folder that another program writes.
const MOUNTED: Unstorable =
    Unstorable::ReadOnly("the tenant's folder is mounted by Kubernetes, which writes it: change the Secret there");

impl Root {
    /// Whether a secret of that name, and of that value where it is not to be deleted, can be a file.
    pub(super) fn check(&self, key: &SecretKey, value: Option<&SecretValue>) -> Result<(), Unstorable> {
        if !self.writable {
            return Err(NOT_WRITABLE);
        }
        if key.as_str().contains('/') {
            return Err(Unstorable::Name("the name of a file has no '/' in it"));
        }
        if key.as_str().starts_with('.') {
            return Err(Unstorable::Name("files whose names begin with '.' are no secrets"));
        }
        if value.is_some_and(|value| value.len() as u64 > LARGEST_VALUE) {
            return Err(Unstorable::Size);
        }
        Ok(())
    }

    /// Writes a secret, unless it is later than `end`, when nobody waits for it any more; returns
    /// whether there was none.
    pub(super) fn put(
        &self,
        tenant: &Tenant,
        key: &SecretKey,
        value: &SecretValue,
        end: Instant,
    ) -> Result<bool, UpstreamError> {
        self.check(key, Some(value))?;
        self.create(tenant)?;
        let place = self.writable_place(tenant)?.ok_or_else(gone)?;
        if !place.has_room_for(value.len() as u64) {
            return Err(Unstorable::Value("the tenant's folder would hold more than 64 MiB, or 100,000 files").into());
        }
        let folder = place.folder;
        let path = folder.join(key.as_str());
        let is_new = match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => return Err(Unstorable::Name("a folder has this name").into()),
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => return Err(failed(&error)),
        };
        clear(&folder);
        let unfinished = folder.join(unfinished());
        let written = write_new(&unfinished, value).map_err(|error| failed(&error));
        let written = written
            .and_then(|()| in_time(end))
            .and_then(|()| fs::rename(&unfinished, &path).map_err(|error| failed(&error)));
        if let Err(error) = written {
            let _ = fs::remove_file(&unfinished);
            return Err(error);
        }
        sync(&folder)?;
        Ok(is_new)
    }

    /// Deletes a secret, unless it is later than `end`; returns whether there was one.
    pub(super) fn delete(&self, tenant: &Tenant, key: &SecretKey, end: Instant) -> Result<bool, UpstreamError> {
        self.check(key, None)?;
        let Some(Place { folder, .. }) = self.writable_place(tenant)? else { return Ok(false) };
        in_time(end)?;
        match fs::remove_file(folder.join(key.as_str())) {
            Ok(()) => sync(&folder).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Makes a tenant's folder, unless there is one.
    pub(super) fn create(&self, tenant: &Tenant) -> Result<(), UpstreamError> {
        if !self.writable {
            return Err(NOT_WRITABLE.into());
        }
        if tenant.shared_folder().is_some() {
            return Err(Unstorable::ReadOnly("a directory has no shared folders").into());
        }
        let root = self.real()?;
        match DirBuilder::new().mode(0o700).create(root.join(tenant.as_str())) {
            Ok(()) => sync(&root),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Removes a tenant's folder, unless it is later than `end`; returns whether there was one.
    pub(super) fn remove(&self, tenant: &Tenant, what: Removal, end: Instant) -> Result<bool, UpstreamError> {
        if !self.writable {
            return Err(NOT_WRITABLE.into());
        }
        let Some(Place { folder, .. }) = self.writable_place(tenant)? else { return Ok(false) };
        let entries = fs::read_dir(&folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let stays = |hint| Err(UpstreamError::Rejected { status: 409, cause: super::super::Cause::Directory, hint });
        for entry in entries.map_err(|error| failed(&error))? {
            if entry.file_type().map_err(|error| failed(&error))?.is_dir() {
                return stays("there are folders in the tenant's folder; move them elsewhere first");
            }
            if what == Removal::Empty && !is_unfinished(&entry) {
                return stays("there are secrets in the tenant's folder; delete these first");
            }
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") && !is_unfinished(&entry) {
                return stays(
                    "there are files in the tenant's folder that are no secrets, as their names begin with '.'",
                );
            }
        }
        // Renamed as a whole first: nobody sees a part of it.
        let root = self.real()?;
        if fs::symlink_metadata(root.join(tenant.as_str())).is_ok_and(|found| found.is_symlink()) {
            return stays("the tenant's folder is a link, and what it leads to may be another's; remove it by hand");
        }
        in_time(end)?;
        let removed = root.join(unfinished());
        fs::rename(root.join(tenant.as_str()), &removed).map_err(|error| failed(&error))?;
        sync(&root)?;
        fs::remove_dir_all(&removed).map_err(|error| failed(&error))?;
        clear(&root);
        Ok(true)
    }

    /// The tenant's folder, if we may write to it.
    fn writable_place(&self, tenant: &Tenant) -> Result<Option<Place>, UpstreamError> {
        match self.place(tenant)? {
            Some(place) if place.folder != place.files => Err(MOUNTED.into()),
            place => Ok(place),
        }
    }
}

fn gone() -> UpstreamError {
    super::unreachable("the tenant's folder is gone".to_owned())
}

fn unfinished() -> String {
    format!("{UNFINISHED}{:016x}", rand::random::<u64>())
}

fn is_unfinished(entry: &fs::DirEntry) -> bool {
    entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes())
}

/// A caller that was told of a timeout may have written anew: nothing takes effect after that.
fn in_time(end: Instant) -> Result<(), UpstreamError> {
    if Instant::now() < end { Ok(()) } else { Err(UpstreamError::TimedOut) }
}

fn write_new(path: &Path, value: &SecretValue) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(value.expose().as_bytes())?;
    file.sync_all()
}

/// Writes the names in a folder to the disk.
fn sync(folder: &Path) -> Result<(), UpstreamError> {
    // It is done by then: a refusal here must not say that it is not.
    let unknown = |error: io::Error| super::unreachable(error.to_string());
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(unknown)
}

/// Removes files that a killed process has left in a folder. Files that cannot be removed stay.
fn clear(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_left = is_unfinished(&entry)
            && entry
                .metadata()
                .and_then(|found| found.modified())
                .is_ok_and(|at| at.elapsed().is_ok_and(|age| age >= LEFT));
        if is_left {
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}
