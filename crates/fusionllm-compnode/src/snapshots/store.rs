//! The folder in which a CompNode keeps snapshots.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fusionllm_planner::NodeIndex;
use fusionllm_protocol::{Generation, JobId, RunKey, Snapshot, SnapshotId};
use fusionllm_transport::{FileMode, PeerId, open_or_make_regular, read_regular, sync_folder, write_whole};
use tempfile::NamedTempFile;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::checkpoint::{ShardFile, free_room};
use crate::{CompNodeError, ShardError};

/// How the names of files end that say what of a job is not lent.
const KEPT_BACK: &str = ".kept-back.json";
/// Held by the process whose folder it is.
const LOCK: &str = "lock";
/// How the names of files begin that are not whole yet.
const NEW: &str = ".new-";
/// A snapshot is begun where there is room for so many: others may begin theirs on the same disk, and a checkpoint needs
/// room, too.
const ROOM_LEFT: u64 = 4;
/// Loans at once.
const MOST_LOANS: usize = 8;
/// Folders that processes of one name may have at once.
const MOST_FOLDERS: u32 = 1000;

/// The snapshots of one CompNode for one broker: files by name, and who may fetch them.
///
/// Another process that is started under the same name has the same folder, if it is free, and with it what the one before
/// kept.
#[derive(Debug)]
pub(crate) struct SnapshotStore {
    folder: PathBuf,
    /// Locked as long as this is.
    _lock: File,
    state: Mutex<State>,
    loans: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    kept: BTreeMap<SnapshotId, Snapshot>,
    /// By job, who may fetch its snapshots.
    lent: BTreeMap<JobId, BTreeSet<PeerId>>,
    /// By job, names of the parameters that nobody may fetch.
    kept_back: BTreeMap<JobId, BTreeSet<String>>,
}

/// A snapshot that is being written; dropped, it is gone.
#[derive(Debug)]
pub(crate) struct NewSnapshot(NamedTempFile);

impl NewSnapshot {
    /// The file, still empty.
    ///
    /// # Errors
    /// [`ShardError::Io`] if it does not open.
    pub(crate) fn file(&self) -> Result<ShardFile, ShardError> {
        ShardFile::open_to_write(self.0.path())
    }
}

impl SnapshotStore {
    /// Opens a folder for the snapshots that a CompNode of this name keeps for a broker, below `base`. What is there already
    /// counts once it was looked through ([`Self::look`]).
    ///
    /// # Errors
    /// [`CompNodeError::Scratch`] if none can be had.
    pub(crate) fn open(base: &Path, broker: PeerId, name: &str) -> Result<Self, CompNodeError> {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let name: String = name.chars().map(plain).collect();
        let of_broker = base.join(broker.to_string());
        let failed =
            |path: &Path, source| CompNodeError::Scratch { source: ShardError::Io { path: path.to_owned(), source } };
        for number in 1..=MOST_FOLDERS {
            let folder = of_broker.join(if number == 1 { name.clone() } else { format!("{name}-{number}") });
            std::fs::create_dir_all(&folder).map_err(|e| failed(&folder, e))?;
            let path = folder.join(LOCK);
            let lock = open_or_make_regular(&path).map_err(|e| failed(&path, e))?;
            match lock.try_lock() {
                Ok(()) => {
                    remove_halves(&folder);
                    let loans = Semaphore::new(MOST_LOANS);
                    // Before anything of them is lent.
                    let state = State { kept_back: kept_back_in(&folder), ..State::default() };
                    return Ok(Self { folder, _lock: lock, state: Mutex::new(state), loans });
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(failed(&path, source)),
            }
        }
        let many = std::io::Error::other(format!("{MOST_FOLDERS} CompNodes named {name} keep snapshots there"));
        Err(failed(&of_broker, many))
    }

    /// Looks through what a process before this one has left, which takes as long as it takes to read all of it.
    pub(crate) fn look(&self) {
        found_in(&self.folder, |snapshot| {
            self.lock().kept.entry(snapshot.id).or_insert(snapshot);
        });
    }

    /// Waits until it may lend one more.
    pub(crate) async fn loan(&self) -> Option<SemaphorePermit<'_>> {
        // It is never closed.
        self.loans.acquire().await.ok()
    }

