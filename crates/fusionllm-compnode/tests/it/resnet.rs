//! ResNets against PyTorch: same weights, same images, same optimizer, with running values as PyTorch moves them.
//!
//! `tests/golden/resnet_train/make.py` made the fixture from PyTorch's own layers.

use std::path::PathBuf;
use std::sync::Arc;

use fusionllm_codec::{HostTensor, Values};
use fusionllm_compnode::{Batches, CompNodeError, NamedTensor, read_shard};
use fusionllm_graph::{OpDag, ResnetBlock, ResnetConfig, ResnetStem, resnet};
use fusionllm_planner::Pipeline;
use safetensors::SafeTensors;

use crate::run::{Outcome, Run, assert_close, job, stages};

const BATCH: usize = 8;
const MICRO_BATCH: usize = 2;
/// Relative difference to PyTorch over 20 steps.
const TOLERANCE: f64 = 1e-4;

/// A model of the fixture.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    name: &'static str,
    size: usize,
    /// Where three CompNodes are cut, in the middle of residual blocks.
    pub(crate) cuts: [&'static str; 2],
}

pub(crate) const BASIC: Case = Case { name: "basic", size: 10, cuts: ["layer1.0.bn1", "layer2.0.conv2"] };
const BOTTLENECK: Case = Case { name: "bottleneck", size: 18, cuts: ["layer1.0.relu1", "layer2.0.bn2"] };

impl Case {
    pub(crate) fn dag(self) -> OpDag {
        let is_basic = self.name == "basic";
        let config = ResnetConfig {
            block: if is_basic { ResnetBlock::Basic } else { ResnetBlock::Bottleneck },
            depths: if is_basic { vec![1, 2] } else { vec![1, 1] },
            widths: if is_basic { vec![6, 8] } else { vec![4, 4] },
            stem: if is_basic { ResnetStem::Cifar } else { ResnetStem::Imagenet },
            image_size: self.size,
            classes: 3,
        };
        resnet(&config).unwrap()
    }

    fn file(self, name: &str) -> Vec<u8> {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/resnet_train");
        std::fs::read(folder.join(self.name).join(name)).unwrap()
    }

    fn series(self, name: &str) -> Vec<f64> {
        let losses: serde_json::Value = serde_json::from_slice(&self.file("losses.json")).unwrap();
        losses[name].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
    }

    pub(crate) fn batches(self) -> Golden {
        let bytes = self.file("images.safetensors");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let pixel = |&byte: &u8| (f32::from(byte) - 128.0) / 64.0;
        let images = file.tensor("images").unwrap().data().iter().map(pixel).collect();
        let labels = file.tensor("labels").unwrap().data().as_chunks().0.iter().map(|&b| i32::from_le_bytes(b));
        Golden { size: self.size, images: Arc::new(images), labels: Arc::new(labels.collect()) }
    }

    /// On one CompNode, or on three with the cuts.
    fn run(self, train: &str, compnodes: usize, pipeline: Pipeline) -> Outcome {
        let mut spec = job(train);
        spec.placement.pipeline = pipeline;
        if compnodes == 3 {
            spec.placement.stages = stages(&[(0, self.cuts[0]), (1, self.cuts[1]), (2, "loss")]);
        }
        let mut run = Run::new(self.dag(), spec, compnodes);
        run.weights = Some(read_shard(&self.file("weights.safetensors")).unwrap());
        run.on(&self.batches())
    }
}

/// The images of a fixture, 20 steps of 8.
#[derive(Clone)]
pub(crate) struct Golden {
    size: usize,
    images: Arc<Vec<f32>>,
    labels: Arc<Vec<i32>>,
}

impl Golden {
    fn rows(&self, step: usize, index: usize) -> Result<(HostTensor, HostTensor), CompNodeError> {
        let first = step * BATCH + index * MICRO_BATCH;
        let image = 3 * self.size * self.size;
        let images = self.images[first * image..(first + MICRO_BATCH) * image].to_vec();
        let labels = self.labels[first..first + MICRO_BATCH].to_vec();
        let images = HostTensor::new(vec![MICRO_BATCH, 3, self.size, self.size], Values::F32(images)).unwrap();
        Ok((images, HostTensor::new(vec![MICRO_BATCH, 1], Values::I32(labels)).unwrap()))
    }
}

