//! x · W + b.

use burn_tensor::module::linear;
use fusionllm_graph::WeightLayout;

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
    let weight = match layout {
        WeightLayout::InOut => arguments.param(0)?.reshape([inputs, outputs]),
        WeightLayout::OutIn => arguments.param(0)?.reshape([outputs, inputs]).transpose(),
    };
    let bias = if bias { Some(arguments.param(1)?) } else { None };
    let tensor = linear(x.tensor.clone(), weight, bias);
    let mut shape = x.shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    Ok(RealValue { tensor, shape })
}
