//! Sum and product of two tensors of one shape.

use crate::cost::Cost;
use crate::error::Misfit;
use crate::rule::{Io, Rule, real, two};
use crate::shape::TensorType;

pub(crate) enum Elementwise {
    Add,
    Mul,
}

impl Rule for Elementwise {
    fn family(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Mul => "mul",
        }
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        let (first, second) = two(inputs)?;
        real(first)?;
        if first != second {
            let (expected, got) = (format!("{first} like the first"), second.to_string());
            return Err(Misfit::Input { input: "second input", expected, got });
        }
        Ok(first.clone())
    }

    /// A sum is 1 per element forward, passes its gradient on as it is, and keeps nothing. A product is 1 forward
    /// and 2 back, and keeps both inputs.
    fn cost(&self, io: &Io<'_>) -> Cost {
        match self {
            Self::Add => io.per_element(1, 0, 0),
            Self::Mul => io.per_element(1, 2, io.input_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, ids, infer, real, refusal};

    #[test]
    fn sum_and_product_keep_the_common_shape() {
        for kind in [OpKind::Add, OpKind::Mul] {
            assert_eq!(infer(&kind, &[real(&[4, 6]), real(&[4, 6])]).unwrap(), real(&[4, 6]));
        }
    }

    #[test]
    fn sum_and_product_refuse_unlike_shapes_and_integers() {
        for kind in [OpKind::Add, OpKind::Mul] {
            let message = refusal(&kind, &[real(&[4, 6]), real(&[4, 7])]);
            assert_eq!(message, "second input is f32 [B, 4, 7], expected f32 [B, 4, 6] like the first");
            assert!(refusal(&kind, &[ids(&[4]), ids(&[4])]).contains("expected f32"));
            assert_eq!(refusal(&kind, &[real(&[4])]), "has 1 inputs, expected 2");
        }
    }

    #[test]
    fn a_sum_is_cheaper_to_go_back_over_than_a_product() {
        let inputs = [real(&[4, 6]), real(&[4, 6])];
        let (add, mul) = (cost(&OpKind::Add, &inputs, 2), cost(&OpKind::Mul, &inputs, 2));
        assert_eq!((add.fp_flops, add.bp_flops, add.kept_bytes), (48, 0, 0));
        assert_eq!((mul.fp_flops, mul.bp_flops, mul.kept_bytes), (48, 96, 384));
        assert_eq!((add.read_bytes, add.write_bytes), (384, 192));
    }
}
