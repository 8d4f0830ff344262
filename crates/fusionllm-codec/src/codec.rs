//! The codecs, their sizes, and encoding without state.
//!
//! | codec | bytes an element, nearly | loses |
//! |---|---|---|
//! | `dense` | 4 | nothing: IEEE 754 binary32, or two's-complement int32 |
//! | `bf16` | 2 | 16 low mantissa bits, rounded to nearest even |
//! | `f16` | 2 | 13 low mantissa bits, and range beyond 65504 becomes infinity |
//! | `int8` | 1.03 | all but 255 steps of the largest magnitude of 64 neighbours |
//! | `int4` | 0.53 | all but 15 such steps |
//! | `topk` at 1 % | 0.051, 0.031, 0.021 with f32, bf16, int8 values | all but the entries of largest magnitude |
//! | `transform` of b bits | b/8 at the most, and the basis when it is sent | of a row's coefficients in a basis that follows the tensor, what is below a step |
//!
//! All bytes are little-endian and elements row-major. `dense`, `bf16` and `f16` have no header, and keep NaN and
//! infinity. Payloads of the others begin with a layout version; their modules under `codecs`, and
//! docs/codecs.md, have layouts and what becomes of NaN and infinity.

mod notation;

use serde::{Deserialize, Serialize};

use crate::codecs::plain::{collect, collect_f16, extend, extend_f16, from_bf16, to_bf16};
use crate::codecs::quantize::{self, Width};
use crate::codecs::{Scratch, take_version, topk, transform};
use crate::tensor::element_count;
use crate::{BitRate, CodecError, Density, ElementType, HostTensor, Real, TopKValues, Values};

/// How a boundary tensor is encoded.
///
/// Its text form (`topk:0.01:bf16`) is what [`Display`](std::fmt::Display) writes and
/// [`FromStr`](std::str::FromStr) reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Codec {
    /// Every element as it is.
    #[default]
    Dense,
    /// bfloat16: float32's range, 8 bits of precision.
    Bf16,
    /// IEEE 754 binary16.
    F16,
    /// 8-bit integers with a scale for each block of 64.
    Int8,
    /// 4-bit integers with a scale for each block of 64.
    Int4,
    /// The entries of largest magnitude, zero elsewhere.
    TopK {
        /// Share of entries that are kept.
        density: Density,
        /// How their values are written.
        values: TopKValues,
    },
    /// Transform coding: coefficients of the rows (last dimension) in an orthonormal basis that both ends hold, rounded
    /// to as coarse a step as the bits ask for, and entropy coded. Needs [`EdgeEncoder`](crate::EdgeEncoder) and
    /// [`EdgeDecoder`](crate::EdgeDecoder) to be small: without their memory each payload carries the basis.
    Transform {
        /// Bits an element at the most, without the basis.
        bits: BitRate,
    },
}

/// The shape for which [`Codec::ratio`] speaks.
const TYPICAL: [usize; 2] = [1 << 14, 1 << 10];

