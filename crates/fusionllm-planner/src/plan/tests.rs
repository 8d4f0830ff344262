//! OP-Fence against the baselines and against the best there is, on random clusters and graphs.

mod private;

use fusionllm_codec::{Codec, TopKValues};
use fusionllm_graph::{DType, DagBuilder, Init, Lora, OpKind, Param, Shape, WeightLayout};

use super::*;
use crate::testing::small_gpt2;
use crate::{ClusterFile, CompNodeProfile, DeviceEntry, LinkEntry, LinkProfile, Pipeline, Task, compare};

/// A small generator, so that a failing seed can be run again.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    fn pick(&mut self, from: &[f64]) -> f64 {
        from[self.below(from.len())]
    }
}

/// An OP-DAG of about `ops` ops: linear ops of random widths, skips over several of them, and branches that join.
fn random_dag(draw: &mut Draw, ops: usize) -> OpDag {
    const WIDTHS: [usize; 3] = [32, 128, 512];
    let mut dag = DagBuilder::new("random");
    let shape = Shape::batched(&[4, 32]);
    let input = dag.op("input", OpKind::Input { dtype: DType::F32, shape }, &[], &[]).unwrap();
    let mut made = vec![(input, 32)];
    let linear = |dag: &mut DagBuilder, from: (fusionllm_graph::OpId, usize), outputs: usize, name: String| {
        let (shape, init) = (vec![from.1, outputs], Init::Normal { std: 0.02 });
        let weight =
            dag.param(Param { name: format!("{name}.weight"), shape, init, decay: true, frozen: false }).unwrap();
        let kind = OpKind::Linear { inputs: from.1, outputs, bias: false, layout: WeightLayout::InOut };
        (dag.op(&name, kind, &[from.0], &[weight]).unwrap(), outputs)
    };
    while made.len() < ops {
        let (last, index) = (made[made.len() - 1], made.len());
        let skip = made.iter().rev().skip(1).find(|(_, width)| *width == last.1).copied();
        match (draw.below(4), skip) {
            (0, Some(skip)) => {
                made.push((dag.op(&format!("add{index}"), OpKind::Add, &[last.0, skip.0], &[]).unwrap(), last.1))
            }
            (1, _) => {
                let width = WIDTHS[draw.below(3)];
                let one = linear(&mut dag, last, width, format!("left{index}"));
                let two = linear(&mut dag, last, width, format!("right{index}"));
                made.extend([one, two]);
                made.push((dag.op(&format!("join{index}"), OpKind::Add, &[one.0, two.0], &[]).unwrap(), width));
            }
            _ => made.push(linear(&mut dag, last, WIDTHS[draw.below(3)], format!("linear{index}"))),
        }
    }
    dag.build().unwrap()
}

/// Up to `most` devices at up to three sites, from data-centre to home links.
fn random_cluster(draw: &mut Draw, most: usize) -> Cluster {
    let count = 1 + draw.below(most);
    let site: Vec<usize> = (0..count).map(|_| draw.below(3)).collect();
    let between: Vec<f64> = (0..9).map(|_| draw.pick(&[1e6, 1e7, 1.25e8])).collect();
    let compnodes = (0..count)
        .map(|i| CompNodeProfile { flop_per_s: draw.pick(&[1e7, 3e7, 1e8]), ..CompNodeProfile::unit(format!("n{i}")) });
    let compnodes = compnodes.collect();
    let link = |a: usize, b: usize| {
        let (low, high) = (site[a].min(site[b]), site[a].max(site[b]));
        if low == high {
            LinkProfile { latency_s: 1e-4, bytes_per_s: 1.25e9 }
        } else {
            LinkProfile { latency_s: 0.02, bytes_per_s: between[low * 3 + high] }
        }
    };
    let links = (0..count).map(|a| (0..count).map(|b| link(a, b)).collect()).collect();
    Cluster { compnodes, links }
}

