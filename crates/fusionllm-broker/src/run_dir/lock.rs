//! A lock on a folder, held by one process and let go by the operating system however that ends.

use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fusionllm_protocol::RunId;
use fusionllm_transport::{KnownFolder, Stands, leads_to, open_or_make_regular, open_regular};
use time::OffsetDateTime;

use super::CHECKPOINTS;
use crate::BrokerError;
use crate::files::{io_error, make_folder};

/// Most of a lock file that is read: a line.
const LINE_BYTES: u64 = 1024;
/// For longer nobody holds a lock who only looks at it.
const LOOKED_AT: Duration = Duration::from_millis(200);
/// Between two tries to take a lock.
const BETWEEN_TRIES: Duration = Duration::from_millis(5);
/// What that line begins with.
const BEGINS: &str = "run ";

/// A folder that is ours while this lives.
#[derive(Debug)]
pub(crate) struct FolderLock {
    path: PathBuf,
    folder: KnownFolder,
    /// Closing it lets go.
    file: File,
}

impl FolderLock {
    /// Name of the file in the folder. It stays there: a file that is removed could be locked by one and made anew by
    /// another.
    pub(crate) const FILE: &'static str = "fusionllm.lock";

    /// Takes the lock of a folder for a run.
    ///
    /// # Errors
    /// [`BrokerError::InUse`] with who holds it, or [`BrokerError::Io`].
    pub(crate) fn take(folder: &Path, run: &RunId) -> Result<Self, BrokerError> {
        let path = folder.join(Self::FILE);
        let fail = |e| io_error(&path, e);
        if is_foreign(&path) {
            return Err(BrokerError::NotALock { path });
        }
        let mut file = open_or_make_regular(&path).map_err(fail)?;
        match try_for_a_while(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(BrokerError::InUse { path: folder.to_owned(), holder: holder(&mut file) });
            }
            // A file system without locks keeps nobody out, as before there were any.
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {
                tracing::warn!(path = %path.display(), "the file system knows no locks");
            }
            Err(TryLockError::Error(e)) => return Err(fail(e)),
        }
        if !is_ours(&mut file).map_err(fail)? {
            return Err(BrokerError::NotALock { path });
        }
        let now = OffsetDateTime::now_utc();
        let (date, time) = (now.date(), now.time());
        let at = format!("{date} {:02}:{:02} UTC", time.hour(), time.minute());
        let line = format!("{BEGINS}{run}, process {}, since {at}\n", std::process::id());
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(line.as_bytes())
        };
        // A full disk is no reason not to hold the lock; only its holder stays unnamed.
        if let Err(error) = write(&mut file) {
            tracing::debug!(%error, path = %path.display(), "a lock without its holder's name");
        }
        let known = KnownFolder::open(folder).map_err(|e| io_error(folder, e))?;
        Ok(Self { path, folder: known, file })
    }

    /// Whether the folder is still there under its name: it may have been renamed, removed or replaced.
    pub(crate) fn is_in_place(&self) -> bool {
        self.folder.stands() == Stands::Itself
    }

    /// Goes on under the name that the folder has by now, with the lock in it. Gives that, if it can be told.
    pub(crate) fn follow(&mut self) -> Option<PathBuf> {
        let name = self.folder.name()?;
        let (path, folder) = (name.join(Self::FILE), KnownFolder::open(&name).ok()?);
        if !leads_to(&path, &self.file) {
            return None;
        }
        (self.path, self.folder) = (path, folder);
        Some(name)
    }

    /// Whether the folder is ours, but not for others who look: its lock was removed or replaced.
    fn is_let_go(&self) -> bool {
        self.is_in_place() && !leads_to(&self.path, &self.file)
    }

    /// Whether it is so, and nobody has made another lock.
    fn is_removed(&self) -> bool {
        self.is_let_go() && self.path.symlink_metadata().is_err()
    }

    /// Whether somebody has ever taken the lock of a folder.
    pub(crate) fn is_in(folder: &Path) -> bool {
        folder.join(Self::FILE).symlink_metadata().is_ok()
    }

    /// Whether the lock of a folder could be taken now. Nothing is made or changed.
    ///
    /// # Errors
    /// [`BrokerError::NotALock`], [`BrokerError::InUse`] with who holds it, or [`BrokerError::Io`].
    pub(crate) fn check(folder: &Path) -> Result<(), BrokerError> {
        let path = folder.join(Self::FILE);
        if is_foreign(&path) {
            return Err(BrokerError::NotALock { path });
        }
        let mut file = match open_regular(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(io_error(&path, e)),
        };
        if matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) {
            return Err(BrokerError::InUse { path: folder.to_owned(), holder: holder(&mut file) });
        }
        if is_ours(&mut file).map_err(|e| io_error(&path, e))? { Ok(()) } else { Err(BrokerError::NotALock { path }) }
    }
}

