//! FP and BP of one stage: Burn's autodiff inside, remote automatic differentiation (RAD) at its borders.
//!
//! A tensor that enters the stage is a leaf of the autodiff tape. In BP the root is the sum over all that leaves
//! the stage, each weighted by the gradient that came for it (summed over its consumers), plus the loss: its
//! gradient with respect to the leaves is the vector-Jacobian product that RAD asks for.

use std::collections::{BTreeMap, BTreeSet};

use burn_tensor::{Device, Tensor};
use fusionllm_codec::Values;
use fusionllm_graph::{OpDag, OpId, OpKind, ParamId};

use crate::ExecutorError;
use crate::border::{BorderTensor, check_input};
use crate::burn::gradients::LookupGradient;
use crate::burn::host::{at_border, to_scalar, value_of};
use crate::burn::kernels::fused::{self, Operand, Seeded, SetAside, WeightSum};
use crate::burn::kernels::{
    self, AngleTables, Arguments, Deferred, KernelContext, Moments, RealValue, Value, WeightGradient,
};
use crate::executor::{MicroBatch, StageOutput};
use crate::seeds::Seeds;
use crate::stop::StopFlag;

/// A stage that Burn computes: its ops, and what does not change from one micro-batch to the next.
#[derive(Debug, Default)]
pub(crate) struct BurnStage {
    ops: Vec<OpId>,
    /// What its rotary ops are computed with.
    angles: AngleTables,
    /// Ops outside whose output an op inside consumes, and placeholders inside.
    entering: BTreeSet<OpId>,
    /// Ops inside whose output leaves.
    leaving: Vec<OpId>,
    /// Ops inside whose BP leaves the gradient of the weight for later.
    deferring: BTreeSet<OpId>,
    /// Linear ops inside whose parameters are not trained.
    frozen: BTreeSet<OpId>,
    /// Where linear ops inside add up the gradients of weights that no other linear op of the stage has.
    sums: BTreeMap<OpId, (ParamId, WeightSum)>,
}

/// What FP is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Nothing is dropped, and batch norms go by their running values.
    Eval,
    /// BP follows, by the tape that FP leaves.
    Train,
    /// As in training, but BP does not follow.
    TrainAlone,
}

/// What FP keeps of a micro-batch until its BP.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    leaves: BTreeMap<OpId, RealValue>,
    outputs: BTreeMap<OpId, RealValue>,
    loss: Option<Tensor<2>>,
    deferred: Vec<(OpId, Deferred)>,
    lookups: Vec<Lookup>,
    asides: Vec<(ParamId, SetAside)>,
    /// What the micro-batch adds to the running values of batch norms.
    pub(crate) moments: Vec<(OpId, Moments)>,
}

/// A lookup in FP: its output is a leaf, whose gradient is that of the rows.
#[derive(Debug)]
struct Lookup {
    table: ParamId,
    ids: Vec<i32>,
    output: Tensor<2>,
}

/// What BP of a micro-batch needs of its ops, apart from the tape.
#[derive(Debug, Default)]
struct Aside {
    deferred: Vec<(OpId, Deferred)>,
    lookups: Vec<Lookup>,
    asides: Vec<(ParamId, SetAside)>,
    moments: Vec<(OpId, Moments)>,
    /// Of images in evaluation: share of those whose class is the likeliest one.
    accuracy: Option<f64>,
}

impl Aside {
    /// What BP of a linear op that uses this table too must not add to its sum.
    fn set_aside(&mut self, table: ParamId) -> Option<SetAside> {
        let ids = self.lookups.iter().filter(|l| l.table == table).flat_map(|l| &l.ids);
        let rows: Vec<u32> = ids.filter_map(|&id| u32::try_from(id).ok()).collect();
        if rows.is_empty() {
            return None;
        }
        let aside = SetAside::new(rows);
        self.asides.push((table, aside.clone()));
        Some(aside)
    }
}

/// Gradients that BP gives.
#[derive(Debug, Default)]
pub(crate) struct StageGradients {
    pub(crate) inputs: Vec<(OpId, BorderTensor)>,
    pub(crate) params: Vec<(ParamId, Tensor<1>)>,
    /// Gradients of tables by row.
    pub(crate) lookups: Vec<LookupGradient>,
    /// Rows of tables that linear ops have not added to their sums.
    pub(crate) asides: Vec<(ParamId, SetAside)>,
    /// Gradients of weights that are still to be made, by op.
    pub(crate) owed: Vec<(OpId, WeightGradient)>,
}

