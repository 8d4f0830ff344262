//! Linear: an affine map of the last dimension.

use crate::cost::Cost;
use crate::error::Misfit;
use crate::kind::{OpClass, ParamRole, WeightLayout};
use crate::rule::{Io, Rule, last_dim, one, positive, product, role};
use crate::shape::TensorType;

pub(crate) struct Linear {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) bias: bool,
    pub(crate) layout: WeightLayout,
}

impl Rule for Linear {
    fn family(&self) -> &'static str {
        "linear"
    }

    fn variant(&self) -> Option<String> {
        let layout = match self.layout {
            WeightLayout::InOut => "in-out",
            WeightLayout::OutIn => "out-in",
        };
        Some(layout.to_owned())
    }

    fn class(&self) -> OpClass {
        OpClass::Parameter
    }

    fn params(&self) -> Vec<ParamRole> {
        let weight = match self.layout {
            WeightLayout::InOut => [self.inputs, self.outputs],
            WeightLayout::OutIn => [self.outputs, self.inputs],
        };
        let mut roles = vec![role("weight", &weight)];
        if self.bias {
            roles.push(role("bias", &[self.outputs]));
        }
        roles
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        positive("inputs", self.inputs)?;
        positive("outputs", self.outputs)?;
        let input = one(inputs)?;
        last_dim(input, self.inputs)?;
        Ok(TensorType::f32(input.shape.with_last(self.outputs)))
    }

    /// FP is one matrix product, 2 * rows * inputs * outputs; BP is two (input and weight), so twice that. The bias
    /// is left out: one part in 2 * inputs. Keeps the input.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let fp_flops = product(&[2, io.input_elements(), self.outputs as u64]);
        io.matrix_product(fp_flops, self.param_bytes())
    }

    /// BP is the product that gives the input's gradient, which needs nothing of FP.
    fn frozen_cost(&self, io: &Io<'_>) -> Option<Cost> {
        let cost = self.cost(io);
        Some(Cost { bp_flops: cost.fp_flops, kept_bytes: 0, ..cost })
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, infer, real, refusal};

    use super::*;

    fn linear(bias: bool, layout: WeightLayout) -> OpKind {
        OpKind::Linear { inputs: 6, outputs: 10, bias, layout }
    }

    #[test]
    fn a_linear_changes_the_last_dimension() {
        let kind = linear(true, WeightLayout::InOut);
        assert_eq!(infer(&kind, &[real(&[4, 6])]).unwrap(), real(&[4, 10]));
        assert_eq!(infer(&kind, &[real(&[6])]).unwrap(), real(&[10]));
    }

    #[test]
    fn the_layout_turns_the_weight() {
        assert_eq!(linear(true, WeightLayout::InOut).param_roles(), [role("weight", &[6, 10]), role("bias", &[10])]);
        assert_eq!(linear(false, WeightLayout::OutIn).param_roles(), [role("weight", &[10, 6])]);
    }

    #[test]
    fn a_linear_refuses_other_widths_and_counts_of_inputs() {
        let kind = linear(true, WeightLayout::InOut);
        assert_eq!(refusal(&kind, &[real(&[4, 10])]), "input is f32 [B, 4, 10], expected f32 [.., 6]");
        assert_eq!(refusal(&kind, &[]), "has 0 inputs, expected 1");
        assert_eq!(refusal(&kind, &[real(&[6]), real(&[6])]), "has 2 inputs, expected 1");
    }

    #[test]
    fn a_linear_costs_one_product_forward_and_two_back() {
        let cost = cost(&linear(true, WeightLayout::OutIn), &[real(&[4, 6])], 3);
        assert_eq!((cost.fp_flops, cost.bp_flops), (2 * 3 * 4 * 6 * 10, 4 * 3 * 4 * 6 * 10));
        assert_eq!((cost.read_bytes, cost.write_bytes), (4 * (72 + 70), 4 * 120));
        assert_eq!(cost.kept_bytes, 4 * 72);
    }

    #[test]
    fn a_frozen_linear_goes_back_by_one_product_and_keeps_nothing() {
        let (kind, input) = (linear(true, WeightLayout::OutIn), real(&[4, 6]));
        let output = infer(&kind, std::slice::from_ref(&input)).unwrap();
        let (whole, frozen) = (kind.cost(&[&input], &output, 3), kind.frozen_cost(&[&input], &output, 3));
        assert_eq!(frozen.unwrap(), Cost { bp_flops: whole.fp_flops, kept_bytes: 0, ..whole });
    }
}
