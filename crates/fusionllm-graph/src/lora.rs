//! Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685): a model whose parameters are frozen, with two small matrices
//! beside each of some linear ops, which are trained.
//!
//! A linear op `X` that computes y = W·x + b gets four more, and what read `X` reads their sum:
//!
//! ```text
//!        ┌─▶ X ──────────────────────────────────────────▶ X.lora_add ─▶
//!     x ─┤                                                   ▲
//!        └─▶ (X.lora_dropout) ─▶ X.lora_A ─▶ X.lora_scale ─▶ X.lora_B
//! ```
//!
//! With scaling s that is y + B·(s·(A·x)), where A is [rank, inputs] and B [outputs, rank]: PEFT's numbers, with the factor
//! applied where there are few of them. Parameters are named as PEFT has them, without its prefix.

use std::collections::{BTreeMap, BTreeSet};

use crate::builder::DagBuilder;
use crate::dag::{OpDag, OpId, ParamId};
use crate::error::GraphError;
use crate::kind::WeightLayout;
use crate::op::OpKind;
use crate::param::{Init, Param};

/// Every linear op but the head, as PEFT calls them.
const ALL_LINEAR: &str = "all-linear";
/// How a weight's name ends after the name of its module.
const WEIGHT: &str = ".weight";

/// Which adapters a model gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Rows of A and columns of B.
    pub rank: usize,
    /// Factor on what an adapter adds.
    pub scaling: f64,
    /// Probability with which an element of an adapter's input is left out in training.
    pub dropout: f64,
    /// The linear ops, by Hugging Face's names of their modules or the ends of these (`q_proj`, `attn.c_proj`), or
    /// [`Lora::ALL_LINEAR`].
    pub targets: Vec<String>,
}

impl Lora {
    /// The target that stands for all linear ops but the head.
    pub const ALL_LINEAR: &str = ALL_LINEAR;
}

/// One adapter of an OP-DAG.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Hugging Face's name of the module, `model.layers.0.self_attn.q_proj` for example.
    pub module: String,
    /// The linear op beside which it is.
    pub op: OpId,
    /// That op's weight.
    pub weight: ParamId,
    /// How that weight lies.
    pub layout: WeightLayout,
    /// A, [rank, inputs].
    pub a: ParamId,
    /// B, [outputs, rank].
    pub b: ParamId,
    /// Factor on what it adds.
    pub scaling: f64,
    /// Probability with which an element of its input is left out in training.
    pub dropout: f64,
}

/// The ops of an adapter beside op `name`.
struct Names {
    dropout: String,
    a: String,
    scale: String,
    b: String,
    add: String,
}

impl Names {
    fn of(name: &str) -> Self {
        let part = |part: &str| format!("{name}.lora_{part}");
        Self { dropout: part("dropout"), a: part("A"), scale: part("scale"), b: part("B"), add: part("add") }
    }
}

/// A linear op beside which an adapter can be.
struct Site {
    op: OpId,
    module: String,
    inputs: usize,
    outputs: usize,
}

impl OpDag {
    /// The same model with every parameter frozen and adapters beside the linear ops that `lora` names.
    ///
    /// # Errors
    /// [`GraphError::Lora`] if a target names no linear op or a setting is out of range; the model has adapters already,
    /// or becomes too large.
    pub fn with_lora(&self, lora: &Lora) -> Result<Self, GraphError> {
        if !self.adapters().is_empty() {
            let (expected, got) = ("a model without".to_owned(), "given for a model with adapters".to_owned());
            return Err(GraphError::Lora { key: "rank", expected, got });
        }
        if self.param_ids().any(|param| self.is_running(param)) {
            let (expected, got) = ("0 for a model with batch norm".to_owned(), lora.rank.to_string());
            return Err(GraphError::Lora { key: "rank", expected, got });
        }
        let sites: BTreeMap<OpId, Site> = self.chosen(lora)?.into_iter().map(|site| (site.op, site)).collect();
        let mut dag = DagBuilder::new(self.name());
        for param in self.params() {
            dag.param(Param { frozen: true, ..param.clone() })?;
        }
        let mut now: Vec<OpId> = Vec::with_capacity(self.ops().len());
        for (id, op) in self.op_ids().zip(self.ops()) {
            let inputs: Vec<OpId> = op.inputs.iter().map(|input| now[input.index()]).collect();
            let base = dag.op(&op.name, op.kind.clone(), &inputs, &op.params)?;
            now.push(match (sites.get(&id), &inputs[..]) {
                (Some(site), &[x]) => add_adapter(&mut dag, lora, site, &op.name, x, base)?,
                _ => base,
            });
        }
        dag.build()
    }

