//! Parquet: a column of texts.

use std::fs::File;
use std::sync::Arc;

use ::parquet::basic::{ConvertedType, Repetition, Type as PhysicalType};
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::Field;
use ::parquet::schema::types::Type;
use fusionllm_protocol::DataSpec;

use serde_json::{Map, Value};

use super::{Document, Failure, Row};
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
    undamaged(|| rows(file, spec, reading, take))
}

/// Gives these columns of each row, in order, as far as there are such.
pub(super) fn each_row(
    file: File,
    keys: &[&str],
    reading: &Reading,
    take: &mut dyn FnMut(Row) -> Result<(), Failure>,
) -> Result<(), Failure> {
    undamaged(|| {
        let size = file.metadata().map_err(|e| Failure::io(&e))?.len();
        let reader = SerializedFileReader::new(file).map_err(unreadable)?;
        let metadata = reader.metadata().file_metadata();
        let (count, schema) = (u64::try_from(metadata.num_rows()).unwrap_or(0).max(1), metadata.schema());
        let columns = schema.get_fields().iter().filter(|field| keys.contains(&field.name()));
        let columns = columns.map(Arc::clone).collect();
        let projection = Type::group_type_builder(schema.name()).with_fields(columns).build().map_err(unreadable)?;
        for (number, row) in (1u64..).zip(reader.get_row_iter(Some(projection)).map_err(unreadable)?) {
            let mut values = Map::new();
            for (name, field) in row.map_err(unreadable)?.into_columns() {
                reading.moved(1)?;
                let value = json(&field).map_err(|what| {
                    Failure::File(format!("row {number}: `{name}` has {what}, expected texts and lists of messages"))
                })?;
                values.insert(name, value);
            }
            take(Row { place: format!("row {number}"), keys: values, end: (number as f64 / count as f64).min(1.0) })?;
            reading.became_tokens(share(size, number, count));
        }
        Ok(())
    })
}

/// The part of a file's bytes that row `number` of `count` stands for.
fn share(size: u64, number: u64, count: u64) -> u64 {
    let upto = |number: u64| (u128::from(size) * u128::from(number.min(count)) / u128::from(count)) as u64;
    upto(number) - upto(number.saturating_sub(1))
}

/// What a field is in JSON, as far as conversations need it.
fn json(field: &Field) -> Result<Value, &'static str> {
    match field {
        Field::Null => Ok(Value::Null),
        Field::Bool(flag) => Ok(Value::Bool(*flag)),
        Field::Int(number) => Ok((*number).into()),
        Field::Long(number) => Ok((*number).into()),
        Field::Str(text) => Ok(Value::String(text.clone())),
        // Old files do not say that bytes are text.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Ok(Value::String(text.to_owned())),
            Err(_) => Err("bytes that are not UTF-8 text"),
        },
        Field::Group(row) => {
            let entries = row.get_column_iter().map(|(name, field)| Ok((name.clone(), json(field)?)));
            entries.collect::<Result<Map<String, Value>, _>>().map(Value::Object)
        }
        Field::ListInternal(list) => list.elements().iter().map(json).collect::<Result<_, _>>().map(Value::Array),
        _ => Err("a value of a type that is not read"),
    }
}

/// Files that are damaged can make the library panic. What it says then may have words of the file.
fn undamaged<T>(read: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let damaged = |_| Failure::File("not readable as Parquet: what reads it fails on something in it".to_owned());
    guarded(|| Ok(read())).map_err(damaged)?
}

fn unreadable(error: ParquetError) -> Failure {
    Failure::File(format!("not readable as Parquet: {error}"))
}

fn rows(
    file: File,
    spec: &DataSpec,
    reading: &Reading,
    take: &mut dyn FnMut(Document<'_>) -> Result<(), DataError>,
) -> Result<u64, Failure> {
    let size = file.metadata().map_err(|e| Failure::io(&e))?.len();
    let reader = SerializedFileReader::new(file).map_err(unreadable)?;
    let metadata = reader.metadata().file_metadata();
    let count = u64::try_from(metadata.num_rows()).unwrap_or(0).max(1);
    let schema = metadata.schema();
    let column = text_column(schema, spec)?;
    let projection = Type::group_type_builder(schema.name()).with_fields(vec![column]).build().map_err(unreadable)?;
    let (mut row_number, mut without) = (0u64, 0);
    for row in reader.get_row_iter(Some(projection)).map_err(unreadable)? {
        row_number += 1;
        let fields = row.map_err(unreadable)?.into_columns();
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
        reading.became_tokens(share(size, row_number, count));
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
