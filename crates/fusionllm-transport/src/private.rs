//! Files and folders that are their owner's alone.

use std::io::Read;
use std::path::Path;

use crate::{PrivateError, open_regular};

/// No secret of ours is nearly as long.
const MOST_BYTES: u64 = 64 << 10;

/// The text of a file with a secret; nothing if there is no file.
///
/// # Errors
/// [`PrivateError`] if others may read it, it is no regular file, it is no text, it is longer than 64 KiB, or it cannot be read.
pub fn read_private(path: &Path) -> Result<Option<String>, PrivateError> {
    let io = |source| PrivateError::Io { path: path.to_owned(), source };
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        // Such as a pipe from another command.
        Err(_) if std::fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) => {
            return Err(PrivateError::NotRegular { path: path.to_owned() });
        }
        Err(error) => return Err(io(error)),
    };
    let metadata = file.metadata().map_err(io)?;
    check_mode(path, &metadata)?;
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    match String::from_utf8(bytes) {
        Ok(text) if text.len() as u64 <= MOST_BYTES => Ok(Some(text)),
        _ => Err(PrivateError::NotText { path: path.to_owned() }),
    }
}

/// Whether nobody but its owner may use a file or folder. What is not there is nobody's.
///
/// # Errors
/// [`PrivateError`] if others may, or it cannot be looked at.
pub fn check_private(path: &Path) -> Result<(), PrivateError> {
    match std::fs::metadata(path) {
        Ok(metadata) => check_mode(path, &metadata),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(PrivateError::Io { path: path.to_owned(), source }),
    }
}

/// Makes a folder, and those above it that are missing, for the owner alone. One that exists stays as it is.
///
/// # Errors
/// [`PrivateError::Io`] if it cannot be made.
pub fn make_private_dir(path: &Path) -> Result<(), PrivateError> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(|source| PrivateError::Io { path: path.to_owned(), source })
}

#[cfg(unix)]
fn check_mode(path: &Path, metadata: &std::fs::Metadata) -> Result<(), PrivateError> {
    use std::os::unix::fs::PermissionsExt;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let right = if metadata.is_dir() { 700 } else { 600 };
    Err(PrivateError::Readable { path: path.to_owned(), mode, right })
}

#[cfg(not(unix))]
fn check_mode(_path: &Path, _metadata: &std::fs::Metadata) -> Result<(), PrivateError> {
    Ok(())
}

#[cfg(all(test, unix))]
#[expect(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_others_may_use_is_named_with_the_way_to_change_it() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("a/b");
        make_private_dir(&inner).unwrap();
        check_private(&inner).unwrap();
        let file = inner.join("secret");
        std::fs::write(&file, "x").unwrap();
        for mode in [0o644, 0o640, 0o604, 0o620] {
            set_mode(&file, mode);
            let error = read_private(&file).unwrap_err().to_string();
            assert!(error.contains(&format!("mode {mode:o}")) && error.contains("chmod 600"), "{error}");
        }
        set_mode(&file, 0o600);
        assert_eq!(read_private(&file).unwrap().as_deref(), Some("x"));
        assert_eq!(read_private(&inner.join("none")).unwrap(), None);
        set_mode(&inner, 0o755);
        assert!(check_private(&inner).unwrap_err().to_string().contains("chmod 700"));
    }

    #[test]
    fn a_pipe_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        for path in [pipe.as_path(), Path::new("/dev/zero")] {
            assert!(matches!(read_private(path), Err(PrivateError::NotRegular { .. })));
        }
    }

    #[test]
    fn a_secret_is_a_short_text() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("secret");
        for bytes in [vec![0xff; 10], vec![b'x'; MOST_BYTES as usize + 1]] {
            std::fs::write(&file, bytes).unwrap();
            set_mode(&file, 0o600);
            assert!(matches!(read_private(&file), Err(PrivateError::NotText { .. })));
        }
    }
}
