//! The folder of an export: it holds one model, whole, and nothing else.

use std::fs::{File, TryLockError};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use fusionllm_protocol::hugging_face::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARRIED, CONFIG, WEIGHTS};
use fusionllm_transport::{
    if_usable, no_folder_above, open_or_make_regular, read_regular_text, remove_if_there, sync_folder,
};

use crate::{ExportError, ShardError};

/// Says whose export a folder holds. It is written first, so that what an interrupted export leaves is known too.
const MARK: &str = "fusionllm-export.json";
/// What makes a folder a model, or adapters of one, to others.
const HEADS: [&str; 2] = [CONFIG, ADAPTER_CONFIG];

/// What an export may write besides: weights, and what it keeps of the folder that the model came from.
fn others() -> impl Iterator<Item = &'static str> {
    [WEIGHTS, ADAPTER_WEIGHTS].into_iter().chain(CARRIED).filter(|name| !HEADS.contains(name))
}

/// All that an export may write.
fn files() -> impl Iterator<Item = &'static str> {
    HEADS.into_iter().chain(others())
}

/// What a file is called until it is whole.
const PARTIAL: &str = ".partial";
/// What a file of an earlier export is called until the new one is whole.
const EARLIER: &str = ".earlier";

/// A folder that is new, empty, or holds an earlier export and nothing else.
#[derive(Debug)]
pub struct ExportFolder {
    path: PathBuf,
    /// Whose export is there.
    holds: Option<String>,
}

/// A folder to which one export is written, and no other meanwhile.
#[derive(Debug)]
pub(super) struct TakenFolder {
    path: PathBuf,
    /// Locked until the export is whole.
    _mark: File,
    /// What is written, in that order.
    written: Vec<&'static str>,
    /// Whether what was written is, with an earlier export gone, all there is.
    is_replacing: bool,
}

impl ExportFolder {
    /// Looks at a folder without changing it.
    ///
    /// # Errors
    /// [`ExportError`] if it is none, cannot be looked at, or holds something else.
    pub fn look(path: &Path) -> Result<Self, ExportError> {
        let io = |source| ExportError::Io { path: path.to_owned(), source };
        if let Some(above) = no_folder_above(path) {
            return Err(ExportError::NoFolder { path: above.to_owned() });
        }
        let mut export = Self { path: path.to_owned(), holds: None };
        if !path.exists() {
            return Ok(export);
        }
        let mut beside_mark: Option<String> = None;
        for entry in std::fs::read_dir(path).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let whole = name.strip_suffix(PARTIAL).or(name.strip_suffix(EARLIER)).unwrap_or(&name);
            let is_ours = name == MARK || files().any(|file| file == whole);
            // A link may lead to a file of somebody else.
            if !is_ours || !entry.file_type().map_err(io)?.is_file() {
                return Err(ExportError::Holds { path: path.to_owned(), what: name });
            }
            if name != MARK && beside_mark.as_ref().is_none_or(|first| name < *first) {
                beside_mark = Some(name);
            }
        }
        let mark = if_usable(read_regular_text(&path.join(MARK))).map_err(io)?;
        let mark = mark.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
        export.holds = mark.and_then(|mark| Some(mark.get("of")?.as_str()?.to_owned()));
        // The mark is written first, so one that was cut short has nothing beside it.
        match beside_mark {
            Some(what) if export.holds.is_none() => Err(ExportError::Holds { path: path.to_owned(), what }),
            _ => Ok(export),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the folder for an export of `of`. What an earlier one left stays until the new one is whole.
    ///
    /// # Errors
    /// [`ExportError`] if it holds the export of something else by now, another export writes to it, or it cannot be
    /// written.
    pub(super) fn take(&self, of: &str) -> Result<TakenFolder, ExportError> {
        let io = |path: &Path, source| ExportError::Io { path: path.to_owned(), source };
        // Before anything is made there, and again once nobody else writes.
        Self::look(&self.path)?.check(of)?;
        std::fs::create_dir_all(&self.path).map_err(|e| io(&self.path, e))?;
        let path = self.path.join(MARK);
        let mut mark = open_or_make_regular(&path).map_err(|e| io(&path, e))?;
        self.check_lock(mark.try_lock())?;
        let now = Self::look(&self.path)?;
        now.check(of)?;
        if now.holds.is_none() {
            let text = format!("{:#}\n", serde_json::json!({ "of": of }));
            let written = mark.set_len(0).and_then(|()| mark.write_all(text.as_bytes()));
            written.and_then(|()| mark.sync_all()).map_err(|e| io(&path, e))?;
        }
        Ok(TakenFolder { path: self.path.clone(), _mark: mark, written: Vec::new(), is_replacing: false })
    }

    /// Whether nobody else writes there, by what became of the attempt to lock its mark.
    fn check_lock(&self, locked: Result<(), TryLockError>) -> Result<(), ExportError> {
        match locked {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(ExportError::Busy { path: self.path.clone() }),
            // As over some network mounts: nobody is kept out.
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {
                tracing::warn!(path = %self.path.display(), "the file system knows no locks");
                Ok(())
            }
            Err(TryLockError::Error(source)) => Err(ExportError::Io { path: self.path.join(MARK), source }),
        }
    }

    fn check(&self, of: &str) -> Result<(), ExportError> {
        match self.holds.as_ref().filter(|holds| *holds != of) {
            Some(other) => Err(ExportError::Other { path: self.path.clone(), other: other.clone(), of: of.to_owned() }),
            None => Ok(()),
        }
    }

    /// Whether an earlier export of `of` is there, which a new one replaces.
    pub fn holds_export_of(&self, of: &str) -> bool {
        self.holds.as_ref().is_some_and(|holds| holds == of)
    }
}

impl TakenFolder {
    /// Writes a file under a temporary name and syncs it.
    ///
    /// # Errors
    /// [`ShardError`] with the name that the file will have.
    pub(super) fn write(
        &mut self,
        name: &'static str,
        write: impl FnOnce(&mut BufWriter<File>) -> Result<(), ShardError>,
    ) -> Result<(), ShardError> {
        let path = self.path.join(name);
        let io = |source| ShardError::Io { path: path.clone(), source };
        let temporary = self.temporary(name);
        // What an interrupted export left, or whatever has come there since: it is never written through.
        remove_if_there(&temporary).map_err(io)?;
        let mut out = BufWriter::new(File::create_new(&temporary).map_err(io)?);
        write(&mut out)?;
        out.into_inner().map_err(|e| e.into_error()).and_then(|file| file.sync_all()).map_err(io)?;
        self.written.push(name);
        Ok(())
    }

