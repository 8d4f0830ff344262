//! A broker that was started again takes a job back on which its CompNodes are still at work: as it is, if all of them are
//! there and agree; else the job goes on like one that has lost a CompNode.

use std::time::Duration;

use fusionllm_protocol::{FromBroker, JobEvent, JobId, JobState, RunKey, Standing};

use super::awaited::{Opening, TakeBack};
use super::comeback::Comeback;
use super::recovery::{RETURN, awaited};
use super::run::Run;
use super::{Action, ConnectionId, Core, FailedBy, Job, OpenRun, StartPoint, Unread};
use crate::run_dir::RunStart;

/// CompNodes that are still at work are back within this time: a connection that is dead is noticed after ten seconds, and
/// dialled again each three.
const AWAITED: Duration = Duration::from_secs(30);

impl Core {
    /// A CompNode has joined that asked for the name `wanted`, and says what it is at work on.
    pub(super) fn stands(
        &mut self,
        connection: ConnectionId,
        wanted: &str,
        standing: Option<Standing>,
        now: Duration,
    ) -> Vec<Action> {
        let (key, host) = (self.compnodes.key(connection), self.compnodes.host(connection));
        let of_key = |(&id, job): (&JobId, &Job)| Some((id, job.takeback.as_ref()?.node_of(&key)?));
        let of_name = |(&id, job): (&JobId, &Job)| Some((id, job.takeback.as_ref()?.replaced(wanted, host)?));
        let Some((job, node)) = self.jobs.iter().find_map(of_key) else {
            let replaced = self.jobs.iter().find_map(of_name).filter(|_| standing.is_none());
            let ended = standing.map(|standing| abort(connection, standing.key, "its placement has ended"));
            let mut actions: Vec<Action> = ended.into_iter().collect();
            if let Some((job, _)) = replaced {
                actions.extend(self.give_back(job, format!("CompNode `{wanted}` was started again, too"), now));
            }
            return actions;
        };
        let Some(takeback) = self.jobs.get_mut(&job).and_then(|job| job.takeback.as_mut()) else { return Vec::new() };
        let name = takeback.name_of(node).to_owned();
        let Some(standing) = standing else {
            return self.give_back(job, format!("CompNode `{name}` is at work on it no more"), now);
        };
        let (key, agrees) = (standing.key, takeback.check(&standing));
        if let Err(why) = agrees {
            let mut actions = vec![abort(connection, key, "the job goes on otherwise")];
            actions.extend(self.give_back(job, format!("CompNode `{name}` {why}"), now));
            return actions;
        }
        takeback.back.insert(node, (connection, standing));
        self.compnodes.take(connection, key);
        self.compnodes.rename(connection, &name);
        self.take_back(job, now)
    }

    /// Takes those jobs back that can be by now, and gives up those that were waited for in vain.
    pub(super) fn awaited_jobs(&mut self, now: Duration) -> Vec<Action> {
        let open: Vec<JobId> = self.jobs.iter().filter(|(_, job)| job.takeback.is_some()).map(|(&id, _)| id).collect();
        let mut actions = Vec::new();
        for job in open {
            actions.extend(self.take_back(job, now));
            let takeback = self.jobs.get(&job).and_then(|job| job.takeback.as_ref());
            // Whoever is back trains on: what its files or its start need may take longer.
            let missing = takeback.map(TakeBack::missing).filter(|missing| now >= AWAITED && !missing.is_empty());
            if let Some(missing) = missing {
                let why = format!("{} did not come back in {} s", missing.join(", "), AWAITED.as_secs());
                actions.extend(self.give_back(job, why, now));
            }
        }
        actions
    }

    /// Whether a placement may still be taken back.
    pub(super) fn is_awaited(&self, key: RunKey) -> bool {
        self.jobs.get(&key.job).and_then(|job| job.takeback.as_ref()).is_some_and(|takeback| takeback.key == key)
    }

    /// A placement is not taken back: the job is placed anew once it can be.
    pub(super) fn give_back(&mut self, job: JobId, why: String, now: Duration) -> Vec<Action> {
        let Some(known) = self.jobs.get_mut(&job) else { return Vec::new() };
        let Some(step) = known.takeback.as_ref().map(|takeback| takeback.reached.0) else { return Vec::new() };
        let reason = format!("the broker restarted after step {step}, and {why}");
        if !known.record.spec.survive.enabled {
            let checkpoint = known.takeback.as_ref().and_then(|takeback| takeback.checkpoint);
            let told = format!("{reason}; {}", self.resume_hint(job, checkpoint, None));
            let mut actions = self.end(job, JobState::Failed { reason: told, bad_input: false }, &reason);
            actions.extend(self.schedule(now));
            return actions;
        }
        known.recoveries.go_on(awaited(&known.record), RETURN, reason.clone(), step);
        known.record.placed = None;
        if let Some(start) = &known.start {
            (known.record.step, known.record.loss) = known.snapshots.newest_after((start.step, start.loss));
        }
        let mut actions = self.await_no_more(job, &reason);
        actions.extend(self.set_state(job, JobState::Waiting { reason }));
        actions.extend(self.without_start(job));
        actions.extend(self.schedule(now));
        actions
    }

