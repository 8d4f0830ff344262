//! Optimizers: one state per parameter, all tensors flat and on the device.

mod adamw;
mod sgd;

use std::collections::BTreeMap;

use burn_tensor::Tensor;
use fusionllm_protocol::StateKind;

use crate::{OptimizerSpec, UpdateSpec};

/// The state of one parameter: flat tensors by kind.
pub(crate) type ParamState = BTreeMap<StateKind, Tensor<1>>;

/// One update of one parameter. `decay` says whether weight decay applies to it.
pub(crate) fn step(
    optimizer: &OptimizerSpec,
    param: Tensor<1>,
    gradient: Tensor<1>,
    state: &mut ParamState,
    decay: bool,
    update: UpdateSpec,
) -> Tensor<1> {
    let scaled = |gradient: Tensor<1>| match update.gradient_scale {
        1.0 => gradient,
        scale => gradient * scale,
    };
    match *optimizer {
        OptimizerSpec::AdamW { betas, epsilon, weight_decay } => {
            let weight_decay = if decay { weight_decay } else { 0.0 };
            let constants = adamw::Constants::new(betas, epsilon, weight_decay, update);
            match adamw::in_place(param, gradient, state, constants) {
                Ok(param) => param,
                Err(others) => {
                    let (param, gradient) = *others;
                    adamw::plain(decayed(param, weight_decay, update.lr), scaled(gradient), state, constants)
                }
            }
        }
        OptimizerSpec::Sgd { momentum, weight_decay } => {
            let param = decayed(param, if decay { weight_decay } else { 0.0 }, update.lr);
            sgd::step(param, scaled(gradient), state, momentum, update.lr)
        }
    }
}

/// Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).
fn decayed(param: Tensor<1>, weight_decay: f64, lr: f64) -> Tensor<1> {
    if weight_decay == 0.0 { param } else { param * (1.0 - lr * weight_decay) }
}
