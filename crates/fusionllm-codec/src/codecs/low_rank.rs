//! `lowrank`: rows as coefficients in an orthonormal basis that both ends hold, and the largest misses.
//!
//! A row is the last dimension, of `d` elements; the rank `r` is at most `d`.
//!
//! | section | bytes | content |
//! |---|---|---|
//! | version | 1 | 1 |
//! | form | 1 | 1 if the basis follows, else 0 |
//! | number | 4 | of the basis that the coefficients refer to |
//! | basis, by form | 2·d·r | bfloat16, vector after vector, none above 1 in magnitude |
//! | coefficients | bf16: 2·rows·r; `int8`, `int4`: see [`super::quantize`] | by vector, then by row |
//! | residual, by the codec's parameters | see [`super::topk`] | a `topk` payload of the tensor less what the sections before rebuild |
//!
//! A tensor without elements is version, 0 and 0. Elements that are NaN, infinite or above 2^100 in magnitude count
//! as 0 for basis and coefficients. The residual is of the tensor as it is, so it keeps them first, and then
//! treats them as `topk` does; without residual they become what their row's other elements say.

use serde::{Deserialize, Serialize};

use super::plain::{collect, extend, from_bf16, to_bf16};
use super::quantize::{self, Width};
use super::{subspace, take, take_version, topk};
use crate::{CodecError, LowRankValues, Residual};

const NAME: &str = "lowrank";
const VERSION: u8 = 1;
/// Version, whether the basis follows, and the basis' number.
const HEADER_BYTES: u64 = 1 + 1 + 4;
/// Bits of 2^100: squares of larger elements would not add up in f32.
const TOO_LARGE: u32 = (100 + 127) << 23;
/// bfloat16 bits of 1.
const ONE: u16 = 0x3f80;
/// Power iterations of a new basis; [`ITERATIONS`] of one that is refreshed.
const FIRST_ITERATIONS: usize = 4;
const ITERATIONS: usize = 2;

/// The parameters of the codec and the shape of a tensor with elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    rows: usize,
    width: usize,
    rank: usize,
    values: LowRankValues,
    residual: Option<Residual>,
}

impl Layout {
    /// None for a tensor without elements; the shape was held against [`bytes`].
    pub(crate) fn of(shape: &[usize], rank: u32, values: LowRankValues, residual: Option<Residual>) -> Option<Self> {
        let (rows, width, rank) = dimensions(shape, rank);
        if rows == 0 || width == 0 {
            return None;
        }
        Some(Self { rows: rows as usize, width: width as usize, rank: rank as usize, values, residual })
    }

    fn coefficient_bytes(&self) -> u64 {
        coefficient_bytes((self.rows * self.rank) as u64, self.values)
    }

    /// Messages from one basis to the next.
    fn refresh_every(&self, policy: Policy) -> u32 {
        if policy.refresh_every > 0 {
            return policy.refresh_every;
        }
        let basis = (2 * self.width * self.rank) as f64;
        // The cast saturates.
        (basis / (BASIS_SHARE * self.bytes(false) as f64)).ceil() as u32
    }

    fn bytes(&self, with_basis: bool) -> u64 {
        let basis = if with_basis { 2 * self.width * self.rank } else { 0 };
        let n = (self.rows * self.width) as u64;
        let sparse = self.residual.map_or(0, |residual| topk::bytes(n, residual.density, residual.values));
        HEADER_BYTES + basis as u64 + self.coefficient_bytes() + sparse
    }
}

/// Rows, their length, and the vectors of the basis.
fn dimensions(shape: &[usize], rank: u32) -> (u64, u64, u64) {
    let width = shape.last().map_or(1, |&d| d as u64);
    let rows = shape.iter().rev().skip(1).fold(1, |rows: u64, &d| rows.saturating_mul(d as u64));
    (rows, width, u64::from(rank.max(1)).min(width))
}

fn coefficient_bytes(count: u64, values: LowRankValues) -> u64 {
    match values {
        LowRankValues::Bf16 => 2 * count,
        LowRankValues::Int8 => Width::Int8.bytes(count),
        LowRankValues::Int4 => Width::Int4.bytes(count),
    }
}

/// Payload bytes of a tensor of less than 2^32 elements; none if the basis is absurd.
pub(crate) fn bytes(
    shape: &[usize],
    rank: u32,
    values: LowRankValues,
    residual: Option<Residual>,
    with_basis: bool,
) -> Option<u64> {
    let (_, width, vectors) = dimensions(shape, rank);
    let Some(layout) = Layout::of(shape, rank, values, residual) else { return Some(HEADER_BYTES) };
    // Rows times rank is no more than the elements; the basis may be larger than the tensor.
    width.checked_mul(vectors)?.checked_mul(2).filter(|&bytes| bytes < 1 << 48)?;
    Some(layout.bytes(with_basis))
}

