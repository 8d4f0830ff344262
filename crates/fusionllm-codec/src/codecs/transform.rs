//! `transform`: rows in an orthonormal basis that follows the tensor, rounded to whole steps, and entropy coded.
//!
//! Transform coding: the basis is nearly that of the Karhunen-Loève transform, in which a row's coefficients do not
//! depend on each other and most of them are small. One step rounds all of them alike, so that a coefficient costs bits
//! as it is large, and the small ones cost nothing: reverse water-filling (Cover and Thomas, Elements of Information
//! Theory, section 10.3.3). A row is the last dimension, of `d` elements.
//!
//! | section | bytes | content |
//! |---|---|---|
//! | version | 1 | 1 |
//! | form | 1 | 1 if the basis follows, else 0 |
//! | number | 4 | of the basis that the coefficients refer to |
//! | rank, by form | 4 | `r`: vectors of the basis, from 1 to the least of `d` and 1024 |
//! | basis, by form | see [`super::quantize`] | the first 16 vectors as `int8`, the others as `int4`, both without version |
//! | step | 4 | f32: a coefficient is an integer times the step |
//! | scales | r | of each vector's integers, see [`super::laplace`] |
//! | integers | the rest, whole words of 4 bytes | vector by vector, in each row by row, see [`super::laplace`] |
//!
//! The vectors are made orthonormal at both ends after they were rounded. A tensor without elements is version, 0
//! and 0. Elements that are NaN, infinite or above 2^100 in magnitude count as 0; they become what their row's other
//! elements say.

use serde::{Deserialize, Serialize};

use super::basis::{Basis, basis_bytes};
use super::laplace::{self, COST_OF_A_BIT, Reader, Writer};
use super::rounding::Rounding;
use super::{subspace, take, take_version};
use crate::{BitRate, CodecError};

const NAME: &str = "transform";
const VERSION: u8 = 1;
/// Version, whether the basis follows, and the basis' number.
const HEADER_BYTES: u64 = 1 + 1 + 4;
const RANK_BYTES: u64 = 4;
const STEP_BYTES: u64 = 4;
/// Of the integers at the least, so that the coder has room to end.
const LEAST_BYTES: u64 = 8;
/// Vectors of a basis of [`Codec::Transform`](crate::Codec::Transform) at the most: what turns a row of several thousand elements would cost more than its bytes.
pub const MOST_RANK: u64 = 1024;
/// Vectors after the last one whose coefficients are worth sending at a step as much finer as this are not kept.
const FINER: f32 = 1.0 / 4.0;
/// Bits of 2^100: squares of larger elements would not add up in f32.
const TOO_LARGE: u32 = (100 + 127) << 23;
/// Power iterations of a new basis; [`ITERATIONS`] of one that is refreshed.
const FIRST_ITERATIONS: usize = 4;
const ITERATIONS: usize = 2;
/// Steps of an octave, and 2^(1/32).
const STEPS_OF_AN_OCTAVE: u32 = 32;
const STEP_RATIO: f32 = 1.021_897_2;

/// The parameters of the codec and the shape of a tensor with elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    rows: usize,
    width: usize,
    /// Vectors of a basis at the most.
    rank: usize,
    /// Bytes of scales and integers at the most.
    budget: u64,
}

impl Layout {
    /// None for a tensor without elements; the shape was held against [`bytes`].
    pub(crate) fn of(shape: &[usize], bits: BitRate) -> Option<Self> {
        let width = shape.last().map_or(1, |&d| d as u64);
        let rows = shape.iter().rev().skip(1).fold(1, |rows: u64, &d| rows.saturating_mul(d as u64));
        if rows == 0 || width == 0 {
            return None;
        }
        let rank = width.min(MOST_RANK);
        let budget = bits.bytes(rows * width).max(rank + LEAST_BYTES);
        Some(Self { rows: rows as usize, width: width as usize, rank: rank as usize, budget })
    }

    /// Whether coefficients in this basis may be of such a tensor.
    fn fits(&self, basis: &Basis) -> bool {
        self.width == basis.width && (1..=self.rank).contains(&basis.rank())
    }

