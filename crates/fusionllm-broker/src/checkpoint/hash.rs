//! Hashes of shards: of files, and of bytes as they come in, which are searched for what must not be kept.

use std::io::Read;
use std::path::Path;

use fusionllm_protocol::{MAX_HEADER_BYTES, ShardEntry};
use safetensors::tensor::Metadata;

use super::tensor_file::{COPY_BYTES, io, open};
use crate::CheckpointError;

/// The exponent of an f32; all ones in infinities and in what is not a number.
const EXPONENT: u32 = 0x7f80_0000;

/// Holds a shard's file against its hash in the manifest.
pub(super) fn check(path: &Path, shard: &ShardEntry) -> Result<(), CheckpointError> {
    let (expected, got) = if shard.blake3.is_empty() {
        let mut hash = Fnv1a::default();
        read_all(path, |bytes| hash.update(bytes))?;
        (&shard.fnv1a, hash.hex())
    } else {
        let mut hash = blake3::Hasher::new();
        read_all(path, |bytes| {
            hash.update(bytes);
        })?;
        (&shard.blake3, hash.finalize().to_hex().to_string())
    };
    if got == *expected {
        return Ok(());
    }
    Err(CheckpointError::Hash { path: path.to_owned(), expected: expected.clone(), got })
}

/// Hands out a file piece by piece.
fn read_all(path: &Path, mut take: impl FnMut(&[u8])) -> Result<(), CheckpointError> {
    let mut file = open(path)?;
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let count = file.read(&mut buffer).map_err(|e| io(path, e))?;
        if count == 0 {
            return Ok(());
        }
        take(buffer.get(..count).unwrap_or_default());
    }
}

/// 64-bit FNV-1a: what shards of version 0.1.0 have.
#[derive(Clone, Copy, Debug)]
struct Fnv1a(u64);

impl Default for Fnv1a {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv1a {
    fn update(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    }

    fn hex(self) -> String {
        format!("{:016x}", self.0)
    }
}

/// The hash of a shard as it comes in, and the place of the first value in it that is not finite.
#[derive(Debug, Default)]
pub(crate) struct ShardHash {
    hasher: blake3::Hasher,
    /// Length and header, until they are whole.
    header: Vec<u8>,
    /// Bytes of data so far.
    data: u64,
    /// The bytes of an f32 of which the rest is still to come.
    begun: Vec<u8>,
    /// Where in the data the first value lies that is not finite.
    not_finite: Option<u64>,
}

impl ShardHash {
    /// The next bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        let rest = self.take_header(bytes);
        self.search(rest);
    }

    /// Keeps what belongs to the header. Gives the rest.
    fn take_header<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let mut bytes = bytes;
        while let Some(missing) = self.header_missing().filter(|&missing| missing > 0) {
            if bytes.is_empty() {
                return bytes;
            }
            let (now, later) = bytes.split_at(bytes.len().min(missing));
            self.header.extend_from_slice(now);
            bytes = later;
        }
        bytes
    }

    /// How many bytes the header lacks. Nothing if it cannot be one; opening the file will say so.
    fn header_missing(&self) -> Option<usize> {
        match self.header.first_chunk() {
            None => Some(8 - self.header.len()),
            Some(&length) => {
                let length = u64::from_le_bytes(length);
                (length <= MAX_HEADER_BYTES).then(|| (8 + length as usize).saturating_sub(self.header.len()))
            }
        }
    }

    fn search(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if !self.begun.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(4 - self.begun.len()));
            self.begun.extend_from_slice(now);
            bytes = later;
            if let Some(&value) = self.begun.first_chunk() {
                self.search_values(&[value]);
                self.begun.clear();
            }
        }
        let (values, begun) = bytes.as_chunks();
        self.search_values(values);
        self.begun.extend_from_slice(begun);
    }

    fn search_values(&mut self, values: &[[u8; 4]]) {
        let is_bad = |value: &[u8; 4]| u32::from_le_bytes(*value) & EXPONENT == EXPONENT;
        // The sum over all first: it is made many values at a time.
        if self.not_finite.is_none() && values.iter().fold(false, |bad, value| bad | is_bad(value)) {
            let first = values.iter().position(is_bad).unwrap_or_default();
            self.not_finite = Some(self.data + 4 * first as u64);
        }
        self.data += 4 * values.len() as u64;
    }

    /// The hash in hexadecimal, and the name of a tensor with values that are not finite.
    pub(crate) fn finish(self) -> (String, Option<String>) {
        let name = self.not_finite.map(|at| {
            let metadata: Option<Metadata> =
                self.header.get(8..).and_then(|header| serde_json::from_slice(header).ok());
            let tensors = metadata.map(|m| m.tensors().into_iter().map(|(n, i)| (n, i.data_offsets)).collect());
            let tensors: Vec<(String, (usize, usize))> = tensors.unwrap_or_default();
            let holds = |(_, (start, end)): &(String, (usize, usize))| (*start as u64..*end as u64).contains(&at);
            tensors.into_iter().find(holds).map_or_else(|| "a tensor".to_owned(), |(name, _)| name)
        });
        (self.hasher.finalize().to_hex().to_string(), name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn the_hash_is_the_published_one() {
        let mut hash = Fnv1a::default();
        hash.update(b"foobar");
        assert_eq!(hash.hex(), "85944171f73967e8");
    }

    #[test]
    fn what_is_not_finite_is_found_however_the_bytes_are_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        testing::write_tensors(&path, &[("a".to_owned(), vec![3]), ("b".to_owned(), vec![5])]);
        let clean = std::fs::read(&path).unwrap();
        let hash = |bytes: &[u8], piece: usize| {
            let mut hash = ShardHash::default();
            bytes.chunks(piece).for_each(|piece| hash.update(piece));
            hash.finish()
        };
        let data = clean.len() - 32;
        for (at, name) in [(0, "a"), (2, "a"), (3, "b"), (7, "b")] {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut bytes = clean.clone();
                bytes[data + 4 * at..data + 4 * at + 4].copy_from_slice(&value.to_le_bytes());
                for piece in [1, 3, 7, 64, 4096] {
                    assert_eq!(hash(&bytes, piece).1.as_deref(), Some(name), "{value} at {at} in pieces of {piece}");
                }
            }
        }
        for piece in [1, 5, 4096] {
            assert_eq!(hash(&clean, piece), (blake3::hash(&clean).to_hex().to_string(), None));
        }
        // What is no shard at all is not our question here.
        assert_eq!(hash(&[0xff; 40], 7).1, Some("a tensor".to_owned()));
    }
}
