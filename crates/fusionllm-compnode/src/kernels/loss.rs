//! Cross-entropy.

use burn_tensor::activation::log_softmax;

use super::{Arguments, RealValue};
use crate::ExecutorError;

/// logits [B, S, V], labels [B, S] → mean over B·S of -log softmax(logits)[label], a scalar in nats.
pub(super) fn forward(arguments: &Arguments<'_>) -> Result<RealValue, ExecutorError> {
    let (logits, labels) = (arguments.real(0)?, arguments.integer(1)?);
    let tokens = labels.tensor.dims()[0];
    let labels = labels.tensor.clone().reshape([tokens, 1]);
    let picked = log_softmax(logits.tensor.clone(), 1).gather(1, labels);
    Ok(RealValue { tensor: picked.mean().neg().reshape([1, 1]), shape: Vec::new() })
}
