//! Which codec each direction of each edge has now.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use fusionllm_codec::Codec;
use fusionllm_planner::{EdgeId, StageEdge};

/// Codecs that differ from the placement's. A message says its codec, so a sender may change it at any time.
#[derive(Debug, Default)]
pub struct CodecTable(RwLock<BTreeMap<(EdgeId, bool), Codec>>);

impl CodecTable {
    /// From now on the edge's activation, or its gradient, has this codec.
    pub fn set(&self, edge: EdgeId, gradient: bool, codec: Codec) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert((edge, gradient), codec);
    }

    /// The codec of an edge's activation.
    pub(crate) fn activation(&self, edge: &StageEdge) -> Codec {
        self.get(edge.id, false).unwrap_or(edge.activation_codec)
    }

    /// The codec of an edge's gradient.
    pub(crate) fn gradient(&self, edge: &StageEdge) -> Codec {
        self.get(edge.id, true).unwrap_or(edge.gradient_codec)
    }

    fn get(&self, edge: EdgeId, gradient: bool) -> Option<Codec> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&(edge, gradient)).copied()
    }
}
