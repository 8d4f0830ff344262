//! Layout of a run directory, and the one way in which whole files are written.
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
//! | `checkpoints/step-N/` | checkpoints |
//! | `trace.json` | one step, measured and predicted, for <https://ui.perfetto.dev> |
//! | `loss-bytes.svg` | loss against bytes sent |
//! | `report.md` | what came out |

mod lock;
mod notices;
mod open;
mod run_file;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use fusionllm_graph::OpDag;
use fusionllm_planner::{Placement, Prediction};
use fusionllm_protocol::{Generation, JobSpec};
use fusionllm_transport::{is_same_file, no_folder_above, read_regular, without_temporary_name};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::BrokerError;
pub(crate) use lock::FolderLock;
pub(crate) use notices::{NoticesWriter, read_notices};
pub(crate) use open::{OpenedRun, RunStart};
pub(crate) use run_file::{Parent, RunFile, RunHome};

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

    pub(crate) fn job(&self) -> PathBuf {
        self.path.join("job.json")
    }

    pub(crate) fn placement(&self) -> PathBuf {
        self.path.join("placement.json")
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

    /// Writes a value as pretty JSON.
    pub(crate) fn write_json<T: Serialize>(&self, path: &Path, value: &T) -> Result<(), BrokerError> {
        let mut text = serde_json::to_vec_pretty(value).map_err(|e| io_error(path, e.into()))?;
        text.push(b'\n');
        write_atomic(path, &text)
    }

    /// Reads a JSON file of the run; `None` if it is not there.
    pub(crate) fn read_json<T: serde::de::DeserializeOwned>(&self, path: &Path) -> Result<Option<T>, BrokerError> {
        match read_regular(path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| io_error(path, e.into())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io_error(path, e)),
        }
    }
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
pub fn free_run_dir(path: &Path, taken: impl Fn(&Path) -> bool) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let numbered = (2u64..).map(|n| path.with_file_name(format!("{name}-{n}")));
    let is_free = |path: &PathBuf| !taken(path) && is_free(path);
    std::iter::once(path.to_owned()).chain(numbered).find(is_free).unwrap_or_else(|| path.to_owned())
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
    }
    Ok(())
}

/// Whether nothing would be overwritten there; the lock of a run that did not begin is nothing.
pub fn is_free(path: &Path) -> bool {
    let is_lock =
        |entry: std::io::Result<std::fs::DirEntry>| entry.is_ok_and(|entry| entry.file_name() == FolderLock::FILE);
    std::fs::read_dir(path)
        .map_or(!path.exists(), |mut entries| entries.all(is_lock) && FolderLock::check(path).is_ok())
}

pub(crate) fn io_error(path: &Path, source: std::io::Error) -> BrokerError {
    BrokerError::Io { path: path.to_owned(), source }
}

/// Writes a whole file or nothing: temporary name beside it, sync, rename, sync of the folder.
///
/// # Errors
/// [`BrokerError::Io`] that names the file.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), BrokerError> {
    write_atomic_with_mode(path, bytes, FOR_ALL)
}

/// The same, readable by the owner alone.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), BrokerError> {
    write_atomic_with_mode(path, bytes, 0o600)
}

/// What the process's mask leaves of it is what others may do.
pub(crate) const FOR_ALL: u32 = 0o666;

/// A file beside `path` that is to take its name, and is gone if it does not.
pub(crate) fn temporary_for(path: &Path, mode: u32) -> std::io::Result<NamedTempFile> {
    let mut prefix = path.file_name().unwrap_or_default().to_owned();
    prefix.push(".");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder.tempfile_in(folder_of(path)).map_err(without_temporary_name)
}

/// The folder in which a file lies.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn write_atomic_with_mode(path: &Path, bytes: &[u8], mode: u32) -> Result<(), BrokerError> {
    let folder = folder_of(path);
    // What is wrong with the folder is said of the file, and not of a temporary one that nobody has heard of.
    std::fs::metadata(folder).map_err(|e| io_error(path, e))?;
    let mut file = temporary_for(path, mode).map_err(|e| io_error(path, e))?;
    // The file itself, whose errors do not name it.
    file.as_file_mut().write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(|e| io_error(path, e))?;
    file.persist(path).map_err(|e| io_error(path, e.error))?;
    sync_folder(folder).map_err(|e| io_error(folder, e))
}

/// Makes renames in the folder last. Only Unix lets a folder be opened.
pub(crate) fn sync_folder(folder: &Path) -> std::io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn what_is_no_secret_has_the_mode_of_any_file() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let (plain, shard, secret) = (folder.path().join("a"), folder.path().join("b"), folder.path().join("c"));
        File::create(&plain).unwrap();
        temporary_for(&shard, FOR_ALL).unwrap().persist(&shard).unwrap();
        write_private(&secret, b"").unwrap();
        assert_eq!((mode(&shard), mode(&secret)), (mode(&plain), 0o600));
    }

    #[test]
    fn an_atomic_write_leaves_one_file_and_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_private_file_is_readable_by_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ticket");
        write_private(&path, b"x").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

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

    #[test]
    fn only_a_missing_or_empty_folder_is_free() {
        let folder = tempfile::tempdir().unwrap();
        assert!(is_free(folder.path()));
        assert!(is_free(&folder.path().join("none")));
        write_atomic(&folder.path().join("x"), b"").unwrap();
        assert!(!is_free(folder.path()));
        assert!(!is_free(&folder.path().join("x")));
    }
}
