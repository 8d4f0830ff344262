//! Files with errors that name them.

use std::path::Path;

use fusionllm_transport::{FileMode, is_shortage, write_whole};

use crate::BrokerError;

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
