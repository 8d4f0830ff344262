//! Shapes with a symbolic batch dimension, and the type of a tensor.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

/// One dimension of a tensor. In JSON `"B"` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "DimForm", into = "DimForm")]
pub enum Dim {
    /// Rows of the micro-batch: known only when a task runs.
    Batch,
    /// A size fixed by the model.
    Fixed(usize),
}

impl Dim {
    /// The size at `batch` rows.
    pub fn resolve(self, batch: usize) -> usize {
        match self {
            Self::Batch => batch,
            Self::Fixed(size) => size,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Batch => f.write_str("B"),
            Self::Fixed(size) => write!(f, "{size}"),
        }
    }
}

/// How a [`Dim`] is written.
#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected \"B\" or a size")]
enum DimForm {
    Size(usize),
    Symbol(DimSymbol),
}

#[derive(Serialize, Deserialize)]
enum DimSymbol {
    B,
}

impl From<DimForm> for Dim {
    fn from(form: DimForm) -> Self {
        match form {
            DimForm::Size(size) => Self::Fixed(size),
            DimForm::Symbol(DimSymbol::B) => Self::Batch,
        }
    }
}

impl From<Dim> for DimForm {
    fn from(dim: Dim) -> Self {
        match dim {
            Dim::Batch => Self::Symbol(DimSymbol::B),
            Dim::Fixed(size) => Self::Size(size),
        }
    }
}

/// The dimensions of a tensor, outermost first. No dimensions is a scalar.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Shape(Vec<Dim>);

impl Shape {
    /// A shape of these dimensions.
    pub fn new(dims: Vec<Dim>) -> Self {
        Self(dims)
    }

    /// `[B, sizes...]`: one row of `sizes` per sample.
    pub fn batched(sizes: &[usize]) -> Self {
        Self(std::iter::once(Dim::Batch).chain(sizes.iter().map(|&size| Dim::Fixed(size))).collect())
    }

    /// The shape of one number.
    pub fn scalar() -> Self {
        Self(Vec::new())
    }

    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[Dim] {
        &self.0
    }

    /// How many dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// The sizes at `batch` rows.
    pub fn resolve(&self, batch: usize) -> Vec<usize> {
        self.0.iter().map(|dim| dim.resolve(batch)).collect()
    }

    /// Elements at `batch` rows; `u64::MAX` where that does not fit.
    pub fn elements(&self, batch: usize) -> u64 {
        self.0.iter().fold(1, |product: u64, dim| product.saturating_mul(dim.resolve(batch) as u64))
    }

    /// The same shape with another last dimension; a scalar stays one.
    pub(crate) fn with_last(&self, size: usize) -> Self {
        let mut dims = self.0.clone();
        if let Some(last) = dims.last_mut() {
            *last = Dim::Fixed(size);
        }
        Self(dims)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.0.iter().map(Dim::to_string).collect();
        f.pad(&format!("[{}]", dims.join(", ")))
    }
}

/// Shape and element type of the tensor on an edge.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorType {
    /// Dimensions, outermost first.
    pub shape: Shape,
    /// Its element type.
    pub dtype: DType,
}

impl TensorType {
    /// A tensor of floats.
    pub fn f32(shape: Shape) -> Self {
        Self { shape, dtype: DType::F32 }
    }

    /// A tensor of integers.
    pub fn i32(shape: Shape) -> Self {
        Self { shape, dtype: DType::I32 }
    }

    /// Dense bytes at `batch` rows; `u64::MAX` where that does not fit.
    pub fn bytes(&self, batch: usize) -> u64 {
        self.shape.elements(batch).saturating_mul(self.dtype.bytes() as u64)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{} {}", self.dtype, self.shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_resolves_counts_and_prints() {
        let shape = Shape::batched(&[64, 768]);
        assert_eq!(shape.to_string(), "[B, 64, 768]");
        assert_eq!(shape.resolve(3), [3, 64, 768]);
        assert_eq!(shape.elements(3), 3 * 64 * 768);
        assert_eq!(TensorType::f32(shape.clone()).bytes(3), 4 * 3 * 64 * 768);
        assert_eq!(TensorType::i32(shape).to_string(), "i32 [B, 64, 768]");
        assert_eq!((Shape::scalar().elements(7), Shape::scalar().to_string().as_str()), (1, "[]"));
    }

    #[test]
    fn elements_saturate_instead_of_overflowing() {
        let shape = Shape::batched(&[usize::MAX, usize::MAX]);
        assert_eq!(shape.elements(2), u64::MAX);
        assert_eq!(TensorType::f32(shape).bytes(2), u64::MAX);
    }

    #[test]
    fn a_shape_is_json_with_b_for_the_batch() {
        let shape = Shape::batched(&[64]);
        assert_eq!(serde_json::to_string(&shape).unwrap(), r#"["B",64]"#);
        assert_eq!(serde_json::from_str::<Shape>(r#"["B",64]"#).unwrap(), shape);
        let error = serde_json::from_str::<Shape>(r#"["S"]"#).unwrap_err().to_string();
        assert!(error.contains(r#"expected "B" or a size"#), "{error}");
    }
}
