//! How the task loop reaches other CompNodes: a message goes out without waiting, another is waited for.

mod memory;
mod tally;

use fusionllm_codec::{Codec, HostTensor};
use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{Channel, LinkBytes, LinkSpeed};

use crate::ExchangeError;
use crate::border::BorderTensor;
use crate::mailbox::{Arrived, Slot};
pub use memory::MemoryExchange;
pub(crate) use tally::LinkTally;

/// A message to another CompNode.
#[derive(Clone, Debug)]
pub struct Message {
    /// The CompNode that gets it.
    pub to: NodeIndex,
    /// The channel, step and micro-batch that it belongs to.
    pub slot: Slot,
    /// The tensor as the receiver is to have it, dense; it is encoded on its way, where it lies or on the host.
    pub tensor: BorderTensor,
    /// The codec by which it is encoded.
    pub codec: Codec,
}

/// The task loop's view of the other CompNodes.
pub trait Exchange: Send {
    /// Hands a message over. Encoding and sending happen elsewhere; this waits only while the channel's queue is
    /// full.
    ///
    /// # Errors
    /// [`ExchangeError`] if the job was aborted or the peer is lost.
    fn send(&mut self, message: Message) -> Result<(), ExchangeError>;

    /// Waits for a message.
    ///
    /// # Errors
    /// [`ExchangeError`] if the job was aborted or the peer is lost.
    fn receive(&mut self, slot: Slot) -> Result<Arrived, ExchangeError>;

    /// Takes a message if it is there.
    ///
    /// # Errors
    /// As [`Self::receive`].
    fn receive_now(&mut self, slot: Slot) -> Result<Option<Arrived>, ExchangeError>;

    /// Whether the job goes on: asked between tasks, so that compute ends soon after the job does.
    ///
    /// # Errors
    /// [`ExchangeError`] if the job was aborted or a peer is lost.
    fn check(&self) -> Result<(), ExchangeError>;

    /// What was handed over since the last call, by receiver.
    fn drain_link_bytes(&mut self) -> Vec<LinkBytes>;

    /// How fast payloads came since the last call, by sender.
    fn drain_link_speeds(&mut self) -> Vec<LinkSpeed> {
        Vec::new()
    }

    /// What error feedback holds back for the next message of each channel, after all that was handed over.
    ///
    /// # Errors
    /// [`ExchangeError`] if the job was aborted or the peer is lost.
    fn residuals(&mut self) -> Result<Vec<(Channel, HostTensor)>, ExchangeError>;

    /// Puts back what [`Self::residuals`] gave, before anything is sent.
    fn restore_residual(&mut self, channel: Channel, residual: HostTensor);
}
