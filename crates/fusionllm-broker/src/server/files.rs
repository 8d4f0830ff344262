//! The thread that writes run directories, in the order of the core's decisions.

use std::collections::BTreeMap;

use fusionllm_protocol::{Notice, RunKey, StepMetrics};
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;

use super::command::Command;
use super::open_runs::OpenRuns;
use super::run_files::RunFiles;
use super::watched::Watched;
use crate::BrokerError;
use crate::checkpoint::{Course, remove_partial};
use crate::core::{Action, CoreEvent, OpenRun};
use crate::files::write_atomic;
use crate::metrics::{MetricsWriter, gaps};
use crate::plot::LossPlot;
use crate::report::RunReport;
use crate::run_dir::{NoticesWriter, RunDir, read_notices};
use crate::store::JobRecord;

/// The way to the thread.
#[derive(Debug)]
pub(super) struct Files {
    queue: mpsc::UnboundedSender<Work>,
    thread: Watched,
}

#[expect(clippy::large_enum_variant, reason = "nearly all of them are actions")]
enum Work {
    Action(Action),
    Flush(oneshot::Sender<()>),
    Report { record: Box<JobRecord>, reply: oneshot::Sender<Result<RunReport, BrokerError>> },
}

impl Files {
    /// Starts the thread. It reports to `commands` what has become of checkpoints and what could not be written, and
    /// says in `open_runs` where shards may be written.
    pub(super) fn start(commands: mpsc::Sender<Command>, open_runs: OpenRuns) -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "the core never waits for a disk, and the thread may wait for the core: a bound could lock both"
        )]
        let (queue, mut work) = mpsc::unbounded_channel();
        // A weak one: the actor ends when all who may ask it have gone.
        let commands = commands.downgrade();
        let thread = spawn_blocking(move || {
            let mut keeper = Keeper { open_runs, runs: BTreeMap::new() };
            while let Some(next) = work.blocking_recv() {
                let events = match next {
                    Work::Action(action) => keeper.perform(action),
                    Work::Flush(reply) => {
                        // Nobody may be waiting for it any more.
                        let _ = reply.send(());
                        Vec::new()
                    }
                    Work::Report { record, reply } => {
                        // Nobody may be waiting for it any more.
                        let _ = reply.send(RunReport::read(&record, |_| {}));
                        Vec::new()
                    }
                };
                for event in events {
                    let Some(commands) = commands.upgrade() else { break };
                    // If the actor is gone it needs no word.
                    let _ = commands.blocking_send(Command::Event(event));
                }
            }
        });
        Self { queue, thread: Watched::new("the file thread", thread) }
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

    /// Answers once everything queued before is written.
    pub(super) fn flush(&self, reply: oneshot::Sender<()>) {
        let _ = self.queue.send(Work::Flush(reply));
    }

    /// Resolves when the thread has ended, which it does by itself only by a panic.
    pub(super) async fn failed(&mut self) {
        self.thread.ended().await;
    }

    /// Waits until all is written.
    pub(super) async fn finish(mut self) {
        drop(self.queue);
        self.thread.ended().await;
    }
}

struct Keeper {
    open_runs: OpenRuns,
    runs: BTreeMap<RunKey, RunFiles>,
}

impl Keeper {
    fn perform(&mut self, action: Action) -> Vec<CoreEvent> {
        let key = match &action {
            Action::OpenRun(open) => Some(open.key),
            Action::WriteData { key, .. } | Action::AppendMetrics { key, .. } => Some(*key),
            _ => None,
        };
        // Later its folders are known to have been good.
        let begins = matches!(action, Action::OpenRun(_));
        match (self.write(action), key) {
            (Ok(events), _) => events,
            (Err(error), Some(key)) => {
                self.open_runs.set(key, None);
                let bad_input = begins && error.is_bad_input();
                vec![CoreEvent::RunFailed { key, reason: error.to_string(), bad_input }]
            }
            (Err(error), None) => {
                tracing::error!(%error, "cannot write");
                Vec::new()
            }
        }
    }

