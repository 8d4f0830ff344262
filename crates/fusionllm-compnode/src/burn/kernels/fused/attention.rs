//! Scaled dot-product attention over a packed projection, a block of queries at a time.
//!
//! As in FlashAttention (Dao et al., arXiv 2205.14135), BP makes the weights again from the scores and the log Σ exp of
//! each of their rows, so that no S x S matrix outlives its block; keys that the causal mask hides from a whole block are
//! not multiplied at all.

use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::matrix::{Accum, MatRef, dense, dense_mut, small_product, strided, strided_mut};
use super::vector::{exp, exp_in_place, max_of, sum_of_two};
use super::{Fused, rows_per_task, tensor};

/// Queries in a block.
const BLOCK: usize = 64;

/// qkv [B·S, 3·D] → softmax(q·kᵀ/√K + causal mask)·v, heads joined: [B·S, D] (Vaswani et al., section 3.2.1).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    /// Positions of a sequence, S.
    pub(crate) seq: usize,
    /// Heads, H; each has K = D / H columns.
    pub(crate) heads: usize,
    /// Columns of all heads together, D.
    pub(crate) width: usize,
    /// Whether a query sees only keys up to its own position.
    pub(crate) causal: bool,
}

/// What BP needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    qkv: FlexTensor,
    output: FlexTensor,
    /// log Σ exp of the scores, [B·S, H].
    log_sums: Vec<f32>,
}

/// The three matrices of a head of a sample, [S, K] each, in rows of 3·D.
#[derive(Clone, Copy, Debug)]
struct Head<'a> {
    query: &'a [f32],
    key: &'a [f32],
    value: &'a [f32],
}

impl Attention {
    fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim() as f32).sqrt()
    }

    /// Head `head` of a sample's rows of qkv.
    fn head<'a>(&self, sample: &'a [f32], head: usize) -> Head<'a> {
        let part = |index: usize| &sample[index * self.width + head * self.head_dim()..];
        Head { query: part(0), key: part(1), value: part(2) }
    }

    /// The first `rows` rows of K columns, in rows of 3·D.
    fn packed<'a>(&self, values: &'a [f32], rows: usize) -> MatRef<'a, f32> {
        strided(values, rows, self.head_dim(), 3 * self.width)
    }

    /// How many keys the block that begins at query `first` sees.
    fn keys(&self, first: usize, rows: usize) -> usize {
        if self.causal { first + rows } else { self.seq }
    }

    /// How many keys the query `row` sees.
    fn visible(&self, row: usize) -> usize {
        if self.causal { row + 1 } else { self.seq }
    }

    /// Scores of `rows` queries from `first` on with all keys that the block sees, times 1/√K: [rows, keys].
    fn scores(&self, head: Head<'_>, first: usize, rows: usize, scores: &mut Vec<f32>) -> usize {
        let keys = self.keys(first, rows);
        scores.resize(rows * keys, 0.0);
        let query = self.packed(&head.query[first * 3 * self.width..], rows);
        let out = dense_mut(scores, rows, keys);
        small_product(self.scale(), query, self.packed(head.key, keys).transpose(), out, Accum::Replace);
        keys
    }

    /// A block of queries of one sample, all heads. `output` [rows, D], `log_sums` [rows, H].
    fn forward_block(&self, sample: &[f32], first: usize, output: &mut [f32], log_sums: &mut [f32]) {
        let rows = output.len() / self.width;
        let mut scores = Vec::new();
        for index in 0..self.heads {
            let head = self.head(sample, index);
            let keys = self.scores(head, first, rows, &mut scores);
            for (row, weights) in scores.chunks_exact_mut(keys).enumerate() {
                let (seen, hidden) = weights.split_at_mut(self.visible(first + row));
                log_sums[row * self.heads + index] = softmax(seen);
                hidden.fill(0.0);
            }
            let weights = dense(&scores, rows, keys);
            let out = strided_mut(&mut output[index * self.head_dim()..], rows, self.head_dim(), self.width);
            small_product(1.0, weights, self.packed(head.value, keys), out, Accum::Replace);
        }
    }

    /// BP of one head of one sample: gradients of query, key and value, [3, S, K].
    fn backward_head(&self, saved: SampleSaved<'_>, gradient: &[f32], index: usize) -> Vec<f32> {
        let (seq, width, dim) = (self.seq, self.width, self.head_dim());
        let mut gradients = vec![0.0; 3 * seq * dim];
        let (query_gradient, rest) = gradients.split_at_mut(seq * dim);
        let (key_gradient, value_gradient) = rest.split_at_mut(seq * dim);
        let head = self.head(saved.qkv, index);
        let (mut weights, mut of_weights) = (Vec::new(), Vec::new());
        for first in (0..seq).step_by(BLOCK) {
            let rows = BLOCK.min(seq - first);
            let keys = self.scores(head, first, rows, &mut weights);
            let columns = first * width + index * dim;
            let of_output = strided(&gradient[columns..], rows, dim, width);
            of_weights.resize(rows * keys, 0.0);
            let out = dense_mut(&mut of_weights, rows, keys);
            small_product(1.0, of_output, self.packed(head.value, keys).transpose(), out, Accum::Replace);
            let pairs = weights.chunks_exact_mut(keys).zip(of_weights.chunks_exact_mut(keys));
            for (row, (weights, of_weights)) in pairs.enumerate() {
                let at = columns + row * width;
                let along = dot(&gradient[at..at + dim], &saved.output[at..at + dim]);
                let log_sum = saved.log_sums[(first + row) * self.heads + index];
                let seen = self.visible(first + row);
                softmax_backward(&mut weights[..seen], &mut of_weights[..seen], log_sum, along);
                weights[seen..].fill(0.0);
                of_weights[seen..].fill(0.0);
            }
            let weights = dense(&weights, rows, keys);
            let of_scores = dense(&of_weights, rows, keys);
            let query = self.packed(&head.query[first * 3 * width..], rows);
            let into = |values, rows| dense_mut(values, rows, dim);
            small_product(1.0, weights.transpose(), of_output, into(value_gradient, keys), Accum::Add);
            small_product(self.scale(), of_scores.transpose(), query, into(key_gradient, keys), Accum::Add);
            let out = into(&mut query_gradient[first * dim..], rows);
            small_product(self.scale(), of_scores, self.packed(head.key, keys), out, Accum::Replace);
        }
        gradients
    }
}

