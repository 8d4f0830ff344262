//! Cuts of real graphs, and properties of all cuts.

use fusionllm_graph::OpClass;
use proptest::prelude::*;

use super::*;
use crate::testing::small_gpt2 as dag;
use crate::{CompNodeProfile, Strategy};

fn cluster(speeds: &[f64]) -> Cluster {
    let profile = |(i, &flop_per_s)| CompNodeProfile { flop_per_s, ..CompNodeProfile::unit(format!("n{i}")) };
    Cluster { compnodes: speeds.iter().enumerate().map(profile).collect(), links: Vec::new() }
}

fn try_cut(dag: &OpDag, cluster: &Cluster, strategy: Strategy, private: bool) -> Result<Vec<Segment>, PlanError> {
    in_order(dag, cluster, strategy == Strategy::EqualNumber, &[], &Pins::of(dag, private, [0; 2])?, 2)
}

fn cut(strategy: Strategy, speeds: &[f64], private: bool) -> Vec<Segment> {
    try_cut(&dag(2), &cluster(speeds), strategy, private).unwrap()
}

fn stage(compnode: u32, last_op: &str) -> StageSpec {
    StageSpec { compnode, last_op: last_op.to_owned() }
}

fn explicit(compnodes: usize, stages: &[StageSpec], private: bool) -> Result<Vec<Segment>, PlanError> {
    let dag = dag(2);
    in_order(&dag, &Cluster::uniform(compnodes), false, stages, &Pins::of(&dag, private, [0; 2])?, 2)
}

/// FP and BP of a segment's ops over the CompNode's speed.
fn times(dag: &OpDag, segments: &[Segment], speeds: &[f64]) -> Vec<f64> {
    let mut times = vec![0.0; speeds.len()];
    for segment in segments {
        for op in segment.ops.clone() {
            let cost = dag.cost(fusionllm_graph::OpId(op as u32), 2);
            times[segment.compnode.index()] +=
                (cost.fp_flops + cost.bp_flops) as f64 / speeds[segment.compnode.index()];
        }
    }
    times
}

fn slowest(times: &[f64]) -> f64 {
    times.iter().copied().fold(0.0, f64::max)
}

#[test]
fn equal_number_gives_equal_numbers() {
    let segments = cut(Strategy::EqualNumber, &[1.0, 9.0, 1.0], false);
    let counts: Vec<usize> = segments.iter().map(|s| s.ops.len()).collect();
    assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
}

#[test]
fn equal_compute_follows_the_speeds() {
    let dag = dag(6);
    let speeds = [1.0, 4.0, 2.0];
    let segments = try_cut(&dag, &cluster(&speeds), Strategy::EqualCompute, false).unwrap();
    let times = times(&dag, &segments, &speeds);
    let mean = times.iter().sum::<f64>() / 3.0;
    assert!(slowest(&times) < 1.3 * mean, "{times:?}");
}

#[test]
fn private_data_makes_a_u() {
    let dag = dag(2);
    let segments = cut(Strategy::EqualCompute, &[1.0, 1.0, 1.0], true);
    let nodes: Vec<u32> = segments.iter().map(|s| s.compnode.0).collect();
    assert_eq!(nodes, [0, 1, 2, 0]);
    for segment in &segments[1..3] {
        for op in &dag.ops()[segment.ops.clone()] {
            assert_ne!(op.kind.class(), OpClass::Placeholder);
            assert!(op.name.starts_with("h."), "`{}` is no part of a block", op.name);
        }
    }
}

#[test]
fn more_compnodes_than_ops_is_an_error_that_says_how_many() {
    let ops = dag(2).ops().len();
    let cut = |count| try_cut(&dag(2), &Cluster::uniform(count), Strategy::EqualCompute, false);
    let error = cut(ops + 5).unwrap_err();
    let PlanError::MoreCompNodesThanOps { compnodes, ops: most } = error else { panic!("{error}") };
    assert_eq!(compnodes, ops + 5);
    assert!(cut(most).is_ok());
    assert!(cut(most + 1).is_err());
}

#[test]
fn explicit_stages_are_taken_as_they_are() {
    let dag = dag(2);
    let segments = explicit(2, &[stage(0, "h.0.attn"), stage(1, "ln_f"), stage(0, "loss")], false).unwrap();
    let ends: Vec<&str> = segments.iter().map(|s| dag.ops()[s.ops.end - 1].name.as_str()).collect();
    assert_eq!(ends, ["h.0.attn", "ln_f", "loss"]);
    assert_eq!(segments.iter().map(|s| s.compnode.0).collect::<Vec<_>>(), [0, 1, 0]);
}

