//! The parameters of one executor with their gradients and optimizer state, on the device.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use fusionllm_graph::{OpDag, ParamId};
use fusionllm_protocol::{Precision, StateKind};

use super::gpu::{Buffer, Element, Gpu, Packed, bytes_of_f32, f32_of_bytes, number};
use super::layout::{CHUNK, DECAY_ELEMENTS, Extent, Layout};
use super::plan::{Region, tied_tables};
use super::{kernel, sum};
use crate::executor::Write;
use crate::{ExecutorError, OptimizerSpec, UpdateSpec};

/// What a parameter is and what belongs to it, all laid out alike. What is not trained has values alone.
#[derive(Debug)]
pub(super) struct DeviceParams {
    gpu: Arc<dyn Gpu>,
    layout: Layout,
    parameters: Buffer,
    /// As products take them, where that is not the type that they are kept in.
    copy: Option<Buffer>,
    gradients: Buffer,
    /// What lookups give to the tables that products take too, up to the end of the last such table.
    lookups: Buffer,
    apart: BTreeSet<ParamId>,
    /// The rows of tables that have come in lookups since the last UPDATE.
    looked_up: BTreeMap<ParamId, BTreeSet<u32>>,
    /// The rows in `lookups` that have not met the other gradients yet.
    waiting: BTreeMap<ParamId, BTreeSet<u32>>,
    states: Vec<(StateKind, Buffer)>,
    /// Whether the state says anything yet.
    has_state: bool,
    decay: Buffer,
    /// Where each parameter's chunks start, and the end.
    starts: Buffer,
    optimizer: OptimizerSpec,
}

/// Bytes of what a [`DeviceParams`] keeps on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceParamsBytes {
    parameters: u64,
    /// Of those as products take them, where they are kept too.
    copy: Option<u64>,
    gradients: u64,
    lookups: u64,
    /// Of each state of the optimizer.
    state: u64,
    states: u64,
    /// What says where weight decay applies, and where parameters begin.
    tables: u64,
}

impl DeviceParamsBytes {
    pub(super) fn of(dag: &OpDag, layout: &Layout, precision: Precision, optimizer: &OptimizerSpec) -> Self {
        let (elements, trained) = (layout.elements() as u64, layout.trained_elements() as u64);
        let end = |param: &ParamId| layout.get(*param).map_or(0, |e| e.start + e.taken);
        Self {
            parameters: 4 * elements,
            copy: (precision == Precision::Bf16).then_some(2 * elements),
            gradients: 4 * trained,
            lookups: 4 * tied_tables(dag, layout).iter().map(end).max().unwrap_or(0) as u64,
            state: 4 * trained,
            states: optimizer.states().len() as u64,
            tables: trained / DECAY_ELEMENTS as u64 + 4 * (layout.trained().count() as u64 + 1),
        }
    }

    /// All together.
    pub(super) fn sum(&self) -> u64 {
        let Self { parameters, copy, gradients, lookups, state, states, tables } = *self;
        parameters + copy.unwrap_or(0) + gradients + lookups + state * states + tables
    }
}

