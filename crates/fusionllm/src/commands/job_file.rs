//! Reads a job file.

use std::path::Path;

use fusionllm_protocol::JobSpec;

use crate::exit::bad_input;

/// Reads, overrides, resolves and checks a job. Relative paths in it are relative to its folder.
pub(super) fn read(path: &Path, overrides: &[String]) -> anyhow::Result<JobSpec> {
    let fail = |reason: &dyn std::fmt::Display| bad_input(format!("{}: {reason}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| fail(&e))?;
    let mut spec = JobSpec::from_toml(&text, overrides).map_err(|e| fail(&e))?;
    let absolute = std::path::absolute(path).map_err(|e| fail(&e))?;
    if let Some(folder) = absolute.parent() {
        spec.resolve_paths(folder);
    }
    spec.validate().map_err(|e| fail(&e))?;
    Ok(spec)
}
