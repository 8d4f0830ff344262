//! The thread that writes run directories and the store, in the order of the core's decisions.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fusionllm_planner::{Simulated, Trace};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_blocking};

use super::actor::Command;
use crate::BrokerError;
use crate::checkpoint::finish;
use crate::core::{Action, CoreEvent, RunKey};
use crate::metrics::{MetricsWriter, read_metrics};
use crate::plot::loss_against_bytes;
use crate::report::RunReport;
use crate::run_dir::{RunDir, write_atomic};
use crate::store::{JobRecord, Store};

/// The way to the thread.
#[derive(Debug)]
pub(super) struct Files {
    queue: mpsc::UnboundedSender<Work>,
    thread: JoinHandle<()>,
}

enum Work {
    Action(Action),
    Report { record: Box<JobRecord>, reply: oneshot::Sender<Result<RunReport, BrokerError>> },
}

impl Files {
    /// Starts the thread. It reports to `commands` what has become of checkpoints and what could not be written.
    pub(super) fn start(store: Store, commands: mpsc::Sender<Command>) -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "the core never waits for a disk, and the thread may wait for the core: a bound could lock both"
        )]
        let (queue, mut work) = mpsc::unbounded_channel();
        // A weak one: the actor ends when all who may ask it have gone.
        let commands = commands.downgrade();
        let thread = spawn_blocking(move || {
            let mut keeper = Keeper { store, writers: BTreeMap::new(), predicted: BTreeMap::new() };
            while let Some(next) = work.blocking_recv() {
                let event = match next {
                    Work::Action(action) => keeper.perform(action),
                    Work::Report { record, reply } => {
                        // Nobody may be waiting for it any more.
                        let _ = reply.send(RunReport::read(&record));
                        None
                    }
                };
                if let (Some(event), Some(commands)) = (event, commands.upgrade()) {
                    // If the actor is gone it needs no word.
                    let _ = commands.blocking_send(Command::Event(event));
                }
            }
        });
        Self { queue, thread }
    }

    /// Queues a file action.
    pub(super) fn perform(&self, action: Action) {
        // The thread lives as long as this queue.
        let _ = self.queue.send(Work::Action(action));
    }

    /// Queues the reading of a report, after everything queued before.
    pub(super) fn report(&self, record: JobRecord, reply: oneshot::Sender<Result<RunReport, BrokerError>>) {
        let _ = self.queue.send(Work::Report { record: Box::new(record), reply });
    }

    /// Waits until all is written.
    pub(super) async fn finish(self) {
        drop(self.queue);
        if let Err(error) = self.thread.await {
            tracing::error!(%error, "the file thread has failed");
        }
    }
}

struct Keeper {
    store: Store,
    writers: BTreeMap<RunKey, (PathBuf, MetricsWriter)>,
    /// CompNodes and predicted step of each run, until the measured one is there.
    predicted: BTreeMap<RunKey, (Vec<String>, Simulated)>,
}

impl Keeper {
    fn perform(&mut self, action: Action) -> Option<CoreEvent> {
        let key = match &action {
            Action::OpenRun(open) => Some(open.key),
            Action::WriteData { key, .. }
            | Action::WriteTrace { key, .. }
            | Action::AppendMetrics { key, .. }
            | Action::FinishCheckpoint { key, .. } => Some(*key),
            _ => None,
        };
        match (self.write(action), key) {
            (Ok(event), _) => event,
            (Err(error), Some(key)) => Some(CoreEvent::RunFailed { key, reason: error.to_string() }),
            (Err(error), None) => {
                tracing::error!(%error, "cannot write");
                None
            }
        }
    }

    fn write(&mut self, action: Action) -> Result<Option<CoreEvent>, BrokerError> {
        match action {
            Action::OpenRun(open) => {
                let dir = RunDir::new(&open.run_dir);
                dir.open(&open.spec, &open.graph, &open.placement)?;
                let writer = MetricsWriter::open(&dir.metrics(), open.start_step)?;
                self.writers.retain(|key, _| key.job != open.key.job);
                self.writers.insert(open.key, (dir.metrics(), writer));
                let names = open.placement.placement.compnodes.clone();
                self.predicted.retain(|key, _| key.job != open.key.job);
                self.predicted.insert(open.key, (names, open.predicted));
            }
            Action::WriteData { run_dir, data, .. } => {
                let dir = RunDir::new(&run_dir);
                dir.write_json(&dir.data(), &data)?;
            }
            Action::WriteTrace { key, run_dir, measured } => {
                if let Some((names, predicted)) = self.predicted.remove(&key) {
                    let trace = Trace::side_by_side(&[("measured", &measured), ("predicted", &predicted)], &names);
                    let dir = RunDir::new(&run_dir);
                    dir.write_json(&dir.trace(), &trace)?;
                }
            }
            Action::AppendMetrics { key, metrics, .. } => {
                if let Some((path, writer)) = self.writers.get_mut(&key) {
                    writer.append(path, &metrics)?;
                }
            }
            Action::Notice { run_dir, notice } => RunDir::new(&run_dir).append_notice(&notice)?,
            Action::FinishCheckpoint { key, spec } => {
                let path = finish(&spec)?;
                return Ok(Some(CoreEvent::CheckpointFinished { key, step: spec.step, path }));
            }
            Action::WriteReport { record } => {
                self.writers.retain(|key, _| key.job != record.job);
                self.predicted.retain(|key, _| key.job != record.job);
                let report = RunReport::read(&record)?;
                let dir = RunDir::new(&record.run_dir);
                write_atomic(&dir.report(), report.markdown().as_bytes())?;
                match loss_against_bytes(&read_metrics(&dir.metrics())?) {
                    Ok(Some(svg)) => write_atomic(&dir.plot(), svg.as_bytes())?,
                    Ok(None) => {}
                    Err(error) => tracing::warn!(error, "the plot of loss against bytes cannot be drawn"),
                }
            }
            Action::Persist(record) => self.store.put(&record)?,
            Action::Send { .. } | Action::SendWeights { .. } | Action::Disconnect { .. } | Action::Emit(_) => {}
        }
        Ok(None)
    }
}