fn spec(strategy: Strategy, micro_batches: u32) -> PlanSpec {
    PlanSpec::dense(PlacementSpec {
        strategy,
        stages: Vec::new(),
        pipeline: Pipeline::OneFOneB,
        // What the search compares is textbook 1F1B.
        run_ahead: Some(0),
        deferred: Some(0),
        micro_batches,
        micro_batch_size: 2,
        eval_micro_batches: 1,
        private: false,
        keep_blocks: [0; 2],
        codec: Codec::Dense,
    })
}

#[test]
fn op_fence_is_never_slower_than_a_baseline() {
    for seed in 0..120 {
        let mut draw = Draw(seed);
        let ops = 6 + draw.below(20);
        let dag = random_dag(&mut draw, ops);
        let cluster = random_cluster(&mut draw, 6);
        let micro_batches = 1 + draw.below(6) as u32;
        let step = |strategy| plan(&dag, &cluster, &spec(strategy, micro_batches)).map(|p| p.prediction.step_s);
        let fence = step(Strategy::OpFence).unwrap();
        for baseline in [Strategy::EqualNumber, Strategy::EqualCompute] {
            if let Ok(baseline) = step(baseline) {
                assert!(fence <= baseline * (1.0 + 1e-9), "seed {seed}: {fence} against {baseline}");
            }
        }
    }
}

#[test]
fn op_fence_is_mostly_within_five_percent_of_the_best() {
    let (mut close, mut cases) = (0, 0);
    for seed in 0..40 {
        let mut draw = Draw(1000 + seed);
        let ops = 6 + draw.below(9);
        let dag = random_dag(&mut draw, ops);
        let cluster = random_cluster(&mut draw, 6);
        let micro_batches = 2 + draw.below(4) as u32;
        for owner in [Owner::First, Owner::Any] {
            let step = |strategy| {
                let spec = PlanSpec { owner, ..spec(strategy, micro_batches) };
                plan(&dag, &cluster, &spec).unwrap().prediction.step_s
            };
            let (fence, best) = (step(Strategy::OpFence), step(Strategy::Optimal));
            assert!(best <= fence * (1.0 + 1e-9));
            cases += 1;
            close += usize::from(fence <= 1.05 * best);
        }
    }
    assert!(close as f64 >= 0.95 * f64::from(cases), "{close} of {cases} are within 5 %");
}

#[test]
fn every_placement_covers_each_op_once_and_heeds_memory() {
    for seed in 0..80 {
        let mut draw = Draw(5000 + seed);
        let ops = 5 + draw.below(16);
        let dag = random_dag(&mut draw, ops);
        let mut cluster = random_cluster(&mut draw, 6);
        for node in &mut cluster.compnodes {
            node.memory_bytes = draw.pick(&[3e5, 2e6, 2e7]) as u64;
        }
        let Ok(plan) = plan(&dag, &cluster, &spec(Strategy::OpFence, 3)) else { continue };
        let held: Vec<usize> = plan.placement.stages.iter().flat_map(|s| s.ops.iter().map(|op| op.index())).collect();
        assert_eq!(held, (0..dag.ops().len()).collect::<Vec<_>>(), "seed {seed}");
        for node in &plan.prediction.compnodes {
            assert!(node.memory_limit_bytes.is_none_or(|limit| node.memory_bytes <= limit as f64), "seed {seed}");
        }
    }
}

#[test]
fn private_data_stays_with_its_owner_under_op_fence() {
    let dag = small_gpt2(3);
    let mut draw = Draw(7);
    for _ in 0..20 {
        let cluster = random_cluster(&mut draw, 5);
        let mut spec = spec(Strategy::OpFence, 4);
        spec.placement.private = true;
        let placement = plan(&dag, &cluster, &spec).unwrap().placement;
        assert_eq!(placement.compnodes[0], "n0");
        for name in ["wte", "lm_head", "loss"] {
            let op = dag.find(name).unwrap();
            let stage = placement.stages.iter().find(|s| s.ops.contains(&op)).unwrap();
            assert_eq!(stage.compnode, NodeIndex(0), "`{name}`");
        }
    }
}