    /// Ends a job that can only go on as it is, and does not: what it started from is not there any more, and there are no
    /// snapshots either.
    pub(super) fn without_start(&mut self, job: JobId) -> Vec<Action> {
        // Where its files cannot be opened that is read again: what it starts from may lie in the same folder.
        let is_lost = |known: &&Job| {
            known.takeback.is_none() && known.snapshots.newest().is_none() && !known.recoveries.waits_for_files()
        };
        let Some(known) = self.jobs.get(&job).filter(is_lost) else { return Vec::new() };
        let unread = known.start.as_ref().and_then(|start| start.unread.clone());
        let Some(Unread { reason, bad_input }) = unread else { return Vec::new() };
        self.end(job, JobState::Failed { reason, bad_input }, "what it starts from cannot be read")
    }

    /// Another process has gone on with a run that was to be taken back: its files tell where it is now.
    pub(super) fn gone_on(&mut self, key: RunKey, reason: String, now: Duration) -> Vec<Action> {
        if !self.is_awaited(key) {
            return Vec::new();
        }
        if let Some(known) = self.jobs.get_mut(&key.job) {
            known.record.placed = None;
        }
        let mut actions: Vec<Action> = self.load(key.job, true).into_iter().collect();
        actions.extend(self.give_back(key.job, reason, now));
        actions
    }

    /// The files of a run are open: if it is to be taken back, it is now.
    pub(super) fn run_opened(&mut self, key: RunKey, now: Duration) -> Vec<Action> {
        if let Some(known) = self.jobs.get_mut(&key.job) {
            known.recoveries.files_are_open();
        }
        if !self.is_awaited(key) {
            return Vec::new();
        }
        if let Some(takeback) = self.jobs.get_mut(&key.job).and_then(|job| job.takeback.as_mut()) {
            takeback.opening = Opening::Open;
        }
        self.take_back(key.job, now)
    }

    /// The broker itself cannot go on with a run. One that is to be taken back trains on meanwhile, and waits until it can.
    pub(super) fn run_failed(&mut self, key: RunKey, reason: String, by: FailedBy, now: Duration) -> Vec<Action> {
        match self.is_awaited(key) {
            true => self.run_not_opened(key, reason, by, now),
            false => self.fail(key, reason, by, now),
        }
    }

    /// The files of a run cannot be opened. One that is to be taken back trains on meanwhile, and one that goes on by itself
    /// waits, since that may pass: others may have moved its directory, or be at work there.
    pub(super) fn run_not_opened(&mut self, key: RunKey, reason: String, by: FailedBy, now: Duration) -> Vec<Action> {
        if !self.is_awaited(key) {
            let goes_on = |job: &Job| job.recoveries.goes_on && job.record.spec.survive.enabled;
            return match self.jobs.get(&key.job) {
                Some(job) if goes_on(job) => self.wait_for_files(key, reason, now),
                _ => self.fail(key, reason, by, now),
            };
        }
        if let Some(takeback) = self.jobs.get_mut(&key.job).and_then(|job| job.takeback.as_mut()) {
            takeback.cannot_open(reason, now);
        }
        self.schedule(now)
    }

    /// Who is back drops the job, and is idle.
    pub(super) fn await_no_more(&mut self, job: JobId, reason: &str) -> Vec<Action> {
        let Some(takeback) = self.jobs.get_mut(&job).and_then(|job| job.takeback.take()) else { return Vec::new() };
        let mut actions = Vec::new();
        for (to, _) in takeback.back.into_values() {
            match self.release(to) {
                true => actions.push(abort(to, takeback.key, reason)),
                // It was away; should it come back, it begins anew.
                false => {
                    actions.push(Action::Disconnect { to, reason: reason.to_owned() });
                }
            }
        }
        actions
    }

    /// Takes a job back if all of its CompNodes are there, what it starts from is known, and its files are open.
    pub(super) fn take_back(&mut self, job: JobId, now: Duration) -> Vec<Action> {
        let Some(known) = self.jobs.get_mut(&job).filter(|known| known.start.is_some()) else { return Vec::new() };
        let is_here = |(connection, _): &(ConnectionId, Standing)| self.compnodes.is_here(*connection);
        let is_whole =
            |back: &&mut TakeBack| back.back.len() == back.placed.members.len() && back.back.values().all(is_here);
        let Some(back) = known.takeback.as_mut().filter(is_whole) else { return Vec::new() };
        let Some(reached) = back.goes_on_after() else {
            return self.give_back(job, "its CompNodes are not at the same step".to_owned(), now);
        };
        if back.opening == Opening::Open {
            return self.at_work_again(job, now);
        }
        if !back.asks_to_open(now) {
            return Vec::new();
        }
        back.reached = reached;
        self.open_again(job).into_iter().collect()
    }

