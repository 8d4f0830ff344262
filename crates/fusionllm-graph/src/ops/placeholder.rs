//! Input and label: where data enters.

use crate::cost::Cost;
use crate::dtype::DType;
use crate::error::Misfit;
use crate::kind::OpClass;
use crate::rule::{Io, Rule, wrong_attribute};
use crate::shape::{Dim, Shape, TensorType};

pub(crate) struct Placeholder<'a> {
    pub(crate) family: &'static str,
    pub(crate) dtype: DType,
    pub(crate) shape: &'a Shape,
}

impl Rule for Placeholder<'_> {
    fn family(&self) -> &'static str {
        self.family
    }

    fn class(&self) -> OpClass {
        OpClass::Placeholder
    }

    /// The batch comes first and only there, so that every tensor downstream can be cut into micro-batches by rows.
    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        if !inputs.is_empty() {
            return Err(Misfit::InputCount { expected: 0, got: inputs.len() });
        }
        let fits = match self.shape.dims() {
            [Dim::Batch, rest @ ..] => rest.iter().all(|dim| matches!(dim, Dim::Fixed(1..))),
            _ => false,
        };
        if !fits {
            return Err(wrong_attribute("shape", self.shape, "[B, ..] with sizes of at least 1 after the batch"));
        }
        Ok(TensorType { shape: self.shape.clone(), dtype: self.dtype })
    }

    /// Writing the batch into memory is all it does.
    fn cost(&self, io: &Io<'_>) -> Cost {
        io.per_element(0, 0, 0)
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, ids, infer, refusal};

    use super::*;

    #[test]
    fn a_placeholder_has_the_shape_it_says() {
        let kind = OpKind::Input { dtype: DType::I32, shape: Shape::batched(&[8]) };
        assert_eq!(infer(&kind, &[]).unwrap(), ids(&[8]));
        assert_eq!(infer(&OpKind::Label { shape: Shape::batched(&[8]) }, &[]).unwrap(), ids(&[8]));
        assert_eq!(cost(&kind, &[], 2), Cost { write_bytes: 2 * 8 * 4, ..Cost::default() });
    }

    #[test]
    fn a_placeholder_refuses_inputs_and_shapes_without_a_leading_batch() {
        let label = |dims| OpKind::Label { shape: Shape::new(dims) };
        assert_eq!(refusal(&label(vec![Dim::Batch]), &[ids(&[8])]), "has 1 inputs, expected 0");
        for dims in [vec![], vec![Dim::Fixed(8)], vec![Dim::Batch, Dim::Fixed(0)], vec![Dim::Batch, Dim::Batch]] {
            assert!(refusal(&label(dims), &[]).contains("expected [B, ..]"));
        }
    }
}
