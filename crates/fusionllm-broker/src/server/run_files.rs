//! The files of a run at work.

mod look;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use fusionllm_planner::{Simulated, Trace};
use fusionllm_protocol::{DataReport, Notice, RunKey, StepMetrics};

use super::open_runs::OpenRuns;
use crate::BrokerError;
use crate::checkpoint::{Course, FinishSpec, drop_partial, finish, prune};
use crate::core::CoreEvent;
use crate::files::{FileKey, io_error, put_aside};
use crate::metrics::MetricsWriter;
use crate::opened_run::OpenedRun;
use crate::run_dir::{NoticesWriter, RunDir};
use look::NewestCheckpoint;

/// Which files there were of those that are written as a whole.
pub(super) type There = BTreeMap<PathBuf, Option<FileKey>>;

/// A run at work.
pub(super) struct RunFiles {
    key: RunKey,
    pub(super) opened: OpenedRun,
    pub(super) dir: RunDir,
    pub(super) metrics: MetricsWriter,
    pub(super) notices: NoticesWriter,
    /// CompNodes and predicted step, until the measured one is there.
    predicted: Option<(Vec<String>, Simulated)>,
    /// One step, measured and predicted.
    trace: Option<Trace>,
    course: Course,
    /// The newest checkpoint, if there are more than are to be kept since it is not known yet whether it is good.
    unpruned: Option<u64>,
    newest: Option<NewestCheckpoint>,
    /// What the data owner found.
    pub(super) data: Option<DataReport>,
    /// Whether a folder of the run was renamed or removed, and is not made again yet.
    pub(super) is_away: bool,
    /// Whether the lock of a folder was removed, and cannot be taken again.
    is_unlocked: bool,
    /// Since when the lock or the folder for checkpoints is gone.
    let_go_since: Option<Instant>,
    /// What there was, when the run was opened, of files that are written as a whole.
    pub(super) there: There,
    open_runs: OpenRuns,
}

impl RunFiles {
    /// The files of a run that was opened, by an earlier placement of the job as well if it left what it knew of them. Where
    /// its shards go is said in `open_runs`.
    pub(super) fn new(
        key: RunKey,
        opened: OpenedRun,
        metrics: MetricsWriter,
        predicted: Option<(Vec<String>, Simulated)>,
        course: Course,
        there: Option<There>,
        open_runs: OpenRuns,
    ) -> Self {
        let dir = RunDir::new(&opened.file.dir);
        let now = || [dir.trace(), dir.plot(), dir.report()].map(|path| (path.clone(), FileKey::of(&path))).into();
        let there = there.unwrap_or_else(now);
        let run = Self {
            key,
            newest: NewestCheckpoint::of(&opened.home()),
            opened,
            metrics,
            notices: NoticesWriter::new(dir.notices()),
            dir,
            predicted,
            trace: None,
            course,
            unpruned: None,
            data: None,
            is_away: false,
            is_unlocked: false,
            let_go_since: None,
            there,
            open_runs,
        };
        run.say_where();
        run
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
        self.notices.append(notice).filter(|_| !self.is_away)
    }

    /// Makes room for a file that is written as a whole: what others have put under its name since the run was opened is
    /// kept. Gives what its user must know.
    ///
    /// # Errors
    /// [`BrokerError::Io`] if it cannot be put aside.
    pub(super) fn make_room(&mut self, path: &Path) -> Result<Option<String>, BrokerError> {
        let there = FileKey::of(path);
        let is_known = self.there.insert(path.to_owned(), None).is_none_or(|before| before == there);
        if there.is_none() || (is_known && path.is_file()) {
            return Ok(None);
        }
        let aside = put_aside(path).map_err(|e| io_error(path, e))?;
        let (path, aside) = (path.display(), aside.display());
        Ok(Some(format!("something else was in the place of {path}: it is kept as {aside}")))
    }

    /// Writes the step that was measured beside the one that was predicted, once.
    pub(super) fn write_trace(&mut self, measured: &Simulated) -> Vec<CoreEvent> {
        let Some((names, predicted)) = self.predicted.take() else { return Vec::new() };
        let trace = Trace::side_by_side(&[("measured", measured), ("predicted", &predicted)], &names);
        let path = self.dir.trace();
        let mut texts = Vec::new();
        if !self.is_away {
            let made_room = self.make_room(&path);
            let written = made_room.and_then(|said| self.dir.write_json(&path, &trace).map(|()| said));
            texts.extend(written.unwrap_or_else(|error| Some(error.to_string())));
            self.there.insert(path.clone(), FileKey::of(&path));
        }
        self.trace = Some(trace);
        self.noticed(texts)
    }

    /// Makes shards that are all there a checkpoint.
    pub(super) fn finish(&mut self, spec: &FinishSpec) -> Vec<CoreEvent> {
        let (key, step) = (self.key, spec.step);
        self.try_again();
        let mut events = self.look_now();
        let finished = self.come_back().and_then(|()| finish(spec, &self.opened.place, &self.opened.file));
        let finished = match finished {
            Ok(finished) => finished,
            Err(error) => {
                events.push(CoreEvent::CheckpointFailed { key, step, reason: error.to_string() });
                return events;
            }
        };
        let mut notices = finished.notices;
        let recorded = self.opened.record(Some((step, finished.checksum.clone())), &[]);
        notices.extend(recorded.err().map(|error| error.to_string()));
        self.unpruned = Some(step);
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
        }
        notices
    }

    /// Removes the shards of a checkpoint that cannot be kept: on a full disk they take the room of the next one.
    pub(super) fn drop_partial(&self, step: u64) -> Vec<CoreEvent> {
        let removal = drop_partial(&self.opened.place.partial(step, self.key.generation), &self.opened.place.run);
        self.noticed(removal.failures.into_iter().chain(removal.leftovers))
    }
}
