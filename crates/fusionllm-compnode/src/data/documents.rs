//! Files of documents: JSON Lines, and Parquet. They are read one document at a time, whatever their size.

mod jsonl;
mod parquet;
mod token_file;

use std::fs::File;

use fusionllm_protocol::{DataFormat, DataSpec};
use serde_json::{Map, Value};

use super::Reading;
use crate::DataError;

pub(super) use token_file::{Part, each_part};

/// The text of one document.
#[derive(Clone, Copy, Debug)]
pub(super) struct Document<'a> {
    pub(super) text: &'a str,
    /// The share of the file that lies before its end, up to 1.
    pub(super) end: f64,
}

/// A row that is no text.
#[derive(Debug)]
pub(super) struct Row {
    /// `line 7` or `row 7`.
    pub(super) place: String,
    pub(super) keys: Map<String, Value>,
    /// The share of the file that lies before its end, up to 1.
    pub(super) end: f64,
}

/// Why a file of documents cannot be read on.
#[derive(Debug)]
pub(super) enum Failure {
    /// Something in the file.
    File(String),
    /// What was done with a document, or that nobody wants the data any more.
    Elsewhere(DataError),
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Self::Elsewhere(error)
    }
}

impl Failure {
    /// What the operating system says of the file.
    fn io(error: &std::io::Error) -> Self {
        Self::File(error.to_string())
    }
}

/// Gives each document of a file that has a text, in order, and says how many have none.
pub(super) fn each_document(
    file: File,
    spec: &DataSpec,
    reading: &Reading,
    take: &mut dyn FnMut(Document<'_>) -> Result<(), DataError>,
) -> Result<u64, Failure> {
    match spec.format {
        DataFormat::Jsonl => jsonl::each(file, spec, reading, take),
        DataFormat::Parquet => parquet::each(file, spec, reading, take),
        DataFormat::Text | DataFormat::Tokens | DataFormat::Images | DataFormat::Cifar10 => {
            Err(Failure::File("its form has no documents".to_owned()))
        }
    }
}

/// Gives each row of a file, in order: of Parquet those of its columns that are among `keys`.
pub(super) fn each_row(
    file: File,
    spec: &DataSpec,
    keys: &[&str],
    reading: &Reading,
    take: &mut dyn FnMut(Row) -> Result<(), Failure>,
) -> Result<(), Failure> {
    match spec.format {
        DataFormat::Jsonl => jsonl::each_row(file, reading, take),
        DataFormat::Parquet => parquet::each_row(file, keys, reading, take),
        DataFormat::Text | DataFormat::Tokens | DataFormat::Images | DataFormat::Cifar10 => {
            Err(Failure::File("its form has no rows".to_owned()))
        }
    }
}

#[cfg(test)]
mod tests;