/// An orthonormal basis, as both ends of an edge hold it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Basis {
    number: u32,
    width: usize,
    /// Vector after vector; every number is a bfloat16, none above 1 in magnitude.
    vectors: Vec<f32>,
}

impl Basis {
    fn fits(&self, layout: &Layout) -> bool {
        self.width == layout.width && self.vectors.len() == layout.width * layout.rank
    }

    /// Whether this can be a basis; asked of what comes from a file.
    pub(crate) fn is_sound(&self) -> bool {
        self.width > 0 && self.vectors.len().is_multiple_of(self.width) && self.vectors.iter().all(|x| x.abs() <= 1.0)
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.vectors.capacity() * size_of::<f32>()
    }
}

/// A basis is sent so seldom that it adds this share to the bytes of the messages.
const BASIS_SHARE: f64 = 0.1;

/// When a basis is replaced although it fits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Policy {
    /// Messages after which it is; 0: so many that bases add a tenth to the bytes.
    pub(crate) refresh_every: u32,
    /// Factor by which the share that it misses may grow.
    pub(crate) growth: f64,
    /// Messages before which growth does not count, lest each carries a basis.
    pub(crate) at_least: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self { refresh_every: 0, growth: 1.5, at_least: 8 }
    }
}

/// A share that is missed so small that no growth up to it counts.
const NEGLIGIBLE: f64 = 0.02;

/// The encoder's basis and how it fared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sender {
    pub(crate) basis: Option<Basis>,
    /// Messages since it was sent.
    age: u32,
    /// Norm of what it missed of the tensor that it was made for, over the tensor's norm.
    missed: f64,
}

/// Memory that is reused from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    clean: Vec<f32>,
    coefficients: Vec<f32>,
    rebuilt: Vec<f32>,
}

impl Sender {
    /// Appends the payload of a tensor that fills the layout.
    pub(crate) fn encode(
        &mut self,
        layout: Option<Layout>,
        policy: Policy,
        values: &[f32],
        (scratch, sparse): (&mut Scratch, &mut topk::Scratch),
        out: &mut Vec<u8>,
    ) {
        let Some(layout) = layout else {
            out.extend_from_slice(&[VERSION, 0, 0, 0, 0, 0]);
            return;
        };
        let x = cleaned(values, &mut scratch.clean);
        let (basis, is_new) = self.prepare(&layout, policy, x, &mut scratch.coefficients);
        out.extend_from_slice(&[VERSION, u8::from(is_new)]);
        out.extend_from_slice(&basis.number.to_le_bytes());
        if is_new {
            extend(out, &basis.vectors, |x| to_bf16(x).to_le_bytes());
        }
        let start = out.len();
        match layout.values {
            LowRankValues::Bf16 => extend(out, &scratch.coefficients, |x| to_bf16(x).to_le_bytes()),
            LowRankValues::Int8 => quantize::encode(Width::Int8, &scratch.coefficients, out),
            LowRankValues::Int4 => quantize::encode(Width::Int4, &scratch.coefficients, out),
        }
        if let Some(Residual { density, values: form }) = layout.residual {
            // What was just written is sound.
            let read = read_coefficients(&layout, &out[start..], &mut scratch.coefficients);
            debug_assert!(read.is_ok());
            let Scratch { coefficients, rebuilt, .. } = scratch;
            subspace::rebuild(coefficients, layout.rows, layout.width, &basis.vectors, rebuilt);
            for (missed, value) in rebuilt.iter_mut().zip(values) {
                *missed = value - *missed;
            }
            topk::encode(density, form, rebuilt, sparse, out);
        }
    }

    /// The basis for this tensor, whether the other end lacks it, and the coefficients.
    fn prepare(&mut self, layout: &Layout, policy: Policy, x: &[f32], coefficients: &mut Vec<f32>) -> (&Basis, bool) {
        let norm = subspace::square_sum(x);
        let missed = |coefficients: &[f32]| {
            if norm > 0.0 { (1.0 - subspace::square_sum(coefficients) / norm).max(0.0).sqrt() } else { 0.0 }
        };
        let held = self.basis.take().filter(|basis| basis.fits(layout));
        let (number, mut vectors, iterations) = match held {
            Some(basis) => {
                subspace::project(x, layout.width, &basis.vectors, coefficients);
                let limit = policy.growth * self.missed.max(NEGLIGIBLE);
                let worn = self.age >= policy.at_least && missed(coefficients) > limit;
                if self.age < layout.refresh_every(policy) && !worn {
                    self.age += 1;
                    return (self.basis.insert(basis), false);
                }
                (basis.number.wrapping_add(1), basis.vectors, ITERATIONS)
            }
            None => (0, subspace::start(layout.width, layout.rank), FIRST_ITERATIONS),
        };
        subspace::refine(x, layout.width, &mut vectors, iterations, coefficients);
        vectors.iter_mut().for_each(|x| *x = from_bf16(to_bf16(*x)));
        subspace::project(x, layout.width, &vectors, coefficients);
        (self.age, self.missed) = (1, missed(coefficients));
        (self.basis.insert(Basis { number, width: layout.width, vectors }), true)
    }
}

