//! Scaled dot-product attention, a block of queries at a time.
//!
//! As in FlashAttention (Dao et al., arXiv 2205.14135), BP makes the weights again from the scores and the log Σ exp of
//! each of their rows, so that no S x S matrix outlives its block; keys that the causal mask hides from a whole block are
//! not multiplied at all.

use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::matrix::{Accum, MatRef, dense, dense_mut, small_product, strided, strided_mut};
use super::vector::{add, exp, exp_in_place, max_of, sum_of_two};
use super::{Fused, dims, rows_per_task, tensor};

/// Queries in a block.
const BLOCK: usize = 64;

/// softmax(q·kᵀ/√K + causal mask)·v, heads joined (Vaswani et al., section 3.2.1), over sequences of one length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    /// Positions of a sequence, S.
    pub(crate) seq: usize,
    /// Heads of queries, H.
    pub(crate) heads: usize,
    /// Heads of keys and values, G, each of which serves H / G heads of queries that follow each other.
    pub(crate) kv_heads: usize,
    /// Columns of a head, K.
    pub(crate) head_dim: usize,
    /// Whether a query sees only keys up to its own position.
    pub(crate) causal: bool,
}

/// Queries, keys and values in one matrix: [B·S, 3·H·K] → [B·S, H·K]. There are as many heads of keys as of queries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedAttention(pub(crate) Attention);

/// Queries [B·S, H·K], keys and values [B·S, G·K] → [B·S, H·K].
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupedAttention(pub(crate) Attention);

/// What BP needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved<const N: usize> {
    inputs: [FlexTensor; N],
    output: FlexTensor,
    /// log Σ exp of the scores, [B·S, H].
    log_sums: Vec<f32>,
}

/// Rows with the columns of one or all heads; from one row to the next are `stride` elements.
#[derive(Clone, Copy, Debug)]
struct Rows<'a> {
    values: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    /// From this row and column on.
    fn from(self, row: usize, column: usize) -> Self {
        Self { values: &self.values[row * self.stride + column..], ..self }
    }
}

/// Queries, keys and values, of one head or of all.
#[derive(Clone, Copy, Debug)]
struct Parts<'a> {
    query: Rows<'a>,
    key: Rows<'a>,
    value: Rows<'a>,
}

