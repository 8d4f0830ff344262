//! MaxPool2d: the largest element of a square window.

use crate::cost::Cost;
use crate::dtype::DType;
use crate::error::Misfit;
use crate::ops::image::Window;
use crate::rule::{Io, Rule, one, product};
use crate::shape::{Shape, TensorType};

pub(crate) struct MaxPool2d {
    pub(crate) window: Window,
}

impl Rule for MaxPool2d {
    fn family(&self) -> &'static str {
        "max_pool2d"
    }

    /// The window, which shapes do not tell.
    fn variant(&self) -> Option<String> {
        Some(self.window.to_string())
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        let [channels, height, width] = self.window.over(one(inputs)?)?;
        Ok(TensorType::f32(Shape::batched(&[channels, height, width])))
    }

    /// A comparison per element of the window; keeps where the largest stood, an i32 per output element.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let kernel = self.window.kernel as u64;
        let indices = io.output_elements().saturating_mul(DType::I32.bytes() as u64);
        io.per_element(product(&[kernel, kernel]), 1, indices)
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{infer, real, refusal};

    #[test]
    fn a_pool_has_the_shape_of_pytorch() {
        let pool = OpKind::MaxPool2d { kernel: 3, stride: 2, padding: 1 };
        assert_eq!(infer(&pool, &[real(&[64, 112, 112])]).unwrap(), real(&[64, 56, 56]));
    }

    #[test]
    fn a_window_that_does_not_fit_is_refused() {
        let pool = |kernel, stride, padding| OpKind::MaxPool2d { kernel, stride, padding };
        assert!(refusal(&pool(9, 1, 0), &[real(&[1, 4, 4])]).contains("at least kernel 9"));
        assert!(refusal(&pool(3, 0, 0), &[real(&[1, 4, 4])]).starts_with("stride is 0"));
        assert!(refusal(&pool(3, 1, 3), &[real(&[1, 4, 4])]).contains("less than kernel 3"));
    }
}
