//! Writing whole files, the one way in which it is done.
//!
//! A file gets its name only once it is whole and on the disk, so that after a crash its reader finds the old file or
//! the new one. The name is never written through: if it is a link, the link is replaced, and not what it leads to.

use std::fs::File;
use std::io::{Error, ErrorKind, Result, Write};
use std::path::Path;

use tempfile::NamedTempFile;

/// Who may use a new file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileMode {
    /// Everybody whom the process's mask lets: mode 0666 without what the mask takes away.
    Shared,
    /// Its owner alone: mode 0600, from its first byte on.
    Private,
}

/// Writes a whole file, in place of an earlier one: temporary name in the same folder, sync, rename, sync of the folder.
///
/// # Errors
/// What the system says. An earlier file is then still there, unless only the last sync failed.
pub fn write_whole(path: &Path, bytes: &[u8], mode: FileMode) -> Result<()> {
    written(path, bytes, mode)?.persist(path).map_err(|e| e.error)?;
    sync_folder(folder_of(path))
}

/// The same for a file that must not be there yet.
///
/// # Errors
/// As [`write_whole`], and [`ErrorKind::AlreadyExists`] if there is something of that name; it stays as it is.
pub fn write_new_whole(path: &Path, bytes: &[u8], mode: FileMode) -> Result<()> {
    written(path, bytes, mode)?.persist_noclobber(path).map_err(|e| e.error)?;
    sync_folder(folder_of(path))
}

/// A file of these bytes under a temporary name, synced.
fn written(path: &Path, bytes: &[u8], mode: FileMode) -> Result<NamedTempFile> {
    // What is wrong with the folder is said as it is, and not of a temporary file in it.
    std::fs::metadata(folder_of(path))?;
    let mut temporary = temporary_for(path, mode)?;
    // The file itself: its errors do not have the temporary name in them.
    temporary.as_file_mut().write_all(bytes)?;
    temporary.as_file().sync_all()?;
    Ok(temporary)
}

/// An empty file beside `path` that is to take its name once it is whole, and is removed if it does not. It is called
/// `NAME.RANDOM.tmp`, with six letters and digits. Whoever gives it its name syncs it before and the folder after.
///
/// # Errors
/// What the system says.
pub fn temporary_for(path: &Path, mode: FileMode) -> Result<NamedTempFile> {
    let mut prefix = path.file_name().unwrap_or_default().to_owned();
    prefix.push(".");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)]
    {
        let bits = match mode {
            FileMode::Shared => 0o666,
            FileMode::Private => 0o600,
        };
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(bits));
    }
    #[cfg(not(unix))]
    let _ = mode;
    builder.tempfile_in(folder_of(path)).map_err(without_temporary_name)
}

/// The file for which a temporary one of this name was made by [`temporary_for`].
pub fn temporary_of(name: &str) -> Option<&str> {
    /// Letters and digits that tell temporary files apart.
    const RANDOM: usize = 6;
    let (of, random) = name.strip_suffix(".tmp")?.rsplit_once('.')?;
    (random.len() == RANDOM && random.bytes().all(|b| b.is_ascii_alphanumeric())).then_some(of)
}

/// The folder in which a file lies.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes what was renamed, made or removed in a folder last. Only Unix lets a folder be opened.
///
/// # Errors
/// What the system says.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Removes a file, or a link and not what it leads to. It is no error if there is none.
///
/// # Errors
/// What the system says.
pub fn remove_if_there(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// An error of a temporary file without the name of that, which its reader has never heard of, and with the system's number,
/// which the library only keeps in its text.
pub fn without_temporary_name(error: Error) -> Error {
    let text = error.to_string();
    let number = text.split_once("(os error ").and_then(|(_, rest)| rest.split(')').next()?.parse().ok());
    number.map_or(error, Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_file_leaves_one_file_and_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        write_whole(&path, b"one", FileMode::Shared).unwrap();
        write_whole(&path, b"two", FileMode::Shared).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        let error = write_new_whole(&path, b"three", FileMode::Shared).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        remove_if_there(&path).unwrap();
        remove_if_there(&path).unwrap();
        write_new_whole(&path, b"three", FileMode::Shared).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"three");
    }

    #[test]
    fn an_error_is_of_the_folder_and_names_no_temporary_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = write_whole(&folder.path().join("none/x.json"), b"", FileMode::Shared).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(!error.to_string().contains("tmp"), "{error}");
        let error = tempfile::tempdir_in(folder.path().join("none")).map_err(without_temporary_name).unwrap_err();
        assert!(error.raw_os_error().is_some() && !error.to_string().contains("tmp"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_private_file_is_its_owners_alone_and_a_shared_one_has_the_mode_of_any_file() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mode = |name: &str| std::fs::metadata(at(name)).unwrap().permissions().mode() & 0o777;
        File::create(at("any")).unwrap();
        temporary_for(&at("shared"), FileMode::Shared).unwrap().persist(at("shared")).unwrap();
        write_whole(&at("secret"), b"", FileMode::Private).unwrap();
        assert_eq!((mode("shared"), mode("secret")), (mode("any"), 0o600));
        // Also in place of one that others may read.
        write_whole(&at("shared"), b"", FileMode::Private).unwrap();
        assert_eq!(mode("shared"), 0o600);
    }

    #[cfg(unix)]
    #[test]
    fn nothing_is_written_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (theirs, link) = (folder.path().join("theirs"), folder.path().join("link"));
        std::fs::write(&theirs, "theirs").unwrap();
        std::os::unix::fs::symlink(&theirs, &link).unwrap();
        write_whole(&link, b"ours", FileMode::Shared).unwrap();
        assert_eq!(std::fs::read(&theirs).unwrap(), b"theirs");
        assert_eq!(std::fs::read(&link).unwrap(), b"ours");
    }
}
