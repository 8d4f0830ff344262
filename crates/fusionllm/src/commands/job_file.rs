//! Reads a job file.

use std::path::Path;

use fusionllm_compnode::Tokenizer;
use fusionllm_graph::Gpt2Config;
use fusionllm_protocol::JobSpec;
use fusionllm_transport::{is_shortage, read_regular_text, read_regular_text_within};

use crate::exit::{bad_input, refused};

/// No job file is nearly as long.
const MOST_BYTES: u64 = 1 << 20;

/// Reads, overrides, resolves and checks a job. Relative paths in it are relative to its folder. The vocabulary is that of
/// the tokenizer, where its file can be read here.
pub(super) fn read(path: &Path, overrides: &[String]) -> anyhow::Result<JobSpec> {
    let fail = |reason: &dyn std::fmt::Display| bad_input(format!("{}: {reason}", path.display()));
    let text = read_regular_text_within(path, MOST_BYTES).map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidData => fail(&"not UTF-8 text, expected a job file in TOML"),
        std::io::ErrorKind::IsADirectory => fail(&"is a directory, expected a job file in TOML"),
        _ if is_shortage(&e) => anyhow::Error::new(e).context(path.display().to_string()),
        _ => fail(&e),
    })?;
    let mut spec = JobSpec::from_toml(&text, overrides).map_err(|e| fail(&e))?;
    let absolute = std::path::absolute(path).map_err(|e| fail(&e))?;
    if let Some(folder) = absolute.parent() {
        if folder.to_str().is_none() {
            return Err(fail(&"lies in a folder whose name is not UTF-8, which a job's paths cannot have"));
        }
        spec.resolve_paths(folder);
    }
    let takes_sizes = spec.model.name.as_deref().is_some_and(|name| Gpt2Config::named(name).is_some());
    if takes_sizes && spec.model.vocab_size.is_none() && spec.data.tokenizer_file().is_some_and(Path::is_file) {
        let entries = Tokenizer::open(&spec.data.tokenizer);
        let entries = entries.map_err(|e| refused(e).context(path.display().to_string()))?.entries();
        if entries == 0 || i32::try_from(entries).is_err() {
            let name = &spec.data.tokenizer;
            return Err(fail(&format!("data.tokenizer {name} has {entries} entries, expected 1 to 2^31")));
        }
        spec.model.vocab_size = Some(entries);
    }
    spec.validate().map_err(|e| fail(&e))?;
    Ok(spec)
}

/// Content of the job's tokenizer file, if it can be read here. Private data's stays with its owner.
pub(super) fn tokenizer_source(spec: &JobSpec) -> Option<String> {
    let file = spec.data.tokenizer_file().filter(|_| !spec.data.private)?;
    read_regular_text(file).ok()
}
