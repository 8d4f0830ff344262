//! What several unit tests need.

use std::path::{Path, PathBuf};

use fusionllm_graph::Kernels;
use fusionllm_planner::Cluster;
use fusionllm_protocol::{CpuShare, DeviceProfile, Generation, JobId, JobSpec, LinkBytes, RunId, RunKey, StepMetrics};
use safetensors::tensor::{Dtype, TensorView};

use crate::core::OpenRun;
use crate::run_dir::{PlacementFile, RunFile, RunStart};

#[path = "../../../tests/copy.rs"]
mod copy;
use copy::copy_fixture;

#[path = "../../../tests/histories.rs"]
mod histories;
pub(crate) use histories::{all_hold, each_is_one};

/// A CPU of one thread on a machine of this name.
pub(crate) fn profile(host: &str) -> DeviceProfile {
    DeviceProfile {
        flop_per_s: 1e10,
        memory_bytes_per_s: 1e10,
        memory_bytes: None,
        host: host.to_owned(),
        cpu: Some(CpuShare { lanes: 1.0, threads: 1 }),
        kernels: Kernels::Plain,
    }
}

/// A tiny GPT-2 on CompNodes as many as there are, with `section.key=value` overrides.
pub(crate) fn spec(overrides: &[&str]) -> JobSpec {
    let text = "
        [model]\nname = \"gpt2\"\nn_embd = 8\nn_layer = 1\nn_head = 2
        [data]\npath = \"/text\"\nseq_len = 8
        [train]\nsteps = 6\nbatch = 4\nmicro_batches = 2\neval_batches = 1
        [placement]\nstrategy = \"equal-compute\"
        [checkpoint]\nevery = 3
    ";
    let overrides: Vec<String> = overrides.iter().map(|&o| o.to_owned()).collect();
    let spec = JobSpec::from_toml(text, &overrides).unwrap();
    spec.validate().unwrap();
    spec
}

/// The placement of a job on one CompNode, and its graph.
pub(crate) fn placed(spec: &JobSpec, generation: u32) -> (PlacementFile, String) {
    let dag = crate::model::load_model(spec).unwrap().dag;
    let plan = fusionllm_planner::plan(&dag, &Cluster::uniform(1), &spec.plan_spec()).unwrap();
    let file = PlacementFile::of(&plan.placement, &dag, Generation(generation), plan.prediction);
    (file, dag.to_json())
}

/// A run that begins in `run_dir`, of a job on one CompNode.
pub(crate) fn open_run(run_dir: &Path) -> OpenRun {
    let spec = spec(&[]);
    let (placement, graph) = placed(&spec, 1);
    OpenRun {
        key: RunKey { job: JobId(1), generation: Generation(1) },
        run_dir: run_dir.to_owned(),
        run: RunStart::new(),
        spec,
        graph,
        placement,
        hashes: Vec::new(),
        predicted: None,
        start_step: 0,
        goes_on: false,
        takes_back: false,
    }
}

/// `run.json` of a run that has begun in `dir`, and has no checkpoint yet.
pub(crate) fn run_file(dir: &Path) -> RunFile {
    RunFile {
        run: RunId::from_bytes([1; 16]),
        name: "run".to_owned(),
        dir: dir.to_owned(),
        copy_of: Vec::new(),
        from: None,
        checkpoints: None,
        unnamed_up_to: None,
        manifests: Default::default(),
    }
}

pub(crate) fn metrics(step: u64, loss: f64) -> StepMetrics {
    let link = LinkBytes {
        from: "a".to_owned(),
        to: "b".to_owned(),
        bytes: 100 * step,
        dense_bytes: 200 * step,
        codec: "bf16".to_owned(),
        error: None,
    };
    StepMetrics {
        step,
        loss,
        tokens: 32,
        step_s: 0.5 * step as f64,
        lr: 1e-3,
        grad_norm: Some(1.0),
        eval_loss: step.is_multiple_of(3).then_some(loss),
        eval_accuracy: None,
        links: vec![link],
        codec_changes: Vec::new(),
        recoveries: Vec::new(),
        unix_s: None,
        starts: false,
    }
}

/// Bytes that are a function of the name. A head that is stored beside a GPT-2's embedding is the same table.
pub(crate) fn tensor_bytes(name: &str, shape: &[usize]) -> Vec<u8> {
    let bare = name.trim_start_matches("transformer.");
    let name = if bare == "lm_head.weight" { "wte.weight" } else { bare };
    let count: usize = shape.iter().product();
    let first = name.bytes().fold(0u32, |sum, b| sum.wrapping_mul(31).wrapping_add(b.into())) % 1000;
    (0..count).flat_map(|i| ((i as f32) + first as f32).to_le_bytes()).collect()
}

/// A safetensors file of F32 tensors.
pub(crate) fn write_tensors(path: &Path, tensors: &[(String, Vec<usize>)]) {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(name, shape)| tensor_bytes(name, shape)).collect();
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, shape), bytes)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// What version 0.1.0 left, in a folder of its own: `run` with its checkpoints in it, and `elsewhere`, which has them in
/// `volume`.
pub(crate) struct OldRuns(tempfile::TempDir);

impl OldRuns {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy_fixture("runs-v1", folder.path(), Some(&folder.path().display().to_string()));
        Self(folder)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