/// Whoever holds both ends of a tied table exchanges no gradient of it.
#[test]
fn op_fence_tries_both_ends_of_a_tied_table_on_one_compnode() {
    let (dag, mut u_shapes) = (small_gpt2(3), 0);
    for seed in 0..30 {
        let cluster = random_cluster(&mut Draw(400 + seed), 5);
        let free = plan(&dag, &cluster, &spec(Strategy::OpFence, 4)).unwrap();
        let (spec, pins) = (spec(Strategy::OpFence, 4), Pins::u_shape(&dag).unwrap());
        let estimate = Estimate::new(&dag, 2, &cluster, spec.states);
        let bound = search(&dag, &cluster, &estimate, &pins, &spec).unwrap();
        let used = cluster.select(&bound.order);
        let bound = Pricing::new(&dag, &used, &estimate, &spec).settle(&bound.segments(&pins)).unwrap();
        let (free_s, bound_s) = (free.prediction.step_s, bound.simulated.step_s);
        assert!(free_s <= bound_s, "seed {seed}: {free_s} against {bound_s} with both ends in one place");
        let both_ends = |stage: &crate::Stage| stage.compnode == NodeIndex(0);
        let stages = &free.placement.stages;
        u_shapes += u32::from(
            stages.len() > 1 && stages.first().is_some_and(both_ends) && stages.last().is_some_and(both_ends),
        );
    }
    assert!(u_shapes > 0, "none of them was best");
}

#[test]
fn gpt2_over_slow_links_keeps_its_table_in_one_place() {
    let text = include_str!("../../../../examples/clusters/slow-links.toml");
    let cluster = toml::from_str::<ClusterFile>(text).unwrap().resolve().unwrap();
    let dag = fusionllm_graph::gpt2(&fusionllm_graph::Gpt2Config::named("gpt2").unwrap(), 1024).unwrap();
    let mut spec = PlanSpec { compression: Compression::Adaptive { ratio: 16.0 }, ..spec(Strategy::OpFence, 32) };
    (spec.placement.run_ahead, spec.placement.deferred, spec.placement.micro_batch_size) = (None, None, 1);
    let plan = plan(&dag, &cluster, &spec).unwrap();
    assert!(plan.placement.shared.is_empty(), "{:?}", plan.placement.shared);
    let memory = plan.prediction.compnodes.iter().map(|c| c.memory_bytes).fold(0.0, f64::max);
    assert!(plan.prediction.step_s < 4.8 && memory < 5e9, "{} s, {memory} bytes", plan.prediction.step_s);
}

#[test]
fn who_only_looks_rows_up_sends_only_those() {
    let dag = small_gpt2(2);
    let mut cluster = Cluster::uniform(2);
    cluster.links = vec![vec![LinkProfile { latency_s: 0.0, bytes_per_s: 1e6 }; 2]; 2];
    let plan = plan(&dag, &cluster, &spec(Strategy::EqualNumber, 1)).unwrap();
    let table = dag.param(plan.placement.shared[0].params[0]);
    let sent = |from: u32| {
        let of_shared = |t: &&crate::Transfer| matches!(t.cargo, crate::Cargo::Shared(_)) && t.from == NodeIndex(from);
        plan.simulated.transfers.iter().filter(of_shared).map(|t| t.bytes).sum::<f64>()
    };
    // One micro-batch of two sequences of 8 tokens: 16 rows with their numbers.
    assert_eq!((sent(0), sent(1)), (16.0 * 4.0 * 17.0, table.bytes() as f64));
}

