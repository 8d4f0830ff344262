//! Whether a job that is at work would be better off by another placement.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fusionllm_planner::{Measured, NodeIndex, Prediction};
use fusionllm_protocol::{JobId, JobState, RunKey};

use super::detector::SUSPECT;
use super::drain::SETTLED;
use super::drift::{Part, Planned, slowed};
use super::event::PlanInput;
use super::registry::Registry;
use super::run::Run;
use super::survey::{Survey, WorkKey};
use super::{Action, ConnectionId, Core, Job, Weighed};

impl Core {
    /// Looks at the jobs at work: where CompNodes compute slower or faster than planned, or new ones are there, the placement
    /// is held against the best one.
    pub(super) fn weigh(&mut self, now: Duration) -> Vec<Action> {
        if !self.may_one_move() {
            self.survey.measure_beside_work([]);
            return Vec::new();
        }
        let idle = self.compnodes.idle_since(SETTLED, now);
        let jobs: Vec<JobId> = self.jobs.iter().filter(|(_, job)| may_move(job)).map(|(&id, _)| id).collect();
        let (mut actions, mut pairs) = (Vec::new(), Vec::new());
        for job in jobs {
            let may_serve = |&c: &ConnectionId| self.may_serve(job, c, now);
            let idle: Vec<ConnectionId> = idle.iter().copied().filter(may_serve).collect();
            actions.extend(self.weigh_one(job, &idle, &mut pairs, now));
            // One at a time: what is free for one is not for the next.
            if !self.may_one_move() {
                break;
            }
        }
        self.survey.measure_beside_work(pairs);
        actions.extend(self.survey.advance(&self.compnodes, now));
        actions
    }

    /// Whether a job may move of its own accord now: the store takes it down, nobody waits for CompNodes, and no other job is
    /// about to move.
    pub(super) fn may_one_move(&self) -> bool {
        let waits = |job: &Job| matches!(job.record.state, JobState::Waiting { .. } | JobState::Preparing);
        let moves = |job: &Job| job.snapshots.halts() || job.drift.asked.is_some();
        self.trouble().is_none() && !self.jobs.values().any(|job| waits(job) || moves(job))
    }

    /// The ops of some work were measured on a CompNode, or cannot be: what its jobs saw of it is in that now.
    pub(super) fn ops_measured(&mut self, connection: ConnectionId, request: u64, result: Result<Measured, String>) {
        let work = self.survey.measured(connection, request, result);
        let part = Part::CompNode(self.compnodes.name(connection));
        let is_of =
            |job: &&mut Job| work.is_some() && job.start.as_ref().map(|s| WorkKey::of(&job.record.spec, s)) == work;
        self.jobs.values_mut().filter(is_of).for_each(|job| job.drift.measured_anew(part.clone()));
    }

    /// The same of both directions of a link.
    pub(super) fn link_measured_anew(&mut self, (a, b): (ConnectionId, ConnectionId)) {
        let (a, b) = (self.compnodes.name(a), self.compnodes.name(b));
        for job in self.jobs.values_mut() {
            job.drift.measured_anew(Part::Link(a.clone(), b.clone()));
            job.drift.measured_anew(Part::Link(b.clone(), a.clone()));
        }
    }

    /// Whether an idle CompNode may take part in a job that is at work.
    fn may_serve(&self, job: JobId, c: ConnectionId, now: Duration) -> bool {
        let Some(Job { run: Some(run), recoveries, .. }) = self.jobs.get(&job) else { return false };
        let is_well = self.compnodes.phi(c, now) < SUSPECT && !recoveries.avoids(&self.compnodes.name(c), now);
        is_well && !self.is_cut_off(c, &run.members, now)
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
        let has_drifted = drift.is_window_over(now) && {
            let planned = planned(run, &work.placement.prediction, &self.compnodes, &self.survey);
            drift.look(&planned, &mut told, now)
        };
        let left = run.watchdog.time_of(record.spec.train.steps.saturating_sub(run.merged()));
        let mut actions = Vec::new();
        if drift.asked.is_none() && drift.may_move(left, now) && (has_drifted || !idle.is_empty()) {
            // It hashes the whole OP-DAG.
            let key = WorkKey::of(&record.spec, start);
            // Where their number is given, more are of no use, and who is not at work might be taken instead.
            let count = record.spec.placement.compnodes;
            let may_grow = count.is_none();
            let new = if may_grow { newcomers(&self.survey, &run.members, idle, key, pairs) } else { Vec::new() };
            if may_grow {
                self.survey.want(&record.spec, start, idle);
            }
            // After the broker's restart it is not known how fast they were.
            let is_known = self.survey.is_measured(&run.members, key) && (may_grow || idle.is_empty());
            if is_known && (has_drifted || !new.is_empty() && drift.is_new(&new)) {
                self.plans += 1;
                drift.asks(self.plans, &new);
                let all: Vec<ConnectionId> = run.members.iter().chain(&new).copied().collect();
                let inventory = self.survey.inventory(&all, &self.compnodes, Some((&record.spec, start)), now);
                let input = PlanInput {
                    number: self.plans,
                    dag: Arc::clone(&start.dag),
                    cluster: slowed(inventory.cluster(), &drift.factors(now)),
                    spec: record.spec.plan_spec(),
                };
                let placement = Box::new(work.placement.placement.clone());
                actions.push(Action::Weigh { job: id, input: Box::new(input), placement });
            }
        }
        self.notices(id, told).into_iter().chain(actions).collect()
    }

