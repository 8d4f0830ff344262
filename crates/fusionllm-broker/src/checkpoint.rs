//! Checkpoints: received shard by shard, checked, and shown only once whole; opened again with every byte checked.
//!
//! While shards arrive they lie in `step-N.partial-G` (G the generation, so that a late shard of an aborted
//! placement cannot end up in another one's checkpoint). When all are there and checked, the manifest is written
//! and the folder renamed to `step-N`.

mod origin;
mod tensor_file;
mod tensor_set;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fusionllm_graph::OpDag;
use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{Generation, JobSpec, Manifest, ShardEntry};
use safetensors::tensor::Dtype;

pub(crate) use origin::{Origin, TOKENIZER};
pub(crate) use tensor_file::Fnv1a;
pub use tensor_set::TensorSet;

use crate::run_dir::{io_error, sync_folder, write_atomic};
use crate::{BrokerError, CheckpointError};
use tensor_file::{TensorFile, io};

const MANIFEST: &str = "manifest.json";

/// A shard that lies in its partial folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredShard {
    /// Bytes received.
    pub(crate) bytes: u64,
    /// Their hash.
    pub(crate) fnv1a: String,
}

/// Everything that makes shards a checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct FinishSpec {
    /// Folder of the run's checkpoints.
    pub(crate) folder: PathBuf,
    /// The placement.
    pub(crate) generation: Generation,
    /// Updates done.
    pub(crate) step: u64,
    /// Training loss of that step.
    pub(crate) loss: Option<f64>,
    /// The job.
    pub(crate) spec: JobSpec,
    /// The model.
    pub(crate) dag: std::sync::Arc<OpDag>,
    /// Where the model came from.
    pub(crate) origin: Origin,
    /// By CompNode: its shard and the names of its parameters.
    pub(crate) shards: Vec<(StoredShard, Vec<String>)>,
}

/// Where the shards of a step are gathered.
pub(crate) fn partial_folder(folder: &Path, step: u64, generation: Generation) -> PathBuf {
    folder.join(format!("step-{step}.partial-{}", generation.0))
}

/// File name of a CompNode's shard.
pub(crate) fn shard_name(node: NodeIndex) -> String {
    format!("shard-{}.safetensors", node.0)
}

/// Checks the shards, writes the manifest, shows the checkpoint under its name, and drops the oldest ones.
/// Returns the checkpoint's folder.
pub(crate) fn finish(spec: &FinishSpec) -> Result<PathBuf, BrokerError> {
    let partial = partial_folder(&spec.folder, spec.step, spec.generation);
    let mut entries = Vec::new();
    for (node, (shard, params)) in (0..).map(NodeIndex).zip(&spec.shards) {
        let file = TensorFile::open(&partial.join(shard_name(node)))?;
        check_params(&file, &spec.dag, params)?;
        let (bytes, fnv1a) = (shard.bytes, shard.fnv1a.clone());
        entries.push(ShardEntry { file: shard_name(node), bytes, fnv1a, params: params.clone() });
    }
    let path = partial.join(MANIFEST);
    let graph = serde_json::from_str(&spec.dag.to_json()).map_err(|e| io_error(&path, e.into()))?;
    let manifest = Manifest {
        format: Manifest::FORMAT.to_owned(),
        version: Manifest::VERSION,
        step: spec.step,
        loss: spec.loss,
        job: spec.spec.clone(),
        graph,
        data: spec.origin.data.clone(),
        carried: spec.origin.write(&partial)?,
        shards: entries,
    };
    write_atomic(&path, manifest.to_json()?.as_bytes())?;
    let folder = spec.folder.join(format!("step-{}", spec.step));
    let place = || -> std::io::Result<()> {
        // A run that was resumed from an earlier step makes this one again.
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::rename(&partial, &folder)?;
        sync_folder(&spec.folder)
    };
    place().map_err(|e| io_error(&folder, e))?;
    prune(&spec.folder, spec.step, spec.spec.checkpoint.keep)?;
    Ok(folder)
}

fn check_params(file: &TensorFile, dag: &OpDag, params: &[String]) -> Result<(), CheckpointError> {
    for name in params {
        let shape = dag.find_param(name).map(|p| dag.param(p).shape.clone()).unwrap_or_default();
        file.check(name, &shape, &[Dtype::F32])?;
        for state in tensor_set::optimizer_names(name).filter(|state| file.info(state).is_some()) {
            file.check(&state, &shape, &[Dtype::F32])?;
        }
    }
    Ok(())
}

/// Steps of the checkpoints in a folder, ascending.
fn steps_in(folder: &Path) -> Vec<u64> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let step = |entry: std::fs::DirEntry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok();
    let mut steps: Vec<u64> = entries.filter_map(step).collect();
    steps.sort_unstable();
    steps
}

