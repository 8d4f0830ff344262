//! The manifest of a checkpoint: which shards belong to it and what they hold.

use fusionllm_graph::OpDag;
use serde::{Deserialize, Serialize};

use crate::{DataFingerprint, JobSpec, ProtocolError};

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

/// A file that lies beside the shards as `carried-NAME`: the tokenizer's, or one of the Hugging Face directory that the
/// model came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedFile {
    /// Its name in a Hugging Face directory.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its hash, see [`crate::content_hash`].
    pub hash: String,
}

impl CarriedFile {
    /// Its name in the checkpoint.
    pub fn file(&self) -> String {
        format!("carried-{}", self.name)
    }
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
    /// What it was trained on; not known of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataFingerprint>,
    /// Files of the model that training does not change.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub carried: Vec<CarriedFile>,
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
        for file in &manifest.carried {
            if file.name.contains(['/', '\\']) {
                return Err(fail(format!("carried file `{}` is not a plain file name", file.name)));
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
