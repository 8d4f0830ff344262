//! A job goes on by itself after it has lost a CompNode, or one has failed: from its newest snapshots or checkpoint, on who
//! is there.

use std::collections::BTreeMap;
use std::time::Duration;

use fusionllm_protocol::{JobId, JobState, RunKey};

use super::{Action, ConnectionId, Core, FailedBy, Loading};
use crate::store::JobRecord;

/// So many times in a row a job may come to nothing at the same step; then it fails, since it would only happen again.
const MOST_IN_VAIN: u32 = 3;
/// The same where a CompNode was lost, which may be chance.
const MOST_LOSSES_IN_VAIN: u32 = 10;
/// So often it may lose a CompNode, or one may fail, without new snapshots or a new checkpoint.
const MOST_WITHOUT_PROGRESS: u32 = 30;
/// What CompNodes report of the step at which one was lost may lag by so many steps.
const SAME_STEP: u64 = 1;
/// A process that is started again on the same machine is back within this time: it is waited for.
const RESTART: Duration = Duration::from_secs(5);
/// Where a job has failed it is tried again after twice this, at the most after the other.
const AVOIDED: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(600));
/// Where its files cannot be opened that is tried again after twice this, at the most after the other.
const REOPENED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// After the broker's own restart, CompNodes find their way back within this time.
pub(super) const RETURN: Duration = Duration::from_secs(45);

/// How a job came to lack a CompNode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// It, or the way to it, was lost, which may be chance.
    Lost,
    /// It could not go on, and may not be able to the next time.
    Failed,
}

/// In what form a step is kept from which a job goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeptAs {
    /// CompNodes have it, in snapshots.
    Snapshots,
    /// By the broker; or it is the beginning.
    Checkpoint,
}

/// What a job has been through.
#[derive(Debug, Default)]
pub(super) struct Recoveries {
    /// Of the last loss: the step that was done before it.
    at: Option<u64>,
    /// Losses at that step after the first.
    in_vain: u32,
    /// The step that it last went on from, and how often it had to.
    from: (u64, u32),
    /// Who is waited for: so many CompNodes, until then.
    awaits: Option<(usize, Duration)>,
    /// Whether fewer CompNodes than the job asked for may do: it has been at work, and goes on.
    pub(super) goes_on: bool,
    /// Whether it has done a step.
    pub(super) has_worked: bool,
    /// On whom it cannot be placed, and why.
    no_plan: Option<(Vec<ConnectionId>, String)>,
    /// On whom it has failed, by name: how often in a row, until when it is left out, and why.
    avoided: BTreeMap<String, (u32, Duration, String)>,
    /// Its files could not be opened: how often in a row, until when it is not placed, and why.
    no_files: Option<(u32, Duration, String)>,
    /// Why it goes on, and how far it was: told when it is placed again.
    told: Option<(String, u64)>,
}

impl Recoveries {
    /// A CompNode is missing after `step`; what is kept is that of step `from`. Why it is not worth going on, if it is not.
    fn again(&mut self, step: u64, from: u64, missing: Missing) -> Option<String> {
        let is_same = self.at.is_some_and(|at| at.abs_diff(step) <= SAME_STEP);
        self.in_vain = if is_same { self.in_vain + 1 } else { 0 };
        self.at = Some(step);
        self.from = (from, if from > self.from.0 { 1 } else { self.from.1 + 1 });
        let most = match missing {
            Missing::Lost => MOST_LOSSES_IN_VAIN,
            Missing::Failed => MOST_IN_VAIN,
        };
        if self.in_vain >= most {
            return Some(format!("so it was {} times at this step", self.in_vain + 1));
        }
        let without = self.from.1;
        (without > MOST_WITHOUT_PROGRESS)
            .then(|| format!("for the {without}th time without a new snapshot or checkpoint"))
    }

    /// The job goes on after `step`, with `members` CompNodes if so many are there until `until`.
    pub(super) fn go_on(&mut self, members: usize, until: Duration, why: String, step: u64) {
        (self.goes_on, self.awaits, self.told) = (true, Some((members, until)), Some((why, step)));
    }

    /// It has failed on this CompNode: that is left out for a while, and each time for longer. Where the CompNode was lost it
    /// is so from the second time on.
    pub(super) fn avoid(&mut self, name: &str, reason: String, missing: Missing, now: Duration) {
        let times = self.avoided.get(name).map_or(0, |(times, ..)| *times) + 1;
        let pause = match (missing, times) {
            (Missing::Lost, 1) => Duration::ZERO,
            _ => AVOIDED.0.saturating_mul(1 << times.min(10)).min(AVOIDED.1),
        };
        self.avoided.insert(name.to_owned(), (times, now + pause, reason));
    }

    /// It has done a step on these.
    pub(super) fn works_on(&mut self, names: &[String]) {
        self.has_worked = true;
        self.avoided.retain(|name, _| !names.contains(name));
    }

