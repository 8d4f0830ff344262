//! Pools over height and width.

use burn_tensor::Tensor;
use burn_tensor::module::max_pool2d;
use burn_tensor::ops::MaxPoolOptions;

use super::fused::{self, MaxPool, Operand, Window};
use super::{Arguments, RealValue};
use crate::ExecutorError;

/// x [B, C, H, W] → [B, C, H', W']: the largest element of each window.
pub(super) fn max(arguments: &Arguments<'_>, window: Window) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let [batch, channels, height, width] = super::image_dims(x, &arguments.op.name)?;
    let pool = MaxPool { window, size: [height, width] };
    let tensor = fused::apply(pool, [Operand::of(&x.tensor)])
        .unwrap_or_else(|| plain_max(x.tensor.clone(), [batch, channels], pool));
    let [out_height, out_width] = pool.size.map(|size| window.places(size));
    Ok(RealValue { tensor, shape: vec![batch, channels, out_height, out_width] })
}

/// The same in Burn's operations.
pub(super) fn plain_max(x: Tensor<2>, [batch, channels]: [usize; 2], pool: MaxPool) -> Tensor<2> {
    let MaxPool { window: Window { kernel, stride, padding }, size: [height, width] } = pool;
    let x = x.reshape([batch, channels, height, width]);
    let (stride, padding) = ([stride; 2], [(padding, padding); 2]);
    let out: Tensor<4> = max_pool2d(x, MaxPoolOptions { stride, padding, ..MaxPoolOptions::new([kernel; 2]) });
    let [batch, channels, height, width] = out.dims();
    out.reshape([batch * channels * height, width])
}

/// x [B, C, H, W] → [B, 1, C]: the mean of each channel.
pub(super) fn global_average(arguments: &Arguments<'_>) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let [batch, channels, height, width] = super::image_dims(x, &arguments.op.name)?;
    let tensor = x.tensor.clone().reshape([batch * channels, height * width]).mean_dim(1).reshape([batch, channels]);
    Ok(RealValue { tensor, shape: vec![batch, 1, channels] })
}
