//! What the targets share: parameters from the first bytes, the payload from the rest.
#![allow(dead_code, reason = "no target uses all of it")]

use fusionllm_codec::{BitRate, Codec, CodecError, Density, TopKValues};

/// The next byte, or 0.
pub fn byte(input: &mut &[u8]) -> u8 {
    let (&first, rest) = input.split_first().unwrap_or((&0, &[]));
    *input = rest;
    first
}

/// A shape of at most 255 x 255 elements.
pub fn shape(input: &mut &[u8]) -> [usize; 2] {
    [byte(input).into(), byte(input).into()]
}

/// A share of entries and how they are written.
pub fn sparse(input: &mut &[u8]) -> (Density, TopKValues) {
    let ppm = u32::from_le_bytes([byte(input), byte(input), byte(input), 0]) % 1_000_000 + 1;
    let values = [TopKValues::F32, TopKValues::Bf16, TopKValues::Int8][usize::from(byte(input) % 3)];
    (Density::from_ppm(ppm).unwrap(), values)
}

/// Bits an element.
pub fn bits(input: &mut &[u8]) -> BitRate {
    let thousandths = u32::from(u16::from_le_bytes([byte(input), byte(input)])) % 7_991 + 10;
    BitRate::from_thousandths(thousandths).unwrap()
}

/// Decodes the rest as it is and, where that has another length, cut or repeated to the length which it should have.
pub fn decode(codec: Codec, shape: &[usize], payload: &[u8]) {
    let mut into = Vec::<f32>::new();
    let size = codec.encoded_bytes(shape).unwrap() as usize;
    if payload.len() != size {
        let refused = codec.decode_slice(shape, payload, &mut into);
        let is_length = matches!(refused, Err(CodecError::PayloadLength { .. }));
        assert!(is_length || matches!(codec, Codec::Transform { .. }));
    }
    let fitted: Vec<u8> =
        if payload.is_empty() { vec![1; size] } else { payload.iter().copied().cycle().take(size).collect() };
    if codec.decode_slice(shape, &fitted, &mut into).is_ok() {
        assert_eq!(into.len(), shape.iter().product::<usize>());
    }
}
