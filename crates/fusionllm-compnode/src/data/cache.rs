//! Tokens on the data owner's disk: for files that are larger than memory, and for the next time the same data is read.
//!
//! An entry is a folder that is named by what its tokens follow from: the contents of the data files and of the tokenizer,
//! and the keys of the job. It comes into being under another name, and is there as a whole or not at all.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use fusionllm_protocol::{ContentHasher, FileFingerprint};
use fusionllm_transport::{is_shortage, make_private_dir, read_regular};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::{Reading, Tokens};
use crate::DataError;

/// A folder for tokens instead of the user's cache.
const FOLDER_VARIABLE: &str = "FUSIONLLM_TOKEN_CACHE";
/// Grows with every change of what entries hold, and of what tokens follow from.
const VERSION: u32 = 1;
/// An entry that was not used for so long is removed when another is made.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);
/// What is left of a run that was killed, after so long.
const LEFT_OVER: Duration = Duration::from_secs(24 * 3600);
/// How entries that are being made are called.
const UNFINISHED: &str = ".new-";
/// Bytes that are read at once.
const PART_BYTES: usize = 1 << 20;
/// What an entry says of itself.
const META: &str = "tokens.json";
/// Training and evaluation tokens, and where conversations begin in them.
const FILES: [&str; 4] = ["train.bin", "eval.bin", "train-rows.bin", "eval-rows.bin"];

/// What was found in the data when it became tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Found {
    /// About how many bytes of the text can be had back from its tokens.
    pub(super) told_bytes: f64,
    /// Its bytes.
    pub(super) text_bytes: u64,
    /// What the user must know of it.
    pub(super) notes: Vec<String>,
}

/// Everything of a corpus that comes from the contents of files.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Kept {
    pub(super) train: Tokens,
    pub(super) eval: Tokens,
    /// Where conversations begin, in training and evaluation tokens, if the rows are conversations.
    pub(super) rows: Option<[Vec<u64>; 2]>,
    pub(super) files: Vec<FileFingerprint>,
    pub(super) found: Found,
}

#[derive(Serialize, Deserialize)]
struct Meta {
    version: u32,
    key: String,
    parts: Vec<Part>,
    has_rows: bool,
    files: Vec<FileFingerprint>,
    found: Found,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct Part {
    /// Bytes of a number.
    width: usize,
    count: usize,
    hash: String,
}

/// The folder of entries.
#[derive(Clone, Debug)]
pub(super) struct TokenCache {
    folder: PathBuf,
}

impl TokenCache {
    /// The user's, or why there is none.
    pub(super) fn open() -> Result<Self, String> {
        let home = || std::env::home_dir().map(|home| home.join(".cache"));
        let user = || std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
        let own = || Some(user()?.join("fusionllm").join("tokens"));
        let folder = std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from).or_else(own);
        Self::at(folder.ok_or("there is no home folder")?)
    }

    pub(super) fn at(folder: PathBuf) -> Result<Self, String> {
        make_private_dir(&folder).map_err(|error| error.to_string())?;
        Ok(Self { folder })
    }

    fn entry(&self, key: &str) -> PathBuf {
        self.folder.join(key)
    }

