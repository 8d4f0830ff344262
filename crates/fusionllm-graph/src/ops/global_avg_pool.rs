//! GlobalAvgPool: the mean of each channel over height and width.

use crate::cost::Cost;
use crate::error::Misfit;
use crate::ops::image::image;
use crate::rule::{Io, Rule, one};
use crate::shape::{Shape, TensorType};

pub(crate) struct GlobalAvgPool;

impl Rule for GlobalAvgPool {
    fn family(&self) -> &'static str {
        "global_avg_pool"
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        let [channels, ..] = image(one(inputs)?)?;
        Ok(TensorType::f32(Shape::batched(&[1, channels])))
    }

    /// An addition and its share of the gradient per input element; keeps nothing.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let elements = io.input_elements();
        let cost = io.per_element(0, 0, 0);
        Cost { fp_flops: elements, bp_flops: elements, ..cost }
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{infer, real};

    #[test]
    fn a_row_of_channels_is_left_of_an_image() {
        assert_eq!(infer(&OpKind::GlobalAvgPool, &[real(&[64, 7, 7])]).unwrap(), real(&[1, 64]));
    }
}
