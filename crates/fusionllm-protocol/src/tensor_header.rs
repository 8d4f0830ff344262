//! The header of a safetensors file: which tensors it has, and where. Values are read and written one tensor after the
//! other, by whoever has the file.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};

use fusionllm_graph::in_plain_words;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

/// Longest header that is read; that of GPT-2 xl with optimizer state has 300 KB.
pub const MAX_HEADER_BYTES: u64 = 64 << 20;

/// Bytes of a tensor that are in memory at once.
const PART_BYTES: usize = 1 << 20;

/// Bytes that say how long the header is.
const LENGTH_BYTES: u64 = 8;

/// Why a header cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorHeaderError {
    /// The file does not read or write.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// It is no header of such a file.
    #[error("{reason}")]
    Format {
        /// What is wrong with the header.
        reason: String,
    },
}

/// The header of a safetensors file.
#[derive(Debug)]
pub struct TensorHeader {
    data_start: u64,
    data_end: u64,
    tensors: BTreeMap<String, TensorInfo>,
}

impl TensorHeader {
    /// Reads the header from the start of a file of `length` bytes, which must be just what the header says.
    ///
    /// # Errors
    /// [`TensorHeaderError`] if it does not read, or is none.
    pub fn read(file: &mut impl Read, length: u64) -> Result<Self, TensorHeaderError> {
        if length < LENGTH_BYTES {
            return Err(format(format!("it has {length} bytes, too few for a header")));
        }
        let mut size = [0; LENGTH_BYTES as usize];
        file.read_exact(&mut size)?;
        if &size == b"version " {
            let reason = "it is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`";
            return Err(format(reason.to_owned()));
        }
        let bytes = u64::from_le_bytes(size);
        if bytes > MAX_HEADER_BYTES || bytes > length - LENGTH_BYTES {
            return Err(format(format!("its header would have {bytes} bytes, the file has {length}")));
        }
        let mut header = vec![0; bytes as usize];
        file.read_exact(&mut header)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| format(in_plain_words("", &e.to_string())))?;
        let header = Self::of(&metadata, LENGTH_BYTES + bytes);
        if header.data_end != length {
            return Err(format(format!("it has {length} bytes, its header says {}", header.data_end)));
        }
        Ok(header)
    }

    /// Writes the header of a file in which the values of these tensors follow in this order.
    ///
    /// # Errors
    /// [`TensorHeaderError`] if it does not write, or two tensors have one name.
    pub fn write(
        out: &mut impl Write,
        tensors: impl IntoIterator<Item = (String, Dtype, Vec<usize>)>,
    ) -> Result<Self, TensorHeaderError> {
        let mut end = 0;
        let mut infos: Vec<(String, TensorInfo)> = Vec::new();
        for (name, dtype, shape) in tensors {
            let start = end;
            end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
            infos.push((name, TensorInfo { dtype, shape, data_offsets: (start, end) }));
        }
        let count = infos.len();
        let metadata = Metadata::new(None, infos).map_err(|e| format(in_plain_words("", &e.to_string())))?;
        if metadata.tensors().len() != count {
            return Err(format("two tensors have one name".to_owned()));
        }
        let mut text = serde_json::to_vec(&metadata).map_err(|e| format(in_plain_words("", &e.to_string())))?;
        // Readers want the values aligned.
        text.resize(text.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
        out.write_all(&(text.len() as u64).to_le_bytes())?;
        out.write_all(&text)?;
        Ok(Self::of(&metadata, LENGTH_BYTES + text.len() as u64))
    }

    fn of(metadata: &Metadata, data_start: u64) -> Self {
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Self { data_start, data_end: data_start.saturating_add(metadata.data_len() as u64), tensors }
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.data_end
    }

    /// Names of the tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape and type of a tensor; its offsets count from the end of the header.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Where in the file a tensor's values begin, and how many bytes they have.
    fn place(&self, name: &str) -> Option<(u64, usize)> {
        let (start, end) = self.info(name)?.data_offsets;
        Some((self.data_start + start as u64, end - start))
    }

    /// Reads a tensor's bytes out of the file and hands them to `take` part by part: all but the last have 1 MiB. Whether
    /// there is such a tensor.
    ///
    /// # Errors
    /// What `unreadable` makes of an error of the file, and what `take` gives.
    pub fn each_part<E>(
        &self,
        file: &mut (impl Read + Seek),
        name: &str,
        unreadable: impl Fn(std::io::Error) -> E,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<bool, E> {
        let Some((start, mut left)) = self.place(name) else { return Ok(false) };
        file.seek(SeekFrom::Start(start)).map_err(&unreadable)?;
        let mut buffer = vec![0; PART_BYTES.min(left)];
        while left > 0 {
            let length = buffer.len().min(left);
            let part = buffer.get_mut(..length).unwrap_or_default();
            file.read_exact(part).map_err(&unreadable)?;
            take(part)?;
            left -= length;
        }
        Ok(true)
    }
}

fn format(reason: String) -> TensorHeaderError {
    TensorHeaderError::Format { reason }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn what_is_written_is_read_by_this_and_by_the_library() {
        let mut file = Vec::new();
        let tensors = [("b", Dtype::F32, vec![2, 3]), ("a", Dtype::BF16, vec![5]), ("none", Dtype::F32, vec![0])];
        let written =
            TensorHeader::write(&mut file, tensors.map(|(name, dtype, shape)| (name.to_owned(), dtype, shape)))
                .unwrap();
        file.resize(written.file_bytes() as usize, 7);
        let read = TensorHeader::read(&mut file.as_slice(), file.len() as u64).unwrap();
        assert_eq!(read.names().collect::<Vec<_>>(), ["a", "b", "none"]);
        let theirs = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(theirs.tensor("b").unwrap().shape(), read.info("b").unwrap().shape);
        let (start, bytes) = read.place("a").unwrap();
        assert_eq!((start + bytes as u64, bytes), (file.len() as u64, 10));
        let (mut values, mut cursor) = (Vec::new(), std::io::Cursor::new(&file));
        let is_there = read.each_part(
            &mut cursor,
            "b",
            |e| e,
            |part| {
                values.extend_from_slice(part);
                Ok(())
            },
        );
        assert!(is_there.unwrap());
        assert_eq!(values, [7; 24]);
        assert!(!read.each_part(&mut cursor, "c", |e| e, |_| Ok(())).unwrap());
        assert!(TensorHeader::read(&mut file.as_slice(), file.len() as u64 + 1).is_err());
        let twice = ["a", "a"].map(|name| (name.to_owned(), Dtype::F32, vec![1]));
        assert!(TensorHeader::write(&mut Vec::new(), twice).is_err());
    }
}
