//! `[data]`: which data, in which form, and how it becomes samples.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::hugging_face::CHAT_FILES;

/// `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataSpec {
    /// Files and folders of text on the data owner's machine.
    pub path: Vec<PathBuf>,
    /// Form of the files.
    pub format: DataFormat,
    /// The key of JSON Lines, or the column of Parquet, that has the text.
    #[serde(default = "text_column")]
    pub column: String,
    /// What a row of JSON Lines or Parquet is.
    #[serde(default)]
    pub rows: RowKind,
    /// A Jinja file on the data owner's machine that writes conversations out; the model's own if not given.
    #[serde(default)]
    pub chat_template: Option<PathBuf>,
    /// [`DataSpec::BYTES`], [`DataSpec::MODEL`], or the path of a Hugging Face `tokenizer.json` on the data owner's
    /// machine.
    pub tokenizer: String,
    /// Tokens in a sequence.
    pub seq_len: usize,
    /// Token ids and labels never leave the data owner, nor do the ops at both ends of the model.
    pub private: bool,
    /// With it, what the order of samples and all that is random in these ops is drawn from; see
    /// [`DataSpec::has_own_seed`].
    #[serde(default)]
    pub private_seed: Option<PrivateSeed>,
    /// With `private`: so many of the model's first blocks and of its last ones stay with the data owner, too.
    #[serde(default)]
    pub keep_blocks: [u32; 2],
    /// Name of the CompNode that has the files; if not given, the first one that joined.
    pub owner: Option<String>,
    /// Share of the text, at its end, that is held out.
    pub eval_fraction: f64,
    /// In which order samples come; if not given, as [`DataSpec::sample_order`] says.
    #[serde(default)]
    pub order: Option<SampleOrder>,
    /// Keep tokens on the data owner's disk, for memory's sake and for the next time.
    #[serde(default = "cached")]
    pub cache: bool,
    /// Means of an image's red, green and blue, as shares of the largest value; see [`DataSpec::image_moments`].
    #[serde(default)]
    pub mean: Option<[f64; 3]>,
    /// Their standard deviations.
    #[serde(default)]
    pub std: Option<[f64; 3]>,
    /// Black pixels that are put around an image in training before a part of the model's size is cut out at random; 0 to
    /// leave it.
    #[serde(default)]
    pub crop_padding: u32,
    /// Whether half of the images are mirrored in training.
    #[serde(default)]
    pub flip: bool,
}

fn cached() -> bool {
    true
}

fn text_column() -> String {
    DataSpec::TEXT_COLUMN.to_owned()
}

impl DataSpec {
    /// The key or column that has the text where the job does not say.
    pub const TEXT_COLUMN: &'static str = "text";
    /// Tokens in a sequence where the job does not say.
    pub const SEQ_LEN: usize = 128;
    /// The tokenizer for which each byte is a token.
    pub const BYTES: &'static str = "bytes";
    /// The tokenizer.json in the Hugging Face directory at `model.path`; an OP-DAG file has none, and takes bytes.
    pub const MODEL: &'static str = "model";

    /// Whether the data owner draws from a seed that nobody else has.
    pub fn has_own_seed(&self) -> bool {
        self.private && self.private_seed.unwrap_or_default() == PrivateSeed::Own
    }

    /// Path of the tokenizer's file on the data owner's machine, if it is one.
    pub fn tokenizer_file(&self) -> Option<&std::path::Path> {
        let named = [Self::BYTES, Self::MODEL].contains(&self.tokenizer.as_str());
        (!named).then(|| std::path::Path::new(&self.tokenizer))
    }

    /// Every path that is read on the data owner's machine.
    pub fn files(&self) -> impl Iterator<Item = &std::path::Path> {
        self.path.iter().map(PathBuf::as_path).chain(self.tokenizer_file()).chain(self.chat_template.as_deref())
    }

    /// Where [`CHAT_FILES`] would lie beside a tokenizer's file, if the rows are conversations.
    pub fn files_beside_tokenizer(&self) -> Vec<PathBuf> {
        let file = self.tokenizer_file().filter(|_| self.rows == RowKind::Chat);
        file.map_or_else(Vec::new, |file| CHAT_FILES.map(|name| file.with_file_name(name)).into())
    }

    /// In which order samples come: of conversations and images each once an epoch, unless the job says otherwise.
    pub fn sample_order(&self) -> SampleOrder {
        self.order.unwrap_or(match self.rows {
            RowKind::Documents if self.format.is_images() => SampleOrder::Shuffled,
            RowKind::Documents => SampleOrder::Drawn,
            RowKind::Chat => SampleOrder::Shuffled,
        })
    }
}

/// What the data owner draws from in a private job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrivateSeed {
    /// A seed of its own, made on its machine and never sent.
    #[default]
    Own,
    /// `train.seed`, which all know: the losses are those of a job that is not private.
    Job,
}

impl PrivateSeed {
    /// Every choice with its name in job files.
    pub const ALL: [(&'static str, Self); 2] = [("own", Self::Own), ("job", Self::Job)];
}

/// What a row of JSON Lines or Parquet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RowKind {
    /// A text.
    #[default]
    Documents,
    /// A conversation, of which the answers are learnt.
    Chat,
}

impl RowKind {
    /// Every kind with its name in job files.
    pub const ALL: [(&'static str, Self); 2] = [("documents", Self::Documents), ("chat", Self::Chat)];
}

/// In which order samples are trained on. A sample is a conversation, an image, or as many tokens as a sequence has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SampleOrder {
    /// Each is drawn at random from all; a sequence may begin at any token.
    #[default]
    Drawn,
    /// Each comes once in an epoch, in an order that is drawn anew for each.
    Shuffled,
    /// Each comes once in an epoch, in the order of the files.
    Sequential,
}

impl SampleOrder {
    /// Every order with its name in job files.
    pub const ALL: [(&'static str, Self); 3] =
        [("drawn", Self::Drawn), ("shuffled", Self::Shuffled), ("sequential", Self::Sequential)];
}

/// Form of the data files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataFormat {
    /// UTF-8 text: a file is one text.
    #[default]
    Text,
    /// JSON Lines: each line is an object, one key of which has the text of a document.
    Jsonl,
    /// Parquet: one column has the texts of the documents, a row each.
    Parquet,
    /// Token ids of two bytes each, as nanoGPT writes them, or with llm.c's header.
    Tokens,
    /// PNG and JPEG files in a folder for each class.
    Images,
    /// CIFAR-10 in its binary form.
    Cifar10,
}

impl DataFormat {
    /// Every form with its name in job files.
    pub const ALL: [(&'static str, Self); 6] = [
        ("text", Self::Text),
        ("jsonl", Self::Jsonl),
        ("parquet", Self::Parquet),
        ("tokens", Self::Tokens),
        ("images", Self::Images),
        ("cifar10", Self::Cifar10),
    ];

    /// Whether samples are images, each of one class.
    pub fn is_images(self) -> bool {
        matches!(self, Self::Images | Self::Cifar10)
    }

    /// How names of files of this form end, of which folders may hold others too; nothing for text.
    pub fn endings(self) -> &'static [&'static str] {
        match self {
            Self::Text => &[],
            Self::Jsonl => &["jsonl", "ndjson"],
            Self::Parquet => &["parquet"],
            Self::Tokens | Self::Cifar10 => &["bin"],
            Self::Images => &["png", "jpg", "jpeg"],
        }
    }
}
