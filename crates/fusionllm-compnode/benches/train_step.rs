//! How fast one CompNode trains a GPT-2 shape, without network and task loop:
//! `cargo bench -p fusionllm-compnode -- --layers 4 --width 768 --heads 12 --vocab 8192 --batch 4`.
//!
//! Prints the JSON line that `benches/peers/pytorch_single.py` prints for the same options. Built with a GPU's feature,
//! such as `--features cuda`, it takes that GPU unless `--device cpu` is given.
#![expect(clippy::print_stdout, clippy::unwrap_used, clippy::panic, reason = "a program that measures")]

use std::sync::Arc;
use std::time::Instant;

use fusionllm_codec::{HostTensor, Values};
use fusionllm_compnode::{
    DeviceChoice, ExecutorSpec, FirstParams, MicroBatch, OptimizerSpec, StopFlag, UpdateSpec, open_device,
};
use fusionllm_graph::{Gpt2Config, OpDag, OpKind, gpt2};
use fusionllm_planner::{Cluster, NodeIndex, Placement, StageId, place};
use fusionllm_protocol::{JobSpec, Pass};

/// The options of `pytorch_single.py`.
struct Options {
    layers: usize,
    width: usize,
    heads: usize,
    vocab: usize,
    seq: usize,
    batch: usize,
    micro_batches: usize,
    steps: usize,
    warmup: usize,
    threads: usize,
    device: DeviceChoice,
}

impl Options {
    fn read() -> Self {
        let mut options = Self {
            layers: 4,
            width: 768,
            heads: 12,
            vocab: 8192,
            seq: 256,
            batch: 4,
            micro_batches: 1,
            steps: 10,
            warmup: 2,
            threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            device: DeviceChoice::Auto,
        };
        let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
        while let Some(word) = words.next() {
            let text = words.next().unwrap_or_default();
            if word == "--device" {
                options.device = text.parse().unwrap();
                continue;
            }
            let value: usize = text.parse().unwrap_or_else(|_| panic!("{word} NUMBER"));
            let option = match word.as_str() {
                "--layers" => &mut options.layers,
                "--width" => &mut options.width,
                "--heads" => &mut options.heads,
                "--vocab" => &mut options.vocab,
                "--seq" => &mut options.seq,
                "--batch" => &mut options.batch,
                "--micro-batches" => &mut options.micro_batches,
                "--steps" => &mut options.steps,
                "--warmup" => &mut options.warmup,
                "--threads" => &mut options.threads,
                _ => panic!("unknown option {word}"),
            };
            *option = value;
        }
        options
    }

    fn dag(&self) -> OpDag {
        let config = Gpt2Config {
            vocab_size: self.vocab,
            n_positions: self.seq,
            n_embd: self.width,
            n_layer: self.layers,
            n_head: self.heads,
            layer_norm_epsilon: 1e-5,
            dropout: 0.0,
        };
        gpt2(&config, self.seq).unwrap()
    }

    /// The ids of a micro-batch: numbers without a pattern.
    fn ids(&self, seed: u64) -> HostTensor {
        let mut state = seed;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % self.vocab
        };
        let rows = self.batch / self.micro_batches;
        let ids = (0..rows * self.seq).map(|_| draw() as i32).collect();
        HostTensor::new(vec![rows, self.seq], Values::I32(ids)).unwrap()
    }
}

/// Everything on one CompNode.
fn on_one_compnode(dag: &OpDag) -> Placement {
    let job = "[model]\nname = \"gpt2\"\n[data]\npath = \"unused\"";
    place(dag, &Cluster::uniform(1), &JobSpec::from_toml(job, &[]).unwrap().placement_spec()).unwrap()
}

/// That of `fusionllm`.
#[global_allocator]
static ALLOCATOR: fusionllm_compnode::Allocator = fusionllm_compnode::Allocator;

fn main() {
    fusionllm_compnode::keep_freed_memory();
    let options = Options::read();
    rayon::ThreadPoolBuilder::new().num_threads(options.threads).build_global().unwrap();
    let dag = Arc::new(options.dag());
    let backend = open_device(options.device).unwrap();
    let optimizer = OptimizerSpec::AdamW { betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.01 };
    let placement = on_one_compnode(&dag);
    let first = FirstParams::Drawn;
    let spec = ExecutorSpec::of_placement(Arc::clone(&dag), &placement, NodeIndex(0), optimizer, 0u64, first);
    let mut executor = backend.build(spec, StopFlag::default()).unwrap();
    let is_placeholder = |op| matches!(dag.op(op).kind, OpKind::Input { .. } | OpKind::Label { .. });
    let placeholders = dag.op_ids().filter(|&op| is_placeholder(op));
    let inputs: Vec<_> = placeholders.zip(1..).map(|(op, seed)| (op, options.ids(seed).into())).collect();
    let mut times = Vec::new();
    for step in 0..options.warmup + options.steps {
        let began = Instant::now();
        for index in 0..options.micro_batches {
            let micro_batch = MicroBatch { step: step as u64, pass: Pass::Train, index: index as u32 };
            executor.forward(StageId(0), micro_batch, inputs.clone()).unwrap();
            let scale = 1.0 / options.micro_batches as f64;
            executor.backward(StageId(0), micro_batch, Vec::new(), scale).unwrap();
        }
        executor.update(UpdateSpec { step: step as u64, lr: 3e-4, gradient_scale: 1.0 }).unwrap();
        if step >= options.warmup {
            times.push(began.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let tokens_per_s = (options.batch * options.seq) as f64 / median;
    println!("{{\"framework\": \"fusionllm\", \"tokens_per_s\": {tokens_per_s:.1}, \"step_s_median\": {median:.4}}}");
}
