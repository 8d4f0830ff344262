//! From segments to a placement: its edges, its shared parameters, its task orders.

use std::collections::{BTreeMap, BTreeSet};

use fusionllm_codec::Codec;
use fusionllm_graph::{OpDag, OpId, ParamId};

use crate::pipeline::{OrderSpec, Shares, eval_orders, train_orders};
use crate::placement::by_group;
use crate::{
    Cluster, EdgeId, GroupId, NodeIndex, PassPlan, Placement, PlacementSpec, PlanError, Segment, Shared, SharedId,
    Stage, StageEdge, StageId,
};

/// A group in the making.
#[derive(Clone, Debug)]
struct GroupSpec {
    /// Its segments along its pipeline.
    segments: Vec<Segment>,
    /// Its micro-batches of a training step, ascending.
    train: Vec<u32>,
    /// Its micro-batches of an evaluation, ascending.
    eval: Vec<u32>,
}

/// The placement of given segments on the CompNodes of a cluster, with its edges and task orders, as one group. FP and BP
/// of a micro-batch take `stage_s` seconds, which matters where links have latency.
pub(crate) fn assemble(
    dag: &OpDag,
    cluster: &Cluster,
    segments: Vec<Segment>,
    spec: &PlacementSpec,
    stage_s: f64,
) -> Result<Placement, PlanError> {
    let all = |micro_batches: u32| (0..micro_batches).collect();
    let group = GroupSpec { segments, train: all(spec.micro_batches), eval: all(spec.eval_micro_batches) };
    assemble_groups(dag, cluster, vec![group], spec, stage_s)
}

/// As [`assemble`], of several groups, which share the micro-batches that `spec` has.
///
/// # Errors
/// [`PlanError::NotWhole`] if one of them does not hold the whole OP-DAG, and as the task orders.
fn assemble_groups(
    dag: &OpDag,
    cluster: &Cluster,
    groups: Vec<GroupSpec>,
    spec: &PlacementSpec,
    stage_s: f64,
) -> Result<Placement, PlanError> {
    let compnodes: Vec<String> = cluster.compnodes.iter().map(|c| c.name.clone()).collect();
    let (mut stages, mut train_shares, mut eval_shares) = (Vec::new(), Shares::default(), Shares::default());
    for (group, own) in (0..).map(GroupId).zip(groups) {
        train_shares.push(own.train);
        eval_shares.push(own.eval);
        for segment in own.segments {
            let (id, ops) = (StageId(stages.len() as u32), segment.ops.map(|op| OpId(op as u32)).collect());
            stages.push(Stage { id, group, compnode: segment.compnode, ops });
        }
    }
    let edges = stage_edges(dag, &stages, spec.codec, spec.micro_batch_size as usize)?;
    let count = compnodes.len();
    let (run_ahead, delays) = (spec.run_ahead.unwrap_or(0), Vec::new());
    let mut order = OrderSpec { pipeline: spec.pipeline, run_ahead, shares: train_shares, delays };
    if run_ahead > 0 {
        let node = |stage: StageId| stages[stage.index()].compnode.index();
        let latency_s = |a: usize, b: usize| cluster.link(a, b).latency_s.max(cluster.link(b, a).latency_s);
        let delay = |e: &StageEdge| order.delay(latency_s(node(e.from), node(e.to)), stage_s);
        order.delays = edges.iter().map(delay).collect();
    }
    let train = train_orders(&stages, &edges, count, &order)?;
    let eval = eval_orders(&stages, &edges, count, &eval_shares)?;
    let shared = shared_params(dag, &stages);
    let recomputing = (0..).map(NodeIndex).zip(&cluster.compnodes).filter(|(_, c)| c.recompute).map(|(node, _)| node);
    Ok(Placement {
        compnodes,
        stages,
        edges,
        shared,
        pipeline: spec.pipeline,
        recompute: recomputing.collect(),
        train: PassPlan { micro_batches: spec.micro_batches, orders: train },
        eval: PassPlan { micro_batches: spec.eval_micro_batches, orders: eval },
    })
}

/// The stage of a group that holds each op.
fn stage_of(dag: &OpDag, group: &[Stage]) -> Result<Vec<StageId>, PlanError> {
    let mut held = vec![(StageId(0), 0); dag.ops().len()];
    for stage in group {
        for op in &stage.ops {
            let (at, times) = &mut held[op.index()];
            (*at, *times) = (stage.id, *times + 1);
        }
    }
    if let Some((op, &(_, times))) = dag.ops().iter().zip(&held).find(|(_, (_, times))| *times != 1) {
        let group = group.first().map_or(GroupId::FIRST, |stage| stage.group);
        return Err(PlanError::NotWhole { group, op: op.name.clone(), times });
    }
    Ok(held.into_iter().map(|(stage, _)| stage).collect())
}

