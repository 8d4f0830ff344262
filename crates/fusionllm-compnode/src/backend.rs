//! The seam behind which a framework and its devices stand: what a device is and can do, and who computes on it.
//!
//! All that knows a framework is one folder that implements [`Backend`] and [`Executor`]: `burn`, and `cuda`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use fusionllm_graph::{Kernels, OpDag, OpId, ParamId};
use fusionllm_planner::{Measured, NodeIndex, Placement, Stage, StageId, may_defer};
use fusionllm_protocol::Precision;
use serde::{Deserialize, Serialize};

use crate::ExecutorError;
use crate::executor::Executor;
use crate::optimizer::OptimizerSpec;
use crate::seeds::Seeds;
use crate::stop::StopFlag;

/// An open device, and what can be done with it.
pub trait Backend: fmt::Debug + Send + Sync {
    /// The device for people: `cpu (2 threads)`, `cuda:0`.
    fn name(&self) -> &str;

    /// Whether it computes on the machine's own cores, in the machine's own memory.
    fn is_cpu(&self) -> bool;

    /// How it computes ops of several steps, which decides what FP keeps for BP. Plans count by it.
    fn kernels(&self) -> Kernels;

    /// Whether it computes in this precision; what does not computes in f32.
    fn has(&self, precision: Precision) -> bool;

    /// The first op of `dag` that it cannot compute.
    fn lacks(&self, _dag: &OpDag) -> Option<OpId> {
        None
    }

    /// Bytes of its memory that a job may fill now; nothing where nobody tells.
    fn free_bytes(&self) -> Option<u64>;

    /// Measures the device without a job; takes a second at the most on a CPU.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    fn measure_speed(&self) -> Result<DeviceSpeed, ExecutorError>;

    /// Measures FP and BP of all kinds of work in `dag`, through the kernels that will do it.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails, or `stop` was set.
    fn measure_ops(&self, dag: &Arc<OpDag>, spec: &MeasureSpec, stop: &StopFlag) -> Result<Measured, ExecutorError>;

    /// Bytes of the device's memory that an executor of `spec` takes under this load; nothing where that is not laid out
    /// beforehand, and only the plan says it.
    ///
    /// # Errors
    /// [`ExecutorError::NoKernel`] if the device cannot compute an op.
    fn needs(&self, _spec: &ExecutorSpec, _load: &Load) -> Result<Option<u64>, ExecutorError> {
        Ok(None)
    }

    /// Builds what runs the stages of `spec`. FP ends between two ops once `stop` is set.
    ///
    /// # Errors
    /// [`ExecutorError::Param`] if a parameter cannot be initialised.
    fn build(&self, spec: ExecutorSpec, stop: StopFlag) -> Result<Box<dyn Executor>, ExecutorError>;
}

/// Whether a device can compute all of `dag`.
///
/// # Errors
/// [`ExecutorError::NoKernel`] names the first op that it cannot.
pub(crate) fn check_ops(backend: &dyn Backend, dag: &OpDag) -> Result<(), ExecutorError> {
    let Some(op) = backend.lacks(dag).map(|op| dag.op(op)) else { return Ok(()) };
    let (op, family, device) = (op.name.clone(), op.kind.family(), backend.name().to_owned());
    Err(ExecutorError::NoKernel { op, family, device })
}

/// What does not change while device, machine and program stay the same.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceSpeed {
    /// S: FLOP/s of a square matrix product.
    pub flop_per_s: f64,
    /// Bytes per second that an addition reads and writes.
    pub memory_bytes_per_s: f64,
}

/// How ops are measured.
#[derive(Clone, Copy, Debug)]
pub struct MeasureSpec {
    /// Samples in a micro-batch.
    pub batch: usize,
    /// What UPDATE does.
    pub optimizer: OptimizerSpec,
    /// Memory that may be filled, if that is known.
    pub free_bytes: Option<u64>,
    /// As of [`ExecutorSpec`].
    pub precision: Precision,
}

/// What an executor holds and computes.
#[derive(Clone, Debug)]
pub struct ExecutorSpec {
    /// The whole OP-DAG.
    pub dag: Arc<OpDag>,
    /// The stages that it runs.
    pub stages: Vec<StageOps>,
    /// The parameters that it holds.
    pub params: Vec<ParamId>,
    /// What UPDATE does.
    pub optimizer: OptimizerSpec,
    /// Dropout follows from them, and initial parameters.
    pub seeds: Seeds,
    /// Where the first parameters come from.
    pub first: FirstParams,
    /// What it computes in, where the device can choose; CPUs compute in f32.
    pub precision: Precision,
}