impl DeviceParams {
    /// Parameters of zeros.
    ///
    /// # Errors
    /// [`ExecutorError::Device`] if the device has not the memory.
    pub(super) fn new(
        gpu: &Arc<dyn Gpu>,
        dag: &OpDag,
        layout: Layout,
        precision: Precision,
        optimizer: OptimizerSpec,
    ) -> Result<Self, ExecutorError> {
        let zeros = |bytes: u64| Buffer::zeros(gpu, bytes as usize);
        let bytes = DeviceParamsBytes::of(dag, &layout, precision, &optimizer);
        let states =
            optimizer.states().iter().map(|&kind| Ok((kind, zeros(bytes.state)?))).collect::<Result<_, _>>()?;
        let decay = uploaded(gpu, &layout.decay(dag))?;
        let firsts = layout.trained().map(|(_, extent)| extent.chunks().start);
        let end = layout.trained_elements() / CHUNK;
        let starts: Vec<u8> = firsts.chain([end]).flat_map(|s| (s as u32).to_ne_bytes()).collect();
        Ok(Self {
            gpu: Arc::clone(gpu),
            parameters: zeros(bytes.parameters)?,
            copy: bytes.copy.map(zeros).transpose()?,
            gradients: zeros(bytes.gradients)?,
            lookups: zeros(bytes.lookups)?,
            apart: tied_tables(dag, &layout),
            looked_up: BTreeMap::new(),
            waiting: BTreeMap::new(),
            states,
            has_state: false,
            decay,
            starts: uploaded(gpu, &starts)?,
            optimizer,
            layout,
        })
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where a region of parameters begins; 0 for other regions.
    pub(super) fn address(&self, region: Region) -> u64 {
        match region {
            Region::Parameters => self.parameters.address(),
            Region::Weights => self.copy.as_ref().unwrap_or(&self.parameters).address(),
            Region::Gradients => self.gradients.address(),
            Region::Lookups => self.lookups.address(),
            Region::Slot | Region::Scratch | Region::Temporary(_) => 0,
        }
    }

    fn extent(&self, param: ParamId) -> Result<Extent, ExecutorError> {
        self.layout.get(param).ok_or_else(|| ExecutorError::param_not_held(param))
    }

    /// Replaces a parameter, row-major.
    pub(super) fn set(&mut self, param: ParamId, values: &[f32]) -> Result<(), ExecutorError> {
        let Extent { start, taken, .. } = self.extent(param)?;
        self.gpu.upload(self.parameters.address() + start as u64 * 4, &bytes_of_f32(values))?;
        let Some(copy) = &self.copy else { return Ok(()) };
        let mut arguments = Packed::default();
        arguments.pointer(self.parameters.address() + start as u64 * 4);
        arguments.pointer(copy.address() + start as u64 * 2);
        arguments.u32(number(taken)?);
        self.gpu.launch(kernel::CAST_F32_BF16, [number(taken.div_ceil(kernel::CAST_ELEMENTS))?, 1], arguments.bytes())
    }

    /// Replaces what the optimizer keeps of a parameter.
    pub(super) fn set_state(&mut self, param: ParamId, kind: StateKind, values: &[f32]) -> Result<(), ExecutorError> {
        let at = self.state(kind)?.address() + self.extent(param)?.start as u64 * 4;
        self.has_state = true;
        self.gpu.upload(at, &bytes_of_f32(values))
    }

    /// Makes all state zero, as it is before the first UPDATE.
    pub(super) fn forget_state(&mut self) -> Result<(), ExecutorError> {
        self.has_state = false;
        self.states.iter().try_for_each(|(_, state)| self.gpu.zero(state.address(), state.bytes()))
    }

    /// Whether the state says anything yet.
    pub(super) fn has_state(&self) -> bool {
        self.has_state
    }

    pub(super) fn optimizer(&self) -> &OptimizerSpec {
        &self.optimizer
    }

    fn state(&self, kind: StateKind) -> Result<&Buffer, ExecutorError> {
        let state = self.states.iter().find(|(of, _)| *of == kind).map(|(_, buffer)| buffer);
        state.ok_or_else(|| ExecutorError::Internal { what: format!("the optimizer keeps no {kind:?}") })
    }

    /// A parameter's values, or those of its state.
    pub(super) fn values(&self, param: ParamId, kind: Option<StateKind>) -> Result<Vec<f32>, ExecutorError> {
        let Extent { start, elements, .. } = self.extent(param)?;
        let buffer = kind.map_or(Ok(&self.parameters), |kind| self.state(kind))?;
        self.read(buffer, start, elements)
    }

    fn read(&self, buffer: &Buffer, start: usize, elements: usize) -> Result<Vec<f32>, ExecutorError> {
        let mut bytes = vec![0; elements * 4];
        self.gpu.download(buffer.address() + start as u64 * 4, &mut bytes)?;
        Ok(f32_of_bytes(&bytes))
    }

    /// These rows have come in a lookup in BP.
    pub(super) fn note_lookups(&mut self, table: ParamId, rows: &[u32]) {
        self.looked_up.entry(table).or_default().extend(rows);
        if self.apart.contains(&table) {
            self.waiting.entry(table).or_default().extend(rows);
        }
    }

    pub(super) fn looked_up(&self, table: ParamId) -> Vec<u32> {
        self.looked_up.get(&table).into_iter().flatten().copied().collect()
    }

    /// Lets the gradients of lookups and products meet.
    fn meet(&mut self, dag: &OpDag) -> Result<(), ExecutorError> {
        for (table, rows) in std::mem::take(&mut self.waiting) {
            let rows: Vec<u32> = rows.into_iter().collect();
            let Extent { start, .. } = self.extent(table)?;
            let listed = self.list(&rows)?;
            let mut arguments = Packed::default();
            arguments.pointer(self.gradients.address() + start as u64 * 4);
            arguments.pointer(self.lookups.address() + start as u64 * 4);
            arguments.pointer(listed.address());
            arguments.u32(columns(dag, table)?);
            self.gpu.launch(kernel::ADD_ROWS, [number(rows.len())?, 1], arguments.bytes())?;
        }
        Ok(())
    }

    fn list(&self, rows: &[u32]) -> Result<Buffer, ExecutorError> {
        let bytes: Vec<u8> = rows.iter().flat_map(|row| row.to_ne_bytes()).collect();
        uploaded(&self.gpu, &bytes)
    }

    /// Elements of a gradient.
    pub(super) fn gradient(
        &mut self,
        dag: &OpDag,
        param: ParamId,
        range: Range<usize>,
    ) -> Result<Vec<f32>, ExecutorError> {
        self.meet(dag)?;
        let Extent { start, .. } = self.extent(param)?;
        self.read(&self.gradients, start + range.start, range.len())
    }

    /// Rows of a gradient.
    pub(super) fn gradient_of_rows(
        &mut self,
        dag: &OpDag,
        param: ParamId,
        rows: &[u32],
    ) -> Result<Vec<f32>, ExecutorError> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        self.meet(dag)?;
        let (Extent { start, .. }, columns) = (self.extent(param)?, columns(dag, param)?);
        let (listed, gathered) = (self.list(rows)?, Buffer::take(&self.gpu, rows.len() * columns as usize * 4)?);
        let mut arguments = Packed::default();
        arguments.pointer(self.gradients.address() + start as u64 * 4);
        arguments.pointer(listed.address());
        arguments.pointer(gathered.address());
        arguments.u32(columns);
        self.gpu.launch(kernel::GATHER_ROWS, [number(rows.len())?, 1], arguments.bytes())?;
        self.read(&gathered, 0, rows.len() * columns as usize)
    }

