//! Optimizers: one state per parameter, all tensors flat and on the device.

mod adamw;
mod sgd;

use std::collections::BTreeMap;

use burn_tensor::Tensor;
use fusionllm_protocol::{OptimizerKind, TrainSpec};

use crate::UpdateSpec;

/// An optimizer with its constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerSpec {
    /// AdamW with decoupled weight decay.
    AdamW {
        /// Decay rates of the two moments.
        betas: [f64; 2],
        /// Added to the root of the second moment.
        epsilon: f64,
        /// Decay per step and unit of learning rate.
        weight_decay: f64,
    },
    /// SGD with momentum.
    Sgd {
        /// Share of the last update's direction that stays.
        momentum: f64,
        /// Decoupled decay, as for AdamW.
        weight_decay: f64,
    },
}

impl OptimizerSpec {
    /// The optimizer that a job asks for.
    pub fn of(train: &TrainSpec) -> Self {
        let weight_decay = train.weight_decay;
        match train.optimizer {
            OptimizerKind::Adamw => Self::AdamW { betas: train.betas, epsilon: train.epsilon, weight_decay },
            OptimizerKind::Sgd => Self::Sgd { momentum: train.momentum, weight_decay },
        }
    }

    /// How many tensors of a parameter's size it keeps.
    pub(crate) fn kinds(&self) -> u64 {
        match self {
            Self::AdamW { .. } => 2,
            Self::Sgd { momentum, .. } => u64::from(*momentum > 0.0),
        }
    }
}

/// The state of one parameter: flat tensors by kind (`exp_avg`, `exp_avg_sq`, `momentum`).
pub(crate) type ParamState = BTreeMap<&'static str, Tensor<1>>;

/// The kinds of state there are.
pub(crate) const STATE_KINDS: [&str; 3] = [adamw::EXP_AVG, adamw::EXP_AVG_SQ, sgd::MOMENTUM];

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
