//! Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467), in one pass each way.

use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::vector::{add, sum_of, sum_of_two};
use super::{Fused, dims, rows_per_task, tensor};

/// x [N, groups · D], weight [D] → x / sqrt(mean of squares of the group + eps) · weight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RmsNorm {
    pub(crate) eps: f32,
}

/// What BP needs.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    /// 1 / sqrt(mean of squares + eps) of each group.
    scales: Vec<f32>,
}

impl Fused<2> for RmsNorm {
    type Saved = Saved;

    fn forward(&self, [x, weight]: [FlexTensor; 2]) -> (FlexTensor, Saved) {
        let (rows, columns) = dims(&x);
        let values = x.as_slice::<f32>().unwrap_or_default();
        let factors = weight.as_slice::<f32>().unwrap_or_default();
        let dim = factors.len();
        let (mut output, mut scales) = (vec![0.0; values.len()], vec![0.0; values.len() / dim.max(1)]);
        let size = rows_per_task(dim);
        output
            .par_chunks_mut(size * dim)
            .zip(values.par_chunks(size * dim))
            .zip(scales.par_chunks_mut(size))
            .for_each(|((output, x), scales)| forward(self.eps, x, factors, output, scales));
        (tensor(output, [rows, columns]), Saved { x, weight, scales })
    }

    fn backward(&self, saved: Saved, mut gradient: FlexTensor, wanted: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let x = saved.x.as_slice::<f32>().unwrap_or_default();
        let factors = saved.weight.as_slice::<f32>().unwrap_or_default();
        let dim = factors.len();
        let size = rows_per_task(dim);
        let tasks = gradient
            .storage_mut::<f32>()
            .par_chunks_mut(size * dim)
            .zip(x.par_chunks(size * dim))
            .zip(saved.scales.par_chunks(size));
        // Added up in the order of the tasks, so that the sum is the same on any threads.
        let parts: Vec<Vec<f32>> = tasks
            .map(|((gradient, x), scales)| {
                let mut sum = vec![0.0; dim];
                backward(gradient, x, factors, scales, &mut sum);
                sum
            })
            .collect();
        let mut sum = vec![0.0; dim];
        for part in parts {
            add(&mut sum, &part);
        }
        let [want_x, want_weight] = wanted;
        [want_x.then_some(gradient), want_weight.then(|| tensor(sum, [dim]))]
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn forward(eps: f32, x: &[f32], weight: &[f32], output: &mut [f32], scales: &mut [f32]) {
    let dim = weight.len();
    let groups = x.chunks_exact(dim).zip(output.chunks_exact_mut(dim));
    for ((x, output), kept) in groups.zip(scales) {
        let scale = 1.0 / (sum_of(x, |x| x * x) / dim as f32 + eps).sqrt();
        *kept = scale;
        for ((output, &x), &weight) in output.iter_mut().zip(x).zip(weight) {
            *output = x * scale * weight;
        }
    }
}

/// Turns the gradient of the output into that of x, and adds that of the weight up.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn backward(gradient: &mut [f32], x: &[f32], weight: &[f32], scales: &[f32], weight_sum: &mut [f32]) {
    let dim = weight.len();
    let groups = x.chunks_exact(dim).zip(gradient.chunks_exact_mut(dim));
    for ((x, gradient), &scale) in groups.zip(scales) {
        let sums = weight_sum.iter_mut();
        for (((gradient, &x), &weight), sum) in gradient.iter_mut().zip(x).zip(weight).zip(sums) {
            *sum += *gradient * x * scale;
            *gradient *= weight;
        }
        let along = sum_of_two(gradient, x, |g, x| g * x) * scale * scale / dim as f32;
        for (gradient, &x) in gradient.iter_mut().zip(x) {
            *gradient = (*gradient - x * along) * scale;
        }
    }
}
