//! OP-Data: one activation or gradient of one micro-batch over one edge, and what else CompNodes send each other.
//!
//! Every [`Channel`] between two CompNodes is a stream of its own. Its first frame is [`PeerFrame::Open`]; then
//! each message is a [`PeerFrame::Message`] frame followed by one frame with the payload that its header
//! announces. The receiver confirms what its task loop has taken by [`PeerFrame::Taken`] on the way back, which
//! is also what bounds the sender.

use fusionllm_codec::{Codec, ElementType};
use fusionllm_planner::{EdgeId, NodeIndex, Placement, Route, SharedId, Way};
use serde::{Deserialize, Serialize};

use crate::{LoanFrame, RunKey};

/// Which kind of pass a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Pass {
    /// A training step.
    Train,
    /// An evaluation pass after a training step.
    Eval,
}

/// What flows from one CompNode to another, each in its own stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Channel {
    /// Activations over an edge, from its producing to its consuming stage.
    Activation(EdgeId),
    /// Gradients over an edge, from its consuming to its producing stage.
    Gradient(EdgeId),
    /// The sender's gradient of shared parameters, summed over the step's micro-batches.
    Shared {
        /// Which parameters.
        id: SharedId,
        /// The holder that sends its gradient.
        from: NodeIndex,
    },
    /// The sum of squares of the sender's gradients, on its way to the root of the norm.
    NormPart {
        /// The CompNode whose gradients were summed.
        from: NodeIndex,
    },
    /// The global norm, from its root to a CompNode.
    NormTotal {
        /// The CompNode that is told.
        to: NodeIndex,
    },
}

impl Channel {
    /// What goes this way along an edge.
    pub fn of_edge(edge: EdgeId, way: Way) -> Self {
        match way {
            Way::Activation => Self::Activation(edge),
            Way::Gradient => Self::Gradient(edge),
        }
    }

    /// All that flows between two CompNodes of a placement, and from whom to whom. What several get is there once for each of
    /// them. `clips` says whether the global norm of gradients is asked for.
    pub fn all(placement: &Placement, clips: bool) -> impl Iterator<Item = (Self, Route)> + '_ {
        let edges = placement.edges.iter().flat_map(move |edge| {
            edge.ways().filter_map(move |way| Some((Self::of_edge(edge.id, way), placement.route(edge, way)?)))
        });
        let shared = placement.shared.iter().flat_map(|shared| {
            let pairs =
                shared.holders.iter().flat_map(|&from| shared.holders.iter().map(move |&to| Route { from, to }));
            pairs.map(|route| (Self::Shared { id: shared.id, from: route.from }, route))
        });
        let root = placement.norm_root();
        let norms = placement.nodes().filter(move |_| clips).flat_map(move |node| {
            let part = (Self::NormPart { from: node }, Route { from: node, to: root });
            [part, (Self::NormTotal { to: node }, Route { from: root, to: node })]
        });
        edges.chain(shared).chain(norms).filter(|(_, route)| route.from != route.to)
    }
}

/// Everything a receiver must know of a payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpDataHeader {
    /// The training step, counted from 0 (an evaluation pass has the step it follows).
    pub step: u64,
    /// Training or evaluation.
    pub pass: Pass,
    /// The micro-batch; 0 for what is sent once a step.
    pub micro_batch: u32,
    /// How the payload is encoded.
    pub codec: Codec,
    /// Element type of the tensor.
    pub element: ElementType,
    /// Shape of the tensor.
    pub shape: Vec<u64>,
}

/// A frame between two CompNodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerFrame {
    /// First frame of a stream: what it carries. The receiver answers with [`PeerFrame::Resume`].
    Open {
        /// Which placement of which job it belongs to.
        key: RunKey,
        /// What will flow.
        channel: Channel,
    },
    /// The receiver's answer: the number of the message it expects next.
    Resume {
        /// Number of the next message.
        next: u64,
    },
    /// A message; its payload is the next frame.
    Message {
        /// Its number in the channel, from 0.
        number: u64,
        /// What the payload is.
        header: OpDataHeader,
    },
    /// All messages before this number were taken by the receiver's task loop.
    Taken {
        /// Number of the first message not taken.
        next: u64,
    },
    /// First frame of a stream that carries no channel: asks for a snapshot of the same job.
    Loan(LoanFrame),
}
