//! Scaled dot-product attention.

use burn_tensor::activation::softmax;
use burn_tensor::{Bool, Tensor};

use super::fused::{self, Attention, GroupedAttention, Operand, PackedAttention};
use super::{Arguments, RealValue};
use crate::ExecutorError;

/// qkv [B, S, 3·D] → softmax(q·kᵀ/√K + causal mask)·v, heads joined: [B, S, D] (Vaswani et al., section 3.2.1).
pub(super) fn forward(arguments: &Arguments<'_>, heads: usize, causal: bool) -> Result<RealValue, ExecutorError> {
    let qkv = arguments.real(0)?;
    let [batch, seq, packed] = three_sizes(arguments, qkv)?;
    let width = packed / 3;
    let op = Attention { seq, heads, kv_heads: heads, head_dim: width / heads, causal };
    let fused = fused::apply(PackedAttention(op), [Operand::of(&qkv.tensor)]);
    let tensor = fused.unwrap_or_else(|| plain(qkv.tensor.clone(), batch, op));
    Ok(RealValue { tensor, shape: vec![batch, seq, width] })
}

/// q [B, S, H·K], k and v [B, S, G·K] → the same with H heads, each with the keys and values of its group: [B, S, H·K]
/// (Ainslie et al., arXiv 2305.13245).
pub(super) fn grouped(
    arguments: &Arguments<'_>,
    heads: usize,
    kv_heads: usize,
    causal: bool,
) -> Result<RealValue, ExecutorError> {
    let [query, key, value] = [arguments.real(0)?, arguments.real(1)?, arguments.real(2)?];
    let [batch, seq, width] = three_sizes(arguments, query)?;
    let op = Attention { seq, heads, kv_heads, head_dim: width / heads, causal };
    let parts = [query, key, value].map(|part| &part.tensor);
    let tensor = fused::apply(GroupedAttention(op), parts.map(Operand::of))
        .unwrap_or_else(|| plain_grouped(parts.map(Clone::clone), batch, op));
    Ok(RealValue { tensor, shape: query.shape.clone() })
}

fn three_sizes(arguments: &Arguments<'_>, value: &RealValue) -> Result<[usize; 3], ExecutorError> {
    <[usize; 3]>::try_from(value.shape.as_slice()).map_err(|_| {
        let (op, got) = (arguments.op.name.clone(), value.shape.clone());
        ExecutorError::Shape { op, expected: vec![0, 0, 0], got }
    })
}

/// The packed form in Burn's operations.
pub(super) fn plain(qkv: Tensor<2>, batch: usize, op: Attention) -> Tensor<2> {
    let (rows, width) = (batch * op.seq, op.heads * op.head_dim);
    let part = |index: usize| qkv.clone().slice([0..rows, index * width..(index + 1) * width]);
    plain_grouped([part(0), part(1), part(2)], batch, op)
}

/// The form of three inputs in Burn's operations.
pub(super) fn plain_grouped([query, key, value]: [Tensor<2>; 3], batch: usize, op: Attention) -> Tensor<2> {
    let Attention { seq, heads, kv_heads, head_dim, causal } = op;
    // [B, heads, S, K], with each head of keys and values as often as it serves.
    let split = |part: Tensor<2>, of: usize| {
        let part = part.reshape([batch, seq, of, head_dim]).swap_dims(1, 2);
        if of == heads {
            return part;
        }
        let served = heads / of;
        let each = part.reshape([batch, of, 1, seq * head_dim]).repeat_dim(2, served);
        each.reshape([batch, heads, seq, head_dim])
    };
    // Scaling q costs S·D products, scaling the scores S·S·H.
    let query_bhsk = split(query, heads) * (1.0 / (head_dim as f64).sqrt());
    let mut scores = query_bhsk.matmul(split(key, kv_heads).transpose());
    if causal {
        let mask = Tensor::<2, Bool>::tril_mask([seq, seq], 0, &scores.device()).reshape([1, 1, seq, seq]);
        scores = scores.mask_fill(mask, f32::NEG_INFINITY);
    }
    let mixed = softmax(scores, 3).matmul(split(value, kv_heads));
    mixed.swap_dims(1, 2).reshape([batch * seq, heads * head_dim])
}
