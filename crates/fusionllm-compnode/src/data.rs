//! Training data: on its owner's machine alone.

mod corpus;
mod documents;
mod files;
mod readable;
mod reading;
mod tokenizer;
mod tokens;

use std::sync::Arc;

use fusionllm_codec::{HostTensor, Values};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub use corpus::Corpus;
pub use readable::ReadableData;
pub(crate) use reading::Reading;
pub use tokenizer::{FileTokenizer, Tokenizer, is_guarded};
pub use tokens::Tokens;

use crate::params::seed_for;
use crate::{CompNodeError, ExecutorError};

/// Micro-batches of token ids and labels, both i32 [B, S]; the label of a position is the token after it.
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

/// Batches out of a corpus.
#[derive(Clone, Debug)]
pub struct TextBatches {
    /// The tokens of the text.
    pub corpus: Arc<Corpus>,
    /// Seed by which the starts of sequences are drawn.
    pub seed: u64,
    /// Sequences in the global batch.
    pub batch: usize,
    /// Sequences in a micro-batch.
    pub micro_batch_size: usize,
    /// Micro-batches in an evaluation.
    pub eval_micro_batches: usize,
    /// Tokens in a sequence.
    pub seq_len: usize,
}

impl TextBatches {
    fn windows(&self, tokens: &Tokens, starts: &[usize]) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let cut = |shift: usize| {
            let ids = starts.iter().flat_map(|&s| tokens.slice(s + shift..s + shift + self.seq_len));
            HostTensor::new(vec![starts.len(), self.seq_len], Values::I32(ids.collect()))
                .map_err(|e| ExecutorError::Internal { what: e.to_string() })
        };
        Ok((cut(0)?, cut(1)?))
    }
}

impl Batches for TextBatches {
    fn train(&self, step: u64, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let tokens = self.corpus.train();
        let mut rng = ChaCha8Rng::seed_from_u64(seed_for(self.seed, &[b"batch", &step.to_le_bytes()]));
        let last = tokens.len() - self.seq_len - 1;
        let starts: Vec<usize> = (0..self.batch).map(|_| rng.random_range(0..=last)).collect();
        let first = index as usize * self.micro_batch_size;
        self.windows(tokens, &starts[first..first + self.micro_batch_size])
    }

    fn eval(&self, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let tokens = self.corpus.eval();
        let last = tokens.len() - self.seq_len - 1;
        let count = self.micro_batch_size * self.eval_micro_batches;
        let first = index as usize * self.micro_batch_size;
        let starts: Vec<usize> =
            (first..first + self.micro_batch_size).map(|i| last * i / count.saturating_sub(1).max(1)).collect();
        self.windows(tokens, &starts)
    }
}