#[test]
fn explicit_stages_that_do_not_fit_are_named() {
    let error = |compnodes, stages: &[StageSpec]| explicit(compnodes, stages, false).unwrap_err().to_string();
    assert_eq!(
        error(2, &[stage(0, "wpe"), stage(2, "loss")]),
        "placement.stages[1]: CompNode 2 does not exist, the job has 2"
    );
    assert_eq!(error(1, &[stage(0, "h.9.attn")]), "placement.stages[0]: no op is named `h.9.attn`");
    assert_eq!(
        error(2, &[stage(0, "ln_f"), stage(1, "wpe")]),
        "placement.stages[1]: op `wpe` comes before the end of the stage before it"
    );
    assert_eq!(error(1, &[stage(0, "ln_f")]), "placement.stages[0]: the last stage must end with the last op, `loss`");
    assert_eq!(
        error(2, &[stage(0, "loss")]),
        "placement.stages[0]: CompNode 1 gets no stage, every CompNode needs one"
    );
    let private = explicit(2, &[stage(0, "wpe"), stage(1, "loss")], true).unwrap_err();
    assert!(matches!(private, PlanError::Private { compnode: 1, .. }), "{private}");
}

#[test]
fn bad_clusters_are_named() {
    let error = |cluster: &Cluster| cluster.validate().unwrap_err().to_string();
    assert_eq!(error(&Cluster::default()), "no CompNode to place the job on, expected at least one");
    assert_eq!(error(&cluster(&[1.0, f64::NAN])), "CompNode `n1` has flop_per_s NaN, expected a positive number");
}

#[test]
fn an_unknown_strategy_lists_the_known_ones() {
    let error = Strategy::from_name("fastest").unwrap_err().to_string();
    assert!(error.contains("`fastest`") && error.contains("`equal-compute`"), "{error}");
}

/// The best of all contiguous cuts, by trying them.
fn best_by_search(weights: &[f64], speeds: &[f64]) -> f64 {
    let Some((speed, rest)) = speeds.split_first() else { return f64::INFINITY };
    if rest.is_empty() {
        return weights.iter().sum::<f64>() / speed;
    }
    let most = weights.len() - rest.len();
    let with = |count: usize| {
        let own = weights[..count].iter().sum::<f64>() / speed;
        own.max(best_by_search(&weights[count..], rest))
    };
    (1..=most).map(with).fold(f64::INFINITY, f64::min)
}

proptest! {
    #[test]
    fn each_op_is_held_once_and_pins_stay(
        n_layer in 1usize..4,
        speeds in prop::collection::vec(0.1f64..10.0, 1..7),
        private in any::<bool>(),
        by_number in any::<bool>(),
    ) {
        let dag = dag(n_layer);
        let strategy = if by_number { Strategy::EqualNumber } else { Strategy::EqualCompute };
        let segments = try_cut(&dag, &cluster(&speeds), strategy, private).unwrap();
        let held: Vec<usize> = segments.iter().flat_map(|s| s.ops.clone()).collect();
        prop_assert_eq!(held, (0..dag.ops().len()).collect::<Vec<_>>());
        for node in 0..speeds.len() {
            prop_assert!(segments.iter().any(|s| s.compnode.index() == node));
        }
        let pins = pins::Pins::of(&dag, private, [0; 2]).unwrap();
        for segment in &segments {
            let is_owner = segment.compnode.index() == 0;
            prop_assert!(is_owner || segment.ops.clone().all(|op| !pins.pinned[op]));
        }
    }

    #[test]
    fn the_balance_is_the_best_there_is(
        weights in prop::collection::vec(0.0f64..10.0, 5..10),
        speeds in prop::collection::vec(0.1f64..4.0, 2..5),
    ) {
        let pins = pins::Pins { head: 0, tail: weights.len(), pinned: vec![false; weights.len()] };
        let segments = balance::segments(&weights, &speeds, &pins).unwrap();
        let got = segments
            .iter()
            .map(|s| weights[s.ops.clone()].iter().sum::<f64>() / speeds[s.compnode.index()])
            .fold(0.0, f64::max);
        let best = best_by_search(&weights, &speeds);
        prop_assert!((got - best).abs() <= 1e-9 * best.max(1.0), "{} against {}", got, best);
    }
}
