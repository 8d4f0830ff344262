//! Attention core with fewer heads of keys and values than of queries (Ainslie et al., arXiv 2305.13245).

use crate::cost::Cost;
use crate::error::Misfit;
use crate::ops::attention;
use crate::rule::{Io, Rule, positive, three, wrong_attribute, wrong_role};
use crate::shape::TensorType;

pub(crate) struct GroupedAttention {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
}

impl Rule for GroupedAttention {
    fn family(&self) -> &'static str {
        "grouped_attention"
    }

    fn variant(&self) -> Option<String> {
        Some(format!("{}-heads-{}-kv", self.heads, self.kv_heads))
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        let Self { heads, kv_heads } = *self;
        positive("heads", heads)?;
        positive("kv_heads", kv_heads)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(wrong_attribute("kv_heads", kv_heads, format!("a divisor of the {heads} heads")));
        }
        let (query, key, value) = three(inputs)?;
        let Some((_, width)) = attention::sequence(query).filter(|(_, width)| width.is_multiple_of(heads)) else {
            return Err(wrong_role("query", query, format!("f32 [B, S, a multiple of {heads}]")));
        };
        let expected = TensorType::f32(query.shape.with_last(width / heads * kv_heads));
        for (role, input) in [("key", key), ("value", value)] {
            if *input != expected {
                return Err(wrong_role(role, input, expected.to_string()));
            }
        }
        Ok(query.clone())
    }

    /// As the core over packed projections: the number of heads of keys and values changes neither products nor scores.
    fn cost(&self, io: &Io<'_>) -> Cost {
        attention::core_cost(self.heads, io)
    }

    fn fused_kept_bytes(&self, io: &Io<'_>) -> Option<u64> {
        Some(attention::core_kept_bytes(self.heads, io))
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, ids, infer, real, refusal};

    const KIND: OpKind = OpKind::GroupedAttention { heads: 4, kv_heads: 2, causal: true };

    #[test]
    fn grouped_attention_has_the_shape_of_its_queries() {
        let inputs = [real(&[5, 24]), real(&[5, 12]), real(&[5, 12])];
        assert_eq!(infer(&KIND, &inputs).unwrap(), real(&[5, 24]));
    }

    #[test]
    fn grouped_attention_refuses_what_does_not_fit_by_role() {
        let with = |query, key, value| refusal(&KIND, &[query, key, value]);
        let (query, narrow) = (real(&[5, 24]), real(&[5, 12]));
        assert_eq!(
            with(query.clone(), real(&[5, 24]), narrow.clone()),
            "key is f32 [B, 5, 24], expected f32 [B, 5, 12]"
        );
        assert_eq!(with(query, narrow.clone(), ids(&[5, 12])), "value is i32 [B, 5, 12], expected f32 [B, 5, 12]");
        assert!(with(real(&[5, 23]), narrow.clone(), narrow).starts_with("query is f32 [B, 5, 23]"));
        assert_eq!(refusal(&KIND, &[real(&[5, 24])]), "has 1 inputs, expected 3");
        let uneven = OpKind::GroupedAttention { heads: 4, kv_heads: 3, causal: true };
        assert_eq!(refusal(&uneven, &[]), "kv_heads is 3, expected a divisor of the 4 heads");
    }

    #[test]
    fn grouped_attention_costs_what_the_packed_core_does_but_for_the_narrow_inputs() {
        let grouped = cost(&KIND, &[real(&[5, 24]), real(&[5, 12]), real(&[5, 12])], 2);
        let packed = cost(&OpKind::Attention { heads: 4, causal: true }, &[real(&[5, 72])], 2);
        assert_eq!((grouped.fp_flops, grouped.bp_flops), (packed.fp_flops, packed.bp_flops));
        assert_eq!(packed.kept_bytes - grouped.kept_bytes, 2 * 5 * 24 * 4);
    }
}