    /// The entry of this key. Its files are read once, to see that they are whole.
    ///
    /// # Errors
    /// Why there is an entry that cannot be used, as the inner error; [`DataError::Stopped`]; [`DataError::Cache`] if the
    /// entry could not be looked at, which says nothing of it.
    pub(super) fn find(&self, key: &str, reading: &Reading) -> Result<Result<Option<Kept>, String>, DataError> {
        let folder = self.entry(key);
        let meta = match read_regular(&folder.join(META)) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !folder.exists() => return Ok(Ok(None)),
            Err(error) => return unusable(&folder.join(META), error).map(|reason| Err(format!("{META}: {reason}"))),
        };
        let Ok(meta) = serde_json::from_slice::<Meta>(&meta) else { return Ok(Err(format!("{META} is not readable"))) };
        if (meta.version, meta.key.as_str()) != (VERSION, key) || meta.parts.len() != FILES.len() {
            return Ok(Err(format!("{META} is of other tokens")));
        }
        let mut open = Vec::new();
        for (part, name) in meta.parts.iter().zip(FILES) {
            match whole(&folder.join(name), part, reading)? {
                Ok(file) => open.push((folder.join(name), file)),
                Err(reason) => return Ok(Err(format!("{name} {reason}"))),
            }
        }
        // So that it is known when it was used the last time. An entry that cannot be touched is made anew some day.
        let touched = File::options().append(true).open(folder.join(META));
        let _ = touched.and_then(|file| file.set_modified(SystemTime::now()));
        Ok(match kept(meta, open) {
            Ok(kept) => Ok(Some(kept)),
            Err(error) => Err(unusable(&folder, error)?),
        })
    }

    /// Begins an entry.
    pub(super) fn begin(&self, key: &str, entries: usize) -> Result<NewEntry, DataError> {
        self.prune();
        let fail = |error: std::io::Error| DataError::cache(&self.folder, error);
        let mut made = tempfile::Builder::new();
        made.prefix(UNFINISHED);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            made.permissions(std::fs::Permissions::from_mode(0o700));
        }
        let folder = made.tempdir_in(&self.folder).map_err(fail)?;
        let tokens = |name: &str| Tokens::in_file(&folder.path().join(name), entries);
        let (train, eval) = (tokens(FILES[0])?, tokens(FILES[1])?);
        Ok(NewEntry { train, eval, folder, place: self.entry(key), key: key.to_owned() })
    }

    /// Removes what was not used for long. What cannot be removed stays, and so does what is no entry: the folder may be
    /// one that holds other things.
    fn prune(&self) {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let Some(name) = name.to_str() else { continue };
            let is_old = if name.starts_with(UNFINISHED) {
                is_of_entry(&path) && age(&path).is_some_and(|age| age > LEFT_OVER)
            } else {
                meta_of(&path).is_some_and(|key| key == name) && age(&path.join(META)).is_some_and(|age| age > KEPT)
            };
            if is_old {
                let _ = std::fs::remove_dir_all(path);
            }
        }
    }
}

/// An entry that is being made.
pub(super) struct NewEntry {
    pub(super) train: Tokens,
    pub(super) eval: Tokens,
    folder: TempDir,
    place: PathBuf,
    key: String,
}

impl NewEntry {
    /// Puts the entry in its place: that of a damaged one too. Where another process was faster, its tokens are as good.
    pub(super) fn finish(
        self,
        rows: Option<&[Vec<u64>; 2]>,
        files: &[FileFingerprint],
        found: &Found,
    ) -> Result<(), DataError> {
        let fail = |error: std::io::Error| DataError::cache(&self.place, error);
        let mut parts = Vec::new();
        for tokens in [&self.train, &self.eval] {
            let (width, count, hash) = tokens.finish()?;
            parts.push(Part { width, count, hash });
        }
        for (name, split) in FILES[2..].iter().zip(0..) {
            let rows = rows.map_or(&[][..], |rows: &[Vec<u64>; 2]| rows[split].as_slice());
            let bytes: Vec<u8> = rows.iter().flat_map(|start| start.to_le_bytes()).collect();
            std::fs::write(self.folder.path().join(name), &bytes).map_err(fail)?;
            let hash = fusionllm_protocol::content_hash(&bytes);
            parts.push(Part { width: 8, count: rows.len(), hash });
        }
        let files: Vec<FileFingerprint> =
            files.iter().map(|file| FileFingerprint { name: String::new(), ..file.clone() }).collect();
        let (key, has_rows, found) = (self.key.clone(), rows.is_some(), found.clone());
        let meta = Meta { version: VERSION, key, parts, has_rows, files, found };
        let text = serde_json::to_vec(&meta).map_err(|error| fail(error.into()))?;
        std::fs::write(self.folder.path().join(META), text).map_err(fail)?;
        match std::fs::remove_dir_all(&self.place) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
        let made = self.folder.keep();
        if std::fs::rename(&made, &self.place).is_err() {
            let _ = std::fs::remove_dir_all(made);
        }
        Ok(())
    }
}

