//! Convolution.

use burn_tensor::Tensor;
use burn_tensor::ops::ConvOptions;

use super::fused::{self, Conv2d, Operand, Window};
use super::{Arguments, RealValue};
use crate::ExecutorError;

/// x [B, inputs, H, W] → [B, outputs, H', W'], with weight [outputs, inputs, kernel, kernel] and perhaps a bias [outputs].
pub(super) fn forward(
    arguments: &Arguments<'_>,
    [inputs, outputs]: [usize; 2],
    window: Window,
    has_bias: bool,
) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let weight = arguments.param(0)?;
    let bias = has_bias.then(|| arguments.param(1)).transpose()?;
    let [batch, _, height, width] = super::image_dims(x, &arguments.op.name)?;
    let conv = Conv2d { inputs, outputs, window, size: [height, width] };
    let [out_height, out_width] = conv.output_size();
    let operands = [Operand::of(&x.tensor), Operand::of(&weight)];
    let [of_x, of_weight] = operands;
    let fused = match &bias {
        Some(bias) => fused::apply(conv, [of_x, of_weight, Operand::of(bias)]),
        None => fused::apply(conv, [of_x, of_weight]),
    };
    let tensor = fused.unwrap_or_else(|| plain(x.tensor.clone(), batch, weight, bias, conv));
    Ok(RealValue { tensor, shape: vec![batch, outputs, out_height, out_width] })
}

/// The same in Burn's operations.
pub(super) fn plain(x: Tensor<2>, batch: usize, weight: Tensor<1>, bias: Option<Tensor<1>>, conv: Conv2d) -> Tensor<2> {
    let Conv2d { inputs, outputs, window: Window { kernel, stride, padding }, size: [height, width] } = conv;
    let x = x.reshape([batch, inputs, height, width]);
    let weight = weight.reshape([outputs, inputs, kernel, kernel]);
    let options = ConvOptions::new([stride; 2], [padding; 2], [1; 2], 1);
    let out: Tensor<4> = burn_tensor::module::conv2d(x, weight, bias, options);
    let [batch, channels, height, width] = out.dims();
    out.reshape([batch * channels * height, width])
}
