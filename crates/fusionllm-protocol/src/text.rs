//! Text of peers, made fit for a terminal, a log, a report and a line of JSON.
//!
//! A peer writes what it likes into its strings: escape sequences that retitle or clear a terminal, newlines that forge
//! lines of a log, marks that turn the direction of text. All of it goes through [`clean`] when a message is decoded
//! ([`crate::decode_clean`]), so nothing that is printed later needs to think of it.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess, Visitor};

/// Longest text of a peer that is kept, in characters.
const MOST_CHARS: usize = 4000;
/// Longest name, in characters.
const MOST_NAME_CHARS: usize = 100;

/// The text without what a terminal or a reader could be deceived by: controls, line breaks, marks of direction and
/// characters without a width are replaced, and what is longer than 4000 characters is cut off.
pub fn clean(text: &str) -> Cow<'_, str> {
    clean_to(text, MOST_CHARS)
}

/// The same with at most `most` characters.
pub fn clean_to(text: &str, most: usize) -> Cow<'_, str> {
    let cut = text.char_indices().nth(most).map(|(at, _)| at);
    if cut.is_none() && !text.chars().any(is_deceptive) {
        return Cow::Borrowed(text);
    }
    let mut cleaned: String = text.get(..cut.unwrap_or(text.len())).unwrap_or_default().chars().map(harmless).collect();
    if cut.is_some() {
        cleaned.push('…');
    }
    Cow::Owned(cleaned)
}

/// A text of several lines, such as a model writes, without what a terminal or a reader could be deceived by. Line breaks
/// and tabulators stay, and its length.
pub fn clean_lines(text: &str) -> String {
    let shown = |c| if matches!(c, '\n' | '\t') { c } else { harmless(c) };
    text.chars().map(shown).collect()
}

/// Whether a text can be the name of a CompNode, a job or a ticket: 1 to 100 letters, digits, spaces and ASCII
/// punctuation, with no space at either end.
pub fn is_plain_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_alphanumeric() || c.is_ascii_punctuation() || c == ' ';
    !name.is_empty() && name.trim() == name && name.chars().count() <= MOST_NAME_CHARS && name.chars().all(is_plain)
}

fn harmless(c: char) -> char {
    match c {
        '\n' | '\r' | '\t' | '\u{2028}' | '\u{2029}' => ' ',
        c if is_deceptive(c) => char::REPLACEMENT_CHARACTER,
        c => c,
    }
}

/// Whether a character is a control, or shows nothing and changes how others are shown.
pub fn is_deceptive(c: char) -> bool {
    let is_invisible = matches!(c,
        // Marks, embeddings, overrides and isolates of direction.
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{206f}'
        // Without a width, or tags. The two joiners stay: scripts need them.
        | '\u{200b}' | '\u{2060}'..='\u{2065}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}');
    c.is_control() || is_invisible
}

/// For a field that holds a peer's text in a message which is not cleaned as a whole.
pub(crate) fn cleaned<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    serde::Deserialize::deserialize(Clean(deserializer))
}

/// Wraps a deserializer, or one of the helpers of one, so that every string in it is cleaned.
pub(crate) struct Clean<T>(pub(crate) T);

