//! The basis of `transform`: orthonormal vectors that both ends make of the same rounded numbers.

use serde::{Deserialize, Serialize};

use super::quantize::{self, Width};
use super::subspace;
use crate::CodecError;

/// Vectors that are written as `int8`, since most of a tensor lies along them; the others are as `int4`.
const LEADING: usize = 16;

/// An orthonormal basis, as both ends of an edge hold it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Basis {
    /// By which messages refer to it.
    pub(crate) number: u32,
    /// Length of a vector.
    pub(crate) width: usize,
    /// Vector after vector, no number above 1 in magnitude.
    pub(crate) vectors: Vec<f32>,
}

impl Basis {
    /// Appends these vectors as they are sent, and answers what both ends make of that.
    pub(crate) fn write(number: u32, width: usize, vectors: &[f32], out: &mut Vec<u8>) -> Self {
        let (leading, others) = vectors.split_at(vectors.len().min(LEADING * width));
        let start = out.len();
        quantize::encode(Width::Int8, leading, out);
        quantize::encode(Width::Int4, others, out);
        // What was just written is sound, and would be no basis rather than a wrong one if not.
        Self::read(number, width, vectors.len() / width, &out[start..]).unwrap_or_else(|error| {
            debug_assert!(false, "{error}");
            Self { number, width, vectors: Vec::new() }
        })
    }

    /// Of `rank` vectors; `bytes` are [`basis_bytes`] in number.
    pub(crate) fn read(number: u32, width: usize, rank: usize, bytes: &[u8]) -> Result<Self, CodecError> {
        let leading = rank.min(LEADING) * width;
        let (first, rest) = bytes.split_at(Width::Int8.bytes(leading as u64) as usize);
        let (mut vectors, mut others) = (Vec::new(), Vec::new());
        quantize::decode(Width::Int8, leading, first, &mut vectors)?;
        quantize::decode(Width::Int4, rank * width - leading, rest, &mut others)?;
        vectors.append(&mut others);
        subspace::orthonormalise(&mut vectors, width);
        Ok(Self { number, width, vectors })
    }

    /// Number of vectors.
    pub(crate) fn rank(&self) -> usize {
        self.vectors.len() / self.width.max(1)
    }

    /// Whether this can be a basis; asked of what comes from a file.
    pub(crate) fn is_sound(&self) -> bool {
        let is_whole = self.width > 0 && self.vectors.len().is_multiple_of(self.width);
        is_whole && self.rank() <= self.width && self.vectors.iter().all(|x| x.abs() <= 1.0)
    }

    /// Bytes of memory that it holds.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.vectors.capacity() * size_of::<f32>()
    }
}

/// Bytes of `rank` vectors as they are sent.
pub(crate) fn basis_bytes(rank: usize, width: usize) -> u64 {
    let leading = rank.min(LEADING);
    Width::Int8.bytes((leading * width) as u64) + Width::Int4.bytes(((rank - leading) * width) as u64)
}
