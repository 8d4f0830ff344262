//! The executor on Burn: parameters, gradients and optimizer state of one CompNode, and its stages.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn_tensor::{Device, Tensor, TensorData};
use fusionllm_graph::{OpDag, OpId, Param, ParamId};
use fusionllm_planner::StageId;
use fusionllm_protocol::{Pass, TensorName};

use crate::backend::{ExecutorSpec, FirstParams, StageOps};
use crate::border::BorderTensor;
use crate::burn::gradients::{Gradients, Write};
use crate::burn::host::{self, to_scalar};
use crate::burn::kernels::fused;
use crate::burn::optimizer::{self, ParamState};
use crate::burn::owed::Owed;
use crate::burn::running::RunningMoments;
use crate::burn::stage::{BurnStage, Kept, StageContext};
use crate::executor::{Executor, LazyTensor, MicroBatch, NamedTensor, StageOutput, TensorSource, UpdateSpec};
use crate::params::{check_values, initial_values};
use crate::stop::StopFlag;
use crate::{CompNodeError, ExecutorError, OptimizerSpec};

/// Runs the stages of one CompNode on a Burn device.
#[derive(Debug)]
pub(super) struct BurnExecutor {
    dag: Arc<OpDag>,
    device: Device,
    on_cpu: bool,
    seed: u64,
    optimizer: OptimizerSpec,
    stages: BTreeMap<StageId, BurnStage>,
    /// Flat, without autodiff.
    params: BTreeMap<ParamId, Tensor<1>>,
    /// The same on the autodiff tape, those that are trained as its leaves; made anew after each UPDATE.
    leaves: BTreeMap<ParamId, Tensor<1>>,
    gradients: Gradients,
    /// Gradients that are to be added to those above.
    owed: Owed,
    /// What FP has found for running means and variances, which UPDATE moves.
    moments: RunningMoments,
    state: BTreeMap<ParamId, ParamState>,
    kept: BTreeMap<(StageId, u32), Kept>,
    stop: StopFlag,
}

impl BurnExecutor {
    /// An executor of these stages with initial parameters out of their seed. FP ends between two ops once `stop` is set.
    ///
    /// # Errors
    /// [`ExecutorError::Param`] if a parameter cannot be initialised.
    pub(super) fn new(spec: ExecutorSpec, device: Device, stop: StopFlag) -> Result<Self, ExecutorError> {
        let ExecutorSpec { dag, stages, params: held, optimizer, seed, first, precision: _ } = spec;
        let on_cpu = fused::is_cpu(&device);
        let build = |of: StageOps| {
            let stage = BurnStage::new(&dag, of.ops, of.leaving).deferring(of.deferring);
            (of.id, if on_cpu { stage.accumulating(&dag) } else { stage })
        };
        let stages = stages.into_iter().map(build).collect();
        let mut params = BTreeMap::new();
        for id in held {
            let values = match first {
                FirstParams::Drawn => initial_values(dag.param(id), seed)?,
                FirstParams::Imported => vec![0.0; dag.param(id).shape.iter().product()],
            };
            params.insert(id, flat(values, &device));
        }
        let mut executor = Self {
            dag,
            on_cpu,
            device,
            seed,
            optimizer,
            stages,
            params,
            leaves: BTreeMap::new(),
            gradients: Gradients::default(),
            owed: Owed::default(),
            moments: RunningMoments::default(),
            state: BTreeMap::new(),
            kept: BTreeMap::new(),
            stop,
        };
        executor.make_leaves();
        Ok(executor)
    }

    /// The ops whose tensors a stage needs from outside, and those whose tensors leave it.
    ///
    /// # Errors
    /// [`ExecutorError::Internal`] if the stage is not held here.
    pub(super) fn borders(&self, stage: StageId) -> Result<(Vec<OpId>, Vec<OpId>), ExecutorError> {
        let held = self.stage(stage)?;
        Ok((held.entering().iter().copied().collect(), held.leaving().to_vec()))
    }

    fn checked(&self, tensor: NamedTensor, shape: &[usize]) -> Result<Tensor<1>, ExecutorError> {
        check_values(&tensor, shape)?;
        Ok(flat(tensor.values, &self.device))
    }

    fn make_leaves(&mut self) {
        let leaf = |(&id, param): (&ParamId, &Tensor<1>)| {
            let constant = param.clone().autodiff();
            (id, if self.dag.param(id).frozen { constant } else { constant.require_grad() })
        };
        self.leaves = self.params.iter().map(leaf).collect();
    }

    fn stage(&self, stage: StageId) -> Result<&BurnStage, ExecutorError> {
        self.stages.get(&stage).ok_or_else(|| not_held(stage))
    }

    fn surroundings<'a>(&'a self, params: &'a BTreeMap<ParamId, Tensor<1>>) -> StageContext<'a> {
        StageContext { dag: &self.dag, device: &self.device, params, seed: self.seed, stop: &self.stop }
    }

