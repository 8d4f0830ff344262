//! What CompNodes report, and what becomes of a job by it.

use std::sync::Arc;
use std::time::Duration;

use fusionllm_planner::CodecChange;
use fusionllm_protocol::{DataReport, Fault, FromBroker, FromCompNode, JobEvent, JobState, RunKey};

use super::comeback::Phase;
use super::recovery::Missing;
use super::run::{MergedStep, Run};
use super::{Action, ConnectionId, Core, FailedBy};
use crate::checkpoint::FinishSpec;
use crate::store::{Placed, PlacedMember};

/// A job's progress is written to the store at most this often.
const PERSIST_EVERY: Duration = Duration::from_secs(5);

impl Core {
    /// A CompNode says something.
    pub(super) fn said(&mut self, connection: ConnectionId, message: FromCompNode, now: Duration) -> Vec<Action> {
        match message {
            FromCompNode::Heartbeat { number } => {
                self.compnodes.beat(connection, now);
                let recorded = self.recorded(connection);
                let message = FromBroker::HeartbeatAck { number, now_s: now.as_secs_f64(), recorded };
                vec![Action::Send { to: connection, message }]
            }
            FromCompNode::PeerHeard { key, peer, ago_s } => {
                if let Some(run) = self.run_mut(key) {
                    run.peer_heard(connection, peer, ago_s, now);
                }
                Vec::new()
            }
            FromCompNode::Room { bytes } => {
                if self.compnodes.has_room(connection, bytes) {
                    // What could not be placed on these CompNodes may fit now.
                    self.jobs.values_mut().for_each(|job| job.recoveries.try_again());
                }
                Vec::new()
            }
            FromCompNode::Measured { request, result } => {
                self.ops_measured(connection, request, result);
                self.schedule(now)
            }
            FromCompNode::ProbeAwaited { probe } => self.survey.awaited(connection, probe, &self.compnodes),
            FromCompNode::Probed { probe, result } => self.probed(connection, probe, result, now),
            FromCompNode::Ready { key, data } => self.ready(key, connection, data, now),
            FromCompNode::Reading { key, done, total } => {
                let reads = self.run_mut(key).is_some_and(|run| run.reads_on(connection, (done, total), now));
                let event = JobEvent::Reading { job: key.job, done, total };
                if reads && total > 0 { vec![Action::Emit(event)] } else { Vec::new() }
            }
            FromCompNode::Step { key, report } => {
                let Some(run) = self.run_mut(key) else { return Vec::new() };
                let ways = run.ways_to(connection, &report);
                match run.step_reported(connection, report) {
                    Ok(()) => {
                        ways.into_iter().for_each(|(from, relayed)| self.survey.seen(from, connection, relayed));
                        self.advance(key, now)
                    }
                    Err(breach) => self.fail(key, breach.to_string(), FailedBy::Machine, now),
                }
            }
            FromCompNode::Finished { key } => {
                let Some(run) = self.run_mut(key) else { return Vec::new() };
                run.finished(connection, now);
                self.advance(key, now)
            }
            FromCompNode::Note { key, text } => {
                let run = self.run_mut(key);
                if !run.is_some_and(|run| run.note_comes(connection)) {
                    return Vec::new();
                }
                self.notices(key.job, vec![format!("CompNode `{}`: {text}", self.compnodes.name(connection))])
            }
            FromCompNode::Holds { snapshot, cost_s } => self.holds(connection, snapshot, cost_s, now),
            FromCompNode::Leaving => self.leaves(connection, now),
            FromCompNode::SnapshotFailed { id, is_late, reason } => {
                self.snapshot_failed(connection, id, is_late, &reason, now)
            }
            FromCompNode::ShardFailed { key, step, reason } => {
                let owes = |run: &mut Run| run.node_of(connection).is_some_and(|n| run.owes_shard(connection, n, step));
                if !self.run_mut(key).is_some_and(owes) {
                    return Vec::new();
                }
                let reason = format!("CompNode `{}`: {reason}", self.compnodes.name(connection));
                // Of the last one it holds the state, and writes it when it is asked again.
                self.checkpoint_failed(key, step, &reason, true, now)
            }
            FromCompNode::LinkLost { key, peer, reason } => self.link_lost(key, connection, peer, &reason, now),
            FromCompNode::Failed { key, reason, bad_input } => self.failed(key, connection, reason, bad_input, now),
        }
    }

    /// The placement on which a CompNode is at work, and how much of it is written.
    fn recorded(&self, connection: ConnectionId) -> Option<(RunKey, u64)> {
        let key = self.compnodes.run_of(connection)?;
        let run = self.jobs.get(&key.job)?.run.as_ref().filter(|run| run.key == key)?;
        Some((key, run.last_recorded()?))
    }

