//! What a checkpoint keeps of where its model came from: the data that it was trained on, and files of the Hugging Face
//! directory that training does not change.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use fusionllm_protocol::hugging_face::{CHAT_FILES, OF_TOKENIZER, TOKENIZER};
use fusionllm_protocol::{CarriedFile, DataFingerprint, content_hash};
use fusionllm_transport::read_regular_text;

use super::tensor_file::io;
use crate::files::write_atomic;
use crate::{BrokerError, CheckpointError};

/// Where a model came from.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Origin {
    /// Files by name.
    pub(crate) carried: Arc<BTreeMap<String, String>>,
    /// The data, once its owner has read it.
    pub(crate) data: Option<DataFingerprint>,
}

impl Origin {
    /// The tokenizer's file.
    pub(crate) fn tokenizer(&self) -> Option<&str> {
        self.carried.get(TOKENIZER).map(String::as_str)
    }

    /// The files that say how its model writes conversations, by name.
    pub(crate) fn chat_files(&self) -> BTreeMap<String, String> {
        let is_one = |(name, _): &(&String, &String)| CHAT_FILES.contains(&name.as_str());
        self.carried.iter().filter(is_one).map(|(name, text)| (name.clone(), text.clone())).collect()
    }

    /// Puts another tokenizer in the place of the one that is carried, or none.
    pub(crate) fn set_tokenizer(&mut self, source: Option<String>) {
        let carried = Arc::make_mut(&mut self.carried);
        carried.retain(|name, _| !OF_TOKENIZER.contains(&name.as_str()));
        carried.extend(source.map(|source| (TOKENIZER.to_owned(), source)));
    }

    /// It is trained on this data by now. A tokenizer that is not the one of the data is left out.
    pub(crate) fn trained_on(&mut self, data: Option<DataFingerprint>) {
        let Some(data) = data else { return };
        let is_other = |source: &str| content_hash(source.as_bytes()) != data.tokenizer.hash;
        if self.tokenizer().is_some_and(is_other) {
            self.set_tokenizer(None);
        }
        self.data = Some(data);
    }

    /// Writes the files beside the shards.
    pub(super) fn write(&self, folder: &Path) -> Result<Vec<CarriedFile>, BrokerError> {
        let write = |(name, text): (&String, &String)| {
            let file =
                CarriedFile { name: name.clone(), bytes: text.len() as u64, hash: content_hash(text.as_bytes()) };
            write_atomic(&folder.join(file.file()), text.as_bytes())?;
            Ok(file)
        };
        self.carried.iter().map(write).collect()
    }

    /// Reads them and holds them against the manifest.
    pub(super) fn read(
        folder: &Path,
        files: &[CarriedFile],
        data: Option<DataFingerprint>,
    ) -> Result<Self, CheckpointError> {
        let mut carried = BTreeMap::new();
        for file in files {
            let path = folder.join(file.file());
            let text = read_regular_text(&path).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => CheckpointError::Missing { path: path.clone() },
                _ => io(&path, e),
            })?;
            let got = text.len() as u64;
            if got != file.bytes {
                return Err(CheckpointError::Size { path, expected: file.bytes, got });
            }
            let got = content_hash(text.as_bytes());
            if got != file.hash {
                return Err(CheckpointError::Hash { path, expected: file.hash.clone(), got });
            }
            carried.insert(file.name.clone(), text);
        }
        Ok(Self { carried: Arc::new(carried), data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_back_as_they_were_and_damage_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let carried = [("config.json", "{}"), (TOKENIZER, "[1]")].map(|(n, t)| (n.to_owned(), t.to_owned()));
        let mut origin = Origin { carried: Arc::new(carried.into()), data: None };
        let files = origin.write(folder.path()).unwrap();
        assert!(!folder.path().join("config.json").exists(), "a checkpoint is no Hugging Face folder");
        assert_eq!(Origin::read(folder.path(), &files, None).unwrap(), origin);
        let path = folder.path().join(files[1].file());
        std::fs::write(&path, "[2]").unwrap();
        assert!(matches!(Origin::read(folder.path(), &files, None), Err(CheckpointError::Hash { .. })));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(Origin::read(folder.path(), &files, None), Err(CheckpointError::Missing { .. })));
        origin.set_tokenizer(None);
        assert_eq!((origin.tokenizer(), origin.carried.len()), (None, 1));
    }
}