/// What flows between the stages of each group; nothing does between groups.
fn stage_edges(dag: &OpDag, stages: &[Stage], codec: Codec, batch: usize) -> Result<Vec<StageEdge>, PlanError> {
    let mut edges = Vec::new();
    for group in by_group(stages) {
        let stage_of = stage_of(dag, group)?;
        for op in dag.op_ids() {
            let from = stage_of[op.index()];
            let to = dag.consumers(op).iter().map(|c| stage_of[c.index()]).filter(|&s| s != from);
            let to: BTreeSet<StageId> = to.collect();
            let gradient = dag.carries_gradient(op);
            let is_real = dag.op(op).output.dtype == fusionllm_graph::DType::F32;
            let codec = if is_real { codec } else { Codec::Dense };
            edges.extend(to.into_iter().map(|to| (op, from, to, gradient, codec)));
        }
    }
    let edges = edges
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
        .collect();
    Ok(edges)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::small_gpt2;
    use crate::{Deferrable, FpBp, Pipeline, StepCosts, Strategy, Task, Ways, simulate};

    const MICRO_BATCHES: u32 = 8;

    fn spec(pipeline: Pipeline) -> PlacementSpec {
        PlacementSpec {
            strategy: Strategy::EqualNumber,
            stages: Vec::new(),
            pipeline,
            run_ahead: Some(0),
            deferred: Some(0),
            micro_batches: MICRO_BATCHES,
            micro_batch_size: 2,
            eval_micro_batches: 3,
            private: false,
            keep_blocks: [0; 2],
            codec: Codec::Dense,
        }
    }

    fn segment(node: u32, ops: std::ops::Range<usize>) -> Segment {
        Segment { compnode: NodeIndex(node), ops }
    }

    /// Two groups with half of the micro-batches each: the placeholders of both are with the data owner. The first goes on
    /// over CompNode 1 and ends at 2, the second has all else at 3. The first one evaluates.
    fn two_groups(dag: &OpDag, pipeline: Pipeline) -> Placement {
        let end = dag.ops().len();
        let of = |first: u32| (first..MICRO_BATCHES).step_by(2).collect::<Vec<u32>>();
        let first = [segment(0, 0..5), segment(1, 5..9), segment(2, 9..end)];
        let second = [segment(0, 0..2), segment(3, 2..end)];
        let groups = vec![
            GroupSpec { segments: first.to_vec(), train: of(0), eval: vec![0, 1, 2] },
            GroupSpec { segments: second.to_vec(), train: of(1), eval: Vec::new() },
        ];
        assemble_groups(dag, &Cluster::uniform(4), groups, &spec(pipeline), 1.0).unwrap()
    }

    #[test]
    fn a_group_is_a_whole_pipeline_on_its_own_micro_batches() {
        let dag = small_gpt2(1);
        for pipeline in [Pipeline::OneFOneB, Pipeline::GPipe] {
            let placement = two_groups(&dag, pipeline);
            let groups: Vec<_> = placement.groups().collect();
            let shape = |g: &crate::Group<'_>| (g.id, g.stages.len(), g.micro_batches.clone());
            let expected = [(GroupId(0), 3, vec![0, 2, 4, 6]), (GroupId(1), 2, vec![1, 3, 5, 7])];
            assert_eq!(groups.iter().map(shape).collect::<Vec<_>>(), expected);

            // Each has the edges that it would have alone, and none leads from one to the other.
            for (group, place) in groups.iter().zip(0..) {
                let range = |s: &Stage| segment(s.compnode.0, s.ops[0].index()..s.ops[s.ops.len() - 1].index() + 1);
                let segments = group.stages.iter().map(range).collect();
                let alone = assemble(&dag, &Cluster::uniform(4), segments, &spec(pipeline), 1.0).unwrap();
                let first = group.stages[0].id.0;
                let own = placement.edges.iter().filter(|e| placement.stages[e.from.index()].group == group.id);
                let ends = |e: &StageEdge, first: u32| (e.op, e.from.0 - first, e.to.0 - first, e.gradient, e.elements);
                let own: Vec<_> = own.map(|e| ends(e, first)).collect();
                assert_eq!(own, alone.edges.iter().map(|e| ends(e, 0)).collect::<Vec<_>>(), "group {place}");
                // And of its micro-batches no more are live than if the step had no others.
                for stage in group.stages {
                    let from_end = group.stages.len() as u32 - (stage.id.0 - first);
                    let most = if pipeline == Pipeline::GPipe { 4 } else { from_end };
                    let live = placement.live_bound(stage.compnode)[&stage.id];
                    assert!((1..=most).contains(&live), "{pipeline:?} {}: {live} of {most}", stage.id);
                }
            }
            assert!(placement.edges.iter().zip(0..).all(|(edge, id)| edge.id == EdgeId(id)));
            assert!(
                placement
                    .edges
                    .iter()
                    .all(|e| { placement.stages[e.from.index()].group == placement.stages[e.to.index()].group })
            );
        }
    }

    #[test]
    fn the_orders_of_groups_can_be_completed_and_have_each_its_own_tasks() {
        let dag = small_gpt2(1);
        for pipeline in [Pipeline::OneFOneB, Pipeline::GPipe] {
            let placement = two_groups(&dag, pipeline);
            for group in placement.groups() {
                for stage in group.stages {
                    let order = &placement.train.orders[stage.compnode.index()];
                    let own = |wanted: fn(&Task) -> Option<(StageId, u32)>| {
                        let own = order.iter().filter_map(wanted).filter(|(id, _)| *id == stage.id);
                        own.map(|(_, micro_batch)| micro_batch).collect::<Vec<_>>()
                    };
                    let fp = own(|task| match *task {
                        Task::Fp { stage, micro_batch } => Some((stage, micro_batch)),
                        _ => None,
                    });
                    let bp = own(|task| match *task {
                        Task::Bp { stage, micro_batch } => Some((stage, micro_batch)),
                        _ => None,
                    });
                    assert_eq!((&fp, &bp), (&group.micro_batches, &group.micro_batches), "{pipeline:?} {}", stage.id);
                    let evaluated = if group.id == GroupId::FIRST { vec![0, 1, 2] } else { Vec::new() };
                    assert_eq!(placement.eval.micro_batches_of(stage), evaluated);
                }
            }
            assert!(placement.train.orders.iter().all(|order| order.last() == Some(&Task::Update)));
            // The data owner has the begin of both, and none waits until the other is done.
            let begins = placement.train.orders[0].iter().filter_map(|task| match *task {
                Task::Fp { stage, .. } => Some(placement.stages[stage.index()].group.0),
                _ => None,
            });
            assert_eq!(begins.take(6).collect::<BTreeSet<u32>>(), BTreeSet::from([0, 1]), "{pipeline:?}");

            let stages = placement.stages.len();
            let costs = StepCosts {
                stage_s: vec![FpBp { fp_s: 1.0, bp_s: 2.0 }; stages],
                deferrable: vec![Deferrable::default(); stages],
                edge_bytes: vec![Ways { activation: 1.0, gradient: 1.0 }; placement.edges.len()],
                codec_s: vec![Ways::default(); placement.edges.len()],
                update_s: vec![0.5; 4],
                shared_bytes: vec![vec![1.0; 4]; placement.shared.len()],
                clip: true,
            };
            let simulated = simulate(&placement, &Cluster::uniform(4), &costs).unwrap();
            let tasks = placement.train.orders.iter().map(Vec::len).sum::<usize>();
            assert_eq!(simulated.spans.len(), tasks, "{pipeline:?}");
            assert_eq!(tasks, 2 * 4 * stages + 4);
        }
    }

    #[test]
    fn groups_share_every_parameter_that_is_trained() {
        let dag = small_gpt2(1);
        let placement = two_groups(&dag, Pipeline::OneFOneB);
        let shared: Vec<_> = placement.shared.iter().flat_map(|shared| shared.params.clone()).collect();
        let all: Vec<ParamId> = (0..dag.params().len()).map(|index| ParamId(index as u32)).collect();
        assert_eq!(shared, all);
        for shared in &placement.shared {
            let holds = |node: &NodeIndex| placement.params_of(&dag, *node).contains(&shared.params[0]);
            assert_eq!(shared.holders, placement.nodes().filter(holds).collect::<Vec<_>>());
            assert_eq!(placement.shared(shared.id), Some(shared));
        }
        // What each computes of the loss is what it weighs in the step's.
        let loss = dag.loss().unwrap();
        let times = |pass| placement.nodes().map(|node| placement.times(pass, node, loss)).collect::<Vec<_>>();
        assert_eq!((times(&placement.train), times(&placement.eval)), (vec![0, 0, 4, 4], vec![0, 0, 3, 0]));
    }

    #[test]
    fn a_group_that_holds_an_op_twice_or_not_at_all_is_refused() {
        let dag = small_gpt2(1);
        let end = dag.ops().len();
        let refusal = |segments: &[Segment]| {
            let whole = GroupSpec { segments: vec![segment(0, 0..end)], train: vec![0], eval: vec![0] };
            let other = GroupSpec { segments: segments.to_vec(), train: vec![1], eval: Vec::new() };
            let spec = spec(Pipeline::OneFOneB);
            assemble_groups(&dag, &Cluster::uniform(2), vec![whole, other], &spec, 1.0).unwrap_err().to_string()
        };
        let name = &dag.ops()[4].name;
        let twice = refusal(&[segment(0, 0..5), segment(1, 4..end)]);
        assert!(twice.starts_with(&format!("group 1 holds op `{name}` 2 times, expected once")), "{twice}");
        let missing = refusal(&[segment(0, 0..4), segment(1, 5..end)]);
        assert!(missing.starts_with(&format!("group 1 holds op `{name}` 0 times, expected once")), "{missing}");
    }
}
