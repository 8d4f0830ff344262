//! `topk`: the entries of largest magnitude, and zero elsewhere.
//!
//! | section | bytes | content |
//! |---|---|---|
//! | version | 1 | 1 |
//! | positions | see [`super::positions`] | which `k` of the `n` entries, row-major |
//! | values `f32`, `bf16` | 4, 2 a kept entry | in the order of positions |
//! | values `int8` | about 1.03 a kept entry | scales and codes of [`super::quantize`], over the kept entries |
//!
//! `k` is the density times `n`, rounded up. NaN is kept before infinity, infinity before every finite number, and
//! of equal magnitudes the lower position. `f32` and `bf16` values keep NaN and infinity; `int8` makes of NaN 0,
//! and of infinity the largest code.

use super::plain::{collect, extend, from_bf16, to_bf16};
use super::quantize::{self, Width};
use super::{positions, select};
use crate::{CodecError, Density, TopKValues};

/// Layout version of `topk`.
pub(crate) const VERSION: u8 = 1;
/// The codec's name in errors.
const NAME: &str = "topk";

/// Memory that is reused from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    select: select::Scratch,
    pub(crate) positions: Vec<u32>,
    pub(crate) kept: Vec<f32>,
}

/// Payload bytes of a tensor of `n < 2^32` entries, version included.
pub(crate) fn bytes(n: u64, density: Density, values: TopKValues) -> u64 {
    let k = density.kept(n);
    1 + positions::bytes(n, k) + value_bytes(k, values)
}

fn value_bytes(k: u64, values: TopKValues) -> u64 {
    match values {
        TopKValues::F32 => 4 * k,
        TopKValues::Bf16 => 2 * k,
        TopKValues::Int8 => Width::Int8.bytes(k),
    }
}

impl Scratch {
    /// Makes of the tensor that was just encoded as `payload` what its decoding lacks, without decoding it whole.
    pub(crate) fn take_kept_out_of(
        &mut self,
        form: TopKValues,
        payload: &[u8],
        tensor: &mut [f32],
    ) -> Result<(), CodecError> {
        let Self { positions, kept, .. } = self;
        // What is not finite is kept first: if a kept one is finite, all others are.
        let others_are_finite = kept.iter().any(|x| x.is_finite());
        let values = payload.len() - value_bytes(kept.len() as u64, form) as usize;
        read_values(form, kept.len(), &payload[values..], kept)?;
        for (&position, &value) in positions.iter().zip(&*kept) {
            let rest = &mut tensor[position as usize];
            *rest = finite(*rest - value);
        }
        if !others_are_finite {
            tensor.iter_mut().for_each(|x| *x = finite(*x));
        }
        Ok(())
    }
}

/// The number, or 0 where it is none.
pub(crate) fn finite(x: f32) -> f32 {
    if x.is_finite() { x } else { 0.0 }
}

/// Appends the payload. `scratch` then holds the positions and values that were kept.
pub(crate) fn encode(density: Density, form: TopKValues, values: &[f32], scratch: &mut Scratch, out: &mut Vec<u8>) {
    let n = values.len() as u64;
    scratch.select.largest(values, density.kept(n) as usize, &mut scratch.positions);
    out.push(VERSION);
    positions::encode(&scratch.positions, n, out);
    scratch.kept.clear();
    scratch.kept.extend(scratch.positions.iter().map(|&p| values[p as usize]));
    match form {
        TopKValues::F32 => extend(out, &scratch.kept, f32::to_le_bytes),
        TopKValues::Bf16 => extend(out, &scratch.kept, |x| to_bf16(x).to_le_bytes()),
        TopKValues::Int8 => quantize::encode(Width::Int8, &scratch.kept, out),
    }
}

/// Reads `bytes`, of the length that [`bytes`] says, into `scratch.positions` and `scratch.kept`.
pub(crate) fn read(
    n: usize,
    density: Density,
    form: TopKValues,
    bytes: &[u8],
    scratch: &mut Scratch,
) -> Result<(), CodecError> {
    let k = density.kept(n as u64);
    let mut rest = super::take_version(NAME, VERSION, bytes)?;
    let marked = super::take(NAME, &mut rest, positions::bytes(n as u64, k))?;
    let values = super::take(NAME, &mut rest, value_bytes(k, form))?;
    positions::decode(NAME, marked, n as u64, k as usize, &mut scratch.positions)?;
    read_values(form, k as usize, values, &mut scratch.kept)
}

fn read_values(form: TopKValues, k: usize, bytes: &[u8], into: &mut Vec<f32>) -> Result<(), CodecError> {
    match form {
        TopKValues::F32 => collect(bytes, into, f32::from_le_bytes),
        TopKValues::Bf16 => collect(bytes, into, |b| from_bf16(u16::from_le_bytes(b))),
        TopKValues::Int8 => quantize::decode(Width::Int8, k, bytes, into)?,
    }
    Ok(())
}

/// Replaces `into` by the decoded tensor.
pub(crate) fn decode(
    n: usize,
    density: Density,
    form: TopKValues,
    bytes: &[u8],
    scratch: &mut Scratch,
    into: &mut Vec<f32>,
) -> Result<(), CodecError> {
    read(n, density, form, bytes, scratch)?;
    into.clear();
    into.resize(n, 0.0);
    for (&position, &value) in scratch.positions.iter().zip(&scratch.kept) {
        into[position as usize] = value;
    }
    Ok(())
}
