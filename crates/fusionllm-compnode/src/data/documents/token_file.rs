//! Files of token ids: nanoGPT's, two bytes each, and llm.c's with a header before.

use std::fs::File;
use std::io::{BufReader, Read};

use super::Failure;
use crate::DataError;
use crate::data::Reading;

/// Bytes of llm.c's header: 256 numbers, of which the first three are its sign, a version and the number of tokens.
const HEADER: usize = 1024;
/// llm.c's sign of two bytes a token.
const NARROW: u32 = 20_240_520;
/// llm.c's sign of four bytes a token.
const WIDE: u32 = 20_240_801;
/// Bytes that are read at once; a multiple of the width of a token.
const PART_BYTES: usize = 1 << 20;

/// Where the ids of a file begin, and how wide they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    header: usize,
    width: usize,
    count: u64,
}

impl Layout {
    /// By the size of a file and what it begins with.
    fn of(size: u64, begin: &[u8]) -> Result<Self, Failure> {
        let number = |index: usize| {
            let bytes = begin.get(4 * index..4 * index + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let width = match number(0) {
            Some(NARROW) => 2,
            Some(WIDE) => 4,
            _ => {
                if !size.is_multiple_of(2) {
                    return Err(Failure::File(format!("it has {size} bytes, expected tokens of two bytes each")));
                }
                return Ok(Self { header: 0, width: 2, count: size / 2 });
            }
        };
        let count = u64::from(number(2).unwrap_or(0));
        let expected = HEADER as u64 + count * width as u64;
        if size != expected {
            return Err(Failure::File(format!(
                "its header says {count} tokens, so {expected} bytes, but it has {size}"
            )));
        }
        Ok(Self { header: HEADER, width, count })
    }
}

/// Some ids of a file.
#[derive(Clone, Copy, Debug)]
pub(in crate::data) struct Part<'a> {
    pub(in crate::data) ids: &'a [i32],
    /// How many come before them.
    pub(in crate::data) before: u64,
    /// How many there are in the file.
    pub(in crate::data) count: u64,
}

/// Gives all ids, in order and in parts.
pub(in crate::data) fn each_part(
    mut file: File,
    reading: &Reading,
    take: &mut dyn FnMut(Part<'_>) -> Result<(), DataError>,
) -> Result<(), Failure> {
    let size = file.metadata().map_err(|e| Failure::io(&e))?.len();
    let mut begin = Vec::new();
    file.by_ref().take(HEADER as u64).read_to_end(&mut begin).map_err(|e| Failure::io(&e))?;
    let layout = Layout::of(size, &begin)?;
    let mut bytes = if layout.header == 0 { begin } else { Vec::new() };
    let mut file = BufReader::new(file);
    let mut before = 0;
    loop {
        let missing = PART_BYTES.saturating_sub(bytes.len()) as u64;
        file.by_ref().take(missing).read_to_end(&mut bytes).map_err(|e| Failure::io(&e))?;
        if bytes.is_empty() {
            break;
        }
        reading.moved(bytes.len())?;
        let ids = ids(&bytes, layout.width)?;
        take(Part { ids: &ids, before, count: layout.count })?;
        before += ids.len() as u64;
        reading.became_tokens(bytes.len() as u64);
        bytes.clear();
    }
    if before != layout.count {
        return Err(Failure::File("it changed while it was read".to_owned()));
    }
    Ok(())
}

fn ids(bytes: &[u8], width: usize) -> Result<Vec<i32>, Failure> {
    let id = |bytes: &[u8]| match *bytes {
        [a, b] => Ok(i32::from(u16::from_le_bytes([a, b]))),
        [a, b, c, d] => i32::try_from(u32::from_le_bytes([a, b, c, d]))
            .map_err(|_| Failure::File("it has a token id of more than 31 bits".to_owned())),
        _ => Err(Failure::File("it changed while it was read".to_owned())),
    };
    bytes.chunks(width).map(id).collect()
}
