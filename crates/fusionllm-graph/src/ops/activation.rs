//! Activation: an elementwise non-linearity.

use crate::cost::Cost;
use crate::error::Misfit;
use crate::kind::ActivationFunction;
use crate::rule::{Io, Rule, one, real};
use crate::shape::TensorType;

pub(crate) struct Activation {
    pub(crate) function: ActivationFunction,
}

impl Activation {
    /// FP and BP operations per element; an elementary function (tanh, erf, exp) is one, and BP computes anew what
    /// it needs of the FP.
    fn flops_per_element(&self) -> (u64, u64) {
        match self.function {
            // FP: x^3 2, 0.044715 x^3 + x 2, scale 1, tanh 1, 1 + t 1, x 1, halve 1.
            // BP: the same up to tanh 6, 1 - t^2 2, inner derivative 3, join 5, gradient 1.
            ActivationFunction::GeluTanh => (9, 17),
            // FP: scale, erf, add, x, halve. BP: distribution 4, density 4, join 2, gradient 1.
            ActivationFunction::GeluErf => (5, 11),
            ActivationFunction::Relu => (1, 1),
            // FP: negate, exp, add, divide. BP: sigmoid 4, 1 + x (1 - s) 3, times s 1, gradient 1.
            ActivationFunction::Silu => (4, 9),
        }
    }
}

impl Rule for Activation {
    fn family(&self) -> &'static str {
        "activation"
    }

    fn variant(&self) -> Option<String> {
        let name = match self.function {
            ActivationFunction::GeluTanh => "gelu-tanh",
            ActivationFunction::GeluErf => "gelu-erf",
            ActivationFunction::Relu => "relu",
            ActivationFunction::Silu => "silu",
        };
        Some(name.to_owned())
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        let input = one(inputs)?;
        real(input)?;
        Ok(input.clone())
    }

    /// Keeps the input.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let (fp, bp) = self.flops_per_element();
        io.per_element(fp, bp, io.input_bytes())
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, ids, infer, real, refusal};

    use super::*;

    #[test]
    fn an_activation_keeps_the_shape_and_refuses_integers() {
        let kind = OpKind::Activation { function: ActivationFunction::Silu };
        assert_eq!(infer(&kind, &[real(&[4, 6])]).unwrap(), real(&[4, 6]));
        assert_eq!(refusal(&kind, &[ids(&[4])]), "input is i32 [B, 4], expected f32 of any shape");
    }

    #[test]
    fn an_activation_costs_by_its_function() {
        let cases = [
            (ActivationFunction::GeluTanh, 9, 17),
            (ActivationFunction::GeluErf, 5, 11),
            (ActivationFunction::Relu, 1, 1),
            (ActivationFunction::Silu, 4, 9),
        ];
        for (function, fp, bp) in cases {
            let cost = cost(&OpKind::Activation { function }, &[real(&[4, 6])], 2);
            assert_eq!((cost.fp_flops, cost.bp_flops), (fp * 48, bp * 48));
            assert_eq!((cost.read_bytes, cost.write_bytes, cost.kept_bytes), (192, 192, 192));
        }
    }
}
