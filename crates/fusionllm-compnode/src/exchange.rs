//! How the task loop reaches other CompNodes: a message goes out without waiting, another is waited for.

use std::collections::BTreeMap;
use std::sync::Arc;

use fusionllm_codec::{Codec, HostTensor};
use fusionllm_planner::NodeIndex;
use fusionllm_protocol::LinkBytes;

use crate::ExchangeError;
use crate::mailbox::{Arrived, Mailbox, Slot};

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

    /// What was handed over since the last call, by receiver.
    fn drain_link_bytes(&mut self) -> Vec<LinkBytes>;
}

/// Adds up what goes to each receiver.
#[derive(Debug)]
pub(crate) struct LinkTally {
    names: Vec<String>,
    node: NodeIndex,
    by_receiver: BTreeMap<NodeIndex, (u64, u64, &'static str)>,
}

impl LinkTally {
    pub(crate) fn new(names: Vec<String>, node: NodeIndex) -> Self {
        Self { names, node, by_receiver: BTreeMap::new() }
    }

    pub(crate) fn add(&mut self, message: &Message, header_bytes: u64) -> Result<(), ExchangeError> {
        let shape = message.tensor.shape();
        let encoded = message.codec.encoded_bytes(shape)? + header_bytes;
        let dense = Codec::Dense.encoded_bytes(shape)?;
        let entry = self.by_receiver.entry(message.to).or_insert((0, 0, message.codec.name()));
        entry.0 += encoded;
        entry.1 += dense;
        if !message.codec.is_lossless() {
            entry.2 = message.codec.name();
        }
        Ok(())
    }

    pub(crate) fn drain(&mut self) -> Vec<LinkBytes> {
        let name = |node: NodeIndex| self.names.get(node.index()).cloned().unwrap_or_else(|| node.to_string());
        let from = name(self.node);
        let entries = std::mem::take(&mut self.by_receiver);
        entries
            .into_iter()
            .map(|(to, (bytes, dense_bytes, codec))| LinkBytes {
                from: from.clone(),
                to: name(to),
                bytes,
                dense_bytes,
                codec: codec.to_owned(),
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
}

impl MemoryExchange {
    /// The exchange of `node` among CompNodes with these mailboxes and names.
    ///
    /// # Errors
    /// [`ExchangeError::Aborted`] if `node` has no mailbox.
    pub fn new(node: NodeIndex, mailboxes: Vec<Arc<Mailbox>>, names: Vec<String>) -> Result<Self, ExchangeError> {
        let own = mailboxes
            .get(node.index())
            .cloned()
            .ok_or_else(|| ExchangeError::Aborted { reason: format!("{node} has no mailbox") })?;
        Ok(Self { own, mailboxes, tally: LinkTally::new(names, node) })
    }
}

impl Exchange for MemoryExchange {
    fn send(&mut self, message: Message) -> Result<(), ExchangeError> {
        self.tally.add(&message, 0)?;
        let mailbox = self
            .mailboxes
            .get(message.to.index())
            .ok_or_else(|| ExchangeError::Peer { peer: message.to.to_string(), reason: "has no mailbox".to_owned() })?;
        let mut bytes = Vec::new();
        message.codec.encode(&message.tensor, &mut bytes)?;
        let tensor = message.codec.decode(message.tensor.shape(), message.tensor.element_type(), &bytes)?;
        mailbox.put(message.slot, tensor);
        Ok(())
    }

    fn receive(&mut self, slot: Slot) -> Result<Arrived, ExchangeError> {
        self.own.take(slot)
    }

    fn drain_link_bytes(&mut self) -> Vec<LinkBytes> {
        self.tally.drain()
    }
}
