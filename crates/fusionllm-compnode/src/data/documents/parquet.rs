//! Parquet: a column of texts.

use std::fs::File;
use std::sync::Arc;

use ::parquet::basic::{ConvertedType, Repetition, Type as PhysicalType};
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::Field;
use ::parquet::schema::types::Type;
use fusionllm_protocol::DataSpec;

use super::{Document, Failure};
use crate::DataError;
use crate::data::Reading;
use crate::data::tokenizer::guarded;

/// Columns that an error names.
const NAMED: usize = 20;

/// Gives the text of each row, in order, and says how many are empty or null.
pub(super) fn each(
    file: File,
    spec: &DataSpec,
    reading: &Reading,
    take: &mut dyn FnMut(Document<'_>) -> Result<(), DataError>,
) -> Result<u64, Failure> {
    // Files that are damaged can make the library panic. What it says then may have words of the file.
    let damaged = |_| Failure::File("not readable as Parquet: what reads it fails on something in it".to_owned());
    guarded(|| Ok(rows(file, spec, reading, take))).map_err(damaged)?
}

fn rows(
    file: File,
    spec: &DataSpec,
    reading: &Reading,
    take: &mut dyn FnMut(Document<'_>) -> Result<(), DataError>,
) -> Result<u64, Failure> {
    let fail = |error: ParquetError| Failure::File(format!("not readable as Parquet: {error}"));
    let reader = SerializedFileReader::new(file).map_err(fail)?;
    let metadata = reader.metadata().file_metadata();
    let count = u64::try_from(metadata.num_rows()).unwrap_or(0).max(1);
    let schema = metadata.schema();
    let column = text_column(schema, spec)?;
    let projection = Type::group_type_builder(schema.name()).with_fields(vec![column]).build().map_err(fail)?;
    let (mut row_number, mut without) = (0u64, 0);
    for row in reader.get_row_iter(Some(projection)).map_err(fail)? {
        row_number += 1;
        let fields = row.map_err(fail)?.into_columns();
        let end = (row_number as f64 / count as f64).min(1.0);
        let text = match fields.first().map(|(_, field)| field) {
            Some(Field::Str(text)) => text.as_str(),
            // Old files do not say that bytes are text.
            Some(Field::Bytes(bytes)) => std::str::from_utf8(bytes.data())
                .map_err(|_| Failure::File(format!("row {row_number}: `{}` is not UTF-8 text", spec.column)))?,
            _ => "",
        };
        reading.moved(text.len())?;
        reading.fits(text.len() as u64)?;
        if text.is_empty() {
            without += 1;
        } else {
            take(Document { text, end })?;
        }
    }
    Ok(without)
}

/// The column that the job names, if it has texts.
fn text_column(schema: &Type, spec: &DataSpec) -> Result<Arc<Type>, Failure> {
    let name = &spec.column;
    let is_text = |column: &Type| {
        // Old files do not say that bytes are text.
        let of_text = [ConvertedType::UTF8, ConvertedType::NONE, ConvertedType::JSON];
        let info = column.get_basic_info();
        column.is_primitive()
            && column.get_physical_type() == PhysicalType::BYTE_ARRAY
            && of_text.contains(&info.converted_type())
            && info.repetition() != Repetition::REPEATED
    };
    let fields = schema.get_fields();
    match fields.iter().find(|field| field.name() == name) {
        Some(column) if is_text(column) => Ok(Arc::clone(column)),
        Some(_) => Err(Failure::File(format!("column `{name}` has no texts, expected one of strings"))),
        None => {
            let texts: Vec<String> =
                fields.iter().filter(|f| is_text(f)).take(NAMED).map(|f| format!("`{}`", f.name())).collect();
            // Of private data not even these leave.
            let there_are = match (spec.private, texts.as_slice()) {
                (true, _) => String::new(),
                (false, []) => "; there is no column of strings".to_owned(),
                (false, texts) => format!("; columns of strings are {}", texts.join(", ")),
            };
            Err(Failure::File(format!("column `{name}` is missing: data.column says which has the text{there_are}")))
        }
    }
}
