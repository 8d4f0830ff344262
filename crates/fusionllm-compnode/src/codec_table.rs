//! Which codec each direction of each edge has now.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use fusionllm_codec::Codec;
use fusionllm_planner::{EdgeId, StageEdge, Way};

/// Codecs that differ from the placement's. A message says its codec, so a sender may change it at any time.
#[derive(Debug, Default)]
pub struct CodecTable(RwLock<BTreeMap<(EdgeId, Way), Codec>>);

impl CodecTable {
    /// From now on what goes this way along the edge has this codec.
    pub fn set(&self, edge: EdgeId, way: Way, codec: Codec) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert((edge, way), codec);
    }

    /// The codec of what goes this way along an edge.
    pub(crate) fn codec(&self, edge: &StageEdge, way: Way) -> Codec {
        let changed = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&(edge.id, way)).copied();
        changed.unwrap_or_else(|| edge.codec(way))
    }
}