    /// Messages from one basis to the next.
    fn refresh_every(&self, policy: Policy, rank: usize) -> u32 {
        if policy.refresh_every > 0 {
            return policy.refresh_every;
        }
        let basis = basis_bytes(rank, self.width) as f64;
        // The cast saturates.
        (basis / (BASIS_SHARE * self.bytes(false) as f64)).ceil() as u32
    }

    fn bytes(&self, with_basis: bool) -> u64 {
        let basis = if with_basis { RANK_BYTES + basis_bytes(self.rank, self.width) } else { 0 };
        HEADER_BYTES + basis + STEP_BYTES + self.budget
    }
}

/// Bytes at the most of a tensor of less than 2^32 elements.
pub(crate) fn bytes(shape: &[usize], bits: BitRate, with_basis: bool) -> u64 {
    Layout::of(shape, bits).map_or(HEADER_BYTES, |layout| layout.bytes(with_basis))
}

/// A basis is sent so seldom that it adds this share to the bytes of the messages.
const BASIS_SHARE: f64 = 0.1;

/// How a tensor is encoded beyond its codec.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Policy {
    /// Messages after which a basis is replaced; 0: so many that bases add a tenth to the bytes.
    pub(crate) refresh_every: u32,
    /// Factor by which the share that it misses may grow.
    pub(crate) growth: f64,
    /// Messages before which growth does not count, lest each carries a basis.
    pub(crate) at_least: u32,
    /// Whether coefficients are rounded stochastically.
    pub(crate) unbiased: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self { refresh_every: 0, growth: 1.5, at_least: 8, unbiased: false }
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
    /// Messages so far.
    messages: u32,
}

/// Memory that is reused from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    clean: Vec<f32>,
    coefficients: Vec<f32>,
    integers: Vec<i32>,
    writer: Writer,
}

impl Sender {
    /// Appends the payload of a tensor that fills the layout.
    pub(crate) fn encode(
        &mut self,
        layout: Option<Layout>,
        policy: Policy,
        values: &[f32],
        scratch: &mut Scratch,
        out: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        let Some(layout) = layout else {
            out.extend_from_slice(&[VERSION, 0, 0, 0, 0, 0]);
            return Ok(());
        };
        let Scratch { clean, coefficients, integers, writer } = scratch;
        let x = cleaned(values, clean);
        let mut sent = Vec::new();
        self.messages = self.messages.wrapping_add(1);
        let rounding = if policy.unbiased { Rounding::Stochastic { seed: self.seed() } } else { Rounding::Nearest };
        let basis = self.prepare((&layout, policy, rounding), x, coefficients, &mut sent);
        out.extend_from_slice(&[VERSION, u8::from(!sent.is_empty())]);
        out.extend_from_slice(&basis.number.to_le_bytes());
        out.extend_from_slice(&sent);
        write_integers(&layout, rounding, coefficients, (integers, writer), out)
            .map_err(|laplace::Impossible| CodecError::Corrupt { codec: NAME, what: "an integer has no symbol" })
    }

    /// Another one for each message.
    fn seed(&self) -> u32 {
        self.messages.wrapping_mul(0x85eb_ca6b)
    }

