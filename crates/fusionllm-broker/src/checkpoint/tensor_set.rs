//! Tensors of one or several safetensors files under the graph's names, and a part of them as one file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use fusionllm_graph::OpDag;
use safetensors::tensor::Dtype;

use super::tensor_file::{TensorFile, io};
use crate::CheckpointError;

/// Optimizer state of parameter P lies under `optimizer.KIND.P`.
const OPTIMIZER_KINDS: [&str; 3] = ["exp_avg", "exp_avg_sq", "momentum"];

/// Names of what error feedback holds back at an edge begin like this.
const RESIDUALS: &str = "residual.";

/// Where each tensor lies.
#[derive(Debug, Default)]
pub struct TensorSet {
    files: Vec<TensorFile>,
    /// By the graph's name: the file's index and the name in it.
    places: BTreeMap<String, (usize, String)>,
}

/// Name of a parameter's optimizer state.
pub(crate) fn optimizer_names(param: &str) -> impl Iterator<Item = String> + '_ {
    OPTIMIZER_KINDS.into_iter().map(move |kind| format!("optimizer.{kind}.{param}"))
}

impl TensorSet {
    /// The parameters of `dag` in a plain Hugging Face file. Keys may lack the prefix `transformer.`; what the graph
    /// does not know, such as a tied `lm_head.weight`, is left out.
    ///
    /// # Errors
    /// [`CheckpointError`] if the file is unreadable or a parameter is missing, or of another shape or type.
    pub fn of_hugging_face(path: &Path, dag: &OpDag) -> Result<Self, CheckpointError> {
        let file = TensorFile::open(path)?;
        let mut places = BTreeMap::new();
        for param in dag.params() {
            let short = param.name.strip_prefix("transformer.").filter(|short| file.info(short).is_some());
            let stored = if file.info(&param.name).is_some() { &param.name } else { short.unwrap_or(&param.name) };
            file.check(stored, &param.shape, &[Dtype::F32, Dtype::F16, Dtype::BF16])?;
            places.insert(param.name.clone(), (0, stored.to_owned()));
        }
        Ok(Self { files: vec![file], places })
    }

    /// Adds all tensors of a file under their own names; the first of several of one name counts.
    pub(crate) fn add(&mut self, file: TensorFile) {
        let index = self.files.len();
        for name in file.names() {
            self.places.entry(name.to_owned()).or_insert_with(|| (index, name.to_owned()));
        }
        self.files.push(file);
    }

    /// Names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    fn find(&self, name: &str) -> Result<(&TensorFile, &str), CheckpointError> {
        let found = self.places.get(name).and_then(|(file, stored)| Some((self.files.get(*file)?, stored.as_str())));
        found.ok_or_else(|| CheckpointError::Tensor {
            path: self.files.first().map(|f| f.path().to_owned()).unwrap_or_default(),
            name: name.to_owned(),
            reason: "is missing".to_owned(),
        })
    }

    /// Shape and little-endian bytes of one tensor.
    ///
    /// # Errors
    /// [`CheckpointError`] if it is not there or cannot be read.
    pub fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<u8>), CheckpointError> {
        let (file, stored) = self.find(name)?;
        let mut bytes = Vec::new();
        file.copy_to(stored, &mut bytes, file.path())?;
        Ok((file.info(stored).map(|info| info.shape.clone()).unwrap_or_default(), bytes))
    }

    /// Writes `params`, the optimizer state there is of them, and all residuals of error feedback as one safetensors file; returns its size in bytes.
    /// No more than one megabyte is held in memory.
    ///
    /// # Errors
    /// [`CheckpointError`] if a parameter is missing or the file cannot be written.
    pub fn write_part(&self, params: &[String], out: &Path) -> Result<u64, CheckpointError> {
        let with_state = params.iter().flat_map(|param| {
            let state = optimizer_names(param).filter(|name| self.places.contains_key(name));
            std::iter::once(param.clone()).chain(state)
        });
        // What error feedback held back is for whoever sends over that edge in the new placement.
        let residuals = self.places.keys().filter(|name| name.starts_with(RESIDUALS)).cloned();
        let mut names: Vec<String> = with_state.chain(residuals).collect();
        // Readers want tensors aligned: the widest elements first.
        let width = |name: &String| self.find(name).ok().and_then(|(f, s)| Some(f.info(s)?.dtype)).map(|t| t.bitsize());
        names.sort_by_key(|name| std::cmp::Reverse(width(name)));
        let mut header = serde_json::Map::new();
        let mut offset = 0;
        for name in &names {
            let (file, stored) = self.find(name)?;
            let Some(info) = file.info(stored) else { continue };
            let end = offset + (info.data_offsets.1 - info.data_offsets.0);
            let entry = serde_json::json!({ "dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, end] });
            header.insert(name.clone(), entry);
            offset = end;
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let fail = |e| io(out, e);
        let mut writer = BufWriter::new(File::create(out).map_err(fail)?);
        writer.write_all(&(text.len() as u64).to_le_bytes()).map_err(fail)?;
        writer.write_all(&text).map_err(fail)?;
        for name in &names {
            let (file, stored) = self.find(name)?;
            file.copy_to(stored, &mut writer, out)?;
        }
        writer.flush().map_err(fail)?;
        Ok(8 + text.len() as u64 + offset as u64)
    }
}
