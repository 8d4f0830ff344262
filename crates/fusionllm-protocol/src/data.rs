//! What the data owner found in its data, and what of it is remembered, so that a later start can say what changed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Hexadecimal digits of a hash: half of BLAKE3's.
const HASH_DIGITS: usize = 32;
/// Bits per byte are said of a text of which at most this share cannot be had back from its tokens.
const MOST_UNTOLD: f64 = 1e-3;
/// Changed files that are named one by one.
const NAMED_CHANGES: usize = 5;

/// The BLAKE3 hash by which contents of files are told apart, its first 32 hexadecimal digits.
pub fn content_hash(bytes: &[u8]) -> String {
    shortened(blake3::hash(bytes))
}

fn shortened(hash: blake3::Hash) -> String {
    let mut digits = hash.to_hex().to_string();
    digits.truncate(HASH_DIGITS);
    digits
}

/// The hash of [`content_hash`] of what comes in pieces.
#[derive(Debug, Default)]
pub struct ContentHasher(blake3::Hasher);

impl ContentHasher {
    /// Adds bytes at the end.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash of all bytes so far.
    pub fn finish(&self) -> String {
        shortened(self.0.finalize())
    }
}

/// What the data owner found in its data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    /// How many files were read.
    pub files: u64,
    /// Tokens to train on.
    pub train_tokens: u64,
    /// Tokens held out for evaluation.
    pub eval_tokens: u64,
    /// UTF-8 bytes of the text per token, without what cannot be had back from the tokens: what a tokenizer left out,
    /// merged, made others or did not know.
    pub bytes_per_token: f64,
    /// Cross-entropy in nats per token of the training split's unigram model on the evaluation tokens; of images, of a model
    /// that knows only how often each class comes.
    pub unigram_loss: f64,
    /// Classes of the images, if the data is such; the counts of tokens are then counts of images.
    #[serde(default)]
    pub classes: Option<u64>,
    /// What the user must know of the data: files left out, characters that gave no token, settings passed over.
    #[serde(default)]
    pub notes: Vec<String>,
    /// What a later start is held against; not known of runs of earlier versions.
    #[serde(default)]
    pub fingerprint: Option<DataFingerprint>,
}

impl DataReport {
    /// Whether so many of a text's bytes that can be had back from its tokens are nearly all of them.
    pub fn is_whole(told: f64, bytes: u64) -> bool {
        told >= (1.0 - MOST_UNTOLD) * bytes as f64
    }

    /// A loss in nats per token as bits per byte of the text; nothing where tokens do not stand for the whole text, of which
    /// such a number would be taken.
    pub fn bits_per_byte(&self, nats_per_token: f64) -> Option<f64> {
        let told = self.bytes_per_token * (self.train_tokens + self.eval_tokens) as f64;
        let is_whole = self.fingerprint.as_ref().is_none_or(|data| Self::is_whole(told, data.bytes));
        (is_whole && self.bytes_per_token > 0.0).then(|| nats_per_token / std::f64::consts::LN_2 / self.bytes_per_token)
    }
}

/// One file. Of files of documents the texts count, not the form that they come in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFingerprint {
    /// Its path below the folder that the job names, or its file name.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its first bytes, which are trained on; the rest is held out.
    pub train_bytes: u64,
    /// Hash of its bytes, see [`content_hash`].
    pub hash: String,
}

/// Which tokenizer made the tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerFingerprint {
    /// `bytes`, or where its file lies.
    pub name: String,
    /// Entries of its vocabulary.
    pub entries: u64,
    /// Hash of its file, see [`content_hash`].
    pub hash: String,
}

/// Data and tokenizer of a run, in few bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFingerprint {
    /// The files in the order in which they are read; of very many, the first.
    pub files: Vec<FileFingerprint>,
    /// How many there are.
    pub count: u64,
    /// Their sizes together.
    pub bytes: u64,
    /// Hash of all contents and of what is held out, in order; names do not enter.
    pub hash: String,
    /// What tells the tokenizer that made the tokens from others.
    pub tokenizer: TokenizerFingerprint,
}

impl DataFingerprint {
    /// What stands in place of a tokenizer's name for images: the names of their classes are hashed.
    pub const CLASSES: &'static str = "classes";

