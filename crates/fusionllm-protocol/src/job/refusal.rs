//! How a value that cannot be taken is refused.

use toml::Value;

use crate::JobError;

/// Why a value is refused that is none, as from an unset variable.
pub(super) const EMPTY: &str = "is empty, expected a value; leave the key out for its default";

/// Refuses the value of `key`. `reason` says what it is and what would be right.
pub(super) fn fail<T>(key: &str, reason: String) -> Result<T, JobError> {
    Err(JobError::Value { key: key.to_owned(), reason })
}

/// A value for an error message: its type and, where it is short, itself.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the string {text:?}"),
        Value::Integer(number) => format!("{number}"),
        // With its point, which tells it from a whole number.
        Value::Float(number) => format!("{number:?}"),
        Value::Boolean(flag) => format!("{flag}"),
        Value::Datetime(_) => "a date".to_owned(),
        Value::Array(entries) => format!("a list of {}", entries.len()),
        Value::Table(_) => "a table".to_owned(),
    }
}
