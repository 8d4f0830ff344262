//! JSON that people write or change: what is wrong with it is said with the key, what was found, and what would be right,
//! and without the names of Rust's types.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

/// What some editors put before a text, and few parsers take.
pub const BYTE_ORDER_MARK: &str = "\u{feff}";

/// The text after a byte order mark.
pub fn without_byte_order_mark(text: &str) -> &str {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// Reads JSON, with or without a byte order mark.
///
/// # Errors
/// What is wrong, in one line, such as `` `n_embd` is the string "768", expected a whole number of at least 0 ``.
pub fn read_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    let text = text.strip_prefix(BYTE_ORDER_MARK.as_bytes()).unwrap_or(text);
    let mut parser = serde_json::Deserializer::from_slice(text);
    let value = read_value(&mut parser)?;
    parser.end().map_err(|error| error.to_string())?;
    Ok(value)
}

/// Reads a value from any form.
///
/// # Errors
/// As [`read_json`].
pub fn read_value<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<T, String> {
    serde_path_to_error::deserialize(from).map_err(|error: serde_path_to_error::Error<D::Error>| {
        let said = error.inner().to_string();
        // Others add where it stands, which the path says.
        in_plain_words(&error.path().to_string(), said.lines().next().unwrap_or_default())
    })
}

/// What serde says of the value at `path`, in plain words. A path of `.` or nothing is the whole.
pub fn in_plain_words(path: &str, said: &str) -> String {
    let (said, place) = match said.rsplit_once(" at line ") {
        Some((said, place)) => (said, format!(" (line {})", place.replace(" column", ", column"))),
        None => (said, String::new()),
    };
    format!("{}{place}", reworded(path, said))
}

fn reworded(path: &str, said: &str) -> String {
    // Where a text breaks off, there is no key yet.
    let path = path.trim_end_matches('?').trim_matches('.');
    if said.starts_with("recursion limit exceeded") {
        return "it is nested too deep".to_owned();
    }
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    let at = |what: String| if path.is_empty() { format!("it {what}") } else { format!("`{path}` {what}") };
    let quoted = |begins: &str| said.strip_prefix(begins).and_then(|rest| rest.split_once('`'));
    if let Some((key, rest)) = quoted("missing field `") {
        return format!("`{}` is missing{rest}", below(key));
    }
    if let Some((key, rest)) = quoted("duplicate field `") {
        return format!("`{}` is there twice{rest}", below(key));
    }
    for begins in ["invalid type: ", "invalid value: "] {
        if let Some((found, expected)) = said.strip_prefix(begins).and_then(|rest| rest.rsplit_once(", expected ")) {
            return at(format!("is {}, expected {}", what_it_is(found), what_is_right(expected)));
        }
    }
    if let Some((length, expected)) =
        said.strip_prefix("invalid length ").and_then(|rest| rest.split_once(", expected "))
    {
        return at(format!("has {length} entries, expected {}", what_is_right(expected)));
    }
    if said.starts_with("data did not match any variant") {
        return at("has none of the forms that are known".to_owned());
    }
    // What our own types say of themselves.
    if path.is_empty() || said.contains(&format!("`{path}`")) { said.to_owned() } else { format!("`{path}`: {said}") }
}

/// A value, as serde names it.
fn what_it_is(found: &str) -> String {
    let inner = |begins: &str| found.strip_prefix(begins).and_then(|rest| rest.strip_suffix('`'));
    let number = inner("boolean `").or(inner("integer `")).or(inner("floating point `"));
    match (number, found) {
        (Some(plain), _) => plain.to_owned(),
        (None, "null" | "unit value" | "Option value") => "null".to_owned(),
        (None, "sequence") => "a list".to_owned(),
        (None, "map" | "struct variant") => "an object".to_owned(),
        (None, text) if text.starts_with("string ") => format!("the {text}"),
        (None, other) => other.to_owned(),
    }
}

