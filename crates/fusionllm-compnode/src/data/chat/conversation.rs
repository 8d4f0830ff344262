//! Conversations in rows: a list of messages, a prompt with its completion, or an instruction with its output.

use serde_json::{Map, Value, json};

/// Keys of a row that are looked at.
pub(in crate::data) const KEYS: [&str; 7] =
    ["messages", "prompt", "completion", "instruction", "input", "output", "tools"];
/// What a row may have.
const EXPECTED: &str =
    "expected `messages`, or `prompt` and `completion`, or `instruction` and `output` (and perhaps `input`)";
/// Who answers.
const ASSISTANT: &str = "assistant";

/// Messages, and from which on answers are learnt.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conversation {
    pub(super) messages: Vec<Value>,
    pub(super) learnt_from: usize,
}

impl Conversation {
    /// Places of the messages that are learnt.
    pub(super) fn answers(&self) -> impl Iterator<Item = usize> + '_ {
        (self.learnt_from..self.messages.len()).filter(|&at| role(&self.messages[at]) == ASSISTANT)
    }

    /// Those of all answers that are learnt; nothing if that cannot be told.
    pub(super) fn learnt<T>(&self, answers: Vec<T>) -> Option<Vec<T>> {
        let before = self.messages[..self.learnt_from].iter().filter(|m| role(m) == ASSISTANT).count();
        let all = before + self.answers().count();
        if before == 0 {
            return Some(answers);
        }
        (answers.len() == all).then(|| answers.into_iter().skip(before).collect())
    }
}

fn role(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or_default()
}

/// What a row says. Errors name keys, and nothing of what they hold.
pub(super) fn of_row(row: &Map<String, Value>) -> Result<Conversation, String> {
    let has = |key: &str| row.get(key).is_some_and(|value| !value.is_null());
    if has("tools") && !row.get("tools").and_then(Value::as_array).is_some_and(Vec::is_empty) {
        return Err("it has `tools`, which are not written out here: take the key away".to_owned());
    }
    let conversation = if has("messages") {
        Conversation { messages: messages(row, "messages")?, learnt_from: 0 }
    } else if has("prompt") || has("completion") {
        let mut messages = side(row, "prompt", "user")?;
        let learnt_from = messages.len();
        messages.extend(side(row, "completion", ASSISTANT)?);
        Conversation { messages, learnt_from }
    } else if has("instruction") || has("output") {
        let mut question = text(row, "instruction")?.to_owned();
        if has("input") && !text(row, "input")?.is_empty() {
            question.push_str("\n\n");
            question.push_str(text(row, "input")?);
        }
        let messages = vec![message("user", &question), message(ASSISTANT, text(row, "output")?)];
        Conversation { messages, learnt_from: 1 }
    } else {
        return Err(format!("it has no conversation, {EXPECTED}"));
    };
    if conversation.messages.is_empty() {
        return Err("it has no messages, expected at least one".to_owned());
    }
    Ok(conversation)
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

fn text<'a>(row: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    match row.get(key) {
        None | Some(Value::Null) => Err(format!("`{key}` is missing, {EXPECTED}")),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("`{key}` is no string")),
    }
}

/// One side of a pair: a text, or messages.
fn side(row: &Map<String, Value>, key: &str, role: &str) -> Result<Vec<Value>, String> {
    match row.get(key) {
        Some(Value::Array(_)) => messages(row, key),
        _ => Ok(vec![message(role, text(row, key)?)]),
    }
}

fn messages(row: &Map<String, Value>, key: &str) -> Result<Vec<Value>, String> {
    let Some(Value::Array(messages)) = row.get(key) else {
        return Err(format!("`{key}` is no list, expected one of {{\"role\": …, \"content\": …}}"));
    };
    for (at, message) in messages.iter().enumerate() {
        for part in ["role", "content"] {
            match message.get(part) {
                Some(Value::String(_)) => {}
                None | Some(Value::Null) => return Err(format!("`{key}[{at}].{part}` is missing, expected a string")),
                Some(_) => return Err(format!("`{key}[{at}].{part}` is no string")),
            }
        }
        let calls = message.get("tool_calls").is_some_and(|calls| !calls.is_null());
        if calls {
            return Err(format!("`{key}[{at}].tool_calls` is not written out here: take it away"));
        }
        let weight = message.get("weight").and_then(Value::as_f64);
        if role(message) == ASSISTANT
            && message.get("weight").is_some_and(|given| !given.is_null())
            && weight != Some(1.0)
        {
            return Err(format!("`{key}[{at}].weight` is not followed here, all answers are learnt: take it away"));
        }
    }
    Ok(messages.clone())
}
