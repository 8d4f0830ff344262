//! Norms: layer norm, and the root-mean-square norm of each group of a row.

use fusionllm_graph::{OpId, OpKind};

use super::super::kernel::{self, narrow_norm_rows};
use super::backward::{ENOUGH_BLOCKS, Known, LEAST_ROWS, or_null};
use super::forward::launch;
use super::{Argument, Planner, Value, blocks, number};
use crate::ExecutorError;

impl Planner<'_> {
    /// The norm that comes right after this sum in the stage and reads it: one kernel does both.
    pub(super) fn joined_norm(&self, sum: OpId) -> Option<OpId> {
        let next = OpId(sum.0 + 1);
        let (dag, inside) = (self.spec.dag, self.inside.contains(&next));
        let joined = inside
            && matches!(dag.op(sum).kind, OpKind::Add)
            && matches!(dag.op(next).kind, OpKind::LayerNorm { .. } | OpKind::RmsNorm { .. })
            && dag.op(next).inputs == [sum];
        joined.then_some(next)
    }

    /// Whether a norm takes the mean away and has a bias, as layer norm does.
    fn is_centred(&self, op: OpId) -> bool {
        matches!(self.spec.dag.op(op).kind, OpKind::LayerNorm { .. })
    }

    /// Norm of each `dim` elements: of the whole row in a layer norm.
    pub(super) fn norm(&mut self, op: OpId, dim: usize, eps: f64) -> Result<Value, ExecutorError> {
        let ((input, x), weight) = (self.input(op, 0)?, self.parameter(self.param(op, 0)?)?);
        let centred = self.is_centred(op);
        let bias = if centred { Argument::At(self.parameter(self.param(op, 1)?)?) } else { Argument::Null };
        let value = self.result(op);
        let rows = value.rows * value.columns / dim.max(1);
        let (from, residual, sum) = if self.inside.contains(&input) && self.joined_norm(input) == Some(op) {
            let [(_, a), (_, b)] = [self.input(input, 0)?, self.input(input, 1)?];
            (a.place, Argument::At(b.place), Argument::At(x.place))
        } else {
            (x.place, Argument::Null, Argument::Null)
        };
        let mut statistics = [Argument::Null; 2];
        if self.spec.training {
            let rstd = self.keep(rows * 4);
            let mean = if centred { self.keep(rows * 4) } else { rstd };
            self.kept.insert(op, [mean, rstd]);
            statistics = [if centred { Argument::At(mean) } else { Argument::Null }, Argument::At(rstd)];
        }
        let numbers = [Argument::U32(number(rows)?), Argument::U32(number(dim)?), Argument::F32(eps as f32)];
        let arguments = [
            &[Argument::At(from), residual, sum, Argument::At(weight), bias, Argument::At(value.place)],
            statistics.as_slice(),
            &numbers,
        ];
        let (kernel, each) = match narrow_norm_rows(self.element, dim) {
            _ if centred => (kernel::LAYER_NORM, kernel::NORM_ROWS),
            Some(rows) => (kernel::RMS_NORM_NARROW, rows),
            None => (kernel::RMS_NORM, kernel::NORM_ROWS),
        };
        let step = launch(kernel.of(self.element), [blocks(rows, each)?, 1], arguments.concat());
        self.plan.forward.push(step);
        Ok(value)
    }

    /// BP of [`Self::norm`].
    pub(super) fn norm_gradient(
        &mut self,
        op: OpId,
        dy: Value,
        dim: usize,
        known: &mut Known,
    ) -> Result<(), ExecutorError> {
        let ((input, x), weight) = (self.input(op, 0)?, self.param(op, 0)?);
        let centred = self.is_centred(op);
        let [mean, rstd] = self.kept.get(&op).copied().ok_or_else(|| self.without_gradient(op))?;
        let (dx, addend) = if self.spec.dag.carries_gradient(input) {
            self.next(input, known)?
        } else {
            let shaped = self.shaped(input);
            (Value { place: self.temporary(self.bytes(&shaped)), ..shaped }, None)
        };
        let rows = x.rows * x.columns / dim.max(1);
        let each = rows.div_ceil(ENOUGH_BLOCKS).max(LEAST_ROWS);
        let parts = rows.div_ceil(each);
        // Sums for the weight, and for the bias where there is one.
        let sums = if centred { 2 * dim } else { dim };
        let partial = self.temporary(parts * sums * 4);
        let mean = if centred { Argument::At(mean) } else { Argument::Null };
        let read = [dy.place, x.place, self.parameter(weight)?].map(Argument::At);
        let results = [mean, Argument::At(rstd), or_null(addend), Argument::At(dx.place), Argument::At(partial)];
        let numbers = [number(rows)?, number(dim)?, number(each)?].map(Argument::U32);
        let arguments = [read.as_slice(), &results, &numbers].concat();
        let kernel = match narrow_norm_rows(self.element, dim) {
            _ if centred => kernel::LAYER_NORM_GRAD,
            Some(_) => kernel::RMS_NORM_NARROW_GRAD,
            None => kernel::RMS_NORM_GRAD,
        };
        self.plan.backward.push(launch(kernel.of(self.element), [number(parts)?, 1], arguments));
        if self.trains(weight) {
            self.fold(partial, self.gradient(weight)?, parts, sums, dim)?;
        }
        if centred && self.trains(self.param(op, 1)?) {
            let bias = self.gradient(self.param(op, 1)?)?;
            self.fold(partial.after(dim * 4), bias, parts, sums, dim)?;
        }
        Ok(())
    }
}
