//! The codecs and their byte layouts (all little-endian, row-major, no header).
//!
//! | codec | bytes an element | loses |
//! |---|---|---|
//! | `dense` | 4 | nothing: IEEE 754 binary32, or two's-complement int32 |
//! | `bf16` | 2 | 16 low mantissa bits, rounded to nearest even |
//! | `f16` | 2 | 13 low mantissa bits, and range beyond 65504 becomes infinity |
//!
//! NaN stays NaN and infinity stays infinity in each of them.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::tensor::element_count;
use crate::{CodecError, ElementType, HostTensor, Values};

/// How a boundary tensor is encoded.
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
}

impl Codec {
    /// The codec's name in job files and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// The codec of that name.
    ///
    /// # Errors
    /// [`CodecError::UnknownCodec`] with the names there are.
    pub fn from_name(name: &str) -> Result<Self, CodecError> {
        [Self::Dense, Self::Bf16, Self::F16]
            .into_iter()
            .find(|c| c.name() == name)
            .ok_or_else(|| CodecError::UnknownCodec { name: name.to_owned() })
    }

    /// Whether decoding gives back exactly what was encoded.
    pub fn is_lossless(self) -> bool {
        matches!(self, Self::Dense)
    }

    /// Exact encoded size in bytes of a tensor of this shape.
    ///
    /// # Errors
    /// [`CodecError::ShapeOverflow`] if the shape is absurd.
    pub fn encoded_bytes(self, shape: &[usize]) -> Result<u64, CodecError> {
        Ok(element_count(shape)? * self.bytes_per_element())
    }

    /// Dense fp32 bytes over encoded bytes; at least 1.
    pub fn ratio(self) -> f64 {
        4.0 / self.bytes_per_element() as f64
    }

