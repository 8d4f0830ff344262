//! What comes into a stage and what leaves it: placeholders, and tensors from and to other stages, here or elsewhere.

use fusionllm_codec::{Codec, HostTensor, Values};
use fusionllm_graph::OpId;
use fusionllm_planner::{EdgeId, Placement, Stage, StageEdge, StageId, Way};
use fusionllm_protocol::{Channel, Pass, TopKBackward};

use super::{TaskLoop, internal, slot};
use crate::border::BorderTensor;
use crate::exchange::Message;
use crate::executor::MicroBatch;
use crate::mailbox::Arrived;
use crate::{CompNodeError, ExecutorError};

impl TaskLoop {
    /// Under [`TopKBackward::Mask`], which elements a sparsified activation has.
    fn remember_mask(&mut self, edge: EdgeId, micro_batch: MicroBatch, arrived: &Arrived) {
        let is_masked = self.plan.rules.backward == TopKBackward::Mask && micro_batch.pass == Pass::Train;
        let is_masked = is_masked && self.plan.placement.edges.get(edge.index()).is_some_and(|e| e.gradient);
        if let (true, Codec::TopK { .. }, Some(values)) = (is_masked, arrived.codec, arrived.tensor.as_f32()) {
            let mask = values.iter().map(|&x| x != 0.0).collect();
            self.masks.insert((edge, micro_batch.index), mask);
        }
    }

    /// The micro-batch's token ids and labels, for those placeholders that the stage holds.
    pub(super) fn placeholders(
        &self,
        stage: &Stage,
        micro_batch: MicroBatch,
    ) -> Result<Vec<(OpId, BorderTensor)>, CompNodeError> {
        let (input, label) = (self.plan.dag.input(), self.plan.dag.label());
        let here = |op: Option<OpId>| op.filter(|op| stage.ops.contains(op));
        if here(input).is_none() && here(label).is_none() {
            return Ok(Vec::new());
        }
        let Some(batches) = &self.batches else {
            let what = format!("{} holds placeholders but has no data", self.plan.node);
            return Err(ExecutorError::Internal { what }.into());
        };
        let (inputs, labels) = match micro_batch.pass {
            Pass::Train => batches.train(micro_batch.step, micro_batch.index)?,
            Pass::Eval => batches.eval(micro_batch.index)?,
        };
        let held = [here(input).map(|op| (op, inputs.into())), here(label).map(|op| (op, labels.into()))];
        Ok(held.into_iter().flatten().collect())
    }

    /// Takes a tensor that the stage `other` made, from here or from its CompNode.
    pub(super) fn fetch(
        &mut self,
        placement: &Placement,
        other: StageId,
        channel: Channel,
        micro_batch: MicroBatch,
    ) -> Result<BorderTensor, CompNodeError> {
        let slot = slot(channel, micro_batch);
        if placement.holds(self.plan.node, other) {
            return self.local.remove(&slot).ok_or_else(|| {
                ExecutorError::Internal { what: format!("{channel:?} of {other} is not there") }.into()
            });
        }
        let arrived = self.receive(slot)?;
        self.log.arrived(channel, micro_batch.index, arrived.at);
        if let Channel::Activation(edge) = channel {
            self.remember_mask(edge, micro_batch, &arrived);
        }
        Ok(arrived.tensor.into())
    }

    /// A tensor that goes to these stages, each by its codec: on the host if one of them is elsewhere and the tensor's
    /// device does not encode it. Devices may compute it only then, so this counts as work.
    pub(super) fn on_host_where_sent(
        &self,
        placement: &Placement,
        mut readers: impl Iterator<Item = (StageId, Codec)>,
        tensor: BorderTensor,
    ) -> Result<BorderTensor, ExecutorError> {
        let leaves = |(stage, codec)| !placement.holds(self.plan.node, stage) && tensor.needs_host(codec);
        if readers.any(leaves) { Ok(tensor.into_host()?.into()) } else { Ok(tensor) }
    }

    /// By which codec an edge's message goes that way.
    pub(super) fn codec_of(&self, edge: &StageEdge, way: Way, pass: Pass) -> Codec {
        match (pass, self.plan.codecs.codec(edge, way)) {
            // What is held out is as secret as the rest.
            (Pass::Eval, codec) if self.plan.rules.evaluates_as_trained => codec,
            (Pass::Train, codec) | (Pass::Eval, codec @ (Codec::Dense | Codec::Bf16 | Codec::F16)) => codec,
            // An evaluation is about the model, which will be used without codecs; half precision costs it nothing.
            (Pass::Eval, _) => Codec::Bf16,
        }
    }

    /// Hands a tensor to the stage `other`, here or on its CompNode.
    pub(super) fn deliver(
        &mut self,
        placement: &Placement,
        other: StageId,
        channel: Channel,
        micro_batch: MicroBatch,
        tensor: BorderTensor,
        codec: Codec,
    ) -> Result<(), CompNodeError> {
        let slot = slot(channel, micro_batch);
        match placement.compnode_of(other) {
            Some(to) if to == self.plan.node => {
                self.local.insert(slot, tensor);
                Ok(())
            }
            Some(to) => {
                self.log.sent(channel, micro_batch.index);
                Ok(self.exchange.send(Message { to, slot, tensor, codec })?)
            }
            None => Err(ExecutorError::Internal { what: format!("{other} is on no CompNode") }.into()),
        }
    }
}

/// The tensor with zeros where the mask has none.
pub(super) fn masked(tensor: HostTensor, mask: &[bool]) -> Result<HostTensor, ExecutorError> {
    let (shape, values) = tensor.into_parts();
    let values = match values {
        Values::F32(mut values) => {
            values.iter_mut().zip(mask).filter(|(_, has)| !**has).for_each(|(x, _)| *x = 0.0);
            Values::F32(values)
        }
        integers @ Values::I32(_) => integers,
    };
    HostTensor::new(shape, values).map_err(internal)
}