impl Attention {
    /// Columns of all heads of queries together.
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// The parts of a packed matrix.
    fn packed<'a>(&self, qkv: &'a [f32]) -> Parts<'a> {
        let all = Rows { values: qkv, stride: 3 * self.width() };
        Parts { query: all, key: all.from(0, self.width()), value: all.from(0, 2 * self.width()) }
    }

    /// The parts in a matrix each.
    fn apart<'a>(&self, [query, key, value]: [&'a [f32]; 3]) -> Parts<'a> {
        let kv = |values| Rows { values, stride: self.kv_heads * self.head_dim };
        Parts { query: Rows { values: query, stride: self.width() }, key: kv(key), value: kv(value) }
    }

    /// Sample `sample`, and of it head `head` of the queries with the head of keys and values that serves it.
    fn head<'a>(&self, parts: Parts<'a>, sample: usize, head: usize) -> Parts<'a> {
        let (row, dim) = (sample * self.seq, self.head_dim);
        let kv_head = head / (self.heads / self.kv_heads);
        Parts {
            query: parts.query.from(row, head * dim),
            key: parts.key.from(row, kv_head * dim),
            value: parts.value.from(row, kv_head * dim),
        }
    }

    /// The first `rows` rows of K columns.
    fn matrix<'a>(&self, part: Rows<'a>, rows: usize) -> MatRef<'a, f32> {
        strided(part.values, rows, self.head_dim, part.stride)
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
    fn scores(&self, head: Parts<'_>, first: usize, rows: usize, scores: &mut Vec<f32>) -> usize {
        let keys = self.keys(first, rows);
        scores.resize(rows * keys, 0.0);
        let query = self.matrix(head.query.from(first, 0), rows);
        let out = dense_mut(scores, rows, keys);
        small_product(self.scale(), query, self.matrix(head.key, keys).transpose(), out, Accum::Replace);
        keys
    }

    /// FP of all samples: output [B·S, H·K], and log Σ exp of the scores [B·S, H].
    fn forward(&self, parts: Parts<'_>, rows: usize) -> (Vec<f32>, Vec<f32>) {
        let width = self.width();
        let (mut output, mut log_sums) = (vec![0.0; rows * width], vec![0.0; rows * self.heads]);
        let samples = output.par_chunks_mut(self.seq * width).zip(log_sums.par_chunks_mut(self.seq * self.heads));
        samples.enumerate().for_each(|(sample, (output, log_sums))| {
            let blocks = output.par_chunks_mut(BLOCK * width);
            let blocks = blocks.zip(log_sums.par_chunks_mut(BLOCK * self.heads)).enumerate();
            blocks.for_each(|(block, (output, log_sums))| {
                self.forward_block(parts, sample, block * BLOCK, output, log_sums);
            });
        });
        (output, log_sums)
    }

    /// A block of queries of one sample, all heads. `output` [rows, H·K], `log_sums` [rows, H].
    fn forward_block(&self, parts: Parts<'_>, sample: usize, first: usize, output: &mut [f32], log_sums: &mut [f32]) {
        let (width, dim) = (self.width(), self.head_dim);
        let rows = output.len() / width;
        let mut scores = Vec::new();
        for index in 0..self.heads {
            let head = self.head(parts, sample, index);
            let keys = self.scores(head, first, rows, &mut scores);
            for (row, weights) in scores.chunks_exact_mut(keys).enumerate() {
                let (seen, hidden) = weights.split_at_mut(self.visible(first + row));
                log_sums[row * self.heads + index] = softmax(seen);
                hidden.fill(0.0);
            }
            let weights = dense(&scores, rows, keys);
            let out = strided_mut(&mut output[index * dim..], rows, dim, width);
            small_product(1.0, weights, self.matrix(head.value, keys), out, Accum::Replace);
        }
    }

    /// BP of all heads of all samples: gradients of query, key and value, [3, S, K] of each head of each sample.
    fn backward(&self, parts: Parts<'_>, output: &[f32], log_sums: &[f32], gradient: &[f32]) -> Vec<Vec<f32>> {
        let samples = output.len() / (self.seq * self.width());
        let task = |task| {
            let (sample, index) = (task / self.heads, task % self.heads);
            let rows = |columns: usize| sample * self.seq * columns..(sample + 1) * self.seq * columns;
            let made = Made {
                output: &output[rows(self.width())],
                log_sums: &log_sums[rows(self.heads)],
                gradient: &gradient[rows(self.width())],
            };
            self.backward_head(self.head(parts, sample, index), made, index)
        };
        (0..samples * self.heads).into_par_iter().map(task).collect()
    }

    /// BP of one head of one sample: gradients of query, key and value, [3, S, K].
    fn backward_head(&self, head: Parts<'_>, made: Made<'_>, index: usize) -> Vec<f32> {
        let (seq, width, dim) = (self.seq, self.width(), self.head_dim);
        let mut gradients = vec![0.0; 3 * seq * dim];
        let (query_gradient, rest) = gradients.split_at_mut(seq * dim);
        let (key_gradient, value_gradient) = rest.split_at_mut(seq * dim);
        let (mut weights, mut of_weights) = (Vec::new(), Vec::new());
        for first in (0..seq).step_by(BLOCK) {
            let rows = BLOCK.min(seq - first);
            let keys = self.scores(head, first, rows, &mut weights);
            let columns = first * width + index * dim;
            let of_output = strided(&made.gradient[columns..], rows, dim, width);
            of_weights.resize(rows * keys, 0.0);
            let out = dense_mut(&mut of_weights, rows, keys);
            small_product(1.0, of_output, self.matrix(head.value, keys).transpose(), out, Accum::Replace);
            let pairs = weights.chunks_exact_mut(keys).zip(of_weights.chunks_exact_mut(keys));
            for (row, (weights, of_weights)) in pairs.enumerate() {
                let at = columns + row * width;
                let along = dot(&made.gradient[at..at + dim], &made.output[at..at + dim]);
                let log_sum = made.log_sums[(first + row) * self.heads + index];
                let seen = self.visible(first + row);
                softmax_backward(&mut weights[..seen], &mut of_weights[..seen], log_sum, along);
                weights[seen..].fill(0.0);
                of_weights[seen..].fill(0.0);
            }
            let weights = dense(&weights, rows, keys);
            let of_scores = dense(&of_weights, rows, keys);
            let query = self.matrix(head.query.from(first, 0), rows);
            let into = |values, rows| dense_mut(values, rows, dim);
            small_product(1.0, weights.transpose(), of_output, into(value_gradient, keys), Accum::Add);
            small_product(self.scale(), of_scores.transpose(), query, into(key_gradient, keys), Accum::Add);
            let out = into(&mut query_gradient[first * dim..], rows);
            small_product(self.scale(), of_scores, self.matrix(head.key, keys), out, Accum::Replace);
        }
        gradients
    }

    /// Part `part` of the gradients of all heads as a matrix [B·S, heads of the part · K]: a head of keys or values has
    /// the sum over the heads of queries that it serves, in their order.
    fn joined(&self, of_heads: &[Vec<f32>], part: usize, kv: bool) -> Vec<f32> {
        let (seq, dim) = (self.seq, self.head_dim);
        let heads = if kv { self.kv_heads } else { self.heads };
        let (served, width) = (self.heads / heads, heads * dim);
        let rows = of_heads.len() / self.heads * seq;
        let mut gradients = vec![0.0; rows * width];
        let size = rows_per_task(width);
        gradients.par_chunks_mut(size * width).enumerate().for_each(|(task, chunk)| {
            for (row, joined) in (task * size..).zip(chunk.chunks_exact_mut(width)) {
                let (sample, from) = (row / seq, part * seq * dim + row % seq * dim);
                for (head, target) in joined.chunks_exact_mut(dim).enumerate() {
                    let first = sample * self.heads + head * served;
                    target.copy_from_slice(&of_heads[first][from..from + dim]);
                    for other in &of_heads[first + 1..first + served] {
                        add(target, &other[from..from + dim]);
                    }
                }
            }
        });
        gradients
    }
}

