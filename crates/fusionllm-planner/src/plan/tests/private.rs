//! Private data: both ends of the model, blocks that are kept, organisations that are apart.

use fusionllm_graph::{Init, OpKind, Param, ResnetConfig, WeightLayout, resnet};

use super::*;
use crate::{StageSpec, kept_ops};

const STRATEGIES: [Strategy; 3] = [Strategy::EqualNumber, Strategy::EqualCompute, Strategy::OpFence];

fn private(strategy: Strategy, keep_blocks: [u32; 2]) -> PlanSpec {
    let mut spec = spec(strategy, 4);
    (spec.placement.private, spec.placement.keep_blocks) = (true, keep_blocks);
    spec
}

/// Machines of these organisations over free links, `-` being none; the first one owns the data, and is slow.
fn machines(orgs: &str) -> Cluster {
    let profile = |(at, org): (usize, char)| CompNodeProfile {
        org: (org != '-').then(|| org.to_string()),
        flop_per_s: if at == 0 { 1e6 } else { 1e7 },
        ..CompNodeProfile::unit(format!("{at}{org}"))
    };
    Cluster { compnodes: orgs.chars().enumerate().map(profile).collect(), links: Vec::new() }
}

/// The organisation of each stage.
fn orgs(plan: &Plan) -> String {
    let of = |stage: &Stage| plan.placement.compnodes[stage.compnode.index()].chars().nth(1);
    plan.placement.stages.iter().filter_map(of).collect()
}

/// Names of the ops that stay.
fn kept_names(dag: &OpDag, keep_blocks: [u32; 2]) -> Vec<&str> {
    let kept = kept_ops(dag, keep_blocks).unwrap();
    dag.ops().iter().zip(kept).filter(|(_, kept)| *kept).map(|(op, _)| op.name.as_str()).collect()
}

#[test]
fn what_is_outside_of_the_blocks_stays() {
    let dag = small_gpt2(3);
    assert_eq!(kept_names(&dag, [0, 0]), ["input", "label", "wte", "wpe", "ln_f", "lm_head", "loss"]);
    let kept = kept_names(&dag, [1, 1]);
    assert!(kept.contains(&"h.0.add_2") && !kept.iter().any(|name| name.starts_with("h.1.")));
    assert!(kept.contains(&"h.2.ln_1"));
    let resnet = resnet(&ResnetConfig::named("resnet18").unwrap()).unwrap();
    let kept = kept_names(&resnet, [1, 0]);
    for name in ["input", "conv1", "bn1", "layer1.0.conv1", "fc", "loss"] {
        assert!(kept.contains(&name), "{name} is not in {kept:?}");
    }
    assert!(!kept.iter().any(|name| name.starts_with("layer1.1.") || name.starts_with("layer4.1.")), "{kept:?}");
}

#[test]
fn a_model_without_blocks_keeps_what_reads_the_input_and_the_head_with_its_norm() {
    let mut builder = DagBuilder::new("plain");
    let ids = Shape::batched(&[4]);
    let input = builder.op("input", OpKind::Input { dtype: DType::I32, shape: ids.clone() }, &[], &[]).unwrap();
    let label = builder.op("label", OpKind::Label { shape: ids }, &[], &[]).unwrap();
    let param = |builder: &mut DagBuilder, name: &str, shape: Vec<usize>| {
        let init = Init::Normal { std: 0.02 };
        builder.param(Param { name: name.to_owned(), shape, init, decay: true, frozen: false }).unwrap()
    };
    let table = param(&mut builder, "table", vec![9, 8]);
    let mut last = builder.op("table", OpKind::Embedding { vocab: 9, dim: 8 }, &[input], &[table]).unwrap();
    let linear = |outputs| OpKind::Linear { inputs: 8, outputs, bias: false, layout: WeightLayout::InOut };
    for name in ["one", "two"] {
        let weight = param(&mut builder, name, vec![8, 8]);
        last = builder.op(name, linear(8), &[last], &[weight]).unwrap();
    }
    let [gain, shift] = ["gain", "shift"].map(|name| param(&mut builder, name, vec![8]));
    last = builder.op("norm", OpKind::LayerNorm { dim: 8, eps: 1e-5 }, &[last], &[gain, shift]).unwrap();
    let weight = param(&mut builder, "head", vec![8, 9]);
    last = builder.op("head", linear(9), &[last], &[weight]).unwrap();
    builder.op("loss", OpKind::CrossEntropy, &[last, label], &[]).unwrap();
    let dag = builder.build().unwrap();
    assert_eq!(kept_names(&dag, [0, 0]), ["input", "label", "table", "norm", "head", "loss"]);
    let error = kept_ops(&dag, [1, 0]).unwrap_err().to_string();
    assert!(error.contains("data.keep_blocks is [1, 0]") && error.contains("tell no blocks"), "{error}");
}

