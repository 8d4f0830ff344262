//! The folder of an export: it holds one model, whole, and nothing else.

use std::path::{Path, PathBuf};

use fusionllm_transport::read_regular_text;

use crate::ExportError;

/// Says whose export a folder holds. It is written first, so that what an interrupted export leaves is known too.
const MARK: &str = "fusionllm-export.json";
/// What an export may write besides; `config.json` makes it a model to others.
const FILES: [&str; 6] = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
];
/// What a file is called until it is whole.
pub(super) const PARTIAL: &str = ".partial";

/// A folder that is new, empty, or holds an earlier export and nothing else.
#[derive(Debug)]
pub struct ExportFolder {
    path: PathBuf,
    /// Whose export is there.
    holds: Option<String>,
}

impl ExportFolder {
    /// Looks at a folder without changing it.
    ///
    /// # Errors
    /// [`ExportError`] if it is none, cannot be looked at, or holds something else.
    pub fn look(path: &Path) -> Result<Self, ExportError> {
        let io = |source| ExportError::Io { path: path.to_owned(), source };
        // Links to nowhere count: nothing can be made at their place.
        let above = path.ancestors().find(|above| above.symlink_metadata().is_ok());
        if let Some(above) = above.filter(|above| !above.is_dir()) {
            return Err(ExportError::NoFolder { path: above.to_owned() });
        }
        let mut export = Self { path: path.to_owned(), holds: None };
        if !path.exists() {
            return Ok(export);
        }
        let mut first: Option<String> = None;
        for entry in std::fs::read_dir(path).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let known = name.strip_suffix(PARTIAL).unwrap_or(&name);
            let is_ours = known == MARK || FILES.contains(&known);
            if !is_ours || entry.file_type().map_err(io)?.is_dir() {
                return Err(ExportError::Holds { path: path.to_owned(), what: name });
            }
            if first.as_ref().is_none_or(|first| name < *first) {
                first = Some(name);
            }
        }
        let Some(first) = first else { return Ok(export) };
        let mark = read_regular_text(&path.join(MARK)).ok();
        let mark = mark.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
        export.holds = mark.and_then(|mark| Some(mark.get("of")?.as_str()?.to_owned()));
        // A mark that was cut short has nothing but itself beside it.
        if export.holds.is_none() && !first.starts_with(MARK) {
            return Err(ExportError::Holds { path: path.to_owned(), what: first });
        }
        Ok(export)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the folder for an export of `of`, and whatever of an earlier one is there out of it.
    ///
    /// # Errors
    /// [`ExportError`] if it holds the export of something else, or cannot be written.
    pub(super) fn take(&self, of: &str) -> Result<(), ExportError> {
        if let Some(other) = self.holds.as_ref().filter(|holds| *holds != of) {
            return Err(ExportError::Other { path: self.path.clone(), other: other.clone(), of: of.to_owned() });
        }
        let io = |path: &Path, source| ExportError::Io { path: path.to_owned(), source };
        std::fs::create_dir_all(&self.path).map_err(|e| io(&self.path, e))?;
        let mark = format!("{:#}\n", serde_json::json!({ "of": of }));
        super::hugging_face::write_text(&self.path.join(MARK), &mark)?;
        // config.json goes first: without it the folder is not taken for a model.
        for name in FILES.into_iter().flat_map(|name| [name.to_owned(), format!("{name}{PARTIAL}")]) {
            let path = self.path.join(name);
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(&path, e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether an earlier export of `of` is there, which a new one replaces.
    pub fn holds_export_of(&self, of: &str) -> bool {
        self.holds.as_ref().is_some_and(|holds| holds == of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(path: &Path, word: &str) {
        let error = ExportFolder::look(path).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains(word), "{error}");
    }

    #[test]
    fn a_folder_takes_one_export_and_again_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/hf");
        for again in [false, true] {
            let export = ExportFolder::look(&path).unwrap();
            assert_eq!(export.holds_export_of("run 1"), again);
            export.take("run 1").unwrap();
            assert_eq!(std::fs::read_dir(&path).unwrap().count(), 1, "nothing of an earlier one stays");
            for name in ["config.json", "special_tokens_map.json", "model.safetensors.partial"] {
                std::fs::write(path.join(name), "x").unwrap();
            }
        }
        let error = ExportFolder::look(&path).unwrap().take("run 2").unwrap_err().to_string();
        assert!(error.contains("run 1") && error.contains("run 2"), "{error}");
        assert!(path.join("config.json").exists());
        std::fs::write(path.join("model-00001-of-00002.safetensors"), "x").unwrap();
        fails(&path, "`model-00001-of-00002.safetensors`");
    }

    #[test]
    fn what_is_not_known_to_be_an_export_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        std::fs::write(&file, "{}").unwrap();
        fails(folder.path(), "`config.json`");
        fails(&file, "is no folder");
        fails(&file.join("below"), "config.json is no folder");
        std::fs::remove_file(&file).unwrap();
        std::fs::write(folder.path().join(MARK), "{").unwrap();
        ExportFolder::look(folder.path()).unwrap().take("run 1").unwrap();
    }
}