    /// The adapters of the model, in the order of their ops.
    pub fn adapters(&self) -> Vec<Adapter> {
        self.op_ids().filter_map(|op| self.adapter(op)).collect()
    }

    /// The model without its adapters, every parameter of which is trained; nothing if it has none.
    pub fn without_lora(&self) -> Option<Self> {
        let adapters = self.adapters();
        if adapters.is_empty() {
            return None;
        }
        let of_adapters: BTreeSet<ParamId> = adapters.iter().flat_map(|adapter| [adapter.a, adapter.b]).collect();
        let mut dag = DagBuilder::new(self.name());
        let mut params: BTreeMap<ParamId, ParamId> = BTreeMap::new();
        for id in self.param_ids().filter(|id| !of_adapters.contains(id)) {
            params.insert(id, dag.param(Param { frozen: false, ..self.param(id).clone() }).ok()?);
        }
        let mut instead: BTreeMap<OpId, Option<OpId>> = BTreeMap::new();
        for Adapter { op, .. } in &adapters {
            let names = Names::of(&self.op(*op).name);
            for name in [&names.dropout, &names.a, &names.scale, &names.b] {
                instead.extend(self.find(name).map(|part| (part, None)));
            }
            instead.extend(self.find(&names.add).map(|sum| (sum, Some(*op))));
        }
        let mut now: BTreeMap<OpId, OpId> = BTreeMap::new();
        for (id, op) in self.op_ids().zip(self.ops()) {
            match instead.get(&id) {
                Some(None) => continue,
                Some(Some(base)) => {
                    now.insert(id, *now.get(base)?);
                    continue;
                }
                None => {}
            }
            let inputs: Vec<OpId> = op.inputs.iter().map(|input| now.get(input).copied()).collect::<Option<_>>()?;
            let held: Vec<ParamId> = op.params.iter().map(|param| params.get(param).copied()).collect::<Option<_>>()?;
            now.insert(id, dag.op(&op.name, op.kind.clone(), &inputs, &held).ok()?);
        }
        dag.build().ok()
    }

    /// The names by which linear ops can be chosen: the last parts of their modules' names, each once.
    pub fn lora_targets(&self) -> Vec<String> {
        let leaves: BTreeSet<String> = self.sites().into_iter().map(|site| leaf(&site.module).to_owned()).collect();
        leaves.into_iter().collect()
    }

    /// The linear ops that can have adapters: all but the head and those that share a weight.
    fn sites(&self) -> Vec<Site> {
        let head = self.logits();
        let mut users: BTreeMap<ParamId, usize> = BTreeMap::new();
        for param in self.ops().iter().flat_map(|op| &op.params) {
            *users.entry(*param).or_default() += 1;
        }
        let site = |op: OpId| {
            let OpKind::Linear { inputs, outputs, .. } = self.op(op).kind else { return None };
            let weight = *self.op(op).params.first()?;
            let module = self.param(weight).name.strip_suffix(WEIGHT)?.to_owned();
            (Some(op) != head && users.get(&weight) == Some(&1)).then_some(Site { op, module, inputs, outputs })
        };
        self.op_ids().filter_map(site).collect()
    }

    fn chosen(&self, lora: &Lora) -> Result<Vec<Site>, GraphError> {
        let sites = self.sites();
        let wrong = |key, got: String, expected: String| Err(GraphError::Lora { key, expected, got });
        let known = || {
            let leaves: Vec<String> = self.lora_targets().iter().map(|leaf| format!("`{leaf}`")).collect();
            format!("`{ALL_LINEAR}` or some of the model's linear ops: {}", leaves.join(", "))
        };
        if let Some(target) = lora.targets.iter().find(|target| !sites.iter().any(|s| is_meant(&s.module, target))) {
            return wrong("targets", format!("`{target}`"), known());
        }
        let chosen: Vec<Site> =
            sites.into_iter().filter(|s| lora.targets.iter().any(|target| is_meant(&s.module, target))).collect();
        if chosen.is_empty() {
            return wrong("targets", "empty".to_owned(), known());
        }
        let most = chosen.iter().map(|site| site.inputs.min(site.outputs)).min().unwrap_or(0);
        if lora.rank == 0 || lora.rank > most {
            return wrong("rank", lora.rank.to_string(), format!("1 to {most}, the width of the smallest of its ops"));
        }
        Ok(chosen)
    }

