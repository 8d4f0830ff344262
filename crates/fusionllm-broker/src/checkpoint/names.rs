//! Names of the files and folders of checkpoints.

use std::path::{Path, PathBuf};

use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{Generation, RunId};

/// What makes a folder a checkpoint.
pub(crate) const MANIFEST: &str = "manifest.json";

/// The mark of a folder: the id of the run that made it, there from the folder's first moment.
pub(crate) const MARK: &str = "run.id";

/// File name of a CompNode's shard.
pub(crate) fn shard_name(node: NodeIndex) -> String {
    format!("shard-{}.safetensors", node.0)
}

/// The step in a folder's name, which must be as we write it.
pub(crate) fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_name(step) == name).then_some(step)
}

/// Name of a checkpoint's folder.
pub(crate) fn step_name(step: u64) -> String {
    format!("step-{step}")
}

/// What the name of a checkpoint ends with while another takes its place.
pub(crate) const ASIDE: &str = ".replaced";

/// What marks a checkpoint that a run has turned its back on by resuming from an earlier one.
pub(crate) const ABANDONED: &str = ".abandoned";

/// What marks a folder that is no checkpoint any more, and has files in it that the run did not write.
pub(crate) const LEFTOVER: &str = ".leftover";

/// What the name of a folder has in which the shards of a step are gathered.
pub(crate) const PARTIAL: &str = ".partial-";

/// What marks such a folder that is being removed: no shard comes to this name.
pub(crate) const REMOVED: &str = ".removed";

/// Where the shards of a step are gathered. The name says which run makes it.
pub(crate) fn partial_folder(folder: &Path, run: &RunId, step: u64, generation: Generation) -> PathBuf {
    folder.join(format!("step-{step}{PARTIAL}{}-{}", run.short(), generation.0))
}
