//! Which files a job's paths mean, and which of a folder are left out, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use fusionllm_protocol::content_hash;

use super::ReadableData;
use crate::DataError;

/// Folders that hold no text worth learning, even where no ignore file says so.
const SKIPPED_FOLDERS: [&str; 3] = ["target", "node_modules", "runs"];
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

/// All files that `paths` mean, each once, in the order of their paths.
pub(super) fn text_files(paths: &[PathBuf], left_out: &mut LeftOut) -> Result<Vec<TextFile>, DataError> {
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
        for entry in ignore::WalkBuilder::new(root).require_git(false).filter_entry(is_wanted).build() {
            let entry = entry.map_err(|e| fail(e.to_string()))?;
            let path = entry.into_path();
            taken.insert(path.clone());
            let Some(kind) = std::fs::symlink_metadata(&path).ok().map(|m| m.file_type()) else { continue };
            if kind.is_file() {
                let name = name_of(&path);
                files.entry(path.clone()).or_insert(TextFile { path, name, named: false });
            } else if kind.is_symlink() && path != *root {
                left_out.add("symbolic links", &name_of(&path));
            } else if !kind.is_dir() && !kind.is_symlink() {
                left_out.add("neither files nor folders", &name_of(&path));
            }
        }
        note_rules(root, &taken, paths, left_out, name_of);
    }
    Ok(once_each(files, left_out))
}

/// Says what hidden names, ignore files and the skipped folders leave out.
fn note_rules(
    root: &Path,
    taken: &BTreeSet<PathBuf>,
    named: &[PathBuf],
    left_out: &mut LeftOut,
    name_of: impl Fn(&Path) -> String,
) {
    let mut walk = ignore::WalkBuilder::new(root);
    walk.standard_filters(false).filter_entry(|entry| {
        // Of what is left out as a whole, the folder itself is enough.
        let parent = entry.path().parent();
        entry.depth() < 2 || parent.is_none_or(|parent| !is_hidden(parent) && !is_skipped(parent) && !is_run(parent))
    });
    for (count, entry) in walk.build().flatten().enumerate() {
        if count > MOST_ENTRIES {
            left_out.truncated = true;
            return;
        }
        let path = entry.path();
        let is_folder = entry.file_type().is_some_and(|t| t.is_dir());
        // Ignore files are there to be heeded, not to be learnt.
        let is_rule = path.file_name().is_some_and(|name| name == ".gitignore" || name == ".ignore");
        if entry.depth() == 0 || taken.contains(path) || named.iter().any(|n| n == path) || is_rule {
            continue;
        }
        let whole = is_folder && (is_hidden(path) || is_skipped(path) || is_run(path));
        if is_folder && !whole {
            continue;
        }
        let reason = if is_hidden(path) {
            "hidden"
        } else if whole && is_run(path) {
            "run directories of fusionllm"
        } else if whole {
            "folders named target, node_modules or runs"
        } else {
            "named in an ignore file"
        };
        left_out.add(reason, &name_of(path));
    }
}

fn is_wanted(entry: &ignore::DirEntry) -> bool {
    let is_folder = entry.file_type().is_some_and(|t| t.is_dir());
    !(entry.depth() > 0 && is_folder && (is_skipped(entry.path()) || is_run(entry.path())))
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

fn is_skipped(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| SKIPPED_FOLDERS.contains(&name))
}

/// Whether a folder is a run directory: it grows while it is read.
fn is_run(path: &Path) -> bool {
    path.join("job.json").is_file() && path.join("placement.json").is_file()
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

/// What a file holds.
pub(super) enum Content {
    /// Text without its byte order mark, and whether there was one.
    Text(String, bool),
    /// No text, and why.
    Other(&'static str, String),
}

/// Reads a file, if it may be read.
pub(super) fn read(path: &Path, readable: &ReadableData) -> Result<Content, DataError> {
    let fail = |reason: String| DataError::Path { path: path.to_owned(), reason };
    let mut bytes = Vec::new();
    let mut file = readable.open(path).map_err(|e| fail(e.to_string()))?;
    file.read_to_end(&mut bytes).map_err(|e| fail(e.to_string()))?;
    Ok(match String::from_utf8(bytes) {
        Ok(text) => match text.find('\0') {
            Some(at) => Content::Other("with NUL bytes", format!("it has a NUL byte at {at}, so it is no text")),
            None => match text.strip_prefix('\u{feff}') {
                Some(rest) => Content::Text(rest.to_owned(), true),
                None => Content::Text(text, false),
            },
        },
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            let bytes = error.as_bytes();
            match bytes {
                [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
                    Content::Other("UTF-16, expected UTF-8", "it is UTF-16, expected UTF-8 text".to_owned())
                }
                _ => Content::Other("not UTF-8 text", format!("not UTF-8 text (byte {at} is not)")),
            }
        }
    })
}
