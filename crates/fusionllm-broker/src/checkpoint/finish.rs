//! From shards to a checkpoint, and which ones are kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fusionllm_graph::OpDag;
use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{Generation, JobSpec, Manifest, RunId, ShardEntry};
use fusionllm_transport::{KnownFolder, sync_folder};
use safetensors::tensor::Dtype;

use super::find::loss_of;
use super::names::{ABANDONED, ASIDE, LEFTOVER, MANIFEST, partial_folder, shard_name, step_name, step_of};
use super::place::{Found, checkpoints_of, is_of};
use super::remove::remove;
use super::tensor_file::TensorFile;
use super::{Origin, Removal, StoredShard, tensor_set};
use crate::files::{free_name, io_error, make_folder, write_atomic};
use crate::run_dir::{RunFile, RunHome};
use crate::{BrokerError, CheckpointError};

/// A loss this many times the lowest one, and [`EXPLODED_BY`] above it, is no noise any more.
const EXPLODED_TIMES: f64 = 1.5;
/// In nats per token.
const EXPLODED_BY: f64 = 0.5;

/// Everything that makes shards a checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct FinishSpec {
    /// The placement whose CompNodes sent the shards.
    pub(crate) generation: Generation,
    /// Updates done.
    pub(crate) step: u64,
    /// Training loss of that step.
    pub(crate) loss: Option<f64>,
    /// The job, for the manifest.
    pub(crate) spec: JobSpec,
    /// The model, whose parameters the shards must hold in its shapes.
    pub(crate) dag: Arc<OpDag>,
    /// Where the model came from.
    pub(crate) origin: Origin,
    /// By CompNode: its shard and the names of its parameters.
    pub(crate) shards: Vec<(StoredShard, Vec<String>)>,
}

/// Where a run that is open keeps its checkpoints.
#[derive(Clone, Debug)]
pub(crate) struct ShardPlace {
    /// The run that writes there.
    pub(crate) run: RunId,
    /// The folder in which `step-N` lie.
    pub(crate) folder: PathBuf,
    known: Arc<KnownFolder>,
}

impl ShardPlace {
    /// A folder that is there.
    ///
    /// # Errors
    /// [`BrokerError::Io`] that names it.
    pub(crate) fn new(run: RunId, folder: PathBuf) -> Result<Self, BrokerError> {
        let known = KnownFolder::open(&folder).map_err(|e| io_error(&folder, e))?;
        Ok(Self { run, folder, known: Arc::new(known) })
    }

    /// The folder, as it was when the run was opened.
    pub(crate) fn known(&self) -> &KnownFolder {
        &self.known
    }

    /// Where the shards of a step are gathered.
    pub(crate) fn partial(&self, step: u64, generation: Generation) -> PathBuf {
        partial_folder(&self.folder, &self.run, step, generation)
    }
}

/// A checkpoint in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finished {
    /// Its folder, under its final name.
    pub(crate) path: PathBuf,
    /// Its manifest's checksum.
    pub(crate) checksum: String,
    /// What its user must know, such as that something was in the way.
    pub(crate) notices: Vec<String>,
}

/// Checks the shards, writes the manifest, and shows the checkpoint under its name.
///
/// # Errors
/// [`BrokerError`] that names the file at fault; the shards still lie where they were gathered.
pub(crate) fn finish(spec: &FinishSpec, place: &ShardPlace, run_file: &RunFile) -> Result<Finished, BrokerError> {
    let partial = place.partial(spec.step, spec.generation);
    let mut entries = Vec::new();
    for (node, (shard, params)) in (0..).map(NodeIndex).zip(&spec.shards) {
        let file = TensorFile::open(&partial.join(shard_name(node)))?;
        check_params(&file, &spec.dag, params)?;
        if let Some(name) = &shard.not_finite {
            let (path, name) = (file.path().to_owned(), name.clone());
            let reason = "has values that are not finite: training has diverged".to_owned();
            return Err(CheckpointError::Tensor { path, name, reason }.into());
        }
        entries.push(ShardEntry {
            file: shard_name(node),
            bytes: shard.bytes,
            blake3: shard.blake3.clone(),
            fnv1a: String::new(),
            params: params.clone(),
        });
    }
    let path = partial.join(MANIFEST);
    let graph = serde_json::from_str(&spec.dag.to_json()).map_err(|e| io_error(&path, e.into()))?;
    let mut manifest = Manifest {
        format: Manifest::FORMAT.to_owned(),
        version: Manifest::VERSION,
        run: Some(place.run.clone()),
        run_dir: Some(run_file.dir.clone()),
        step: spec.step,
        loss: spec.loss,
        job: spec.spec.clone(),
        graph,
        data: spec.origin.data.clone(),
        carried: spec.origin.write(&partial)?,
        shards: entries,
        checksum: String::new(),
    };
    write_atomic(&path, manifest.seal()?.as_bytes())?;
    let (folder, notice) = destination(place, run_file, spec.step)?;
    let left = show(&partial, &folder, &place.run).map_err(|e| io_error(&folder, e))?;
    let notices = notice.into_iter().chain(left).collect();
    Ok(Finished { path: folder, checksum: manifest.checksum, notices })
}

