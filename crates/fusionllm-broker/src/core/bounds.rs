//! How much a CompNode may make the broker keep: what follows from the plan, and no more.

use fusionllm_graph::OpDag;
use fusionllm_planner::{NodeIndex, Placement};
use fusionllm_protocol::{JobSpec, StepReport};

use super::Breach;

/// Steps that the reports of one CompNode may be ahead of those of the slowest: what tiny steps amount to while a
/// connection is out for as long as a lease lasts.
pub(super) const MOST_AHEAD: u64 = 100_000;
/// Checkpoints that a CompNode's shards may be ahead of its reports, which come by another stream.
const SHARDS_AHEAD: u64 = 16;
/// Notes that one placement's CompNodes may make.
const MOST_NOTES: u32 = 1000;
/// Longest text of a codec, in bytes.
const CODEC_BYTES: usize = 200;
/// What a shard takes for its file, besides the values.
const FILE_FORM_BYTES: u64 = 1 << 20;
/// What a shard takes for each tensor with its name, besides the values.
const TENSOR_FORM_BYTES: u64 = 4 << 10;
/// The limit of a shard is a bound against abuse: a codec may come to keep more than is reckoned here.
const SLACK: u64 = 2;

/// Bytes that the shard of a CompNode has at most: parameters, optimizer state, and what codecs hold back.
fn shard_limit(dag: &OpDag, placement: &Placement, node: NodeIndex, spec: &JobSpec) -> u64 {
    let values = spec.train.state_bytes(placement.param_bytes_of(dag, node), placement.trained_bytes_of(dag, node));
    let touches = |stage| placement.holds(node, stage);
    let edges = placement.edges.iter().filter(|e| placement.is_boundary(e) && (touches(e.from) || touches(e.to)));
    let batch = spec.micro_batch_size() as usize;
    let held_back: u64 = edges.clone().map(|e| 2 * dag.op(e.op).output.bytes(batch)).sum();
    let shared = placement.shared.iter().filter(|shared| shared.holders.contains(&node));
    let shared: u64 = shared.map(|s| s.bytes().saturating_mul(s.holders.len() as u64)).sum();
    let copies = (1 + spec.train.states().len() + placement.compnodes.len()) as u64;
    let tensors = placement.params_of(dag, node).len() as u64 * copies + 2 * edges.count() as u64;
    let form = tensors.saturating_mul(TENSOR_FORM_BYTES);
    let sum = values.saturating_add(held_back).saturating_add(shared).saturating_add(form);
    sum.saturating_mul(SLACK).saturating_add(FILE_FORM_BYTES)
}

/// What the CompNodes of one placement have sent, held against what they may.
#[derive(Debug, Default)]
pub(super) struct Bounds {
    /// Most bytes of a shard, by CompNode.
    shards: Vec<u64>,
    /// Steps that each has reported.
    reported: Vec<u64>,
    /// Steps between two checkpoints.
    every: u64,
    /// Whether each has sent its trace.
    traced: Vec<bool>,
    notes: u32,
}

impl Bounds {
    pub(super) fn new(dag: &OpDag, placement: &Placement, spec: &JobSpec, start_step: u64) -> Self {
        let count = placement.compnodes.len();
        let nodes = (0..).map(NodeIndex).take(count);
        Self {
            shards: nodes.map(|node| shard_limit(dag, placement, node, spec)).collect(),
            reported: vec![start_step; count],
            every: spec.checkpoint.every,
            traced: vec![false; count],
            ..Self::default()
        }
    }

    /// Whether the CompNode can have come as far as this step, by what it reported, or said before: it was at `said`.
    pub(super) fn is_near(&self, node: NodeIndex, step: u64, said: u64) -> bool {
        let reported = self.reported.get(node.index()).copied().unwrap_or(0).max(said);
        step.saturating_sub(reported) <= self.every.max(1).saturating_mul(SHARDS_AHEAD)
    }

    /// Why a shard of so many bytes cannot be the CompNode's: it is too large.
    pub(super) fn check_shard(&self, node: NodeIndex, bytes: u64) -> Result<(), Breach> {
        let limit = self.shards.get(node.index()).copied().unwrap_or(0);
        if bytes > limit {
            return Err(Breach(format!(
                "CompNode {} announced a shard of {bytes} bytes, at most {limit} are in its part",
                node.0
            )));
        }
        Ok(())
    }

    /// Holds a report against the order of steps and the size of the placement; drops a trace that nobody asked for.
    pub(super) fn report_comes(&mut self, node: NodeIndex, report: &mut StepReport, merged: u64) -> Result<(), Breach> {
        let (step, count) = (report.step, self.reported.len());
        let breach = |what: String| Err(Breach(format!("CompNode {} reported {what}", node.0)));
        let not_due = || breach(format!("step {step}, which was not due"));
        let Some(last) = self.reported.get_mut(node.index()) else { return not_due() };
        if Some(step) != last.checked_add(1) {
            return not_due();
        }
        if step.saturating_sub(merged) > MOST_AHEAD {
            return breach(format!("step {step}, another is still at step {merged}"));
        }
        let is_long = report.links.iter().any(|link| link.codec.len() > CODEC_BYTES);
        if report.links.len() > count || report.received.len() > count || is_long {
            return breach("more links than there are".to_owned());
        }
        let seconds = [report.step_s, report.busy_s, report.lr];
        if seconds.iter().any(|value| !(value.is_finite() && *value >= 0.0)) {
            return breach(format!("step {step} with times that are no numbers"));
        }
        *last = step;
        if report.trace.is_some() && self.traced.get_mut(node.index()).is_none_or(|was| std::mem::replace(was, true)) {
            report.trace = None;
        }
        Ok(())
    }

    /// Whether one more note of a CompNode is kept.
    pub(super) fn note_comes(&mut self) -> bool {
        self.notes = self.notes.saturating_add(1);
        self.notes <= MOST_NOTES
    }
}
