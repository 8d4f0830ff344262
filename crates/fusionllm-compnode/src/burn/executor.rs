//! The executor on Burn: parameters, gradients and optimizer state of one CompNode, and its stages.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn_tensor::{Device, Tensor, TensorData};
use fusionllm_graph::{OpDag, OpId, ParamId};
use fusionllm_planner::StageId;
use fusionllm_protocol::{Pass, StateKind};

use crate::backend::{ExecutorSpec, FirstParams, StageOps};
use crate::border::BorderTensor;
use crate::burn::gradients::GradientSums;
use crate::burn::host::{self, to_scalar};
use crate::burn::kernels::fused;
use crate::burn::optimizer::{self, ParamState};
use crate::burn::owed::Owed;
use crate::burn::running::RunningMoments;
use crate::burn::stage::{BurnStage, Kept, Mode, StageContext};
use crate::executor::{
    Executor, Gradients, MicroBatch, Params, StageOutput, UpdateSpec, Write, check_filled_rows, check_range,
    check_rows, most_live,
};
use crate::params::initial_values;
use crate::seeds::Seeds;
use crate::stop::StopFlag;
use crate::{ExecutorError, OptimizerSpec};

/// Runs the stages of one CompNode on a Burn device.
#[derive(Debug)]
pub(super) struct BurnExecutor {
    dag: Arc<OpDag>,
    device: Device,
    on_cpu: bool,
    seeds: Seeds,
    optimizer: OptimizerSpec,
    stages: BTreeMap<StageId, BurnStage>,
    /// Flat, without autodiff.
    params: BTreeMap<ParamId, Tensor<1>>,
    /// The same on the autodiff tape, those that are trained as its leaves; made anew after each UPDATE.
    leaves: BTreeMap<ParamId, Tensor<1>>,
    gradients: GradientSums,
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
        let ExecutorSpec { dag, stages, params: held, optimizer, seeds, first, precision: _ } = spec;
        let on_cpu = fused::is_cpu(&device);
        let build = |of: StageOps| {
            let stage = BurnStage::new(&dag, of.ops, of.leaving).deferring(of.deferring);
            (of.id, if on_cpu { stage.accumulating(&dag) } else { stage })
        };
        let stages = stages.into_iter().map(build).collect();
        let mut params = BTreeMap::new();
        for id in held {
            let values = match first {
                FirstParams::Drawn => initial_values(dag.param(id), seeds.of_param(&dag, id))?,
                FirstParams::Imported => vec![0.0; dag.param(id).shape.iter().product()],
            };
            params.insert(id, flat(values, &device));
        }
        let mut executor = Self {
            dag,
            on_cpu,
            device,
            seeds,
            optimizer,
            stages,
            params,
            leaves: BTreeMap::new(),
            gradients: GradientSums::default(),
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

    fn make_leaves(&mut self) {
        let leaf = |(&id, param): (&ParamId, &Tensor<1>)| {
            let constant = param.clone().autodiff();
            (id, if self.dag.param(id).frozen { constant } else { constant.require_grad() })
        };
        self.leaves = self.params.iter().map(leaf).collect();
    }

    fn stage(&self, stage: StageId) -> Result<&BurnStage, ExecutorError> {
        self.stages.get(&stage).ok_or_else(|| ExecutorError::stage_not_held(stage))
    }

    fn surroundings<'a>(&'a self, params: &'a BTreeMap<ParamId, Tensor<1>>) -> StageContext<'a> {
        StageContext { dag: &self.dag, device: &self.device, params, seeds: &self.seeds, stop: &self.stop }
    }

    /// Makes all gradients that were put off.
    fn settle(&mut self) {
        let (owed, sums) = (&mut self.owed, &mut self.gradients);
        on_pool(self.on_cpu, || owed.settle().for_each(|(param, sum)| sums.add_term(param, sum)));
    }

    fn run_forward(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
        mode: Mode,
    ) -> Result<StageOutput, ExecutorError> {
        let held = self.stage(stage)?;
        for &op in held.entering() {
            if !inputs.iter().any(|(id, _)| *id == op) {
                let input = self.dag.op(op).name.clone();
                return Err(ExecutorError::MissingInput { op: stage.to_string(), input });
            }
        }
        let params = if mode == Mode::Train { &self.leaves } else { &self.params };
        let around = self.surroundings(params);
        let (output, mut kept) = on_pool(self.on_cpu, || held.forward(around, micro_batch, inputs, mode))?;
        self.moments.found(micro_batch.index, std::mem::take(&mut kept.moments));
        if mode == Mode::Train {
            self.kept.insert((stage, micro_batch.index), kept);
        }
        Ok(output)
    }

    fn write(&mut self, param: ParamId, start: usize, values: Vec<f32>, how: Write) -> Result<(), ExecutorError> {
        let Self { params, gradients, on_cpu, .. } = self;
        if let Some(held) = params.get(&param) {
            on_pool(*on_cpu, || gradients.write(param, held, start, values, how));
        }
        Ok(())
    }
}

impl Params for BurnExecutor {
    fn dag(&self) -> &Arc<OpDag> {
        &self.dag
    }

