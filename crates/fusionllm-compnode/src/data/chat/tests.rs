//! Chat templates and answers, against what `transformers` makes of the same (`tests/golden/chat/make.py`).

use std::path::{Path, PathBuf};

use fusionllm_protocol::JobSpec;
use serde_json::json;

use super::*;
use crate::data::{Corpus, ReadableData, Reading, Split, Tokenizing};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/chat").join(name).canonicalize().unwrap()
}

/// A job on the golden conversations with the tokenizer of a folder.
fn job(folder: &Path, changes: &str) -> JobSpec {
    let text = format!(
        "[model]\nname = \"gpt2\"\n[data]\npath = {:?}\nformat = \"jsonl\"\nrows = \"chat\"\ntokenizer = {:?}\nseq_len = 96\n\
         eval_fraction = 0.2\ncache = false\n{changes}",
        golden("data.jsonl"),
        folder.join("tokenizer.json"),
    );
    JobSpec::from_toml(&text, &[]).unwrap()
}

fn opened(spec: &JobSpec) -> (ChatTemplate, Tokenizer) {
    let template = ChatTemplate::of_job(&spec.data, &Default::default(), &ReadableData::everything()).unwrap().unwrap();
    (template, Tokenizer::open(&spec.data.tokenizer).unwrap())
}

fn object(value: Value) -> Map<String, Value> {
    let Value::Object(keys) = value else { panic!() };
    keys
}

/// A template alone, on bytes.
fn of_bytes(source: &str) -> Result<ChatTemplate, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.jinja");
    std::fs::write(&path, source).unwrap();
    let text = format!(
        "[model]\nname = \"gpt2\"\n[data]\npath = \"x\"\nformat = \"jsonl\"\nrows = \"chat\"\nchat_template = {path:?}\n"
    );
    let spec = JobSpec::from_toml(&text, &[]).unwrap();
    spec.validate().unwrap();
    let template = ChatTemplate::of_job(&spec.data, &Default::default(), &ReadableData::everything());
    template.map(Option::unwrap).map_err(|error| error.to_string().replace(path.to_str().unwrap(), "FILE"))
}

/// The text of a row, and its learnt parts.
fn written(template: &ChatTemplate, row: Value) -> Result<(String, Vec<String>), String> {
    let sample =
        template.sample(&object(row), &Tokenizer::Bytes, &Reading::default()).map_err(|unusable| match unusable {
            Unusable::Row(reason) => reason,
            Unusable::Other(error) => error.to_string(),
        })?;
    let mut parts = vec![Vec::new()];
    for (&id, &is_answer) in sample.ids.iter().zip(&sample.answer) {
        match is_answer {
            true => parts.last_mut().unwrap().push(id),
            false if parts.last().unwrap().is_empty() => {}
            false => parts.push(Vec::new()),
        }
    }
    parts.retain(|part| !part.is_empty());
    Ok((sample.text, parts.iter().map(|part| Tokenizer::Bytes.decode(part).unwrap()).collect()))
}

const PLAIN: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

#[test]
fn tokens_and_answers_are_those_of_transformers() {
    let found: Value = serde_json::from_slice(&std::fs::read(golden("cases.json")).unwrap()).unwrap();
    let text = std::fs::read_to_string(golden("data.jsonl")).unwrap();
    let rows: Vec<Map<String, Value>> = text.lines().map(|line| object(serde_json::from_str(line).unwrap())).collect();
    for style in ["chatml", "llama3", "mistral", "marked"] {
        let (template, tokenizer) = opened(&job(&golden(style), ""));
        let expected = found["tokens"][style].as_array().unwrap();
        assert_eq!(expected.len(), rows.len());
        for (number, (row, expected)) in rows.iter().zip(expected).enumerate() {
            let sample = template.sample(row, &tokenizer, &Reading::default()).unwrap();
            let answer: Vec<u8> = sample.answer.iter().map(|&is_answer| u8::from(is_answer)).collect();
            assert_eq!(json!(sample.ids), expected["ids"], "{style}, row {number}: {}", sample.text);
            assert_eq!(json!(answer), expected["answer"], "{style}, row {number}: {}", sample.text);
        }
    }
}

