//! The task that owns the core.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use fusionllm_protocol::{
    BlobHeader, CodecNote, FromBroker, Inventory, JobEvent, JobId, JobSpec, JobState, StatusReport,
};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::compnode::ToCompNode;
use super::events::{JobEvents, Submitted};
use super::files::Files;
use crate::BrokerError;
use crate::core::{Action, ConnectionId, Core, CoreEvent, Joining, StartPoint};
use crate::report::RunReport;
use crate::run_dir::free_run_dir;
use crate::store::JobRecord;

/// How often leases are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Events that a slow follower may be behind.
const EVENT_QUEUE: usize = 1024;

/// Where a job's run directory is to be.
#[derive(Debug)]
pub(super) enum RunDirChoice {
    /// Exactly there.
    Given(PathBuf),
    /// There, or beside it under a number if that is taken.
    Free(PathBuf),
}

type Reply<T> = oneshot::Sender<T>;

/// What the actor is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    Join {
        connection: ConnectionId,
        joining: Joining,
        outbox: mpsc::Sender<ToCompNode>,
        reply: Reply<String>,
    },
    Event(CoreEvent),
    Submit {
        spec: Box<JobSpec>,
        start: Box<StartPoint>,
        run_dir: RunDirChoice,
        reply: Reply<Result<Submitted, BrokerError>>,
    },
    Resume {
        job: JobId,
        spec: Box<JobSpec>,
        start: Box<StartPoint>,
        reply: Reply<Result<Submitted, BrokerError>>,
    },
    Stop {
        job: JobId,
        reply: Reply<Result<(), BrokerError>>,
    },
    Record {
        job: JobId,
        reply: Reply<Result<JobRecord, BrokerError>>,
    },
    Status {
        reply: Reply<StatusReport>,
    },
    Inventory {
        max_age: Option<Duration>,
        job: Option<Box<(JobSpec, StartPoint)>>,
        reply: Reply<Inventory>,
    },
    Report {
        job: JobId,
        reply: Reply<Result<RunReport, BrokerError>>,
    },
    WantsShard {
        connection: ConnectionId,
        header: BlobHeader,
        reply: Reply<bool>,
    },
    Shutdown {
        reply: Reply<()>,
    },
}

struct Actor {
    core: Core,
    files: Files,
    outboxes: BTreeMap<ConnectionId, mpsc::Sender<ToCompNode>>,
    events: broadcast::Sender<JobEvent>,
    /// The states of all jobs that have changed since the start.
    states: watch::Sender<BTreeMap<JobId, JobState>>,
    began: Instant,
}

/// Serves commands until it is told to shut down.
pub(super) async fn run(core: Core, actions: Vec<Action>, mut inbox: mpsc::Receiver<Command>, files: Files) {
    let (events, _) = broadcast::channel(EVENT_QUEUE);
    let states = watch::Sender::default();
    let mut actor = Actor { core, files, outboxes: BTreeMap::new(), events, states, began: Instant::now() };
    actor.perform(actions);
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let command = tokio::select! {
            command = inbox.recv() => command,
            _ = tick.tick() => Some(Command::Event(CoreEvent::Tick)),
        };
        match command {
            Some(Command::Shutdown { reply }) => {
                for outbox in actor.outboxes.values() {
                    // One that is gone or does not listen notices by itself.
                    let _ = outbox.try_send(ToCompNode::Message(FromBroker::Shutdown));
                }
                // Nobody may be waiting for it any more.
                let _ = reply.send(());
                break;
            }
            Some(command) => actor.serve(command),
            None => break,
        }
    }
    let Actor { outboxes, files, .. } = actor;
    let closing: Vec<_> = outboxes.into_values().collect();
    for outbox in &closing {
        // A connection task ends when it has sent what was queued, and drops its receiver.
        let _ = outbox.send(ToCompNode::Disconnect("the broker ends".to_owned())).await;
    }
    for outbox in closing {
        outbox.closed().await;
    }
    files.finish().await;
}

impl Actor {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Replies are sent whether or not the one who asked still waits.
    fn serve(&mut self, command: Command) {
        let now = self.now();
        match command {
            Command::Join { connection, joining, outbox, reply } => {
                self.outboxes.insert(connection, outbox);
                let (name, actions) = self.core.join(connection, joining, now);
                tracing::info!(%name, "a CompNode has joined");
                let _ = reply.send(name);
                self.perform(actions);
            }
            Command::Event(event) => {
                if let CoreEvent::Left { connection, .. } = &event {
                    self.outboxes.remove(connection);
                }
                let actions = self.core.handle(event, now);
                self.perform(actions);
            }
            Command::Submit { spec, start, run_dir, reply } => {
                let run_dir = self.choose(run_dir);
                let receiver = self.events.subscribe();
                let submitted = self.core.submit(*spec, *start, run_dir.clone(), now).map(|(job, actions)| {
                    self.perform(actions);
                    Submitted { job, run_dir, events: JobEvents::new(job, receiver, self.states.subscribe()) }
                });
                let _ = reply.send(submitted);
            }
            Command::Resume { job, spec, start, reply } => {
                let receiver = self.events.subscribe();
                let resumed = self.core.resume(job, *spec, *start, now).and_then(|actions| {
                    self.perform(actions);
                    let run_dir = self.core.record(job)?.run_dir.clone();
                    Ok(Submitted { job, run_dir, events: JobEvents::new(job, receiver, self.states.subscribe()) })
                });
                let _ = reply.send(resumed);
            }
            Command::Stop { job, reply } => {
                let stopped = self.core.stop(job, now).map(|actions| self.perform(actions));
                let _ = reply.send(stopped);
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
            Command::Shutdown { reply } => {
                let _ = reply.send(());
            }
        }
    }

    fn choose(&self, choice: RunDirChoice) -> PathBuf {
        match choice {
            RunDirChoice::Given(path) => path,
            RunDirChoice::Free(base) => free_run_dir(&base, |path| self.core.uses_run_dir(path)),
        }
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send { to, message } => self.send(to, ToCompNode::Message(message)),
                Action::SendWeights { to, key, params, from } => {
                    self.send(to, ToCompNode::Weights { key, params, from });
                }
                Action::Disconnect { to, reason } => {
                    self.send(to, ToCompNode::Disconnect(reason));
                    self.outboxes.remove(&to);
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
                | Action::WriteReport { .. }
                | Action::Persist(_) => self.files.perform(action),
            }
        }
    }

    /// A CompNode that does not take its messages is cut off; its connection task reports that it left.
    fn send(&mut self, to: ConnectionId, message: ToCompNode) {
        let Some(outbox) = self.outboxes.get(&to) else { return };
        match outbox.try_send(message) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Full(_)) => tracing::warn!(?to, "a CompNode does not take its messages"),
            // It has gone, and its connection task is about to say so.
            Err(mpsc::error::TrySendError::Closed(_)) => tracing::debug!(?to, "a message for a CompNode that has gone"),
        }
        self.outboxes.remove(&to);
    }
}

fn log(event: &JobEvent) {
    match event {
        JobEvent::State { job, state } => tracing::info!(%job, ?state, "job state"),
        JobEvent::Checkpoint { job, step, path } => tracing::info!(%job, step, path, "checkpoint"),
        JobEvent::Notice { job, text } => tracing::warn!(%job, text, "notice"),
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
