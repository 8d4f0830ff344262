//! A job moves while all its CompNodes are well, and nothing that is done is done again: away from one that is to leave, or
//! to those that are there again.
//!
//! All take a snapshot after the same step and stand still. The job is placed anew without those that leave, which lend
//! what they hold, and go when the others have snapshots of their own.

use std::time::Duration;

use fusionllm_protocol::{Fault, FromBroker, RunKey};

use super::detector::SUSPECT;
use super::drift::Move;
use super::registry::Registry;
use super::run::Run;
use super::schedule::needed;
use super::{Action, ConnectionId, Core, Job};
use crate::BrokerError;

/// A CompNode that has been here and idle for so long is there to stay.
pub(super) const SETTLED: Duration = Duration::from_secs(10);
/// A CompNode that is to leave waits no longer than this until others are at work with what it holds.
const MOST_MOVING: Duration = Duration::from_secs(50);

impl Job {
    /// Whether it may have to go on from what a CompNode holds that leaves: nobody who stays has all of it.
    fn needs_what_is_with(&self, leaving: ConnectionId, compnodes: &Registry) -> bool {
        let is_open = !self.record.state.is_final() && self.record.spec.survive.every != Some(0);
        is_open && self.snapshots.is_with(leaving) && self.snapshots.is_thin(1, |holder| compnodes.stays(holder))
    }
}

impl Core {
    /// An operator wants a CompNode to leave.
    pub(crate) fn drain(&mut self, name: &str, now: Duration) -> Result<Vec<Action>, BrokerError> {
        let named = self.compnodes.all().find(|&c| self.compnodes.name(c) == name);
        let Some(connection) = named else {
            let names = self.compnodes.all().map(|c| self.compnodes.name(c)).collect();
            return Err(BrokerError::UnknownCompNode { name: name.to_owned(), names });
        };
        let run = self.jobs.values().find_map(|job| {
            let run = job.run.as_ref().filter(|run| run.node_of(connection).is_some())?;
            Some((run.key.job, job.record.spec.survive.enabled))
        });
        if let Some((job, false)) = run {
            return Err(BrokerError::DoesNotSurvive { job, name: name.to_owned() });
        }
        let actions = self.leaves(connection, now);
        Ok(self.hold(actions))
    }

    /// A CompNode gets no work any more, and what it does moves away.
    pub(super) fn leaves(&mut self, connection: ConnectionId, now: Duration) -> Vec<Action> {
        let mut actions = match self.compnodes.leave(connection, now) {
            Some(key) if self.plan_no_more(key.job) => self.schedule(now),
            Some(key) if self.survives(key) => self.move_away(key, now),
            // Its job fails with it, now or later.
            Some(_) => vec![Action::Send { to: connection, message: FromBroker::Dismiss { keep: true } }],
            None => Vec::new(),
        };
        actions.extend(self.dismiss(now));
        actions
    }

    fn survives(&self, key: RunKey) -> bool {
        self.jobs.get(&key.job).is_some_and(|job| job.record.spec.survive.enabled)
    }

    /// Has a run stand still as soon as may be, so that it can go on elsewhere.
    pub(super) fn move_away(&mut self, key: RunKey, now: Duration) -> Vec<Action> {
        let Some(Job { record, run: Some(run), snapshots, .. }) = self.jobs.get_mut(&key.job) else {
            return Vec::new();
        };
        let Some(step_time) = run.step_time() else {
            // Nothing is done yet.
            return self.move_on(key, now);
        };
        let (progress, params) = ((run.merged(), record.spec.train.steps), run.params_by_node());
        let Some(step) = snapshots.begin_halt(key, progress, step_time.as_secs_f64(), params) else {
            // It is nearly done, or about to move already.
            return Vec::new();
        };
        let tell = |&to| Action::Send { to, message: FromBroker::Snapshot { key, step, halt: true } };
        run.members.iter().map(tell).collect()
    }

    /// A CompNode may have said that it leaves when its run was not taken back yet, or had not caught up.
    pub(super) fn move_those_that_leave(&mut self, now: Duration) -> Vec<Action> {
        let leaves = |run: &&Run| run.members.iter().any(|&member| self.compnodes.is_leaving(member));
        let runs = self.jobs.values().filter_map(|job| job.run.as_ref());
        let late = runs.filter(|run| run.was_taken_back() && run.has_caught_up()).filter(leaves);
        let keys: Vec<RunKey> = late.map(|run| run.key).filter(|&key| self.survives(key)).collect();
        keys.into_iter().flat_map(|key| self.move_away(key, now)).collect()
    }

