//! The token ids of a corpus, in memory or in a file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use fusionllm_protocol::ContentHasher;

use crate::DataError;

/// Ids lie in parts of so many: a part never moves, so growing needs no second copy.
const PART: usize = 1 << 20;
/// Bytes that are written to a file at once.
const WRITTEN: usize = 1 << 20;

/// Token ids in their order, of two bytes each where that is enough.
#[derive(Clone, Debug)]
pub struct Tokens(Parts);

#[derive(Clone, Debug)]
enum Parts {
    Narrow(Vec<Vec<u16>>),
    Wide(Vec<Vec<i32>>),
    Stored(Arc<Stored>),
}

/// Ids in a file, little-endian.
#[derive(Debug)]
struct Stored {
    path: PathBuf,
    open: Mutex<Open>,
}

#[derive(Debug)]
struct Open {
    file: File,
    width: usize,
    count: usize,
    /// What is not written yet.
    pending: Vec<u8>,
    hash: ContentHasher,
}

impl Tokens {
    /// None yet, of a tokenizer with so many entries, in memory.
    pub(super) fn new(entries: usize) -> Self {
        Self(if Self::width(entries) == 2 { Parts::Narrow(Vec::new()) } else { Parts::Wide(Vec::new()) })
    }

    /// None yet, in a new file.
    pub(super) fn in_file(path: &Path, entries: usize) -> Result<Self, DataError> {
        let file = File::options().read(true).write(true).create_new(true).open(path);
        let file = file.map_err(|error| DataError::cache(path, error))?;
        let width = Self::width(entries) as usize;
        let open = Open { file, width, count: 0, pending: Vec::new(), hash: ContentHasher::default() };
        Ok(Self(Parts::Stored(Arc::new(Stored { path: path.to_owned(), open: Mutex::new(open) }))))
    }

    /// So many ids of so many bytes each, which a file has that was written before.
    pub(super) fn of_file(path: &Path, file: File, width: usize, count: usize) -> Self {
        let open = Open { file, width, count, pending: Vec::new(), hash: ContentHasher::default() };
        Self(Parts::Stored(Arc::new(Stored { path: path.to_owned(), open: Mutex::new(open) })))
    }

    /// Bytes of one id of a tokenizer with so many entries.
    pub(super) fn width(entries: usize) -> u64 {
        if entries <= 1 << 16 { 2 } else { 4 }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match &self.0 {
            Parts::Narrow(parts) => count(parts),
            Parts::Wide(parts) => count(parts),
            Parts::Stored(stored) => stored.lock().count,
        }
    }