/// Where the checkpoint goes: to its name in the run's folder, or if something else has that name, to a folder that is
/// the run's alone.
fn destination(place: &ShardPlace, run_file: &RunFile, step: u64) -> Result<(PathBuf, Option<String>), BrokerError> {
    let is_ours = |path: &Path| match path.symlink_metadata() {
        Ok(_) => is_of(path, &place.run).map_err(|e| io_error(path, e)),
        Err(_) => Ok(true),
    };
    let folder = place.folder.join(step_name(step));
    if is_ours(&folder)? {
        return Ok((folder, None));
    }
    let own = run_file.subfolder(&place.folder);
    make_folder(&own)?;
    let other = own.join(step_name(step));
    if !is_ours(&other)? {
        return Err(BrokerError::Foreign { path: folder, run: place.run.clone() });
    }
    let notice = format!("{} is not this run's and is left alone: see {}", folder.display(), other.display());
    Ok((other, Some(notice)))
}

/// Gives a whole checkpoint its name. At every moment the old one of that name or the new one is whole under a name that
/// readers look at. Gives what its user must know: of files that others put into the old one, and of what has failed since
/// the new one has its name.
fn show(partial: &Path, folder: &Path, run: &RunId) -> std::io::Result<Vec<String>> {
    let mut name = folder.file_name().unwrap_or_default().to_owned();
    name.push(ASIDE);
    let aside = folder.with_file_name(name);
    let parent = folder.parent().unwrap_or(folder);
    let mut left = Vec::new();
    if folder.symlink_metadata().is_ok() {
        if is_of(&aside, run)? {
            left.extend(match remove(&aside) {
                Ok(said) => said,
                // It must not stand in the way of a whole checkpoint.
                Err(error) => {
                    let to = free_name(folder, LEFTOVER);
                    std::fs::rename(&aside, &to)?;
                    let (aside, to) = (aside.display(), to.display());
                    Some(format!("{aside} cannot be removed: {error}: this old checkpoint is {to} now"))
                }
            });
        }
        std::fs::rename(folder, &aside)?;
        sync_folder(parent)?;
    }
    std::fs::rename(partial, folder)?;
    // The checkpoint has its name: whatever fails from here on takes nothing from it.
    if let Err(error) = sync_folder(parent) {
        left.push(format!("{}: {error}: a crash may take the name of {} back", parent.display(), folder.display()));
    }
    let removed = is_of(&aside, run).and_then(|is_ours| if is_ours { remove(&aside) } else { Ok(None) });
    left.extend(
        removed.unwrap_or_else(|error| Some(format!("an old checkpoint was not removed: {}", io_error(&aside, error)))),
    );
    Ok(left)
}

/// Puts right what a crash left between two renames of [`show`].
pub(crate) fn recover(folder: &Path, run: &RunId) -> Removal {
    let mut removal = Removal::default();
    for entry in removal.entries(folder) {
        let (name, aside) = (entry.file_name(), entry.path());
        let Some(whole) = name.to_str().and_then(|n| n.strip_suffix(ASIDE)) else { continue };
        if step_of(whole).is_none() {
            continue;
        }
        let whole = folder.join(whole);
        let put_right = match is_of(&aside, run) {
            Ok(true) if whole.symlink_metadata().is_ok() => {
                removal.remove(&aside);
                Ok(())
            }
            Ok(true) => std::fs::rename(&aside, &whole),
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = put_right {
            removal.failures.push(io_error(&aside, error).to_string());
        }
    }
    removal
}

pub(super) fn check_params(file: &TensorFile, dag: &OpDag, params: &[String]) -> Result<(), CheckpointError> {
    for name in params {
        let shape = dag.find_param(name).map(|p| dag.param(p).shape.clone()).unwrap_or_default();
        file.check(name, &shape, &[Dtype::F32])?;
        for state in tensor_set::optimizer_names(name).filter(|state| file.info(state).is_some()) {
            file.check(&state, &shape, &[Dtype::F32])?;
        }
    }
    Ok(())
}

/// Whether a loss has left the range in which training goes well.
pub(crate) fn has_exploded(loss: f64, lowest: f64) -> bool {
    !loss.is_finite() || (lowest.is_finite() && loss > EXPLODED_TIMES * lowest.max(0.0) + EXPLODED_BY)
}

/// What is known of how training goes, to tell checkpoints that are worth keeping. A run that goes on takes in the steps
/// that it has behind it: what they have shown of older checkpoints still holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Course {
    /// The lowest training loss of the run.
    pub(crate) lowest: f64,
    /// The last step after whose update a loss was seen that has not exploded.
    pub(crate) vouched: u64,
}

