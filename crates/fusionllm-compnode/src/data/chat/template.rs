//! Chat templates: Jinja, rendered as `transformers` does.

use std::collections::BTreeMap;
use std::path::Path;

use fusionllm_protocol::hugging_face::{CHAT_FILES, CHAT_TEMPLATE as TEMPLATE, SPECIAL_TOKENS, TOKENIZER_CONFIG};
use fusionllm_protocol::{DataSpec, RowKind, content_hash};
use fusionllm_transport::read_text;
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde_json::{Map, Value};

use super::conversation::Conversation;
use super::marks::{has_mark, take_marks, with_marks};
use super::{Unusable, Written, python};
use crate::DataError;
use crate::data::{ReadableData, Reading};

/// Steps that a template may take for a conversation: those of models take some thousands. Each 64 bytes that it makes are
/// one, so it makes 128 MB at the most.
const MOST_STEPS: u64 = 2_000_000;
/// Special tokens that a template may name.
const SPECIAL: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// What the template is called inside.
const NAME: &str = "chat";

/// How a model writes a conversation out.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    pub(super) source: String,
    /// Where it lies, for messages.
    name: String,
    pub(super) special: BTreeMap<String, String>,
    /// Whether the template itself says which text is an answer.
    is_marked: bool,
}

impl ChatTemplate {
    /// The template of a job whose rows are conversations: `data.chat_template`, or else what lies beside the tokenizer's
    /// file. `of_model` has the contents of the files of [`CHAT_FILES`] that lie in the model's directory, by name.
    ///
    /// # Errors
    /// [`DataError::ChatTemplate`] if there is none or it cannot be used, [`DataError::NotReadable`].
    pub fn of_job(
        spec: &DataSpec,
        of_model: &BTreeMap<String, String>,
        readable: &ReadableData,
    ) -> Result<Option<Self>, DataError> {
        if spec.rows != RowKind::Chat {
            return Ok(None);
        }
        readable.check(spec)?;
        let beside = match spec.tokenizer_file() {
            Some(file) => files_beside(file, readable),
            None if spec.tokenizer == DataSpec::MODEL => of_model.clone(),
            None => BTreeMap::new(),
        };
        let fail = |name: &str, reason: String| DataError::ChatTemplate { name: name.to_owned(), reason };
        let config: Option<Map<String, Value>> = match beside.get(TOKENIZER_CONFIG) {
            Some(text) => {
                let reason = "no JSON object, so its chat_template cannot be read";
                Some(serde_json::from_str(text).map_err(|_| fail(TOKENIZER_CONFIG, reason.to_owned()))?)
            }
            None => None,
        };
        let (source, name) = match &spec.chat_template {
            Some(path) => {
                let name = path.display().to_string();
                let text = readable.open(path).and_then(read_text).map_err(|e| fail(&name, e.to_string()))?;
                (text, name)
            }
            None => match beside.get(TEMPLATE) {
                Some(text) => (text.clone(), TEMPLATE.to_owned()),
                None => match config.as_ref().and_then(|config| config.get("chat_template")) {
                    Some(given) => {
                        (default_of(given).map_err(|r| fail(TOKENIZER_CONFIG, r))?, TOKENIZER_CONFIG.to_owned())
                    }
                    None => {
                        let reason = "there is none beside the tokenizer, neither chat_template.jinja nor chat_template in \
                                      tokenizer_config.json";
                        return Err(fail("of the model", reason.to_owned()));
                    }
                },
            },
        };
        let map = beside.get(SPECIAL_TOKENS).and_then(|text| serde_json::from_str(text).ok());
        let special = special_tokens(&[config.unwrap_or_default(), map.unwrap_or_default()]);
        Self::new(source, name.clone(), special).map(Some).map_err(|reason| fail(&name, reason))
    }

