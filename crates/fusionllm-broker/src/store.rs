//! The jobs of a broker on disk: an embedded database with one JSON record a job.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fusionllm_graph::read_json;
use fusionllm_protocol::{DataFingerprint, Generation, JobId, JobSpec, JobState, JobSummary, RunId, Snapshot};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::StoreError;
use crate::model::ModelFingerprint;
use crate::run_dir::{PlacementFile, RunStart};

const JOBS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("jobs");
/// By number of the job and of its placement. A record is written often, and what it is at work with once.
const WORK: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("work");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const VERSION_KEY: &str = "schema_version";

/// Version of the tables and of [`JobRecord`]; it grows whenever an older build could not read them.
const SCHEMA_VERSION: u64 = 1;

/// What the broker remembers of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct JobRecord {
    /// Number of the job.
    pub(crate) job: JobId,
    /// The job, paths absolute.
    pub(crate) spec: JobSpec,
    /// The job's state, as it was last written.
    pub(crate) state: JobState,
    /// Updates that are done.
    pub(crate) step: u64,
    /// Last training loss, in nats per token.
    pub(crate) loss: Option<f64>,
    /// Its run directory; made when the job is placed.
    pub(crate) run_dir: PathBuf,
    /// Number of its last placement; 0 before the first.
    pub(crate) generation: Generation,
    /// Its run; jobs of version 0.1.0 have none until they are resumed.
    #[serde(default)]
    pub(crate) run: Option<RunId>,
    /// Step of its newest checkpoint, and the manifest's checksum.
    #[serde(default)]
    pub(crate) checkpoint: Option<(u64, String)>,
    /// The step that it was told to go on from, until it is at work there.
    #[serde(default)]
    pub(crate) from_step: Option<u64>,
    /// The data that it was last trained on.
    #[serde(default)]
    pub(crate) data: Option<DataFingerprint>,
    /// The model that it began with or would begin with, as it was then.
    #[serde(default)]
    pub(crate) model: Option<ModelFingerprint>,
    /// How many CompNodes its last placement had.
    #[serde(default)]
    pub(crate) members: u32,
    /// Name of the CompNode that read its data then.
    #[serde(default)]
    pub(crate) owner: Option<String>,
    /// The snapshots that CompNodes keep of it, oldest first.
    #[serde(default)]
    pub(crate) snapshots: Vec<SnapshotSet>,
    /// Its last placement, from its start until it has ended.
    #[serde(default)]
    pub(crate) placed: Option<Placed>,
    /// What its last placement is at work with, until the job has ended. The store has it in a table of its own.
    #[serde(skip)]
    pub(crate) work: Option<Arc<PlacedWork>>,
}

/// What a placement is at work with: with it the job goes on whatever others do to its run directory while the broker is
/// away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PlacedWork {
    /// As it stands in the run directory.
    pub(crate) placement: PlacementFile,
    /// The OP-DAG's JSON form.
    pub(crate) graph: String,
    /// Files of the model that its checkpoints carry, by name.
    pub(crate) carried: BTreeMap<String, String>,
    /// Which run it is.
    pub(crate) run: RunStart,
    /// Of `placement.json`, the content hashes for the newest placements of the job, this one last: an older copy of the run
    /// directory is still the job's own.
    #[serde(default)]
    pub(crate) hashes: Vec<String>,
}

impl PlacedWork {
    /// So many hashes of placements are kept.
    const MOST_HASHES: usize = 256;

    /// The hashes for a new placement of a job that was at work with `before`.
    pub(crate) fn hashes_with(before: Option<&Self>, file: &PlacementFile) -> Vec<String> {
        let mut hashes = before.map_or_else(Vec::new, |work| work.hashes.clone());
        hashes.extend(file.content_hash());
        hashes.drain(..hashes.len().saturating_sub(Self::MOST_HASHES));
        hashes
    }
}

/// A placement that was started. The rest of it is in [`PlacedWork`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Placed {
    /// What tells it from others: [`fusionllm_protocol::placement_hash`].
    pub(crate) placement: String,
    /// The step that it began with.
    pub(crate) from: u64,
    /// Its CompNodes, in its order.
    pub(crate) members: Vec<PlacedMember>,
}

