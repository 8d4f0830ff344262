//! What an op costs: floating-point operations and bytes.
//!
//! A multiply-add counts 2; an addition, comparison, division or elementary function counts 1. The figures steer the
//! planner, so counts that are small beside a matrix product (a bias, a causal mask) are left out where the op says so.

use std::iter::Sum;
use std::ops::Add;

use serde::{Deserialize, Serialize};

/// How a device computes ops of several steps, such as attention, which decides what FP keeps for BP. A backend says which
/// of the two it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kernels {
    /// Step by step, each with a tensor of its own, which is kept: GPUs through Burn, and devices of which nothing is known.
    #[default]
    Plain,
    /// In one go, with what is in between made anew in BP: CPUs, and NVIDIA's GPUs.
    Fused,
}

/// The cost of one micro-batch through one op, or a sum of such. All counts stop at `u64::MAX`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations of the FP.
    pub fp_flops: u64,
    /// Floating-point operations of the BP; 0 if no parameter lies upstream.
    pub bp_flops: u64,
    /// Bytes that the FP reads: inputs, parameters, and what it made in between.
    pub read_bytes: u64,
    /// Bytes that the FP writes: the output, and what it made in between.
    pub write_bytes: u64,
    /// Bytes kept between FP and BP because this op's BP reads them. A tensor that two ops keep is counted by both,
    /// so a sum is an upper bound.
    pub kept_bytes: u64,
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            fp_flops: self.fp_flops.saturating_add(other.fp_flops),
            bp_flops: self.bp_flops.saturating_add(other.bp_flops),
            read_bytes: self.read_bytes.saturating_add(other.read_bytes),
            write_bytes: self.write_bytes.saturating_add(other.write_bytes),
            kept_bytes: self.kept_bytes.saturating_add(other.kept_bytes),
        }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_add_field_by_field_and_saturate() {
        let one = Cost { fp_flops: 1, bp_flops: 2, read_bytes: 3, write_bytes: 4, kept_bytes: 5 };
        let sum: Cost = [one, one].into_iter().sum();
        assert_eq!(sum, Cost { fp_flops: 2, bp_flops: 4, read_bytes: 6, write_bytes: 8, kept_bytes: 10 });
        assert_eq!((Cost { fp_flops: u64::MAX, ..one } + one).fp_flops, u64::MAX);
    }
}
