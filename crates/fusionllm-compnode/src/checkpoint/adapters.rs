//! Adapters beside a model: in PEFT's form, and added to its weights.

use std::collections::BTreeMap;
use std::io::Write;

use fusionllm_graph::{Adapter, OpDag, WeightLayout};
use fusionllm_protocol::hugging_face::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use serde_json::Value;

use super::export_folder::ExportFolder;
use super::shard::write_shard_to;
use crate::executor::{LazyTensor, NamedTensor, by_name};
use crate::{ExportError, ShardError};

/// How PEFT's names of tensors begin.
const PREFIX: &str = "base_model.model.";

/// What PEFT's files say of adapters besides their numbers.
#[derive(Clone, Debug, Default)]
pub struct AdapterOrigin {
    /// The model that they are of: the path of a folder, or a name.
    pub base: Option<String>,
    /// Whether the scaling is told as alpha over the root of the rank.
    pub rslora: bool,
}

/// Writes the adapters of a model to a folder as PEFT does: adapter_config.json and adapter_model.safetensors, in place of
/// an earlier export of the same there; `of` says of what.
///
/// # Errors
/// [`ExportError`] if the folder holds something else, an adapter is missing, or a file cannot be written.
pub fn export_adapters(
    (folder, of): (&ExportFolder, &str),
    dag: &OpDag,
    tensors: Vec<NamedTensor>,
    origin: &AdapterOrigin,
) -> Result<(), ExportError> {
    let adapters = dag.adapters();
    let mut by_name = by_name(tensors);
    let mut matrices = Vec::with_capacity(2 * adapters.len());
    for param in adapters.iter().flat_map(|adapter| [adapter.a, adapter.b]) {
        let mut matrix = take(&mut by_name, &dag.param(param).name)?;
        matrix.name.insert_str(0, PREFIX);
        matrices.push(matrix);
    }
    let config = adapter_config(dag, &adapters, origin);
    let mut out = folder.take(of)?;
    let name = ADAPTER_WEIGHTS;
    let path = folder.path().join(name);
    out.write(name, |out| {
        write_shard_to(out, &path, matrices.into_iter().map(LazyTensor::from).collect()).map(|_| ())
    })?;
    let name = ADAPTER_CONFIG;
    let io = |source| ShardError::Io { path: folder.path().join(name), source };
    out.write(name, |out| out.write_all(format!("{config:#}\n").as_bytes()).map_err(io))?;
    Ok(out.finish()?)
}

fn adapter_config(dag: &OpDag, adapters: &[Adapter], origin: &AdapterOrigin) -> Value {
    let rank = adapters.first().and_then(|adapter| dag.param(adapter.a).shape.first().copied()).unwrap_or(0);
    let scaling = adapters.first().map_or(1.0, |adapter| adapter.scaling);
    let over = if origin.rslora { (rank as f64).sqrt() } else { rank as f64 };
    // Most are whole numbers, which division and product leave by a hair.
    let alpha = scaling * over;
    let alpha =
        if (alpha - alpha.round()).abs() < 1e-9 { Value::from(alpha.round() as i64) } else { Value::from(alpha) };
    serde_json::json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.base,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": origin.rslora,
        "lora_dropout": adapters.first().map_or(0.0, |adapter| adapter.dropout),
        "target_modules": targets(dag, adapters),
        // GPT-2's weights lie the other way round.
        "fan_in_fan_out": adapters.iter().any(|adapter| adapter.layout == WeightLayout::InOut),
        "bias": "none",
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
    })
}

/// The last parts of the modules' names where all modules of these names have adapters, else the modules' whole names.
fn targets(dag: &OpDag, adapters: &[Adapter]) -> Vec<String> {
    let leaf = |module: &str| module.rsplit('.').next().unwrap_or(module).to_owned();
    let mut leaves: Vec<String> = adapters.iter().map(|adapter| leaf(&adapter.module)).collect();
    leaves.sort();
    leaves.dedup();
    let weight_of = |leaf: &String| format!(".{leaf}.weight");
    let all = leaves.iter().map(|leaf| {
        let name = weight_of(leaf);
        dag.params().iter().filter(|param| param.frozen && param.name.ends_with(&name)).count()
    });
    if all.sum::<usize>() == adapters.len() {
        return leaves;
    }
    adapters.iter().map(|adapter| adapter.module.clone()).collect()
}

