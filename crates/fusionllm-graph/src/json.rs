//! The versioned JSON form of an OP-DAG, kept apart from the domain types.
//!
//! Ops refer to ops and parameters by name and may stand in any order; output types are not written but inferred.
//! Reading checks everything that building checks, so a text from anywhere gives a sound OP-DAG or an error.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::builder::DagBuilder;
use crate::dag::{Op, OpDag, OpId, ParamId};
use crate::error::GraphError;
use crate::op::OpKind;
use crate::param::{Init, Param};
use crate::plain::{in_plain_words, read_json};
use crate::validate;

/// The `format` of the JSON form.
pub const JSON_FORMAT: &str = "fusionllm-op-dag";

/// The `version` of the JSON form that this crate writes and reads.
pub const JSON_VERSION: u64 = 1;

/// Read first, so that another version is named rather than its unknown fields.
#[derive(Deserialize)]
#[serde(expecting = "an object with `format` and `version`")]
struct HeaderForm {
    format: String,
    version: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DagForm<Kind = Value> {
    format: String,
    version: u64,
    name: String,
    params: Vec<ParamForm>,
    ops: Vec<OpForm<Kind>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ParamForm {
    name: String,
    shape: Vec<usize>,
    init: Init,
    decay: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    frozen: bool,
}

/// The kind is read in a second step, so that what is wrong with it can be said with the op's name.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OpForm<Kind = Value> {
    name: String,
    kind: Kind,
    #[serde(default)]
    inputs: Vec<String>,
    #[serde(default)]
    params: Vec<String>,
}

impl OpDag {
    /// The OP-DAG as pretty JSON, always the same for the same OP-DAG.
    #[expect(clippy::expect_used, reason = "strings, numbers and lists always serialise")]
    pub fn to_json(&self) -> String {
        let param = |param: &Param| ParamForm {
            name: param.name.clone(),
            shape: param.shape.clone(),
            init: param.init,
            decay: param.decay,
            frozen: param.frozen,
        };
        let op = |op: &Op| OpForm {
            name: op.name.clone(),
            kind: op.kind.clone(),
            inputs: op.inputs.iter().map(|&input| self.op(input).name.clone()).collect(),
            params: op.params.iter().map(|&param| self.param(param).name.clone()).collect(),
        };
        let form = DagForm {
            format: JSON_FORMAT.to_owned(),
            version: JSON_VERSION,
            name: self.name().to_owned(),
            params: self.params().iter().map(param).collect(),
            ops: self.ops().iter().map(op).collect(),
        };
        serde_json::to_string_pretty(&form).expect("an OP-DAG is plain data")
    }

    /// Reads the JSON form. Ops are sorted into a topological order, keeping the given order where it is one.
    ///
    /// # Errors
    /// The text is not JSON of this format and version; an op or parameter is there twice, unknown or does not fit;
    /// the ops form a cycle; or anything that [`DagBuilder::build`] refuses.
    pub fn from_json(text: &str) -> Result<Self, GraphError> {
        let unreadable = |reason: String| GraphError::Json { reason };
        let header: HeaderForm = read_json(text.as_bytes()).map_err(unreadable)?;
        if header.format != JSON_FORMAT {
            return Err(GraphError::Format { expected: JSON_FORMAT, got: header.format });
        }
        if header.version != JSON_VERSION {
            return Err(GraphError::Version { expected: JSON_VERSION, got: header.version });
        }
        let form: DagForm = read_json(text.as_bytes()).map_err(unreadable)?;
        let mut builder = DagBuilder::new(form.name);
        let params = read_params(&mut builder, form.params)?;
        read_ops(&mut builder, form.ops, &params)?;
        builder.build()
    }
}

fn read_params(builder: &mut DagBuilder, forms: Vec<ParamForm>) -> Result<BTreeMap<String, ParamId>, GraphError> {
    let mut ids = BTreeMap::new();
    for ParamForm { name, shape, init, decay, frozen } in forms {
        if ids.contains_key(&name) {
            return Err(GraphError::DuplicateParam { param: name });
        }
        let id = builder.param(Param { name: name.clone(), shape, init, decay, frozen })?;
        ids.insert(name, id);
    }
    Ok(ids)
}

fn read_ops(
    builder: &mut DagBuilder,
    forms: Vec<OpForm>,
    param_ids: &BTreeMap<String, ParamId>,
) -> Result<(), GraphError> {
    let inputs = input_places(&forms)?;
    let order = validate::topological_order(&inputs).map_err(|cycle| GraphError::Cycle {
        ops: cycle.into_iter().map(|place| forms[place].name.clone()).collect(),
    })?;
    let mut ids = vec![OpId(0); forms.len()];
    for place in order {
        let form = &forms[place];
        let unknown = |param: &String| GraphError::UnknownParam { op: form.name.clone(), param: param.clone() };
        let params: Result<Vec<ParamId>, GraphError> =
            form.params.iter().map(|param| param_ids.get(param).copied().ok_or_else(|| unknown(param))).collect();
        let input_ids: Vec<OpId> = inputs[place].iter().map(|&input| ids[input]).collect();
        ids[place] = builder.op(&form.name, read_kind(form)?, &input_ids, &params?)?;
    }
    Ok(())
}

/// For each op the places of the ops it reads.
fn input_places(forms: &[OpForm]) -> Result<Vec<Vec<usize>>, GraphError> {
    let mut places = BTreeMap::new();
    for (place, form) in forms.iter().enumerate() {
        if places.insert(form.name.as_str(), place).is_some() {
            return Err(GraphError::DuplicateOp { op: form.name.clone() });
        }
    }
    let unknown =
        |form: &OpForm, input: &String| GraphError::UnknownInput { op: form.name.clone(), input: input.clone() };
    let of_one = |form: &OpForm| {
        form.inputs
            .iter()
            .map(|input| places.get(input.as_str()).copied().ok_or_else(|| unknown(form, input)))
            .collect()
    };
    forms.iter().map(of_one).collect()
}

fn read_kind(form: &OpForm) -> Result<OpKind, GraphError> {
    let unreadable = |reason: String| GraphError::Kind { op: form.name.clone(), reason };
    let kind =
        OpKind::deserialize(&form.kind).map_err(|error| unreadable(at_attribute(&form.kind, &error.to_string())))?;
    // Serde takes any field beside the tag of a kind without attributes, so compare with what would be written.
    let written = serde_json::to_value(&kind).map_err(|error| unreadable(error.to_string()))?;
    let mut given = form.kind.as_object().into_iter().flat_map(|kind| kind.keys());
    match given.find(|key| written.get(key.as_str()).is_none()) {
        Some(key) => Err(unreadable(format!("unknown field `{key}`, expected no attributes beside `op`"))),
        None => Ok(kind),
    }
}

/// What is wrong with a kind, with the attribute: serde does not say which it was, but says the same of that one alone.
fn at_attribute(kind: &Value, said: &str) -> String {
    let alone = |key: &String, value: &Value| {
        let op = kind.get("op").cloned().unwrap_or_default();
        let alone = Value::from_iter([("op".to_owned(), op), (key.clone(), value.clone())]);
        OpKind::deserialize(alone).is_err_and(|error| error.to_string() == said)
    };
    let is_type = said.starts_with("invalid ");
    let mut attributes = kind.as_object().into_iter().flatten().filter(|(key, _)| is_type && *key != "op");
    let key = attributes.find(|(key, value)| alone(key, value)).map_or("", |(key, _)| key);
    match is_type {
        true => in_plain_words(key, said),
        false => said.to_owned(),
    }
}

#[cfg(test)]
mod tests;