    /// The adapter beside a linear op.
    fn adapter(&self, op: OpId) -> Option<Adapter> {
        let OpKind::Linear { layout, .. } = self.op(op).kind else { return None };
        let names = Names::of(&self.op(op).name);
        let [a, b] = [&names.a, &names.b].map(|name| self.find(name).map(|part| self.op(part)));
        let (a, b) = (*a?.params.first()?, *b?.params.first()?);
        let &OpKind::Scale { factor: scaling } = &self.op(self.find(&names.scale)?).kind else { return None };
        let dropout = self.find(&names.dropout).map(|op| &self.op(op).kind);
        let dropout = if let Some(&OpKind::Dropout { p }) = dropout { p } else { 0.0 };
        let weight = *self.op(op).params.first()?;
        let module = self.param(weight).name.strip_suffix(WEIGHT)?.to_owned();
        Some(Adapter { module, op, weight, layout, a, b, scaling, dropout })
    }
}

fn add_adapter(
    dag: &mut DagBuilder,
    lora: &Lora,
    site: &Site,
    op: &str,
    x: OpId,
    base: OpId,
) -> Result<OpId, GraphError> {
    let Site { module, inputs, outputs, .. } = site;
    let names = Names::of(op);
    let mut matrix = |part: &str, shape: [usize; 2], init: Init| {
        let name = format!("{module}.lora_{part}{WEIGHT}");
        dag.param(Param { name, shape: shape.to_vec(), init, decay: true, frozen: false })
    };
    // PEFT draws A by PyTorch's `kaiming_uniform_` with a = √5, which comes to this.
    let bound = (*inputs as f32).sqrt().recip();
    let a = matrix("A", [lora.rank, *inputs], Init::Uniform { bound })?;
    let b = matrix("B", [*outputs, lora.rank], Init::Zeros)?;
    let linear =
        |inputs: usize, outputs: usize| OpKind::Linear { inputs, outputs, bias: false, layout: WeightLayout::OutIn };
    let x = match lora.dropout {
        0.0 => x,
        p => dag.op(&names.dropout, OpKind::Dropout { p }, &[x], &[])?,
    };
    let low = dag.op(&names.a, linear(*inputs, lora.rank), &[x], &[a])?;
    let scaled = dag.op(&names.scale, OpKind::Scale { factor: lora.scaling }, &[low], &[])?;
    let added = dag.op(&names.b, linear(lora.rank, *outputs), &[scaled], &[b])?;
    dag.op(&names.add, OpKind::Add, &[base, added], &[])
}

/// Whether a target means a module.
fn is_meant(module: &str, target: &str) -> bool {
    let ends_so = || module.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    target == ALL_LINEAR || (!target.is_empty() && ends_so())
}

