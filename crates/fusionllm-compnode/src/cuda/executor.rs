//! Runs plans on a device.

mod borders;
mod run;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use fusionllm_graph::{OpDag, OpId, Param, ParamId};
use fusionllm_planner::StageId;
use fusionllm_protocol::{Pass, Precision, StateKind, TensorName};

use super::angles::Angles;
use super::gpu::{Buffer, Element, Gpu};
use super::kernel;
use super::layout::Layout;
use super::plan::{PlanSpec, StagePlan, Value};
use super::store::Store;
use crate::backend::{ExecutorSpec, FirstParams, StageOps};
use crate::border::BorderTensor;
use crate::executor::{Executor, LazyTensor, MicroBatch, StageOutput, TensorSource, UpdateSpec};
use crate::params::{check_values, initial_values};
use crate::stop::StopFlag;
use crate::{CompNodeError, ExecutorError};

/// Runs the stages of one CompNode on an NVIDIA device.
#[derive(Debug)]
pub(super) struct CudaExecutor {
    dag: Arc<OpDag>,
    gpu: Arc<dyn Gpu>,
    precision: Precision,
    seed: u64,
    stages: BTreeMap<StageId, StageOps>,
    store: Store,
    angles: Angles,
    plans: BTreeMap<SlotKey, Arc<StagePlan>>,
    scratch: Buffer,
    /// Slots that no micro-batch has.
    slots: BTreeMap<SlotKey, Vec<Buffer>>,
    live: BTreeMap<(StageId, u32), Live>,
    owed: VecDeque<Owing>,
    stop: StopFlag,
}

/// What a slot is for: a stage, the rows of its micro-batches, and what they are for.
type SlotKey = (StageId, usize, Pass);

/// A micro-batch between FP and BP.
#[derive(Debug)]
struct Live {
    key: SlotKey,
    plan: Arc<StagePlan>,
    slot: Buffer,
    context: Context,
}

/// Gradients of weights that a BP has put off.
#[derive(Debug)]
struct Owing {
    stage: StageId,
    live: Live,
    /// Those of the plan that are made already.
    made: usize,
}

/// What the steps of a micro-batch depend on besides its tensors.
#[derive(Debug)]
struct Context {
    at: MicroBatch,
    loss_scale: f32,
    /// Rows of tables that lookups name, by op, ascending.
    rows: BTreeMap<OpId, Vec<u32>>,
}

impl CudaExecutor {
    /// An executor of these stages with parameters out of their seed, or of zeros that wait for their values.
    ///
    /// # Errors
    /// [`ExecutorError::Param`] if a parameter cannot be initialised, [`ExecutorError::Device`] if memory lacks.
    pub(super) fn new(spec: ExecutorSpec, gpu: &Arc<dyn Gpu>, stop: StopFlag) -> Result<Self, ExecutorError> {
        let ExecutorSpec { dag, stages, params, optimizer, seed, first, precision } = spec;
        let layout = Layout::new(&dag, params.iter().copied());
        let mut store = Store::new(gpu, &dag, layout, precision, optimizer)?;
        if first == FirstParams::Drawn {
            for &id in &params {
                store.set(id, &initial_values(dag.param(id), seed)?)?;
            }
        }
        let angles = Angles::new(gpu, &dag, stages.iter().flat_map(|stage| stage.ops.iter().copied()))?;
        gpu.prepare(&[kernel::CHUNK_SQUARES, kernel::ADAMW, kernel::ADD_ROWS])?;
        Ok(Self {
            dag,
            gpu: Arc::clone(gpu),
            precision,
            seed,
            stages: stages.into_iter().map(|stage| (stage.id, stage)).collect(),
            store,
            angles,
            plans: BTreeMap::new(),
            scratch: Buffer::take(gpu, 1)?,
            slots: BTreeMap::new(),
            live: BTreeMap::new(),
            owed: VecDeque::new(),
            stop,
        })
    }

    fn element(&self) -> Element {
        if self.precision == Precision::Bf16 { Element::Bf16 } else { Element::F32 }
    }

    fn plan(&mut self, stage: StageId, batch: usize, pass: Pass) -> Result<Arc<StagePlan>, ExecutorError> {
        if let Some(plan) = self.plans.get(&(stage, batch, pass)) {
            return Ok(Arc::clone(plan));
        }
        let held = self
            .stages
            .get(&stage)
            .ok_or_else(|| ExecutorError::Internal { what: format!("{stage} is not held on this CompNode") })?;
        let (layout, training) = (self.store.layout(), pass == Pass::Train);
        let (dag, precision) = (&*self.dag, self.precision);
        let plan = StagePlan::new(PlanSpec { dag, stage: held, layout, precision, batch, training })?;
        self.gpu.prepare(&plan.kernels().into_iter().collect::<Vec<_>>())?;
        if plan.scratch_bytes > self.scratch.bytes() {
            self.scratch = Buffer::take(&self.gpu, plan.scratch_bytes)?;
        }
        let plan = Arc::new(plan);
        self.plans.insert((stage, batch, pass), Arc::clone(&plan));
        Ok(plan)
    }

