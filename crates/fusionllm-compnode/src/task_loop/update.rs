//! The step's end: the global norm and UPDATE, after the tied gradients.

use std::sync::Arc;
use std::time::Instant;

use fusionllm_codec::{Codec, HostTensor, Values};
use fusionllm_graph::ParamId;
use fusionllm_planner::{NodeIndex, Task};
use fusionllm_protocol::{Channel, Pass};

use super::{TaskLoop, internal};
use crate::CompNodeError;
use crate::exchange::Message;
use crate::executor::UpdateSpec;
use crate::mailbox::Slot;

impl TaskLoop {
    /// Tied gradients, the global norm, UPDATE. Gives learning rate and norm.
    pub(super) fn update(&mut self, step: u64) -> Result<(f64, Option<f64>), CompNodeError> {
        self.sum_tied_gradients()?;
        let clip = self.plan.job.train.clip;
        let norm = if clip > 0.0 { Some(self.global_norm(step)?) } else { None };
        // The form of PyTorch's clip_grad_norm_.
        let gradient_scale = norm.map_or(1.0, |norm| (clip / (norm + 1e-6)).min(1.0));
        let lr = self.plan.job.train.lr_at(step);
        let began = Instant::now();
        self.executor.update(UpdateSpec { step, lr, gradient_scale })?;
        self.worked(Task::Update, began);
        Ok((lr, norm))
    }

    /// The norm of all gradients of all CompNodes; a tied parameter counts once, at its first holder.
    fn global_norm(&mut self, step: u64) -> Result<f64, CompNodeError> {
        let (dag, placement) = (Arc::clone(&self.plan.dag), Arc::clone(&self.plan.placement));
        let node = self.plan.node;
        let counts_here = |param: &ParamId| {
            let tied = placement.tied.iter().find(|t| t.param == *param);
            !dag.param(*param).frozen && tied.is_none_or(|t| t.holders.first() == Some(&node))
        };
        let mut params = placement.params_of(&dag, node);
        params.retain(counts_here);
        let began = Instant::now();
        let mut total = self.executor.squared_norm(&params)?;
        self.busy += began.elapsed();
        let root = placement.norm_root();
        let others = placement.nodes().filter(|&n| n != root);
        let norm = if node == root {
            for from in others.clone() {
                total += scalar_of(&self.receive(step_slot(Channel::NormPart { from }, step))?.tensor);
            }
            // Everybody clips by the same number, so who adds it up rounds it as the wire does.
            let norm = f64::from(total.sqrt() as f32);
            for to in others {
                self.send_scalar(to, Channel::NormTotal { to }, step, norm)?;
            }
            norm
        } else {
            self.send_scalar(root, Channel::NormPart { from: node }, step, total)?;
            scalar_of(&self.receive(step_slot(Channel::NormTotal { to: node }, step))?.tensor)
        };
        if norm.is_finite() { Ok(norm) } else { Err(self.not_finite("the gradient norm", norm, step)) }
    }

    fn send_scalar(&mut self, to: NodeIndex, channel: Channel, step: u64, value: f64) -> Result<(), CompNodeError> {
        let tensor = HostTensor::new(Vec::new(), Values::F32(vec![value as f32])).map_err(internal)?;
        let (slot, tensor) = (step_slot(channel, step), tensor.into());
        Ok(self.exchange.send(Message { to, slot, tensor, codec: Codec::Dense })?)
    }
}

/// The slot of what is sent once a step.
fn step_slot(channel: Channel, step: u64) -> Slot {
    Slot { channel, pass: Pass::Train, step, micro_batch: 0 }
}

fn scalar_of(tensor: &HostTensor) -> f64 {
    tensor.as_f32().and_then(|v| v.first()).map_or(f64::NAN, |&v| f64::from(v))
}
