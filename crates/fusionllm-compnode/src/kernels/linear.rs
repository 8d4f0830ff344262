//! x · W + b.

use burn_tensor::Tensor;
use fusionllm_graph::WeightLayout;

use super::fused::{self, Linear, Operand};
use super::{Arguments, RealValue};
use crate::ExecutorError;

/// x [.., inputs] → [.., outputs].
pub(super) fn forward(
    arguments: &Arguments<'_>,
    inputs: usize,
    outputs: usize,
    bias: bool,
    layout: WeightLayout,
) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let weight = arguments.param(0)?;
    let bias = if bias { Some(arguments.param(1)?) } else { None };
    let op = Linear { inputs, outputs, layout };
    let fused = match &bias {
        Some(bias) => fused::apply(op, [Operand::of(&x.tensor), Operand::of(&weight), Operand::of(bias)]),
        None => fused::apply(op, [Operand::of(&x.tensor), Operand::of(&weight)]),
    };
    let tensor = fused.unwrap_or_else(|| plain(x.tensor.clone(), weight, bias, op));
    let mut shape = x.shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    Ok(RealValue { tensor, shape })
}

/// The same in Burn's operations.
pub(super) fn plain(x: Tensor<2>, weight: Tensor<1>, bias: Option<Tensor<1>>, op: Linear) -> Tensor<2> {
    let weight = match op.layout {
        WeightLayout::InOut => weight.reshape([op.inputs, op.outputs]),
        WeightLayout::OutIn => weight.reshape([op.outputs, op.inputs]).transpose(),
    };
    burn_tensor::module::linear(x, weight, bias)
}
