//! What a stage's FP and BP do on the device, as data: a list of kernels and products with where their tensors lie.
//!
//! A stage has fixed shapes, so its lists are made once for each number of rows, without a device, by a pure function:
//! the memory that they need is known before the first step.

mod attention;
mod backward;
mod forward;
mod memory;
mod norm;
mod rotary;

use std::collections::{BTreeMap, BTreeSet};

use fusionllm_graph::{DType, OpDag, OpId, OpKind, ParamId};
use fusionllm_protocol::Precision;

use super::gpu::{Element, Kernel, Matrix, Product, number};
use super::layout::{Extent, Layout};
use crate::ExecutorError;
use crate::backend::StageOps;
use memory::Temporaries;

/// Tensors start at multiples of so many bytes.
pub(super) const ALIGNMENT: usize = 256;

/// A piece of the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Region {
    /// The parameters in f32.
    Parameters,
    /// The parameters as products take them: in bf16, or the f32 ones.
    Weights,
    /// The parameters' gradients in f32.
    Gradients,
    /// The gradients that lookups give to tables, apart from those that products give to the same tables.
    Lookups,
    /// What one micro-batch keeps between FP and BP.
    Slot,
    /// What is needed only for a while.
    Scratch,
    /// A tensor in `Scratch` whose place is not decided yet. Plans that are done have none.
    Temporary(usize),
}

/// Where a tensor lies: bytes from the start of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) region: Region,
    pub(super) offset: usize,
}

impl Place {
    /// So many bytes further.
    pub(super) fn after(self, bytes: usize) -> Self {
        Self { offset: self.offset + bytes, ..self }
    }
}

/// A factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Factor {
    /// Known when the plan is made.
    Fixed(f32),
    /// The weight of the loss of this micro-batch, which BP is told.
    Loss,
}

/// A piece of a kernel's argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Argument {
    At(Place),
    Null,
    U32(u32),
    F32(f32),
    Factor(Factor),
    /// The eight words of the key that an op's dropout has for this micro-batch.
    Key(OpId),
    /// The angles by which a rotary op turns.
    Angles(OpId),
}

/// One thing that the device does.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    Launch {
        kernel: Kernel,
        grid: [u32; 2],
        arguments: Vec<Argument>,
    },
    Multiply {
        product: Product,
        a: Place,
        b: Place,
        c: Option<Place>,
        d: Place,
        bias: Option<Place>,
        alpha: Factor,
    },
    Copy {
        from: Place,
        to: Place,
        bytes: usize,
    },
    /// A launch over as many blocks as the lookups of an op name different rows.
    LaunchRows {
        op: OpId,
        kernel: Kernel,
        arguments: Vec<Argument>,
    },
}

/// A tensor: where it lies, and as a matrix of so many rows and columns, `stride` elements from row to row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Value {
    pub(super) place: Place,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) stride: usize,
}

/// What enters a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entering {
    pub(super) op: OpId,
    pub(super) dtype: DType,
    pub(super) value: Value,
}

/// Ids that are looked up in a table, and their rows in order, as BP adds their gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lookup {
    pub(super) op: OpId,
    /// The op whose output the ids are.
    pub(super) ids: OpId,
    pub(super) table: ParamId,
    pub(super) count: usize,
    /// Places of the ids sorted by row, `count` numbers of four bytes.
    pub(super) order: Place,
    /// Where each different row begins in them, at most `count` + 1 numbers.
    pub(super) starts: Place,
    /// The different rows, at most `count` numbers.
    pub(super) rows: Place,
}

/// A gradient of a weight that may wait.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct WeightSteps {
    pub(super) op: OpId,
    pub(super) param: ParamId,
    pub(super) steps: Vec<Step>,
}

