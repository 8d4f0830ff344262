//! The tasks of a step, and the two ways in which FP and BP alternate.

use serde::{Deserialize, Serialize};

use crate::StageId;

/// Which pipeline the task orders follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Pipeline {
    /// One forward, one backward (Narayanan et al., PipeDream-Flush): few live micro-batches.
    #[default]
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// All forward, then all backward (Huang et al.): every micro-batch is live at once.
    #[serde(rename = "gpipe")]
    GPipe,
}

/// One piece of work of a CompNode within a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Forward pass of a micro-batch through a stage.
    Fp {
        /// The stage that the micro-batch goes through.
        stage: StageId,
        /// The micro-batch, counted from 0 within the pass.
        micro_batch: u32,
    },
    /// Backward pass of a micro-batch through a stage.
    Bp {
        /// The stage that the micro-batch goes through.
        stage: StageId,
        /// The micro-batch.
        micro_batch: u32,
    },
    /// Weight gradients that BP of a micro-batch put off. They may be made earlier, whenever the CompNode waits; this
    /// place in the order is the latest.
    Wg {
        /// The stage whose weights they are of.
        stage: StageId,
        /// The micro-batch.
        micro_batch: u32,
    },
    /// Optimizer update of all parameters that the CompNode holds.
    Update,
}
