//! Gradients of weights that BP has put off, and what was made of them so far.

use std::collections::{BTreeMap, VecDeque};

use burn_tensor::Tensor;
use fusionllm_graph::{OpId, ParamId};
use fusionllm_planner::StageId;

use crate::burn::kernels::WeightGradient;

/// All that one CompNode owes UPDATE.
///
/// Each op has a sum of its own, to which its micro-batches are added in their order. So when a gradient is made, which
/// depends on the network, changes nothing in the sum.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    waiting: VecDeque<Backward>,
    sums: BTreeMap<OpId, (ParamId, Tensor<1>)>,
}

/// What one BP has put off.
#[derive(Debug)]
struct Backward {
    stage: StageId,
    micro_batch: u32,
    weights: VecDeque<(OpId, ParamId, WeightGradient)>,
}

impl Owed {
    /// BP of a micro-batch has put these off.
    pub(crate) fn put_off(
        &mut self,
        stage: StageId,
        micro_batch: u32,
        weights: impl IntoIterator<Item = (OpId, ParamId, WeightGradient)>,
    ) {
        let weights: VecDeque<_> = weights.into_iter().collect();
        if !weights.is_empty() {
            self.waiting.push_back(Backward { stage, micro_batch, weights });
        }
    }

    /// Whose is the oldest that waits.
    pub(crate) fn oldest(&self) -> Option<(StageId, u32)> {
        self.waiting.front().map(|b| (b.stage, b.micro_batch))
    }

    /// Whether the gradient of `param` is not whole yet.
    pub(crate) fn concerns(&self, param: ParamId) -> bool {
        let is_in_sum = self.sums.values().any(|(p, _)| *p == param);
        is_in_sum || self.waiting.iter().flat_map(|b| &b.weights).any(|(_, p, _)| *p == param)
    }

    /// Makes the gradient that has waited longest.
    pub(crate) fn make_up(&mut self) {
        let Some(backward) = self.waiting.front_mut() else { return };
        if let Some((op, param, weight)) = backward.weights.pop_front() {
            let sum = self.sums.remove(&op).map(|(_, sum)| sum);
            self.sums.insert(op, (param, weight.add_to(sum)));
        }
        self.waiting.pop_front_if(|b| b.weights.is_empty());
    }

    /// Makes all that are left, and gives the sums.
    pub(crate) fn settle(&mut self) -> impl Iterator<Item = (ParamId, Tensor<1>)> + use<> {
        while self.oldest().is_some() {
            self.make_up();
        }
        std::mem::take(&mut self.sums).into_values()
    }
}
