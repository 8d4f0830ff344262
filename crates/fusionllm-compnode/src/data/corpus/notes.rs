//! What the user must know of the data, in sentences.

use fusionllm_protocol::{DataFormat, DataReport, DataSpec, RowKind};

use super::super::tokenizer::Coverage;
use super::Tokenizing;
use super::builder::Builder;

/// What is to be known of the tokenizer, and of what it is not asked.
pub(super) fn of_tokenizer(spec: &DataSpec, by: Tokenizing<'_>) -> Vec<String> {
    let tokenizer = by.tokenizer;
    let mut notes = vec![format!("tokenizer: {} ({} entries)", tokenizer.name(), tokenizer.entries())];
    let mut settings = tokenizer.passed_over().to_vec();
    let (before, after) = tokenizer.around();
    let special = before.len() + after.len();
    if (spec.format == DataFormat::Text || spec.rows == RowKind::Chat) && special > 0 {
        settings.push(format!("{special} special tokens around each text (post_processor)"));
    }
    if let Some(template) = by.template {
        notes.push(format!("chat template: {}; the loss is that of the answers alone", template.name()));
    } else if matches!(spec.format, DataFormat::Jsonl | DataFormat::Parquet) {
        let end = match tokenizer.end_of_text() {
            _ if !after.is_empty() => format!("the tokens that the tokenizer's file puts there ({after:?})"),
            Some(id) => format!("the tokenizer's end of a text (token {id})"),
            None => "an empty line: the tokenizer has no end of a text that is known here".to_owned(),
        };
        notes.push(format!("after each document stands {end}"));
    }
    if !settings.is_empty() {
        let settings = settings.join(", ");
        notes.push(format!("the tokenizer's {settings}: passed over, a corpus is read whole"));
    }
    notes
}

impl Builder<'_> {
    /// What is to be known of what was read.
    pub(super) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let Coverage { chars, spaces, .. } = self.coverage;
        if self.coverage.lost() > 0 {
            let (lost, named) = (self.coverage.lost(), self.coverage.named());
            notes.push(format!(
                "the tokenizer has no token for {lost} of {chars} characters, they are left out: {named}"
            ));
        }
        if spaces > 0 {
            notes.push(format!(
                "the tokenizer gives no token for {spaces} white space characters of {chars} characters"
            ));
        }
        let changed = self.coverage.changed();
        if changed > 0 {
            let named = self.coverage.named_changed();
            let lost = match self.coverage.changed_bytes() {
                0 => "",
                _ => ": the model does not learn which they were",
            };
            notes.push(format!(
                "the tokenizer's normalizer makes others of {changed} of {chars} characters ({named}){lost}"
            ));
        }
        let unknown = self.unknown;
        if unknown > 0 {
            let tokens = self.train.len() + self.eval.len();
            notes.push(format!("{unknown} of {tokens} tokens are the one for what the tokenizer does not know"));
        }
        let (told, bytes) = (self.told_bytes(), self.coverage.bytes);
        if !DataReport::is_whole(told, bytes) && self.spec.rows != RowKind::Chat {
            notes.push(format!(
                "{} of {bytes} bytes of the text cannot be had back from its tokens: there are no bits per byte, which \
                 would count them",
                bytes - (told as u64).min(bytes)
            ));
        }
        if self.marks > 0 {
            notes.push(format!("the byte order mark at the start of {} files is left out", self.marks));
        }
        if self.without_text > 0 {
            notes.push(format!("{} documents without a text are left out", self.without_text));
        }
        let (shortened, without) = (self.shortened, self.without_answer);
        if self.spec.rows == RowKind::Chat {
            let seq_len = self.spec.seq_len;
            let [train, eval] = self.rows.each_ref().map(Vec::len);
            notes.push(format!("{train} conversations to train on, {eval} held out"));
            if shortened > 0 {
                notes.push(format!("{shortened} conversations are cut to their first data.seq_len = {seq_len} tokens"));
            }
            if without > 0 {
                notes.push(format!(
                    "{without} conversations without an answer among their first data.seq_len = {seq_len} tokens are left out"
                ));
            }
        }
        notes
    }

    /// About how many bytes of the text can be had back from its tokens.
    pub(super) fn told_bytes(&self) -> f64 {
        // Of conversations only answers are told by losses.
        if self.spec.rows == RowKind::Chat {
            return 0.0;
        }
        let tokens = (self.train.len() + self.eval.len()).max(1);
        let covered = self.coverage.covered_bytes.saturating_sub(self.coverage.changed_bytes());
        let known = covered as f64 * (1.0 - self.unknown as f64 / tokens as f64);
        known.min(self.coverage.bytes as f64 * (1.0 - self.told.lost_share()))
    }
}
