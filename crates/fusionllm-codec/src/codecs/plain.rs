//! `dense`, `bf16` and `f16`: every element by itself, without version or header.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Appends the little-endian bytes of each element.
pub(crate) fn extend<T: Copy, const N: usize>(out: &mut Vec<u8>, values: &[T], to_bytes: impl Fn(T) -> [u8; N]) {
    let start = out.len();
    out.resize(start + values.len() * N, 0);
    let (chunks, _) = out[start..].as_chunks_mut::<N>();
    for (chunk, &value) in chunks.iter_mut().zip(values) {
        *chunk = to_bytes(value);
    }
}

/// Replaces `into` by the elements of `bytes`; bytes beyond the last whole element are ignored.
pub(crate) fn collect<T, const N: usize>(bytes: &[u8], into: &mut Vec<T>, from_bytes: impl Fn([u8; N]) -> T) {
    into.clear();
    into.extend(bytes.as_chunks::<N>().0.iter().map(|&c| from_bytes(c)));
}

/// Elements that `half` converts at a time, with the machine's instructions where it has them.
const GROUP: usize = 256;

/// Appends the elements as binary16.
pub(crate) fn extend_f16(out: &mut Vec<u8>, values: &[f32]) {
    let mut halves = [f16::ZERO; GROUP];
    for group in values.chunks(GROUP) {
        let halves = &mut halves[..group.len()];
        halves.convert_from_f32_slice(group);
        extend(out, halves, f16::to_le_bytes);
    }
}

/// Replaces `into` by elements in binary16.
pub(crate) fn collect_f16(bytes: &[u8], into: &mut Vec<f32>) {
    let (bytes, _) = bytes.as_chunks::<2>();
    into.clear();
    into.resize(bytes.len(), 0.0);
    let mut halves = [f16::ZERO; GROUP];
    for (group, into) in bytes.chunks(GROUP).zip(into.chunks_mut(GROUP)) {
        let halves = &mut halves[..group.len()];
        halves.iter_mut().zip(group).for_each(|(half, &b)| *half = f16::from_le_bytes(b));
        halves.convert_to_f32_slice(into);
    }
}

/// bfloat16 nearest to an f32, ties to even; NaN stays NaN. As `half` rounds, without its branch.
#[inline(always)]
pub(crate) fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let quiet_nan = bits | 0x0040_0000;
    ((if value.is_nan() { quiet_nan } else { rounded }) >> 16) as u16
}

/// The f32 of a bfloat16; exact.
#[inline(always)]
pub(crate) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_rounded_as_half_rounds() {
        let specials =
            [0, 1, 0x7f7f_ffff, 0x7f80_0000, 0x7f80_0001, 0xff80_0000, 0xffff_ffff, 0x3f80_8000, 0x3f81_8000];
        for bits in specials.into_iter().chain((0..u32::MAX - 65_521).step_by(65_521)) {
            let value = f32::from_bits(bits);
            assert_eq!(to_bf16(value), half::bf16::from_f32(value).to_bits(), "{bits:#x}");
        }
    }
}
