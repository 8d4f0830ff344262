//! Tensors at the borders of stages.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use fusionllm_codec::HostTensor;

use crate::ExecutorError;

/// A tensor between two stages: on the host, or where the executor that made it keeps it. Two stages of one CompNode
/// exchange it without a copy; only what leaves the CompNode must come to the host.
#[derive(Clone, Debug)]
pub enum BorderTensor {
    /// On the host.
    Host(Arc<HostTensor>),
    /// With an executor.
    Device(Arc<dyn DeviceTensor>),
}

/// An f32 tensor that an executor keeps on its device.
pub trait DeviceTensor: Any + fmt::Debug + Send + Sync {
    /// Its shape, outermost first.
    fn shape(&self) -> &[usize];

    /// Copies it to the host.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    fn to_host(&self) -> Result<HostTensor, ExecutorError>;
}

impl BorderTensor {
    /// Its shape, outermost first.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Host(tensor) => tensor.shape(),
            Self::Device(tensor) => tensor.shape(),
        }
    }

    /// The tensor on the host; a copy only where somebody else has it too, or a device.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    pub fn into_host(self) -> Result<HostTensor, ExecutorError> {
        match self {
            Self::Host(tensor) => Ok(Arc::unwrap_or_clone(tensor)),
            Self::Device(tensor) => tensor.to_host(),
        }
    }

    /// The device tensor, if it is of this executor's kind.
    pub(crate) fn of_kind<T: DeviceTensor>(&self) -> Option<&T> {
        match self {
            Self::Host(_) => None,
            Self::Device(tensor) => (tensor.as_ref() as &dyn Any).downcast_ref(),
        }
    }
}

impl From<HostTensor> for BorderTensor {
    fn from(tensor: HostTensor) -> Self {
        Self::Host(Arc::new(tensor))
    }
}
