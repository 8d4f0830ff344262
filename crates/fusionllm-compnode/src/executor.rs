//! What a framework must be able to do to run a sub-DAG.

mod gradients;
mod params;

use std::collections::BTreeMap;

use fusionllm_graph::OpId;
use fusionllm_planner::StageId;
use fusionllm_protocol::Pass;

use crate::border::BorderTensor;
use crate::{ExecutorError, ShardError};
pub use gradients::Gradients;
pub(crate) use gradients::{Write, check_filled_rows, check_range, check_rows};
pub use params::Params;

/// Which micro-batch a task works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MicroBatch {
    /// Updates done before it.
    pub step: u64,
    /// Training keeps what BP needs and applies dropout; evaluation does neither.
    pub pass: Pass,
    /// Its number within the pass, from 0.
    pub index: u32,
}

/// What FP of a stage gives.
#[derive(Debug, Default)]
pub struct StageOutput {
    /// The output of each op of the stage that another stage consumes.
    pub tensors: Vec<(OpId, BorderTensor)>,
    /// Mean loss of the micro-batch, if the stage holds the loss op.
    pub loss: Option<f64>,
    /// Share of the micro-batch's images whose class is the likeliest one, in evaluation, if the stage holds the loss op.
    pub accuracy: Option<f64>,
}

/// A parameter or a piece of optimizer state by name.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Hugging Face name of a parameter, or `optimizer.KIND.NAME`.
    pub name: String,
    /// Dimensions, outermost first; a parameter has those that the graph gives it.
    pub shape: Vec<usize>,
    /// Row-major values, as many as fill the shape.
    pub values: Vec<f32>,
}

/// Shows row-major values to whoever wants to see them.
type Values<'a> = Box<dyn FnOnce(&mut dyn FnMut(&[f32])) -> Result<(), ExecutorError> + 'a>;

/// A parameter or a piece of optimizer state whose values are looked up only when they are asked for.
pub struct LazyTensor<'a> {
    /// As of [`NamedTensor`].
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    values: Values<'a>,
}

impl std::fmt::Debug for LazyTensor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LazyTensor").field("name", &self.name).field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl<'a> LazyTensor<'a> {
    /// A tensor whose row-major values `values` shows, whole and once.
    pub fn new(
        name: String,
        shape: Vec<usize>,
        values: impl FnOnce(&mut dyn FnMut(&[f32])) -> Result<(), ExecutorError> + 'a,
    ) -> Self {
        Self { name, shape, values: Box::new(values) }
    }

    /// Looks at the values where they are: on the CPU they are not copied for it.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    pub fn look(self, mut see: impl FnMut(&[f32])) -> Result<(), ExecutorError> {
        (self.values)(&mut see)
    }

    /// The tensor with a copy of its values.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    pub fn read(self) -> Result<NamedTensor, ExecutorError> {
        let (name, shape, mut copy) = (self.name.clone(), self.shape.clone(), Vec::new());
        self.look(|values| copy.extend_from_slice(values))?;
        Ok(NamedTensor { name, shape, values: copy })
    }
}

impl From<NamedTensor> for LazyTensor<'_> {
    fn from(NamedTensor { name, shape, values }: NamedTensor) -> Self {
        Self::new(name, shape, move |see| {
            see(&values);
            Ok(())
        })
    }
}

/// Tensors by name, of which one is in memory at a time.
pub trait TensorSource {
    /// Takes a tensor; nothing if there is none of that name.
    ///
    /// # Errors
    /// [`ShardError`] if it cannot be read.
    fn take(&mut self, name: &str) -> Result<Option<NamedTensor>, ShardError>;
}

/// Tensors that are all in memory, as a source.
pub fn by_name(tensors: impl IntoIterator<Item = NamedTensor>) -> BTreeMap<String, NamedTensor> {
    tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect()
}

impl TensorSource for BTreeMap<String, NamedTensor> {
    fn take(&mut self, name: &str) -> Result<Option<NamedTensor>, ShardError> {
        Ok(self.remove(name))
    }
}

/// How to do an UPDATE.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateSpec {
    /// Updates done before this one.
    pub step: u64,
    /// Learning rate of this update.
    pub lr: f64,
    /// Factor on every gradient (clipping).
    pub gradient_scale: f64,
}

/// Runs the stages of one CompNode.
pub trait Executor: Gradients + Send {
    /// FP of a micro-batch of B rows through a stage. `inputs` holds the tensor of every op outside the stage that an op
    /// in it consumes, and of its placeholders: f32 or i32 of the op's output shape, whose first dimension is B.
    ///
    /// # Errors
    /// [`ExecutorError`] if inputs do not fit the graph or the device fails.
    fn forward(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<StageOutput, ExecutorError>;

    /// BP of a micro-batch: takes the gradients of the stage's outputs (one entry per consuming stage; they are
    /// summed) and gives the gradient of each input that carries one. Parameter gradients accumulate, those of the
    /// linear ops' weights perhaps only by [`Self::make_up`]. The loss is weighted by `loss_scale`.
    ///
    /// # Errors
    /// [`ExecutorError`] if FP of the micro-batch has not run or the device fails.
    fn backward(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        gradients: Vec<(OpId, BorderTensor)>,
        loss_scale: f64,
    ) -> Result<Vec<(OpId, BorderTensor)>, ExecutorError>;

    /// FP in training that keeps nothing for BP: FP comes once more before BP does.
    ///
    /// # Errors
    /// As [`Self::forward`].
    fn forward_alone(
        &mut self,
        stage: StageId,
        micro_batch: MicroBatch,
        inputs: Vec<(OpId, BorderTensor)>,
    ) -> Result<StageOutput, ExecutorError>;

    /// The stage and micro-batch of the oldest BP that has put off gradients of weights which are still to be made.
    fn owes(&self) -> Option<(StageId, u32)>;

    /// Makes one gradient of a weight that BP has put off, the oldest; nothing if none is left. What follows makes
    /// those that it needs itself.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    fn make_up(&mut self) -> Result<(), ExecutorError>;

    /// UPDATE of every parameter, and the gradients are gone.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    fn update(&mut self, spec: UpdateSpec) -> Result<(), ExecutorError>;

    /// Micro-batches that are live (FP done, BP not) in the stage that has most of them.
    fn live(&self) -> usize;
}

/// Of the stages of all micro-batches that are live, how often that comes which comes most often.
pub(crate) fn most_live(stages: impl IntoIterator<Item = StageId>) -> usize {
    let mut by_stage: BTreeMap<StageId, usize> = BTreeMap::new();
    for stage in stages {
        *by_stage.entry(stage).or_default() += 1;
    }
    by_stage.into_values().max().unwrap_or(0)
}
