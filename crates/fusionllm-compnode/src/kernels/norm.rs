//! Layer norm over the last dimension.

use super::{Arguments, RealValue};
use crate::ExecutorError;

/// x [.., D] → (x - mean) / sqrt(var + eps) · weight + bias, with the biased variance (Ba et al.).
pub(super) fn forward(arguments: &Arguments<'_>, eps: f64) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let tensor = burn_tensor::module::layer_norm(x.tensor.clone(), arguments.param(0)?, Some(arguments.param(1)?), eps);
    Ok(RealValue { tensor, shape: x.shape.clone() })
}