    /// Gives all files that were written their names, in the place of those of an earlier export. Without
    /// `config.json` or `adapter_config.json`, the first to go and the last to come, the folder is not taken for a model: whatever happens
    /// meanwhile, it holds the earlier export, this one, or none, and never a mixture.
    ///
    /// # Errors
    /// [`ShardError`] if the system refuses. An earlier export is whole again then; without one, what was written stays.
    pub(super) fn finish(mut self) -> Result<(), ShardError> {
        let is_whole = HEADS.iter().any(|name| self.path.join(name).is_file());
        self.is_replacing = true;
        // What an interrupted one left.
        self.remove_earlier()?;
        let mut renamed = Vec::new();
        if let Err(error) = self.replace(&mut renamed) {
            if is_whole {
                let back = |(from, to): (PathBuf, PathBuf)| std::fs::rename(to, from);
                self.is_replacing = renamed.into_iter().rev().try_for_each(back).is_err();
            }
            return Err(error);
        }
        self.remove_earlier()
    }

    /// Puts the new files in the place of the earlier ones, which are kept beside them, and lists what was renamed.
    fn replace(&self, renamed: &mut Vec<(PathBuf, PathBuf)>) -> Result<(), ShardError> {
        let io = |path: &Path, source| ShardError::Io { path: path.to_owned(), source };
        let sync = |path: &Path| sync_folder(path).map_err(|e| io(path, e));
        let mut rename = |from: PathBuf, to: PathBuf, path: &Path| -> Result<(), ShardError> {
            std::fs::rename(&from, &to).map_err(|e| io(path, e))?;
            renamed.push((from, to));
            Ok(())
        };
        for head in HEADS {
            let path = self.path.join(head);
            if path.symlink_metadata().is_ok() {
                rename(path.clone(), self.earlier(head), &path)?;
            }
        }
        // On the disk, too, nothing may come before this.
        sync(&self.path)?;
        for name in others() {
            let path = self.path.join(name);
            if path.symlink_metadata().is_ok_and(|found| !found.is_dir()) {
                rename(path.clone(), self.earlier(name), &path)?;
            }
            if self.written.contains(&name) {
                rename(self.temporary(name), path.clone(), &path)?;
            } else {
                remove_if_there(&path).map_err(|e| io(&path, e))?;
            }
        }
        sync(&self.path)?;
        for head in HEADS.into_iter().filter(|head| self.written.contains(head)) {
            let path = self.path.join(head);
            rename(self.temporary(head), path.clone(), &path)?;
        }
        sync(&self.path)
    }

