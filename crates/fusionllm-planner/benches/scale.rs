//! How long planning takes as clusters and models grow: `cargo bench -p fusionllm-planner`.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a program that measures")]

use std::time::Instant;

use fusionllm_codec::Codec;
use fusionllm_graph::{Gpt2Config, OpDag, gpt2};
use fusionllm_planner::{
    ClusterFile, DeviceEntry, LinkEntry, Owner, Pipeline, PlacementSpec, PlanSpec, Strategy, plan,
};

fn model(ops: usize) -> OpDag {
    let blocks = (ops / 12).max(1);
    let config = Gpt2Config {
        vocab_size: 1000,
        n_positions: 256,
        n_embd: 2048,
        n_layer: blocks,
        n_head: 16,
        layer_norm_epsilon: 1e-5,
        dropout: 0.0,
    };
    gpt2(&config, 256).unwrap()
}

/// Sites of ten devices of two kinds, joined by links that get slower with distance.
fn cluster(devices: usize) -> ClusterFile {
    let sites = devices.div_ceil(10);
    let entry = |site: usize, kind: &str, count: usize, flop_per_s: f64| DeviceEntry {
        kernels: None,
        org: None,
        host: None,
        measured: None,
        name: format!("s{site}-{kind}"),
        count,
        site: format!("s{site}"),
        flop_per_s,
        efficiency: 0.4,
        memory_gb_per_s: Some(400.0),
        memory_gb: Some(24.0),
    };
    let rule = |from: &str, to: &str, mbit_per_s: f64| LinkEntry {
        from: from.to_owned(),
        to: to.to_owned(),
        latency_ms: 20.0,
        mbit_per_s,
        one_way: false,
    };
    let mut link = vec![rule("*", "*", 50.0)];
    for site in 0..sites {
        let name = format!("s{site}");
        link.push(rule(&name, &name, 10_000.0));
        if site > 0 {
            link.push(rule(&format!("s{}", site - 1), &name, 100.0 + (site * 37 % 11) as f64 * 50.0));
        }
    }
    let device = (0..sites).flat_map(|s| [entry(s, "fast", 5, 3e13), entry(s, "slow", 5, 1e13)]).collect();
    ClusterFile { name: "scale".to_owned(), device, link }
}

fn main() {
    println!("{:>8} {:>8} {:>10} {:>8}", "devices", "ops", "plan s", "used");
    for (devices, ops) in [(10, 100), (100, 1000), (100, 10_000), (300, 10_000), (1000, 10_000)] {
        let (dag, cluster) = (model(ops), cluster(devices).resolve().unwrap());
        let mut spec = PlanSpec::dense(PlacementSpec {
            strategy: Strategy::OpFence,
            stages: Vec::new(),
            pipeline: Pipeline::OneFOneB,
            run_ahead: None,
            deferred: None,
            micro_batches: 16,
            micro_batch_size: 1,
            eval_micro_batches: 1,
            private: false,
            keep_blocks: [0; 2],
            codec: Codec::Dense,
        });
        spec.owner = Owner::Any;
        let began = Instant::now();
        let plan = plan(&dag, &cluster, &spec).unwrap();
        let seconds = began.elapsed().as_secs_f64();
        println!("{devices:>8} {:>8} {seconds:>10.2} {:>8}", dag.ops().len(), plan.placement.compnodes.len());
    }
}
