//! The broker's decisions: a state machine without sockets, files or clock.
//!
//! Everything that happens is a [`CoreEvent`]; everything that follows is an [`Action`] for the shell in
//! [`crate::server`]. So every order of events can be tried in a test.

mod checkpoints;
mod data;
mod event;
mod registry;
mod run;
mod schedule;
mod survey;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fusionllm_planner::{Cluster, CodecChange, place};
use fusionllm_protocol::{
    DataReport, FromBroker, FromCompNode, Generation, Inventory, JobEvent, JobId, JobSpec, JobState, Notice,
    StatusReport,
};

use crate::BrokerError;
use crate::checkpoint::FinishSpec;
use crate::store::JobRecord;
pub(crate) use event::{Action, ConnectionId, CoreEvent, Joining, OpenRun, RunKey, StartPoint};
use registry::Registry;
use run::{MergedStep, Run};
use schedule::least_compnodes;
use survey::Survey;

/// A CompNode that sends no heartbeat for this long is lost.
pub(crate) const LEASE: Duration = Duration::from_secs(15);
/// A job's progress is written to the store at most this often.
const PERSIST_EVERY: Duration = Duration::from_secs(5);

/// A job that is known.
#[derive(Debug)]
struct Job {
    record: JobRecord,
    /// Not known after a restart; a resume brings it.
    start: Option<StartPoint>,
    run: Option<Run>,
    persisted: Duration,
}

/// The whole state.
#[derive(Debug, Default)]
pub(crate) struct Core {
    compnodes: Registry,
    survey: Survey,
    jobs: BTreeMap<JobId, Job>,
}

impl Core {
    /// The state after a start: jobs that were at work have failed. Gives what must be remembered of that.
    pub(crate) fn restore(records: Vec<JobRecord>) -> (Self, Vec<Action>) {
        let mut core = Self::default();
        let mut actions = Vec::new();
        for mut record in records {
            if !record.state.is_final() {
                let reason = format!("the broker restarted at step {}; {}", record.step, resume_hint(record.job));
                record.state = JobState::Failed { reason, bad_input: false };
                actions.push(Action::Persist(Box::new(record.clone())));
            }
            core.jobs.insert(record.job, Job { record, start: None, run: None, persisted: Duration::ZERO });
        }
        (core, actions)
    }

    /// A CompNode joins. Gives its name here.
    pub(crate) fn join(&mut self, connection: ConnectionId, joining: Joining, now: Duration) -> (String, Vec<Action>) {
        let name = self.compnodes.join(connection, joining, now);
        self.survey.joined(connection, self.compnodes.all());
        (name, self.schedule(now))
    }

    /// A new job.
    pub(crate) fn submit(
        &mut self,
        spec: JobSpec,
        start: StartPoint,
        run_dir: PathBuf,
        now: Duration,
    ) -> Result<(JobId, Vec<Action>), BrokerError> {
        self.check(&spec, &start)?;
        let job = JobId(self.jobs.keys().next_back().map_or(1, |last| last.0 + 1));
        let record = JobRecord {
            job,
            spec,
            state: JobState::Waiting { reason: String::new() },
            step: start.step,
            loss: None,
            run_dir,
            generation: Generation(0),
            run: Some(start.run.run.clone()),
            checkpoint: None,
        };
        self.jobs.insert(job, Job { record, start: Some(start), run: None, persisted: now });
        Ok((job, self.schedule(now)))
    }

    /// Goes on with a stopped or failed job, which `spec` may have changed.
    pub(crate) fn resume(
        &mut self,
        job: JobId,
        spec: JobSpec,
        start: StartPoint,
        now: Duration,
    ) -> Result<Vec<Action>, BrokerError> {
        let record = self.record(job)?;
        if !matches!(record.state, JobState::Failed { .. } | JobState::Stopped) {
            let state = state_words(&record.state);
            return Err(BrokerError::JobState { job, state, expected: "a stopped or failed job" });
        }
        self.check(&spec, &start)?;
        if let Some(known) = self.jobs.get_mut(&job) {
            known.record.spec = spec;
            known.record.run = Some(start.run.run.clone());
            known.record.step = start.step;
            known.record.state = JobState::Waiting { reason: String::new() };
            known.start = Some(start);
        }
        Ok(self.schedule(now))
    }

