//! BP of a stage, op by op from the last to the first.
//!
//! A gradient that several ops add to is written anew each time, with what was there as the addend of the kernel: nothing
//! is added in place, so that a gradient may stand for several tensors.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use fusionllm_graph::{DType, OpId, OpKind, ParamId, WeightLayout};

use super::super::gpu::{Element, Matrix};
use super::super::kernel;
use super::forward::{function_number, launch};
use super::{Argument, Factor, Place, Planner, Region, Step, Value, WeightSteps, blocks, no_kernel, number};
use crate::ExecutorError;

/// Blocks that fill a large GPU twice.
pub(super) const ENOUGH_BLOCKS: usize = 264;
/// The least rows that a block sums up.
pub(super) const LEAST_ROWS: usize = 16;

/// Gradients of ops' outputs as far as they are known.
#[derive(Debug, Default)]
pub(super) struct Known(BTreeMap<OpId, Gradient>);

/// A gradient, and a factor that is still to be applied.
#[derive(Clone, Copy, Debug)]
struct Gradient {
    value: Value,
    factor: Factor,
}

const ONE: Factor = Factor::Fixed(1.0);

impl Planner<'_> {
    /// Plans BP of all that was planned for FP.
    pub(super) fn backward(&mut self) -> Result<(), ExecutorError> {
        let mut known = Known::default();
        let dag = self.spec.dag;
        for (op, value) in self.plan.leaving.clone() {
            if dag.carries_gradient(op) {
                let seed = Value { place: self.temporary(self.bytes(&value)), ..value };
                self.plan.seeds.push((op, seed));
                known.0.insert(op, Gradient { value: seed, factor: ONE });
            }
        }
        let entered: Vec<OpId> = self.plan.entering.iter().map(|e| e.op).collect();
        for &op in self.spec.stage.ops.iter().rev() {
            if !entered.contains(&op) && dag.carries_gradient(op) {
                self.backward_op(op, &mut known)?;
            }
        }
        for entering in self.plan.entering.clone() {
            if entering.dtype == DType::F32 && dag.carries_gradient(entering.op) {
                let gradient = self.whole(entering.op, &known)?;
                let value = match gradient {
                    Some(value) => value,
                    None => return Err(self.without_gradient(entering.op)),
                };
                self.plan.input_gradients.push((entering.op, value));
            }
        }
        Ok(())
    }

    pub(super) fn without_gradient(&self, op: OpId) -> ExecutorError {
        ExecutorError::Internal { what: format!("BP gives `{}` no gradient", self.spec.dag.op(op).name) }
    }

    fn backward_op(&mut self, op: OpId, known: &mut Known) -> Result<(), ExecutorError> {
        let dag = self.spec.dag;
        if let OpKind::CrossEntropy = dag.op(op).kind {
            return self.cross_entropy_gradient(op, known);
        }
        // The gradient of a product may wait with its factor.
        if let OpKind::Linear { inputs, outputs, bias, layout } = dag.op(op).kind {
            let Some(gradient) = known.0.get(&op).copied() else { return Ok(()) };
            return self.linear_gradient(op, gradient, [inputs, outputs], bias, layout, known);
        }
        let Some(dy) = self.whole(op, known)? else { return Ok(()) };
        match dag.op(op).kind {
            OpKind::Embedding { dim, .. } => self.embedding_gradient(op, dy, dim),
            OpKind::Position { dim, .. } => {
                if !dag.is_frozen(op) {
                    self.position_gradient(op, dy, dim)?;
                }
                self.pass(dag.op(op).inputs[0], dy, known)
            }
            OpKind::LayerNorm { dim, .. } | OpKind::RmsNorm { dim, .. } => self.norm_gradient(op, dy, dim, known),
            OpKind::Rotary { head_dim, .. } => self.rotary_gradient(op, dy, head_dim, known),
            OpKind::Attention { heads, causal } => self.attention_gradient(op, dy, [heads, heads], causal, known),
            OpKind::GroupedAttention { heads, kv_heads, causal } => {
                self.attention_gradient(op, dy, [heads, kv_heads], causal, known)
            }
            OpKind::Activation { function } => {
                let (input, x) = self.input(op, 0)?;
                let (dx, addend) = self.next(input, known)?;
                let arguments = vec![
                    Argument::At(x.place),
                    Argument::At(dy.place),
                    or_null(addend),
                    Argument::At(dx.place),
                    Argument::U32(number(dx.rows * dx.stride)?),
                    Argument::U32(function_number(function)),
                ];
                let grid = [blocks(dx.rows * dx.stride, kernel::elements(self.element))?, 1];
                self.plan.backward.push(launch(kernel::ACTIVATION_GRAD.of(self.element), grid, arguments));
                Ok(())
            }
            OpKind::Add => {
                for input in dag.op(op).inputs.clone() {
                    self.pass(input, dy, known)?;
                }
                Ok(())
            }
            OpKind::Mul => {
                let [(first, a), (second, b)] = [self.input(op, 0)?, self.input(op, 1)?];
                self.product_gradient(first, dy, b, known)?;
                self.product_gradient(second, dy, a, known)
            }
            OpKind::Scale { factor } => {
                let gradient = Gradient { value: dy, factor: Factor::Fixed(factor as f32) };
                self.pass_scaled(dag.op(op).inputs[0], gradient, known)
            }
            OpKind::Dropout { p } => {
                let (input, from) = (dag.op(op).inputs[0], dy);
                if p == 0.0 {
                    return self.pass(input, from, known);
                }
                let (dx, addend) = self.next(input, known)?;
                let step = self.dropout_step(op, p, from.place, addend, &dx)?;
                self.plan.backward.push(step);
                Ok(())
            }
            _ => Err(no_kernel(dag, op)),
        }
    }

    /// The gradient of an op's output with its factor applied; nothing if none came.
    fn whole(&mut self, op: OpId, known: &Known) -> Result<Option<Value>, ExecutorError> {
        let Some(Gradient { value, factor }) = known.0.get(&op).copied() else { return Ok(None) };
        if factor == ONE {
            return Ok(Some(value));
        }
        let count = value.rows * value.stride;
        let whole = Value { place: self.temporary(self.bytes(&value)), ..value };
        let at = [value.place, whole.place].map(Argument::At);
        let arguments = [at.as_slice(), &[Argument::U32(number(count)?), Argument::Factor(factor)]].concat();
        let grid = [blocks(count, kernel::elements(self.element))?, 1];
        self.plan.backward.push(launch(kernel::SCALE.of(self.element), grid, arguments));
        Ok(Some(whole))
    }

    /// Where the gradient of `input` goes next, with what is to be added to it. Kernels that write it come after this.
    pub(super) fn next(&mut self, input: OpId, known: &mut Known) -> Result<(Value, Option<Place>), ExecutorError> {
        let addend = self.whole(input, known)?;
        let shaped = self.shaped(input);
        let value = Value { place: self.temporary(self.bytes(&shaped)), ..shaped };
        known.0.insert(input, Gradient { value, factor: ONE });
        Ok((value, addend.map(|value| value.place)))
    }

    /// Adds `dy` as it is to the gradient of `input`.
    pub(super) fn pass(&mut self, input: OpId, dy: Value, known: &mut Known) -> Result<(), ExecutorError> {
        if !self.spec.dag.carries_gradient(input) {
            return Ok(());
        }
        if let Entry::Vacant(first) = known.0.entry(input) {
            first.insert(Gradient { value: dy, factor: ONE });
            return Ok(());
        }
        let (sum, addend) = self.next(input, known)?;
        let count = sum.rows * sum.stride;
        let arguments =
            vec![or_null(addend), Argument::At(dy.place), Argument::At(sum.place), Argument::U32(number(count)?)];
        let grid = [blocks(count, kernel::elements(self.element))?, 1];
        self.plan.backward.push(launch(kernel::ADD.of(self.element), grid, arguments));
        Ok(())
    }

    fn product_gradient(
        &mut self,
        input: OpId,
        dy: Value,
        other: Value,
        known: &mut Known,
    ) -> Result<(), ExecutorError> {
        if !self.spec.dag.carries_gradient(input) {
            return Ok(());
        }
        let (dx, addend) = self.next(input, known)?;
        let count = dx.rows * dx.stride;
        let at = [dy.place, other.place].map(Argument::At);
        let arguments =
            [at.as_slice(), &[or_null(addend), Argument::At(dx.place), Argument::U32(number(count)?)]].concat();
        let grid = [blocks(count, kernel::elements(self.element))?, 1];
        self.plan.backward.push(launch(kernel::PRODUCT.of(self.element), grid, arguments));
        Ok(())
    }

    /// FP has written it, but for the weight of the loss.
    fn cross_entropy_gradient(&mut self, op: OpId, known: &mut Known) -> Result<(), ExecutorError> {
        let (input, logits) = self.input(op, 0)?;
        if !self.spec.dag.carries_gradient(input) {
            return Ok(());
        }
        let [place, _] = self.kept.get(&op).copied().ok_or_else(|| self.without_gradient(op))?;
        let value = Value { place, ..logits };
        self.pass_scaled(input, Gradient { value, factor: Factor::Loss }, known)
    }

    /// Adds a gradient with its factor to that of `input`. The first one may wait with it.
    fn pass_scaled(&mut self, input: OpId, gradient: Gradient, known: &mut Known) -> Result<(), ExecutorError> {
        match self.whole(input, known)? {
            None => {
                known.0.insert(input, gradient);
                Ok(())
            }
            Some(other) => {
                known.0.insert(input, gradient);
                let scaled = self.whole(input, known)?.ok_or_else(|| self.without_gradient(input))?;
                known.0.insert(input, Gradient { value: other, factor: ONE });
                self.pass(input, scaled, known)
            }
        }
    }

    fn embedding_gradient(&mut self, op: OpId, dy: Value, dim: usize) -> Result<(), ExecutorError> {
        let table = self.param(op, 0)?;
        let lookup = self.plan.lookups.iter().find(|lookup| lookup.op == op).copied();
        let lookup = lookup.ok_or_else(|| self.without_gradient(op))?;
        let gradient = self.gradient(table)?;
        let region = if self.apart.contains(&table) { Region::Lookups } else { Region::Gradients };
        let gradient = Place { region, ..gradient };
        let at = [dy.place, lookup.order, lookup.starts, lookup.rows, gradient].map(Argument::At);
        let arguments = [at.as_slice(), &[Argument::U32(number(dim)?)]].concat();
        let kernel = kernel::EMBEDDING_GRAD.of(self.element);
        self.plan.backward.push(Step::LaunchRows { op, kernel, arguments });
        Ok(())
    }

    fn position_gradient(&mut self, op: OpId, dy: Value, dim: usize) -> Result<(), ExecutorError> {
        let table = self.param(op, 0)?;
        let seq = self.sequence(op);
        let gradient = self.gradient(table)?;
        let at = [dy.place, gradient].map(Argument::At);
        let numbers = [number(dy.rows / seq.max(1))?, number(seq)?, number(dim)?].map(Argument::U32);
        let arguments = [at.as_slice(), &numbers].concat();
        self.plan.backward.push(launch(kernel::POSITION_GRAD.of(self.element), [number(seq)?, 1], arguments));
        Ok(())
    }

    /// Adds `parts` rows of sums, `stride` numbers from row to row, to a gradient.
    pub(super) fn fold(
        &mut self,
        partial: Place,
        gradient: Place,
        parts: usize,
        stride: usize,
        columns: usize,
    ) -> Result<(), ExecutorError> {
        let numbers = [number(parts)?, number(stride)?, number(columns)?].map(Argument::U32);
        let arguments = [[partial, gradient].map(Argument::At).as_slice(), &numbers].concat();
        self.plan.backward.push(launch(kernel::FOLD, [blocks(columns, kernel::FOLD_COLUMNS)?, 1], arguments));
        Ok(())
    }

    fn linear_gradient(
        &mut self,
        op: OpId,
        gradient: Gradient,
        [inputs, outputs]: [usize; 2],
        bias: bool,
        layout: WeightLayout,
        known: &mut Known,
    ) -> Result<(), ExecutorError> {
        let weight = self.param(op, 0)?;
        let input = self.spec.dag.op(op).inputs[0];
        let Gradient { value: mut dy, mut factor } = gradient;
        let bias = bias && self.trains(self.param(op, 1)?);
        if bias && factor != ONE {
            (dy, factor) = (self.whole(op, known)?.unwrap_or(dy), ONE);
        }
        if self.spec.dag.carries_gradient(input) {
            let (dx, c) = self.next(input, known)?;
            let b = match layout {
                WeightLayout::InOut => self.matrix(outputs).transposed(),
                WeightLayout::OutIn => self.matrix(inputs),
            };
            let mut product =
                self.product([dy.rows, inputs, dy.stride], self.matrix(dy.stride), b, self.matrix(inputs));
            product.adds = c.is_some();
            let b = self.weight(weight)?;
            let (a, d, bias) = (dy.place, dx.place, None);
            self.plan.backward.push(Step::Multiply { product, a, b, c, d, bias, alpha: factor });
        }
        if bias {
            self.bias_gradient(dy, self.param(op, 1)?)?;
        }
        if !self.trains(weight) {
            return Ok(());
        }
        let (_, x) = self.input(op, 0)?;
        self.weight_gradient(op, weight, x, Gradient { value: dy, factor }, [inputs, outputs], layout)
    }

    fn bias_gradient(&mut self, dy: Value, bias: ParamId) -> Result<(), ExecutorError> {
        let across = dy.stride.div_ceil(kernel::SUM_COLUMNS);
        let each = dy.rows.div_ceil(ENOUGH_BLOCKS.div_ceil(across)).max(LEAST_ROWS);
        let parts = dy.rows.div_ceil(each);
        let partial = self.temporary(parts * dy.stride * 4);
        let numbers = [number(dy.rows)?, number(dy.stride)?, number(each)?].map(Argument::U32);
        let arguments = [[dy.place, partial].map(Argument::At).as_slice(), &numbers].concat();
        let grid = [number(across)?, number(parts)?];
        self.plan.backward.push(launch(kernel::COLUMN_SUM.of(self.element), grid, arguments));
        self.fold(partial, self.gradient(bias)?, parts, dy.stride, dy.stride)
    }

    /// Now, or as a step of its own where it may wait: what it reads then lasts as long.
    fn weight_gradient(
        &mut self,
        op: OpId,
        weight: ParamId,
        x: Value,
        Gradient { value: dy, factor }: Gradient,
        [inputs, outputs]: [usize; 2],
        layout: WeightLayout,
    ) -> Result<(), ExecutorError> {
        let waits = self.spec.stage.deferring.contains(&op);
        let from = if waits && dy.place.region != Region::Slot {
            let (bytes, from) = (self.bytes(&dy), dy.place);
            let to = self.keep(bytes);
            self.plan.backward.push(Step::Copy { from, to, bytes });
            to
        } else {
            dy.place
        };
        let (of_x, of_dy) = (self.matrix(x.stride), self.matrix(dy.stride));
        let (shape, a, b, places) = match layout {
            WeightLayout::InOut => ([inputs, dy.stride, x.rows], of_x.transposed(), of_dy, [x.place, from]),
            WeightLayout::OutIn => ([dy.stride, inputs, x.rows], of_dy.transposed(), of_x, [from, x.place]),
        };
        let columns = if layout == WeightLayout::InOut { outputs } else { inputs };
        let mut product = self.product(shape, a, b, Matrix::new(Element::F32, columns));
        product.adds = true;
        let gradient = self.gradient(weight)?;
        let [a, b] = places;
        let step = Step::Multiply { product, a, b, c: Some(gradient), d: gradient, bias: None, alpha: factor };
        if waits {
            self.plan.put_off.push(WeightSteps { op, param: weight, steps: vec![step] });
        } else {
            self.plan.backward.push(step);
        }
        Ok(())
    }
}

/// A tensor that a kernel may do without.
pub(super) fn or_null(place: Option<Place>) -> Argument {
    place.map_or(Argument::Null, Argument::At)
}
