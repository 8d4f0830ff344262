//! Layout of a run directory.
//!
//! | file | what |
//! |---|---|
//! | `run.json` | which run it is |
//! | `lock` | held while a process works in it |
//! | `job.json` | the job, with every default filled in |
//! | `graph.json` | the OP-DAG |
//! | `placement.json` | stages with their ops' names, and the placement itself |
//! | `data.json` | what the data owner found |
//! | `metrics.jsonl` | a line a step |
//! | `notices.jsonl` | a line for each thing that the user must see |
//! | `checkpoints/step-N/` | checkpoints; `checkpoints-ID/` if something else came in the place of that folder |
//! | `trace.json` | one step, measured and predicted, for <https://ui.perfetto.dev> |
//! | `loss-bytes.svg` | loss against bytes sent |
//! | `report.md` | what came out |

mod lock;
mod notices;
mod run_file;
mod start;
mod whole_files;

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use fusionllm_graph::{OpDag, read_json};
use fusionllm_planner::{Placement, Prediction};
use fusionllm_protocol::{Generation, JobSpec, content_hash, placement_hash};
use fusionllm_transport::{
    folder_above, if_usable, is_of_path, is_same_file, no_folder_above, read_regular, without_temporary_name,
};
use serde::{Deserialize, Serialize};

use crate::BrokerError;
use crate::files::io_error;
pub(crate) use lock::{FolderLock, RunLocks};
pub(crate) use notices::{NoticesWriter, read_notices};
pub(crate) use run_file::{Parent, RunFile, RunHome, SPARE_FOLDERS, spare_name};
pub(crate) use start::RunStart;
pub(crate) use whole_files::{WholeFiles, make_room};

/// One stage, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageSummary {
    /// Its place along the pipeline.
    pub stage: u32,
    /// Name of the CompNode that holds it.
    pub compnode: String,
    /// Names of its ops, in topological order.
    pub ops: Vec<String>,
    /// Elements of the parameters that its ops use; a tied one counts in each stage that uses it.
    pub parameters: u64,
}

/// `placement.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlacementFile {
    /// Number of the placement.
    pub generation: Generation,
    /// The stages, for people.
    pub stages: Vec<StageSummary>,
    /// The placement, for machines.
    pub placement: Placement,
    /// What a step was predicted to take.
    pub prediction: Prediction,
}

impl PlacementFile {
    /// Describes a placement of `dag`.
    pub(crate) fn of(placement: &Placement, dag: &OpDag, generation: Generation, prediction: Prediction) -> Self {
        let stages = placement.stages.iter().map(|stage| {
            let ops = || stage.ops.iter().filter_map(|op| dag.ops().get(op.index()));
            let params: std::collections::BTreeSet<_> = ops().flat_map(|op| &op.params).collect();
            let elements =
                params.iter().filter_map(|p| dag.params().get(p.index())).map(fusionllm_graph::Param::elements);
            StageSummary {
                stage: stage.id.0,
                compnode: placement.compnodes.get(stage.compnode.index()).cloned().unwrap_or_default(),
                ops: ops().map(|op| op.name.clone()).collect(),
                parameters: elements.sum(),
            }
        });
        Self { generation, stages: stages.collect(), placement: placement.clone(), prediction }
    }

    /// Hash of the file as it is written; nothing if it cannot be.
    pub(crate) fn content_hash(&self) -> Option<String> {
        to_json(Path::new(PLACEMENT), self).ok().map(|bytes| content_hash(&bytes))
    }
}

/// Name of the file with the placement.
const PLACEMENT: &str = "placement.json";

/// The folder in a run directory where its checkpoints are, unless the job names another one.
pub(crate) const CHECKPOINTS: &str = "checkpoints";

/// How the names begin of what is in a run directory beside its files.
const BESIDE: [&str; 5] = [FolderLock::FILE, CHECKPOINTS, SNAPSHOT_FOLDER, "metrics.", "notices."];

/// Whether something of this name may be of a run directory.
pub(crate) fn is_of_run_dir(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let files = RunDir::new(Path::new("")).files();
    let mut begins = files.iter().filter_map(|path| path.file_name()?.to_str()).chain(BESIDE);
    begins.any(|begin| name.starts_with(begin))
}

/// A run directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunDir {
    path: PathBuf,
}

