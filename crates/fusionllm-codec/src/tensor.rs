//! A tensor in host memory: what crosses from a CompNode's device to the wire.

use crate::{CodecError, ElementType};

/// The elements of a [`HostTensor`], row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Real numbers.
    F32(Vec<f32>),
    /// Integers.
    I32(Vec<i32>),
}

/// A dense row-major tensor in host memory whose values fill its shape.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    shape: Vec<usize>,
    values: Values,
}

impl HostTensor {
    /// A tensor of `values` in row-major order.
    ///
    /// # Errors
    /// [`CodecError::ValueCount`] if the values do not fill the shape.
    pub fn new(shape: Vec<usize>, values: Values) -> Result<Self, CodecError> {
        let expected = element_count(&shape)?;
        let got = match &values {
            Values::F32(v) => v.len(),
            Values::I32(v) => v.len(),
        };
        if expected != got as u64 {
            return Err(CodecError::ValueCount { shape, expected, got: got as u64 });
        }
        Ok(Self { shape, values })
    }

    /// Dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements, row-major, as many as the shape holds.
    pub fn values(&self) -> &Values {
        &self.values
    }

    /// Shape and elements, by value.
    pub fn into_parts(self) -> (Vec<usize>, Values) {
        (self.shape, self.values)
    }

    /// The element type.
    pub fn element_type(&self) -> ElementType {
        match self.values {
            Values::F32(_) => ElementType::F32,
            Values::I32(_) => ElementType::I32,
        }
    }

    /// The reals of an F32 tensor.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.values {
            Values::F32(v) => Some(v),
            Values::I32(_) => None,
        }
    }
}

/// Number of elements of a shape.
pub(crate) fn element_count(shape: &[usize]) -> Result<u64, CodecError> {
    shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d as u64))
        .filter(|&n| n <= (1 << 48))
        .ok_or_else(|| CodecError::ShapeOverflow { shape: shape.to_vec() })
}
