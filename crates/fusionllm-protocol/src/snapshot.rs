//! Snapshots: what a CompNode holds after a step, kept by itself and by others so that a job can go on from there.

use fusionllm_planner::NodeIndex;
use serde::{Deserialize, Serialize};

use crate::{PeerRecord, RunKey};

/// Which snapshot: of one CompNode of a placement, after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId {
    /// The placement of the job under which it was taken.
    pub key: RunKey,
    /// Updates that it has.
    pub step: u64,
    /// Whose parameters, optimizer state and residuals it has.
    pub node: NodeIndex,
}

/// A snapshot by its content: whoever has a file of this hash has the snapshot, however it came there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Snapshot {
    /// Which snapshot it is.
    pub id: SnapshotId,
    /// Bytes of its safetensors file.
    pub bytes: u64,
    /// BLAKE3 hash of the file.
    pub hash: [u8; 32],
}

/// Where a CompNode finds a part of what it begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSource {
    /// The snapshot that has it.
    pub snapshot: Snapshot,
    /// Who lends it; nothing: it lies with the receiver itself.
    pub from: Option<PeerRecord>,
    /// Names of the parameters to take from it, with their optimizer state.
    pub params: Vec<String>,
}

/// A frame on a stream over which a snapshot is lent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoanFrame {
    /// First frame: asks for a snapshot. The answer is one of the other two.
    Fetch {
        /// The snapshot that is asked for.
        snapshot: Snapshot,
        /// The parameters that are wanted of it, with their optimizer state and all residuals; nothing: the whole file.
        params: Option<Vec<String>>,
    },
    /// The answer; a safetensors file of this size follows in frames of content, and the stream ends.
    Lent {
        /// Bytes of content.
        bytes: u64,
    },
    /// The other answer: it is not here, or not lent to the asker.
    NotLent {
        /// Why, in one line.
        reason: String,
        /// Whether that may change in a moment: the broker's word may be on its way to the lender.
        is_early: bool,
    },
}
