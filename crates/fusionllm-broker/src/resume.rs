//! Where a run goes on: from which checkpoint, in which directory, with which keys changed.

use std::path::{Path, PathBuf};

use fusionllm_protocol::{JobSpec, Manifest, RunId};
use fusionllm_transport::{is_same_file, read_regular};

use crate::checkpoint::{
    Checkpoint, Meant, Newest, checkpoints_of, has_exploded, loss_of, meant, newest_of, open_newest,
};
use crate::checkpoint::{MANIFEST, makers_in, open_at, step_name};
use crate::files::io_error;
use crate::run_dir::{Parent, RunFile, RunHome, RunStart, is_free};
use crate::{BrokerError, CheckpointError};

/// A run that goes on.
#[derive(Debug)]
pub struct Resumption {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) run_dir: PathBuf,
    pub(crate) start: RunStart,
}

impl Resumption {
    /// The checkpoint that it goes on from.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Its run directory.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Whether a new run begins with the checkpoint of another one.
    pub fn begins_anew(&self) -> bool {
        self.start.from.is_some()
    }
}

/// Steps of the whole checkpoints that a run has in its directory, newest first; none if the directory is another run's by
/// now. Shards are not read.
///
/// # Errors
/// [`BrokerError`] if the directory or the folder of its checkpoints cannot be read.
pub(crate) fn checkpoints_in(run_dir: &Path, run: Option<&RunId>) -> Result<Vec<u64>, BrokerError> {
    let Some(home) = RunHome::read(run_dir)? else { return Ok(Vec::new()) };
    if run.is_some_and(|run| home.file.as_ref().is_none_or(|file| file.run != *run)) {
        return Ok(Vec::new());
    }
    Ok(checkpoints_of(&home)?.into_iter().map(|found| found.step).collect())
}

/// The step of the newest whole checkpoint of the run in a directory; nothing if it has none. Shards are not read.
///
/// # Errors
/// [`BrokerError`] if the directory or the folder of its checkpoints cannot be read.
pub fn newest_checkpoint(run_dir: &Path) -> Result<Option<u64>, BrokerError> {
    Ok(checkpoints_in(run_dir, None)?.first().copied())
}

/// Whether a run is in a directory.
///
/// # Errors
/// [`BrokerError`] if its `run.json` is damaged or cannot be read.
pub fn holds_run(dir: &Path) -> Result<bool, BrokerError> {
    Ok(RunHome::read(dir)?.is_some())
}

/// Whether a folder is a run directory or a checkpoint by what its files say: other programs have files of the same names.
pub fn is_of_a_run(folder: &Path) -> bool {
    let manifest = read_regular(&folder.join(MANIFEST)).ok();
    let manifest = manifest.and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    manifest.is_some_and(|keys| keys.get("format").is_some_and(|format| format == Manifest::FORMAT))
        || matches!(RunFile::read(folder), Ok(Some(_)))
}

