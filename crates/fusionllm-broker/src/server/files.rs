//! The thread that writes run directories, in the order of the core's decisions.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fusionllm_protocol::{JobId, Notice, RunKey, StepMetrics};
use fusionllm_transport::io_reason;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;

use super::command::Command;
use super::open_runs::OpenRuns;
use super::run_files::RunFiles;
use super::watched::Watched;
use crate::BrokerError;
use crate::checkpoint::{Course, ShardPlace, remove_partial};
use crate::core::{Action, CoreEvent, OpenRun};
use crate::files::write_atomic;
use crate::metrics::{MetricsWriter, gaps};
use crate::plot::LossPlot;
use crate::report::RunReport;
use crate::run_dir::{RunDir, read_notices};
use crate::store::JobRecord;

/// The way to the thread.
#[derive(Debug)]
pub(super) struct Files {
    queue: mpsc::UnboundedSender<Work>,
    thread: Watched,
}

enum Work {
    Action(Action),
    Flush(oneshot::Sender<()>),
    Report { record: Box<JobRecord>, reply: oneshot::Sender<Result<RunReport, BrokerError>> },
    PlaceShards { key: RunKey, reply: oneshot::Sender<Result<ShardPlace, String>> },
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
            let mut keeper = Keeper { open_runs, runs: BTreeMap::new(), metrics: BTreeMap::new() };
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
                        let _ = reply.send(keeper.report(&record));
                        Vec::new()
                    }
                    Work::PlaceShards { key, reply } => {
                        let (events, place) = keeper.place_shards(key);
                        // Nobody may be waiting for it any more.
                        let _ = reply.send(place);
                        events
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

    /// Queues the question where the shards of a run go, whose folder for them is not where it was.
    pub(super) fn place_shards(&self, key: RunKey, reply: oneshot::Sender<Result<ShardPlace, String>>) {
        let _ = self.queue.send(Work::PlaceShards { key, reply });
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
    /// Where the steps of jobs that have ended are, if others kept them from their place.
    metrics: BTreeMap<JobId, PathBuf>,
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
                    events = run.write_trace(&measured);
                }
            }
            Action::AppendMetrics { key, metrics, .. } => {
                if let Some(run) = self.runs.get_mut(&key) {
                    events = run.append(&metrics)?;
                }
            }
            Action::FinishCheckpoint { key, spec } => {
                if let Some(run) = self.runs.get_mut(&key) {
                    events = run.finish(&spec);
                }
            }
            Action::DropCheckpoint { key, step } => {
                if let Some(run) = self.runs.get(&key) {
                    events.extend(run.drop_partial(step));
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
        self.metrics.remove(&open.key.job);
        let mut there = None;
        // An earlier placement's lock must not stand in the way.
        for mut earlier in self.take(open.key.job) {
            // Else the run would begin in whatever stands in the place of its directory by now.
            earlier.come_back()?;
            there = Some(earlier.there);
        }
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
        let names = open.placement.placement.compnodes.clone();
        let predicted = open.predicted.map(|predicted| (names, predicted));
        let run = RunFiles::new(open.key, opened, metrics, predicted, course, there, self.open_runs.clone());
        self.runs.insert(open.key, run);
        Ok(notices.into_iter().map(|text| CoreEvent::Noticed { key: open.key, text }).collect())
    }

    /// Where the shards of a run go that is at work.
    fn place_shards(&mut self, key: RunKey) -> (Vec<CoreEvent>, Result<ShardPlace, String>) {
        let Some(run) = self.runs.get_mut(&key) else { return (Vec::new(), Err("its run is not open".to_owned())) };
        let events = run.look_now();
        let place = run.come_back().map(|()| run.opened.place.clone());
        (events, place.map_err(|error| error.to_string()))
    }

    /// The placements of a job that are open.
    fn take(&mut self, job: JobId) -> Vec<RunFiles> {
        self.runs.extract_if(.., |key, _| key.job == job).map(|(_, run)| run).collect()
    }

    fn report(&self, record: &JobRecord) -> Result<RunReport, BrokerError> {
        let metrics = self.metrics.get(&record.job).cloned();
        RunReport::read(record, &metrics.unwrap_or_else(|| RunDir::new(&record.run_dir).metrics()), |_| {})
    }

    /// The job has ended: its report is written, and its directory let go.
    fn close(&mut self, record: &JobRecord) -> Result<(), BrokerError> {
        self.open_runs.close(record.job);
        // Held until the report is there.
        let mut ended = self.take(record.job);
        let mut metrics = RunDir::new(&record.run_dir).metrics();
        for run in &mut ended {
            let mut texts = Vec::new();
            match run.come_back() {
                Ok(()) => (metrics, texts) = run.last_look(),
                Err(error) => {
                    tracing::error!(%error, "the run directory cannot be made again");
                    if let Err(error) = run.metrics.flush() {
                        let error = io_reason(&error);
                        tracing::error!(%error, "the last steps are not written");
                    }
                }
            }
            let removal = remove_partial(&run.opened.place.folder, &run.opened.file.run);
            for why in removal.failures {
                tracing::warn!(why, "an unfinished checkpoint was not removed");
            }
            for text in &texts {
                // Nobody follows the job any more.
                tracing::warn!(text, "notice");
            }
            for text in texts.into_iter().chain(removal.leftovers) {
                let notice = Notice { step: record.step, text };
                // The report matters more than why it cannot be written.
                let _ = run.notices.append(&notice);
            }
            if let Err(error) = run.notices.flush() {
                let error = io_reason(&error);
                tracing::error!(%error, path = %run.dir.notices().display(), "the last notices are not written");
            }
        }
        if ended.is_empty() || ended.iter().any(|run| run.is_away) {
            // It was never opened, or not by us, or another folder has come in its place: nothing in there is ours to write.
            return Ok(());
        }
        let mut plot = LossPlot::default();
        let report = RunReport::read(record, &metrics, |step| plot.add(step))?;
        let dir = RunDir::new(&record.run_dir);
        if metrics != dir.metrics() {
            self.metrics.insert(record.job, metrics);
        }
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
    use fusionllm_protocol::Generation;

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
        let mut keeper = Keeper { open_runs: open_runs.clone(), runs: BTreeMap::new(), metrics: BTreeMap::new() };
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
