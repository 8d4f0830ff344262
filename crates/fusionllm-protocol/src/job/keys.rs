//! Every key of a job file: one table that parsing, suggestions and the documentation's test share.

use crate::JobError;

const KEYS: &[(&str, &str)] = &[
    ("", "name"),
    ("model", "name"),
    ("model", "path"),
    ("model", "weights"),
    ("model", "vocab_size"),
    ("model", "n_positions"),
    ("model", "n_embd"),
    ("model", "n_layer"),
    ("model", "n_head"),
    ("model", "dropout"),
    ("model", "family"),
    ("model", "block"),
    ("model", "depths"),
    ("model", "widths"),
    ("model", "stem"),
    ("model", "image_size"),
    ("model", "classes"),
    ("lora", "rank"),
    ("lora", "alpha"),
    ("lora", "targets"),
    ("lora", "dropout"),
    ("lora", "rslora"),
    ("lora", "adapter"),
    ("data", "path"),
    ("data", "format"),
    ("data", "column"),
    ("data", "rows"),
    ("data", "chat_template"),
    ("data", "tokenizer"),
    ("data", "seq_len"),
    ("data", "private"),
    ("data", "private_seed"),
    ("data", "keep_blocks"),
    ("data", "owner"),
    ("data", "eval_fraction"),
    ("data", "order"),
    ("data", "cache"),
    ("data", "mean"),
    ("data", "std"),
    ("data", "crop_padding"),
    ("data", "flip"),
    ("train", "steps"),
    ("train", "batch"),
    ("train", "micro_batches"),
    ("train", "optimizer"),
    ("train", "lr"),
    ("train", "min_lr_ratio"),
    ("train", "warmup"),
    ("train", "schedule"),
    ("train", "betas"),
    ("train", "epsilon"),
    ("train", "weight_decay"),
    ("train", "momentum"),
    ("train", "clip"),
    ("train", "seed"),
    ("train", "precision"),
    ("train", "eval_every"),
    ("train", "eval_batches"),
    ("placement", "compnodes"),
    ("placement", "strategy"),
    ("placement", "pipeline"),
    ("placement", "run_ahead"),
    ("placement", "deferred"),
    ("placement", "recompute"),
    ("placement", "stages"),
    ("placement", "cluster"),
    ("compression", "policy"),
    ("compression", "ratio"),
    ("compression", "values"),
    ("compression", "topk_values"),
    ("compression", "activations"),
    ("compression", "gradients"),
    ("compression", "error_feedback"),
    ("compression", "predict"),
    ("compression", "backward"),
    ("compression", "adapt"),
    ("compression", "error_budget"),
    ("checkpoint", "every"),
    ("checkpoint", "keep"),
    ("checkpoint", "to"),
    ("survive", "enabled"),
    ("survive", "min_compnodes"),
    ("survive", "every"),
    ("survive", "copies"),
    ("survive", "mtbf_h"),
];

/// Below this similarity (0 to 1) a suggestion would rather mislead; found by trying common slips.
const LEAST_SIMILARITY: f64 = 0.7;

/// Every key that a job file may have, with its section (`""` for keys outside of sections).
pub fn job_keys() -> &'static [(&'static str, &'static str)] {
    KEYS
}

/// `section.key`, or the bare key outside of sections.
pub(super) fn full_key(section: &str, key: &str) -> String {
    if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") }
}

/// Holds every section and key of the file against the table.
pub(super) fn check_keys(table: &toml::Table) -> Result<(), JobError> {
    for (name, value) in table {
        if KEYS.contains(&("", name.as_str())) {
            continue;
        }
        if !KEYS.iter().any(|(section, _)| section == name) {
            return Err(unknown("", name));
        }
        let toml::Value::Table(section) = value else {
            let reason = format!("is {}, expected a section: [{name}]", super::refusal::describe(value));
            return Err(JobError::Value { key: name.clone(), reason });
        };
        for key in section.keys() {
            if !KEYS.contains(&(name.as_str(), key.as_str())) {
                return Err(unknown(name, key));
            }
        }
    }
    Ok(())
}

fn unknown(section: &str, key: &str) -> JobError {
    let full = full_key(section, key);
    // A key in the wrong section is as common as a misspelt one, so the bare key counts too.
    let similarity = |known: &(&'static str, &'static str)| {
        let of_full = strsim::normalized_damerau_levenshtein(&full, &full_key(known.0, known.1));
        of_full.max(strsim::normalized_damerau_levenshtein(key, known.1) - 0.01)
    };
    let of_section = KEYS
        .iter()
        .filter(|(known, _)| section.is_empty() && !known.is_empty())
        .map(|(known, _)| (strsim::normalized_damerau_levenshtein(key, known), (*known).to_owned()));
    let nearest = KEYS
        .iter()
        .map(|known| (similarity(known), full_key(known.0, known.1)))
        .chain(of_section)
        // The first of equals wins, so that the answer does not hang on the order of the search.
        .fold(None, |best: Option<(f64, String)>, next| match best {
            Some(best) if best.0 >= next.0 => Some(best),
            _ => Some(next),
        })
        .filter(|(similarity, _)| *similarity >= LEAST_SIMILARITY)
        .map(|(_, name)| name);
    JobError::UnknownKey { key: full, nearest }
}