    /// Why training that began with `before` cannot go on with this tokenizer; nothing if it is the same.
    pub fn tokenizer_change(&self, before: &Self) -> Option<String> {
        let (now, then) = (&self.tokenizer, &before.tokenizer);
        (now.hash != then.hash).then(|| {
            if now.name == Self::CLASSES && then.name == Self::CLASSES {
                return format!(
                    "the data has other classes, {} (hash {}), than the model was trained with, {} (hash {}): give folders of \
                     the same names",
                    now.entries, now.hash, then.entries, then.hash
                );
            }
            format!(
                "data.tokenizer {} ({} entries, hash {}) is not the one that the model was trained with: {} ({} entries, hash {}); \
                 give that one, the model's embeddings mean its tokens",
                now.name, now.entries, now.hash, then.name, then.entries, then.hash
            )
        })
    }

    /// What changed in the data since `before`, as sentences; none if each batch is what it would have been.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        if self.hash == before.hash {
            return Vec::new();
        }
        let (then, now) = (by_name(&before.files), by_name(&self.files));
        let mut changed = Vec::new();
        let mut moved = Vec::new();
        for (name, file) in &now {
            match then.get(name) {
                None => changed.push(format!("`{}` is new ({} bytes)", file.name, file.bytes)),
                Some(old) => {
                    changed.extend(content_change(old, file));
                    moved.extend(split_change(old, file));
                }
            }
        }
        let gone = then.iter().filter(|(name, _)| !now.contains_key(*name));
        changed.extend(gone.map(|(_, file)| format!("`{}` is gone ({} bytes)", file.name, file.bytes)));
        if changed.is_empty() && moved.is_empty() {
            changed.push("the files are read in another order, or one that is not listed here changed".to_owned());
        }
        let totals =
            format!("{} files with {} bytes, were {} with {}", self.count, self.bytes, before.count, before.bytes);
        let mut sentences = Vec::new();
        if !changed.is_empty() {
            sentences
                .push(format!("the data is not what the checkpoint was trained on: {} ({totals})", listed(&changed)));
        }
        if !moved.is_empty() {
            sentences.push(format!("what is held out is not what was: {}", listed(&moved)));
        }
        sentences
    }
}

/// Files by name and, since a name may be there twice, by how often it came before.
fn by_name(files: &[FileFingerprint]) -> BTreeMap<(&str, usize), &FileFingerprint> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let numbered = files.iter().map(|file| {
        let count = counts.entry(&file.name).or_default();
        *count += 1;
        ((file.name.as_str(), *count), file)
    });
    numbered.collect()
}

fn content_change(old: &FileFingerprint, new: &FileFingerprint) -> Option<String> {
    let name = &new.name;
    if old.hash == new.hash {
        None
    } else if old.bytes == new.bytes {
        Some(format!("`{name}` has other content"))
    } else {
        Some(format!("`{name}` has {} bytes, had {}", new.bytes, old.bytes))
    }
}

/// Text that was held out and is trained on now, or the other way round. Of a file that changed, the beginning is taken
/// to be what it was.
fn split_change(old: &FileFingerprint, new: &FileFingerprint) -> Option<String> {
    let name = &new.name;
    let about = if old.hash == new.hash { "" } else { "up to " };
    let leaked = new.train_bytes.min(old.bytes).saturating_sub(old.train_bytes);
    let seen = old.train_bytes.min(new.bytes).saturating_sub(new.train_bytes);
    if leaked > 0 {
        Some(format!("{about}{leaked} bytes of `{name}` that were held out are trained on now"))
    } else if seen > 0 {
        Some(format!(
            "{about}{seen} bytes of `{name}` that were trained on are held out now, so the evaluation looks better than it is"
        ))
    } else {
        None
    }
}

