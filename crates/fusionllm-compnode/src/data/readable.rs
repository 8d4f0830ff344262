//! What a CompNode's owner lets jobs read.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use fusionllm_protocol::DataSpec;
use fusionllm_transport::open_regular;

use crate::DataError;

/// The files and folders of this machine that jobs may read as data: nothing, unless its owner says so.
///
/// A job names paths on the machine of the data owner, and may come from somebody else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadableData {
    /// Without links and `..`; nothing: all that this process may read.
    allowed: Option<Vec<PathBuf>>,
}

/// Nothing may be read.
impl Default for ReadableData {
    fn default() -> Self {
        Self { allowed: Some(Vec::new()) }
    }
}

impl ReadableData {
    /// Everything that this process may read: for whoever reads files of his own.
    pub fn everything() -> Self {
        Self { allowed: None }
    }

    /// Files, and folders with all that lies in them.
    ///
    /// # Errors
    /// [`DataError::Unlisted`] for the first one that is not there, or is neither.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> Result<Self, DataError> {
        let real = |path: PathBuf| {
            let unlisted = |source| DataError::Unlisted { path: path.clone(), source };
            let real = path.canonicalize().map_err(unlisted)?;
            let metadata = real.metadata().map_err(unlisted)?;
            if metadata.is_file() || metadata.is_dir() {
                return Ok(real);
            }
            Err(unlisted(std::io::Error::other("it is neither a regular file nor a folder")))
        };
        Ok(Self { allowed: Some(paths.into_iter().map(real).collect::<Result<_, _>>()?) })
    }

    /// Holds the paths of a job's data, tokenizer and chat template against what may be read. Links and `..` are followed first.
    ///
    /// # Errors
    /// [`DataError::NotReadable`] that names the job's key and the path. It does not tell whether anything is there.
    pub(crate) fn check(&self, spec: &DataSpec) -> Result<(), DataError> {
        for path in &spec.path {
            self.check_path("data.path", path)?;
        }
        spec.tokenizer_file().map_or(Ok(()), |path| self.check_path("data.tokenizer", path))?;
        spec.chat_template.as_ref().map_or(Ok(()), |path| self.check_path("data.chat_template", path))
    }

    fn check_path(&self, key: &'static str, path: &Path) -> Result<(), DataError> {
        if self.allowed.is_none() {
            return Ok(());
        }
        if path.canonicalize().is_ok_and(|real| self.holds(&real)) {
            return Ok(());
        }
        // What is missing in a folder that may be read is said by whoever opens it.
        let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
        if parent.is_some_and(|real| self.holds(&real)) && path.symlink_metadata().is_err() {
            return Ok(());
        }
        Err(DataError::NotReadable { key, path: path.to_owned() })
    }

    fn holds(&self, real: &Path) -> bool {
        self.allowed.as_ref().is_none_or(|allowed| allowed.iter().any(|allowed| real.starts_with(allowed)))
    }

    /// Opens a file. What is opened is held against what may be read, and not what lay at the path some time before: a
    /// folder on the way may have been replaced by a link.
    ///
    /// # Errors
    /// Whatever the system says, or that it is no regular file or lies elsewhere.
    pub(super) fn open(&self, path: &Path) -> std::io::Result<File> {
        let file = open_regular(path)?;
        if self.allowed.is_some() && !self.holds(&real_path(&file, path)?) {
            let reason = "it lies in no folder that jobs may read on this machine";
            return Err(std::io::Error::new(ErrorKind::PermissionDenied, reason));
        }
        Ok(file)
    }
}

