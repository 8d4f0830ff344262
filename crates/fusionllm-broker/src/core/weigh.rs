//! Whether a job that is at work would be better off by another placement.

use std::time::Duration;

use fusionllm_planner::Prediction;
use fusionllm_protocol::{JobId, JobState, RunKey};

use super::detector::SUSPECT;
use super::drain::SETTLED;
use super::drift::{Weighed, slowed};
use super::event::PlanInput;
use super::survey::WorkKey;
use super::{Action, ConnectionId, Core, Job};

impl Core {
    /// Looks at the jobs at work: where CompNodes compute slower or faster than planned, or new ones are there, the placement
    /// is held against the best one.
    pub(super) fn weigh(&mut self, now: Duration) -> Vec<Action> {
        // Whoever waits has the idle ones first.
        let waits = |job: &Job| matches!(job.record.state, JobState::Waiting { .. } | JobState::Preparing);
        if self.jobs.values().any(waits) {
            self.survey.measure_beside_work([]);
            return Vec::new();
        }
        let mut idle = self.compnodes.idle_since(SETTLED, now);
        idle.retain(|&c| self.compnodes.phi(c, now) < SUSPECT);
        let jobs: Vec<JobId> = self.jobs.iter().filter(|(_, job)| may_move(job)).map(|(&id, _)| id).collect();
        let (mut actions, mut pairs) = (Vec::new(), Vec::new());
        for job in jobs {
            actions.extend(self.weigh_one(job, &idle, &mut pairs, now));
        }
        self.survey.measure_beside_work(pairs);
        actions.extend(self.survey.advance(&self.compnodes, now));
        actions
    }

    /// The same for one. Adds to `pairs` those whose links must be known first.
    fn weigh_one(
        &mut self,
        id: JobId,
        idle: &[ConnectionId],
        pairs: &mut Vec<(ConnectionId, ConnectionId)>,
        now: Duration,
    ) -> Vec<Action> {
        let Some(Job { record, run: Some(run), start: Some(start), drift, .. }) = self.jobs.get_mut(&id) else {
            return Vec::new();
        };
        let Some(work) = record.work.clone() else { return Vec::new() };
        let mut told = Vec::new();
        let has_drifted = drift.look(&work.placement.prediction, &mut told, now);
        let left = run.watchdog.time_of(record.spec.train.steps.saturating_sub(run.merged()));
        let is_due = drift.asked.is_none() && drift.may_move(left, now);
        let members = run.members.clone();
        // Where their number is given, more are of no use.
        let has_room = record.spec.placement.compnodes.is_none_or(|most| members.len() < most as usize);
        let work_key = WorkKey::of(&record.spec, start);
        let mut new = Vec::new();
        if is_due && has_room {
            for &c in idle {
                let with: Vec<ConnectionId> = members.iter().copied().chain([c]).collect();
                match self.survey.is_complete(&with, work_key) {
                    true => new.push(c),
                    false => pairs.extend(members.iter().map(|&m| (m.min(c), m.max(c)))),
                }
            }
            self.survey.want(&record.spec, start, idle);
        }
        new.retain(|&c| !members.iter().any(|&m| self.survey.is_unreachable(m, c)));
        if is_due && (has_drifted || !new.is_empty() && drift.is_new(&new)) {
            self.plans += 1;
            drift.asks(self.plans, &new);
            let all: Vec<ConnectionId> = members.iter().chain(&new).copied().collect();
            let inventory = self.survey.inventory(&all, &self.compnodes, Some((&record.spec, start)), now);
            let input = PlanInput {
                number: self.plans,
                dag: std::sync::Arc::clone(&start.dag),
                cluster: slowed(inventory.cluster(), &drift.factors(now)),
                spec: record.spec.plan_spec(),
            };
            let placement = Box::new(work.placement.placement.clone());
            let mut actions = self.notices(id, told);
            actions.push(Action::Weigh { job: id, input: Box::new(input), placement });
            return actions;
        }
        self.notices(id, told)
    }

    /// A placement at work was held against the best one.
    pub(super) fn weighed(&mut self, id: JobId, number: u64, result: Option<Weighed>, now: Duration) -> Vec<Action> {
        let Some(Job { record, run: Some(run), drift, .. }) = self.jobs.get_mut(&id) else { return Vec::new() };
        if drift.asked != Some(number) {
            return Vec::new();
        }
        let (key, left) = (run.key, record.spec.train.steps.saturating_sub(run.merged()));
        let (Some(weighed), Some(work)) = (result, &record.work) else {
            drift.stays();
            return Vec::new();
        };
        let new: Vec<String> = drift.candidates().iter().map(|&c| self.compnodes.name(c)).collect();
        let prediction: &Prediction = &work.placement.prediction;
        if !drift.weighed(weighed, left, run.prepared(), prediction, &new) {
            return Vec::new();
        }
        self.move_to_better(key, now)
    }

    fn move_to_better(&mut self, key: RunKey, now: Duration) -> Vec<Action> {
        let actions = self.move_away(key, now);
        // It is nearly done, or about to move for another reason.
        if actions.is_empty()
            && let Some(job) = self.jobs.get_mut(&key.job)
        {
            job.drift.stays();
        }
        actions
    }
}

/// Whether a job may move at all while it is at work.
fn may_move(job: &Job) -> bool {
    let (spec, survive) = (&job.record.spec, &job.record.spec.survive);
    let is_planned = job.start.as_ref().is_some_and(|start| start.cluster.is_none());
    let is_free = spec.placement.stages.is_empty() && is_planned;
    let is_at_work = job.record.state == JobState::Running && job.takeback.is_none() && job.comeback.is_none();
    let steps = job.run.as_ref().is_some_and(|run| run.step_time().is_some());
    survive.enabled && survive.every != Some(0) && is_free && is_at_work && steps
}