    /// Those that are here.
    pub(crate) fn all(&self) -> Vec<Snapshot> {
        self.lock().kept.values().copied().collect()
    }

    /// Begins one of about so many bytes, where enough is free besides.
    ///
    /// # Errors
    /// [`ShardError::Io`] if there is no room for it.
    pub(crate) fn begin(&self, bytes: u64) -> Result<NewSnapshot, ShardError> {
        if free_room(&self.folder).is_some_and(|room| room / ROOM_LEFT < bytes) {
            return Err(self.io(std::io::ErrorKind::StorageFull.into()));
        }
        // A process of the same name that left just now may have taken the empty folder with it.
        std::fs::create_dir_all(&self.folder).map_err(|e| self.io(e))?;
        let file = tempfile::Builder::new().prefix(NEW).tempfile_in(&self.folder);
        file.map(NewSnapshot).map_err(|e| self.io(fusionllm_transport::without_temporary_name(e)))
    }

    /// Keeps one that has been written, under its name.
    ///
    /// # Errors
    /// [`ShardError`] if it does not read, or the name cannot be given.
    pub(crate) fn keep(&self, id: SnapshotId, new: NewSnapshot) -> Result<Snapshot, ShardError> {
        let file = ShardFile::open(new.0.path())?;
        let snapshot = Snapshot { id, bytes: file.bytes(), hash: file.hash()? };
        self.settle(snapshot, new)?;
        Ok(snapshot)
    }

    /// Keeps one that was fetched, if it is what was asked for.
    ///
    /// # Errors
    /// [`ShardError`] if its bytes are others than those of `snapshot`, or the name cannot be given.
    pub(crate) fn keep_fetched(&self, snapshot: Snapshot, new: NewSnapshot) -> Result<(), ShardError> {
        check(&ShardFile::open(new.0.path())?, &snapshot)?;
        self.settle(snapshot, new)
    }

    fn settle(&self, snapshot: Snapshot, new: NewSnapshot) -> Result<(), ShardError> {
        let path = self.path(snapshot.id);
        // Others go because this one is there: it must be there after a power cut, too.
        new.0.as_file().sync_all().map_err(|e| self.io(e))?;
        // The lock holds off a release of the same name.
        let mut state = self.lock();
        new.0.persist(&path).map_err(|e| ShardError::Io { path, source: e.error })?;
        state.kept.insert(snapshot.id, snapshot);
        drop(state);
        sync_folder(&self.folder).map_err(|e| self.io(e))
    }

    /// The file of a snapshot, whose content is looked through before: a disk may have lost what it had. Nothing if it is
    /// not here.
    ///
    /// # Errors
    /// [`ShardError`] if it cannot be read, or has changed.
    pub(crate) fn open_file(&self, snapshot: &Snapshot) -> Result<Option<ShardFile>, ShardError> {
        if self.lock().kept.get(&snapshot.id) != Some(snapshot) {
            return Ok(None);
        }
        let file = ShardFile::open(&self.path(snapshot.id))?;
        check(&file, snapshot)?;
        Ok(Some(file))
    }

    /// A file without a name, for a part of a snapshot of so many bytes on its way.
    ///
    /// # Errors
    /// [`ShardError::Io`] if none can be made.
    pub(crate) fn part(&self, bytes: u64) -> Result<ShardFile, ShardError> {
        if free_room(&self.folder).is_some_and(|room| room / 2 < bytes) {
            return Err(self.io(std::io::ErrorKind::StorageFull.into()));
        }
        ShardFile::empty(&self.folder)
    }

    /// These may fetch a job's snapshots, and nobody else.
    pub(crate) fn lend_to(&self, job: JobId, peers: impl IntoIterator<Item = PeerId>) {
        self.lock().lent.insert(job, peers.into_iter().collect());
    }