/// Takes a lock. Whoever only looks whether it is free holds it for a moment.
fn try_for_a_while(file: &File) -> Result<(), TryLockError> {
    let deadline = Instant::now() + LOOKED_AT;
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(BETWEEN_TRIES),
            result => return result,
        }
    }
}

/// Whether something other than a regular file is there: a link leads to somebody else's.
fn is_foreign(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| !found.is_file())
}

/// Whether the file is empty, or what a holder has written.
fn is_ours(file: &mut File) -> std::io::Result<bool> {
    let mut begins = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    Read::take(file, BEGINS.len() as u64).read_to_end(&mut begins)?;
    Ok(begins.is_empty() || begins == BEGINS.as_bytes())
}

/// What the holder has written of itself, unless somebody else holds it by now: one that ended has let go.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = Read::take(&mut *file, LINE_BYTES).read_to_string(&mut text);
    let line = text.lines().next().unwrap_or_default().trim().replace(char::is_control, " ");
    let named = line.split("process ").nth(1).and_then(|rest| rest.split(',').next()?.parse().ok());
    let holds = holding(file);
    match (holds, named) {
        (Some(holds), named) if named != Some(holds) => format!("process {holds}"),
        (None, Some(named)) if has_ended(named) => "another process".to_owned(),
        _ if read.is_err() || line.is_empty() => "another process".to_owned(),
        _ => line,
    }
}

/// The process that holds a lock, where the system tells.
#[cfg(target_os = "linux")]
fn holding(file: &File) -> Option<u32> {
    let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().ok()?);
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let of_line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_it = words.get(1) == Some(&"FLOCK") && words.get(5)?.rsplit(':').next()?.parse() == Ok(inode);
        if is_it { words.get(4)?.parse().ok() } else { None }
    };
    // The same number on another device would be another file: then it is better to name nobody.
    let mut found = locks.lines().filter_map(of_line);
    found.next().filter(|&process| process > 0 && found.next().is_none())
}

#[cfg(not(target_os = "linux"))]
fn holding(_file: &File) -> Option<u32> {
    None
}

#[cfg(target_os = "linux")]
fn has_ended(process: u32) -> bool {
    !Path::new(&format!("/proc/{process}")).exists()
}

#[cfg(not(target_os = "linux"))]
fn has_ended(_process: u32) -> bool {
    false
}

/// Locks of a run: of its directory, and of a folder elsewhere where its checkpoints lie.
#[derive(Debug)]
pub(crate) struct RunLocks {
    pub(crate) run_dir: FolderLock,
    pub(crate) checkpoints: Option<FolderLock>,
}

impl RunLocks {
    /// A folder that was renamed, removed or replaced since its lock was taken.
    pub(crate) fn missing(&self) -> Option<&KnownFolder> {
        let locks = std::iter::once(&self.run_dir).chain(&self.checkpoints);
        locks.filter(|lock| !lock.is_in_place()).map(|lock| &lock.folder).next()
    }

    /// Whether a lock was removed from its folder, and nobody has made another one there.
    pub(crate) fn is_removed(&self) -> bool {
        std::iter::once(&self.run_dir).chain(&self.checkpoints).any(FolderLock::is_removed)
    }

    /// Whether a lock was removed from its folder, and somebody has made another one there.
    pub(crate) fn is_replaced(&self) -> bool {
        let is_replaced = |lock: &FolderLock| lock.is_let_go() && !lock.is_removed();
        std::iter::once(&self.run_dir).chain(&self.checkpoints).any(is_replaced)
    }

    /// Takes such locks again. Gives their paths.
    ///
    /// # Errors
    /// [`BrokerError::InUse`] if another process has come into such a folder meanwhile, or why one cannot be taken.
    pub(crate) fn hold_on(&mut self, run: &RunId) -> Result<Vec<PathBuf>, BrokerError> {
        let mut taken = Vec::new();
        for lock in std::iter::once(&mut self.run_dir).chain(&mut self.checkpoints) {
            if lock.is_let_go() {
                *lock = FolderLock::take(lock.folder.path(), run)?;
                taken.push(lock.path.clone());
            }
        }
        Ok(taken)
    }