/// Drops all but the newest `keep` checkpoints up to `step`; 0 keeps all.
fn prune(folder: &Path, step: u64, keep: u32) -> Result<(), BrokerError> {
    let steps: Vec<u64> = steps_in(folder).into_iter().filter(|&s| s <= step).collect();
    let surplus = if keep == 0 { 0 } else { steps.len().saturating_sub(keep as usize) };
    for step in steps.iter().take(surplus) {
        let path = folder.join(format!("step-{step}"));
        std::fs::remove_dir_all(&path).map_err(|e| io_error(&path, e))?;
    }
    Ok(())
}

/// Drops what earlier generations left unfinished.
pub(crate) fn remove_partial(folder: &Path) -> Result<(), BrokerError> {
    for entry in std::fs::read_dir(folder).map_err(|e| io_error(folder, e))?.flatten() {
        let name = entry.file_name();
        if name.to_str().is_some_and(|n| n.starts_with("step-") && n.contains(".partial-")) {
            std::fs::remove_dir_all(entry.path()).map_err(|e| io_error(&entry.path(), e))?;
        }
    }
    Ok(())
}

/// A whole checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    dag: OpDag,
    tensors: TensorSet,
    origin: Origin,
}

/// Opens a checkpoint folder, or the newest checkpoint of a run directory, and checks all of it: sizes, hashes,
/// and every parameter's shape against the graph.
///
/// # Errors
/// [`CheckpointError`] that names the file at fault.
pub fn open_checkpoint(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let folder = find(path)?;
    let manifest_path = folder.join(MANIFEST);
    let text = std::fs::read_to_string(&manifest_path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => CheckpointError::NoManifest { path: manifest_path.clone() },
        _ => io(&manifest_path, e),
    })?;
    let damaged = |source| CheckpointError::Manifest { path: manifest_path.clone(), source };
    let manifest = Manifest::from_json(&text).map_err(damaged)?;
    let dag = manifest.dag().map_err(damaged)?;
    let mut tensors = TensorSet::default();
    for shard in &manifest.shards {
        let path = folder.join(&shard.file);
        let got = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(CheckpointError::Missing { path }),
            Err(e) => return Err(io(&path, e)),
        };
        if got != shard.bytes {
            return Err(CheckpointError::Size { path, expected: shard.bytes, got });
        }
        let got = Fnv1a::of_file(&path)?;
        if got != shard.fnv1a {
            return Err(CheckpointError::Hash { path, expected: shard.fnv1a.clone(), got });
        }
        let file = TensorFile::open(&path)?;
        check_params(&file, &dag, &shard.params)?;
        tensors.add(file);
    }
    let origin = Origin::read(&folder, &manifest.carried, manifest.data.clone())?;
    Ok(Checkpoint { path: folder, manifest, dag, tensors, origin })
}

/// The checkpoint folder that a path means.
fn find(path: &Path) -> Result<PathBuf, CheckpointError> {
    if path.join(MANIFEST).is_file() {
        return Ok(path.to_owned());
    }
    let is_step = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("step-"));
    if is_step && path.is_dir() {
        return Err(CheckpointError::NoManifest { path: path.join(MANIFEST) });
    }
    // A run may keep its checkpoints elsewhere; its job.json says where.
    let elsewhere = std::fs::read(path.join("job.json"))
        .ok()
        .and_then(|text| serde_json::from_slice::<JobSpec>(&text).ok())
        .and_then(|spec| spec.checkpoint.to);
    let folders = [Some(path.join("checkpoints")), elsewhere, Some(path.to_owned())];
    let newest = |folder: PathBuf| steps_in(&folder).last().map(|step| folder.join(format!("step-{step}")));
    folders.into_iter().flatten().find_map(newest).ok_or_else(|| CheckpointError::None { path: path.to_owned() })
}

impl Checkpoint {
    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The model.
    pub fn dag(&self) -> &OpDag {
        &self.dag
    }

    /// All its tensors: parameters under their names, optimizer state under `optimizer.KIND.NAME`.
    pub fn tensors(&self) -> &TensorSet {
        &self.tensors
    }

    /// Files of the model that training did not change, by their names in a Hugging Face directory.
    pub fn carried(&self) -> &BTreeMap<String, String> {
        &self.origin.carried
    }

    /// Where the model came from.
    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// All its tensors, without the rest.
    pub(crate) fn into_tensors(self) -> TensorSet {
        self.tensors
    }

    /// Shape and little-endian f32 bytes of a parameter or of an `optimizer.KIND.NAME` entry.
    ///
    /// # Errors
    /// [`CheckpointError`] if it is not there or cannot be read.
    pub fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<u8>), CheckpointError> {
        self.tensors.tensor(name)
    }

    /// Writes `params` and their optimizer state as one safetensors file; returns its size in bytes.
    ///
    /// # Errors
    /// [`CheckpointError`] if a parameter is missing or the file cannot be written.
    pub fn weights_blob(&self, params: &[String], out: &Path) -> Result<u64, CheckpointError> {
        self.tensors.write_part(params, out)
    }
}

#[cfg(test)]
mod tests;
