//! SGD with momentum, as PyTorch has it: v ← μ·v + g, p ← p - lr·v.

use burn_tensor::Tensor;

use super::ParamState;

pub(super) const MOMENTUM: &str = "momentum";

pub(super) fn step(param: Tensor<1>, gradient: Tensor<1>, state: &mut ParamState, momentum: f64, lr: f64) -> Tensor<1> {
    if momentum == 0.0 {
        return param - gradient * lr;
    }
    let velocity = match state.remove(MOMENTUM) {
        Some(old) => old * momentum + gradient,
        None => gradient,
    };
    let param = param - velocity.clone() * lr;
    state.insert(MOMENTUM, velocity);
    param
}