#[test]
fn a_block_is_left_for_others() {
    let dag = small_gpt2(3);
    for keep in [[2, 1], [3, 0], [0, 3], [9, 9]] {
        let error = plan(&dag, &machines("o--"), &private(Strategy::OpFence, keep)).unwrap_err().to_string();
        assert!(error.contains("the model has 3 blocks") && error.contains("keep at most 2 in all"), "{error}");
    }
    let error = kept_ops(&small_gpt2(1), [1, 0]).unwrap_err().to_string();
    assert!(error.contains("one block") && error.contains("leave it out"), "{error}");
}

#[test]
fn every_strategy_keeps_the_blocks_with_their_owner() {
    let dag = small_gpt2(5);
    for keep in [[0, 0], [1, 0], [0, 2], [2, 2]] {
        let kept = kept_ops(&dag, keep).unwrap();
        for strategy in STRATEGIES {
            let plan = plan(&dag, &machines("o--"), &private(strategy, keep)).unwrap();
            let others = plan.placement.stages.iter().filter(|stage| stage.compnode != NodeIndex(0));
            assert!(others.clone().count() > 0, "the owner is slow");
            assert!(others.flat_map(|stage| &stage.ops).all(|op| !kept[op.index()]), "{strategy:?} {keep:?}");
        }
    }
    let mut stages = private(Strategy::OpFence, [1, 0]);
    stages.placement.stages = [(0, "h.0.ln_1"), (1, "h.3.add_2"), (0, "loss")]
        .map(|(compnode, op)| StageSpec { compnode, last_op: op.to_owned() })
        .into();
    let error = plan(&dag, &machines("o-"), &stages).unwrap_err();
    assert!(matches!(&error, PlanError::Private { compnode: 1, op } if op.starts_with("h.0.")), "{error}");
}

#[test]
fn blocks_that_do_not_fit_the_owner_are_refused_with_the_numbers() {
    let dag = small_gpt2(5);
    let mut cluster = machines("o--");
    let needed = |keep| {
        let plan = plan(&dag, &machines("o--"), &private(Strategy::OpFence, keep)).unwrap();
        plan.prediction.compnodes[0].memory_bytes
    };
    cluster.compnodes[0].memory_bytes = (needed([0, 0]) * 1.5) as u64;
    plan(&dag, &cluster, &private(Strategy::OpFence, [0, 0])).unwrap();
    let error = plan(&dag, &cluster, &private(Strategy::OpFence, [2, 2])).unwrap_err();
    let PlanError::OwnerTooSmall { kept, needed_gb, memory_gb, .. } = &error else { panic!("{error}") };
    assert_eq!(*kept, kept_names(&dag, [2, 2]).len());
    assert!(needed_gb > memory_gb && error.to_string().contains("data.keep_blocks"), "{error}");
}

