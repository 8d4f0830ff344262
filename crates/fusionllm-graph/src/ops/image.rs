//! What ops of image models share. Shapes: B batch, C channels, H height, W width.

use std::fmt;

use crate::dtype::DType;
use crate::error::Misfit;
use crate::rule::{positive, wrong_attribute, wrong_input};
use crate::shape::{Dim, TensorType};

/// A square window that moves over height and width.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    pub(crate) padding: usize,
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{0}x{0}/{1}+{2}", self.kernel, self.stride, self.padding)
    }
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

    /// Channels, height and width of what it gives of a `f32 [B, C, H, W]`.
    pub(crate) fn over(self, input: &TensorType) -> Result<[usize; 3], Misfit> {
        self.check()?;
        let [channels, height, width] = image(input)?;
        match (self.places(height), self.places(width)) {
            (Some(height), Some(width)) => Ok([channels, height, width]),
            _ => Err(wrong_input(input, format!("height and width of at least kernel {} less padding", self.kernel))),
        }
    }
}

/// Channels, height and width of a `f32 [B, C, H, W]`.
pub(crate) fn image(input: &TensorType) -> Result<[usize; 3], Misfit> {
    match (input.dtype, input.shape.dims()) {
        (DType::F32, &[Dim::Batch, Dim::Fixed(c), Dim::Fixed(h), Dim::Fixed(w)]) => Ok([c, h, w]),
        _ => Err(wrong_input(input, "f32 [B, C, H, W]")),
    }
}

/// That an image has so many channels.
pub(crate) fn with_channels(input: &TensorType, channels: usize) -> Result<(), Misfit> {
    let [got, ..] = image(input)?;
    if got == channels { Ok(()) } else { Err(wrong_input(input, format!("f32 [B, {channels}, H, W]"))) }
}