    /// Whether a CompNode is left out.
    pub(super) fn avoids(&self, name: &str, now: Duration) -> bool {
        self.avoided.get(name).is_some_and(|(_, until, _)| now < *until)
    }

    /// Why it must wait until one that is left out is tried again.
    pub(super) fn avoided_for(&self, now: Duration) -> Option<String> {
        let open = self.avoided.values().filter(|(_, until, _)| now < *until);
        let (_, until, reason) = open.min_by_key(|(_, until, _)| *until)?;
        // To whole ten seconds, or it would be told anew each second.
        let seconds = until.saturating_sub(now).as_secs().div_ceil(10) * 10;
        Some(format!("{reason}; it is tried again within {seconds} s"))
    }

    /// Its files are open.
    pub(super) fn files_are_open(&mut self) {
        self.no_files = None;
    }

    /// Whether its files could not be opened when that was last tried.
    pub(super) fn waits_for_files(&self) -> bool {
        self.no_files.is_some()
    }

    /// Whether what it starts from is to be read again now, which could not be when its files could not be opened. The next time
    /// is after a pause.
    pub(super) fn reads_again(&mut self, now: Duration) -> bool {
        let Some((_, until, _)) = self.no_files.as_mut().filter(|(_, until, _)| now >= *until) else { return false };
        *until = now + REOPENED.1;
        true
    }

    /// Why it is not placed yet, if that is as its files could not be opened.
    pub(super) fn no_files(&self, now: Duration) -> Option<String> {
        let (_, until, reason) = self.no_files.as_ref()?;
        (now < *until).then(|| format!("its files cannot be written: {reason}"))
    }

    /// There may be more memory than when it could not be placed.
    pub(super) fn try_again(&mut self) {
        self.no_plan = None;
    }

    /// It is placed.
    pub(super) fn placed(&mut self) {
        (self.awaits, self.no_plan) = (None, None);
    }

    /// It is at work as before: all that it waited for is there.
    pub(super) fn taken_back(&mut self, has_worked: bool) {
        (self.awaits, self.no_plan, self.told) = (None, None, None);
        self.has_worked |= has_worked;
    }

    /// It cannot be placed on these, for this reason: it waits until others are there.
    pub(super) fn cannot_be_placed(&mut self, members: Vec<ConnectionId>, reason: String) {
        self.no_plan = Some((members, reason));
    }

    /// Why it cannot be placed on these, if that was tried.
    pub(super) fn no_plan_on(&self, members: &[ConnectionId]) -> Option<String> {
        self.no_plan.as_ref().filter(|(tried, _)| tried == members).map(|(_, reason)| reason.clone())
    }

    /// What is told when it is placed again, once: it goes on after `from`, with snapshots or with a checkpoint.
    pub(super) fn take_told(&mut self, from: u64, with: KeptAs) -> Option<String> {
        self.told.take().map(|(why, step)| format!("{why}; {}", goes_on(step, from, with)))
    }