/// A CompNode of a placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PlacedMember {
    /// Its name there.
    pub(crate) name: String,
    /// Its public key, which is that of one process.
    pub(crate) key: [u8; 32],
    /// The machine that it runs on.
    pub(crate) host: String,
}

/// What all CompNodes of a placement held after a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SnapshotSet {
    /// Number of the placement.
    pub(crate) generation: Generation,
    /// Updates that are done.
    pub(crate) step: u64,
    /// Training loss of the last of them, in nats per token.
    pub(crate) loss: Option<f64>,
    /// By CompNode of the placement.
    pub(crate) parts: Vec<SnapshotPart>,
}

/// What one CompNode held.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SnapshotPart {
    /// Its file, wherever it lies.
    pub(crate) snapshot: Snapshot,
    /// Names of the parameters in it.
    pub(crate) params: Vec<String>,
}

impl JobRecord {
    /// A job of which nothing is done yet.
    pub(crate) fn new(job: JobId, spec: JobSpec, run_dir: PathBuf) -> Self {
        Self {
            job,
            spec,
            state: JobState::Waiting { reason: String::new() },
            step: 0,
            loss: None,
            run_dir,
            generation: Generation(0),
            run: None,
            checkpoint: None,
            from_step: None,
            data: None,
            model: None,
            members: 0,
            owner: None,
            snapshots: Vec::new(),
            placed: None,
            work: None,
        }
    }

    /// As a line of a status report.
    pub(crate) fn summary(&self) -> JobSummary {
        JobSummary {
            job: self.job,
            name: self.spec.name.clone(),
            state: self.state.clone(),
            step: self.step,
            steps: self.spec.train.steps,
            loss: self.loss,
            run_dir: self.run_dir.display().to_string(),
            standstill: None,
            reading: None,
        }
    }
}

/// The open database.
#[derive(Debug)]
pub(crate) struct Store {
    path: PathBuf,
    database: Database,
}

