//! What a job's model was read from, so that another in its place is known: a job may wait for days.

use std::collections::BTreeMap;
use std::path::Path;

use fusionllm_protocol::{JobSpec, content_hash};
use serde::{Deserialize, Serialize};

use super::model_error;
use crate::BrokerError;
use crate::checkpoint::TensorSet;

/// Of the model of a job that begins anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ModelFingerprint {
    /// Hash of what the job says of its model, and of the build: other words or another build make another graph.
    asked: String,
    /// Hash of the OP-DAG.
    graph: String,
    /// Of each file of weights, by path, when it was written and which file it is; all of a content hash would take as long
    /// as reading them.
    weights: BTreeMap<String, String>,
    /// Hash of each other file of its folder, by name.
    carried: BTreeMap<String, String>,
}

impl ModelFingerprint {
    pub(crate) fn of(
        spec: &JobSpec,
        graph: &str,
        weights: Option<&TensorSet>,
        carried: &BTreeMap<String, String>,
    ) -> Self {
        let asked = format!("{:?} {:?} {} {}", spec.model, spec.lora, spec.data.seq_len, env!("CARGO_PKG_VERSION"));
        let hash = |text: &str| content_hash(text.as_bytes());
        Self {
            asked: hash(&asked),
            graph: hash(graph),
            weights: weights.into_iter().flat_map(TensorSet::stamps).collect(),
            carried: carried.iter().map(|(name, text)| (name.clone(), hash(text))).collect(),
        }
    }

    /// What changed since `before`, a sentence each.
    ///
    /// # Errors
    /// [`BrokerError::Model`] if it is another model.
    pub(crate) fn changes_since(&self, before: &Self, path: Option<&Path>) -> Result<Vec<String>, BrokerError> {
        if self.asked != before.asked {
            return Ok(Vec::new());
        }
        let files_differ = (&self.weights, &self.carried) != (&before.weights, &before.carried);
        // Another build may make another graph of the same folder.
        let is_folder = !(self.carried.is_empty() && before.carried.is_empty());
        if self.graph != before.graph && (files_differ || !is_folder) {
            let reason = "it is not the model that the job was handed in with, its ops or sizes are others: put that one \
                          back, or submit a job for this one";
            return Err(model_error(path.unwrap_or(Path::new("")), reason.to_owned()));
        }
        let others = |now: &BTreeMap<String, String>, then: &BTreeMap<String, String>| -> Vec<String> {
            let names = now.keys().chain(then.keys().filter(|name| !now.contains_key(*name)));
            names.filter(|name| now.get(*name) != then.get(*name)).cloned().collect()
        };
        let mut changes = Vec::new();
        let weights = others(&self.weights, &before.weights);
        if !weights.is_empty() {
            changes.push(format!(
                "files of the model's weights were written, replaced or touched after the job was handed in: {}",
                weights.join(", ")
            ));
        }
        let carried = others(&self.carried, &before.carried);
        if !carried.is_empty() {
            changes.push(format!("in model.path there are others since the job was handed in: {}", carried.join(", ")));
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn another_model_is_refused_and_other_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let weights = || {
            testing::write_tensors(&path, &[("a".to_owned(), vec![3])]);
            let mut set = TensorSet::default();
            set.add(crate::checkpoint::TensorFile::open(&path).unwrap());
            set
        };
        let carried = |config: &str| BTreeMap::from([("config.json".to_owned(), config.to_owned())]);
        let spec = testing::spec(&[]);
        let first = weights();
        let of = |graph: &str, set: &TensorSet, config: &str| {
            ModelFingerprint::of(&spec, graph, Some(set), &carried(config))
        };
        let before = of("g", &first, "c");
        let stored = serde_json::from_str(&serde_json::to_string(&before).unwrap()).unwrap();
        let changes =
            |now: ModelFingerprint| now.changes_since(&stored, Some(folder.path())).map_err(|e| e.to_string());
        assert_eq!(changes(of("g", &first, "c")), Ok(Vec::new()));
        // The same bytes once more, at another time.
        std::fs::remove_file(&path).unwrap();
        let second = weights();
        let [said] = changes(of("g", &second, "c")).unwrap().try_into().unwrap();
        assert!(said.contains("written, replaced or touched") && said.ends_with("model.safetensors"), "{said}");
        let [said] = changes(of("g", &first, "other")).unwrap().try_into().unwrap();
        assert!(said.ends_with("handed in: config.json"), "{said}");
        let refused = changes(of("other", &second, "c")).unwrap_err();
        assert!(refused.contains("is not the model that the job was handed in with"), "{refused}");
        assert_eq!(changes(of("other", &first, "c")), Ok(Vec::new()), "the same files, read by another build");
        // Whoever asks for another model gets it.
        let other = testing::spec(&["data.seq_len=7"]);
        let asked = ModelFingerprint::of(&other, "other", Some(&second), &carried("c"));
        assert_eq!(changes(asked), Ok(Vec::new()));
    }
}
