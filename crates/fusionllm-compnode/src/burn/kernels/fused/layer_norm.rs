//! Layer norm over the last dimension (Ba et al., arXiv 1607.06450), in one pass each way.

use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::vector::{add, sum_of, sum_of_two};
use super::{Fused, dims, rows_per_task, tensor};

/// x [N, D], weight [D], bias [D] → (x - mean) / sqrt(var + eps) · weight + bias, with the biased variance.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerNorm {
    pub(crate) eps: f32,
}

/// What BP needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    /// Mean and 1 / sqrt(var + eps) of each row.
    moments: Vec<(f32, f32)>,
}

impl Fused<3> for LayerNorm {
    type Saved = Saved;

    fn forward(&self, [x, weight, bias]: [FlexTensor; 3]) -> (FlexTensor, Saved) {
        let (rows, columns) = dims(&x);
        let values = x.as_slice::<f32>().unwrap_or_default();
        let scale = weight.as_slice::<f32>().unwrap_or_default();
        let shift = bias.as_slice::<f32>().unwrap_or_default();
        let (mut output, mut moments) = (vec![0.0; values.len()], vec![(0.0, 0.0); rows]);
        let size = rows_per_task(columns);
        output
            .par_chunks_mut(size * columns)
            .zip(values.par_chunks(size * columns))
            .zip(moments.par_chunks_mut(size))
            .for_each(|((output, x), moments)| forward(self.eps, x, scale, shift, output, moments));
        (tensor(output, [rows, columns]), Saved { x, weight, moments })
    }

    fn backward(&self, saved: Saved, mut gradient: FlexTensor, wanted: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let (_, columns) = dims(&saved.x);
        let x = saved.x.as_slice::<f32>().unwrap_or_default();
        let scale = saved.weight.as_slice::<f32>().unwrap_or_default();
        let size = rows_per_task(columns);
        let tasks = gradient
            .storage_mut::<f32>()
            .par_chunks_mut(size * columns)
            .zip(x.par_chunks(size * columns))
            .zip(saved.moments.par_chunks(size));
        // Weight and bias in one row; added up in the order of the tasks, so that the sum is the same on any threads.
        let parts: Vec<Vec<f32>> = tasks
            .map(|((gradient, x), moments)| {
                let mut sums = vec![0.0; 2 * columns];
                let (weight, bias) = sums.split_at_mut(columns);
                backward(gradient, x, scale, moments, weight, bias);
                sums
            })
            .collect();
        let mut sums = vec![0.0; 2 * columns];
        for part in parts {
            add(&mut sums, &part);
        }
        let bias = sums.split_off(columns);
        let [want_x, want_weight, want_bias] = wanted;
        [
            want_x.then_some(gradient),
            want_weight.then(|| tensor(sums, [columns])),
            want_bias.then(|| tensor(bias, [columns])),
        ]
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn forward(eps: f32, x: &[f32], weight: &[f32], bias: &[f32], output: &mut [f32], moments: &mut [(f32, f32)]) {
    let columns = weight.len();
    let rows = x.chunks_exact(columns).zip(output.chunks_exact_mut(columns));
    for ((x, output), moments) in rows.zip(moments) {
        let mean = sum_of(x, |x| x) / columns as f32;
        let variance = sum_of(x, |x| (x - mean) * (x - mean)) / columns as f32;
        let scale = 1.0 / (variance + eps).sqrt();
        *moments = (mean, scale);
        for (((output, &x), &weight), &bias) in output.iter_mut().zip(x).zip(weight).zip(bias) {
            *output = (x - mean) * scale * weight + bias;
        }
    }
}

/// Turns the gradient of the output into that of x, and adds those of weight and bias up.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn backward(
    gradient: &mut [f32],
    x: &[f32],
    weight: &[f32],
    moments: &[(f32, f32)],
    weight_sum: &mut [f32],
    bias_sum: &mut [f32],
) {
    let columns = weight.len();
    let count = columns as f32;
    let rows = x.chunks_exact(columns).zip(gradient.chunks_exact_mut(columns));
    for ((x, gradient), &(mean, scale)) in rows.zip(moments) {
        let sums = weight_sum.iter_mut().zip(bias_sum.iter_mut());
        for (((gradient, &x), &weight), (weight_sum, bias_sum)) in gradient.iter_mut().zip(x).zip(weight).zip(sums) {
            *weight_sum += *gradient * (x - mean) * scale;
            *bias_sum += *gradient;
            *gradient *= weight;
        }
        let plain = sum_of(gradient, |g| g) / count;
        let along = sum_of_two(gradient, x, |g, x| g * (x - mean)) * scale * scale / count;
        for (gradient, &x) in gradient.iter_mut().zip(x) {
            *gradient = (*gradient - plain - (x - mean) * along) * scale;
        }
    }
}
