//! Adds a learned vector per position.

use super::{Arguments, RealValue};
use crate::ExecutorError;

/// x [B, S, D] → x + weight[0..S].
pub(super) fn forward(arguments: &Arguments<'_>, positions: usize, dim: usize) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let (batch, seq) = match x.shape.as_slice() {
        [batch, seq, _] => (*batch, *seq),
        other => {
            let (op, got) = (arguments.op.name.clone(), other.to_vec());
            return Err(ExecutorError::Shape { op, expected: vec![0, 0, dim], got });
        }
    };
    let table = arguments.param(0)?.reshape([positions, dim]).slice([0..seq, 0..dim]).reshape([1, seq, dim]);
    let sum = x.tensor.clone().reshape([batch, seq, dim]) + table;
    Ok(RealValue { tensor: sum.reshape([batch * seq, dim]), shape: x.shape.clone() })
}
