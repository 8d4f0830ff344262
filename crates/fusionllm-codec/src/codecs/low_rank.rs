//! `lowrank`: rows as coefficients in an orthonormal basis that both ends hold.

use super::quantize::Width;
use super::topk;
use crate::{LowRankValues, Residual};

/// Version, whether the basis follows, and the basis' number.
const HEADER_BYTES: u64 = 1 + 1 + 4;

/// Rows, their length, and the vectors of the basis; of a tensor with elements.
fn dimensions(shape: &[usize], rank: u32) -> (u64, u64, u64) {
    let width = shape.last().map_or(1, |&d| d as u64);
    let rows = shape.iter().rev().skip(1).fold(1, |rows: u64, &d| rows.saturating_mul(d as u64));
    (rows, width, u64::from(rank.max(1)).min(width))
}

/// Payload bytes of a tensor of less than 2^32 elements; none if the basis is absurd.
pub(crate) fn bytes(
    shape: &[usize],
    rank: u32,
    values: LowRankValues,
    residual: Option<Residual>,
    with_basis: bool,
) -> Option<u64> {
    let n: u64 = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64))?;
    if n == 0 {
        return Some(HEADER_BYTES);
    }
    let (rows, width, rank) = dimensions(shape, rank);
    let basis = if with_basis { width.checked_mul(rank)?.checked_mul(2)? } else { 0 };
    let coefficients = rows * rank;
    let coefficients = match values {
        LowRankValues::Bf16 => 2 * coefficients,
        LowRankValues::Int8 => Width::Int8.bytes(coefficients),
        LowRankValues::Int4 => Width::Int4.bytes(coefficients),
    };
    let sparse = residual.map_or(0, |residual| topk::bytes(n, residual.density, residual.values));
    basis.checked_add(HEADER_BYTES + coefficients + sparse)
}
