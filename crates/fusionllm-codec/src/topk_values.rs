//! The form of the values that Top-K sends.

use serde::{Deserialize, Serialize};

/// How the values of kept entries are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TopKValues {
    /// IEEE 754 binary32: 4 bytes each, and exact.
    F32,
    /// bfloat16: 2 bytes each.
    #[default]
    Bf16,
    /// 1 byte, and 2 for each 64 kept values.
    Int8,
}
