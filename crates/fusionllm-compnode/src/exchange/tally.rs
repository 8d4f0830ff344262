//! What goes to each receiver, added up.

use std::collections::BTreeMap;

use fusionllm_codec::Codec;
use fusionllm_planner::NodeIndex;
use fusionllm_protocol::LinkBytes;

use super::Message;
use crate::ExchangeError;
use crate::channel_codec::Found;

/// What went to one receiver.
#[derive(Clone, Copy, Debug)]
struct Sent {
    /// As encoded, with headers.
    bytes: u64,
    /// The same tensors as dense fp32.
    dense_bytes: u64,
    /// The last codec that loses something; if none does, that of the first message.
    codec: Codec,
}

/// Adds up what goes to each receiver.
#[derive(Debug)]
pub(crate) struct LinkTally {
    names: Vec<String>,
    node: NodeIndex,
    by_receiver: BTreeMap<NodeIndex, Sent>,
    found: BTreeMap<NodeIndex, Found>,
}

impl LinkTally {
    pub(crate) fn new(names: Vec<String>, node: NodeIndex) -> Self {
        Self { names, node, by_receiver: BTreeMap::new(), found: BTreeMap::new() }
    }

    pub(crate) fn add(&mut self, message: &Message, header_bytes: u64) -> Result<(), ExchangeError> {
        let shape = message.tensor.shape();
        let encoded = message.codec.steady_bytes(shape)? + header_bytes;
        let dense = Codec::Dense.encoded_bytes(shape)?;
        let nothing = Sent { bytes: 0, dense_bytes: 0, codec: message.codec };
        let sent = self.by_receiver.entry(message.to).or_insert(nothing);
        sent.bytes += encoded;
        sent.dense_bytes += dense;
        if !message.codec.is_lossless() {
            sent.codec = message.codec;
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
            .map(|(to, Sent { bytes, dense_bytes, codec })| {
                let Found { beyond_steady, error } = self.found.remove(&to).unwrap_or_default();
                let (from, codec) = (from.clone(), codec.to_string());
                let bytes = bytes.saturating_add_signed(beyond_steady);
                LinkBytes { from, to: name(to), bytes, dense_bytes, codec, error }
            })
            .collect()
    }
}
