//! `run.json`: which run a directory is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fusionllm_protocol::{JobSpec, RunId};
use serde::{Deserialize, Serialize};

use super::{RunDir, io_error};
use crate::BrokerError;

/// Where a run went on from that began with another run's checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Parent {
    /// The other run; those of version 0.1.0 have no id.
    #[serde(default)]
    pub(crate) run: Option<RunId>,
    /// The checkpoint's folder.
    pub(crate) path: PathBuf,
    /// Its step.
    pub(crate) step: u64,
}

/// `run.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunFile {
    /// The run.
    pub(crate) run: RunId,
    /// The job's name when the run began; its folder for checkpoints elsewhere is called after it.
    pub(crate) name: String,
    /// This directory, where it lay when the file was written.
    pub(crate) dir: PathBuf,
    /// Runs of whose directory this one is a copy: their checkpoints that lie in here are its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) copy_of: Vec<RunId>,
    /// What it began with, if it is another run's checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<Parent>,
    /// Where its checkpoints lie if not in `checkpoints`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) checkpoints: Option<PathBuf>,
    /// Of each checkpoint, by its step, the manifest's checksum.
    #[serde(default)]
    pub(crate) manifests: BTreeMap<u64, String>,
}

impl RunFile {
    /// Name of the file.
    pub(crate) const FILE: &'static str = "run.json";

    /// Reads that of a directory; nothing if it is not there.
    ///
    /// # Errors
    /// [`BrokerError::Io`] that names the file.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, BrokerError> {
        RunDir::new(dir).read_json(&dir.join(Self::FILE))
    }

    /// Writes it to its directory.
    pub(crate) fn write(&self) -> Result<(), BrokerError> {
        RunDir::new(&self.dir).write_json(&self.dir.join(Self::FILE), self)
    }

    /// The folder of its own in a folder that others use too.
    pub(crate) fn subfolder(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}-{}", self.name, self.run.short()))
    }
}

/// A run directory as it is found.
#[derive(Clone, Debug)]
pub(crate) struct RunHome {
    pub(crate) dir: PathBuf,
    /// Directories of version 0.1.0 have none.
    pub(crate) file: Option<RunFile>,
    /// The job as it last ran.
    pub(crate) spec: Option<JobSpec>,
}

impl RunHome {
    /// Reads a run directory; nothing if `dir` is none.
    ///
    /// # Errors
    /// [`BrokerError::Io`] that names the file.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, BrokerError> {
        let dir = std::path::absolute(dir).map_err(|e| io_error(dir, e))?;
        let file = RunFile::read(&dir)?;
        let run_dir = RunDir::new(&dir);
        // Only what an earlier version left depends on it.
        let spec: Option<JobSpec> = run_dir.read_json(&run_dir.job()).ok().flatten();
        Ok((file.is_some() || spec.is_some()).then_some(Self { dir, file, spec }))
    }

    /// Whether the directory was copied: the run goes on elsewhere, too.
    pub(crate) fn is_copy(&self) -> bool {
        let Some(file) = self.file.as_ref().filter(|file| file.dir != self.dir) else { return false };
        let same = |a: &Path, b: &Path| std::fs::canonicalize(a).ok() == std::fs::canonicalize(b).ok();
        let there = RunFile::read(&file.dir).ok().flatten();
        there.is_some_and(|other| other.run == file.run) && !same(&file.dir, &self.dir)
    }

    /// Folders where its checkpoints may lie.
    pub(crate) fn places(&self) -> Vec<PathBuf> {
        let recorded = self.file.as_ref().and_then(|file| file.checkpoints.clone());
        let asked = self.spec.as_ref().and_then(|spec| spec.checkpoint.to.clone());
        let mut places = Vec::new();
        for folder in [Some(self.dir.join("checkpoints")), recorded, asked].into_iter().flatten() {
            let own = self.file.as_ref().map(|file| file.subfolder(&folder));
            places.push(folder);
            places.extend(own);
        }
        let mut seen = std::collections::BTreeSet::new();
        places.retain(|place| seen.insert(place.clone()));
        places
    }
}
