//! A placement that may still be at work, from before the broker was started again.

use std::collections::BTreeMap;
use std::time::Duration;

use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{RunKey, Standing, placement_hash};

use super::ConnectionId;
use super::bounds::MOST_AHEAD;
use crate::run_dir::PlacementFile;
use crate::store::{JobRecord, Placed};

/// The files of a run that cannot be opened are tried again so often.
const OPENED_EACH: Duration = Duration::from_secs(1);

/// How far it is with the files of a run that may be taken back: it is when they are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opening {
    /// It is not asked for yet.
    Closed,
    /// It is asked for.
    Asked,
    /// They cannot be opened. It is tried again then.
    Failed(Duration),
    /// They are open.
    Open,
}

/// A placement that was at work when the broker ended.
#[derive(Debug)]
pub(super) struct TakeBack {
    pub(super) key: RunKey,
    pub(super) placed: Placed,
    pub(super) file: PlacementFile,
    /// The last step that is written, and its loss.
    pub(super) reached: (u64, Option<f64>),
    /// The newest whole checkpoint.
    pub(super) checkpoint: Option<u64>,
    /// The last step of the job.
    steps: u64,
    pub(super) opening: Opening,
    /// Why its files could not be opened when that was last tried.
    waits_for_files: Option<String>,
    /// Who is back, and what it said.
    pub(super) back: BTreeMap<NodeIndex, (ConnectionId, Standing)>,
}

impl TakeBack {
    /// The placement of a job that its record tells, if that and the file in the run directory are of one kind.
    pub(super) fn of(
        record: &JobRecord,
        reached: Option<(u64, f64)>,
        checkpoint: Option<u64>,
        file: Option<PlacementFile>,
    ) -> Option<Self> {
        let (placed, file) = (record.placed.clone()?, file?);
        let names = placed.members.iter().map(|member| &member.name);
        let is_it = file.generation == record.generation
            && placement_hash(&file.placement).ok().as_ref() == Some(&placed.placement)
            && names.eq(&file.placement.compnodes);
        let may = record.from_step.is_none();
        let reached = reached.filter(|(step, _)| *step >= placed.from);
        (is_it && may).then(|| Self {
            key: RunKey { job: record.job, generation: record.generation },
            reached: reached.map_or((placed.from, None), |(step, loss)| (step, Some(loss))),
            placed,
            file,
            checkpoint,
            steps: record.spec.train.steps,
            opening: Opening::Closed,
            waits_for_files: None,
            back: BTreeMap::new(),
        })
    }

    /// Which of its CompNodes has this key.
    pub(super) fn node_of(&self, key: &[u8; 32]) -> Option<NodeIndex> {
        let nodes = (0..).map(NodeIndex).zip(&self.placed.members);
        nodes.into_iter().find(|(_, member)| member.key == *key).map(|(node, _)| node)
    }

    pub(super) fn name_of(&self, node: NodeIndex) -> &str {
        self.placed.members.get(node.index()).map_or("", |member| &member.name)
    }

    /// Its CompNode of this name and machine, of which another process has come now.
    pub(super) fn replaced(&self, wanted: &str, host: &str) -> Option<NodeIndex> {
        let nodes = (0..).map(NodeIndex).zip(&self.placed.members);
        let is_it = |name: &str, there: &str| (name, there) == (wanted, host);
        let mut same =
            nodes.filter(|(node, member)| is_it(&member.name, &member.host) && !self.back.contains_key(node));
        same.next().map(|(node, _)| node)
    }

    /// Whether it trains on where this can go on. Of steps that are done and whose reports it has not kept, only the figures
    /// are missing: its earlier broker had written them.
    pub(super) fn check(&self, standing: &Standing) -> Result<(), &'static str> {
        let written = self.reached.0.max(standing.kept_from.saturating_sub(1));
        if (standing.key, &standing.placement) != (self.key, &self.placed.placement) {
            return Err("is at work on another placement");
        }
        if standing.done < written {
            return Err("has done fewer steps than are written");
        }
        if standing.done - written > MOST_AHEAD || standing.done > self.steps || standing.settled > standing.done {
            return Err("says that it is where it cannot be");
        }
        if standing.halts {
            return Err("stands still, since the work was about to move");
        }
        if standing.settled >= self.steps {
            return Err("has no shard of the last checkpoint any more, which was not whole");
        }
        Ok(())
    }

    /// Once all are back: the step up to which all is written, as far as it still can be, with its loss if that is known.
    /// Nothing if one has not done that step.
    pub(super) fn goes_on_after(&self) -> Option<(u64, Option<f64>)> {
        let standings = || self.back.values().map(|(_, standing)| standing);
        let kept = standings().map(|standing| standing.kept_from.saturating_sub(1)).max().unwrap_or(0);
        let reached = if kept > self.reached.0 { (kept, None) } else { self.reached };
        standings().all(|standing| standing.done >= reached.0).then_some(reached)
    }

    /// Whether its files are to be opened now; if so, it counts as asked for.
    pub(super) fn asks_to_open(&mut self, now: Duration) -> bool {
        let is_due = match self.opening {
            Opening::Closed => true,
            Opening::Asked | Opening::Open => false,
            Opening::Failed(again) => now >= again,
        };
        if is_due {
            self.opening = Opening::Asked;
        }
        is_due
    }

    /// Its files cannot be opened now.
    pub(super) fn cannot_open(&mut self, reason: String, now: Duration) {
        (self.opening, self.waits_for_files) = (Opening::Failed(now + OPENED_EACH), Some(reason));
    }

    /// Those who are not back.
    pub(super) fn missing(&self) -> Vec<String> {
        let nodes = (0..).map(NodeIndex).take(self.placed.members.len());
        nodes.filter(|node| !self.back.contains_key(node)).map(|node| format!("`{}`", self.name_of(node))).collect()
    }

    /// What it waits for, in words.
    pub(super) fn waits(&self) -> String {
        if let Some(reason) = &self.waits_for_files {
            return format!("its CompNodes train on, and its files cannot be written: {reason}");
        }
        let (back, all) = (self.back.len(), self.placed.members.len());
        format!("its CompNodes may still be at work: {back} of {all} are back")
    }
}