impl RunDir {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn job(&self) -> PathBuf {
        self.path.join("job.json")
    }

    pub(crate) fn graph(&self) -> PathBuf {
        self.path.join("graph.json")
    }

    pub(crate) fn placement(&self) -> PathBuf {
        self.path.join(PLACEMENT)
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path.join("data.json")
    }

    pub(crate) fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    pub(crate) fn notices(&self) -> PathBuf {
        self.path.join("notices.jsonl")
    }

    pub(crate) fn trace(&self) -> PathBuf {
        self.path.join("trace.json")
    }

    pub(crate) fn plot(&self) -> PathBuf {
        self.path.join("loss-bytes.svg")
    }

    pub(crate) fn report(&self) -> PathBuf {
        self.path.join("report.md")
    }

    /// All files of which a reader knows the names.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let of_run = self.path.join(RunFile::FILE);
        let written =
            [self.job(), self.graph(), self.placement(), self.data(), self.trace(), self.plot(), self.report()];
        [of_run, self.metrics(), self.notices()].into_iter().chain(written).collect()
    }

    /// Whether another placement than this one has been at work here since: another process has gone on with the run. It is
    /// none of those whose files have these content hashes: where the directory is older, they are of the same job.
    pub(crate) fn is_of_another(&self, known: &PlacementFile, hashes: &[String]) -> bool {
        let hash = |file: &PlacementFile| placement_hash(&file.placement).ok();
        // What others have removed or damaged tells nothing.
        let found: Option<PlacementFile> = self.read_json(&self.placement()).ok().flatten();
        let is_other = found.is_some_and(|found| found.generation != known.generation || hash(&found) != hash(known));
        is_other && !read_regular(&self.placement()).is_ok_and(|bytes| hashes.contains(&content_hash(&bytes)))
    }

    /// Reads a JSON file of the run; `None` if it is not there.
    pub(crate) fn read_json<T: serde::de::DeserializeOwned>(&self, path: &Path) -> Result<Option<T>, BrokerError> {
        match read_regular(path) {
            Ok(text) => {
                read_json(&text).map(Some).map_err(|reason| BrokerError::Unreadable { path: path.to_owned(), reason })
            }
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io_error(path, e)),
        }
    }
}

/// A value as pretty JSON, for the file of this path.
pub(crate) fn to_json<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, BrokerError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| io_error(path, e.into()))?;
    text.push(b'\n');
    Ok(text)
}

/// Where a run goes that was given no directory: `RUNS/NAME-YYYYMMDD-HHMMSS`, in UTC.
pub fn default_run_dir(runs: &Path, name: &str, now: std::time::SystemTime) -> PathBuf {
    let now = time::OffsetDateTime::from(now);
    let (date, time) = (now.date(), now.time());
    let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
    let (hour, minute, second) = (time.hour(), time.minute(), time.second());
    runs.join(format!("{name}-{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}"))
}

/// The first of `path`, `path-2`, `path-3`, … that is not there or empty, and not `taken`.
///
/// # Errors
/// As [`is_free`].
pub fn free_run_dir(path: &Path, taken: impl Fn(&Path) -> bool) -> Result<PathBuf, BrokerError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let numbered = (2u64..).map(|n| path.with_file_name(format!("{name}-{n}")));
    for path in std::iter::once(path.to_owned()).chain(numbered) {
        if !taken(&path) && is_free(&path)? {
            return Ok(path);
        }
    }
    Ok(path.to_owned())
}

/// Whether a job could work in its folders now, before anything slow is done for it. A folder for checkpoints in which
/// others are at work is none that stands in the way: a run gets one of its own in it.
///
/// # Errors
/// [`BrokerError`] that names what is in the way.
pub fn check_run_folders(run_dir: &Path, spec: &JobSpec) -> Result<(), BrokerError> {
    for folder in [Some(run_dir), spec.checkpoint.to.as_deref()].into_iter().flatten() {
        if let Some(above) = no_folder_above(folder) {
            return Err(BrokerError::NoFolder { path: above.to_owned() });
        }
        if spec.model.path.as_deref().is_some_and(|model| is_same_file(model, folder)) {
            return Err(BrokerError::NotItsOwn { path: folder.to_owned() });
        }
        match FolderLock::check(folder) {
            Err(BrokerError::InUse { .. }) if folder != run_dir => {}
            result => result?,
        }
        let place = std::path::absolute(folder).map_err(|e| io_error(folder, e))?;
        let (bytes, path) = (place.as_os_str().len(), || folder.to_owned());
        if bytes > MOST_PATH_BYTES {
            return Err(BrokerError::LongPath { path: path(), bytes, most: MOST_PATH_BYTES });
        }
        if place.to_str().is_none() {
            return Err(BrokerError::NotUtf8 { path: path() });
        }
        check_writable(folder_above(&place).unwrap_or(&place))?;
    }
    Ok(())
}

