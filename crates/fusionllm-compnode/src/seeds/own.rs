//! The data owner's own seed: 32 random bytes, by run, in a file that is its owner's alone. It is never sent.

use std::path::Path;

use data_encoding::HEXLOWER_PERMISSIVE;
use fusionllm_protocol::RunId;
use fusionllm_transport::{FileMode, make_private_dir, read_private, write_whole};
use rand::TryRng;
use rand::rngs::SysRng;

use super::StreamSeed;
use crate::CompNodeError;

/// The folder of the files, in that of the CompNode's state.
const FOLDER: &str = "owner-seeds";

/// A seed that only the data owner has.
#[derive(Clone, PartialEq, Eq)]
pub struct OwnSeed([u8; 32]);

impl std::fmt::Debug for OwnSeed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OwnSeed(not shown)")
    }
}

impl OwnSeed {
    /// The seed of these bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The seed of one random stream, from which neither this one nor another stream's can be found: a keyed BLAKE3 hash
    /// of what the stream is for, each part ended by its length.
    pub(super) fn stream(&self, parts: &[&[u8]]) -> StreamSeed {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in parts {
            hasher.update(part);
            hasher.update(&(part.len() as u64).to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }
}

/// Whether a run's own seed was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// It is that of the steps before.
    Known,
    /// It was made now.
    New,
}

/// The own seed of a run, out of its file below `state`. Where there is none a run that begins with the checkpoint of another
/// one, `begins_with`, goes on with that one's; else one is made of random bytes of the operating system.
///
/// # Errors
/// [`CompNodeError::OwnSeed`] if the file cannot be read or written, is another's to read too, or has no seed in it.
pub(crate) fn find_or_make(
    state: &Path,
    run: &RunId,
    begins_with: Option<&RunId>,
) -> Result<(OwnSeed, Found), CompNodeError> {
    let folder = state.join(FOLDER);
    if let Some(seed) = read(&folder, run)? {
        return Ok((seed, Found::Known));
    }
    let before = begins_with.map_or(Ok(None), |before| read(&folder, before))?;
    let (bytes, found) = match before {
        Some(OwnSeed(bytes)) => (bytes, Found::Known),
        None => {
            let mut bytes = [0; 32];
            let failed = |e: rand::rngs::SysError| wrong(&folder, &format!("the system gives no random bytes: {e}"));
            SysRng.try_fill_bytes(&mut bytes).map_err(failed)?;
            (bytes, Found::New)
        }
    };
    let path = folder.join(run.as_str());
    make_private_dir(&folder).map_err(|e| wrong(&folder, &e.to_string()))?;
    let text = format!("{}\n", HEXLOWER_PERMISSIVE.encode(&bytes));
    write_whole(&path, text.as_bytes(), FileMode::Private).map_err(|e| wrong(&path, &e.to_string()))?;
    Ok((OwnSeed(bytes), found))
}

fn read(folder: &Path, run: &RunId) -> Result<Option<OwnSeed>, CompNodeError> {
    let path = folder.join(run.as_str());
    let Some(text) = read_private(&path).map_err(|e| wrong(&path, &e.to_string()))? else { return Ok(None) };
    let bytes = HEXLOWER_PERMISSIVE.decode(text.trim().as_bytes()).ok();
    let bytes: Option<[u8; 32]> = bytes.and_then(|bytes| bytes.try_into().ok());
    let bytes =
        bytes.ok_or_else(|| wrong(&path, "expected 64 hexadecimal digits; without the file a new one is made"))?;
    Ok(Some(OwnSeed(bytes)))
}

fn wrong(path: &Path, reason: &str) -> CompNodeError {
    CompNodeError::OwnSeed { path: path.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(byte: u8) -> RunId {
        RunId::from_bytes([byte; 16])
    }

    #[test]
    fn a_run_has_one_seed_and_a_new_run_with_its_checkpoint_has_the_same() {
        let state = tempfile::tempdir().unwrap();
        let find = |of: u8, before: Option<u8>| find_or_make(state.path(), &run(of), before.map(run).as_ref()).unwrap();
        let (first, found) = find(1, None);
        assert_eq!(found, Found::New);
        assert_eq!(find(1, None), (first.clone(), Found::Known));
        let (second, found) = find(2, None);
        assert!(first != second && found == Found::New);
        assert_eq!(find(3, Some(1)), (first.clone(), Found::Known));
        assert_eq!(find(2, Some(1)), (second, Found::Known), "what a run has stays");
        assert_eq!(find(4, Some(9)).1, Found::New);
        assert!(!format!("{first:?}").contains(&HEXLOWER_PERMISSIVE.encode(&first.0)));
    }

    #[cfg(unix)]
    #[test]
    fn the_file_is_its_owners_alone_and_another_form_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let state = tempfile::tempdir().unwrap();
        find_or_make(state.path(), &run(1), None).unwrap();
        let path = state.path().join(FOLDER).join(run(1).as_str());
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = find_or_make(state.path(), &run(1), None).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "00ff").unwrap();
        let error = find_or_make(state.path(), &run(1), None).unwrap_err().to_string();
        assert!(error.contains("64 hexadecimal digits") && error.contains(FOLDER), "{error}");
    }
}
