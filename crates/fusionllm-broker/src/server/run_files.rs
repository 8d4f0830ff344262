//! The files of a run at work.

mod look;

use std::path::PathBuf;
use std::time::Instant;

use fusionllm_planner::{Simulated, Trace};
use fusionllm_protocol::{DataReport, Notice, RunKey, StepMetrics};
use fusionllm_transport::io_reason;

use super::open_runs::OpenRuns;
use crate::BrokerError;
use crate::checkpoint::{Course, FinishSpec, drop_partial, finish, prune};
use crate::core::CoreEvent;
use crate::metrics::MetricsWriter;
use crate::opened_run::OpenedRun;
use crate::run_dir::{NoticesWriter, RunDir, to_json};
use look::NewestCheckpoint;

/// A run at work.
pub(super) struct RunFiles {
    pub(super) key: RunKey,
    pub(super) opened: OpenedRun,
    pub(super) dir: RunDir,
    /// Its directory as the job has it; others may have put something else there.
    pub(super) known_as: RunDir,
    pub(super) metrics: MetricsWriter,
    pub(super) notices: NoticesWriter,
    /// CompNodes and predicted step, until the measured one is there.
    predicted: Option<(Vec<String>, Simulated)>,
    course: Course,
    /// The newest checkpoint, if there are more than are to be kept since it is not known yet whether it is good.
    unpruned: Option<u64>,
    newest: Option<NewestCheckpoint>,
    /// Whether a folder of the run was renamed or removed, and is not made again yet.
    pub(super) is_away: bool,
    /// Whether the lock of a folder was removed, and cannot be taken again.
    is_unlocked: bool,
    /// Since when the lock or the folder for checkpoints is gone.
    let_go_since: Option<Instant>,
    /// When the files that are written as a whole were last looked at.
    looked: Option<Instant>,
    /// Why nothing is written there any more: another process has the run's lock.
    lost: Option<String>,
    open_runs: OpenRuns,
}

impl RunFiles {
    /// The files of a run that was opened. Where its shards go is said in `open_runs`.
    pub(super) fn new(
        key: RunKey,
        opened: OpenedRun,
        metrics: MetricsWriter,
        predicted: Option<(Vec<String>, Simulated)>,
        course: Course,
        open_runs: OpenRuns,
    ) -> Self {
        let dir = RunDir::new(&opened.file.dir);
        let run = Self {
            key,
            newest: NewestCheckpoint::of(&opened.home()),
            opened,
            metrics,
            notices: NoticesWriter::new(dir.notices()),
            known_as: dir.clone(),
            dir,
            predicted,
            course,
            unpruned: None,
            is_away: false,
            is_unlocked: false,
            let_go_since: None,
            looked: None,
            lost: None,
            open_runs,
        };
        run.say_where();
        run
    }

    /// Step of the newest checkpoint.
    pub(super) fn newest_step(&self) -> Option<u64> {
        self.newest.as_ref().map(NewestCheckpoint::step)
    }

    /// Whether another process has the run's lock: nothing of it is written any more.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// Says where shards may be written.
    fn say_where(&self) {
        self.open_runs.set(self.key, Some(self.opened.place.clone()));
    }

    fn noticed(&self, texts: impl IntoIterator<Item = String>) -> Vec<CoreEvent> {
        texts.into_iter().map(|text| CoreEvent::Noticed { key: self.key, text }).collect()
    }

    /// Appends a step. Gives what its user must know.
    pub(super) fn append(&mut self, metrics: &StepMetrics) -> Result<Vec<CoreEvent>, BrokerError> {
        let mut events = self.look();
        if self.lost.is_some() {
            return Ok(events);
        }
        let mut notices: Vec<String> = self.metrics.append(&self.dir.metrics(), metrics)?.into_iter().collect();
        // Why they wait was said.
        let _ = self.notices.flush();
        self.course.step(metrics.step, metrics.loss, metrics.eval_loss);
        if self.unpruned.is_some_and(|newest| newest <= self.course.vouched) {
            notices.extend(self.prune());
        }
        events.extend(self.noticed(notices));
        if self.metrics.is_written() {
            events.push(CoreEvent::Recorded { key: self.key, step: metrics.step });
        }
        Ok(events)
    }

    /// Keeps a notice. Gives why it has to wait, if that is not known yet.
    pub(super) fn note(&mut self, notice: &Notice) -> Option<String> {
        if self.lost.is_some() {
            return None;
        }
        self.notices.append(notice).filter(|_| !self.is_away)
    }

