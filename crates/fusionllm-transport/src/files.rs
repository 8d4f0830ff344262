//! Files whose paths others may have named or whose folders others may write to: opening them, and writing whole ones.

mod known;
mod reason;
mod whole;

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

pub use known::{KnownFolder, Stands};
pub use reason::{IoReason, if_usable, io_reason, is_of_path, is_shortage};
pub use whole::{
    FileMode, folder_of, remove_if_there, sync_folder, temporary_for, temporary_of, without_temporary_name,
    write_new_whole, write_whole,
};

/// Most of a file that is read as a whole: many times the largest tokenizer.
const MOST_BYTES: u64 = 256 << 20;

/// Opens a regular file for reading. A pipe without a writer would be waited for without an end, and a device may have
/// none.
///
/// # Errors
/// What the system says, or that it is no regular file.
pub fn open_regular(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true);
    // Opening a pipe then waits for nobody; to a regular file it makes no difference.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, rustix::fs::OFlags::NONBLOCK.bits() as i32);
    regular(options.open(path)?)
}

/// Opens a regular file for reading and writing, and makes it if it is not there. What a link leads to is not opened: it
/// may be somebody else's.
///
/// # Errors
/// What the system says, or that it is no regular file.
pub fn open_or_make_regular(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    {
        use rustix::fs::OFlags;
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags.bits() as i32);
    }
    regular(options.open(path)?)
}

/// The nearest thing at a path or above it that exists. A link to nowhere exists.
fn nearest(path: &Path) -> Option<&Path> {
    path.ancestors().find(|above| above.symlink_metadata().is_ok())
}

/// The nearest thing at a path or above it that exists, if it is a folder: what is made at the path is made in it.
pub fn folder_above(path: &Path) -> Option<&Path> {
    nearest(path).filter(|above| above.is_dir())
}

/// The nearest thing at a path or above it that exists, if it is no folder: nothing can be made there.
pub fn no_folder_above(path: &Path) -> Option<&Path> {
    nearest(path).filter(|above| !above.is_dir())
}

/// Whether a path leads to this open file. It does not if the file, or a folder above it, was renamed or removed; where
/// that cannot be told, it does.
#[cfg(unix)]
pub fn leads_to(path: &Path, file: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    let key = |found: std::fs::Metadata| (found.dev(), found.ino());
    match std::fs::metadata(path) {
        Ok(found) => file.metadata().is_ok_and(|open| key(open) == key(found)),
        Err(error) => !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
    }
}

/// Whether a path leads to this open file, which nobody renames or removes while it is open.
#[cfg(not(unix))]
pub fn leads_to(_path: &Path, _file: &File) -> bool {
    true
}

/// Whether two paths lead to one file or folder that exists, also by links of either kind.
#[cfg(unix)]
pub fn is_same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let key = |path: &Path| std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    key(a).is_some_and(|a| Some(a) == key(b))
}

/// Whether two paths lead to one file or folder that exists.
#[cfg(not(unix))]
pub fn is_same_file(a: &Path, b: &Path) -> bool {
    a.canonicalize().ok().is_some_and(|a| Some(a) == b.canonicalize().ok())
}

fn regular(file: File) -> Result<File> {
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(Error::new(ErrorKind::IsADirectory, "it is a directory"));
    }
    if !metadata.is_file() {
        return Err(Error::other("it is no regular file"));
    }
    Ok(file)
}

/// The content of a regular file of at most 256 MiB.
///
/// # Errors
/// As [`open_regular`], or that it is longer.
pub fn read_regular(path: &Path) -> Result<Vec<u8>> {
    read_within(path, MOST_BYTES)
}

fn read_within(path: &Path, most: u64) -> Result<Vec<u8>> {
    content(open_regular(path)?, most)
}

fn content(file: File, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(Error::new(ErrorKind::FileTooLarge, format!("it is longer than {} MiB", most >> 20)));
    }
    Ok(bytes)
}

/// The same as text.
///
/// # Errors
/// As [`read_regular`], or that it is not UTF-8.
pub fn read_regular_text(path: &Path) -> Result<String> {
    read_regular_text_within(path, MOST_BYTES)
}

/// The text of a regular file of at most so many bytes, which are whole MiB.
///
/// # Errors
/// As [`read_regular`], or that it is not UTF-8.
pub fn read_regular_text_within(path: &Path, most: u64) -> Result<String> {
    text(read_within(path, most)?)
}

/// The text of a file that is open already, of at most 256 MiB.
///
/// # Errors
/// What the system says, that it is longer, or that it is not UTF-8.
pub fn read_text(file: File) -> Result<String> {
    text(content(file, MOST_BYTES)?)
}

fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| Error::new(ErrorKind::InvalidData, "it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn only_regular_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        for path in [pipe.as_path(), Path::new("/dev/zero")] {
            let error = read_regular(path).unwrap_err();
            assert!(error.to_string().contains("no regular file"), "{error}");
        }
        assert_eq!(read_regular(folder.path()).unwrap_err().kind(), ErrorKind::IsADirectory);
        let file = folder.path().join("text");
        std::fs::write(&file, "grüß").unwrap();
        assert_eq!(read_regular_text(&file).unwrap(), "grüß");
        std::fs::write(&file, [0xff]).unwrap();
        assert_eq!(read_regular_text(&file).unwrap_err().kind(), ErrorKind::InvalidData);
        let long = File::create(&file).unwrap();
        long.set_len(MOST_BYTES + 1).unwrap();
        assert_eq!(read_regular(&file).unwrap_err().kind(), ErrorKind::FileTooLarge);
    }

    #[cfg(unix)]
    #[test]
    fn paths_are_held_against_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        std::fs::hard_link(at("file"), at("hard")).unwrap();
        std::os::unix::fs::symlink("file", at("soft")).unwrap();
        std::os::unix::fs::symlink("nowhere", at("lost")).unwrap();
        assert!(is_same_file(&at("file"), &at("hard")) && is_same_file(&at("soft"), &at("file")));
        assert!(is_same_file(folder.path(), &at(".")) && !is_same_file(folder.path(), &at("file")));
        assert!(!is_same_file(&at("none"), &at("none")), "there is no such file");
        let open = File::open(at("file")).unwrap();
        assert!(leads_to(&at("file"), &open) && leads_to(&at("hard"), &open) && !leads_to(&at("none"), &open));
        assert_eq!(no_folder_above(&at("a/b")), None);
        assert_eq!(folder_above(&at("a/b")), Some(folder.path()));
        assert_eq!((folder_above(&at("file/b")), folder_above(&at("lost"))), (None, None));
        assert_eq!(no_folder_above(&at("file/b")), Some(at("file").as_path()));
        assert_eq!(no_folder_above(&at("lost")), Some(at("lost").as_path()));
    }
}
