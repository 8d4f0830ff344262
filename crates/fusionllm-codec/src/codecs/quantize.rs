//! `int8` and `int4`: blocks of 64 elements in row-major order, each with one scale.
//!
//! | section | bytes | content |
//! |---|---|---|
//! | version | 1 | 1 |
//! | scales | 2 a block | bfloat16, not negative, one for each started block of 64 elements |
//! | codes, int8 | 1 an element | two's complement, value = code × scale |
//! | codes, int4 | half, rounded up for each block | two's complement nibbles: of the `m` elements of a block, byte `j` holds element `j` low and element `j + ⌈m/2⌉` high; a missing last one is 0 |
//!
//! The scale is the largest finite magnitude of the block over 127 (over 7), rounded *up* to bfloat16 and at
//! least 2^-126, so that no element is cut; 0 if that magnitude is 0. A finite element comes back within half a
//! scale, except that beyond 127/128 (7/8) of the f32 range it may saturate. Codes are rounded to nearest even.
//!
//! NaN becomes 0. Infinity becomes the largest code of its sign, so 0 in a block without finite magnitudes.
//! A bfloat16 scale costs 1/32 byte an element, half of what f32 costs, and makes the error at most 1/128 larger.

use multiversion::multiversion;

use super::plain::from_bf16;

use crate::CodecError;

/// Elements that share one scale.
pub(crate) const BLOCK: usize = 64;
/// Layout version of `int8` and `int4`.
pub(crate) const VERSION: u8 = 1;

const MAGNITUDE: u32 = 0x7fff_ffff;
const INFINITY: i32 = 0x7f80_0000;
/// Adding it to a small number leaves that number, rounded to nearest even, in the low bits.
const ROUNDER: f32 = 12_582_912.0;

/// How many bits a code has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    Int8,
    Int4,
}

impl Width {
    fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// Largest code.
    #[inline(always)]
    fn most(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::Int4 => 7.0,
        }
    }

    /// Bits of the largest bfloat16 scale whose product with any code is finite.
    #[inline(always)]
    fn largest_scale(self) -> u16 {
        match self {
            Self::Int8 => 0x7bff,
            Self::Int4 => 0x7dff,
        }
    }

    fn code_bytes(self, n: u64) -> u64 {
        match self {
            Self::Int8 => n,
            Self::Int4 => n.div_ceil(2),
        }
    }

    /// Bytes of scales and codes of `n` elements, without the version.
    pub(crate) fn bytes(self, n: u64) -> u64 {
        2 * n.div_ceil(BLOCK as u64) + self.code_bytes(n)
    }
}

/// Appends scales and codes.
pub(crate) fn encode(width: Width, values: &[f32], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + width.bytes(values.len() as u64) as usize, 0);
    let (scales, codes) = out[start..].split_at_mut(2 * values.len().div_ceil(BLOCK));
    encode_blocks(width, values, scales.as_chunks_mut::<2>().0, codes);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn encode_blocks(width: Width, values: &[f32], scales: &mut [[u8; 2]], codes: &mut [u8]) {
    match width {
        Width::Int8 => {
            for ((block, codes), scale) in values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(scales) {
                // A length that the compiler knows makes the loops of a whole block straight.
                match (block.as_array::<BLOCK>(), codes.as_mut_array::<BLOCK>()) {
                    (Some(block), Some(codes)) => encode_int8(block, codes, scale),
                    _ => encode_int8(block, codes, scale),
                }
            }
        }
        Width::Int4 => {
            for ((block, codes), scale) in values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK / 2)).zip(scales) {
                match (block.as_array::<BLOCK>(), codes.as_mut_array::<{ BLOCK / 2 }>()) {
                    (Some(block), Some(codes)) => encode_int4(block, codes, scale),
                    _ => encode_int4(block, codes, scale),
                }
            }
        }
    }
}

#[inline(always)]
fn encode_int8(block: &[f32], codes: &mut [u8], scale: &mut [u8; 2]) {
    let inverse = write_scale(Width::Int8, block, scale);
    for (code, &value) in codes.iter_mut().zip(block) {
        *code = quantize(value, inverse, Width::Int8.most());
    }
}

