//! Ops of image models. Shapes: B batch, C channels, H height, W width. They have costs but no kernels yet: a model of
//! them can be planned, not trained.

use crate::cost::Cost;
use crate::dtype::DType;
use crate::error::Misfit;
use crate::kind::{OpClass, ParamRole};
use crate::rule::{Io, Rule, one, positive, positive_eps, product, role, wrong_attribute, wrong_input};
use crate::shape::{Dim, Shape, TensorType};

/// Mean and variance 4, normalisation 2, weight and bias 2.
const NORM_FP_FLOPS_PER_ELEMENT: u64 = 8;
/// As layer norm.
const NORM_BP_FLOPS_PER_ELEMENT: u64 = 11;

/// A square window that moves over height and width.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    pub(crate) padding: usize,
}

impl Window {
    fn check(self) -> Result<(), Misfit> {
        positive("kernel", self.kernel)?;
        positive("stride", self.stride)?;
        if self.padding >= self.kernel {
            return Err(wrong_attribute("padding", self.padding, format!("less than kernel {}", self.kernel)));
        }
        Ok(())
    }

    /// How many places the window has along `size`; nothing if it does not fit.
    fn places(self, size: usize) -> Option<usize> {
        let room = size.checked_add(2 * self.padding)?.checked_sub(self.kernel)?;
        Some(room / self.stride + 1)
    }

    fn over(self, input: &TensorType) -> Result<[usize; 3], Misfit> {
        self.check()?;
        let [channels, height, width] = image(input)?;
        match (self.places(height), self.places(width)) {
            (Some(height), Some(width)) => Ok([channels, height, width]),
            _ => Err(wrong_input(input, format!("height and width of at least kernel {} less padding", self.kernel))),
        }
    }
}

/// Channels, height and width of a `f32 [B, C, H, W]`.
fn image(input: &TensorType) -> Result<[usize; 3], Misfit> {
    match (input.dtype, input.shape.dims()) {
        (DType::F32, &[Dim::Batch, Dim::Fixed(c), Dim::Fixed(h), Dim::Fixed(w)]) => Ok([c, h, w]),
        _ => Err(wrong_input(input, "f32 [B, C, H, W]")),
    }
}

fn with_channels(input: &TensorType, channels: usize) -> Result<(), Misfit> {
    let [got, ..] = image(input)?;
    if got == channels { Ok(()) } else { Err(wrong_input(input, format!("f32 [B, {channels}, H, W]"))) }
}

pub(crate) struct Conv2d {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) window: Window,
}

impl Rule for Conv2d {
    fn family(&self) -> &'static str {
        "conv2d"
    }

    fn class(&self) -> OpClass {
        OpClass::Parameter
    }

    fn params(&self) -> Vec<ParamRole> {
        vec![role("weight", &[self.outputs, self.inputs, self.window.kernel, self.window.kernel])]
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

pub(crate) struct BatchNorm2d {
    pub(crate) channels: usize,
    pub(crate) eps: f64,
}

impl Rule for BatchNorm2d {
    fn family(&self) -> &'static str {
        "batch_norm2d"
    }

    fn class(&self) -> OpClass {
        OpClass::Parameter
    }

    fn params(&self) -> Vec<ParamRole> {
        vec![role("weight", &[self.channels]), role("bias", &[self.channels])]
    }

    fn infer(&self, inputs: &[&TensorType]) -> Result<TensorType, Misfit> {
        positive("channels", self.channels)?;
        positive_eps(self.eps)?;
        let input = one(inputs)?;
        with_channels(input, self.channels)?;
        Ok(input.clone())
    }

    /// Keeps the input.
    fn cost(&self, io: &Io<'_>) -> Cost {
        let cost = io.per_element(NORM_FP_FLOPS_PER_ELEMENT, NORM_BP_FLOPS_PER_ELEMENT, io.input_bytes());
        Cost { read_bytes: cost.read_bytes.saturating_add(self.param_bytes()), ..cost }
    }
}

pub(crate) struct MaxPool2d {
    pub(crate) window: Window,
}

impl Rule for MaxPool2d {
    fn family(&self) -> &'static str {
        "max_pool2d"
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
    use crate::ops::checks::{cost, infer, real, refusal};

    use super::*;

    const STEM: OpKind = OpKind::Conv2d { inputs: 3, outputs: 64, kernel: 7, stride: 2, padding: 3 };

    #[test]
    fn a_convolution_shrinks_by_its_stride() {
        assert_eq!(infer(&STEM, &[real(&[3, 224, 224])]).unwrap(), real(&[64, 112, 112]));
        assert_eq!(STEM.param_roles(), [role("weight", &[64, 3, 7, 7])]);
        let flops = 2 * 64 * 112 * 112 * 3 * 49;
        let cost = cost(&STEM, &[real(&[3, 224, 224])], 2);
        assert_eq!((cost.fp_flops, cost.bp_flops), (2 * flops, 4 * flops));
    }

    #[test]
    fn pools_and_norms_have_the_shapes_of_pytorch() {
        let pool = OpKind::MaxPool2d { kernel: 3, stride: 2, padding: 1 };
        assert_eq!(infer(&pool, &[real(&[64, 112, 112])]).unwrap(), real(&[64, 56, 56]));
        let norm = OpKind::BatchNorm2d { channels: 64, eps: 1e-5 };
        assert_eq!(infer(&norm, &[real(&[64, 5, 5])]).unwrap(), real(&[64, 5, 5]));
        assert_eq!(infer(&OpKind::GlobalAvgPool, &[real(&[64, 7, 7])]).unwrap(), real(&[1, 64]));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(refusal(&STEM, &[real(&[4, 9, 9])]).contains("expected f32 [B, 3, H, W]"));
        assert!(refusal(&STEM, &[real(&[3, 9])]).contains("expected f32 [B, C, H, W]"));
        let pool = |kernel, stride, padding| OpKind::MaxPool2d { kernel, stride, padding };
        assert!(refusal(&pool(9, 1, 0), &[real(&[1, 4, 4])]).contains("at least kernel 9"));
        assert!(refusal(&pool(3, 0, 0), &[real(&[1, 4, 4])]).starts_with("stride is 0"));
        assert!(refusal(&pool(3, 1, 3), &[real(&[1, 4, 4])]).contains("less than kernel 3"));
    }
}
