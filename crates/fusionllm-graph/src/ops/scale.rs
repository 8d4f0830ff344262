//! Product with a number.

use crate::cost::Cost;
use crate::error::Misfit;
use crate::rule::{Io, Rule, one, real, wrong_attribute};
use crate::shape::TensorType;

pub(crate) struct Scale {
    pub(crate) factor: f64,
}

impl Rule for Scale {
    fn family(&self) -> &'static str {
        "scale"
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        // As it is computed with.
        let factor = self.factor as f32;
        if !factor.is_finite() || factor == 0.0 {
            return Err(wrong_attribute("factor", self.factor, "a number that f32 holds, and not 0"));
        }
        let input = one(inputs)?;
        real(input)?;
        Ok(input.clone())
    }

    /// One product each way, which needs nothing of FP.
    fn cost(&self, io: &Io<'_>) -> Cost {
        io.per_element(1, 1, 0)
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, ids, infer, real, refusal};

    const KIND: OpKind = OpKind::Scale { factor: 2.0 };

    #[test]
    fn a_scale_keeps_the_shape_and_nothing_else() {
        assert_eq!(infer(&KIND, &[real(&[4, 6])]).unwrap(), real(&[4, 6]));
        let cost = cost(&KIND, &[real(&[4, 6])], 2);
        assert_eq!((cost.fp_flops, cost.bp_flops, cost.kept_bytes), (48, 48, 0));
    }

    #[test]
    fn a_scale_refuses_integers_and_numbers_that_end_all() {
        assert!(refusal(&KIND, &[ids(&[4])]).contains("expected f32"));
        for factor in [0.0, f64::NAN, f64::INFINITY, 1e-60] {
            let said = refusal(&OpKind::Scale { factor }, &[real(&[4])]);
            assert!(said.ends_with("expected a number that f32 holds, and not 0"), "{said}");
        }
    }
}