    /// A run ends so that the job goes on without those that leave.
    pub(super) fn move_on(&mut self, key: RunKey, now: Duration) -> Vec<Action> {
        let Some((members, checkpoint)) = self.run_mut(key).map(|run| (run.members.clone(), run.newest_checkpoint()))
        else {
            return Vec::new();
        };
        let leaving = members.iter().filter(|&&member| self.compnodes.is_leaving(member));
        let leaving: Vec<String> = leaving.map(|&member| self.compnodes.name(member)).collect();
        let quoted = |names: &[String]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let Some(known) = self.jobs.get_mut(&key.job) else { return Vec::new() };
        let better = if leaving.is_empty() { known.drift.leaves(now) } else { None };
        if better.is_none() {
            known.drift.disturbed();
        }
        let (kind, who, reason) = match (leaving.is_empty(), better) {
            (_, Some(Move { who, reason, is_for_new })) => {
                (if is_for_new { Fault::Joined } else { Fault::Drifted }, who, reason)
            }
            (false, None) => (
                Fault::Left,
                leaving.clone(),
                match leaving.len() {
                    1 => format!("CompNode {} leaves", quoted(&leaving)),
                    _ => format!("CompNodes {} leave", quoted(&leaving)),
                },
            ),
            (true, None) => {
                let more: Vec<String> = self.compnodes.idle().into_iter().map(|c| self.compnodes.name(c)).collect();
                let reason = format!("the job moves to more CompNodes, {} may work for it", quoted(&more));
                (Fault::Joined, more, reason)
            }
        };
        self.fault(key, kind, who, Duration::ZERO, now);
        let Some(known) = self.jobs.get_mut(&key.job) else { return Vec::new() };
        let step = known.record.step;
        known.recoveries.go_on(members.len() - leaving.len(), now, reason.clone(), step);
        self.wait_again(key.job, &reason, checkpoint, now)
    }

    /// Has a job move that is on fewer CompNodes than it was, where others are idle.
    pub(super) fn grow(&mut self, now: Duration) -> Vec<Action> {
        // Whoever waits has the idle ones first.
        if !self.may_one_move() {
            return Vec::new();
        }
        let mut idle = self.compnodes.idle_since(SETTLED, now);
        idle.retain(|&c| self.compnodes.phi(c, now) < SUSPECT);
        let runs = self.jobs.values().filter_map(|job| job.run.as_ref());
        let members: Vec<ConnectionId> = runs.flat_map(|run| run.members.iter().copied()).collect();
        idle.retain(|&c| !self.is_cut_off(c, &members, now));
        let could_grow = |job: &mut Job| -> Option<RunKey> {
            let run = job.run.as_ref().filter(|run| run.step_time().is_some())?;
            let left = run.watchdog.time_of(job.record.spec.train.steps.saturating_sub(run.merged()));
            let survive = &job.record.spec.survive;
            let may = survive.enabled && survive.every != Some(0);
            (may && job.growth.is_due(run.members.len(), left, &idle, now)).then(|| {
                job.growth.moves(idle.clone(), now);
                run.key
            })
        };
        let key = self.jobs.values_mut().find_map(could_grow);
        key.map_or_else(Vec::new, |key| self.move_away(key, now))
    }

    /// Lets those go that are to leave, once nobody needs what they hold; or where nobody is there to take it, or does for
    /// too long: then they keep it, and have it when they come back.
    pub(super) fn dismiss(&mut self, now: Duration) -> Vec<Action> {
        // What takes the place of what they hold must be on disk before they are told.
        if !self.is_all_written() {
            return Vec::new();
        }
        let mut actions = Vec::new();
        for (to, since) in self.compnodes.ready_to_leave() {
            let needs_it = |job: &&Job| job.needs_what_is_with(to, &self.compnodes);
            let jobs: Vec<&Job> = self.jobs.values().filter(needs_it).collect();
            let is_late = now.saturating_sub(since) > MOST_MOVING;
            if jobs.is_empty() || is_late || !jobs.iter().any(|job| self.could_be_placed(job)) {
                let message = FromBroker::Dismiss { keep: !jobs.is_empty() };
                actions.push(Action::Send { to, message });
            }
        }
        actions
    }

    /// Whether those who stay are enough for a job, and its data's owner is among them.
    fn could_be_placed(&self, job: &Job) -> bool {
        // What it starts from is being read: that is soon known.
        let Some(start) = &job.start else { return true };
        let stays = |&c: &ConnectionId| !self.compnodes.is_leaving(c);
        let stay: Vec<String> = self.compnodes.all().filter(stays).map(|c| self.compnodes.name(c)).collect();
        let owner_stays = job.owner().is_none_or(|owner| stay.contains(owner));
        owner_stays && stay.len() >= needed(&job.record.spec, start, job.recoveries.goes_on)
    }
}
