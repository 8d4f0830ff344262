//! The task that owns the core.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fusionllm_protocol::{CodecNote, FromBroker, JobEvent, JobId, JobState, ProtocolError};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::answers::Answers;
use super::command::{Command, Control, Joined, RunDirChoice, ToCompNode, lock};
use super::events::{JobEvents, Submitted};
use super::files::Files;
use super::records::Records;
use super::work;
use crate::BrokerError;
use crate::core::{Action, ConnectionId, Core, CoreEvent, Joining};
use crate::reach::Reach;
use crate::run_dir::free_run_dir;

/// How often leases are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Events that a slow follower may be behind.
const EVENT_QUEUE: usize = 1024;

/// The way to a CompNode.
struct Line {
    /// The connection that it has now, or had last.
    number: ConnectionId,
    /// Nothing while it is away.
    outbox: Option<mpsc::Sender<ToCompNode>>,
    control: Control,
}

struct Actor {
    core: Core,
    files: Files,
    records: Records,
    lines: BTreeMap<ConnectionId, Line>,
    events: broadcast::Sender<JobEvent>,
    /// The states of all jobs that have changed since the start.
    states: watch::Sender<BTreeMap<JobId, JobState>>,
    answers: Answers,
    /// A weak one: the actor ends when all who may ask it have gone.
    to_self: mpsc::WeakSender<Command>,
    reach: Arc<Reach>,
    began: Instant,
}

/// Serves commands until it is told to shut down.
pub(super) async fn run(
    core: Core,
    actions: Vec<Action>,
    to_self: mpsc::WeakSender<Command>,
    mut inbox: mpsc::Receiver<Command>,
    files: Files,
    records: Records,
    reach: Arc<Reach>,
) {
    let (events, _) = broadcast::channel(EVENT_QUEUE);
    let states = watch::Sender::default();
    let mut actor = Actor {
        core,
        files,
        records,
        lines: BTreeMap::new(),
        events,
        states,
        answers: Answers::default(),
        to_self,
        reach,
        began: Instant::now(),
    };
    actor.perform(actions);
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let command = tokio::select! {
            command = inbox.recv() => command,
            _ = tick.tick() => Some(Command::Event(CoreEvent::Tick)),
            // Without them nothing is durable any more.
            () = actor.files.failed() => None,
            () = actor.records.failed() => None,
        };
        match command {
            Some(Command::Shutdown { reply }) => {
                // Nobody may be waiting for it any more.
                let _ = reply.send(());
                break;
            }
            Some(command) => actor.serve(command),
            None => break,
        }
    }
    let Actor { lines, files, records, .. } = actor;
    let closing: Vec<_> = lines.into_values().filter_map(|line| line.outbox).collect();
    for outbox in &closing {
        // A connection task ends when it has sent what was queued, and drops its receiver.
        let _ = outbox.send(ToCompNode::Disconnect("the broker ends".to_owned())).await;
    }
    for outbox in closing {
        outbox.closed().await;
    }
    records.finish().await;
    files.finish().await;
}