    fn bytes_per_element(self) -> u64 {
        match self {
            Self::Dense => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Appends the encoded tensor to `out`.
    ///
    /// # Errors
    /// [`CodecError::ElementType`] if an integer tensor meets a codec of reals.
    pub fn encode(self, tensor: &HostTensor, out: &mut Vec<u8>) -> Result<(), CodecError> {
        match (self, tensor.values()) {
            (Self::Dense, Values::F32(v)) => extend(out, v, |x| x.to_le_bytes()),
            (Self::Dense, Values::I32(v)) => extend(out, v, |x| x.to_le_bytes()),
            (Self::Bf16, Values::F32(v)) => extend(out, v, |x| bf16::from_f32(x).to_le_bytes()),
            (Self::F16, Values::F32(v)) => extend(out, v, |x| f16::from_f32(x).to_le_bytes()),
            (Self::Bf16 | Self::F16, Values::I32(_)) => {
                return Err(CodecError::ElementType { codec: self.name(), element: ElementType::I32 });
            }
        }
        Ok(())
    }

    /// Decodes a tensor whose shape and element type are known from elsewhere.
    ///
    /// # Errors
    /// A typed error for every byte string that is not an encoding of such a tensor; nothing is allocated
    /// before the length of `bytes` was held against the shape.
    pub fn decode(self, shape: &[usize], element: ElementType, bytes: &[u8]) -> Result<HostTensor, CodecError> {
        let expected = self.encoded_bytes(shape)?;
        if expected != bytes.len() as u64 {
            let (codec, got) = (self.name(), bytes.len() as u64);
            return Err(CodecError::PayloadLength { codec, shape: shape.to_vec(), expected, got });
        }
        let values = match (self, element) {
            (Self::Dense, ElementType::F32) => Values::F32(collect(bytes, f32::from_le_bytes)),
            (Self::Dense, ElementType::I32) => Values::I32(collect(bytes, i32::from_le_bytes)),
            (Self::Bf16, ElementType::F32) => Values::F32(collect(bytes, |b| bf16::from_le_bytes(b).to_f32())),
            (Self::F16, ElementType::F32) => Values::F32(collect(bytes, |b| f16::from_le_bytes(b).to_f32())),
            (Self::Bf16 | Self::F16, ElementType::I32) => {
                return Err(CodecError::ElementType { codec: self.name(), element });
            }
        };
        HostTensor::new(shape.to_vec(), values)
    }
}

fn extend<T: Copy, const N: usize>(out: &mut Vec<u8>, values: &[T], to_bytes: impl Fn(T) -> [u8; N]) {
    out.reserve(values.len() * N);
    out.extend(values.iter().flat_map(|&x| to_bytes(x)));
}

fn collect<T, const N: usize>(bytes: &[u8], from_bytes: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&c| from_bytes(c)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_codec() -> impl Strategy<Value = Codec> {
        prop_oneof![Just(Codec::Dense), Just(Codec::Bf16), Just(Codec::F16)]
    }

    proptest! {
        #[test]
        fn dense_round_trip_is_bit_exact(bits in prop::collection::vec(any::<u32>(), 0..200)) {
            let values: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
            let tensor = HostTensor::new(vec![values.len()], Values::F32(values)).unwrap();
            let mut bytes = Vec::new();
            Codec::Dense.encode(&tensor, &mut bytes).unwrap();
            let back = Codec::Dense.decode(tensor.shape(), ElementType::F32, &bytes).unwrap();
            let back_bits: Vec<u32> = back.as_f32().unwrap().iter().map(|x| x.to_bits()).collect();
            prop_assert_eq!(back_bits, bits);
        }

        #[test]
        fn integers_round_trip(values in prop::collection::vec(any::<i32>(), 0..200)) {
            let tensor = HostTensor::new(vec![values.len()], Values::I32(values)).unwrap();
            let mut bytes = Vec::new();
            Codec::Dense.encode(&tensor, &mut bytes).unwrap();
            prop_assert_eq!(Codec::Dense.decode(tensor.shape(), ElementType::I32, &bytes).unwrap(), tensor);
        }

        #[test]
        fn half_codecs_stay_within_their_precision(values in prop::collection::vec(-1e4f32..1e4, 1..100)) {
            let tensor = HostTensor::new(vec![values.len()], Values::F32(values.clone())).unwrap();
            for (codec, relative) in [(Codec::Bf16, 1.0 / 256.0), (Codec::F16, 1.0 / 2048.0)] {
                let mut bytes = Vec::new();
                codec.encode(&tensor, &mut bytes).unwrap();
                prop_assert_eq!(bytes.len() as u64, codec.encoded_bytes(tensor.shape()).unwrap());
                let back = codec.decode(tensor.shape(), ElementType::F32, &bytes).unwrap();
                for (a, b) in values.iter().zip(back.as_f32().unwrap()) {
                    prop_assert!((a - b).abs() <= a.abs() * relative + 1e-7);
                }
            }
        }

        #[test]
        fn decode_answers_any_bytes_with_a_value_or_an_error(
            codec in any_codec(),
            shape in prop::collection::vec(0usize..1 << 40, 0..4),
            bytes in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            if let Ok(tensor) = codec.decode(&shape, ElementType::F32, &bytes) {
                prop_assert_eq!(codec.encoded_bytes(tensor.shape()).unwrap(), bytes.len() as u64);
            }
        }
    }

    #[test]
    fn nan_and_infinity_survive_every_codec() {
        let tensor = HostTensor::new(vec![3], Values::F32(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY])).unwrap();
        for codec in [Codec::Dense, Codec::Bf16, Codec::F16] {
            let mut bytes = Vec::new();
            codec.encode(&tensor, &mut bytes).unwrap();
            let back = codec.decode(&[3], ElementType::F32, &bytes).unwrap();
            let v = back.as_f32().unwrap();
            assert!(v[0].is_nan() && v[1] == f32::INFINITY && v[2] == f32::NEG_INFINITY, "{}", codec.name());
        }
    }

    #[test]
    fn a_short_payload_names_what_was_expected() {
        let error = Codec::Bf16.decode(&[2, 3], ElementType::F32, &[0; 11]).unwrap_err();
        assert_eq!(error.to_string(), "bf16 payload of shape [2, 3] has 11 bytes, expected 12");
    }
}
