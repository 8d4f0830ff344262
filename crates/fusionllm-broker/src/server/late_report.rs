//! The report and the plot of a job that has ended: also where the broker ended in the moment in which the job did.

use std::path::Path;
use std::time::SystemTime;

use fusionllm_protocol::Generation;

use crate::BrokerError;
use crate::files::{io_error, put_aside};
use crate::plot::LossPlot;
use crate::report::RunReport;
use crate::run_dir::{FolderLock, RunDir, RunHome, WholeFiles};
use crate::store::JobRecord;

/// The files that are written when a job ends, of the run directory that `record` names: the report in Markdown, and the
/// plot, if there is something to draw.
pub(super) struct Ending {
    pub(super) report: Vec<u8>,
    pub(super) plot: Option<Vec<u8>>,
}

impl Ending {
    /// Reads what they are made of; the steps are in `metrics`.
    ///
    /// # Errors
    /// [`BrokerError`] if it cannot be read.
    pub(super) fn read(record: &JobRecord, metrics: &Path) -> Result<Self, BrokerError> {
        let mut plot = LossPlot::default();
        let report = RunReport::read(record, metrics, |step| plot.add(step))?;
        let svg = plot.svg().unwrap_or_else(|error| {
            tracing::warn!(error, "the plot of loss against bytes cannot be drawn");
            None
        });
        Ok(Self { report: report.markdown().into_bytes(), plot: svg.map(String::into_bytes) })
    }
}

/// Writes them for a job whose end is on disk while its report is not, or is one of before.
pub(super) fn write_if_missing(record: &JobRecord) {
    if !record.state.is_final() || record.generation == Generation(0) {
        return;
    }
    match write(record) {
        Ok(false) => {}
        Ok(true) => tracing::info!(job = record.job.0, "the report of a job that ended with the broker is written now"),
        Err(error) => tracing::warn!(job = record.job.0, %error, "a job that has ended has no report"),
    }
}

/// Whether there was something to write.
fn write(record: &JobRecord) -> Result<bool, BrokerError> {
    let dir = RunDir::new(&record.run_dir);
    let Some(last_step) = written(&dir.metrics()) else { return Ok(false) };
    if written(&dir.report()).is_some_and(|report| report >= last_step) {
        return Ok(false);
    }
    // What others have put in its place, or have copied from it, is not ours to write in.
    let Some(home) = RunHome::read(&record.run_dir)? else { return Ok(false) };
    let Some(run) = record.run.as_ref().filter(|&run| home.file.as_ref().is_some_and(|file| file.run == *run)) else {
        return Ok(false);
    };
    if home.is_copy()? {
        return Ok(false);
    }
    let _lock = FolderLock::take(&record.run_dir, run)?;
    let Ending { report, plot } = Ending::read(record, &dir.metrics())?;
    // It may be of before, or have somebody's own words in it.
    for path in [dir.report(), dir.plot()] {
        if path.symlink_metadata().is_ok() {
            put_aside(&path).map_err(|e| io_error(&path, e))?;
        }
    }
    let mut files = WholeFiles::default();
    files.write(&dir.report(), report)?;
    if let Some(plot) = plot {
        files.write(&dir.plot(), plot)?;
    }
    Ok(true)
}

/// When a file was written last, if it is there.
fn written(path: &Path) -> Option<SystemTime> {
    path.metadata().ok().filter(std::fs::Metadata::is_file)?.modified().ok()
}

#[cfg(test)]
mod tests {
    use fusionllm_protocol::{JobId, JobState};

    use super::*;
    use crate::resume::find_resumption;
    use crate::testing::{self, OldRuns};

    #[test]
    fn a_job_that_ended_with_its_broker_has_its_report_after_the_next_start() {
        let old = OldRuns::new();
        let run_dir = old.path("run");
        let start = find_resumption(&run_dir, None, None).unwrap().start;
        let file = crate::run_dir::RunFile {
            run: start.run.clone(),
            copy_of: start.copy_of.clone(),
            ..testing::run_file(&run_dir)
        };
        file.write(&mut WholeFiles::default()).unwrap();
        let spec = testing::spec(&[]);
        let record = |state: JobState, run| JobRecord {
            state,
            generation: Generation(1),
            run: Some(run),
            ..JobRecord::new(JobId(1), spec.clone(), run_dir.clone())
        };
        let report = run_dir.join("report.md");
        let _ = std::fs::remove_file(&report);
        write_if_missing(&record(JobState::Running, file.run.clone()));
        write_if_missing(&record(JobState::Done, crate::run_dir::RunStart::new().run));
        assert!(!report.exists(), "it is not done, or another run's");
        let done = record(JobState::Done, file.run.clone());
        write_if_missing(&done);
        let text = std::fs::read_to_string(&report).unwrap();
        assert!(text.contains("steps"), "{text}");
        // One that is as new as the last step stays.
        std::fs::write(&report, "own words").unwrap();
        write_if_missing(&done);
        assert_eq!(std::fs::read_to_string(&report).unwrap(), "own words");
        let old = written(&run_dir.join("metrics.jsonl")).unwrap() - std::time::Duration::from_secs(1);
        std::fs::File::options().append(true).open(&report).unwrap().set_modified(old).unwrap();
        write_if_missing(&done);
        assert_eq!(std::fs::read_to_string(&report).unwrap(), text);
        let aside = std::fs::read_to_string(run_dir.join("report.md.other")).unwrap();
        assert_eq!(aside, "own words", "what was there is kept");
    }
}
