//! What the broker says to a CompNode, what happens on it, and what follows.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fusionllm_protocol::{Assignment, FromBroker, FromCompNode, RunKey};

use super::running::{RunningJob, Site};
use super::{Node, NodeEvent, assignment};
use crate::CompNodeError;
use crate::links::peer_addr;

impl Node {
    /// Does what the broker says. Gives the answer, if there is one at once.
    pub(super) fn obey(&mut self, message: FromBroker) -> Option<FromCompNode> {
        match message {
            FromBroker::HeartbeatAck { number, now_s, recorded } => {
                if let Some(sent) = self.heartbeats.answered(number) {
                    self.clock.learn(sent, now_s);
                }
                self.recorded(recorded);
                None
            }
            FromBroker::Assign(assignment) => {
                self.assign(*assignment);
                None
            }
            FromBroker::Start { key } => self.start(key),
            FromBroker::TakenBack { key, recorded } => {
                self.taken_back(key, recorded);
                None
            }
            FromBroker::SetCodec { key, edge, way, codec } => {
                self.job_of(key)?.set_codec(edge, way, codec);
                None
            }
            FromBroker::ShardSettled { key, step } => {
                self.job_of(key)?.shard_settled(step);
                None
            }
            FromBroker::ShardAgain { key, step } => {
                self.job_of(key)?.send_again(step);
                None
            }
            message @ (FromBroker::Snapshot { .. }
            | FromBroker::Guard { .. }
            | FromBroker::Lend { .. }
            | FromBroker::Release { .. }
            | FromBroker::Dismiss { .. }) => {
                self.keep(message);
                None
            }
            FromBroker::PeerMoved { key, peer, addr } => {
                self.job_of(key)?.links.moved(peer, &addr);
                None
            }
            FromBroker::CheckPeer { key, peer } => {
                let ago_s = self.job_of(key)?.links.heard(peer)?.as_secs_f64();
                Some(FromCompNode::PeerHeard { key, peer, ago_s })
            }
            FromBroker::Abort { key, reason } => {
                self.job_of(key)?;
                tracing::info!(job = %key.job, %reason, "job aborted");
                self.drop_job(&reason);
                None
            }
            FromBroker::MeasureOps { request, job, graph } => {
                self.surveyor.start_ops(request, *job, graph, Arc::clone(&self.memory), self.events.clone());
                None
            }
            FromBroker::CancelMeasure { request } => {
                self.surveyor.cancel(request);
                None
            }
            FromBroker::AwaitProbe { probe, peer } => {
                self.probes.expect(&peer);
                self.let_in();
                Some(FromCompNode::ProbeAwaited { probe })
            }
            FromBroker::Probe { probe, peer } => {
                self.probes.lead(probe, &peer, self.endpoint.clone(), self.events.clone());
                None
            }
        }
    }

    fn start(&mut self, key: RunKey) -> Option<FromCompNode> {
        let (broker, clock, events) = (self.broker.borrow().clone(), Arc::clone(&self.clock), self.events.clone());
        let job = self.job_of(key)?;
        job.has_broker(broker.as_ref());
        job.start(events, clock)
    }

    /// So much of a job is written.
    fn recorded(&mut self, recorded: Option<(RunKey, u64)>) {
        if let Some((key, step)) = recorded
            && let Some(job) = self.job_of(key)
        {
            job.kept.recorded(step);
        }
    }

    /// A broker that was started again has the job back: it hears of all that it has not written.
    fn taken_back(&mut self, key: RunKey, recorded: u64) {
        let broker = self.broker.borrow().clone();
        let Some(job) = self.job_of(key) else { return };
        let (told, has_finished) = job.kept.taken_back(recorded);
        job.has_broker(broker.as_ref());
        tracing::info!(job = %key.job, reports = told.len(), "the broker was started again and has the job back");
        self.tell(told.into_iter().chain(has_finished.then_some(FromCompNode::Finished { key })));
    }

