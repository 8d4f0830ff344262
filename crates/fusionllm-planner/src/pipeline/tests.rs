//! Textbook orders, and properties of all others.

use fusionllm_codec::Codec;
use fusionllm_graph::OpId;
use proptest::prelude::*;

use super::*;
use crate::EdgeId;
use crate::testing::chain;

/// An order as `F0 F1 B0 U`; with the stage if the CompNode holds several.
fn words(order: &[Task], with_stage: bool) -> String {
    let place = |stage: &StageId| if with_stage { format!("{}.", stage.0) } else { String::new() };
    let word = |task: &Task| match task {
        Task::Fp { stage, micro_batch } => format!("F{}{micro_batch}", place(stage)),
        Task::Bp { stage, micro_batch } => format!("B{}{micro_batch}", place(stage)),
        Task::Wg { stage, micro_batch } => format!("W{}{micro_batch}", place(stage)),
        Task::Update => "U".to_owned(),
    };
    order.iter().map(word).collect::<Vec<_>>().join(" ")
}

fn order_spec(pipeline: Pipeline, run_ahead: u32, micro_batches: u32) -> OrderSpec {
    OrderSpec { pipeline, run_ahead, shares: Shares::whole(micro_batches), delays: Vec::new() }
}

fn orders(pipeline: Pipeline, stages: u32, micro_batches: u32) -> Vec<String> {
    let (stages, edges) = chain(&(0..stages).collect::<Vec<_>>());
    let orders = train_orders(&stages, &edges, stages.len(), &order_spec(pipeline, 0, micro_batches)).unwrap();
    orders.iter().map(|o| words(o, false)).collect()
}

/// Narayanan et al., "Efficient large-scale language model training on GPU clusters", figure 4.
#[test]
fn one_f_one_b_is_the_textbooks() {
    assert_eq!(
        orders(Pipeline::OneFOneB, 4, 8),
        [
            "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7 U",
            "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7 U",
            "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7 U",
            "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 U",
        ]
    );
}

/// Huang et al., "GPipe", figure 2c: all FP, then all BP.
#[test]
fn gpipe_is_the_textbooks() {
    for order in orders(Pipeline::GPipe, 3, 4) {
        assert_eq!(order, "F0 F1 F2 F3 B0 B1 B2 B3 U");
    }
}

/// A first gradient that comes late finds as many micro-batches under way as may be.
#[test]
fn over_long_links_stages_run_ahead_as_far_as_they_may() {
    let (stages, edges) = chain(&[0, 1]);
    for (run_ahead, first) in [(0, "F0 F1 B0 F2 B1"), (2, "F0 F1 F2 F3 B0 F4 B1"), (9, "F0 F1 F2 F3 F4 F5 F6 F7 B0")] {
        let spec = OrderSpec { delays: vec![4], ..order_spec(Pipeline::OneFOneB, run_ahead, 8) };
        let orders = train_orders(&stages, &edges, 2, &spec).unwrap();
        assert!(words(&orders[0], false).starts_with(first), "{run_ahead}: {}", words(&orders[0], false));
        assert!(words(&orders[1], false).starts_with("F0 B0 F1 B1"));
    }
}

#[test]
fn one_stage_alternates() {
    assert_eq!(orders(Pipeline::OneFOneB, 1, 3), ["F0 B0 F1 B1 F2 B2 U"]);
}

#[test]
fn evaluation_has_no_backward_pass_and_no_update() {
    let (stages, edges) = chain(&[0, 1]);
    for order in eval_orders(&stages, &edges, 2, &Shares::whole(3)).unwrap() {
        assert_eq!(words(&order, false), "F0 F1 F2");
    }
}

#[test]
fn a_u_shape_interleaves_its_ends() {
    let (stages, edges) = chain(&[0, 1, 0]);
    let orders = train_orders(&stages, &edges, 2, &order_spec(Pipeline::OneFOneB, 0, 2)).unwrap();
    assert_eq!(words(&orders[0], true), "F0.0 F0.1 F2.0 B2.0 F2.1 B2.1 B0.0 B0.1 U");
    assert_eq!(words(&orders[1], false), "F0 F1 B0 B1 U");
}

