//! The one place that knows which frameworks there are.

use std::sync::Arc;

use crate::CompNodeError;
use crate::backend::Backend;
use crate::burn::BurnBackend;
use crate::device::DeviceChoice;

/// Opens a device and has it compute something.
///
/// # Errors
/// [`CompNodeError::DeviceChoice`] if this build has no such kind, or this machine no such device.
pub fn open_device(choice: DeviceChoice) -> Result<Arc<dyn Backend>, CompNodeError> {
    Ok(Arc::new(BurnBackend::open(choice)?))
}