#[test]
fn a_corpus_of_conversations_knows_where_they_begin_and_what_is_learnt() {
    let spec = job(&golden("chatml"), "");
    let (template, tokenizer) = opened(&spec);
    let by = Tokenizing { tokenizer: &tokenizer, template: Some(&template) };
    let corpus = Corpus::read_watched(&spec.data, by, &Reading::default()).unwrap();
    assert_eq!((corpus.rows(Split::Train), corpus.rows(Split::HeldOut)), (Some(7), Some(3)));
    let first = corpus.row(Split::Train, 0).unwrap();
    assert_eq!((first.len(), first.iter().filter(|(_, is_answer)| *is_answer).count()), (54, 5));
    let last = corpus.row(Split::HeldOut, 2).unwrap();
    assert_eq!((last.len(), last.iter().filter(|(_, is_answer)| *is_answer).count()), (53, 12));
    assert!((0..7).all(|row| corpus.row(Split::Train, row).unwrap().len() <= 96));
    let report = corpus.report(tokenizer.entries()).unwrap();
    let notes = report.notes.join("\n");
    for words in [
        "chat template: tokenizer_config.json; the loss is that of the answers alone",
        "7 conversations to train on, 3 held out",
        "2 conversations are cut to their first data.seq_len = 96 tokens",
        "1 conversations without an answer among their first data.seq_len = 96 tokens are left out",
    ] {
        assert!(notes.contains(words), "`{words}` is not in\n{notes}");
    }
    assert_eq!((report.bits_per_byte(1.0), report.unigram_loss.is_finite()), (None, true));
    // The ids are those of the tokenizer, without the sign of an answer.
    assert_eq!(corpus.check_vocabulary(tokenizer.entries(), false).unwrap(), None);
}

#[test]
fn every_form_of_a_row_is_a_conversation() {
    let template = of_bytes(PLAIN).unwrap();
    let of = |row: Value| written(&template, row).unwrap().1;
    let both = "</>\n<assistant>";
    assert_eq!(of(json!({"prompt": "a", "completion": "b"})), ["b</>\n"]);
    let (text, _) = written(&template, json!({"instruction": "a", "input": "x", "output": "b"})).unwrap();
    assert_eq!(text, format!("<user>a\n\nx{both}b</>\n"));
    let (text, _) = written(&template, json!({"instruction": "a", "input": "", "output": "b", "tools": []})).unwrap();
    assert_eq!(text, format!("<user>a{both}b</>\n"));
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let messages = json!([turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]);
    assert_eq!(of(json!({"messages": messages})), ["b</>\n", "d</>\n"]);
    let pair = json!({"prompt": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")], "completion": "d"});
    assert_eq!(of(pair), ["d</>\n"]);
}

#[test]
fn marks_in_a_template_say_what_is_learnt() {
    let source = PLAIN.replace("{{ m.content }}</>", "{%- generation %}{{ m.content }}{%- endgeneration -%}  </>");
    let template = of_bytes(&source).unwrap();
    let row = json!({"messages": [{"role": "assistant", "content": "b"}]});
    assert_eq!(written(&template, row).unwrap(), ("<assistant>b</>\n".to_owned(), vec!["b".to_owned()]));
    let row = json!({"prompt": "\u{10ffff}\u{fdd0}", "completion": "b"});
    assert!(written(&template, row).unwrap_err().contains("characters that no text has"));
    let open = of_bytes("{% generation %}").unwrap();
    assert!(written(&open, json!({"prompt": "a", "completion": "b"})).unwrap_err().contains("do not come in pairs"));
}

#[test]
fn templates_are_rendered_as_in_python() {
    let row = json!({"messages": [{"role": "user", "content": "  a b "}, {"role": "assistant", "content": "x"}]});
    for (source, expected) in [
        ("{{ messages[0].content.strip().split(' ')[-1] }}", "b"),
        ("{{ messages[0]['content'].upper().startswith('  A') }}{{ none }}", "TrueNone"),
        ("{{ {'a': [1, true, 'ö<'], 'b': none} | tojson }}", "{\"a\": [1, true, \"ö<\"], \"b\": null}"),
        ("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}"),
        ("{% if true %}\n  {% set x = 1 %}\n a\n{% endif %}\n", " a\n"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "x"),
        ("{{ messages[::-1][0].content }}{{ missing }}{{ strftime_now is defined }}", "xFalse"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ '<b>' }}", "<b>"),
        ("{% if true %}\r\na\r\n{% endif %}b\rc", "a\nb\nc"),
    ] {
        // Marked, so that nothing but the whole is rendered.
        let template = of_bytes(&format!("{{% generation %}}{source}{{% endgeneration %}}")).unwrap();
        let text = written(&template, row.clone()).unwrap().0;
        assert_eq!(text, expected, "{source}");
    }
}

#[test]
fn what_is_wrong_with_a_row_is_said_without_its_words() {
    let template = of_bytes(PLAIN).unwrap();
    for (row, expected) in [
        (json!({"text": "secret"}), "it has no conversation, expected `messages`, or"),
        (json!({"messages": "secret"}), "`messages` is no list, expected one of"),
        (json!({"messages": []}), "it has no messages"),
        (json!({"messages": [{"role": "user"}]}), "`messages[0].content` is missing, expected a string"),
        (json!({"messages": [{"role": "user", "content": ["secret"]}]}), "`messages[0].content` is no string"),
        (json!({"prompt": "secret"}), "`completion` is missing"),
        (json!({"prompt": 7, "completion": "secret"}), "`prompt` is no string"),
        (json!({"instruction": "secret", "input": [], "output": ""}), "`input` is no string"),
        (json!({"messages": [{"role": "user", "content": "secret"}], "tools": ["secret"]}), "it has `tools`"),
        (
            json!({"messages": [{"role": "assistant", "content": "", "tool_calls": ["secret"]}]}),
            "`messages[0].tool_calls` is not written out",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "secret", "weight": 0}]}),
            "`messages[0].weight` is not followed here",
        ),
    ] {
        let error = written(&template, row).unwrap_err();
        assert!(error.starts_with(expected) && !error.contains("secret"), "{error}");
    }
    let strict =
        of_bytes("{% for m in messages %}\n{{ raise_exception('Roles must alternate') }}{% endfor %}").unwrap();
    let secret = json!({"prompt": "secret", "completion": "secret"});
    let error = written(&strict, secret.clone()).unwrap_err();
    assert_eq!(error, "the chat template refuses it: Roles must alternate (its line 2)");
    let talks = of_bytes("{{ raise_exception('Not ' ~ messages[0].content) }}").unwrap();
    let error = written(&talks, secret.clone()).unwrap_err();
    assert!(error.starts_with("the chat template fails on it") && !error.contains("secret"), "{error}");
    let endless = of_bytes("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}").unwrap();
    assert!(written(&endless, secret.clone()).unwrap_err().contains("steps"));
    let doubles =
        of_bytes("{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}")
            .unwrap();
    assert!(written(&doubles, secret.clone()).unwrap_err().contains("steps"));
    let blanks = of_bytes("{{ [1] | tojson(indent=9223372036854775807) }}").unwrap();
    assert!(written(&blanks, secret.clone()).unwrap_err().starts_with("the chat template fails on it"));
    let changes = of_bytes("{{ messages | length }}{{ messages[0].content }}").unwrap();
    let error = written(&changes, secret).unwrap_err();
    assert!(error.contains("`messages[1]`") && error.contains("{% generation %}"), "{error}");
}

