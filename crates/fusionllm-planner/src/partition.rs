//! Cutting the OP-DAG into stages.
//!
//! Each partitioner here cuts the topological order into contiguous segments. With `private` data the ops that
//! see token ids or labels, or whose gradient tells the labels, stay with the data owner (CompNode 0): its
//! sub-DAG is then the head and the tail of the order, the U-shape.

mod balance;
mod explicit;
mod pins;

use std::ops::Range;

use fusionllm_graph::OpDag;
use serde::{Deserialize, Serialize};

pub use explicit::StageSpec;

use crate::{Cluster, NodeIndex, PlanError};

/// How the OP-DAG is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// The same number of ops on every CompNode: the paper's first baseline.
    EqualNumber,
    /// Compute in proportion to every CompNode's speed: the paper's second baseline.
    #[default]
    EqualCompute,
}

impl Strategy {
    /// The strategy of that name.
    ///
    /// # Errors
    /// [`PlanError::Strategy`] with the names there are.
    pub fn from_name(name: &str) -> Result<Self, PlanError> {
        match name {
            "equal-number" => Ok(Self::EqualNumber),
            "equal-compute" => Ok(Self::EqualCompute),
            "op-fence" => Err(PlanError::Strategy {
                reason: "strategy `op-fence` needs measured links, which this version does not have yet; \
                         use `equal-compute` or `equal-number`"
                    .to_owned(),
            }),
            _ => Err(PlanError::Strategy {
                reason: format!("unknown strategy `{name}`, expected `equal-compute` or `equal-number`"),
            }),
        }
    }
}

/// A contiguous piece of the topological order on one CompNode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Who holds it.
    pub compnode: NodeIndex,
    /// Indices of its ops.
    pub ops: Range<usize>,
}

/// Cuts `dag` over `cluster` and returns the segments in pipeline order.
///
/// `batch` is the size of a micro-batch in samples; it weighs ops whose cost is not linear in it. Explicit
/// `stages` override the strategy.
///
/// # Errors
/// A [`PlanError`] that says what does not fit.
pub fn partition(
    dag: &OpDag,
    cluster: &Cluster,
    strategy: Strategy,
    stages: &[StageSpec],
    private: bool,
    batch: usize,
) -> Result<Vec<Segment>, PlanError> {
    let compnodes = cluster.compnodes.len();
    if compnodes == 0 {
        return Err(PlanError::NoCompNodes);
    }
    if dag.ops().is_empty() {
        return Err(PlanError::EmptyGraph);
    }
    for node in &cluster.compnodes {
        if !(node.flop_per_s.is_finite() && node.flop_per_s > 0.0) {
            let (name, flop_per_s) = (node.name.clone(), node.flop_per_s.to_string());
            return Err(PlanError::Speed { name, flop_per_s });
        }
    }
    let pins = pins::Pins::of(dag, private);
    if !stages.is_empty() {
        return explicit::segments(dag, compnodes, stages, &pins);
    }
    let weights: Vec<f64> = match strategy {
        Strategy::EqualNumber => vec![1.0; dag.ops().len()],
        Strategy::EqualCompute => {
            let flops = |op| {
                let cost = dag.cost(op, batch);
                (cost.fp_flops + cost.bp_flops) as f64
            };
            dag.op_ids().map(flops).collect()
        }
    };
    let speeds: Vec<f64> = match strategy {
        Strategy::EqualNumber => vec![1.0; compnodes],
        Strategy::EqualCompute => cluster.compnodes.iter().map(|c| c.flop_per_s).collect(),
    };
    balance::segments(&weights, &speeds, &pins)
}

#[cfg(test)]
mod tests;
