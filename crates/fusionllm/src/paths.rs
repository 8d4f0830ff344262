//! Where things are kept by default.

use std::path::{Path, PathBuf};

use crate::exit::bad_input;

/// The state folder: as given, else `$XDG_STATE_HOME/fusionllm`, else `~/.local/state/fusionllm`.
///
/// # Errors
/// None is given, and the environment names no home or a relative one, which every working directory would have
/// elsewhere.
pub(crate) fn state_dir(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(dir) = given {
        return Ok(dir.to_owned());
    }
    for (name, below) in [("XDG_STATE_HOME", "fusionllm"), ("HOME", ".local/state/fusionllm")] {
        let Some(base) = std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from) else { continue };
        if base.is_relative() {
            return Err(bad_input(format!("{name} is {base:?}, expected an absolute path; or give --state DIR")));
        }
        return Ok(base.join(below));
    }
    Err(bad_input("no HOME is set to keep state in, give a folder with --state"))
}
