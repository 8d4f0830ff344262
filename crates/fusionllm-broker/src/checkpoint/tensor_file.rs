//! A safetensors file of which only the header is held in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::CheckpointError;

/// Longest header that is read; that of GPT-2 xl with optimizer state has 300 KB.
pub(super) const MAX_HEADER_BYTES: u64 = 64 << 20;

/// Bytes copied at a time.
pub(super) const COPY_BYTES: usize = 1 << 20;

/// An opened file.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    data_start: u64,
    tensors: BTreeMap<String, TensorInfo>,
}

impl TensorFile {
    /// Reads and checks the header; the file must have exactly the length that it says.
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let format = |reason: String| CheckpointError::Format { path: path.to_owned(), reason };
        let mut file = open(path)?;
        let length = file.metadata().map_err(|e| io(path, e))?.len();
        let mut size = [0; 8];
        if length < 8 {
            return Err(format(format!("it has {length} bytes, too few for a header")));
        }
        file.read_exact(&mut size).map_err(|e| io(path, e))?;
        if &size == b"version " {
            return Err(format(
                "it is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`".to_owned(),
            ));
        }
        let header_bytes = u64::from_le_bytes(size);
        if header_bytes > MAX_HEADER_BYTES || header_bytes > length - 8 {
            return Err(format(format!("its header would have {header_bytes} bytes, the file has {length}")));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(|e| io(path, e))?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| format(e.to_string()))?;
        let data_start = 8 + header_bytes;
        let end = metadata.tensors().values().map(|t| t.data_offsets.1 as u64).max().unwrap_or(0);
        if data_start.checked_add(end) != Some(length) {
            let expected = data_start.saturating_add(end);
            return Err(format(format!("it has {length} bytes, its header says {expected}")));
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { path: path.to_owned(), data_start, tensors })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
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
    pub(crate) fn copy_to(&self, name: &str, out: &mut dyn Write, out_path: &Path) -> Result<(), CheckpointError> {
        let Some(info) = self.info(name) else {
            let (path, name) = (self.path.clone(), name.to_owned());
            return Err(CheckpointError::Tensor { path, name, reason: "is missing".to_owned() });
        };
        let mut file = open(&self.path)?;
        let (start, end) = info.data_offsets;
        file.seek(SeekFrom::Start(self.data_start + start as u64)).map_err(|e| io(&self.path, e))?;
        let mut buffer = vec![0; COPY_BYTES.min(end - start)];
        let mut left = end - start;
        while left > 0 {
            let part = buffer.len().min(left);
            let bytes = buffer.get_mut(..part).unwrap_or_default();
            file.read_exact(bytes).map_err(|e| io(&self.path, e))?;
            out.write_all(bytes).map_err(|e| io(out_path, e))?;
            left -= part;
        }
        Ok(())
    }
}

/// Opens a file for reading; one that is not there is a missing shard.
pub(super) fn open(path: &Path) -> Result<File, CheckpointError> {
    File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => CheckpointError::Missing { path: path.to_owned() },
        _ => io(path, e),
    })
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
}
