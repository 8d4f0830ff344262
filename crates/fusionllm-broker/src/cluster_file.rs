//! Cluster files: machines and links to plan by.

use std::path::Path;

use fusionllm_graph::in_plain_words;
use fusionllm_planner::{Cluster, ClusterFile};
use fusionllm_transport::read_regular_text;

use crate::BrokerError;
use crate::files::named_error;

/// Reads a cluster file: its name, or if it has none that of the file, and what it describes.
///
/// # Errors
/// [`BrokerError::ClusterFile`] that names the file, and the place where it is wrong; bad input.
pub fn read_cluster(path: &Path) -> Result<(String, Cluster), BrokerError> {
    let fail = |reason: String| BrokerError::ClusterFile { path: path.to_owned(), reason };
    let text = read_regular_text(path).map_err(|e| named_error(path, e, |e| fail(format!("not readable: {e}"))))?;
    let file: ClusterFile = toml::from_str(&text).map_err(|e| fail(one_line(&e)))?;
    let cluster = file.resolve().map_err(|e| fail(e.to_string()))?;
    let stem = || path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok((if file.name.is_empty() { stem() } else { file.name }, cluster))
}

/// A TOML error in one line, with the place.
fn one_line(error: &toml::de::Error) -> String {
    let first = error.to_string();
    let place = first.lines().next().unwrap_or_default().to_owned();
    if place.contains(error.message()) {
        return place;
    }
    format!("{place}: {}", in_plain_words("", error.message()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_file_is_read_or_the_place_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("two.toml");
        let device = "[[device]]\nname = \"a\"\nflop_per_s = 1e9\n";
        std::fs::write(&path, device).unwrap();
        let (name, cluster) = read_cluster(&path).unwrap();
        assert_eq!((name.as_str(), cluster.compnodes.len()), ("two", 1));
        std::fs::write(&path, format!("{device}speed = 1\n")).unwrap();
        let error = read_cluster(&path).unwrap_err();
        assert!(error.is_bad_input());
        assert!(error.to_string().contains("two.toml") && error.to_string().contains("line 4"), "{error}");
        assert!(read_cluster(&folder.path().join("none.toml")).unwrap_err().to_string().contains("not readable"));
    }
}
