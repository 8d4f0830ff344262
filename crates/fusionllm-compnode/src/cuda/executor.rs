//! Runs plans on a device.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use fusionllm_codec::Values;
use fusionllm_graph::{DType, OpDag, OpId, OpKind, Param, ParamId};
use fusionllm_planner::StageId;
use fusionllm_protocol::{Pass, Precision, StateKind, TensorName};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::gpu::{Buffer, Element, Gpu, Operands, Packed};
use super::kernel;
use super::layout::Layout;
use super::plan::{Argument, Entering, Factor, Lookup, Place, PlanSpec, Region, StagePlan, Step, Value};
use super::store::Store;
use super::tensor::CudaTensor;
use crate::backend::{ExecutorSpec, FirstParams, StageOps};
use crate::border::{BorderTensor, check_input};
use crate::executor::{Executor, LazyTensor, MicroBatch, StageOutput, TensorSource, UpdateSpec};
use crate::params::{check_values, initial_values, seed_for};
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
    plans: BTreeMap<(StageId, usize, Pass), Arc<StagePlan>>,
    scratch: Buffer,
    /// Slots that no micro-batch has.
    slots: Vec<Buffer>,
    live: BTreeMap<(StageId, u32), Live>,
    owed: VecDeque<Owing>,
    stop: StopFlag,
}

/// A micro-batch between FP and BP.
#[derive(Debug)]
struct Live {
    plan: Arc<StagePlan>,
    slot: Buffer,
    context: Context,
}

