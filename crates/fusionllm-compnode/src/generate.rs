//! Text from a trained model.

use std::sync::Arc;

use fusionllm_codec::{HostTensor, Values};
use fusionllm_graph::{OpDag, OpId};
use fusionllm_planner::StageId;
use fusionllm_protocol::Pass;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::backend::{Backend, ExecutorSpec};
use crate::executor::{Executor, MicroBatch, NamedTensor, by_name};
use crate::stop::StopFlag;
use crate::{CompNodeError, ExecutorError};

/// How to draw tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingSpec {
    /// Tokens to write.
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest token every time.
    pub temperature: f64,
    /// Draw among this many likeliest tokens; 0: among all.
    pub top_k: usize,
    /// Seed of the draws.
    pub seed: u64,
}

/// A model that writes.
pub struct Generator {
    executor: Box<dyn Executor>,
    input: OpId,
    logits: OpId,
    seq_len: usize,
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator").field("seq_len", &self.seq_len).finish_non_exhaustive()
    }
}

impl Generator {
    /// A generator for the model `dag` with parameters `tensors`.
    ///
    /// # Errors
    /// If the graph is no language model, or a parameter is missing.
    pub fn new(dag: Arc<OpDag>, tensors: Vec<NamedTensor>, backend: &dyn Backend) -> Result<Self, CompNodeError> {
        let unfit = |what: &str| ExecutorError::Internal { what: format!("the graph has no {what}") };
        let input = dag.input().ok_or_else(|| unfit("input op"))?;
        let logits = dag.logits().ok_or_else(|| unfit("loss op to take the logits from"))?;
        let seq_len = dag.seq_len().ok_or_else(|| unfit("sequence length"))?;
        let mut executor = backend.build(ExecutorSpec::up_to(dag, logits), StopFlag::default())?;
        executor.import(&mut by_name(tensors))?;
        Ok(Self { executor, input, logits, seq_len })
    }

    /// Logits for every position of one sequence: `[S, V]` row-major, with V. Positions after the ids are padding,
    /// which a causal model does not see.
    ///
    /// # Errors
    /// If the device fails.
    pub fn logits(&mut self, ids: &[i32]) -> Result<(Vec<f32>, usize), CompNodeError> {
        let mut padded = ids.to_vec();
        padded.resize(self.seq_len, 0);
        let tensor = HostTensor::new(vec![1, self.seq_len], Values::I32(padded))
            .map_err(|e| ExecutorError::Internal { what: e.to_string() })?;
        let micro_batch = MicroBatch { step: 0, pass: Pass::Eval, index: 0 };
        let output = self.executor.forward(StageId(0), micro_batch, vec![(self.input, tensor.into())])?;
        let logits = output.tensors.into_iter().find(|(op, _)| *op == self.logits);
        match logits.map(|(_, tensor)| tensor.into_host()).transpose()?.map(HostTensor::into_parts) {
            Some((shape, Values::F32(values))) => Ok((values, shape.last().copied().unwrap_or(0))),
            _ => Err(ExecutorError::Internal { what: "the model gave no logits".to_owned() }.into()),
        }
    }

    /// Continues `prompt` (at least one token); gives the new tokens alone.
    ///
    /// # Errors
    /// If the prompt is empty or the device fails.
    pub fn generate(&mut self, prompt: &[i32], sampling: SamplingSpec) -> Result<Vec<i32>, CompNodeError> {
        if prompt.is_empty() {
            return Err(ExecutorError::Internal { what: "the prompt holds no tokens".to_owned() }.into());
        }
        let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        let mut ids = prompt.to_vec();
        for _ in 0..sampling.tokens {
            let window = &ids[ids.len().saturating_sub(self.seq_len)..];
            let last = window.len() - 1;
            let (logits, vocab) = self.logits(window)?;
            let row = &logits[last * vocab..(last + 1) * vocab];
            ids.push(sample(row, sampling, rng.random::<f64>()) as i32);
        }
        Ok(ids.split_off(prompt.len()))
    }
}

/// The token that a uniform draw in [0, 1) picks.
fn sample(logits: &[f32], sampling: SamplingSpec, draw: f64) -> usize {
    let mut ranked: Vec<(usize, f32)> = logits.iter().copied().enumerate().collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    let Some(&(best, highest)) = ranked.first() else { return 0 };
    if sampling.temperature <= 0.0 {
        return best;
    }
    if sampling.top_k > 0 {
        ranked.truncate(sampling.top_k);
    }
    let weight = |logit: f32| (f64::from(logit - highest) / sampling.temperature).exp();
    let total: f64 = ranked.iter().map(|&(_, l)| weight(l)).sum();
    let mut left = draw * total;
    for &(token, logit) in &ranked {
        left -= weight(logit);
        if left < 0.0 {
            return token;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_k: usize) -> SamplingSpec {
        SamplingSpec { tokens: 1, temperature, top_k, seed: 0 }
    }

    #[test]
    fn temperature_zero_takes_the_likeliest() {
        assert_eq!(sample(&[0.0, 3.0, 1.0], sampling(0.0, 0), 0.99), 1);
    }

    #[test]
    fn top_k_leaves_the_others_out() {
        for draw in [0.0, 0.3, 0.6, 0.999] {
            assert_ne!(sample(&[0.0, 3.0, 2.9], sampling(5.0, 2), draw), 0);
        }
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0f32, (3.0f32).ln()];
        let hits = (0..1000).filter(|i| sample(&logits, sampling(1.0, 0), f64::from(*i) / 1000.0) == 1).count();
        assert!((hits as i64 - 750).abs() <= 1, "{hits}");
    }
}
