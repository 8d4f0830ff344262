//! A shard on its way between memory and wire: in a file, so that only one tensor of it is in memory at a time.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fusionllm_protocol::TensorHeader;
use fusionllm_transport::{open_regular, without_temporary_name};

use super::shard::{header_error, values, write_shard_to};
use crate::ShardError;
use crate::executor::{LazyTensor, NamedTensor, TensorSource};

/// Bytes that are read or written at a time, and the content frames of a blob: small beside memory, large beside a packet.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;

/// A shard's file: without a name, so that it is gone when it is dropped or the process ends, or that of a snapshot.
#[derive(Debug)]
pub(crate) struct ShardFile {
    /// Where it lies, for people: its folder, or if it has a name, the file.
    place: PathBuf,
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
        shard.fill(tensors)?;
        Ok(shard)
    }

    /// A file in `folder` whose content comes by [`Self::append`].
    ///
    /// # Errors
    /// [`ShardError::Io`] if none can be made there.
    pub(crate) fn empty(folder: &Path) -> Result<Self, ShardError> {
        let file = tempfile::tempfile_in(folder).map_err(without_temporary_name);
        let file = file.map_err(|source| ShardError::Io { path: folder.to_owned(), source })?;
        Ok(Self { place: folder.to_owned(), file, bytes: 0 })
    }

    /// A file that has a name, with its content.
    ///
    /// # Errors
    /// [`ShardError::Io`] if it does not open.
    pub(crate) fn open(path: &Path) -> Result<Self, ShardError> {
        let opened = open_regular(path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (bytes, file) = opened.map_err(|source| ShardError::Io { path: path.to_owned(), source })?;
        Ok(Self { place: path.to_owned(), file, bytes })
    }

    /// An empty file that has a name, whose content comes by [`Self::append`] or [`Self::fill`].
    ///
    /// # Errors
    /// [`ShardError::Io`] if it does not open.
    pub(crate) fn open_to_write(path: &Path) -> Result<Self, ShardError> {
        let file = File::options().read(true).write(true).truncate(true).open(path);
        let file = file.map_err(|source| ShardError::Io { path: path.to_owned(), source })?;
        Ok(Self { place: path.to_owned(), file, bytes: 0 })
    }

    /// Writes tensors to a file that is empty.
    ///
    /// # Errors
    /// As [`write_shard_to`].
    pub(crate) fn fill(&mut self, tensors: Vec<LazyTensor<'_>>) -> Result<(), ShardError> {
        let mut out = BufWriter::with_capacity(CHUNK_BYTES, &self.file);
        self.bytes = write_shard_to(&mut out, &self.place, tensors)?;
        out.flush().map_err(|e| self.io(e))
    }

    /// BLAKE3 hash of the content.
    ///
    /// # Errors
    /// [`ShardError::Io`] if it cannot be read.
    pub(crate) fn hash(&self) -> Result<[u8; 32], ShardError> {
        let (mut hasher, mut start, mut chunk) = (blake3::Hasher::new(), 0, Vec::with_capacity(CHUNK_BYTES));
        while start < self.bytes {
            chunk = self.chunk(start, chunk)?;
            if chunk.is_empty() {
                return Err(self.io(std::io::ErrorKind::UnexpectedEof.into()));
            }
            hasher.update(&chunk);
            start += chunk.len() as u64;
        }
        Ok(*hasher.finalize().as_bytes())
    }

    /// Copies the tensors that are wanted by their names into `part`, which is empty.
    ///
    /// # Errors
    /// [`ShardError`] if this is no whole safetensors file, or the part cannot be written.
    pub(crate) fn part(&self, mut part: Self, is_wanted: impl Fn(&str) -> bool) -> Result<Self, ShardError> {
        let mut file = &self.file;
        file.rewind().map_err(|e| self.io(e))?;
        let header = TensorHeader::read(&mut file, self.bytes).map_err(|e| header_error(e, |e| self.io(e)))?;
        let names: Vec<&str> = header.names().filter(|name| is_wanted(name)).collect();
        let infos = names.iter().filter_map(|&name| Some((name, header.info(name)?)));
        let infos = infos.map(|(name, info)| (name.to_owned(), info.dtype, info.shape.clone()));
        let mut out = BufWriter::with_capacity(CHUNK_BYTES, &part.file);
        let written = TensorHeader::write(&mut out, infos).map_err(|e| header_error(e, |e| part.io(e)))?;
        for name in names {
            header.each_part(&mut file, name, |e| self.io(e), |bytes| out.write_all(bytes).map_err(|e| part.io(e)))?;
        }
        out.flush().map_err(|e| part.io(e))?;
        drop(out);
        part.bytes = written.file_bytes();
        Ok(part)
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
        ShardError::Io { path: self.place.clone(), source }
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