    /// Does what the broker says of snapshots, and of leaving.
    fn keep(&mut self, message: FromBroker) {
        match message {
            FromBroker::Snapshot { key, step, halt } => {
                if let Some(job) = self.job_of(key) {
                    job.take_snapshot(step, halt);
                }
            }
            FromBroker::Guard { snapshot } => {
                let events = self.events.clone();
                if let Some(job) = self.job_of(snapshot.id.key) {
                    job.guard(snapshot, events);
                }
            }
            FromBroker::Lend { job, to } => {
                self.snapshots.lend_to(job, to.iter().map(|peer| peer_addr(peer).id));
                self.let_in();
            }
            FromBroker::Release { job, keep } => {
                let store = Arc::clone(&self.snapshots);
                tokio::task::spawn_blocking(move || store.release(job, &keep));
            }
            FromBroker::Dismiss { keep } => {
                let how = match keep {
                    true => "nobody is there to take the work: it stands still, and its snapshots stay here",
                    false => "the work has moved away",
                };
                tracing::info!("{how}");
                self.dismissal.keeps_nothing.store(!keep, Ordering::Relaxed);
                self.dismissal.told.notify_one();
            }
            // All others are obeyed elsewhere.
            _ => {}
        }
    }

    fn assign(&mut self, assignment: Assignment) {
        self.drop_job("replaced by another assignment");
        let ended = self.probes.end();
        self.tell(ended);
        self.surveyor.cancel_all();
        let place = Site {
            endpoint: self.endpoint.clone(),
            surveyor: self.surveyor.clone(),
            memory: Arc::clone(&self.memory),
            readable: Arc::clone(&self.readable),
            scratch: Arc::clone(&self.scratch),
            seeds: Arc::clone(&self.seeds),
            snapshots: Arc::clone(&self.snapshots),
            events: self.events.clone(),
        };
        let job = RunningJob::prepare(assignment, place);
        if let Some(weights) = self.weights.take(job.key) {
            job.receive(weights);
        }
        self.job = Some(job);
        self.let_in();
    }

    /// Opens the door to those that the job, probes and loans bring, and to nobody else.
    pub(super) fn let_in(&self) {
        let of_job = self.job.iter().flat_map(|job| job.peers().iter().copied());
        self.members.replace(of_job.chain(self.probes.peers()).chain(self.snapshots.borrowers()));
    }

    fn job_of(&mut self, key: RunKey) -> Option<&mut RunningJob> {
        self.job.as_mut().filter(|j| j.key == key)
    }

    /// What follows from an event: something to tell the broker, perhaps.
    pub(super) fn handle(&mut self, event: NodeEvent) -> Option<FromCompNode> {
        match event {
            NodeEvent::Tell(message) => Some(*message),
            // Without a broker nobody can move what it does, or fetch what it keeps.
            NodeEvent::Leave if self.broker.borrow().is_none() => {
                self.dismissal.told.notify_one();
                None
            }
            NodeEvent::Leave => {
                self.is_leaving = true;
                Some(FromCompNode::Leaving)
            }
            NodeEvent::Looked => {
                if self.has_joined {
                    self.tell_held();
                }
                None
            }
            NodeEvent::Report(key, message) => self.job_of(key)?.kept.report(*message),
            NodeEvent::Weights(weights) => {
                match self.job.as_mut().filter(|job| job.key == weights.key()) {
                    Some(job) => job.receive(*weights),
                    None => self.weights.keep(*weights),
                }
                None
            }
            NodeEvent::Prepared(result) => match *result {
                Ok(prepared) => Some(self.job.as_mut().filter(|j| j.key == prepared.key)?.ready(prepared)),
                Err((key, error)) => self.ended(key, Err(error)),
            },
            NodeEvent::Ended(key, result) => self.ended(key, result),
        }
    }

    fn ended(&mut self, key: RunKey, result: Result<(), CompNodeError>) -> Option<FromCompNode> {
        let job = self.job_of(key)?;
        match result {
            // The wires stay up until the next assignment: peers may still wait for confirmations.
            Ok(()) => job.kept.finish().then_some(FromCompNode::Finished { key }),
            Err(error) => {
                self.drop_job("failed on this CompNode");
                Some(assignment::failed(key, &error))
            }
        }
    }
}
