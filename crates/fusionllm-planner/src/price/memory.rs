//! What a placement needs of each CompNode's memory.

use std::collections::BTreeMap;
use std::ops::Range;

use fusionllm_graph::OpDag;

use super::{Memory, Pricing};
use crate::{NodeIndex, Pieces, Placement, Shared, StageId};

/// By CompNode: what a placement needs of its memory, and what it has. `ranges` has the ops of each stage.
pub(super) fn needed(pricing: &Pricing<'_>, placement: &Placement, ranges: &[Range<usize>]) -> Vec<Memory> {
    let Pricing { dag, estimate, spec, .. } = *pricing;
    let batch = pricing.batch();
    let state = |node: NodeIndex| Memory {
        needed: placement.training_bytes_of(dag, node, spec.states) as f64,
        has: pricing.profile(node).memory_bytes,
    };
    let mut memory: Vec<Memory> = placement.nodes().map(state).collect();
    let by_node: Vec<_> = placement.nodes().map(|node| placement.live_bound(node)).collect();
    for (node, memory) in placement.nodes().zip(&mut memory) {
        let live = &by_node[node.index()];
        let mut kept = 0.0;
        for (stage, range) in placement.stages.iter().zip(ranges).filter(|(s, _)| s.compnode == node) {
            let count = live.get(&stage.id).copied().unwrap_or(1);
            kept += estimate.kept_bytes(pricing.profile(node), range, count);
        }
        // An evaluation keeps nothing for BP, but nothing holds its senders back except the windows.
        let held = held_messages(dag, placement, node, &by_node, batch);
        memory.needed += (kept + held.train).max(held.eval);
    }
    for edge in placement.edges.iter().filter(|e| placement.is_boundary(e)) {
        let bytes = dag.op(edge.op).output.bytes(batch) as f64;
        let feeds_back = spec.error_feedback && edge.gradient && !edge.gradient_codec.is_lossless();
        if let (true, Some(sender)) = (feeds_back, placement.compnode_of(edge.to)) {
            memory[sender.index()].needed += bytes;
        }
    }
    for shared in &placement.shared {
        for &holder in &shared.holders {
            memory[holder.index()].needed += exchanged(dag, placement, shared, holder, batch);
        }
    }
    memory
}

/// Bytes of messages that a CompNode holds at once, at the most.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    train: f64,
    eval: f64,
}

/// The messages of all edges that lead to a CompNode or from it. A micro-batch is live in the sending stage from before
/// its activation is sent until its gradient is taken, so of all that is live there is one message, at either end; and
/// one is there twice while it is encoded or decoded. Of an edge without a gradient, and in an evaluation, a sender may
/// be ahead by all that waits to be encoded and all that the receiver has not taken.
fn held_messages(
    dag: &OpDag,
    placement: &Placement,
    node: NodeIndex,
    live: &[BTreeMap<StageId, u32>],
    batch: usize,
) -> Held {
    let window = u64::from(placement.window());
    let mut held = Held::default();
    for edge in placement.edges.iter().filter(|e| placement.is_boundary(e)) {
        let (from, to) = (placement.compnode_of(edge.from), placement.compnode_of(edge.to));
        if from != Some(node) && to != Some(node) {
            continue;
        }
        let bytes = dag.op(edge.op).output.bytes(batch) as f64;
        // Dense, however they are encoded: those that wait are.
        let ahead = if from == Some(node) { 2 * window } else { window };
        let live = from.and_then(|from| live.get(from.index())?.get(&edge.from).copied()).unwrap_or(1);
        let train = if edge.gradient { u64::from(live) } else { ahead };
        held.train += (train + 1) as f64 * bytes;
        held.eval += (ahead.min(placement.eval.micro_batches.into()) + 1) as f64 * bytes;
    }
    held
}

