//! Checkpoints: received shard by shard, checked, and shown only once whole; opened again with every byte checked.
//!
//! While shards arrive they lie in `step-N.partial-G` (G the generation, so that a late shard of an aborted
//! placement cannot end up in another one's checkpoint). When all are there and checked, the manifest is written
//! and the folder renamed to `step-N`.

mod find;
mod finish;
mod hash;
mod names;
mod origin;
mod place;
mod remove;
mod tensor_file;
mod tensor_set;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fusionllm_graph::OpDag;
use fusionllm_protocol::Manifest;
use fusionllm_transport::read_regular;

pub(crate) use find::{Meant, Newest, loss_of, meant, newest_of, open_newest};
pub(crate) use finish::{Abandoned, Course, FinishSpec, ShardPlace, abandon, finish, has_exploded, prune, recover};
pub(crate) use hash::ShardHash;
pub(crate) use names::{MANIFEST, shard_name, step_name};
pub(crate) use origin::Origin;
pub(crate) use place::{Found, Maker, checkpoints_of, drop_partial, make_partial, makers_in, remove_partial, steps_in};
pub(crate) use remove::Removal;
pub use tensor_set::TensorSet;

use crate::{BrokerError, CheckpointError};
use finish::check_params;
use place::read_mark;
pub(crate) use tensor_file::TensorFile;
use tensor_file::{Stamp, io};

/// A shard that lies in its partial folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoredShard {
    /// Bytes received.
    pub(crate) bytes: u64,
    /// BLAKE3 of all its bytes, in hexadecimal.
    pub(crate) blake3: String,
    /// A tensor with values that are not finite, if there is one.
    pub(crate) not_finite: Option<String>,
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

/// Opens a checkpoint folder, or the newest checkpoint of a run directory, and checks all of it: the manifest's checksum,
/// sizes, hashes, and every parameter's shape against the graph.
///
/// # Errors
/// [`BrokerError`] that names the file at fault; a damaged checkpoint is not passed over for an older one.
pub fn open_checkpoint(path: &Path) -> Result<Checkpoint, BrokerError> {
    let newest = match meant(path)? {
        Meant::Checkpoint(folder) => return Ok(open_at(&folder, None)?),
        Meant::Run(home) => open_newest(&home, None)?,
        Meant::Folder(found) => newest_of(path, found, None, |_| None)?,
    };
    match newest.passed_over.into_iter().next() {
        Some(error) => {
            let (path, step) = (newest.checkpoint.path, newest.checkpoint.manifest.step);
            Err(CheckpointError::PassedOver { source: Box::new(error), path, step }.into())
        }
        None => Ok(newest.checkpoint),
    }
}

/// Opens a checkpoint folder. With `recorded` its manifest must be the one that had this checksum.
pub(crate) fn open_at(folder: &Path, recorded: Option<&str>) -> Result<Checkpoint, CheckpointError> {
    let manifest_path = folder.join(MANIFEST);
    let bytes = read_regular(&manifest_path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => CheckpointError::NoManifest { path: manifest_path.clone() },
        _ => io(&manifest_path, e),
    })?;
    let damaged = |source| CheckpointError::Manifest { path: manifest_path.clone(), source };
    // What is no text is no manifest either, and one that was changed does not have its checksum.
    let manifest = Manifest::from_json(&String::from_utf8_lossy(&bytes)).map_err(damaged)?;
    if let Some(expected) = recorded.filter(|recorded| **recorded != manifest.checksum) {
        let (expected, got) = (expected.to_owned(), manifest.checksum);
        return Err(CheckpointError::Hash { path: manifest_path, expected, got });
    }
    let mark = read_mark(folder).map_err(|e| io(folder, e))?;
    if let (Some(run), Some(marked)) = (&manifest.run, mark)
        && *run != marked
    {
        let reason = format!("its manifest is of run {run}, its mark of run {marked}");
        return Err(CheckpointError::Misplaced { path: folder.to_owned(), reason });
    }
    let dag = manifest.dag().map_err(damaged)?;
    let mut tensors = TensorSet::default();
    for shard in &manifest.shards {
        let path = folder.join(&shard.file);
        let found = match std::fs::metadata(&path) {
            Ok(found) => found,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(CheckpointError::Missing { path }),
            Err(e) => return Err(io(&path, e)),
        };
        let got = found.len();
        if got != shard.bytes {
            return Err(CheckpointError::Size { path, expected: shard.bytes, got });
        }
        hash::check(&path, shard)?;
        let file = TensorFile::open(&path)?;
        // What was hashed is what is read from here on.
        file.check_stamp(Stamp::of(&found))?;
        check_params(&file, &dag, &shard.params)?;
        tensors.add(file);
    }
    let origin = Origin::read(folder, &manifest.carried, manifest.data.clone())?;
    Ok(Checkpoint { path: folder.to_owned(), manifest, dag, tensors, origin })
}

impl Checkpoint {
    /// The folder with its manifest and shards.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its `manifest.json` says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The model that its tensors are of.
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
        let mut file = std::fs::File::create(out).map_err(|e| io(out, e))?;
        self.tensors.write_part(params, &mut file, out)
    }
}

#[cfg(test)]
mod tests;