    /// The basis for this tensor, the coefficients, and rank and basis as they are sent, if the other end lacks them.
    fn prepare(
        &mut self,
        (layout, policy, rounding): (&Layout, Policy, Rounding),
        x: &[f32],
        coefficients: &mut Vec<f32>,
        sent: &mut Vec<u8>,
    ) -> &Basis {
        let norm = subspace::square_sum(x);
        let missed = |coefficients: &[f32]| {
            if norm > 0.0 { (1.0 - subspace::square_sum(coefficients) / norm).max(0.0).sqrt() } else { 0.0 }
        };
        let held = self.basis.take().filter(|basis| layout.fits(basis));
        let (number, mut vectors, iterations) = match held {
            Some(basis) => {
                subspace::project(x, layout.width, &basis.vectors, coefficients);
                let limit = policy.growth * self.missed.max(NEGLIGIBLE);
                let worn = self.age >= policy.at_least && missed(coefficients) > limit;
                if self.age < layout.refresh_every(policy, basis.rank()) && !worn {
                    self.age += 1;
                    return self.basis.insert(basis);
                }
                (basis.number.wrapping_add(1), basis.vectors, ITERATIONS)
            }
            None => (0, Vec::new(), FIRST_ITERATIONS),
        };
        subspace::extend(&mut vectors, layout.width, layout.rank);
        subspace::refine(x, layout.width, &mut vectors, iterations, coefficients);
        subspace::project(x, layout.width, &vectors, coefficients);
        let rank = worthy(layout, rounding, coefficients);
        sent.extend_from_slice(&(rank as u32).to_le_bytes());
        let basis = Basis::write(number, layout.width, &vectors[..rank * layout.width], sent);
        subspace::project(x, layout.width, &basis.vectors, coefficients);
        (self.age, self.missed) = (1, missed(coefficients));
        self.basis.insert(basis)
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

/// Vectors up to the last one that is worth its bytes at the layout's budget.
fn worthy(layout: &Layout, rounding: Rounding, coefficients: &[f32]) -> usize {
    let steps = Steps::of(coefficients);
    let step = FINER * steps.step(coarseness(layout, rounding, steps, coefficients));
    let is_worthy = |group| rounding.tally(group, step).sum > 0;
    coefficients.chunks_exact(layout.rows).rposition(is_worthy).map_or(1, |last| last + 1)
}

/// The steps that a tensor's coefficients may have, a 32nd of an octave from one to the next.
#[derive(Clone, Copy, Debug)]
struct Steps {
    /// The largest magnitude over [`laplace::MOST`].
    finest: f32,
}

impl Steps {
    fn of(coefficients: &[f32]) -> Self {
        let largest = coefficients.iter().fold(0f32, |most, x| most.max(x.abs()));
        Self { finest: (largest / laplace::MOST as f32).max(f32::MIN_POSITIVE) }
    }

    fn step(self, coarseness: u32) -> f32 {
        let (octaves, rest) = (coarseness / STEPS_OF_AN_OCTAVE, coarseness % STEPS_OF_AN_OCTAVE);
        // Long before so many octaves everything is 0.
        (0..rest).fold(self.finest * (1u64 << octaves.min(40)) as f32, |step, _| step * STEP_RATIO)
    }
}

/// The least coarseness at which scales and integers fit the budget, nearly.
fn coarseness(layout: &Layout, rounding: Rounding, steps: Steps, coefficients: &[f32]) -> u32 {
    let rank = (coefficients.len() / layout.rows) as u64;
    let budget = (layout.budget - rank.min(layout.budget)).saturating_sub(LEAST_BYTES) * 8 * COST_OF_A_BIT;
    let fits = |coarseness: &u32| {
        let step = steps.step(*coarseness);
        let cost = |group| rounding.tally(group, step).cost(layout.rows);
        coefficients.chunks_exact(layout.rows).map(cost).sum::<u64>() <= budget
    };
    let (mut low, mut high) = (0, 25 * STEPS_OF_AN_OCTAVE);
    while low < high {
        let middle = low.midpoint(high);
        if fits(&middle) { high = middle } else { low = middle + 1 }
    }
    low
}

/// Appends step, scales and integers.
fn write_integers(
    layout: &Layout,
    rounding: Rounding,
    coefficients: &[f32],
    (integers, writer): (&mut Vec<i32>, &mut Writer),
    out: &mut Vec<u8>,
) -> Result<(), laplace::Impossible> {
    let steps = Steps::of(coefficients);
    let mut coarseness = coarseness(layout, rounding, steps, coefficients);
    let start = out.len();
    loop {
        let step = steps.step(coarseness);
        out.truncate(start);
        out.extend_from_slice(&step.to_le_bytes());
        writer.clear();
        for (index, group) in coefficients.chunks_exact(layout.rows).enumerate() {
            let scale = rounding.tally(group, step).scale(layout.rows);
            out.push(scale);
            if scale > 0 {
                rounding.round(group, index, step, integers);
                writer.group(scale, integers)?;
            }
        }
        let scales = out.len() - start - STEP_BYTES as usize;
        // Costs are foretold but for the draws and for what lies beyond a model's range.
        if (scales + writer.bytes()) as u64 <= layout.budget {
            writer.append_to(out);
            return Ok(());
        }
        coarseness += 1;
    }
}

/// Replaces `into` by the decoded tensor, and `held` by the basis if the payload has one.
///
/// `held` is as it was if the payload is refused.
pub(crate) fn decode(
    shape: &[usize],
    layout: Option<Layout>,
    bytes: &[u8],
    held: &mut Option<Basis>,
    scratch: &mut Scratch,
    into: &mut Vec<f32>,
) -> Result<(), CodecError> {
    let corrupt = |what| CodecError::Corrupt { codec: NAME, what };
    let mut rest = take_version(NAME, VERSION, bytes)?;
    let form = take(NAME, &mut rest, 1)?[0];
    let number = take_u32(&mut rest)?;
    let most = match (form, layout) {
        (0 | 1, Some(layout)) => layout.bytes(form == 1),
        (0, None) if number == 0 => HEADER_BYTES,
        _ => return Err(corrupt("its form is unknown")),
    };
    if bytes.len() as u64 > most {
        let got = bytes.len() as u64;
        return Err(CodecError::PayloadTooLong { codec: NAME, shape: shape.to_vec(), most, got });
    }
    let Some(layout) = layout else {
        into.clear();
        return Ok(());
    };
    let sent = if form == 1 { Some(read_basis(&layout, number, &mut rest)?) } else { None };
    let basis = match (&sent, held.as_ref()) {
        (Some(basis), _) => basis,
        (None, Some(basis)) if basis.number == number && layout.fits(basis) => basis,
        (None, other) => return Err(CodecError::MissingBasis { needed: number, held: other.map(|b| b.number) }),
    };
    read_coefficients(&layout, basis.rank(), rest, &mut scratch.coefficients)?;
    subspace::rebuild(&scratch.coefficients, layout.rows, layout.width, &basis.vectors, into);
    if sent.is_some() {
        *held = sent;
    }
    Ok(())
}

fn take_u32(rest: &mut &[u8]) -> Result<u32, CodecError> {
    Ok(take(NAME, rest, 4)?.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)))
}

