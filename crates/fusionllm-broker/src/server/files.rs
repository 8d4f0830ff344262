//! The thread that writes run directories, in the order of the core's decisions.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fusionllm_protocol::{JobId, RunKey, StepMetrics};
use fusionllm_transport::io_reason;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;

use super::command::{Command, NoPlace};
use super::late_report::Ending;
use super::open_runs::OpenRuns;
use super::returned::{make_room, make_sure};
use super::run_files::RunFiles;
use super::watched::Watched;
use crate::BrokerError;
use crate::checkpoint::{Course, ShardPlace};
use crate::core::{Action, CoreEvent, FailedBy, OpenRun};
use crate::metrics::{MetricsWriter, gaps};
use crate::report::RunReport;
use crate::run_dir::{RunDir, WholeFiles, read_notices};
use crate::store::JobRecord;

/// So often a run directory is made while others rename or remove it.
const ATTEMPTS: u32 = 3;

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
    PlaceShards { key: RunKey, step: u64, reply: oneshot::Sender<Result<ShardPlace, NoPlace>> },
    Look { key: RunKey, reply: oneshot::Sender<()> },
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
            let mut keeper = Keeper { open_runs, runs: BTreeMap::new(), elsewhere: BTreeMap::new() };
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
                    Work::PlaceShards { key, step, reply } => {
                        let (events, place) = keeper.place_shards(key, step);
                        // Whoever asked and fails by it finds what was seen told.
                        tell(&commands, events);
                        // Nobody may be waiting for it any more.
                        let _ = reply.send(place);
                        Vec::new()
                    }
                    Work::Look { key, reply } => {
                        tell(&commands, keeper.runs.get_mut(&key).map(RunFiles::look_now).unwrap_or_default());
                        // Nobody may be waiting for it any more.
                        let _ = reply.send(());
                        Vec::new()
                    }
                };
                tell(&commands, events);
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

    /// Queues the question where the shards of a step go, if their folder is not where it was.
    pub(super) fn place_shards(&self, key: RunKey, step: u64, reply: oneshot::Sender<Result<ShardPlace, NoPlace>>) {
        let _ = self.queue.send(Work::PlaceShards { key, step, reply });
    }

    /// Queues a look at what others have done to a run's folders; what is seen is told before the answer.
    pub(super) fn look(&self, key: RunKey, reply: oneshot::Sender<()>) {
        let _ = self.queue.send(Work::Look { key, reply });
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

/// Tells the actor; if that is gone it needs no word.
fn tell(commands: &mpsc::WeakSender<Command>, events: Vec<CoreEvent>) {
    for event in events {
        let Some(commands) = commands.upgrade() else { return };
        let _ = commands.blocking_send(Command::Event(event));
    }
}

struct Keeper {
    open_runs: OpenRuns,
    runs: BTreeMap<RunKey, RunFiles>,
    /// The run directories of jobs that have ended and the files of their steps, if others kept them from their place.
    elsewhere: BTreeMap<JobId, (PathBuf, PathBuf)>,
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
            (Err(BrokerError::GoneOn), Some(key)) => {
                self.open_runs.set(key, None);
                vec![CoreEvent::GoneOn { key, reason: BrokerError::GoneOn.to_string() }]
            }
            (Err(error), Some(key)) => {
                self.open_runs.set(key, None);
                let by = if begins && error.is_bad_input() { FailedBy::Input } else { FailedBy::Machine };
                let reason = error.to_string();
                vec![match begins {
                    true => CoreEvent::RunNotOpened { key, reason, by },
                    false => CoreEvent::RunFailed { key, reason, by },
                }]
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
            Action::WriteData { key, data } => {
                if let Some(run) = self.runs.get_mut(&key) {
                    events = run.write_data(&data)?;
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
                events.push(CoreEvent::CheckpointDropped { key, step });
            }
            Action::Notice { run_dir, notice } => {
                // Where no run of ours is open, the directory may be another's.
                let dir = RunDir::new(&run_dir);
                if let Some((&key, run)) = self.runs.iter_mut().find(|(_, run)| run.known_as == dir) {
                    events.extend(run.note(&notice).map(|text| CoreEvent::Noticed { key, text }));
                }
            }
            Action::WriteReport { record } => self.close(&record)?,
            Action::Persist { .. }
            | Action::Rewrite { .. }
            | Action::Load(_)
            | Action::Plan { .. }
            | Action::Weigh { .. }
            | Action::Send { .. }
            | Action::SendWeights { .. }
            | Action::Disconnect { .. }
            | Action::Emit(_) => {}
        }
        Ok(events)
    }

    fn open(&mut self, open: OpenRun) -> Result<Vec<CoreEvent>, BrokerError> {
        self.elsewhere.remove(&open.key.job);
        let files = self.let_go(open.key.job)?;
        let dir = RunDir::new(&open.run_dir);
        let mut notices = match (open.takes_back, open.goes_on) {
            (true, _) => make_sure(&open)?,
            (false, true) => make_room(&open, "before the job went on")?,
            (false, false) => Vec::new(),
        };
        // Somebody may rename or remove in this very moment what was just made.
        let mut attempts = 1..ATTEMPTS;
        let mut opened = loop {
            let opened = dir.open(&open.run, &open.spec, &open.graph, &open.placement, open.start_step, files.clone());
            match opened {
                Err(error) if error.is_of_nothing() && attempts.next().is_some() => {}
                opened => break opened?,
            }
        };
        let metrics = MetricsWriter::open(&dir.metrics(), open.start_step)?;
        notices.append(&mut opened.notices);
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
        let run = RunFiles::new(open.key, opened, metrics, predicted, course, self.open_runs.clone());
        let key = open.key;
        // Others may have been there since the start was read.
        let gone = CoreEvent::CheckpointsGone { key, left: run.newest_step(), went: None };
        self.runs.insert(key, run);
        let noticed = notices.into_iter().map(|text| CoreEvent::Noticed { key, text });
        let opened = std::iter::once(CoreEvent::RunOpened { key });
        Ok(opened.chain(noticed).chain(std::iter::once(gone)).collect())
    }

    /// Lets go of the earlier placements of a job, whose locks must not stand in the way of the next. Gives the files that are
    /// written as a whole, as the last one knew them.
    ///
    /// # Errors
    /// [`BrokerError`] if the folders of one cannot be made again where they were renamed or removed: the next one would begin
    /// in whatever stands in their place by now. Then all are held on to.
    fn let_go(&mut self, job: JobId) -> Result<WholeFiles, BrokerError> {
        for (_, run) in self.runs.iter_mut().filter(|(key, _)| key.job == job) {
            run.come_back(false)?;
        }
        Ok(self.take(job).pop().map(|run| run.opened.files).unwrap_or_default())
    }

    /// Where the shards of a run go that is at work.
    fn place_shards(&mut self, key: RunKey, step: u64) -> (Vec<CoreEvent>, Result<ShardPlace, NoPlace>) {
        let Some(run) = self.runs.get_mut(&key) else { return (Vec::new(), Err(NoPlace::NotOpen)) };
        let is_last = step == run.opened.spec.train.steps;
        run.try_again();
        let mut events = run.look_now();
        if run.is_lost() {
            return (events, Err(NoPlace::Taken));
        }
        let place = run.come_back(is_last).map(|()| run.opened.place.clone());
        let told = std::mem::take(&mut run.opened.notices);
        events.extend(told.into_iter().map(|text| CoreEvent::Noticed { key, text }));
        (events, place.map_err(NoPlace::Broker))
    }

    /// The placements of a job that are open.
    fn take(&mut self, job: JobId) -> Vec<RunFiles> {
        self.runs.extract_if(.., |key, _| key.job == job).map(|(_, run)| run).collect()
    }

    fn report(&self, record: &JobRecord) -> Result<RunReport, BrokerError> {
        match self.elsewhere.get(&record.job) {
            Some((run_dir, metrics)) => {
                RunReport::read(&JobRecord { run_dir: run_dir.clone(), ..record.clone() }, metrics, |_| {})
            }
            None => RunReport::read(record, &RunDir::new(&record.run_dir).metrics(), |_| {}),
        }
    }

    /// The job has ended: its report is written, and its directory let go.
    fn close(&mut self, record: &JobRecord) -> Result<(), BrokerError> {
        self.open_runs.close(record.job);
        // Held until the report is there.
        let mut ended = self.take(record.job);
        // Where another process has the lock, nothing is ours to write.
        ended.retain(|run| !run.is_lost());
        let mut metrics = RunDir::new(&record.run_dir).metrics();
        for run in &mut ended {
            let mut texts = run.look_last();
            if run.is_away {
                if let Err(error) = run.metrics.flush() {
                    let error = io_reason(&error);
                    tracing::error!(%error, "the last steps are not written");
                }
            } else if !run.is_lost() {
                let told;
                (metrics, told) = run.last_look();
                texts.extend(told);
            }
            run.tell_last(record.step, texts);
            run.sync();
        }
        ended.retain(|run| !run.is_lost() && !run.is_away);
        let Some(run) = ended.last_mut() else {
            // It was never opened, or not by us, or another folder has come in its place: nothing in there is ours to write.
            return Ok(());
        };
        let dir = run.dir.clone();
        let record = JobRecord { run_dir: dir.path().to_owned(), ..record.clone() };
        let Ending { report, plot } = Ending::read(&record, &metrics)?;
        if metrics != run.known_as.metrics() {
            self.elsewhere.insert(record.job, (record.run_dir, metrics));
        }
        run.write(dir.report(), report)?;
        if let Some(plot) = plot {
            run.write(dir.plot(), plot)?;
        }
        run.opened.files.tidy(dir.path());
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
    use crate::run_dir::{FolderLock, RunStart};
    use crate::testing::{self, OldRuns};

    /// Another process may come where the lock was gone and could not be taken again.
    #[test]
    fn nothing_is_written_where_another_process_has_taken_a_lock_that_was_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let open = testing::open_run(&run_dir);
        let key = open.key;
        let mut keeper = Keeper { open_runs: OpenRuns::new(), runs: BTreeMap::new(), elsewhere: BTreeMap::new() };
        keeper.perform(Action::OpenRun(Box::new(open)));
        let run = keeper.runs.get_mut(&key).unwrap();
        let lock = run_dir.join(FolderLock::FILE);
        std::fs::remove_file(&lock).unwrap();
        std::fs::write(&lock, "precious").unwrap();
        let told = run.look_now();
        assert!(matches!(&told[..], [CoreEvent::Noticed { text, .. }] if text.contains("not a lock")), "{told:?}");
        assert!(run.look_now().is_empty() && !run.is_lost());
        std::fs::remove_file(&lock).unwrap();
        let _theirs = FolderLock::take(&run_dir, &RunStart::new().run).unwrap();
        let told = run.look_now();
        assert!(run.is_lost() && matches!(&told[..], [CoreEvent::RunFailed { .. }]), "{told:?}");
    }

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
            ..testing::open_run(&run_dir)
        };
        let open_runs = OpenRuns::new();
        let mut keeper = Keeper { open_runs: open_runs.clone(), runs: BTreeMap::new(), elsewhere: BTreeMap::new() };
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
