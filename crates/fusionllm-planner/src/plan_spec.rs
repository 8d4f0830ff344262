//! What a plan is asked for.

use fusionllm_codec::Codec;
use serde::{Deserialize, Serialize};

use crate::{Compression, Pipeline, PlanError, Recompute};

/// How the OP-DAG is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// The same number of ops on every CompNode: the paper's first baseline.
    EqualNumber,
    /// Compute in proportion to every CompNode's speed: the paper's second baseline.
    EqualCompute,
    /// By links, speeds and memories: the paper's OP-Fence, judged by simulation.
    #[default]
    OpFence,
    /// The best of all placements: for small cases.
    Optimal,
}

impl Strategy {
    /// Every strategy.
    pub const ALL: [Self; 4] = [Self::EqualNumber, Self::EqualCompute, Self::OpFence, Self::Optimal];

    /// Its name in job files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::EqualNumber => "equal-number",
            Self::EqualCompute => "equal-compute",
            Self::OpFence => "op-fence",
            Self::Optimal => "optimal",
        }
    }

    /// The strategy of that name.
    ///
    /// # Errors
    /// [`PlanError::Strategy`] with the names there are.
    pub fn from_name(name: &str) -> Result<Self, PlanError> {
        Self::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(|s| format!("`{}`", s.name())).join(", ");
            PlanError::Strategy { reason: format!("unknown strategy `{name}`, expected one of {names}") }
        })
    }
}

/// One entry of `placement.stages`: all ops after the previous entry up to and with `last_op`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageSpec {
    /// Index of the CompNode that holds the stage; 0 is the data owner.
    pub compnode: u32,
    /// Name of the stage's last op in topological order.
    pub last_op: String,
}

/// What [`crate::place`] is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacementSpec {
    /// How the OP-DAG is cut.
    pub strategy: Strategy,
    /// Explicit stages; empty to let the strategy cut.
    pub stages: Vec<StageSpec>,
    /// How FP and BP alternate in a training step.
    pub pipeline: Pipeline,
    /// How many micro-batches further than 1F1B a stage may be ahead of its BP; if not given, as many as the step gains
    /// from and memory holds.
    pub run_ahead: Option<u32>,
    /// Of how many micro-batches the weight gradients may wait for a pause at once, where memory holds them; if not
    /// given, of as many as the step gains from.
    pub deferred: Option<u32>,
    /// Micro-batches in a training step.
    pub micro_batches: u32,
    /// Samples in a micro-batch.
    pub micro_batch_size: u32,
    /// Micro-batches in an evaluation pass.
    pub eval_micro_batches: u32,
    /// Keep token ids, labels and both ends of the model on CompNode 0, and machines of one organisation apart.
    pub private: bool,
    /// With `private`: so many of the model's first and last blocks stay on CompNode 0, too.
    pub keep_blocks: [u32; 2],
    /// Codec of F32 boundary tensors, both directions.
    pub codec: Codec,
}

/// Which CompNode owns the data and comes first in the pipeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Owner {
    /// The cluster's first one.
    #[default]
    First,
    /// Whichever is best.
    Any,
}

/// What [`crate::plan`] is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanSpec {
    /// Strategy, pipeline, micro-batches, codec.
    pub placement: PlacementSpec,
    /// What the links carry.
    pub compression: Compression,
    /// Who owns the data.
    pub owner: Owner,
    /// Whether senders keep what a gradient's codec dropped, which costs an f32 an element.
    pub error_feedback: bool,
    /// Whether gradients are clipped by the global norm, which costs two messages.
    pub clip: bool,
    /// Tokens in a step.
    pub tokens_per_step: u64,
    /// What the optimizer keeps of each parameter that is trained, in multiples of its bytes: AdamW two, SGD with momentum
    /// one, without it none.
    pub states: u32,
    /// Whether activations are made anew in BP.
    pub recompute: Recompute,
}

impl PlanSpec {
    /// A plan of `placement` with nothing compressed, on the first CompNode's data, trained by AdamW.
    pub fn dense(placement: PlacementSpec) -> Self {
        Self {
            placement,
            compression: Compression::Dense,
            owner: Owner::First,
            error_feedback: false,
            clip: true,
            tokens_per_step: 0,
            states: 2,
            recompute: Recompute::Auto,
        }
    }
}