/// Longest path of a folder in which a run or its checkpoints lie: names of files in them are shorter than the 256 bytes that
/// are left of the 4096 that systems have.
const MOST_PATH_BYTES: usize = 4096 - 256;

/// Whether folders can be made in a folder: some file systems take none, though anybody may list them. One is made, and
/// removed at once.
fn check_writable(folder: &Path) -> Result<(), BrokerError> {
    match tempfile::tempdir_in(folder).map(drop).map_err(without_temporary_name) {
        Err(source) if is_of_path(&source) => Err(BrokerError::NotWritable { path: folder.to_owned(), source }),
        // On a full disk there may be room when it is needed.
        _ => Ok(()),
    }
}

/// How the folder begins in which the CompNodes of `train` keep snapshots, beside the run or in its still empty folder.
pub const SNAPSHOT_FOLDER: &str = ".fusionllm-snapshots-";

/// Whether a path is such a folder, which is gone when `train` ends.
pub(crate) fn is_of_snapshots(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(SNAPSHOT_FOLDER))
}

/// Whether nothing would be overwritten there; the lock of a run that did not begin is nothing, and neither are snapshots.
///
/// # Errors
/// [`BrokerError::Io`] if that cannot be told now, as with too many open files.
pub fn is_free(path: &Path) -> Result<bool, BrokerError> {
    let is_nothing = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name() == FolderLock::FILE || is_of_snapshots(&entry.path()))
    };
    let Some(mut entries) = if_usable(std::fs::read_dir(path)).map_err(|e| io_error(path, e))? else {
        return Ok(!path.exists());
    };
    match entries.all(is_nothing).then(|| FolderLock::check(path)) {
        Some(Err(error)) if error.is_shortage() => Err(error),
        checked => Ok(checked.is_some_and(|checked| checked.is_ok())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::write_atomic;

    #[test]
    fn a_run_directory_has_name_and_time() {
        let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
        assert_eq!(default_run_dir(Path::new("runs"), "x", at), Path::new("runs/x-20231114-221320"));
    }

    #[test]
    fn a_failed_write_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none").join("x.json");
        assert!(write_atomic(&path, b"one").unwrap_err().to_string().contains("x.json"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_folder_in_which_none_can_be_made_is_refused_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let mut spec = crate::testing::spec(&[]);
        check_run_folders(&run_dir, &spec).unwrap();
        for to in ["/proc", "/proc/ck", "/sys/ck"] {
            spec.checkpoint.to = Some(to.into());
            let error = check_run_folders(&run_dir, &spec).unwrap_err();
            assert!(error.is_bad_input() && error.to_string().starts_with("nothing can be made in /"), "{error}");
        }
        assert!(!run_dir.exists());
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_whose_path_would_fail_a_run_later_is_refused() {
        use std::os::unix::ffi::OsStrExt;

        let (folder, spec) = (tempfile::tempdir().unwrap(), crate::testing::spec(&[]));
        let odd = folder.path().join(std::ffi::OsStr::from_bytes(b"\xff"));
        let error = check_run_folders(&odd, &spec).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains("is not UTF-8, give a folder"), "{error}");
        let deep: PathBuf = std::iter::repeat_n("f".repeat(250), 16).collect();
        let error = check_run_folders(&folder.path().join(deep), &spec).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains("expected at most 3840"), "{error}");
    }

    #[test]
    fn only_a_missing_or_empty_folder_is_free() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(format!("{SNAPSHOT_FOLDER}x"))).unwrap();
        assert!(is_free(folder.path()).unwrap());
        assert!(is_free(&folder.path().join("none")).unwrap());
        write_atomic(&folder.path().join("x"), b"").unwrap();
        assert!(!is_free(folder.path()).unwrap());
        assert!(!is_free(&folder.path().join("x")).unwrap());
    }
}