/// What a stage computes with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StageContext<'a> {
    pub(crate) dag: &'a OpDag,
    pub(crate) device: &'a Device,
    /// Parameters by id: autodiff leaves in training, plain in evaluation.
    pub(crate) params: &'a BTreeMap<ParamId, Tensor<1>>,
    pub(crate) seeds: &'a Seeds,
    /// FP ends between two ops once this is set.
    pub(crate) stop: &'a StopFlag,
}

impl BurnStage {
    pub(crate) fn new(dag: &OpDag, ops: Vec<OpId>, leaving: BTreeSet<OpId>) -> Self {
        let inside: BTreeSet<OpId> = ops.iter().copied().collect();
        let mut entering: BTreeSet<OpId> = BTreeSet::new();
        for &op in &ops {
            if dag.op(op).inputs.is_empty() {
                entering.insert(op);
            }
            entering.extend(dag.op(op).inputs.iter().filter(|i| !inside.contains(i)));
        }
        let is_frozen = |&op: &OpId| matches!(dag.op(op).kind, OpKind::Linear { .. }) && dag.is_frozen(op);
        let frozen = ops.iter().copied().filter(is_frozen).collect();
        Self { ops, entering, leaving: leaving.into_iter().collect(), frozen, ..Self::default() }
    }

    /// The same, with the gradients of these linear ops' weights left for later.
    pub(crate) fn deferring(self, deferring: BTreeSet<OpId>) -> Self {
        Self { deferring, ..self }
    }

    /// The same for the CPU, where gradients of weights are added to their sums in place.
    pub(crate) fn accumulating(mut self, dag: &OpDag) -> Self {
        let mut users: BTreeMap<ParamId, Vec<OpId>> = BTreeMap::new();
        for &id in &self.ops {
            let op = dag.op(id);
            if !matches!(op.kind, OpKind::Embedding { .. }) {
                op.params.iter().for_each(|&param| users.entry(param).or_default().push(id));
            }
        }
        for (param, users) in users {
            if let [op] = users[..]
                && matches!(dag.op(op).kind, OpKind::Linear { .. })
                && dag.op(op).params.first() == Some(&param)
                && !self.deferring.contains(&op)
                && !self.frozen.contains(&op)
            {
                self.sums.insert(op, (param, WeightSum::default()));
            }
        }
        self
    }

    /// The sums that BP adds to.
    pub(crate) fn sums(&self) -> impl Iterator<Item = &(ParamId, WeightSum)> {
        self.sums.values()
    }

    /// FP, and in training what BP needs.
    pub(crate) fn forward(
        &self,
        around: StageContext<'_>,
        micro_batch: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
        mode: Mode,
    ) -> Result<(StageOutput, Kept), ExecutorError> {
        let training = mode == Mode::Train;
        let mut leaves = BTreeMap::new();
        let mut values: BTreeMap<OpId, Value> = BTreeMap::new();
        let mut ids: BTreeMap<OpId, Vec<i32>> = BTreeMap::new();
        for (op, tensor) in inputs {
            check_input(around.dag, op, &tensor)?;
            if let (true, BorderTensor::Host(tensor)) = (training, &tensor)
                && let Values::I32(values) = tensor.values()
            {
                ids.insert(op, values.clone());
            }
            let value = match value_of(tensor, around.device)? {
                Value::Real(real) if training && around.dag.carries_gradient(op) => {
                    let leaf = RealValue { tensor: real.tensor.autodiff().require_grad(), shape: real.shape };
                    leaves.insert(op, leaf.clone());
                    Value::Real(leaf)
                }
                Value::Real(real) if training => {
                    Value::Real(RealValue { tensor: real.tensor.autodiff(), shape: real.shape })
                }
                Value::Integer(mut integer) if training => {
                    integer.tensor = integer.tensor.autodiff();
                    Value::Integer(integer)
                }
                value => value,
            };
            values.insert(op, value);
        }
        let aside = self.run(around, micro_batch, mode, &ids, &mut values)?;
        let (mut output, mut kept) = self.collect(around.dag, leaves, &values)?;
        output.accuracy = aside.accuracy;
        (kept.deferred, kept.lookups, kept.asides) = (aside.deferred, aside.lookups, aside.asides);
        kept.moments = aside.moments;
        Ok((output, kept))
    }

