//! Runs plans on a device.

mod borders;
mod run;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use fusionllm_graph::{OpDag, OpId, ParamId};
use fusionllm_planner::StageId;
use fusionllm_protocol::{Pass, Precision, StateKind};

use super::angles::Angles;
use super::gpu::{Buffer, Element, Gpu};
use super::kernel;
use super::layout::Layout;
use super::plan::{PlanSpec, StagePlan, Value};
use super::store::DeviceParams;
use crate::ExecutorError;
use crate::backend::{ExecutorSpec, FirstParams, StageOps};
use crate::border::BorderTensor;
use crate::executor::{
    Executor, Gradients, MicroBatch, Params, StageOutput, UpdateSpec, Write, check_filled_rows, check_range,
    check_rows, most_live,
};
use crate::params::initial_values;
use crate::seeds::Seeds;
use crate::stop::StopFlag;

/// Runs the stages of one CompNode on an NVIDIA device.
#[derive(Debug)]
pub(super) struct CudaExecutor {
    dag: Arc<OpDag>,
    gpu: Arc<dyn Gpu>,
    precision: Precision,
    seeds: Seeds,
    stages: BTreeMap<StageId, StageOps>,
    store: DeviceParams,
    angles: Angles,
    plans: BTreeMap<PlanKey, Arc<StagePlan>>,
    scratch: Buffer,
    /// Slots that no micro-batch has, by their bytes: stages and pieces of one size share them.
    slots: BTreeMap<usize, Vec<Buffer>>,
    live: BTreeMap<(StageId, u32), Live>,
    owed: VecDeque<Owing>,
    stop: StopFlag,
}

/// What a plan is for: a stage, the rows of its micro-batches, and what they are for.
type PlanKey = (StageId, usize, Pass);

/// A micro-batch between FP and BP.
#[derive(Debug)]
struct Live {
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
        let ExecutorSpec { dag, stages, params, optimizer, seeds, first, precision } = spec;
        let layout = Layout::new(&dag, params.iter().copied());
        let mut store = DeviceParams::new(gpu, &dag, layout, precision, optimizer)?;
        if first == FirstParams::Drawn {
            for &id in &params {
                store.set(id, &initial_values(dag.param(id), seeds.of_param(&dag, id))?)?;
            }
        }
        let angles = Angles::new(gpu, &dag, stages.iter().flat_map(|stage| stage.ops.iter().copied()))?;
        gpu.prepare(&[kernel::CHUNK_SQUARES, kernel::ADAMW, kernel::ADD_ROWS, kernel::ADD.of(Element::F32)])?;
        Ok(Self {
            dag,
            gpu: Arc::clone(gpu),
            precision,
            seeds,
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
        let held = self.stages.get(&stage).ok_or_else(|| ExecutorError::stage_not_held(stage))?;
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
    fn slot(&mut self, bytes: usize) -> Result<Buffer, ExecutorError> {
        match self.slots.get_mut(&bytes).and_then(Vec::pop) {
            Some(slot) => Ok(slot),
            None => Buffer::take(&self.gpu, bytes),
        }
    }

    fn give_back(&mut self, slot: Buffer) {
        self.slots.entry(slot.bytes()).or_default().push(slot);
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
}

impl Params for CudaExecutor {
    fn dag(&self) -> &Arc<OpDag> {
        &self.dag
    }

    fn held(&self) -> Vec<ParamId> {
        self.store.layout().iter().map(|(id, _)| id).collect()
    }

    fn holds(&self, param: ParamId) -> bool {
        self.store.layout().get(param).is_some()
    }

    fn states(&self) -> &'static [StateKind] {
        self.store.optimizer().states()
    }

    fn has_state(&self, _param: ParamId, _kind: StateKind) -> bool {
        self.store.has_state()
    }

    fn look(&self, param: ParamId, state: Option<StateKind>, see: &mut dyn FnMut(&[f32])) -> Result<(), ExecutorError> {
        see(&self.store.values(param, state)?);
        Ok(())
    }

    fn begin_import(&mut self) -> Result<(), ExecutorError> {
        self.store.forget_state()
    }

    fn put(&mut self, param: ParamId, values: Vec<f32>) -> Result<(), ExecutorError> {
        self.store.set(param, &values)
    }

    fn put_state(&mut self, param: ParamId, kind: StateKind, values: Vec<f32>) -> Result<(), ExecutorError> {
        self.store.set_state(param, kind, &values)
    }
}

impl Gradients for CudaExecutor {
    fn looked_up(&self, param: ParamId) -> Vec<u32> {
        self.store.looked_up(param)
    }

    fn gradient(&mut self, param: ParamId, range: Range<usize>) -> Result<Vec<f32>, ExecutorError> {
        check_range(self, param, &range)?;
        self.settle_if_owed(param)?;
        self.store.gradient(&self.dag, param, range)
    }

    fn gradient_of_rows(&mut self, param: ParamId, rows: &[u32]) -> Result<Vec<f32>, ExecutorError> {
        check_rows(self, param, rows)?;
        self.settle_if_owed(param)?;
        self.store.gradient_of_rows(&self.dag, param, rows)
    }

    fn set_gradient(&mut self, param: ParamId, start: usize, values: Vec<f32>) -> Result<(), ExecutorError> {
        check_range(self, param, &(start..start + values.len()))?;
        self.settle_if_owed(param)?;
        self.store.write_gradient(&self.dag, param, start, &values, Write::Replace)
    }

    fn add_gradient(&mut self, param: ParamId, start: usize, values: Vec<f32>) -> Result<(), ExecutorError> {
        check_range(self, param, &(start..start + values.len()))?;
        self.store.write_gradient(&self.dag, param, start, &values, Write::Add)
    }

    fn add_gradient_rows(&mut self, param: ParamId, rows: &[u32], values: Vec<f32>) -> Result<(), ExecutorError> {
        check_filled_rows(self, param, rows, values.len())?;
        self.store.add_gradient_rows(&self.dag, param, rows, &values)
    }

    fn squared_norm(&mut self, params: &[ParamId]) -> Result<f64, ExecutorError> {
        self.settle()?;
        Ok(self.store.squares(&self.dag, params)?.into_iter().sum())
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
        let slot = self.slot(plan.slot_bytes)?;
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
                self.live.insert((stage, micro_batch.index), Live { plan, slot, context });
            }
            _ => self.give_back(slot),
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
        let live = self.live.remove(&(stage, micro_batch.index));
        let mut live = live.ok_or_else(|| ExecutorError::before_fp(stage, micro_batch.index))?;
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
            self.give_back(live.slot);
        } else {
            self.owed.push_back(Owing { stage, live, made: 0 });
        }
        Ok(result)
    }

    fn forward_alone(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<StageOutput, ExecutorError> {
        let output = self.forward(stage, micro_batch, inputs)?;
        if let Some(live) = self.live.remove(&(stage, micro_batch.index)) {
            self.give_back(live.slot);
        }
        Ok(output)
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
            self.give_back(done.live.slot);
        }
        Ok(())
    }

    fn update(&mut self, spec: UpdateSpec) -> Result<(), ExecutorError> {
        self.settle()?;
        self.store.update(&self.dag, spec)
    }

    fn live(&self) -> usize {
        most_live(self.live.keys().map(|(stage, _)| *stage))
    }
}
