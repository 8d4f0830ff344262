//! A peer's secret key.

use std::fmt;
use std::path::Path;

use data_encoding::HEXLOWER_PERMISSIVE;
use iroh::SecretKey;

use crate::private::{make_private_dir, read_private};
use crate::{FileMode, IdentityError, PeerId, PrivateError, folder_of, write_whole};

/// A secret key; whoever has it is this peer.
#[derive(Clone)]
pub struct Identity(SecretKey);

impl Identity {
    /// A new one, not kept anywhere.
    pub fn generate() -> Self {
        Self(SecretKey::generate())
    }

    /// The one in the file; if there is no file, a new one that is written there (mode 0600).
    ///
    /// # Errors
    /// [`IdentityError`] if the file is damaged, readable by others, or cannot be read or written.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        let malformed = || IdentityError::Malformed { path: path.to_owned() };
        match read_private(path) {
            Ok(Some(text)) => {
                let bytes = HEXLOWER_PERMISSIVE.decode(text.trim().as_bytes()).ok();
                let key: Option<[u8; 32]> = bytes.and_then(|b| b.try_into().ok());
                Ok(Self(SecretKey::from_bytes(&key.ok_or_else(malformed)?)))
            }
            Ok(None) => {
                let identity = Self::generate();
                identity.write(path).map_err(|source| PrivateError::Io { path: path.to_owned(), source })?;
                Ok(identity)
            }
            // Bytes that are no text are no key either.
            Err(PrivateError::NotText { .. }) => Err(malformed()),
            Err(error) => Err(error.into()),
        }
    }

    fn write(&self, path: &Path) -> std::io::Result<()> {
        make_private_dir(folder_of(path)).map_err(std::io::Error::other)?;
        let text = format!("{}\n", HEXLOWER_PERMISSIVE.encode(&self.0.to_bytes()));
        write_whole(path, text.as_bytes(), FileMode::Private)
    }

    /// The public half.
    pub fn id(&self) -> PeerId {
        PeerId::from_bytes(*self.0.public().as_bytes())
    }

    pub(crate) fn secret_key(&self) -> SecretKey {
        self.0.clone()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({}, secret not shown)", self.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_start_has_the_same_identity() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/key");
        let first = Identity::load_or_create(&path).unwrap();
        assert_eq!(Identity::load_or_create(&path).unwrap().id(), first.id());
        let secret = HEXLOWER_PERMISSIVE.encode(&first.secret_key().to_bytes());
        assert!(!format!("{first:?}").contains(&secret));
    }

    #[test]
    fn a_damaged_file_is_an_error_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let whole = HEXLOWER_PERMISSIVE.encode(&[7; 32]);
        for bytes in [b"" as &[u8], b"00ff", &[0xff; 40], whole.replace('7', "x").as_bytes()] {
            std::fs::write(&path, bytes).unwrap();
            restrict(&path, 0o600);
            let error = Identity::load_or_create(&path).unwrap_err();
            assert!(matches!(error, IdentityError::Malformed { .. }), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
    }

    #[cfg(unix)]
    #[test]
    fn the_file_is_the_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        Identity::load_or_create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        restrict(&path, 0o644);
        let error = Identity::load_or_create(&path).unwrap_err().to_string();
        assert!(error.contains("mode 644") && error.contains("chmod 600"), "{error}");
    }

    #[cfg(unix)]
    fn restrict(path: &Path, mode: u32) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[cfg(not(unix))]
    fn restrict(_path: &Path, _mode: u32) {}
}
