//! Dropout: zeroes elements at random in training.

use crate::cost::Cost;
use crate::error::Misfit;
use crate::rule::{Io, Rule, one, real, wrong_attribute};
use crate::shape::TensorType;

pub(crate) struct Dropout {
    pub(crate) p: f64,
}

impl Rule for Dropout {
    fn family(&self) -> &'static str {
        "dropout"
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        if !(0.0..1.0).contains(&self.p) {
            return Err(wrong_attribute("p", self.p, "at least 0 and less than 1"));
        }
        let input = one(inputs)?;
        real(input)?;
        Ok(input.clone())
    }

    /// Forward the draw's comparison and the product with the scaled mask, back the product; keeps the mask as f32.
    /// With p = 0 it is the identity and computes nothing.
    fn cost(&self, io: &Io<'_>) -> Cost {
        if self.p == 0.0 { io.per_element(0, 0, 0) } else { io.per_element(2, 1, io.output_bytes()) }
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, infer, real, refusal};

    #[test]
    fn dropout_keeps_the_shape_and_refuses_what_is_no_probability() {
        assert_eq!(infer(&OpKind::Dropout { p: 0.1 }, &[real(&[4, 6])]).unwrap(), real(&[4, 6]));
        for p in [-0.1, 1.0, f64::NAN] {
            assert!(refusal(&OpKind::Dropout { p }, &[real(&[4])]).ends_with("expected at least 0 and less than 1"));
        }
    }

    #[test]
    fn dropout_costs_its_mask_and_nothing_when_off() {
        let on = cost(&OpKind::Dropout { p: 0.1 }, &[real(&[4, 6])], 2);
        assert_eq!((on.fp_flops, on.bp_flops, on.kept_bytes), (96, 48, 192));
        let off = cost(&OpKind::Dropout { p: 0.0 }, &[real(&[4, 6])], 2);
        assert_eq!((off.fp_flops, off.bp_flops, off.kept_bytes), (0, 0, 0));
    }
}
