//! AdamW (Loshchilov and Hutter, arXiv 1711.05101), in PyTorch's form of the bias correction.

use burn_tensor::Tensor;

use super::ParamState;
use crate::UpdateSpec;

pub(super) const EXP_AVG: &str = "exp_avg";
pub(super) const EXP_AVG_SQ: &str = "exp_avg_sq";

pub(super) fn step(
    param: Tensor<1>,
    gradient: Tensor<1>,
    state: &mut ParamState,
    [beta1, beta2]: [f64; 2],
    epsilon: f64,
    update: UpdateSpec,
) -> Tensor<1> {
    let first = gradient.clone() * (1.0 - beta1);
    let second = gradient.clone() * gradient * (1.0 - beta2);
    let exp_avg = match state.remove(EXP_AVG) {
        Some(old) => old * beta1 + first,
        None => first,
    };
    let exp_avg_sq = match state.remove(EXP_AVG_SQ) {
        Some(old) => old * beta2 + second,
        None => second,
    };
    let count = (update.step + 1) as f64;
    let (correction1, correction2) = (1.0 - beta1.powf(count), 1.0 - beta2.powf(count));
    let denominator = exp_avg_sq.clone().sqrt() * (1.0 / correction2.sqrt()) + epsilon;
    let param = param - exp_avg.clone() / denominator * (update.lr / correction1);
    state.insert(EXP_AVG, exp_avg);
    state.insert(EXP_AVG_SQ, exp_avg_sq);
    param
}