/// What FP saved of one sample.
#[derive(Clone, Copy, Debug)]
struct SampleSaved<'a> {
    qkv: &'a [f32],
    output: &'a [f32],
    log_sums: &'a [f32],
}

impl Fused<1> for Attention {
    type Saved = Saved;

    fn forward(&self, [qkv]: [FlexTensor; 1]) -> (FlexTensor, Saved) {
        let values = qkv.as_slice::<f32>().unwrap_or_default();
        let count = values.len() / (3 * self.width);
        let (mut output, mut log_sums) = (vec![0.0; count * self.width], vec![0.0; count * self.heads]);
        output
            .par_chunks_mut(self.seq * self.width)
            .zip(log_sums.par_chunks_mut(self.seq * self.heads))
            .zip(values.par_chunks(self.seq * 3 * self.width))
            .for_each(|((output, log_sums), sample)| {
                let blocks = output.par_chunks_mut(BLOCK * self.width);
                let blocks = blocks.zip(log_sums.par_chunks_mut(BLOCK * self.heads)).enumerate();
                blocks.for_each(|(block, (output, log_sums))| {
                    self.forward_block(sample, block * BLOCK, output, log_sums);
                });
            });
        let output = tensor(output, [count, self.width]);
        (output.clone(), Saved { qkv, output, log_sums })
    }

    fn backward(&self, saved: Saved, gradient: FlexTensor, _wanted: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let (seq, width, dim) = (self.seq, self.width, self.head_dim());
        let qkv = saved.qkv.as_slice::<f32>().unwrap_or_default();
        let output = saved.output.as_slice::<f32>().unwrap_or_default();
        let of_output = gradient.as_slice::<f32>().unwrap_or_default();
        let samples = output.len() / (seq * width);
        let heads: Vec<Vec<f32>> = (0..samples * self.heads)
            .into_par_iter()
            .map(|task| {
                let (sample, head) = (task / self.heads, task % self.heads);
                let rows = |columns: usize| sample * seq * columns..(sample + 1) * seq * columns;
                let saved = SampleSaved {
                    qkv: &qkv[rows(3 * width)],
                    output: &output[rows(width)],
                    log_sums: &saved.log_sums[rows(self.heads)],
                };
                self.backward_head(saved, &of_output[rows(width)], head)
            })
            .collect();
        let mut gradients = vec![0.0; qkv.len()];
        let size = rows_per_task(3 * width);
        gradients.par_chunks_mut(size * 3 * width).enumerate().for_each(|(task, rows)| {
            for (row, packed) in (task * size..).zip(rows.chunks_exact_mut(3 * width)) {
                let (sample, at) = (row / seq, row % seq * dim);
                for (column, target) in packed.chunks_exact_mut(dim).enumerate() {
                    let (part, head) = (column / self.heads, column % self.heads);
                    let from = part * seq * dim + at;
                    target.copy_from_slice(&heads[sample * self.heads + head][from..from + dim]);
                }
            }
        });
        [Some(tensor(gradients, [samples * seq, 3 * width]))]
    }
}

/// x → softmax(x); gives log Σ exp.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn softmax(x: &mut [f32]) -> f32 {
    let max = max_of(x);
    let sum = exp_in_place(x, max);
    let scale = 1.0 / sum;
    for x in x {
        *x *= scale;
    }
    max + sum.ln()
}

/// Scores become weights again, and the gradient of the weights becomes that of the scores. `along` is Σ weight ·
/// gradient, which is also output · gradient.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn softmax_backward(scores: &mut [f32], gradient: &mut [f32], log_sum: f32, along: f32) {
    for (score, gradient) in scores.iter_mut().zip(gradient) {
        *score = exp(*score - log_sum);
        *gradient = *score * (*gradient - along);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of_two(a, b, |a, b| a * b)
}