/// What a stage does for a micro-batch of so many rows.
#[derive(Debug, Default)]
pub(super) struct StagePlan {
    pub(super) entering: Vec<Entering>,
    pub(super) lookups: Vec<Lookup>,
    /// The bytes at the start of the slot that hold all integers.
    pub(super) integer_bytes: usize,
    pub(super) forward: Vec<Step>,
    /// What leaves, after FP.
    pub(super) leaving: Vec<(OpId, Value)>,
    /// Where the mean loss is, one f32, after FP.
    pub(super) loss: Option<Place>,
    /// Where BP expects the gradients of what leaves.
    pub(super) seeds: Vec<(OpId, Value)>,
    pub(super) backward: Vec<Step>,
    /// The gradients of what entered, after BP.
    pub(super) input_gradients: Vec<(OpId, Value)>,
    /// In the order of BP.
    pub(super) put_off: Vec<WeightSteps>,
    pub(super) slot_bytes: usize,
    pub(super) scratch_bytes: usize,
}

/// What a plan is made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlanSpec<'a> {
    pub(super) dag: &'a OpDag,
    pub(super) stage: &'a StageOps,
    pub(super) layout: &'a Layout,
    pub(super) precision: Precision,
    /// Rows of the micro-batch.
    pub(super) batch: usize,
    /// Evaluation keeps nothing and drops nothing.
    pub(super) training: bool,
}

/// The first op without a kernel here.
pub(super) fn lacks(dag: &OpDag) -> Option<OpId> {
    let has_none = |kind: &OpKind| {
        matches!(
            kind,
            OpKind::Conv2d { .. } | OpKind::BatchNorm2d { .. } | OpKind::MaxPool2d { .. } | OpKind::GlobalAvgPool
        )
    };
    dag.op_ids().find(|&op| has_none(&dag.op(op).kind))
}

/// That an op has no kernel here, which [`lacks`] says before.
fn no_kernel(dag: &OpDag, op: OpId) -> ExecutorError {
    let (op, family) = (dag.op(op).name.clone(), dag.op(op).kind.family());
    ExecutorError::NoKernel { op, family, device: "this device".to_owned() }
}

impl StagePlan {
    /// Plans a stage.
    ///
    /// # Errors
    /// [`ExecutorError::NoKernel`] if an op has none.
    pub(super) fn new(spec: PlanSpec<'_>) -> Result<Self, ExecutorError> {
        let mut planner = Planner::new(spec);
        planner.enter()?;
        planner.forward()?;
        planner.place_forward();
        if spec.training {
            planner.backward()?;
            planner.place_backward();
        }
        planner.plan.slot_bytes = planner.slot;
        Ok(planner.plan)
    }

    /// The kernels that it launches.
    pub(super) fn kernels(&self) -> BTreeSet<Kernel> {
        let put_off = self.put_off.iter().flat_map(|weight| &weight.steps);
        let steps = self.forward.iter().chain(&self.backward).chain(put_off);
        let kernel = |step: &Step| match step {
            Step::Launch { kernel, .. } | Step::LaunchRows { kernel, .. } => Some(*kernel),
            Step::Multiply { .. } | Step::Copy { .. } => None,
        };
        steps.filter_map(kernel).collect()
    }
}

/// A plan in the making.
struct Planner<'a> {
    spec: PlanSpec<'a>,
    element: Element,
    inside: BTreeSet<OpId>,
    values: BTreeMap<OpId, Value>,
    /// What FP keeps of an op besides values: the statistics of norms, the log-sums of attention.
    kept: BTreeMap<OpId, [Place; 2]>,
    /// Tables that a product takes too, whose lookups' gradients are kept apart.
    apart: BTreeSet<ParamId>,
    slot: usize,
    temporaries: Temporaries,
    plan: StagePlan,
}