    fn run(
        &self,
        around: StageContext<'_>,
        micro_batch: MicroBatch,
        mode: Mode,
        ids: &BTreeMap<OpId, Vec<i32>>,
        values: &mut BTreeMap<OpId, Value>,
    ) -> Result<Aside, ExecutorError> {
        let mut aside = Aside::default();
        let training = mode == Mode::Train;
        let mut uses: BTreeMap<OpId, usize> = BTreeMap::new();
        for &op in &self.ops {
            for &input in &around.dag.op(op).inputs {
                *uses.entry(input).or_default() += 1;
            }
        }
        for &id in &self.ops {
            if values.contains_key(&id) {
                continue;
            }
            around.stop.check()?;
            let op = around.dag.op(id);
            let missing = |input: &str| ExecutorError::MissingInput { op: op.name.clone(), input: input.to_owned() };
            let mut inputs = Vec::with_capacity(op.inputs.len());
            for &input in &op.inputs {
                inputs.push(values.get(&input).cloned().ok_or_else(|| missing(&around.dag.op(input).name))?);
                // A value that nobody needs any more is freed before the kernel runs: it may then work in place.
                let left = uses.entry(input).or_default();
                *left = left.saturating_sub(1);
                let leaves = self.leaving.contains(&input);
                if *left == 0 && !leaves {
                    values.remove(&input);
                } else if training && *left + usize::from(leaves) > 1 && around.dag.carries_gradient(input) {
                    values.entry(input).and_modify(for_the_others);
                }
            }
            let mut params = Vec::with_capacity(op.params.len());
            for param in &op.params {
                params.push(around.params.get(param).cloned().ok_or_else(|| missing("parameters"))?);
            }
            let seed = around.seeds.of_op(around.dag, id, micro_batch);
            let context =
                KernelContext { device: around.device, training: mode != Mode::Eval, seed, angles: &self.angles };
            let arguments = Arguments { op, inputs, params };
            if mode == Mode::Eval && op.kind == OpKind::CrossEntropy && around.dag.image_size().is_some() {
                aside.accuracy = Some(kernels::accuracy(&arguments)?);
            }
            let value = if training && self.frozen.contains(&id) {
                kernels::forward_frozen(&arguments)?
            } else if training && self.deferring.contains(&id) {
                let (value, deferred) = kernels::forward_deferred(&arguments)?;
                aside.deferred.push((id, deferred));
                value
            } else if let (true, Some((param, sum))) = (training, self.sums.get(&id)) {
                let aside = aside.set_aside(*param);
                kernels::forward_accumulated(&arguments, sum.clone(), aside)?
            } else if let (OpKind::BatchNorm2d { eps, .. }, true) = (&op.kind, mode != Mode::Eval) {
                let (value, moments) = kernels::forward_norm(&arguments, *eps)?;
                aside.moments.push((id, moments));
                value
            } else if let (OpKind::Embedding { .. }, true, Some(ids)) =
                (&op.kind, around.dag.carries_gradient(id), op.inputs.first().and_then(|i| ids.get(i)))
            {
                let looked_up = kernels::lookup(&arguments)?;
                let [table] = op.params[..] else { return Err(missing("its table")) };
                aside.lookups.push(Lookup { table, ids: ids.clone(), output: looked_up.tensor.clone() });
                Value::Real(looked_up)
            } else {
                kernels::forward(&arguments, context)?
            };
            values.insert(id, value);
        }
        Ok(aside)
    }

    fn collect(
        &self,
        dag: &OpDag,
        leaves: BTreeMap<OpId, RealValue>,
        values: &BTreeMap<OpId, Value>,
    ) -> Result<(StageOutput, Kept), ExecutorError> {
        let mut output = StageOutput::default();
        let mut kept = Kept { leaves, outputs: BTreeMap::new(), ..Kept::default() };
        for &op in &self.leaving {
            match values.get(&op) {
                Some(Value::Real(real)) => {
                    output.tensors.push((op, at_border(real.tensor.clone().without_autodiff(), &real.shape)));
                    if dag.carries_gradient(op) {
                        kept.outputs.insert(op, real.clone());
                    }
                }
                // Integers are placeholders: whoever runs the stage has them as they came.
                Some(Value::Integer(_)) => {}
                None => {
                    let name = dag.op(op).name.clone();
                    return Err(ExecutorError::Internal { what: format!("op `{name}` left no value to send") });
                }
            }
        }
        if let Some(Value::Real(loss)) = dag.loss().and_then(|op| values.get(&op)) {
            output.loss = Some(to_scalar(loss.tensor.clone().without_autodiff())?);
            kept.loss = Some(loss.tensor.clone());
        }
        Ok((output, kept))
    }