#[test]
fn a_device_that_does_not_help_is_left_out() {
    let dag = small_gpt2(4);
    let mut cluster = Cluster::uniform(3);
    for node in &mut cluster.compnodes {
        node.flop_per_s = 1e8;
    }
    let fast = LinkProfile { latency_s: 1e-4, bytes_per_s: 1e9 };
    let slow = LinkProfile { latency_s: 1.0, bytes_per_s: 1e4 };
    cluster.links = vec![vec![fast, fast, slow], vec![fast, fast, slow], vec![slow, slow, fast]];
    let plan = plan(&dag, &cluster, &spec(Strategy::OpFence, 4)).unwrap();
    assert_eq!(plan.placement.compnodes, ["compnode-0", "compnode-1"]);
}

#[test]
fn a_job_that_fits_nowhere_says_what_would_make_it_fit() {
    let dag = small_gpt2(2);
    let error = |memory: u64| {
        let mut cluster = Cluster::uniform(2);
        cluster.compnodes.iter_mut().for_each(|c| c.memory_bytes = memory);
        plan(&dag, &cluster, &spec(Strategy::OpFence, 2)).unwrap_err().to_string()
    };
    assert!(error(1000).contains("alone needs") && error(1000).contains("train.micro_batches"), "{}", error(1000));
    assert!(error(60_000).contains("no cut fits: add CompNodes"), "{}", error(60_000));
    let mut cluster = Cluster::uniform(2);
    cluster.compnodes.iter_mut().for_each(|c| c.memory_bytes = 60_000);
    let error = plan(&dag, &cluster, &spec(Strategy::EqualCompute, 2)).unwrap_err().to_string();
    assert!(error.contains("`compnode-0` would need"), "{error}");
}

/// Edges that carry no gradient lie between those that do, and take no codec from them.
#[test]
fn every_boundary_edge_with_a_gradient_gets_its_codecs() {
    let dag = small_gpt2(4);
    let mut spec = spec(Strategy::EqualNumber, 2);
    let (activations, gradients) = (Codec::Int8, Codec::Int4);
    spec.compression = Compression::Fixed { activations, gradients };
    let plan = plan(&dag, &Cluster::uniform(4), &spec).unwrap();
    let (mut plain, mut compressed) = (0, 0);
    for edge in &plan.placement.edges {
        let expected = if edge.gradient { (activations, gradients) } else { (Codec::Dense, Codec::Dense) };
        assert_eq!((edge.activation_codec, edge.gradient_codec), expected, "{edge:?}");
        *(if edge.gradient { &mut compressed } else { &mut plain }) += 1;
    }
    assert!(plain > 0 && compressed > 3);
}

#[test]
fn ada_topk_speeds_up_what_slow_links_bound() {
    let dag = small_gpt2(4);
    let device = DeviceEntry {
        name: "gpu".to_owned(),
        count: 3,
        site: String::new(),
        flop_per_s: 1e9,
        efficiency: 0.5,
        memory_gb_per_s: None,
        memory_gb: None,
        kernels: None,
        org: None,
        host: None,
        measured: None,
    };
    let rule = LinkEntry { from: "*".to_owned(), to: "*".to_owned(), latency_ms: 1.0, mbit_per_s: 1.0, one_way: false };
    let cluster = ClusterFile { name: String::new(), device: vec![device], link: vec![rule] }.resolve().unwrap();
    let step = |compression| {
        let spec = PlanSpec { compression, ..spec(Strategy::EqualCompute, 4) };
        plan(&dag, &cluster, &spec).unwrap().prediction.step_s
    };
    let dense = step(Compression::Dense);
    let ada = step(Compression::AdaTopk { ratio: 50.0, values: TopKValues::Bf16, literal: false });
    let uniform = step(Compression::UniformTopk { ratio: 50.0, values: TopKValues::Bf16 });
    assert!(ada < 0.6 * dense && uniform < 0.6 * dense, "{dense} {uniform} {ada}");
}

