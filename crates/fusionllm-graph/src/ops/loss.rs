//! Cross-entropy: where the BP starts.

use crate::cost::Cost;
use crate::dtype::DType;
use crate::error::Misfit;
use crate::kind::OpClass;
use crate::rule::{Io, Rule, product, two};
use crate::shape::{Dim, Shape, TensorType};

/// Row maximum, subtract, exponential, row sum, subtract its logarithm.
const FP_FLOPS_PER_LOGIT: u64 = 5;
/// Softmax minus one-hot, times the incoming gradient over the token count.
const BP_FLOPS_PER_LOGIT: u64 = 2;

pub(crate) struct CrossEntropy;

impl Rule for CrossEntropy {
    fn family(&self) -> &'static str {
        "cross_entropy"
    }

    fn class(&self) -> OpClass {
        OpClass::Loss
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        let (logits, labels) = two(inputs)?;
        let [batch @ Dim::Batch, seq_len, Dim::Fixed(_)] = *logits.shape.dims() else {
            return Err(wrong("logits", logits, "f32 [B, S, V]".to_owned()));
        };
        if logits.dtype != DType::F32 {
            return Err(wrong("logits", logits, "f32 [B, S, V]".to_owned()));
        }
        let expected = TensorType::i32(Shape::new(vec![batch, seq_len]));
        if *labels != expected {
            return Err(wrong("labels", labels, expected.to_string()));
        }
        Ok(TensorType::f32(Shape::scalar()))
    }

    /// Keeps the probabilities, as large as the logits, and the labels.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let logits = io.input_elements();
        Cost {
            fp_flops: product(&[logits, FP_FLOPS_PER_LOGIT]),
            bp_flops: product(&[logits, BP_FLOPS_PER_LOGIT]),
            read_bytes: io.input_bytes(),
            write_bytes: io.output_bytes(),
            kept_bytes: io.input_bytes(),
        }
    }
}

fn wrong(input: &'static str, got: &TensorType, expected: String) -> Misfit {
    Misfit::Input { input, expected, got: got.to_string() }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, ids, infer, real, refusal};

    use super::*;

    const KIND: OpKind = OpKind::CrossEntropy;

    #[test]
    fn a_cross_entropy_is_one_number() {
        assert_eq!(infer(&KIND, &[real(&[4, 10]), ids(&[4])]).unwrap(), TensorType::f32(Shape::scalar()));
    }

    #[test]
    fn a_cross_entropy_refuses_labels_of_another_length_and_logits_of_another_rank() {
        assert_eq!(refusal(&KIND, &[real(&[4, 10]), ids(&[5])]), "labels is i32 [B, 5], expected i32 [B, 4]");
        assert_eq!(refusal(&KIND, &[real(&[4, 10]), real(&[4])]), "labels is f32 [B, 4], expected i32 [B, 4]");
        assert_eq!(refusal(&KIND, &[real(&[4]), ids(&[4])]), "logits is f32 [B, 4], expected f32 [B, S, V]");
        assert!(refusal(&KIND, &[ids(&[4, 10]), ids(&[4])]).starts_with("logits is i32"));
        assert_eq!(refusal(&KIND, &[real(&[4, 10])]), "has 1 inputs, expected 2");
    }

    #[test]
    fn a_cross_entropy_costs_by_the_logit() {
        let cost = cost(&KIND, &[real(&[4, 10]), ids(&[4])], 2);
        assert_eq!((cost.fp_flops, cost.bp_flops), (5 * 80, 2 * 80));
        assert_eq!((cost.read_bytes, cost.write_bytes, cost.kept_bytes), (4 * 88, 4, 4 * 88));
    }
}