/// The tensor itself, or a copy without what cannot be squared.
fn cleaned<'a>(values: &'a [f32], copy: &'a mut Vec<f32>) -> &'a [f32] {
    let is_large = |x: &f32| x.to_bits() & 0x7fff_ffff > TOO_LARGE;
    if !values.iter().fold(false, |any, x| any | is_large(x)) {
        return values;
    }
    copy.clear();
    copy.extend(values.iter().map(|x| if is_large(x) { 0.0 } else { *x }));
    copy
}

fn read_coefficients(layout: &Layout, bytes: &[u8], into: &mut Vec<f32>) -> Result<(), CodecError> {
    let count = layout.rows * layout.rank;
    match layout.values {
        LowRankValues::Bf16 => collect(bytes, into, |b| from_bf16(u16::from_le_bytes(b))),
        LowRankValues::Int8 => quantize::decode(Width::Int8, count, bytes, into)?,
        LowRankValues::Int4 => quantize::decode(Width::Int4, count, bytes, into)?,
    }
    Ok(())
}

/// Replaces `into` by the decoded tensor, and `held` by the basis if the payload has one.
///
/// `held` is as it was if the payload is refused.
pub(crate) fn decode(
    shape: &[usize],
    layout: Option<Layout>,
    bytes: &[u8],
    held: &mut Option<Basis>,
    (scratch, sparse): (&mut Scratch, &mut topk::Scratch),
    into: &mut Vec<f32>,
) -> Result<(), CodecError> {
    let corrupt = |what| CodecError::Corrupt { codec: NAME, what };
    let mut rest = take_version(NAME, VERSION, bytes)?;
    let form = take(NAME, &mut rest, 1)?[0];
    let number = take(NAME, &mut rest, 4)?.first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
    let expected = match (form, layout) {
        (0 | 1, Some(layout)) => layout.bytes(form == 1),
        (0, None) if number == 0 => HEADER_BYTES,
        _ => return Err(corrupt("its form is unknown")),
    };
    if expected != bytes.len() as u64 {
        let got = bytes.len() as u64;
        return Err(CodecError::PayloadLength { codec: NAME, shape: shape.to_vec(), expected, got });
    }
    let Some(layout) = layout else {
        into.clear();
        return Ok(());
    };
    let sent = match form {
        0 => None,
        _ => Some(read_basis(&layout, number, take(NAME, &mut rest, 2 * (layout.width * layout.rank) as u64)?)?),
    };
    let basis = match (&sent, held.as_ref()) {
        (Some(basis), _) => basis,
        (None, Some(basis)) if basis.number == number && basis.fits(&layout) => basis,
        (None, other) => return Err(CodecError::MissingBasis { needed: number, held: other.map(|b| b.number) }),
    };
    let coefficients = take(NAME, &mut rest, layout.coefficient_bytes())?;
    read_coefficients(&layout, coefficients, &mut scratch.coefficients)?;
    if let Some(Residual { density, values }) = layout.residual {
        topk::read(layout.rows * layout.width, density, values, rest, sparse)?;
    }
    subspace::rebuild(&scratch.coefficients, layout.rows, layout.width, &basis.vectors, into);
    if layout.residual.is_some() {
        for (&position, &value) in sparse.positions.iter().zip(&sparse.kept) {
            into[position as usize] += value;
        }
    }
    if sent.is_some() {
        *held = sent;
    }
    Ok(())
}

fn read_basis(layout: &Layout, number: u32, bytes: &[u8]) -> Result<Basis, CodecError> {
    let what = "a number of the basis is above 1 or none";
    let (numbers, _) = bytes.as_chunks::<2>();
    if numbers.iter().any(|&b| u16::from_le_bytes(b) & 0x7fff > ONE) {
        return Err(CodecError::Corrupt { codec: NAME, what });
    }
    let mut vectors = Vec::new();
    collect(bytes, &mut vectors, |b| from_bf16(u16::from_le_bytes(b)));
    Ok(Basis { number, width: layout.width, vectors })
}
