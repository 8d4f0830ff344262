//! A shard on its way between memory and wire: in a file, so that only one tensor of it is in memory at a time.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fusionllm_protocol::TensorHeader;
use fusionllm_transport::without_temporary_name;

use super::shard::{header_error, values, write_shard_to};
use crate::ShardError;
use crate::executor::{LazyTensor, NamedTensor, TensorSource};

/// Bytes that are read or written at a time, and the content frames of a blob: small beside memory, large beside a packet.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;

/// A file without a name, which is gone when it is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct ShardFile {
    /// Where it lies, for people.
    folder: PathBuf,
    file: File,
    bytes: u64,
}

impl ShardFile {
    /// Writes tensors to a file in `folder`.
    ///
    /// # Errors
    /// As [`write_shard_to`].
    pub(crate) fn write(folder: &Path, tensors: Vec<LazyTensor<'_>>) -> Result<Self, ShardError> {
        let io = |source| ShardError::Io { path: folder.to_owned(), source };
        let mut shard = match Self::empty(folder) {
            // It was there when the job began; others may have renamed or removed it since.
            Err(ShardError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                std::fs::create_dir_all(folder).map_err(io)?;
                Self::empty(folder)?
            }
            made => made?,
        };
        let mut out = BufWriter::with_capacity(CHUNK_BYTES, &shard.file);
        shard.bytes = write_shard_to(&mut out, folder, tensors)?;
        out.flush().map_err(io)?;
        drop(out);
        Ok(shard)
    }

    /// A file in `folder` whose content comes by [`Self::append`].
    ///
    /// # Errors
    /// [`ShardError::Io`] if none can be made there.
    pub(crate) fn empty(folder: &Path) -> Result<Self, ShardError> {
        let file = tempfile::tempfile_in(folder).map_err(without_temporary_name);
        let file = file.map_err(|source| ShardError::Io { path: folder.to_owned(), source })?;
        Ok(Self { folder: folder.to_owned(), file, bytes: 0 })
    }

    /// Adds bytes at the end.
    ///
    /// # Errors
    /// [`ShardError::Io`] if they cannot be written.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), ShardError> {
        self.file.write_all(bytes).map_err(|e| self.io(e))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Bytes of the whole file.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file's bytes from `start` on, so many as are read at a time, in the memory of `bytes`; nothing at its end.
    ///
    /// # Errors
    /// [`ShardError::Io`] if they cannot be read.
    pub(crate) fn chunk(&self, start: u64, mut bytes: Vec<u8>) -> Result<Vec<u8>, ShardError> {
        bytes.clear();
        let read = (&self.file).seek(SeekFrom::Start(start)).and_then(|_| {
            let mut part = (&self.file).take(CHUNK_BYTES as u64);
            part.read_to_end(&mut bytes)
        });
        read.map_err(|e| self.io(e))?;
        Ok(bytes)
    }

    /// The tensors in it.
    ///
    /// # Errors
    /// [`ShardError`] if it is no whole safetensors file.
    pub(crate) fn into_tensors(mut self) -> Result<ShardTensors, ShardError> {
        self.file.rewind().map_err(|e| self.io(e))?;
        let header = TensorHeader::read(&mut self.file, self.bytes);
        let header = header.map_err(|e| header_error(e, |e| self.io(e)))?;
        Ok(ShardTensors { shard: self, header })
    }

    fn io(&self, source: std::io::Error) -> ShardError {
        ShardError::Io { path: self.folder.clone(), source }
    }
}

/// The tensors of a shard; F16 and BF16 are widened.
#[derive(Debug)]
pub(crate) struct ShardTensors {
    shard: ShardFile,
    header: TensorHeader,
}

impl TensorSource for ShardTensors {
    fn take(&mut self, name: &str) -> Result<Option<NamedTensor>, ShardError> {
        let Some(info) = self.header.info(name) else { return Ok(None) };
        let mut all = Vec::with_capacity(info.shape.iter().product());
        let take = |part: &[u8]| values(name, info.dtype, part).map(|some| all.extend(some));
        self.header.each_part(&mut &self.shard.file, name, |e| self.shard.io(e), take)?;
        Ok(Some(NamedTensor { name: name.to_owned(), shape: info.shape.clone(), values: all }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{read_shard, write_shard};

    fn tensors() -> Vec<NamedTensor> {
        let values = (0..700_000).map(|i| i as f32).collect();
        let large = NamedTensor { name: "b".to_owned(), shape: vec![7, 100_000], values };
        vec![large, NamedTensor { name: "a".to_owned(), shape: vec![2], values: vec![1.5, -2.0] }]
    }

    #[test]
    fn what_is_written_is_read_tensor_by_tensor() {
        let folder = tempfile::tempdir().unwrap();
        let lazy = tensors().into_iter().map(LazyTensor::from).collect();
        let file = ShardFile::write(folder.path(), lazy).unwrap();
        let mut all = Vec::new();
        while let Some(chunk) =
            Some(file.chunk(all.len() as u64, Vec::new()).unwrap()).filter(|chunk| !chunk.is_empty())
        {
            all.extend(chunk);
        }
        assert_eq!(all.len() as u64, file.bytes());
        assert_eq!(all, write_shard(&tensors()).unwrap());
        let mut back = read_shard(&all).unwrap();
        back.sort_by(|x, y| y.name.cmp(&x.name));
        assert_eq!(back, tensors());
        let mut source = file.into_tensors().unwrap();
        for tensor in tensors() {
            assert_eq!(source.take(&tensor.name).unwrap(), Some(tensor));
        }
        assert_eq!(source.take("c").unwrap(), None);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "it has no name");
    }

    #[test]
    fn a_folder_that_went_away_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("gone");
        ShardFile::empty(&gone).unwrap_err();
        let lazy = tensors().into_iter().map(LazyTensor::from).collect();
        assert!(ShardFile::write(&gone, lazy).unwrap().bytes() > 0);
    }

    #[test]
    fn a_cut_file_is_an_error_at_every_length() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = write_shard(&tensors()[1..]).unwrap();
        for end in 0..bytes.len() {
            let mut file = ShardFile::empty(folder.path()).unwrap();
            file.append(&bytes[..end]).unwrap();
            assert!(file.into_tensors().is_err(), "cut to {end} bytes");
        }
    }
}