    /// Bytes of memory that they fill.
    pub(super) fn bytes(&self) -> u64 {
        match &self.0 {
            Parts::Narrow(_) => self.len() as u64 * 2,
            Parts::Wide(_) => self.len() as u64 * 4,
            Parts::Stored(_) => 0,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives all of them, in order and in parts.
    ///
    /// # Errors
    /// [`DataError::Cache`] if their file cannot be read.
    pub fn each_part(&self, take: &mut dyn FnMut(&[i32])) -> Result<(), DataError> {
        let len = self.len();
        let mut start = 0;
        while start < len {
            let end = len.min(start + PART);
            take(&self.slice(start..end)?);
            start = end;
        }
        Ok(())
    }

    /// Those at some places, all of which there must be.
    ///
    /// # Errors
    /// [`DataError::Cache`] if their file cannot be read.
    pub fn slice(&self, places: Range<usize>) -> Result<Vec<i32>, DataError> {
        match &self.0 {
            Parts::Narrow(parts) => Ok(places.map(|at| i32::from(parts[at / PART][at % PART])).collect()),
            Parts::Wide(parts) => Ok(places.map(|at| parts[at / PART][at % PART]).collect()),
            Parts::Stored(stored) => stored.read(places).map_err(|error| DataError::cache(&stored.path, error)),
        }
    }

    /// Adds ids at the end.
    ///
    /// # Errors
    /// [`DataError::Cache`] if their file cannot be written.
    pub(super) fn extend(&mut self, ids: &[i32]) -> Result<(), DataError> {
        if let Parts::Narrow(parts) = &mut self.0 {
            let narrow: Option<Vec<u16>> = ids.iter().map(|&id| u16::try_from(id).ok()).collect();
            match narrow {
                Some(ids) => append(parts, &ids),
                // More than the tokenizer says it has.
                None => self.0 = Parts::Wide(parts.iter().map(|part| widened(part)).collect()),
            }
            if matches!(self.0, Parts::Narrow(_)) {
                return Ok(());
            }
        }
        match &mut self.0 {
            Parts::Wide(parts) => append(parts, ids),
            Parts::Stored(stored) => stored.append(ids).map_err(|error| DataError::cache(&stored.path, error))?,
            Parts::Narrow(_) => {}
        }
        Ok(())
    }

    /// Writes what is still in memory of a file. Gives the bytes of an id, how many ids there are, and the file's hash.
    pub(super) fn finish(&self) -> Result<(usize, usize, String), DataError> {
        let Parts::Stored(stored) = &self.0 else { return Ok((0, self.len(), String::new())) };
        let mut open = stored.lock();
        let done = open.flush().and_then(|()| open.file.sync_all());
        done.map_err(|error| DataError::cache(&stored.path, error))?;
        Ok((open.width, open.count, open.hash.finish()))
    }
}

impl PartialEq for Tokens {
    fn eq(&self, other: &Self) -> bool {
        let len = self.len();
        len == other.len()
            && (0..len).step_by(PART).all(|start| {
                let places = start..len.min(start + PART);
                matches!((self.slice(places.clone()), other.slice(places)), (Ok(a), Ok(b)) if a == b)
            })
    }
}

impl Stored {
    fn lock(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, places: Range<usize>) -> std::io::Result<Vec<i32>> {
        let mut open = self.lock();
        open.flush()?;
        let (width, count) = (open.width, places.len());
        let mut bytes = vec![0; count * width];
        open.file.seek(SeekFrom::Start((places.start * width) as u64))?;
        open.file.read_exact(&mut bytes)?;
        Ok(ids_of(&bytes, width))
    }

    fn append(&self, ids: &[i32]) -> std::io::Result<()> {
        let mut open = self.lock();
        // More than the tokenizer says it has.
        if open.width == 2 && ids.iter().any(|&id| u16::try_from(id).is_err()) {
            open.widen(&self.path)?;
        }
        let width = open.width;
        open.pending.extend(ids.iter().flat_map(|id| id.to_le_bytes().into_iter().take(width)));
        open.count += ids.len();
        if open.pending.len() >= WRITTEN { open.flush() } else { Ok(()) }
    }
}

impl Open {
    fn flush(&mut self) -> std::io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.file.seek(SeekFrom::End(0))?;
        self.file.write_all(&self.pending)?;
        self.hash.update(&self.pending);
        self.pending.clear();
        Ok(())
    }

    /// Writes all ids anew, of four bytes each.
    fn widen(&mut self, path: &Path) -> std::io::Result<()> {
        self.flush()?;
        let wide = path.with_extension("wide");
        let file = File::options().read(true).write(true).create_new(true).open(&wide)?;
        let mut other = Self { file, width: 4, count: self.count, pending: Vec::new(), hash: ContentHasher::default() };
        self.file.seek(SeekFrom::Start(0))?;
        let mut bytes = Vec::new();
        while Read::by_ref(&mut self.file).take(WRITTEN as u64).read_to_end(&mut bytes)? > 0 {
            other.pending.extend(ids_of(&bytes, 2).into_iter().flat_map(i32::to_le_bytes));
            other.flush()?;
            bytes.clear();
        }
        std::fs::rename(wide, path)?;
        *self = other;
        Ok(())
    }
}

fn ids_of(bytes: &[u8], width: usize) -> Vec<i32> {
    let id = |bytes: &[u8]| match *bytes {
        [a, b] => i32::from(u16::from_le_bytes([a, b])),
        [a, b, c, d] => i32::from_le_bytes([a, b, c, d]),
        _ => 0,
    };
    bytes.chunks_exact(width.max(1)).map(id).collect()
}

fn count<T>(parts: &[Vec<T>]) -> usize {
    parts.iter().map(Vec::len).sum()
}

fn widened(part: &[u16]) -> Vec<i32> {
    part.iter().map(|&id| i32::from(id)).collect()
}

/// Fills the last part, and begins others.
fn append<T: Copy>(parts: &mut Vec<Vec<T>>, mut ids: &[T]) {
    while !ids.is_empty() {
        if parts.last().is_none_or(|part| part.len() == PART) {
            parts.push(Vec::new());
        }
        let Some(part) = parts.last_mut() else { return };
        let (now, later) = ids.split_at(ids.len().min(PART - part.len()));
        part.extend_from_slice(now);
        ids = later;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_back_as_they_went_in_whatever_their_width_and_place() {
        let folder = tempfile::tempdir().unwrap();
        for (entries, width, largest) in [(1 << 16, 2, 65_535), ((1 << 16) + 1, 4, 65_536), (256, 2, 70_000)] {
            assert_eq!(Tokens::width(entries), width);
            let ids: Vec<i32> = (0..PART as i32 + 10).map(|i| i % 250).chain([largest, 7]).collect();
            let file = folder.path().join(format!("{entries}-{largest}"));
            for (in_file, mut tokens) in
                [(false, Tokens::new(entries)), (true, Tokens::in_file(&file, entries).unwrap())]
            {
                assert!(tokens.is_empty());
                for some in ids.chunks(PART / 3 + 1) {
                    tokens.extend(some).unwrap();
                }
                assert_eq!(tokens.len(), ids.len());
                let mut all = Vec::new();
                tokens.each_part(&mut |some| all.extend_from_slice(some)).unwrap();
                assert!(all == ids);
                let across = PART - 5..PART + 12;
                assert_eq!(tokens.slice(across.clone()).unwrap(), ids[across]);
                let is_narrow = largest < 1 << 16 && width == 2;
                if !in_file {
                    assert_eq!(matches!(tokens.0, Parts::Narrow(_)), is_narrow);
                    continue;
                }
                assert_eq!(tokens.bytes(), 0);
                let (width, count, hash) = tokens.finish().unwrap();
                assert_eq!((width, count), (if is_narrow { 2 } else { 4 }, ids.len()));
                let bytes = std::fs::read(&file).unwrap();
                assert_eq!(fusionllm_protocol::content_hash(&bytes), hash);
                assert!(Tokens::of_file(&file, File::open(&file).unwrap(), width, count) == tokens);
            }
        }
    }
}
