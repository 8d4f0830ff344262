//! What the system says of a file, in words that name the true cause.

use std::fmt;
use std::io::{Error, Result};

/// Whether the process or the machine had run out of something, such as open files. Such an error says nothing of the file
/// or folder at hand: another time it could be opened.
pub fn is_shortage(error: &Error) -> bool {
    Shortage::of(error).is_some()
}

/// Whether an error lies in the path that was given, such as that nothing is there or that it may not be written: with the
/// same path it would come again.
pub fn is_of_path(error: &Error) -> bool {
    use std::io::ErrorKind::{
        AlreadyExists, DirectoryNotEmpty, FileTooLarge, InvalidData, InvalidFilename, InvalidInput, IsADirectory,
        NotADirectory, NotFound, Other, PermissionDenied, ReadOnlyFilesystem, Unsupported,
    };
    match error.kind() {
        NotFound | PermissionDenied | AlreadyExists | NotADirectory | IsADirectory | DirectoryNotEmpty
        | ReadOnlyFilesystem | InvalidInput | InvalidData | InvalidFilename | Unsupported => true,
        // Ours, of what is no regular file, or longer than is read as a whole.
        Other | FileTooLarge => error.raw_os_error().is_none(),
        _ => is_loop(error),
    }
}

/// What was opened or read; nothing if it cannot be, be it missing, of another kind or not ours to read.
///
/// # Errors
/// One that says nothing of the file, see [`is_shortage`].
pub fn if_usable<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_shortage(&error) => Err(error),
        Err(_) => Ok(None),
    }
}

/// An error of the file system for people: what the system says and, where that does not show it, what would help.
pub fn io_reason(error: &Error) -> IoReason<'_> {
    IoReason(error)
}

/// See [`io_reason`].
#[derive(Debug)]
pub struct IoReason<'a>(&'a Error);

impl fmt::Display for IoReason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = self.0;
        match Shortage::of(error) {
            Some(Shortage::Process) => {
                write!(f, "{error}: as many as this process may have, raise its limit (`ulimit -n`)")
            }
            Some(Shortage::Machine) => {
                write!(f, "{error}: as many as this machine may have, raise its limit (`sysctl fs.file-max`)")
            }
            None if is_too_long(error) => {
                write!(f, "{error}: as long as this process may make a file, raise its limit (`ulimit -f`)")
            }
            Some(Shortage::Memory) | None => write!(f, "{error}"),
        }
    }
}

/// Of what there is too little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shortage {
    /// Files that the process may have open.
    Process,
    /// Files that the machine may have open.
    Machine,
    Memory,
}

#[cfg(unix)]
impl Shortage {
    fn of(error: &Error) -> Option<Self> {
        use rustix::io::Errno;
        match error.raw_os_error().map(Errno::from_raw_os_error)? {
            Errno::MFILE => Some(Self::Process),
            Errno::NFILE => Some(Self::Machine),
            Errno::NOMEM => Some(Self::Memory),
            _ => None,
        }
    }
}

#[cfg(not(unix))]
impl Shortage {
    fn of(error: &Error) -> Option<Self> {
        (error.kind() == std::io::ErrorKind::OutOfMemory).then_some(Self::Memory)
    }
}

#[cfg(unix)]
fn is_too_long(error: &Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::FBIG.raw_os_error())
}

/// Links that lead to each other.
#[cfg(unix)]
fn is_loop(error: &Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

#[cfg(not(unix))]
fn is_loop(_error: &Error) -> bool {
    false
}

#[cfg(not(unix))]
fn is_too_long(_error: &Error) -> bool {
    false
}

#[cfg(all(test, unix))]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn the_true_cause_is_named_with_what_would_help() {
        let said = |errno: Errno| io_reason(&Error::from(errno)).to_string();
        assert!(said(Errno::MFILE).starts_with("Too many open files") && said(Errno::MFILE).contains("`ulimit -n`"));
        assert!(said(Errno::NFILE).contains("this machine may have"), "{}", said(Errno::NFILE));
        assert!(said(Errno::FBIG).contains("`ulimit -f`"), "{}", said(Errno::FBIG));
        assert_eq!(said(Errno::NOENT), Error::from(Errno::NOENT).to_string());
    }

    #[test]
    fn a_path_is_to_blame_for_what_would_come_again() {
        let is_blamed = |errno: Errno| is_of_path(&Error::from(errno));
        for errno in [Errno::NOENT, Errno::ACCESS, Errno::ROFS, Errno::LOOP, Errno::NAMETOOLONG, Errno::NOTDIR] {
            assert!(is_blamed(errno), "{errno}");
        }
        for errno in [Errno::NOSPC, Errno::MFILE, Errno::FBIG, Errno::IO, Errno::PIPE, Errno::CONNREFUSED] {
            assert!(!is_blamed(errno), "{errno}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(is_of_path(&crate::read_regular(folder.path()).unwrap_err()));
        assert!(is_of_path(&crate::read_regular(std::path::Path::new("/dev/zero")).unwrap_err()));
    }

    #[test]
    fn a_file_is_not_blamed_for_what_the_process_lacks() {
        let result = |errno: Errno| if_usable::<()>(Err(Error::from(errno)));
        assert!(result(Errno::MFILE).is_err() && result(Errno::NFILE).is_err() && result(Errno::NOMEM).is_err());
        for errno in [Errno::NOENT, Errno::ACCESS, Errno::ISDIR, Errno::LOOP] {
            assert_eq!(result(errno).unwrap(), None);
        }
    }
}