    fn held(&self) -> Vec<ParamId> {
        self.params.keys().copied().collect()
    }

    fn holds(&self, param: ParamId) -> bool {
        self.params.contains_key(&param)
    }

    fn states(&self) -> &'static [StateKind] {
        self.optimizer.states()
    }

    fn has_state(&self, param: ParamId, kind: StateKind) -> bool {
        self.state.get(&param).is_some_and(|state| state.contains_key(&kind))
    }

    fn look(&self, param: ParamId, state: Option<StateKind>, see: &mut dyn FnMut(&[f32])) -> Result<(), ExecutorError> {
        let tensor = match state {
            None => self.params.get(&param),
            Some(kind) => self.state.get(&param).and_then(|state| state.get(&kind)),
        };
        host::look(tensor.ok_or_else(|| ExecutorError::param_not_held(param))?.clone(), see)
    }

    fn begin_import(&mut self) -> Result<(), ExecutorError> {
        // The leaves share memory with the parameters: that of the old values is for the new ones.
        self.leaves.clear();
        self.state.clear();
        self.moments.forget();
        Ok(())
    }

    fn put(&mut self, param: ParamId, values: Vec<f32>) -> Result<(), ExecutorError> {
        self.params.insert(param, flat(values, &self.device));
        Ok(())
    }

    fn put_state(&mut self, param: ParamId, kind: StateKind, values: Vec<f32>) -> Result<(), ExecutorError> {
        self.state.entry(param).or_default().insert(kind, flat(values, &self.device));
        Ok(())
    }

    fn end_import(&mut self) {
        self.make_leaves();
    }
}

impl Gradients for BurnExecutor {
    fn looked_up(&self, param: ParamId) -> Vec<u32> {
        self.gradients.touched(param)
    }

    fn gradient(&mut self, param: ParamId, range: Range<usize>) -> Result<Vec<f32>, ExecutorError> {
        if self.owed.concerns(param) {
            self.settle();
        }
        check_range(self, param, &range)?;
        self.gradients.read(param, range)
    }

    fn gradient_of_rows(&mut self, param: ParamId, rows: &[u32]) -> Result<Vec<f32>, ExecutorError> {
        if self.owed.concerns(param) {
            self.settle();
        }
        let columns = check_rows(self, param, rows)?;
        self.gradients.read_rows(param, rows, columns)
    }

    fn set_gradient(&mut self, param: ParamId, start: usize, values: Vec<f32>) -> Result<(), ExecutorError> {
        check_range(self, param, &(start..start + values.len()))?;
        self.write(param, start, values, Write::Replace)
    }

    fn add_gradient(&mut self, param: ParamId, start: usize, values: Vec<f32>) -> Result<(), ExecutorError> {
        check_range(self, param, &(start..start + values.len()))?;
        self.write(param, start, values, Write::Add)
    }

    fn add_gradient_rows(&mut self, param: ParamId, rows: &[u32], values: Vec<f32>) -> Result<(), ExecutorError> {
        check_filled_rows(self, param, rows, values.len())?;
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
}

impl Executor for BurnExecutor {
    fn forward(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<StageOutput, ExecutorError> {
        let mode = if micro_batch.pass == Pass::Train { Mode::Train } else { Mode::Eval };
        self.run_forward(stage, micro_batch, inputs, mode)
    }

    fn forward_alone(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<StageOutput, ExecutorError> {
        self.run_forward(stage, micro_batch, inputs, Mode::TrainAlone)
    }

    fn backward(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        gradients: Vec<(OpId, BorderTensor)>,
        loss_scale: f64,
    ) -> Result<Vec<(OpId, BorderTensor)>, ExecutorError> {
        let kept = self.kept.remove(&(stage, micro_batch.index));
        let kept = kept.ok_or_else(|| ExecutorError::before_fp(stage, micro_batch.index))?;
        let Self { dag, device, on_cpu, seeds, stages, leaves, gradients: sums, owed, stop, .. } = self;
        let around = StageContext { dag, device, params: leaves, seeds, stop };
        let held = stages.get(&stage).ok_or_else(|| ExecutorError::stage_not_held(stage))?;
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

    fn live(&self) -> usize {
        most_live(self.kept.keys().map(|(stage, _)| *stage))
    }
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
