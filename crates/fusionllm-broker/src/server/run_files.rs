//! The files of a run at work.

use fusionllm_planner::{Simulated, Trace};
use fusionllm_protocol::{DataReport, Notice, RunKey, StepMetrics};

use crate::BrokerError;
use crate::checkpoint::{Course, FinishSpec, drop_partial, finish, prune};
use crate::core::CoreEvent;
use crate::files::io_error;
use crate::metrics::MetricsWriter;
use crate::opened_run::OpenedRun;
use crate::run_dir::{NoticesWriter, RunDir};

/// A run at work.
pub(super) struct RunFiles {
    pub(super) opened: OpenedRun,
    pub(super) dir: RunDir,
    pub(super) metrics: MetricsWriter,
    pub(super) notices: NoticesWriter,
    /// CompNodes and predicted step, until the measured one is there.
    pub(super) predicted: Option<(Vec<String>, Simulated)>,
    pub(super) course: Course,
    /// The newest checkpoint, if there are more than are to be kept since it is not known yet whether it is good.
    pub(super) unpruned: Option<u64>,
    /// What the data owner found.
    pub(super) data: Option<DataReport>,
    /// Whether a folder of the run was renamed or removed, and is not made again yet.
    pub(super) is_away: bool,
}

impl RunFiles {
    /// Appends a step. Gives what its user must know.
    pub(super) fn append(&mut self, key: RunKey, metrics: &StepMetrics) -> Result<Vec<CoreEvent>, BrokerError> {
        let mut events = self.look(key);
        let mut notices: Vec<String> = self.metrics.append(&self.dir.metrics(), metrics)?.into_iter().collect();
        // Why they wait was said.
        let _ = self.notices.flush();
        self.course.step(metrics.step, metrics.loss, metrics.eval_loss);
        if self.unpruned.is_some_and(|newest| newest <= self.course.vouched) {
            notices.extend(self.prune());
        }
        events.extend(notices.into_iter().map(|text| CoreEvent::Noticed { key, text }));
        if self.metrics.is_written() {
            events.push(CoreEvent::Recorded { key, step: metrics.step });
        }
        Ok(events)
    }

    /// Looks whether the folders of the run are where they were: others may rename or remove them while it trains. What is
    /// written meanwhile goes where they went, and comes back with [`Self::come_back`].
    fn look(&mut self, key: RunKey) -> Vec<CoreEvent> {
        let missing = self.opened.missing().map(|folder| folder.display().to_string());
        let Some(folder) = missing else {
            self.is_away = false;
            return self.look_at_files(key);
        };
        if std::mem::replace(&mut self.is_away, true) {
            return Vec::new();
        }
        let text = format!(
            "{folder} is not there any more, it was renamed or removed: training goes on, and the folder is made again with \
             the next checkpoint or at the end, with the metrics and notices so far; checkpoints so far are where it went"
        );
        vec![CoreEvent::Noticed { key, text }, CoreEvent::CheckpointsGone { key }]
    }

    /// The same for its metrics and notices, which are written again at once.
    fn look_at_files(&mut self, key: RunKey) -> Vec<CoreEvent> {
        let mut events = Vec::new();
        let (metrics, notices) = (self.dir.metrics(), self.dir.notices());
        let are_there = [self.metrics.is_at(&metrics), self.notices.is_in_place()];
        for (path, is_there) in [metrics, notices].into_iter().zip(are_there) {
            if !is_there {
                let path = path.display();
                let text =
                    format!("{path} was renamed, removed or replaced: it is written again, with all that was in it");
                events.push(CoreEvent::Noticed { key, text });
            }
        }
        if !events.is_empty()
            && let Err(error) = self.write_again()
        {
            tracing::warn!(%error, "what was removed is not written again");
        }
        events
    }

    fn write_again(&mut self) -> Result<(), BrokerError> {
        self.metrics.move_to(&self.dir.metrics())?;
        self.notices.write_again().map_err(|e| io_error(&self.dir.notices(), e))
    }

    /// Makes the folders of the run again if they were renamed or removed, with all that is still known.
    ///
    /// # Errors
    /// [`BrokerError`] if something else is there by now, or they cannot be made.
    pub(super) fn come_back(&mut self) -> Result<(), BrokerError> {
        if self.opened.missing().is_none() {
            self.is_away = false;
            return Ok(());
        }
        self.is_away = true;
        self.opened.make_again()?;
        if let Some(data) = &self.data {
            self.dir.write_json(&self.dir.data(), data)?;
        }
        self.write_again()?;
        self.is_away = false;
        Ok(())
    }

    /// Keeps a notice. Gives why it has to wait, if that is not known yet.
    pub(super) fn note(&mut self, notice: &Notice) -> Option<String> {
        self.notices.append(notice).filter(|_| !self.is_away)
    }

    /// Writes the step that was measured beside the one that was predicted, once.
    pub(super) fn write_trace(&mut self, key: RunKey, measured: &Simulated) -> Vec<CoreEvent> {
        let Some((names, predicted)) = self.predicted.take().filter(|_| !self.is_away) else { return Vec::new() };
        let trace = Trace::side_by_side(&[("measured", measured), ("predicted", &predicted)], &names);
        let written = self.dir.write_json(&self.dir.trace(), &trace);
        written.err().map(|error| CoreEvent::Noticed { key, text: error.to_string() }).into_iter().collect()
    }

    /// Makes shards that are all there a checkpoint.
    pub(super) fn finish(&mut self, key: RunKey, spec: &FinishSpec) -> Vec<CoreEvent> {
        let step = spec.step;
        let mut events = self.look(key);
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
        events.extend(notices.into_iter().map(|text| CoreEvent::Noticed { key, text }));
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
    pub(super) fn drop_partial(&self, key: RunKey, step: u64) -> Vec<CoreEvent> {
        let removal = drop_partial(&self.opened.place.partial(step, key.generation), &self.opened.place.run);
        let texts = removal.failures.into_iter().chain(removal.leftovers);
        texts.map(|text| CoreEvent::Noticed { key, text }).collect()
    }
}
