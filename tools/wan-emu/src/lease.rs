//! Who may use a network's name: a lock file for each network that is up, and its control socket and log beside it.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Pid;

use crate::error::Error;

/// Where they are; it is empty after a reboot, as namespaces are gone then.
const DIRECTORY: &str = "/run/wan-emu";
/// How long a dying process may keep a name.
const PATIENCE: Duration = Duration::from_secs(5);

/// The right to a network's name. The kernel takes it back when the process ends, however it ends.
#[derive(Debug)]
pub struct Lease {
    net: String,
    /// Holds the lock.
    _file: File,
}

impl Lease {
    /// Takes it.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Io`].
    pub fn take(net: &str) -> Result<Self, Error> {
        let path = path(net, "lock");
        let fault = || Error::io(format!("lock {}", path.display()));
        DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY).map_err(fault())?;
        let patience = Instant::now() + PATIENCE;
        loop {
            let mut file = OpenOptions::new().create(true).write(true).truncate(false).open(&path).map_err(fault())?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if holder(net).is_none() && Instant::now() < patience => {
                    thread::sleep(Duration::from_millis(10));
                    continue;
                }
                Err(TryLockError::WouldBlock) => return Err(Error::InUse { net: net.to_owned() }),
                Err(TryLockError::Error(error)) => return Err(fault()(error)),
            }
            // Another process may have removed the file between opening and locking.
            if is_at(&file, &path).map_err(fault())? {
                file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(fault())?;
                return Ok(Self { net: net.to_owned(), _file: file });
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // What is left does no harm: the next owner of the name replaces it.
        let _ = fs::remove_file(socket(&self.net));
        let _ = fs::remove_file(path(&self.net, "lock"));
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(there) => Ok(there.ino() == file.metadata()?.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The process that holds a network's name, unless it is dying: then the kernel still takes apart what it had.
pub fn holder(net: &str) -> Option<Pid> {
    let path = path(net, "lock");
    let is_held = matches!(File::open(&path).ok()?.try_lock(), Err(TryLockError::WouldBlock));
    let pid = fs::read_to_string(&path).ok()?.trim().parse().ok()?;
    if is_held && !is_dying(pid) { Pid::from_raw(pid) } else { None }
}

/// Whether a process was killed or has ended, though perhaps not all of its threads yet.
fn is_dying(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

/// Names of all networks that left a lock file, which are those that are up and those whose process was killed.
pub fn networks() -> Vec<String> {
    let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(entry.file_name().into_string().ok()?.strip_suffix(".lock")?.to_owned())).collect()
}

/// The control socket of a network.
pub fn socket(net: &str) -> PathBuf {
    path(net, "sock")
}

/// The log of a network in the background.
pub fn log(net: &str) -> PathBuf {
    path(net, "log")
}

fn path(net: &str, kind: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{net}.{kind}"))
}