impl Actor {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Replies are sent whether or not the one who asked still waits.
    #[expect(clippy::too_many_lines, reason = "one short arm for each command")]
    fn serve(&mut self, command: Command) {
        let now = self.now();
        match command {
            Command::Join { line, joining, resume, outbox, reply } => {
                let (joined, actions) = self.join(line, joining, resume, outbox, now);
                let _ = reply.send(joined);
                self.perform(actions);
            }
            Command::Ended { line, connection, reason, for_good } => {
                // It may have another connection by now.
                if self.lines.get(&connection).is_none_or(|l| l.number != line) {
                    return;
                }
                let event = if for_good {
                    CoreEvent::Left { connection, reason }
                } else {
                    CoreEvent::Broken { connection, reason }
                };
                let actions = self.core.handle(event, now);
                match self.lines.get_mut(&connection) {
                    Some(line) if self.core.is_away(connection) => line.outbox = None,
                    _ => drop(self.lines.remove(&connection)),
                }
                self.perform(actions);
            }
            Command::Said { connection, message, at } => {
                let at = at.duration_since(self.began);
                let actions = self.core.handle(CoreEvent::Said { connection, message, at }, now);
                self.perform(actions);
            }
            Command::Event(event) => {
                let answers = matches!(event, CoreEvent::Persisted { .. } | CoreEvent::Unpersisted { .. });
                let actions = self.core.handle(event, now);
                self.perform(actions);
                if answers {
                    self.answers.give(&self.core);
                }
            }
            Command::Submit { spec, start, run_dir, reply } => {
                let receiver = self.events.subscribe();
                let submitted = self.choose(run_dir).and_then(|run_dir| {
                    let (job, actions) = self.core.submit(*spec, *start, run_dir.clone(), now)?;
                    self.perform(actions);
                    Ok(Submitted { job, run_dir, events: JobEvents::new(job, receiver, self.states.subscribe()) })
                });
                self.answers.once_written(&self.core, reply, submitted, |reason| BrokerError::NotDurable { reason });
            }
            Command::Resume { job, spec, start, step, reply } => {
                let receiver = self.events.subscribe();
                let resumed = self.core.resume(job, *spec, *start, step, now).and_then(|actions| {
                    self.perform(actions);
                    let run_dir = self.core.record(job)?.run_dir.clone();
                    Ok(Submitted { job, run_dir, events: JobEvents::new(job, receiver, self.states.subscribe()) })
                });
                self.answers.once_written(&self.core, reply, resumed, |reason| BrokerError::NotWritten { reason });
            }
            Command::Stop { job, reply } => {
                let stopped = self.core.stop(job, now).map(|actions| self.perform(actions));
                self.answers.once_written(&self.core, reply, stopped, |reason| BrokerError::NotWritten { reason });
            }
            Command::Drain { name, reply } => {
                let drained = self.core.drain(&name, now).map(|actions| self.perform(actions));
                let _ = reply.send(drained);
            }
            Command::Lost { name, reason, reply } => {
                let actions = self.core.lost(&name, &reason, now);
                self.perform(actions);
                let _ = reply.send(());
            }
            Command::Record { job, reply } => {
                let _ = reply.send(self.core.record(job).cloned());
            }
            Command::Status { reply } => {
                let _ = reply.send(self.core.status());
            }
            Command::Inventory { max_age, job, reply } => {
                let job = job.as_deref().map(|(spec, start)| (spec, start));
                let (inventory, actions) = self.core.inventory(max_age, job, now);
                let _ = reply.send(inventory);
                self.perform(actions);
            }
            Command::Report { job, reply } => match self.core.record(job) {
                Ok(record) => self.files.report(record.clone(), reply),
                Err(error) => drop(reply.send(Err(error))),
            },
            Command::WantsShard { connection, header, reply } => {
                let _ = reply.send(self.core.wants_shard(connection, &header));
            }
            Command::ShardSettled { connection, key, step } => {
                if self.core.settles(key, step) {
                    self.send(connection, FromBroker::ShardSettled { key, step });
                }
            }
            Command::Flush { reply } => self.files.flush(reply),
            Command::PlaceShards { key, step, reply } => self.files.place_shards(key, step, reply),
            Command::Look { key, reply } => self.files.look(key, reply),
            Command::Shutdown { reply } => {
                let _ = reply.send(());
            }
        }
    }

    /// Lets a CompNode in: as the one that it was before a break if both ends can go on there, else as a new one.
    fn join(
        &mut self,
        line: ConnectionId,
        joining: Joining,
        resume: Option<u64>,
        outbox: mpsc::Sender<ToCompNode>,
        now: Duration,
    ) -> (Joined, Vec<Action>) {
        let mut actions = Vec::new();
        if let Some(connection) = self.core.member(&joining.key) {
            let control = self.lines.get(&connection).map(|line| Arc::clone(&line.control));
            let again = control.zip(resume).and_then(|(control, received)| {
                let mut stream = lock(&control);
                let again = stream.resume(received).ok()?;
                Some((stream.received(), again, Arc::clone(&control)))
            });
            if let Some((received, again, control)) = again
                && let Some((name, actions)) = self.core.rejoin(connection, joining.clone(), now)
            {
                tracing::info!(%name, "a CompNode is back");
                let (outbox, kept) = (Some(outbox), Arc::clone(&control));
                self.lines.insert(connection, Line { number: line, outbox, control: kept });
                return (Joined { connection, name, control, resumed: Some((received, again)) }, actions);
            }
            // It has forgotten what it was doing.
            self.lines.remove(&connection);
            let reason = "it began anew".to_owned();
            actions = self.core.handle(CoreEvent::Left { connection, reason }, now);
        }
        let (connection, control) = (line, Control::default());
        self.lines.insert(connection, Line { number: line, outbox: Some(outbox), control: Arc::clone(&control) });
        let (name, joined) = self.core.join(connection, joining, now);
        tracing::info!(%name, "a CompNode has joined");
        actions.extend(joined);
        (Joined { connection, name, control, resumed: None }, actions)
    }