    /// Stops a job that has not ended.
    pub(crate) fn stop(&mut self, job: JobId, now: Duration) -> Result<Vec<Action>, BrokerError> {
        let record = self.record(job)?;
        if record.state.is_final() {
            let state = state_words(&record.state);
            return Err(BrokerError::JobState { job, state, expected: "a job that has not ended" });
        }
        let mut actions = self.end(job, JobState::Stopped, "the job was stopped");
        actions.extend(self.schedule(now));
        Ok(actions)
    }

    /// Whether the job could ever be placed.
    fn check(&self, spec: &JobSpec, start: &StartPoint) -> Result<(), BrokerError> {
        if start.step >= spec.train.steps {
            let path = PathBuf::from(&spec.name);
            return Err(BrokerError::NothingLeft { path, step: start.step, steps: spec.train.steps });
        }
        let cluster = start.cluster.clone().unwrap_or_else(|| Cluster::uniform(least_compnodes(spec, start)));
        place(&start.dag, &cluster, &spec.placement_spec())?;
        Ok(())
    }

    /// What is known of a job.
    pub(crate) fn record(&self, job: JobId) -> Result<&JobRecord, BrokerError> {
        self.jobs.get(&job).map(|j| &j.record).ok_or(BrokerError::UnknownJob { job })
    }

    /// Whether another job writes there.
    pub(crate) fn uses_run_dir(&self, path: &std::path::Path) -> bool {
        self.jobs.values().any(|job| job.record.run_dir == path)
    }

    /// Jobs and CompNodes.
    pub(crate) fn status(&self) -> StatusReport {
        StatusReport {
            jobs: self.jobs.values().map(|job| job.record.summary()).collect(),
            compnodes: self.compnodes.summaries(),
        }
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
        match event {
            CoreEvent::Left { connection, reason } => self.left(connection, &reason, now),
            CoreEvent::Said { connection, message } => self.said(connection, message, now),
            CoreEvent::ShardStored { key, step, node, shard } => match self.run_mut(key) {
                Some(run) => {
                    run.shard_stored(step, node, shard);
                    self.advance(key, now)
                }
                None => Vec::new(),
            },
            CoreEvent::CheckpointFinished { key, step, path, checksum } => {
                self.checkpoint_finished(key, step, &path, checksum, now)
            }
            CoreEvent::CheckpointFailed { key, step, reason } => self.checkpoint_failed(key, step, &reason, now),
            CoreEvent::Noticed { key, text } => match self.run_mut(key) {
                Some(_) => self.notices(key.job, vec![text]),
                None => Vec::new(),
            },
            CoreEvent::RunFailed { key, reason } => self.fail(key, reason, false, now),
            CoreEvent::Tick => {
                let silent = self.compnodes.silent_since(now.saturating_sub(LEASE));
                let mut actions = Vec::new();
                for connection in silent {
                    let reason = format!("no heartbeat for {} s", LEASE.as_secs());
                    actions.push(Action::Disconnect { to: connection, reason: reason.clone() });
                    actions.extend(self.left(connection, &reason, now));
                }
                self.survey.tick(now);
                actions.extend(self.schedule(now));
                actions
            }
        }
    }

    fn left(&mut self, connection: ConnectionId, reason: &str, now: Duration) -> Vec<Action> {
        let Some(gone) = self.compnodes.remove(connection) else { return Vec::new() };
        self.survey.left(connection);
        let Some(key) = gone.run else { return self.schedule(now) };
        let step = self.jobs.get(&key.job).map_or(0, |job| job.record.step);
        let hint = resume_hint(key.job);
        let reason = format!("CompNode `{}` vanished after step {step}: {reason}; {hint}", gone.name);
        self.fail(key, reason, false, now)
    }