    fn write(&mut self, action: Action) -> Result<Vec<CoreEvent>, BrokerError> {
        let mut events = Vec::new();
        match action {
            Action::OpenRun(open) => events = self.open(*open)?,
            Action::WriteData { key, run_dir, data } => {
                let dir = RunDir::new(&run_dir);
                dir.write_json(&dir.data(), &data)?;
                if let Some(run) = self.runs.get_mut(&key) {
                    run.data = Some(data);
                }
            }
            Action::WriteTrace { key, measured, .. } => {
                if let Some(run) = self.runs.get_mut(&key) {
                    events = run.write_trace(key, &measured);
                }
            }
            Action::AppendMetrics { key, metrics, .. } => {
                if let Some(run) = self.runs.get_mut(&key) {
                    events = run.append(key, &metrics)?;
                }
            }
            Action::FinishCheckpoint { key, spec } => {
                if let Some(run) = self.runs.get_mut(&key) {
                    events = run.finish(key, &spec);
                }
            }
            Action::DropCheckpoint { key, step } => {
                if let Some(run) = self.runs.get(&key) {
                    events.extend(run.drop_partial(key, step));
                }
            }
            Action::Notice { run_dir, notice } => {
                // Where no run of ours is open, the directory may be another's.
                let dir = RunDir::new(&run_dir);
                if let Some((&key, run)) = self.runs.iter_mut().find(|(_, run)| run.dir == dir) {
                    events.extend(run.note(&notice).map(|text| CoreEvent::Noticed { key, text }));
                }
            }
            Action::WriteReport { record } => self.close(&record)?,
            Action::Persist { .. }
            | Action::Rewrite { .. }
            | Action::Load(_)
            | Action::Plan { .. }
            | Action::Send { .. }
            | Action::SendWeights { .. }
            | Action::Disconnect { .. }
            | Action::Emit(_) => {}
        }
        Ok(events)
    }

    fn open(&mut self, open: OpenRun) -> Result<Vec<CoreEvent>, BrokerError> {
        // An earlier placement's lock must not stand in the way.
        self.runs.retain(|key, _| key.job != open.key.job);
        let dir = RunDir::new(&open.run_dir);
        let mut opened = dir.open(&open.run, &open.spec, &open.graph, &open.placement, open.start_step)?;
        let metrics = MetricsWriter::open(&dir.metrics(), open.start_step)?;
        let mut notices = std::mem::take(&mut opened.notices);
        let began = opened.file.from.as_ref().map_or(0, |from| from.step);
        let mut course = Course::default();
        let take = |step: StepMetrics| course.step(step.step, step.loss, step.eval_loss);
        if let Some(gaps) = gaps(&dir.metrics(), began, open.start_step, take)?
            && !read_notices(&dir.notices(), open.start_step).iter().any(|notice| notice.text == gaps)
        {
            notices.push(gaps);
        }
        self.open_runs.set(open.key, Some(opened.place.clone()));
        let names = open.placement.placement.compnodes.clone();
        let predicted = open.predicted.map(|predicted| (names, predicted));
        let writer = NoticesWriter::new(dir.notices());
        let run = RunFiles {
            opened,
            dir,
            metrics,
            notices: writer,
            predicted,
            course,
            unpruned: None,
            data: None,
            is_away: false,
        };
        self.runs.insert(open.key, run);
        Ok(notices.into_iter().map(|text| CoreEvent::Noticed { key: open.key, text }).collect())
    }

