//! Decoders with rotary positions and grouped attention, against the CPU's.

use std::sync::Arc;

use fusionllm_graph::{DecoderConfig, Lora, OpDag, OpId, OpKind, RotaryScaling, decoder};
use fusionllm_protocol::Precision;

use super::{Outcome, SEQ, Trial, VOCAB, a_real_gpu, assert_close, executor};
use crate::cuda::angles::Angles;
use crate::cuda::emulated::{self, Emulated};

/// Two blocks as Qwen3's, which has norms of heads too, with everything else that a family may have: biases, scaled
/// angles, three heads of queries for each head of keys.
fn model(head_dim: usize) -> Arc<OpDag> {
    let config = DecoderConfig {
        vocab_size: VOCAB,
        hidden_size: 48,
        intermediate_size: 72,
        num_hidden_layers: 2,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim,
        max_position_embeddings: 32,
        rope_scaling: RotaryScaling::Linear { factor: 2.0 },
        query_bias: true,
        output_bias: true,
        mlp_bias: true,
        initializer_range: 0.2,
        ..DecoderConfig::named("qwen3-0.6b").unwrap()
    };
    Arc::new(decoder(&config, SEQ).unwrap())
}

#[test]
fn decoders_in_f32_train_as_on_the_cpu() {
    if emulated::is_left_out() {
        return;
    }
    // Heads of 64 have flash attention; those of 10 also have no rows of whole 16 bytes.
    for head_dim in [10, 16, 64] {
        let trial = Trial::new(&model(head_dim));
        assert_close(&trial.on_gpu(2), &trial.on_cpu(2), 2e-5);
    }
}

#[test]
fn decoders_in_bf16_train_nearly_as_on_the_cpu() {
    if emulated::is_left_out() {
        return;
    }
    for head_dim in [24, 32, 128] {
        let trial = Trial { precision: Precision::Bf16, ..Trial::new(&model(head_dim)) };
        let (got, expected) = (trial.on_gpu(2), trial.on_cpu(2));
        for (a, b) in got.losses.iter().zip(&expected.losses) {
            assert!((a - b).abs() < 2e-2 * b, "heads of {head_dim}: {got:?}");
        }
        for (a, b) in got.norms.iter().zip(&expected.norms) {
            assert!((a - b).abs() < 3e-2 * b, "heads of {head_dim}: {a} against {b}");
        }
    }
}

#[test]
fn any_cut_of_a_decoder_gives_the_same_bits() {
    if emulated::is_left_out() {
        return;
    }
    let gpu = Emulated::open();
    let cuts: [&[(&str, usize)]; 4] = [
        &[("layers.0.add_2", 0), ("loss", 1)],
        &[("layers.0.self_attn.q_rotary", 0), ("loss", 0)],
        &[("layers.1.self_attn", 0), ("layers.1.mlp.act", 1), ("loss", 0)],
        &[("layers.0.input_layernorm", 0), ("layers.0.post_attention_layernorm", 0), ("loss", 1)],
    ];
    for (precision, head_dim) in [(Precision::F32, 10), (Precision::Bf16, 32)] {
        let dag = model(head_dim);
        let trial = || Trial { precision, ..Trial::new(&dag) };
        let whole = trial().run(2, &|spec| executor(spec, &gpu));
        for list in cuts {
            for defers in [false, true] {
                let cut = Trial { defers, ..trial().cut(list) }.run(2, &|spec| executor(spec, &gpu));
                assert_eq!(cut.losses, whole.losses, "{precision:?}, {list:?}, defers {defers}");
                assert!(cut.tensors == whole.tensors, "{precision:?}, {list:?}, defers {defers}");
            }
        }
    }
}

/// A model with adapters of a rank that no vector of a kernel divides.
fn adapted(base: &OpDag, dropout: f64, targets: &[&str]) -> Arc<OpDag> {
    let targets = targets.iter().map(|&target| target.to_owned()).collect();
    Arc::new(base.with_lora(&Lora { rank: 3, scaling: 0.7, dropout, targets }).unwrap())
}

/// Asserts that only adapters have changed since the first values, and have optimizer state.
fn assert_frozen(trial: &Trial, after: &Outcome) {
    let before = trial.on_gpu(0);
    for (name, tensor) in &after.tensors {
        match trial.dag.find_param(name).map(|param| trial.dag.param(param).frozen) {
            Some(frozen) => assert_eq!(before.tensors[name].values == tensor.values, frozen, "{name}"),
            None => assert!(name.contains(".lora_"), "{name}"),
        }
    }
}

