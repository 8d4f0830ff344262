//! Coefficients as integers: to the nearest, or so that they are right on average.
//!
//! Rounding a gradient to the nearest takes away whatever is small, and always: what many samples say a little of never
//! arrives, and training stalls at low rates. Stochastic rounding (QSGD, Alistarh et al., arXiv 1610.02132) sends a
//! small number now and then instead, so that sums are right.

use multiversion::multiversion;

use super::laplace::{self, Tally};

/// A group whose numbers are smaller than this many steps on average is sent as zeros: rounding such stochastically
/// would add more noise than signal.
const LEAST_MEAN: f32 = 0.3;
/// Partial sums.
const LANES: usize = 16;
/// Odd numbers that spread the bits of a counter.
const SPREAD: [u32; 3] = [0x9e37_79b9, 0x7feb_352d, 0x846c_a68b];

/// How a number becomes an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// The nearest integer, which makes the error of each number smallest.
    Nearest,
    /// The one below or the one above, the nearer the likelier, by draws that follow from the seed.
    Stochastic {
        /// Seed of the draws, another one for every tensor.
        seed: u32,
    },
}

impl Rounding {
    /// What the integers of a group will be like.
    pub(crate) fn tally(self, group: &[f32], step: f32) -> Tally {
        let Sums { nonzero, magnitudes, exact } = match self {
            Self::Nearest => sums(group, 1.0 / step, true),
            Self::Stochastic { .. } => sums(group, 1.0 / step, false),
        };
        if exact < LEAST_MEAN * group.len() as f32 {
            return Tally::default();
        }
        Tally { nonzero: nonzero as u64, sum: magnitudes as u64 }
    }

    /// Replaces `into` by the integers of a group, the `index`-th of its tensor.
    pub(crate) fn round(self, group: &[f32], index: usize, step: f32, into: &mut Vec<i32>) {
        into.clear();
        match self {
            Self::Nearest => round_to_nearest(group, 1.0 / step, into),
            // The cast takes the low bits.
            Self::Stochastic { seed } => {
                let first = seed.wrapping_add((index * group.len()) as u32);
                round_stochastically(group, 1.0 / step, first, into);
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Sums {
    /// Integers that will not be 0, on average.
    nonzero: f32,
    /// Sum of their magnitudes, on average.
    magnitudes: f32,
    /// Sum of the magnitudes of what is rounded.
    exact: f32,
}

/// A coefficient in steps, no larger than what can be coded.
#[inline(always)]
fn in_steps(x: f32, per_step: f32) -> f32 {
    const MOST: f32 = laplace::MOST as f32;
    (x * per_step).clamp(-MOST, MOST)
}

/// In lanes that the compiler makes vectors of; that f32 rounds large sums does no harm.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn sums(group: &[f32], per_step: f32, nearest: bool) -> Sums {
    let mut lanes = [[0f32; LANES]; 3];
    let mut add = |lane: usize, x: f32| {
        let exact = in_steps(x, per_step).abs();
        // Stochastic rounding leaves magnitudes as they are, on average.
        let magnitude = if nearest { exact.round_ties_even() } else { exact };
        lanes[0][lane] += magnitude.min(1.0);
        lanes[1][lane] += magnitude;
        lanes[2][lane] += exact;
    };
    let (chunks, rest) = group.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in chunk.iter().enumerate() {
            add(lane, x);
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        add(lane, x);
    }
    let [nonzero, magnitudes, exact] = lanes.map(|lanes| lanes.iter().sum());
    Sums { nonzero, magnitudes, exact }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn round_to_nearest(group: &[f32], per_step: f32, into: &mut Vec<i32>) {
    into.extend(group.iter().map(|&x| in_steps(x, per_step).round_ties_even() as i32));
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn round_stochastically(group: &[f32], per_step: f32, first: u32, into: &mut Vec<i32>) {
    into.extend(group.iter().zip(0u32..).map(|(&x, i)| {
        let mut bits = first.wrapping_add(i).wrapping_mul(SPREAD[0]);
        bits = (bits ^ bits >> 16).wrapping_mul(SPREAD[1]);
        bits = (bits ^ bits >> 15).wrapping_mul(SPREAD[2]);
        bits ^= bits >> 16;
        // 24 bits are exact in f32, as a share below 1.
        let draw = (bits >> 8) as f32 / (1 << 24) as f32;
        (in_steps(x, per_step) + draw).floor().min(laplace::MOST as f32) as i32
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stochastic_rounding_is_right_on_average_and_nearest_takes_the_small_away() {
        let group = [0.4f32, -0.1, 2.5, -7.75, 0.0, 1.0, 0.31];
        let (mut sums, mut integers) = ([0.0; 7], Vec::new());
        for seed in 0..4_000 {
            Rounding::Stochastic { seed: seed * 977 }.round(&group, 0, 0.5, &mut integers);
            sums.iter_mut().zip(&integers).for_each(|(sum, &i)| *sum += f64::from(i) * 0.5 / 4_000.0);
        }
        assert!(sums.iter().zip(group).all(|(a, b)| (a - f64::from(b)).abs() < 0.02), "{sums:?}");
        Rounding::Nearest.round(&group, 0, 0.5, &mut integers);
        assert_eq!(integers, [1, 0, 5, -16, 0, 2, 1]);
    }

    #[test]
    fn a_tally_is_that_of_the_integers() {
        let group: Vec<f32> = (0..2_000).map(|i| ((i * 31 % 400) as f32 - 200.0) / 60.0).collect();
        for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 5 }] {
            let mut integers = Vec::new();
            rounding.round(&group, 3, 1.0, &mut integers);
            let Tally { nonzero, sum } = rounding.tally(&group, 1.0);
            let counted = integers.iter().filter(|&&i| i != 0).count() as f64;
            let total: f64 = integers.iter().map(|i| f64::from(i.abs())).sum();
            assert!((nonzero as f64 / counted - 1.0).abs() < 0.05, "{rounding:?}: {nonzero} {counted}");
            assert!((sum as f64 / total - 1.0).abs() < 0.02, "{rounding:?}: {sum} {total}");
            assert_eq!(rounding.tally(&group, 20.0), Tally::default());
        }
    }

    #[test]
    fn the_largest_numbers_stay_within_what_can_be_coded() {
        for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 1 }] {
            let mut integers = Vec::new();
            rounding.round(&[1e30, -1e30, f32::MAX], 0, 1.0, &mut integers);
            assert_eq!(integers, [laplace::MOST, -laplace::MOST, laplace::MOST]);
        }
    }
}
