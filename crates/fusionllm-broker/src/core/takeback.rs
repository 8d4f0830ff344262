//! A broker that was started again takes a job back on which its CompNodes are still at work: as it is, if all of them are
//! there and agree; else the job goes on like one that has lost a CompNode.

use std::time::Duration;

use fusionllm_protocol::{FromBroker, JobEvent, JobId, JobState, RunKey, Standing};

use super::awaited::TakeBack;
use super::comeback::Comeback;
use super::recovery::{RETURN, awaited};
use super::run::Run;
use super::{Action, ConnectionId, Core, Job, OpenRun, StartPoint};

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
            if let Some(missing) = takeback.map(TakeBack::missing).filter(|_| now >= AWAITED) {
                let why = match missing.is_empty() {
                    true => "what it starts from could not be read in time".to_owned(),
                    false => format!("{} did not come back in {} s", missing.join(", "), AWAITED.as_secs()),
                };
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
        known.recoveries.go_on(awaited(&known.record), RETURN, reason.clone(), step);
        known.record.placed = None;
        if let Some(start) = &known.start {
            (known.record.step, known.record.loss) = known.snapshots.newest_after((start.step, start.loss));
        }
        let mut actions = self.await_no_more(job, &reason);
        actions.extend(self.set_state(job, JobState::Waiting { reason }));
        actions.extend(self.schedule(now));
        actions
    }

    /// Who is back drops the job, and is idle.
    pub(super) fn await_no_more(&mut self, job: JobId, reason: &str) -> Vec<Action> {
        let Some(takeback) = self.jobs.get_mut(&job).and_then(|job| job.takeback.take()) else { return Vec::new() };
        let mut actions = Vec::new();
        for (to, _) in takeback.back.into_values() {
            match self.compnodes.release(to) {
                true => actions.push(abort(to, takeback.key, reason)),
                // It was away; should it come back, it begins anew.
                false => {
                    self.survey.left(to);
                    actions.push(Action::Disconnect { to, reason: reason.to_owned() });
                }
            }
        }
        actions
    }

    /// Takes a job back if all of its CompNodes are there, and what it starts from is known.
    pub(super) fn take_back(&mut self, job: JobId, now: Duration) -> Vec<Action> {
        let Some(known) = self.jobs.get_mut(&job).filter(|known| known.start.is_some()) else { return Vec::new() };
        let is_here = |(connection, _): &(ConnectionId, Standing)| self.compnodes.is_here(*connection);
        let is_whole =
            |back: &mut TakeBack| back.back.len() == back.placed.members.len() && back.back.values().all(is_here);
        let (Some(back), Some(start)) = (known.takeback.take_if(is_whole), &known.start) else { return Vec::new() };
        let TakeBack { key, placed, file, reached: (step, loss), checkpoint, back, .. } = back;
        let (members, standings): (Vec<ConnectionId>, Vec<Standing>) = back.into_values().unzip();
        let (record, count) = (&mut known.record, members.len());
        let start = StartPoint { step, loss, ..start.clone() };
        let mut run =
            Run::new(key, members.clone(), file.placement.clone(), &start, &record.spec, file.prediction.step_s, now);
        let lost = run.taken_back(placed.from, checkpoint, &standings, loss);
        run.origin.trained_on(record.data.clone());
        (record.step, record.loss) = (step, loss);
        let codecs = run.codecs_of_plan();
        let open = OpenRun {
            key,
            run_dir: record.run_dir.clone(),
            run: start.run,
            spec: record.spec.clone(),
            graph: start.graph,
            placement: file,
            predicted: None,
            start_step: step,
        };
        known.recoveries.taken_back(step > placed.from);
        known.growth.placed(count);
        known.snapshots.at_work(now);
        known.comeback = Some(Comeback::trained_on(step, count, now));
        (known.run, known.persisted, known.waits_since) = (Some(run), now, None);
        let mut actions = vec![Action::OpenRun(Box::new(open))];
        let mut texts = vec![format!(
            "the broker restarted after step {step}: the CompNodes have trained on meanwhile, and nothing is done again"
        )];
        texts.extend(
            lost.map(|of| format!("there is no checkpoint of step {of}: the broker ended before it was whole")),
        );
        actions.extend(self.notices(job, texts));
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

fn abort(to: ConnectionId, key: RunKey, reason: &str) -> Action {
    Action::Send { to, message: FromBroker::Abort { key, reason: reason.to_owned() } }
}
