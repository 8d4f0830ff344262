//! Which checkpoint a path means.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::place::{Brief, brief_of, checkpoints_of, maker, steps_in};
use super::tensor_file::io;
use super::{Checkpoint, MANIFEST, Maker, open_at};
use crate::run_dir::RunHome;
use crate::{BrokerError, CheckpointError};

/// What a path may mean.
pub(crate) enum Meant {
    /// One checkpoint.
    Checkpoint(PathBuf),
    /// A run directory.
    Run(Box<RunHome>),
    /// A folder with the checkpoints of one run, newest first.
    Folder(Vec<(u64, PathBuf)>),
}

/// What `path` means. Checkpoints are looked for, but not opened.
pub(crate) fn meant(path: &Path) -> Result<Meant, BrokerError> {
    if path.join(MANIFEST).is_file() {
        return Ok(Meant::Checkpoint(path.to_owned()));
    }
    let is_step = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("step-"));
    if is_step && path.is_dir() {
        return Err(CheckpointError::NoManifest { path: path.join(MANIFEST) }.into());
    }
    if path.is_file() {
        return Err(CheckpointError::None { path: path.to_owned() }.into());
    }
    if let Some(home) = RunHome::read(path)? {
        return Ok(Meant::Run(Box::new(home)));
    }
    let inside = path.join("checkpoints");
    let folder = if inside.is_dir() { &inside } else { path };
    Ok(Meant::Folder(of_one_run(folder)?))
}

/// The checkpoints in a folder and in the folders of runs in it, newest first.
///
/// # Errors
/// [`CheckpointError::Several`] if they are of more than one run.
fn of_one_run(folder: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut places = vec![folder.to_owned()];
    places.extend(std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()));
    let mut by_run: BTreeMap<String, Vec<(u64, PathBuf)>> = BTreeMap::new();
    for place in places {
        if place.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("step-")) {
            continue;
        }
        for (step, path) in steps_in(&place)? {
            let run = match maker(&path).map_err(|e| io(&path, e))? {
                Maker::Run(run) => format!("run {run}"),
                Maker::Unnamed(job) => format!("a run of `{}` with seed {}", job.name, job.train.seed),
                Maker::Unknown => continue,
            };
            by_run.entry(run).or_default().push((step, path));
        }
    }
    for found in by_run.values_mut() {
        found.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    }
    if by_run.len() > 1 {
        let newest = |(run, found): (&String, &Vec<(u64, PathBuf)>)| {
            let path = found.first().map(|(_, path)| path.display().to_string()).unwrap_or_default();
            format!("{path} ({run})")
        };
        let newest: Vec<String> = by_run.iter().map(newest).collect();
        return Err(CheckpointError::Several { path: folder.to_owned(), newest: newest.join(", ") });
    }
    Ok(by_run.into_values().next().unwrap_or_default())
}

/// A checkpoint, and what was passed over to find it.
#[derive(Debug)]
pub(crate) struct Newest {
    pub(crate) checkpoint: Checkpoint,
    /// Why newer ones cannot be used.
    pub(crate) passed_over: Vec<CheckpointError>,
}

/// The newest whole checkpoint of a run, or that of a step.
///
/// # Errors
/// [`CheckpointError::None`] if there is none, [`CheckpointError::Step`] if there is none of that step, or what is wrong
/// with the newest if none is whole.
pub(crate) fn open_newest(home: &RunHome, step: Option<u64>) -> Result<Newest, CheckpointError> {
    let candidates: Vec<_> = checkpoints_of(home)?.into_iter().map(|f| (f.step, f.path)).collect();
    let recorded = home.file.as_ref().map(|file| &file.manifests);
    newest_of(&home.dir, candidates, step, |step| recorded.and_then(|r| r.get(&step)).cloned())
}

/// The same of a list, newest first.
pub(crate) fn newest_of(
    path: &Path,
    mut candidates: Vec<(u64, PathBuf)>,
    step: Option<u64>,
    recorded: impl Fn(u64) -> Option<String>,
) -> Result<Newest, CheckpointError> {
    if let Some(step) = step {
        let there = candidates.iter().map(|(step, _)| *step).collect();
        candidates.retain(|(s, _)| *s == step);
        if candidates.is_empty() {
            return Err(CheckpointError::Step { path: path.to_owned(), step, there });
        }
    }
    let mut passed_over = Vec::new();
    for (step, folder) in candidates {
        match open_at(&folder, recorded(step).as_deref()) {
            // Whoever goes on from it puts later steps aside, by the names of their folders.
            Ok(checkpoint) if checkpoint.manifest.step != step => {
                let reason = format!("its manifest is of step {}", checkpoint.manifest.step);
                passed_over.push(CheckpointError::Misplaced { path: folder, reason });
            }
            Ok(checkpoint) => return Ok(Newest { checkpoint, passed_over }),
            // An older one would be no better.
            Err(error) if error.is_shortage() => return Err(error),
            Err(error) => passed_over.push(error),
        }
    }
    let none = CheckpointError::None { path: path.to_owned() };
    Err(passed_over.into_iter().next().unwrap_or(none))
}

/// The loss that a checkpoint states, without opening it.
pub(crate) fn loss_of(path: &Path) -> Option<f64> {
    brief_of(path).ok().flatten().and_then(|Brief { loss, .. }| loss)
}
