//! Parameters: what training changes.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

/// One parameter tensor of f32. Ops that share it refer to it by the same id (tied weights).
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// Hugging Face key, for example `transformer.h.0.attn.c_attn.weight`.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Init,
    /// Whether weight decay applies: not for biases and layer norms.
    pub decay: bool,
    /// Whether training leaves it as it is: it has no gradient, no optimizer state and no UPDATE.
    pub frozen: bool,
}

impl Param {
    /// Number of elements; `u64::MAX` where that does not fit.
    pub fn elements(&self) -> u64 {
        self.shape.iter().fold(1, |product: u64, &size| product.saturating_mul(size as u64))
    }

    /// Bytes as f32; `u64::MAX` where that does not fit.
    pub fn bytes(&self) -> u64 {
        self.elements().saturating_mul(DType::F32.bytes() as u64)
    }
}

/// How a parameter starts when there is no checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Init {
    /// Normal with mean 0.
    Normal {
        /// Standard deviation, finite and at least 0.
        std: f32,
    },
    /// Uniform between `-bound` and `bound`.
    Uniform {
        /// Largest value, finite and at least 0.
        bound: f32,
    },
    /// Every element is 0.
    Zeros,
    /// Every element is 1.
    Ones,
}
