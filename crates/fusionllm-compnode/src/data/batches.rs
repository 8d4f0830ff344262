//! Batches out of a corpus.

use std::sync::{Arc, Mutex, PoisonError};

use fusionllm_codec::{HostTensor, Values};
use fusionllm_protocol::{DataSpec, SampleOrder, TrainView};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::samples::Epochs;
use super::{Batches, Corpus, Split};
use crate::params::seed_for;
use crate::targets::no_target;
use crate::{CompNodeError, ExecutorError};

/// Batches of a job.
#[derive(Debug)]
pub struct TextBatches {
    corpus: Arc<Corpus>,
    /// Seed by which samples are drawn.
    seed: u64,
    order: SampleOrder,
    /// Sequences in the global batch.
    batch: usize,
    /// Sequences in a micro-batch.
    micro_batch_size: usize,
    /// Micro-batches in an evaluation.
    eval_micro_batches: usize,
    /// Tokens in a sequence.
    seq_len: usize,
    /// Of conversations, what a target weighs in the step that was asked for last, and in evaluations.
    weights: Mutex<Weights>,
}

#[derive(Debug, Default)]
struct Weights {
    step: Option<(u64, f32)>,
    eval: Option<f32>,
}

impl TextBatches {
    /// The batches of a job. Samples are drawn from `seed`.
    pub fn new(corpus: Arc<Corpus>, data: &DataSpec, train: &TrainView, seed: u64) -> Self {
        Self {
            corpus,
            seed,
            order: data.sample_order(),
            batch: train.batch as usize,
            micro_batch_size: train.micro_batch_size() as usize,
            eval_micro_batches: train.eval_batches as usize,
            seq_len: data.seq_len,
            weights: Mutex::default(),
        }
    }

    /// Which samples a step has: numbers of conversations, or where sequences begin.
    fn samples(&self, step: u64) -> Vec<usize> {
        let (tokens, rows) = (self.corpus.train().len(), self.corpus.rows(Split::Train));
        if (self.order, rows) == (SampleOrder::Drawn, None) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed_for(self.seed, &[b"batch", &step.to_le_bytes()]));
            let last = tokens - self.seq_len - 1;
            return (0..self.batch).map(|_| rng.random_range(0..=last)).collect();
        }
        let (count, length) = match rows {
            Some(rows) => (rows, 1),
            None => ((tokens - 1) / self.seq_len, self.seq_len),
        };
        let epochs = Epochs { order: self.order, seed: self.seed, samples: count as u64 };
        let first = step.wrapping_mul(self.batch as u64);
        (0..self.batch as u64).map(|i| epochs.sample(first.wrapping_add(i)) as usize * length).collect()
    }

    /// The same of the evaluation: evenly spread.
    fn eval_samples(&self) -> Vec<usize> {
        let last = match self.corpus.rows(Split::HeldOut) {
            Some(rows) => rows - 1,
            None => self.corpus.eval().len() - self.seq_len - 1,
        };
        let count = self.micro_batch_size * self.eval_micro_batches;
        (0..count).map(|i| last * i / count.saturating_sub(1).max(1)).collect()
    }

    /// Sequences of the text from these places on, and the same one token later.
    fn windows(&self, split: Split, starts: &[usize]) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let (mut inputs, mut labels) = (Vec::new(), Vec::new());
        for &start in starts {
            let ids = self.corpus.tokens(split).slice(start..start + self.seq_len + 1)?;
            inputs.extend_from_slice(&ids[..self.seq_len]);
            labels.extend_from_slice(&ids[1..]);
        }
        Ok((self.tensor(inputs)?, self.tensor(labels)?))
    }

    /// Conversations with their answers as targets, each padded to a sequence.
    fn conversations(
        &self,
        split: Split,
        rows: &[usize],
        weight: f32,
    ) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let (mut inputs, mut labels) = (Vec::new(), Vec::new());
        for &row in rows {
            let tokens = self.corpus.row(split, row)?;
            // Attention is causal: what stands behind changes nothing before it.
            inputs.extend((0..self.seq_len).map(|at| tokens.get(at).map_or(0, |&(id, _)| id)));
            let label = |at: usize| tokens.get(at).filter(|(_, is_answer)| *is_answer).map(|&(id, _)| id);
            // As many tokens as positions: the last one is followed by none.
            labels.extend((1..=self.seq_len).map(|at| label(at).unwrap_or_else(|| no_target(weight))));
        }
        Ok((self.tensor(inputs)?, self.tensor(labels)?))
    }

    fn tensor(&self, ids: Vec<i32>) -> Result<HostTensor, ExecutorError> {
        HostTensor::new(vec![ids.len() / self.seq_len, self.seq_len], Values::I32(ids))
            .map_err(|e| ExecutorError::Internal { what: e.to_string() })
    }

    /// What each target weighs so that the mean over micro-batches is the mean over all targets.
    fn weight(&self, split: Split, rows: &[usize]) -> Result<f32, CompNodeError> {
        let mut targets = 0usize;
        for &row in rows {
            targets += self.corpus.row(split, row)?.iter().skip(1).filter(|(_, is_answer)| *is_answer).count();
        }
        let micro_batches = rows.len() / self.micro_batch_size.max(1);
        Ok((micro_batches as f64 / targets.max(1) as f64) as f32)
    }

    fn part<'a>(&self, samples: &'a [usize], index: u32) -> &'a [usize] {
        let first = index as usize * self.micro_batch_size;
        samples.get(first..first + self.micro_batch_size).unwrap_or_default()
    }
}

impl Batches for TextBatches {
    fn train(&self, step: u64, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let samples = self.samples(step);
        let part = self.part(&samples, index);
        if self.corpus.rows(Split::Train).is_none() {
            return self.windows(Split::Train, part);
        }
        let known = self.weights.lock().unwrap_or_else(PoisonError::into_inner).step;
        let weight = match known {
            Some((of, weight)) if of == step => weight,
            _ => self.weight(Split::Train, &samples)?,
        };
        self.weights.lock().unwrap_or_else(PoisonError::into_inner).step = Some((step, weight));
        self.conversations(Split::Train, part, weight)
    }

    fn eval(&self, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let samples = self.eval_samples();
        let part = self.part(&samples, index);
        if self.corpus.rows(Split::HeldOut).is_none() {
            return self.windows(Split::HeldOut, part);
        }
        let known = self.weights.lock().unwrap_or_else(PoisonError::into_inner).eval;
        let weight = match known {
            Some(weight) => weight,
            None => self.weight(Split::HeldOut, &samples)?,
        };
        self.weights.lock().unwrap_or_else(PoisonError::into_inner).eval = Some(weight);
        self.conversations(Split::HeldOut, part, weight)
    }
}

#[cfg(test)]
mod tests;
