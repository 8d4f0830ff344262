//! Rotary position embedding.

use std::sync::{Mutex, PoisonError};

use burn_tensor::{Tensor, TensorData};
use fusionllm_graph::RotaryScaling;

use super::fused::{self, Operand, Rotary};
use super::{Arguments, RealValue};
use crate::ExecutorError;

/// Cosines and sines that rotary ops of a stage have been computed with: equal ones are made once.
#[derive(Debug, Default)]
pub(crate) struct AngleTables(Mutex<Vec<AngleTable>>);

#[derive(Debug)]
struct AngleTable {
    head_dim: usize,
    base: f64,
    scaling: RotaryScaling,
    /// The op, with the table.
    op: Rotary,
}

impl AngleTables {
    /// The op for sequences of `seq` positions.
    fn op(&self, seq: usize, head_dim: usize, base: f64, scaling: &RotaryScaling) -> Rotary {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |made: &&AngleTable| {
            made.op.seq == seq && made.head_dim == head_dim && made.base == base && made.scaling == *scaling
        };
        if let Some(made) = tables.iter().find(is_it) {
            return made.op.clone();
        }
        let (cos, sin) = scaling.table(head_dim, base, seq);
        let op = Rotary { seq, head_dim, cos: cos.into(), sin: sin.into() };
        tables.push(AngleTable { head_dim, base, scaling: scaling.clone(), op: op.clone() });
        op
    }
}

/// x [B, S, H·K] → each head turned by its position (Su et al., arXiv 2104.09864).
pub(super) fn forward(
    arguments: &Arguments<'_>,
    head_dim: usize,
    base: f64,
    scaling: &RotaryScaling,
    angles: &AngleTables,
) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let seq = x.shape.get(1).copied().unwrap_or(1);
    let op = angles.op(seq, head_dim, base, scaling);
    let operands = [Operand::of(&x.tensor)];
    let tensor = fused::apply(op.clone(), operands).unwrap_or_else(|| plain(x.tensor.clone(), &op));
    Ok(RealValue { tensor, shape: x.shape.clone() })
}

/// The same in Burn's operations.
pub(super) fn plain(x: Tensor<2>, op: &Rotary) -> Tensor<2> {
    let [rows, columns] = x.dims();
    let (half, heads) = (op.head_dim / 2, columns / op.head_dim);
    let table = |values: &[f32]| {
        let table = Tensor::<4>::from_data(TensorData::new(values.to_vec(), [1, op.seq, 1, half]), &x.device());
        table.repeat_dim(2, heads)
    };
    let (cos, sin) = (table(&op.cos), table(&op.sin));
    let halves = x.reshape([rows / op.seq, op.seq, heads, op.head_dim]).split(half, 3);
    let [a, b] = [0, 1].map(|index| halves[index].clone());
    let turned = [a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin];
    Tensor::cat(turned.to_vec(), 3).reshape([rows, columns])
}
