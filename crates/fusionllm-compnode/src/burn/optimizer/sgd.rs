//! SGD with momentum, as PyTorch has it: v ← μ·v + g, p ← p - lr·v.

use burn_tensor::Tensor;
use fusionllm_protocol::StateKind;

use super::ParamState;

pub(super) fn step(param: Tensor<1>, gradient: Tensor<1>, state: &mut ParamState, momentum: f64, lr: f64) -> Tensor<1> {
    if momentum == 0.0 {
        return param - gradient * lr;
    }
    let velocity = match state.remove(&StateKind::Momentum) {
        Some(old) => old * momentum + gradient,
        None => gradient,
    };
    let param = param - velocity.clone() * lr;
    state.insert(StateKind::Momentum, velocity);
    param
}
