//! AdamW (Loshchilov and Hutter, arXiv 1711.05101), in PyTorch's form of the bias correction.

use burn_tensor::Tensor;
use fusionllm_protocol::StateKind;
use multiversion::multiversion;
use rayon::prelude::*;

use super::ParamState;
use crate::UpdateSpec;
use crate::burn::kernels::fused::{TASK, from_cpu, into_cpu, zeros};

/// The constants of one update.
#[derive(Clone, Copy, Debug)]
pub(super) struct Constants {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    /// Learning rate over the first moment's bias correction.
    rate: f64,
    /// One over the root of the second moment's.
    root: f64,
    /// What weight decay leaves of a parameter, as a factor.
    param_factor: f64,
    gradient_scale: f64,
}

impl Constants {
    pub(super) fn new([beta1, beta2]: [f64; 2], epsilon: f64, weight_decay: f64, update: UpdateSpec) -> Self {
        let count = (update.step + 1) as f64;
        Self {
            beta1,
            beta2,
            epsilon,
            rate: update.lr / (1.0 - beta1.powf(count)),
            root: 1.0 / (1.0 - beta2.powf(count)).sqrt(),
            param_factor: 1.0 - update.lr * weight_decay,
            gradient_scale: update.gradient_scale,
        }
    }
}

/// In Burn's operations. Parameter and gradient are decayed and scaled.
pub(super) fn plain(
    param: Tensor<1>,
    gradient: Tensor<1>,
    state: &mut ParamState,
    Constants { beta1, beta2, epsilon, rate, root, .. }: Constants,
) -> Tensor<1> {
    let first = gradient.clone() * (1.0 - beta1);
    let second = gradient.clone() * gradient * (1.0 - beta2);
    let exp_avg = match state.remove(&StateKind::ExpAvg) {
        Some(old) => old * beta1 + first,
        None => first,
    };
    let exp_avg_sq = match state.remove(&StateKind::ExpAvgSq) {
        Some(old) => old * beta2 + second,
        None => second,
    };
    let denominator = exp_avg_sq.clone().sqrt() * root + epsilon;
    let param = param - exp_avg.clone() / denominator * rate;
    state.insert(StateKind::ExpAvg, exp_avg);
    state.insert(StateKind::ExpAvgSq, exp_avg_sq);
    param
}

/// In one pass on all threads, if the tensors are on the CPU; else parameter and gradient come back as they were.
pub(super) fn in_place(
    param: Tensor<1>,
    gradient: Tensor<1>,
    state: &mut ParamState,
    constants: Constants,
) -> Result<Tensor<1>, Box<(Tensor<1>, Tensor<1>)>> {
    let (mut param, gradient) = match (into_cpu(param), into_cpu(gradient)) {
        (Ok(param), Ok(gradient)) => (param, gradient.to_contiguous()),
        (param, gradient) => {
            let (param, gradient) = (param.map_or_else(|p| *p, from_cpu), gradient.map_or_else(|g| *g, from_cpu));
            return Err(Box::new((param, gradient)));
        }
    };
    let mut moment = |kind| state.remove(&kind).and_then(|old| into_cpu(old).ok()).unwrap_or_else(|| zeros(&param));
    let (mut exp_avg, mut exp_avg_sq) = (moment(StateKind::ExpAvg), moment(StateKind::ExpAvgSq));
    param
        .storage_mut::<f32>()
        .par_chunks_mut(TASK)
        .zip(gradient.storage::<f32>().par_chunks(TASK))
        .zip(exp_avg.storage_mut::<f32>().par_chunks_mut(TASK))
        .zip(exp_avg_sq.storage_mut::<f32>().par_chunks_mut(TASK))
        .for_each(|(((param, gradient), first), second)| update(param, gradient, first, second, constants));
    state.insert(StateKind::ExpAvg, from_cpu(exp_avg));
    state.insert(StateKind::ExpAvgSq, from_cpu(exp_avg_sq));
    Ok(from_cpu(param))
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq", "x86_64+avx2"))]
fn update(param: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32], constants: Constants) {
    let [beta1, rest1] = [constants.beta1, 1.0 - constants.beta1].map(|c| c as f32);
    let [beta2, rest2] = [constants.beta2, 1.0 - constants.beta2].map(|c| c as f32);
    let [epsilon, rate] = [constants.epsilon, constants.rate].map(|c| c as f32);
    let [root, param_factor, scale] =
        [constants.root, constants.param_factor, constants.gradient_scale].map(|c| c as f32);
    let moments = first.iter_mut().zip(second);
    for ((param, &gradient), (first, second)) in param.iter_mut().zip(gradient).zip(moments) {
        let gradient = gradient * scale;
        *first = *first * beta1 + gradient * rest1;
        *second = *second * beta2 + gradient * gradient * rest2;
        *param = *param * param_factor - *first / (second.sqrt() * root + epsilon) * rate;
    }
}

#[cfg(test)]
mod tests {
    use burn_tensor::{Device, TensorData};

    use super::*;
    use crate::burn::host::to_vec;

    fn tensor(seed: usize) -> Tensor<1> {
        let values: Vec<f32> = (0..TASK + 5).map(|i| ((i * 7 + seed) % 13) as f32 / 6.0 - 1.0).collect();
        Tensor::from_data(TensorData::new(values, [TASK + 5]), &Device::flex())
    }

    #[test]
    fn in_place_is_the_plain_update() {
        let (mut in_place_state, mut plain_state) = (ParamState::new(), ParamState::new());
        let (mut a, mut b) = (tensor(1), tensor(1));
        for step in 0..4 {
            let update = UpdateSpec { step, lr: 0.01, gradient_scale: 0.5 };
            let constants = Constants::new([0.9, 0.95], 1e-8, 0.1, update);
            let gradient = tensor(3 + step as usize);
            a = in_place(a, gradient.clone(), &mut in_place_state, constants).unwrap();
            b = plain(b * (1.0 - 0.01 * 0.1), gradient * 0.5, &mut plain_state, constants);
            let pairs = to_vec(a.clone()).unwrap().into_iter().zip(to_vec(b.clone()).unwrap());
            for (a, b) in pairs {
                assert!((a - b).abs() < 1e-6, "step {step}: {a} against {b}");
            }
        }
        assert_eq!(in_place_state.keys().collect::<Vec<_>>(), plain_state.keys().collect::<Vec<_>>());
    }
}
