//! The one-process run against PyTorch: same weights, same tokens, same optimizer.
//!
//! `tests/golden/gpt2_train/make.py` made the fixture with Hugging Face's GPT2LMHeadModel.

use std::path::PathBuf;
use std::sync::Arc;

use fusionllm_codec::{HostTensor, Values};
use fusionllm_compnode::{Batches, CompNodeError, DeviceChoice, Generator, NamedTensor, open_device, read_shard};
use safetensors::SafeTensors;

use crate::run::{Run, SEQ, VOCAB, assert_close, job, small_gpt2};

const BATCH: usize = 8;
const MICRO_BATCH: usize = 2;
/// Relative difference to PyTorch over 20 steps.
const TOLERANCE: f64 = 1e-4;

fn fixture(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/gpt2_train");
    std::fs::read(folder.join(name)).unwrap()
}

fn weights() -> Vec<NamedTensor> {
    read_shard(&fixture("weights.safetensors")).unwrap()
}

fn integers(file: &SafeTensors<'_>, name: &str) -> Vec<i32> {
    file.tensor(name).unwrap().data().as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect()
}

fn series(name: &str) -> Vec<f64> {
    let losses: serde_json::Value = serde_json::from_slice(&fixture("losses.json")).unwrap();
    losses[name].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// The fixture's tokens, `[20, 8, 16]`.
#[derive(Clone)]
struct Golden {
    inputs: Arc<Vec<i32>>,
    labels: Arc<Vec<i32>>,
}

impl Golden {
    fn read() -> Self {
        let bytes = fixture("tokens.safetensors");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        Self { inputs: Arc::new(integers(&file, "inputs")), labels: Arc::new(integers(&file, "labels")) }
    }

    fn rows(&self, step: usize, index: usize) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let start = (step * BATCH + index * MICRO_BATCH) * SEQ;
        let cut = |all: &[i32]| {
            let values = Values::I32(all[start..start + MICRO_BATCH * SEQ].to_vec());
            HostTensor::new(vec![MICRO_BATCH, SEQ], values).unwrap()
        };
        Ok((cut(&self.inputs), cut(&self.labels)))
    }
}

impl Batches for Golden {
    fn train(&self, step: u64, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        self.rows(step as usize, index as usize)
    }

    fn eval(&self, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        self.rows(0, index as usize % 4)
    }
}

fn check(optimizer: &str, train: &str) {
    let train = format!("steps = 20\nbatch = 8\nmicro_batches = 4\nclip = 1.0\neval_batches = 1\n{train}");
    for compnodes in [1, 3] {
        let mut run = Run::new(small_gpt2(0.0), job(&train), compnodes);
        run.weights = Some(weights());
        let outcome = run.on(&Golden::read());
        let what = format!("{optimizer} on {compnodes} CompNodes");
        assert_close(&what, &outcome.losses(), &series(optimizer), TOLERANCE);
        assert_close(&what, &outcome.norms(), &series(&format!("{optimizer}_grad_norm")), 10.0 * TOLERANCE);
    }
}

#[test]
fn adamw_with_warm_up_cosine_and_clipping_follows_pytorch() {
    check("adamw", "optimizer = \"adamw\"\nlr = 1e-2\nwarmup = 5\nschedule = \"cosine\"\nweight_decay = 0.1");
}

#[test]
fn sgd_with_momentum_follows_pytorch() {
    check(
        "sgd",
        "optimizer = \"sgd\"\nlr = 0.1\nwarmup = 0\nschedule = \"constant\"\nmomentum = 0.9\nweight_decay = 0",
    );
}

#[test]
fn logits_are_those_of_transformers() {
    let bytes = fixture("logits.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let expected: Vec<f32> =
        file.tensor("logits").unwrap().data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let backend = open_device(DeviceChoice::Cpu).unwrap();
    let mut generator = Generator::new(Arc::new(small_gpt2(0.0)), weights(), backend.as_ref()).unwrap();
    let golden = Golden::read();
    for row in 0..2 {
        let (got, vocab) = generator.logits(&golden.inputs[row * SEQ..(row + 1) * SEQ]).unwrap();
        assert_eq!(vocab, VOCAB);
        let expected = &expected[row * SEQ * VOCAB..(row + 1) * SEQ * VOCAB];
        for (a, b) in got.iter().zip(expected) {
            assert!((a - b).abs() < 1e-5, "{a} against {b}");
        }
    }
}