    /// Nobody may fetch these parameters of a job, nor a whole snapshot of it. That is remembered for the process after this
    /// one as long as it has snapshots of the job.
    ///
    /// # Errors
    /// [`ShardError::Io`] if it cannot be written.
    pub(crate) fn keep_back(&self, job: JobId, params: BTreeSet<String>) -> Result<(), ShardError> {
        let mut state = self.lock();
        if state.kept_back.get(&job) == Some(&params) {
            return Ok(());
        }
        std::fs::create_dir_all(&self.folder).map_err(|e| self.io(e))?;
        let text = serde_json::to_vec(&params).map_err(|e| self.io(e.into()))?;
        write_whole(&self.kept_back_path(job), &text, FileMode::Private).map_err(|e| self.io(e))?;
        state.kept_back.insert(job, params);
        Ok(())
    }

    /// The parameters of a job that nobody may fetch, if there are any.
    pub(crate) fn kept_back(&self, job: JobId) -> Option<BTreeSet<String>> {
        self.lock().kept_back.get(&job).cloned()
    }

    /// Whether a peer may fetch a job's snapshots.
    pub(crate) fn is_lent(&self, job: JobId, peer: PeerId) -> bool {
        self.lock().lent.get(&job).is_some_and(|peers| peers.contains(&peer))
    }

    /// Everybody who may fetch something.
    pub(crate) fn borrowers(&self) -> Vec<PeerId> {
        self.lock().lent.values().flatten().copied().collect()
    }

    /// Removes the snapshots of a job but for those of `keep`. With none of them, nobody may fetch any more.
    pub(crate) fn release(&self, job: JobId, keep: &[(Generation, u64)]) {
        let mut state = self.lock();
        if keep.is_empty() {
            state.lent.remove(&job);
        }
        let is_kept = |id: &SnapshotId| keep.contains(&(id.key.generation, id.step));
        let gone: Vec<SnapshotId> = state.kept.keys().filter(|id| id.key.job == job && !is_kept(id)).copied().collect();
        for id in gone {
            state.kept.remove(&id);
            let path = self.path(id);
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(%error, path = %path.display(), "an old snapshot was not removed");
            }
        }
        if keep.is_empty() && state.kept_back.remove(&job).is_some() {
            // Should it stay, it keeps back what is not there.
            let _ = std::fs::remove_file(self.kept_back_path(job));
        }
    }

    fn kept_back_path(&self, job: JobId) -> PathBuf {
        self.folder.join(format!("job-{}{KEPT_BACK}", job.0))
    }

    /// The process leaves. Unless what is kept `stays` for the next one, all of it goes.
    pub(crate) fn close(&self, stays: bool) {
        if !stays {
            let of_state = |state: &State| {
                let kept_back = state.kept_back.keys().copied();
                state.kept.keys().map(|id| id.key.job).chain(kept_back).collect::<BTreeSet<JobId>>()
            };
            let jobs = of_state(&self.lock());
            jobs.into_iter().for_each(|job| self.release(job, &[]));
        }
        if self.lock().kept.is_empty() {
            // Another process may have what lies beside it.
            let _ = std::fs::remove_file(self.folder.join(LOCK));
            let _ = std::fs::remove_dir(&self.folder);
            let above = self.folder.ancestors().skip(1);
            above.take(if stays { 1 } else { 2 }).for_each(|folder| {
                let _ = std::fs::remove_dir(folder);
            });
        }
    }

    fn path(&self, id: SnapshotId) -> PathBuf {
        self.folder.join(file_name(id))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io(&self, source: std::io::Error) -> ShardError {
        ShardError::Io { path: self.folder.clone(), source }
    }
}

/// Whether a file is what the snapshot says.
fn check(file: &ShardFile, snapshot: &Snapshot) -> Result<(), ShardError> {
    if file.bytes() == snapshot.bytes && file.hash()? == snapshot.hash {
        return Ok(());
    }
    Err(ShardError::Format { reason: format!("it is not the snapshot of step {} that was taken", snapshot.id.step) })
}

