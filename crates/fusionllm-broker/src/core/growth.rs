//! A job that goes on with fewer CompNodes than it had takes in those that are there again.

use std::collections::BTreeSet;
use std::time::Duration;

use fusionllm_protocol::{JobState, RunKey};

use super::detector::SUSPECT;
use super::{Action, ConnectionId, Core, Job};

/// A CompNode that has been here and idle for so long is there to stay.
const SETTLED: Duration = Duration::from_secs(10);
/// What is left of a job must take this long, or it is not worth a move.
const LEAST_LEFT: Duration = Duration::from_secs(60);
/// First and longest rest after such a move: where machines come and go, a job must get on, too.
const REST: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// What is remembered of it.
#[derive(Debug, Default)]
pub(super) struct Growth {
    /// The most CompNodes that a placement of the job had.
    most: usize,
    /// Those for which it has moved before: the plan may have left them out.
    tried: BTreeSet<ConnectionId>,
    rest: Duration,
    rest_until: Duration,
}

impl Growth {
    /// It is placed on so many.
    pub(super) fn placed(&mut self, members: usize) {
        self.most = self.most.max(members);
    }
}

impl Core {
    /// Has jobs move that are on fewer CompNodes than they were, where others are idle.
    pub(super) fn grow(&mut self, now: Duration) -> Vec<Action> {
        // Whoever waits has the idle ones first.
        let waits = |job: &Job| matches!(job.record.state, JobState::Waiting { .. } | JobState::Preparing);
        if self.jobs.values().any(waits) {
            return Vec::new();
        }
        let idle: Vec<ConnectionId> = self.compnodes.idle_since(SETTLED, now);
        let idle: Vec<ConnectionId> = idle.into_iter().filter(|&c| self.compnodes.phi(c, now) < SUSPECT).collect();
        let could_grow = |job: &Job| -> Option<RunKey> {
            let run = job.run.as_ref()?;
            let left = job.record.spec.train.steps.saturating_sub(run.merged());
            let is_worth_it = run.watchdog.time_of(left) >= LEAST_LEFT && run.step_time().is_some();
            let survive = &job.record.spec.survive;
            let may = survive.enabled && survive.every != Some(0) && now >= job.growth.rest_until;
            let are_new = idle.iter().any(|c| !job.growth.tried.contains(c));
            (may && is_worth_it && are_new && run.members.len() < job.growth.most).then_some(run.key)
        };
        let Some(key) = self.jobs.values().find_map(could_grow) else { return Vec::new() };
        if let Some(job) = self.jobs.get_mut(&key.job) {
            let growth = &mut job.growth;
            growth.tried.extend(idle);
            growth.rest = (growth.rest * 2).clamp(REST.0, REST.1);
            growth.rest_until = now + growth.rest;
        }
        self.move_away(key, now)
    }
}
