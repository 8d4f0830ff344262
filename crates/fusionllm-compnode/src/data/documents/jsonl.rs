//! JSON Lines: an object on each line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};

use std::fmt;

use fusionllm_graph::BYTE_ORDER_MARK;
use fusionllm_protocol::DataSpec;
use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};

use super::{Document, Failure, Row};
use crate::DataError;
use crate::data::Reading;

/// A line longer than this is a mistake: a list of all documents, for example.
const MOST_BYTES: usize = 64 << 20;
/// Bytes of a line that are read at once.
const PART_BYTES: u64 = 1 << 20;

/// A byte order mark, in UTF-8.
const MARK: &[u8] = BYTE_ORDER_MARK.as_bytes();

/// Gives the text of each line, in order, and says how many are empty or null. What is wrong is said without a word of the
/// line: it may be private.
pub(super) fn each(
    file: File,
    spec: &DataSpec,
    reading: &Reading,
    take: &mut dyn FnMut(Document<'_>) -> Result<(), DataError>,
) -> Result<u64, Failure> {
    let mut without = 0;
    each_line(file, reading, &mut |Line { number, bytes, end }| {
        let fail = |reason: String| Failure::File(format!("line {number}: {reason}"));
        match text_of(bytes, &spec.column).map_err(fail)? {
            Some(text) if !text.is_empty() => take(Document { text: &text, end })?,
            _ => without += 1,
        }
        Ok(())
    })?;
    Ok(without)
}

/// Gives each line, in order, as the object that it is.
pub(super) fn each_row(
    file: File,
    reading: &Reading,
    take: &mut dyn FnMut(Row) -> Result<(), Failure>,
) -> Result<(), Failure> {
    each_line(file, reading, &mut |Line { number, bytes, end }| {
        let fail = |reason: String| Failure::File(format!("line {number}: {reason}"));
        let line = text(bytes).map_err(fail)?;
        // Its objects take some times as much memory as the line.
        reading.fits(8 * line.len() as u64)?;
        let keys = serde_json::from_str(line).map_err(|e| fail(no_object(&e)))?;
        take(Row { place: format!("line {number}"), keys, end })
    })
}

struct Line<'a> {
    number: u64,
    bytes: &'a [u8],
    /// The share of the file that lies before its end, up to 1.
    end: f64,
}

/// Gives each line that is not empty.
fn each_line(
    file: File,
    reading: &Reading,
    take: &mut dyn FnMut(Line<'_>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let size = file.metadata().map_err(|e| Failure::io(&e))?.len().max(1);
    let mut lines = BufReader::new(file);
    let (mut line, mut at) = (Vec::new(), 0u64);
    for number in 1u64.. {
        let read = read_line(&mut lines, &mut line, reading)?;
        if read == 0 {
            break;
        }
        if line.len() > MOST_BYTES {
            return Err(Failure::File(format!(
                "line {number}: it is longer than {MOST_BYTES} bytes, expected an object for each document"
            )));
        }
        at += read;
        let bytes = if number == 1 { line.strip_prefix(MARK).unwrap_or(&line) } else { &line };
        if !bytes.trim_ascii().is_empty() {
            take(Line { number, bytes, end: (at as f64 / size as f64).min(1.0) })?;
        }
        reading.became_tokens(read);
    }
    Ok(())
}

/// Reads to the end of a line, or a little over the most that it may have; gives how many bytes.
fn read_line(lines: &mut impl BufRead, line: &mut Vec<u8>, reading: &Reading) -> Result<u64, Failure> {
    line.clear();
    while !line.ends_with(b"\n") && line.len() <= MOST_BYTES {
        let read = lines.by_ref().take(PART_BYTES).read_until(b'\n', line).map_err(|e| Failure::io(&e))?;
        if read == 0 {
            break;
        }
        reading.moved(read)?;
        // The line, and its text besides.
        reading.fits(2 * line.len() as u64)?;
    }
    Ok(line.len() as u64)
}

/// The text of a line; nothing if it is null.
fn text_of(line: &[u8], column: &str) -> Result<Option<String>, String> {
    let line = text(line)?;
    let mut parser = serde_json::Deserializer::from_str(line);
    let found = parser.deserialize_map(Column(column)).and_then(|found| parser.end().map(|()| found));
    match found {
        Ok(Found::Text(text)) => Ok(text),
        Ok(Found::Other) => Err(format!("`{column}` is no string, expected the text of a document")),
        Ok(Found::Nothing) => Err(format!("`{column}` is missing: data.column says which key has the text")),
        Err(error) => Err(no_object(&error)),
    }
}

fn text(line: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(line).map_err(|_| "it is not UTF-8 text".to_owned())
}

fn no_object(error: &serde_json::Error) -> String {
    match error.classify() {
        serde_json::error::Category::Data => "it is no object, expected one for each document".to_owned(),
        _ => format!("it is no JSON (byte {})", error.column()),
    }
}

/// What an object has under the key.
enum Found {
    Text(Option<String>),
    Other,
    Nothing,
}

/// Reads an object, and keeps the text under one of its keys.
struct Column<'a>(&'a str);

impl<'de> Visitor<'de> for Column<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let mut found = Found::Nothing;
        while let Some(key) = map.next_key::<std::borrow::Cow<'_, str>>()? {
            if key == self.0 {
                found = map.next_value_seed(Text)?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// Reads a string or null; anything else is passed over.
struct Text;

impl<'de> DeserializeSeed<'de> for Text {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Found, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Text {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<Found, E> {
        Ok(Found::Text(Some(text.to_owned())))
    }

    fn visit_string<E>(self, text: String) -> Result<Found, E> {
        Ok(Found::Text(Some(text)))
    }

    fn visit_unit<E>(self) -> Result<Found, E> {
        Ok(Found::Text(None))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Found, E> {
        Ok(Found::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Found, E> {
        Ok(Found::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Found, E> {
        Ok(Found::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Found, E> {
        Ok(Found::Other)
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Found, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Found::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Found::Other)
    }
}
