//! Weight gradients that wait: what BP of a linear op owes UPDATE, but no other CompNode.
//!
//! BP of a linear op is two matrix products. The stage before waits for the gradient of the input; that of the weight is
//! needed only at UPDATE. So a CompNode may put the second off, send the first sooner, and make up for it while it waits
//! for a message (Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241). A WG task in an order says when a
//! micro-batch's weight gradients must be there at the latest.

use std::collections::VecDeque;

use fusionllm_graph::{OpDag, OpId, OpKind};

use crate::{Shared, Stage, Task};

/// Whether BP of `op` may put the gradient of its weight off. That of a shared weight is sent as soon as the last BP is
/// done, so it may not; a frozen weight has none.
pub fn may_defer(dag: &OpDag, shared: &[Shared], op: OpId) -> bool {
    let Some(entry) = dag.ops().get(op.index()) else { return false };
    let Some(&weight) = entry.params.first() else { return false };
    let is_frozen = dag.params().get(weight.index()).is_none_or(|param| param.frozen);
    let is_shared = || shared.iter().any(|s| s.params.contains(&weight));
    matches!(entry.kind, OpKind::Linear { .. }) && !is_frozen && !is_shared()
}

/// What BP of a micro-batch may put off in a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Deferrable {
    /// Seconds of BP.
    pub seconds: f64,
    /// Matrix products, each of which is done in one go.
    pub products: u32,
    /// Bytes that are held until then: inputs of the ops and gradients of their outputs.
    pub bytes: f64,
}

impl Deferrable {
    /// Of a stage whose op takes `bp_s(op)` for BP, in micro-batches of `batch` samples.
    pub(crate) fn of(dag: &OpDag, stage: &Stage, shared: &[Shared], batch: usize, bp_s: impl Fn(OpId) -> f64) -> Self {
        let mut sum = Self::default();
        for &op in stage.ops.iter().filter(|&&op| may_defer(dag, shared, op)) {
            let entry = dag.op(op);
            let inputs: u64 = entry.inputs.iter().map(|&input| dag.op(input).output.bytes(batch)).sum();
            // The two products have the same FLOPs.
            sum.seconds += 0.5 * bp_s(op);
            sum.products += 1;
            sum.bytes += (inputs + entry.output.bytes(batch)) as f64;
        }
        sum
    }
}

/// The order with weight gradients put off, those of at most `limit` micro-batches at once.
pub(crate) fn defer(order: &[Task], limit: usize) -> Vec<Task> {
    let mut deferred = Vec::with_capacity(order.len());
    let mut waiting = VecDeque::new();
    for &task in order {
        match task {
            Task::Bp { stage, micro_batch } if limit > 0 => {
                if waiting.len() == limit {
                    deferred.extend(waiting.pop_front());
                }
                waiting.push_back(Task::Wg { stage, micro_batch });
            }
            Task::Update => deferred.extend(waiting.drain(..)),
            Task::Fp { .. } | Task::Bp { .. } | Task::Wg { .. } => {}
        }
        deferred.push(task);
    }
    deferred
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StageId;

    #[test]
    fn weight_gradients_wait_until_others_need_their_place_and_at_most_until_update() {
        let (fp, bp, wg) = (
            |m| Task::Fp { stage: StageId(0), micro_batch: m },
            |m| Task::Bp { stage: StageId(0), micro_batch: m },
            |m| Task::Wg { stage: StageId(0), micro_batch: m },
        );
        let order = [fp(0), bp(0), fp(1), bp(1), fp(2), bp(2), Task::Update];
        assert_eq!(defer(&order, 0), order);
        assert_eq!(defer(&order, 2), [fp(0), bp(0), fp(1), bp(1), fp(2), wg(0), bp(2), wg(1), wg(2), Task::Update]);
    }
}