/// A type, as serde names it.
fn what_is_right(expected: &str) -> String {
    let plain = match expected {
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => "a whole number of at least 0",
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "a whole number",
        "nonzero u8" | "nonzero u16" | "nonzero u32" | "nonzero u64" | "a nonzero u32" | "a nonzero u64" => {
            "a whole number of at least 1"
        }
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "string" | "str" | "path string" => "a string",
        "a sequence" | "sequence" => "a list",
        "a map" | "map" => "an object",
        "unit" => "null",
        "string or map" => "a string or an object",
        _ if expected.starts_with("struct ") || expected.starts_with("internally tagged enum ") => "an object",
        _ if expected.starts_with("enum ") || expected.starts_with("variant ") => "one of its names",
        _ if expected.starts_with("a tuple of size ") || expected.starts_with("an array of length ") => {
            return format!("a list of {}", digits_of(expected));
        }
        other => other,
    };
    plain.to_owned()
}

/// The number in a text.
fn digits_of(text: &str) -> &str {
    let digit = |c: char| c.is_ascii_digit();
    text.split(|c: char| !digit(c)).rfind(|number| !number.is_empty()).unwrap_or("another length")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only what is wrong with them is looked at")]
    struct Outer {
        size: usize,
        rate: f64,
        name: String,
        is_on: bool,
        inner: Vec<Inner>,
        by_name: BTreeMap<String, i32>,
        betas: (f64, f64),
        kind: Kind,
    }

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only what is wrong with them is looked at")]
    struct Inner {
        depth: u64,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        One,
    }

    fn error(change: &str) -> String {
        let whole = "{\"size\":1,\"rate\":0.5,\"name\":\"a\",\"is_on\":true,\"inner\":[{\"depth\":1}],\
                     \"by_name\":{\"x\":1},\"betas\":[0.9,0.95],\"kind\":\"one\"}";
        read_json::<Outer>(whole.as_bytes()).unwrap();
        let (from, to) = change.split_once(" -> ").unwrap();
        assert!(whole.contains(from), "{from}");
        read_json::<Outer>(whole.replace(from, to).as_bytes()).unwrap_err()
    }

    #[test]
    fn what_is_wrong_is_said_with_its_key_and_without_types_of_rust() {
        for (change, words) in [
            ("\"size\":1 -> \"size\":\"1\"", "`size` is the string \"1\", expected a whole number of at least 0 ("),
            ("\"size\":1 -> \"size\":-1", "`size` is -1, expected a whole number of at least 0 ("),
            ("\"size\":1 -> \"size\":1.5", "`size` is 1.5, expected a whole number of at least 0 ("),
            ("\"size\":1 -> \"size\":null", "`size` is null, expected a whole number of at least 0 ("),
            ("\"size\":1, -> ", "`size` is missing ("),
            ("\"rate\":0.5 -> \"rate\":[]", "`rate` is a list, expected a number ("),
            ("\"name\":\"a\" -> \"name\":{}", "`name` is an object, expected a string ("),
            ("\"is_on\":true -> \"is_on\":\"yes\"", "`is_on` is the string \"yes\", expected true or false ("),
            (
                "{\"depth\":1} -> {\"depth\":\"a, expected b\"}",
                "`inner[0].depth` is the string \"a, expected b\", expected a whole",
            ),
            ("{\"depth\":1} -> {}", "`inner[0].depth` is missing"),
            ("[{\"depth\":1}] -> 7", "`inner` is 7, expected a list"),
            ("{\"x\":1} -> {\"x\":true}", "`by_name.x` is true, expected a whole number"),
            ("[0.9,0.95] -> [0.9]", "`betas` has 1 entries, expected a list of 2"),
            ("\"kind\":\"one\" -> \"kind\":\"two\"", "`kind`: unknown variant `two`, expected `one`"),
            ("\"size\":1 -> \"size\":1,\"size\":2", "`size` is there twice"),
            ("\"size\":1 -> \"size\":1,\"more\":2", "unknown field `more`, expected one of"),
            ("\"size\":1, -> \"size\":1", "expected `,` or `}` (line 1, column"),
        ] {
            let said = error(change);
            assert!(said.contains(words), "{change}: {said}");
        }
        assert_eq!(read_json::<Outer>(b"[]").unwrap_err(), "it has 0 entries, expected an object (line 1, column 2)");
        let deep = read_json::<serde_json::Value>("[".repeat(200_000).as_bytes()).unwrap_err();
        assert!(deep.starts_with("it is nested too deep (line 1, column 12"), "{deep}");
        assert_eq!(read_json::<Outer>(b"{").unwrap_err(), "EOF while parsing an object (line 1, column 1)");
        assert!(read_json::<usize>(b"1 2").unwrap_err().contains("trailing characters"));
    }
}
