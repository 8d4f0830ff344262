//! How the task loop reaches other CompNodes: a message goes out without waiting, another is waited for.

use std::collections::BTreeMap;
use std::sync::Arc;

use fusionllm_codec::{Codec, HostTensor};
use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{Channel, CompressionSpec, LinkBytes, LinkSpeed};

use crate::ExchangeError;
use crate::channel_codec::{ChannelDecoder, ChannelEncoder, ChannelOptions};
use crate::mailbox::{Arrived, Mailbox, Slot};

/// Steps between two samples of the error that codecs introduce.
const SAMPLED_STEPS: u64 = 10;

/// A message to another CompNode.
#[derive(Clone, Debug)]
pub struct Message {
    /// Who gets it.
    pub to: NodeIndex,
    /// Where it belongs.
    pub slot: Slot,
    /// The tensor.
    pub tensor: HostTensor,
    /// How it is encoded.
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

/// Whether the error of a message's codec is measured: of one micro-batch every few steps, since it costs a decoding.
pub(crate) fn is_sampled(slot: &Slot) -> bool {
    slot.micro_batch == 0 && slot.step.is_multiple_of(SAMPLED_STEPS)
}

/// Adds up what goes to each receiver.
#[derive(Debug)]
pub(crate) struct LinkTally {
    names: Vec<String>,
    node: NodeIndex,
    by_receiver: BTreeMap<NodeIndex, (u64, u64, Codec)>,
    found: BTreeMap<NodeIndex, Found>,
}

/// What is known of a message only once it is encoded.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    /// Bytes beyond the codec's steady size: a basis, less what a message does not use.
    pub(crate) beyond_steady: i64,
    /// Relative error, if it was measured.
    pub(crate) error: Option<f64>,
}

impl LinkTally {
    pub(crate) fn new(names: Vec<String>, node: NodeIndex) -> Self {
        Self { names, node, by_receiver: BTreeMap::new(), found: BTreeMap::new() }
    }

    pub(crate) fn add(&mut self, message: &Message, header_bytes: u64) -> Result<(), ExchangeError> {
        let shape = message.tensor.shape();
        let encoded = message.codec.steady_bytes(shape)? + header_bytes;
        let dense = Codec::Dense.encoded_bytes(shape)?;
        let entry = self.by_receiver.entry(message.to).or_insert((0, 0, message.codec));
        entry.0 += encoded;
        entry.1 += dense;
        if !message.codec.is_lossless() {
            entry.2 = message.codec;
        }
        Ok(())
    }

    /// What encoding a message showed beyond what [`Self::add`] knew.
    pub(crate) fn encoded(&mut self, to: NodeIndex, found: Found) {
        let entry = self.found.entry(to).or_default();
        entry.beyond_steady += found.beyond_steady;
        entry.error = match (entry.error, found.error) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        };
    }

    pub(crate) fn drain(&mut self) -> Vec<LinkBytes> {
        let names = &self.names;
        let name = |node: NodeIndex| names.get(node.index()).cloned().unwrap_or_else(|| node.to_string());
        let from = name(self.node);
        let entries = std::mem::take(&mut self.by_receiver);
        entries
            .into_iter()
            .map(|(to, (bytes, dense_bytes, codec))| {
                let Found { beyond_steady, error } = self.found.remove(&to).unwrap_or_default();
                let (from, codec) = (from.clone(), codec.to_string());
                let bytes = bytes.saturating_add_signed(beyond_steady);
                LinkBytes { from, to: name(to), bytes, dense_bytes, codec, error }
            })
            .collect()
    }
}

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
        compression: CompressionSpec,
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
