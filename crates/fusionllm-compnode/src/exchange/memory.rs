//! The exchange of CompNodes in one process.

use std::collections::BTreeMap;
use std::sync::Arc;

use fusionllm_codec::HostTensor;
use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{Channel, CompressionView, LinkBytes};

use super::{Exchange, LinkTally, Message};
use crate::ExchangeError;
use crate::channel_codec::{ChannelDecoder, ChannelEncoder, ChannelOptions};
use crate::mailbox::{Arrived, Mailbox, Slot};

/// CompNodes of one process: every message passes through its codec and straight into the receiver's mailbox.
#[derive(Debug)]
pub struct MemoryExchange {
    own: Arc<Mailbox>,
    mailboxes: Vec<Arc<Mailbox>>,
    tally: LinkTally,
    options: ChannelOptions,
    /// Both ends of what goes out, by receiver, too: several may get what one channel carries.
    ends: BTreeMap<(NodeIndex, Channel), (ChannelEncoder, ChannelDecoder)>,
    /// Of a checkpoint, until their channels are used.
    residuals: BTreeMap<Channel, HostTensor>,
}

impl MemoryExchange {
    /// The exchange of `node` among CompNodes with these mailboxes and names.
    ///
    /// # Errors
    /// [`ExchangeError::Aborted`] if `node` has no mailbox.
    pub fn new(
        node: NodeIndex,
        mailboxes: Vec<Arc<Mailbox>>,
        names: Vec<String>,
        compression: CompressionView,
    ) -> Result<Self, ExchangeError> {
        let own = mailboxes
            .get(node.index())
            .cloned()
            .ok_or_else(|| ExchangeError::Aborted { reason: format!("{node} has no mailbox") })?;
        let (tally, options) = (LinkTally::new(names, node), ChannelOptions::of(&compression));
        Ok(Self { own, mailboxes, tally, options, ends: BTreeMap::new(), residuals: BTreeMap::new() })
    }
}

impl Exchange for MemoryExchange {
    fn send(&mut self, message: Message) -> Result<(), ExchangeError> {
        self.tally.add(&message, 0)?;
        let mailbox = self
            .mailboxes
            .get(message.to.index())
            .ok_or_else(|| ExchangeError::Peer { peer: message.to.to_string(), reason: "has no mailbox".to_owned() })?;
        let (slot, codec, options) = (message.slot, message.codec, self.options);
        let (encoder, decoder) = self.ends.entry((message.to, slot.channel)).or_insert_with(|| {
            let mut encoder = ChannelEncoder::new(options, slot.channel);
            if let Some(residual) = self.residuals.remove(&slot.channel) {
                encoder.restore(residual);
            }
            (encoder, ChannelDecoder::new(options, slot.channel))
        });
        let mut bytes = Vec::new();
        let found = encoder.encode(&slot, codec, &message.tensor, &mut bytes)?;
        let (shape, element) = (message.tensor.shape().to_vec(), message.tensor.element_type());
        let tensor = decoder.decode(slot.pass, codec, shape, element, &bytes)?;
        self.tally.encoded(message.to, found);
        if mailbox.put(slot, tensor, codec) {
            return Ok(());
        }
        let (peer, reason) = (message.to.to_string(), format!("{slot:?} was sent twice (internal error)"));
        Err(ExchangeError::Peer { peer, reason })
    }

    fn residuals(&mut self) -> Result<Vec<(Channel, HostTensor)>, ExchangeError> {
        let residual = |(&(_, channel), (encoder, _)): (&(NodeIndex, Channel), &(ChannelEncoder, ChannelDecoder))| {
            encoder.residual().map(|residual| (channel, residual))
        };
        Ok(self.ends.iter().filter_map(residual).collect())
    }

    fn restore_residual(&mut self, channel: Channel, residual: HostTensor) {
        self.residuals.insert(channel, residual);
    }

    fn receive(&mut self, slot: Slot) -> Result<Arrived, ExchangeError> {
        self.own.take(slot)
    }

    fn receive_now(&mut self, slot: Slot) -> Result<Option<Arrived>, ExchangeError> {
        self.own.take_now(slot)
    }

    fn check(&self) -> Result<(), ExchangeError> {
        self.own.closed().map_or(Ok(()), Err)
    }

    fn drain_link_bytes(&mut self) -> Vec<LinkBytes> {
        self.tally.drain()
    }
}