    /// Replaces elements of a gradient, or adds to them.
    pub(super) fn write_gradient(
        &mut self,
        dag: &OpDag,
        param: ParamId,
        start: usize,
        values: &[f32],
        how: Write,
    ) -> Result<(), ExecutorError> {
        self.meet(dag)?;
        let first = self.extent(param)?.start + start;
        let at = |element: usize| self.gradients.address() + element as u64 * 4;
        if how == Write::Replace {
            return self.gpu.upload(at(first), &bytes_of_f32(values));
        }
        // The kernel begins at multiples of 16 bytes. What lies before the values stays as it is: x + -0 is x for all x.
        let before = first % 4;
        let terms = [&[-0.0; 4][..before], values].concat();
        let uploaded = uploaded(&self.gpu, &bytes_of_f32(&terms))?;
        let sum = at(first - before);
        sum::add(&self.gpu, Element::F32, [sum, uploaded.address(), sum], terms.len())
    }

    /// Adds to rows of a gradient, each of which occurs once.
    pub(super) fn add_gradient_rows(
        &mut self,
        dag: &OpDag,
        param: ParamId,
        rows: &[u32],
        values: &[f32],
    ) -> Result<(), ExecutorError> {
        self.meet(dag)?;
        let (Extent { start, .. }, columns) = (self.extent(param)?, columns(dag, param)?);
        let (listed, values) = (self.list(rows)?, uploaded(&self.gpu, &bytes_of_f32(values))?);
        let mut arguments = Packed::default();
        arguments.pointer(self.gradients.address() + start as u64 * 4);
        arguments.pointer(values.address());
        arguments.pointer(listed.address());
        arguments.u32(columns);
        self.gpu.launch(kernel::ADD_LISTED, [number(rows.len())?, 1], arguments.bytes())
    }

