//! x · W + b as one product each way.

use burn_flex::FlexTensor;
use fusionllm_graph::WeightLayout;
use multiversion::multiversion;
use rayon::prelude::*;

use super::matrix::{MatRef, add_product, dense, dense_mut, new_product};
use super::vector::add;
use super::{Fused, dims, rows_per_task, tensor};

/// x [N, inputs], weight of inputs · outputs values, and for `N = 3` a bias [outputs] → [N, outputs].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) layout: WeightLayout,
}

/// Where the bias is among the operands.
const BIAS: usize = 2;

impl Linear {
    /// x · W + b, row after row.
    fn output(&self, x: &FlexTensor, weight: &FlexTensor, bias: Option<&FlexTensor>) -> FlexTensor {
        let (rows, _) = dims(x);
        let x = dense(x.as_slice().unwrap_or_default(), rows, self.inputs);
        let weight = self.weight(weight.as_slice().unwrap_or_default());
        let output = match bias.and_then(FlexTensor::as_slice::<f32>) {
            Some(bias) => {
                let mut output = bias.repeat(rows);
                add_product(x, weight, dense_mut(&mut output, rows, self.outputs));
                output
            }
            None => new_product(x, weight),
        };
        tensor(output, [rows, self.outputs])
    }

    /// The sum over micro-batches of the weight's gradient, [inputs · outputs], with that of one more added in place.
    pub(crate) fn add_weight_gradient(
        &self,
        sum: Option<FlexTensor>,
        x: &FlexTensor,
        gradient: &FlexTensor,
    ) -> FlexTensor {
        let (rows, _) = dims(x);
        let (x, gradient) = (x.to_contiguous(), gradient.to_contiguous());
        let x = dense(x.as_slice().unwrap_or_default(), rows, self.inputs);
        let gradient = dense(gradient.as_slice().unwrap_or_default(), rows, self.outputs);
        let Some(mut sum) = sum else { return self.weight_gradient(x, gradient) };
        let (a, b) = self.weight_factors(x, gradient);
        add_product(a, b, dense_mut(sum.storage_mut(), a.nrows(), b.ncols()));
        sum
    }

    /// The weight as [inputs, outputs].
    fn weight<'a>(&self, values: &'a [f32]) -> MatRef<'a, f32> {
        match self.layout {
            WeightLayout::InOut => dense(values, self.inputs, self.outputs),
            WeightLayout::OutIn => dense(values, self.outputs, self.inputs).transpose(),
        }
    }

    fn x_gradient(&self, weight: &[f32], gradient: MatRef<'_, f32>, rows: usize) -> FlexTensor {
        tensor(new_product(gradient, self.weight(weight).transpose()), [rows, self.inputs])
    }

    /// The matrices whose product is the gradient of the weight, in its layout.
    pub(super) fn weight_factors<'a>(
        &self,
        x: MatRef<'a, f32>,
        gradient: MatRef<'a, f32>,
    ) -> (MatRef<'a, f32>, MatRef<'a, f32>) {
        match self.layout {
            WeightLayout::InOut => (x.transpose(), gradient),
            WeightLayout::OutIn => (gradient.transpose(), x),
        }
    }

    fn weight_gradient(&self, x: MatRef<'_, f32>, gradient: MatRef<'_, f32>) -> FlexTensor {
        let (a, b) = self.weight_factors(x, gradient);
        tensor(new_product(a, b), [self.inputs * self.outputs])
    }

    /// The sum over rows.
    fn bias_gradient(&self, gradient: &[f32]) -> FlexTensor {
        let size = rows_per_task(self.outputs) * self.outputs;
        let parts: Vec<Vec<f32>> = gradient.par_chunks(size).map(|rows| column_sums(rows, self.outputs)).collect();
        let mut sum = vec![0.0; self.outputs];
        for part in parts {
            add(&mut sum, &part);
        }
        tensor(sum, [self.outputs])
    }
}

impl<const N: usize> Fused<N> for Linear {
    /// x and the weight.
    type Saved = (FlexTensor, FlexTensor);

    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Self::Saved) {
        let [x, weight] = [0, 1].map(|i| inputs[i].clone());
        (self.output(&x, &weight, inputs.get(BIAS)), (x, weight))
    }

    fn backward(&self, saved: Self::Saved, gradient: FlexTensor, wanted: [bool; N]) -> [Option<FlexTensor>; N] {
        let (x, weight) = saved;
        let (rows, _) = dims(&x);
        let values = gradient.as_slice::<f32>().unwrap_or_default();
        let of_output = dense(values, rows, self.outputs);
        std::array::from_fn(|input| match input {
            _ if !wanted[input] => None,
            0 => Some(self.x_gradient(weight.as_slice().unwrap_or_default(), of_output, rows)),
            1 => {
                let x = dense(x.as_slice().unwrap_or_default(), rows, self.inputs);
                Some(self.weight_gradient(x, of_output))
            }
            _ => Some(self.bias_gradient(values)),
        })
    }
}

/// As [`Linear`], with weight and bias that are constants: BP gives the gradient of x alone, for which x need not be kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrozenLinear(pub(crate) Linear);

impl<const N: usize> Fused<N> for FrozenLinear {
    /// The weight, of inputs · outputs values.
    type Saved = FlexTensor;

    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Self::Saved) {
        let [x, weight] = [0, 1].map(|i| &inputs[i]);
        (self.0.output(x, weight, inputs.get(BIAS)), weight.clone())
    }

    fn backward(&self, weight: FlexTensor, gradient: FlexTensor, wanted: [bool; N]) -> [Option<FlexTensor>; N] {
        let (rows, _) = dims(&gradient);
        let of_output = dense(gradient.as_slice::<f32>().unwrap_or_default(), rows, self.0.outputs);
        let x_gradient = || self.0.x_gradient(weight.as_slice().unwrap_or_default(), of_output, rows);
        std::array::from_fn(|input| (input == 0 && wanted[input]).then(x_gradient))
    }
}

/// As [`Linear`], but BP leaves the gradient of the weight for later. Operands: x, the weight as a constant, a probe of
/// any size whose gradient will be that of the output [N, outputs], and for `N = 4` a bias.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeferredLinear(pub(crate) Linear);

/// Where the bias is among the operands.
const DEFERRED_BIAS: usize = 3;

impl<const N: usize> Fused<N> for DeferredLinear {
    /// The weight, of inputs · outputs values.
    type Saved = FlexTensor;

    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Self::Saved) {
        let [x, weight] = [0, 1].map(|i| &inputs[i]);
        (self.0.output(x, weight, inputs.get(DEFERRED_BIAS)), weight.clone())
    }

    fn backward(&self, weight: FlexTensor, gradient: FlexTensor, wanted: [bool; N]) -> [Option<FlexTensor>; N] {
        let (rows, _) = dims(&gradient);
        let values = gradient.as_slice::<f32>().unwrap_or_default();
        let of_output = dense(values, rows, self.0.outputs);
        std::array::from_fn(|input| match input {
            _ if !wanted[input] => None,
            0 => Some(self.0.x_gradient(weight.as_slice().unwrap_or_default(), of_output, rows)),
            1 => None,
            2 => Some(gradient.clone()),
            _ => Some(self.0.bias_gradient(values)),
        })
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn column_sums(rows: &[f32], columns: usize) -> Vec<f32> {
    let mut sums = vec![0.0; columns];
    for row in rows.chunks_exact(columns.max(1)) {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += value;
        }
    }
    sums
}
