//! `--set section.key=value`.

use toml::{Table, Value};

use crate::JobError;

/// Puts an override into the table, over what the file says.
pub(super) fn apply(table: &mut Table, given: &str) -> Result<(), JobError> {
    let malformed = || JobError::Override { given: given.to_owned() };
    let (path, value) = given.split_once('=').ok_or_else(malformed)?;
    let path = path.trim();
    let value = read_value(value.trim());
    let (section, key) = match path.split_once('.') {
        Some((section, key)) => (section, key),
        None if path == "name" => ("", path),
        None => return Err(malformed()),
    };
    if key.is_empty() || key.contains('.') || (section.is_empty() && path != "name") {
        return Err(malformed());
    }
    if section.is_empty() {
        table.insert(key.to_owned(), value);
        return Ok(());
    }
    match table.entry(section.to_owned()).or_insert_with(|| Value::Table(Table::new())) {
        Value::Table(entries) => {
            entries.insert(key.to_owned(), value);
            Ok(())
        }
        other => {
            let reason = format!("is {}, expected a section: [{section}]", super::refusal::describe(other));
            Err(JobError::Value { key: section.to_owned(), reason })
        }
    }
}

/// A TOML value, or the text itself where it is none: shells eat quotes.
fn read_value(text: &str) -> Value {
    let one_line = !text.contains(['\n', '\r']);
    let parsed = one_line.then(|| format!("value = {text}").parse::<Table>().ok()).flatten();
    parsed
        .and_then(|mut table| if table.len() == 1 { table.remove("value") } else { None })
        .unwrap_or_else(|| Value::String(text.to_owned()))
}
