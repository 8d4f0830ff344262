//! What the ops of an OP-DAG cost, one by one and together.

use crate::cost::{Cost, Kernels};
use crate::param::Param;

use super::{OpDag, OpId};

impl OpDag {
    /// The cost of one micro-batch of `batch` rows through `op`. An op with no trained parameter at or before it has no
    /// BP: its `bp_flops` and `kept_bytes` are 0. Summing the gradients of several consumers is not counted.
    ///
    /// # Panics
    /// If `op` is not of this OP-DAG.
    pub fn cost(&self, op: OpId, batch: usize) -> Cost {
        let node = self.op(op);
        let inputs: Vec<_> = node.inputs.iter().map(|&input| &self.op(input).output).collect();
        let cost = self.frozen_cost(op, batch).unwrap_or_else(|| node.kind.cost(&inputs, &node.output, batch));
        if self.carries_gradient(op) { cost } else { Cost { bp_flops: 0, kept_bytes: 0, ..cost } }
    }

    /// What an op costs whose parameters are not trained, if that is less than otherwise.
    pub(super) fn frozen_cost(&self, op: OpId, batch: usize) -> Option<Cost> {
        let node = self.op(op);
        let inputs: Vec<_> = node.inputs.iter().map(|&input| &self.op(input).output).collect();
        node.kind.frozen_cost(&inputs, &node.output, batch).filter(|_| self.is_frozen(op))
    }

    /// Bytes that these kernels keep between FP and BP of one micro-batch of `batch` rows through `op`; with
    /// [`Kernels::Plain`] the `kept_bytes` of [`OpDag::cost`].
    ///
    /// # Panics
    /// If `op` is not of this OP-DAG.
    pub fn kept_bytes(&self, op: OpId, batch: usize, kernels: Kernels) -> u64 {
        if !self.carries_gradient(op) {
            return 0;
        }
        let node = self.op(op);
        let inputs: Vec<_> = node.inputs.iter().map(|&input| &self.op(input).output).collect();
        if let Some(cost) = self.frozen_cost(op, batch) {
            return cost.kept_bytes;
        }
        node.kind.kept_bytes(&inputs, &node.output, batch, kernels)
    }

    /// The sum of [`OpDag::cost`] over all ops.
    pub fn total_cost(&self, batch: usize) -> Cost {
        self.op_ids().map(|op| self.cost(op, batch)).sum()
    }

    /// Bytes of all parameters as f32, a tied one once.
    pub fn param_bytes(&self) -> u64 {
        self.params().iter().map(Param::bytes).fold(0, u64::saturating_add)
    }

    /// Bytes of the parameters that are trained, as f32, a tied one once.
    pub fn trained_bytes(&self) -> u64 {
        self.params().iter().filter(|param| !param.frozen).map(Param::bytes).fold(0, u64::saturating_add)
    }

    /// Elements of the parameters that are trained, a tied one once.
    pub fn trained_elements(&self) -> u64 {
        self.params().iter().filter(|param| !param.frozen).map(Param::elements).fold(0, u64::saturating_add)
    }

    /// Elements of all parameters but those that FP makes, a tied one once.
    pub fn param_elements(&self) -> u64 {
        let made = self.param_ids().filter(|&param| !self.is_running(param));
        made.map(|param| self.param(param).elements()).fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use crate::{Gpt2Config, gpt2};

    use super::*;

    #[test]
    fn gpt2_costs_about_six_flops_per_parameter_and_token() {
        let config = Gpt2Config::named("gpt2").unwrap();
        let dag = gpt2(&config, 128).unwrap();
        let cost = dag.total_cost(2);
        // The position table does no matrix product; attention and elementwise ops add a little.
        let by_rule = 6 * (dag.param_elements() - 1024 * 768) * 2 * 128;
        let ratio = (cost.fp_flops + cost.bp_flops) as f64 / by_rule as f64;
        assert!((1.0..1.05).contains(&ratio), "{ratio}");
        assert_eq!(dag.total_cost(4).fp_flops, 2 * cost.fp_flops);
        assert_eq!(dag.param_bytes(), 4 * 124_439_808);
    }

    #[test]
    fn fused_attention_keeps_no_square_of_the_sequence() {
        let kept = |seq: usize, kernels| {
            let dag = gpt2(&Gpt2Config::named("gpt2").unwrap(), seq).unwrap();
            dag.kept_bytes(dag.find("h.0.attn").unwrap(), 2, kernels)
        };
        let (batch, width, heads) = (2, 768, 12);
        for seq in [128, 1024] {
            let ours = 4 * batch * (3 * width + width + heads) * seq;
            assert_eq!(kept(seq as usize, Kernels::Fused), ours);
            let plain = 4 * batch * (3 * width * seq + heads * seq * seq);
            assert_eq!(kept(seq as usize, Kernels::Plain), plain);
        }
        let dag = gpt2(&Gpt2Config::named("gpt2").unwrap(), 128).unwrap();
        for op in dag.op_ids() {
            assert_eq!(dag.kept_bytes(op, 2, Kernels::Plain), dag.cost(op, 2).kept_bytes, "{}", dag.op(op).name);
        }
        assert_eq!(dag.kept_bytes(dag.input().unwrap(), 2, Kernels::Fused), 0);
    }

    #[test]
    fn ops_of_the_same_work_have_the_same_name_for_it() {
        let dag = gpt2(&Gpt2Config::named("gpt2").unwrap(), 8).unwrap();
        let work = |name: &str| dag.work(dag.find(name).unwrap(), 2);
        assert_eq!(work("h.0.attn.c_attn"), "linear in-out 2x8x768 > 2x8x2304");
        assert_eq!(work("h.0.attn.c_attn"), work("h.11.attn.c_attn"));
        assert_eq!(work("h.0.add_1"), "add 2x8x768 2x8x768 > 2x8x768");
        let works: std::collections::BTreeSet<String> = dag.op_ids().map(|op| dag.work(op, 2)).collect();
        assert!(works.len() < 20, "{works:?}");
    }

    #[test]
    fn placeholders_cost_nothing_to_go_back_over() {
        let dag = gpt2(&Gpt2Config::named("gpt2").unwrap(), 8).unwrap();
        let input = dag.cost(dag.input().unwrap(), 1);
        assert_eq!((input.fp_flops, input.bp_flops, input.kept_bytes), (0, 0, 0));
    }
}