/// How much an executor has at work at once in training; an evaluation comes between two steps, one micro-batch at a time.
#[derive(Clone, Debug)]
pub struct Load {
    /// Samples in a micro-batch.
    pub batch: usize,
    /// By stage, of how many micro-batches something is kept at once, at the most. Stages that are not in it are pieces of
    /// others, one of which is at work at a time.
    pub held: BTreeMap<StageId, u32>,
    /// Bytes of what is kept between such pieces, in f32.
    pub between_pieces: u64,
}

/// Where the first parameters of an executor come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstParams {
    /// Drawn from the seeds.
    Drawn,
    /// From `Params::import`, which comes before anything is computed. Until then they are zeros.
    Imported,
}

/// One stage of an executor.
#[derive(Clone, Debug)]
pub struct StageOps {
    /// Its number in the placement.
    pub id: StageId,
    /// Its ops in topological order.
    pub ops: Vec<OpId>,
    /// Those whose output leaves it.
    pub leaving: BTreeSet<OpId>,
    /// Its linear ops that put the gradients of their weights off.
    pub deferring: BTreeSet<OpId>,
}

/// The stages of a CompNode, as its executor has them: one by one, or in pieces.
pub(crate) fn stages_of(dag: &OpDag, placement: &Placement, node: NodeIndex) -> Vec<(StageId, Vec<StageOps>)> {
    let (is_in_pieces, defers) = (placement.recomputes(node), placement.defers(node));
    // Numbers that no stage of the placement has.
    let mut numbers = (placement.stages.len() as u32..).map(StageId);
    let of_stage = |stage: &Stage| {
        let sent: BTreeSet<OpId> = placement.edges.iter().filter(|e| e.from == stage.id).map(|e| e.op).collect();
        let is_here: BTreeSet<OpId> = stage.ops.iter().copied().collect();
        let piece = |ops: Vec<OpId>| {
            let last = ops.last().copied();
            let is_used = |op: OpId| dag.consumers(op).iter().any(|c| is_here.contains(c) && Some(*c) > last);
            let leaving = ops.iter().copied().filter(|&op| sent.contains(&op) || is_used(op)).collect();
            let deferring = ops.iter().copied().filter(|&op| defers && may_defer(dag, &placement.shared, op)).collect();
            let id = if is_in_pieces { numbers.next() } else { None };
            StageOps { id: id.unwrap_or(stage.id), ops, leaving, deferring }
        };
        (stage.id, placement.pieces_of(dag, stage).into_iter().map(piece).collect())
    };
    placement.stages_of(node).map(of_stage).collect()
}

impl ExecutorSpec {
    /// The stages that `placement` gives to `node`, in pieces where it makes activations anew.
    pub fn of_placement(
        dag: Arc<OpDag>,
        placement: &Placement,
        node: NodeIndex,
        optimizer: OptimizerSpec,
        seeds: impl Into<Seeds>,
        first: FirstParams,
    ) -> Self {
        let stages = stages_of(&dag, placement, node).into_iter().flat_map(|(_, pieces)| pieces);
        let (stages, params) = (stages.collect(), placement.params_of(&dag, node));
        Self { dag, stages, params, optimizer, seeds: seeds.into(), first, precision: Precision::F32 }
    }

    /// The same, in another precision than f32.
    #[must_use]
    pub fn computing_in(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// One stage 0 of the ops up to `last`, whose output leaves it, with imported parameters: for inference.
    pub fn up_to(dag: Arc<OpDag>, last: OpId) -> Self {
        let mut needed = BTreeSet::from([last]);
        for index in (0..=last.index()).rev() {
            let op = OpId(index as u32);
            if needed.contains(&op) {
                needed.extend(dag.op(op).inputs.iter().copied());
            }
        }
        Self::of_stage(dag, needed.into_iter().collect(), BTreeSet::from([last]), FirstParams::Imported)
    }

    /// One stage 0 of `ops`, of which leaves whatever another op consumes: for measuring.
    pub(crate) fn of_ops(dag: Arc<OpDag>, ops: Vec<OpId>) -> Self {
        let leaves = |op: &&OpId| dag.consumers(**op).iter().any(|c| !ops.contains(c));
        let leaving = ops.iter().filter(leaves).copied().collect();
        Self::of_stage(dag, ops, leaving, FirstParams::Drawn)
    }

    fn of_stage(dag: Arc<OpDag>, ops: Vec<OpId>, leaving: BTreeSet<OpId>, first: FirstParams) -> Self {
        let params: BTreeSet<ParamId> = ops.iter().flat_map(|&op| dag.op(op).params.iter().copied()).collect();
        let stage = StageOps { id: StageId(0), ops, leaving, deferring: BTreeSet::new() };
        let optimizer = OptimizerSpec::Sgd { momentum: 0.0, weight_decay: 0.0 };
        let (stages, params, precision) = (vec![stage], params.into_iter().collect(), Precision::F32);
        Self { dag, stages, params, optimizer, seeds: 0u64.into(), first, precision }
    }
}
