//! What a CompNode says of its job to a broker that may have been started again.

use fusionllm_planner::Placement;
use serde::{Deserialize, Serialize};

use crate::{ProtocolError, RunKey, content_hash, encode};

/// The job that a CompNode is at work on, as it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Which placement of which job it is.
    pub key: RunKey,
    /// The [`placement_hash`] of the placement.
    #[serde(deserialize_with = "crate::text::cleaned")]
    pub placement: String,
    /// The first step whose report it has kept, with all later ones.
    pub kept_from: u64,
    /// The last step that it has done.
    pub done: u64,
    /// The newest step whose shard it has no more, since a broker has it or did not want it; 0 before there is one.
    pub settled: u64,
    /// Whether it stands still, or is to after a step that is told: the work was about to move.
    pub halts: bool,
}

/// What tells a placement from another one of the same number, as a broker may give it whose state was set back.
///
/// # Errors
/// [`ProtocolError`] if the placement has no binary form, which does not happen to one that was made.
pub fn placement_hash(placement: &Placement) -> Result<String, ProtocolError> {
    Ok(content_hash(&encode(placement)?))
}
