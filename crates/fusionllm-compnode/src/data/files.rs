//! Which files a job's paths mean, and which of a folder are left out, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use fusionllm_protocol::content_hash;
use fusionllm_transport::is_shortage;

use super::Reading;
use crate::DataError;

/// Folders that hold no text worth learning, even where no ignore file says so.
pub(super) const WITHOUT_TEXT: &[&str] = &["target", "node_modules", "runs"];
/// What a folder that a run writes to holds meanwhile.
const LOCK: &str = "fusionllm.lock";
/// Why a file or folder is left out that cannot be looked at.
pub(super) const UNREADABLE: &str = "unreadable";
/// Left-out files that are named in a sentence.
const NAMED: usize = 3;
/// Entries that are looked at to say what a folder's rules leave out.
const MOST_ENTRIES: usize = 100_000;

/// One file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TextFile {
    pub(super) path: PathBuf,
    /// Its path below the folder that the job names, or its file name.
    pub(super) name: String,
    /// Whether the job names the file itself.
    pub(super) named: bool,
}

/// What was left out, by the reason.
#[derive(Debug, Default)]
pub(super) struct LeftOut {
    by_reason: BTreeMap<&'static str, Vec<String>>,
    private: bool,
    truncated: bool,
}

impl LeftOut {
    /// Nothing yet. Where data is private, names do not leave its owner.
    pub(super) fn new(private: bool) -> Self {
        Self { private, ..Self::default() }
    }

    pub(super) fn add(&mut self, reason: &'static str, name: &str) {
        let name = shown(name, self.private);
        self.by_reason.entry(reason).or_default().push(name);
    }

    /// A sentence for each reason.
    pub(super) fn notes(&self) -> Vec<String> {
        let note = |(reason, names): (&&str, &Vec<String>)| {
            let mut listed: Vec<String> = names.iter().take(NAMED).map(|name| format!("`{name}`")).collect();
            if names.len() > NAMED {
                listed.push(format!("{} more", names.len() - NAMED));
            }
            let what = if names.len() == 1 { "file or folder" } else { "files or folders" };
            let least = if self.truncated { "at least " } else { "" };
            format!("left out of the data: {least}{} {what}, {reason}: {}", names.len(), listed.join(", "))
        };
        self.by_reason.iter().map(note).collect()
    }
}

/// A file's name for people; of private data only what tells files apart.
pub(super) fn shown(name: &str, private: bool) -> String {
    if private { format!("file-{}", content_hash(name.as_bytes())) } else { name.to_owned() }
}

/// All files that `paths` mean, each once, in the order of their paths. Folders with a name of `skipped` are left out.
pub(super) fn text_files(
    paths: &[PathBuf],
    skipped: &'static [&'static str],
    left_out: &mut LeftOut,
    reading: &Reading,
) -> Result<Vec<TextFile>, DataError> {
    let mut files: BTreeMap<PathBuf, TextFile> = BTreeMap::new();
    for root in paths {
        let fail = |reason: String| DataError::Path { path: root.clone(), reason };
        if root.as_os_str().is_empty() {
            return Err(fail("is empty, expected the path of a file or folder".to_owned()));
        }
        let kind = std::fs::metadata(root).map_err(|e| fail(e.to_string()))?;
        if kind.is_file() {
            let name = root.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.insert(root.clone(), TextFile { path: root.clone(), name, named: true });
            continue;
        }
        if !kind.is_dir() {
            return Err(fail("is neither a file nor a folder".to_owned()));
        }
        let prefix = if paths.len() > 1 { root.file_name().map(Path::new) } else { None };
        let name_of = |path: &Path| {
            let below = path.strip_prefix(root).unwrap_or(path);
            prefix.map_or_else(|| below.to_owned(), |prefix| prefix.join(below)).to_string_lossy().into_owned()
        };
        let mut taken = BTreeSet::new();
        for entry in walk(root, skipped) {
            reading.moved(1)?;
            let path = match entry {
                Ok(entry) => entry.into_path(),
                Err(error) => {
                    if error.io_error().is_some_and(is_shortage) {
                        let source = error.into_io_error().unwrap_or_else(unknown);
                        return Err(DataError::Unopened { what: "data.path", source });
                    }
                    unreadable(&error, root, left_out, name_of).map_err(fail)?;
                    continue;
                }
            };
            taken.insert(path.clone());
            let Ok(kind) = std::fs::symlink_metadata(&path).map(|m| m.file_type()) else {
                left_out.add(UNREADABLE, &name_of(&path));
                continue;
            };
            if kind.is_file() {
                let name = name_of(&path);
                files.entry(path.clone()).or_insert(TextFile { path, name, named: false });
            } else if kind.is_symlink() && path != *root {
                left_out.add("symbolic links", &name_of(&path));
            } else if !kind.is_dir() && !kind.is_symlink() {
                left_out.add("neither files nor folders", &name_of(&path));
            }
        }
        note_rules(root, &taken, paths, (skipped, left_out), name_of);
    }
    Ok(once_each(files, left_out))
}