/// Finds where a run goes on. `path` is its directory, a checkpoint, or a folder of checkpoints; without `step` its newest
/// whole checkpoint counts. With `out`, unless that is the run's own directory, a new run begins there with the
/// checkpoint; without it the run's directory is the one that the checkpoint names.
///
/// # Errors
/// [`BrokerError`] if there is no whole checkpoint, its run's directory is not known, or `out` is in use.
pub fn find_resumption(path: &Path, step: Option<u64>, out: Option<&Path>) -> Result<Resumption, BrokerError> {
    let (newest, home) = match meant(path)? {
        Meant::Run(home) => (open_newest(&home, step)?, Ok(*home)),
        Meant::Checkpoint(folder) => {
            let checkpoint = open_at(&folder, None)?;
            let there = checkpoint.manifest().step;
            if let Some(step) = step.filter(|&step| step != there) {
                return Err(CheckpointError::Step { path: folder, step, there: vec![there] }.into());
            }
            let home = home_of(&checkpoint)?;
            (Newest { checkpoint, passed_over: Vec::new() }, home)
        }
        Meant::Folder(found) => {
            let newest = newest_of(path, found, step, |_| None)?;
            let home = home_of(&newest.checkpoint)?;
            (newest, home)
        }
    };
    let mut notices = notices_of(&newest, home.as_ref().ok().filter(|_| step.is_none()));
    let checkpoint = newest.checkpoint;
    let whose = format!("in the checkpoint of step {}", checkpoint.manifest().step);
    notices.extend(home.as_ref().ok().and_then(|home| home.job_notice(&checkpoint.manifest().job, &whose)));
    let out = out.map(|out| std::path::absolute(out).map_err(|e| io_error(out, e))).transpose()?;
    let is_same = |a: &Path, b: &Path| a == b || is_same_file(a, b);
    match (out, home) {
        (Some(out), Ok(home)) if is_same(&out, &home.dir) => {
            let start = goes_on(&home, None, notices)?;
            Ok(Resumption { checkpoint, run_dir: home.dir, start })
        }
        (Some(out), _) => {
            if !is_free(&out)? {
                return Err(BrokerError::RunDirNotEmpty { path: out });
            }
            let path = checkpoint.path().to_owned();
            let (run, step) = (checkpoint.manifest().run.clone(), checkpoint.manifest().step);
            notices.push(format!("a new run begins with {}", path.display()));
            let start = RunStart { from: Some(Parent { run, path, step }), notices, ..RunStart::new() };
            Ok(Resumption { checkpoint, run_dir: out, start })
        }
        (None, Ok(home)) => {
            let start = goes_on(&home, None, notices)?;
            Ok(Resumption { checkpoint, run_dir: home.dir, start })
        }
        (None, Err(homeless)) => {
            let (path, reason) = (checkpoint.path().to_owned(), homeless.to_string());
            Err(BrokerError::RunDirUnknown { path, reason })
        }
    }
}

/// The run of a directory, as it goes on there. `known` is its id, if somebody remembers it.
pub(crate) fn goes_on(
    home: &RunHome,
    known: Option<&RunId>,
    mut notices: Vec<String>,
) -> Result<RunStart, BrokerError> {
    let Some(file) = &home.file else {
        // Made by version 0.1.0, or run.json was removed: it has an id from now on.
        let copy_of = makers_in(&home.dir.join("checkpoints"))?;
        if known.is_none() && !copy_of.is_empty() {
            let dir = home.dir.display();
            notices.push(format!("{dir} has no run.json that says which run it is: it goes on as a run of its own"));
        }
        let start = RunStart { notices, copy_of, ..RunStart::new() };
        return Ok(RunStart { run: known.cloned().unwrap_or(start.run), ..start });
    };
    let mut copy_of = file.copy_of.clone();
    if let Some(known) = known.filter(|known| **known != file.run && !copy_of.contains(known)) {
        let (holds, run) = (file.run.clone(), known.clone());
        return Err(BrokerError::OtherRun { path: home.dir.clone(), holds, run });
    }
    if home.is_copy()? {
        notices.push(format!("this directory is a copy of {}: it goes on as a run of its own", file.dir.display()));
        copy_of.push(file.run.clone());
        return Ok(RunStart { copy_of, notices, ..RunStart::new() });
    }
    Ok(RunStart { run: file.run.clone(), copy_of, from: None, notices })
}

/// What was passed over, and whether the checkpoint looks poisoned beside the others of its run.
pub(crate) fn notices_of(newest: &Newest, home: Option<&RunHome>) -> Vec<String> {
    let step = newest.checkpoint.manifest().step;
    let passed = newest.passed_over.iter();
    let mut notices: Vec<String> =
        passed.map(|error| format!("a newer checkpoint than that of step {step} is passed over: {error}")).collect();
    let others = home.and_then(|home| checkpoints_of(home).ok()).unwrap_or_default();
    let best = others
        .iter()
        .filter(|f| f.step < step)
        .filter_map(|f| Some((loss_of(&f.path)?, f.step)))
        .min_by(|a, b| a.0.total_cmp(&b.0));
    if let Some((loss, (lowest, best))) = newest.checkpoint.manifest().loss.zip(best)
        && has_exploded(loss, lowest)
    {
        notices.push(format!(
            "the checkpoint of step {step} has a loss of {loss:.4}, that of step {best} {lowest:.4}: --step {best} goes on \
             from there"
        ));
    }
    notices
}

