//! Cutting the OP-DAG into stages.
//!
//! Each partitioner here cuts the topological order into contiguous segments. With `private` data both ends of the model
//! stay with the data owner (CompNode 0): its sub-DAG is then the head and the tail of the order, the U-shape.

mod balance;
mod chain;
mod explicit;
mod louvain;
mod op_fence;
mod optimal;
mod order;
mod orgs;
mod pins;
mod search;

use fusionllm_graph::OpDag;

pub(crate) use chain::Chain;
pub(crate) use op_fence::{Judge, best_of_all, op_fence};
pub(crate) use optimal::{MOST_COMPNODES, MOST_OPS};
pub use order::clusters_by_bandwidth;
pub(crate) use orgs::{all_apart, check_stages, refused};
pub(crate) use pins::Pins;
pub use pins::kept_ops;

use crate::{Cluster, PlanError, Segment, StageSpec};

/// Cuts `dag` into as many segments as `cluster` has CompNodes, in their order: what the baselines do.
///
/// `batch` is the size of a micro-batch in samples. Explicit `stages` override the strategy.
///
/// # Errors
/// A [`PlanError`] that says what does not fit.
pub(crate) fn in_order(
    dag: &OpDag,
    cluster: &Cluster,
    by_number: bool,
    stages: &[StageSpec],
    pins: &Pins,
    batch: usize,
) -> Result<Vec<Segment>, PlanError> {
    let compnodes = cluster.compnodes.len();
    if !stages.is_empty() {
        return explicit::segments(dag, compnodes, stages, pins);
    }
    let flops = |op| {
        let cost = dag.cost(op, batch);
        (cost.fp_flops + cost.bp_flops) as f64
    };
    let weights: Vec<f64> = if by_number { vec![1.0; dag.ops().len()] } else { dag.op_ids().map(flops).collect() };
    let speed = |c: &crate::CompNodeProfile| c.flop_per_s * c.efficiency;
    let speeds: Vec<f64> = if by_number { vec![1.0; compnodes] } else { cluster.compnodes.iter().map(speed).collect() };
    balance::segments(&weights, &speeds, pins)
}

#[cfg(test)]
mod tests;