/// What FP made of one sample, and the gradient of its output.
#[derive(Clone, Copy, Debug)]
struct Made<'a> {
    output: &'a [f32],
    log_sums: &'a [f32],
    gradient: &'a [f32],
}

impl Fused<1> for PackedAttention {
    type Saved = Saved<1>;

    fn forward(&self, inputs: [FlexTensor; 1]) -> (FlexTensor, Saved<1>) {
        let [qkv] = &inputs;
        let (rows, _) = dims(qkv);
        let (output, log_sums) = self.0.forward(self.0.packed(values(qkv)), rows);
        let output = tensor(output, [rows, self.0.width()]);
        (output.clone(), Saved { inputs, output, log_sums })
    }

    fn backward(&self, saved: Saved<1>, gradient: FlexTensor, _wanted: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let (seq, width, dim) = (self.0.seq, self.0.width(), self.0.head_dim);
        let parts = self.0.packed(values(&saved.inputs[0]));
        let heads = self.0.backward(parts, values(&saved.output), &saved.log_sums, values(&gradient));
        let rows = heads.len() / self.0.heads * seq;
        let mut gradients = vec![0.0; rows * 3 * width];
        let size = rows_per_task(3 * width);
        gradients.par_chunks_mut(size * 3 * width).enumerate().for_each(|(task, chunk)| {
            for (row, packed) in (task * size..).zip(chunk.chunks_exact_mut(3 * width)) {
                let (sample, at) = (row / seq, row % seq * dim);
                for (column, target) in packed.chunks_exact_mut(dim).enumerate() {
                    let (part, head) = (column / self.0.heads, column % self.0.heads);
                    let from = part * seq * dim + at;
                    target.copy_from_slice(&heads[sample * self.0.heads + head][from..from + dim]);
                }
            }
        });
        [Some(tensor(gradients, [rows, 3 * width]))]
    }
}

impl Fused<3> for GroupedAttention {
    type Saved = Saved<3>;

    fn forward(&self, inputs: [FlexTensor; 3]) -> (FlexTensor, Saved<3>) {
        let (rows, _) = dims(&inputs[0]);
        let (output, log_sums) = self.0.forward(self.0.apart(inputs.each_ref().map(values)), rows);
        let output = tensor(output, [rows, self.0.width()]);
        (output.clone(), Saved { inputs, output, log_sums })
    }

    fn backward(&self, saved: Saved<3>, gradient: FlexTensor, wanted: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let parts = self.0.apart(saved.inputs.each_ref().map(values));
        let heads = self.0.backward(parts, values(&saved.output), &saved.log_sums, values(&gradient));
        let (rows, _) = dims(&saved.output);
        let [query, key, value] = wanted;
        let part = |part, wanted: bool, kv| {
            wanted.then(|| {
                let joined = self.0.joined(&heads, part, kv);
                let columns = joined.len() / rows.max(1);
                tensor(joined, [rows, columns])
            })
        };
        [part(0, query, false), part(1, key, true), part(2, value, true)]
    }
}

/// All elements of a contiguous tensor.
fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().unwrap_or_default()
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