    /// The ops whose tensors FP needs from outside.
    pub(crate) fn entering(&self) -> &BTreeSet<OpId> {
        &self.entering
    }

    /// The ops whose tensors leave.
    pub(crate) fn leaving(&self) -> &[OpId] {
        &self.leaving
    }

    /// BP of what `forward` kept.
    pub(crate) fn backward(
        &self,
        around: StageContext<'_>,
        kept: Kept,
        gradients: Vec<(OpId, BorderTensor)>,
        loss_scale: f64,
    ) -> Result<StageGradients, ExecutorError> {
        let mut root: Option<Tensor<1>> = kept.loss.map(|loss| loss.reshape([1]) * loss_scale);
        for (op, seed) in sum_over_consumers(around.dag, around.device, gradients)? {
            let Some(output) = kept.outputs.get(&op) else {
                let name = around.dag.op(op).name.clone();
                return Err(ExecutorError::Internal {
                    what: format!("a gradient came for `{name}`, which was not sent"),
                });
            };
            let term = weighted(&output.tensor, seed);
            root = Some(match root {
                Some(sum) => sum + term,
                None => term,
            });
        }
        let Some(root) = root.filter(Tensor::is_tracked) else {
            return Ok(StageGradients::default());
        };
        let mut tape = root.backward();
        let mut inputs = Vec::new();
        for (op, leaf) in &kept.leaves {
            let gradient =
                leaf.tensor.grad_remove(&mut tape).unwrap_or_else(|| leaf.tensor.clone().inner().zeros_like());
            inputs.push((*op, at_border(gradient, &leaf.shape)));
        }
        let all = self.ops.iter().flat_map(|&op| around.dag.op(op).params.iter().copied());
        let held: BTreeSet<ParamId> = all.filter(|&param| !around.dag.param(param).frozen).collect();
        let mut params = Vec::new();
        for param in held {
            if let Some(gradient) = around.params.get(&param).and_then(|leaf| leaf.grad_remove(&mut tape)) {
                params.push((param, gradient));
            }
        }
        let lookup = |Lookup { table, ids, output }: Lookup| {
            output.grad_remove(&mut tape).map(|gradient| LookupGradient { param: table, ids, gradient })
        };
        let lookups = kept.lookups.into_iter().filter_map(lookup).collect();
        let owed =
            kept.deferred.into_iter().filter_map(|(op, deferred)| Some((op, deferred.after(&mut tape)?))).collect();
        Ok(StageGradients { inputs, params, lookups, asides: kept.asides, owed })
    }
}

/// Has the gradients of all consumers but the one that has just taken the value summed first. So they are added as
/// g₁ + (g₂ + (g₃ + …)), by the order of the ops and wherever a cut lies: sums of three numbers depend on their order, and
/// that of autodiff on the graph that a stage has. Only where a stage between has some of three consumers and not the op
/// itself is what it sends back one sum, and the last bits may differ.
fn for_the_others(value: &mut Value) {
    if let Value::Real(real) = value {
        let fan = fused::apply(fused::Fan, [Operand::of(&real.tensor)]);
        let shape = real.tensor.dims();
        real.tensor = fan.unwrap_or_else(|| real.tensor.clone().reshape(shape));
    }
}

/// A scalar whose gradient in `output` is `seed`.
fn weighted(output: &Tensor<2>, seed: Tensor<2>) -> Tensor<1> {
    let fused = match Operand::of(&seed) {
        Some(Operand::Plain(seed)) => fused::apply(Seeded::new(seed.to_contiguous()), [Operand::of(output)]),
        _ => None,
    };
    fused.unwrap_or_else(|| (output.clone() * seed.autodiff()).sum())
}

/// RAD: the gradient of a tensor is the sum over all its consumers.
fn sum_over_consumers(
    dag: &OpDag,
    device: &Device,
    gradients: Vec<(OpId, BorderTensor)>,
) -> Result<BTreeMap<OpId, Tensor<2>>, ExecutorError> {
    let mut sums: BTreeMap<OpId, Tensor<2>> = BTreeMap::new();
    for (op, gradient) in gradients {
        check_input(dag, op, &gradient)?;
        if let Value::Real(real) = value_of(gradient, device)? {
            let sum = match sums.remove(&op) {
                Some(sum) => sum + real.tensor,
                None => real.tensor,
            };
            sums.insert(op, sum);
        }
    }
    Ok(sums)
}