#[test]
fn adapters_in_f32_train_as_on_the_cpu_and_all_else_stays() {
    if emulated::is_left_out() {
        return;
    }
    let gpt2 = super::model(16, 0.1);
    let second = ["layers.1.self_attn.v_proj", "layers.1.mlp.down_proj"];
    for dag in [
        adapted(&model(10), 0.0, &["all-linear"]),
        adapted(&model(64), 0.0, &second),
        adapted(&model(16), 0.3, &["q_proj", "v_proj"]),
        adapted(&gpt2, 0.0, &["c_attn"]),
        adapted(&gpt2, 0.2, &["c_proj"]),
    ] {
        let trial = Trial::new(&dag);
        let got = trial.on_gpu(3);
        assert_close(&got, &trial.on_cpu(3), 2e-5);
        assert_frozen(&trial, &got);
    }
}

#[test]
fn adapters_in_bf16_train_nearly_as_on_the_cpu() {
    if emulated::is_left_out() {
        return;
    }
    let trial = Trial { precision: Precision::Bf16, ..Trial::new(&adapted(&model(32), 0.0, &["all-linear"])) };
    let (got, expected) = (trial.on_gpu(3), trial.on_cpu(3));
    for (a, b) in got.losses.iter().zip(&expected.losses) {
        assert!((a - b).abs() < 2e-2 * b, "{got:?}");
    }
    assert_frozen(&trial, &got);
}

#[test]
fn any_cut_of_a_model_with_adapters_gives_the_same_bits() {
    if emulated::is_left_out() {
        return;
    }
    let gpu = Emulated::open();
    // The first stage of the last one has nothing to train.
    /// Targets of adapters, and where the graph is cut.
    type Cut = (&'static [&'static str], &'static [(&'static str, usize)]);
    let cuts: [Cut; 3] = [
        (&["all-linear"], &[("layers.0.self_attn.q_proj.lora_scale", 0), ("layers.1.mlp.act", 1), ("loss", 0)]),
        (&["k_proj", "up_proj"], &[("layers.0.add_2", 0), ("loss", 1)]),
        (&["layers.1.self_attn.q_proj"], &[("layers.0.add_1", 0), ("layers.1.self_attn.k_proj", 1), ("loss", 0)]),
    ];
    for (targets, list) in cuts {
        let dag = adapted(&model(16), 0.1, targets);
        let whole = Trial::new(&dag).run(3, &|spec| executor(spec, &gpu));
        for defers in [false, true] {
            let cut = Trial { defers, ..Trial::new(&dag).cut(list) }.run(3, &|spec| executor(spec, &gpu));
            assert_eq!(cut.losses, whole.losses, "{list:?}, defers {defers}");
            assert!(cut.tensors == whole.tensors, "{list:?}, defers {defers}");
        }
    }
}

#[test]
fn equal_angles_are_kept_once() {
    let dag = model(16);
    let gpu = Emulated::open();
    let angles = Angles::new(&gpu, &dag, dag.op_ids()).unwrap();
    let rotary = |op: &OpId| matches!(dag.op(*op).kind, OpKind::Rotary { .. });
    let addresses: Vec<u64> = dag.op_ids().filter(rotary).map(|op| angles.address(op)).collect();
    assert_eq!(addresses.len(), 4);
    assert!(addresses.iter().all(|&address| address == addresses[0] && address != 0));
}

/// Only where there is a GPU; `benches/gpu` runs it there.
#[test]
fn a_real_gpu_trains_decoders_as_the_cpu_does() {
    let Some(gpu) = a_real_gpu() else { return };
    for (precision, head_dim, relative) in [
        (Precision::F32, 10, 2e-5),
        (Precision::F32, 64, 2e-5),
        (Precision::F32, 128, 2e-5),
        (Precision::Tf32, 128, 4e-3),
        (Precision::Bf16, 24, 2e-2),
        (Precision::Bf16, 64, 2e-2),
        (Precision::Bf16, 128, 2e-2),
    ] {
        let trial = Trial { precision, ..Trial::new(&model(head_dim)) };
        let got = trial.run(3, &|spec| executor(spec, &gpu));
        let expected = trial.on_cpu(3);
        for (step, (a, b)) in got.losses.iter().zip(&expected.losses).enumerate() {
            assert!((a - b).abs() <= relative * b, "{precision:?}, heads of {head_dim}, step {step}: {a} against {b}");
        }
        let (a, b) = (got.norms[0], expected.norms[0]);
        assert!((a - b).abs() <= 2.0 * relative * b, "{precision:?}, heads of {head_dim}: norm {a} against {b}");
    }
}
