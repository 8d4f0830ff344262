//! The files of a run directory that are written as a whole, while others may rename, remove or replace them.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use fusionllm_transport::{FileMode, io_reason, read_regular, temporary_of, write_new_whole, write_whole};

use crate::BrokerError;
use crate::files::{FileState, io_error, put_aside};

/// So often something may come in the place of a file while that is written.
const ATTEMPTS: usize = 10;

/// So often a file is written again at once. One that others replace again and again is then left until the next checkpoint.
const MOST_AT_ONCE: u32 = 10;
/// Of what was put aside before, that which is larger is not compared with what is put aside now.
const COMPARED_BYTES: u64 = 1 << 20;

/// What is known of one file.
#[derive(Clone, Debug, Default)]
struct Known {
    /// What it was when that was last looked at; nothing if it was not there.
    state: Option<FileState>,
    /// What we wrote; nothing of one that is still to come.
    bytes: Option<Vec<u8>>,
    /// Whether it could not be written again, or is left as it is, which is told once.
    is_missing: bool,
    /// How often it was written again at once.
    times: u32,
    /// Whether it was told that it is left.
    is_left: bool,
    /// Where that is which came in its place last.
    aside: Option<PathBuf>,
}

/// All such files of a run at work.
#[derive(Clone, Debug, Default)]
pub(crate) struct WholeFiles(BTreeMap<PathBuf, Known>);

impl WholeFiles {
    /// Takes note of what has the name of a file that is still to come: what takes its place later is somebody else's.
    pub(crate) fn expect(&mut self, path: PathBuf) {
        let state = FileState::of(&path);
        self.0.entry(path).or_insert(Known { state, ..Known::default() });
    }

    /// Writes a file. What others have put under its name is kept. Gives what the run's user must know.
    ///
    /// # Errors
    /// [`BrokerError::Io`] that names it.
    pub(crate) fn write(&mut self, path: &Path, bytes: Vec<u8>) -> Result<Option<String>, BrokerError> {
        let known = self
            .0
            .entry(path.to_owned())
            .or_insert_with(|| Known { state: FileState::of(path).filter(|state| state.is_file), ..Known::default() });
        let is_ours = known.is_as_it_was(path);
        known.bytes = Some(bytes);
        let aside = known.write(path, is_ours).map_err(|e| io_error(path, e))?;
        Ok((!aside.is_empty()).then(|| told_aside(path, &aside)))
    }

    /// Puts aside what others have put under the name of a file that is about to be written. Gives what the run's user must
    /// know.
    ///
    /// # Errors
    /// [`BrokerError::Io`] if that cannot be done.
    pub(crate) fn make_room(&mut self, path: &Path) -> Result<Option<String>, BrokerError> {
        let known = self.0.entry(path.to_owned()).or_default();
        if known.is_as_it_was(path) || path.symlink_metadata().is_err() {
            return Ok(None);
        }
        let aside = put_aside(path).map_err(|e| io_error(path, e))?;
        known.state = None;
        Ok(Some(told_aside(path, &[aside])))
    }

    /// Remembers what a file is to hold that cannot be written now.
    pub(crate) fn keep(&mut self, path: &Path, bytes: Vec<u8>) {
        self.0.entry(path.to_owned()).or_default().bytes = Some(bytes);
    }

    /// Writes all files again that are not there, where their folder was made again.
    ///
    /// # Errors
    /// [`BrokerError::Io`] that names the file.
    pub(crate) fn write_all(&mut self) -> Result<(), BrokerError> {
        for (path, known) in &mut self.0 {
            if known.bytes.is_some() && !known.is_as_it_was(path) {
                known.write(path, false).map_err(|e| io_error(path, e))?;
            }
        }
        Ok(())
    }

    /// Their folder is called otherwise from now on.
    pub(crate) fn move_to(&mut self, from: &Path, to: &Path) {
        let moved = |path: PathBuf| path.strip_prefix(from).map_or_else(|_| path.clone(), |name| to.join(name));
        self.0 = std::mem::take(&mut self.0).into_iter().map(|(path, known)| (moved(path), known)).collect();
    }

