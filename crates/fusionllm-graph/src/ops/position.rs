//! Position: a learnt vector added at each position.

use crate::cost::Cost;
use crate::error::Misfit;
use crate::kind::{OpClass, ParamRole};
use crate::rule::{Io, Rule, last_dim, one, positive, role, wrong_input};
use crate::shape::{Dim, TensorType};

pub(crate) struct Position {
    pub(crate) positions: usize,
    pub(crate) dim: usize,
}

impl Rule for Position {
    fn family(&self) -> &'static str {
        "position"
    }

    fn class(&self) -> OpClass {
        OpClass::Parameter
    }

    fn params(&self) -> Vec<ParamRole> {
        vec![role("weight", &[self.positions, self.dim])]
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        positive("positions", self.positions)?;
        positive("dim", self.dim)?;
        let input = one(inputs)?;
        last_dim(input, self.dim)?;
        match *input.shape.dims() {
            [_, Dim::Fixed(seq_len), _] if seq_len <= self.positions => Ok(input.clone()),
            _ => Err(wrong_input(input, format!("f32 [B, S, {}] with S at most {}", self.dim, self.positions))),
        }
    }

    /// 1 per element forward (the sum) and back (the sum over the batch). Reads S rows of the table; keeps nothing.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let cost = io.per_element(1, 1, 0);
        Cost { read_bytes: cost.read_bytes.saturating_add(io.output.bytes(1)), ..cost }
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, infer, real, refusal};

    use super::*;

    const KIND: OpKind = OpKind::Position { positions: 5, dim: 6 };

    #[test]
    fn a_position_keeps_the_shape() {
        assert_eq!(infer(&KIND, &[real(&[5, 6])]).unwrap(), real(&[5, 6]));
        assert_eq!(KIND.param_roles(), [role("weight", &[5, 6])]);
    }

    #[test]
    fn a_position_refuses_longer_sequences_and_other_widths() {
        assert_eq!(refusal(&KIND, &[real(&[6, 6])]), "input is f32 [B, 6, 6], expected f32 [B, S, 6] with S at most 5");
        assert_eq!(refusal(&KIND, &[real(&[5, 7])]), "input is f32 [B, 5, 7], expected f32 [.., 6]");
        assert!(infer(&KIND, &[real(&[6])]).is_err());
    }

    #[test]
    fn a_position_costs_one_sum_each_way() {
        let cost = cost(&KIND, &[real(&[4, 6])], 2);
        assert_eq!((cost.fp_flops, cost.bp_flops, cost.kept_bytes), (48, 48, 0));
        assert_eq!((cost.read_bytes, cost.write_bytes), (4 * 48 + 4 * 24, 4 * 48));
    }
}