    /// Takes the locks of such folders anew, where they are made again under their names.
    ///
    /// # Errors
    /// [`BrokerError::Foreign`] if something else is there by now, or why it cannot be made or locked.
    pub(crate) fn take_again(&mut self, run: &RunId) -> Result<(), BrokerError> {
        for lock in std::iter::once(&mut self.run_dir).chain(&mut self.checkpoints) {
            if !lock.is_in_place() {
                *lock = make_again(lock.folder.path(), run)?;
            }
        }
        Ok(())
    }
}

/// Makes a folder again and locks it. What lies there by now must be nothing but checkpoints that are on their way.
fn make_again(folder: &Path, run: &RunId) -> Result<FolderLock, BrokerError> {
    let fail = |e| io_error(folder, e);
    if folder.symlink_metadata().is_ok_and(|found| !found.is_dir()) {
        return Err(BrokerError::Foreign { path: folder.to_owned(), run: run.clone() });
    }
    make_folder(folder)?;
    let is_ours =
        |name: &OsStr| name == FolderLock::FILE || name == CHECKPOINTS || name.to_string_lossy().contains(run.short());
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if !is_ours(&entry.file_name()) {
            return Err(BrokerError::Foreign { path: entry.path(), run: run.clone() });
        }
    }
    FolderLock::take(folder, run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_the_first_is_and_may_once_that_has_gone() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunId::from_bytes([7; 16]);
        let first = FolderLock::take(folder.path(), &run).unwrap();
        let error = FolderLock::take(folder.path(), &run).unwrap_err();
        assert!(error.is_bad_input());
        let (error, process) = (error.to_string(), format!("process {}", std::process::id()));
        assert!(error.contains("run 07070707") && error.contains(&process), "{error}");
        assert!(matches!(FolderLock::check(folder.path()), Err(BrokerError::InUse { .. })));
        drop(first);
        FolderLock::check(folder.path()).unwrap();
        FolderLock::take(folder.path(), &run).unwrap();
    }

    /// Whoever ended has let go, and its name is still there: others may hold the lock by now.
    #[cfg(target_os = "linux")]
    #[test]
    fn whoever_has_ended_is_not_named() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunId::from_bytes([7; 16]);
        drop(FolderLock::take(folder.path(), &run).unwrap());
        let path = folder.path().join(FolderLock::FILE);
        let written = std::fs::read_to_string(&path).unwrap();
        let ended = written.replace(&format!("process {}", std::process::id()), "process 4000000001");
        std::fs::write(&path, ended).unwrap();
        let other = open_regular(&path).unwrap();
        other.lock().unwrap();
        let error = FolderLock::check(folder.path()).unwrap_err().to_string();
        assert!(!error.contains("4000000001") && error.contains("process"), "{error}");
    }

    #[test]
    fn whoever_looks_keeps_nobody_out() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunId::from_bytes([7; 16]);
        drop(FolderLock::take(folder.path(), &run).unwrap());
        let looking = open_regular(&folder.path().join(FolderLock::FILE)).unwrap();
        looking.lock_shared().unwrap();
        std::thread::scope(|scope| {
            let taking = scope.spawn(|| FolderLock::take(folder.path(), &run).map(drop));
            std::thread::sleep(LOOKED_AT / 4);
            drop(looking);
            taking.join().unwrap().unwrap();
        });
    }

    #[cfg(unix)]
    #[test]
    fn a_file_of_somebody_else_is_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunId::from_bytes([7; 16]);
        let (lock, other) = (folder.path().join(FolderLock::FILE), folder.path().join("other"));
        std::fs::write(&lock, "precious").unwrap();
        let error = FolderLock::take(folder.path(), &run).unwrap_err().to_string();
        assert!(error.contains("not a lock of FusionLLM"), "{error}");
        assert!(FolderLock::check(folder.path()).unwrap_err().is_bad_input());
        assert_eq!(std::fs::read(&lock).unwrap(), b"precious");
        std::fs::remove_file(&lock).unwrap();
        std::fs::write(&other, "").unwrap();
        std::os::unix::fs::symlink(&other, &lock).unwrap();
        FolderLock::take(folder.path(), &run).unwrap_err();
        FolderLock::check(folder.path()).unwrap_err();
        assert_eq!(std::fs::read(&other).unwrap(), b"");
    }
}
