//! Tests of checkpoints.

use std::sync::Arc;

use super::*;
use crate::model::load_model;
use crate::testing;

const GENERATION: Generation = Generation(1);

/// A checkpoint of two shards at `step`; returns its folder.
fn make(folder: &Path, step: u64, keep: u32) -> PathBuf {
    let mut spec = testing::spec(&[]);
    spec.checkpoint.keep = keep;
    let dag = load_model(&spec).unwrap().dag;
    let names: Vec<String> = dag.params().iter().map(|p| p.name.clone()).collect();
    let (head, tail) = names.split_at(4);
    let partial = partial_folder(folder, step, GENERATION);
    std::fs::create_dir_all(&partial).unwrap();
    let shard = |node: u32, params: &[String]| {
        let path = partial.join(shard_name(NodeIndex(node)));
        let tensors: Vec<(String, Vec<usize>)> = params
            .iter()
            .flat_map(|name| {
                let shape = dag.param(dag.find_param(name).unwrap()).shape.clone();
                [(name.clone(), shape.clone()), (format!("optimizer.exp_avg.{name}"), shape)]
            })
            .collect();
        testing::write_tensors(&path, &tensors);
        let bytes = std::fs::metadata(&path).unwrap().len();
        (StoredShard { bytes, fnv1a: Fnv1a::of_file(&path).unwrap() }, params.to_vec())
    };
    let shards = vec![shard(0, head), shard(1, tail)];
    let spec = FinishSpec {
        folder: folder.to_owned(),
        generation: GENERATION,
        step,
        loss: Some(2.0),
        spec,
        dag: Arc::new(dag),
        origin: Origin::default(),
        shards,
    };
    finish(&spec).unwrap()
}

fn error(path: &Path) -> String {
    open_checkpoint(path).unwrap_err().to_string()
}

#[test]
fn a_checkpoint_gives_back_what_went_in() {
    let folder = tempfile::tempdir().unwrap();
    let path = make(folder.path(), 5, 3);
    assert_eq!(path, folder.path().join("step-5"));
    let checkpoint = open_checkpoint(&path).unwrap();
    assert_eq!((checkpoint.manifest().step, checkpoint.manifest().loss), (5, Some(2.0)));
    for param in checkpoint.dag().params() {
        let (shape, bytes) = checkpoint.tensor(&param.name).unwrap();
        assert_eq!((&shape, bytes.len() as u64), (&param.shape, param.bytes()));
        assert_eq!(bytes, testing::tensor_bytes(&param.name, &param.shape));
    }
    assert!(checkpoint.tensor("nothing").unwrap_err().to_string().contains("is missing"));
}

#[test]
fn a_part_holds_its_parameters_and_their_optimizer_state() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = open_checkpoint(&make(folder.path(), 5, 3)).unwrap();
    // Across both shards.
    let params: Vec<String> = checkpoint.dag().params()[3..6].iter().map(|p| p.name.clone()).collect();
    let out = folder.path().join("part");
    let bytes = checkpoint.weights_blob(&params, &out).unwrap();
    let content = std::fs::read(&out).unwrap();
    assert_eq!(bytes, content.len() as u64);
    let file = safetensors::SafeTensors::deserialize(&content).unwrap();
    assert_eq!(file.len(), 6);
    for param in &checkpoint.dag().params()[3..6] {
        let state = format!("optimizer.exp_avg.{}", param.name);
        assert_eq!(file.tensor(&param.name).unwrap().data(), testing::tensor_bytes(&param.name, &param.shape));
        assert_eq!(file.tensor(&state).unwrap().data(), testing::tensor_bytes(&state, &param.shape));
    }
}

#[test]
fn a_run_directory_means_its_newest_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    assert!(error(folder.path()).contains("holds no checkpoint"));
    let checkpoints = folder.path().join("checkpoints");
    for step in [2, 10, 9] {
        make(&checkpoints, step, 0);
    }
    std::fs::create_dir(checkpoints.join("step-11.partial-1")).unwrap();
    assert_eq!(open_checkpoint(folder.path()).unwrap().manifest().step, 10);
    remove_partial(&checkpoints).unwrap();
    assert_eq!(steps_in(&checkpoints), [2, 9, 10]);
}

#[test]
fn only_the_newest_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    for step in 1..=5 {
        make(folder.path(), step, 2);
    }
    assert_eq!(steps_in(folder.path()), [4, 5]);
    // The same step again, as after resuming.
    make(folder.path(), 5, 2);
    assert_eq!(steps_in(folder.path()), [4, 5]);
}

#[test]
fn every_damage_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = make(folder.path(), 5, 3);
    let shard = path.join("shard-1.safetensors");
    let whole = std::fs::read(&shard).unwrap();

    std::fs::write(&shard, &whole[..whole.len() - 1]).unwrap();
    assert!(error(&path).contains("shard-1.safetensors has"), "{}", error(&path));
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, &flipped).unwrap();
    assert!(error(&path).contains("has hash"), "{}", error(&path));
    std::fs::remove_file(&shard).unwrap();
    assert!(error(&path).contains("shard-1.safetensors is missing"), "{}", error(&path));
    std::fs::write(&shard, &whole).unwrap();
    open_checkpoint(&path).unwrap();

    let manifest = path.join(MANIFEST);
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    assert!(error(&path).contains("checkpoint manifest: not readable"), "{}", error(&path));
    std::fs::write(&manifest, text.replace("shard-1.safetensors", "../shard")).unwrap();
    assert!(error(&path).contains("is not a plain file name"), "{}", error(&path));
    std::fs::remove_file(&manifest).unwrap();
    assert!(error(&path).contains("manifest.json is missing"), "{}", error(&path));
}

#[test]
fn a_shard_without_its_parameters_makes_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let spec = testing::spec(&[]);
    let dag = load_model(&spec).unwrap().dag;
    let partial = partial_folder(folder.path(), 3, GENERATION);
    std::fs::create_dir_all(&partial).unwrap();
    testing::write_tensors(&partial.join(shard_name(NodeIndex(0))), &[("a".to_owned(), vec![1])]);
    let params = vec![dag.params()[0].name.clone()];
    let spec = FinishSpec {
        folder: folder.path().to_owned(),
        generation: GENERATION,
        step: 3,
        loss: None,
        spec,
        dag: Arc::new(dag),
        origin: Origin::default(),
        shards: vec![(StoredShard { bytes: 1, fnv1a: String::new() }, params)],
    };
    assert!(finish(&spec).unwrap_err().to_string().contains("is missing"));
    assert!(steps_in(folder.path()).is_empty());
}