/// A micro-batch that is measured.
#[derive(Debug)]
pub(super) struct Probe(Live);

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
        gpu.prepare(&[kernel::CHUNK_SQUARES, kernel::ADAMW, kernel::ADD_ROWS])?;
        Ok(Self {
            dag,
            gpu: Arc::clone(gpu),
            precision,
            seed,
            stages: stages.into_iter().map(|stage| (stage.id, stage)).collect(),
            store,
            plans: BTreeMap::new(),
            scratch: Buffer::take(gpu, 1)?,
            slots: Vec::new(),
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
    fn slot(&mut self, bytes: usize) -> Result<Buffer, ExecutorError> {
        let fitting = self.slots.iter().enumerate().filter(|(_, slot)| slot.bytes() >= bytes);
        match fitting.min_by_key(|(_, slot)| slot.bytes()).map(|(index, _)| index) {
            Some(index) => Ok(self.slots.swap_remove(index)),
            None => Buffer::take(&self.gpu, bytes),
        }
    }

    /// Copies what enters to the slot, all integers in one go. Gives the rows that lookups name.
    fn fill(
        &self,
        plan: &StagePlan,
        slot: &Buffer,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<BTreeMap<OpId, Vec<u32>>, ExecutorError> {
        let mut inputs: BTreeMap<OpId, BorderTensor> = inputs.into_iter().collect();
        let mut integers = vec![0u8; plan.integer_bytes];
        let mut ids: BTreeMap<OpId, Vec<i32>> = BTreeMap::new();
        for &Entering { op, dtype, value } in &plan.entering {
            let missing = || ExecutorError::MissingInput {
                op: self.dag.op(op).name.clone(),
                input: "the tensor itself".to_owned(),
            };
            let tensor = inputs.remove(&op).ok_or_else(missing)?;
            check_input(&self.dag, op, &tensor)?;
            match dtype {
                DType::F32 => self.bring(tensor, slot.address() + value.place.offset as u64)?,
                DType::I32 => {
                    let Values::I32(numbers) = tensor.into_host()?.into_parts().1 else { return Err(missing()) };
                    self.check_ids(op, &numbers)?;
                    put(&mut integers, value.place, numbers.iter().map(|n| n.to_ne_bytes()));
                    ids.insert(op, numbers);
                }
            }
        }
        let mut rows = BTreeMap::new();
        for lookup in &plan.lookups {
            let named = ids.get(&lookup.ids).map(Vec::as_slice).unwrap_or_default();
            rows.insert(lookup.op, sort_lookup(&mut integers, lookup, named));
        }
        self.gpu.upload(slot.address(), &integers)?;
        Ok(rows)
    }

    /// Kernels trust that ids are rows of the table and labels columns of the logits.
    fn check_ids(&self, op: OpId, ids: &[i32]) -> Result<(), ExecutorError> {
        for &reader in self.dag.consumers(op) {
            let reader = self.dag.op(reader);
            let below = match (&reader.kind, reader.inputs.first()) {
                (OpKind::Embedding { vocab, .. }, _) => *vocab,
                (OpKind::CrossEntropy, Some(&logits)) => {
                    self.dag.op(logits).output.shape.resolve(1).last().copied().unwrap_or(0)
                }
                _ => continue,
            };
            if let Some(id) = ids.iter().find(|&&id| usize::try_from(id).is_ok_and(|id| id < below) == false) {
                let what = format!(
                    "`{}` has {id} for `{}`, which knows 0 to {}",
                    self.dag.op(op).name,
                    reader.name,
                    below.saturating_sub(1)
                );
                return Err(ExecutorError::Internal { what });
            }
        }
        Ok(())
    }

    /// Copies a real tensor to an address, in the type that the job computes in.
    fn bring(&self, tensor: BorderTensor, to: u64) -> Result<(), ExecutorError> {
        if let Some(tensor) = tensor.of_kind::<CudaTensor>().filter(|t| t.is_on(&self.gpu, self.element())) {
            return self.gpu.copy(tensor.address(), to, tensor.bytes());
        }
        let host = tensor.into_host()?;
        let values = host.as_f32().unwrap_or_default();
        let bytes: Vec<u8> = match self.element() {
            Element::F32 => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
            Element::Bf16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_ne_bytes()).collect(),
        };
        self.gpu.upload(to, &bytes)
    }

    /// Copies a value to a tensor of its own.
    fn leave(&self, op: OpId, value: Value, slot: &Buffer) -> Result<(OpId, BorderTensor), ExecutorError> {
        let batch_rows = value.rows * value.columns / self.dag.op(op).output.shape.elements(1).max(1) as usize;
        let shape = self.dag.op(op).output.shape.resolve(batch_rows);
        let bytes = value.rows * value.columns * self.element().bytes();
        let buffer = Buffer::take(&self.gpu, bytes)?;
        self.gpu.copy(self.address(value.place, slot), buffer.address(), bytes)?;
        Ok((op, BorderTensor::Device(Arc::new(CudaTensor::new(&self.gpu, buffer, shape, self.element())))))
    }

    fn address(&self, place: Place, slot: &Buffer) -> u64 {
        let base = match place.region {
            Region::Slot => slot.address(),
            Region::Scratch => self.scratch.address(),
            region => self.store.address(region),
        };
        base + place.offset as u64
    }

    fn run(&self, steps: &[Step], slot: &Buffer, context: &Context) -> Result<(), ExecutorError> {
        for step in steps {
            self.stop.check()?;
            match step {
                Step::Launch { kernel, grid, arguments } => {
                    self.gpu.launch(*kernel, *grid, self.packed(arguments, slot, context).bytes())?;
                }
                Step::LaunchRows { op, kernel, arguments } => {
                    let rows = context.rows.get(op).map_or(0, Vec::len) as u32;
                    self.gpu.launch(*kernel, [rows, 1], self.packed(arguments, slot, context).bytes())?;
                }
                Step::Copy { from, to, bytes } => {
                    self.gpu.copy(self.address(*from, slot), self.address(*to, slot), *bytes)?;
                }
                Step::Multiply { product, a, b, c, d, bias, alpha } => {
                    let [a, b, d] = [a, b, d].map(|place| self.address(*place, slot));
                    let [c, bias] = [c, bias].map(|place| place.map_or(0, |place| self.address(place, slot)));
                    let alpha = value_of(*alpha, context);
                    self.gpu.multiply(product, Operands { a, b, c, d, bias, alpha })?;
                }
            }
        }
        Ok(())
    }

    fn packed(&self, arguments: &[Argument], slot: &Buffer, context: &Context) -> Packed {
        let mut packed = Packed::default();
        for argument in arguments {
            match *argument {
                Argument::At(place) => packed.pointer(self.address(place, slot)),
                Argument::Null => packed.pointer(0),
                Argument::U32(number) => packed.u32(number),
                Argument::F32(number) => packed.f32(number),
                Argument::Factor(factor) => packed.f32(value_of(factor, context)),
                Argument::Key(op) => self.key(op, context.at).into_iter().for_each(|word| packed.u32(word)),
            }
        }
        packed
    }

    /// The key of an op's dropout: the stream that the CPU draws from.
    fn key(&self, op: OpId, at: MicroBatch) -> [u32; 8] {
        let parts = [at.step.to_le_bytes(), u64::from(at.index).to_le_bytes()];
        let seed = seed_for(self.seed, &[self.dag.op(op).name.as_bytes(), &parts[0], &parts[1]]);
        let key = ChaCha8Rng::seed_from_u64(seed).get_seed();
        let words = key.as_chunks::<4>().0;
        std::array::from_fn(|i| words.get(i).map_or(0, |&word| u32::from_le_bytes(word)))
    }

    /// Puts the sum of the gradients that came for each output where BP expects it.
    fn seed(&self, live: &Live, gradients: Vec<(OpId, BorderTensor)>) -> Result<(), ExecutorError> {
        let mut by_op: BTreeMap<OpId, Vec<BorderTensor>> = BTreeMap::new();
        for (op, gradient) in gradients {
            check_input(&self.dag, op, &gradient)?;
            by_op.entry(op).or_default().push(gradient);
        }
        for &(op, value) in &live.plan.seeds {
            let (at, bytes) =
                (self.address(value.place, &live.slot), value.rows * value.columns * self.element().bytes());
            let mut came = by_op.remove(&op).unwrap_or_default().into_iter();
            match came.next() {
                Some(first) => self.bring(first, at)?,
                None => self.gpu.zero(at, bytes)?,
            }
            for more in came {
                let term = Buffer::take(&self.gpu, bytes)?;
                self.bring(more, term.address())?;
                let count = (value.rows * value.columns) as u32;
                let mut arguments = Packed::default();
                [at, term.address(), at].into_iter().for_each(|address| arguments.pointer(address));
                arguments.u32(count);
                let grid = [count.div_ceil(kernel::elements(self.element()) as u32), 1];
                self.gpu.launch(kernel::ADD.of(self.element()), grid, arguments.bytes())?;
            }
        }
        match by_op.into_keys().next() {
            None => Ok(()),
            Some(op) => {
                let what = format!("a gradient came for `{}`, which was not sent", self.dag.op(op).name);
                Err(ExecutorError::Internal { what })
            }
        }
    }

    /// A micro-batch whose steps can be done again and again, for measuring. Its gradients are full of zeros.
    ///
    /// # Errors
    /// As [`Executor::forward`].
    pub(super) fn probe(
        &mut self,
        stage: StageId,
        at: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<Probe, ExecutorError> {
        let batch = inputs.iter().find_map(|(_, tensor)| tensor.shape().first().copied()).unwrap_or(1);
        let plan = self.plan(stage, batch, at.pass)?;
        let slot = self.slot(plan.slot_bytes)?;
        let rows = self.fill(&plan, &slot, inputs)?;
        self.gpu.zero(self.scratch.address(), self.scratch.bytes())?;
        Ok(Probe(Live { plan, slot, context: Context { at, loss_scale: 1.0, rows } }))
    }

    /// FP of a probe.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    pub(super) fn probe_forward(&self, Probe(live): &Probe) -> Result<(), ExecutorError> {
        self.run(&live.plan.forward, &live.slot, &live.context)
    }

    /// BP of a probe.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    pub(super) fn probe_backward(&self, Probe(live): &Probe) -> Result<(), ExecutorError> {
        self.run(&live.plan.backward, &live.slot, &live.context)
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

    /// Holds a range of a parameter's elements against what is held here.
    fn check_range(&self, param: ParamId, range: &Range<usize>) -> Result<(), ExecutorError> {
        let held = self
            .store
            .layout()
            .get(param)
            .ok_or_else(|| ExecutorError::Internal { what: format!("parameter {} is not held here", param.0) })?;
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
            _ => self.slots.push(slot),
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
            self.slots.push(live.slot);
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
        }
        if let Some(owing) = self.owed.front_mut() {
            owing.made += 1;
        }
        if let Some(done) = self.owed.pop_front_if(|owing| owing.made >= owing.live.plan.put_off.len()) {
            self.slots.push(done.live.slot);
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
            for kind in self.store.states() {
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

fn value_of(factor: Factor, context: &Context) -> f32 {
    match factor {
        Factor::Fixed(factor) => factor,
        Factor::Loss => context.loss_scale,
    }
}

/// Sorts the ids of a lookup by row, as BP reads them, and gives the different rows.
fn sort_lookup(integers: &mut [u8], lookup: &Lookup, ids: &[i32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&at| (ids[at as usize], at));
    let (mut rows, mut starts): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
    for (at, &position) in order.iter().enumerate() {
        let row = ids[position as usize] as u32;
        if rows.last() != Some(&row) {
            rows.push(row);
            starts.push(at as u32);
        }
    }
    starts.push(order.len() as u32);
    let words = |numbers: &[u32]| numbers.iter().map(|n| n.to_ne_bytes()).collect::<Vec<_>>();
    put(integers, lookup.order, words(&order));
    put(integers, lookup.starts, words(&starts));
    put(integers, lookup.rows, words(&rows));
    rows
}

/// Writes numbers of four bytes where they belong among all integers.
fn put(integers: &mut [u8], place: Place, words: impl IntoIterator<Item = [u8; 4]>) {
    let chunks = integers[place.offset..].as_chunks_mut::<4>().0;
    chunks.iter_mut().zip(words).for_each(|(to, word)| *to = word);
}