    /// Sums of squares of the gradients of these parameters, in their order.
    pub(super) fn squares(&mut self, dag: &OpDag, params: &[ParamId]) -> Result<Vec<f64>, ExecutorError> {
        self.meet(dag)?;
        let (chunks, count) = (self.layout.trained_elements() / CHUNK, self.layout.trained().count());
        if params.is_empty() || chunks == 0 {
            return Ok(Vec::new());
        }
        let [partial, sums] = [chunks, count].map(|doubles| Buffer::take(&self.gpu, doubles * 8));
        let (partial, sums) = (partial?, sums?);
        let mut arguments = Packed::default();
        arguments.pointer(self.gradients.address());
        arguments.pointer(partial.address());
        arguments.u32(number(chunks)?);
        self.gpu.launch(kernel::CHUNK_SQUARES, [number(chunks.div_ceil(8))?, 1], arguments.bytes())?;
        let mut arguments = Packed::default();
        [&partial, &self.starts, &sums].into_iter().for_each(|buffer| arguments.pointer(buffer.address()));
        self.gpu.launch(kernel::SEGMENT_SUMS, [number(count)?, 1], arguments.bytes())?;
        let mut bytes = vec![0; count * 8];
        self.gpu.download(sums.address(), &mut bytes)?;
        let doubles = bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_ne_bytes(b));
        let by_param: BTreeMap<ParamId, f64> = self.layout.trained().map(|(param, _)| param).zip(doubles).collect();
        Ok(params.iter().filter_map(|param| by_param.get(param).copied()).collect())
    }

    /// UPDATE of all parameters that are trained; their gradients are zero after it.
    pub(super) fn update(&mut self, dag: &OpDag, spec: UpdateSpec) -> Result<(), ExecutorError> {
        self.meet(dag)?;
        self.looked_up.clear();
        let chunks = number(self.layout.trained_elements() / CHUNK)?;
        if chunks == 0 {
            return Ok(());
        }
        let mut arguments = Packed::default();
        arguments.pointer(self.parameters.address());
        arguments.pointer(self.gradients.address());
        let lr = spec.lr;
        let kernel = match self.optimizer {
            OptimizerSpec::AdamW { .. } => kernel::ADAMW,
            OptimizerSpec::Sgd { .. } => kernel::SGD,
        };
        let states = if kernel == kernel::ADAMW { 2 } else { 1 };
        for index in 0..states {
            arguments.pointer(self.states.get(index).map_or(0, |(_, state)| state.address()));
        }
        arguments.pointer(self.copy.as_ref().map_or(0, Buffer::address));
        arguments.pointer(self.decay.address());
        arguments.u32(chunks);
        let numbers = match self.optimizer {
            OptimizerSpec::AdamW { betas: [beta1, beta2], epsilon, weight_decay } => {
                let count = (spec.step + 1) as f64;
                let (rate, root) = (lr / (1.0 - beta1.powf(count)), 1.0 / (1.0 - beta2.powf(count)).sqrt());
                let factor = 1.0 - lr * weight_decay;
                vec![beta1, 1.0 - beta1, beta2, 1.0 - beta2, epsilon, rate, root, factor, spec.gradient_scale]
            }
            OptimizerSpec::Sgd { momentum, weight_decay } => {
                vec![lr, momentum, 1.0 - lr * weight_decay, spec.gradient_scale]
            }
        };
        numbers.into_iter().for_each(|number| arguments.f32(number as f32));
        self.has_state = true;
        self.gpu.launch(kernel, [chunks, 1], arguments.bytes())
    }
}

fn uploaded(gpu: &Arc<dyn Gpu>, bytes: &[u8]) -> Result<Buffer, ExecutorError> {
    let buffer = Buffer::take(gpu, bytes.len())?;
    gpu.upload(buffer.address(), bytes)?;
    Ok(buffer)
}

fn columns(dag: &OpDag, param: ParamId) -> Result<u32, ExecutorError> {
    number(dag.param(param).shape.iter().skip(1).product())
}