fn read_coefficients(layout: &Layout, rank: usize, bytes: &[u8], into: &mut Vec<f32>) -> Result<(), CodecError> {
    let corrupt = |what| CodecError::Corrupt { codec: NAME, what };
    let mut rest = bytes;
    let step = f32::from_bits(take_u32(&mut rest)?);
    if !(step.is_finite() && step >= 0.0) {
        return Err(corrupt("its step is negative or no number"));
    }
    let scales = take(NAME, &mut rest, rank as u64)?;
    if !scales.iter().copied().all(laplace::is_scale) {
        return Err(corrupt("a scale is unknown"));
    }
    if !rest.len().is_multiple_of(4) {
        return Err(corrupt("its integers are no whole words"));
    }
    let mut reader = Reader::new(rest);
    into.clear();
    into.reserve(rank * layout.rows);
    for &scale in scales {
        reader
            .group(scale, layout.rows, |integer| into.push(integer as f32 * step))
            .map_err(|laplace::Invalid| corrupt("its integers are not such as an encoder writes"))?;
    }
    Ok(())
}

fn read_basis(layout: &Layout, number: u32, rest: &mut &[u8]) -> Result<Basis, CodecError> {
    let rank = take_u32(rest)? as usize;
    if rank == 0 || rank > layout.rank {
        return Err(CodecError::Corrupt { codec: NAME, what: "its basis has no vectors or too many" });
    }
    Basis::read(number, layout.width, rank, take(NAME, rest, basis_bytes(rank, layout.width))?)
}
