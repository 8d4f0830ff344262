//! Where on its machine a broker reads and writes for those who submit jobs.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use fusionllm_protocol::JobSpec;

use crate::BrokerError;

/// The folders that a broker reads and writes for others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Where checkpoints may go.
    pub(crate) checkpoints: Vec<PathBuf>,
    /// Where models and cluster files may lie.
    pub(crate) models: Vec<PathBuf>,
}

impl Reach {
    /// Holds a job's paths on the broker's machine against the folders. The broker's `own` user may have any file read
    /// that the broker can read; where checkpoints go is said when the broker starts, whoever submits.
    pub(crate) fn check(&self, spec: &JobSpec, own: bool) -> Result<(), BrokerError> {
        if let Some(path) = &spec.checkpoint.to {
            require("checkpoint.to", path, &self.checkpoints, "write checkpoints to", "--checkpoints")?;
        }
        if own {
            return Ok(());
        }
        let read = [
            ("model.path", &spec.model.path),
            ("lora.adapter", &spec.lora.adapter),
            ("placement.cluster", &spec.placement.cluster),
        ];
        for (key, path) in read.into_iter().filter_map(|(key, path)| Some((key, path.as_ref()?))) {
            require(key, path, &self.models, "read models and cluster files from", "--models")?;
        }
        Ok(())
    }
}

fn require(
    key: &'static str,
    path: &Path,
    folders: &[PathBuf],
    purpose: &'static str,
    option: &'static str,
) -> Result<(), BrokerError> {
    // A folder that is given but not there yet is the one that its name says.
    let folders = folders.iter().filter_map(|folder| resolve(folder));
    let lies_within = |real: PathBuf| folders.into_iter().any(|folder| real.starts_with(folder));
    if resolve(path).is_some_and(lies_within) {
        return Ok(());
    }
    Err(BrokerError::OutOfReach { key, path: path.to_owned(), purpose, option })
}

/// The path without links and `..`, of which the last parts need not exist. Nothing if that cannot be told.
fn resolve(path: &Path) -> Option<PathBuf> {
    if !path.is_absolute() {
        return None;
    }
    let mut missing: Vec<OsString> = Vec::new();
    for ancestor in path.ancestors() {
        match ancestor.canonicalize() {
            Ok(real) => return Some(missing.into_iter().rev().fold(real, |path, part| path.join(part))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                // A link to nowhere would be followed once its target is there.
                if ancestor.symlink_metadata().is_ok() {
                    return None;
                }
                match ancestor.components().next_back()? {
                    Component::Normal(part) => missing.push(part.to_owned()),
                    _ => return None,
                }
            }
            Err(_) => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn spec(key: &str, path: &Path) -> JobSpec {
        let mut spec = testing::spec(&[]);
        match key {
            "checkpoint.to" => spec.checkpoint.to = Some(path.to_owned()),
            "model.path" => {
                spec.model = fusionllm_protocol::ModelSpec { path: Some(path.to_owned()), ..Default::default() };
            }
            _ => spec.placement.cluster = Some(path.to_owned()),
        }
        spec
    }

    #[test]
    fn paths_lie_in_the_folders_that_were_given() {
        let folder = tempfile::tempdir().unwrap();
        let (inside, outside) = (folder.path().join("in"), folder.path().join("out"));
        std::fs::create_dir_all(inside.join("deep")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        let reach = Reach { checkpoints: vec![inside.clone()], models: vec![inside.clone()] };
        let allows = |key: &str, path: &Path| reach.check(&spec(key, path), false).is_ok();
        for key in ["checkpoint.to", "model.path", "placement.cluster"] {
            for path in ["", "deep", "deep/new/er", "deep/../deep/x"] {
                assert!(allows(key, &inside.join(path)), "{key} {path}");
            }
            for path in ["..", "../out", "deep/../../out/x", "new/../../out", "../in2"] {
                assert!(!allows(key, &inside.join(path)), "{key} {path}");
            }
            assert!(!allows(key, &outside.join("x")));
            assert!(!allows(key, Path::new("/etc/passwd")));
            assert!(!allows(key, Path::new("in/x")), "relative to what?");
        }
        let error = reach.check(&spec("checkpoint.to", &outside), true).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains("`broker --checkpoints DIR`"), "{error}");
        let error = reach.check(&spec("model.path", &outside), false).unwrap_err().to_string();
        assert!(error.contains("`broker --models DIR`"), "{error}");
        assert!(reach.check(&spec("model.path", &outside), true).is_ok(), "the broker's own user reads what he likes");
    }

    #[cfg(unix)]
    #[test]
    fn links_do_not_lead_out() {
        let folder = tempfile::tempdir().unwrap();
        let (inside, outside) = (folder.path().join("in"), folder.path().join("out"));
        std::fs::create_dir(&inside).unwrap();
        std::fs::create_dir(&outside).unwrap();
        for (link, to) in [("out", &outside), ("nowhere", &folder.path().join("later")), ("self", &inside)] {
            std::os::unix::fs::symlink(to, inside.join(link)).unwrap();
        }
        let reach = Reach { checkpoints: vec![inside.clone()], models: Vec::new() };
        let allows = |path: &str| reach.check(&spec("checkpoint.to", &inside.join(path)), true).is_ok();
        assert!(!allows("out/x") && !allows("nowhere/x") && !allows("nowhere") && allows("self/x"));
    }
}
