//! What each family of op must say about itself, and the checks that families share.

use std::fmt::Display;

use crate::cost::Cost;
use crate::dtype::DType;
use crate::error::Misfit;
use crate::kind::{OpClass, ParamRole};
use crate::shape::{Dim, TensorType};

/// One family of op: its shape rule, its parameters, its cost.
pub(crate) trait Rule {
    fn family(&self) -> &'static str;

    fn class(&self) -> OpClass {
        OpClass::ParameterFree
    }

    fn params(&self) -> Vec<ParamRole> {
        Vec::new()
    }

    /// What changes the op's speed besides the types of its inputs and output, in a word.
    fn variant(&self) -> Option<String> {
        None
    }

    /// Checks attributes and inputs and gives the output's type.
    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit>;

    /// For types that `infer` accepted and gave.
    fn cost(&self, io: &Io<'_>) -> Cost;

    /// As `cost`, where the parameters are not trained, if BP does less then.
    fn frozen_cost(&self, _io: &Io<'_>) -> Option<Cost> {
        None
    }

    /// What kernels that make nothing in between keep, where that is not what the cost says.
    fn fused_kept_bytes(&self, _io: &Io<'_>) -> Option<u64> {
        None
    }

    fn param_bytes(&self) -> u64 {
        let elements = |role: &ParamRole| role.shape.iter().fold(1, |n: u64, &size| n.saturating_mul(size as u64));
        let total = self.params().iter().map(elements).fold(0, u64::saturating_add);
        total.saturating_mul(DType::F32.bytes() as u64)
    }
}

/// The tensors of one op at one batch size.
pub(crate) struct Io<'a> {
    pub(crate) inputs: &'a [&'a TensorType],
    pub(crate) output: &'a TensorType,
    pub(crate) batch: usize,
}

impl Io<'_> {
    /// Elements of the first input; 0 without inputs.
    pub(crate) fn input_elements(&self) -> u64 {
        self.inputs.first().map_or(0, |input| input.shape.elements(self.batch))
    }

    /// Bytes of all inputs.
    pub(crate) fn input_bytes(&self) -> u64 {
        self.inputs.iter().map(|input| input.bytes(self.batch)).fold(0, u64::saturating_add)
    }

    pub(crate) fn output_elements(&self) -> u64 {
        self.output.shape.elements(self.batch)
    }

    pub(crate) fn output_bytes(&self) -> u64 {
        self.output.bytes(self.batch)
    }

    /// A matrix product of `fp_flops` with the op's parameters: BP is two of them, by input and by weight. Keeps the
    /// input.
    pub(crate) fn matrix_product(&self, fp_flops: u64, param_bytes: u64) -> Cost {
        Cost {
            fp_flops,
            bp_flops: fp_flops.saturating_mul(2),
            read_bytes: self.input_bytes().saturating_add(param_bytes),
            write_bytes: self.output_bytes(),
            kept_bytes: self.input_bytes(),
        }
    }

    /// A cost per output element, reading the inputs and writing the output once.
    pub(crate) fn per_element(&self, fp: u64, bp: u64, kept_bytes: u64) -> Cost {
        let elements = self.output_elements();
        Cost {
            fp_flops: elements.saturating_mul(fp),
            bp_flops: elements.saturating_mul(bp),
            read_bytes: self.input_bytes(),
            write_bytes: self.output_bytes(),
            kept_bytes,
        }
    }
}

pub(crate) fn role(name: &'static str, shape: &[usize]) -> ParamRole {
    ParamRole { name, shape: shape.to_vec(), running: false }
}

/// Values that FP in training makes.
pub(crate) fn running(name: &'static str, shape: &[usize]) -> ParamRole {
    ParamRole { running: true, ..role(name, shape) }
}

/// The only input.
pub(crate) fn one<'a>(inputs: &[&'a TensorType]) -> Result<&'a TensorType, Misfit> {
    match *inputs {
        [input] => Ok(input),
        _ => Err(Misfit::InputCount { expected: 1, got: inputs.len() }),
    }
}

/// The two inputs.
pub(crate) fn two<'a>(inputs: &[&'a TensorType]) -> Result<(&'a TensorType, &'a TensorType), Misfit> {
    match *inputs {
        [first, second] => Ok((first, second)),
        _ => Err(Misfit::InputCount { expected: 2, got: inputs.len() }),
    }
}

/// The three inputs.
pub(crate) fn three<'a>(inputs: &[&'a TensorType]) -> Result<(&'a TensorType, &'a TensorType, &'a TensorType), Misfit> {
    match *inputs {
        [first, second, third] => Ok((first, second, third)),
        _ => Err(Misfit::InputCount { expected: 3, got: inputs.len() }),
    }
}

pub(crate) fn wrong_input(input: &TensorType, expected: impl Into<String>) -> Misfit {
    wrong_role("input", input, expected)
}

/// One of several inputs, by its role.
pub(crate) fn wrong_role(role: &'static str, input: &TensorType, expected: impl Into<String>) -> Misfit {
    Misfit::Input { input: role, expected: expected.into(), got: input.to_string() }
}

/// The input must be `f32 [.., a multiple of dim]`.
pub(crate) fn groups_of(input: &TensorType, dim: usize) -> Result<(), Misfit> {
    match input.shape.dims().last() {
        Some(&Dim::Fixed(last)) if input.dtype == DType::F32 && last.is_multiple_of(dim) => Ok(()),
        _ => Err(wrong_input(input, format!("f32 [.., a multiple of {dim}]"))),
    }
}

/// The input must be `f32 [.., dim]`.
pub(crate) fn last_dim(input: &TensorType, dim: usize) -> Result<(), Misfit> {
    if input.dtype == DType::F32 && input.shape.dims().last() == Some(&Dim::Fixed(dim)) {
        Ok(())
    } else {
        Err(wrong_input(input, format!("f32 [.., {dim}]")))
    }
}

/// The input must be f32 of any shape.
pub(crate) fn real(input: &TensorType) -> Result<(), Misfit> {
    if input.dtype == DType::F32 { Ok(()) } else { Err(wrong_input(input, "f32 of any shape")) }
}

pub(crate) fn wrong_attribute(attribute: &'static str, got: impl Display, expected: impl Into<String>) -> Misfit {
    Misfit::Attribute { attribute, expected: expected.into(), got: got.to_string() }
}

/// The attribute must not be 0.
pub(crate) fn positive(attribute: &'static str, value: usize) -> Result<(), Misfit> {
    if value == 0 { Err(wrong_attribute(attribute, value, "at least 1")) } else { Ok(()) }
}

/// What a norm adds to the variance must be a finite number over 0.
pub(crate) fn positive_eps(eps: f64) -> Result<(), Misfit> {
    if eps.is_finite() && eps > 0.0 { Ok(()) } else { Err(wrong_attribute("eps", eps, "a finite number over 0")) }
}

/// A share that is not nothing: a number over 0 and at most 1.
pub(crate) fn in_unit(attribute: &'static str, value: f64) -> Result<(), Misfit> {
    if value > 0.0 && value <= 1.0 { Ok(()) } else { Err(wrong_attribute(attribute, value, "over 0 and at most 1")) }
}

/// Product that stops at the largest count.
pub(crate) fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |n: u64, &factor| n.saturating_mul(factor))
}
