//! Sums and products of two tensors of one shape.

use super::{Arguments, RealValue};
use crate::ExecutorError;

/// a + b.
pub(super) fn add(arguments: &Arguments<'_>) -> Result<RealValue, ExecutorError> {
    let (a, b) = (arguments.real(0)?, arguments.real(1)?);
    Ok(RealValue { tensor: a.tensor.clone() + b.tensor.clone(), shape: a.shape.clone() })
}

/// a · b, element by element.
pub(super) fn mul(arguments: &Arguments<'_>) -> Result<RealValue, ExecutorError> {
    let (a, b) = (arguments.real(0)?, arguments.real(1)?);
    Ok(RealValue { tensor: a.tensor.clone() * b.tensor.clone(), shape: a.shape.clone() })
}

/// a · factor.
pub(super) fn scale(arguments: &Arguments<'_>, factor: f64) -> Result<RealValue, ExecutorError> {
    let a = arguments.real(0)?;
    Ok(RealValue { tensor: a.tensor.clone() * factor, shape: a.shape.clone() })
}
