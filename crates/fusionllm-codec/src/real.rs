//! The element types of host memory that a codec of reals reads and writes.

use half::{bf16, f16};

/// A real number type whose slices can be encoded and decoded: `f32`, `f16` or `bf16`.
///
/// Codecs compute in f32: narrower values are widened exactly before they are encoded, and decoded values are
/// rounded to nearest even.
pub trait Real: Copy + Default + private::Sealed {
    /// The same number as f32; exact.
    fn to_f32(self) -> f32;
    /// The nearest number of this type.
    fn from_f32(value: f32) -> Self;
    /// The slice itself if this type is f32, so that nothing is copied.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
    /// The vector itself if this type is f32.
    fn as_f32_vec(values: &mut Vec<Self>) -> Option<&mut Vec<f32>>;
}

impl Real for f32 {
    fn to_f32(self) -> f32 {
        self
    }

    fn from_f32(value: f32) -> Self {
        value
    }

    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }

    fn as_f32_vec(values: &mut Vec<Self>) -> Option<&mut Vec<f32>> {
        Some(values)
    }
}

macro_rules! narrow {
    ($($type:ty),*) => {$(
        impl Real for $type {
            fn to_f32(self) -> f32 {
                <$type>::to_f32(self)
            }

            fn from_f32(value: f32) -> Self {
                <$type>::from_f32(value)
            }

            fn as_f32(_: &[Self]) -> Option<&[f32]> {
                None
            }

            fn as_f32_vec(_: &mut Vec<Self>) -> Option<&mut Vec<f32>> {
                None
            }
        }
    )*};
}

narrow!(f16, bf16);

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}
