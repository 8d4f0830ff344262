//! Cross-entropy.

use burn_tensor::activation::log_softmax;
use burn_tensor::{Int, Tensor};

use super::fused::{self, CrossEntropy, Operand};
use super::{Arguments, RealValue, to_vec};
use crate::ExecutorError;
use crate::targets::target_weight;

/// logits [B, S, V], labels [B, S] → mean over B·S of -log softmax(logits)[label], a scalar in nats. Where labels are below
/// 0, the weighted sum over the others instead, see [`crate::targets`].
pub(super) fn forward(arguments: &Arguments<'_>) -> Result<RealValue, ExecutorError> {
    let (logits, labels) = (arguments.real(0)?, arguments.integer(1)?);
    let on_host = on_host(&labels.tensor)?;
    let weight = target_weight(on_host.iter().copied());
    let fused = match Operand::of(&logits.tensor) {
        None => None,
        operand => {
            let labels = on_host.iter().map(|&label| usize::try_from(label).ok()).collect();
            fused::apply(CrossEntropy { labels, weight }, [operand])
        }
    };
    let tensor = fused.unwrap_or_else(|| match weight {
        None => plain(logits.tensor.clone(), labels.tensor.clone()),
        Some(weight) => weighted(logits.tensor.clone(), labels.tensor.clone(), weight),
    });
    Ok(RealValue { tensor, shape: Vec::new() })
}

/// Share of rows whose largest logit, of equals the first, is that of the label.
pub(super) fn accuracy(arguments: &Arguments<'_>) -> Result<f64, ExecutorError> {
    let (logits, labels) = (arguments.real(0)?, arguments.integer(1)?);
    let [rows, columns] = logits.tensor.dims();
    let (logits, labels) = (to_vec(logits.tensor.clone().without_autodiff())?, on_host(&labels.tensor)?);
    let is_right = |(row, label): &(&[f32], &i32)| {
        let largest = row
            .iter()
            .enumerate()
            .fold((0, f32::NEG_INFINITY), |most, (class, &logit)| if logit > most.1 { (class, logit) } else { most });
        i32::try_from(largest.0) == Ok(**label)
    };
    let right = logits.chunks_exact(columns.max(1)).zip(&labels).filter(is_right).count();
    Ok(right as f64 / rows.max(1) as f64)
}

fn on_host(labels: &Tensor<1, Int>) -> Result<Vec<i32>, ExecutorError> {
    let data = labels.clone().try_into_data().map_err(|e| ExecutorError::Device { reason: format!("{e:?}") })?;
    Ok(data.iter::<i32>().collect())
}

/// The same in Burn's operations.
pub(super) fn plain(logits: Tensor<2>, labels: Tensor<1, Int>) -> Tensor<2> {
    let tokens = labels.dims()[0];
    let picked = log_softmax(logits, 1).gather(1, labels.reshape([tokens, 1]));
    picked.mean().neg().reshape([1, 1])
}

/// The sum over labels that are targets, each weighted so.
pub(super) fn weighted(logits: Tensor<2>, labels: Tensor<1, Int>, weight: f32) -> Tensor<2> {
    let tokens = labels.dims()[0];
    let masked = labels.clone().lower_elem(0).reshape([tokens, 1]);
    let picked = log_softmax(logits, 1).gather(1, labels.clamp_min(0).reshape([tokens, 1]));
    (picked.mask_fill(masked, 0.0).sum() * -weight).reshape([1, 1])
}
