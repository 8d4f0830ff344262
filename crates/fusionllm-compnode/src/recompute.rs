//! Stages in pieces: FP keeps only what enters each piece, and BP makes the rest of a piece anew before it goes back over it
//! (`fusionllm_planner`'s `Recompute`).
//!
//! To the executor each piece is a stage. What flows between two of them stays where the executor keeps it, as between two
//! stages of one CompNode, and gradients are summed in the same order: the bits do not change. Only where one stage has both ends
//! of a tied table, which then lie in two pieces, are the gradients of that table added in another order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fusionllm_codec::{HostTensor, Values};
use fusionllm_graph::{OpDag, OpId};
use fusionllm_planner::{NodeIndex, Placement, StageId};
use fusionllm_protocol::Pass;

use crate::ExecutorError;
use crate::backend::{StageOps, stages_of};
use crate::border::BorderTensor;
use crate::executor::{Executor, MicroBatch, StageOutput};

/// A stage in pieces.
#[derive(Debug)]
struct InPieces {
    pieces: Vec<Piece>,
    /// Its ops whose output other stages consume.
    sent: BTreeSet<OpId>,
}

/// A piece of a stage.
#[derive(Debug)]
struct Piece {
    /// Its number as a stage of the executor.
    id: StageId,
    ops: BTreeSet<OpId>,
    /// Ops outside whose output an op inside consumes, and placeholders inside.
    entering: BTreeSet<OpId>,
    has_loss: bool,
}

impl Piece {
    fn of(dag: &OpDag, StageOps { id, ops, .. }: StageOps) -> Self {
        let ops: BTreeSet<OpId> = ops.into_iter().collect();
        let outside = ops.iter().flat_map(|&op| &dag.op(op).inputs).copied().filter(|input| !ops.contains(input));
        let placeholders = ops.iter().copied().filter(|&op| dag.op(op).inputs.is_empty());
        let entering = outside.chain(placeholders).collect();
        Self { id, entering, has_loss: dag.loss().is_some_and(|loss| ops.contains(&loss)), ops }
    }
}

/// Runs the stages of a CompNode, those in pieces too.
#[derive(Debug)]
pub(crate) struct Recomputation {
    dag: Arc<OpDag>,
    stages: BTreeMap<StageId, InPieces>,
    /// By piece and micro-batch, what entered it.
    kept: BTreeMap<(StageId, u32), Vec<(OpId, BorderTensor)>>,
}

impl Recomputation {
    /// Of the stages that the placement gives to `node`.
    pub(crate) fn of(dag: &Arc<OpDag>, placement: &Placement, node: NodeIndex) -> Self {
        let in_pieces = |(stage, pieces): (StageId, Vec<StageOps>)| {
            let sent = placement.edges.iter().filter(|e| e.from == stage).map(|e| e.op).collect();
            let pieces = pieces.into_iter().map(|piece| Piece::of(dag, piece)).collect();
            (stage, InPieces { pieces, sent })
        };
        let stages = if placement.recomputes(node) { stages_of(dag, placement, node) } else { Vec::new() };
        let stages = stages.into_iter().map(in_pieces).collect();
        Self { dag: Arc::clone(dag), stages, kept: BTreeMap::new() }
    }

    /// [`Executor::forward`] of a stage.
    ///
    /// # Errors
    /// As that.
    pub(crate) fn forward(
        &mut self,
        executor: &mut dyn Executor,
        stage: StageId,
        micro_batch: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<StageOutput, ExecutorError> {
        let Some(InPieces { pieces, sent }) = self.stages.get(&stage) else {
            return executor.forward(stage, micro_batch, inputs);
        };
        let mut there: BTreeMap<OpId, BorderTensor> = inputs.into_iter().collect();
        let mut output = StageOutput::default();
        for piece in pieces {
            let missing =
                |op: OpId| ExecutorError::MissingInput { op: stage.to_string(), input: self.dag.op(op).name.clone() };
            let tensor = |&op: &OpId| there.get(&op).cloned().map(|tensor| (op, tensor)).ok_or_else(|| missing(op));
            let entering: Vec<_> = piece.entering.iter().map(tensor).collect::<Result<_, _>>()?;
            let is_training = micro_batch.pass == Pass::Train;
            let kept = is_training.then(|| entering.clone());
            let found = match kept {
                Some(kept) => {
                    self.kept.insert((piece.id, micro_batch.index), kept);
                    executor.forward_alone(piece.id, micro_batch, entering)?
                }
                None => executor.forward(piece.id, micro_batch, entering)?,
            };
            output.loss = output.loss.or(found.loss);
            output.accuracy = output.accuracy.or(found.accuracy);
            for (op, tensor) in found.tensors {
                if sent.contains(&op) {
                    output.tensors.push((op, tensor.clone()));
                }
                there.insert(op, tensor);
            }
        }
        Ok(output)
    }

    /// [`Executor::backward`] of a stage.
    ///
    /// # Errors
    /// As that.
    pub(crate) fn backward(
        &mut self,
        executor: &mut dyn Executor,
        stage: StageId,
        micro_batch: MicroBatch,
        mut gradients: Vec<(OpId, BorderTensor)>,
        loss_scale: f64,
    ) -> Result<Vec<(OpId, BorderTensor)>, ExecutorError> {
        let Some(InPieces { pieces, .. }) = self.stages.get(&stage) else {
            return executor.backward(stage, micro_batch, gradients, loss_scale);
        };
        let mut of_inputs: BTreeMap<OpId, BorderTensor> = BTreeMap::new();
        for (index, piece) in pieces.iter().enumerate().rev() {
            let entered = self.kept.remove(&(piece.id, micro_batch.index));
            let entered = entered.ok_or_else(|| ExecutorError::before_fp(stage, micro_batch.index))?;
            let own = gradients.extract_if(.., |(op, _)| piece.ops.contains(op)).collect::<Vec<_>>();
            // Nothing that is trained lies at or before what nobody sends a gradient for.
            if own.is_empty() && !piece.has_loss {
                continue;
            }
            executor.forward(piece.id, micro_batch, entered)?;
            for (op, gradient) in executor.backward(piece.id, micro_batch, own, loss_scale)? {
                if pieces[..index].iter().any(|earlier| earlier.ops.contains(&op)) {
                    // After those of later consumers, as executors sum them.
                    gradients.push((op, gradient));
                } else {
                    let sum = match of_inputs.remove(&op) {
                        Some(of_later) => sum(gradient, of_later)?,
                        None => gradient,
                    };
                    of_inputs.insert(op, sum);
                }
            }
        }
        Ok(of_inputs.into_iter().collect())
    }

    /// Micro-batches of which something is kept in the stage that has most of them.
    pub(crate) fn live(&self) -> usize {
        let of_piece = |piece: &Piece| self.kept.keys().filter(|(id, _)| *id == piece.id).count();
        self.stages.values().flat_map(|stage| &stage.pieces).map(of_piece).max().unwrap_or(0)
    }
}

/// Two gradients of one tensor, as one.
fn sum(a: BorderTensor, b: BorderTensor) -> Result<BorderTensor, ExecutorError> {
    let ((shape, a), (_, b)) = (a.into_host()?.into_parts(), b.into_host()?.into_parts());
    let (Values::F32(mut a), Values::F32(b)) = (a, b) else {
        return Err(ExecutorError::Internal { what: "a gradient of integers".to_owned() });
    };
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    let tensor = HostTensor::new(shape, Values::F32(a));
    tensor.map(BorderTensor::from).map_err(|error| ExecutorError::Internal { what: error.to_string() })
}
