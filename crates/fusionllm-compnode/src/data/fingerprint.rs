//! What is remembered of a job's data.

use fusionllm_protocol::{DataFingerprint, FileFingerprint, TokenizerFingerprint, content_hash};

/// Files that are remembered one by one.
const REMEMBERED_FILES: usize = 1000;
/// Bytes that their names may have, all together.
const REMEMBERED_NAME_BYTES: usize = 200_000;

/// What is remembered of these files.
pub(super) fn fingerprint(files: &[FileFingerprint], tokenizer: TokenizerFingerprint) -> DataFingerprint {
    let mut all = Vec::new();
    for file in files {
        all.extend_from_slice(format!("{} {} {}\n", file.bytes, file.train_bytes, file.hash).as_bytes());
    }
    let mut room = REMEMBERED_NAME_BYTES;
    let fits = |file: &&FileFingerprint| {
        room = room.saturating_sub(file.name.len());
        room > 0
    };
    DataFingerprint {
        files: files.iter().take(REMEMBERED_FILES).take_while(fits).cloned().collect(),
        count: files.len() as u64,
        bytes: files.iter().map(|file| file.bytes).sum(),
        hash: content_hash(&all),
        tokenizer,
    }
}
