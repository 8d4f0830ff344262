//! Attention core: scaled dot product over packed query, key and value.

use crate::cost::Cost;
use crate::dtype::DType;
use crate::error::Misfit;
use crate::rule::{Io, Rule, one, positive, product, wrong_attribute, wrong_input};
use crate::shape::{Dim, TensorType};

/// Scale, row maximum, subtract, exponential, row sum, divide.
const SOFTMAX_FP_FLOPS_PER_SCORE: u64 = 6;
/// Product with the gradient, row sum, subtract, product with the probability, scale.
const SOFTMAX_BP_FLOPS_PER_SCORE: u64 = 5;

pub(crate) struct Attention {
    pub(crate) heads: usize,
}

impl Rule for Attention {
    fn family(&self) -> &'static str {
        "attention"
    }

    fn variant(&self) -> Option<String> {
        Some(format!("{}-heads", self.heads))
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        positive("heads", self.heads)?;
        let input = one(inputs)?;
        let Some((_, packed)) = sequence(input).filter(|(_, packed)| packed.is_multiple_of(3)) else {
            return Err(wrong_input(input, "f32 [B, S, 3D]"));
        };
        let width = packed / 3;
        if !width.is_multiple_of(self.heads) {
            return Err(wrong_attribute("heads", self.heads, format!("a divisor of the width {width}")));
        }
        Ok(TensorType::f32(input.shape.with_last(width)))
    }

    fn cost(&self, io: &Io<'_>) -> Cost {
        core_cost(self.heads, io)
    }

    fn fused_kept_bytes(&self, io: &Io<'_>) -> Option<u64> {
        Some(core_kept_bytes(self.heads, io))
    }
}

/// S and the last dimension of an f32 [B, S, ..].
pub(super) fn sequence(input: &TensorType) -> Option<(usize, usize)> {
    match *input.shape.dims() {
        [_, Dim::Fixed(seq_len), Dim::Fixed(last)] if input.dtype == DType::F32 => Some((seq_len, last)),
        _ => None,
    }
}

/// S of the output.
fn seq_len(io: &Io<'_>) -> u64 {
    io.output.shape.dims().get(1).map_or(0, |dim| dim.resolve(io.batch)) as u64
}

/// FP is two products of 2 * B * S * S * D and a softmax over B * H * S * S scores; BP is four such products and
/// the softmax's gradient. A causal core is counted in full, S * S, as plain kernels compute it.
/// Scores and probabilities are written and read once each; the inputs and the probabilities are kept, by plain kernels.
pub(super) fn core_cost(heads: usize, io: &Io<'_>) -> Cost {
    let seq_len = seq_len(io);
    let scores = product(&[io.batch as u64, heads as u64, seq_len, seq_len]);
    let score_bytes = scores.saturating_mul(DType::F32.bytes() as u64);
    let one_product = product(&[2, io.output_elements(), seq_len]);
    let flops =
        |products: u64, per_score: u64| product(&[products, one_product]).saturating_add(product(&[scores, per_score]));
    let between_bytes = score_bytes.saturating_mul(2);
    Cost {
        fp_flops: flops(2, SOFTMAX_FP_FLOPS_PER_SCORE),
        bp_flops: flops(4, SOFTMAX_BP_FLOPS_PER_SCORE),
        read_bytes: io.input_bytes().saturating_add(between_bytes),
        write_bytes: io.output_bytes().saturating_add(between_bytes),
        kept_bytes: io.input_bytes().saturating_add(score_bytes),
    }
}

/// Inputs, output, and a logarithm for each row of scores, from which BP makes the probabilities again.
pub(super) fn core_kept_bytes(heads: usize, io: &Io<'_>) -> u64 {
    let log_sums = product(&[io.batch as u64, heads as u64, seq_len(io), DType::F32.bytes() as u64]);
    io.input_bytes().saturating_add(io.output_bytes()).saturating_add(log_sums)
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, ids, infer, real, refusal};

    const KIND: OpKind = OpKind::Attention { heads: 2, causal: true };

    #[test]
    fn attention_unpacks_to_a_third_of_the_width() {
        assert_eq!(infer(&KIND, &[real(&[4, 18])]).unwrap(), real(&[4, 6]));
    }

    #[test]
    fn attention_refuses_what_it_cannot_split() {
        assert_eq!(refusal(&KIND, &[real(&[4, 17])]), "input is f32 [B, 4, 17], expected f32 [B, S, 3D]");
        assert_eq!(refusal(&KIND, &[real(&[4, 15])]), "heads is 2, expected a divisor of the width 5");
        assert!(infer(&KIND, &[real(&[18])]).is_err());
        assert!(infer(&KIND, &[ids(&[4, 18])]).is_err());
        assert!(refusal(&OpKind::Attention { heads: 0, causal: true }, &[real(&[4, 18])]).starts_with("heads is 0"));
    }

    #[test]
    fn attention_costs_the_full_square_of_the_sequence() {
        let full = OpKind::Attention { heads: 2, causal: false };
        let cost_of = |kind| cost(kind, &[real(&[4, 18])], 3);
        let scores = 3 * 2 * 4 * 4;
        let one_product = 2 * 3 * 4 * 4 * 6;
        let causal = cost_of(&KIND);
        assert_eq!(causal.fp_flops, 2 * one_product + 6 * scores);
        assert_eq!(causal.bp_flops, 4 * one_product + 5 * scores);
        assert_eq!(causal.read_bytes, 4 * (3 * 4 * 18 + 2 * scores));
        assert_eq!(causal.write_bytes, 4 * (3 * 4 * 6 + 2 * scores));
        assert_eq!(causal.kept_bytes, 4 * (3 * 4 * 18 + scores));
        assert_eq!(cost_of(&full), causal);
    }
}
