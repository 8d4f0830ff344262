//! `run.json`: which run a directory is.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use fusionllm_graph::read_json;
use fusionllm_protocol::{JobSpec, RunId, content_hash};
use fusionllm_transport::{io_reason, is_same_file, read_regular};
use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use super::{CHECKPOINTS, RunDir, WholeFiles, to_json};
use crate::BrokerError;
use crate::files::io_error;

/// Where a run went on from that began with another run's checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Parent {
    /// The other run; those of version 0.1.0 have no id.
    #[serde(default)]
    pub(crate) run: Option<RunId>,
    /// Folder of the checkpoint.
    pub(crate) path: PathBuf,
    /// Updates done in the checkpoint.
    pub(crate) step: u64,
}

/// `run.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunFile {
    /// The run's id.
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
    /// The run went on from this step, and checkpoints of later ones without an id that lie where others put theirs, too,
    /// are not its future.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unnamed_up_to: Option<u64>,
    /// Of each checkpoint, by its step, the manifest's checksum.
    #[serde(default)]
    pub(crate) manifests: BTreeMap<u64, String>,
}

/// So many times something else may come in the place of a run's folder for checkpoints.
pub(crate) const SPARE_FOLDERS: u32 = 9;

/// Name of a folder for checkpoints that is used where something else has come in the place of the one before.
pub(crate) fn spare_name(run: &RunId, number: u32) -> String {
    let counted = if number == 1 { String::new() } else { format!("-{number}") };
    format!("{CHECKPOINTS}-{}{counted}", run.short())
}

impl RunFile {
    /// Name of the file.
    pub(crate) const FILE: &'static str = "run.json";

    /// Reads that of a directory; nothing if it is not there.
    ///
    /// # Errors
    /// [`BrokerError::DamagedRun`] if it is not as it was written, [`BrokerError::Io`] if it cannot be read.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, BrokerError> {
        let path = dir.join(Self::FILE);
        match read_regular(&path) {
            Ok(text) => {
                let damaged = |reason| BrokerError::DamagedRun { path: path.clone(), reason };
                let file = read_json(&text).map_err(damaged)?;
                if !is_whole(read_json(&text).map_err(damaged)?) {
                    let reason = "its content does not fit its hash: a bit flipped, or somebody changed it";
                    return Err(damaged(reason.to_owned()));
                }
                Ok(Some(file))
            }
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            // What is no file was put there by somebody.
            Err(e) if path.symlink_metadata().is_ok() && !path.is_file() => {
                Err(BrokerError::DamagedRun { path, reason: io_reason(&e).to_string() })
            }
            Err(e) => Err(io_error(&path, e)),
        }
    }

    /// After which step the run in a directory began; nothing if its file cannot be read.
    pub(crate) fn first_step(dir: &Path) -> Option<u64> {
        let file = Self::read(dir).ok()?;
        Some(file.and_then(|file| file.from).map_or(0, |from| from.step))
    }

    /// Writes it to its directory, among the other `files` of that. Gives what the run's user must know.
    pub(crate) fn write(&self, files: &mut WholeFiles) -> Result<Option<String>, BrokerError> {
        let path = self.dir.join(Self::FILE);
        let mut file = serde_json::to_value(self).map_err(|e| io_error(&path, e.into()))?;
        let hash = hash_of(&file);
        if let Value::Object(keys) = &mut file {
            keys.insert(HASH.to_owned(), hash.into());
        }
        files.write(&path, to_json(&path, &file)?)
    }

    /// The folder of its own in a folder that others use too.
    pub(crate) fn subfolder(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}-{}", self.name, self.run.short()))
    }
}

/// Key of the content hash of all other keys.
const HASH: &str = "hash";

fn hash_of(file: &Value) -> String {
    content_hash(file.to_string().as_bytes())
}

/// Whether a file is what was written; those of builds before this key was are taken as they are.
fn is_whole(mut file: Value) -> bool {
    let told = file.as_object_mut().and_then(|keys| keys.remove(HASH));
    told.is_none_or(|told| told.as_str() == Some(&hash_of(&file)))
}

fn is_nearly(a: &Number, b: &Number) -> bool {
    a.as_f64().zip(b.as_f64()).is_some_and(|(a, b)| (a - b).abs() <= 1e-12 * a.abs())
}

/// Keys that are named in a sentence.
const NAMED: usize = 3;

