//! Rows of a table by token id.

use super::{Arguments, RealValue};
use crate::ExecutorError;

/// ids [B, S] → [B, S, D].
pub(super) fn forward(arguments: &Arguments<'_>, vocab: usize, dim: usize) -> Result<RealValue, ExecutorError> {
    let ids = arguments.integer(0)?;
    let table = arguments.param(0)?.reshape([vocab, dim]);
    let tensor = table.select(0, ids.tensor.clone());
    let mut shape = ids.shape.clone();
    shape.push(dim);
    Ok(RealValue { tensor, shape })
}
