//! Several pipelines that train one model, each on its own micro-batches.

use fusionllm_codec::Codec;
use fusionllm_graph::{OpDag, Param, ParamId};
use fusionllm_planner::{
    Cluster, EdgeId, GroupId, NodeIndex, Placement, Shared, SharedId, Stage, StageId, Task, place,
};
use fusionllm_protocol::JobSpec;

use crate::run::{Outcome, Run, assert_close, job, small_gpt2, stages};

const TRAIN: &str = "steps = 12\nbatch = 8\nmicro_batches = 4\nlr = 1e-2\nwarmup = 3\nclip = 1.0\neval_every = 6\n\
                     eval_batches = 2\nseed = 3";

/// A placement of one group with half of the job's micro-batches.
fn half(dag: &OpDag, spec: &JobSpec, list: &[(u32, &str)]) -> Placement {
    let mut spec = spec.placement_spec();
    spec.stages = stages(list);
    spec.micro_batches /= 2;
    (spec.run_ahead, spec.deferred) = (Some(0), Some(0));
    place(dag, &Cluster::uniform(2), &spec).unwrap()
}

/// The stage, node and micro-batch that a task of the second group has beside the first: it has the odd ones.
fn beside(task: Task, stages: u32) -> Option<Task> {
    let stage = |stage: StageId| StageId(stage.0 + stages);
    match task {
        Task::Fp { stage: id, micro_batch } => Some(Task::Fp { stage: stage(id), micro_batch: 2 * micro_batch + 1 }),
        Task::Bp { stage: id, micro_batch } => Some(Task::Bp { stage: stage(id), micro_batch: 2 * micro_batch + 1 }),
        Task::Wg { .. } | Task::Update => None,
    }
}

/// Two groups: one on CompNodes 0 and 1, one of which CompNode 0 has the placeholders, and 2 all else.
fn two_groups(dag: &OpDag, spec: &JobSpec) -> Placement {
    let first = half(dag, spec, &[(0, "h.1.add_2"), (1, "loss")]);
    let second = half(dag, spec, &[(0, "label"), (1, "loss")]);
    let (count, edges) = (first.stages.len() as u32, first.edges.len() as u32);
    let node = |node: NodeIndex| if node == NodeIndex(1) { NodeIndex(2) } else { node };
    let mut both = first.clone();
    both.compnodes.push("compnode-2".to_owned());
    both.stages.extend(second.stages.iter().map(|s| Stage {
        id: StageId(s.id.0 + count),
        group: GroupId(1),
        compnode: node(s.compnode),
        ops: s.ops.clone(),
    }));
    both.edges.extend(second.edges.iter().cloned().map(|mut edge| {
        edge.id = EdgeId(edge.id.0 + edges);
        (edge.from, edge.to) = (StageId(edge.from.0 + count), StageId(edge.to.0 + count));
        edge
    }));
    let evens = |task: &mut Task| match task {
        Task::Fp { micro_batch, .. } | Task::Bp { micro_batch, .. } => *micro_batch *= 2,
        Task::Wg { .. } | Task::Update => {}
    };
    both.train.micro_batches *= 2;
    both.train.orders.iter_mut().flatten().for_each(evens);
    let [owner, other] = [0, 1].map(|n: usize| second.train.orders[n].iter().filter_map(|&t| beside(t, count)));
    // The placeholders wait for nobody.
    let owner: Vec<Task> = owner.chain(both.train.orders[0].iter().copied()).collect();
    both.train.orders[0] = owner;
    both.train.orders.push(other.chain([Task::Update]).collect());
    both.eval.orders.push(Vec::new());
    let params = (0..dag.params().len() as u32).map(ParamId);
    let held = params.map(|param| (param, both.nodes().filter(|&n| both.params_of(dag, n).contains(&param)).collect()));
    let shared = held.zip((0..).map(SharedId)).map(|((param, holders), id): ((ParamId, Vec<NodeIndex>), SharedId)| {
        let elements = dag.param(param).elements();
        Shared { id, params: vec![param], holders, elements, codec: Codec::Dense }
    });
    both.shared = shared.collect();
    both
}

fn assert_copies_are_equal(dag: &OpDag, outcome: &Outcome, step: u64) {
    let last = outcome.checkpoint(step);
    for Param { name, .. } in dag.params() {
        let copies: Vec<_> = last.iter().filter(|tensor| tensor.name == *name).collect();
        assert!(copies.len() > 1, "{name}");
        assert!(copies.iter().all(|copy| copy.values == copies[0].values), "the copies of {name} drifted apart");
    }
}

/// Each adds up the gradients of its own micro-batches, and all of them together, so that nothing differs but the order of
/// sums.
#[test]
fn two_groups_train_as_one_process_does() {
    let (dag, spec) = (small_gpt2(0.0), job(TRAIN));
    let one = Run::new(dag.clone(), spec.clone(), 1).synthetic();
    let mut run = Run::new(dag.clone(), spec.clone(), 1);
    run.placement = two_groups(&dag, &spec);
    let groups: Vec<_> = run.placement.groups().map(|group| group.micro_batches).collect();
    assert_eq!(groups, [vec![0, 2], vec![1, 3]]);
    let both = run.synthetic();
    let losses = |node: usize| both.logs[node].reports.iter().filter_map(|report| report.loss).collect::<Vec<f64>>();
    let mean: Vec<f64> = losses(1).iter().zip(losses(2)).map(|(a, b)| (a + b) / 2.0).collect();
    assert_close("losses", &mean, &one.losses(), 1e-5);
    assert_close("norms", &both.norms(), &one.norms(), 1e-4);
    assert_close("evaluation by the first group", &both.eval_losses(), &one.eval_losses(), 1e-5);
    assert_copies_are_equal(&dag, &both, 12);
}

/// All that the two have in common may travel as one vector for each set of holders.
#[test]
fn groups_share_all_of_a_stage_as_one_vector() {
    let (dag, spec) = (small_gpt2(0.0), job(TRAIN));
    let run = |placement: Placement| {
        let mut run = Run::new(dag.clone(), spec.clone(), 1);
        run.placement = placement;
        run.synthetic()
    };
    let apart = two_groups(&dag, &spec);
    let mut together = apart.clone();
    together.shared.clear();
    for one in &apart.shared {
        match together.shared.iter_mut().find(|shared| shared.holders == one.holders) {
            Some(shared) => {
                shared.params.extend(&one.params);
                shared.elements += one.elements;
            }
            None => together.shared.push(Shared { id: SharedId(together.shared.len() as u32), ..one.clone() }),
        }
    }
    assert_eq!(together.shared.len(), 3, "held by 0 and 2, by 1 and 2, and by all");
    let (apart, exact) = (run(apart), run(together.clone()));
    let bits = |outcome: &Outcome| outcome.losses().into_iter().map(f64::to_bits).collect::<Vec<u64>>();
    assert_eq!(bits(&exact), bits(&apart));
    together.shared.iter_mut().for_each(|shared| shared.codec = Codec::Int8);
    let coarse = run(together);
    assert_close("int8", &coarse.losses(), &apart.losses(), 0.02);
    assert_copies_are_equal(&dag, &coarse, 12);
}
