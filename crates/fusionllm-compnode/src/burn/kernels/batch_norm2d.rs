//! Batch norm, by a micro-batch's own mean and variance in training and by the running ones in evaluation.

use burn_tensor::Tensor;

use super::fused::{self, BatchNorm, Operand};
use super::{Arguments, RealValue, to_vec};
use crate::ExecutorError;

/// What a micro-batch adds to running values, by channel.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Moments {
    pub(crate) means: Vec<f32>,
    /// Unbiased, as PyTorch has it.
    pub(crate) variances: Vec<f32>,
}

/// Evaluation: x [B, C, H, W] → (x - running mean) / sqrt(running variance + eps) · weight + bias.
pub(super) fn evaluate(arguments: &Arguments<'_>, eps: f64) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let [batch, channels, height, width] = super::image_dims(x, &arguments.op.name)?;
    let by_channel = |index: usize| Ok(arguments.param(index)?.reshape([1, channels, 1]));
    let [weight, bias, mean, variance]: [Tensor<3>; 4] =
        [by_channel(0)?, by_channel(1)?, by_channel(2)?, by_channel(3)?];
    let scale = weight / (variance + eps).sqrt();
    let out = (x.tensor.clone().reshape([batch, channels, height * width]) - mean) * scale + bias;
    Ok(RealValue { tensor: out.reshape([batch * channels * height, width]), shape: x.shape.clone() })
}

/// Training: the same by the micro-batch's own mean and biased variance; and what it adds to the running values.
pub(super) fn train(arguments: &Arguments<'_>, eps: f64) -> Result<(RealValue, Moments), ExecutorError> {
    let x = arguments.real(0)?;
    let [batch, channels, height, width] = super::image_dims(x, &arguments.op.name)?;
    let plane = height * width;
    let count = batch * plane;
    if count < 2 {
        let what = format!("op `{}` has one value a channel, whose variance is not known", arguments.op.name);
        return Err(ExecutorError::Internal { what });
    }
    let (weight, bias) = (arguments.param(0)?, arguments.param(1)?);
    let unbiased = count as f32 / (count - 1) as f32;
    let outside = x.tensor.clone().without_autodiff();
    if let Ok(values) = fused::into_cpu(outside.clone()) {
        let moments = fused::moments_of(&values, channels, plane);
        let running = Moments {
            means: moments.iter().map(|m| m.0).collect(),
            variances: moments.iter().map(|m| m.1 * unbiased).collect(),
        };
        let operands = [Operand::of(&x.tensor), Operand::of(&weight), Operand::of(&bias)];
        if let Some(tensor) = fused::apply(BatchNorm { eps, channels, plane, moments }, operands) {
            return Ok((RealValue { tensor, shape: x.shape.clone() }, running));
        }
    }
    let (tensor, mean, variance) = plain(x.tensor.clone(), [batch, channels, plane], weight, bias, eps);
    let (means, variances) = (to_vec(mean.without_autodiff())?, to_vec((variance * unbiased).without_autodiff())?);
    let tensor = tensor.reshape([batch * channels * height, width]);
    Ok((RealValue { tensor, shape: x.shape.clone() }, Moments { means, variances }))
}

/// The same in Burn's operations, as [rows, plane], with mean and biased variance.
pub(super) fn plain(
    x: Tensor<2>,
    [batch, channels, plane]: [usize; 3],
    weight: Tensor<1>,
    bias: Tensor<1>,
    eps: f64,
) -> (Tensor<2>, Tensor<1>, Tensor<1>) {
    let x = x.reshape([batch, channels, plane]);
    let by_channel = |t: Tensor<3>| t.mean_dim(2).mean_dim(0);
    let mean = by_channel(x.clone());
    let centred = x - mean.clone();
    let variance = by_channel(centred.clone() * centred.clone());
    let scale = weight.reshape([1, channels, 1]) / (variance.clone() + eps).sqrt();
    let out = centred * scale + bias.reshape([1, channels, 1]);
    (out.reshape([batch * channels, plane]), mean.reshape([channels]), variance.reshape([channels]))
}
