//! Building an OP-DAG op by op, each checked as it is added.

use std::collections::BTreeMap;

use crate::dag::{Op, OpDag, OpId, ParamId};
use crate::error::{GraphError, Misfit};
use crate::op::OpKind;
use crate::param::{Init, Param};
use crate::shape::TensorType;
use crate::validate;

/// Most ops, and most parameters, of one OP-DAG: a thousand blocks have some 14,000, and larger graphs would keep a
/// broker planning for minutes.
pub const MAX_OPS: usize = 1 << 16;

/// Most elements of a parameter, or of one row of an op's output: 4 TiB of f32, beyond any device. Keeps products of
/// sizes far from overflow.
pub const MAX_ELEMENTS: u64 = 1 << 40;

/// Longest name in bytes: names end up in tables, logs and file headers.
pub const MAX_NAME_BYTES: usize = 256;

/// Adds parameters and ops, then gives the finished [`OpDag`].
///
/// ```
/// use fusionllm_graph::{DType, DagBuilder, OpKind, Shape};
///
/// let mut builder = DagBuilder::new("double");
/// let x = builder.op("x", OpKind::Input { dtype: DType::F32, shape: Shape::batched(&[8]) }, &[], &[])?;
/// builder.op("twice", OpKind::Add, &[x, x], &[])?;
/// assert_eq!(builder.build()?.ops().len(), 2);
/// # Ok::<(), fusionllm_graph::GraphError>(())
/// ```
#[derive(Clone, Debug)]
pub struct DagBuilder {
    name: String,
    ops: Vec<Op>,
    params: Vec<Param>,
    op_names: BTreeMap<String, OpId>,
    param_names: BTreeMap<String, ParamId>,
}

impl DagBuilder {
    /// An empty OP-DAG of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ops: Vec::new(),
            params: Vec::new(),
            op_names: BTreeMap::new(),
            param_names: BTreeMap::new(),
        }
    }

    /// Adds a parameter, or gives the id of the equal one that is there already (tied weights).
    ///
    /// # Errors
    /// Another parameter has this name; the name, shape or standard deviation is not usable; there are too many.
    pub fn param(&mut self, param: Param) -> Result<ParamId, GraphError> {
        if let Some(&id) = self.param_names.get(&param.name) {
            let same = self.params.get(id.index()) == Some(&param);
            return if same { Ok(id) } else { Err(GraphError::DuplicateParam { param: param.name }) };
        }
        check_param(&param)?;
        let id = ParamId(next_id(self.params.len(), "parameters")?);
        self.param_names.insert(param.name.clone(), id);
        self.params.push(param);
        Ok(id)
    }

    /// Adds an op that reads `inputs` and uses `params`, both in the order the kind documents.
    ///
    /// # Errors
    /// The name is taken or not usable; an id is unknown; inputs, attributes or parameters do not fit the kind; there
    /// are too many ops.
    pub fn op(&mut self, name: &str, kind: OpKind, inputs: &[OpId], params: &[ParamId]) -> Result<OpId, GraphError> {
        check_name("op", name)?;
        if self.op_names.contains_key(name) {
            return Err(GraphError::DuplicateOp { op: name.to_owned() });
        }
        let misfit =
            |misfit| GraphError::Misfit { op: name.to_owned(), family: kind.family(), misfit: Box::new(misfit) };
        let output = kind.infer(&self.types_of(name, inputs)?).map_err(misfit)?;
        self.params_fit(name, &kind, params)?.map_err(misfit)?;
        check_elements(|| format!("elements of a row of op `{name}`"), output.shape.elements(1))?;
        let id = OpId(next_id(self.ops.len(), "ops")?);
        self.op_names.insert(name.to_owned(), id);
        self.ops.push(Op { name: name.to_owned(), kind, inputs: inputs.to_vec(), params: params.to_vec(), output });
        Ok(id)
    }

    /// The type of an op's output, for a caller that sizes the next op by it.
    pub fn output(&self, op: OpId) -> Option<&TensorType> {
        self.ops.get(op.index()).map(|op| &op.output)
    }

    /// The finished OP-DAG.
    ///
    /// # Errors
    /// There are no ops; an op is dangling (without a loss, exactly one op may be: the output); there are two losses,
    /// inputs or labels; an op reads the loss; a parameter is not used; the name is not usable.
    pub fn build(self) -> Result<OpDag, GraphError> {
        check_name("OP-DAG", &self.name)?;
        let dag = OpDag::join(self.name, self.ops, self.params, self.op_names);
        validate::whole(&dag)?;
        Ok(dag)
    }

    fn types_of(&self, name: &str, inputs: &[OpId]) -> Result<Vec<&TensorType>, GraphError> {
        let unknown = |id: OpId| GraphError::UnknownInput { op: name.to_owned(), input: id.to_string() };
        inputs.iter().map(|&id| self.output(id).ok_or_else(|| unknown(id))).collect()
    }

    fn params_fit(&self, name: &str, kind: &OpKind, params: &[ParamId]) -> Result<Result<(), Misfit>, GraphError> {
        let roles = kind.param_roles();
        if roles.len() != params.len() {
            return Ok(Err(Misfit::ParamCount { expected: roles.len(), got: params.len() }));
        }
        for (role, id) in roles.into_iter().zip(params) {
            let unknown = || GraphError::UnknownParam { op: name.to_owned(), param: id.to_string() };
            let param = self.params.get(id.index()).ok_or_else(unknown)?;
            if role.running && !param.frozen {
                return Ok(Err(Misfit::Running { role: role.name, param: param.name.clone() }));
            }
            if role.shape != param.shape {
                return Ok(Err(Misfit::ParamShape {
                    role: role.name,
                    param: param.name.clone(),
                    expected: role.shape,
                    got: param.shape.clone(),
                }));
            }
        }
        Ok(Ok(()))
    }
}

