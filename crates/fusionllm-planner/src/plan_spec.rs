//! What a plan is asked for.

use crate::{Compression, PlacementSpec};

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
}

impl PlanSpec {
    /// A plan of `placement` with nothing compressed, on the first CompNode's data.
    pub fn dense(placement: PlacementSpec) -> Self {
        let compression = Compression::Dense;
        Self { placement, compression, owner: Owner::First, error_feedback: false, clip: true, tokens_per_step: 0 }
    }
}