impl Store {
    /// Opens the store, or makes an empty one.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|e| match e {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
            other => store_error(path, other.into()),
        })?;
        Self::of(path, database)
    }

    fn of(path: &Path, database: Database) -> Result<Self, StoreError> {
        let store = Self { path: path.to_owned(), database };
        store.check_version()?;
        Ok(store)
    }

    /// A store on other storage than a file.
    #[cfg(test)]
    pub(crate) fn on(path: &Path, storage: impl redb::StorageBackend) -> Result<Self, StoreError> {
        let fail = |e: DatabaseError| store_error(path, e.into());
        Self::of(path, redb::Builder::new().create_with_backend(storage).map_err(fail)?)
    }

    fn fail(&self, error: impl Into<redb::Error>) -> StoreError {
        store_error(&self.path, error.into())
    }

    fn check_version(&self) -> Result<(), StoreError> {
        let write = self.database.begin_write().map_err(|e| self.fail(e))?;
        {
            let mut meta = write.open_table(META).map_err(|e| self.fail(e))?;
            let found = meta.get(VERSION_KEY).map_err(|e| self.fail(e))?.map(|v| v.value());
            match found {
                Some(SCHEMA_VERSION) => {}
                Some(got) => {
                    return Err(StoreError::Version { path: self.path.clone(), got, expected: SCHEMA_VERSION });
                }
                None => {
                    meta.insert(VERSION_KEY, SCHEMA_VERSION).map_err(|e| self.fail(e))?;
                }
            }
            write.open_table(JOBS).map_err(|e| self.fail(e))?;
            write.open_table(WORK).map_err(|e| self.fail(e))?;
        }
        write.commit().map_err(|e| self.fail(e))
    }

    /// Every job, oldest first.
    pub(crate) fn jobs(&self) -> Result<Vec<JobRecord>, StoreError> {
        let read = self.database.begin_read().map_err(|e| self.fail(e))?;
        let table = read.open_table(JOBS).map_err(|e| self.fail(e))?;
        let work = read.open_table(WORK).map_err(|e| self.fail(e))?;
        let mut records = Vec::new();
        for entry in table.iter().map_err(|e| self.fail(e))? {
            let (job, bytes) = entry.map_err(|e| self.fail(e))?;
            let mut record: JobRecord = read_json(bytes.value()).map_err(|e| self.entry(job.value(), e))?;
            let found = work.get((job.value(), record.generation.0)).map_err(|e| self.fail(e))?;
            // Without it the job goes on by what its run directory has.
            record.work = found.and_then(|bytes| match read_json::<PlacedWork>(bytes.value()) {
                Ok(work) => Some(Arc::new(work)),
                Err(error) => {
                    let (job, path) = (record.job, self.path.display());
                    tracing::warn!(%job, %path, error, "what the job is at work with cannot be read: it is not taken back");
                    None
                }
            });
            records.push(record);
        }
        Ok(records)
    }

    /// Writes one job, over what was known of it.
    pub(crate) fn put(&self, record: &JobRecord) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record).map_err(|e| self.entry(record.job.0, e.to_string()))?;
        let write = self.database.begin_write().map_err(|e| self.fail(e))?;
        {
            let mut table = write.open_table(JOBS).map_err(|e| self.fail(e))?;
            table.insert(record.job.0, bytes.as_slice()).map_err(|e| self.fail(e))?;
        }
        self.put_work(&write, record)?;
        write.commit().map_err(|e| self.fail(e))
    }

    /// Writes what a job is at work with, if that is not written, and drops what it was at work with before.
    fn put_work(&self, write: &WriteTransaction, record: &JobRecord) -> Result<(), StoreError> {
        let mut table = write.open_table(WORK).map_err(|e| self.fail(e))?;
        let (job, generation) = (record.job.0, record.generation.0);
        let is_current = |of: u32| record.work.is_some() && of == generation;
        table.retain_in((job, 0)..=(job, u32::MAX), |(_, of), _| is_current(of)).map_err(|e| self.fail(e))?;
        let Some(work) = &record.work else { return Ok(()) };
        if table.get((job, generation)).map_err(|e| self.fail(e))?.is_none() {
            let bytes = serde_json::to_vec(work.as_ref()).map_err(|e| self.entry(job, e.to_string()))?;
            table.insert((job, generation), bytes.as_slice()).map_err(|e| self.fail(e))?;
        }
        Ok(())
    }

    /// Writes these jobs and no others, all or nothing.
    pub(crate) fn put_all(&self, records: &[JobRecord]) -> Result<(), StoreError> {
        let write = self.database.begin_write().map_err(|e| self.fail(e))?;
        {
            let mut table = write.open_table(JOBS).map_err(|e| self.fail(e))?;
            table.retain(|job, _| records.iter().any(|r| r.job.0 == job)).map_err(|e| self.fail(e))?;
            for record in records {
                let bytes = serde_json::to_vec(record).map_err(|e| self.entry(record.job.0, e.to_string()))?;
                table.insert(record.job.0, bytes.as_slice()).map_err(|e| self.fail(e))?;
            }
        }
        for record in records {
            self.put_work(&write, record)?;
        }
        write.commit().map_err(|e| self.fail(e))
    }

    fn entry(&self, job: u64, reason: String) -> StoreError {
        StoreError::Entry { path: self.path.clone(), job, reason }
    }
}