    fn said(&mut self, connection: ConnectionId, message: FromCompNode, now: Duration) -> Vec<Action> {
        if !self.compnodes.seen(connection, now) {
            return Vec::new();
        }
        match message {
            FromCompNode::Heartbeat { number } => {
                let message = FromBroker::HeartbeatAck { number, now_s: now.as_secs_f64() };
                vec![Action::Send { to: connection, message }]
            }
            FromCompNode::Measured { request, result } => {
                self.survey.measured(connection, request, result);
                self.schedule(now)
            }
            FromCompNode::ProbeAwaited { probe } => self.survey.awaited(connection, probe, &self.compnodes),
            FromCompNode::Probed { probe, result } => {
                self.survey.probed(connection, probe, result, &self.compnodes, now);
                self.schedule(now)
            }
            FromCompNode::Ready { job, generation, data } => {
                self.ready(RunKey { job, generation }, connection, data, now)
            }
            FromCompNode::Step { job, generation, report } => {
                let key = RunKey { job, generation };
                let Some(run) = self.run_mut(key) else { return Vec::new() };
                match run.step_reported(connection, report) {
                    Ok(()) => self.advance(key, now),
                    Err(reason) => self.fail(key, reason, false, now),
                }
            }
            FromCompNode::Finished { job, generation } => {
                let key = RunKey { job, generation };
                let Some(run) = self.run_mut(key) else { return Vec::new() };
                run.finished(connection);
                self.advance(key, now)
            }
            FromCompNode::Note { job, generation, text } => {
                let is_member = |run: &mut Run| run.node_of(connection).is_some();
                if !self.run_mut(RunKey { job, generation }).is_some_and(is_member) {
                    return Vec::new();
                }
                self.notices(job, vec![format!("CompNode `{}`: {text}", self.compnodes.name(connection))])
            }
            FromCompNode::Failed { job, generation, reason, bad_input } => {
                let key = RunKey { job, generation };
                if self.run_mut(key).is_none_or(|run| run.node_of(connection).is_none()) {
                    return Vec::new();
                }
                let name = self.compnodes.name(connection);
                // What is wrong with the input is wrong on every machine.
                let reason = if bad_input { reason } else { format!("CompNode `{name}`: {reason}") };
                self.fail(key, reason, bad_input, now)
            }
        }
    }

    fn ready(&mut self, key: RunKey, connection: ConnectionId, data: Option<DataReport>, now: Duration) -> Vec<Action> {
        if self.run_mut(key).is_none_or(|run| run.node_of(connection).is_none()) {
            return Vec::new();
        }
        let mut actions = Vec::new();
        if let Some(data) = data {
            match self.data_read(key, data) {
                Ok(follows) => actions.extend(follows),
                Err(reason) => return self.fail(key, reason, true, now),
            }
        }
        let Some(run) = self.run_mut(key) else { return actions };
        if run.ready(connection) {
            let RunKey { job, generation } = key;
            let start = |&to| Action::Send { to, message: FromBroker::Start { job, generation } };
            actions.extend(run.members.iter().map(start));
            actions.extend(self.set_state(key.job, JobState::Running));
            if let Some(job) = self.jobs.get_mut(&key.job) {
                job.persisted = now;
            }
        }
        actions
    }

