//! Scores a checkpoint on given tokens: the other half of `benches/peers/check_export.py`.
//!
//!     cargo run --release -p fusionllm --example score -- RUN_DIR TOKENS.safetensors
//!
//! The file holds `inputs` and `labels`, both i32 `[N, S]` with S at most the model's sequence length. Prints the mean
//! cross-entropy in nats per token.
#![expect(clippy::print_stdout, reason = "a program")]

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use fusionllm::broker::open_checkpoint;
use fusionllm::compnode::{DeviceChoice, Generator, open_device, read_shard};
use safetensors::SafeTensors;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let run_dir = arguments.next().context("usage: score RUN_DIR TOKENS.safetensors")?;
    let tokens = arguments.next().context("usage: score RUN_DIR TOKENS.safetensors")?;

    let checkpoint = open_checkpoint(&run_dir)?;
    let names: Vec<String> = checkpoint.dag().params().iter().map(|p| p.name.clone()).collect();
    let weights = tempfile::NamedTempFile::new()?;
    checkpoint.weights_blob(&names, weights.path())?;
    let tensors = read_shard(&std::fs::read(weights.path())?)?;
    let backend = open_device(DeviceChoice::Cpu)?;
    let mut model = Generator::new(Arc::new(checkpoint.dag().clone()), tensors, backend.as_ref())?;

    let bytes = std::fs::read(&tokens)?;
    let file = SafeTensors::deserialize(&bytes)?;
    let (inputs, seq) = rows(&file, "inputs")?;
    let (labels, _) = rows(&file, "labels")?;
    let (mut sum, mut count) = (0.0, 0u32);
    for (ids, targets) in inputs.chunks(seq).zip(labels.chunks(seq)) {
        let (logits, vocab) = model.logits(ids)?;
        for (row, &target) in logits.chunks(vocab).zip(targets) {
            let target = row.get(target as usize).context("a label beyond the vocabulary")?;
            let highest = row.iter().copied().fold(f32::MIN, f32::max);
            let total: f64 = row.iter().map(|&v| f64::from(v - highest).exp()).sum();
            sum += total.ln() - f64::from(target - highest);
            count += 1;
        }
    }
    println!("{{\"loss\": {}}}", sum / f64::from(count));
    Ok(())
}

fn rows(file: &SafeTensors<'_>, name: &str) -> anyhow::Result<(Vec<i32>, usize)> {
    let tensor = file.tensor(name)?;
    let seq = *tensor.shape().get(1).with_context(|| format!("{name} is not [N, S]"))?;
    Ok((tensor.data().as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect(), seq))
}