fn listed(changes: &[String]) -> String {
    let mut text = changes.get(..NAMED_CHANGES.min(changes.len())).unwrap_or_default().join("; ");
    if changes.len() > NAMED_CHANGES {
        text.push_str(&format!("; and {} more", changes.len() - NAMED_CHANGES));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, bytes: u64, train_bytes: u64, hash: &str) -> FileFingerprint {
        FileFingerprint { name: name.to_owned(), bytes, train_bytes, hash: hash.to_owned() }
    }

    fn of(files: Vec<FileFingerprint>) -> DataFingerprint {
        let all: Vec<String> = files.iter().map(|f| format!("{}{}", f.hash, f.train_bytes)).collect();
        let tokenizer = TokenizerFingerprint { name: "bytes".to_owned(), entries: 256, hash: "t".to_owned() };
        let (count, bytes) = (files.len() as u64, files.iter().map(|f| f.bytes).sum());
        DataFingerprint { files, count, bytes, hash: all.join(" "), tokenizer }
    }

    #[test]
    fn a_file_that_grew_says_what_of_it_was_held_out() {
        let before = of(vec![file("a", 1000, 900, "x"), file("b", 100, 90, "y")]);
        let after = of(vec![file("a", 2000, 1800, "z"), file("b", 100, 90, "y")]);
        assert_eq!(
            after.changes_since(&before),
            [
                "the data is not what the checkpoint was trained on: `a` has 2000 bytes, had 1000 (2 files with 2100 bytes, were 2 with 1100)",
                "what is held out is not what was: up to 100 bytes of `a` that were held out are trained on now",
            ]
        );
        assert!(before.changes_since(&before).is_empty());
    }

    #[test]
    fn files_that_came_went_or_were_split_otherwise_are_named() {
        let before = of(vec![file("a", 1000, 900, "x"), file("b", 100, 90, "y")]);
        let after = of(vec![file("a", 1000, 800, "x"), file("c", 100, 90, "w")]);
        let changes = after.changes_since(&before).join("\n");
        for words in ["`c` is new", "`b` is gone", "100 bytes of `a` that were trained on are held out now"] {
            assert!(changes.contains(words), "{changes}");
        }
        // A folder that was moved has other names at most.
        let renamed = of(vec![file("A", 1000, 900, "x"), file("B", 100, 90, "y")]);
        assert!(renamed.changes_since(&before).is_empty());
        let swapped = of(vec![file("b", 100, 90, "y"), file("a", 1000, 900, "x")]);
        assert!(swapped.changes_since(&before)[0].contains("another order"));
    }

    #[test]
    fn only_the_first_changes_are_listed() {
        let files = |prefix: &str| (0..9).map(|i| file(&format!("{prefix}{i}"), 1, 1, prefix)).collect();
        let changes = of(files("n")).changes_since(&of(files("o")));
        assert!(changes[0].contains("and 13 more"), "{changes:?}");
    }

    #[test]
    fn another_tokenizer_is_a_reason_to_refuse() {
        let before = of(Vec::new());
        let mut after = before.clone();
        assert_eq!(after.tokenizer_change(&before), None);
        // The same file at another place is the same tokenizer.
        after.tokenizer.name = "elsewhere".to_owned();
        assert_eq!(after.tokenizer_change(&before), None);
        after.tokenizer.hash = "u".to_owned();
        assert!(after.tokenizer_change(&before).unwrap().contains("not the one that the model was trained with"));
    }

    #[test]
    fn bits_per_byte_are_those_of_the_whole_text_or_none() {
        let mut report =
            DataReport { train_tokens: 80, eval_tokens: 20, bytes_per_token: 2.0, ..DataReport::default() };
        let nats = 4.0 * std::f64::consts::LN_2;
        assert_eq!(report.bits_per_byte(nats), Some(2.0), "an earlier version's");
        report.fingerprint = Some(DataFingerprint { bytes: 200, ..of(Vec::new()) });
        assert_eq!(report.bits_per_byte(nats), Some(2.0));
        report.fingerprint = Some(DataFingerprint { bytes: 201, ..of(Vec::new()) });
        assert_eq!(report.bits_per_byte(nats), None);
    }

    #[test]
    fn a_report_of_an_earlier_version_is_readable() {
        let text = r#"{"files":1,"train_tokens":2,"eval_tokens":3,"bytes_per_token":1.0,"unigram_loss":2.0}"#;
        let report: DataReport = serde_json::from_str(text).unwrap();
        assert_eq!((report.notes.len(), report.fingerprint), (0, None));
    }
}
