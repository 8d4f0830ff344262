//! What the families of ops speak of: classes, the parameters that they take, and the variants of a family.

use serde::{Deserialize, Serialize};

/// How the weight of a linear op lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightLayout {
    /// `[inputs, outputs]`: GPT-2's `Conv1D`.
    InOut,
    /// `[outputs, inputs]`: PyTorch's `nn.Linear`.
    OutIn,
}

/// An elementwise non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationFunction {
    /// GELU by tanh (`gelu_new`).
    GeluTanh,
    /// GELU by the error function.
    GeluErf,
    /// max(x, 0).
    Relu,
    /// x * sigmoid(x).
    Silu,
}

/// The classes of op.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpClass {
    /// Data enters here.
    Placeholder,
    /// Carries parameters.
    Parameter,
    /// Computes without parameters.
    ParameterFree,
    /// Where the BP starts.
    Loss,
}

impl OpClass {
    /// The class in words for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Placeholder => "placeholder",
            Self::Parameter => "parameter",
            Self::ParameterFree => "parameter-free",
            Self::Loss => "loss",
        }
    }
}

/// One parameter that a kind of op takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamRole {
    /// `weight` or `bias` for example.
    pub name: &'static str,
    /// The shape that the attributes ask for.
    pub shape: Vec<usize>,
    /// Whether FP makes its values, as it does those of a running mean, and no optimizer trains them.
    pub running: bool,
}