    /// Whether one that was written has no file of its name any more.
    pub(crate) fn is_going(&self) -> bool {
        let is_gone = |(path, known): (&PathBuf, &Known)| {
            known.state.is_some() && known.bytes.is_some() && path.symlink_metadata().is_err()
        };
        self.0.iter().any(is_gone)
    }

    /// Looks what others have done to the files, and puts it right: what was renamed, removed or replaced is written again, and
    /// what came in its place is kept. Gives what the run's user must know, each once.
    pub(crate) fn look(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        for (path, known) in self.0.iter_mut().filter(|(_, known)| known.bytes.is_some() && !known.is_missing) {
            if known.is_as_it_was(path) {
                continue;
            }
            if known.times >= MOST_AT_ONCE {
                known.is_missing = true;
                if !std::mem::replace(&mut known.is_left, true) {
                    let path = path.display();
                    told.push(format!(
                        "others change {path} again and again: it is left as they have it, and is written again with each \
                         checkpoint and at the end"
                    ));
                }
                continue;
            }
            known.times += 1;
            let written = known.write(path, false);
            known.is_missing = written.is_err();
            let became = match written {
                Ok(aside) if aside.is_empty() => "it is written again".to_owned(),
                Ok(aside) => format!("it is written again; what came in its place is kept as {}", named(&aside)),
                Err(error) => format!(
                    "it cannot be written again ({}), which is tried once more with the next checkpoint and at the end",
                    io_reason(&error)
                ),
            };
            told.push(format!("{} was renamed, removed, replaced or edited: {became}", path.display()));
        }
        told
    }

    /// Has the next [`Self::look`] try again what could not be done.
    pub(crate) fn try_again(&mut self) {
        for known in self.0.values_mut() {
            (known.is_missing, known.times) = (false, known.times.min(MOST_AT_ONCE - 1));
        }
    }

