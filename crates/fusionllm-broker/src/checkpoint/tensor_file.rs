//! A safetensors file of which only the header is held in memory.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fusionllm_protocol::{TensorHeader, TensorHeaderError};
use fusionllm_transport::open_regular;
use safetensors::tensor::{Dtype, TensorInfo};

use crate::CheckpointError;

/// Bytes copied at a time.
pub(super) const COPY_BYTES: usize = 1 << 20;

/// By what a file that was changed or replaced is told from what it was: its size, when it was written last, and where the
/// system tells, which file it is and when it was last touched at all, since tools that copy set the time of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
    touched: [i64; 3],
}

impl Stamp {
    pub(super) fn of(found: &Metadata) -> Self {
        Self { bytes: found.len(), modified: found.modified().ok(), touched: touched(found) }
    }
}

/// The same for one file and time, whichever process writes it.
impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.modified.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or_default();
        write!(f, "{} {} {:?}", self.bytes, since.as_nanos(), self.touched)
    }
}

/// The file's number, and when its content or what is known of it changed last.
#[cfg(unix)]
fn touched(found: &Metadata) -> [i64; 3] {
    use std::os::unix::fs::MetadataExt;
    [found.ino().cast_signed(), found.ctime(), found.ctime_nsec()]
}

#[cfg(not(unix))]
fn touched(_found: &Metadata) -> [i64; 3] {
    [0; 3]
}

/// A file whose header was read. Its values are read later, perhaps much later: they must still be the same then.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    header: TensorHeader,
    stamp: Stamp,
}

impl TensorFile {
    /// Reads and checks the header; the file must have exactly the length that it says.
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let mut file = open(path)?;
        let stamp = Stamp::of(&file.metadata().map_err(|e| io(path, e))?);
        let header = TensorHeader::read(&mut file, stamp.bytes).map_err(|e| header_error(path, e))?;
        Ok(Self { path: path.to_owned(), header, stamp })
    }

    /// Whether the file was the same when it had this stamp.
    pub(super) fn check_stamp(&self, stamp: Stamp) -> Result<(), CheckpointError> {
        if stamp == self.stamp { Ok(()) } else { Err(CheckpointError::Changed { path: self.path.clone() }) }
    }

    pub(super) fn stamp(&self) -> Stamp {
        self.stamp
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.header.names()
    }

    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.info(name)
    }

    /// Whether the tensor is there, of this shape, and of one of these types.
    pub(crate) fn check(&self, name: &str, shape: &[usize], dtypes: &[Dtype]) -> Result<(), CheckpointError> {
        let fail = |reason: String| CheckpointError::Tensor { path: self.path.clone(), name: name.to_owned(), reason };
        let info = self.info(name).ok_or_else(|| fail("is missing".to_owned()))?;
        if info.shape != shape {
            return Err(fail(format!("has shape {:?}, expected {shape:?}", info.shape)));
        }
        if !dtypes.contains(&info.dtype) {
            return Err(fail(format!("has element type {:?}, expected one of {dtypes:?}", info.dtype)));
        }
        Ok(())
    }

    /// Copies a tensor's bytes.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] if the file is not what it was when its header was read, or why it does not read or
    /// write.
    pub(crate) fn copy_to(&self, name: &str, out: &mut dyn Write, out_path: &Path) -> Result<(), CheckpointError> {
        if self.info(name).is_none() {
            let (path, name) = (self.path.clone(), name.to_owned());
            return Err(CheckpointError::Tensor { path, name, reason: "is missing".to_owned() });
        }
        let write = |part: &[u8]| out.write_all(part).map_err(|e| io(out_path, e));
        let mut file = open(&self.path)?;
        let check = |file: &File| self.check_stamp(Stamp::of(&file.metadata().map_err(|e| io(&self.path, e))?));
        check(&file)?;
        self.header.each_part(&mut file, name, |e| io(&self.path, e), write)?;
        // It may have been written while it was read.
        check(&file)
    }
}

/// Opens a file for reading; one that is not there is a missing shard.
pub(super) fn open(path: &Path) -> Result<File, CheckpointError> {
    open_regular(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => CheckpointError::Missing { path: path.to_owned() },
        _ => io(path, e),
    })
}

/// What is wrong with the header of a file that is read or written.
pub(super) fn header_error(path: &Path, error: TensorHeaderError) -> CheckpointError {
    match error {
        TensorHeaderError::Io(source) => io(path, source),
        other => CheckpointError::Format { path: path.to_owned(), reason: other.to_string() },
    }
}

pub(crate) fn io(path: &Path, source: std::io::Error) -> CheckpointError {
    CheckpointError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_cut_file_is_an_error_at_every_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        testing::write_tensors(&path, &[("a".to_owned(), vec![3])]);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(TensorFile::open(&path).unwrap().names().collect::<Vec<_>>(), ["a"]);
        for end in 0..bytes.len() {
            std::fs::write(&path, &bytes[..end]).unwrap();
            assert!(matches!(TensorFile::open(&path), Err(CheckpointError::Format { .. })), "cut to {end}");
        }
        std::fs::write(&path, [u8::MAX; 40]).unwrap();
        assert!(matches!(TensorFile::open(&path), Err(CheckpointError::Format { .. })));
    }

    /// An export of a later step may come in the place of the one that a job was handed in with, hours before its weights
    /// are read again.
    #[test]
    fn what_has_come_in_the_place_of_a_file_is_not_read_by_its_header() {
        let folder = tempfile::tempdir().unwrap();
        let (path, next) = (folder.path().join("x.safetensors"), folder.path().join("next"));
        let write = |path: &Path, names: [&str; 2], second: u64| {
            testing::write_tensors(path, &names.map(|name| (name.to_owned(), vec![3])));
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(second);
            File::options().write(true).open(path).unwrap().set_modified(at).unwrap();
        };
        write(&path, ["a", "b"], 1);
        let mut set = super::super::TensorSet::default();
        set.add(TensorFile::open(&path).unwrap());
        let part = || set.write_part(&["a".to_owned()], &mut Vec::new(), &next);
        part().unwrap();
        let refused = || {
            let error = part().unwrap_err().to_string();
            let expected = "x.safetensors has changed since it was checked: begin again with what is there now";
            assert!(error.ends_with(expected), "{error}");
        };
        write(&next, ["b", "a"], 2);
        std::fs::rename(&next, &path).unwrap();
        refused();
        // Of the same size, and written in its place.
        write(&path, ["a", "b"], 3);
        refused();
        // And with the time of writing that it had, as `cp -p` and `rsync` leave it.
        #[cfg(unix)]
        {
            write(&path, ["a", "b"], 1);
            refused();
        }
    }
}
