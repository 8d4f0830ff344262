//! Strings of a job that become file names or stand in tables and logs.

use std::path::Path;

use super::refusal::fail;
use crate::JobError;
use crate::text::is_deceptive;

/// Most characters of a job's name: it stands in tables, and with a time behind it names the run directory.
const MAX_NAME_CHARS: usize = 64;
/// Most bytes of it in UTF-8: file systems bound the bytes of a name at 255.
const MAX_NAME_BYTES: usize = 192;
/// Most bytes of a path; Linux takes no longer ones.
const MAX_PATH_BYTES: usize = 4096;

/// A name that a directory can have on any machine and that looks like what it is.
pub(super) fn check_name(key: &str, name: &str) -> Result<(), JobError> {
    let refuse = |expected: &str| fail(key, format!("is {name:?}, expected {expected}"));
    let (chars, bytes) = (name.chars().count(), name.len());
    if chars > MAX_NAME_CHARS || bytes > MAX_NAME_BYTES {
        let most = format!("expected at most {MAX_NAME_CHARS} characters and {MAX_NAME_BYTES} bytes");
        return fail(key, format!("has {chars} characters ({bytes} bytes in UTF-8), {most}"));
    }
    if name.contains(['/', '\\']) {
        return refuse("a plain name without path separators");
    }
    if name.trim().is_empty() || name.starts_with('.') {
        return refuse("a name with a visible character, and no dot in front");
    }
    if name.starts_with('-') {
        return refuse("a name that no command takes for an option, so no `-` in front");
    }
    if name.trim() != name {
        return refuse("a name without blanks at its ends");
    }
    if name.chars().any(is_invisible) {
        return refuse("visible characters only");
    }
    Ok(())
}

/// A path that the file system can be asked for.
pub(super) fn check_path(key: &str, path: &Path) -> Result<(), JobError> {
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.trim_ascii().is_empty() {
        return fail(key, "is empty, expected a path".to_owned());
    }
    if bytes.len() > MAX_PATH_BYTES {
        return fail(key, format!("has {} bytes, expected a path of at most {MAX_PATH_BYTES}", bytes.len()));
    }
    if bytes.contains(&0) {
        return fail(key, format!("is {:?}, expected a path without the character NUL", path.display().to_string()));
    }
    Ok(())
}

/// What is cleaned out of peers' text, and the two joiners, which only change how others are shown.
fn is_invisible(c: char) -> bool {
    is_deceptive(c) || matches!(c, '\u{200c}' | '\u{200d}')
}
