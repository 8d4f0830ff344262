//! A job goes on by itself after it has lost a CompNode, or one has failed: from its newest checkpoint, on who is there.

use std::time::Duration;

use fusionllm_protocol::{JobId, JobState, RunKey};

use super::{Action, ConnectionId, Core};

/// So many times in a row a job may come to nothing at the same step; then it fails, since it would only happen again.
const MOST_IN_VAIN: u32 = 3;
/// What CompNodes report of the step at which one was lost may lag by so many steps.
const SAME_STEP: u64 = 1;
/// A process that is started again on the same machine is back within this time: it is waited for.
const RESTART: Duration = Duration::from_secs(5);
/// After the broker's own restart, CompNodes find their way back within this time.
pub(super) const RETURN: Duration = Duration::from_secs(45);

/// What a job has been through.
#[derive(Debug, Default)]
pub(super) struct Recoveries {
    /// Of the last loss: the step that was done before it.
    at: Option<u64>,
    /// Losses at that step after the first.
    in_vain: u32,
    /// Who is waited for: so many CompNodes, until then.
    awaits: Option<(usize, Duration)>,
    /// Whether fewer CompNodes than the job asked for may do: it has been at work, and goes on.
    pub(super) goes_on: bool,
    /// On whom it cannot be placed, and why.
    no_plan: Option<(Vec<ConnectionId>, String)>,
    /// What its user is told when it is placed again.
    told: Option<String>,
}

impl Recoveries {
    /// A CompNode is lost after `step`. Whether it is worth going on.
    fn again(&mut self, step: u64) -> bool {
        let is_same = self.at.is_some_and(|at| at.abs_diff(step) <= SAME_STEP);
        self.in_vain = if is_same { self.in_vain + 1 } else { 0 };
        self.at = Some(step);
        self.in_vain < MOST_IN_VAIN
    }

    /// The job goes on, with `members` CompNodes if so many are there until `until`.
    pub(super) fn go_on(&mut self, members: usize, until: Duration, told: String) {
        (self.goes_on, self.awaits, self.told) = (true, Some((members, until)), Some(told));
    }

    /// It is placed.
    pub(super) fn placed(&mut self) {
        (self.awaits, self.no_plan) = (None, None);
    }

    /// It cannot be placed on these, for this reason: it waits until others are there.
    pub(super) fn cannot_be_placed(&mut self, members: Vec<ConnectionId>, reason: String) {
        self.no_plan = Some((members, reason));
    }

    /// Why it cannot be placed on these, if that was tried.
    pub(super) fn no_plan_on(&self, members: &[ConnectionId]) -> Option<String> {
        self.no_plan.as_ref().filter(|(tried, _)| tried == members).map(|(_, reason)| reason.clone())
    }

    /// What is told when it is placed again, once.
    pub(super) fn take_told(&mut self) -> Option<String> {
        self.told.take()
    }

    /// Who else is waited for, in words.
    pub(super) fn waits(&self, idle: usize, now: Duration) -> Option<String> {
        let (wanted, _) = self.awaits.filter(|&(wanted, until)| idle < wanted && now < until)?;
        // Without the seconds that are left, or it would be told anew each second.
        Some(format!("{idle} of {wanted} CompNodes are there, and the others may come back in a moment"))
    }
}

impl Core {
    /// A placement has lost a CompNode, or one has failed: the job goes on from its newest checkpoint as soon as it can be
    /// placed anew, unless its user wants it otherwise, or that came to nothing several times at the same step.
    pub(super) fn recover(&mut self, key: RunKey, reason: String, now: Duration) -> Vec<Action> {
        let Some(members) = self.run_mut(key).map(|run| run.members.len()) else { return Vec::new() };
        let Some(known) = self.jobs.get_mut(&key.job) else { return Vec::new() };
        if !known.record.spec.survive.enabled {
            return self.fail(key, reason, false, now);
        }
        let step = known.record.step;
        if !known.recoveries.again(step) {
            let reason = format!("{reason}; so it was {} times at this step", MOST_IN_VAIN + 1);
            return self.fail(key, reason, false, now);
        }
        let checkpoint = known.run.as_ref().and_then(|run| run.checkpoint);
        let told = format!("{reason}; {}", goes_on(step, checkpoint));
        known.recoveries.go_on(members, now + RESTART, told.clone());
        let mut actions = self.end(key.job, JobState::Waiting { reason: reason.clone() }, &reason);
        actions.extend(self.load_anew(key.job));
        actions.extend(self.schedule(now));
        actions
    }

    /// Has what a job goes on from read anew: until then it is not placed.
    pub(super) fn load_anew(&mut self, job: JobId) -> Option<Action> {
        let known = self.jobs.get_mut(&job)?;
        known.start = None;
        Some(Action::Load(Box::new(known.record.clone())))
    }
}

/// From where a job goes on that had done `step` steps.
pub(super) fn goes_on(step: u64, checkpoint: Option<u64>) -> String {
    let from = match checkpoint {
        Some(from) => format!("the job goes on from the checkpoint of step {from}"),
        None => "the job begins anew, there is no checkpoint yet".to_owned(),
    };
    match step.saturating_sub(checkpoint.unwrap_or(0)) {
        0 => from,
        1 => format!("{from}, one step is done again"),
        again => format!("{from}, {again} steps are done again"),
    }
}