/// What is below a folder. Only ignore files in it count: with those of its parents and of its user, the same folder would
/// give other batches elsewhere.
fn walk(root: &Path, skipped: &'static [&'static str]) -> ignore::Walk {
    let mut walk = ignore::WalkBuilder::new(root);
    walk.require_git(false)
        .parents(false)
        .git_global(false)
        .git_exclude(false)
        .filter_entry(|entry| is_wanted(entry, skipped))
        .build()
}

fn unknown() -> std::io::Error {
    std::io::ErrorKind::Other.into()
}

/// Leaves out what cannot be looked at, unless that is the folder itself; then, why. What the error says of paths stays here.
fn unreadable(
    error: &ignore::Error,
    root: &Path,
    left_out: &mut LeftOut,
    name_of: impl Fn(&Path) -> String,
) -> Result<(), String> {
    let path = path_of(error).unwrap_or(root);
    if path == root {
        return Err(error.io_error().map_or_else(|| "cannot be read".to_owned(), ToString::to_string));
    }
    left_out.add(UNREADABLE, &name_of(path));
    Ok(())
}

fn path_of(error: &ignore::Error) -> Option<&Path> {
    match error {
        ignore::Error::WithPath { path, .. } => Some(path),
        ignore::Error::Loop { child, .. } => Some(child),
        ignore::Error::WithDepth { err, .. } | ignore::Error::WithLineNumber { err, .. } => path_of(err),
        ignore::Error::Partial(errors) => errors.iter().find_map(path_of),
        _ => None,
    }
}

/// Says what hidden names, ignore files and the skipped folders leave out.
fn note_rules(
    root: &Path,
    taken: &BTreeSet<PathBuf>,
    named: &[PathBuf],
    (skipped, left_out): (&'static [&'static str], &mut LeftOut),
    name_of: impl Fn(&Path) -> String,
) {
    let mut walk = ignore::WalkBuilder::new(root);
    walk.standard_filters(false).filter_entry(move |entry| {
        // Of what is left out as a whole, the folder itself is enough.
        let parent = entry.path().parent();
        entry.depth() < 2
            || parent.is_none_or(|parent| !is_hidden(parent) && !is_skipped(parent, skipped) && !is_run(parent))
    });
    for (count, entry) in walk.build().flatten().enumerate() {
        if count > MOST_ENTRIES {
            left_out.truncated = true;
            return;
        }
        let path = entry.path();
        let is_folder = entry.file_type().is_some_and(|t| t.is_dir());
        // Ignore files are there to be heeded, and locks to be held, not to be learnt.
        let is_rule = path.file_name().is_some_and(|name| [".gitignore", ".ignore", LOCK].iter().any(|n| name == *n));
        if entry.depth() == 0 || taken.contains(path) || named.iter().any(|n| n == path) || is_rule {
            continue;
        }
        let whole = is_folder && (is_hidden(path) || is_skipped(path, skipped) || is_run(path));
        if is_folder && !whole {
            continue;
        }
        let reason = if is_hidden(path) {
            "hidden"
        } else if whole && is_run(path) {
            "run directories and checkpoints of fusionllm"
        } else if whole {
            "folders named target, node_modules or runs"
        } else {
            "named in an ignore file"
        };
        left_out.add(reason, &name_of(path));
    }
}

fn is_wanted(entry: &ignore::DirEntry, skipped: &[&str]) -> bool {
    let path = entry.path();
    let is_folder = entry.file_type().is_some_and(|t| t.is_dir());
    if is_folder {
        return entry.depth() == 0 || !(is_skipped(path, skipped) || is_run(path));
    }
    // A run directory may have come up since its folder was looked at: its lock comes before all that is written in it.
    let is_of_run = entry.depth() > 1 && path.parent().is_some_and(is_run);
    entry.depth() == 0 || !(entry.file_name() == LOCK || is_of_run)
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

fn is_skipped(path: &Path, skipped: &[&str]) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| skipped.contains(&name))
}

