//! Scaled dot-product attention over a packed projection.

use burn_tensor::activation::softmax;
use burn_tensor::{Bool, Tensor};

use super::fused::{self, Attention, Operand};
use super::{Arguments, RealValue};
use crate::ExecutorError;

/// qkv [B, S, 3·D] → softmax(q·kᵀ/√K + causal mask)·v, heads joined: [B, S, D] (Vaswani et al., section 3.2.1).
pub(super) fn forward(arguments: &Arguments<'_>, heads: usize, causal: bool) -> Result<RealValue, ExecutorError> {
    let qkv = arguments.real(0)?;
    let (batch, seq, width) = match qkv.shape.as_slice() {
        [batch, seq, packed] => (*batch, *seq, *packed / 3),
        other => {
            let (op, got) = (arguments.op.name.clone(), other.to_vec());
            return Err(ExecutorError::Shape { op, expected: vec![0, 0, 0], got });
        }
    };
    let op = Attention { seq, heads, width, causal };
    let tensor = fused::apply(op, [Operand::of(&qkv.tensor)]).unwrap_or_else(|| plain(qkv.tensor.clone(), batch, op));
    Ok(RealValue { tensor, shape: vec![batch, seq, width] })
}

/// The same in Burn's operations.
pub(super) fn plain(qkv: Tensor<2>, batch: usize, op: Attention) -> Tensor<2> {
    let Attention { seq, heads, width, causal } = op;
    let head_dim = width / heads;
    let part = |index: usize| {
        let columns = index * width..(index + 1) * width;
        let part = qkv.clone().slice([0..batch * seq, columns]);
        part.reshape([batch, seq, heads, head_dim]).swap_dims(1, 2)
    };
    // Scaling q costs S·D products, scaling the scores S·S·H.
    let query = part(0) * (1.0 / (head_dim as f64).sqrt());
    let mut scores = query.matmul(part(1).transpose());
    if causal {
        let mask = Tensor::<2, Bool>::tril_mask([seq, seq], 0, &qkv.device()).reshape([1, 1, seq, seq]);
        scores = scores.mask_fill(mask, f32::NEG_INFINITY);
    }
    softmax(scores, 3).matmul(part(2)).swap_dims(1, 2).reshape([batch * seq, width])
}