    /// Whether others are still waited for.
    pub(super) fn awaits_others(&self, now: Duration) -> bool {
        self.awaits.is_some_and(|(_, until)| now < until)
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
    /// placed anew, unless its user wants it otherwise, or that came to nothing several times.
    pub(super) fn recover(&mut self, key: RunKey, reason: String, missing: Missing, now: Duration) -> Vec<Action> {
        let Some((members, checkpoint)) = self.run_mut(key).map(|run| (run.members.len(), run.newest_checkpoint()))
        else {
            return Vec::new();
        };
        let Some(known) = self.jobs.get_mut(&key.job) else { return Vec::new() };
        if !known.record.spec.survive.enabled {
            return self.fail(key, reason, FailedBy::Machine, now);
        }
        let step = known.record.step;
        known.snapshots.failed(known.record.spec.survive.mtbf_h, now);
        // What every CompNode had made counts, and is written with the state.
        known.record.snapshots = known.snapshots.to_store();
        let kept = checkpoint.max(known.snapshots.newest()).unwrap_or(0);
        if let Some(enough) = known.recoveries.again(step, kept, missing) {
            return self.fail(key, format!("{reason}; {enough}"), FailedBy::Machine, now);
        }
        known.recoveries.go_on(members, now + RESTART, reason.clone(), step);
        known.drift.disturbed();
        if missing == Missing::Failed {
            // What failed may be a link that was cut: the next plan goes by what is there now.
            self.survey.refresh(now);
        }
        self.wait_again(key.job, &reason, checkpoint, now)
    }

    /// A job goes on by itself, and its files cannot be opened: it waits, and tries that again without an end, since what it
    /// has made is with its CompNodes and in its checkpoints.
    pub(super) fn wait_for_files(&mut self, key: RunKey, reason: String, now: Duration) -> Vec<Action> {
        let Some((members, checkpoint)) = self.run_mut(key).map(|run| (run.members.len(), run.newest_checkpoint()))
        else {
            return Vec::new();
        };
        let Some(known) = self.jobs.get_mut(&key.job) else { return Vec::new() };
        let recoveries = &mut known.recoveries;
        let times = recoveries.no_files.as_ref().map_or(0, |(times, ..)| *times) + 1;
        let pause = REOPENED.0.saturating_mul(1 << times.min(10)).min(REOPENED.1);
        recoveries.go_on(members, now, reason.clone(), known.record.step);
        if times > 1 {
            // It was told before.
            recoveries.told = None;
        }
        recoveries.no_files = Some((times, now + pause, reason.clone()));
        self.wait_again(key.job, &reason, checkpoint, now)
    }

    /// Ends a placement, and has the job wait for the next one.
    pub(super) fn wait_again(
        &mut self,
        job: JobId,
        reason: &str,
        checkpoint: Option<u64>,
        now: Duration,
    ) -> Vec<Action> {
        let mut actions = self.end(job, JobState::Waiting { reason: reason.to_owned() }, reason);
        match checkpoint {
            Some(_) => actions.extend(self.load(job, false)),
            // What it began with is known, and may be more than its own folder has.
            None => {
                self.begin_anew(job);
                actions.extend(self.without_start(job));
            }
        }
        actions.extend(self.schedule(now));
        actions
    }

    /// A member has gone when nothing was left to do for it. Whether that was so.
    pub(super) fn is_done_without(&mut self, key: RunKey, gone: ConnectionId, now: Duration) -> bool {
        self.run_mut(key).is_some_and(|run| run.ends_without(gone, now))
    }

    /// Has what a job starts from read: until then it is not placed.
    pub(super) fn load(&mut self, job: JobId, checks_reach: bool) -> Option<Action> {
        self.loads += 1;
        let number = self.loads;
        let known = self.jobs.get_mut(&job)?;
        (known.start, known.loading) = (None, Some(number));
        Some(Action::Load(Box::new(Loading { number, record: known.record.clone(), checks_reach })))
    }

    /// A job without a checkpoint starts again where it started.
    fn begin_anew(&mut self, job: JobId) {
        let Some(known) = self.jobs.get_mut(&job) else { return };
        let Some(start) = &mut known.start else { return };
        // They were told before.
        start.notices.clear();
        let start = (start.step, start.loss);
        (known.record.step, known.record.loss) = known.snapshots.newest_after(start);
    }

    /// A job that was at work when the broker ended. `from` is where it goes on.
    pub(super) fn was_at_work(&mut self, id: JobId, is_done: bool, from: Option<u64>) -> Vec<Action> {
        let Some(known) = self.jobs.get_mut(&id) else { return Vec::new() };
        let (step, restarted) = (known.record.step, "the broker restarted");
        if is_done {
            return self.end(id, JobState::Done, restarted);
        }
        let reason = format!("{restarted} after step {step}");
        if !known.record.spec.survive.enabled && known.takeback.is_none() {
            let reason = format!("{reason}; {}", self.resume_hint(id, from, None));
            return self.end(id, JobState::Failed { reason, bad_input: false }, restarted);
        }
        known.recoveries.go_on(awaited(&known.record), RETURN, reason.clone(), step);
        let mut actions = self.set_state(id, JobState::Waiting { reason });
        actions.extend(self.load(id, true));
        actions
    }

    /// A job that waited when the broker ended: for the first time, or to go on.
    pub(super) fn waited(&mut self, id: JobId, is_done: bool, from: Option<u64>) -> Vec<Action> {
        let Some(known) = self.jobs.get_mut(&id) else { return Vec::new() };
        if known.record.members > 0 && !known.record.spec.survive.enabled {
            // It was to be taken back.
            return self.was_at_work(id, is_done, from);
        }
        if let (JobState::Waiting { reason }, 1..) = (&known.record.state, known.record.members) {
            if is_done {
                return self.end(id, JobState::Done, "the broker restarted");
            }
            known.recoveries.go_on(awaited(&known.record), RETURN, reason.clone(), known.record.step);
        }
        self.load(id, true).into_iter().collect()
    }
}

/// How many CompNodes come back to a job after a restart; where that is not known, all that come in time.
pub(super) fn awaited(record: &JobRecord) -> usize {
    if record.members == 0 { usize::MAX } else { record.members as usize }
}

/// From where a job goes on that had done `step` steps.
fn goes_on(step: u64, from: u64, with: KeptAs) -> String {
    let where_from = match with {
        KeptAs::Snapshots => format!("the job goes on from the snapshots of step {from}"),
        KeptAs::Checkpoint if from > 0 => format!("the job goes on from the checkpoint of step {from}"),
        KeptAs::Checkpoint => "the job begins anew, there is no checkpoint yet".to_owned(),
    };
    match step.saturating_sub(from) {
        0 => where_from,
        1 => format!("{where_from}, one step is done again"),
        again => format!("{where_from}, {again} steps are done again"),
    }
}
