//! Rotary position embedding (Su et al., arXiv 2104.09864).

use crate::cost::Cost;
use crate::dtype::DType;
use crate::error::Misfit;
use crate::rotary::RotaryScaling;
use crate::rule::{Io, Rule, groups_of, one, wrong_attribute, wrong_input};
use crate::shape::TensorType;

/// Two products and a sum.
const FLOPS_PER_ELEMENT: u64 = 3;

pub(crate) struct Rotary<'a> {
    pub(crate) head_dim: usize,
    pub(crate) base: f64,
    pub(crate) scaling: &'a RotaryScaling,
}

impl Rule for Rotary<'_> {
    fn family(&self) -> &'static str {
        "rotary"
    }

    fn variant(&self) -> Option<String> {
        Some(format!("of-{}", self.head_dim))
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        let (head_dim, base) = (self.head_dim, self.base);
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(wrong_attribute("head_dim", head_dim, "an even number over 0"));
        }
        if !(base.is_finite() && base > 0.0) {
            return Err(wrong_attribute("base", base, "a finite number over 0"));
        }
        if matches!(self.scaling, RotaryScaling::Yarn { .. }) && base <= 1.0 {
            return Err(wrong_attribute("base", base, "more than 1, for YaRN"));
        }
        self.scaling.check().map_err(|(key, got, expected)| wrong_attribute(key, got, expected))?;
        let input = one(inputs)?;
        if input.dtype != DType::F32 || input.shape.dims().len() != 3 {
            return Err(wrong_input(input, format!("f32 [B, S, a multiple of {head_dim}]")));
        }
        groups_of(input, head_dim)?;
        Ok(input.clone())
    }

    /// A rotation: BP turns back, and needs nothing of FP.
    fn cost(&self, io: &Io<'_>) -> Cost {
        io.per_element(FLOPS_PER_ELEMENT, FLOPS_PER_ELEMENT, 0)
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, infer, real, refusal};

    use super::*;

    fn kind(head_dim: usize, base: f64, scaling: RotaryScaling) -> OpKind {
        OpKind::Rotary { head_dim, base, scaling }
    }

    #[test]
    fn a_rotation_keeps_the_shape_and_nothing_for_bp() {
        let kind = kind(4, 1e4, RotaryScaling::None);
        assert_eq!(infer(&kind, &[real(&[3, 8])]).unwrap(), real(&[3, 8]));
        let cost = cost(&kind, &[real(&[3, 8])], 2);
        assert_eq!((cost.fp_flops, cost.bp_flops, cost.kept_bytes), (144, 144, 0));
    }

    #[test]
    fn a_rotation_refuses_odd_heads_and_other_shapes() {
        let of = |head_dim, base, scaling| refusal(&kind(head_dim, base, scaling), &[real(&[3, 8])]);
        assert_eq!(of(3, 1e4, RotaryScaling::None), "head_dim is 3, expected an even number over 0");
        assert_eq!(of(6, 1e4, RotaryScaling::None), "input is f32 [B, 3, 8], expected f32 [.., a multiple of 6]");
        assert_eq!(of(4, 0.0, RotaryScaling::None), "base is 0, expected a finite number over 0");
        let linear = RotaryScaling::Linear { factor: 0.0 };
        assert_eq!(of(4, 1e4, linear), "factor is 0, expected a finite number over 0");
        assert!(refusal(&kind(4, 1e4, RotaryScaling::None), &[real(&[8])]).contains("[B, S, a multiple of 4]"));
    }
}
