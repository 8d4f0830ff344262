//! Layer norm over the last dimension.

use burn_tensor::Tensor;

use super::fused::{self, LayerNorm, Operand};
use super::{Arguments, RealValue};
use crate::ExecutorError;

/// x [.., D] → (x - mean) / sqrt(var + eps) · weight + bias, with the biased variance (Ba et al.).
pub(super) fn forward(arguments: &Arguments<'_>, eps: f64) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let (weight, bias) = (arguments.param(0)?, arguments.param(1)?);
    let operands = [Operand::of(&x.tensor), Operand::of(&weight), Operand::of(&bias)];
    let tensor = fused::apply(LayerNorm { eps: eps as f32 }, operands)
        .unwrap_or_else(|| plain(x.tensor.clone(), weight, bias, eps));
    Ok(RealValue { tensor, shape: x.shape.clone() })
}

/// The same in Burn's operations.
pub(super) fn plain(x: Tensor<2>, weight: Tensor<1>, bias: Tensor<1>, eps: f64) -> Tensor<2> {
    burn_tensor::module::layer_norm(x, weight, Some(bias), eps)
}
