//! From segments to a placement: its edges, its shared parameters, its task orders.

use std::collections::{BTreeMap, BTreeSet};

use fusionllm_codec::Codec;
use fusionllm_graph::{OpDag, OpId, ParamId};

use crate::pipeline::{OrderSpec, eval_orders, train_orders};
use crate::{
    Cluster, EdgeId, NodeIndex, PassPlan, Placement, PlacementSpec, PlanError, Segment, Shared, SharedId, Stage,
    StageEdge, StageId,
};

/// The placement of given segments on the CompNodes of a cluster, with its edges and task orders. FP and BP of a
/// micro-batch take `stage_s` seconds, which matters where links have latency.
pub(crate) fn assemble(
    dag: &OpDag,
    cluster: &Cluster,
    segments: Vec<Segment>,
    spec: &PlacementSpec,
    stage_s: f64,
) -> Result<Placement, PlanError> {
    let compnodes: Vec<String> = cluster.compnodes.iter().map(|c| c.name.clone()).collect();
    let stages: Vec<Stage> = segments
        .into_iter()
        .enumerate()
        .map(|(i, s)| Stage {
            id: StageId(i as u32),
            compnode: s.compnode,
            ops: s.ops.map(|op| OpId(op as u32)).collect(),
        })
        .collect();
    let edges = stage_edges(dag, &stages, spec.codec, spec.micro_batch_size as usize);
    let count = compnodes.len();
    let (run_ahead, delays) = (spec.run_ahead.unwrap_or(0), Vec::new());
    let mut order = OrderSpec { pipeline: spec.pipeline, run_ahead, micro_batches: spec.micro_batches, delays };
    if run_ahead > 0 {
        let node = |stage: StageId| stages[stage.index()].compnode.index();
        let latency_s = |a: usize, b: usize| cluster.link(a, b).latency_s.max(cluster.link(b, a).latency_s);
        let delay = |e: &StageEdge| order.delay(latency_s(node(e.from), node(e.to)), stage_s);
        order.delays = edges.iter().map(delay).collect();
    }
    let train = train_orders(&stages, &edges, count, &order)?;
    let eval = eval_orders(&stages, &edges, count, spec.eval_micro_batches)?;
    let shared = shared_params(dag, &stages);
    Ok(Placement {
        compnodes,
        stages,
        edges,
        shared,
        pipeline: spec.pipeline,
        train: PassPlan { micro_batches: spec.micro_batches, orders: train },
        eval: PassPlan { micro_batches: spec.eval_micro_batches, orders: eval },
    })
}

fn stage_edges(dag: &OpDag, stages: &[Stage], codec: Codec, batch: usize) -> Vec<StageEdge> {
    let stage_of: BTreeMap<OpId, StageId> =
        stages.iter().flat_map(|s| s.ops.iter().map(move |&op| (op, s.id))).collect();
    let mut edges = Vec::new();
    for op in dag.op_ids() {
        let from = stage_of[&op];
        let to: BTreeSet<StageId> = dag.consumers(op).iter().map(|c| stage_of[c]).filter(|&s| s != from).collect();
        let gradient = dag.carries_gradient(op);
        let is_real = dag.op(op).output.dtype == fusionllm_graph::DType::F32;
        let codec = if is_real { codec } else { Codec::Dense };
        edges.extend(to.into_iter().map(|to| (op, from, to, gradient, codec)));
    }
    edges
        .into_iter()
        .enumerate()
        .map(|(i, (op, from, to, gradient, codec))| StageEdge {
            id: EdgeId(i as u32),
            op,
            from,
            to,
            gradient,
            elements: dag.op(op).output.shape.elements(batch),
            activation_codec: codec,
            gradient_codec: codec,
        })
        .collect()
}

fn shared_params(dag: &OpDag, stages: &[Stage]) -> Vec<Shared> {
    let mut holders: BTreeMap<ParamId, BTreeSet<NodeIndex>> = BTreeMap::new();
    for stage in stages {
        for &op in &stage.ops {
            for &param in &dag.op(op).params {
                holders.entry(param).or_default().insert(stage.compnode);
            }
        }
    }
    holders
        .into_iter()
        // Of what is not trained, all copies stay alike.
        .filter(|(param, nodes)| nodes.len() > 1 && !dag.param(*param).frozen)
        .zip((0..).map(SharedId))
        .map(|((param, nodes), id)| Shared {
            id,
            params: vec![param],
            holders: nodes.into_iter().collect(),
            elements: dag.param(param).elements(),
            codec: Codec::Dense,
        })
        .collect()
}