#[test]
fn compression_never_makes_op_fence_slower() {
    for seed in 0..12 {
        let mut draw = Draw(seed);
        let (dag, cluster) = (small_gpt2(3), random_cluster(&mut draw, 6));
        let step = |compression| {
            let spec = PlanSpec { compression, ..spec(Strategy::OpFence, 4) };
            plan(&dag, &cluster, &spec).unwrap().prediction.step_s
        };
        let dense = step(Compression::Dense);
        for compressed in [
            Compression::UniformTopk { ratio: 100.0, values: TopKValues::Bf16 },
            Compression::AdaTopk { ratio: 100.0, values: TopKValues::Bf16, literal: false },
            Compression::Adaptive { ratio: 100.0 },
        ] {
            let seconds = step(compressed);
            assert!(seconds <= dense * (1.0 + 1e-9), "seed {seed}, {}: {seconds} against {dense}", compressed.name());
        }
    }
}

#[test]
fn a_comparison_has_every_strategy_dense_and_compressed() {
    let (dag, cluster) = (small_gpt2(2), random_cluster(&mut Draw(3), 3));
    let candidates = compare(&dag, &cluster, &spec(Strategy::EqualNumber, 4), 10.0);
    let names: Vec<_> = candidates.iter().map(|c| (c.strategy.name(), c.compression.name())).collect();
    assert_eq!(names.len(), 12);
    assert!(names.contains(&("op-fence", "ada-topk")) && !names.iter().any(|n| n.0 == "optimal"));
    for candidate in candidates {
        let mut spec = spec(candidate.strategy, 4);
        spec.compression = candidate.compression;
        assert_eq!(candidate.plan, plan(&dag, &cluster, &spec));
    }
}

#[test]
fn predictions_hang_together() {
    let dag = small_gpt2(3);
    let mut cluster = Cluster::uniform(3);
    cluster.compnodes.iter_mut().for_each(|c| c.flop_per_s = 1e8);
    let plan = plan(&dag, &cluster, &PlanSpec { tokens_per_step: 64, ..spec(Strategy::EqualCompute, 4) }).unwrap();
    let prediction = &plan.prediction;
    assert_eq!(prediction.compnodes.iter().map(|c| c.ops).sum::<usize>(), dag.ops().len());
    assert!((prediction.tokens_per_s * prediction.step_s - 64.0).abs() < 1e-9);
    assert!(prediction.formula_s > 0.0 && prediction.compnodes.iter().all(|c| c.busy > 0.0 && c.busy <= 1.0));
    assert!(prediction.links.iter().any(|l| l.from == "compnode-0" && l.to == "compnode-1" && l.bytes > 0.0));
    assert!(!prediction.critical_path.is_empty());
}

/// Two CompNodes a long way apart: 0.1 s each way, and next to no compute.
fn far_apart() -> Cluster {
    let mut cluster = Cluster::uniform(2);
    cluster.links = vec![vec![LinkProfile { latency_s: 0.1, bytes_per_s: 1e9 }; 2]; 2];
    cluster.compnodes.iter_mut().for_each(|c| c.flop_per_s = 1e9);
    cluster
}

fn with_run_ahead(run_ahead: Option<u32>) -> PlanSpec {
    let mut spec = spec(Strategy::EqualNumber, 8);
    spec.placement.run_ahead = run_ahead;
    spec
}

#[test]
fn over_long_links_stages_run_ahead() {
    let dag = small_gpt2(3);
    let textbook = plan(&dag, &far_apart(), &with_run_ahead(Some(0))).unwrap();
    let chosen = plan(&dag, &far_apart(), &with_run_ahead(None)).unwrap();
    let (slow, fast) = (textbook.prediction.step_s, chosen.prediction.step_s);
    assert!(fast < 0.7 * slow, "{fast} against {slow}");
    let live = |plan: &Plan| plan.placement.live_bound(NodeIndex(0)).into_values().max().unwrap();
    assert!(live(&textbook) == 2 && live(&chosen) > 2, "{}", live(&chosen));
    // Where links take no time, it would be memory for nothing.
    let near = plan(&dag, &Cluster::uniform(2), &with_run_ahead(None)).unwrap();
    assert_eq!(live(&near), 2);
}

