//! BatchNorm2d: normalisation of each channel over batch, height and width.

use crate::cost::Cost;
use crate::error::Misfit;
use crate::kind::{OpClass, ParamRole};
use crate::ops::image::with_channels;
use crate::rule::{Io, Rule, in_unit, one, positive, positive_eps, role, running};
use crate::shape::TensorType;

/// Mean and variance 4, normalisation 2, weight and bias 2.
const NORM_FP_FLOPS_PER_ELEMENT: u64 = 8;
/// As layer norm.
const NORM_BP_FLOPS_PER_ELEMENT: u64 = 11;

pub(crate) struct BatchNorm2d {
    pub(crate) channels: usize,
    pub(crate) eps: f64,
    pub(crate) momentum: f64,
}

impl Rule for BatchNorm2d {
    fn family(&self) -> &'static str {
        "batch_norm2d"
    }

    fn class(&self) -> OpClass {
        OpClass::Parameter
    }

    fn params(&self) -> Vec<ParamRole> {
        let of = [self.channels];
        vec![role("weight", &of), role("bias", &of), running("running_mean", &of), running("running_var", &of)]
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        positive("channels", self.channels)?;
        positive_eps(self.eps)?;
        in_unit("momentum", self.momentum)?;
        let input = one(inputs)?;
        with_channels(input, self.channels)?;
        Ok(input.clone())
    }

    /// Keeps the input.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let cost = io.per_element(NORM_FP_FLOPS_PER_ELEMENT, NORM_BP_FLOPS_PER_ELEMENT, io.input_bytes());
        Cost { read_bytes: cost.read_bytes.saturating_add(self.param_bytes()), ..cost }
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{infer, real, refusal};

    #[test]
    fn a_norm_keeps_the_shape() {
        let norm = OpKind::BatchNorm2d { channels: 64, eps: 1e-5, momentum: 0.1 };
        assert_eq!(infer(&norm, &[real(&[64, 5, 5])]).unwrap(), real(&[64, 5, 5]));
        let running: Vec<bool> = norm.param_roles().iter().map(|role| role.running).collect();
        assert_eq!(running, [false, false, true, true]);
    }

    #[test]
    fn momentum_is_a_share() {
        for momentum in [0.0, 1.5, f64::NAN] {
            let norm = OpKind::BatchNorm2d { channels: 64, eps: 1e-5, momentum };
            assert!(refusal(&norm, &[real(&[64, 5, 5])]).starts_with("momentum is"));
        }
    }
}
