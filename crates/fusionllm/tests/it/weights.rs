//! Whole runs from a Hugging Face folder: against transformers, and from weights of other types than f32.
//!
//! `tests/golden/gpt2_folder/make.py` made the folder.

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::golden::{folder_job, golden};
use crate::process::{Bench, json_lines};

/// A bench with the golden folder as `hf`.
fn bench() -> Bench {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("hf")).unwrap();
    for name in ["hf/config.json", "hf/model.safetensors", "text.txt"] {
        std::fs::copy(golden("gpt2_folder", name), bench.path(name)).unwrap();
    }
    // The rate moves nothing, so both losses are the folder's.
    bench.write("job.toml", &folder_job("folder", "", "steps = 1\nlr = 1e-12\neval_every = 1"));
    bench
}

/// Loss of the first step, and of the evaluation.
fn losses(bench: &Bench, out: &str, compnodes: u32) -> [f64; 2] {
    bench.succeed(&format!("train job.toml --out {out} --compnodes {compnodes}"));
    let step = json_lines(&bench.path(out).join("metrics.jsonl")).remove(0);
    ["loss", "eval_loss"].map(|key| step[key].as_f64().unwrap())
}

fn assert_close(got: [f64; 2], expected: [f64; 2]) {
    for (a, b) in got.iter().zip(expected) {
        assert!((a - b).abs() < 1e-5 * b, "{got:?} against {expected:?}");
    }
}

#[test]
fn a_folder_has_the_losses_that_transformers_has_with_it() {
    let bench = bench();
    let text = std::fs::read(golden("gpt2_folder", "losses.json")).unwrap();
    let of: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let expected = ["train", "eval"].map(|key| of[key].as_f64().unwrap());
    assert_close(losses(&bench, "one", 1), expected);
    assert_close(losses(&bench, "two", 2), expected);
}

/// The value nearest towards zero that a type with so many bits of mantissa has too.
fn cut(value: f32, mantissa: u32) -> f32 {
    let cut = f32::from_bits(value.to_bits() & (u32::MAX << (23 - mantissa)));
    // Smaller ones are no normal numbers of f16.
    if cut.abs() < 6.2e-5 { 0.0 } else { cut }
}

/// Bits of a value that f16 has, too.
fn f16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let (sign, exponent, mantissa) = (bits >> 31, (bits >> 23) & 0xff, (bits >> 13) & 0x3ff);
    let exponent = if value == 0.0 { 0 } else { exponent + 15 - 127 };
    ((sign << 15) | (exponent << 10) | mantissa) as u16
}

/// Rewrites the folder's weights, each value as `change` says.
fn rewrite(bench: &Bench, dtype: Dtype, change: impl Fn(f32) -> Vec<u8>) {
    let source = std::fs::read(golden("gpt2_folder", "hf/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&source).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(name, view)| {
            let values = view.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
            (name.to_owned(), view.shape().to_vec(), values.flat_map(&change).collect())
        })
        .collect();
    let views =
        tensors.iter().map(|(name, shape, data)| (name.clone(), TensorView::new(dtype, shape.clone(), data).unwrap()));
    std::fs::write(bench.path("hf/model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn half_precision_weights_are_those_of_f32_that_have_the_same_values() {
    let bench = bench();
    let whole = losses(&bench, "whole", 1);
    type Narrow = fn(f32) -> [u8; 2];
    let bf16: Narrow = |value| ((value.to_bits() >> 16) as u16).to_le_bytes();
    let f16: Narrow = |value| f16_bits(value).to_le_bytes();
    for (name, dtype, mantissa, narrow) in [("bf16", Dtype::BF16, 7, bf16), ("f16", Dtype::F16, 10, f16)] {
        rewrite(&bench, Dtype::F32, |value| cut(value, mantissa).to_le_bytes().to_vec());
        let wide = losses(&bench, &format!("{name}-wide"), 1);
        rewrite(&bench, dtype, |value| narrow(cut(value, mantissa)).to_vec());
        assert_eq!(losses(&bench, name, 1), wide, "{name}");
        assert!((wide[0] - whole[0]).abs() > 1e-6, "{name} has fewer bits: {wide:?} {whole:?}");
        assert!((wide[0] - whole[0]).abs() < 0.05 * whole[0], "{wide:?} {whole:?}");
        // It goes on, and out again, in f32.
        bench.succeed(&format!("train --resume {name} --set train.steps=2"));
        bench.succeed(&format!("export {name} {name}-out"));
        let out = std::fs::read(bench.path(&format!("{name}-out/model.safetensors"))).unwrap();
        assert!(SafeTensors::deserialize(&out).unwrap().iter().all(|(_, view)| view.dtype() == Dtype::F32));
    }
}
