//! Element types.

use serde::{Deserialize, Serialize};

/// Element type of a tensor in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ElementType {
    /// 32-bit float: activations and gradients.
    F32,
    /// 32-bit integer: token ids and labels.
    I32,
}
