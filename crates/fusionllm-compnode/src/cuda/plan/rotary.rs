//! Rotary position embedding: FP turns heads by their positions, BP turns gradients back.

use fusionllm_graph::OpId;

use super::super::kernel;
use super::backward::{Known, or_null};
use super::forward::launch;
use super::{Argument, Place, Planner, Step, Value, blocks, number};
use crate::ExecutorError;

impl Planner<'_> {
    /// x [B, S, H·K] → each head turned by its position (Su et al., arXiv 2104.09864).
    pub(super) fn rotary(&mut self, op: OpId, head_dim: usize) -> Result<Value, ExecutorError> {
        let (_, x) = self.input(op, 0)?;
        let value = self.result(op);
        let step = self.turn(op, head_dim, [Some(x.place), None], &value, 1.0)?;
        self.plan.forward.push(step);
        Ok(value)
    }

    pub(super) fn rotary_gradient(
        &mut self,
        op: OpId,
        dy: Value,
        head_dim: usize,
        known: &mut Known,
    ) -> Result<(), ExecutorError> {
        let input = self.spec.dag.op(op).inputs[0];
        let (dx, addend) = self.next(input, known)?;
        let step = self.turn(op, head_dim, [Some(dy.place), addend], &dx, -1.0)?;
        self.plan.backward.push(step);
        Ok(())
    }

    /// Turns a tensor, and adds another if there is one.
    fn turn(
        &self,
        op: OpId,
        head_dim: usize,
        from: [Option<Place>; 2],
        to: &Value,
        direction: f32,
    ) -> Result<Step, ExecutorError> {
        let [half, heads] = [head_dim / 2, to.columns / head_dim.max(1)];
        let pairs = to.rows * heads * half;
        let numbers = [number(pairs)?, number(self.sequence(op))?, number(heads)?, number(half)?].map(Argument::U32);
        let at = [from.map(or_null).as_slice(), &[Argument::Angles(op), Argument::At(to.place)]].concat();
        let arguments = [at.as_slice(), &numbers, &[Argument::F32(direction)]].concat();
        let grid = [blocks(pairs, kernel::elements(self.element))?, 1];
        Ok(launch(kernel::ROTARY.of(self.element), grid, arguments))
    }
}