#[test]
fn every_strategy_keeps_organisations_apart() {
    let dag = small_gpt2(6);
    for (names, all) in [("oabaca", 6), ("oaabb-", 6), ("-aab", 4), ("oaaab", 5), ("ooaa-", 5)] {
        let cluster = machines(names);
        for strategy in STRATEGIES {
            let plan = match plan(&dag, &cluster, &private(strategy, [0, 0])) {
                Ok(plan) => plan,
                // A baseline uses everybody.
                Err(error) => {
                    assert!(
                        strategy != Strategy::OpFence && matches!(error, PlanError::Orgs { .. }),
                        "{names}: {error}"
                    );
                    continue;
                }
            };
            let stages = orgs(&plan);
            let owner = stages.chars().next().unwrap();
            let foreign = |org: char| org != owner && org != '-';
            let middle: Vec<char> = stages.chars().skip(1).take(stages.len() - 2).collect();
            assert!(middle.windows(2).all(|pair| pair[0] != pair[1] || !foreign(pair[0])), "{names}: {stages}");
            let (first, last) = (middle[0], middle[middle.len() - 1]);
            assert!(first != last || !foreign(first), "{names}: {stages}");
            assert!(strategy == Strategy::OpFence || plan.placement.compnodes.len() == all);
        }
    }
}

#[test]
fn organisations_that_cannot_be_kept_apart_are_refused_by_name() {
    let dag = small_gpt2(3);
    for strategy in STRATEGIES {
        let mut cluster = machines("oaa");
        // Alone it does not hold the model.
        let whole = plan(&dag, &machines("o"), &private(strategy, [0, 0])).unwrap();
        cluster.compnodes[0].memory_bytes = (whole.prediction.compnodes[0].memory_bytes * 0.8) as u64;
        let error = plan(&dag, &cluster, &private(strategy, [0, 0])).unwrap_err();
        assert!(matches!(&error, PlanError::Orgs { org, of_org: 2, others: 2 } if org == "a"), "{strategy:?}: {error}");
        let text = error.to_string();
        assert!(text.contains("let CompNodes of other organisations join"), "{text}");
        // In a job that is not private nothing of that counts.
        let mut public = private(strategy, [0, 0]);
        public.placement.private = false;
        plan(&dag, &machines("oaa"), &public).unwrap();
    }
}

#[test]
fn the_best_of_all_keeps_organisations_apart() {
    let dag = {
        let mut draw = Draw(3);
        random_dag(&mut draw, 12)
    };
    let plan = plan(&dag, &machines("oaab"), &private(Strategy::Optimal, [0, 0])).unwrap();
    let stages = orgs(&plan);
    assert!(!stages.contains("aa"), "{stages}");
}

#[test]
fn a_parameter_of_both_sides_is_refused_by_name() {
    let mut builder = DagBuilder::new("shared");
    let ids = Shape::batched(&[4]);
    let input = builder.op("input", OpKind::Input { dtype: DType::I32, shape: ids.clone() }, &[], &[]).unwrap();
    let label = builder.op("label", OpKind::Label { shape: ids }, &[], &[]).unwrap();
    let init = Init::Normal { std: 0.02 };
    let mut param = |name: &str, shape| {
        let param = Param { name: name.to_owned(), shape, init, decay: true, frozen: false };
        builder.param(param).unwrap()
    };
    let (table, square) = (param("table", vec![9, 8]), param("square", vec![8, 8]));
    let linear = |outputs| OpKind::Linear { inputs: 8, outputs, bias: false, layout: WeightLayout::InOut };
    let mut last = builder.op("table", OpKind::Embedding { vocab: 9, dim: 8 }, &[input], &[table]).unwrap();
    last = builder.op("first", linear(8), &[last], &[square]).unwrap();
    last = builder.op("last", linear(8), &[last], &[square]).unwrap();
    builder.op("loss", OpKind::CrossEntropy, &[last, label], &[]).unwrap();
    let error = kept_ops(&builder.build().unwrap(), [0, 0]).unwrap_err();
    assert!(matches!(&error, PlanError::KeptParam { param, .. } if param == "square"), "{error}");
}
