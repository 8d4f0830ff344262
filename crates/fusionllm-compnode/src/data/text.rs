//! Files of text, which are never in memory as a whole: once to know what they hold, and once more for their tokens.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use fusionllm_graph::BYTE_ORDER_MARK;
use fusionllm_protocol::ContentHasher;
use fusionllm_transport::is_shortage;

use super::files::UNREADABLE;
use super::{ReadableData, Reading};
use crate::DataError;

/// Bytes of a file that are read at once.
const PART_BYTES: usize = 1 << 20;
/// The byte order mark, in UTF-8.
const MARK: &[u8] = BYTE_ORDER_MARK.as_bytes();

/// What a file holds.
pub(super) enum Content {
    /// Text.
    Text(TextContent),
    /// No text.
    Other {
        /// What it is instead: files of one kind are told of together.
        kind: &'static str,
        /// Why it is no text, for a file that the job names.
        reason: String,
    },
}

/// The text of a file, without its byte order mark.
#[derive(Clone, Debug)]
pub(super) struct TextContent {
    pub(super) bytes: u64,
    pub(super) hash: String,
    /// Whether it had a mark.
    pub(super) had_mark: bool,
}

/// Looks at a file, if it may be read. One that cannot be read is as one that holds no text: where it is named, that is said.
pub(super) fn look_at(path: &Path, readable: &ReadableData, reading: &Reading) -> Result<Content, DataError> {
    let unreadable = |error: std::io::Error| match is_shortage(&error) {
        true => Err(DataError::Unopened { what: "data.path", source: error }),
        false => Ok(Content::Other { kind: UNREADABLE, reason: error.to_string() }),
    };
    let mut file = match readable.open(path) {
        Ok(file) => file,
        Err(error) => return unreadable(error),
    };
    let mut hash = ContentHasher::default();
    // What is not hashed yet: the end of a part may be the beginning of a character.
    let (mut bytes, mut at, mut is_begin, mut had_mark) = (Vec::new(), 0u64, true, false);
    loop {
        let read = match file.by_ref().take(PART_BYTES as u64).read_to_end(&mut bytes) {
            Ok(read) => read,
            Err(error) => return unreadable(error),
        };
        reading.moved(read)?;
        let valid = match std::str::from_utf8(&bytes) {
            Ok(text) => text.len(),
            Err(error) if error.error_len().is_some() || read == 0 => {
                return Ok(no_text(if is_begin { &bytes } else { &[] }, at + error.valid_up_to() as u64));
            }
            Err(error) => error.valid_up_to(),
        };
        if let Some(nul) = bytes[..valid].iter().position(|&byte| byte == 0) {
            let reason = format!("it has a NUL byte at {}, so it is no text", at + nul as u64);
            return Ok(Content::Other { kind: "with NUL bytes", reason });
        }
        if read == 0 {
            break;
        }
        let text = &bytes[..valid];
        let unmarked = text.strip_prefix(MARK).filter(|_| is_begin);
        had_mark |= unmarked.is_some();
        hash.update(unmarked.unwrap_or(text));
        at += valid as u64;
        is_begin &= valid == 0;
        bytes.drain(..valid);
    }
    let bytes = at - if had_mark { MARK.len() as u64 } else { 0 };
    Ok(Content::Text(TextContent { bytes, hash: hash.finish(), had_mark }))
}

/// What a file is that begins so, and whose byte `at` is none of a text.
fn no_text(begin: &[u8], at: u64) -> Content {
    match begin {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
            let reason = "it is UTF-16, expected UTF-8 text".to_owned();
            Content::Other { kind: "UTF-16, expected UTF-8", reason }
        }
        _ => Content::Other { kind: "not UTF-8 text", reason: format!("not UTF-8 text (byte {at} is not)") },
    }
}

/// The text of a file, part by part.
pub(super) struct TextParts {
    file: File,
    /// Read, and not given yet.
    bytes: Vec<u8>,
    left: u64,
    hash: ContentHasher,
}

impl TextParts {
    /// Of a file that was looked at.
    pub(super) fn open(path: &Path, content: &TextContent, readable: &ReadableData) -> std::io::Result<Self> {
        let mut file = readable.open(path)?;
        if content.had_mark {
            let mut mark = Vec::new();
            file.by_ref().take(MARK.len() as u64).read_to_end(&mut mark)?;
        }
        Ok(Self { file, bytes: Vec::new(), left: content.bytes, hash: ContentHasher::default() })
    }

    /// Adds the next part to `text`, which has at most `most` more bytes; says whether there was one. A character that does
    /// not fit whole comes later.
    pub(super) fn next(&mut self, text: &mut String, most: u64) -> Result<bool, String> {
        let kept = self.bytes.len() as u64;
        let wanted = (PART_BYTES as u64).min(most).min(self.left + kept).saturating_sub(kept);
        let read = self.file.by_ref().take(wanted).read_to_end(&mut self.bytes).map_err(|e| e.to_string())?;
        if read as u64 != wanted {
            return Err(changed());
        }
        self.left -= wanted;
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(self.bytes.len());
        let valid = match std::str::from_utf8(&self.bytes[..most]) {
            Ok(text) => text.len(),
            Err(error) if error.error_len().is_some() => return Err(changed()),
            Err(error) => error.valid_up_to(),
        };
        text.push_str(std::str::from_utf8(&self.bytes[..valid]).map_err(|_| changed())?);
        self.hash.update(&self.bytes[..valid]);
        self.bytes.drain(..valid);
        Ok(valid > 0)
    }

    /// Whether all that came is the text that was there when it was looked at.
    pub(super) fn end(self, content: &TextContent) -> Result<(), String> {
        if self.left == 0 && self.bytes.is_empty() && self.hash.finish() == content.hash {
            Ok(())
        } else {
            Err(changed())
        }
    }
}

fn changed() -> String {
    "it changed while it was read".to_owned()
}
