//! The one place that knows which frameworks there are.

use std::sync::Arc;

use crate::CompNodeError;
use crate::backend::Backend;
use crate::burn::{BurnBackend, BurnDevice};
use crate::cuda::CudaBackend;
use crate::device::DeviceChoice;

/// Opens a device and has it compute something.
///
/// # Errors
/// [`CompNodeError::DeviceChoice`] if this build has no such kind, or this machine no such device.
pub fn open_device(choice: DeviceChoice) -> Result<Arc<dyn Backend>, CompNodeError> {
    let device = match choice {
        DeviceChoice::Cuda(index) => return Ok(Arc::new(CudaBackend::open(index)?)),
        DeviceChoice::Auto => match CudaBackend::open_if_any() {
            Some(backend) => return Ok(Arc::new(backend)),
            None => BurnDevice::best(),
        },
        DeviceChoice::Cpu => BurnDevice::Cpu,
        DeviceChoice::Vulkan(index) => BurnDevice::Vulkan(index),
        DeviceChoice::Metal => BurnDevice::Metal,
        DeviceChoice::Rocm(index) => BurnDevice::Rocm(index),
    };
    Ok(Arc::new(BurnBackend::open(device)?))
}
