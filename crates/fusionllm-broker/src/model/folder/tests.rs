//! Tests of Hugging Face directories.

use fusionllm_protocol::{DataSpec, JobSpec, ModelSpec};
use tempfile::TempDir;

use super::*;
use crate::model::load_model;
use crate::testing;

const SIZES: &str = "\"vocab_size\":256,\"n_positions\":8,\"n_embd\":8,\"n_layer\":1,\"n_head\":2";

struct Folder {
    dir: TempDir,
    spec: JobSpec,
    tensors: Vec<(String, Vec<usize>)>,
}

impl Folder {
    /// A directory with a config.json and a tokenizer.json, and no weights.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = testing::spec(&[]);
        spec.model = ModelSpec { path: Some(dir.path().to_owned()), ..Default::default() };
        spec.data.tokenizer = DataSpec::MODEL.to_owned();
        let dag = load_model(&testing::spec(&[])).unwrap().dag;
        let tensors = dag.params().iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        let folder = Self { dir, spec, tensors };
        folder.write("config.json", &format!("{{\"model_type\":\"gpt2\",{SIZES}}}"));
        folder.write("tokenizer.json", "{}");
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// Shards of the given tensors and their index.
    fn shard(&self, shards: &[&[(String, Vec<usize>)]]) {
        let mut map = serde_json::Map::new();
        for (number, tensors) in (1..).zip(shards) {
            let name = format!("model-{number:05}-of-{:05}.safetensors", shards.len());
            testing::write_tensors(&self.path(&name), tensors);
            map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), name.clone().into())));
        }
        self.write(INDEX, &serde_json::json!({ "metadata": {}, "weight_map": map }).to_string());
    }

    fn load(&self) -> LoadedModel {
        load_model(&self.spec).unwrap()
    }

    fn error(&self) -> String {
        let error = load_model(&self.spec).unwrap_err();
        assert!(error.is_bad_input(), "{error}");
        error.to_string()
    }
}

fn texts(model: &LoadedModel) -> Vec<String> {
    model.notes.iter().map(ToString::to_string).collect()
}

#[test]
fn shards_are_one_set_of_weights() {
    let folder = Folder::new();
    let (first, second) = folder.tensors.split_at(5);
    folder.shard(&[first, second]);
    let model = folder.load();
    let weights = model.weights.clone().unwrap();
    for (name, shape) in &folder.tensors {
        assert_eq!(weights.tensor(name).unwrap(), (shape.clone(), testing::tensor_bytes(name, shape)));
    }
    let whole = folder.path("model-00001-of-00002.safetensors").display().to_string();
    assert_eq!(texts(&model), [format!("weights: {whole}, model-00002-of-00002.safetensors")]);
    // One file goes before shards, as it does in transformers.
    testing::write_tensors(&folder.path(WEIGHTS), &folder.tensors);
    let notes = texts(&folder.load());
    assert_eq!(notes[0], format!("weights: {}", folder.path(WEIGHTS).display()));
    assert!(notes[1].contains("index.json is passed over"), "{notes:?}");
}

#[test]
fn shards_that_do_not_fit_their_index_are_refused_by_name() {
    let folder = Folder::new();
    let (first, second) = folder.tensors.split_at(5);
    folder.shard(&[first, second]);
    let index = std::fs::read_to_string(folder.path(INDEX)).unwrap();

    std::fs::remove_file(folder.path("model-00002-of-00002.safetensors")).unwrap();
    assert!(folder.error().contains("a shard is missing: ") && folder.error().contains("model-00002-of-00002"));

    testing::write_tensors(&folder.path("model-00002-of-00002.safetensors"), &second[1..]);
    assert!(folder.error().contains(&second[0].0), "{}", folder.error());

    testing::write_tensors(&folder.path("model-00002-of-00002.safetensors"), &folder.tensors[4..]);
    let error = folder.error();
    assert!(error.contains("is there twice") && error.contains(&first[4].0), "{error}");

    folder.shard(&[first, second]);
    folder.write(INDEX, &index.replacen(&second[0].0, "transformer.h.7.ln_1.bias", 1));
    let error = folder.error();
    assert!(error.contains("`transformer.h.7.ln_1.bias` is to be in model-00002"), "{error}");

    let keep: serde_json::Value = serde_json::from_str(&index).unwrap();
    let mut map = keep["weight_map"].as_object().unwrap().clone();
    map.remove(&second[0].0);
    folder.write(INDEX, &serde_json::json!({ "weight_map": map }).to_string());
    assert!(folder.error().contains("the index does not name it"), "{}", folder.error());

    for (text, words) in [
        ("{", "not an index of shards"),
        ("{\"weight_map\":{}}", "`weight_map`"),
        ("{\"weight_map\":{\"a\":\"../x\"}}", "expected the name of a file beside it"),
        ("{\"weight_map\":{\"a\":3}}", "tensor `a`"),
    ] {
        folder.write(INDEX, text);
        assert!(folder.error().contains(words), "{}", folder.error());
    }
}