impl Codec {
    /// The codec's family in job files and metrics: its text without parameters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::TopK { .. } => "topk",
            Self::Transform { .. } => "transform",
        }
    }

    /// The codec of that text, as [`str::parse`].
    ///
    /// # Errors
    /// [`CodecError::UnknownCodec`] with the forms there are, [`CodecError::Density`] for a wrong share.
    pub fn from_name(name: &str) -> Result<Self, CodecError> {
        name.parse()
    }

    /// Whether decoding gives back exactly what was encoded.
    pub fn is_lossless(self) -> bool {
        matches!(self, Self::Dense)
    }

    /// Size in bytes of a tensor of this shape as [`Self::encode`] writes it, whatever its values: of `transform` the
    /// most that it can have, with the basis, of the others the exact size.
    ///
    /// # Errors
    /// [`CodecError::ShapeOverflow`] if the shape is absurd: above 2^48 elements, and from 2^32 on for `topk` and
    /// `transform`.
    pub fn encoded_bytes(self, shape: &[usize]) -> Result<u64, CodecError> {
        self.bytes(shape, true)
    }

    /// Size in bytes of a tensor of this shape, at the most, once both ends hold the basis; of codecs without a basis
    /// the same as [`Self::encoded_bytes`].
    ///
    /// # Errors
    /// As [`Self::encoded_bytes`].
    pub fn steady_bytes(self, shape: &[usize]) -> Result<u64, CodecError> {
        self.bytes(shape, false)
    }

    fn bytes(self, shape: &[usize], with_basis: bool) -> Result<u64, CodecError> {
        let n = element_count(shape)?;
        let overflow = || CodecError::ShapeOverflow { shape: shape.to_vec() };
        let indexed = || if n <= u64::from(u32::MAX) { Ok(n) } else { Err(overflow()) };
        Ok(match self {
            Self::Dense => 4 * n,
            Self::Bf16 | Self::F16 => 2 * n,
            Self::Int8 => 1 + Width::Int8.bytes(n),
            Self::Int4 => 1 + Width::Int4.bytes(n),
            Self::TopK { density, values } => topk::bytes(indexed()?, density, values),
            Self::Transform { bits } => {
                indexed()?;
                transform::bytes(shape, bits, with_basis)
            }
        })
    }

    /// Dense fp32 bytes over [`Self::steady_bytes`] of a tensor of 16,384 rows of 1,024 elements; nearly that
    /// of any large tensor. Below 1 where a sparse codec keeps too much to save.
    pub fn ratio(self) -> f64 {
        self.ratio_of(&TYPICAL).unwrap_or(1.0)
    }

    /// Dense fp32 bytes over [`Self::steady_bytes`] of a tensor of this shape; 1 if it has no elements.
    ///
    /// # Errors
    /// As [`Self::encoded_bytes`].
    pub fn ratio_of(self, shape: &[usize]) -> Result<f64, CodecError> {
        let (dense, bytes) = (Self::Dense.steady_bytes(shape)?, self.steady_bytes(shape)?);
        Ok(if dense == 0 { 1.0 } else { dense as f64 / bytes as f64 })
    }

    /// Appends the encoded tensor to `out`.
    ///
    /// # Errors
    /// [`CodecError::ElementType`] if an integer tensor meets a codec of reals.
    pub fn encode(self, tensor: &HostTensor, out: &mut Vec<u8>) -> Result<(), CodecError> {
        match (self, tensor.values()) {
            (_, Values::F32(values)) => self.encode_slice(tensor.shape(), values, out),
            (Self::Dense, Values::I32(values)) => {
                extend(out, values, i32::to_le_bytes);
                Ok(())
            }
            (_, Values::I32(_)) => Err(CodecError::ElementType { codec: self.name(), element: ElementType::I32 }),
        }
    }

    /// Decodes a tensor whose shape and element type are known from elsewhere.
    ///
    /// # Errors
    /// A typed error for every byte string that is not an encoding of such a tensor; nothing is allocated
    /// before the length of `bytes` was held against the shape.
    pub fn decode(self, shape: &[usize], element: ElementType, bytes: &[u8]) -> Result<HostTensor, CodecError> {
        let values = match (self, element) {
            (_, ElementType::F32) => {
                let mut values = Vec::<f32>::new();
                self.decode_slice(shape, bytes, &mut values)?;
                Values::F32(values)
            }
            (Self::Dense, ElementType::I32) => {
                self.check_length(shape, bytes)?;
                let mut values = Vec::new();
                collect(bytes, &mut values, i32::from_le_bytes);
                Values::I32(values)
            }
            (_, ElementType::I32) => return Err(CodecError::ElementType { codec: self.name(), element }),
        };
        HostTensor::new(shape.to_vec(), values)
    }

    /// Appends the encoding of row-major `values` to `out`.
    ///
    /// # Errors
    /// [`CodecError::ValueCount`] if the values do not fill the shape, [`CodecError::ShapeOverflow`].
    pub fn encode_slice<E: Real>(self, shape: &[usize], values: &[E], out: &mut Vec<u8>) -> Result<(), CodecError> {
        let mut scratch = Scratch::default();
        match E::as_f32(values) {
            Some(values) => self.encode_f32(shape, values, &mut scratch, out),
            None => {
                let wide: Vec<f32> = values.iter().map(|x| x.to_f32()).collect();
                self.encode_f32(shape, &wide, &mut scratch, out)
            }
        }
    }

    /// Replaces `into` by the tensor that `bytes` encode. After an error `into` holds nothing of worth.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_slice<E: Real>(self, shape: &[usize], bytes: &[u8], into: &mut Vec<E>) -> Result<(), CodecError> {
        let mut scratch = Scratch::default();
        match E::as_f32_vec(into) {
            Some(into) => self.decode_f32(shape, bytes, &mut scratch, into),
            None => {
                let mut wide = Vec::new();
                self.decode_f32(shape, bytes, &mut scratch, &mut wide)?;
                into.clear();
                into.extend(wide.into_iter().map(E::from_f32));
                Ok(())
            }
        }
    }

    /// [`Self::encode_slice`] in reused memory.
    pub(crate) fn encode_f32(
        self,
        shape: &[usize],
        values: &[f32],
        scratch: &mut Scratch,
        out: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        let size = self.encoded_bytes(shape)?;
        let (expected, got) = (element_count(shape)?, values.len() as u64);
        if expected != got {
            return Err(CodecError::ValueCount { shape: shape.to_vec(), expected, got });
        }
        out.reserve(usize::try_from(size).map_err(|_| CodecError::ShapeOverflow { shape: shape.to_vec() })?);
        match self {
            Self::Dense => extend(out, values, f32::to_le_bytes),
            Self::Bf16 => extend(out, values, |x| to_bf16(x).to_le_bytes()),
            Self::F16 => extend_f16(out, values),
            Self::Int8 | Self::Int4 => {
                out.push(quantize::VERSION);
                quantize::encode(self.width(), values, out);
            }
            Self::TopK { density, values: form } => topk::encode(density, form, values, &mut scratch.topk, out),
            Self::Transform { bits } => {
                let layout = transform::Layout::of(shape, bits);
                let (mut sender, policy) = (transform::Sender::default(), transform::Policy::default());
                sender.encode(layout, policy, values, &mut scratch.transform, out)?;
            }
        }
        Ok(())
    }

    /// [`Self::decode_slice`] in reused memory.
    pub(crate) fn decode_f32(
        self,
        shape: &[usize],
        bytes: &[u8],
        scratch: &mut Scratch,
        into: &mut Vec<f32>,
    ) -> Result<(), CodecError> {
        let n = self.check_length(shape, bytes)?;
        match self {
            Self::Dense => collect(bytes, into, f32::from_le_bytes),
            Self::Bf16 => collect(bytes, into, |b| from_bf16(u16::from_le_bytes(b))),
            Self::F16 => collect_f16(bytes, into),
            Self::Int8 | Self::Int4 => {
                let rest = take_version(self.name(), quantize::VERSION, bytes)?;
                quantize::decode(self.width(), n, rest, into)?;
            }
            Self::TopK { density, values } => topk::decode(n, density, values, bytes, &mut scratch.topk, into)?,
            Self::Transform { bits } => {
                let layout = transform::Layout::of(shape, bits);
                transform::decode(shape, layout, bytes, &mut None, &mut scratch.transform, into)?;
            }
        }
        Ok(())
    }

    fn width(self) -> Width {
        if self == Self::Int4 { Width::Int4 } else { Width::Int8 }
    }

    /// Holds the length of a payload against the shape, and answers the number of elements.
    pub(crate) fn check_length(self, shape: &[usize], bytes: &[u8]) -> Result<usize, CodecError> {
        let (expected, got) = (self.encoded_bytes(shape)?, bytes.len() as u64);
        let (codec, shape_of) = (self.name(), || shape.to_vec());
        match self {
            Self::Transform { .. } if got > expected => {
                return Err(CodecError::PayloadTooLong { codec, shape: shape_of(), most: expected, got });
            }
            Self::Transform { .. } => {}
            _ if got != expected => return Err(CodecError::PayloadLength { codec, shape: shape_of(), expected, got }),
            _ => {}
        }
        usize::try_from(element_count(shape)?).map_err(|_| CodecError::ShapeOverflow { shape: shape.to_vec() })
    }
}

#[cfg(test)]
mod tests;
