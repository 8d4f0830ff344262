//! FP of a stage.

use fusionllm_graph::{ActivationFunction, OpId, OpKind, WeightLayout};

use super::super::kernel::{self, OfElement};
use super::super::layout::filled_rows;
use super::{Argument, Factor, Kernel, Place, Planner, Step, Value, blocks, no_kernel, number};
use crate::ExecutorError;

impl Planner<'_> {
    /// Plans FP of every op, in order.
    pub(super) fn forward(&mut self) -> Result<(), ExecutorError> {
        for &op in &self.spec.stage.ops {
            if !self.values.contains_key(&op) {
                let value = self.forward_op(op)?;
                self.values.insert(op, value);
            }
        }
        let dag = self.spec.dag;
        for &op in &self.spec.stage.leaving {
            // Integers are placeholders: whoever runs the stage has them as they came.
            if let Some(value) = self.values.get(&op).filter(|_| dag.op(op).output.dtype == fusionllm_graph::DType::F32)
            {
                self.plan.leaving.push((op, *value));
            }
        }
        Ok(())
    }

    fn forward_op(&mut self, op: OpId) -> Result<Value, ExecutorError> {
        let dag = self.spec.dag;
        match dag.op(op).kind {
            OpKind::Input { .. } | OpKind::Label { .. } => {
                Err(ExecutorError::Internal { what: format!("placeholder `{}` did not enter", dag.op(op).name) })
            }
            OpKind::Embedding { dim, .. } => self.embedding(op, dim),
            OpKind::Position { dim, .. } => self.position(op, dim),
            OpKind::LayerNorm { dim, eps } | OpKind::RmsNorm { dim, eps } => self.norm(op, dim, eps),
            OpKind::Rotary { head_dim, .. } => self.rotary(op, head_dim),
            OpKind::Linear { inputs, outputs, bias, layout } => self.linear(op, inputs, outputs, bias, layout),
            OpKind::Attention { heads, causal } => self.attention(op, [heads, heads], causal),
            OpKind::GroupedAttention { heads, kv_heads, causal } => self.attention(op, [heads, kv_heads], causal),
            OpKind::Activation { function } => {
                let (_, x) = self.input(op, 0)?;
                self.elementwise(op, kernel::ACTIVATION, &[x], Some(Argument::U32(function_number(function))))
            }
            OpKind::Add => self.add(op),
            OpKind::Mul => {
                let [(_, a), (_, b)] = [self.input(op, 0)?, self.input(op, 1)?];
                let value = self.result(op);
                let arguments =
                    [Argument::At(a.place), Argument::At(b.place), Argument::Null, Argument::At(value.place)];
                self.over_elements(kernel::PRODUCT, &value, arguments.to_vec(), None)?;
                Ok(value)
            }
            OpKind::Scale { factor } => {
                let (_, x) = self.input(op, 0)?;
                self.elementwise(op, kernel::SCALE, &[x], Some(Argument::F32(factor as f32)))
            }
            OpKind::Dropout { p } => self.dropout(op, p),
            OpKind::CrossEntropy => self.cross_entropy(op),
            OpKind::Conv2d { .. } | OpKind::BatchNorm2d { .. } | OpKind::MaxPool2d { .. } | OpKind::GlobalAvgPool => {
                Err(no_kernel(dag, op))
            }
        }
    }

    /// Whether BP reads an op's output, or it leaves.
    fn is_kept(&self, op: OpId) -> bool {
        let dag = self.spec.dag;
        let reads_input = |consumer: &OpId| {
            let kind = &dag.op(*consumer).kind;
            self.inside.contains(consumer)
                && dag.carries_gradient(*consumer)
                && match kind {
                    OpKind::Linear { .. } => !dag.is_frozen(*consumer),
                    OpKind::LayerNorm { .. }
                    | OpKind::RmsNorm { .. }
                    | OpKind::Attention { .. }
                    | OpKind::GroupedAttention { .. }
                    | OpKind::Activation { .. }
                    | OpKind::Mul
                    | OpKind::CrossEntropy => true,
                    // What drops nothing passes its input on.
                    OpKind::Dropout { p } => *p == 0.0 && self.is_kept(*consumer),
                    _ => false,
                }
        };
        let reads_output = matches!(dag.op(op).kind, OpKind::Attention { .. } | OpKind::GroupedAttention { .. });
        reads_output || self.spec.stage.leaving.contains(&op) || dag.consumers(op).iter().any(reads_input)
    }

    /// A place for the output of an op.
    pub(super) fn result(&mut self, op: OpId) -> Value {
        let (value, kept) = (self.shaped(op), self.is_kept(op));
        self.output(value, kept)
    }

    /// A kernel that takes `arguments`, the count of elements of `value`, and perhaps one number more.
    fn over_elements(
        &mut self,
        kernel: OfElement,
        value: &Value,
        mut arguments: Vec<Argument>,
        more: Option<Argument>,
    ) -> Result<(), ExecutorError> {
        let count = value.rows * value.stride;
        arguments.push(Argument::U32(number(count)?));
        arguments.extend(more);
        let step = launch(kernel.of(self.element), [blocks(count, kernel::elements(self.element))?, 1], arguments);
        self.plan.forward.push(step);
        Ok(())
    }

    fn elementwise(
        &mut self,
        op: OpId,
        kernel: OfElement,
        inputs: &[Value],
        more: Option<Argument>,
    ) -> Result<Value, ExecutorError> {
        let value = self.result(op);
        let mut arguments: Vec<Argument> = inputs.iter().map(|input| Argument::At(input.place)).collect();
        arguments.push(Argument::At(value.place));
        self.over_elements(kernel, &value, arguments, more)?;
        Ok(value)
    }

    fn embedding(&mut self, op: OpId, dim: usize) -> Result<Value, ExecutorError> {
        let ((_, ids), table) = (self.input(op, 0)?, self.param(op, 0)?);
        let (value, table) = (self.result(op), self.weight(table)?);
        let rows = number(value.rows)?;
        let at = [table, ids.place, value.place].map(Argument::At);
        let arguments = [at.as_slice(), &[Argument::U32(rows), Argument::U32(number(dim)?)]].concat();
        let step = launch(kernel::EMBEDDING.of(self.element), [rows, 1], arguments);
        self.plan.forward.push(step);
        Ok(value)
    }

    fn position(&mut self, op: OpId, dim: usize) -> Result<Value, ExecutorError> {
        let ((input, x), table) = (self.input(op, 0)?, self.param(op, 0)?);
        let seq = self.sequence(input);
        let (value, table) = (self.result(op), self.weight(table)?);
        let rows = number(value.rows)?;
        let at = [x.place, table, value.place].map(Argument::At);
        let numbers = [rows, number(seq)?, number(dim)?].map(Argument::U32);
        let step = launch(kernel::POSITION.of(self.element), [rows, 1], [at.as_slice(), &numbers].concat());
        self.plan.forward.push(step);
        Ok(value)
    }

    /// Positions of a tensor [B, S, ..].
    pub(super) fn sequence(&self, op: OpId) -> usize {
        self.spec.dag.op(op).output.shape.resolve(self.spec.batch).get(1).copied().unwrap_or(1)
    }

    fn add(&mut self, op: OpId) -> Result<Value, ExecutorError> {
        let [(_, a), (_, b)] = [self.input(op, 0)?, self.input(op, 1)?];
        if self.joined_norm(op).is_some() {
            // The norm writes it.
            return Ok(self.result(op));
        }
        self.elementwise(op, kernel::ADD, &[a, b], None)
    }

    fn linear(
        &mut self,
        op: OpId,
        inputs: usize,
        outputs: usize,
        bias: bool,
        layout: WeightLayout,
    ) -> Result<Value, ExecutorError> {
        let ((_, x), weight) = (self.input(op, 0)?, self.param(op, 0)?);
        let weight = self.weight(weight)?;
        let bias = if bias { Some(self.weight(self.param(op, 1)?)?) } else { None };
        let columns = self.linear_columns(op, outputs, layout);
        let (shaped, kept) = (self.shaped(op), self.is_kept(op));
        let value = self.output(Value { stride: columns, ..shaped }, kept);
        let b = match layout {
            WeightLayout::InOut => self.matrix(outputs),
            WeightLayout::OutIn => self.matrix(inputs).transposed(),
        };
        let (a, d) = (self.matrix(x.stride), self.matrix(columns));
        let mut product = self.product([x.rows, columns, inputs], a, b, d);
        product.bias = bias.is_some();
        let (c, alpha) = (None, Factor::Fixed(1.0));
        self.plan.forward.push(Step::Multiply { product, a: x.place, b: weight, c, d: value.place, bias, alpha });
        Ok(value)
    }

    /// The columns that a product makes: filled up where nobody but the loss reads them, since products and 16-byte
    /// accesses want even rows, and vocabularies are odd.
    fn linear_columns(&self, op: OpId, outputs: usize, layout: WeightLayout) -> usize {
        let dag = self.spec.dag;
        let only_the_loss = match dag.consumers(op) {
            [reader] => self.inside.contains(reader) && matches!(dag.op(*reader).kind, OpKind::CrossEntropy),
            _ => false,
        };
        if only_the_loss && layout == WeightLayout::OutIn && !self.spec.stage.leaving.contains(&op) {
            filled_rows(outputs)
        } else {
            outputs
        }
    }

    fn dropout(&mut self, op: OpId, p: f64) -> Result<Value, ExecutorError> {
        let (_, x) = self.input(op, 0)?;
        if !self.spec.training || p == 0.0 {
            return Ok(x);
        }
        let value = self.result(op);
        let step = self.dropout_step(op, p, x.place, None, &value)?;
        self.plan.forward.push(step);
        Ok(value)
    }

    /// FP and BP of dropout are the same.
    pub(super) fn dropout_step(
        &mut self,
        op: OpId,
        p: f64,
        from: Place,
        addend: Option<Place>,
        to: &Value,
    ) -> Result<Step, ExecutorError> {
        let count = to.rows * to.stride;
        // A draw of 53 bits as a number below 1 is less than p just where its bits are less than this.
        let threshold = (p * 2f64.powi(53)).ceil() as u64;
        let arguments = vec![
            Argument::At(from),
            addend.map_or(Argument::Null, Argument::At),
            Argument::At(to.place),
            Argument::Key(op),
            Argument::U32(number(count)?),
            Argument::U32((threshold >> 32) as u32),
            Argument::U32(threshold as u32),
            Argument::F32((1.0 / (1.0 - p)) as f32),
        ];
        let grid = [blocks(count, kernel::DROPOUT_ELEMENTS)?, 1];
        Ok(launch(kernel::DROPOUT.of(self.element), grid, arguments))
    }

    /// Losses and, in training, the gradient of the logits right away, over the logits where nobody else reads them.
    fn cross_entropy(&mut self, op: OpId) -> Result<Value, ExecutorError> {
        let [(input, logits), (_, labels)] = [self.input(op, 0)?, self.input(op, 1)?];
        let losses = self.temporary(logits.rows * 4);
        let mean = self.keep(4);
        let made_by_product = matches!(self.spec.dag.op(input).kind, OpKind::Linear { .. });
        let alone = made_by_product
            && self.spec.dag.consumers(input).iter().filter(|c| self.inside.contains(c)).count() == 1
            && !self.spec.stage.leaving.contains(&input);
        let gradient = if !self.spec.training {
            Argument::Null
        } else if alone {
            Argument::At(logits.place)
        } else {
            Argument::At(self.keep(self.bytes(&logits)))
        };
        if let Argument::At(place) = gradient {
            self.kept.insert(op, [place, place]);
        }
        let rows = number(logits.rows)?;
        let at = [logits.place, labels.place, losses].map(Argument::At);
        let numbers = [Argument::U32(number(logits.columns)?), Argument::U32(number(logits.stride)?)];
        let scale = Argument::F32(1.0 / logits.rows as f32);
        let arguments = [at.as_slice(), &[gradient], &numbers, &[scale]].concat();
        let small = logits.columns <= kernel::SMALL_VOCABULARY;
        let kernel = if small { kernel::CROSS_ENTROPY_SMALL } else { kernel::CROSS_ENTROPY };
        let step = launch(kernel.of(self.element), [rows, 1], arguments);
        self.plan.forward.push(step);
        let arguments = vec![Argument::At(losses), Argument::At(mean), Argument::U32(rows)];
        let step = launch(kernel::MEAN_LOSS, [1, 1], arguments);
        self.plan.forward.push(step);
        self.plan.loss = Some(mean);
        Ok(Value { place: mean, rows: 1, columns: 1, stride: 1 })
    }
}

pub(super) fn launch(kernel: Kernel, grid: [u32; 2], arguments: Vec<Argument>) -> Step {
    Step::Launch { kernel, grid, arguments }
}

/// The number by which kernels know a function.
pub(super) fn function_number(function: ActivationFunction) -> u32 {
    match function {
        ActivationFunction::GeluTanh => 0,
        ActivationFunction::GeluErf => 1,
        ActivationFunction::Relu => 2,
        ActivationFunction::Silu => 3,
    }
}
