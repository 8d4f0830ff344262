//! Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467) of each group of a row.

use crate::cost::Cost;
use crate::dtype::DType;
use crate::error::Misfit;
use crate::kind::{OpClass, ParamRole};
use crate::rule::{Io, Rule, groups_of, one, positive, positive_eps, product, role};
use crate::shape::TensorType;

/// Square and sum 2, division and weight 2.
const FP_FLOPS_PER_ELEMENT: u64 = 4;
/// Gradient of the weight 3, through the weight 1, the row sum 2, and of the input 3.
const BP_FLOPS_PER_ELEMENT: u64 = 9;

pub(crate) struct RmsNorm {
    pub(crate) dim: usize,
    pub(crate) eps: f64,
}

impl Rule for RmsNorm {
    fn family(&self) -> &'static str {
        "rms_norm"
    }

    fn class(&self) -> OpClass {
        OpClass::Parameter
    }

    fn params(&self) -> Vec<ParamRole> {
        vec![role("weight", &[self.dim])]
    }

    fn variant(&self) -> Option<String> {
        Some(format!("of-{}", self.dim))
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        positive("dim", self.dim)?;
        positive_eps(self.eps)?;
        let input = one(inputs)?;
        groups_of(input, self.dim)?;
        Ok(input.clone())
    }

    /// Keeps the input and one number for each group.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let groups = io.output_elements() / (self.dim as u64).max(1);
        let kept_bytes = io.input_bytes().saturating_add(product(&[groups, DType::F32.bytes() as u64]));
        let cost = io.per_element(FP_FLOPS_PER_ELEMENT, BP_FLOPS_PER_ELEMENT, kept_bytes);
        Cost { read_bytes: cost.read_bytes.saturating_add(self.param_bytes()), ..cost }
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, ids, infer, real, refusal};

    use super::*;

    const KIND: OpKind = OpKind::RmsNorm { dim: 6, eps: 1e-5 };

    #[test]
    fn an_rms_norm_keeps_the_shape_and_may_take_a_row_in_groups() {
        assert_eq!(infer(&KIND, &[real(&[4, 6])]).unwrap(), real(&[4, 6]));
        assert_eq!(infer(&KIND, &[real(&[4, 18])]).unwrap(), real(&[4, 18]));
        assert_eq!(KIND.param_roles(), [role("weight", &[6])]);
    }

    #[test]
    fn an_rms_norm_refuses_what_is_no_row_of_groups() {
        assert_eq!(refusal(&KIND, &[real(&[4, 9])]), "input is f32 [B, 4, 9], expected f32 [.., a multiple of 6]");
        assert!(infer(&KIND, &[ids(&[4, 6])]).is_err());
        assert!(refusal(&OpKind::RmsNorm { dim: 0, eps: 1e-5 }, &[real(&[4, 6])]).starts_with("dim is 0"));
        assert!(refusal(&OpKind::RmsNorm { dim: 6, eps: 0.0 }, &[real(&[4, 6])]).starts_with("eps is 0"));
    }

    #[test]
    fn an_rms_norm_keeps_its_input_and_a_number_for_each_group() {
        let cost = cost(&KIND, &[real(&[4, 18])], 2);
        assert_eq!((cost.fp_flops, cost.bp_flops), (4 * 144, 9 * 144));
        assert_eq!((cost.read_bytes, cost.write_bytes, cost.kept_bytes), (576 + 24, 576, 576 + 24 * 4));
    }
}
