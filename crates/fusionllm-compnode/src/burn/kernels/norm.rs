//! Norms over the last dimension.

use burn_tensor::Tensor;

use super::fused::{self, LayerNorm, Operand, RmsNorm};
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

/// x [.., groups · D] → x / sqrt(mean of the squares of its group + eps) · weight (Zhang and Sennrich).
pub(super) fn rms(arguments: &Arguments<'_>, eps: f64) -> Result<RealValue, ExecutorError> {
    let (x, weight) = (arguments.real(0)?, arguments.param(0)?);
    let operands = [Operand::of(&x.tensor), Operand::of(&weight)];
    let tensor =
        fused::apply(RmsNorm { eps: eps as f32 }, operands).unwrap_or_else(|| plain_rms(x.tensor.clone(), weight, eps));
    Ok(RealValue { tensor, shape: x.shape.clone() })
}

/// The same in Burn's operations.
pub(super) fn plain_rms(x: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    let ([rows, columns], [dim]) = (x.dims(), weight.dims());
    let grouped = x.reshape([rows * columns / dim, dim]);
    let scale = (grouped.clone() * grouped.clone()).mean_dim(1).add_scalar(eps).sqrt();
    (grouped / scale * weight.reshape([1, dim])).reshape([rows, columns])
}
