//! Runs a placement with one thread a CompNode and messages through memory, or over given wires.

use std::sync::{Arc, Mutex};
use std::thread;

use fusionllm_codec::{HostTensor, Values};
use fusionllm_compnode::{
    Batches, CompNodeError, DeviceChoice, Exchange, ExchangeError, ExecutorSpec, FirstParams, HeldState, JobSink,
    LazyTensor, Mailbox, MemoryExchange, NamedTensor, OptimizerSpec, OwnSeed, Seeds, StopFlag, TaskLoop, TrainPlan,
    by_name, open_device, write_shard_to,
};
use fusionllm_graph::{Gpt2Config, OpDag, gpt2};
use fusionllm_planner::{Cluster, NodeIndex, Placement, StageSpec, kept_ops, place};
use fusionllm_protocol::{JobSpec, JobView, StepReport, StepRules};

/// Sequences in a micro-batch of the tests' jobs.
pub(crate) const SEQ: usize = 16;
pub(crate) const VOCAB: usize = 96;

/// A small GPT-2: three blocks of width 32.
pub(crate) fn small_gpt2(dropout: f64) -> OpDag {
    let config = Gpt2Config {
        vocab_size: VOCAB,
        n_positions: 32,
        n_embd: 32,
        n_layer: 3,
        n_head: 4,
        layer_norm_epsilon: 1e-5,
        dropout,
    };
    gpt2(&config, SEQ).unwrap()
}

/// A job of `train` settings over data that the tests make themselves.
pub(crate) fn job(train: &str) -> JobSpec {
    let text = format!("[model]\nname = \"gpt2\"\n[data]\npath = \"unused\"\nseq_len = {SEQ}\n[train]\n{train}");
    JobSpec::from_toml(&text, &[]).unwrap()
}

pub(crate) fn stages(list: &[(u32, &str)]) -> Vec<StageSpec> {
    list.iter().map(|&(compnode, last_op)| StageSpec { compnode, last_op: last_op.to_owned() }).collect()
}

/// Places `dag` over `compnodes` as the job says.
pub(crate) fn placed(dag: &OpDag, spec: &JobSpec, compnodes: usize) -> Placement {
    place(dag, &Cluster::uniform(compnodes), &spec.placement_spec()).unwrap()
}

/// Learnable sequences: each token's label is a function of it, but for some noise.
#[derive(Clone)]
pub(crate) struct Synthetic {
    pub(crate) micro_batch_size: usize,
}

impl Synthetic {
    fn batch(&self, seed: u64) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let count = self.micro_batch_size * SEQ;
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut draw = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as usize
        };
        let inputs: Vec<i32> = (0..count).map(|_| (draw() % VOCAB) as i32).collect();
        let labels = inputs.iter().map(|&i| (3 * i + 1 + i32::from(draw() % 8 == 0)) % VOCAB as i32).collect();
        let tensor = |ids| HostTensor::new(vec![self.micro_batch_size, SEQ], Values::I32(ids)).unwrap();
        Ok((tensor(inputs), tensor(labels)))
    }
}

impl Batches for Synthetic {
    fn train(&self, step: u64, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        self.batch(1 + step * 1000 + u64::from(index))
    }

    fn eval(&self, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        self.batch(1_000_000 + u64::from(index))
    }
}

/// What one CompNode reported.
#[derive(Clone, Default)]
pub(crate) struct Log {
    pub(crate) reports: Vec<StepReport>,
    pub(crate) checkpoints: Vec<(u64, Vec<NamedTensor>)>,
    /// Called after each step; checkpoints are written to nowhere then.
    pub(crate) watcher: Option<fn(u64)>,
}

impl JobSink for Log {
    fn step(&mut self, report: StepReport) -> Result<(), CompNodeError> {
        if let Some(watcher) = self.watcher {
            watcher(report.step);
        }
        self.reports.push(report);
        Ok(())
    }

    fn checkpoint(&mut self, step: u64, state: &mut dyn HeldState) -> Result<(), CompNodeError> {
        let tensors = state.tensors()?;
        if self.watcher.is_some() {
            write_shard_to(&mut std::io::sink(), "nowhere".as_ref(), tensors)?;
            return Ok(());
        }
        let tensors: Result<_, _> = tensors.into_iter().map(LazyTensor::read).collect();
        self.checkpoints.push((step, tensors?));
        Ok(())
    }
}

/// A run in the making.
pub(crate) struct Run {
    pub(crate) dag: Arc<OpDag>,
    pub(crate) spec: JobSpec,
    pub(crate) placement: Placement,
    pub(crate) weights: Option<Vec<NamedTensor>>,
    pub(crate) start_step: u64,
    /// The seed that the data owner alone has.
    pub(crate) own: Option<[u8; 32]>,
}

/// What came of it, by CompNode.
pub(crate) struct Outcome {
    pub(crate) logs: Vec<Log>,
}

impl Outcome {
    pub(crate) fn losses(&self) -> Vec<f64> {
        self.logs.iter().flat_map(|l| &l.reports).filter_map(|r| r.loss).collect()
    }

    pub(crate) fn eval_losses(&self) -> Vec<f64> {
        self.logs.iter().flat_map(|l| &l.reports).filter_map(|r| r.eval_loss).collect()
    }

