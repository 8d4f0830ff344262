//! Tensors of one or several safetensors files under the graph's names, and a part of them as one file.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fusionllm_graph::{Model, OpDag};
use fusionllm_protocol::{StateKind, TensorHeader, TensorName};
use safetensors::tensor::Dtype;

use super::tensor_file::{TensorFile, header_error, io};
use crate::CheckpointError;

/// The head, which may be stored where it is tied to the embedding too.
const HEAD: &str = "lm_head.weight";

/// Where each tensor lies.
#[derive(Clone, Debug, Default)]
pub struct TensorSet {
    files: Vec<Arc<TensorFile>>,
    /// By the graph's name: the file's index and the name in it.
    places: BTreeMap<String, (usize, String)>,
    /// Parameters that are in no file: whoever needs them draws them.
    drawn: BTreeSet<String>,
}

/// The names that a parameter's optimizer state may have.
pub(crate) fn optimizer_names(param: &str) -> impl Iterator<Item = String> + '_ {
    StateKind::ALL.into_iter().map(move |kind| TensorName::State { kind, param }.to_string())
}

impl TensorSet {
    /// The parameters of `dag` in plain Hugging Face files, and the names of the tensors that the graph does not know.
    /// Keys may lack the prefix of the model's family; a head that is tied to the embedding counts as known.
    ///
    /// # Errors
    /// [`CheckpointError`] if a file is unreadable, a tensor is there twice, or a parameter is missing, or of another
    /// shape or type.
    pub(crate) fn of_hugging_face(
        paths: &[PathBuf],
        dag: &OpDag,
        model: &Model,
    ) -> Result<(Self, Vec<String>), CheckpointError> {
        let bare = |name: &str| name.strip_prefix(model.prefix()).unwrap_or(name).to_owned();
        let open = |path: &PathBuf| TensorFile::open(path).map(Arc::new);
        let files: Vec<Arc<TensorFile>> = paths.iter().map(open).collect::<Result<_, _>>()?;
        let mut found: BTreeMap<String, (usize, String)> = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some((other, twin)) = found.insert(bare(name), (index, name.to_owned())) {
                    let other = files.get(other).map(|f| f.path().display().to_string()).unwrap_or_default();
                    let reason = format!("is there twice, as `{twin}` in {other} too: which one counts is not known");
                    return Err(CheckpointError::Tensor {
                        path: file.path().to_owned(),
                        name: name.to_owned(),
                        reason,
                    });
                }
            }
        }
        let mut places = BTreeMap::new();
        for param in dag.params() {
            // Of what is tied, either name may be the stored one.
            let tied = param.name == model.embedding() && dag.find_param(HEAD).is_none();
            let place = found.remove(&bare(&param.name)).or_else(|| tied.then(|| found.remove(HEAD)).flatten());
            let Some((index, stored)) = place else {
                let path = match paths {
                    [path] => path.clone(),
                    _ => paths.first().and_then(|p| p.parent()).unwrap_or(Path::new("")).to_owned(),
                };
                let reason = "is missing".to_owned();
                return Err(CheckpointError::Tensor { path, name: param.name.clone(), reason });
            };
            if let Some(file) = files.get(index) {
                file.check(&stored, &param.shape, &[Dtype::F32, Dtype::F16, Dtype::BF16])?;
            }
            places.insert(param.name.clone(), (index, stored));
        }
        // Masks of old files come last: they are no parameters anywhere.
        let mut unused: Vec<String> = found.into_values().map(|(_, name)| name).filter(|name| name != HEAD).collect();
        unused.sort_by_key(|name| (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"), name.clone()));
        Ok((Self { files, places, drawn: BTreeSet::new() }, unused))
    }

    /// Whether the file of this name has such a tensor.
    pub(crate) fn file_has(&self, file: &str, tensor: &str) -> bool {
        let named = |f: &&Arc<TensorFile>| f.path().file_name().is_some_and(|name| name == file);
        self.files.iter().find(named).is_some_and(|f| f.info(tensor).is_some())
    }

    /// Under which name a tensor is stored.
    pub(crate) fn stored_name(&self, name: &str) -> Option<&str> {
        self.places.get(name).map(|(_, stored)| stored.as_str())
    }

    /// Holds a head that is stored against the embedding that it is tied to.
    ///
    /// # Errors
    /// [`CheckpointError`] if a file cannot be read, or the two differ: which of them counts is not known.
    pub(crate) fn check_head(&self, dag: &OpDag, model: &Model) -> Result<(), CheckpointError> {
        let stored = self.files.iter().find(|f| f.info(HEAD).is_some());
        let Some(head) = stored.filter(|_| dag.find_param(HEAD).is_none()) else { return Ok(()) };
        let embedding = model.embedding();
        let same = dag.find_param(embedding).map(|_| self.find(embedding)).transpose()?.map(|(file, stored)| {
            let of = |file: &TensorFile, name: &str| -> Result<_, CheckpointError> {
                let mut hash = blake3::Hasher::new();
                file.copy_to(name, &mut hash, file.path())?;
                Ok((file.info(name).map(|info| (info.dtype, info.shape.clone())), hash.finalize()))
            };
            Ok::<_, CheckpointError>(of(file, stored)? == of(head, HEAD)?)
        });
        if !same.transpose()?.unwrap_or(false) {
            let reason = "is not the embedding, but tied to it by config.json: versions of transformers differ in which \
                          counts. Set tie_word_embeddings to false to have both, or take it out of the file";
            let (path, name, reason) = (head.path().to_owned(), HEAD.to_owned(), reason.to_owned());
            return Err(CheckpointError::Tensor { path, name, reason });
        }
        Ok(())
    }

    /// Adds all tensors of a file under their own names; the first of several of one name counts.
    pub(crate) fn add(&mut self, file: TensorFile) {
        let index = self.files.len();
        for name in file.names() {
            self.places.entry(name.to_owned()).or_insert_with(|| (index, name.to_owned()));
        }
        self.files.push(Arc::new(file));
    }

    /// These parameters are in no file: whoever needs them draws them.
    pub(crate) fn leave_out(&mut self, drawn: impl IntoIterator<Item = String>) {
        self.drawn.extend(drawn);
    }

    /// These parameters come from one more file, where their names have a prefix.
    pub(crate) fn add_adapters(&mut self, file: TensorFile, params: impl IntoIterator<Item = String>, prefix: &str) {
        let index = self.files.len();
        self.files.push(Arc::new(file));
        self.places.extend(params.into_iter().map(|param| (param.clone(), (index, format!("{prefix}{param}")))));
    }

    /// By what each file is told from what may come in its place, by path.
    pub(crate) fn stamps(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.files.iter().map(|file| (file.path().display().to_string(), file.stamp().to_string()))
    }

    /// Names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    fn find(&self, name: &str) -> Result<(&TensorFile, &str), CheckpointError> {
        let found = self.places.get(name).and_then(|(file, stored)| Some((&**self.files.get(*file)?, stored.as_str())));
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

    /// Writes `params` but for those that are drawn, the optimizer state there is of them, and all residuals of error feedback as one safetensors
    /// file, which errors call `path`; returns its size in bytes. No more than one megabyte is held in memory.
    ///
    /// # Errors
    /// [`CheckpointError`] if a parameter is missing or the file cannot be written.
    pub fn write_part(&self, params: &[String], out: &mut impl Write, path: &Path) -> Result<u64, CheckpointError> {
        let with_state = params.iter().filter(|param| !self.drawn.contains(*param)).flat_map(|param| {
            let state = optimizer_names(param).filter(|name| self.places.contains_key(name));
            std::iter::once(param.clone()).chain(state)
        });
        // What error feedback held back is for whoever sends over that edge in the new placement.
        let residuals = self.places.keys().filter(|name| TensorName::is_residual(name)).cloned();
        let mut names: Vec<String> = with_state.chain(residuals).collect();
        // Readers want tensors aligned: the widest elements first.
        let width = |name: &String| self.find(name).ok().and_then(|(f, s)| Some(f.info(s)?.dtype)).map(|t| t.bitsize());
        names.sort_by_key(|name| std::cmp::Reverse(width(name)));
        let mut infos = Vec::new();
        for name in &names {
            let (file, stored) = self.find(name)?;
            infos.extend(file.info(stored).map(|info| (name.clone(), info.dtype, info.shape.clone())));
        }
        let mut writer = BufWriter::new(out);
        let header = TensorHeader::write(&mut writer, infos).map_err(|e| header_error(path, e))?;
        for name in &names {
            let (file, stored) = self.find(name)?;
            file.copy_to(stored, &mut writer, path)?;
        }
        writer.flush().map_err(|e| io(path, e))?;
        Ok(header.file_bytes())
    }
}