/// Why the run directory of a checkpoint is not known.
#[derive(Debug, thiserror::Error)]
enum Homeless {
    #[error("it does not lie under its name among its run's checkpoints")]
    Renamed,
    #[error("it was made by an earlier version and does not say by which run")]
    Nameless,
    #[error("its run {run} is not in {dir} any more")]
    Gone { run: RunId, dir: String },
}

/// The directory of the run that made a checkpoint, or why it is not known.
fn home_of(checkpoint: &Checkpoint) -> Result<Result<RunHome, Homeless>, BrokerError> {
    let (folder, manifest) = (checkpoint.path(), checkpoint.manifest());
    let folder = std::path::absolute(folder).map_err(|e| io_error(folder, e))?;
    if folder.file_name().is_none_or(|name| *name != *step_name(manifest.step)) {
        return Ok(Err(Homeless::Renamed));
    }
    let above: Vec<&Path> = folder.ancestors().skip(2).take(2).collect();
    let Some(run) = &manifest.run else {
        // A run directory of version 0.1.0 can be told by its form, and by the same job.
        let is_inside = folder.parent().and_then(Path::file_name).is_some_and(|name| name == "checkpoints");
        if let Some(dir) = above.first().filter(|_| is_inside) {
            let home = RunHome::read(dir)?;
            let is_its = |home: &RunHome| home.spec.as_ref().is_some_and(|spec| spec.name == manifest.job.name);
            if let Some(home) = home.filter(is_its) {
                return Ok(Ok(home));
            }
        }
        return Ok(Err(Homeless::Nameless));
    };
    for dir in above.into_iter().chain(manifest.run_dir.as_deref()) {
        let home = RunHome::read(dir)?;
        let is_its = |home: &RunHome| home.file.as_ref().is_some_and(|f| f.run == *run || f.copy_of.contains(run));
        if let Some(home) = home.filter(is_its) {
            return Ok(Ok(home));
        }
    }
    let dir = manifest.run_dir.as_ref().map(|dir| dir.display().to_string()).unwrap_or_default();
    Ok(Err(Homeless::Gone { run: run.clone(), dir }))
}

/// The job of a run that goes on, with `section.key=value` overrides. Relative paths in these are taken from `folder`.
///
/// # Errors
/// [`BrokerError`] if a key cannot be changed, or the job is wrong after it.
pub fn resumed_job(stored: &JobSpec, overrides: &[String], folder: Option<&Path>) -> Result<JobSpec, BrokerError> {
    let text = toml::to_string(stored).map_err(|e| io_error(Path::new("the run's job"), std::io::Error::other(e)))?;
    let mut spec = JobSpec::from_toml(&text, overrides)?;
    let keys = || overrides.iter().filter_map(|given| Some(given.split_once('=')?.0.trim()));
    let fixed = ["model.", "lora.", "data.seq_len", "data.tokenizer", "data.format", "data.rows", "train.optimizer"];
    // A tokenizer's file may have moved.
    let is_file = |job: &JobSpec| job.data.tokenizer_file().is_some();
    let is_other_kind = spec.data.tokenizer != stored.data.tokenizer && !(is_file(&spec) && is_file(stored));
    let is_changed = spec.model != stored.model
        || spec.lora != stored.lora
        || is_other_kind
        || (spec.data.format, spec.data.rows) != (stored.data.format, stored.data.rows)
        || spec.data.seq_len != stored.data.seq_len
        || spec.train.optimizer != stored.train.optimizer;
    if is_changed {
        let key = keys().find(|key| fixed.iter().any(|fixed| key.starts_with(fixed))).unwrap_or("model");
        return Err(BrokerError::FixedKey { key: key.to_owned() });
    }
    let given = spec.clone();
    spec.resolve_paths(folder.unwrap_or(Path::new("/")));
    if folder.is_none() && spec != given {
        let paths = ["data.path", "data.chat_template", "checkpoint.to", "placement.cluster"];
        let key = keys().find(|key| paths.contains(key)).unwrap_or("data.path").to_owned();
        return Err(BrokerError::RelativePath { key });
    }
    spec.validate()?;
    Ok(spec)
}

#[cfg(test)]
mod tests;