fn leaf(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

#[cfg(test)]
mod tests {
    use crate::{DecoderConfig, Gpt2Config, Kernels, Model, decoder, gpt2};

    use super::*;

    fn lora(targets: &[&str]) -> Lora {
        let targets = targets.iter().map(|&target| target.to_owned()).collect();
        Lora { rank: 4, scaling: 2.0, dropout: 0.0, targets }
    }

    fn models() -> Vec<OpDag> {
        let gpt2 = gpt2(&Gpt2Config::named("gpt2").unwrap(), 16).unwrap();
        let decoders = ["llama-3.2-1b", "mistral-7b", "qwen2.5-0.5b", "qwen3-0.6b"].map(|name| {
            let config = DecoderConfig::named(name).unwrap();
            decoder(&DecoderConfig { num_hidden_layers: 2, ..config }, 16).unwrap()
        });
        [gpt2].into_iter().chain(decoders).collect()
    }

    fn modules(dag: &OpDag) -> Vec<String> {
        dag.adapters().into_iter().map(|adapter| adapter.module).collect()
    }

    #[test]
    fn every_family_has_adapters_at_pefts_default_targets_and_is_the_same_without() {
        for base in models() {
            let model = Model::of(&base).unwrap();
            let dag = base.with_lora(&lora(model.lora_targets())).unwrap();
            let layers = base.ops().iter().filter(|op| op.kind.family().ends_with("attention")).count();
            assert_eq!(dag.adapters().len(), layers * model.lora_targets().len(), "{}", base.name());
            assert_eq!(OpDag::from_json(&dag.to_json()).unwrap(), dag);
            assert_eq!(dag.without_lora().unwrap(), base);
            assert!(dag.has_frozen() && !base.has_frozen() && base.without_lora().is_none());
            let trained: Vec<&str> =
                dag.params().iter().filter(|param| !param.frozen).map(|param| param.name.as_str()).collect();
            assert_eq!(trained.len(), 2 * dag.adapters().len());
            assert!(trained.iter().all(|name| name.contains(".lora_")));
            assert_eq!(dag.param_elements() - dag.trained_elements(), base.param_elements());
        }
    }

    #[test]
    fn targets_are_ends_of_modules_names_or_all_linear_ops_but_the_head() {
        let base = &models()[0];
        let first = |targets: &[&str]| {
            let of_first = |module: &String| module.starts_with("transformer.h.0.");
            let found = modules(&base.with_lora(&lora(targets)).unwrap()).into_iter().filter(of_first);
            found.map(|module| module.trim_start_matches("transformer.h.0.").to_owned()).collect::<Vec<_>>()
        };
        let all = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"];
        assert_eq!(first(&["all-linear"]), all);
        assert_eq!(first(&["c_proj", "c_attn", "c_fc"]), all);
        assert_eq!(first(&["attn.c_proj"]), ["attn.c_proj"]);
        assert_eq!(first(&["transformer.h.0.mlp.c_fc"]), ["mlp.c_fc"]);
        assert_eq!(modules(&base.with_lora(&lora(&["transformer.h.0.mlp.c_fc"])).unwrap()).len(), 1);
        for dag in models() {
            let all = dag.with_lora(&lora(&["all-linear"])).unwrap();
            assert!(modules(&all).iter().all(|module| !module.contains("lm_head") && !module.contains("wte")));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_there_is() {
        let base = &models()[1];
        let error = |lora: Lora| base.with_lora(&lora).unwrap_err().to_string();
        let known = "`down_proj`, `gate_proj`, `k_proj`, `o_proj`, `q_proj`, `up_proj`, `v_proj`";
        for (target, got) in [("c_attn", "`c_attn`"), ("proj", "`proj`"), ("lm_head", "`lm_head`"), ("", "``")] {
            let expected =
                format!("lora.targets is {got}, expected `all-linear` or some of the model's linear ops: {known}");
            assert_eq!(error(lora(&["q_proj", target])), expected);
        }
        assert!(error(lora(&[])).starts_with("lora.targets is empty, expected `all-linear`"));
        for rank in [0, 513] {
            let said = error(Lora { rank, ..lora(&["q_proj", "k_proj"]) });
            assert_eq!(said, format!("lora.rank is {rank}, expected 1 to 512, the width of the smallest of its ops"));
        }
        assert!(error(Lora { scaling: f64::NAN, ..lora(&["q_proj"]) }).contains("lora_scale"));
        assert!(error(Lora { dropout: 1.0, ..lora(&["q_proj"]) }).contains("lora_dropout"));
        let again = base.with_lora(&lora(&["q_proj"])).unwrap().with_lora(&lora(&["q_proj"])).unwrap_err();
        assert!(again.to_string().contains("expected a model without"), "{again}");
    }

    #[test]
    fn nothing_goes_back_before_the_first_adapter_and_frozen_ops_cost_less() {
        let base = &models()[2];
        let dag = base.with_lora(&lora(&["layers.1.self_attn.q_proj"])).unwrap();
        let of = |name: &str| dag.find(name).unwrap();
        for name in ["embed_tokens", "layers.0.mlp.down_proj", "layers.1.input_layernorm", "layers.1.self_attn.k_proj"]
        {
            assert!(!dag.carries_gradient(of(name)), "{name}");
            assert_eq!((dag.cost(of(name), 2).bp_flops, dag.kept_bytes(of(name), 2, Kernels::Fused)), (0, 0));
        }
        for name in ["layers.1.self_attn.q_proj.lora_A", "layers.1.self_attn", "layers.1.mlp.up_proj", "lm_head"] {
            assert!(dag.carries_gradient(of(name)), "{name}");
        }
        let (frozen, trained) = (dag.cost(of("layers.1.mlp.up_proj"), 2), base.cost(of_base(base), 2));
        assert_eq!((frozen.fp_flops, 2 * frozen.bp_flops), (trained.fp_flops, trained.bp_flops));
        assert_eq!(dag.kept_bytes(of("layers.1.mlp.up_proj"), 2, Kernels::Fused), 0);
        assert_ne!(dag.work(of("layers.1.mlp.up_proj"), 2), base.work(of_base(base), 2));
        let with_dropout = base.with_lora(&Lora { dropout: 0.1, ..lora(&["q_proj"]) }).unwrap();
        assert_eq!(with_dropout.adapters()[0].dropout, 0.1);
        assert_eq!(with_dropout.without_lora().unwrap(), *base);
    }

    fn of_base(base: &OpDag) -> OpId {
        base.find("layers.1.mlp.up_proj").unwrap()
    }
}
