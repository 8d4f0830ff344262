//! Recomputation: a CompNode that lacks memory for the activations keeps only what enters each *piece* of its stages, and
//! makes the others anew when BP comes to the piece (Chen et al., "Training Deep Nets with Sublinear Memory Cost",
//! arXiv 1604.06174).

use std::collections::BTreeSet;

use fusionllm_graph::{OpDag, OpId};
use serde::{Deserialize, Serialize};

use crate::pieces::{crossing_bytes, piece_ends};
use crate::{NodeIndex, Placement, Stage};

/// Whether activations are made anew in BP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// On CompNodes whose memory would not hold the activations otherwise, if the step gains by it.
    #[default]
    Auto,
    /// Nowhere.
    Never,
    /// On every CompNode.
    Always,
}

impl Recompute {
    /// Every choice.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Never, Self::Always];

    /// Its name in job files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Never => "never",
            Self::Always => "always",
        }
    }
}

impl Placement {
    /// Whether a CompNode makes activations anew in BP.
    pub fn recomputes(&self, node: NodeIndex) -> bool {
        self.recompute.contains(&node)
    }

    /// The ops of each piece of a stage that is computed on its own, in order: all ops in one piece where nothing is made
    /// anew.
    pub fn pieces_of(&self, dag: &OpDag, stage: &Stage) -> Vec<Vec<OpId>> {
        if !self.recomputes(stage.compnode) {
            return vec![stage.ops.clone()];
        }
        let ends: BTreeSet<usize> = piece_ends(dag).into_iter().collect();
        let mut pieces: Vec<Vec<OpId>> = Vec::new();
        for &op in &stage.ops {
            match pieces.last_mut().filter(|_| !ends.contains(&op.index())) {
                Some(piece) => piece.push(op),
                None => pieces.push(vec![op]),
            }
        }
        pieces
    }

    /// Bytes of the tensors between the pieces of a CompNode's stages that it keeps until BP, of all micro-batches that are
    /// live at once at the most, each of `batch` samples.
    pub fn kept_between_pieces(&self, dag: &OpDag, node: NodeIndex, batch: usize) -> u64 {
        let live = self.live_bound(node);
        let of_stage = |stage: &Stage| {
            let pieces = self.pieces_of(dag, stage);
            let ends = pieces.iter().rev().skip(1).filter_map(|piece| piece.last());
            let crossing = |&last: &OpId| crossing_bytes(dag, last, batch);
            let bytes = ends.map(crossing).fold(0, u64::saturating_add);
            bytes.saturating_mul(live.get(&stage.id).copied().unwrap_or(1).into())
        };
        self.stages_of(node).map(of_stage).fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::small_gpt2;
    use crate::{Cluster, Pipeline, PlacementSpec, Plan, PlanError, PlanSpec, Strategy, plan};

    fn spec(recompute: Recompute, strategy: Strategy) -> PlanSpec {
        let placement = PlacementSpec {
            strategy,
            stages: Vec::new(),
            pipeline: Pipeline::OneFOneB,
            run_ahead: Some(0),
            deferred: Some(0),
            micro_batches: 8,
            micro_batch_size: 8,
            eval_micro_batches: 1,
            private: false,
            keep_blocks: [0; 2],
            codec: fusionllm_codec::Codec::Dense,
        };
        PlanSpec { recompute, ..PlanSpec::dense(placement) }
    }

    fn memory(plan: &Plan) -> Vec<f64> {
        plan.prediction.compnodes.iter().map(|compnode| compnode.memory_bytes).collect()
    }

    fn recomputing(plan: &Plan) -> Vec<bool> {
        plan.prediction.compnodes.iter().map(|compnode| compnode.recomputes).collect()
    }

    #[test]
    fn activations_are_made_anew_where_memory_does_not_hold_them_and_only_there() {
        let dag = small_gpt2(6);
        let mut cluster = Cluster::uniform(2);
        let kept = plan(&dag, &cluster, &spec(Recompute::Auto, Strategy::EqualCompute)).unwrap();
        assert_eq!(recomputing(&kept), [false, false], "memory is boundless");
        let anew = plan(&dag, &cluster, &spec(Recompute::Always, Strategy::EqualCompute)).unwrap();
        assert_eq!(recomputing(&anew), [true, true]);
        assert!(memory(&anew)[0] < 0.5 * memory(&kept)[0], "{:?} of {:?}", memory(&anew), memory(&kept));
        // FP comes twice, and BP takes twice as long as FP.
        let (slower, step_s) = (anew.prediction.step_s, kept.prediction.step_s);
        assert!((slower / step_s - 4.0 / 3.0).abs() < 0.05, "{slower} instead of {step_s}");
        // The first CompNode has less memory than its part takes.
        cluster.compnodes[0].memory_bytes = (0.5 * (memory(&anew)[0] + memory(&kept)[0])) as u64;
        let of = |recompute, strategy| plan(&dag, &cluster, &spec(recompute, strategy));
        assert!(matches!(of(Recompute::Never, Strategy::EqualCompute), Err(PlanError::OverMemory { .. })));
        let auto = of(Recompute::Auto, Strategy::EqualCompute).unwrap();
        assert_eq!(recomputing(&auto), [true, false]);
        assert_eq!(auto.placement.recompute, [NodeIndex(0)]);
        assert!(memory(&auto)[0] <= cluster.compnodes[0].memory_bytes as f64);
        // Where OP-Fence may cut elsewhere, it takes whichever is faster.
        let [never, auto] = [Recompute::Never, Recompute::Auto].map(|r| of(r, Strategy::OpFence));
        let step_s = |plan: &Plan| plan.prediction.step_s;
        assert!(never.is_err() || step_s(auto.as_ref().unwrap()) <= step_s(never.as_ref().unwrap()));
    }

    #[test]
    fn a_model_whose_activations_no_memory_holds_trains_by_making_them_anew() {
        let dag = small_gpt2(6);
        let boundless = Cluster::uniform(2);
        let least = memory(&plan(&dag, &boundless, &spec(Recompute::Always, Strategy::OpFence)).unwrap());
        let mut cluster = boundless;
        for compnode in &mut cluster.compnodes {
            compnode.memory_bytes = (1.1 * least.iter().copied().fold(0.0, f64::max)) as u64;
        }
        assert!(plan(&dag, &cluster, &spec(Recompute::Never, Strategy::OpFence)).is_err());
        let found = plan(&dag, &cluster, &spec(Recompute::Auto, Strategy::OpFence)).unwrap();
        assert!(recomputing(&found).contains(&true));
        // What is at work is priced as it is.
        let again = crate::step_by_cut(&dag, &cluster, &found.placement, &spec(Recompute::Auto, Strategy::OpFence));
        assert_eq!(again.unwrap(), found.prediction.step_s);
    }
}