#[test]
fn stages_run_no_further_ahead_than_memory_holds() {
    let dag = small_gpt2(3);
    let needed = |run_ahead| {
        let plan = plan(&dag, &far_apart(), &with_run_ahead(run_ahead)).unwrap();
        plan.prediction.compnodes[0].memory_bytes
    };
    let mut cluster = far_apart();
    cluster.compnodes[0].memory_bytes = (0.5 * (needed(Some(1)) + needed(Some(2)))) as u64;
    let asked = PlanSpec { recompute: Recompute::Never, ..with_run_ahead(None) };
    let plan = plan(&dag, &cluster, &asked).unwrap();
    assert_eq!(plan.placement.live_bound(NodeIndex(0)).into_values().max(), Some(3));
}

fn with_deferred(deferred: Option<u32>) -> PlanSpec {
    let mut spec = with_run_ahead(None);
    spec.placement.deferred = deferred;
    spec
}

/// Largest number of micro-batches of a CompNode whose weight gradients wait at once.
fn waiting(plan: &Plan, node: usize) -> usize {
    let (mut now, mut most) = (0usize, 0);
    for task in &plan.placement.train.orders[node] {
        match task {
            Task::Bp { .. } => now += 1,
            Task::Wg { .. } => now -= 1,
            Task::Fp { .. } | Task::Update => {}
        }
        most = most.max(now);
    }
    most
}

#[test]
fn over_long_links_weight_gradients_wait() {
    let dag = small_gpt2(3);
    let mut cluster = far_apart();
    // As much to compute as to wait for.
    cluster.compnodes.iter_mut().for_each(|c| c.flop_per_s = 2e7);
    let at_once = plan(&dag, &cluster, &with_deferred(Some(0))).unwrap();
    let chosen = plan(&dag, &cluster, &with_deferred(None)).unwrap();
    let (slow, fast) = (at_once.prediction.step_s, chosen.prediction.step_s);
    assert!(fast < 0.95 * slow, "{fast} against {slow}");
    assert!(at_once.placement.train.orders.iter().flatten().all(|t| !matches!(t, Task::Wg { .. })));
    assert!(waiting(&chosen, 0) > 0);
    // A CompNode that waits for nobody would only hold memory.
    let alone = plan(&dag, &Cluster::uniform(1), &with_deferred(None)).unwrap();
    assert!(alone.placement.train.orders.iter().flatten().all(|t| !matches!(t, Task::Wg { .. })));
}

#[test]
fn no_more_weight_gradients_wait_than_memory_holds() {
    let dag = small_gpt2(3);
    let with = |deferred| {
        let mut spec = with_run_ahead(Some(0));
        spec.placement.deferred = Some(deferred);
        spec
    };
    let needed = |deferred| plan(&dag, &far_apart(), &with(deferred)).unwrap().prediction.compnodes[1].memory_bytes;
    let mut cluster = far_apart();
    cluster.compnodes[1].memory_bytes = (0.5 * (needed(2) + needed(3))) as u64;
    let plan = plan(&dag, &cluster, &with(8)).unwrap();
    assert_eq!((waiting(&plan, 0), waiting(&plan, 1)), (8, 2));
    assert!(plan.prediction.compnodes[1].memory_bytes <= cluster.compnodes[1].memory_bytes as f64);
}

/// What is at work is priced as it was planned, and where a CompNode is slower, its part takes longer.
#[test]
fn a_cut_that_is_at_work_is_priced_by_what_is_known_now() {
    let mut checked = 0;
    for seed in 0..60 {
        let mut draw = Draw(seed);
        let dag = random_dag(&mut draw, 12);
        let mut cluster = random_cluster(&mut draw, 5);
        let spec = spec(Strategy::OpFence, 4);
        let Ok(planned) = plan(&dag, &cluster, &spec) else { continue };
        let again = step_by_cut(&dag, &cluster, &planned.placement, &spec).unwrap();
        assert_eq!(again, planned.prediction.step_s, "seed {seed}");
        let busiest =
            planned.prediction.compnodes.iter().max_by(|a, b| a.busy.total_cmp(&b.busy)).unwrap().name.clone();
        let at = cluster.compnodes.iter().position(|compnode| compnode.name == busiest).unwrap();
        cluster.compnodes[at] = cluster.compnodes[at].slowed(10.0);
        let slower = step_by_cut(&dag, &cluster, &planned.placement, &spec).unwrap();
        assert!(slower > again, "seed {seed}: {slower} {again}");
        checked += 1;
    }
    assert!(checked > 20, "{checked}");
}

