//! Cross-entropy.

use burn_tensor::activation::log_softmax;
use burn_tensor::{Int, Tensor};

use super::fused::{self, CrossEntropy, Operand};
use super::{Arguments, RealValue};
use crate::ExecutorError;

/// logits [B, S, V], labels [B, S] → mean over B·S of -log softmax(logits)[label], a scalar in nats.
pub(super) fn forward(arguments: &Arguments<'_>) -> Result<RealValue, ExecutorError> {
    let (logits, labels) = (arguments.real(0)?, arguments.integer(1)?);
    let fused = match Operand::of(&logits.tensor) {
        None => None,
        operand => fused::apply(CrossEntropy { labels: indices(&labels.tensor)? }, [operand]),
    };
    let tensor = fused.unwrap_or_else(|| plain(logits.tensor.clone(), labels.tensor.clone()));
    Ok(RealValue { tensor, shape: Vec::new() })
}

/// Labels on the host.
fn indices(labels: &Tensor<1, Int>) -> Result<Vec<usize>, ExecutorError> {
    let data = labels.clone().try_into_data().map_err(|e| ExecutorError::Device { reason: format!("{e:?}") })?;
    Ok(data.iter::<i64>().map(|label| label as usize).collect())
}

/// The same in Burn's operations.
pub(super) fn plain(logits: Tensor<2>, labels: Tensor<1, Int>) -> Tensor<2> {
    let tokens = labels.dims()[0];
    let picked = log_softmax(logits, 1).gather(1, labels.reshape([tokens, 1]));
    picked.mean().neg().reshape([1, 1])
}
