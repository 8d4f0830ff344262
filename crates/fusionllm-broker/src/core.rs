//! The broker's decisions: a state machine without sockets, files or clock.
//!
//! Everything that happens is a [`CoreEvent`]; everything that follows is an [`Action`] for the shell in
//! [`crate::server`]. So every order of events can be tried in a test.

mod around;
mod awaited;
mod bounds;
mod checkpoints;
mod comeback;
mod cuts;
mod data;
mod detector;
mod drain;
mod drift;
mod durable;
mod event;
mod growth;
mod hearsay;
mod hint;
mod job;
mod members;
mod notices;
mod progress;
mod recovery;
mod registry;
mod run;
mod schedule;
mod snapshot_book;
mod snapshots;
mod standstill;
mod status;
mod survey;
mod takeback;
mod watchdog;
mod weigh;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use fusionllm_planner::{Cluster, place};
use fusionllm_protocol::{Fault, FromBroker, Generation, Inventory, JobEvent, JobId, JobSpec, JobState, RunKey};

use crate::BrokerError;
use crate::store::JobRecord;
use awaited::TakeBack;
use comeback::Comeback;
use durable::Durability;
pub(crate) use event::{
    Action, Breach, ConnectionId, CoreEvent, FailedBy, Joining, Loading, OpenRun, PlanInput, Restored, StartPoint,
    Unread, WEIGHTS, Weighed,
};
use job::Job;
use recovery::Recoveries;
use registry::Registry;
use run::Run;
use schedule::least_compnodes;
use survey::Survey;

/// By what command a job goes on that has ended early.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResumedBy {
    /// `fusionllm resume`, at this broker or the next one on its state.
    #[default]
    Broker,
    /// `fusionllm train --resume`: the broker ends with its job.
    Train,
}

/// The whole state.
#[derive(Debug, Default)]
pub(crate) struct Core {
    compnodes: Registry,
    survey: Survey,
    jobs: BTreeMap<JobId, Job>,
    /// When the last tick was.
    ticked: Option<Duration>,
    /// Names, by key, of CompNodes that were to leave and were lost before their work had moved.
    lost_leaving: BTreeMap<[u8; 32], String>,
    /// How many placements were asked for so far: each has a number.
    plans: u64,
    /// Starts asked to be read.
    loads: u64,
    durable: Durability,
    /// How a job goes on that has ended early.
    pub(crate) resumed_by: ResumedBy,
    /// The largest number that a job had, since no number is given twice.
    last_job: u64,
}

impl Core {
    /// The state after a start: jobs that waited go on waiting, and those that were at work go on from their newest
    /// checkpoint once their CompNodes are back. `resumed_by` is how a job goes on that has ended early. Gives what follows.
    pub(crate) fn restore(jobs: Vec<Restored>, resumed_by: ResumedBy) -> (Self, Vec<Action>) {
        let mut core = Self { resumed_by, ..Self::default() };
        let mut actions = Vec::new();
        for Restored { mut record, reached, gone_for, checkpoint, placement } in jobs {
            let id = record.job;
            let is_open = !record.state.is_final();
            let was_at_work = is_open && !matches!(record.state, JobState::Waiting { .. });
            let (steps, chosen) = (record.spec.train.steps, record.from_step);
            // Where it waits, its metrics may go on after the step that it goes on from.
            if let Some((step, loss)) =
                reached.filter(|(step, _)| was_at_work && chosen.is_none() && *step >= record.step)
            {
                (record.step, record.loss) = (step, Some(loss));
            }
            core.last_job = core.last_job.max(id.0);
            let takeback = TakeBack::of(&record, reached, checkpoint, placement).filter(|_| is_open);
            record.placed.take_if(|_| takeback.is_none());
            let has_worked = record.step > 0 || !record.snapshots.is_empty();
            core.jobs.insert(id, Job { is_durable: true, ..Job::new(record, None, Duration::ZERO) });
            if let Some(job) = core.jobs.get_mut(&id) {
                job.recoveries.has_worked = has_worked;
            }
            let is_done = chosen.is_none() && checkpoint.is_some_and(|step| step >= steps);
            if let Some(job) = core.jobs.get_mut(&id) {
                job.takeback = takeback;
            }
            if was_at_work {
                actions.extend(core.was_at_work(id, is_done, chosen.or(checkpoint)));
            } else if is_open {
                actions.extend(core.waited(id, is_done, chosen.or(checkpoint)));
            }
            actions.extend(core.tell_awaited(id));
            if let Some(job) = core.jobs.get_mut(&id).filter(|job| job.recoveries.goes_on) {
                // Where it waited to go on, its metrics still tell how far it was.
                let step = reached.filter(|_| chosen.is_none()).map_or(0, |(step, _)| step).max(job.record.step);
                job.comeback = Some(Comeback::new(Fault::BrokerRestart, Vec::new(), step, gone_for, Duration::ZERO));
            }
        }
        let actions = core.hold(actions);
        (core, actions)
    }

