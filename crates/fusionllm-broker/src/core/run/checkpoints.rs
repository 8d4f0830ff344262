//! The checkpoints of a run: which shards are due, and which are whole.

use std::collections::BTreeMap;

use fusionllm_planner::NodeIndex;

use super::{Failed, Run, Shards, param_names};
use crate::checkpoint::StoredShard;
use crate::core::ConnectionId;

impl Run {
    /// Training loss of a step after which a checkpoint is still to come.
    pub(in crate::core) fn loss_of(&self, step: u64) -> Option<f64> {
        self.open.get(&step).copied()
    }

    /// A checkpoint is whole and in its place.
    pub(in crate::core) fn checkpoint_finished(&mut self, step: u64) {
        self.finishing.remove(&step);
        self.open.remove(&step);
        self.checkpoint = self.checkpoint.max(Some(step));
        self.gone = self.gone.filter(|gone| *gone > step);
    }

    /// Others have renamed or removed checkpoints: the newest that is left is that of this step.
    pub(in crate::core) fn checkpoints_gone(&mut self, left: Option<u64>) {
        self.gone = self.gone.max(self.checkpoint).filter(|gone| Some(*gone) > left);
        self.checkpoint = left;
    }

    /// Whether a checkpoint of this step is still to come.
    fn expects(&self, step: u64) -> bool {
        let is_ahead = step > self.merged && step <= self.steps && self.checkpoints.is_due(step);
        self.open.contains_key(&step) || is_ahead && !self.given_up.contains(&step)
    }

    /// Whether the shard is one that this CompNode owes.
    pub(in crate::core) fn owes_shard(&self, connection: ConnectionId, node: NodeIndex, step: u64) -> bool {
        let is_known = self.shards.get(&step).is_some_and(|s| s.contains_key(&node));
        self.node_of(connection) == Some(node) && self.expects(step) && !self.finishing.contains(&step) && !is_known
    }

    /// A checkpoint cannot be kept. What that means.
    pub(in crate::core) fn checkpoint_failed(&mut self, step: u64) -> Failed {
        self.finishing.remove(&step);
        self.shards.remove(&step);
        let is_new = self.open.remove(&step).is_some() || step > self.merged && self.given_up.insert(step);
        match step == self.steps {
            true => Failed::Last,
            false if is_new => Failed::New,
            false => Failed::Known,
        }
    }

    pub(in crate::core) fn shard_stored(&mut self, step: u64, node: NodeIndex, shard: StoredShard) {
        // One of a checkpoint that has been given up may still come.
        if node.index() < self.members.len() && self.expects(step) {
            self.shards.entry(step).or_default().insert(node, shard);
        }
    }

    /// Checkpoints of which all shards are there and whose step is known; they count as being finished now.
    pub(in crate::core) fn whole_checkpoints(&mut self) -> Vec<(u64, Shards)> {
        let (count, merged) = (self.members.len(), self.merged);
        // Shards have streams of their own, and may be there before the reports of their step, which have its loss.
        let is_whole =
            |(step, shards): (&u64, &BTreeMap<_, _>)| (shards.len() == count && *step <= merged).then_some(*step);
        let whole: Vec<u64> = self.shards.iter().filter_map(is_whole).collect();
        let mut checkpoints = Vec::new();
        for step in whole {
            let shards = self.shards.remove(&step).unwrap_or_default();
            self.finishing.insert(step);
            let named =
                shards.into_iter().map(|(node, s)| (s, param_names(&self.dag, &self.placement, node))).collect();
            checkpoints.push((step, named));
        }
        checkpoints
    }

    /// Whether all is done and every checkpoint is whole.
    pub(in crate::core) fn is_done(&self) -> bool {
        self.merged == self.steps && self.finished.len() == self.members.len() && self.open.is_empty()
    }

    /// Whether the shard is one that this CompNode owes; why it cannot be one if it is too large.
    pub(in crate::core) fn wants_shard(
        &self,
        connection: ConnectionId,
        node: NodeIndex,
        step: u64,
        bytes: u64,
    ) -> Result<bool, String> {
        if !self.owes_shard(connection, node, step) || !self.bounds.is_near(node, step, self.catches_up_at) {
            return Ok(false);
        }
        self.bounds.check_shard(node, bytes).map(|()| true)
    }

    /// Whether one more note of a CompNode is kept.
    pub(in crate::core) fn note_comes(&mut self, connection: ConnectionId) -> bool {
        self.node_of(connection).is_some() && self.bounds.note_comes()
    }
}
