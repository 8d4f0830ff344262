//! Which files are read, and what is known of them before they are.

use std::fs::Metadata;
use std::io::Read;
use std::path::PathBuf;
use std::time::SystemTime;

use fusionllm_protocol::{ContentHasher, DataFormat, DataSpec, RowKind, content_hash};
use fusionllm_transport::is_shortage;

use super::super::files::{LeftOut, TextFile, shown};
use super::super::text::{Content, TextContent, look_at};
use super::super::{ReadableData, Reading, Tokenizer, Tokens};
use super::Tokenizing;
use crate::DataError;

/// Bytes of text of which a tokenizer makes one token on average, at the most.
const LONG_TOKEN_BYTES: u64 = 8;
/// Bytes that are read at once.
const PART_BYTES: usize = 1 << 20;

/// A file that is read, and what was seen of it.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) file: TextFile,
    /// Of text.
    pub(super) text: Option<TextContent>,
    /// Of other forms, with a cache.
    pub(super) raw: Option<Raw>,
}

/// What tells the content of a file from others.
#[derive(Debug)]
pub(super) struct Raw {
    bytes: u64,
    hash: String,
    /// When it was written, as far as that is known.
    modified: Option<SystemTime>,
}

impl Raw {
    /// Whether the file was written since.
    pub(super) fn is_old(&self, file: &TextFile) -> bool {
        modified(std::fs::metadata(&file.path)) != self.modified
    }
}

fn modified(metadata: std::io::Result<Metadata>) -> Option<SystemTime> {
    metadata.and_then(|metadata| metadata.modified()).ok()
}

/// Whether a file's name is one of a form.
fn has_ending(file: &TextFile, format: DataFormat) -> bool {
    let ending = file.path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    format.endings().iter().any(|of| ending.eq_ignore_ascii_case(of))
}

/// Before anything is read: whether there is memory for the files that the job names, as tokens. What folders hold is known
/// only when it is read.
pub(super) fn check_room(
    files: &[TextFile],
    spec: &DataSpec,
    tokenizer: &Tokenizer,
    is_cached: bool,
    reading: &Reading,
) -> Result<(), DataError> {
    if is_cached {
        return Ok(());
    }
    let named = files.iter().filter(|file| file.named).filter_map(|file| std::fs::metadata(&file.path).ok());
    let sum = named.fold(0u64, |sum, file| sum.saturating_add(file.len()));
    let tokens = match tokenizer {
        _ if spec.format == DataFormat::Tokens => sum / 4,
        Tokenizer::Bytes => sum,
        Tokenizer::HuggingFace(_) => sum / LONG_TOKEN_BYTES,
    };
    reading.fits(tokens.saturating_mul(Tokens::width(entries(spec, tokenizer))))
}

/// Of conversations each id has the sign that it is of an answer beside it.
pub(super) fn entries(spec: &DataSpec, tokenizer: &Tokenizer) -> usize {
    if spec.rows == RowKind::Chat { usize::MAX } else { tokenizer.entries() }
}

/// Looks at the files: what of them is read. With `hashed`, so that their contents are known.
pub(super) fn sources(
    files: Vec<TextFile>,
    spec: &DataSpec,
    readable: &ReadableData,
    reading: &Reading,
    hashed: bool,
    left_out: &mut LeftOut,
) -> Result<Vec<Source>, DataError> {
    let (mut sources, mut total) = (Vec::new(), 0);
    for file in files {
        if spec.format == DataFormat::Text {
            match look_at(&file.path, readable, reading)? {
                Content::Text(text) if text.bytes == 0 => left_out.add("empty", &file.name),
                Content::Text(text) => {
                    total += text.bytes;
                    sources.push(Source { file, text: Some(text), raw: None });
                }
                Content::Other { reason, .. } if file.named => return Err(DataError::Path { path: file.path, reason }),
                Content::Other { kind, .. } => left_out.add(kind, &file.name),
            }
            continue;
        }
        if !(file.named || has_ending(&file, spec.format)) {
            left_out.add("of another form than data.format", &file.name);
            continue;
        }
        let raw = if hashed { Some(raw(&file, spec, readable, reading)?) } else { None };
        total += std::fs::metadata(&file.path).map_or(0, |metadata| metadata.len());
        sources.push(Source { file, text: None, raw });
    }
    reading.begins(total);
    Ok(sources)
}

/// Reads a file to know its content.
fn raw(file: &TextFile, spec: &DataSpec, readable: &ReadableData, reading: &Reading) -> Result<Raw, DataError> {
    let fail = |source: std::io::Error| match is_shortage(&source) {
        true => DataError::Unopened { what: "data.path", source },
        false => DataError::Path { path: path_for_people(file, spec), reason: source.to_string() },
    };
    let mut open = readable.open(&file.path).map_err(fail)?;
    let modified = modified(open.metadata());
    let (mut hash, mut bytes, mut size) = (ContentHasher::default(), Vec::new(), 0);
    loop {
        bytes.clear();
        let read = open.by_ref().take(PART_BYTES as u64).read_to_end(&mut bytes).map_err(fail)?;
        if read == 0 {
            return Ok(Raw { bytes: size, hash: hash.finish(), modified });
        }
        size += read as u64;
        hash.update(&bytes);
        reading.moved(read)?;
    }
}

/// Of private data only what the job names is called by its name.
pub(super) fn path_for_people(file: &TextFile, spec: &DataSpec) -> PathBuf {
    if spec.private && !file.named { shown(&file.name, true).into() } else { file.path.clone() }
}

/// What tokens follow from, in one name.
pub(super) fn key(spec: &DataSpec, by: Tokenizing<'_>, sources: &[Source]) -> String {
    let mut text = format!("{:?} {:?} {}\n", spec.format, spec.rows, spec.eval_fraction);
    text.push_str(&format!("{}\n", by.tokenizer.fingerprint().hash));
    match by.template {
        Some(template) => text.push_str(&format!("{} {}\n", template.fingerprint(), spec.seq_len)),
        None => text.push_str(&format!("{:?}\n", spec.column)),
    }
    for Source { text: content, raw, .. } in sources {
        if let Some(TextContent { bytes, hash, had_mark }) = content {
            text.push_str(&format!("{bytes} {hash} {had_mark}\n"));
        }
        if let Some(Raw { bytes, hash, .. }) = raw {
            text.push_str(&format!("{bytes} {hash}\n"));
        }
    }
    content_hash(text.as_bytes())
}

pub(super) fn no_text(spec: &DataSpec, left_out: Vec<String>) -> DataError {
    let mut paths: Vec<String> = spec.path.iter().map(|p| p.display().to_string()).collect();
    paths.extend(left_out);
    let what = match spec.format {
        DataFormat::Text => "UTF-8 text files".to_owned(),
        format => format!("files that end in .{}", format.endings().join(" or .")),
    };
    DataError::NoText { what, paths: paths.join("; ") }
}
