//! Removing folders of checkpoints: what a run has written in them, and nothing else.

use std::fs::DirEntry;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use fusionllm_protocol::Manifest;
use fusionllm_transport::{if_usable, read_regular_text, remove_if_there, temporary_of};

use super::names::{LEFTOVER, MANIFEST, MARK, PARTIAL, REMOVED, step_name, step_of};
use crate::files::{free_name, io_error};

/// Names that are listed in a sentence.
const NAMED: usize = 3;
/// How often a folder is looked through in which files still appear.
const ATTEMPTS: usize = 10;

/// What became of folders that were to be removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Removal {
    /// Why some could not be.
    pub(crate) failures: Vec<String>,
    /// Where files that the run did not write are kept, as sentences.
    pub(crate) leftovers: Vec<String>,
}

impl Removal {
    /// Removes a folder of a checkpoint that is not wanted any more, or was never whole. Whether it is gone.
    pub(crate) fn remove(&mut self, folder: &Path) -> bool {
        let removed = out_of_reach(folder).map_err(|error| (folder.to_owned(), error));
        let removed = removed.and_then(|place| empty(&place, folder).map_err(|error| (place, error)));
        match removed {
            Ok(leftover) => {
                self.leftovers.extend(leftover);
                true
            }
            Err((place, error)) => {
                self.failures.push(io_error(&place, error).to_string());
                false
            }
        }
    }

    /// What is in a folder; nothing if it is not there. What else keeps it from being looked at is a failure.
    pub(super) fn entries(&mut self, folder: &Path) -> Vec<DirEntry> {
        match std::fs::read_dir(folder) {
            Ok(entries) => entries.flatten().collect(),
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    self.failures.push(io_error(folder, error).to_string());
                }
                Vec::new()
            }
        }
    }

    /// Takes in what became of others.
    pub(crate) fn add(&mut self, other: Self) {
        self.failures.extend(other.failures);
        self.leftovers.extend(other.leftovers);
    }
}

/// Gives a folder in which shards are gathered a name under which none comes any more. By this name, too, it is known as
/// the run's: what cannot be removed now the next start removes.
fn out_of_reach(folder: &Path) -> std::io::Result<PathBuf> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    if !name.contains(PARTIAL) || name.contains(REMOVED) {
        return Ok(folder.to_owned());
    }
    let place = free_name(folder, REMOVED);
    std::fs::rename(folder, &place)?;
    Ok(place)
}

/// Removes what the run wrote in a folder, and the folder if nothing else is in it. Otherwise it stays under a name that
/// is no checkpoint's, and what is given says so.
pub(super) fn remove(folder: &Path) -> std::io::Result<Option<String>> {
    empty(folder, folder)
}

/// The same for a folder that was called `before`.
fn empty(folder: &Path, before: &Path) -> std::io::Result<Option<String>> {
    let written = Written::of(folder)?;
    // The manifest first, so that half of a checkpoint is never taken for a whole; the mark last, so that what a crash
    // leaves can still be told to be ours.
    remove_if_there(&folder.join(MANIFEST))?;
    let mut attempts = 1..ATTEMPTS;
    let mut others = loop {
        let others = remove_written(folder, &written)?;
        remove_if_there(&folder.join(MARK))?;
        if !others.is_empty() {
            break others;
        }
        match std::fs::remove_dir(folder) {
            // Who had the folder at hand before it got its name has just made a file in it.
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty && attempts.next().is_some() => {}
            result => return result.map(|()| None),
        }
    };
    others.sort();
    let name = before.file_name().unwrap_or_default().to_string_lossy();
    let step = name.split('.').next().and_then(step_of).map_or_else(|| name.clone().into_owned(), step_name);
    let to = free_name(&folder.with_file_name(step), LEFTOVER);
    std::fs::rename(folder, &to)?;
    let (folder, to, named) = (before.display(), to.display(), named(&others));
    Ok(Some(format!(
        "{folder} was removed, but for what the run did not write ({named}): that is kept in {to}, which is no checkpoint"
    )))
}

/// Removes the files in a folder that the run has written, but for the mark. Gives the names of all others.
fn remove_written(folder: &Path, written: &Written) -> std::io::Result<Vec<String>> {
    let mut others = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == MARK {
            continue;
        }
        if written.has(&name) && !entry.file_type()?.is_dir() {
            std::fs::remove_file(entry.path())?;
        } else {
            others.push(name);
        }
    }
    Ok(others)
}

fn named(names: &[String]) -> String {
    let mut listed: Vec<String> = names.iter().take(NAMED).map(|name| format!("`{name}`")).collect();
    if names.len() > NAMED {
        listed.push(format!("{} more", names.len() - NAMED));
    }
    listed.join(", ")
}

/// Which files of a folder a run has written.
enum Written {
    /// Those that its manifest lists.
    Listed(Vec<String>),
    /// Without a manifest, those with names of ours.
    ByForm,
}

impl Written {
    fn of(folder: &Path) -> std::io::Result<Self> {
        let text = if_usable(read_regular_text(&folder.join(MANIFEST)))?;
        let manifest = text.and_then(|text| Manifest::from_json(&text).ok());
        Ok(manifest.map_or(Self::ByForm, |manifest| {
            let shards = manifest.shards.into_iter().map(|shard| shard.file);
            Self::Listed(shards.chain(manifest.carried.iter().map(|carried| carried.file())).collect())
        }))
    }

    fn has(&self, name: &str) -> bool {
        if let Some(of) = temporary_of(name) {
            return of == MANIFEST || has_our_form(of);
        }
        match self {
            Self::Listed(names) => names.iter().any(|listed| listed == name),
            Self::ByForm => has_our_form(name),
        }
    }
}

/// Whether a shard or a carried file could have this name.
fn has_our_form(name: &str) -> bool {
    let shard = name.strip_prefix("shard-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    shard.is_some_and(is_number) || (name.starts_with("carried-") && name.ends_with(".json"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fusionllm_transport::{FileMode, temporary_for};

    #[test]
    fn temporary_names_are_told_by_what_they_are_for() {
        let folder = tempfile::tempdir().unwrap();
        let temporary = temporary_for(&folder.path().join("shard-3.safetensors"), FileMode::Shared).unwrap();
        let name = temporary.path().file_name().unwrap().to_str().unwrap();
        assert!(Written::ByForm.has(name), "{name}");
        for name in
            ["shard-.safetensors", "shard-x.safetensors", "notes.Ab12Cd.tmp", "shard-1.safetensors.tmp", "x.json"]
        {
            assert!(!Written::ByForm.has(name), "{name}");
        }
        assert!(!Written::Listed(vec!["shard-0.safetensors".to_owned()]).has("shard-1.safetensors"));
    }
}