#[test]
fn a_template_that_is_missing_or_damaged_is_named() {
    for broken in ["{% for %}", "{%}", "{%", "a {%}%} b"] {
        let error = of_bytes(broken).unwrap_err();
        assert!(error.starts_with("chat template FILE: not readable as Jinja (its line 1)"), "{broken}: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("llama3/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let of = |changes: &str| {
        let spec = job(folder.path(), changes);
        let template = ChatTemplate::of_job(&spec.data, &Default::default(), &ReadableData::everything());
        template.map(Option::unwrap).map_err(|error| error.to_string())
    };
    let error = of("").unwrap_err();
    assert!(error.starts_with("chat template of the model: there is none beside the tokenizer"), "{error}");
    assert!(error.ends_with("data.chat_template may name a Jinja file"), "{error}");
    let config = folder.path().join("tokenizer_config.json");
    std::fs::write(&config, "{\"chat_template\": 5}").unwrap();
    assert!(of("").unwrap_err().contains("neither a text nor a list"));
    let several = json!({
        "chat_template": [{"name": "other", "template": "x"}, {"name": "default", "template": "y"}],
        "bos_token": {"content": "<s>"}, "eos_token": null
    });
    std::fs::write(&config, several.to_string()).unwrap();
    let template = of("").unwrap();
    assert_eq!((template.name(), template.source.as_str()), ("tokenizer_config.json", "y"));
    assert_eq!(template.special, [("bos_token".to_owned(), "<s>".to_owned())].into());
    // The job's own goes before the model's, with the model's special tokens.
    let own = folder.path().join("own.jinja");
    std::fs::write(&own, "{{ bos_token }}").unwrap();
    let template = of(&format!("chat_template = {own:?}")).unwrap();
    assert_eq!((template.source.as_str(), template.special.len()), ("{{ bos_token }}", 1));
}