    /// What CompNodes are asked to measure is numbered from here on. An earlier broker must not have used these numbers.
    pub(crate) fn number_from(&mut self, number: u64) {
        self.survey.number_from(number);
    }

    /// A new job.
    pub(crate) fn submit(
        &mut self,
        spec: JobSpec,
        start: StartPoint,
        run_dir: PathBuf,
        now: Duration,
    ) -> Result<(JobId, Vec<Action>), BrokerError> {
        self.check_durable()?;
        self.last_job += 1;
        let job = JobId(self.last_job);
        let (step, loss, run) = (start.step, start.loss, Some(start.run.run.clone()));
        let record = JobRecord { step, loss, run, model: start.model.clone(), ..JobRecord::new(job, spec, run_dir) };
        let mut actions = vec![self.persist(record.clone())];
        // Until this is on disk the job may be forgotten again, and whoever submitted it is told that it was not taken in.
        let first_number = self.last_write();
        self.jobs.insert(job, Job { first_number, ..Job::new(record, Some(start), now) });
        actions.extend(self.schedule(now));
        Ok((job, self.hold(actions)))
    }

    /// Goes on with a stopped or failed job, which `spec` may have changed, from the start that was read for `step` if
    /// that was asked for.
    pub(crate) fn resume(
        &mut self,
        job: JobId,
        spec: JobSpec,
        start: StartPoint,
        step: Option<u64>,
        now: Duration,
    ) -> Result<Vec<Action>, BrokerError> {
        self.check_durable()?;
        check_resumable(self.record(job)?)?;
        let mut actions = Vec::new();
        if let Some(known) = self.jobs.get_mut(&job) {
            known.record.spec = spec;
            (known.record.step, known.record.loss) = (start.step, start.loss);
            known.record.from_step = step;
            (known.record.members, known.record.owner) = (0, None);
            (known.recoveries, known.loading) = (Recoveries::default(), None);
            (known.drift, known.growth) = Default::default();
            // A later one is not its future any more.
            known.record.checkpoint.take_if(|(newest, _)| *newest > start.step);
            known.record.state = JobState::Waiting { reason: String::new() };
            known.begins_with(start);
            let record = known.record.clone();
            actions.push(self.persist(record));
        }
        actions.extend(self.schedule(now));
        Ok(self.hold(actions))
    }

    /// Stops a job that has not ended.
    pub(crate) fn stop(&mut self, job: JobId, now: Duration) -> Result<Vec<Action>, BrokerError> {
        let record = self.record(job)?;
        if record.state.is_final() {
            let state = state_words(&record.state);
            return Err(BrokerError::JobState { job, state, expected: "a job that has not ended" });
        }
        // What was made in all these steps would be lost for the sake of a moment.
        let run = self.jobs.get_mut(&job).and_then(|known| known.run.as_mut());
        if run.is_some_and(Run::ends_by_itself) {
            let text = "all steps are done and the last checkpoint is being written: the job ends when that is there. Stop it \
                        once more to end it without";
            let actions = self.notices(job, vec![text.to_owned()]);
            return Ok(self.hold(actions));
        }
        let mut actions = self.end(job, JobState::Stopped, "the job was stopped");
        actions.extend(self.schedule(now));
        Ok(self.hold(actions))
    }

    /// What is known of a job.
    pub(crate) fn record(&self, job: JobId) -> Result<&JobRecord, BrokerError> {
        self.jobs.get(&job).map(|j| &j.record).ok_or(BrokerError::UnknownJob { job })
    }

    /// Whether another job writes there.
    pub(crate) fn uses_run_dir(&self, path: &std::path::Path) -> bool {
        self.jobs.values().any(|job| job.record.run_dir == path)
    }

