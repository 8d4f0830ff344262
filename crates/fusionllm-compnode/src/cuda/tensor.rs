//! Tensors at the borders of stages, on the device.

use std::sync::Arc;

use fusionllm_codec::{HostTensor, Values};

use super::gpu::{Buffer, Element, Gpu, f32_of_bf16_bytes, f32_of_bytes};
use crate::ExecutorError;
use crate::border::DeviceTensor;

/// A tensor in the device's memory.
#[derive(Debug)]
pub(super) struct CudaTensor {
    gpu: Arc<dyn Gpu>,
    buffer: Buffer,
    shape: Vec<usize>,
    element: Element,
}

impl CudaTensor {
    pub(super) fn new(gpu: &Arc<dyn Gpu>, buffer: Buffer, shape: Vec<usize>, element: Element) -> Self {
        Self { gpu: Arc::clone(gpu), buffer, shape, element }
    }

    pub(super) fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Whether an executor on `gpu` that computes in `element` may take it as it is.
    pub(super) fn is_on(&self, gpu: &Arc<dyn Gpu>, element: Element) -> bool {
        Arc::ptr_eq(&self.gpu, gpu) && self.element == element
    }

    pub(super) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.element.bytes()
    }
}

impl DeviceTensor for CudaTensor {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn to_host(&self) -> Result<HostTensor, ExecutorError> {
        let mut bytes = vec![0; self.bytes()];
        self.gpu.download(self.buffer.address(), &mut bytes)?;
        let values = match self.element {
            Element::F32 => f32_of_bytes(&bytes),
            Element::Bf16 => f32_of_bf16_bytes(&bytes),
        };
        HostTensor::new(self.shape.clone(), Values::F32(values))
            .map_err(|e| ExecutorError::Internal { what: format!("device tensor: {e}") })
    }
}
