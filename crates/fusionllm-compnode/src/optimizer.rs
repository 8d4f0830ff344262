//! Which optimizer a job trains with.

use fusionllm_protocol::{OptimizerKind, StateKind, TrainView};

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
    /// What it keeps of each parameter, as [`TrainView::states`] has it.
    pub fn states(&self) -> &'static [StateKind] {
        match *self {
            Self::AdamW { .. } => OptimizerKind::Adamw.states(0.0),
            Self::Sgd { momentum, .. } => OptimizerKind::Sgd.states(momentum),
        }
    }

    /// The optimizer that a job asks for.
    pub fn of(train: &TrainView) -> Self {
        let weight_decay = train.weight_decay;
        match train.optimizer {
            OptimizerKind::Adamw => Self::AdamW { betas: train.betas, epsilon: train.epsilon, weight_decay },
            OptimizerKind::Sgd => Self::Sgd { momentum: train.momentum, weight_decay },
        }
    }
}
