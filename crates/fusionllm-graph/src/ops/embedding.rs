//! Embedding: rows of a table by token id.

use crate::cost::Cost;
use crate::dtype::DType;
use crate::error::Misfit;
use crate::kind::{OpClass, ParamRole};
use crate::rule::{Io, Rule, one, positive, role, wrong_input};
use crate::shape::{Dim, Shape, TensorType};

pub(crate) struct Embedding {
    pub(crate) vocab: usize,
    pub(crate) dim: usize,
}

impl Rule for Embedding {
    fn family(&self) -> &'static str {
        "embedding"
    }

    fn class(&self) -> OpClass {
        OpClass::Parameter
    }

    fn params(&self) -> Vec<ParamRole> {
        vec![role("weight", &[self.vocab, self.dim])]
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        positive("vocab", self.vocab)?;
        positive("dim", self.dim)?;
        let ids = one(inputs)?;
        if ids.dtype != DType::I32 || ids.shape.rank() != 2 {
            return Err(wrong_input(ids, "i32 [B, S]"));
        }
        let mut dims = ids.shape.dims().to_vec();
        dims.push(Dim::Fixed(self.dim));
        Ok(TensorType::f32(Shape::new(dims)))
    }

    /// FP only copies; BP adds each row's gradient into the table (1 per element). Reads the ids and the rows they
    /// name, and keeps the ids.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let cost = io.per_element(0, 1, io.input_bytes());
        Cost { read_bytes: io.input_bytes().saturating_add(io.output_bytes()), ..cost }
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, ids, infer, real, refusal};

    use super::*;

    const KIND: OpKind = OpKind::Embedding { vocab: 10, dim: 6 };

    #[test]
    fn an_embedding_turns_ids_into_rows() {
        assert_eq!(infer(&KIND, &[ids(&[4])]).unwrap(), real(&[4, 6]));
        assert_eq!(KIND.param_roles(), [role("weight", &[10, 6])]);
    }

    #[test]
    fn an_embedding_refuses_floats_and_other_ranks() {
        assert_eq!(refusal(&KIND, &[real(&[4])]), "input is f32 [B, 4], expected i32 [B, S]");
        assert_eq!(refusal(&KIND, &[ids(&[4, 6])]), "input is i32 [B, 4, 6], expected i32 [B, S]");
        assert_eq!(refusal(&OpKind::Embedding { vocab: 0, dim: 6 }, &[ids(&[4])]), "vocab is 0, expected at least 1");
    }

    #[test]
    fn an_embedding_costs_only_its_scatter() {
        let cost = cost(&KIND, &[ids(&[4])], 2);
        assert_eq!((cost.fp_flops, cost.bp_flops), (0, 2 * 4 * 6));
        assert_eq!((cost.read_bytes, cost.write_bytes, cost.kept_bytes), (2 * 4 * 4 + 192, 192, 2 * 4 * 4));
    }
}
