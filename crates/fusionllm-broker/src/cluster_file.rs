//! Cluster files: machines and links to plan by.

use std::path::Path;

use fusionllm_graph::{in_plain_words, read_value};
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
    let file: ClusterFile = toml::from_str(&text).map_err(|e| fail(one_line(&e, &text)))?;
    let cluster = file.resolve().map_err(|e| fail(e.to_string()))?;
    let stem = || path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok((if file.name.is_empty() { stem() } else { file.name }, cluster))
}

/// A TOML error in one line, with the place, and with the key if the text is TOML.
fn one_line(error: &toml::de::Error, text: &str) -> String {
    let first = error.to_string();
    let place = first.lines().next().unwrap_or_default().to_owned();
    if place.contains(error.message()) {
        return place;
    }
    let value = text.parse::<toml::Table>().ok().map(toml::Value::Table);
    let in_key = value.and_then(|value| read_value::<ClusterFile, _>(value).err());
    format!("{place}: {}", in_key.unwrap_or_else(|| in_plain_words("", error.message())))
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
        for (text, said) in [
            ("name = 5\n", "line 1, column 8: `name` is 5, expected a string"),
            ("[device]\nname = \"a\"\n", "`device` is an object, expected a list"),
            (
                "[[device]]\nname = \"a\"\nflop_per_s = \"x\"\n",
                "`device[0].flop_per_s` is the string \"x\", expected a number",
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = read_cluster(&path).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        for (latency, mbit, said) in
            [("-1", "1", "latency_ms is -1, expected"), ("0", "0", "mbit_per_s is 0, expected")]
        {
            let link = format!("[[link]]\nfrom = \"*\"\nto = \"*\"\nlatency_ms = {latency}\nmbit_per_s = {mbit}\n");
            std::fs::write(&path, format!("{device}{link}")).unwrap();
            let error = read_cluster(&path).unwrap_err().to_string();
            assert!(error.contains("link `*` to `*`: ") && error.contains(said), "{error}");
        }
        assert!(read_cluster(&folder.path().join("none.toml")).unwrap_err().to_string().contains("not readable"));
    }
}
