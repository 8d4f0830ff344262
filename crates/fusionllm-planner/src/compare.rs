//! All strategies and compressions side by side, for one model on one cluster.

use fusionllm_codec::TopKValues;
use fusionllm_graph::OpDag;

use crate::partition::{MOST_COMPNODES, MOST_OPS};
use crate::{Cluster, Compression, Plan, PlanError, PlanSpec, Strategy, plan};

/// One of the plans that are compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// How the OP-DAG is cut.
    pub strategy: Strategy,
    /// What the links carry.
    pub compression: Compression,
    /// The plan, or why there is none.
    pub plan: Result<Plan, PlanError>,
}

/// Plans `dag` with every strategy, each dense, with uniform Top-K, AdaTopK and the adaptive policy at `ratio`. Strategy, stages and
/// compression of `spec` are replaced. `optimal` is among them only where it can be tried.
pub fn compare(dag: &OpDag, cluster: &Cluster, spec: &PlanSpec, ratio: f64) -> Vec<Candidate> {
    let is_small = cluster.compnodes.len() <= MOST_COMPNODES && dag.ops().len() <= MOST_OPS;
    let values = TopKValues::Bf16;
    let compressions = [
        Compression::Dense,
        Compression::UniformTopk { ratio, values },
        Compression::AdaTopk { ratio, values, literal: false },
        Compression::Adaptive { ratio },
    ];
    let mut candidates = Vec::new();
    for strategy in Strategy::ALL.into_iter().filter(|&s| s != Strategy::Optimal || is_small) {
        for compression in compressions {
            let mut spec = spec.clone();
            spec.placement.strategy = strategy;
            spec.placement.stages.clear();
            spec.compression = compression;
            candidates.push(Candidate { strategy, compression, plan: plan(dag, cluster, &spec) });
        }
    }
    candidates
}