fn file_name(SnapshotId { key, step, node }: SnapshotId) -> String {
    let (RunKey { job: JobId(job), generation: Generation(generation) }, NodeIndex(node)) = (key, node);
    format!("job-{job}.placement-{generation}.step-{step}.part-{node}.safetensors")
}

/// The id that a name stands for.
fn id_of(name: &str) -> Option<SnapshotId> {
    let mut parts = name.strip_suffix(".safetensors")?.split('.');
    let mut number = |label: &str| parts.next()?.strip_prefix(label)?.parse::<u64>().ok();
    let (job, generation) = (number("job-")?, number("placement-")?);
    let (step, node) = (number("step-")?, number("part-")?);
    let key = RunKey { job: JobId(job), generation: Generation(u32::try_from(generation).ok()?) };
    let id = SnapshotId { key, step, node: NodeIndex(u32::try_from(node).ok()?) };
    (file_name(id) == name).then_some(id)
}

/// Gives the snapshots in a folder, one after the other.
fn found_in(folder: &Path, mut give: impl FnMut(Snapshot)) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(id_of) else { continue };
        match ShardFile::open(&entry.path()).and_then(|file| Ok((file.bytes(), file.hash()?))) {
            Ok((bytes, hash)) => give(Snapshot { id, bytes, hash }),
            Err(error) => tracing::warn!(%error, "a snapshot cannot be read"),
        }
    }
}

/// By job, what the process before this one did not lend. A file that cannot be read names nothing, but whole snapshots of its
/// job are kept back.
fn kept_back_in(folder: &Path) -> BTreeMap<JobId, BTreeSet<String>> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let of = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        let job = name.to_str()?.strip_prefix("job-")?.strip_suffix(KEPT_BACK)?.parse().ok()?;
        let params = read_regular(&entry.path()).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Some((JobId(job), params.unwrap_or_default()))
    };
    entries.filter_map(of).collect()
}

