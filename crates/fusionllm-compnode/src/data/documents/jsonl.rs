//! JSON Lines: an object on each line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};

use fusionllm_graph::read_json;
use serde_json::{Map, Value};

use super::{Document, Failure, MOST_BYTES};
use crate::DataError;
use crate::data::Reading;

/// A byte order mark, in UTF-8.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// Gives the text of each line, in order, and says how many are empty or null. Empty lines are none.
pub(super) fn each(
    file: File,
    column: &str,
    reading: &Reading,
    take: &mut dyn FnMut(Document<'_>) -> Result<(), DataError>,
) -> Result<u64, Failure> {
    let size = file.metadata().map_err(|e| Failure::io(&e))?.len().max(1);
    let mut lines = BufReader::new(file);
    let (mut line, mut at, mut without) = (Vec::new(), 0u64, 0);
    for number in 1u64.. {
        line.clear();
        let read = lines.by_ref().take(MOST_BYTES).read_until(b'\n', &mut line).map_err(|e| Failure::io(&e))?;
        if read == 0 {
            break;
        }
        let fail = |reason: String| Failure::File(format!("line {number}: {reason}"));
        if read as u64 == MOST_BYTES && !line.ends_with(b"\n") {
            return Err(fail(format!("it is longer than {MOST_BYTES} bytes")));
        }
        at += read as u64;
        reading.moved(read)?;
        reading.fits(read as u64)?;
        let bytes = if number == 1 { line.strip_prefix(MARK).unwrap_or(&line) } else { &line };
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        let object: Map<String, Value> = read_json(bytes).map_err(fail)?;
        match object.get(column) {
            Some(Value::String(text)) if !text.is_empty() => {
                take(Document { text, end: (at as f64 / size as f64).min(1.0) })?;
            }
            Some(Value::String(_) | Value::Null) => without += 1,
            Some(_) => return Err(fail(format!("`{column}` is no string, expected the text of a document"))),
            None => {
                return Err(fail(format!("`{column}` is missing: data.column says which key has the text")));
            }
        }
    }
    Ok(without)
}