    /// Makes all gradients that were put off.
    fn settle(&mut self) {
        let (owed, sums) = (&mut self.owed, &mut self.gradients);
        on_pool(self.on_cpu, || owed.settle().for_each(|(param, sum)| sums.add_term(param, sum)));
    }

    /// Holds a range of a parameter's elements against what is held here.
    fn check_range(&self, param: ParamId, range: Range<usize>) -> Result<(), ExecutorError> {
        if !self.params.contains_key(&param) {
            return Err(ExecutorError::Internal { what: format!("parameter {} is not held here", param.0) });
        }
        let Param { name, shape, .. } = self.dag.param(param);
        if range.start <= range.end && range.end <= shape.iter().product() {
            return Ok(());
        }
        Err(ExecutorError::Shape { op: name.clone(), expected: shape.clone(), got: vec![range.start, range.end] })
    }

    /// As [`Self::check_range`], of rows. Gives the elements of a row.
    fn check_rows(&self, param: ParamId, rows: &[u32]) -> Result<usize, ExecutorError> {
        let columns = self.dag.param(param).shape.iter().skip(1).product();
        let end = rows.iter().max().map_or(0, |&row| (row as usize + 1) * columns);
        self.check_range(param, 0..end)?;
        Ok(columns)
    }

    fn write(&mut self, param: ParamId, start: usize, values: Vec<f32>, how: Write) -> Result<(), ExecutorError> {
        let Self { params, gradients, on_cpu, .. } = self;
        if let Some(held) = params.get(&param) {
            on_pool(*on_cpu, || gradients.write(param, held, start, values, how));
        }
        Ok(())
    }
}

