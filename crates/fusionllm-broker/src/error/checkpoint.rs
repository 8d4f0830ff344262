//! What can be wrong with a checkpoint.

use std::path::PathBuf;

use fusionllm_protocol::ProtocolError;
use fusionllm_transport::{io_reason, is_shortage};

/// The checkpoints that could be meant instead.
fn those_there(steps: &[u64]) -> String {
    let names: Vec<String> = steps.iter().map(|step| format!("step-{step}")).collect();
    match names.is_empty() {
        true => "nor of any other step: is a disk not mounted?".to_owned(),
        false => format!("expected one of {}", names.join(", ")),
    }
}

/// Why a checkpoint cannot be used or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The folder holds none.
    #[error(
        "{path} holds no checkpoint, expected a folder with manifest.json or a run directory with checkpoints/step-N"
    )]
    None {
        /// The folder where one was looked for.
        path: PathBuf,
    },
    /// The folder has checkpoints of several runs.
    #[error("{path} has checkpoints of several runs: give one of {newest}", path = path.display())]
    Several {
        /// The folder where one was looked for.
        path: PathBuf,
        /// The newest of each run.
        newest: String,
    },
    /// There is no checkpoint of the step.
    #[error("{path} has no checkpoint of step {step}, {}", those_there(there), path = path.display())]
    Step {
        /// The run directory or folder.
        path: PathBuf,
        /// The step that was asked for.
        step: u64,
        /// Of which steps there are some, newest first.
        there: Vec<u64>,
    },
    /// The newest checkpoint is damaged, an older one is not.
    #[error("{source}; the newest whole one is that of step {step}: {path}", path = path.display())]
    PassedOver {
        /// What is wrong with the newest.
        source: Box<CheckpointError>,
        /// The newest that is whole.
        path: PathBuf,
        /// Updates done in the newest that is whole.
        step: u64,
    },
    /// A file could not be read or written.
    #[error("checkpoint file {path}: {}", io_reason(source), path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The manifest is damaged.
    #[error("{path}: {source}")]
    Manifest {
        /// The manifest's file.
        path: PathBuf,
        /// What is wrong with the manifest.
        source: ProtocolError,
    },
    /// The folder of a checkpoint is there, its manifest is not.
    #[error("{path} is missing: without its manifest the folder is no whole checkpoint, use another one")]
    NoManifest {
        /// The manifest's file.
        path: PathBuf,
    },
    /// The folder is not the checkpoint's own.
    #[error("{path} is no checkpoint's own folder: {reason}; use another one, or give it its own name again", path = path.display())]
    Misplaced {
        /// The folder that has another name or mark than its manifest.
        path: PathBuf,
        /// How its name or its mark differs from its manifest.
        reason: String,
    },
    /// A shard is not there.
    #[error("{path} is missing: put it back, or use another checkpoint or model")]
    Missing {
        /// Where the shard should be.
        path: PathBuf,
    },
    /// A shard has another size than when it was written.
    #[error("shard {path} has {got} bytes, expected {expected}: it is damaged, use another checkpoint")]
    Size {
        /// The shard's file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes of the file.
        got: u64,
    },
    /// The bytes of a shard or manifest are not those that were written.
    #[error("{path} has hash {got}, expected {expected}: it is damaged, use another checkpoint")]
    Hash {
        /// The shard or manifest.
        path: PathBuf,
        /// Hash by the manifest, or for the manifest by the run.
        expected: String,
        /// Hash of the file.
        got: String,
    },
    /// The file is no safetensors file.
    #[error("{path} is not a readable safetensors file: {reason}")]
    Format {
        /// The file that cannot be read.
        path: PathBuf,
        /// The parser's message.
        reason: String,
    },
    /// A file is not the one that was checked.
    #[error("{path} has changed since it was checked: begin again with what is there now", path = path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A tensor is missing or does not fit the graph.
    #[error("{path}: tensor `{name}` {reason}")]
    Tensor {
        /// The file or folder.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// What is wrong and what would be right.
        reason: String,
    },
}

impl CheckpointError {
    /// Whether the process or the machine had run out of something, which says nothing of the checkpoint.
    pub(crate) fn is_shortage(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_shortage(source))
    }
}