#[test]
fn without_weights_only_a_job_that_says_so_begins_anew() {
    let mut folder = Folder::new();
    let error = folder.error();
    assert!(error.contains("no model.safetensors") && error.contains("model.weights = \"new\""), "{error}");
    folder.write("pytorch_model.bin", "");
    assert!(folder.error().contains("its weights are in `pytorch_model.bin`"), "{}", folder.error());
    std::fs::remove_file(folder.path("pytorch_model.bin")).unwrap();
    folder.write("model-00001-of-00002.safetensors", "");
    assert!(folder.error().contains("says what `model-00001-of-00002.safetensors` belongs to"), "{}", folder.error());

    folder.spec.model.weights = WeightsChoice::New;
    folder.write("config.json", &format!("{{{SIZES},\"initializer_range\":0.5}}"));
    let model = folder.load();
    assert!(model.weights.is_none());
    assert_eq!(model.notes[0], ModelNote::Weights("new (seed 0)".to_owned()));
    assert!(texts(&model)[1].contains("initializer_range = 0.5 is passed over"), "{:?}", model.notes);
    assert!(matches!(model.notes[1], ModelNote::Unusual(_)));
    assert_eq!(texts(&load_model(&testing::spec(&["train.seed=7"])).unwrap()), ["weights: new (seed 7)"]);
}

#[test]
fn what_a_file_has_besides_is_said() {
    let mut folder = Folder::new();
    let embedding = folder.tensors[0].clone();
    folder.tensors.push(("h.0.attn.bias".to_owned(), vec![1, 1, 8, 8]));
    folder.tensors.push(("transformer.h.1.ln_1.bias".to_owned(), vec![8]));
    folder.tensors.push(("lm_head.weight".to_owned(), embedding.1.clone()));
    testing::write_tensors(&folder.path(WEIGHTS), &folder.tensors);
    folder.write("config.json", &format!("{{{SIZES},\"resid_pdrop\":0.1,\"attn_pdrop\":0.1}}"));
    let notes = texts(&folder.load());
    assert!(notes[1].ends_with("does not use: `transformer.h.1.ln_1.bias`, `h.0.attn.bias`"), "{notes:?}");
    assert!(notes[2].contains("(resid_pdrop = 0.1, attn_pdrop = 0.1) is passed over"), "{notes:?}");

    // Another head than the embedding: which of the two counts?
    let head = folder.tensors.len() - 1;
    folder.tensors[head].1[0] += 1;
    testing::write_tensors(&folder.path(WEIGHTS), &folder.tensors);
    assert!(folder.error().contains("`lm_head.weight` is not the embedding, but tied to it"), "{}", folder.error());
    folder.tensors[head].1[0] -= 1;

    folder.tensors.push(("wte.weight".to_owned(), embedding.1));
    testing::write_tensors(&folder.path(WEIGHTS), &folder.tensors);
    let error = folder.error();
    assert!(error.contains("tensor `wte.weight` is there twice") || error.contains("as `wte.weight`"), "{error}");
    folder.write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
    assert!(folder.error().contains("Git LFS pointer"), "{}", folder.error());
}

#[test]
fn a_model_that_does_not_fit_its_config_is_refused() {
    let mut folder = Folder::new();
    testing::write_tensors(&folder.path(WEIGHTS), &folder.tensors);
    let config = |from: &str, to: &str| format!("{{{}}}", SIZES.replace(from, to));
    folder.write("config.json", &config("256", "300"));
    let error = folder.error();
    assert!(
        error.contains("transformer.wte.weight") && error.contains("has shape [256, 8], expected [300, 8]"),
        "{error}"
    );
    folder.write("config.json", &config("\"n_positions\":8", "\"n_positions\":4"));
    assert!(folder.error().contains("seq_len is 8, expected at most n_positions 4"), "{}", folder.error());
    folder.write("config.json", "{");
    assert!(folder.error().contains("config.json: not the config.json of a model"), "{}", folder.error());
    folder.write("config.json", &format!("\u{feff}{{{SIZES}}}"));
    assert!(folder.load().weights.is_some());
    folder.spec.data.seq_len = 4;
    assert_eq!(folder.load().dag.seq_len(), Some(4));
}

#[test]
fn the_tokenizer_of_the_folder_is_the_default() {
    let mut folder = Folder::new();
    testing::write_tensors(&folder.path(WEIGHTS), &folder.tensors);
    assert_eq!(folder.load().tokenizer(), Some("{}"));
    folder.spec.data.tokenizer = DataSpec::BYTES.to_owned();
    assert!(texts(&folder.load())[1].contains("feeds bytes as token ids"));
    std::fs::remove_file(folder.path("tokenizer.json")).unwrap();
    assert_eq!((folder.load().notes.len(), folder.load().tokenizer()), (1, None));
    folder.spec.data.tokenizer = DataSpec::MODEL.to_owned();
    let error = folder.error();
    assert!(error.contains("no tokenizer.json in it") && error.contains("`bytes` if"), "{error}");
    folder.write("vocab.json", "{}");
    assert!(folder.error().contains("vocab.json is not read"), "{}", folder.error());
}