    pub(crate) fn norms(&self) -> Vec<f64> {
        self.logs[0].reports.iter().filter_map(|r| r.grad_norm).collect()
    }

    /// Every tensor of the checkpoint after `step` updates, from all CompNodes.
    pub(crate) fn checkpoint(&self, step: u64) -> Vec<NamedTensor> {
        let all = self.logs.iter().flat_map(|l| &l.checkpoints).filter(|(s, _)| *s == step);
        all.flat_map(|(_, tensors)| tensors.clone()).collect()
    }
}

impl Run {
    pub(crate) fn new(dag: OpDag, spec: JobSpec, compnodes: usize) -> Self {
        let placement = placed(&dag, &spec, compnodes);
        Self { dag: Arc::new(dag), spec, placement, weights: None, start_step: 0, own: None }
    }

    /// Runs it on synthetic data.
    pub(crate) fn synthetic(self) -> Outcome {
        let micro_batch_size = self.spec.micro_batch_size() as usize;
        self.on(&Synthetic { micro_batch_size })
    }

    /// Runs it on synthetic data without keeping checkpoints; `watcher` is called by every CompNode after each step.
    pub(crate) fn watched(self, watcher: fn(u64)) -> Outcome {
        let micro_batch_size = self.spec.micro_batch_size() as usize;
        self.run(&Synthetic { micro_batch_size }, Some(watcher))
    }

    /// Runs it on given data.
    pub(crate) fn on<B: Batches + Clone + 'static>(self, batches: &B) -> Outcome {
        self.run(batches, None)
    }

    fn run<B: Batches + Clone + 'static>(self, batches: &B, watcher: Option<fn(u64)>) -> Outcome {
        let mailboxes: Vec<Arc<Mailbox>> = self.placement.compnodes.iter().map(|_| Arc::default()).collect();
        let exchange = |index: usize| {
            let (node, names) = (NodeIndex(index as u32), self.placement.compnodes.clone());
            let exchange = MemoryExchange::new(node, mailboxes.clone(), names, self.spec.compression.view()).unwrap();
            Box::new(exchange) as Box<dyn Exchange>
        };
        let exchanges = (0..mailboxes.len()).map(exchange).collect();
        let failed = || ExchangeError::Aborted { reason: "another CompNode failed".to_owned() };
        self.exchanging(exchanges, batches, watcher, &|| mailboxes.iter().for_each(|mailbox| mailbox.close(failed())))
    }

    /// Runs it over given wires, one a CompNode. `abort` lets the others end when one fails.
    pub(crate) fn exchanging<B: Batches + Clone + 'static>(
        &self,
        exchanges: Vec<Box<dyn Exchange>>,
        batches: &B,
        watcher: Option<fn(u64)>,
        abort: &(dyn Fn() + Sync),
    ) -> Outcome {
        let logs: Arc<Mutex<Vec<Log>>> = Arc::new(Mutex::new(vec![Log::default(); exchanges.len()]));
        thread::scope(|scope| {
            for (index, exchange) in exchanges.into_iter().enumerate() {
                let batches = (index == 0).then(|| Box::new(batches.clone()) as Box<dyn Batches>);
                let logs = Arc::clone(&logs);
                scope.spawn(move || {
                    let mut log = Log { watcher, ..Log::default() };
                    let result = self.compnode(NodeIndex(index as u32), exchange, batches).run(&mut log);
                    if result.is_err() {
                        abort();
                    }
                    result.unwrap();
                    logs.lock().unwrap()[index] = log;
                });
            }
        });
        let logs = logs.lock().unwrap().clone();
        Outcome { logs }
    }

    fn compnode(&self, node: NodeIndex, exchange: Box<dyn Exchange>, batches: Option<Box<dyn Batches>>) -> TaskLoop {
        let backend = open_device(DeviceChoice::Cpu).unwrap();
        let optimizer = OptimizerSpec::of(&self.spec.train.view());
        let (dag, seed) = (Arc::clone(&self.dag), self.spec.train.seed);
        let seeds = match self.own.filter(|_| node == NodeIndex::DATA_OWNER) {
            Some(own) => {
                let kept = kept_ops(&dag, self.spec.data.keep_blocks).unwrap();
                Seeds::with_own(seed, OwnSeed::from_bytes(own), kept)
            }
            None => seed.into(),
        };
        let first = FirstParams::Drawn;
        let spec = ExecutorSpec::of_placement(dag, &self.placement, node, optimizer, seeds, first);
        let mut executor = backend.build(spec, StopFlag::default()).unwrap();
        if let Some(weights) = &self.weights {
            executor.import(&mut by_name(weights.clone())).unwrap();
        }
        let plan = TrainPlan {
            residuals: Vec::new(),
            codecs: Default::default(),
            dag: Arc::clone(&self.dag),
            placement: Arc::new(self.placement.clone()),
            node,
            rules: StepRules::of(&JobView::of(&self.spec), self.start_step),
        };
        TaskLoop::new(plan, executor, exchange, batches)
    }
}

/// Asserts that two series agree within a relative difference.
pub(crate) fn assert_close(what: &str, got: &[f64], expected: &[f64], relative: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths");
    for (step, (a, b)) in got.iter().zip(expected).enumerate() {
        let difference = (a - b).abs() / b.abs().max(1e-12);
        assert!(difference <= relative, "{what}: step {step}: {a} against {b}, relative difference {difference:e}");
    }
}