#[inline(always)]
fn encode_int4(block: &[f32], codes: &mut [u8], scale: &mut [u8; 2]) {
    let inverse = write_scale(Width::Int4, block, scale);
    let (low, high) = block.split_at(block.len().div_ceil(2));
    for (code, &value) in codes.iter_mut().zip(low) {
        *code = quantize(value, inverse, Width::Int4.most()) & 0x0f;
    }
    for (code, &value) in codes.iter_mut().zip(high) {
        *code |= quantize(value, inverse, Width::Int4.most()) << 4;
    }
}

/// Writes the scale of a block and answers its inverse.
#[inline(always)]
fn write_scale(width: Width, block: &[f32], scale: &mut [u8; 2]) -> f32 {
    let largest = largest_finite(block);
    if largest == 0 {
        *scale = [0, 0];
        return 0.0;
    }
    let exact = f32::from_bits(largest) / width.most();
    let up = (exact.max(f32::MIN_POSITIVE).to_bits() + 0xffff) >> 16;
    let bits = (up as u16).min(width.largest_scale());
    *scale = bits.to_le_bytes();
    1.0 / from_bf16(bits)
}

/// Bits of the largest finite magnitude, in lanes that the compiler makes vectors of.
#[inline(always)]
fn largest_finite(block: &[f32]) -> u32 {
    // Signed, as the oldest vector instructions compare no unsigned integers.
    let finite = |x: f32| {
        let magnitude = (x.to_bits() & MAGNITUDE) as i32;
        magnitude & -i32::from(magnitude < INFINITY)
    };
    let (chunks, rest) = block.as_chunks::<16>();
    let mut lanes = [0; 16];
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = finite(x).max(*lane);
        }
    }
    let rest = rest.iter().fold(0, |largest, &x| finite(x).max(largest));
    lanes.into_iter().fold(rest, i32::max) as u32
}

#[inline(always)]
fn quantize(value: f32, inverse: f32, most: f32) -> u8 {
    let scaled = value * inverse;
    // NaN, and infinity where the scale is 0.
    let scaled = if scaled.is_nan() { 0.0 } else { scaled };
    let scaled = if scaled > most { most } else { scaled };
    let scaled = if scaled < -most { -most } else { scaled };
    (scaled + ROUNDER).to_bits() as u8
}

/// Replaces `into` by `n` elements. `bytes` are scales and codes, of the length that [`Width::bytes`] says.
pub(crate) fn decode(width: Width, n: usize, bytes: &[u8], into: &mut Vec<f32>) -> Result<(), CodecError> {
    let corrupt = |what| CodecError::Corrupt { codec: width.name(), what };
    if bytes.len() as u64 != width.bytes(n as u64) {
        return Err(corrupt("scales and codes have a wrong length"));
    }
    let (scales, codes) = bytes.split_at(2 * n.div_ceil(BLOCK));
    let scales = scales.as_chunks::<2>().0;
    // A set sign bit is above every scale too.
    if scales.iter().any(|&s| u16::from_le_bytes(s) > width.largest_scale()) {
        return Err(corrupt("a scale is negative, too large or not finite"));
    }
    if width == Width::Int4 && n % 2 == 1 && codes.last().is_some_and(|&c| c > 0x0f) {
        return Err(corrupt("the last half byte is not zero"));
    }
    into.clear();
    into.resize(n, 0.0);
    decode_blocks(width, scales, codes, into);
    Ok(())
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn decode_blocks(width: Width, scales: &[[u8; 2]], codes: &[u8], into: &mut [f32]) {
    match width {
        Width::Int8 => {
            for ((block, codes), &scale) in into.chunks_mut(BLOCK).zip(codes.chunks(BLOCK)).zip(scales) {
                let scale = from_bf16(u16::from_le_bytes(scale));
                for (value, &code) in block.iter_mut().zip(codes) {
                    *value = f32::from(code as i8) * scale;
                }
            }
        }
        Width::Int4 => {
            for ((block, codes), &scale) in into.chunks_mut(BLOCK).zip(codes.chunks(BLOCK / 2)).zip(scales) {
                let scale = from_bf16(u16::from_le_bytes(scale));
                let (low, high) = block.split_at_mut(block.len().div_ceil(2));
                for (value, &code) in low.iter_mut().zip(codes) {
                    *value = f32::from((code << 4) as i8 >> 4) * scale;
                }
                for (value, &code) in high.iter_mut().zip(codes) {
                    *value = f32::from(code as i8 >> 4) * scale;
                }
            }
        }
    }
}
