//! Where things are kept by default.

use std::path::{Path, PathBuf};

use crate::exit::bad_input;

/// The state folder: as given, else `$XDG_STATE_HOME/fusionllm`, else `~/.local/state/fusionllm`.
pub(crate) fn state_dir(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(dir) = given {
        return Ok(dir.to_owned());
    }
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("XDG_STATE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".local/state")))
        .map(|base| base.join("fusionllm"))
        .ok_or_else(|| bad_input("no HOME is set to keep state in, give a folder with --state"))
}