    /// What is known of machines and links. With `max_age` links measured longer ago are measured again, with a job its
    /// ops are measured; what is not there yet is pending.
    pub(crate) fn inventory(
        &mut self,
        max_age: Option<Duration>,
        job: Option<(&JobSpec, &StartPoint)>,
        now: Duration,
    ) -> (Inventory, Vec<Action>) {
        let members: Vec<ConnectionId> = self.compnodes.all().collect();
        if let Some(max_age) = max_age {
            self.survey.refresh(now.saturating_sub(max_age));
        }
        if let Some((spec, start)) = job {
            self.survey.want(spec, start, &members);
        }
        let actions = self.survey.advance(&self.compnodes, now);
        (self.survey.inventory(&members, &self.compnodes, job, now), actions)
    }

    /// Everything else that happens.
    pub(crate) fn handle(&mut self, event: CoreEvent, now: Duration) -> Vec<Action> {
        // What was held is older than what follows now, and must not be held again: what it waited for is written.
        let released = match event {
            CoreEvent::Persisted { number } => self.persisted(number),
            _ => Vec::new(),
        };
        let follows = self.react(event, now);
        let follows = self.hold(follows);
        released.into_iter().chain(follows).collect()
    }

    fn react(&mut self, event: CoreEvent, now: Duration) -> Vec<Action> {
        match event {
            CoreEvent::Left { connection, reason } => self.left(connection, &reason, now),
            CoreEvent::Broken { connection, reason } => {
                // One that is at work may come back to it; an idle one has nothing to come back to.
                if self.compnodes.broke(connection, reason.clone()) {
                    Vec::new()
                } else {
                    self.left(connection, &reason, now)
                }
            }
            CoreEvent::Said { connection, message, at } => match self.compnodes.seen(connection, at) {
                true => self.said(connection, message, now),
                // It was told to go, and this was on its way still.
                false => Vec::new(),
            },
            CoreEvent::ShardStored { key, step, node, shard } => match self.run_mut(key) {
                Some(run) => {
                    run.shard_stored(step, node, shard);
                    run.watchdog.moved = now;
                    self.advance(key, now)
                }
                None => Vec::new(),
            },
            CoreEvent::CheckpointFinished { key, step, path, checksum } => {
                self.checkpoint_finished(key, step, &path, checksum, now)
            }
            CoreEvent::CheckpointFailed { key, step, reason, may_pass } => {
                self.checkpoint_failed(key, step, &reason, may_pass, now)
            }
            CoreEvent::CheckpointDropped { key, step } => self.checkpoint_dropped(key, step, now),
            CoreEvent::Recorded { key, step } => {
                if let Some(run) = self.run_mut(key) {
                    run.recorded(step);
                }
                Vec::new()
            }
            CoreEvent::Noticed { key, text } => match self.run_mut(key).is_some() || self.is_awaited(key) {
                true => self.notices(key.job, vec![text]),
                false => Vec::new(),
            },
            CoreEvent::CheckpointsGone { key, left, went } => {
                if let Some(run) = self.run_mut(key) {
                    run.checkpoints_gone(left, went);
                }
                Vec::new()
            }
            CoreEvent::RunOpened { key } => self.run_opened(key, now),
            CoreEvent::GoneOn { key, reason } => self.gone_on(key, reason, now),
            CoreEvent::RunNotOpened { key, reason, by } => self.run_not_opened(key, reason, by, now),
            CoreEvent::RunFailed { key, reason, by } => self.run_failed(key, reason, by, now),
            CoreEvent::WorkFailed { job, reason } => {
                if self.record(job).map_or(true, |record| record.state.is_final()) {
                    return Vec::new();
                }
                let state = JobState::Failed { reason: reason.clone(), bad_input: false };
                let mut actions = self.end(job, state, &reason);
                actions.extend(self.schedule(now));
                actions
            }
            CoreEvent::ShardComing { key } => {
                if let Some(run) = self.run_mut(key) {
                    run.watchdog.moved = now;
                }
                Vec::new()
            }
            CoreEvent::Persisted { .. } => self.recovered(now),
            CoreEvent::Unpersisted { reason } => self.unpersisted(reason, now),
            CoreEvent::Loaded { job, number, result } => self.loaded(job, number, *result, now),
            CoreEvent::Planned { job, number, result } => self.planned(job, number, *result, now),
            CoreEvent::Weighed { job, number, result } => self.weighed(job, number, result, now),
            CoreEvent::Tick => self.tick(now),
        }
    }

