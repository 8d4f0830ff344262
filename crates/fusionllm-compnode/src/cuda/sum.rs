//! Sums of two tensors on the device.

use std::sync::Arc;

use super::gpu::{Element, Gpu, Packed, number};
use super::kernel;
use crate::ExecutorError;

/// Adds `count` elements at two addresses, and puts the sums at a third, which may be one of the two. Addresses are
/// multiples of 16.
///
/// # Errors
/// [`ExecutorError`] if the device fails.
pub(super) fn add(
    gpu: &Arc<dyn Gpu>,
    element: Element,
    [a, b, sum]: [u64; 3],
    count: usize,
) -> Result<(), ExecutorError> {
    let mut arguments = Packed::default();
    [a, b, sum].into_iter().for_each(|address| arguments.pointer(address));
    arguments.u32(number(count)?);
    let grid = [number(count.div_ceil(kernel::elements(element)))?, 1];
    gpu.launch(kernel::ADD.of(element), grid, arguments.bytes())
}