/// Bytes that the exchange of a shared parameter's gradients takes on one holder.
fn exchanged(dag: &OpDag, placement: &Placement, shared: &Shared, holder: NodeIndex, batch: usize) -> f64 {
    let pieces = Pieces::of(&shared.shape(dag));
    let sent_by = |from: NodeIndex| match placement.most_rows(dag, shared, from, batch) {
        Some(rows) => (rows as f64 * 4.0 * pieces.columns() as f64).min(pieces.window_bytes()),
        None => pieces.window_bytes(),
    };
    let others = shared.holders.iter().filter(|&&h| h != holder);
    let windows: f64 = others.map(|&other| sent_by(holder) + sent_by(other)).sum();
    // What a codec drops is held back for the next step.
    windows + if shared.codec.is_lossless() { 0.0 } else { shared.bytes() as f64 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::ready::{Need, is_ready};
    use crate::testing::small_gpt2;
    use crate::{Cluster, Estimate, Pipeline, PlacementSpec, PlanSpec, Strategy, Task, plan};

    fn spec(pipeline: Pipeline, run_ahead: u32, eval_micro_batches: u32) -> PlanSpec {
        PlanSpec::dense(PlacementSpec {
            strategy: Strategy::EqualNumber,
            stages: Vec::new(),
            pipeline,
            run_ahead: Some(run_ahead),
            deferred: Some(0),
            micro_batches: 8,
            micro_batch_size: 2,
            eval_micro_batches,
            private: false,
            keep_blocks: [0; 2],
            codec: fusionllm_codec::Codec::Dense,
        })
    }

    /// Runs the orders in an order drawn by `seed`. By edge, the most messages that were sent and not taken at once.
    fn most_under_way(placement: &Placement, mut seed: u64) -> Vec<usize> {
        let mut at = vec![0; placement.compnodes.len()];
        let (mut sent, mut most) = (BTreeSet::new(), vec![0; placement.edges.len()]);
        loop {
            let ready = |node: &usize| {
                let task = placement.train.orders[*node].get(at[*node]);
                task.is_some_and(|&task| {
                    is_ready(&placement.edges, task, |need| match need {
                        Need::Kept { .. } => true,
                        Need::Activation { edge, micro_batch } => sent.contains(&(edge, micro_batch, false)),
                        Need::Gradient { edge, micro_batch } => sent.contains(&(edge, micro_batch, true)),
                    })
                })
            };
            let able: Vec<usize> = (0..at.len()).filter(ready).collect();
            if able.is_empty() {
                return most;
            }
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let node = able[((seed >> 33) as usize) % able.len()];
            let task = placement.train.orders[node][at[node]];
            at[node] += 1;
            for edge in &placement.edges {
                match task {
                    Task::Fp { stage, micro_batch } if stage == edge.from => {
                        sent.insert((edge.id, micro_batch, false));
                    }
                    Task::Fp { stage, micro_batch } if stage == edge.to => {
                        sent.remove(&(edge.id, micro_batch, false));
                    }
                    Task::Bp { stage, micro_batch } if stage == edge.to && edge.gradient => {
                        sent.insert((edge.id, micro_batch, true));
                    }
                    Task::Bp { stage, micro_batch } if stage == edge.from => {
                        sent.remove(&(edge.id, micro_batch, true));
                    }
                    _ => {}
                }
                let now = sent.iter().filter(|(id, _, _)| *id == edge.id).count();
                most[edge.id.index()] = now.max(most[edge.id.index()]);
            }
        }
    }

    #[test]
    fn of_an_edge_no_more_messages_are_under_way_than_micro_batches_are_live_at_its_sender() {
        let dag = small_gpt2(4);
        for (pipeline, run_ahead) in [(Pipeline::OneFOneB, 0), (Pipeline::OneFOneB, 3), (Pipeline::GPipe, 0)] {
            let placement = plan(&dag, &Cluster::uniform(4), &spec(pipeline, run_ahead, 2)).unwrap().placement;
            let mut most = vec![0; placement.edges.len()];
            for seed in 0..200 {
                for (most, now) in most.iter_mut().zip(most_under_way(&placement, seed)) {
                    *most = now.max(*most);
                }
            }
            let mut reached = 0;
            for edge in placement.edges.iter().filter(|e| e.gradient) {
                let live = placement.live_bound(placement.compnode_of(edge.from).unwrap())[&edge.from] as usize;
                assert!(most[edge.id.index()] <= live, "{pipeline:?}, {edge:?}: {} of {live}", most[edge.id.index()]);
                reached += usize::from(most[edge.id.index()] == live);
            }
            assert!(reached > 0, "{pipeline:?}: {most:?} is less than was counted everywhere");
        }
    }

    #[test]
    fn all_messages_that_may_be_under_way_are_planned_for() {
        let dag = small_gpt2(4);
        let memory = |spec: &PlanSpec| plan(&dag, &Cluster::uniform(2), spec).unwrap();
        let estimate = Estimate::new(&dag, 2, &Cluster::uniform(2), 2);
        for (pipeline, run_ahead) in [(Pipeline::OneFOneB, 0), (Pipeline::OneFOneB, 3), (Pipeline::GPipe, 0)] {
            let planned = memory(&spec(pipeline, run_ahead, 1));
            let of = &planned.placement;
            let (own, live) = (of.stages[0].ops.len(), of.live_bound(NodeIndex(0))[&StageId(0)]);
            let state: u64 = of.params_of(&dag, NodeIndex(0)).into_iter().map(|p| dag.param(p).bytes()).sum();
            let kept = estimate.kept_bytes(&planned.cluster.compnodes[0], &(0..own), live);
            let edges = of.edges.iter().filter(|e| of.is_boundary(e) && e.gradient);
            let messages: f64 = edges.map(|e| dag.op(e.op).output.bytes(2) as f64 * f64::from(live + 1)).sum();
            let least = (4 * state) as f64 + kept + messages;
            let counted = planned.prediction.compnodes[0].memory_bytes;
            assert!(messages > 0.0 && counted >= least, "{pipeline:?}: {counted} of {least}");
        }
        // A long evaluation fills the windows, which is more than a short training step does.
        let few = |eval| {
            let mut spec = spec(Pipeline::OneFOneB, 0, eval);
            spec.placement.micro_batches = 1;
            memory(&spec).prediction.compnodes[0].memory_bytes
        };
        assert!(few(1000) >= few(1) && few(1000) == few(2000), "{} {} {}", few(1), few(1000), few(2000));
    }
}
