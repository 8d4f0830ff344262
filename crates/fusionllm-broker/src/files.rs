//! Files with errors that name them.

use std::fs::DirBuilder;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fusionllm_transport::{FileMode, is_shortage, write_whole};

use crate::BrokerError;

/// Makes a folder for its owner alone: what a run writes was made from the data. One that is there stays as it is; those
/// above it are made as any.
pub(crate) fn make_folder(path: &Path) -> Result<(), BrokerError> {
    if let Some(above) = path.parent() {
        std::fs::create_dir_all(above).map_err(|e| io_error(path, e))?;
    }
    private_folders(true).create(path).map_err(|e| io_error(path, e))
}

/// Makes a folder that must not be there yet, for its owner alone.
pub(crate) fn new_folder(path: &Path) -> Result<(), BrokerError> {
    private_folders(false).create(path).map_err(|e| io_error(path, e))
}

/// How folders are made that are for their owner alone.
pub(crate) fn private_folders(recursive: bool) -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.recursive(recursive);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder
}

pub(crate) fn io_error(path: &Path, source: std::io::Error) -> BrokerError {
    BrokerError::Io { path: path.to_owned(), source }
}

/// An error of a file that somebody named: it is `refused`, unless the error says nothing of it.
pub(crate) fn named_error(
    path: &Path,
    source: std::io::Error,
    refused: impl FnOnce(String) -> BrokerError,
) -> BrokerError {
    if is_shortage(&source) { io_error(path, source) } else { refused(source.to_string()) }
}

/// Writes a whole file or nothing, as [`write_whole`] does; others may read it.
///
/// # Errors
/// [`BrokerError::Io`] that names the file.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), BrokerError> {
    write_whole(path, bytes, FileMode::Shared).map_err(|e| io_error(path, e))
}

/// The same, readable by the owner alone.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), BrokerError> {
    write_whole(path, bytes, FileMode::Private).map_err(|e| io_error(path, e))
}

/// A name beside `path` that is free: its own with `suffix`, and a number if that is taken.
pub(crate) fn free_name(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let numbered = (2u64..).map(|n| path.with_file_name(format!("{name}{suffix}-{n}")));
    let first = path.with_file_name(format!("{name}{suffix}"));
    std::iter::once(first.clone()).chain(numbered).find(|p| p.symlink_metadata().is_err()).unwrap_or(first)
}

/// What marks something that others have put under the name of a file of a run.
const OTHER: &str = ".other";

/// Renames what others have put under the name of a file of ours. Gives its new name.
///
/// # Errors
/// What the system says.
pub(crate) fn put_aside(path: &Path) -> std::io::Result<PathBuf> {
    let to = free_name(path, OTHER);
    std::fs::rename(path, &to)?;
    Ok(to)
}

/// Which file has a name, or which link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileKey(#[cfg(unix)] (u64, u64));

impl FileKey {
    /// Nothing if none has the name.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        path.symlink_metadata().ok().map(|found| Self::of_found(&found))
    }

    #[cfg(unix)]
    fn of_found(found: &std::fs::Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self((found.dev(), found.ino()))
    }

    #[cfg(not(unix))]
    fn of_found(_found: &std::fs::Metadata) -> Self {
        Self()
    }
}

/// What has a name, so that it can be told whether something else came in its place, or it was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileState {
    key: FileKey,
    /// Whether it is a regular file, and no link to one.
    pub(crate) is_file: bool,
    bytes: u64,
    changed: Option<SystemTime>,
}

impl FileState {
    /// Nothing if none has the name.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let found = path.symlink_metadata().ok()?;
        let (is_file, bytes, changed) = (found.is_file(), found.len(), found.modified().ok());
        Some(Self { key: FileKey::of_found(&found), is_file, bytes, changed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none").join("x.json");
        assert!(write_atomic(&path, b"one").unwrap_err().to_string().contains("x.json"));
    }
}