/// Since when a file, or a folder with all that lies in it, has not changed.
fn age(path: &Path) -> Option<Duration> {
    let mut newest = path.metadata().ok()?.modified().ok()?;
    if path.is_dir() {
        for entry in std::fs::read_dir(path).ok()? {
            newest = newest.max(entry.ok()?.metadata().ok()?.modified().ok()?);
        }
    }
    newest.elapsed().ok()
}

/// Whether nothing lies in a folder that no entry has.
fn is_of_entry(folder: &Path) -> bool {
    let stem = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    let is_ours = |name: &str| name == META || FILES.iter().any(|file| stem(name) == stem(file));
    let Ok(mut entries) = std::fs::read_dir(folder) else { return false };
    entries.all(|entry| entry.is_ok_and(|entry| entry.file_name().to_str().is_some_and(is_ours)))
}

/// The key that an entry of any version says it has.
fn meta_of(folder: &Path) -> Option<String> {
    let meta: serde_json::Value = serde_json::from_slice(&read_regular(&folder.join(META)).ok()?).ok()?;
    Some(meta.get("key")?.as_str()?.to_owned())
}

/// What is wrong with a file of an entry.
///
/// # Errors
/// [`DataError::Cache`] if the process had run out of something: the file may be as good as ever.
fn unusable(path: &Path, error: std::io::Error) -> Result<String, DataError> {
    if is_shortage(&error) { Err(DataError::cache(path, error)) } else { Ok(error.to_string()) }
}

/// Opens a file of numbers if it is what was written.
fn whole(path: &Path, part: &Part, reading: &Reading) -> Result<Result<File, String>, DataError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return Ok(Err(unusable(path, error)?)),
    };
    let (mut hash, mut bytes, mut size) = (ContentHasher::default(), Vec::new(), 0u64);
    loop {
        bytes.clear();
        match file.by_ref().take(PART_BYTES as u64).read_to_end(&mut bytes) {
            Ok(0) => break,
            Ok(read) => size += read as u64,
            Err(error) => return Ok(Err(unusable(path, error)?)),
        }
        hash.update(&bytes);
        reading.moved(bytes.len())?;
    }
    let is_whole = size == (part.width as u64).saturating_mul(part.count as u64) && hash.finish() == part.hash;
    Ok(if is_whole && [2, 4, 8].contains(&part.width) { Ok(file) } else { Err("is not what was written".to_owned()) })
}

fn kept(meta: Meta, open: Vec<(PathBuf, File)>) -> std::io::Result<Kept> {
    let mut parts = open.into_iter().zip(&meta.parts);
    let mut tokens = || {
        let ((path, file), part) = parts.next().ok_or(std::io::ErrorKind::NotFound)?;
        Ok::<_, std::io::Error>(Tokens::of_file(&path, file, part.width, part.count))
    };
    let (train, eval) = (tokens()?, tokens()?);
    let mut starts = Vec::new();
    for ((path, _), _) in parts {
        let bytes = std::fs::read(path)?;
        starts.push(bytes.as_chunks().0.iter().map(|&start| u64::from_le_bytes(start)).collect());
    }
    let rows = <[Vec<u64>; 2]>::try_from(starts).ok().filter(|_| meta.has_rows);
    Ok(Kept { train, eval, rows, files: meta.files, found: meta.found })
}

#[cfg(all(test, unix))]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn an_entry_is_not_damaged_because_files_cannot_be_opened_now() {
        let failed = |errno: Errno| unusable(Path::new("train.bin"), errno.into());
        for errno in [Errno::MFILE, Errno::NFILE] {
            let said = failed(errno).unwrap_err().to_string();
            assert!(said.contains("train.bin: Too many open files"), "{said}");
        }
        assert!(failed(Errno::NOENT).unwrap().starts_with("No such file"));
    }
}