/// Collects the keys, such as `train.lr`, in which two JSON documents differ.
fn differing(a: &Value, b: &Value, key: &str, into: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for name in names {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                let none = Value::Null;
                differing(a.get(name).unwrap_or(&none), b.get(name).unwrap_or(&none), &key, into);
            }
        }
        _ if a == b => {}
        // A fraction that was written and read may have lost its last bit; a whole number has not.
        (Value::Number(a), Value::Number(b)) if (a.is_f64() || b.is_f64()) && is_nearly(a, b) => {}
        _ => into.push(key.to_owned()),
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
        // Only what an earlier version left depends on it; what is wrong with it, `job_notice` says.
        let spec: Option<JobSpec> = match run_dir.read_json(&run_dir.job()) {
            Err(error) if error.is_shortage() => return Err(error),
            read => read.ok().flatten(),
        };
        Ok((file.is_some() || spec.is_some()).then_some(Self { dir, file, spec }))
    }

    /// Whether the directory was copied: the run goes on elsewhere, too.
    ///
    /// # Errors
    /// [`BrokerError::Io`] if that cannot be told now, as with too many open files.
    pub(crate) fn is_copy(&self) -> Result<bool, BrokerError> {
        let Some(file) = self.file.as_ref().filter(|file| file.dir != self.dir) else { return Ok(false) };
        let there = match RunFile::read(&file.dir) {
            Err(error) if error.is_shortage() => return Err(error),
            read => read.ok().flatten(),
        };
        Ok(there.is_some_and(|other| other.run == file.run) && !is_same_file(&file.dir, &self.dir))
    }

    /// What its user must know of `job.json`, which is written for people: that `counts`, the job that `whose` names, is
    /// another one, or that it cannot be read.
    pub(crate) fn job_notice(&self, counts: &JobSpec, whose: &str) -> Option<String> {
        let run_dir = RunDir::new(&self.dir);
        let path = run_dir.job();
        let written: JobSpec = match run_dir.read_json(&path) {
            Ok(written) => written?,
            Err(error) => return Some(format!("{error}: passed over, the job {whose} counts")),
        };
        let keys = serde_json::to_value(&written).ok().zip(serde_json::to_value(counts).ok());
        let mut differ = Vec::new();
        keys.iter().for_each(|(a, b)| differing(a, b, "", &mut differ));
        if differ.is_empty() {
            return None;
        }
        let named = differ.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
        let more = if differ.len() > NAMED { format!(" and {} more", differ.len() - NAMED) } else { String::new() };
        Some(format!(
            "{} has another {named}{more} than the job {whose}, which counts: --set changes keys, editing the file does not",
            path.display()
        ))
    }

    /// Folders in the directory where its checkpoints lie since something else came in the place of `checkpoints`.
    pub(crate) fn spare_folders(&self) -> Vec<PathBuf> {
        let runs = self.file.iter().flat_map(|file| std::iter::once(&file.run).chain(&file.copy_of));
        let names = runs.flat_map(|run| (1..=SPARE_FOLDERS).map(|n| self.dir.join(spare_name(run, n))));
        names.filter(|folder| folder.is_dir()).collect()
    }

    /// Folders where its checkpoints may lie.
    pub(crate) fn places(&self) -> Vec<PathBuf> {
        let recorded = self.file.as_ref().and_then(|file| file.checkpoints.clone());
        let asked = self.spec.as_ref().and_then(|spec| spec.checkpoint.to.clone());
        let mut places = Vec::new();
        let inside = std::iter::once(self.dir.join(CHECKPOINTS)).chain(self.spare_folders());
        for folder in inside.chain(recorded).chain(asked) {
            let own = self.file.as_ref().map(|file| file.subfolder(&folder));
            places.push(folder);
            places.extend(own);
        }
        let mut seen = std::collections::BTreeSet::new();
        places.retain(|place| seen.insert(place.clone()));
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn whole_numbers_are_compared_to_the_last_digit_and_others_almost() {
        let a = serde_json::json!({ "train": { "seed": 12_345_678_901_234_u64, "lr": 0.1, "clip": 1 } });
        let b = serde_json::json!({ "train": { "seed": 12_345_678_901_235_u64, "lr": 0.100_000_000_000_000_02, "clip": 1.0 } });
        let mut keys = Vec::new();
        differing(&a, &b, "", &mut keys);
        assert_eq!(keys, ["train.seed"]);
    }

    #[test]
    fn no_flipped_bit_of_a_run_file_is_taken_for_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = testing::run_file(folder.path());
        file.manifests = [(4, "0af3".to_owned()), (8, "11".to_owned())].into();
        file.write(&mut WholeFiles::default()).unwrap();
        let path = folder.path().join(RunFile::FILE);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(RunFile::read(folder.path()).unwrap(), Some(file.clone()));
        for at in 0..bytes.len() * 8 {
            let mut other = bytes.clone();
            other[at / 8] ^= 1 << (at % 8);
            std::fs::write(&path, &other).unwrap();
            match RunFile::read(folder.path()) {
                Err(BrokerError::DamagedRun { .. }) => {}
                // Of the key of the hash, which leaves a file of an older form; and of blanks.
                found => assert_eq!(found.unwrap(), Some(file.clone()), "bit {at}"),
            }
        }
        // Those of builds that wrote no hash are read as before.
        std::fs::write(&path, serde_json::to_vec(&file).unwrap()).unwrap();
        assert_eq!(RunFile::read(folder.path()).unwrap(), Some(file));
    }

    #[test]
    fn a_damaged_run_file_does_not_say_where_the_run_began() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(RunFile::first_step(folder.path()), Some(0), "version 0.1.0 left none");
        let parent = Parent { run: None, path: PathBuf::from("/x/step-4"), step: 4 };
        RunFile { from: Some(parent), ..testing::run_file(folder.path()) }.write(&mut WholeFiles::default()).unwrap();
        assert_eq!(RunFile::first_step(folder.path()), Some(4));
        std::fs::write(folder.path().join(RunFile::FILE), "{").unwrap();
        assert_eq!(RunFile::first_step(folder.path()), None);
    }
}