    /// Opens the files of a run that is to be taken back.
    fn open_again(&mut self, job: JobId) -> Option<Action> {
        let known = self.jobs.get_mut(&job)?;
        let (start, back, record) = (known.start.as_mut()?, known.takeback.as_ref()?, &mut known.record);
        if let Some(work) = &record.work {
            // Its folder may be gone, and does not tell any more which run it is.
            start.run = RunStart { notices: Vec::new(), ..work.run.clone() };
            record.run = Some(start.run.run.clone());
        }
        Some(Action::OpenRun(Box::new(OpenRun {
            key: back.key,
            run_dir: record.run_dir.clone(),
            run: start.run.clone(),
            spec: record.spec.clone(),
            graph: start.graph.clone(),
            placement: back.file.clone(),
            hashes: record.work.as_ref().map_or_else(Vec::new, |work| work.hashes.clone()),
            predicted: None,
            start_step: back.reached.0,
            goes_on: false,
            takes_back: true,
        })))
    }

    /// A job whose CompNodes are all at work, and whose files are open, is as it was.
    fn at_work_again(&mut self, job: JobId, now: Duration) -> Vec<Action> {
        let Some(known) = self.jobs.get_mut(&job) else { return Vec::new() };
        let (Some(back), Some(start)) = (known.takeback.take(), &known.start) else { return Vec::new() };
        let TakeBack { key, placed, file, reached: (step, loss), checkpoint, back, .. } = back;
        let (members, standings): (Vec<ConnectionId>, Vec<Standing>) = back.into_values().unzip();
        let (record, count) = (&mut known.record, members.len());
        let loss = loss.or_else(|| record.loss.filter(|_| record.step == step));
        let start = StartPoint { step, loss, ..start.clone() };
        let mut run = Run::new(key, members.clone(), file.placement, &start, &record.spec, file.prediction.step_s, now);
        let lost = run.taken_back(placed.from, checkpoint, &standings, loss);
        let gone = record.checkpoint.as_ref().map(|(step, _)| *step).filter(|step| Some(*step) > checkpoint);
        run.gone = gone.map(|step| (step, None));
        run.origin.trained_on(record.data.clone());
        (record.step, record.loss) = (step, loss);
        let codecs = run.codecs_of_plan();
        known.recoveries.taken_back(step > placed.from);
        known.growth.placed(count);
        known.drift.placed();
        known.snapshots.at_work(now);
        known.comeback = Some(Comeback::trained_on(step, count, now));
        (known.run, known.persisted, known.waits_since) = (Some(run), now, None);
        let mut texts = vec![format!(
            "the broker restarted after step {step}: the CompNodes have trained on meanwhile, and nothing is done again"
        )];
        texts.extend(gone.map(|gone| checkpoint_gone(gone, checkpoint)));
        let lost = lost.filter(|step| Some(*step) > gone);
        texts.extend(
            lost.map(|of| format!("there is no checkpoint of step {of}: the broker ended before it was whole")),
        );
        let mut actions = self.notices(job, texts);
        actions.extend(self.set_state(job, JobState::Running));
        let tell = |to| Action::Send { to, message: FromBroker::TakenBack { key, recorded: step } };
        actions.extend(members.into_iter().map(tell));
        actions.extend(codecs.into_iter().map(|(to, message)| Action::Send { to, message }));
        actions
    }

    /// What a job waits for that may be taken back is told to whoever follows.
    pub(super) fn tell_awaited(&mut self, job: JobId) -> Option<Action> {
        let known = self.jobs.get_mut(&job)?;
        let state = JobState::Waiting { reason: known.takeback.as_ref()?.waits() };
        known.record.state = state.clone();
        Some(Action::Emit(JobEvent::State { job, state }))
    }
}

/// What is told of the newest checkpoint that is known, of which nothing is there any more.
fn checkpoint_gone(gone: u64, left: Option<u64>) -> String {
    let newest = match left {
        Some(left) => format!("the newest one is that of step {left}"),
        None => "there is no other one yet".to_owned(),
    };
    format!("the checkpoint of step {gone} is not there any more: training goes on, and {newest}")
}

fn abort(to: ConnectionId, key: RunKey, reason: &str) -> Action {
    Action::Send { to, message: FromBroker::Abort { key, reason: reason.to_owned() } }
}