impl Default for Course {
    fn default() -> Self {
        Self { lowest: f64::INFINITY, vouched: 0 }
    }
}

impl Course {
    /// A step was done. Its loss is that of the parameters before its update; an evaluation comes after it.
    pub(crate) fn step(&mut self, step: u64, loss: f64, eval_loss: Option<f64>) {
        if !has_exploded(loss, self.lowest) {
            self.vouched = self.vouched.max(step.saturating_sub(1));
        }
        if eval_loss.is_some_and(|loss| !has_exploded(loss, self.lowest)) {
            self.vouched = self.vouched.max(step);
        }
        // Not a number is lower than nothing.
        self.lowest = self.lowest.min(loss);
    }
}

/// Drops all but the newest `keep` checkpoints of a run; 0 keeps all. If none of these is known to be good, the newest
/// that is stays too; if none is at all, that of the lowest loss.
pub(crate) fn prune(home: &RunHome, keep: u32, course: Course) -> Pruned {
    let mut pruned = Pruned::default();
    if keep == 0 {
        return pruned;
    }
    let found = match checkpoints_of(home) {
        Ok(found) => found,
        Err(error) => {
            pruned.removal.failures.push(error.to_string());
            return pruned;
        }
    };
    let loss = |f: &Found| loss_of(&f.path);
    let is_good = |f: &Found| f.step <= course.vouched && loss(f).is_none_or(|loss| !has_exploded(loss, course.lowest));
    let (newest, older) = found.split_at(found.len().min(keep as usize));
    let ours = || older.iter().filter(|f| f.is_certain);
    let spared = if newest.iter().any(is_good) {
        None
    } else {
        // Where the loss has risen slowly, no checkpoint may be known to be good.
        let of_lowest_loss = || {
            let lowest_of_newest = newest.iter().filter_map(loss).fold(f64::INFINITY, f64::min);
            let with_loss = ours().filter_map(|f| Some((f, loss(f)?)));
            let lowest = with_loss.min_by(|a, b| a.1.total_cmp(&b.1));
            lowest.filter(|(_, loss)| *loss < lowest_of_newest).map(|(f, _)| f)
        };
        ours().find(|f| is_good(f)).or_else(of_lowest_loss).map(|f| f.step)
    };
    for old in ours().filter(|f| Some(f.step) != spared) {
        if pruned.removal.remove(&old.path) {
            pruned.dropped.push(old.step);
        }
    }
    pruned
}

/// What [`prune`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pruned {
    /// Steps whose checkpoints are gone.
    pub(crate) dropped: Vec<u64>,
    pub(crate) removal: Removal,
}

/// What [`abandon`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Abandoned {
    /// Steps with the new paths, newest first.
    pub(crate) aside: Vec<(u64, PathBuf)>,
    /// Those that may be another run's, and were left.
    pub(crate) unsure: Vec<PathBuf>,
}

/// Renames the checkpoints after `step`: the run goes on from there, and they are not its future any more.
///
/// # Errors
/// [`BrokerError`] if one stays under its name: it would be taken for the newest later.
pub(crate) fn abandon(home: &RunHome, step: u64) -> Result<Abandoned, BrokerError> {
    let mut abandoned = Abandoned::default();
    for found in checkpoints_of(home)?.into_iter().filter(|f| f.step > step) {
        if !found.is_certain {
            abandoned.unsure.push(found.path);
            continue;
        }
        let to = free_name(&found.path, ABANDONED);
        std::fs::rename(&found.path, &to).map_err(|e| io_error(&found.path, e))?;
        abandoned.aside.push((found.step, to));
    }
    Ok(abandoned)
}
