//! Rows of a table by token id.

use super::{Arguments, RealValue};
use crate::ExecutorError;

/// ids [B, S] → [B, S, D].
pub(super) fn forward(arguments: &Arguments<'_>, vocab: usize, dim: usize) -> Result<RealValue, ExecutorError> {
    let ids = arguments.integer(0)?;
    let table = arguments.param(0)?.reshape([vocab, dim]);
    Ok(RealValue { tensor: table.select(0, ids.tensor.clone()), shape: with_last(ids.shape.clone(), dim) })
}

/// The same outside autodiff, with an output that is a leaf.
pub(super) fn lookup(arguments: &Arguments<'_>, vocab: usize, dim: usize) -> Result<RealValue, ExecutorError> {
    let ids = arguments.integer(0)?;
    let table = arguments.param(0)?.inner().reshape([vocab, dim]);
    let tensor = table.select(0, ids.tensor.clone().inner()).autodiff().require_grad();
    Ok(RealValue { tensor, shape: with_last(ids.shape.clone(), dim) })
}

fn with_last(mut shape: Vec<usize>, dim: usize) -> Vec<usize> {
    shape.push(dim);
    shape
}
