//! Loops over slices that compile to vector instructions.
//!
//! Products are not contracted with sums, so that all machines round alike.

use multiversion::multiversion;
use rayon::prelude::*;

use super::TASK;

/// Partial sums that a reduction keeps, so that it may use vector registers: four of AVX-512.
const LANES: usize = 64;

/// e^x within 2e-7 of itself for x in [-87, 88]; below, some 1e-38; above, e^88. After Cephes' `expf`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// 1.5 · 2^23: a small number added to it is rounded to an integer in its low bits.
    const ROUNDER: f32 = 12_582_912.0;
    /// With few enough bits that its product with a small integer is exact.
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUNDER;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUNDER.to_bits() as i32);
    let n = shifted - ROUNDER;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let power = f32::from_bits((exponent.wrapping_add(127) << 23) as u32);
    (p * r * r + r + 1.0) * power
}

/// Σ f(aᵢ).
#[inline(always)]
pub(super) fn sum_of(a: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &a) in lanes.iter_mut().zip(chunk) {
            *lane += f(a);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|&a| f(a)).sum::<f32>()
}

/// Σ f(aᵢ, bᵢ).
#[inline(always)]
pub(super) fn sum_of_two(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    let tail = rest.map(|(&a, &b)| f(a, b)).sum::<f32>();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// The largest element; -∞ of none.
#[inline(always)]
pub(super) fn max_of(a: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &a) in lanes.iter_mut().zip(chunk) {
            *lane = larger(a, *lane);
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &a| larger(a, max))
}

/// aᵢ ← e^(aᵢ - shift); gives their sum.
#[inline(always)]
pub(super) fn exp_in_place(a: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut chunks = a.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (lane, a) in lanes.iter_mut().zip(chunk) {
            *a = exp(*a - shift);
            *lane += *a;
        }
    }
    let mut rest = 0.0;
    for a in chunks.into_remainder() {
        *a = exp(*a - shift);
        rest += *a;
    }
    lanes.iter().sum::<f32>() + rest
}

/// sumᵢ ← sumᵢ + termᵢ, on all threads. The slices are equally long.
pub(super) fn add_into(sum: &mut [f32], term: &[f32]) {
    sum.par_chunks_mut(TASK).zip(term.par_chunks(TASK)).for_each(|(sum, term)| add(sum, term));
}

/// sumᵢ ← sumᵢ + termᵢ.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
pub(super) fn add(sum: &mut [f32], term: &[f32]) {
    for (sum, term) in sum.iter_mut().zip(term) {
        *sum += term;
    }
}

/// Σ aᵢ², on all threads; the same on any number of them.
pub(super) fn sum_of_squares(a: &[f32]) -> f64 {
    let parts: Vec<f64> = a.par_chunks(TASK).map(|chunk| f64::from(squares(chunk))).collect();
    parts.iter().sum()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn squares(a: &[f32]) -> f32 {
    sum_of(a, |a| a * a)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_its_whole_range() {
        for i in -87_000..=88_000 {
            let x = i as f32 / 1000.0;
            let (got, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - expected).abs() <= 3e-7 * expected, "e^{x}: {got:e} against {expected:e}");
        }
        assert!(exp(-1e9) < 2e-38 && exp(f32::NEG_INFINITY) < 2e-38);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_every_element_once() {
        for count in [0, 1, LANES - 1, LANES, 3 * LANES + 5] {
            let mut a: Vec<f32> = (0..count).map(|i| (i % 7) as f32).collect();
            let plain: f32 = a.iter().sum();
            assert_eq!(sum_of(&a, |a| a), plain);
            assert_eq!(sum_of_two(&a, &a, |a, b| a + b), 2.0 * plain);
            assert_eq!(max_of(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            assert_eq!(sum_of_squares(&a), a.iter().map(|a| f64::from(a * a)).sum::<f64>());
            let expected: f32 = a.iter().map(|a| (a - 3.0).exp()).sum();
            assert!((exp_in_place(&mut a, 3.0) - expected).abs() <= 1e-5 * expected);
        }
    }
}