/// Removes what was being written in a folder when the process before this one ended.
fn remove_halves(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(NEW) {
            // Should it stay, it is in nobody's way.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::write_shard;
    use crate::executor::NamedTensor;

    fn id(job: u64, generation: u32, step: u64, node: u32) -> SnapshotId {
        let key = RunKey { job: JobId(job), generation: Generation(generation) };
        SnapshotId { key, step, node: NodeIndex(node) }
    }

    fn broker() -> PeerId {
        PeerId::from_bytes([7; 32])
    }

    fn put(store: &SnapshotStore, id: SnapshotId, value: f32) -> Snapshot {
        let tensor = NamedTensor { name: "a".to_owned(), shape: vec![2], values: vec![value; 2] };
        let new = store.begin(100).unwrap();
        new.file().unwrap().append(&write_shard(&[tensor]).unwrap()).unwrap();
        store.keep(id, new).unwrap()
    }

    #[test]
    fn what_one_process_kept_the_next_one_has() {
        let base = tempfile::tempdir().unwrap();
        let store = SnapshotStore::open(base.path(), broker(), "a/../b").unwrap();
        let (first, second) = (put(&store, id(1, 2, 30, 0), 1.0), put(&store, id(1, 2, 30, 1), 2.0));
        let half = store.begin(100).unwrap();
        let beside = SnapshotStore::open(base.path(), broker(), "a/../b").unwrap();
        assert!(beside.all().is_empty(), "the folder of another process");
        // As if the process had been killed.
        std::mem::forget(half.0.into_temp_path());
        drop(store);
        let store = SnapshotStore::open(base.path(), broker(), "a/../b").unwrap();
        assert!(store.all().is_empty());
        store.look();
        assert_eq!(store.all(), [first, second]);
        assert_eq!(std::fs::read_dir(&store.folder).unwrap().count(), 3, "two snapshots and the lock");
        assert!(store.open_file(&first).unwrap().is_some());
        assert!(store.open_file(&Snapshot { hash: [0; 32], ..first }).unwrap().is_none());
        let other = SnapshotStore::open(base.path(), PeerId::from_bytes([8; 32]), "a/../b").unwrap();
        assert!(other.all().is_empty(), "what is kept for another broker is none of this one's");
    }

    #[test]
    fn only_what_is_kept_stays_and_an_empty_folder_goes() {
        let base = tempfile::tempdir().unwrap();
        let store = SnapshotStore::open(base.path(), broker(), "n").unwrap();
        let kept = put(&store, id(1, 2, 30, 0), 1.0);
        put(&store, id(1, 2, 20, 0), 1.0);
        put(&store, id(1, 1, 30, 0), 1.0);
        let of_another_job = put(&store, id(2, 1, 5, 0), 1.0);
        store.release(JobId(1), &[(Generation(2), 30)]);
        assert_eq!(store.all(), [kept, of_another_job]);
        store.close(true);
        assert!(base.path().read_dir().unwrap().count() == 1 && store.path(kept.id).exists());
        store.close(false);
        assert!(!base.path().exists(), "all that was made is gone");
    }

    #[test]
    fn what_is_kept_back_stays_so_for_the_next_process_and_no_longer_than_it_must() {
        let base = tempfile::tempdir().unwrap();
        let names = BTreeSet::from(["wte".to_owned()]);
        let store = SnapshotStore::open(base.path(), broker(), "n").unwrap();
        put(&store, id(1, 2, 30, 0), 1.0);
        store.keep_back(JobId(1), names.clone()).unwrap();
        store.release(JobId(1), &[(Generation(2), 30)]);
        drop(store);
        let store = SnapshotStore::open(base.path(), broker(), "n").unwrap();
        assert_eq!((store.kept_back(JobId(1)), store.kept_back(JobId(2))), (Some(names), None));
        std::fs::write(store.kept_back_path(JobId(1)), "damaged").unwrap();
        drop(store);
        let store = SnapshotStore::open(base.path(), broker(), "n").unwrap();
        assert_eq!(store.kept_back(JobId(1)), Some(BTreeSet::new()));
        store.look();
        store.close(false);
        assert!(!base.path().exists(), "all that was made is gone");
    }

    #[test]
    fn a_snapshot_that_has_changed_is_not_used() {
        let base = tempfile::tempdir().unwrap();
        let store = SnapshotStore::open(base.path(), broker(), "n").unwrap();
        let snapshot = put(&store, id(1, 1, 3, 0), 1.0);
        let path = store.path(snapshot.id);
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = store.open_file(&snapshot).unwrap_err().to_string();
        assert!(error.contains("not the snapshot of step 3"), "{error}");
        // One that comes with other bytes than were announced is refused, and what was there stays.
        let new = store.begin(100).unwrap();
        new.file().unwrap().append(&bytes).unwrap();
        assert!(store.keep_fetched(snapshot, new).is_err());
    }

    #[test]
    fn one_that_leaves_no_room_for_a_checkpoint_is_not_begun() {
        let base = tempfile::tempdir().unwrap();
        let store = SnapshotStore::open(base.path(), broker(), "n").unwrap();
        let room = free_room(base.path()).unwrap();
        // Others fill and free the same disk meanwhile.
        store.begin(room / (ROOM_LEFT + 2)).unwrap();
        let error = store.begin(room / (ROOM_LEFT - 2)).unwrap_err().to_string();
        assert!(error.contains(&base.path().display().to_string()), "{error}");
    }

    #[test]
    fn names_are_those_of_ids_and_of_nothing_else() {
        let id = id(1, 2, 30, 4);
        assert_eq!(id_of(&file_name(id)), Some(id));
        for other in ["lock", "job-1.safetensors", "job-1.placement-2.step-30.part-04.safetensors", ".new-1"] {
            assert_eq!(id_of(other), None, "{other}");
        }
    }
}
