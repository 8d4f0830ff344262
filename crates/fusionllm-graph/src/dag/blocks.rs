//! The blocks of a model, as the names of its ops tell them.

use std::ops::Range;

use super::OpDag;

/// What the names of a block's ops begin with: all up to their first number, of `layers.3.mlp.act` it is `layers.3`.
fn block_of(name: &str) -> Option<&str> {
    let mut end = 0;
    for part in name.split('.') {
        let is_number = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if is_number && end > 0 {
            let end = end + part.len();
            // What is numbered has parts.
            return (end < name.len()).then(|| name.get(..end)).flatten();
        }
        end += part.len() + 1;
    }
    None
}

impl OpDag {
    /// The blocks that the model repeats, as places in the topological order: ops whose names are the same up to their
    /// first number, `h.0.ln_1` and `h.0.attn` for example. Of a transformer they are its layers, of a ResNet its residual
    /// blocks. What lies between two blocks counts to the first of them. Nothing if no names are of that kind, or if the
    /// ops of a block do not follow each other.
    pub fn blocks(&self) -> Vec<Range<usize>> {
        let mut blocks: Vec<(&str, Range<usize>)> = Vec::new();
        for (at, op) in self.ops().iter().enumerate() {
            let Some(block) = block_of(&op.name) else { continue };
            let goes_on = blocks.last().is_some_and(|(last, _)| *last == block);
            if !goes_on && blocks.iter().any(|(known, _)| *known == block) {
                return Vec::new();
            }
            if let Some((_, last)) = blocks.last_mut() {
                last.end = if goes_on { at + 1 } else { at };
            }
            if !goes_on {
                blocks.push((block, at..at + 1));
            }
        }
        blocks.into_iter().map(|(_, range)| range).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gpt2Config, ResnetConfig, gpt2, resnet};

    /// Names of the first and last op of each block.
    fn ends(dag: &OpDag) -> Vec<(&str, &str)> {
        let name = |at: usize| dag.ops()[at].name.as_str();
        dag.blocks().into_iter().map(|block| (name(block.start), name(block.end - 1))).collect()
    }

    #[test]
    fn a_name_says_its_block() {
        for (name, block) in [
            ("h.0.attn", Some("h.0")),
            ("layers.12.self_attn.q_proj.lora_A", Some("layers.12")),
            ("layer1.0.downsample.0", Some("layer1.0")),
            ("ln_f", None),
            ("embd.drop", None),
            ("0.weight", None),
            ("conv.0", None),
        ] {
            assert_eq!(block_of(name), block, "{name}");
        }
    }

    #[test]
    fn blocks_are_layers_and_residual_blocks() {
        let config = Gpt2Config { n_layer: 3, n_embd: 16, n_head: 2, ..Gpt2Config::named("gpt2").unwrap() };
        let gpt2 = gpt2(&config, 8).unwrap();
        let ends_of = ends(&gpt2);
        assert_eq!(ends_of, [("h.0.ln_1", "h.0.add_2"), ("h.1.ln_1", "h.1.add_2"), ("h.2.ln_1", "h.2.add_2")]);
        let after = gpt2.blocks()[2].end;
        assert_eq!(gpt2.ops()[after].name, "ln_f");
        let resnet = resnet(&ResnetConfig::named("resnet18").unwrap()).unwrap();
        assert_eq!(resnet.blocks().len(), 8);
        assert!(resnet.ops()[resnet.blocks()[0].start].name.starts_with("layer1.0."));
    }
}
