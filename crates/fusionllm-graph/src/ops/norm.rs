//! Layer norm over the last dimension.

use crate::cost::Cost;
use crate::dtype::DType;
use crate::error::Misfit;
use crate::kind::{OpClass, ParamRole};
use crate::rule::{Io, Rule, last_dim, one, positive, positive_eps, product, role};
use crate::shape::TensorType;

/// Mean and its subtraction 2, square and sum 2, division 1, weight and bias 2.
const FP_FLOPS_PER_ELEMENT: u64 = 7;
/// Gradients of weight 2 and bias 1, through the weight 1, the two row sums 3, and of the input 4.
const BP_FLOPS_PER_ELEMENT: u64 = 11;

pub(crate) struct LayerNorm {
    pub(crate) dim: usize,
    pub(crate) eps: f64,
}

impl Rule for LayerNorm {
    fn family(&self) -> &'static str {
        "layer_norm"
    }

    fn class(&self) -> OpClass {
        OpClass::Parameter
    }

    fn params(&self) -> Vec<ParamRole> {
        vec![role("weight", &[self.dim]), role("bias", &[self.dim])]
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        positive("dim", self.dim)?;
        positive_eps(self.eps)?;
        let input = one(inputs)?;
        last_dim(input, self.dim)?;
        Ok(input.clone())
    }

    /// Keeps the input and, per row, mean and deviation.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let rows = io.output_elements() / (self.dim as u64).max(1);
        let row_stats_bytes = product(&[2, rows, DType::F32.bytes() as u64]);
        let kept_bytes = io.input_bytes().saturating_add(row_stats_bytes);
        let cost = io.per_element(FP_FLOPS_PER_ELEMENT, BP_FLOPS_PER_ELEMENT, kept_bytes);
        Cost { read_bytes: cost.read_bytes.saturating_add(self.param_bytes()), ..cost }
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, ids, infer, real, refusal};

    use super::*;

    const KIND: OpKind = OpKind::LayerNorm { dim: 6, eps: 1e-5 };

    #[test]
    fn a_layer_norm_keeps_the_shape() {
        assert_eq!(infer(&KIND, &[real(&[4, 6])]).unwrap(), real(&[4, 6]));
        assert_eq!(KIND.param_roles(), [role("weight", &[6]), role("bias", &[6])]);
    }

    #[test]
    fn a_layer_norm_refuses_other_widths_integers_and_bad_eps() {
        assert_eq!(refusal(&KIND, &[real(&[4, 5])]), "input is f32 [B, 4, 5], expected f32 [.., 6]");
        assert_eq!(refusal(&KIND, &[ids(&[4, 6])]), "input is i32 [B, 4, 6], expected f32 [.., 6]");
        for eps in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(refusal(&OpKind::LayerNorm { dim: 6, eps }, &[real(&[4, 6])]).starts_with("eps is"));
        }
    }

    #[test]
    fn a_layer_norm_costs_a_few_flops_an_element() {
        let cost = cost(&KIND, &[real(&[4, 6])], 2);
        assert_eq!((cost.fp_flops, cost.bp_flops), (7 * 48, 11 * 48));
        assert_eq!((cost.read_bytes, cost.write_bytes, cost.kept_bytes), (192 + 48, 192, 192 + 2 * 8 * 4));
    }
}