/// The model with its adapters added to its weights; as it is if it has none. Tensors that are no parameters are left out.
///
/// # Errors
/// [`ShardError::Tensor`] if a parameter is missing or has another shape.
pub fn merge_adapters(dag: &OpDag, tensors: Vec<NamedTensor>) -> Result<(OpDag, Vec<NamedTensor>), ShardError> {
    let Some(base) = dag.without_lora() else { return Ok((dag.clone(), tensors)) };
    let mut by_name = by_name(tensors);
    for adapter in dag.adapters() {
        let [a, b] = [adapter.a, adapter.b].map(|param| take(&mut by_name, &dag.param(param).name));
        let (a, b) = (a?, b?);
        let weight = &dag.param(adapter.weight);
        let mut merged = take(&mut by_name, &weight.name)?;
        let rank = a.shape.first().copied().unwrap_or(0);
        let (inputs, outputs) = (a.values.len() / rank.max(1), b.values.len() / rank.max(1));
        if merged.shape != weight.shape || merged.values.len() != inputs * outputs {
            let reason = format!("shape {:?}, expected {:?}", merged.shape, weight.shape);
            return Err(ShardError::Tensor { name: weight.name.clone(), reason });
        }
        add_product(&mut merged.values, &a.values, &b.values, [inputs, outputs, rank], &adapter);
        by_name.insert(merged.name.clone(), merged);
    }
    let merged = base.params().iter().map(|param| take(&mut by_name, &param.name)).collect::<Result<_, _>>()?;
    Ok((base, merged))
}

/// W + s·B·A, in the weight's layout.
fn add_product(weight: &mut [f32], a: &[f32], b: &[f32], [inputs, outputs, rank]: [usize; 3], adapter: &Adapter) {
    let scaling = adapter.scaling as f32;
    let transposed = |matrix: &[f32], rows: usize, columns: usize| -> Vec<f32> {
        (0..rows * columns).map(|at| matrix[at % rows * columns + at / rows]).collect()
    };
    // Rows of the weight are sums of rows of one matrix by numbers of the other.
    let (rows, columns, factors, terms) = match adapter.layout {
        WeightLayout::OutIn => (outputs, inputs, b.to_vec(), a.to_vec()),
        WeightLayout::InOut => (inputs, outputs, transposed(a, rank, inputs), transposed(b, outputs, rank)),
    };
    for (row, factors) in weight.chunks_exact_mut(columns).zip(factors.chunks_exact(rank)).take(rows) {
        for (factor, terms) in factors.iter().zip(terms.chunks_exact(columns)) {
            row.iter_mut().zip(terms).for_each(|(weight, term)| *weight += scaling * factor * term);
        }
    }
}

fn take(tensors: &mut BTreeMap<String, NamedTensor>, name: &str) -> Result<NamedTensor, ShardError> {
    let missing = || ShardError::Tensor { name: name.to_owned(), reason: "not in the checkpoint".to_owned() };
    tensors.remove(name).ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use fusionllm_graph::{Gpt2Config, Lora, gpt2};

    use super::*;

    fn dag(targets: &[&str]) -> OpDag {
        let mut config = Gpt2Config::named("gpt2").unwrap();
        (config.n_layer, config.n_embd, config.n_head, config.vocab_size, config.n_positions) = (2, 6, 2, 9, 8);
        let targets = targets.iter().map(|&target| target.to_owned()).collect();
        gpt2(&config, 4).unwrap().with_lora(&Lora { rank: 3, scaling: 2.0 / 3.0, dropout: 0.0, targets }).unwrap()
    }

    #[test]
    fn targets_are_leaves_where_these_say_all() {
        let of = |wanted: &[&str]| {
            let dag = dag(wanted);
            targets(&dag, &dag.adapters())
        };
        assert_eq!(of(&["c_attn"]), ["c_attn"]);
        assert_eq!(of(&["all-linear"]), ["c_attn", "c_fc", "c_proj"]);
        assert_eq!(of(&["attn.c_proj"]), ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]);
        let dag = dag(&["c_attn"]);
        let config = adapter_config(&dag, &dag.adapters(), &AdapterOrigin::default());
        assert_eq!((&config["lora_alpha"], &config["r"]), (&Value::from(2), &Value::from(3)));
        assert_eq!(config["fan_in_fan_out"], true);
    }

    #[test]
    fn a_merged_weight_has_the_product_added_in_either_layout() {
        let dag = dag(&["c_attn"]);
        let adapter = &dag.adapters()[0];
        let (inputs, outputs, rank) = (2, 3, 2);
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 1.0, 2.0, 1.0]);
        // B·A, [outputs, inputs].
        let product = [1.0, 2.0, 3.0, 4.0, 5.0, 8.0];
        let of = |layout| {
            let mut weight = vec![10.0; inputs * outputs];
            let adapter = Adapter { layout, scaling: 0.5, ..adapter.clone() };
            add_product(&mut weight, &a, &b, [inputs, outputs, rank], &adapter);
            weight
        };
        assert_eq!(of(WeightLayout::OutIn), product.map(|x| 10.0 + 0.5 * x));
        assert_eq!(of(WeightLayout::InOut), [1.0, 3.0, 5.0, 2.0, 4.0, 8.0].map(|x| 10.0 + 0.5 * x));
    }
}
