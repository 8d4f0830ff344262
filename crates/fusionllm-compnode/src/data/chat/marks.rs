//! `{% generation %}` in a template: what it encloses is an answer. It becomes marks in the text that are taken out again.

use std::ops::Range;

/// Before and after an answer; no text has them, since they are no characters for interchange.
const BEGIN: &str = "\u{10ffff}\u{fdd0}";
const END: &str = "\u{10ffff}\u{fdd1}";

/// The template with marks in the place of its tags, and whether there were any.
pub(super) fn with_marks(source: &str) -> (String, bool) {
    let (mut marked, mut rest, mut any) = (String::with_capacity(source.len()), source, false);
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        marked.push_str(before);
        // Its end is no part of its beginning, as in `{%}`.
        let Some(end) = tag[2..].find("%}").map(|end| end + 4) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        let inner = &tag[2..tag.len() - 2];
        let left = inner.get(..1).filter(|sign| ["-", "+"].contains(sign)).unwrap_or_default();
        let right = inner.get(inner.len().saturating_sub(1)..).filter(|sign| ["-", "+"].contains(sign));
        let right = right.unwrap_or_default();
        let mark = match inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim() {
            "generation" => Some(BEGIN),
            "endgeneration" => Some(END),
            _ => None,
        };
        match mark {
            // Tags and not an expression, so that the lines around are trimmed as around any tag.
            Some(mark) => {
                marked.push_str(&format!("{{%{left} if true %}}{{{{ \"{mark}\" }}}}{{% endif {right}%}}"));
                any = true;
            }
            None => marked.push_str(tag),
        }
        rest = after;
    }
    marked.push_str(rest);
    (marked, any)
}

/// Whether a text has what marks are made of.
pub(super) fn has_mark(text: &str) -> bool {
    text.contains(BEGIN) || text.contains(END)
}

/// The text without its marks, and what they enclosed; nothing if they are not in pairs.
pub(super) fn take_marks(marked: &str) -> Option<(String, Vec<Range<usize>>)> {
    let (mut text, mut answers, mut rest) = (String::with_capacity(marked.len()), Vec::new(), marked);
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let (answer, after) = after.split_once(END)?;
        if has_mark(before) || has_mark(answer) {
            return None;
        }
        text.push_str(before);
        let start = text.len();
        text.push_str(answer);
        answers.push(start..text.len());
        rest = after;
    }
    text.push_str(rest);
    (!has_mark(rest)).then_some((text, answers))
}
