//! Parquet: a column of texts.

use std::fs::File;
use std::sync::Arc;

use ::parquet::basic::Type as PhysicalType;
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
    // Files that are damaged can make the library panic.
    guarded(|| Ok(rows(file, spec, reading, take))).map_err(Failure::File)?
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
    let is_text = |column: &Type| column.is_primitive() && column.get_physical_type() == PhysicalType::BYTE_ARRAY;
    let fields = schema.get_fields();
    match fields.iter().find(|field| field.name() == name) {
        Some(column) if is_text(column) => Ok(Arc::clone(column)),
        Some(_) => Err(Failure::File(format!("column `{name}` has no texts, expected one of strings"))),
        None => {
            let texts: Vec<String> =
                fields.iter().filter(|f| is_text(f)).take(NAMED).map(|f| format!("`{}`", f.name())).collect();
            // Of private data not even these leave.
            let there_are = match spec.private {
                true => String::new(),
                false => format!("; columns of strings are {}", texts.join(", ")),
            };
            Err(Failure::File(format!("column `{name}` is missing: data.column says which has the text{there_are}")))
        }
    }
}
