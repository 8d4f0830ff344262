//! Whose a checkpoint folder is. Several runs, and other programs, may use the folder in which it lies.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fusionllm_protocol::{JobSpec, RunId};
use fusionllm_transport::{if_usable, open_regular, read_regular, remove_if_there};
use serde::Deserialize;

use super::Removal;
use super::names::{ASIDE, MANIFEST, MARK, PARTIAL, step_of};
use super::tensor_file::io;
use crate::files::{io_error, private_folders};
use crate::run_dir::RunHome;
use crate::{BrokerError, CheckpointError};

/// More than a mark has.
const MARK_BYTES: u64 = 64;

/// What is known of a folder's maker.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Maker {
    /// This run.
    Run(RunId),
    /// A run of version 0.1.0, which left no id, with this job.
    Unnamed(Box<JobSpec>),
    /// Nothing says that a run made it.
    Unknown,
}

/// Who made the folder `path`.
///
/// # Errors
/// That its files could not be opened for a reason that says nothing of them, such as too many open files.
pub(crate) fn maker(path: &Path) -> std::io::Result<Maker> {
    if !is_real_folder(path) {
        return Ok(Maker::Unknown);
    }
    if let Some(run) = read_mark(path)? {
        return Ok(Maker::Run(run));
    }
    Ok(match brief_of(path)? {
        Some(Brief { run: Some(run), .. }) => Maker::Run(run),
        Some(Brief { job, .. }) => Maker::Unnamed(job),
        None => Maker::Unknown,
    })
}

/// Whether the run made the folder `path`.
///
/// # Errors
/// As [`maker`].
pub(super) fn is_of(path: &Path, run: &RunId) -> std::io::Result<bool> {
    maker(path).map(|maker| maker == Maker::Run(run.clone()))
}

/// The part of a manifest that says whose it is; its checksum is not looked at.
#[derive(Deserialize)]
pub(crate) struct Brief {
    #[serde(default)]
    pub(crate) run: Option<RunId>,
    pub(crate) loss: Option<f64>,
    pub(crate) job: Box<JobSpec>,
}

/// Reads the manifest in a folder for what it says of its maker; nothing if there is none that can be read.
///
/// # Errors
/// As [`maker`].
pub(crate) fn brief_of(path: &Path) -> std::io::Result<Option<Brief>> {
    let text = if_usable(read_regular(&path.join(MANIFEST)))?;
    Ok(text.and_then(|text| serde_json::from_slice(&text).ok()))
}

/// Whether there is a folder, and not a link to one.
fn is_real_folder(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

/// The run that a folder's mark names.
///
/// # Errors
/// As [`maker`].
pub(crate) fn read_mark(path: &Path) -> std::io::Result<Option<RunId>> {
    let Some(mark) = if_usable(open_regular(&path.join(MARK)))? else { return Ok(None) };
    let mut text = String::new();
    let read = if_usable(mark.take(MARK_BYTES).read_to_string(&mut text))?;
    Ok(read.and_then(|_| RunId::try_from(text.trim_end().to_owned()).ok()))
}

fn write_mark(folder: &Path, run: &RunId) -> Result<(), BrokerError> {
    let path = folder.join(MARK);
    let text = format!("{}\n", run.as_str());
    let write = |mut file: File| file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    // A torn one of ours, or a link, through which the mark would be written elsewhere.
    remove_if_there(&path).map_err(|e| io_error(&path, e))?;
    File::create_new(&path).and_then(write).map_err(|e| io_error(&path, e))
}

/// Whether a folder holds nothing but a mark, or not even that: what a crash leaves of one that was being made.
fn is_just_begun(path: &Path) -> std::io::Result<bool> {
    let is_mark = |entry: std::io::Result<std::fs::DirEntry>| entry.is_ok_and(|entry| entry.file_name() == *MARK);
    if !is_real_folder(path) {
        return Ok(false);
    }
    Ok(if_usable(std::fs::read_dir(path))?.is_some_and(|mut entries| entries.all(is_mark)))
}

/// Whether a folder is one in which the run gathers shards, or was about to.
fn is_begun_by(path: &Path, run: &RunId) -> std::io::Result<bool> {
    Ok(is_of(path, run)? || is_just_begun(path)?)
}

/// A checkpoint of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) step: u64,
    pub(crate) path: PathBuf,
    /// Whether it is certain that this run wrote it, so that it may be deleted. One without an id that lies in a folder
    /// which others use is only known by its job.
    pub(crate) is_certain: bool,
}

/// The whole checkpoints of a run, newest first.
///
/// # Errors
/// [`CheckpointError::Io`] if a folder is there and cannot be listed.
pub(crate) fn checkpoints_of(home: &RunHome) -> Result<Vec<Found>, CheckpointError> {
    let mut found = Vec::new();
    let unnamed_up_to = home.file.as_ref().and_then(|file| file.unnamed_up_to).unwrap_or(u64::MAX);
    for place in home.places() {
        for (step, path) in steps_in(&place)? {
            let owned = home.owns(&place, &path).map_err(|e| io(&path, e))?;
            if let Some(is_certain) = owned.filter(|is_certain| *is_certain || step <= unnamed_up_to) {
                found.push(Found { step, path, is_certain });
            }
        }
    }
    found.sort_by_key(|f| std::cmp::Reverse(f.step));
    Ok(found)
}

