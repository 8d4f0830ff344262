//! A run that a broker takes back which was started again.

use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{FromBroker, Standing, placement_hash};

use super::Run;
use crate::core::ConnectionId;

impl Run {
    /// What tells its placement from others; nothing if it has no such.
    pub(in crate::core) fn placement_hash(&self) -> Option<String> {
        placement_hash(&self.placement).ok()
    }

    /// All steps up to this one are written.
    pub(in crate::core) fn recorded(&mut self, step: u64) {
        self.recorded = self.recorded.max(step);
    }

    /// The last step that is written, of those that it has done.
    pub(in crate::core) fn last_recorded(&self) -> Option<u64> {
        (self.recorded > self.from).then_some(self.recorded)
    }

    /// Whether it began under another broker process.
    pub(in crate::core) fn was_taken_back(&self) -> bool {
        self.catches_up_at > 0
    }

    /// Whether reports have come of all that was done before it was taken back.
    pub(in crate::core) fn has_caught_up(&self) -> bool {
        self.merged >= self.catches_up_at
    }

    /// It began after `from` steps and is at work: `loss` is that of the last step that is written, and `checkpoint` the newest
    /// whole one. Gives the step of the newest checkpoint that will never be whole: a shard of it went with the broker before.
    pub(in crate::core) fn taken_back(
        &mut self,
        from: u64,
        checkpoint: Option<u64>,
        standings: &[Standing],
        loss: Option<f64>,
    ) -> Option<u64> {
        self.ready = (0..).map(NodeIndex).take(self.members.len()).collect();
        (self.from, self.checkpoint, self.weights_are_sent) = (from, checkpoint, false);
        self.catches_up_at = standings.iter().map(|standing| standing.done).max().unwrap_or(0);
        let settled = standings.iter().map(|standing| standing.settled).max().unwrap_or(0);
        self.given_up.extend((self.merged + 1..=settled).filter(|&step| self.checkpoints.is_due(step)));
        let newest = self.merged.max(settled);
        let lost = newest.checked_rem(self.checkpoints.every).map(|since| newest - since);
        if self.merged == self.steps {
            // Only that is still to come.
            self.open.insert(self.steps, loss.unwrap_or(f64::NAN));
        }
        lost.filter(|&step| step > checkpoint.unwrap_or(0).max(from) && step != self.steps)
    }

    /// Who is to send by which codec as planned: the controller begins with these, whatever was in use.
    pub(in crate::core) fn codecs_of_plan(&self) -> Vec<(ConnectionId, FromBroker)> {
        let placement = &self.placement;
        let edges = placement.edges.iter().filter(|edge| self.controller.is_some() && placement.is_boundary(edge));
        let sent = edges.flat_map(|edge| edge.ways().map(move |way| (edge, way)));
        let to_sender = |(edge, way)| {
            let from = placement.route(edge, way)?.from;
            let message = FromBroker::SetCodec { key: self.key, edge: edge.id, way, codec: edge.codec(way) };
            Some((*self.members.get(from.index())?, message))
        };
        sent.filter_map(to_sender).collect()
    }
}
