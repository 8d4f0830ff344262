//! What can be wrong with an OP-DAG. Each message names the op or parameter at fault.

/// Why an op does not fit its inputs, attributes or parameters.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// Too many or too few inputs.
    #[error("has {got} inputs, expected {expected}")]
    InputCount {
        /// Inputs the op takes.
        expected: usize,
        /// How many inputs were given.
        got: usize,
    },
    /// Too many or too few parameters.
    #[error("has {got} parameters, expected {expected}")]
    ParamCount {
        /// Parameters the op takes.
        expected: usize,
        /// How many parameters were given.
        got: usize,
    },
    /// An input has a shape or element type that the op does not take.
    #[error("{input} is {got}, expected {expected}")]
    Input {
        /// The input, by its role.
        input: &'static str,
        /// What would be right.
        expected: String,
        /// The input's type.
        got: String,
    },
    /// An attribute has a value out of its range.
    #[error("{attribute} is {got}, expected {expected}")]
    Attribute {
        /// The attribute's name.
        attribute: &'static str,
        /// What would be right.
        expected: String,
        /// The value that was given, as text.
        got: String,
    },
    /// A parameter is marked as trained, but the op makes its values.
    #[error("{role} `{param}` is trained, expected one that is frozen: the op makes its values itself")]
    Running {
        /// What the op uses it as.
        role: &'static str,
        /// The parameter's name.
        param: String,
    },
    /// A parameter has another shape than its role asks for.
    #[error("{role} `{param}` has shape {got:?}, expected {expected:?}")]
    ParamShape {
        /// What the op uses it as.
        role: &'static str,
        /// The parameter's name.
        param: String,
        /// The shape that the op's attributes ask for.
        expected: Vec<usize>,
        /// The parameter's shape.
        got: Vec<usize>,
    },
}

/// Why an OP-DAG cannot be built or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GraphError {
    /// An op does not fit.
    #[error("op `{op}` ({family}): {misfit}")]
    Misfit {
        /// The op's name.
        op: String,
        /// The op's family, such as `linear`.
        family: &'static str,
        /// What does not fit.
        misfit: Box<Misfit>,
    },
    /// An op's kind cannot be read.
    #[error("op `{op}`: kind is not readable: {reason}")]
    Kind {
        /// The op's name.
        op: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Two ops have one name.
    #[error("op `{op}` is there twice, expected one op of each name")]
    DuplicateOp {
        /// The name that two ops have.
        op: String,
    },
    /// Two parameters have one name.
    #[error("parameter `{param}` is there twice, expected one parameter of each name")]
    DuplicateParam {
        /// The name that two parameters have.
        param: String,
    },
    /// An op reads an op that does not exist.
    #[error("op `{op}` reads `{input}`, but there is no such op")]
    UnknownInput {
        /// The reading op.
        op: String,
        /// The name or id that it reads.
        input: String,
    },
    /// An op uses a parameter that does not exist.
    #[error("op `{op}` uses parameter `{param}`, but there is no such parameter")]
    UnknownParam {
        /// Name of the op that uses it.
        op: String,
        /// The name or id that it uses.
        param: String,
    },
    /// Ops wait for each other.
    #[error("the ops {} form a cycle, expected each op to read only ops before it", backticked(.ops))]
    Cycle {
        /// The ops on the cycle, each read by the next and the last by the first.
        ops: Vec<String>,
    },
    /// Nothing reads an op.
    #[error("op `{op}` is dangling: no op reads it, expected a path to {}", if *.has_loss { "the loss" } else { "the one output" })]
    Dangling {
        /// Name of the op that nothing reads.
        op: String,
        /// Whether the OP-DAG has a loss op.
        has_loss: bool,
    },
    /// An op reads the loss.
    #[error("op `{op}` reads the loss `{loss}`, expected nothing after the loss")]
    AfterLoss {
        /// The reading op.
        op: String,
        /// The loss op.
        loss: String,
    },
    /// There may be only one op of this family, and there are two.
    #[error("ops `{first}` and `{second}` are both {family}, expected at most one")]
    Several {
        /// The family, or `loss`.
        family: &'static str,
        /// The first op.
        first: String,
        /// The second op.
        second: String,
    },
    /// No op uses a parameter.
    #[error("parameter `{param}` is not used, expected an op that uses it")]
    UnusedParam {
        /// Name of the parameter.
        param: String,
    },
    /// A parameter's shape or initial values make no sense.
    #[error("parameter `{param}`: {what} is {got}, expected {expected}")]
    Param {
        /// Name of the parameter.
        param: String,
        /// `shape` or `std`.
        what: &'static str,
        /// What would be right.
        expected: String,
        /// The shape or deviation that was given, as text.
        got: String,
    },
    /// There is no op.
    #[error("the OP-DAG has no ops, expected at least one")]
    Empty,
    /// A limit of this crate is passed.
    #[error("{what}: {got} is over the limit of {limit}")]
    Limit {
        /// What there is too much of, and where.
        what: String,
        /// How much there is.
        got: u64,
        /// How much there may be.
        limit: u64,
    },
    /// A name is empty or holds control characters.
    #[error("{what} name {name:?} is not usable, expected visible characters")]
    Name {
        /// `op`, `parameter` or `OP-DAG`.
        what: &'static str,
        /// The name that was given.
        name: String,
    },
    /// The text is not an OP-DAG's JSON form.
    #[error("not an OP-DAG in JSON: {reason}")]
    Json {
        /// What the parser found, with line and column.
        reason: String,
    },
    /// The text is not the configuration of a model that is known here.
    #[error("not the config.json of a model that is known here: {reason}")]
    ConfigJson {
        /// What the parser found, with line and column, or which model it is.
        reason: String,
    },
    /// A model's configuration lacks a key, or one has a value of another kind.
    #[error("{model}: {reason}")]
    Config {
        /// The model's family.
        model: &'static str,
        /// What the parser found, with line and column, or which setting is wrong.
        reason: String,
    },
    /// The text says it is something else.
    #[error("format is `{got}`, expected `{expected}`")]
    Format {
        /// The format this crate reads.
        expected: &'static str,
        /// What the text says.
        got: String,
    },
    /// The text is of another version.
    #[error("OP-DAG version is {got}, expected {expected}")]
    Version {
        /// The version this crate reads.
        expected: u64,
        /// What the text says.
        got: u64,
    },
    /// A model's size or setting is out of range.
    #[error("{model}: {key} is {got}, expected {expected}")]
    Model {
        /// The model's family.
        model: &'static str,
        /// The key of its configuration.
        key: &'static str,
        /// What would be right.
        expected: String,
        /// The value that was given, as text.
        got: String,
    },
    /// Adapters do not fit the model.
    #[error("lora.{key} is {got}, expected {expected}")]
    Lora {
        /// The setting.
        key: &'static str,
        /// What would be right.
        expected: String,
        /// The value that was given, as text.
        got: String,
    },
}

fn backticked(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" -> ")
}
