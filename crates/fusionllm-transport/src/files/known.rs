//! A folder that is known by what it is: others may rename or remove it, and put something else in its place.

#[cfg(unix)]
use std::fs::File;
use std::io::Result;
use std::path::{Path, PathBuf};

/// What stands under the name of a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stands {
    /// The folder itself.
    Itself,
    /// Nothing: it was renamed or removed.
    Nothing,
    /// Something else.
    Other,
}

/// A folder that was opened, and so is told from any other one that has its name later.
#[derive(Debug)]
pub struct KnownFolder {
    path: PathBuf,
    #[cfg(unix)]
    folder: File,
}

impl KnownFolder {
    /// Opens a folder that is there; a link to one counts as what it leads to.
    ///
    /// # Errors
    /// What the system says.
    #[cfg(unix)]
    pub fn open(path: &Path) -> Result<Self> {
        use rustix::fs::OFlags;
        let mut options = File::options();
        options.read(true);
        // What is no folder is not opened: a pipe would be waited for.
        let flags = OFlags::DIRECTORY | OFlags::NONBLOCK;
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags.bits() as i32);
        Ok(Self { path: path.to_owned(), folder: options.open(path)? })
    }

    /// Takes note of a folder that is there.
    ///
    /// # Errors
    /// What the system says.
    #[cfg(not(unix))]
    pub fn open(path: &Path) -> Result<Self> {
        std::fs::read_dir(path)?;
        Ok(Self { path: path.to_owned() })
    }

    /// The name by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What stands under its name; where that cannot be told, itself.
    pub fn stands(&self) -> Stands {
        use std::io::ErrorKind::{NotADirectory, NotFound};
        match std::fs::metadata(&self.path) {
            Ok(found) if self.is_it(&found) => Stands::Itself,
            Ok(_) => Stands::Other,
            Err(error) if !matches!(error.kind(), NotFound | NotADirectory) => Stands::Itself,
            // A link to nowhere is something, too.
            Err(_) if self.path.symlink_metadata().is_ok() => Stands::Other,
            Err(_) => Stands::Nothing,
        }
    }

    #[cfg(unix)]
    fn is_it(&self, found: &std::fs::Metadata) -> bool {
        use std::os::unix::fs::MetadataExt;
        self.folder.metadata().is_ok_and(|folder| (folder.dev(), folder.ino()) == (found.dev(), found.ino()))
    }

    #[cfg(not(unix))]
    fn is_it(&self, found: &std::fs::Metadata) -> bool {
        found.is_dir()
    }

    /// The name that it has by now; nothing if it was removed or that cannot be told.
    #[cfg(target_os = "linux")]
    pub fn name(&self) -> Option<PathBuf> {
        use std::os::fd::AsRawFd;
        let name = std::fs::read_link(format!("/proc/self/fd/{}", self.folder.as_raw_fd())).ok()?;
        std::fs::metadata(&name).is_ok_and(|found| self.is_it(&found)).then_some(name)
    }

    /// The name that it has by now; nothing if it was removed or that cannot be told.
    #[cfg(not(target_os = "linux"))]
    pub fn name(&self) -> Option<PathBuf> {
        (self.stands() == Stands::Itself).then(|| self.path.clone())
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_told_from_what_comes_in_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().canonicalize().unwrap().join(name);
        let (path, moved) = (at("a"), at("moved"));
        std::fs::create_dir(&path).unwrap();
        let known = KnownFolder::open(&path).unwrap();
        assert_eq!((known.stands(), known.name()), (Stands::Itself, Some(path.clone())));
        std::fs::rename(&path, &moved).unwrap();
        assert_eq!((known.stands(), known.name()), (Stands::Nothing, Some(moved.clone())));
        std::fs::create_dir(&path).unwrap();
        assert_eq!(known.stands(), Stands::Other);
        std::fs::remove_dir(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert_eq!(known.stands(), Stands::Other);
        assert!(KnownFolder::open(&path).is_err());
        std::fs::remove_file(&path).unwrap();
        for (to, stands) in [("nowhere", Stands::Other), ("moved", Stands::Itself)] {
            std::os::unix::fs::symlink(to, &path).unwrap();
            assert_eq!(known.stands(), stands, "{to}");
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::remove_dir(&moved).unwrap();
        assert_eq!((known.stands(), known.name()), (Stands::Nothing, None));
    }
}