impl Batches for Golden {
    fn train(&self, step: u64, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        self.rows(step as usize, index as usize)
    }

    fn eval(&self, index: u32) -> Result<(HostTensor, HostTensor), CompNodeError> {
        self.rows(0, index as usize)
    }
}

const ADAMW: &str = "optimizer = \"adamw\"\nlr = 3e-3\nwarmup = 0\nschedule = \"constant\"\nweight_decay = 0.1";
const SGD: &str =
    "optimizer = \"sgd\"\nlr = 0.05\nwarmup = 0\nschedule = \"constant\"\nmomentum = 0.9\nweight_decay = 0";

fn train(optimizer: &str, clip: f64) -> String {
    format!("steps = 20\nbatch = 8\nmicro_batches = 4\nclip = {clip:?}\neval_batches = 1\n{optimizer}")
}

fn check(case: Case, optimizer: &str, settings: &str) {
    let expected: Vec<NamedTensor> = read_shard(&case.file(&format!("{optimizer}.safetensors"))).unwrap();
    assert!(expected.len() > 10);
    for compnodes in [1, 3] {
        let outcome = case.run(&train(settings, 1.0), compnodes, Pipeline::OneFOneB);
        let what = format!("{} by {optimizer} on {compnodes} CompNodes", case.name);
        assert_close(&what, &outcome.losses(), &case.series(optimizer), TOLERANCE);
        assert_close(&what, &outcome.norms(), &case.series(&format!("{optimizer}_grad_norm")), 10.0 * TOLERANCE);
        let evaluated = case.series(&format!("{optimizer}_eval"));
        assert_close(&what, &outcome.eval_losses(), &evaluated, 10.0 * TOLERANCE);
        let held = outcome.checkpoint(20);
        for tensor in &expected {
            let ours = held.iter().find(|held| held.name == tensor.name).unwrap();
            for (a, b) in ours.values.iter().zip(&tensor.values) {
                assert!((a - b).abs() < 1e-4 * b.abs().max(1.0), "{what}, {}: {a} against {b}", tensor.name);
            }
        }
    }
}

#[test]
fn a_basic_resnet_follows_pytorch_by_adamw() {
    check(BASIC, "adamw", ADAMW);
}

#[test]
fn a_basic_resnet_follows_pytorch_by_sgd() {
    check(BASIC, "sgd", SGD);
}

#[test]
fn a_bottleneck_resnet_follows_pytorch_by_adamw() {
    check(BOTTLENECK, "adamw", ADAMW);
}

#[test]
fn a_bottleneck_resnet_follows_pytorch_by_sgd() {
    check(BOTTLENECK, "sgd", SGD);
}

#[test]
fn every_placement_gives_the_same_bits_of_losses_accuracy_and_running_values() {
    for case in [BASIC, BOTTLENECK] {
        let found = |compnodes, pipeline| {
            let outcome = case.run(&train(SGD, 0.0), compnodes, pipeline);
            let bits = |values: Vec<f64>| values.into_iter().map(f64::to_bits).collect::<Vec<_>>();
            let mut held = outcome.checkpoint(20);
            held.sort_by(|a, b| a.name.cmp(&b.name));
            let reports = outcome.logs.iter().flat_map(|log| &log.reports);
            let accuracy: Vec<f64> = reports.filter_map(|report| report.eval_accuracy).collect();
            assert_eq!(accuracy.len(), 1);
            (bits(outcome.losses()), bits(outcome.eval_losses()), bits(accuracy), held)
        };
        let one = found(1, Pipeline::OneFOneB);
        assert!(one == found(3, Pipeline::OneFOneB), "{}: cut in residual blocks", case.name);
        assert!(one == found(3, Pipeline::GPipe), "{}: by GPipe", case.name);
        assert!(one == found(2, Pipeline::OneFOneB), "{}: on two", case.name);
    }
}