    /// After a report: what is complete now?
    fn advance(&mut self, key: RunKey, now: Duration) -> Vec<Action> {
        let Some(job) = self.jobs.get_mut(&key.job) else { return Vec::new() };
        let Some(run) = job.run.as_mut() else { return Vec::new() };
        let mut actions = Vec::new();
        while let Some(MergedStep { metrics, traced, changes }) = run.next_step() {
            for (to, change) in changes {
                let CodecChange { edge, gradient, codec, .. } = change;
                let RunKey { job, generation } = key;
                let message = FromBroker::SetCodec { job, generation, edge, gradient, codec };
                actions.push(Action::Send { to, message });
            }
            if let Some(measured) = traced {
                actions.push(Action::WriteTrace { key, measured: Box::new(measured) });
            }
            if !metrics.loss.is_finite() {
                let (step, lr) = (metrics.step, metrics.lr);
                let reason = format!(
                    "the loss is {} at step {step} (learning rate {lr:.2e}): lower train.lr or raise train.warmup",
                    metrics.loss
                );
                return actions.into_iter().chain(self.fail(key, reason, false, now)).collect();
            }
            job.record.step = metrics.step;
            job.record.loss = Some(metrics.loss);
            actions.push(Action::AppendMetrics { key, metrics: metrics.clone() });
            actions.push(Action::Emit(JobEvent::Step { job: key.job, metrics }));
            if now.saturating_sub(job.persisted) >= PERSIST_EVERY {
                job.persisted = now;
                actions.push(Action::Persist(Box::new(job.record.clone())));
            }
        }
        for (step, shards) in run.whole_checkpoints() {
            let spec = FinishSpec {
                generation: key.generation,
                step,
                loss: run.loss_of(step),
                spec: job.record.spec.clone(),
                dag: Arc::clone(&run.dag),
                origin: run.origin.clone(),
                shards,
            };
            actions.push(Action::FinishCheckpoint { key, spec: Box::new(spec) });
        }
        if run.is_done() {
            actions.extend(self.end(key.job, JobState::Done, "the job is done"));
            actions.extend(self.schedule(now));
        }
        actions
    }

    fn fail(&mut self, key: RunKey, reason: String, bad_input: bool, now: Duration) -> Vec<Action> {
        if self.run_mut(key).is_none() {
            return Vec::new();
        }
        let mut actions = self.end(key.job, JobState::Failed { reason: reason.clone(), bad_input }, &reason);
        actions.extend(self.schedule(now));
        actions
    }

    /// Ends a job: its CompNodes are free again.
    fn end(&mut self, job: JobId, state: JobState, reason: &str) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Some(run) = self.jobs.get_mut(&job).and_then(|j| j.run.take()) {
            let RunKey { job, generation } = run.key;
            for &to in &run.members {
                let still_here = self.compnodes.release(to);
                if still_here && state != JobState::Done {
                    let message = FromBroker::Abort { job, generation, reason: reason.to_owned() };
                    actions.push(Action::Send { to, message });
                }
            }
        }
        let opened = self.jobs.get(&job).is_some_and(|j| j.record.generation > Generation(0));
        if let Some(known) = self.jobs.get_mut(&job) {
            known.record.state = state.clone();
            if opened {
                actions.push(Action::WriteReport { record: Box::new(known.record.clone()) });
            }
        }
        actions.extend(self.set_state(job, state));
        actions
    }

    /// What the job's user must see: kept beside its metrics, and told to whoever follows.
    fn notices(&self, job: JobId, texts: Vec<String>) -> Vec<Action> {
        let Some(Job { record, .. }) = self.jobs.get(&job) else { return Vec::new() };
        let kept = |text: String| {
            let notice = Notice { step: record.step, text: text.clone() };
            [Action::Notice { run_dir: record.run_dir.clone(), notice }, Action::Emit(JobEvent::Notice { job, text })]
        };
        texts.into_iter().flat_map(kept).collect()
    }

    fn set_state(&mut self, job: JobId, state: JobState) -> Vec<Action> {
        let Some(known) = self.jobs.get_mut(&job) else { return Vec::new() };
        known.record.state = state.clone();
        vec![Action::Persist(Box::new(known.record.clone())), Action::Emit(JobEvent::State { job, state })]
    }

    fn run_mut(&mut self, key: RunKey) -> Option<&mut Run> {
        self.jobs.get_mut(&key.job)?.run.as_mut().filter(|run| run.key == key)
    }
}

fn resume_hint(job: JobId) -> String {
    format!("`fusionllm resume {}` goes on from the last checkpoint", job.0)
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
