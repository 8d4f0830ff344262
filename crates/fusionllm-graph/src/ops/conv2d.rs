//! Conv2d: a square convolution over height and width.

use crate::cost::Cost;
use crate::error::Misfit;
use crate::kind::{OpClass, ParamRole};
use crate::ops::image::{Window, with_channels};
use crate::rule::{Io, Rule, one, positive, product, role};
use crate::shape::{Shape, TensorType};

pub(crate) struct Conv2d {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) window: Window,
    pub(crate) bias: bool,
}

impl Rule for Conv2d {
    fn family(&self) -> &'static str {
        "conv2d"
    }

    fn class(&self) -> OpClass {
        OpClass::Parameter
    }

    fn params(&self) -> Vec<ParamRole> {
        let weight = role("weight", &[self.outputs, self.inputs, self.window.kernel, self.window.kernel]);
        let bias = self.bias.then(|| role("bias", &[self.outputs]));
        std::iter::once(weight).chain(bias).collect()
    }

    /// The window, which shapes do not tell.
    fn variant(&self) -> Option<String> {
        Some(self.window.to_string())
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        positive("inputs", self.inputs)?;
        positive("outputs", self.outputs)?;
        let input = one(inputs)?;
        with_channels(input, self.inputs)?;
        let [_, height, width] = self.window.over(input)?;
        Ok(TensorType::f32(Shape::batched(&[self.outputs, height, width])))
    }

    /// FP is one matrix product over the window's elements, BP is two. Keeps the input.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let kernel = self.window.kernel as u64;
        let fp_flops = product(&[2, io.output_elements(), self.inputs as u64, kernel, kernel]);
        io.matrix_product(fp_flops, self.param_bytes())
    }
}

#[cfg(test)]
mod tests {
    use crate::op::OpKind;
    use crate::ops::checks::{cost, infer, real, refusal};

    use super::*;

    const STEM: OpKind = OpKind::Conv2d { inputs: 3, outputs: 64, kernel: 7, stride: 2, padding: 3, bias: false };

    #[test]
    fn a_convolution_shrinks_by_its_stride() {
        assert_eq!(infer(&STEM, &[real(&[3, 224, 224])]).unwrap(), real(&[64, 112, 112]));
        assert_eq!(STEM.param_roles(), [role("weight", &[64, 3, 7, 7])]);
        let biased = OpKind::Conv2d { inputs: 3, outputs: 64, kernel: 7, stride: 2, padding: 3, bias: true };
        assert_eq!(biased.param_roles()[1], role("bias", &[64]));
        let flops = 2 * 64 * 112 * 112 * 3 * 49;
        let cost = cost(&STEM, &[real(&[3, 224, 224])], 2);
        assert_eq!((cost.fp_flops, cost.bp_flops), (2 * flops, 4 * flops));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(refusal(&STEM, &[real(&[4, 9, 9])]).contains("expected f32 [B, 3, H, W]"));
        assert!(refusal(&STEM, &[real(&[3, 9])]).contains("expected f32 [B, C, H, W]"));
    }
}