    /// Writes a file as a whole, or keeps what it is to hold until the run directory is there again. Gives what its user must
    /// know.
    ///
    /// # Errors
    /// [`BrokerError::Io`] that names it.
    pub(super) fn write(&mut self, path: PathBuf, bytes: Vec<u8>) -> Result<Vec<CoreEvent>, BrokerError> {
        if self.lost.is_some() {
            return Ok(Vec::new());
        }
        if self.is_away {
            self.opened.files.keep(&path, bytes);
            return Ok(Vec::new());
        }
        let told = self.opened.files.write(&path, bytes)?;
        Ok(self.noticed(told))
    }

    /// Writes what the data owner found.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub(super) fn write_data(&mut self, data: &DataReport) -> Result<Vec<CoreEvent>, BrokerError> {
        let path = self.dir.data();
        let bytes = to_json(&path, data)?;
        self.write(path, bytes)
    }

    /// Writes the step that was measured beside the one that was predicted, once.
    pub(super) fn write_trace(&mut self, measured: &Simulated) -> Vec<CoreEvent> {
        let Some((names, predicted)) = self.predicted.take() else { return Vec::new() };
        let trace = Trace::side_by_side(&[("measured", measured), ("predicted", &predicted)], &names);
        let path = self.dir.trace();
        let written = to_json(&path, &trace).and_then(|bytes| self.write(path, bytes));
        written.unwrap_or_else(|error| self.noticed([error.to_string()]))
    }

    /// Has the steps so far on the disk: what a checkpoint or the end tells of must not be lost with the power.
    pub(super) fn sync(&mut self) {
        if let Err(error) = self.metrics.sync() {
            tracing::warn!(error = %io_reason(&error), "the last steps may not be on the disk");
        }
    }

    /// Makes shards that are all there a checkpoint.
    pub(super) fn finish(&mut self, spec: &FinishSpec) -> Vec<CoreEvent> {
        let (key, step) = (self.key, spec.step);
        self.try_again();
        let mut events = self.look_now();
        if self.lost.is_some() {
            return events;
        }
        let made = self.come_back(step == self.opened.spec.train.steps);
        let told = std::mem::take(&mut self.opened.notices);
        events.extend(self.noticed(told));
        // A checkpoint must not be ahead of the figures of its steps.
        self.sync();
        let finished = made.and_then(|()| finish(spec, &self.opened.place, &self.opened.file));
        let finished = match finished {
            Ok(finished) => finished,
            Err(error) => {
                let may_pass = error.may_pass();
                events.push(CoreEvent::CheckpointFailed { key, step, reason: error.to_string(), may_pass });
                return events;
            }
        };
        let mut notices = finished.notices;
        let recorded = self.opened.record(Some((step, finished.checksum.clone())), &[]);
        notices.extend(recorded.err().map(|error| error.to_string()));
        self.unpruned = Some(step);
        notices.append(&mut self.opened.notices);
        notices.extend(self.prune());
        self.newest = Some(NewestCheckpoint::new(step, &finished.path));
        events.extend(self.noticed(notices));
        events.push(CoreEvent::CheckpointFinished { key, step, path: finished.path, checksum: finished.checksum });
        events
    }

    /// Drops checkpoints that are not to be kept. What cannot be removed is no reason to stop.
    fn prune(&mut self) -> Vec<String> {
        if self.unpruned.is_some_and(|newest| newest <= self.course.vouched) {
            self.unpruned = None;
        }
        let pruned = prune(&self.opened.home(), self.opened.spec.checkpoint.keep, self.course);
        let not_removed = |why| format!("an old checkpoint was not removed: {why}");
        let mut notices = pruned.removal.leftovers;
        notices.extend(pruned.removal.failures.into_iter().map(not_removed));
        if !pruned.dropped.is_empty() {
            notices.extend(self.opened.record(None, &pruned.dropped).err().map(|error| error.to_string()));
            notices.append(&mut self.opened.notices);
        }
        notices
    }

    /// Removes the shards of a checkpoint that cannot be kept: on a full disk they take the room of the next one.
    pub(super) fn drop_partial(&self, step: u64) -> Vec<CoreEvent> {
        if self.lost.is_some() {
            return Vec::new();
        }
        let removal = drop_partial(&self.opened.place.partial(step, self.key.generation), &self.opened.place.run);
        self.noticed(removal.failures.into_iter().chain(removal.leftovers))
    }
}