impl<'a> Planner<'a> {
    fn new(spec: PlanSpec<'a>) -> Self {
        let element = match spec.precision {
            Precision::F32 | Precision::Tf32 => Element::F32,
            Precision::Bf16 => Element::Bf16,
        };
        let inside = spec.stage.ops.iter().copied().collect();
        let (values, kept, apart) = (BTreeMap::new(), BTreeMap::new(), tied_tables(spec.dag, spec.layout));
        let (slot, temporaries, plan) = (0, Temporaries::default(), StagePlan::default());
        Self { spec, element, inside, values, kept, apart, slot, temporaries, plan }
    }

    /// Places what enters: first all integers, which are copied to the device in one go.
    fn enter(&mut self) -> Result<(), ExecutorError> {
        let dag = self.spec.dag;
        let mut entering: BTreeSet<OpId> = BTreeSet::new();
        for &op in &self.spec.stage.ops {
            if dag.op(op).inputs.is_empty() {
                entering.insert(op);
            }
            entering.extend(dag.op(op).inputs.iter().filter(|input| !self.inside.contains(input)));
        }
        let of = |dtype| move |op: &OpId| dag.op(*op).output.dtype == dtype;
        for op in entering.iter().copied().filter(of(DType::I32)) {
            let (rows, columns) = (self.elements(op), 1);
            let value = Value { place: self.keep(rows * 4), rows, columns, stride: 1 };
            self.plan.entering.push(Entering { op, dtype: DType::I32, value });
            self.values.insert(op, value);
        }
        for &op in &self.spec.stage.ops {
            let (OpKind::Embedding { .. }, [ids], [table]) =
                (&dag.op(op).kind, dag.op(op).inputs.as_slice(), dag.op(op).params.as_slice())
            else {
                continue;
            };
            let count = self.elements(*ids);
            let [order, starts, rows] = [count, count + 1, count].map(|numbers| self.keep(numbers * 4));
            self.plan.lookups.push(Lookup { op, ids: *ids, table: *table, count, order, starts, rows });
        }
        self.plan.integer_bytes = self.slot;
        for op in entering.iter().copied().filter(of(DType::F32)) {
            let value = self.shaped(op);
            let value = Value { place: self.keep(self.bytes(&value)), ..value };
            self.plan.entering.push(Entering { op, dtype: DType::F32, value });
            self.values.insert(op, value);
        }
        Ok(())
    }

    fn place_forward(&mut self) {
        let leaving = self.plan.leaving.iter_mut().map(|(_, value)| &mut value.place);
        self.plan.scratch_bytes = self.temporaries.place(&mut self.plan.forward, [], leaving);
        // BP may not read what lasts for FP alone.
        self.temporaries = Temporaries::default();
        self.values.retain(|_, value| value.place.region == Region::Slot);
    }

    fn place_backward(&mut self) {
        let seeds = self.plan.seeds.iter_mut().map(|(_, value)| &mut value.place);
        let results = self.plan.input_gradients.iter_mut().map(|(_, value)| &mut value.place);
        let bytes = self.temporaries.place(&mut self.plan.backward, seeds, results);
        self.plan.scratch_bytes = self.plan.scratch_bytes.max(bytes);
    }

    fn elements(&self, op: OpId) -> usize {
        self.spec.dag.op(op).output.shape.resolve(self.spec.batch).iter().product()
    }

    /// The shape of an op's output as a matrix, without a place.
    fn shaped(&self, op: OpId) -> Value {
        let shape = self.spec.dag.op(op).output.shape.resolve(self.spec.batch);
        let (&columns, rows) = shape.split_last().unwrap_or((&1, &[]));
        let place = Place { region: Region::Slot, offset: 0 };
        Value { place, rows: rows.iter().product(), columns, stride: columns }
    }

    fn bytes(&self, value: &Value) -> usize {
        value.rows * value.stride * self.element.bytes()
    }

    /// A place that lasts from FP to BP.
    fn keep(&mut self, bytes: usize) -> Place {
        let place = Place { region: Region::Slot, offset: self.slot };
        self.slot += bytes.next_multiple_of(ALIGNMENT);
        place
    }