fn next_id(len: usize, what: &str) -> Result<u32, GraphError> {
    match u32::try_from(len) {
        Ok(id) if len < MAX_OPS => Ok(id),
        _ => Err(GraphError::Limit { what: what.to_owned(), got: len as u64 + 1, limit: MAX_OPS as u64 }),
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), GraphError> {
    if name.len() > MAX_NAME_BYTES {
        let what = format!("bytes of an {what}'s name");
        return Err(GraphError::Limit { what, got: name.len() as u64, limit: MAX_NAME_BYTES as u64 });
    }
    if name.trim().is_empty() || name.chars().any(char::is_control) {
        return Err(GraphError::Name { what, name: name.to_owned() });
    }
    Ok(())
}

fn check_elements(what: impl FnOnce() -> String, elements: u64) -> Result<(), GraphError> {
    if elements > MAX_ELEMENTS {
        return Err(GraphError::Limit { what: what(), got: elements, limit: MAX_ELEMENTS });
    }
    Ok(())
}

fn check_param(param: &Param) -> Result<(), GraphError> {
    check_name("parameter", &param.name)?;
    let wrong = |what, got: String, expected: &str| {
        Err(GraphError::Param { param: param.name.clone(), what, expected: expected.to_owned(), got })
    };
    if param.shape.is_empty() || param.shape.contains(&0) {
        return wrong("shape", format!("{:?}", param.shape), "one or more sizes of at least 1");
    }
    check_elements(|| format!("elements of parameter `{}`", param.name), param.elements())?;
    match param.init {
        Init::Normal { std } if !(std.is_finite() && std >= 0.0) => {
            wrong("std", std.to_string(), "a finite number of at least 0")
        }
        Init::Uniform { bound } if !(bound.is_finite() && bound >= 0.0) => {
            wrong("bound", bound.to_string(), "a finite number of at least 0")
        }
        Init::Normal { .. } | Init::Uniform { .. } | Init::Zeros | Init::Ones => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::{DType, Shape};

    use super::*;

    fn weight(shape: &[usize]) -> Param {
        Param { name: "w".to_owned(), shape: shape.to_vec(), init: Init::Zeros, decay: true, frozen: false }
    }

    fn input() -> OpKind {
        OpKind::Input { dtype: DType::I32, shape: Shape::batched(&[4]) }
    }

    const EMBEDDING: OpKind = OpKind::Embedding { vocab: 5, dim: 3 };

    #[test]
    fn an_equal_parameter_is_shared_and_an_unlike_one_refused() {
        let mut builder = DagBuilder::new("m");
        let first = builder.param(weight(&[5, 3])).unwrap();
        assert_eq!(builder.param(weight(&[5, 3])).unwrap(), first);
        let error = builder.param(weight(&[3, 5])).unwrap_err();
        assert_eq!(error.to_string(), "parameter `w` is there twice, expected one parameter of each name");
    }

    #[test]
    fn an_op_with_the_wrong_parameters_is_refused_by_name() {
        let mut builder = DagBuilder::new("m");
        let x = builder.op("x", input(), &[], &[]).unwrap();
        let w = builder.param(weight(&[3, 5])).unwrap();
        let error = builder.op("e", EMBEDDING, &[x], &[w]).unwrap_err();
        assert_eq!(error.to_string(), "op `e` (embedding): weight `w` has shape [3, 5], expected [5, 3]");
        let error = builder.op("e", EMBEDDING, &[x], &[]).unwrap_err();
        assert_eq!(error.to_string(), "op `e` (embedding): has 0 parameters, expected 1");
        let error = builder.op("e", EMBEDDING, &[x], &[ParamId(7)]).unwrap_err();
        assert_eq!(error.to_string(), "op `e` uses parameter `7`, but there is no such parameter");
        let error = builder.op("e", EMBEDDING, &[OpId(9)], &[w]).unwrap_err();
        assert_eq!(error.to_string(), "op `e` reads `9`, but there is no such op");
    }

    #[test]
    fn an_op_that_does_not_fit_its_input_is_refused_by_name() {
        let mut builder = DagBuilder::new("m");
        let x = builder.op("x", input(), &[], &[]).unwrap();
        let error = builder.op("drop", OpKind::Dropout { p: 0.5 }, &[x], &[]).unwrap_err();
        assert_eq!(error.to_string(), "op `drop` (dropout): input is i32 [B, 4], expected f32 of any shape");
        let error = builder.op("x", input(), &[], &[]).unwrap_err();
        assert_eq!(error.to_string(), "op `x` is there twice, expected one op of each name");
    }

    #[test]
    fn names_and_sizes_out_of_range_are_refused() {
        let mut builder = DagBuilder::new("m");
        for name in ["", " ", "a\nb"] {
            assert!(matches!(builder.op(name, input(), &[], &[]), Err(GraphError::Name { what: "op", .. })));
        }
        let long = "x".repeat(MAX_NAME_BYTES + 1);
        assert!(matches!(builder.op(&long, input(), &[], &[]), Err(GraphError::Limit { .. })));
        assert!(matches!(builder.param(weight(&[])), Err(GraphError::Param { what: "shape", .. })));
        assert!(matches!(builder.param(weight(&[3, 0])), Err(GraphError::Param { what: "shape", .. })));
        assert!(matches!(builder.param(weight(&[usize::MAX, 9])), Err(GraphError::Limit { .. })));
        let nan = Param { init: Init::Normal { std: f32::NAN }, ..weight(&[3]) };
        assert!(matches!(builder.param(nan), Err(GraphError::Param { what: "std", .. })));
        let huge = OpKind::Label { shape: Shape::batched(&[usize::MAX]) };
        let error = builder.op("y", huge, &[], &[]).unwrap_err().to_string();
        assert!(error.starts_with("elements of a row of op `y`: "), "{error}");
        assert!(matches!(DagBuilder::new("").build(), Err(GraphError::Name { what: "OP-DAG", .. })));
    }
}
