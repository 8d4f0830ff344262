//! Golden folders: where they lie, and jobs from the Hugging Face folders in them.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// A file of a golden folder.
pub(crate) fn golden(folder: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(folder).join(name)
}

/// The numbers of an array.
pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// A job from the folder `hf` on `text.txt`, which has one sequence to train on, which both rows of a batch are, and one
/// held out. `tables` and `train` are lines of the job's own.
pub(crate) fn folder_job(name: &str, tables: &str, train: &str) -> String {
    format!(
        "name = \"{name}\"
[model]
path = \"hf\"
{tables}
[data]
path = \"text.txt\"
tokenizer = \"bytes\"
seq_len = 16
eval_fraction = 0.5
[train]
batch = 2
micro_batches = 2
warmup = 0
eval_batches = 1
{train}
"
    )
}
