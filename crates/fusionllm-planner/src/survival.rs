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

/// Guardians fetch snapshots during at most this share of the time.
const GUARDING_SHARE: f64 = 0.5;
/// There is no more than one set of snapshots a second, however cheap.
const LEAST_PERIOD_S: f64 = 1.0;
/// What taking a snapshot costs before it has been measured: its bytes at this speed, that of memory and a disk's cache.
const SNAPSHOT_BYTES_PER_S: f64 = 1e9;

/// Seconds for which training stands still to take a snapshot of so many bytes, before that has been measured.
pub fn snapshot_cost_s(bytes: u64) -> f64 {
    bytes as f64 / SNAPSHOT_BYTES_PER_S
}

/// Seconds from one set of snapshots to the next: with √(2·C·M) what they cost (C each) and what is done again after a failure
/// (one every M) are the least together (Daly, "A higher order estimate of the optimum checkpoint interval for restart
/// dumps", 2006, in its first order, which is Young's); but guardians, which take `guarding_s` to fetch one, must get on.
pub fn snapshot_period_s(cost_s: f64, mtbf_s: f64, guarding_s: f64) -> f64 {
    (2.0 * cost_s * mtbf_s).sqrt().max(guarding_s / GUARDING_SHARE).max(LEAST_PERIOD_S)
}

/// From what a job goes on after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoesOnFrom {
    /// Snapshots that CompNodes keep of each other, after every so many steps, or as often as is best.
    Snapshots(Option<u64>),
    /// Checkpoints at the broker after every so many steps.
    Checkpoints(u64),
}

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
    /// Steps that are done again: on the average half of those from one time at which all is kept to the next.
    pub again_s: f64,
}

impl FailureCost {
    /// Of a job as it is planned, that is hit every `mtbf_s` seconds. `state_bytes` says how many bytes go on the way with so
    /// many bytes of parameters, so many of which are trained. Checkpoints come from the broker, which is taken to stand beside
    /// the data owner, to all CompNodes at once; of snapshots only the lost part does, from its guardian.
    pub fn of(plan: &Plan, dag: &OpDag, kept: GoesOnFrom, mtbf_s: f64, state_bytes: impl Fn(u64, u64) -> u64) -> Self {
        let step_s = plan.prediction.step_s;
        let bytes = |node: NodeIndex| {
            let placement = &plan.placement;
            state_bytes(placement.param_bytes_of(dag, node), placement.trained_bytes_of(dag, node))
        };
        let way =
            |from: NodeIndex, to: NodeIndex| plan.cluster.link(from.index(), to.index()).transfer_s(bytes(to) as f64);
        let slowest = |of: &dyn Fn(NodeIndex) -> f64| plan.placement.nodes().map(of).fold(0.0, f64::max);
        let (move_s, again_s) = match kept {
            GoesOnFrom::Checkpoints(every) => {
                (slowest(&|node| way(NodeIndex::DATA_OWNER, node)), every as f64 * step_s / 2.0)
            }
            GoesOnFrom::Snapshots(every) => {
                let from_guardian = |node: NodeIndex| {
                    let others = plan.placement.nodes().filter(|&other| other != node);
                    let fastest = others.map(|other| way(other, node)).min_by(f64::total_cmp);
                    fastest.unwrap_or(0.0)
                };
                let guarding_s = slowest(&from_guardian);
                let cost_s = slowest(&|node| snapshot_cost_s(bytes(node)));
                let period_s = match every {
                    Some(every) => every as f64 * step_s,
                    None => snapshot_period_s(cost_s, mtbf_s, guarding_s),
                };
                (guarding_s, period_s.max(step_s) / 2.0)
            }
        };
        Self { detect_s: DETECT_S, decide_s: DECIDE_S, move_s, build_s: BUILD_S, refill_s: step_s, again_s }
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
    fn snapshots_come_as_often_as_failures_make_best() {
        assert!((snapshot_period_s(0.5, 3600.0, 1.0) - 60.0).abs() < 1e-9);
        assert!((snapshot_period_s(0.5, 900.0, 1.0) - 30.0).abs() < 1e-9);
        assert!((snapshot_period_s(0.5, 900.0, 40.0) - 80.0).abs() < 1e-9, "guardians rest half of the time");
        assert!((snapshot_period_s(0.0, 900.0, 0.0) - LEAST_PERIOD_S).abs() < 1e-9);
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
            keep_blocks: [0; 2],
            codec: Codec::Dense,
        });
        let plan = plan(&dag, &cluster, &spec).unwrap();
        let bytes = plan.placement.param_bytes_of(&dag, NodeIndex(1));
        let cost = FailureCost::of(&plan, &dag, GoesOnFrom::Checkpoints(10), 3600.0, |all, trained| all + 2 * trained);
        assert!(bytes > 0 && (cost.move_s - (0.5 + 3.0 * bytes as f64 / 1000.0)).abs() < 1e-9, "{cost:?}");
        let step_s = plan.prediction.step_s;
        assert!((cost.again_s - 5.0 * step_s).abs() < 1e-9 && (cost.refill_s - step_s).abs() < 1e-12, "{cost:?}");
        // Either part may be lost, and comes from the other CompNode.
        let most = plan.placement.nodes().map(|node| 3 * plan.placement.param_bytes_of(&dag, node)).max().unwrap();
        let by_snapshots = |every, mtbf_s| {
            FailureCost::of(&plan, &dag, GoesOnFrom::Snapshots(every), mtbf_s, |all, trained| all + 2 * trained)
        };
        let cost = by_snapshots(Some(4), 3600.0);
        assert!((cost.move_s - (0.5 + most as f64 / 1000.0)).abs() < 1e-9, "{cost:?}");
        assert!((cost.again_s - 2.0 * step_s).abs() < 1e-9, "{cost:?}");
        // Over so slow a link guardians set the pace, at whatever rate of failures.
        assert!((by_snapshots(None, 60.0).again_s - cost.move_s.max(step_s / 2.0)).abs() < 1e-9);
    }
}