    /// Memory for what a micro-batch keeps.
    fn slot(&mut self, key: SlotKey, bytes: usize) -> Result<Buffer, ExecutorError> {
        match self.slots.get_mut(&key).and_then(Vec::pop) {
            Some(slot) => Ok(slot),
            None => Buffer::take(&self.gpu, bytes),
        }
    }

    fn give_back(&mut self, key: SlotKey, slot: Buffer) {
        self.slots.entry(key).or_default().push(slot);
    }

    fn settle(&mut self) -> Result<(), ExecutorError> {
        while !self.owed.is_empty() {
            self.make_up()?;
        }
        Ok(())
    }

    fn settle_if_owed(&mut self, param: ParamId) -> Result<(), ExecutorError> {
        let owes = |o: &Owing| o.live.plan.put_off[o.made..].iter().any(|weight| weight.param == param);
        if self.owed.iter().any(owes) { self.settle() } else { Ok(()) }
    }

    /// Holds a range of the elements of a parameter's gradient against what is held here.
    fn check_range(&self, param: ParamId, range: &Range<usize>) -> Result<(), ExecutorError> {
        let held = self
            .store
            .layout()
            .get(param)
            .ok_or_else(|| ExecutorError::Internal { what: format!("parameter {} is not held here", param.0) })?;
        if self.dag.param(param).frozen {
            let what = format!("parameter {} is not trained, so it has no gradient", param.0);
            return Err(ExecutorError::Internal { what });
        }
        if range.start <= range.end && range.end <= held.elements {
            return Ok(());
        }
        let Param { name, shape, .. } = self.dag.param(param);
        Err(ExecutorError::Shape { op: name.clone(), expected: shape.clone(), got: vec![range.start, range.end] })
    }

    fn check_rows(&self, param: ParamId, rows: &[u32]) -> Result<usize, ExecutorError> {
        let columns = self.dag.param(param).shape.iter().skip(1).product();
        let end = rows.iter().max().map_or(0, |&row| (row as usize + 1) * columns);
        self.check_range(param, &(0..end))?;
        Ok(columns)
    }
}