    fn choose(&self, choice: RunDirChoice) -> Result<PathBuf, BrokerError> {
        match choice {
            RunDirChoice::Given(path) => Ok(path),
            RunDirChoice::Free(base) => free_run_dir(&base, |path| self.core.uses_run_dir(path)),
        }
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send { to, message } => self.send(to, message),
                Action::SendWeights { to, key, params, from } => {
                    self.queue(to, ToCompNode::Weights { key, params, from });
                }
                Action::Disconnect { to, reason } => {
                    self.queue(to, ToCompNode::Disconnect(reason));
                    self.lines.remove(&to);
                }
                Action::Emit(event) => {
                    log(&event);
                    if let JobEvent::State { job, state } = &event {
                        self.states.send_modify(|states| drop(states.insert(*job, state.clone())));
                    }
                    // It is no error that nobody follows.
                    let _ = self.events.send(event);
                }
                Action::OpenRun(_)
                | Action::WriteData { .. }
                | Action::WriteTrace { .. }
                | Action::AppendMetrics { .. }
                | Action::Notice { .. }
                | Action::FinishCheckpoint { .. }
                | Action::DropCheckpoint { .. }
                | Action::WriteReport { .. } => self.files.perform(action),
                Action::Persist { .. } | Action::Rewrite { .. } => self.records.perform(action),
                Action::Load(loading) => {
                    // What an earlier placement still has written and removed counts.
                    let (flushed, written) = oneshot::channel();
                    self.files.flush(flushed);
                    work::load(self.to_self.clone(), *loading, Arc::clone(&self.reach), written);
                }
                Action::Plan { job, input } => work::plan(self.to_self.clone(), job, *input),
                Action::Weigh { job, input, placement } => {
                    work::weigh(self.to_self.clone(), job, *input, *placement);
                }
            }
        }
    }

    /// What a CompNode that is away does not get now it gets when it is back.
    fn send(&mut self, to: ConnectionId, message: FromBroker) {
        let Some(line) = self.lines.get(&to) else { return };
        let frame = match message {
            FromBroker::HeartbeatAck { .. } => Ok(lock(&line.control).send_once(message)),
            message => lock(&line.control).send(message),
        };
        // Nor can it come back as the one that it was.
        let cut_off = |error: ProtocolError| ToCompNode::Disconnect(error.to_string());
        self.queue(to, frame.map_or_else(cut_off, ToCompNode::Message));
    }

    /// A CompNode that does not take its messages is cut off; its connection task reports that.
    fn queue(&mut self, to: ConnectionId, message: ToCompNode) {
        let Some(line) = self.lines.get_mut(&to) else { return };
        let Some(outbox) = &line.outbox else { return };
        match outbox.try_send(message) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Full(_)) => tracing::warn!(?to, "a CompNode does not take its messages"),
            // It has gone, and its connection task is about to say so.
            Err(mpsc::error::TrySendError::Closed(_)) => tracing::debug!(?to, "a message for a CompNode that has gone"),
        }
        line.outbox = None;
    }
}

fn log(event: &JobEvent) {
    match event {
        JobEvent::State { job, state } => tracing::info!(%job, ?state, "job state"),
        JobEvent::Checkpoint { job, step, path } => tracing::info!(%job, step, path, "checkpoint"),
        // Whoever follows the job in the same process is told anyway, and leaves this out of its log.
        JobEvent::Notice { job, text } => tracing::warn!(target: "fusionllm_broker::notices", %job, text, "notice"),
        JobEvent::Step { job, metrics } => {
            tracing::debug!(%job, step = metrics.step, loss = metrics.loss, "step");
            for change in &metrics.codec_changes {
                let CodecNote { from, to, op, codec, reason, .. } = change;
                tracing::info!(%job, step = metrics.step, from, to, op, codec, reason, "a codec changes");
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod storms;