    /// Removes the temporary files that were left beside these, as by a crash.
    pub(crate) fn tidy(&self, folder: &Path) {
        let names: Vec<_> = self.0.keys().filter_map(|path| path.file_name()?.to_str()).collect();
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_left = name.to_str().is_some_and(|name| temporary_of(name).is_some_and(|of| names.contains(&of)));
            if is_left && entry.file_type().is_ok_and(|kind| kind.is_file()) {
                // It is in nobody's way.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

impl Known {
    /// Whether the file is what we know it to be. One that holds what we wrote is, whatever was done to it.
    fn is_as_it_was(&mut self, path: &Path) -> bool {
        let state = FileState::of(path);
        if state == self.state && state.map_or(self.bytes.is_none(), |state| state.is_file) {
            return true;
        }
        let has = |bytes: &Vec<u8>| read_regular(path).is_ok_and(|there| there == *bytes);
        let is_file = state.is_some_and(|state| state.is_file);
        let is_same = is_file && self.bytes.as_ref().is_some_and(has);
        if is_same {
            self.state = state;
        }
        is_same
    }

    /// Writes it: in place of our own file, or of nothing. Gives where what others have put there is now.
    fn write(&mut self, path: &Path, is_ours: bool) -> std::io::Result<Vec<PathBuf>> {
        let bytes = self.bytes.clone().unwrap_or_default();
        let mut aside = Vec::new();
        if is_ours && self.state.is_some() {
            write_whole(path, &bytes, FileMode::Shared)?;
        } else {
            let mut attempts = 1..ATTEMPTS;
            loop {
                if path.symlink_metadata().is_ok() {
                    aside.push(self.put_aside(path)?);
                }
                match write_new_whole(path, &bytes, FileMode::Shared) {
                    Err(error) if error.kind() == ErrorKind::AlreadyExists && attempts.next().is_some() => {}
                    result => break result?,
                }
            }
        }
        self.state = FileState::of(path);
        Ok(aside)
    }

    /// Puts aside what others have put there. What is kept already, as a file of the same content, is not kept twice.
    fn put_aside(&mut self, path: &Path) -> std::io::Result<PathBuf> {
        let new = put_aside(path)?;
        if let Some(kept) = self.aside.as_ref().filter(|kept| are_equal(kept, &new)) {
            std::fs::remove_file(&new)?;
            return Ok(kept.clone());
        }
        self.aside = Some(new.clone());
        Ok(new)
    }
}

/// Whether both are files of the same content; of large ones it is not told.
fn are_equal(one: &Path, other: &Path) -> bool {
    let length = |path: &Path| {
        let found = path.symlink_metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some(found.len()).filter(|&bytes| bytes <= COMPARED_BYTES)
    };
    let read = |path: &Path| read_regular(path).ok();
    length(one).is_some() && length(one) == length(other) && read(one).is_some() && read(one) == read(other)
}

/// Puts aside what cannot be a file of ours under one of these names, such as a folder. Gives what the run's user must know.
///
/// # Errors
/// [`BrokerError::Io`] if that cannot be done.
pub(crate) fn make_room(paths: impl IntoIterator<Item = PathBuf>) -> Result<Vec<String>, BrokerError> {
    let mut told = Vec::new();
    for path in paths {
        if path.symlink_metadata().is_err() || path.is_file() {
            continue;
        }
        let aside = put_aside(&path).map_err(|e| io_error(&path, e))?;
        told.push(told_aside(&path, &[aside]));
    }
    Ok(told)
}

fn told_aside(path: &Path, aside: &[PathBuf]) -> String {
    format!("something else was in the place of {}: it is kept as {}", path.display(), named(aside))
}

fn named(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    fn replace(path: &Path, kind: &str) {
        let new = path.with_extension("new");
        match kind {
            "removed" => std::fs::remove_file(path).unwrap(),
            "changed" => std::fs::write(path, "theirs").unwrap(),
            "file" => {
                std::fs::write(&new, "theirs").unwrap();
                std::fs::rename(&new, path).unwrap();
            }
            "folder" => {
                std::fs::remove_file(path).unwrap();
                std::fs::create_dir(path).unwrap();
            }
            #[cfg(unix)]
            "link" => {
                std::fs::write(&new, "theirs").unwrap();
                std::fs::remove_file(path).unwrap();
                std::os::unix::fs::symlink(&new, path).unwrap();
            }
            _ => {}
        }
    }

    #[test]
    fn whatever_comes_in_the_place_of_a_file_is_kept_and_told_once() {
        for kind in ["removed", "changed", "file", "folder", "link"] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("x.json");
            let mut files = WholeFiles::default();
            assert_eq!(files.write(&path, b"one".to_vec()).unwrap(), None);
            assert_eq!(files.look(), [""; 0]);
            replace(&path, kind);
            assert_eq!(files.is_going(), kind == "removed");
            let told = files.look();
            assert_eq!(told.len(), 1, "{kind}: {told:?}");
            assert!(
                told[0].contains("x.json was renamed, removed, replaced or edited: it is written again"),
                "{told:?}"
            );
            assert_eq!(text(&path), "one");
            let other = folder.path().join("x.json.other");
            assert_eq!(other.symlink_metadata().is_ok(), kind != "removed", "{kind}");
            assert_eq!(other.is_dir(), kind == "folder");
            if ["changed", "file", "link"].contains(&kind) {
                assert_eq!(text(&other), "theirs");
            }
            assert_eq!(files.look(), [""; 0], "{kind}");
            replace(&path, kind);
            let told = files.write(&path, b"two".to_vec()).unwrap();
            assert_eq!(told.is_some(), kind != "removed", "{kind}: {told:?}");
            assert_eq!((text(&path), files.look()), ("two".to_owned(), Vec::new()));
        }
    }

    #[test]
    fn what_others_write_again_and_again_fills_no_disk() {
        for is_same in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("x.json");
            let mut files = WholeFiles::default();
            files.write(&path, b"one".to_vec()).unwrap();
            let replace = |files: &mut WholeFiles, n: u32| {
                let theirs = if is_same { "theirs".to_owned() } else { format!("theirs {n}") };
                std::fs::write(&path, theirs).unwrap();
                files.look()
            };
            let told: Vec<String> = (0..50).flat_map(|n| replace(&mut files, n)).collect();
            assert_eq!(told.len(), 11, "{told:?}");
            assert!(told[10].contains("x.json again and again: it is left as they have it"), "{told:?}");
            assert!(text(&path).starts_with("theirs"));
            let others = || std::fs::read_dir(folder.path()).unwrap().count() - 1;
            assert_eq!(others(), if is_same { 1 } else { 10 });
            // With each checkpoint it is tried once.
            files.try_again();
            assert_eq!((files.look().len(), text(&path)), (1, "one".to_owned()));
            let told: Vec<String> = (0..50).flat_map(|n| replace(&mut files, n)).collect();
            assert_eq!(told, [""; 0]);
            assert_eq!(others(), if is_same { 1 } else { 11 });
        }
    }

    #[test]
    fn a_file_that_was_only_touched_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        let mut files = WholeFiles::default();
        files.write(&path, b"one".to_vec()).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "one").unwrap();
        assert_eq!(files.look(), [""; 0]);
    }

    #[test]
    fn what_comes_before_a_file_to_come_is_kept_and_what_was_there_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        let mut files = WholeFiles::default();
        std::fs::write(&a, "of an earlier start").unwrap();
        files.expect(a.clone());
        files.expect(b.clone());
        std::fs::write(&b, "theirs").unwrap();
        assert_eq!(files.look(), [""; 0]);
        assert_eq!(files.write(&a, b"one".to_vec()).unwrap(), None);
        assert!(files.write(&b, b"one".to_vec()).unwrap().unwrap().ends_with("b.other"));
        assert_eq!(text(&folder.path().join("b.other")), "theirs");
        // One that was never looked at is of an earlier start, if it is a file.
        let (c, d) = (folder.path().join("c"), folder.path().join("d"));
        std::fs::write(&c, "of an earlier start").unwrap();
        std::fs::create_dir(&d).unwrap();
        assert_eq!(files.write(&c, b"one".to_vec()).unwrap(), None);
        assert!(files.write(&d, b"one".to_vec()).unwrap().is_some());
    }

    #[test]
    fn what_cannot_be_written_again_is_told_once_and_tried_later() {
        let folder = tempfile::tempdir().unwrap();
        let (inner, away) = (folder.path().join("inner"), folder.path().join("away"));
        std::fs::create_dir(&inner).unwrap();
        let path = inner.join("x.json");
        let mut files = WholeFiles::default();
        files.write(&path, b"one".to_vec()).unwrap();
        std::fs::rename(&inner, &away).unwrap();
        assert!(files.look()[0].contains("it cannot be written again (No such file or directory"));
        assert_eq!(files.look(), [""; 0]);
        std::fs::create_dir(&inner).unwrap();
        files.try_again();
        assert_eq!(files.look().len(), 1);
        assert_eq!(text(&path), "one");
    }

    #[test]
    fn a_folder_that_is_made_again_gets_all_files_and_nothing_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let (at, moved) = (folder.path().join("at"), folder.path().join("moved"));
        std::fs::create_dir(&at).unwrap();
        let mut files = WholeFiles::default();
        for name in ["a", "b"] {
            files.write(&at.join(name), name.into()).unwrap();
        }
        files.keep(&at.join("c"), b"c".to_vec());
        std::fs::rename(&at, &moved).unwrap();
        std::fs::create_dir(&at).unwrap();
        files.write(&at.join("a"), b"A".to_vec()).unwrap();
        files.write_all().unwrap();
        let names = |of: &Path| std::fs::read_dir(of).unwrap().count();
        assert_eq!((names(&at), names(&moved)), (3, 2));
        assert_eq!(["a", "b", "c"].map(|name| text(&at.join(name))), ["A", "b", "c"]);
        // Where the run follows its folder, its files are those that it wrote.
        let mut files = WholeFiles::default();
        files.write(&moved.join("a"), b"a".to_vec()).unwrap();
        let last = folder.path().join("last");
        std::fs::rename(&moved, &last).unwrap();
        files.move_to(&moved, &last);
        assert_eq!(files.look(), [""; 0]);
    }

    #[test]
    fn temporary_files_that_were_left_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = WholeFiles::default();
        files.expect(folder.path().join("x.json"));
        for name in ["x.json.Ab12cd.tmp", "y.json.Ab12cd.tmp", "x.json.tmp", "x.json.Ab12cd"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        files.tidy(folder.path());
        let mut left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["x.json.Ab12cd", "x.json.tmp", "y.json.Ab12cd.tmp"]);
    }
}
