//! What a peer does that neither the protocol nor the plan allows.

use fusionllm_codec::CodecError;
use fusionllm_protocol::ProtocolError;

/// Why a message of a peer is not taken. It ends the job, since the peer would send it again.
#[derive(Debug, thiserror::Error)]
pub(super) enum Breach {
    /// A message that the plan does not have, or not now.
    #[error("{0}")]
    Plan(String),
    /// A tensor that no codec makes.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A message whose number does not follow.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}