    /// A placement at work was held against the best one.
    pub(super) fn weighed(&mut self, id: JobId, number: u64, result: Option<Weighed>, now: Duration) -> Vec<Action> {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.drift.asked == Some(number)) else { return Vec::new() };
        job.drift.asked = None;
        let candidates = job.drift.candidates().to_vec();
        // It took a while: who was free may be so no more, and others may wait by now.
        let is_as_it_was = self.may_one_move() && candidates.iter().all(|&c| self.compnodes.is_idle(c));
        let moved = self.moving_time(id, &candidates);
        let new: Vec<String> = candidates.iter().map(|&c| self.compnodes.name(c)).collect();
        let Some(Job { record, run: Some(run), drift, .. }) = self.jobs.get_mut(&id) else { return Vec::new() };
        let (key, left) = (run.key, record.spec.train.steps.saturating_sub(run.merged()));
        match result.filter(|_| is_as_it_was) {
            Some(weighed) if drift.weighed(weighed, left, moved, &new) => self.move_to_better(key, now),
            Some(_) => Vec::new(),
            None => {
                drift.stays();
                Vec::new()
            }
        }
    }

    /// What a move takes for preparing the parts, as it took before, and for bytes: each CompNode fetches its part, over the
    /// slowest link at the worst.
    fn moving_time(&self, id: JobId, new: &[ConnectionId]) -> Duration {
        let Some(Job { record, run: Some(run), .. }) = self.jobs.get(&id) else { return Duration::ZERO };
        let all: Vec<ConnectionId> = run.members.iter().chain(new).copied().collect();
        let pairs = all.iter().flat_map(|&a| all.iter().map(move |&b| (a, b))).filter(|(a, b)| a != b);
        let slowest =
            pairs.map(|(a, b)| self.survey.bytes_per_s(a, b)).filter(|rate| *rate > 0.0).min_by(f64::total_cmp);
        let state = record.spec.train.state_bytes(run.dag.param_bytes(), run.dag.trained_bytes());
        let bytes = state as f64 / all.len().max(1) as f64;
        let seconds = slowest.map_or(0.0, |rate| bytes / rate);
        run.prepared() + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4)
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

/// What the steps of a run are held against.
fn planned<'a>(run: &Run, prediction: &'a Prediction, compnodes: &Registry, survey: &Survey) -> Planned<'a> {
    let is_cpu = |&c: &ConnectionId| compnodes.report(c).is_some_and(|report| report.profile.cpu.is_some());
    let mut bytes_per_s = BTreeMap::new();
    let nodes = || (0..).map(NodeIndex).zip(&run.members);
    for (from, &sender) in nodes() {
        for (to, &receiver) in nodes().filter(|(to, _)| *to != from) {
            let measured = survey.bytes_per_s(sender, receiver);
            if measured > 0.0 {
                bytes_per_s.insert((from, to), measured);
            }
        }
    }
    Planned { prediction, is_timed: run.members.iter().map(is_cpu).collect(), bytes_per_s }
}

/// Those of whom all is known that a plan needs, and who reach all that are at work. Adds to `pairs` the links of the others,
/// which must be measured first.
fn newcomers(
    survey: &Survey,
    members: &[ConnectionId],
    idle: &[ConnectionId],
    key: WorkKey,
    pairs: &mut Vec<(ConnectionId, ConnectionId)>,
) -> Vec<ConnectionId> {
    let mut new = Vec::new();
    for &c in idle {
        let with: Vec<ConnectionId> = members.iter().chain(&new).copied().chain([c]).collect();
        match survey.is_complete(&with, key) {
            // One that could not be measured would be taken for as fast as its data sheet says.
            true if survey.is_measured(&with, key) => new.push(c),
            true => {}
            false => pairs.extend(members.iter().map(|&m| (m.min(c), m.max(c)))),
        }
    }
    new
}

/// Whether a job may move at all while it is at work.
fn may_move(job: &Job) -> bool {
    let (spec, survive) = (&job.record.spec, &job.record.spec.survive);
    let is_planned = job.start.as_ref().is_some_and(|start| start.cluster.is_none());
    let is_free = spec.placement.stages.is_empty() && is_planned;
    let is_at_work = job.record.state == JobState::Running && job.takeback.is_none() && job.comeback.is_none();
    let steps = job.run.as_ref().is_some_and(|run| run.step_time().is_some() && run.has_caught_up());
    survive.enabled && survive.every != Some(0) && is_free && is_at_work && steps
}
