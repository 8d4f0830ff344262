//! Rotary position embedding (Su et al., arXiv 2104.09864), in one pass each way.

use std::sync::Arc;

use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{Fused, dims, rows_per_task, tensor};

/// x [B·S, H·K] → each head turned by its position; element i of a head's first half goes with element i of its second.
#[derive(Clone, Debug)]
pub(crate) struct Rotary {
    /// Positions of a sequence, S.
    pub(crate) seq: usize,
    /// Columns of a head, K.
    pub(crate) head_dim: usize,
    /// Cosines, [S, K / 2].
    pub(crate) cos: Arc<[f32]>,
    /// Sines, [S, K / 2].
    pub(crate) sin: Arc<[f32]>,
}

impl Rotary {
    /// Turns all rows, backwards with `back`.
    fn turn(&self, values: &mut [f32], columns: usize, back: bool) {
        let (half, size) = (self.head_dim / 2, rows_per_task(columns));
        values.par_chunks_mut(size * columns).enumerate().for_each(|(task, rows)| {
            for (row, values) in (task * size..).zip(rows.chunks_exact_mut(columns)) {
                let at = row % self.seq * half;
                let angles = [&self.cos[at..at + half], &self.sin[at..at + half]];
                for head in values.chunks_exact_mut(self.head_dim) {
                    let (first, second) = head.split_at_mut(half);
                    turn(first, second, angles, if back { -1.0 } else { 1.0 });
                }
            }
        });
    }
}

impl Fused<1> for Rotary {
    type Saved = ();

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, ()) {
        let (rows, columns) = dims(&x);
        let mut output = x.as_slice::<f32>().unwrap_or_default().to_vec();
        self.turn(&mut output, columns, false);
        (tensor(output, [rows, columns]), ())
    }

    fn backward(&self, (): (), mut gradient: FlexTensor, _wanted: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let (_, columns) = dims(&gradient);
        self.turn(gradient.storage_mut::<f32>(), columns, true);
        [Some(gradient)]
    }
}

/// (a, b) → (a·cos − b·sin, b·cos + a·sin), with the sine times `direction`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn turn(first: &mut [f32], second: &mut [f32], [cos, sin]: [&[f32]; 2], direction: f32) {
    for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let sin = sin * direction;
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