    /// A CompNode cannot go on.
    fn failed(
        &mut self,
        key: RunKey,
        connection: ConnectionId,
        reason: String,
        bad_input: bool,
        now: Duration,
    ) -> Vec<Action> {
        let name = self.compnodes.name(connection);
        if self.is_awaited(key) && self.compnodes.run_of(connection) == Some(key) {
            return self.give_back(key.job, format!("CompNode `{name}`: {reason}"), now);
        }
        if self.run_mut(key).is_none_or(|run| run.node_of(connection).is_none()) {
            return Vec::new();
        }
        // What is wrong with the input is wrong on every machine; but what has been right before may only be away, as a disk
        // that is not there yet after a restart.
        let was_right = self.jobs.get(&key.job).is_some_and(|job| job.recoveries.has_worked);
        if bad_input && !was_right {
            return self.fail(key, reason, FailedBy::Input, now);
        }
        let reason = format!("CompNode `{name}`: {reason}");
        self.fault(key, Fault::Failed, vec![name.clone()], Duration::ZERO, now);
        // Where a snapshot was not to be had, the next try goes by another copy, or an older one.
        let is_loan = self.run_mut(key).is_some_and(|run| run.loan_failed);
        let may_be_chance = is_loan || self.run_mut(key).is_some_and(|run| run.step_time().is_none());
        if let Some(job) = self.jobs.get_mut(&key.job).filter(|_| was_right && !is_loan) {
            job.recoveries.avoid(&name, reason.clone(), Missing::Failed, now);
        }
        let missing = if was_right && may_be_chance { Missing::Lost } else { Missing::Failed };
        self.recover(key, reason, missing, now)
    }

    fn ready(&mut self, key: RunKey, connection: ConnectionId, data: Option<DataReport>, now: Duration) -> Vec<Action> {
        if self.run_mut(key).is_none_or(|run| run.node_of(connection).is_none()) {
            return Vec::new();
        }
        let mut actions = Vec::new();
        let reads_data = self.run_mut(key).is_some_and(|run| run.reads_data(connection));
        if let Some(data) = data.filter(|_| reads_data) {
            match self.data_read(key, data) {
                Ok(follows) => actions.extend(follows),
                Err(reason) => return self.fail(key, reason, FailedBy::Input, now),
            }
        }
        let Some(run) = self.run_mut(key) else { return actions };
        if run.ready(connection, now) {
            let members = run.members.clone();
            let placed = self.placed(&members, key);
            if let Some(job) = self.jobs.get_mut(&key.job) {
                // Whoever reads it after a restart knows who may be at work.
                job.record.placed = placed;
                // What lay after its start has been put aside.
                job.record.from_step = None;
                job.comeback.iter_mut().for_each(|comeback| comeback.enter(Phase::Refill, now));
            }
            actions.extend(self.set_state(key.job, JobState::Running));
            let start = |to| Action::Send { to, message: FromBroker::Start { key } };
            actions.extend(members.into_iter().map(start));
            if let Some(job) = self.jobs.get_mut(&key.job) {
                job.snapshots.at_work(now);
                job.persisted = now;
            }
        }
        actions
    }

    /// What a restarted broker must know of a placement that starts now.
    fn placed(&self, members: &[ConnectionId], key: RunKey) -> Option<Placed> {
        let run = self.jobs.get(&key.job)?.run.as_ref()?;
        let member = |(name, &c): (&String, &ConnectionId)| PlacedMember {
            name: name.clone(),
            key: self.compnodes.key(c),
            host: self.compnodes.host(c).to_owned(),
        };
        let members = run.names().iter().zip(members).map(member).collect();
        Some(Placed { placement: run.placement_hash()?, from: run.from(), members })
    }

    /// After a report: what is complete now?
    pub(super) fn advance(&mut self, key: RunKey, now: Duration) -> Vec<Action> {
        let Some(job) = self.jobs.get_mut(&key.job) else { return Vec::new() };
        let Some(run) = job.run.as_mut() else { return Vec::new() };
        let (mut actions, mut progress) = (Vec::new(), None);
        while let Some(MergedStep { mut metrics, busy_s, came, traced, changes }) = run.next_step() {
            for (to, change) in changes {
                let CodecChange { edge, way, codec, .. } = change;
                let message = FromBroker::SetCodec { key, edge, way, codec };
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
                return actions.into_iter().chain(self.fail(key, reason, FailedBy::Machine, now)).collect();
            }
            let comeback = job.comeback.take().map(|comeback| comeback.done(metrics.step.saturating_sub(1), now));
            metrics.recoveries = comeback.into_iter().collect();
            job.record.step = metrics.step;
            run.watchdog.moved = now;
            job.record.loss = Some(metrics.loss);
            job.recoveries.works_on(run.names());
            job.snapshots.stepped(metrics.step, metrics.loss);
            job.drift.stepped(metrics.step_s, busy_s, &came, now);
            actions.push(Action::AppendMetrics { key, metrics: metrics.clone() });
            actions.push(Action::Emit(JobEvent::Step { job: key.job, metrics }));
            if now.saturating_sub(job.persisted) >= PERSIST_EVERY {
                job.persisted = now;
                progress = Some(job.record.clone());
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
        let is_done = run.is_done();
        // Nothing that is told waits for it: after a restart the metrics say how far the job was.
        actions.extend(progress.map(|record| self.persist_meanwhile(record)));
        actions.extend(self.snapshots_complete(key, now));
        actions.extend(self.take_snapshots(key, now));
        if is_done {
            actions.extend(self.end(key.job, JobState::Done, "the job is done"));
            actions.extend(self.schedule(now));
        }
        actions
    }
}
