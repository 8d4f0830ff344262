//! The whole executor over an emulated GPU, against the CPU's.

mod decoders;
mod launches;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fusionllm_codec::{HostTensor, Values};
use fusionllm_graph::{Gpt2Config, OpDag, OpId, gpt2};
use fusionllm_planner::StageId;
use fusionllm_protocol::{Pass, Precision};

use super::driver::Driver;
use super::emulated::{self, Emulated};
use super::executor::CudaExecutor;
use super::gpu::Gpu;
use super::needs;
use crate::backend::{ExecutorSpec, FirstParams, Load, StageOps};
use crate::border::BorderTensor;
use crate::executor::{Executor, LazyTensor, MicroBatch, NamedTensor, UpdateSpec};
use crate::stop::StopFlag;
use crate::{DeviceChoice, OptimizerSpec, open_device};

const SEQ: usize = 20;
const VOCAB: usize = 97;
const BATCH: usize = 2;
const MICRO_BATCHES: u32 = 2;
const ADAMW: OptimizerSpec = OptimizerSpec::AdamW { betas: [0.9, 0.95], epsilon: 1e-8, weight_decay: 0.1 };

/// Two blocks, with heads of the given width.
fn model(head_width: usize, dropout: f64) -> Arc<OpDag> {
    let config = Gpt2Config {
        vocab_size: VOCAB,
        n_positions: 32,
        n_embd: 2 * head_width,
        n_layer: 2,
        n_head: 2,
        layer_norm_epsilon: 1e-5,
        dropout,
    };
    Arc::new(gpt2(&config, SEQ).unwrap())
}

/// A run of one or several executors, each with one or more stages.
struct Trial {
    dag: Arc<OpDag>,
    /// The last op of each stage, and who holds it.
    cuts: Vec<(&'static str, usize)>,
    precision: Precision,
    defers: bool,
    /// Whether FP of each stage comes once more before its BP.
    recomputes: bool,
    optimizer: OptimizerSpec,
    batch: usize,
    micro_batches: u32,
}

/// What came of it.
#[derive(Debug, PartialEq)]
struct Outcome {
    losses: Vec<f64>,
    norms: Vec<f64>,
    tensors: BTreeMap<String, NamedTensor>,
}

impl Trial {
    fn new(dag: &Arc<OpDag>) -> Self {
        let (dag, cuts) = (Arc::clone(dag), vec![("loss", 0)]);
        let (precision, defers, batch, micro_batches) = (Precision::F32, false, BATCH, MICRO_BATCHES);
        Self { dag, cuts, precision, defers, recomputes: false, optimizer: ADAMW, batch, micro_batches }
    }

