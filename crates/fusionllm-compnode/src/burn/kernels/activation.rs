//! Elementwise nonlinearities.

use burn_tensor::Tensor;
use burn_tensor::activation::{gelu, relu, sigmoid, silu};
use fusionllm_graph::ActivationFunction;

use super::fused::{self, Gated, Operand};
use super::{Arguments, RealValue};
use crate::ExecutorError;

/// 2·√(2/π): the argument of the sigmoid form of tanh.
const TWO_SQRT_2_OVER_PI: f64 = 1.595_769_121_605_730_7;
/// The cubic coefficient of the tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415).
const CUBIC: f64 = 0.044_715;

/// x → f(x), any shape.
pub(super) fn forward(arguments: &Arguments<'_>, function: ActivationFunction) -> Result<RealValue, ExecutorError> {
    let x = arguments.real(0)?;
    let tensor = x.tensor.clone();
    let tensor = match function {
        ActivationFunction::GeluTanh => {
            fused::apply(Gated::Gelu, [Operand::of(&tensor)]).unwrap_or_else(|| gelu_tanh(tensor))
        }
        ActivationFunction::GeluErf => gelu(tensor),
        ActivationFunction::Relu => relu(tensor),
        ActivationFunction::Silu => fused::apply(Gated::Silu, [Operand::of(&tensor)]).unwrap_or_else(|| silu(tensor)),
    };
    Ok(RealValue { tensor, shape: x.shape.clone() })
}

/// The tanh form of GELU in Burn's operations.
pub(super) fn gelu_tanh(x: Tensor<2>) -> Tensor<2> {
    // 0.5·(1 + tanh z) = sigmoid(2z) spares half of the passes over memory.
    let gate = (x.clone() * x.clone() * (TWO_SQRT_2_OVER_PI * CUBIC) + TWO_SQRT_2_OVER_PI) * x.clone();
    x * sigmoid(gate)
}
