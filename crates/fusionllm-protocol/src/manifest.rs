//! The manifest of a checkpoint: which shards belong to it and what they hold.

use fusionllm_graph::OpDag;
use serde::{Deserialize, Serialize};

use crate::{JobSpec, ProtocolError};

/// One shard of a checkpoint: a safetensors file with the parameters that one CompNode held, under their
/// Hugging Face names, and its optimizer state under `optimizer.KIND.NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// File name beside the manifest.
    pub file: String,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// 64-bit FNV-1a hash of the file, in hexadecimal: it finds damage, not forgery.
    pub fnv1a: String,
    /// Names of the parameters in it.
    pub params: Vec<String>,
}

/// `manifest.json`: the last file of a checkpoint to be written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `fusionllm-checkpoint`.
    pub format: String,
    /// Version of this form.
    pub version: u32,
    /// Updates done when it was made.
    pub step: u64,
    /// Training loss of the last step, if it is known.
    pub loss: Option<f64>,
    /// The job, with every default filled in.
    pub job: JobSpec,
    /// The OP-DAG in its JSON form.
    pub graph: serde_json::Value,
    /// The shards.
    pub shards: Vec<ShardEntry>,
}

impl Manifest {
    /// The value of `format`.
    pub const FORMAT: &'static str = "fusionllm-checkpoint";
    /// The value of `version`.
    pub const VERSION: u32 = 1;

    /// Reads a manifest and holds it against its format.
    ///
    /// # Errors
    /// [`ProtocolError::Manifest`] that says what is wrong.
    pub fn from_json(text: &str) -> Result<Self, ProtocolError> {
        let fail = |reason: String| ProtocolError::Manifest { reason };
        let manifest: Self = serde_json::from_str(text).map_err(|e| fail(format!("not readable: {e}")))?;
        if manifest.format != Self::FORMAT {
            return Err(fail(format!("format is `{}`, expected `{}`", manifest.format, Self::FORMAT)));
        }
        if manifest.version != Self::VERSION {
            let (got, known) = (manifest.version, Self::VERSION);
            return Err(fail(format!("version is {got}, this build reads version {known}")));
        }
        for shard in &manifest.shards {
            if shard.file.is_empty() || shard.file.contains(['/', '\\']) || shard.file.starts_with('.') {
                return Err(fail(format!("shard `{}` is not a plain file name", shard.file)));
            }
        }
        let dag = manifest.dag()?;
        for param in dag.params() {
            if !manifest.shards.iter().any(|s| s.params.contains(&param.name)) {
                return Err(fail(format!("no shard holds parameter `{}`", param.name)));
            }
        }
        Ok(manifest)
    }

    /// The OP-DAG.
    ///
    /// # Errors
    /// [`ProtocolError::Manifest`] with the graph's own error.
    pub fn dag(&self) -> Result<OpDag, ProtocolError> {
        let fail = |reason: String| ProtocolError::Manifest { reason };
        let text = serde_json::to_string(&self.graph).map_err(|e| fail(e.to_string()))?;
        OpDag::from_json(&text).map_err(|e| fail(format!("graph: {e}")))
    }

    /// The manifest as pretty JSON.
    ///
    /// # Errors
    /// [`ProtocolError::Encode`] if a number in it is not finite.
    pub fn to_json(&self) -> Result<String, ProtocolError> {
        serde_json::to_string_pretty(self).map_err(|e| ProtocolError::Encode { reason: e.to_string() })
    }
}
