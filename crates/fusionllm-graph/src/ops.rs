//! The families of ops, a file each.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod batch_norm2d;
pub(crate) mod conv2d;
pub(crate) mod dropout;
pub(crate) mod elementwise;
pub(crate) mod embedding;
pub(crate) mod global_avg_pool;
pub(crate) mod grouped_attention;
pub(crate) mod image;
pub(crate) mod linear;
pub(crate) mod loss;
pub(crate) mod max_pool2d;
pub(crate) mod norm;
pub(crate) mod placeholder;
pub(crate) mod position;
pub(crate) mod rms_norm;
pub(crate) mod rotary;
pub(crate) mod scale;

#[cfg(test)]
pub(crate) mod checks {
    //! What the families' tests share.

    use crate::cost::Cost;
    use crate::error::Misfit;
    use crate::op::OpKind;
    use crate::shape::{Shape, TensorType};

    pub(crate) fn real(sizes: &[usize]) -> TensorType {
        TensorType::f32(Shape::batched(sizes))
    }

    pub(crate) fn ids(sizes: &[usize]) -> TensorType {
        TensorType::i32(Shape::batched(sizes))
    }

    pub(crate) fn infer(kind: &OpKind, inputs: &[TensorType]) -> Result<TensorType, Misfit> {
        kind.infer(&inputs.iter().collect::<Vec<_>>())
    }

    /// The message with which these inputs are refused.
    pub(crate) fn refusal(kind: &OpKind, inputs: &[TensorType]) -> String {
        infer(kind, inputs).unwrap_err().to_string()
    }

    /// The cost of inputs that fit.
    pub(crate) fn cost(kind: &OpKind, inputs: &[TensorType], batch: usize) -> Cost {
        let output = infer(kind, inputs).unwrap();
        kind.cost(&inputs.iter().collect::<Vec<_>>(), &output, batch)
    }
}