/// Whether a folder is a run directory or a checkpoint, or becomes one: those come and grow while they are read.
fn is_run(path: &Path) -> bool {
    path.join(LOCK).is_file()
        || path.join("run.id").is_file()
        || path.join("job.json").is_file() && path.join("placement.json").is_file()
}

/// Leaves out files that are there already under another path.
fn once_each(files: BTreeMap<PathBuf, TextFile>, left_out: &mut LeftOut) -> Vec<TextFile> {
    let mut seen = BTreeSet::new();
    let mut once = Vec::new();
    for file in files.into_values() {
        let real = std::fs::canonicalize(&file.path).unwrap_or_else(|_| file.path.clone());
        if seen.insert(real) {
            once.push(file);
        } else {
            left_out.add("read already under another path", &file.name);
        }
    }
    once
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::data::ReadableData;
    use crate::data::text::{Content, look_at};

    fn names(root: &Path, left_out: &mut LeftOut) -> Vec<String> {
        text_files(&[root.to_owned()], WITHOUT_TEXT, left_out, &Reading::default())
            .unwrap()
            .into_iter()
            .map(|file| file.name)
            .collect()
    }

    #[test]
    fn a_folder_gives_the_same_files_wherever_it_lies() {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("data");
        std::fs::create_dir_all(root.join("deep")).unwrap();
        std::fs::create_dir_all(root.join(".git/info")).unwrap();
        std::fs::create_dir_all(outside.path().join(".git/info")).unwrap();
        let write = |name: &str, text: &str| std::fs::write(outside.path().join(name), text).unwrap();
        for rules in [".gitignore", ".ignore", ".git/info/exclude"] {
            write(rules, "*.txt\n");
        }
        // Of whoever cloned it, and not of the folder.
        write("data/.git/info/exclude", "*.txt\n");
        write("data/.gitignore", "*.log\n");
        for name in ["data/a.txt", "data/deep/b.txt", "data/c.log"] {
            write(name, "text");
        }
        let mut left_out = LeftOut::default();
        assert_eq!(names(&root, &mut left_out), ["a.txt", "deep/b.txt"]);
        assert!(left_out.notes().join("\n").contains("named in an ignore file: `c.log`"), "{left_out:?}");
    }

    #[test]
    fn what_cannot_be_read_is_left_out_and_private_names_stay() {
        let root = Path::new("/home/secret");
        let denied = |path: &Path| {
            let err = Box::new(ignore::Error::Io(io::Error::from(io::ErrorKind::PermissionDenied)));
            let err = Box::new(ignore::Error::WithPath { path: path.to_owned(), err });
            ignore::Error::WithDepth { depth: 1, err }
        };
        let name_of = |path: &Path| path.strip_prefix(root).unwrap().display().to_string();
        for private in [false, true] {
            let mut left_out = LeftOut::new(private);
            unreadable(&denied(&root.join("patients")), root, &mut left_out, name_of).unwrap();
            let notes = left_out.notes().join("\n");
            assert!(notes.contains("1 file or folder, unreadable: `"), "{notes}");
            assert_eq!(notes.contains("patients"), !private);
            let reason = unreadable(&denied(root), root, &mut left_out, name_of).unwrap_err();
            assert_eq!(reason, "permission denied");
        }
        let Content::Other { kind: UNREADABLE, reason } =
            look_at(&root.join("patients/one.txt"), &ReadableData::everything(), &Reading::default()).unwrap()
        else {
            panic!()
        };
        assert!(!reason.contains("patients"), "{reason}");
    }

    #[cfg(unix)]
    #[test]
    fn an_unreadable_folder_or_file_does_not_end_the_job() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.txt"), "text").unwrap();
        let shut = folder.path().join("shut");
        std::fs::create_dir(&shut).unwrap();
        std::fs::set_permissions(&shut, PermissionsExt::from_mode(0o000)).unwrap();
        // Who runs as root may read all.
        let may_read = std::fs::read_dir(&shut).is_ok();
        let mut left_out = LeftOut::default();
        assert_eq!(names(folder.path(), &mut left_out), ["a.txt"]);
        assert_eq!(left_out.notes().join("\n").contains("unreadable: `shut`"), !may_read);
        std::fs::set_permissions(&shut, PermissionsExt::from_mode(0o700)).unwrap();
    }
}