/// What is frozen takes neither gradient nor state nor UPDATE, no tied table travels, and no gradient before the first
/// parameter that is trained; activations are compressed all the same.
#[test]
fn frozen_parameters_cost_their_memory_and_nothing_more() {
    let base = small_gpt2(4);
    let lora = |targets: &[&str]| {
        let targets = targets.iter().map(|&target| target.to_owned()).collect();
        base.with_lora(&Lora { rank: 2, scaling: 1.0, dropout: 0.0, targets }).unwrap()
    };
    let cluster = Cluster::uniform(3);
    let stages = [(0, "h.0.add_2"), (1, "h.1.add_2"), (2, "loss")];
    let stage = |(compnode, last_op): (u32, &str)| crate::StageSpec { compnode, last_op: last_op.to_owned() };
    let mut spec = spec(Strategy::EqualNumber, 4);
    spec.placement.stages = stages.map(stage).to_vec();
    let whole = plan(&base, &cluster, &spec).unwrap();
    assert_eq!(whole.placement.shared.len(), 1);

    let dag = lora(&["all-linear"]);
    let adapted = plan(&dag, &cluster, &spec).unwrap();
    assert!(adapted.placement.shared.is_empty());
    for node in adapted.placement.nodes() {
        let (all, trained) =
            (adapted.placement.param_bytes_of(&dag, node), adapted.placement.trained_bytes_of(&dag, node));
        assert!(trained > 0 && trained < all / 4);
        assert_eq!(adapted.placement.training_bytes_of(&dag, node, 2), all + 3 * trained);
        let memory = |plan: &Plan| plan.prediction.compnodes[node.index()].memory_bytes;
        assert!(memory(&adapted) < memory(&whole), "{} {}", memory(&adapted), memory(&whole));
    }
    let bp_s = |plan: &Plan| plan.prediction.compnodes.iter().map(|c| c.bp_s).sum::<f64>();
    assert!(bp_s(&adapted) < 0.8 * bp_s(&whole), "{} {}", bp_s(&adapted), bp_s(&whole));

    // Only the last stage has something to train.
    let dag = lora(&["h.2.attn.c_attn", "h.3.attn.c_attn"]);
    spec.compression = crate::Compression::Fixed { activations: Codec::Int4, gradients: Codec::Int8 };
    let tail = plan(&dag, &cluster, &spec).unwrap();
    let real: Vec<_> = tail.placement.edges.iter().filter(|edge| edge.is_real(&dag)).collect();
    assert!(!real.is_empty() && real.iter().all(|e| !e.gradient && e.activation_codec == Codec::Int4), "{real:?}");
    let back = |link: &&crate::LinkPrediction| link.from > link.to && link.bytes > 0.0;
    let sent: f64 = tail.prediction.links.iter().filter(back).map(|link| link.bytes).sum();
    assert!(sent < 100.0, "no more than norms: {:?}", tail.prediction.links);
    for node in [0, 1] {
        assert_eq!(tail.prediction.compnodes[node].bp_s, 0.0);
    }
    spec.compression = crate::Compression::Dense;
    spec.placement.deferred = Some(4);
    let deferred = plan(&lora(&["h.1.attn.c_attn"]), &cluster, &spec).unwrap();
    assert!(!deferred.placement.defers(NodeIndex(0)) && deferred.placement.defers(NodeIndex(1)));
    assert!(!deferred.placement.defers(NodeIndex(2)), "its weights are all frozen");
}