    /// Removes what an earlier export left under its temporary names, and those of this one that are not used.
    fn remove_earlier(&self) -> Result<(), ShardError> {
        let unused = files().filter(|name| !self.written.contains(name)).map(|name| self.temporary(name));
        for path in files().map(|name| self.earlier(name)).chain(unused) {
            remove_if_there(&path).map_err(|source| ShardError::Io { path, source })?;
        }
        Ok(())
    }

    fn earlier(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{EARLIER}"))
    }

    fn temporary(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{PARTIAL}"))
    }
}

impl Drop for TakenFolder {
    /// What was not finished leaves nothing but an earlier export; once that has begun to go, what was written is all there
    /// is, and stays.
    fn drop(&mut self) {
        if self.is_replacing {
            return;
        }
        for name in files() {
            // What cannot be removed is known to be left over.
            let _ = std::fs::remove_file(self.temporary(name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(path: &Path, word: &str) {
        let error = ExportFolder::look(path).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains(word), "{error}");
    }

    fn names(path: &Path) -> Vec<String> {
        let names = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    fn write(taken: &mut TakenFolder, name: &'static str, text: &str) {
        let io = |source| ShardError::Io { path: PathBuf::new(), source };
        taken.write(name, |out| out.write_all(text.as_bytes()).map_err(io)).unwrap();
    }

    #[test]
    fn an_export_replaces_an_earlier_one_of_the_same_once_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/hf");
        let read = |name: &str| std::fs::read_to_string(path.join(name)).unwrap();
        let mut taken = ExportFolder::look(&path).unwrap().take("run 1").unwrap();
        write(&mut taken, "config.json", "old");
        write(&mut taken, "special_tokens_map.json", "old");
        taken.finish().unwrap();
        assert_eq!(names(&path), ["config.json", MARK, "special_tokens_map.json"]);

        let export = ExportFolder::look(&path).unwrap();
        assert!(export.holds_export_of("run 1"));
        let mut taken = export.take("run 1").unwrap();
        let busy = export.take("run 1").unwrap_err();
        assert!(matches!(busy, ExportError::Busy { .. }), "{busy}");
        write(&mut taken, "model.safetensors", "new");
        assert_eq!((read("config.json"), names(&path).len()), ("old".to_owned(), 4));
        // It fails on the way.
        drop(taken);
        assert_eq!((read("config.json"), names(&path).len()), ("old".to_owned(), 3));

        let mut taken = export.take("run 1").unwrap();
        write(&mut taken, "config.json", "new");
        write(&mut taken, "model.safetensors", "new");
        taken.finish().unwrap();
        assert_eq!(names(&path), ["config.json", MARK, "model.safetensors"]);
        assert_eq!(read("config.json"), "new");

        let error = ExportFolder::look(&path).unwrap().take("run 2").unwrap_err().to_string();
        assert!(error.contains("run 1") && error.contains("run 2"), "{error}");
        std::fs::write(path.join("model-00001-of-00002.safetensors"), "x").unwrap();
        fails(&path, "`model-00001-of-00002.safetensors`");
    }

    /// The adapters of a run, and then the same run as a whole model.
    #[test]
    fn a_model_takes_the_place_of_its_adapters() {
        let folder = tempfile::tempdir().unwrap();
        let take = || ExportFolder::look(folder.path()).unwrap().take("run 1").unwrap();
        let mut taken = take();
        write(&mut taken, "adapter_model.safetensors", "old");
        write(&mut taken, "adapter_config.json", "old");
        taken.finish().unwrap();
        assert_eq!(names(folder.path()), ["adapter_config.json", "adapter_model.safetensors", MARK]);
        let mut taken = take();
        write(&mut taken, "model.safetensors", "new");
        write(&mut taken, "config.json", "new");
        taken.finish().unwrap();
        assert_eq!(names(folder.path()), ["config.json", MARK, "model.safetensors"]);
    }

    #[test]
    fn where_the_file_system_knows_no_locks_an_export_is_written_all_the_same() {
        let export = ExportFolder { path: PathBuf::from("hf"), holds: None };
        export.check_lock(Err(TryLockError::Error(ErrorKind::Unsupported.into()))).unwrap();
        let error = export.check_lock(Err(TryLockError::Error(ErrorKind::StorageFull.into()))).unwrap_err();
        assert!(error.to_string().contains(MARK), "{error}");
        assert!(matches!(export.check_lock(Err(TryLockError::WouldBlock)), Err(ExportError::Busy { .. })));
    }

    /// A disk error in the middle leaves no model, and what was written.
    #[test]
    fn an_export_that_cannot_be_finished_is_no_mixture_and_is_not_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hf");
        let export = ExportFolder::look(&path).unwrap();
        let mut taken = export.take("run 1").unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            write(&mut taken, name, "new");
        }
        // A folder that holds something is not replaced by a file.
        std::fs::create_dir_all(path.join("tokenizer.json/in the way")).unwrap();
        taken.finish().unwrap_err();
        let left = names(&path);
        let expected = ["config.json.partial", MARK, "model.safetensors", "tokenizer.json", "tokenizer.json.partial"];
        assert_eq!(left, expected);
        std::fs::remove_dir_all(path.join("tokenizer.json")).unwrap();
        let mut taken = ExportFolder::look(&path).unwrap().take("run 1").unwrap();
        write(&mut taken, "config.json", "new");
        taken.finish().unwrap();
        assert_eq!(names(&path), ["config.json", MARK]);
    }

    /// As where a file of it cannot be changed.
    #[test]
    fn an_export_that_cannot_be_replaced_stays_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hf");
        let mut taken = ExportFolder::look(&path).unwrap().take("run 1").unwrap();
        write(&mut taken, "config.json", "old");
        write(&mut taken, "model.safetensors", "old");
        taken.finish().unwrap();
        let mut taken = ExportFolder::look(&path).unwrap().take("run 1").unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            write(&mut taken, name, "new");
        }
        std::fs::create_dir_all(path.join("tokenizer.json/in the way")).unwrap();
        let error = taken.finish().unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && !error.contains("partial"), "{error}");
        assert_eq!(names(&path), ["config.json", MARK, "model.safetensors", "tokenizer.json"]);
        let read = |name: &str| std::fs::read_to_string(path.join(name)).unwrap();
        assert_eq!((read("config.json"), read("model.safetensors")), ("old".to_owned(), "old".to_owned()));
    }

    #[test]
    fn what_is_not_known_to_be_an_export_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        std::fs::write(&file, "{}").unwrap();
        fails(folder.path(), "`config.json`");
        fails(&file, "is no folder");
        fails(&file.join("below"), "config.json is no folder");
        std::fs::write(folder.path().join(MARK), "{").unwrap();
        fails(folder.path(), "`config.json`");
        std::fs::remove_file(&file).unwrap();
        drop(ExportFolder::look(folder.path()).unwrap().take("run 1").unwrap());
        assert!(ExportFolder::look(folder.path()).unwrap().holds_export_of("run 1"));
    }

    #[cfg(unix)]
    #[test]
    fn nothing_is_written_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let theirs = folder.path().join("theirs");
        std::fs::write(&theirs, "theirs").unwrap();
        let path = folder.path().join("hf");
        std::fs::create_dir(&path).unwrap();
        for name in [MARK, "config.json.partial"] {
            std::os::unix::fs::symlink(&theirs, path.join(name)).unwrap();
            fails(&path, name);
            std::fs::remove_file(path.join(name)).unwrap();
        }
        let mut taken = ExportFolder::look(&path).unwrap().take("run 1").unwrap();
        std::os::unix::fs::symlink(&theirs, path.join("config.json.partial")).unwrap();
        write(&mut taken, "config.json", "ours");
        taken.finish().unwrap();
        assert_eq!(std::fs::read_to_string(&theirs).unwrap(), "theirs");
        assert_eq!(std::fs::read_to_string(path.join("config.json")).unwrap(), "ours");
    }
}