macro_rules! forward {
    ($($method:ident $(($($argument:ident: $type:ty),*))?),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, $($($argument: $type,)*)? visitor: V) -> Result<V::Value, Self::Error> {
            self.0.$method($($($argument,)*)? Clean(visitor))
        })*
    };
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Clean<D> {
    type Error = D::Error;

    forward!(
        deserialize_any,
        deserialize_bool,
        deserialize_i8,
        deserialize_i16,
        deserialize_i32,
        deserialize_i64,
        deserialize_i128,
        deserialize_u8,
        deserialize_u16,
        deserialize_u32,
        deserialize_u64,
        deserialize_u128,
        deserialize_f32,
        deserialize_f64,
        deserialize_char,
        deserialize_str,
        deserialize_string,
        deserialize_bytes,
        deserialize_byte_buf,
        deserialize_option,
        deserialize_unit,
        deserialize_unit_struct(name: &'static str),
        deserialize_newtype_struct(name: &'static str),
        deserialize_seq,
        deserialize_tuple(len: usize),
        deserialize_tuple_struct(name: &'static str, len: usize),
        deserialize_map,
        deserialize_struct(name: &'static str, fields: &'static [&'static str]),
        deserialize_enum(name: &'static str, variants: &'static [&'static str]),
        deserialize_identifier,
        deserialize_ignored_any,
    );

    fn is_human_readable(&self) -> bool {
        self.0.is_human_readable()
    }
}

macro_rules! visit {
    ($($method:ident: $type:ty),* $(,)?) => {
        $(fn $method<E: Error>(self, value: $type) -> Result<V::Value, E> {
            self.0.$method(value)
        })*
    };
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Clean<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    visit!(
        visit_bool: bool,
        visit_i8: i8,
        visit_i16: i16,
        visit_i32: i32,
        visit_i64: i64,
        visit_i128: i128,
        visit_u8: u8,
        visit_u16: u16,
        visit_u32: u32,
        visit_u64: u64,
        visit_u128: u128,
        visit_f32: f32,
        visit_f64: f64,
        visit_bytes: &[u8],
        visit_borrowed_bytes: &'de [u8],
        visit_byte_buf: Vec<u8>,
    );

    fn visit_char<E: Error>(self, value: char) -> Result<V::Value, E> {
        self.0.visit_char(harmless(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<V::Value, E> {
        self.0.visit_str(&clean(value))
    }

    fn visit_borrowed_str<E: Error>(self, value: &'de str) -> Result<V::Value, E> {
        match clean(value) {
            Cow::Borrowed(value) => self.0.visit_borrowed_str(value),
            Cow::Owned(value) => self.0.visit_string(value),
        }
    }

    fn visit_string<E: Error>(self, value: String) -> Result<V::Value, E> {
        self.0.visit_string(clean(&value).into_owned())
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.0.visit_none()
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.0.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.0.visit_some(Clean(deserializer))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.0.visit_newtype_struct(Clean(deserializer))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<V::Value, A::Error> {
        self.0.visit_seq(Clean(seq))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        self.0.visit_map(Clean(map))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<V::Value, A::Error> {
        self.0.visit_enum(Clean(data))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Clean<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Clean(deserializer))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Clean<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.0.next_element_seed(Clean(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Clean<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.0.next_key_seed(Clean(seed))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.0.next_value_seed(Clean(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for Clean<A> {
    type Error = A::Error;
    type Variant = Clean<A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self::Variant), A::Error> {
        self.0.variant_seed(Clean(seed)).map(|(value, variant)| (value, Clean(variant)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Clean<A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.0.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        self.0.newtype_variant_seed(Clean(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        self.0.tuple_variant(len, Clean(visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        self.0.struct_variant(fields, Clean(visitor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stay_lines() {
        assert_eq!(clean_lines("a\n\tb\u{1b}[2J\r\u{202e}c"), "a\n\tb\u{fffd}[2J \u{fffd}c");
    }

    #[test]
    fn what_deceives_is_replaced_and_the_rest_stays() {
        let cases = [
            ("GPU of Zoë, 24 GB (cuda:0)", "GPU of Zoë, 24 GB (cuda:0)"),
            ("\u{1b}]0;pwned\u{7}\u{1b}[2J", "\u{fffd}]0;pwned\u{fffd}\u{fffd}[2J"),
            ("one\nerror: two\r\n", "one error: two  "),
            ("\u{9b}31m", "\u{fffd}31m"),
            ("a\u{202e}b\u{2066}c\u{200b}", "a\u{fffd}b\u{fffd}c\u{fffd}"),
            ("a\u{2028}b", "a b"),
        ];
        for (text, expected) in cases {
            assert_eq!(clean(text), expected, "{text:?}");
            assert_eq!(clean(&clean(text)), expected, "cleaning twice is cleaning once");
        }
        assert_eq!(clean(&"é".repeat(5000)).chars().count(), MOST_CHARS + 1);
        assert_eq!(clean_to("abcdef", 3), "abc…");
    }

    #[test]
    fn names_are_words_that_can_be_typed() {
        for name in ["office", "rack-2", "Büro 3", "a", "node.example.org"] {
            assert!(is_plain_name(name), "{name:?}");
        }
        for name in ["", " ", "a ", "a\nb", "\u{1b}[2J", "of\u{200d}fice", "a\u{202e}b", &"x".repeat(101)] {
            assert!(!is_plain_name(name), "{name:?}");
        }
    }
}
