//! x · W + b as one product each way.

use burn_flex::FlexTensor;
use fusionllm_graph::WeightLayout;
use multiversion::multiversion;
use rayon::prelude::*;

use super::matrix::{Matrix, MatrixMut, Target, new_product, product};
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
        let x = Matrix::dense(x.as_slice().unwrap_or_default(), rows, self.inputs);
        let mut output = new_product(x, self.weight(weight.as_slice().unwrap_or_default()));
        if let Some(bias) = bias.and_then(FlexTensor::as_slice::<f32>) {
            let size = rows_per_task(self.outputs) * self.outputs;
            output.par_chunks_mut(size).for_each(|rows| add_to_rows(rows, bias));
        }
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
        let x = Matrix::dense(x.as_slice().unwrap_or_default(), rows, self.inputs);
        let gradient = Matrix::dense(gradient.as_slice().unwrap_or_default(), rows, self.outputs);
        let Some(mut sum) = sum else { return self.weight_gradient(x, gradient) };
        let (a, b, rows, columns) = match self.layout {
            WeightLayout::InOut => (x.transposed(), gradient, self.inputs, self.outputs),
            WeightLayout::OutIn => (gradient.transposed(), x, self.outputs, self.inputs),
        };
        product(1.0, a, b, MatrixMut::dense(sum.storage_mut(), rows, columns), Target::Add, true);
        sum
    }

    /// The weight as [inputs, outputs].
    fn weight<'a>(&self, values: &'a [f32]) -> Matrix<'a> {
        match self.layout {
            WeightLayout::InOut => Matrix::dense(values, self.inputs, self.outputs),
            WeightLayout::OutIn => Matrix::dense(values, self.outputs, self.inputs).transposed(),
        }
    }

    fn x_gradient(&self, weight: &[f32], gradient: Matrix<'_>, rows: usize) -> FlexTensor {
        tensor(new_product(gradient, self.weight(weight).transposed()), [rows, self.inputs])
    }

    fn weight_gradient(&self, x: Matrix<'_>, gradient: Matrix<'_>) -> FlexTensor {
        let values = match self.layout {
            WeightLayout::InOut => new_product(x.transposed(), gradient),
            WeightLayout::OutIn => new_product(gradient.transposed(), x),
        };
        tensor(values, [self.inputs * self.outputs])
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
        let of_output = Matrix::dense(values, rows, self.outputs);
        std::array::from_fn(|input| match input {
            _ if !wanted[input] => None,
            0 => Some(self.x_gradient(weight.as_slice().unwrap_or_default(), of_output, rows)),
            1 => {
                let x = Matrix::dense(x.as_slice().unwrap_or_default(), rows, self.inputs);
                Some(self.weight_gradient(x, of_output))
            }
            _ => Some(self.bias_gradient(values)),
        })
    }
}

/// As [`Linear`], but BP leaves the gradient of the weight for later. Operands: x, the weight as a constant, a probe of
/// any size whose gradient will be that of the output [N, outputs], and for `N = 4` a bias.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeferredLinear(pub(crate) Linear);

/// Where the bias is among the operands.
const DEFERRED_BIAS: usize = 3;

impl<const N: usize> Fused<N> for DeferredLinear {
    /// The weight.
    type Saved = FlexTensor;

    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Self::Saved) {
        let [x, weight] = [0, 1].map(|i| &inputs[i]);
        (self.0.output(x, weight, inputs.get(DEFERRED_BIAS)), weight.clone())
    }

    fn backward(&self, weight: FlexTensor, gradient: FlexTensor, wanted: [bool; N]) -> [Option<FlexTensor>; N] {
        let (rows, _) = dims(&gradient);
        let values = gradient.as_slice::<f32>().unwrap_or_default();
        let of_output = Matrix::dense(values, rows, self.0.outputs);
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

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn add_to_rows(rows: &mut [f32], bias: &[f32]) {
    for row in rows.chunks_exact_mut(bias.len().max(1)) {
        for (value, bias) in row.iter_mut().zip(bias) {
            *value += bias;
        }
    }
}
