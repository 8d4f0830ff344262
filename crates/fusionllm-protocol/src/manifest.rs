//! The manifest of a checkpoint: which shards belong to it and what they hold.

use std::path::PathBuf;

use fusionllm_graph::{OpDag, read_json};
use serde::{Deserialize, Serialize};

use crate::{DataFingerprint, JobSpec, ProtocolError, RunId};

/// One shard of a checkpoint: a safetensors file with the parameters that one CompNode held, under their
/// Hugging Face names, and its optimizer state under `optimizer.KIND.NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// File name beside the manifest.
    pub file: String,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// BLAKE3 hash of the file, in hexadecimal.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub blake3: String,
    /// What version 1 has instead: the 64-bit FNV-1a hash, in hexadecimal.
    #[serde(default, skip_serializing_if = "String::is_empty")]
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
    /// Its size in bytes.
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
    /// The run that made it; version 1 does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunId>,
    /// The run's directory when it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_dir: Option<PathBuf>,
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
    /// The files with the tensors, one of each CompNode, in the placement's order.
    pub shards: Vec<ShardEntry>,
    /// BLAKE3 hash of the whole file with zeros in this place, in hexadecimal; empty in version 1. The last key.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub checksum: String,
}

/// What stands before the checksum.
const CHECKSUM_KEY: &str = "\"checksum\": \"";
/// Digits of a checksum.
const DIGITS: usize = 64;

/// What every version begins with.
#[derive(Deserialize)]
struct Header {
    format: String,
    version: u32,
}

impl Header {
    fn check(&self) -> Result<(), ProtocolError> {
        let fail = |reason: String| Err(ProtocolError::Manifest { reason });
        if self.format != Manifest::FORMAT {
            return fail(format!("format is `{}`, expected `{}`", self.format, Manifest::FORMAT));
        }
        let (got, known) = (self.version, Manifest::VERSION);
        match got {
            0 => fail(format!("version is 0, this build reads versions 1 to {known}")),
            _ if got > known => {
                fail(format!("version is {got}, this build reads versions 1 to {known}: use a newer release"))
            }
            _ => Ok(()),
        }
    }
}

impl Manifest {
    /// The value of `format`.
    pub const FORMAT: &'static str = "fusionllm-checkpoint";
    /// The value of `version`; version 1 can be read too.
    pub const VERSION: u32 = 2;

    /// Reads a manifest and holds it against its checksum and its format.
    ///
    /// # Errors
    /// [`ProtocolError::Manifest`] that says what is wrong.
    pub fn from_json(text: &str) -> Result<Self, ProtocolError> {
        let fail = |reason: String| ProtocolError::Manifest { reason };
        // Another version may have another checksum.
        if let Ok(header) = serde_json::from_str::<Header>(text) {
            header.check()?;
        }
        if let Some((given, hash)) = checksums(text)
            && given != hash
        {
            return Err(fail(format!("its checksum is {hash}, expected {given}: it was damaged or changed")));
        }
        let manifest: Self = read_json(text.as_bytes()).map_err(|e| fail(format!("not readable: {e}")))?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), ProtocolError> {
        let fail = |reason: String| ProtocolError::Manifest { reason };
        if self.version > 1 && self.checksum.len() != DIGITS {
            return Err(fail("it has no checksum: it was damaged or changed".to_owned()));
        }
        for shard in &self.shards {
            if shard.file.is_empty() || shard.file.contains(['/', '\\']) || shard.file.starts_with('.') {
                return Err(fail(format!("shard `{}` is not a plain file name", shard.file)));
            }
            if shard.blake3.is_empty() && shard.fnv1a.is_empty() {
                return Err(fail(format!("shard `{}` has no hash", shard.file)));
            }
        }
        for file in &self.carried {
            if file.name.contains(['/', '\\']) {
                return Err(fail(format!("carried file `{}` is not a plain file name", file.name)));
            }
        }
        let dag = self.dag()?;
        for param in dag.params() {
            if !self.shards.iter().any(|s| s.params.contains(&param.name)) {
                return Err(fail(format!("no shard holds parameter `{}`", param.name)));
            }
        }
        Ok(())
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

    /// The manifest as pretty JSON with its checksum, which is set.
    ///
    /// # Errors
    /// [`ProtocolError::Encode`] if a number in it is not finite.
    pub fn seal(&mut self) -> Result<String, ProtocolError> {
        self.checksum = "0".repeat(DIGITS);
        let text = serde_json::to_string_pretty(self).map_err(|e| ProtocolError::Encode { reason: e.to_string() })?;
        let Some((zeros, hash)) = checksums(&text) else {
            return Err(ProtocolError::Encode { reason: "the manifest has no checksum".to_owned() });
        };
        let at = text.rfind(zeros).unwrap_or_default();
        self.checksum = hash;
        Ok([&text[..at], &self.checksum, &text[at + DIGITS..]].concat())
    }
}

/// The checksum that a manifest states, and the one that it has. `None` if it states none.
fn checksums(text: &str) -> Option<(&str, String)> {
    let start = text.rfind(CHECKSUM_KEY)? + CHECKSUM_KEY.len();
    let (given, rest) = (text.get(start..start + DIGITS)?, text.get(start + DIGITS..)?);
    let mut hasher = blake3::Hasher::new();
    hasher.update(text.get(..start)?.as_bytes()).update(&[b'0'; DIGITS]).update(rest.as_bytes());
    Some((given, hasher.finalize().to_hex().to_string()))
}
