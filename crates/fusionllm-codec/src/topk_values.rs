//! The form of the values that Top-K sends.

use serde::{Deserialize, Serialize};

/// How the values of kept entries are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TopKValues {
    /// 4 bytes, exactly.
    F32,
    /// 2 bytes.
    #[default]
    Bf16,
    /// 1 byte, and 2 for each 64 kept values.
    Int8,
}