impl Executor for BurnExecutor {
    fn forward(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<StageOutput, ExecutorError> {
        let training = micro_batch.pass == Pass::Train;
        let held = self.stage(stage)?;
        for &op in held.entering() {
            if !inputs.iter().any(|(id, _)| *id == op) {
                let input = self.dag.op(op).name.clone();
                return Err(ExecutorError::MissingInput { op: stage.to_string(), input });
            }
        }
        let params = if training { &self.leaves } else { &self.params };
        let around = self.surroundings(params);
        let (output, mut kept) = on_pool(self.on_cpu, || held.forward(around, micro_batch, inputs, training))?;
        if training {
            self.moments.found(micro_batch.index, std::mem::take(&mut kept.moments));
            self.kept.insert((stage, micro_batch.index), kept);
        }
        Ok(output)
    }

    fn backward(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        gradients: Vec<(OpId, BorderTensor)>,
        loss_scale: f64,
    ) -> Result<Vec<(OpId, BorderTensor)>, ExecutorError> {
        let kept = self.kept.remove(&(stage, micro_batch.index)).ok_or_else(|| ExecutorError::Internal {
            what: format!("BP of micro-batch {} at {stage} came before its FP", micro_batch.index),
        })?;
        let Self { dag, device, on_cpu, seed, stages, leaves, gradients: sums, owed, stop, .. } = self;
        let around = StageContext { dag, device, params: leaves, seed: *seed, stop };
        let held = stages.get(&stage).ok_or_else(|| not_held(stage))?;
        for (param, sum) in held.sums() {
            sum.put(sums.take_cpu(*param));
        }
        let result = on_pool(*on_cpu, || held.backward(around, kept, gradients, loss_scale))?;
        for (param, sum) in held.sums() {
            sums.put_cpu(*param, sum.take());
        }
        let elements = |param| dag.param(param).shape.iter().product();
        on_pool(*on_cpu, || sums.add(result.params, result.lookups, &result.asides, elements));
        let weight = |op: OpId| dag.op(op).params.first().copied();
        let put_off = result.owed.into_iter().filter_map(|(op, gradient)| Some((op, weight(op)?, gradient)));
        owed.put_off(stage, micro_batch.index, put_off);
        Ok(result.inputs)
    }

    fn owes(&self) -> Option<(StageId, u32)> {
        self.owed.oldest()
    }

    fn make_up(&mut self) -> Result<(), ExecutorError> {
        on_pool(self.on_cpu, || self.owed.make_up());
        Ok(())
    }

    fn looked_up(&self, param: ParamId) -> Vec<u32> {
        self.gradients.touched(param)
    }

    fn gradient(&mut self, param: ParamId, range: Range<usize>) -> Result<Vec<f32>, ExecutorError> {
        if self.owed.concerns(param) {
            self.settle();
        }
        self.check_range(param, range.clone())?;
        self.gradients.read(param, range)
    }

    fn gradient_of_rows(&mut self, param: ParamId, rows: &[u32]) -> Result<Vec<f32>, ExecutorError> {
        if self.owed.concerns(param) {
            self.settle();
        }
        let columns = self.check_rows(param, rows)?;
        self.gradients.read_rows(param, rows, columns)
    }

    fn set_gradient(&mut self, param: ParamId, start: usize, values: Vec<f32>) -> Result<(), ExecutorError> {
        self.check_range(param, start..start + values.len())?;
        self.write(param, start, values, Write::Replace)
    }

    fn add_gradient(&mut self, param: ParamId, start: usize, values: Vec<f32>) -> Result<(), ExecutorError> {
        self.check_range(param, start..start + values.len())?;
        self.write(param, start, values, Write::Add)
    }

    fn add_gradient_rows(&mut self, param: ParamId, rows: &[u32], values: Vec<f32>) -> Result<(), ExecutorError> {
        let columns = self.check_rows(param, rows)?;
        if values.len() != rows.len() * columns {
            let (op, got) = (self.dag.param(param).name.clone(), vec![values.len()]);
            return Err(ExecutorError::Shape { op, expected: vec![rows.len(), columns], got });
        }
        let Self { params, gradients, on_cpu, .. } = self;
        if let Some(held) = params.get(&param) {
            on_pool(*on_cpu, || gradients.add_rows(param, held, rows, values));
        }
        Ok(())
    }

    fn squared_norm(&mut self, params: &[ParamId]) -> Result<f64, ExecutorError> {
        self.settle();
        let (gradients, held) = (&mut self.gradients, &self.params);
        on_pool(self.on_cpu, || {
            let gradients = gradients.whole(held);
            let mut sum = 0.0;
            for param in params {
                if let Some(gradient) = gradients.get(param) {
                    sum += match fused::sum_of_squares(gradient) {
                        Some(squares) => squares,
                        None => to_scalar(gradient.clone().square().sum())?,
                    };
                }
            }
            Ok(sum)
        })
    }

    fn update(&mut self, spec: UpdateSpec) -> Result<(), ExecutorError> {
        self.settle();
        // The leaves share memory with the parameters: without them the optimizer may work in place.
        self.leaves.clear();
        let gradients = self.gradients.take(&self.params);
        let (params, states) = (&mut self.params, &mut self.state);
        on_pool(self.on_cpu, || {
            for (id, gradient) in gradients {
                let Some(param) = params.remove(&id) else { continue };
                let decay = self.dag.param(id).decay;
                let state = states.entry(id).or_default();
                let param = optimizer::step(&self.optimizer, param, gradient, state, decay, spec);
                params.insert(id, param);
            }
        });
        let moved = self.moments.take(&self.dag, |param| {
            let missing = || ExecutorError::Internal { what: format!("parameter {} is not held here", param.0) };
            host::to_vec(self.params.get(&param).cloned().ok_or_else(missing)?)
        })?;
        self.params.extend(moved.into_iter().map(|(param, values)| (param, flat(values, &self.device))));
        self.make_leaves();
        self.device.sync().map_err(|e| ExecutorError::Device { reason: format!("{e:?}") })
    }

    fn import(&mut self, tensors: &mut dyn TensorSource) -> Result<(), CompNodeError> {
        self.moments.forget();
        let ids: Vec<ParamId> = self.params.keys().copied().collect();
        for id in ids {
            let (name, shape) = (self.dag.param(id).name.clone(), self.dag.param(id).shape.clone());
            let missing = || ExecutorError::Param { name: name.clone(), reason: "not among the weights".to_owned() };
            let tensor = tensors.take(&name)?.ok_or_else(missing)?;
            // The memory of the old values is for the new ones.
            self.leaves.remove(&id);
            self.params.insert(id, self.checked(tensor, &shape)?);
            if self.dag.param(id).frozen {
                continue;
            }
            let mut state = ParamState::new();
            // What it does not use would be stored on and on.
            for &kind in self.optimizer.states() {
                let stored = TensorName::State { kind, param: &name }.to_string();
                if let Some(tensor) = tensors.take(&stored)? {
                    state.insert(kind, self.checked(tensor, &shape)?);
                }
            }
            self.state.insert(id, state);
        }
        self.make_leaves();
        Ok(())
    }

    fn export(&self) -> Vec<LazyTensor<'_>> {
        let mut tensors = Vec::new();
        for (&id, param) in &self.params {
            let Param { name, shape, .. } = self.dag.param(id);
            let lazy = |name: String, tensor: &Tensor<1>| {
                let tensor = tensor.clone();
                LazyTensor::new(name, shape.clone(), move |see| host::look(tensor, see))
            };
            for (&kind, tensor) in self.state.get(&id).into_iter().flatten() {
                tensors.push(lazy(TensorName::State { kind, param: name }.to_string(), tensor));
            }
            tensors.push(lazy(name.clone(), param));
        }
        tensors
    }

    fn live(&self) -> usize {
        let mut by_stage: BTreeMap<StageId, usize> = BTreeMap::new();
        for (stage, _) in self.kept.keys() {
            *by_stage.entry(*stage).or_default() += 1;
        }
        by_stage.into_values().max().unwrap_or(0)
    }
}

fn not_held(stage: StageId) -> ExecutorError {
    ExecutorError::Internal { what: format!("{stage} is not held on this CompNode") }
}

/// Runs `compute` on a worker of the thread pool if that is what computes: its parallel loops then need not be handed
/// over one by one.
fn on_pool<T: Send>(on_cpu: bool, compute: impl FnOnce() -> T + Send) -> T {
    if on_cpu { rayon::scope(|_| compute()) } else { compute() }
}

fn flat(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}