    /// The job has ended: its report is written, and its directory let go.
    fn close(&mut self, record: &JobRecord) -> Result<(), BrokerError> {
        self.open_runs.close(record.job);
        // Held until the report is there.
        let mut ended = Vec::new();
        while let Some(key) = self.runs.keys().find(|key| key.job == record.job).copied() {
            ended.extend(self.runs.remove(&key));
        }
        for run in &mut ended {
            if let Err(error) = run.come_back() {
                tracing::error!(%error, "the run directory cannot be made again");
            }
            if let Err(error) = run.metrics.flush() {
                tracing::error!(%error, path = %run.dir.metrics().display(), "the last steps are not written");
            }
            let removal = remove_partial(&run.opened.place.folder, &run.opened.file.run);
            for why in removal.failures {
                tracing::warn!(why, "an unfinished checkpoint was not removed");
            }
            for text in removal.leftovers {
                let notice = Notice { step: record.step, text };
                // The report matters more than why it cannot be written.
                let _ = run.notices.append(&notice);
            }
            if let Err(error) = run.notices.flush() {
                tracing::error!(%error, path = %run.dir.notices().display(), "the last notices are not written");
            }
        }
        if ended.is_empty() || ended.iter().any(|run| run.is_away) {
            // It was never opened, or not by us, or another folder has come in its place: nothing in there is ours to write.
            return Ok(());
        }
        let mut plot = LossPlot::default();
        let report = RunReport::read(record, |step| plot.add(step))?;
        let dir = RunDir::new(&record.run_dir);
        write_atomic(&dir.report(), report.markdown().as_bytes())?;
        match plot.svg() {
            Ok(Some(svg)) => write_atomic(&dir.plot(), svg.as_bytes())?,
            Ok(None) => {}
            Err(error) => tracing::warn!(error, "the plot of loss against bytes cannot be drawn"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fusionllm_planner::Simulated;
    use fusionllm_protocol::{Generation, JobId};

    use super::*;
    use crate::checkpoint::{FinishSpec, Origin, StoredShard, make_partial};
    use crate::resume::find_resumption;
    use crate::testing::{self, OldRuns};

    /// What was seen before a loss still counts when the run goes on by itself from its newest checkpoint.
    #[tokio::test]
    async fn the_last_good_checkpoint_outlives_a_recovery() {
        let old = OldRuns::new();
        let run_dir = old.path("run");
        let found = find_resumption(&run_dir, None, None).unwrap();
        let checkpoint = |step: u64| run_dir.join(format!("checkpoints/step-{step}"));
        for (step, loss) in [(2, 4.0), (4, 50.0)] {
            let path = checkpoint(step).join("manifest.json");
            let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            manifest["loss"] = loss.into();
            std::fs::write(&path, manifest.to_string()).unwrap();
        }
        let metrics = run_dir.join("metrics.jsonl");
        let mut lines = MetricsWriter::open(&metrics, 0).unwrap();
        for (step, loss) in [(1, 4.0), (2, 4.0), (3, 4.0), (4, 50.0)] {
            lines.append(&metrics, &testing::metrics(step, loss)).unwrap();
        }
        let key = RunKey { job: JobId(1), generation: Generation(1) };
        let mut spec = found.checkpoint.manifest().job.clone();
        spec.checkpoint.keep = 1;
        let placement = serde_json::from_slice(&std::fs::read(run_dir.join("placement.json")).unwrap()).unwrap();
        let open = OpenRun {
            key,
            run_dir: run_dir.clone(),
            run: found.start.clone(),
            spec: spec.clone(),
            graph: "{}".to_owned(),
            placement,
            predicted: Some(Simulated { step_s: 1.0, spans: Vec::new(), transfers: Vec::new() }),
            start_step: 4,
        };
        let open_runs = OpenRuns::new();
        let mut keeper = Keeper { open_runs: open_runs.clone(), runs: BTreeMap::new() };
        keeper.perform(Action::OpenRun(Box::new(open)));
        for step in [5, 6] {
            keeper.perform(Action::AppendMetrics { key, metrics: testing::metrics(step, 50.0) });
        }
        let place = open_runs.place(key).await.unwrap();
        let partial = place.partial(6, key.generation);
        make_partial(&partial, &place.run).unwrap();
        let shards = found.checkpoint.manifest().shards.iter().map(|shard| {
            std::fs::copy(checkpoint(4).join(&shard.file), partial.join(&shard.file)).unwrap();
            let stored = StoredShard { bytes: shard.bytes, blake3: shard.blake3.clone(), not_finite: None };
            (stored, shard.params.clone())
        });
        let spec = FinishSpec {
            generation: key.generation,
            step: 6,
            loss: Some(50.0),
            spec,
            dag: Arc::new(found.checkpoint.dag().clone()),
            origin: Origin::default(),
            shards: shards.collect(),
        };
        let events = keeper.perform(Action::FinishCheckpoint { key, spec: Box::new(spec) });
        assert!(events.iter().any(|event| matches!(event, CoreEvent::CheckpointFinished { .. })), "{events:?}");
        let is_there = |step: u64| checkpoint(step).join("manifest.json").is_file();
        assert_eq!([2, 4, 6].map(is_there), [true, false, true], "step 2 is the last good one");
    }
}
