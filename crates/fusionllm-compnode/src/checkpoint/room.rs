//! Room for shards.

use std::path::Path;

/// Bytes that are free where a folder lies, if the system tells.
#[cfg(unix)]
pub(crate) fn free_room(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(unix))]
pub(crate) fn free_room(_folder: &Path) -> Option<u64> {
    None
}
