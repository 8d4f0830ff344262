//! Values as Python writes them: templates are made for it.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value};

/// The widest indent of `tojson`: a template of somebody else's must not fill memory with blanks.
const MOST_INDENT: usize = 64;

/// What `{{ value }}` writes.
pub(super) fn write(out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let fail = |_| Error::from(ErrorKind::WriteFailure);
    match value.kind() {
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }).map_err(fail),
        ValueKind::None => out.write_str("None").map_err(fail),
        ValueKind::Undefined => Ok(()),
        ValueKind::String | ValueKind::Number => write!(out, "{value}").map_err(fail),
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("it writes a {kind}, which needs `tojson`"))),
    }
}

/// `json.dumps` of Python, as templates know it: nothing escaped that need not be.
pub(super) fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > MOST_INDENT) {
        let reason = format!("`tojson` takes an indent of {MOST_INDENT} at most");
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    }
    let value = serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let mut text = String::new();
    dump(&value, indent, 0, &mut text);
    Ok(text)
}

fn dump(value: &serde_json::Value, indent: Option<usize>, depth: usize, text: &mut String) {
    use serde_json::Value as Json;
    let brackets = match value {
        Json::Array(_) => ['[', ']'],
        Json::Object(_) => ['{', '}'],
        _ => return text.push_str(&value.to_string()),
    };
    let (separator, line) = match indent {
        Some(_) => (",", true),
        None => (", ", false),
    };
    let new_line = |text: &mut String, depth: usize| {
        if line {
            text.push('\n');
            text.push_str(&" ".repeat(indent.unwrap_or(0) * depth));
        }
    };
    text.push(brackets[0]);
    let mut is_first = true;
    let mut begin = |text: &mut String| {
        if !std::mem::take(&mut is_first) {
            text.push_str(separator);
        }
        new_line(text, depth + 1);
    };
    match value {
        Json::Array(entries) => {
            for entry in entries {
                begin(text);
                dump(entry, indent, depth + 1, text);
            }
        }
        Json::Object(entries) => {
            for (key, entry) in entries {
                begin(text);
                text.push_str(&Json::from(key.as_str()).to_string());
                text.push_str(": ");
                dump(entry, indent, depth + 1, text);
            }
        }
        _ => {}
    }
    if !is_first {
        new_line(text, depth);
    }
    text.push(brackets[1]);
}