/// A full disk is not a damaged store.
fn store_error(path: &Path, error: redb::Error) -> StoreError {
    let path = path.to_owned();
    match error {
        // The database says so of a file that is none of its own.
        redb::Error::Io(source) if source.kind() != ErrorKind::InvalidData => StoreError::Io { path, source },
        other => StoreError::Database { path, reason: other.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn record(job: u64) -> JobRecord {
        JobRecord {
            state: JobState::Running,
            step: 3,
            loss: Some(2.5),
            generation: Generation(1),
            run: Some(RunId::from_bytes([1; 16])),
            checkpoint: Some((3, "00".to_owned())),
            ..JobRecord::new(JobId(job), testing::spec(&[]), PathBuf::from("/runs/x"))
        }
    }

    #[test]
    fn jobs_are_there_after_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broker.redb");
        let store = Store::open(&path).unwrap();
        store.put(&record(2)).unwrap();
        store.put(&record(1)).unwrap();
        store.put(&JobRecord { state: JobState::Done, ..record(2) }).unwrap();
        drop(store);
        let jobs = Store::open(&path).unwrap().jobs().unwrap();
        assert_eq!(jobs, [record(1), JobRecord { state: JobState::Done, ..record(2) }]);
    }

    #[test]
    fn what_a_job_is_at_work_with_is_there_until_it_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broker.redb");
        let at_work = |generation| {
            let (placement, graph) = testing::placed(&testing::spec(&[]), generation);
            let carried = [("tokenizer.json".to_owned(), format!("[{generation}]"))].into();
            let run = RunStart { notices: Vec::new(), ..RunStart::new() };
            let hashes = PlacedWork::hashes_with(None, &placement);
            let work = PlacedWork { placement, graph, carried, run, hashes };
            JobRecord { generation: Generation(generation), work: Some(Arc::new(work)), ..record(1) }
        };
        let (first, second) = (at_work(1), at_work(2));
        let store = Store::open(&path).unwrap();
        store.put(&record(2)).unwrap();
        store.put(&first).unwrap();
        store.put(&JobRecord { step: 4, ..first.clone() }).unwrap();
        drop(store);
        let store = Store::open(&path).unwrap();
        assert_eq!(store.jobs().unwrap(), [JobRecord { step: 4, ..first }, record(2)]);
        store.put_all(&[second.clone(), record(2)]).unwrap();
        assert_eq!(store.jobs().unwrap(), [second, record(2)]);
        store.put(&JobRecord { generation: Generation(2), ..record(1) }).unwrap();
        assert_eq!(store.jobs().unwrap()[0].work, None);
    }

    #[test]
    fn a_full_disk_is_not_called_damage() {
        let full = redb::Error::Io(ErrorKind::StorageFull.into());
        let text = store_error(Path::new("/s/broker.redb"), full).to_string();
        assert!(!text.contains("damaged") && text.starts_with("job store /s/broker.redb: "), "{text}");
    }

    #[test]
    fn a_job_of_the_first_version_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broker.redb");
        let store = Store::open(&path).unwrap();
        let mut old = serde_json::to_value(record(4)).unwrap();
        for key in ["run", "checkpoint", "from_step", "data", "placed"] {
            old.as_object_mut().unwrap().remove(key);
        }
        let write = store.database.begin_write().unwrap();
        let bytes = serde_json::to_vec(&old).unwrap();
        write.open_table(JOBS).unwrap().insert(4, bytes.as_slice()).unwrap();
        write.commit().unwrap();
        assert_eq!(store.jobs().unwrap(), [JobRecord { run: None, checkpoint: None, ..record(4) }]);
    }

    #[test]
    fn another_schema_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broker.redb");
        let store = Store::open(&path).unwrap();
        let set_version = |store: Store, version: u64| {
            let write = store.database.begin_write().unwrap();
            write.open_table(META).unwrap().insert(VERSION_KEY, version).unwrap();
            write.commit().unwrap();
        };
        set_version(store, SCHEMA_VERSION + 1);
        let error = Store::open(&path).unwrap_err().to_string();
        let (newer, known) = (SCHEMA_VERSION + 1, SCHEMA_VERSION);
        let expected = format!("has schema version {newer}, this build reads version {known}: use a newer release");
        assert!(error.ends_with(&expected), "{error}");
        set_version(Store { path: path.clone(), database: Database::create(&path).unwrap() }, 0);
        let error = Store::open(&path).unwrap_err().to_string();
        assert!(error.ends_with("use the older release that wrote it, or another --state"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_store_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broker.redb");
        std::fs::write(&path, vec![7; 5000]).unwrap();
        let error = Store::open(&path).unwrap_err().to_string();
        assert!(error.contains("move it away"), "{error}");
    }

    #[test]
    fn an_unreadable_entry_names_the_job() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("broker.redb");
        let store = Store::open(&path).unwrap();
        let write = store.database.begin_write().unwrap();
        write.open_table(JOBS).unwrap().insert(4, b"{".as_slice()).unwrap();
        write.commit().unwrap();
        let error = store.jobs().unwrap_err().to_string();
        assert!(error.contains("job 4 is not readable"), "{error}");
    }
}
