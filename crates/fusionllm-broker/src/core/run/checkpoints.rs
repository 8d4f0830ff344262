//! The checkpoints of a run: which shards are due, and which are whole.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use fusionllm_planner::NodeIndex;

use super::{Failed, Retry, Run, Shards, param_names};
use crate::checkpoint::StoredShard;
use crate::core::{Breach, ConnectionId};

/// So long it is waited between tries of the last checkpoint, all in all: for all that a run has made, somebody may have to
/// make room. With the pauses as they are, it is tried eight times.
const TRIED_FOR: Duration = Duration::from_secs(30);
/// Between two tries, at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

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
        self.gone.take_if(|(gone, _)| *gone <= step);
        if step == self.steps {
            self.retry = None;
        }
    }

    /// Whether a CompNode need not keep its shard of this step any more once it is here. That of the last checkpoint it keeps
    /// until that is in its place: it could not be made again.
    pub(in crate::core) fn settles(&self, step: u64) -> bool {
        step != self.steps || self.checkpoint == Some(step)
    }

    /// What is left of a try of the last checkpoint is removed: when the next one is due.
    pub(in crate::core) fn checkpoint_dropped(&mut self, step: u64, now: Duration) {
        let is_last = step == self.steps;
        let Some(retry) = self.retry.as_mut().filter(|retry| is_last && retry.is_dropping) else { return };
        let pause = match retry.times {
            0 => Duration::ZERO,
            times => LONGEST_PAUSE.min(Duration::from_secs(1 << (times - 1).min(6))),
        };
        (retry.is_dropping, retry.due) = (false, Some(now + pause));
        retry.waited += pause;
    }

    /// Whether what comes of the last checkpoint is of a try that has failed.
    fn is_between_tries(&self, step: u64) -> bool {
        step == self.steps && self.retry.is_some_and(|retry| retry.is_dropping || retry.due.is_some())
    }

    /// The step of which shards are asked for once more now.
    pub(in crate::core) fn asks_again(&mut self, now: Duration) -> Option<u64> {
        let retry = self.retry.as_mut()?;
        retry.due.take_if(|due| *due <= now)?;
        retry.times += 1;
        self.watchdog.moved = now;
        Some(self.steps)
    }

    /// Others have renamed or removed checkpoints: the newest that is left is that of this step, and the newest that is not
    /// there any more `went` there, if that is known.
    pub(in crate::core) fn checkpoints_gone(&mut self, left: Option<u64>, went: Option<PathBuf>) {
        let before = self.gone.take().filter(|(gone, _)| Some(*gone) >= self.checkpoint);
        let gone = before.or(self.checkpoint.map(|step| (step, went)));
        self.gone = gone.filter(|(gone, _)| Some(*gone) > left);
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
        let is_due = self.expects(step) && !self.finishing.contains(&step) && !self.is_between_tries(step);
        self.node_of(connection) == Some(node) && is_due && !is_known
    }

    /// A checkpoint cannot be kept; `may_pass` says whether it may be at another time. What that means.
    pub(in crate::core) fn checkpoint_failed(&mut self, step: u64, may_pass: bool) -> Failed {
        self.finishing.remove(&step);
        self.shards.remove(&step);
        // One that has gone sends nothing again.
        if step == self.steps && may_pass && self.finished.is_empty() {
            let is_first = self.retry.is_none();
            let new = Retry { waited: Duration::ZERO, times: 0, is_dropping: false, due: None };
            let retry = self.retry.get_or_insert(new);
            if retry.is_dropping || retry.due.is_some() {
                return Failed::Known;
            }
            if retry.waited < TRIED_FOR {
                retry.is_dropping = true;
                return Failed::Again { is_first };
            }
        }
        let is_new = self.open.remove(&step).is_some() || step > self.merged && self.given_up.insert(step);
        match step == self.steps {
            true => Failed::Last,
            false if is_new => Failed::New,
            false => Failed::Known,
        }
    }

    pub(in crate::core) fn shard_stored(&mut self, step: u64, node: NodeIndex, shard: StoredShard) {
        // One of a checkpoint that has been given up may still come.
        if node.index() < self.members.len() && self.expects(step) && !self.is_between_tries(step) {
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
    ) -> Result<bool, Breach> {
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