/// The ids of the runs that made the checkpoints in a folder.
///
/// # Errors
/// [`CheckpointError::Io`] if it is there and cannot be listed.
pub(crate) fn makers_in(folder: &Path) -> Result<Vec<RunId>, CheckpointError> {
    let mut runs = std::collections::BTreeSet::new();
    for (_, path) in steps_in(folder)? {
        if let Maker::Run(run) = maker(&path).map_err(|e| io(&path, e))? {
            runs.insert(run);
        }
    }
    Ok(runs.into_iter().collect())
}

impl RunHome {
    /// Whether the run made the folder `path`, which lies in `place`; nothing if it did not, else whether that is
    /// certain.
    ///
    /// # Errors
    /// As [`maker`].
    pub(crate) fn owns(&self, place: &Path, path: &Path) -> std::io::Result<Option<bool>> {
        Ok(self.owns_of(maker(path)?, place.starts_with(&self.dir)))
    }

    fn owns_of(&self, maker: Maker, is_inside: bool) -> Option<bool> {
        match maker {
            // Without run.json all in its directory counts as its own.
            Maker::Run(_) if self.file.is_none() && is_inside => Some(true),
            Maker::Run(run) => {
                let file = self.file.as_ref()?;
                (run == file.run || (is_inside && file.copy_of.contains(&run))).then_some(true)
            }
            Maker::Unnamed(_) if is_inside => Some(true),
            Maker::Unnamed(job) => self.spec.as_ref().is_some_and(|spec| is_same_job(spec, &job)).then_some(false),
            Maker::Unknown => None,
        }
    }
}

/// Whether two jobs are one that was changed on resume.
fn is_same_job(a: &JobSpec, b: &JobSpec) -> bool {
    a.name == b.name && a.train.seed == b.train.seed && a.model == b.model && a.data == b.data
}

/// Folders `step-N` in a folder with their steps, whoever made them; none if the folder is not there. A checkpoint that
/// was put aside for one that did not come counts under its own step.
pub(crate) fn steps_in(folder: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let names = match std::fs::read_dir(folder) {
        Ok(entries) => entries.flatten().map(|entry| entry.file_name()),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(e) => return Err(io(folder, e)),
    };
    let mut steps = Vec::new();
    for name in names {
        let Some(name) = name.to_str() else { continue };
        let (whole, is_aside) = name.strip_suffix(ASIDE).map_or((name, false), |whole| (whole, true));
        if is_aside && folder.join(whole).symlink_metadata().is_ok() {
            continue;
        }
        steps.extend(step_of(whole).map(|step| (step, folder.join(name))));
    }
    Ok(steps)
}

/// Makes the folder in which shards are gathered, marked as the run's, if it is not there. The one in which it lies is never
/// made here: if it is gone, something else may come in its place.
///
/// # Errors
/// [`BrokerError::Foreign`] if something else is in the way, or [`BrokerError::Io`].
pub(crate) fn make_partial(path: &Path, run: &RunId) -> Result<(), BrokerError> {
    // All shards of a checkpoint come to this process: one makes the folder, the others find it marked.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    match private_folders(false).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            let fail = |e| io_error(path, e);
            if is_of(path, run).map_err(fail)? {
                return Ok(());
            }
            if !is_just_begun(path).map_err(fail)? {
                return Err(BrokerError::Foreign { path: path.to_owned(), run: run.clone() });
            }
        }
        Err(e) => return Err(io_error(path, e)),
    }
    write_mark(path, run)
}

/// Removes what earlier placements of this run left unfinished, and nothing else.
pub(crate) fn remove_partial(folder: &Path, run: &RunId) -> Removal {
    let mut removal = Removal::default();
    for entry in removal.entries(folder) {
        let (name, path) = (entry.file_name(), entry.path());
        let ours = format!("{PARTIAL}{}-", run.short());
        if !name.to_str().is_some_and(|n| n.starts_with("step-") && n.contains(&ours)) {
            continue;
        }
        let removed = match is_begun_by(&path, run) {
            Ok(true) => {
                removal.remove(&path);
                continue;
            }
            Ok(false) => std::fs::remove_dir(&path),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            removal.failures.push(io_error(&path, error).to_string());
        }
    }
    removal
}

/// Removes the shards of one checkpoint that will not be whole, if the folder is this run's. For its mark there may have
/// been no room.
pub(crate) fn drop_partial(path: &Path, run: &RunId) -> Removal {
    let mut removal = Removal::default();
    match is_begun_by(path, run) {
        Ok(true) => drop(removal.remove(path)),
        Ok(false) => {}
        Err(error) => removal.failures.push(io_error(path, error).to_string()),
    }
    removal
}