/// Where an open file lies, without links.
#[cfg(target_os = "linux")]
fn real_path(file: &File, _path: &Path) -> std::io::Result<PathBuf> {
    use std::os::fd::AsRawFd;
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Where an open file lies, as far as its path still leads to it.
#[cfg(not(target_os = "linux"))]
fn real_path(_file: &File, path: &Path) -> std::io::Result<PathBuf> {
    path.canonicalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(path: &Path, tokenizer: &str) -> DataSpec {
        DataSpec {
            path: vec![path.to_owned()],
            format: fusionllm_protocol::DataFormat::Text,
            column: DataSpec::TEXT_COLUMN.to_owned(),
            rows: fusionllm_protocol::RowKind::Documents,
            chat_template: None,
            order: None,
            cache: false,
            tokenizer: tokenizer.to_owned(),
            seq_len: 8,
            eval_fraction: 0.1,
            owner: None,
            private: false,
            private_seed: None,
            keep_blocks: [0; 2],
            mean: None,
            std: None,
            crop_padding: 0,
            flip: false,
        }
    }

    #[test]
    fn only_what_the_owner_named_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let (open, closed) = (folder.path().join("open"), folder.path().join("closed"));
        std::fs::create_dir_all(open.join("deep")).unwrap();
        std::fs::create_dir(&closed).unwrap();
        for file in [open.join("deep/a.txt"), closed.join("id_ed25519"), closed.join("tokenizer.json")] {
            std::fs::write(file, "x").unwrap();
        }
        let readable = ReadableData::new([open.clone(), closed.join("tokenizer.json")]).unwrap();
        let allows = |path: &str, tokenizer: &str| readable.check(&spec(&open.join(path), tokenizer)).is_ok();
        for path in ["", "deep", "deep/a.txt", "deep/../deep", "missing.txt"] {
            assert!(allows(path, "bytes"), "{path}");
        }
        for path in ["..", "../closed", "../closed/id_ed25519", "deep/../../closed", "../open2", "../missing"] {
            assert!(!allows(path, "bytes"), "{path}");
        }
        assert!(allows("deep", closed.join("tokenizer.json").to_str().unwrap()));
        // Of a template elsewhere it is not told whether it is there, nor whether it is one.
        for name in ["id_ed25519", "missing"] {
            let template = DataSpec { chat_template: Some(closed.join(name)), ..spec(&open, "bytes") };
            let error = readable.check(&template).unwrap_err().to_string();
            assert!(error.starts_with("data.chat_template ") && error.contains("--data DIR"), "{error}");
        }
        let error = readable.check(&spec(&open, closed.join("id_ed25519").to_str().unwrap())).unwrap_err();
        assert!(
            error.to_string().starts_with("data.tokenizer ") && error.to_string().contains("--data DIR"),
            "{error}"
        );
        assert!(readable.check(&spec(Path::new("/proc/self/environ"), "bytes")).is_err());
        assert!(ReadableData::default().check(&spec(&open, "bytes")).is_err());
        assert!(ReadableData::new([folder.path().join("none")]).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn links_do_not_lead_out() {
        let folder = tempfile::tempdir().unwrap();
        let (open, closed) = (folder.path().join("open"), folder.path().join("closed"));
        std::fs::create_dir(&open).unwrap();
        std::fs::create_dir(&closed).unwrap();
        std::os::unix::fs::symlink(&closed, open.join("out")).unwrap();
        std::os::unix::fs::symlink(closed.join("later"), open.join("nowhere")).unwrap();
        std::os::unix::fs::symlink(&open, folder.path().join("in")).unwrap();
        let readable = ReadableData::new([open.clone()]).unwrap();
        let allows = |path: PathBuf| readable.check(&spec(&path, "bytes")).is_ok();
        assert!(!allows(open.join("out")) && !allows(open.join("out/x")) && !allows(open.join("nowhere")));
        assert!(allows(folder.path().join("in")));
    }

    /// The check sees a folder, and what is opened is a link that has taken its place.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_folder_that_becomes_a_link_after_the_check_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (open, closed) = (folder.path().join("open"), folder.path().join("closed"));
        for parent in [open.join("deep"), closed.clone()] {
            std::fs::create_dir_all(&parent).unwrap();
            std::fs::write(parent.join("a.txt"), "x").unwrap();
        }
        let readable = ReadableData::new([open.clone()]).unwrap();
        let file = open.join("deep/a.txt");
        readable.check(&spec(&file, "bytes")).unwrap();
        readable.open(&file).unwrap();
        std::fs::rename(open.join("deep"), open.join("moved")).unwrap();
        std::os::unix::fs::symlink(&closed, open.join("deep")).unwrap();
        let error = readable.open(&file).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(ReadableData::everything().open(&file).is_ok());
    }
}