    fn new(source: String, name: String, special: BTreeMap<String, String>) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| e.to_string())?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_formatter(python::write);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(MOST_STEPS));
        environment.add_filter("tojson", python::to_json);
        environment.add_function("raise_exception", |reason: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, reason))
        });
        // As Jinja reads them, whatever wrote the file.
        let (marked, is_marked) = with_marks(&source.replace("\r\n", "\n").replace('\r', "\n"));
        let mut template = Self { environment, source, name, special, is_marked };
        let added = template.environment.add_template_owned(NAME, marked);
        added.map_err(|error| template.reason(&error))?;
        Ok(template)
    }

    /// Where it lies.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What tells it from others, its special tokens included.
    pub(crate) fn fingerprint(&self) -> String {
        content_hash(format!("{:?} {}", self.special, self.source).as_bytes())
    }

    /// Writes a conversation out and finds its answers.
    pub(super) fn write(&self, conversation: &Conversation, reading: &Reading) -> Result<Written, Unusable> {
        let Conversation { messages, .. } = conversation;
        let refused = |reason: &str| Err(Unusable::Row(reason.to_owned()));
        let has_mark = |m: &Value| m.as_object().is_some_and(|m| m.values().filter_map(Value::as_str).any(has_mark));
        if messages.iter().any(has_mark) {
            return refused("it has characters that no text has (U+10FFFF)");
        }
        let whole = self.render(messages, false)?;
        if self.is_marked {
            let Some((text, answers)) = take_marks(&whole) else {
                return refused("the chat template's {% generation %} and {% endgeneration %} do not come in pairs");
            };
            let Some(answers) = conversation.learnt(answers) else {
                return refused(
                    "the chat template encloses another number of answers than `completion` and `prompt` have",
                );
            };
            return Ok(Written { text, answers });
        }
        let mut answers = Vec::new();
        for at in conversation.answers() {
            // What is before an answer is written out for each: that takes the square of a long conversation's length.
            reading.moved(1).map_err(Unusable::Other)?;
            let before = self.render(&messages[..at], true)?;
            let is_last = at + 1 == messages.len();
            let after = if is_last { whole.clone() } else { self.render(&messages[..=at], false)? };
            if !(whole.starts_with(&after) && after.starts_with(&before)) {
                return refused(&format!(
                    "the chat template writes what comes before or in `messages[{at}]` otherwise once more follows, so its \
                     answers cannot be told apart: enclose them in the template in {{% generation %}} and {{% \
                     endgeneration %}}, and give its path in data.chat_template"
                ));
            }
            answers.push(before.len()..after.len());
        }
        Ok(Written { text: whole, answers })
    }

    /// The text of messages, with the beginning of an answer behind them if `prompts`.
    fn render(&self, messages: &[Value], prompts: bool) -> Result<String, Unusable> {
        let special = self.special.iter().map(|(name, token)| (name.as_str(), minijinja::Value::from(token.as_str())));
        let given: [(&str, minijinja::Value); 4] = [
            ("messages", minijinja::Value::from(minijinja::value::Serde(messages))),
            ("add_generation_prompt", prompts.into()),
            ("tools", ().into()),
            ("documents", ().into()),
        ];
        let context = minijinja::Value::from_pairs(special.chain(given));
        let rendered = self.environment.get_template(NAME).and_then(|template| template.render(context));
        rendered.map_err(|error| Unusable::Row(self.reason(&error)))
    }

    /// Why the template fails, with nothing of what it was given: only its own words are repeated.
    fn reason(&self, error: &Error) -> String {
        let line = error.line().map(|line| format!(" (its line {line})")).unwrap_or_default();
        let own = error.detail().filter(|detail| self.source.contains(detail));
        match (own, error.kind()) {
            (Some(detail), _) => format!("the chat template refuses it: {detail}{line}"),
            (None, ErrorKind::OutOfFuel) => format!("the chat template takes more than {MOST_STEPS} steps{line}"),
            (None, ErrorKind::SyntaxError) => format!("not readable as Jinja{line}"),
            (None, kind) => format!("the chat template fails on it: {kind}{line}"),
        }
    }
}

/// The files beside a tokenizer's that say how conversations are written, as far as they are there and may be read.
fn files_beside(tokenizer: &Path, readable: &ReadableData) -> BTreeMap<String, String> {
    let read = |name: &str| {
        let text = readable.open(&tokenizer.with_file_name(name)).and_then(read_text).ok()?;
        Some((name.to_owned(), text))
    };
    CHAT_FILES.into_iter().filter_map(read).collect()
}

/// The template, or of several the one that is called `default`.
fn default_of(given: &Value) -> Result<String, String> {
    let named = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
    let found = match given {
        Value::String(text) => Some(text.as_str()),
        Value::Array(several) => several.iter().find(named).and_then(|e| e.get("template")).and_then(Value::as_str),
        _ => None,
    };
    found
        .map(str::to_owned)
        .ok_or_else(|| "its chat_template is neither a text nor a list with one named default".to_owned())
}

/// The special tokens of the first place that has each.
fn special_tokens(places: &[Map<String, Value>]) -> BTreeMap<String, String> {
    let of = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned);
    let found = |name: &str| places.iter().find_map(|place| of(place.get(name)?));
    SPECIAL.into_iter().filter_map(|name| Some((name.to_owned(), found(name)?))).collect()
}
