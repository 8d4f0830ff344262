//! Tensors at the borders of stages.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use fusionllm_codec::{Codec, ElementType, HostTensor};
use fusionllm_graph::{DType, OpDag, OpId};

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

/// A real tensor that an executor keeps on its device, in the type that it computes in; on the host it is f32.
pub trait DeviceTensor: Any + fmt::Debug + Send + Sync {
    /// Its shape, outermost first.
    fn shape(&self) -> &[usize];

    /// Copies it to the host.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    fn to_host(&self) -> Result<HostTensor, ExecutorError>;

    /// Whether [`Self::encode`] knows this codec. A tensor that leaves its CompNode then stays on the device until its
    /// message is encoded; else it comes to the host as part of the task that made it.
    fn encodes(&self, _codec: Codec) -> bool {
        false
    }

    /// Appends the bytes that [`Codec::encode`] makes of the tensor on the host. It is called on another thread than
    /// that of the executor.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails, or does not know the codec.
    fn encode(&self, codec: Codec, _out: &mut Vec<u8>) -> Result<(), ExecutorError> {
        Err(ExecutorError::Internal { what: format!("no device encodes by {codec}") })
    }
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

    /// The tensor on the host; a copy only where a device has it.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    pub fn on_host(&self) -> Result<Arc<HostTensor>, ExecutorError> {
        match self {
            Self::Host(tensor) => Ok(Arc::clone(tensor)),
            Self::Device(tensor) => tensor.to_host().map(Arc::new),
        }
    }

    /// The type of its elements on the host.
    pub fn element_type(&self) -> ElementType {
        match self {
            Self::Host(tensor) => tensor.element_type(),
            Self::Device(_) => ElementType::F32,
        }
    }

    /// Whether the tensor must be brought to the host before its message is encoded by this codec.
    pub(crate) fn needs_host(&self, codec: Codec) -> bool {
        matches!(self, Self::Device(tensor) if !tensor.encodes(codec))
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

/// Holds a tensor from outside against the graph, since kernels trust shapes.
///
/// # Errors
/// [`ExecutorError::Element`] and [`ExecutorError::Shape`] say what would be right.
pub(crate) fn check_input(dag: &OpDag, op: OpId, tensor: &BorderTensor) -> Result<(), ExecutorError> {
    let Some(entry) = dag.ops().get(op.index()) else {
        return Err(ExecutorError::Internal { what: format!("no op has number {}", op.0) });
    };
    let batch = tensor.shape().first().copied().unwrap_or(1);
    let expected = entry.output.shape.resolve(batch);
    let element = match tensor {
        BorderTensor::Host(tensor) if tensor.as_f32().is_none() => DType::I32,
        BorderTensor::Host(_) | BorderTensor::Device(_) => DType::F32,
    };
    if element != entry.output.dtype {
        return Err(ExecutorError::Element { op: entry.name.clone(), expected: entry.output.dtype, got: element });
    }
    if expected != tensor.shape() {
        return Err(ExecutorError::Shape { op: entry.name.clone(), expected, got: tensor.shape().to_vec() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use fusionllm_codec::{HostTensor, Values};
    use fusionllm_graph::{Gpt2Config, gpt2};

    use super::*;

    #[test]
    fn a_tensor_that_is_not_the_graphs_is_told_by_what_is_wrong_with_it() {
        let config = Gpt2Config { n_layer: 1, n_embd: 4, n_head: 2, ..Gpt2Config::named("gpt2").unwrap() };
        let dag = gpt2(&config, 3).unwrap();
        let error = |shape: &[usize], values: Values| {
            let tensor = HostTensor::new(shape.to_vec(), values).unwrap();
            check_input(&dag, dag.find("wpe").unwrap(), &tensor.into()).unwrap_err().to_string()
        };
        let integers = error(&[2, 3, 4], Values::I32(vec![0; 24]));
        assert_eq!(integers, "tensor of op `wpe` has i32 elements, expected f32");
        let narrow = error(&[2, 3, 3], Values::F32(vec![0.0; 18]));
        assert_eq!(narrow, "tensor of op `wpe` has shape [2, 3, 3], expected [2, 3, 4]");
    }
}