#[test]
fn stages_that_wait_for_each_other_are_a_deadlock() {
    let (stages, mut edges) = chain(&[0, 1]);
    edges.push(StageEdge { id: EdgeId(1), from: StageId(1), to: StageId(0), ..edges[0].clone() });
    let error = train_orders(&stages, &edges, 2, &order_spec(Pipeline::OneFOneB, 0, 2)).unwrap_err();
    assert_eq!(error, PlanError::Deadlock);
}

/// Runs the orders as CompNodes would that may take any time for anything. Gives the most live micro-batches of each
/// stage, or nothing if they wait for each other for ever.
fn replay(edges: &[StageEdge], orders: &[Vec<Task>], stages: usize) -> Option<Vec<u32>> {
    let (mut fp_done, mut bp_done) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    let (mut live, mut most) = (vec![0i64; stages], vec![0u32; stages]);
    let mut next = vec![0; orders.len()];
    loop {
        let mut moved = false;
        for (node, order) in orders.iter().enumerate() {
            let Some(&task) = order.get(next[node]) else { continue };
            let ready = crate::is_ready(edges, task, |need| match need {
                Need::Activation { edge, micro_batch } => fp_done.contains(&(edges[edge.index()].from, micro_batch)),
                Need::Gradient { edge, micro_batch } => bp_done.contains(&(edges[edge.index()].to, micro_batch)),
                Need::Kept { stage, micro_batch } => fp_done.contains(&(stage, micro_batch)),
            });
            if !ready {
                continue;
            }
            match task {
                Task::Fp { stage, micro_batch } => {
                    assert!(fp_done.insert((stage, micro_batch)), "twice: {task:?}");
                    live[stage.index()] += 1;
                    most[stage.index()] = most[stage.index()].max(live[stage.index()] as u32);
                }
                Task::Bp { stage, micro_batch } => {
                    assert!(bp_done.insert((stage, micro_batch)), "twice: {task:?}");
                    live[stage.index()] -= 1;
                }
                Task::Wg { .. } => panic!("nothing was put off"),
                Task::Update => assert_eq!(next[node] + 1, order.len(), "UPDATE comes last"),
            }
            next[node] += 1;
            moved = true;
        }
        if next.iter().zip(orders).all(|(n, o)| *n == o.len()) {
            return Some(most);
        }
        if !moved {
            return None;
        }
    }
}

proptest! {
    /// Whatever CompNodes hold the stages of a chain (one may hold several, as in a U), with skip edges.
    #[test]
    fn every_order_can_be_completed_within_its_bound(
        nodes in prop::collection::vec(0u32..4, 1..8),
        skips in prop::collection::vec((0usize..8, 0usize..8), 0..4),
        micro_batches in 1u32..7,
        gpipe in any::<bool>(),
        run_ahead in 0u32..4,
        delays in prop::collection::vec(0u64..9, 0..8),
    ) {
        let (stages, mut edges) = chain(&nodes);
        for (a, b) in skips {
            let (from, to) = (a.min(b) % nodes.len(), a.max(b) % nodes.len());
            if from < to {
                edges.push(StageEdge {
                    elements: 1,
                    id: EdgeId(edges.len() as u32),
                    op: OpId(from as u32),
                    from: StageId(from as u32),
                    to: StageId(to as u32),
                    gradient: true,
                    activation_codec: Codec::Dense,
                    gradient_codec: Codec::Dense,
                });
            }
        }
        let pipeline = if gpipe { Pipeline::GPipe } else { Pipeline::OneFOneB };
        let spec = OrderSpec { delays, ..order_spec(pipeline, run_ahead, micro_batches) };
        let orders = train_orders(&stages, &edges, 4, &spec).unwrap();
        let tasks: usize = orders.iter().map(Vec::len).sum();
        prop_assert_eq!(tasks, stages.len() * micro_batches as usize * 2 + 4);
        let most = replay(&edges, &orders, stages.len()).expect("completes");
        for (stage, live) in stages.iter().zip(most) {
            prop_assert!(live <= in_flight_limit(pipeline, run_ahead, stages.len() - stage.id.index(), micro_batches));
        }
        let eval = eval_orders(&stages, &edges, 4, &Shares::whole(micro_batches)).unwrap();
        prop_assert!(replay(&edges, &eval, stages.len()).is_some());
    }
}
