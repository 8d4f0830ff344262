//! What the tests of several modules plan.

use fusionllm_codec::Codec;
use fusionllm_graph::{Gpt2Config, OpDag, OpId, gpt2};

use crate::{EdgeId, GroupId, NodeIndex, Stage, StageEdge, StageId};

/// A GPT-2 of width 16 for sequences of 8 tokens.
pub(crate) fn small_gpt2(n_layer: usize) -> OpDag {
    let config = Gpt2Config {
        vocab_size: 64,
        n_positions: 16,
        n_embd: 16,
        n_layer,
        n_head: 2,
        layer_norm_epsilon: 1e-5,
        dropout: 0.0,
    };
    gpt2(&config, 8).unwrap()
}

/// A chain of stages on the given CompNodes; each edge carries a gradient.
pub(crate) fn chain(compnodes: &[u32]) -> (Vec<Stage>, Vec<StageEdge>) {
    let stage = |(i, &node): (usize, &u32)| Stage {
        id: StageId(i as u32),
        group: GroupId::FIRST,
        compnode: NodeIndex(node),
        ops: vec![OpId(i as u32)],
    };
    let edge = |i: usize| StageEdge {
        elements: 1,
        id: EdgeId(i as u32),
        op: OpId(i as u32),
        from: StageId(i as u32),
        to: StageId(i as u32 + 1),
        gradient: true,
        activation_codec: Codec::Dense,
        gradient_codec: Codec::Dense,
    };
    (compnodes.iter().enumerate().map(stage).collect(), (1..compnodes.len()).map(|i| edge(i - 1)).collect())
}
