//! Smooth non-linearities, in one pass each way.

use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::vector::exp;
use super::{Fused, TASK, tensor};

/// 2·√(2/π): the argument of the sigmoid form of tanh.
const TWO_SQRT_2_OVER_PI: f32 = 1.595_769_2;
/// The cubic coefficient of the tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415).
const CUBIC: f32 = 0.044_715;

/// x → x · gate(x), any shape.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gated {
    /// x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³))).
    Gelu,
    /// x · sigmoid(x).
    Silu,
}

impl Fused<1> for Gated {
    type Saved = FlexTensor;

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, FlexTensor) {
        let values = x.as_slice::<f32>().unwrap_or_default();
        let mut output = vec![0.0; values.len()];
        let tasks = output.par_chunks_mut(TASK).zip(values.par_chunks(TASK));
        tasks.for_each(|(output, x)| match self {
            Self::Gelu => gelu(x, output),
            Self::Silu => silu(x, output),
        });
        (tensor(output, x.layout().shape().clone()), x)
    }

    fn backward(&self, x: FlexTensor, mut gradient: FlexTensor, _wanted: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let values = x.as_slice::<f32>().unwrap_or_default();
        let tasks = gradient.storage_mut::<f32>().par_chunks_mut(TASK).zip(values.par_chunks(TASK));
        tasks.for_each(|(gradient, x)| match self {
            Self::Gelu => gelu_backward(x, gradient),
            Self::Silu => silu_backward(x, gradient),
        });
        [Some(gradient)]
    }
}

/// 0.5·(1 + tanh z) = sigmoid(2z), with 2z.
#[inline(always)]
fn gate(x: f32) -> f32 {
    1.0 / (1.0 + exp(-(x * (TWO_SQRT_2_OVER_PI + TWO_SQRT_2_OVER_PI * CUBIC * x * x))))
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn gelu(x: &[f32], output: &mut [f32]) {
    for (output, &x) in output.iter_mut().zip(x) {
        *output = x * gate(x);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn gelu_backward(x: &[f32], gradient: &mut [f32]) {
    for (gradient, &x) in gradient.iter_mut().zip(x) {
        let gate = gate(x);
        let slope = TWO_SQRT_2_OVER_PI + 3.0 * TWO_SQRT_2_OVER_PI * CUBIC * x * x;
        *gradient *= gate + x * gate * (1.0 - gate) * slope;
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn silu(x: &[f32], output: &mut [f32]) {
    for (output, &x) in output.iter_mut().zip(x) {
        *output = x * sigmoid(x);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn silu_backward(x: &[f32], gradient: &mut [f32]) {
    for (gradient, &x) in gradient.iter_mut().zip(x) {
        let gate = sigmoid(x);
        *gradient *= gate + x * gate * (1.0 - gate);
    }
}
