//! Inverted dropout, the same on any placement and device.

use burn_tensor::{Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Arguments, KernelContext, RealValue};
use crate::ExecutorError;

/// x → x · mask / (1 - p) in training, x in evaluation. The mask is a function of seed, step, micro-batch and op
/// alone, drawn on the host.
pub(super) fn forward(
    arguments: &Arguments<'_>,
    p: f64,
    context: KernelContext<'_>,
) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    if !context.training || p == 0.0 {
        return Ok(x.clone());
    }
    let mut rng = ChaCha8Rng::from_seed(context.seed);
    let keep = (1.0 / (1.0 - p)) as f32;
    let dims = x.tensor.dims();
    let mask: Vec<f32> = (0..dims.iter().product()).map(|_| if rng.random::<f64>() < p { 0.0 } else { keep }).collect();
    let mask = Tensor::<2>::from_data(TensorData::new(mask, dims), context.device);
    let mask = if x.tensor.is_autodiff() { mask.autodiff() } else { mask };
    Ok(RealValue { tensor: x.tensor.clone() * mask, shape: x.shape.clone() })
}
