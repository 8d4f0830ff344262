//! What the loss of a CompNode costs a job, and which share of its time is useful where machines fail.

use fusionllm_graph::OpDag;
use serde::Serialize;

use crate::{NodeIndex, Plan};

/// Silence until a lost CompNode is known, in seconds: heartbeats come each second, and those that train with it must have
/// heard nothing of it for three.
const DETECT_S: f64 = 4.0;
/// Until the job is placed again: a process that is started again is waited for, for five seconds, and the checkpoint is
/// read and the rest planned meanwhile.
const DECIDE_S: f64 = 5.5;
/// Until the parts are built, without the way of their weights, in seconds: as on a CPU.
const BUILD_S: f64 = 1.0;

/// What one failure costs, in seconds by its phases.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct FailureCost {
    /// Until it is known.
    pub detect_s: f64,
    /// Until the job is placed again.
    pub decide_s: f64,
    /// Until the weights are where they are needed.
    pub move_s: f64,
    /// Until all parts are built.
    pub build_s: f64,
    /// Until the first step is done.
    pub refill_s: f64,
    /// Steps that are done again: on the average half of those between two checkpoints.
    pub again_s: f64,
}

impl FailureCost {
    /// Of a job as it is planned, with a checkpoint after every `every` steps. `state_bytes` says how many bytes go on the
    /// way with so many bytes of parameters. They come from the broker, which is taken to stand beside the first CompNode,
    /// to all CompNodes at once.
    pub fn of(plan: &Plan, dag: &OpDag, every: u64, state_bytes: impl Fn(u64) -> u64) -> Self {
        let moved = |node: NodeIndex| {
            let bytes = state_bytes(plan.placement.param_bytes_of(dag, node));
            plan.cluster.link(0, node.index()).transfer_s(bytes as f64)
        };
        let step_s = plan.prediction.step_s;
        Self {
            detect_s: DETECT_S,
            decide_s: DECIDE_S,
            move_s: plan.placement.nodes().map(moved).fold(0.0, f64::max),
            build_s: BUILD_S,
            refill_s: step_s,
            again_s: every as f64 * step_s / 2.0,
        }
    }

    /// All of it, in seconds.
    pub fn total_s(&self) -> f64 {
        self.detect_s + self.decide_s + self.move_s + self.build_s + self.refill_s + self.again_s
    }

    /// The share of the time that is useful where the job is hit every `mtbf_s` seconds of work on the average.
    pub fn useful_share(&self, mtbf_s: f64) -> f64 {
        1.0 - self.total_s() / (mtbf_s + self.total_s())
    }
}

#[cfg(test)]
mod tests {
    use fusionllm_codec::Codec;

    use super::*;
    use crate::testing::small_gpt2;
    use crate::{Cluster, LinkProfile, Pipeline, PlacementSpec, PlanSpec, Strategy, plan};

    #[test]
    fn the_share_is_what_failures_leave() {
        let cost =
            FailureCost { detect_s: 4.0, decide_s: 6.0, move_s: 20.0, build_s: 5.0, refill_s: 5.0, again_s: 20.0 };
        assert!((cost.total_s() - 60.0).abs() < 1e-12);
        assert!((cost.useful_share(3600.0) - 0.9836).abs() < 1e-4 && (cost.useful_share(600.0) - 0.9091).abs() < 1e-4);
        assert!((cost.useful_share(f64::INFINITY) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn weights_take_as_long_as_the_slowest_of_their_ways() {
        let dag = small_gpt2(2);
        let mut cluster = Cluster::uniform(2);
        let link = LinkProfile { latency_s: 0.5, bytes_per_s: 1000.0 };
        cluster.links = vec![vec![link; 2]; 2];
        let spec = PlanSpec::dense(PlacementSpec {
            strategy: Strategy::EqualNumber,
            stages: Vec::new(),
            pipeline: Pipeline::OneFOneB,
            run_ahead: Some(0),
            deferred: Some(0),
            micro_batches: 2,
            micro_batch_size: 2,
            eval_micro_batches: 1,
            private: false,
            codec: Codec::Dense,
        });
        let plan = plan(&dag, &cluster, &spec).unwrap();
        let bytes = plan.placement.param_bytes_of(&dag, NodeIndex(1));
        let cost = FailureCost::of(&plan, &dag, 10, |bytes| 3 * bytes);
        assert!(bytes > 0 && (cost.move_s - (0.5 + 3.0 * bytes as f64 / 1000.0)).abs() < 1e-9, "{cost:?}");
        let step_s = plan.prediction.step_s;
        assert!((cost.again_s - 5.0 * step_s).abs() < 1e-9 && (cost.refill_s - step_s).abs() < 1e-12, "{cost:?}");
    }
}
