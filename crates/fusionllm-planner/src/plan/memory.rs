//! What a placement needs of each CompNode's memory.

use std::ops::Range;

use fusionllm_graph::OpDag;

use super::PlanSpec;
use crate::{Cluster, Estimate, NodeIndex, Pieces, Placement, TRAINING_COPIES, TiedParam};

/// By CompNode: the bytes that it needs, and those that it has. `ranges` has the ops of each stage.
pub(super) fn needed(
    dag: &OpDag,
    cluster: &Cluster,
    estimate: &Estimate,
    placement: &Placement,
    ranges: &[Range<usize>],
    spec: &PlanSpec,
) -> Vec<(f64, u64)> {
    let batch = spec.placement.micro_batch_size as usize;
    let params = |node| placement.params_of(dag, node).into_iter().map(|p| dag.param(p).bytes()).sum::<u64>();
    let nodes = (0..cluster.compnodes.len() as u32).map(NodeIndex);
    let state = nodes.map(|n| ((params(n) * TRAINING_COPIES) as f64, cluster.compnodes[n.index()].memory_bytes));
    let mut memory: Vec<(f64, u64)> = state.collect();
    for (node, memory) in (0..).map(NodeIndex).zip(&mut memory) {
        let live = placement.live_bound(node);
        for (stage, range) in placement.stages.iter().zip(ranges).filter(|(s, _)| s.compnode == node) {
            let count = live.get(&stage.id).copied().unwrap_or(1);
            memory.0 += estimate.kept_bytes(&cluster.compnodes[node.index()], range) * f64::from(count);
        }
    }
    for edge in placement.edges.iter().filter(|e| placement.is_boundary(e)) {
        // A message is held while it is sent, and while it waits to be taken.
        let bytes = dag.op(edge.op).output.bytes(batch) as f64;
        for stage in [edge.from, edge.to] {
            if let Some(node) = placement.compnode_of(stage) {
                memory[node.index()].0 += 2.0 * bytes;
            }
        }
        let feeds_back = spec.error_feedback && edge.gradient && !edge.gradient_codec.is_lossless();
        if let (true, Some(sender)) = (feeds_back, placement.compnode_of(edge.to)) {
            memory[sender.index()].0 += bytes;
        }
    }
    for tied in &placement.tied {
        for &holder in &tied.holders {
            memory[holder.index()].0 += exchanged(dag, placement, tied, holder, batch);
        }
    }
    memory
}

/// Bytes that the exchange of a tied parameter's gradients takes on one holder.
fn exchanged(dag: &OpDag, placement: &Placement, tied: &TiedParam, holder: NodeIndex, batch: usize) -> f64 {
    let pieces = Pieces::of(&dag.param(tied.param).shape);
    let sent_by = |from: NodeIndex| match placement.most_rows(dag, tied, from, batch) {
        Some(rows) => (rows as f64 * 4.0 * pieces.columns() as f64).min(pieces.window_bytes()),
        None => pieces.window_bytes(),
    };
    let others = tied.holders.iter().filter(|&&h| h != holder);
    let windows: f64 = others.map(|&other| sent_by(holder) + sent_by(other)).sum();
    // What a codec drops is held back for the next step.
    windows + if tied.codec.is_lossless() { 0.0 } else { dag.param(tied.param).bytes() as f64 }
}