    fn cut(self, cuts: &[(&'static str, usize)]) -> Self {
        Self { cuts: cuts.to_vec(), ..self }
    }

    fn stages(&self) -> Vec<(StageOps, usize)> {
        let mut first = 0;
        let mut stages = Vec::new();
        for (index, (last, holder)) in self.cuts.iter().enumerate() {
            let end = self.dag.find(last).unwrap().0 + 1;
            let ops: Vec<OpId> = (first..end).map(OpId).collect();
            let outside = |op: &&OpId| self.dag.consumers(**op).iter().any(|c| !ops.contains(c));
            let leaving = ops.iter().filter(outside).copied().collect();
            let linear = |op: &&OpId| self.dag.op(**op).kind.family() == "linear";
            let deferring = ops.iter().filter(linear).filter(|_| self.defers).copied().collect();
            stages.push((StageOps { id: StageId(index as u32), ops, leaving, deferring }, *holder));
            first = end;
        }
        stages
    }

    fn executors(&self, build: &dyn Fn(ExecutorSpec) -> Box<dyn Executor>) -> Vec<Box<dyn Executor>> {
        let stages = self.stages();
        let count = stages.iter().map(|(_, holder)| holder + 1).max().unwrap();
        let spec = |of: usize| {
            let stages: Vec<StageOps> = stages.iter().filter(|(_, h)| *h == of).map(|(s, _)| s.clone()).collect();
            let ops = stages.iter().flat_map(|stage| &stage.ops);
            let params: BTreeSet<_> = ops.flat_map(|&op| self.dag.op(op).params.iter().copied()).collect();
            let (dag, first) = (Arc::clone(&self.dag), FirstParams::Drawn);
            let (params, optimizer) = (params.into_iter().collect(), self.optimizer);
            ExecutorSpec { dag, stages, params, optimizer, seeds: 7u64.into(), first, precision: self.precision }
        };
        (0..count).map(|of| build(spec(of))).collect()
    }

    fn on_gpu(&self, steps: u64) -> Outcome {
        let gpu = Emulated::open();
        self.run(steps, &|spec| executor(spec, &gpu))
    }

    fn on_cpu(&self, steps: u64) -> Outcome {
        let cpu = open_device(DeviceChoice::Cpu).unwrap();
        self.run(steps, &|spec| cpu.build(spec, StopFlag::default()).unwrap())
    }

    fn run(&self, steps: u64, build: &dyn Fn(ExecutorSpec) -> Box<dyn Executor>) -> Outcome {
        let mut executors = self.executors(build);
        let mut outcome = Outcome { losses: Vec::new(), norms: Vec::new(), tensors: BTreeMap::new() };
        for step in 0..steps {
            let (loss, norm) = self.step(&mut executors, step);
            outcome.losses.push(loss);
            outcome.norms.push(norm);
        }
        for executor in &executors {
            let tensors = executor.export().into_iter().map(|tensor| LazyTensor::read(tensor).unwrap());
            outcome.tensors.extend(tensors.map(|tensor| (tensor.name.clone(), tensor)));
        }
        outcome
    }

    /// One step, and its loss and norm.
    fn step(&self, executors: &mut [Box<dyn Executor>], step: u64) -> (f64, f64) {
        let (stages, scale) = (self.stages(), 1.0 / f64::from(self.micro_batches));
        let mut loss = 0.0;
        for index in 0..self.micro_batches {
            let at = MicroBatch { step, pass: Pass::Train, index };
            let mut tensors = self.data(step, index);
            let mut entered = BTreeMap::new();
            for (stage, holder) in &stages {
                let inputs: Vec<_> =
                    entering(&self.dag, stage).into_iter().map(|op| (op, tensors[&op].clone())).collect();
                entered.insert(stage.id, inputs.clone());
                let executor = &mut executors[*holder];
                let output = match self.recomputes {
                    true => executor.forward_alone(stage.id, at, inputs).unwrap(),
                    false => executor.forward(stage.id, at, inputs).unwrap(),
                };
                tensors.extend(output.tensors);
                loss += output.loss.unwrap_or(0.0) * scale;
            }
            let mut gradients: Vec<(OpId, BorderTensor)> = Vec::new();
            for (stage, holder) in stages.iter().rev() {
                if self.recomputes {
                    executors[*holder].forward(stage.id, at, entered[&stage.id].clone()).unwrap();
                }
                let mine = gradients.iter().filter(|(op, _)| stage.leaving.contains(op)).cloned().collect();
                gradients.extend(executors[*holder].backward(stage.id, at, mine, scale).unwrap());
            }
        }
        (loss, self.update(executors, step))
    }

    /// As the task loop: shared gradients meet, the norm is that of all parameters, each counted once.
    fn update(&self, executors: &mut [Box<dyn Executor>], step: u64) -> f64 {
        let held = |executor: &dyn Executor, name: &str| executor.export().iter().any(|tensor| tensor.name == name);
        let (mut squares, mut counted) = (0.0, BTreeSet::new());
        for param in self.dag.param_ids().filter(|&param| !self.dag.param(param).frozen) {
            let name = &self.dag.param(param).name;
            let holders: Vec<usize> = (0..executors.len()).filter(|&i| held(&*executors[i], name)).collect();
            let count = self.dag.param(param).shape.iter().product();
            if let [first, second] = holders[..] {
                let other = executors[second].gradient(param, 0..count).unwrap();
                executors[first].add_gradient(param, 0, other).unwrap();
                let sum = executors[first].gradient(param, 0..count).unwrap();
                executors[second].set_gradient(param, 0, sum).unwrap();
            }
            if executors.len() > 1 && counted.insert(param) {
                squares += executors[holders[0]].squared_norm(&[param]).unwrap();
            }
        }
        if let [alone] = executors {
            squares = alone.squared_norm(&self.dag.param_ids().collect::<Vec<_>>()).unwrap();
        }
        let norm = squares.sqrt();
        for executor in executors {
            executor.update(UpdateSpec { step, lr: 1e-2, gradient_scale: (1.0 / norm).min(1.0) }).unwrap();
        }
        norm
    }

    fn data(&self, step: u64, index: u32) -> BTreeMap<OpId, BorderTensor> {
        let (seq, vocab) = (self.dag.seq_len().unwrap(), self.dag.vocab().unwrap() as u64);
        let ids = |salt: u64| {
            let at = |i: u64| (((i * 31 + step * 7 + u64::from(index) * 13 + salt) * 2_654_435_761) >> 7) % vocab;
            let ids = (0..(self.batch * seq) as u64).map(|i| at(i) as i32).collect();
            BorderTensor::from(HostTensor::new(vec![self.batch, seq], Values::I32(ids)).unwrap())
        };
        BTreeMap::from([(self.dag.input().unwrap(), ids(0)), (self.dag.label().unwrap(), ids(1))])
    }
}

fn executor(spec: ExecutorSpec, gpu: &Arc<dyn Gpu>) -> Box<dyn Executor> {
    Box::new(CudaExecutor::new(spec, gpu, StopFlag::default()).unwrap())
}

fn entering(dag: &OpDag, stage: &StageOps) -> BTreeSet<OpId> {
    let mut entering: BTreeSet<OpId> = stage.ops.iter().filter(|op| dag.op(**op).inputs.is_empty()).copied().collect();
    entering.extend(stage.ops.iter().flat_map(|op| &dag.op(*op).inputs).filter(|input| !stage.ops.contains(input)));
    entering
}

/// Asserts that two runs agree: losses within `relative`, and so norms and what became of the parameters.
fn assert_close(got: &Outcome, expected: &Outcome, relative: f64) {
    for (what, got, expected) in [("loss", &got.losses, &expected.losses), ("norm", &got.norms, &expected.norms)] {
        for (step, (a, b)) in got.iter().zip(expected).enumerate() {
            assert!((a - b).abs() <= relative * b.abs(), "{what} of step {step}: {a} against {b}");
        }
    }
    assert_eq!(got.tensors.keys().collect::<Vec<_>>(), expected.tensors.keys().collect::<Vec<_>>());
    // A bias of all keys changes no softmax: its gradient is what rounding leaves, and AdamW makes whole steps of it.
    for (name, tensor) in got.tensors.iter().filter(|(name, _)| !name.ends_with("attn.c_attn.bias")) {
        let other = &expected.tensors[name].values;
        let distance: f64 = tensor.values.iter().zip(other).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let size: f64 = other.iter().map(|v| f64::from(*v).powi(2)).sum();
        // AdamW's first updates have the size of the learning rate whatever the gradient's.
        assert!(distance.sqrt() <= 20.0 * relative * size.sqrt() + 1e-6, "{name}: {distance:e} of {size:e}");
    }
}

#[test]
fn one_stage_in_f32_trains_as_the_cpu_does() {
    if emulated::is_left_out() {
        return;
    }
    let trial = Trial::new(&model(16, 0.0));
    assert_close(&trial.on_gpu(3), &trial.on_cpu(3), 2e-5);
}

#[test]
fn dropout_draws_the_cpus_own_mask() {
    if emulated::is_left_out() {
        return;
    }
    let trial = Trial::new(&model(16, 0.2));
    assert_close(&trial.on_gpu(2), &trial.on_cpu(2), 2e-5);
}

#[test]
fn sgd_trains_as_the_cpu_does() {
    if emulated::is_left_out() {
        return;
    }
    for momentum in [0.0, 0.9] {
        let optimizer = OptimizerSpec::Sgd { momentum, weight_decay: 0.1 };
        let trial = Trial { optimizer, ..Trial::new(&model(16, 0.0)) };
        assert_close(&trial.on_gpu(3), &trial.on_cpu(3), 2e-5);
    }
}

#[test]
fn flash_attention_in_bf16_trains_nearly_as_the_cpu_does() {
    if emulated::is_left_out() {
        return;
    }
    let dag = model(64, 0.0);
    let trial = Trial { precision: Precision::Bf16, ..Trial::new(&dag) };
    let (got, expected) = (trial.on_gpu(2), trial.on_cpu(2));
    for (a, b) in got.losses.iter().zip(&expected.losses) {
        assert!((a - b).abs() < 2e-2, "{got:?}");
    }
    for (a, b) in got.norms.iter().zip(&expected.norms) {
        assert!((a - b).abs() < 2e-2 * b, "{a} against {b}");
    }
}

#[test]
fn flash_attention_in_f32_trains_as_the_cpu_does() {
    if emulated::is_left_out() {
        return;
    }
    let trial = Trial::new(&model(64, 0.0));
    assert_close(&trial.on_gpu(2), &trial.on_cpu(2), 2e-5);
}

#[test]
fn any_cut_gives_the_same_bits() {
    if emulated::is_left_out() {
        return;
    }
    any_cut_gives_the_same_bits_on(&Emulated::open());
}

fn any_cut_gives_the_same_bits_on(gpu: &Arc<dyn Gpu>) {
    let run = |trial: &Trial| trial.run(2, &|spec| executor(spec, gpu));
    let cuts: [&[(&str, usize)]; 4] = [
        &[("h.0.add_2", 0), ("loss", 1)],
        &[("h.1.attn", 0), ("loss", 1)],
        &[("wpe", 0), ("h.1.ln_1", 1), ("loss", 0)],
        &[("h.0.mlp.act", 0), ("loss", 0)],
    ];
    for precision in [Precision::F32, Precision::Bf16] {
        // Heads of 24 have no flash attention.
        let trial = |dag: &Arc<OpDag>| Trial { precision, ..Trial::new(dag) };
        let dag = model(if precision == Precision::F32 { 24 } else { 64 }, 0.1);
        let whole = run(&trial(&dag));
        for list in cuts {
            for defers in [false, true] {
                let cut = run(&Trial { defers, ..trial(&dag).cut(list) });
                assert!(cut == whole, "{precision:?}, {list:?}, defers {defers}: {:?} {:?}", cut.losses, whole.losses);
            }
        }
    }
}

#[test]
fn what_was_exported_goes_on_where_it_stood() {
    if emulated::is_left_out() {
        return;
    }
    let trial = Trial::new(&model(16, 0.0));
    let gpu = Emulated::open();
    let after = |steps| trial.run(steps, &|spec| executor(spec, &gpu));
    let (three, two) = (after(3), after(2));
    let continued = trial.run(1, &|spec| {
        let mut executor = executor(spec, &gpu);
        executor.import(&mut two.tensors.clone()).unwrap();
        executor
    });
    // The one step of this run is the first of its data, not the third.
    assert_ne!(continued.losses[0], three.losses[0]);
    let back = {
        let executors = trial.executors(&|spec| {
            let mut executor = executor(spec, &gpu);
            executor.import(&mut two.tensors.clone()).unwrap();
            executor
        });
        let tensors = executors[0].export().into_iter().map(|tensor| tensor.read().unwrap());
        tensors.map(|tensor| (tensor.name.clone(), tensor)).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(back, two.tensors);
}

#[test]
fn what_an_executor_needs_is_known_before_it_takes_any() {
    if emulated::is_left_out() {
        return;
    }
    let sgd = OptimizerSpec::Sgd { momentum: 0.0, weight_decay: 0.0 };
    for (precision, optimizer, dag) in [
        (Precision::F32, ADAMW, model(16, 0.0)),
        (Precision::F32, sgd, model(16, 0.1)),
        (Precision::Bf16, ADAMW, model(64, 0.0)),
        (Precision::Bf16, sgd, every_op()),
    ] {
        let trial = Trial { precision, optimizer, ..Trial::new(&dag) };
        let emulated = Arc::new(Emulated::default());
        let gpu = Arc::clone(&emulated) as Arc<dyn Gpu>;
        let needed = std::cell::Cell::new(0);
        let mut executors = trial.executors(&|spec| {
            let load = Load { batch: BATCH, held: [(StageId(0), 1)].into(), between_pieces: 0 };
            needed.set(needs::bytes(&spec, precision, &load).unwrap());
            executor(spec, &gpu)
        });
        trial.step(&mut executors, 0);
        let at = MicroBatch { step: 1, pass: Pass::Eval, index: 0 };
        executors[0].forward(StageId(0), at, trial.data(0, 0).into_iter().collect()).unwrap();
        let needed = needed.get();
        // Besides come the norm's sums and the places of what was looked up; each buffer is rounded up.
        let taken = emulated.most_taken() as u64;
        assert!(
            (needed..needed + needed / 20 + 32_768).contains(&taken),
            "{precision:?}: {needed} needed, {taken} taken"
        );
    }
}

/// Stages of one executor that are alike take turns with the memory of what FP keeps.
#[test]
fn what_is_made_anew_is_the_same_to_the_bit_and_takes_less_memory() {
    if emulated::is_left_out() {
        return;
    }
    let cuts: Vec<(&'static str, usize)> =
        ["h.0.add_1", "h.0.add_2", "h.1.add_1", "h.1.add_2", "loss"].map(|last| (last, 0)).to_vec();
    for (precision, dag) in [(Precision::F32, model(16, 0.1)), (Precision::Bf16, model(16, 0.0))] {
        let run = |recomputes| {
            let trial = Trial { precision, recomputes, ..Trial::new(&dag).cut(&cuts) };
            let emulated = Arc::new(Emulated::default());
            let gpu = Arc::clone(&emulated) as Arc<dyn Gpu>;
            (trial.run(2, &|spec| executor(spec, &gpu)), emulated.most_taken())
        };
        let ((kept, kept_bytes), (anew, anew_bytes)) = (run(false), run(true));
        assert_eq!(anew, kept);
        assert!(anew_bytes < kept_bytes, "{precision:?}: {anew_bytes} of {kept_bytes}");
    }
}

#[test]
fn pieces_of_gradients_are_added_to_the_bit_wherever_they_begin() {
    if emulated::is_left_out() {
        return;
    }
    let dag = model(16, 0.0);
    let gpu = Emulated::open();
    let mut executors = Trial::new(&dag).executors(&|spec| executor(spec, &gpu));
    let held = &mut executors[0];
    let param = dag.find_param("transformer.wte.weight").unwrap();
    let all = 0..dag.param(param).shape.iter().product::<usize>();
    let mut sum: Vec<f32> = all.clone().map(|i| (i as f32 - 700.5) / 3.0).collect();
    sum[..8].copy_from_slice(&[-0.0, 0.0, -0.0, 1e-42, f32::MIN_POSITIVE, -1e30, 0.1, -0.1]);
    held.set_gradient(param, 0, sum.clone()).unwrap();
    for (start, count) in [(1, 1), (3, 7), (5, 1030), (6, 2), (1027, 3), (all.end - 1, 1), (0, all.end)] {
        let piece: Vec<f32> = (0..count).map(|i| (i as f32 + 0.3) * 1.7e-3 - start as f32).collect();
        sum[start..start + count].iter_mut().zip(&piece).for_each(|(sum, piece)| *sum += piece);
        held.add_gradient(param, start, piece).unwrap();
        let got = held.gradient(param, all.clone()).unwrap();
        let differs = got.iter().zip(&sum).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differs, None, "{count} from {start}");
    }
    let error = held.add_gradient(param, all.end - 1, vec![0.0; 2]).unwrap_err().to_string();
    assert!(error.contains("[97, 32]"), "{error}");
}

#[test]
fn an_id_beyond_the_table_is_refused() {
    if emulated::is_left_out() {
        return;
    }
    let dag = model(16, 0.0);
    let trial = Trial::new(&dag);
    let gpu = Emulated::open();
    let mut executors = trial.executors(&|spec| executor(spec, &gpu));
    let mut inputs = trial.data(0, 0);
    let ids = HostTensor::new(vec![BATCH, SEQ], Values::I32(vec![VOCAB as i32; BATCH * SEQ])).unwrap();
    inputs.insert(dag.input().unwrap(), ids.into());
    let at = MicroBatch { step: 0, pass: Pass::Train, index: 0 };
    let error = executors[0].forward(StageId(0), at, inputs.into_iter().collect()).unwrap_err().to_string();
    assert!(error.contains("97") && error.contains("0 to 96"), "{error}");
}

/// Every op that trains, in ways that GPT-2 does not use them.
fn every_op() -> Arc<OpDag> {
    use fusionllm_graph::{
        ActivationFunction as Function, DType, DagBuilder, Init, OpKind, Param, Shape, WeightLayout,
    };
    let (dim, ids) = (48, Shape::batched(&[SEQ]));
    let mut dag = DagBuilder::new("every-op");
    let input = dag.op("input", OpKind::Input { dtype: DType::I32, shape: ids.clone() }, &[], &[]).unwrap();
    let label = dag.op("label", OpKind::Label { shape: ids }, &[], &[]).unwrap();
    let param = |dag: &mut DagBuilder, name: &str, shape: &[usize]| {
        let (shape, init) = (shape.to_vec(), Init::Normal { std: 0.2 });
        dag.param(Param { name: name.to_owned(), shape, init, decay: name.len().is_multiple_of(2), frozen: false })
            .unwrap()
    };
    let linear = |dag: &mut DagBuilder, name: &str, from: OpId, [inputs, outputs]: [usize; 2], layout, bias| {
        let shape = if layout == WeightLayout::InOut { [inputs, outputs] } else { [outputs, inputs] };
        let mut params = vec![param(dag, &format!("{name}.weight"), &shape)];
        if bias {
            params.push(param(dag, &format!("{name}.bias"), &[outputs]));
        }
        dag.op(name, OpKind::Linear { inputs, outputs, bias, layout }, &[from], &params).unwrap()
    };
    let act = |dag: &mut DagBuilder, name: &str, from: OpId, function| {
        dag.op(name, OpKind::Activation { function }, &[from], &[]).unwrap()
    };
    let table = param(&mut dag, "table", &[VOCAB, dim]);
    let looked_up = dag.op("wte", OpKind::Embedding { vocab: VOCAB, dim }, &[input], &[table]).unwrap();
    let positions = param(&mut dag, "positions", &[32, dim]);
    let x = dag.op("wpe", OpKind::Position { positions: 32, dim }, &[looked_up], &[positions]).unwrap();
    let packed = linear(&mut dag, "qkv", x, [dim, 3 * dim], WeightLayout::OutIn, true);
    let attended = dag.op("attn", OpKind::Attention { heads: 3, causal: false }, &[packed], &[]).unwrap();
    let kept = dag.op("keep", OpKind::Dropout { p: 0.0 }, &[attended], &[]).unwrap();
    let up = linear(&mut dag, "up", kept, [dim, dim], WeightLayout::InOut, false);
    let gate = linear(&mut dag, "gate", kept, [dim, dim], WeightLayout::OutIn, false);
    let (up, gate) = (act(&mut dag, "erf", up, Function::GeluErf), act(&mut dag, "silu", gate, Function::Silu));
    let gated = dag.op("gated", OpKind::Mul, &[up, gate], &[]).unwrap();
    let squared = dag.op("squared", OpKind::Mul, &[gated, gated], &[]).unwrap();
    let positive = act(&mut dag, "relu", squared, Function::Relu);
    let doubled = dag.op("doubled", OpKind::Add, &[positive, positive], &[]).unwrap();
    let sum = dag.op("sum", OpKind::Add, &[x, doubled], &[]).unwrap();
    let logits = linear(&mut dag, "head", sum, [dim, VOCAB], WeightLayout::InOut, true);
    dag.op("loss", OpKind::CrossEntropy, &[logits, label], &[]).unwrap();
    Arc::new(dag.build().unwrap())
}

#[test]
fn every_op_trains_as_on_the_cpu() {
    if emulated::is_left_out() {
        return;
    }
    let dag = every_op();
    let trial = Trial::new(&dag);
    let expected = trial.on_cpu(2);
    assert_close(&trial.on_gpu(2), &expected, 2e-5);
    let cut = Trial { defers: true, ..Trial::new(&dag).cut(&[("attn", 0), ("gated", 1), ("loss", 0)]) };
    assert_close(&cut.on_gpu(2), &expected, 2e-5);
    let bf16 = Trial { precision: Precision::Bf16, ..Trial::new(&dag) }.on_gpu(2);
    assert!(bf16.losses.iter().zip(&expected.losses).all(|(a, b)| (a - b).abs() < 2e-2 * b), "{:?}", bf16.losses);
}

#[test]
fn a_cut_before_the_loss_gives_nearly_the_same() {
    if emulated::is_left_out() {
        return;
    }
    // The logits' rows are filled up only where they do not leave the stage.
    let dag = model(16, 0.0);
    let (whole, cut) = (Trial::new(&dag), Trial::new(&dag).cut(&[("lm_head", 0), ("loss", 1)]));
    assert_close(&cut.on_gpu(2), &whole.on_gpu(2), 2e-5);
}

#[test]
fn each_kernel_computes_what_plain_loops_do() {
    if emulated::is_left_out() {
        return;
    }
    let faults = emulated::run_kernel_tests();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// The first GPU that computes in bf16, where there is one with all that it needs.
fn a_real_gpu() -> Option<Arc<dyn Gpu>> {
    let driver = Driver::open(0).ok().filter(Driver::has_bf16)?;
    Some(Arc::new(driver))
}

/// Only where there is a GPU; `benches/gpu` runs it there.
#[test]
fn a_real_gpu_trains_as_the_cpu_does() {
    let Some(gpu) = a_real_gpu() else { return };
    for (precision, dropout, width, relative) in [
        (Precision::F32, 0.0, 16, 2e-5),
        (Precision::F32, 0.1, 24, 2e-5),
        (Precision::F32, 0.0, 64, 2e-5),
        (Precision::Tf32, 0.0, 64, 2e-3),
        (Precision::Bf16, 0.0, 24, 2e-2),
        (Precision::Bf16, 0.1, 64, 2e-2),
        (Precision::Bf16, 0.0, 128, 2e-2),
    ] {
        let trial = Trial { precision, ..Trial::new(&model(width, dropout)) };
        let got = trial.run(3, &|spec| executor(spec, &gpu));
        let expected = trial.on_cpu(3);
        for (step, (a, b)) in got.losses.iter().zip(&expected.losses).enumerate() {
            assert!((a - b).abs() <= relative * b, "{precision:?}, heads of {width}, step {step}: {a} against {b}");
        }
        for (a, b) in got.norms.iter().zip(&expected.norms).take(1) {
            assert!((a - b).abs() <= 2.0 * relative * b, "{precision:?}, heads of {width}: norm {a} against {b}");
        }
    }
    any_cut_gives_the_same_bits_on(&gpu);
}