    fn fail(&mut self, key: RunKey, reason: String, by: FailedBy, now: Duration) -> Vec<Action> {
        let Some((checkpoint, gone)) = self.run_mut(key).map(|run| (run.checkpoint, run.gone.clone())) else {
            return Vec::new();
        };
        let told = match by {
            // With the same input it would only fail again.
            FailedBy::Input => reason.clone(),
            FailedBy::Machine => format!("{reason}; {}", self.resume_hint(key.job, checkpoint, gone)),
        };
        let mut actions =
            self.end(key.job, JobState::Failed { reason: told, bad_input: by == FailedBy::Input }, &reason);
        actions.extend(self.schedule(now));
        actions
    }

    /// Ends a job: its CompNodes are free again.
    fn end(&mut self, job: JobId, state: JobState, reason: &str) -> Vec<Action> {
        let mut actions = self.measure_no_more(job);
        self.plan_no_more(job);
        actions.extend(self.await_no_more(job, reason));
        actions.extend(self.told_last(job));
        if let Some(known) = self.jobs.get_mut(&job) {
            known.comeback.take_if(|_| state.is_final());
            (known.record.placed, known.in_use) = (None, None);
            known.record.work.take_if(|_| state.is_final());
            // What was not sent yet is not needed any more.
            known.held.retain(|(_, action)| !matches!(action, Action::Send { .. } | Action::SendWeights { .. }));
        }
        if let Some(run) = self.jobs.get_mut(&job).and_then(|j| j.run.take()) {
            let key = run.key;
            for &to in &run.members {
                let still_here = self.release(to);
                if !still_here {
                    // It was away; should it come back, it begins anew.
                    actions.push(Action::Disconnect { to, reason: reason.to_owned() });
                }
                // Of a job that is done each has ended its part by itself.
                if still_here && state != JobState::Done {
                    let message = FromBroker::Abort { key, reason: reason.to_owned() };
                    actions.push(Action::Send { to, message });
                }
            }
        }
        if state.is_final() {
            actions.extend(self.release_all(job));
        }
        actions.extend(self.set_state(job, state));
        // The report may take a while, and nobody waits for it.
        if let Some(Job { record, .. }) = self.jobs.get(&job).filter(|j| j.record.generation > Generation(0)) {
            actions.push(Action::WriteReport { record: Box::new(record.clone()) });
        }
        actions
    }

    fn set_state(&mut self, job: JobId, state: JobState) -> Vec<Action> {
        let Some(known) = self.jobs.get_mut(&job) else { return Vec::new() };
        known.record.state = state.clone();
        let record = known.record.clone();
        vec![self.persist(record), Action::Emit(JobEvent::State { job, state })]
    }

    fn run_mut(&mut self, key: RunKey) -> Option<&mut Run> {
        self.jobs.get_mut(&key.job)?.run.as_mut().filter(|run| run.key == key)
    }
}

/// Whether a job has ended in a way after which it can go on.
pub(crate) fn check_resumable(record: &JobRecord) -> Result<(), BrokerError> {
    if matches!(record.state, JobState::Failed { .. } | JobState::Stopped) {
        return Ok(());
    }
    let (job, state) = (record.job, state_words(&record.state));
    Err(BrokerError::JobState { job, state, expected: "a stopped or failed job" })
}

/// Whether a job could ever be placed. It may take long.
pub(crate) fn check(spec: &JobSpec, start: &StartPoint) -> Result<(), BrokerError> {
    if start.step >= spec.train.steps {
        let path = PathBuf::from(&spec.name);
        return Err(BrokerError::NothingLeft { path, step: start.step, steps: spec.train.steps });
    }
    // Which machines there will be is not known yet, so without a cluster file they are any, and without bounds.
    let cluster = start.cluster.clone().unwrap_or_else(|| Cluster::uniform(least_compnodes(spec, start)));
    place(&start.dag, &cluster, &spec.placement_spec())?;
    Ok(())
}

fn state_words(state: &JobState) -> &'static str {
    match state {
        JobState::Waiting { .. } => "is waiting",
        JobState::Preparing => "is being prepared",
        JobState::Running => "is running",
        JobState::Done => "is done",
        JobState::Failed { .. } => "has failed",
        JobState::Stopped => "is stopped",
    }
}

#[cfg(test)]
mod tests;