impl Executor for CudaExecutor {
    fn forward(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<StageOutput, ExecutorError> {
        let batch = inputs.iter().find_map(|(_, tensor)| tensor.shape().first().copied()).unwrap_or(1);
        let plan = self.plan(stage, batch, micro_batch.pass)?;
        let key = (stage, batch, micro_batch.pass);
        let slot = self.slot(key, plan.slot_bytes)?;
        let rows = self.fill(&plan, &slot, inputs)?;
        let context = Context { at: micro_batch, loss_scale: 1.0, rows };
        self.run(&plan.forward, &slot, &context)?;
        let mut output = StageOutput::default();
        for &(op, value) in &plan.leaving {
            output.tensors.push(self.leave(op, value, &slot)?);
        }
        if let Some(place) = plan.loss {
            let mut bytes = [0; 4];
            self.gpu.download(self.address(place, &slot), &mut bytes)?;
            output.loss = Some(f64::from(f32::from_ne_bytes(bytes)));
        }
        match micro_batch.pass {
            Pass::Train => {
                self.live.insert((stage, micro_batch.index), Live { key, plan, slot, context });
            }
            _ => self.give_back(key, slot),
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
        let mut live = self.live.remove(&(stage, micro_batch.index)).ok_or_else(|| ExecutorError::Internal {
            what: format!("BP of micro-batch {} at {stage} came before its FP", micro_batch.index),
        })?;
        live.context.loss_scale = loss_scale as f32;
        self.seed(&live, gradients)?;
        self.run(&live.plan.backward, &live.slot, &live.context)?;
        for lookup in &live.plan.lookups {
            let rows = live.context.rows.get(&lookup.op).map(Vec::as_slice).unwrap_or_default();
            self.store.note_lookups(lookup.table, rows);
        }
        let leave = |&(op, value): &(OpId, Value)| self.leave(op, value, &live.slot);
        let result = live.plan.input_gradients.iter().map(leave).collect::<Result<_, _>>()?;
        if live.plan.put_off.is_empty() {
            self.give_back(live.key, live.slot);
        } else {
            self.owed.push_back(Owing { stage, live, made: 0 });
        }
        Ok(result)
    }

    fn owes(&self) -> Option<(StageId, u32)> {
        self.owed.front().map(|owing| (owing.stage, owing.live.context.at.index))
    }

    fn make_up(&mut self) -> Result<(), ExecutorError> {
        let Some(owing) = self.owed.front() else { return Ok(()) };
        if let Some(weight) = owing.live.plan.put_off.get(owing.made) {
            self.run(&weight.steps, &owing.live.slot, &owing.live.context)?;
            // More would stand before what comes next, which others wait for.
            self.gpu.sync()?;
        }
        if let Some(owing) = self.owed.front_mut() {
            owing.made += 1;
        }
        if let Some(done) = self.owed.pop_front_if(|owing| owing.made >= owing.live.plan.put_off.len()) {
            self.give_back(done.live.key, done.live.slot);
        }
        Ok(())
    }

    fn looked_up(&self, param: ParamId) -> Vec<u32> {
        self.store.looked_up(param)
    }

    fn gradient(&mut self, param: ParamId, range: Range<usize>) -> Result<Vec<f32>, ExecutorError> {
        self.check_range(param, &range)?;
        self.settle_if_owed(param)?;
        self.store.gradient(&self.dag, param, range)
    }

    fn gradient_of_rows(&mut self, param: ParamId, rows: &[u32]) -> Result<Vec<f32>, ExecutorError> {
        self.check_rows(param, rows)?;
        self.settle_if_owed(param)?;
        self.store.gradient_of_rows(&self.dag, param, rows)
    }

    fn set_gradient(&mut self, param: ParamId, start: usize, values: Vec<f32>) -> Result<(), ExecutorError> {
        self.check_range(param, &(start..start + values.len()))?;
        self.settle_if_owed(param)?;
        self.store.write_gradient(&self.dag, param, start, values, false)
    }

    fn add_gradient(&mut self, param: ParamId, start: usize, values: Vec<f32>) -> Result<(), ExecutorError> {
        self.check_range(param, &(start..start + values.len()))?;
        self.store.write_gradient(&self.dag, param, start, values, true)
    }

    fn add_gradient_rows(&mut self, param: ParamId, rows: &[u32], values: Vec<f32>) -> Result<(), ExecutorError> {
        let columns = self.check_rows(param, rows)?;
        if values.len() != rows.len() * columns {
            let (op, got) = (self.dag.param(param).name.clone(), vec![values.len()]);
            return Err(ExecutorError::Shape { op, expected: vec![rows.len(), columns], got });
        }
        self.store.add_gradient_rows(&self.dag, param, rows, &values)
    }

    fn squared_norm(&mut self, params: &[ParamId]) -> Result<f64, ExecutorError> {
        self.settle()?;
        Ok(self.store.squares(&self.dag, params)?.into_iter().sum())
    }

    fn update(&mut self, spec: UpdateSpec) -> Result<(), ExecutorError> {
        self.settle()?;
        self.store.update(&self.dag, spec)
    }

    fn import(&mut self, tensors: &mut dyn TensorSource) -> Result<(), CompNodeError> {
        let ids: Vec<ParamId> = self.store.layout().iter().map(|(id, _)| id).collect();
        self.store.without_state();
        for id in ids {
            let Param { name, shape, .. } = self.dag.param(id);
            let missing = || ExecutorError::Param { name: name.clone(), reason: "not among the weights".to_owned() };
            let tensor = tensors.take(name)?.ok_or_else(missing)?;
            check_values(&tensor, shape)?;
            self.store.set(id, &tensor.values)?;
            if self.dag.param(id).frozen {
                continue;
            }
            for kind in [StateKind::ExpAvg, StateKind::ExpAvgSq, StateKind::Momentum] {
                let stored = TensorName::State { kind, param: name }.to_string();
                let tensor = tensors.take(&stored)?;
                if let Some(tensor) = &tensor {
                    check_values(tensor, shape)?;
                }
                self.store.set_state(id, kind, tensor.as_ref().map(|tensor| tensor.values.as_slice()))?;
            }
        }
        Ok(())
    }

    fn export(&self) -> Vec<LazyTensor<'_>> {
        let mut tensors = Vec::new();
        for (id, _) in self.store.layout().iter() {
            let Param { name, shape, .. } = self.dag.param(id);
            let lazy = |name: String, kind: Option<StateKind>| {
                LazyTensor::new(name, shape.clone(), move |see| {
                    see(&self.store.values(id, kind)?);
                    Ok(())
                })
            };
            for kind in self.store.states().filter(|_| !self.dag.param(id).frozen) {
                tensors.push(lazy(TensorName::State { kind, param: name }.to_string(), Some(kind)));
            }
            tensors.push(lazy(name.clone(), None));
        }
        tensors
    }

    fn live(&self) -> usize {
        let mut by_stage: BTreeMap<StageId, usize> = BTreeMap::new();
        for (stage, _) in self.live.keys() {
            *by_stage.entry(*stage).or_default() += 1;
        }
        by_stage.into_values().max().unwrap_or(0)
    }
}