    /// A place until it is last used.
    fn temporary(&mut self, bytes: usize) -> Place {
        self.temporaries.take(bytes)
    }

    /// A place for an op's output: in the slot if `kept`.
    fn output(&mut self, value: Value, kept: bool) -> Value {
        let bytes = self.bytes(&value);
        let place = if kept && self.spec.training { self.keep(bytes) } else { self.temporary(bytes) };
        Value { place, ..value }
    }

    fn extent(&self, param: ParamId) -> Result<Extent, ExecutorError> {
        self.spec.layout.get(param).ok_or_else(|| ExecutorError::MissingInput {
            op: self.spec.dag.param(param).name.clone(),
            input: "parameters".to_owned(),
        })
    }

    /// A parameter as products take it.
    fn weight(&self, param: ParamId) -> Result<Place, ExecutorError> {
        let offset = self.extent(param)?.start * self.element.bytes();
        Ok(Place { region: Region::Weights, offset })
    }

    /// A parameter in f32.
    fn parameter(&self, param: ParamId) -> Result<Place, ExecutorError> {
        Ok(Place { region: Region::Parameters, offset: self.extent(param)?.start * 4 })
    }

    fn trains(&self, param: ParamId) -> bool {
        !self.spec.dag.param(param).frozen
    }

    /// Where the gradient of a parameter is added up that is trained.
    fn gradient(&self, param: ParamId) -> Result<Place, ExecutorError> {
        Ok(Place { region: Region::Gradients, offset: self.extent(param)?.start * 4 })
    }

    /// The output of an op that another one in the stage reads.
    fn value(&self, reader: OpId, op: OpId) -> Result<Value, ExecutorError> {
        self.values.get(&op).copied().ok_or_else(|| ExecutorError::MissingInput {
            op: self.spec.dag.op(reader).name.clone(),
            input: self.spec.dag.op(op).name.clone(),
        })
    }

    fn input(&self, op: OpId, index: usize) -> Result<(OpId, Value), ExecutorError> {
        let input = self.spec.dag.op(op).inputs.get(index).copied().ok_or_else(|| ExecutorError::Internal {
            what: format!("op `{}` has no input {index}", self.spec.dag.op(op).name),
        })?;
        Ok((input, self.value(op, input)?))
    }

    fn param(&self, op: OpId, index: usize) -> Result<ParamId, ExecutorError> {
        self.spec.dag.op(op).params.get(index).copied().ok_or_else(|| ExecutorError::Internal {
            what: format!("op `{}` has no parameter {index}", self.spec.dag.op(op).name),
        })
    }

    /// A matrix of the type that the job computes in.
    fn matrix(&self, leading: usize) -> Matrix {
        Matrix::new(self.element, leading)
    }

    /// A product of matrices of that type into one, on its own.
    fn product(&self, [m, n, k]: [usize; 3], a: Matrix, b: Matrix, d: Matrix) -> Product {
        let tf32 = self.spec.precision == Precision::Tf32;
        Product { m, n, k, a, b, d, batch: 1, tf32, adds: false, bias: false }
    }
}

/// The tables that both a lookup and a product take, of the parameters that are held and trained.
///
/// Their gradients come in two sums: what lookups give and what products give meet only before UPDATE, as they do where
/// two CompNodes hold the table, so that any cut gives the same bits.
pub(super) fn tied_tables(dag: &OpDag, layout: &Layout) -> BTreeSet<ParamId> {
    let looks_up = |op: &OpId| matches!(dag.op(*op).kind, OpKind::Embedding { .. });
    let tied = |param: &ParamId| {
        let users = dag.users_of(*param);
        users.iter().any(looks_up) && !users.iter().all(looks_up)
    };
    layout.trained().map(|(param, _)| param).filter(tied).collect()
}

/// Blocks that cover `count` things.
fn blocks(count: usize, each: usize) -> Result<u32, ExecutorError> {
    number(count.div_ceil(each))
}
