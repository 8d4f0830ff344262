//! Training data: on its owner's machine alone.

mod batches;
mod cache;
mod chat;
mod corpus;
mod documents;
mod files;
mod fingerprint;
mod images;
mod readable;
mod reading;
mod samples;
mod text;
mod tokenizer;
mod tokens;

use fusionllm_codec::HostTensor;

use crate::CompNodeError;
pub use batches::TextBatches;
pub use chat::ChatTemplate;
pub use corpus::{Corpus, Split, Tokenizing};
pub use images::{ImageBatches, ImageSet};
pub use readable::ReadableData;
pub use reading::Reading;
pub use tokenizer::{FileTokenizer, Tokenizer, is_guarded};
pub use tokens::Tokens;

/// Micro-batches of what the model reads and of labels: of text token ids, both i32 [B, S], where the label of a position is
/// the token after it, or a number below 0 where there is no target (see `targets.rs`); of images f32 [B, 3, H, W], with the
/// class of each as label, i32 [B, 1].
pub trait Batches: Send {
    /// Micro-batch `index` of training step `step`: a function of seed and step alone.
    ///
    /// # Errors
    /// If the batch cannot be made.
    fn train(&self, step: u64, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError>;

    /// Micro-batch `index` of the evaluation, the same every time.
    ///
    /// # Errors
    /// If the batch cannot be made.
    fn eval(&self, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError>;
}
